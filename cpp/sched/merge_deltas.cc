#include "sched/merge_deltas.h"

#include <cstddef>
#include <iterator>
#include <unordered_map>
#include <utility>

#include "base/hash.h"

namespace fastllm {
namespace {

template <class T>
void append(std::vector<T>& to, std::vector<T>& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

void join(TokenDelta& first, TokenDelta& next) {
  append(first.tokens, next.tokens);
  append(first.logprobs, next.logprobs);
  append(first.prompt_logprobs, next.prompt_logprobs);
  first.finish = next.finish;
  first.stop_token = next.stop_token;
  first.cached_tokens = next.cached_tokens;
  first.num_preemptions = next.num_preemptions;
  first.error = std::move(next.error);
  first.error_kind = next.error_kind;
  first.times = next.times;
}

struct Key {
  std::uint64_t id;
  int index;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  std::size_t operator()(const Key& k) const { return hash_combine(k.id, static_cast<std::uint64_t>(k.index)); }
};

}  // namespace

void merge_deltas(std::vector<TokenDelta>& deltas) {
  if (deltas.size() < 2) return;
  std::unordered_map<Key, std::size_t, KeyHash> open;  // where the unfinished delta of a sequence stands
  open.reserve(deltas.size());
  std::size_t kept = 0;
  for (std::size_t i = 0; i < deltas.size(); ++i) {
    const Key key{deltas[i].id, deltas[i].index};
    const bool ends = deltas[i].finish != FinishReason::None;
    const auto found = open.find(key);
    if (found != open.end()) {
      join(deltas[found->second], deltas[i]);
      if (ends) open.erase(found);
      continue;
    }
    if (kept != i) deltas[kept] = std::move(deltas[i]);
    if (!ends) open.emplace(key, kept);
    ++kept;
  }
  deltas.erase(deltas.begin() + static_cast<std::ptrdiff_t>(kept), deltas.end());
}

}  // namespace fastllm

#include "kv/prefix_cache.h"

#include <algorithm>
#include <bit>
#include <cassert>

#include "base/hash.h"

namespace fastllm {
namespace {

// A salt is chosen by clients, so the table of roots is bounded.
constexpr std::size_t kMaxRoots = 65536;

}  // namespace

// Four independent lanes hide the latency of the multiplications.
std::uint64_t hash_prefix(PrefixNodeId parent, std::span<const TokenId> tokens) {
  constexpr std::uint64_t kMul = 0x9e3779b97f4a7c15ull;
  std::uint64_t lane[4] = {static_cast<std::uint64_t>(parent), 1, 2, 3};
  std::size_t i = 0;
  for (; i + 4 <= tokens.size(); i += 4) {
    for (std::size_t k = 0; k < 4; ++k) lane[k] = (lane[k] ^ static_cast<std::uint32_t>(tokens[i + k])) * kMul;
  }
  for (; i < tokens.size(); ++i) lane[0] = (lane[0] ^ static_cast<std::uint32_t>(tokens[i])) * kMul;
  return hash_combine(hash_combine(mix64(lane[0]), mix64(lane[1])), hash_combine(mix64(lane[2]), mix64(lane[3])));
}

PrefixCache::PrefixCache(std::int64_t num_blocks, int block_size, PrefixHash hash)
    : block_size_(static_cast<std::size_t>(block_size)), hash_(hash) {
  const auto n = static_cast<std::size_t>(num_blocks);
  entries_.resize(n);
  tokens_.resize(n * block_size_);
  buckets_.resize(std::bit_ceil(std::max<std::size_t>(n, 1)), kNoBlock);
}

PrefixNodeId PrefixCache::root(const std::string& salt, int adapter) {
  if (roots_.size() >= kMaxRoots) roots_.clear();
  auto [it, added] = roots_.try_emplace({salt, adapter}, kNoPrefixNode);
  if (added) it->second = PrefixNodeId{next_id_++};
  return it->second;
}

PrefixCache::Node PrefixCache::find(PrefixNodeId parent, std::span<const TokenId> tokens) const {
  return find(parent, tokens, hash_(parent, tokens));
}

PrefixCache::Node PrefixCache::find(PrefixNodeId parent, std::span<const TokenId> tokens, std::uint64_t hash) const {
  assert(tokens.size() == block_size_);
  for (BlockId b = buckets_[hash & (buckets_.size() - 1)]; b != kNoBlock; b = entries_[index(b)].next) {
    const Entry& e = entries_[index(b)];
    if (e.hash == hash && e.parent == parent && std::ranges::equal(this->tokens(b), tokens)) return {e.id, b};
  }
  return {};
}

PrefixNodeId PrefixCache::publish(PrefixNodeId parent, std::span<const TokenId> tokens, BlockId block) {
  const std::uint64_t hash = hash_(parent, tokens);
  if (const Node existing = find(parent, tokens, hash); existing.id != kNoPrefixNode) return existing.id;
  forget(block);
  BlockId& first = bucket(hash);
  const PrefixNodeId id{next_id_++};
  entries_[index(block)] = {id, parent, hash, first};
  first = block;
  std::ranges::copy(tokens, tokens_.begin() + static_cast<std::ptrdiff_t>(index(block) * block_size_));
  ++num_nodes_;
  return id;
}

void PrefixCache::forget(BlockId block) {
  Entry& entry = entries_[index(block)];
  if (entry.id == kNoPrefixNode) return;
  BlockId* link = &bucket(entry.hash);
  while (*link != block) link = &entries_[index(*link)].next;
  *link = entry.next;
  entry = {};
  --num_nodes_;
}

std::span<const TokenId> PrefixCache::tokens(BlockId block) const {
  return {tokens_.data() + index(block) * block_size_, block_size_};
}

}  // namespace fastllm

#include "sched/invariants.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "fastllm/error.h"
#include "sched/scheduler.h"

namespace fastllm {
namespace {

std::string name(const Sequence& seq) {
  return "Sequence " + std::to_string(seq.req->id) + "/" + std::to_string(seq.index);
}

std::string broken_pool(const BlockAllocator& pool, const std::vector<int>& refs, const PrefixCache* cache) {
  std::int64_t used = 0, cached = 0;
  for (std::int64_t i = 0; i < pool.num_blocks(); ++i) {
    const BlockId block{static_cast<std::int32_t>(i)};
    const int expected = refs[index(block)];
    const std::string what = "Block " + std::to_string(i);
    if (pool.ref_count(block) != expected) {
      return what + " has " + std::to_string(pool.ref_count(block)) + " references, but tables hold " +
             std::to_string(expected) + ".";
    }
    if (i < pool.num_reserved() && (expected != 0 || pool.is_cached(block))) return what + " is reserved but in use.";
    if (pool.is_cached(block) && expected != 0) return what + " is free but referenced.";
    if (cache && expected == 0 && cache->holds(block) != pool.is_cached(block)) {
      return what + " is on the wrong free list.";
    }
    used += expected > 0;
    cached += pool.is_cached(block);
  }
  if (used != pool.num_used() || cached != pool.num_cached()) {
    return "Free, referenced and reserved blocks do not add up to the pool.";
  }
  return {};
}

std::string broken_counters(const Sequence& s) {
  const bool finished = s.state == SeqState::Finished;  // drops late tokens, which its positions were computed for
  const auto bound = [&](bool ok, const char* what) { return ok ? std::string() : name(s) + ": " + what; };
  for (std::string error : {
           bound(s.num_computed >= 0 && (finished || s.num_computed <= s.num_tokens()),
                 "num_computed is outside its tokens."),
           bound(s.num_pending >= 0 && s.num_pending <= s.inflight, "num_pending exceeds the steps in flight."),
           bound(s.num_tokens() <= s.req->token_limit, "more tokens than its limit."),
           bound((s.state == SeqState::Running) == (s.slot != kNoSlot), "a slot without running, or the reverse."),
           bound(s.state != SeqState::Draining || s.inflight > 0, "draining with nothing in flight."),
           bound(s.state != SeqState::Waiting || (s.inflight == 0 && s.kv.blocks.empty()), "waiting, but resident."),
           bound(s.state == SeqState::Running || s.kv.blocks.empty(), "blocks without running."),
           bound(s.state == SeqState::Swapped || s.kv.host_blocks.empty(), "host blocks without being swapped."),
           bound(!s.queued || s.inflight == 0, "queued with steps in flight."),
           bound(s.state != SeqState::Swapped || s.queued == (s.inflight == 0 && !s.parked), "swapped, not in line."),
           bound(!s.parked || (s.req->beams && !s.queued && s.inflight == 0), "parked, but in line or in flight."),
           bound(s.stale_from < 0 || s.state == SeqState::Running, "a stale table without a slot."),
       }) {
    if (!error.empty()) return error;
  }
  return {};
}

std::string broken_beams(const Request& request) {
  const BeamGroup& group = *request.beams;
  const std::string who = "Request " + std::to_string(request.id);
  if (group.sequence_of.size() != group.search.num_beams() || group.rows.size() != group.sequence_of.size()) {
    return who + " miscounts its beams.";
  }
  std::size_t parked = request.seqs.size() - group.sequence_of.size();  // those without a beam
  parked += group.num_known;
  for (const auto& seq : request.seqs) parked -= seq->parked;
  if (parked != 0) return who + " parked other sequences than those that wait.";
  for (const std::int32_t i : group.sequence_of) {
    if (request.seqs.at(static_cast<std::size_t>(i))->num_output() != group.search.length()) {
      return who + ": a beam is shorter than its search.";
    }
  }
  return {};
}

std::string broken_table(const Sequence& s, const KvManager& kv) {
  const auto size = static_cast<std::size_t>(kv.block_size());
  if (s.state == SeqState::Running &&
      s.kv.blocks.size() < static_cast<std::size_t>(kv.num_blocks_for(s.num_computed))) {
    return name(s) + " computed positions it has no block for.";
  }
  for (std::size_t i = 0; i < s.kv.blocks.size() && i < static_cast<std::size_t>(s.kv.num_published); ++i) {
    if (!kv.cache().holds(s.kv.blocks[i])) continue;
    const auto own = std::span(s.tokens).subspan(i * size, size);
    if (!std::ranges::equal(own, kv.cache().tokens(s.kv.blocks[i]))) {
      return name(s) + ": the cache node of block " + std::to_string(i) + " holds other tokens.";
    }
  }
  return {};
}

}  // namespace

std::string broken_invariant(const Scheduler& scheduler) {
  const KvManager& kv = scheduler.kv();
  std::vector<int> refs(static_cast<std::size_t>(kv.device().num_blocks()));
  std::vector<int> host_refs(static_cast<std::size_t>(kv.host().num_blocks()));
  std::set<SlotId> slots;
  std::map<const Request*, std::pair<int, int>> requests;  // live, in flight
  std::size_t running = 0, queued = 0;
  std::string error;
  scheduler.for_each_sequence([&](const Sequence& s) {
    for (BlockId block : s.kv.blocks) ++refs[index(block)];
    for (BlockId block : s.kv.host_blocks) ++host_refs[index(block)];
    if (s.slot != kNoSlot && !slots.insert(s.slot).second) error = name(s) + " shares its slot.";
    running += s.state == SeqState::Running;
    queued += s.queued;
    requests[s.req].first += s.state != SeqState::Finished;
    requests[s.req].second += s.inflight;
    if (error.empty()) error = broken_counters(s);
    if (error.empty()) error = broken_table(s, kv);
    if (error.empty() && s.req->beams && s.index == 0 && s.req->num_live > 0) error = broken_beams(*s.req);
  });
  if (!error.empty()) return error;
  for (const auto& [request, counts] : requests) {
    if (request->num_live != counts.first || request->inflight != counts.second) {
      return "Request " + std::to_string(request->id) + " miscounts its sequences or steps.";
    }
  }
  if (running != scheduler.running().size()) return "The running list does not match the states.";
  if (queued != scheduler.num_queued()) return "The waiting line does not match its sequences.";
  if (slots.size() + scheduler.num_free_slots() != scheduler.num_slots()) return "A slot was lost.";
  if (error = broken_pool(kv.device(), refs, &kv.cache()); !error.empty()) return error;
  return broken_pool(kv.host(), host_refs, nullptr);
}

void check_invariants(const Scheduler& scheduler) {
  if (const std::string error = broken_invariant(scheduler); !error.empty()) throw Error(error);
}

}  // namespace fastllm

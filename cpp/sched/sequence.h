// A request and its sequences: facts the scheduler keeps about them. Engine thread only.
//
//   tokens        | prompt ............ | output known to the host ... |   append-only
//   num_tokens()  |-------------------------------------------------- p p|  p: sampled on the device, num_pending
//   num_computed  |------------------------------------------------->|      KV covered by submitted steps
//   to_compute()                                                     |---|
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "base/ids.h"
#include "kv/kv_manager.h"
#include "sched/beam_search.h"
#include "sched/policy.h"
#include "sched/step_plan.h"

namespace fastllm {

// Waiting -> Running -> {Finished, Waiting, Swapped, Draining}; Draining -> Waiting; Swapped -> Running;
// anything -> Finished.
enum class SeqState : std::uint8_t {
  Waiting,   // nothing on the device, nothing in flight
  Running,   // owns a slot
  Swapped,   // KV on the host; admitted again once nothing is in flight
  Draining,  // preempted while steps were in flight: their results still count
  Finished,  // results that still arrive are dropped
};

struct Request;

struct Sequence {
  Request* req = nullptr;
  std::int32_t index = 0;  // 0..n-1
  SeqState state = SeqState::Waiting;
  bool queued = false;  // stands in the waiting line
  OrderKey order;
  std::uint64_t seed = 0;
  std::vector<TokenId> tokens;                    // prompt + every id the host has seen
  std::int32_t num_prompt = 0;                    // tokens
  std::int32_t num_computed = 0;                  // positions
  std::int32_t num_pending = 0;                   // tokens
  std::int32_t inflight = 0;                      // steps submitted, result not applied
  bool prompt_submitted = false;                  // the KV of the whole prompt is covered by submitted steps
  std::int32_t prompt_logprobs_planned = 0;       // leading prompt positions whose next token was planned to be scored
  std::vector<PositionLogprobs> prompt_logprobs;  // read back, not yet delivered
  std::shared_ptr<TokenMask> mask;                // null: any token
  SlotId slot = kNoSlot;
  BlockTable kv;
  std::int32_t stale_from = -1;     // first block of the table that the slot does not know yet; -1: it knows all
  std::int32_t fork_of = -1;        // of a beam not yet resident: the sibling that has all its positions but the last
  bool parked = false;              // of a beam search: its next tokens are known or it is no beam, so it must not run
  std::int32_t cached_tokens = -1;  // at first admission; -1 before it
  bool has_others_kv = false;       // the table, or the elder's that it shares, began with a match of the cache
  bool trusts_cache = true;         // false once what it had from there led to no numbers
  std::int32_t void_samples = 0;    // tokens sampled on the device from what was no number, to be dropped
  std::int32_t num_preemptions = 0;
  RequestTimes times;

  std::int32_t num_tokens() const { return static_cast<std::int32_t>(tokens.size()) + num_pending; }
  std::int32_t num_output() const { return static_cast<std::int32_t>(tokens.size()) - num_prompt; }
  std::int32_t to_compute() const { return num_tokens() - num_computed; }
};

// The beams of a request. They advance together: when the next tokens of all are known.
struct BeamGroup {
  explicit BeamGroup(BeamRules rules) : search(std::move(rules)), rows(1) {}
  BeamSearch search;
  std::vector<std::int32_t> sequence_of = {0};  // [beams] index of the sequence that carries it
  std::vector<PositionLogprobs> rows;           // [beams] next tokens
  std::size_t num_known = 0;                    // rows
};

struct Request {
  std::uint64_t id = 0;
  std::shared_ptr<const SamplingParams> sampling;
  std::shared_ptr<LogitsProcessor> logits_processor;
  std::vector<std::unique_ptr<Sequence>> seqs;  // [n], or one for each beam
  std::unique_ptr<BeamGroup> beams;             // of a beam search
  std::int32_t num_live = 0;                    // sequences not Finished
  std::int32_t inflight = 0;                    // over all sequences
  std::int32_t token_limit = 0;                 // prompt + output tokens of a sequence
  bool started = false;                         // some sequence was admitted
  bool forked = false;                          // sequences 1..n-1 stand in line
  bool aborted = false;
  TimePoint deadline = TimePoint::max();

  // Its tokens must all be known to the host before it is planned.
  bool needs_host_tokens() const { return seqs[0]->mask || beams || lends_host_tokens(); }
  // Sampling reads them.
  bool lends_host_tokens() const { return logits_processor || has_phrases(*sampling); }
};

// The seed of sequence `index` of a request: sequence 0 is what a request with n = 1 samples.
constexpr std::uint64_t sequence_seed(std::uint64_t request_seed, int index) {
  return index == 0 ? request_seed : hash_combine(request_seed, static_cast<std::uint64_t>(index));
}

}  // namespace fastllm

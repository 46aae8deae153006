// What a resident sequence keeps between steps, by slot: its block table, last token and sampling state. Owned by a
// worker; its thread only. Ranks other than 0 do not sample and keep no sampling state.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "runtime/slot_tables.h"
#include "sched/step_plan.h"

namespace fastllm {

struct SlotSampling {
  std::shared_ptr<const SamplingParams> params;
  std::shared_ptr<LogitsProcessor> logits_processor;
  std::uint64_t seed = 0;
  std::int32_t num_prompt = 0;     // tokens
  std::vector<TokenId> stops;      // EOS and stop ids; empty unless min_tokens is set
  std::unique_ptr<Buffer> counts;  // [vocab] PenaltyCounts; taken on first need, kept for later sequences
};

class SlotState {
 public:
  SlotState(int max_slots, int max_blocks_per_slot, int vocab, std::vector<TokenId> eos, Backend& backend);

  // A sequence moves in. `samples`: this rank chooses tokens.
  void init(const SlotInit& slot, bool samples);
  void set_block(const TableSet& t) { tables_.set(t); }

  std::span<const BlockId> table(SlotId slot) const { return tables_.table(slot); }
  TokenId last_token(SlotId slot) const { return last_token_[index(slot)]; }
  void set_last_token(SlotId slot, TokenId token) { last_token_[index(slot)] = token; }
  const SlotSampling& sampling(SlotId slot) const { return sampling_[index(slot)]; }

  // How to sample the token at `position`. Borrows from the slot. The mask is the caller's to set.
  SampleRow sample_row(SlotId slot, std::int64_t position) const;

 private:
  void count_history(SlotSampling& s, std::span<const TokenId> tokens);

  int vocab_;
  std::vector<TokenId> eos_;
  Backend& backend_;
  SlotTables tables_;
  std::vector<TokenId> last_token_;
  std::vector<SlotSampling> sampling_;
  std::vector<PenaltyCounts> count_scratch_;  // [vocab] once a penalty was asked for
};

}  // namespace fastllm

// How the sequence in each slot is sampled. Owned by a worker that samples; its thread only. What a slot keeps on the
// device (block table, last token, counts) is the backend's.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "sched/step_plan.h"

namespace fastllm {

struct SlotSampling {
  std::shared_ptr<const SamplingParams> params;
  std::shared_ptr<LogitsProcessor> logits_processor;
  std::uint64_t seed = 0;
  std::int32_t num_prompt = 0;         // tokens
  std::vector<TokenId> stops;          // EOS and stop ids; empty unless min_tokens is set
  std::vector<std::uint32_t> allowed;  // one bit per id, see TokenMask; empty: all
  std::vector<TokenId> forbidden;      // of the last sample_row()
};

class SlotState {
 public:
  SlotState(int max_slots, int vocab, std::vector<TokenId> eos);

  // A sequence moves in.
  void init(const SlotInit& slot);
  const SlotSampling& sampling(SlotId slot) const { return sampling_[index(slot)]; }
  // How to sample the token at `position`, after `tokens` if the plan lends them. Borrows from the slot, until the next
  // call for it.
  SampleRow sample_row(SlotId slot, std::int64_t position, std::span<const TokenId> tokens);

 private:
  int vocab_;
  std::vector<TokenId> eos_;
  std::vector<SlotSampling> sampling_;
};

}  // namespace fastllm

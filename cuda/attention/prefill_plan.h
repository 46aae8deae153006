// The parts behind prefill_attention(), for the kernels, their tests and benchmarks.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace fastllm::cuda {

inline constexpr int kPrefillTileRows = 128;  // (token, head) pairs of a tile

// Tokens of a tile in which each token has `heads` rows.
constexpr int prefill_tile_tokens(int heads) { return kPrefillTileRows / heads; }

// Tokens [first, first + prefill_tile_tokens(heads)) of a row of the step, as far as the row has them.
struct PrefillItem {
  std::int32_t row, first;
};

// Each kernel says whether it computes a call's shape; the answer never depends on the step, so that a sequence's
// results do not either.
bool prefill_mma_takes(const AttentionCall& call, const AttentionLimits& limits);
void prefill_mma(const AttentionCall& call, const StepView& step, const PrefillPlan& plan, cudaStream_t stream);

#ifdef FASTLLM_WITH_SM90A
bool prefill_sm90_takes(const AttentionCall& call, const AttentionLimits& limits);
void prefill_sm90(const AttentionCall& call, const StepView& step, const PrefillPlan& plan,
                  const AttentionLimits& limits, cudaStream_t stream);
#endif

}  // namespace fastllm::cuda

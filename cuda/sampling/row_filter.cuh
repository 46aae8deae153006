// What a row's sampling parameters mean: which of its kinds it is, the mass of a token, and bins for a histogram of it.
#pragma once

#include <cstdint>

#include "sampling/order.cuh"
#include "sampling/sampling.h"
#include "sampling/stages.h"

namespace fastllm::cuda {

enum class RowKind { Greedy, Unfiltered, MinP, Listed };

__device__ __forceinline__ bool by_top_k(const DeviceSampleRow& row, int vocab) {
  return row.top_k > 0 && row.top_k < vocab;
}
__device__ __forceinline__ RowKind kind_of(const DeviceSampleRow& row, int vocab) {
  if (!(row.temperature > 0.0f) || row.top_k == 1) return RowKind::Greedy;
  if (by_top_k(row, vocab) || row.top_p < 1.0f) return RowKind::Listed;
  return row.min_p > 0.0f ? RowKind::MinP : RowKind::Unfiltered;
}

// Lowest logit that min_p keeps; with rounding as in the formula, not contracted.
__device__ __forceinline__ float min_p_floor(const DeviceSampleRow& row, float max) {
  return row.min_p > 0.0f ? __fadd_rn(max, __fmul_rn(logf(row.min_p), row.temperature)) : -INFINITY;
}
// Key of the lowest finite logit that min_p keeps.
__device__ __forceinline__ std::uint32_t min_p_key(const DeviceSampleRow& row, float max) {
  return order_key(fmaxf(min_p_floor(row, max), -3.402823466e38f));
}

// exp((x - max) / temperature) as an integer: sums are exact, so they do not depend on their order. 2^19 tokens fit.
inline constexpr float kMassUnit = 0x1p44f;
struct Mass {
  float max, inv_temperature;

  __device__ __forceinline__ std::uint64_t operator()(float x) const {
    return __float2ull_rn(expf((x - max) * inv_temperature) * kMassUnit);
  }
};

// The mass of which top_p needs to keep as much; the greatest token stays in any case.
__device__ __forceinline__ double top_p_target(const DeviceSampleRow& row, std::uint64_t mass) {
  return fmax(static_cast<double>(row.top_p) * static_cast<double>(mass), 1.0);
}

// Intervals of logits, 0 at the maximum: one bin of a histogram each, the last one open.
struct Bins {
  float max, per_unit;

  __device__ __forceinline__ float depth(float x) const { return __fmul_rn(__fsub_rn(max, x), per_unit); }
  __device__ __forceinline__ int bin(float x) const { return ::min(::max(static_cast<int>(depth(x)), 0), kBins - 1); }
};

}  // namespace fastllm::cuda

// Logits as integers with the same order, and {value, token} pairs as one integer whose maximum is the greatest value,
// the lowest token among equals.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace fastllm::cuda {

// -0 and +0 have one key; NaN has key 0, below that of -infinity.
__device__ __forceinline__ std::uint32_t order_key(float x) {
  if (isnan(x)) return 0;
  const std::uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float value_of_key(std::uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

// 0: no token.
using Ranked = std::uint64_t;
inline constexpr Ranked kNotNumbers = ~Ranked{0};  // above every token: something was NaN
__device__ __forceinline__ Ranked ranked(std::uint32_t key, int id) {
  return static_cast<Ranked>(key) << 32 | ~static_cast<std::uint32_t>(id);
}
__device__ __forceinline__ Ranked ranked(float value, int id) { return ranked(order_key(value), id); }
__device__ __forceinline__ std::uint32_t key_of(Ranked r) { return static_cast<std::uint32_t>(r >> 32); }
__device__ __forceinline__ int id_of(Ranked r) { return static_cast<int>(~static_cast<std::uint32_t>(r)); }

// The block's greatest, in every thread. `shared` may be reused after the next barrier.
template <int kThreads>
__device__ __forceinline__ Ranked block_max(Ranked x, Ranked (&shared)[kThreads / 32]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const Ranked other = __shfl_xor_sync(0xffffffffu, x, mask);
    x = other > x ? other : x;
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) x = shared[warp] > x ? shared[warp] : x;
  return x;
}

// The sum of the values of lower threads; *total: of all. `shared` may be reused after the next barrier.
template <int kThreads>
__device__ __forceinline__ std::uint64_t block_sum_before(std::uint64_t x, std::uint64_t (&shared)[kThreads / 32],
                                                          std::uint64_t* total) {
  std::uint64_t upto = x;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const std::uint64_t other = __shfl_up_sync(0xffffffffu, upto, step);
    if (threadIdx.x % 32 >= step) upto += other;
  }
  if (threadIdx.x % 32 == 31) shared[threadIdx.x / 32] = upto;
  __syncthreads();
  std::uint64_t before = upto - x, sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (warp < static_cast<int>(threadIdx.x / 32)) before += shared[warp];
    sum += shared[warp];
  }
  *total = sum;
  return before;
}

}  // namespace fastllm::cuda

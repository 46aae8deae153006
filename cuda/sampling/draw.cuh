// A draw from the softmax of a row by the greatest x / temperature - ln(-ln u), u = (word >> 9 + 1/2) / 2^23
// (Gumbel-max). An exact argmax, so it may be split over blocks in any way.
//
// Philox costs some 60 instructions a token, the two logarithms 40. Neither is spent on tokens that cannot win: the
// greatest noise is 16.7, and because -ln u >= 1 - u, a token's noise is at most -ln(1 - u), which is one instruction.
#pragma once

#include <cstdint>

#include "sampling/order.cuh"
#include "sampling/philox.cuh"
#include "sampling/row_part.cuh"

namespace fastllm::cuda {

// Tokens with logit > floor, or == floor and id <= last_id, take part.
struct Cut {
  float floor;
  int last_id;
};
__device__ __forceinline__ Cut no_cut() { return {-INFINITY, 0x7fffffff}; }

struct Noise {
  std::uint64_t seed, position;

  __device__ __forceinline__ explicit Noise(const DeviceSampleRow& row)
      : seed(row.seed), position(static_cast<std::uint64_t>(row.position)) {}

  __device__ __forceinline__ std::uint32_t word(int id) const {
    return philox(static_cast<std::uint32_t>(id), seed, position) >> 9;
  }
  __device__ __forceinline__ static float of(std::uint32_t word) {
    const float u = (static_cast<float>(word) + 0.5f) * 0x1p-23f;
    return -logf(-logf(u));
  }
  // Not below of(word), whatever the roundings.
  __device__ __forceinline__ static float at_most(std::uint32_t word) {
    const float rest = (static_cast<float>(0x7fffffu - word) + 0.5f) * 0x1p-23f;  // 1 - u, exactly
    return 1e-3f - 0.69314718f * __log2f(rest);
  }
};
inline constexpr float kMaxNoise = 16.7f;

// This thread's winner among the tokens of the part it read. *running, in shared memory, holds the key of the greatest
// score any thread of the block has found; it must be that of -infinity before the first call.
template <int kThreads>
__device__ __forceinline__ Ranked draw_from_part(const RowPart& part, const DeviceSampleRow& row, const Cut& cut,
                                                 std::uint32_t* running) {
  const float inv_temperature = 1.0f / row.temperature;
  const Noise noise(row);
  float best = -INFINITY;
  int best_id = -1;
  for_each_tile<kThreads>(part, [&](const float4(&v)[4], const int (&first)[4]) {
    std::uint32_t key = __reduce_max_sync(0xffffffffu, order_key(best));
    if (threadIdx.x % 32 == 0) key = max(key, atomicMax(running, key));
    float to_beat = value_of_key(__shfl_sync(0xffffffffu, key, 0));
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float x[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
      float scaled[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) scaled[c] = __fmul_rn(x[c], inv_temperature);
      const float most = fmaxf(fmaxf(scaled[0], scaled[1]), fmaxf(scaled[2], scaled[3]));
      if (!(most > to_beat - kMaxNoise)) continue;
      std::uint32_t word[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) word[c] = noise.word(first[u] + c);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int id = first[u] + c;
        const bool takes_part = x[c] > cut.floor || (x[c] == cut.floor && id <= cut.last_id);
        if (!takes_part || !(scaled[c] + Noise::at_most(word[c]) >= to_beat)) continue;
        const float score = scaled[c] + Noise::of(word[c]);
        if (!(score > best)) continue;
        best = score;
        best_id = id;
        to_beat = fmaxf(to_beat, score);
      }
    }
  });
  return best_id < 0 ? 0 : ranked(best, best_id);
}

// This thread's greatest logit.
template <int kThreads>
__device__ __forceinline__ Ranked argmax_of_part(const RowPart& part) {
  float best = -INFINITY;
  int best_id = -1;
  for_each_logit<kThreads>(part, [&](float x, int id) {
    if (x > best) best = x, best_id = id;
  });
  return best_id < 0 ? 0 : ranked(best, best_id);
}

}  // namespace fastllm::cuda

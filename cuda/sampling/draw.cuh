// A draw from the softmax of a row by the greatest x / temperature - ln(-ln u), u = (word >> 9 + 1/2) / 2^23
// (Gumbel-max). An exact argmax, so it may be split over blocks in any way.
//
// Philox costs some 45 instructions a token, two logarithms 40. Most tokens need neither: noise lies between -2.82 and
// 16.64, so the greatest logit bounds what is worth a random number. Where few lanes of a warp hold such logits, the
// warp shares them out, a token to a lane. Since -ln u >= 1 - u, noise is at most -ln(1 - u), so a comparison of the
// random word, at one exponential for four tokens, tells which of them are worth the logarithms.
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

  __device__ __forceinline__ bool operator()(float x, int id) const {
    return x > floor || (x == floor && id <= last_id);
  }
};

inline constexpr float kMaxNoise = 16.7f, kMinNoise = -2.9f;

struct Noise {
  std::uint64_t seed, position;

  __device__ __forceinline__ explicit Noise(const DeviceSampleRow& row)
      : seed(row.seed), position(static_cast<std::uint64_t>(row.position)) {}

  __device__ __forceinline__ std::uint32_t word(int id) const {
    return philox(static_cast<std::uint32_t>(id), seed, position);
  }
  __device__ __forceinline__ static float of(std::uint32_t word) {
    const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
    return -logf(-logf(u));
  }
  // Words below the result bring no score from `scaled` up to to_beat, whatever the roundings.
  __device__ __forceinline__ static std::uint32_t least_word(float scaled, float to_beat) {
    const float slack = 1e-3f + fabsf(to_beat) * 0x1p-22f;
    const float rest = exp2f(1.4426950f * (scaled - to_beat + slack));  // the greatest 1 - u that may do
    return __float2uint_rz(fmaxf(8388606.0f - rest * 0x1p23f, 0.0f)) << 9;
  }
};

// Vectors that a warp shares out.
struct SharedOut {
  static constexpr int kVectors = 8;
  float4 x[kVectors];
  int first[kVectors];
};

template <int kThreads>
struct DrawScratch {
  std::uint32_t running;  // key of a score that the winner reaches
  SharedOut of_warps[kThreads / 32];
};

// One thread's share of a draw. TakesPart: bool (x, id); tokens below `floor` must not. All threads of the block make
// the same calls of tile().
template <int kThreads, class TakesPart>
class Draw {
 public:
  // some_score: one that the winner of the row reaches, or -infinity when every token takes part.
  __device__ __forceinline__ Draw(const DeviceSampleRow& row, float floor, float some_score, TakesPart takes_part,
                                  DrawScratch<kThreads>& scratch)
      : noise_(row), inv_temperature_(1.0f / row.temperature), takes_part_(takes_part), scratch_(scratch) {
    floor_ = fmaxf(__fmul_rn(floor, inv_temperature_), -3.402823466e38f);
    if (threadIdx.x == 0) scratch.running = order_key(some_score);
    __syncthreads();
  }

  __device__ __forceinline__ void tile(const float4 (&v)[4], const int (&first)[4]) {
    float most[4];
#pragma unroll
    for (int u = 0; u < 4; ++u)
      most[u] = __fmul_rn(fmaxf(fmaxf(v[u].x, v[u].y), fmaxf(v[u].z, v[u].w)), inv_temperature_);
    const float top = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    share(fmaxf(best_, top + kMinNoise));
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const bool mine = most[u] >= fmaxf(to_beat_ - kMaxNoise, floor_);
      const unsigned lanes = __ballot_sync(0xffffffffu, mine);
      if (lanes == 0) continue;
      bool improved = false;
      if (__popc(lanes) > SharedOut::kVectors) {
        const std::uint32_t least = mine ? Noise::least_word(most[u], to_beat_) : ~0u;
        std::uint32_t word[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) word[c] = noise_.word(first[u] + c);
        if (::max(::max(word[0], word[1]), ::max(word[2], word[3])) >= least) {
          const float x[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (word[c] >= least) improved |= consider(x[c], first[u] + c, word[c]);
        }
      } else {
        SharedOut& out = scratch_.of_warps[threadIdx.x / 32];
        const int at = __popc(lanes & ((1u << lane) - 1));
        if (mine) out.x[at] = v[u], out.first[at] = first[u];
        __syncwarp();
        const int taken = static_cast<int>(lane) / 4;
        if (taken < __popc(lanes)) {
          const float x = reinterpret_cast<const float*>(out.x)[lane];
          const int id = out.first[taken] + static_cast<int>(lane) % 4;
          const std::uint32_t word = noise_.word(id);
          if (word >= Noise::least_word(__fmul_rn(x, inv_temperature_), to_beat_)) improved = consider(x, id, word);
        }
        __syncwarp();
      }
      if (__any_sync(0xffffffffu, improved))
        to_beat_ = fmaxf(to_beat_, value_of_key(__reduce_max_sync(0xffffffffu, order_key(best_))));
    }
  }

  // This thread's winner; 0: none.
  __device__ __forceinline__ Ranked winner() const { return best_id_ < 0 ? 0 : ranked(best_, best_id_); }

 private:
  // Learns what other warps have found, and tells them.
  __device__ __forceinline__ void share(float score) {
    std::uint32_t key = __reduce_max_sync(0xffffffffu, order_key(score));
    if (threadIdx.x % 32 == 0) key = ::max(key, atomicMax(&scratch_.running, key));
    to_beat_ = value_of_key(__shfl_sync(0xffffffffu, key, 0));
  }

  // A thread's ids ascend, so the lowest of equal scores stays.
  __device__ __forceinline__ bool consider(float x, int id, std::uint32_t word) {
    if (!takes_part_(x, id)) return false;
    const float score = __fadd_rn(__fmul_rn(x, inv_temperature_), Noise::of(word));
    if (!(score > best_)) return false;
    best_ = score;
    best_id_ = id;
    return true;
  }

  Noise noise_;
  float inv_temperature_;
  float floor_;  // of x / temperature
  TakesPart takes_part_;
  DrawScratch<kThreads>& scratch_;
  float best_ = -INFINITY, to_beat_ = -INFINITY;
  int best_id_ = -1;
};

// Of the tokens of the part that this thread considers. also_see(v): every tile.
template <int kThreads, class TakesPart, class AlsoSee>
__device__ __forceinline__ Ranked draw_from_part(const RowPart& part, const DeviceSampleRow& row, float floor,
                                                 float some_score, TakesPart takes_part, DrawScratch<kThreads>& scratch,
                                                 AlsoSee also_see) {
  Draw<kThreads, TakesPart> draw(row, floor, some_score, takes_part, scratch);
  for_each_tile<kThreads>(part, [&](const float4(&v)[4], const int (&first)[4]) {
    also_see(v);
    draw.tile(v, first);
  });
  return draw.winner();
}
template <int kThreads, class TakesPart>
__device__ __forceinline__ Ranked draw_from_part(const RowPart& part, const DeviceSampleRow& row, float floor,
                                                 float some_score, TakesPart takes_part,
                                                 DrawScratch<kThreads>& scratch) {
  return draw_from_part<kThreads>(part, row, floor, some_score, takes_part, scratch, [](const float4(&)[4]) {});
}

// The greatest logit takes part in every draw that anything takes part in, so the winner reaches this.
__device__ __forceinline__ float some_score(const DeviceSampleRow& row, float max) {
  return __fmul_rn(max, 1.0f / row.temperature) + kMinNoise;
}

// This thread's greatest logit. also_see(v): every tile.
template <int kThreads, class AlsoSee>
__device__ __forceinline__ Ranked argmax_of_part(const RowPart& part, AlsoSee also_see) {
  float best = -INFINITY;
  int best_id = -1;
  const auto take = [&](float x, int id) {
    if (x > best) best = x, best_id = id;
  };
  for_each_tile<kThreads>(part, [&](const float4(&v)[4], const int (&first)[4]) {
    also_see(v);
    for_each_in_tile(v, first, take);
  });
  return best_id < 0 ? 0 : ranked(best, best_id);
}
template <int kThreads>
__device__ __forceinline__ Ranked argmax_of_part(const RowPart& part) {
  return argmax_of_part<kThreads>(part, [](const float4(&)[4]) {});
}

}  // namespace fastllm::cuda

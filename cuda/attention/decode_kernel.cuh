// The tensor core decode kernel. One warp computes 16 positions x 8 query heads at a time, on its own, straight from
// global memory to fragments (decode_fragments.cuh); while it multiplies keys the values are on their way, and the
// other way round. What the warps of a block found is joined in shared memory, what blocks found through the workspace.
#pragma once

#include "attention/decode_fragments.cuh"
#include "attention/decode_work.cuh"
#include "launch.cuh"

namespace fastllm::cuda::decode {

inline constexpr int kWarps = 4, kThreads = 32 * kWarps;
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLowest = -1e30f;  // below every score; unlike -inf it can be subtracted from itself

// Running softmax: greatest score (base 2), sum of weights relative to it, weighted sum of four values.
struct Merged {
  float greatest = kLowest, sum = 0;
  float4 out{0, 0, 0, 0};
  __device__ void add(float2 sums, const float4& o) {
    const float most = fmaxf(greatest, sums.x);
    const float mine = exp2_approx(greatest - most), other = exp2_approx(sums.x - most);
    greatest = most;
    sum = sum * mine + sums.y * other;
    out = {out.x * mine + o.x * other, out.y * mine + o.y * other, out.z * mine + o.z * other,
           out.w * mine + o.w * other};
  }
};

// True in all threads of the block that is the last of `expected` to arrive here, with what the others wrote visible
// past L1. Leaves the counter zero.
__device__ __forceinline__ bool arrive_last(std::int32_t* counter, int expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    std::int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    last = before == expected - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

template <int kHeadDim>
struct Output {
  const Params& p;
  const Work& w;
  int heads;  // of this pass

  __device__ void store(int head, int dim, const Merged& m) const {
    const float scale = m.sum > 0 ? 1.0f / m.sum : 0.0f;
    const int first = w.item / p.split.passes * p.group + w.item % p.split.passes * p.split.heads;
    const std::int64_t at = (static_cast<std::int64_t>(w.row.token_begin) * p.heads + first + head) * kHeadDim + dim;
    *reinterpret_cast<uint2*>(p.out + at) =
        make_uint2(pack_bf16(m.out.x * scale, m.out.y * scale), pack_bf16(m.out.z * scale, m.out.w * scale));
  }
  __device__ float* partial_out(int part, int head) const {
    return p.partial_out + (static_cast<std::int64_t>(w.slot(part)) * p.split.heads + head) * kHeadDim;
  }
  __device__ float2* partial_sums(int part, int head, int level) const {
    return p.partial_sums + (level * p.num_slots + w.slot(part)) * p.split.heads + head;
  }
  __device__ void store_partial(int part, int head, int dim, const Merged& m, int level) const {
    *reinterpret_cast<float4*>(partial_out(part, head) + dim) = m.out;
    if (dim == 0) *partial_sums(part, head, level) = make_float2(m.greatest, m.sum);
  }

  // Joins `count` parts, in order. level 0: of blocks, 1: of runs.
  __device__ void merge(int first, int step, int count, int level, bool final) const {
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < heads * (kHeadDim / 4); i += kThreads) {
      const int head = i / (kHeadDim / 4), dim = i % (kHeadDim / 4) * 4;
      Merged m;
#pragma unroll 1
      for (int n = 0; n < count; n += kAtOnce) {
        float2 sums[kAtOnce];
        float4 out[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int part = first + min(n + k, count - 1) * step;
          sums[k] = __ldcg(partial_sums(part, head, level));
          out[k] = __ldcg(reinterpret_cast<const float4*>(partial_out(part, head) + dim));
          if (n + k >= count) sums[k] = make_float2(kLowest, 0), out[k] = make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) m.add(sums[k], out[k]);
      }
      if (final) {
        store(head, dim, m);
      } else {
        store_partial(first, head, dim, m, 1);
      }
    }
  }
};

template <class Cache, int kHeadDim>
struct Shared {
  float out[kWarps][8][kHeadDim + 4];  // padded against bank conflicts
  float2 sums[kWarps][8];
  Work work;  // a copy for what comes after the main loop, which has no registers to spare
};

template <class Cache, int kHeadDim>
__device__ __forceinline__ void attend(const Params& p, const Work& work, Shared<Cache, kHeadDim>& shared) {
  using L = Lane<Cache, kHeadDim>;
  __syncthreads();  // shared memory still serves the item before
  if (threadIdx.x == 0) shared.work = work;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int kv_head = work.item / p.split.passes, pass = work.item % p.split.passes;
  const int heads = min(p.split.heads, p.group - pass * p.split.heads);  // of this pass
  const int across = warp % p.warps_across, along = warp / p.warps_across, warps_along = kWarps / p.warps_across;
  const int warp_heads = min(8, heads - 8 * across);  // may be negative

  const int length = work.row.first_pos + 1;
  const int origin = first_tile(length, p.plan_window);
  const int begin = max((origin + work.tile_begin) * kTile, p.window > 0 ? length - p.window : 0);
  const int end = min((origin + work.tile_end) * kTile, length);
  // The warp's n-th step is at positions pos(n) .. pos(n) + 15, of which [begin, end) count.
  const int first_pos = (begin / 16 + along) * 16, stride = warps_along * 16;
  const int steps = warp_heads > 0 && first_pos < end && begin < end ? (end - first_pos + stride - 1) / stride : 0;

  const int first_head = kv_head * p.group + pass * p.split.heads + 8 * across;
  const std::byte* const query = g < warp_heads ? p.q + work.row.token_begin * p.q_row_bytes +
                                                      static_cast<std::int64_t>(first_head + g) * (kHeadDim * 2)
                                                : nullptr;
  const std::byte* const keys = p.keys + kv_head * p.head_bytes;
  const BlockId* const table = p.tables + static_cast<std::int64_t>(work.row.slot) * p.table_width;
  const int block_mask = (1 << p.block_shift) - 1;

  // Blocks of the lower and upper 8 positions: of the steps 32 i + lane, and of the step that is being loaded.
  int blocks_low = 0, blocks_high = 0, low = 0, high = 0;
  uint4 key[2][L::kKeyLoads] = {};
  typename L::ValueRaw value[4][L::kValueLoads] = {};

  // The key of number r in step n. One outside [begin, end) is replaced by the nearest inside: its weight is zero, and
  // its contents are finite.
  const auto key_row = [&](int n, int r) {
    const int pos = first_pos + n * stride;
    r = min(max(r, begin - pos), end - 1 - pos);
    return keys + static_cast<std::int64_t>(r < 8 ? low : high) * p.block_bytes +
           static_cast<unsigned>(((pos + r) & block_mask) * L::kRowBytes);
  };
  const auto load_keys = [&](int n) {
    if (n % 32 == 0) {
      const int at = first_pos + (n + lane) * stride;
      blocks_low = at < end ? static_cast<int>(table[at >> p.block_shift]) : 0;
      blocks_high = at + 8 < end ? static_cast<int>(table[(at + 8) >> p.block_shift]) : 0;
    }
    low = __shfl_sync(0xffffffffu, blocks_low, n % 32);
    high = __shfl_sync(0xffffffffu, blocks_high, n % 32);
    const std::byte* const k0 = key_row(n, g) + t * 16;
    const std::byte* const k1 = key_row(n, g + 8) + t * 16;
#pragma unroll
    for (int c = 0; c < L::kKeyLoads; ++c) load_past_l1(key[0][c], k0 + c * 64, n < steps);
#pragma unroll
    for (int c = 0; c < L::kKeyLoads; ++c) load_past_l1(key[1][c], k1 + c * 64, n < steps);
  };
  const auto load_values = [&](int n) {
    constexpr int kBytes = sizeof(typename L::ValueRaw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::byte* const v = key_row(n, 2 * t + i % 2 + i / 2 * 8) + p.value_bytes + g * kBytes;
#pragma unroll
      for (int c = 0; c < L::kValueLoads; ++c) load_past_l1(value[i][c], v + c * 8 * kBytes, n < steps);
    }
  };

  // Of heads 2t and 2t + 1.
  float greatest[2] = {kLowest, kLowest}, sum[2] = {0, 0};
  float o[L::kTiles][4] = {};
  float slope[2] = {0, 0};
  // Every lane keeps its queries where only it reads them, until the results take that memory.
  uint4* const q = reinterpret_cast<uint4*>(shared.out[warp]) + lane;
  load_keys(0);
  load_values(0);
  if (steps > 0) {
#pragma unroll
    for (int i = 0; i < L::kQueryLoads; ++i) q[32 * i] = L::load_query(query, i, t);
    if (p.alibi_slopes != nullptr) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        slope[h] = 2 * t + h < warp_heads ? p.alibi_slopes[first_head + 2 * t + h] * kLog2e : 0.0f;
    }
  }

  for (int n = 0; n < steps; ++n) {
    float s2[2][4] = {};
#pragma unroll
    for (int c = 0; c < L::kKeyLoads; ++c) {
      std::uint32_t pairs[L::kPairsPerKeyLoad];
#pragma unroll
      for (int i = 0; i < L::kPairsPerKeyLoad / 4; ++i) {
        const uint4 v = load_shared(q + 32 * (c * (L::kPairsPerKeyLoad / 4) + i));
#pragma unroll
        for (int k = 0; k < 4; ++k) pairs[4 * i + k] = word(v, k);
      }
      L::add_scores(s2, key[0][c], key[1][c], pairs);
    }
    load_keys(n + 1);

    float s[2][2];  // [position g or g + 8][head]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int position = first_pos + n * stride + g + 8 * i;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = (s2[0][2 * i + h] + s2[1][2 * i + h]) * p.score_scale;
        if (p.softcap_log2 > 0)  // tanh y = 1 - 2 / (1 + e^2y)
          x = p.softcap_log2 * (1.0f - __fdividef(2.0f, 1.0f + exp2_approx(x)));
        x += slope[h] * static_cast<float>(position - (length - 1));
        s[i][h] = position >= begin && position < end ? x : -INFINITY;
      }
    }
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(s[0][h], s[1][h]);
#pragma unroll
      for (int mask = 4; mask <= 16; mask *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
      most = fmaxf(most, greatest[h]);
      scale[h] = exp2_approx(greatest[h] - most);
      greatest[h] = most;
#pragma unroll
      for (int i = 0; i < 2; ++i) s[i][h] = exp2_approx(s[i][h] - most);
      sum[h] = sum[h] * scale[h] + s[0][h] + s[1][h];
    }
    const std::uint32_t p0 = transpose8x8(Cache::pack(s[0][0], s[0][1]));
    const std::uint32_t p1 = transpose8x8(Cache::pack(s[1][0], s[1][1]));
#pragma unroll
    for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) o[i][k] *= scale[k % 2];
    }
#pragma unroll
    for (int c = 0; c < L::kValueLoads; ++c)
      L::add_values(o, c, value[0][c], value[1][c], value[2][c], value[3][c], p0, p1);
    load_values(n + 1);
  }

  __syncwarp();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int mask = 4; mask <= 16; mask *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], mask);
    const int head = 2 * t + h;
    if (head >= warp_heads) continue;
    if (g == 0) shared.sums[warp][head] = make_float2(greatest[h], sum[h]);
#pragma unroll
    for (int i = 0; i < L::kTiles; i += 2) {
      constexpr int kHalf = L::kValueDims / 2;  // tiles of one load
      float* const to = &shared.out[warp][head][i / kHalf * 8 * L::kValueDims + g * L::kValueDims + i % kHalf * 2];
      *reinterpret_cast<float4*>(to) = make_float4(o[i][h], o[i][2 + h], o[i + 1][h], o[i + 1][2 + h]);
    }
  }
  __syncthreads();
  const Work& w = shared.work;
  const int item_heads = min(p.split.heads, p.group - w.item % p.split.passes * p.split.heads);
  const Output<kHeadDim> output{p, w, item_heads};
  for (int i = static_cast<int>(threadIdx.x); i < item_heads * (kHeadDim / 4); i += kThreads) {
    const int head = i / (kHeadDim / 4), dim = i % (kHeadDim / 4) * 4;
    Merged m;
    for (int from = head / 8; from < kWarps; from += p.warps_across)
      m.add(shared.sums[from][head % 8], *reinterpret_cast<const float4*>(&shared.out[from][head % 8][dim]));
    if (w.parts == 1) {
      output.store(head, dim, m);
    } else {
      output.store_partial(w.part, head, dim, m, 0);
    }
  }
  if (w.parts == 1) return;

  // Many parts are merged in two levels: runs by the blocks that finish last in them, then all runs by the last of
  // these.
  const int run_size = w.parts > kMaxDirectParts ? kPartsPerRun : w.parts;
  const int runs = ceil_div(w.parts, run_size), run_begin = w.part / run_size * run_size;
  int first = run_begin, step = 1, count = min(run_size, w.parts - run_begin);
  int counter = w.run_counter(run_begin);
#pragma unroll 1
  for (int level = 0; arrive_last(p.counters + counter, count); ++level) {
    const bool final = level == 1 || runs == 1;
    output.merge(first, step, count, level, final);
    if (final) break;
    first = 0, step = run_size, count = runs;
    counter = w.final_counter();
  }
}

// Grid: any size, 128 threads.
template <class Cache, int kHeadDim>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kHeadDim, Cache::kBytes == 1))
    decode_kernel(const __grid_constant__ Params p) {
  __shared__ Shared<Cache, kHeadDim> shared;
  pdl_wait();
  pdl_launch();
  WorkList list(p);
  for (Work w; list.next(p, shared.work, w);) attend(p, w, shared);
  for (int r = static_cast<int>(blockIdx.x); r < p.num_rows; r += static_cast<int>(gridDim.x)) {
    const DeviceRow row = p.rows[r];
    if (row.first_pos >= 0) continue;  // padding
    std::uint16_t* const out = p.out + static_cast<std::int64_t>(row.token_begin) * p.heads * kHeadDim;
    for (int i = static_cast<int>(threadIdx.x); i < p.heads * (kHeadDim / 4); i += kThreads)
      reinterpret_cast<uint2*>(out)[i] = make_uint2(0, 0);
  }
}

}  // namespace fastllm::cuda::decode

// What the prefill kernels share: the tile of queries a thread block works on, and softmax on accumulators.
//
// The rows of a tile are (token, head) pairs. The query heads that share a KV head stand beside each other, so that
// short chunks fill a tile too, and a block loads K and V once for all of them:
//
//     row      0   1   2   3   4   5   ...          tile_heads = 4
//     token    0   0   0   0   1   1
//     head     0   1   2   3   0   1                counted from the tile's first head
//
// KV tiles begin at multiples of their height, whatever the query tile: a query's result depends on nothing but its
// own position and sequence, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/prefill_plan.h"
#include "ptx.cuh"

namespace fastllm::cuda {

struct PrefillParams {
  __nv_bfloat16* out;
  const __nv_bfloat16* q;
  std::int64_t ldq, ldo;  // elements
  const std::byte* kv;    // K of KV head 0 in block 0
  std::int64_t block_bytes, kv_bytes, head_bytes;
  int block_size, element_bytes;  // positions; of K and V
  const DeviceRow* rows;
  const BlockId* tables;
  int table_width;
  const PrefillItem* items;
  int num_work;    // items times units
  int units;       // tiles of one item: KV heads times splits
  int splits;      // of the query heads of a KV head, where they are more than kMaxTileHeads
  int group;       // query heads of a KV head
  int tile_heads;  // the most heads of one tile
  int window;      // 0: none
  // A score s = q k becomes to_log2 * s; with a soft cap cap_log2 - 2 cap_log2 / (1 + exp2(cap_in * s)), which is
  // cap tanh(scale s / cap) in units of log2.
  float to_log2, cap_in, cap_log2;
  const float* alibi_slopes;
};

inline PrefillParams prefill_params(const AttentionCall& call, const StepView& step, const PrefillPlan& plan) {
  constexpr float kLog2E = 1.4426950408889634f;
  const AttnArgs& a = call.args;
  PrefillParams p{};
  p.out = static_cast<__nv_bfloat16*>(call.out);
  p.q = static_cast<const __nv_bfloat16*>(call.q);
  p.ldq = call.ldq;
  p.ldo = std::int64_t{a.heads} * a.head_dim;
  p.kv = static_cast<const std::byte*>(call.kv.base);
  p.element_bytes = static_cast<int>(size_of(call.kv.dtype));
  p.block_bytes = call.kv.block_stride * p.element_bytes;
  p.kv_bytes = call.kv.kv_stride * p.element_bytes;
  p.head_bytes = call.kv.head_stride * p.element_bytes;
  p.block_size = call.kv.block_size;
  p.rows = step.rows;
  p.tables = step.tables;
  p.table_width = step.table_width;
  p.group = a.heads / a.kv_heads;
  p.tile_heads = p.group < kMaxTileHeads ? p.group : kMaxTileHeads;
  p.splits = (p.group + kMaxTileHeads - 1) / kMaxTileHeads;
  p.units = a.kv_heads * p.splits;
  const auto list = static_cast<std::size_t>(p.tile_heads);
  p.items = reinterpret_cast<const PrefillItem*>(plan.device) + plan.begin[list - 1];
  p.num_work = (plan.begin[list] - plan.begin[list - 1]) * p.units;
  p.window = a.window;
  p.to_log2 = a.scale * kLog2E;
  if (a.softcap > 0) {
    p.cap_in = 2.0f * p.to_log2 / a.softcap;
    p.cap_log2 = a.softcap * kLog2E;
  }
  p.alibi_slopes = call.alibi_slopes;
  return p;
}

// Shapes both kernels need: bf16, whole 16-byte chunks, blocks of whole groups of 8 positions.
inline bool prefill_shape_ok(const AttentionCall& call) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return call.dtype == DType::BF16 && (call.kv.dtype == DType::BF16 || call.kv.dtype == DType::F8E4M3) &&
         call.kv.block_size % 8 == 0 && call.ldq % 8 == 0 && aligned(call.q) && aligned(call.out) &&
         aligned(call.kv.base);
}

struct QueryTile {
  int token, num_tokens;  // of the batch
  int first_pos;          // of the first token
  int head, num_heads;    // query heads [head, head + num_heads)
  int kv_begin, kv_end;   // positions that any token attends to
  const BlockId* table;   // of the sequence
  const std::byte* kv;    // K of the KV head in block 0
};

__device__ __forceinline__ QueryTile query_tile(const PrefillParams& p, int work) {
  const PrefillItem item = p.items[work / p.units];
  const int unit = work % p.units;
  const int kv_head = unit / p.splits, head = (unit % p.splits) * p.tile_heads;
  const DeviceRow row = p.rows[item.row];
  QueryTile t;
  t.token = row.token_begin + item.first;
  t.num_tokens = min(prefill_tile_tokens(p.tile_heads), row.num_tokens - item.first);
  t.first_pos = row.first_pos + item.first;
  t.head = kv_head * p.group + head;
  t.num_heads = min(p.tile_heads, p.group - head);
  t.kv_begin = p.window > 0 ? max(0, t.first_pos - p.window + 1) : 0;
  t.kv_end = t.first_pos + t.num_tokens;
  t.table = p.tables + static_cast<std::int64_t>(row.slot) * p.table_width;
  t.kv = p.kv + kv_head * p.head_bytes;
  return t;
}

// One row of a tile: where its query and its result lie, if it has any.
struct TileRow {
  bool valid;
  std::int64_t token;
  int head;
};
__device__ __forceinline__ TileRow tile_row(const PrefillParams& p, const QueryTile& t, int row) {
  const int token = row / p.tile_heads, head = row % p.tile_heads;
  return {token < t.num_tokens && head < t.num_heads, t.token + token, t.head + head};
}
// Rows without a query follow the last token, so that their scores are as finite as all others.
__device__ __forceinline__ int row_position(const PrefillParams& p, const QueryTile& t, int row) {
  return t.first_pos + min(row / p.tile_heads, t.num_tokens - 1);
}

// Where positions [pos, pos + 8) lie, in bytes from t.kv; meaningless when the tile needs none of them.
__device__ __forceinline__ std::int64_t kv_offset(const PrefillParams& p, const QueryTile& t, int pos, int head_dim) {
  if (pos >= t.kv_end || pos + 8 <= t.kv_begin) return 0;
  const int block = pos / p.block_size;
  return static_cast<int>(t.table[block]) * p.block_bytes +
         static_cast<std::int64_t>(pos - block * p.block_size) * head_dim * p.element_bytes;
}

// Does a KV tile hold a position that some token of the query tile must not see?
__device__ __forceinline__ bool needs_mask(const PrefillParams& p, const QueryTile& t, int tile_pos, int tile_size) {
  return tile_pos + tile_size - 1 > t.first_pos || (p.window > 0 && tile_pos < t.kv_end - p.window);
}

// --- scores in accumulators: s[n][2 * half + e] is row (lane / 4 + 8 * half), column 8 * n + 2 * (lane % 4) + e ---

// A thread's two rows of 16.
struct SoftmaxRows {
  float max[2] = {-INFINITY, -INFINITY};  // of the scores so far
  float sum[2] = {0, 0};                  // of this thread's columns
};

// Soft cap, ALiBi and mask. first_row, key_pos: this thread's first row in the tile and the position of its first
// column. Returns what makes scores units of log2.
template <int N>
__device__ __forceinline__ float finish_scores(const PrefillParams& p, const QueryTile& t, int first_row, int key_pos,
                                               bool masked, float (&s)[N][4]) {
  float factor = p.to_log2;
  if (p.cap_log2 > 0) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[n][i] = p.cap_log2 - __fdividef(2.0f * p.cap_log2, 1.0f + exp2_approx(p.cap_in * s[n][i]));
    factor = 1;
  }
  if (p.alibi_slopes != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = (first_row + 8 * half) % p.tile_heads;
      const int distance = key_pos - row_position(p, t, first_row + 8 * half);
      const float slope = head < t.num_heads ? p.alibi_slopes[t.head + head] * 1.4426950408889634f : 0;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          x = fmaf(x, factor, slope * static_cast<float>(distance + 8 * n + e));
        }
    }
    factor = 1;
  }
  if (masked) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int newest = row_position(p, t, first_row + 8 * half) - key_pos;  // column offsets in [oldest, newest] stay
      const int oldest = p.window > 0 ? newest - p.window + 1 : -key_pos;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + e > newest || 8 * n + e < oldest) s[n][2 * half + e] = -INFINITY;
    }
  }
  return factor;
}

// One step of softmax on the fly: scores become exp2(factor * (score - max)). What was summed before must be multiplied
// by `rescale`, which is exactly 1 when all of the scores are masked.
template <int N>
__device__ __forceinline__ void softmax_step(SoftmaxRows& rows, float factor, float (&s)[N][4], float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float high = rows.max[half];
#pragma unroll
    for (int n = 0; n < N; ++n) high = fmaxf(high, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    const float base = high == -INFINITY ? 0 : high;  // nothing seen yet: -inf - base stays -inf
    rescale[half] = exp2_approx((rows.max[half] - base) * factor);
    rows.max[half] = high;
    const float shift = base * factor;
    float sum[2] = {0, 0};  // two, for shorter chains
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * half + e];
        x = exp2_approx(fmaf(x, factor, -shift));
        sum[e] += x;
      }
    rows.sum[half] = fmaf(rows.sum[half], rescale[half], sum[0] + sum[1]);
  }
}

// 1 / sum over all columns.
__device__ __forceinline__ float inverse_sum(const SoftmaxRows& rows, int half) {
  float sum = rows.sum[half];
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return 1.0f / sum;
}

// Scores of columns [16 k, 16 k + 16) as the A operand of a product with V.
template <int N>
__device__ __forceinline__ void pack_scores(const float (&s)[N][4], int k, std::uint32_t (&a)[4]) {
  a[0] = pack_bf16(s[2 * k][0], s[2 * k][1]);
  a[1] = pack_bf16(s[2 * k][2], s[2 * k][3]);
  a[2] = pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]);
  a[3] = pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3]);
}

// Four e4m3 values to bf16: their bits stand at the low end of bf16's wider exponent, so a multiplication by 2^120,
// which is exact for subnormal numbers too, puts the exponent right.
__device__ __forceinline__ uint2 bf16_from_e4m3(std::uint32_t x) {
  const std::uint32_t pair[2] = {__byte_perm(x, 0, 0x1404), __byte_perm(x, 0, 0x3424)};
  std::uint32_t y[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t bits = (pair[i] & 0x80008000u) | ((pair[i] >> 4) & 0x07f007f0u);
    const auto v = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits), __float2bfloat162_rn(0x1p120f));
    y[i] = reinterpret_cast<const std::uint32_t&>(v);
  }
  return {y[0], y[1]};
}
// Sixteen of them, to two chunks of 16 bytes.
__device__ __forceinline__ void bf16_from_e4m3(const uint4& x, uint4& low, uint4& high) {
  const uint2 a = bf16_from_e4m3(x.x), b = bf16_from_e4m3(x.y), c = bf16_from_e4m3(x.z), d = bf16_from_e4m3(x.w);
  low = {a.x, a.y, b.x, b.y};
  high = {c.x, c.y, d.x, d.y};
}

}  // namespace fastllm::cuda

// What the fp32 and the tile path of attention share: the working memory of a task, and the softmax of one KV tile.
#pragma once

#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/kv_values.h"

namespace fastllm::cpu {
namespace FASTLLM_ISA {

// Parts of the scratch of one task. The tile paths keep bf16 or int8 where the fp32 path keeps fp32, see
// attention_tiles.h.
struct Work {
  int64_t queries, dim;  // dim: head_dim padded to 16
  float* q;              // fp32 [queries, head_dim], or tiles
  int32_t* pos;          // [queries], where they stand (tiles only, as the next two)
  float* slopes;         // [queries]
  float* steps;          // [queries], of int8
  float* keys;           // fp32 [head_dim, 64], or rows
  float* values;         // fp32 [64, dim], or tiles
  float* scores;         // fp32 [queries, 64]; on tiles two of [64, 16]
  float* p;              // two tiles
  float* products;       // int32 two of [2, 64, 16], then [2, 16, dim]
  float* tile;           // two of [queries, dim], then maxima and sums [queries] each
  float* total;          // the same once, merged
};

}  // namespace FASTLLM_ISA

using FASTLLM_ISA::Work;

namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kNone = -1e30f;  // maximum of no position at all: finite, so that differences are

// f(part, numbers of 4 bytes) for the parts of Work, in order.
template <class F>
inline void each_part(int64_t queries, int64_t head_dim, F&& f) {
  const int64_t dim = round_up(head_dim, 64), padded = round_up(queries, 16);
  f(&Work::q, padded * dim);
  f(&Work::pos, padded);
  f(&Work::slopes, padded);
  f(&Work::steps, padded);
  f(&Work::keys, kKvTile * dim);
  f(&Work::values, kKvTile * dim);
  f(&Work::scores, (padded > 32 ? padded : 32) * kKvTile + 16 * dim);
  f(&Work::p, int64_t{512});
  f(&Work::products, 4 * kKvTile * 16 + 2 * 16 * dim);
  f(&Work::tile, 2 * partial_floats(queries, head_dim));
  f(&Work::total, partial_floats(queries, head_dim));
}

inline int64_t attn_scratch(int64_t queries, int64_t head_dim) {
  int64_t floats = 0;
  each_part(queries, head_dim, [&](auto, int64_t n) { floats += n; });
  return floats;
}

inline Work layout(const AttnTask& t, float* scratch) {
  Work w{};
  w.queries = static_cast<int64_t>(t.tokens) * t.group;
  w.dim = round_up(t.head_dim, 16);
  each_part(w.queries, t.head_dim, [&]<class T>(T* Work::* part, int64_t n) {
    w.*part = reinterpret_cast<T*>(scratch);
    scratch += n;
  });
  return w;
}

template <class T>
inline const T* query_row(const AttnTask& t, int64_t query) {
  return static_cast<const T*>(t.q) + query / t.group * t.q_stride + query % t.group * t.head_dim;
}

// Where the keys of positions [begin, begin + n) lie; their values lie kv_stride further.
template <class T>
inline void find_keys(const AttnTask& t, int64_t begin, int64_t n, const T** rows) {
  int64_t block = begin / t.block_size, slot = begin % t.block_size;
  for (int64_t j = 0; j < n; ++block, slot = 0) {
    const T* row = static_cast<const T*>(t.kv) + t.table[block] * t.block_stride + slot * t.head_dim;
    const int64_t count = t.block_size - slot < n - j ? t.block_size - slot : n - j;
    for (int64_t i = 0; i < count; ++i) rows[j + i] = row + i * t.head_dim;
    j += count;
  }
}

// Where block `block` of the table has the scales of its keys; those of its values lie kv_stride further.
inline const Code* key_scales(const AttnTask& t, int64_t block) {
  return static_cast<const Code*>(t.kv) + t.table[block] * t.block_stride +
         static_cast<int64_t>(t.block_size) * t.head_dim;
}

// The scales of positions [begin, begin + n) of an int8 cache, and zeros up to kKvTile.
inline void load_scales(const AttnTask& t, int64_t begin, int64_t n, float* keys, float* values) {
  int64_t block = begin / t.block_size, slot = begin % t.block_size;
  for (int64_t j = 0, count = 0; j < n; j += count, ++block, slot = 0) {
    count = t.block_size - slot < n - j ? t.block_size - slot : n - j;
    const Code* scales = key_scales(t, block) + slot * 4;
    __builtin_memcpy(keys + j, scales, static_cast<size_t>(count) * 4);
    __builtin_memcpy(values + j, scales + t.kv_stride, static_cast<size_t>(count) * 4);
  }
  for (int64_t j = n; j < kKvTile; ++j) keys[j] = values[j] = 0.0f;
}

// Scores of one query at the tile's positions: -inf where masked, and where there is a soft cap or a slope, scaled and
// shaped. Returns whether they were.
inline bool shape_scores(const AttnTask& t, int64_t query, int64_t begin, vf (&x)[kKvTile / kW]) {
  const auto pos = static_cast<int32_t>(t.first_pos + query / t.group);
  const int32_t oldest = t.window > 0 && pos >= t.window ? pos - t.window + 1 : 0;
  const auto first = static_cast<int32_t>(begin);
  const bool whole = first >= oldest && first + kKvTile - 1 <= pos;
  const bool shaped = t.slopes || t.softcap > 0.0f;
  if (whole && !shaped) return false;
  for (int v = 0; v < kKvTile / kW; ++v) {
    const vi at = iota() + (first + v * kW);
    if (shaped) x[v] = x[v] * t.scale;
    if (t.softcap > 0.0f) x[v] = t.softcap * tanh(x[v] / t.softcap);
    if (t.slopes) x[v] = fma(set1(t.slopes[query % t.group]), __builtin_convertvector(at - pos, vf), x[v]);
    if (!whole) x[v] = ((at >= oldest) & (at <= pos)) != 0 ? x[v] : set1(-__builtin_inff());
  }
  return shaped;
}

// Scores of one query at the tile's positions become p = exp(s - maximum); *total is the sum of p.
inline void soften(const AttnTask& t, int64_t query, int64_t begin, const float* s, float* p, float* maximum,
                   float* total) {
  constexpr int kVecs = kKvTile / kW;
  vf x[kVecs];
  for (int v = 0; v < kVecs; ++v) x[v] = load(s + v * kW);
  const float scale = shape_scores(t, query, begin, x) ? 1.0f : t.scale;
  vf m = set1(kNone);
  for (int v = 0; v < kVecs; ++v) {
    x[v] = x[v] * scale;
    m = max(x[v], m);
  }
  const float top = max_of(m);
  vf l{};
  for (int v = 0; v < kVecs; ++v) {
    const vf e = exp(x[v] - top);
    store(p + v * kW, e);
    l += e;
  }
  *maximum = top;
  *total = sum(l);
}

}  // namespace

namespace FASTLLM_ISA {
void attend(const AttnTask& t, float* scratch);  // in fp32, of every type: attention.cc
}

#if defined(__AMX_BF16__)
namespace FASTLLM_ISA {
// The tile paths, for bf16 activations: attention_amx.cc and attention_amx_int8.cc.
void attend_bf16(const AttnTask& t, const Work& w);   // bf16 and fp16 caches
void attend_codes(const AttnTask& t, const Work& w);  // int8 caches
bool has_byte_tiles();                                // AMX-INT8 is another bit of CPUID than AMX-BF16
}  // namespace FASTLLM_ISA
#endif

}  // namespace fastllm::cpu

// What the fp32 and the tile path of attention share: the working memory of a task, and the softmax of one KV tile.
#pragma once

#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace FASTLLM_ISA {

// Parts of the scratch of one task. The tile path keeps bf16 where the fp32 path keeps fp32.
struct Work {
  int64_t queries, dim;  // dim: head_dim padded to 16
  float* q;              // fp32 [queries, head_dim]; bf16 [queries, head_dim padded to 32]
  float* keys;           // fp32 [head_dim, 64]; bf16 tiles [head_dim / 32][4][16 dim pairs][16 positions][2]
  float* values;         // fp32 [64, dim]; bf16 tiles [2][dim / 16][16 position pairs][16 dims][2]
  float* scores;         // fp32 [queries, 64]
  float* p;              // fp32: the scores' place; bf16 [queries, 64]
  float* tile;           // [queries, dim]; then maxima and sums [queries] each
  float* total;          // the same, merged
};

}  // namespace FASTLLM_ISA

using FASTLLM_ISA::Work;

namespace {

constexpr float kNone = -1e30f;  // maximum of no position at all: finite, so that differences are

inline int64_t attn_scratch(int64_t queries, int64_t head_dim) {
  const int64_t dim = round_up(head_dim, 32);
  return queries * dim + 2 * kKvTile * dim + 2 * queries * kKvTile + 2 * partial_floats(queries, head_dim);
}

inline Work layout(const AttnTask& t, float* scratch) {
  const int64_t queries = static_cast<int64_t>(t.tokens) * t.group, dim = round_up(t.head_dim, 32);
  Work w{};
  w.queries = queries;
  w.dim = round_up(t.head_dim, 16);
  w.q = scratch;
  w.keys = w.q + queries * dim;
  w.values = w.keys + kKvTile * dim;
  w.scores = w.values + kKvTile * dim;
  w.p = w.scores + queries * kKvTile;
  w.tile = w.p + queries * kKvTile;
  w.total = w.tile + partial_floats(queries, t.head_dim);
  return w;
}

// Where position `pos` has its key; its value lies kv_stride further.
template <class T>
inline const T* key_row(const AttnTask& t, int64_t pos) {
  return static_cast<const T*>(t.kv) + t.table[pos / t.block_size] * t.block_stride + (pos % t.block_size) * t.head_dim;
}

#if defined(__AVX512F__)
// Columns of a 16 x 16 block of floats become rows.
inline void transpose16(vf (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

// Scores of one query at the tile's positions become p = exp(s - maximum); *total is the sum of p as stored.
template <class P>
inline void soften(const AttnTask& t, int64_t query, int64_t begin, const float* s, P* p, float* maximum,
                   float* total) {
  constexpr int kVecs = kKvTile / kW;
  const auto pos = static_cast<int32_t>(t.first_pos + query / t.group);
  const int32_t oldest = t.window > 0 && pos >= t.window ? pos - t.window + 1 : 0;
  const auto first = static_cast<int32_t>(begin);
  const bool whole = first >= oldest && first + kKvTile - 1 <= pos;
  vf x[kVecs];
  vf m = set1(kNone);
  for (int v = 0; v < kVecs; ++v) {
    x[v] = load(s + v * kW) * t.scale;
    if (t.softcap > 0.0f) x[v] = t.softcap * tanh(x[v] / t.softcap);
    if (t.slopes || !whole) {
      const vi at = iota() + (first + v * kW);
      if (t.slopes) x[v] = fma(set1(t.slopes[query % t.group]), __builtin_convertvector(at - pos, vf), x[v]);
      if (!whole) x[v] = ((at >= oldest) & (at <= pos)) != 0 ? x[v] : set1(-__builtin_inff());
    }
    m = max(x[v], m);
  }
  const float top = max_of(m);
  vf l{};
  for (int v = 0; v < kVecs; ++v) {
    const vf e = exp(x[v] - top);
    store(p + v * kW, e);
    l += load(p + v * kW);
  }
  *maximum = top;
  *total = sum(l);
}

}  // namespace

#if defined(__AMX_BF16__)
namespace FASTLLM_ISA {
// The tile path, for bf16 activations and a bf16 cache. begin_tiles() also loads the queries; end_tiles() frees the
// unit.
void begin_tiles(const AttnTask& t, const Work& w);
void attend_tile_bf16(const AttnTask& t, const Work& w, int64_t tile, float* out);
void end_tiles();
}  // namespace FASTLLM_ISA
#endif

}  // namespace fastllm::cpu

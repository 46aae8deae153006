// Causal attention of a block of query tokens over the paged cache of one kv head (grouped-query, sliding window, soft
// cap, ALiBi), without a score matrix in memory.
//
//   for query i at position p, j in (p - window, p]: s[j] = cap(scale * q[i] . k[j]) + slope * (j - p)
//   w = softmax(s); out[i] = sum_j w[j] v[j]
//
// KV is cut into tiles of 64 positions anchored at position 0. A tile gives every query (maximum, sum, weighted
// values); tiles merge in ascending order. The tiles and that order never depend on the chunk, the batch or the
// threads, so neither does a bit of the result. A tile is widened to fp32 once, keys transposed, for all heads of the
// group and all query tokens. Cost: 4 head_dim operations per query, head and position; 2 head_dim size_of(kv) bytes
// per position. Benchmark: --benchmark_filter=Attention
#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/micro.h"

namespace fastllm::cpu {
namespace {

constexpr float kNone = -1e30f;  // maximum of no position at all: finite, so that differences are

// Scratch of one task; all fp32, every part a multiple of 16 floats.
struct Work {
  int64_t queries, dim;  // dim: head_dim padded to 16
  float* q;              // [queries, head_dim]
  float* keys;           // [head_dim, 64]
  float* values;         // [64, dim]
  float* scores;         // [queries, 64]
  float* tile;           // [queries, dim]; then maxima and sums [queries] each
  float* total;          // the same, merged
};

int64_t attn_scratch(int64_t queries, int64_t head_dim) {
  const int64_t dim = round_up(head_dim, 16);
  return queries * dim + 2 * kKvTile * dim + queries * kKvTile + 2 * partial_floats(queries, dim);
}

Work layout(const AttnTask& t, float* scratch) {
  Work w{};
  w.queries = static_cast<int64_t>(t.tokens) * t.group;
  w.dim = round_up(t.head_dim, 16);
  w.q = scratch;
  w.keys = w.q + w.queries * w.dim;
  w.values = w.keys + kKvTile * w.dim;
  w.scores = w.values + kKvTile * w.dim;
  w.tile = w.scores + w.queries * kKvTile;
  w.total = w.tile + partial_floats(w.queries, w.dim);
  return w;
}

template <class T>
void load_queries(const AttnTask& t, const Work& w) {
  for (int64_t i = 0; i < w.queries; ++i) {
    const T* q = static_cast<const T*>(t.q) + (i / t.group) * t.q_stride + (i % t.group) * t.head_dim;
    float* to = w.q + i * t.head_dim;
    for_vectors(t.head_dim, [&](int64_t d, int64_t lanes) { store_some(to + d, load_some(q + d, lanes), lanes); });
  }
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

// Positions [begin, begin + valid) of the cache, the rest of the tile zero.
template <class T>
void load_tile(const AttnTask& t, const Work& w, int64_t begin, int64_t valid) {
  const T* rows[kKvTile];
  for (int64_t j = 0; j < valid; ++j) {
    const int64_t pos = begin + j;
    rows[j] =
        static_cast<const T*>(t.kv) + t.table[pos / t.block_size] * t.block_stride + (pos % t.block_size) * t.head_dim;
  }
  for (int64_t j = 0; j < kKvTile; ++j) {
    float* to = w.values + j * w.dim;
    if (j >= valid) {
      __builtin_memset(to, 0, static_cast<size_t>(w.dim) * 4);
      continue;
    }
    const T* v = rows[j] + t.kv_stride;
    for_vectors(t.head_dim, [&](int64_t d, int64_t lanes) { store(to + d, load_some(v + d, lanes)); });
  }
  int64_t d = 0;
#if defined(__AVX512F__)
  for (; d + 16 <= t.head_dim; d += 16) {
    for (int64_t j = 0; j < kKvTile; j += 16) {
      vf r[16];
      for (int64_t i = 0; i < 16; ++i) r[i] = j + i < valid ? load(rows[j + i] + d) : vf{};
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) store(w.keys + (d + i) * kKvTile + j, r[i]);
    }
  }
#endif
  for (; d < t.head_dim; d += kW) {
    const int64_t lanes = t.head_dim - d < kW ? t.head_dim - d : kW;
    for (int64_t j = 0; j < kKvTile; ++j) {
      const vf k = j < valid ? load_some(rows[j] + d, lanes) : vf{};
      for (int64_t i = 0; i < lanes; ++i) w.keys[(d + i) * kKvTile + j] = k[i];
    }
  }
}

// Scores of one query become exp(s - maximum); returns {maximum, sum}.
inline void soften(const AttnTask& t, int64_t query, int64_t begin, float* s, float* maximum, float* total) {
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
    x[v] = exp(x[v] - top);
    l += x[v];
    store(s + v * kW, x[v]);
  }
  *maximum = top;
  *total = sum(l);
}

// The softmax partial of one tile for all queries: values, maxima, sums.
void attend_tile(const AttnTask& t, const Work& w, int64_t tile, float* out) {
  const int64_t begin = tile * kKvTile;
  const int64_t end = t.first_pos + t.tokens;
  const int64_t valid = end - begin < kKvTile ? end - begin : kKvTile;
  t.kv_bf16 ? load_tile<uint16_t>(t, w, begin, valid) : load_tile<float>(t, w, begin, valid);
  small_gemm(w.queries, kKvTile, t.head_dim, w.q, t.head_dim, w.keys, kKvTile, w.scores, kKvTile);
  float* maxima = out + w.queries * w.dim;
  float* sums = maxima + round_up(w.queries, 16);
  for (int64_t i = 0; i < w.queries; ++i) soften(t, i, begin, w.scores + i * kKvTile, maxima + i, sums + i);
  small_gemm(w.queries, w.dim, kKvTile, w.scores, kKvTile, w.values, w.dim, out, w.dim);
}

void clear_total(const Work& w) {
  const int64_t padded = round_up(w.queries, 16);
  float* maxima = w.total + w.queries * w.dim;
  __builtin_memset(w.total, 0, static_cast<size_t>(partial_floats(w.queries, w.dim)) * 4);
  for (int64_t i = 0; i < padded; ++i) maxima[i] = kNone;
}

void merge_tile(const Work& w, const float* tile) {
  const int64_t padded = round_up(w.queries, 16);
  float* maxima = w.total + w.queries * w.dim;
  float* sums = maxima + padded;
  const float* tile_maxima = tile + w.queries * w.dim;
  const float* tile_sums = tile_maxima + padded;
  for (int64_t i = 0; i < w.queries; i += kW) {
    const vf old_m = load(maxima + i), new_m = load(tile_maxima + i);
    const vf m = max(old_m, new_m);
    const vf keep = exp(old_m - m), take = exp(new_m - m);
    store(maxima + i, m);
    store(sums + i, fma(load(sums + i), keep, load(tile_sums + i) * take));
    for (int64_t q = i; q < i + kW && q < w.queries; ++q) {
      float* to = w.total + q * w.dim;
      const float* from = tile + q * w.dim;
      const vf a = set1(keep[q - i]), b = set1(take[q - i]);
      for (int64_t d = 0; d < w.dim; d += kW) store(to + d, fma(load(to + d), a, load(from + d) * b));
    }
  }
}

template <class T>
void write_out(const AttnTask& t, const Work& w) {
  const float* sums = w.total + w.queries * w.dim + round_up(w.queries, 16);
  for (int64_t i = 0; i < w.queries; ++i) {
    T* out = static_cast<T*>(t.out) + (i / t.group) * t.out_stride + (i % t.group) * t.head_dim;
    const float inverse = 1.0f / sums[i];
    const float* from = w.total + i * w.dim;
    for_vectors(t.head_dim, [&](int64_t d, int64_t lanes) { store_some(out + d, load(from + d) * inverse, lanes); });
  }
}

// Padding lanes of maxima and sums are read by merge_tile() and must be finite.
void clear_padding(const Work& w, float* tile) {
  const int64_t padded = round_up(w.queries, 16);
  float* maxima = tile + w.queries * w.dim;
  for (int64_t i = w.queries; i < padded; ++i) {
    maxima[i] = kNone;
    maxima[padded + i] = 0.0f;
  }
}

void attend(const AttnTask& t, float* scratch) {
  const Work w = layout(t, scratch);
  t.bf16 ? load_queries<uint16_t>(t, w) : load_queries<float>(t, w);
  const int64_t size = partial_floats(w.queries, w.dim);
  if (t.partials) {
    for (int64_t tile = t.tile_begin; tile < t.tile_end; ++tile) {
      clear_padding(w, t.partials + tile * size);
      attend_tile(t, w, tile, t.partials + tile * size);
    }
    return;
  }
  clear_total(w);
  clear_padding(w, w.tile);
  for (int64_t tile = t.tile_begin; tile < t.tile_end; ++tile) {
    attend_tile(t, w, tile, w.tile);
    merge_tile(w, w.tile);
  }
  t.bf16 ? write_out<uint16_t>(t, w) : write_out<float>(t, w);
}

void merge(const AttnTask& t, float* scratch) {
  const Work w = layout(t, scratch);
  const int64_t size = partial_floats(w.queries, w.dim);
  clear_total(w);
  for (int64_t tile = t.tile_begin; tile < t.tile_end; ++tile) merge_tile(w, t.partials + tile * size);
  t.bf16 ? write_out<uint16_t>(t, w) : write_out<float>(t, w);
}

}  // namespace

void FASTLLM_ISA::fill_attention(Kernels& t) {
  t.attn_scratch = attn_scratch;
  t.attend = attend;
  t.merge = merge;
}

}  // namespace fastllm::cpu

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
#include "backend/cpu/kernels/attention_merge.h"
#include "backend/cpu/kernels/micro.h"

namespace fastllm::cpu {
namespace {

template <class T>
void load_queries(const AttnTask& t, const Work& w) {
  for (int64_t i = 0; i < w.queries; ++i) {
    const T* q = query_row<T>(t, i);
    float* to = w.q + i * t.head_dim;
    for_vectors(t.head_dim, [&](int64_t d, int64_t lanes) { store_some(to + d, load_some(q + d, lanes), lanes); });
  }
}

// Positions [begin, begin + valid) of the cache, the rest of the tile zero.
template <class T>
void load_tile(const AttnTask& t, const Work& w, int64_t begin, int64_t valid) {
  constexpr bool kScaled = __is_same(T, Code);
  const T* rows[kKvTile];
  find_keys(t, begin, valid, rows);
  [[maybe_unused]] float key_scales[kKvTile], value_scales[kKvTile];
  if constexpr (kScaled) load_scales(t, begin, valid, key_scales, value_scales);
  const auto key = [&](int64_t j, int64_t d, int64_t lanes) {
    if (j >= valid) return vf{};
    const vf k = load_some(rows[j] + d, lanes);
    if constexpr (kScaled) return k * key_scales[j];
    return k;
  };
  for (int64_t j = 0; j < kKvTile; ++j) {
    float* to = w.values + j * w.dim;
    if (j >= valid) {
      __builtin_memset(to, 0, static_cast<size_t>(w.dim) * 4);
      continue;
    }
    for_vectors(t.head_dim, [&](int64_t d, int64_t lanes) {
      vf v = load_some(rows[j] + t.kv_stride + d, lanes);
      if constexpr (kScaled) v *= value_scales[j];
      store(to + d, v);
    });
  }
  int64_t d = 0;
#if defined(__AVX512F__)
  for (; d + 16 <= t.head_dim; d += 16) {
    for (int64_t j = 0; j < kKvTile; j += 16) {
      vf r[16];
      for (int64_t i = 0; i < 16; ++i) r[i] = key(j + i, d, 16);
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) store(w.keys + (d + i) * kKvTile + j, r[i]);
    }
  }
#endif
  for (; d < t.head_dim; d += kW) {
    const int64_t lanes = t.head_dim - d < kW ? t.head_dim - d : kW;
    for (int64_t j = 0; j < kKvTile; ++j) {
      const vf k = key(j, d, lanes);
      for (int64_t i = 0; i < lanes; ++i) w.keys[(d + i) * kKvTile + j] = k[i];
    }
  }
}

// The softmax partial of one tile for all queries: values, maxima, sums.
void attend_tile(const AttnTask& t, const Work& w, int64_t tile, float* out) {
  const int64_t begin = tile * kKvTile;
  const int64_t end = t.first_pos + t.tokens;
  const int64_t valid = end - begin < kKvTile ? end - begin : kKvTile;
  with_kv_type(t.kv_type, [&]<class T>(T) { load_tile<T>(t, w, begin, valid); });
  small_gemm(w.queries, kKvTile, t.head_dim, w.q, t.head_dim, w.keys, kKvTile, w.scores, kKvTile);
  float* maxima = out + w.queries * w.dim;
  float* sums = maxima + round_up(w.queries, 16);
  for (int64_t i = 0; i < w.queries; ++i) {
    float* s = w.scores + i * kKvTile;
    soften(t, i, begin, s, s, maxima + i, sums + i);
  }
  small_gemm(w.queries, w.dim, kKvTile, w.scores, kKvTile, w.values, w.dim, out, w.dim);
}

#if defined(__AMX_BF16__)
template <bool kByteTiles>
void attend_on_tiles(const AttnTask& t, float* scratch) {
  const bool codes = t.kv_type == KvType::I8;
  if (!t.bf16 || t.kv_type == KvType::F32 || (codes && !kByteTiles)) return FASTLLM_ISA::attend(t, scratch);
  const Work w = layout(t, scratch);
  codes ? FASTLLM_ISA::attend_codes(t, w) : FASTLLM_ISA::attend_bf16(t, w);
}
#endif

void merge(const AttnTask& t, float* scratch) {
  const Work w = layout(t, scratch);
  const int64_t size = partial_floats(w.queries, w.dim);
  clear_total(w);
  for (int64_t tile = t.tile_begin; tile < t.tile_end; ++tile) merge_tile(w, t.partials + tile * size);
  write_out(t, w);
}

}  // namespace

void FASTLLM_ISA::attend(const AttnTask& t, float* scratch) {
  const Work w = layout(t, scratch);
  t.bf16 ? load_queries<uint16_t>(t, w) : load_queries<float>(t, w);
  attend_tiles(t, w, [&](int64_t tile, float* out) { attend_tile(t, w, tile, out); });
}

void FASTLLM_ISA::fill_attention(Kernels& t) {
  t.attn_scratch = attn_scratch;
  t.attend = FASTLLM_ISA::attend;
  t.merge = merge;
#if defined(__AMX_BF16__)
  t.attend = FASTLLM_ISA::has_byte_tiles() ? attend_on_tiles<true> : attend_on_tiles<false>;
#endif
}

}  // namespace fastllm::cpu

// Attention on AMX tiles, for bf16 queries and a bf16 or fp16 cache: s = q k^T and out = p v, the
// softmax between them in fp32 and p rounded to bf16, as are keys and values from fp16. How: attention_tiles.h.
// Everything else, and the naive reference, is in attention.cc.
//
// Cost at head_dim 64: 128 cycles per 16 queries for each of the two products, and up to three times that for the
// softmax, as the room is 4, 8 or 16 queries.
// Benchmark: --benchmark_filter=Attention
#include "backend/cpu/kernels/attention_tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

// Up to 32 numbers as bf16, the rest zero.
inline vf load_bf16(const uint16_t* p, int64_t n) { return load_bytes(p, n * 2); }
inline vf load_bf16(const Half* p, int64_t n) {
  const auto h = reinterpret_cast<__m512i>(load_bytes(p, n * 2));
  const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(h)),
               high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
  return reinterpret_cast<vf>(_mm512_cvtne2ps_pbh(high, low));
}

template <class T>
KeyRows find_key_rows(const AttnTask& t, const Work& w, const TileReader<T>& reader, int64_t tile) {
  const TileRows<T>& rows = reader.at(tile);
  if (!__is_same(T, Half) && keys_in_place(t, reader)) return rows_in_place(rows, reader.row_bytes());
  return copy_rows(w, rows, round_up(t.head_dim, 32) * 2,
                   [&](const T* row, int64_t i) { return load_bf16(row + i / 2, t.head_dim - i / 2); });
}

// Two positions interleave: tiles [2][dim / 16][16 position pairs][16 dims][2]. Positions from `valid` on are zero.
template <class T, bool kWhole>
void interleave_values(const AttnTask& t, const Work& w, const TileReader<T>& reader, const TileRows<T>& rows) {
  // Unpacking works within 128 bits: the eight quads of dims are dealt out so that its halves are 16 dims in order.
  const __m512i deal = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const Ask<T> ask = reader.successors();
  const int64_t head_dim = t.head_dim, kv_stride = t.kv_stride, dim = w.dim;
  auto* to = reinterpret_cast<char*>(w.values);
  for (int64_t j = 0; j < kKvTile; j += 2) {
    for (int64_t i = 0; i < 2; ++i) ask(j + i);
    char* tile = to + j / 32 * (dim / 16) * kTileBytes + j % 32 * 32;
    for (int64_t d = 0; d < head_dim; d += 32, tile += 2 * kTileBytes) {
      __m512i pair[2];
      for (int64_t i = 0; i < 2; ++i) {
        vf v{};
        if (kWhole || j + i < rows.valid) v = load_bf16(rows.keys[j + i] + kv_stride + d, kWhole ? 32 : head_dim - d);
        pair[i] = _mm512_permutexvar_epi64(deal, reinterpret_cast<__m512i>(v));
      }
      _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(pair[0], pair[1]));
      if (d + 16 < dim) _mm512_storeu_si512(tile + kTileBytes, _mm512_unpackhi_epi16(pair[0], pair[1]));
    }
  }
}

// q: tiles [k][16 dim pairs][16 queries][2]; s: [64][room]
template <class R>
void score(const KeyRows& keys, int64_t k, const char* q, float* s) {
  constexpr int64_t kRow = R::kQueries * 4, kGroup = 16 * R::kQueries;
  for (int64_t g = 0; g < kKvTile / 16; g += 2, s += 2 * kGroup) {
    zero_tile<0>();
    zero_tile<1>();
    for (int64_t i = 0; i < k; ++i) {
      load_tile<3>(q + i * kTileBytes, 64);
      load_tile<2>(keys.at[g] + i * 64, keys.stride);
      dot_bf16<0, 2, 3>();
      load_tile<7>(keys.at[g + 1] + i * 64, keys.stride);
      dot_bf16<1, 7, 3>();
    }
    store_tile<0>(s, kRow);
    store_tile<1>(s + kGroup, kRow);
  }
}

// Words of two vectors, each [positions][queries], as [queries][positions].
template <class R>
struct Turn {
  alignas(64) uint16_t from[32];
  constexpr Turn() : from() {
    for (int i = 0; i < 32; ++i) {
      const int positions = 2 * static_cast<int>(R::kPositions), position = i % positions, query = i / positions;
      from[i] = static_cast<uint16_t>(position * R::kQueries + query);
    }
  }
};

// p as two A operands, [2][16 queries][32 positions]
template <class R>
void round_rows(const float* s, char* p) {
  constexpr int64_t kParts = R::kQueries;  // vectors of each operand
  static constexpr Turn<R> kTurn;
  const __m512i turn = _mm512_load_si512(kTurn.from);
  for (int64_t half = 0; half < 2; ++half, s += 2 * kParts * kW, p += kTileBytes) {
    vf r[kParts];
    for (int64_t i = 0; i < kParts; ++i) {
      const auto both =
          reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(s + (2 * i + 1) * kW), load(s + 2 * i * kW)));
      r[i] = reinterpret_cast<vf>(_mm512_permutexvar_epi16(turn, both));
    }
    transpose(r);
    for (int64_t i = 0; i < kParts; ++i) store(reinterpret_cast<float*>(p) + i * kW, r[i]);
  }
}

// out: [queries, dim] of set_queries()
void weigh(const char* p, const char* values, int64_t dim, float* out) {
  const int64_t half = dim / 16 * kTileBytes;
  for (int64_t d = 0; d < dim; d += 32, values += 2 * kTileBytes) {
    const bool both = d + 16 < dim;
    zero_tile<4>();
    zero_tile<5>();
    for (int64_t i = 0; i < 2; ++i) {
      load_tile<6>(p + i * kTileBytes, 64);
      load_tile<7>(values + i * half, 64);
      dot_bf16<4, 6, 7>();
      if (!both) continue;
      load_tile<2>(values + i * half + kTileBytes, 64);
      dot_bf16<5, 6, 2>();
    }
    store_tile<4>(out + d, dim * 4);
    if (both) store_tile<5>(out + d + 16, dim * 4);
  }
}

// The queries as B operands, see score().
void pack_queries(const AttnTask& t, const Work& w) {
  auto* to = reinterpret_cast<float*>(w.q);
  for (int64_t i = 0; i < w.queries; i += kChunk) {
    for (int64_t d = 0; d < t.head_dim; d += 32) {
      vf r[16] = {};
      for (int64_t j = 0; j < queries_of(w, i); ++j)
        r[j] = load_bf16(query_row<uint16_t>(t, i + j) + d, t.head_dim - d);
      transpose16(r);
      for (int64_t j = 0; j < 16; ++j, to += kW) store(to, r[j]);
    }
  }
}

template <class T, class R>
void attend_in(const AttnTask& t, const Work& w) {
  begin_queries<R>(t, w);
  pack_queries(t, w);
  TileReader<T> reader(t);
  KeyRows keys{};
  const int64_t k = round_up(t.head_dim, 32) / 32;
  const auto* q = reinterpret_cast<const char*>(w.q);
  auto* p = reinterpret_cast<char*>(w.p);
  float *scores = w.scores, *next_scores = w.scores + kKvTile * kChunk;
  const auto score_next = [&](int64_t tile, int64_t first) {
    if (first == 0) keys = find_key_rows(t, w, reader, tile);
    score<R>(keys, k, q + first / kChunk * k * kTileBytes, next_scores);
  };
  score_next(t.tile_begin, 0);
  attend_tiles(t, w, [&](int64_t tile, float* out) {
    reader.begin(tile);
    const TileRows<T>& rows = reader.at(tile);
    float* maxima = out + w.queries * w.dim;
    float* sums = maxima + round_up(w.queries, 16);
    each_pass<R>(w, [&](int64_t i, int64_t) {
      float* s = next_scores;
      next_scores = scores;
      scores = s;
      if (i + kChunk < w.queries) {
        score_next(tile, i + kChunk);
      } else if (tile + 1 < t.tile_end) {
        score_next(tile + 1, 0);
      }
      const Softened done = soften_columns<R>(t, w, rows.begin, i, s);
      store(maxima + i, done.maxima);
      store(sums + i, done.sums);
      round_rows<R>(s, p);
      if (i == 0) {
        const bool whole = rows.valid == kKvTile && t.head_dim % 32 == 0;
        whole ? interleave_values<T, true>(t, w, reader, rows) : interleave_values<T, false>(t, w, reader, rows);
      }
      weigh(p, reinterpret_cast<const char*>(w.values), w.dim, out + i * w.dim);
    });
  });
  release();
}

}  // namespace

void FASTLLM_ISA::attend_bf16(const AttnTask& t, const Work& w) {
  with_room(w.queries,
            [&]<class R>(R) { t.kv_type == KvType::F16 ? attend_in<Half, R>(t, w) : attend_in<uint16_t, R>(t, w); });
}

}  // namespace fastllm::cpu

#endif

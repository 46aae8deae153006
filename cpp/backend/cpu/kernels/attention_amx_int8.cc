// Attention on AMX tiles, for bf16 queries and an int8 cache: codes meet codes, and nothing but the
// softmax is done in fp32. How: attention_tiles.h.
//
//   q = step (256 high + low), both int8, step = max |q| / 32512
//   s[j] = step scale_k[j] (256 high . k[j] + low . k[j])
//   p[j] scale_v[j] = step (256 high[j] + low[j]), both without sign, step = max_j p[j] scale_v[j] / 65535
//   out = step sum_j (256 high[j] + low[j]) v[j]
//
// 16 bits lose less of q and p than bf16 does, and sums of codes are exact. Cost: as many tile products as with bf16,
// and half the bytes. Benchmark: --benchmark_filter=Attention
#include "backend/cpu/kernels/attention_tiles.h"

#if defined(__AMX_BF16__)

#include <cpuid.h>

namespace fastllm::cpu {
namespace {

constexpr float kMostQuery = 127 * 256;  // its high code fits 8 bits with a sign
constexpr float kMostWeight = 65535;

// 256 high + low of 16 sums.
inline vf join(const int32_t* high, const int32_t* low) {
  const vf h = _mm512_cvtepi32_ps(_mm512_loadu_si512(high)), l = _mm512_cvtepi32_ps(_mm512_loadu_si512(low));
  return fma(h, set1(256.0f), l);
}

KeyRows find_key_rows(const AttnTask& t, const Work& w, const TileReader<Code>& reader, int64_t tile) {
  const TileRows<Code>& rows = reader.at(tile);
  if (keys_in_place(t, reader)) return rows_in_place(rows, reader.row_bytes());
  return copy_rows(w, rows, round_up(t.head_dim, 64),
                   [&](const Code* row, int64_t i) { return load_bytes(row + i, t.head_dim - i); });
}

// The four positions whose weights and values meet in one step of a product are those that weights of this room have in
// the same lane of four vectors. Sums of codes are exact: their order may differ from room to room.
template <class R>
constexpr int64_t position_of(int64_t quad, int64_t i) {
  return (quad / R::kPositions * 4 + i) * R::kPositions + quad % R::kPositions;
}

// Four positions interleave, in the order 0, 2, 1, 3 as in round_rows(): tiles [dim / 16][16 quads][16 dims][4].
template <class R, bool kWhole>
void interleave_values(const AttnTask& t, const Work& w, const TileReader<Code>& reader, const TileRows<Code>& rows) {
  // Unpacking works within 128 bits: the sixteen quads of dims are dealt out so that its results are 16 dims in order.
  const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Ask<Code> ask = reader.successors();
  const int64_t head_dim = t.head_dim, kv_stride = t.kv_stride, dim = w.dim;
  for (int64_t quad = 0; quad < kKvTile / 4; ++quad) {
    for (int64_t i = 0; i < 4; ++i) ask(quad * 4 + i);
    char* tile = reinterpret_cast<char*>(w.values) + quad * 64;
    for (int64_t d = 0; d < head_dim; d += 64) {
      __m512i r[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t j = position_of<R>(quad, i);
        vf v{};
        if (kWhole || j < rows.valid) v = load_bytes(rows.keys[j] + kv_stride + d, kWhole ? 64 : head_dim - d);
        r[i] = _mm512_permutexvar_epi32(deal, reinterpret_cast<__m512i>(v));
      }
      const __m512i low02 = _mm512_unpacklo_epi8(r[0], r[2]), low13 = _mm512_unpacklo_epi8(r[1], r[3]);
      const __m512i high02 = _mm512_unpackhi_epi8(r[0], r[2]), high13 = _mm512_unpackhi_epi8(r[1], r[3]);
      const __m512i out[4] = {_mm512_unpacklo_epi16(low02, low13), _mm512_unpackhi_epi16(low02, low13),
                              _mm512_unpacklo_epi16(high02, high13), _mm512_unpackhi_epi16(high02, high13)};
      for (int64_t i = 0; i < 4 && d + i * 16 < dim; ++i, tile += kTileBytes) _mm512_storeu_si512(tile, out[i]);
    }
  }
}

// q: tiles [k][high, low][16 dim quads][16 queries][4]; sums: [high, low][64][room]
template <class R>
void score(const KeyRows& keys, int64_t k, const char* q, int32_t* sums) {
  constexpr int64_t kRow = R::kQueries * 4, kGroup = 16 * R::kQueries;
  int32_t* low = sums + kKvTile * R::kQueries;
  for (int64_t g = 0; g < kKvTile / 16; ++g) {
    zero_tile<0>();
    zero_tile<1>();
    for (int64_t i = 0; i < k; ++i) {
      load_tile<2>(keys.at[g] + i * 64, keys.stride);
      load_tile<3>(q + 2 * i * kTileBytes, 64);
      dot_bytes<true, true, 0, 2, 3>();
      load_tile<3>(q + (2 * i + 1) * kTileBytes, 64);
      dot_bytes<true, true, 1, 2, 3>();
    }
    store_tile<0>(sums + g * kGroup, kRow);
    store_tile<1>(low + g * kGroup, kRow);
  }
}

// What score() left, as scores [64][room].
template <class R>
void join_scores(const int32_t* sums, vf steps, const float* scales, float* s) {
  const int32_t* low = sums + kKvTile * R::kQueries;
  for (int64_t v = 0; v < R::kVectors; ++v)
    store(s + v * kW, join(sums + v * kW, low + v * kW) * (steps * R::spread(scales + v * R::kPositions)));
}

// p times the values' scales as two A operands, [high, low][16 queries][64 positions]; returns their steps.
template <class R>
vf round_rows(float* s, const float* scales, char* p) {
  constexpr int64_t kQuads = R::kQueries;  // vectors of quads of positions
  vf part[4] = {};
  for (int64_t v = 0; v < R::kVectors; ++v) {
    const vf x = load(s + v * kW) * R::spread(scales + v * R::kPositions);
    part[v % 4] = max(x, part[v % 4]);
    store(s + v * kW, x);
  }
  const vf most = R::max_over(max(max(part[0], part[1]), max(part[2], part[3])));
  const vf inverse = most > 0.0f ? kMostWeight / most : vf{};
  // [positions][queries] of a vector as [queries][positions]
  const vi lane = iota(), turn = lane % static_cast<int32_t>(R::kPositions) * static_cast<int32_t>(R::kQueries) +
                                 lane / static_cast<int32_t>(R::kPositions);
  const auto turned = [&](vu x) {
    return reinterpret_cast<vf>(
        _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(turn), reinterpret_cast<__m512i>(x)));
  };
  vf high[kQuads], low[kQuads];
  for (int64_t i = 0; i < kQuads; ++i) {
    vu code[4];
    for (int64_t j = 0; j < 4; ++j)
      code[j] = reinterpret_cast<vu>(_mm512_cvtps_epi32(load(s + (4 * i + j) * kW) * inverse));
    const vu a = code[0] | code[1] << 16, b = code[2] | code[3] << 16;
    high[i] = turned(((a >> 8) & 0x00ff00ffu) | (b & 0xff00ff00u));
    low[i] = turned((a & 0x00ff00ffu) | ((b << 8) & 0xff00ff00u));
  }
  transpose(high);
  transpose(low);
  auto* to = reinterpret_cast<float*>(p);
  for (int64_t i = 0; i < kQuads; ++i) {
    store(to + i * kW, high[i]);
    store(to + (16 + i) * kW, low[i]);
  }
  return most * (1.0f / kMostWeight);
}

// out: [n queries, dim] of set_queries(); sums: room for [2][16][dim]
void weigh(const char* p, const char* values, int64_t n, int64_t dim, vf steps, int32_t* sums, float* out) {
  int32_t* low = sums + kChunk * dim;
  for (int64_t d = 0; d < dim; d += 16, values += kTileBytes) {
    zero_tile<4>();
    zero_tile<5>();
    load_tile<7>(values, 64);
    load_tile<6>(p, 64);
    dot_bytes<false, true, 4, 6, 7>();
    load_tile<6>(p + kTileBytes, 64);
    dot_bytes<false, true, 5, 6, 7>();
    store_tile<4>(sums + d, dim * 4);
    store_tile<5>(low + d, dim * 4);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = i * dim; d < (i + 1) * dim; d += kW) store(out + d, join(sums + d, low + d) * steps[i]);
}

// Rows of 16 queries, zero where there is none, as codes; returns the steps. codes: [2][16 queries][padded dims]
vf split_queries(const AttnTask& t, int64_t first, int64_t n, int64_t padded, int8_t* codes) {
  vf steps{};
  for (int64_t i = 0; i < kChunk; ++i) {
    const uint16_t* q = query_row<uint16_t>(t, first + (i < n ? i : 0));
    vf most{};
    for_vectors(t.head_dim, [&](int64_t d, int64_t lanes) { most = max(abs(load_some(q + d, lanes)), most); });
    const float top = i < n ? max_of(most) : 0.0f;
    steps[i] = top / kMostQuery;
    const vf inverse = set1(top > 0.0f ? kMostQuery / top : 0.0f);
    int8_t *high = codes + i * padded, *low = high + kChunk * padded;
    for (int64_t d = 0; d < padded; d += kW) {
      const int64_t left = t.head_dim - d;
      const vf x = left >= kW ? load(q + d) : left > 0 ? load(q + d, left) : vf{};
      const __m512i code = _mm512_cvtps_epi32(x * inverse);
      // The last byte of the code, as a signed one, is what 256 times this leaves.
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + d), _mm512_cvtepi32_epi8(upper));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + d), _mm512_cvtepi32_epi8(code));
    }
  }
  return steps;
}

// The queries as B operands, see score(), and their steps.
template <class R>
void pack_queries(const AttnTask& t, const Work& w) {
  const int64_t padded = round_up(t.head_dim, 64);
  auto* codes = reinterpret_cast<int8_t*>(w.scores);
  auto* to = reinterpret_cast<float*>(w.q);
  for (int64_t i = 0; i < w.queries; i += kChunk) {
    store(w.steps + i, split_queries(t, i, queries_of(w, i), padded, codes));
    for (int64_t d = 0; d < padded; d += 64) {
      for (int64_t part = 0; part < 2; ++part) {
        vf r[16];
        for (int64_t j = 0; j < 16; ++j) r[j] = load_bytes(codes + (part * kChunk + j) * padded + d, 64);
        transpose16(r);
        for (int64_t j = 0; j < 16; ++j, to += kW) store(to, r[j]);
      }
    }
  }
  for (int64_t i = R::kQueries; i < kChunk; ++i) w.steps[i] = w.steps[i - R::kQueries];
}

template <class R>
void attend_in(const AttnTask& t, const Work& w) {
  begin_queries<R>(t, w);
  pack_queries<R>(t, w);
  TileReader<Code> reader(t);
  KeyRows keys{};
  const int64_t k = round_up(t.head_dim, 64) / 64;
  const auto* q = reinterpret_cast<const char*>(w.q);
  auto* p = reinterpret_cast<char*>(w.p);
  constexpr int64_t kSums = 2 * kKvTile * kChunk;
  auto *scores = reinterpret_cast<int32_t*>(w.products), *next_scores = scores + kSums, *weighed = next_scores + kSums;
  const auto score_next = [&](int64_t tile, int64_t first) {
    if (first == 0) keys = find_key_rows(t, w, reader, tile);
    score<R>(keys, k, q + first / kChunk * 2 * k * kTileBytes, next_scores);
  };
  score_next(t.tile_begin, 0);
  attend_tiles(t, w, [&](int64_t tile, float* out) {
    reader.begin(tile);
    const TileRows<Code>& rows = reader.at(tile);
    float key_scales[kKvTile], value_scales[kKvTile];
    load_scales(t, rows.begin, rows.valid, key_scales, value_scales);
    float* maxima = out + w.queries * w.dim;
    float* sums = maxima + round_up(w.queries, 16);
    each_pass<R>(w, [&](int64_t i, int64_t n) {
      int32_t* s = next_scores;
      next_scores = scores;
      scores = s;
      if (i + kChunk < w.queries) {
        score_next(tile, i + kChunk);
      } else if (tile + 1 < t.tile_end) {
        score_next(tile + 1, 0);
      }
      join_scores<R>(s, load(w.steps + i), key_scales, w.scores);
      const Softened done = soften_columns<R>(t, w, rows.begin, i, w.scores);
      store(maxima + i, done.maxima);
      store(sums + i, done.sums);
      const vf steps = round_rows<R>(w.scores, value_scales, p);
      if (i == 0) {
        const bool whole = rows.valid == kKvTile && t.head_dim % 64 == 0;
        whole ? interleave_values<R, true>(t, w, reader, rows) : interleave_values<R, false>(t, w, reader, rows);
      }
      weigh(p, reinterpret_cast<const char*>(w.values), n, w.dim, steps, weighed, out + i * w.dim);
    });
  });
  release();
}

}  // namespace

bool FASTLLM_ISA::has_byte_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 25 & 1u) != 0;
}

void FASTLLM_ISA::attend_codes(const AttnTask& t, const Work& w) {
  with_room(w.queries, [&]<class R>(R) { attend_in<R>(t, w); });
}

}  // namespace fastllm::cpu

#endif

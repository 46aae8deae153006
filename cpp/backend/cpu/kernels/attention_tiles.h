// What the bf16 and the int8 tile path of attention share. Queries lie in the lanes of vectors:
//
//   s^T [64 positions][room] = k q^T       rows of keys are an A operand as they lie in the cache; q is packed once
//   p [queries][64 positions]              its softmax, back in rows
//   out [queries][head_dim] = p v          values are interleaved, which is what a B operand takes
//
// A pass has room for 4, 8 or 16 queries, and a vector of scores for 4, 2 or 1 positions of each. What a query's result
// depends on is the same in all of them: maxima do not depend on their order, sums are those of positions j mod 4, then
// (0 + 1) + (2 + 3).
//
// The tile unit computes the scores of one pass while the vector unit softens those of the pass before.
//
// Tiles 0, 1: C of s^T; 2, 7: A; 3: B. Tiles 4, 5: C of out; 6: A; 2, 7: B. Those of out have as many rows as queries.
#pragma once

#include "backend/cpu/kernels/attention_merge.h"
#include "backend/cpu/kernels/attention_reader.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

static_assert(kW == 16);
constexpr int64_t kChunk = 16;        // queries of one pass at most: lanes of a vector, rows of a tile
constexpr int64_t kTileBytes = 1024;  // of a tile of 16 rows

inline vf swap_halves(vf x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }
inline vf swap_quarters(vf x) { return _mm512_shuffle_f32x4(x, x, 0xb1); }  // within each half

// The room of a pass.
template <int kRoom>
struct Room {
  static constexpr int64_t kQueries = kRoom;
  static constexpr int64_t kPositions = kW / kQueries;       // of a vector of scores
  static constexpr int64_t kVectors = kKvTile / kPositions;  // of a tile's scores
  static constexpr int64_t kSums = 4 / kPositions;           // vectors with every position mod 4

  static vi position_of_lane() { return iota() / kRoom; }
  // Over the positions of a vector, in all of them.
  static vf max_over(vf x) {
    if constexpr (kPositions > 2) x = max(x, swap_quarters(x));
    if constexpr (kPositions > 1) x = max(x, swap_halves(x));
    return x;
  }
  static vf sum_over(const vf (&x)[kSums]) {
    if constexpr (kPositions == 1) {
      return (x[0] + x[1]) + (x[2] + x[3]);
    } else if constexpr (kPositions == 2) {
      return (x[0] + swap_halves(x[0])) + (x[1] + swap_halves(x[1]));
    } else {
      const vf pairs = x[0] + swap_quarters(x[0]);
      return pairs + swap_halves(pairs);
    }
  }
  // One number of each of a vector's positions, for all its queries.
  static vf spread(const float* x) {
    if constexpr (kPositions == 1) {
      return set1(*x);
    } else if constexpr (kPositions == 2) {
      return _mm512_mask_blend_ps(0xff00, set1(x[0]), set1(x[1]));
    } else {
      const __m512 all = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
      return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(position_of_lane()), all);
    }
  }
};

// f(Room) for the least that has room for all queries.
template <class F>
inline void with_room(int64_t queries, F&& f) {
  if (queries <= 4) return f(Room<4>{});
  if (queries <= 8) return f(Room<8>{});
  f(Room<16>{});
}

inline int64_t queries_of(const Work& w, int64_t first) {
  return w.queries - first < kChunk ? w.queries - first : kChunk;
}

template <class R>
inline void set_queries(int64_t n) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = static_cast<uint8_t>(i >= 4 && i <= 6 ? n : 16);
    c.bytes_per_row[i] = i == 0 || i == 1 || i == 3 ? R::kQueries * 4 : 64;
  }
  configure(c);
}

// f(first query, queries) for every pass, the tiles being set for it; begin_queries() set them for the first.
template <class R, class F>
inline void each_pass(const Work& w, F&& f) {
  const bool uneven = w.queries > kChunk && w.queries % kChunk != 0;
  for (int64_t i = 0; i < w.queries; i += kChunk) {
    if (uneven) set_queries<R>(queries_of(w, i));
    f(i, queries_of(w, i));
  }
}

// What every path notes about its queries before the first tile. Lanes without a query repeat another.
template <class R>
inline void begin_queries(const AttnTask& t, const Work& w) {
  set_queries<R>(queries_of(w, 0));
  int32_t token = 0, head = 0;
  for (int64_t i = 0; i < w.queries; ++i) {
    w.pos[i] = t.first_pos + token;
    w.slopes[i] = t.slopes ? t.slopes[head] : 0.0f;
    if (++head == t.group) head = 0, ++token;
  }
  for (int64_t i = w.queries; i < round_up(w.queries, kChunk); ++i) {
    const int64_t other = R::kQueries < kChunk && i >= R::kQueries ? i - R::kQueries : w.queries - 1;
    w.pos[i] = w.pos[other];
    w.slopes[i] = w.slopes[other];
  }
}

// Up to 64 bytes, the rest zero.
inline vf load_bytes(const void* p, int64_t n) {
  const __mmask64 some = n < 64 ? (uint64_t{1} << n) - 1u : ~uint64_t{0};
  return reinterpret_cast<vf>(_mm512_maskz_loadu_epi8(some, p));
}

// Keys as A operands: where 16 positions begin, and how far apart their rows are.
struct KeyRows {
  const char* at[kKvTile / 16];
  int64_t stride;  // bytes
};

// In the cache itself, where 16 rows lie together and none needs padding.
template <class T>
inline bool keys_in_place(const AttnTask& t, const TileReader<T>& reader) {
  return t.block_size % 16 == 0 && reader.row_bytes() % 64 == 0;
}
template <class T>
inline KeyRows rows_in_place(const TileRows<T>& rows, int64_t row_bytes) {
  KeyRows k{{}, row_bytes};
  for (int64_t g = 0; g < kKvTile / 16; ++g)
    k.at[g] = reinterpret_cast<const char*>(rows.keys[g * 16 < rows.valid ? g * 16 : 0]);
  return k;
}
// Copies, padded with zeros to whole tiles; get(row, byte offset) gives 64 bytes.
template <class T, class F>
inline KeyRows copy_rows(const Work& w, const TileRows<T>& rows, int64_t stride, F&& get) {
  KeyRows k{{}, stride};
  auto* to = reinterpret_cast<char*>(w.keys);
  for (int64_t j = 0; j < kKvTile; ++j) {
    if (j % 16 == 0) k.at[j / 16] = to + j * stride;
    for (int64_t i = 0; i < stride; i += 64) store(reinterpret_cast<float*>(to + j * stride + i), get(rows.keys[j], i));
  }
  return k;
}

// Four vectors of four quarters: quarter i of vector j becomes quarter j of vector i.
inline void transpose_quarters(vf& a, vf& b, vf& c, vf& d) {
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
  const __m512 ab2 = _mm512_shuffle_f32x4(a, b, 0xee), cd2 = _mm512_shuffle_f32x4(c, d, 0xee);
  a = _mm512_shuffle_f32x4(ab, cd, 0x88);
  b = _mm512_shuffle_f32x4(ab, cd, 0xdd);
  c = _mm512_shuffle_f32x4(ab2, cd2, 0x88);
  d = _mm512_shuffle_f32x4(ab2, cd2, 0xdd);
}

// Eight vectors of eight pairs: pair i of vector j becomes pair j of vector i.
inline void transpose8(vf (&r)[8]) {
  vf even[4], odd[4];
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
    even[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    odd[i] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  transpose_quarters(even[0], even[1], even[2], even[3]);
  transpose_quarters(odd[0], odd[1], odd[2], odd[3]);
  for (int i = 0; i < 4; ++i) {
    r[2 * i] = even[i];
    r[2 * i + 1] = odd[i];
  }
}

// Sixteenth, eighth or quarter i of vector j becomes j of vector i.
template <int n>
inline void transpose(vf (&r)[n]) {
  if constexpr (n == 16) {
    transpose16(r);
  } else if constexpr (n == 8) {
    transpose8(r);
  } else {
    transpose_quarters(r[0], r[1], r[2], r[3]);
  }
}

// Scores times log2(e) of `shaped` tasks, which have a soft cap or slopes; others keep theirs. -inf where masked.
template <class R>
inline void shape_scores(const AttnTask& t, const Work& w, int64_t tile_begin, int64_t first, bool shaped, vi oldest,
                         float* s) {
  const vi pos = reinterpret_cast<vi>(load_u32(w.pos + first));
  const vf slope = load(w.slopes + first) * kLog2e;
  vi at = R::position_of_lane() + static_cast<int32_t>(tile_begin);
  for (int64_t v = 0; v < R::kVectors; ++v, at += static_cast<int32_t>(R::kPositions)) {
    vf x = load(s + v * kW);
    if (shaped) {
      x = t.softcap > 0.0f ? tanh(x * (t.scale / t.softcap)) * (t.softcap * kLog2e) : x * (t.scale * kLog2e);
      if (t.slopes) x = fma(slope, __builtin_convertvector(at - pos, vf), x);
    }
    store(s + v * kW, ((at >= oldest) & (at <= pos)) != 0 ? x : set1(-__builtin_inff()));
  }
}

struct Softened {
  vf maxima, sums;
};

// Scores of the pass from query `first` on become exp(s - maximum). s: [64][room]
template <class R>
inline Softened soften_columns(const AttnTask& t, const Work& w, int64_t tile_begin, int64_t first, float* s) {
  const vi pos = reinterpret_cast<vi>(load_u32(w.pos + first));
  const vi oldest = t.window > 0 ? (pos >= t.window ? pos - (t.window - 1) : vi{}) : vi{};
  const auto begin = static_cast<int32_t>(tile_begin);
  const bool whole = !any((oldest > begin) | (pos < begin + static_cast<int32_t>(kKvTile) - 1));
  const bool shaped = t.slopes || t.softcap > 0.0f;
  if (shaped || !whole) shape_scores<R>(t, w, tile_begin, first, shaped, oldest, s);
  const vf unit = set1(shaped ? 1.0f : t.scale * kLog2e);
  vf most[4] = {load(s), load(s + kW), load(s + 2 * kW), load(s + 3 * kW)};
  for (int64_t v = 4; v < R::kVectors; v += 4)
    for (int64_t i = 0; i < 4; ++i) most[i] = max(load(s + (v + i) * kW), most[i]);
  const vf top = max(R::max_over(max(max(most[0], most[1]), max(most[2], most[3]))) * unit, set1(kNone));
  vf sums[R::kSums] = {};
  for (int64_t v = 0; v < R::kVectors; v += R::kSums) {
    for (int64_t i = 0; i < R::kSums; ++i) {
      const vf p = exp2_fast(fma(load(s + (v + i) * kW), unit, -top));
      store(s + (v + i) * kW, p);
      sums[i] += p;
    }
  }
  return {top * kLn2, R::sum_over(sums)};
}

}  // namespace
}  // namespace fastllm::cpu

#endif

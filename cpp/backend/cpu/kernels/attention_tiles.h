// What the bf16 and the int8 tile path of attention share. Both hold 16 queries in the lanes of a vector:
//
//   s^T [64 positions][16 queries] = k q^T      rows of keys are an A operand as they lie in the cache; q is packed
//   once p [16 queries][64 positions]                its softmax, back in rows out [16 queries][head_dim] = p v values
//   are interleaved, which is what a B operand takes
//
// Tiles 0, 1: C of s^T; 2: A, 3: B. Tiles 4, 5: C of out; 6: A; 7: B. Those of out have as many rows as queries.
#pragma once

#include "backend/cpu/kernels/attention.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

static_assert(kW == 16);
constexpr int64_t kChunk = 16;        // queries of one pass: lanes of a vector, rows of a tile
constexpr int64_t kTileBytes = 1024;  // of a tile of 16 rows

inline int64_t queries_of(const Work& w, int64_t first) {
  return w.queries - first < kChunk ? w.queries - first : kChunk;
}

inline void set_queries(int64_t n) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = static_cast<uint8_t>(i >= 4 && i <= 6 ? n : 16);
    c.bytes_per_row[i] = 64;
  }
  configure(c);
}

// f(first query, queries) for every chunk, the tiles being set for it; begin_tiles() set them for the first.
template <class F>
inline void each_chunk(const Work& w, F&& f) {
  const bool uneven = w.queries > kChunk && w.queries % kChunk != 0;
  for (int64_t i = 0; i < w.queries; i += kChunk) {
    if (uneven) set_queries(queries_of(w, i));
    f(i, queries_of(w, i));
  }
}

// What every path notes about its queries before the first tile. Lanes without a query repeat the last.
inline void begin_queries(const AttnTask& t, const Work& w) {
  set_queries(queries_of(w, 0));
  for (int64_t i = 0; i < round_up(w.queries, kChunk); ++i) {
    const int64_t query = i < w.queries ? i : w.queries - 1;
    w.pos[i] = static_cast<int32_t>(t.first_pos + query / t.group);
    w.slopes[i] = t.slopes ? t.slopes[query % t.group] : 0.0f;
  }
}

// Up to 64 bytes, the rest zero.
inline vf load_bytes(const void* p, int64_t n) {
  const __mmask64 some = n < 64 ? (uint64_t{1} << n) - 1u : ~uint64_t{0};
  return reinterpret_cast<vf>(_mm512_maskz_loadu_epi8(some, p));
}

// The keys of a tile's positions, and those of the next tile of the task. Blocks lie anywhere, so the machine cannot
// guess what comes next: whoever reads a row asks for the row that stands in its place in the next tile.
template <class T>
struct TileRows {
  int64_t begin, valid, row_bytes;
  const T* now[kKvTile];
  const T* next[kKvTile];

  TileRows(const AttnTask& t, int64_t tile)
      : begin(tile * kKvTile), row_bytes(t.head_dim * static_cast<int64_t>(sizeof(T))) {
    const int64_t end = t.first_pos + t.tokens, after = begin + kKvTile;
    valid = end - begin < kKvTile ? end - begin : kKvTile;
    find_keys(t, begin, valid, now);
    int64_t ahead = tile + 1 < t.tile_end ? end - after : 0;
    if (ahead > kKvTile) ahead = kKvTile;
    if (ahead < 0) ahead = 0;
    find_keys(t, after, ahead, next);
    for (int64_t j = ahead; j < kKvTile; ++j) next[j] = now[0];
    if constexpr (__is_same(T, Code)) {
      for (int64_t j = 0; j < ahead; j += t.block_size) {
        const T* scales = key_scales(t, (after + j) / t.block_size);
        __builtin_prefetch(scales);
        __builtin_prefetch(scales + t.kv_stride);
      }
    }
  }
  // offset: 0 for keys, kv_stride for values
  void ask(int64_t j, int64_t offset) const {
    const auto* row = reinterpret_cast<const char*>(next[j] + offset);
    for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
};

// Keys as A operands: where 16 positions begin, and how far apart their rows are.
struct KeyRows {
  const char* at[kKvTile / 16];
  int64_t stride;  // bytes
};

// In the cache itself, where 16 rows lie together and none needs padding.
template <class T>
inline bool keys_in_place(const AttnTask& t, const TileRows<T>& rows) {
  return t.block_size % 16 == 0 && rows.row_bytes % 64 == 0;
}
template <class T>
inline KeyRows rows_in_place(const TileRows<T>& rows) {
  KeyRows k{{}, rows.row_bytes};
  for (int64_t g = 0; g < kKvTile / 16; ++g)
    k.at[g] = reinterpret_cast<const char*>(rows.now[g * 16 < rows.valid ? g * 16 : 0]);
  return k;
}
// Copies, padded with zeros to whole tiles; get(row, byte offset) gives 64 bytes.
template <class T, class F>
inline KeyRows copy_rows(const Work& w, const TileRows<T>& rows, int64_t stride, F&& get) {
  KeyRows k{{}, stride};
  auto* to = reinterpret_cast<char*>(w.keys);
  for (int64_t j = 0; j < kKvTile; ++j) {
    if (j % 16 == 0) k.at[j / 16] = to + j * stride;
    for (int64_t i = 0; i < stride; i += 64)
      store(reinterpret_cast<float*>(to + j * stride + i), get(rows.now[j < rows.valid ? j : 0], i));
  }
  return k;
}

// 2^x to 3e-6 for x <= 0; 0 where that is no normal number.
inline vf exp2_fast(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf clamped = max(set1(-200.0f), x);
  const vf n = (clamped + magic) - magic, r = clamped - n;
  vf p = set1(9.5828510e-3f);
  p = fma(p, r, set1(5.5906426e-2f));
  p = fma(p, r, set1(2.4024099e-1f));
  p = fma(p, r, set1(6.9312420e-1f));
  p = fma(p, r, set1(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Scores of the queries from `first` on become exp(s - maximum); returns the maxima. s: [64][16]
template <class T>
inline vf soften_columns(const AttnTask& t, const Work& w, const TileRows<T>& rows, int64_t first, float* s) {
  constexpr float kLog2e = 1.44269504f;
  const vi pos = reinterpret_cast<vi>(load_u32(w.pos + first));
  const vi oldest = t.window > 0 ? (pos >= t.window ? pos - (t.window - 1) : vi{}) : vi{};
  const vf slope = load(w.slopes + first);
  const auto begin = static_cast<int32_t>(rows.begin);
  const bool whole = !any((oldest > begin) | (pos < begin + static_cast<int32_t>(kKvTile) - 1));
  const bool plain = whole && !t.slopes && !(t.softcap > 0.0f);
  vf m = set1(kNone);
  if (plain) {
    vf raw[4] = {load(s), load(s + kW), load(s + 2 * kW), load(s + 3 * kW)};
    for (int64_t j = 4; j < kKvTile; j += 4)
      for (int64_t i = 0; i < 4; ++i) raw[i] = max(load(s + (j + i) * kW), raw[i]);
    m = max(max(max(raw[0], raw[1]), max(raw[2], raw[3])) * t.scale, m);
  } else {
    for (int32_t j = 0; j < kKvTile; ++j) {
      vf x = load(s + j * kW) * t.scale;
      if (t.softcap > 0.0f) x = t.softcap * tanh(x / t.softcap);
      const vi at = set1(begin + j);
      if (t.slopes) x = fma(slope, __builtin_convertvector(at - pos, vf), x);
      x = ((at >= oldest) & (at <= pos)) != 0 ? x : set1(-__builtin_inff());
      m = max(x, m);
      store(s + j * kW, x);
    }
  }
  // Scaled before anything else, as above: the same bits whether or not a neighbour needs the mask.
  const vf scale = set1(plain ? t.scale : 1.0f), top = -m * kLog2e;
  for (int64_t j = 0; j < kKvTile; ++j) {
    if (first == 0) rows.ask(j, 0);
    store(s + j * kW, exp2_fast(fma(load(s + j * kW) * scale, set1(kLog2e), top)));
  }
  return m;
}

}  // namespace
}  // namespace fastllm::cpu

#endif

// Attention by VDPBF16PS, for bf16 queries and every cache but fp32: s = q k^T and out = p v, the softmax between them
// in fp32 and p rounded to bf16, as on tiles. Codes of an int8 cache are bf16 as they are; the scales of keys are taken
// with the scores, those of values with p. Everything else, and how a task is cut, is in attention.cc.
//
// Operands are keys as [16 positions][dim pairs][16][2] and values as [position pairs][dim][2]: a bf16 cache has them
// so (kernels.h), rows are turned and interleaved first, as many positions of a tile as there are. Cost: head_dim
// products of pairs per query, head and position, where fp32 takes 2 head_dim of numbers.
// Benchmark: fastllm_bench_ops --benchmark_filter=Attention
#include "backend/cpu/kernels/attention_merge.h"
#include "backend/cpu/kernels/attention_reader.h"

#if defined(__AVX512F__) && !defined(__AMX_BF16__)

#include "backend/cpu/kernels/pairs.h"

namespace fastllm::cpu {
namespace {

inline __mmask32 first_lanes(int64_t n) { return n < 32 ? (uint32_t{1} << n) - 1u : ~uint32_t{0}; }

// Up to 32 numbers as bf16, the rest zero.
inline __m512i load_bf16(const uint16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(first_lanes(n), p); }
inline __m512i load_bf16(const Half* p, int64_t n) {
  const __m512i h = _mm512_maskz_loadu_epi16(first_lanes(n), p);
  return narrow_pair(_mm512_cvtph_ps(_mm512_castsi512_si256(h)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1)));
}
inline __m512i load_bf16(const Code* p, int64_t n) {
  const __m256i c = _mm256_maskz_loadu_epi8(first_lanes(n), p);
  return narrow_pair(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(c))),
                     _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(c, 1))));
}

void load_queries(const AttnTask& t, const Work& w, int64_t cols) {
  auto* to = reinterpret_cast<uint16_t*>(w.q);
  for (int64_t i = 0; i < w.queries; ++i, to += cols) {
    __builtin_memcpy(to, query_row<uint16_t>(t, i), static_cast<size_t>(t.head_dim) * 2);
    __builtin_memset(to + t.head_dim, 0, static_cast<size_t>(cols - t.head_dim) * 2);
  }
}

// What the products of one KV tile read.
struct TileOperands {
  const uint16_t* keys[kKvTile / 16];   // [dim pairs][16 positions][2]
  const uint16_t* values[kKvTile / 2];  // [dim][2]
};

// Rows of keys and values into w.keys and w.values.
template <class Kv>
void turn_rows(const AttnTask& t, const Work& w, const TileRows<Kv>& rows, TileOperands* operands) {
  const int64_t cols = round_up(t.head_dim, 32);
  auto *to = reinterpret_cast<uint16_t*>(w.keys), *values = reinterpret_cast<uint16_t*>(w.values);
  for (int64_t j = 0; j < rows.valid; j += 16) {
    operands->keys[j / 16] = to;
    for (int64_t d = 0; d < cols; d += 32, to += 512) {
      vf r[16];
      for (int64_t i = 0; i < 16; ++i)
        r[i] = j + i < rows.valid ? reinterpret_cast<vf>(load_bf16(rows.keys[j + i] + d, t.head_dim - d)) : vf{};
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + i * 32, &r[i], 64);
    }
  }
  // Unpacking works within 128 bits: the eight quads of dims are dealt out so that its halves are 16 dims in order.
  const __m512i deal = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t j = 0; j < rows.valid; j += 2, values += w.dim * 2) {
    operands->values[j / 2] = values;
    for (int64_t d = 0; d < t.head_dim; d += 32) {
      __m512i pair[2];
      for (int64_t i = 0; i < 2; ++i) {
        __m512i v = _mm512_setzero_si512();
        if (j + i < rows.valid) v = load_bf16(rows.keys[j + i] + t.kv_stride + d, t.head_dim - d);
        pair[i] = _mm512_permutexvar_epi64(deal, v);
      }
      _mm512_storeu_si512(values + d * 2, _mm512_unpacklo_epi16(pair[0], pair[1]));
      if (d + 16 < w.dim) _mm512_storeu_si512(values + d * 2 + 32, _mm512_unpackhi_epi16(pair[0], pair[1]));
    }
  }
}

// The same in the cache itself. The value behind the last valid one may be anything, so that pair is copied.
void find_pairs(const AttnTask& t, const Work& w, const TileRows<uint16_t>& rows, TileOperands* operands) {
  for (int64_t j = 0; j < rows.valid; j += 16) {
    operands->keys[j / 16] = rows.keys[j];
    for (int64_t i = 0; i < 8; ++i) operands->values[j / 2 + i] = rows.keys[j] + t.kv_stride + i * t.head_dim * 2;
  }
  if (rows.valid % 2 == 0) return;
  auto* copy = reinterpret_cast<uint16_t*>(w.values);
  const uint16_t*& last = operands->values[rows.valid / 2];
  for (int64_t d = 0; d < t.head_dim; d += 16)
    _mm512_storeu_si512(copy + d * 2, _mm512_maskz_loadu_epi16(0x55555555, last + d * 2));
  last = copy;
}

// The softmax of one query's scores, over the first half of their place.
void soften_row(const AttnTask& t, int64_t query, int64_t begin, float* s, float* maximum, float* total) {
  constexpr int kVecs = kKvTile / kW;
  vf x[kVecs] = {load(s), load(s + kW), load(s + 2 * kW), load(s + 3 * kW)};
  const bool shaped = shape_scores(t, query, begin, x);
  const vf unit = set1(shaped ? kLog2e : t.scale * kLog2e);
  const float top = max_of(max(max(x[0], x[1]), max(max(x[2], x[3]), set1(kNone)))) * unit[0];
  const vu ones = set1(0x3f803f80u);
  vf sums{};
  for (int v = 0; v < kVecs; v += 2) {
    const __m512i p = narrow_pair(exp2_fast(fma(x[v], unit, set1(-top))), exp2_fast(fma(x[v + 1], unit, set1(-top))));
    _mm512_storeu_si512(reinterpret_cast<uint16_t*>(s) + v * kW, p);
    sums = add_pairs(sums, reinterpret_cast<vu>(p), ones);
  }
  *maximum = top * kLn2;
  *total = sum(sums);
}

// The same where keys and values have scales.
void soften_codes(const AttnTask& t, int64_t query, int64_t begin, const float* key_scales, const float* value_scales,
                  float* s, float* maximum, float* total) {
  auto* p = reinterpret_cast<Rounded*>(s);
  for (int64_t j = 0; j < kKvTile; j += kW) store(s + j, load(s + j) * load(key_scales + j));
  soften(t, query, begin, s, s, maximum, total);
  for (int64_t j = 0; j < kKvTile; j += kW) store(p + j, load(s + j) * load(value_scales + j));
}

template <class Kv>
void attend_as(const AttnTask& t, const Work& w) {
  const int64_t cols = round_up(t.head_dim, 32);
  auto* q = reinterpret_cast<uint16_t*>(w.q);
  const auto* p = reinterpret_cast<const uint16_t*>(w.scores);
  load_queries(t, w, cols);
  TileReader<Kv> reader(t);
  attend_tiles(t, w, [&](int64_t tile, float* out) {
    reader.begin(tile);
    const TileRows<Kv>& rows = reader.at(tile);
    const auto ask = reader.successors();
    for (int64_t j = 0; j < kKvTile; ++j) ask(j);
    [[maybe_unused]] float key_scales[kKvTile], value_scales[kKvTile];
    if constexpr (__is_same(Kv, Code)) load_scales(t, rows.begin, rows.valid, key_scales, value_scales);
    TileOperands operands;
    if constexpr (__is_same(Kv, uint16_t)) {
      t.kv_pairs ? find_pairs(t, w, rows, &operands) : turn_rows(t, w, rows, &operands);
    } else {
      turn_rows(t, w, rows, &operands);
    }
    // Scores of positions that are not valid are masked unread.
    small_pair_gemm(
        w.queries, (rows.valid + 15) / 16, cols / 2, q, cols,
        [&](int64_t j, int64_t pair) FASTLLM_INLINE { return operands.keys[j] + pair * 32; }, w.scores, kKvTile);
    float* maxima = out + w.queries * w.dim;
    float* sums = maxima + round_up(w.queries, 16);
    for (int64_t i = 0; i < w.queries; ++i) {
      float* s = w.scores + i * kKvTile;
      if constexpr (__is_same(Kv, Code)) {
        soften_codes(t, i, rows.begin, key_scales, value_scales, s, maxima + i, sums + i);
      } else {
        soften_row(t, i, rows.begin, s, maxima + i, sums + i);
      }
    }
    small_pair_gemm(
        w.queries, w.dim / 16, (rows.valid + 1) / 2, p, kKvTile * 2,
        [&](int64_t j, int64_t pair) FASTLLM_INLINE { return operands.values[pair] + j * 32; }, out, w.dim);
  });
}

void attend_in_pairs(const AttnTask& t, float* scratch) {
  if (!t.bf16 || t.kv_type == KvType::F32) return FASTLLM_ISA::attend(t, scratch);
  const Work w = layout(t, scratch);
  if (t.kv_type == KvType::BF16) return attend_as<uint16_t>(t, w);
  t.kv_type == KvType::F16 ? attend_as<Half>(t, w) : attend_as<Code>(t, w);
}

}  // namespace

void FASTLLM_ISA::fill_attention_pairs(Kernels& t) {
  t.attend = attend_in_pairs;
  t.kv_pairs = true;
}

}  // namespace fastllm::cpu
#endif

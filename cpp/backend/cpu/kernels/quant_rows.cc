// Activations on their way to products with codes: rows of int8 with a step for each part; kernels.h defines them.
//
// A span of a row is worked on at once: its parts' maxima and sums are found side by side, since each alone would wait
// for the one before. Cost: 2 to 4 K bytes read, K written, a row.
#include "backend/cpu/kernels/quant.h"

namespace fastllm::cpu {
namespace {

constexpr int64_t kVectors = kSpan / kW;  // of a span

int64_t prepared_quant_bytes(int64_t k) {
  return kRowBlock / kTileRows * spans_of(k) * static_cast<int64_t>(sizeof(SpanRows));
}

// out[i] = all lanes of v[i] joined by f, which takes vectors or numbers of 32 bits.
#if defined(__AVX512F__)
template <class F>
inline void join_lanes(const __m512i (&v)[4], int32_t (&out)[4], const F& f) {
  const __m512i a = f(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = f(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i four = f(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));  // of each in 128 bits
  const __m512i two = f(four, _mm512_shuffle_i64x2(four, four, 0x4e));
  const __m512i one = f(two, _mm512_shuffle_i64x2(two, two, 0xb1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(one));
}
template <int N>
inline void max_lanes(const vu (&v)[N], int32_t (&out)[4]) {
  const auto at = [&](int i) { return reinterpret_cast<__m512i>(v[i % N]); };
  join_lanes({at(0), at(1), at(2), at(3)}, out, [](__m512i x, __m512i y) { return _mm512_max_epu32(x, y); });
}
template <int N>
inline void sum_lanes(const vi (&v)[N], int32_t (&out)[4]) {
  const auto at = [&](int i) { return reinterpret_cast<__m512i>(v[i % N]); };
  join_lanes({at(0), at(1), at(2), at(3)}, out, [](__m512i x, __m512i y) { return _mm512_add_epi32(x, y); });
}
inline void store_bytes(int8_t* to, const vi (&v)[kVectors]) {
  // Packing works within 128 bits.
  const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto at = [&](int64_t i) { return reinterpret_cast<__m512i>(v[i]); };
  for (int64_t i = 0; i < kVectors; i += 4) {
    const __m512i low = _mm512_packs_epi32(at(i), at(i + 1)), high = _mm512_packs_epi32(at(i + 2), at(i + 3));
    _mm512_storeu_si512(to + i * kW, _mm512_permutexvar_epi32(deal, _mm512_packs_epi16(low, high)));
  }
}
#else
template <int N>
inline void max_lanes(const vu (&v)[N], int32_t (&out)[4]) {
  for (int i = 0; i < N; ++i) {
    uint32_t most = 0;
    for (int lane = 0; lane < kW; ++lane) most = v[i][lane] > most ? v[i][lane] : most;
    out[i] = static_cast<int32_t>(most);
  }
}
template <int N>
inline void sum_lanes(const vi (&v)[N], int32_t (&out)[4]) {
  for (int i = 0; i < N; ++i) {
    uint32_t sum = 0;
    for (int lane = 0; lane < kW; ++lane) sum += static_cast<uint32_t>(v[i][lane]);
    out[i] = static_cast<int32_t>(sum);
  }
}
inline void store_bytes(int8_t* to, const vi (&v)[kVectors]) {
  for (int64_t i = 0; i < kVectors; ++i) {
#if defined(__AVX2__)
    const auto h = reinterpret_cast<__m256i>(v[i]);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i * kW), _mm_packs_epi16(words, words));
#else
    for (int lane = 0; lane < kW; ++lane) to[i * kW + lane] = static_cast<int8_t>(v[i][lane]);
#endif
  }
}
#endif

// Rounds a span of x, of which `n` exist, to row r of `to`, by parts of kPart.
template <int64_t kPart, class T>
inline void prepare_span(const QuantRows& rows, const T* x, int64_t n, int64_t r, SpanRows& to) {
  constexpr int kParts = static_cast<int>(kSpan / kPart);
  constexpr int64_t kOfPart = kPart / kW;
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf v[kVectors];
  vu most[kParts]{};
  for (int64_t i = 0; i < kVectors; ++i) {
    const int64_t left = n - i * kW;
    v[i] = left >= kW ? load(x + i * kW) : left > 0 ? load(x + i * kW, left) : vf{};
    const vu magnitude = as_bits(v[i]) & 0x7fffffffu;  // orders like |x|, NaN above all
    vu& so_far = most[i / kOfPart];
    so_far = magnitude > so_far ? magnitude : so_far;
  }
  int32_t maxima[4], totals[4];
  max_lanes(most, maxima);
  float inverse[kParts];
  for (int part = 0; part < kParts; ++part) {
    float absmax;
    __builtin_memcpy(&absmax, &maxima[part], 4);
    inverse[part] = absmax > 1e-36f ? 127.0f / absmax : 0.0f;
    to.steps[part][r] = absmax / 127.0f;
  }
  vi codes[kVectors], sums[kParts]{};
  for (int64_t i = 0; i < kVectors; ++i) {
    codes[i] = reinterpret_cast<vi>(as_bits(fused(v[i], set1(inverse[i / kOfPart]), magic)) - as_bits(magic));
    sums[i / kOfPart] += codes[i];
  }
  store_bytes(to.codes[r], codes);
  sum_lanes(sums, totals);  // without meaning, and beyond 32 bits, where the row is not finite; its steps say so
  for (int part = 0; part < kParts; ++part) {
    if (rows.offsets) {
      to.sums[part][r] = static_cast<float>(totals[part]);
    } else {
      to.starts[part][r] =
          static_cast<int32_t>(static_cast<uint32_t>(-rows.zero) * static_cast<uint32_t>(totals[part]));
    }
  }
}

template <int64_t kPart, class T>
void prepare_rows(const QuantRows& rows, int64_t begin, int64_t end, SpanRows* prepared) {
  const int64_t spans = spans_of(rows.k);
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(rows.x) + m * rows.ldx;
    SpanRows* to = prepared + m / kTileRows * spans;
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t first = s * kSpan, n = rows.k - first < kSpan ? rows.k - first : kSpan;
      if (rows.order) {
        T sorted[kSpan];
        for (int64_t i = 0; i < n; ++i) sorted[i] = x[rows.order[first + i]];
        prepare_span<kPart>(rows, sorted, n, m % kTileRows, to[s]);
      } else {
        prepare_span<kPart>(rows, x + first, n, m % kTileRows, to[s]);
      }
    }
  }
  if (end % kTileRows == 0) return;
  SpanRows* last = prepared + end / kTileRows * spans;
  const int64_t r = end % kTileRows;
  const auto bytes = static_cast<size_t>(kTileRows - r) * sizeof(float);
  for (SpanRows* to = last; to < last + spans; ++to) {
    for (auto& steps : to->steps) __builtin_memset(steps + r, 0, bytes);
    for (auto& starts : to->starts) __builtin_memset(starts + r, 0, bytes);  // the bits of 0.0f too
  }
}

void prepare_quant(const QuantRows& rows, int64_t begin, int64_t end, void* prepared) {
  const bool small = quant_part(rows.group) == 32;
  const auto prepare = rows.x_bf16 ? (small ? prepare_rows<32, uint16_t> : prepare_rows<64, uint16_t>)
                                   : (small ? prepare_rows<32, float> : prepare_rows<64, float>);
  prepare(rows, begin, end, static_cast<SpanRows*>(prepared));
}

}  // namespace

void FASTLLM_ISA::fill_quant_rows(Kernels& t) {
  t.prepared_quant_bytes = prepared_quant_bytes;
  t.prepare_quant = prepare_quant;
}

}  // namespace fastllm::cpu

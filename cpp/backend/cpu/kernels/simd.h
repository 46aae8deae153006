// Vectors of kW floats as the compiler's own vector types, so one source serves every instruction set. Internal linkage
// throughout: see kernels.h.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "backend/cpu/kernels.h"

namespace fastllm::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kW = 16;
#elif defined(__AVX2__)
constexpr int kW = 8;
#else
constexpr int kW = 4;
#endif

typedef float vf __attribute__((vector_size(kW * 4)));
typedef int32_t vi __attribute__((vector_size(kW * 4)));
typedef uint32_t vu __attribute__((vector_size(kW * 4)));
typedef uint16_t vh __attribute__((vector_size(kW * 2)));

inline vf set1(float x) { return x - vf{}; }
inline vi set1(int32_t x) { return x - vi{}; }
inline vu set1(uint32_t x) { return x - vu{}; }
inline vf as_float(vu x) { return reinterpret_cast<vf>(x); }
inline vu as_bits(vf x) { return reinterpret_cast<vu>(x); }

inline vi iota() {
  vi v{};
  for (int i = 0; i < kW; ++i) v[i] = i;
  return v;
}

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline vf max(vf a, vf b) {  // b where either is NaN
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline vf min(vf a, vf b) {  // b where either is NaN
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
inline vf reciprocal(vf x) {  // to 1 ulp, for 0 < |x| < 2^126
#if defined(__AVX512F__)
  const vf r = _mm512_rcp14_ps(x);  // 14 bits, and twice that after one Newton step: a fifth of a division's time
  return fma(fma(-x, r, set1(1.0f)), r, r);
#else
  return 1.0f / x;
#endif
}

inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vu load_u32(const void* p) {
  vu v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vf widen(vh h) {  // spelled out: GCC 12 converts halves of the vector one by one
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)), 16));
#else
  return as_float(__builtin_convertvector(h, vu) << 16);
#endif
}
inline vf load(const uint16_t* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}
inline vh narrow(vf x) {  // to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(x));
#else
  const vu u = as_bits(x);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu bits = (x == x) ? rounded : ((u >> 16) | 0x40u);
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, vh);
#endif
#endif
}
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(uint16_t* p, vf v) {
  const vh h = narrow(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n < kW elements; the rest are zero, or not written.
inline vf load(const float* p, int64_t n) {
  vf v{};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * 4);
  return v;
}
inline vf load(const uint16_t* p, int64_t n) {
  vh h{};
  __builtin_memcpy(&h, p, static_cast<size_t>(n) * 2);
  return widen(h);
}
inline void store(float* p, vf v, int64_t n) { __builtin_memcpy(p, &v, static_cast<size_t>(n) * 4); }
inline void store(uint16_t* p, vf v, int64_t n) {
  const vh h = narrow(v);
  __builtin_memcpy(p, &h, static_cast<size_t>(n) * 2);
}

// f(i, lanes): i runs over [0, n) in steps of kW; lanes = kW but for the tail.
template <class F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) f(i, kW);
  if (i < n) f(i, n - i);
}
template <class T>
inline vf load_some(const T* p, int64_t lanes) {
  return lanes == kW ? load(p) : load(p, lanes);
}
template <class T>
inline void store_some(T* p, vf v, int64_t lanes) {
  if (lanes == kW) {
    store(p, v);
  } else {
    store(p, v, lanes);
  }
}

// All lanes in one, by halves: 0 with kW / 2, 1 with kW / 2 + 1, ... then the first half of those.
template <class F>
inline float fold(vf v, F&& f) {
#if defined(__AVX512F__)
  v = f(v, vf(_mm512_shuffle_f32x4(v, v, 0x4e)));
  v = f(v, vf(_mm512_shuffle_f32x4(v, v, 0xb1)));
  v = f(v, vf(_mm512_permute_ps(v, 0x4e)));
  return f(v, vf(_mm512_permute_ps(v, 0xb1)))[0];
#elif defined(__AVX2__)
  v = f(v, vf(_mm256_permute2f128_ps(v, v, 1)));
  v = f(v, vf(_mm256_permute_ps(v, 0x4e)));
  return f(v, vf(_mm256_permute_ps(v, 0xb1)))[0];
#else
  const vf w = f(v, vf{v[2], v[3], v[0], v[1]});
  return f(w, vf{w[1], w[0], w[3], w[2]})[0];
#endif
}
inline float sum(vf v) {
  return fold(v, [](vf a, vf b) { return a + b; });
}
inline float max_of(vf v) {
  return fold(v, [](vf a, vf b) { return max(a, b); });
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

// Whether any lane of a comparison holds.
inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t hit = 0;
  for (int i = 0; i < kW; ++i) hit |= mask[i];
  return hit != 0;
#endif
}

// e^x to 2 ulp; 0 below -87, and exactly 1 at 0.
inline vf exp(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf clamped = min(max(x, set1(-87.0f)), set1(88.0f));
  const vf n = fma(clamped, set1(1.44269504f), magic) - magic;
  vf r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
  const vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  const vf y = p * reinterpret_cast<vf>(e);
  return x < -87.0f ? vf{} : y;
}

#if defined(__AVX512F__)
// 2^x to 3e-6 for x <= 0; 0 where that is next to no normal number.
inline vf exp2_fast(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the last bits
  const vf shifted = x + magic, r = x - (shifted - magic);
  vf p = set1(9.5828510e-3f);
  p = fma(p, r, set1(5.5906426e-2f));
  p = fma(p, r, set1(2.4024099e-1f));
  p = fma(p, r, set1(6.9312420e-1f));
  p = fma(p, r, set1(1.0f));
  // The exponent by hand: scalef takes as long as all of the above.
  const __m512i exponent = _mm512_slli_epi32(reinterpret_cast<__m512i>(shifted), 23);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-125.0f), _CMP_NLT_UQ);
  return reinterpret_cast<vf>(_mm512_maskz_add_epi32(normal, reinterpret_cast<__m512i>(p), exponent));
}
#endif

// ln x for normal x > 0.
inline vf log(vf x) {
  const vu u = as_bits(x);
  // mantissa in [sqrt(1/2), sqrt(2))
  const vi shifted = reinterpret_cast<vi>(u - 0x3f3504f3u);
  const vf e = __builtin_convertvector(shifted >> 23, vf);
  const vf m = as_float(reinterpret_cast<vu>(shifted & 0x007fffff) + 0x3f3504f3u) - 1.0f;
  vf p = set1(7.0376836292e-2f);
  p = fma(p, m, set1(-1.1514610310e-1f));
  p = fma(p, m, set1(1.1676998740e-1f));
  p = fma(p, m, set1(-1.2420140846e-1f));
  p = fma(p, m, set1(1.4249322787e-1f));
  p = fma(p, m, set1(-1.6668057665e-1f));
  p = fma(p, m, set1(2.0000714765e-1f));
  p = fma(p, m, set1(-2.4999993993e-1f));
  p = fma(p, m, set1(3.3333331174e-1f));
  const vf z = m * m;
  vf y = p * m * z;
  y = fma(e, set1(-2.12194440e-4f), y);
  y = fma(z, set1(-0.5f), y);
  return fma(e, set1(0.693359375f), m + y);
}

inline vf tanh(vf x) {  // 1 - 2 / (e^2x + 1), by its Taylor polynomial where that cancels
  const vf z = x * x;
  const vf small = fma(x * z, fma(z, set1(2.0f / 15.0f), set1(-1.0f / 3.0f)), x);
  const vf big = 1.0f - 2.0f * reciprocal(exp(min(2.0f * x, set1(80.0f))) + 1.0f);
  return (z < 0.0025f) ? small : big;
}

}  // namespace
}  // namespace fastllm::cpu

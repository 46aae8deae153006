// The element types that a cache may have and the others do not: halves, and codes of eight bits.
#pragma once

#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

struct Half {
  uint16_t bits;  // IEEE half precision
};
struct Code {
  int8_t value;  // of an int8 cache; times the scale of its position
};
typedef int8_t vc __attribute__((vector_size(kW)));

inline vf abs(vf x) { return as_float(as_bits(x) & 0x7fffffffu); }

inline vf widen_half(vh h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  // The exponent is moved up by a multiplication, which normalises subnormal values; infinities and NaN go around it.
  const vu u = __builtin_convertvector(h, vu), magnitude = u & 0x7fffu;
  const vf finite = as_float(magnitude << 13) * 0x1p112f;
  const vu bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : as_bits(finite);
  return as_float(bits | ((u & 0x8000u) << 16));
#endif
}
inline vh narrow_half(vf x) {  // to nearest even; infinite past 65504; NaN stays NaN
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<vh>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const vu u = as_bits(x), magnitude = u & 0x7fffffffu;
  // Below 2^-14: a multiple of 2^-24, which is the last bit of 0.5.
  const vu small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  vu half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? vu{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? vu{} + 0x7e00u : half;
  return __builtin_convertvector(half | ((u >> 16) & 0x8000u), vh);
#endif
}

inline vf load(const Half* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_half(h);
}
inline vf load(const Half* p, int64_t n) {
  vh h{};
  __builtin_memcpy(&h, p, static_cast<size_t>(n) * 2);
  return widen_half(h);
}
inline void store(Half* p, vf v) {
  const vh h = narrow_half(v);
  __builtin_memcpy(p, &h, sizeof h);
}
inline void store(Half* p, vf v, int64_t n) {
  const vh h = narrow_half(v);
  __builtin_memcpy(p, &h, static_cast<size_t>(n) * 2);
}

inline vf load(const Code* p) {
  vc c;
  __builtin_memcpy(&c, p, sizeof c);
  return __builtin_convertvector(c, vf);
}
inline vf load(const Code* p, int64_t n) {
  vc c{};
  __builtin_memcpy(&c, p, static_cast<size_t>(n));
  return __builtin_convertvector(c, vf);
}
// To the nearest whole numbers, even ones on ties. |x| < 128
inline vi to_nearest(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return __builtin_convertvector((x + magic) - magic, vi);
}
inline void store_codes(Code* p, vf v, int64_t n) {
  const vc c = __builtin_convertvector(to_nearest(v), vc);
  __builtin_memcpy(p, &c, static_cast<size_t>(n));
}

// f(T{}) with the element type T of a cache.
template <class F>
inline void with_kv_type(KvType type, F&& f) {
  switch (type) {
    case KvType::F32:
      return f(float{});
    case KvType::BF16:
      return f(uint16_t{});
    case KvType::F16:
      return f(Half{});
    case KvType::I8:
      return f(Code{});
  }
}

}  // namespace
}  // namespace fastllm::cpu

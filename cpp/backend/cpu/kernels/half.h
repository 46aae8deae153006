// IEEE half precision to fp32 and back, a vector at a time.
#pragma once

#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

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

inline vf load_half(const uint16_t* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_half(h);
}

}  // namespace
}  // namespace fastllm::cpu

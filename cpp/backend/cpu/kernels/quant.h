// Activations as int8 rows, and the blocks of grouped weights they meet.
#pragma once

#include "backend/cpu/kernels/gemm.h"
#include "backend/cpu/kernels/half.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastllm::cpu {

namespace FASTLLM_ISA {
// gemm_quant() for few rows, with the dot products of bytes that has_byte_dot() promises. AMX level only.
void multiply_rows(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
}  // namespace FASTLLM_ISA

namespace {

#if defined(__AVX2__)
// A bit of leaf 7 of CPUID. reg: 0 for EAX ... 3 for EDX
inline bool cpu_has(unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1u) != 0;
}

// Whether this machine has VPDPBUSD for the vectors of this level: AVX512_VNNI or AVX_VNNI.
inline bool has_byte_dot() {
#if defined(__AVX512F__)
  return cpu_has(0, 2, 11);
#else
  return cpu_has(1, 0, 4);
#endif
}
#endif

constexpr int64_t kTileRows = 16;

inline int64_t groups_of(const QuantArgs& g) { return (g.k + g.group - 1) / g.group; }
inline int64_t spans_of(int64_t k) { return (k + kSpan - 1) / kSpan; }

// Sixteen prepared rows of one span; the spans of 16 rows follow each other. Rows that do not exist have codes without
// meaning, but steps and sums of 0.
struct alignas(64) SpanRows {
  int8_t codes[kTileRows][kSpan];          // xq
  float steps[kSpan / kGroup][kTileRows];  // xs of each part
  union {
    int32_t starts[kSpan / kGroup][kTileRows];  // symmetric weights: -zero * s, what isum starts from
    float sums[kSpan / kGroup][kTileRows];      // weights with offsets: s
  };
};

// The first span of the 16 rows that row m is one of.
inline const SpanRows* rows_of(const QuantArgs& g, int64_t m) {
  return static_cast<const SpanRows*>(g.a) + m / kTileRows * spans_of(g.k);
}

// One rounding everywhere, also where the machine has no such instruction.
inline vf fused(vf a, vf b, vf c) {
#if defined(__FMA__)
  return fma(a, b, c);
#else
  for (int i = 0; i < kW; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

}  // namespace
}  // namespace fastllm::cpu

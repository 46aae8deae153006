// VDPBF16PS: to each lane's sum, the products of two neighbouring bf16. Spelled out: most machines of the AVX-512 level
// lack it, and the others are told apart at run time.
#pragma once

#include "backend/cpu/kernels/micro.h"

#if defined(__AVX512F__)

namespace fastllm::cpu {
namespace {

// A sum goes in and out by value: as a place to write to it would have to be in memory.
inline vf add_pairs(vf sum, vu w, vu x) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// The same with a pair in memory that all lanes share.
typedef uint32_t __attribute__((may_alias)) Pair;
inline vf add_pairs(vf sum, vu w, const Pair* x) {
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
  return sum;
}

// bf16 of the numbers of two vectors, to nearest even; subnormal ones become zero.
inline __m512i narrow_pair(__m512 low, __m512 high) {
  __m512i both;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  return both;
}

// A bf16 that is rounded by the machine's own instruction.
struct Rounded {
  uint16_t bits;
};
inline vf load(const Rounded* p) { return load(&p->bits); }
inline void store(Rounded* p, vf x) {
  __m256i half;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

// a: [R, 2 pairs], lda elements apart; b: [pairs, V * kW, 2], ldb elements apart.
template <int R, int V>
FASTLLM_INLINE inline Acc<R, V> micro_pairs(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb,
                                            int64_t pairs) {
  Acc<R, V> c{};
  for (int64_t p = 0; p < pairs; ++p, a += 2, b += ldb) {
    vu w[V];
    for (int v = 0; v < V; ++v) w[v] = load_u32(b + v * kW * 2);
    for (int r = 0; r < R; ++r) {
      uint32_t both;
      __builtin_memcpy(&both, a + r * lda, 4);
      const vu x = set1(both);
      for (int v = 0; v < V; ++v) c.v[r][v] = add_pairs(c.v[r][v], w[v], x);
    }
  }
  return c;
}

// c[m, n] = a[m, 2 pairs] b[pairs, n, 2] into fp32; n: multiple of 16. An output's products are added in ascending
// order.
inline void small_pair_gemm(int64_t m, int64_t n, int64_t pairs, const uint16_t* a, int64_t lda, const uint16_t* b,
                            float* c, int64_t ldc) {
  const auto columns = [&]<int V>(Rows<V>, int64_t j) {
    constexpr int kRows = 24 / V < 8 ? 24 / V : 8;
    for (int64_t i = 0; i < m; i += kRows) {
      with_rows<kRows>(m - i, [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        const auto sum = micro_pairs<R, V>(a + i * lda, lda, b + j * 2, n * 2, pairs);
        each<R>([&](auto r) FASTLLM_INLINE {
          each<V>([&](auto v)
                      FASTLLM_INLINE { store(c + (i + r.value) * ldc + j + v.value * kW, sum.v[r.value][v.value]); });
        });
      });
    }
  };
  int64_t j = 0;
  for (; j + 64 <= n; j += 64) columns(Rows<4>{}, j);
  for (; j < n; j += 16) columns(Rows<1>{}, j);
}

}  // namespace
}  // namespace fastllm::cpu

#endif

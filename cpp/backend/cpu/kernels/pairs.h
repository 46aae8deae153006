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

// Zeros one by one: all at once they would be written to memory first.
template <int R, int V>
FASTLLM_INLINE inline Acc<R, V> no_sums() {
  Acc<R, V> c;
  each<R>([&](auto r) FASTLLM_INLINE { each<V>([&](auto v) FASTLLM_INLINE { c.v[r.value][v.value] = vf{}; }); });
  return c;
}

// a: [R, 2 pairs], lda elements apart. line(v, p): pairs p of 16 columns, for v < V.
template <int R, int V, class Line>
FASTLLM_INLINE inline Acc<R, V> micro_pairs(const uint16_t* a, int64_t lda, int64_t pairs, Line&& line) {
  auto c = no_sums<R, V>();
  for (int64_t p = 0; p < pairs; ++p, a += 2) {
    vu w[V];
    for (int v = 0; v < V; ++v) w[v] = load_u32(line(v, p));
    for (int r = 0; r < R; ++r) {
      uint32_t both;
      __builtin_memcpy(&both, a + r * lda, 4);
      const vu x = set1(both);
      for (int v = 0; v < V; ++v) c.v[r][v] = add_pairs(c.v[r][v], w[v], x);
    }
  }
  return c;
}

// c[m, 16 columns] = a[m, 2 pairs] b into fp32; line(j, p): pairs p of b's columns 16 j and on. An output's products
// are added in ascending order.
template <class Line>
FASTLLM_INLINE inline void small_pair_gemm(int64_t m, int64_t columns, int64_t pairs, const uint16_t* a, int64_t lda,
                                           Line&& line, float* c, int64_t ldc) {
  const auto some = [&]<int V>(Rows<V>, int64_t j) {
    constexpr int kRows = 24 / V < 8 ? 24 / V : 8;
    for (int64_t i = 0; i < m; i += kRows) {
      with_rows<kRows>(m - i, [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        const auto sum = micro_pairs<R, V>(a + i * lda, lda, pairs,
                                           [&](int64_t v, int64_t p) FASTLLM_INLINE { return line(j + v, p); });
        each<R>([&](auto r) FASTLLM_INLINE {
          each<V>([&](auto v)
                      FASTLLM_INLINE { store(c + (i + r.value) * ldc + (j + v.value) * kW, sum.v[r.value][v.value]); });
        });
      });
    }
  };
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4) some(Rows<4>{}, j);
  for (; j + 2 <= columns; j += 2) some(Rows<2>{}, j);
  if (j < columns) some(Rows<1>{}, j);
}

}  // namespace
}  // namespace fastllm::cpu

#endif

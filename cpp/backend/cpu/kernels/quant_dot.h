// Sums of four products of bytes: lane c of a vector of sums gets sum_i codes[c][i] * x[i], i < 4, exactly.
//
// Each way of doing it has: kOneInstruction; Few, the way for a few rows; kTogether, vectors of columns that share an
// operand; Sum, what eight quads of a column are added up in; X, four activations as an operand, which operand<kAt>()
// makes of those kAt bytes behind an address; add(); and start() and end(), which take 32-bit sums over and give them
// back. Codes of 4 bits leave room that those of 8 bits do not.
#pragma once

#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

#if defined(__AVX2__)

#if defined(__AVX512F__)
typedef __m512i Bytes;
inline Bytes madd16(Bytes a, Bytes b) { return _mm512_madd_epi16(a, b); }
inline Bytes maddubs(Bytes a, Bytes b) { return _mm512_maddubs_epi16(a, b); }
inline Bytes add16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline Bytes shift_right16(Bytes a) { return _mm512_srli_epi16(a, 8); }
inline Bytes sign_right16(Bytes a) { return _mm512_srai_epi16(a, 8); }
inline Bytes shift_left16(Bytes a) { return _mm512_slli_epi16(a, 8); }
#define FASTLLM_VPDPBUSD "vpdpbusd"
#else
typedef __m256i Bytes;
inline Bytes madd16(Bytes a, Bytes b) { return _mm256_madd_epi16(a, b); }
inline Bytes maddubs(Bytes a, Bytes b) { return _mm256_maddubs_epi16(a, b); }
inline Bytes add16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes shift_right16(Bytes a) { return _mm256_srli_epi16(a, 8); }
inline Bytes sign_right16(Bytes a) { return _mm256_srai_epi16(a, 8); }
inline Bytes shift_left16(Bytes a) { return _mm256_slli_epi16(a, 8); }
#define FASTLLM_VPDPBUSD "%{vex%} vpdpbusd"
#endif

inline vi quad(const int8_t* x) {
  int32_t q;
  __builtin_memcpy(&q, x, 4);
  return set1(q);
}
inline vi as_int(Bytes b) { return reinterpret_cast<vi>(b); }
inline Bytes as_bytes(vi v) { return reinterpret_cast<Bytes>(v); }
inline Bytes as_bytes(vu v) { return reinterpret_cast<Bytes>(v); }

// The instruction is spelled out: some machines of this level lack it, and the others are told apart at run time.
struct ByteDot {
  static constexpr bool kOneInstruction = true;
  static constexpr int kTogether = 2;
  typedef vi Sum;
  template <int kAt>
  static vi operand(const int8_t* x) {
    return quad(x + kAt);
  }
  static void add(Sum& sum, vu codes, vi x) {
    __asm__(FASTLLM_VPDPBUSD " %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  }
  static void start(Sum& sum, vi isum) { sum = isum; }
  static void end(vi& isum, Sum sum) { isum = sum; }
#if !defined(__AVX512F__)
  typedef ByteDot Few;
#else
  // For a few rows, which wait for weights from memory. It gives them at its full rate in the order of addresses only,
  // so vectors are taken one by one; four bytes in memory stand for all lanes, so they need not share what is
  // broadcast. Memory is not named as an operand: GCC would keep the sums there too.
  struct Few {
    static constexpr bool kOneInstruction = true;
    static constexpr int kTogether = 1;
    struct Sum {
      vi even, odd;  // quads, so that half as many additions wait for each other
    };
    template <int kAt>
    struct X {
      const int8_t* x;
    };
    template <int kAt>
    static X<kAt> operand(const int8_t* x) {
      return {x};
    }
    template <int kAt>
    static void add(Sum& sum, vu codes, X<kAt> x) {
      __asm__(FASTLLM_VPDPBUSD " %c3(%2)%{1to16%}, %1, %0"
              : "+v"(kAt % 8 == 0 ? sum.even : sum.odd)
              : "v"(codes), "r"(x.x), "i"(kAt));
    }
    static void start(Sum& sum, vi isum) { sum = {isum, vi{}}; }
    static void end(vi& isum, Sum sum) { isum = sum.even + sum.odd; }
  };
#endif
};
#undef FASTLLM_VPDPBUSD

template <int kBits>
struct PlainDot;

// Products of codes up to 255 overflow sums of 16 bits, so both factors are widened first.
template <>
struct PlainDot<8> {
  typedef PlainDot Few;
  static constexpr bool kOneInstruction = false;
  static constexpr int kTogether = 2;
  typedef vi Sum;
  struct X {
    Bytes even, odd;
  };
  template <int kAt>
  static X operand(const int8_t* x) {
    const Bytes q = as_bytes(quad(x + kAt));
    return {sign_right16(shift_left16(q)), sign_right16(q)};
  }
  static void add(Sum& sum, vu codes, const X& x) {
    sum += as_int(madd16(as_bytes(codes & 0x00ff00ffu), x.even));
    sum += as_int(madd16(shift_right16(as_bytes(codes)), x.odd));
  }
  static void start(Sum& sum, vi isum) { sum = isum; }
  static void end(vi& isum, Sum sum) { isum = sum; }
};

// Eight quads add up to at most 8 * 2 * 15 * 127 = 30480 in each half.
template <>
struct PlainDot<4> {
  typedef PlainDot Few;
  static constexpr bool kOneInstruction = false;
  static constexpr int kTogether = 2;
  typedef Bytes Sum;
  typedef Bytes X;
  template <int kAt>
  static X operand(const int8_t* x) {
    return as_bytes(quad(x + kAt));
  }
  static void add(Sum& sum, vu codes, X x) { sum = add16(sum, maddubs(as_bytes(codes), x)); }
  static void start(Sum& sum, vi) { sum = Sum{}; }
  static void end(vi& isum, Sum sum) { isum += as_int(madd16(sum, as_bytes(set1(0x00010001)))); }
};

#else

template <int>
struct PlainDot {
  typedef PlainDot Few;
  static constexpr bool kOneInstruction = false;
  static constexpr int kTogether = 2;
  typedef vi Sum;
  struct X {
    int32_t v[4];
  };
  template <int kAt>
  static X operand(const int8_t* x) {
    return {{x[kAt], x[kAt + 1], x[kAt + 2], x[kAt + 3]}};
  }
  static void add(Sum& sum, vu codes, const X& x) {
    for (int i = 0; i < 4; ++i) sum += reinterpret_cast<vi>((codes >> (8 * i)) & 255u) * x.v[i];
  }
  static void start(Sum& sum, vi isum) { sum = isum; }
  static void end(vi& isum, Sum sum) { isum = sum; }
};

#endif

}  // namespace
}  // namespace fastllm::cpu

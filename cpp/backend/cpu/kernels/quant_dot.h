// Sums of four products of bytes: lane c of a vector of sums gets sum_i codes[c][i] * x[i], i < 4, exactly.
//
// Each way of doing it has: kOneInstruction; kTogether, vectors of columns that share an
// operand; Sum, what eight quads of a column are added up in; X, four activations as an operand; add() of the first or
// the second quad of a pair; and start() and end(), which take 32-bit sums over and give them back. Codes of 4 bits
// leave room that those of 8 bits do not.
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
#if defined(__AVX512F__)
  // Four bytes in memory stand for all lanes, so vectors need not share what is broadcast: they are taken one by one,
  // which is the order of addresses, the one in which memory gives weights at its full rate on every machine.
  static constexpr int kTogether = 1;
  struct Sum {
    vi quads[2];  // half as many additions wait for each other
  };
  typedef uint32_t __attribute__((may_alias)) Four;
  typedef const Four* X;
  static X operand(const int8_t* x) { return reinterpret_cast<X>(x); }
  template <class Quad>
  static void add(Sum& sum, vu codes, X x, Quad) {
    vi s = sum.quads[Quad::value];  // by value: a place to write to would have to be in memory
    __asm__(FASTLLM_VPDPBUSD " %2%{1to16%}, %1, %0" : "+v"(s) : "v"(codes), "m"(*x));
    sum.quads[Quad::value] = s;
  }
  static void start(Sum& sum, vi isum) { sum = {{isum, vi{}}}; }
  static void end(vi& isum, Sum sum) { isum = sum.quads[0] + sum.quads[1]; }
#else
  static constexpr int kTogether = 2;
  typedef vi Sum;
  typedef vi X;
  static X operand(const int8_t* x) { return quad(x); }
  template <class Quad>
  static void add(Sum& sum, vu codes, X x, Quad) {
    __asm__(FASTLLM_VPDPBUSD " %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  }
  static void start(Sum& sum, vi isum) { sum = isum; }
  static void end(vi& isum, Sum sum) { isum = sum; }
#endif
};
#undef FASTLLM_VPDPBUSD

template <int kBits>
struct PlainDot;

// Products of codes up to 255 overflow sums of 16 bits, so both factors are widened first.
template <>
struct PlainDot<8> {
  static constexpr bool kOneInstruction = false;
  static constexpr int kTogether = 2;
  typedef vi Sum;
  struct X {
    Bytes even, odd;
  };
  static X operand(const int8_t* x) {
    const Bytes q = as_bytes(quad(x));
    return {sign_right16(shift_left16(q)), sign_right16(q)};
  }
  template <class Quad>
  static void add(Sum& sum, vu codes, const X& x, Quad) {
    sum += as_int(madd16(as_bytes(codes & 0x00ff00ffu), x.even));
    sum += as_int(madd16(shift_right16(as_bytes(codes)), x.odd));
  }
  static void start(Sum& sum, vi isum) { sum = isum; }
  static void end(vi& isum, Sum sum) { isum = sum; }
};

// Eight quads add up to at most 8 * 2 * 15 * 127 = 30480 in each half.
template <>
struct PlainDot<4> {
  static constexpr bool kOneInstruction = false;
  static constexpr int kTogether = 2;
  typedef Bytes Sum;
  typedef Bytes X;
  static X operand(const int8_t* x) { return as_bytes(quad(x)); }
  template <class Quad>
  static void add(Sum& sum, vu codes, X x, Quad) {
    sum = add16(sum, maddubs(as_bytes(codes), x));
  }
  static void start(Sum& sum, vi) { sum = Sum{}; }
  static void end(vi& isum, Sum sum) { isum += as_int(madd16(sum, as_bytes(set1(0x00010001)))); }
};

#else

template <int>
struct PlainDot {
  static constexpr bool kOneInstruction = false;
  static constexpr int kTogether = 2;
  typedef vi Sum;
  struct X {
    int32_t v[4];
  };
  static X operand(const int8_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
  template <class Quad>
  static void add(Sum& sum, vu codes, const X& x, Quad) {
    for (int i = 0; i < 4; ++i) sum += reinterpret_cast<vi>((codes >> (8 * i)) & 255u) * x.v[i];
  }
  static void start(Sum& sum, vi isum) { sum = isum; }
  static void end(vi& isum, Sum sum) { isum = sum; }
};

#endif

}  // namespace
}  // namespace fastllm::cpu

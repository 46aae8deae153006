// The element types that a cache may have and the others do not: halves, and codes of eight bits.
#pragma once

#include "backend/cpu/kernels/half.h"

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

inline vf load(const Half* p) { return load_half(&p->bits); }
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

// Reading the fields of GGUF blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tensor/dtype.h"

namespace fastllm {

inline std::uint16_t load16(const std::byte* p) {
  std::uint16_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline std::uint32_t load32(const std::byte* p) {
  std::uint32_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline float load_half(const std::byte* p) { return to_float(f16{load16(p)}); }

inline int u8(const std::byte* p, int i) { return std::to_integer<int>(p[i]); }
inline int i8(const std::byte* p, int i) { return static_cast<std::int8_t>(p[i]); }

// Q4_K and Q5_K: blocks of 256 in 8 groups of 32, each with a 6-bit scale and a 6-bit minimum packed into 12 bytes `s`:
//   groups 0..3: the low 6 bits of s[g] and s[g + 4]
//   groups 4..7: 4 bits each in s[g + 4], the top 2 bits those of s[g - 4] and s[g]
struct GroupScale {
  float scale, minimum;
};

inline GroupScale group_scale(const std::byte* s, int g) {
  if (g < 4) return {static_cast<float>(u8(s, g) & 63), static_cast<float>(u8(s, g + 4) & 63)};
  return {static_cast<float>((u8(s, g + 4) & 15) | (u8(s, g - 4) >> 6) << 4),
          static_cast<float>((u8(s, g + 4) >> 4) | (u8(s, g) >> 6) << 4)};
}

}  // namespace fastllm

// Element types of tensors on a backend. Formats that exist only in checkpoints are SourceType (fastllm/weights.h).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

#include "fastllm/error.h"

namespace fastllm {

enum class DType : std::uint8_t { F32, BF16, F16, I32, F8E4M3, I8 };  // the last two: KV caches only

constexpr std::size_t size_of(DType t) {
  if (t == DType::F8E4M3 || t == DType::I8) return 1;
  return t == DType::F32 || t == DType::I32 ? 4 : 2;
}

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::F32:
      return "float32";
    case DType::BF16:
      return "bfloat16";
    case DType::F16:
      return "float16";
    case DType::I32:
      return "int32";
    case DType::F8E4M3:
      return "fp8_e4m3";
    case DType::I8:
      return "int8";
  }
  return "?";
}

inline DType dtype_from_name(const std::string& name) {
  if (name == "float32") return DType::F32;
  if (name == "bfloat16") return DType::BF16;
  throw InvalidArgument("dtype '" + name + "' is not computed in; use float32 or bfloat16");
}

// bfloat16 as its bits; conversion rounds to nearest even, NaN stays NaN.
struct bf16 {
  std::uint16_t bits;
};

constexpr float to_float(bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

constexpr bf16 to_bf16(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// IEEE half precision as its bits.
struct f16 {
  std::uint16_t bits;
};

constexpr float to_float(f16 x) {
  // Three cases, all computed and one chosen, so that a loop becomes vectors; none of them meets fp32 denormals, which
  // are slow. Infinities and NaNs (exponent all ones) get the rest of the exponent's bits.
  const std::int32_t magnitude = x.bits & 0x7fff;
  const std::int32_t normal = (magnitude << 13) + (112 << 23);
  const std::int32_t denormal = std::bit_cast<std::int32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  const std::int32_t is_denormal = -static_cast<std::int32_t>(magnitude < 0x400);  // all ones or zero, as below
  const std::int32_t special = -static_cast<std::int32_t>(magnitude > 0x7bff) & 0x7f800000;
  const auto value = static_cast<std::uint32_t>((denormal & is_denormal) | (normal & ~is_denormal) | special);
  return std::bit_cast<float>(value | static_cast<std::uint32_t>(x.bits & 0x8000) << 16);
}

// Rounds to nearest even; numbers past 65504 become infinite, NaN stays NaN.
constexpr f16 to_f16(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  std::uint32_t half = 0x7c00;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which is the last bit of 0.5f
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else if (magnitude < 0x477ff000u) {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return f16{static_cast<std::uint16_t>(sign | half)};
}

}  // namespace fastllm

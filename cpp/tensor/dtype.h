// Element types of tensors on a backend. Formats that exist only in checkpoints are SourceType (fastllm/weights.h).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

#include "fastllm/error.h"

namespace fastllm {

enum class DType : std::uint8_t { F32, BF16, F16, I32, F8E4M3 };  // F8E4M3: KV caches only

constexpr std::size_t size_of(DType t) {
  if (t == DType::F8E4M3) return 1;
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

}  // namespace fastllm

// 64-bit arithmetic on sizes that come from files.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace fastllm {

// Nothing when the product leaves [0, 2^63).
constexpr std::optional<std::int64_t> checked_product(std::span<const std::int64_t> factors) {
  std::int64_t product = 1;
  for (auto f : factors)
    if (f < 0 || __builtin_mul_overflow(product, f, &product)) return std::nullopt;
  return product;
}

}  // namespace fastllm

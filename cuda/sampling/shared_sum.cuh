// 64-bit sums in shared memory, in halves: it adds 32 bits at a time natively.
#pragma once

#include <cstdint>

namespace fastllm::cuda {

template <int kSums>
struct SharedSums {
  std::uint32_t low[kSums], high[kSums];

  __device__ __forceinline__ void clear(int i) { low[i] = high[i] = 0; }
  __device__ __forceinline__ std::uint64_t operator[](int i) const {
    return static_cast<std::uint64_t>(high[i]) << 32 | low[i];
  }
  __device__ __forceinline__ void add(int i, std::uint64_t x) {
    const auto lower = static_cast<std::uint32_t>(x);
    const std::uint32_t old = atomicAdd(&low[i], lower);
    const std::uint32_t carry = static_cast<std::uint32_t>(x >> 32) + (old + lower < lower ? 1u : 0u);
    if (carry != 0) atomicAdd(&high[i], carry);
  }
};

}  // namespace fastllm::cuda

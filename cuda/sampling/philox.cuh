// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the first output word for the key
// `seed` and the counter (token, 0, position). A draw depends on nothing else.
#pragma once

#include <cstdint>

namespace fastllm::cuda {

// By one wide multiplication whose result is a pair of registers; shifts of a 64-bit product cost an addition each.
struct Product {
  std::uint32_t low, high;
};
__device__ __forceinline__ Product multiply(std::uint32_t x, std::uint32_t y) {
  Product p;
  asm("{ .reg .b64 wide; mul.wide.u32 wide, %2, %3; mov.b64 {%0, %1}, wide; }"
      : "=r"(p.low), "=r"(p.high)
      : "r"(x), "r"(y));
  return p;
}

__device__ __forceinline__ std::uint32_t philox(std::uint32_t token, std::uint64_t seed, std::uint64_t position) {
  std::uint32_t c0 = token, c1 = 0, c2 = static_cast<std::uint32_t>(position);
  std::uint32_t c3 = static_cast<std::uint32_t>(position >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const Product a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ k0;
    c2 = a.high ^ c3 ^ k1;
    c1 = b.low;
    c3 = a.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace fastllm::cuda

// 64-bit mixing for keys, seeds and the null model. Not cryptographic: whoever relies on equality verifies it.
#pragma once

#include <cstdint>

namespace fastllm {

// A bijection in which every input bit moves every output bit (SplitMix64's finaliser).
constexpr std::uint64_t mix64(std::uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Order matters: hash_combine(a, b) != hash_combine(b, a).
constexpr std::uint64_t hash_combine(std::uint64_t seed, std::uint64_t value) {
  return mix64(seed * 0x9e3779b97f4a7c15ull + value + 0x632be59bd9b4e019ull);
}

}  // namespace fastllm

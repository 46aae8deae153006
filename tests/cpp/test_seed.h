// The seed of the random tests.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>

namespace fastllm::test {

// A new seed every run, printed; FASTLLM_TEST_SEED repeats one.
inline unsigned test_seed() {
  static const unsigned seed = [] {
    const char* env = std::getenv("FASTLLM_TEST_SEED");
    const unsigned s = env ? static_cast<unsigned>(std::atoll(env)) : std::random_device{}();
    std::printf("FASTLLM_TEST_SEED=%u\n", s);
    return s;
  }();
  return seed;
}

}  // namespace fastllm::test

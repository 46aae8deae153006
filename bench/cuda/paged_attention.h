// What the benchmarks of attention over paged KV share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "check.h"
#include "gpu_timing.h"
#include "upload.h"

namespace fastllm::bench {

inline constexpr int kBlockSize = 16;  // positions

// Of this device; sizes are left to be filled in.
inline cuda::AttentionLimits device_limits() {
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  cuda::AttentionLimits limits;
  limits.num_sms = properties.multiProcessorCount;
  limits.capability = properties.major * 10 + properties.minor;
  return limits;
}

// The blocks of a pool, in the same random order every time.
inline std::vector<BlockId> blocks_of_pool(std::int64_t n, bool in_order = false) {
  std::vector<int> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  if (!in_order) std::shuffle(order.begin(), order.end(), std::mt19937(1));
  std::vector<BlockId> blocks;
  for (const int b : order) blocks.push_back(BlockId{b});
  return blocks;
}

}  // namespace fastllm::bench

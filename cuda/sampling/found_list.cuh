// The tokens that one block finds in its part of a row, in shared memory, on their way to the row's list.
#pragma once

#include <cstdint>

#include "sampling/order.cuh"
#include "sampling/stages.h"

namespace fastllm::cuda {

// All calls but add() are separated by barriers of the block. More tokens than the list holds are counted, not kept.
struct FoundList {
  Ranked tokens[kListCapacity];
  std::uint32_t num, begin;  // begin: place of the first in the row's list

  __device__ __forceinline__ void clear() { num = 0; }  // by one thread
  __device__ __forceinline__ void add(float x, int id) {
    const std::uint32_t at = atomicAdd(&num, 1u);
    if (at < kListCapacity) tokens[at] = ranked(x, id);
  }
  // By one thread; `listed` counts the tokens of the row.
  __device__ __forceinline__ void reserve(std::uint32_t* listed) { begin = atomicAdd(listed, num); }
  // By all threads.
  __device__ __forceinline__ void write(Ranked* list) const {
    const std::uint32_t n = min(num, static_cast<std::uint32_t>(kListCapacity));
    for (std::uint32_t i = threadIdx.x; i < n && begin + i < kListCapacity; i += kScanThreads)
      list[begin + i] = tokens[i];
  }
};

}  // namespace fastllm::cuda

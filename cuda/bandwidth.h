// Kernels that do nothing but move memory: what the device can do at most, for benchmarks to be held against.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fastllm::cuda {

// bytes: multiples of 16, pointers aligned to 16.
// The xor of all words goes to *sink when it is one value in 2^32, so that nothing is optimised away.
void read_all(const void* data, std::size_t bytes, unsigned* sink, cudaStream_t stream);
void write_all(void* data, std::size_t bytes, unsigned value, cudaStream_t stream);
void copy_all(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

}  // namespace fastllm::cuda

// Reading, writing and copying, 16 bytes a thread and access, four accesses in flight per thread.
//
//   read: for i in data: x ^= i        write: for i in data: i = value        copy: for i in data: to = from
//
// Cost: the bytes themselves. Benchmark: --benchmark_filter=Ceilings
#include "bandwidth.h"
#include "launch.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 512, kUnroll = 4;
constexpr std::size_t kPerBlock = std::size_t{kThreads} * kUnroll;  // 16-byte vectors

dim3 grid_of(std::size_t bytes) { return static_cast<unsigned>((bytes / 16 + kPerBlock - 1) / kPerBlock); }

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* data, std::size_t n, unsigned* sink) {
  const std::size_t first = blockIdx.x * kPerBlock + threadIdx.x;
  uint4 v[kUnroll] = {};
  pdl_wait();
  pdl_launch();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kThreads < n) v[u] = __ldcs(data + first + u * kThreads);
  }
  unsigned x = 0;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) x ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  if (x == 0x9e3779b9u) *sink = x;
}

__global__ void __launch_bounds__(kThreads) write_kernel(uint4* data, std::size_t n, unsigned value) {
  const std::size_t first = blockIdx.x * kPerBlock + threadIdx.x;
  pdl_wait();
  pdl_launch();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kThreads < n) __stcs(data + first + u * kThreads, uint4{value, value, value, value});
  }
}

__global__ void __launch_bounds__(kThreads) copy_kernel(uint4* to, const uint4* from, std::size_t n) {
  const std::size_t first = blockIdx.x * kPerBlock + threadIdx.x;
  uint4 v[kUnroll] = {};
  pdl_wait();
  pdl_launch();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kThreads < n) v[u] = __ldcs(from + first + u * kThreads);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kThreads < n) __stcs(to + first + u * kThreads, v[u]);
  }
}

}  // namespace

void read_all(const void* data, std::size_t bytes, unsigned* sink, cudaStream_t stream) {
  launch(read_kernel, grid_of(bytes), kThreads, 0, stream, static_cast<const uint4*>(data), bytes / 16, sink);
}

void write_all(void* data, std::size_t bytes, unsigned value, cudaStream_t stream) {
  launch(write_kernel, grid_of(bytes), kThreads, 0, stream, static_cast<uint4*>(data), bytes / 16, value);
}

void copy_all(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  launch(copy_kernel, grid_of(bytes), kThreads, 0, stream, static_cast<uint4*>(to), static_cast<const uint4*>(from),
         bytes / 16);
}

}  // namespace fastllm::cuda

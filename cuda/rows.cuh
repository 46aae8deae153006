// Launches element-wise operations over the rows of a matrix. A row is cut into pieces, one per thread block; a thread
// has kUnroll vectors of N elements under way at once.
//
//   row:  |------ piece 0 ------|------ piece 1 ------|-- piece 2 --|
//   piece:  t0 t1 .. tn t0 t1 .. tn        each ti a vector of N elements
//
// An Op has  template <int N> struct Loaded;  template <int N> Loaded<N> load(row, col) const;  and
// template <int N> void store(row, col, const Loaded<N>&) const;  of which load may be called long before store.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.cuh"
#include "vec.cuh"

namespace fastllm::cuda {

inline constexpr int kRowThreads = 256, kRowUnroll = 2;

template <int N, class Op>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(const Op op, std::int64_t cols, unsigned pieces) {
  pdl_launch();
  pdl_wait();
  const std::int64_t row = blockIdx.x / pieces;
  const std::int64_t step = std::int64_t{blockDim.x} * N;
  const std::int64_t first = std::int64_t{blockIdx.x % pieces} * step * kRowUnroll + threadIdx.x * N;
  typename Op::template Loaded<N> loaded[kRowUnroll];
#pragma unroll
  for (int u = 0; u < kRowUnroll; ++u) {
    if (first + u * step < cols) loaded[u] = op.template load<N>(row, first + u * step);
  }
#pragma unroll
  for (int u = 0; u < kRowUnroll; ++u) {
    if (first + u * step < cols) op.template store<N>(row, first + u * step, loaded[u]);
  }
}

// vectors: whether accesses of N elements fit; else one at a time.
template <int N, class Op>
void launch_rows(const Op& op, std::int64_t rows, std::int64_t cols, bool vectors, cudaStream_t stream) {
  const std::int64_t per_row = vectors ? cols / N : cols;  // accesses
  const std::int64_t per_thread = (per_row + kRowUnroll - 1) / kRowUnroll;
  const std::int64_t threads = std::clamp<std::int64_t>((per_thread + 31) / 32 * 32, 32, kRowThreads);
  const std::int64_t pieces = (per_thread + threads - 1) / threads;
  launch(vectors ? rows_kernel<N, Op> : rows_kernel<1, Op>, static_cast<unsigned>(rows * pieces),
         static_cast<unsigned>(threads), 0, stream, op, cols, static_cast<unsigned>(pieces));
}

}  // namespace fastllm::cuda

// RMSNorm and LayerNorm of rows, with the residual addition in front when asked for.
//
//   x += delta                                        (when delta is given)
//   mean = layer ? sum(x) / n : 0;  s = 1 / sqrt(sum((x - mean)^2) / n + eps)
//   out = (x - mean) * s * weight (+ bias)
//
// One thread block per row, which it keeps in registers: every operand moves once. Rows too wide for that, or not made
// of whole 16-byte vectors, are read again for each of the three steps. Cost per row: the bytes of x (twice with
// delta), delta and out; about 6 operations an element. Benchmark: --benchmark_filter=Norm
#include <algorithm>
#include <type_traits>

#include "elementwise.h"
#include "launch.cuh"
#include "vec.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kVector = 4;     // elements of one access
constexpr int kPerThread = 4;  // vectors a thread keeps
constexpr int kMaxThreads = 1024;
constexpr std::int64_t kMaxKept = std::int64_t{kMaxThreads} * kPerThread * kVector;  // columns

// Of all threads of the block; in the same order however many rows there are. partial: one float per warp, its
// own for each sum.
__device__ __forceinline__ float block_sum(float x, float* partial) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_sum(lane < blockDim.x / 32 ? partial[lane] : 0.0f);
}

template <class In, class Out>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const NormCall c) {
  __shared__ float sums[32], squares[32];
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  const auto column = [](int u) { return static_cast<int>((u * blockDim.x + threadIdx.x) * kVector); };
  const auto cols = static_cast<int>(c.cols);
  const auto n = static_cast<float>(cols);
  pdl_launch();
  float weight[kPerThread][kVector];
#pragma unroll
  for (int u = 0; u < kPerThread; ++u) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) weight[u][i] = 1.0f;
    if (c.weight != nullptr && column(u) < cols) load(weight[u], c.weight + column(u));
  }
  pdl_wait();

  float x[kPerThread][kVector] = {};
  const In* in = static_cast<const In*>(c.x) + row * c.ldx;
#pragma unroll
  for (int u = 0; u < kPerThread; ++u) {
    if (column(u) < cols) load(x[u], in + column(u));
  }
  if constexpr (std::is_same_v<In, float>) {
    if (c.delta != nullptr) {
      float delta[kPerThread][kVector] = {};
#pragma unroll
      for (int u = 0; u < kPerThread; ++u) {
        if (column(u) < cols) load(delta[u], c.delta + row * c.ldd + column(u));
      }
      float* total = const_cast<float*>(in);
#pragma unroll
      for (int u = 0; u < kPerThread; ++u) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[u][i] += delta[u][i];
        if (column(u) < cols) store(total + column(u), x[u]);
      }
    }
  }

  float mean = 0;
  if (c.kind == NormKind::Layer) {
    float sum = 0;
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += x[u][i];
    }
    mean = block_sum(sum, sums) / n;
  }
  float square = 0;
#pragma unroll
  for (int u = 0; u < kPerThread; ++u) {
    if (column(u) < cols) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) square = fmaf(x[u][i] - mean, x[u][i] - mean, square);
    }
  }
  const float scale = rsqrtf(block_sum(square, squares) / n + c.eps);

  Out* out = static_cast<Out*>(c.out) + row * c.ldo;
#pragma unroll
  for (int u = 0; u < kPerThread; ++u) {
    if (column(u) >= cols) continue;
    float y[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = (x[u][i] - mean) * scale * weight[u][i];
    if (c.bias != nullptr) {
      float bias[kVector];
      load(bias, c.bias + column(u));
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] += bias[i];
    }
    store(out + column(u), y);
  }
}

// Any width and alignment. A thread meets the same columns in every step.
template <class In, class Out>
__global__ void __launch_bounds__(kMaxThreads) norm_any_kernel(const NormCall c) {
  __shared__ float sums[32], squares[32];
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  const auto n = static_cast<float>(c.cols);
  const In* in = static_cast<const In*>(c.x) + row * c.ldx;
  Out* out = static_cast<Out*>(c.out) + row * c.ldo;
  const auto x = [&](std::int64_t i) {
    float v[1];
    load(v, in + i);
    return v[0];
  };
  pdl_launch();
  pdl_wait();
  if constexpr (std::is_same_v<In, float>) {
    if (c.delta != nullptr) {
      float* total = const_cast<float*>(in);
      for (std::int64_t i = threadIdx.x; i < c.cols; i += blockDim.x) total[i] += c.delta[row * c.ldd + i];
    }
  }
  float mean = 0;
  if (c.kind == NormKind::Layer) {
    float sum = 0;
    for (std::int64_t i = threadIdx.x; i < c.cols; i += blockDim.x) sum += x(i);
    mean = block_sum(sum, sums) / n;
  }
  float square = 0;
  for (std::int64_t i = threadIdx.x; i < c.cols; i += blockDim.x) square = fmaf(x(i) - mean, x(i) - mean, square);
  const float scale = rsqrtf(block_sum(square, squares) / n + c.eps);
  for (std::int64_t i = threadIdx.x; i < c.cols; i += blockDim.x) {
    float y[1] = {(x(i) - mean) * scale};
    if (c.weight != nullptr) y[0] *= c.weight[i];
    if (c.bias != nullptr) y[0] += c.bias[i];
    store(out + i, y);
  }
}

}  // namespace

void norm(const NormCall& c, cudaStream_t stream) {
  const bool kept = c.cols <= kMaxKept &&
                    fits_vectors(kVector, {c.cols, c.ldx, c.ldd, c.ldo}, {c.x, c.delta, c.out, c.weight, c.bias});
  const std::int64_t per_thread = kept ? kPerThread * kVector : 4;  // columns
  const std::int64_t wanted = (c.cols + per_thread - 1) / per_thread;
  const auto threads = static_cast<unsigned>(std::min<std::int64_t>((wanted + 31) / 32 * 32, kMaxThreads));
  with_float_type(c.x_dtype, [&](auto in) {
    with_float_type(c.out_dtype, [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      launch(kept ? norm_kernel<In, Out> : norm_any_kernel<In, Out>, static_cast<unsigned>(c.rows), threads, 0, stream,
             c);
    });
  });
}

}  // namespace fastllm::cuda

// out = x w^T (+ bias) (+ out): cuBLASLt with an algorithm cache for most sizes, own kernels for few rows of x.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "tensor/dtype.h"

namespace fastllm::cuda {

// A dense matrix on the device, row-major [n, k], rows 16-byte aligned.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::BF16;  // F32 or BF16, as x
  std::int64_t n = 0, k = 0;  // out, in
};

struct GemmCall {
  void* out = nullptr;  // [m, n], row stride ldo
  DType out_dtype = DType::BF16;
  std::int64_t ldo = 0;
  const void* x = nullptr;  // [m, k] of the weight's dtype, row stride ldx
  std::int64_t ldx = 0;
  std::int64_t m = 0;
  WeightView w;
  const float* bias = nullptr;  // [n] or null
  bool accumulate = false;      // add to what out holds
};

struct GemmOptions {
  bool deterministic = false;  // a row of out never depends on m, nor on the other rows, bit for bit
};

class Gemm {
 public:
  // Opens cuBLASLt; throws ResourceError naming where it was looked for. One object per backend: its workspace serves
  // one stream at a time.
  explicit Gemm(const GemmOptions& options);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // Enqueues. Allocates nothing and measures nothing (a shape that was not tuned takes cuBLASLt's first proposal), so
  // it can be captured.
  void run(const GemmCall& call, cudaStream_t stream);
  // out[m, n/2] = act(x gate^T) * (x up^T), w = [gate; up], when a fused kernel exists for this size and is the faster
  // one; false: nothing was done.
  bool run_gated(const GemmCall& call, int act /* Activation */, cudaStream_t stream);

  // Measures candidate algorithms for each m (or a size near above it that stands for m) on this weight's shape, on
  // scratch memory and with cold caches, and remembers the best, also which own kernel beats them. What is known is
  // skipped. Not while capturing.
  void tune(const WeightView& w, DType out_dtype, bool accumulate, std::span<const std::int64_t> ms,
            cudaStream_t stream);

  std::size_t workspace_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fastllm::cuda

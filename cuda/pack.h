// Weights on their way to the device: several threads read ranges of rows into pinned slices while earlier slices are
// copied, so that the slower of the source and PCIe sets the pace.
#pragma once

#include <array>
#include <memory>

#include "backend/backend.h"
#include "base/thread_pool.h"
#include "gemm.h"
#include "memory.h"

namespace fastllm::cuda {

// Row-major and dense, in the activations' dtype.
class DenseWeight final : public PackedWeight {
 public:
  DenseWeight(std::int64_t rows, std::int64_t cols, DType dtype);
  std::int64_t rows() const override { return view_.n; }
  std::int64_t cols() const override { return view_.k; }
  std::size_t bytes() const override { return memory_->bytes(); }
  const WeightView& view() const { return view_; }

 private:
  std::unique_ptr<Buffer> memory_;
  WeightView view_;
};

inline const WeightView& view_of(const PackedWeight& weight) { return static_cast<const DenseWeight&>(weight).view(); }

// One thread, one stream.
class Packer {
 public:
  explicit Packer(cudaStream_t stream);
  // Enqueues the last copies: the weight is there for whatever the stream runs next.
  std::unique_ptr<PackedWeight> pack(const HostMatrix& weight, DType compute);

 private:
  struct Slice {
    std::unique_ptr<Buffer> memory;  // pinned
    Event copied;
  };

  std::byte* next_slice(std::size_t bytes);
  void read(const HostMatrix& weight, DType compute, std::int64_t begin, std::int64_t end, std::byte* out);

  cudaStream_t stream_;
  ThreadPool threads_;
  std::array<Slice, 4> slices_;
  std::size_t current_ = 0;
};

}  // namespace fastllm::cuda

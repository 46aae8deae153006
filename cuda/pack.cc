#include "pack.h"

#include <algorithm>
#include <cassert>
#include <exception>
#include <string>
#include <vector>

namespace fastllm::cuda {
namespace {

constexpr std::int64_t kSliceBytes = 32 << 20;
constexpr std::int64_t kScratchBytes = 256 << 10;  // fp32 of one thread on their way to bf16; stays in L2
constexpr int kMaxThreads = 16;

// Rows [begin, end) of a source that has them as fp32 only.
void read_rounded(const HostMatrix& weight, std::int64_t begin, std::int64_t end, std::uint16_t* out) {
  const std::int64_t group = std::max<std::int64_t>(1, kScratchBytes / (weight.cols * 4));
  std::vector<float> scratch(static_cast<std::size_t>(std::min(group, end - begin) * weight.cols));
  for (std::int64_t r = begin; r < end; r += group) {
    const std::int64_t last = std::min(r + group, end);
    weight.read(r, last, scratch.data());
    const std::int64_t n = (last - r) * weight.cols;
    for (std::int64_t i = 0; i < n; ++i) out[i] = to_bf16(scratch[static_cast<std::size_t>(i)]).bits;
    out += n;
  }
}

}  // namespace

DenseWeight::DenseWeight(std::int64_t rows, std::int64_t cols, DType dtype)
    : memory_(allocate_device(static_cast<std::size_t>(rows * cols) * size_of(dtype))),
      view_{memory_->data(), dtype, rows, cols} {}

Packer::Packer(cudaStream_t stream) : stream_(stream), threads_(std::min(kMaxThreads, usable_cores())) {}

std::byte* Packer::next_slice(std::size_t bytes) {
  current_ = (current_ + 1) % slices_.size();
  Slice& slice = slices_[current_];
  slice.copied.wait();
  if (!slice.memory || slice.memory->bytes() < bytes) slice.memory = allocate_pinned(bytes);
  return data_as<std::byte>(*slice.memory);
}

void Packer::read(const HostMatrix& weight, DType compute, std::int64_t begin, std::int64_t end, std::byte* out) {
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(threads_.size()));
  threads_.run([&](int i) {
    try {
      const std::int64_t n = end - begin, parts = threads_.size();
      const std::int64_t first = begin + n * i / parts, last = begin + n * (i + 1) / parts;
      if (first == last) return;
      std::byte* rows = out + static_cast<std::size_t>((first - begin) * weight.cols) * size_of(compute);
      if (compute == DType::F32) {
        weight.read(first, last, reinterpret_cast<float*>(rows));
      } else if (weight.read_bf16) {
        weight.read_bf16(first, last, reinterpret_cast<std::uint16_t*>(rows));
      } else {
        read_rounded(weight, first, last, reinterpret_cast<std::uint16_t*>(rows));
      }
    } catch (...) {
      failures[static_cast<std::size_t>(i)] = std::current_exception();
    }
  });
  for (const auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

std::unique_ptr<PackedWeight> Packer::pack(const HostMatrix& weight, DType compute) {
  assert(compute == DType::F32 || compute == DType::BF16);
  if (weight.cols % 8 != 0)
    throw InvalidArgument("a weight has " + std::to_string(weight.cols) +
                          " input features per rank; the CUDA backend takes multiples of 8");
  auto packed = std::make_unique<DenseWeight>(weight.rows, weight.cols, compute);
  const std::int64_t row_bytes = weight.cols * static_cast<std::int64_t>(size_of(compute));
  const std::int64_t rows = std::clamp<std::int64_t>(kSliceBytes / row_bytes, 1, weight.rows);
  auto* out = static_cast<std::byte*>(const_cast<void*>(packed->view().data));
  for (std::int64_t begin = 0; begin < weight.rows; begin += rows) {
    const std::int64_t end = std::min(begin + rows, weight.rows);
    const auto bytes = static_cast<std::size_t>((end - begin) * row_bytes);
    std::byte* slice = next_slice(bytes);
    read(weight, compute, begin, end, slice);
    check(cudaMemcpyAsync(out + begin * row_bytes, slice, bytes, cudaMemcpyHostToDevice, stream_), "copying a weight");
    slices_[current_].copied.record(stream_);
  }
  return packed;
}

}  // namespace fastllm::cuda

#include "memory.h"

#include <algorithm>
#include <string>

namespace fastllm::cuda {
namespace {

constexpr std::size_t kSmallest = 256;  // bytes; nothing is ever null

std::string megabytes(std::size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

class DeviceBuffer final : public Buffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
    const cudaError_t status = cudaMalloc(&data_, std::max(bytes, kSmallest));
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky, but remembered until asked for
      std::size_t free = 0, total = 0;
      check(cudaMemGetInfo(&free, &total), "asking for the free memory");
      throw ResourceError("the GPU is out of memory: " + megabytes(bytes) + " were asked for, " + megabytes(free) +
                          " of " + megabytes(total) + " are free");
    }
    check(status, "allocating device memory");
  }
  ~DeviceBuffer() override { cudaFree(data_); }
  void* data() const override { return data_; }
  std::size_t bytes() const override { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

class PinnedBuffer final : public Buffer {
 public:
  explicit PinnedBuffer(std::size_t bytes) : bytes_(bytes) {
    const cudaError_t status =
        cudaHostAlloc(&data_, std::max(bytes, kSmallest), cudaHostAllocPortable | cudaHostAllocMapped);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw ResourceError("the host is out of memory that can be pinned: " + megabytes(bytes) + " were asked for");
    }
    check(status, "allocating pinned memory");
  }
  ~PinnedBuffer() override { cudaFreeHost(data_); }
  void* data() const override { return data_; }
  std::size_t bytes() const override { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

cudaMemoryType type_of(const void* memory) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, memory), "looking up a pointer");
  return attributes.type;
}

}  // namespace

std::unique_ptr<Buffer> allocate_device(std::size_t bytes) { return std::make_unique<DeviceBuffer>(bytes); }
std::unique_ptr<Buffer> allocate_pinned(std::size_t bytes) { return std::make_unique<PinnedBuffer>(bytes); }

bool is_pageable(const void* memory) { return type_of(memory) == cudaMemoryTypeUnregistered; }

bool is_host(const void* memory) {
  const cudaMemoryType type = type_of(memory);
  return type == cudaMemoryTypeUnregistered || type == cudaMemoryTypeHost;
}

}  // namespace fastllm::cuda

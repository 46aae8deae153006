// What the GPU tests share: a fixture that skips without a GPU, and device memory.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "backend/op_testing.h"
#include "check.h"

namespace fastllm::test {

// Device memory of n elements, every byte 0xff (NaN) until written.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t n) : n_(n) {
    cuda::check(cudaMalloc(&data_, std::max<std::size_t>(n * sizeof(T), 16)), "cudaMalloc");
    cuda::check(cudaMemset(data_, 0xff, n * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { upload(host.data()); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  DeviceArray(DeviceArray&& o) noexcept : data_(o.data_), n_(o.n_) { o.data_ = nullptr; }
  ~DeviceArray() { cudaFree(data_); }

  T* get() const { return static_cast<T*>(data_); }
  std::size_t size() const { return n_; }
  void upload(const T* host) {
    cuda::check(cudaMemcpy(data_, host, n_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<T> download() const {
    cuda::check(cudaDeviceSynchronize(), "the kernels under test");
    std::vector<T> host(n_);
    cuda::check(cudaMemcpy(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

 private:
  void* data_ = nullptr;
  std::size_t n_ = 0;
};

// A matrix in device memory with the contents of a host Array, and back.
class DeviceMatrix {
 public:
  explicit DeviceMatrix(const Array& host) : bytes_(host.tensor().bytes()), rows_(host.rows()), cols_(host.cols()) {
    dtype_ = host.tensor().dtype;
    bytes_.upload(static_cast<const std::byte*>(host.tensor().data));
  }
  DeviceMatrix(DType dtype, std::int64_t rows, std::int64_t cols)
      : bytes_(static_cast<std::size_t>(rows * cols) * size_of(dtype)), dtype_(dtype), rows_(rows), cols_(cols) {}

  void* data() const { return bytes_.get(); }
  template <class T>
  T* ptr() const {
    return reinterpret_cast<T*>(bytes_.get());
  }
  Tensor tensor() const { return {bytes_.get(), dtype_, {rows_, cols_}}; }
  Array download() const {
    Array host(dtype_, rows_, cols_);
    const auto bytes = bytes_.download();
    std::memcpy(host.tensor().data, bytes.data(), bytes.size());
    return host;
  }

 private:
  DeviceArray<std::byte> bytes_;
  DType dtype_;
  std::int64_t rows_, cols_;
};

class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    test_seed();
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) GTEST_SKIP() << "this machine has no GPU";
    cuda::check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    cuda::check(cudaStreamCreate(&stream), "cudaStreamCreate");
    cpu = make_cpu_backend(2);
  }
  void TearDown() override {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  int capability() const { return properties.major * 10 + properties.minor; }

  cudaDeviceProp properties{};
  cudaStream_t stream = nullptr;
  std::unique_ptr<Backend> cpu;
  Random random;
};

}  // namespace fastllm::test

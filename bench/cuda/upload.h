// Device memory with what a vector holds.
#pragma once

#include <vector>

#include "check.h"
#include "gpu_timing.h"

namespace fastllm::bench {

template <class T>
class Upload {
 public:
  explicit Upload(const std::vector<T>& host) : memory_(host.size() * sizeof(T), 0) {
    cuda::check(cudaMemcpy(memory_.at(0), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  T* get() const { return memory_.as<T>(0); }

 private:
  Rotation memory_;
};

}  // namespace fastllm::bench

// Every CUDA call goes through check(); a failure is a ResourceError with CUDA's own sentence.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "fastllm/error.h"

namespace fastllm::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw ResourceError(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(status));
}

}  // namespace fastllm::cuda

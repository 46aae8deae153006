// The module's one exported function; see cpp/backend/cuda_plugin.h.
#include "backend/cuda_plugin.h"

#include "cuda_backend.h"
#include "devices.h"

extern "C" __attribute__((visibility("default"))) const fastllm::CudaPlugin* fastllm_cuda_plugin() {
  static constexpr fastllm::CudaPlugin plugin{fastllm::kCudaPluginAbi, FASTLLM_VERSION, &fastllm::cuda::device_count,
                                              &fastllm::cuda::make_backend};
  return &plugin;
}

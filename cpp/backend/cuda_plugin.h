// What the core and libfastllm_cuda.so agree on. Both are built from one source tree: anything else than the very same
// version is refused.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace fastllm {

inline constexpr int kCudaPluginAbi = 1;  // raised when backend.h or this file changes

struct CudaPlugin {
  int abi = 0;                  // kCudaPluginAbi; this and the next are read before anything else
  const char* build = nullptr;  // the version of fastllm
  int (*device_count)(std::string* why) = nullptr;
  std::unique_ptr<Backend> (*make_backend)(const CudaOptions& options) = nullptr;
};

// The module's only symbol: const CudaPlugin* fastllm_cuda_plugin(), C linkage.
inline constexpr char kCudaPluginSymbol[] = "fastllm_cuda_plugin";
using CudaPluginFunction = const CudaPlugin*();

// Opens a module, for the rest of the process's life. Null when that fails, and then *why says why.
const CudaPlugin* open_cuda_plugin(const std::string& path, std::string& why);

}  // namespace fastllm

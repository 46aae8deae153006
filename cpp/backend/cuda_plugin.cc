#include "backend/cuda_plugin.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr char kFile[] = "libfastllm_cuda.so";

struct Loaded {
  const CudaPlugin* plugin = nullptr;
  std::string why;  // there is none
};

// The folder of the program or library that this code is part of.
std::filesystem::path own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) return {};
  std::error_code failed;
  const auto path = std::filesystem::canonical(info.dli_fname, failed);
  return failed ? std::filesystem::path{} : path.parent_path();
}

Loaded load() {
  Loaded loaded;
  if (const char* named = std::getenv("FASTLLM_CUDA_PLUGIN"); named != nullptr && *named != '\0') {
    loaded.plugin = open_cuda_plugin(named, loaded.why);
    return loaded;
  }
  const auto beside = own_folder() / kFile;
  std::error_code failed;
  const bool there = std::filesystem::exists(beside, failed);
  loaded.plugin = open_cuda_plugin(there ? beside.string() : kFile, loaded.why);
  if (loaded.plugin == nullptr && !there)
    loaded.why = "this fastllm has no CUDA backend: it was built without nvcc, or " + std::string(kFile) +
                 " was lost (" + loaded.why + ")";
  return loaded;
}

const Loaded& loaded_plugin() {
  static const Loaded loaded = load();
  return loaded;
}

}  // namespace

const CudaPlugin* open_cuda_plugin(const std::string& path, std::string& why) {
  void* module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    why = std::string("the CUDA backend cannot be opened: ") + dlerror();
    return nullptr;
  }
  auto* function = reinterpret_cast<CudaPluginFunction*>(dlsym(module, kCudaPluginSymbol));
  if (function == nullptr) {
    why = path + " is not a CUDA backend of fastllm: it has no " + kCudaPluginSymbol;
    return nullptr;
  }
  const CudaPlugin* plugin = function();
  if (plugin->abi != kCudaPluginAbi || std::strcmp(plugin->build, FASTLLM_VERSION) != 0) {
    why = path + " belongs to fastllm " + plugin->build + " (interface " + std::to_string(plugin->abi) +
          "), but this is fastllm " + FASTLLM_VERSION + " (interface " + std::to_string(kCudaPluginAbi) + ")";
    return nullptr;
  }
  return plugin;
}

int cuda_device_count(std::string* why) {
  const Loaded& loaded = loaded_plugin();
  if (loaded.plugin != nullptr) return loaded.plugin->device_count(why);
  if (why != nullptr) *why = loaded.why;
  return 0;
}

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  const Loaded& loaded = loaded_plugin();
  if (loaded.plugin == nullptr) throw ResourceError(loaded.why);
  return loaded.plugin->make_backend(options);
}

}  // namespace fastllm

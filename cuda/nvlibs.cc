#include "nvlibs.h"

#include <dlfcn.h>
#include <link.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

#include "fastllm/error.h"

namespace fastllm::cuda {
namespace {

constexpr std::array kSonames = {"libcublasLt.so.13", "libcublasLt.so.12"};

constexpr const char* kAdvice =
    "; install it with pip install 'fastllm-engine[cuda]', or name the file in FASTLLM_CUBLASLT_LIB";

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

// The folders of the RUNPATH of the library that this code is part of. The loader would look there by itself, but in
// one go with the system's folders, and $CUDA_HOME is to come between them.
std::vector<std::string> own_runpath() {
  Dl_info self{};
  link_map* map = nullptr;
  if (dladdr1(reinterpret_cast<const void*>(&own_runpath), &self, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0)
    return {};
  const char* strings = nullptr;
  const ElfW(Dyn)* path = nullptr;
  for (const auto* entry = map->l_ld; entry->d_tag != DT_NULL; ++entry) {
    if (entry->d_tag == DT_STRTAB) strings = reinterpret_cast<const char*>(entry->d_un.d_ptr);
    if (entry->d_tag == DT_RUNPATH || entry->d_tag == DT_RPATH) path = entry;
  }
  if (strings == nullptr || path == nullptr) return {};
  const std::string kOrigin = "$ORIGIN", origin = std::filesystem::path(self.dli_fname).parent_path().string();
  std::istringstream list(strings + path->d_un.d_val);
  std::vector<std::string> folders;
  for (std::string folder; std::getline(list, folder, ':');) {
    if (folder.starts_with(kOrigin)) folder.replace(0, kOrigin.size(), origin);
    folders.push_back(folder + '/');
  }
  return folders;
}

void* open(const std::string& file, int more = 0) { return dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | more); }

void* open_any() {
  if (const char* file = variable("FASTLLM_CUBLASLT_LIB")) {
    if (void* library = open(file)) return library;
    const char* why = dlerror();
    throw ResourceError(std::string("FASTLLM_CUBLASLT_LIB names a file that cannot be loaded: ") + (why ? why : file));
  }
  for (const char* name : kSonames) {
    if (void* library = open(name, RTLD_NOLOAD)) return library;
  }
  std::vector<std::string> folders = own_runpath();
  if (const char* home = variable("CUDA_HOME")) folders.push_back(std::string(home) + "/lib64/");
  folders.push_back("");  // the loader's
  folders.push_back("/usr/local/cuda/lib64/");
  std::string places;
  for (const auto& folder : folders) {
    for (const char* name : kSonames) {
      if (void* library = open(folder + name)) return library;
    }
    places += folder.empty() ? "the loader's folders, " : folder + ", ";
  }
  places.resize(places.size() - 2);
  throw ResourceError(std::string("cuBLASLt was not found: neither ") + kSonames[0] + " nor " + kSonames[1] +
                      " is in " + places + kAdvice);
}

template <class F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr)
    throw ResourceError(std::string("cuBLASLt is too old: it has no function ") + name + kAdvice);
}

}  // namespace

CublasLt open_cublaslt() {
  void* const library = open_any();
  CublasLt lt{};
#define FASTLLM_FIND(function) find(library, "cublasLt" #function, lt.function)
  FASTLLM_FIND(Create);
  FASTLLM_FIND(Destroy);
  FASTLLM_FIND(GetVersion);
  FASTLLM_FIND(GetStatusString);
  FASTLLM_FIND(MatmulDescCreate);
  FASTLLM_FIND(MatmulDescDestroy);
  FASTLLM_FIND(MatmulDescSetAttribute);
  FASTLLM_FIND(MatrixLayoutCreate);
  FASTLLM_FIND(MatrixLayoutDestroy);
  FASTLLM_FIND(MatrixLayoutSetAttribute);
  FASTLLM_FIND(MatmulPreferenceCreate);
  FASTLLM_FIND(MatmulPreferenceDestroy);
  FASTLLM_FIND(MatmulPreferenceSetAttribute);
  FASTLLM_FIND(MatmulAlgoGetHeuristic);
  FASTLLM_FIND(MatmulAlgoCheck);
  FASTLLM_FIND(MatmulAlgoConfigGetAttribute);
  FASTLLM_FIND(Matmul);
#undef FASTLLM_FIND
  return lt;
}

}  // namespace fastllm::cuda

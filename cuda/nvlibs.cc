#include "nvlibs.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <vector>

#include "fastllm/error.h"

namespace fastllm::cuda {
namespace {

constexpr std::array kSonames = {"libcublasLt.so.13", "libcublasLt.so.12"};

constexpr const char* kAdvice =
    "; install it with pip install 'fastllm-engine[cuda]', or name the file in FASTLLM_CUBLASLT_LIB";

void* open(const std::string& file, int more = 0) { return dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | more); }

void* open_any() {
  if (const char* file = std::getenv("FASTLLM_CUBLASLT_LIB"); file != nullptr && *file != '\0') {
    if (void* library = open(file)) return library;
    const char* why = dlerror();
    throw ResourceError(std::string("FASTLLM_CUBLASLT_LIB names a file that cannot be loaded: ") + (why ? why : file));
  }
  for (const char* name : kSonames) {
    if (void* library = open(name, RTLD_NOLOAD)) return library;
  }
  std::vector<std::string> folders = {""};
  if (const char* home = std::getenv("CUDA_HOME"); home != nullptr && *home != '\0')
    folders.push_back(std::string(home) + "/lib64/");
  folders.push_back("/usr/local/cuda/lib64/");
  std::string places = "the loader's folders";
  for (const auto& folder : folders) {
    for (const char* name : kSonames) {
      if (void* library = open(folder + name)) return library;
    }
    if (!folder.empty()) places += ", " + folder;
  }
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

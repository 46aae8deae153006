// A stand-in for libcublasLt that does nothing but say where it lies.
#include <dlfcn.h>

#define FASTLLM_FAKE(function) \
  extern "C" __attribute__((visibility("default"))) int cublasLt##function() { return 1; }
FASTLLM_FAKE(Create)
FASTLLM_FAKE(Destroy)
FASTLLM_FAKE(GetVersion)
FASTLLM_FAKE(MatmulDescCreate)
FASTLLM_FAKE(MatmulDescDestroy)
FASTLLM_FAKE(MatmulDescSetAttribute)
FASTLLM_FAKE(MatrixLayoutCreate)
FASTLLM_FAKE(MatrixLayoutDestroy)
FASTLLM_FAKE(MatrixLayoutSetAttribute)
FASTLLM_FAKE(MatmulPreferenceCreate)
FASTLLM_FAKE(MatmulPreferenceDestroy)
FASTLLM_FAKE(MatmulPreferenceSetAttribute)
FASTLLM_FAKE(MatmulAlgoGetHeuristic)
FASTLLM_FAKE(MatmulAlgoCheck)
FASTLLM_FAKE(MatmulAlgoConfigGetAttribute)
#ifndef FASTLLM_FAKE_OLD
FASTLLM_FAKE(Matmul)
#endif

extern "C" __attribute__((visibility("default"))) const char* cublasLtGetStatusString(int) {
  Dl_info self{};
  return dladdr(reinterpret_cast<const void*>(&cublasLtCreate), &self) != 0 ? self.dli_fname : "nowhere";
}

// nvlibs.cc in a module with the RUNPATH of libfastllm_cuda.so, to be laid where that lies after pip install.
#include <string>

#include "fastllm/error.h"
#include "nvlibs.h"

// The file that stands in for cuBLASLt, or why there is none.
extern "C" __attribute__((visibility("default"))) const char* fastllm_probe() {
  static std::string answer;
  try {
    answer = fastllm::cuda::open_cublaslt().GetStatusString(0);
  } catch (const fastllm::Error& e) {
    answer = e.what();
  }
  return answer.c_str();
}

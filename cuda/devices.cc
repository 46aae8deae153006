#include "devices.h"

#include "check.h"
#include "nvlibs.h"

namespace fastllm::cuda {
namespace {

constexpr int kOldest = 80;  // compute capability

std::string dotted(int capability) { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); }

// GPUs of any age; throws ResourceError when there are none.
int all_devices() {
  int driver = 0, n = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    throw ResourceError("no NVIDIA driver was found on this machine (libcuda.so.1)");
  const cudaError_t status = cudaGetDeviceCount(&n);
  if (status == cudaErrorInsufficientDriver)
    throw ResourceError("the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) +
                        " only; this build needs CUDA " + std::to_string(CUDART_VERSION / 1000));
  if (status == cudaErrorNoDevice || (status == cudaSuccess && n == 0))
    throw ResourceError("the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES hides GPUs, too)");
  check(status, "looking for GPUs");
  return n;
}

}  // namespace

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking about the GPU");
  return value;
}

int capability_of(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

std::string name_of_device(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "asking about the GPU");
  return properties.name;
}

void check_device(int device) {
  const int n = all_devices();
  if (device < 0 || device >= n)
    throw ResourceError("there is no device cuda:" + std::to_string(device) + "; this machine has " +
                        std::to_string(n) + (n == 1 ? " GPU" : " GPUs"));
  const int capability = capability_of(device);
  if (capability < kOldest)
    throw ResourceError("cuda:" + std::to_string(device) + " (" + name_of_device(device) + ") has compute capability " +
                        dotted(capability) + "; " + dotted(kOldest) + " is needed");
}

int device_count(std::string* why) {
  try {
    int usable = 0;
    const int n = all_devices();
    for (int i = 0; i < n; ++i) usable += capability_of(i) >= kOldest;
    if (usable == 0) check_device(0);
    open_cublaslt();
    return usable;
  } catch (const Error& e) {
    if (why != nullptr) *why = e.what();
    return 0;
  }
}

}  // namespace fastllm::cuda

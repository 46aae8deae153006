// The GPUs of this machine, and why there may be none for us.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace fastllm::cuda {

int attribute(cudaDeviceAttr which, int device);
int capability_of(int device);  // 80, 90, ...
std::string name_of_device(int device);
// Throws ResourceError unless the device exists and its compute capability is 8.0 or newer.
void check_device(int device);
// Devices that pass check_device(), or 0 without cuBLASLt; when 0, *why (may be null) is the reason.
int device_count(std::string* why);

}  // namespace fastllm::cuda

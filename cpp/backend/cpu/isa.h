// Which instruction sets this build and this machine share.
#pragma once

#include <string>
#include <vector>

#include "backend/cpu/kernels.h"

namespace fastllm::cpu {

// Best first; "base" is always last. "amx" asks the kernel once for the permission to use tiles.
std::vector<std::string> available_isas();

// isa: a name of the above, or "" for FASTLLM_CPU_ISA if set, else the best. Throws InvalidArgument.
Kernels select_kernels(const std::string& isa);

}  // namespace fastllm::cpu

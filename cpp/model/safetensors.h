// Reads the safetensors format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
// data_offsets}}, the data. The file is memory-mapped; tensors point into it and share its ownership.
#pragma once

#include <string>
#include <vector>

#include "fastllm/weights.h"

namespace fastllm {

// Throws LoadError naming the file and what is wrong with it. F32, F16 and BF16 only.
std::vector<SourceTensor> read_safetensors(const std::string& path);

}  // namespace fastllm

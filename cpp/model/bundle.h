// A bundle is a folder a C++ host opens without Python: spec.json and model.safetensors with canonical names.
#pragma once

#include <string>

#include "fastllm/weights.h"

namespace fastllm {

// Throws LoadError naming the file, or InvalidArgument for a bad spec. Tensors are mapped, not read.
ModelSource read_bundle(const std::string& dir);

}  // namespace fastllm

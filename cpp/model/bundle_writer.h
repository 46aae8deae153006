// The weights half of a bundle: every canonical tensor, transformed and converted, as one safetensors file
// (https://github.com/huggingface/safetensors#format). Memory stays at one block of rows.
#pragma once

#include <string>
#include <vector>

#include "fastllm/weights.h"

namespace fastllm {

// dtype: "float32", "bfloat16" or "float16". One-dimensional weights are always stored as float32. Writes beside `path`
// and renames, so a file of that name is whole. Throws LoadError for bad weights, ResourceError when writing fails.
void write_weights(const ModelSpec& spec, const std::vector<WeightBinding>& weights, const std::string& path,
                   const std::string& dtype);

}  // namespace fastllm

// Checkpoint element formats to fp32. The block formats are GGUF's: a row is a sequence of blocks of 32 or 256
// elements, each with its scales.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastllm/weights.h"

namespace fastllm {

struct SourceFormat {
  const char* name;
  std::int64_t block_elements;  // elements per block; 1 for plain types
  std::int64_t block_bytes;
};

const SourceFormat& format_of(SourceType type);
bool is_integer(SourceType type);

// Elements [begin, begin + n) of a row that starts at `row`; any range, blocks are cut as needed.
void dequantize(SourceType type, const std::byte* row, std::int64_t begin, std::int64_t n, float* out);

}  // namespace fastllm

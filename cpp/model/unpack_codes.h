// The codes of a checkpoint's packed integers, one byte each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastllm/weights.h"

namespace fastllm {

// The elements of an AWQ word from its lowest to its highest half byte.
inline constexpr int kAwqOrder[] = {0, 2, 4, 6, 1, 3, 5, 7};

struct CodeArray {
  CodeLayout layout = CodeLayout::Gptq;
  int bits = 0;        // 4 or 8; Awq: 4
  bool bytes = false;  // I8 instead of words; Rows only
  const std::byte* data = nullptr;
  std::int64_t out = 0, in = 0;  // of the weight
};

// Rows [row_begin, row_end) and columns [col_begin, col_end) of the weight [out, in], unsigned, row by row.
// Throws LoadError when a byte is no code of 4 bits.
void unpack_codes(const CodeArray& codes, std::int64_t row_begin, std::int64_t row_end, std::int64_t col_begin,
                  std::int64_t col_end, std::uint8_t* out);

}  // namespace fastllm

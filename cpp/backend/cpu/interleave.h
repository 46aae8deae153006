// Rows of bf16 numbers into the panel that the products read, where nothing has to be converted on the way.
#pragma once

#include <cstdint>

namespace fastllm::cpu {

// rows: [n <= kPanel, k]; panel: zeros of one packed bf16 panel, see kernels.h.
void interleave_rows(const std::uint16_t* rows, std::int64_t n, std::int64_t k, std::uint16_t* panel);

}  // namespace fastllm::cpu

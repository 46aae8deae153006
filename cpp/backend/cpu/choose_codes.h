// The choice of codes for numbers that have none.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"

namespace fastllm::cpu {

// Codes for x[0, n): symmetric ones reach the largest magnitude of each group, those with offsets span from its
// smallest to its largest number; of 4 bits, several spans are tried and the one with the least squared error is taken.
// codes: [n]; scales, offsets: [ceil(n / format.size)], numbers of fp16; offsets null without.
// Throws LoadError when a number is not finite or too large for fp16 scales.
void choose_codes(const Kernels& kernels, const GroupFormat& format, const float* x, std::int64_t n,
                  std::uint8_t* codes, float* scales, float* offsets);

}  // namespace fastllm::cpu

#include "backend/cpu/choose_codes.h"

#include <cassert>

#include "fastllm/error.h"

namespace fastllm::cpu {

void choose_codes(const Kernels& kernels, const GroupFormat& format, const float* x, std::int64_t n,
                  std::uint8_t* codes, float* scales, float* offsets) {
  assert(format.offsets == (offsets != nullptr));
  const CodeChoice choice{.x = x,
                          .n = n,
                          .bits = format.bits,
                          .group = format.size,
                          .zero = format.zero,
                          .codes = codes,
                          .scales = scales,
                          .offsets = offsets};
  if (!kernels.choose_codes(choice))
    throw LoadError("a weight holds numbers that are not finite or too large to be quantised; load it without");
}

}  // namespace fastllm::cpu

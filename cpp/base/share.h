// How work is cut into one contiguous share per thread. Weights are packed and multiplied by the same cut, so that the
// pages of a share lie on the memory node of the thread that streams them.
#pragma once

#include <cstdint>

namespace fastllm {

struct Share {
  std::int64_t begin = 0, end = 0;
};

// Part `part` of [0, n) cut into `parts` pieces whose sizes differ by at most one.
constexpr Share share_of(std::int64_t n, std::int64_t part, std::int64_t parts) {
  return {n * part / parts, n * (part + 1) / parts};
}

}  // namespace fastllm

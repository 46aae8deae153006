// What the matrix products share: how a vector of finished sums reaches the output.
#pragma once

#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

// Adds bias and the old value, converts, and stores columns [n, n + kW) of row m, those that exist.
template <class Args>
inline void finish_columns(const Args& g, int64_t m, int64_t n, vf s) {
  const int64_t lanes = g.n - n < kW ? g.n - n : kW;
  if (lanes <= 0) return;
  if (g.bias) s += load_some(g.bias + n, lanes);
  const int64_t at = m * g.ldo + n;
  const auto put = [&](auto* out) {
    if (g.accumulate) s += load_some(out + at, lanes);
    store_some(out + at, s, lanes);
  };
  if (g.out_bf16) {
    put(static_cast<uint16_t*>(g.out));
  } else {
    put(static_cast<float*>(g.out));
  }
}

}  // namespace
}  // namespace fastllm::cpu

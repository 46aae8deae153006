// What the matrix products share: bf16 rows as they meet bf16 weights, and how a vector of finished sums reaches the
// output.
#pragma once

#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

inline int64_t pair_bytes(int64_t k) { return kRowBlock * round_up(k, 32) * 2; }

// A block of 32 rows, or the fewer there are: [k / 32][rows][32 k], so that rows lie on consecutive lines whatever ldx
// is: at a power of two, lines of a few rows would take each other's place in the cache.
inline void prepare_pairs(const uint16_t* x, int64_t ldx, int64_t begin, int64_t end, int64_t k, void* prepared) {
  const int64_t blocks = (k + 31) / 32;
  auto* base = static_cast<uint16_t*>(prepared);
  for (int64_t m = begin; m < end; ++m) {
    const int64_t first = m / kRowBlock * kRowBlock, rows = end - first < kRowBlock ? end - first : kRowBlock;
    const uint16_t* row = x + m * ldx;
    uint16_t* to = base + first * blocks * 32 + (m - first) * 32;
    const int64_t whole = k / 32;
    for (int64_t b = 0; b < whole; ++b) __builtin_memcpy(to + b * rows * 32, row + b * 32, 64);
    if (whole < blocks) {
      uint16_t tail[32] = {};
      __builtin_memcpy(tail, row + whole * 32, static_cast<size_t>(k % 32) * 2);
      __builtin_memcpy(to + whole * rows * 32, tail, 64);
    }
  }
}

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

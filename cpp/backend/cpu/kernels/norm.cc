// RMSNorm and LayerNorm of rows, with the residual addition in front when asked for.
//
//   x += delta                                        (when delta is given)
//   mean = layer ? sum(x) / n : 0;  s = 1 / sqrt(sum((x - mean)^2) / n + eps)
//   out = (x - mean) * s * weight (+ bias)
//
// Cost per row: reads and writes every operand once, about 6 operations an element. Benchmark: --benchmark_filter=Norm
#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

template <class In, class Out>
void norm_rows(const NormArgs& a, int64_t row0, int64_t row1) {
  const auto n = static_cast<float>(a.cols);
  for (int64_t row = row0; row < row1; ++row) {
    const In* x = static_cast<const In*>(a.x) + row * a.ldx;
    Out* out = static_cast<Out*>(a.out) + row * a.ldo;
    if constexpr (sizeof(In) == 4) {
      if (a.delta) {
        float* sum_row = const_cast<float*>(x);
        const float* d = a.delta + row * a.ldd;
        for_vectors(a.cols, [&](int64_t i, int64_t lanes) {
          store_some(sum_row + i, load_some(x + i, lanes) + load_some(d + i, lanes), lanes);
        });
      }
    }
    float mean = 0.0f;
    if (a.layer) {
      vf s{};
      for_vectors(a.cols, [&](int64_t i, int64_t lanes) { s += load_some(x + i, lanes); });
      mean = sum(s) / n;
    }
    vf squares{};
    for_vectors(a.cols, [&](int64_t i, int64_t lanes) {
      const vf v = load_some(x + i, lanes);
      if (lanes == kW) {
        const vf d = v - mean;
        squares = fma(d, d, squares);
      } else {
        const vf d = __builtin_convertvector(iota(), vf) < static_cast<float>(lanes) ? v - mean : vf{};
        squares = fma(d, d, squares);
      }
    });
    const float s = inverse_root(sum(squares) / n + a.eps);
    for_vectors(a.cols, [&](int64_t i, int64_t lanes) {
      vf v = (load_some(x + i, lanes) - mean) * s;
      if (a.weight) v *= load_some(a.weight + i, lanes);
      if (a.bias) v += load_some(a.bias + i, lanes);
      store_some(out + i, v, lanes);
    });
  }
}

void norm(const NormArgs& a, int64_t row0, int64_t row1) {
  if (a.x_bf16) {
    a.out_bf16 ? norm_rows<uint16_t, uint16_t>(a, row0, row1) : norm_rows<uint16_t, float>(a, row0, row1);
  } else {
    a.out_bf16 ? norm_rows<float, uint16_t>(a, row0, row1) : norm_rows<float, float>(a, row0, row1);
  }
}

void add(float* x, const float* y, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    store_some(x + i, load_some(x + i, lanes) + load_some(y + i, lanes), lanes);
  });
}

}  // namespace

void FASTLLM_ISA::fill_norm(Kernels& t) {
  t.norm = norm;
  t.add = add;
}

}  // namespace fastllm::cpu

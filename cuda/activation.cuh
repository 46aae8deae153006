// Activation functions on registers, as act.cu and the epilogues of products apply them.
//
//   silu: x / (1 + e^-x)      gelu: x Phi(x)      gelu_tanh: x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
#pragma once

#include "backend/backend.h"

namespace fastllm::cuda {

// x / (1 + e^-y); the bound keeps the divisor within what the fast division takes.
__device__ __forceinline__ float times_sigmoid(float x, float y) {
  return __fdividef(x, 1.0f + __expf(fminf(-y, 85.0f)));
}

// Chooses once for all N.
template <int N>
__device__ __forceinline__ void activate(float (&x)[N], Activation act) {
  auto each = [&x](auto f) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = f(x[i]);
  };
  switch (act) {
    case Activation::Silu:
      return each([](float v) { return times_sigmoid(v, v); });
    case Activation::Gelu:
      return each([](float v) { return 0.5f * v * (1.0f + erff(0.70710678f * v)); });
    case Activation::GeluTanh:
      return each([](float v) { return times_sigmoid(v, 1.59576912f * fmaf(v * v * v, 0.044715f, v)); });
    case Activation::Relu:
      return each([](float v) { return fmaxf(v, 0.0f); });
  }
}

__device__ __forceinline__ float activate(float x, Activation act) {
  float one[1] = {x};
  activate(one, act);
  return one[0];
}

}  // namespace fastllm::cuda

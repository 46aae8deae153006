// The activation functions in fp64, what the tests of kernels and layers hold them against.
#pragma once

#include <algorithm>
#include <cmath>

#include "fastllm/model_spec.h"

namespace fastllm::test {

inline double exact_activation(double x, Activation act) {
  switch (act) {
    case Activation::Silu:
      return x / (1.0 + std::exp(-x));
    case Activation::Gelu:
      return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case Activation::GeluTanh:
      return x / (1.0 + std::exp(-2.0 * std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::Relu:
      return std::max(x, 0.0);
  }
  return NAN;
}

}  // namespace fastllm::test

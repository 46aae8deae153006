// Activations and other element-wise work.
//
//   silu: x / (1 + e^-x)      gelu: x Phi(x)      gelu_tanh: x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
//   gated_act: out = act(gate) * up;   scale_softcap: x = cap * tanh(scale * x / cap)
//
// Cost: every operand once, 15 to 25 operations an element. Benchmark: --benchmark_filter=Act
#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

struct Silu {
  static vf of(vf x) { return x * reciprocal(1.0f + exp(min(-x, set1(85.0f)))); }
};
struct Gelu {
  // erfc(z) = t p(t) e^-z^2, t = 1 / (1 + 0.3275911 z), z >= 0: Abramowitz and Stegun 7.1.26, 1.5e-7
  static vf of(vf x) {
    const vf z = max(x, -x) * 0.70710678f;
    const vf t = reciprocal(1.0f + 0.3275911f * z);
    vf p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const vf tail = 0.5f * x * p * t * exp(-z * z);
    return x > 0.0f ? x - tail : tail;
  }
};
struct GeluTanh {
  static vf of(vf x) {
    const vf twice_u = 1.59576912f * fma(x * x * x, set1(0.044715f), x);
    return x * reciprocal(1.0f + exp(min(-twice_u, set1(85.0f))));
  }
};
struct Relu {
  static vf of(vf x) { return x > 0.0f ? x : vf{}; }
};

template <class F>
void with_act(Act act, F&& f) {
  switch (act) {
    case Act::Silu:
      f(Silu{});
      break;
    case Act::Gelu:
      f(Gelu{});
      break;
    case Act::GeluTanh:
      f(GeluTanh{});
      break;
    case Act::Relu:
      f(Relu{});
      break;
  }
}

template <class T>
void act_as(T* x, int64_t n, Act act) {
  with_act(act, [&](auto fn) {
    for_vectors(n, [&](int64_t i, int64_t lanes) { store_some(x + i, fn.of(load_some(x + i, lanes)), lanes); });
  });
}

template <class T>
void gated_as(T* out, const T* gate, const T* up, int64_t n, Act act) {
  with_act(act, [&](auto fn) {
    for_vectors(n, [&](int64_t i, int64_t lanes) {
      store_some(out + i, fn.of(load_some(gate + i, lanes)) * load_some(up + i, lanes), lanes);
    });
  });
}

void act(void* x, bool bf16, int64_t n, Act kind) {
  bf16 ? act_as(static_cast<uint16_t*>(x), n, kind) : act_as(static_cast<float*>(x), n, kind);
}

void gated_act(void* out, const void* gate, const void* up, bool bf16, int64_t n, Act kind) {
  if (bf16) {
    gated_as(static_cast<uint16_t*>(out), static_cast<const uint16_t*>(gate), static_cast<const uint16_t*>(up), n,
             kind);
  } else {
    gated_as(static_cast<float*>(out), static_cast<const float*>(gate), static_cast<const float*>(up), n, kind);
  }
}

void scale_softcap(float* x, int64_t n, float scale, float softcap) {
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    vf v = load_some(x + i, lanes) * scale;
    if (softcap > 0.0f) v = softcap * tanh(v / softcap);
    store_some(x + i, v, lanes);
  });
}

}  // namespace

void FASTLLM_ISA::fill_act(Kernels& t) {
  t.act = act;
  t.gated_act = gated_act;
  t.scale_softcap = scale_softcap;
}

}  // namespace fastllm::cpu

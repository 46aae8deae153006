// Activations and other element-wise work.
//
//   act: x = f(x), see activation.cuh;   gated_act: out = f(gate) * up;   add: x += y
//   scale_softcap: x = cap * tanh(scale * x / cap)
//
// Cost: every operand once, 10 to 30 operations an element. Benchmark: --benchmark_filter=Act
#include "activation.cuh"
#include "elementwise.h"
#include "rows.cuh"

namespace fastllm::cuda {
namespace {

template <int N>
struct One {
  float v[N];
};
template <int N>
struct Two {
  float a[N], b[N];
};

template <class T>
struct GatedAct {
  T* out;
  const T* gate_up;
  std::int64_t ldo, ldg, cols;
  Activation act;

  template <int N>
  using Loaded = Two<N>;
  template <int N>
  __device__ Two<N> load(std::int64_t row, std::int64_t col) const {
    Two<N> x;
    cuda::load(x.a, gate_up + row * ldg + col);
    cuda::load(x.b, gate_up + row * ldg + cols + col);
    return x;
  }
  template <int N>
  __device__ void store(std::int64_t row, std::int64_t col, Two<N> x) const {
    activate(x.a, act);
#pragma unroll
    for (int i = 0; i < N; ++i) x.a[i] *= x.b[i];
    cuda::store(out + row * ldo + col, x.a);
  }
};

template <class T>
struct Act {
  T* x;
  std::int64_t ldx;
  Activation act;

  template <int N>
  using Loaded = One<N>;
  template <int N>
  __device__ One<N> load(std::int64_t row, std::int64_t col) const {
    One<N> v;
    cuda::load(v.v, x + row * ldx + col);
    return v;
  }
  template <int N>
  __device__ void store(std::int64_t row, std::int64_t col, One<N> v) const {
    activate(v.v, act);
    cuda::store(x + row * ldx + col, v.v);
  }
};

// x += y; the rows of y are ldy apart, all the same row when that is 0.
template <class T>
struct Add {
  T* x;
  const float* y;
  std::int64_t ldx, ldy;

  template <int N>
  using Loaded = Two<N>;
  template <int N>
  __device__ Two<N> load(std::int64_t row, std::int64_t col) const {
    Two<N> v;
    cuda::load(v.a, x + row * ldx + col);
    cuda::load(v.b, y + row * ldy + col);
    return v;
  }
  template <int N>
  __device__ void store(std::int64_t row, std::int64_t col, Two<N> v) const {
#pragma unroll
    for (int i = 0; i < N; ++i) v.a[i] += v.b[i];
    cuda::store(x + row * ldx + col, v.a);
  }
};

struct ScaleSoftcap {
  float* x;
  std::int64_t ldx;
  float scale, softcap;

  template <int N>
  using Loaded = One<N>;
  template <int N>
  __device__ One<N> load(std::int64_t row, std::int64_t col) const {
    One<N> v;
    cuda::load(v.v, x + row * ldx + col);
    return v;
  }
  template <int N>
  __device__ void store(std::int64_t row, std::int64_t col, One<N> v) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v.v[i] *= scale;
      if (softcap > 0) v.v[i] = softcap * tanhf(v.v[i] / softcap);
    }
    cuda::store(x + row * ldx + col, v.v);
  }
};

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of one access

}  // namespace

void gated_act(void* out, std::int64_t ldo, const void* gate_up, std::int64_t ldg, std::int64_t rows, std::int64_t cols,
               DType dtype, Activation act, cudaStream_t stream) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch_rows<kVector<T>>(GatedAct<T>{static_cast<T*>(out), static_cast<const T*>(gate_up), ldo, ldg, cols, act},
                            rows, cols, fits_vectors(kVector<T>, {cols, ldo, ldg}, {out, gate_up}), stream);
  });
}

void act(void* x, std::int64_t ldx, std::int64_t rows, std::int64_t cols, DType dtype, Activation act,
         cudaStream_t stream) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch_rows<kVector<T>>(Act<T>{static_cast<T*>(x), ldx, act}, rows, cols,
                            fits_vectors(kVector<T>, {cols, ldx}, {x}), stream);
  });
}

void add(float* x, std::int64_t ldx, const float* y, std::int64_t ldy, std::int64_t rows, std::int64_t cols,
         cudaStream_t stream) {
  launch_rows<4>(Add<float>{x, y, ldx, ldy}, rows, cols, fits_vectors(4, {cols, ldx, ldy}, {x, y}), stream);
}

void add_bias(void* out, std::int64_t ldo, DType dtype, const float* bias, std::int64_t rows, std::int64_t cols,
              cudaStream_t stream) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch_rows<4>(Add<T>{static_cast<T*>(out), bias, ldo, 0}, rows, cols, fits_vectors(4, {cols, ldo}, {out, bias}),
                   stream);
  });
}

void scale_softcap(float* x, std::int64_t ldx, std::int64_t rows, std::int64_t cols, float scale, float softcap,
                   cudaStream_t stream) {
  launch_rows<4>(ScaleSoftcap{x, ldx, scale, softcap}, rows, cols, fits_vectors(4, {cols, ldx}, {x}), stream);
}

}  // namespace fastllm::cuda

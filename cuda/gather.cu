// Rows picked from a matrix, whatever their elements are; and a long array of fp32 rounded to bf16.
//
//   gather_rows: out[i] = x[rows[i]]        convert_to_bf16: out[i] = bf16(x[i]), to nearest even
//
// Cost: every byte read once and written once. Benchmark: --benchmark_filter=Gather
#include "elementwise.h"
#include "rows.cuh"

namespace fastllm::cuda {
namespace {

// Elements are bytes here; a vector is 16 of them.
struct Gather {
  std::byte* out;
  const std::byte* x;
  std::int64_t out_stride, x_stride;
  const std::int32_t* rows;

  template <int N>
  struct alignas(N) Loaded {
    std::byte v[N];
  };
  template <int N>
  __device__ Loaded<N> load(std::int64_t row, std::int64_t at) const {
    Loaded<N> v;
    const std::byte* from = x + rows[row] * x_stride + at;
    if constexpr (N == 16) {
      *reinterpret_cast<uint4*>(v.v) = *reinterpret_cast<const uint4*>(from);
    } else {
      v.v[0] = *from;
    }
    return v;
  }
  template <int N>
  __device__ void store(std::int64_t row, std::int64_t at, const Loaded<N>& v) const {
    std::byte* to = out + row * out_stride + at;
    if constexpr (N == 16) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(v.v);
    } else {
      *to = v.v[0];
    }
  }
};

struct ToBf16 {
  __nv_bfloat16* out;
  const float* x;

  template <int N>
  struct Loaded {
    float v[N];
  };
  template <int N>
  __device__ Loaded<N> load(std::int64_t, std::int64_t at) const {
    Loaded<N> v;
    cuda::load(v.v, x + at);
    return v;
  }
  template <int N>
  __device__ void store(std::int64_t, std::int64_t at, const Loaded<N>& v) const {
    cuda::store(out + at, v.v);
  }
};

}  // namespace

void gather_rows(void* out, std::size_t out_stride_bytes, const void* x, std::size_t x_stride_bytes,
                 std::size_t row_bytes, const std::int32_t* rows, std::int64_t n, cudaStream_t stream) {
  const auto out_stride = static_cast<std::int64_t>(out_stride_bytes);
  const auto x_stride = static_cast<std::int64_t>(x_stride_bytes), bytes = static_cast<std::int64_t>(row_bytes);
  launch_rows<16>(Gather{static_cast<std::byte*>(out), static_cast<const std::byte*>(x), out_stride, x_stride, rows}, n,
                  bytes, fits_vectors(16, {bytes, out_stride, x_stride}, {out, x}), stream);
}

void convert_to_bf16(std::uint16_t* out, const float* x, std::int64_t n, cudaStream_t stream) {
  auto* to = reinterpret_cast<__nv_bfloat16*>(out);
  const std::int64_t whole = fits_vectors(4, {}, {out, x}) ? n / 4 * 4 : 0;
  if (whole > 0) launch_rows<4>(ToBf16{to, x}, 1, whole, true, stream);
  if (n > whole) launch_rows<4>(ToBf16{to + whole, x + whole}, 1, n - whole, false, stream);
}

}  // namespace fastllm::cuda

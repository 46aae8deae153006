// Rows of the token table, and of the position table on top.
//
//   embed: out[t] = scale * table[ids[t] - id_begin], or 0      add_positions: x[t] += table[positions[t]]
//
// Cost: a row of each operand per token, one operation an element. Benchmark: --benchmark_filter=Embed
#include "elementwise.h"
#include "rows.cuh"

namespace fastllm::cuda {
namespace {

template <class T>
struct Embed {
  float* out;
  const TokenId* ids;
  const T* table;
  std::int64_t rows, cols, id_begin;
  float scale;

  template <int N>
  struct Loaded {
    float v[N];
  };
  template <int N>
  __device__ Loaded<N> load(std::int64_t t, std::int64_t col) const {
    Loaded<N> x{};
    const std::int64_t row = ids[t] - id_begin;
    if (row >= 0 && row < rows) cuda::load(x.v, table + row * cols + col);
    return x;
  }
  template <int N>
  __device__ void store(std::int64_t t, std::int64_t col, Loaded<N> x) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x.v[i] *= scale;
    cuda::store(out + t * cols + col, x.v);
  }
};

struct AddPositions {
  float* x;
  const std::int32_t* positions;
  const float* table;
  std::int64_t cols;

  template <int N>
  struct Loaded {
    float x[N], added[N];
  };
  template <int N>
  __device__ Loaded<N> load(std::int64_t t, std::int64_t col) const {
    Loaded<N> v;
    cuda::load(v.x, x + t * cols + col);
    cuda::load(v.added, table + positions[t] * cols + col);
    return v;
  }
  template <int N>
  __device__ void store(std::int64_t t, std::int64_t col, Loaded<N> v) const {
#pragma unroll
    for (int i = 0; i < N; ++i) v.x[i] += v.added[i];
    cuda::store(x + t * cols + col, v.x);
  }
};

}  // namespace

void embed(float* out, const TokenId* ids, std::int64_t tokens, const void* table, DType table_dtype, std::int64_t rows,
           std::int64_t cols, std::int64_t id_begin, float scale, cudaStream_t stream) {
  const bool vectors = fits_vectors(4, {cols}, {out, table});
  with_float_type(table_dtype, [&](auto type) {
    using T = decltype(type);
    launch_rows<4>(Embed<T>{out, ids, static_cast<const T*>(table), rows, cols, id_begin, scale}, tokens, cols, vectors,
                   stream);
  });
}

void add_positions(float* x, const std::int32_t* positions, std::int64_t tokens, const float* table, std::int64_t cols,
                   cudaStream_t stream) {
  launch_rows<4>(AddPositions{x, positions, table, cols}, tokens, cols, fits_vectors(4, {cols}, {x, table}), stream);
}

}  // namespace fastllm::cuda

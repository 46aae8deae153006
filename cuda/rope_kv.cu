// Norms q and k per head, rotates them in place, and writes k and v of each token into the paged cache.
//
//   q, k = norm(q), norm(k)                                          (where a norm is asked for)
//   (a, b) -> (a cos - b sin, b cos + a sin)     pairs (i, i + dim/2), or (2i, 2i + 1) when interleaved
//   cache[tables[slot][position / block_size]][position % block_size] = k, v
//
// A group of adjacent lanes of a warp owns one head. Each lane holds couples of vectors of N elements, chosen such that
// both elements of every rotated pair are in one lane's registers:
//
//   half:         |a0 a1 a2 .. b0 b1 b2 ..|c0 d0 c1 d1 ..|     lane i: couple (ai, bi), or (ci, di) if not rotated
//   interleaved:  |a0 b0 a1 b1 a2 b2 ..   |c0 d0 c1 d1 ..|
//                  \______ rope dim _____/ \__ the rest __/
//
// Cost per token: (heads + 2 kv_heads) head_dim elements read, q and k written back, k and v written to the cache; 4
// operations a rotated element. Benchmark: --benchmark_filter=RopeKv
#include <bit>
#include <string>

#include "elementwise.h"
#include "launch.cuh"
#include "vec.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kMaxHeadDim = 256;

struct Geometry {
  int lanes;   // of one head: a power of two, at most 32
  int pieces;  // thread blocks of one token
};

// Sum over the aligned group of `lanes` lanes this one belongs to. All lanes of the warp take part.
__device__ __forceinline__ float group_sum(float x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// kCouples: couples of vectors per lane.
template <class T, class Kv, int N, int kCouples>
__global__ void __launch_bounds__(kMaxThreads, 8)
    rope_kv_kernel(const RopeKvCall c, const StepView step, const Geometry g) {
  const std::int64_t token = blockIdx.x / g.pieces;
  const int lane = static_cast<int>(threadIdx.x) % g.lanes;
  const int head = static_cast<int>((blockIdx.x % g.pieces * blockDim.x + threadIdx.x) / g.lanes);
  const bool active = head < c.heads + 2 * c.kv_heads;
  const bool is_q = head < c.heads, is_v = head >= c.heads + c.kv_heads;
  const bool half_style = c.rope.style == RopeStyle::Half;
  const float* weight = is_q ? c.q_weight : is_v ? nullptr : c.k_weight;
  const NormSpec spec = is_q ? c.q_norm : c.k_norm;
  const bool rotates = active && !is_v && c.rope.dim > 0;
  // Offsets within the head of a couple's vectors; the second may lie beyond the end of a head of odd width.
  struct Couple {
    int first, second, pair;  // pair: number of the first rotated pair, -1: not rotated
  };
  const auto couple = [&](int u) {
    const int i = (u * g.lanes + lane) * N;
    if (i < c.rope.dim / 2 && half_style) return Couple{i, c.rope.dim / 2 + i, i};
    return Couple{2 * i, 2 * i + N, i < c.rope.dim / 2 ? i : -1};
  };
  const auto has = [&](int offset) { return active && offset < c.head_dim; };

  pdl_launch();
  if (weight != nullptr) {  // read when registers are free; L1 has them by then
#pragma unroll
    for (int u = 0; u < kCouples; ++u) {
      if (has(couple(u).first)) prefetch_l1(weight + couple(u).first);
      if (has(couple(u).second)) prefetch_l1(weight + couple(u).second);
    }
  }
  pdl_wait();

  const int slot = step.token_slot[token], position = step.positions[token];
  T* row = static_cast<T*>(c.qkv) + token * c.ld + std::int64_t{head} * c.head_dim;
  float x[kCouples][2][N] = {};
#pragma unroll
  for (int u = 0; u < kCouples; ++u) {
    if (has(couple(u).first)) load(x[u][0], row + couple(u).first);
    if (has(couple(u).second)) load(x[u][1], row + couple(u).second);
  }
  float cosine[kCouples][N], sine[kCouples][N];
  const float* angles = c.rope.cos_sin + static_cast<std::int64_t>(position) * c.rope.dim;
#pragma unroll
  for (int u = 0; u < kCouples; ++u) {
    if (rotates && couple(u).pair >= 0) {
      load(cosine[u], angles + couple(u).pair);
      load(sine[u], angles + c.rope.dim / 2 + couple(u).pair);
    }
  }
  std::int64_t block = 0;
  if (active && !is_q && slot >= 0) {
    block = static_cast<std::int64_t>(
        step.tables[static_cast<std::int64_t>(slot) * step.table_width + position / c.kv.block_size]);
  }

  if (c.q_weight != nullptr || c.k_weight != nullptr) {  // the same for all threads, which the sums need
    const auto n = static_cast<float>(c.head_dim);
    float sum = 0;
#pragma unroll
    for (int u = 0; u < kCouples; ++u) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum += x[u][0][i] + x[u][1][i];
    }
    const float mean = group_sum(sum, g.lanes) / n;
    const float shift = spec.kind == NormKind::Layer ? mean : 0.0f;
    float square = 0;
#pragma unroll
    for (int u = 0; u < kCouples; ++u) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (has(couple(u).first)) square = fmaf(x[u][0][i] - shift, x[u][0][i] - shift, square);
        if (has(couple(u).second)) square = fmaf(x[u][1][i] - shift, x[u][1][i] - shift, square);
      }
    }
    const float scale = rsqrtf(group_sum(square, g.lanes) / n + spec.eps);
    const auto apply = [&](float (&v)[N], int offset) {
      float w[N];
      load(w, weight + offset);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = (v[i] - shift) * scale * w[i];
    };
#pragma unroll
    for (int u = 0; u < kCouples; ++u) {
      if (weight != nullptr && has(couple(u).first)) apply(x[u][0], couple(u).first);
      if (weight != nullptr && has(couple(u).second)) apply(x[u][1], couple(u).second);
    }
  }

#pragma unroll
  for (int u = 0; u < kCouples; ++u) {
    if (!rotates || couple(u).pair < 0) continue;
    if (half_style) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float a = x[u][0][i], b = x[u][1][i];
        x[u][0][i] = a * cosine[u][i] - b * sine[u][i];
        x[u][1][i] = b * cosine[u][i] + a * sine[u][i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {  // elements 2i and 2i + 1 of the couple's 2N
        float& a = x[u][2 * i / N][2 * i % N];
        float& b = x[u][(2 * i + 1) / N][(2 * i + 1) % N];
        const float rotated = a * cosine[u][i] - b * sine[u][i];
        b = b * cosine[u][i] + a * sine[u][i];
        a = rotated;
      }
    }
  }

  const int kv_head = is_v ? head - c.heads - c.kv_heads : head - c.heads;
  Kv* cache = static_cast<Kv*>(c.kv.base) + block * c.kv.block_stride + (is_v ? c.kv.kv_stride : 0) +
              kv_head * c.kv.head_stride + static_cast<std::int64_t>(position % c.kv.block_size) * c.head_dim;
#pragma unroll
  for (int u = 0; u < kCouples; ++u) {
    const Couple at = couple(u);
    if (!is_v && (weight != nullptr || rotates)) {
      if (has(at.first)) store(row + at.first, x[u][0]);
      if (has(at.second)) store(row + at.second, x[u][1]);
    }
    if (!is_q) {
      if (has(at.first)) store(cache + at.first, x[u][0]);
      if (has(at.second)) store(cache + at.second, x[u][1]);
    }
  }
}

template <class T, class Kv>
void launch_rope_kv(const RopeKvCall& c, const StepView& step, cudaStream_t stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  constexpr int kMostCouples = kMaxHeadDim / 2 / 32;  // of single elements, per lane
  const bool vectors = c.head_dim % (2 * kVector) == 0 && c.rope.dim % (2 * kVector) == 0 &&
                       fits_vectors(kVector, {c.ld, c.kv.block_stride, c.kv.kv_stride, c.kv.head_stride},
                                    {c.qkv, c.q_weight, c.k_weight, c.rope.cos_sin, c.kv.base});
  const int couples = vectors ? c.head_dim / 2 / kVector : (c.head_dim + 1) / 2;
  const int lanes = std::min(static_cast<int>(std::bit_ceil(static_cast<unsigned>(couples))), 32);
  const int all_heads = c.heads + 2 * c.kv_heads;
  const int pieces = (all_heads * lanes + kMaxThreads - 1) / kMaxThreads;
  const int threads = ((all_heads + pieces - 1) / pieces * lanes + 31) / 32 * 32;
  launch(vectors ? rope_kv_kernel<T, Kv, kVector, 1> : rope_kv_kernel<T, Kv, 1, kMostCouples>,
         static_cast<unsigned>(step.num_tokens) * static_cast<unsigned>(pieces), static_cast<unsigned>(threads), 0,
         stream, c, step, Geometry{lanes, pieces});
}

}  // namespace

void qk_norm_rope_write_kv(const RopeKvCall& given, const StepView& step, cudaStream_t stream) {
  RopeKvCall c = given;
  if (c.head_dim > kMaxHeadDim) {
    throw InvalidArgument("head_dim is " + std::to_string(c.head_dim) + "; the CUDA backend takes at most " +
                          std::to_string(kMaxHeadDim));
  }
  if (c.q_norm.kind == NormKind::None) c.q_weight = nullptr;
  if (c.k_norm.kind == NormKind::None) c.k_weight = nullptr;
  with_float_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (c.kv.dtype == DType::F8E4M3) {
      launch_rope_kv<T, __nv_fp8_e4m3>(c, step, stream);
    } else {
      launch_rope_kv<T, T>(c, step, stream);
    }
  });
}

}  // namespace fastllm::cuda

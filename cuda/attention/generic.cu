// Attention of any shape and dtype: fp32 runs, odd head sizes, odd block sizes. One warp per (token, head):
//
//   for 32 positions at a time:  lane j: s[j] = q . k[position j]             (a row of keys per lane)
//                                running softmax over the lanes
//                                for each j: out += p[j] v[position j]        (dims spread over the lanes)
//
// Reads every key and value once per token and head, mostly from L1 and L2: 4 x positions x head_dim operations in
// fp32. Benchmark: fastllm_bench_cuda --benchmark_filter=Generic
#include <cassert>
#include <type_traits>

#include "attention/attention.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kWarps = 4, kMaxHeadDim = 256, kDimsPerLane = kMaxHeadDim / 32;

struct Params {
  void* out;
  const void* q;
  std::int64_t ldq;
  KvView kv;
  int heads, group, head_dim, window;
  float scale, softcap;
  const float* alibi_slopes;
  const std::int32_t* positions;
  const std::int32_t* token_slot;
  const DeviceRow* first_row;
  const BlockId* tables;
  int table_width;
};

__device__ float load(const float* p) { return *p; }
__device__ float load(const std::uint16_t* p) { return __uint_as_float(static_cast<std::uint32_t>(*p) << 16); }
__device__ float load(const __nv_fp8_e4m3* p) { return static_cast<float>(*p); }
__device__ void store(float* p, float x) { *p = x; }
__device__ void store(std::uint16_t* p, float x) { *p = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Eight neighbours; p is a multiple of eight elements from an aligned base.
__device__ void load8(float (&x)[8], const float* p) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ void load8(float (&x)[8], const std::uint16_t* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack_bf16(words[i]);
    x[2 * i] = f.x, x[2 * i + 1] = f.y;
  }
}
__device__ void load8(float (&x)[8], const __nv_fp8_e4m3* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    __nv_fp8_e4m3 e;
    e.__x = static_cast<__nv_fp8_storage_t>((i < 4 ? v.x : v.y) >> (8 * (i % 4)));
    x[i] = static_cast<float>(e);
  }
}

// q: [head_dim] in shared memory, aligned.
template <class Kv>
__device__ float dot(const float* q, const Kv* key, int head_dim) {
  float sum = 0;
  int d = 0;
  if (head_dim % 8 == 0) {  // then every row is aligned
    for (; d < head_dim; d += 8) {
      float k[8];
      load8(k, key + d);
      const float4 a = *reinterpret_cast<const float4*>(q + d), b = *reinterpret_cast<const float4*>(q + d + 4);
      sum += k[0] * a.x + k[1] * a.y + k[2] * a.z + k[3] * a.w + k[4] * b.x + k[5] * b.y + k[6] * b.z + k[7] * b.w;
    }
  }
  for (; d < head_dim; ++d) sum += q[d] * load(key + d);
  return sum;
}

// Grid: (tokens, heads / kWarps, rounded up). Neighbouring heads share their keys and values in L1.
template <class T, class Kv>
__global__ void __launch_bounds__(32 * kWarps) generic_kernel(const __grid_constant__ Params p) {
  __shared__ alignas(16) float q_rows[kWarps][kMaxHeadDim];
  pdl_wait();
  pdl_launch();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int head = static_cast<int>(blockIdx.y) * kWarps + warp;
  if (head >= p.heads) return;
  const int dim = p.head_dim;
  const std::int64_t token = p.first_row->token_begin + static_cast<std::int64_t>(blockIdx.x);
  const int slot = p.token_slot[token];
  T* const out = static_cast<T*>(p.out) + (token * p.heads + head) * dim;
  if (slot < 0) {  // padding
    for (int d = lane; d < dim; d += 32) store(out + d, 0.0f);
    return;
  }

  float* const q = q_rows[warp];
  const T* const q_row = static_cast<const T*>(p.q) + token * p.ldq + static_cast<std::int64_t>(head) * dim;
  for (int d = lane; d < dim; d += 32) q[d] = load(q_row + d);
  __syncwarp();

  const int last = p.positions[token];
  const float slope = p.alibi_slopes != nullptr ? p.alibi_slopes[head] : 0.0f;
  const Kv* const keys = static_cast<const Kv*>(p.kv.base) + head / p.group * p.kv.head_stride;
  const BlockId* const table = p.tables + static_cast<std::int64_t>(slot) * p.table_width;
  float greatest = -INFINITY, sum = 0, o[kDimsPerLane] = {};
  for (int first = p.window > 0 ? max(0, last + 1 - p.window) : 0; first <= last; first += 32) {
    const int pos = first + lane;
    const Kv* key = nullptr;
    float s = -INFINITY;
    if (pos <= last) {
      key = keys + static_cast<std::int64_t>(table[pos / p.kv.block_size]) * p.kv.block_stride +
            pos % p.kv.block_size * dim;
      s = dot(q, key, dim) * p.scale;
      if (p.softcap > 0) s = p.softcap * tanhf(s / p.softcap);
      s += slope * static_cast<float>(pos - last);
    }
    const float most = fmaxf(greatest, warp_max(s));
    const float rescale = expf(greatest - most), weight = expf(s - most);
    greatest = most;
    sum = sum * rescale + weight;
#pragma unroll
    for (int i = 0; i < kDimsPerLane; ++i) o[i] *= rescale;
    const int count = min(32, last + 1 - first);
    for (int j = 0; j < count; ++j) {
      const float w = __shfl_sync(0xffffffffu, weight, j);
      const auto address = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(key), j);
      const Kv* const value = reinterpret_cast<const Kv*>(address) + p.kv.kv_stride;
#pragma unroll
      for (int i = 0; i < kDimsPerLane; ++i) {
        const int d = lane + 32 * i;
        if (d < dim) o[i] += w * load(value + d);
      }
    }
  }
  const float scale = 1.0f / warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kDimsPerLane; ++i) {
    const int d = lane + 32 * i;
    if (d < dim) store(out + d, o[i] * scale);
  }
}

}  // namespace

void generic_attention(const AttentionCall& call, const StepView& step, int row_begin, int row_end, int num_tokens,
                       cudaStream_t stream) {
  if (row_begin == row_end || num_tokens == 0) return;
  const AttnArgs& a = call.args;
  if (a.head_dim > kMaxHeadDim) {
    throw InvalidArgument("attention with head_dim " + std::to_string(a.head_dim) + ": at most " +
                          std::to_string(kMaxHeadDim) + " on this device");
  }
  const Params p{call.out,          call.q,
                 call.ldq,          call.kv,
                 a.heads,           a.heads / a.kv_heads,
                 a.head_dim,        a.window,
                 a.scale,           a.softcap,
                 call.alibi_slopes, step.positions,
                 step.token_slot,   step.rows + row_begin,
                 step.tables,       step.table_width};
  const dim3 grid(static_cast<unsigned>(num_tokens), static_cast<unsigned>((a.heads + kWarps - 1) / kWarps));
  if (call.dtype == DType::F32 && call.kv.dtype == DType::F32) {
    launch(generic_kernel<float, float>, grid, 32 * kWarps, 0, stream, p);
  } else if (call.dtype == DType::BF16 && call.kv.dtype == DType::BF16) {
    launch(generic_kernel<std::uint16_t, std::uint16_t>, grid, 32 * kWarps, 0, stream, p);
  } else if (call.dtype == DType::BF16 && call.kv.dtype == DType::F8E4M3) {
    launch(generic_kernel<std::uint16_t, __nv_fp8_e4m3>, grid, 32 * kWarps, 0, stream, p);
  } else {
    throw InvalidArgument(std::string("attention in ") + name_of(call.dtype) + " over a cache in " +
                          name_of(call.kv.dtype) + " is not supported");
  }
}

}  // namespace fastllm::cuda

// N adjacent elements of global memory as floats: N = 1, or as many as 16 bytes (two times 16 for 8 floats) hold.
// Addresses are aligned to N elements, 16 bytes at most.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <initializer_list>

#include "ptx.cuh"
#include "tensor/dtype.h"

namespace fastllm::cuda {

template <int N>
__device__ __forceinline__ void load(float (&v)[N], const float* p) {
  static_assert(N == 1 || N == 4 || N == 8);
  if constexpr (N == 1) {
    v[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 f = *reinterpret_cast<const float4*>(p + i);
      v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
    }
  }
}

template <int N>
__device__ __forceinline__ void load(float (&v)[N], const __nv_bfloat16* p) {
  static_assert(N == 1 || N == 4 || N == 8);
  if constexpr (N == 1) {
    v[0] = __bfloat162float(*p);
  } else {
    std::uint32_t bits[N / 2];
    if constexpr (N == 4) {
      const uint2 u = *reinterpret_cast<const uint2*>(p);
      bits[0] = u.x, bits[1] = u.y;
    } else {
      const uint4 u = *reinterpret_cast<const uint4*>(p);
      bits[0] = u.x, bits[1] = u.y, bits[2] = u.z, bits[3] = u.w;
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 f = unpack_bf16(bits[i]);
      v[2 * i] = f.x, v[2 * i + 1] = f.y;
    }
  }
}

template <int N>
__device__ __forceinline__ void store(float* p, const float (&v)[N]) {
  static_assert(N == 1 || N == 4 || N == 8);
  if constexpr (N == 1) {
    *p = v[0];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  }
}

template <int N>
__device__ __forceinline__ void store(__nv_bfloat16* p, const float (&v)[N]) {
  static_assert(N == 1 || N == 4 || N == 8);
  if constexpr (N == 1) {
    *p = __float2bfloat16_rn(v[0]);
  } else if constexpr (N == 4) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  } else {
    *reinterpret_cast<uint4*>(p) =
        make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
  }
}

// Beyond the greatest finite value, 448, the greatest finite value is stored.
template <int N>
__device__ __forceinline__ void store(__nv_fp8_e4m3* p, const float (&v)[N]) {
  static_assert(N == 1 || N == 4 || N == 8);
  if constexpr (N == 1) {
    p->__x = __nv_cvt_float_to_fp8(v[0], __NV_SATFINITE, __NV_E4M3);
  } else {
    std::uint32_t words[N / 4];
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const std::uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(v[i], v[i + 1]), __NV_SATFINITE, __NV_E4M3);
      const std::uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(v[i + 2], v[i + 3]), __NV_SATFINITE, __NV_E4M3);
      words[i / 4] = low | high << 16;
    }
    if constexpr (N == 4) {
      *reinterpret_cast<std::uint32_t*>(p) = words[0];
    } else {
      *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    }
  }
}

// Whether accesses of n elements fit: all counts (widths, strides, offsets in elements) are multiples of n, and all
// pointers are aligned to 16 bytes.
inline bool fits_vectors(int n, std::initializer_list<std::int64_t> counts,
                         std::initializer_list<const void*> pointers) {
  for (const std::int64_t count : counts) {
    if (count % n != 0) return false;
  }
  for (const void* p : pointers) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

// f(T{}) with the device type of F32 or BF16.
template <class F>
void with_float_type(DType dtype, F&& f) {
  if (dtype == DType::BF16) {
    f(__nv_bfloat16{});
  } else {
    f(float{});
  }
}

}  // namespace fastllm::cuda

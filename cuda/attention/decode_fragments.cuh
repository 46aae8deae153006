// How one lane of a warp sees keys, values and queries as operands of m16n8k16. The index that a product sums over may
// be permuted as long as both operands agree, so every lane loads 16 contiguous bytes from global memory and holds
// finished fragments: no shared memory, no shuffles. With lane = 4 g + t:
//
//   S^T = K Q^T    A: positions g and g + 8, dims 8t .. 8t + 7 of every 32     B: head g, the same dims
//   O^T = V^T P^T  A: positions 2t, 2t + 1, 2t + 8, 2t + 9, dims 8g .. of every 64; halves swapped between neighbours
//                  B: S^T's result, transposed 8 x 8 by movmatrix
//
// (fp8: twice as many dims.) A pair is two neighbouring 16-bit elements in one register.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "ptx.cuh"

namespace fastllm::cuda::decode {

// Replaces v if `wanted`. An ordinary load, not .nc: the kernel before may still be writing when this one starts.
// Volatile keeps loads in order; a predicate instead of a branch lets them land in the registers they replace. The keys
// (values) of a head in a cache block are contiguous and all are wanted, so L2 may fetch 256 bytes at a time: a lane's
// neighbours ask for as little as 64 of a row at once.
template <class Raw>
__device__ __forceinline__ void load_past_l1(Raw& v, const std::byte* global, bool wanted) {
  if constexpr (sizeof(Raw) == 16) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.L1::no_allocate.L2::256B"
        ".v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(global), "r"(static_cast<int>(wanted)));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.L1::no_allocate.L2::256B"
        ".v2.u32 {%0, %1}, [%2]; }"
        : "+r"(v.x), "+r"(v.y)
        : "l"(global), "r"(static_cast<int>(wanted)));
  }
}
// Volatile keeps it in its loop.
__device__ __forceinline__ uint4 load_shared(const uint4* shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem_address(shared))
               : "memory");
  return v;
}

__device__ __forceinline__ std::uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ std::uint32_t word(const uint2& v, int i) { return i == 0 ? v.x : v.y; }

// Transposes an 8x8 matrix of 16-bit elements; lane 4g + t holds elements 2t and 2t + 1 of row g.
__device__ __forceinline__ std::uint32_t transpose8x8(std::uint32_t pair) {
  std::uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

struct Bf16Cache {
  static constexpr int kBytes = 2;         // of an element
  static constexpr int kPairsPerWord = 1;  // of 4 bytes
  static __device__ __forceinline__ std::uint32_t pair(std::uint32_t word, int) { return word; }
  static __device__ __forceinline__ std::uint32_t query(std::uint32_t bf16_pair) { return bf16_pair; }
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  static __device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
};

// e4m3 becomes fp16, which holds it exactly and takes one instruction per pair; queries and weights follow.
struct Fp8Cache {
  static constexpr int kBytes = 1;
  static constexpr int kPairsPerWord = 2;
  static __device__ __forceinline__ std::uint32_t pair(std::uint32_t word, int i) {
    const auto two = static_cast<__nv_fp8x2_storage_t>(i == 0 ? word & 0xffffu : word >> 16);
    const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
    return static_cast<std::uint32_t>(h.x) | static_cast<std::uint32_t>(h.y) << 16;
  }
  static __device__ __forceinline__ std::uint32_t query(std::uint32_t bf16_pair) {
    const float2 f = unpack_bf16(bf16_pair);
    return pack(fminf(fmaxf(f.x, -65504.0f), 65504.0f), fminf(fmaxf(f.y, -65504.0f), 65504.0f));
  }
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(v);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// What a lane holds of 16 positions of one kv head.
template <class Cache, int kHeadDim>
struct Lane {
  static constexpr int kRowBytes = kHeadDim * Cache::kBytes;
  static constexpr int kKeyLoads = kRowBytes / 64;  // per row; 4 lanes share a row
  using ValueRaw = std::conditional_t<kRowBytes >= 128, uint4, uint2>;
  static constexpr int kValueWords = sizeof(ValueRaw) / 4;
  static constexpr int kValueLoads = kRowBytes / 8 / static_cast<int>(sizeof(ValueRaw));  // per row; 8 lanes share one
  static constexpr int kValueDims = kValueWords * 2 * Cache::kPairsPerWord;               // contiguous dims of one load
  static constexpr int kTiles = kHeadDim / 16;                                            // of 16 dims: rows of O^T

  // Loads c of `keys` hold dims of pairs [c * kPairsPerKeyLoad, ...).
  static constexpr int kPairsPerKeyLoad = 4 * Cache::kPairsPerWord;

  static constexpr int kQueryLoads = kHeadDim / 32;  // of four pairs

  // Pairs [4i, 4i + 4) of the lane. query: head g's row, or null for no such head.
  static __device__ __forceinline__ uint4 load_query(const std::byte* query, int i, int t) {
    if (query == nullptr) return {0, 0, 0, 0};
    constexpr int kLoads = Cache::kPairsPerWord;  // whose 16 bytes are neighbours, like those of one key load
    const uint4 v = *reinterpret_cast<const uint4*>(query + (i / kLoads * 4 * kLoads + t * kLoads + i % kLoads) * 16);
    return {Cache::query(v.x), Cache::query(v.y), Cache::query(v.z), Cache::query(v.w)};
  }

  // s += 16 positions x 8 heads, from dims of load c; s has two sums so that products need not wait for each other.
  static __device__ __forceinline__ void add_scores(float (&s)[2][4], const uint4& low, const uint4& high,
                                                    const std::uint32_t (&q)[kPairsPerKeyLoad]) {
#pragma unroll
    for (int i = 0; i < kPairsPerKeyLoad; i += 2) {
      const auto pair = [](const uint4& v, int k) {
        return Cache::pair(word(v, k / Cache::kPairsPerWord), k % Cache::kPairsPerWord);
      };
      const std::uint32_t a[4] = {pair(low, i), pair(high, i), pair(low, i + 1), pair(high, i + 1)};
      Cache::mma(s[i / 2 % 2], a, q[i], q[i + 1]);
    }
  }

  // o += V^T P^T for the dims of load c. rows: positions 2t, 2t + 1, 2t + 8, 2t + 9. Tile k of the load holds dims 2k
  // (elements 0, 1) and 2k + 1 (elements 2, 3) of heads 2t and 2t + 1.
  static __device__ __forceinline__ void add_values(float (&o)[kTiles][4], int c, const ValueRaw& r0,
                                                    const ValueRaw& r1, const ValueRaw& r2, const ValueRaw& r3,
                                                    std::uint32_t p0, std::uint32_t p1) {
#pragma unroll
    for (int i = 0; i < kValueDims / 2; ++i) {
      const int w = i / Cache::kPairsPerWord, k = i % Cache::kPairsPerWord;
      const std::uint32_t x0 = Cache::pair(word(r0, w), k), x1 = Cache::pair(word(r1, w), k);
      const std::uint32_t x2 = Cache::pair(word(r2, w), k), x3 = Cache::pair(word(r3, w), k);
      const std::uint32_t a[4] = {__byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410),
                                  __byte_perm(x2, x3, 0x7632)};
      Cache::mma(o[c * (kValueDims / 2) + i], a, p0, p1);
    }
  }
};

}  // namespace fastllm::cuda::decode

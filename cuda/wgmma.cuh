// Thin wrappers of what only sm_90a has (PTX ISA 9.0): matrix products by a warpgroup of 128 threads, and the barriers
// in shared memory that order them with copies. Include from *_sm90.cu only.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace fastllm::cuda {

// --- mbarriers: 8 bytes of shared memory each. A phase ends when `count` arrivals were counted ---

__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}
// By the thread that initialised them, before the block's barrier.
__device__ __forceinline__ void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}
// This thread arrives once all its cp.async copies so far have landed; it does not wait.
__device__ __forceinline__ void mbarrier_arrive_after_copies(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}
// Until the phase of this parity has ended; before the first phase, the one of parity 1 counts as ended. A wait that no
// working kernel can need ends the launch with an error instead of hanging the device.
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, unsigned parity) {
  constexpr int kTries = 1 << 22;
  for (int i = 0; i < kTries; ++i) {
    std::uint32_t ended;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(ended)
                 : "r"(smem_address(barrier)), "r"(parity)
                 : "memory");
    if (ended != 0) return;
  }
  __trap();
}

// Shared memory written by ordinary stores or cp.async, and ordered before this call, is visible to wgmma after it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- barriers 1 to 15 of a block, among `threads` threads; arriving does not wait ---

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- registers move between the warpgroups of a block; all warps of a warpgroup call it ---

template <int N>
__device__ __forceinline__ void give_registers_until() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void take_registers_until() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// --- wgmma ---

// A tile in shared memory whose rows of 128 bytes have their 16-byte chunks permuted: chunk c of row r lies at c ^ (r %
// 8). It begins at a multiple of 1024 bytes. Rows run along the operand's M or N if it is K-major, along K if it is
// MN-major (and then `next_columns` is the distance in bytes of the next 64 elements of M or N).
__device__ __forceinline__ std::uint64_t wgmma_descriptor(const void* tile, int next_columns = 16) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightRows = 1024;  // bytes
  return kSwizzle128 | (kEightRows >> 4) << 32 | static_cast<std::uint64_t>(next_columns >> 4) << 16 |
         ((smem_address(tile) & 0x3ffff) >> 4);
}
// The descriptor of what lies `bytes` further on.
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

// Before the first product, and whenever registers of its operands were written since the last.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the newest groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler takes accumulators for ready when the product is issued. After the wait, this keeps their uses there.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

// Operand lists: accumulator registers i .. i + 7, and so on; and their places in the instruction.
#define FASTLLM_D(i) "+f"(d[(i) / 4][(i) % 4])
#define FASTLLM_D8(i)                                                                                     \
  FASTLLM_D(i), FASTLLM_D(i + 1), FASTLLM_D(i + 2), FASTLLM_D(i + 3), FASTLLM_D(i + 4), FASTLLM_D(i + 5), \
      FASTLLM_D(i + 6), FASTLLM_D(i + 7)
#define FASTLLM_D32(i) FASTLLM_D8(i), FASTLLM_D8(i + 8), FASTLLM_D8(i + 16), FASTLLM_D8(i + 24)
#define FASTLLM_P0_31                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLLM_P32_63                                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTLLM_P64_95                                                                                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTLLM_P96_111 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTLLM_P112_127 \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d[64, N] (+)= a[64, 16] b[16, N]. Thread layouts of d and of a in registers: those of mma.m16n8k16, warp w of the
// warpgroup holding rows [16 w, 16 w + 16).

// a and b in shared memory, both K-major.
__device__ __forceinline__ void wgmma_ss(float (&d)[16][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{" FASTLLM_P0_31 FASTLLM_P32_63 "}, %64, %65, p, 1, 1, 0, 0;}"
      : FASTLLM_D32(0), FASTLLM_D32(32)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void wgmma_ss(float (&d)[24][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %98, 0; wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" FASTLLM_P0_31
          FASTLLM_P32_63 FASTLLM_P64_95 "}, %96, %97, p, 1, 1, 0, 0;}"
      : FASTLLM_D32(0), FASTLLM_D32(32), FASTLLM_D32(64)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void wgmma_ss(float (&d)[28][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %114, 0; wgmma.mma_async.sync.aligned.m64n224k16.f32.bf16.bf16 {" FASTLLM_P0_31
          FASTLLM_P32_63 FASTLLM_P64_95 FASTLLM_P96_111 "}, %112, %113, p, 1, 1, 0, 0;}"
      : FASTLLM_D32(0), FASTLLM_D32(32), FASTLLM_D32(64), FASTLLM_D8(96), FASTLLM_D8(104)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void wgmma_ss(float (&d)[32][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" FASTLLM_P0_31
          FASTLLM_P32_63 FASTLLM_P64_95 FASTLLM_P96_111 FASTLLM_P112_127 "}, %128, %129, p, 1, 1, 0, 0;}"
      : FASTLLM_D32(0), FASTLLM_D32(32), FASTLLM_D32(64), FASTLLM_D32(96)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// a in registers, b in shared memory, MN-major.
__device__ __forceinline__ void wgmma_rs(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FASTLLM_P0_31
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : FASTLLM_D32(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_rs(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FASTLLM_P0_31 FASTLLM_P32_63
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : FASTLLM_D32(0), FASTLLM_D32(32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef FASTLLM_D
#undef FASTLLM_D8
#undef FASTLLM_D32
#undef FASTLLM_P0_31
#undef FASTLLM_P32_63
#undef FASTLLM_P64_95
#undef FASTLLM_P96_111
#undef FASTLLM_P112_127

}  // namespace fastllm::cuda

// AMX tiles in inline assembly.
#pragma once

#include <stdint.h>

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kTile = 512;  // elements of a bf16 tile of 16 rows

// GCC 12 declares too little of what its tile intrinsics touch and drops stores; these name all of it.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};
inline void configure(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c) : "memory"); }
inline void release() { __asm__ volatile("tilerelease" ::: "memory"); }

// Tile registers by number. GCC and clang print %c as a bare constant.
#define FASTLLM_TILE __attribute__((always_inline)) inline void
template <int T>
FASTLLM_TILE load_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// Leaves the lines out of the first-level cache.
template <int T>
FASTLLM_TILE load_tile_once(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FASTLLM_TILE store_tile(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FASTLLM_TILE zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
}
// C += A B, of bf16.
template <int C, int A, int B>
FASTLLM_TILE dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}
// The same of bytes, with signs or without. AMX-INT8 is another bit of CPUID than AMX-BF16.
template <bool kSignedA, bool kSignedB, int C, int A, int B>
FASTLLM_TILE dot_bytes() {
  if constexpr (kSignedA && kSignedB) {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
  } else if constexpr (kSignedA) {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
  } else {
    static_assert(kSignedB);
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
  }
}
#undef FASTLLM_TILE

}  // namespace
}  // namespace fastllm::cpu

#endif

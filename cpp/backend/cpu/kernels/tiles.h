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
#define TILE_LOAD(t, p, stride)                                                       \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(static_cast<const void*>(p)), \
                   "r"(static_cast<int64_t>(stride))                                  \
                   : "memory")
// Leaves the lines out of the first-level cache.
#define TILE_LOAD_ONCE(t, p, stride)                                                    \
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #t::"r"(static_cast<const void*>(p)), \
                   "r"(static_cast<int64_t>(stride))                                    \
                   : "memory")
#define TILE_STORE(t, p, stride)                                                                                       \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(static_cast<void*>(p)), "r"(static_cast<int64_t>(stride)) \
                   : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t::: "memory")
#define TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")
// A is signed bytes, B signed or unsigned ones. AMX-INT8 is another bit of CPUID than AMX-BF16.
#define TILE_DOT_SIGNED(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")
#define TILE_DOT_UNSIGNED(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")

}  // namespace
}  // namespace fastllm::cpu

#endif

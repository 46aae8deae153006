#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "backend/cpu/isa.h"
#include "backend/cpu/memory.h"
#include "base/cpu_placement.h"
#include "base/thread_pool.h"
#include "bench_ceilings.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastllm::bench {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best rate of `work` units over runs of f on every thread of the pool. Where other programs take cores too, it takes
// many short runs to find one that had them all.
template <class F>
double best_rate(ThreadPool& pool, double work, F&& f) {
  constexpr double kSeconds = 0.2;
  const double end = now() + kSeconds;
  double best = 0;
  for (int i = 0; i < 8 || now() < end; ++i) {
    const double start = now();
    pool.run([&](int t) { f(t); });
    best = std::max(best, work / (now() - start));
  }
  return best;
}

double read_rate(ThreadPool& pool) {
  constexpr std::size_t kBytes = std::size_t{256} << 20;
  const cpu::Pages pages(kBytes);
  std::memset(pages.data(), 1, kBytes);
  const auto* lines = static_cast<const std::uint64_t*>(pages.data());
  const std::size_t n = kBytes / 64, each = n / static_cast<std::size_t>(pool.size());
  return best_rate(pool, static_cast<double>(kBytes), [&](int t) {
    std::uint64_t sum = 0;
    const std::size_t begin = each * static_cast<std::size_t>(t);
    for (std::size_t i = begin; i < begin + each; ++i) {
      __builtin_prefetch(lines + (i + 128) * 8);
      sum += lines[i * 8];
    }
    benchmark::DoNotOptimize(sum);
  });
}

constexpr int kRounds = 200000;

#if defined(__x86_64__)
// The instructions are spelled out, so this file needs no instruction-set flags. Twelve sums wait for nothing.
#define FASTLLM_ONE(op, reg, i) op " %%" reg "0,%%" reg "0,%%" reg #i "\n"
#define FASTLLM_FOUR(op, reg, i, j, k, l) \
  FASTLLM_ONE(op, reg, i) FASTLLM_ONE(op, reg, j) FASTLLM_ONE(op, reg, k) FASTLLM_ONE(op, reg, l)
#define FASTLLM_TWELVE(name, op, reg)                                                                            \
  void name(int) {                                                                                               \
    for (int i = 0; i < kRounds; ++i) {                                                                          \
      __asm__ volatile(FASTLLM_FOUR(op, reg, 1, 2, 3, 4) FASTLLM_FOUR(op, reg, 5, 6, 7, 8)                       \
                           FASTLLM_FOUR(op, reg, 9, 10, 11, 12)::                                                \
                               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                                 "xmm10", "xmm11", "xmm12");                                                     \
    }                                                                                                            \
  }
FASTLLM_TWELVE(fma_512, "vfmadd231ps", "zmm")
FASTLLM_TWELVE(fma_256, "vfmadd231ps", "ymm")
FASTLLM_TWELVE(pairs_512, "vdpbf16ps", "zmm")  // bf16: two neighbouring products are added to each 32-bit number
FASTLLM_TWELVE(vnni_512, "vpdpbusd", "zmm")    // int8: four
FASTLLM_TWELVE(vnni_256, "%{vex%} vpdpbusd", "ymm")

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
template <class F>
void with_tiles(F&& f) {
  const TileConfig c;
  __asm__ volatile("ldtilecfg %0" ::"m"(c) : "memory");
  for (int i = 0; i < kRounds / 8; ++i) f();
  __asm__ volatile("tilerelease" ::: "memory");
}
void tiles_bf16(int) {
  with_tiles([] {
    __asm__ volatile(
        "tdpbf16ps %tmm7,%tmm6,%tmm0\n tdpbf16ps %tmm7,%tmm6,%tmm1\n"
        "tdpbf16ps %tmm7,%tmm6,%tmm2\n tdpbf16ps %tmm7,%tmm6,%tmm3");
  });
}
void tiles_int8(int) {
  with_tiles([] {
    __asm__ volatile(
        "tdpbssd %tmm7,%tmm6,%tmm0\n tdpbssd %tmm7,%tmm6,%tmm1\n"
        "tdpbssd %tmm7,%tmm6,%tmm2\n tdpbssd %tmm7,%tmm6,%tmm3");
  });
}

// What the machine has beyond the instruction sets of the kernels.
struct Int8Features {
  bool tiles = false, vnni_512 = false, vnni_256 = false;
};
Int8Features int8_features() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Int8Features f;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.vnni_512 = (c >> 11 & 1) != 0;
    f.tiles = (d >> 25 & 1) != 0;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.vnni_256 = (a >> 4 & 1) != 0;
  return f;
}
#endif

void fma_plain(int) {
  float x[16] = {};
  for (int i = 0; i < kRounds; ++i) {
    for (float& v : x) v = v * 0.5f + 1.0f;
    benchmark::DoNotOptimize(x);
  }
}

Ceilings measure() {
  Ceilings c;
  const auto isas = cpu::available_isas();
  const auto has = [&](const char* name) { return std::find(isas.begin(), isas.end(), name) != isas.end(); };
  const bool amx = has("amx");  // asks for the permission before the pool starts its threads
  ThreadPool one(1), all(threads());
  const double n = all.size();
  c.read_one = read_rate(one);
  c.read_all = read_rate(all);
#if defined(__x86_64__)
  if (has("avx512")) {
    c.fp32 = best_rate(all, n * kRounds * 12 * 32, fma_512);
  } else if (has("avx2")) {
    c.fp32 = best_rate(all, n * kRounds * 12 * 16, fma_256);
  }
  const Int8Features int8 = int8_features();
  if (has("avx512") && int8.vnni_512) {
    c.int8_vnni = best_rate(all, n * kRounds * 12 * 128, vnni_512);
  } else if (has("avx2") && int8.vnni_256) {
    c.int8_vnni = best_rate(all, n * kRounds * 12 * 64, vnni_256);
  }
  if (amx) {
    constexpr double kBf16 = 16 * 16 * 32 * 2, kInt8 = 2 * kBf16;  // operations of one tile product
    c.bf16 = best_rate(all, n * (kRounds / 8) * 4 * kBf16, tiles_bf16);
    if (int8.tiles) c.int8 = best_rate(all, n * (kRounds / 8) * 4 * kInt8, tiles_int8);
  } else if (has("avx512_bf16")) {
    c.bf16 = best_rate(all, n * kRounds * 12 * 64, pairs_512);
  }
#endif
  if (c.fp32 == 0) c.fp32 = best_rate(all, n * kRounds * 32, fma_plain);
  return c;
}

void BM_Ceilings(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(ceilings());
  const Ceilings& c = ceilings();
  state.counters["read_1t_GB/s"] = c.read_one * 1e-9;
  state.counters["read_GB/s"] = c.read_all * 1e-9;
  state.counters["fp32_GFLOP/s"] = c.fp32 * 1e-9;
  state.counters["bf16_GFLOP/s"] = c.bf16 * 1e-9;
  state.counters["int8_GOP/s"] = c.int8 * 1e-9;
  state.counters["int8_vnni_GOP/s"] = c.int8_vnni * 1e-9;
  state.counters["threads"] = threads();
}
BENCHMARK(BM_Ceilings)->Iterations(1)->Name("Ceilings");

}  // namespace

const Ceilings& ceilings() {
  static const Ceilings measured = measure();
  return measured;
}

int threads() {
  const char* env = std::getenv("FASTLLM_BENCH_THREADS");
  return env ? std::max(1, std::atoi(env)) : usable_cores();
}

}  // namespace fastllm::bench

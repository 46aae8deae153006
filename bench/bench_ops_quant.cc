// The kernels of grouped weights beside the dense bf16 product, at two matrices of a 1.1B model.
//
//   fastllm_bench_ops --benchmark_filter=Quant
//
// GB/s and "of_read" count the bytes of the weights alone, which rotate through more memory than the caches hold.
// GOP/s counts two operations for each weight and row.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/memory.h"
#include "base/thread_pool.h"
#include "bench_ceilings.h"
#include "tensor/dtype.h"

namespace fastllm::bench {
namespace {

using namespace cpu;

struct Format {
  const char* name;
  int bits;  // 16: dense bf16
  bool offsets;
  std::int64_t group;
};
constexpr Format kFormats[] = {{"bf16", 16, false, 32},       {"8bit", 8, false, 32},
                               {"8bit+offsets", 8, true, 32}, {"4bit", 4, false, 32},
                               {"4bit+offsets", 4, true, 32}, {"8bit/128", 8, false, 128},
                               {"4bit/64", 4, false, 64},     {"4bit+offsets/128", 4, true, 128}};

std::int64_t weight_bytes(const Format& f, std::int64_t n, std::int64_t k) {
  const std::int64_t blocks = n / kPanel * (k / f.group);
  return blocks * (f.bits == 16 ? kPanel * f.group * 2 : quant_block_bytes(f.bits, f.group, f.offsets));
}

int zero_of(const Format& f) { return f.offsets ? 0 : 1 << (f.bits - 1); }

// Bytes that are small positive numbers as bf16 and as fp16 too.
void fill(void* p, std::int64_t bytes) {
  auto* b = static_cast<std::uint8_t*>(p);
  for (std::int64_t i = 0; i < bytes; ++i) b[i] = i % 2 == 0 ? static_cast<std::uint8_t>(i * 7919 >> 4) : 0x2c;
}

void quant(benchmark::State& state, const Format& f, std::int64_t m, std::int64_t n, std::int64_t k) {
  const Kernels kernels = select_kernels("");
  ThreadPool pool(threads());
  const std::int64_t bytes = weight_bytes(f, n, k),
                     copies = std::max<std::int64_t>(2, (std::int64_t{400} << 20) / bytes);
  const Pages weights(static_cast<std::size_t>(bytes * copies));
  fill(weights.data(), bytes * copies);
  const std::vector<bf16> x(static_cast<std::size_t>(m * k), to_bf16(0.5f));
  std::vector<bf16> out(static_cast<std::size_t>(m * n));
  const std::int64_t row_blocks = (m + kRowBlock - 1) / kRowBlock, panels = n / kPanel, count = pool.size();
  const bool dense = f.bits == 16;
  const std::int64_t block_bytes = dense ? kernels.prepared_bytes(k) : kernels.prepared_quant_bytes(k);
  const Pages prepared(static_cast<std::size_t>(block_bytes * row_blocks));
  // Rows whose activations stay in the second-level cache.
  const std::int64_t group = std::max<std::int64_t>(1, (1 << 20) / block_bytes) * kRowBlock;
  const std::int64_t sums_each = round_up(
      dense ? kernels.gemm_sums(std::min(m, group), panels, k) : kernels.quant_sums(std::min(m, group), k, f.group),
      32);
  const Pages sums(static_cast<std::size_t>(sums_each * 4 * count));
  std::int64_t at = 0;
  for (auto _ : state) {
    const auto* w = static_cast<const std::byte*>(weights.data()) + at * bytes;
    pool.run([&](int i) {
      for (std::int64_t b = row_blocks * i / count; b < row_blocks * (i + 1) / count; ++b) {
        const std::int64_t begin = b * kRowBlock, end = std::min(m, begin + kRowBlock);
        if (dense) {
          kernels.prepare_bf16(reinterpret_cast<const std::uint16_t*>(x.data()), k, begin, end, k, prepared.data());
        } else {
          kernels.prepare_quant({x.data(), true, k, k, f.group, f.offsets, zero_of(f), nullptr}, begin, end,
                                prepared.data());
        }
      }
    });
    pool.run([&](int i) {
      const std::int64_t p0 = panels * i / count, p1 = panels * (i + 1) / count;
      for (std::int64_t m0 = 0; m0 < m; m0 += group) {
        const std::int64_t m1 = std::min(m, m0 + group);
        if (dense) {
          GemmArgs g{};
          g.a = prepared.data(), g.w = w, g.m = m, g.n = n, g.k = k, g.out = out.data(), g.ldo = n, g.out_bf16 = true;
          g.sums = static_cast<float*>(sums.data()) + sums_each * i;
          kernels.gemm_bf16(g, m0, m1, p0, p1);
        } else {
          QuantArgs g{};
          g.a = prepared.data(), g.w = w, g.m = m, g.n = n, g.k = k, g.out = out.data(), g.ldo = n, g.out_bf16 = true;
          g.bits = f.bits, g.group = f.group, g.offsets = f.offsets, g.zero = zero_of(f);
          g.sums = static_cast<float*>(sums.data()) + sums_each * i;
          kernels.gemm_quant(g, m0, m1, p0, p1);
        }
      }
    });
    at = (at + 1) % copies;
  }
  using benchmark::Counter;
  const double runs = static_cast<double>(state.iterations()), read = static_cast<double>(bytes) * runs;
  state.counters["GB/s"] = Counter(read * 1e-9, Counter::kIsRate);
  state.counters["of_read"] = Counter(read / ceilings().read_all, Counter::kIsRate);
  state.counters["GOP/s"] = Counter(2e-9 * static_cast<double>(m * n * k) * runs, Counter::kIsRate);
}

const bool registered = [] {
  for (const auto& [n, k] : {std::pair{2048, 2048}, std::pair{5632, 2048}}) {
    for (const int m : {1, 4, 16, 64, 512}) {
      for (const Format& f : kFormats) {
        const auto name = std::string("Quant/") + f.name + "/" + std::to_string(n) + "x" + std::to_string(k) +
                          "/M:" + std::to_string(m);
        benchmark::RegisterBenchmark(name.c_str(), quant, f, m, n, k)->UseRealTime()->Unit(benchmark::kMicrosecond);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace fastllm::bench

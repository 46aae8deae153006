// The choice of codes for fp32 rows of 5632 numbers on one thread, for every instruction set of this machine.
//
//   fastllm_bench_ops --benchmark_filter=ChooseCodes
#include <benchmark/benchmark.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/choose_codes.h"
#include "backend/cpu/isa.h"

namespace fastllm::bench {
namespace {

void choose(benchmark::State& state, const std::string& isa, const GroupFormat& f) {
  constexpr std::int64_t kNumbers = 5632;
  const cpu::Kernels kernels = cpu::select_kernels(isa);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> x(kNumbers), scales(kNumbers), offsets(kNumbers);
  for (float& v : x) v = normal(random);
  std::vector<std::uint8_t> codes(kNumbers);
  for (auto _ : state) {
    cpu::choose_codes(kernels, f, x.data(), kNumbers, codes.data(), scales.data(),
                      f.offsets ? offsets.data() : nullptr);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kNumbers);
}

const bool registered = [] {
  for (const std::string& isa : cpu::available_isas()) {
    for (const GroupFormat& f : {GroupFormat{8, false, 128}, GroupFormat{4, true, 0}, GroupFormat{4, true, 0, 128}}) {
      const std::string name = "ChooseCodes/" + isa + "/" + std::to_string(f.bits) + "bit" +
                               (f.offsets ? "+offsets/" : "/") + std::to_string(f.size);
      benchmark::RegisterBenchmark(name.c_str(), choose, isa, f);
    }
  }
  return true;
}();

}  // namespace
}  // namespace fastllm::bench

#include <algorithm>
#include <cstdint>

#include "bandwidth.h"
#include "check.h"
#include "fastllm/error.h"
#include "gemm_lt.h"
#include "gpu_timing.h"

namespace fastllm::bench {
namespace {

constexpr std::size_t kBytes = std::size_t{2} << 30;  // forty times the L2 cache of an H100

double bf16_rate(cudaStream_t stream) {
  constexpr std::int64_t kSize = 8192;
  const std::size_t bytes = std::size_t{kSize} * kSize * 2;
  try {
    const Rotation x(bytes, bytes), w(bytes, bytes), out(bytes, bytes);
    cuda::GemmCall call;
    call.out = out.at(0);
    call.ldo = kSize;
    call.x = x.at(0);
    call.ldx = kSize;
    call.m = kSize;
    call.w = {w.at(0), DType::BF16, kSize, kSize};
    const cuda::LtContext context;
    cuda::LtProduct product(context, cuda::shape_of(call), false);
    const auto algos = product.propose(kSize, 1);
    if (algos.empty()) return 0;
    return 2.0 * kSize * kSize * kSize / seconds_per_call(stream, 8, [&](int) { product.run(call, algos[0], stream); });
  } catch (const Error&) {
    return 0;  // no cuBLASLt
  }
}

Ceilings measure_once() {
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  Ceilings c;
  {
    const Rotation data(kBytes, kBytes), sink(256, 256);
    const auto n = static_cast<double>(kBytes);
    c.read =
        n / seconds_per_call(stream, 4, [&](int) { cuda::read_all(data.at(0), kBytes, sink.as<unsigned>(0), stream); });
    c.copy = n / seconds_per_call(stream, 4, [&](int) {
               cuda::copy_all(data.as<std::byte>(0) + kBytes / 2, data.at(0), kBytes / 2, stream);
             });
    c.write = n / seconds_per_call(stream, 4, [&](int i) {
                cuda::write_all(data.at(0), kBytes, 0x3f9d3e2bu + static_cast<unsigned>(i), stream);
              });
  }
  c.bf16 = bf16_rate(stream);
  cudaStreamDestroy(stream);
  return c;
}

void BM_Ceilings(benchmark::State& state) {
  try {
    for (auto _ : state) benchmark::DoNotOptimize(measure_ceilings());
    const Ceilings& c = measure_ceilings();
    state.counters["read_GB/s"] = c.read * 1e-9;
    state.counters["write_GB/s"] = c.write * 1e-9;
    state.counters["copy_GB/s"] = c.copy * 1e-9;
    state.counters["bf16_TFLOP/s"] = c.bf16 * 1e-12;
  } catch (const std::exception& e) {
    state.SkipWithError(e.what());
  }
}
BENCHMARK(BM_Ceilings)->Iterations(1)->Name("Ceilings");

}  // namespace

const Ceilings& measure_ceilings() {
  static const Ceilings measured = measure_once();
  return measured;
}

}  // namespace fastllm::bench

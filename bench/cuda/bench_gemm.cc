// Products as three models of 8B, 1B and 135M parameters ask for them, with weights that come from device memory.
//
//   --benchmark_filter='^Gemm/'           as the engine computes them: tuned, own kernels included
//   --benchmark_filter='^GemmFirst/'      cuBLASLt's first proposal
//   --benchmark_filter='^GemmGated/'      gate and up with the activation: fused, or in two kernels if that is faster
//   --benchmark_filter='^GemmSkinny/'     configurations of the own kernels: s<strips>w<k_warps>b<blocks_per_sm>, and
//                                         r<1: weights are called into L2 all along, 0: at the start>
//   --benchmark_filter='^GemmTile/'       widths of tiles in the tiled kernel; its label is what the
//                                         model of costs expects, in microseconds; GemmTileGated likewise
//   --benchmark_filter='^GemmAfterNorm/'  a norm and the own kernel that waits for it: alone, then calling weights
//                                         into L2
#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "elementwise.h"
#include "fastllm/error.h"
#include "gemm.h"
#include "gemm_lt.h"
#include "gemm_tile.h"
#include "gpu_timing.h"
#include "skinny.h"

namespace fastllm::bench {
namespace {

using cuda::Gemm;
using cuda::GemmCall;
using cuda::kTileCols;

struct Shape {
  const char* name;
  std::int64_t n, k;
  DType out;
  bool accumulate;
};

constexpr Shape kLarge[] = {
    {"8b_qkv", 6144, 4096, DType::BF16, false},      {"8b_o", 4096, 4096, DType::F32, true},
    {"8b_gate_up", 28672, 4096, DType::BF16, false}, {"8b_down", 4096, 14336, DType::F32, true},
    {"8b_lm_head", 128256, 4096, DType::F32, false},
};
constexpr Shape kSmall[] = {
    {"1b_qkv", 3072, 2048, DType::BF16, false},      {"1b_o", 2048, 2048, DType::F32, true},
    {"1b_gate_up", 16384, 2048, DType::BF16, false}, {"1b_down", 2048, 8192, DType::F32, true},
    {"1b_lm_head", 128256, 2048, DType::F32, false}, {"135m_qkv", 960, 576, DType::BF16, false},
    {"135m_o", 576, 576, DType::F32, true},          {"135m_gate_up", 3072, 576, DType::BF16, false},
    {"135m_down", 576, 1536, DType::F32, true},      {"135m_lm_head", 49152, 576, DType::F32, false},
};

struct Operands {
  Operands(const Shape& s, std::int64_t m)
      : weights(static_cast<std::size_t>(s.n * s.k) * 2, std::size_t{420} << 20),
        x(static_cast<std::size_t>(m * s.k) * 2, 1),
        out(static_cast<std::size_t>(m * s.n) * size_of(s.out), 1) {
    call.out = out.at(0);
    call.out_dtype = s.out;
    call.ldo = s.n;
    call.x = x.at(0);
    call.ldx = s.k;
    call.m = m;
    call.w = {weights.at(0), DType::BF16, s.n, s.k};
    call.accumulate = s.accumulate;
    const auto n = static_cast<double>(s.n), k = static_cast<double>(s.k), rows = static_cast<double>(m);
    const double out_bytes = rows * n * static_cast<double>(size_of(s.out));
    work = {2 * n * k + 2 * rows * k + (s.accumulate ? out_bytes : 0), out_bytes, 2 * rows * n * k};
  }
  GemmCall turn(int i) const {
    GemmCall c = call;
    c.w.data = weights.at(i);
    return c;
  }
  int calls() const {
    constexpr double kGraphSeconds = 2e-3;
    return static_cast<int>(std::clamp(kGraphSeconds / floor_seconds(work), 2.0, 256.0));
  }

  Rotation weights, x, out;
  GemmCall call;
  Work work;
};

void tune(Gemm& gemm, const Shape& s, const Operands& o) {
  const std::int64_t ms[] = {o.call.m};
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreate(&stream), "cudaStreamCreate");
  gemm.tune(o.call.w, s.out, s.accumulate, ms, stream);
  cudaStreamDestroy(stream);
}

// What a benchmark throws becomes its result.
template <class F>
void guarded(benchmark::State& state, F&& body) {
  try {
    body();
  } catch (const std::exception& e) {
    state.SkipWithError(e.what());
  }
}

void tuned(benchmark::State& state, const Shape& s, std::int64_t m) {
  guarded(state, [&] {
    const Operands o(s, m);
    Gemm gemm({});
    tune(gemm, s, o);
    measure(state, o.work, o.calls(), [&](int i, cudaStream_t stream) { gemm.run(o.turn(i), stream); });
  });
}

void first_proposal(benchmark::State& state, const Shape& s, std::int64_t m) {
  guarded(state, [&] {
    const Operands o(s, m);
    const cuda::LtContext context;
    cuda::LtProduct product(context, cuda::shape_of(o.call), false);
    const auto algos = product.propose(m, 1);
    if (algos.empty()) return state.SkipWithError("cuBLASLt proposes nothing");
    measure(state, o.work, o.calls(), [&](int i, cudaStream_t stream) { product.run(o.turn(i), algos[0], stream); });
  });
}

void gated(benchmark::State& state, const Shape& s, std::int64_t m) {
  guarded(state, [&] {
    const Operands o(s, m);
    const Rotation gated(static_cast<std::size_t>(m * s.n), 1);
    Gemm gemm({});
    tune(gemm, s, o);
    bool fused = false;
    measure(state, o.work, o.calls(), [&](int i, cudaStream_t stream) {
      GemmCall c = o.turn(i);
      c.out = gated.at(0);
      c.ldo = s.n / 2;
      fused = gemm.run_gated(c, static_cast<int>(Activation::Silu), stream);
      if (fused) return;
      gemm.run(o.turn(i), stream);
      cuda::gated_act(c.out, c.ldo, o.call.out, s.n, m, s.n / 2, DType::BF16, Activation::Silu, stream);
    });
    state.SetLabel(fused ? "fused" : "two kernels");
  });
}

struct OwnKernels {
  OwnKernels() {
    int device = 0, shared = 0;
    cuda::check(cudaGetDevice(&device), "cudaGetDevice");
    cuda::check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    cuda::check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                "cudaDeviceGetAttribute");
    if (!cuda::prepare_skinny(static_cast<std::size_t>(shared))) throw ResourceError("too little shared memory");
    configs = cuda::skinny_configs();
  }
  int num_sms = 0;
  std::vector<cuda::SkinnyConfig> configs;
};

void skinny(benchmark::State& state, const Shape& s, std::int64_t m, const cuda::SkinnyConfig& config) {
  guarded(state, [&] {
    const Operands o(s, m);
    const OwnKernels own;
    measure(state, o.work, o.calls(), [&](int i, cudaStream_t stream) {
      cuda::skinny_gemm(o.turn(i), std::nullopt, config, own.num_sms, stream);
    });
  });
}

void tiled(benchmark::State& state, const Shape& s, std::int64_t m, int cols, bool gated) {
  guarded(state, [&] {
    const auto tiles = cuda::TileGemm::make(90);
    if (!tiles) return state.SkipWithError("no tiled kernel for this device");
    const Operands o(s, m);
    const std::optional<Activation> act = gated ? std::optional(Activation::Silu) : std::nullopt;
    measure(state, o.work, o.calls(), [&](int i, cudaStream_t stream) {
      GemmCall c = o.turn(i);
      if (gated) c.ldo = s.n / 2;
      tiles->run(c, act, cols, stream);
    });
    state.SetLabel(std::to_string(cuda::expected_tile_us(cols, m, s.n, s.k, gated, tiles->clusters())));
  });
}

void after_norm(benchmark::State& state, const Shape& s, std::int64_t m, int prefetch_bytes) {
  guarded(state, [&] {
    const Operands o(s, m);
    const OwnKernels own;
    const Rotation residual(static_cast<std::size_t>(m * s.k) * 4, 1), scale(static_cast<std::size_t>(s.k) * 4, 1);
    cuda::NormCall norm;
    norm.x = residual.at(0);
    norm.out = o.x.at(0);
    norm.rows = m;
    norm.cols = norm.ldx = norm.ldo = s.k;
    norm.eps = 1e-5f;
    norm.weight = scale.as<float>(0);
    measure(state, o.work, o.calls(), [&](int i, cudaStream_t stream) {
      cuda::norm(norm, stream);
      cuda::skinny_gemm(o.turn(i), std::nullopt, cuda::SkinnyConfig{2, 8, 2, false}, own.num_sms, stream,
                        prefetch_bytes);
    });
  });
}

void add(const std::string& name, std::function<void(benchmark::State&)> body) {
  gpu_benchmark(benchmark::RegisterBenchmark(name.c_str(), std::move(body)));
}

void add_config(const Shape& s, std::int64_t m, const cuda::SkinnyConfig& c) {
  const std::string config = "s" + std::to_string(c.strips) + "w" + std::to_string(c.k_warps) + "b" +
                             std::to_string(c.blocks_per_sm) + "r" + std::to_string(static_cast<int>(c.rolling));
  add(std::string("GemmSkinny/") + s.name + "/" + std::to_string(m) + "/" + config,
      [&s, m, c](benchmark::State& state) { skinny(state, s, m, c); });
}

void add_shape(const Shape& s, const std::vector<std::int64_t>& ms) {
  const bool is_head = s.out == DType::F32 && !s.accumulate, is_gate_up = std::string(s.name).ends_with("gate_up");
  for (const std::int64_t m : ms) {
    if (is_head && m > 512) continue;  // no step has so many rows that sample
    const std::string which = std::string("/") + s.name + "/" + std::to_string(m);
    add("Gemm" + which, [&s, m](benchmark::State& state) { tuned(state, s, m); });
    add("GemmFirst" + which, [&s, m](benchmark::State& state) { first_proposal(state, s, m); });
    if (is_gate_up) add("GemmGated" + which, [&s, m](benchmark::State& state) { gated(state, s, m); });
    for (const int cols : kTileCols) {
      if (m < cuda::kSkinnyRows) break;
      const std::string width = which + "/" + std::to_string(cols);
      add("GemmTile" + width, [&s, m, cols](benchmark::State& state) { tiled(state, s, m, cols, false); });
      if (is_gate_up)
        add("GemmTileGated" + width, [&s, m, cols](benchmark::State& state) { tiled(state, s, m, cols, true); });
    }
    if (m != 1 && m != 8 && m != 16) continue;
    for (const int bytes : {0, cuda::kSkinnyPrefetch}) {
      add("GemmAfterNorm" + which + "/" + std::to_string(bytes),
          [&s, m, bytes](benchmark::State& state) { after_norm(state, s, m, bytes); });
    }
    for (const int strips : {1, 2, 4}) {
      for (const int k_warps : {2, 4, 8}) {
        for (const int blocks : {1, 2}) {
          for (const bool rolling : {false, true}) add_config(s, m, {strips, k_warps, blocks, rolling});
        }
      }
    }
  }
}

const bool registered = [] {
  for (const Shape& s : kLarge) add_shape(s, {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192});
  for (const Shape& s : kSmall) add_shape(s, {1, 2, 4, 8, 16, 32, 64, 256, 2048});
  return true;
}();

}  // namespace
}  // namespace fastllm::bench

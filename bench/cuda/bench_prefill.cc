// Prefill attention over paged KV: blocks of 16 positions, shuffled, that come from device memory.
//
//   --benchmark_filter='^Prefill/sm90'   wgmma
//   --benchmark_filter='^Prefill/mma'    mma.sync
//
// Floating-point operations are those of the visible (query, position) pairs. `fa2_us` and `fa3_us` are what FlashInfer
// 0.6.14 (FA2 kernels) and FlashAttention-3 (in vLLM 0.26) took for the same on an H100.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/prefill_plan.h"
#include "paged_attention.h"

namespace fastllm::bench {
namespace {

using cuda::DeviceRow;

struct Shape {
  const char* name;
  int sequences, prefix, tokens;  // of each sequence: positions cached before, and new
  int heads, kv_heads, head_dim;
  DType kv = DType::BF16;
  double fa2_us = 0, fa3_us = 0;  // 0: not measured
};

constexpr Shape kShapes[] = {
    {"1x2048", 1, 0, 2048, 32, 8, 128, DType::BF16, 168, 74.6},
    {"1x8192", 1, 0, 8192, 32, 8, 128, DType::BF16, 1686, 913},
    {"16x512", 16, 0, 512, 32, 8, 128, DType::BF16, 173, 139},
    {"4x2048", 4, 0, 2048, 32, 8, 128},
    {"1x512_after_4096", 1, 4096, 512, 32, 8, 128},
    {"4x512_after_4096", 4, 4096, 512, 32, 8, 128},
    {"64x8_after_1024", 64, 1024, 8, 32, 8, 128},
    {"1x1_after_4096", 1, 4096, 1, 32, 8, 128},
    {"d64_1x2048", 1, 0, 2048, 32, 8, 64},
    {"d64_1x8192", 1, 0, 8192, 32, 8, 64},
    {"d64_16x512", 16, 0, 512, 32, 8, 64},
    {"mha_1x2048", 1, 0, 2048, 32, 32, 128},
    {"fp8_1x2048", 1, 0, 2048, 32, 8, 128, DType::F8E4M3},
    {"fp8_1x8192", 1, 0, 8192, 32, 8, 128, DType::F8E4M3},
};

struct Problem {
  explicit Problem(const Shape& s) {
    limits.max_rows = s.sequences;
    limits.max_tokens = s.sequences * s.tokens;
    limits.max_len = s.prefix + s.tokens;
    table_width = (limits.max_len + kBlockSize - 1) / kBlockSize;
    for (int i = 0; i < s.sequences; ++i) rows.push_back({i * s.tokens, s.tokens, s.prefix, i});
    tables = blocks_of_pool(s.sequences * table_width);
    plan_bytes.resize(cuda::prefill_plan_bytes(limits));
    plan = cuda::write_prefill_plan(rows, 0, limits, plan_bytes.data(), nullptr);

    const double pairs = s.sequences * (double{1} * s.tokens * s.prefix + s.tokens * (s.tokens + 1.0) / 2);
    const double q_bytes = 2.0 * limits.max_tokens * s.heads * s.head_dim;
    kv = {s.kv, 1, s.kv_heads, kBlockSize, s.head_dim};
    pool_bytes = tables.size() * static_cast<std::size_t>(kv.block_bytes());
    work = {q_bytes + static_cast<double>(pool_bytes), q_bytes, 4.0 * pairs * s.heads * s.head_dim};
  }

  cuda::AttentionLimits limits = device_limits();
  int table_width = 0;
  std::vector<DeviceRow> rows;
  std::vector<BlockId> tables;
  std::vector<std::byte> plan_bytes;
  cuda::PrefillPlan plan;
  KvShape kv;
  std::size_t pool_bytes = 0;
  Work work;
};

enum class Kernel { Mma, Sm90 };

void run(benchmark::State& state, const Shape& s, Kernel kernel) {
  try {
    Problem problem(s);
    const Upload<DeviceRow> rows(problem.rows);
    const Upload<BlockId> tables(problem.tables);
    const Upload<std::byte> plan(problem.plan_bytes);
    problem.plan.device = plan.get();
    const std::int64_t ldq = (s.heads + 2 * s.kv_heads) * s.head_dim, tokens = problem.limits.max_tokens;
    const Rotation pool(problem.pool_bytes), q(static_cast<std::size_t>(tokens * ldq * 2), 1),
        out(static_cast<std::size_t>(tokens * s.heads * s.head_dim * 2), 1);
    cuda::StepView step;
    step.rows = rows.get();
    step.tables = tables.get();
    step.table_width = problem.table_width;
    step.num_tokens = static_cast<int>(tokens);
    step.num_rows = s.sequences;
    cuda::AttentionCall call;
    call.out = out.at(0);
    call.q = q.at(0);
    call.ldq = ldq;
    call.args = {s.heads, s.kv_heads, s.head_dim, s.head_dim == 64 ? 0.125f : 0.0883883f, 0, 0, {}};
    call.kv = layer_view(pool.at(0), problem.kv, 0);
    bool takes = kernel == Kernel::Mma && cuda::prefill_mma_takes(call, problem.limits);
#ifdef FASTLLM_WITH_SM90A
    takes = takes || (kernel == Kernel::Sm90 && cuda::prefill_sm90_takes(call, problem.limits));
#endif
    if (!takes) return state.SkipWithError("this kernel does not take the shape on this device");
    const int calls = static_cast<int>(std::clamp(2e-3 / floor_seconds(problem.work), 3.0, 50.0));
    measure(state, problem.work, calls, [&](int i, cudaStream_t stream) {
      cuda::AttentionCall c = call;
      c.kv = layer_view(pool.at(i), problem.kv, 0);
      if (kernel == Kernel::Mma) cuda::prefill_mma(c, step, problem.plan, stream);
#ifdef FASTLLM_WITH_SM90A
      if (kernel == Kernel::Sm90) cuda::prefill_sm90(c, step, problem.plan, problem.limits, stream);
#endif
    });
    if (s.fa2_us > 0) state.counters["fa2_us"] = s.fa2_us;
    if (s.fa3_us > 0) state.counters["fa3_us"] = s.fa3_us;
  } catch (const std::exception& e) {
    state.SkipWithError(e.what());
  }
}

const bool registered = [] {
  for (const auto& [name, kernel] : {std::pair{"sm90", Kernel::Sm90}, std::pair{"mma", Kernel::Mma}})
    for (const Shape& s : kShapes) {
      const std::string full = std::string("Prefill/") + name + "/" + s.name;
      gpu_benchmark(
          benchmark::RegisterBenchmark(full.c_str(), [&s, k = kernel](benchmark::State& state) { run(state, s, k); }));
    }
  return true;
}();

}  // namespace
}  // namespace fastllm::bench

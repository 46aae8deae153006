// Host costs without a model: blocks, prefix cache, planning, and the whole engine on the null model.
//   fastllm_bench_host --benchmark_filter=...
// Targets: planning 256 decode rows under 50 us; the engine above 100,000 tokens/s on one core.
#include <benchmark/benchmark.h>

#include <chrono>
#include <memory>
#include <numeric>
#include <vector>

#include "fastllm/engine.h"
#include "kv/kv_manager.h"
#include "runtime/engine_loop.h"
#include "runtime/null_executor.h"
#include "sched/scheduler.h"

namespace fastllm {
namespace {

constexpr int kBlockSize = 16;  // tokens

KvConfig kv_config(std::int64_t blocks) { return {blocks + 1, 0, kBlockSize, true, hash_prefix}; }

RequestInput request(std::uint64_t id, int prompt_tokens, int max_tokens) {
  RequestInput input;
  input.id = id;
  input.prompt.resize(static_cast<std::size_t>(prompt_tokens));
  std::iota(input.prompt.begin(), input.prompt.end(), static_cast<TokenId>(id % 1000));
  input.sampling.max_tokens = max_tokens;
  input.sampling.ignore_eos = true;
  return input;
}

void BM_AllocFree(benchmark::State& state) {
  BlockAllocator pool(4096, 1);
  std::vector<BlockId> blocks(256);
  for (auto _ : state) {
    for (BlockId& block : blocks) block = pool.alloc();
    for (BlockId block : blocks) pool.unref(block, false);
  }
  state.SetItemsProcessed(state.iterations() * 256);
}
BENCHMARK(BM_AllocFree);

void BM_PrefixMatch(benchmark::State& state) {
  KvManager kv(kv_config(4096));
  const RequestInput input = request(1, static_cast<int>(state.range(0)), 1);
  StepPlan plan;
  BlockTable owner, reader;
  owner.root = owner.tail = reader.root = kv.root("", -1);
  kv.reserve(owner, SlotId{0}, 0, state.range(0), plan);
  kv.publish(owner, input.prompt, state.range(0));
  for (auto _ : state) {
    benchmark::DoNotOptimize(kv.match_prefix(reader, input.prompt));
    kv.release(reader);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(BM_PrefixMatch)->Arg(1024)->Arg(8192);

void BM_PrefixPublish(benchmark::State& state) {
  KvManager kv(kv_config(1024));
  const RequestInput input = request(1, 1024, 1);
  StepPlan plan;
  BlockTable table;
  table.root = table.tail = kv.root("", -1);
  for (auto _ : state) {
    plan.clear();
    kv.reserve(table, SlotId{0}, 0, 1024, plan);
    kv.publish(table, input.prompt, 1024);
    kv.release(table);
    kv.reset_cache();
  }
  state.SetItemsProcessed(state.iterations() * 1024);
}
BENCHMARK(BM_PrefixPublish);

// One step of decoding: schedule() alone, then with on_result() and the deltas.
void decode(benchmark::State& state, bool apply_results) {
  const int rows = static_cast<int>(state.range(0));
  EngineConfig config;
  config.max_num_seqs = rows;
  config.max_step_tokens = 1 << 20;
  ModelLimits model{32000, 1 << 20, {}};
  StepResult result;
  std::vector<TokenDelta> deltas;
  std::unique_ptr<Scheduler> scheduler;
  PlannedStep step;
  const TimePoint now = Clock::now();
  const auto apply = [&] {
    result.tokens.assign(step.plan.rows.size(), 5);
    scheduler->on_result(step, result, now);
    scheduler->take_deltas(deltas);
  };
  int left = 0;
  double schedule_s = 0;
  for (auto _ : state) {
    if (left == 0) {
      state.PauseTiming();
      scheduler = std::make_unique<Scheduler>(config, model, kv_config(rows * 96));
      for (int id = 0; id < rows; ++id) scheduler->add(request(static_cast<std::uint64_t>(id), 200, 1100), now);
      scheduler->schedule(step, now);
      apply();
      left = 1000;
      state.ResumeTiming();
    }
    --left;
    const TimePoint begin = Clock::now();
    scheduler->schedule(step, now);
    const double took = std::chrono::duration<double>(Clock::now() - begin).count();
    schedule_s += took;
    apply();
    if (!apply_results) state.SetIterationTime(took);
  }
  state.counters["schedule_us"] = schedule_s * 1e6 / static_cast<double>(state.iterations());
  state.SetItemsProcessed(state.iterations() * rows);
}
void BM_ScheduleDecode(benchmark::State& state) { decode(state, false); }
void BM_DecodeTurn(benchmark::State& state) { decode(state, true); }
BENCHMARK(BM_ScheduleDecode)->Arg(1)->Arg(32)->Arg(256)->UseManualTime();
BENCHMARK(BM_DecodeTurn)->Arg(256);

// The engine loop with its thread: `requests` concurrent ones of 200 + 128 tokens, replaced as they end.
void BM_EngineNull(benchmark::State& state) {
  EngineConfig config;
  NullModel model;
  const KvConfig kv = kv_config(16384);
  auto executor = make_null_executor(config, model);
  executor->init_kv(kv.device_blocks, kv.host_blocks);
  EngineLoop loop(config, {model.vocab, model.max_len, model.eos}, kv, std::move(executor));
  std::uint64_t next_id = 0;
  std::vector<TokenDelta> deltas;
  for (; next_id < static_cast<std::uint64_t>(state.range(0)); ++next_id) loop.submit(request(next_id, 200, 128));
  std::int64_t tokens = 0;
  for (auto _ : state) {
    for (int turns = 0; turns < 64; ++turns) {
      loop.poll(deltas, std::chrono::seconds(10));
      for (const TokenDelta& d : deltas) {
        tokens += static_cast<std::int64_t>(d.tokens.size());
        if (d.finish != FinishReason::None) loop.submit(request(next_id++, 200, 128));
      }
    }
  }
  state.SetItemsProcessed(tokens);
}
BENCHMARK(BM_EngineNull)->Arg(1)->Arg(256)->UseRealTime()->MeasureProcessCPUTime();

}  // namespace
}  // namespace fastllm

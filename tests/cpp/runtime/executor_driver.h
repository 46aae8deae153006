// Drives the local executor with plans made by hand, for a few sequences of a small model.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "model_fixture.h"
#include "recording_backend.h"
#include "runtime/executor.h"
#include "runtime/local_executor.h"

namespace fastllm::testing {

inline constexpr int kBlock = 4, kMaxLen = 64, kSlots = 4, kBlocksPerSlot = kMaxLen / kBlock;

inline EngineConfig test_config(int ranks = 1) {
  EngineConfig c;
  c.dtype = "float32";
  c.max_model_len = kMaxLen, c.max_num_seqs = kSlots, c.max_step_tokens = 64, c.block_size = kBlock;
  c.tensor_parallel_size = ranks, c.cpu_threads = 2;
  return c;
}

// Sequence i lives in slot i and in the blocks that belong to the slot.
struct Sequence {
  int slot = 0;
  std::vector<TokenId> tokens;
  std::int32_t num_prompt = 0;
  std::shared_ptr<const SamplingParams> params = std::make_shared<SamplingParams>();
  std::shared_ptr<LogitsProcessor> processor;
  std::int32_t num_computed = 0;
};

class Driver {
 public:
  Driver(const TestModel& model, const EngineConfig& config)
      : Driver(make_local_executor(config, model.source(), {})) {}
  // On a backend that pads and records.
  Driver(const TestModel& model, const EngineConfig& config, std::vector<int> sizes, RecordingBackend::Log& log)
      : Driver(make_local_executor(config, model.source(), {}, [&](int) -> std::unique_ptr<Backend> {
          return std::make_unique<RecordingBackend>(sizes, log);
        })) {}
  Executor& executor() { return *executor_; }
  StepPlan& plan() { return plan_; }

  void begin() {
    plan_.clear();
    plan_.id = next_id_++;
  }
  void admit(const Sequence& s) {
    SlotInit init{SlotId{s.slot}, s.params, s.params->seed.value_or(7), {}, s.num_prompt, s.processor};
    if (needs_history(*s.params)) init.tokens = s.tokens;
    plan_.new_slots.push_back(std::move(init));
    for (int b = 0; b < kBlocksPerSlot; ++b)
      plan_.table_sets.push_back({SlotId{s.slot}, b, static_cast<BlockId>(1 + s.slot * kBlocksPerSlot + b)});
  }
  // Plans the next `n` tokens; samples when they reach the end.
  void add_row(Sequence& s, std::int32_t n, std::uint8_t flags = 0) {
    const auto begin = static_cast<std::int32_t>(plan_.tokens.size());
    for (std::int32_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::size_t>(s.num_computed + i);
      plan_.tokens.push_back((flags & kFromSlot) != 0 ? -1 : s.tokens.at(at));
    }
    if ((flags & kFromSlot) != 0 || s.num_computed + n == static_cast<std::int32_t>(s.tokens.size())) flags |= kSample;
    plan_.rows.push_back({SlotId{s.slot}, s.num_computed, n, 0, begin, flags});
    s.num_computed += n;
  }
  const StepResult& run() {
    executor_->submit(plan_);
    const StepResult& r = executor_->wait(plan_.id);
    EXPECT_EQ(r.error, "");
    return r;
  }
  // Admits s, prefills in chunks and decodes `n` tokens.
  void generate(Sequence& s, int n, int chunk = kMaxLen) {
    begin();
    admit(s);
    for (int i = 0; i < n;) {
      if (i > 0 || s.num_computed > 0) begin();
      add_row(s, std::min<std::int32_t>(chunk, static_cast<std::int32_t>(s.tokens.size()) - s.num_computed));
      const StepResult& r = run();
      if (r.tokens.empty()) continue;
      s.tokens.push_back(r.tokens[0]);
      ++i;
    }
  }

 private:
  explicit Driver(std::unique_ptr<Executor> executor) : executor_(std::move(executor)) {
    executor_->init_kv(1 + kSlots * kBlocksPerSlot, kBlocksPerSlot);
  }

  StepPlan plan_;  // outlives the executor, which may still read it
  std::unique_ptr<Executor> executor_;
  std::uint64_t next_id_ = 1;
};

inline Sequence sequence(std::vector<TokenId> prompt, SamplingParams params, int slot = 0) {
  Sequence s;
  s.slot = slot;
  s.num_prompt = static_cast<std::int32_t>(prompt.size());
  s.tokens = std::move(prompt);
  s.params = std::make_shared<SamplingParams>(std::move(params));
  return s;
}

inline SamplingParams greedy() {
  SamplingParams p;
  p.temperature = 0;
  return p;
}

inline SamplingParams sampled_with_penalties() {
  SamplingParams p;
  p.temperature = 1.3f, p.top_p = 0.95f, p.top_k = 40, p.seed = 99;
  p.repetition_penalty = 1.2f, p.presence_penalty = 0.5f, p.frequency_penalty = 0.4f;
  return p;
}

inline std::vector<TokenId> prompt(int n = 11) {
  std::vector<TokenId> ids(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<TokenId>((i * 31 + 7) % 97);
  return ids;
}

inline const TestModel& llama() {
  static const TestModel m = random_model(llama_spec(), 11);
  return m;
}

}  // namespace fastllm::testing

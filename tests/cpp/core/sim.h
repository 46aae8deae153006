// The scheduler and the null model in one thread, step by step: what the engine loop does, without its thread, so that
// a test decides when a result arrives. Checks the invariants after every call.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fastllm/engine.h"
#include "runtime/null_executor.h"
#include "sched/invariants.h"
#include "sched/scheduler.h"

namespace fastllm::test {

struct Output {
  std::vector<TokenId> tokens;
  std::vector<PositionLogprobs> logprobs, prompt_logprobs;
  FinishReason finish = FinishReason::None;
  TokenId stop_token = -1;
  int cached_tokens = 0;
  int num_preemptions = 0;
  int num_finishes = 0;
  std::string error;
  RequestTimes times;
};

struct SimConfig {
  EngineConfig engine;
  NullModel model;
  std::int64_t host_blocks = 0;
  PrefixHash hash = hash_prefix;
  std::int64_t resident_blocks = std::numeric_limits<std::int64_t>::max();
};

// A small engine: blocks of 4 tokens, 64 of them.
inline SimConfig small_config() {
  SimConfig c;
  c.engine.max_num_seqs = 8;
  c.engine.max_step_tokens = 64;
  c.engine.block_size = 4;
  c.engine.num_blocks = 64;
  c.model.vocab = 1000;
  c.model.max_len = 128;
  return c;
}

class Sim {
 public:
  explicit Sim(const SimConfig& c)
      : kv_{c.engine.num_blocks + 1, c.host_blocks, c.engine.block_size,
            c.engine.prefix_caching, c.hash,        c.resident_blocks},
        ring_(static_cast<std::size_t>(c.engine.async_depth)),
        vocab_(c.model.vocab),
        scheduler_(c.engine, {c.model.vocab, c.model.max_len, c.model.eos}, kv_),
        executor_(make_null_executor(c.engine, c.model)) {
    executor_->init_kv(kv_.device_blocks, kv_.host_blocks);
  }

  void add(RequestInput input) {
    scheduler_.add(std::move(input), now);
    check();
  }
  void abort(std::uint64_t id) {
    scheduler_.abort(id, now);
    check();
  }

  bool can_submit() const { return submitted_ - waited_ < ring_.size(); }
  std::uint64_t inflight() const { return submitted_ - waited_; }

  // Schedules and submits one plan.
  bool submit() {
    PlannedStep& step = ring_[submitted_ % ring_.size()];
    if (!scheduler_.schedule(step, now)) {
      check();
      return false;
    }
    ++submitted_;
    max_rows = std::max(max_rows, step.plan.rows.size());
    last_plan = &step.plan;
    executor_->submit(step.plan);
    if (!step.plan.masked_rows.empty()) {
      const std::size_t words = (static_cast<std::size_t>(vocab_) + 31) / 32;
      std::vector<std::uint32_t> bits(step.plan.masked_rows.size() * words);
      for (std::size_t i = 0; i < step.plan.masked_rows.size(); ++i) {
        const auto row = static_cast<std::size_t>(step.plan.masked_rows[i]);
        step.seqs[row]->mask->fill(std::span(bits).subspan(i * words, words));
      }
      executor_->set_masks(step.plan.id, bits);
    }
    check();
    return true;
  }

  // Waits for the oldest plan and applies its result.
  void finish() {
    const PlannedStep& step = ring_[waited_ % ring_.size()];
    const StepResult& result = executor_->wait(step.plan.id);
    ++waited_;
    scheduler_.on_result(step, result, now);
    check();
  }

  // What the engine loop does in one turn.
  void turn() {
    const bool planned = can_submit() && submit();
    if (inflight() > 0 && (!can_submit() || !planned)) finish();
  }

  void run(int max_turns = 200000) {
    for (int i = 0; i < max_turns && (scheduler_.has_requests() || inflight() > 0); ++i) turn();
    ASSERT_TRUE(scheduler_.idle()) << "requests are stuck";
    EXPECT_EQ(scheduler_.kv().snapshot().used, 0) << "blocks leaked";
    EXPECT_EQ(scheduler_.kv().snapshot().host_used, 0) << "host blocks leaked";
  }

  const Output& output(std::uint64_t id, int index = 0) { return outputs[{id, index}]; }
  EngineStats stats() const {
    EngineStats stats;
    scheduler_.fill_stats(stats);
    return stats;
  }
  Scheduler& scheduler() { return scheduler_; }

  std::map<std::pair<std::uint64_t, int>, Output> outputs;  // by id and index
  TimePoint now{};
  std::size_t max_rows = 0;
  const StepPlan* last_plan = nullptr;
  bool check_each = true;

 private:
  void check() {
    if (check_each) {
      const std::string broken = broken_invariant(scheduler_);
      ASSERT_EQ(broken, "");
    }
    scheduler_.take_deltas(deltas_);
    for (TokenDelta& d : deltas_) {
      Output& out = outputs[{d.id, d.index}];
      EXPECT_EQ(out.num_finishes, 0) << "a delta after the end of " << d.id << "/" << d.index;
      out.tokens.insert(out.tokens.end(), d.tokens.begin(), d.tokens.end());
      out.logprobs.insert(out.logprobs.end(), d.logprobs.begin(), d.logprobs.end());
      out.prompt_logprobs.insert(out.prompt_logprobs.end(), d.prompt_logprobs.begin(), d.prompt_logprobs.end());
      out.finish = d.finish;
      out.stop_token = d.stop_token;
      out.cached_tokens = d.cached_tokens;
      out.num_preemptions = d.num_preemptions;
      out.num_finishes += d.finish != FinishReason::None;
      out.error = d.error;
      out.times = d.times;
    }
  }

  KvConfig kv_;
  std::vector<PlannedStep> ring_;
  int vocab_;
  Scheduler scheduler_;
  std::unique_ptr<Executor> executor_;
  std::uint64_t submitted_ = 0, waited_ = 0;
  std::vector<TokenDelta> deltas_;
};

inline std::vector<TokenId> ramp(int begin, int count) {
  std::vector<TokenId> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(begin + i);
  return tokens;
}

inline RequestInput request(std::uint64_t id, std::vector<TokenId> prompt, int max_tokens, float temperature = 0) {
  RequestInput input;
  input.id = id;
  input.prompt = std::move(prompt);
  input.sampling.max_tokens = max_tokens;
  input.sampling.temperature = temperature;
  return input;
}

// What the request gets when nothing else runs.
inline std::vector<TokenId> alone(SimConfig c, RequestInput input) {
  c.engine.num_blocks = 1000;
  c.engine.async_depth = 1;
  Sim sim(c);
  const std::uint64_t id = input.id;
  sim.add(std::move(input));
  sim.run();
  return sim.output(id).tokens;
}

}  // namespace fastllm::test

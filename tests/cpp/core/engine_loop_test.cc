// The engine thread with real threads around it: run these under TSan and ASan too.
#include "runtime/engine_loop.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <future>
#include <stdexcept>
#include <thread>

#include "core/sim.h"

namespace fastllm::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

KvConfig kv_of(const SimConfig& c) {
  return {c.engine.num_blocks + 1, c.host_blocks, c.engine.block_size,
          c.engine.prefix_caching, c.hash,        c.resident_blocks};
}

std::unique_ptr<EngineLoop> start(const SimConfig& c, std::unique_ptr<Executor> executor) {
  const KvConfig kv = kv_of(c);
  executor->init_kv(kv.device_blocks, kv.host_blocks);
  return std::make_unique<EngineLoop>(c.engine, ModelLimits{c.model.vocab, c.model.max_len, c.model.eos}, kv,
                                      std::move(executor));
}
std::unique_ptr<EngineLoop> start(const SimConfig& c) { return start(c, make_null_executor(c.engine, c.model)); }

using Outputs = std::map<std::pair<std::uint64_t, int>, Output>;

// Polls until `count` sequences ended.
Outputs collect(EngineLoop& loop, std::size_t count) {
  Outputs outputs;
  std::vector<TokenDelta> deltas;
  for (std::size_t ended = 0; ended < count;) {
    if (!loop.poll(deltas, seconds(60))) {
      ADD_FAILURE() << "nothing arrived for a minute";
      break;
    }
    for (TokenDelta& d : deltas) {
      Output& out = outputs[{d.id, d.index}];
      out.tokens.insert(out.tokens.end(), d.tokens.begin(), d.tokens.end());
      out.finish = d.finish;
      out.error = d.error;
      ended += d.finish != FinishReason::None;
    }
  }
  return outputs;
}

bool readable(int fd) {
  pollfd p{fd, POLLIN, 0};
  return ::poll(&p, 1, 0) == 1;
}

// Runs plans on the null model until one of them is to fail.
class FaultyExecutor : public Executor {
 public:
  enum class Fault { ThrowInSubmit, ThrowInWait, ErrorResult, RowError, BadToken };
  FaultyExecutor(const SimConfig& c, Fault fault, std::uint64_t plan)
      : inner_(make_null_executor(c.engine, c.model)), fault_(fault), plan_(plan) {}
  KvBudget profile() override { return inner_->profile(); }
  void init_kv(std::int64_t device, std::int64_t host) override { inner_->init_kv(device, host); }
  void submit(const StepPlan& plan) override {
    if (plan.id == plan_ && fault_ == Fault::ThrowInSubmit) throw std::runtime_error("the cable was pulled");
    inner_->submit(plan);
  }
  void set_masks(std::uint64_t id, std::span<const std::uint32_t> bits) override { inner_->set_masks(id, bits); }
  bool ready(std::uint64_t id) override { return inner_->ready(id); }
  const StepResult& wait(std::uint64_t id) override {
    const StepResult& result = inner_->wait(id);
    if (id != plan_) return result;
    changed_ = result;
    if (fault_ == Fault::ThrowInWait) throw std::runtime_error("the cable was pulled");
    if (fault_ == Fault::ErrorResult) changed_.error = "the cable was pulled";
    if (fault_ == Fault::BadToken) changed_.tokens[0] = 1 << 30;
    if (fault_ == Fault::RowError) {
      changed_.tokens[0] = -1;
      changed_.row_errors.emplace_back(0, "the row was bad");
    }
    return changed_;
  }
  int depth() const override { return inner_->depth(); }

 private:
  std::unique_ptr<Executor> inner_;
  Fault fault_;
  std::uint64_t plan_;
  StepResult changed_;
};

TEST(EngineLoop, GivesTheTokensOfTheSingleThreadedScheduler) {
  for (int depth : {1, 2}) {
    SimConfig c = small_config();
    c.engine.async_depth = depth;
    c.engine.check_invariants = true;
    c.engine.num_blocks = 30;
    Sim sim(c);
    auto loop = start(c);
    for (std::uint64_t id = 0; id < 40; ++id) {
      RequestInput input = request(id, ramp(static_cast<int>(id % 5), 3 + static_cast<int>(id % 20)), 12, 1.0f);
      input.sampling.seed = id;
      input.sampling.n = id % 7 == 0 ? 3 : 1;
      sim.add(input);
      loop->submit(input);
    }
    sim.run();
    for (const auto& [key, out] : collect(*loop, sim.outputs.size())) {
      EXPECT_EQ(out.tokens, sim.outputs[key].tokens) << key.first << "/" << key.second << ": " << out.error;
    }
    EXPECT_TRUE(loop->drain(seconds(60)));
    EXPECT_EQ(loop->stats().block_leaks, 0);
    EXPECT_EQ(loop->stats().used_blocks, 0);
    EXPECT_TRUE(loop->stats().healthy);
  }
}

TEST(EngineLoop, ManyThreadsSubmitAbortAndPollAtOnce) {
  SimConfig c = small_config();
  c.engine.check_invariants = true;
  auto loop = start(c);
  constexpr int kThreads = 4, kEach = 60;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        const auto id = static_cast<std::uint64_t>(t * kEach + i);
        loop->submit(request(id, ramp(i % 3, 10), 20));
        if (i % 5 == 0) loop->abort(id);
        if (i % 20 == 0) loop->reset_prefix_cache();
        if (i % 7 == 0) loop->stats();
      }
    });
  }
  const Outputs outputs = collect(*loop, kThreads * kEach);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(outputs.size(), static_cast<std::size_t>(kThreads * kEach));
  for (const auto& [key, out] : outputs) {
    EXPECT_EQ(out.error, "");
    if (out.finish == FinishReason::Length) {
      EXPECT_EQ(out.tokens.size(), 20u);
    }
  }
  EXPECT_TRUE(loop->drain(seconds(60)));
  EXPECT_EQ(loop->stats().block_leaks, 0);
}

TEST(EngineLoop, TheEventIsReadableExactlyWhilePollHasSomething) {
  auto loop = start(small_config());
  EXPECT_FALSE(readable(loop->event_fd()));
  std::vector<TokenDelta> deltas;
  EXPECT_FALSE(loop->poll(deltas, milliseconds(0)));
  loop->submit(request(1, ramp(0, 4), 3));
  EXPECT_TRUE(loop->drain(seconds(60)));
  EXPECT_TRUE(readable(loop->event_fd()));
  EXPECT_TRUE(loop->poll(deltas, milliseconds(0)));
  EXPECT_FALSE(readable(loop->event_fd()));
}

TEST(EngineLoop, DrainRefusesNewRequestsAndFinishesTheOthers) {
  auto loop = start(small_config());
  for (std::uint64_t id = 0; id < 10; ++id) loop->submit(request(id, ramp(0, 4), 50));
  EXPECT_TRUE(loop->drain(seconds(60)));
  loop->submit(request(100, ramp(0, 4), 5));
  Outputs outputs = collect(*loop, 11);
  const Output refused = outputs[{100, 0}];
  EXPECT_EQ(refused.finish, FinishReason::Error);
  EXPECT_NE(refused.error.find("draining"), std::string::npos);
  EXPECT_EQ(loop->stats().num_finished, 10);
}

// Its steps end when the test opens the gate.
class GatedExecutor : public FaultyExecutor {
 public:
  GatedExecutor(const SimConfig& c, std::future<void> gate)
      : FaultyExecutor(c, Fault::RowError, 0), gate_(std::move(gate)) {}
  const StepResult& wait(std::uint64_t id) override {
    gate_.wait();
    return FaultyExecutor::wait(id);
  }

 private:
  std::future<void> gate_;
};

TEST(EngineLoop, DrainGivesUpAfterItsTimeout) {
  const SimConfig c = small_config();
  std::promise<void> gate;
  auto loop = start(c, std::make_unique<GatedExecutor>(c, gate.get_future()));
  loop->submit(request(1, ramp(0, 4), 5));
  EXPECT_FALSE(loop->drain(milliseconds(1)));
  gate.set_value();
  EXPECT_TRUE(loop->drain(seconds(60)));
}

TEST(EngineLoop, ShutdownAbortsWhatIsLeftAndRefusesTheRest) {
  SimConfig c = small_config();
  c.model.step_us = 1000;
  auto loop = start(c);
  for (std::uint64_t id = 0; id < 20; ++id) loop->submit(request(id, ramp(0, 4), 100));
  loop->shutdown();
  loop->shutdown();
  loop->submit(request(99, ramp(0, 4), 1));
  loop->abort(3);
  Outputs outputs = collect(*loop, 21);
  EXPECT_EQ(outputs.size(), 21u);
  const Output last = outputs[{19, 0}], refused = outputs[{99, 0}];
  EXPECT_EQ(last.finish, FinishReason::Abort);
  EXPECT_NE(refused.error.find("shut down"), std::string::npos);
}

TEST(EngineLoop, AFaultOfTheExecutorEndsEveryRequestWithItsSentence) {
  using Fault = FaultyExecutor::Fault;
  for (Fault fault : {Fault::ThrowInSubmit, Fault::ThrowInWait, Fault::ErrorResult, Fault::BadToken}) {
    for (std::uint64_t plan : {1u, 2u, 5u}) {
      const SimConfig c = small_config();
      auto loop = start(c, std::make_unique<FaultyExecutor>(c, fault, plan));
      for (std::uint64_t id = 0; id < 12; ++id) loop->submit(request(id, ramp(0, 4), 50));
      for (const auto& [key, out] : collect(*loop, 12)) {
        EXPECT_EQ(out.finish, FinishReason::Error);
        EXPECT_NE(out.error.find("fault"), std::string::npos) << out.error;
      }
      loop->submit(request(50, ramp(0, 4), 5));
      EXPECT_NE(collect(*loop, 1).begin()->second.error.find("fault"), std::string::npos);
      EXPECT_TRUE(loop->drain(seconds(60)));
      EXPECT_FALSE(loop->stats().healthy);
      EXPECT_EQ(loop->stats().block_leaks, 0);
    }
  }
}

TEST(EngineLoop, ARowErrorEndsItsRequestOnly) {
  const SimConfig c = small_config();
  auto loop = start(c, std::make_unique<FaultyExecutor>(c, FaultyExecutor::Fault::RowError, 4));
  for (std::uint64_t id = 0; id < 6; ++id) loop->submit(request(id, ramp(0, 4), 20));
  int failed = 0;
  for (const auto& [key, out] : collect(*loop, 6)) {
    failed += out.finish == FinishReason::Error;
    if (out.finish == FinishReason::Error) {
      EXPECT_EQ(out.error, "the row was bad");
    } else {
      EXPECT_EQ(out.tokens.size(), 20u);
    }
  }
  EXPECT_EQ(failed, 1);
  EXPECT_TRUE(loop->stats().healthy);
}

struct ThrowingMask : TokenMask {
  void fill(std::span<std::uint32_t>) override { throw std::runtime_error("the grammar is empty"); }
  bool accept(std::int32_t) override { return false; }
  std::shared_ptr<TokenMask> clone() const override { return std::make_shared<ThrowingMask>(); }
};

TEST(EngineLoop, AMaskThatThrowsEndsItsRequestOnly) {
  auto loop = start(small_config());
  RequestInput bad = request(1, ramp(0, 4), 5);
  bad.mask = std::make_shared<ThrowingMask>();
  loop->submit(bad);
  loop->submit(request(2, ramp(0, 4), 5));
  Outputs outputs = collect(*loop, 2);
  const Output failed = outputs[{1, 0}], fine = outputs[{2, 0}];
  EXPECT_EQ(failed.finish, FinishReason::Error);
  EXPECT_NE(failed.error.find("grammar is empty"), std::string::npos);
  EXPECT_EQ(fine.tokens.size(), 5u);
}

}  // namespace
}  // namespace fastllm::test

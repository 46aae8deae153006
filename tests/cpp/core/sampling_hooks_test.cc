// TokenMask and LogitsProcessor, as the scheduler calls them.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "core/sim.h"

namespace fastllm::test {
namespace {

// Allows one id per step, counting up; fails or is complete at the id it is told to.
struct CountingMask : TokenMask {
  explicit CountingMask(int first, int fail_at = -1, int end_at = -1) : next(first), fail_at(fail_at), end_at(end_at) {}
  void fill(std::span<std::uint32_t> bits) override {
    const auto id = static_cast<std::size_t>(next);
    bits[id / 32] |= 1u << (id % 32);
  }
  bool accept(std::int32_t token) override {
    if (token == fail_at) throw std::runtime_error("the grammar has no rule for it");
    next = token + 1;
    return token == end_at;
  }
  std::shared_ptr<TokenMask> clone() const override {
    if (next == fail_at) throw std::runtime_error("the grammar cannot be copied");
    return std::make_shared<CountingMask>(next, fail_at, end_at);
  }
  int next, fail_at, end_at;
};

struct CheckingProcessor : LogitsProcessor {
  void process(std::span<const std::int32_t> tokens, int num_prompt, std::span<float> logits) override {
    seen.assign(tokens.begin(), tokens.end());
    this->num_prompt = num_prompt;
    if (static_cast<int>(tokens.size()) - num_prompt == fail_at) throw std::runtime_error("no more");
    std::ranges::fill(logits, 0.0f);
    logits[tokens.size()] = 2.0f;
  }
  std::vector<TokenId> seen;
  int num_prompt = 0, fail_at = -1;
};

TEST(SamplingHooks, AMaskDecidesEveryToken) {
  Sim sim(small_config());
  RequestInput input = request(1, ramp(0, 6), 5);
  input.mask = std::make_shared<CountingMask>(40);
  sim.add(input);
  sim.add(request(2, ramp(0, 6), 5));
  sim.run();
  EXPECT_EQ(sim.output(1).tokens, ramp(40, 5));
  EXPECT_EQ(sim.output(2).tokens, alone(small_config(), request(2, ramp(0, 6), 5)));
}

TEST(SamplingHooks, ACompleteMaskEndsItsSampleBeforeMinTokensWithoutAStopToken) {
  Sim sim(small_config());
  RequestInput input = request(1, ramp(0, 6), 20);
  input.mask = std::make_shared<CountingMask>(40, -1, 43);
  input.sampling.min_tokens = 10;
  input.sampling.ignore_eos = true;
  sim.add(input);
  sim.run();
  EXPECT_EQ(sim.output(1).tokens, ramp(40, 4));
  EXPECT_EQ(sim.output(1).finish, FinishReason::Stop);
}

TEST(SamplingHooks, EverySampleHasAMaskOfItsOwn) {
  Sim sim(small_config());
  RequestInput input = request(1, ramp(0, 6), 5);
  input.mask = std::make_shared<CountingMask>(40);
  input.sampling.n = 3;
  sim.add(input);
  sim.run();
  for (int index = 0; index < 3; ++index) EXPECT_EQ(sim.output(1, index).tokens, ramp(40, 5));
}

TEST(SamplingHooks, AMaskThatCannotBeClonedRefusesItsRequest) {
  Sim sim(small_config());
  RequestInput input = request(1, ramp(0, 6), 5);
  input.mask = std::make_shared<CountingMask>(40, 40);
  input.sampling.n = 2;
  sim.add(input);
  sim.run();
  EXPECT_EQ(sim.output(1).finish, FinishReason::Error);
  EXPECT_NE(sim.output(1).error.find("cannot be copied"), std::string::npos);
}

TEST(SamplingHooks, AFailingMaskEndsItsRequestOnly) {
  Sim sim(small_config());
  RequestInput input = request(1, ramp(0, 6), 5);
  input.mask = std::make_shared<CountingMask>(40, 42);
  sim.add(input);
  sim.add(request(2, ramp(0, 6), 5));
  sim.run();
  EXPECT_EQ(sim.output(1).finish, FinishReason::Error);
  EXPECT_NE(sim.output(1).error.find("no rule"), std::string::npos);
  EXPECT_EQ(sim.output(2).tokens.size(), 5u);
}

TEST(SamplingHooks, ALogitsProcessorSeesEveryTokenAndItsFailureEndsItsRequestOnly) {
  Sim sim(small_config());
  const auto processor = std::make_shared<CheckingProcessor>(), failing = std::make_shared<CheckingProcessor>();
  failing->fail_at = 2;
  RequestInput a = request(1, ramp(0, 6), 5), b = request(2, ramp(0, 6), 5);
  a.logits_processor = processor;
  b.logits_processor = failing;
  sim.add(a);
  sim.add(b);
  sim.run();
  EXPECT_EQ(sim.output(1).tokens, ramp(6, 5));
  EXPECT_EQ(processor->seen, ramp(0, 10));
  EXPECT_EQ(processor->num_prompt, 6);
  EXPECT_EQ(sim.output(2).tokens, ramp(6, 2));
  EXPECT_EQ(sim.output(2).finish, FinishReason::Error);
  EXPECT_NE(sim.output(2).error.find("no more"), std::string::npos);
}

}  // namespace
}  // namespace fastllm::test

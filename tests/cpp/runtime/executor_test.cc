// The local executor with real weights, driven by hand-made plans: what the scheduler may rely on.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "executor_driver.h"
#include "fastllm/error.h"
#include "reference_model.h"
#include "test_seed.h"

namespace fastllm::testing {
namespace {

TEST(LocalExecutor, test_rank_counts_and_chunks_give_the_same_greedy_tokens) {
  const unsigned seed = test::test_seed();
  for (const auto& [name, spec] : test_specs()) {
    SCOPED_TRACE(name);
    const TestModel model = random_model(spec, seed);
    std::vector<TokenId> want;
    for (int ranks : {1, 2, 4}) {
      Driver driver(model, test_config(ranks));
      Sequence s = sequence(prompt(), greedy());
      driver.generate(s, 12, ranks == 1 ? kMaxLen : 3);
      if (want.empty()) want = s.tokens;
      EXPECT_EQ(s.tokens, want) << ranks << " ranks";
    }
    const auto logits = reference_logits(model, want);
    for (std::size_t t = prompt().size() - 1; t + 1 < want.size(); ++t) {
      const auto best = *std::max_element(logits[t].begin(), logits[t].end());
      EXPECT_NEAR(logits[t][static_cast<std::size_t>(want[t + 1])], best, 1e-3) << t;
    }
  }
}

TEST(LocalExecutor, test_sampling_with_penalties_is_the_same_after_recompute) {
  Driver driver(llama(), test_config());
  Sequence whole = sequence(prompt(), sampled_with_penalties());
  driver.generate(whole, 20);
  // Preempted after 8 outputs: what is known moves into another slot and is computed again.
  Sequence again = whole;
  again.slot = 2;
  again.tokens.resize(prompt().size() + 8);
  again.num_computed = 0;
  driver.generate(again, 12, 5);
  EXPECT_EQ(again.tokens, whole.tokens);
}

TEST(LocalExecutor, test_rows_from_the_slot_need_no_host_token) {
  Driver driver(llama(), test_config(2));
  Sequence known = sequence(prompt(), sampled_with_penalties()), blind = known;
  blind.slot = 1;
  driver.generate(known, 6);
  driver.begin();
  driver.admit(blind);
  driver.add_row(blind, blind.num_prompt);
  std::vector<TokenId> got = {driver.run().tokens.at(0)};
  // Two plans in flight, neither with a token the host has seen.
  while (got.size() < 5) {
    driver.begin();
    driver.add_row(blind, 1, kFromSlot);
    const StepPlan first = driver.plan();
    driver.executor().submit(first);
    driver.begin();
    driver.add_row(blind, 1, kFromSlot);
    driver.executor().submit(driver.plan());
    got.push_back(driver.executor().wait(first.id).tokens.at(0));
    got.push_back(driver.executor().wait(driver.plan().id).tokens.at(0));
  }
  EXPECT_EQ(got,
            std::vector<TokenId>(known.tokens.begin() + known.num_prompt, known.tokens.begin() + known.num_prompt + 5));
}

TEST(LocalExecutor, test_min_tokens_holds_back_stop_ids) {
  SamplingParams p = greedy();
  p.min_tokens = 3;
  p.stop_ids = {5, 100000};
  p.logit_bias = {{1, 100.0f}, {5, 90.0f}};  // 1 is the model's EOS
  Driver driver(llama(), test_config());
  Sequence s = sequence(prompt(), p);
  driver.generate(s, 4);
  for (int i = 0; i < 3; ++i) {
    const TokenId t = s.tokens[static_cast<std::size_t>(s.num_prompt + i)];
    EXPECT_TRUE(t != 1 && t != 5) << i;
  }
  EXPECT_EQ(s.tokens.back(), 1);
}

TEST(LocalExecutor, test_log_probabilities_are_those_of_the_raw_logits) {
  SamplingParams p = greedy();
  p.logprobs = 3, p.prompt_logprobs = 2;
  p.logit_bias = {{42, 200.0f}};  // decides the choice, not its probability
  Driver driver(llama(), test_config(2));
  Sequence s = sequence(prompt(20), p), plain = sequence(prompt(5), greedy(), 1);
  driver.begin();
  driver.admit(s);
  driver.admit(plain);
  driver.plan().max_logprobs = 3;
  driver.add_row(plain, 5);
  driver.add_row(s, 20, kPromptLogprobs);
  driver.plan().next_tokens.assign(25, -1);
  std::copy(s.tokens.begin() + 1, s.tokens.end(), driver.plan().next_tokens.begin() + 5);
  const StepResult& r = driver.run();

  const auto logits = reference_logits(llama(), s.tokens);
  auto expect = [&](const PositionLogprobs& got, std::size_t t, TokenId chosen, std::size_t top) {
    const auto& row = logits[t];
    double sum = 0;
    for (double x : row) sum += std::exp(x);
    auto logprob = [&](TokenId id) { return row[static_cast<std::size_t>(id)] - std::log(sum); };
    EXPECT_EQ(got.chosen.token, chosen);
    EXPECT_NEAR(got.chosen.logprob, logprob(chosen), 1e-3);
    const auto above =
        std::count_if(row.begin(), row.end(), [&](double x) { return x > row[static_cast<std::size_t>(chosen)]; });
    EXPECT_EQ(got.chosen.rank, above + 1);
    ASSERT_EQ(got.top.size(), top);
    for (std::size_t i = 0; i < top; ++i) {
      EXPECT_NEAR(got.top[i].logprob, logprob(got.top[i].token), 1e-3);
      EXPECT_EQ(got.top[i].rank, static_cast<int>(i) + 1);
      EXPECT_GE(got.top[i == 0 ? 0 : i - 1].logprob, got.top[i].logprob);
    }
  };
  ASSERT_EQ(r.prompt_logprobs.size(), 19u);
  for (std::size_t t = 0; t < 19; ++t) expect(r.prompt_logprobs[t], t, s.tokens[t + 1], 2);
  ASSERT_EQ(r.logprobs.size(), 2u);
  EXPECT_TRUE(r.logprobs[0].top.empty());
  EXPECT_EQ(r.tokens[1], 42);
  expect(r.logprobs[1], 19, 42, 3);
}

class Force final : public LogitsProcessor {
 public:
  explicit Force(TokenId id) : id_(id) {}
  void process(std::span<const std::int32_t> tokens, int num_prompt, std::span<float> logits) override {
    seen_.assign(tokens.begin(), tokens.end());
    num_prompt_ = num_prompt;
    if (id_ < 0) throw std::runtime_error("no choice");
    std::fill(logits.begin(), logits.end(), -INFINITY);
    logits[static_cast<std::size_t>(id_)] = 0;
  }
  TokenId id_;
  std::vector<TokenId> seen_;
  int num_prompt_ = 0;
};

TEST(LocalExecutor, test_logits_processors_choose_and_fail_alone) {
  Driver driver(llama(), test_config(2));
  Sequence plain = sequence(prompt(), greedy(), 0), forced = sequence(prompt(9), greedy(), 1);
  Sequence failing = sequence(prompt(8), greedy(), 2);
  auto force = std::make_shared<Force>(64);
  forced.processor = force;
  failing.processor = std::make_shared<Force>(-1);
  Sequence alone = plain;
  driver.generate(alone, 1);

  driver.begin();
  for (Sequence* s : {&plain, &failing, &forced}) driver.admit(*s);
  for (Sequence* s : {&plain, &failing, &forced}) driver.add_row(*s, s->num_prompt);
  driver.plan().host_tokens = {{1, failing.tokens}, {2, forced.tokens}};
  const StepResult& r = driver.run();
  EXPECT_EQ(r.tokens, (std::vector<TokenId>{alone.tokens.back(), -1, 64}));
  ASSERT_EQ(r.row_errors.size(), 1u);
  EXPECT_EQ(r.row_errors[0].first, 1);
  EXPECT_NE(r.row_errors[0].second.find("no choice"), std::string::npos);
  EXPECT_EQ(force->seen_, forced.tokens);
  EXPECT_EQ(force->num_prompt_, 9);
}

TEST(LocalExecutor, test_masked_rows_wait_for_their_masks) {
  Driver driver(llama(), test_config(2));
  Sequence plain = sequence(prompt(), greedy(), 0), masked = sequence(prompt(9), greedy(), 1);
  driver.begin();
  driver.admit(plain);
  driver.admit(masked);
  driver.add_row(plain, plain.num_prompt);
  driver.add_row(masked, masked.num_prompt, kMask);
  driver.plan().masked_rows = {1};
  driver.executor().submit(driver.plan());
  EXPECT_FALSE(driver.executor().ready(driver.plan().id));
  std::vector<std::uint32_t> bits(4, 0);
  bits[2] = 1u << 6;  // id 70
  driver.executor().set_masks(driver.plan().id, bits);
  EXPECT_EQ(driver.executor().wait(driver.plan().id).tokens.at(1), 70);
}

TEST(LocalExecutor, test_blocks_move_by_copy_and_swap) {
  Driver driver(llama(), test_config(2));
  Sequence stay = sequence(prompt(13), greedy()), move = stay;
  driver.generate(stay, 8);
  move.slot = 1;
  driver.generate(move, 3);
  // Out to the host, in to the blocks of slot 2, one block copied on to slot 3.
  driver.begin();
  for (int b = 0; b < kBlocksPerSlot; ++b) {
    const BlockId host{b};
    driver.plan().swap_out.push_back({static_cast<BlockId>(1 + kBlocksPerSlot + b), host});
    driver.plan().swap_in.push_back({host, static_cast<BlockId>(1 + 2 * kBlocksPerSlot + b)});
  }
  move.slot = 2;
  driver.admit(move);
  const BlockId copied{1 + 3 * kBlocksPerSlot};
  driver.plan().copies.push_back({static_cast<BlockId>(1 + 2 * kBlocksPerSlot + 1), copied});
  driver.plan().table_sets.push_back({SlotId{2}, 1, copied});
  driver.add_row(move, 1);
  move.tokens.push_back(driver.run().tokens.at(0));
  for (int i = 0; i < 4; ++i) {
    driver.begin();
    driver.add_row(move, 1);
    move.tokens.push_back(driver.run().tokens.at(0));
  }
  EXPECT_EQ(move.tokens, stay.tokens);
}

TEST(LocalExecutor, test_failures_become_errors_and_nobody_hangs) {
  EngineConfig c = test_config(2);
  EXPECT_THROW(make_local_executor(c, llama().source(), {},
                                   [](int rank) {
                                     if (rank == 1) throw ResourceError("no device 1");
                                     return make_cpu_backend(1);
                                   }),
               ResourceError);
  for (const char* device : {"tpu", "cuda:x", "cuda:-1", "cudas", "auto"}) {
    c = test_config();
    c.device = device;
    EXPECT_THROW(make_local_executor(c, llama().source(), {}), InvalidArgument) << device;
  }
  c = test_config(2);
  c.device = "cuda";
  EXPECT_THROW(make_local_executor(c, llama().source(), {}), InvalidArgument) << "tensor parallel on GPUs";
  for (const char* dtype : {"fp8", "int4"}) {
    c = test_config();
    c.kv_cache_dtype = dtype;
    EXPECT_THROW(make_local_executor(c, llama().source(), {}), InvalidArgument) << dtype;
  }

  Driver driver(llama(), test_config(2));
  EXPECT_THROW(driver.executor().init_kv(std::int64_t{1} << 40, 0), std::exception);
  driver.begin();
  Sequence s = sequence(prompt(), greedy());
  driver.admit(s);
  driver.add_row(s, s.num_prompt);
  driver.executor().submit(driver.plan());
  EXPECT_NE(driver.executor().wait(driver.plan().id).error, "");
}

TEST(LocalExecutor, test_destruction_ends_a_step_that_waits_for_masks) {
  Driver driver(llama(), test_config(2));
  Sequence s = sequence(prompt(), greedy());
  driver.begin();
  driver.admit(s);
  driver.add_row(s, s.num_prompt, kMask);
  driver.plan().masked_rows = {0};
  driver.executor().submit(driver.plan());
}

TEST(LocalExecutor, test_table_sets_of_a_plan_without_rows_are_not_lost) {
  Driver driver(llama(), test_config());
  Sequence want = sequence(prompt(), greedy()), late = sequence(prompt(), greedy(), 1);
  driver.generate(want, 1);
  driver.begin();
  driver.admit(late);
  EXPECT_TRUE(driver.run().tokens.empty());
  driver.begin();
  driver.add_row(late, late.num_prompt);
  EXPECT_EQ(driver.run().tokens.at(0), want.tokens.back());
}

TEST(LocalExecutor, test_loading_reports_every_byte) {
  std::vector<std::int64_t> done;
  std::int64_t total = 0;
  make_local_executor(test_config(2), llama().source(), [&](std::int64_t d, std::int64_t t) {
    done.push_back(d);
    total = t;
  });
  std::int64_t bytes = 0;
  for (const auto& [name, values] : llama().weights) bytes += static_cast<std::int64_t>(values.size() * sizeof(float));
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(total, bytes);
  EXPECT_EQ(done.back(), total);
}

}  // namespace
}  // namespace fastllm::testing

// The local executor on a backend that pads and replays its steps, and how far launches run ahead of results.
#include <gtest/gtest.h>

#include <latch>

#include "executor_driver.h"
#include "fastllm/error.h"
#include "runtime/worker.h"
#include "test_seed.h"

namespace fastllm::testing {
namespace {

TEST(PaddedRows, test_only_steps_of_decode_rows_are_padded_to_the_next_size) {
  const std::vector<int> sizes = {1, 2, 8};
  auto plan = [](std::int32_t decode, std::int32_t chunks) {
    StepPlan p;
    p.rows.resize(static_cast<std::size_t>(decode + chunks));
    p.num_decode_rows = decode;
    return p;
  };
  EXPECT_EQ(padded_rows(plan(1, 0), sizes), 1);
  EXPECT_EQ(padded_rows(plan(3, 0), sizes), 8);
  EXPECT_EQ(padded_rows(plan(8, 0), sizes), 8);
  EXPECT_EQ(padded_rows(plan(9, 0), sizes), 0);
  EXPECT_EQ(padded_rows(plan(2, 1), sizes), 0);
  EXPECT_EQ(padded_rows(plan(3, 0), {}), 0);
  StepPlan scored = plan(1, 0);
  scored.next_tokens = {5};
  EXPECT_EQ(padded_rows(scored, sizes), 0);
}

TEST(LocalExecutor, test_padded_replayed_steps_give_the_same_tokens) {
  const unsigned seed = test::test_seed();
  for (const auto& [name, spec] : test_specs()) {
    SCOPED_TRACE(name);
    const TestModel model = random_model(spec, seed);
    std::vector<Sequence> want;
    for (int i = 0; i < 3; ++i) {
      want.push_back(sequence(prompt(7 + 4 * i), i == 1 ? sampled_with_penalties() : greedy(), i));
      if (i == 2) {
        SamplingParams p = greedy();
        p.logprobs = 2;
        want.back().params = std::make_shared<SamplingParams>(p);
      }
    }
    std::vector<Sequence> got = want;
    Driver plain(model, test_config());
    for (Sequence& s : want) plain.generate(s, 9);

    RecordingBackend::Log log;
    Driver driver(model, test_config(), {1, 2, 4}, log);
    EXPECT_EQ(log.recorded, (std::vector<int>{4, 2, 1}));
    driver.begin();
    for (Sequence& s : got) driver.admit(s);
    for (Sequence& s : got) driver.add_row(s, s.num_prompt);
    auto step = [&](std::size_t rows) {
      driver.plan().max_logprobs = rows == 3 ? 2 : -1;
      const StepResult& r = driver.run();
      ASSERT_EQ(r.tokens.size(), rows);
      for (std::size_t i = 0; i < rows; ++i) got[i].tokens.push_back(r.tokens[i]);
      ASSERT_EQ(r.logprobs.size(), rows == 3 ? 3u : 0u);
      if (rows == 3) {
        EXPECT_EQ(r.logprobs[2].chosen.token, r.tokens[2]);
        EXPECT_EQ(r.logprobs[2].top.at(0).token, r.tokens[2]) << "greedy";
      }
    };
    step(3);
    EXPECT_TRUE(log.replayed.empty()) << "chunks are not padded";
    for (const std::size_t rows : {3, 1, 2, 3, 3, 1}) {
      driver.begin();
      for (std::size_t i = 0; i < rows; ++i) driver.add_row(got[i], 1);
      driver.plan().num_decode_rows = static_cast<std::int32_t>(rows);
      step(rows);
    }
    EXPECT_EQ(log.replayed, (std::vector<int>{4, 1, 2, 4, 4, 1}));
    EXPECT_EQ(log.recorded.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
      want[i].tokens.resize(got[i].tokens.size());
      EXPECT_EQ(got[i].tokens, want[i].tokens) << "sequence " << i;
    }
  }
}

TEST(LocalExecutor, test_a_plan_is_collected_while_a_later_one_is_launched) {
  RecordingBackend::Log log;
  Driver driver(llama(), test_config(), {}, log);
  Sequence known = sequence(prompt(), sampled_with_penalties()), blind = known;
  blind.slot = 1;
  driver.generate(known, 6);
  driver.begin();
  driver.admit(blind);
  driver.add_row(blind, blind.num_prompt);
  std::vector<TokenId> got = {driver.run().tokens.at(0)};

  StepPlan plans[2];
  auto submit = [&](StepPlan& plan) {
    driver.begin();
    driver.add_row(blind, 1, kFromSlot);
    plan = driver.plan();
    driver.executor().submit(plan);
  };
  // The launch of every plan but the first waits for the collection of the one before, and the other way round.
  std::vector<std::unique_ptr<std::latch>> both;
  for (int i = 0; i < 4; ++i) both.push_back(std::make_unique<std::latch>(2));
  int begun = 0, waited = 0;
  log.begins = [&](const StepInput&) {
    if (begun++ > 0) both[static_cast<std::size_t>(begun - 2)]->arrive_and_wait();
  };
  log.waits = [&] {
    if (waited < 4) both[static_cast<std::size_t>(waited)]->arrive_and_wait();
    ++waited;
  };
  submit(plans[0]);
  for (std::size_t i = 1; i < 5; ++i) {
    submit(plans[i % 2]);
    got.push_back(driver.executor().wait(plans[(i - 1) % 2].id).tokens.at(0));
  }
  got.push_back(driver.executor().wait(plans[0].id).tokens.at(0));
  EXPECT_EQ(got, std::vector<TokenId>(known.tokens.begin() + known.num_prompt, known.tokens.end()));
}

TEST(LocalExecutor, test_a_failure_while_collecting_sticks) {
  RecordingBackend::Log log;
  Driver driver(llama(), test_config(), {}, log);
  Sequence s = sequence(prompt(), greedy());
  driver.generate(s, 2);
  int waits = 0;
  log.waits = [&] {
    if (++waits == 2) throw ResourceError("the device is gone");
  };
  std::vector<StepPlan> plans(4);
  auto submit = [&](StepPlan& plan) {
    driver.begin();
    driver.add_row(s, 1, kFromSlot);
    plan = driver.plan();
    driver.executor().submit(plan);
  };
  submit(plans[0]);
  submit(plans[1]);
  EXPECT_EQ(driver.executor().wait(plans[0].id).error, "");
  submit(plans[2]);
  for (std::size_t i = 1; i < 4; ++i) {
    const StepResult& r = driver.executor().wait(plans[i].id);
    EXPECT_NE(r.error.find("the device is gone"), std::string::npos) << i;
    EXPECT_TRUE(r.tokens.empty());
    EXPECT_EQ(r.plan_id, plans[i].id);
    if (i == 1) submit(plans[3]);
  }
  EXPECT_EQ(waits, 2) << "nothing is collected after a failure";
}

TEST(LocalExecutor, test_the_worst_step_is_measured_where_only_running_tells) {
  RecordingBackend::Log log;
  log.profile_by_running = true;
  std::vector<int> tokens, rows, logits;
  log.begins = [&](const StepInput& in) {
    tokens.push_back(static_cast<int>(in.tokens.size()));
    rows.push_back(static_cast<int>(in.rows.size()));
    logits.push_back(static_cast<int>(in.logit_tokens.size()));
    for (const StepRow& r : in.rows) EXPECT_LE(r.first_pos + r.num_tokens, kMaxLen);
  };
  EngineConfig c = test_config();
  c.max_step_tokens = 100;  // more than one sequence has
  const auto executor = make_local_executor(c, llama().source(), {}, [&](int) -> std::unique_ptr<Backend> {
    return std::make_unique<RecordingBackend>(std::vector<int>{}, log);
  });
  EXPECT_GT(executor->profile().device_blocks, 0);
  EXPECT_EQ(tokens, std::vector<int>{100});
  EXPECT_EQ(rows, std::vector<int>{kSlots});
  EXPECT_EQ(logits, std::vector<int>{kSlots});
  EXPECT_GT(executor->device_use().weights, 0);

  log.profile_by_running = false;
  executor->profile();
  EXPECT_EQ(tokens.size(), 1u);
  EXPECT_EQ(executor->device_use().total, 0);
}

}  // namespace
}  // namespace fastllm::testing

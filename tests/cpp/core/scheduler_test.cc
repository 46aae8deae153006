#include <gtest/gtest.h>

#include <algorithm>

#include "core/sim.h"

namespace fastllm::test {
namespace {

TEST(Scheduler, DecodeRowsComeFirstAndReadTheirTokenFromTheSlot) {
  SimConfig c = small_config();
  Sim sim(c);
  sim.add(request(1, ramp(0, 5), 8));
  ASSERT_TRUE(sim.submit());
  sim.add(request(2, ramp(50, 9), 8));
  ASSERT_TRUE(sim.submit());
  ASSERT_EQ(sim.last_plan->rows.size(), 2u);
  EXPECT_EQ(sim.last_plan->num_decode_rows, 1);
  EXPECT_EQ(sim.last_plan->rows[0].flags, kSample | kFromSlot);
  EXPECT_EQ(sim.last_plan->rows[0].first_pos, 5);
  EXPECT_EQ(sim.last_plan->rows[1].num_tokens, 9);
  sim.run();
}

TEST(Scheduler, IdenticalPromptsThatArriveTogetherPrefillOnce) {
  Sim sim(small_config());
  for (std::uint64_t id = 0; id < 4; ++id) sim.add(request(id, ramp(0, 13), 4));
  ASSERT_TRUE(sim.submit());
  EXPECT_EQ(sim.stats().prompt_tokens, 13 + 3 * 1);
  sim.run();
  for (std::uint64_t id = 1; id < 4; ++id) {
    EXPECT_EQ(sim.output(id).tokens, sim.output(0).tokens);
    EXPECT_EQ(sim.output(id).cached_tokens, 12);
  }
}

TEST(Scheduler, PromptsUnderDifferentSaltsShareNothing) {
  Sim sim(small_config());
  RequestInput a = request(1, ramp(0, 13), 2), b = request(2, ramp(0, 13), 2);
  a.cache_salt = "a";
  b.cache_salt = "b";
  sim.add(a);
  sim.add(b);
  sim.run();
  EXPECT_EQ(sim.output(2).cached_tokens, 0);
  EXPECT_EQ(sim.output(1).tokens, sim.output(2).tokens);
}

TEST(Scheduler, EndOfSequenceIsKeptInTheOutputAndCostsAtMostOneRow) {
  SimConfig c = small_config();
  const std::vector<TokenId> free_run = alone(c, request(1, ramp(0, 6), 10));
  ASSERT_EQ(free_run.size(), 10u);
  c.model.eos = {free_run[4]};
  ASSERT_EQ(std::ranges::find(free_run, free_run[4]) - free_run.begin(), 4);
  Sim sim(c);
  sim.add(request(1, ramp(0, 6), 10));
  sim.run();
  EXPECT_EQ(sim.output(1).tokens, std::vector<TokenId>(free_run.begin(), free_run.begin() + 5));
  EXPECT_EQ(sim.output(1).finish, FinishReason::Stop);
  EXPECT_EQ(sim.output(1).stop_token, free_run[4]);
  EXPECT_LE(sim.stats().num_steps, 6);

  RequestInput ignoring = request(2, ramp(0, 6), 10);
  ignoring.sampling.ignore_eos = true;
  sim.add(ignoring);
  RequestInput stopping = request(3, ramp(0, 6), 10);
  stopping.sampling.ignore_eos = true;
  stopping.sampling.stop_ids = {free_run[2]};
  sim.add(stopping);
  RequestInput patient = request(4, ramp(0, 6), 10);
  patient.sampling.min_tokens = 10;
  sim.add(patient);
  sim.run();
  EXPECT_EQ(sim.output(2).tokens, free_run);
  EXPECT_EQ(sim.output(3).tokens.size(), 3u);
  EXPECT_EQ(sim.output(4).tokens.size(), 10u);
  EXPECT_EQ(sim.output(4).finish, FinishReason::Length);
}

TEST(Scheduler, AKnownEndLaunchesNoExtraStep) {
  Sim sim(small_config());
  sim.add(request(1, ramp(0, 6), 3));
  sim.run();
  EXPECT_EQ(sim.stats().num_steps, 3);
  EXPECT_EQ(sim.output(1).finish, FinishReason::Length);
}

TEST(Scheduler, OutputEndsWhereTheContextOrThePoolEnds) {
  SimConfig c = small_config();
  Sim context(c);
  context.add(request(1, ramp(0, 100), 1000));
  context.run();
  EXPECT_EQ(context.output(1).tokens.size(), 28u);
  c.engine.num_blocks = 4;
  Sim pool(c);
  pool.add(request(1, ramp(0, 10), 1000));
  pool.add(request(2, ramp(0, 17), 1000));
  pool.run();
  EXPECT_EQ(pool.output(1).tokens.size(), 7u) << "16 positions and the token after them";
  EXPECT_EQ(pool.output(1).finish, FinishReason::Length);
  EXPECT_EQ(pool.output(2).finish, FinishReason::Error);
}

TEST(Scheduler, LateTokensOfAPreemptedSequenceAreKept) {
  SimConfig c = small_config();
  c.engine.num_blocks = 6;
  const RequestInput a = request(1, ramp(0, 8), 12), b = request(2, ramp(50, 8), 12);
  Sim sim(c);
  sim.add(a);
  sim.add(b);
  sim.run();
  EXPECT_GT(sim.stats().num_preemptions, 0);
  EXPECT_EQ(sim.output(1).tokens, alone(c, a));
  EXPECT_EQ(sim.output(2).tokens, alone(c, b));
}

TEST(Scheduler, PreemptionsAreCountedPerSequence) {
  SimConfig c = small_config();
  c.engine.num_blocks = 6;
  Sim sim(c);
  sim.add(request(1, ramp(0, 8), 12));
  sim.add(request(2, ramp(50, 8), 12));
  sim.run();
  EXPECT_EQ(sim.output(1).num_preemptions + sim.output(2).num_preemptions, sim.stats().num_preemptions);
  EXPECT_EQ(sim.output(1).num_preemptions, 0) << "the first to come is the last to make room";
}

TEST(Scheduler, StatsSayWhatTheHeadOfTheLineLacks) {
  SimConfig c = small_config();
  c.engine.max_num_seqs = 1;
  Sim slots(c);
  slots.add(request(1, ramp(0, 4), 4));
  ASSERT_TRUE(slots.submit());
  EXPECT_EQ(slots.stats().wait_reason, WaitReason::None);
  slots.add(request(2, ramp(50, 4), 4));
  ASSERT_TRUE(slots.submit());
  EXPECT_EQ(slots.stats().wait_reason, WaitReason::Slots);
  slots.run();
  EXPECT_EQ(slots.stats().wait_reason, WaitReason::None);

  c = small_config();
  c.engine.num_blocks = 6;
  Sim blocks(c);
  blocks.add(request(1, ramp(0, 16), 2));
  blocks.add(request(2, ramp(50, 16), 2));
  ASSERT_TRUE(blocks.submit());
  EXPECT_EQ(blocks.stats().wait_reason, WaitReason::Blocks);
  blocks.run();

  c = small_config();
  c.engine.max_step_tokens = 8;
  Sim tokens(c);
  tokens.add(request(1, ramp(0, 20), 2));
  tokens.add(request(2, ramp(50, 20), 2));
  ASSERT_TRUE(tokens.submit());
  EXPECT_EQ(tokens.stats().wait_reason, WaitReason::Tokens);
  tokens.run();

  RequestInput samples = request(1, ramp(0, 20), 2, 1.0f);
  samples.sampling.n = 2;
  Sim prompt(c);
  prompt.add(samples);
  ASSERT_TRUE(prompt.submit());
  EXPECT_EQ(prompt.stats().wait_reason, WaitReason::Prompt);
  prompt.run();
}

TEST(Scheduler, PrioritiesDecideWhoIsAdmittedFirst) {
  SimConfig c = small_config();
  c.engine.max_num_seqs = 1;
  c.engine.policy = SchedulingPolicy::Priority;
  Sim sim(c);
  for (std::uint64_t id = 1; id <= 3; ++id) {
    RequestInput input = request(id, ramp(0, 4), 2);
    input.priority = -static_cast<int>(id);
    sim.add(input);
  }
  for (int turns = 0; sim.scheduler().has_requests(); ++turns) {
    sim.now += std::chrono::milliseconds(1);
    sim.turn();
  }
  EXPECT_LT(sim.output(3).times.finished, sim.output(2).times.finished);
  EXPECT_LT(sim.output(2).times.finished, sim.output(1).times.finished);
}

TEST(Scheduler, ParallelSamplesShareThePrompt) {
  SimConfig c = small_config();
  RequestInput input = request(1, ramp(0, 21), 4, 1.0f);
  input.sampling.n = 4;
  c.engine.prefix_caching = false;
  Sim sim(c);
  sim.add(input);
  sim.run();
  EXPECT_EQ(sim.stats().prompt_tokens, 21 + 3) << "each further sample computes the prompt's last token again";
  EXPECT_NE(sim.output(1, 0).tokens, sim.output(1, 1).tokens);
  EXPECT_NE(sim.output(1, 1).tokens, sim.output(1, 2).tokens);
  EXPECT_EQ(sim.stats().num_finished, 1);
}

TEST(Scheduler, SamplesSurviveTheirParentsEnd) {
  SimConfig c = small_config();
  c.engine.max_num_seqs = 3;
  RequestInput input = request(1, ramp(0, 10), 3, 1.0f);
  input.sampling.n = 3;
  Sim sim(c);
  sim.add(request(7, ramp(50, 4), 20));
  sim.add(request(8, ramp(60, 4), 20));
  sim.add(input);
  sim.run();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(sim.output(1, i).tokens.size(), 3u);
}

TEST(Scheduler, PromptLogprobsCoverEachPositionOnceThoughPreempted) {
  SimConfig c = small_config();
  c.engine.num_blocks = 9;
  c.engine.max_step_tokens = 6;
  Sim sim(c);
  sim.add(request(1, ramp(50, 10), 14));
  RequestInput input = request(2, ramp(0, 14), 10);
  input.sampling.prompt_logprobs = 1;
  input.sampling.logprobs = 2;
  sim.add(input);
  sim.run();
  const Output& out = sim.output(2);
  ASSERT_EQ(out.prompt_logprobs.size(), 13u);
  for (int i = 0; i < 13; ++i) EXPECT_EQ(out.prompt_logprobs[static_cast<std::size_t>(i)].chosen.token, i + 1);
  EXPECT_EQ(out.prompt_logprobs[0].top.size(), 1u);
  ASSERT_EQ(out.logprobs.size(), 10u);
  EXPECT_EQ(out.logprobs[3].chosen.token, out.tokens[3]);
  EXPECT_EQ(out.logprobs[3].top.size(), 2u);
  EXPECT_TRUE(sim.output(1).logprobs.empty());
}

TEST(Scheduler, AbortWorksInEveryState) {
  for (PreemptionMode mode : {PreemptionMode::Recompute, PreemptionMode::Swap}) {
    // After `turns` turns, abort one of three requests that fight over 7 blocks.
    for (int turns = 0; turns < 30; ++turns) {
      for (std::uint64_t victim = 1; victim <= 3; ++victim) {
        SimConfig c = small_config();
        c.engine.num_blocks = 7;
        c.engine.max_num_seqs = 2;
        c.engine.preemption = mode;
        c.host_blocks = 8;
        Sim sim(c);
        std::vector<RequestInput> inputs;
        for (std::uint64_t id = 1; id <= 3; ++id) {
          inputs.push_back(request(id, ramp(static_cast<int>(50 * id), 8), 10));
          sim.add(inputs.back());
        }
        for (int i = 0; i < turns; ++i) sim.turn();
        const bool was_over = sim.output(victim).num_finishes > 0;
        sim.abort(victim);
        sim.abort(victim);
        EXPECT_EQ(sim.output(victim).num_finishes, 1);
        EXPECT_TRUE(was_over || sim.output(victim).finish == FinishReason::Abort);
        sim.run();
        for (std::uint64_t id = 1; id <= 3; ++id) {
          if (id == victim) continue;
          EXPECT_EQ(sim.output(id).tokens, alone(c, inputs[id - 1])) << "turn " << turns;
        }
      }
    }
  }
}

TEST(Scheduler, AnIdIsFreeAgainOnceItsEndWasToldThoughStepsAreInFlight) {
  Sim sim(small_config());
  sim.add(request(1, ramp(0, 6), 10));
  ASSERT_TRUE(sim.submit());
  sim.abort(1);
  EXPECT_EQ(sim.output(1).finish, FinishReason::Abort);
  sim.outputs.clear();
  sim.add(request(1, ramp(20, 6), 4));
  sim.run();
  EXPECT_EQ(sim.output(1).tokens, alone(small_config(), request(1, ramp(20, 6), 4)));
}

TEST(Scheduler, RefusesALiveIdAndMoreThanMaxWaiting) {
  SimConfig c = small_config();
  c.engine.max_waiting = 2;
  Sim sim(c);
  sim.add(request(1, ramp(0, 6), 2));
  sim.add(request(2, ramp(0, 6), 2));
  sim.add(request(3, ramp(0, 6), 2));
  EXPECT_EQ(sim.output(3).finish, FinishReason::Error);
  EXPECT_NE(sim.output(3).error.find("max_waiting"), std::string::npos);
  ASSERT_TRUE(sim.submit());
  sim.add(request(4, ramp(0, 6), 2));
  sim.run();
  EXPECT_EQ(sim.output(4).finish, FinishReason::Length);
}

TEST(Scheduler, ARequestThatWaitsBeyondItsDeadlineFails) {
  SimConfig c = small_config();
  c.engine.max_num_seqs = 1;
  Sim sim(c);
  RequestInput late = request(2, ramp(0, 6), 2), running = request(1, ramp(0, 6), 8);
  running.deadline = late.deadline = sim.now + std::chrono::milliseconds(5);
  sim.add(running);
  ASSERT_TRUE(sim.submit());
  sim.add(late);
  sim.now += std::chrono::milliseconds(6);
  sim.run();
  EXPECT_EQ(sim.output(2).finish, FinishReason::Error);
  EXPECT_NE(sim.output(2).error.find("deadline"), std::string::npos);
  EXPECT_EQ(sim.output(1).finish, FinishReason::Length) << "a deadline is for waiting only";
}

TEST(Scheduler, TimesAreInOrder) {
  Sim sim(small_config());
  sim.now += std::chrono::milliseconds(1);
  sim.add(request(1, ramp(0, 6), 3));
  for (; sim.scheduler().has_requests(); sim.turn()) sim.now += std::chrono::milliseconds(1);
  const RequestTimes& t = sim.output(1).times;
  EXPECT_LT(t.arrival, t.first_scheduled);
  EXPECT_LT(t.first_scheduled, t.first_token);
  EXPECT_LT(t.first_token, t.finished);
}

}  // namespace
}  // namespace fastllm::test

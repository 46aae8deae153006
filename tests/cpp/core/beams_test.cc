// Beam searches through the scheduler and the null model find what the same search finds when every beam is computed
// alone, from its first token on. The null model reads everything a sequence can reach, so a block that is shared,
// copied or recomputed wrongly changes the result.
#include <random>

#include "core/sim.h"
#include "test_seed.h"

namespace fastllm::test {
namespace {

RequestInput beam_request(std::uint64_t id, std::vector<TokenId> prompt, int max_tokens, int width, int n = 1) {
  RequestInput input = request(id, std::move(prompt), max_tokens);
  input.sampling.beam_width = width;
  input.sampling.n = n;
  input.sampling.logprobs = 2;
  return input;
}

SimConfig beam_config() {
  SimConfig c = small_config();
  c.engine.num_blocks = 200;
  c.engine.max_num_seqs = 12;
  c.model.vocab = 50;
  c.model.eos = {7, 17};
  return c;
}

// The search itself, each step of each beam a request of its own.
std::vector<BeamSearch::Result> search_alone(SimConfig c, const RequestInput& input) {
  c.engine.prefix_caching = false;
  c.engine.async_depth = 1;
  c.engine.num_blocks = 1000;
  const SamplingParams& p = input.sampling;
  BeamRules rules{p.beam_width, p.max_tokens, p.min_tokens, p.length_penalty, p.early_stopping, p.stop_ids, p.logprobs};
  if (!p.ignore_eos) rules.ends.insert(rules.ends.end(), c.model.eos.begin(), c.model.eos.end());
  const int candidates = beam_candidates(p.beam_width, static_cast<int>(rules.ends.size()), c.model.vocab);
  BeamSearch search(rules);
  std::vector<std::vector<TokenId>> beams = {input.prompt};
  while (!beams.empty()) {
    std::vector<PositionLogprobs> rows;
    for (const auto& tokens : beams) {
      Sim sim(c);
      sim.check_each = false;
      RequestInput step = request(1, tokens, 1);
      step.sampling.logprobs = candidates;
      step.sampling.ignore_eos = p.ignore_eos;
      step.sampling.min_tokens = search.length() < p.min_tokens ? 1 : 0;  // the null model's logits depend on it
      sim.add(step);
      sim.run();
      rows.push_back(sim.output(1).logprobs.at(0));
    }
    std::vector<std::vector<TokenId>> next;
    for (const BeamSearch::Child& child : search.advance(rows)) {
      next.push_back(beams[static_cast<std::size_t>(child.parent)]);
      next.back().push_back(child.token);
    }
    beams = std::move(next);
  }
  return search.results();
}

void expect_found(Sim& sim, const RequestInput& input, const std::vector<BeamSearch::Result>& expected) {
  for (int i = 0; i < input.sampling.n; ++i) {
    SCOPED_TRACE("request " + std::to_string(input.id) + "/" + std::to_string(i));
    const BeamSearch::Result& result = expected.at(static_cast<std::size_t>(i));
    const Output& out = sim.output(input.id, i);
    EXPECT_EQ(out.error, "");
    EXPECT_EQ(out.tokens, result.tokens);
    EXPECT_EQ(out.finish, result.ended ? FinishReason::Stop : FinishReason::Length);
    EXPECT_EQ(out.num_finishes, 1);
    ASSERT_EQ(out.logprobs.size(), result.logprobs.size());
    for (std::size_t t = 0; t < result.logprobs.size(); ++t) {
      EXPECT_EQ(out.logprobs[t].chosen.logprob, result.logprobs[t].chosen.logprob);
      EXPECT_EQ(out.logprobs[t].top.size(), 2u);
    }
  }
  EXPECT_FALSE(sim.outputs.contains({input.id, input.sampling.n})) << "only n results are delivered";
}

RequestInput random_request(std::mt19937_64& rng, std::uint64_t id) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  const int width = pick(1, 5);
  RequestInput input = beam_request(id, ramp(pick(0, 1), pick(1, 14)), pick(1, 14), width, pick(1, width));
  input.sampling.length_penalty = static_cast<float>(pick(-1, 2));
  input.sampling.early_stopping = static_cast<EarlyStopping>(pick(0, 2));
  input.sampling.min_tokens = pick(0, 3) ? 0 : pick(0, input.sampling.max_tokens);
  input.sampling.ignore_eos = pick(0, 3) == 0;
  if (pick(0, 3) == 0) input.sampling.prompt_logprobs = 1;
  return input;
}

TEST(Beams, FindWhatEveryBeamAloneFindsHoweverTheyRun) {
  std::mt19937_64 rng(test_seed());
  std::vector<RequestInput> searches;
  std::vector<std::vector<BeamSearch::Result>> expected;
  for (std::uint64_t id = 0; id < 12; ++id) {
    searches.push_back(random_request(rng, id));
    expected.push_back(search_alone(beam_config(), searches.back()));
  }
  std::int64_t preemptions = 0;
  for (const int depth : {1, 2, 3}) {
    for (const int blocks : {200, 24, 9}) {
      for (const int variant : {0, 1, 2, 3}) {
        SimConfig c = beam_config();
        c.engine.async_depth = depth;
        c.engine.num_blocks = blocks;
        c.engine.prefix_caching = variant != 1;
        c.engine.max_chunk = variant == 2 ? 3 : 0;
        if (variant == 3) {
          c.engine.preemption = PreemptionMode::Swap;
          c.host_blocks = 25;
        }
        SCOPED_TRACE("depth " + std::to_string(depth) + " blocks " + std::to_string(blocks) + " variant " +
                     std::to_string(variant));
        Sim sim(c);
        for (const RequestInput& input : searches) {
          sim.add(input);
          sim.add(request(100 + input.id, ramp(1, 5), 9, 1.0f));  // others run beside them
          if (input.id % 3 == 0) sim.turn();
        }
        sim.run();
        for (std::size_t i = 0; i < searches.size(); ++i) expect_found(sim, searches[i], expected[i]);
        if (testing::Test::HasFailure()) return;
        preemptions += sim.stats().num_preemptions;
      }
    }
  }
  EXPECT_GT(preemptions, 0);
}

TEST(Beams, ComputeThePromptOnceAndShareItsBlocks) {
  SimConfig c = beam_config();
  c.engine.prefix_caching = false;
  c.engine.num_blocks = 64;
  Sim sim(c);
  RequestInput input = beam_request(1, ramp(0, 40), 12, 4, 4);
  input.sampling.ignore_eos = true;
  sim.add(input);
  sim.run();
  EXPECT_EQ(sim.stats().prompt_tokens, 40);
  EXPECT_EQ(sim.stats().num_preemptions, 0);
  EXPECT_EQ(sim.stats().num_steps, 12);
  EXPECT_LE(sim.stats().peak_used_blocks, 10 + 4 * 3);
  EXPECT_EQ(sim.output(1).tokens.size(), 12u);
}

TEST(Beams, AnAbortGivesEveryBlockBackAtAnyMoment) {
  for (int turns = 0; turns < 20; ++turns) {
    Sim sim(beam_config());
    sim.add(beam_request(1, ramp(0, 10), 16, 4, 2));
    for (int i = 0; i < turns; ++i) sim.turn();
    sim.abort(1);
    sim.run();
    EXPECT_EQ(sim.output(1, 0).num_finishes, 1);
    EXPECT_EQ(sim.output(1, 1).num_finishes, 1);
    EXPECT_FALSE(sim.outputs.contains({1, 2}));
  }
}

TEST(Beams, RandomOperationsKeepEveryInvariant) {
  std::mt19937_64 rng(test_seed());
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  for (int run = 0; run < 12; ++run) {
    SimConfig c = beam_config();
    c.engine.block_size = pick(1, 6);
    c.engine.num_blocks = pick(30, 60);
    c.engine.max_num_seqs = pick(5, 9);
    c.engine.async_depth = pick(1, 3);
    c.engine.prefix_caching = pick(0, 2) > 0;
    c.engine.preemption = pick(0, 1) ? PreemptionMode::Swap : PreemptionMode::Recompute;
    c.host_blocks = pick(0, 30);
    Sim sim(c);
    std::map<std::uint64_t, RequestInput> added;
    for (int op = 0; op < 400; ++op) {
      const int roll = pick(0, 99);
      if (roll < 8) {
        const auto id = static_cast<std::uint64_t>(op);
        added[id] = pick(0, 3) ? random_request(rng, id) : request(id, ramp(0, pick(1, 20)), pick(1, 12), 1.0f);
        sim.add(added[id]);
      } else if (roll < 11 && !added.empty()) {
        sim.abort(std::next(added.begin(), pick(0, static_cast<int>(added.size()) - 1))->first);
      } else if (roll < 60) {
        if (sim.can_submit()) sim.submit();
      } else if (sim.inflight() > 0) {
        sim.finish();
      }
      if (testing::Test::HasFailure()) return;
    }
    sim.run();
    for (const auto& [id, input] : added) {
      EXPECT_EQ(sim.output(id).error, "");
      if (input.sampling.beam_width == 0 || sim.output(id).finish == FinishReason::Abort || pick(0, 5)) continue;
      expect_found(sim, input, search_alone(c, input));
    }
  }
}

TEST(Beams, WhatASearchCannotUseIsRefused) {
  const auto refusal = [](auto change) {
    Sim sim(beam_config());
    RequestInput input = beam_request(1, ramp(0, 3), 4, 4);
    change(input);
    sim.add(input);
    return sim.output(1).error;
  };
  EXPECT_NE(refusal([](RequestInput& r) { r.sampling.n = 5; }).find("beam_width is 4"), std::string::npos);
  EXPECT_NE(refusal([](RequestInput& r) { r.sampling.beam_width = 13; }).find("beam_width is 13"), std::string::npos);
  EXPECT_NE(refusal([](RequestInput& r) { r.sampling.logit_bias = {{1, 2.0f}}; }).find("logit_bias"),
            std::string::npos);
  EXPECT_NE(refusal([](RequestInput& r) { r.sampling.stop_ids = ramp(20, 20); }).find("max_logprobs is 20"),
            std::string::npos);
  EXPECT_EQ(refusal([](RequestInput&) {}), "");
}

// [row][option] = {token, logprob}
std::vector<PositionLogprobs> rows_of(std::vector<std::vector<std::pair<TokenId, float>>> table) {
  std::vector<PositionLogprobs> rows;
  for (const auto& options : table) {
    PositionLogprobs& row = rows.emplace_back();
    for (const auto& [token, logprob] : options) row.top.push_back({token, logprob, 0});
    row.chosen = row.top.front();
  }
  return rows;
}

struct StopCase {
  EarlyStopping early;
  float penalty;
  bool over;  // after the second step
};

class BeamStops : public testing::TestWithParam<StopCase> {};

// Two results of sums -1 and -2 in two steps, and a beam of sum -3 that may grow to 10 tokens.
TEST_P(BeamStops, WhenTransformersStops) {
  const StopCase& t = GetParam();
  BeamSearch search({2, 10, 0, t.penalty, t.early, {9}, -1});
  EXPECT_EQ(search.advance(rows_of({{{9, -1.0f}, {1, -1.5f}, {2, -1.75f}}})).size(), 2u);
  const bool over = search.advance(rows_of({{{9, -0.5f}, {3, -1.5f}}, {{9, -8.0f}, {4, -3.0f}}})).empty();
  EXPECT_EQ(over, t.over);
  EXPECT_EQ(search.results().size(), 2u);
}

INSTANTIATE_TEST_SUITE_P(
    All, BeamStops,
    testing::Values(StopCase{EarlyStopping::Yes, 1.0f, true}, StopCase{EarlyStopping::No, 0.0f, true},
                    StopCase{EarlyStopping::No, 1.0f, true}, StopCase{EarlyStopping::No, 2.0f, false},
                    StopCase{EarlyStopping::Never, 0.0f, true}, StopCase{EarlyStopping::Never, 1.0f, false},
                    StopCase{EarlyStopping::Never, -1.0f, true}));

}  // namespace
}  // namespace fastllm::test

// Which tokens a request may have at all, and which not after others.
#include <algorithm>

#include "core/sim.h"
#include "runtime/bad_words.h"

namespace fastllm::test {
namespace {

using Ids = std::vector<TokenId>;

struct Completion {
  std::vector<Ids> words;
  Ids output, forbidden;
};

class Completions : public testing::TestWithParam<Completion> {};

TEST_P(Completions, AreTheLastIdsOfWordsThatTheOutputBegins) {
  Ids found;
  append_completions(GetParam().words, GetParam().output, found);
  EXPECT_EQ(found, GetParam().forbidden);
}

INSTANTIATE_TEST_SUITE_P(All, Completions,
                         testing::Values(Completion{{}, {1, 2}, {}}, Completion{{{5}}, {}, {5}},
                                         Completion{{{1, 2}}, {1}, {2}}, Completion{{{1, 2}}, {1, 3}, {}},
                                         Completion{{{1, 2, 3}}, {2}, {}}, Completion{{{1, 1, 1}}, {1, 1, 1}, {1}},
                                         Completion{{{7, 1, 2}, {1, 9}, {4}}, {7, 1}, {2, 9, 4}}));

TEST(TokenLists, HoldInEveryStepWhateverElseRuns) {
  for (const int depth : {1, 3}) {
    SimConfig c = small_config();
    c.engine.async_depth = depth;
    c.engine.num_blocks = 14;  // too few for all at once
    Sim sim(c);
    for (std::uint64_t id = 0; id < 6; ++id) {
      RequestInput input = request(id, ramp(static_cast<int>(id), 4), 20, 1.0f);
      input.sampling.seed = id;
      input.sampling.allowed_ids = {11, 22, 33};
      input.sampling.bad_words = {{11, 22}, {22, 22, 22}, {33, 11, 11}};
      sim.add(input);
      sim.add(request(100 + id, ramp(2, 6), 15));
    }
    sim.run();
    for (std::uint64_t id = 0; id < 6; ++id) {
      const Ids& tokens = sim.output(id).tokens;
      ASSERT_EQ(tokens.size(), 20u);
      for (const TokenId t : tokens) EXPECT_TRUE(t == 11 || t == 22 || t == 33);
      for (const Ids& word : {Ids{11, 22}, Ids{22, 22, 22}, Ids{33, 11, 11}}) {
        EXPECT_TRUE(std::ranges::search(tokens, word).empty());
      }
    }
    EXPECT_GT(sim.stats().num_preemptions, 0);
  }
}

TEST(TokenLists, WordsOfOneTokenWaitForNoResult) {
  Sim sim(small_config());
  RequestInput input = request(1, ramp(0, 5), 8);
  input.sampling.bad_words = {{3}};
  sim.add(input);
  ASSERT_TRUE(sim.submit());
  EXPECT_TRUE(sim.submit()) << "the next step does not depend on what the first brings";
  sim.run();
}

TEST(TokenLists, NothingLeftEndsThisRequestOnly) {
  Sim sim(small_config());
  RequestInput input = request(1, ramp(0, 5), 8);
  input.sampling.allowed_ids = {5};
  input.sampling.bad_words = {{5, 5}};
  sim.add(input);
  sim.add(request(2, ramp(0, 5), 8));
  sim.run();
  EXPECT_NE(sim.output(1).error.find("No token"), std::string::npos);
  EXPECT_EQ(sim.output(1).tokens, Ids{5});
  EXPECT_EQ(sim.output(2).tokens.size(), 8u);
}

}  // namespace
}  // namespace fastllm::test

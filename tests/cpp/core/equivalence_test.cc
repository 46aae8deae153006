// The null model answers with a hash of everything a sequence can read, so equal tokens mean that scheduling, copying,
// caching, swapping and preempting left every position as it should be.
#include <random>

#include "core/sim.h"
#include "test_seed.h"

namespace fastllm::test {
namespace {

struct Variant {
  std::string name;
  SimConfig config;
};

SimConfig reference_config() {
  SimConfig c = small_config();
  c.engine.num_blocks = 2000;
  c.engine.prefix_caching = false;
  c.engine.async_depth = 1;
  c.engine.max_num_seqs = 1;
  c.model.eos = {7, 77};
  return c;
}

std::vector<Variant> variants() {
  std::vector<Variant> list;
  const auto add = [&](const std::string& name, auto change) {
    for (int depth : {1, 2, 3}) {
      for (bool cache : {false, true}) {
        Variant v{name + " depth " + std::to_string(depth) + (cache ? " cached" : " uncached"), reference_config()};
        v.config.engine.max_num_seqs = 8;
        v.config.engine.async_depth = depth;
        v.config.engine.prefix_caching = cache;
        change(v.config);
        list.push_back(v);
      }
    }
  };
  const auto tiny = [](SimConfig& c) { c.engine.num_blocks = 20; };
  const auto swap = [](SimConfig& c) {
    c.engine.num_blocks = 20;
    c.engine.preemption = PreemptionMode::Swap;
    c.host_blocks = 25;
  };
  add("plain", [](SimConfig&) {});
  add("chunk 1", [](SimConfig& c) { c.engine.max_chunk = 1; });
  add("chunk 7", [](SimConfig& c) { c.engine.max_chunk = 7; });
  add("budget 5", [](SimConfig& c) { c.engine.max_step_tokens = 5; });
  add("batch of 32", [](SimConfig& c) { c.engine.max_num_seqs = 32; });
  add("tiny KV", tiny);
  add("tiny KV, chunk 3", [&](SimConfig& c) {
    tiny(c);
    c.engine.max_chunk = 3;
  });
  add("swap", swap);
  add("swap, chunk 3", [&](SimConfig& c) {
    swap(c);
    c.engine.max_chunk = 3;
  });
  add("priority, tiny KV", [&](SimConfig& c) {
    tiny(c);
    c.engine.policy = SchedulingPolicy::Priority;
  });
  add("colliding hash", [&](SimConfig& c) {
    tiny(c);
    c.hash = [](PrefixNodeId, std::span<const TokenId>) -> std::uint64_t { return 42; };
  });
  add("block size 1", [](SimConfig& c) {
    c.engine.block_size = 1;
    c.engine.num_blocks = 90;
  });
  add("block size 16", [](SimConfig& c) {
    c.engine.block_size = 16;
    c.engine.num_blocks = 9;
  });
  return list;
}

// Prompts that share beginnings; greedy and sampled; some with n > 1, penalties, scored prompts, early stops.
std::vector<RequestInput> workload(std::mt19937_64& rng) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  std::vector<RequestInput> list;
  for (std::uint64_t id = 0; id < 32; ++id) {
    std::vector<TokenId> prompt = ramp(100 * pick(0, 2), pick(0, 30));
    for (int i = pick(1, 12); i > 0; --i) prompt.push_back(pick(0, 3));
    RequestInput input = request(id, prompt, pick(1, 24), pick(0, 1) ? 1.0f : 0.0f);
    input.priority = pick(-2, 2);
    input.sampling.seed = static_cast<std::uint64_t>(pick(0, 1000));
    if (pick(0, 3) == 0) input.sampling.n = pick(2, 4);
    if (pick(0, 3) == 0) input.sampling.presence_penalty = 0.5f;
    if (pick(0, 4) == 0) input.sampling.prompt_logprobs = 2;
    if (pick(0, 4) == 0) input.sampling.logprobs = pick(0, 3);
    if (pick(0, 3) == 0) input.sampling.min_tokens = pick(0, input.sampling.max_tokens);
    for (int i = 0; i < 40; ++i) input.sampling.stop_ids.push_back(pick(0, 999));
    if (pick(0, 2) == 0) input.cache_salt = "tenant";
    list.push_back(input);
  }
  return list;
}

void expect_same(const Output& a, const Output& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.finish, b.finish);
  EXPECT_EQ(a.stop_token, b.stop_token);
  EXPECT_EQ(a.error, b.error);
  EXPECT_EQ(a.num_finishes, 1);
  const auto same = [](const std::vector<PositionLogprobs>& x, const std::vector<PositionLogprobs>& y) {
    ASSERT_EQ(x.size(), y.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      EXPECT_EQ(x[i].chosen.token, y[i].chosen.token);
      EXPECT_EQ(x[i].chosen.logprob, y[i].chosen.logprob);
      EXPECT_EQ(x[i].top.size(), y[i].top.size());
    }
  };
  same(a.logprobs, b.logprobs);
  same(a.prompt_logprobs, b.prompt_logprobs);
}

TEST(Equivalence, EverySequenceGetsTheTokensItGetsAlone) {
  std::mt19937_64 rng(test_seed());
  const std::vector<RequestInput> requests = workload(rng);

  // Alone, one step at a time, without sharing: sequence i of a request is a request with that sequence's seed.
  std::map<std::pair<std::uint64_t, int>, Output> alone;
  for (const RequestInput& input : requests) {
    for (int i = 0; i < input.sampling.n; ++i) {
      RequestInput single = input;
      single.sampling.n = 1;
      single.sampling.seed = sequence_seed(*input.sampling.seed, i);
      if (i > 0) single.sampling.prompt_logprobs = -1;
      Sim sim(reference_config());
      sim.add(single);
      sim.run();
      alone[{input.id, i}] = sim.output(input.id);
    }
  }
  std::int64_t preemptions = 0, hits = 0;
  for (const Variant& v : variants()) {
    SCOPED_TRACE(v.name);
    Sim sim(v.config);
    for (const RequestInput& input : requests) {
      sim.add(input);
      if (input.id % 3 == 0) sim.turn();
    }
    sim.run();
    for (const auto& [key, output] : alone) {
      SCOPED_TRACE("request " + std::to_string(key.first) + "/" + std::to_string(key.second));
      expect_same(sim.output(key.first, key.second), output);
    }
    if (testing::Test::HasFailure()) return;
    preemptions += sim.stats().num_preemptions;
    hits += sim.stats().prefix_hits;
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_GT(hits, 0);
}

}  // namespace
}  // namespace fastllm::test

// Random adds, aborts, submissions and results under random configurations, the invariants checked after each. Every
// request that ends by itself must have the tokens it gets alone.
//
// FASTLLM_RANDOM_OPS operations for each of FASTLLM_RANDOM_SEEDS seeds; FASTLLM_RANDOM_SEED repeats one.
#include <cstdlib>
#include <random>

#include "core/sim.h"

namespace fastllm::test {
namespace {

std::uint64_t setting(const char* name, std::uint64_t fallback) {
  const char* value = std::getenv(name);
  return value ? std::strtoull(value, nullptr, 10) : fallback;
}

class RandomRun {
 public:
  explicit RandomRun(std::uint64_t seed) : rng_(seed), config_(random_config()), sim_(config_) {}

  void operate() {
    const int roll = pick(0, 99);
    if (roll < 12) {
      if (live_.size() < 24) add();
    } else if (roll < 15) {
      if (!live_.empty()) sim_.abort(std::next(live_.begin(), pick(0, static_cast<int>(live_.size()) - 1))->first);
    } else if (roll < 16) {
      sim_.scheduler().reset_prefix_cache();
    } else if (roll < 60) {
      if (sim_.can_submit()) sim_.submit();
    } else if (sim_.inflight() > 0) {
      sim_.finish();
    }
    collect();
  }

  void end() {
    sim_.run();
    collect();
    EXPECT_TRUE(live_.empty());
  }

  int num_compared = 0;

 private:
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }

  SimConfig random_config() {
    SimConfig c = small_config();
    c.engine.block_size = pick(1, 8);
    c.engine.num_blocks = pick(8, 60);
    c.engine.max_num_seqs = pick(1, 12);
    c.engine.max_step_tokens = pick(1, 80);
    c.engine.max_chunk = pick(0, 1) ? 0 : pick(1, 20);
    c.engine.async_depth = pick(1, 3);
    c.engine.prefix_caching = pick(0, 3) > 0;
    c.engine.policy = pick(0, 1) ? SchedulingPolicy::Fcfs : SchedulingPolicy::Priority;
    c.engine.preemption = pick(0, 1) ? PreemptionMode::Swap : PreemptionMode::Recompute;
    c.host_blocks = pick(0, 40);
    if (pick(0, 1) == 0) c.resident_blocks = pick(0, 60);
    c.model.max_len = 64;
    c.model.vocab = 200;
    c.model.eos = {3, 33};
    if (pick(0, 3) == 0)
      c.hash = [](PrefixNodeId, std::span<const TokenId> t) { return static_cast<std::uint64_t>(t[0] % 2); };
    return c;
  }

  void add() {
    const int pool = static_cast<int>(config_.engine.num_blocks) * config_.engine.block_size;
    const int size = pick(1, std::min(pool, 40));
    std::vector<TokenId> prompt = ramp(10 * pick(0, 1), size);
    for (int i = pick(0, 6); i > 0; --i) prompt[static_cast<std::size_t>(pick(0, size - 1))] = pick(0, 1);
    RequestInput input = request(next_id_++, prompt, pick(1, 30), pick(0, 1) ? 1.0f : 0.0f);
    input.priority = pick(0, 3);
    input.sampling.n = pick(0, 4) ? 1 : pick(1, std::min(4, config_.engine.max_num_seqs));
    input.sampling.seed = rng_();
    if (pick(0, 4) == 0) input.sampling.repetition_penalty = 1.5f;
    if (pick(0, 4) == 0) input.sampling.prompt_logprobs = 0;
    if (pick(0, 2) == 0) input.cache_salt = "salt";
    live_[input.id] = input;
    sim_.add(std::move(input));
  }

  // Compares some of the requests that ended and forgets them all.
  void collect() {
    std::erase_if(live_, [&](const auto& entry) {
      const RequestInput& input = entry.second;
      for (int i = 0; i < input.sampling.n; ++i) {
        if (sim_.output(input.id, i).num_finishes == 0) return false;
      }
      for (int i = 0; i < input.sampling.n; ++i) {
        const Output& out = sim_.output(input.id, i);
        EXPECT_EQ(out.error, "");
        if (out.finish != FinishReason::Abort && pick(0, 7) == 0) compare(input, i, out);
        sim_.outputs.erase({input.id, i});
      }
      return true;
    });
  }

  void compare(RequestInput input, int i, const Output& out) {
    SimConfig c = config_;
    c.engine.max_num_seqs = 1;
    c.engine.async_depth = 1;
    c.engine.prefix_caching = false;
    c.engine.max_step_tokens = 100;
    c.engine.max_chunk = 0;
    input.sampling.n = 1;
    input.sampling.seed = sequence_seed(*input.sampling.seed, i);
    if (i > 0) input.sampling.prompt_logprobs = -1;
    const std::uint64_t id = input.id;
    Sim alone(c);
    alone.check_each = false;
    alone.add(std::move(input));
    alone.run();
    EXPECT_EQ(out.tokens, alone.output(id).tokens);
    EXPECT_EQ(out.finish, alone.output(id).finish);
    EXPECT_EQ(out.prompt_logprobs.size(), alone.output(id).prompt_logprobs.size());
    ++num_compared;
  }

  std::mt19937_64 rng_;
  SimConfig config_;
  Sim sim_;
  std::map<std::uint64_t, RequestInput> live_;
  std::uint64_t next_id_ = 1;
};

TEST(RandomOperations, KeepEveryInvariantAndEveryToken) {
  const std::uint64_t ops = setting("FASTLLM_RANDOM_OPS", 20000), seeds = setting("FASTLLM_RANDOM_SEEDS", 3);
  const std::uint64_t only = setting("FASTLLM_RANDOM_SEED", 0);
  std::random_device device;
  for (std::uint64_t s = 0; s < (only ? 1 : seeds); ++s) {
    const std::uint64_t seed = only ? only : device();
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    SCOPED_TRACE("FASTLLM_RANDOM_SEED=" + std::to_string(seed));
    // A run per thousand operations, so that one seed meets many configurations.
    std::mt19937_64 seeds_of_runs(seed);
    int compared = 0;
    for (std::uint64_t done = 0; done < ops; done += 1000) {
      RandomRun run(seeds_of_runs());
      for (std::uint64_t i = 0; i < 1000 && !testing::Test::HasFailure(); ++i) run.operate();
      run.end();
      compared += run.num_compared;
      if (testing::Test::HasFailure()) FAIL() << "operation " << done << " to " << done + 1000;
    }
    EXPECT_GT(compared, 0);
  }
}

}  // namespace
}  // namespace fastllm::test

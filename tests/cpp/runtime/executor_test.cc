// The local executor with real weights, driven by hand-made plans: what the scheduler may rely on.
#include "runtime/executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iostream>
#include <latch>
#include <numeric>
#include <random>

#include "fastllm/error.h"
#include "model_fixture.h"
#include "recording_backend.h"
#include "reference_model.h"
#include "runtime/local_executor.h"
#include "runtime/worker.h"

namespace fastllm {
namespace {

using testing::random_model;
using testing::RecordingBackend;
using testing::TestModel;

constexpr int kBlock = 4, kMaxLen = 64, kSlots = 4, kBlocksPerSlot = kMaxLen / kBlock;

EngineConfig test_config(int ranks = 1) {
  EngineConfig c;
  c.dtype = "float32";
  c.max_model_len = kMaxLen, c.max_num_seqs = kSlots, c.max_step_tokens = 64, c.block_size = kBlock;
  c.tensor_parallel_size = ranks, c.cpu_threads = 2;
  return c;
}

// Sequence i lives in slot i and in the blocks that belong to the slot.
struct Sequence {
  int slot = 0;
  std::vector<TokenId> tokens;
  std::int32_t num_prompt = 0;
  std::shared_ptr<const SamplingParams> params = std::make_shared<SamplingParams>();
  std::shared_ptr<LogitsProcessor> processor;
  std::int32_t num_computed = 0;
};

class Driver {
 public:
  Driver(const TestModel& model, const EngineConfig& config)
      : Driver(make_local_executor(config, model.source(), {})) {}
  // On a backend that pads and records.
  Driver(const TestModel& model, const EngineConfig& config, std::vector<int> sizes, RecordingBackend::Log& log)
      : Driver(make_local_executor(config, model.source(), {}, [&](int) -> std::unique_ptr<Backend> {
          return std::make_unique<RecordingBackend>(sizes, log);
        })) {}
  Executor& executor() { return *executor_; }
  StepPlan& plan() { return plan_; }

  void begin() {
    plan_.clear();
    plan_.id = next_id_++;
  }
  void admit(const Sequence& s) {
    SlotInit init{SlotId{s.slot}, s.params, s.params->seed.value_or(7), {}, s.num_prompt, s.processor};
    if (needs_history(*s.params)) init.tokens = s.tokens;
    plan_.new_slots.push_back(std::move(init));
    for (int b = 0; b < kBlocksPerSlot; ++b)
      plan_.table_sets.push_back({SlotId{s.slot}, b, static_cast<BlockId>(1 + s.slot * kBlocksPerSlot + b)});
  }
  // Plans the next `n` tokens; samples when they reach the end.
  void add_row(Sequence& s, std::int32_t n, std::uint8_t flags = 0) {
    const auto begin = static_cast<std::int32_t>(plan_.tokens.size());
    for (std::int32_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::size_t>(s.num_computed + i);
      plan_.tokens.push_back((flags & kFromSlot) != 0 ? -1 : s.tokens.at(at));
    }
    if ((flags & kFromSlot) != 0 || s.num_computed + n == static_cast<std::int32_t>(s.tokens.size())) flags |= kSample;
    plan_.rows.push_back({SlotId{s.slot}, s.num_computed, n, 0, begin, flags});
    s.num_computed += n;
  }
  const StepResult& run() {
    executor_->submit(plan_);
    const StepResult& r = executor_->wait(plan_.id);
    EXPECT_EQ(r.error, "");
    return r;
  }
  // Admits s, prefills in chunks and decodes `n` tokens.
  void generate(Sequence& s, int n, int chunk = kMaxLen) {
    begin();
    admit(s);
    for (int i = 0; i < n;) {
      if (i > 0 || s.num_computed > 0) begin();
      add_row(s, std::min<std::int32_t>(chunk, static_cast<std::int32_t>(s.tokens.size()) - s.num_computed));
      const StepResult& r = run();
      if (r.tokens.empty()) continue;
      s.tokens.push_back(r.tokens[0]);
      ++i;
    }
  }

 private:
  explicit Driver(std::unique_ptr<Executor> executor) : executor_(std::move(executor)) {
    executor_->init_kv(1 + kSlots * kBlocksPerSlot, kBlocksPerSlot);
  }

  StepPlan plan_;  // outlives the executor, which may still read it
  std::unique_ptr<Executor> executor_;
  std::uint64_t next_id_ = 1;
};

Sequence sequence(std::vector<TokenId> prompt, SamplingParams params, int slot = 0) {
  Sequence s;
  s.slot = slot;
  s.num_prompt = static_cast<std::int32_t>(prompt.size());
  s.tokens = std::move(prompt);
  s.params = std::make_shared<SamplingParams>(std::move(params));
  return s;
}

SamplingParams greedy() {
  SamplingParams p;
  p.temperature = 0;
  return p;
}

SamplingParams sampled_with_penalties() {
  SamplingParams p;
  p.temperature = 1.3f, p.top_p = 0.95f, p.top_k = 40, p.seed = 99;
  p.repetition_penalty = 1.2f, p.presence_penalty = 0.5f, p.frequency_penalty = 0.4f;
  return p;
}

std::vector<TokenId> prompt(int n = 11) {
  std::vector<TokenId> ids(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<TokenId>((i * 31 + 7) % 97);
  return ids;
}

const TestModel& llama() {
  static const TestModel m = random_model(testing::llama_spec(), 11);
  return m;
}

TEST(LocalExecutor, test_rank_counts_and_chunks_give_the_same_greedy_tokens) {
  const auto seed = std::random_device{}();
  std::cout << "seed " << seed << "\n";
  for (const auto& [name, spec] : testing::test_specs()) {
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
    const auto logits = testing::reference_logits(model, want);
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

  const auto logits = testing::reference_logits(llama(), s.tokens);
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
  const auto seed = std::random_device{}();
  std::cout << "seed " << seed << "\n";
  for (const auto& [name, spec] : testing::test_specs()) {
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
  EXPECT_EQ(executor->device_use().weights, 0);
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
}  // namespace fastllm

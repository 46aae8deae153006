// What kernels find in device memory after begin_step(), against the StepInput it came from.
#include "steps.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <thread>

#include "device.h"
#include "made_step.h"
#include "update_inputs.h"

namespace fastllm::test {
namespace {

using cuda::CudaStep;
using cuda::DeviceRow;
using cuda::DeviceSampleRow;
using cuda::LogitAdjustment;
using cuda::StepRing;

template <class T>
std::vector<T> fetch(const T* device, std::size_t n, cudaStream_t stream) {
  std::vector<T> host(n);
  cuda::check(cudaMemcpyAsync(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost, stream), "fetch");
  cuda::check(cudaStreamSynchronize(stream), "fetch");
  return host;
}

class StepTest : public CudaTest {
 protected:
  static constexpr int kSlots = 33, kWidth = 70;

  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped()) make(2, false);
  }
  void TearDown() override {
    if (stream != nullptr) cudaStreamSynchronize(stream);
    ring.reset();
    staging.reset();
    CudaTest::TearDown();
  }
  void make(int in_flight, bool deterministic) {
    StepLimits limits;
    limits.max_tokens = 500;
    limits.max_slots = kSlots;
    limits.max_logit_rows = 64;
    limits.table_width = kWidth;
    limits.block_size = 16;
    limits.vocab = 1000;
    limits.in_flight = in_flight;
    cuda::AttentionLimits attention;
    attention.max_rows = limits.max_slots;
    attention.max_tokens = limits.max_tokens;
    attention.max_len = kWidth * 16;
    attention.num_sms = properties.multiProcessorCount;
    attention.capability = capability();
    staging = std::make_unique<cuda::Staging>(stream);
    ring = std::make_unique<StepRing>(limits, attention, deterministic, stream);
    tables.assign(kSlots * kWidth, BlockId{0});
    last_token.assign(kSlots, 0);
  }
  // Decode rows in distinct slots, then prefill rows, with table sets of which some repeat an entry.
  MadeStep random_step(int decode_rows, int prefill_rows) {
    MadeStep made;
    std::vector<int> slots(kSlots);
    for (int i = 0; i < kSlots; ++i) slots[static_cast<std::size_t>(i)] = i;
    std::shuffle(slots.begin(), slots.end(), std::mt19937(static_cast<unsigned>(random.bits())));
    int next = 0;
    const auto slot = [&] { return slots[static_cast<std::size_t>(next++)]; };
    for (int i = 0; i < decode_rows; ++i)
      made.add_row(random, slot(), 1, random.below(kWidth * 16 - 1), true, random.below(2) == 0);
    made.num_decode_rows = decode_rows;
    for (int i = 0; i < prefill_rows; ++i)
      made.add_row(random, slot(), 2 + random.below(60), random.below(500), random.below(2) == 0, false);
    for (int i = random.below(100); i > 0; --i)
      made.table_sets.push_back({SlotId{random.below(3)}, random.below(10), BlockId{random.below(1 << 30)}});
    return made;
  }
  void check(CudaStep& step, const MadeStep& made) {
    const std::size_t rows = std::max<std::size_t>(made.rows.size(), static_cast<std::size_t>(made.padded_rows));
    const std::size_t tokens = std::max<std::size_t>(made.tokens.size(), static_cast<std::size_t>(made.padded_rows));
    ASSERT_EQ(step.view.num_tokens, static_cast<int>(tokens));
    ASSERT_EQ(step.view.num_rows, static_cast<int>(rows));
    const auto ids = fetch(step.view.ids, tokens, stream);
    const auto positions = fetch(step.view.positions, tokens, stream);
    const auto token_slot = fetch(step.view.token_slot, tokens, stream);
    const auto device_rows = fetch(step.view.rows, rows, stream);
    for (std::size_t r = 0; r < rows; ++r) {
      SCOPED_TRACE("row " + std::to_string(r) + " seed " + std::to_string(test_seed()));
      const DeviceRow& d = device_rows[r];
      if (r >= made.rows.size()) {
        EXPECT_EQ(d.token_begin, static_cast<int>(r));
        EXPECT_EQ(d.num_tokens, 1);
        EXPECT_EQ(d.first_pos, -1);
        EXPECT_EQ(d.slot, -1);
        EXPECT_EQ(ids[r], 0);
        EXPECT_EQ(positions[r], 0);
        EXPECT_EQ(token_slot[r], -1);
        continue;
      }
      const StepRow& want = made.rows[r];
      const auto slot = static_cast<std::int32_t>(want.slot);
      EXPECT_EQ(d.token_begin, want.token_begin);
      EXPECT_EQ(d.num_tokens, want.num_tokens);
      EXPECT_EQ(d.first_pos, want.first_pos);
      EXPECT_EQ(d.slot, slot);
      for (int k = 0; k < want.num_tokens; ++k) {
        const auto t = static_cast<std::size_t>(want.token_begin + k);
        ASSERT_EQ(ids[t], want.from_slot ? last_token[static_cast<std::size_t>(slot)] : made.tokens[t])
            << "token " << t;
        ASSERT_EQ(positions[t], want.first_pos + k) << "token " << t;
        ASSERT_EQ(token_slot[t], slot) << "token " << t;
      }
    }
    for (const TableSet& set : made.table_sets)
      tables[index(set.slot) * kWidth + static_cast<std::size_t>(set.index)] = set.block;
    const auto device_tables = fetch(step.view.tables, tables.size(), stream);
    for (std::size_t i = 0; i < tables.size(); ++i)
      ASSERT_EQ(static_cast<int>(device_tables[i]), static_cast<int>(tables[i]))
          << "slot " << i / kWidth << " entry " << i % kWidth;
    check_sampling(step, made);
  }
  void check_sampling(CudaStep& step, const MadeStep& made) {
    ASSERT_EQ(step.num_sampled, static_cast<int>(made.logit_tokens.size()));
    ASSERT_EQ(step.num_logit_rows, std::max(step.num_sampled, made.padded_rows));
    const auto n = static_cast<std::size_t>(step.num_logit_rows);
    const auto logit_tokens = fetch(step.logit_tokens, n, stream);
    ASSERT_EQ(step.samples, !made.sampling.empty());
    for (std::size_t r = 0; r < n; ++r)
      EXPECT_EQ(logit_tokens[r], r < made.logit_tokens.size() ? made.logit_tokens[r] : static_cast<int>(r));
    if (!step.samples) return;
    const auto samples = fetch(step.processing.rows, n, stream);
    const auto adjustments =
        fetch(step.processing.adjustments, static_cast<std::size_t>(step.processing.num_adjustments), stream);
    bool all_greedy = true, any_filter = false, any_penalised = false;
    for (std::size_t r = 0; r < n; ++r) {
      SCOPED_TRACE("sampled row " + std::to_string(r) + " seed " + std::to_string(test_seed()));
      const DeviceSampleRow& d = samples[r];
      if (r >= made.sampling.size()) {
        EXPECT_EQ(d.slot, -1);
        EXPECT_EQ(d.temperature, 0.0f);
        EXPECT_EQ(d.penalised, 0);
        EXPECT_EQ(d.adjust_begin, d.adjust_end);
        continue;
      }
      const SampleRow& want = made.sampling[r];
      EXPECT_EQ(d.seed, want.seed);
      EXPECT_EQ(d.position, want.position);
      EXPECT_EQ(d.temperature, want.temperature);
      EXPECT_EQ(d.top_p, want.top_p);
      EXPECT_EQ(d.min_p, want.min_p);
      EXPECT_EQ(d.top_k, want.top_k);
      EXPECT_EQ(d.repetition_penalty, want.repetition_penalty);
      EXPECT_EQ(d.presence_penalty, want.presence_penalty);
      EXPECT_EQ(d.frequency_penalty, want.frequency_penalty);
      EXPECT_EQ(d.slot, static_cast<std::int32_t>(want.slot));
      EXPECT_EQ(d.penalised, want.penalised ? 1 : 0);
      std::vector<std::pair<std::int32_t, float>> entries(made.biases[r]);
      for (const auto id : made.forbidden[r]) entries.emplace_back(id, -std::numeric_limits<float>::infinity());
      ASSERT_EQ(d.adjust_end - d.adjust_begin, static_cast<int>(entries.size()));
      for (std::size_t i = 0; i < entries.size(); ++i) {
        const LogitAdjustment& a = adjustments[static_cast<std::size_t>(d.adjust_begin) + i];
        EXPECT_EQ(a.id, entries[i].first);
        EXPECT_EQ(a.add, entries[i].second);
      }
      const bool greedy = want.temperature == 0 || want.top_k == 1;
      all_greedy &= greedy;
      any_filter |= !greedy && (want.top_k > 0 || want.top_p < 1 || want.min_p > 0);
      any_penalised |= want.penalised;
    }
    EXPECT_EQ(step.all_greedy, all_greedy);
    EXPECT_EQ(step.any_filter, any_filter);
    EXPECT_EQ(step.processing.any_penalised, any_penalised);
  }
  void finish(CudaStep& step) {
    ring->end(step);
    StepOutput out;
    StepRing::wait(step, out);
  }
  void run(MadeStep& made) {
    CudaStep& step = ring->begin(made.input(), *staging);
    check(step, made);
    finish(step);
  }

  std::unique_ptr<cuda::Staging> staging;
  std::unique_ptr<StepRing> ring;
  std::vector<BlockId> tables;      // what the device should hold
  std::vector<TokenId> last_token;  // what the device holds
};

TEST_F(StepTest, test_inputs_of_random_steps_arrive) {
  for (std::size_t slot = 0; slot < last_token.size(); ++slot) last_token[slot] = random.below(1000);
  cuda::check(
      cudaMemcpy(ring->last_token(), last_token.data(), last_token.size() * sizeof(TokenId), cudaMemcpyHostToDevice),
      "upload");
  for (int i = 0; i < 60; ++i) {
    SCOPED_TRACE("step " + std::to_string(i));
    const int decode_rows = random.below(kSlots - 4);
    MadeStep made = random_step(decode_rows, decode_rows == 0 ? 1 + random.below(4) : random.below(5));
    run(made);
    if (HasFatalFailure()) return;
  }
}

TEST_F(StepTest, test_padding_has_no_effect) {
  for (const int rows : {1, 3, 4, 5, 30, kSlots}) {
    for (const int padding : {0, 1, 3}) {
      if (rows + padding > kSlots) continue;
      SCOPED_TRACE(std::to_string(rows) + " rows and " + std::to_string(padding) + " of padding");
      MadeStep made = random_step(rows, 0);
      made.padded_rows = rows + padding;
      run(made);
      if (HasFatalFailure()) return;
    }
  }
  MadeStep nothing;  // as recordings are made
  nothing.padded_rows = 7;
  run(nothing);
}

TEST_F(StepTest, test_deterministic_steps_have_no_decode_rows) {
  make(1, true);
  MadeStep made = random_step(5, 2);
  CudaStep& step = ring->begin(made.input(), *staging);
  EXPECT_EQ(step.view.num_decode_rows, 0);
  EXPECT_GT(step.prefill_plan.bytes, 0u);
  check(step, made);
  finish(step);
}

TEST_F(StepTest, test_the_last_of_equal_table_sets_wins) {
  MadeStep made = random_step(1, 0);
  made.table_sets.clear();
  for (int i = 0; i < 1000; ++i) made.table_sets.push_back({SlotId{2}, i % 7, BlockId{i + 1}});
  run(made);
}

TEST_F(StepTest, test_more_table_sets_and_biases_than_the_ring_holds) {
  MadeStep made = random_step(8, 1);
  for (int i = 0; i < 20000; ++i)
    made.table_sets.push_back({SlotId{random.below(kSlots)}, random.below(kWidth), BlockId{random.below(1 << 30)}});
  for (int i = 0; i < 9000; ++i)
    made.biases[static_cast<std::size_t>(i % 8)].emplace_back(random.below(1000), random.normal());
  run(made);
  MadeStep after = random_step(3, 1);
  run(after);
}

TEST_F(StepTest, test_steps_over_the_limits_are_refused) {
  MadeStep tokens;
  tokens.add_row(random, 0, 501, 0, true, false);
  EXPECT_THROW(ring->begin(tokens.input(), *staging), InvalidArgument);
  MadeStep entry = random_step(1, 0);
  entry.table_sets.push_back({SlotId{0}, kWidth, BlockId{1}});
  EXPECT_THROW(ring->begin(entry.input(), *staging), InvalidArgument);
  entry.table_sets.back() = {SlotId{kSlots}, 0, BlockId{1}};
  EXPECT_THROW(ring->begin(entry.input(), *staging), InvalidArgument);
}

// The device is held up, so that the host is as far ahead as it may be.
TEST_F(StepTest, test_steps_in_flight_keep_their_inputs) {
  constexpr int kSteps = 12, kRows = 20;
  auto copies = cuda::allocate_pinned(kSteps * kRows * sizeof(TokenId));
  auto* seen = cuda::data_as<TokenId>(*copies);
  std::vector<MadeStep> made;
  std::vector<CudaStep*> steps;
  StepOutput out;
  for (std::size_t i = 0; i < kSteps; ++i) {
    cuda::check(cudaLaunchHostFunc(
                    stream, [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(3)); }, nullptr),
                "cudaLaunchHostFunc");
    MadeStep& m = made.emplace_back();
    for (int r = 0; r < kRows; ++r) m.add_row(random, r, 1, 5, false, false);
    m.num_decode_rows = kRows;
    if (i >= 2) StepRing::wait(*steps[i - 2], out);
    CudaStep& step = ring->begin(m.input(), *staging);
    cuda::check(
        cudaMemcpyAsync(seen + i * kRows, step.view.ids, kRows * sizeof(TokenId), cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync");
    ring->end(step);
    steps.push_back(&step);
  }
  for (std::size_t i = kSteps - 2; i < kSteps; ++i) StepRing::wait(*steps[i], out);
  for (std::size_t i = 0; i < kSteps; ++i)
    for (std::size_t r = 0; r < kRows; ++r)
      ASSERT_EQ(seen[i * kRows + r], made[i].tokens[r]) << "step " << i << " row " << r << " seed " << test_seed();
}

TEST_F(StepTest, test_committed_tokens_are_the_next_inputs) {
  MadeStep made = random_step(6, 2);
  CudaStep& step = ring->begin(made.input(), *staging);
  const auto n = static_cast<std::size_t>(step.num_sampled);
  std::vector<TokenId> tokens;
  for (std::size_t i = 0; i < n; ++i) tokens.push_back(random.below(1000));
  cuda::check(cudaMemcpyAsync(ring->sampled(), tokens.data(), n * sizeof(TokenId), cudaMemcpyHostToDevice, stream),
              "upload");
  cuda::commit_tokens(ring->sampled(), step.num_sampled, step.logit_tokens, step.view.token_slot, ring->last_token(),
                      step.host_sampled, stream);
  step.tokens_known = true;
  ring->end(step);
  StepOutput out;
  StepRing::wait(step, out);
  EXPECT_EQ(out.tokens, tokens);
  MadeStep next;
  for (std::size_t i = 0; i < n; ++i) {
    const SlotId slot = made.sampling[i].slot;
    last_token[index(slot)] = tokens[i];
    next.add_row(random, static_cast<int>(slot), 1, 9, true, true);
  }
  next.num_decode_rows = static_cast<int>(n);
  for (const TableSet& set : made.table_sets)
    tables[index(set.slot) * kWidth + static_cast<std::size_t>(set.index)] = set.block;
  run(next);
}

TEST_F(StepTest, test_staged_bytes_survive_until_they_are_read) {
  constexpr std::size_t kPieces = 400, kLongest = 30000;
  DeviceArray<std::byte> device(kPieces * kLongest);
  std::vector<std::vector<std::byte>> pieces;
  for (std::size_t i = 0; i < kPieces; ++i) {
    if (i % 50 == 0)
      cuda::check(cudaLaunchHostFunc(
                      stream, [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); }, nullptr),
                  "cudaLaunchHostFunc");
    auto& piece = pieces.emplace_back(static_cast<std::size_t>(random.below(kLongest)));
    for (std::byte& b : piece) b = static_cast<std::byte>(i * 31 + pieces.size());
    const std::byte* staged = staging->put(std::span<const std::byte>(piece));
    cuda::check(cudaMemcpyAsync(device.get() + i * kLongest, staged, piece.size(), cudaMemcpyHostToDevice, stream),
                "cudaMemcpyAsync");
  }
  const auto seen = device.download();
  for (std::size_t i = 0; i < kPieces; ++i)
    ASSERT_TRUE(
        std::equal(pieces[i].begin(), pieces[i].end(), seen.begin() + static_cast<std::ptrdiff_t>(i * kLongest)))
        << "piece " << i << " of " << pieces[i].size() << " bytes, seed " << test_seed();
}

}  // namespace
}  // namespace fastllm::test

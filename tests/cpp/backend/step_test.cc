// What a backend keeps by slot between steps, and how a step's results come back.
#include <algorithm>

#include "op_testing.h"

namespace fastllm::test {
namespace {

constexpr int kVocab = 40;

class Steps : public OpTest {
 protected:
  void SetUp() override {
    OpTest::SetUp();
    if (!backend) return;
    init_steps(*backend, 16, kVocab, 4, 2);
    table_ = std::make_unique<Array>(Array(DType::F32, kVocab, 3).fill(random));
    weight_ = backend->pack(host_matrix(*table_), DType::F32);
  }
  // Greedy decode rows in slots 0, 1, ...; sampling: whether this rank chooses.
  Step& begin(int rows, bool from_slot, bool sampling) {
    std::vector<StepRow> step_rows;
    std::vector<SampleRow> sample_rows;
    std::vector<std::int32_t> last;
    for (int i = 0; i < rows; ++i) {
      step_rows.push_back({i, 1, 3, SlotId{i}, from_slot});
      last.push_back(i);
      if (!sampling) continue;
      sample_rows.emplace_back();
      sample_rows.back().slot = SlotId{i};
      sample_rows.back().temperature = 0;
    }
    const std::vector<TokenId> ids(static_cast<std::size_t>(rows), 0);
    StepInput input;
    input.tokens = ids;
    input.rows = step_rows;
    input.num_decode_rows = rows;
    input.logit_tokens = last;
    input.sampling = sample_rows;
    return backend->begin_step(input);
  }
  // Logits whose greatest are at these ids.
  Array choosing(const std::vector<TokenId>& ids) {
    Array logits = Array(DType::F32, static_cast<std::int64_t>(ids.size()), kVocab).fill(random);
    for (std::size_t i = 0; i < ids.size(); ++i) logits.set(static_cast<std::int64_t>(i), ids[i], 100.0f);
    return logits;
  }
  void expect_embedded(const Step& step, const std::vector<TokenId>& ids) {
    Array out(DType::F32, static_cast<std::int64_t>(ids.size()), 3);
    backend->embed(out.tensor(), step, *weight_, 0, 1.0f);
    for (std::size_t i = 0; i < ids.size(); ++i)
      EXPECT_TRUE(out.same_row(static_cast<std::int64_t>(i), *table_, ids[i])) << "row " << i;
  }

 private:
  std::unique_ptr<Array> table_;
  std::unique_ptr<PackedWeight> weight_;
};

TEST_P(Steps, a_row_from_its_slot_reads_what_was_sampled_or_committed_last) {
  Step& first = begin(3, false, true);
  backend->sample(choosing({7, 39, 0}).tensor(), first);
  backend->end_step(first);
  Step& second = begin(2, true, true);
  expect_embedded(second, {7, 39});
  backend->sample(choosing({8, 9}).tensor(), second);
  // Nobody waited for the first step; slot 2 took no part in the second.
  StepOutput out;
  backend->wait_step(first, out);
  EXPECT_EQ(out.tokens, (std::vector<TokenId>{7, 39, 0}));
  backend->wait_step(second, out);
  EXPECT_EQ(out.tokens, (std::vector<TokenId>{8, 9}));
  Step& third = begin(3, true, false);
  expect_embedded(third, {8, 9, 0});
  const std::vector<TokenId> received = {30, 31, 32};
  std::copy(received.begin(), received.end(), backend->sampled_tokens(third));
  backend->commit_tokens(third);
  expect_embedded(begin(3, true, false), received);
}

TEST_P(Steps, only_tokens_of_logit_rows_are_gathered_and_committed) {
  const std::vector<StepRow> rows = {
      {0, 1, 9, SlotId{1}, false}, {1, 4, 0, SlotId{3}, false}, {5, 3, 0, SlotId{0}, false}};
  const std::vector<std::int32_t> last = {0, 7};  // the row between has more to come
  const std::vector<TokenId> ids(8, 1);
  StepInput input;
  input.tokens = ids;
  input.rows = rows;
  input.logit_tokens = last;
  Step& step = backend->begin_step(input);
  const Array x = Array(DType::F32, 8, 5).fill(random);
  Array out(DType::F32, 2, 5);
  backend->gather_logit_rows(out.tensor(), x.tensor(), step);
  EXPECT_TRUE(out.same_row(0, x, 0));
  EXPECT_TRUE(out.same_row(1, x, 7));
  backend->sampled_tokens(step)[0] = 11;
  backend->sampled_tokens(step)[1] = 12;
  backend->commit_tokens(step);
  expect_embedded(begin(4, true, false), {12, 11, 0, 0});
}

TEST_P(Steps, masks_forbid_in_the_rows_they_are_for) {
  Array logits = Array(DType::F32, 3, kVocab).fill(random);
  const Array before = logits;
  const std::vector<std::int32_t> rows = {0, 2};
  const std::vector<std::uint32_t> bits = {~0u, 1u, 1u << 31, 0u};
  backend->mask_logits(logits.tensor(), rows, bits);
  for (std::int64_t i = 0; i < kVocab; ++i) {
    EXPECT_EQ(std::isinf(logits.get(0, i)), i > 32) << i;
    EXPECT_EQ(std::isinf(logits.get(2, i)), i != 31) << i;
  }
  EXPECT_TRUE(logits.same_row(1, before, 1));
}

FASTLLM_TEST_ALL_ISAS(Steps);

}  // namespace
}  // namespace fastllm::test

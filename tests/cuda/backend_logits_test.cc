// From logits to samples and log probabilities on the GPU against the CPU backend.
#include "two_backends.h"

namespace fastllm::test {
namespace {

class BackendLogits : public TwoBackends {
 protected:
  static constexpr int kVocab = 1003, kRows = 40;

  // Row i of the logits belongs to slot i; `body` is called between begin_step and end_step.
  template <class Body>
  StepOutput step(Side& s, const std::vector<SampleRow>& sampling, Body&& body) {
    Step& begun = begin_sampling(*s.backend, sampling);
    body(begun);
    return finish(*s.backend, begun);
  }
  SampleRow random_row() {
    SampleRow row;
    row.temperature = 0.7f;
    row.top_k = random.below(2) == 0 ? 0 : 20;
    row.top_p = random.below(2) == 0 ? 1.0f : 0.8f;
    row.min_p = random.below(2) == 0 ? 0.0f : 0.05f;
    row.seed = random.bits();
    row.position = random.below(100000);
    return row;
  }
};

TEST_F(BackendLogits, test_masks_biases_and_penalties) {
  const Array logits = Array(DType::F32, kRows, kVocab).fill(random, 3.0f);
  const std::vector<std::pair<std::int32_t, float>> bias = {{5, 1.5f}, {1002, -2.0f}};
  const std::vector<std::int32_t> forbidden = {0, 77}, masked = {1, 17, 39};
  std::vector<std::uint32_t> bits;
  for (int i = 0; i < 3 * ((kVocab + 31) / 32); ++i) bits.push_back(static_cast<std::uint32_t>(random.bits()));
  std::vector<SampleRow> rows(kRows);
  for (int r = 0; r < kRows; ++r) {
    SampleRow& row = rows[static_cast<std::size_t>(r)];
    if (r % 3 == 0) row.logit_bias = bias;
    if (r % 4 == 0) row.forbidden = forbidden;
    row.penalised = r % 2 == 0;
    if (!row.penalised) continue;
    row.repetition_penalty = 1.3f;
    row.presence_penalty = 0.5f;
    row.frequency_penalty = 0.25f;
  }
  std::vector<TokenId> tokens;
  for (int i = 0; i < 300; ++i) tokens.push_back(random.below(kVocab));
  compare("masked and processed logits", 1e-5, [&](Side& s) {
    init_steps(*s.backend, 16, kVocab, 64, 2);
    for (int r = 0; r < kRows; r += 2) s.backend->init_counts(SlotId{r}, tokens, 120 + r);
    const Tensor x = s.upload(logits);
    step(s, rows, [&](Step& begun) {
      s.backend->mask_logits(x, masked, bits);
      s.backend->process_logits(x, begun);
    });
    return s.download(x);
  });
}

TEST_F(BackendLogits, test_rows_without_usable_logits_are_told_apart) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  Array logits = Array(DType::F32, kRows, kVocab).fill(random, 2.0f);
  const std::vector<TokenId> prompt = {7};
  std::vector<SampleRow> rows;
  std::vector<LogprobRequest> requests;
  for (int r = 0; r < kRows; ++r) {
    rows.push_back(random_row());
    rows.back().penalised = r % 2 == 0;
    requests.push_back({r, 0, r % 3 == 0 ? 500 : 2, r});
    if (r % 4 == 1) logits.set(r, random.below(kVocab), std::numeric_limits<float>::quiet_NaN());
    if (r % 8 == 2) logits.set(r, random.below(kVocab), kInf);
  }
  for (Side* side : {gpu.get(), host.get()}) {
    init_steps(*side->backend, 16, kVocab, 64, 2);
    for (int r = 0; r < kRows; r += 2) side->backend->init_counts(SlotId{r}, prompt, 1);
    const Tensor x = side->upload(logits);
    const auto output = step(*side, rows, [&](Step& begun) {
      side->backend->sample(x, begun);
      side->backend->topk_logprobs(x, begun, requests);
    });
    for (std::size_t r = 0; r < kRows; ++r)
      EXPECT_EQ(output.tokens[r] < 0, r % 4 == 1 || r % 8 == 2) << "row " << r << ", seed " << test_seed();
  }
}

TEST_F(BackendLogits, test_samples_are_the_cpu_backends) {
  const Array logits = Array(DType::F32, kRows, kVocab).fill(random, 2.0f);
  std::vector<SampleRow> greedy(kRows), mixed, plain;
  for (SampleRow& row : greedy) row.temperature = 0;
  for (int r = 0; r < kRows; ++r) {
    mixed.push_back(random_row());
    plain.push_back(mixed.back());
    plain.back().top_k = 0, plain.back().top_p = 1, plain.back().min_p = 0;
  }
  const auto tokens = [&](Side& s, const std::vector<SampleRow>& rows) {
    init_steps(*s.backend, 16, kVocab, 64, 2);
    const Tensor x = s.upload(logits);
    return step(s, rows, [&](Step& begun) { s.backend->sample(x, begun); }).tokens;
  };
  EXPECT_EQ(tokens(*gpu, greedy), tokens(*host, greedy)) << "seed " << test_seed();
  for (const auto* rows : {&mixed, &plain}) {
    const auto got = tokens(*gpu, *rows), want = tokens(*host, *rows);
    ASSERT_EQ(got.size(), want.size());
    int differ = 0;
    for (std::size_t i = 0; i < got.size(); ++i) differ += got[i] != want[i];
    EXPECT_LE(differ, 1) << "rounding decides between two tokens now and then, not this often; seed " << test_seed();
  }
}

TEST_F(BackendLogits, test_logprobs_on_the_device_and_for_many_alternatives) {
  const Array logits = Array(DType::F32, kRows, kVocab).fill(random, 2.0f);
  std::vector<LogprobRequest> requests;
  for (int i = 0; i < 150; ++i)
    requests.push_back(
        {random.below(kRows), random.below(kVocab), random.below(6) * 8, i % 3 == 0 ? random.below(kRows) : -1});
  const auto run = [&](Side& s) {
    init_steps(*s.backend, 16, kVocab, 64, 2);
    const Tensor x = s.upload(logits);
    std::vector<SampleRow> greedy(kRows);
    for (SampleRow& row : greedy) row.temperature = 0;
    return step(s, greedy,
                [&](Step& begun) {
                  s.backend->sample(x, begun);
                  s.backend->topk_logprobs(x, begun, std::span(requests).first(100));
                  s.backend->topk_logprobs(x, begun, std::span(requests).subspan(100));
                })
        .logprobs;
  };
  const auto got = run(*gpu), want = run(*host);
  ASSERT_EQ(got.size(), requests.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    SCOPED_TRACE("request " + std::to_string(i) + " seed " + std::to_string(test_seed()));
    EXPECT_EQ(got[i].token, want[i].token);
    EXPECT_EQ(got[i].rank, want[i].rank);
    EXPECT_NEAR(got[i].logprob, want[i].logprob, 1e-4);
    ASSERT_EQ(got[i].top.size(), want[i].top.size());
    for (std::size_t k = 0; k < got[i].top.size(); ++k) {
      EXPECT_EQ(got[i].top[k].first, want[i].top[k].first) << k;
      EXPECT_NEAR(got[i].top[k].second, want[i].top[k].second, 1e-4) << k;
    }
  }
}

}  // namespace
}  // namespace fastllm::test

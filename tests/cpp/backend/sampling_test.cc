// Logit processing, sampling and log-probabilities against naive oracles.
#include <algorithm>
#include <map>
#include <numeric>

#include "op_testing.h"

namespace fastllm::test {
namespace {

class Sampling : public OpTest {
 protected:
  static constexpr int kSlots = 64;
  void start(std::int64_t vocab) { init_steps(*backend, 16, static_cast<int>(vocab), kSlots, 2); }
  std::vector<TokenId> sample(const Array& logits, const std::vector<SampleRow>& rows) {
    Step& step = begin_sampling(*backend, rows);
    backend->sample(logits.tensor(), step);
    return finish(*backend, step).tokens;
  }
  // Tokens drawn from one row of logits at positions 0, 1, ...
  std::map<TokenId, int> draws(const Array& logits, SampleRow row, int n) {
    std::map<TokenId, int> seen;
    constexpr int kBatch = kSlots;
    start(logits.cols());
    Array batch(DType::F32, kBatch, logits.cols());
    for (int r = 0; r < kBatch; ++r)
      for (std::int64_t c = 0; c < logits.cols(); ++c) batch.set(r, c, logits.get(0, c));
    for (int i = 0; i < n; i += kBatch) {
      std::vector<SampleRow> rows(kBatch, row);
      for (int r = 0; r < kBatch; ++r) rows[static_cast<std::size_t>(r)].position = i + r;
      for (const TokenId t : sample(batch, rows)) ++seen[t];
    }
    return seen;
  }
};

SampleRow filters(float temperature, float top_p, float min_p, int top_k) {
  SampleRow row;
  row.temperature = temperature;
  row.top_p = top_p;
  row.min_p = min_p;
  row.top_k = top_k;
  return row;
}

// Probabilities after temperature, min_p, top_k (ties kept) and top_p, by sorting everything.
std::vector<double> oracle(const Array& logits, const SampleRow& row) {
  const auto n = static_cast<std::size_t>(logits.cols());
  std::vector<double> p(n);
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto logit = [&](std::size_t i) { return logits.get(0, static_cast<std::int64_t>(i)); };
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logit(a) > logit(b); });
  for (const auto i : order) p[i] = std::exp((logit(i) - logit(order[0])) / static_cast<double>(row.temperature));
  for (auto& x : p)
    if (x < static_cast<double>(row.min_p)) x = 0;
  if (row.top_k > 0 && static_cast<std::size_t>(row.top_k) < n) {
    const float last = logit(order[static_cast<std::size_t>(row.top_k - 1)]);
    for (std::size_t i = 0; i < n; ++i)
      if (logit(i) < last) p[i] = 0;
  }
  double total = std::accumulate(p.begin(), p.end(), 0.0), before = 0;
  for (const auto i : order) {
    const double x = p[i];
    if (before >= static_cast<double>(row.top_p) * total) p[i] = 0;
    before += x;
  }
  total = std::accumulate(p.begin(), p.end(), 0.0);
  for (auto& x : p) x /= total;
  return p;
}

TEST_P(Sampling, greedy_takes_the_lowest_of_equal_maxima) {
  Array logits = Array(DType::F32, 3, 1003).fill(random);
  logits.set(0, 700, 50.0f);
  logits.set(0, 1002, 50.0f);
  logits.set(1, 1002, 50.0f);
  logits.set(2, 0, 50.0f);
  std::vector<SampleRow> rows(3);
  rows[0].temperature = 0;
  rows[1].temperature = 0;
  rows[2].top_k = 1;
  start(1003);
  EXPECT_EQ(sample(logits, rows), (std::vector<TokenId>{700, 1002, 0}));
}

TEST_P(Sampling, frequencies_follow_the_filtered_distribution) {
  Array logits = Array(DType::F32, 1, 50).fill(random, 1.5f);
  logits.set(0, 10, logits.get(0, 20));  // a tie
  SampleRow cases[] = {filters(1, 1, 0, 0),    filters(0.5f, 1, 0, 0), filters(1, 1, 0, 5),
                       filters(1, 0.6f, 0, 0), filters(1, 1, 0.2f, 0), filters(1.3f, 0.8f, 0.02f, 20),
                       filters(2, 0.95f, 0, 0)};
  for (SampleRow& row : cases) {
    row.seed = random.bits();
    constexpr int kDraws = 20032;
    const auto want = oracle(logits, row);
    const auto seen = draws(logits, row, kDraws);
    double chi2 = 0;
    int cells = 0;
    for (TokenId t = 0; t < 50; ++t) {
      const double expected = want[static_cast<std::size_t>(t)] * kDraws;
      const int count = seen.contains(t) ? seen.at(t) : 0;
      if (expected == 0) {
        EXPECT_EQ(count, 0) << "token " << t << " was filtered";
      }
      if (expected < 5) continue;
      chi2 += (count - expected) * (count - expected) / expected;
      ++cells;
    }
    // Mean `cells`, deviation sqrt(2 cells); eight deviations never happen by chance.
    EXPECT_LT(chi2, cells + 8 * std::sqrt(2.0 * cells)) << "temperature " << row.temperature << " k " << row.top_k;
  }
}

TEST_P(Sampling, filters_keep_exactly_the_oracle_s_tokens_in_a_large_vocabulary) {
  Array logits = Array(DType::F32, 1, 20000).fill(random, 3.0f);
  for (int i = 0; i < 3000; ++i) logits.set(0, random.below(20000), std::round(logits.get(0, i)));  // ties
  for (int i = 0; i < 500; ++i) logits.set(0, random.below(20000), -std::numeric_limits<float>::infinity());
  SampleRow cases[] = {filters(1, 1, 0, 50), filters(1, 0.1f, 0, 0), filters(1, 1, 0, 3), filters(0.7f, 0.9f, 0, 40),
                       filters(1, 0.999f, 0.01f, 0)};
  for (SampleRow& row : cases) {
    row.seed = random.bits();
    // A token whose cumulative probability meets a bound to the last bits of fp32 may fall on either side of it.
    SampleRow loose = row;
    loose.top_p = std::min(1.0f, row.top_p * (1 + 1e-4f));
    loose.min_p = row.min_p * (1 - 1e-4f);
    const auto want = oracle(logits, loose);
    for (const auto& [token, count] : draws(logits, row, 256))
      EXPECT_GT(want[static_cast<std::size_t>(token)], 0.0)
          << "token " << token << " drawn " << count << " times; top_k " << row.top_k << ", top_p " << row.top_p
          << ", logit " << logits.get(0, token);
  }
}

TEST_P(Sampling, top_k_holds_when_exactly_k_tokens_are_near_the_greatest) {
  Array logits = Array(DType::F32, 1, 5000).fill(random, 0.01f);
  for (int i = 0; i < 50; ++i) logits.set(0, 90 * i, 5.0f + 0.01f * static_cast<float>(i));
  SampleRow row = filters(1, 1, 0, 50);  // the other tokens hold two fifths of the mass, 5 nats below
  row.seed = random.bits();
  for (const auto& [token, count] : draws(logits, row, 256)) EXPECT_EQ(token % 90, 0) << count << " times";
}

TEST_P(Sampling, a_draw_depends_on_seed_and_position_only) {
  const int n = 9;
  Array one = Array(DType::F32, 1, 777).fill(random), batch = Array(DType::F32, n, 777).fill(random);
  for (std::int64_t c = 0; c < 777; ++c) batch.set(4, c, one.get(0, c));
  std::vector<SampleRow> rows(n);
  for (auto& row : rows) row.seed = random.bits();
  rows[4] = filters(1, 0.9f, 0, 0);
  rows[4].seed = random.bits();
  rows[4].position = 77;
  start(777);
  const auto alone = sample(one, {rows[4]});
  EXPECT_EQ(sample(batch, rows)[4], alone[0]);
  int other = 0;
  for (rows[4].position = 78; rows[4].position < 98; ++rows[4].position) other += sample(one, {rows[4]}) != alone;
  EXPECT_GT(other, 10);
}

TEST_P(Sampling, process_logits_matches_the_oracle_and_counts_the_sample) {
  const std::int64_t vocab = 333;
  const Array before = Array(DType::F32, 2, vocab).fill(random, 3.0f);
  start(vocab);
  std::vector<TokenId> tokens;  // 60 of the prompt, 60 of the output
  for (int i = 0; i < 120; ++i) tokens.push_back(random.below(vocab));
  std::vector<std::uint32_t> mask((vocab + 31) / 32, 0xfffffffeu);  // every 32nd id is not allowed
  SampleRow greedy, row;
  greedy.temperature = row.temperature = 0;
  row.repetition_penalty = 1.3f;
  row.presence_penalty = 0.4f;
  row.frequency_penalty = 0.2f;
  row.penalised = true;
  backend->init_counts(SlotId{0}, tokens, 60);
  // Every step counts what it sampled; the next sees it.
  for (int round = 0; round < 3; ++round) {
    Array logits = before;
    std::vector<std::pair<std::int32_t, float>> bias = {{5, 2.5f}, {331, -100.0f}};
    std::vector<std::int32_t> forbidden = {7, 8};
    row.logit_bias = bias;
    row.forbidden = forbidden;
    Step& step = begin_sampling(*backend, {row, greedy});
    // The step keeps what the rows borrowed.
    std::fill(bias.begin(), bias.end(), std::pair<std::int32_t, float>{0, 1e9f});
    std::fill(forbidden.begin(), forbidden.end(), 100);
    const std::int32_t masked = 0;
    backend->mask_logits(logits.tensor(), {&masked, 1}, mask);
    backend->process_logits(logits.tensor(), step);
    std::vector<float> want(vocab);
    for (std::int64_t i = 0; i < vocab; ++i) {
      float x = before.get(0, i) + (i == 5 ? 2.5f : i == 331 ? -100.0f : 0.0f);
      const auto c = std::count(tokens.begin() + 60, tokens.end(), i);
      if (i % 32 == 0 || i == 7 || i == 8) x = -std::numeric_limits<float>::infinity();
      if (std::count(tokens.begin(), tokens.end(), i) > 0) x = x > 0 ? x / 1.3f : x * 1.3f;
      if (c > 0) x -= 0.2f * static_cast<float>(c) + 0.4f;
      want[static_cast<std::size_t>(i)] = x;
      if (std::isinf(x)) {
        EXPECT_EQ(logits.get(0, i), x);
      } else {
        EXPECT_NEAR(logits.get(0, i), x, 1e-5) << "token " << i;
      }
    }
    EXPECT_TRUE(logits.same_row(1, before, 1));
    const Array processed = logits;
    backend->sample(logits.tensor(), step);
    EXPECT_TRUE(logits.same_row(0, processed, 0));
    const auto out = finish(*backend, step).tokens;
    EXPECT_EQ(out[0], std::max_element(want.begin(), want.end()) - want.begin());
    tokens.push_back(out[0]);
  }
}

TEST_P(Sampling, logprobs_ranks_and_alternatives_match_fp64) {
  const std::int64_t vocab = 5003;
  Array logits = Array(DType::F32, 3, vocab).fill(random, 4.0f);
  logits.set(1, 17, 40.0f);
  logits.set(1, 4000, 40.0f);
  start(vocab);
  SampleRow greedy;
  greedy.temperature = 0;
  Step& step = begin_sampling(*backend, {greedy, greedy, greedy});
  backend->sample(logits.tensor(), step);
  std::vector<LogprobRequest> requests = {{0, 5, 0, -1},    {1, 4000, 5, -1}, {2, 5002, 20, -1},
                                          {0, 1, 6000, -1}, {1, 0, 3, 1},     {2, 0, 0, 0}};
  // In two calls: results of a step follow each other.
  backend->topk_logprobs(logits.tensor(), step, std::span(requests).first(2));
  backend->topk_logprobs(logits.tensor(), step, std::span(requests).subspan(2));
  const StepOutput output = finish(*backend, step);
  const auto& out = output.logprobs;
  ASSERT_EQ(out.size(), requests.size());
  requests[4].token = 17;
  requests[5].token = output.tokens[0];
  for (std::size_t q = 0; q < requests.size(); ++q) {
    const auto& request = requests[q];
    double z = 0;
    std::vector<std::int32_t> order(static_cast<std::size_t>(vocab));
    std::iota(order.begin(), order.end(), 0);
    for (const auto i : order) z += std::exp(static_cast<double>(logits.get(request.row, i)));
    std::stable_sort(order.begin(), order.end(),
                     [&](auto a, auto b) { return logits.get(request.row, a) > logits.get(request.row, b); });
    const float own = logits.get(request.row, request.token);
    EXPECT_EQ(out[q].token, request.token);
    EXPECT_NEAR(out[q].logprob, own - std::log(z), 2e-5);
    EXPECT_EQ(out[q].rank,
              1 + std::count_if(order.begin(), order.end(), [&](auto i) { return logits.get(request.row, i) > own; }));
    ASSERT_EQ(out[q].top.size(), static_cast<std::size_t>(std::min<std::int64_t>(request.top, vocab)));
    for (std::size_t i = 0; i < out[q].top.size(); ++i) {
      EXPECT_EQ(out[q].top[i].first, order[i]);
      EXPECT_NEAR(out[q].top[i].second, logits.get(request.row, order[i]) - std::log(z), 2e-5);
    }
  }
}

TEST_P(Sampling, rows_without_usable_logits_get_no_token_and_leave_others_alone) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  const std::vector<SampleRow> kinds = {filters(0, 1, 0, 0),       filters(1, 1, 0, 0), filters(1, 0.9f, 0, 0),
                                        filters(0.7f, 1, 0.1f, 0), filters(1, 1, 0, 5), filters(1, 0.5f, 0.05f, 50)};
  const auto n = static_cast<std::int64_t>(kinds.size());
  for (const std::int64_t vocab : {1, 5, 203, 4099}) {
    start(vocab);
    Array good(DType::F32, n, vocab);
    good.fill(random, 2.0f);
    const auto alone = sample(good, kinds);
    for (const TokenId token : alone) EXPECT_TRUE(token >= 0 && token < vocab);
    const auto check = [&](float value, std::int64_t from, std::int64_t to) {
      std::vector<SampleRow> rows;
      Array mixed(DType::F32, 2 * n, vocab);
      for (std::int64_t r = 0; r < 2 * n; ++r) {
        rows.push_back(kinds[static_cast<std::size_t>(r / 2)]);
        rows.back().slot = SlotId{static_cast<std::int32_t>(r)};
        for (std::int64_t c = 0; c < vocab; ++c)
          mixed.set(r, c, r % 2 == 0 && from <= c && c < to ? value : good.get(r / 2, c));
      }
      const auto tokens = sample(mixed, rows);
      for (std::int64_t r = 0; r < 2 * n; ++r)
        EXPECT_EQ(tokens[static_cast<std::size_t>(r)], r % 2 == 0 ? -1 : alone[static_cast<std::size_t>(r / 2)])
            << value << " at " << from << " to " << to << " of " << vocab << ", row " << r;
    };
    for (const float value : {kNaN, -kNaN, kInf, -kInf}) check(value, 0, vocab);
    for (const float value : {kNaN, -kNaN, kInf})
      for (const std::int64_t at : {std::int64_t{0}, std::int64_t{random.below(static_cast<int>(vocab))}, vocab - 1})
        check(value, at, at + 1);
  }
}

FASTLLM_TEST_ALL_ISAS(Sampling);

}  // namespace
}  // namespace fastllm::test

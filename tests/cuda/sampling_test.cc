// sample() against a reference that sorts the vocabulary.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "sampling_reference.h"

namespace fastllm::test {
namespace {

TEST_F(CudaSampling, greedy_takes_the_lowest_of_equal_maxima_at_every_batch_and_vocabulary) {
  for (const int vocab : {1, 7, 33, 1000, 4099, 50257})
    for (const int n : {1, 3, 33, 140, 530}) {
      if (vocab > 5000 && n > 40) continue;
      std::vector<Row> logits;
      for (int r = 0; r < n; ++r) {
        logits.push_back(r % 2 == 0 ? normal(vocab, 2) : Row(static_cast<std::size_t>(vocab), -1.5f));
        for (int twice = 0; twice < 2; ++twice) logits.back()[static_cast<std::size_t>(random.below(vocab))] = 20.0f;
      }
      expect_choices(logits, std::vector<DeviceSampleRow>(static_cast<std::size_t>(n), sampling(0, 1, 0, 0)),
                     vocab + n % 4);
    }
}

TEST_F(CudaSampling, unfiltered_draws_match_the_reference) {
  for (const int vocab : {1, 7, 33, 1000, 4099})
    for (const int n : {1, 40, 140, 530}) {
      std::vector<Row> logits;
      std::vector<DeviceSampleRow> rows;
      for (int r = 0; r < n; ++r) {
        logits.push_back(shaped(vocab, r % kShapes));
        rows.push_back(sampling(r % 5 == 0 ? 0.0f : 0.2f + 0.3f * static_cast<float>(r % 6), 1, 0, 0));
        rows.back().seed = seed();
        rows.back().position = static_cast<std::int64_t>(seed() >> 1);
      }
      expect_choices(logits, rows, vocab + 1);
    }
}

TEST_F(CudaSampling, every_combination_of_filters_matches_the_reference) {
  for (const int vocab : {1, 7, 33, 1000, 9001}) {
    for (int shape = 0; shape < kShapes; ++shape) {
      const auto rows = all_kinds();
      std::vector<Row> logits;
      for (std::size_t r = 0; r < rows.size(); ++r) logits.push_back(shaped(vocab, shape));
      SCOPED_TRACE("shape " + std::to_string(shape));
      expect_choices(logits, rows, vocab + shape % 4);
    }
  }
}

TEST_F(CudaSampling, a_large_vocabulary_matches_the_reference) {
  for (int shape = 0; shape < kShapes; ++shape) {
    std::vector<Row> logits;
    std::vector<DeviceSampleRow> rows = {sampling(1, 1, 0, 0),     sampling(1, 0.9f, 0, 0), sampling(0.7f, 0.9f, 0, 50),
                                         sampling(1, 1, 0.01f, 0), sampling(1, 1, 0, 1500), sampling(0, 1, 0, 0)};
    for (auto& row : rows) {
      logits.push_back(shaped(128256, shape));
      row.seed = seed();
    }
    SCOPED_TRACE("shape " + std::to_string(shape));
    expect_choices(logits, rows);
  }
}

TEST_F(CudaSampling, wide_nuclei_match_the_reference_alone_and_in_batches) {
  const int vocab = 20011;
  for (const std::size_t n : {1u, 12u, 140u}) {
    std::vector<Row> logits;
    std::vector<DeviceSampleRow> rows;
    for (std::size_t r = 0; r < n; ++r) {
      logits.push_back(normal(vocab, r % 3 == 0 ? 1.0f : r % 3 == 1 ? 0.02f : 2.0f));
      if (r % 4 == 3)
        for (std::size_t i = 0; i < logits.back().size(); i += 2) logits.back()[i] = -kInf;
      rows.push_back(sampling(r % 2 == 0 ? 0.8f : 3.0f,
                              r % 5 == 0   ? 0.9f
                              : r % 5 == 1 ? 0.999f
                                           : 0.5f,
                              r % 7 == 6 ? 0.001f : 0.0f, 0));
      rows.back().seed = seed();
      rows.back().position = static_cast<std::int64_t>(r);
    }
    expect_choices(logits, rows, vocab + 1);
  }
}

TEST_F(CudaSampling, of_scores_that_overflow_the_lowest_token_wins) {
  Row x(2001, 1.0f);
  x[1005] = 8.0f;
  x[1009] = 9.0f;
  const float tiny = 2e-38f;
  for (const auto& [row, expected] : {std::pair{sampling(tiny, 1, 0, 0), 1005},
                                      {sampling(tiny, 1, 0, 2), 1005},
                                      {sampling(tiny, 0.9f, 0, 0), 1009},
                                      {sampling(tiny, 1, 0.1f, 0), 1009}})
    EXPECT_EQ(run({x}, {row}, {})[0], expected) << describe(row);
}

TEST_F(CudaSampling, a_row_s_token_does_not_depend_on_the_batch) {
  const int vocab = 20011;
  for (const auto& kind : {sampling(1, 1, 0, 0), sampling(1, 0.9f, 0, 0), sampling(2, 0.99f, 0, 600),
                           sampling(3, 0.95f, 0, 0), sampling(1, 1, 0.1f, 0)}) {
    auto row = kind;
    row.seed = seed();
    row.position = 12345;
    const Row x = normal(vocab, 2);
    const auto alone = run({x}, {row}, {});
    for (const std::size_t n : {40u, 140u, 530u}) {
      std::vector<Row> logits(n, normal(vocab, 1));
      std::vector<DeviceSampleRow> rows(n, sampling(0, 1, 0, 0));
      logits[n - 7] = x;
      rows[n - 7] = row;
      EXPECT_EQ(run(logits, rows, {}, vocab + 2)[n - 7], alone[0]) << "among " << n << " rows, " << describe(row);
    }
  }
}

TEST_F(CudaSampling, frequencies_follow_the_filtered_distribution) {
  const int vocab = 50, n = 1024, rounds = 20;
  Row x = normal(vocab, 1.5f);
  x[10] = x[20];
  for (auto row : {sampling(1, 1, 0, 0), sampling(0.5f, 1, 0, 0), sampling(1, 1, 0, 5), sampling(1, 0.6f, 0, 0),
                   sampling(1, 1, 0.2f, 0), sampling(1.3f, 0.8f, 0.02f, 20)}) {
    row.seed = seed();
    std::vector<int> seen(vocab, 0);
    for (int i = 0; i < rounds; ++i) {
      std::vector<DeviceSampleRow> rows(n, row);
      for (int r = 0; r < n; ++r) rows[static_cast<std::size_t>(r)].position = i * n + r;
      for (const TokenId t : run(std::vector<Row>(n, x), rows, {}))
        ++seen[static_cast<std::size_t>(std::clamp(t, 0, vocab - 1))];
    }
    std::vector<int> sorted(vocab);
    std::iota(sorted.begin(), sorted.end(), 0);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](int a, int b) { return x[static_cast<std::size_t>(a)] > x[static_cast<std::size_t>(b)]; });
    std::vector<double> p(vocab, 0.0);
    double total = 0;
    for (const int i : survivors(x, row, sorted, 0.0))
      total += p[static_cast<std::size_t>(i)] =
          std::exp(static_cast<double>(x[static_cast<std::size_t>(i)] / row.temperature));
    double chi2 = 0;
    int cells = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double expected = p[i] / total * n * rounds;
      if (expected == 0) {
        EXPECT_EQ(seen[i], 0) << "token " << i << " was filtered; " << describe(row);
      }
      if (expected < 5) continue;
      chi2 += (seen[i] - expected) * (seen[i] - expected) / expected;
      ++cells;
    }
    EXPECT_LT(chi2, cells + 8 * std::sqrt(2.0 * cells)) << describe(row);
  }
}

TEST_F(CudaSampling, rows_without_usable_logits_get_no_token_and_leave_others_alone) {
  const auto kinds = all_kinds();
  for (const int vocab : {5, 3001, 40004}) {
    const auto at = [&] { return static_cast<std::size_t>(random.below(vocab)); };
    std::vector<Row> bad = {Row(static_cast<std::size_t>(vocab), kNaN), Row(static_cast<std::size_t>(vocab), -kInf)};
    for (const float value : {kNaN, -kNaN, kInf}) {
      for (const std::size_t where : {std::size_t{0}, at(), at(), static_cast<std::size_t>(vocab - 1)}) {
        bad.push_back(normal(vocab, 2));
        bad.back()[where] = value;
      }
    }
    const Row good = normal(vocab, 2);
    const auto alone = run(std::vector<Row>(kinds.size(), good), kinds, {}, vocab + 3);
    for (const Row& x : bad) {
      std::vector<Row> logits;
      std::vector<DeviceSampleRow> rows;
      for (const auto& kind : kinds) {
        logits.insert(logits.end(), {x, good});
        rows.insert(rows.end(), {kind, kind});
      }
      const auto tokens = run(logits, rows, {}, vocab + 3);
      for (std::size_t r = 0; r < kinds.size(); ++r) {
        EXPECT_EQ(tokens[2 * r], -1) << "vocab " << vocab << ", " << describe(kinds[r]);
        EXPECT_EQ(tokens[2 * r + 1], alone[r]) << "vocab " << vocab << ", " << describe(kinds[r]);
      }
    }
    cuda::SampleCall greedy;
    greedy.all_greedy = true;
    for (const Row& x : bad) EXPECT_EQ(run({x, good}, {2, sampling(0, 1, 0, 0)}, greedy)[0], -1);
  }
}

TEST_F(CudaSampling, the_token_reaches_its_slot_and_is_counted_when_penalised) {
  const int n = 5, vocab = 501, slots = 9;
  std::vector<std::int32_t> zero(slots * vocab, 0);
  DeviceArray<std::int32_t> counts(zero);
  DeviceArray<TokenId> last(slots);
  std::vector<DeviceSampleRow> rows(n, sampling(1, 0.9f, 0, 0));
  for (int r = 0; r < n; ++r) {
    rows[static_cast<std::size_t>(r)].slot = r == 4 ? -1 : 2 * r;
    rows[static_cast<std::size_t>(r)].penalised = r % 2;
    rows[static_cast<std::size_t>(r)].seed = seed();
  }
  std::vector<std::int32_t> want = zero;
  std::vector<TokenId> want_last(slots, -1);
  for (int step = 0; step < 4; ++step) {
    std::vector<Row> logits;
    for (int r = 0; r < n; ++r) {
      logits.push_back(normal(vocab, 3));
      if (step == 3 && r < 2) logits.back()[400] = kNaN;  // no token: the slot gets 0, which is not counted
      rows[static_cast<std::size_t>(r)].position = step;
    }
    cuda::SampleCall call;
    call.any_penalised = true;
    call.counts = counts.get();
    call.last_token = last.get();
    const auto tokens = run(logits, rows, call);
    for (int r = 0; r < 4; ++r) {
      const TokenId token = tokens[static_cast<std::size_t>(r)];
      EXPECT_EQ(token < 0, step == 3 && r < 2);
      want_last[static_cast<std::size_t>(2 * r)] = std::max(token, 0);
      if (r % 2 != 0 && token >= 0)
        ++want[static_cast<std::size_t>(2 * r * vocab + tokens[static_cast<std::size_t>(r)])];
    }
  }
  EXPECT_EQ(last.download(), want_last);
  EXPECT_EQ(counts.download(), want);
}

}  // namespace
}  // namespace fastllm::test

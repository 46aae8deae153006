// sample() and what changes logits before it, against a reference that sorts the vocabulary.
#include "sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>
#include <sstream>

#include "device.h"

namespace fastllm::test {
namespace {

using cuda::DeviceSampleRow;
using cuda::Logits;
using Row = std::vector<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

DeviceSampleRow sampling(float temperature, float top_p, float min_p, int top_k) {
  DeviceSampleRow row{};
  row.temperature = temperature;
  row.top_p = top_p;
  row.min_p = min_p;
  row.top_k = top_k;
  row.repetition_penalty = 1;
  row.slot = -1;
  return row;
}

std::string describe(const DeviceSampleRow& row) {
  std::ostringstream text;
  text << "temperature " << row.temperature << " top_p " << row.top_p << " min_p " << row.min_p << " top_k "
       << row.top_k << " seed " << row.seed << " position " << row.position;
  return text.str();
}

std::uint32_t philox(std::uint32_t token, std::uint64_t seed, std::uint64_t position) {
  std::uint32_t c[4] = {token, 0, static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32)};
  std::uint32_t k[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c[0], b = std::uint64_t{0xCD9E8D57} * c[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(a)};
    std::copy_n(next, 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c[0];
}

int argmax(const Row& x) {
  int best = -1;
  for (int i = 0; i < static_cast<int>(x.size()); ++i)
    if (!std::isnan(x[i]) && (best < 0 || x[i] > x[best])) best = i;
  return std::max(best, 0);
}

// Ids that pass the filters, best first.
std::vector<int> survivors(const Row& x, const DeviceSampleRow& row, const std::vector<int>& sorted, double slack) {
  const auto n = static_cast<int>(sorted.size());
  const float max = x[static_cast<std::size_t>(sorted[0])], inv_temperature = 1.0f / row.temperature;
  const auto at = [&](int i) { return x[static_cast<std::size_t>(sorted[static_cast<std::size_t>(i)])]; };
  const auto mass = [&](int i) { return std::exp(static_cast<double>((at(i) - max) * inv_temperature)); };
  int kept = n;
  if (row.min_p > 0) {
    const double floor = max + std::log(row.min_p) * row.temperature + slack * (std::abs(max) + 1);
    while (kept > 0 && static_cast<double>(at(kept - 1)) < floor) --kept;
  }
  if (row.top_k > 0 && row.top_k < kept) {
    int k = row.top_k;
    while (k < kept && at(k) == at(row.top_k - 1)) ++k;
    kept = k;
  }
  if (row.top_p < 1) {
    double total = 0, reached = 0;
    for (int i = 0; i < kept; ++i) total += mass(i);
    int i = 0;
    while (i < kept) {
      reached += mass(i++);
      if (reached >= static_cast<double>(row.top_p) * total * (1 + slack)) break;
    }
    kept = i;
  }
  return {sorted.begin(), sorted.begin() + kept};
}

// Tokens that may be chosen: one, and another where roundings decide.
std::set<int> choices(const Row& x, const DeviceSampleRow& row) {
  const int greatest = argmax(x);
  const float max = x[static_cast<std::size_t>(greatest)];
  if (row.temperature <= 0 || row.top_k == 1 || !std::isfinite(max)) return {greatest};
  std::vector<int> sorted(x.size());
  std::iota(sorted.begin(), sorted.end(), 0);
  std::erase_if(sorted,
                [&](int i) { return !(x[static_cast<std::size_t>(i)] >= std::numeric_limits<float>::lowest()); });
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](int a, int b) { return x[static_cast<std::size_t>(a)] > x[static_cast<std::size_t>(b)]; });
  std::set<int> allowed;
  const bool rounds = row.top_p < 1 || row.min_p > 0;
  for (const double slack : {0.0, 1e-6, -1e-6}) {
    if (slack != 0 && !rounds) break;
    std::vector<std::pair<double, int>> scores;
    double best = -1e300;
    for (const int i : survivors(x, row, sorted, slack)) {
      const double u =
          ((philox(static_cast<std::uint32_t>(i), row.seed, static_cast<std::uint64_t>(row.position)) >> 9) + 0.5) /
          (1 << 23);
      const float scaled = x[static_cast<std::size_t>(i)] * (1.0f / row.temperature);
      scores.emplace_back(static_cast<double>(scaled) - std::log(-std::log(u)), i);
      best = std::max(best, scores.back().first);
    }
    if (scores.empty()) allowed.insert(greatest);
    for (const auto& [score, i] : scores)
      if (score >= best - 5e-7 * (std::abs(best) + 20)) allowed.insert(i);
  }
  return allowed;
}

class CudaSampling : public CudaTest {
 protected:
  void TearDown() override {
    if (pinned != nullptr) cudaFreeHost(pinned);
    CudaTest::TearDown();
  }

  std::uint64_t seed() { return random.bits(); }
  Row normal(int vocab, float sigma) {
    Row x(static_cast<std::size_t>(vocab));
    for (float& v : x) v = random.normal(sigma);
    return x;
  }
  // Logits of many shapes, by number.
  static constexpr int kShapes = 7;
  Row shaped(int vocab, int shape) {
    Row x = normal(vocab, shape == 0 ? 0.1f : shape == 1 ? 8.0f : 3.0f);
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (shape == 3) x[i] = std::round(x[i]);                      // ties everywhere
      if (shape == 4 && random.below(2) == 0) x[i] = -kInf;         // masked
      if (shape == 5) x[i] = i % 3 == 0 ? 1.0f : 1.0f - 1e-3f;      // two values only
      if (shape == 6) x[i] = i < 20 ? 12.0f + x[i] : x[i] - 10.0f;  // the best are neighbours
    }
    return x;
  }

  // Uploads with a row stride, samples, checks that everybody got the same tokens and that nothing else changed.
  std::vector<TokenId> run(const std::vector<Row>& logits, const std::vector<DeviceSampleRow>& rows,
                           cuda::SampleCall call, std::int64_t ld = 0) {
    const auto n = logits.size(), vocab = logits[0].size();
    const auto stride = ld == 0 ? vocab : static_cast<std::size_t>(ld);
    std::vector<float> host(n * stride, -777.0f);
    for (std::size_t r = 0; r < n; ++r)
      std::copy(logits[r].begin(), logits[r].end(), host.begin() + static_cast<std::ptrdiff_t>(r * stride));
    DeviceArray<float> device(host);
    DeviceArray<DeviceSampleRow> device_rows(rows);
    DeviceArray<TokenId> sampled(n + 1);
    DeviceArray<std::byte> workspace(cuda::sample_workspace_bytes(static_cast<int>(n), static_cast<int>(vocab)) + 64);
    if (pinned == nullptr)
      cuda::check(cudaMallocHost(reinterpret_cast<void**>(&pinned), 4096 * sizeof(TokenId)), "cudaMallocHost");
    std::fill_n(pinned, 4096, -9);
    call.rows = device_rows.get();
    call.sampled = sampled.get();
    call.host_sampled = pinned;
    call.workspace = workspace.get();
    cuda::sample({device.get(), static_cast<std::int64_t>(stride), static_cast<int>(n), static_cast<int>(vocab)}, call,
                 stream);
    const auto tokens = sampled.download();
    for (std::size_t r = 0; r < n; ++r) EXPECT_EQ(tokens[r], pinned[r]) << "the host's token of row " << r;
    EXPECT_EQ(tokens[n], -1) << "written beyond the last row";
    EXPECT_EQ(pinned[n], -9) << "written beyond the last row";
    const auto guard = workspace.download();
    for (std::size_t i = guard.size() - 64; i < guard.size(); ++i)
      EXPECT_EQ(guard[i], std::byte{0xff}) << "beyond the workspace";
    const auto after = device.download();
    EXPECT_EQ(std::memcmp(after.data(), host.data(), host.size() * sizeof(float)), 0) << "sample() changed the logits";
    return {tokens.begin(), tokens.end() - 1};
  }

  void expect_choices(const std::vector<Row>& logits, const std::vector<DeviceSampleRow>& rows, std::int64_t ld = 0) {
    bool greedy = true, filter = false;
    for (const auto& row : rows) {
      greedy = greedy && (row.temperature <= 0 || row.top_k == 1);
      filter = filter || row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
    }
    cuda::SampleCall call;
    call.all_greedy = greedy;
    call.any_filter = filter;
    const auto tokens = run(logits, rows, call, ld);
    int reported = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const auto allowed = choices(logits[r], rows[r]);
      if (allowed.contains(tokens[r])) continue;
      const auto vocab = static_cast<int>(logits[r].size());
      const bool in_range = tokens[r] >= 0 && tokens[r] < vocab;
      ADD_FAILURE() << "row " << r << " of " << rows.size() << ", vocab " << vocab << ", stride " << ld << ", "
                    << describe(rows[r]) << ": got token " << tokens[r] << " (logit "
                    << (in_range ? logits[r][static_cast<std::size_t>(tokens[r])] : kNaN) << "), expected "
                    << *allowed.begin() << " (logit " << logits[r][static_cast<std::size_t>(*allowed.begin())]
                    << "); the greatest is " << logits[r][static_cast<std::size_t>(argmax(logits[r]))];
      if (++reported == 5) break;
    }
  }

  std::vector<DeviceSampleRow> all_kinds() {
    std::vector<DeviceSampleRow> rows;
    for (const float temperature : {0.3f, 1.0f, 1.7f})
      for (const float top_p : {1.0f, 0.9f, 0.3f})
        for (const float min_p : {0.0f, 0.05f})
          for (const int top_k : {0, 5, 50, 1000}) rows.push_back(sampling(temperature, top_p, min_p, top_k));
    for (auto more : {sampling(0, 1, 0, 0), sampling(1, 1, 0, 1), sampling(0, 0.5f, 0.1f, 7), sampling(1, 0, 0, 0),
                      sampling(1, 0.9999f, 0, 0), sampling(1, 1, 1.5f, 0), sampling(1, 0.5f, 2.0f, 3)})
      rows.push_back(more);
    for (auto& row : rows) row.seed = seed(), row.position = random.below(1 << 20);
    return rows;
  }

  TokenId* pinned = nullptr;
};

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

TEST_F(CudaSampling, a_row_s_token_does_not_depend_on_the_batch) {
  const int vocab = 20011;
  for (const auto& kind :
       {sampling(1, 1, 0, 0), sampling(1, 0.9f, 0, 0), sampling(2, 0.99f, 0, 600), sampling(1, 1, 0.1f, 0)}) {
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

TEST_F(CudaSampling, rows_of_nan_and_infinity_yield_a_token) {
  const int vocab = 3001;
  std::vector<Row> shapes = {Row(vocab, kNaN), Row(vocab, -kInf), Row(vocab, kInf), normal(vocab, 2), normal(vocab, 2)};
  for (int i = 0; i < 400; ++i) shapes[3][static_cast<std::size_t>(random.below(vocab))] = kNaN;
  shapes[4][77] = kInf;
  const auto kinds = all_kinds();
  for (const auto& x : shapes) {
    const auto tokens = run(std::vector<Row>(kinds.size(), x), kinds, {});
    for (std::size_t r = 0; r < kinds.size(); ++r) {
      ASSERT_TRUE(tokens[r] >= 0 && tokens[r] < vocab) << tokens[r] << "; " << describe(kinds[r]);
      if (!std::isfinite(x[static_cast<std::size_t>(argmax(x))])) {
        EXPECT_EQ(tokens[r], argmax(x)) << describe(kinds[r]);
      } else {
        EXPECT_FALSE(std::isnan(x[static_cast<std::size_t>(tokens[r])])) << describe(kinds[r]);
      }
    }
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
      rows[static_cast<std::size_t>(r)].position = step;
    }
    cuda::SampleCall call;
    call.any_penalised = true;
    call.counts = counts.get();
    call.last_token = last.get();
    const auto tokens = run(logits, rows, call);
    for (int r = 0; r < 4; ++r) {
      want_last[static_cast<std::size_t>(2 * r)] = tokens[static_cast<std::size_t>(r)];
      if (r % 2 != 0) ++want[static_cast<std::size_t>(2 * r * vocab + tokens[static_cast<std::size_t>(r)])];
    }
  }
  EXPECT_EQ(last.download(), want_last);
  EXPECT_EQ(counts.download(), want);
}

TEST_F(CudaSampling, counts_penalties_and_adjustments_match_the_reference) {
  for (const int vocab : {7, 333, 20011}) {
    const int n = 3, slots = 4, ld = vocab + 5;
    std::vector<TokenId> tokens(500);
    for (auto& t : tokens) t = random.below(vocab);
    const int num_prompt = 300;
    DeviceArray<TokenId> device_tokens(tokens);
    DeviceArray<std::int32_t> counts(static_cast<std::size_t>(slots * vocab));
    cuda::init_counts(counts.get() + vocab, vocab, device_tokens.get(), 500, num_prompt, stream);
    std::vector<std::int32_t> want_counts(static_cast<std::size_t>(slots * vocab), -1);
    std::fill_n(want_counts.begin() + vocab, vocab, 0);
    for (int i = 0; i < 500; ++i) {
      auto& c = want_counts[static_cast<std::size_t>(vocab + tokens[static_cast<std::size_t>(i)])];
      c = i < num_prompt ? c | 1 << 30 : c + 1;
    }
    ASSERT_EQ(counts.download(), want_counts) << "vocab " << vocab;

    std::vector<float> x(static_cast<std::size_t>(n * ld));
    for (float& v : x) v = random.normal(3);
    const auto before = x;
    std::vector<DeviceSampleRow> rows(n, sampling(0, 1, 0, 0));
    rows[1].slot = 1;
    rows[1].penalised = 1;
    rows[1].repetition_penalty = 1.3f;
    rows[1].presence_penalty = 0.4f;
    rows[1].frequency_penalty = 0.2f;
    const std::vector<cuda::LogitAdjustment> adjustments = {{2, 1.5f}, {5, 2.5f}, {6, -100.0f}, {3, -kInf}, {5, -kInf}};
    rows[0].adjust_end = 1;
    rows[1].adjust_begin = 1;
    rows[1].adjust_end = 5;
    rows[2].adjust_begin = rows[2].adjust_end = 5;
    DeviceArray<float> device(x);
    DeviceArray<DeviceSampleRow> device_rows(rows);
    DeviceArray<cuda::LogitAdjustment> device_adjustments(adjustments);
    cuda::LogitsProcessing call;
    call.rows = device_rows.get();
    call.adjustments = device_adjustments.get();
    call.num_adjustments = 5;
    call.any_penalised = true;
    call.counts = counts.get();
    cuda::process_logits({device.get(), ld, n, vocab}, call, stream);
    x[2] += 1.5f;
    float* row = x.data() + ld;
    row[6] += -100.0f;
    row[3] = row[5] = -kInf;
    for (int i = 0; i < vocab; ++i) {
      const int c = want_counts[static_cast<std::size_t>(vocab + i)], in_output = c & ((1 << 30) - 1);
      if (c != 0) row[i] = row[i] > 0 ? row[i] / 1.3f : row[i] * 1.3f;
      if (in_output > 0) row[i] -= 0.2f * static_cast<float>(in_output) + 0.4f;
    }
    const auto got = device.download();
    int bad = 0;
    for (std::size_t i = 0; i < x.size() && bad < 5; ++i) {
      if (got[i] == x[i] || std::abs(got[i] - x[i]) <= 1e-5f * (1 + std::abs(x[i]))) continue;
      ++bad;
      ADD_FAILURE() << "vocab " << vocab << " row " << i / static_cast<std::size_t>(ld) << " id "
                    << i % static_cast<std::size_t>(ld) << ": got " << got[i] << ", expected " << x[i] << ", before "
                    << before[i];
    }
  }
}

TEST_F(CudaSampling, masks_forbid_exactly_the_ids_without_a_bit) {
  for (const int vocab : {1, 31, 33, 1000, 50257}) {
    const int n = 4, ld = vocab + 3, words = (vocab + 31) / 32;
    const std::vector<std::int32_t> masked = {2, 0};
    std::vector<std::uint32_t> bits(static_cast<std::size_t>(2 * words));
    for (auto& word : bits) word = static_cast<std::uint32_t>(random.bits());
    std::vector<float> x(static_cast<std::size_t>(n * ld));
    for (float& v : x) v = random.normal();
    DeviceArray<float> device(x);
    DeviceArray<std::int32_t> rows(masked);
    DeviceArray<std::uint32_t> device_bits(bits);
    cuda::mask_logits({device.get(), ld, n, vocab}, rows.get(), 2, device_bits.get(), stream);
    for (int m = 0; m < 2; ++m)
      for (int i = 0; i < vocab; ++i)
        if ((bits[static_cast<std::size_t>(m * words + i / 32)] >> (i % 32) & 1u) == 0)
          x[static_cast<std::size_t>(masked[static_cast<std::size_t>(m)] * ld + i)] = -kInf;
    const auto got = device.download();
    const auto wrong = std::mismatch(got.begin(), got.end(), x.begin()).first - got.begin();
    EXPECT_EQ(static_cast<std::size_t>(wrong), x.size())
        << "vocab " << vocab << " row " << wrong / ld << " id " << wrong % ld;
  }
}

}  // namespace
}  // namespace fastllm::test

// What a draw may yield, by sorting the vocabulary in fp64, and a fixture that holds sample() to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "device.h"
#include "sampling/sampling.h"

namespace fastllm::test {

using cuda::DeviceSampleRow;
using cuda::Logits;
using Row = std::vector<float>;

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline DeviceSampleRow sampling(float temperature, float top_p, float min_p, int top_k) {
  DeviceSampleRow row{};
  row.temperature = temperature;
  row.top_p = top_p;
  row.min_p = min_p;
  row.top_k = top_k;
  row.repetition_penalty = 1;
  row.slot = -1;
  return row;
}

inline std::string describe(const DeviceSampleRow& row) {
  std::ostringstream text;
  text << "temperature " << row.temperature << " top_p " << row.top_p << " min_p " << row.min_p << " top_k "
       << row.top_k << " seed " << row.seed << " position " << row.position;
  return text.str();
}

inline std::uint32_t philox(std::uint32_t token, std::uint64_t seed, std::uint64_t position) {
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

inline int argmax(const Row& x) {
  int best = -1;
  for (int i = 0; i < static_cast<int>(x.size()); ++i)
    if (best < 0 || x[i] > x[best]) best = i;
  return best;
}

// Ids that pass the filters, best first.
inline std::vector<int> survivors(const Row& x, const DeviceSampleRow& row, const std::vector<int>& sorted,
                                  double slack) {
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

// Tokens that may be chosen: one, and another where roundings decide; -1, none, where the greatest is not finite.
inline std::set<int> choices(const Row& x, const DeviceSampleRow& row) {
  const int greatest = argmax(x);
  const float max = x[static_cast<std::size_t>(greatest)];
  if (!std::isfinite(max)) return {-1};
  if (row.temperature <= 0 || row.top_k == 1) return {greatest};
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

  // Uploads with a row stride, samples, checks that everybody got the same tokens, the device 0 where the host got -1,
  // and that nothing else changed.
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
    for (std::size_t r = 0; r < n; ++r) EXPECT_EQ(tokens[r], std::max(pinned[r], 0)) << "the host's token of row " << r;
    EXPECT_EQ(tokens[n], -1) << "written beyond the last row";
    EXPECT_EQ(pinned[n], -9) << "written beyond the last row";
    const auto guard = workspace.download();
    for (std::size_t i = guard.size() - 64; i < guard.size(); ++i)
      EXPECT_EQ(guard[i], std::byte{0xff}) << "beyond the workspace";
    const auto after = device.download();
    EXPECT_EQ(std::memcmp(after.data(), host.data(), host.size() * sizeof(float)), 0) << "sample() changed the logits";
    return {pinned, pinned + n};
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
      const auto logit = [&](int id) { return id < 0 || id >= vocab ? kNaN : logits[r][static_cast<std::size_t>(id)]; };
      ADD_FAILURE() << "row " << r << " of " << rows.size() << ", vocab " << vocab << ", stride " << ld << ", "
                    << describe(rows[r]) << ": got token " << tokens[r] << " (logit " << logit(tokens[r])
                    << "), expected " << *allowed.begin() << " (logit " << logit(*allowed.begin())
                    << "); the greatest is " << logit(argmax(logits[r]));
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

}  // namespace fastllm::test

// Sampling on the CPU: each row of logits is one item of work on one thread, so a row's token never depends on another.
//
// Top-k and top-p need no sort of the vocabulary. One pass counts tokens and probability mass in buckets of 1/64 nat
// below the maximum; the cut falls into one bucket, whose few members alone are sorted. What remains is a threshold
// (floor, last_id) which the Gumbel-max kernel applies while it draws.
#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <limits>

#include "backend/cpu/cpu_backend.h"

namespace fastllm::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kAllIds = std::numeric_limits<std::int32_t>::max();

void process_row(std::span<float> x, const SampleRow& row) {
  for (const auto& [id, bias] : row.logit_bias) x[static_cast<std::size_t>(id)] += bias;
  if (row.mask) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if ((row.mask[i / 32] >> (i % 32) & 1u) == 0) x[i] = kLowest;
    }
  }
  for (const std::int32_t id : row.forbidden) x[static_cast<std::size_t>(id)] = kLowest;
  const bool penalised =
      row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f;
  if (!row.counts || !penalised) return;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const PenaltyCounts seen = row.counts[i];
    if (seen == 0) continue;
    x[i] = x[i] > 0.0f ? x[i] / row.repetition_penalty : x[i] * row.repetition_penalty;
    const PenaltyCounts in_output = seen & (kInPrompt - 1);
    if (in_output > 0) x[i] -= row.frequency_penalty * static_cast<float>(in_output) + row.presence_penalty;
  }
}

// Tokens with logit > floor, or == floor and id <= last_id.
struct Cut {
  float floor = kLowest;
  std::int64_t last_id = kAllIds;
  bool keeps(float x, std::int64_t id) const { return x > floor || (x == floor && id <= last_id); }
};

// The histogram of one row. Buckets hold equal steps below the maximum; the last one holds all the rest.
class Histogram {
 public:
  Histogram(std::span<const float> x, float max, float inv_temperature, const Cut& cut)
      : x_(x), max_(max), scale_(inv_temperature), cut_(cut) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (!cut_.keeps(x[i], static_cast<std::int64_t>(i)) || x[i] == kLowest) continue;
      const std::size_t b = bucket(x[i]);
      ++count_[b];
      mass_[b] += weight(x[i]);
    }
  }

  // The k greatest, and what equals the last of them.
  Cut top_k(std::int64_t k) {
    std::int64_t before = 0;
    for (std::size_t b = 0; b < kBuckets; ++b) {
      if (before + count_[b] < k) {
        before += count_[b];
        continue;
      }
      const auto members = sorted(b);
      const float floor = members[static_cast<std::size_t>(k - before - 1)].first;
      count_[b] = 0;
      mass_[b] = 0.0;
      for (const auto& [value, id] : members) {
        if (value < floor) break;
        ++count_[b];
        mass_[b] += weight(value);
      }
      std::fill(count_.begin() + static_cast<std::ptrdiff_t>(b) + 1, count_.end(), 0);
      std::fill(mass_.begin() + static_cast<std::ptrdiff_t>(b) + 1, mass_.end(), 0.0);
      cut_ = {floor, kAllIds};
      break;
    }
    return cut_;
  }

  // The fewest greatest whose mass reaches p of what is kept; equal logits count in order of their ids.
  Cut top_p(double p) {
    double total = 0.0;
    for (const double m : mass_) total += m;
    const double target = p * total;
    double before = 0.0;
    for (std::size_t b = 0; b < kBuckets; ++b) {
      if (count_[b] == 0) continue;
      if (before + mass_[b] < target) {
        before += mass_[b];
        continue;
      }
      for (const auto& [value, id] : sorted(b)) {
        before += weight(value);
        cut_ = {value, id};
        if (before >= target) break;
      }
      break;
    }
    return cut_;
  }

 private:
  static constexpr std::size_t kBuckets = 2048;
  static constexpr float kPerNat = 64.0f;

  std::size_t bucket(float x) const {
    const float at = (max_ - x) * scale_ * kPerNat;
    return at < static_cast<float>(kBuckets - 1) ? static_cast<std::size_t>(at) : kBuckets - 1;
  }
  double weight(float x) const { return static_cast<double>(std::exp((x - max_) * scale_)); }

  // Members of a bucket, greatest first, ties by lower id.
  std::vector<std::pair<float, std::int64_t>> sorted(std::size_t b) const {
    std::vector<std::pair<float, std::int64_t>> members;
    for (std::size_t i = 0; i < x_.size(); ++i) {
      if (x_[i] != kLowest && cut_.keeps(x_[i], static_cast<std::int64_t>(i)) && bucket(x_[i]) == b) {
        members.emplace_back(x_[i], static_cast<std::int64_t>(i));
      }
    }
    std::sort(members.begin(), members.end(), [](const auto& a, const auto& c) {
      return a.first != c.first ? a.first > c.first : a.second < c.second;
    });
    return members;
  }

  std::span<const float> x_;
  float max_, scale_;
  Cut cut_;
  std::array<std::int64_t, kBuckets> count_{};
  std::array<double, kBuckets> mass_{};
};

std::int64_t draw(const Kernels& k, std::span<const float> x, const SampleRow& row) {
  const auto n = static_cast<std::int64_t>(x.size());
  if (row.temperature <= 0.0f || row.top_k == 1) return k.argmax(x.data(), n);
  const float inv_temperature = 1.0f / row.temperature;
  const float max = k.row_max(x.data(), n);
  if (!std::isfinite(max)) return k.argmax(x.data(), n);
  Cut cut;
  if (row.min_p > 0.0f) cut.floor = max + std::log(row.min_p) * row.temperature;
  const bool by_k = row.top_k > 0 && row.top_k < n;
  if (by_k || row.top_p < 1.0f) {
    Histogram histogram(x, max, inv_temperature, cut);
    if (by_k) cut = histogram.top_k(row.top_k);
    if (row.top_p < 1.0f) cut = histogram.top_p(static_cast<double>(row.top_p));
  }
  const std::int64_t id = k.gumbel_argmax({.logits = x.data(),
                                           .n = n,
                                           .inv_temperature = inv_temperature,
                                           .floor = cut.floor,
                                           .last_id = cut.last_id,
                                           .seed = row.seed,
                                           .position = static_cast<std::uint64_t>(row.position)});
  return id >= 0 ? id : k.argmax(x.data(), n);
}

LogprobResult logprobs_of(const Kernels& k, std::span<const float> x, const LogprobRequest& request) {
  const auto n = static_cast<std::int64_t>(x.size());
  const float max = k.row_max(x.data(), n);
  const double log_z = static_cast<double>(max) + std::log(k.sum_exp(x.data(), n, max, 1.0f));
  const auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - log_z); };
  const float own = x[static_cast<std::size_t>(request.token)];
  LogprobResult result{.logprob = logprob(own), .rank = 1, .top = {}};
  for (const float v : x) result.rank += v > own;

  const auto wanted = static_cast<std::size_t>(std::clamp<std::int64_t>(request.top, 0, n));
  if (wanted == 0) return result;
  // A sorted list of the best so far: almost every logit fails the one comparison with its last.
  auto& top = result.top;
  top.reserve(wanted + 1);
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (top.size() == wanted && !(x[i] > top.back().second)) continue;
    const auto at = std::upper_bound(top.begin(), top.end(), x[i],
                                     [](float value, const auto& entry) { return value > entry.second; });
    top.insert(at, {static_cast<std::int32_t>(i), x[i]});
    if (top.size() > wanted) top.pop_back();
  }
  for (auto& [id, value] : top) value = logprob(value);
  return result;
}

std::span<float> row_of(const Tensor& logits, std::int64_t r) {
  return {static_cast<float*>(logits.at(r)), static_cast<std::size_t>(logits.cols())};
}

}  // namespace

void CpuBackend::process_logits(const Tensor& logits, std::span<const SampleRow> rows) {
  assert(logits.dtype == DType::F32 && static_cast<std::size_t>(logits.rows()) == rows.size());
  share(logits.rows(), [&](std::int64_t r, int) { process_row(row_of(logits, r), rows[static_cast<std::size_t>(r)]); });
}

void CpuBackend::sample(const Tensor& logits, std::span<const SampleRow> rows, std::span<TokenId> out) {
  assert(logits.dtype == DType::F32 && static_cast<std::size_t>(logits.rows()) == rows.size());
  share(logits.rows(), [&](std::int64_t r, int) {
    const SampleRow& row = rows[static_cast<std::size_t>(r)];
    const std::int64_t id = draw(kernels_, row_of(logits, r), row);
    out[static_cast<std::size_t>(r)] = static_cast<TokenId>(id);
    if (row.counts) ++row.counts[id];
  });
}

void CpuBackend::topk_logprobs(const Tensor& logits, std::span<const LogprobRequest> requests,
                               std::span<LogprobResult> out) {
  share(static_cast<std::int64_t>(requests.size()), [&](std::int64_t i, int) {
    const LogprobRequest& request = requests[static_cast<std::size_t>(i)];
    out[static_cast<std::size_t>(i)] = logprobs_of(kernels_, row_of(logits, request.row), request);
  });
}

}  // namespace fastllm::cpu

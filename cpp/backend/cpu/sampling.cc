// Sampling on the CPU: each row of logits is one item of work on one thread, so a row's token never depends on another.
//
// Top-k and top-p need no sort of the vocabulary: only tokens within a few nats of the greatest are collected and
// sorted, further ones when those do not reach k, or p of the mass. What remains is a threshold (floor, last_id) which
// the Gumbel-max kernel applies while it draws.
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

void process_row(std::span<float> x, const SampleRow& row, std::span<const std::int32_t> counts) {
  for (const auto& [id, bias] : row.logit_bias) x[static_cast<std::size_t>(id)] += bias;
  for (const std::int32_t id : row.forbidden) x[static_cast<std::size_t>(id)] = kLowest;
  if (!row.penalised) return;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::int32_t seen = counts[i];
    if (seen == 0) continue;
    x[i] = x[i] > 0.0f ? x[i] / row.repetition_penalty : x[i] * row.repetition_penalty;
    const std::int32_t in_output = seen & (kInPrompt - 1);
    if (in_output > 0) x[i] -= row.frequency_penalty * static_cast<float>(in_output) + row.presence_penalty;
  }
}

// Tokens with logit > floor, or == floor and id <= last_id.
struct Cut {
  float floor = kLowest;
  std::int64_t last_id = kAllIds;
};

// Applies min_p, then top_k (what equals the k-th stays), then top_p: the fewest greatest whose mass reaches p of what
// is kept, equal logits counting in order of their ids.
Cut filter(const Kernels& k, std::span<const float> x, const SampleRow& row, float max) {
  Cut cut;
  if (row.min_p > 0.0f) cut.floor = max + std::log(row.min_p) * row.temperature;
  const auto n = static_cast<std::int64_t>(x.size());
  const bool by_k = row.top_k > 0 && row.top_k < n, by_p = row.top_p < 1.0f;
  if (!by_k && !by_p) return cut;

  const float inv_temperature = 1.0f / row.temperature;
  const auto mass = [&](float v) { return std::exp(static_cast<double>((v - max) * inv_temperature)); };
  // What top_p is a share of, when neither min_p nor top_k removes any of it.
  const bool of_all = !by_k && row.min_p <= 0.0f;
  double total = of_all ? k.sum_exp(x.data(), n, max, inv_temperature) : 0.0;
  const auto enough = [&](const std::vector<std::pair<float, std::int64_t>>& near) {
    if (by_k) return static_cast<std::int64_t>(near.size()) >= row.top_k;
    double reached = 0.0;
    for (const auto& entry : near) reached += mass(entry.first);
    return reached >= static_cast<double>(row.top_p) * total;
  };
  std::vector<std::pair<float, std::int64_t>> near;
  for (float nats = by_k || of_all ? 4.0f : 1e9f;; nats *= 2.0f) {
    const float reach = max - nats * row.temperature;
    const bool last = nats > 1000.0f || reach <= cut.floor;
    const float from = last ? std::max(cut.floor, std::numeric_limits<float>::lowest()) : reach;
    near.clear();
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (x[i] >= from) near.emplace_back(x[i], static_cast<std::int64_t>(i));
    }
    if (last || enough(near)) break;
  }
  const auto greater = [](const auto& a, const auto& b) {  // ties by lower id
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  if (by_k && static_cast<std::int64_t>(near.size()) >= row.top_k) {
    const auto kth = near.begin() + row.top_k - 1;
    std::nth_element(near.begin(), kth, near.end(), greater);
    cut = {kth->first, kAllIds};
    std::erase_if(near, [&](const auto& entry) { return entry.first < cut.floor; });
  }
  if (!by_p) return cut;
  if (!of_all) {
    for (const auto& entry : near) total += mass(entry.first);
  }
  std::sort(near.begin(), near.end(), greater);
  double before = 0.0;
  for (const auto& [value, id] : near) {
    cut = {value, id};
    before += mass(value);
    if (before >= static_cast<double>(row.top_p) * total) break;
  }
  return cut;
}

// -1 where the greatest logit is no finite number.
std::int64_t draw(const Kernels& k, std::span<const float> x, const SampleRow& row) {
  const auto n = static_cast<std::int64_t>(x.size());
  if (row.temperature <= 0.0f || row.top_k == 1) return k.argmax(x.data(), n);
  const float inv_temperature = 1.0f / row.temperature;
  const float max = k.row_max(x.data(), n);
  if (!std::isfinite(max)) return -1;
  const Cut cut = filter(k, x, row, max);
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
  LogprobResult result{.token = request.token, .logprob = logprob(own), .rank = 1, .top = {}};
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

void CpuBackend::mask_logits(const Tensor& logits, std::span<const std::int32_t> rows,
                             std::span<const std::uint32_t> bits) {
  const auto words = static_cast<std::size_t>((logits.cols() + 31) / 32);
  assert(logits.dtype == DType::F32 && bits.size() == rows.size() * words);
  share(static_cast<std::int64_t>(rows.size()), [&](std::int64_t r, int) {
    const auto x = row_of(logits, rows[static_cast<std::size_t>(r)]);
    const auto allowed = bits.subspan(static_cast<std::size_t>(r) * words, words);
    for (std::size_t i = 0; i < x.size(); ++i)
      if ((allowed[i / 32] >> (i % 32) & 1u) == 0) x[i] = kLowest;
  });
}

void CpuBackend::process_logits(const Tensor& logits, const Step& base) {
  const CpuStep& step = cpu_step(base);
  const auto rows = static_cast<std::int64_t>(step.sampling.size());
  assert(logits.dtype == DType::F32 && logits.rows() >= rows);
  share(rows, [&](std::int64_t r, int) {
    const SampleRow& row = step.sampling[static_cast<std::size_t>(r)];
    process_row(row_of(logits, r), row, counts_[index(row.slot)]);
  });
}

void CpuBackend::sample(const Tensor& logits, Step& base) {
  CpuStep& step = cpu_step(base);
  const auto rows = static_cast<std::int64_t>(step.sampling.size());
  assert(logits.dtype == DType::F32 && logits.rows() >= rows && step.output.tokens.size() == step.sampling.size());
  share(rows, [&](std::int64_t r, int) {
    const SampleRow& row = step.sampling[static_cast<std::size_t>(r)];
    const std::int64_t id = draw(kernels_, row_of(logits, r), row);
    step.output.tokens[static_cast<std::size_t>(r)] = static_cast<TokenId>(id);
    last_tokens_[index(row.slot)] = static_cast<TokenId>(std::max<std::int64_t>(id, 0));
    if (row.penalised && id >= 0) ++counts_[index(row.slot)][static_cast<std::size_t>(id)];
  });
}

void CpuBackend::topk_logprobs(const Tensor& logits, Step& base, std::span<const LogprobRequest> requests) {
  StepOutput& output = cpu_step(base).output;
  const std::size_t before = output.logprobs.size();
  output.logprobs.resize(before + requests.size());
  share(static_cast<std::int64_t>(requests.size()), [&](std::int64_t i, int) {
    LogprobRequest request = requests[static_cast<std::size_t>(i)];
    if (request.sampled >= 0) request.token = std::max(output.tokens[static_cast<std::size_t>(request.sampled)], 0);
    output.logprobs[before + static_cast<std::size_t>(i)] = logprobs_of(kernels_, row_of(logits, request.row), request);
  });
}

}  // namespace fastllm::cpu

#include "runtime/sampler.h"

#include <algorithm>
#include <cassert>
#include <exception>

namespace fastllm {
namespace {

std::span<const TokenId> host_tokens(const StepPlan& plan, std::int32_t row) {
  for (const auto& h : plan.host_tokens)
    if (h.row == row) return h.tokens;
  return {};
}

const SlotSampling& sampling_of(const SampleTask& task, std::size_t i) {
  return task.slots.sampling(task.plan.rows[static_cast<std::size_t>(task.rows[i])].slot);
}

}  // namespace

PositionLogprobs to_position(const LogprobResult& r) {
  PositionLogprobs p;
  p.chosen = {r.token, r.logprob, r.rank};
  p.top.reserve(r.top.size());
  for (const auto& [token, logprob] : r.top) p.top.push_back({token, logprob, static_cast<int>(p.top.size()) + 1});
  return p;
}

Sampler::Sampler(Backend& backend, int vocab, int max_rows)
    : backend_(backend),
      vocab_(vocab),
      raw_(backend.allocate(static_cast<std::size_t>(max_rows) * static_cast<std::size_t>(vocab) * sizeof(float),
                            MemoryKind::Lazy)) {}

void Sampler::sample(const SampleTask& task, std::span<const std::uint32_t> masks,
                     std::vector<std::pair<std::int32_t, std::string>>& row_errors) {
  assert(task.logits.rows() == static_cast<std::int64_t>(task.rows.size()));
  keep_raw_logits(task);
  run_processors(task, row_errors);
  apply_masks(task, masks, row_errors);
  backend_.process_logits(task.logits, task.step);
  backend_.sample(task.logits, task.step);
}

void Sampler::logprobs(const SampleTask& task, std::vector<std::int32_t>& indexes) {
  if (raw_rows_.empty()) return;
  requests_.clear();
  for (const std::int32_t i : raw_rows_) {
    const auto row = static_cast<std::int32_t>(requests_.size());
    requests_.push_back({row, 0, sampling_of(task, static_cast<std::size_t>(i)).params->logprobs, i});
  }
  indexes.insert(indexes.end(), raw_rows_.begin(), raw_rows_.end());
  const Tensor raw(raw_->data(), DType::F32, {static_cast<std::int64_t>(raw_rows_.size()), vocab_});
  backend_.topk_logprobs(raw, task.step, requests_);
}

void Sampler::keep_raw_logits(const SampleTask& task) {
  raw_rows_.clear();
  if (task.plan.max_logprobs < 0) return;
  for (std::size_t i = 0; i < task.rows.size(); ++i)
    if (sampling_of(task, i).params->logprobs >= 0) raw_rows_.push_back(static_cast<std::int32_t>(i));
  if (raw_rows_.empty()) return;
  const Tensor raw(raw_->data(), DType::F32, {static_cast<std::int64_t>(raw_rows_.size()), vocab_});
  backend_.gather_rows(raw, task.logits, raw_rows_);
}

void Sampler::run_processors(const SampleTask& task, std::vector<std::pair<std::int32_t, std::string>>& row_errors) {
  const auto bytes = static_cast<std::size_t>(vocab_) * sizeof(float);
  for (std::size_t i = 0; i < task.rows.size(); ++i) {
    const SlotSampling& s = sampling_of(task, i);
    if (!s.logits_processor) continue;
    void* const row = task.logits.at(static_cast<std::int64_t>(i));
    host_logits_.resize(static_cast<std::size_t>(vocab_));
    backend_.copy(host_logits_.data(), row, bytes);
    backend_.synchronize();
    auto failed = [&](const std::string& why) {
      row_errors.emplace_back(static_cast<std::int32_t>(i), "the logits processor failed: " + why);
    };
    try {
      s.logits_processor->process(host_tokens(task.plan, task.rows[i]), s.num_prompt, host_logits_);
    } catch (const std::exception& e) {
      failed(e.what());
      continue;
    } catch (...) {
      failed("unknown exception");
      continue;
    }
    backend_.copy(row, host_logits_.data(), bytes);
    backend_.synchronize();
  }
}

void Sampler::apply_masks(const SampleTask& task, std::span<const std::uint32_t> masks,
                          std::vector<std::pair<std::int32_t, std::string>>& row_errors) {
  const std::size_t words = (static_cast<std::size_t>(vocab_) + 31) / 32;
  masked_.clear();
  bits_.clear();
  std::size_t next_mask = 0;
  for (std::size_t i = 0; i < task.rows.size(); ++i) {
    const SlotSampling& s = sampling_of(task, i);
    const auto& with_mask = task.plan.masked_rows;
    const bool is_masked = next_mask < with_mask.size() && with_mask[next_mask] == task.rows[i];
    if (!is_masked && s.allowed.empty()) continue;
    const std::size_t begin = bits_.size();
    if (s.allowed.empty()) {
      bits_.resize(begin + words, ~0u);
    } else {
      bits_.insert(bits_.end(), s.allowed.begin(), s.allowed.end());
    }
    const auto bits = std::span(bits_).subspan(begin);
    if (is_masked) {
      const auto mask = masks.subspan(next_mask++ * words, words);
      for (std::size_t w = 0; w < words; ++w) bits[w] &= mask[w];
    }
    for (const TokenId id : s.forbidden) bits[static_cast<std::size_t>(id) / 32] &= ~(1u << (id % 32));
    masked_.push_back(static_cast<std::int32_t>(i));
    if (std::ranges::all_of(bits, [](std::uint32_t w) { return w == 0; })) {
      row_errors.emplace_back(static_cast<std::int32_t>(i), "No token of the vocabulary is allowed here.");
    }
  }
  if (!masked_.empty()) backend_.mask_logits(task.logits, masked_, bits_);
}

}  // namespace fastllm

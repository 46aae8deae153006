#include "runtime/sampler.h"

#include <algorithm>
#include <cassert>
#include <exception>
#include <string>

namespace fastllm {
namespace {

PositionLogprobs to_position(const LogprobRequest& request, const LogprobResult& r) {
  PositionLogprobs p;
  p.chosen = {request.token, r.logprob, r.rank};
  p.top.reserve(r.top.size());
  for (const auto& [token, logprob] : r.top) p.top.push_back({token, logprob, static_cast<int>(p.top.size()) + 1});
  return p;
}

std::span<const TokenId> host_tokens(const StepPlan& plan, std::int32_t row) {
  for (const auto& h : plan.host_tokens)
    if (h.row == row) return h.tokens;
  return {};
}

}  // namespace

Sampler::Sampler(Backend& backend, int vocab, int max_rows)
    : backend_(backend),
      vocab_(vocab),
      raw_(backend.allocate(static_cast<std::size_t>(max_rows) * static_cast<std::size_t>(vocab) * sizeof(float),
                            MemoryKind::Lazy)) {}

void Sampler::run(const Tensor& logits, std::span<const SampleTarget> targets, const StepPlan& plan,
                  const SlotState& slots, std::span<const std::uint32_t> masks, StepResult& result) {
  assert(logits.rows() == static_cast<std::int64_t>(targets.size()));
  keep_raw_logits(logits, targets, plan, slots);
  run_processors(logits, targets, plan, slots, result);

  const auto words = static_cast<std::size_t>((vocab_ + 31) / 32);
  rows_.clear();
  for (const auto& t : targets) {
    const Row& row = plan.rows[static_cast<std::size_t>(t.row)];
    rows_.push_back(slots.sample_row(row.slot, std::int64_t{row.first_pos} + row.num_tokens));
    if ((row.flags & kMask) != 0) {
      const auto at = std::lower_bound(plan.masked_rows.begin(), plan.masked_rows.end(), t.row);
      rows_.back().mask = masks.data() + static_cast<std::size_t>(at - plan.masked_rows.begin()) * words;
    }
  }
  tokens_.resize(targets.size());
  backend_.process_logits(logits, rows_);
  backend_.sample(logits, rows_, tokens_);
  for (std::size_t i = 0; i < targets.size(); ++i)
    result.tokens[static_cast<std::size_t>(targets[i].index)] = tokens_[i];

  if (raw_rows_.empty()) return;
  requests_.clear();
  for (std::size_t k = 0; k < raw_rows_.size(); ++k) {
    const auto i = static_cast<std::size_t>(raw_rows_[k]);
    const SlotId slot = plan.rows[static_cast<std::size_t>(targets[i].row)].slot;
    requests_.push_back({static_cast<std::int32_t>(k), tokens_[i], slots.sampling(slot).params->logprobs});
  }
  const Tensor raw(raw_->data(), DType::F32, {static_cast<std::int64_t>(raw_rows_.size()), vocab_});
  results_.resize(requests_.size());
  backend_.topk_logprobs(raw, requests_, results_);
  for (std::size_t k = 0; k < raw_rows_.size(); ++k) {
    const auto& target = targets[static_cast<std::size_t>(raw_rows_[k])];
    result.logprobs[static_cast<std::size_t>(target.index)] = to_position(requests_[k], results_[k]);
  }
}

void Sampler::keep_raw_logits(const Tensor& logits, std::span<const SampleTarget> targets, const StepPlan& plan,
                              const SlotState& slots) {
  raw_rows_.clear();
  if (plan.max_logprobs < 0) return;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const SlotId slot = plan.rows[static_cast<std::size_t>(targets[i].row)].slot;
    if (slots.sampling(slot).params->logprobs >= 0) raw_rows_.push_back(static_cast<std::int32_t>(i));
  }
  if (raw_rows_.empty()) return;
  const Tensor raw(raw_->data(), DType::F32, {static_cast<std::int64_t>(raw_rows_.size()), vocab_});
  backend_.gather_rows(raw, logits, raw_rows_);
}

void Sampler::run_processors(const Tensor& logits, std::span<const SampleTarget> targets, const StepPlan& plan,
                             const SlotState& slots, StepResult& result) {
  const auto bytes = static_cast<std::size_t>(vocab_) * sizeof(float);
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const SlotSampling& s = slots.sampling(plan.rows[static_cast<std::size_t>(targets[i].row)].slot);
    if (!s.logits_processor) continue;
    host_logits_.resize(static_cast<std::size_t>(vocab_));
    backend_.copy(host_logits_.data(), logits.at(static_cast<std::int64_t>(i)), bytes);
    backend_.synchronize();
    auto failed = [&](const std::string& why) {
      result.row_errors.emplace_back(targets[i].index, "the logits processor failed: " + why);
    };
    try {
      s.logits_processor->process(host_tokens(plan, targets[i].row), s.num_prompt, host_logits_);
    } catch (const std::exception& e) {
      failed(e.what());
      continue;
    } catch (...) {
      failed("unknown exception");
      continue;
    }
    backend_.copy(logits.at(static_cast<std::int64_t>(i)), host_logits_.data(), bytes);
    backend_.synchronize();
  }
}

void Sampler::logprobs(const Tensor& logits, std::span<const LogprobRequest> requests,
                       std::vector<PositionLogprobs>& out) {
  results_.resize(requests.size());
  backend_.topk_logprobs(logits, requests, results_);
  for (std::size_t i = 0; i < requests.size(); ++i) out.push_back(to_position(requests[i], results_[i]));
}

}  // namespace fastllm

// Steps and what stays between them by slot: block tables, last tokens, counts for penalties.
#include "backend/cpu/step.h"

#include <algorithm>
#include <cassert>

#include "backend/cpu/cpu_backend.h"

namespace fastllm::cpu {

void CpuStep::keep_sampling(std::span<const SampleRow> from) {
  sampling.assign(from.begin(), from.end());
  biases_.clear();
  forbidden_.clear();
  for (const SampleRow& row : from) {
    biases_.insert(biases_.end(), row.logit_bias.begin(), row.logit_bias.end());
    forbidden_.insert(forbidden_.end(), row.forbidden.begin(), row.forbidden.end());
  }
  std::size_t bias = 0, id = 0;
  for (SampleRow& row : sampling) {
    row.logit_bias = std::span(biases_).subspan(bias, row.logit_bias.size());
    row.forbidden = std::span(forbidden_).subspan(id, row.forbidden.size());
    bias += row.logit_bias.size();
    id += row.forbidden.size();
  }
}

void CpuBackend::init_steps(const StepLimits& limits) {
  vocab_ = limits.vocab;
  tables_.emplace(limits.max_slots, limits.table_width);
  last_tokens_.assign(static_cast<std::size_t>(limits.max_slots), 0);
  counts_.assign(static_cast<std::size_t>(limits.max_slots), {});
  steps_.clear();
  for (int i = 0; i < limits.in_flight; ++i) steps_.push_back(std::make_unique<CpuStep>());
}

Step& CpuBackend::begin_step(const StepInput& input) {
  assert(tables_ && input.padded_rows == 0);
  CpuStep& step = *steps_[next_step_++ % steps_.size()];
  for (const TableSet& set : input.table_sets) tables_->set(set);
  step.ids.assign(input.tokens.begin(), input.tokens.end());
  step.positions.resize(input.tokens.size());
  step.rows.clear();
  step.logit_tokens.assign(input.logit_tokens.begin(), input.logit_tokens.end());
  step.logit_slots.clear();
  auto logit = input.logit_tokens.begin();
  for (const StepRow& row : input.rows) {
    const auto begin = static_cast<std::size_t>(row.token_begin);
    if (row.from_slot) step.ids[begin] = last_tokens_[index(row.slot)];
    for (std::int32_t i = 0; i < row.num_tokens; ++i)
      step.positions[begin + static_cast<std::size_t>(i)] = row.first_pos + i;
    step.rows.push_back({row.token_begin, row.num_tokens, row.first_pos, tables_->table(row.slot)});
    for (; logit != input.logit_tokens.end() && *logit < row.token_begin + row.num_tokens; ++logit)
      step.logit_slots.push_back(row.slot);
  }
  step.attention.make(step.rows, pool_.size());
  step.keep_sampling(input.sampling);
  step.output.tokens.assign(input.logit_tokens.size(), -1);
  step.output.logprobs.clear();
  return step;
}

void CpuBackend::wait_step(Step& step, StepOutput& out) { std::swap(out, cpu_step(step).output); }

void CpuBackend::init_counts(SlotId slot, std::span<const TokenId> tokens, std::int32_t num_prompt) {
  auto& counts = counts_[index(slot)];
  counts.assign(static_cast<std::size_t>(vocab_), 0);
  const auto prompt = std::min(tokens.size(), static_cast<std::size_t>(num_prompt));
  for (const TokenId id : tokens.first(prompt)) counts[static_cast<std::size_t>(id)] |= kInPrompt;
  for (const TokenId id : tokens.subspan(prompt)) ++counts[static_cast<std::size_t>(id)];
}

TokenId* CpuBackend::sampled_tokens(Step& step) { return cpu_step(step).output.tokens.data(); }

void CpuBackend::commit_tokens(Step& base) {
  const CpuStep& step = cpu_step(base);
  for (std::size_t i = 0; i < step.logit_slots.size(); ++i)
    last_tokens_[index(step.logit_slots[i])] = std::max(step.output.tokens[i], 0);
}

}  // namespace fastllm::cpu

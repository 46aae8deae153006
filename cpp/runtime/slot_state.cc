#include "runtime/slot_state.h"

#include <algorithm>
#include <utility>

namespace fastllm {

SlotState::SlotState(int max_slots, int max_blocks_per_slot, int vocab, std::vector<TokenId> eos, Backend& backend)
    : vocab_(vocab),
      eos_(std::move(eos)),
      backend_(backend),
      tables_(max_slots, max_blocks_per_slot),
      last_token_(static_cast<std::size_t>(max_slots), 0),
      sampling_(static_cast<std::size_t>(max_slots)) {}

void SlotState::init(const SlotInit& slot, bool samples) {
  tables_.reset(slot.slot);
  set_last_token(slot.slot, 0);
  if (!samples) return;
  SlotSampling& s = sampling_[index(slot.slot)];
  s.params = slot.sampling;
  s.logits_processor = slot.logits_processor;
  s.seed = slot.seed;
  s.num_prompt = slot.num_prompt;
  s.stops.clear();
  if (s.params->min_tokens > 0) {
    auto add = [&](TokenId id) {
      if (id >= 0 && id < vocab_) s.stops.push_back(id);
    };
    std::for_each(eos_.begin(), eos_.end(), add);
    std::for_each(s.params->stop_ids.begin(), s.params->stop_ids.end(), add);
  }
  if (needs_history(*s.params)) count_history(s, slot.tokens);
}

void SlotState::count_history(SlotSampling& s, std::span<const TokenId> tokens) {
  count_scratch_.assign(static_cast<std::size_t>(vocab_), 0);
  const auto num_prompt = std::min(tokens.size(), static_cast<std::size_t>(s.num_prompt));
  for (TokenId id : tokens.first(num_prompt)) count_scratch_[static_cast<std::size_t>(id)] |= kInPrompt;
  for (TokenId id : tokens.subspan(num_prompt)) ++count_scratch_[static_cast<std::size_t>(id)];
  const auto bytes = count_scratch_.size() * sizeof(PenaltyCounts);
  if (!s.counts) s.counts = backend_.allocate(bytes, MemoryKind::Device);
  backend_.copy(s.counts->data(), count_scratch_.data(), bytes);
  backend_.synchronize();
}

SampleRow SlotState::sample_row(SlotId slot, std::int64_t position) const {
  const SlotSampling& s = sampling(slot);
  const SamplingParams& p = *s.params;
  SampleRow row;
  row.temperature = p.temperature;
  row.top_p = p.top_p;
  row.min_p = p.min_p;
  row.top_k = std::max(p.top_k, 0);
  row.repetition_penalty = p.repetition_penalty;
  row.presence_penalty = p.presence_penalty;
  row.frequency_penalty = p.frequency_penalty;
  if (needs_history(p)) row.counts = static_cast<PenaltyCounts*>(s.counts->data());
  row.logit_bias = p.logit_bias;
  // Outputs before this one: position - num_prompt.
  if (position - s.num_prompt < p.min_tokens) row.forbidden = s.stops;
  row.seed = s.seed;
  row.position = position;
  return row;
}

}  // namespace fastllm

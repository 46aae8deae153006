#include "runtime/slot_state.h"

#include <algorithm>
#include <utility>

#include "runtime/bad_words.h"

namespace fastllm {

SlotState::SlotState(int max_slots, int vocab, std::vector<TokenId> eos)
    : vocab_(vocab), eos_(std::move(eos)), sampling_(static_cast<std::size_t>(max_slots)) {}

void SlotState::init(const SlotInit& slot) {
  SlotSampling& s = sampling_[index(slot.slot)];
  s.params = slot.sampling;
  s.logits_processor = slot.logits_processor;
  s.seed = slot.seed;
  s.num_prompt = slot.num_prompt;
  s.allowed.clear();
  if (!s.params->allowed_ids.empty()) s.allowed = bits_of(s.params->allowed_ids, vocab_);
  s.stops.clear();
  if (s.params->min_tokens > 0) {
    auto add = [&](TokenId id) {
      if (id >= 0 && id < vocab_) s.stops.push_back(id);
    };
    std::for_each(eos_.begin(), eos_.end(), add);
    std::for_each(s.params->stop_ids.begin(), s.params->stop_ids.end(), add);
  }
}

SampleRow SlotState::sample_row(SlotId slot, std::int64_t position, std::span<const TokenId> tokens) {
  SlotSampling& s = sampling_[index(slot)];
  const SamplingParams& p = *s.params;
  SampleRow row;
  row.slot = slot;
  row.temperature = p.temperature;
  row.top_p = p.top_p;
  row.min_p = p.min_p;
  row.top_k = std::max(p.top_k, 0);
  row.repetition_penalty = p.repetition_penalty;
  row.presence_penalty = p.presence_penalty;
  row.frequency_penalty = p.frequency_penalty;
  row.penalised = needs_history(p);
  row.logit_bias = p.logit_bias;
  // Outputs before this one: position - num_prompt.
  s.forbidden.clear();
  if (position - s.num_prompt < p.min_tokens) s.forbidden = s.stops;
  const auto num_prompt = static_cast<std::size_t>(s.num_prompt);
  append_completions(p.bad_words, tokens.size() > num_prompt ? tokens.subspan(num_prompt) : tokens.first(0),
                     s.forbidden);
  row.forbidden = s.forbidden;
  row.seed = s.seed;
  row.position = position;
  return row;
}

}  // namespace fastllm

#include "sched/admission.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string_view>

#include "sched/beam_search.h"
#include "sched/step_plan.h"

namespace fastllm {
namespace {

std::string text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", value);
  return buffer;
}
std::string text(int value) { return std::to_string(value); }

template <class T>
std::string outside(std::string_view field, T value, const std::string& allowed) {
  return std::string(field) + " is " + text(value) + ", but must be " + allowed + ".";
}

template <class T>
std::string check_range(std::string_view field, T value, T low, T high) {
  if (value >= low && value <= high) return {};  // false for NaN
  return outside(field, value, "between " + text(low) + " and " + text(high));
}

std::string check_ids(std::string_view field, int vocab, auto begin, auto end, auto id_of) {
  for (auto it = begin; it != end; ++it) {
    const TokenId id = id_of(*it);
    if (id >= 0 && id < vocab) continue;
    return std::string(field) + "[" + std::to_string(it - begin) + "] is token id " + std::to_string(id) +
           ", but the vocabulary has ids 0 to " + std::to_string(vocab - 1) + ".";
  }
  return {};
}

std::string prompt_error(const std::vector<TokenId>& prompt, const AdmissionLimits& limits) {
  if (prompt.empty()) return "prompt is empty, but must have at least 1 token.";
  const auto size = static_cast<std::int64_t>(prompt.size());
  if (size >= limits.max_len) {
    return "prompt has " + std::to_string(size) + " tokens, but the model's context of " +
           std::to_string(limits.max_len) + " tokens must also hold one token of output.";
  }
  if (size > limits.pool_tokens) {
    return "prompt has " + std::to_string(size) + " tokens, but the KV cache holds only " +
           std::to_string(limits.pool_tokens) + "; raise num_blocks or kv_cache_bytes.";
  }
  return check_ids("prompt", limits.vocab, prompt.begin(), prompt.end(), [](TokenId id) { return id; });
}

// Whether some token may always be sampled first.
std::string choice_error(const SamplingParams& p, const AdmissionLimits& limits) {
  const auto itself = [](TokenId id) { return id; };
  if (std::string e = check_ids("allowed_ids", limits.vocab, p.allowed_ids.begin(), p.allowed_ids.end(), itself);
      !e.empty()) {
    return e;
  }
  for (const auto& word : p.bad_words) {
    if (word.empty()) return "bad_words has a word without tokens.";
    if (std::string e = check_ids("bad_words", limits.vocab, word.begin(), word.end(), itself); !e.empty()) return e;
  }
  std::vector<TokenId> never;
  for (const auto& word : p.bad_words) {
    if (word.size() == 1) never.push_back(word[0]);
  }
  std::ranges::sort(never);
  const auto bad = [&](TokenId id) { return std::ranges::binary_search(never, id); };
  if (!p.allowed_ids.empty() && std::ranges::all_of(p.allowed_ids, bad)) {
    return "allowed_ids holds only tokens that bad_words forbids.";
  }
  return {};
}

std::string sampling_error(const SamplingParams& p, const AdmissionLimits& limits) {
  std::string error;
  const auto failed = [&error](std::string sentence) {
    error = std::move(sentence);
    return !error.empty();
  };
  if (!(std::isfinite(p.temperature) && p.temperature >= 0)) {
    return outside("temperature", p.temperature, "a finite number of at least 0");
  }
  if (!(p.top_p > 0 && p.top_p <= 1)) return outside("top_p", p.top_p, "greater than 0 and at most 1");
  if (failed(check_range("min_p", p.min_p, 0.0f, 1.0f))) return error;
  if (p.top_k < -1) return outside("top_k", p.top_k, "at least 1, or 0 or -1 for off");
  if (!(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0)) {
    return outside("repetition_penalty", p.repetition_penalty, "a finite number greater than 0");
  }
  if (failed(check_range("presence_penalty", p.presence_penalty, -2.0f, 2.0f))) return error;
  if (failed(check_range("frequency_penalty", p.frequency_penalty, -2.0f, 2.0f))) return error;
  if (failed(check_range("n", p.n, 1, limits.max_num_seqs))) return error;
  if (p.max_tokens < 1) return outside("max_tokens", p.max_tokens, "at least 1");
  if (failed(check_range("min_tokens", p.min_tokens, 0, p.max_tokens))) return error;
  if (failed(check_range("logprobs", p.logprobs, -1, limits.max_logprobs))) return error;
  if (failed(check_range("prompt_logprobs", p.prompt_logprobs, -1, limits.max_logprobs))) return error;
  if (failed(
          check_ids("stop_ids", limits.vocab, p.stop_ids.begin(), p.stop_ids.end(), [](TokenId id) { return id; }))) {
    return error;
  }
  if (failed(check_ids("logit_bias", limits.vocab, p.logit_bias.begin(), p.logit_bias.end(),
                       [](const auto& entry) { return entry.first; }))) {
    return error;
  }
  for (const auto& [id, bias] : p.logit_bias) {
    if (!std::isfinite(bias)) return outside("logit_bias of token id " + std::to_string(id), bias, "finite");
  }
  return choice_error(p, limits);
}

std::string beam_error(const RequestInput& input, const AdmissionLimits& limits) {
  const SamplingParams& p = input.sampling;
  if (p.beam_width == 0) return {};
  if (std::string error = check_range("beam_width", p.beam_width, p.n, limits.max_num_seqs); !error.empty()) {
    return error;
  }
  if (!std::isfinite(p.length_penalty)) return outside("length_penalty", p.length_penalty, "finite");
  const char* excluded = nullptr;
  if (input.mask) excluded = "a token mask";
  if (input.logits_processor) excluded = "a logits processor";
  if (needs_history(p)) excluded = "repetition_penalty, presence_penalty or frequency_penalty";
  if (!p.logit_bias.empty()) excluded = "logit_bias";
  if (!p.allowed_ids.empty()) excluded = "allowed_ids";
  if (!p.bad_words.empty()) excluded = "bad_words";
  if (excluded) return std::string("A beam search compares raw log-probabilities, so it cannot use ") + excluded + ".";
  const int num_ends = static_cast<int>(p.stop_ids.size()) + (p.ignore_eos ? 0 : limits.num_eos);
  const int candidates = beam_candidates(p.beam_width, num_ends, limits.vocab);
  if (candidates <= limits.max_logprobs) return {};
  return "beam_width is " + std::to_string(p.beam_width) + ", which needs the log-probabilities of " +
         std::to_string(candidates) + " tokens, but max_logprobs is " + std::to_string(limits.max_logprobs) + ".";
}

}  // namespace

std::string admission_error(const RequestInput& input, const AdmissionLimits& limits) {
  if (std::string error = prompt_error(input.prompt, limits); !error.empty()) return error;
  if (std::string error = sampling_error(input.sampling, limits); !error.empty()) return error;
  if (std::string error = beam_error(input, limits); !error.empty()) return error;
  if (input.adapter != -1) return outside("adapter", input.adapter, "-1: adapters are not available");
  return {};
}

std::int32_t token_limit(const RequestInput& input, const AdmissionLimits& limits) {
  const auto wanted = static_cast<std::int64_t>(input.prompt.size()) + input.sampling.max_tokens;
  // The last token's KV is never written, so a full pool still yields one token more.
  return static_cast<std::int32_t>(
      std::min({wanted, static_cast<std::int64_t>(limits.max_len), limits.pool_tokens + 1}));
}

}  // namespace fastllm

// The one place that judges a request before it may wait.
#pragma once

#include <cstdint>
#include <string>

#include "fastllm/types.h"

namespace fastllm {

struct AdmissionLimits {
  int vocab = 0;                 // ids
  int max_len = 0;               // tokens of prompt + output
  std::int64_t pool_tokens = 0;  // positions the whole KV pool holds
  int max_num_seqs = 0;
  int max_logprobs = 0;
  int num_eos = 0;
};

// What is wrong with the request: a sentence naming the field, its value and the bound; empty if nothing is.
std::string admission_error(const RequestInput& input, const AdmissionLimits& limits);

// Tokens at which a sequence of an admissible request ends: its max_tokens, the context or the pool, what comes first.
std::int32_t token_limit(const RequestInput& input, const AdmissionLimits& limits);

}  // namespace fastllm

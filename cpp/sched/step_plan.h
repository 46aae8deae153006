// What one step does: the only thing that crosses from the scheduler to the workers, and back. A plan is plain data
// with units, immutable after submit, reused from a ring of `depth` plans. Ranks read the same object.
//
// A worker applies, in this order and before the forward pass: swap_out, swap_in, copies, new_slots, table_sets.
// Then it runs the rows in plan order; no backend may run them in another order (a later row may read KV that an
// earlier row of the same step writes: identical prompts that arrive together share it).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"

namespace fastllm {

enum RowFlags : std::uint8_t {
  kSample = 1,          // sample a token after the row's last position
  kFromSlot = 2,        // the row's only input token is the slot's last sampled token, unknown to the host
  kPromptLogprobs = 4,  // log-probabilities of the row's next tokens are wanted
  kMask = 8,            // sampling waits for set_masks(); see StepPlan::masked_rows
};

// One sequence's part of a step: positions [first_pos, first_pos + num_tokens).
struct Row {
  SlotId slot = kNoSlot;
  std::int32_t first_pos = 0;    // position of the first input token
  std::int32_t num_tokens = 0;   // >= 1
  std::int32_t num_draft = 0;    // reserved for speculative decoding
  std::int32_t token_begin = 0;  // offset in StepPlan::tokens; a kFromSlot row takes one entry there, ignored
  std::uint8_t flags = 0;
};

struct BlockCopy {
  BlockId from = kNoBlock,
          to = kNoBlock;  // swap_out: device -> host; swap_in: host -> device; copies: device -> device
};

// A sequence becomes resident; whatever the slot held before is void.
struct SlotInit {
  SlotId slot = kNoSlot;
  std::shared_ptr<const SamplingParams> sampling;  // shared by the sequences of a request
  std::uint64_t seed = 0;                          // of this sequence: request seed and index, mixed
  std::vector<TokenId> tokens;  // prompt + output so far, if penalties need them (see needs_history), else empty
  std::int32_t num_prompt = 0;  // tokens
  std::shared_ptr<LogitsProcessor> logits_processor;
};

// Rows with a LogitsProcessor or bad words of several tokens are planned only when all their tokens are known to the
// host, which lends them here; the span stays valid until the plan's result was applied.
struct HostTokens {
  std::int32_t row = 0;             // index in StepPlan::rows
  std::span<const TokenId> tokens;  // prompt + output
};

struct StepPlan {
  std::uint64_t id = 0;
  std::vector<Row> rows;  // decode rows (one token, kSample) first, then chunks in admission order
  std::int32_t num_decode_rows = 0;
  std::vector<TokenId> tokens;       // inputs of all rows, concatenated
  std::vector<TokenId> next_tokens;  // parallel to tokens if any row has kPromptLogprobs, else empty: the token that
                                     // follows each position in the prompt, -1 where none does
  std::vector<BlockCopy> swap_out, swap_in, copies;
  std::vector<SlotInit> new_slots;
  std::vector<TableSet> table_sets;
  std::vector<HostTokens> host_tokens;
  std::vector<std::int32_t> masked_rows;  // rows with kMask, ascending
  std::int32_t max_logprobs = -1;         // most alternatives any kSample row wants; -1: none

  void clear() {
    rows.clear();
    num_decode_rows = 0;
    tokens.clear();
    next_tokens.clear();
    swap_out.clear();
    swap_in.clear();
    copies.clear();
    new_slots.clear();
    table_sets.clear();
    host_tokens.clear();
    masked_rows.clear();
    max_logprobs = -1;
  }
};

// One result per kSample row, in row order.
struct StepResult {
  std::uint64_t plan_id = 0;
  std::vector<TokenId> tokens;                    // [kSample rows]; -1 where row_errors has an entry
  std::vector<PositionLogprobs> logprobs;         // [kSample rows] if max_logprobs >= 0, else empty
  std::vector<PositionLogprobs> prompt_logprobs;  // of all kPromptLogprobs rows in order, one per known next token
  std::vector<std::pair<std::int32_t, std::string>> row_errors;  // {index among kSample rows, sentence}
  // Indexes among kSample rows that no token can be chosen for: logits hold a NaN, or the greatest is infinite. Their
  // token is -1.
  std::vector<std::int32_t> nan_rows;
  std::string error;  // non-empty: the whole step failed and the executor cannot go on

  void clear() {
    tokens.clear();
    logprobs.clear();
    prompt_logprobs.clear();
    row_errors.clear();
    nan_rows.clear();
    error.clear();
  }
};

constexpr bool needs_history(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

// Bad words whose last token depends on those before it.
inline bool has_phrases(const SamplingParams& p) {
  return std::ranges::any_of(p.bad_words, [](const auto& word) { return word.size() > 1; });
}

}  // namespace fastllm

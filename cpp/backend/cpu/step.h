// A step on the CPU: its inputs resolved to ids, positions and block tables, and who computes which part of attention.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "backend/backend.h"

namespace fastllm::cpu {

// A row of a few query tokens and a long past is cut along its KV tiles, so that threads share it. Partials merge in
// tile order: the cut changes nothing in the result.
inline constexpr std::int64_t kSplitTokens = 4;  // at most, to be cut

// One sequence's tokens, as attention and the KV write see them.
struct AttnRow {
  std::int32_t token_begin = 0, num_tokens = 0, first_pos = 0;
  std::span<const BlockId> table;  // entry i holds positions [i * block_size, (i + 1) * block_size)
};

// The same for all layers of a step.
class AttnPlan {
 public:
  struct Item {
    std::int32_t row = 0;
    std::int32_t token = 0, tokens = 0;         // of the row's tokens
    std::int64_t tile_begin = 0, tile_end = 0;  // KV tiles
    std::int32_t split = -1;                    // index into splits, or none
  };
  struct Split {
    std::int32_t row = 0;
    std::int64_t tiles = 0, pieces = 0;
    std::int64_t first_tile = 0;  // tiles of the splits before this one
  };

  void make(std::span<const AttnRow> rows, int threads);

  std::vector<Item> items;
  std::vector<Split> splits;
  std::int64_t split_tiles = 0;  // over all splits
  std::int32_t max_tokens = 0;   // of an item

 private:
  void add_row(std::int32_t r, const AttnRow& row);

  std::int64_t piece_tiles_ = 0;
};

class CpuStep final : public Step {
 public:
  std::vector<TokenId> ids;             // [T]
  std::vector<std::int32_t> positions;  // [T]
  std::vector<AttnRow> rows;
  AttnPlan attention;
  std::vector<std::int32_t> logit_tokens;  // [R]
  std::vector<SlotId> logit_slots;         // [R]
  std::vector<SampleRow> sampling;         // [R] or none
  StepOutput output;

  // Copies the rows and what they borrow.
  void keep_sampling(std::span<const SampleRow> from);

 private:
  std::vector<std::pair<std::int32_t, float>> biases_;  // of all rows of sampling
  std::vector<std::int32_t> forbidden_;                 // of all rows of sampling
};

inline CpuStep& cpu_step(Step& step) { return static_cast<CpuStep&>(step); }
inline const CpuStep& cpu_step(const Step& step) { return static_cast<const CpuStep&>(step); }

}  // namespace fastllm::cpu

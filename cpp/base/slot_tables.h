// Block tables of all slots as one host array, changed by the diffs of a plan. One thread only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace fastllm {

class SlotTables {
 public:
  SlotTables(int max_slots, int max_blocks_per_slot)
      : width_(static_cast<std::size_t>(max_blocks_per_slot)),
        blocks_(static_cast<std::size_t>(max_slots) * width_, kNullBlock) {}

  void reset(SlotId slot) {
    auto row = mutable_table(slot);
    std::fill(row.begin(), row.end(), kNullBlock);
  }
  void set(const TableSet& t) { mutable_table(t.slot)[static_cast<std::size_t>(t.index)] = t.block; }
  std::span<const BlockId> table(SlotId slot) const { return {blocks_.data() + index(slot) * width_, width_}; }

 private:
  std::span<BlockId> mutable_table(SlotId slot) { return {blocks_.data() + index(slot) * width_, width_}; }

  std::size_t width_;            // blocks
  std::vector<BlockId> blocks_;  // [max_slots, width_]
};

}  // namespace fastllm

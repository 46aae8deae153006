// Strong integer ids. An id of one kind cannot be passed for another; index() is the only way to a number.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastllm/types.h"

namespace fastllm {

enum class BlockId : std::int32_t {};  // a KV block; block 0 is reserved: padding rows write there
enum class SlotId : std::int32_t {};   // a resident row of the device state

inline constexpr BlockId kNoBlock{-1};
inline constexpr BlockId kNullBlock{0};
inline constexpr SlotId kNoSlot{-1};

// table[slot][index] = block. Appends, and replaces after a copy on write.
struct TableSet {
  SlotId slot = kNoSlot;
  std::int32_t index = 0;  // of the block within the sequence
  BlockId block = kNoBlock;
};

constexpr std::size_t index(BlockId id) { return static_cast<std::size_t>(id); }
constexpr std::size_t index(SlotId id) { return static_cast<std::size_t>(id); }

}  // namespace fastllm

// Reference counts and free lists of one pool of KV blocks. Every operation is O(1); the links live in one array.
//
//   blank list   holds nothing matchable. The most recently freed block is handed out first, so its memory is warm and
//                blocks that were never used stay untouched as long as possible.
//   cached list  unreferenced but matchable. Evicted least recently released first, only when no blank block is left,
//                or when the only blank ones were never used and `resident` blocks are in use already: idle cache
//                then makes room before memory that was never touched is.
//
// Engine thread only. Knows no tokens: the caller says whether a released block is matchable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "base/ids.h"

namespace fastllm {

class BlockAllocator {
 public:
  // Blocks [0, num_reserved) are never handed out. resident: blocks; at num_blocks and above it changes nothing.
  BlockAllocator(std::int64_t num_blocks, std::int64_t num_reserved,
                 std::int64_t resident = std::numeric_limits<std::int64_t>::max());

  // A block with one reference, or kNoBlock. It may come from the cached list: the caller forgets what it held.
  BlockId alloc();
  // Takes a referenced block once more, or a cached one off its list.
  void ref(BlockId block);
  // The last reference puts the block on one of the two lists.
  void unref(BlockId block, bool matchable);
  // Moves an unreferenced cached block to the blank list.
  void make_blank(BlockId block);

  int ref_count(BlockId block) const { return nodes_[index(block)].refs; }
  bool is_cached(BlockId block) const { return nodes_[index(block)].list == List::Cached; }
  std::int64_t num_blocks() const { return static_cast<std::int64_t>(nodes_.size()) - kNumHeads; }
  std::int64_t num_usable() const { return num_blocks() - num_reserved_; }
  std::int64_t num_free() const { return num_blank_ + num_cached_; }
  std::int64_t num_cached() const { return num_cached_; }
  std::int64_t num_used() const { return num_usable() - num_free(); }
  std::int64_t num_reserved() const { return num_reserved_; }
  // The largest num_used() since the start or the last restart_peak().
  std::int64_t peak_used() const { return peak_used_; }
  void restart_peak() { peak_used_ = num_used(); }

 private:
  enum class List : std::uint8_t { None, Blank, Cached };
  struct Node {
    std::int32_t prev = 0, next = 0;
    std::int32_t refs = 0;
    List list = List::None;
  };
  static constexpr std::int64_t kNumHeads = 2;  // circular sentinels after the blocks

  std::size_t head(List list) const { return nodes_.size() - (list == List::Blank ? 1 : 2); }
  void insert_before(std::size_t where, std::size_t node, List list);
  void unlink(std::size_t node);

  std::vector<Node> nodes_;
  std::int64_t num_reserved_;
  std::int64_t resident_;
  std::size_t next_unused_;  // blocks from here on were never handed out
  std::int64_t num_blank_ = 0, num_cached_ = 0;
  std::int64_t peak_used_ = 0;
};

}  // namespace fastllm

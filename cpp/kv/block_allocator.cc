#include "kv/block_allocator.h"

#include <algorithm>
#include <cassert>
#include <limits>
#include <string>

#include "fastllm/error.h"

namespace fastllm {

BlockAllocator::BlockAllocator(std::int64_t num_blocks, std::int64_t num_reserved, std::int64_t resident)
    : num_reserved_(num_reserved), resident_(resident), next_unused_(static_cast<std::size_t>(num_reserved)) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max() - kNumHeads;
  if (num_blocks < num_reserved || num_blocks > kMax) {
    throw InvalidArgument("num_blocks is " + std::to_string(num_blocks) + ", but a pool has between " +
                          std::to_string(num_reserved) + " and " + std::to_string(kMax) + " blocks.");
  }
  nodes_.resize(static_cast<std::size_t>(num_blocks + kNumHeads));
  for (List list : {List::Blank, List::Cached}) {
    const auto h = static_cast<std::int32_t>(head(list));
    nodes_[head(list)].prev = nodes_[head(list)].next = h;
  }
  for (std::int64_t i = num_reserved; i < num_blocks; ++i) {
    insert_before(head(List::Blank), static_cast<std::size_t>(i), List::Blank);
  }
}

BlockId BlockAllocator::alloc() {
  if (num_free() == 0) return kNoBlock;
  // Blocks are first handed out in ascending order, so one glance tells a used blank block from a new one.
  List list = num_blank_ > 0 ? List::Blank : List::Cached;
  if (num_cached_ > 0 && list == List::Blank && static_cast<std::size_t>(nodes_[head(list)].next) == next_unused_ &&
      static_cast<std::int64_t>(next_unused_) - num_reserved_ >= resident_) {
    list = List::Cached;
  }
  const auto node = static_cast<std::size_t>(nodes_[head(list)].next);
  next_unused_ = std::max(next_unused_, node + 1);
  unlink(node);
  nodes_[node].refs = 1;
  peak_used_ = std::max(peak_used_, num_used());
  return BlockId{static_cast<std::int32_t>(node)};
}

void BlockAllocator::ref(BlockId block) {
  const std::size_t node = index(block);
  if (nodes_[node].refs == 0) {
    assert(nodes_[node].list == List::Cached);
    unlink(node);
    peak_used_ = std::max(peak_used_, num_used());
  }
  ++nodes_[node].refs;
}

void BlockAllocator::unref(BlockId block, bool matchable) {
  const std::size_t node = index(block);
  assert(nodes_[node].refs > 0);
  if (--nodes_[node].refs > 0) return;
  if (matchable) {
    insert_before(head(List::Cached), node, List::Cached);
  } else {
    insert_before(static_cast<std::size_t>(nodes_[head(List::Blank)].next), node, List::Blank);
  }
}

void BlockAllocator::make_blank(BlockId block) {
  const std::size_t node = index(block);
  assert(nodes_[node].list == List::Cached);
  unlink(node);
  insert_before(static_cast<std::size_t>(nodes_[head(List::Blank)].next), node, List::Blank);
}

void BlockAllocator::insert_before(std::size_t where, std::size_t node, List list) {
  Node& n = nodes_[node];
  n.next = static_cast<std::int32_t>(where);
  n.prev = nodes_[where].prev;
  nodes_[static_cast<std::size_t>(n.prev)].next = static_cast<std::int32_t>(node);
  nodes_[where].prev = static_cast<std::int32_t>(node);
  n.list = list;
  ++(list == List::Blank ? num_blank_ : num_cached_);
}

void BlockAllocator::unlink(std::size_t node) {
  Node& n = nodes_[node];
  nodes_[static_cast<std::size_t>(n.prev)].next = n.next;
  nodes_[static_cast<std::size_t>(n.next)].prev = n.prev;
  --(n.list == List::Blank ? num_blank_ : num_cached_);
  n.list = List::None;
}

}  // namespace fastllm

#include "kv/kv_manager.h"

#include <algorithm>
#include <cassert>

namespace fastllm {

KvManager::KvManager(const KvConfig& config)
    : block_size_(config.block_size),
      caching_(config.prefix_caching),
      device_(config.device_blocks, 1, config.resident_blocks),
      host_(config.host_blocks, 0),
      cache_(config.device_blocks, config.block_size, config.hash) {}

BlockId KvManager::alloc() {
  const BlockId block = device_.alloc();
  if (block != kNoBlock) cache_.forget(block);
  return block;
}

int KvManager::match_prefix(BlockTable& table, std::span<const TokenId> tokens) {
  assert(table.blocks.empty());
  table.tail = table.root;
  table.num_published = 0;
  if (!caching_ || tokens.empty()) return 0;
  const auto size = static_cast<std::size_t>(block_size_);
  const std::size_t matchable = (tokens.size() - 1) / size;
  for (std::size_t i = 0; i < matchable; ++i) {
    const auto node = cache_.find(table.tail, tokens.subspan(i * size, size));
    if (node.id == kNoPrefixNode) break;
    device_.ref(node.block);
    table.blocks.push_back(node.block);
    table.tail = node.id;
    ++table.num_published;
  }
  return table.num_published * block_size_;
}

std::int64_t KvManager::blocks_needed(const BlockTable& table, std::int64_t first_pos, std::int64_t num_tokens) const {
  const auto have = static_cast<std::int64_t>(table.blocks.size());
  const auto first = static_cast<std::size_t>(first_pos / block_size_);
  const bool copy = first < table.blocks.size() && device_.ref_count(table.blocks[first]) > 1;
  return std::max<std::int64_t>(0, num_blocks_for(first_pos + num_tokens) - have) + (copy ? 1 : 0);
}

bool KvManager::reserve(BlockTable& table, SlotId slot, std::int64_t first_pos, std::int64_t num_tokens,
                        StepPlan& plan) {
  if (blocks_needed(table, first_pos, num_tokens) > num_free()) return false;
  const auto first = static_cast<std::size_t>(first_pos / block_size_);
  if (first < table.blocks.size() && device_.ref_count(table.blocks[first]) > 1) {
    const BlockId copy = alloc();
    plan.copies.push_back({table.blocks[first], copy});
    plan.table_sets.push_back({slot, static_cast<std::int32_t>(first), copy});
    unref(table.blocks[first]);
    table.blocks[first] = copy;
  }
  const auto target = static_cast<std::size_t>(num_blocks_for(first_pos + num_tokens));
  while (table.blocks.size() < target) {
    const BlockId block = alloc();
    plan.table_sets.push_back({slot, static_cast<std::int32_t>(table.blocks.size()), block});
    table.blocks.push_back(block);
  }
  return true;
}

void KvManager::emit_table(const BlockTable& table, SlotId slot, StepPlan& plan, std::size_t first) const {
  for (std::size_t i = first; i < table.blocks.size(); ++i) {
    plan.table_sets.push_back({slot, static_cast<std::int32_t>(i), table.blocks[i]});
  }
}

void KvManager::publish(BlockTable& table, std::span<const TokenId> tokens, std::int64_t num_computed) {
  if (!caching_) return;
  const auto size = static_cast<std::size_t>(block_size_);
  const std::size_t full = std::min(tokens.size(), static_cast<std::size_t>(num_computed)) / size;
  for (auto i = static_cast<std::size_t>(table.num_published); i < full; ++i) {
    table.tail = cache_.publish(table.tail, tokens.subspan(i * size, size), table.blocks[i]);
    ++table.num_published;
  }
}

void KvManager::forget_prefix(PrefixNodeId root, std::span<const TokenId> tokens) {
  if (!caching_) return;
  const auto size = static_cast<std::size_t>(block_size_);
  PrefixNodeId parent = root;
  for (; tokens.size() >= size; tokens = tokens.subspan(size)) {
    const auto [id, block] = cache_.find(parent, tokens.first(size));
    if (id == kNoPrefixNode) return;
    cache_.forget(block);
    if (device_.is_cached(block)) device_.make_blank(block);
    parent = id;
  }
}

// The new table walks the published chain again when it first publishes: the nodes of `from` may be another sequence's.
void KvManager::fork(const BlockTable& from, BlockTable& to, std::int64_t num_tokens) {
  assert(to.blocks.empty());
  const auto shared = static_cast<std::ptrdiff_t>(num_blocks_for(num_tokens));
  to.blocks.assign(from.blocks.begin(), from.blocks.begin() + shared);
  to.root = to.tail = from.root;
  to.num_published = 0;
  for (BlockId block : to.blocks) device_.ref(block);
}

// What was published of `from` are the same tokens, so the chain goes on from there. Common blocks keep their counts.
std::int32_t KvManager::share(const BlockTable& from, BlockTable& to) {
  const auto [mine, theirs] = std::ranges::mismatch(to.blocks, from.blocks);
  const auto first = mine - to.blocks.begin();
  for (auto it = theirs; it != from.blocks.end(); ++it) device_.ref(*it);
  while (std::ssize(to.blocks) > first) {
    unref(to.blocks.back());
    to.blocks.pop_back();
  }
  to.blocks.insert(to.blocks.end(), theirs, from.blocks.end());
  to.root = from.root;
  to.tail = from.tail;
  to.num_published = from.num_published;
  return static_cast<std::int32_t>(first);
}

void KvManager::release(BlockTable& table) {
  for (auto it = table.blocks.rbegin(); it != table.blocks.rend(); ++it) unref(*it);
  for (auto it = table.host_blocks.rbegin(); it != table.host_blocks.rend(); ++it) host_.unref(*it, false);
  table.blocks.clear();
  table.host_blocks.clear();
  table.tail = table.root;
  table.num_published = 0;
}

bool KvManager::swap_out(BlockTable& table, std::vector<BlockCopy>& copies) {
  if (static_cast<std::int64_t>(table.blocks.size()) > num_host_free()) return false;
  for (BlockId block : table.blocks) {
    const BlockId host = host_.alloc();
    table.host_blocks.push_back(host);
    copies.push_back({block, host});
  }
  for (auto it = table.blocks.rbegin(); it != table.blocks.rend(); ++it) unref(*it);
  table.blocks.clear();
  return true;
}

bool KvManager::swap_in(BlockTable& table, std::vector<BlockCopy>& copies) {
  if (static_cast<std::int64_t>(table.host_blocks.size()) > num_free()) return false;
  for (BlockId host : table.host_blocks) {
    const BlockId block = alloc();
    table.blocks.push_back(block);
    copies.push_back({host, block});
  }
  for (auto it = table.host_blocks.rbegin(); it != table.host_blocks.rend(); ++it) host_.unref(*it, false);
  table.host_blocks.clear();
  return true;
}

void KvManager::reset_cache() {
  for (std::int64_t i = device_.num_reserved(); i < device_.num_blocks(); ++i) {
    const BlockId block{static_cast<std::int32_t>(i)};
    if (!device_.is_cached(block)) continue;
    cache_.forget(block);
    device_.make_blank(block);
  }
  device_.restart_peak();
}

KvSnapshot KvManager::snapshot() const {
  return {device_.num_usable(), device_.num_used(), device_.num_cached(),
          host_.num_usable(),   host_.num_used(),   device_.peak_used()};
}

}  // namespace fastllm

// Which blocks hold which positions of which sequence: allocation, sharing, copy on write, swapping. Pure host code
// that decides; the device follows through the lists of the plan.
//
//   position   0       B      2B      3B
//              | full  | full  | part  |          B = block_size; blocks[i] holds [i B, (i+1) B)
//   published  |-------------->|                  findable by others through the prefix cache
//   computed   |-------------------->|            covered by submitted steps
//
// Sharing comes from a prefix match (whole blocks, never written again) and from fork (up to the block of the prompt's
// last position, which the first writer copies). Blocks that were released may be reused in the next plan although a
// step in flight still reads them: one stream runs the plans in order.
//
// Engine thread only.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"
#include "kv/block_allocator.h"
#include "kv/prefix_cache.h"
#include "sched/step_plan.h"

namespace fastllm {

// The KV of one sequence. Kept by the sequence, changed by the KvManager.
struct BlockTable {
  std::vector<BlockId> blocks;       // device blocks; empty while swapped out
  std::vector<BlockId> host_blocks;  // host blocks; empty unless swapped out
  PrefixNodeId root = kNoPrefixNode;
  PrefixNodeId tail = kNoPrefixNode;  // node of the last published block; root if there is none
  std::int32_t num_published = 0;     // leading blocks
};

struct KvSnapshot {
  std::int64_t total = 0;   // usable blocks
  std::int64_t used = 0;    // referenced
  std::int64_t cached = 0;  // unreferenced but matchable
  std::int64_t host_total = 0, host_used = 0;
  std::int64_t peak_used = 0;  // since the start or the last reset_cache()
};

struct KvConfig {
  std::int64_t device_blocks = 0;  // the reserved block 0 included
  std::int64_t host_blocks = 0;
  int block_size = 16;  // tokens
  bool prefix_caching = true;
  PrefixHash hash = hash_prefix;
  std::int64_t resident_blocks = std::numeric_limits<std::int64_t>::max();  // see BlockAllocator
};

class KvManager {
 public:
  explicit KvManager(const KvConfig& config);

  PrefixNodeId root(const std::string& salt, int adapter) { return cache_.root(salt, adapter); }

  // Fills an empty table with the longest cached beginning of `tokens` and returns its length in tokens, which is less
  // than tokens.size(): at least one token is left to compute.
  int match_prefix(BlockTable& table, std::span<const TokenId> tokens);

  // Blocks that reserve() would take for positions [first_pos, first_pos + num_tokens).
  std::int64_t blocks_needed(const BlockTable& table, std::int64_t first_pos, std::int64_t num_tokens) const;
  // Makes these positions writable, or changes nothing and returns false. A shared block that holds first_pos is
  // copied; later ones are private already.
  bool reserve(BlockTable& table, SlotId slot, std::int64_t first_pos, std::int64_t num_tokens, StepPlan& plan);
  // Tells a slot about the blocks of the table from index `first` on.
  void emit_table(const BlockTable& table, SlotId slot, StepPlan& plan, std::size_t first = 0) const;

  // Publishes the full blocks among positions [0, min(num_computed, tokens.size())).
  void publish(BlockTable& table, std::span<const TokenId> tokens, std::int64_t num_computed);
  // Makes the longest cached beginning of `tokens` unfindable; sequences that have its blocks keep them.
  void forget_prefix(PrefixNodeId root, std::span<const TokenId> tokens);
  // Makes an empty table share the blocks that cover positions [0, num_tokens) of `from`.
  void fork(const BlockTable& from, BlockTable& to, std::int64_t num_tokens);
  // Makes `to` share every block of `from`, in place of its own, and returns the first index where they differed.
  std::int32_t share(const BlockTable& from, BlockTable& to);
  // Gives back device and host blocks, last first, so that cached chains are evicted from their ends.
  void release(BlockTable& table);

  // Moves the table's blocks to the host, or back; false and nothing changed if the other side has no room.
  bool swap_out(BlockTable& table, std::vector<BlockCopy>& copies);
  bool swap_in(BlockTable& table, std::vector<BlockCopy>& copies);

  // Forgets every block that no sequence references, and the peak of used blocks.
  void reset_cache();

  KvSnapshot snapshot() const;
  std::int64_t num_free() const { return device_.num_free(); }
  std::int64_t num_host_free() const { return host_.num_free(); }
  std::int64_t num_blocks_for(std::int64_t num_tokens) const { return (num_tokens + block_size_ - 1) / block_size_; }
  int block_size() const { return block_size_; }
  bool caching() const { return caching_; }
  const BlockAllocator& device() const { return device_; }
  const BlockAllocator& host() const { return host_; }
  const PrefixCache& cache() const { return cache_; }

 private:
  BlockId alloc();
  void unref(BlockId block) { device_.unref(block, cache_.holds(block)); }

  int block_size_;
  bool caching_;
  BlockAllocator device_, host_;
  PrefixCache cache_;
};

}  // namespace fastllm

// Finds blocks whose KV belongs to the same beginning: a verified hash chain.
//
//   root(salt, adapter) <- node{root, tokens 0..B-1} <- node{that id, tokens B..2B-1} <- ...
//
// A node is {parent id, the block's tokens, block}. A hit needs the same parent id and equal tokens, and ids are never
// used twice, so by induction a matched node has exactly this prefix: a hash collision costs a comparison, never wrong
// KV. Forgetting a parent leaves its children unreachable until they are evicted, which costs reuse only.
//
// Engine thread only. Holds no references: the KvManager forgets a node before its block is handed out again.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/ids.h"

namespace fastllm {

enum class PrefixNodeId : std::uint64_t {};
inline constexpr PrefixNodeId kNoPrefixNode{0};

using PrefixHash = std::uint64_t (*)(PrefixNodeId parent, std::span<const TokenId> tokens);
std::uint64_t hash_prefix(PrefixNodeId parent, std::span<const TokenId> tokens);

class PrefixCache {
 public:
  PrefixCache(std::int64_t num_blocks, int block_size, PrefixHash hash = hash_prefix);

  // Requests share prefixes only below the same root. Roots of old salts may be forgotten, which costs reuse only.
  PrefixNodeId root(const std::string& salt, int adapter);

  struct Node {
    PrefixNodeId id = kNoPrefixNode;
    BlockId block = kNoBlock;
  };
  // The node below `parent` with these block_size tokens; id is kNoPrefixNode if there is none.
  Node find(PrefixNodeId parent, std::span<const TokenId> tokens) const;

  // Makes `block` findable and returns its node's id. An existing node wins: then that node's id is returned and
  // `block` stays private. A block has one node, so publishing it below another parent moves it.
  PrefixNodeId publish(PrefixNodeId parent, std::span<const TokenId> tokens, BlockId block);
  // No effect on a block without a node.
  void forget(BlockId block);

  bool holds(BlockId block) const { return entries_[index(block)].id != kNoPrefixNode; }
  // The tokens of a held block.
  std::span<const TokenId> tokens(BlockId block) const;
  std::int64_t num_nodes() const { return num_nodes_; }

 private:
  struct Entry {
    PrefixNodeId id = kNoPrefixNode, parent = kNoPrefixNode;
    std::uint64_t hash = 0;
    BlockId next = kNoBlock;  // in the same bucket
  };
  BlockId& bucket(std::uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
  Node find(PrefixNodeId parent, std::span<const TokenId> tokens, std::uint64_t hash) const;

  std::size_t block_size_;  // tokens
  PrefixHash hash_;
  std::vector<Entry> entries_;    // [num_blocks]
  std::vector<TokenId> tokens_;   // [num_blocks, block_size]
  std::vector<BlockId> buckets_;  // first entry; a power of two of them
  std::map<std::pair<std::string, int>, PrefixNodeId> roots_;
  std::uint64_t next_id_ = 1;
  std::int64_t num_nodes_ = 0;
};

}  // namespace fastllm

// How the KV positions of decode rows are cut into work. Pure arithmetic, shared by the plan (host), the kernel and its
// launcher.
//
//   work, in order:   row 0: kv head 0: tile 0 1 2 ... | kv head 1: tile 0 1 2 ... | ... || row 1: ...
//   thread blocks:   [ block 0          )[ block 1          )[ block 2          ) ...      equal runs of tiles
//
// A run may end inside a (row, head): that is then cut into parts, whose results the block that finishes last merges.
// Short ones stay whole where blocks have little to do, in the block that has their first tile: joining parts takes
// longer than computing them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fastllm::cuda::decode {

inline constexpr int kTile = 64;             // positions
inline constexpr int kMaxBlocksPerSm = 5;    // of any decode kernel, see blocks_per_sm()
inline constexpr int kMaxHeadsPerItem = 32;  // query heads that one block computes at once
inline constexpr int kMaxDirectParts = 32;   // parts merged by one block; more are merged in runs first
inline constexpr int kPartsPerRun = 16;

// Thread blocks resident on one multiprocessor, as their registers allow.
constexpr int blocks_per_sm(int head_dim, bool fp8) {
  if (head_dim <= 64) return fp8 ? 5 : 4;
  return head_dim <= 128 ? (fp8 ? 4 : 3) : 2;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles before a row's window, and from there to its end. window 0: none. length 0: a padding row.
constexpr int first_tile(int length, int window) {
  return window > 0 && length > window ? (length - window) / kTile : 0;
}
constexpr int row_tiles(int length, int window) { return ceil_div(length, kTile) - first_tile(length, window); }

// Length of a run: all blocks equally, but no runs of one tile as long as longer ones still fill every multiprocessor.
constexpr int tiles_per_block(int tiles, int blocks, int num_sms) {
  return std::max(ceil_div(tiles, blocks), std::min(2, ceil_div(tiles, num_sms)));
}

// Whether a (row, head) of that many tiles is never cut.
constexpr bool stays_whole(int tiles, int tiles_per_block) {
  return tiles <= 4 && tiles <= tiles_per_block && tiles_per_block <= 8;
}

// The plan: for no window, then for limits.window if there is one, how many tiles the rows before row r have, per kv
// head, r = 0 .. max_rows.
constexpr std::size_t prefix_stride(int max_rows) {  // int32
  return (static_cast<std::size_t>(max_rows) + 1 + 3) / 4 * 4;
}

// Arrival counters at the start of the workspace: three per block.
constexpr std::size_t counters(int num_sms) { return static_cast<std::size_t>(num_sms) * kMaxBlocksPerSm * 3; }

// Query heads of a kv head are computed in passes of equal size.
struct HeadSplit {
  int passes = 1;  // per kv head
  int heads = 1;   // per pass; the last one may have fewer
};
constexpr HeadSplit split_heads(int group) {
  const int passes = ceil_div(group, kMaxHeadsPerItem);
  return {passes, ceil_div(group, passes)};
}

}  // namespace fastllm::cuda::decode

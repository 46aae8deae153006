// From a thread block's index to the work it has: see decode_split.h for how the work is cut.
#pragma once

#include <climits>

#include "attention/attention.h"
#include "attention/decode_split.h"

namespace fastllm::cuda::decode {

struct Params {
  const std::byte* q = nullptr;
  std::int64_t q_row_bytes = 0;
  std::uint16_t* out = nullptr;  // bf16 bits
  const std::byte* keys = nullptr;
  std::int32_t block_bytes = 0, value_bytes = 0, head_bytes = 0;  // of a block; from keys to values; of a kv head
  int block_shift = 0;                                            // log2 of positions per block
  const BlockId* tables = nullptr;
  int table_width = 0;
  const DeviceRow* rows = nullptr;
  const std::int32_t* prefix = nullptr;  // of the plan
  int num_rows = 0;
  int heads = 0, group = 0;  // query heads; per kv head
  HeadSplit split;
  int items_per_row = 0;            // kv heads x passes
  int warps_across = 1;             // warps that share positions, 8 heads each: 1, 2 or 4
  int window = 0, plan_window = 0;  // plan_window: window or 0
  float score_scale = 0;            // to base-2 logarithms; with softcap: to the exponent of its tanh
  float softcap_log2 = 0;           // 0: off
  const float* alibi_slopes = nullptr;
  int num_sms = 0;
  std::int32_t* counters = nullptr;
  float* partial_out = nullptr;    // [slots, split.heads, head_dim]
  float2* partial_sums = nullptr;  // [2, slots, split.heads] greatest score and sum of weights; [1]: of merged runs
  std::int64_t num_slots = 0;
};

// Tiles [tile_begin, tile_end) of one row and item: part `part` of `parts`.
struct Work {
  DeviceRow row;
  int item, tile_begin, tile_end, part, parts;
  int id;  // the block that has the item's first part

  // Where part i's result goes. A block ends at most one item that began before it, and begins at most one that ends
  // after it.
  __device__ int slot(int i) const { return i == 0 ? 2 * id + 1 : 2 * (id + i); }
  // Where the parts of a run arrive, by its first part, and where runs arrive.
  __device__ int run_counter(int first) const { return first == 0 ? 3 * id + 1 : 3 * (id + first); }
  __device__ int final_counter() const { return 3 * id + 2; }
};

// Walks over the work of one thread block; every warp on its own, with the same result.
class WorkList {
 public:
  __device__ explicit WorkList(const Params& p) {
    const int total = load_volatile(p.prefix + p.num_rows) * p.items_per_row;
    per_block_ = tiles_per_block(total, static_cast<int>(gridDim.x), p.num_sms);
    next_ = static_cast<int>(blockIdx.x) * per_block_;
    end_ = min(next_ + per_block_, total);
  }

  // `last`: what the call before found, except in the first one.
  __device__ bool next(const Params& p, const Work& last, Work& w) {
    const bool started = next_ != static_cast<int>(blockIdx.x) * per_block_;
    bool same_row = started && last.item + 1 < p.items_per_row;
    if (same_row) w.row = last.row, w.item = last.item;
    int tiles;
    while (true) {
      if (!same_row) {
        if (!search(p, w)) return false;
      } else if (next_ < end_) {
        ++w.item;
        w.tile_begin = 0;
      } else {
        return false;
      }
      tiles = row_tiles(w.row.first_pos + 1, p.plan_window);
      if (w.tile_begin == 0 || !stays_whole(tiles, per_block_)) break;
      next_ += tiles - w.tile_begin;  // the rest of an item of a block before
      same_row = w.item + 1 < p.items_per_row;
    }
    const bool whole = stays_whole(tiles, per_block_);
    w.tile_end = whole ? tiles : min(tiles, w.tile_begin + end_ - next_);
    const int item_begin = next_ - w.tile_begin;
    w.id = item_begin / per_block_;
    w.parts = whole ? 1 : (item_begin + tiles - 1) / per_block_ - w.id + 1;
    w.part = static_cast<int>(blockIdx.x) - w.id;
    next_ += w.tile_end - w.tile_begin;
    return true;
  }

 private:
  int per_block_, next_, end_;

  struct Rows {  // one per lane
    int before;  // tiles of the rows before it
    DeviceRow row;
  };
  // Volatile: not moved behind the branches that decide whether they are needed.
  static __device__ __forceinline__ int load_volatile(const std::int32_t* p) {
    int v;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
  }
  // Of rows [begin, begin + n) all, or the tiles before 32 of them, evenly apart.
  static __device__ Rows load_rows(const Params& p, int begin, int n) {
    const int i = static_cast<int>(threadIdx.x) % 32 * ceil_div(n, 32);
    Rows r{INT_MAX, {}};
    if (i < n) {
      r.before = load_volatile(p.prefix + begin + i);
      if (n <= 32) {
        asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r.row.token_begin), "=r"(r.row.num_tokens), "=r"(r.row.first_pos), "=r"(r.row.slot)
                     : "l"(p.rows + begin + i));
      }
    }
    return r;
  }

  // The row, item and tile that next_ is; false if that is beyond the block's end.
  __device__ bool search(const Params& p, Work& w) const {
    // Before anything is known of the work: at small batches this kernel is a chain of latencies.
    const Rows rows = load_rows(p, 0, p.num_rows);
    if (next_ >= end_) return false;
    const int before = find_row(p, next_ / p.items_per_row, rows, w.row) * p.items_per_row;
    const int tiles = row_tiles(w.row.first_pos + 1, p.plan_window);
    w.item = (next_ - before) / tiles;
    w.tile_begin = (next_ - before) % tiles;
    return true;
  }

  // The row that holds tile `tile` of kv head 0; returns the tiles before it. 32-ary search.
  static __device__ int find_row(const Params& p, int tile, Rows rows, DeviceRow& row) {
    int begin = 0, n = p.num_rows;
    const auto last = [&] { return __popc(__ballot_sync(0xffffffffu, rows.before <= tile)) - 1; };
    while (n > 32) {
      const int step = ceil_div(n, 32), skip = last() * step;
      begin += skip;
      n = min(step, n - skip);
      rows = load_rows(p, begin, n);
    }
    const int from = last();
    row.token_begin = __shfl_sync(0xffffffffu, rows.row.token_begin, from);
    row.num_tokens = 1;
    row.first_pos = __shfl_sync(0xffffffffu, rows.row.first_pos, from);
    row.slot = __shfl_sync(0xffffffffu, rows.row.slot, from);
    return __shfl_sync(0xffffffffu, rows.before, from);
  }
};

}  // namespace fastllm::cuda::decode

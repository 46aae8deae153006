// Where the tiles of an attention task lie in the cache, and the asking for them ahead of use: blocks lie anywhere, so
// that the machine cannot guess what comes next.
#pragma once

#include "backend/cpu/kernels/attention.h"

namespace fastllm::cpu {
namespace {

// Where the keys of a tile's positions lie.
template <class T>
struct TileRows {
  int64_t begin, valid;
  const T* keys[kKvTile];  // those from `valid` on may be read, no more
};

// Asks for the keys and values of one tile, row by row.
template <class T>
struct Ask {
  const T* const* keys;
  const T* const* values;  // keys of theirs
  int64_t kv_stride, row_bytes;

  void operator()(int64_t j) const {
    const auto* k = reinterpret_cast<const char*>(keys[j]);
    const auto* v = reinterpret_cast<const char*>(values[j] + kv_stride);
    for (int64_t i = 0; i < row_bytes; i += 128) {  // two lines a turn, of 64 bytes
      __builtin_prefetch(v + i, 0, 2);
      __builtin_prefetch(k + i, 0, 2);
      if (i + 64 >= row_bytes) break;
      __builtin_prefetch(v + i + 64, 0, 2);
      __builtin_prefetch(k + i + 64, 0, 2);
    }
  }
};

// The tiles of a task, and after them those of the task that follows. Blocks lie anywhere, so the machine cannot guess
// what comes next: for every row that is worked on, the values of its successor in the next tile are asked for, and the
// keys in the tile after that, which are needed as early.
template <class T>
class TileReader {
 public:
  explicit TileReader(const AttnTask& t) : t_(t), row_bytes_(t.head_dim * static_cast<int64_t>(sizeof(T))) {
    find(t.tile_begin);
    find(t.tile_begin + 1);
  }
  int64_t row_bytes() const { return row_bytes_; }

  // From here on `tile` is worked on, and at() knows it and the next.
  void begin(int64_t tile) {
    now_ = tile;
    find(tile + 2);
  }
  const TileRows<T>& at(int64_t tile) const { return tiles_[tile % 4]; }
  Ask<T> successors() const { return {at(now_ + 2).keys, at(now_ + 1).keys, t_.kv_stride, row_bytes_}; }

 private:
  void find(int64_t tile) {
    TileRows<T>& rows = tiles_[tile % 4];
    const bool own = tile < t_.tile_end || !t_.then;
    const AttnTask& t = own ? t_ : *t_.then;
    const int64_t at = own ? tile : tile - t_.tile_end + t.tile_begin;
    const int64_t left = at < t.tile_end ? t.first_pos + t.tokens - at * kKvTile : 0;
    rows.begin = at * kKvTile;
    rows.valid = left < kKvTile ? left : kKvTile;
    find_keys(t, rows.begin, rows.valid, rows.keys);
    const T* other = rows.valid > 0 ? rows.keys[0] : tiles_[(tile - 1) % 4].keys[0];
    for (int64_t j = rows.valid; j < kKvTile; ++j) rows.keys[j] = other;
    if constexpr (__is_same(T, Code)) {
      for (int64_t j = 0; j < rows.valid; j += t.block_size) {
        const T* scales = key_scales(t, (rows.begin + j) / t.block_size);
        __builtin_prefetch(scales);
        __builtin_prefetch(scales + t.kv_stride);
      }
    }
  }

  const AttnTask& t_;
  int64_t row_bytes_, now_ = 0;
  TileRows<T> tiles_[4];  // a ring
};

}  // namespace
}  // namespace fastllm::cpu

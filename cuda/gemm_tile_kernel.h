// What the host half of the tiled product tells its kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastllm::cuda {

inline constexpr int kTileRows = 128;  // of x, in the tile of one block
inline constexpr int kTileDepth = 64;  // of k, in one step: 128 bytes
inline constexpr int kTileNotGated = -1;

struct TileParams {
  CUtensorMap x, w;  // boxes of kTileDepth columns: see share_x
  void* out = nullptr;
  const float* bias = nullptr;  // [n] or null
  std::int64_t ldo = 0;
  int m = 0, cols = 0;                          // of out
  int steps = 0;                                // of kTileDepth that cover k
  int row_items = 0, col_items = 0, items = 0;  // an item is what a cluster computes: two tiles
  // The two tiles of an item are neighbours: in a row, with the same rows of x, or else in a column, with the same rows
  // of w. Each block loads half of what they share for both. Boxes: kTileRows rows of x, half of them when they are
  // shared; half a tile's rows of w.
  bool share_x = false;
  int col_step = 0;           // columns of out between tiles
  int second_half = 0;        // rows of w between the two halves of a tile
  int gated = kTileNotGated;  // or an Activation: the halves are gate and up
  bool out_f32 = false, accumulate = false;
};

// tile_cols: rows of w in a tile: 128, 192, 224 or 256. clusters: of two blocks.
void launch_tiles(int tile_cols, const TileParams& params, int clusters, cudaStream_t stream);
// Once per device, before the first launch: the clusters that run at once.
int prepare_tiles(int tile_cols);

}  // namespace fastllm::cuda

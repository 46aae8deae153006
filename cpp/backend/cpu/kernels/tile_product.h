// Blocks of rows times slabs of a panel of bf16 on AMX tiles.
//
// Two tiles of rows (32 rows) by two of weights (32 columns) make four sums in tiles 0-3: 64 cycles of work for 4 KB of
// loads, more than the second-level cache gives in that time. So a panel of weights is taken in slabs that stay in the
// first level while the row blocks pass; rows come from the second level without a stay in the first, and sums wait in
// memory between slabs. Rows too long for the second level are cut once more, in stretches of slabs.
//
// An element's products are added in ascending k however the work is cut, so a row's result does not depend on its
// neighbours.
#pragma once

#include "backend/cpu/kernels/gemm.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kStretch = 1280 << 10;  // bytes of rows kept in the second level at most
constexpr int64_t kBlockSums = kRowBlock * kPanel;

// Tiles 0, 1: rows 0-15 by the two halves of the panel; 2, 3: rows 16-31. 4, 5: rows. 6, 7: weights.
inline void configure_rows(int64_t rows) {
  TileConfig c;
  const int64_t low = rows < 16 ? rows : 16, high = rows > 16 ? rows - 16 : 1;
  const int64_t count[8] = {low, low, high, high, low, high, 16, 16};
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<uint8_t>(count[t]);
    c.bytes_per_row[t] = 64;
  }
  configure(c);
}

// A prepared block of up to 32 rows, from some k on: 32 k after 32 k, each as the tile of rows 0-15 and that of the
// other rows.
struct RowTiles {
  const uint16_t* at;
  int64_t step;  // elements to the next 32 k
};
inline RowTiles tiles_of(const uint16_t* block, int64_t rows, int64_t k_block) {
  return {block + k_block * rows * 32, rows * 32};
}

// c: [32, 32] fp32 in 16 x 16 blocks, one for each tile of sums.
template <bool kHigh>
inline void begin_sums(bool start, const float* c) {
  if (start) {
    zero_tile<0>();
    zero_tile<1>();
  } else {
    load_tile<0>(c, 128);
    load_tile<1>(c + 16, 128);
  }
  if constexpr (kHigh) {
    if (start) {
      zero_tile<2>();
      zero_tile<3>();
    } else {
      load_tile<2>(c + 16 * kPanel, 128);
      load_tile<3>(c + 16 * kPanel + 16, 128);
    }
  }
}
template <bool kHigh>
inline void end_sums(float* c) {
  store_tile<0>(c, 128);
  store_tile<1>(c + 16, 128);
  if constexpr (kHigh) {
    store_tile<2>(c + 16 * kPanel, 128);
    store_tile<3>(c + 16 * kPanel + 16, 128);
  }
}

// Adds k_blocks blocks of 32 k to the sums in tiles. kOnce: leaves the rows out of the first-level cache. fetch(b) is
// called for each block.
template <bool kHigh, bool kOnce, class Fetch>
inline void add_blocks(const RowTiles& rows, const uint16_t* w, int64_t k_blocks, const Fetch& fetch) {
  const uint16_t* a = rows.at;
  for (int64_t b = 0; b < k_blocks; ++b, a += rows.step, w += 2 * kTile) {
    fetch(b);
    if constexpr (kOnce) {
      load_tile_once<4>(a, 64);
    } else {
      load_tile<4>(a, 64);
    }
    load_tile<6>(w, 64);
    dot_bf16<0, 4, 6>();
    load_tile<7>(w + kTile, 64);
    if constexpr (kHigh) {
      if constexpr (kOnce) {
        load_tile_once<5>(a + kTile, 64);
      } else {
        load_tile<5>(a + kTile, 64);
      }
    }
    dot_bf16<1, 4, 7>();
    if constexpr (kHigh) {
      dot_bf16<2, 5, 6>();
    }
    if constexpr (kHigh) {
      dot_bf16<3, 5, 7>();
    }
  }
}

// Columns [n, n + 32) of `rows` rows; c: [rows, 32]. Whole panels of the common outputs without a test per vector.
inline void finish_block(const GemmArgs& g, int64_t m, int64_t rows, int64_t n, const float* c) {
  const bool whole = n + kPanel <= g.n && !g.bias;
  for (int64_t r = 0; r < rows; ++r, c += kPanel) {
    const vf left = load(c), right = load(c + kW);
    const int64_t at = (m + r) * g.ldo + n;
    if (whole && g.out_bf16 && !g.accumulate) {
      uint16_t* out = static_cast<uint16_t*>(g.out) + at;
      store(out, left);
      store(out + kW, right);
    } else if (whole && !g.out_bf16) {
      float* out = static_cast<float*>(g.out) + at;
      store(out, g.accumulate ? load(out) + left : left);
      store(out + kW, g.accumulate ? load(out + kW) + right : right);
    } else {
      finish_columns(g, m + r, n, left);
      finish_columns(g, m + r, n + kW, right);
    }
  }
}

// How a product is cut along k.
struct Cut {
  int64_t k_blocks, slab, stretch;  // blocks of 32 k
};
// most: blocks of a slab.
inline Cut cut_of(int64_t row_blocks, int64_t k_blocks, int64_t most) {
  const int64_t slabs = (k_blocks + most - 1) / most, slab = (k_blocks + slabs - 1) / slabs;
  const int64_t fit = kStretch / (row_blocks * slab * 4 * kTile), fitting = fit > 1 ? fit : 1;  // slabs of a stretch
  const int64_t stretches = (slabs + fitting - 1) / fitting;
  return {k_blocks, slab, (slabs + stretches - 1) / stretches * slab};
}
// Floats of the sums that wait for the next slab or stretch.
inline int64_t waiting_sums(int64_t row_blocks, int64_t panels, const Cut& cut) {
  return kBlockSums * row_blocks * (cut.stretch < cut.k_blocks ? panels : 1);
}

}  // namespace
}  // namespace fastllm::cpu

#endif

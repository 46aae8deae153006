// The bf16 product on AMX tiles: y = x w^T, bf16 by bf16 into fp32.
//
//   for m, n: s = 0; for k: s += x[m][k] * w[n][k]
//   y[m][n] = (accumulate ? y[m][n] : 0) + s + (bias ? bias[n] : 0)
//
// Two A tiles (32 rows) by two B tiles (32 columns) make four sums in tiles 0-3: 64 cycles of work for 4 KB of loads,
// more than the second-level cache gives in that time. So a panel of weights is taken in slabs that stay in the first
// level while the row blocks pass; rows come from the second level without a stay in the first, sums wait in memory
// between slabs, and the next slab is fetched evenly over the work on this one, since a core reads memory ten times
// slower than a burst would ask for. Rows too long for the second level are cut once more, in stretches of slabs.
//
// Up to 32 rows weights are used once: no slabs, and the tiles have the rows there are, so one row costs one row. An
// element's products are added in ascending k however the work is cut, so a row's result does not depend on its
// neighbours. Cost: 2 N K bytes while M is small, 2 M N K operations when it is large.
// Benchmark: fastllm_bench_ops --benchmark_filter=Linear
#include "backend/cpu/kernels/gemm.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kSlab = 20;             // k blocks of 32 of a slab at most: 40 of the 48 KB of the first level
constexpr int64_t kStretch = 1280 << 10;  // bytes of rows kept in the second level at most
constexpr int64_t kAhead = 8;             // k blocks of weights fetched ahead of use when they are used once
constexpr int kAlone = 32;                // lines of a k block: all that are used are fetched
constexpr int64_t kBlockSums = kRowBlock * kPanel;

// Tiles 0, 1: rows 0-15 of the two column tiles; 2, 3: rows 16-31. 4, 5: A. 6, 7: B.
void configure_rows(int64_t rows) {
  TileConfig c;
  const auto low = static_cast<uint8_t>(rows < 16 ? rows : 16);
  const auto high = static_cast<uint8_t>(rows > 16 ? rows - 16 : 1);
  const uint8_t count[8] = {low, low, high, high, low, high, 16, 16};
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = count[t];
    c.bytes_per_row[t] = 64;
  }
  configure(c);
}

int64_t prepared_bytes(int64_t k) { return kRowBlock * round_up(k, 32) * 2; }

// A block of 32 rows: [k / 32][2 tiles][16 rows][32 k], so that tiles load from consecutive lines whatever ldx is.
void prepare_bf16(const uint16_t* x, int64_t ldx, int64_t begin, int64_t end, int64_t k, void* prepared) {
  const int64_t blocks = (k + 31) / 32;
  auto* base = static_cast<uint16_t*>(prepared);
  for (int64_t m = begin; m < end; ++m) {
    const int64_t r = m % kRowBlock;
    const uint16_t* row = x + m * ldx;
    uint16_t* to = base + (m / kRowBlock) * kRowBlock * blocks * 32 + (r / 16) * kTile + (r % 16) * 32;
    const int64_t whole = k / 32;
    for (int64_t b = 0; b < whole; ++b) __builtin_memcpy(to + b * 2 * kTile, row + b * 32, 64);
    if (whole < blocks) {
      uint16_t tail[32] = {};
      __builtin_memcpy(tail, row + whole * 32, static_cast<size_t>(k % 32) * 2);
      __builtin_memcpy(to + whole * 2 * kTile, tail, 64);
    }
  }
}

// Adds k_blocks blocks of k to the sums in the tiles. kFetch: lines fetched from `ahead` on per k block.
template <bool kHigh, int kFetch>
inline void add_blocks(const uint16_t* a, const uint16_t* w, int64_t k_blocks, const char* ahead) {
  for (int64_t b = 0; b < k_blocks; ++b, a += 2 * kTile, w += 2 * kTile, ahead += kFetch * 64) {
    for (int i = 0; i < kFetch; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
    if constexpr (kFetch == kAlone) {
      TILE_LOAD(4, a, 64);
    } else {
      TILE_LOAD_ONCE(4, a, 64);
    }
    TILE_LOAD(6, w, 64);
    TILE_LOAD(7, w + kTile, 64);
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    if constexpr (kHigh) {
      if constexpr (kFetch == kAlone) {
        TILE_LOAD(5, a + kTile, 64);
      } else {
        TILE_LOAD_ONCE(5, a + kTile, 64);
      }
      TILE_DOT(2, 5, 6);
      TILE_DOT(3, 5, 7);
    }
  }
}

// Sums in the tiles from c, [32, 32] fp32, or from zero, and back.
template <bool kHigh>
inline void begin_sums(bool start, const float* c) {
  if (start) {
    TILE_ZERO(0);
    TILE_ZERO(1);
  } else {
    TILE_LOAD(0, c, 128);
    TILE_LOAD(1, c + 16, 128);
  }
  if constexpr (kHigh) {
    if (start) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    } else {
      TILE_LOAD(2, c + 16 * kPanel, 128);
      TILE_LOAD(3, c + 16 * kPanel + 16, 128);
    }
  }
}
template <bool kHigh>
inline void end_sums(float* c) {
  TILE_STORE(0, c, 128);
  TILE_STORE(1, c + 16, 128);
  if constexpr (kHigh) {
    TILE_STORE(2, c + 16 * kPanel, 128);
    TILE_STORE(3, c + 16 * kPanel + 16, 128);
  }
}

// Adds k_blocks blocks of k to c or starts it.
template <bool kHigh, int kFetch>
inline void add_slab(const uint16_t* a, const uint16_t* w, int64_t k_blocks, bool start, const char* ahead, float* c) {
  begin_sums<kHigh>(start, c);
  add_blocks<kHigh, kFetch>(a, w, k_blocks, ahead);
  end_sums<kHigh>(c);
}

// Whole panels of the common outputs without a test per vector.
void finish_block(const GemmArgs& g, int64_t m, int64_t rows, int64_t n, const float* c) {
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
Cut cut_of(int64_t row_blocks, int64_t k) {
  const int64_t k_blocks = (k + 31) / 32;
  if (row_blocks == 1) return {k_blocks, k_blocks, k_blocks};
  const int64_t slabs = (k_blocks + kSlab - 1) / kSlab, slab = (k_blocks + slabs - 1) / slabs;
  const int64_t fit = kStretch / (row_blocks * slab * 4 * kTile), most = fit > 1 ? fit : 1;  // slabs of a stretch
  const int64_t stretches = (slabs + most - 1) / most;
  return {k_blocks, slab, (slabs + stretches - 1) / stretches * slab};
}

int64_t gemm_sums(int64_t rows, int64_t panels, int64_t k) {
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  const Cut cut = cut_of(row_blocks, k);
  return kBlockSums * row_blocks * (cut.stretch < cut.k_blocks ? panels : 1);
}

// One slab of a panel against all row blocks; `next`: the slab that follows.
struct Slab {
  const uint16_t *a, *w, *next;  // a: of the first row block
  int64_t a_step;                // elements between row blocks
  int64_t k_blocks;
  bool start;
};
// The tiles are configured for a whole block of rows and stay so.
void multiply_slab(const Slab& s, int64_t rows, float* c) {
  const char* ahead = reinterpret_cast<const char*>(s.next);
  const int64_t fetch = rows > 7 * kRowBlock ? 4 : rows > 3 * kRowBlock ? 8 : 16;  // lines a k block
  const uint16_t* a = s.a;
  for (int64_t left = rows, asked = 0; left > 0; left -= kRowBlock, asked += fetch, a += s.a_step, c += kBlockSums) {
    if (left < kRowBlock) configure_rows(left);
    if (left <= 16) {
      add_slab<false, 0>(a, s.w, s.k_blocks, s.start, ahead, c);
    } else if (asked >= kAlone) {
      add_slab<true, 0>(a, s.w, s.k_blocks, s.start, ahead, c);
    } else if (fetch == 4) {
      add_slab<true, 4>(a, s.w, s.k_blocks, s.start, ahead, c);
    } else if (fetch == 8) {
      add_slab<true, 8>(a, s.w, s.k_blocks, s.start, ahead, c);
    } else {
      add_slab<true, 16>(a, s.w, s.k_blocks, s.start, ahead, c);
    }
    ahead += fetch * 64 * s.k_blocks;
    if (left < kRowBlock) configure_rows(kRowBlock);
  }
}

// Few rows: panels of weights pass once.
//
//   panel p0 ... panel p1 - 1 | next ...
//     ^ here   ^ kAhead blocks on: fetched into the second level, where more lines can be under way than to the first
template <bool kHigh>
void multiply_once(const GemmArgs& g, int64_t m, int64_t rows, const uint16_t* a, int64_t p0, int64_t p1) {
  constexpr int64_t kBlock = 2 * kTile;  // elements
  const int64_t k_blocks = (g.k + 31) / 32;
  const uint16_t* w = static_cast<const uint16_t*>(g.w) + p0 * k_blocks * kBlock;
  // Nothing to follow: lines that are in the cache anyway.
  const auto* next = reinterpret_cast<const char*>(g.next ? g.next : w);
  configure_rows(rows);
  for (int64_t p = p0, left = (p1 - p0) * k_blocks; p < p1; ++p, left -= k_blocks, w += k_blocks * kBlock) {
    const int64_t inside = left - kAhead < 0 ? 0 : left - kAhead < k_blocks ? left - kAhead : k_blocks;
    begin_sums<kHigh>(true, g.sums);
    add_blocks<kHigh, kAlone>(a, w, inside, reinterpret_cast<const char*>(w + kAhead * kBlock));
    add_blocks<kHigh, kAlone>(a + inside * kBlock, w + inside * kBlock, k_blocks - inside,
                              next + (inside + kAhead - left) * kAlone * 64);
    end_sums<kHigh>(g.sums);
    finish_block(g, m, rows, p * kPanel, g.sums);
  }
  release();
}

void gemm_bf16(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int64_t row_blocks = (m1 - m0 + kRowBlock - 1) / kRowBlock;
  const Cut cut = cut_of(row_blocks, g.k);
  const int64_t panel = kPanel * cut.k_blocks * 32;  // elements, of weights as of prepared rows
  const auto* a = static_cast<const uint16_t*>(g.a) + m0 / kRowBlock * panel;
  const auto* w = static_cast<const uint16_t*>(g.w);
  if (row_blocks == 1) {
    (m1 - m0 > 16 ? multiply_once<true> : multiply_once<false>)(g, m0, m1 - m0, a, p0, p1);
    return;
  }
  const bool stretched = cut.stretch < cut.k_blocks;
  configure_rows(kRowBlock);
  for (int64_t from = 0; from < cut.k_blocks; from += cut.stretch) {
    const int64_t to = from + cut.stretch < cut.k_blocks ? from + cut.stretch : cut.k_blocks;
    for (int64_t p = p0; p < p1; ++p) {
      float* c = g.sums + (stretched ? (p - p0) * row_blocks * kBlockSums : 0);
      for (int64_t k = from; k < to; k += cut.slab) {
        const uint16_t* here = w + p * panel + k * 2 * kTile;
        const int64_t length = k + cut.slab < to ? cut.slab : to - k;
        // After the last slab of a stretch comes the first of the next panel.
        const uint16_t* next = k + length < to ? here + length * 2 * kTile : w + (p + 1) * panel + from * 2 * kTile;
        multiply_slab({a + k * 2 * kTile, here, next, panel, length, k == 0}, m1 - m0, c);
      }
      if (to < cut.k_blocks) continue;
      for (int64_t m = m0; m < m1; m += kRowBlock, c += kBlockSums) {
        finish_block(g, m, m1 - m < kRowBlock ? m1 - m : kRowBlock, p * kPanel, c);
      }
    }
  }
  release();
}

}  // namespace

void FASTLLM_ISA::fill_gemm_amx(Kernels& t) {
  t.amx = true;
  t.prepared_bytes = prepared_bytes;
  t.prepare_bf16 = prepare_bf16;
  t.gemm_sums = gemm_sums;
  t.gemm_bf16 = gemm_bf16;
}

}  // namespace fastllm::cpu

#else
void fastllm::cpu::FASTLLM_ISA::fill_gemm_amx(Kernels&) {}
#endif

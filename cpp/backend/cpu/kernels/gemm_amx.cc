// The bf16 product on AMX tiles: y = x w^T, bf16 by bf16 into fp32.
//
//   for m, n: s = 0; for k: s += x[m][k] * w[n][k]
//   y[m][n] = (accumulate ? y[m][n] : 0) + s + (bias ? bias[n] : 0)
//
// Two A tiles (32 rows) by two B tiles (32 columns) make four sums in tiles 0-3; each k block of 32 loads 4 KB for 64
// cycles of work. Up to 32 rows the tiles are configured to the rows there are, so one row costs one row. A tile adds
// its products in a fixed order per element, so a row's result does not depend on its neighbours. Cost: 2 N K bytes
// while M is small, 2 M N K operations when it is large. Benchmark: fastllm_bench_ops --benchmark_filter=Linear
#include "backend/cpu/kernels/gemm.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kAhead = 8 << 10;  // bytes of weights fetched ahead of use, per panel stream

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

// c: [32, 32] fp32
template <bool kHigh>
inline void block(const uint16_t* a, const uint16_t* w, int64_t k_blocks, bool prefetch, float* c) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  if constexpr (kHigh) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int64_t b = 0; b < k_blocks; ++b, a += 2 * kTile, w += 2 * kTile) {
    if (prefetch) {
      const char* ahead = reinterpret_cast<const char*>(w) + kAhead;
      for (int64_t i = 0; i < 2048; i += 64) __builtin_prefetch(ahead + i, 0, 3);
    }
    TILE_LOAD(4, a, 64);
    TILE_LOAD(6, w, 64);
    TILE_LOAD(7, w + kTile, 64);
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    if constexpr (kHigh) {
      TILE_LOAD(5, a + kTile, 64);
      TILE_DOT(2, 5, 6);
      TILE_DOT(3, 5, 7);
    }
  }
  TILE_STORE(0, c, 128);
  TILE_STORE(1, c + 16, 128);
  if constexpr (kHigh) {
    TILE_STORE(2, c + 16 * kPanel, 128);
    TILE_STORE(3, c + 16 * kPanel + 16, 128);
  }
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

void gemm_bf16(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int64_t k_blocks = (g.k + 31) / 32;
  const int64_t panel = kPanel * k_blocks * 32;  // elements, of weights as of prepared rows
  alignas(64) float c[kRowBlock * kPanel];
  int64_t configured = 0;
  for (int64_t p = p0; p < p1; ++p) {
    const uint16_t* w = static_cast<const uint16_t*>(g.w) + p * panel;
    for (int64_t m = m0; m < m1; m += kRowBlock) {
      const int64_t rows = m1 - m < kRowBlock ? m1 - m : kRowBlock;
      if (rows != configured) {
        configure_rows(rows);
        configured = rows;
      }
      const uint16_t* a = static_cast<const uint16_t*>(g.a) + (m / kRowBlock) * panel;
      if (rows > 16) {
        block<true>(a, w, k_blocks, m == m0, c);
      } else {
        block<false>(a, w, k_blocks, m == m0, c);
      }
      finish_block(g, m, rows, p * kPanel, c);
    }
  }
  release();
}

}  // namespace

void FASTLLM_ISA::fill_gemm_amx(Kernels& t) {
  t.amx = true;
  t.prepared_bytes = prepared_bytes;
  t.prepare_bf16 = prepare_bf16;
  t.gemm_bf16 = gemm_bf16;
}

}  // namespace fastllm::cpu

#else
void fastllm::cpu::FASTLLM_ISA::fill_gemm_amx(Kernels&) {}
#endif

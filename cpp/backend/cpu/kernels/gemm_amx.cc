// The bf16 product on AMX tiles: y = x w^T, bf16 by bf16 into fp32.
//
//   for m, n: s = 0; for k: s += x[m][k] * w[n][k]
//   y[m][n] = (accumulate ? y[m][n] : 0) + s + (bias ? bias[n] : 0)
//
// A panel of weights is taken in slabs as tile_product.h tells; the next slab is fetched evenly over the work on this
// one, since a core reads memory ten times slower than a burst would ask for.
//
// Up to 32 rows weights are used once: no slabs, and the tiles have the rows there are, so one row costs one row. Cost:
// 2 N K bytes while M is small, 2 M N K operations when it is large.
// Benchmark: fastllm_bench_ops --benchmark_filter=Linear
#include "backend/cpu/kernels/tile_product.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kSlab = 20;  // k blocks of 32 of a slab at most: 40 of the 48 KB of the first level
constexpr int64_t kAhead = 8;  // k blocks of weights fetched ahead of use when they are used once
constexpr int kAlone = 32;     // lines of a k block: all that are used are fetched

// Asks for kFetch lines from `ahead` on beside each k block, for the second level, where more lines can be under way
// than to the first. Inlined at once: GCC takes a function that only prefetches for one without effect.
template <int kFetch>
struct Fetch {
  const char* ahead;
  __attribute__((always_inline)) void operator()(int64_t b) const {
    const char* from = ahead + b * kFetch * 64;
    for (int i = 0; i < kFetch; ++i) __builtin_prefetch(from + i * 64, 0, 2);
  }
};

// Adds k_blocks blocks of k to c or starts it.
template <bool kHigh, int kFetch>
inline void add_slab(const RowTiles& a, const uint16_t* w, int64_t k_blocks, bool start, const char* ahead, float* c) {
  begin_sums<kHigh>(start, c);
  add_blocks<kHigh, true>(a, w, k_blocks, Fetch<kFetch>{ahead});
  end_sums<kHigh>(c);
}

Cut cut_rows(int64_t row_blocks, int64_t k) {
  const int64_t k_blocks = (k + 31) / 32;
  if (row_blocks == 1) return {k_blocks, k_blocks, k_blocks};
  return cut_of(row_blocks, k_blocks, kSlab);
}

int64_t gemm_sums(int64_t rows, int64_t panels, int64_t k) {
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  return waiting_sums(row_blocks, panels, cut_rows(row_blocks, k));
}

// One slab of a panel against all row blocks; `next`: the slab that follows.
struct Slab {
  const uint16_t *a, *w, *next;  // a: the first row block
  int64_t a_step;                // elements between row blocks
  int64_t k, k_blocks;
};
// The tiles are configured for a whole block of rows and stay so.
void multiply_slab(const Slab& s, int64_t rows, float* c) {
  const bool start = s.k == 0;
  const char* ahead = reinterpret_cast<const char*>(s.next);
  const int64_t fetch = rows > 7 * kRowBlock ? 4 : rows > 3 * kRowBlock ? 8 : 16;  // lines a k block
  const uint16_t* block = s.a;
  for (int64_t left = rows, asked = 0; left > 0; left -= kRowBlock, asked += fetch, block += s.a_step) {
    const int64_t here = left < kRowBlock ? left : kRowBlock;
    const RowTiles a = tiles_of(block, here, s.k);
    if (here < kRowBlock) configure_rows(here);
    if (here <= 16) {
      add_slab<false, 0>(a, s.w, s.k_blocks, start, ahead, c);
    } else if (asked >= kAlone) {
      add_slab<true, 0>(a, s.w, s.k_blocks, start, ahead, c);
    } else if (fetch == 4) {
      add_slab<true, 4>(a, s.w, s.k_blocks, start, ahead, c);
    } else if (fetch == 8) {
      add_slab<true, 8>(a, s.w, s.k_blocks, start, ahead, c);
    } else {
      add_slab<true, 16>(a, s.w, s.k_blocks, start, ahead, c);
    }
    ahead += fetch * 64 * s.k_blocks;
    c += kBlockSums;
    if (here < kRowBlock) configure_rows(kRowBlock);
  }
}

// Few rows: panels of weights pass once.
//
//   panel p0 ... panel p1 - 1 | next ...
//     ^ here   ^ kAhead blocks on: asked for
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
    const char* ahead = reinterpret_cast<const char*>(w + kAhead * kBlock);
    add_blocks<kHigh, false>(tiles_of(a, rows, 0), w, inside, Fetch<kAlone>{ahead});
    ahead = next + (inside + kAhead - left) * kAlone * 64;
    add_blocks<kHigh, false>(tiles_of(a, rows, inside), w + inside * kBlock, k_blocks - inside, Fetch<kAlone>{ahead});
    end_sums<kHigh>(g.sums);
    finish_block(g, m, rows, p * kPanel, g.sums);
  }
  release();
}

void gemm_bf16(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int64_t row_blocks = (m1 - m0 + kRowBlock - 1) / kRowBlock;
  const Cut cut = cut_rows(row_blocks, g.k);
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
        multiply_slab({a, here, next, panel, k, length}, m1 - m0, c);
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
  t.prepared_bytes = pair_bytes;
  t.prepare_bf16 = prepare_pairs;
  t.gemm_sums = gemm_sums;
  t.gemm_bf16 = gemm_bf16;
}

}  // namespace fastllm::cpu

#else
void fastllm::cpu::FASTLLM_ISA::fill_gemm_amx(Kernels&) {}
#endif

// The product with grouped weights on AMX tiles, for more than a few rows.
//
//   for m, n: acc = 0; for groups: acc = fma(scale[n][g], xs[m][g] * sum_k (code[n][k] - zero) * xq[m][k], acc)
//
// A group has scales of its own, so a tile product spans K = 32 and its sums leave the tiles at once: they are stored
// while the tiles work on the next group, and come back as vectors to be scaled. The stores bound the speed, at 17
// cycles for a tile however few rows it has: half the rate of the dense bf16 product. So row tiles are high, though the
// fp32 sums of 16 rows by 32 columns are a few more than the registers hold.
//
// Weights become signed bytes and fp32 scales once for kStripRows rows, kChunk groups at a time:
//
//     groups of a panel   | chunk | chunk | ...       for each chunk: unpack, then all row tiles of the strip
//     rows                | 16 | 16 | ... | strip     fp32 sums rest in memory between chunks
//
// Cost: N K (bits + 0.5) / 8 bytes while M is small. Benchmark: fastllm_bench_ops --benchmark_filter=Quant
#include "backend/cpu/kernels/micro.h"
#include "backend/cpu/kernels/quant.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kFewRows = 4;      // up to here vectors alone are faster
constexpr int64_t kStripRows = 256;  // rows that share one unpacking
constexpr int64_t kChunk = 16;       // groups unpacked together
constexpr int64_t kPanelAhead = 4 << 10;

// One group of a panel.
struct alignas(64) Unpacked {
  uint8_t codes[kGroup * kPanel];  // two B tiles; minus zero
  float scales[kPanel], offsets[kPanel];
};

template <int kBits>
void unpack(const char* w, bool offsets, int zero, Unpacked& to) {
  for (int64_t line = 0; line < quant_block_bytes(kBits, offsets); line += 64) {
    __builtin_prefetch(w + kPanelAhead + line, 0, 3);
  }
  const __m512i minus = _mm512_set1_epi8(static_cast<char>(zero));
  for (int64_t quad = 0; quad < 16; quad += 2) {  // of both tiles
    __m512i low, high;
    if constexpr (kBits == 8) {
      low = _mm512_loadu_si512(w + quad * 64);
      high = _mm512_loadu_si512(w + quad * 64 + 64);
    } else {
      const __m512i both = _mm512_loadu_si512(w + quad * 32), nibble = _mm512_set1_epi8(15);
      low = _mm512_and_si512(both, nibble);
      high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
    _mm512_store_si512(to.codes + quad * 64, _mm512_sub_epi8(low, minus));
    _mm512_store_si512(to.codes + quad * 64 + 64, _mm512_sub_epi8(high, minus));
  }
  const auto* scales = reinterpret_cast<const uint16_t*>(w + quant_code_bytes(kBits));
  for (int64_t c = 0; c < kPanel; c += kW) {
    store(to.scales + c, load_half(scales + c));
    if (offsets) store(to.offsets + c, load_half(scales + kPanel + c));
  }
}

// f(Rows<r>{}) for r = 0 ... R - 1. Loops over an array of sums that the compiler unrolls late leave it in memory.
#define FASTLLM_INLINE __attribute__((always_inline))
template <int R, class F>
FASTLLM_INLINE inline void each_row(const F& f) {
  if constexpr (R > 1) each_row<R - 1>(f);
  f(Rows<R - 1>{});
}

// Tiles 0-3: sums of two groups of two column tiles; 4: A, 32 k wide; 6, 7: B, 8 quads of k high.
void configure_rows(int rows) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kGroup / 4);
    c.bytes_per_row[t] = t == 4 ? kGroup : 64;
  }
  configure(c);
}

// sums: [rows][32] int32. Consecutive groups take different tiles.
template <bool kSigned, bool kOdd>
inline void multiply_group(const int8_t* a, int64_t stride, const uint8_t* codes, int32_t* sums) {
  TILE_LOAD(4, a, stride);
  TILE_LOAD(6, codes, 64);
  TILE_LOAD(7, codes + 512, 64);
  if constexpr (kOdd) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
  }
  if constexpr (kSigned && kOdd) {
    TILE_DOT_SIGNED(2, 4, 6);
    TILE_DOT_SIGNED(3, 4, 7);
  } else if constexpr (kSigned) {
    TILE_DOT_SIGNED(0, 4, 6);
    TILE_DOT_SIGNED(1, 4, 7);
  } else if constexpr (kOdd) {
    TILE_DOT_UNSIGNED(2, 4, 6);
    TILE_DOT_UNSIGNED(3, 4, 7);
  } else {
    TILE_DOT_UNSIGNED(0, 4, 6);
    TILE_DOT_UNSIGNED(1, 4, 7);
  }
  if constexpr (kOdd) {
    TILE_STORE(2, sums, 128);
    TILE_STORE(3, sums + 16, 128);
  } else {
    TILE_STORE(0, sums, 128);
    TILE_STORE(1, sums + 16, 128);
  }
}

// R rows times `groups` unpacked groups from group `begin` of the rows on, onto sums [R][32].
template <int R, bool kSigned, bool kOffsets>
void tile_by_chunk(const QuantRow& row, int64_t begin, int64_t groups, const Unpacked* w, bool first, float* total) {
  const int64_t stride = QuantRow::stride(row.groups), sums_of_steps = row.groups;
  alignas(64) int32_t sums[2][R * kPanel];
  vf acc[R][2];
  each_row<R>([&](auto at) FASTLLM_INLINE {
    constexpr int r = decltype(at)::value;
    acc[r][0] = first ? vf{} : load(total + r * kPanel);
    acc[r][1] = first ? vf{} : load(total + r * kPanel + kW);
  });
  const auto* steps = reinterpret_cast<const char*>(row.steps() + begin);
  const auto scale = [&](int64_t b, const int32_t* from) FASTLLM_INLINE {
    const Unpacked& group = w[b];
    const vf s0 = load(group.scales), s1 = load(group.scales + kW);
    each_row<R>([&](auto at) FASTLLM_INLINE {
      constexpr int r = decltype(at)::value;
      const auto* step = reinterpret_cast<const float*>(steps + r * stride) + b;
      const vf xs = set1(*step);
      const vi i0 = reinterpret_cast<vi>(load_u32(from + r * kPanel));
      const vi i1 = reinterpret_cast<vi>(load_u32(from + r * kPanel + kW));
      acc[r][0] = fma(s0, xs * __builtin_convertvector(i0, vf), acc[r][0]);
      acc[r][1] = fma(s1, xs * __builtin_convertvector(i1, vf), acc[r][1]);
      if constexpr (kOffsets) {
        const vf step_sum = set1(step[sums_of_steps]);
        acc[r][0] = fma(load(group.offsets), step_sum, acc[r][0]);
        acc[r][1] = fma(load(group.offsets + kW), step_sum, acc[r][1]);
      }
    });
  };
  const int8_t* a = row.codes(begin);
  multiply_group<kSigned, false>(a, stride, w[0].codes, sums[0]);
  int64_t b = 0;
  for (; b + 2 < groups; b += 2) {
    multiply_group<kSigned, true>(a + (b + 1) * kGroup, stride, w[b + 1].codes, sums[1]);
    scale(b, sums[0]);
    multiply_group<kSigned, false>(a + (b + 2) * kGroup, stride, w[b + 2].codes, sums[0]);
    scale(b + 1, sums[1]);
  }
  if (b + 1 < groups) multiply_group<kSigned, true>(a + (b + 1) * kGroup, stride, w[b + 1].codes, sums[1]);
  scale(b, sums[0]);
  if (b + 1 < groups) scale(b + 1, sums[1]);
  each_row<R>([&](auto at) FASTLLM_INLINE {
    constexpr int r = decltype(at)::value;
    store(total + r * kPanel, acc[r][0]);
    store(total + r * kPanel + kW, acc[r][1]);
  });
}

template <int kBits, bool kOffsets>
void gemm(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  constexpr bool kSigned = kBits == 4 || !kOffsets;
  constexpr int64_t kBytes = quant_block_bytes(kBits, kOffsets);
  const int64_t groups = groups_of(g.k);
  Unpacked chunk[kChunk];
  alignas(64) float total[kStripRows * kPanel];
  int configured = 0;
  for (int64_t p = p0; p < p1; ++p) {
    const char* w = static_cast<const char*>(g.w) + p * groups * kBytes;
    for (int64_t m = m0; m < m1; m += kStripRows) {
      const int64_t end = m1 - m < kStripRows ? m1 : m + kStripRows;
      for (int64_t begin = 0; begin < groups; begin += kChunk) {
        const int64_t count = groups - begin < kChunk ? groups - begin : kChunk;
        for (int64_t b = 0; b < count; ++b)
          unpack<kBits>(w + (begin + b) * kBytes, kOffsets, kOffsets ? 0 : g.zero, chunk[b]);
        for (int64_t r = m; r < end; r += kTileRows) {
          with_rows<kTileRows>(end - r, [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            if (configured != R) configure_rows(configured = R);
            tile_by_chunk<R, kSigned, kOffsets>(row_of(g, r), begin, count, chunk, begin == 0,
                                                total + (r - m) * kPanel);
          });
        }
      }
      for (int64_t r = m; r < end; ++r)
        for (int64_t c = 0; c < kPanel; c += kW)
          finish_columns(g, r, p * kPanel + c, load(total + (r - m) * kPanel + c));
    }
  }
  release();
}

void gemm_quant(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int most = (1 << g.bits) - 1;
  const bool fits = g.offsets || (g.zero <= 128 && most - g.zero <= 127);
  if (m1 - m0 <= kFewRows || !fits) {
    FASTLLM_ISA::multiply_rows(g, m0, m1, p0, p1);
    return;
  }
  const auto run =
      g.bits == 8 ? (g.offsets ? gemm<8, true> : gemm<8, false>) : (g.offsets ? gemm<4, true> : gemm<4, false>);
  run(g, m0, m1, p0, p1);
}

}  // namespace

void FASTLLM_ISA::fill_quant_amx(Kernels& t) {
  constexpr int kEdx = 3, kAmxInt8 = 25;
  if (has_byte_dot() && cpu_has(0, kEdx, kAmxInt8)) t.gemm_quant = gemm_quant;
}

}  // namespace fastllm::cpu

#else
void fastllm::cpu::FASTLLM_ISA::fill_quant_amx(Kernels&) {}
#endif

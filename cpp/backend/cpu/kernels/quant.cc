// y = x w^T with weights that stay codes of 8 or 4 bits; kernels.h defines the sums. For up to a few rows, where the
// time is that of reading the weights:
//
//   for m, n: acc = 0; for parts: acc = fma(xs[m][part], scale[n][g] * sum_k (code[n][k] - zero) * xq[m][k], acc)
//
// A block of weights is read once for a tile of rows; codes become operands in registers. Cost: N K (bits + 16 / G) / 8
// bytes. Benchmark: fastllm_bench_ops --benchmark_filter=Quant
#include "backend/cpu/kernels/quant.h"

#include "backend/cpu/kernels/micro.h"
#include "backend/cpu/kernels/quant_dot.h"

namespace fastllm::cpu {
namespace {

constexpr int kVecs = kPanel / kW;        // vectors of a panel
constexpr int64_t kQuantAhead = 8 << 10;  // bytes of weights fetched ahead of use

// Rows whose sums have registers. Sanitizers take minutes to compile more than a few.
template <class Dot>
#if defined(__AVX512F__) && !defined(FASTLLM_SANITIZED)
constexpr int kQuantRows = Dot::kOneInstruction ? 8 : 4;
#else
constexpr int kQuantRows = 2;
#endif

int64_t quant_sums(int64_t, int64_t, int64_t) { return 0; }

// isum of vectors of columns that are taken together and R rows over kPart k, from `start` of each row. w: the codes of
// tile 0 from the part on; tile_bytes: from there to those of tile 1; column: the first of the panel. fetch: ask for
// the codes that are used kQuantAhead later.
template <class Dot, int kBits, int64_t kPart, int R>
FASTLLM_INLINE inline void sum_part(const char* w, int64_t tile_bytes, int column, const int8_t* x, bool fetch,
                                    vi (&isum)[R][Dot::kTogether]) {
  constexpr int kTogether = Dot::kTogether;
  for (int64_t k = 0; k < kPart; k += kGroup, w += kGroup * 2 * kBits, x += kGroup) {
    typename Dot::Sum sum[R][kTogether];
    each<R>([&](auto r) FASTLLM_INLINE {
      each<kTogether>([&](auto j) FASTLLM_INLINE { Dot::start(sum[r.value][j.value], isum[r.value][j.value]); });
    });
    each<kGroup / 8>([&](auto pair) FASTLLM_INLINE {
      constexpr int kQuad = decltype(pair)::value * 2;
      vu codes[2][kTogether];
      each<kTogether>([&](auto j) FASTLLM_INLINE {
        const int at_column = column + j.value * kW;
        const char* at = w + at_column / 16 * tile_bytes + at_column % 16 * 4 + kQuad * 8 * kBits;
        if (fetch && at_column % 16 == 0)
          for (int line = 0; line < kBits * 16; line += 64) __builtin_prefetch(at + kQuantAhead + line, 0, 3);
        if constexpr (kBits == 8) {
          codes[0][j.value] = load_u32(at);
          codes[1][j.value] = load_u32(at + 64);
        } else {
          const vu both = load_u32(at);
          codes[0][j.value] = both & 0x0f0f0f0fu;
          codes[1][j.value] = (both >> 4) & 0x0f0f0f0fu;
        }
      });
      each<2>([&](auto i) FASTLLM_INLINE {
        each<R>([&](auto r) FASTLLM_INLINE {
          const auto operand = Dot::operand(x + r.value * kSpan + (kQuad + i.value) * 4);
          each<kTogether>([&](auto j)
                              FASTLLM_INLINE { Dot::add(sum[r.value][j.value], codes[i.value][j.value], operand, i); });
        });
      });
    });
    each<R>([&](auto r) FASTLLM_INLINE {
      each<kTogether>([&](auto j) FASTLLM_INLINE { Dot::end(isum[r.value][j.value], sum[r.value][j.value]); });
    });
  }
}

// Adds a part of the product of R rows and vectors of a panel, those from `first` on that are taken together, to acc.
// w: its codes in tile 0; scales: of its group; row: the first of its tile; at: k of the span.
template <class Dot, int kBits, bool kOffsets, int64_t kPart, int R>
FASTLLM_INLINE inline void add_part(const char* w, int64_t tile_bytes, const uint16_t* scales, const SpanRows& span,
                                    int64_t row, int64_t at, int first, bool fetch, vf (&acc)[R][kVecs]) {
  const float* steps = span.steps[at / kPart] + row;
  const int32_t* starts = span.starts[at / kPart] + row;
  const float* sums = span.sums[at / kPart] + row;
  vi isum[R][Dot::kTogether];
  each<R>([&](auto r) FASTLLM_INLINE {
    for (vi& v : isum[r.value]) v = kOffsets ? vi{} : set1(starts[r.value]);
  });
  sum_part<Dot, kBits, kPart>(w, tile_bytes, first * kW, span.codes[row] + at, fetch, isum);
  each<Dot::kTogether>([&](auto j) FASTLLM_INLINE {
    const int vec = first + decltype(j)::value;
    const vf scale = load_half(scales + vec * kW);
    vf offset{};
    if constexpr (kOffsets) offset = load_half(scales + kPanel + vec * kW);
    each<R>([&](auto r) FASTLLM_INLINE {
      vf y = scale * __builtin_convertvector(isum[r.value][j.value], vf);
      if constexpr (kOffsets) y = fused(offset, set1(sums[r.value]), y);
      acc[r.value][vec] = fused(set1(steps[r.value]), y, acc[r.value][vec]);
    });
  });
}

// kTurns times R rows from m on, all of one tile of rows, times panel p. Rows of other turns wait in memory while some
// meet a part, so that its weights come from there once. first: they are the first rows to meet the panel.
template <class Dot, int kBits, bool kOffsets, int64_t kPart, int R, int kTurns>
void rows_by_panel(const QuantArgs& g, int64_t m, int64_t p, bool first) {
  const int64_t group = kPart == 32 ? 32 : g.group, groups = (g.k + group - 1) / group;
  const int64_t code_bytes = quant_code_bytes(kBits, group), bytes = quant_block_bytes(kBits, group, kOffsets);
  const char* w = static_cast<const char*>(g.w) + p * groups * bytes;
  const int64_t row = m % kTileRows;
  vf acc[kTurns][R][kVecs];
  for (auto& turn : acc)
    for (auto& a : turn)
      for (vf& v : a) v = vf{};
  const SpanRows* span = rows_of(g, m);
  int64_t at = 0;  // in the span
  for (int64_t b = 0; b < groups; ++b, w += bytes) {
    if (first)
      for (int64_t line = code_bytes; line < bytes; line += 64) __builtin_prefetch(w + kQuantAhead + line, 0, 3);
    const auto* scales = reinterpret_cast<const uint16_t*>(w + code_bytes);
    const auto columns = [&](int vec) FASTLLM_INLINE {
      for (int64_t k = 0; k < group; k += kPart) {
        const auto add = [&](int turn) FASTLLM_INLINE {
          add_part<Dot, kBits, kOffsets, kPart, R>(w + k * 2 * kBits, code_bytes / 2, scales, *span, row + turn * R,
                                                   at + k, vec, first && turn == 0, acc[turn]);
        };
        if constexpr (kTurns == 1) {
          add(0);  // a constant turn leaves acc in registers
        } else {
          for (int turn = 0; turn < kTurns; ++turn) add(turn);
        }
      }
    };
    if constexpr (kVecs <= 2) {
      each<kVecs / Dot::kTogether>([&](auto i) FASTLLM_INLINE { columns(i.value * Dot::kTogether); });  // as do these
    } else {
      for (int vec = 0; vec < kVecs; vec += Dot::kTogether) columns(vec);
    }
    at += group;
    if (at == kSpan) ++span, at = 0;
  }
  for (int r = 0; r < kTurns * R; ++r)
    for (int v = 0; v < kVecs; ++v) finish_columns(g, m + r, p * kPanel + v * kW, acc[r / R][r % R][v]);
}

template <class Dot, int kBits, bool kOffsets, int64_t kPart>
void gemm_part(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  constexpr int kMost = kQuantRows<Dot>, kFew = kMost < 4 ? kMost : 4;
  for (int64_t p = p0; p < p1; ++p) {
    for (int64_t m = m0; m < m1;) {
      const bool first = m == m0;
      if (Dot::kOneInstruction && m1 - m >= kTileRows) {
        rows_by_panel<Dot, kBits, kOffsets, kPart, kMost, kTileRows / kMost>(g, m, p, first);
        m += kTileRows;
      } else if (kMost > kFew && m1 - m >= kMost) {
        rows_by_panel<Dot, kBits, kOffsets, kPart, kMost, 1>(g, m, p, first);
        m += kMost;
      } else {
        with_rows<kFew>(m1 - m, [&](auto rows) {
          rows_by_panel<Dot, kBits, kOffsets, kPart, decltype(rows)::value, 1>(g, m, p, first);
          m += decltype(rows)::value;
        });
      }
    }
  }
}

template <class Dot, int kBits, bool kOffsets>
void gemm(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const auto run =
      quant_part(g.group) == 32 ? gemm_part<Dot, kBits, kOffsets, 32> : gemm_part<Dot, kBits, kOffsets, 64>;
  run(g, m0, m1, p0, p1);
}

template <class Dot8, class Dot4>
void gemm_quant(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const auto run = g.bits == 8 ? (g.offsets ? gemm<Dot8, 8, true> : gemm<Dot8, 8, false>)
                               : (g.offsets ? gemm<Dot4, 4, true> : gemm<Dot4, 4, false>);
  run(g, m0, m1, p0, p1);
}

}  // namespace

#if defined(__AMX_BF16__)
void FASTLLM_ISA::multiply_rows(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  gemm_quant<ByteDot, ByteDot>(g, m0, m1, p0, p1);
}
#endif

void FASTLLM_ISA::fill_quant(Kernels& t) {
  t.quant_sums = quant_sums;
#if defined(__AMX_BF16__)
  t.gemm_quant = t.gemm_quant_plain = multiply_rows;
#else
  t.gemm_quant = t.gemm_quant_plain = gemm_quant<PlainDot<8>, PlainDot<4> >;
#if defined(__AVX2__)
  if (has_byte_dot()) t.gemm_quant = gemm_quant<ByteDot, ByteDot>;
#endif
#endif
}

}  // namespace fastllm::cpu

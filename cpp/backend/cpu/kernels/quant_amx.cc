// The product with grouped weights on AMX tiles, for more than a few rows.
//
//   for m, n: acc = 0; for parts: acc = fma(xs[m][part], scale[n][g] * sum_k (code[n][k] - zero) * xq[m][k], acc)
//
// A part has steps and scales of its own, so its sums leave the tiles at once: they are stored and come back as vectors
// to be scaled. While the vectors of a span are scaled, the tiles work on the next span, be it of the next rows:
//
//     a span of 16 rows   tiles    part 0 of both column tiles, part 1, ...   sums are stored kLag products later, so
//                                                                             that four tiles of sums are in flight
//                         vectors  parts of 8 rows; of the other 8 rows       sums of 8 x 32 in registers
//
// Codes become signed bytes and scales fp32 once for kStripRows rows, a chunk of spans at a time; two such chunks
// exist, that of the step and that of the tiles' next step. Cost: N K (bits + 16 / G) / 8 bytes while M is small.
// Benchmark: fastllm_bench_ops --benchmark_filter=Quant
#include "backend/cpu/kernels/micro.h"
#include "backend/cpu/kernels/quant.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kFewRows = 4;      // up to here vectors alone are faster
constexpr int64_t kManyRows = 128;   // from here on memory is not what counts
constexpr int64_t kStripRows = 512;  // rows that share one unpacking
constexpr int64_t kChunk = 2;        // spans unpacked together for many rows; one for few
constexpr int64_t kTileSums = kTileRows * kW;

// One span of a panel.
struct alignas(64) Unpacked {
  uint8_t codes[2][kSpan * kW];                                           // [tile][quads][16 columns][4]; minus zero
  float scales[kSpan / kGroup][kPanel], offsets[kSpan / kGroup][kPanel];  // [part]
};

// Integer sums of a span: [tile][part][16 rows][16 columns].
struct alignas(64) Sums {
  int32_t of[2][kSpan / kGroup][kTileSums];
};

// Rows of one tile times a chunk.
struct Work {
  int64_t rows;          // that exist; 0: nothing
  const SpanRows* span;  // the first
  const Unpacked* w;
  int64_t spans;
  bool first, last;  // of its rows and panel
  int64_t m, panel;
  float* total;       // [2 tiles][16 rows][16 columns]
  const char* ahead;  // weights to fetch for the chunk after the next one, or null
  int64_t bytes;      // of weights of a span
};

template <int kBits>
void unpack_codes(const char* w, int zero, int64_t quads, uint8_t* to) {
  const __m512i minus = _mm512_set1_epi8(static_cast<char>(zero));
  for (int64_t quad = 0; quad < quads; quad += 2) {
    __m512i low, high;
    if constexpr (kBits == 8) {
      low = _mm512_loadu_si512(w + quad * 64);
      high = _mm512_loadu_si512(w + quad * 64 + 64);
    } else {
      const __m512i both = _mm512_loadu_si512(w + quad * 32), nibble = _mm512_set1_epi8(15);
      low = _mm512_and_si512(both, nibble);
      high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
    _mm512_store_si512(to + quad * 64, _mm512_sub_epi8(low, minus));
    _mm512_store_si512(to + quad * 64 + 64, _mm512_sub_epi8(high, minus));
  }
}

// The blocks of one span at w.
void unpack(const QuantArgs& g, const char* w, int64_t groups, Unpacked& to) {
  const int64_t code_bytes = quant_code_bytes(g.bits, g.group), bytes = quant_block_bytes(g.bits, g.group, g.offsets);
  const int64_t parts = g.group / quant_part(g.group);  // of a group
  const auto codes = g.bits == 8 ? unpack_codes<8> : unpack_codes<4>;
  for (int64_t b = 0; b < groups; ++b, w += bytes) {
    for (int64_t tile = 0; tile < 2; ++tile)
      codes(w + tile * code_bytes / 2, g.zero, g.group / 4, to.codes[tile] + b * g.group * kW);
    const auto* scales = reinterpret_cast<const uint16_t*>(w + code_bytes);
    for (int64_t part = b * parts; part < (b + 1) * parts; ++part) {
      for (int64_t c = 0; c < kPanel; c += kW) {
        store(to.scales[part] + c, load_half(scales + c));
        if (g.offsets) store(to.offsets[part] + c, load_half(scales + kPanel + c));
      }
    }
  }
  for (int64_t part = groups * parts; part < kSpan / quant_part(g.group); ++part) {  // that do not exist add nothing
    __builtin_memset(to.scales[part], 0, sizeof to.scales[part]);
    __builtin_memset(to.offsets[part], 0, sizeof to.offsets[part]);
  }
}

#define FASTLLM_INLINE __attribute__((always_inline))

// Tile registers by number. GCC and clang print %c as a bare constant.
template <int T>
FASTLLM_INLINE inline void load_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FASTLLM_INLINE inline void store_tile(void* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(T) : "memory");
}
template <int T>
FASTLLM_INLINE inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
}
template <bool kSigned, int C, int A, int B>
FASTLLM_INLINE inline void dot_tiles() {
  if constexpr (kSigned) {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
  } else {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
  }
}

// Tiles 0 to 3: sums; 4, 5: A; 6, 7: B. Each k is one byte of a row of A, each four k are a row of B.
void configure_rows(int64_t rows, int64_t k) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<uint8_t>(t < 6 ? rows : k / 4);
    c.bytes_per_row[t] = static_cast<uint8_t>(t == 4 || t == 5 ? k : 64);
  }
  configure(c);
}

// f(Rows<r>{}) for r = 0 ... R - 1. Loops over an array of sums that the compiler unrolls late leave it in memory.
template <int R, class F>
FASTLLM_INLINE inline void each(const F& f) {
  if constexpr (R > 1) each<R - 1>(f);
  f(Rows<R - 1>{});
}

// kParts: of a span. Its tile products are numbered 0 ... kProducts - 1: part 0 of both column tiles, part 1, ...
template <int kParts, bool kSigned, bool kOffsets>
struct Product {
  static constexpr int kDepth = static_cast<int>(kSpan) / kParts;  // k of a tile
  static constexpr int kProducts = 2 * kParts;
  static constexpr int kLag = kParts == 4 ? 3 : 2;  // products begun before the sums of one are stored

  template <int kI>
  FASTLLM_INLINE static void multiply(const SpanRows& rows, const Unpacked& w) {
    constexpr int kSum = kI % 4, kTile = kI % 2, kPart = kI / 2, kA = 4 + kPart % 2, kB = 6 + kTile;
    zero_tile<kSum>();
    if constexpr (kTile == 0) load_tile<kA>(rows.codes[0] + kPart * kDepth, kSpan);
    load_tile<kB>(w.codes[kTile] + kPart * kDepth * kW, 64);
    dot_tiles<kSigned, kSum, kA, kB>();
  }
  template <int kI>
  FASTLLM_INLINE static void store_sums(Sums& sums) {
    store_tile<kI % 4>(sums.of[kI % 2][kI / 2]);
  }

  // The products of a span; the sums of the last kLag stay in tiles.
  static void start(const SpanRows& rows, const Unpacked& w, Sums& sums) {
    each<kProducts>([&](auto product) FASTLLM_INLINE {
      constexpr int kI = decltype(product)::value;
      multiply<kI>(rows, w);
      if constexpr (kI >= kLag) store_sums<kI - kLag>(sums);
    });
  }

  // Scales the sums of a span of R rows onto total. Starts the next span, if kNext.
  template <int R, bool kNext>
  FASTLLM_INLINE static void step(const SpanRows& rows, const Unpacked& w, Sums& sums, bool first, float* total,
                                  const SpanRows& next_rows, const Unpacked& next_w, Sums& next_sums, const char* ahead,
                                  int64_t bytes) {
    constexpr int kHalves = R / 8, kOfUnit = 2 / kHalves;  // products beside one part of 8 rows
    each<kHalves>([&](auto half) FASTLLM_INLINE {
      constexpr int kRow = decltype(half)::value * 8;
      float* const onto = total + kRow * kW;
      vf acc[8][2];
      each<8>([&](auto at) FASTLLM_INLINE {
        constexpr int r = decltype(at)::value;
        acc[r][0] = first ? vf{} : load(onto + r * kW);
        acc[r][1] = first ? vf{} : load(onto + kTileSums + r * kW);
      });
      each<kParts>([&](auto part) FASTLLM_INLINE {
        constexpr int kPart = decltype(part)::value, kUnit = decltype(half)::value * kParts + kPart;
        each<kOfUnit>([&](auto product) FASTLLM_INLINE {
          constexpr int kI = kUnit * kOfUnit + decltype(product)::value;
          if constexpr (kI < kLag) {
            store_sums<kProducts - kLag + kI>(sums);
          } else if constexpr (kNext) {
            store_sums<kI - kLag>(next_sums);
          }
          if constexpr (kNext) multiply<kI>(next_rows, next_w);
          if (ahead)  // spread over the step: the few misses a core can have at once are soon in use
            for (int64_t line = kI * bytes / kProducts; line < (kI + 1) * bytes / kProducts; line += 64)
              __builtin_prefetch(ahead + line, 0, 3);
        });
        const vf scales[2] = {load(w.scales[kPart]), load(w.scales[kPart] + kW)};
        vf offsets[2];
        if constexpr (kOffsets) offsets[0] = load(w.offsets[kPart]), offsets[1] = load(w.offsets[kPart] + kW);
        each<8>([&](auto at) FASTLLM_INLINE {
          constexpr int r = decltype(at)::value;
          const vf xs = set1(rows.steps[kPart][kRow + r]);
          vf s;
          if constexpr (kOffsets) s = set1(rows.sums[kPart][kRow + r]);
          each<2>([&](auto tile) FASTLLM_INLINE {
            constexpr int kTile = decltype(tile)::value;
            const vi sum = reinterpret_cast<vi>(load_u32(sums.of[kTile][kPart] + (kRow + r) * kW));
            vf y = scales[kTile] * __builtin_convertvector(sum, vf);
            if constexpr (kOffsets) y = fma(offsets[kTile], s, y);
            acc[r][kTile] = fma(xs, y, acc[r][kTile]);
          });
        });
      });
      each<8>([&](auto at) FASTLLM_INLINE {
        constexpr int r = decltype(at)::value;
        store(onto + r * kW, acc[r][0]);
        store(onto + kTileSums + r * kW, acc[r][1]);
      });
    });
  }

  // Ends what was started for `now` and starts `next`.
  template <int R>
  static void run(const Work& now, const Work& next, Sums (&sums)[2], int& turn) {
    for (int64_t s = 0; s < now.spans; ++s, turn ^= 1) {
      const bool first = now.first && s == 0, last = s + 1 == now.spans;
      const char* ahead = now.ahead ? now.ahead + s * now.bytes : nullptr;
      const SpanRows* rows = now.span + s;
      const Unpacked* w = now.w + s;
      if (!last || next.rows != 0) {
        step<R, true>(*rows, *w, sums[turn], first, now.total, last ? *next.span : rows[1], last ? *next.w : w[1],
                      sums[turn ^ 1], ahead, now.bytes);
      } else {
        step<R, false>(*rows, *w, sums[turn], first, now.total, *rows, *w, sums[turn ^ 1], ahead, now.bytes);
      }
    }
  }
};

// Columns [n, n + 32) of `rows` rows.
void finish_tile(const QuantArgs& g, int64_t m, int64_t rows, int64_t n, const float* total) {
  const bool whole = n + kPanel <= g.n && !g.bias;
  for (int64_t r = 0; r < rows; ++r, total += kW) {
    const vf left = load(total), right = load(total + kTileSums);
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

template <int kParts, bool kSigned, bool kOffsets>
void gemm(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  using P = Product<kParts, kSigned, kOffsets>;
  const int64_t groups = groups_of(g), spans = spans_of(g.k), per_span = kSpan / g.group;
  const int64_t bytes = quant_block_bytes(g.bits, g.group, g.offsets), span_bytes = per_span * bytes;
  const int64_t chunk_spans = m1 - m0 < kManyRows ? 1 : kChunk;
  Unpacked chunks[2][kChunk];
  Sums sums[2];
  alignas(64) float totals[kStripRows * kPanel];
  int chunk = 0, turn = 0;
  // All tiles of rows have one height: another would have to wait for the pipeline to drain.
  const bool high = m1 - m0 > 8;
  const auto run = high ? P::template run<16> : P::template run<8>;
  configure_rows(high ? 16 : 8, P::kDepth);
  Work now{};
  // What is pushed runs at the next call, beside the tiles' part of the work pushed then.
  const auto push = [&](const Work& next) {
    if (now.rows == 0) {
      P::start(*next.span, *next.w, sums[turn]);
    } else {
      run(now, next, sums, turn);
      if (now.last) finish_tile(g, now.m, now.rows, now.panel * kPanel, now.total);
    }
    now = next;
  };
  for (int64_t p = p0; p < p1; ++p) {
    const char* w = static_cast<const char*>(g.w) + p * groups * bytes;
    for (int64_t strip = m0; strip < m1; strip += kStripRows) {
      const int64_t end = m1 - strip < kStripRows ? m1 : strip + kStripRows;
      for (int64_t s = 0; s < spans; s += chunk_spans) {
        const int64_t count = spans - s < chunk_spans ? spans - s : chunk_spans;
        chunk ^= 1;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t first = (s + i) * per_span, left = groups - first;
          unpack(g, w + first * bytes, left < per_span ? left : per_span, chunks[chunk][i]);
        }
        for (int64_t m = strip; m < end; m += kTileRows) {
          push({.rows = end - m < kTileRows ? end - m : kTileRows,
                .span = rows_of(g, m) + s,
                .w = chunks[chunk],
                .spans = count,
                .first = s == 0,
                .last = s + count == spans,
                .m = m,
                .panel = p,
                .total = totals + (m - strip) * kPanel,
                .ahead = m == strip ? w + (s + 2 * chunk_spans) * span_bytes : nullptr,
                .bytes = span_bytes});
        }
      }
    }
  }
  push({});
  release();
}

template <int kParts>
void gemm_parts(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const auto run = !g.offsets    ? gemm<kParts, true, false>
                   : g.bits == 4 ? gemm<kParts, true, true>
                                 : gemm<kParts, false, true>;
  run(g, m0, m1, p0, p1);
}

void gemm_quant(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int most = (1 << g.bits) - 1;
  const bool fits = g.offsets || (g.zero <= 128 && most - g.zero <= 127);
  if (m1 - m0 <= kFewRows || !fits) {
    FASTLLM_ISA::multiply_rows(g, m0, m1, p0, p1);
    return;
  }
  const auto run = quant_part(g.group) == 32 ? gemm_parts<4> : gemm_parts<2>;
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

// The product with grouped weights on AMX tiles, for more than a few rows; kernels.h defines the sums.
//
//   for m, n: acc = 0; for parts: acc = fma(xs[m][part], scale[n][g] * sum_k (code[n][k] - zero) * xq[m][k], acc)
//
// A part has steps and scales of its own, so its sums leave the tiles at once: they are stored and come back as vectors
// to be scaled. A unit is four parts of 16 rows by 16 columns. While the vectors scale those of one unit, the tiles
// work on the next one, be it of the next panel:
//
//     unit i      vectors  scale part 0          scale part 1          ...
//     unit i + 1  tiles    part 0, stored two    part 1                ...     four tiles hold its weights, of which
//                          parts later                                         row after row of tiles makes use
//
// Codes become signed bytes and scales fp32 one unit ahead, once for all rows. What a unit touches fits the first-level
// cache: rows are taken kRowTiles tiles at a time, and sums in flight fill a ring of 8 KB (of 32 KB: twice the time).
// Cost: N K (bits + 16 / G) / 8 bytes while M is small. Benchmark: fastllm_bench_ops --benchmark_filter=Quant
#include "backend/cpu/kernels/micro.h"
#include "backend/cpu/kernels/quant.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kFewRows = 24;  // up to here vectors alone are as fast, and no neighbour slows them down
constexpr int kParts = 4;         // of a unit
constexpr int64_t kRowTiles = 4;  // that share the weights of a unit in tiles
constexpr int64_t kTileSums = kTileRows * kW;
constexpr int64_t kCodesAhead = 8 << 10;  // bytes of codes asked for ahead of use

// How sums become numbers: times a scale; from what a row's sum starts with, times a scale; or with an offset too.
enum class Scaling { Plain, Start, Offset };

// Sixteen columns of a unit.
template <int64_t kPart>
struct alignas(64) Weights {
  uint8_t codes[kParts][kPart * kW];  // [quads][16 columns][4]
  float scales[kParts][kW], offsets[kParts][kW];
};

// Sixteen rows by sixteen columns of a unit.
template <int64_t kPart>
struct Unit {
  int parts;             // 0: nothing
  bool load, first;      // its weights are not in the tiles yet; its sums start
  const SpanRows* span;  // its first
  const Weights<kPart>* w;
  float* total;       // [16][16]
  const char* ahead;  // asked for beside each part: `lines` lines, a part's after the other
  int64_t lines;
};

// Tiles 0, 1: sums; 2, 3: A, rows; 4 to 7: B, the weights of the four parts.
void configure_rows(int64_t k) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<uint8_t>(t < 4 ? kTileRows : k / 4);
    c.bytes_per_row[t] = static_cast<uint8_t>(t == 2 || t == 3 ? k : 64);
  }
  configure(c);
}

template <int64_t kPart, bool kSigned, Scaling kScaling>
class Pipeline {
 public:
  Pipeline() { configure_rows(kPart); }
  ~Pipeline() { release(); }

  // Scales the sums of the unit before, and multiplies this one.
  void push(const Unit<kPart>& next) {
    step(next);
    now_ = next;
    turn_ ^= 1;
  }

 private:
  static constexpr int64_t kPartsOfSpan = kSpan / kPart;

  static const SpanRows& span_of(const Unit<kPart>& u, int part) { return u.span[part / kPartsOfSpan]; }

  template <int kI>
  FASTLLM_INLINE void multiply(const Unit<kPart>& u) {
    constexpr int kC = kI % 2, kA = 2 + kI % 2, kB = 4 + kI;
    save<kC>();
    if (u.load) load_tile<kB>(u.w->codes[kI], 64);
    load_tile<kA>(span_of(u, kI).codes[0] + kI % kPartsOfSpan * kPart, kSpan);
    zero_tile<kC>();
    dot_bytes<true, kSigned, kC, kA, kB>();
    waiting_[kC] = sums_[turn_ ^ 1][kI];
  }
  template <int kC>
  FASTLLM_INLINE void save() {
    if (waiting_[kC]) store_tile<kC>(waiting_[kC], 64);
    waiting_[kC] = nullptr;
  }

  FASTLLM_INLINE void step(const Unit<kPart>& next) {
    vf acc[kTileRows];
    each<kTileRows>([&](auto at) FASTLLM_INLINE {
      constexpr int r = decltype(at)::value;
      acc[r] = now_.first || now_.parts == 0 ? vf{} : load(now_.total + r * kW);
    });
    each<kParts>([&](auto part) FASTLLM_INLINE {
      constexpr int kI = decltype(part)::value;
      if (kI < next.parts) multiply<kI>(next);
      // Spread over the parts: the few misses that a core can have at once are soon in use.
      for (int64_t line = kI * next.lines; line < (kI + 1) * next.lines; ++line)
        __builtin_prefetch(next.ahead + line * 64, 0, 3);
      if (kI >= now_.parts) return;
      const int32_t* sums = sums_[turn_][kI];
      if (waiting_[kI % 2] == sums) save<kI % 2>();
      const SpanRows& rows = span_of(now_, kI);
      constexpr int kAt = kI % kPartsOfSpan;
      const vf scale = load(now_.w->scales[kI]);
      vf offset;
      if constexpr (kScaling == Scaling::Offset) offset = load(now_.w->offsets[kI]);
      each<kTileRows>([&](auto at) FASTLLM_INLINE {
        constexpr int r = decltype(at)::value;
        __m512i sum = _mm512_load_si512(sums + r * kW);
        if constexpr (kScaling == Scaling::Start) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(rows.starts[kAt][r]));
        vf y = scale * _mm512_cvtepi32_ps(sum);
        if constexpr (kScaling == Scaling::Offset) y = fma(offset, set1(rows.sums[kAt][r]), y);
        acc[r] = fma(set1(rows.steps[kAt][r]), y, acc[r]);
      });
    });
    if (now_.parts == 0) return;
    each<kTileRows>([&](auto at) FASTLLM_INLINE {
      constexpr int r = decltype(at)::value;
      store(now_.total + r * kW, acc[r]);
    });
  }

  int turn_ = 0;
  Unit<kPart> now_{};
  int32_t* waiting_[2] = {};  // where the sums in tiles 0 and 1 go
  alignas(64) int32_t sums_[2][kParts][kTileSums];
};

template <int kBits>
void unpack_codes(const char* w, uint8_t minus, int64_t quads, uint8_t* to) {
  const __m512i less = _mm512_set1_epi8(static_cast<char>(minus));
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
    _mm512_store_si512(to + quad * 64, _mm512_sub_epi8(low, less));
    _mm512_store_si512(to + quad * 64 + 64, _mm512_sub_epi8(high, less));
  }
}

template <int64_t kPart, int kBits, Scaling kScaling>
class Product {
 public:
  Product(const QuantArgs& g, int64_t m0, int64_t m1)
      : g_(g),
        m0_(m0),
        m1_(m1),
        group_(kPart == 32 ? 32 : g.group),
        groups_(groups_of(g)),
        parts_(groups_ * (group_ / kPart)),
        units_((parts_ + kParts - 1) / kParts),
        slots_(slots_of(m1 - m0, units_)),
        code_bytes_(quant_code_bytes(kBits, group_)),
        block_bytes_(quant_block_bytes(kBits, group_, g.offsets)),
        totals_(reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(g.sums), kLine))),
        weights_(reinterpret_cast<Halves*>(totals_ + kTotals)) {}

  // Floats of room that a product needs.
  static int64_t room(int64_t rows, int64_t k, int64_t group) {
    const int64_t parts = round_up(k, group) / kPart;
    return kLine / 4 + kTotals +
           slots_of(rows, (parts + kParts - 1) / kParts) * static_cast<int64_t>(sizeof(Halves)) / 4;
  }

  void run(int64_t p0, int64_t p1) {
    Pipeline<kPart, kSigned, kScaling> pipeline;
    at_ = static_cast<const char*>(g_.w) + p0 * groups_ * block_bytes_;
    left_ = (p1 - p0) * units_;
    unpack();
    const int64_t unit_bytes = kParts * kPart * block_bytes_ / group_;
    int64_t slot = 0, finish_m = 0, finish_p = -1;  // rows and panel that are done with the next push
    for (int64_t p = p0; p < p1; ++p) {
      for (int64_t m = m0_; m < m1_; m += kBlockRows) {
        const int64_t end = m1_ - m < kBlockRows ? m1_ : m + kBlockRows;
        for (int64_t u = 0; u < units_; ++u) {
          if (m == m0_) unpack();
          const int64_t steps = 2 * kParts * ((end - m + kTileRows - 1) / kTileRows);
          const int64_t lines = m == m0_ ? (unit_bytes / 64 + steps - 1) / steps : 0;
          const char* ahead = at_ + kCodesAhead;
          const int64_t here = (slot + u) % slots_;
          for (int c = 0; c < 2; ++c) {
            for (int64_t r = m; r < end; r += kTileRows) {
              pipeline.push({.parts = static_cast<int>(parts_ - u * kParts < kParts ? parts_ - u * kParts : kParts),
                             .load = r == m,
                             .first = u == 0,
                             .span = rows_of(g_, r) + u * kParts * kPart / kSpan,
                             .w = &weights_[here][c],
                             .total = total_of(m, r, c),
                             .ahead = ahead,
                             .lines = lines});
              ahead += kParts * lines * 64;
              if (finish_p >= 0) {
                finish(finish_m, finish_p);
                finish_p = -1;
              }
            }
          }
        }
        finish_m = m, finish_p = p;
      }
      slot = (slot + units_) % slots_;
    }
    pipeline.push({});
    finish(finish_m, finish_p);
  }

 private:
  // A symmetric code less its zero is a byte with a sign, unless the zero is far from the middle.
  static constexpr bool kSigned = kBits == 4 || kScaling == Scaling::Plain;
  static constexpr int64_t kBlockRows = kRowTiles * kTileRows, kTotals = kBlockRows * kPanel, kLine = 64;
  typedef Weights<kPart> Halves[2];  // of a unit of a panel

  // Unpacked units: of few rows, those at work, next and after next; of many, a panel and two more.
  static int64_t slots_of(int64_t rows, int64_t units) { return rows > kBlockRows ? units + 2 : 3; }

  float* total_of(int64_t m, int64_t row, int c) const { return totals_ + ((row - m) / kTileRows * 2 + c) * kTileSums; }
  void finish(int64_t m, int64_t p) const {
    const int64_t end = m1_ - m < kBlockRows ? m1_ : m + kBlockRows;
    for (int64_t r = m; r < end; ++r) {
      const float* total = total_of(m, r, 0) + r % kTileRows * kW;
      finish_columns(g_, r, p * kPanel, load(total));
      finish_columns(g_, r, p * kPanel + kW, load(total + kTileSums));
    }
  }

  // The unit behind those unpacked so far, if there is one.
  void unpack() {
    if (left_ == 0) return;
    --left_;
    Halves& to = weights_[slot_];
    slot_ = (slot_ + 1) % slots_;
    const int64_t parts = parts_ - done_ < kParts ? parts_ - done_ : kParts;
    constexpr uint8_t kFlip = 128;
    const uint8_t minus = kScaling != Scaling::Plain ? 0 : kBits == 8 ? kFlip : static_cast<uint8_t>(g_.zero);
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t in_group = (done_ + i) * kPart % group_;  // k
      const auto* scales = reinterpret_cast<const uint16_t*>(at_ + code_bytes_);
      for (int c = 0; c < 2; ++c) {
        unpack_codes<kBits>(at_ + c * code_bytes_ / 2 + in_group * kW * kBits / 8, minus, kPart / 4, to[c].codes[i]);
        store(to[c].scales[i], load_half(scales + c * kW));
        if constexpr (kScaling == Scaling::Offset) store(to[c].offsets[i], load_half(scales + kPanel + c * kW));
      }
      if (in_group + kPart == group_) at_ += block_bytes_;
    }
    done_ += parts;
    if (done_ == parts_) done_ = 0;
  }

  const QuantArgs& g_;
  int64_t m0_, m1_;
  int64_t group_, groups_, parts_, units_, slots_;  // parts and units of a panel
  int64_t code_bytes_, block_bytes_;                // of a group
  float* totals_;                                   // [row tiles][2][16][16]
  Halves* weights_;                                 // [slots]
  // What is unpacked next.
  const char* at_ = nullptr;                // its block
  int64_t left_ = 0, slot_ = 0, done_ = 0;  // units; of slots_; parts of the panel
};

template <int64_t kPart, int kBits>
void gemm(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (g.offsets) {
    Product<kPart, kBits, Scaling::Offset>(g, m0, m1).run(p0, p1);
  } else if (kBits == 4 || g.zero == 128) {
    Product<kPart, kBits, Scaling::Plain>(g, m0, m1).run(p0, p1);
  } else {
    Product<kPart, kBits, Scaling::Start>(g, m0, m1).run(p0, p1);
  }
}

void gemm_quant(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (m1 - m0 <= kFewRows) {
    FASTLLM_ISA::multiply_rows(g, m0, m1, p0, p1);
    return;
  }
  const auto run =
      quant_part(g.group) == 32 ? (g.bits == 4 ? gemm<32, 4> : gemm<32, 8>) : (g.bits == 4 ? gemm<64, 4> : gemm<64, 8>);
  run(g, m0, m1, p0, p1);
}

int64_t quant_sums(int64_t rows, int64_t k, int64_t group) {
  if (rows <= kFewRows) return 0;
  return quant_part(group) == 32 ? Product<32, 8, Scaling::Offset>::room(rows, k, group)
                                 : Product<64, 8, Scaling::Offset>::room(rows, k, group);
}

}  // namespace

void FASTLLM_ISA::fill_quant_amx(Kernels& t) {
  constexpr int kEdx = 3, kAmxInt8 = 25;
  if (!cpu_has(0, kEdx, kAmxInt8)) return;
  t.gemm_quant = gemm_quant;
  t.quant_sums = quant_sums;
}

}  // namespace fastllm::cpu

#else
void fastllm::cpu::FASTLLM_ISA::fill_quant_amx(Kernels&) {}
#endif

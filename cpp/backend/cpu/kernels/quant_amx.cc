// The product with grouped weights on AMX tiles: codes become bf16 in the first-level cache and meet bf16 rows.
//
//   for m, n: s = 0; for k: s += bf16(x[m][k]) * bf16(scale[n][g] * code[n][k] + offset[n][g])   (kernels.h)
//
// Weights are the A operand, since 32 adjacent k of one column are a line of it: those of 4 bits are looked up in a
// table of 16 numbers that a column has for each group, those of 8 bits become floats by their place in one. While the
// tiles multiply a slab, vectors convert the next one, a little beside each k block, and ask for the codes behind it:
//
//     slab i       row block 0, 1, ...   for each 32 k: convert a part of slab i + 1; four products of tiles
//     slab i + 1   row block 0, 1, ...   ... slab i + 2, be it of the next panel
//
// Cost: N K (bits + 16 / G) / 8 bytes while M is small, where converting takes nearly as long as reading; 2 M N K
// operations when it is large. Benchmark: fastllm_bench_ops --benchmark_filter=Quant
#include "backend/cpu/kernels/half.h"
#include "backend/cpu/kernels/tile_product.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

constexpr int64_t kSlab = 16;             // k blocks of 32 of a slab at most
constexpr int64_t kFewSlab = 4;           // the same for one row block, whose sums stay in tiles
constexpr int64_t kCodesAhead = 8 << 10;  // bytes of codes asked for ahead of use
constexpr int64_t kTogether = 8;          // runs of 32 k of a column that are converted at once
constexpr int64_t kFewRows = 4;           // up to here rows are gathered out of transposed sums

// Codes of some columns of a group, on their way to bf16.
template <int kBits, int kRuns>  // runs of 32 k of a group
class Converter {
 public:
  explicit Converter(const QuantArgs& g) : offsets_(g.offsets), zero_(static_cast<float>(g.zero)) {}

  // From this block on, to [32 k][32 columns][32 of bf16].
  void start(const char* block, int64_t blocks, uint16_t* to) {
    codes_ = block;
    to_ = to;
    left_ = blocks * kPanel;
  }
  // The next kTogether runs, if there are any.
  void step() {
    if (left_ == 0) return;
    if (column_ == 0) read_scales();
    for (int64_t line = 0; line < kTogether * kRunBytes; line += 64)
      __builtin_prefetch(codes_ + kCodesAhead + line, 0, 3);
    const float *scale = scale_ + column_, *offset = offset_ + column_;
    uint16_t* to = to_ + column_ * 32;
    const char* codes = codes_;
    for (int64_t c = 0; c < kColumns; ++c)
      convert(codes + c * kRuns * kRunBytes, _mm512_set1_ps(scale[c]), _mm512_set1_ps(offset[c]), to + c * 32);
    codes_ = codes + kTogether * kRunBytes;
    left_ -= kColumns;
    column_ += kColumns;
    if (column_ < kPanel) return;
    column_ = 0;
    codes_ += kPanel * (offsets_ ? 4 : 2);
    to_ += kRuns * 2 * kTile;
  }
  void finish() {
    while (left_ > 0) step();
  }

 private:
  static constexpr int64_t kRunBytes = 4 * kBits;  // of codes
  static constexpr int64_t kColumns = kTogether / kRuns;

  // Of 8 bits, codes come as kFar + code, whose last bit is 2^-8.
  static constexpr float kFar = kBits == 4 ? 0.0f : 32768.0f;
  struct BitOffsets {
    uint8_t of[64];
  };
  // Of each byte in its eight bytes: where the code of its number is, less 2.
  static constexpr BitOffsets bit_offsets() {
    BitOffsets at{};
    for (int i = 0; i < 64; ++i) at.of[i] = static_cast<uint8_t>((i % 8 / 2 * 16 + i / 16 * 4 + 62) % 64);
    return at;
  }

  void read_scales() {
    const auto* halves = reinterpret_cast<const uint16_t*>(codes_ + kPanel * kRuns * kRunBytes);
    for (int64_t i = 0; i < kPanel; i += kW) {
      const vf scale = load_half(halves + i);
      store(scale_ + i, scale);
      store(offset_ + i, fma(scale, set1(-(zero_ + kFar)), offsets_ ? load_half(halves + kPanel + i) : vf{}));
    }
    __builtin_prefetch(reinterpret_cast<const char*>(halves) + kCodesAhead, 0, 3);
  }
  // To the nearest bf16 in the high half, the greater one of two. VCVTNE2PS2BF16 takes four slots for the same.
  static __m512i rounded(__m512 x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }
  static __m128i load_16(const char* codes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)); }

  // The runs of one column of a group.
  static void convert(const char* codes, __m512 scale, __m512 offset, uint16_t* to) {
    if constexpr (kBits == 4) {
      const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i table = rounded(_mm512_fmadd_ps(scale, levels, offset));
      // The code of k = 8 lane + i is that of bits 4 lane to 4 lane + 3 of word i. It goes to bits 2 to 5 of both bytes
      // of its number, which makes them the places of the upper bytes of table[code].
      alignas(64) static constexpr auto kBits2To5 = bit_offsets();
      const __m512i where = _mm512_load_si512(kBits2To5.of);
      const __m512i code = _mm512_set1_epi8(0x3c), upper = _mm512_set1_epi16(0x0302);
      for (int run = 0; run < kRuns; ++run, codes += kRunBytes, to += 2 * kTile) {
        const __m512i bits = _mm512_multishift_epi64_epi8(where, _mm512_broadcast_i32x4(load_16(codes)));
        constexpr int kAndOr = 0xea;
        const __m512i bytes = _mm512_ternarylogic_epi32(bits, code, upper, kAndOr);
        _mm512_store_si512(to, _mm512_permutexvar_epi8(bytes, table));
      }
    } else {
      // A code is the second lowest byte of kFar + code. The first 16 are those of even k.
      const __m512i far = _mm512_castps_si512(_mm512_set1_ps(kFar));
      const __m512i lane = _mm512_setr_epi32(0x000, 0x100, 0x200, 0x300, 0x400, 0x500, 0x600, 0x700, 0x800, 0x900,
                                             0xa00, 0xb00, 0xc00, 0xd00, 0xe00, 0xf00);
      const __m512i odd_lane = _mm512_or_si512(lane, _mm512_set1_epi32(0x1000));
      const __m512i upper = _mm512_set1_epi32(0x0f0e0302);
      const __m512i upper_in_lane =
          _mm512_add_epi8(upper, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x00000404, 0x00000808, 0x00000c0c)));
      for (int run = 0; run < kRuns; ++run, codes += kRunBytes, to += 2 * kTile) {
        const __m512i all = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        const auto numbers = [&](__m512i places) {
          const __m512i x = _mm512_mask_permutexvar_epi8(far, 0x2222222222222222u, places, all);
          return rounded(_mm512_fmadd_ps(scale, _mm512_castsi512_ps(x), offset));
        };
        const __m512i even = numbers(lane), odd = numbers(odd_lane);
        _mm512_store_si512(to, _mm512_mask_shuffle_epi8(odd, 0x3333333333333333u, even, upper_in_lane));
      }
    }
  }

  bool offsets_;
  float zero_;
  const char* codes_ = nullptr;
  uint16_t* to_ = nullptr;
  int64_t left_ = 0, column_ = 0;  // columns of groups; the next one of the group
  alignas(64) float scale_[kPanel], offset_[kPanel];
};

int64_t runs_of(int64_t group) { return group / 32; }
int64_t blocks_of(int64_t k, int64_t group) { return round_up(k, group) / 32; }

Cut cut_rows(int64_t row_blocks, int64_t k, int64_t group) {
  const int64_t unit = runs_of(group), k_blocks = blocks_of(k, group);
  if (row_blocks == 1) return {k_blocks, kFewSlab, k_blocks};
  return cut_of(row_blocks, k_blocks, kSlab / unit * unit, unit);
}

int64_t prepared_quant_bytes(int64_t k, int64_t group) { return kRowBlock * blocks_of(k, group) * 32 * 2; }

int64_t quant_sums(int64_t rows, int64_t panels, int64_t k, int64_t group) {
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  return waiting_sums(row_blocks, panels, cut_rows(row_blocks, k, group));
}

// 32 adjacent k of a row, zeros behind n of them, as bf16.
__m512i load_k(const uint16_t* x, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(x);
  return _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, x);
}
__m512i load_k(const float* x, int64_t n) {
  const vf low = n >= kW ? load(x) : n > 0 ? load(x, n) : vf{};
  const vf high = n >= 2 * kW ? load(x + kW) : n > kW ? load(x + kW, n - kW) : vf{};
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

template <class T>
__m512i load_row(const QuantRows& rows, int64_t m, int64_t k) {
  const T* x = static_cast<const T*>(rows.x) + m * rows.ldx;
  const int64_t n = rows.k - k;
  if (!rows.order) return load_k(x + k, n);
  T sorted[32];
  for (int64_t i = 0; i < 32 && i < n; ++i) sorted[i] = x[rows.order[k + i]];
  return load_k(sorted, n);
}

// Up to 16 rows, as one tile for each 32 k.
template <class T>
void prepare_tile(const QuantRows& rows, int64_t m, int64_t count, int64_t step, uint16_t* to) {
  const int64_t padded = round_up(rows.k, rows.group), width = width_of(count);
  const auto lanes = static_cast<__mmask16>((1u << width) - 1);
  for (int64_t k = 0; k < padded; k += 32, to += step) {
    if (count == 1) {
      _mm512_storeu_si512(to, load_row<T>(rows, m, k));
      continue;
    }
    vf r[16];
    for (int64_t i = 0; i < 16; ++i) r[i] = i < count ? reinterpret_cast<vf>(load_row<T>(rows, m + i, k)) : vf{};
    transpose16(r);
    for (int64_t pair = 0; pair < 16; ++pair) _mm512_mask_storeu_ps(to + pair * width * 2, lanes, r[pair]);
  }
}

void prepare_quant(const QuantRows& rows, int64_t begin, int64_t end, void* prepared) {
  const auto tile = rows.x_bf16 ? prepare_tile<uint16_t> : prepare_tile<float>;
  for (int64_t m = begin; m < end; m += kRowBlock) {
    auto* block = static_cast<uint16_t*>(prepared) + m * blocks_of(rows.k, rows.group) * 32;
    const int64_t count = end - m < kRowBlock ? end - m : kRowBlock;
    const int64_t step = tiles_of<First::Weights>(block, count, 0).step;
    tile(rows, m, count < 16 ? count : 16, step, block);
    if (count > 16) tile(rows, m + 16, count - 16, step, block + kTile);
  }
}

// c as end_sums() leaves it becomes [rows, 32].
void transpose_sums(int64_t rows, float* c) {
  for (int64_t first = 0; first < rows; first += 16, c += 16 * kPanel) {
    const int64_t count = rows - first < 16 ? rows - first : 16;
    if (count <= kFewRows) {
      const __m512i lines = _mm512_mullo_epi32(reinterpret_cast<__m512i>(iota()), _mm512_set1_epi32(kPanel));
      vf r[kFewRows][2];
      for (int64_t i = 0; i < count; ++i)
        for (int64_t v = 0; v < 2; ++v) r[i][v] = _mm512_i32gather_ps(lines, c + v * kW + i, 4);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t v = 0; v < 2; ++v) store(c + i * kPanel + v * kW, r[i][v]);
      continue;
    }
    for (int64_t v = 0; v < 2; ++v) {
      vf r[16];
      for (int64_t i = 0; i < 16; ++i) r[i] = load(c + i * kPanel + v * kW);
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) store(c + i * kPanel + v * kW, r[i]);
    }
  }
}

// Where a product is: a slab of a panel within a stretch.
struct Place {
  int64_t from, to;  // k blocks of the stretch
  int64_t panel, k;  // the first k block of the slab
  int64_t length;    // k blocks of the slab
};
// The slab after p, of length 0 after the last one.
Place after(Place p, const Cut& cut, int64_t p0, int64_t p1) {
  p.k += p.length;
  if (p.k == p.to) {
    if (++p.panel == p1) {
      p.panel = p0;
      p.from = p.to;
      p.to = p.from + cut.stretch < cut.k_blocks ? p.from + cut.stretch : cut.k_blocks;
    }
    p.k = p.from;
  }
  p.length = p.to - p.k < cut.slab ? p.to - p.k : cut.slab;
  return p;
}

template <int kBits, int kRuns>
class Product {
 public:
  explicit Product(const QuantArgs& g, int64_t m0, int64_t m1)
      : g_(g),
        m0_(m0),
        rows_(m1 - m0),
        row_blocks_((rows_ + kRowBlock - 1) / kRowBlock),
        cut_(cut_rows(row_blocks_, g.k, g.group)),
        convert_(g) {}

  void run(int64_t p0, int64_t p1) {
    configure_rows<First::Weights>(rows_ < kRowBlock ? rows_ : kRowBlock);
    const bool stretched = cut_.stretch < cut_.k_blocks;
    const int64_t to = stretched ? cut_.stretch : cut_.k_blocks;
    Place now{0, to, p0, 0, cut_.slab < to ? cut_.slab : to};
    convert(now, slabs_[0]);
    convert_.finish();
    for (int turn = 0; now.length > 0; turn ^= 1) {
      const Place next = after(now, cut_, p0, p1);
      if (next.length > 0) convert(next, slabs_[turn ^ 1]);
      float* c = g_.sums + (stretched ? (now.panel - p0) * row_blocks_ * kBlockSums : 0);
      multiply(now, next.length, slabs_[turn], c);
      convert_.finish();
      if (now.k + now.length == cut_.k_blocks) finish(now.panel, c);
      now = next;
    }
    release();
  }

 private:
  void convert(const Place& p, uint16_t* slab) {
    const int64_t bytes = quant_block_bytes(kBits, g_.group, g_.offsets);
    const int64_t block = (p.panel * cut_.k_blocks + p.k) / kRuns;
    convert_.start(static_cast<const char*>(g_.w) + block * bytes, p.length / kRuns, slab);
  }

  // next: the k blocks that are converted meanwhile
  void multiply(const Place& p, int64_t next, const uint16_t* slab, float* c) {
    const int64_t steps = next * kPanel / kTogether, parts = row_blocks_ * p.length * 4;
    const int64_t each = (steps + parts - 1) / parts;
    const auto beside = [&](int64_t, int) {
      for (int64_t i = 0; i < each; ++i) convert_.step();
    };
    const bool start = p.k == 0;
    const uint16_t* block = static_cast<const uint16_t*>(g_.a) + m0_ * cut_.k_blocks * 32;
    if (rows_ <= kRowBlock) {
      const RowTiles tiles = tiles_of<First::Weights>(block, rows_, p.k);
      const bool end = p.k + p.length == cut_.k_blocks;
      rows_ > 16 ? add_once<true>(tiles, slab, p.length, start, end, beside, c)
                 : add_once<false>(tiles, slab, p.length, start, end, beside, c);
      return;
    }
    for (int64_t left = rows_; left > 0; left -= kRowBlock, block += kRowBlock * cut_.k_blocks * 32, c += kBlockSums) {
      const int64_t here = left < kRowBlock ? left : kRowBlock;
      const RowTiles tiles = tiles_of<First::Weights>(block, here, p.k);
      if (here < kRowBlock) configure_rows<First::Weights>(here);
      here > 16 ? add<true>(tiles, slab, p.length, start, beside, c)
                : add<false>(tiles, slab, p.length, start, beside, c);
      if (here < kRowBlock) configure_rows<First::Weights>(kRowBlock);
    }
  }
  template <bool kHigh, class Beside>
  static void add(const RowTiles& tiles, const uint16_t* slab, int64_t length, bool start, Beside& beside, float* c) {
    begin_sums<kHigh>(start, c);
    add_blocks<First::Weights, kHigh, true>(tiles, slab, length, beside);
    end_sums<kHigh>(c);
  }
  // Of one row block, whose sums stay in tiles.
  template <bool kHigh, class Beside>
  static void add_once(const RowTiles& tiles, const uint16_t* slab, int64_t length, bool start, bool end,
                       Beside& beside, float* c) {
    if (start) begin_sums<kHigh>(true, c);
    add_blocks<First::Weights, kHigh, false>(tiles, slab, length, beside);
    if (end) end_sums<kHigh>(c);
  }

  void finish(int64_t panel, float* c) {
    for (int64_t r = 0; r < rows_; r += kRowBlock, c += kBlockSums) {
      const int64_t here = rows_ - r < kRowBlock ? rows_ - r : kRowBlock;
      transpose_sums(here, c);
      finish_block(g_, m0_ + r, here, panel * kPanel, c);
    }
  }

  const QuantArgs& g_;
  int64_t m0_, rows_, row_blocks_;
  Cut cut_;
  Converter<kBits, kRuns> convert_;
  alignas(64) uint16_t slabs_[2][kSlab * 2 * kTile];
};

template <int kBits, int kRuns>
void gemm(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (p0 < p1) Product<kBits, kRuns>(g, m0, m1).run(p0, p1);
}

void gemm_quant(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const auto run = g.bits == 8 ? (g.group == 32   ? gemm<8, 1>
                                  : g.group == 64 ? gemm<8, 2>
                                                  : gemm<8, 4>)
                               : (g.group == 32   ? gemm<4, 1>
                                  : g.group == 64 ? gemm<4, 2>
                                                  : gemm<4, 4>);
  run(g, m0, m1, p0, p1);
}

}  // namespace

void FASTLLM_ISA::fill_quant(Kernels& t) {
  t.code_order = CodeOrder::Columns;
  t.prepared_quant_bytes = prepared_quant_bytes;
  t.prepare_quant = prepare_quant;
  t.gemm_quant = gemm_quant;
  t.gemm_quant_plain = gemm_quant;
  t.quant_sums = quant_sums;
}

}  // namespace fastllm::cpu

#endif

// A pair of neighbouring numbers of a row is one word, and a panel has the words of 16 rows side by side:
//
//   for each 32 columns b, for each 16 rows h:  panel[b][h][pair][row] = rows[16 h + row][32 b + 2 pair ...]
//
// so every 16 x 16 words are transposed, as 4 x 4 blocks in registers. Cost: 2 bytes read and written per number.
#include "backend/cpu/interleave.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "backend/cpu/kernels.h"

namespace fastllm::cpu {
namespace {

constexpr std::int64_t kTile = 16;         // rows, and words of a row
constexpr std::int64_t kWide = 2 * kTile;  // numbers of a row

typedef std::uint32_t Words __attribute__((vector_size(16)));

Words load(const std::uint16_t* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

// Elements of x, then of y, by number.
template <unsigned A, unsigned B, unsigned C, unsigned D>
Words pick(Words x, Words y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, A, B, C, D);
#else
  return __builtin_shuffle(x, y, Words{A, B, C, D});
#endif
}

// 16 rows, `stride` numbers apart, into 16 x 16 words.
void transpose(const std::uint16_t* rows, std::int64_t stride, std::uint16_t* out) {
  for (std::int64_t r = 0; r < kTile; r += 4) {
    for (std::int64_t w = 0; w < kTile; w += 4) {
      const std::uint16_t* from = rows + r * stride + w * 2;
      const Words a = load(from), b = load(from + stride), c = load(from + 2 * stride), d = load(from + 3 * stride);
      const Words ab_low = pick<0, 4, 1, 5>(a, b), ab_high = pick<2, 6, 3, 7>(a, b);
      const Words cd_low = pick<0, 4, 1, 5>(c, d), cd_high = pick<2, 6, 3, 7>(c, d);
      const std::array<Words, 4> columns = {pick<0, 1, 4, 5>(ab_low, cd_low), pick<2, 3, 6, 7>(ab_low, cd_low),
                                            pick<0, 1, 4, 5>(ab_high, cd_high), pick<2, 3, 6, 7>(ab_high, cd_high)};
      for (std::int64_t i = 0; i < 4; ++i)
        std::memcpy(out + ((w + i) * kTile + r) * 2, &columns[static_cast<std::size_t>(i)], sizeof(Words));
    }
  }
}

}  // namespace

void interleave_rows(const std::uint16_t* rows, std::int64_t n, std::int64_t k, std::uint16_t* panel) {
  static_assert(kPanel == 2 * kTile);
  for (std::int64_t k0 = 0; k0 < k; k0 += kWide, panel += kPanel * kWide) {
    for (std::int64_t r0 = 0; r0 < n; r0 += kTile) {
      const std::uint16_t* from = rows + r0 * k + k0;
      std::uint16_t* out = panel + r0 * kWide;
      const std::int64_t height = std::min(kTile, n - r0), width = std::min(kWide, k - k0);
      if (height == kTile && width == kWide) {
        transpose(from, k, out);
        continue;
      }
      std::array<std::uint16_t, kTile * kWide> edge{};
      for (std::int64_t r = 0; r < height; ++r) std::copy_n(from + r * k, width, edge.data() + r * kWide);
      transpose(edge.data(), kWide, out);
    }
  }
}

}  // namespace fastllm::cpu

// Checkpoints that store [in, out] are read in blocks of 8 rows: a few adjacent words of each line of the file, and as
// many cache lines of the result, so that neither is read or written twice from memory.
#include "model/unpack_codes.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

#include "fastllm/error.h"
#include "model/dequant_blocks.h"

namespace fastllm {
namespace {

constexpr std::int64_t kRowBlock = 8;

// A rectangle of codes on its way out.
struct Window {
  std::int64_t row_begin, row_end, col_begin, col_end;
  std::uint8_t* out;

  std::uint8_t* row(std::int64_t r) const { return out + (r - row_begin) * (col_end - col_begin); }
};

// The codes of a word as bytes, the first one lowest.
template <int kBits>
std::uint64_t spread(std::uint32_t word) {
  std::uint64_t x = word;
  if constexpr (kBits == 4) {
    x = (x | x << 16) & 0x0000ffff0000ffffu;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
  }
  return x;
}

// Bytes of row r that belong to columns [first, first + n), as far as they are wanted.
template <std::int64_t n>
void put(const Window& w, std::int64_t r, std::int64_t first, std::uint64_t bytes) {
  const std::int64_t begin = std::max(first, w.col_begin), end = std::min(first + n, w.col_end);
  std::array<std::uint8_t, 8> all;
  std::memcpy(all.data(), &bytes, sizeof bytes);
  std::uint8_t* to = w.row(r) + (begin - w.col_begin);
  if (end - begin == n) {
    std::memcpy(to, all.data(), n);
  } else {
    std::copy(all.begin() + (begin - first), all.begin() + (end - first), to);
  }
}

// Word k of row r holds adjacent columns and lies at index r * row_stride + k * word_stride.
template <int kBits>
void unpack_words(const std::byte* data, std::int64_t row_stride, std::int64_t word_stride, const Window& w) {
  constexpr std::int64_t kPerWord = 32 / kBits;
  for (std::int64_t block = w.row_begin; block < w.row_end; block += kRowBlock) {
    const std::int64_t block_end = std::min(block + kRowBlock, w.row_end);
    for (std::int64_t k = w.col_begin / kPerWord; k * kPerWord < w.col_end; ++k)
      for (std::int64_t r = block; r < block_end; ++r)
        put<kPerWord>(w, r, k * kPerWord, spread<kBits>(load32(data + 4 * (r * row_stride + k * word_stride))));
  }
}

// Byte k of a[i] and byte i of a[k] change places.
void transpose(std::array<std::uint64_t, 8>& a) {
  constexpr std::uint64_t kMasks[] = {0x00000000ffffffffu, 0x0000ffff0000ffffu, 0x00ff00ff00ff00ffu};
  std::size_t step = 4;
  for (const std::uint64_t mask : kMasks) {
    for (std::size_t i = 0; i < 8; ++i) {
      if ((i & step) != 0) continue;
      const std::uint64_t t = ((a[i] >> (8 * step)) ^ a[i + step]) & mask;
      a[i + step] ^= t;
      a[i] ^= t << (8 * step);
    }
    step /= 2;
  }
}

void unpack_awq(const CodeArray& codes, const Window& w) {
  const std::int64_t words = codes.out / kRowBlock;  // of a line
  for (std::int64_t word = w.row_begin / kRowBlock; word * kRowBlock < w.row_end; ++word) {
    for (std::int64_t col = w.col_begin; col < w.col_end; col += 8) {
      std::array<std::uint64_t, 8> square{};
      for (std::int64_t i = 0; i < std::min<std::int64_t>(8, w.col_end - col); ++i)
        square[static_cast<std::size_t>(i)] = spread<4>(load32(codes.data + 4 * ((col + i) * words + word)));
      transpose(square);
      for (std::size_t i = 0; i < 8; ++i) {
        const std::int64_t r = word * kRowBlock + kAwqOrder[i];
        if (r >= w.row_begin && r < w.row_end) put<8>(w, r, col, square[i]);
      }
    }
  }
}

void unpack_bytes(const CodeArray& codes, const Window& w) {
  const int half = 1 << (codes.bits - 1);
  int seen = 0;  // all bits of all codes
  for (std::int64_t r = w.row_begin; r < w.row_end; ++r) {
    const std::byte* from = codes.data + r * codes.in;
    std::uint8_t* to = w.row(r);
    for (std::int64_t c = w.col_begin; c < w.col_end; ++c) {
      const int code = i8(from, static_cast<int>(c)) + half;
      seen |= code;
      to[c - w.col_begin] = static_cast<std::uint8_t>(code);
    }
  }
  if (seen < 0 || seen >= 2 * half) throw LoadError("a weight of 4 bits holds a number that is not in [-8, 7]");
}

}  // namespace

void unpack_codes(const CodeArray& codes, std::int64_t row_begin, std::int64_t row_end, std::int64_t col_begin,
                  std::int64_t col_end, std::uint8_t* out) {
  assert(codes.bits == 4 || codes.bits == 8);
  const Window window{row_begin, row_end, col_begin, col_end, out};
  if (codes.bytes) return unpack_bytes(codes, window);
  if (codes.layout == CodeLayout::Awq) return unpack_awq(codes, window);
  const std::int64_t per_word = 32 / codes.bits;
  const bool rows = codes.layout == CodeLayout::Rows;
  const std::int64_t row_stride = rows ? (codes.in + per_word - 1) / per_word : 1;
  const std::int64_t word_stride = rows ? 1 : codes.out;
  if (codes.bits == 4) {
    unpack_words<4>(codes.data, row_stride, word_stride, window);
  } else {
    unpack_words<8>(codes.data, row_stride, word_stride, window);
  }
}

}  // namespace fastllm

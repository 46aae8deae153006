#include "model/dequant.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "model/dequant_blocks.h"
#include "tensor/dtype.h"

namespace fastllm {
namespace {

// Blocks of 32. A byte of `q` holds element i in its low and element i + 16 in its high half.

// x = d (q - 8)           f16 d, 16 bytes q
void q4_0(const std::byte* b, float* out) {
  const float d = load_half(b);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((u8(b + 2, i) & 15) - 8);
    out[i + 16] = d * static_cast<float>((u8(b + 2, i) >> 4) - 8);
  }
}

// x = d q + m             f16 d, f16 m, 16 bytes q
void q4_1(const std::byte* b, float* out) {
  const float d = load_half(b), m = load_half(b + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(u8(b + 4, i) & 15) + m;
    out[i + 16] = d * static_cast<float>(u8(b + 4, i) >> 4) + m;
  }
}

// x = d (q - 16)          f16 d, 32 fifth bits, 16 bytes of low bits
void q5_0(const std::byte* b, float* out) {
  const float d = load_half(b);
  const std::uint32_t fifth = load32(b + 2);
  for (int i = 0; i < 16; ++i) {
    const int low = (u8(b + 6, i) & 15) | static_cast<int>((fifth >> i) & 1) << 4;
    const int high = (u8(b + 6, i) >> 4) | static_cast<int>((fifth >> (i + 16)) & 1) << 4;
    out[i] = d * static_cast<float>(low - 16);
    out[i + 16] = d * static_cast<float>(high - 16);
  }
}

// x = d q + m             f16 d, f16 m, 32 fifth bits, 16 bytes of low bits
void q5_1(const std::byte* b, float* out) {
  const float d = load_half(b), m = load_half(b + 2);
  const std::uint32_t fifth = load32(b + 4);
  for (int i = 0; i < 16; ++i) {
    const int low = (u8(b + 8, i) & 15) | static_cast<int>((fifth >> i) & 1) << 4;
    const int high = (u8(b + 8, i) >> 4) | static_cast<int>((fifth >> (i + 16)) & 1) << 4;
    out[i] = d * static_cast<float>(low) + m;
    out[i + 16] = d * static_cast<float>(high) + m;
  }
}

// x = d q                 f16 d, 32 signed bytes
void q8_0(const std::byte* b, float* out) {
  const float d = load_half(b);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(i8(b + 2, i));
}

// x = d scale q - m min   16 bytes of a scale (low half) and a minimum (high half) for 16 elements each, 64 bytes q,
// f16 d, f16 m. Half a block is four runs of 32 elements: run r takes bit pair r of byte i.
void q2_k(const std::byte* b, float* out) {
  const float d = load_half(b + 80), m = load_half(b + 82);
  for (int g = 0; g < 16; ++g) {
    const float scale = d * static_cast<float>(u8(b, g) & 15), minimum = m * static_cast<float>(u8(b, g) >> 4);
    const std::byte* q = b + 16 + g / 8 * 32 + g % 2 * 16;
    for (int i = 0; i < 16; ++i)
      out[16 * g + i] = scale * static_cast<float>((u8(q, i) >> (g % 8 / 2 * 2)) & 3) - minimum;
  }
}

// x = d (scale - 32) (q - 4)    32 bytes of third bits, bit r of byte i for element i of run r of all eight; 64 bytes
// of lower bit pairs as in q2_k; 12 bytes of 6-bit scales: low halves of bytes 0..7, then their high halves, then the
// upper bits, pair g / 4 of byte 8 + g % 4; f16 d
void q3_k(const std::byte* b, float* out) {
  const float d = load_half(b + 108);
  const std::byte* s = b + 96;
  for (int g = 0; g < 16; ++g) {
    const int low = (u8(s, g % 8) >> (g / 8 * 4)) & 15, high = (u8(s, 8 + g % 4) >> (g / 4 * 2)) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    const std::byte *third = b + g % 2 * 16, *q = b + 32 + g / 8 * 32 + g % 2 * 16;
    for (int i = 0; i < 16; ++i) {
      const int code = ((u8(q, i) >> (g % 8 / 2 * 2)) & 3) | ((u8(third, i) >> (g / 2)) & 1) << 2;
      out[16 * g + i] = scale * static_cast<float>(code - 4);
    }
  }
}

// x = d scale q - m min   f16 d, f16 m, 12 bytes of scales, 128 bytes q: group 2j low halves, 2j + 1 high halves
void q4_k(const std::byte* b, float* out) {
  const float d = load_half(b), m = load_half(b + 2);
  const std::byte* q = b + 16;
  for (int g = 0; g < 8; ++g) {
    const auto [scale, minimum] = group_scale(b + 4, g);
    const float ds = d * scale, ms = m * minimum;
    const int shift = g % 2 * 4;
    for (int i = 0; i < 32; ++i) out[g * 32 + i] = ds * static_cast<float>((u8(q, g / 2 * 32 + i) >> shift) & 15) - ms;
  }
}

// As q4_k with fifth bits: 32 bytes between scales and q, bit g of byte i for element i of group g.
void q5_k(const std::byte* b, float* out) {
  const float d = load_half(b), m = load_half(b + 2);
  const std::byte *fifth = b + 16, *q = b + 48;
  for (int g = 0; g < 8; ++g) {
    const auto [scale, minimum] = group_scale(b + 4, g);
    const float ds = d * scale, ms = m * minimum;
    const int shift = g % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      const int low = (u8(q, g / 2 * 32 + i) >> shift) & 15;
      out[g * 32 + i] = ds * static_cast<float>(low | ((u8(fifth, i) >> g) & 1) << 4) - ms;
    }
  }
}

// x = d scale (q - 32)    128 bytes of low halves, 64 bytes of upper bit pairs, 16 signed scales (of 16 elements), f16
// d. Each half block of 128 elements is four runs of 32: run r takes low half r / 2 of byte 32 (r % 2) + i and pair r
// of upper byte i.
void q6_k(const std::byte* b, float* out) {
  const float d = load_half(b + 208);
  for (int half = 0; half < 2; ++half) {
    const std::byte *low = b + 64 * half, *upper = b + 128 + 32 * half, *scales = b + 192 + 8 * half;
    for (int run = 0; run < 8; ++run) {  // 16 elements of one scale
      const int r = run / 2, first = run % 2 * 16;
      const float scale = d * static_cast<float>(i8(scales, run));
      for (int i = first; i < first + 16; ++i) {
        const int q = ((u8(low, r % 2 * 32 + i) >> (r / 2 * 4)) & 15) | ((u8(upper, i) >> (2 * r)) & 3) << 4;
        out[128 * half + 32 * r + i] = scale * static_cast<float>(q - 32);
      }
    }
  }
}

using BlockFn = void (*)(const std::byte* block, float* out);

struct Format : SourceFormat {
  BlockFn dequantize;  // null for plain types
};

constexpr std::array kFormats{
    Format{{"F32", 1, 4}, nullptr},   Format{{"F16", 1, 2}, nullptr},   Format{{"BF16", 1, 2}, nullptr},
    Format{{"Q4_0", 32, 18}, q4_0},   Format{{"Q4_1", 32, 20}, q4_1},   Format{{"Q5_0", 32, 22}, q5_0},
    Format{{"Q5_1", 32, 24}, q5_1},   Format{{"Q8_0", 32, 34}, q8_0},   Format{{"Q2_K", 256, 84}, q2_k},
    Format{{"Q3_K", 256, 110}, q3_k}, Format{{"Q4_K", 256, 144}, q4_k}, Format{{"Q5_K", 256, 176}, q5_k},
    Format{{"Q6_K", 256, 210}, q6_k}, Format{{"I8", 1, 1}, nullptr},    Format{{"I32", 1, 4}, nullptr},
    Format{{"I64", 1, 8}, nullptr},
};
static_assert(kFormats.size() == static_cast<std::size_t>(SourceType::I64) + 1);

const Format& lookup(SourceType type) { return kFormats.at(static_cast<std::size_t>(type)); }

template <class T>
void convert(const std::byte* p, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    T x;
    std::memcpy(&x, p + i * static_cast<std::int64_t>(sizeof x), sizeof x);
    out[i] = static_cast<float>(x);
  }
}

void plain(SourceType type, const std::byte* p, std::int64_t n, float* out) {
  switch (type) {
    case SourceType::F32:
      std::memcpy(out, p, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case SourceType::BF16:
      for (std::int64_t i = 0; i < n; ++i) out[i] = to_float(bf16{load16(p + 2 * i)});
      return;
    case SourceType::I8:
      return convert<std::int8_t>(p, n, out);
    case SourceType::I32:
      return convert<std::int32_t>(p, n, out);
    case SourceType::I64:
      return convert<std::int64_t>(p, n, out);
    default:
      for (std::int64_t i = 0; i < n; ++i) out[i] = load_half(p + 2 * i);
  }
}

}  // namespace

const SourceFormat& format_of(SourceType type) { return lookup(type); }

bool is_integer(SourceType type) {
  return type == SourceType::I8 || type == SourceType::I32 || type == SourceType::I64;
}

void dequantize(SourceType type, const std::byte* row, std::int64_t begin, std::int64_t n, float* out) {
  const Format& f = lookup(type);
  if (f.dequantize == nullptr) return plain(type, row + begin * f.block_bytes, n, out);
  std::array<float, 256> scratch;
  while (n > 0) {
    const std::int64_t block = begin / f.block_elements, skip = begin % f.block_elements;
    const std::int64_t take = std::min(n, f.block_elements - skip);
    const std::byte* b = row + block * f.block_bytes;
    if (take == f.block_elements) {
      f.dequantize(b, out);
    } else {
      f.dequantize(b, scratch.data());
      std::copy_n(scratch.data() + skip, take, out);
    }
    begin += take, n -= take, out += take;
  }
}

}  // namespace fastllm

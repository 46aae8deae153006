#include "model/dequant_groups.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

#include "model/dequant.h"
#include "model/dequant_blocks.h"

namespace fastllm {
namespace {

struct Group {
  std::array<std::uint8_t, kGroup> codes;
  float scale, offset;
};

// Low and high halves of 16 bytes are elements 0..15 and 16..31.
void halves(const std::byte* q, Group& out) {
  for (std::size_t i = 0; i < 16; ++i) {
    out.codes[i] = std::to_integer<std::uint8_t>(q[i] & std::byte{15});
    out.codes[i + 16] = std::to_integer<std::uint8_t>(q[i] >> 4);
  }
}

void add_fifth_bits(std::uint32_t bits, Group& out) {
  for (std::size_t i = 0; i < out.codes.size(); ++i)
    out.codes[i] = static_cast<std::uint8_t>(out.codes[i] | ((bits >> i) & 1) << 4);
}

// Group g of a block of Q4_K or Q5_K; q: its 4-bit parts.
void k_group(const std::byte* b, const std::byte* q, int g, Group& out) {
  const auto [scale, minimum] = group_scale(b + 4, g);
  out.scale = load_half(b) * scale;
  out.offset = -load_half(b + 2) * minimum;
  for (int i = 0; i < kGroup; ++i)
    out.codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>((u8(q, g / 2 * 32 + i) >> (g % 2 * 4)) & 15);
}

// Group g of the block b; the layouts are described in dequant.cc.
void read_group(SourceType type, const std::byte* b, int g, Group& out) {
  out.scale = load_half(b);
  out.offset = 0;
  switch (type) {
    case SourceType::Q4_0:
      return halves(b + 2, out);
    case SourceType::Q4_1:
      out.offset = load_half(b + 2);
      return halves(b + 4, out);
    case SourceType::Q5_0:
      halves(b + 6, out);
      return add_fifth_bits(load32(b + 2), out);
    case SourceType::Q5_1:
      out.offset = load_half(b + 2);
      halves(b + 8, out);
      return add_fifth_bits(load32(b + 4), out);
    case SourceType::Q8_0:
      for (int i = 0; i < kGroup; ++i)
        out.codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(i8(b + 2, i) + 128);
      return;
    case SourceType::Q4_K:
      return k_group(b, b + 16, g, out);
    case SourceType::Q5_K:
      k_group(b, b + 48, g, out);
      for (int i = 0; i < kGroup; ++i)
        out.codes[static_cast<std::size_t>(i)] |= static_cast<std::uint8_t>(((u8(b + 16, i) >> g) & 1) << 4);
      return;
    default:
      assert(false);
  }
}

}  // namespace

GroupFormat groups_of(SourceType type) {
  switch (type) {
    case SourceType::Q4_0:
      return {4, false, 8};
    case SourceType::Q5_0:
      return {8, false, 16};
    case SourceType::Q8_0:
      return {8, false, 128};
    case SourceType::Q4_1:
    case SourceType::Q4_K:
      return {4, true, 0};
    case SourceType::Q5_1:
    case SourceType::Q5_K:
      return {8, true, 0};
    default:
      return {};
  }
}

// A symmetric group has offsets too: -zero times its scale, which is as exact as the scale where zeros are powers of
// two. Different zeros of 4 bits need offsets, unless one of them has 8 bits: codes can be moved up to 8.
GroupFormat common_groups(const GroupFormat& a, const GroupFormat& b) {
  if (a.bits == 0 || b.bits == 0) return {};
  const int bits = std::max(a.bits, b.bits), size = std::min(a.size, b.size);
  if (!a.offsets && !b.offsets) {
    if (a.bits == b.bits && a.zero == b.zero) return {bits, false, a.zero, size};
    if (bits == kWideGroups.bits) return {bits, false, kWideGroups.zero, size};
  }
  return {bits, true, 0, size};
}

bool groups_fit(SourceType type, const GroupFormat& f) {
  const GroupFormat own = groups_of(type);
  if (own.bits == 0 || own.bits > f.bits || f.size != kGroup) return false;
  return f.offsets || (!own.offsets && (own == f || f == kWideGroups));
}

void read_groups(SourceType type, const GroupFormat& f, const std::byte* row, std::int64_t first, std::int64_t n,
                 std::uint8_t* codes, float* scales, float* offsets) {
  assert(groups_fit(type, f));
  const SourceFormat& source = format_of(type);
  const GroupFormat own = groups_of(type);
  const std::int64_t per_block = source.block_elements / kGroup;
  const int shift = f.offsets ? 0 : f.zero - own.zero;
  const std::byte* block = row + first / per_block * source.block_bytes;
  std::int64_t of_block = first % per_block;
  Group group;
  for (std::int64_t i = 0; i < n; ++i, codes += kGroup) {
    read_group(type, block, static_cast<int>(of_block), group);
    if (++of_block == per_block) of_block = 0, block += source.block_bytes;
    if (shift != 0)
      for (std::uint8_t& code : group.codes) code = static_cast<std::uint8_t>(code + shift);
    std::memcpy(codes, group.codes.data(), group.codes.size());
    scales[i] = group.scale;
    if (f.offsets) offsets[i] = own.offsets ? group.offset : -group.scale * static_cast<float>(own.zero);
  }
}

}  // namespace fastllm

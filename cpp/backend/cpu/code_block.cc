#include "backend/cpu/code_block.h"

#include <cassert>
#include <cstring>

#include "tensor/dtype.h"

namespace fastllm::cpu {
namespace {

constexpr std::int64_t kTile = 16;  // columns of a tile of quads

void put_half(float x, std::byte* to) {
  const f16 half = to_f16(x);
  std::memcpy(to, &half, sizeof half);
}
float get_half(const std::byte* from) {
  f16 half;
  std::memcpy(&half, from, sizeof half);
  return to_float(half);
}

}  // namespace

CodeBlock::CodeBlock(const GroupFormat& format)
    : bits_(format.bits),
      size_(format.size),
      offsets_(format.offsets),
      code_bytes_(quant_code_bytes(bits_, size_)),
      bytes_(quant_block_bytes(bits_, size_, offsets_)) {
  assert(bits_ == 4 || bits_ == 8);
  assert(size_ == 32 || size_ == 64 || size_ == 128);
}

std::int64_t CodeBlock::quad_at(std::int64_t column, std::int64_t k) const {
  return column / kTile * code_bytes_ / 2 + k * bits_ / 32 * kTile * 4 + column % kTile * 4;
}

void CodeBlock::put_codes(std::int64_t column, const std::uint8_t* codes, std::byte* block) const {
  if (bits_ == 8) {
    for (std::int64_t k = 0; k < size_; k += 4) std::memcpy(block + quad_at(column, k), codes + k, 4);
  } else {
    for (std::int64_t k = 0; k < size_; k += 8) {
      std::uint32_t low, high;
      std::memcpy(&low, codes + k, 4);
      std::memcpy(&high, codes + k + 4, 4);
      low |= high << 4;
      std::memcpy(block + quad_at(column, k), &low, 4);
    }
  }
}

void CodeBlock::get_codes(std::int64_t column, const std::byte* block, std::uint8_t* codes) const {
  if (bits_ == 8) {
    for (std::int64_t k = 0; k < size_; k += 4) std::memcpy(codes + k, block + quad_at(column, k), 4);
  } else {
    for (std::int64_t k = 0; k < size_; k += 8) {
      std::uint32_t both;
      std::memcpy(&both, block + quad_at(column, k), 4);
      const std::uint32_t low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
      std::memcpy(codes + k, &low, 4);
      std::memcpy(codes + k + 4, &high, 4);
    }
  }
}

void CodeBlock::put_scale(std::int64_t column, float scale, float offset, std::byte* block) const {
  std::byte* to = block + code_bytes_ + column * 2;
  put_half(scale, to);
  if (offsets_) put_half(offset, to + kPanel * 2);
}

float CodeBlock::scale(std::int64_t column, const std::byte* block) const {
  return get_half(block + code_bytes_ + column * 2);
}

float CodeBlock::offset(std::int64_t column, const std::byte* block) const {
  return offsets_ ? get_half(block + code_bytes_ + (kPanel + column) * 2) : 0.0f;
}

}  // namespace fastllm::cpu

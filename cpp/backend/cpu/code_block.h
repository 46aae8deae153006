// The block of one group of a panel of codes; kernels.h describes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"

namespace fastllm::cpu {

class CodeBlock {
 public:
  explicit CodeBlock(const GroupFormat& format);

  std::int64_t bytes() const { return bytes_; }
  // The codes of a column, [format.size] each; a block starts as zeros.
  void put_codes(std::int64_t column, const std::uint8_t* codes, std::byte* block) const;
  void get_codes(std::int64_t column, const std::byte* block, std::uint8_t* codes) const;
  // Numbers of fp16. offset is of no meaning without offsets.
  void put_scale(std::int64_t column, float scale, float offset, std::byte* block) const;
  float scale(std::int64_t column, const std::byte* block) const;
  float offset(std::int64_t column, const std::byte* block) const;

 private:
  // Bytes from the start of a block to the codes of a column and the quad (8 bits) or pair of quads (4 bits) of a k.
  std::int64_t quad_at(std::int64_t column, std::int64_t k) const;

  int bits_;
  std::int64_t size_;  // k of a group
  bool offsets_;
  std::int64_t code_bytes_, bytes_;
};

}  // namespace fastllm::cpu

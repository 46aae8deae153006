// A weight that a checkpoint holds as codes in integers (fastllm/weights.h, Packing): checked once, then read as
// numbers or as the codes they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "fastllm/weights.h"
#include "model/unpack_codes.h"

namespace fastllm {

// Immutable. Borrows the tensors.
class CodeMatrix {
 public:
  // Throws LoadError unless the tensors are what a weight [rows, cols] needs.
  CodeMatrix(const SourceTensor& codes, std::int64_t rows, std::int64_t cols);

  std::int64_t bytes() const { return bytes_; }  // of all tensors
  // The widest groups that hold the codes as they are, scales rounded to fp16; none where there are no such groups.
  const GroupFormat& groups() const { return groups_; }
  const std::string& why_no_groups() const { return why_no_groups_; }
  bool fits(const GroupFormat& f) const;
  // Column j of the groups is column order[j] of the weight; null: as they are.
  const std::shared_ptr<const std::vector<std::int32_t>>& order() const { return order_; }

  // Rows [row_begin, row_end) of the columns [col_begin, col_begin + cols).
  void dequantize(std::int64_t row_begin, std::int64_t row_end, std::int64_t col_begin, std::int64_t cols,
                  float* out) const;
  // The same as `f`, which they fit; whole groups, and all columns where there is an order. As HostMatrix::read_groups.
  void read_groups(const GroupFormat& f, std::int64_t row_begin, std::int64_t row_end, std::int64_t col_begin,
                   std::int64_t cols, std::uint8_t* codes, float* scales, float* offsets) const;

 private:
  void check_tensors(const SourceTensor& codes);
  void read_group_of();
  void choose_groups();
  std::optional<int> common_zero() const;
  bool halves_hold_scales() const;

  float scale(std::int64_t row, std::int64_t group) const;
  int zero(std::int64_t row, std::int64_t group) const;
  std::int64_t group_of(std::int64_t col) const;
  // The first column after `col`, up to `end`, that belongs to another group.
  std::int64_t run_end(std::int64_t col, std::int64_t end) const;

  const Packing& packing_;
  CodeArray codes_;
  std::int64_t group_ = 0, num_groups_ = 0;  // columns of a group; groups of a row
  std::int64_t bytes_ = 0;
  std::vector<std::int32_t> group_of_;  // of each column; empty: column / group
  std::shared_ptr<const std::vector<std::int32_t>> order_;
  GroupFormat groups_;
  std::string why_no_groups_;
};

}  // namespace fastllm

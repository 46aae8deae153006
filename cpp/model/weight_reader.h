// A rank's rows of one weight, read from the tensors of a checkpoint. Rows are looked up, columns dequantised.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "fastllm/weights.h"
#include "model/canonical.h"

namespace fastllm {

// A weight of this rank, checked and ready to be read.
struct WeightEntry {
  const WeightBinding* binding = nullptr;
  const CanonicalWeight* weight = nullptr;
  AttnSpec attn;           // of the weight's layer; for QkvRows and QkvGrouped
  std::int64_t rows = 0;   // of the canonical whole
  std::int64_t cols = 0;   // 1 for vectors
  std::int64_t bytes = 0;  // of all sources
};

// Rows of this rank.
std::int64_t rank_rows(const WeightEntry& e, int size);

// What the reading of a HostMatrix needs, by value, and the sources by pointer.
struct WeightReader {
  WeightEntry entry;
  int rank = 0, size = 1;
  std::int64_t col_begin = 0, cols = 0;

  void operator()(std::int64_t begin, std::int64_t end, float* out) const;
  void read_row(std::int64_t row, float* out) const;
  // Rows can be copied as they are: bf16, not transposed, nothing added.
  bool is_plain_bf16() const;
  // Matrices only.
  void copy_bf16(std::int64_t begin, std::int64_t end, std::uint16_t* out) const;
  // This rank's columns are whole groups of every source.
  bool is_cut_between_groups() const { return col_begin % kGroup == 0 && cols % kGroup == 0; }
  bool has_groups(const GroupFormat& f) const;
  // Matrices only.
  void copy_groups(const GroupFormat& f, std::int64_t begin, std::int64_t end, std::uint8_t* codes, float* scales,
                   float* offsets) const;
  // The checkpoint has a row for each of our columns; a run of our rows lies together there.
  void read_transposed(std::int64_t begin, std::int64_t end, float* out) const;
};

}  // namespace fastllm

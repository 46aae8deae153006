// A rank's rows of one weight, read from the tensors of a checkpoint. Rows are looked up, columns dequantised.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "fastllm/weights.h"
#include "model/canonical.h"
#include "model/code_matrix.h"
#include "model/dequant_groups.h"

namespace fastllm {

// A weight of this rank, checked and ready to be read.
struct WeightEntry {
  const WeightBinding* binding = nullptr;
  const CanonicalWeight* weight = nullptr;
  AttnSpec attn;                                              // of the weight's layer; for QkvRows and QkvGrouped
  std::int64_t rows = 0;                                      // of the canonical whole
  std::int64_t cols = 0;                                      // 1 for vectors
  std::int64_t bytes = 0;                                     // of all sources
  std::vector<std::shared_ptr<const CodeMatrix>> codes = {};  // of each source; null: it is no codes
};

// Rows of this rank.
std::int64_t rank_rows(const WeightEntry& e, int size);

// What the reading of a HostMatrix needs, by value, and the sources by pointer.
struct WeightReader {
  WeightEntry entry;
  int rank = 0, size = 1;
  std::int64_t col_begin = 0, cols = 0;

  void operator()(std::int64_t begin, std::int64_t end, float* out) const;
  // Rows can be copied as they are: bf16, not transposed, nothing added.
  bool is_plain_bf16() const;
  // Matrices only.
  void copy_bf16(std::int64_t begin, std::int64_t end, std::uint16_t* out) const;

  // This rank's columns are whole groups.
  bool is_cut_between(int group) const { return col_begin % group == 0 && cols % group == 0; }
  OwnGroups own_groups() const;  // see WeightLoader
  bool has_groups(const GroupFormat& f) const;
  // What all sources agree on: of codes, where they have an order; else null.
  std::shared_ptr<const std::vector<std::int32_t>> order() const;
  // Matrices only.
  void copy_groups(const GroupFormat& f, std::int64_t begin, std::int64_t end, std::uint8_t* codes, float* scales,
                   float* offsets) const;

 private:
  // Rows of ours that follow each other in one source.
  struct Run {
    std::int64_t source;  // -1: padding
    std::int64_t first, n;
  };
  Run run_at(std::int64_t begin, std::int64_t end) const;
  Run row_at(std::int64_t row) const;
  const std::byte* stored_row(const SourceTensor& t, std::int64_t row) const;
  // The checkpoint has a row for each of our columns; a run of our rows lies together there.
  void read_transposed(std::int64_t begin, std::int64_t end, float* out) const;
  bool has_one_order() const;
};

}  // namespace fastllm

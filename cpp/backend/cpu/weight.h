// What the CPU backend keeps of a weight: panels of kPanel rows, one after the other; see kernels.h for the layouts.
// Immutable after pack().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/memory.h"
#include "base/share.h"

namespace fastllm::cpu {

class QuantWeight;

// Where the shares of a weight begin when few rows are multiplied. Numbers, not a reference: the weight may be gone
// when its lines are asked for, and asking for memory that is gone does nothing.
struct WeightStart {
  const std::byte* data = nullptr;
  std::int64_t panels = 0, panel_bytes = 0;

  const std::byte* of(int thread, int threads) const {
    return data ? data + share_of(panels, thread, threads).begin * panel_bytes : nullptr;
  }
};

class CpuWeight : public PackedWeight {
 public:
  std::int64_t rows() const override { return rows_; }
  std::int64_t cols() const override { return cols_; }
  std::size_t bytes() const override { return static_cast<std::size_t>(panels() * panel_bytes_); }
  std::int64_t panels() const { return (rows_ + kPanel - 1) / kPanel; }
  std::byte* panel(std::int64_t p) const { return data_.get() + p * panel_bytes_; }

  // Its first `panels` panels; how they are cut is how the product is.
  WeightStart start(std::int64_t panels) const { return {data_.get(), panels, panel_bytes_}; }

  // This weight where it is in groups of codes, else null.
  virtual const QuantWeight* quant() const { return nullptr; }
  // out[k] = scale * w[row][k]
  virtual void read_row(std::int64_t row, float scale, float* out) const = 0;

 protected:
  CpuWeight(PageArena& arena, std::int64_t rows, std::int64_t cols, std::int64_t panel_bytes)
      : rows_(rows), cols_(cols), panel_bytes_(panel_bytes), data_(arena.take(bytes())) {}

 private:
  std::int64_t rows_, cols_, panel_bytes_;
  std::shared_ptr<std::byte> data_;
};

}  // namespace fastllm::cpu

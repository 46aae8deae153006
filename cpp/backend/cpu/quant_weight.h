// Weights that stay in groups of codes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/cpu/code_block.h"
#include "backend/cpu/weight.h"
#include "base/thread_pool.h"

namespace fastllm::cpu {

// Packed column j is column order[j] of the weight; null: as they are.
using ColumnOrder = std::shared_ptr<const std::vector<std::int32_t>>;

class QuantWeight final : public CpuWeight {
 public:
  QuantWeight(PageArena& arena, std::int64_t rows, std::int64_t cols, const GroupFormat& format, ColumnOrder order);
  const QuantWeight* quant() const override { return this; }
  const GroupFormat& format() const { return format_; }
  const std::int32_t* order() const { return order_ ? order_->data() : nullptr; }
  void read_row(std::int64_t row, float scale, float* out) const override;

 private:
  GroupFormat format_;
  CodeBlock block_;
  ColumnOrder order_;
};

// Packs a matrix as weight.groups says. Every thread writes the panels that it
// reads later when few rows are multiplied, so that their pages are near it. Throws what the matrix throws, and
// LoadError when numbers are too large for fp16 scales.
std::unique_ptr<QuantWeight> pack_groups(const HostMatrix& weight, const Kernels& kernels, PageArena& arena,
                                         ThreadPool& pool);

}  // namespace fastllm::cpu

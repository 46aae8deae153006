#include "backend/cpu/quant_weight.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

#include "backend/cpu/choose_codes.h"

namespace fastllm::cpu {
namespace {

static_assert(kGroup == fastllm::kGroup);

std::int64_t groups_of(const GroupFormat& f, std::int64_t cols) { return (cols + f.size - 1) / f.size; }

// Codes of up to kPanel rows, as HostMatrix::read_groups gives them.
struct CodeRows {
  explicit CodeRows(const HostMatrix& m)
      : cols(m.cols),
        groups(groups_of(m.groups, m.cols)),
        codes(static_cast<std::size_t>(kPanel * cols)),
        scales(static_cast<std::size_t>(kPanel * groups)),
        offsets(m.groups.offsets ? scales.size() : 0),
        numbers(m.read_groups ? 0 : codes.size()) {}

  void read(const HostMatrix& m, const Kernels& kernels, std::int64_t begin, std::int64_t end) {
    float* off = offsets.empty() ? nullptr : offsets.data();
    if (m.read_groups) return m.read_groups(begin, end, codes.data(), scales.data(), off);
    m.read(begin, end, numbers.data());
    for (std::int64_t r = 0; r < end - begin; ++r) {
      choose_codes(kernels, m.groups, numbers.data() + r * cols, cols, codes.data() + r * cols,
                   scales.data() + r * groups, off == nullptr ? nullptr : off + r * groups);
    }
  }

  // Rows [0, n) into a panel of zeros.
  void pack(const CodeBlock& layout, std::int64_t size, std::int64_t n, std::byte* panel) const {
    std::array<std::uint8_t, kSpan> last;
    for (std::int64_t g = 0; g < groups; ++g, panel += layout.bytes()) {
      for (std::int64_t r = 0; r < n; ++r) {
        const std::uint8_t* group = codes.data() + r * cols + g * size;
        if ((g + 1) * size > cols) {
          last.fill(0);
          std::copy_n(group, cols - g * size, last.begin());
          group = last.data();
        }
        layout.put_codes(r, group, panel);
        const auto at = static_cast<std::size_t>(r * groups + g);
        layout.put_scale(r, scales[at], offsets.empty() ? 0.0f : offsets[at], panel);
      }
    }
  }

  std::int64_t cols, groups;
  std::vector<std::uint8_t> codes;
  std::vector<float> scales, offsets;
  std::vector<float> numbers;
};

}  // namespace

QuantWeight::QuantWeight(PageArena& arena, std::int64_t rows, std::int64_t cols, const GroupFormat& format,
                         ColumnOrder order)
    : CpuWeight(arena, rows, cols, groups_of(format, cols) * CodeBlock(format).bytes()),
      format_(format),
      block_(format),
      order_(std::move(order)) {
  assert(!order_ || static_cast<std::int64_t>(order_->size()) == cols);
}

void QuantWeight::read_row(std::int64_t row, float scale, float* out) const {
  const std::int64_t column = row % kPanel;
  const std::byte* block = panel(row / kPanel);
  std::array<std::uint8_t, kSpan> codes;
  for (std::int64_t begin = 0; begin < cols(); begin += format_.size, block += block_.bytes()) {
    block_.get_codes(column, block, codes.data());
    const float step = block_.scale(column, block), offset = block_.offset(column, block);
    const std::int64_t width = std::min<std::int64_t>(format_.size, cols() - begin);
    for (std::int64_t k = 0; k < width; ++k) {
      const int code = codes[static_cast<std::size_t>(k)];
      const std::int64_t at = order_ ? (*order_)[static_cast<std::size_t>(begin + k)] : begin + k;
      out[at] = scale * (step * static_cast<float>(code - format_.zero) + offset);
    }
  }
}

std::unique_ptr<QuantWeight> pack_groups(const HostMatrix& weight, const Kernels& kernels, PageArena& arena,
                                         ThreadPool& pool) {
  const ColumnOrder order = weight.read_groups ? weight.order : nullptr;
  auto packed = std::make_unique<QuantWeight>(arena, weight.rows, weight.cols, weight.groups, order);
  const CodeBlock layout(weight.groups);
  const std::int64_t panels = packed->panels(), threads = pool.size();
  std::exception_ptr failure;
  std::mutex failed;
  pool.run([&](int thread) {
    try {
      CodeRows rows(weight);
      for (std::int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; ++p) {
        const std::int64_t begin = p * kPanel, end = std::min(begin + kPanel, weight.rows);
        rows.read(weight, kernels, begin, end);
        rows.pack(layout, weight.groups.size, end - begin, packed->panel(p));
      }
    } catch (...) {
      const std::lock_guard lock(failed);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  return packed;
}

}  // namespace fastllm::cpu

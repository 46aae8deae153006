#include "backend/cpu/quant_weight.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

#include "backend/cpu/choose_codes.h"
#include "tensor/dtype.h"

namespace fastllm::cpu {
namespace {

static_assert(kGroup == fastllm::kGroup);
constexpr std::int64_t kTile = 16;  // columns

std::int64_t groups_of(const GroupFormat& f, std::int64_t cols) { return (cols + f.size - 1) / f.size; }
std::int64_t code_bytes(const GroupFormat& f) { return quant_code_bytes(f.bits, f.size); }
std::int64_t block_bytes(const GroupFormat& f) { return quant_block_bytes(f.bits, f.size, f.offsets); }

// Where a block has the code of a column and a k; 4-bit codes of odd quads are in the high halves.
std::int64_t code_at(const GroupFormat& f, std::int64_t column, std::int64_t k) {
  const std::int64_t tile = column / kTile, quad = f.bits == 8 ? k / 4 : k / 8;
  return (tile * f.size * f.bits / 32 + quad) * kTile * 4 + column % kTile * 4 + k % 4;
}
bool in_high_half(int bits, std::int64_t k) { return bits == 4 && k / 4 % 2 == 1; }

f16 load_half(const std::byte* p) {
  f16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

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
  void pack(const GroupFormat& f, std::int64_t n, std::byte* panel) const {
    for (std::int64_t g = 0; g < groups; ++g) {
      std::byte* block = panel + g * block_bytes(f);
      for (std::int64_t r = 0; r < n; ++r) {
        std::array<std::uint8_t, kSpan> group{};
        const std::int64_t begin = g * f.size;
        std::copy_n(codes.data() + r * cols + begin, std::min<std::int64_t>(f.size, cols - begin), group.begin());
        for (std::int64_t k = 0; k < f.size; k += 4) put_quad(f, r, k, group.data() + k, block);
        put(block + code_bytes(f) + r * 2, scales[static_cast<std::size_t>(r * groups + g)]);
        if (f.offsets) put(block + code_bytes(f) + (kPanel + r) * 2, offsets[static_cast<std::size_t>(r * groups + g)]);
      }
    }
  }

  std::int64_t cols, groups;
  std::vector<std::uint8_t> codes;
  std::vector<float> scales, offsets;
  std::vector<float> numbers;

 private:
  static void put(std::byte* to, float x) {
    const f16 half = to_f16(x);
    std::memcpy(to, &half, sizeof half);
  }
  static void put_quad(const GroupFormat& f, std::int64_t column, std::int64_t k, const std::uint8_t* quad,
                       std::byte* block) {
    std::byte* to = block + code_at(f, column, k);
    const int shift = in_high_half(f.bits, k) ? 4 : 0;
    for (int i = 0; i < 4; ++i) to[i] |= static_cast<std::byte>(quad[i] << shift);
  }
};

}  // namespace

QuantWeight::QuantWeight(PageArena& arena, std::int64_t rows, std::int64_t cols, const GroupFormat& format,
                         ColumnOrder order)
    : CpuWeight(arena, rows, cols, groups_of(format, cols) * block_bytes(format)),
      format_(format),
      order_(std::move(order)) {
  assert(format.bits == 4 || format.bits == 8);
  assert(format.size == 32 || format.size == 64 || format.size == 128);
  assert(!order_ || static_cast<std::int64_t>(order_->size()) == cols);
}

void QuantWeight::read_row(std::int64_t row, float scale, float* out) const {
  const std::int64_t column = row % kPanel;
  const std::byte* block = panel(row / kPanel);
  for (std::int64_t begin = 0; begin < cols(); begin += format_.size, block += block_bytes(format_)) {
    const std::byte* halves = block + code_bytes(format_) + column * 2;
    const float step = to_float(load_half(halves));
    const float offset = format_.offsets ? to_float(load_half(halves + kPanel * 2)) : 0.0f;
    const std::int64_t width = std::min<std::int64_t>(format_.size, cols() - begin);
    for (std::int64_t k = 0; k < width; ++k) {
      const int byte = std::to_integer<int>(block[code_at(format_, column, k)]);
      const int code = format_.bits == 8 ? byte : in_high_half(format_.bits, k) ? byte >> 4 : byte & 15;
      const std::int64_t at = order_ ? (*order_)[static_cast<std::size_t>(begin + k)] : begin + k;
      out[at] = scale * (step * static_cast<float>(code - format_.zero) + offset);
    }
  }
}

std::unique_ptr<QuantWeight> pack_groups(const HostMatrix& weight, const Kernels& kernels, PageArena& arena,
                                         ThreadPool& pool) {
  const ColumnOrder order = weight.read_groups ? weight.order : nullptr;
  auto packed = std::make_unique<QuantWeight>(arena, weight.rows, weight.cols, weight.groups, order);
  const std::int64_t panels = packed->panels(), threads = pool.size();
  std::exception_ptr failure;
  std::mutex failed;
  pool.run([&](int thread) {
    try {
      CodeRows rows(weight);
      for (std::int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; ++p) {
        const std::int64_t begin = p * kPanel, end = std::min(begin + kPanel, weight.rows);
        rows.read(weight, kernels, begin, end);
        rows.pack(weight.groups, end - begin, packed->panel(p));
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

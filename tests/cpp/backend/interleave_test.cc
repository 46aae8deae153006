#include "backend/cpu/interleave.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/weight.h"
#include "tensor/dtype.h"
#include "test_seed.h"

namespace fastllm::cpu {
namespace {

TEST(Interleave, every_number_is_where_a_panel_has_it_and_the_rest_is_zero) {
  const auto seed = test::test_seed();
  std::mt19937 random(seed);
  for (const std::int64_t n : {1, 15, 16, 17, 31, 32}) {
    for (const std::int64_t k : {1, 2, 31, 32, 33, 64, 100}) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", " + std::to_string(n) + " x " + std::to_string(k));
      std::vector<std::uint16_t> rows(static_cast<std::size_t>(n * k));
      for (auto& x : rows) x = static_cast<std::uint16_t>(random() % 65535 + 1);
      std::vector<std::uint16_t> panel(static_cast<std::size_t>(kPanel * round_up(k, 32)));
      interleave_rows(rows.data(), n, k, panel.data());
      for (std::int64_t r = 0; r < kPanel; ++r) {
        for (std::int64_t c = 0; c < round_up(k, 32); ++c) {
          const std::int64_t at = c / 32 * 1024 + r / 16 * 512 + c % 32 / 2 * 32 + r % 16 * 2 + c % 2;
          const int expected = r < n && c < k ? rows[static_cast<std::size_t>(r * k + c)] : 0;
          ASSERT_EQ(panel[static_cast<std::size_t>(at)], expected) << "row " << r << ", column " << c;
        }
      }
    }
  }
}

TEST(Interleave, a_weight_that_is_bf16_is_packed_without_conversion) {
  constexpr std::int64_t kRows = 77, kCols = 50;
  const auto bits = [](std::int64_t r, std::int64_t c) { return static_cast<std::uint16_t>(0x3f80 + r * kCols + c); };
  HostMatrix matrix;
  matrix.rows = kRows, matrix.cols = kCols;
  matrix.read = [](std::int64_t, std::int64_t, float*) { throw std::runtime_error("converted"); };
  matrix.read_bf16 = [&](std::int64_t begin, std::int64_t end, std::uint16_t* out) {
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t c = 0; c < kCols; ++c) *out++ = bits(r, c);
  };
  for (const int threads : {1, 3}) {
    const auto packed = make_cpu_backend(threads)->pack(matrix, DType::BF16);
    std::vector<float> row(kCols);
    for (std::int64_t r = 0; r < kRows; ++r) {
      static_cast<const CpuWeight&>(*packed).read_row(r, 1, row.data());
      for (std::int64_t c = 0; c < kCols; ++c)
        ASSERT_EQ(to_bf16(row[static_cast<std::size_t>(c)]).bits, bits(r, c)) << r << ", " << c;
    }
  }
}

}  // namespace
}  // namespace fastllm::cpu

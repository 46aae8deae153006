// The codes of GGUF blocks stand for the numbers that dequantize() makes of them.
#include "model/dequant_groups.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "model/dequant.h"
#include "test_seed.h"

namespace fastllm {
namespace {

constexpr SourceType kOwn[] = {SourceType::Q4_0, SourceType::Q4_1, SourceType::Q5_0, SourceType::Q5_1,
                               SourceType::Q8_0, SourceType::Q4_K, SourceType::Q5_K};

bool has_products(SourceType t) { return t == SourceType::Q4_K || t == SourceType::Q5_K; }

// A row of 512 random elements with ordinary scales of either sign.
std::vector<std::byte> random_row(SourceType type, std::mt19937& rng) {
  const SourceFormat& f = format_of(type);
  std::vector<std::byte> row(static_cast<std::size_t>(512 / f.block_elements * f.block_bytes));
  for (auto& b : row) b = static_cast<std::byte>(rng() & 255);
  const bool two = groups_of(type).offsets;
  for (std::size_t at = 0; at < row.size(); at += static_cast<std::size_t>(f.block_bytes))
    for (std::size_t h = 0; h < (two ? 2u : 1u); ++h)
      row[at + 2 * h + 1] = static_cast<std::byte>((has_products(type) ? 0x10 : 0x24) | (rng() & 0x83));
  return row;
}

void expect_same_numbers(SourceType type, const GroupFormat& f, const std::vector<std::byte>& row, std::int64_t first,
                         std::int64_t n) {
  SCOPED_TRACE(testing::Message() << format_of(type).name << " as " << f.bits << " bits, groups from " << first);
  std::vector<float> want(static_cast<std::size_t>(n * kGroup)), scales(static_cast<std::size_t>(n), NAN);
  std::vector<float> offsets(static_cast<std::size_t>(n), NAN);
  std::vector<std::uint8_t> codes(want.size(), 0xff);
  dequantize(type, row.data(), first * kGroup, n * kGroup, want.data());
  read_groups(type, f, row.data(), first, n, codes.data(), scales.data(), f.offsets ? offsets.data() : nullptr);
  for (std::size_t i = 0; i < want.size(); ++i) {
    const std::size_t g = i / kGroup;
    ASSERT_LT(codes[i], 1 << f.bits);
    // As a backend keeps them.
    const double scale = to_float(to_f16(scales[g])), offset = f.offsets ? to_float(to_f16(offsets[g])) : 0.0f;
    const double got = scale * (codes[i] - f.zero) + offset;
    const double bound =
        has_products(type) ? (std::abs(scale) * codes[i] + std::abs(offset)) / 2048 : 1e-6 * std::abs(scale * 256);
    ASSERT_NEAR(got, static_cast<double>(want[i]), bound) << "element " << i;
  }
}

TEST(DequantGroups, test_own_codes_stand_for_the_same_numbers_in_every_format_that_holds_them) {
  std::mt19937 rng(test::test_seed());
  for (const SourceType type : kOwn) {
    for (const GroupFormat& f : {groups_of(type), kWideGroups, GroupFormat{8, true, 0}, GroupFormat{4, true, 0}}) {
      if (!groups_fit(type, f)) continue;
      const auto row = random_row(type, rng);
      expect_same_numbers(type, f, row, 0, 16);
      expect_same_numbers(type, f, row, 5, 7);
      expect_same_numbers(type, f, row, 15, 1);
    }
  }
}

TEST(DequantGroups, test_formats_hold_what_they_are_as_wide_as) {
  const GroupFormat symmetric4{4, false, 8}, offsets4{4, true, 0}, offsets8{8, true, 0};
  EXPECT_TRUE(groups_fit(SourceType::Q4_0, kWideGroups));
  EXPECT_TRUE(groups_fit(SourceType::Q4_0, offsets4));
  EXPECT_TRUE(groups_fit(SourceType::Q8_0, offsets8));
  EXPECT_FALSE(groups_fit(SourceType::Q8_0, symmetric4));
  EXPECT_FALSE(groups_fit(SourceType::Q5_0, offsets4));
  EXPECT_FALSE(groups_fit(SourceType::Q4_1, kWideGroups));
  EXPECT_FALSE(groups_fit(SourceType::Q6_K, offsets8));
  EXPECT_FALSE(groups_fit(SourceType::BF16, offsets8));
  EXPECT_EQ(common_groups(symmetric4, symmetric4), symmetric4);
  EXPECT_EQ(common_groups(symmetric4, offsets4), offsets4);
  EXPECT_EQ(common_groups(symmetric4, groups_of(SourceType::Q5_0)), kWideGroups);
  EXPECT_EQ(common_groups(kWideGroups, offsets4), offsets8);
  EXPECT_EQ(common_groups(kWideGroups, GroupFormat{}), GroupFormat{});
}

}  // namespace
}  // namespace fastllm

// Golden numbers come from the `gguf` package's dequantize of the same bytes.
#include "model/dequant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "tensor/dtype.h"

namespace fastllm {
namespace {

struct Golden {
  SourceType type;
  std::vector<std::pair<std::size_t, float>> values;
  double sum, weighted_sum;  // weights 1, 2, ...
};

const std::vector<Golden>& goldens() {
  static const std::vector<Golden> all = {
      {SourceType::Q4_0,
       {{0, -0.258911133f}, {1, -0.0369873047f}, {17, -0.110961914f}, {31, -0.221923828f}},
       0.0369873047,
       -3.55078125},
      {SourceType::Q4_1,
       {{0, 0.344848633f}, {1, 0.122924805f}, {17, 0.196899414f}, {31, 0.233886719f}},
       3.45275879,
       53.7711182},
      {SourceType::Q5_0,
       {{0, 0.480834961f}, {1, -0.184936523f}, {17, 0.55480957f}, {31, 0.295898438f}},
       1.44250488,
       41.6477051},
      {SourceType::Q5_1,
       {{0, 0.492797852f}, {1, 0.862670898f}, {17, 0.233886719f}, {31, 0.381835938f}},
       16.0284424,
       265.856323},
      {SourceType::Q8_0,
       {{0, 2.4041748f}, {1, 3.21789551f}, {17, -2.10827637f}, {31, -3.9576416f}},
       -3.55078125,
       -184.640625},
      {SourceType::Q4_K,
       {{0, 16.8109131f},
        {33, 6.94604492f},
        {95, 5.10754395f},
        {130, 5.6036377f},
        {200, 11.5684814f},
        {255, 35.6505127f}},
       5034.27734,
       680110.092},
      {SourceType::Q5_K,
       {{0, 25.6878662f},
        {33, 28.0288086f},
        {95, 5.10754395f},
        {130, 38.1524658f},
        {200, 23.9962158f},
        {255, 54.5140381f}},
       8229.98047,
       1095808.34},
      {SourceType::Q6_K,
       {{0, -52.928833f},
        {33, -0.406860352f},
        {95, -125.312988f},
        {130, 42.7203369f},
        {200, -41.8326416f},
        {255, -18.2717285f}},
       -173.396484,
       10125.0527},
  };
  return all;
}

// Bytes (37 i + 11) ^ 5 i^2, with scales that are ordinary halves.
std::vector<std::byte> golden_block(SourceType type) {
  const auto size = static_cast<std::size_t>(format_of(type).block_bytes);
  std::vector<std::byte> block(size);
  for (std::size_t i = 0; i < size; ++i) block[i] = static_cast<std::byte>(((i * 37 + 11) ^ (i * i * 5)) & 255);
  auto set = [&](std::size_t at, int low, int high) {
    block[at] = static_cast<std::byte>(low), block[at + 1] = static_cast<std::byte>(high);
  };
  set(type == SourceType::Q6_K ? 208 : 0, 188, 40);
  if (type == SourceType::Q4_1 || type == SourceType::Q5_1 || type == SourceType::Q4_K || type == SourceType::Q5_K)
    set(2, 184, 178);
  return block;
}

TEST(Dequant, test_blocks_match_the_reference_package) {
  for (const auto& g : goldens()) {
    SCOPED_TRACE(format_of(g.type).name);
    const auto block = golden_block(g.type);
    std::vector<float> out(static_cast<std::size_t>(format_of(g.type).block_elements), NAN);
    dequantize(g.type, block.data(), 0, static_cast<std::int64_t>(out.size()), out.data());
    for (const auto& [i, value] : g.values) EXPECT_FLOAT_EQ(out[i], value) << i;
    double sum = 0, weighted = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      sum += static_cast<double>(out[i]);
      weighted += static_cast<double>(out[i]) * static_cast<double>(i + 1);
    }
    EXPECT_NEAR(sum, g.sum, 1e-6 * (1 + std::abs(g.sum)));
    EXPECT_NEAR(weighted, g.weighted_sum, 1e-6 * (1 + std::abs(g.weighted_sum)));
  }
}

TEST(Dequant, test_any_range_equals_that_part_of_the_row) {
  for (const auto& g : goldens()) {
    SCOPED_TRACE(format_of(g.type).name);
    std::vector<std::byte> row;
    for (int i = 0; i < 3; ++i) {
      const auto block = golden_block(g.type);
      row.insert(row.end(), block.begin(), block.end());
      row[row.size() - block.size() / 2] ^= static_cast<std::byte>(i);
    }
    const std::int64_t n = 3 * format_of(g.type).block_elements;
    std::vector<float> whole(static_cast<std::size_t>(n));
    dequantize(g.type, row.data(), 0, n, whole.data());
    for (std::int64_t begin : {std::int64_t{0}, std::int64_t{5}, n / 3, n / 2 + 1, n - 1}) {
      std::vector<float> part(static_cast<std::size_t>(n - begin));
      dequantize(g.type, row.data(), begin, n - begin, part.data());
      EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + begin)) << begin;
    }
  }
}

TEST(Dequant, test_halves_convert_exactly) {
  EXPECT_EQ(to_float(f16{0x3c00}), 1.0f);
  EXPECT_EQ(to_float(f16{0xc000}), -2.0f);
  EXPECT_EQ(to_float(f16{0x7bff}), 65504.0f);
  EXPECT_EQ(to_float(f16{0x0400}), 0x1p-14f);
  EXPECT_EQ(to_float(f16{0x0001}), 0x1p-24f);  // smallest denormal
  EXPECT_EQ(to_float(f16{0x83ff}), -1023 * 0x1p-24f);
  EXPECT_EQ(to_float(f16{0x7c00}), std::numeric_limits<float>::infinity());
  EXPECT_EQ(to_float(f16{0xfc00}), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(to_float(f16{0x7e00})));
  EXPECT_TRUE(std::signbit(to_float(f16{0x8000})));
}

TEST(Dequant, test_floats_round_to_the_nearest_half) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const f16 half{static_cast<std::uint16_t>(bits)};
    if ((bits & 0x7fff) > 0x7c00) {
      EXPECT_TRUE(std::isnan(to_float(to_f16(to_float(half)))));
      continue;
    }
    ASSERT_EQ(to_f16(to_float(half)).bits, bits);
    if ((bits & 0x7fff) >= 0x7bff) continue;
    // Half way to the next goes to the even one; a little less or more to the nearer one.
    const float x = to_float(half), next = to_float(f16{static_cast<std::uint16_t>(bits + 1)});
    const float middle = (x + next) / 2;
    ASSERT_EQ(to_f16(middle).bits, bits + (bits & 1));
    ASSERT_EQ(to_f16(std::nextafterf(middle, x)).bits, bits);
    ASSERT_EQ(to_f16(std::nextafterf(middle, next)).bits, bits + 1);
  }
  EXPECT_EQ(to_f16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(to_f16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(to_f16(-1e30f).bits, 0xfc00);
}

}  // namespace
}  // namespace fastllm

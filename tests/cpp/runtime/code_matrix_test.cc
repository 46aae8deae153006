// Codes of GPTQ, AWQ and compressed-tensors: the groups handed to a backend stand for the numbers that are read, and
// tensors that do not belong together are refused. What the numbers are is tested against packers in Python.
#include "model/code_matrix.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fastllm/error.h"
#include "test_seed.h"

namespace fastllm {
namespace {

constexpr std::int64_t kRows = 24, kCols = 256;

struct Case {
  CodeLayout layout;
  int bits;
  std::int64_t group;
  bool zeros, ordered, bytes;
};

constexpr Case kCases[] = {
    {CodeLayout::Gptq, 4, 32, true, false, false},  {CodeLayout::Gptq, 4, 128, true, true, false},
    {CodeLayout::Gptq, 8, 64, true, true, false},   {CodeLayout::Gptq, 8, 0, false, false, false},
    {CodeLayout::Awq, 4, 64, true, false, false},   {CodeLayout::Awq, 4, 0, true, false, false},
    {CodeLayout::Rows, 4, 128, false, true, false}, {CodeLayout::Rows, 8, 32, true, false, false},
    {CodeLayout::Rows, 8, 0, false, false, true},   {CodeLayout::Rows, 8, 96, true, false, true},
};

// Random words with ordinary scales; a column's group is random when ordered.
struct Packed {
  std::vector<std::uint32_t> codes, zeros;
  std::vector<float> scales;
  std::vector<std::int32_t> group_of;
  std::shared_ptr<Packing> packing = std::make_shared<Packing>();
  SourceTensor tensor;

  Packed(const Case& c, std::mt19937& rng) {
    const std::int64_t groups = c.group == 0 ? 1 : (kCols + c.group - 1) / c.group, per = 32 / c.bits;
    const bool by_rows = c.layout == CodeLayout::Rows;
    const SourceType type = c.bytes ? SourceType::I8 : SourceType::I32;
    packing->layout = c.layout, packing->bits = c.bits, packing->group = c.group;
    fill(codes, kRows * kCols / per, rng);
    tensor = view("codes", type, codes,
                  c.bytes                        ? Shape{kRows, kCols}
                  : c.layout == CodeLayout::Gptq ? Shape{kCols / per, kRows}
                  : c.layout == CodeLayout::Awq  ? Shape{kCols, kRows / per}
                                                 : Shape{kRows, kCols / per});
    for (std::int64_t i = 0; i < kRows * groups; ++i)
      scales.push_back(to_float(to_f16(std::uniform_real_distribution<float>(0.01f, 0.1f)(rng))));
    packing->scales = view("scales", SourceType::F32, scales, by_rows ? Shape{kRows, groups} : Shape{groups, kRows});
    fill(zeros, kRows * groups / per, rng);
    if (c.zeros)
      packing->zeros = view("zeros", type, zeros,
                            c.bytes   ? Shape{kRows, groups}
                            : by_rows ? Shape{kRows / per, groups}
                                      : Shape{groups, kRows / per});
    if (c.ordered) {
      for (std::int32_t i = 0; i < kCols; ++i) group_of.push_back(i / static_cast<std::int32_t>(c.group));
      std::shuffle(group_of.begin(), group_of.end(), rng);
      packing->group_of = view("groups", SourceType::I32, group_of, {kCols});
    }
    tensor.packing = packing;
  }
  Packed(const Packed&) = delete;

  using Shape = std::vector<std::int64_t>;
  static void fill(std::vector<std::uint32_t>& words, std::int64_t n, std::mt19937& rng) {
    for (std::int64_t i = 0; i < n; ++i) words.push_back(static_cast<std::uint32_t>(rng()));
  }
  template <class T>
  static SourceTensor view(const char* name, SourceType type, const std::vector<T>& data, Shape shape) {
    SourceTensor t;
    t.name = name, t.type = type, t.shape = std::move(shape), t.data = data.data();
    t.bytes = static_cast<std::int64_t>(data.size() * sizeof(T));
    return t;
  }
};

// Numbers of rows [0, kRows) and some columns, in pieces that start anywhere.
std::vector<float> numbers(const CodeMatrix& m, std::int64_t begin, std::int64_t cols) {
  std::vector<float> out(static_cast<std::size_t>(kRows * cols));
  for (std::int64_t r = 0; r < kRows; r += 7)
    m.dequantize(r, std::min(r + 7, kRows), begin, cols, out.data() + r * cols);
  return out;
}

std::vector<float> numbers_of_groups(const CodeMatrix& m, const GroupFormat& f, std::int64_t begin, std::int64_t cols) {
  const std::int64_t groups = cols / f.size;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(kRows * cols));
  std::vector<float> scales(static_cast<std::size_t>(kRows * groups)), offsets(f.offsets ? scales.size() : 0);
  for (std::int64_t r = 0; r < kRows; r += 5)
    m.read_groups(f, r, std::min(r + 5, kRows), begin, cols, codes.data() + r * cols, scales.data() + r * groups,
                  f.offsets ? offsets.data() + r * groups : nullptr);
  std::vector<float> out(codes.size());
  for (std::int64_t r = 0; r < kRows; ++r)
    for (std::int64_t j = 0; j < cols; ++j) {
      const auto g = static_cast<std::size_t>(r * groups + j / f.size), at = static_cast<std::size_t>(r * cols + j);
      EXPECT_LT(codes[at], 1 << f.bits);
      const std::int64_t c = m.order() ? (*m.order())[static_cast<std::size_t>(j)] : j;
      out[static_cast<std::size_t>(r * cols + c)] =
          scales[g] * static_cast<float>(codes[at] - f.zero) + (f.offsets ? offsets[g] : 0.0f);
    }
  return out;
}

void expect_near(const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-5) << "element " << i;
}

TEST(CodeMatrix, test_groups_stand_for_the_numbers_that_are_read) {
  std::mt19937 rng(test::test_seed());
  for (std::size_t i = 0; i < std::size(kCases); ++i) {
    SCOPED_TRACE("case " + std::to_string(i));
    const Case& c = kCases[i];
    const Packed packed(c, rng);
    const CodeMatrix m(packed.tensor, kRows, kCols);
    const GroupFormat own = m.groups();
    EXPECT_EQ(own.bits, c.bits);
    EXPECT_EQ(own.offsets, c.zeros);
    EXPECT_EQ(own.size, c.group == 96 ? 32 : c.group == 0 ? 128 : c.group);
    EXPECT_EQ(m.order() != nullptr, c.ordered);
    const auto want = numbers(m, 0, kCols);
    int tried = 0;
    for (const GroupFormat& f : {own, GroupFormat{own.bits, true, 0, 32}, GroupFormat{8, true, 0, 32},
                                 GroupFormat{8, false, 128, 32}, GroupFormat{4, true, 0, 64}}) {
      if (!m.fits(f)) continue;
      expect_near(numbers_of_groups(m, f, 0, kCols), want);
      ++tried;
    }
    EXPECT_GE(tried, 3);
  }
}

TEST(CodeMatrix, test_columns_can_be_cut_anywhere_and_groups_between_groups) {
  std::mt19937 rng(test::test_seed());
  for (std::size_t i = 0; i < std::size(kCases); ++i) {
    SCOPED_TRACE("case " + std::to_string(i));
    const Packed packed(kCases[i], rng);
    const CodeMatrix m(packed.tensor, kRows, kCols);
    const auto all = numbers(m, 0, kCols);
    for (const auto& [begin, cols] : {std::pair{5, 46}, {128, 128}, {251, 5}}) {
      const auto part = numbers(m, begin, cols);
      for (std::int64_t r = 0; r < kRows; ++r)
        for (std::int64_t c = 0; c < cols; ++c)
          ASSERT_EQ(part[static_cast<std::size_t>(r * cols + c)], all[static_cast<std::size_t>(r * kCols + begin + c)]);
    }
    if (!m.order()) expect_near(numbers_of_groups(m, m.groups(), 128, 128), numbers(m, 128, 128));
  }
}

TEST(CodeMatrix, test_equal_zeros_are_one_number_for_the_weight) {
  std::mt19937 rng(test::test_seed());
  Packed packed({CodeLayout::Gptq, 4, 32, true, false, false}, rng);
  std::fill(packed.zeros.begin(), packed.zeros.end(), 0x77777777u);
  EXPECT_EQ(CodeMatrix(packed.tensor, kRows, kCols).groups(), (GroupFormat{4, false, 7, 32}));
  packed.packing->zeros_less_one = true;
  EXPECT_EQ(CodeMatrix(packed.tensor, kRows, kCols).groups(), (GroupFormat{4, false, 8, 32}));
  std::fill(packed.zeros.begin(), packed.zeros.end(), 0xffffffffu);  // 16 is no code
  EXPECT_EQ(CodeMatrix(packed.tensor, kRows, kCols).groups(), (GroupFormat{4, true, 0, 32}));
}

TEST(CodeMatrix, test_no_groups_where_halves_or_sizes_do_not_allow_them) {
  std::mt19937 rng(test::test_seed());
  const auto why = [](const Packed& p) {
    const CodeMatrix m(p.tensor, kRows, kCols);
    EXPECT_EQ(m.groups().bits, 0);
    EXPECT_TRUE(std::ranges::all_of(numbers(m, 0, kCols), [](float x) { return std::isfinite(x); }));
    return m.why_no_groups();
  };
  for (const float scale : {1e6f, 1e-9f}) {
    Packed packed({CodeLayout::Gptq, 4, 32, true, false, false}, rng);
    packed.scales[3] = scale;
    EXPECT_EQ(why(packed), "its scales are too large or too small for fp16");
  }
  const Packed odd({CodeLayout::Rows, 4, 16, false, false, false}, rng);
  EXPECT_EQ(why(odd), "its groups of 16 columns are no multiple of 32");
  Packed uneven({CodeLayout::Gptq, 4, 64, true, true, false}, rng);
  std::fill(uneven.group_of.begin(), uneven.group_of.begin() + 100, 1);
  EXPECT_EQ(why(uneven), "its groups have different sizes");
}

TEST(CodeMatrix, test_tensors_that_do_not_belong_together_are_refused) {
  const struct {
    std::function<void(Packed&)> change;
    const char* message;
  } rows[] = {
      {[](Packed& p) { p.packing->bits = 3; }, "its codes 'codes' have 3 bits, but 4 and 8 are read"},
      {[](Packed& p) { p.packing->layout = CodeLayout::Awq, p.packing->bits = 8; }, "have 8 bits, but 4 are read"},
      {[](Packed& p) { p.packing->group = -1; }, "have groups of -1 columns"},
      {[](Packed& p) { p.tensor.shape = {kRows, kCols / 8}; },
       "its codes 'codes' have shape [24, 32] of I32; needed is shape [32, 24] of I32"},
      {[](Packed& p) { p.tensor.type = SourceType::F16; }, "of F16; needed is shape [32, 24] of I32"},
      {[](Packed& p) { p.tensor.bytes -= 1; }, "have 3071 bytes"},
      {[](Packed& p) { p.packing->scales.data = nullptr; }, "its scales 'scales' are missing"},
      {[](Packed& p) { p.packing->scales.shape = {2, kRows}; }, "needed is shape [4, 24] of F16 or BF16 or F32"},
      {[](Packed& p) { p.packing->zeros.type = SourceType::I8; }, "its zeros 'zeros' have shape [4, 3] of I8"},
      {[](Packed& p) { p.packing->group = std::int64_t{1} << 40; }, "needed is shape [1, 24]"},
      {[](Packed& p) { p.group_of[5] = 4; }, "its groups 'groups' put column 5 into group 4, but there are 4"},
      {[](Packed& p) { p.group_of[9] = -1; }, "put column 9 into group -1"},
      {[](Packed& p) { p.packing->group_of.type = SourceType::F32; }, "of F32; needed is shape [256] of I32 or I64"},
      {[](Packed& p) { p.packing->group_of.shape = {kCols + 1}; }, "have shape [257] of I32"},
      {[](Packed& p) { p.tensor.interleaved_head_dim = 8; }, "have interleaved rows"},
  };
  std::mt19937 rng(test::test_seed());
  for (const auto& row : rows) {
    Packed packed({CodeLayout::Gptq, 4, 64, true, true, false}, rng);
    row.change(packed);
    try {
      const CodeMatrix m(packed.tensor, kRows, kCols);
      ADD_FAILURE() << "accepted: " << row.message;
    } catch (const LoadError& e) {
      EXPECT_NE(std::string(e.what()).find(row.message), std::string::npos) << e.what();
    }
  }
  const Packed odd({CodeLayout::Gptq, 4, 64, true, true, false}, rng);
  EXPECT_THROW(CodeMatrix(odd.tensor, kRows + 1, kCols), LoadError);
}

TEST(CodeMatrix, test_bytes_that_are_no_codes_of_4_bits_are_refused_when_read) {
  std::mt19937 rng(test::test_seed());
  Packed packed({CodeLayout::Rows, 8, 32, false, false, true}, rng);
  packed.packing->bits = 4;
  std::fill(packed.codes.begin(), packed.codes.end(), 0x07f80700u);
  const CodeMatrix m(packed.tensor, kRows, kCols);
  EXPECT_NO_THROW(numbers(m, 0, kCols));
  packed.codes[70] = 0x08u;
  EXPECT_THROW(numbers(m, 0, kCols), LoadError);
}

}  // namespace
}  // namespace fastllm

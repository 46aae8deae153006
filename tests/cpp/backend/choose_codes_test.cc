// The choice of codes: near the numbers, exact where it can be, and the same for every instruction set.
#include "backend/cpu/choose_codes.h"

#include <algorithm>
#include <array>
#include <span>

#include "group_formats.h"
#include "op_testing.h"

namespace fastllm::test {
namespace {

struct Choice {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales, offsets;  // of each group

  bool operator==(const Choice&) const = default;
};

Choice choose(const cpu::Kernels& kernels, const GroupFormat& f, const std::vector<float>& x) {
  const auto size = static_cast<std::size_t>(f.size);
  const std::size_t groups = (x.size() + size - 1) / size;
  Choice c{std::vector<std::uint8_t>(x.size()), std::vector<float>(groups), std::vector<float>(groups)};
  cpu::choose_codes(kernels, f, x.data(), static_cast<std::int64_t>(x.size()), c.codes.data(), c.scales.data(),
                    f.offsets ? c.offsets.data() : nullptr);
  return c;
}

// The squared error of 4 bits with the best line that starts with a cut off both ends, a group at a time in fp64.
double best_error(std::span<const float> x) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  const auto n = static_cast<double>(x.size());
  const auto code_of = [](double v, double scale, double offset) {
    return std::clamp(std::nearbyint(scale > 0 ? (v - offset) / scale : 0.0), 0.0, 15.0);
  };
  const auto half = [](double v) { return to_float(to_f16(static_cast<float>(v))); };
  double least = std::numeric_limits<double>::infinity();
  for (const double cut : {0.0, 0.03, 0.06, 0.1, 0.15}) {
    const double span = *high - *low, step = span * (1 - 2 * cut) / 15, first = *low + cut * span;
    double u = 0, uu = 0, sum = 0, ux = 0, error = 0;
    for (const double v : x) {
      const double code = code_of(v, step, first);
      u += code, uu += code * code, sum += v, ux += code * v;
    }
    const double spread = n * uu - u * u, slope = spread > 0 ? (n * ux - u * sum) / spread : 0.0;
    const double scale = half(slope), offset = half((sum - slope * u) / n);
    for (const double v : x) error += std::pow(scale * code_of(v, scale, offset) + offset - v, 2);
    least = std::min(least, error);
  }
  return least;
}

class ChooseCodes : public OpTest {
 protected:
  void SetUp() override {
    OpTest::SetUp();
    if (backend) kernels = cpu::select_kernels(GetParam());
  }

  // Squared error over the squared numbers.
  double relative_error(const GroupFormat& f, const std::vector<float>& x) const {
    const Choice c = choose(kernels, f, x);
    double error = 0, all = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t g = i / static_cast<std::size_t>(f.size);
      EXPECT_EQ(to_float(to_f16(c.scales[g])), c.scales[g]);
      EXPECT_EQ(to_float(to_f16(c.offsets[g])), c.offsets[g]);
      EXPECT_LT(c.codes[i], 1 << f.bits);
      const double w = static_cast<double>(c.scales[g]) * (c.codes[i] - f.zero) + c.offsets[g];
      error += (w - x[i]) * (w - x[i]), all += static_cast<double>(x[i]) * x[i];
    }
    return error / all;
  }

  cpu::Kernels kernels{};
};

TEST_P(ChooseCodes, error_is_small_for_normal_numbers) {
  std::vector<float> x;
  for (int i = 0; i < 32 * 500 + 13; ++i) x.push_back(random.normal(0.02f));
  EXPECT_LT(relative_error({8, false, 128}, x), 3.4e-5);
  EXPECT_LT(relative_error({8, true, 0}, x), 3.4e-5);
  // Spanning the numbers from end to end would leave 6.5e-3.
  EXPECT_LT(relative_error({4, true, 0}, x), 6e-3);
  EXPECT_LT(relative_error({4, false, 8}, x), 2e-2);
  EXPECT_LT(relative_error({8, false, 128, 128}, x), 5e-5);
  EXPECT_LT(relative_error({4, true, 0, 128}, x), 1.2e-2);
  EXPECT_LT(relative_error({4, false, 8, 64}, x), 2.5e-2);
}

TEST_P(ChooseCodes, four_bits_leave_less_than_the_best_of_the_spans) {
  for (const std::size_t size : {32u, 64u, 128u}) {
    std::vector<float> x;
    for (std::size_t i = 0; i < 200 * size; ++i) x.push_back(random.normal(0.02f) * random.normal());
    const Choice c = choose(kernels, {4, true, 0, static_cast<int>(size)}, x);
    double ours = 0, best = 0;
    for (std::size_t g = 0; g * size < x.size(); ++g) {
      for (std::size_t i = g * size; i < (g + 1) * size; ++i)
        ours += std::pow(static_cast<double>(c.scales[g]) * c.codes[i] + c.offsets[g] - x[i], 2);
      best += best_error(std::span(x).subspan(g * size, size));
    }
    EXPECT_LT(ours, best) << "groups of " << size;
  }
}

TEST_P(ChooseCodes, all_instruction_sets_choose_the_same) {
  const cpu::Kernels base = cpu::select_kernels("base");
  for (const GroupFormat& f : kFormats) {
    for (const int n : {1, 31, 32, 128, 500, 2048 + 5, 9000}) {
      std::vector<float> x;
      // Some groups of very small and of equal numbers among them.
      for (int i = 0; i < n; ++i) x.push_back(i / 32 % 7 == 3 ? 3e-7f * random.normal() : random.normal(0.1f));
      for (int i = 200; i < std::min(n, 400); ++i) x[static_cast<std::size_t>(i)] = -0.3f;
      EXPECT_TRUE(choose(kernels, f, x) == choose(base, f, x)) << text_of(f) << ", " << n << " numbers";
    }
  }
}

TEST_P(ChooseCodes, numbers_on_the_grid_are_exact) {
  std::vector<float> x;
  for (int i = 0; i < 64; ++i)
    x.push_back(0.125f * static_cast<float>(i % 32 < 2 ? i % 2 * 15 : random.below(16)) - 0.5f);
  EXPECT_EQ(relative_error({4, true, 0}, x), 0);
  for (int i = 0; i < 64; ++i)
    x[static_cast<std::size_t>(i)] = 0.25f * static_cast<float>(i % 32 == 0 ? -127 : random.below(255) - 127);
  EXPECT_EQ(relative_error({8, false, 128}, x), 0);
}

TEST_P(ChooseCodes, equal_and_tiny_numbers_keep_their_value) {
  for (const GroupFormat& f : kFormats) {
    const auto size = static_cast<std::size_t>(f.size);
    std::vector<float> x(size, 0.0f);
    x[0] = 1;  // so that there is something to relate to
    x.insert(x.end(), size + 8, 0.5f);
    x.insert(x.end(), size, 1e-12f);
    EXPECT_LT(relative_error(f, x), f.zero == 16 ? 1e-3 : 1e-5) << text_of(f);
  }
}

TEST_P(ChooseCodes, refuses_what_is_not_finite_or_too_large_wherever_it_is) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const GroupFormat& f : kFormats) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity, 1e30f, -1e30f}) {
      std::vector<float> x;
      for (int i = 0; i < 1000; ++i) x.push_back(random.normal());
      x[static_cast<std::size_t>(random.below(1000))] = bad;
      EXPECT_THROW(choose(kernels, f, x), LoadError) << text_of(f) << ", " << bad;
    }
  }
}

FASTLLM_TEST_ALL_ISAS(ChooseCodes);

}  // namespace
}  // namespace fastllm::test

// The products with grouped weights against their definition in kernels.h, bit for bit.
#include <algorithm>
#include <array>
#include <bit>

#include "op_testing.h"

namespace fastllm::test {
namespace {

using cpu::kPanel;
using cpu::kRowBlock;
using cpu::kSpan;

std::vector<GroupFormat> formats() {
  std::vector<GroupFormat> all;
  for (const int size : {32, 64, 128}) {
    for (const GroupFormat& f : {GroupFormat{8, false, 128}, {8, true, 0}, {4, false, 8}, {4, true, 0}})
      all.push_back({f.bits, f.offsets, f.zero, size});
  }
  all.push_back({8, false, 100, 32});  // codes that do not fit signed bytes
  all.push_back({4, false, 0, 128});
  return all;
}

float from_half(std::uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                        : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

// Codes, scales and offsets of one weight, as they are and packed.
struct Weight {
  Weight(Random& random, const GroupFormat& f, std::int64_t n, std::int64_t k)
      : format(f), n(n), k(k), groups((k + f.size - 1) / f.size) {
    for (std::int64_t i = 0; i < n * k; ++i) codes.push_back(static_cast<std::uint8_t>(random.below(1 << f.bits)));
    // Zero and subnormal ones too.
    const auto half = [&] {
      return static_cast<std::uint16_t>(random.below(2) << 15 | random.below(16) << 10 | random.below(1024));
    };
    for (std::int64_t i = 0; i < n * groups; ++i) scales.push_back(half()), offsets.push_back(half());
    pack();
  }
  int code(std::int64_t row, std::int64_t col) const { return codes[static_cast<std::size_t>(row * k + col)]; }
  float scale(std::int64_t row, std::int64_t g) const {
    return from_half(scales[static_cast<std::size_t>(row * groups + g)]);
  }
  float offset(std::int64_t row, std::int64_t g) const {
    return from_half(offsets[static_cast<std::size_t>(row * groups + g)]);
  }
  std::int64_t panels() const { return (n + kPanel - 1) / kPanel; }

  GroupFormat format;
  std::int64_t n, k, groups;
  std::vector<std::uint8_t> codes;             // [n, k]
  std::vector<std::uint16_t> scales, offsets;  // [n, groups]
  std::vector<std::uint8_t> packed;

 private:
  void pack() {
    const std::int64_t block = cpu::quant_block_bytes(format.bits, format.size, format.offsets);
    const std::int64_t code_bytes = cpu::quant_code_bytes(format.bits, format.size);
    packed.resize(static_cast<std::size_t>(panels() * groups * block));
    for (std::int64_t row = 0; row < n; ++row) {
      for (std::int64_t g = 0; g < groups; ++g) {
        std::uint8_t* at = packed.data() + (row / kPanel * groups + g) * block;
        const std::int64_t column = row % kPanel;
        for (std::int64_t i = 0; i < format.size && g * format.size + i < k; ++i) {
          const auto [byte, shift] = place_of(column, i);
          at[byte] = static_cast<std::uint8_t>(at[byte] | code(row, g * format.size + i) << shift);
        }
        const auto i = static_cast<std::size_t>(row * groups + g);
        std::memcpy(at + code_bytes + column * 2, &scales[i], 2);
        if (format.offsets) std::memcpy(at + code_bytes + (kPanel + column) * 2, &offsets[i], 2);
      }
    }
  }
  // The byte of a block, and the bit of that, where the code of a column and a k starts.
  std::pair<std::int64_t, int> place_of(std::int64_t column, std::int64_t k) const {
    const std::int64_t size = format.size, quad = k / 4;
    const std::int64_t first = column / 16 * size * 2 * format.bits + column % 16 * 4 + k % 4;
    if (format.bits == 8) return {first + quad * 64, 0};
    return {first + quad / 2 * 64, static_cast<int>(quad % 2 * 4)};
  }
};

float product(const Weight& w, const Array& x, std::int64_t m, std::int64_t n) {
  const std::int64_t part = cpu::quant_part(w.format.size);
  float acc = 0;
  for (std::int64_t begin = 0; begin < w.k; begin += part) {
    const std::int64_t end = std::min(begin + part, w.k), g = begin / w.format.size;
    float absmax = 0;
    for (std::int64_t k = begin; k < end; ++k) absmax = std::max(absmax, std::abs(x.get(m, k)));
    const float inverse = absmax > 1e-36f ? 127.0f / absmax : 0.0f;
    int s = 0, isum = 0;
    for (std::int64_t k = begin; k < end; ++k) {
      const int q = static_cast<int>(std::nearbyint(double{x.get(m, k)} * double{inverse}));
      s += q;
      isum += w.code(n, k) * q;
    }
    float y = w.scale(n, g) * static_cast<float>(isum - w.format.zero * s);
    if (w.format.offsets) y = std::fma(w.offset(n, g), static_cast<float>(s), y);
    acc = std::fma(absmax / 127.0f, y, acc);
  }
  return acc;
}

using Gemm = decltype(cpu::Kernels::gemm_quant);

// out = x w^T in as many calls as `panel_step` asks for.
void multiply(const cpu::Kernels& kernels, Gemm gemm, const Weight& w, const Tensor& x, const Tensor& out,
              const float* bias, bool accumulate, std::int64_t panel_step, const std::int32_t* order = nullptr) {
  const std::int64_t m = x.rows(), blocks = (m + kRowBlock - 1) / kRowBlock;
  std::vector<std::byte> prepared(static_cast<std::size_t>(kernels.prepared_quant_bytes(w.k) * blocks),
                                  std::byte{0xff});
  const cpu::QuantRows rows{.x = x.data,
                            .x_bf16 = x.dtype == DType::BF16,
                            .ldx = x.stride[0],
                            .k = w.k,
                            .group = w.format.size,
                            .offsets = w.format.offsets,
                            .zero = w.format.zero,
                            .order = order};
  for (std::int64_t b = 0; b < blocks; ++b)
    kernels.prepare_quant(rows, b * kRowBlock, std::min(m, (b + 1) * kRowBlock), prepared.data());
  std::vector<float> sums(static_cast<std::size_t>(kernels.quant_sums(m, w.k, w.format.size)));
  const cpu::QuantArgs g{.a = prepared.data(),
                         .w = w.packed.data(),
                         .m = m,
                         .n = w.n,
                         .k = w.k,
                         .bits = w.format.bits,
                         .group = w.format.size,
                         .offsets = w.format.offsets,
                         .zero = w.format.zero,
                         .bias = bias,
                         .out = out.data,
                         .ldo = out.stride[0],
                         .out_bf16 = out.dtype == DType::BF16,
                         .accumulate = accumulate,
                         .sums = sums.data()};
  for (std::int64_t p = 0; p < w.panels(); p += panel_step) gemm(g, 0, m, p, std::min(w.panels(), p + panel_step));
}

class QuantKernels : public OpTest {
 protected:
  void SetUp() override {
    OpTest::SetUp();
    if (backend) kernels = cpu::select_kernels(GetParam());
  }
  std::array<Gemm, 2> gemms() const { return {kernels.gemm_quant, kernels.gemm_quant_plain}; }
  cpu::Kernels kernels{};
};

TEST_P(QuantKernels, follow_their_definition) {
  const struct {
    std::int64_t m, n, k;
  } shapes[] = {{1, 1, 1},    {1, 96, 64},  {2, 33, 31},  {3, 40, 200}, {4, 64, 96},   {5, 100, 70},
                {8, 31, 500}, {16, 64, 96}, {17, 31, 65}, {33, 40, 33}, {64, 97, 256}, {70, 70, 100}};
  for (const GroupFormat& f : formats()) {
    for (const auto& s : shapes) {
      const Weight w(random, f, s.n, s.k);
      for (const DType in : {DType::F32, DType::BF16}) {
        Array x = Array(in, s.m, s.k).fill(random);
        for (std::int64_t k = 0; k < std::min(s.k, kSpan); ++k) x.set(s.m - 1, k, 0.0f);
        std::vector<float> bias;
        for (std::int64_t i = 0; i < s.n; ++i) bias.push_back(random.normal());
        std::vector<float> sums;
        for (std::int64_t m = 0; m < s.m; ++m)
          for (std::int64_t n = 0; n < s.n; ++n) sums.push_back(product(w, x, m, n));
        for (const int mode : {0, 1, 2, 3}) {
          const DType type = mode % 2 == 0 ? DType::F32 : DType::BF16;
          const bool add = mode >= 2;
          SCOPED_TRACE(testing::Message() << "bits " << f.bits << " size " << f.size << " offsets " << f.offsets
                                          << " zero " << f.zero << " m " << s.m << " n " << s.n << " k " << s.k << " "
                                          << name_of(in) << " -> " << name_of(type) << " bias and accumulate " << add);
          Array before(type, s.m, s.n + 3);
          if (add) before.fill(random);
          const auto want_of = [&](std::int64_t m, std::int64_t n) {
            const float v = sums[static_cast<std::size_t>(m * s.n + n)];
            return round_to(type, add ? v + bias[static_cast<std::size_t>(n)] + before.get(m, n) : v);
          };
          for (const Gemm gemm : gemms()) {
            Array out = before;
            multiply(kernels, gemm, w, x.tensor(), out.tensor().columns(0, s.n), add ? bias.data() : nullptr, add,
                     1 + random.below(3));
            for (std::int64_t m = 0; m < s.m; ++m) {
              for (std::int64_t n = 0; n < s.n; ++n) {
                ASSERT_EQ(out.get(m, n), want_of(m, n)) << "[" << m << ", " << n << "]";
              }
              for (std::int64_t n = s.n; n < s.n + 3; ++n) {
                const bool untouched = add ? out.get(m, n) == before.get(m, n) : std::isnan(out.get(m, n));
                ASSERT_TRUE(untouched) << "[" << m << ", " << n << "]";
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(QuantKernels, a_row_alone_equals_the_row_in_any_batch) {
  const std::int64_t n = 70, k = 200, most = 70;
  for (const GroupFormat& f : formats()) {
    const Weight w(random, f, n, k);
    const Array x = Array(DType::BF16, most, k).fill(random);
    for (const Gemm gemm : gemms()) {
      Array alone(DType::F32, most, n);
      for (std::int64_t m = 0; m < most; ++m) {
        multiply(kernels, gemm, w, x.tensor().slice(m, 1), alone.tensor().slice(m, 1), nullptr, false, 3);
      }
      for (std::int64_t m = 1; m <= most; ++m) {
        const std::int64_t first = random.below(static_cast<int>(most - m + 1));
        Array batch(DType::F32, m, n);
        multiply(kernels, gemm, w, x.tensor().slice(first, m), batch.tensor(), nullptr, false, 3);
        for (std::int64_t r = 0; r < m; ++r) {
          ASSERT_TRUE(batch.same_row(r, alone, first + r)) << "bits " << f.bits << " batch " << m << " row " << r;
        }
      }
    }
  }
}

// Rows too long for the caches are taken in slabs and stretches whose length depends on the number of rows.
TEST_P(QuantKernels, a_long_row_alone_equals_the_row_in_any_batch) {
  const std::int64_t n = 40, k = 2048 + 32, most = 200;
  for (const GroupFormat& f : {GroupFormat{4, true, 0, 32}, GroupFormat{8, false, 128, 128}}) {
    const Weight w(random, f, n, k);
    const Array x = Array(DType::BF16, most, k).fill(random);
    Array all(DType::F32, most, n);
    multiply(kernels, kernels.gemm_quant, w, x.tensor(), all.tensor(), nullptr, false, 2);
    for (const std::int64_t m : {1, 20, 33, 64, 100}) {
      const std::int64_t first = random.below(static_cast<int>(most - m + 1));
      Array batch(DType::F32, m, n);
      multiply(kernels, kernels.gemm_quant, w, x.tensor().slice(first, m), batch.tensor(), nullptr, false, 1);
      for (std::int64_t r = 0; r < m; ++r)
        ASSERT_TRUE(batch.same_row(r, all, first + r)) << "bits " << f.bits << " batch " << m << " row " << r;
    }
  }
}

TEST_P(QuantKernels, columns_in_another_order_are_those_columns) {
  const std::int64_t m = 21, n = 40, k = 200;
  std::vector<std::int32_t> order(k);
  for (std::int32_t j = 0; j < k; ++j) order[static_cast<std::size_t>(j)] = j;
  for (std::size_t j = order.size(); j > 1; --j)
    std::swap(order[j - 1], order[static_cast<std::size_t>(random.below(static_cast<int>(j)))]);
  for (const GroupFormat& f : formats()) {
    const Weight w(random, f, n, k);
    for (const DType type : {DType::F32, DType::BF16}) {
      const Array x = Array(type, m, k).fill(random);
      Array sorted(type, m, k);
      for (std::int64_t r = 0; r < m; ++r)
        for (std::int64_t j = 0; j < k; ++j) sorted.set(r, j, x.get(r, order[static_cast<std::size_t>(j)]));
      for (const Gemm gemm : gemms()) {
        Array out(DType::F32, m, n), want(DType::F32, m, n);
        multiply(kernels, gemm, w, x.tensor(), out.tensor(), nullptr, false, 2, order.data());
        multiply(kernels, gemm, w, sorted.tensor(), want.tensor(), nullptr, false, 2);
        for (std::int64_t r = 0; r < m; ++r) ASSERT_TRUE(out.same_row(r, want, r)) << "row " << r;
      }
    }
  }
}

// Steps that are subnormal or zero, and values at both ends of the range.
TEST_P(QuantKernels, keep_the_definition_for_extreme_activations) {
  for (const GroupFormat& f : formats()) {
    const Weight w(random, f, 40, 64);
    for (const float size : {1e-44f, 3e-44f, 2e-43f, 1e-40f, 1e-37f, 1e34f}) {
      const Array x = Array(DType::F32, 6, 64).fill(random, size);
      for (const Gemm gemm : gemms()) {
        Array out(DType::F32, 6, 40);
        multiply(kernels, gemm, w, x.tensor(), out.tensor(), nullptr, false, 2);
        for (std::int64_t m = 0; m < 6; ++m) {
          for (std::int64_t n = 0; n < 40; ++n) {
            ASSERT_EQ(out.get(m, n), product(w, x, m, n)) << size;
          }
        }
      }
    }
  }
}

TEST_P(QuantKernels, a_row_that_is_not_finite_stays_so_and_alone) {
  for (const GroupFormat& f : formats()) {
    const Weight w(random, f, 40, 64);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Array x = Array(DType::F32, 7, 64).fill(random);
      const Array clean = x;
      x.set(3, random.below(64), bad);
      for (const Gemm gemm : gemms()) {
        Array out(DType::F32, 7, 40), want(DType::F32, 7, 40);
        multiply(kernels, gemm, w, x.tensor(), out.tensor(), nullptr, false, 2);
        multiply(kernels, gemm, w, clean.tensor(), want.tensor(), nullptr, false, 2);
        for (std::int64_t m = 0; m < 7; ++m) {
          if (m != 3) {
            EXPECT_TRUE(out.same_row(m, want, m));
            continue;
          }
          for (std::int64_t n = 0; n < 40; ++n) EXPECT_FALSE(std::isfinite(out.get(m, n)));
        }
      }
    }
  }
}

FASTLLM_TEST_ALL_ISAS(QuantKernels);

}  // namespace
}  // namespace fastllm::test

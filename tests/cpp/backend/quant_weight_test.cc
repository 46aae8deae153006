// Weights in groups: what is packed can be read back, and products are those of the quantised
// numbers, in fp64, for every instruction set and batch.
#include "backend/cpu/quant_weight.h"

#include <algorithm>
#include <stdexcept>

#include "group_formats.h"
#include "op_testing.h"

namespace fastllm::test {
namespace {

// Random codes, and the numbers they stand for.
struct Codes {
  Codes(const GroupFormat& f, std::int64_t n, std::int64_t k, Random& random)
      : format(f), rows(n), cols(k), groups((k + f.size - 1) / f.size) {
    for (std::int64_t i = 0; i < rows * cols; ++i)
      codes.push_back(static_cast<std::uint8_t>(random.below(1 << format.bits)));
    for (std::int64_t i = 0; i < rows * groups; ++i) {
      scales.push_back(to_float(to_f16(random.normal(0.01f))));  // of either sign, as some formats have them
      offsets.push_back(format.offsets ? to_float(to_f16(random.normal(0.1f))) : 0.0f);
    }
  }
  // Of a column as read_groups() gives it.
  float number(std::int64_t r, std::int64_t c) const {
    const auto g = static_cast<std::size_t>(r * groups + c / format.size);
    const int code = codes[static_cast<std::size_t>(r * cols + c)];
    return scales[g] * static_cast<float>(code - format.zero) + offsets[g];
  }
  HostMatrix matrix() const {
    HostMatrix m{
        rows, cols, [](std::int64_t, std::int64_t, float*) { throw std::logic_error("codes were given"); }, {}};
    m.groups = format;
    m.read_groups = [this](std::int64_t begin, std::int64_t end, std::uint8_t* c, float* s, float* o) {
      EXPECT_EQ(o != nullptr, format.offsets);
      std::copy(codes.begin() + begin * cols, codes.begin() + end * cols, c);
      std::copy(scales.begin() + begin * groups, scales.begin() + end * groups, s);
      if (o != nullptr) std::copy(offsets.begin() + begin * groups, offsets.begin() + end * groups, o);
    };
    return m;
  }

  GroupFormat format;
  std::int64_t rows, cols, groups;
  std::vector<std::uint8_t> codes;
  std::vector<float> scales, offsets;
};

// What prepare_i8() makes of a row: x is about step * value.
struct QuantRow {
  std::vector<int> values;
  std::vector<float> steps;  // by part
};

QuantRow quantise_row(const Array& x, std::int64_t r, std::int64_t part) {
  QuantRow q;
  for (std::int64_t begin = 0; begin < x.cols(); begin += part) {
    const std::int64_t end = std::min(begin + part, x.cols());
    float most = 0;
    for (std::int64_t k = begin; k < end; ++k) most = std::max(most, std::abs(x.get(r, k)));
    const double inverse = most > 0 ? 127.0f / most : 0.0f;
    q.steps.push_back(most / 127);
    for (std::int64_t k = begin; k < end; ++k)
      q.values.push_back(static_cast<int>(std::nearbyint(x.get(r, k) * inverse)));
  }
  return q;
}

class QuantWeights : public OpTest {
 protected:
  void check(const Codes& w, const PackedWeight& packed, std::int64_t m, DType in, DType out_type, bool bias,
             bool accumulate) {
    SCOPED_TRACE(testing::Message() << text_of(w.format) << " m " << m << " n " << w.rows << " k " << w.cols << " "
                                    << name_of(in) << " -> " << name_of(out_type) << " bias " << bias << " accumulate "
                                    << accumulate);
    const Array x = Array(in, m, w.cols).fill(random);
    std::vector<float> b(static_cast<std::size_t>(w.rows));
    for (auto& v : b) v = random.normal();
    Array out(out_type, m, w.rows);
    if (accumulate) out.fill(random);
    const Array before = out;
    backend->linear(out.tensor(), x.tensor(), packed, bias ? b.data() : nullptr, accumulate);
    const std::int64_t part = cpu::quant_part(w.format.size);
    int bad = 0;
    for (std::int64_t r = 0; r < m; ++r) {
      const QuantRow q = quantise_row(x, r, part);
      for (std::int64_t n = 0; n < w.rows; ++n) {
        double want = accumulate ? before.get(r, n) : 0.0, magnitude = std::abs(want);
        for (std::int64_t k = 0; k < w.cols; ++k) {
          const double step = q.steps[static_cast<std::size_t>(k / part)];
          const double product = step * q.values[static_cast<std::size_t>(k)] * w.number(n, k);
          want += product, magnitude += std::abs(product);
        }
        if (bias) want += b[static_cast<std::size_t>(n)];
        const double bound = 1e-5 * magnitude + (out_type == DType::BF16 ? std::abs(want) / 128 : 0.0) + 1e-6;
        if (!(std::abs(out.get(r, n) - want) <= bound) && ++bad < 4)
          ADD_FAILURE() << "[" << r << ", " << n << "] is " << out.get(r, n) << ", not " << want;
      }
    }
    EXPECT_EQ(bad, 0);
  }
};

TEST_P(QuantWeights, products_match_fp64_over_the_quantised_numbers) {
  struct Shape {
    std::int64_t m, n, k;
  };
  const Shape shapes[] = {{1, 1, 32},    {1, 96, 64},   {5, 33, 96},  {16, 40, 70},
                          {33, 65, 128}, {70, 100, 37}, {2, 64, 1024}};
  for (const GroupFormat& f : kFormats) {
    for (const Shape& s : shapes) {
      const Codes w(f, s.n, s.k, random);
      const auto packed = backend->pack(w.matrix(), DType::BF16);
      EXPECT_EQ(packed->rows(), s.n);
      EXPECT_EQ(packed->cols(), s.k);
      check(w, *packed, s.m, DType::BF16, DType::F32, false, false);
      check(w, *packed, s.m, DType::BF16, DType::BF16, true, false);
      check(w, *packed, s.m, DType::F32, DType::F32, true, true);
    }
  }
}

TEST_P(QuantWeights, a_row_alone_equals_the_row_in_any_batch) {
  for (const GroupFormat& f : kFormats) {
    const std::int64_t n = 70, k = 200, most = 70;
    const Codes w(f, n, k, random);
    const auto packed = backend->pack(w.matrix(), DType::BF16);
    const Array x = Array(DType::BF16, most, k).fill(random);
    Array alone(DType::F32, most, n);
    for (std::int64_t m = 0; m < most; ++m)
      backend->linear(alone.tensor().slice(m, 1), x.tensor().slice(m, 1), *packed, nullptr, false);
    for (const std::int64_t m : {2, 3, 8, 16, 17, 31, 32, 33, 64, 70}) {
      const std::int64_t first = random.below(static_cast<int>(most - m + 1));
      Array batch(DType::F32, m, n);
      backend->linear(batch.tensor(), x.tensor().slice(first, m), *packed, nullptr, false);
      for (std::int64_t r = 0; r < m; ++r)
        ASSERT_TRUE(batch.same_row(r, alone, first + r)) << text_of(f) << " batch " << m << " row " << r;
    }
  }
}

TEST_P(QuantWeights, all_instruction_sets_give_the_same_bits) {
  const auto base = make_cpu_backend(2, "base");
  for (const GroupFormat& f : kFormats) {
    const Codes w(f, 70, 200, random);
    for (const std::int64_t m : {1, 7, 40}) {
      const Array x = Array(DType::F32, m, 200).fill(random);
      Array ours(DType::F32, m, 70), theirs(DType::F32, m, 70);
      backend->linear(ours.tensor(), x.tensor(), *backend->pack(w.matrix(), DType::F32), nullptr, false);
      base->linear(theirs.tensor(), x.tensor(), *base->pack(w.matrix(), DType::F32), nullptr, false);
      for (std::int64_t r = 0; r < m; ++r) ASSERT_TRUE(ours.same_row(r, theirs, r)) << text_of(f) << " row " << r;
    }
  }
}

TEST_P(QuantWeights, embeds_rows_of_a_table_in_groups) {
  for (const GroupFormat& f : kFormats) {
    const Codes w(f, 77, 80, random);
    const auto packed = backend->pack(w.matrix(), DType::BF16);
    const std::vector<TokenId> ids = {100, 176, 140, 99, 177};
    Array out(DType::F32, static_cast<std::int64_t>(ids.size()), 80);
    init_steps(*backend, 16);
    const StepRow row{0, 5, 0, SlotId{0}, false};
    backend->embed(out.tensor(), begin_step(*backend, {&row, 1}, {}, ids), *packed, 100, 2.0f);
    for (std::size_t t = 0; t < ids.size(); ++t) {
      const bool here = ids[t] >= 100 && ids[t] < 177;
      for (std::int64_t c = 0; c < 80; ++c)
        EXPECT_EQ(out.get(static_cast<std::int64_t>(t), c), here ? 2.0f * w.number(ids[t] - 100, c) : 0.0f);
    }
  }
}

// A checkpoint that sorted columns: the product is that of the weight with its columns where they belong.
TEST_P(QuantWeights, sorted_columns_meet_the_activations_they_belong_to) {
  const std::int64_t m = 9, n = 50, k = 300;
  auto order = std::make_shared<std::vector<std::int32_t>>();
  for (std::int32_t j = 0; j < k; ++j) order->push_back(j);
  for (std::size_t j = order->size(); j > 1; --j)
    std::swap((*order)[j - 1], (*order)[static_cast<std::size_t>(random.below(static_cast<int>(j)))]);
  const auto base = make_cpu_backend(2, "base");
  for (const GroupFormat& f : kFormats) {
    const Codes w(f, n, k, random);
    HostMatrix sorted = w.matrix();
    sorted.order = order;
    const auto packed = backend->pack(sorted, DType::BF16);
    const Array x = Array(DType::BF16, m, k).fill(random);
    Array out(DType::F32, m, n), theirs(DType::F32, m, n), alone(DType::F32, 1, n);
    backend->linear(out.tensor(), x.tensor(), *packed, nullptr, false);
    base->linear(theirs.tensor(), x.tensor(), *base->pack(sorted, DType::BF16), nullptr, false);
    for (std::int64_t r = 0; r < m; ++r) {
      backend->linear(alone.tensor(), x.tensor().slice(r, 1), *packed, nullptr, false);
      ASSERT_TRUE(out.same_row(r, alone, 0) && out.same_row(r, theirs, r)) << text_of(f) << " row " << r;
      for (std::int64_t c = 0; c < n; ++c) {
        double want = 0, bound = 1e-6;
        for (std::int64_t j = 0; j < k; ++j) {
          const double number = w.number(c, j);
          want += number * x.get(r, (*order)[static_cast<std::size_t>(j)]);
          bound += std::abs(number) * 5.0 / 254;  // half a step of numbers below 5
        }
        ASSERT_NEAR(out.get(r, c), want, bound) << text_of(f);
      }
    }
    init_steps(*backend, 16);
    const StepRow row{0, 1, 0, SlotId{0}, false};
    Array read(DType::F32, 1, k);
    backend->embed(read.tensor(), begin_step(*backend, {&row, 1}, {}, {n - 1}), *packed, 0, 1.0f);
    for (std::int64_t j = 0; j < k; ++j)
      EXPECT_EQ(read.get(0, (*order)[static_cast<std::size_t>(j)]), w.number(n - 1, j)) << text_of(f);
  }
}

TEST_P(QuantWeights, numbers_are_quantised_when_there_are_no_codes) {
  const Array numbers = Array(DType::F32, 40, 100).fill(random);
  HostMatrix m = host_matrix(numbers);
  m.groups = {8, false, 128};
  const auto packed = backend->pack(m, DType::BF16);
  EXPECT_LT(packed->bytes(), 2u * 40 * 128);
  Array out(DType::F32, 2, 100);
  init_steps(*backend, 16);
  const StepRow row{0, 2, 0, SlotId{0}, false};
  backend->embed(out.tensor(), begin_step(*backend, {&row, 1}, {}, {0, 39}), *packed, 0, 1.0f);
  for (std::int64_t c = 0; c < 100; ++c) {
    EXPECT_NEAR(out.get(0, c), numbers.get(0, c), 5.0 / 254);  // half a step of numbers below 5
    EXPECT_NEAR(out.get(1, c), numbers.get(39, c), 5.0 / 254);
  }
}

TEST_P(QuantWeights, pack_reports_a_failing_reader_and_numbers_that_cannot_be_quantised) {
  HostMatrix broken{100,
                    10,
                    [](std::int64_t begin, std::int64_t, float*) {
                      if (begin >= 64) throw std::runtime_error("unreadable");
                    },
                    {}};
  broken.groups = {8, false, 128};
  EXPECT_THROW(backend->pack(broken, DType::BF16), std::runtime_error);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30f}) {
    for (const GroupFormat& f : {GroupFormat{8, false, 128}, GroupFormat{4, true, 0}}) {
      Array numbers = Array(DType::F32, 3, 40).fill(random);
      numbers.set(1, 35, bad);
      HostMatrix m = host_matrix(numbers);
      m.groups = f;
      EXPECT_THROW(backend->pack(m, DType::BF16), LoadError) << bad;
    }
  }
}

FASTLLM_TEST_ALL_ISAS(QuantWeights);

}  // namespace
}  // namespace fastllm::test

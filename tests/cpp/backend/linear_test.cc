// Matrix products and embeddings against fp64, and their independence of the batch.
#include <stdexcept>

#include "op_testing.h"

namespace fastllm::test {
namespace {

class Linear : public OpTest {};

struct Shape {
  std::int64_t m, n, k;
};

void check_linear(Backend& backend, Random& random, DType compute, Shape s, DType out_type, bool bias,
                  bool accumulate) {
  SCOPED_TRACE(testing::Message() << "m " << s.m << " n " << s.n << " k " << s.k << " " << name_of(compute) << " -> "
                                  << name_of(out_type) << " bias " << bias << " accumulate " << accumulate);
  const Array w = Array(compute, s.n, s.k).fill(random);
  const Array x = Array(compute, s.m, s.k).fill(random);
  std::vector<float> b(static_cast<std::size_t>(s.n));
  for (auto& v : b) v = random.normal();
  Array out(out_type, s.m, s.n);
  if (accumulate) out.fill(random);
  const Array before = out;
  const auto packed = backend.pack(host_matrix(w), compute);
  EXPECT_EQ(packed->rows(), s.n);
  EXPECT_EQ(packed->cols(), s.k);
  backend.linear(out.tensor(), x.tensor(), *packed, bias ? b.data() : nullptr, accumulate);
  int bad = 0;
  for (std::int64_t m = 0; m < s.m; ++m) {
    for (std::int64_t n = 0; n < s.n; ++n) {
      double want = accumulate ? before.get(m, n) : 0.0;
      double magnitude = std::abs(want);
      for (std::int64_t k = 0; k < s.k; ++k) {
        want += static_cast<double>(x.get(m, k)) * w.get(n, k);
        magnitude += std::abs(static_cast<double>(x.get(m, k)) * w.get(n, k));
      }
      if (bias) want += b[static_cast<std::size_t>(n)];
      const double bound = 2e-6 * magnitude + (out_type == DType::BF16 ? std::abs(want) / 128 : 0.0) + 1e-6;
      if (!(std::abs(out.get(m, n) - want) <= bound) && ++bad < 4) {
        ADD_FAILURE() << "[" << m << ", " << n << "] is " << out.get(m, n) << ", not " << want;
      }
    }
  }
  EXPECT_EQ(bad, 0);
}

TEST_P(Linear, matches_fp64_for_all_shapes) {
  const Shape shapes[] = {{1, 1, 1},     {1, 96, 64},    {2, 33, 31},  {5, 100, 70},  {16, 64, 576},
                          {17, 31, 65},  {31, 65, 96},   {32, 96, 32}, {33, 40, 33},  {64, 97, 128},
                          {70, 130, 48}, {1, 576, 1536}, {3, 7, 1000}, {129, 72, 100}};
  for (const DType compute : {DType::F32, DType::BF16}) {
    for (const Shape& s : shapes) {
      check_linear(*backend, random, compute, s, DType::F32, false, false);
      check_linear(*backend, random, compute, s, compute, true, false);
      check_linear(*backend, random, compute, s, DType::F32, true, true);
    }
  }
}

TEST_P(Linear, gated_product_equals_the_product_and_the_activation) {
  for (const DType compute : {DType::F32, DType::BF16}) {
    for (const std::int64_t inner : {320, 40}) {  // whole panels or not
      const std::int64_t k = 100;
      const Array w = Array(compute, 2 * inner, k).fill(random);
      const auto packed = backend->pack(host_matrix(w), compute);
      std::vector<float> bias(static_cast<std::size_t>(2 * inner));
      for (float& b : bias) b = random.normal();
      for (const std::int64_t m : {1, 5, 33, 70}) {
        const Array x = Array(compute, m, k).fill(random);
        Array both(compute, m, 2 * inner), want(compute, m, inner), got(compute, m, inner);
        const float* b = random.below(2) == 0 ? bias.data() : nullptr;
        backend->linear(both.tensor(), x.tensor(), *packed, b, false);
        backend->gated_act(want.tensor(), both.tensor(), Activation::Silu);
        backend->gated_linear(got.tensor(), both.tensor(), x.tensor(), *packed, b, Activation::Silu);
        for (std::int64_t r = 0; r < m; ++r)
          ASSERT_TRUE(got.same_row(r, want, r)) << name_of(compute) << " inner " << inner << " rows " << m;
      }
    }
  }
}

// More columns and rows than the caches hold at once are multiplied in parts.
TEST_P(Linear, long_rows_in_a_large_batch_equal_the_rows_alone) {
  const std::int64_t n = 70, k = 2100;
  const Array w = Array(DType::BF16, n, k).fill(random);
  const auto packed = backend->pack(host_matrix(w), DType::BF16);
  for (const std::int64_t m : {40, 399, 500}) {
    const Array x = Array(DType::BF16, m, k).fill(random);
    Array batch(DType::F32, m, n), alone(DType::F32, 1, n);
    backend->linear(batch.tensor(), x.tensor(), *packed, nullptr, false);
    for (int i = 0; i < 20; ++i) {
      const std::int64_t r = i == 0 ? m - 1 : random.below(static_cast<int>(m));
      backend->linear(alone.tensor(), x.tensor().slice(r, 1), *packed, nullptr, false);
      ASSERT_TRUE(alone.same_row(0, batch, r)) << "batch " << m << " row " << r;
    }
  }
}

TEST_P(Linear, a_row_alone_equals_the_row_in_any_batch) {
  for (const DType compute : {DType::F32, DType::BF16}) {
    const std::int64_t n = 70, k = 200, most = 70;
    const Array w = Array(compute, n, k).fill(random);
    const Array x = Array(compute, most, k).fill(random);
    const auto packed = backend->pack(host_matrix(w), compute);
    Array alone(DType::F32, most, n);
    for (std::int64_t m = 0; m < most; ++m) {
      backend->linear(alone.tensor().slice(m, 1), x.tensor().slice(m, 1), *packed, nullptr, false);
    }
    for (std::int64_t m = 1; m <= most; ++m) {
      const std::int64_t first = random.below(static_cast<int>(most - m + 1));
      Array batch(DType::F32, m, n);
      backend->linear(batch.tensor(), x.tensor().slice(first, m), *packed, nullptr, false);
      for (std::int64_t r = 0; r < m; ++r) {
        ASSERT_TRUE(batch.same_row(r, alone, first + r)) << name_of(compute) << " batch " << m << " row " << r;
      }
    }
  }
}

// A product of few rows asks for lines of the weight that followed the last time, which may be gone or another by now.
TEST_P(Linear, a_product_is_the_same_whatever_followed_its_weight) {
  constexpr std::int64_t kCols = 96;
  const Array x = Array(DType::BF16, 3, kCols).fill(random);
  const Array first = Array(DType::BF16, 130, kCols).fill(random), other = Array(DType::BF16, 65, kCols).fill(random);
  const auto packed = backend->pack(host_matrix(first), DType::BF16);
  Array expected(DType::F32, 3, 130), out(DType::F32, 3, 130), rest(DType::F32, 3, 65);
  backend->linear(expected.tensor(), x.tensor(), *packed, nullptr, false);
  for (int i = 0; i < 3; ++i) {
    const auto follower = backend->pack(host_matrix(other), DType::BF16);
    backend->linear(rest.tensor(), x.tensor(), *follower, nullptr, false);
    backend->linear(out.tensor(), x.tensor(), *packed, nullptr, false);
    for (std::int64_t r = 0; r < 3; ++r) ASSERT_TRUE(out.same_row(r, expected, r)) << "round " << i << " row " << r;
  }
}

TEST_P(Linear, takes_rows_with_a_stride) {
  const Array w = Array(DType::BF16, 40, 64).fill(random);
  const Array wide = Array(DType::BF16, 6, 100).fill(random);
  Array narrow(DType::BF16, 6, 64), out_wide(DType::F32, 6, 90), out(DType::F32, 6, 40);
  for (int r = 0; r < 6; ++r)
    for (int c = 0; c < 64; ++c) narrow.set(r, c, wide.get(r, c + 8));
  const auto packed = backend->pack(host_matrix(w), DType::BF16);
  backend->linear(out.tensor(), narrow.tensor(), *packed, nullptr, false);
  backend->linear(out_wide.tensor().columns(50, 40), wide.tensor().columns(8, 64), *packed, nullptr, false);
  for (int r = 0; r < 6; ++r) {
    for (int c = 0; c < 90; ++c) {
      if (c < 50) {
        EXPECT_TRUE(std::isnan(out_wide.get(r, c)));
      } else {
        EXPECT_EQ(out_wide.get(r, c), out.get(r, c - 50));
      }
    }
  }
}

TEST_P(Linear, embeds_rows_of_a_packed_table_and_zeroes_foreign_ids) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    const Array table = Array(dtype, 77, 50).fill(random);
    const auto packed = backend->pack(host_matrix(table), dtype);
    const std::vector<TokenId> ids = {100, 176, 140, 99, 177, 0, 101};
    Array out(DType::F32, static_cast<std::int64_t>(ids.size()), 50);
    init_steps(*backend, 16);
    const StepRow row{0, 7, 0, SlotId{0}, false};
    backend->embed(out.tensor(), begin_step(*backend, {&row, 1}, {}, ids), *packed, 100, 3.0f);
    for (std::size_t t = 0; t < ids.size(); ++t) {
      const bool here = ids[t] >= 100 && ids[t] < 177;
      for (std::int64_t c = 0; c < 50; ++c) {
        EXPECT_EQ(out.get(static_cast<std::int64_t>(t), c), here ? 3.0f * table.get(ids[t] - 100, c) : 0.0f);
      }
    }
  }
}

TEST_P(Linear, pack_reports_a_failing_reader) {
  const HostMatrix broken{100,
                          10,
                          [](std::int64_t begin, std::int64_t, float*) {
                            if (begin >= 64) throw std::runtime_error("unreadable");
                          },
                          {}};
  EXPECT_THROW(backend->pack(broken, DType::BF16), std::runtime_error);
}

FASTLLM_TEST_ALL_ISAS(Linear);

TEST(CpuIsa, an_unknown_name_is_refused_with_the_choices) {
  try {
    make_cpu_backend(1, "mmx");
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("base"), std::string::npos);
  }
  EXPECT_THROW(make_cpu_backend(0), InvalidArgument);
}

TEST(CpuIsa, info_names_the_level_and_bounds_memory) {
  const DeviceInfo info = make_cpu_backend(1, "base")->info();
  EXPECT_EQ(info.name, "cpu (base, 1 thread)");
  EXPECT_GT(info.memory_free, 0);
  EXPECT_LE(info.memory_free, info.memory_total);
}

}  // namespace
}  // namespace fastllm::test

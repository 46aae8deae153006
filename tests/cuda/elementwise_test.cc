// Embeddings, activations, additions, gathers against their formulas in double precision.
#include "elementwise.h"

#include <cmath>

#include "backend/exact_activation.h"
#include "check_rows.h"

namespace fastllm::test {
namespace {

class CudaElementwise : public CudaTest {
 protected:
  // Runs f on a copy of `before` on the device.
  template <class F>
  Array changed(const Array& before, F&& f) {
    const DeviceMatrix device(before);
    f(device);
    return device.download();
  }
};

constexpr DType kFloats[] = {DType::F32, DType::BF16};

struct Shape {
  std::int64_t rows, cols, pad;  // pad: columns between the end of a row and the next one
};
constexpr Shape kShapes[] = {{1, 1, 0},  {1, 32, 0},   {3, 100, 3},  {2, 576, 0},    {5, 64, 8},
                             {7, 33, 1}, {1, 8192, 0}, {2, 2052, 4}, {130, 1536, 16}};

// A matrix whose first elements are the hard ones: zeros, far tails, large values.
Array activation_inputs(Random& random, DType dtype, std::int64_t rows, std::int64_t cols) {
  Array x(dtype, rows, cols);
  x.fill(random, 3.0f);
  const float hard[] = {0.0f, -0.0f, 1e-20f, -1e-20f, 12.0f, -12.0f, 90.0f, -90.0f, 1e4f, -1e4f};
  std::int64_t c = 0;
  for (const float v : hard) {
    if (c < cols) x.set(0, c++, v);
  }
  return x;
}

std::string act_name(Activation act) {
  const char* names[] = {"silu", "gelu", "gelu_tanh", "relu"};
  return names[static_cast<int>(act)];
}
constexpr Activation kActs[] = {Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu};

TEST_F(CudaElementwise, ActivationsFollowTheirFormulas) {
  for (const DType dtype : kFloats) {
    for (const Activation act : kActs) {
      for (const Shape& s : kShapes) {
        const Array x = activation_inputs(random, dtype, s.rows + 1, s.cols + s.pad);
        const Array got = changed(
            x, [&](const DeviceMatrix& d) { cuda::act(d.data(), s.cols + s.pad, s.rows, s.cols, dtype, act, stream); });
        expect_rows(act_name(act), x, got, s.rows, s.cols, tolerance_of(dtype),
                    [&](auto r, auto c) { return exact_activation(x.get(r, c), act); });
      }
    }
  }
}

TEST_F(CudaElementwise, GatedActivationsMultiply) {
  for (const DType dtype : kFloats) {
    for (const Activation act : kActs) {
      for (const Shape& s : kShapes) {
        Array in = activation_inputs(random, dtype, s.rows, 2 * s.cols + s.pad);
        if (s.cols >= 10) {
          for (std::int64_t c = 0; c < 10; ++c) in.set(0, s.cols + c, 0.5f);
        }
        const Array before(dtype, s.rows + 1, s.cols + s.pad);
        const DeviceMatrix device_in(in);
        const Array got = changed(before, [&](const DeviceMatrix& d) {
          cuda::gated_act(d.data(), s.cols + s.pad, device_in.data(), 2 * s.cols + s.pad, s.rows, s.cols, dtype, act,
                          stream);
        });
        expect_rows("gated " + act_name(act), before, got, s.rows, s.cols, tolerance_of(dtype),
                    [&](auto r, auto c) { return exact_activation(in.get(r, c), act) * in.get(r, s.cols + c); });
      }
    }
  }
}

TEST_F(CudaElementwise, AddsMatricesAndBiases) {
  for (const Shape& s : kShapes) {
    Array x(DType::F32, s.rows + 1, s.cols + s.pad), y(DType::F32, s.rows, s.cols + 4);
    x.fill(random), y.fill(random);
    const DeviceMatrix device_y(y);
    const Array sum = changed(x, [&](const DeviceMatrix& d) {
      cuda::add(d.ptr<float>(), s.cols + s.pad, device_y.ptr<float>(), s.cols + 4, s.rows, s.cols, stream);
    });
    expect_rows("add", x, sum, s.rows, s.cols, 1e-6, [&](auto r, auto c) { return x.get(r, c) + y.get(r, c); });

    for (const DType dtype : kFloats) {
      Array out(dtype, s.rows + 1, s.cols + s.pad);
      out.fill(random);
      const auto bias = random_vector(random, s.cols);
      const DeviceArray<float> device_bias(bias);
      const Array got = changed(out, [&](const DeviceMatrix& d) {
        cuda::add_bias(d.data(), s.cols + s.pad, dtype, device_bias.get(), s.rows, s.cols, stream);
      });
      expect_rows("add_bias", out, got, s.rows, s.cols, tolerance_of(dtype),
                  [&](auto r, auto c) { return out.get(r, c) + bias[static_cast<std::size_t>(c)]; });
    }
  }
}

TEST_F(CudaElementwise, ScalesAndCapsLogits) {
  const std::pair<float, float> cases[] = {{0.25f, 0.0f}, {1.0f, 30.0f}, {3.0f, 5.0f}};
  for (const auto& [scale, cap] : cases) {
    for (const Shape& s : kShapes) {
      Array x(DType::F32, s.rows + 1, s.cols + s.pad);
      x.fill(random, 20.0f);
      const Array got = changed(x, [&, scale = scale, cap = cap](const DeviceMatrix& d) {
        cuda::scale_softcap(d.ptr<float>(), s.cols + s.pad, s.rows, s.cols, scale, cap, stream);
      });
      expect_rows("scale_softcap", x, got, s.rows, s.cols, 2e-6, [&, scale = scale, cap = cap](auto r, auto c) {
        const double v = static_cast<double>(x.get(r, c)) * scale;
        return cap > 0 ? cap * std::tanh(v / cap) : v;
      });
    }
  }
}

TEST_F(CudaElementwise, EmbedsRowsOfThisRank) {
  constexpr int kRows = 37, kBegin = 50;
  for (const DType dtype : kFloats) {
    for (const Shape& s : kShapes) {
      Array table(dtype, kRows, s.cols);
      table.fill(random);
      std::vector<TokenId> ids;
      for (std::int64_t t = 0; t < s.rows; ++t) ids.push_back(kBegin - 3 + random.below(43));
      const TokenId edges[] = {kBegin + kRows - 1, kBegin, kBegin - 1, kBegin + kRows};
      for (std::size_t t = 0; t < std::size(edges) && t < ids.size(); ++t) ids[t] = edges[t];
      const DeviceMatrix device_table(table);
      const DeviceArray<TokenId> device_ids(ids);
      const Array before(DType::F32, s.rows + 1, s.cols);
      const Array got = changed(before, [&](const DeviceMatrix& d) {
        cuda::embed(d.ptr<float>(), device_ids.get(), s.rows, device_table.data(), dtype, kRows, s.cols, kBegin, 1.5f,
                    stream);
      });
      expect_rows(std::string("embed from ") + name_of(dtype), before, got, s.rows, s.cols, 1e-6, [&](auto r, auto c) {
        const std::int64_t row = ids[static_cast<std::size_t>(r)] - kBegin;
        return row >= 0 && row < kRows ? 1.5 * table.get(row, c) : 0.0;
      });
    }
  }
}

TEST_F(CudaElementwise, EmbedsFromBeyondFourGigabytes) {
  constexpr std::int64_t kCols = 4096, kRows = 600'000, kLast = kRows - 1;
  constexpr std::size_t kBytes = std::size_t{kCols} * kRows * 2;
  if (!has_memory(kBytes)) GTEST_SKIP() << "needs " << (kBytes >> 30) << " GiB of device memory";
  const DeviceArray<std::byte> table(kBytes);
  Array row(DType::BF16, 1, kCols);
  row.fill(random);
  cuda::check(cudaMemcpy(table.get() + std::size_t{kLast} * kCols * 2, row.tensor().data, row.tensor().bytes(),
                         cudaMemcpyHostToDevice),
              "cudaMemcpy");
  const DeviceArray<TokenId> ids(std::vector<TokenId>{static_cast<TokenId>(kLast)});
  const Array before(DType::F32, 1, kCols);
  const Array got = changed(before, [&](const DeviceMatrix& d) {
    cuda::embed(d.ptr<float>(), ids.get(), 1, table.get(), DType::BF16, kRows, kCols, 0, 1.0f, stream);
  });
  expect_rows("embed", before, got, 1, kCols, 1e-6, [&](auto, auto c) { return row.get(0, c); });
}

TEST_F(CudaElementwise, AddsLearnedPositions) {
  for (const Shape& s : kShapes) {
    Array table(DType::F32, 11, s.cols), x(DType::F32, s.rows + 1, s.cols);
    table.fill(random), x.fill(random);
    std::vector<std::int32_t> positions;
    for (std::int64_t t = 0; t < s.rows; ++t) positions.push_back(t == 0 ? 10 : random.below(11));
    const DeviceMatrix device_table(table);
    const DeviceArray<std::int32_t> device_positions(positions);
    const Array got = changed(x, [&](const DeviceMatrix& d) {
      cuda::add_positions(d.ptr<float>(), device_positions.get(), s.rows, device_table.ptr<float>(), s.cols, stream);
    });
    expect_rows("add_positions", x, got, s.rows, s.cols, 1e-6,
                [&](auto r, auto c) { return x.get(r, c) + table.get(positions[static_cast<std::size_t>(r)], c); });
  }
}

TEST_F(CudaElementwise, GathersWholeRows) {
  for (const DType dtype : kFloats) {
    for (const Shape& s : kShapes) {
      Array x(dtype, 9, s.cols + s.pad);
      x.fill(random);
      std::vector<std::int32_t> rows;
      for (std::int64_t i = 0; i < s.rows; ++i) rows.push_back(i == 0 ? 8 : random.below(9));
      const DeviceMatrix device_x(x);
      const DeviceArray<std::int32_t> device_rows(rows);
      const Array before(dtype, s.rows + 1, s.cols + s.pad);
      const std::size_t element = size_of(dtype), stride = static_cast<std::size_t>(s.cols + s.pad) * element;
      const Array got = changed(before, [&](const DeviceMatrix& d) {
        cuda::gather_rows(d.data(), stride, device_x.data(), stride, static_cast<std::size_t>(s.cols) * element,
                          device_rows.get(), s.rows, stream);
      });
      expect_rows("gather_rows", before, got, s.rows, s.cols, 0.0,
                  [&](auto r, auto c) { return x.get(rows[static_cast<std::size_t>(r)], c); });
    }
  }
}

TEST_F(CudaElementwise, RoundsToBf16LikeTheHost) {
  for (const std::int64_t n : {1, 3, 4, 31, 4096, 100'003}) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = random.normal(100.0f);
    const float hard[] = {0.0f, -0.0f, 1.00390625f, 1.01171875f, 3.4e38f, 1e-40f, INFINITY};
    for (std::size_t i = 0; i < std::size(hard) && i < x.size(); ++i) x[i] = hard[i];
    const DeviceArray<float> in(x);
    const DeviceArray<std::uint16_t> out(x.size() + 1);
    cuda::convert_to_bf16(out.get(), in.get(), n, stream);
    const auto got = out.download();
    EXPECT_EQ(got.back(), 0xffff) << "written beyond the end, n " << n;
    for (std::size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(got[i], to_bf16(x[i]).bits) << x[i] << " at " << i << " of " << n << "; seed " << test_seed();
    }
  }
}

}  // namespace
}  // namespace fastllm::test

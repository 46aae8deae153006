// Norms against their formulas in double precision.
#include <cmath>

#include "check_rows.h"
#include "elementwise.h"

namespace fastllm::test {
namespace {

class CudaNorm : public CudaTest {};

struct Case {
  std::int64_t rows, cols, pad;  // pad: columns between the end of a row and the next one
  NormKind kind;
  bool delta, bias, weight;
};

constexpr NormKind kRms = NormKind::Rms, kLayer = NormKind::Layer;
constexpr Case kCases[] = {
    {1, 32, 0, kRms, false, false, true},     {1, 32, 0, kLayer, false, true, true},
    {3, 100, 0, kRms, true, false, true},     {2, 100, 3, kLayer, true, true, true},  // one element at a time
    {5, 33, 0, kLayer, false, true, true},    {1, 1, 0, kRms, false, false, true},
    {4, 576, 0, kRms, true, false, true},     {7, 576, 4, kLayer, false, true, true},
    {33, 4096, 0, kRms, true, false, true},   {1, 4096, 0, kRms, false, false, false},
    {2, 5120, 8, kLayer, true, false, false}, {3, 8192, 0, kRms, true, true, true},
    {2, 16384, 0, kRms, true, false, true},   {2, 16388, 0, kLayer, true, true, true},  // too wide to be kept
    {2, 30000, 0, kRms, false, false, true},
};

struct Reference {
  std::vector<double> x, out;  // [cols] after the addition, and after the norm
};

Reference reference_row(const Case& c, const Array& x, const Array& delta, std::int64_t r, float eps,
                        const std::vector<float>& weight, const std::vector<float>& bias) {
  Reference ref;
  double mean = 0, square = 0;
  for (std::int64_t i = 0; i < c.cols; ++i) ref.x.push_back(x.get(r, i) + (c.delta ? delta.get(r, i) : 0.0f));
  if (c.kind == NormKind::Layer) {
    for (const double v : ref.x) mean += v;
    mean /= static_cast<double>(c.cols);
  }
  for (const double v : ref.x) square += (v - mean) * (v - mean);
  const double scale = 1.0 / std::sqrt(square / static_cast<double>(c.cols) + eps);
  for (std::size_t i = 0; i < ref.x.size(); ++i) {
    ref.out.push_back((ref.x[i] - mean) * scale * (c.weight ? weight[i] : 1.0) + (c.bias ? bias[i] : 0.0));
  }
  return ref;
}

TEST_F(CudaNorm, FollowsItsFormula) {
  for (const Case& c : kCases) {
    for (const auto& [in, out] : {std::pair{DType::F32, DType::BF16},
                                  {DType::F32, DType::F32},
                                  {DType::BF16, DType::BF16},
                                  {DType::BF16, DType::F32}}) {
      if (c.delta && in == DType::BF16) continue;
      constexpr float kEps = 1e-5f;
      Array x(in, c.rows + 1, c.cols + c.pad), delta(DType::F32, c.rows, c.cols);
      x.fill(random, 2.0f), delta.fill(random);
      for (std::int64_t i = 0; i < c.cols; ++i) x.set(0, i, x.get(0, i) + 3.0f);  // a mean that matters
      const auto weight = random_vector(random, c.cols, 1.0f), bias = random_vector(random, c.cols);
      const DeviceMatrix device_x(x), device_delta(delta), device_out(out, c.rows + 1, c.cols + c.pad);
      const DeviceArray<float> device_weight(weight), device_bias(bias);
      cuda::NormCall call;
      call.x = device_x.data();
      call.delta = c.delta ? device_delta.ptr<float>() : nullptr;
      call.out = device_out.data();
      call.rows = c.rows;
      call.cols = c.cols;
      call.ldx = call.ldo = c.cols + c.pad;
      call.ldd = c.cols;
      call.x_dtype = in;
      call.out_dtype = out;
      call.kind = c.kind;
      call.eps = kEps;
      call.weight = c.weight ? device_weight.get() : nullptr;
      call.bias = c.bias ? device_bias.get() : nullptr;
      cuda::norm(call, stream);

      std::vector<Reference> ref;
      for (std::int64_t r = 0; r < c.rows; ++r) ref.push_back(reference_row(c, x, delta, r, kEps, weight, bias));
      const std::string what = std::string(c.kind == NormKind::Rms ? "RMSNorm" : "LayerNorm") +
                               (c.delta ? " + delta" : "") + " of " + name_of(in) + " to";
      const Array before(out, c.rows + 1, c.cols + c.pad);
      expect_rows(what, before, device_out.download(), c.rows, c.cols, tolerance_of(out),
                  [&](auto r, auto i) { return ref[static_cast<std::size_t>(r)].out[static_cast<std::size_t>(i)]; });
      expect_rows(what + " (x)", x, device_x.download(), c.delta ? c.rows : 0, c.cols, 1e-6,
                  [&](auto r, auto i) { return ref[static_cast<std::size_t>(r)].x[static_cast<std::size_t>(i)]; });
    }
  }
}

TEST_F(CudaNorm, RowsDoNotDependOnTheBatch) {
  for (const std::int64_t cols : {100, 576, 4096, 16384}) {
    constexpr std::int64_t kRows = 67;
    Array x(DType::F32, kRows, cols);
    x.fill(random);
    const DeviceArray<float> weight(random_vector(random, cols, 1.0f));
    const auto run = [&](const DeviceMatrix& in, std::int64_t begin, std::int64_t rows) {
      const DeviceMatrix out(DType::F32, rows, cols);
      cuda::NormCall call;
      call.x = in.ptr<float>() + begin * cols;
      call.out = out.data();
      call.rows = rows;
      call.cols = call.ldx = call.ldo = cols;
      call.out_dtype = DType::F32;
      call.eps = 1e-6f;
      call.weight = weight.get();
      cuda::norm(call, stream);
      return out.download();
    };
    const DeviceMatrix device_x(x);
    const Array all = run(device_x, 0, kRows);
    for (const std::int64_t r : {std::int64_t{0}, std::int64_t{40}, kRows - 1}) {
      EXPECT_TRUE(run(device_x, r, 1).same_row(0, all, r)) << "row " << r << " of " << cols << "; seed " << test_seed();
    }
  }
}

}  // namespace
}  // namespace fastllm::test

// Matrix products against sums in fp64.
#include "gemm.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "device.h"
#include "gemm_table.h"
#include "skinny.h"

namespace fastllm::test {
namespace {

using cuda::Gemm;
using cuda::GemmCall;
using cuda::GemmShape;
using cuda::GemmTable;
using cuda::SkinnyConfig;

constexpr std::int64_t kPad = 8;  // columns and rows around x and out

// bf16 results are rounded once more where a bias is added by a second kernel.
double tolerance(DType out) { return out == DType::BF16 ? 1.0 / 64 : 1e-4; }

double activated(double x, Activation act) {
  switch (act) {
    case Activation::Silu:
      return x / (1 + std::exp(-x));
    case Activation::Gelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::GeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::Relu:
      return std::max(x, 0.0);
  }
  return x;
}

struct Options {
  DType dtype = DType::BF16, out_dtype = DType::BF16;
  bool bias = false, accumulate = false;
  std::optional<Activation> gated{};
};

std::string name(std::int64_t m, std::int64_t n, std::int64_t k, const Options& o) {
  return std::string(name_of(o.dtype)) + " to " + name_of(o.out_dtype) + ", m " + std::to_string(m) + ", n " +
         std::to_string(n) + ", k " + std::to_string(k) + (o.bias ? ", bias" : "") +
         (o.accumulate ? ", accumulate" : "") +
         (o.gated ? ", gated " + std::to_string(static_cast<int>(*o.gated)) : "");
}

// Operands of products with up to `most` rows; each check computes the first m of them.
class Problem {
 public:
  Problem(Random& random, std::int64_t most, std::int64_t n, std::int64_t k, const Options& options)
      : options_(options),
        most_(most),
        n_(n),
        k_(k),
        cols_(options.gated ? n / 2 : n),
        x_(options.dtype, most, k + kPad),
        w_(options.dtype, n, k),
        old_(options.out_dtype, most + kPad, cols_ + kPad),
        bias_(DType::F32, 1, n) {
    const float sigma = 1.0f / std::sqrt(static_cast<float>(k));
    x_.fill(random), w_.fill(random, sigma), old_.fill(random), bias_.fill(random);
    x_device_ = std::make_unique<DeviceMatrix>(x_);
    w_device_ = std::make_unique<DeviceMatrix>(w_);
    bias_device_ = std::make_unique<DeviceMatrix>(bias_);
    find_sums();
  }

  // Calls `product` for the first m rows and compares; one message per failing call.
  void check(std::int64_t m, const std::string& how, const std::function<void(const GemmCall&)>& product) {
    const DeviceMatrix out(old_);
    product(call(out, m));
    const Array got = out.download();
    for (std::int64_t t = 0; t < got.rows(); ++t) {
      for (std::int64_t c = 0; c < got.cols(); ++c) {
        const bool inside = t < m && c < cols_;
        const double want = inside ? expected(t, c) : old_.get(t, c);
        if (inside ? close(got.get(t, c), want, tolerance(options_.out_dtype)) : got.get(t, c) == old_.get(t, c))
          continue;
        ADD_FAILURE() << how << ", " << name(m, n_, k_, options_) << ": out[" << t << ", " << c << "] is "
                      << got.get(t, c) << ", expected " << want << (inside ? "" : " (must not be written)") << ", seed "
                      << test_seed();
        return;
      }
    }
  }

  Array result(std::int64_t first, std::int64_t m, const std::function<void(const GemmCall&)>& product) {
    const DeviceMatrix out(old_);
    GemmCall c = call(out, m);
    c.x = static_cast<const std::byte*>(c.x) + static_cast<std::size_t>(first * c.ldx) * size_of(options_.dtype);
    product(c);
    return out.download();
  }

  cuda::WeightView weight() const { return {w_device_->data(), options_.dtype, n_, k_}; }

 private:
  GemmCall call(const DeviceMatrix& out, std::int64_t m) const {
    GemmCall c;
    c.out = out.data();
    c.out_dtype = options_.out_dtype;
    c.ldo = cols_ + kPad;
    c.x = x_device_->data();
    c.ldx = k_ + kPad;
    c.m = m;
    c.w = weight();
    c.bias = options_.bias ? bias_device_->ptr<float>() : nullptr;
    c.accumulate = options_.accumulate;
    return c;
  }

  void find_sums() {
    sums_.assign(static_cast<std::size_t>(most_ * n_), 0.0);
    std::vector<float> x(static_cast<std::size_t>(k_)), w(x.size());
    std::vector<std::vector<float>> xs;
    for (std::int64_t t = 0; t < most_; ++t) {
      for (std::int64_t i = 0; i < k_; ++i) x[static_cast<std::size_t>(i)] = x_.get(t, i);
      xs.push_back(x);
    }
    for (std::int64_t r = 0; r < n_; ++r) {
      for (std::int64_t i = 0; i < k_; ++i) w[static_cast<std::size_t>(i)] = w_.get(r, i);
      for (std::int64_t t = 0; t < most_; ++t) {
        double s = 0;
        const auto& row = xs[static_cast<std::size_t>(t)];
        for (std::size_t i = 0; i < w.size(); ++i) s += static_cast<double>(row[i]) * static_cast<double>(w[i]);
        sums_[static_cast<std::size_t>(t * n_ + r)] = s + (options_.bias ? static_cast<double>(bias_.get(0, r)) : 0.0);
      }
    }
  }

  double expected(std::int64_t t, std::int64_t c) const {
    const double s = sums_[static_cast<std::size_t>(t * n_ + c)];
    if (options_.gated) return activated(s, *options_.gated) * sums_[static_cast<std::size_t>(t * n_ + cols_ + c)];
    return options_.accumulate ? s + static_cast<double>(old_.get(t, c)) : s;
  }

  Options options_;
  std::int64_t most_, n_, k_, cols_;
  Array x_, w_, old_, bias_;
  std::unique_ptr<DeviceMatrix> x_device_, w_device_, bias_device_;
  std::vector<double> sums_;
};

class GemmTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    cache_ = std::filesystem::temp_directory_path() / ("fastllm-gemm-test-" + std::to_string(Random().bits()));
    setenv("XDG_CACHE_HOME", cache_.c_str(), 1);
  }
  void TearDown() override {
    unsetenv("XDG_CACHE_HOME");
    std::error_code error;
    if (!cache_.empty()) std::filesystem::remove_all(cache_, error);
    CudaTest::TearDown();
  }
  std::function<void(const GemmCall&)> runs(Gemm& gemm) {
    return [this, &gemm](const GemmCall& c) { gemm.run(c, stream); };
  }
  std::vector<std::filesystem::path> cache_files() const {
    std::vector<std::filesystem::path> files;
    for (const auto& f : std::filesystem::directory_iterator(cache_ / "fastllm")) files.push_back(f.path());
    return files;
  }
  // Sets what skinny kernels need; false: skipped.
  bool prepare() {
    if (cuda::prepare_skinny(properties.sharedMemPerBlockOptin)) return true;
    ADD_FAILURE() << "the skinny kernels need more shared memory than this device has";
    return false;
  }
  std::function<void(const GemmCall&)> skinny(const SkinnyConfig& config, std::optional<Activation> gated = {}) {
    return [this, config, gated](const GemmCall& c) {
      ASSERT_TRUE(cuda::skinny_supports(c));
      cuda::skinny_gemm(c, gated, config, properties.multiProcessorCount, stream);
    };
  }

  std::filesystem::path cache_;
};

std::string name(const SkinnyConfig& c) {
  return "skinny strips " + std::to_string(c.strips) + ", k_warps " + std::to_string(c.k_warps) + ", blocks " +
         std::to_string(c.blocks_per_sm) + (c.rolling ? ", rolling" : "");
}

TEST_F(GemmTest, every_skinny_kernel_computes_every_number_of_rows) {
  if (!prepare()) return;
  for (const auto& [n, k] : {std::pair{8, 8}, {13, 24}, {24, 72}, {136, 200}, {200, 576}, {72, 1544}}) {
    Problem problem(random, 32, n, k, {});
    for (const auto& config : cuda::skinny_configs()) {
      for (const std::int64_t m : {1, 2, 3, 4, 5, 8, 9, 16, 17, 32}) problem.check(m, name(config), skinny(config));
    }
  }
}

TEST_F(GemmTest, skinny_kernels_take_many_tiles_in_turn) {
  if (!prepare()) return;
  Problem problem(random, 9, 20008, 72, {});
  for (const auto& config : cuda::skinny_configs()) {
    for (const std::int64_t m : {1, 9}) problem.check(m, name(config), skinny(config));
  }
}

TEST_F(GemmTest, skinny_kernels_add_biases_and_accumulate) {
  if (!prepare()) return;
  for (const DType out : {DType::F32, DType::BF16}) {
    for (const bool bias : {false, true}) {
      for (const bool accumulate : {false, true}) {
        Problem problem(random, 32, 136, 328, {.out_dtype = out, .bias = bias, .accumulate = accumulate});
        for (const auto& config : cuda::skinny_configs()) {
          for (const std::int64_t m : {1, 8, 11, 32}) problem.check(m, name(config), skinny(config));
        }
      }
    }
  }
}

TEST_F(GemmTest, skinny_kernels_fuse_gated_activations) {
  if (!prepare()) return;
  for (const auto act : {Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu}) {
    for (const bool bias : {false, true}) {
      for (const auto& [n, k] : {std::pair{272, 200}, {26, 72}}) {
        Problem problem(random, 17, n, k, {.bias = bias, .gated = act});
        for (const auto& config : cuda::skinny_configs()) {
          for (const std::int64_t m : {1, 5, 17}) problem.check(m, name(config), skinny(config, act));
        }
      }
    }
  }
}

TEST_F(GemmTest, a_row_of_a_skinny_product_does_not_depend_on_the_others) {
  if (!prepare()) return;
  Problem problem(random, 32, 136, 1544, {.out_dtype = DType::F32});
  for (const auto& config : cuda::skinny_configs()) {
    const Array all = problem.result(0, 32, skinny(config));
    for (const std::int64_t row : {0, 5, 8, 15, 31}) {
      const Array alone = problem.result(row, 1, skinny(config));
      for (std::int64_t c = 0; c < 136; ++c) {
        if (alone.get(0, c) == all.get(row, c)) continue;
        ADD_FAILURE() << name(config) << ": out[" << row << ", " << c << "] of 32 rows is " << all.get(row, c)
                      << ", alone " << alone.get(0, c) << ", seed " << test_seed();
        break;
      }
    }
  }
}

TEST_F(GemmTest, products_match_sums_in_fp64) {
  Gemm gemm({});
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const DType out : {DType::BF16, DType::F32}) {
      if (dtype == DType::F32 && out == DType::BF16) continue;
      for (const bool bias : {false, true}) {
        for (const bool accumulate : {false, true}) {
          for (const auto& [n, k] : {std::pair{136, 200}, {72, 328}}) {
            Problem problem(random, 256, n, k, {dtype, out, bias, accumulate, {}});
            for (const std::int64_t m : {1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 100, 256})
              problem.check(m, "cuBLASLt", runs(gemm));
          }
        }
      }
    }
  }
}

TEST_F(GemmTest, tuned_products_match_too_and_are_remembered) {
  const std::vector<std::int64_t> ms = {1, 4, 16, 64};
  for (const bool accumulate : {false, true}) {
    const Options options{.out_dtype = accumulate ? DType::F32 : DType::BF16, .accumulate = accumulate};
    Problem problem(random, 100, 272, 584, options);
    Gemm first({});
    first.tune(problem.weight(), options.out_dtype, accumulate, ms, stream);
    for (const std::int64_t m : {1, 2, 4, 7, 16, 32, 64, 100}) problem.check(m, "tuned", runs(first));
    ASSERT_EQ(cache_files().size(), 1u);
    const auto file = cache_files()[0];
    const auto written = std::filesystem::last_write_time(file);

    Gemm second({});
    second.tune(problem.weight(), options.out_dtype, accumulate, ms, stream);
    EXPECT_EQ(std::filesystem::last_write_time(file), written) << "measured again";
    for (const std::int64_t m : {1, 2, 4, 7, 16, 32, 64, 100}) problem.check(m, "tuned before", runs(second));

    std::ofstream(file, std::ios::trunc) << "no table";
    Gemm third({});
    for (const std::int64_t m : {1, 100}) problem.check(m, "damaged table", runs(third));
  }
}

TEST_F(GemmTest, fused_gated_products_match_where_they_are_offered) {
  const std::vector<std::int64_t> ms = {1, 8, 16};
  for (const auto act : {Activation::Silu, Activation::GeluTanh}) {
    Problem problem(random, 100, 272, 584, {.gated = act});
    Gemm gemm({});
    gemm.tune(problem.weight(), DType::BF16, false, ms, stream);
    for (const std::int64_t m : {1, 8, 16, 100}) {
      bool done = false;
      auto fused = [&](const GemmCall& c) { done = gemm.run_gated(c, static_cast<int>(act), stream); };
      problem.result(0, m, fused);
      if (done) problem.check(m, "run_gated", fused);
      EXPECT_FALSE(done && m > cuda::kSkinnyRows);
    }
  }
}

TEST_F(GemmTest, deterministic_rows_do_not_depend_on_the_batch) {
  Gemm gemm({.deterministic = true});
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const bool accumulate : {false, true}) {
      const Options options{dtype, accumulate ? DType::F32 : dtype, false, accumulate, {}};
      Problem problem(random, 256, 328, 2056, options);
      problem.check(256, "deterministic", runs(gemm));
      const Array all = problem.result(0, 256, runs(gemm));
      for (const std::int64_t m : {1, 2, 7, 8, 16, 33, 64, 100}) {
        const Array some = problem.result(0, m, runs(gemm));
        for (std::int64_t row = 0; row < m; ++row) {
          if (some.same_row(row, all, row)) continue;
          ADD_FAILURE() << name(m, 328, 2056, options) << ": row " << row << " differs from the one of 256, seed "
                        << test_seed();
          break;
        }
      }
    }
  }
}

TEST_F(GemmTest, products_can_be_captured) {
  Problem problem(random, 8, 136, 200, {});
  Gemm gemm({});
  problem.check(8, "captured", [&](const GemmCall& c) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing");
    gemm.run(c, stream);
    cuda::check(cudaStreamEndCapture(stream, &graph), "capturing");
    cuda::check(cudaGraphInstantiate(&executable, graph, 0), "making a graph");
    cuda::check(cudaGraphLaunch(executable, stream), "launching a graph");
    cuda::check(cudaStreamSynchronize(stream), "a graph");
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  });
}

TEST(GemmTableTest, keeps_its_entries_and_rejects_damage) {
  GemmTable table;
  const GemmShape shape{4096, 1024, DType::BF16, DType::F32, true};
  table.add(shape, 16, {.lt_us = 12.5f, .algo = {{1, 2, 3, 4, 5, 6, 7, ~0ull}}, .own_us = 9, .own = {4, 8, 1, true}});
  table.add(shape, 64, {.lt_us = 20});
  const std::string text = table.format("title");
  const GemmTable again = GemmTable::parse(text, "title");
  ASSERT_EQ(again.entries().size(), 2u);
  EXPECT_EQ(again.format("title"), text);
  EXPECT_EQ(again.nearest(shape, 3)->m, 16);
  EXPECT_EQ(again.nearest(shape, 17)->m, 64);
  EXPECT_EQ(again.nearest(shape, 1000)->m, 64);
  EXPECT_TRUE(again.nearest(shape, 16)->timing.own_is_best());
  EXPECT_FALSE(again.nearest(shape, 64)->timing.own_is_best());
  EXPECT_TRUE(again.has(shape, 64));
  EXPECT_FALSE(again.has(shape, 32));
  EXPECT_EQ(again.nearest({}, 1), nullptr);
  EXPECT_TRUE(GemmTable::parse(text, "another title").entries().empty());
  for (std::size_t cut = 0; cut + 1 < text.size(); ++cut)
    EXPECT_TRUE(GemmTable::parse(text.substr(0, cut), "title").entries().empty()) << "cut after " << cut;
}

}  // namespace
}  // namespace fastllm::test

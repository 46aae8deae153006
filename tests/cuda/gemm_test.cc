// Matrix products against sums in fp64.
#include "gemm.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "gemm_table.h"
#include "gemm_tile.h"
#include "product.h"
#include "skinny.h"

namespace fastllm::test {
namespace {

using cuda::Gemm;
using cuda::GemmCall;
using cuda::GemmShape;
using cuda::GemmTable;
using cuda::SkinnyConfig;

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
    Product problem(random, 32, n, k, {});
    for (const auto& config : cuda::skinny_configs()) {
      for (const std::int64_t m : {1, 2, 3, 4, 5, 8, 9, 16, 17, 32}) problem.check(m, name(config), skinny(config));
    }
  }
}

TEST_F(GemmTest, skinny_kernels_take_many_tiles_in_turn) {
  if (!prepare()) return;
  Product problem(random, 9, 20008, 72, {});
  for (const auto& config : cuda::skinny_configs()) {
    for (const std::int64_t m : {1, 9}) problem.check(m, name(config), skinny(config));
  }
}

TEST_F(GemmTest, skinny_kernels_add_biases_and_accumulate) {
  if (!prepare()) return;
  for (const DType out : {DType::F32, DType::BF16}) {
    for (const bool bias : {false, true}) {
      for (const bool accumulate : {false, true}) {
        Product problem(random, 32, 136, 328, {.out_dtype = out, .bias = bias, .accumulate = accumulate});
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
        Product problem(random, 17, n, k, {.bias = bias, .gated = act});
        for (const auto& config : cuda::skinny_configs()) {
          for (const std::int64_t m : {1, 5, 17}) problem.check(m, name(config), skinny(config, act));
        }
      }
    }
  }
}

TEST_F(GemmTest, a_row_of_a_skinny_product_does_not_depend_on_the_others) {
  if (!prepare()) return;
  Product problem(random, 32, 136, 1544, {.out_dtype = DType::F32});
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
            Product problem(random, 256, n, k, {dtype, out, bias, accumulate, {}});
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
    const ProductOptions options{.out_dtype = accumulate ? DType::F32 : DType::BF16, .accumulate = accumulate};
    Product problem(random, 100, 272, 584, options);
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
  const bool tiles = cuda::TileGemm::make(properties.major * 10 + properties.minor) != nullptr;
  const std::vector<std::int64_t> ms = {1, 8, 16};
  for (const auto act : {Activation::Silu, Activation::GeluTanh}) {
    Product problem(random, 100, 272, 584, {.gated = act});
    Gemm gemm({});
    gemm.tune(problem.weight(), DType::BF16, false, ms, stream);
    for (const std::int64_t m : {1, 8, 16, 100}) {
      bool done = false;
      auto fused = [&](const GemmCall& c) { done = gemm.run_gated(c, static_cast<int>(act), stream); };
      problem.result(0, m, fused);
      if (done) problem.check(m, "run_gated", fused);
      if (m > cuda::kSkinnyRows) {
        EXPECT_EQ(done, tiles) << m << " rows";
      }
    }
  }
}

TEST_F(GemmTest, deterministic_rows_do_not_depend_on_the_batch) {
  Gemm gemm({.deterministic = true});
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const bool accumulate : {false, true}) {
      const ProductOptions options{dtype, accumulate ? DType::F32 : dtype, false, accumulate, {}};
      Product problem(random, 256, 328, 2056, options);
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
  Product problem(random, 8, 136, 200, {});
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

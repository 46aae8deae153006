// Tiled products against sums in fp64, and what the choice of their tiles is based on.
#include "gemm_tile.h"

#include <gtest/gtest.h>

#include <string>

#include "device.h"
#include "product.h"

namespace fastllm::test {
namespace {

using cuda::GemmCall;
using cuda::TileGemm;

std::string name(int tile_cols) { return "tiles of " + std::to_string(tile_cols); }

class GemmTileTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    tiles = TileGemm::make(properties.major * 10 + properties.minor);
    if (!tiles) GTEST_SKIP() << "tiled products are for sm_90a, this is sm_" << properties.major << properties.minor;
  }
  std::function<void(const GemmCall&)> runs(int cols, std::optional<Activation> gated = {}) const {
    return [this, cols, gated](const GemmCall& c) {
      ASSERT_TRUE(cuda::tile_gemm_supports(c, gated.has_value()));
      tiles->run(c, gated, cols, stream);
    };
  }
  void check_all(Product& product, const std::vector<std::int64_t>& ms, std::optional<Activation> gated = {}) const {
    for (const int cols : cuda::kTileCols) {
      for (const std::int64_t m : ms) product.check(m, name(cols), runs(cols, gated));
    }
  }

  std::unique_ptr<TileGemm> tiles;
};

TEST_F(GemmTileTest, every_width_computes_every_number_of_rows) {
  for (const auto& [n, k] : {std::pair{8, 256}, {136, 8}, {264, 328}, {520, 584}}) {
    Product product(random, 400, n, k, {});
    check_all(product, {1, 8, 33, 64, 127, 128, 129, 255, 256, 257, 384, 400});
  }
}

TEST_F(GemmTileTest, results_in_fp32_are_stored_or_added) {
  for (const bool accumulate : {false, true}) {
    for (const bool bias : {false, true}) {
      Product product(random, 384, 392, 712, {.out_dtype = DType::F32, .bias = bias, .accumulate = accumulate});
      check_all(product, {40, 128, 200, 260, 384});
    }
  }
}

TEST_F(GemmTileTest, gated_activations_are_applied_on_the_way_out) {
  for (const auto act : {Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu}) {
    for (const bool bias : {false, true}) {
      for (const auto& [n, k] : {std::pair{272, 200}, {1168, 520}}) {
        Product product(random, 200, n, k, {.bias = bias, .gated = act});
        check_all(product, {33, 128, 200}, act);
      }
    }
  }
}

TEST_F(GemmTileTest, biases_are_added_before_rounding) {
  Product product(random, 200, 328, 264, {.bias = true});
  check_all(product, {50, 200});
}

TEST_F(GemmTileTest, blocks_take_many_tiles_in_turn) {
  Product product(random, 2200, 5640, 72, {});
  for (const int cols : cuda::kTileCols) product.check(2200, name(cols), runs(cols));
}

TEST_F(GemmTileTest, a_row_does_not_depend_on_the_others_nor_on_the_width_of_tiles) {
  Product product(random, 400, 264, 1544, {.out_dtype = DType::F32});
  const Array all = product.result(0, 400, runs(256));
  for (const int cols : cuda::kTileCols) {
    for (const std::int64_t m : {1, 100, 128, 300}) {
      const Array some = product.result(0, m, runs(cols));
      for (std::int64_t row = 0; row < m; ++row) {
        if (some.same_row(row, all, row)) continue;
        ADD_FAILURE() << name(cols) << ": row " << row << " of " << m << " differs, seed " << test_seed();
        break;
      }
    }
  }
}

TEST(TilePlan, avoids_rounds_that_are_nearly_empty) {
  constexpr int kClusters = 66;
  EXPECT_EQ(cuda::plan_tiles(256, 28672, 4096, true, kClusters), 224);    // 128 items: two rounds of 66
  EXPECT_EQ(cuda::plan_tiles(256, 16384, 2048, true, kClusters), 256);    // 64 items
  EXPECT_EQ(cuda::plan_tiles(64, 16384, 2048, true, kClusters), 128);     // 64 items
  EXPECT_EQ(cuda::plan_tiles(2048, 4096, 14336, false, kClusters), 256);  // 128 items
}

}  // namespace
}  // namespace fastllm::test

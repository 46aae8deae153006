// Golden numbers are those of the Transformers library's rope functions (dim 16).
#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

namespace fastllm {
namespace {

struct Golden {
  const char* name;
  RopeScaling scaling;
  double theta;
  int seq_len;
  std::vector<float> inv_freq;
  double attention_factor;
};

RopeScaling scaling(RopeScalingKind kind, double factor, int original) {
  RopeScaling s;
  s.kind = kind;
  s.factor = factor;
  s.original_max_len = original;
  return s;
}

std::vector<Golden> goldens() {
  auto yarn_mscale = scaling(RopeScalingKind::Yarn, 40, 512);
  yarn_mscale.mscale = 1.0, yarn_mscale.mscale_all_dim = 0.707;
  yarn_mscale.truncate = false, yarn_mscale.beta_fast = 16, yarn_mscale.beta_slow = 2;
  auto longrope = scaling(RopeScalingKind::LongRope, 8, 64);
  for (int i = 0; i < 8; ++i) {
    longrope.short_factor.push_back(1.0 + 0.1 * i);
    longrope.long_factor.push_back(1.5 + 0.7 * i);
  }
  return {
      {"linear",
       scaling(RopeScalingKind::Linear, 4, 0),
       10000,
       64,
       {0.25f, 0.079056941f, 0.0250000004f, 0.00790569466f, 0.00249999994f, 0.000790569466f, 0.000250000012f,
        7.90569466e-05f},
       1},
      {"dynamic within the original length",
       scaling(RopeScalingKind::Dynamic, 2, 64),
       10000,
       32,
       {1.f, 0.316227764f, 0.100000001f, 0.0316227786f, 0.00999999978f, 0.00316227786f, 0.00100000005f,
        0.000316227786f},
       1},
      {"dynamic beyond",
       scaling(RopeScalingKind::Dynamic, 2, 64),
       10000,
       100,
       {1.f, 0.283945143f, 0.0806248412f, 0.0228930302f, 0.00650036521f, 0.001845747f, 0.000524090894f,
        0.000148813066f},
       1},
      {"llama3",
       scaling(RopeScalingKind::Llama3, 8, 1024),
       500000,
       8192,
       {1.f, 0.193922758f, 0.0376060307f, 0.00131256948f, 0.000176776681f, 3.42810235e-05f, 6.64786967e-06f,
        1.28917316e-06f},
       1},
      {"yarn",
       scaling(RopeScalingKind::Yarn, 4, 1024),
       10000,
       4096,
       {1.f, 0.316227764f, 0.0812500045f, 0.0197642371f, 0.00437500002f, 0.000790569466f, 0.000250000012f,
        7.90569466e-05f},
       1.13862944},
      {"yarn with mscale, not truncated",
       yarn_mscale,
       10000,
       4096,
       {1.f, 0.316227764f, 0.0683637187f, 0.00454810867f, 0.000250000012f, 7.90569466e-05f, 2.49999994e-05f,
        7.90569447e-06f},
       1.0857264},
      {"longrope, short",
       longrope,
       10000,
       64,
       {1.f, 0.287479758f, 0.0833333358f, 0.0243252143f, 0.00714285718f, 0.00210818532f, 0.000624999986f,
        0.000186016332f},
       1.22474487},
      {"longrope, long",
       longrope,
       10000,
       65,
       {0.666666687f, 0.143739879f, 0.0344827585f, 0.00878410507f, 0.00232558115f, 0.000632455572f, 0.000175438603f,
        4.94105916e-05f},
       1.22474487},
  };
}

TEST(Rope, test_frequencies_match_the_reference_library) {
  for (const auto& g : goldens()) {
    SCOPED_TRACE(g.name);
    RopeSpec r;
    r.dim = 16, r.theta = g.theta, r.scaling = g.scaling;
    const auto f = rope_inv_freq(r, g.seq_len);
    ASSERT_EQ(f.size(), g.inv_freq.size());
    for (std::size_t i = 0; i < f.size(); ++i) EXPECT_NEAR(f[i], g.inv_freq[i], 4e-7 * g.inv_freq[i]) << i;
    EXPECT_NEAR(rope_attention_factor(g.scaling), g.attention_factor, 1e-7);
  }
}

TEST(Rope, test_table_holds_scaled_cosines_then_sines) {
  RopeSpec r;
  r.dim = 16;
  r.scaling = scaling(RopeScalingKind::Yarn, 4, 1024);
  const auto table = rope_table(r, 40);
  ASSERT_EQ(table.size(), 40u * 16u);
  const auto f = rope_inv_freq(r, 40);
  const double factor = rope_attention_factor(r.scaling);
  for (std::size_t i = 0; i < 8; ++i) {
    EXPECT_NEAR(table[37 * 16 + i], std::cos(37.0 * f[i]) * factor, 1e-5);
    EXPECT_NEAR(table[37 * 16 + 8 + i], std::sin(37.0 * f[i]) * factor, 1e-5);
  }
}

TEST(Rope, test_dynamic_table_is_plain_up_to_the_original_length) {
  RopeSpec plain, dynamic;
  plain.dim = dynamic.dim = 16;
  dynamic.scaling = scaling(RopeScalingKind::Dynamic, 2, 64);
  const auto a = rope_table(plain, 100), b = rope_table(dynamic, 100);
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 64 * 16, b.begin()));
  const auto f = rope_inv_freq(dynamic, 100);
  EXPECT_NEAR(b[99 * 16 + 3], std::cos(99.0 * f[3]), 1e-5);
  EXPECT_GT(std::abs(a[99 * 16 + 1] - b[99 * 16 + 1]), 1e-3);
}

TEST(Rope, test_alibi_slopes) {
  const auto eight = alibi_slopes(8);
  EXPECT_FLOAT_EQ(eight[0], 0.5f);
  EXPECT_FLOAT_EQ(eight[7], 0.00390625f);
  // Twelve heads: the eight of 8, then every second one of 16.
  const auto twelve = alibi_slopes(12);
  EXPECT_FLOAT_EQ(twelve[7], eight[7]);
  EXPECT_FLOAT_EQ(twelve[8], static_cast<float>(std::exp2(-0.5)));
  EXPECT_FLOAT_EQ(twelve[11], static_cast<float>(std::exp2(-3.5)));
}

}  // namespace
}  // namespace fastllm

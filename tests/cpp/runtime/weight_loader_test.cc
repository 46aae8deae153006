#include "model/weight_loader.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "fastllm/error.h"
#include "loader_fixture.h"
#include "model/dequant.h"
#include "model/dequant_groups.h"

namespace fastllm {
namespace {

using namespace testing;

TEST(WeightLoader, test_transforms_give_the_canonical_matrix) {
  const auto& qkv = model()[kQkv];
  const auto& bias = model()[kQkvBias];
  const auto& gate_up = model()[kGateUp];
  const auto& down = model()[kDown];
  const auto q = rows_of(qkv, 64, 0, 64), k = rows_of(qkv, 64, 64, 32), v = rows_of(qkv, 64, 96, 32);
  const auto bq = rows_of(bias, 1, 0, 64), bk = rows_of(bias, 1, 64, 32), bv = rows_of(bias, 1, 96, 32);
  const auto gate = rows_of(gate_up, 64, 0, 96), up = rows_of(gate_up, 64, 96, 96);

  // Per kv head: two q heads, k, v.
  std::vector<float> grouped;
  for (std::size_t g = 0; g < 2; ++g) {
    for (const auto& part : {rows_of(q, 64, 32 * g, 32), rows_of(k, 64, 16 * g, 16), rows_of(v, 64, 16 * g, 16)})
      grouped.insert(grouped.end(), part.begin(), part.end());
  }
  // Rotary pairs side by side within each head of 16.
  auto interleave = [](const std::vector<float>& m, std::size_t cols) {
    std::vector<float> out(m.size());
    for (std::size_t r = 0; r < m.size() / cols; ++r) {
      const std::size_t in_head = r % 16, to = r - in_head + 2 * (in_head % 8) + in_head / 8;
      std::copy_n(m.begin() + static_cast<std::ptrdiff_t>(r * cols), cols,
                  out.begin() + static_cast<std::ptrdiff_t>(to * cols));
    }
    return out;
  };
  const auto q_pairs = interleave(q, 64), k_pairs = interleave(k, 64), bq_pairs = interleave(bq, 1);
  std::vector<float> down_t(down.size());
  for (std::size_t r = 0; r < 64; ++r)
    for (std::size_t c = 0; c < 96; ++c) down_t[c * 64 + r] = down[r * 96 + c];
  std::vector<float> norm_minus_one = model()["final_norm.weight"];
  for (float& x : norm_minus_one) x -= 1.0f;

  auto paired = [](SourceTensor t) {
    t.interleaved_head_dim = 16;
    return t;
  };
  ModelSource s = model().source();
  binding(s, "layers.0.attn.qkv.weight") = {
      "layers.0.attn.qkv.weight",
      WeightTransform::QkvConcat,
      false,
      {tensor("q", {64, 64}, q), tensor("k", {32, 64}, k), tensor("v", {32, 64}, v)}};
  binding(s, kQkv) = {kQkv, WeightTransform::QkvGrouped, false, {tensor("qkv", {128, 64}, grouped)}};
  binding(s, kQkvBias) = {kQkvBias,
                          WeightTransform::QkvConcat,
                          false,
                          {paired(tensor("bq", {64}, bq_pairs)), tensor("bk", {32}, bk), tensor("bv", {32}, bv)}};
  binding(s, "layers.2.attn.qkv.weight") = {
      "layers.2.attn.qkv.weight",
      WeightTransform::QkvConcat,
      false,
      {paired(tensor("q", {64, 64}, q_pairs)), paired(tensor("k", {32, 64}, k_pairs)), tensor("v", {32, 64}, v)}};
  binding(s, kGateUp) = {
      kGateUp, WeightTransform::GateUpConcat, false, {tensor("gate", {96, 64}, gate), tensor("up", {96, 64}, up)}};
  binding(s, kDown) = {kDown, WeightTransform::Transpose, false, {tensor("down", {96, 64}, down_t)}};
  binding(s, "final_norm.weight") = {
      "final_norm.weight", WeightTransform::Copy, true, {tensor("norm", {64}, norm_minus_one)}};

  const WeightLoader loader(s, 0, 1);
  EXPECT_EQ(read(loader.matrix("layers.0.attn.qkv.weight")), qkv);
  EXPECT_EQ(read(loader.matrix(kQkv)), qkv);
  EXPECT_EQ(read(loader.matrix("layers.2.attn.qkv.weight")), qkv);
  EXPECT_EQ(loader.vector(kQkvBias), bias);
  EXPECT_EQ(read(loader.matrix(kGateUp)), gate_up);
  EXPECT_EQ(read(loader.matrix(kDown)), down);
  const auto norm = loader.vector("final_norm.weight");
  for (std::size_t i = 0; i < norm.size(); ++i) EXPECT_NEAR(norm[i], model()["final_norm.weight"][i], 1e-6);

  // The transposed matrix cut by columns: rank 1 of 2 holds columns [48, 96).
  const auto part = read(WeightLoader(s, 1, 2).matrix(kDown));
  for (std::size_t r = 0; r < 64; ++r)
    for (std::size_t c = 0; c < 48; ++c) ASSERT_EQ(part[r * 48 + c], down[r * 96 + 48 + c]);
}

TEST(WeightLoader, test_ranks_hold_what_the_shard_axis_says) {
  const ModelSource s = model().source();
  const auto& qkv = model()[kQkv];
  // Four ranks, two kv heads: rank 3 has q head 3 and a copy of kv head 1.
  const WeightLoader rank3(s, 3, 4);
  std::vector<float> want;
  for (const auto& part : {rows_of(qkv, 64, 48, 16), rows_of(qkv, 64, 64 + 16, 16), rows_of(qkv, 64, 96 + 16, 16)})
    want.insert(want.end(), part.begin(), part.end());
  EXPECT_EQ(read(rank3.matrix(kQkv)), want);
  // gate and up are cut alike.
  want = rows_of(model()[kGateUp], 64, 72, 24);
  const auto up = rows_of(model()[kGateUp], 64, 96 + 72, 24);
  want.insert(want.end(), up.begin(), up.end());
  EXPECT_EQ(read(rank3.matrix(kGateUp)), want);
  // 97 ids over 4 ranks: 25 rows each, the last three of rank 3 are padding.
  const HostMatrix tokens = rank3.matrix("embed.tokens.weight");
  EXPECT_EQ(tokens.rows, 25);
  want = rows_of(model()["embed.tokens.weight"], 64, 75, 22);
  want.resize(25 * 64, 0.0f);
  EXPECT_EQ(read(tokens), want);
}

TEST(WeightLoader, test_quantised_columns_are_cut_inside_blocks) {
  // down: [64, 96] as Q8_0, three blocks a row; four ranks hold 24 columns each.
  std::vector<std::byte> data(64 * 3 * 34);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>((i * 37 + 11) & 255);
  for (std::size_t b = 0; b < data.size(); b += 34) data[b + 1] = std::byte{0x28};
  ModelSource s = model().source();
  SourceTensor t;
  t.name = "blk", t.type = SourceType::Q8_0, t.shape = {64, 96}, t.data = data.data();
  t.bytes = static_cast<std::int64_t>(data.size());
  binding(s, kDown).sources = {t};
  const auto whole = read(WeightLoader(s, 0, 1).matrix(kDown));
  for (int rank = 0; rank < 4; ++rank) {
    const auto part = read(WeightLoader(s, rank, 4).matrix(kDown));
    for (std::size_t r = 0; r < 64; ++r)
      for (std::size_t c = 0; c < 24; ++c)
        ASSERT_EQ(part[r * 24 + c], whole[r * 96 + static_cast<std::size_t>(rank) * 24 + c]);
  }
  std::vector<float> row(96);
  dequantize(SourceType::Q8_0, data.data() + 5 * 102, 0, 96, row.data());
  EXPECT_EQ(rows_of(whole, 96, 5, 1), row);
}

TEST(WeightLoader, test_loading_is_strict_and_names_the_tensor) {
  const std::int64_t huge = std::int64_t{1} << 40;
  const struct {
    std::vector<std::string> message;
    std::function<void(ModelSource&)> change;
  } rows[] = {
      {{kDown, "missing", "[64, 96]"},
       [](ModelSource& s) { std::erase_if(s.weights, [](auto& b) { return b.canonical == kDown; }); }},
      {{"layers.9.ffn.down.weight", "not used"},
       [](ModelSource& s) {
         s.weights.push_back(binding(s, kDown)), s.weights.back().canonical = "layers.9.ffn.down.weight";
       }},
      {{kDown, "given twice"}, [](ModelSource& s) { s.weights.push_back(binding(s, kDown)); }},
      {{kDown, "mlp.down_proj", "[96, 64]", "[64, 96]"},
       [](ModelSource& s) {
         binding(s, kDown).sources[0].shape = {96, 64};
         binding(s, kDown).sources[0].name = "mlp.down_proj";
       }},
      {{kDown, "24575 bytes", "takes 24576"}, [](ModelSource& s) { binding(s, kDown).sources[0].bytes = 24575; }},
      {{kDown, "0 bytes"}, [](ModelSource& s) { binding(s, kDown).sources[0].data = nullptr; }},
      {{kDown}, [=](ModelSource& s) { binding(s, kDown).sources[0].shape = {huge, huge}; }},
      {{kDown}, [](ModelSource& s) { binding(s, kDown).sources[0].shape = {-64, -96}; }},
      {{kDown}, [](ModelSource& s) { binding(s, kDown).sources[0].shape = {}; }},
      {{kQkv, "whole blocks of 256", "Q4_K"},
       [](ModelSource& s) { binding(s, kQkv).sources[0].type = SourceType::Q4_K; }},
      {{kDown, "element type"},
       [](ModelSource& s) { binding(s, kDown).sources[0].type = static_cast<SourceType>(99); }},
      {{kQkv, "3 tensors", "gives 1"}, [](ModelSource& s) { binding(s, kQkv).transform = WeightTransform::QkvConcat; }},
      {{kDown, "transform"}, [](ModelSource& s) { binding(s, kDown).transform = WeightTransform::GateUpConcat; }},
      {{kQkv, "interleaved"}, [](ModelSource& s) { binding(s, kQkv).sources[0].interleaved_head_dim = 7; }},
      {{kDown, "1 tensors", "gives 0"}, [](ModelSource& s) { binding(s, kDown).sources.clear(); }},
  };
  for (const auto& row : rows) {
    ModelSource s = model().source();
    row.change(s);
    try {
      WeightLoader(s, 0, 1);
      ADD_FAILURE() << "no error about " << row.message.back();
    } catch (const LoadError& e) {
      for (const auto& part : row.message) EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }
}

TEST(WeightLoader, test_a_model_that_does_not_divide_is_refused) {
  const ModelSource s = model().source();
  EXPECT_THROW(WeightLoader(s, 0, 3), InvalidArgument);  // 4 heads
  EXPECT_THROW(WeightLoader(s, 0, 8), InvalidArgument);
}

TEST(WeightLoader, test_bf16_rows_are_handed_out_as_they_are) {
  ModelSource s = model().source();
  // The bits of any fp32 numbers, taken as bf16: what is read must be those bits.
  std::vector<std::uint16_t> bits(128 * 64);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(0x3c00 + i * 7 % 0x400);
  auto as_bf16 = [&](SourceTensor t, std::size_t row) {
    t.type = SourceType::BF16;
    t.data = bits.data() + row * static_cast<std::size_t>(t.shape.back());
    t.bytes = t.shape[0] * t.shape[1] * 2;
    return t;
  };
  SourceTensor q = as_bf16(tensor("q", {64, 64}, {}), 0);
  q.interleaved_head_dim = 16;
  const SourceTensor k = as_bf16(tensor("k", {32, 64}, {}), 64), v = as_bf16(tensor("v", {32, 64}, {}), 96);
  binding(s, kQkv) = {kQkv, WeightTransform::QkvConcat, false, {q, k, v}};
  SourceTensor& down = binding(s, kDown).sources[0];
  down = as_bf16(down, 0);
  SourceTensor& head = binding(s, "head.weight").sources[0];
  head = as_bf16(head, 0);
  std::vector<std::string> plain = {kQkv, kDown, "head.weight"};

  for (int size : {1, 2}) {
    for (int rank = 0; rank < size; ++rank) {
      const WeightLoader loader(s, rank, size);
      for (const auto& name : plain) {
        SCOPED_TRACE(name + " of rank " + std::to_string(rank));
        const HostMatrix m = loader.matrix(name);
        ASSERT_TRUE(m.read_bf16);
        std::vector<std::uint16_t> got(static_cast<std::size_t>(m.rows * m.cols));
        for (std::int64_t begin = 0; begin < m.rows; begin += 5)
          m.read_bf16(begin, std::min(m.rows, begin + 5), got.data() + begin * m.cols);
        std::vector<float> wide;
        for (const auto b : got) wide.push_back(to_float(bf16{b}));
        EXPECT_EQ(wide, read(m));
      }
      EXPECT_FALSE(loader.matrix(kGateUp).read_bf16) << "fp32";
    }
  }

  binding(s, kDown).sources[0].shape = {96, 64};
  binding(s, kDown).transform = WeightTransform::Transpose;
  EXPECT_FALSE(WeightLoader(s, 0, 1).matrix(kDown).read_bf16);
  binding(s, "head.weight").add_one = true;
  EXPECT_FALSE(WeightLoader(s, 0, 1).matrix("head.weight").read_bf16);
  binding(s, kQkv).sources[2] = tensor("v", {32, 64}, model()[kQkv]);
  EXPECT_FALSE(WeightLoader(s, 0, 1).matrix(kQkv).read_bf16) << "one source is fp32";
}

}  // namespace
}  // namespace fastllm

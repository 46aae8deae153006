#include "model/decoder_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "fastllm/error.h"
#include "model_fixture.h"

namespace fastllm {
namespace {

TEST(DecoderWeights, test_groups_are_chosen_by_what_is_wanted_and_what_the_weight_is_for) {
  constexpr GroupFormat dense{}, own{4, false, 8}, own8{8, false, 128}, wide{8, false, 128, 64}, narrow{4, true, 0, 64};
  const struct {
    Quantization wanted;
    WeightUse use;
    GroupFormat own, chosen;
  } rows[] = {
      {Quantization::None, WeightUse::Linear, own, dense},    {Quantization::Auto, WeightUse::Linear, own, own},
      {Quantization::Auto, WeightUse::Linear, dense, dense},  {Quantization::Auto, WeightUse::Head, own, own},
      {Quantization::Int8, WeightUse::Linear, dense, wide},   {Quantization::Int8, WeightUse::Head, dense, wide},
      {Quantization::Int8, WeightUse::Table, dense, dense},   {Quantization::Int8, WeightUse::Table, own, own},
      {Quantization::Int8, WeightUse::Linear, own, wide},     {Quantization::Int8, WeightUse::Linear, own8, own8},
      {Quantization::Int4, WeightUse::Linear, own, own},      {Quantization::Int4, WeightUse::Linear, own8, narrow},
      {Quantization::Int4, WeightUse::Linear, dense, narrow}, {Quantization::Int4, WeightUse::Head, own, wide},
      {Quantization::Int4, WeightUse::Head, own8, own8},      {Quantization::Int4, WeightUse::Head, dense, wide},
      {Quantization::Int4, WeightUse::Table, dense, dense},
  };
  for (const auto& row : rows) {
    SCOPED_TRACE(static_cast<int>(row.wanted) * 10 + static_cast<int>(row.use));
    EXPECT_EQ(choose_groups(row.wanted, row.use, row.own), row.chosen);
  }
}

TEST(DecoderWeights, test_names_of_quantisations_are_told_when_one_is_unknown) {
  EXPECT_EQ(quantization_from_name("auto"), Quantization::Auto);
  EXPECT_EQ(quantization_from_name("int4"), Quantization::Int4);
  try {
    quantization_from_name("int2");
    FAIL();
  } catch (const InvalidArgument& e) {
    for (const char* name : {"'int2'", "auto", "none", "int8", "int4"})
      EXPECT_NE(std::string(e.what()).find(name), std::string::npos) << e.what();
  }
}

TEST(DecoderWeights, test_fewer_bits_take_less_memory) {
  ModelSpec spec = testing::llama_spec();
  spec.embed.hidden = 128;
  const auto model = testing::random_model(spec, 1);
  const ModelSource source = model.source();
  const WeightLoader loader(source, 0, 1);
  const auto backend = make_cpu_backend(2);
  auto bytes = [&](Quantization q) { return packed_bytes(load_decoder_weights(loader, *backend, DType::BF16, {}, q)); };
  const std::int64_t dense = bytes(Quantization::Auto), int8 = bytes(Quantization::Int8);
  EXPECT_EQ(bytes(Quantization::None), dense);
  EXPECT_LT(int8, dense * 3 / 4);
  EXPECT_LT(bytes(Quantization::Int4), int8 * 3 / 4);
}

TEST(DecoderWeights, test_progress_comes_from_the_loading_thread_within_large_weights_too) {
  ModelSpec spec = testing::llama_spec();
  spec.embed.vocab = 100'000;
  const auto model = testing::random_model(spec, 1);
  const ModelSource source = model.source();
  const WeightLoader loader(source, 0, 1);
  for (const Quantization q : {Quantization::None, Quantization::Int8}) {
    const auto backend = make_cpu_backend(3);
    std::vector<std::int64_t> seen;
    const auto progress = [&, loading = std::this_thread::get_id()](std::int64_t done, std::int64_t total) {
      EXPECT_EQ(std::this_thread::get_id(), loading);
      EXPECT_EQ(total, loader.total_bytes());
      seen.push_back(done);
    };
    load_decoder_weights(loader, *backend, DType::F32, progress, q);
    EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
    EXPECT_GT(seen.size(), source.weights.size());
    EXPECT_EQ(seen.back(), loader.total_bytes());
  }
}

}  // namespace
}  // namespace fastllm

// What a checkpoint has compressed stays so: the groups of codes that the loader hands on.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "fastllm/error.h"
#include "loader_fixture.h"
#include "model/dequant.h"
#include "model/dequant_groups.h"
#include "model/weight_loader.h"

namespace fastllm {
namespace {

using namespace testing;

// A tensor of a block format of 32 elements whose scales, and offsets if it has some, are ordinary halves.
SourceTensor blocks(SourceType type, std::vector<std::int64_t> shape, std::vector<std::byte>& data, std::size_t seed) {
  const SourceFormat& f = format_of(type);
  data.resize(static_cast<std::size_t>(shape[0] * shape[1] / f.block_elements * f.block_bytes));
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>((i * 37 + seed) & 255);
  for (std::size_t b = 0; b < data.size(); b += static_cast<std::size_t>(f.block_bytes))
    data[b + 1] = data[b + 3] = std::byte{0x28};
  SourceTensor t;
  t.name = f.name, t.type = type, t.shape = std::move(shape), t.data = data.data();
  t.bytes = static_cast<std::int64_t>(data.size());
  return t;
}

// What the codes of a matrix stand for.
std::vector<float> read_codes(const HostMatrix& m) {
  const std::int64_t groups = (m.cols + kGroup - 1) / kGroup;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(m.rows * m.cols));
  std::vector<float> scales(static_cast<std::size_t>(m.rows * groups)), offsets(m.groups.offsets ? scales.size() : 0);
  for (std::int64_t begin = 0; begin < m.rows; begin += 5)
    m.read_groups(begin, std::min(m.rows, begin + 5), codes.data() + begin * m.cols, scales.data() + begin * groups,
                  offsets.empty() ? nullptr : offsets.data() + begin * groups);
  std::vector<float> out;
  for (std::int64_t i = 0; i < m.rows * m.cols; ++i) {
    const auto g = static_cast<std::size_t>(i / m.cols * groups + i % m.cols / kGroup);
    const int code = codes[static_cast<std::size_t>(i)] - m.groups.zero;
    out.push_back(scales[g] * static_cast<float>(code) + (offsets.empty() ? 0.0f : offsets[g]));
  }
  return out;
}

TEST(WeightLoader, test_codes_take_the_same_rows_and_columns_as_numbers) {
  ModelSource s = model().source();
  std::vector<std::byte> data[8];
  SourceTensor q = blocks(SourceType::Q4_0, {64, 64}, data[0], 3), k = blocks(SourceType::Q8_0, {32, 64}, data[1], 5);
  q.interleaved_head_dim = k.interleaved_head_dim = 16;
  binding(s, kQkv) = {kQkv, WeightTransform::QkvConcat, false, {q, k, blocks(SourceType::Q4_0, {32, 64}, data[2], 7)}};
  binding(s, kGateUp) = {
      kGateUp,
      WeightTransform::GateUpConcat,
      false,
      {blocks(SourceType::Q4_1, {96, 64}, data[3], 9), blocks(SourceType::Q4_0, {96, 64}, data[4], 11)}};
  const std::string out = "layers.1.attn.out.weight";
  binding(s, out).sources = {blocks(SourceType::Q5_0, {64, 64}, data[5], 13)};
  binding(s, kDown).sources = {blocks(SourceType::Q8_0, {64, 96}, data[6], 17)};
  binding(s, "embed.tokens.weight").sources = {blocks(SourceType::Q4_0, {97, 64}, data[7], 19)};
  const struct {
    std::string name;
    GroupFormat own;
  } rows[] = {{kQkv, {8, false, 128}},
              {kGateUp, {4, true, 0}},
              {out, {8, false, 16}},
              {kDown, {8, false, 128}},
              {"embed.tokens.weight", {4, false, 8}}};
  for (int size : {1, 2, 4}) {
    for (int rank = 0; rank < size; ++rank) {
      const WeightLoader loader(s, rank, size);
      for (const auto& row : rows) {
        SCOPED_TRACE(row.name + " of rank " + std::to_string(rank) + " of " + std::to_string(size));
        const bool by_columns = row.name == kDown || row.name == out;
        const std::int64_t cols = (row.name == kDown ? 96 : 64) / (by_columns ? size : 1);
        const GroupFormat own = loader.own_groups(row.name).format;
        if (cols % kGroup != 0) {  // cut inside groups
          EXPECT_EQ(own, (GroupFormat{8, false, 128}));
          EXPECT_FALSE(loader.matrix(row.name, own).read_groups);
          continue;
        }
        EXPECT_EQ(own, row.own);
        const HostMatrix m = loader.matrix(row.name, own);
        ASSERT_TRUE(m.read_groups);
        const auto got = read_codes(m), want = read(m);
        ASSERT_EQ(got.size(), want.size());
        for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-5 * (1 + std::abs(want[i]))) << i;
      }
    }
  }
}

TEST(WeightLoader, test_codes_are_given_only_where_all_sources_have_them) {
  ModelSource s = model().source();
  std::vector<std::byte> data[2];
  const WeightLoader dense(s, 0, 1);
  EXPECT_EQ(dense.own_groups(kDown).format, GroupFormat{});
  EXPECT_EQ(dense.matrix(kDown).groups, GroupFormat{});
  const HostMatrix asked = dense.matrix(kDown, {8, false, 128});
  EXPECT_EQ(asked.groups, (GroupFormat{8, false, 128}));
  EXPECT_FALSE(asked.read_groups) << "fp32 has no codes";

  binding(s, kGateUp) = {kGateUp,
                         WeightTransform::GateUpConcat,
                         false,
                         {blocks(SourceType::Q4_1, {96, 64}, data[0], 9), tensor("up", {96, 64}, model()[kGateUp])}};
  EXPECT_EQ(WeightLoader(s, 0, 1).own_groups(kGateUp).format, GroupFormat{}) << "one source is fp32";
  binding(s, kGateUp).sources[1] = blocks(SourceType::Q8_0, {96, 64}, data[1], 5);
  const WeightLoader loader(s, 0, 1);
  EXPECT_EQ(loader.own_groups(kGateUp).format, (GroupFormat{8, true, 0}));
  EXPECT_FALSE(loader.matrix(kGateUp, {4, true, 0}).read_groups) << "8 bits do not fit into 4";
}

// Symmetric GPTQ codes of 4 bits for a weight [out, in], in groups of 32 columns.
struct GptqTensor {
  std::vector<std::uint32_t> codes, zeros;
  std::vector<float> scales;
  std::vector<std::int32_t> group_of;
  SourceTensor tensor;

  GptqTensor(std::int64_t out, std::int64_t in, std::uint32_t seed, bool ordered)
      : codes(static_cast<std::size_t>(in * out / 8)),
        zeros(static_cast<std::size_t>(in * out / 256), 0x77777777u),
        scales(static_cast<std::size_t>(in * out / 32), 0.25f) {
    for (auto& word : codes) word = seed = seed * 1664525u + 1013904223u;
    for (std::int32_t i = 0; i < in; ++i) group_of.push_back(ordered ? i % static_cast<std::int32_t>(in / 32) : i / 32);
    const auto part = [](const char* name, SourceType type, std::vector<std::int64_t> shape, const auto& data) {
      SourceTensor t;
      t.name = name, t.type = type, t.shape = std::move(shape), t.data = data.data();
      t.bytes = static_cast<std::int64_t>(data.size() * 4);
      return t;
    };
    tensor = part("qweight", SourceType::I32, {in / 8, out}, codes);
    tensor.packing = std::make_shared<Packing>(Packing{
        CodeLayout::Gptq, 4, 32, true, part("scales", SourceType::F32, {in / 32, out}, scales),
        part("qzeros", SourceType::I32, {in / 32, out / 8}, zeros), part("g_idx", SourceType::I32, {in}, group_of)});
  }
  GptqTensor(const GptqTensor&) = delete;
};

std::vector<float> read_sorted_codes(const HostMatrix& m) {
  const std::vector<float> sorted = read_codes(m);
  std::vector<float> out(sorted.size());
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    const std::size_t cols = static_cast<std::size_t>(m.cols), c = i % cols;
    out[i - c + (m.order ? static_cast<std::size_t>((*m.order)[c]) : c)] = sorted[i];
  }
  return out;
}

TEST(WeightLoader, test_packed_tensors_keep_their_codes_where_parts_and_ranks_share_an_order) {
  const GptqTensor q(64, 64, 1, true), k(32, 64, 2, true), v(32, 64, 3, true), plain(32, 64, 4, false);
  const GptqTensor down(64, 96, 5, true);
  ModelSource s = model().source();
  binding(s, kQkv) = {kQkv, WeightTransform::QkvConcat, false, {q.tensor, k.tensor, v.tensor}};
  binding(s, kDown).sources = {down.tensor};
  for (int size : {1, 2}) {
    for (int rank = 0; rank < size; ++rank) {
      const WeightLoader loader(s, rank, size);
      const OwnGroups own = loader.own_groups(kQkv);
      EXPECT_EQ(own.format, (GroupFormat{4, false, 8, 32})) << own.why_none;
      for (const GroupFormat& f : {own.format, GroupFormat{4, true, 0, 32}, kWideGroups}) {
        const HostMatrix m = loader.matrix(kQkv, f);
        ASSERT_TRUE(m.read_groups && m.order);
        EXPECT_EQ(read_sorted_codes(m), read(m)) << "scales are a power of two";
      }
    }
  }
  EXPECT_EQ(WeightLoader(s, 0, 1).own_groups(kDown).format, (GroupFormat{4, false, 8, 32}));
  const OwnGroups shared = WeightLoader(s, 1, 2).own_groups(kDown);
  EXPECT_EQ(shared.format, GroupFormat{});
  EXPECT_EQ(shared.why_none, "its 48 columns are not whole groups");
  EXPECT_FALSE(WeightLoader(s, 1, 2).matrix(kDown, {4, false, 8, 32}).read_groups);

  const std::string out = "layers.1.attn.out.weight";
  const GptqTensor whole(64, 64, 6, true);
  binding(s, out).sources = {whole.tensor};
  EXPECT_EQ(WeightLoader(s, 0, 2).own_groups(out).why_none, "its sorted columns cannot be shared by ranks");

  binding(s, kQkv).sources[2] = plain.tensor;
  EXPECT_EQ(WeightLoader(s, 0, 1).own_groups(kQkv).why_none, "its parts sort their columns differently");
  binding(s, kQkv).sources[2] = tensor("v", {32, 64}, rows_of(model()[kQkv], 64, 96, 32));
  EXPECT_EQ(WeightLoader(s, 0, 1).own_groups(kQkv).why_none, "'v', a part of it, is not compressed");
}

TEST(WeightLoader, test_integers_and_misplaced_codes_are_refused) {
  const GptqTensor good(64, 96, 1, false), small(32, 96, 2, false);
  const struct {
    std::function<void(WeightBinding&)> change;
    const char* message;
  } rows[] = {
      {[&](WeightBinding& b) { b.sources[0].packing = nullptr; }, "it is of type I32 without scales"},
      {[&](WeightBinding& b) { b.transform = WeightTransform::Transpose; }, "codes cannot be transposed"},
      {[&](WeightBinding& b) { b.sources[0] = small.tensor; },
       "weight 'layers.1.ffn.down.weight' from tensor 'qweight': its codes 'qweight' have shape [12, 32] of I32; "
       "needed"},
  };
  for (const auto& row : rows) {
    ModelSource s = model().source();
    binding(s, kDown).sources = {good.tensor};
    EXPECT_NO_THROW(WeightLoader(s, 0, 1));
    row.change(binding(s, kDown));
    try {
      const WeightLoader loader(s, 0, 1);
      ADD_FAILURE() << "accepted: " << row.message;
    } catch (const LoadError& e) {
      EXPECT_NE(std::string(e.what()).find(row.message), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace fastllm

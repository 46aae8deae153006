// Decode attention against the fp64 oracle: every length around a boundary, every way the work can be cut, padding rows
// in between; NaN in everything that is not to be read.
#include <algorithm>
#include <cstring>

#include "attention/decode_split.h"
#include "attention_step.h"

namespace fastllm::test {
namespace {

using cuda::AttentionLimits;

struct Options {
  int num_sms = 0;          // to cut the work for; 0: of the device
  int max_rows = 0;         // 0: of the step
  int planned_window = -1;  // -1: that of the shape
  float sigma = 1;          // of q
};

class DecodeAttention : public CudaTest {
 protected:
  static constexpr double kTolerance = 1.0 / 64;

  // One row per length, 0 for a padding row.
  static std::vector<cuda::DeviceRow> rows_of(const std::vector<int>& lengths) {
    std::vector<cuda::DeviceRow> rows;
    std::int32_t slot = 0;
    for (const int n : lengths) {
      const auto token = static_cast<std::int32_t>(rows.size());
      rows.push_back(n > 0 ? cuda::DeviceRow{token, 1, n - 1, slot++} : cuda::DeviceRow{token, 1, -1, -1});
    }
    return rows;
  }
  static std::vector<int> sequences(std::vector<int> lengths) {
    std::erase(lengths, 0);
    return lengths;
  }

  Array launch(const AttentionShape& shape, const AttentionStep& step, const Options& options) {
    AttentionLimits limits;
    limits.max_rows = options.max_rows > 0 ? options.max_rows : static_cast<int>(step.rows.size());
    limits.max_tokens = limits.max_rows;
    limits.num_sms = options.num_sms > 0 ? options.num_sms : properties.multiProcessorCount;
    limits.capability = capability();
    limits.window = options.planned_window >= 0 ? options.planned_window : shape.window;
    std::vector<std::int32_t> lengths;
    for (const auto& row : step.rows) {
      lengths.push_back(row.first_pos + 1);
      limits.max_len = std::max(limits.max_len, row.first_pos + 1);
    }

    std::vector<std::byte> plan(cuda::decode_plan_bytes(limits));
    cuda::write_decode_plan(lengths, limits, plan.data());
    const DeviceArray<std::byte> device_plan(plan);
    constexpr std::size_t kGuard = 256;
    const std::size_t bytes = cuda::decode_workspace_bytes(limits, shape.heads, shape.head_dim);
    const DeviceArray<std::byte> workspace(bytes + kGuard);
    cuda::check(cudaMemset(workspace.get(), 0, cuda::decode_counter_bytes(limits)), "cudaMemset");

    const auto call = step.call();
    const auto once = [&] {
      cuda::decode_attention(call, step.view(), device_plan.get(), limits, workspace.get(), stream);
      return step.result();
    };
    const Array first = once();
    const Array second = once();  // finds the workspace as the first call left it
    for (int t = 0; t < step.num_tokens; ++t) {
      if (!first.same_row(t, second, t)) {
        ADD_FAILURE() << "row " << t << " differs when computed again: " << describe(shape, step, options);
        break;
      }
    }
    const auto left = workspace.download();
    for (std::size_t i = 0; i < cuda::decode_counter_bytes(limits); ++i) {
      if (left[i] == std::byte{0}) continue;
      ADD_FAILURE() << "counter " << i / 4 << " is not zero afterwards: " << describe(shape, step, options);
      break;
    }
    for (std::size_t i = bytes; i < left.size(); ++i) {
      if (left[i] == std::byte{0xff}) continue;
      ADD_FAILURE() << "byte " << i - bytes << " after the workspace was written: " << describe(shape, step, options);
      break;
    }
    return first;
  }

  static std::string describe(const AttentionShape& shape, const AttentionStep& step, const Options& options) {
    std::ostringstream s;
    s << shape.describe() << ", " << options.num_sms << " SMs, " << step.rows.size() << " rows of lengths";
    for (std::size_t i = 0; i < std::min<std::size_t>(step.rows.size(), 16); ++i)
      s << " " << step.rows[i].first_pos + 1;
    return s.str();
  }

  void check(const AttentionShape& shape, const std::vector<int>& lengths, const Options& options = {}) {
    const PagedCache cache(shape, sequences(lengths), random);
    const AttentionStep step(cache, rows_of(lengths), static_cast<int>(lengths.size()), random, options.sigma);
    const auto wrong = step.difference(launch(shape, step, options), kTolerance);
    if (!wrong.empty()) ADD_FAILURE() << wrong << "\n  " << describe(shape, step, options);
  }

  const std::vector<int> boundaries_{1, 15, 0, 16, 17, 31, 32, 33, 63, 64, 65, 0, 127, 128, 129, 200, 333, 0};
};

TEST_F(DecodeAttention, EveryGroupSizeMatchesTheOracle) {
  for (const int group : {1, 2, 3, 4, 7, 8, 9, 16, 24, 32, 40}) {
    const int kv_heads = group > 8 ? 1 : 2;
    check({.heads = group * kv_heads, .kv_heads = kv_heads}, boundaries_);
  }
}

TEST_F(DecodeAttention, EveryHeadDimAndCacheTypeMatchesTheOracle) {
  for (const DType kv : {DType::BF16, DType::F8E4M3}) {
    for (const int dim : {64, 128, 256}) {
      check({.heads = 8, .kv_heads = 2, .head_dim = dim, .kv_dtype = kv}, boundaries_);
      check({.heads = 12, .kv_heads = 1, .head_dim = dim, .kv_dtype = kv}, {700, 0, 5});
    }
  }
}

TEST_F(DecodeAttention, EveryBlockSizeMatchesTheOracle) {
  for (const int block_size : {8, 12, 16, 32, 64, 128}) {
    check({.heads = 4, .kv_heads = 1, .block_size = block_size}, boundaries_);
  }
}

TEST_F(DecodeAttention, AllMultiprocessorsShareOneLongRow) {
  check({.heads = 8, .kv_heads = 2}, {5000});
  check({.heads = 4, .kv_heads = 1, .head_dim = 64}, {12800});  // so many parts that they are merged in two levels
  check({.heads = 16, .kv_heads = 1}, {12801, 0, 3}, {.num_sms = 200});
}

TEST_F(DecodeAttention, AnyNumberOfMultiprocessorsGivesTheSame) {
  for (const int sms : {1, 2, 5, 40, 150}) {
    check({.heads = 4, .kv_heads = 2}, {1000, 1, 0, 64, 65, 300, 0, 0, 2000, 17}, {.num_sms = sms});
  }
}

TEST_F(DecodeAttention, SkewedAndLargeBatchesMatchTheOracle) {
  std::vector<int> skewed(31, 40);
  skewed.insert(skewed.begin() + 7, 4000);
  check({.heads = 4, .kv_heads = 1}, skewed);
  for (const int n : {33, 100, 1100}) {  // one, two and three rounds of the search for a row
    std::vector<int> lengths;
    for (int i = 0; i < n; ++i) lengths.push_back(random.below(5) == 0 ? 0 : 1 + random.below(90));
    check({.heads = 4, .kv_heads = 2, .head_dim = 64}, lengths, {.max_rows = n + 3});
  }
}

// Rows of up to four tiles stay whole, in blocks of two to eight tiles, next to rows that are cut.
TEST_F(DecodeAttention, ShortRowsMatchTheOracle) {
  for (const int sms : {4, 8, 16, 30, 60}) {
    for (const int kv_heads : {1, 3}) {
      std::vector<int> lengths;
      for (int i = 0; i < 64; ++i)
        lengths.push_back(random.below(8) == 0 ? 0 : 1 + random.below(random.below(6) == 0 ? 700 : 256));
      check({.heads = 3 * kv_heads, .kv_heads = kv_heads, .head_dim = 64}, lengths, {.num_sms = sms});
    }
  }
  check({.heads = 9, .kv_heads = 3, .head_dim = 64}, std::vector<int>(256, 150));
}

TEST_F(DecodeAttention, OnlyPaddingRowsGiveZeros) { check({.heads = 8, .kv_heads = 2}, {0, 0, 0}); }

TEST_F(DecodeAttention, WindowsMatchTheOracle) {
  for (const int window : {1, 16, 63, 64, 100, 1000}) {
    for (const int planned : {window, 0, 77}) {
      check({.heads = 4, .kv_heads = 2, .window = window}, {1, 64, 99, 100, 0, 101, 129, 700, 1500},
            {.planned_window = planned});
    }
  }
}

TEST_F(DecodeAttention, SoftcapAndAlibiMatchTheOracle) {
  check({.heads = 4, .kv_heads = 2, .softcap = 5}, boundaries_);
  check({.heads = 6, .kv_heads = 2, .alibi = true}, boundaries_);
  check({.heads = 6,
         .kv_heads = 1,
         .head_dim = 64,
         .window = 90,
         .softcap = 30,
         .alibi = true,
         .kv_dtype = DType::F8E4M3},
        boundaries_);
}

TEST_F(DecodeAttention, GreatScoresStayFinite) {
  check({.heads = 4, .kv_heads = 2}, boundaries_, {.sigma = 15});
  check({.heads = 4, .kv_heads = 2, .kv_dtype = DType::F8E4M3}, boundaries_, {.sigma = 15});
  check({.heads = 4, .kv_heads = 2, .softcap = 20}, boundaries_, {.sigma = 200});
}

TEST(DecodePlan, CountsTheTilesBeforeEveryRow) {
  AttentionLimits limits;
  limits.max_rows = 6;
  limits.num_sms = 10;
  limits.window = 100;
  const std::vector<std::int32_t> lengths{1, 0, 64, 65, 1000};
  std::vector<std::byte> bytes(cuda::decode_plan_bytes(limits));
  cuda::write_decode_plan(lengths, limits, bytes.data());
  std::vector<std::int32_t> plan(bytes.size() / 4);
  std::memcpy(plan.data(), bytes.data(), bytes.size());
  // Position 900 to 999 of the last row are tiles 14 and 15.
  EXPECT_EQ(plan, (std::vector<std::int32_t>{0, 1, 1, 2, 4, 20, 20, 20, 0, 1, 1, 2, 4, 6, 6, 6}));
}

}  // namespace
}  // namespace fastllm::test

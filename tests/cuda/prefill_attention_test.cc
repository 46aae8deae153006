// Prefill attention: every kernel that takes a shape, against naive attention on the host.
#include <algorithm>
#include <functional>
#include <set>
#include <sstream>

#include "attention/prefill_plan.h"
#include "attention_oracle.h"

namespace fastllm::test {
namespace {

using cuda::DeviceRow;

// P is rounded to bf16 before the product with V, and so is the result.
constexpr double kTolerance = 0.02;

enum class Kernel { Mma, Sm90 };
const char* name_of_kernel(Kernel k) { return k == Kernel::Mma ? "mma" : "sm90"; }

struct Chunk {
  int first_pos, num_tokens;
};

// Chunk i is of the sequence in slot i and stands right after chunk i - 1 in the batch.
std::vector<DeviceRow> rows_of(const std::vector<Chunk>& chunks) {
  std::vector<DeviceRow> rows;
  int token = 0;
  for (const Chunk& c : chunks) {
    rows.push_back({token, c.num_tokens, c.first_pos, static_cast<std::int32_t>(rows.size())});
    token += c.num_tokens;
  }
  return rows;
}
std::vector<int> lengths_of(const std::vector<Chunk>& chunks) {
  std::vector<int> lengths;
  for (const Chunk& c : chunks) lengths.push_back(c.first_pos + c.num_tokens);
  return lengths;
}
int tokens_of(const std::vector<DeviceRow>& rows) { return rows.back().token_begin + rows.back().num_tokens; }

class CudaPrefill : public CudaTest {
 protected:
  // Queries as they lie in the qkv matrix.
  Array queries(const AttentionShape& s, int tokens) {
    Array q(DType::BF16, tokens, (s.heads + 2 * s.kv_heads) * s.head_dim);
    return q.fill(random);
  }

  cuda::AttentionLimits limits(const std::vector<DeviceRow>& rows) const {
    cuda::AttentionLimits l;
    l.max_rows = static_cast<int>(rows.size());
    l.max_tokens = tokens_of(rows);
    l.max_len = 1 << 20;
    l.num_sms = num_sms > 0 ? num_sms : properties.multiProcessorCount;
    l.capability = capability();
    return l;
  }

  cuda::AttentionCall call_of(const PagedCache& cache, const DeviceMatrix& q, void* out, const float* slopes) const {
    cuda::AttentionCall call;
    call.out = out;
    call.q = q.data();
    call.ldq = q.tensor().cols();
    call.dtype = DType::BF16;
    call.kv = cache.device_view();
    call.args = cache.shape().args();
    call.alibi_slopes = slopes;
    return call;
  }

  std::vector<Kernel> kernels(const AttentionShape& s) const {
    std::vector<Kernel> all;
    cuda::AttentionCall call;
    call.kv = {nullptr, s.kv_dtype, s.kv_heads, s.block_size, s.head_dim, 0, 0, 0};
    call.ldq = 8;
    call.args = s.args();
    cuda::AttentionLimits l;
    l.capability = capability();
    if (cuda::prefill_mma_takes(call, l)) all.push_back(Kernel::Mma);
#ifdef FASTLLM_WITH_SM90A
    if (cuda::prefill_sm90_takes(call, l)) all.push_back(Kernel::Sm90);
#endif
    return all;
  }

  // The rows from num_decode_rows on. Checks that nothing before and after `out`, and no token of another row, is
  // written.
  Array attend(Kernel kernel, const PagedCache& cache, const Array& q, const std::vector<DeviceRow>& rows,
               int num_decode_rows = 0, const BlockId* tables = nullptr) {
    const AttentionShape& s = cache.shape();
    const std::int64_t tokens = q.rows(), cols = s.heads * s.head_dim;
    const DeviceMatrix device_q(q), out(DType::BF16, tokens + 2, cols);
    const DeviceArray<DeviceRow> device_rows(rows);
    const DeviceArray<float> slopes(s.slopes());
    const cuda::AttentionLimits l = limits(rows);
    std::vector<std::byte> plan_bytes(cuda::prefill_plan_bytes(l));
    const DeviceArray<std::byte> device_plan(plan_bytes.size());
    const auto plan = cuda::write_prefill_plan(rows, num_decode_rows, l, plan_bytes.data(), device_plan.get());
    EXPECT_LE(plan.bytes, plan_bytes.size());
    device_plan_upload(device_plan, plan_bytes);

    cuda::StepView step;
    step.rows = device_rows.get();
    step.tables = tables != nullptr ? tables : cache.device_tables();
    step.table_width = cache.table_width();
    step.num_tokens = static_cast<int>(tokens);
    step.num_rows = static_cast<int>(rows.size());
    step.num_decode_rows = num_decode_rows;
    const auto call = call_of(cache, device_q, out.ptr<bf16>() + cols, s.alibi ? slopes.get() : nullptr);
    if (kernel == Kernel::Mma) {
      cuda::prefill_mma(call, step, plan, stream);
    } else {
#ifdef FASTLLM_WITH_SM90A
      cuda::prefill_sm90(call, step, plan, l, stream);
#endif
    }
    const Array all = out.download();
    Array got(DType::BF16, tokens, cols);
    std::memcpy(got.tensor().data, all.tensor().at(1), got.tensor().bytes());
    const Array untouched(DType::BF16, 1, cols);
    std::vector<bool> planned(static_cast<std::size_t>(tokens), false);
    for (std::size_t r = static_cast<std::size_t>(num_decode_rows); r < rows.size(); ++r)
      for (int i = 0; i < rows[r].num_tokens && rows[r].slot >= 0; ++i)
        planned[static_cast<std::size_t>(rows[r].token_begin + i)] = true;
    EXPECT_TRUE(all.same_row(0, untouched, 0)) << "wrote before the output";
    EXPECT_TRUE(all.same_row(tokens + 1, untouched, 0)) << "wrote after the output";
    for (std::int64_t t = 0; t < tokens; ++t)
      if (!planned[static_cast<std::size_t>(t)]) {
        EXPECT_TRUE(got.same_row(t, untouched, 0)) << "wrote token " << t << " of another row";
      }
    return got;
  }

  void check(const AttentionShape& shape, const std::vector<Chunk>& chunks) {
    const auto rows = rows_of(chunks);
    const PagedCache cache(shape, lengths_of(chunks), random);
    const Array q = queries(shape, tokens_of(rows));
    const auto want = attention_oracle(cache, q, rows);
    const auto all = kernels(shape);
    EXPECT_FALSE(all.empty()) << "no kernel for " << shape.describe();
    for (const Kernel kernel : all) {
      const Array got = attend(kernel, cache, q, rows);
      const std::string wrong = first_difference(got, want, shape.head_dim, kTolerance);
      EXPECT_EQ(wrong, "") << name_of_kernel(kernel) << ": " << shape.describe() << ", " << place(rows, wrong)
                           << ", seed " << test_seed();
    }
  }

  // How the tokens of a batch lie, for messages.
  static std::string place(const std::vector<DeviceRow>& rows, const std::string& wrong) {
    if (wrong.empty()) return {};
    const int token = std::atoi(wrong.c_str() + std::string("token ").size());
    for (const DeviceRow& r : rows)
      if (token >= r.token_begin && token < r.token_begin + r.num_tokens) {
        std::ostringstream s;
        s << "row of " << r.num_tokens << " tokens after " << r.first_pos << ", position "
          << r.first_pos + token - r.token_begin;
        return s.str();
      }
    return "no row";
  }

  static void device_plan_upload(const DeviceArray<std::byte>& device, const std::vector<std::byte>& host) {
    cuda::check(cudaMemcpy(device.get(), host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  int num_sms = 0;  // 0: those of the device
};

TEST_F(CudaPrefill, OneTileOfOneSequence) {
  for (const int dim : {64, 128}) check({.heads = 1, .kv_heads = 1, .head_dim = dim}, {{0, 128}});
}

TEST_F(CudaPrefill, OneToken) {
  for (const int prefix : {0, 1, 7, 8, 63, 64, 127, 128, 129, 500}) {
    SCOPED_TRACE(prefix);
    check({.heads = 4, .kv_heads = 1, .head_dim = 128}, {{prefix, 1}});
  }
}

TEST_F(CudaPrefill, ChunksOfAllLengths) {
  std::vector<Chunk> chunks;
  for (const int n : {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 300})
    chunks.push_back({random.below(150), n});
  chunks.push_back({2000, 5});
  chunks.push_back({1234, 1});
  for (const int dim : {64, 128}) check({.heads = 4, .kv_heads = 1, .head_dim = dim}, chunks);
}

TEST_F(CudaPrefill, LongSequence) {
  for (const int dim : {64, 128}) {
    check({.heads = 2, .kv_heads = 1, .head_dim = dim}, {{0, 1100}});
    check({.heads = 4, .kv_heads = 1, .head_dim = dim}, {{1917, 70}});
  }
}

TEST_F(CudaPrefill, AnyNumberOfHeads) {
  for (const int group : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 71}) {
    const int kv_heads = group > 8 ? 1 : 2;
    check({.heads = group * kv_heads, .kv_heads = kv_heads, .head_dim = 64}, {{33, 1}, {0, 41}, {90, 60}});
  }
  check({.heads = 28, .kv_heads = 4, .head_dim = 128}, {{33, 1}, {0, 41}});
}

TEST_F(CudaPrefill, HeadDimsAndBlockSizes) {
  for (const int dim : {64, 96, 128, 256}) {
    for (const int block_size : {8, 16, 24, 64}) {
      const AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = dim, .block_size = block_size};
      if (!kernels(shape).empty()) check(shape, {{0, 77}, {123, 20}});
    }
  }
}

TEST_F(CudaPrefill, Windows) {
  for (const int window : {1, 2, 16, 64, 100, 128, 129, 300})
    for (const int dim : {64, 128})
      check({.heads = 4, .kv_heads = 2, .head_dim = dim, .window = window}, {{0, 130}, {250, 40}, {391, 1}, {5, 9}});
}

TEST_F(CudaPrefill, BlocksBeforeTheWindowAreNeverRead) {
  const AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = 128, .window = 50};
  const std::vector<Chunk> chunks = {{200, 70}};
  const auto rows = rows_of(chunks);
  const PagedCache cache(shape, lengths_of(chunks), random);
  const Array q = queries(shape, 70);
  std::vector<BlockId> tables(static_cast<std::size_t>(cache.table_width()));
  cuda::check(cudaMemcpy(tables.data(), cache.device_tables(), tables.size() * sizeof(BlockId), cudaMemcpyDeviceToHost),
              "cudaMemcpy");
  for (int b = 0; b < (200 - 50 + 1) / shape.block_size; ++b) tables[static_cast<std::size_t>(b)] = BlockId{1};
  const DeviceArray<BlockId> device_tables(tables);
  const auto want = attention_oracle(cache, q, rows);
  for (const Kernel kernel : kernels(shape)) {
    const Array got = attend(kernel, cache, q, rows, 0, device_tables.get());
    EXPECT_EQ(first_difference(got, want, shape.head_dim, kTolerance), "") << name_of_kernel(kernel);
  }
}

TEST_F(CudaPrefill, SoftCapAndAlibi) {
  const std::vector<Chunk> chunks = {{0, 140}, {220, 33}, {17, 1}};
  for (const int dim : {64, 128}) {
    check({.heads = 4, .kv_heads = 2, .head_dim = dim, .softcap = 0.7f}, chunks);
    check({.heads = 4, .kv_heads = 2, .head_dim = dim, .softcap = 50}, chunks);
    check({.heads = 6, .kv_heads = 2, .head_dim = dim, .alibi = true}, chunks);
    check({.heads = 4, .kv_heads = 2, .head_dim = dim, .window = 90, .softcap = 2, .alibi = true}, chunks);
  }
}

TEST_F(CudaPrefill, KvOfEightBits) {
  for (const int dim : {64, 96, 128, 256}) {
    AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = dim, .kv_dtype = DType::F8E4M3};
    if (kernels(shape).empty()) continue;
    check(shape, {{0, 1}, {0, 150}, {333, 40}, {127, 2}});
    shape.window = 100;
    check(shape, {{301, 60}});
  }
}

// Blocks that compute many items, of one KV tile and of several.
TEST_F(CudaPrefill, FewMultiprocessorsComputeManyTiles) {
  std::vector<Chunk> chunks;
  for (int i = 0; i < 12; ++i) chunks.push_back({random.below(2) * random.below(300), 1 + random.below(90)});
  for (const int n : {1, 2, 3, 7}) {
    num_sms = n;
    check({.heads = 8, .kv_heads = 2, .head_dim = 128}, chunks);
    check({.heads = 4, .kv_heads = 2, .head_dim = 64, .kv_dtype = DType::F8E4M3}, chunks);
  }
}

TEST_F(CudaPrefill, LeavesDecodeAndPaddingRowsAlone) {
  const AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = 128};
  const std::vector<Chunk> chunks = {{40, 1}, {77, 1}, {0, 50}, {9, 3}};
  auto rows = rows_of(chunks);
  const PagedCache cache(shape, lengths_of(chunks), random);
  rows.push_back({tokens_of(rows), 1, -1, -1});
  const Array q = queries(shape, tokens_of(rows));
  auto want = attention_oracle(cache, q, rows);
  for (const Kernel kernel : kernels(shape)) {
    Array got = attend(kernel, cache, q, rows, 2);  // checks what is not written
    for (const std::int64_t t : {std::int64_t{0}, std::int64_t{1}, q.rows() - 1})
      for (int c = 0; c < 512; ++c) want[static_cast<std::size_t>(t * 512 + c)] = 0, got.set(t, c, 0);
    EXPECT_EQ(first_difference(got, want, shape.head_dim, kTolerance), "") << name_of_kernel(kernel);
  }
}

// Bit for bit: alone, in a batch, and in chunks of any size.
TEST_F(CudaPrefill, ResultsDoNotDependOnBatchOrChunks) {
  struct Case {
    int group, head_dim, window;
    DType kv;
  };
  for (const Case& c : {Case{4, 128, 0, DType::BF16}, Case{1, 64, 0, DType::BF16}, Case{3, 128, 70, DType::BF16},
                        Case{4, 128, 0, DType::F8E4M3}}) {
    const AttentionShape shape{
        .heads = 2 * c.group, .kv_heads = 2, .head_dim = c.head_dim, .window = c.window, .kv_dtype = c.kv};
    constexpr int kTokens = 420;
    const PagedCache cache(shape, {90, kTokens, 300}, random);
    const Array q = queries(shape, kTokens);
    // Tokens [begin, end) of slot 1, between rows of the other slots.
    const auto part = [&](Kernel kernel, int begin, int end, bool batch) {
      std::vector<DeviceRow> rows;
      int token = 0;
      if (batch) rows.push_back({0, 35, 55, 0}), token = 35;
      const int at = token;
      rows.push_back({token, end - begin, begin, 1}), token += end - begin;
      if (batch) rows.push_back({token, 200, 100, 2}), token += 200;
      Array step_q = queries(shape, token);
      for (int t = begin; t < end; ++t)
        std::memcpy(step_q.tensor().at(at + t - begin), q.tensor().at(t), q.tensor().bytes() / kTokens);
      const Array got = attend(kernel, cache, step_q, rows);
      Array own(DType::BF16, end - begin, got.cols());
      std::memcpy(own.tensor().data, got.tensor().at(at), own.tensor().bytes());
      return own;
    };
    for (const Kernel kernel : kernels(shape)) {
      const Array whole = part(kernel, 0, kTokens, false);
      const auto expect_same = [&](const Array& got, int begin, const std::string& what) {
        for (std::int64_t t = 0; t < got.rows(); ++t)
          ASSERT_TRUE(got.same_row(t, whole, begin + t))
              << name_of_kernel(kernel) << " " << what << ": token " << begin + t << " differs, " << shape.describe();
      };
      expect_same(part(kernel, 0, kTokens, true), 0, "in a batch");
      for (int begin = 0, end; begin < kTokens; begin = end) {
        end = std::min(kTokens, begin + 1 + random.below(150));
        expect_same(part(kernel, begin, end, random.below(2) == 1), begin, "chunk of " + std::to_string(end - begin));
      }
    }
  }
}

TEST_F(CudaPrefill, SameResultsInEveryRun) {
  const AttentionShape shape{.heads = 8, .kv_heads = 2, .head_dim = 128};
  const std::vector<Chunk> chunks = {{0, 300}, {450, 100}, {3, 64}};
  const auto rows = rows_of(chunks);
  const PagedCache cache(shape, lengths_of(chunks), random);
  const Array q = queries(shape, tokens_of(rows));
  for (const Kernel kernel : kernels(shape)) {
    const Array first = attend(kernel, cache, q, rows);
    for (int run = 0; run < 20; ++run) {
      const Array again = attend(kernel, cache, q, rows);
      for (std::int64_t t = 0; t < q.rows(); ++t)
        ASSERT_TRUE(again.same_row(t, first, t)) << name_of_kernel(kernel) << ": token " << t << " in run " << run;
    }
  }
}

// What the kernels read as a plan.
TEST(PrefillPlan, EveryTokenIsInOneTileAndTheCostliestTileIsFirst) {
  std::vector<Chunk> chunks = {{100, 1}, {7, 1}, {0, 700}, {4000, 33}, {12, 128}, {0, 1}, {511, 129}};
  const auto rows = rows_of(chunks);
  constexpr int kDecodeRows = 2;
  cuda::AttentionLimits limits;
  limits.max_rows = static_cast<int>(rows.size());
  limits.max_tokens = tokens_of(rows);
  std::vector<std::byte> bytes(cuda::prefill_plan_bytes(limits));
  const auto plan = cuda::write_prefill_plan(rows, kDecodeRows, limits, bytes.data(), nullptr);
  ASSERT_LE(plan.bytes, bytes.size());
  EXPECT_EQ(plan.bytes % 16, 0u);
  const auto* items = reinterpret_cast<const cuda::PrefillItem*>(bytes.data());
  for (int heads = 1; heads <= cuda::kMaxTileHeads; ++heads) {
    const auto h = static_cast<std::size_t>(heads);
    std::multiset<int> tokens;
    int last_cost = 1 << 30;
    for (int i = plan.begin[h - 1]; i < plan.begin[h]; ++i) {
      const DeviceRow& row = rows[static_cast<std::size_t>(items[i].row)];
      const int end = std::min(items[i].first + cuda::prefill_tile_tokens(heads), row.num_tokens);
      for (int t = items[i].first; t < end; ++t) tokens.insert(row.token_begin + t);
      EXPECT_LE(row.first_pos + end, last_cost) << "item " << i << " for " << heads << " heads";
      last_cost = row.first_pos + end;
    }
    EXPECT_EQ(tokens.size(), static_cast<std::size_t>(tokens_of(rows) - kDecodeRows)) << heads << " heads";
    for (int t = kDecodeRows; t < tokens_of(rows); ++t) EXPECT_EQ(tokens.count(t), 1u) << "token " << t;
  }
}

}  // namespace
}  // namespace fastllm::test

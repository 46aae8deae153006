// The decoder on the CPU backend against the oracle of reference_model.h, for every layer structure, with the prompt in
// one piece, in chunks and token by token, on one rank and on several.
#include "model/decoder.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <thread>

#include "fastllm/error.h"
#include "model_fixture.h"
#include "reference_model.h"
#include "test_seed.h"

namespace fastllm {
namespace {

using testing::NamedSpec;
using testing::random_model;
using testing::TestModel;

constexpr int kBlock = 4;  // positions

using FloatRows = std::vector<std::vector<float>>;

// One rank's decoder with a KV pool for one sequence, in blocks that are not in order.
class Runner {
 public:
  Runner(const TestModel& model, Communicator& comm, DType dtype = DType::F32, int threads = 2)
      : backend_(make_cpu_backend(threads)) {
    const ModelSource source = model.source();
    const WeightLoader loader(source, comm.rank(), comm.size());
    DecoderConfig c;
    c.dtype = c.kv_dtype = dtype, c.max_len = 64, c.max_step_tokens = 64, c.max_logit_rows = 64, c.block_size = kBlock;
    decoder_ =
        std::make_unique<Decoder>(model.spec, c, *backend_, comm, load_decoder_weights(loader, *backend_, dtype, {}));
    StepLimits limits;
    limits.max_tokens = 64, limits.max_slots = 1, limits.max_logit_rows = 64, limits.table_width = 64 / kBlock;
    limits.block_size = kBlock, limits.vocab = model.spec.embed.vocab;
    backend_->init_steps(limits);
    for (int i = 0; i < 64 / kBlock; ++i) table_.push_back({SlotId{0}, i, static_cast<BlockId>(1 + (i * 7) % 16)});
    kv_ = backend_->allocate(static_cast<std::size_t>(17 * decoder_->kv_shape().block_bytes()), MemoryKind::Lazy);
  }

  // Appends ids to the sequence; returns the logits after each of them, or after the last `wanted`, which are asked for
  // as the step's or by their numbers.
  FloatRows append(std::span<const TokenId> ids, std::size_t wanted = SIZE_MAX, bool by_number = false) {
    std::vector<std::int32_t> tokens;
    const std::size_t first = ids.size() - std::min(wanted, ids.size());
    for (std::size_t i = first; i < ids.size(); ++i) tokens.push_back(static_cast<std::int32_t>(i));
    const StepRow row{0, static_cast<std::int32_t>(ids.size()), num_computed_, SlotId{0}, false};
    StepInput input;
    input.table_sets = table_;
    input.tokens = ids;
    input.rows = {&row, 1};
    input.logit_tokens = tokens;
    const Step& step = backend_->begin_step(input);
    const int rows = by_number ? Decoder::kAllTokens : static_cast<int>(tokens.size());
    decoder_->forward(step, static_cast<int>(ids.size()), kv_->data(), rows);
    num_computed_ += static_cast<std::int32_t>(ids.size());
    const Tensor logits =
        by_number ? decoder_->logits(tokens) : decoder_->logits(step, static_cast<int>(tokens.size()));
    EXPECT_EQ(decoder_->logits_view(static_cast<int>(tokens.size())).data, logits.data);
    FloatRows out;
    for (std::int64_t r = 0; r < logits.rows(); ++r) {
      const auto* p = static_cast<const float*>(logits.at(r));
      out.emplace_back(p, p + logits.cols());
    }
    return out;
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Buffer> kv_;
  std::vector<TableSet> table_;
  std::int32_t num_computed_ = 0;
};

std::vector<TokenId> random_ids(int n, int vocab, std::uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<TokenId> ids;
  for (int i = 0; i < n; ++i) ids.push_back(static_cast<TokenId>(rng() % static_cast<std::uint32_t>(vocab)));
  return ids;
}

void expect_close(const FloatRows& got, const testing::Rows& want, std::size_t first, double tolerance) {
  for (std::size_t t = 0; t < got.size(); ++t) {
    ASSERT_EQ(got[t].size(), want[first + t].size());
    for (std::size_t v = 0; v < got[t].size(); ++v)
      ASSERT_NEAR(static_cast<double>(got[t][v]), want[first + t][v], tolerance)
          << "token " << first + t << " id " << v;
  }
}

class DecoderSpecs : public ::testing::TestWithParam<NamedSpec> {};

TEST_P(DecoderSpecs, test_logits_match_the_oracle_however_the_prompt_is_cut) {
  const unsigned seed = test::test_seed();
  const TestModel model = random_model(GetParam().spec, seed);
  const auto ids = random_ids(29, model.spec.embed.vocab, seed);
  const auto want = testing::reference_logits(model, ids);
  auto comm = make_null_communicator();
  for (std::size_t chunk : {ids.size(), std::size_t{7}, std::size_t{1}}) {
    SCOPED_TRACE(chunk);
    Runner runner(model, *comm);
    for (std::size_t begin = 0; begin < ids.size(); begin += chunk)
      expect_close(runner.append(std::span(ids).subspan(begin, std::min(chunk, ids.size() - begin))), want, begin,
                   2e-4);
  }
}

TEST_P(DecoderSpecs, test_tensor_parallel_ranks_agree_with_the_oracle) {
  const unsigned seed = test::test_seed();
  const TestModel model = random_model(GetParam().spec, seed);
  const auto ids = random_ids(20, model.spec.embed.vocab, seed);
  const auto want = testing::reference_logits(model, ids);
  for (int size : {2, 4}) {
    SCOPED_TRACE(size);
    auto comms = make_thread_communicators(size);
    std::vector<FloatRows> got(static_cast<std::size_t>(size));
    std::vector<std::thread> threads;
    for (auto& comm : comms)
      threads.emplace_back([&, &c = *comm] {
        Runner runner(model, c, DType::F32, 1);
        auto& out = got[static_cast<std::size_t>(c.rank())];
        out = runner.append(std::span(ids).first(13));
        for (auto& row : runner.append(std::span(ids).subspan(13))) out.push_back(std::move(row));
      });
    for (auto& t : threads) t.join();
    for (const auto& rank : got) {
      expect_close(rank, want, 0, 2e-4);
      EXPECT_EQ(rank, got[0]) << "ranks differ in their bits";
    }
  }
}

TEST_P(DecoderSpecs, test_a_token_s_logits_are_the_same_alone_and_among_others) {
  const unsigned seed = test::test_seed();
  const TestModel model = random_model(GetParam().spec, seed);
  const auto ids = random_ids(12, model.spec.embed.vocab, seed);
  auto comm = make_null_communicator();
  FloatRows all = Runner(model, *comm).append(ids);
  all.erase(all.begin(), all.end() - 3);
  EXPECT_EQ(Runner(model, *comm).append(ids, 3), all);
  EXPECT_EQ(Runner(model, *comm).append(ids, 3, true), all);
}

TEST_P(DecoderSpecs, test_bf16_stays_near_the_oracle) {
  const unsigned seed = test::test_seed();
  const TestModel model = random_model(GetParam().spec, seed);
  const auto ids = random_ids(20, model.spec.embed.vocab, seed);
  auto comm = make_null_communicator();
  if (model.spec.kinds[0].pre_attn.kind == NormKind::None) {
    EXPECT_THROW(Runner(model, *comm, DType::BF16), InvalidArgument);
    return;
  }
  const auto want = testing::reference_logits(model, ids);
  const auto got = Runner(model, *comm, DType::BF16).append(ids);
  double error = 0, size = 0;
  for (std::size_t t = 0; t < got.size(); ++t) {
    for (std::size_t v = 0; v < got[t].size(); ++v) {
      error += std::pow(static_cast<double>(got[t][v]) - want[t][v], 2);
      size += std::pow(want[t][v], 2);
    }
  }
  EXPECT_LT(std::sqrt(error / size), 0.05);
}

INSTANTIATE_TEST_SUITE_P(Families, DecoderSpecs, ::testing::ValuesIn(testing::test_specs()),
                         [](const auto& info) { return info.param.name; });

TEST(Decoder, test_learned_positions_bound_the_length) {
  ModelSpec spec = testing::llama_spec();
  spec.embed.learned_positions = 60;
  spec.max_len = 60;
  const TestModel model = random_model(spec, 1);
  auto comm = make_null_communicator();
  EXPECT_THROW(Runner(model, *comm), InvalidArgument);
}

}  // namespace
}  // namespace fastllm

// Whole small decoders on the GPU against the CPU backend: prompts, chunks, decode steps with and without recordings,
// tokens that never leave the device, and pools that are NaN wherever no sequence wrote.
#include "two_backends.h"

// two_backends.h comes first: below, `testing` is the namespace of the fixture too.
#include <algorithm>

#include "fastllm/error.h"
#include "model/decoder.h"
#include "model/weight_loader.h"
#include "runtime/model_fixture.h"

namespace fastllm::test {
namespace {

using fastllm::testing::NamedSpec;
using fastllm::testing::TestModel;

constexpr int kSlots = 6, kBlock = 16, kTableWidth = 8, kBlocks = kSlots * kTableWidth + 1;
constexpr int kMaxTokens = 96;

// `n` tokens of the sequence in a slot; from_slot: the one sampled last, on the device.
struct Piece {
  int slot = 0, n = 0;
  bool from_slot = false;
};

// A decoder on one backend, with six sequences in disjoint blocks.
class Machine {
 public:
  Machine(const TestModel& model, DType dtype, std::unique_ptr<Backend> b)
      : backend(std::move(b)), comm_(make_null_communicator()), vocab_(model.spec.embed.vocab), computed_(kSlots, 0) {
    const ModelSource source = model.source();
    const WeightLoader loader(source, 0, 1);
    DecoderConfig c;
    c.dtype = c.kv_dtype = dtype;
    c.max_len = 128, c.max_step_tokens = kMaxTokens, c.max_logit_rows = 64, c.block_size = kBlock;
    decoder_ =
        std::make_unique<Decoder>(model.spec, c, *backend, *comm_, load_decoder_weights(loader, *backend, dtype, {}));
    StepLimits limits;
    limits.max_tokens = kMaxTokens, limits.max_slots = kSlots, limits.max_logit_rows = 64;
    limits.table_width = kTableWidth, limits.block_size = kBlock, limits.vocab = vocab_, limits.in_flight = 2;
    for (const LayerSpec& l : model.spec.kinds) limits.window = std::max(limits.window, l.attn.window);
    backend->init_steps(limits);
    const std::vector<std::byte> poison(pool_bytes(), std::byte{0xff});
    pool_ = backend->allocate(poison.size(), MemoryKind::Lazy);
    backend->copy(pool_->data(), poison.data(), poison.size());
    for (int slot = 0; slot < kSlots; ++slot)
      for (int i = 0; i < kTableWidth; ++i) tables_.push_back({SlotId{slot}, i, block(slot, i)});
  }

  // Enqueues a step; the pieces of one token come first. Logits of each piece's last token. `tokens` by slot.
  Step& launch(const std::vector<Piece>& pieces, const std::vector<std::vector<TokenId>>& tokens, bool recorded,
               bool greedy) {
    std::vector<TokenId> ids;
    std::vector<StepRow> rows;
    std::vector<std::int32_t> last;
    std::vector<SampleRow> sampling;
    StepInput input;
    for (const Piece& p : pieces) {
      int& computed = computed_[static_cast<std::size_t>(p.slot)];
      rows.push_back({static_cast<std::int32_t>(ids.size()), p.n, computed, SlotId{p.slot}, p.from_slot});
      const auto& sequence = tokens[static_cast<std::size_t>(p.slot)];
      for (int k = 0; k < p.n; ++k)
        ids.push_back(p.from_slot ? -1 : sequence.at(static_cast<std::size_t>(computed + k)));
      computed += p.n;
      last.push_back(static_cast<std::int32_t>(ids.size()) - 1);
      const bool leads = input.num_decode_rows + 1 == static_cast<int>(rows.size());
      input.num_decode_rows += p.n == 1 && leads;
      SampleRow row;
      row.slot = SlotId{p.slot};
      row.temperature = 0;
      row.position = computed;
      if (greedy) sampling.push_back(row);
    }
    const auto sizes = backend->graph_sizes();
    const auto size = std::lower_bound(sizes.begin(), sizes.end(), static_cast<int>(rows.size()));
    if (recorded && size != sizes.end()) input.padded_rows = *size;
    input.table_sets = tables_;
    input.tokens = ids, input.rows = rows, input.logit_tokens = last, input.sampling = sampling;
    Step& step = backend->begin_step(input);
    tables_.clear();
    const int num_tokens = std::max(static_cast<int>(ids.size()), input.padded_rows);
    const int num_logits = std::max(static_cast<int>(rows.size()), input.padded_rows);
    const auto body = [&] {
      decoder_->forward(step, num_tokens, pool_->data(), num_logits);
      decoder_->logits(step, num_logits);
    };
    if (recorded) {
      backend->replay(step, body);
    } else {
      body();
    }
    logits_ = decoder_->logits_view(static_cast<int>(rows.size()));
    if (greedy) backend->sample(logits_, step);
    backend->end_step(step);
    return step;
  }
  StepOutput wait(Step& step) {
    StepOutput out;
    backend->wait_step(step, out);
    return out;
  }
  Array run(const std::vector<Piece>& pieces, const std::vector<std::vector<TokenId>>& tokens, bool recorded = false) {
    wait(launch(pieces, tokens, recorded, false));
    return last_logits();
  }
  Array last_logits() {
    Array host(DType::F32, logits_.rows(), logits_.cols());
    for (std::int64_t r = 0; r < logits_.rows(); ++r)
      backend->copy(host.tensor().at(r), logits_.at(r), static_cast<std::size_t>(logits_.cols()) * sizeof(float));
    return host;
  }
  // Blocks that a sequence of this length does not reach are as they were. Block 0 is padding's.
  void expect_untouched(const std::vector<int>& slots) {
    std::vector<std::byte> bytes(pool_bytes());
    backend->copy(bytes.data(), pool_->data(), bytes.size());
    backend->synchronize();
    const std::size_t size = bytes.size() / kBlocks;
    std::vector<bool> used(kBlocks, false);
    used[0] = true;
    for (const int slot : slots)
      for (int i = 0; i * kBlock < computed_[static_cast<std::size_t>(slot)]; ++i) used[index(block(slot, i))] = true;
    for (std::size_t b = 0; b < used.size(); ++b) {
      const auto* begin = bytes.data() + b * size;
      EXPECT_TRUE(used[b] || std::all_of(begin, begin + size, [](std::byte x) { return x == std::byte{0xff}; }))
          << "block " << b << " belongs to nobody, but was written";
    }
  }

  std::unique_ptr<Backend> backend;

 private:
  static BlockId block(int slot, int i) { return BlockId{1 + (slot * kTableWidth + i) * 5 % (kBlocks - 1)}; }
  std::size_t pool_bytes() const { return static_cast<std::size_t>(decoder_->kv_shape().block_bytes()) * kBlocks; }

  std::unique_ptr<Communicator> comm_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Buffer> pool_;
  std::vector<TableSet> tables_;  // not told yet
  Tensor logits_;
  int vocab_;
  std::vector<int> computed_;  // tokens, by slot
};

std::vector<std::vector<TokenId>> random_sequences(int vocab, Random& random) {
  std::vector<std::vector<TokenId>> all(kSlots);
  for (auto& sequence : all)
    for (int i = 0; i < 120; ++i) sequence.push_back(random.below(vocab));
  return all;
}

// Scores keep their size.
void set_head_dim(LayerSpec& l, int head_dim) {
  l.attn.scale *= std::sqrt(static_cast<float>(l.attn.head_dim) / static_cast<float>(head_dim));
  l.attn.head_dim = head_dim;
  if (l.attn.rope.dim > 0) l.attn.rope.dim = head_dim;
}

// Every layer structure with small heads, and some with heads that tensor cores compute.
std::vector<NamedSpec> specs() {
  std::vector<NamedSpec> all = fastllm::testing::test_specs();
  const std::size_t small = all.size();
  for (const int head_dim : {64, 128, 256}) {
    for (std::size_t i = 0; i < small; ++i) {
      if (!all[i].name.starts_with("llama") && !all[i].name.starts_with("gemma2") && !all[i].name.starts_with("falcon"))
        continue;
      NamedSpec larger{all[i].name + "_heads_of_" + std::to_string(head_dim), all[i].spec};
      for (LayerSpec& l : larger.spec.kinds) set_head_dim(l, head_dim);
      all.push_back(std::move(larger));
    }
  }
  return all;
}

std::unique_ptr<Backend> gpu_backend(bool graphs = true, bool deterministic = false) {
  return cuda::make_backend({.device = 0, .graphs = graphs, .deterministic = deterministic});
}

class DecoderOnGpu : public CudaTest, public ::testing::WithParamInterface<NamedSpec> {
 protected:
  // Prompts together, in chunks and beside decode rows, then decode steps of changing size.
  static std::vector<std::pair<std::vector<Piece>, bool>> script() {
    std::vector<std::pair<std::vector<Piece>, bool>> steps = {
        {{{0, 37}, {1, 5}, {2, 50}}, false},
        {{{1, 1}, {0, 1}, {3, 30}}, false},
        {{{0, 1}, {3, 17}, {4, 3}}, false},
        {{{2, 1}}, false},
    };
    for (int i = 0; i < 3; ++i) {
      steps.push_back({{{0, 1}, {1, 1}, {2, 1}, {3, 1}, {4, 1}}, true});  // padded to 6
      steps.push_back({{{4, 1}, {1, 1}, {3, 1}}, true});                  // padded to 4
      steps.push_back({{{2, 1}}, true});
    }
    return steps;
  }
  void compare_float32(bool graphs) {
    const TestModel model = fastllm::testing::random_model(GetParam().spec, test_seed());
    const auto tokens = random_sequences(model.spec.embed.vocab, random);
    Machine host(model, DType::F32, make_cpu_backend(2)), gpu(model, DType::F32, gpu_backend(graphs));
    EXPECT_EQ(gpu.backend->graph_sizes().empty(), !graphs);
    int i = 0;
    for (const auto& [pieces, recorded] : script()) {
      const std::string what = GetParam().name + ", step " + std::to_string(i++) + (recorded ? ", recorded," : ",");
      expect_agreement(what, gpu.run(pieces, tokens, recorded), host.run(pieces, tokens), 2e-4);
      if (HasFailure()) return;
    }
    gpu.expect_untouched({0, 1, 2, 3, 4});
  }
  bool needs_float32() const {
    const auto& kinds = GetParam().spec.kinds;
    return std::any_of(kinds.begin(), kinds.end(), [](const auto& l) { return l.pre_attn.kind == NormKind::None; });
  }
};

TEST_P(DecoderOnGpu, test_float32_logits_are_the_cpu_backends) {
  compare_float32(true);
  compare_float32(false);
}

TEST_P(DecoderOnGpu, test_bfloat16_logits_are_as_near_to_float32_as_the_cpu_backends) {
  if (needs_float32()) GTEST_SKIP() << "this model computes in float32 only";
  const TestModel model = fastllm::testing::random_model(GetParam().spec, test_seed());
  const auto tokens = random_sequences(model.spec.embed.vocab, random);
  Machine exact(model, DType::F32, make_cpu_backend(2)), host(model, DType::BF16, make_cpu_backend(2)),
      gpu(model, DType::BF16, gpu_backend());
  Deviation of_cpu, of_gpu;
  for (const auto& [pieces, recorded] : script()) {
    const Array want = exact.run(pieces, tokens);
    of_cpu.add(host.run(pieces, tokens), want);
    of_gpu.add(gpu.run(pieces, tokens, recorded), want);
  }
  expect_as_near(GetParam().name, of_gpu, of_cpu);
  gpu.expect_untouched({0, 1, 2, 3, 4});
}

TEST_P(DecoderOnGpu, test_sampled_tokens_feed_the_next_step_on_the_device) {
  const TestModel model = fastllm::testing::random_model(GetParam().spec, test_seed());
  auto tokens = random_sequences(model.spec.embed.vocab, random);
  const std::vector<Piece> prompts = {{0, 20}, {1, 7}, {2, 33}};
  constexpr int kSteps = 8;

  // One step at a time, every token through the host.
  Machine host(model, DType::F32, make_cpu_backend(2));
  auto grown = tokens;
  for (const Piece& p : prompts) grown[static_cast<std::size_t>(p.slot)].resize(static_cast<std::size_t>(p.n));
  std::vector<std::vector<TokenId>> want;
  for (int i = 0; i < kSteps; ++i) {
    const auto pieces = i == 0 ? prompts : std::vector<Piece>{{0, 1}, {1, 1}, {2, 1}};
    want.push_back(host.wait(host.launch(pieces, grown, false, true)).tokens);
    for (std::size_t s = 0; s < 3; ++s) grown[s].push_back(want.back()[s]);
  }
  for (const bool recorded : {false, true}) {
    SCOPED_TRACE(recorded ? "recorded" : "not recorded");
    Machine gpu(model, DType::F32, gpu_backend());
    std::vector<Step*> steps;
    std::vector<std::vector<TokenId>> got;
    for (int i = 0; i < kSteps; ++i) {  // two in flight
      const auto pieces = i == 0 ? prompts : std::vector<Piece>{{0, 1, true}, {1, 1, true}, {2, 1, true}};
      if (i >= 2) got.push_back(gpu.wait(*steps[static_cast<std::size_t>(i) - 2]).tokens);
      steps.push_back(&gpu.launch(pieces, tokens, recorded && i > 0, true));
    }
    for (std::size_t i = kSteps - 2; i < kSteps; ++i) got.push_back(gpu.wait(*steps[i]).tokens);
    EXPECT_EQ(got, want) << GetParam().name << " seed " << test_seed();
  }
}

std::string spec_name(const ::testing::TestParamInfo<NamedSpec>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Specs, DecoderOnGpu, ::testing::ValuesIn(specs()), spec_name);

// Heads of 16 and of the sizes that tensor cores compute.
class DeterministicDecoder : public CudaTest, public ::testing::WithParamInterface<int> {
 protected:
  TestModel random_llama() const {
    ModelSpec spec = fastllm::testing::llama_spec();
    for (LayerSpec& l : spec.kinds) set_head_dim(l, GetParam());
    return fastllm::testing::random_model(spec, test_seed());
  }
};
INSTANTIATE_TEST_SUITE_P(HeadDims, DeterministicDecoder, ::testing::Values(16, 64, 128));

TEST_P(DeterministicDecoder, test_logits_do_not_depend_on_the_batch_or_the_chunks) {
  const TestModel model = random_llama();
  const auto tokens = random_sequences(model.spec.embed.vocab, random);
  for (const DType dtype : {DType::F32, DType::BF16}) {
    Machine alone(model, dtype, gpu_backend(true, true)), crowded(model, dtype, gpu_backend(true, true));
    EXPECT_TRUE(alone.backend->graph_sizes().empty());
    const Array whole = alone.run({{0, 50}}, tokens);
    crowded.run({{1, 11}, {0, 17}}, tokens);
    crowded.run({{1, 1}, {0, 32}, {2, 29}}, tokens);
    const Array last = crowded.run({{1, 1}, {0, 1}, {2, 1}, {4, 60}}, tokens);
    EXPECT_TRUE(last.same_row(1, whole, 0)) << name_of(dtype) << " after the prompt; seed " << test_seed();
    const Array one = alone.run({{0, 1}}, tokens), many = crowded.run({{3, 70}, {0, 1}}, tokens);
    EXPECT_TRUE(many.same_row(1, one, 0)) << name_of(dtype) << " after a decode step; seed " << test_seed();
  }
}

// The same run twice, beside NaN and beside other sequences' blocks: what a sequence does not own does not matter.
TEST_P(DeterministicDecoder, test_other_sequences_blocks_do_not_matter) {
  const TestModel model = random_llama();
  const auto tokens = random_sequences(model.spec.embed.vocab, random);
  for (const DType dtype : {DType::F32, DType::BF16}) {
    Machine clean(model, dtype, gpu_backend(false)), crowded(model, dtype, gpu_backend(false));
    crowded.run({{2, 40}, {3, 50}}, tokens);
    for (int i = 0; i < 2; ++i) {
      const std::vector<Piece> pieces =
          i == 0 ? std::vector<Piece>{{0, 37}, {1, 21}} : std::vector<Piece>{{0, 1}, {1, 1}};
      const Array want = clean.run(pieces, tokens), got = crowded.run(pieces, tokens);
      for (std::int64_t r = 0; r < 2; ++r)
        EXPECT_TRUE(got.same_row(r, want, r))
            << name_of(dtype) << " step " << i << " row " << r << " seed " << test_seed();
    }
    clean.expect_untouched({0, 1});
  }
}

}  // namespace
}  // namespace fastllm::test

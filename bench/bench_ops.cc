// Every op of the CPU backend at the shapes of two models, against the ceilings of this machine.
//
//   fastllm_bench_ops --benchmark_filter=Linear --benchmark_repetitions=9 --benchmark_report_aggregates_only
//
// GB/s counts each operand once; "of_read" and "of_peak" are fractions of the measured ceilings. Weights rotate through
// more memory than the caches hold, as they do in a model.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/thread_pool.h"
#include "bench_ceilings.h"

namespace fastllm::bench {
namespace {

struct Model {
  const char* name;
  int hidden, inner, heads, kv_heads, head_dim, vocab;
};
constexpr Model kModels[] = {{"135M", 576, 1536, 9, 3, 64, 49152}, {"1.1B", 2048, 5632, 32, 4, 64, 32000}};

Backend& backend() {
  static const auto made = make_cpu_backend(threads());
  return *made;
}

struct Operand {
  std::unique_ptr<Buffer> memory;
  Tensor tensor;
};

Operand make(DType dtype, std::int64_t rows, std::int64_t cols) {
  Operand o;
  o.memory = backend().allocate(static_cast<std::size_t>(rows * cols) * size_of(dtype), MemoryKind::Device);
  o.tensor = Tensor(o.memory->data(), dtype, {rows, cols});
  std::minstd_rand random(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    const float v = uniform(random);
    if (dtype == DType::BF16) {
      o.tensor.ptr<bf16>()[i] = to_bf16(v);
    } else {
      o.tensor.ptr<float>()[i] = v;
    }
  }
  return o;
}

std::unique_ptr<PackedWeight> make_weight(std::int64_t n, std::int64_t k, DType dtype) {
  return backend().pack({n,
                         k,
                         [k](std::int64_t begin, std::int64_t end, float* out) {
                           for (std::int64_t i = 0; i < (end - begin) * k; ++i)
                             out[i] = static_cast<float>((begin * 31 + i) % 17 - 8) * 0.01f;
                         },
                         {}},
                        dtype);
}

// A step of `rows` rows in slots of their own, with consecutive blocks of 16 positions. sampling: one for each row.
Step& make_step(int rows, int tokens, int past, const Model& model, std::span<const TokenId> ids = {},
                std::vector<SampleRow> sampling = {}) {
  constexpr int kBlock = 16;
  const int blocks = (past + tokens + kBlock - 1) / kBlock;
  StepLimits limits;
  limits.max_tokens = rows * tokens, limits.max_slots = limits.max_logit_rows = rows, limits.table_width = blocks;
  limits.block_size = kBlock, limits.vocab = model.vocab;
  backend().init_steps(limits);
  std::vector<TableSet> tables;
  std::vector<StepRow> list;
  std::vector<std::int32_t> last;
  std::vector<TokenId> zeros(static_cast<std::size_t>(rows) * static_cast<std::size_t>(tokens), 0);
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < blocks; ++b) tables.push_back({SlotId{r}, b, BlockId{r * blocks + b}});
    list.push_back({r * tokens, tokens, past, SlotId{r}, false});
    last.push_back((r + 1) * tokens - 1);
    if (!sampling.empty()) sampling[static_cast<std::size_t>(r)].slot = SlotId{r};
  }
  StepInput input;
  input.table_sets = tables;
  input.tokens = ids.empty() ? zeros : ids;
  input.rows = list;
  input.num_decode_rows = tokens == 1 ? rows : 0;
  input.logit_tokens = last;
  input.sampling = sampling;
  return backend().begin_step(input);
}

void report(benchmark::State& state, double bytes, double flops, DType dtype = DType::F32) {
  const Ceilings& c = ceilings();
  const double n = static_cast<double>(state.iterations());
  using benchmark::Counter;
  state.counters["GB/s"] = Counter(bytes * n * 1e-9, Counter::kIsRate);
  state.counters["of_read"] = Counter(bytes * n / c.read_all, Counter::kIsRate);
  if (flops > 0) {
    state.counters["GFLOP/s"] = Counter(flops * n * 1e-9, Counter::kIsRate);
    state.counters["of_peak"] =
        Counter(flops * n / (dtype == DType::BF16 && c.bf16 > 0 ? c.bf16 : c.fp32), Counter::kIsRate);
  }
}

void linear(benchmark::State& state, int m, int n, int k, DType dtype) {
  const auto first = make_weight(n, k, dtype);
  // 400 MB of copies: each comes from memory.
  const std::size_t copies = std::max<std::size_t>(1, (std::size_t{400} << 20) / first->bytes());
  std::vector<std::unique_ptr<PackedWeight>> weights;
  for (std::size_t i = 0; i < copies; ++i) weights.push_back(make_weight(n, k, dtype));
  const Operand x = make(dtype, m, k), out = make(dtype, m, n);
  std::size_t at = 0;
  for (auto _ : state) {
    backend().linear(out.tensor, x.tensor, *weights[at], nullptr, false);
    at = (at + 1) % weights.size();
  }
  const double size = static_cast<double>(size_of(dtype));
  report(state, (1.0 * n * k + 1.0 * m * (n + k)) * size, 2.0 * m * n * k, dtype);
}

// Keys and values: uniform in bf16, zeros in other types.
Operand make_pool(const KvShape& shape, std::int64_t blocks) {
  if (shape.dtype == DType::BF16) return make(DType::BF16, blocks, shape.block_stride());
  Operand pool;
  pool.memory = backend().allocate(static_cast<std::size_t>(blocks * shape.block_bytes()), MemoryKind::Device);
  std::memset(pool.memory->data(), 0, pool.memory->bytes());
  return pool;
}

void attention(benchmark::State& state, const Model& model, int rows, int tokens, int past, DType kv_dtype) {
  constexpr int kBlock = 16, kLayers = 4;
  const int blocks = (past + tokens + kBlock - 1) / kBlock;
  const KvShape shape{kv_dtype, kLayers, model.kv_heads, kBlock, model.head_dim};
  const Operand pool = make_pool(shape, static_cast<std::int64_t>(rows) * blocks);
  const int width = (model.heads + 2 * model.kv_heads) * model.head_dim;
  const Operand qkv = make(DType::BF16, static_cast<std::int64_t>(rows) * tokens, width);
  const Operand out = make(DType::BF16, static_cast<std::int64_t>(rows) * tokens, model.heads * model.head_dim);
  const Step& step = make_step(rows, tokens, past, model);
  const AttnArgs args{.heads = model.heads,
                      .kv_heads = model.kv_heads,
                      .head_dim = model.head_dim,
                      .scale = 0.125f,
                      .softcap = 0,
                      .window = 0,
                      .alibi_slopes = {}};
  int layer = 0;
  for (auto _ : state) {
    backend().attention(out.tensor, qkv.tensor, step, layer_view(pool.memory->data(), shape, layer), args);
    layer = (layer + 1) % kLayers;
  }
  const double pairs = 1.0 * rows * tokens * (past + (tokens + 1) / 2.0);
  const double bytes = 1.0 * rows * (past + tokens) / kBlock * static_cast<double>(shape.layer_stride()) *
                       static_cast<double>(size_of(kv_dtype));
  report(state, bytes, 4.0 * pairs * model.heads * model.head_dim);
}

void rope_kv(benchmark::State& state, const Model& model, int tokens) {
  constexpr int kBlock = 16;
  const KvShape shape{DType::BF16, 1, model.kv_heads, kBlock, model.head_dim};
  const int blocks = (tokens + kBlock - 1) / kBlock;
  const Operand pool = make(DType::BF16, blocks, shape.block_stride());
  const int width = (model.heads + 2 * model.kv_heads) * model.head_dim;
  const Operand qkv = make(DType::BF16, tokens, width), cos_sin = make(DType::F32, tokens, model.head_dim);
  // Rotations in place must not shrink the values to denormals.
  for (std::int64_t i = 0; i < cos_sin.tensor.numel(); ++i) {
    cos_sin.tensor.ptr<float>()[i] = i % model.head_dim < model.head_dim / 2 ? 0.6f : 0.8f;
  }
  const Step& step = make_step(1, tokens, 0, model);
  const KvView kv = layer_view(pool.memory->data(), shape, 0);
  for (auto _ : state) {
    backend().qk_norm_rope_write_kv(qkv.tensor, step, model.heads, {}, nullptr, {}, nullptr,
                                    {cos_sin.tensor.ptr<float>(), model.head_dim, RopeStyle::Half}, kv);
  }
  report(state, 2.0 * tokens * width * 2 + 4.0 * tokens * model.kv_heads * model.head_dim, 0);
}

void add_norm(benchmark::State& state, const Model& model, int m) {
  const Operand x = make(DType::F32, m, model.hidden), delta = make(DType::F32, m, model.hidden);
  const Operand out = make(DType::BF16, m, model.hidden), weight = make(DType::F32, 1, model.hidden);
  const NormSpec spec{NormKind::Rms, 1e-5f, false};
  for (auto _ : state) {
    backend().add_norm(out.tensor, x.tensor, delta.tensor, spec, weight.tensor.ptr<float>(), nullptr);
  }
  report(state, 14.0 * m * model.hidden, 0);
}

void gated_act(benchmark::State& state, const Model& model, int m) {
  const Operand gate_up = make(DType::BF16, m, 2 * model.inner), out = make(DType::BF16, m, model.inner);
  for (auto _ : state) backend().gated_act(out.tensor, gate_up.tensor, Activation::Silu);
  report(state, 6.0 * m * model.inner, 0);
}

void sample(benchmark::State& state, const Model& model, int rows, float temperature, float top_p, int top_k) {
  const Operand logits = make(DType::F32, rows, model.vocab);
  std::minstd_rand random(2);
  std::normal_distribution<float> like_a_model(0.0f, 2.5f);
  for (std::int64_t i = 0; i < logits.tensor.numel(); ++i) logits.tensor.ptr<float>()[i] = like_a_model(random);
  std::vector<SampleRow> list(static_cast<std::size_t>(rows));
  for (SampleRow& row : list) {
    row.temperature = temperature;
    row.top_p = top_p;
    row.top_k = top_k;
  }
  // Steps of other positions draw other numbers.
  for (auto _ : state) {
    state.PauseTiming();
    for (SampleRow& row : list) ++row.position;
    Step& step = make_step(rows, 1, 0, model, {}, list);
    state.ResumeTiming();
    backend().sample(logits.tensor, step);
  }
  report(state, 4.0 * rows * model.vocab, 0);
}

void logprobs(benchmark::State& state, const Model& model, int rows) {
  const Operand logits = make(DType::F32, rows, model.vocab);
  std::vector<LogprobRequest> list;
  for (int r = 0; r < rows; ++r) list.push_back({r, r, 5, -1});
  Step& step = make_step(rows, 1, 0, model);
  StepOutput out;
  for (auto _ : state) {
    backend().topk_logprobs(logits.tensor, step, list);
    backend().wait_step(step, out);
    out.logprobs.clear();
  }
  report(state, 4.0 * rows * model.vocab, 0);
}

void embed(benchmark::State& state, const Model& model, int m) {
  const auto table = make_weight(model.vocab, model.hidden, DType::BF16);
  const Operand out = make(DType::F32, m, model.hidden);
  std::vector<TokenId> ids;
  for (int i = 0; i < m; ++i) ids.push_back(i * 7919 % model.vocab);
  const Step& step = make_step(1, m, 0, model, ids);
  for (auto _ : state) backend().embed(out.tensor, step, *table, 0, 1.0f);
  report(state, 6.0 * m * model.hidden, 0);
}

void barrier(benchmark::State& state) {
  ThreadPool pool(threads());
  for (auto _ : state) pool.run([](int) {});
}

template <class... Args>
void add(const std::string& name, Args... args) {
  benchmark::RegisterBenchmark(name.c_str(), args...)->UseRealTime()->Unit(benchmark::kMicrosecond);
}

}  // namespace

void register_ops() {
  add("Barrier", barrier);
  for (const Model& model : kModels) {
    const std::string tail = std::string("/") + model.name;
    const int qkv = (model.heads + 2 * model.kv_heads) * model.head_dim, attn = model.heads * model.head_dim;
    const struct {
      const char* name;
      int n, k;
    } weights[] = {{"qkv", qkv, model.hidden},
                   {"out", model.hidden, attn},
                   {"gate_up", 2 * model.inner, model.hidden},
                   {"down", model.hidden, model.inner},
                   {"head", model.vocab, model.hidden}};
    for (const int m : {1, 4, 16, 512}) {
      const std::string rows = "/M:" + std::to_string(m);
      for (const auto& w : weights) {
        if (m == 512 && w.n == model.vocab) continue;
        add(std::string("Linear/bf16/") + w.name + tail + rows, linear, m, w.n, w.k, DType::BF16);
      }
      add("Linear/fp32/gate_up" + tail + rows, linear, m, 2 * model.inner, model.hidden, DType::F32);
      add("AddNorm" + tail + rows, add_norm, model, m);
      add("GatedAct" + tail + rows, gated_act, model, m);
      add("RopeKv" + tail + rows, rope_kv, model, m);
      add("Embed" + tail + rows, embed, model, m);
    }
    add("Attention/prefill" + tail + "/512", attention, model, 1, 512, 0, DType::BF16);
    add("Attention/prefill" + tail + "/2048", attention, model, 1, 2048, 0, DType::BF16);
    for (const int past : {200, 2000, 16000}) {
      for (const int rows : {1, 4, 16}) {
        if (past * rows > 32000) continue;  // would take gigabytes
        const std::string shape = tail + "/rows:" + std::to_string(rows) + "/past:" + std::to_string(past);
        add("Attention/decode" + shape, attention, model, rows, 1, past, DType::BF16);
        add("Attention/decode/int8" + shape, attention, model, rows, 1, past, DType::I8);
      }
    }
    for (const int rows : {1, 16}) {
      const std::string count = "/rows:" + std::to_string(rows);
      add("Sample/greedy" + tail + count, sample, model, rows, 0.0f, 1.0f, 0);
      add("Sample/temperature" + tail + count, sample, model, rows, 1.0f, 1.0f, 0);
      add("Sample/top_p" + tail + count, sample, model, rows, 0.8f, 0.95f, 50);
      add("Logprobs" + tail + count, logprobs, model, rows);
    }
  }
}

}  // namespace fastllm::bench

int main(int argc, char** argv) {
  fastllm::bench::register_ops();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

// From logits to tokens. The floor is one read of the logits; a few rows find them in L2, where lm_head left them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "gpu_timing.h"
#include "sampling/sampling.h"
#include "upload.h"

namespace fastllm::bench {
namespace {

enum Kind { kGreedy, kTemperature, kTopP, kTopKTopP, kMinP, kKinds };
// Peaked: like a language model's, the best 500 tokens falling off from 20, the others around 0 with deviation 2.5.
// Flat: deviation 1, so that nine tenths of the mass are tens of thousands of tokens.
enum Shape { kPeaked, kFlat };

constexpr int kDistinctRows = 8;  // the others repeat them

std::vector<float> distinct_rows(int vocab, Shape shape) {
  std::mt19937 engine(7);
  std::normal_distribution<float> normal(0.0f, shape == kFlat ? 1.0f : 2.5f);
  std::vector<float> x(static_cast<std::size_t>(kDistinctRows) * static_cast<std::size_t>(vocab));
  for (float& v : x) v = normal(engine);
  if (shape == kFlat) return x;
  for (std::size_t r = 0; r < kDistinctRows; ++r) {
    for (int rank = 0; rank < 500; ++rank) {
      const auto id = std::uniform_int_distribution<std::size_t>(0, static_cast<std::size_t>(vocab) - 1)(engine);
      x[r * static_cast<std::size_t>(vocab) + id] = 20.0f - 1.8f * std::log(1.0f + static_cast<float>(rank));
    }
  }
  return x;
}

// [rows, vocab] of one shape, several times over where they come from device memory.
class BenchLogits {
 public:
  BenchLogits(int rows, int vocab, Shape shape)
      : rows_(rows), vocab_(vocab), memory_(bytes(rows), bytes(rows) > kFitsL2 ? Rotation::kBeyondL2 : 0) {
    const auto host = distinct_rows(vocab, shape);
    for (int piece = 0; piece < memory_.pieces(); ++piece) {
      for (int r = 0; r < rows; r += kDistinctRows) {
        float* to = memory_.as<float>(piece) + static_cast<std::int64_t>(r) * vocab;
        cuda::check(cudaMemcpy(to, host.data(), bytes(std::min(kDistinctRows, rows - r)), cudaMemcpyHostToDevice),
                    "cudaMemcpy");
      }
    }
  }

  cuda::Logits at(int turn) const { return {memory_.as<float>(turn), vocab_, rows_, vocab_}; }
  Work one_read() const { return {.read = static_cast<double>(bytes(rows_))}; }
  int calls() const { return rows_ > 16 ? 12 : 60; }

 private:
  static constexpr std::size_t kFitsL2 = std::size_t{16} << 20;
  std::size_t bytes(int rows) const { return static_cast<std::size_t>(rows) * static_cast<std::size_t>(vocab_) * 4; }

  int rows_, vocab_;
  Rotation memory_;
};

class Pinned {
 public:
  explicit Pinned(std::size_t bytes) { cuda::check(cudaMallocHost(&data_, bytes), "cudaMallocHost"); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned() { cudaFreeHost(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

std::vector<cuda::DeviceSampleRow> rows_of_kind(int n, Kind kind) {
  std::vector<cuda::DeviceSampleRow> rows(static_cast<std::size_t>(n));
  for (int r = 0; r < n; ++r) {
    auto& row = rows[static_cast<std::size_t>(r)];
    row = {};
    row.seed = 1234567 + static_cast<std::uint64_t>(r);
    row.position = 100 + r;
    row.temperature = kind == kGreedy ? 0.0f : 0.8f;
    row.top_p = kind == kTopP || kind == kTopKTopP ? 0.9f : 1.0f;
    row.top_k = kind == kTopKTopP ? 50 : 0;
    row.min_p = kind == kMinP ? 0.05f : 0.0f;
    row.repetition_penalty = 1.1f;
    row.presence_penalty = row.frequency_penalty = 0.1f;
    row.penalised = 1;
    row.slot = r;
  }
  return rows;
}

void BM_Sample(benchmark::State& state) {
  const auto n = static_cast<int>(state.range(0)), vocab = static_cast<int>(state.range(1));
  const auto kind = static_cast<Kind>(state.range(2));
  const auto count = static_cast<std::size_t>(n);
  const BenchLogits logits(n, vocab, static_cast<Shape>(state.range(3)));
  auto host_rows = rows_of_kind(n, kind);
  for (auto& row : host_rows) row.penalised = 0;
  const Upload rows(host_rows);
  const Rotation sampled(count * 4, 0), last(count * 4, 0);
  const Rotation workspace(cuda::sample_workspace_bytes(n, vocab), 0);
  const Pinned host_sampled(count * 4);
  cuda::SampleCall call;
  call.rows = rows.get();
  call.all_greedy = kind == kGreedy;
  call.any_filter = kind >= kTopP;
  call.sampled = sampled.as<TokenId>(0);
  call.host_sampled = host_sampled.as<TokenId>();
  call.last_token = last.as<TokenId>(0);
  call.workspace = workspace.at(0);
  measure(state, logits.one_read(), logits.calls(),
          [&](int i, cudaStream_t stream) { cuda::sample(logits.at(i), call, stream); });
}
BENCHMARK(BM_Sample)
    ->Name("Sample")
    ->ArgNames({"rows", "vocab", "kind", "flat"})
    ->ArgsProduct({{1, 256, 1024}, {128256}, {kGreedy, kTemperature, kTopP, kTopKTopP, kMinP}, {kPeaked}})
    ->ArgsProduct({{16, 64, 256}, {49152}, {kGreedy, kTemperature, kTopP, kTopKTopP}, {kPeaked}})
    ->ArgsProduct({{1, 256}, {128256}, {kTemperature, kTopP, kTopKTopP}, {kFlat}})
    ->Apply(gpu_benchmark);

void BM_Penalties(benchmark::State& state) {
  const auto n = static_cast<int>(state.range(0)), vocab = static_cast<int>(state.range(1));
  const auto count = static_cast<std::size_t>(n), entries = count * static_cast<std::size_t>(vocab);
  constexpr int kSeen = 2000;  // tokens of each sequence
  const BenchLogits logits(n, vocab, kPeaked);
  const Upload rows(rows_of_kind(n, kGreedy));
  const Rotation counts(entries * 4, entries * 4 > (std::size_t{16} << 20) ? Rotation::kBeyondL2 : 0);
  std::vector<std::int32_t> seen(static_cast<std::size_t>(vocab), 0);
  for (int i = 0; i < kSeen; ++i) seen[static_cast<std::size_t>(i) * 7919 % static_cast<std::size_t>(vocab)] = 1;
  for (int piece = 0; piece < counts.pieces(); ++piece) {
    for (int r = 0; r < n; ++r) {
      std::int32_t* to = counts.as<std::int32_t>(piece) + static_cast<std::int64_t>(r) * vocab;
      cuda::check(cudaMemcpy(to, seen.data(), seen.size() * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
  }
  cuda::LogitsProcessing call;
  call.rows = rows.get();
  call.any_penalised = true;
  const Work work{.read = static_cast<double>(n) * (4.0 * vocab + 32.0 * kSeen),  // a sector for each logit seen
                  .written = static_cast<double>(n) * 32.0 * kSeen};
  measure(state, work, logits.calls(), [&](int i, cudaStream_t stream) {
    call.counts = counts.as<std::int32_t>(i);
    cuda::process_logits(logits.at(i), call, stream);
  });
}
BENCHMARK(BM_Penalties)
    ->Name("ProcessPenalties")
    ->ArgNames({"rows", "vocab"})
    ->ArgsProduct({{1, 256, 1024}, {128256}})
    ->Apply(gpu_benchmark);

void BM_Logprobs(benchmark::State& state) {
  const auto n = static_cast<int>(state.range(0)), vocab = static_cast<int>(state.range(1));
  const auto top = static_cast<std::int32_t>(state.range(2));
  const auto count = static_cast<std::size_t>(n);
  const BenchLogits logits(n, vocab, kPeaked);
  std::vector<cuda::DeviceLogprobRequest> host;
  for (int r = 0; r < n; ++r) host.push_back({r, 4711, top, -1});
  const Upload requests(host);
  const Rotation sampled(count * 4, 0);
  const Rotation workspace(cuda::logprob_workspace_bytes(n), 0);
  const Pinned results(count * sizeof(cuda::DeviceLogprobResult));
  measure(state, logits.one_read(), logits.calls(), [&](int i, cudaStream_t stream) {
    cuda::topk_logprobs(logits.at(i), requests.get(), n, sampled.as<TokenId>(0),
                        results.as<cuda::DeviceLogprobResult>(), workspace.at(0), stream);
  });
}
BENCHMARK(BM_Logprobs)
    ->Name("Logprobs")
    ->ArgNames({"rows", "vocab", "top"})
    ->ArgsProduct({{1, 256}, {128256}, {0, 5, 20}})
    ->Apply(gpu_benchmark);

}  // namespace
}  // namespace fastllm::bench

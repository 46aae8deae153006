// Kernels that touch each element once. Few rows: what a decode step does, operands in L2, where the previous kernel
// left them. Thousands of rows: a prefill step, operands in device memory.
#include <cstdint>
#include <vector>

#include "elementwise.h"
#include "gpu_timing.h"
#include "upload.h"

namespace fastllm::bench {
namespace {

constexpr int kMaxDecodeRows = 256;

std::size_t rotate_over(std::int64_t rows) { return rows > kMaxDecodeRows ? Rotation::kBeyondL2 : 0; }
int calls_for(std::int64_t rows) { return rows > kMaxDecodeRows ? 12 : 100; }

void BM_AddNorm(benchmark::State& state) {
  const std::int64_t rows = state.range(0), cols = state.range(1);
  const auto n = static_cast<std::size_t>(rows * cols);
  const Rotation x(n * 4, rotate_over(rows)), delta(n * 4, rotate_over(rows)), out(n * 2, rotate_over(rows));
  const Rotation weight(static_cast<std::size_t>(cols) * 4, 0);
  cuda::NormCall call;
  call.rows = rows;
  call.cols = call.ldx = call.ldd = call.ldo = cols;
  call.eps = 1e-6f;
  call.weight = weight.as<float>(0);
  const auto elements = static_cast<double>(n);
  measure(state, {.read = 8 * elements, .written = 6 * elements}, calls_for(rows), [&](int i, cudaStream_t stream) {
    call.x = x.at(i);
    call.delta = delta.as<float>(i);
    call.out = out.at(i);
    cuda::norm(call, stream);
  });
}
BENCHMARK(BM_AddNorm)
    ->Name("AddNorm")
    ->ArgNames({"rows", "cols"})
    ->ArgsProduct({{1, 16, 64, 256, 4096, 16384}, {576, 4096, 8192}})
    ->Apply(gpu_benchmark);

void BM_Norm(benchmark::State& state) {
  const std::int64_t rows = state.range(0), cols = state.range(1);
  const auto n = static_cast<std::size_t>(rows * cols);
  const Rotation x(n * 4, rotate_over(rows)), out(n * 2, rotate_over(rows));
  const Rotation weight(static_cast<std::size_t>(cols) * 4, 0);
  cuda::NormCall call;
  call.rows = rows;
  call.cols = call.ldx = call.ldo = cols;
  call.eps = 1e-6f;
  call.weight = weight.as<float>(0);
  const auto elements = static_cast<double>(n);
  measure(state, {.read = 4 * elements, .written = 2 * elements}, calls_for(rows), [&](int i, cudaStream_t stream) {
    call.x = x.at(i);
    call.out = out.at(i);
    cuda::norm(call, stream);
  });
}
BENCHMARK(BM_Norm)
    ->Name("Norm")
    ->ArgNames({"rows", "cols"})
    ->ArgsProduct({{1, 64, 256, 4096}, {576, 4096, 8192}})
    ->Apply(gpu_benchmark);

void BM_RopeKv(benchmark::State& state) {
  constexpr int kBlockSize = 16, kTableWidth = 64, kSlots = 256, kLength = kBlockSize * kTableWidth;
  const auto tokens = static_cast<int>(state.range(0)), heads = static_cast<int>(state.range(1));
  const int kv_heads = static_cast<int>(state.range(2)), head_dim = static_cast<int>(state.range(3));
  const bool norms = state.range(4) != 0, fp8 = state.range(5) != 0;
  std::vector<std::int32_t> slots, positions;
  for (int t = 0; t < tokens; ++t) {
    const bool decode = tokens <= kMaxDecodeRows;
    slots.push_back(decode ? t : t / kLength);
    positions.push_back(decode ? kLength - 1 - t % 128 : t % kLength);
  }
  std::vector<BlockId> tables;
  for (int i = 0; i < kSlots * kTableWidth; ++i) tables.push_back(BlockId{(i * 37) % (kSlots * kTableWidth)});
  const Upload device_slots(slots), device_positions(positions);
  const Upload device_tables(tables);

  const KvShape shape{fp8 ? DType::F8E4M3 : DType::BF16, 1, kv_heads, kBlockSize, head_dim};
  const Rotation pool(static_cast<std::size_t>(shape.block_bytes()) * kSlots * kTableWidth, 0);
  const std::int64_t width = std::int64_t{heads + 2 * kv_heads} * head_dim;
  const Rotation qkv(static_cast<std::size_t>(tokens * width) * 2, rotate_over(tokens));
  const Rotation cos_sin(std::size_t{kLength} * static_cast<std::size_t>(head_dim) * 4, 0);
  const Rotation weight(static_cast<std::size_t>(head_dim) * 4, 0);
  cuda::RopeKvCall call;
  call.ld = width;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.head_dim = head_dim;
  if (norms) {
    call.q_norm = call.k_norm = {NormKind::Rms, 1e-6f, false};
    call.q_weight = call.k_weight = weight.as<float>(0);
  }
  call.rope = {cos_sin.as<float>(0), head_dim, RopeStyle::Half};
  call.kv = layer_view(pool.at(0), shape, 0);
  cuda::StepView step;
  step.positions = device_positions.get();
  step.token_slot = device_slots.get();
  step.tables = device_tables.get();
  step.table_width = kTableWidth;
  step.num_tokens = tokens;

  const double t = tokens, kv_width = 2.0 * kv_heads * head_dim;  // elements of k and v
  const double changed = static_cast<double>(heads + kv_heads) * head_dim;
  const Work work{.read = t * static_cast<double>(width) * 2,
                  .written = t * (changed * 2 + kv_width * static_cast<double>(size_of(shape.dtype)))};
  measure(state, work, calls_for(tokens), [&](int i, cudaStream_t stream) {
    call.qkv = qkv.at(i);
    cuda::qk_norm_rope_write_kv(call, step, stream);
  });
}
BENCHMARK(BM_RopeKv)
    ->Name("RopeKv")
    ->ArgNames({"tokens", "heads", "kv_heads", "head_dim", "norms", "fp8"})
    ->ArgsProduct({{1, 16, 64, 256, 8192}, {32}, {8}, {128}, {0, 1}, {0, 1}})
    ->Args({64, 9, 3, 64, 0, 0})
    ->Args({8192, 9, 3, 64, 0, 0})
    ->Apply(gpu_benchmark);

void BM_GatedAct(benchmark::State& state) {
  const std::int64_t rows = state.range(0), cols = state.range(1);
  const auto act = static_cast<Activation>(state.range(2));
  const auto n = static_cast<std::size_t>(rows * cols);
  const Rotation in(n * 4, rotate_over(rows)), out(n * 2, rotate_over(rows));
  const auto elements = static_cast<double>(n);
  measure(state, {.read = 4 * elements, .written = 2 * elements}, calls_for(rows), [&](int i, cudaStream_t stream) {
    cuda::gated_act(out.at(i), cols, in.at(i), 2 * cols, rows, cols, DType::BF16, act, stream);
  });
}
constexpr int kSilu = static_cast<int>(Activation::Silu), kGelu = static_cast<int>(Activation::Gelu);
BENCHMARK(BM_GatedAct)
    ->Name("GatedAct")
    ->ArgNames({"rows", "cols", "act"})
    ->ArgsProduct({{1, 64, 256, 4096}, {1536, 14336}, {kSilu}})
    ->Args({4096, 14336, kGelu})
    ->Apply(gpu_benchmark);

void BM_Embed(benchmark::State& state) {
  constexpr std::int64_t kVocab = 128'256;
  const std::int64_t tokens = state.range(0), cols = state.range(1);
  std::vector<TokenId> ids;
  for (std::int64_t t = 0; t < tokens; ++t) ids.push_back(static_cast<TokenId>(t * 7919 % kVocab));
  const Upload device_ids(ids);
  const Rotation table(static_cast<std::size_t>(kVocab * cols) * 2, 0);
  const auto n = static_cast<std::size_t>(tokens * cols);
  const Rotation out(n * 4, rotate_over(tokens));
  const auto elements = static_cast<double>(n);
  measure(state, {.read = 2 * elements, .written = 4 * elements}, calls_for(tokens), [&](int i, cudaStream_t stream) {
    cuda::embed(out.as<float>(i), device_ids.get(), tokens, table.at(0), DType::BF16, kVocab, cols, 0, 1.0f, stream);
  });
}
BENCHMARK(BM_Embed)
    ->Name("Embed")
    ->ArgNames({"tokens", "cols"})
    ->ArgsProduct({{1, 256, 8192}, {4096}})
    ->Apply(gpu_benchmark);

void BM_GatherRows(benchmark::State& state) {
  const std::int64_t rows = state.range(0), cols = state.range(1);
  std::vector<std::int32_t> picked;
  for (std::int64_t r = 0; r < rows; ++r) picked.push_back(static_cast<std::int32_t>(rows - 1 - r));
  const Upload device_rows(picked);
  const auto row_bytes = static_cast<std::size_t>(cols) * 4;
  const std::size_t bytes = static_cast<std::size_t>(rows) * row_bytes;
  const Rotation x(bytes, rotate_over(rows)), out(bytes, rotate_over(rows));
  const auto moved = static_cast<double>(bytes);
  measure(state, {.read = moved, .written = moved}, calls_for(rows), [&](int i, cudaStream_t stream) {
    cuda::gather_rows(out.at(i), row_bytes, x.at(i), row_bytes, row_bytes, device_rows.get(), rows, stream);
  });
}
BENCHMARK(BM_GatherRows)
    ->Name("GatherRows")
    ->ArgNames({"rows", "cols"})
    ->ArgsProduct({{1, 256, 8192}, {4096}})
    ->Apply(gpu_benchmark);

}  // namespace
}  // namespace fastllm::bench

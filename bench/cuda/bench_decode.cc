// Decode attention over paged KV: blocks of 16 positions, shuffled except in_order_*. `GB/s` counts keys and values,
// queries and results.
//
//   --benchmark_filter='^Decode/'   the kernel that the engine takes
//   --benchmark_filter='^Generic/'  the kernel for any shape
//
// `peer_us` is the better of FlashAttention-3 (in vLLM 0.26) and FlashInfer 0.6.14 for the same on an H100, where small
// caches were rotated through four copies, which L2 holds: the cases called .../four_copies do the same. All others
// read their keys and values from device memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "paged_attention.h"

namespace fastllm::bench {
namespace {

using cuda::check;
using cuda::DeviceRow;

struct Shape {
  const char* name;
  int rows, length;
  double peer_us = 0;  // 0: not measured
  int heads = 32, kv_heads = 8, head_dim = 128;
  DType kv = DType::BF16;
  int first_length = 0;  // of the first row, where it differs
  int window = 0;
  bool in_order = false;  // blocks
};

constexpr Shape kShapes[] = {
    {"1x512", 1, 512, 10.3},
    {"1x2048", 1, 2048, 11.8},
    {"1x8192", 1, 8192, 22.5},
    {"1x32768", 1, 32768, 57.1},
    {"8x512", 8, 512, 14.2},
    {"8x2048", 8, 2048, 34.4},
    {"8x8192", 8, 8192, 100.5},
    {"8x32768", 8, 32768, 363},
    {"64x512", 64, 512, 56.1},
    {"64x2048", 64, 2048, 190},
    {"64x8192", 64, 8192, 713},
    {"64x32768", 64, 32768, 2808},
    {"256x512", 256, 512, 195},
    {"256x2048", 256, 2048, 721},
    {"256x8192", 256, 8192, 2814},
    {"256x32768", 256, 32768, 11152},
    {"1x131072_and_31x4096", 32, 4096, 0, 32, 8, 128, DType::BF16, 131072},
    {"mha_8x2048", 8, 2048, 0, 32, 32},
    {"mqa_16_1x32768", 1, 32768, 0, 16, 1},
    {"mqa_16_64x2048", 64, 2048, 0, 16, 1},
    {"llama1b_1x2048", 1, 2048, 0, 32, 8, 64},
    {"llama1b_64x2048", 64, 2048, 0, 32, 8, 64},
    {"smollm_1x512", 1, 512, 0, 9, 3, 64},
    {"llama1b_256x250", 256, 250, 0, 32, 8, 64},
    {"smollm_256x150", 256, 150, 0, 9, 3, 64},
    {"smollm_256x512", 256, 512, 0, 9, 3, 64},
    {"d256_64x2048", 64, 2048, 0, 16, 8, 256},
    {"fp8_1x8192", 1, 8192, 0, 32, 8, 128, DType::F8E4M3},
    {"fp8_64x2048", 64, 2048, 0, 32, 8, 128, DType::F8E4M3},
    {"fp8_d64_64x2048", 64, 2048, 0, 32, 8, 64, DType::F8E4M3},
    {"fp8_d256_64x2048", 64, 2048, 0, 16, 8, 256, DType::F8E4M3},
    {"window1024_1x32768", 1, 32768, 0, 32, 8, 128, DType::BF16, 0, 1024},
    {"window1024_64x8192", 64, 8192, 0, 32, 8, 128, DType::BF16, 0, 1024},
    {"in_order_64x8192", 64, 8192, 0, 32, 8, 128, DType::BF16, 0, 0, true},
    {"in_order_mqa_8_64x32768", 64, 32768, 0, 8, 1, 128, DType::BF16, 0, 0, true},
    {"mqa_8_64x32768", 64, 32768, 0, 8, 1},
};
constexpr Shape kGenericShapes[] = {
    {"8x512", 8, 512},
    {"64x512", 64, 512},
};

enum class Copies { BeyondL2, Four };

void run(benchmark::State& state, const Shape& s, Copies copies, bool generic) {
  try {
    std::vector<std::int32_t> lengths(static_cast<std::size_t>(s.rows), s.length);
    if (s.first_length > 0) lengths[0] = s.first_length;

    cuda::AttentionLimits limits = device_limits();
    limits.max_rows = std::max(s.rows, 256);
    limits.max_tokens = limits.max_rows;
    limits.max_len = *std::max_element(lengths.begin(), lengths.end());
    limits.window = s.window;

    const int width = (limits.max_len + kBlockSize - 1) / kBlockSize;
    std::vector<DeviceRow> rows;
    std::vector<std::int32_t> positions, slots;
    std::int64_t blocks = 0, read_positions = 0;
    for (int r = 0; r < s.rows; ++r) {
      const std::int32_t n = lengths[static_cast<std::size_t>(r)];
      rows.push_back({r, 1, n - 1, r});
      positions.push_back(n - 1);
      slots.push_back(r);
      blocks += (n + kBlockSize - 1) / kBlockSize;
      read_positions += s.window > 0 ? std::min(n, s.window) : n;
    }
    const std::vector<BlockId> pool_blocks = blocks_of_pool(blocks, s.in_order);
    std::vector<BlockId> tables(static_cast<std::size_t>(s.rows) * static_cast<std::size_t>(width), BlockId{0});
    auto next = pool_blocks.begin();
    for (std::size_t r = 0; r < lengths.size(); ++r)
      for (int b = 0; b < (lengths[r] + kBlockSize - 1) / kBlockSize; ++b)
        tables[r * static_cast<std::size_t>(width) + static_cast<std::size_t>(b)] = *next++;

    std::vector<std::byte> plan(cuda::decode_plan_bytes(limits));
    cuda::write_decode_plan(lengths, limits, plan.data());
    const Upload<std::byte> device_plan(plan);
    const Upload<DeviceRow> device_rows(rows);
    const Upload<std::int32_t> device_positions(positions), device_slots(slots);
    const Upload<BlockId> device_tables(tables);
    const KvShape kv{s.kv, 1, s.kv_heads, kBlockSize, s.head_dim};
    const auto pool_bytes = static_cast<std::size_t>(blocks * kv.block_bytes());
    const Rotation pool(pool_bytes, copies == Copies::Four ? 4 * pool_bytes : Rotation::kBeyondL2);
    const std::int64_t ldq = (s.heads + 2 * s.kv_heads) * s.head_dim, ldo = s.heads * s.head_dim;
    const Rotation q(static_cast<std::size_t>(s.rows * ldq * 2), 1), out(static_cast<std::size_t>(s.rows * ldo * 2), 1);
    const Rotation workspace(cuda::decode_workspace_bytes(limits, s.heads, s.head_dim), 1);
    check(cudaMemset(workspace.at(0), 0, cuda::decode_counter_bytes(limits)), "cudaMemset");

    cuda::StepView step;
    step.positions = device_positions.get();
    step.token_slot = device_slots.get();
    step.rows = device_rows.get();
    step.tables = device_tables.get();
    step.table_width = width;
    step.num_tokens = step.num_rows = step.num_decode_rows = s.rows;
    cuda::AttentionCall call;
    call.out = out.at(0);
    call.q = q.at(0);
    call.ldq = ldq;
    call.args = {s.heads, s.kv_heads, s.head_dim, 1.0f / std::sqrt(static_cast<float>(s.head_dim)), 0, s.window, {}};

    const double kv_bytes =
        2.0 * static_cast<double>(read_positions) * s.kv_heads * s.head_dim * static_cast<double>(size_of(s.kv));
    const auto token_bytes = static_cast<double>(s.rows * ldo * 2);
    const Work work{kv_bytes + token_bytes, token_bytes, 0};
    const int calls = static_cast<int>(std::clamp(2e-3 / floor_seconds(work), 3.0, 100.0));
    measure(state, work, calls, [&](int i, cudaStream_t stream) {
      call.kv = layer_view(pool.at(i), kv, 0);
      if (generic) {
        cuda::generic_attention(call, step, 0, s.rows, s.rows, stream);
      } else {
        cuda::decode_attention(call, step, device_plan.get(), limits, workspace.at(0), stream);
      }
    });
    const bool same_as_peer = copies == Copies::Four || 4 * pool_bytes >= Rotation::kBeyondL2;
    if (s.peer_us > 0 && same_as_peer) state.counters["peer_us"] = s.peer_us;
  } catch (const std::exception& e) {
    state.SkipWithError(e.what());
  }
}

bool small_pool(const Shape& s) {
  return std::int64_t{4} * 4 * s.rows * s.length * s.kv_heads * s.head_dim < std::int64_t{Rotation::kBeyondL2};
}

const bool registered = [] {
  const auto add = [](const std::string& name, const Shape& s, Copies copies, bool generic) {
    gpu_benchmark(benchmark::RegisterBenchmark(
        name.c_str(), [&s, copies, generic](benchmark::State& state) { run(state, s, copies, generic); }));
  };
  for (const Shape& s : kShapes) {
    add(std::string("Decode/") + s.name, s, Copies::BeyondL2, false);
    if (s.peer_us > 0 && small_pool(s)) add(std::string("Decode/") + s.name + "/four_copies", s, Copies::Four, false);
  }
  for (const Shape& s : kGenericShapes) add(std::string("Generic/") + s.name, s, Copies::BeyondL2, true);
  return true;
}();

}  // namespace
}  // namespace fastllm::bench

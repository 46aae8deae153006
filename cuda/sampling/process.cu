// What is done to logits before a token is chosen: bias and forbidden ids, penalties on tokens seen before, masks.
//
//   for entry in adjustments of row r:      x[r, entry.id] += entry.add
//   for i with count[r, i] != 0:            x = x > 0 ? x / repetition : x * repetition
//   ... and if it is in the output:         x -= frequency * occurrences + presence
//   for i whose mask bit is 0:              x[r, i] = -infinity
//
// Cost: penalties read 4 vocab bytes of counts per penalised row, and touch the logits only of tokens seen; a mask is
// vocab / 8 bytes over PCIe, and writes what it forbids. Benchmark: fastllm_bench_cuda --benchmark_filter=Process
#include <algorithm>

#include "launch.cuh"
#include "sampling/sampling.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInPromptBit = 30;
constexpr std::int32_t kOccurrences = (1 << kInPromptBit) - 1;

// Blocks for each of `rows` rows, where one takes at most `most`: about four on each of 132 multiprocessors.
unsigned blocks_per_row(int rows, int most) {
  return static_cast<unsigned>(std::clamp(528 / std::max(rows, 1), 1, most));
}

__global__ void __launch_bounds__(kThreads)
    adjust(Logits logits, const DeviceSampleRow* rows, const LogitAdjustment* adjustments) {
  pdl_wait();
  pdl_launch();
  const int r = static_cast<int>(blockIdx.x);
  float* x = logits.data + r * logits.ld;
  const int end = rows[r].adjust_end;
  for (int i = rows[r].adjust_begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const LogitAdjustment entry = adjustments[i];
    if (entry.id >= 0 && entry.id < logits.vocab) atomicAdd(x + entry.id, entry.add);  // an id may occur twice
  }
}

// Roundings as in the formula, not contracted.
__global__ void __launch_bounds__(kThreads)
    penalise(Logits logits, const DeviceSampleRow* rows, const std::int32_t* counts) {
  pdl_wait();
  pdl_launch();
  const int r = static_cast<int>(blockIdx.y);
  const DeviceSampleRow row = rows[r];
  const bool neutral = row.repetition_penalty == 1.0f && row.presence_penalty == 0.0f && row.frequency_penalty == 0.0f;
  if (row.penalised == 0 || row.slot < 0 || neutral) return;
  float* x = logits.data + r * logits.ld;
  const std::int32_t* count = counts + static_cast<std::int64_t>(row.slot) * logits.vocab;
  const auto penalised = [&](int id, std::int32_t seen) {
    float v = x[id];
    v = v > 0.0f ? v / row.repetition_penalty : v * row.repetition_penalty;
    const std::int32_t in_output = seen & kOccurrences;
    if (in_output > 0) {
      const float by = __fmul_rn(row.frequency_penalty, static_cast<float>(in_output));
      v = __fsub_rn(v, __fadd_rn(by, row.presence_penalty));
    }
    x[id] = v;
  };
  constexpr int kUnroll = 8;
  const int stride = static_cast<int>(gridDim.x) * kThreads * kUnroll;
  for (int begin = static_cast<int>(blockIdx.x) * kThreads * kUnroll; begin < logits.vocab; begin += stride) {
    std::int32_t seen[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int id = begin + u * kThreads + static_cast<int>(threadIdx.x);
      seen[u] = id < logits.vocab ? count[id] : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (seen[u] != 0) penalised(begin + u * kThreads + static_cast<int>(threadIdx.x), seen[u]);
  }
}

__global__ void __launch_bounds__(kThreads) count_tokens(std::int32_t* counts, int vocab, const TokenId* tokens,
                                                         std::int64_t num_tokens, std::int64_t num_prompt) {
  pdl_wait();
  pdl_launch();
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_tokens; i += stride) {
    const TokenId id = tokens[i];
    if (id < 0 || id >= vocab) continue;
    if (i < num_prompt) {
      atomicOr(counts + id, 1 << kInPromptBit);
    } else {
      atomicAdd(counts + id, 1);
    }
  }
}

// A warp reads 32 words at once, then goes through them, one lane per bit.
__global__ void __launch_bounds__(kThreads)
    mask_rows(Logits logits, const std::int32_t* rows, const std::uint32_t* bits) {
  pdl_wait();
  pdl_launch();
  const int words = (logits.vocab + 31) / 32;
  const std::uint32_t* mask = bits + static_cast<std::int64_t>(blockIdx.y) * words;
  float* x = logits.data + rows[blockIdx.y] * logits.ld;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = (static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) / 32;
  const int stride = static_cast<int>(gridDim.x) * kThreads;
  for (int begin = 32 * warp; begin < words; begin += stride) {
    const std::uint32_t mine = begin + lane < words ? mask[begin + lane] : ~0u;
#pragma unroll 4
    for (int w = 0; w < 32; ++w) {
      const std::uint32_t word = __shfl_sync(0xffffffffu, mine, w);
      const int id = 32 * (begin + w) + lane;
      if ((word >> lane & 1u) == 0 && id < logits.vocab) x[id] = -INFINITY;
    }
  }
}

}  // namespace

void process_logits(const Logits& logits, const LogitsProcessing& call, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(logits.rows);
  if (call.num_adjustments > 0) launch(adjust, rows, kThreads, 0, stream, logits, call.rows, call.adjustments);
  if (!call.any_penalised || call.counts == nullptr) return;
  launch(penalise, dim3(blocks_per_row(logits.rows, 64), rows), kThreads, 0, stream, logits, call.rows, call.counts);
}

void init_counts(std::int32_t* counts, int vocab, const TokenId* tokens, std::int64_t num_tokens,
                 std::int64_t num_prompt, cudaStream_t stream) {
  check(cudaMemsetAsync(counts, 0, static_cast<std::size_t>(vocab) * sizeof(std::int32_t), stream),
        "zeroing token counts");
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>((num_tokens + kThreads - 1) / kThreads, 132));
  launch(count_tokens, blocks, kThreads, 0, stream, counts, vocab, tokens, num_tokens, num_prompt);
}

void mask_logits(const Logits& logits, const std::int32_t* rows, int num_rows, const std::uint32_t* bits,
                 cudaStream_t stream) {
  const dim3 grid(blocks_per_row(num_rows, 16), static_cast<unsigned>(num_rows));
  launch(mask_rows, grid, kThreads, 0, stream, logits, rows, bits);
}

}  // namespace fastllm::cuda

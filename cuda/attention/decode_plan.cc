// The host's part of decode attention: prefix sums of the rows' tiles, and how much memory the kernels need.
#include <cassert>
#include <cstring>

#include "attention/attention.h"
#include "attention/decode_split.h"

namespace fastllm::cuda {

std::size_t decode_plan_bytes(const AttentionLimits& limits) {
  return decode::prefix_stride(limits.max_rows) * sizeof(std::int32_t) * (limits.window > 0 ? 2 : 1);
}

void write_decode_plan(std::span<const std::int32_t> kv_lengths, const AttentionLimits& limits, std::byte* out) {
  assert(kv_lengths.size() <= static_cast<std::size_t>(limits.max_rows));
  const std::size_t stride = decode::prefix_stride(limits.max_rows);
  const auto write = [&](int window, std::byte* at) {
    std::int32_t sum = 0;
    for (std::size_t r = 0; r < stride; ++r) {  // rows that do not exist have no tiles
      std::memcpy(at + r * sizeof sum, &sum, sizeof sum);
      if (r < kv_lengths.size()) sum += decode::row_tiles(kv_lengths[r], window);
    }
  };
  write(0, out);
  if (limits.window > 0) write(limits.window, out + stride * sizeof(std::int32_t));
}

std::size_t decode_counter_bytes(const AttentionLimits& limits) {
  return (decode::counters(limits.num_sms) * sizeof(std::int32_t) + 255) / 256 * 256;
}

std::size_t decode_workspace_bytes(const AttentionLimits& limits, int heads, int head_dim) {
  const auto count = [&](int dim) {  // of partial results
    return static_cast<std::size_t>(2 * limits.num_sms * decode::blocks_per_sm(dim, true)) *
           static_cast<std::size_t>(std::min(heads, decode::kMaxHeadsPerItem));
  };
  std::size_t bytes = 0;
  for (const int dim : {64, 128, 256}) {  // of any layer; a result has two pairs of greatest score and sum of weights
    if (dim <= head_dim) bytes = std::max(bytes, count(dim) * static_cast<std::size_t>(dim + 4) * sizeof(float));
  }
  return decode_counter_bytes(limits) + bytes;
}

}  // namespace fastllm::cuda

// Which tiles the prefill kernels compute, in which order, and which kernel takes a call.
#include "attention/prefill_plan.h"

#include <algorithm>
#include <span>
#include <tuple>

namespace fastllm::cuda {
namespace {

constexpr std::size_t round_up16(std::size_t n) { return (n + 15) / 16 * 16; }

// What a tile costs: the positions it reads. A window caps that, but then any order is good.
std::int64_t cost(std::span<const DeviceRow> rows, const PrefillItem& item, int tile_tokens) {
  const DeviceRow& row = rows[static_cast<std::size_t>(item.row)];
  return std::int64_t{row.first_pos} + std::min(item.first + tile_tokens, row.num_tokens);
}

}  // namespace

std::size_t prefill_plan_bytes(const AttentionLimits& limits) {
  std::size_t items = 0;
  for (int heads = 1; heads <= kMaxTileHeads; ++heads)
    items += static_cast<std::size_t>(limits.max_rows + limits.max_tokens / prefill_tile_tokens(heads));
  return round_up16(items * sizeof(PrefillItem));
}

PrefillPlan write_prefill_plan(std::span<const DeviceRow> rows, int num_decode_rows, const AttentionLimits&,
                               std::byte* out, const std::byte* device) {
  PrefillPlan plan;
  plan.device = device;
  auto* const items = reinterpret_cast<PrefillItem*>(out);
  int n = 0;
  for (int heads = 1; heads <= kMaxTileHeads; ++heads) {
    const int tile_tokens = prefill_tile_tokens(heads), begin = n;
    for (auto r = static_cast<std::size_t>(num_decode_rows); r < rows.size(); ++r) {
      if (rows[r].slot < 0) continue;  // padding
      for (int first = 0; first < rows[r].num_tokens; first += tile_tokens)
        items[n++] = {static_cast<std::int32_t>(r), first};
    }
    std::sort(items + begin, items + n, [&](const PrefillItem& a, const PrefillItem& b) {
      const std::int64_t cost_a = cost(rows, a, tile_tokens), cost_b = cost(rows, b, tile_tokens);
      return cost_a != cost_b ? cost_a > cost_b : std::tie(a.row, a.first) < std::tie(b.row, b.first);
    });
    plan.begin[static_cast<std::size_t>(heads)] = n;
  }
  plan.bytes = round_up16(static_cast<std::size_t>(n) * sizeof(PrefillItem));
  return plan;
}

void prefill_attention(const AttentionCall& call, const StepView& step, const PrefillPlan& plan,
                       const AttentionLimits& limits, cudaStream_t stream) {
  if (plan.bytes == 0) return;
#ifdef FASTLLM_WITH_SM90A
  if (prefill_sm90_takes(call, limits)) {
    prefill_sm90(call, step, plan, limits, stream);
    return;
  }
#endif
  if (prefill_mma_takes(call, limits)) {
    prefill_mma(call, step, plan, stream);
    return;
  }
  generic_attention(call, step, step.num_decode_rows, step.num_rows, step.num_tokens - step.num_decode_rows, stream);
}

}  // namespace fastllm::cuda

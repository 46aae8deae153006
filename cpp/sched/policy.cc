#include "sched/policy.h"

#include <algorithm>
#include <cassert>

namespace fastllm {

OrderKey order_key(SchedulingPolicy policy, std::int32_t priority, std::uint64_t arrival, std::int32_t index) {
  return {policy == SchedulingPolicy::Priority ? priority : 0, arrival, index};
}

std::int32_t chunk_size(std::int32_t to_compute, std::int32_t max_chunk, std::int32_t budget, std::size_t others) {
  if (to_compute <= 0 || budget <= 0) return 0;
  std::int32_t n = std::min(to_compute, budget);
  if (max_chunk > 0) n = std::min(n, max_chunk);
  const auto spare = static_cast<std::int64_t>(budget) - static_cast<std::int64_t>(others);
  return std::max<std::int32_t>(1, static_cast<std::int32_t>(std::min<std::int64_t>(n, spare)));
}

bool admits(std::int64_t needed, std::int64_t num_free, std::int64_t watermark, std::size_t num_running) {
  return needed + (num_running > 0 ? watermark : 0) <= num_free;
}

std::int64_t watermark_blocks(std::int64_t total_blocks) { return total_blocks / 100; }

std::size_t pick_victim(std::size_t num_running, std::size_t next) {
  assert(next < num_running);
  return std::max(num_running - 1, next);
}

PreemptionMode pick_preemption(PreemptionMode wanted, std::int64_t blocks, std::int64_t host_free,
                               std::int64_t num_computed) {
  const bool swap = wanted == PreemptionMode::Swap && num_computed > 0 && blocks <= host_free;
  return swap ? PreemptionMode::Swap : PreemptionMode::Recompute;
}

}  // namespace fastllm

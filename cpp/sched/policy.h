// The choices of the scheduler as pure functions of numbers.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

#include "fastllm/types.h"

namespace fastllm {

// Who runs first, is admitted first and is preempted last: the smaller key.
struct OrderKey {
  std::int32_t priority = 0;
  std::uint64_t arrival = 0;  // counts requests
  std::int32_t index = 0;     // of the sequence in its request
  auto operator<=>(const OrderKey&) const = default;
};

OrderKey order_key(SchedulingPolicy policy, std::int32_t priority, std::uint64_t arrival, std::int32_t index);

// Tokens of one sequence in this step. `others` running sequences are planned after it: while the budget can, it keeps
// one token for each, so that a long prompt delays nobody's next token. 0 if the budget is spent.
std::int32_t chunk_size(std::int32_t to_compute, std::int32_t max_chunk, std::int32_t budget, std::size_t others);

// May a sequence that needs `needed` blocks for all its known tokens join `num_running` others? `watermark` blocks stay
// free for their growth.
bool admits(std::int64_t needed, std::int64_t num_free, std::int64_t watermark, std::size_t num_running);

// Blocks kept free at admission.
std::int64_t watermark_blocks(std::int64_t total_blocks);

// The running sequence that gives way: the last in order, of those from `next` on, which are not planned yet.
std::size_t pick_victim(std::size_t num_running, std::size_t next);

// How a victim gives way: Swap if wanted, possible and worth it.
PreemptionMode pick_preemption(PreemptionMode wanted, std::int64_t blocks, std::int64_t host_free,
                               std::int64_t num_computed);

}  // namespace fastllm

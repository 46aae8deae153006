// How many KV blocks an engine gets. Pure arithmetic.
#pragma once

#include <cstdint>

#include "fastllm/types.h"
#include "runtime/executor.h"

namespace fastllm {

// bytes_per_block: over all ranks. memory_free: bytes this process may still take. In order of precedence: num_blocks,
// kv_cache_bytes, else the least of what max_num_seqs sequences of max_model_len need, 4 GiB and a quarter of the free
// memory. Throws ResourceError, naming settings that would work, unless one sequence of max_model_len fits or
// num_blocks was given (a scheduler may be tried with less).
KvBudget kv_budget(const EngineConfig& config, std::int64_t bytes_per_block, std::int64_t memory_free);

}  // namespace fastllm

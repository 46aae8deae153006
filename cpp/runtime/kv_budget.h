// What a KV cache is made of, and how many blocks an engine gets. Pure arithmetic.
#pragma once

#include <cstdint>

#include "fastllm/types.h"
#include "runtime/executor.h"
#include "tensor/dtype.h"

namespace fastllm {

// The element type that kv_cache_dtype asks for; throws InvalidArgument where the device has no such cache.
DType kv_cache_dtype(const EngineConfig& config, bool gpu);

// On CPUs. bytes_per_block: over all ranks. memory_free: bytes this process may still take. In order of precedence:
// num_blocks, kv_cache_bytes, else the least of what max_num_seqs sequences of max_model_len need, 4 GiB and a quarter
// of the free memory. Throws ResourceError, naming settings that would work, unless one sequence of max_model_len fits
// or num_blocks was given (a scheduler may be tried with less).
KvBudget kv_budget(const EngineConfig& config, std::int64_t bytes_per_block, std::int64_t memory_free);

// On GPUs, where every rank has its own. bytes_per_block: of one rank. memory_total, memory_free: bytes of the GPU with
// the least left, measured after the worst step. The same precedence, but the rest of gpu_memory_utilization instead of
// what is left of the machine:
//
//   0         used after the worst step            total * gpu_memory_utilization     total
//   |------------------|--------- KV cache ----------------|----------------------------|
KvBudget gpu_kv_budget(const EngineConfig& config, std::int64_t bytes_per_block, std::int64_t memory_total,
                       std::int64_t memory_free);

}  // namespace fastllm

#include "runtime/kv_budget.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr std::int64_t kDefaultBytes = std::int64_t{4} << 30;
// A GPU of 80 GB could hold millions of blocks of a tiny model, and each costs the host some bytes and time.
constexpr std::int64_t kEnoughGpuBlocks = std::int64_t{1} << 20;

std::int64_t saturating_mul(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

std::int64_t blocks_per_sequence(const EngineConfig& c) {
  return (std::int64_t{c.max_model_len} + c.block_size - 1) / c.block_size;
}

// What max_num_seqs sequences of max_model_len need, and the reserved block.
std::int64_t wanted_blocks(const EngineConfig& c) { return saturating_mul(blocks_per_sequence(c), c.max_num_seqs) + 1; }

// A pool that the user sized must not promise memory the machine does not have: pages are taken lazily, so it would
// fail in the middle of a request.
void check_fits(std::int64_t blocks, std::int64_t bytes_per_block, std::int64_t memory_free) {
  const std::int64_t bytes = saturating_mul(blocks, bytes_per_block);
  if (bytes <= memory_free) return;
  throw ResourceError("a KV cache of " + std::to_string(bytes) + " bytes does not fit the " +
                      std::to_string(memory_free) + " bytes of free memory; use --kv-cache-memory-bytes " +
                      std::to_string(memory_free / 10 * 9) + " or less");
}

// What the user's own sizes give; device_blocks stays 0 where there are none.
KvBudget user_budget(const EngineConfig& c, std::int64_t bytes_per_block, std::int64_t memory_free) {
  KvBudget budget;
  budget.bytes_per_block = bytes_per_block;
  budget.host_blocks = std::min<std::int64_t>(c.swap_bytes / bytes_per_block, INT32_MAX);
  if (c.num_blocks > 0) {
    if (c.num_blocks >= INT32_MAX)
      throw InvalidArgument("num_blocks is " + std::to_string(c.num_blocks) + "; at most 2^31 - 2 are possible");
    budget.device_blocks = c.num_blocks + 1;
  } else if (c.kv_cache_bytes > 0) {
    budget.device_blocks = std::min<std::int64_t>(c.kv_cache_bytes / bytes_per_block, INT32_MAX);
  }
  check_fits(budget.device_blocks, bytes_per_block, memory_free);
  return budget;
}

// Throws unless a sequence of max_model_len fits the blocks that `bytes` hold. more: advice that gives more room.
void check_one_sequence(const EngineConfig& c, const KvBudget& budget, std::int64_t bytes, const std::string& more) {
  const std::int64_t per_sequence = blocks_per_sequence(c);
  if (budget.device_blocks >= per_sequence + 1) return;
  const std::int64_t fits = std::max<std::int64_t>(budget.device_blocks - 1, 0) * c.block_size;
  const std::string shorter = fits > 0 ? "--max-model-len " + std::to_string(fits) + " or less" : "";
  throw ResourceError("a sequence of " + std::to_string(c.max_model_len) + " tokens needs " +
                      std::to_string(per_sequence) + " KV blocks of " + std::to_string(budget.bytes_per_block) +
                      " bytes besides the reserved one, but " + std::to_string(bytes) + " bytes hold only " +
                      std::to_string(budget.device_blocks) + " blocks; use " + shorter +
                      (shorter.empty() || more.empty() ? "" : ", or ") + more);
}

std::string more_bytes(const EngineConfig& c, std::int64_t bytes_per_block) {
  return "--kv-cache-memory-bytes " + std::to_string(saturating_mul(blocks_per_sequence(c) + 1, bytes_per_block)) +
         " or more";
}

// The least utilization, in whole percent, with which one sequence fits; what else takes less memory if none does.
std::string more_of_gpu(const EngineConfig& c, std::int64_t bytes_per_block, std::int64_t used, std::int64_t total) {
  const double needed =
      static_cast<double>(used) + static_cast<double>(saturating_mul(blocks_per_sequence(c) + 1, bytes_per_block));
  const int percent = static_cast<int>(std::ceil(std::min(100 * needed / static_cast<double>(total), 1e6)));
  if (percent < 100)
    return "--gpu-memory-utilization 0." + std::string(percent < 10 ? "0" : "") + std::to_string(percent);
  return c.kv_cache_dtype == "fp8" ? "more GPUs with --tensor-parallel-size"
                                   : "--kv-cache-dtype fp8, or more GPUs with --tensor-parallel-size";
}

}  // namespace

DType kv_cache_dtype(const EngineConfig& c, bool gpu) {
  const std::string& name = c.kv_cache_dtype;
  if (name == "auto") return dtype_from_name(c.dtype);
  if (name == "fp8") {
    if (!gpu) throw InvalidArgument("kv_cache_dtype 'fp8' needs a GPU; the device is '" + c.device + "'.");
    if (c.dtype != "bfloat16")
      throw InvalidArgument("kv_cache_dtype 'fp8' needs dtype bfloat16; it is '" + c.dtype + "'.");
    return DType::F8E4M3;
  }
  for (const DType t : {DType::BF16, DType::F16, DType::F32, DType::I8}) {
    if (name != name_of(t)) continue;
    if (gpu && name != c.dtype)
      throw InvalidArgument("kv_cache_dtype '" + name + "' needs a CPU; with dtype " + c.dtype + " on the device '" +
                            c.device + "' it may be auto or fp8.");
    return t;
  }
  throw InvalidArgument("kv_cache_dtype is '" + name + "', but must be auto, bfloat16, float16, float32, int8 or fp8.");
}

KvBudget kv_budget(const EngineConfig& c, std::int64_t bytes_per_block, std::int64_t memory_free) {
  KvBudget budget = user_budget(c, bytes_per_block, memory_free);
  if (c.num_blocks > 0) return budget;
  std::int64_t bytes = c.kv_cache_bytes;
  if (bytes == 0) {
    bytes = std::min(kDefaultBytes, memory_free / 4);
    budget.device_blocks = std::min({bytes / bytes_per_block, wanted_blocks(c), std::int64_t{INT32_MAX}});
  }
  check_one_sequence(c, budget, bytes, more_bytes(c, bytes_per_block));
  return budget;
}

KvBudget gpu_kv_budget(const EngineConfig& c, std::int64_t bytes_per_block, std::int64_t memory_total,
                       std::int64_t memory_free) {
  KvBudget budget = user_budget(c, bytes_per_block, memory_free);
  if (c.num_blocks > 0) return budget;
  if (c.kv_cache_bytes > 0) {
    check_one_sequence(c, budget, c.kv_cache_bytes, more_bytes(c, bytes_per_block));
    return budget;
  }
  const std::int64_t used = memory_total - memory_free;
  const auto allowed = static_cast<std::int64_t>(static_cast<double>(memory_total) * c.gpu_memory_utilization);
  const std::int64_t bytes = std::max<std::int64_t>(allowed - used, 0);
  const std::int64_t enough = std::min<std::int64_t>(std::max(wanted_blocks(c), kEnoughGpuBlocks), INT32_MAX);
  budget.device_blocks = std::min(bytes / bytes_per_block, enough);
  check_one_sequence(c, budget, bytes, more_of_gpu(c, bytes_per_block, used, memory_total));
  return budget;
}

}  // namespace fastllm

#include "runtime/kv_budget.h"

#include <algorithm>
#include <string>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr std::int64_t kDefaultBytes = std::int64_t{4} << 30;

std::int64_t saturating_mul(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

// A pool that the user sized must not promise memory the machine does not have: pages are taken lazily, so it would
// fail in the middle of a request.
void check_fits(std::int64_t blocks, std::int64_t bytes_per_block, std::int64_t memory_free) {
  const std::int64_t bytes = saturating_mul(blocks, bytes_per_block);
  if (bytes <= memory_free) return;
  throw ResourceError("a KV cache of " + std::to_string(bytes) + " bytes does not fit the " +
                      std::to_string(memory_free) + " bytes of free memory; use --kv-cache-memory-bytes " +
                      std::to_string(memory_free / 10 * 9) + " or less");
}

}  // namespace

KvBudget kv_budget(const EngineConfig& c, std::int64_t bytes_per_block, std::int64_t memory_free) {
  const std::int64_t per_sequence = (std::int64_t{c.max_model_len} + c.block_size - 1) / c.block_size;
  KvBudget budget;
  budget.bytes_per_block = bytes_per_block;
  budget.host_blocks = std::min<std::int64_t>(c.swap_bytes / bytes_per_block, INT32_MAX);
  if (c.num_blocks > 0) {
    if (c.num_blocks >= INT32_MAX)
      throw InvalidArgument("num_blocks is " + std::to_string(c.num_blocks) + "; at most 2^31 - 2 are possible");
    budget.device_blocks = c.num_blocks + 1;
    check_fits(budget.device_blocks, bytes_per_block, memory_free);
    return budget;
  }
  const std::int64_t wanted = saturating_mul(per_sequence, c.max_num_seqs) + 1;
  const std::int64_t bytes = c.kv_cache_bytes > 0 ? c.kv_cache_bytes : std::min(kDefaultBytes, memory_free / 4);
  const std::int64_t limit = c.kv_cache_bytes > 0 ? INT32_MAX : std::min<std::int64_t>(wanted, INT32_MAX);
  budget.device_blocks = std::min(bytes / bytes_per_block, limit);
  if (c.kv_cache_bytes > 0) check_fits(budget.device_blocks, bytes_per_block, memory_free);
  if (budget.device_blocks >= per_sequence + 1) return budget;

  const std::int64_t fits = std::max<std::int64_t>(budget.device_blocks - 1, 0) * c.block_size;
  std::string advice =
      "use --kv-cache-memory-bytes " + std::to_string(saturating_mul(per_sequence + 1, bytes_per_block)) + " or more";
  if (fits > 0) advice = "use --max-model-len " + std::to_string(fits) + " or less, or " + advice;
  throw ResourceError("a sequence of " + std::to_string(c.max_model_len) + " tokens needs " +
                      std::to_string(per_sequence) + " KV blocks of " + std::to_string(bytes_per_block) +
                      " bytes besides the reserved one, but " + std::to_string(bytes) + " bytes hold only " +
                      std::to_string(budget.device_blocks) + " blocks; " + advice);
}

}  // namespace fastllm

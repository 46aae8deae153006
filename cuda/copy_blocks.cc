#include <cstddef>
#include <cstdlib>

#include "check.h"
#include "elementwise.h"

namespace fastllm::cuda {
namespace {

// Pairs [begin, end) that one copy may do: both sides count up, and within one pool nothing of the one side lies in the
// other, so that the order of the pairs is of no matter.
std::size_t end_of_run(std::span<const std::pair<BlockId, BlockId>> from_to, std::size_t begin, bool one_pool) {
  const auto at = [&](std::size_t i) {
    return std::pair{static_cast<std::int64_t>(index(from_to[i].first)),
                     static_cast<std::int64_t>(index(from_to[i].second))};
  };
  const auto [from, to] = at(begin);
  std::size_t end = begin + 1;
  for (std::int64_t n = 1; end < from_to.size(); ++end, ++n) {
    if (at(end) != std::pair{from + n, to + n}) break;
    if (one_pool && std::abs(from - to) <= n) break;
  }
  return end;
}

}  // namespace

void copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                 std::span<const std::pair<BlockId, BlockId>> from_to, cudaStream_t stream) {
  for (std::size_t begin = 0; begin < from_to.size();) {
    const std::size_t end = end_of_run(from_to, begin, dst_pool == src_pool);
    auto* to = static_cast<std::byte*>(dst_pool) + index(from_to[begin].second) * block_bytes;
    const auto* from = static_cast<const std::byte*>(src_pool) + index(from_to[begin].first) * block_bytes;
    if (to != from) {
      check(cudaMemcpyAsync(to, from, (end - begin) * block_bytes, cudaMemcpyDefault, stream), "copying KV blocks");
    }
    begin = end;
  }
}

}  // namespace fastllm::cuda

// Where the keys and values of all layers of one rank lie. Block-major, so that copy, swap and transfer move one
// contiguous piece per block:  [block][layer][k|v][kv_head][block_size][head_dim]
//
// That is the order of rows. A backend may keep what a head has in a block in another one, in the same place.
//
// An int8 cache keeps fp32 scales, one for each position, behind the [block_size][head_dim] codes of each kv head:
// value = scale * code, scale = max |value| / 127.
#pragma once

#include <cstdint>

#include "base/ids.h"
#include "tensor/dtype.h"

namespace fastllm {

// Elements of a cache that the scale of one position takes.
constexpr std::int64_t kv_scale_elements(DType t) { return t == DType::I8 ? sizeof(float) : 0; }

struct KvShape {
  DType dtype = DType::BF16;
  int layers = 0;
  int kv_heads = 0;    // of this rank
  int block_size = 0;  // positions
  int head_dim = 0;

  std::int64_t head_stride() const { return block_size * (head_dim + kv_scale_elements(dtype)); }  // elements
  std::int64_t kv_stride() const { return head_stride() * kv_heads; }                              // k to v, elements
  std::int64_t layer_stride() const { return 2 * kv_stride(); }                                    // elements
  std::int64_t block_stride() const { return layer_stride() * layers; }                            // elements
  std::int64_t block_bytes() const { return block_stride() * static_cast<std::int64_t>(size_of(dtype)); }
};

// One layer's view of the pool, what attention and the KV write take.
struct KvView {
  void* base = nullptr;  // block 0, k of kv head 0 of this layer
  DType dtype = DType::BF16;
  int kv_heads = 0, block_size = 0, head_dim = 0;
  std::int64_t block_stride = 0, kv_stride = 0, head_stride = 0;  // elements
};

inline KvView layer_view(void* pool, const KvShape& s, int layer) {
  auto* p = static_cast<std::byte*>(pool) + static_cast<std::size_t>(layer * s.layer_stride()) * size_of(s.dtype);
  return {p, s.dtype, s.kv_heads, s.block_size, s.head_dim, s.block_stride(), s.kv_stride(), s.head_stride()};
}

}  // namespace fastllm

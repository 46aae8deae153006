// The weights a spec has: canonical names (fastllm/weights.h), shapes, and how tensor parallelism cuts each of them.
// The cut belongs to the name and is decided here, once for all families.
//
//   qkv               rows, by kv head: a rank gets whole kv heads with their q heads; with fewer kv heads than ranks a
//                     kv head is held by several ranks, each with its own q heads
//   gate_up, up       rows, in each half alike
//   out, down         columns; their biases are added by rank 0 only
//   tokens, head      rows (vocabulary), padded with zero rows to a multiple of the ranks
//   everything else   whole on every rank
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fastllm/model_spec.h"

namespace fastllm {

enum class ShardAxis : std::uint8_t { Replicated, QkvRows, Rows, GateUpRows, Columns, Vocab };

struct CanonicalWeight {
  std::string name;
  std::vector<std::int64_t> shape;  // of the whole model: [out, in] or [n]
  ShardAxis axis = ShardAxis::Replicated;
  int layer = -1;  // -1: not of a layer
};

// In the order of the model. `spec` has passed check_spec().
std::vector<CanonicalWeight> canonical_weights(const ModelSpec& spec);

// Names inside a layer have this before them: "layers.3."
std::string layer_prefix(int layer);

// The heads of one rank: q heads [q_begin, q_begin + heads), kv heads [kv_begin, kv_begin + kv_heads).
struct HeadRange {
  int q_begin = 0, heads = 0;
  int kv_begin = 0, kv_heads = 0;
};
HeadRange head_range(const AttnSpec& attn, int rank, int size);

// Vocabulary rows of every rank, padding included: rank r holds ids [r * n, (r + 1) * n).
constexpr std::int64_t vocab_per_rank(std::int64_t vocab, int size) { return (vocab + size - 1) / size; }

// Throws InvalidArgument when the heads or the inner size do not divide over `size` ranks.
void check_tensor_parallel(const ModelSpec& spec, int size);

}  // namespace fastllm

// Checkpoint tensors on their way into the engine. A host (the Python package, the bundle reader) maps files and lists,
// for every canonical weight of the spec, the tensors it is made of; slicing for tensor parallelism, conversion and
// packing happen inside, without further copies of the whole.
//
// Canonical names ({i} is the layer):
//   embed.tokens.weight [vocab, hidden]          embed.positions.weight [positions, hidden]
//   layers.{i}.{pre_attn,post_attn,pre_ffn,post_ffn}_norm.{weight,bias} [hidden]
//   layers.{i}.attn.qkv.{weight,bias} [(heads + 2 kv_heads) head_dim, hidden]     rows: all q heads, all k, all v
//   layers.{i}.attn.{q,k}_norm.{weight,bias} [head_dim]
//   layers.{i}.attn.out.{weight,bias} [hidden, heads head_dim]
//   layers.{i}.ffn.gate_up.{weight,bias} [2 inner, hidden] when gated, else layers.{i}.ffn.up.{weight,bias} [inner,
//   hidden] layers.{i}.ffn.down.{weight,bias} [hidden, inner] final_norm.{weight,bias} [hidden]            head.weight
//   [vocab, hidden] unless tied, head.bias [vocab]
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fastllm/model_spec.h"

namespace fastllm {

// Element formats found in checkpoints. The block formats are GGUF's, row by row; integers are parts of packed weights.
enum class SourceType : std::uint8_t {
  F32,
  F16,
  BF16,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q8_0,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,
  I8,
  I32,
  I64
};

struct Packing;

struct SourceTensor {
  std::string name;  // as in the checkpoint, for messages
  SourceType type = SourceType::F32;
  std::vector<std::int64_t> shape;  // row-major, the last dimension contiguous
  const void* data = nullptr;
  std::int64_t bytes = 0;             // readable from data
  std::shared_ptr<const void> owner;  // keeps data alive
  int interleaved_head_dim = 0;       // > 0: rows of each head are stored as rotary pairs (GGUF llama) and are put back
  std::shared_ptr<const Packing> packing = {};  // set: the tensor holds codes for a weight [out, in], in its own shape
};

// How the codes of a weight [out, in] lie in the integers of a checkpoint. Words are I32 and hold 32 / bits codes, the
// first in the lowest bits.
enum class CodeLayout : std::uint8_t {
  Gptq,  // codes [in / per word, out], zeros [groups, out / per word], scales [groups, out]
  Awq,  // codes [in, out / per word], zeros [groups, out / per word], scales [groups, out]; words of 8 adjacent outputs
        // in the order 0 2 4 6 1 3 5 7
  Rows,  // codes [out, in / per word], zeros [out / per word, groups], scales [out, groups], last words perhaps filled
         // in part; or all in I8, [out, in] and [out, groups], two's complement: 2^(bits-1) less
};

// What belongs to codes: in the group g of a column, w = scale[g] (code - zero[g]).
struct Packing {
  CodeLayout layout = CodeLayout::Gptq;
  int bits = 0;                 // 4 or 8
  std::int64_t group = 0;       // columns; 0: all
  bool zeros_less_one = false;  // as GPTQ first stored them
  SourceTensor scales;          // F32, F16 or BF16
  SourceTensor zeros;           // without data: 2^(bits-1) everywhere
  SourceTensor group_of;        // [in] I32 or I64, the group of each column; without data: column / group
};

enum class WeightTransform : std::uint8_t {
  Copy,          // one source
  Transpose,     // one source, stored [in, out]
  QkvConcat,     // q, k, v
  QkvGrouped,    // one source, rows grouped per kv head: its q heads, its k, its v
  GateUpConcat,  // gate, up
};

struct WeightBinding {
  std::string canonical;
  WeightTransform transform = WeightTransform::Copy;
  bool add_one = false;  // the checkpoint stores w - 1 (Gemma norms)
  std::vector<SourceTensor> sources;
};

struct ModelSource {
  ModelSpec spec;
  std::vector<WeightBinding> weights;
};

// Called from the loading thread: bytes of checkpoint data done, and in all.
using LoadProgress = std::function<void(std::int64_t done, std::int64_t total)>;

}  // namespace fastllm

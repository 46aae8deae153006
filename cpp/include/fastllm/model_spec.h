// A model as data. One decoder runtime executes every spec; a family is a function from its Hugging Face config to one
// of these. Serialised as JSON (spec.json of a bundle, and what Python hands over); see model/spec_json.h.
//
// One layer equation, absent norms being the identity:
//   a = attn(pre_attn(x))
//   parallel:  y = x + a + ffn(pre_ffn ? pre_ffn(x) : pre_attn(x))
//   otherwise: h = x + post_attn(a);  y = h + post_ffn(ffn(pre_ffn(h)))
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "fastllm/export.h"

namespace fastllm {

enum class NormKind : std::uint8_t { None, Rms, Layer };
enum class Activation : std::uint8_t { Silu, Gelu, GeluTanh, Relu };
enum class RopeStyle : std::uint8_t { Half, Interleaved };  // pairs (i, i + dim/2) or (2i, 2i + 1)
enum class RopeScalingKind : std::uint8_t { None, Linear, Dynamic, Llama3, Yarn, LongRope };

struct NormSpec {
  NormKind kind = NormKind::None;
  float eps = 1e-6f;
  bool bias = false;  // LayerNorm only
};

// Parameters as in Hugging Face's rope_scaling; unused ones keep their default.
struct RopeScaling {
  RopeScalingKind kind = RopeScalingKind::None;
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // Llama3
  double beta_fast = 32.0, beta_slow = 1.0;              // Yarn
  double attention_factor = 0.0;                         // Yarn, LongRope; 0: derived from factor
  double mscale = 0.0, mscale_all_dim = 0.0;             // Yarn
  bool truncate = true;                                  // Yarn
  int original_max_len = 0;                              // tokens
  std::vector<double> short_factor, long_factor;         // LongRope
};

struct RopeSpec {
  int dim = 0;  // rotated dimensions of a head; 0: no rotary embedding
  double theta = 10000.0;
  RopeStyle style = RopeStyle::Half;
  RopeScaling scaling;
};

struct AttnSpec {
  int heads = 0, kv_heads = 0, head_dim = 0;
  bool qkv_bias = false, out_bias = false;
  NormSpec q_norm, k_norm;  // per head, over head_dim
  RopeSpec rope;
  float scale = 0.0f;    // of q k^T; 0: 1 / sqrt(head_dim)
  float softcap = 0.0f;  // 0: off
  int window = 0;        // tokens attended to, the current one included; 0: all
  bool alibi = false;
};

struct MlpSpec {
  int inner = 0;
  bool gated = true;
  Activation act = Activation::Silu;
  bool bias = false;
};

struct LayerSpec {
  bool parallel = false;  // attention and feed-forward read the same residual
  NormSpec pre_attn, post_attn, pre_ffn, post_ffn;
  AttnSpec attn;
  MlpSpec ffn;
};

struct EmbedSpec {
  int vocab = 0, hidden = 0;
  float scale = 1.0f;
  int learned_positions = 0;  // rows of the table; 0: none
  int position_offset = 0;
};

struct HeadSpec {
  bool tied = false, bias = false;
  float softcap = 0.0f;
  float scale = 1.0f;
  NormSpec final_norm;
};

struct ModelSpec {
  std::string family;  // for messages only; nothing branches on it
  EmbedSpec embed;
  std::vector<LayerSpec> kinds;
  std::vector<int> layer_kind;  // per layer: index into kinds
  HeadSpec head;
  int max_len = 0;  // tokens the positions were made for
  std::vector<std::int32_t> eos;

  int num_layers() const { return static_cast<int>(layer_kind.size()); }
  const LayerSpec& layer(int i) const {
    return kinds[static_cast<std::size_t>(layer_kind[static_cast<std::size_t>(i)])];
  }
};

// Throws fastllm::Error naming the field, its value and what is allowed.
FASTLLM_API ModelSpec spec_from_json(std::string_view json);
FASTLLM_API std::string spec_to_json(const ModelSpec& spec);
FASTLLM_API void check_spec(const ModelSpec& spec);

}  // namespace fastllm

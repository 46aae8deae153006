// Models of known shapes with random weights, for benchmarks: Llama's layer, no checkpoint.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "fastllm/error.h"
#include "fastllm/weights.h"

namespace fastllm {

struct LlamaShape {
  int hidden, inner, layers, heads, kv_heads, head_dim, vocab, max_len;
  double theta;
  bool tied;
};

inline LlamaShape shape_named(const std::string& name) {
  if (name == "llama3-8b") return {4096, 14336, 32, 32, 8, 128, 128256, 8192, 500000, false};
  if (name == "llama3.2-1b") return {2048, 8192, 16, 32, 8, 64, 128256, 131072, 500000, true};
  if (name == "smollm2-135m") return {576, 1536, 30, 9, 3, 64, 49152, 8192, 100000, true};
  if (name == "tiny") return {64, 192, 2, 4, 2, 16, 512, 8192, 10000, true};
  if (name == "small") return {256, 704, 4, 8, 2, 32, 4096, 8192, 10000, false};
  throw InvalidArgument("shape '" + name + "' is unknown; use llama3-8b, llama3.2-1b, smollm2-135m, small or tiny");
}

inline ModelSpec llama_spec(const LlamaShape& s) {
  const NormSpec rms{NormKind::Rms, 1e-5f, false};
  LayerSpec layer;
  layer.pre_attn = layer.pre_ffn = rms;
  layer.attn.heads = s.heads, layer.attn.kv_heads = s.kv_heads, layer.attn.head_dim = s.head_dim;
  layer.attn.rope.dim = s.head_dim, layer.attn.rope.theta = s.theta;
  layer.ffn.inner = s.inner;
  ModelSpec spec;
  spec.family = "llama";
  spec.embed.vocab = s.vocab, spec.embed.hidden = s.hidden;
  spec.kinds = {layer};
  spec.layer_kind.assign(static_cast<std::size_t>(s.layers), 0);
  spec.head.tied = s.tied;
  spec.head.final_norm = rms;
  spec.max_len = s.max_len;
  return spec;
}

// Uniform bf16 weights of standard deviation 0.02, all views of one buffer as long as the largest, in which a few
// million values repeat; norms of ones.
class RandomWeights {
 public:
  explicit RandomWeights(std::int64_t longest)
      : values_(std::make_shared<std::vector<std::uint16_t>>(static_cast<std::size_t>(longest))) {
    constexpr std::size_t kPeriod = 4'194'301;  // a prime, so that no two rows of a matrix are equal
    std::vector<std::uint16_t>& v = *values_;
    const std::size_t made = std::min(v.size(), kPeriod);
    for (std::size_t i = 0; i < made; ++i) {
      const double unit = static_cast<double>(mix64(i + 1) >> 11) * 0x1p-53;  // [0, 1)
      v[i] = bf16(static_cast<float>((2 * unit - 1) * 0.02 * std::sqrt(3.0)));
    }
    for (std::size_t i = made; i < v.size(); i += made)
      std::copy_n(v.begin(), std::min(made, v.size() - i), v.begin() + static_cast<std::ptrdiff_t>(i));
  }

  WeightBinding matrix(const std::string& name, std::int64_t rows, std::int64_t cols) const {
    return {name,
            WeightTransform::Copy,
            false,
            {{name, SourceType::BF16, {rows, cols}, values_->data(), rows * cols * 2, values_, 0}}};
  }

  static WeightBinding ones(const std::string& name, std::int64_t size) {
    auto v = std::make_shared<std::vector<std::uint16_t>>(static_cast<std::size_t>(size), bf16(1));
    return {name, WeightTransform::Copy, false, {{name, SourceType::BF16, {size}, v->data(), size * 2, v, 0}}};
  }

 private:
  static std::uint16_t bf16(float value) {
    return static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(value) + 0x8000u) >> 16);
  }

  std::shared_ptr<std::vector<std::uint16_t>> values_;
};

inline ModelSource random_model(const LlamaShape& s) {
  ModelSource source;
  source.spec = llama_spec(s);
  const std::int64_t hidden = s.hidden, inner = s.inner, heads = std::int64_t{s.heads} * s.head_dim;
  const std::int64_t qkv = heads + 2 * std::int64_t{s.kv_heads} * s.head_dim;
  const RandomWeights random(std::max({s.vocab * hidden, 2 * inner * hidden, qkv * hidden}));
  auto& w = source.weights;
  w.push_back(random.matrix("embed.tokens.weight", s.vocab, hidden));
  for (int i = 0; i < s.layers; ++i) {
    const std::string layer = "layers." + std::to_string(i) + ".";
    w.push_back(RandomWeights::ones(layer + "pre_attn_norm.weight", hidden));
    w.push_back(random.matrix(layer + "attn.qkv.weight", qkv, hidden));
    w.push_back(random.matrix(layer + "attn.out.weight", hidden, heads));
    w.push_back(RandomWeights::ones(layer + "pre_ffn_norm.weight", hidden));
    w.push_back(random.matrix(layer + "ffn.gate_up.weight", 2 * inner, hidden));
    w.push_back(random.matrix(layer + "ffn.down.weight", hidden, inner));
  }
  w.push_back(RandomWeights::ones("final_norm.weight", hidden));
  if (!s.tied) w.push_back(random.matrix("head.weight", s.vocab, hidden));
  return source;
}

}  // namespace fastllm

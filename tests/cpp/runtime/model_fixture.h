// Small models with random weights, one per layer structure the decoder must execute, and how to run them.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fastllm/weights.h"
#include "model/canonical.h"

namespace fastllm::testing {

// fp32 weights by canonical name.
struct TestModel {
  ModelSpec spec;
  std::map<std::string, std::vector<float>> weights;

  const std::vector<float>& operator[](const std::string& name) const { return weights.at(name); }
  bool has(const std::string& name) const { return weights.contains(name); }

  // Borrows this model's weights.
  ModelSource source() const {
    ModelSource s;
    s.spec = spec;
    for (const auto& w : canonical_weights(spec)) {
      const auto& values = weights.at(w.name);
      SourceTensor t;
      t.name = w.name;
      t.shape = w.shape;
      t.data = values.data();
      t.bytes = static_cast<std::int64_t>(values.size() * sizeof(float));
      s.weights.push_back({w.name, WeightTransform::Copy, false, {t}});
    }
    return s;
  }
};

// Weights that keep activations near one, and logits far enough apart for greedy choices to be stable.
inline TestModel random_model(const ModelSpec& spec, std::uint32_t seed) {
  TestModel m;
  m.spec = spec;
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  for (const auto& w : canonical_weights(spec)) {
    std::int64_t n = 1;
    for (auto d : w.shape) n *= d;
    const bool norm_weight = w.name.ends_with("norm.weight"), matrix = w.shape.size() == 2;
    const bool embedding = w.name.starts_with("embed.");
    const float scale = embedding ? 0.7f : matrix ? 1.2f / std::sqrt(static_cast<float>(w.shape[1])) : 0.2f;
    auto& values = m.weights[w.name];
    for (std::int64_t i = 0; i < n; ++i) values.push_back((norm_weight ? 1.0f : 0.0f) + scale * normal(rng));
  }
  return m;
}

struct NamedSpec {
  std::string name;
  ModelSpec spec;
};

// Llama: RMS norms, gated SiLU, grouped queries, half rotary.
inline ModelSpec llama_spec() {
  ModelSpec s;
  s.family = "test";
  s.embed.vocab = 97;  // not a multiple of any rank count
  s.embed.hidden = 64;
  s.max_len = 128;
  LayerSpec l;
  l.pre_attn.kind = l.pre_ffn.kind = NormKind::Rms;
  l.attn.heads = 4, l.attn.kv_heads = 2, l.attn.head_dim = 16;
  l.attn.rope.dim = 16;
  l.ffn.inner = 96;
  s.kinds = {l};
  s.layer_kind = {0, 0, 0};
  s.head.final_norm.kind = NormKind::Rms;
  s.eos = {1};
  return s;
}

inline std::vector<NamedSpec> test_specs() {
  std::vector<NamedSpec> all;
  auto add = [&](const char* name, auto change) {
    ModelSpec s = llama_spec();
    change(s, s.kinds[0]);
    all.push_back({name, s});
  };
  auto layer_norms = [](ModelSpec& s, LayerSpec& l) {
    for (NormSpec* n : {&l.pre_attn, &l.pre_ffn, &s.head.final_norm}) *n = {NormKind::Layer, 1e-5f, true};
    l.attn.qkv_bias = l.attn.out_bias = l.ffn.bias = true;
    l.attn.kv_heads = l.attn.heads;
    l.ffn.gated = false;
    l.ffn.act = Activation::GeluTanh;
  };
  add("llama", [](ModelSpec&, LayerSpec&) {});
  add("llama_tied_scaled", [](ModelSpec& s, LayerSpec&) {
    s.head.tied = true;
    s.embed.scale = 8.0f;
    s.head.scale = 0.25f;
  });
  add("qwen2_qkv_bias", [](ModelSpec&, LayerSpec& l) { l.attn.qkv_bias = true; });
  add("qwen3_qk_norm", [](ModelSpec&, LayerSpec& l) {
    l.attn.q_norm.kind = l.attn.k_norm.kind = NormKind::Rms;
    l.attn.head_dim = 32;
    l.attn.rope.dim = 32;
  });
  add("gemma2_sandwich_softcap_windows", [](ModelSpec& s, LayerSpec& l) {
    l.post_attn.kind = l.post_ffn.kind = NormKind::Rms;
    l.attn.softcap = 20.0f;
    l.attn.scale = 0.2f;
    l.ffn.act = Activation::GeluTanh;
    s.head.softcap = 10.0f;
    s.head.tied = true;
    LayerSpec windowed = l;
    windowed.attn.window = 7;
    windowed.attn.rope.theta = 1000.0;
    s.kinds.push_back(windowed);
    s.layer_kind = {1, 0, 1, 0};
  });
  add("gpt2_learned_positions", [&](ModelSpec& s, LayerSpec& l) {
    layer_norms(s, l);
    l.attn.rope.dim = 0;
    s.embed.learned_positions = 130;
    s.embed.position_offset = 2;
    s.head.tied = true;
  });
  add("neox_parallel_partial_rotary", [&](ModelSpec& s, LayerSpec& l) {
    layer_norms(s, l);
    l.parallel = true;
    l.attn.rope.dim = 4;
    l.ffn.act = Activation::Gelu;
  });
  add("phi_parallel_shared_norm_head_bias", [&](ModelSpec& s, LayerSpec& l) {
    layer_norms(s, l);
    l.parallel = true;
    l.pre_ffn = {};
    l.attn.rope.dim = 8;
    s.head.bias = true;
  });
  add("gptj_interleaved", [](ModelSpec&, LayerSpec& l) { l.attn.rope.style = RopeStyle::Interleaved; });
  add("falcon_one_kv_head_alibi", [](ModelSpec&, LayerSpec& l) {
    l.attn.kv_heads = 1;
    l.attn.rope.dim = 0;
    l.attn.alibi = true;
  });
  add("olmo2_post_norms_only", [](ModelSpec&, LayerSpec& l) {
    l.post_attn.kind = l.post_ffn.kind = NormKind::Rms;
    l.pre_attn = l.pre_ffn = {};
  });
  add("dense_and_narrow_layers", [](ModelSpec& s, LayerSpec& l) {
    LayerSpec other = l;
    other.ffn.inner = 32;
    other.ffn.gated = false;
    other.ffn.act = Activation::Relu;
    other.attn.heads = 8;
    s.kinds.push_back(other);
    s.layer_kind = {0, 1, 0};
  });
  return all;
}

}  // namespace fastllm::testing

// Bounds of a ModelSpec. They are generous for real models and small enough that no product of two sizes overflows and
// no table made from a hostile spec is absurd.
#include <cmath>
#include <string>

#include "fastllm/error.h"
#include "fastllm/model_spec.h"

namespace fastllm {
namespace {

[[noreturn]] void fail(const std::string& field, const std::string& what) {
  throw InvalidArgument("model spec: " + field + " " + what);
}

void in_range(const std::string& field, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high)
    fail(field, "is " + std::to_string(value) + "; allowed are " + std::to_string(low) + " to " + std::to_string(high));
}

void non_negative(const std::string& field, double value) {
  if (!std::isfinite(value) || value < 0) fail(field, "is " + std::to_string(value) + "; it must be finite and >= 0");
}

void positive(const std::string& field, double value) {
  if (!std::isfinite(value) || value <= 0) fail(field, "is " + std::to_string(value) + "; it must be finite and > 0");
}

void check_norm(const std::string& field, const NormSpec& n) {
  non_negative(field + ".eps", static_cast<double>(n.eps));
  if (n.bias && n.kind != NormKind::Layer) fail(field + ".bias", "is true; only layer norms have a bias");
}

void check_factors(const std::string& field, const std::vector<double>& factors, int dim) {
  if (factors.size() != static_cast<std::size_t>(dim / 2))
    fail(field, "has " + std::to_string(factors.size()) + " entries; rope.dim / 2 = " + std::to_string(dim / 2) +
                    " are needed");
  for (double f : factors) positive(field, f);
}

void check_rope(const std::string& field, const RopeSpec& r, int head_dim) {
  in_range(field + ".dim", r.dim, 0, head_dim);
  if (r.dim % 2 != 0) fail(field + ".dim", "is " + std::to_string(r.dim) + "; it must be even");
  if (r.dim == 0) return;
  positive(field + ".theta", r.theta);
  const RopeScaling& s = r.scaling;
  const std::string name = field + ".scaling";
  positive(name + ".factor", s.factor);
  non_negative(name + ".attention_factor", s.attention_factor);
  if (s.kind == RopeScalingKind::None || s.kind == RopeScalingKind::Linear) return;
  in_range(name + ".original_max_len", s.original_max_len, 1, 1 << 27);
  switch (s.kind) {
    case RopeScalingKind::Dynamic:
      if (r.dim < 4) fail(field + ".dim", "is 2; dynamic scaling needs at least 4");
      break;
    case RopeScalingKind::Llama3:
      positive(name + ".low_freq_factor", s.low_freq_factor);
      positive(name + ".high_freq_factor", s.high_freq_factor);
      if (s.high_freq_factor <= s.low_freq_factor)
        fail(name + ".high_freq_factor", "must be greater than low_freq_factor");
      break;
    case RopeScalingKind::Yarn:
      positive(name + ".beta_fast", s.beta_fast);
      positive(name + ".beta_slow", s.beta_slow);
      non_negative(name + ".mscale", s.mscale);
      non_negative(name + ".mscale_all_dim", s.mscale_all_dim);
      if (r.theta <= 1) fail(field + ".theta", "must be greater than 1 for yarn scaling");
      break;
    case RopeScalingKind::LongRope:
      check_factors(name + ".short_factor", s.short_factor, r.dim);
      check_factors(name + ".long_factor", s.long_factor, r.dim);
      if (s.original_max_len < 2) fail(name + ".original_max_len", "must be at least 2 for longrope scaling");
      break;
    case RopeScalingKind::None:
    case RopeScalingKind::Linear:
      break;
  }
}

void check_layer(const std::string& field, const LayerSpec& l) {
  check_norm(field + ".pre_attn", l.pre_attn);
  check_norm(field + ".post_attn", l.post_attn);
  check_norm(field + ".pre_ffn", l.pre_ffn);
  check_norm(field + ".post_ffn", l.post_ffn);
  if (l.parallel && (l.post_attn.kind != NormKind::None || l.post_ffn.kind != NormKind::None))
    fail(field, "is parallel and has a norm after a branch; the layer equation has no such term");
  const AttnSpec& a = l.attn;
  in_range(field + ".attn.heads", a.heads, 1, 1 << 14);
  in_range(field + ".attn.kv_heads", a.kv_heads, 1, a.heads);
  in_range(field + ".attn.head_dim", a.head_dim, 1, 1 << 12);
  if (a.heads % a.kv_heads != 0)
    fail(field + ".attn.heads",
         "is " + std::to_string(a.heads) + ", not a multiple of kv_heads " + std::to_string(a.kv_heads));
  check_norm(field + ".attn.q_norm", a.q_norm);
  check_norm(field + ".attn.k_norm", a.k_norm);
  if (a.q_norm.bias || a.k_norm.bias) fail(field + ".attn", "has a bias in its q or k norm, which is not computed");
  check_rope(field + ".attn.rope", a.rope, a.head_dim);
  non_negative(field + ".attn.scale", static_cast<double>(a.scale));
  non_negative(field + ".attn.softcap", static_cast<double>(a.softcap));
  in_range(field + ".attn.window", a.window, 0, 1 << 27);
  in_range(field + ".ffn.inner", l.ffn.inner, 1, 1 << 24);
}

}  // namespace

void check_spec(const ModelSpec& s) {
  in_range("embed.vocab", s.embed.vocab, 1, 1 << 24);
  in_range("embed.hidden", s.embed.hidden, 1, 1 << 18);
  if (!std::isfinite(s.embed.scale)) fail("embed.scale", "is not finite");
  in_range("embed.learned_positions", s.embed.learned_positions, 0, 1 << 24);
  in_range("embed.position_offset", s.embed.position_offset, 0, 1 << 24);
  in_range("max_len", s.max_len, 1, 1 << 27);
  if (s.embed.learned_positions > 0 && std::int64_t{s.max_len} + s.embed.position_offset > s.embed.learned_positions)
    fail("max_len", "is " + std::to_string(s.max_len) +
                        ", more than the learned positions allow: " + std::to_string(s.embed.learned_positions) +
                        " rows, the first " + std::to_string(s.embed.position_offset) + " unused");

  in_range("the number of kinds", static_cast<std::int64_t>(s.kinds.size()), 1, 4096);
  in_range("the number of layers", static_cast<std::int64_t>(s.layer_kind.size()), 1, 4096);
  for (std::size_t i = 0; i < s.layer_kind.size(); ++i)
    in_range("layer_kind[" + std::to_string(i) + "]", s.layer_kind[i], 0,
             static_cast<std::int64_t>(s.kinds.size()) - 1);
  for (std::size_t k = 0; k < s.kinds.size(); ++k) {
    const std::string name = "kinds[" + std::to_string(k) + "]";
    check_layer(name, s.kinds[k]);
    const AttnSpec &a = s.kinds[k].attn, &first = s.kinds[0].attn;
    if (a.kv_heads != first.kv_heads || a.head_dim != first.head_dim)
      fail(name + ".attn", "has other kv_heads or head_dim than kinds[0]; all layers share one KV block shape");
  }

  check_norm("head.final_norm", s.head.final_norm);
  non_negative("head.softcap", static_cast<double>(s.head.softcap));
  if (!std::isfinite(s.head.scale)) fail("head.scale", "is not finite");
  for (auto id : s.eos) in_range("eos", id, 0, s.embed.vocab - 1);
}

}  // namespace fastllm

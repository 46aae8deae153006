#include "model/canonical.h"

#include "fastllm/error.h"

namespace fastllm {
namespace {

class Lister {
 public:
  void set_layer(int layer) {
    layer_ = layer;
    prefix_ = layer_prefix(layer);
  }
  void leave_layers() {
    layer_ = -1;
    prefix_.clear();
  }
  void add(const std::string& name, std::vector<std::int64_t> shape, ShardAxis axis = ShardAxis::Replicated) {
    out.push_back({prefix_ + name, std::move(shape), axis, layer_});
  }
  void norm(const std::string& name, const NormSpec& spec, std::int64_t n) {
    if (spec.kind == NormKind::None) return;
    add(name + ".weight", {n});
    if (spec.bias) add(name + ".bias", {n});
  }
  // The bias of a linear that is cut by columns is whole everywhere: its sum over ranks needs it once.
  void linear(const std::string& name, std::int64_t rows, std::int64_t cols, bool bias, ShardAxis axis) {
    add(name + ".weight", {rows, cols}, axis);
    if (bias) add(name + ".bias", {rows}, axis == ShardAxis::Columns ? ShardAxis::Replicated : axis);
  }

  std::vector<CanonicalWeight> out;

 private:
  int layer_ = -1;
  std::string prefix_;
};

}  // namespace

std::string layer_prefix(int layer) { return "layers." + std::to_string(layer) + "."; }

std::vector<CanonicalWeight> canonical_weights(const ModelSpec& spec) {
  const std::int64_t hidden = spec.embed.hidden, vocab = spec.embed.vocab;
  Lister list;
  list.add("embed.tokens.weight", {vocab, hidden}, ShardAxis::Vocab);
  if (spec.embed.learned_positions > 0) list.add("embed.positions.weight", {spec.embed.learned_positions, hidden});
  for (int i = 0; i < spec.num_layers(); ++i) {
    const LayerSpec& l = spec.layer(i);
    const std::int64_t head_dim = l.attn.head_dim, inner = l.ffn.inner;
    list.set_layer(i);
    list.norm("pre_attn_norm", l.pre_attn, hidden);
    list.linear("attn.qkv", (l.attn.heads + 2 * l.attn.kv_heads) * head_dim, hidden, l.attn.qkv_bias,
                ShardAxis::QkvRows);
    list.norm("attn.q_norm", l.attn.q_norm, head_dim);
    list.norm("attn.k_norm", l.attn.k_norm, head_dim);
    list.linear("attn.out", hidden, l.attn.heads * head_dim, l.attn.out_bias, ShardAxis::Columns);
    list.norm("post_attn_norm", l.post_attn, hidden);
    list.norm("pre_ffn_norm", l.pre_ffn, hidden);
    if (l.ffn.gated) list.linear("ffn.gate_up", 2 * inner, hidden, l.ffn.bias, ShardAxis::GateUpRows);
    if (!l.ffn.gated) list.linear("ffn.up", inner, hidden, l.ffn.bias, ShardAxis::Rows);
    list.linear("ffn.down", hidden, inner, l.ffn.bias, ShardAxis::Columns);
    list.norm("post_ffn_norm", l.post_ffn, hidden);
  }
  list.leave_layers();
  list.norm("final_norm", spec.head.final_norm, hidden);
  if (!spec.head.tied) list.add("head.weight", {vocab, hidden}, ShardAxis::Vocab);
  if (spec.head.bias) list.add("head.bias", {vocab}, ShardAxis::Vocab);
  return std::move(list.out);
}

HeadRange head_range(const AttnSpec& a, int rank, int size) {
  HeadRange r;
  r.heads = a.heads / size;
  r.q_begin = rank * r.heads;
  r.kv_heads = a.kv_heads >= size ? a.kv_heads / size : 1;
  r.kv_begin = static_cast<int>(std::int64_t{rank} * a.kv_heads / size);
  return r;
}

void check_tensor_parallel(const ModelSpec& spec, int size) {
  auto fail = [&](const std::string& what) {
    throw InvalidArgument("tensor parallelism over " + std::to_string(size) + " ranks: " + what);
  };
  for (const LayerSpec& l : spec.kinds) {
    const AttnSpec& a = l.attn;
    if (a.heads % size != 0) fail("the " + std::to_string(a.heads) + " attention heads cannot be divided evenly");
    if (a.kv_heads % size != 0 && size % a.kv_heads != 0)
      fail("the " + std::to_string(a.kv_heads) + " kv heads neither divide evenly nor repeat evenly");
    if (l.ffn.inner % size != 0)
      fail("the " + std::to_string(l.ffn.inner) + " inner dimensions of the feed-forward cannot be divided evenly");
  }
}

}  // namespace fastllm

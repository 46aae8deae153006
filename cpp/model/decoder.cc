// With one rank and no post-norm a branch is accumulated straight into the residual by its last linear. Otherwise its
// sum stays pending until the next norm, which adds it on the way (add_norm).
#include "model/decoder.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "fastllm/error.h"
#include "model/canonical.h"
#include "model/rope.h"

namespace fastllm {

Decoder::Decoder(const ModelSpec& spec, const DecoderConfig& config, Backend& backend, Communicator& comm,
                 DecoderWeights weights)
    : spec_(spec), config_(config), backend_(backend), comm_(comm), weights_(std::move(weights)) {
  const EmbedSpec& e = spec_.embed;
  if (e.learned_positions > 0 && std::int64_t{config_.max_len} + e.position_offset > e.learned_positions)
    throw InvalidArgument("max_model_len " + std::to_string(config_.max_len) + " exceeds the " +
                          std::to_string(e.learned_positions - e.position_offset) + " learned positions of the model");
  // Without a norm in front, the fp32 residual itself is the input of a linear.
  auto bare = [](const LayerSpec& l) {
    return l.pre_attn.kind == NormKind::None || (!l.parallel && l.pre_ffn.kind == NormKind::None);
  };
  if (config_.dtype != DType::F32 &&
      (spec_.head.final_norm.kind == NormKind::None || std::any_of(spec_.kinds.begin(), spec_.kinds.end(), bare)))
    throw InvalidArgument(
        std::string("dtype ") + name_of(config_.dtype) +
        " needs a norm before every branch and the head, which this model does not have; use float32");
  const AttnSpec& a = spec_.kinds[0].attn;
  kv_shape_ = {config_.kv_dtype, spec_.num_layers(), head_range(a, comm_.rank(), comm_.size()).kv_heads,
               config_.block_size, a.head_dim};
  for (const LayerSpec& l : spec_.kinds) kinds_.push_back(make_kind(l));
  allocate_scratch();
}

Decoder::Kind Decoder::make_kind(const LayerSpec& l) const {
  const AttnSpec& a = l.attn;
  const HeadRange h = head_range(a, comm_.rank(), comm_.size());
  Kind k;
  k.inner = l.ffn.inner / comm_.size();
  k.attn.heads = h.heads;
  k.attn.kv_heads = h.kv_heads;
  k.attn.head_dim = a.head_dim;
  k.attn.scale = a.scale != 0 ? a.scale : 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  k.attn.softcap = a.softcap;
  k.attn.window = a.window;
  if (a.alibi) {
    const auto all = alibi_slopes(a.heads);
    k.alibi.assign(all.begin() + h.q_begin, all.begin() + h.q_begin + h.heads);
    k.attn.alibi_slopes = k.alibi;  // a moved vector keeps its elements where they are
  }
  if (a.rope.dim > 0) {
    k.rope_table = DeviceVector(backend_, rope_table(a.rope, config_.max_len));
    k.rope = {k.rope_table.get(), a.rope.dim, a.rope.style};
  }
  return k;
}

Decoder::Scratch Decoder::scratch(std::int64_t rows, std::int64_t cols, DType dtype) const {
  const auto bytes = static_cast<std::size_t>(rows * cols) * size_of(dtype);
  return {backend_.allocate(bytes, MemoryKind::Lazy), dtype};
}

void Decoder::allocate_scratch() {
  const std::int64_t tokens = config_.max_step_tokens, rows = config_.max_logit_rows, hidden = spec_.embed.hidden;
  std::int64_t heads = 0, up = 0, gated = 0;
  bool own_ffn_norm = false, post_norm = false;
  for (std::size_t i = 0; i < kinds_.size(); ++i) {
    const LayerSpec& l = spec_.kinds[i];
    const std::int64_t inner = kinds_[i].inner;
    heads = std::max<std::int64_t>(heads, kinds_[i].attn.heads);
    up = std::max(up, l.ffn.gated ? 2 * inner : inner);
    if (l.ffn.gated) gated = std::max(gated, inner);
    own_ffn_norm |= l.parallel && l.pre_ffn.kind != NormKind::None;
    post_norm |= l.post_attn.kind != NormKind::None || l.post_ffn.kind != NormKind::None;
  }
  const std::int64_t head_dim = kv_shape_.head_dim;
  residual_ = scratch(tokens, hidden, DType::F32);
  if (comm_.size() > 1 || post_norm) delta_ = scratch(tokens, hidden, DType::F32);
  if (post_norm) post_ = scratch(tokens, hidden, DType::F32);
  hidden_ = scratch(tokens, hidden, config_.dtype);
  if (own_ffn_norm) hidden_ffn_ = scratch(tokens, hidden, config_.dtype);
  qkv_ = scratch(tokens, (heads + 2 * kv_shape_.kv_heads) * head_dim, config_.dtype);
  attn_ = scratch(tokens, heads * head_dim, config_.dtype);
  up_ = scratch(tokens, up, config_.dtype);
  if (gated > 0) gated_ = scratch(tokens, gated, config_.dtype);
  last_ = scratch(rows, hidden, DType::F32);
  last_hidden_ = scratch(rows, hidden, config_.dtype);
  last_attn_ = scratch(rows, heads * head_dim, config_.dtype);
  const std::int64_t part = vocab_per_rank(spec_.embed.vocab, comm_.size());
  if (comm_.size() > 1) part_logits_ = scratch(rows, part, DType::F32);
  logits_ = scratch(rows, part * comm_.size(), DType::F32);
}

void Decoder::forward(const Step& step, int num_tokens, void* kv_pool, int logit_rows) {
  num_tokens_ = num_tokens;
  stream_ = &residual_;
  assert(num_tokens_ > 0 && num_tokens_ <= config_.max_step_tokens);
  const EmbedSpec& e = spec_.embed;
  const Tensor x = residual_.view(num_tokens_, e.hidden);
  const std::int64_t first_id = comm_.rank() * vocab_per_rank(e.vocab, comm_.size());
  backend_.embed(x, step, *weights_.tokens, first_id, e.scale);
  comm_.all_reduce(x);
  if (e.learned_positions > 0) {
    // The table is viewed from its first used row on, so positions need no shift.
    const Tensor table(const_cast<float*>(weights_.positions.get()), DType::F32, {e.learned_positions, e.hidden});
    backend_.add_positions(x, step, table.slice(e.position_offset, e.learned_positions - e.position_offset));
  }
  const int last = spec_.num_layers() - 1;
  for (int i = 0; i < last; ++i) run_layer(i, step, kv_pool, num_tokens_);
  run_layer(last, step, kv_pool, logit_rows == kAllTokens ? num_tokens_ : logit_rows);
  if (pending_ != nullptr) backend_.add(stream_->view(num_tokens_, e.hidden), pending_->view(num_tokens_, e.hidden));
  pending_ = nullptr;
}

void Decoder::run_layer(int layer, const Step& step, void* kv_pool, std::int64_t kept) {
  const LayerSpec& l = spec_.layer(layer);
  const LayerWeights& w = weights_.layers[static_cast<std::size_t>(layer)];
  const Tensor in = norm_residual(hidden_, l.pre_attn, w.pre_attn);
  Tensor ffn_in = in;
  if (l.parallel && l.pre_ffn.kind != NormKind::None) ffn_in = norm_residual(hidden_ffn_, l.pre_ffn, w.pre_ffn);
  Tensor attended = attention(layer, in, step, kv_pool, kept);
  if (kept < num_tokens_) {
    if (kept > 0) {
      attended = keep(last_attn_, attended, step, kept);
      if (l.parallel) ffn_in = keep(last_hidden_, ffn_in, step, kept);
      keep(last_, residual_.view(num_tokens_, spec_.embed.hidden), step, kept);
    }
    stream_ = &last_;
    num_tokens_ = kept;
    if (kept == 0) return;
  }
  project(attended, w.out, l.post_attn);
  if (!l.parallel) {
    end_branch(l.post_attn, w.post_attn);
    ffn_in = norm_residual(hidden_, l.pre_ffn, w.pre_ffn);
  }
  project(feed_forward(layer, ffn_in), w.down, l.post_ffn);
  end_branch(l.post_ffn, w.post_ffn);
}

Tensor Decoder::keep(const Scratch& to, const Tensor& x, const Step& step, std::int64_t rows) {
  const Tensor out = to.view(rows, x.cols());
  backend_.gather_logit_rows(out, x, step);
  return out;
}

Tensor Decoder::attention(int layer, const Tensor& in, const Step& step, void* kv_pool, std::int64_t kept) {
  const AttnSpec& spec = spec_.layer(layer).attn;
  const LayerWeights& w = weights_.layers[static_cast<std::size_t>(layer)];
  const Kind& kind = kinds_[static_cast<std::size_t>(spec_.layer_kind[static_cast<std::size_t>(layer)])];
  const std::int64_t q_width = std::int64_t{kind.attn.heads} * kind.attn.head_dim;
  const std::int64_t kv_width = std::int64_t{kind.attn.kv_heads} * kind.attn.head_dim;
  const Tensor qkv = qkv_.view(num_tokens_, q_width + 2 * kv_width), out = attn_.view(num_tokens_, q_width);
  const KvView kv = layer_view(kv_pool, kv_shape_, layer);
  backend_.linear(qkv, in, *w.qkv.weight, w.qkv.bias.get(), false);
  backend_.qk_norm_rope_write_kv(qkv, step, kind.attn.heads, spec.q_norm, w.q_norm.weight.get(), spec.k_norm,
                                 w.k_norm.weight.get(), kind.rope, kv);
  if (kept > 0) backend_.attention(out, qkv.columns(0, q_width), step, kv, kind.attn);
  return out;
}

Tensor Decoder::feed_forward(int layer, const Tensor& in) {
  const MlpSpec& spec = spec_.layer(layer).ffn;
  const LayerWeights& w = weights_.layers[static_cast<std::size_t>(layer)];
  const int inner = kinds_[static_cast<std::size_t>(spec_.layer_kind[static_cast<std::size_t>(layer)])].inner;
  const Tensor up = up_.view(num_tokens_, spec.gated ? 2 * inner : inner);
  if (!spec.gated) {
    backend_.linear(up, in, *w.up.weight, w.up.bias.get(), false);
    backend_.act(up, spec.act);
    return up;
  }
  const Tensor out = gated_.view(num_tokens_, inner);
  backend_.gated_linear(out, up, in, *w.up.weight, w.up.bias.get(), spec.act);
  return out;
}

Tensor Decoder::norm_residual(const Scratch& out, const NormSpec& spec, const NormWeights& w) {
  const Tensor y = out.view(num_tokens_, spec_.embed.hidden), x = stream_->view(num_tokens_, spec_.embed.hidden);
  if (pending_ != nullptr && spec.kind != NormKind::None) {
    backend_.add_norm(y, x, pending_->view(num_tokens_, spec_.embed.hidden), spec, w.weight.get(), w.bias.get());
  } else {
    if (pending_ != nullptr) backend_.add(x, pending_->view(num_tokens_, spec_.embed.hidden));
    norm_or_copy(y, x, spec, w);
  }
  pending_ = nullptr;
  return y;
}

void Decoder::norm_or_copy(const Tensor& out, const Tensor& x, const NormSpec& spec, const NormWeights& w) {
  if (spec.kind != NormKind::None) {
    backend_.norm(out, x, spec, w.weight.get(), w.bias.get());
  } else {
    backend_.copy(out.data, x.data, x.bytes());
  }
}

void Decoder::project(const Tensor& in, const LinearWeights& w, const NormSpec& post) {
  if (comm_.size() == 1 && post.kind == NormKind::None) {
    backend_.linear(stream_->view(num_tokens_, spec_.embed.hidden), in, *w.weight, w.bias.get(), true);
  } else {
    backend_.linear(delta_.view(num_tokens_, spec_.embed.hidden), in, *w.weight, w.bias.get(), branch_begun_);
    branch_begun_ = true;
  }
}

void Decoder::end_branch(const NormSpec& post, const NormWeights& w) {
  if (!branch_begun_) return;
  branch_begun_ = false;
  const Tensor delta = delta_.view(num_tokens_, spec_.embed.hidden);
  comm_.all_reduce(delta);
  pending_ = &delta_;
  if (post.kind == NormKind::None) return;
  backend_.norm(post_.view(num_tokens_, spec_.embed.hidden), delta, post, w.weight.get(), w.bias.get());
  pending_ = &post_;
}

Tensor Decoder::logits(const Step& step, int rows) {
  const Tensor residual = stream_->view(num_tokens_, spec_.embed.hidden);
  if (rows == num_tokens_) return head(residual);  // every row that is left is a logit row
  const Tensor x = last_.view(rows, spec_.embed.hidden);
  backend_.gather_logit_rows(x, residual, step);
  return head(x);
}

Tensor Decoder::logits(std::span<const std::int32_t> tokens) {
  const Tensor x = last_.view(static_cast<std::int64_t>(tokens.size()), spec_.embed.hidden);
  backend_.gather_rows(x, residual_.view(num_tokens_, spec_.embed.hidden), tokens);
  return head(x);
}

Tensor Decoder::logits_view(int rows) const {
  const std::int64_t part_vocab = vocab_per_rank(spec_.embed.vocab, comm_.size());
  return logits_.view(rows, part_vocab * comm_.size()).columns(0, spec_.embed.vocab);
}

Tensor Decoder::head(const Tensor& x) {
  const std::int64_t rows = x.rows();
  assert(rows > 0 && rows <= config_.max_logit_rows);
  const HeadSpec& head = spec_.head;
  const std::int64_t part_vocab = vocab_per_rank(spec_.embed.vocab, comm_.size());
  const Tensor y = last_hidden_.view(rows, spec_.embed.hidden);
  norm_or_copy(y, x, head.final_norm, weights_.final_norm);

  const PackedWeight& w = head.tied ? *weights_.tokens : *weights_.head.weight;
  const Tensor all = logits_.view(rows, part_vocab * comm_.size());
  if (comm_.size() == 1) {
    backend_.linear(all, y, w, weights_.head.bias.get(), false);
  } else {
    const Tensor part = part_logits_.view(rows, part_vocab);
    backend_.linear(part, y, w, weights_.head.bias.get(), false);
    comm_.all_gather_columns(part, all);
  }
  const Tensor out = all.columns(0, spec_.embed.vocab);
  if (head.scale != 1.0f || head.softcap != 0.0f) backend_.scale_softcap(out, head.scale, head.softcap);
  return out;
}

}  // namespace fastllm

#include "model/decoder_weights.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "fastllm/error.h"
#include "model/dequant_groups.h"

namespace fastllm {
namespace {

class Packer {
 public:
  Packer(const WeightLoader& loader, Backend& backend, DType compute, const LoadProgress& progress,
         Quantization quantization)
      : loader_(loader), backend_(backend), compute_(compute), progress_(progress), quantization_(quantization) {}

  std::unique_ptr<PackedWeight> matrix(const std::string& name, WeightUse use) {
    const OwnGroups own = loader_.own_groups(name);
    if (!own.why_none.empty()) inflated_.push_back(name + ": " + own.why_none);
    auto packed = backend_.pack(watched(name, choose_groups(quantization_, use, own.format)), compute_);
    report(name);
    return packed;
  }
  DeviceVector vector(const std::string& name) {
    DeviceVector v(backend_, loader_.vector(name));
    report(name);
    return v;
  }
  NormWeights norm(const std::string& name, const NormSpec& spec) {
    NormWeights w;
    if (spec.kind != NormKind::None) w.weight = vector(name + ".weight");
    if (spec.kind != NormKind::None && spec.bias) w.bias = vector(name + ".bias");
    return w;
  }
  LinearWeights linear(const std::string& name, bool bias) {
    LinearWeights w;
    w.weight = matrix(name + ".weight", WeightUse::Linear);
    if (bias) w.bias = vector(name + ".bias");
    return w;
  }
  // Cut by columns: the ranks' outputs are summed, so only one of them adds the bias.
  LinearWeights summed_linear(const std::string& name, bool bias) { return linear(name, bias && loader_.rank() == 0); }

  DeviceVector positions(const std::string& name) {
    const HostMatrix m = loader_.matrix(name);
    std::vector<float> values(static_cast<std::size_t>(m.rows * m.cols));
    m.read(0, m.rows, values.data());
    report(name);
    return {backend_, values};
  }

  std::vector<std::string> take_inflated() { return std::move(inflated_); }

 private:
  // The matrix, reporting while it is read: a large one would otherwise be done all at once. Any thread may read it;
  // the loading thread reports what all have read.
  HostMatrix watched(const std::string& name, const GroupFormat& groups) {
    HostMatrix matrix = loader_.matrix(name, groups);
    const std::int64_t row_bytes = loader_.source_bytes(name) / std::max<std::int64_t>(matrix.rows, 1);
    const auto rows = std::make_shared<std::atomic<std::int64_t>>(0);
    const auto count = [this, row_bytes, rows, loading = std::this_thread::get_id()](std::int64_t n) {
      const std::int64_t read = rows->fetch_add(n, std::memory_order_relaxed) + n;
      if (std::this_thread::get_id() == loading) report_within(read * row_bytes);
    };
    const auto watch = [&count](auto& read) {
      if (!read) return;
      read = [whole = std::move(read), count](std::int64_t begin, std::int64_t end, auto*... out) {
        whole(begin, end, out...);
        count(end - begin);
      };
    };
    watch(matrix.read), watch(matrix.read_bf16), watch(matrix.read_groups);
    return matrix;
  }

  void report_within(std::int64_t bytes) {
    constexpr std::int64_t kEvery = 4 << 20;  // bytes
    const std::int64_t done = std::min(done_ + bytes, loader_.total_bytes());
    if (!progress_ || done < reported_ + kEvery) return;
    reported_ = done;
    progress_(done, loader_.total_bytes());
  }
  void report(const std::string& name) {
    done_ += loader_.source_bytes(name);
    reported_ = std::max(reported_, done_);
    if (progress_) progress_(reported_, loader_.total_bytes());
  }

  const WeightLoader& loader_;
  Backend& backend_;
  DType compute_;
  const LoadProgress& progress_;
  Quantization quantization_;
  std::int64_t done_ = 0, reported_ = 0;  // bytes
  std::vector<std::string> inflated_;
};

}  // namespace

DeviceVector::DeviceVector(Backend& backend, std::span<const float> values)
    : buffer_(backend.allocate(values.size_bytes(), MemoryKind::Device)) {
  backend.copy(buffer_->data(), values.data(), values.size_bytes());
  backend.synchronize();
}

Quantization quantization_from_name(const std::string& name) {
  if (name == "auto") return Quantization::Auto;
  if (name == "none") return Quantization::None;
  if (name == "int8") return Quantization::Int8;
  if (name == "int4") return Quantization::Int4;
  throw InvalidArgument("quantization is '" + name + "', but must be auto, none, int8 or int4.");
}

GroupFormat choose_groups(Quantization wanted, WeightUse use, const GroupFormat& own) {
  // Wide groups where codes are chosen here: fewer scales to read, and fewer sums to multiply by them.
  constexpr GroupFormat kInt8{8, false, 128, 64}, kInt4{4, true, 0, 64};
  const auto keep_or = [&](const GroupFormat& chosen) { return own.bits == chosen.bits ? own : chosen; };
  switch (wanted) {
    case Quantization::None:
      return {};
    case Quantization::Auto:
      return own;
    case Quantization::Int8:
      return use == WeightUse::Table ? own : keep_or(kInt8);
    case Quantization::Int4:
      if (use == WeightUse::Table) return own;
      // Few bits cost most in the logits.
      return keep_or(use == WeightUse::Head ? kInt8 : kInt4);
  }
  return {};
}

DecoderWeights load_decoder_weights(const WeightLoader& loader, Backend& backend, DType compute,
                                    const LoadProgress& progress, Quantization quantization) {
  const ModelSpec& spec = loader.spec();
  Packer pack(loader, backend, compute, progress, quantization);
  DecoderWeights w;
  w.tokens = pack.matrix("embed.tokens.weight", spec.head.tied ? WeightUse::Head : WeightUse::Table);
  if (spec.embed.learned_positions > 0) w.positions = pack.positions("embed.positions.weight");
  for (int i = 0; i < spec.num_layers(); ++i) {
    const LayerSpec& l = spec.layer(i);
    const std::string at = layer_prefix(i);
    LayerWeights& out = w.layers.emplace_back();
    out.pre_attn = pack.norm(at + "pre_attn_norm", l.pre_attn);
    out.qkv = pack.linear(at + "attn.qkv", l.attn.qkv_bias);
    out.q_norm = pack.norm(at + "attn.q_norm", l.attn.q_norm);
    out.k_norm = pack.norm(at + "attn.k_norm", l.attn.k_norm);
    out.out = pack.summed_linear(at + "attn.out", l.attn.out_bias);
    out.post_attn = pack.norm(at + "post_attn_norm", l.post_attn);
    out.pre_ffn = pack.norm(at + "pre_ffn_norm", l.pre_ffn);
    out.up = pack.linear(at + (l.ffn.gated ? "ffn.gate_up" : "ffn.up"), l.ffn.bias);
    out.down = pack.summed_linear(at + "ffn.down", l.ffn.bias);
    out.post_ffn = pack.norm(at + "post_ffn_norm", l.post_ffn);
  }
  w.final_norm = pack.norm("final_norm", spec.head.final_norm);
  if (!spec.head.tied) w.head.weight = pack.matrix("head.weight", WeightUse::Head);
  if (spec.head.bias) w.head.bias = pack.vector("head.bias");
  w.inflated = pack.take_inflated();
  return w;
}

std::int64_t packed_bytes(const DecoderWeights& weights) {
  std::int64_t total = 0;
  const auto add = [&total](const std::unique_ptr<PackedWeight>& w) {
    if (w) total += static_cast<std::int64_t>(w->bytes());
  };
  add(weights.tokens);
  add(weights.head.weight);
  for (const auto& layer : weights.layers) {
    for (const auto* linear : {&layer.qkv, &layer.out, &layer.up, &layer.down}) add(linear->weight);
  }
  return total;
}

}  // namespace fastllm

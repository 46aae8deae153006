// The one forward pass: executes any ModelSpec on any Backend, on one rank of a tensor-parallel group. Owned by a
// worker and used on its thread only. All activation memory is taken at construction and stays where it is, so that a
// backend may record what forward() and logits() enqueue.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/kv_cache.h"
#include "dist/communicator.h"
#include "fastllm/model_spec.h"
#include "model/decoder_weights.h"

namespace fastllm {

struct DecoderConfig {
  DType dtype = DType::BF16;     // activations
  DType kv_dtype = DType::BF16;  // keys and values
  int max_len = 0;               // positions
  int max_step_tokens = 0;
  int max_logit_rows = 0;  // rows of one logits() call
  int block_size = 16;     // positions per KV block
};

class Decoder {
 public:
  // `backend` and `comm` outlive the decoder; the rank is comm's.
  Decoder(const ModelSpec& spec, const DecoderConfig& config, Backend& backend, Communicator& comm,
          DecoderWeights weights);

  const ModelSpec& spec() const { return spec_; }
  const KvShape& kv_shape() const { return kv_shape_; }  // of this rank
  std::int64_t weight_bytes() const { return packed_bytes(weights_); }
  const std::vector<std::string>& inflated() const { return weights_.inflated; }

  // Runs the layers over all tokens of the step, its padding included, writing their keys and values to `kv_pool`
  // (kv_shape() per block). logit_rows: of the step, its padding included: what no logit depends on is left out of the
  // last layer. kAllTokens: logits of any token may be asked for.
  static constexpr int kAllTokens = -1;
  void forward(const Step& step, int num_tokens, void* kv_pool, int logit_rows);

  // Logits of the last forward(): [rows, vocab] F32, valid until the next call of either. At most max_logit_rows.
  // Every rank gets all of them.
  Tensor logits(const Step& step, int rows);            // rows: as many as forward() was told, or the step has
  Tensor logits(std::span<const std::int32_t> tokens);  // after the given tokens; needs kAllTokens
  Tensor logits_view(int rows) const;                   // where they lie

 private:
  // What is the same in all layers of a kind.
  struct Kind {
    AttnArgs attn;
    RopeArgs rope;
    DeviceVector rope_table;
    std::vector<float> alibi;  // slopes of this rank's heads
    int inner = 0;             // of this rank
  };
  // Memory for the activations of a step; a view has the rows and columns in use.
  struct Scratch {
    std::unique_ptr<Buffer> buffer;
    DType dtype = DType::F32;
    Tensor view(std::int64_t rows, std::int64_t cols) const { return {buffer->data(), dtype, {rows, cols}}; }
  };

  Scratch scratch(std::int64_t rows, std::int64_t cols, DType dtype) const;
  Kind make_kind(const LayerSpec& layer) const;
  void allocate_scratch();

  // kept: tokens that matter past the layer's attention, at most num_tokens_; fewer are the step's logit rows.
  void run_layer(int layer, const Step& step, void* kv_pool, std::int64_t kept);
  Tensor attention(int layer, const Tensor& in, const Step& step, void* kv_pool, std::int64_t kept);
  Tensor feed_forward(int layer, const Tensor& in);
  // The rows of x that are the step's logit rows, in `to`.
  Tensor keep(const Scratch& to, const Tensor& x, const Step& step, std::int64_t rows);
  // Adds what is pending to the residual and normalises it.
  Tensor norm_residual(const Scratch& out, const NormSpec& spec, const NormWeights& w);
  void norm_or_copy(const Tensor& out, const Tensor& x, const NormSpec& spec, const NormWeights& w);
  // Adds in w^T to the branch under way; end_branch() makes its sum over ranks, normed, the pending one.
  void project(const Tensor& in, const LinearWeights& w, const NormSpec& post);
  void end_branch(const NormSpec& post, const NormWeights& w);
  // x: [R, hidden] of the residual.
  Tensor head(const Tensor& x);

  ModelSpec spec_;
  DecoderConfig config_;
  Backend& backend_;
  Communicator& comm_;
  DecoderWeights weights_;
  KvShape kv_shape_;
  std::vector<Kind> kinds_;

  Scratch residual_, delta_, post_;   // [T, hidden] F32: the stream, a branch, its post-norm
  Scratch hidden_, hidden_ffn_;       // [T, hidden]: inputs of the branches
  Scratch qkv_, attn_, up_, gated_;   // [T, ...] of this rank
  Scratch last_, last_hidden_;        // [R, hidden]: residual of the rows whose logits are wanted, and its norm
  Scratch last_attn_;                 // [R, heads head_dim]: their attention in the last layer
  Scratch part_logits_, logits_;      // [R, vocab / ranks], [R, vocab] F32
  const Scratch* stream_ = nullptr;   // residual_, or last_ once only logit rows matter
  std::int64_t num_tokens_ = 0;       // rows of the stream
  bool branch_begun_ = false;         // delta_ holds the first of two parallel branches
  const Scratch* pending_ = nullptr;  // delta_ or post_, if still to be added to the residual
};

}  // namespace fastllm

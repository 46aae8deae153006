// The Backend on one GPU: which launcher does what, on one stream. The launching thread is the caller's; wait_step()
// and step_done() may come from another one.
//
// Tuning: the first step after init_steps(), which should be the largest there will be, measures GEMM algorithms for
// prefill sizes. After that only the first run of each padded size measures, for that size, before it is recorded.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "backend/backend.h"
#include "gemm.h"
#include "graph_cache.h"
#include "memory.h"
#include "pack.h"
#include "staging.h"
#include "steps.h"

namespace fastllm::cuda {

std::unique_ptr<Backend> make_backend(const CudaOptions& options);

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const CudaOptions& options);
  ~CudaBackend() override;

  DeviceInfo info() const override;
  bool profile_by_running() const override { return true; }
  std::unique_ptr<Buffer> allocate(std::size_t bytes, MemoryKind kind) override;
  void copy(void* dst, const void* src, std::size_t bytes) override;
  void synchronize() override;
  std::unique_ptr<PackedWeight> pack(const HostMatrix& weight, DType compute) override;

  void init_steps(const StepLimits& limits) override;
  Step& begin_step(const StepInput& input) override;
  void end_step(Step& step) override;
  bool step_done(Step& step) override;
  void wait_step(Step& step, StepOutput& out) override;
  void init_counts(SlotId slot, std::span<const TokenId> tokens, std::int32_t num_prompt) override;
  std::span<const int> graph_sizes() const override { return graphs_.sizes(); }
  void replay(Step& step, const std::function<void()>& body) override;

  void embed(const Tensor& out, const Step& step, const PackedWeight& table, std::int64_t id_begin,
             float scale) override;
  void add_positions(const Tensor& x, const Step& step, const Tensor& table) override;
  void norm(const Tensor& out, const Tensor& x, const NormSpec& spec, const float* weight, const float* bias) override;
  void add_norm(const Tensor& out, const Tensor& residual, const Tensor& delta, const NormSpec& spec,
                const float* weight, const float* bias) override;
  void linear(const Tensor& out, const Tensor& x, const PackedWeight& w, const float* bias, bool accumulate) override;
  void gated_linear(const Tensor& out, const Tensor& scratch, const Tensor& x, const PackedWeight& w, const float* bias,
                    Activation act) override;
  void qk_norm_rope_write_kv(const Tensor& qkv, const Step& step, int heads, const NormSpec& q_norm,
                             const float* q_weight, const NormSpec& k_norm, const float* k_weight, const RopeArgs& rope,
                             const KvView& kv) override;
  void attention(const Tensor& out, const Tensor& q, const Step& step, const KvView& kv, const AttnArgs& args) override;
  void gated_act(const Tensor& out, const Tensor& gate_up, Activation act) override;
  void act(const Tensor& x, Activation act) override;
  void add(const Tensor& x, const Tensor& y) override;
  void gather_rows(const Tensor& out, const Tensor& x, std::span<const std::int32_t> rows) override;
  void gather_logit_rows(const Tensor& out, const Tensor& x, const Step& step) override;

  void scale_softcap(const Tensor& logits, float scale, float softcap) override;
  void mask_logits(const Tensor& logits, std::span<const std::int32_t> rows,
                   std::span<const std::uint32_t> bits) override;
  void process_logits(const Tensor& logits, const Step& step) override;
  void sample(const Tensor& logits, Step& step) override;
  TokenId* sampled_tokens(Step& step) override;
  void commit_tokens(Step& step) override;
  void topk_logprobs(const Tensor& logits, Step& step, std::span<const LogprobRequest> requests) override;

  void copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                   std::span<const std::pair<BlockId, BlockId>> from_to) override;

 private:
  enum class Tuning : std::uint8_t { Off, LargestStep, OneSize };

  void use_device() const { check(cudaSetDevice(options_.device), "choosing the GPU"); }
  void tune(const WeightView& w, DType out_dtype, bool accumulate, std::int64_t m);
  void* attention_workspace(const AttnArgs& args);
  const float* device_slopes(std::span<const float> slopes);
  std::int32_t* counts();
  LogprobResult host_logprobs(const Tensor& logits, const CudaStep& step, const LogprobRequest& request);

  CudaOptions options_;
  std::string name_;
  AttentionLimits attention_limits_;  // capability and num_sms from the start, the rest from init_steps() on
  Stream stream_;
  Gemm gemm_;
  Staging staging_;
  std::optional<Packer> packer_;  // while weights are loaded
  StepLimits limits_;
  std::unique_ptr<StepRing> ring_;
  GraphCache graphs_;
  Tuning tuning_ = Tuning::Off;
  std::unique_ptr<Buffer> counts_;  // [max_slots, vocab] int32, once a sequence is penalised
  std::unique_ptr<Buffer> sample_workspace_, logprob_workspace_;
  // Recordings hold addresses: what was outgrown is kept.
  std::vector<std::unique_ptr<Buffer>> attention_workspaces_;                   // the last one is in use
  std::vector<std::pair<std::vector<float>, std::unique_ptr<Buffer>>> slopes_;  // host values, device copy
};

}  // namespace fastllm::cuda

#include "cuda_backend.h"

#include <algorithm>
#include <cassert>

#include "devices.h"
#include "elementwise.h"
#include "gemm_tune.h"

namespace fastllm::cuda {
namespace {

const CudaOptions& checked(const CudaOptions& options) {
  check_device(options.device);
  check(cudaSetDevice(options.device), "choosing the GPU");
  return options;
}

NormCall norm_call(const Tensor& out, const Tensor& x, const NormSpec& spec, const float* weight, const float* bias) {
  NormCall call;
  call.x = x.data;
  call.out = out.data;
  call.rows = x.rows();
  call.cols = x.cols();
  call.ldx = x.stride[0];
  call.ldo = out.stride[0];
  call.x_dtype = x.dtype;
  call.out_dtype = out.dtype;
  call.kind = spec.kind;
  call.eps = spec.eps;
  call.weight = weight;
  call.bias = bias;
  return call;
}

GemmCall gemm_call(const Tensor& out, const Tensor& x, const PackedWeight& w, const float* bias) {
  GemmCall call;
  call.out = out.data;
  call.out_dtype = out.dtype;
  call.ldo = out.stride[0];
  call.x = x.data;
  call.ldx = x.stride[0];
  call.m = x.rows();
  call.w = view_of(w);
  call.bias = bias;
  return call;
}

}  // namespace

std::unique_ptr<Backend> make_backend(const CudaOptions& options) { return std::make_unique<CudaBackend>(options); }

CudaBackend::CudaBackend(const CudaOptions& options)
    : options_(checked(options)),
      name_("cuda:" + std::to_string(options.device) + " (" + name_of_device(options.device) + ", sm_" +
            std::to_string(capability_of(options.device)) + ")"),
      gemm_({.deterministic = options.deterministic}),
      staging_(stream_.get()) {
  attention_limits_.num_sms = attribute(cudaDevAttrMultiProcessorCount, options.device);
  attention_limits_.capability = capability_of(options.device);
}

CudaBackend::~CudaBackend() {
  cudaSetDevice(options_.device);
  cudaStreamSynchronize(stream_.get());
}

// --- memory

DeviceInfo CudaBackend::info() const {
  use_device();
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the free memory");
  return {name_, static_cast<std::int64_t>(free), static_cast<std::int64_t>(total)};
}

std::unique_ptr<Buffer> CudaBackend::allocate(std::size_t bytes, MemoryKind kind) {
  use_device();
  return kind == MemoryKind::Host ? allocate_pinned(bytes) : allocate_device(bytes);
}

void CudaBackend::copy(void* dst, const void* src, std::size_t bytes) {
  if (bytes == 0) return;
  use_device();
  check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream_.get()), "copying memory");
  if (is_host(dst) || is_pageable(src)) stream_.synchronize();
}

void CudaBackend::synchronize() {
  use_device();
  stream_.synchronize();
}

std::unique_ptr<PackedWeight> CudaBackend::pack(const HostMatrix& weight, DType compute) {
  use_device();
  if (!packer_) packer_.emplace(stream_.get());
  return packer_->pack(weight, compute);
}

// --- steps

void CudaBackend::init_steps(const StepLimits& limits) {
  use_device();
  stream_.synchronize();
  packer_.reset();
  limits_ = limits;
  attention_limits_.max_rows = limits.max_slots;
  attention_limits_.max_tokens = limits.max_tokens;
  attention_limits_.max_len = limits.table_width * limits.block_size;
  attention_limits_.window = limits.window;
  attention_workspaces_.clear();  // their counters' number depends on the limits
  ring_ = std::make_unique<StepRing>(limits, attention_limits_, options_.deterministic, stream_.get());
  // Only decode kernels, which split by the plan in device memory, can be recorded.
  const bool graphs = options_.graphs && !options_.deterministic;
  graphs_.reset(graphs ? decode_graph_sizes(std::min(limits.max_slots, limits.max_tokens)) : std::vector<int>{});
  tuning_ = Tuning::LargestStep;
  sample_workspace_ = allocate_device(sample_workspace_bytes(limits.max_logit_rows, limits.vocab));
  logprob_workspace_ = allocate_device(logprob_workspace_bytes(limits.max_logit_rows));
  counts_.reset();
  const std::int64_t count_bytes = std::int64_t{4} * limits.max_slots * limits.vocab;
  if (count_bytes < info().memory_total / 100) counts();
}

Step& CudaBackend::begin_step(const StepInput& input) {
  use_device();
  return ring_->begin(input, staging_);
}

void CudaBackend::end_step(Step& step) {
  tuning_ = Tuning::Off;
  ring_->end(cuda_step(step));
}

bool CudaBackend::step_done(Step& step) {
  use_device();
  return StepRing::done(cuda_step(step));
}

void CudaBackend::wait_step(Step& step, StepOutput& out) {
  use_device();
  StepRing::wait(cuda_step(step), out);
}

std::int32_t* CudaBackend::counts() {
  if (!counts_)
    counts_ = allocate_device(static_cast<std::size_t>(limits_.max_slots) * static_cast<std::size_t>(limits_.vocab) *
                              sizeof(std::int32_t));
  return data_as<std::int32_t>(*counts_);
}

void CudaBackend::init_counts(SlotId slot, std::span<const TokenId> tokens, std::int32_t num_prompt) {
  use_device();
  std::int32_t* row = counts() + static_cast<std::size_t>(limits_.vocab) * index(slot);
  const auto n = static_cast<std::int64_t>(tokens.size());
  cuda::init_counts(row, limits_.vocab, staging_.put(tokens), n, std::min<std::int64_t>(num_prompt, n), stream_.get());
}

// The first run of a size is an ordinary one, between which and its recording nothing is left to measure, to allocate
// or to load.
void CudaBackend::replay(Step& base, const std::function<void()>& body) {
  const CudaStep& step = cuda_step(base);
  if (step.padded_rows == 0 || !graphs_.has_size(step.padded_rows)) return body();
  if (graphs_.launch(step.padded_rows, stream_.get())) return;
  const Tuning before = std::exchange(tuning_, Tuning::OneSize);
  body();
  tuning_ = Tuning::Off;
  graphs_.record(step.padded_rows, stream_.get(), body);
  tuning_ = before;
}

// --- layers

void CudaBackend::embed(const Tensor& out, const Step& step, const PackedWeight& table, std::int64_t id_begin,
                        float scale) {
  const WeightView& w = view_of(table);
  assert(out.stride[0] == out.cols() && out.cols() == w.k);
  cuda::embed(out.ptr<float>(), cuda_step(step).view.ids, out.rows(), w.data, w.dtype, w.n, w.k, id_begin, scale,
              stream_.get());
}

void CudaBackend::add_positions(const Tensor& x, const Step& step, const Tensor& table) {
  assert(x.stride[0] == x.cols());
  cuda::add_positions(x.ptr<float>(), cuda_step(step).view.positions, x.rows(), table.ptr<float>(), x.cols(),
                      stream_.get());
}

void CudaBackend::norm(const Tensor& out, const Tensor& x, const NormSpec& spec, const float* weight,
                       const float* bias) {
  cuda::norm(norm_call(out, x, spec, weight, bias), stream_.get());
}

void CudaBackend::add_norm(const Tensor& out, const Tensor& residual, const Tensor& delta, const NormSpec& spec,
                           const float* weight, const float* bias) {
  NormCall call = norm_call(out, residual, spec, weight, bias);
  call.delta = delta.ptr<float>();
  call.ldd = delta.stride[0];
  cuda::norm(call, stream_.get());
}

void CudaBackend::tune(const WeightView& w, DType out_dtype, bool accumulate, std::int64_t m) {
  if (tuning_ == Tuning::Off) return;
  // Without recordings nobody runs the small sizes before they are needed.
  if (tuning_ == Tuning::LargestStep && graphs_.sizes().empty()) {
    gemm_.tune(w, out_dtype, accumulate, kTunedRows, stream_.get());
  } else {
    const std::int64_t sizes[] = {m};
    gemm_.tune(w, out_dtype, accumulate, sizes, stream_.get());
  }
}

void CudaBackend::linear(const Tensor& out, const Tensor& x, const PackedWeight& w, const float* bias,
                         bool accumulate) {
  GemmCall call = gemm_call(out, x, w, bias);
  call.accumulate = accumulate;
  assert(x.dtype == call.w.dtype && x.cols() == call.w.k && out.cols() == call.w.n);
  tune(call.w, out.dtype, accumulate, call.m);
  gemm_.run(call, stream_.get());
}

void CudaBackend::gated_linear(const Tensor& out, const Tensor& scratch, const Tensor& x, const PackedWeight& w,
                               const float* bias, Activation act) {
  GemmCall call = gemm_call(out, x, w, bias);
  tune(call.w, scratch.dtype, false, call.m);
  if (gemm_.run_gated(call, static_cast<int>(act), stream_.get())) return;
  linear(scratch, x, w, bias, false);
  gated_act(out, scratch, act);
}

void CudaBackend::qk_norm_rope_write_kv(const Tensor& qkv, const Step& step, int heads, const NormSpec& q_norm,
                                        const float* q_weight, const NormSpec& k_norm, const float* k_weight,
                                        const RopeArgs& rope, const KvView& kv) {
  RopeKvCall call;
  call.qkv = qkv.data;
  call.ld = qkv.stride[0];
  call.dtype = qkv.dtype;
  call.heads = heads;
  call.kv_heads = kv.kv_heads;
  call.head_dim = kv.head_dim;
  call.q_norm = q_norm;
  call.k_norm = k_norm;
  call.q_weight = q_weight;
  call.k_weight = k_weight;
  call.rope = rope;
  call.kv = kv;
  cuda::qk_norm_rope_write_kv(call, cuda_step(step).view, stream_.get());
}

void* CudaBackend::attention_workspace(const AttnArgs& args) {
  const std::size_t bytes = decode_workspace_bytes(attention_limits_, args.heads, args.head_dim);
  auto& all = attention_workspaces_;
  if (all.empty() || all.back()->bytes() < bytes) {
    all.push_back(allocate_device(bytes));
    check(cudaMemsetAsync(all.back()->data(), 0, decode_counter_bytes(attention_limits_), stream_.get()),
          "clearing memory");
  }
  return all.back()->data();
}

const float* CudaBackend::device_slopes(std::span<const float> slopes) {
  if (slopes.empty()) return nullptr;
  for (const auto& [values, buffer] : slopes_)
    if (std::ranges::equal(values, slopes)) return data_as<float>(*buffer);
  auto buffer = allocate_device(slopes.size_bytes());
  copy(buffer->data(), slopes.data(), slopes.size_bytes());
  slopes_.emplace_back(std::vector<float>(slopes.begin(), slopes.end()), std::move(buffer));
  return data_as<float>(*slopes_.back().second);
}

void CudaBackend::attention(const Tensor& out, const Tensor& q, const Step& base, const KvView& kv,
                            const AttnArgs& args) {
  assert(out.stride[0] == out.cols());
  const CudaStep& step = cuda_step(base);
  AttentionCall call;
  call.out = out.data;
  call.q = q.data;
  call.ldq = q.stride[0];
  call.dtype = q.dtype;
  call.kv = kv;
  call.args = args;
  call.alibi_slopes = device_slopes(args.alibi_slopes);
  if (step.view.num_decode_rows > 0)
    decode_attention(call, step.view, step.decode_plan, attention_limits_, attention_workspace(args), stream_.get());
  if (step.view.num_rows > step.view.num_decode_rows)
    prefill_attention(call, step.view, step.prefill_plan, attention_limits_, stream_.get());
}

void CudaBackend::gated_act(const Tensor& out, const Tensor& gate_up, Activation act) {
  cuda::gated_act(out.data, out.stride[0], gate_up.data, gate_up.stride[0], out.rows(), out.cols(), out.dtype, act,
                  stream_.get());
}

void CudaBackend::act(const Tensor& x, Activation act) {
  cuda::act(x.data, x.stride[0], x.rows(), x.cols(), x.dtype, act, stream_.get());
}

void CudaBackend::add(const Tensor& x, const Tensor& y) {
  cuda::add(x.ptr<float>(), x.stride[0], y.ptr<float>(), y.stride[0], x.rows(), x.cols(), stream_.get());
}

void CudaBackend::gather_rows(const Tensor& out, const Tensor& x, std::span<const std::int32_t> rows) {
  const std::size_t size = size_of(x.dtype);
  const auto bytes = [&](std::int64_t elements) { return static_cast<std::size_t>(elements) * size; };
  cuda::gather_rows(out.data, bytes(out.stride[0]), x.data, bytes(x.stride[0]), bytes(x.cols()), staging_.put(rows),
                    static_cast<std::int64_t>(rows.size()), stream_.get());
}

void CudaBackend::gather_logit_rows(const Tensor& out, const Tensor& x, const Step& step) {
  const std::size_t size = size_of(x.dtype);
  const auto bytes = [&](std::int64_t elements) { return static_cast<std::size_t>(elements) * size; };
  cuda::gather_rows(out.data, bytes(out.stride[0]), x.data, bytes(x.stride[0]), bytes(x.cols()),
                    cuda_step(step).logit_tokens, out.rows(), stream_.get());
}

void CudaBackend::copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                              std::span<const std::pair<BlockId, BlockId>> from_to) {
  use_device();
  cuda::copy_blocks(dst_pool, src_pool, block_bytes, from_to, stream_.get());
}

}  // namespace fastllm::cuda

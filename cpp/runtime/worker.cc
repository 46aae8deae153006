#include "runtime/worker.h"

#include <algorithm>
#include <array>
#include <cassert>

#include "fastllm/error.h"

namespace fastllm {
namespace {

// Logits of long prompts are made in slices: a chunk of 2048 tokens would take hundreds of megabytes.
constexpr int kPromptLogitRows = 64;

DecoderConfig decoder_config(const EngineConfig& c) {
  DecoderConfig d;
  d.dtype = dtype_from_name(c.dtype);
  d.max_len = c.max_model_len;
  d.max_step_tokens = c.max_step_tokens;
  d.max_logit_rows = std::max(kPromptLogitRows, std::min(c.max_num_seqs, c.max_step_tokens));
  d.block_size = c.block_size;
  return d;
}

DecoderWeights load(const EngineConfig& c, const ModelSource& source, Backend& backend, const Communicator& comm,
                    const LoadProgress& progress) {
  const WeightLoader loader(source, comm.rank(), comm.size());
  return load_decoder_weights(loader, backend, dtype_from_name(c.dtype), progress);
}

void move_blocks(Backend& backend, Buffer& dst, const Buffer& src, std::int64_t block_bytes,
                 std::span<const BlockCopy> copies) {
  if (copies.empty()) return;
  std::vector<std::pair<BlockId, BlockId>> pairs;
  pairs.reserve(copies.size());
  for (const auto& c : copies) pairs.emplace_back(c.from, c.to);
  backend.copy_blocks(dst.data(), src.data(), static_cast<std::size_t>(block_bytes), pairs);
}

}  // namespace

Worker::Worker(const EngineConfig& config, const ModelSource& source, std::unique_ptr<Backend> backend,
               Communicator& comm, const LoadProgress& progress)
    : max_logit_rows_(decoder_config(config).max_logit_rows),
      backend_(std::move(backend)),
      comm_(comm),
      decoder_(source.spec, decoder_config(config), *backend_, comm, load(config, source, *backend_, comm, progress)),
      slots_(config.max_num_seqs, (config.max_model_len + config.block_size - 1) / config.block_size + 1,
             source.spec.embed.vocab, source.spec.eos, *backend_),
      sampler_(*backend_, source.spec.embed.vocab, max_logit_rows_) {}

void Worker::init_kv(std::int64_t device_blocks, std::int64_t host_blocks) {
  const std::array sizes{device_blocks, host_blocks};
  if (std::any_of(sizes.begin(), sizes.end(), [&](auto n) { return n < 0 || n > INT32_MAX; }))
    throw InvalidArgument("a KV pool has at most 2^31 - 1 blocks");
  const auto bytes = [&](std::int64_t blocks) { return static_cast<std::size_t>(blocks * block_bytes()); };
  kv_ = backend_->allocate(bytes(device_blocks), MemoryKind::Lazy);
  if (host_blocks > 0) host_kv_ = backend_->allocate(bytes(host_blocks), MemoryKind::Host);
}

void Worker::run(const StepPlan& plan, const MaskSource& masks, StepResult& result) {
  result.clear();
  result.plan_id = plan.id;
  apply_changes(plan);
  if (plan.rows.empty()) return;
  build_inputs(plan);
  decoder_.forward(ids_, positions_, attn_rows_, kv_->data());
  if (!plan.next_tokens.empty()) prompt_logprobs(plan, result);
  if (!sampled_.empty()) sample(plan, masks, result);
}

void Worker::apply_changes(const StepPlan& plan) {
  assert(kv_ != nullptr);
  assert(host_kv_ != nullptr || (plan.swap_out.empty() && plan.swap_in.empty()));
  if (host_kv_) {
    move_blocks(*backend_, *host_kv_, *kv_, block_bytes(), plan.swap_out);
    move_blocks(*backend_, *kv_, *host_kv_, block_bytes(), plan.swap_in);
  }
  move_blocks(*backend_, *kv_, *kv_, block_bytes(), plan.copies);
  for (const auto& s : plan.new_slots) slots_.init(s, comm_.rank() == 0);
  for (const auto& t : plan.table_sets) slots_.set_block(t);
}

void Worker::build_inputs(const StepPlan& plan) {
  ids_.assign(plan.tokens.begin(), plan.tokens.end());
  positions_.resize(ids_.size());
  attn_rows_.clear();
  sampled_.clear();
  last_.clear();
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    const Row& r = plan.rows[i];
    const auto begin = static_cast<std::size_t>(r.token_begin);
    if ((r.flags & kFromSlot) != 0) ids_[begin] = slots_.last_token(r.slot);
    for (std::int32_t k = 0; k < r.num_tokens; ++k) positions_[begin + static_cast<std::size_t>(k)] = r.first_pos + k;
    attn_rows_.push_back({r.token_begin, r.num_tokens, r.first_pos, slots_.table(r.slot).data()});
    if ((r.flags & kSample) != 0) {
      sampled_.push_back(static_cast<std::int32_t>(i));
      last_.push_back(r.token_begin + r.num_tokens - 1);
    }
  }
}

void Worker::prompt_logprobs(const StepPlan& plan, StepResult& result) {
  std::vector<std::int32_t> at;          // tokens of the step
  std::vector<LogprobRequest> requests;  // parallel to at
  for (const Row& r : plan.rows) {
    if ((r.flags & kPromptLogprobs) == 0) continue;
    const int top = comm_.rank() == 0 ? slots_.sampling(r.slot).params->prompt_logprobs : 0;
    for (std::int32_t t = r.token_begin; t < r.token_begin + r.num_tokens; ++t) {
      const TokenId next = plan.next_tokens[static_cast<std::size_t>(t)];
      if (next < 0) continue;
      requests.push_back({static_cast<std::int32_t>(at.size()) % kPromptLogitRows, next, std::max(top, 0)});
      at.push_back(t);
    }
  }
  for (std::size_t begin = 0; begin < at.size(); begin += kPromptLogitRows) {
    const auto n = std::min<std::size_t>(kPromptLogitRows, at.size() - begin);
    const Tensor logits = decoder_.logits(std::span(at).subspan(begin, n));
    if (comm_.rank() == 0) sampler_.logprobs(logits, std::span(requests).subspan(begin, n), result.prompt_logprobs);
  }
}

void Worker::sample(const StepPlan& plan, const MaskSource& masks, StepResult& result) {
  tokens_.assign(sampled_.size(), -1);
  std::span<const std::uint32_t> bits;
  if (comm_.rank() == 0) {
    result.tokens.assign(sampled_.size(), -1);
    if (plan.max_logprobs >= 0) result.logprobs.resize(sampled_.size());
  }
  std::vector<SampleTarget> targets;
  const auto slice = static_cast<std::size_t>(max_logit_rows_);
  for (std::size_t begin = 0; begin < sampled_.size(); begin += slice) {
    const auto n = std::min(slice, sampled_.size() - begin);
    const Tensor logits = decoder_.logits(std::span(last_).subspan(begin, n));
    if (comm_.rank() != 0) continue;
    if (!plan.masked_rows.empty() && bits.empty()) bits = masks(plan);
    targets.clear();
    for (std::size_t i = begin; i < begin + n; ++i) targets.push_back({sampled_[i], static_cast<std::int32_t>(i)});
    sampler_.run(logits, targets, plan, slots_, bits, result);
  }
  if (comm_.rank() == 0) {
    for (const auto& [row, sentence] : result.row_errors) result.tokens[static_cast<std::size_t>(row)] = -1;
    tokens_ = result.tokens;
  }
  comm_.broadcast(tokens_.data(), tokens_.size() * sizeof(TokenId), 0);
  for (std::size_t i = 0; i < sampled_.size(); ++i)
    slots_.set_last_token(plan.rows[static_cast<std::size_t>(sampled_[i])].slot, std::max(tokens_[i], 0));
}

}  // namespace fastllm

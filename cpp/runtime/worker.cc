#include "runtime/worker.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <string>

#include "fastllm/error.h"
#include "runtime/kv_budget.h"

namespace fastllm {
namespace {

// Logits of long prompts are made in slices: a chunk of 2048 tokens would take hundreds of megabytes.
constexpr int kPromptLogitRows = 64;

DecoderConfig decoder_config(const EngineConfig& c, const StepLimits& limits, const Backend& backend) {
  DecoderConfig d;
  d.dtype = dtype_from_name(c.dtype);
  d.kv_dtype = kv_cache_dtype(c, !backend.info().name.starts_with("cpu"));
  d.max_len = c.max_model_len;
  d.max_step_tokens = limits.max_tokens;
  d.max_logit_rows = limits.max_logit_rows;
  d.block_size = limits.block_size;
  return d;
}

StepLimits step_limits(const EngineConfig& c, const ModelSpec& spec) {
  StepLimits l;
  l.max_tokens = c.max_step_tokens;
  l.max_slots = c.max_num_seqs;
  l.max_logit_rows = std::max(kPromptLogitRows, std::min(c.max_num_seqs, c.max_step_tokens));
  l.table_width = (c.max_model_len + c.block_size - 1) / c.block_size + 1;
  l.block_size = c.block_size;
  l.vocab = spec.embed.vocab;
  l.in_flight = std::max(c.async_depth, 1);
  return l;
}

DecoderWeights load(const EngineConfig& c, const ModelSource& source, Backend& backend, const Communicator& comm,
                    const LoadProgress& progress) {
  const WeightLoader loader(source, comm.rank(), comm.size());
  const Quantization quantization = quantization_from_name(c.quantization);
  return load_decoder_weights(loader, backend, dtype_from_name(c.dtype), progress, quantization);
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

int padded_rows(const StepPlan& plan, std::span<const int> sizes) {
  const auto rows = static_cast<std::int32_t>(plan.rows.size());
  if (plan.num_decode_rows != rows || !plan.next_tokens.empty()) return 0;
  const auto size = std::lower_bound(sizes.begin(), sizes.end(), rows);
  return size == sizes.end() ? 0 : *size;
}

Worker::Worker(const EngineConfig& config, const ModelSource& source, std::unique_ptr<Backend> backend,
               Communicator& comm, const LoadProgress& progress)
    : max_len_(config.max_model_len),
      max_logprobs_(config.max_logprobs),
      limits_(step_limits(config, source.spec)),
      backend_(std::move(backend)),
      comm_(comm),
      decoder_(source.spec, decoder_config(config, limits_, *backend_), *backend_, comm,
               load(config, source, *backend_, comm, progress)),
      slots_(limits_.max_slots, limits_.vocab, source.spec.eos),
      sampler_(*backend_, limits_.vocab, limits_.max_logit_rows) {
  backend_->init_steps(limits_);
}

void Worker::init_kv(std::int64_t device_blocks, std::int64_t host_blocks) {
  const std::array sizes{device_blocks, host_blocks};
  if (std::any_of(sizes.begin(), sizes.end(), [&](auto n) { return n < 0 || n > INT32_MAX; }))
    throw InvalidArgument("a KV pool has at most 2^31 - 1 blocks");
  const auto bytes = [&](std::int64_t blocks) { return static_cast<std::size_t>(blocks * block_bytes()); };
  kv_ = backend_->allocate(bytes(device_blocks), MemoryKind::Lazy);
  if (host_blocks > 0) host_kv_ = backend_->allocate(bytes(host_blocks), MemoryKind::Host);
  warm_up();
}

// Recordings of small sizes may share the memory of the larger ones before them.
void Worker::warm_up() {
  const auto sizes = backend_->graph_sizes();
  StepOutput unused;
  for (auto size = sizes.rbegin(); size != sizes.rend(); ++size) {
    StepInput input;
    input.padded_rows = *size;
    Step& step = backend_->begin_step(input);
    forward(step, *size, *size, *size);
    backend_->end_step(step);
    backend_->wait_step(step, unused);
  }
}

void Worker::run_worst_step() {
  const auto pool = backend_->allocate(static_cast<std::size_t>(block_bytes()), MemoryKind::Lazy);
  const int rows = std::min(limits_.max_slots, limits_.max_tokens);
  std::vector<TableSet> tables;
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(rows), 1), last;
  std::vector<LogprobRequest> logprobs;
  int spare = limits_.max_tokens - rows;  // tokens, for the last rows
  for (auto length = lengths.rbegin(); length != lengths.rend() && spare > 0; ++length) {
    const int more = std::min(spare, max_len_ - 1);
    *length += more;
    spare -= more;
  }
  StepInput input;
  rows_.clear();
  sample_rows_.clear();
  std::int32_t token = 0;
  for (int i = 0; i < rows; ++i) {
    const SlotId slot{i};
    for (std::int32_t b = 0; b < limits_.table_width; ++b) tables.push_back({slot, b, kNullBlock});
    const std::int32_t n = lengths[static_cast<std::size_t>(i)];
    rows_.push_back({token, n, max_len_ - n, slot, false});
    token += n;
    input.num_decode_rows += n == 1;
    last.push_back(token - 1);
    logprobs.push_back({i, 0, max_logprobs_});
    if (comm_.rank() != 0) continue;
    sample_rows_.emplace_back();
    sample_rows_.back().slot = slot;
    sample_rows_.back().top_p = 0.9f;
  }
  const std::vector<TokenId> ids(static_cast<std::size_t>(token), 0);
  input.table_sets = tables;
  input.tokens = ids;
  input.rows = rows_;
  input.logit_tokens = last;
  input.sampling = sample_rows_;
  Step& step = backend_->begin_step(input);
  decoder_.forward(step, token, pool->data(), rows);
  const Tensor logits = decoder_.logits(step, rows);
  if (comm_.rank() == 0) {
    backend_->process_logits(logits, step);
    backend_->sample(logits, step);
    backend_->topk_logprobs(logits, step, logprobs);
  }
  backend_->end_step(step);
  StepOutput unused;
  backend_->wait_step(step, unused);
}

void Worker::launch(const StepPlan& plan, const MaskSource& masks, Launched& out) {
  out.clear();
  apply_changes(plan);
  if (plan.rows.empty()) return;
  const int padded = padded_rows(plan, backend_->graph_sizes());
  Step& step = begin_step(plan, padded);
  out.step = &step;
  const auto num_tokens = padded > 0 ? padded : static_cast<int>(plan.tokens.size());
  const auto num_logits = padded > 0 ? padded : static_cast<int>(sampled_.size());
  // Log-probabilities of the prompt use the memory of the logits: they come between the two.
  forward(step, num_tokens, plan.next_tokens.empty() ? num_logits : Decoder::kAllTokens, padded);
  if (!plan.next_tokens.empty()) {
    prompt_logprobs(plan, out);
    if (num_logits > 0) decoder_.logits(step, num_logits);
  }
  if (!sampled_.empty()) sample(plan, masks, out);
  backend_->end_step(step);
}

void Worker::apply_changes(const StepPlan& plan) {
  assert(kv_ != nullptr);
  assert(host_kv_ != nullptr || (plan.swap_out.empty() && plan.swap_in.empty()));
  if (host_kv_) {
    move_blocks(*backend_, *host_kv_, *kv_, block_bytes(), plan.swap_out);
    move_blocks(*backend_, *kv_, *host_kv_, block_bytes(), plan.swap_in);
  }
  move_blocks(*backend_, *kv_, *kv_, block_bytes(), plan.copies);
  held_sets_.insert(held_sets_.end(), plan.table_sets.begin(), plan.table_sets.end());
  if (comm_.rank() != 0) return;
  for (const SlotInit& s : plan.new_slots) {
    slots_.init(s);
    if (needs_history(*s.sampling)) backend_->init_counts(s.slot, s.tokens, s.num_prompt);
  }
}

Step& Worker::begin_step(const StepPlan& plan, int padded) {
  rows_.clear();
  sampled_.clear();
  last_.clear();
  sample_rows_.clear();
  auto lent = plan.host_tokens.begin();
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    const Row& r = plan.rows[i];
    rows_.push_back({r.token_begin, r.num_tokens, r.first_pos, r.slot, (r.flags & kFromSlot) != 0});
    if ((r.flags & kSample) == 0) continue;
    sampled_.push_back(static_cast<std::int32_t>(i));
    last_.push_back(r.token_begin + r.num_tokens - 1);
    if (comm_.rank() != 0) continue;
    const bool lends = lent != plan.host_tokens.end() && lent->row == static_cast<std::int32_t>(i);
    const auto tokens = lends ? (lent++)->tokens : std::span<const TokenId>();
    sample_rows_.push_back(slots_.sample_row(r.slot, std::int64_t{r.first_pos} + r.num_tokens, tokens));
  }
  StepInput input;
  input.table_sets = held_sets_;
  input.tokens = plan.tokens;
  input.rows = rows_;
  input.num_decode_rows = plan.num_decode_rows;
  input.padded_rows = padded;
  input.logit_tokens = last_;
  input.sampling = sample_rows_;
  Step& step = backend_->begin_step(input);
  held_sets_.clear();
  return step;
}

// padded: rows of the recording to replay, or 0.
void Worker::forward(Step& step, int num_tokens, int logit_rows, int padded) {
  const auto body = [&] {
    decoder_.forward(step, num_tokens, kv_->data(), logit_rows);
    if (logit_rows > 0) decoder_.logits(step, logit_rows);
  };
  if (padded > 0) {
    backend_->replay(step, body);
  } else {
    body();
  }
}

void Worker::prompt_logprobs(const StepPlan& plan, Launched& out) {
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
    if (comm_.rank() == 0) backend_->topk_logprobs(logits, *out.step, std::span(requests).subspan(begin, n));
  }
  if (comm_.rank() == 0) out.num_prompt_logprobs = at.size();
}

void Worker::sample(const StepPlan& plan, const MaskSource& masks, Launched& out) {
  const SampleTask task{plan, sampled_, slots_, decoder_.logits_view(static_cast<int>(sampled_.size())), *out.step};
  const bool chooses = comm_.rank() == 0;
  if (chooses) {
    std::span<const std::uint32_t> bits;
    if (!plan.masked_rows.empty()) bits = masks(plan);
    sampler_.sample(task, bits, out.row_errors);
  }
  comm_.broadcast(backend_->sampled_tokens(*out.step), sampled_.size() * sizeof(TokenId), 0);
  if (!chooses) return backend_->commit_tokens(*out.step);
  sampler_.logprobs(task, out.logprob_of);
}

void Worker::finish(const StepPlan& plan, Launched& launched, StepResult& result) {
  result.clear();
  result.plan_id = plan.id;
  if (launched.step == nullptr) return;
  StepOutput& output = launched.output;
  backend_->wait_step(*launched.step, output);
  if (comm_.rank() != 0) return;
  result.tokens = output.tokens;
  for (const auto& [row, sentence] : launched.row_errors) result.tokens[static_cast<std::size_t>(row)] = -1;
  for (std::size_t i = 0; i < output.tokens.size(); ++i) {
    const auto row = static_cast<std::int32_t>(i);
    const bool told = std::ranges::any_of(launched.row_errors, [&](const auto& error) { return error.first == row; });
    if (output.tokens[i] < 0 && !told) result.nan_rows.push_back(row);
  }
  result.row_errors = std::move(launched.row_errors);
  const auto of_prompt = std::span(output.logprobs).first(launched.num_prompt_logprobs);
  for (const LogprobResult& r : of_prompt) result.prompt_logprobs.push_back(to_position(r));
  if (plan.max_logprobs >= 0 && !output.tokens.empty()) result.logprobs.resize(output.tokens.size());
  for (std::size_t i = 0; i < launched.logprob_of.size(); ++i)
    result.logprobs[static_cast<std::size_t>(launched.logprob_of[i])] =
        to_position(output.logprobs[of_prompt.size() + i]);
}

}  // namespace fastllm

#include "sched/scheduler.h"

#include <algorithm>
#include <cassert>

namespace fastllm {

Scheduler::Scheduler(const EngineConfig& config, ModelLimits model, const KvConfig& kv)
    : config_(config), model_(std::move(model)), kv_(kv) {
  limits_.vocab = model_.vocab;
  limits_.max_len = model_.max_len;
  limits_.pool_tokens = kv_.device().num_usable() * kv_.block_size();
  limits_.max_num_seqs = config_.max_num_seqs;
  limits_.max_logprobs = config_.max_logprobs;
  limits_.num_eos = static_cast<int>(model_.eos.size());
  watermark_ = watermark_blocks(kv_.device().num_usable());
  for (int slot = config_.max_num_seqs; slot-- > 0;) free_slots_.push_back(SlotId{slot});
}

Scheduler::~Scheduler() = default;

bool Scheduler::schedule(PlannedStep& step, TimePoint now) {
  expire(now);
  step.plan.clear();
  step.plan.id = next_plan_;
  step.seqs.clear();
  decodes_.clear();
  chunks_.clear();
  budget_ = config_.max_step_tokens;

  do {
    const bool preempted = plan_running(step);
    wait_reason_ = WaitReason::Blocks;
    if (!preempted || (decodes_.empty() && chunks_.empty())) wait_reason_ = plan_waiting(step, now);
    // Beams that wait for a sibling may hold what it needs.
  } while (decodes_.empty() && chunks_.empty() && steps_in_flight_ == 0 && !waiting_.empty() && preempt_parked());

  if (decodes_.empty() && chunks_.empty()) {
    // Admission lets everything in that fits the pool alone, so this is the safety net against waiting for ever.
    if (steps_in_flight_ == 0 && !waiting_.empty()) {
      Sequence& head = **waiting_.begin();
      fail(head, ErrorKind::Engine,
           "The request needs " + std::to_string(kv_.num_blocks_for(head.num_tokens())) + " KV blocks, but only " +
               std::to_string(kv_.num_free()) + " can be had; raise num_blocks or kv_cache_bytes.",
           now);
    }
    return false;
  }
  emit_rows(step);
  step.plan.swap_out.swap(swap_outs_);
  ++next_plan_;
  ++steps_in_flight_;
  return true;
}

// True if somebody was preempted.
bool Scheduler::plan_running(PlannedStep& step) {
  bool preempted = false;
  for (std::size_t i = 0; i < running_.size() && budget_ > 0; ++i) {
    Sequence& seq = *running_[i];
    if (!can_plan(seq)) continue;
    const std::int32_t n = chunk_size(seq.to_compute(), config_.max_chunk, budget_, running_.size() - i - 1);
    const std::size_t known_sets = step.plan.table_sets.size();
    while (!kv_.reserve(seq.kv, seq.slot, seq.num_computed, n, step.plan)) {
      Sequence& victim = *running_[pick_victim(running_.size(), i)];
      preempt(victim);
      preempted = true;
      if (&victim == &seq) return true;
    }
    if (seq.stale_from >= 0) tell_table(seq, known_sets, step.plan);
    kv_.publish(seq.kv, seq.tokens, seq.num_computed + n);
    add_planned(seq, n, true);
  }
  return preempted;
}

// In place of what reserve() emitted since there were `known_sets`: an entry may stand in a plan only once.
void Scheduler::tell_table(Sequence& seq, std::size_t known_sets, StepPlan& plan) {
  plan.table_sets.resize(known_sets);
  const std::int32_t first = std::min(seq.stale_from, seq.num_computed / kv_.block_size());
  kv_.emit_table(seq.kv, seq.slot, plan, static_cast<std::size_t>(first));
  seq.stale_from = -1;
}

// What the first that was not admitted lacks.
WaitReason Scheduler::plan_waiting(PlannedStep& step, TimePoint now) {
  while (!waiting_.empty()) {
    if (free_slots_.empty()) return WaitReason::Slots;
    if (budget_ <= 0) return WaitReason::Tokens;
    if (!admit(**waiting_.begin(), step, now)) return WaitReason::Blocks;
  }
  return WaitReason::None;
}

// False, with nothing changed, if the sequence does not fit now.
bool Scheduler::admit(Sequence& seq, PlannedStep& step, TimePoint now) {
  StepPlan& plan = step.plan;
  if (seq.state == SeqState::Swapped) {
    if (!admits(kv_.num_blocks_for(seq.num_tokens()), kv_.num_free(), watermark_, running_.size())) return false;
    kv_.swap_in(seq.kv, plan.swap_in);
    --num_swapped_;
  } else {
    seq.num_computed = attach_kv(seq);
    const std::int64_t needed = kv_.blocks_needed(seq.kv, seq.num_computed, seq.to_compute());
    if (!admits(needed, kv_.num_free(), watermark_, running_.size())) {
      kv_.release(seq.kv);
      seq.num_computed = 0;
      return false;
    }
    if (seq.cached_tokens < 0) {
      const bool forked = seq.kv.num_published == 0 && seq.num_computed > 0;
      seq.cached_tokens = forked ? seq.req->seqs[0]->cached_tokens : seq.num_computed;
      seq.times.first_scheduled = now;
      if (!forked && kv_.caching()) {
        prefix_queries_ += seq.num_prompt;
        prefix_hits_ += seq.num_computed;
      }
      mark_started(*seq.req);
    }
  }
  dequeue(seq);
  seq.fork_of = -1;
  seq.state = SeqState::Running;
  seq.slot = free_slots_.back();
  free_slots_.pop_back();
  SlotInit& init = plan.new_slots.emplace_back();
  init.slot = seq.slot;
  init.sampling = seq.req->sampling;
  init.seed = seq.seed;
  init.num_prompt = seq.num_prompt;
  init.logits_processor = seq.req->logits_processor;
  if (needs_history(*seq.req->sampling)) init.tokens = seq.tokens;

  const std::int32_t n = chunk_size(seq.to_compute(), config_.max_chunk, budget_, 0);
  const std::size_t known_sets = plan.table_sets.size();
  [[maybe_unused]] const bool reserved = kv_.reserve(seq.kv, seq.slot, seq.num_computed, n, plan);
  assert(reserved);
  plan.table_sets.resize(known_sets);  // a new slot learns its whole table, each entry once
  kv_.emit_table(seq.kv, seq.slot, plan);
  kv_.publish(seq.kv, seq.tokens, seq.num_computed + n);
  running_.insert(std::ranges::upper_bound(running_, &seq, ByOrder{}), &seq);
  add_planned(seq, n, false);
  return true;
}

// Gives the empty table what others computed already and returns the positions covered. Copies run before the rows of
// a plan, so a fork waits for the plan after the one that completes the prompt: rows are emitted, and prompt_submitted
// is set, after admission.
std::int32_t Scheduler::attach_kv(Sequence& seq) {
  if (seq.fork_of >= 0) {
    const Sequence& sibling = *seq.req->seqs[static_cast<std::size_t>(seq.fork_of)];
    const std::int32_t shared = seq.num_tokens() - 1;
    if (sibling.state == SeqState::Running && sibling.num_computed >= shared) {
      kv_.fork(sibling.kv, seq.kv, shared);
      return shared;
    }
    return kv_.match_prefix(seq.kv, seq.tokens);
  }
  const Sequence& first = *seq.req->seqs[0];
  const bool first_has_it = first.state == SeqState::Running && first.prompt_submitted;
  if (seq.index > 0 && seq.num_output() == 0 && first_has_it && first.trusts_cache == seq.trusts_cache) {
    kv_.fork(first.kv, seq.kv, seq.num_prompt);
    seq.has_others_kv = first.has_others_kv;
    return seq.num_prompt - 1;
  }
  const bool scores_prompt = seq.index == 0 && seq.req->sampling->prompt_logprobs >= 0;
  if (scores_prompt && seq.prompt_logprobs_planned < seq.num_prompt - 1) return 0;
  if (!seq.trusts_cache) return 0;
  const int matched = kv_.match_prefix(seq.kv, seq.tokens);
  seq.has_others_kv = matched > 0;
  return matched;
}

bool Scheduler::can_plan(const Sequence& seq) const {
  if (seq.to_compute() <= 0 || seq.num_tokens() >= seq.req->token_limit) return false;
  return seq.inflight == 0 || !seq.req->needs_host_tokens();
}

void Scheduler::preempt(Sequence& seq) {
  ++num_preemptions_;
  ++seq.num_preemptions;
  kv_.publish(seq.kv, seq.tokens, seq.num_computed);
  remove_running(seq);
  free_slot(seq);
  const auto blocks = static_cast<std::int64_t>(seq.kv.blocks.size());
  if (pick_preemption(config_.preemption, blocks, kv_.num_host_free(), seq.num_computed) == PreemptionMode::Swap) {
    kv_.swap_out(seq.kv, swap_outs_);
    seq.state = SeqState::Swapped;
    ++num_swapped_;
  } else {
    evict(seq);
  }
  if (seq.inflight == 0 && !seq.parked) enqueue(seq);
}

// Everything is to be computed again.
void Scheduler::evict(Sequence& seq) {
  kv_.release(seq.kv);
  seq.num_computed = 0;
  seq.prompt_submitted = false;
  seq.state = seq.inflight > 0 ? SeqState::Draining : SeqState::Waiting;
}

bool Scheduler::preempt_parked() {
  const auto last = std::find_if(running_.rbegin(), running_.rend(), [](const Sequence* s) { return s->parked; });
  if (last == running_.rend()) return false;
  preempt(**last);
  return true;
}

// Only rows of sequences that ran before may move to the front: one admitted now may read blocks that a chunk of this
// step fills.
void Scheduler::add_planned(Sequence& seq, std::int32_t num_tokens, bool was_running) {
  budget_ -= num_tokens;
  const bool decode = was_running && num_tokens == 1 && seq.to_compute() == 1;
  (decode ? decodes_ : chunks_).push_back({&seq, num_tokens});
}

void Scheduler::emit_rows(PlannedStep& step) {
  for (const Planned& p : decodes_) emit_row(*p.seq, p.num_tokens, step);
  step.plan.num_decode_rows = static_cast<std::int32_t>(decodes_.size());
  for (const Planned& p : chunks_) emit_row(*p.seq, p.num_tokens, step);
  if (!step.plan.next_tokens.empty()) step.plan.next_tokens.resize(step.plan.tokens.size(), -1);
}

void Scheduler::emit_row(Sequence& seq, std::int32_t num_tokens, PlannedStep& step) {
  StepPlan& plan = step.plan;
  Request& request = *seq.req;
  const auto row_index = static_cast<std::int32_t>(plan.rows.size());
  Row& row = plan.rows.emplace_back();
  row.slot = seq.slot;
  row.first_pos = seq.num_computed;
  row.num_tokens = num_tokens;
  row.token_begin = static_cast<std::int32_t>(plan.tokens.size());
  step.seqs.push_back(&seq);

  if (seq.num_pending > 0) {
    assert(num_tokens == 1 && seq.to_compute() == 1);
    row.flags |= kFromSlot;
    plan.tokens.push_back(0);
  } else {
    const auto first = seq.tokens.begin() + seq.num_computed;
    plan.tokens.insert(plan.tokens.end(), first, first + num_tokens);
  }
  const std::int32_t end = seq.num_computed + num_tokens;
  if (seq.num_computed < seq.num_prompt) prompt_tokens_ += std::min(end, seq.num_prompt) - seq.num_computed;
  if (request.sampling->prompt_logprobs >= 0 && seq.index == 0) emit_prompt_logprobs(seq, row, plan);

  if (end == seq.num_tokens()) {
    row.flags |= kSample;
    ++seq.num_pending;
    plan.max_logprobs = std::max(plan.max_logprobs, request.sampling->logprobs);
    if (seq.mask) {
      row.flags |= kMask;
      plan.masked_rows.push_back(row_index);
    }
    if (request.lends_host_tokens()) plan.host_tokens.push_back({row_index, seq.tokens});
  }
  if (end >= seq.num_prompt && !seq.prompt_submitted) {
    seq.prompt_submitted = true;
    if (!request.forked) {
      request.forked = true;
      for (std::size_t i = 1; i < request.seqs.size(); ++i) enqueue(*request.seqs[i]);
    }
  }
  seq.num_computed = end;
  ++seq.inflight;
  ++request.inflight;
}

// Asks for every prompt position once, also when a preemption makes the prompt run again.
void Scheduler::emit_prompt_logprobs(Sequence& seq, Row& row, StepPlan& plan) {
  const std::int32_t begin = std::max(seq.prompt_logprobs_planned, row.first_pos);
  const std::int32_t end = std::min(seq.num_prompt - 1, row.first_pos + row.num_tokens);
  if (begin >= end) return;
  row.flags |= kPromptLogprobs;
  plan.next_tokens.resize(plan.tokens.size(), -1);
  for (std::int32_t pos = begin; pos < end; ++pos) {
    plan.next_tokens[static_cast<std::size_t>(row.token_begin + pos - row.first_pos)] =
        seq.tokens[static_cast<std::size_t>(pos) + 1];
  }
  seq.prompt_logprobs_planned = end;
}

void Scheduler::expire(TimePoint now) {
  while (!deadlines_.empty() && (*deadlines_.begin())->deadline < now) {
    Request& request = **deadlines_.begin();
    const auto waited = std::chrono::duration_cast<std::chrono::milliseconds>(now - request.seqs[0]->times.arrival);
    end_request(request, FinishReason::Error, ErrorKind::Timeout,
                "The request waited " + std::to_string(waited.count()) + " ms and its deadline passed.", now);
    destroy_if_unused(request);
  }
}

}  // namespace fastllm

// The part of the Scheduler that takes requests in, applies results and lets go: from arrival to destruction.
#include <algorithm>
#include <cassert>
#include <exception>
#include <utility>

#include "fastllm/error.h"
#include "sched/scheduler.h"

namespace fastllm {
namespace {

PositionLogprobs best(const PositionLogprobs& from, std::int32_t count) {
  PositionLogprobs to{from.chosen, {}};
  const auto n = std::min(from.top.size(), static_cast<std::size_t>(count));
  to.top.assign(from.top.begin(), from.top.begin() + static_cast<std::ptrdiff_t>(n));
  return to;
}

const std::string* find_error(const StepResult& result, std::int32_t sample) {
  for (const auto& [index, sentence] : result.row_errors) {
    if (index == sample) return &sentence;
  }
  return nullptr;
}

std::vector<std::shared_ptr<TokenMask>> masks_of_samples(const RequestInput& input) {
  std::vector<std::shared_ptr<TokenMask>> masks;
  if (!input.mask) return masks;
  masks.push_back(input.mask);
  while (masks.size() < static_cast<std::size_t>(input.sampling.n)) masks.push_back(input.mask->clone());
  return masks;
}

}  // namespace

void Scheduler::add(RequestInput input, TimePoint arrival) {
  if (live_.contains(input.id)) {
    return refuse(input.id, ErrorKind::Invalid,
                  "id " + std::to_string(input.id) + " belongs to a request that still runs.", arrival);
  }
  if (config_.max_waiting > 0 && num_unstarted_ >= config_.max_waiting) {
    return refuse(input.id, ErrorKind::Overloaded,
                  "The engine is full: " + std::to_string(num_unstarted_) + " requests wait, and max_waiting is " +
                      std::to_string(config_.max_waiting) + ".",
                  arrival);
  }
  if (std::string error = admission_error(input, limits_); !error.empty()) {
    return refuse(input.id, ErrorKind::Invalid, std::move(error), arrival);
  }
  std::vector<std::shared_ptr<TokenMask>> masks;  // [n], empty without one
  try {
    masks = masks_of_samples(input);
  } catch (const std::exception& e) {
    return refuse(input.id, ErrorKind::Invalid, std::string("The token mask failed: ") + e.what(), arrival);
  }
  auto request = std::make_unique<Request>();
  request->id = input.id;
  request->token_limit = token_limit(input, limits_);
  request->logits_processor = std::move(input.logits_processor);
  if (input.deadline) request->deadline = *input.deadline;

  auto sampling = std::make_shared<SamplingParams>(std::move(input.sampling));
  const auto num_prompt = static_cast<std::int32_t>(input.prompt.size());
  const std::uint64_t seed = sampling->seed ? *sampling->seed : hash_combine(config_.seed, input.id);
  sampling->max_tokens = request->token_limit - num_prompt;
  sampling->min_tokens = std::min(sampling->min_tokens, sampling->max_tokens);
  const PrefixNodeId root = kv_.root(input.cache_salt, input.adapter);
  const std::uint64_t arrival_number = next_arrival_++;
  const int num_seqs = sampling->beam_width > 0 ? sampling->beam_width : sampling->n;
  for (int i = 0; i < num_seqs; ++i) {
    auto seq = std::make_unique<Sequence>();
    seq->req = request.get();
    seq->index = i;
    seq->order = order_key(config_.policy, input.priority, arrival_number, i);
    seq->seed = sequence_seed(seed, i);
    seq->num_prompt = num_prompt;
    seq->tokens = input.prompt;
    seq->kv.root = seq->kv.tail = root;
    seq->times.arrival = arrival;
    if (!masks.empty()) seq->mask = std::move(masks[static_cast<std::size_t>(i)]);
    request->seqs.push_back(std::move(seq));
  }
  request->num_live = num_seqs;
  request->sampling = sampling;
  if (sampling->beam_width > 0) start_beams(*request, *sampling);
  num_live_seqs_ += request->num_live;
  ++num_unstarted_;
  if (request->deadline != TimePoint::max()) deadlines_.insert(request.get());
  enqueue(*request->seqs[0]);
  live_.emplace(request->id, std::move(request));
}

void Scheduler::abort(std::uint64_t id, TimePoint now) {
  const auto it = live_.find(id);
  if (it == live_.end()) return;
  Request& request = *it->second;
  request.aborted = true;
  end_request(request, FinishReason::Abort, ErrorKind::None, {}, now);
  destroy_if_unused(request);
}

void Scheduler::abort_sequence(std::uint64_t id, int index, TimePoint now) {
  const auto it = live_.find(id);
  if (it == live_.end() || index < 0 || static_cast<std::size_t>(index) >= it->second->seqs.size()) return;
  Request& request = *it->second;
  if (request.beams) return abort(id, now);  // none of its sequences is a result yet
  Sequence& seq = *request.seqs[static_cast<std::size_t>(index)];
  if (seq.state == SeqState::Finished) return;
  request.aborted = request.num_live == 1;
  end_sequence(seq, FinishReason::Abort, ErrorKind::None, {}, now);
  retire_if_ended(request);
  destroy_if_unused(request);
}

void Scheduler::abort_all(TimePoint now) {
  while (!live_.empty()) abort(live_.begin()->first, now);
}

void Scheduler::fail_all(const std::string& sentence, TimePoint now) {
  while (!live_.empty()) fail(*live_.begin()->second->seqs[0], ErrorKind::Engine, sentence, now);
  swap_outs_.clear();
  steps_in_flight_ = 0;
}

void Scheduler::fail(Sequence& seq, ErrorKind kind, const std::string& sentence, TimePoint now) {
  Request& request = *seq.req;
  end_request(request, FinishReason::Error, kind, sentence, now);
  destroy_if_unused(request);
}

// What it computed may not be numbers either, from some position on that nobody knows: no other request may read it.
// Where it had read what others computed, the fault may be theirs: it computes everything once more, by itself.
void Scheduler::retry_or_fail_poisoned(Sequence& seq, TimePoint now) {
  Request& request = *seq.req;
  if (seq.has_others_kv && seq.trusts_cache && !request.beams) {
    if (seq.state == SeqState::Running) {
      remove_running(seq);
      free_slot(seq);
    } else if (seq.state == SeqState::Swapped) {
      forget_swap(seq);
      if (seq.queued) dequeue(seq);
    }
    evict(seq);
    kv_.forget_prefix(seq.kv.root, seq.tokens);
    seq.trusts_cache = false;
    seq.void_samples = std::exchange(seq.num_pending, 0);
    return;
  }
  ++num_nan_rows_;
  end_request(request, FinishReason::Error, ErrorKind::Engine, "The model's logits are not numbers.", now);
  for (const auto& each : request.seqs) kv_.forget_prefix(each->kv.root, each->tokens);
}

void Scheduler::on_result(const PlannedStep& step, const StepResult& result, TimePoint now) {
  const StepPlan& plan = step.plan;
  --steps_in_flight_;
  std::size_t scored = 0;
  std::int32_t sample = 0;
  std::shared_ptr<void> held;
  if (!plan.masked_rows.empty()) held = step.seqs[static_cast<std::size_t>(plan.masked_rows[0])]->mask->hold();
  for (std::size_t r = 0; r < plan.rows.size(); ++r) {
    const Row& row = plan.rows[r];
    Sequence& seq = *step.seqs[r];
    Request& request = *seq.req;
    --seq.inflight;
    --request.inflight;
    if (seq.inflight == 0 && seq.state == SeqState::Draining) seq.state = SeqState::Waiting;
    if (row.flags & kPromptLogprobs) {
      for (std::int32_t i = 0; i < row.num_tokens; ++i) {
        if (plan.next_tokens[static_cast<std::size_t>(row.token_begin + i)] < 0) continue;
        seq.prompt_logprobs.push_back(best(result.prompt_logprobs.at(scored++), request.sampling->prompt_logprobs));
      }
    }
    if (row.flags & kSample) {
      const bool is_void = seq.void_samples > 0;
      --(is_void ? seq.void_samples : seq.num_pending);
      const auto k = static_cast<std::size_t>(sample);
      if (is_void || seq.state == SeqState::Finished) {
        // The token came too late: an earlier one, the caller or an error ended the sequence.
      } else if (const std::string* error = find_error(result, sample)) {
        end_request(request, FinishReason::Error, ErrorKind::Invalid, *error, now);
      } else if (std::ranges::find(result.nan_rows, sample) != result.nan_rows.end()) {
        retry_or_fail_poisoned(seq, now);
      } else if (request.beams) {
        know_next(seq, result.logprobs.at(k), now);
      } else {
        apply_token(seq, result.tokens.at(k), plan.max_logprobs >= 0 ? &result.logprobs.at(k) : nullptr, now);
      }
      ++sample;
    }
    const bool evicted = seq.state == SeqState::Waiting || seq.state == SeqState::Swapped;
    if (evicted && seq.inflight == 0 && !seq.parked && !seq.queued) enqueue(seq);
    destroy_if_unused(request);
  }
}

void Scheduler::apply_token(Sequence& seq, TokenId token, const PositionLogprobs* logprobs, TimePoint now) {
  Request& request = *seq.req;
  if (token < 0 || token >= model_.vocab) {
    throw Error("The executor returned token id " + std::to_string(token) + ", but the vocabulary has ids 0 to " +
                std::to_string(model_.vocab - 1) + ".");
  }
  seq.tokens.push_back(token);
  ++generated_tokens_;
  if (seq.num_output() == 1) seq.times.first_token = now;
  bool complete = false;
  if (seq.mask) {
    try {
      complete = seq.mask->accept(token);
    } catch (const std::exception& e) {
      return end_request(request, FinishReason::Error, ErrorKind::Invalid,
                         std::string("The token mask failed: ") + e.what(), now);
    }
  }
  FinishReason reason = reason_to_stop(seq, token);
  const bool at_stop_token = reason == FinishReason::Stop;
  if (complete) reason = FinishReason::Stop;
  if (reason != FinishReason::None) finish(seq, now);
  TokenDelta& delta = new_delta(seq);
  delta.tokens.push_back(token);
  if (logprobs && request.sampling->logprobs >= 0)
    delta.logprobs.push_back(best(*logprobs, request.sampling->logprobs));
  delta.prompt_logprobs = std::exchange(seq.prompt_logprobs, {});
  delta.finish = reason;
  if (at_stop_token) delta.stop_token = token;
  if (reason != FinishReason::None) retire_if_ended(request);
}

FinishReason Scheduler::reason_to_stop(const Sequence& seq, TokenId token) const {
  const SamplingParams& p = *seq.req->sampling;
  if (seq.num_output() > p.min_tokens) {
    if (!p.ignore_eos && std::ranges::find(model_.eos, token) != model_.eos.end()) return FinishReason::Stop;
    if (std::ranges::find(p.stop_ids, token) != p.stop_ids.end()) return FinishReason::Stop;
  }
  return static_cast<std::int32_t>(seq.tokens.size()) >= seq.req->token_limit ? FinishReason::Length
                                                                              : FinishReason::None;
}

// Takes everything from the sequence but its memory. The delta is the caller's.
void Scheduler::finish(Sequence& seq, TimePoint now) {
  assert(seq.state != SeqState::Finished);
  if (seq.queued) dequeue(seq);
  if (seq.state == SeqState::Running) {
    kv_.publish(seq.kv, seq.tokens, seq.num_computed);
    remove_running(seq);
    free_slot(seq);
  } else if (seq.state == SeqState::Swapped) {
    forget_swap(seq);
  }
  kv_.release(seq.kv);
  seq.state = SeqState::Finished;
  seq.times.finished = now;
  --seq.req->num_live;
  --num_live_seqs_;
}

// Its blocks on the host are not wanted any more.
void Scheduler::forget_swap(Sequence& seq) {
  --num_swapped_;
  std::erase_if(swap_outs_, [&](const BlockCopy& copy) {
    return std::ranges::find(seq.kv.host_blocks, copy.to) != seq.kv.host_blocks.end();
  });
}

void Scheduler::end_sequence(Sequence& seq, FinishReason reason, ErrorKind kind, const std::string& sentence,
                             TimePoint now) {
  finish(seq, now);
  if (seq.index >= seq.req->sampling->n) return;  // a beam beyond the results
  TokenDelta& delta = new_delta(seq);
  delta.finish = reason;
  delta.error = sentence;
  delta.error_kind = kind;
}

// The object stays valid until destroy_if_unused().
void Scheduler::end_request(Request& request, FinishReason reason, ErrorKind kind, const std::string& sentence,
                            TimePoint now) {
  for (const auto& seq : request.seqs) {
    if (seq->state != SeqState::Finished) end_sequence(*seq, reason, kind, sentence, now);
  }
  retire_if_ended(request);
}

void Scheduler::refuse(std::uint64_t id, ErrorKind kind, std::string sentence, TimePoint arrival) {
  ++num_ended_;
  TokenDelta& delta = deltas_.emplace_back();
  delta.id = id;
  delta.finish = FinishReason::Error;
  delta.error_kind = kind;
  delta.error = std::move(sentence);
  delta.times.arrival = delta.times.finished = arrival;
}

// The caller may use the id again from now on.
void Scheduler::retire_if_ended(Request& request) {
  if (request.num_live > 0) return;
  auto node = live_.extract(request.id);
  assert(node);
  dying_.push_back(std::move(node.mapped()));
  ++num_ended_;
  ++(request.aborted ? num_aborted_ : num_finished_);
  mark_started(request);
}

void Scheduler::destroy_if_unused(Request& request) {
  if (request.num_live > 0 || request.inflight > 0) return;
  const auto it = std::ranges::find(dying_, &request, &std::unique_ptr<Request>::get);
  assert(it != dying_.end());
  std::swap(*it, dying_.back());
  dying_.pop_back();
}

void Scheduler::mark_started(Request& request) {
  if (request.started) return;
  request.started = true;
  --num_unstarted_;
  if (request.deadline != TimePoint::max()) deadlines_.erase(&request);
}

void Scheduler::enqueue(Sequence& seq) {
  assert(seq.inflight == 0 && !seq.queued);
  waiting_.insert(&seq);
  seq.queued = true;
}

void Scheduler::dequeue(Sequence& seq) {
  waiting_.erase(&seq);
  seq.queued = false;
}

void Scheduler::remove_running(Sequence& seq) {
  const auto it = std::ranges::lower_bound(running_, &seq, ByOrder{});
  assert(it != running_.end() && *it == &seq);
  running_.erase(it);
}

void Scheduler::free_slot(Sequence& seq) {
  free_slots_.push_back(seq.slot);
  seq.slot = kNoSlot;
  seq.stale_from = -1;
}

TokenDelta& Scheduler::new_delta(const Sequence& seq) {
  TokenDelta& delta = deltas_.emplace_back();
  delta.id = seq.req->id;
  delta.index = seq.index;
  delta.cached_tokens = std::max(seq.cached_tokens, 0);
  delta.num_preemptions = seq.num_preemptions;
  delta.times = seq.times;
  return delta;
}

void Scheduler::take_deltas(std::vector<TokenDelta>& out) {
  out.clear();
  out.swap(deltas_);
}

void Scheduler::fill_stats(EngineStats& stats) const {
  const KvSnapshot kv = kv_.snapshot();
  stats.num_running = static_cast<int>(running_.size());
  stats.num_swapped = static_cast<int>(num_swapped_);
  stats.num_waiting = static_cast<int>(num_live_seqs_ - num_swapped_) - stats.num_running;
  stats.wait_reason = num_live_seqs_ == stats.num_running ? WaitReason::None
                      : waiting_.empty()                  ? WaitReason::Prompt
                                                          : wait_reason_;
  stats.total_blocks = kv.total;
  stats.used_blocks = kv.used;
  stats.peak_used_blocks = kv.peak_used;
  stats.cached_blocks = kv.cached;
  stats.num_steps = static_cast<std::int64_t>(next_plan_) - 1;
  stats.prompt_tokens = prompt_tokens_;
  stats.generated_tokens = generated_tokens_;
  stats.prefix_queries = prefix_queries_;
  stats.prefix_hits = prefix_hits_;
  stats.num_preemptions = num_preemptions_;
  stats.num_finished = num_finished_;
  stats.num_aborted = num_aborted_;
  stats.nan_rows = num_nan_rows_;
}

}  // namespace fastllm

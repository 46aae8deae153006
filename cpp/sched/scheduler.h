// Decides what the next step does. One token budget, no phases: a step lets num_computed chase num_tokens for as many
// sequences as fit, so chunked prefill, prefix hits and recompute after preemption are the same rule.
//
//   schedule()   running sequences in order: take a chunk, reserve blocks (or preempt from the end of the order),
//                publish the blocks this step fills; then, if nobody was preempted, admit from the waiting line
//   on_result()  append the tokens, finish what ended
//
// Asynchronous by facts: schedule() may run again before the result of the last plan is known. A row that was planned
// is never withdrawn; a result is applied whatever became of its sequence. A shared block that a row of this step fills
// is readable for later rows of the step, because rows run in plan order.
//
// Engine thread only. Deterministic: time enters as an argument and decides nothing but deadlines.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "kv/kv_manager.h"
#include "sched/admission.h"
#include "sched/sequence.h"
#include "sched/step_plan.h"

namespace fastllm {

// What the model contributes to the limits.
struct ModelLimits {
  int vocab = 0;
  int max_len = 0;  // tokens of prompt + output
  std::vector<TokenId> eos;
};

// A plan and whose rows it has. Owned by a ring; immutable between schedule() and on_result().
struct PlannedStep {
  StepPlan plan;
  std::vector<Sequence*> seqs;  // parallel to plan.rows
};

class Scheduler {
 public:
  Scheduler(const EngineConfig& config, ModelLimits model, const KvConfig& kv);
  ~Scheduler();

  // A bad or excess request ends at once with an Error delta.
  void add(RequestInput input, TimePoint arrival);
  void abort(std::uint64_t id, TimePoint now);
  void abort_sequence(std::uint64_t id, int index, TimePoint now);
  void abort_all(TimePoint now);
  // Ends every request with this sentence and expects no more results: for a fault of the executor. What the steps in
  // flight may still read stays until the scheduler's end.
  void fail_all(const std::string& sentence, TimePoint now);

  // Fills the step; false if nothing can run before a result arrives.
  bool schedule(PlannedStep& step, TimePoint now);
  void on_result(const PlannedStep& step, const StepResult& result, TimePoint now);
  // Ends one request with Error while the rest goes on.
  void fail(Sequence& seq, ErrorKind kind, const std::string& sentence, TimePoint now);

  // What happened since the last call; replaces `out`.
  void take_deltas(std::vector<TokenDelta>& out);

  bool has_requests() const { return !live_.empty(); }
  bool idle() const { return live_.empty() && dying_.empty(); }
  void reset_prefix_cache() { kv_.reset_cache(); }
  void fill_stats(EngineStats& stats) const;
  std::int64_t num_ended() const { return num_ended_; }  // requests, refused ones included

  // For the invariants.
  const KvManager& kv() const { return kv_; }
  const std::vector<Sequence*>& running() const { return running_; }
  template <class F>
  void for_each_sequence(F&& f) const {
    for (const auto& [id, request] : live_) {
      for (const auto& seq : request->seqs) f(*seq);
    }
    for (const auto& request : dying_) {
      for (const auto& seq : request->seqs) f(*seq);
    }
  }
  std::size_t num_free_slots() const { return free_slots_.size(); }
  std::size_t num_slots() const { return static_cast<std::size_t>(config_.max_num_seqs); }
  std::size_t num_queued() const { return waiting_.size(); }

 private:
  struct ByOrder {
    bool operator()(const Sequence* a, const Sequence* b) const { return a->order < b->order; }
  };
  struct ByDeadline {
    bool operator()(const Request* a, const Request* b) const {
      return a->deadline != b->deadline ? a->deadline < b->deadline : a->id < b->id;
    }
  };
  struct Planned {
    Sequence* seq;
    std::int32_t num_tokens;
  };

  // scheduler.cc: planning
  bool plan_running(PlannedStep& step);
  WaitReason plan_waiting(PlannedStep& step, TimePoint now);
  bool admit(Sequence& seq, PlannedStep& step, TimePoint now);
  std::int32_t attach_kv(Sequence& seq);
  bool can_plan(const Sequence& seq) const;
  void tell_table(Sequence& seq, std::size_t known_sets, StepPlan& plan);
  void preempt(Sequence& seq);
  void evict(Sequence& seq);
  bool preempt_parked();
  void add_planned(Sequence& seq, std::int32_t num_tokens, bool was_running);
  void emit_rows(PlannedStep& step);
  void emit_row(Sequence& seq, std::int32_t num_tokens, PlannedStep& step);
  void emit_prompt_logprobs(Sequence& seq, Row& row, StepPlan& plan);
  void expire(TimePoint now);

  // beams.cc: the sequences of a beam search
  void start_beams(Request& request, SamplingParams& sampling);
  void know_next(Sequence& seq, const PositionLogprobs& next, TimePoint now);
  void advance_beams(Request& request, TimePoint now);
  void branch(const Sequence& from, Sequence& to);
  void leave_device(Sequence& seq);
  void end_beams(Request& request, TimePoint now);

  // lifecycle.cc: from arrival to destruction
  void apply_token(Sequence& seq, TokenId token, const PositionLogprobs* logprobs, TimePoint now);
  FinishReason reason_to_stop(const Sequence& seq, TokenId token) const;
  void finish(Sequence& seq, TimePoint now);
  void forget_swap(Sequence& seq);
  void end_sequence(Sequence& seq, FinishReason reason, ErrorKind kind, const std::string& sentence, TimePoint now);
  void retry_or_fail_poisoned(Sequence& seq, TimePoint now);
  void end_request(Request& request, FinishReason reason, ErrorKind kind, const std::string& sentence, TimePoint now);
  void refuse(std::uint64_t id, ErrorKind kind, std::string sentence, TimePoint arrival);
  void retire_if_ended(Request& request);
  void destroy_if_unused(Request& request);
  void mark_started(Request& request);
  void enqueue(Sequence& seq);
  void dequeue(Sequence& seq);
  void remove_running(Sequence& seq);
  void free_slot(Sequence& seq);
  TokenDelta& new_delta(const Sequence& seq);

  EngineConfig config_;
  ModelLimits model_;
  AdmissionLimits limits_;
  KvManager kv_;
  std::int64_t watermark_;  // blocks

  std::unordered_map<std::uint64_t, std::unique_ptr<Request>> live_;  // by id
  std::vector<std::unique_ptr<Request>> dying_;                       // ended, with steps in flight
  std::vector<Sequence*> running_;                                    // by order
  std::set<Sequence*, ByOrder> waiting_;                              // Waiting or Swapped, nothing in flight
  std::set<Request*, ByDeadline> deadlines_;                          // not started
  std::vector<SlotId> free_slots_;
  std::vector<BlockCopy> swap_outs_;  // not yet in a submitted plan
  std::vector<TokenDelta> deltas_;

  // Scratch of one schedule(); kept for its memory.
  std::vector<Planned> decodes_, chunks_;
  std::int32_t budget_ = 0;  // tokens
  WaitReason wait_reason_ = WaitReason::None;

  std::uint64_t next_plan_ = 1;
  std::uint64_t next_arrival_ = 0;
  std::int64_t steps_in_flight_ = 0;
  std::int64_t num_unstarted_ = 0;                    // requests
  std::int64_t num_live_seqs_ = 0, num_swapped_ = 0;  // sequences
  std::int64_t num_ended_ = 0, num_finished_ = 0, num_aborted_ = 0, num_preemptions_ = 0, num_nan_rows_ = 0;
  std::int64_t prompt_tokens_ = 0, generated_tokens_ = 0, prefix_queries_ = 0, prefix_hits_ = 0;
};

}  // namespace fastllm

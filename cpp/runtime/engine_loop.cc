#include "runtime/engine_loop.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "fastllm/error.h"
#include "sched/invariants.h"
#include "sched/merge_deltas.h"

namespace fastllm {

EngineLoop::EngineLoop(const EngineConfig& config, ModelLimits model, const KvConfig& kv,
                       std::unique_ptr<Executor> executor)
    : config_(config),
      vocab_(model.vocab),
      ring_(static_cast<std::size_t>(executor->depth())),
      scheduler_(config, std::move(model), kv),
      executor_(std::move(executor)),
      beat_at_(Clock::now().time_since_epoch().count()),
      outbox_(&event_),
      last_turn_(Clock::now()) {
  scheduler_.fill_stats(stats_);
  thread_ = std::thread([this] { run(); });
}

EngineLoop::~EngineLoop() { shutdown(); }

void EngineLoop::submit(RequestInput input) {
  const TimePoint now = Clock::now();
  TokenDelta refused;
  {
    std::lock_guard lock(state_mutex_);
    if (refusal_.empty()) {
      ++num_accepted_;
      Command command{Command::Kind::Submit, std::move(input), 0, now, 0};
      inbox_.push(std::move(command));
      return;
    }
    refused.error = refusal_;
  }
  refused.id = input.id;
  refused.finish = FinishReason::Error;
  refused.error_kind = ErrorKind::Overloaded;
  refused.times.arrival = refused.times.finished = now;
  outbox_.push(std::move(refused));
}

void EngineLoop::abort(std::uint64_t id) { inbox_.push({Command::Kind::Abort, {}, id, {}, 0}); }

void EngineLoop::abort(std::uint64_t id, int index) { inbox_.push({Command::Kind::AbortSequence, {}, id, {}, index}); }

void EngineLoop::reset_prefix_cache() { inbox_.push({Command::Kind::ResetCache, {}, 0, {}, 0}); }

bool EngineLoop::poll(std::vector<TokenDelta>& out, std::chrono::milliseconds timeout) {
  if (!outbox_.wait_take_for(out, timeout)) return false;
  merge_deltas(out);
  return true;
}

EngineStats EngineLoop::stats() const {
  std::lock_guard lock(state_mutex_);
  EngineStats stats = stats_;
  stats.last_step_age_s = asleep_ ? 0 : std::chrono::duration<double>(Clock::now() - last_turn_).count();
  return stats;
}

Heartbeat EngineLoop::heartbeat() const {
  Heartbeat beat;
  beat.count = beats_.load(std::memory_order_acquire);
  beat.busy = busy_.load(std::memory_order_acquire);
  const Clock::duration age =
      Clock::now().time_since_epoch() - Clock::duration(beat_at_.load(std::memory_order_acquire));
  beat.age_s = std::chrono::duration<double>(age).count();
  return beat;
}

void EngineLoop::beat(bool busy) {
  beat_at_.store(Clock::now().time_since_epoch().count(), std::memory_order_release);
  busy_.store(busy, std::memory_order_release);
  beats_.fetch_add(1, std::memory_order_release);
}

bool EngineLoop::drain(std::chrono::milliseconds timeout) {
  std::unique_lock lock(state_mutex_);
  if (refusal_.empty()) refusal_ = "The engine is draining and takes no new requests.";
  return ended_.wait_for(lock, timeout, [&] { return num_ended_ == num_accepted_; });
}

void EngineLoop::shutdown() {
  {
    std::lock_guard lock(state_mutex_);
    refusal_ = "The engine is shut down.";
  }
  std::lock_guard lock(join_mutex_);
  if (!thread_.joinable()) return;
  inbox_.push({Command::Kind::Stop, {}, 0, {}, 0});
  thread_.join();
}

void EngineLoop::run() {
  beat(true);
  busy_since_ = Clock::now();
  while (!stopping_) {
    try {
      turn();
    } catch (const std::exception& e) {
      fault(e.what());
    }
    publish();
    beat(true);
  }
}

// One turn: commands, at most one new plan, and a result once the ring is full or there is nothing else to do.
void EngineLoop::turn() {
  if (scheduler_.has_requests() || num_submitted_ > num_waited_) {
    if (inbox_.take(commands_)) obey(commands_);
  } else {
    {
      std::lock_guard lock(state_mutex_);
      asleep_ = true;
    }
    add_host_time();
    beat(false);
    inbox_.wait_take(commands_);
    beat(true);
    busy_since_ = Clock::now();
    obey(commands_);
  }
  if (stopping_) {
    scheduler_.abort_all(Clock::now());
    while (num_submitted_ > num_waited_) finish_step();
    return;
  }
  const bool planned = submit_step();
  const bool full = num_submitted_ - num_waited_ == ring_.size();
  if (num_submitted_ > num_waited_ && (full || !planned)) finish_step();
  if (config_.check_invariants) check_invariants(scheduler_);
}

void EngineLoop::obey(std::vector<Command>& commands) {
  for (Command& command : commands) {
    switch (command.kind) {
      case Command::Kind::Submit:
        scheduler_.add(std::move(command.input), command.arrival);
        break;
      case Command::Kind::Abort:
        scheduler_.abort(command.id, Clock::now());
        break;
      case Command::Kind::AbortSequence:
        scheduler_.abort_sequence(command.id, command.index, Clock::now());
        break;
      case Command::Kind::ResetCache:
        scheduler_.reset_prefix_cache();
        break;
      case Command::Kind::Stop:
        stopping_ = true;
        break;
    }
  }
  commands.clear();
  if (!fault_.empty()) scheduler_.fail_all(fault_, Clock::now());
}

bool EngineLoop::submit_step() {
  if (!scheduler_.has_requests()) return false;
  PlannedStep& step = ring_[num_submitted_ % ring_.size()];
  if (!scheduler_.schedule(step, Clock::now())) return false;
  ++num_submitted_;
  executor_->submit(step.plan);
  if (!step.plan.masked_rows.empty()) fill_masks(step);
  return true;
}

// While the device computes. A grammar that throws fails its request; its row samples freely and is dropped.
void EngineLoop::fill_masks(const PlannedStep& step) {
  const std::size_t words = (static_cast<std::size_t>(vocab_) + 31) / 32;
  const std::vector<std::int32_t>& rows = step.plan.masked_rows;
  masks_.assign(rows.size() * words, 0);
  std::shared_ptr<void> held = step.seqs[static_cast<std::size_t>(rows[0])]->mask->hold();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Sequence& seq = *step.seqs[static_cast<std::size_t>(rows[i])];
    const auto bits = std::span(masks_).subspan(i * words, words);
    try {
      seq.mask->fill(bits);
    } catch (const std::exception& e) {
      std::ranges::fill(bits, ~0u);
      scheduler_.fail(seq, ErrorKind::Invalid, std::string("The token mask failed: ") + e.what(), Clock::now());
    }
  }
  held.reset();
  executor_->set_masks(step.plan.id, masks_);
}

void EngineLoop::finish_step() {
  const PlannedStep& step = ring_[num_waited_ % ring_.size()];
  add_host_time();
  beat(true);
  const StepResult& result = executor_->wait(step.plan.id);
  beat(true);
  busy_since_ = Clock::now();
  ++num_waited_;
  if (!result.error.empty()) throw Error(result.error);
  scheduler_.on_result(step, result, Clock::now());
}

void EngineLoop::add_host_time() {
  const TimePoint now = Clock::now();
  host_time_ += now - busy_since_;
  busy_since_ = now;
}

void EngineLoop::fault(const std::string& sentence) {
  if (fault_.empty()) fault_ = "The engine stopped after a fault: " + sentence;
  num_waited_ = num_submitted_;
  scheduler_.fail_all(fault_, Clock::now());
  if (scheduler_.kv().snapshot().used > 0) block_leaks_ = scheduler_.kv().snapshot().used;
}

// Hands out what this turn produced: one event at most. The statistics come first, so that who saw a delta sees its
// counts; the end of a drain comes last, so that it finds every delta delivered.
void EngineLoop::publish() {
  if (scheduler_.idle()) block_leaks_ = std::max(block_leaks_, scheduler_.kv().snapshot().used);
  scheduler_.take_deltas(deltas_);
  add_host_time();
  {
    std::lock_guard lock(state_mutex_);
    scheduler_.fill_stats(stats_);
    stats_.block_leaks = block_leaks_;
    stats_.host_s = std::chrono::duration<double>(host_time_).count();
    stats_.healthy = fault_.empty();
    last_turn_ = Clock::now();
    asleep_ = false;
  }
  outbox_.push_all(deltas_);
  if (num_ended_ == scheduler_.num_ended()) return;
  std::lock_guard lock(state_mutex_);
  num_ended_ = scheduler_.num_ended();
  ended_.notify_all();
}

}  // namespace fastllm

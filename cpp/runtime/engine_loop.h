// The engine thread and the two mailboxes between it and the callers. Knows the scheduler and an Executor, no backend.
//
//   callers --inbox--> [ drain inbox | schedule + submit, up to depth() plans | wait for the oldest | apply ]
//   --outbox-->
//
// Public methods are thread-safe. The scheduler, the executor and the ring of steps belong to the engine thread. A
// fault of the executor ends every request with Error and leaves an engine that refuses new ones; nothing leaves the
// thread as an exception.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/event_fd.h"
#include "base/mailbox.h"
#include "runtime/executor.h"
#include "sched/scheduler.h"

namespace fastllm {

class EngineLoop {
 public:
  // `kv` is what the executor's init_kv() was called with.
  EngineLoop(const EngineConfig& config, ModelLimits model, const KvConfig& kv, std::unique_ptr<Executor> executor);
  ~EngineLoop();
  EngineLoop(const EngineLoop&) = delete;
  EngineLoop& operator=(const EngineLoop&) = delete;

  void submit(RequestInput input);
  void abort(std::uint64_t id);
  void abort(std::uint64_t id, int index);
  bool poll(std::vector<TokenDelta>& out, std::chrono::milliseconds timeout);
  int event_fd() const { return event_.fd(); }
  EngineStats stats() const;
  Heartbeat heartbeat() const;
  void reset_prefix_cache();
  bool drain(std::chrono::milliseconds timeout);
  void shutdown();

 private:
  struct Command {
    enum class Kind : std::uint8_t { Submit, Abort, AbortSequence, ResetCache, Stop } kind = Kind::Stop;
    RequestInput input;    // Submit
    std::uint64_t id = 0;  // Abort, AbortSequence
    TimePoint arrival{};   // Submit
    int index = 0;         // AbortSequence
  };

  void run();
  void turn();
  void obey(std::vector<Command>& commands);
  bool submit_step();
  void fill_masks(const PlannedStep& step);
  void finish_step();
  void add_host_time();
  void beat(bool busy);
  void fault(const std::string& sentence);
  void publish();

  const EngineConfig config_;
  const int vocab_;
  std::vector<PlannedStep> ring_;  // [depth]; outlives the executor, which may still read a plan
  Scheduler scheduler_;
  std::unique_ptr<Executor> executor_;
  std::uint64_t num_submitted_ = 0, num_waited_ = 0;  // plans
  std::vector<Command> commands_;
  std::vector<TokenDelta> deltas_;
  std::vector<std::uint32_t> masks_;  // [masked rows, words]
  std::string fault_;                 // why the executor is not used any more
  std::int64_t block_leaks_ = 0;
  bool stopping_ = false;
  Clock::duration host_time_{0};  // outside waits, up to busy_since_
  TimePoint busy_since_{};

  // Written by the engine thread without a lock, so that they can be read whatever it is stuck in.
  std::atomic<std::uint64_t> beats_{0};
  std::atomic<bool> busy_{false};
  std::atomic<Clock::rep> beat_at_{0};  // since Clock's epoch

  EventFd event_;
  Mailbox<Command> inbox_;
  Mailbox<TokenDelta> outbox_;

  mutable std::mutex state_mutex_;  // guards what follows
  std::condition_variable ended_;
  EngineStats stats_;
  TimePoint last_turn_{};
  bool asleep_ = false;
  std::string refusal_;                            // why new requests are refused; empty: they are not
  std::int64_t num_accepted_ = 0, num_ended_ = 0;  // requests handed to the thread, and those it is done with

  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace fastllm

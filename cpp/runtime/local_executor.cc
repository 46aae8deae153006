// Plans and other work for the ranks go through a ring of depth + 1 entries, numbered in submission order:
//
//      waited_           finished (each rank)        submitted_
//   ------|---------------------|-----------------------|------
//    free | done, not collected | queued or running     | free
//
// Entry n is written by the engine thread before submitted_ passes n and read by the ranks after; its result is written
// by rank 0 before rank 0's counter passes n. The extra entry keeps the last result valid until the next wait().
#include "runtime/local_executor.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dist/communicator.h"
#include "dist/event_count.h"
#include "fastllm/error.h"
#include "runtime/kv_budget.h"
#include "runtime/worker.h"

namespace fastllm {
namespace {

// One rank; `worker` belongs to its thread, but may be asked for constants while the thread is idle.
struct Rank {
  std::unique_ptr<Communicator> comm;
  std::unique_ptr<Worker> worker;
  alignas(64) std::atomic<std::uint64_t> finished{0};  // entries
  std::thread thread;
};

struct Entry {
  const StepPlan* plan = nullptr;   // null: task
  std::function<void(Rank&)> task;  // run by every rank
  StepResult result;
  std::vector<std::uint32_t> masks;
  std::atomic<bool> masks_set{false};
};

class LocalExecutor final : public Executor {
 public:
  explicit LocalExecutor(const EngineConfig& config)
      : config_(config), ring_(static_cast<std::size_t>(std::max(config.async_depth, 1)) + 1) {
    const int size = config_.tensor_parallel_size;
    std::vector<std::unique_ptr<Communicator>> comms;
    if (size == 1) {
      comms.push_back(make_null_communicator());
    } else {
      comms = make_thread_communicators(size);
    }
    for (auto& comm : comms) {
      ranks_.push_back(std::make_unique<Rank>());
      ranks_.back()->comm = std::move(comm);
    }
    for (auto& rank : ranks_) rank->thread = std::thread([this, &r = *rank] { rank_main(r); });
  }

  ~LocalExecutor() override {
    stop_.store(true, std::memory_order_seq_cst);
    for (auto& rank : ranks_) rank->comm->abort();
    work_.notify();
    masks_.notify();
    for (auto& rank : ranks_) rank->thread.join();
  }

  void load(const ModelSource& source, const LoadProgress& progress, const BackendFactory& backends) {
    const LoadProgress silent;
    run_on_all([&](Rank& r) {
      const int rank = r.comm->rank();
      r.worker = std::make_unique<Worker>(config_, source, backends(rank), *r.comm, rank == 0 ? progress : silent);
    });
  }

  KvBudget profile() override {
    std::int64_t bytes_per_block = 0, weight_bytes = 0;
    for (const auto& rank : ranks_) {
      bytes_per_block += rank->worker->block_bytes();
      weight_bytes += rank->worker->weight_bytes();
    }
    KvBudget budget = kv_budget(config_, bytes_per_block, ranks_[0]->worker->device().memory_free);
    budget.resident_blocks = weight_bytes / bytes_per_block;
    return budget;
  }

  void init_kv(std::int64_t device_blocks, std::int64_t host_blocks) override {
    run_on_all([=](Rank& r) { r.worker->init_kv(device_blocks, host_blocks); });
  }

  void submit(const StepPlan& plan) override {
    assert(submitted_.load() - waited_ < static_cast<std::uint64_t>(depth()));
    push(&plan, {});
  }

  void set_masks(std::uint64_t plan_id, std::span<const std::uint32_t> bits) override {
    Entry& e = entry(number_of(plan_id));
    e.masks.assign(bits.begin(), bits.end());
    e.masks_set.store(true, std::memory_order_seq_cst);
    masks_.notify();
  }

  bool ready(std::uint64_t plan_id) override { return is_finished(number_of(plan_id)); }

  const StepResult& wait(std::uint64_t plan_id) override {
    const auto n = number_of(plan_id);
    assert(n == waited_);
    wait_finished(n);
    waited_ = n + 1;
    StepResult& result = entry(n).result;
    const std::scoped_lock lock(failure_mutex_);
    if (n >= failed_at_) {
      result.plan_id = plan_id;
      result.error = failure_text_;
    }
    return result;
  }

  int depth() const override { return static_cast<int>(ring_.size()) - 1; }

 private:
  Entry& entry(std::uint64_t n) { return ring_[static_cast<std::size_t>(n % ring_.size())]; }

  void push(const StepPlan* plan, std::function<void(Rank&)> task) {
    const auto n = submitted_.load(std::memory_order_relaxed);
    Entry& e = entry(n);
    e.plan = plan;
    e.task = std::move(task);
    e.masks_set.store(false, std::memory_order_relaxed);
    submitted_.store(n + 1, std::memory_order_seq_cst);
    work_.notify();
  }

  // Between steps only.
  void run_on_all(std::function<void(Rank&)> task) {
    const auto n = submitted_.load();
    assert(waited_ == n);
    push(nullptr, std::move(task));
    wait_finished(n);
    waited_ = n + 1;
    const std::scoped_lock lock(failure_mutex_);
    if (failure_) std::rethrow_exception(failure_);
  }

  std::uint64_t number_of(std::uint64_t plan_id) {
    for (auto n = waited_; n < submitted_.load(std::memory_order_relaxed); ++n)
      if (entry(n).plan != nullptr && entry(n).plan->id == plan_id) return n;
    throw InvalidArgument("plan " + std::to_string(plan_id) + " is not in flight");
  }

  bool is_finished(std::uint64_t n) const {
    return std::all_of(ranks_.begin(), ranks_.end(),
                       [n](const auto& r) { return r->finished.load(std::memory_order_acquire) > n; });
  }
  void wait_finished(std::uint64_t n) {
    done_.wait([&] { return is_finished(n); });
  }

  void rank_main(Rank& r) {
    for (std::uint64_t n = 0;; ++n) {
      work_.wait([&] { return submitted_.load(std::memory_order_acquire) > n || stop_.load(); });
      if (stop_.load()) break;
      try {
        run_entry(r, n);
      } catch (const std::exception& e) {
        fail(r, n, e.what());
      } catch (...) {
        fail(r, n, "unknown exception");
      }
      r.finished.store(n + 1, std::memory_order_seq_cst);
      done_.notify();
    }
    r.worker.reset();
  }

  void run_entry(Rank& r, std::uint64_t n) {
    if (failed_.load(std::memory_order_acquire)) return;
    Entry& e = entry(n);
    if (e.plan == nullptr) return e.task(r);
    if (r.comm->rank() != 0) {
      StepResult unused;
      r.worker->run(*e.plan, {}, unused);
      return;
    }
    r.worker->run(
        *e.plan,
        [&](const StepPlan&) -> std::span<const std::uint32_t> {
          masks_.wait([&] { return e.masks_set.load() || failed_.load() || stop_.load(); });
          if (!e.masks_set.load()) throw ResourceError("the step was given up while it waited for token masks");
          return e.masks;
        },
        e.result);
  }

  // Called inside a catch block. The first failure is the cause of the others: it is recorded before it spreads.
  void fail(Rank& r, std::uint64_t n, const char* what) {
    {
      const std::scoped_lock lock(failure_mutex_);
      failed_at_ = std::min(failed_at_, n);
      if (!failure_) {
        failure_ = std::current_exception();
        failure_text_ = "rank " + std::to_string(r.comm->rank()) + ": " + what;
      }
    }
    failed_.store(true, std::memory_order_seq_cst);
    r.comm->abort();
    masks_.notify();
  }

  EngineConfig config_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<Entry> ring_;
  EventCount work_, done_, masks_;
  std::uint64_t waited_ = 0;  // engine thread only
  alignas(64) std::atomic<std::uint64_t> submitted_{0};
  std::atomic<bool> stop_{false}, failed_{false};

  std::mutex failure_mutex_;
  std::uint64_t failed_at_ = UINT64_MAX;
  std::exception_ptr failure_;
  std::string failure_text_;
};

}  // namespace

std::unique_ptr<Executor> make_local_executor(const EngineConfig& config, ModelSource source, LoadProgress progress,
                                              BackendFactory backends) {
  check_tensor_parallel(source.spec, config.tensor_parallel_size);
  auto executor = std::make_unique<LocalExecutor>(config);
  executor->load(source, progress, backends);
  return executor;
}

std::unique_ptr<Executor> make_local_executor(const EngineConfig& config, ModelSource source, LoadProgress progress) {
  if (config.device != "cpu" && config.device != "auto")
    throw InvalidArgument("device '" + config.device + "' is not available; this build computes on 'cpu'");
  const int size = config.tensor_parallel_size;
  return make_local_executor(config, std::move(source), std::move(progress), [&config, size](int rank) {
    const int extra = rank < config.cpu_threads % size ? 1 : 0;
    return make_cpu_backend(std::max(config.cpu_threads / size + extra, 1));
  });
}

}  // namespace fastllm

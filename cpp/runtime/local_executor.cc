// Plans and other work for the ranks go through a ring of depth + 1 entries, numbered in submission order:
//
//      waited_             launched (each rank)        submitted_
//   ------|------------------------|-----------------------|------
//    free | on the device, or done | queued or launching   | free
//
// Entry n is written by the engine thread before submitted_ passes n and read by the ranks after; a rank writes its
// element of `launched` before its counter passes n, and the engine thread finishes it after. The extra entry keeps the
// last result valid until the next wait().
#include "runtime/local_executor.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <charconv>
#include <exception>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/cpu_placement.h"
#include "dist/communicator.h"
#include "dist/event_count.h"
#include "fastllm/error.h"
#include "runtime/kv_budget.h"
#include "runtime/worker.h"

namespace fastllm {
namespace {

// One rank; `worker` belongs to its thread, but may be asked for constants while the thread is idle, and the engine
// thread finishes what was launched.
struct Rank {
  std::unique_ptr<Communicator> comm;
  std::unique_ptr<Worker> worker;
  alignas(64) std::atomic<std::uint64_t> launched{0};  // entries
  std::thread thread;
};

struct Entry {
  const StepPlan* plan = nullptr;   // null: task
  std::function<void(Rank&)> task;  // run by every rank
  std::vector<Launched> launched;   // by rank
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
    for (Entry& e : ring_) e.launched.resize(static_cast<std::size_t>(size));
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
    const std::int64_t rank_block = ranks_[0]->worker->block_bytes();
    const std::int64_t block = rank_block * static_cast<std::int64_t>(ranks_.size());
    if (!is_gpu()) {
      KvBudget budget = kv_budget(config_, block, ranks_[0]->worker->device().memory_free);
      budget.resident_blocks = weight_bytes() / block;
      return budget;
    }
    run_on_all([](Rank& r) { r.worker->run_worst_step(); });
    DeviceInfo tightest = ranks_[0]->worker->device();
    for (const auto& rank : ranks_) {
      DeviceInfo device = rank->worker->device();
      if (device.memory_free < tightest.memory_free) tightest = std::move(device);
    }
    KvBudget budget = gpu_kv_budget(config_, rank_block, tightest.memory_total, tightest.memory_free);
    budget.bytes_per_block = block;
    return budget;
  }

  DeviceUse device_use() override {
    const Worker& first = *ranks_[0]->worker;
    if (!is_gpu()) return {{}, 0, 0, weight_bytes(), first.inflated()};
    const DeviceInfo device = first.device();
    return {device.name, device.memory_total, device.memory_free, first.weight_bytes(), {}};
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

  bool ready(std::uint64_t plan_id) override {
    const auto n = number_of(plan_id);
    if (!is_launched(n)) return false;
    if (failed_.load(std::memory_order_acquire)) return true;
    const Entry& e = entry(n);
    for (std::size_t i = 0; i < ranks_.size(); ++i)
      if (!ranks_[i]->worker->done(e.launched[i])) return false;
    return true;
  }

  const StepResult& wait(std::uint64_t plan_id) override {
    const auto n = number_of(plan_id);
    assert(n == waited_);
    wait_launched(n);
    Entry& e = entry(n);
    e.result.clear();
    if (n < failed_at()) finish(e, n);
    waited_ = n + 1;
    const std::scoped_lock lock(failure_mutex_);
    if (n >= failed_at_) {
      e.result.clear();
      e.result.plan_id = plan_id;
      e.result.error = failure_text_;
    }
    return e.result;
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

  std::int64_t weight_bytes() const {
    std::int64_t sum = 0;
    for (const auto& rank : ranks_) sum += rank->worker->weight_bytes();
    return sum;
  }
  bool is_gpu() const { return ranks_[0]->worker->profile_by_running(); }

  // Between steps only.
  void run_on_all(std::function<void(Rank&)> task) {
    const auto n = submitted_.load();
    assert(waited_ == n);
    push(nullptr, std::move(task));
    wait_launched(n);
    waited_ = n + 1;
    const std::scoped_lock lock(failure_mutex_);
    if (failure_) std::rethrow_exception(failure_);
  }

  std::uint64_t number_of(std::uint64_t plan_id) {
    for (auto n = waited_; n < submitted_.load(std::memory_order_relaxed); ++n)
      if (entry(n).plan != nullptr && entry(n).plan->id == plan_id) return n;
    throw InvalidArgument("plan " + std::to_string(plan_id) + " is not in flight");
  }

  bool is_launched(std::uint64_t n) const {
    return std::all_of(ranks_.begin(), ranks_.end(),
                       [n](const auto& r) { return r->launched.load(std::memory_order_acquire) > n; });
  }
  void wait_launched(std::uint64_t n) {
    done_.wait([&] { return is_launched(n); });
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
      r.launched.store(n + 1, std::memory_order_seq_cst);
      done_.notify();
    }
    r.worker.reset();
  }

  void run_entry(Rank& r, std::uint64_t n) {
    Entry& e = entry(n);
    Launched& launched = e.launched[static_cast<std::size_t>(r.comm->rank())];
    launched.clear();
    if (failed_.load(std::memory_order_acquire)) return;
    if (e.plan == nullptr) return e.task(r);
    const auto masks = [&](const StepPlan&) -> std::span<const std::uint32_t> {
      masks_.wait([&] { return e.masks_set.load() || failed_.load() || stop_.load(); });
      if (!e.masks_set.load()) throw ResourceError("the step was given up while it waited for token masks");
      return e.masks;
    };
    r.worker->launch(*e.plan, masks, launched);
  }

  // Rank 0 last: it fills the result.
  void finish(Entry& e, std::uint64_t n) {
    for (auto i = ranks_.size(); i-- > 0;) {
      try {
        ranks_[i]->worker->finish(*e.plan, e.launched[i], e.result);
      } catch (const std::exception& error) {
        return fail(*ranks_[i], n, error.what());
      } catch (...) {
        return fail(*ranks_[i], n, "unknown exception");
      }
    }
  }

  std::uint64_t failed_at() {
    const std::scoped_lock lock(failure_mutex_);
    return failed_at_;
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

// "cuda" or "cuda:N"
int cuda_ordinal(const std::string& device) {
  if (device == "cuda") return 0;
  int ordinal = -1;
  const char* const end = device.data() + device.size();
  const char* const number = device.data() + std::string_view("cuda:").size();
  if (device.starts_with("cuda:") && std::from_chars(number, end, ordinal).ptr == end && ordinal >= 0) return ordinal;
  throw InvalidArgument("device is '" + device + "'; use cpu, cuda or cuda:N");
}

}  // namespace

std::unique_ptr<Executor> make_local_executor(const EngineConfig& config, ModelSource source, LoadProgress progress,
                                              BackendFactory backends) {
  check_tensor_parallel(source.spec, config.tensor_parallel_size);
  auto executor = std::make_unique<LocalExecutor>(config);
  executor->load(source, progress, backends);
  return executor;
}

std::unique_ptr<Executor> make_local_executor(const EngineConfig& config, ModelSource source, LoadProgress progress) {
  const int size = config.tensor_parallel_size;
  if (config.device.starts_with("cuda")) {
    if (size > 1)
      throw InvalidArgument("tensor_parallel_size is " + std::to_string(size) +
                            "; tensor parallelism on GPUs is not there yet, use 1");
    const int first = cuda_ordinal(config.device);
    return make_local_executor(config, std::move(source), std::move(progress), [&config, first](int rank) {
      return make_cuda_backend({first + rank, !config.enforce_eager, config.deterministic});
    });
  }
  if (config.device != "cpu") throw InvalidArgument("device is '" + config.device + "'; use cpu, cuda or cuda:N");
  const auto places = place_threads(config.cpu_bind, config.cpu_threads, size, read_cpu_topology(allowed_cpus()));
  return make_local_executor(config, std::move(source), std::move(progress),
                             [&places](int rank) { return make_cpu_backend(places[static_cast<std::size_t>(rank)]); });
}

}  // namespace fastllm

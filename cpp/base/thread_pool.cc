// One job at a time: run_raw() publishes it by raising `epoch`. A part belongs to the thread that claims it first: its
// own worker as a rule, the caller if that worker has not come by when the caller is done with its own part. So a
// worker that sleeps, or has lost its core to another process, delays nothing; only one that is in the middle of its
// part is waited for. Both sides spin with pauses for a few microseconds, then offer the core to others between looks,
// then sleep.
#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr int kPauses = 200;  // about 2 to 10 us
constexpr auto kYielding = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns once value != old.
void wait_while(std::atomic<std::uint32_t>& value, std::uint32_t old) {
  for (int i = 0; i < kPauses; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  const auto until = std::chrono::steady_clock::now() + kYielding;
  while (std::chrono::steady_clock::now() < until) {
    if (value.load(std::memory_order_acquire) != old) return;
    sched_yield();
  }
  value.wait(old, std::memory_order_acquire);
}

#if defined(__linux__)
void bind_thread(pthread_t thread, int cpu) {
  const auto most = static_cast<std::size_t>(std::max(cpu + 1, CPU_SETSIZE));
  const std::size_t bytes = CPU_ALLOC_SIZE(most);
  const std::unique_ptr<cpu_set_t, decltype([](cpu_set_t* set) { CPU_FREE(set); })> set(CPU_ALLOC(most));
  if (!set) throw ResourceError("out of memory for a set of CPUs");
  CPU_ZERO_S(bytes, set.get());
  CPU_SET_S(static_cast<std::size_t>(cpu), bytes, set.get());
  const int error = pthread_setaffinity_np(thread, bytes, set.get());
  if (error != 0) throw ResourceError("cannot bind a thread to CPU " + std::to_string(cpu) + ": " + strerror(error));
}
#else
void bind_thread(pthread_t, int) {}
#endif

}  // namespace

struct ThreadPool::Impl {
  // The last job whose part was claimed. A claim raises it from epoch - 1 to epoch, which a late worker cannot do.
  struct alignas(64) Part {
    std::atomic<std::uint32_t> claimed{0};
  };

  alignas(64) std::atomic<std::uint32_t> epoch{0};
  void (*fn)(void*, int) = nullptr;  // written before epoch rises, read after a claim
  void* ctx = nullptr;
  std::atomic<bool> stopping{false};
  alignas(64) std::atomic<std::uint32_t> pending{0};  // parts not done, the caller's own not counted
  std::vector<Part> parts;                            // of the workers: part i is parts[i - 1]
  std::vector<std::thread> workers;

  explicit Impl(int threads) : parts(static_cast<std::size_t>(threads - 1)) {}

  // Runs part i of the job if nobody else has taken it.
  void try_part(int i, std::uint32_t job) {
    std::uint32_t before = job - 1;
    if (!parts[static_cast<std::size_t>(i - 1)].claimed.compare_exchange_strong(before, job, std::memory_order_acq_rel))
      return;
    fn(ctx, i);
    if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) pending.notify_one();
  }

  void work(int i) {
    std::uint32_t seen = 0;
    for (;;) {
      wait_while(epoch, seen);
      seen = epoch.load(std::memory_order_acquire);
      if (stopping.load(std::memory_order_acquire)) return;
      try_part(i, seen);
    }
  }

  std::uint32_t publish(void (*job)(void*, int), void* job_ctx) {
    fn = job;
    ctx = job_ctx;
    pending.store(static_cast<std::uint32_t>(parts.size()), std::memory_order_relaxed);
    const std::uint32_t number = epoch.fetch_add(1, std::memory_order_release) + 1;
    epoch.notify_all();
    return number;
  }

  void bind(const std::vector<int>& cpus) {
    for (std::size_t i = 0; i < workers.size(); ++i) bind_thread(workers[i].native_handle(), cpus[i + 1]);
    bind_thread(pthread_self(), cpus[0]);
  }

  void stop() {
    stopping.store(true, std::memory_order_release);
    epoch.fetch_add(1, std::memory_order_release);
    epoch.notify_all();
    for (auto& w : workers) w.join();
  }
};

ThreadPool::ThreadPool(int threads, const std::vector<int>& cpus)
    : impl_(std::make_unique<Impl>(std::max(threads, 1))) {
  assert(cpus.empty() || cpus.size() == static_cast<std::size_t>(threads));
  impl_->workers.reserve(impl_->parts.size());
  try {
    for (int i = 1; i < threads; ++i) impl_->workers.emplace_back([impl = impl_.get(), i] { impl->work(i); });
    if (!cpus.empty()) impl_->bind(cpus);
  } catch (const std::system_error& e) {
    impl_->stop();
    throw ResourceError("cannot start " + std::to_string(threads) + " threads: " + e.what());
  } catch (...) {
    impl_->stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { impl_->stop(); }

int ThreadPool::size() const { return static_cast<int>(impl_->workers.size()) + 1; }

void ThreadPool::run_raw(void (*fn)(void*, int), void* ctx) {
  if (impl_->workers.empty()) {
    fn(ctx, 0);
    return;
  }
  const std::uint32_t job = impl_->publish(fn, ctx);
  fn(ctx, 0);
  for (int i = 1; i < size(); ++i) impl_->try_part(i, job);
  for (std::uint32_t left; (left = impl_->pending.load(std::memory_order_acquire)) != 0;) {
    wait_while(impl_->pending, left);
  }
}

}  // namespace fastllm

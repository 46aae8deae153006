// The threads of one CPU backend. The caller is one of them, so a pool of n starts n - 1. Workers spin briefly after a
// job, then sleep on a futex: a busy machine loses microseconds, not a core. No OpenMP, no thread start per job.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace fastllm {

class ThreadPool {
 public:
  // threads: >= 1. cpus: of each thread, the only one it runs on; empty: wherever the system likes. Thread 0 is the
  // one that constructs the pool, and stays bound. Throws ResourceError.
  explicit ThreadPool(int threads, const std::vector<int>& cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Runs fn(i) for i in [0, size()) and returns when all are done. fn(0) runs on the caller; the others each on a
  // thread of their own, or on the caller if that thread does not come by in time. Not reentrant; one caller at a time.
  // fn must not throw.
  template <class F>
  void run(F&& fn) {
    run_raw([](void* ctx, int i) { (*static_cast<std::remove_reference_t<F>*>(ctx))(i); }, &fn);
  }

 private:
  void run_raw(void (*fn)(void*, int), void* ctx);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fastllm

#include "base/thread_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace fastllm {
namespace {

TEST(ThreadPool, runs_every_index_once_per_job_however_many_cores_there_are) {
  for (const int threads : {1, 2, 3, 16}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    std::vector<int> calls(static_cast<std::size_t>(threads), 0);
    for (int job = 1; job <= 500; ++job) {
      pool.run([&](int i) { ++calls[static_cast<std::size_t>(i)]; });
      for (const int c : calls) ASSERT_EQ(c, job);
    }
  }
}

TEST(ThreadPool, caller_is_thread_zero_and_sees_the_workers_writes) {
  ThreadPool pool(4);
  const auto caller = std::this_thread::get_id();
  std::vector<std::thread::id> ids(4);
  pool.run([&](int i) { ids[static_cast<std::size_t>(i)] = std::this_thread::get_id(); });
  EXPECT_EQ(ids[0], caller);
  // A part whose thread is late runs on the caller; no thread but its own and the caller ever has it.
  std::vector<std::thread::id> others;
  for (const auto id : ids) {
    EXPECT_NE(id, std::thread::id());
    if (id != caller) others.push_back(id);
  }
  std::sort(others.begin(), others.end());
  EXPECT_EQ(std::unique(others.begin(), others.end()), others.end());
}

TEST(ThreadPool, works_after_its_workers_fell_asleep) {
  ThreadPool pool(3);
  std::atomic<int> sum{0};
  for (int job = 0; job < 20; ++job) {
    // Longer than the spin: a pool that lost wake-ups would hang here.
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(400);
    while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
    pool.run([&](int i) { sum += i; });
  }
  EXPECT_EQ(sum, 20 * 3);
}

TEST(ThreadPool, pools_start_and_stop_without_a_job) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(4);
}

}  // namespace
}  // namespace fastllm

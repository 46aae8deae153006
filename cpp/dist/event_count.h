// What threads wait on that mostly wait microseconds: they spin briefly, then sleep until somebody notifies.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace fastllm {

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Change the condition first (through atomics), then notify().
class EventCount {
 public:
  void notify() {
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    epoch_.notify_all();
  }

  // Returns once ready() is true; ready() is called from this thread only, many times, and must be cheap.
  template <class Ready>
  void wait(Ready&& ready, std::chrono::nanoseconds spin = kSpin) {
    if (ready()) return;
    // Threads that share a core would wait for each other's whole spin: most of it offers the core to others.
    const auto start = std::chrono::steady_clock::now();
    for (auto now = start; now < start + spin; now = std::chrono::steady_clock::now()) {
      if (now >= start + kPause) std::this_thread::yield();
      for (int i = 0; i < 16; ++i) {
        if (ready()) return;
        cpu_relax();
      }
    }
    for (;;) {
      const auto seen = epoch_.load(std::memory_order_seq_cst);
      if (ready()) return;
      epoch_.wait(seen, std::memory_order_seq_cst);
    }
  }

 private:
  static constexpr std::chrono::microseconds kSpin{20}, kPause{3};
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
};

}  // namespace fastllm

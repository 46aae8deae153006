// Measures ways to compute products of one shape, with weights that are not in cache, as they are in an engine.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>

#include "gemm_lt.h"
#include "gemm_table.h"
#include "memory.h"

namespace fastllm::cuda {

class GemmTuner {
 public:
  // most_rows: the greatest m that will be measured. Allocates scratch, a few hundred MB; throws ResourceError. Weights
  // beyond kInPlace are read where they are, and are never written.
  GemmTuner(const LtContext& context, const GemmShape& shape, const void* weight, std::int64_t most_rows, int num_sms,
            bool own_kernels);

  GemmTiming measure(std::int64_t m);

  // Whether x and out of m rows are small enough to be scratch.
  static bool affordable(const GemmShape& shape, std::int64_t m);

 private:
  static constexpr std::size_t kInPlace = std::size_t{300} << 20;  // bytes
  static constexpr std::size_t kRotated = std::size_t{160} << 20;  // bytes of weights, so that none is in L2 still
  static constexpr std::size_t kFlush = std::size_t{64} << 20;     // bytes written to empty L2
  static constexpr int kMostLaunches = 24;                         // of one graph

  struct TimingEvent {
    TimingEvent() { check(cudaEventCreate(&handle), "creating an event"); }
    ~TimingEvent() { cudaEventDestroy(handle); }
    TimingEvent(const TimingEvent&) = delete;
    TimingEvent& operator=(const TimingEvent&) = delete;
    cudaEvent_t handle = nullptr;
  };

  GemmCall call(std::int64_t m, int turn) const;
  // Microseconds per launch; enqueue(i) launches on turn i's weights.
  float time(const std::function<void(int turn)>& enqueue);
  float interval_us(const std::function<void()>& enqueue);

  GemmShape shape_;
  LtProduct product_;
  int num_sms_;
  bool own_kernels_;
  int copies_ = 1;
  std::size_t weight_bytes_;
  const std::byte* weights_ = nullptr;
  std::unique_ptr<Buffer> copies_memory_, x_, out_, flush_;
  Stream stream_;
  TimingEvent begin_, end_;
};

}  // namespace fastllm::cuda

// How GPU benchmarks take time, and what the device can do at most: the denominators of every result.
//
//   void BM_Norm(benchmark::State& state) {
//     const Rotation x(bytes);
//     measure(state, {.read = bytes, .written = bytes}, 50, [&](int i, cudaStream_t s) { norm(x.at(i), s); });
//   }
//   BENCHMARK(BM_Norm)->Apply(gpu_benchmark);
#pragma once

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <functional>

namespace fastllm::bench {

struct Ceilings {
  double read = 0, write = 0, copy = 0;  // bytes/s of device memory; copy counts bytes read and bytes written
  double bf16 = 0;                       // FLOP/s of an 8192^3 product by cuBLASLt; 0 without it
};

// Measured on the first call, in about a second.
const Ceilings& measure_ceilings();

// Device memory in pieces of `bytes` each (rounded up to 256), enough of them that a piece has left the L2 cache before
// its turn comes again. Holds random values: sensible numbers as bf16, as fp32, and as fp8.
class Rotation {
 public:
  static constexpr std::size_t kBeyondL2 = std::size_t{256} << 20;  // bytes
  explicit Rotation(std::size_t bytes, std::size_t total = kBeyondL2);
  ~Rotation();
  Rotation(const Rotation&) = delete;
  Rotation& operator=(const Rotation&) = delete;

  void* at(int turn) const;
  template <class T>
  T* as(int turn) const {
    return static_cast<T*>(at(turn));
  }
  int pieces() const { return pieces_; }
  std::size_t piece_bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  int pieces_ = 0;
};

// Of one call, when every operand moves once.
struct Work {
  double read = 0, written = 0;  // bytes of device memory
  double flops = 0;              // of bf16 tensor cores
};

// The least time this device needs for the work: its bytes, or its operations if these take longer.
double floor_seconds(const Work& work);

// Captures calls i = 0 .. calls_per_graph - 1 in one graph, so that launches cost what they cost in the engine; the
// median of several replays, per call. `enqueue` may only enqueue.
double seconds_per_call(cudaStream_t stream, int calls_per_graph, const std::function<void(int call)>& enqueue);

// Measures and reports: us, GB/s, TFLOP/s, and `floor`, the share of the measured time that the floor is.
void measure(benchmark::State& state, const Work& work, int calls_per_graph,
             const std::function<void(int call, cudaStream_t stream)>& enqueue);

// To be applied to every benchmark that calls measure(): one iteration, which is a median already.
void gpu_benchmark(benchmark::internal::Benchmark* benchmark);

}  // namespace fastllm::bench

#include "gpu_timing.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

namespace fastllm::bench {
namespace {

using cuda::check;

constexpr double kReplaySeconds = 0.2;  // spent on one result, about
constexpr int kMinReplays = 5, kMaxReplays = 40;

struct Event {
  Event() { check(cudaEventCreate(&handle), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(handle); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t handle = nullptr;
};

struct Stream {
  Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t handle = nullptr;
};

class Graph {
 public:
  Graph(cudaStream_t stream, int calls, const std::function<void(int)>& enqueue) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    try {
      for (int i = 0; i < calls; ++i) enqueue(i);
    } catch (...) {
      cudaStreamEndCapture(stream, &graph_);
      if (graph_ != nullptr) cudaGraphDestroy(graph_);
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph_), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
  }
  ~Graph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  double replay_seconds(cudaStream_t stream, const Event& begin, const Event& end) const {
    check(cudaEventRecord(begin.handle, stream), "cudaEventRecord");
    check(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch");
    check(cudaEventRecord(end.handle, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end.handle), "the benchmarked kernels");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin.handle, end.handle), "cudaEventElapsedTime");
    return ms * 1e-3;
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// Pairs of bytes that are 0.125 to 1 in magnitude as bf16, hence as fp32 too, and no NaN as fp8.
std::vector<std::uint16_t> random_values(std::size_t n) {
  std::mt19937 engine(1);
  std::vector<std::uint16_t> values(n);
  for (auto& v : values) {
    const auto bits = static_cast<std::uint32_t>(engine());
    const std::uint32_t magnitude = 0x3e00u + (bits & 0xffffu) % 0x180u, sign = bits >> 31 << 15;
    v = static_cast<std::uint16_t>((magnitude | sign) & 0xfff7u);
  }
  return values;
}

}  // namespace

Rotation::Rotation(std::size_t bytes, std::size_t total) {
  bytes_ = std::max<std::size_t>((bytes + 255) / 256 * 256, 256);
  pieces_ = static_cast<int>(std::clamp<std::size_t>((total + bytes_ - 1) / bytes_, 1, 1 << 20));
  const std::size_t all = bytes_ * static_cast<std::size_t>(pieces_);
  check(cudaMalloc(reinterpret_cast<void**>(&data_), all), "cudaMalloc");
  const auto values = random_values(std::min<std::size_t>(all, std::size_t{8} << 20) / 2);
  const std::size_t chunk = values.size() * 2;
  for (std::size_t at = 0; at < all; at += chunk) {
    const void* from = at == 0 ? static_cast<const void*>(values.data()) : data_;
    check(cudaMemcpy(data_ + at, from, std::min(chunk, all - at), cudaMemcpyDefault), "cudaMemcpy");
  }
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

Rotation::~Rotation() { cudaFree(data_); }

void* Rotation::at(int turn) const { return data_ + bytes_ * static_cast<std::size_t>(turn % pieces_); }

double floor_seconds(const Work& work) {
  const Ceilings& c = measure_ceilings();
  // What mostly reads is held against the rate of reading.
  const double rate = work.written * 8 < work.read ? c.read : work.read * 8 < work.written ? c.write : c.copy;
  const double moving = (work.read + work.written) / rate;
  return c.bf16 > 0 ? std::max(moving, work.flops / c.bf16) : moving;
}

double seconds_per_call(cudaStream_t stream, int calls_per_graph, const std::function<void(int)>& enqueue) {
  const Event begin, end;
  enqueue(0);  // loads the module, which must not happen while capturing
  check(cudaStreamSynchronize(stream), "the benchmarked kernels");
  const Graph graph(stream, calls_per_graph, enqueue);
  graph.replay_seconds(stream, begin, end);
  const double once = graph.replay_seconds(stream, begin, end);
  const int replays = std::clamp(static_cast<int>(kReplaySeconds / std::max(once, 1e-6)), kMinReplays, kMaxReplays);
  std::vector<double> seconds;
  for (int i = 0; i < replays; ++i) seconds.push_back(graph.replay_seconds(stream, begin, end));
  std::nth_element(seconds.begin(), seconds.begin() + replays / 2, seconds.end());
  return seconds[static_cast<std::size_t>(replays / 2)] / calls_per_graph;
}

void measure(benchmark::State& state, const Work& work, int calls_per_graph,
             const std::function<void(int, cudaStream_t)>& enqueue) {
  double seconds = 0;
  try {
    const Stream stream;
    const double least = floor_seconds(work);
    for (auto _ : state) {
      seconds = seconds_per_call(stream.handle, calls_per_graph, [&](int i) { enqueue(i, stream.handle); });
      state.SetIterationTime(seconds);
    }
    state.counters["floor"] = least / seconds;
  } catch (const std::exception& e) {
    state.SkipWithError(e.what());
    return;
  }
  state.counters["us"] = seconds * 1e6;
  state.counters["GB/s"] = (work.read + work.written) / seconds * 1e-9;
  if (work.flops > 0) state.counters["TFLOP/s"] = work.flops / seconds * 1e-12;
}

void gpu_benchmark(benchmark::internal::Benchmark* benchmark) {
  benchmark->Iterations(1)->UseManualTime()->Unit(benchmark::kMicrosecond);
}

}  // namespace fastllm::bench

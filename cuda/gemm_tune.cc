#include "gemm_tune.h"

#include <algorithm>
#include <utility>

#include "skinny.h"

namespace fastllm::cuda {
namespace {

constexpr float kLongUs = 300;  // from here on one launch is measurement enough
constexpr int kProposals = 8, kLongProposals = 4, kOwnCandidates = 7;
constexpr int kFill = 0x3b;  // in every byte, 0.003 as bf16 and as fp32

std::size_t bytes_of(std::int64_t rows, std::int64_t cols, DType dtype) {
  return static_cast<std::size_t>(rows * cols) * size_of(dtype);
}

struct Graph {
  ~Graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
};

}  // namespace

bool GemmTuner::affordable(const GemmShape& s, std::int64_t m) {
  constexpr std::size_t kMost = std::size_t{512} << 20;
  return bytes_of(m, s.k, s.dtype) + bytes_of(m, s.n, s.out_dtype) <= kMost;
}

GemmTuner::GemmTuner(const LtContext& context, const GemmShape& shape, const void* weight, std::int64_t most_rows,
                     int num_sms, bool own_kernels)
    : shape_(shape),
      product_(context, shape, false),
      num_sms_(num_sms),
      own_kernels_(own_kernels),
      weight_bytes_(bytes_of(shape.n, shape.k, shape.dtype)) {
  if (weight_bytes_ > kInPlace) {
    if (weight == nullptr) throw ResourceError("the weight is too large to be measured on scratch memory");
    weights_ = static_cast<const std::byte*>(weight);
  } else {
    copies_ = static_cast<int>(std::clamp<std::size_t>(kRotated / weight_bytes_ + 1, 1, kMostLaunches));
    const std::size_t bytes = static_cast<std::size_t>(copies_) * weight_bytes_;
    copies_memory_ = allocate_device(bytes);
    weights_ = data_as<const std::byte>(*copies_memory_);
    check(cudaMemsetAsync(copies_memory_->data(), kFill, bytes, stream_.get()), "filling scratch memory");
    if (bytes < kRotated) flush_ = allocate_device(kFlush);
  }
  x_ = allocate_device(bytes_of(most_rows, shape.k, shape.dtype));
  out_ = allocate_device(bytes_of(most_rows, shape.n, shape.out_dtype));
  check(cudaMemsetAsync(x_->data(), kFill, x_->bytes(), stream_.get()), "filling scratch memory");
  check(cudaMemsetAsync(out_->data(), 0, out_->bytes(), stream_.get()), "filling scratch memory");
}

GemmCall GemmTuner::call(std::int64_t m, int turn) const {
  GemmCall c;
  c.out = out_->data();
  c.out_dtype = shape_.out_dtype;
  c.ldo = shape_.n;
  c.x = x_->data();
  c.ldx = shape_.k;
  c.m = m;
  c.w = {weights_ + static_cast<std::size_t>(turn % copies_) * weight_bytes_, shape_.dtype, shape_.n, shape_.k};
  c.accumulate = shape_.accumulate;
  return c;
}

float GemmTuner::interval_us(const std::function<void()>& enqueue) {
  if (flush_) check(cudaMemsetAsync(flush_->data(), 0, kFlush, stream_.get()), "emptying the cache");
  check(cudaEventRecord(begin_.handle, stream_.get()), "recording an event");
  enqueue();
  check(cudaEventRecord(end_.handle, stream_.get()), "recording an event");
  stream_.synchronize();
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin_.handle, end_.handle), "reading a time");
  return 1000 * ms;
}

float GemmTuner::time(const std::function<void(int)>& enqueue) {
  constexpr float kGraphUs = 250;
  enqueue(0);  // loads the kernel
  stream_.synchronize();
  const float once = interval_us([&] { enqueue(1); });
  if (once > kLongUs) return once;

  const int launches = std::clamp(static_cast<int>(kGraphUs / std::max(once, 1.0f)), 3, kMostLaunches);
  Graph g;
  check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "recording a graph");
  try {
    for (int i = 0; i < launches; ++i) enqueue(i);
  } catch (...) {
    cudaStreamEndCapture(stream_.get(), &g.graph);
    throw;
  }
  check(cudaStreamEndCapture(stream_.get(), &g.graph), "recording a graph");
  check(cudaGraphInstantiate(&g.executable, g.graph, 0), "making a graph");
  auto replay = [&] { check(cudaGraphLaunch(g.executable, stream_.get()), "launching a graph"); };
  replay();
  const float first = interval_us(replay), second = interval_us(replay);
  return std::min(first, second) / static_cast<float>(launches);
}

GemmTiming GemmTuner::measure(std::int64_t m) {
  GemmTiming best;
  int most = kProposals;
  const auto algos = product_.propose(m, most);
  for (std::size_t i = 0; i < algos.size() && static_cast<int>(i) < most; ++i) {
    float us = 0;
    try {
      us = time([&](int turn) { product_.run(call(m, turn), algos[i], stream_.get()); });
    } catch (const ResourceError&) {
      continue;  // proposed, yet refused
    }
    if (us > kLongUs) most = kLongProposals;
    if (best.lt_us != GemmTiming::kNone && us >= best.lt_us) continue;
    best.lt_us = us;
    best.algo = algos[i];
  }
  if (!own_kernels_ || !skinny_supports(call(m, 0))) return best;
  const auto configs = skinny_configs(shape_.n, shape_.k, m, num_sms_);
  for (int i = 0; i < kOwnCandidates; ++i) {
    const SkinnyConfig& config = configs[static_cast<std::size_t>(i)];
    const float us = time([&](int turn) { skinny_gemm(call(m, turn), std::nullopt, config, num_sms_, stream_.get()); });
    if (best.own_us != GemmTiming::kNone && us >= best.own_us) continue;
    best.own_us = us;
    best.own = config;
  }
  return best;
}

}  // namespace fastllm::cuda

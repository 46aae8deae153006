#include "gemm_tune.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <span>
#include <utility>

#include "skinny.h"

namespace fastllm::cuda {
namespace {

constexpr int kProposals = 6, kLongProposals = 3;
constexpr float kLongUs = 200;      // of a launch: from here on fewer proposals
constexpr float kGraphUs = 150;     // of the launches that are timed together
constexpr int kMostLaunches = 24;   // of them
constexpr int kRounds = 5;          // after one that only warms up
constexpr float kClearly = 0.985f;  // of the first proposal's time
constexpr float kHopeless = 2;      // times the first proposal's
constexpr float kHostNoiseUs = 20;  // of a launch that is timed alone

std::size_t bytes_of(std::int64_t rows, std::int64_t cols, DType dtype) {
  return static_cast<std::size_t>(rows * cols) * size_of(dtype);
}

// About normal, sigma 0.06. Constant values would draw less power than real ones, and clocks would be higher.
std::vector<std::byte> random_values(DType dtype) {
  constexpr std::size_t kCount = std::size_t{1} << 18;
  std::vector<std::byte> values(kCount * size_of(dtype));
  std::uint64_t state = 0x9e3779b97f4a7c15u;
  for (std::size_t i = 0; i < kCount; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    int sum = 0;
    for (int shift = 32; shift < 64; shift += 8) sum += static_cast<int>(state >> shift & 0xff) - 128;
    const float value = static_cast<float>(sum) * (1.0f / 2500) + 1e-5f;
    // The upper half of a float is its bf16.
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    std::memcpy(values.data() + i * size_of(dtype), bytes + sizeof value - size_of(dtype), size_of(dtype));
  }
  return values;
}

void fill(const Buffer& buffer, std::span<const std::byte> values, cudaStream_t stream) {
  auto* to = data_as<std::byte>(buffer);
  std::size_t done = std::min(values.size(), buffer.bytes());
  check(cudaMemcpyAsync(to, values.data(), done, cudaMemcpyDefault, stream), "filling scratch memory");
  while (done < buffer.bytes()) {
    const std::size_t bytes = std::min(done, buffer.bytes() - done);
    check(cudaMemcpyAsync(to + done, to, bytes, cudaMemcpyDefault, stream), "filling scratch memory");
    done += bytes;
  }
}

struct TimingEvent {
  TimingEvent() { check(cudaEventCreate(&handle), "creating an event"); }
  ~TimingEvent() { cudaEventDestroy(handle); }
  TimingEvent(const TimingEvent&) = delete;
  TimingEvent& operator=(const TimingEvent&) = delete;
  void record(cudaStream_t stream) const { check(cudaEventRecord(handle, stream), "recording an event"); }
  cudaEvent_t handle = nullptr;
};

class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& enqueue) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a graph");
    try {
      enqueue();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph_);
      destroy();
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph_), "recording a graph");
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph_, 0);
    if (status != cudaSuccess) destroy();
    check(status, "making a graph");
  }
  ~Graph() { destroy(); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(executable_, stream), "launching a graph"); }

 private:
  void destroy() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace

struct GemmTuner::Candidate {
  std::function<void(int turn)> enqueue;  // one launch, on turn's weights
  LtAlgo algo{};                          // of the library, unless own
  std::optional<SkinnyConfig> own{};
  float once_us = 0;
  std::unique_ptr<Graph> graph{};
  std::array<float, kRounds> round_us{};  // of one launch
  TimingEvent begin{}, end{};

  float elapsed_us() const {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin.handle, end.handle), "reading a time");
    return 1000 * ms;
  }
  float us() const {
    auto sorted = round_us;
    std::sort(sorted.begin(), sorted.end());
    return sorted[kRounds / 2];
  }
};

std::int64_t tuned_rows(std::int64_t m) {
  static_assert(kTunedRows.back() == kSkinnyRows);
  const auto* at = std::lower_bound(kTunedRows.begin(), kTunedRows.end(), m);
  return at == kTunedRows.end() ? 0 : *at;
}

GemmTuner::GemmTuner(const LtContext& context, const GemmShape& shape, const void* weight, std::int64_t most_rows,
                     int num_sms, bool own_kernels)
    : shape_(shape),
      product_(context, shape, false),
      num_sms_(num_sms),
      own_kernels_(own_kernels),
      weight_bytes_(bytes_of(shape.n, shape.k, shape.dtype)) {
  const auto values = random_values(shape.dtype);
  if (weight_bytes_ > kInPlace) {
    if (weight == nullptr) throw ResourceError("the weight is too large to be measured on scratch memory");
    weights_ = static_cast<const std::byte*>(weight);
  } else {
    copies_ = static_cast<int>(kRotated / weight_bytes_ + 1);
    copies_memory_ = allocate_device(static_cast<std::size_t>(copies_) * weight_bytes_);
    weights_ = data_as<const std::byte>(*copies_memory_);
    fill(*copies_memory_, values, stream_.get());
  }
  x_ = allocate_device(bytes_of(most_rows, shape.k, shape.dtype));
  out_ = allocate_device(bytes_of(most_rows, shape.n, shape.out_dtype));
  fill(*x_, values, stream_.get());
  check(cudaMemsetAsync(out_->data(), 0, out_->bytes(), stream_.get()), "filling scratch memory");
  stream_.synchronize();
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

bool GemmTuner::try_out(Candidate& c) {
  try {
    c.enqueue(0);  // loads the kernel
  } catch (const ResourceError&) {
    return false;
  }
  c.begin.record(stream_.get());
  c.enqueue(1);
  c.end.record(stream_.get());
  stream_.synchronize();
  c.once_us = c.elapsed_us();
  return true;
}

void GemmTuner::compare(Candidates& all) {
  const float hopeless = kHopeless * all[0]->once_us + kHostNoiseUs;
  std::erase_if(all, [&](const auto& c) { return c->once_us > hopeless; });
  const int launches = std::clamp(static_cast<int>(kGraphUs / std::max(all[0]->once_us, 1.0f)), 1, kMostLaunches);
  int turn = 0;
  for (const auto& c : all) {
    c->graph = std::make_unique<Graph>(stream_.get(), [&] {
      for (int i = 0; i < launches; ++i) c->enqueue(turn++);
    });
  }
  for (int round = -1; round < kRounds; ++round) {
    // Not timed: while it runs, the host comes to be ahead of the device, and stays so for this round.
    all[0]->graph->launch(stream_.get());
    for (const auto& c : all) {
      c->begin.record(stream_.get());
      c->graph->launch(stream_.get());
      c->end.record(stream_.get());
    }
    stream_.synchronize();
    if (round < 0) continue;
    for (const auto& c : all)
      c->round_us[static_cast<std::size_t>(round)] = c->elapsed_us() / static_cast<float>(launches);
  }
}

GemmTiming GemmTuner::measure(std::int64_t m) {
  Candidates all;
  auto add = [&](std::function<void(int)> enqueue) {
    auto c = std::make_unique<Candidate>();
    c->enqueue = std::move(enqueue);
    if (!try_out(*c)) return false;
    all.push_back(std::move(c));
    return true;
  };
  for (const LtAlgo& algo : product_.propose(m, kProposals)) {
    if (all.size() >= kLongProposals && all[0]->once_us > kLongUs) break;
    if (add([this, m, algo](int turn) { product_.run(call(m, turn), algo, stream_.get()); })) all.back()->algo = algo;
  }
  if (own_kernels_ && skinny_supports(call(m, 0))) {
    for (const SkinnyConfig& config : skinny_candidates(shape_.k)) {
      const auto run = [this, m, config](int turn) {
        skinny_gemm(call(m, turn), std::nullopt, config, num_sms_, stream_.get());
      };
      if (add(run)) all.back()->own = config;
    }
  }
  GemmTiming best;
  if (all.empty()) return best;
  compare(all);
  float to_beat = 0;  // by proposals after the first
  for (const auto& c : all) {
    const float us = c->us();
    if (c->own) {
      if (best.own_us == GemmTiming::kNone || us < best.own_us) best.own_us = us, best.own = *c->own;
    } else if (best.lt_us == GemmTiming::kNone || us < to_beat) {
      to_beat = best.lt_us == GemmTiming::kNone ? kClearly * us : us;
      best.lt_us = us;
      best.algo = c->algo;
    }
  }
  return best;
}

}  // namespace fastllm::cuda

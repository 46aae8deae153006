// The CPU backend: dispatches each op to the kernels of one instruction set over the threads of one pool. Calls come
// from one thread, which is thread 0 of the pool; every op has finished when it returns. Only wait_step() and
// step_done() may come from another thread, after the step ended.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/step.h"
#include "backend/cpu/weight.h"
#include "base/share.h"
#include "base/slot_tables.h"
#include "base/thread_pool.h"

namespace fastllm::cpu {

// Grow-only working memory.
class Scratch {
 public:
  void* get(std::size_t bytes) {
    if (!pages_ || pages_->bytes() < bytes) {
      pages_.reset();
      pages_ = std::make_unique<Pages>(bytes + bytes / 2);
    }
    return pages_->data();
  }

 private:
  std::unique_ptr<Pages> pages_;
};

// Bit 30 of a slot's count of a token is set for ids in the prompt; the low 30 bits count occurrences in the output.
inline constexpr std::int32_t kInPrompt = 1 << 30;

template <class Sums>
struct ProductCut;

class CpuBackend final : public Backend {
 public:
  CpuBackend(const ThreadPlacement& placement, const std::string& isa);

  DeviceInfo info() const override;
  std::unique_ptr<Buffer> allocate(std::size_t bytes, MemoryKind kind) override;
  void copy(void* dst, const void* src, std::size_t bytes) override;
  void synchronize() override {}

  std::unique_ptr<PackedWeight> pack(const HostMatrix& weight, DType compute) override;
  void linear(const Tensor& out, const Tensor& x, const PackedWeight& w, const float* bias, bool accumulate) override;
  void gated_linear(const Tensor& out, const Tensor& scratch, const Tensor& x, const PackedWeight& w, const float* bias,
                    Activation act) override;
  void embed(const Tensor& out, const Step& step, const PackedWeight& table, std::int64_t id_begin,
             float scale) override;

  void init_steps(const StepLimits& limits) override;
  Step& begin_step(const StepInput& input) override;
  void end_step(Step&) override {}
  bool step_done(Step&) override { return true; }
  void wait_step(Step& step, StepOutput& out) override;
  void init_counts(SlotId slot, std::span<const TokenId> tokens, std::int32_t num_prompt) override;
  TokenId* sampled_tokens(Step& step) override;
  void commit_tokens(Step& step) override;

  void add_positions(const Tensor& x, const Step& step, const Tensor& table) override;
  void norm(const Tensor& out, const Tensor& x, const NormSpec& spec, const float* weight, const float* bias) override;
  void add_norm(const Tensor& out, const Tensor& residual, const Tensor& delta, const NormSpec& spec,
                const float* weight, const float* bias) override;
  void gated_act(const Tensor& out, const Tensor& gate_up, Activation act) override;
  void act(const Tensor& x, Activation act) override;
  void add(const Tensor& x, const Tensor& y) override;
  void gather_rows(const Tensor& out, const Tensor& x, std::span<const std::int32_t> rows) override;
  void gather_logit_rows(const Tensor& out, const Tensor& x, const Step& step) override;
  void scale_softcap(const Tensor& logits, float scale, float softcap) override;
  void copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                   std::span<const std::pair<BlockId, BlockId>> from_to) override;

  void qk_norm_rope_write_kv(const Tensor& qkv, const Step& step, int heads, const NormSpec& q_norm,
                             const float* q_weight, const NormSpec& k_norm, const float* k_weight, const RopeArgs& rope,
                             const KvView& kv) override;
  void attention(const Tensor& out, const Tensor& q, const Step& step, const KvView& kv, const AttnArgs& args) override;
  // Whether steps with these activations keep keys and values in pairs (kernels.h), not in rows.
  bool kv_in_pairs(const KvView& kv, DType activations) const;

  void mask_logits(const Tensor& logits, std::span<const std::int32_t> rows,
                   std::span<const std::uint32_t> bits) override;
  void process_logits(const Tensor& logits, const Step& step) override;
  void sample(const Tensor& logits, Step& step) override;
  void topk_logprobs(const Tensor& logits, Step& step, std::span<const LogprobRequest> requests) override;

 private:
  // f(begin, end, thread) over [0, n) in equal pieces, on this thread alone when n * cost is under about 10 us of work.
  // cost: elements touched per item.
  template <class F>
  void split(std::int64_t n, std::int64_t cost, F&& f) {
    constexpr std::int64_t kWorthIt = 16 << 10;  // elements
    const int t = pool_.size();
    if (t == 1 || n <= 1 || n * cost < kWorthIt) {
      if (n > 0) f(std::int64_t{0}, n, 0);
      return;
    }
    pool_.run([&](int i) {
      const auto [begin, end] = share_of(n, i, t);
      if (begin < end) f(begin, end, i);
    });
  }
  // f(item, thread) for every item, whoever is free taking the next.
  template <class F>
  void share(std::int64_t n, F&& f) {
    if (n <= 1 || pool_.size() == 1) {
      for (std::int64_t i = 0; i < n; ++i) f(i, 0);
      return;
    }
    alignas(64) std::atomic<std::int64_t> next{0};
    pool_.run([&](int thread) {
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i, thread);
    });
  }
  // The same with neighbouring items on one thread: each has a range of its own, and helps the others after it.
  template <class F>
  void share_ranges(std::int64_t n, F&& f) {
    const int t = pool_.size();
    for (int i = 0; i < t; ++i) ranges_[static_cast<std::size_t>(i)].next.store(n * i / t, std::memory_order_relaxed);
    pool_.run([&](int thread) {
      for (int i = 0; i < t; ++i) {
        const int owner = (thread + i) % t;
        auto& next = ranges_[static_cast<std::size_t>(owner)].next;
        for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < n * (owner + 1) / t;)
          f(item, thread);
      }
    });
  }
  // The shape of every matrix product; see linear.cc.
  template <class Sums, class Prepare, class Product>
  void multiply(std::int64_t m, std::int64_t panels, std::int64_t block_bytes, const ProductCut<Sums>& cut,
                Prepare&& prepare, Product&& product);
  // Notes that the weight that starts at `now` is multiplied after the one before, and returns what follows it.
  WeightStart in_order(const WeightStart& now, const std::shared_ptr<WeightStart>& after);
  // `bytes` for every thread; valid until the next call.
  std::byte* thread_scratch(std::size_t bytes);

  struct alignas(64) Range {
    std::atomic<std::int64_t> next{0};
  };

  Kernels kernels_;
  ThreadPool pool_;
  std::vector<Range> ranges_;                                                  // of share_ranges(), by thread
  PageArena arena_;                                                            // of packed weights
  std::shared_ptr<WeightStart> after_last_ = std::make_shared<WeightStart>();  // of the weight multiplied last
  Scratch shared_;                                                             // prepared activations, partials
  Scratch per_thread_;

  int vocab_ = 0;
  std::vector<std::unique_ptr<CpuStep>> steps_;  // a ring
  std::size_t next_step_ = 0;
  std::optional<SlotTables> tables_;
  std::vector<TokenId> last_tokens_;               // by slot
  std::vector<std::vector<std::int32_t>> counts_;  // by slot; [vocab] once a penalty was asked for
};

inline Act to_act(Activation a) { return static_cast<Act>(a); }
static_assert(static_cast<int>(Activation::Silu) == static_cast<int>(Act::Silu) &&
              static_cast<int>(Activation::Gelu) == static_cast<int>(Act::Gelu) &&
              static_cast<int>(Activation::GeluTanh) == static_cast<int>(Act::GeluTanh) &&
              static_cast<int>(Activation::Relu) == static_cast<int>(Act::Relu));

inline bool is_bf16(DType t) { return t == DType::BF16; }

}  // namespace fastllm::cpu

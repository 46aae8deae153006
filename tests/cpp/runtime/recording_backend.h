// A CPU backend with recordings: it pads steps with rows that write to block 0, records the ops of replay()'s first
// body for each size, and from then on runs what it recorded without the body. So a test sees whether all that a
// recording needs stays where it was.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "backend/backend.h"

namespace fastllm::testing {

class RecordingBackend final : public Backend {
 public:
  // What happened, for the test; outlives the backend.
  struct Log {
    std::vector<int> recorded, replayed;           // sizes, in order
    std::function<void(const StepInput&)> begins;  // before a step begins
    std::function<void()> waits;                   // in wait_step()
    bool profile_by_running = false;
  };
  RecordingBackend(std::vector<int> sizes, Log& log) : sizes_(std::move(sizes)), log_(log) {}

  DeviceInfo info() const override { return cpu_->info(); }
  bool profile_by_running() const override { return log_.profile_by_running; }
  std::unique_ptr<Buffer> allocate(std::size_t n, MemoryKind kind) override { return cpu_->allocate(n, kind); }
  void synchronize() override { cpu_->synchronize(); }
  std::unique_ptr<PackedWeight> pack(const HostMatrix& w, DType compute) override { return cpu_->pack(w, compute); }

  void init_steps(const StepLimits& limits) override {
    spare_ = SlotId{limits.max_slots};
    StepLimits more = limits;
    ++more.max_slots;
    cpu_->init_steps(more);
  }
  Step& begin_step(const StepInput& input) override {
    if (log_.begins) log_.begins(input);
    EXPECT_TRUE(input.padded_rows == 0 || input.rows.size() <= static_cast<std::size_t>(input.padded_rows));
    std::vector<TokenId> tokens(input.tokens.begin(), input.tokens.end());
    std::vector<StepRow> rows(input.rows.begin(), input.rows.end());
    StepInput padded = input;
    size_ = padded.padded_rows;
    padded.padded_rows = 0;
    while (rows.size() < static_cast<std::size_t>(size_)) {
      rows.push_back({static_cast<std::int32_t>(tokens.size()), 1, 0, spare_, false});
      tokens.push_back(0);
    }
    padded.tokens = tokens;
    padded.rows = rows;
    return cpu_->begin_step(padded);
  }
  void end_step(Step& step) override { cpu_->end_step(step); }
  bool step_done(Step& step) override { return cpu_->step_done(step); }
  void wait_step(Step& step, StepOutput& out) override {
    if (log_.waits) log_.waits();
    cpu_->wait_step(step, out);
  }
  void init_counts(SlotId slot, std::span<const TokenId> tokens, std::int32_t num_prompt) override {
    cpu_->init_counts(slot, tokens, num_prompt);
  }

  std::span<const int> graph_sizes() const override { return sizes_; }
  void replay(Step& step, const std::function<void()>& body) override {
    auto& ops = recordings_[size_];
    if (ops.empty()) {
      log_.recorded.push_back(size_);
      recording_ = &ops;
      body();
      recording_ = nullptr;
    } else {
      log_.replayed.push_back(size_);
      for (const auto& op : ops) op(step);
    }
  }

  void copy(void* dst, const void* src, std::size_t n) override {
    run([=, this](const Step&) { cpu_->copy(dst, src, n); });
  }
  void embed(const Tensor& out, const Step& step, const PackedWeight& table, std::int64_t id_begin,
             float scale) override {
    run([=, this, t = &table](const Step& s) { cpu_->embed(out, s, *t, id_begin, scale); }, &step);
  }
  void add_positions(const Tensor& x, const Step& step, const Tensor& table) override {
    run([=, this](const Step& s) { cpu_->add_positions(x, s, table); }, &step);
  }
  void norm(const Tensor& out, const Tensor& x, const NormSpec& spec, const float* w, const float* b) override {
    run([=, this](const Step&) { cpu_->norm(out, x, spec, w, b); });
  }
  void add_norm(const Tensor& out, const Tensor& residual, const Tensor& delta, const NormSpec& spec, const float* w,
                const float* b) override {
    run([=, this](const Step&) { cpu_->add_norm(out, residual, delta, spec, w, b); });
  }
  void linear(const Tensor& out, const Tensor& x, const PackedWeight& w, const float* bias, bool accumulate) override {
    run([=, this, weight = &w](const Step&) { cpu_->linear(out, x, *weight, bias, accumulate); });
  }
  void qk_norm_rope_write_kv(const Tensor& qkv, const Step& step, int heads, const NormSpec& qn, const float* qw,
                             const NormSpec& kn, const float* kw, const RopeArgs& rope, const KvView& kv) override {
    run([=, this](const Step& s) { cpu_->qk_norm_rope_write_kv(qkv, s, heads, qn, qw, kn, kw, rope, kv); }, &step);
  }
  void attention(const Tensor& out, const Tensor& q, const Step& step, const KvView& kv,
                 const AttnArgs& args) override {
    run([=, this](const Step& s) { cpu_->attention(out, q, s, kv, args); }, &step);
  }
  void gated_act(const Tensor& out, const Tensor& gate_up, Activation act) override {
    run([=, this](const Step&) { cpu_->gated_act(out, gate_up, act); });
  }
  void act(const Tensor& x, Activation act) override {
    run([=, this](const Step&) { cpu_->act(x, act); });
  }
  void add(const Tensor& x, const Tensor& y) override {
    run([=, this](const Step&) { cpu_->add(x, y); });
  }
  void scale_softcap(const Tensor& logits, float scale, float softcap) override {
    run([=, this](const Step&) { cpu_->scale_softcap(logits, scale, softcap); });
  }
  void gather_logit_rows(const Tensor& out, const Tensor& x, const Step& step) override {
    run([=, this](const Step& s) { cpu_->gather_logit_rows(out, x, s); }, &step);
  }

  // Never part of a recording.
  void gather_rows(const Tensor& out, const Tensor& x, std::span<const std::int32_t> rows) override {
    EXPECT_EQ(recording_, nullptr);
    cpu_->gather_rows(out, x, rows);
  }
  void mask_logits(const Tensor& logits, std::span<const std::int32_t> rows,
                   std::span<const std::uint32_t> bits) override {
    cpu_->mask_logits(logits, rows, bits);
  }
  void process_logits(const Tensor& logits, const Step& step) override { cpu_->process_logits(logits, step); }
  void sample(const Tensor& logits, Step& step) override { cpu_->sample(logits, step); }
  TokenId* sampled_tokens(Step& step) override { return cpu_->sampled_tokens(step); }
  void commit_tokens(Step& step) override { cpu_->commit_tokens(step); }
  void topk_logprobs(const Tensor& logits, Step& step, std::span<const LogprobRequest> requests) override {
    cpu_->topk_logprobs(logits, step, requests);
  }
  void copy_blocks(void* dst, const void* src, std::size_t block_bytes,
                   std::span<const std::pair<BlockId, BlockId>> from_to) override {
    cpu_->copy_blocks(dst, src, block_bytes, from_to);
  }

 private:
  using Op = std::function<void(const Step&)>;

  struct NoStep final : Step {};
  void run(Op op, const Step* step = nullptr) {
    static const NoStep none;
    op(step != nullptr ? *step : none);
    if (recording_ != nullptr) recording_->push_back(std::move(op));
  }

  std::unique_ptr<Backend> cpu_ = make_cpu_backend(2);
  std::vector<int> sizes_;
  Log& log_;
  SlotId spare_ = kNoSlot;
  int size_ = 0;  // of the step under way
  std::map<int, std::vector<Op>> recordings_;
  std::vector<Op>* recording_ = nullptr;
};

}  // namespace fastllm::testing

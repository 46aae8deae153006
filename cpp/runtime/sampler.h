// Chooses the next tokens of a step from its logits, on rank 0: raw log-probabilities first, then the host's logits
// processors, then what the backend does (bias, masks, penalties, sampling). Worker's thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "runtime/slot_state.h"
#include "sched/step_plan.h"

namespace fastllm {

// Row `row` of the plan, sampled as number `index` among its kSample rows.
struct SampleTarget {
  std::int32_t row = 0, index = 0;
};

class Sampler {
 public:
  Sampler(Backend& backend, int vocab, int max_rows);

  // logits: [targets, vocab], changed. `masks` is empty unless the plan has masked rows. Writes result.tokens at the
  // targets' indexes, and their log-probabilities and errors.
  void run(const Tensor& logits, std::span<const SampleTarget> targets, const StepPlan& plan, const SlotState& slots,
           std::span<const std::uint32_t> masks, StepResult& result);

  // Appends one entry per request. logits: [rows, vocab].
  void logprobs(const Tensor& logits, std::span<const LogprobRequest> requests, std::vector<PositionLogprobs>& out);

 private:
  void keep_raw_logits(const Tensor& logits, std::span<const SampleTarget> targets, const StepPlan& plan,
                       const SlotState& slots);
  void run_processors(const Tensor& logits, std::span<const SampleTarget> targets, const StepPlan& plan,
                      const SlotState& slots, StepResult& result);

  Backend& backend_;
  int vocab_;
  std::unique_ptr<Buffer> raw_;         // [max_rows, vocab] F32: logits before anything changes them
  std::vector<std::int32_t> raw_rows_;  // rows of the logits copied there
  std::vector<LogprobRequest> requests_;
  std::vector<LogprobResult> results_;
  std::vector<SampleRow> rows_;
  std::vector<TokenId> tokens_;
  std::vector<float> host_logits_;  // [vocab]
};

}  // namespace fastllm

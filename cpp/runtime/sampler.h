// From logits to tokens, on rank 0: raw log-probabilities first, then the host's logits processors and masks, then what
// the backend does (bias, penalties, sampling). Enqueues; only logits processors wait for the device. Worker's thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "runtime/slot_state.h"
#include "sched/step_plan.h"

namespace fastllm {

PositionLogprobs to_position(const LogprobResult& result);

// Sampling of one step: tokens[i] belongs to row `rows[i]` of the plan, and to row i of the logits.
struct SampleTask {
  const StepPlan& plan;
  std::span<const std::int32_t> rows;  // with kSample, ascending
  const SlotState& slots;
  Tensor logits;  // [rows, vocab], changed
  Step& step;
};

class Sampler {
 public:
  Sampler(Backend& backend, int vocab, int max_rows);

  // Keeps what logprobs() needs, runs processors and masks, and samples. masks: [masked_rows, ceil(vocab / 32)].
  // Appends a sentence for every row whose processor failed or that has no token left: {index among rows, sentence}.
  void sample(const SampleTask& task, std::span<const std::uint32_t> masks,
              std::vector<std::pair<std::int32_t, std::string>>& row_errors);
  // Requests log-probabilities of the tokens sampled by the last sample(); appends the indexes among its rows.
  void logprobs(const SampleTask& task, std::vector<std::int32_t>& indexes);

 private:
  void keep_raw_logits(const SampleTask& task);
  void run_processors(const SampleTask& task, std::vector<std::pair<std::int32_t, std::string>>& row_errors);
  void apply_masks(const SampleTask& task, std::span<const std::uint32_t> masks,
                   std::vector<std::pair<std::int32_t, std::string>>& row_errors);

  Backend& backend_;
  int vocab_;
  std::unique_ptr<Buffer> raw_;         // [max_rows, vocab] F32: logits before anything changes them
  std::vector<std::int32_t> raw_rows_;  // rows of the logits copied there
  std::vector<std::int32_t> masked_;    // rows of the logits
  std::vector<std::uint32_t> bits_;     // [masked_, words] what the plan's masks and the requests' lists allow
  std::vector<LogprobRequest> requests_;
  std::vector<float> host_logits_;  // [vocab]
};

}  // namespace fastllm

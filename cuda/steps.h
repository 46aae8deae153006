// Steps in flight. Inputs are packed into pinned memory of the step's own (an entry of a ring), and one kernel moves
// them to device memory, which is the same for all steps: stream order keeps one step's kernels from the next one's
// inputs, and recorded graphs stay valid.
//
//   ring entry (pinned, per step)   ids | positions | token_slot | rows | logit_tokens | samples | ... | table sets
//   device (one)                    ids | positions | token_slot | rows | logit_tokens | samples | ...
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "backend/backend.h"
#include "memory.h"
#include "sampling/sampling.h"
#include "staging.h"
#include "step_view.h"

namespace fastllm::cuda {

// Where the parts of a step's inputs lie, in a ring entry and on the device alike. Offsets in bytes, multiples of 16.
struct InputLayout {
  InputLayout(const StepLimits& limits, const AttentionLimits& attention);
  std::size_t ids = 0, positions = 0, token_slot = 0, rows = 0, logit_tokens = 0, samples = 0, adjustments = 0,
              decode_plan = 0, prefill_plan = 0;
  std::size_t device_bytes = 0;  // the parts above
  std::size_t table_sets = 0;    // in ring entries only
  std::size_t entry_bytes = 0;
};

// Begun on the launching thread; waited for on any one thread.
class CudaStep final : public Step {
 public:
  StepView view;
  int padded_rows = 0;  // 0: not padded
  const std::byte* decode_plan = nullptr;
  PrefillPlan prefill_plan;
  const std::int32_t* logit_tokens = nullptr;  // [num_logit_rows]
  int num_logit_rows = 0;                      // padding included
  int num_sampled = 0;                         // R: without padding

  LogitsProcessing processing;  // its rows and adjustments
  bool samples = false, all_greedy = true, any_filter = false;

  TokenId* host_sampled = nullptr;  // [num_logit_rows] pinned
  bool tokens_known = false;        // sample() or commit_tokens() ran

  // Pinned room for the results of n requests, part of the StepOutput.
  DeviceLogprobResult* add_results(int n);
  // The result of request `index` of those added last, when it was found on the host.
  void replace_result(int index, LogprobResult result);

 private:
  friend class StepRing;
  enum class State : std::uint8_t { Idle, Begun, Ended };
  struct Batch {
    const DeviceLogprobResult* results;
    int count;
  };

  void begin(std::size_t entry_bytes);
  void collect(StepOutput& out) const;

  std::unique_ptr<Buffer> entry_;  // pinned inputs
  std::unique_ptr<Buffer> sampled_;
  Event done_;
  std::atomic<State> state_ = State::Idle;
  // Logprob results: rooms are filled in order and kept.
  std::vector<std::unique_ptr<Buffer>> rooms_;
  std::size_t room_ = 0, room_used_ = 0;  // results
  std::vector<Batch> batches_;
  std::size_t num_results_ = 0;
  std::vector<std::pair<std::size_t, LogprobResult>> replaced_;  // index in the StepOutput
};

inline CudaStep& cuda_step(Step& step) { return static_cast<CudaStep&>(step); }
inline const CudaStep& cuda_step(const Step& step) { return static_cast<const CudaStep&>(step); }

class StepRing {
 public:
  // deterministic: decode rows are planned as prefill rows.
  StepRing(const StepLimits& limits, const AttentionLimits& attention, bool deterministic, cudaStream_t stream);

  // Never allocates and, when steps are waited for as promised, never waits.
  CudaStep& begin(const StepInput& input, Staging& staging);
  void end(CudaStep& step);
  static bool done(const CudaStep& step) { return step.done_.done(); }
  static void wait(CudaStep& step, StepOutput& out);

  TokenId* last_token() const { return data_as<TokenId>(*last_token_); }  // [slots] device memory
  TokenId* sampled() const { return data_as<TokenId>(*sampled_); }        // [R] device memory

 private:
  class Packing;

  void check_limits(const StepInput& input) const;
  void reclaim(CudaStep& step);
  void pack_tokens(Packing& packing, const StepInput& input, CudaStep& step) const;
  void pack_plans(Packing& packing, CudaStep& step);
  void pack_sampling(Packing& packing, const StepInput& input, Staging& staging, CudaStep& step);
  void pack_tables(Packing& packing, const StepInput& input, Staging& staging);

  StepLimits limits_;
  AttentionLimits attention_;
  bool deterministic_;
  cudaStream_t stream_;
  InputLayout layout_;
  std::unique_ptr<Buffer> inputs_, tables_, last_token_, sampled_;  // device memory
  std::unique_ptr<Buffer> many_adjustments_;                        // device memory, for more than the layout holds
  std::vector<std::unique_ptr<CudaStep>> steps_;
  std::size_t next_ = 0;
  std::vector<std::int32_t> kv_lengths_;  // of the decode rows being packed
};

}  // namespace fastllm::cuda

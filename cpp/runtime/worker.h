// One rank: weights, KV pool and slots, and the execution of plans. launch() enqueues a plan on the rank's thread;
// finish() collects what it brought, perhaps on another thread and while later plans are launched.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "dist/communicator.h"
#include "fastllm/types.h"
#include "fastllm/weights.h"
#include "model/decoder.h"
#include "runtime/sampler.h"
#include "runtime/slot_state.h"
#include "sched/step_plan.h"

namespace fastllm {

// A plan under way: what finish() needs of launch(). Kept by the caller, one for each plan in flight.
struct Launched {
  Step* step = nullptr;                  // none: the plan had no rows
  std::size_t num_prompt_logprobs = 0;   // the first of the step's log-probabilities
  std::vector<std::int32_t> logprob_of;  // whose the others are: indexes among the kSample rows
  std::vector<std::pair<std::int32_t, std::string>> row_errors;
  StepOutput output;  // kept for its capacity

  void clear() {
    step = nullptr;
    num_prompt_logprobs = 0;
    logprob_of.clear();
    row_errors.clear();
  }
};

// Rows a step is padded to: the next of `sizes` (ascending), or 0 when none is large enough or the plan has anything
// but decode rows that sample.
int padded_rows(const StepPlan& plan, std::span<const int> sizes);

class Worker {
 public:
  // Blocks until the masks of the plan under way are there: [masked_rows, ceil(vocab / 32)].
  using MaskSource = std::function<std::span<const std::uint32_t>(const StepPlan&)>;

  // Loads and packs this rank's weights. `config` is complete; `comm` outlives the worker.
  Worker(const EngineConfig& config, const ModelSource& source, std::unique_ptr<Backend> backend, Communicator& comm,
         const LoadProgress& progress);

  std::int64_t block_bytes() const { return decoder_.kv_shape().block_bytes(); }
  std::int64_t weight_bytes() const { return decoder_.weight_bytes(); }
  const std::vector<std::string>& inflated() const { return decoder_.inflated(); }
  DeviceInfo device() const { return backend_->info(); }
  bool profile_by_running() const { return backend_->profile_by_running(); }
  // The step that takes the most memory, on a KV pool of one block that is gone afterwards.
  void run_worst_step();
  void init_kv(std::int64_t device_blocks, std::int64_t host_blocks);

  // Enqueues a plan. Throws when the step, and with it the worker, has failed.
  void launch(const StepPlan& plan, const MaskSource& masks, Launched& out);
  // finish() would not block.
  bool done(const Launched& plan) { return plan.step == nullptr || backend_->step_done(*plan.step); }
  // Waits for a launched plan; rank 0 fills `result`. In the order of the launches.
  void finish(const StepPlan& plan, Launched& launched, StepResult& result);

 private:
  void warm_up();
  void apply_changes(const StepPlan& plan);
  Step& begin_step(const StepPlan& plan, int padded);
  void forward(Step& step, int num_tokens, int logit_rows, int padded);
  void prompt_logprobs(const StepPlan& plan, Launched& out);
  void sample(const StepPlan& plan, const MaskSource& masks, Launched& out);

  int max_len_;       // positions
  int max_logprobs_;  // alternatives
  StepLimits limits_;
  std::unique_ptr<Backend> backend_;
  Communicator& comm_;
  Decoder decoder_;
  SlotState slots_;
  Sampler sampler_;
  std::unique_ptr<Buffer> kv_, host_kv_;

  // Inputs of the current step, kept for their capacity.
  std::vector<TableSet> held_sets_;     // of plans without rows, until the next step
  std::vector<StepRow> rows_;           // [rows]
  std::vector<std::int32_t> sampled_;   // plan rows with kSample
  std::vector<std::int32_t> last_;      // [sampled_] token whose logits are wanted
  std::vector<SampleRow> sample_rows_;  // [sampled_], on rank 0
};

}  // namespace fastllm

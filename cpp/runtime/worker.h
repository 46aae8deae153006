// One rank: weights, KV pool and slots, and the execution of plans. Lives on its rank's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
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

class Worker {
 public:
  // Blocks until the masks of the plan under way are there: [masked_rows, ceil(vocab / 32)].
  using MaskSource = std::function<std::span<const std::uint32_t>(const StepPlan&)>;

  // Loads and packs this rank's weights. `config` is complete; `comm` outlives the worker.
  Worker(const EngineConfig& config, const ModelSource& source, std::unique_ptr<Backend> backend, Communicator& comm,
         const LoadProgress& progress);

  std::int64_t block_bytes() const { return decoder_.kv_shape().block_bytes(); }
  std::int64_t weight_bytes() const { return decoder_.weight_bytes(); }
  DeviceInfo device() const { return backend_->info(); }
  void init_kv(std::int64_t device_blocks, std::int64_t host_blocks);

  // Runs a plan; rank 0 fills `result`. Throws when the step, and with it the worker, has failed.
  void run(const StepPlan& plan, const MaskSource& masks, StepResult& result);

 private:
  void apply_changes(const StepPlan& plan);
  void build_inputs(const StepPlan& plan);
  void prompt_logprobs(const StepPlan& plan, StepResult& result);
  void sample(const StepPlan& plan, const MaskSource& masks, StepResult& result);

  int max_logit_rows_;
  std::unique_ptr<Backend> backend_;
  Communicator& comm_;
  Decoder decoder_;
  SlotState slots_;
  Sampler sampler_;
  std::unique_ptr<Buffer> kv_, host_kv_;

  // Inputs of the current step, kept for their capacity.
  std::vector<TokenId> ids_;             // [T]
  std::vector<std::int32_t> positions_;  // [T]
  std::vector<AttnRow> attn_rows_;       // [rows]
  std::vector<std::int32_t> sampled_;    // plan rows with kSample
  std::vector<std::int32_t> last_;       // [sampled_] token whose logits are wanted
  std::vector<TokenId> tokens_;          // [sampled_] results, equal on all ranks
};

}  // namespace fastllm

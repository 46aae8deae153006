// Runs plans, in order, with up to depth() of them in flight. Called from the engine thread only.
//   LocalExecutor   one thread per rank in this process
//   NullExecutor    the hash model, without weights
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "sched/step_plan.h"

namespace fastllm {

// What the scheduler may use, after the worst step was measured.
struct KvBudget {
  std::int64_t bytes_per_block = 0;  // over all ranks
  std::int64_t device_blocks = 0;    // the reserved block 0 included
  std::int64_t host_blocks = 0;
  // Idle cached blocks give way before more than this many blocks are touched, unless the user sized the pool.
  std::int64_t resident_blocks = std::numeric_limits<std::int64_t>::max();
};

// The memory of the first rank's GPU at this moment; on CPUs the weights of all ranks, the rest zero. Bytes.
struct DeviceUse {
  std::string name;
  std::int64_t total = 0, free = 0;
  std::int64_t weights = 0;                // packed
  std::vector<std::string> inflated = {};  // packed in the checkpoint, dense in the first rank: "name: why"
};

class Executor {
 public:
  virtual ~Executor() = default;
  // Blocks that fit the configuration and the memory; nothing is allocated yet.
  virtual KvBudget profile() = 0;
  virtual void init_kv(std::int64_t device_blocks, std::int64_t host_blocks) = 0;
  // Between steps only.
  virtual DeviceUse device_use() { return {}; }
  // Returns after enqueueing. The plan must stay as it is until wait(plan.id) returned.
  virtual void submit(const StepPlan& plan) = 0;
  // Required once for every plan with masked_rows: [masked_rows, ceil(vocab / 32)], see TokenMask. Copied.
  virtual void set_masks(std::uint64_t plan_id, std::span<const std::uint32_t> bits) = 0;
  // True when wait() would not block.
  virtual bool ready(std::uint64_t plan_id) = 0;
  // Plans are waited for in submission order. The reference is valid until the next wait().
  virtual const StepResult& wait(std::uint64_t plan_id) = 0;
  virtual int depth() const = 0;
};

}  // namespace fastllm

// The Executor of one process: a thread per tensor-parallel rank, each with its own backend, KV pool and slots. Ranks
// get the same plan by pointer and run plans in order.
#pragma once

#include <functional>
#include <memory>

#include "backend/backend.h"
#include "fastllm/types.h"
#include "fastllm/weights.h"
#include "runtime/executor.h"

namespace fastllm {

// Loads and packs the weights on every rank. `config` is complete: no zeros are left to choose but num_blocks and
// kv_cache_bytes, and the device is "cpu", "cuda" or "cuda:N". Throws fastllm::Error.
std::unique_ptr<Executor> make_local_executor(const EngineConfig& config, ModelSource source, LoadProgress progress);

// The same on backends of the caller's making, one per rank, called on the rank's thread.
using BackendFactory = std::function<std::unique_ptr<Backend>(int rank)>;
std::unique_ptr<Executor> make_local_executor(const EngineConfig& config, ModelSource source, LoadProgress progress,
                                              BackendFactory backends);

}  // namespace fastllm

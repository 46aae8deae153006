// What to change when a GPU's memory does not suffice at start. Pure functions.
#pragma once

#include <cstdint>
#include <string>

#include "fastllm/types.h"
#include "runtime/executor.h"

namespace fastllm {

enum class StartPhase : std::uint8_t { Weights, WorstStep, KvCache };

// Flags with values that take less memory in this phase, as the end of a sentence.
std::string memory_advice(StartPhase phase, const EngineConfig& config);

// The four moments of a start, and what was taken between them.
struct StartUse {
  DeviceUse loaded;   // weights are in place
  DeviceUse stepped;  // the worst step ran
  DeviceUse ready;    // KV cache and graphs are in place
  std::int64_t kv_bytes = 0;
};
EngineMemory memory_of(const StartUse& use);

}  // namespace fastllm

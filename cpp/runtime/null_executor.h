// The null model as an Executor: see NullModel in fastllm/engine.h. Each KV slot stores the token written to it, and
// the next token is a hash of what the sequence reads through its block table.
#pragma once

#include <memory>

#include "fastllm/engine.h"
#include "runtime/executor.h"

namespace fastllm {

std::unique_ptr<Executor> make_null_executor(const EngineConfig& config, const NullModel& model);

}  // namespace fastllm

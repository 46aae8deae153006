// What must hold between any two calls of the scheduler, as code.
#pragma once

#include <string>

namespace fastllm {

class Scheduler;

// The first broken promise as a sentence; empty if all hold. O(blocks + tokens): for tests and debugging.
std::string broken_invariant(const Scheduler& scheduler);

// Throws fastllm::Error with that sentence.
void check_invariants(const Scheduler& scheduler);

}  // namespace fastllm

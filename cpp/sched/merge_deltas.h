// A caller that polls less often than the engine steps gets one delta per sequence all the same. Pure.
#pragma once

#include <vector>

#include "fastllm/types.h"

namespace fastllm {

// Joins the deltas of each (id, index) into the first of them: tokens and log-probabilities in order, everything else
// as the last one has it. An id that ended and was used again stays apart.
void merge_deltas(std::vector<TokenDelta>& deltas);

}  // namespace fastllm

// Rotary tables. Pure functions, the formulas of Hugging Face's rope_scaling kinds.
#pragma once

#include <vector>

#include "fastllm/model_spec.h"

namespace fastllm {

// [max_len, dim]: for each position dim/2 cosines, then dim/2 sines, both times the attention factor of the scaling.
//
// Two kinds depend on the length of the sequence. Here a table belongs to the engine, so that a token's rotation does
// not change with chunking or prefix reuse: Dynamic takes position + 1 for the length, which is what decoding token by
// token does; LongRope uses its long factors for all positions when max_len exceeds original_max_len.
std::vector<float> rope_table(const RopeSpec& spec, int max_len);

// [dim / 2] angles per position, for a sequence of seq_len tokens. fp32 where the reference is.
std::vector<float> rope_inv_freq(const RopeSpec& spec, int seq_len);

// What cosines and sines are multiplied by.
double rope_attention_factor(const RopeScaling& scaling);

// Slopes of `heads` ALiBi heads (arXiv:2108.12409).
std::vector<float> alibi_slopes(int heads);

}  // namespace fastllm

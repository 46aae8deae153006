// Made-up steps for tests of what a backend is told.
#pragma once

#include <utility>
#include <vector>

#include "backend/op_testing.h"

namespace fastllm::test {

// A step and all that its StepInput borrows.
struct MadeStep {
  std::vector<TableSet> table_sets;
  std::vector<TokenId> tokens;
  std::vector<StepRow> rows;
  std::vector<std::int32_t> logit_tokens;
  std::vector<std::vector<std::pair<std::int32_t, float>>> biases;
  std::vector<std::vector<std::int32_t>> forbidden;
  std::vector<SampleRow> sampling;
  int num_decode_rows = 0, padded_rows = 0;

  void add_row(Random& random, int slot, int num_tokens, int first_pos, bool samples, bool from_slot) {
    rows.push_back({static_cast<std::int32_t>(tokens.size()), num_tokens, first_pos, SlotId{slot}, from_slot});
    for (int k = 0; k < num_tokens; ++k) tokens.push_back(from_slot ? -7 : random.below(1000));
    if (!samples) return;
    logit_tokens.push_back(static_cast<std::int32_t>(tokens.size()) - 1);
    SampleRow row;
    row.slot = SlotId{slot};
    row.temperature = random.below(3) == 0 ? 0.0f : 0.5f + 0.1f * static_cast<float>(random.below(10));
    row.top_k = random.below(5);
    row.top_p = random.below(2) == 0 ? 1.0f : 0.9f;
    row.min_p = random.below(2) == 0 ? 0.0f : 0.1f;
    row.repetition_penalty = 1.5f;
    row.presence_penalty = 0.25f;
    row.frequency_penalty = 0.125f;
    row.penalised = random.below(2) == 0;
    row.seed = random.bits();
    row.position = first_pos + num_tokens;
    sampling.push_back(row);
    auto& bias = biases.emplace_back();
    for (int i = random.below(4); i > 0; --i) bias.emplace_back(random.below(1000), random.normal());
    auto& ids = forbidden.emplace_back();
    for (int i = random.below(3); i > 0; --i) ids.push_back(random.below(1000));
  }
  StepInput input() {
    for (std::size_t i = 0; i < sampling.size(); ++i) {
      sampling[i].logit_bias = biases[i];
      sampling[i].forbidden = forbidden[i];
    }
    StepInput in;
    in.table_sets = table_sets;
    in.tokens = tokens;
    in.rows = rows;
    in.num_decode_rows = num_decode_rows;
    in.padded_rows = padded_rows;
    in.logit_tokens = logit_tokens;
    in.sampling = sampling;
    return in;
  }
};

}  // namespace fastllm::test

// What moves a step's inputs from pinned host memory to their fixed places in device memory.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/ids.h"
#include "fastllm/types.h"

namespace fastllm::cuda {

struct InputCopy {
  const std::byte* from = nullptr;  // pinned
  std::byte* to = nullptr;          // device
  std::int32_t units = 0;           // of 16 bytes
};

struct InputUpdate {
  std::array<InputCopy, 9> copies;       // the first holds token ids: a negative one is ~slot, the slot's last token
  const TokenId* last_token = nullptr;   // [slots] device memory
  const TableSet* table_sets = nullptr;  // pinned; a later one of the same entry wins
  std::int32_t num_table_sets = 0;
  BlockId* tables = nullptr;  // [slots, table_width] device memory
  std::int32_t table_width = 0;
};
void update_inputs(const InputUpdate& update, cudaStream_t stream);

// last_token[token_slot[logit_tokens[r]]] = sampled[r], and host_sampled[r] = sampled[r] in pinned memory.
void commit_tokens(const TokenId* sampled, int rows, const std::int32_t* logit_tokens, const std::int32_t* token_slot,
                   TokenId* last_token, TokenId* host_sampled, cudaStream_t stream);

}  // namespace fastllm::cuda

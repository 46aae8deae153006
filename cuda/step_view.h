// A step's inputs as kernels see them: device memory at addresses that never change, so that recorded graphs stay
// valid.
#pragma once

#include <cstdint>

#include "base/ids.h"
#include "fastllm/types.h"

namespace fastllm::cuda {

// One row; 16 bytes, read at once. A padding row has num_tokens 1, first_pos -1 and slot -1: it attends to nothing.
struct alignas(16) DeviceRow {
  std::int32_t token_begin, num_tokens, first_pos, slot;
};

struct StepView {
  const TokenId* ids = nullptr;              // [T] resolved, padding 0
  const std::int32_t* positions = nullptr;   // [T] padding 0
  const std::int32_t* token_slot = nullptr;  // [T] padding -1
  const DeviceRow* rows = nullptr;           // [num_rows] decode rows first
  const BlockId* tables = nullptr;           // [max_slots, table_width]
  int table_width = 0;                       // blocks
  int num_tokens = 0;                        // T, padding included
  int num_rows = 0;                          // padding included
  int num_decode_rows = 0;                   // padding included
};

}  // namespace fastllm::cuda

// Attention over the paged KV cache. A step's decode rows (one token each) go to the decode kernels, which split the KV
// positions of a row over thread blocks; all other rows go to the prefill kernels. Which kernel computes what is
// decided once per step and shape, here; what the step consists of is planned once on the host and shared by all
// layers.
//
//   bf16, head_dim 64, 128, 256:  tensor cores (sm_80; wgmma on sm_90a for prefill with head_dim 64 and 128); prefill
//                                 also with head_dim 96
//   anything else, fp32 included: attention/generic.cu, any head_dim up to 256
//
// softmax(scale q k^T, soft-capped, + alibi_slope * (key position - query position), causal, within window) v
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "step_view.h"

namespace fastllm::cuda {

struct AttentionCall {
  void* out = nullptr;      // [T, heads * head_dim] of dtype, dense
  const void* q = nullptr;  // [T, ldq] of dtype
  std::int64_t ldq = 0;     // elements
  DType dtype = DType::BF16;
  KvView kv;                            // dtype: that of q, or F8E4M3
  AttnArgs args;                        // alibi_slopes: ignored, see the next field
  const float* alibi_slopes = nullptr;  // [heads] device memory, or null
};

// What does not change during the life of a backend.
struct AttentionLimits {
  int max_rows = 0, max_tokens = 0;  // of a step
  int max_len = 0;                   // positions of one sequence
  int num_sms = 0;                   // multiprocessors of the device
  int capability = 0;                // 80, 90, ...
  int window = 0;                    // of the layers that have one, see AttnArgs; 0: none has
};

// --- decode (attention/decode.cu, attention/decode_plan.cc) ---
// The split of the decode rows' KV positions into work items of about equal length. Host code writes it next to the
// other step inputs; the kernels read it on the device, so a recorded launch serves every step of the same padded size.
// The cuts depend on the whole batch, and a row's rounding on its cuts: where that must not be, rows go to prefill.
std::size_t decode_plan_bytes(const AttentionLimits& limits);  // upper bound, multiple of 16
// kv_lengths: positions each decode row reads; 0 for padding rows. `out` has decode_plan_bytes().
void write_decode_plan(std::span<const std::int32_t> kv_lengths, const AttentionLimits& limits, std::byte* out);
// Arrival counters, then partial results; heads and head_dim are the largest of the model. The counters, the first
// decode_counter_bytes() of it, must be zeroed once, after allocation: every call leaves them zero.
std::size_t decode_counter_bytes(const AttentionLimits& limits);
std::size_t decode_workspace_bytes(const AttentionLimits& limits, int heads, int head_dim);
// A window other than limits.window is correct, but may be slower.
// Launches no more and no fewer blocks than `step.num_decode_rows` and the limits say: nothing else of the step is
// known on the host when a graph is recorded.
void decode_attention(const AttentionCall& call, const StepView& step, const std::byte* plan /* device */,
                      const AttentionLimits& limits, void* workspace, cudaStream_t stream);

// --- prefill (attention/prefill*.cu, attention/prefill_plan.cc) ---
// Lists of query tiles, each with the costliest first. Heads that share a KV head also share tiles, so how many tokens
// a tile takes depends on how many such heads there are; the host plans a step before it knows, for every number up to
// kMaxTileHeads. Never part of a graph.
inline constexpr int kMaxTileHeads = 8;
struct PrefillPlan {
  std::array<int, kMaxTileHeads + 1> begin{};  // items [begin[h - 1], begin[h]) are for h heads
  std::size_t bytes = 0;                       // to be copied to `device`, multiple of 16; 0: nothing to do
  const std::byte* device = nullptr;
};
std::size_t prefill_plan_bytes(const AttentionLimits& limits);  // upper bound, multiple of 16
// rows: all rows of the step; those from num_decode_rows on are planned. `out`: host memory that will be at `device`.
PrefillPlan write_prefill_plan(std::span<const DeviceRow> rows, int num_decode_rows, const AttentionLimits& limits,
                               std::byte* out, const std::byte* device);
void prefill_attention(const AttentionCall& call, const StepView& step, const PrefillPlan& plan,
                       const AttentionLimits& limits, cudaStream_t stream);

// --- any shape and dtype, slowly (attention/generic.cu): rows [row_begin, row_end) of the step ---
void generic_attention(const AttentionCall& call, const StepView& step, int row_begin, int row_end, int num_tokens,
                       cudaStream_t stream);

}  // namespace fastllm::cuda

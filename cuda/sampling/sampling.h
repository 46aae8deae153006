// Launchers of everything that happens to logits. Logits are [rows, vocab] F32 with a row stride; results are the CPU
// backend's (cpp/backend/cpu/sampling.cc): the same order of filters, the same Philox numbers, ties by lower id.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "fastllm/types.h"

namespace fastllm::cuda {

// One sampled row as uploaded with the step; see SampleRow in backend.h.
struct alignas(16) DeviceSampleRow {
  std::uint64_t seed;
  std::int64_t position;
  float temperature, top_p, min_p;
  std::int32_t top_k;
  float repetition_penalty, presence_penalty, frequency_penalty;
  std::int32_t slot;
  std::int32_t penalised;                 // 0 or 1
  std::int32_t adjust_begin, adjust_end;  // its entries in the list of adjustments
  std::int32_t pad;
};
static_assert(sizeof(DeviceSampleRow) == 64);

// logits[row, id] += add; forbidden ids add -infinity.
struct LogitAdjustment {
  std::int32_t id;
  float add;
};

struct Logits {
  float* data = nullptr;  // device memory
  std::int64_t ld = 0;    // elements
  int rows = 0, vocab = 0;
};

// counts: [slots, vocab] int32; bit 30: the id is in the prompt; low 30 bits: occurrences in the output.
struct LogitsProcessing {
  const DeviceSampleRow* rows = nullptr;  // [logits.rows] device memory
  const LogitAdjustment* adjustments = nullptr;
  int num_adjustments = 0;     // of all rows; 0: none launched
  bool any_penalised = false;  // false: counts may be null
  const std::int32_t* counts = nullptr;
};
void process_logits(const Logits& logits, const LogitsProcessing& call, cudaStream_t stream);

// Zeroes a slot's counts, then counts `tokens` (device or pinned memory), of which the first num_prompt are the prompt.
void init_counts(std::int32_t* counts, int vocab, const TokenId* tokens, std::int64_t num_tokens,
                 std::int64_t num_prompt, cudaStream_t stream);

// Row rows[i] of the logits keeps the ids whose bit is set in bits[i, ceil(vocab / 32)].   Both device or pinned
// memory.
void mask_logits(const Logits& logits, const std::int32_t* rows, int num_rows, const std::uint32_t* bits,
                 cudaStream_t stream);

struct SampleCall {
  const DeviceSampleRow* rows = nullptr;  // [logits.rows] device memory
  bool all_greedy = false;                // every row has temperature 0 or top_k 1
  bool any_filter = true;                 // some row has top_k, top_p or min_p
  bool any_penalised = false;
  std::int32_t* counts = nullptr;   // [slots, vocab], or null when not any_penalised; the sampled token is counted
  TokenId* sampled = nullptr;       // [rows] device memory
  TokenId* host_sampled = nullptr;  // [rows] pinned memory, written too; -1 where a logit is NaN or the greatest
                                    // infinite, and the others get token 0
  TokenId* last_token = nullptr;    // [slots] device memory: last_token[rows[r].slot] = the token
  void* workspace = nullptr;        // sample_workspace_bytes(), device memory
};
std::size_t sample_workspace_bytes(int max_rows, int vocab);
void sample(const Logits& logits, const SampleCall& call, cudaStream_t stream);

struct alignas(16) DeviceLogprobRequest {
  std::int32_t row, token, top, sampled;  // as LogprobRequest
};
// Most alternatives topk_logprobs() finds on the device; the backend copies the logits to the host for more.
inline constexpr int kMaxDeviceTop = 32;
struct DeviceLogprobResult {
  float logprob;
  std::int32_t rank, token, num_top;
  std::int32_t top_ids[kMaxDeviceTop];
  float top_logprobs[kMaxDeviceTop];
};
// requests: device or pinned memory; sampled: [R] device memory; results: [n] pinned memory. The logits are not
// changed.
void topk_logprobs(const Logits& logits, const DeviceLogprobRequest* requests, int n, const TokenId* sampled,
                   DeviceLogprobResult* results, void* workspace, cudaStream_t stream);
std::size_t logprob_workspace_bytes(int max_requests);

}  // namespace fastllm::cuda

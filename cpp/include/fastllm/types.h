// Everything a host exchanges with the engine: configuration, requests, results, statistics.
// Plain data, standard library only. Text never appears here: tokens in, tokens out.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fastllm/token_mask.h"

namespace fastllm {

using TokenId = std::int32_t;
using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;

enum class FinishReason : std::uint8_t {
  None,    // still running
  Stop,    // end-of-sequence or a stop id
  Length,  // max_tokens or the model's length reached
  Abort,   // the caller aborted, or the engine shut down
  Error,   // TokenDelta::error says why
};

// Whose fault an Error is, so that a server can answer with the right status.
enum class ErrorKind : std::uint8_t {
  None,
  Invalid,     // the request itself
  Overloaded,  // refused for lack of room or because the engine is stopping; another try may succeed
  Timeout,     // its deadline passed while it waited
  Engine,      // a fault inside
};

// When a beam search with all its results ends, as in Transformers' generate().
enum class EarlyStopping : std::uint8_t {
  No,     // when the best beam scores no better at its present length than the worst result
  Yes,    // at once
  Never,  // when no beam can score better at any length, if sums only fall
};

// How to choose the next token. The order is vLLM's: raw log-probabilities are taken first, then logit bias and
// min_tokens, penalties, temperature, min_p, top_k, top_p.
struct SamplingParams {
  float temperature = 1.0f;         // >= 0; 0 is greedy
  float top_p = 1.0f;               // (0, 1]
  float min_p = 0.0f;               // [0, 1]; keep tokens with p >= min_p * max p
  int top_k = 0;                    // 0 or -1: off
  float repetition_penalty = 1.0f;  // > 0; over prompt and output (CTRL, arXiv:1909.05858)
  float presence_penalty = 0.0f;    // [-2, 2]; over output
  float frequency_penalty = 0.0f;   // [-2, 2]; over output
  int n = 1;                        // parallel samples that share the prompt's KV, or results of a beam search
  int beam_width = 0;               // 0: sampling; else beams of a search whose n best sequences come at its end
  float length_penalty = 1.0f;      // of a beam search: a score is the sum of log-probabilities / length ^ this
  EarlyStopping early_stopping = EarlyStopping::No;  // of a beam search
  std::optional<std::uint64_t> seed;
  int max_tokens = 16;  // >= 1; output tokens
  int min_tokens = 0;   // output tokens before an EOS or stop id may be sampled
  bool ignore_eos = false;
  std::vector<TokenId> stop_ids;                      // end the sequence; kept in the output
  std::vector<std::pair<TokenId, float>> logit_bias;  // added to the raw logit
  std::vector<TokenId> allowed_ids;                   // the only ids that may be sampled; empty: all
  // Sequences that may not stand in the output, prompts do not count: none of their last ids is sampled after the rest.
  std::vector<std::vector<TokenId>> bad_words;
  int logprobs = -1;         // top alternatives per output token; 0: the sampled one only; -1: off
  int prompt_logprobs = -1;  // the same for prompt tokens
};

struct RequestInput {
  std::uint64_t id = 0;  // the caller's; unique among live requests
  std::vector<TokenId> prompt;
  SamplingParams sampling;
  int priority = 0;                   // lower runs first when the policy is Priority
  std::optional<TimePoint> deadline;  // still waiting then: finished with Error
  std::string cache_salt;             // requests share cached prefixes only within one salt
  int adapter = -1;                   // reserved; -1 is the base model
  std::shared_ptr<TokenMask> mask;    // constrains the output (grammar); n samples get clones
  std::shared_ptr<LogitsProcessor> logits_processor;
};

struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0;  // natural log
  int rank = 0;       // 1 is the most likely token of the vocabulary
};

// One position: the token that stands there and its most likely alternatives, best first.
struct PositionLogprobs {
  TokenLogprob chosen;
  std::vector<TokenLogprob> top;
};

struct RequestTimes {
  TimePoint arrival{};          // submit() was called
  TimePoint first_scheduled{};  // first planned; minus arrival is the queue time
  TimePoint first_token{};
  TimePoint finished{};
};

// What became known of one sequence since the last poll().
struct TokenDelta {
  std::uint64_t id = 0;
  int index = 0;                                  // 0..n-1
  std::vector<TokenId> tokens;                    // new output tokens, in order
  std::vector<PositionLogprobs> logprobs;         // one per token, if asked for
  std::vector<PositionLogprobs> prompt_logprobs;  // positions 1..num_prompt-1, with the first tokens of index 0
  FinishReason finish = FinishReason::None;
  TokenId stop_token = -1;  // the id that ended the sequence, when finish is Stop
  int cached_tokens = 0;    // prompt tokens served by the prefix cache, at first admission
  int num_preemptions = 0;  // of this sequence so far
  std::string error;        // a sentence, when finish is Error
  ErrorKind error_kind = ErrorKind::None;
  RequestTimes times;  // filled as known
};

enum class SchedulingPolicy : std::uint8_t { Fcfs, Priority };
enum class PreemptionMode : std::uint8_t { Recompute, Swap };  // Swap falls back to Recompute when host blocks run out

struct EngineConfig {
  std::string device = "cpu";      // "cpu", "cuda", "cuda:N", or "auto": a GPU if one can be used, else the CPU
  std::string dtype = "bfloat16";  // weights and activations: "float32" or "bfloat16"
  // "auto": compressed checkpoints are computed on as they are where the device can; "none": never; "int8", "int4":
  // every linear layer is quantised when it is loaded, the logits' with 8 bits. CPUs only.
  std::string quantization = "auto";
  int max_model_len = 0;            // tokens of prompt + output; 0: the model's own limit
  int max_num_seqs = 256;           // sequences resident at once (slots)
  int max_step_tokens = 2048;       // token budget of one step
  int max_chunk = 0;                // tokens of one prompt per step; 0: no limit but the budget
  int block_size = 16;              // tokens per KV block
  std::int64_t kv_cache_bytes = 0;  // 0: sized from the model, the limits and the free memory
  std::int64_t num_blocks = 0;      // overrides kv_cache_bytes; usable blocks, the reserved one not counted
  std::int64_t swap_bytes = 0;      // host memory for swapped-out blocks
  // "auto": as the activations; "bfloat16", "float16", "float32", "int8": CPUs; "fp8": e4m3, GPUs
  std::string kv_cache_dtype = "auto";
  double gpu_memory_utilization = 0.92;  // share of a GPU's memory this engine may take, (0, 1]
  bool enforce_eager = false;            // no GPU graphs
  bool deterministic = false;            // batch-invariant GPU kernels: a sequence's logits never depend on the batch
  PreemptionMode preemption = PreemptionMode::Recompute;
  SchedulingPolicy policy = SchedulingPolicy::Fcfs;
  bool prefix_caching = true;
  int async_depth = 2;  // steps in flight; 1 is synchronous
  int tensor_parallel_size = 1;
  int cpu_threads = 0;  // over all ranks; 0: the physical cores this process may use, or those of cpu_bind
  // "auto": bound to cores where that brings memory nearer; "cores": always; "none": never; or the CPUs themselves,
  // a thread on each: "0-7,16", with | between the lists of ranks.
  std::string cpu_bind = "auto";
  int max_logprobs = 20;          // most alternatives a request may ask for
  int max_waiting = 0;            // requests waiting; more are refused with Error; 0: no limit
  std::uint64_t seed = 0;         // for requests without one
  bool check_invariants = false;  // validate scheduler and KV state after every step (slow)
};

// What the head of the line lacked when the last step was planned.
enum class WaitReason : std::uint8_t {
  None,    // nobody waits
  Slots,   // max_num_seqs sequences run
  Blocks,  // its KV blocks are not free
  Tokens,  // the step's token budget was spent
  Prompt,  // samples wait for the prompt they share, or for steps in flight
};

struct EngineStats {
  int num_running = 0;  // sequences
  int num_waiting = 0;
  int num_swapped = 0;
  WaitReason wait_reason = WaitReason::None;
  std::int64_t total_blocks = 0;
  std::int64_t used_blocks = 0;       // referenced by a sequence
  std::int64_t peak_used_blocks = 0;  // most used at once since the start or the last reset_prefix_cache()
  std::int64_t cached_blocks = 0;     // unreferenced but matchable
  std::int64_t num_steps = 0;
  std::int64_t prompt_tokens = 0;  // computed, cache hits not counted
  std::int64_t generated_tokens = 0;
  std::int64_t prefix_queries = 0;  // tokens looked up
  std::int64_t prefix_hits = 0;     // tokens found
  std::int64_t num_preemptions = 0;
  std::int64_t num_finished = 0;  // requests
  std::int64_t num_aborted = 0;   // requests
  std::int64_t nan_rows = 0;      // results that were not numbers, each of which ended a request
  std::int64_t block_leaks = 0;   // blocks still referenced when the engine was idle: must stay 0
  double host_s = 0;              // the engine thread's time outside its waits: planning, submitting, applying
  double last_step_age_s = 0;     // since the engine thread last finished a turn
  bool healthy = true;            // false after a fault of the executor
};

// The engine thread's sign of life. It can be read at any time, also while the thread is stuck.
struct Heartbeat {
  std::uint64_t count = 0;  // advances when a turn begins, before and after the wait for a step, and when a turn ends
  bool busy = false;        // false while the thread sleeps because there is nothing to do
  double age_s = 0;         // since count last advanced
};

// What the memory of the first rank's GPU went to when the engine had started. On CPUs only the weights are known,
// those of all ranks. Bytes.
struct EngineMemory {
  std::string device;  // its name
  std::int64_t total = 0;
  std::int64_t weights = 0;
  std::int64_t activations = 0;  // of the largest step, workspaces included
  std::int64_t graphs = 0;
  std::int64_t kv_cache = 0;
  std::int64_t other = 0;  // the driver's context, other processes
  std::int64_t free = 0;
  // CPUs: the weights that are packed in the checkpoint and yet kept dense, "canonical name: why". Of the first rank.
  std::vector<std::string> inflated;
};

}  // namespace fastllm

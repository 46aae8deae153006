/* The engine for C and for every language that can call C. Maps fastllm/engine.h one to one: opaque handles, status
 * codes, no exceptions. Strings are UTF-8 and zero-terminated. All functions but the *_destroy ones are thread-safe.
 *
 * A function that can fail takes (char* error, size_t error_size): on failure a sentence is written there, cut to fit;
 * error may be NULL. */
#ifndef FASTLLM_C_API_H
#define FASTLLM_C_API_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FL_API __attribute__((visibility("default")))
#else
#define FL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fl_status {
  FL_OK = 0,
  FL_INVALID_ARGUMENT = 1, /* the caller's data or configuration */
  FL_LOAD_ERROR = 2,       /* a damaged or mismatched bundle */
  FL_RESOURCE_ERROR = 3,   /* memory, device or threads */
  FL_INTERNAL_ERROR = 4
} fl_status;

typedef enum fl_finish { FL_RUNNING = 0, FL_STOP = 1, FL_LENGTH = 2, FL_ABORTED = 3, FL_ERROR = 4 } fl_finish;

typedef struct fl_engine fl_engine;
typedef struct fl_batch fl_batch; /* results of one fl_poll */

/* Zero and NULL mean: the engine's choice. Initialise with fl_engine_config_init. Strings are copied. */
typedef struct fl_engine_config {
  const char* device;           /* "cpu" (default), "cuda", "cuda:N", or "auto" */
  const char* dtype;            /* "bfloat16" (default) or "float32" */
  const char* quantization;     /* "auto" (default): as the checkpoint; "none", "int8", "int4" */
  const char* kv_cache_dtype;   /* "auto" (default): as the activations; "int8", ... */
  int32_t max_model_len;        /* tokens */
  int32_t max_num_seqs;         /* sequences */
  int32_t max_step_tokens;      /* tokens */
  int32_t block_size;           /* tokens per KV block */
  int64_t kv_cache_bytes;       /* bytes */
  int64_t swap_bytes;           /* bytes */
  int32_t tensor_parallel_size; /* ranks */
  int32_t cpu_threads;          /* over all ranks */
  const char* cpu_bind;         /* "auto" (default), "cores", "none", or CPUs such as "0-7,16" */
  int32_t async_depth;          /* steps in flight */
  int32_t disable_prefix_caching;
  double gpu_memory_utilization; /* share of a GPU's memory, at most 1 */
  int32_t enforce_eager;         /* no GPU graphs */
  int32_t deterministic;         /* batch-invariant GPU kernels */
  uint64_t seed;
} fl_engine_config;

/* Initialise with fl_sampling_init: temperature 1, everything else off, 16 tokens. */
typedef struct fl_sampling {
  float temperature; /* 0: greedy */
  float top_p, min_p;
  int32_t top_k; /* 0: off */
  float repetition_penalty, presence_penalty, frequency_penalty;
  int32_t n;
  int32_t max_tokens, min_tokens;
  int32_t ignore_eos;
  int32_t has_seed;
  uint64_t seed;
  int32_t logprobs; /* -1: off */
  const int32_t* stop_ids;
  size_t num_stop_ids;
} fl_sampling;

/* One sequence's news. Pointers stay valid until the batch is destroyed. */
typedef struct fl_delta {
  uint64_t id;
  int32_t index; /* 0..n-1 */
  const int32_t* tokens;
  size_t num_tokens;
  const float* logprobs; /* of the tokens; NULL unless asked for */
  fl_finish finish;
  int32_t stop_token; /* -1: none */
  int32_t cached_tokens;
  const char* error; /* "" unless finish is FL_ERROR */
} fl_delta;

typedef struct fl_stats {
  int32_t num_running, num_waiting, num_swapped;
  int64_t total_blocks, used_blocks, cached_blocks;
  int64_t num_steps, prompt_tokens, generated_tokens, num_preemptions;
  int32_t healthy;
} fl_stats;

FL_API const char* fl_version(void);
FL_API void fl_engine_config_init(fl_engine_config* config);
FL_API void fl_sampling_init(fl_sampling* sampling);

/* Opens a bundle written by `fastllm export`. config may be NULL. */
FL_API fl_status fl_engine_open(const char* bundle_dir, const fl_engine_config* config, fl_engine** out, char* error,
                                size_t error_size);
FL_API void fl_engine_destroy(fl_engine* engine); /* NULL is fine */

/* Copies everything; never blocks on the device. Bad requests come back from fl_poll with FL_ERROR. */
FL_API fl_status fl_submit(fl_engine* engine, uint64_t id, const int32_t* prompt, size_t num_prompt,
                           const fl_sampling* sampling, char* error, size_t error_size);
FL_API void fl_abort(fl_engine* engine, uint64_t id);

/* Everything since the last poll, or an empty batch after timeout_ms. Destroy the batch. */
FL_API fl_status fl_poll(fl_engine* engine, int32_t timeout_ms, fl_batch** out, char* error, size_t error_size);
FL_API size_t fl_batch_size(const fl_batch* batch);
FL_API fl_delta fl_batch_get(const fl_batch* batch, size_t i); /* i < fl_batch_size */
FL_API void fl_batch_destroy(fl_batch* batch);                 /* NULL is fine */

FL_API int fl_event_fd(const fl_engine* engine); /* readable when fl_poll would return at once */
FL_API void fl_stats_get(const fl_engine* engine, fl_stats* out);
FL_API int fl_drain(fl_engine* engine, int32_t timeout_ms); /* 1: all accepted requests finished */

#ifdef __cplusplus
}
#endif

#endif

#include "fastllm/c_api.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "fastllm/engine.h"
#include "fastllm/error.h"
#include "fastllm/version.h"

struct fl_engine {
  std::unique_ptr<fastllm::Engine> engine;
};

struct fl_batch {
  std::vector<fastllm::TokenDelta> deltas;
  std::vector<std::vector<float>> logprobs;  // parallel to deltas
};

namespace {

void report(const char* sentence, char* error, std::size_t size) {
  if (error == nullptr || size == 0) return;
  const std::size_t n = std::min(std::strlen(sentence), size - 1);
  std::memcpy(error, sentence, n);
  error[n] = '\0';
}

// The one place where exceptions become codes.
template <class F>
fl_status guarded(char* error, std::size_t size, F&& body) {
  try {
    body();
    return FL_OK;
  } catch (const fastllm::InvalidArgument& e) {
    report(e.what(), error, size);
    return FL_INVALID_ARGUMENT;
  } catch (const fastllm::LoadError& e) {
    report(e.what(), error, size);
    return FL_LOAD_ERROR;
  } catch (const fastllm::ResourceError& e) {
    report(e.what(), error, size);
    return FL_RESOURCE_ERROR;
  } catch (const std::bad_alloc&) {
    report("out of memory", error, size);
    return FL_RESOURCE_ERROR;
  } catch (const std::exception& e) {
    report(e.what(), error, size);
    return FL_INTERNAL_ERROR;
  }
}

fastllm::EngineConfig config_of(const fl_engine_config* c) {
  fastllm::EngineConfig out;
  if (c == nullptr) return out;
  if (c->device != nullptr) out.device = c->device;
  if (c->dtype != nullptr) out.dtype = c->dtype;
  if (c->quantization != nullptr) out.quantization = c->quantization;
  if (c->kv_cache_dtype != nullptr) out.kv_cache_dtype = c->kv_cache_dtype;
  out.max_model_len = c->max_model_len;
  if (c->max_num_seqs != 0) out.max_num_seqs = c->max_num_seqs;
  if (c->max_step_tokens != 0) out.max_step_tokens = c->max_step_tokens;
  if (c->block_size != 0) out.block_size = c->block_size;
  out.kv_cache_bytes = c->kv_cache_bytes;
  out.swap_bytes = c->swap_bytes;
  if (c->swap_bytes > 0) out.preemption = fastllm::PreemptionMode::Swap;
  if (c->tensor_parallel_size != 0) out.tensor_parallel_size = c->tensor_parallel_size;
  out.cpu_threads = c->cpu_threads;
  if (c->cpu_bind != nullptr) out.cpu_bind = c->cpu_bind;
  if (c->async_depth != 0) out.async_depth = c->async_depth;
  out.prefix_caching = c->disable_prefix_caching == 0;
  if (c->gpu_memory_utilization != 0) out.gpu_memory_utilization = c->gpu_memory_utilization;
  out.enforce_eager = c->enforce_eager != 0;
  out.deterministic = c->deterministic != 0;
  out.seed = c->seed;
  return out;
}

fastllm::SamplingParams sampling_of(const fl_sampling& s) {
  fastllm::SamplingParams out;
  out.temperature = s.temperature;
  out.top_p = s.top_p;
  out.min_p = s.min_p;
  out.top_k = s.top_k;
  out.repetition_penalty = s.repetition_penalty;
  out.presence_penalty = s.presence_penalty;
  out.frequency_penalty = s.frequency_penalty;
  out.n = s.n;
  out.max_tokens = s.max_tokens;
  out.min_tokens = s.min_tokens;
  out.ignore_eos = s.ignore_eos != 0;
  if (s.has_seed != 0) out.seed = s.seed;
  out.logprobs = s.logprobs;
  if (s.num_stop_ids > 0) out.stop_ids.assign(s.stop_ids, s.stop_ids + s.num_stop_ids);
  return out;
}

}  // namespace

const char* fl_version(void) { return FASTLLM_VERSION; }

void fl_engine_config_init(fl_engine_config* config) { *config = fl_engine_config{}; }

void fl_sampling_init(fl_sampling* sampling) {
  const fastllm::SamplingParams defaults;
  *sampling = fl_sampling{};
  sampling->temperature = defaults.temperature;
  sampling->top_p = defaults.top_p;
  sampling->repetition_penalty = defaults.repetition_penalty;
  sampling->n = defaults.n;
  sampling->max_tokens = defaults.max_tokens;
  sampling->logprobs = defaults.logprobs;
}

fl_status fl_engine_open(const char* bundle_dir, const fl_engine_config* config, fl_engine** out, char* error,
                         size_t error_size) {
  return guarded(error, error_size, [&] {
    if (bundle_dir == nullptr || out == nullptr) throw fastllm::InvalidArgument("bundle_dir and out must not be NULL");
    *out = nullptr;
    auto handle = std::make_unique<fl_engine>();
    handle->engine = fastllm::Engine::open(config_of(config), bundle_dir);
    *out = handle.release();
  });
}

void fl_engine_destroy(fl_engine* engine) { delete engine; }

fl_status fl_submit(fl_engine* engine, uint64_t id, const int32_t* prompt, size_t num_prompt,
                    const fl_sampling* sampling, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    if (engine == nullptr || (prompt == nullptr && num_prompt > 0)) {
      throw fastllm::InvalidArgument("engine and prompt must not be NULL");
    }
    fastllm::RequestInput input;
    input.id = id;
    if (num_prompt > 0) input.prompt.assign(prompt, prompt + num_prompt);
    if (sampling != nullptr) input.sampling = sampling_of(*sampling);
    engine->engine->submit(std::move(input));
  });
}

void fl_abort(fl_engine* engine, uint64_t id) { engine->engine->abort(id); }

fl_status fl_poll(fl_engine* engine, int32_t timeout_ms, fl_batch** out, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    if (engine == nullptr || out == nullptr) throw fastllm::InvalidArgument("engine and out must not be NULL");
    *out = nullptr;
    auto batch = std::make_unique<fl_batch>();
    engine->engine->poll(batch->deltas, std::chrono::milliseconds(std::max(timeout_ms, 0)));
    batch->logprobs.reserve(batch->deltas.size());
    for (const auto& delta : batch->deltas) {
      auto& values = batch->logprobs.emplace_back();
      for (const auto& position : delta.logprobs) values.push_back(position.chosen.logprob);
    }
    *out = batch.release();
  });
}

size_t fl_batch_size(const fl_batch* batch) { return batch->deltas.size(); }

fl_delta fl_batch_get(const fl_batch* batch, size_t i) {
  const auto& d = batch->deltas[i];
  const auto& logprobs = batch->logprobs[i];
  fl_delta out{};
  out.id = d.id;
  out.index = d.index;
  out.tokens = d.tokens.data();
  out.num_tokens = d.tokens.size();
  out.logprobs = logprobs.empty() ? nullptr : logprobs.data();
  out.finish = static_cast<fl_finish>(d.finish);
  out.stop_token = d.stop_token;
  out.cached_tokens = d.cached_tokens;
  out.error = d.error.c_str();
  return out;
}

void fl_batch_destroy(fl_batch* batch) { delete batch; }

int fl_event_fd(const fl_engine* engine) { return engine->engine->event_fd(); }

void fl_stats_get(const fl_engine* engine, fl_stats* out) {
  const auto s = engine->engine->stats();
  *out =
      fl_stats{s.num_running, s.num_waiting,   s.num_swapped,      s.total_blocks,    s.used_blocks,    s.cached_blocks,
               s.num_steps,   s.prompt_tokens, s.generated_tokens, s.num_preemptions, s.healthy ? 1 : 0};
}

int fl_drain(fl_engine* engine, int32_t timeout_ms) {
  return engine->engine->drain(std::chrono::milliseconds(std::max(timeout_ms, 0))) ? 1 : 0;
}

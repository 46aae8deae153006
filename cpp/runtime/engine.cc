#include "fastllm/engine.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

#include "backend/backend.h"
#include "base/cpu_placement.h"
#include "fastllm/error.h"
#include "model/bundle.h"
#include "model/decoder_weights.h"
#include "runtime/engine_loop.h"
#include "runtime/fault_executor.h"
#include "runtime/kv_budget.h"
#include "runtime/local_executor.h"
#include "runtime/memory_advice.h"
#include "runtime/null_executor.h"

namespace fastllm {
namespace {

template <class T>
void require_at_least(const char* field, T value, T low) {
  if (value >= low) return;
  throw InvalidArgument(std::string(field) + " is " + std::to_string(value) + ", but must be at least " +
                        std::to_string(low) + ".");
}

bool is_gpu(const EngineConfig& config) { return config.device.starts_with("cuda"); }

// "auto" becomes "cuda" or "cpu"; a GPU that was asked for must be there.
std::string choose_device(const std::string& wanted, int ranks) {
  if (wanted == "cpu") return wanted;
  std::string why;
  if (wanted == "auto") return cuda_device_count(&why) >= ranks ? "cuda" : "cpu";
  int first = 0;
  const std::string number = wanted.starts_with("cuda:") ? wanted.substr(5) : "0";
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), first);
  if ((wanted != "cuda" && !wanted.starts_with("cuda:")) || error != std::errc{} ||
      end != number.data() + number.size() || first < 0 || first > INT32_MAX - ranks) {
    throw InvalidArgument("device is '" + wanted + "', but must be auto, cpu, cuda or cuda:N.");
  }
  const int count = cuda_device_count(&why);
  if (count == 0) throw ResourceError("device '" + wanted + "' cannot be used: " + why);
  if (first + ranks > count) {
    throw ResourceError("device '" + wanted + "' with tensor_parallel_size " + std::to_string(ranks) + " needs " +
                        std::to_string(first + ranks) + " GPUs, but " + std::to_string(count) + " can be used.");
  }
  return wanted;
}

void check_device_settings(const EngineConfig& config) {
  if (!(config.gpu_memory_utilization > 0 && config.gpu_memory_utilization <= 1)) {
    throw InvalidArgument("gpu_memory_utilization is " + std::to_string(config.gpu_memory_utilization) +
                          ", but must be above 0 and at most 1.");
  }
  const Quantization quantization = quantization_from_name(config.quantization);
  if (is_gpu(config) && (quantization == Quantization::Int8 || quantization == Quantization::Int4))
    throw InvalidArgument("quantization '" + config.quantization + "' runs on CPUs only; the device is '" +
                          config.device + "'.");
  kv_cache_dtype(config, is_gpu(config));
}

// Replaces the zeros that depend on the model and the machine, not on measured memory.
EngineConfig resolve(EngineConfig config, int model_len) {
  require_at_least("max_model_len", config.max_model_len, 0);
  require_at_least("max_num_seqs", config.max_num_seqs, 1);
  require_at_least("max_step_tokens", config.max_step_tokens, 1);
  require_at_least("max_chunk", config.max_chunk, 0);
  require_at_least("block_size", config.block_size, 1);
  require_at_least("kv_cache_bytes", config.kv_cache_bytes, std::int64_t{0});
  require_at_least("num_blocks", config.num_blocks, std::int64_t{0});
  require_at_least("swap_bytes", config.swap_bytes, std::int64_t{0});
  require_at_least("async_depth", config.async_depth, 1);
  require_at_least("tensor_parallel_size", config.tensor_parallel_size, 1);
  require_at_least("cpu_threads", config.cpu_threads, 0);
  require_at_least("max_logprobs", config.max_logprobs, 0);
  require_at_least("max_waiting", config.max_waiting, 0);
  if (config.max_model_len == 0) config.max_model_len = model_len;
  if (config.max_model_len > model_len) {
    throw InvalidArgument("max_model_len is " + std::to_string(config.max_model_len) +
                          ", but the model's positions were made for " + std::to_string(model_len) + " tokens.");
  }
  require_at_least("max_model_len", config.max_model_len, 2);
  const auto ranks = place_threads(config.cpu_bind, config.cpu_threads, config.tensor_parallel_size,
                                   read_cpu_topology(allowed_cpus()));
  config.cpu_threads = 0;
  for (const ThreadPlacement& rank : ranks) config.cpu_threads += rank.threads;
  return config;
}

// num_blocks before kv_cache_bytes before what the executor measured.
KvConfig size_kv(const EngineConfig& config, const KvBudget& budget) {
  constexpr std::int64_t kMaxBlocks = std::numeric_limits<std::int32_t>::max() / 2;
  KvConfig kv;
  kv.block_size = config.block_size;
  kv.prefix_caching = config.prefix_caching;
  kv.device_blocks = budget.device_blocks;
  if (config.kv_cache_bytes == 0 && config.num_blocks == 0) kv.resident_blocks = budget.resident_blocks;
  // On GPUs kv_cache_bytes is meant for each of them, as the budget knows.
  if (config.kv_cache_bytes > 0 && !is_gpu(config)) kv.device_blocks = config.kv_cache_bytes / budget.bytes_per_block;
  if (config.num_blocks > 0) kv.device_blocks = std::min(config.num_blocks, kMaxBlocks) + 1;
  kv.host_blocks = config.swap_bytes / budget.bytes_per_block;
  if (kv.device_blocks < 2) {
    throw ResourceError("The KV cache has room for " + std::to_string(kv.device_blocks) + " blocks of " +
                        std::to_string(budget.bytes_per_block) +
                        " bytes, but needs at least 2; raise kv_cache_bytes or lower max_model_len.");
  }
  return kv;
}

// Runs one phase of a start; a GPU that runs out of memory in it says what to change.
template <class F>
auto in_phase(StartPhase phase, const EngineConfig& config, F&& run) {
  try {
    return run();
  } catch (const ResourceError& e) {
    if (!is_gpu(config)) throw;
    throw ResourceError(std::string(e.what()) + "; " + memory_advice(phase, config));
  }
}

std::unique_ptr<EngineLoop> start(EngineConfig& config, const ModelSpec& spec, std::unique_ptr<Executor> executor,
                                  EngineMemory& memory) {
  executor = with_faults(std::move(executor));
  StartUse use;
  use.loaded = executor->device_use();
  const KvBudget budget = in_phase(StartPhase::WorstStep, config, [&] { return executor->profile(); });
  const KvConfig kv = size_kv(config, budget);
  use.stepped = executor->device_use();
  in_phase(StartPhase::KvCache, config, [&] { executor->init_kv(kv.device_blocks, kv.host_blocks); });
  use.ready = executor->device_use();
  use.kv_bytes = kv.device_blocks * (budget.bytes_per_block / config.tensor_parallel_size);
  memory = memory_of(use);
  config.num_blocks = kv.device_blocks - 1;
  ModelLimits model{spec.embed.vocab, config.max_model_len, spec.eos};
  return std::make_unique<EngineLoop>(config, std::move(model), kv, std::move(executor));
}

}  // namespace

struct Engine::Impl {
  EngineConfig config;
  ModelSpec spec;
  EngineMemory memory;
  std::unique_ptr<EngineLoop> loop;
};

std::unique_ptr<Engine> Engine::create(const EngineConfig& config, ModelSource source, LoadProgress progress) {
  auto impl = std::make_unique<Impl>();
  check_spec(source.spec);
  impl->spec = source.spec;
  impl->config = resolve(config, impl->spec.max_len);
  impl->config.device = choose_device(config.device, config.tensor_parallel_size);
  check_device_settings(impl->config);
  auto executor = in_phase(StartPhase::Weights, impl->config,
                           [&] { return make_local_executor(impl->config, std::move(source), std::move(progress)); });
  impl->loop = start(impl->config, impl->spec, std::move(executor), impl->memory);
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

std::unique_ptr<Engine> Engine::open(const EngineConfig& config, const std::string& bundle_dir, LoadProgress progress) {
  return create(config, read_bundle(bundle_dir), std::move(progress));
}

std::unique_ptr<Engine> Engine::create_null(const EngineConfig& config, const NullModel& model) {
  require_at_least("vocab", model.vocab, 1);
  auto impl = std::make_unique<Impl>();
  impl->spec.family = "null";
  impl->spec.embed.vocab = model.vocab;
  impl->spec.max_len = model.max_len;
  impl->spec.eos.assign(model.eos.begin(), model.eos.end());
  impl->config = resolve(config, impl->spec.max_len);
  impl->config.device = "cpu";
  NullModel resolved = model;
  resolved.max_len = impl->config.max_model_len;
  impl->loop = start(impl->config, impl->spec, make_null_executor(impl->config, resolved), impl->memory);
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

void Engine::submit(RequestInput input) { impl_->loop->submit(std::move(input)); }
void Engine::abort(std::uint64_t id) { impl_->loop->abort(id); }
void Engine::abort(std::uint64_t id, int index) { impl_->loop->abort(id, index); }
bool Engine::poll(std::vector<TokenDelta>& out, std::chrono::milliseconds timeout) {
  return impl_->loop->poll(out, timeout);
}
int Engine::event_fd() const { return impl_->loop->event_fd(); }
EngineStats Engine::stats() const { return impl_->loop->stats(); }
Heartbeat Engine::heartbeat() const { return impl_->loop->heartbeat(); }
const EngineMemory& Engine::memory() const { return impl_->memory; }
const EngineConfig& Engine::config() const { return impl_->config; }
const ModelSpec& Engine::spec() const { return impl_->spec; }
void Engine::reset_prefix_cache() { impl_->loop->reset_prefix_cache(); }
bool Engine::drain(std::chrono::milliseconds timeout) { return impl_->loop->drain(timeout); }
void Engine::shutdown() { impl_->loop->shutdown(); }

}  // namespace fastllm

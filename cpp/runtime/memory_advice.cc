#include "runtime/memory_advice.h"

#include <algorithm>
#include <cmath>

namespace fastllm {
namespace {

std::string flag(const char* name, int value) { return std::string(name) + " " + std::to_string(value); }

}  // namespace

std::string memory_advice(StartPhase phase, const EngineConfig& c) {
  switch (phase) {
    case StartPhase::Weights:
      return "the weights need more memory than this GPU has free: end what else runs on it, choose a smaller model, "
             "or "
             "split this one over more GPUs with " +
             flag("--tensor-parallel-size", 2 * c.tensor_parallel_size);
    case StartPhase::WorstStep: {
      const int tokens = std::max(c.max_step_tokens / 2, 1), seqs = std::max(c.max_num_seqs / 2, 1);
      return "the largest step takes less memory with " + flag("--max-num-batched-tokens", tokens) + " or " +
             flag("--max-num-seqs", seqs);
    }
    case StartPhase::KvCache: {
      const int percent = std::max(static_cast<int>(std::lround(c.gpu_memory_utilization * 100)) - 5, 1);
      return "leave more room beside the KV cache with --gpu-memory-utilization 0." +
             std::string(percent < 10 ? "0" : "") + std::to_string(percent) +
             (c.enforce_eager ? "" : ", or do without graphs by --enforce-eager");
    }
  }
  return {};
}

EngineMemory memory_of(const StartUse& use) {
  EngineMemory m;
  m.total = use.ready.total;
  m.weights = use.loaded.weights;
  m.inflated = use.loaded.inflated;
  if (m.total == 0) return m;
  const auto difference = [](std::int64_t a, std::int64_t b) { return std::max<std::int64_t>(a - b, 0); };
  m.device = use.ready.name;
  m.activations = difference(use.loaded.free, use.stepped.free);
  m.kv_cache = use.kv_bytes;
  m.graphs = difference(use.stepped.free - use.ready.free, use.kv_bytes);
  m.free = use.ready.free;
  m.other = difference(m.total - m.free, m.weights + m.activations + m.kv_cache + m.graphs);
  return m;
}

}  // namespace fastllm

// The engine: tokens in, tokens out. Owns every thread and every device allocation. All methods are thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastllm/export.h"
#include "fastllm/types.h"
#include "fastllm/weights.h"

namespace fastllm {

// A model without weights: the next token is a hash of everything the sequence can read through its block table, so
// any mistake in scheduling, copying, caching, swapping or preempting changes the answer. For tests and load
// generators.
struct NullModel {
  int vocab = 32000;
  int max_len = 4096;
  std::vector<TokenId> eos;
  std::int64_t step_us = 0;  // simulated time of a step
};

class FASTLLM_API Engine {
 public:
  // Loads the model and starts the engine thread. Throws fastllm::Error (std::runtime_error) with a sentence.
  static std::unique_ptr<Engine> create(const EngineConfig& config, ModelSource source, LoadProgress progress = {});
  // The same from a bundle written by `fastllm export`: spec.json and model.safetensors with canonical names.
  static std::unique_ptr<Engine> open(const EngineConfig& config, const std::string& bundle_dir,
                                      LoadProgress progress = {});
  static std::unique_ptr<Engine> create_null(const EngineConfig& config, const NullModel& model);

  ~Engine();  // shutdown()
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Never blocks on the device. Bad input comes back as a TokenDelta with finish = Error.
  void submit(RequestInput input);
  // Idempotent; unknown ids are ignored. Every live sequence of the request ends with finish = Abort.
  void abort(std::uint64_t id);
  // The same for one of the request's sequences; the others run on.
  void abort(std::uint64_t id, int index);
  // Everything since the last poll, one delta per sequence. Waits up to `timeout` for something; false if nothing came.
  bool poll(std::vector<TokenDelta>& out, std::chrono::milliseconds timeout);
  // Readable when poll() would return at once; written once per step. Owned by the engine.
  int event_fd() const;

  EngineStats stats() const;
  Heartbeat heartbeat() const;
  const EngineMemory& memory() const;
  // The configuration in force: zeros replaced by what was chosen.
  const EngineConfig& config() const;
  const ModelSpec& spec() const;
  // Forgets every unreferenced cached block, and the peak of used blocks.
  void reset_prefix_cache();

  // Refuses new requests; returns true when all accepted ones finished within `timeout`.
  bool drain(std::chrono::milliseconds timeout);
  // Aborts what is left and joins every thread. Idempotent.
  void shutdown();

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace fastllm

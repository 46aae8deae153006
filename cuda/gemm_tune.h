// Measures ways to compute products of one shape, with weights that are not in cache, as they are in an engine.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "gemm_lt.h"
#include "gemm_table.h"
#include "memory.h"

namespace fastllm::cuda {

// Only products of few rows are measured, where own kernels compete: beyond them cuBLASLt's first proposal for the very
// size was never beaten by more than noise, and measuring on cool, idle hardware chose worse ones.
inline constexpr std::array<std::int64_t, 7> kTunedRows = {1, 2, 4, 8, 16, 24, 32};

// The rows to measure for calls of m rows: the next of kTunedRows, 0 beyond them.
std::int64_t tuned_rows(std::int64_t m);

class GemmTuner {
 public:
  // most_rows: the greatest m that will be measured. Allocates scratch, a few hundred MB; throws ResourceError. Weights
  // beyond kInPlace are read where they are, and are never written.
  GemmTuner(const LtContext& context, const GemmShape& shape, const void* weight, std::int64_t most_rows, int num_sms,
            bool own_kernels);

  // All candidates in turn, several times over, so that clocks and power are the same for each. cuBLASLt's first
  // proposal stays unless another one is clearly faster. Some 20 ms.
  GemmTiming measure(std::int64_t m);

 private:
  static constexpr std::size_t kInPlace = std::size_t{300} << 20;  // bytes
  static constexpr std::size_t kRotated = std::size_t{320} << 20;  // bytes of weights, so that none is in L2 still

  struct Candidate;
  using Candidates = std::vector<std::unique_ptr<Candidate>>;

  GemmCall call(std::int64_t m, int turn) const;
  // Launches once, timed. False: the library refuses its own proposal.
  bool try_out(Candidate& candidate);
  void compare(Candidates& all);

  GemmShape shape_;
  LtProduct product_;
  int num_sms_;
  bool own_kernels_;
  int copies_ = 1;  // of the weight
  std::size_t weight_bytes_;
  const std::byte* weights_ = nullptr;
  std::unique_ptr<Buffer> copies_memory_, x_, out_;
  Stream stream_;
};

}  // namespace fastllm::cuda

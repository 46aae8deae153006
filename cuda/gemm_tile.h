// Products of more rows than skinny.h takes: tiles through the tensor cores of sm_90a, with the activation of a gated
// pair, a bias or the addition to what is there done on the way out.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "fastllm/model_spec.h"
#include "gemm.h"

namespace fastllm::cuda {

// Rows of w in a tile; any choice is correct for any shape, with the same results.
inline constexpr std::array<int, 4> kTileCols = {128, 192, 224, 256};

// The one that a model of the costs expects to be the fastest. clusters: pairs of blocks that run at once.
int plan_tiles(std::int64_t m, std::int64_t n, std::int64_t k, bool gated, int clusters);
// What the model expects of one of them, in microseconds.
float expected_tile_us(int tile_cols, std::int64_t m, std::int64_t n, std::int64_t k, bool gated, int clusters);

// BF16 operands with 16-byte aligned rows, whole groups of 8 columns of out.
bool tile_gemm_supports(const GemmCall& call, bool gated);

class TileGemm {
 public:
  // Null where this device, or this build, has no such kernels.
  static std::unique_ptr<TileGemm> make(int capability);

  int clusters() const { return clusters_; }
  // A row of out does not depend on the other rows, bit for bit.
  // With an activation: w = [gate; up], out[m, n/2] = act(x gate^T) * (x up^T).
  void run(const GemmCall& call, std::optional<Activation> gated, int tile_cols, cudaStream_t stream) const;

 private:
  TileGemm() = default;

  void* encode_ = nullptr;  // the driver's cuTensorMapEncodeTiled
  int clusters_ = 0;
};

}  // namespace fastllm::cuda

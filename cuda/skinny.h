// Products with few rows of x, where reading the weights is all the cost: decode steps.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "fastllm/model_spec.h"
#include "gemm.h"

namespace fastllm::cuda {

inline constexpr std::int64_t kSkinnyRows = 32;  // of x, at most
// Weights that a kernel calls into L2 while it waits for the kernel before it: with what its blocks hold themselves,
// about 33 MB on an H100. Bytes per multiprocessor.
inline constexpr int kSkinnyPrefetch = 160 << 10;
// And how far ahead of its queue it stays when it does so all along.
inline constexpr int kSkinnyWindow = 96 << 10;

// How a kernel cuts the weights; any choice is correct for any shape.
struct SkinnyConfig {
  int strips = 2;         // 1, 2 or 4: groups of 8 weight rows that a warp holds at once
  int k_warps = 8;        // 1, 2, 4 or 8: warps that share the k of a tile
  int blocks_per_sm = 1;  // 1 or 2
  bool rolling = false;   // weights are called into L2 all along, not only at the start
  bool operator==(const SkinnyConfig&) const = default;
};

bool is_valid(const SkinnyConfig& config);

// Whether the kernels take this call: BF16 weights, up to kSkinnyRows rows, 16-byte aligned rows.
bool skinny_supports(const GemmCall& call);

// All configurations.
std::vector<SkinnyConfig> skinny_configs();
// Those worth measuring for rows of k columns: two blocks share a multiprocessor, enough warps share a row.
std::vector<SkinnyConfig> skinny_candidates(std::int64_t k);

// Once per device, before the first launch. False: a block has too little shared memory on this device.
bool prepare_skinny(std::size_t shared_per_block);

// A row of out does not depend on the other rows, bit for bit, under one configuration; configurations differ.
// With an activation: w = [gate; up], out[m, n/2] = act(x gate^T) * (x up^T).
void skinny_gemm(const GemmCall& call, std::optional<Activation> gated, const SkinnyConfig& config, int num_sms,
                 cudaStream_t stream, int prefetch_bytes = kSkinnyPrefetch);

}  // namespace fastllm::cuda

// A step's inputs, from pinned host memory to device memory: one launch per step.
//   for each copy:      to[i] = from[i];  ids: to[t] = from[t] < 0 ? last_token[~from[t]] : from[t]
//   for each table set, in order: tables[slot][index] = block
// Cost: the bytes of the inputs over PCIe, 30 to 60 KB for 256 decode rows, about 2 us. Kernels read the pinned memory
// themselves, rather than from a copy made by a DMA engine: the reads need nothing from the step before, so they happen
// before pdl_wait(), under that step's last kernels, whereas a copy would stand between the two steps.
#include "launch.cuh"
#include "update_inputs.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;

// One block. A warp's sets are written together, the last of equal entries only; warps take turns.
__device__ void apply_table_sets(const InputUpdate& u) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (std::int32_t begin = 0; begin < u.num_table_sets; begin += kThreads) {
    const std::int32_t i = begin + static_cast<std::int32_t>(threadIdx.x);
    const bool valid = i < u.num_table_sets;
    long long entry = -1;
    int block = 0;
    if (valid) {
      const int* set = reinterpret_cast<const int*>(u.table_sets + i);
      entry = static_cast<long long>(__ldcv(set)) * u.table_width + __ldcv(set + 1);
      block = __ldcv(set + 2);
    }
    if (begin == 0) pdl_wait();
    const unsigned same = __match_any_sync(0xffffffffu, static_cast<unsigned long long>(entry));
    const bool last = valid && lane == 31 - __clz(static_cast<int>(same));
    for (int turn = 0; turn < kThreads / 32; ++turn) {
      if (turn == warp && last) u.tables[entry] = static_cast<BlockId>(block);
      __syncthreads();
    }
  }
}

__device__ int resolve(int id, const TokenId* last_token) { return id < 0 ? last_token[~id] : id; }

__global__ void __launch_bounds__(kThreads) update_inputs_kernel(const __grid_constant__ InputUpdate u) {
  static_assert(sizeof(TableSet) == 12);
  pdl_launch();
  if (blockIdx.x == 0) {
    apply_table_sets(u);
    if (u.num_table_sets == 0) pdl_wait();
    return;
  }
  std::int32_t unit = static_cast<std::int32_t>((blockIdx.x - 1) * kThreads + threadIdx.x);
  std::size_t c = 0;
  while (c < u.copies.size() && unit >= u.copies[c].units) unit -= u.copies[c++].units;
  int4 value{};
  if (c < u.copies.size()) value = __ldcv(reinterpret_cast<const int4*>(u.copies[c].from) + unit);
  pdl_wait();
  if (c == u.copies.size()) return;
  if (c == 0) {
    value.x = resolve(value.x, u.last_token);
    value.y = resolve(value.y, u.last_token);
    value.z = resolve(value.z, u.last_token);
    value.w = resolve(value.w, u.last_token);
  }
  reinterpret_cast<int4*>(u.copies[c].to)[unit] = value;
}

__global__ void __launch_bounds__(kThreads)
    commit_tokens_kernel(const TokenId* sampled, int rows, const std::int32_t* logit_tokens,
                         const std::int32_t* token_slot, TokenId* last_token, TokenId* host_sampled) {
  pdl_launch();
  pdl_wait();
  const int r = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (r >= rows) return;
  const TokenId token = sampled[r];
  const std::int32_t slot = token_slot[logit_tokens[r]];
  if (slot >= 0) last_token[slot] = token;
  host_sampled[r] = token;
}

}  // namespace

void update_inputs(const InputUpdate& update, cudaStream_t stream) {
  std::int32_t units = 0;
  for (const InputCopy& c : update.copies) units += c.units;
  launch(update_inputs_kernel, dim3(static_cast<unsigned>(1 + (units + kThreads - 1) / kThreads)), dim3(kThreads), 0,
         stream, update);
}

void commit_tokens(const TokenId* sampled, int rows, const std::int32_t* logit_tokens, const std::int32_t* token_slot,
                   TokenId* last_token, TokenId* host_sampled, cudaStream_t stream) {
  launch(commit_tokens_kernel, dim3(static_cast<unsigned>((rows + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream,
         sampled, rows, logit_tokens, token_slot, last_token, host_sampled);
}

}  // namespace fastllm::cuda

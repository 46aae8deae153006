// Thin wrappers of what only sm_90 and newer have (PTX ISA 9.0): copies of tiles by the tensor memory accelerator, and
// clusters of thread blocks that see each other's shared memory. Include from *_sm90.cu only.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx.cuh"

namespace fastllm::cuda {

// --- copies. A map describes a matrix in global memory and the box that one copy takes of it ---

// One arrival, and the phase does not end before `bytes` more have been copied.
__device__ __forceinline__ void mbarrier_arrive_expecting(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}
// The box whose first element is [row, column], zeros where it leaves the matrix; its bytes count at `barrier`.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, int column, int row,
                                         std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(smem_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(smem_address(barrier))
      : "memory");
}
// To the same place in every block of the cluster whose bit is set in `blocks`, counted at the barrier of each.
__device__ __forceinline__ void tma_load_to_all(void* shared, const CUtensorMap& map, int column, int row,
                                                std::uint64_t* barrier, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(smem_address(barrier)), "h"(static_cast<std::uint16_t>(blocks))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// --- clusters ---

// Until every thread of the cluster is here. Orders no memory.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.relaxed; barrier.cluster.wait;" ::: "memory");
}
// Where the block of this rank has what we have at `shared`.
__device__ __forceinline__ std::uint32_t address_in(const void* shared, unsigned rank) {
  std::uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(shared)), "r"(rank));
  return address;
}
// Orders memory within this block only: with release.cluster a fence of the whole device would come first, which takes
// a microsecond. Enough where what must be over is products and copies that were waited for.
__device__ __forceinline__ void mbarrier_arrive_in(std::uint64_t* barrier, unsigned rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(barrier, rank)) : "memory");
}
// --- global memory ---

// Adds in L2: nothing is read. 16-byte aligned.
__device__ __forceinline__ void add_in_memory(float* global, float4 v) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

}  // namespace fastllm::cuda

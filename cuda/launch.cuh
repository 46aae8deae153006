// The one way to launch a kernel: errors are checked, and programmatic dependent launch is on, so that a kernel's
// prologue overlaps the end of the kernel before it in the stream (CUDA programming guide, "Programmatic Dependent
// Launch and Synchronization"). The contract of every kernel launched here:
//   - every thread calls pdl_wait() before it reads or writes any global memory that another kernel touches. Before
//     it, only constants may be read: weights, rope tables, kernel parameters;
//   - pdl_launch() may be called from then on, or earlier, to let the next kernel's prologue begin; it orders nothing.
#pragma once

#include <cuda_runtime.h>

#include <iterator>
#include <utility>

#include "check.h"

namespace fastllm::cuda {

__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether kernels wait on every device that lets them overlap, 9.0 and newer: compiled for 8.x alone they do not.
inline constexpr int kArchs[] = {__CUDA_ARCH_LIST__};  // ascending
inline constexpr int kWaits = std::end(kArchs)[-1] >= 900;

// `cluster` blocks next to each other share a cluster; grid.x is a multiple of it.
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), unsigned cluster, dim3 grid, dim3 block, std::size_t shared_bytes,
                     cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = kWaits;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...), "a kernel launch");
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
  launch_clusters(kernel, 1, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

// More than 48 KB of dynamic shared memory must be asked for once per kernel (and device).
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...), std::size_t bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "setting a kernel's shared memory");
}

}  // namespace fastllm::cuda

// One of several equal parts of a row of logits, read by one block in vectors of four.
//
//   vector q of a row holds the ids 4 q - shift ... 4 q - shift + 3, where shift makes its address a multiple of 16
//   tile: four vectors of each thread, kThreads vectors apart, loaded before any is used
#pragma once

#include <cstdint>

#include "sampling/sampling.h"

namespace fastllm::cuda {

__device__ __forceinline__ const float* row_of(const Logits& logits, int row) { return logits.data + row * logits.ld; }

struct RowPart {
  const float* x;  // of id 0
  int vocab, shift;
  int begin, end;  // vectors
};

__device__ __forceinline__ RowPart part_of_row(const float* x, int vocab, int part, int parts) {
  const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(x) / sizeof(float) % 4);
  const int vectors = (shift + vocab + 3) / 4;
  const int each = (vectors + parts - 1) / parts;
  const int begin = min(part * each, vectors);
  return {x, vocab, shift, begin, min(begin + each, vectors)};
}

// -infinity where the vector reaches beyond the row.
__device__ __forceinline__ float4 load_vector(const RowPart& part, int first) {
  if (first >= 0 && first + 4 <= part.vocab) return *reinterpret_cast<const float4*>(part.x + first);
  const auto at = [&](int id) { return id >= 0 && id < part.vocab ? part.x[id] : -INFINITY; };
  return {at(first), at(first + 1), at(first + 2), at(first + 3)};
}

// use(v, first): a tile, v[u][c] being the logit of id first[u] + c, -infinity where there is none. All threads of the
// block make the same calls; ids ascend over the calls of one thread.
template <int kThreads, class Use>
__device__ __forceinline__ void for_each_tile(const RowPart& part, Use use) {
  for (int tile = part.begin; tile < part.end; tile += 4 * kThreads) {
    float4 v[4];
    int first[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int q = tile + u * kThreads + static_cast<int>(threadIdx.x);
      first[u] = q < part.end ? 4 * q - part.shift : part.vocab;
      v[u] = load_vector(part, first[u]);
    }
    use(v, first);
  }
}

// use(x, id): every logit of a tile.
template <class Use>
__device__ __forceinline__ void for_each_in_tile(const float4 (&v)[4], const int (&first)[4], Use use) {
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    use(v[u].x, first[u]);
    use(v[u].y, first[u] + 1);
    use(v[u].z, first[u] + 2);
    use(v[u].w, first[u] + 3);
  }
}

// use(x, id): every logit of the part, and -infinity with ids beyond it.
template <int kThreads, class Use>
__device__ __forceinline__ void for_each_logit(const RowPart& part, Use use) {
  for_each_tile<kThreads>(part, [&](const float4(&v)[4], const int (&first)[4]) { for_each_in_tile(v, first, use); });
}

}  // namespace fastllm::cuda

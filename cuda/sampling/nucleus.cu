// The third pass, over rows of top_p whose list does not hold the nucleus: so flat that it has thousands of tokens. The
// histogram tells the bin in which the nucleus ends. What is greater takes part in the draw, which is made here; the
// bin's own tokens, some hundreds, are listed for choose to sort and cut.
//
//   edge[r] = the first bin b with bins[r, 0] + ... + bins[r, b] >= top_p mass[r]
//   draw[r] = the best of {i : bin(i) < edge[r]}          list[r] = {i : bin(i) = edge[r]}
//
// Cost: 4 vocab bytes per such row, and the draw. Benchmark: fastllm_bench_cuda --benchmark_filter=Sample
#include "launch.cuh"
#include "sampling/draw.cuh"
#include "sampling/found_list.cuh"
#include "sampling/row_filter.cuh"
#include "sampling/stages.h"

namespace fastllm::cuda {
namespace {

constexpr int kWarps = kScanThreads / 32;

struct Edge {
  int bin;
  std::uint64_t above;
};

// Every block of a row finds the same one.
__device__ __forceinline__ void find_edge(const std::uint64_t* bins, double target, Edge& edge,
                                          std::uint64_t (&of_warps)[kWarps]) {
  constexpr int kEach = kBins / kScanThreads;
  const int begin = static_cast<int>(threadIdx.x) * kEach;
  if (threadIdx.x == 0) edge.bin = -1;
  std::uint64_t mass[kEach], sum = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kEach; i += 2) {
    const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(bins + begin + i);
    mass[i] = two.x;
    mass[i + 1] = two.y;
    sum += two.x + two.y;
  }
  std::uint64_t before = block_sum_before<kScanThreads>(sum, of_warps, &total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool short_of = static_cast<double>(before) < target;
    if (short_of && static_cast<double>(before + mass[i]) >= target) edge = {begin + i, before};
    before += mass[i];
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kScanThreads, 4) nucleus_of_rows(SampleStages s) {
  __shared__ Ranked of_warps[kWarps];
  __shared__ FoundList found;
  __shared__ DrawScratch<kScanThreads> scratch;
  __shared__ Edge edge;
  pdl_wait();
  pdl_launch();
  const int r = static_cast<int>(blockIdx.y), p = static_cast<int>(blockIdx.x), vocab = s.logits.vocab;
  const int thread = static_cast<int>(threadIdx.x);
  const DeviceSampleRow row = s.rows[r];
  if (kind_of(row, vocab) != RowKind::Listed) return;
  if (p == 0 && thread == 0) s.edge[r] = -1;
  if (by_top_k(row, vocab)) return;
  const std::int64_t row_parts = static_cast<std::int64_t>(r) * s.parts;
  const Ranked top = block_max<kScanThreads>(thread < s.parts ? s.best[row_parts + thread] : 0, of_warps);
  const float max = value_of_key(key_of(top));
  if (top == 0 || !isfinite(max)) return;
  const float per_unit = s.bins_per_unit[r];
  if (per_unit == 0.0f) return;
  if (thread == 0) found.clear();
  __syncthreads();
  find_edge(s.bins + static_cast<std::int64_t>(r) * kBins, top_p_target(row, s.mass[r]), edge, of_warps);
  if (edge.bin < 0) return;
  const Bins bins{max, per_unit};
  const auto begin = static_cast<float>(edge.bin), end = edge.bin == kBins - 1 ? INFINITY : begin + 1.0f;
  if (s.listed[r] <= kListCapacity && bins.depth(value_of_key(s.list_key[r])) >= end) return;
  if (p == 0 && thread == 0) s.edge[r] = edge.bin, s.above[r] = edge.above;

  const float lowest_kept = value_of_key(min_p_key(row, max));
  const float floor = max - begin / per_unit * 1.0001f - fabsf(max) * 1e-5f;  // below what is greater than the edge
  const auto greater = [&](float x, int) { return bins.depth(x) < begin; };
  Draw<kScanThreads, decltype(greater)> draw(row, floor, some_score(row, max), greater, scratch);
  for_each_tile<kScanThreads>(part_of_row(row_of(s.logits, r), vocab, p, s.parts),
                              [&](const float4(&v)[4], const int (&first)[4]) {
#pragma unroll
                                for (int u = 0; u < 4; ++u) {
                                  const float x[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
                                  for (int c = 0; c < 4; ++c) {
                                    const float depth = bins.depth(x[c]);
                                    if (depth >= begin && depth < end && x[c] >= lowest_kept)
                                      found.add(x[c], first[u] + c);
                                  }
                                }
                                draw.tile(v, first);
                              });
  __syncthreads();
  const Ranked best = block_max<kScanThreads>(draw.winner(), of_warps);
  if (thread == 0) {
    s.draw[row_parts + p] = best;
    found.reserve(s.edge_listed + r);
  }
  __syncthreads();
  found.write(s.list + static_cast<std::int64_t>(r) * kListCapacity);
}

}  // namespace

void nucleus(const SampleStages& stages, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(stages.parts), static_cast<unsigned>(stages.logits.rows));
  launch(nucleus_of_rows, grid, kScanThreads, 0, stream, stages);
}

}  // namespace fastllm::cuda

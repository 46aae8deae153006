// The first pass over the logits: per row and part, the greatest logit, or for rows without filters the winner of the
// draw, which needs no softmax. For rows to be listed also the maxima of groups of tokens: at least k tokens reach the
// k-th greatest of them, and not many more.
//
//   for r, i in rows, vocab: best[r] = max(best[r], {greedy[r] ? x[r, i] : x[r, i] / temperature[r] + noise(i), i})
//   best[r] = kNotNumbers where some x[r, i] is NaN
//
// Cost: 4 rows vocab bytes; four operations per token for maxima, some 70 per token that may win a draw.
// Benchmark: fastllm_bench_cuda --benchmark_filter=Sample
#include "launch.cuh"
#include "sampling/draw.cuh"
#include "sampling/row_filter.cuh"
#include "sampling/stages.h"

namespace fastllm::cuda {
namespace {

__device__ __forceinline__ float max_of(const float4& v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }

// Whether anything seen was NaN: the maximum that keeps it, one operation a token.
struct NanProbe {
  float most = -INFINITY;

  __device__ __forceinline__ void operator()(const float4 (&v)[4]) {
#pragma unroll
    for (int u = 0; u < 4; ++u)
      most = max_or_nan(max_or_nan(most, max_or_nan(v[u].x, v[u].y)), max_or_nan(v[u].z, v[u].w));
  }
  __device__ __forceinline__ Ranked operator()(Ranked best) const { return isnan(most) ? kNotNumbers : best; }
};

// kGroups / parts groups per part. With one part, group u * 256 + t is what thread t reads as its u-th vectors; four
// such are merged with 4 parts, and those of 4 or 16 neighbouring lanes with 16 or 64.
__device__ __forceinline__ void store_groups(const float (&most)[4], std::uint32_t* group, int part, int parts) {
  const int thread = static_cast<int>(threadIdx.x);
  if (parts == 1) {
#pragma unroll
    for (int u = 0; u < 4; ++u) group[u * kScanThreads + thread] = order_key(most[u]);
    return;
  }
  float x = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
  const int lanes = parts / 4;
  for (int mask = lanes / 2; mask > 0; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  if (thread % lanes == 0) group[part * (kGroups / parts) + thread / lanes] = order_key(x);
}

template <bool kAllGreedy>
__global__ void __launch_bounds__(kScanThreads, 4) scan_rows(SampleStages s) {
  __shared__ Ranked of_warps[kScanThreads / 32];
  __shared__ DrawScratch<kScanThreads> scratch;
  pdl_wait();
  pdl_launch();
  const int r = static_cast<int>(blockIdx.y), p = static_cast<int>(blockIdx.x);
  const RowPart part = part_of_row(row_of(s.logits, r), s.logits.vocab, p, s.parts);
  Ranked best = 0;
  NanProbe probe;
  const auto see = [&](const float4(&v)[4]) { probe(v); };
  if constexpr (kAllGreedy) {
    best = argmax_of_part<kScanThreads>(part, see);
  } else {
    const DeviceSampleRow row = s.rows[r];
    const RowKind kind = kind_of(row, s.logits.vocab);
    if (kind == RowKind::Unfiltered) {
      const auto all = [](float, int) { return true; };
      best = draw_from_part<kScanThreads>(part, row, -INFINITY, -INFINITY, all, scratch, see);
    } else if (kind == RowKind::Listed) {
      float most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      float top = -INFINITY;
      int top_id = -1;
      for_each_tile<kScanThreads>(part, [&](const float4(&v)[4], const int (&first)[4]) {
        probe(v);
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const float here = max_of(v[u]);
          most[u] = fmaxf(most[u], here);
          if (!(here > top)) continue;
          top = here;
          top_id = first[u] + (v[u].x == here ? 0 : v[u].y == here ? 1 : v[u].z == here ? 2 : 3);
        }
      });
      if (top_id >= 0) best = ranked(top, top_id);
      store_groups(most, s.group + static_cast<std::int64_t>(r) * kGroups, p, s.parts);
      if (p == 0 && threadIdx.x == 0) s.mass[r] = 0, s.listed[r] = 0, s.edge_listed[r] = 0;
      if (!by_top_k(row, s.logits.vocab)) {
        std::uint64_t* bins = s.bins + static_cast<std::int64_t>(r) * kBins;
        for (int i = p * kScanThreads + static_cast<int>(threadIdx.x); i < kBins; i += s.parts * kScanThreads)
          bins[i] = 0;
      }
    } else {
      best = argmax_of_part<kScanThreads>(part, see);
    }
  }
  best = block_max<kScanThreads>(probe(best), of_warps);
  if (threadIdx.x == 0) s.best[static_cast<std::int64_t>(r) * s.parts + p] = best;
}

}  // namespace

void scan(const SampleStages& stages, bool all_greedy, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(stages.parts), static_cast<unsigned>(stages.logits.rows));
  launch(all_greedy ? scan_rows<true> : scan_rows<false>, grid, kScanThreads, 0, stream, stages);
}

}  // namespace fastllm::cuda

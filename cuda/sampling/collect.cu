// The second pass, over filtered rows only, with the row's maximum known. A row with min_p alone is drawn from at once.
// For top_k and top_p, every token from a bound on goes to the row's list; the bound is the k-th greatest of the
// groups' maxima, which at least k tokens reach, so the list of a row with top_k holds its tokens unless too many are
// equal. For top_p the mass of all tokens is summed, and the list serves if it holds p of it; where that is not certain
// beforehand, a histogram of the mass by depth below the maximum is made, from which nucleus goes on.
//
//   list[r] = {i : x[r, i] >= bound[r]}          mass[r] = sum_i exp((x[r, i] - max[r]) / temperature[r])
//
// Cost: 4 vocab bytes per filtered row; 20 operations per token for masses, two shared atomics where there are bins.
// Benchmark: fastllm_bench_cuda --benchmark_filter=Sample
#include "launch.cuh"
#include "sampling/draw.cuh"
#include "sampling/found_list.cuh"
#include "sampling/row_filter.cuh"
#include "sampling/shared_sum.cuh"
#include "sampling/stages.h"

namespace fastllm::cuda {
namespace {

constexpr int kWarps = kScanThreads / 32;

// The k-th greatest of the block's keys, four to a thread, by bisection.
__device__ __forceinline__ std::uint32_t kth_key(const uint4& keys, int k, int (&counts)[2][kWarps]) {
  std::uint32_t key = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const std::uint32_t probe = key | 1u << bit;
    const int here = static_cast<int>(keys.x >= probe) + static_cast<int>(keys.y >= probe) +
                     static_cast<int>(keys.z >= probe) + static_cast<int>(keys.w >= probe);
    const int of_warp = __reduce_add_sync(0xffffffffu, here);
    int (&count)[kWarps] = counts[bit % 2];  // in turn, so that one barrier a round is enough
    if (threadIdx.x % 32 == 0) count[threadIdx.x / 32] = of_warp;
    __syncthreads();
    int reached = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) reached += count[warp];
    if (reached >= k) key = probe;
  }
  return key;
}

// Bins of the histogram to a unit of logit; 0 when the list is certain to hold p of the mass: what is not listed is
// below the bound, and there are not more than vocab such tokens. The bins reach four times as far as the least of the
// groups' maxima, but not further than mass does; nothing but speed depends on how far.
__device__ __forceinline__ float bins_to_a_unit(const uint4& groups, float bound, float max, const DeviceSampleRow& row,
                                                int vocab, std::uint64_t (&of_warps)[kWarps]) {
  const Mass mass{max, 1.0f / row.temperature};
  std::uint64_t sum = 0, listed = 0;
  std::uint32_t least = 0xffffffffu;
  for (const std::uint32_t key : {groups.x, groups.y, groups.z, groups.w}) {
    const float x = value_of_key(key);
    if (x >= bound) sum += mass(x);
    least = ::min(least, key);
  }
  block_sum_before<kScanThreads>(sum, of_warps, &listed);
  __syncthreads();
  least = static_cast<std::uint32_t>(~block_max<kScanThreads>(static_cast<std::uint32_t>(~least), of_warps));
  __syncthreads();
  const double others = static_cast<double>(mass(bound)) * vocab;
  if (row.top_p * others < 0.999 * (1.0 - row.top_p) * static_cast<double>(listed)) return 0.0f;
  const float reach = fminf(4.0f * (max - value_of_key(least)) / row.temperature, 31.2f);  // NaN: 31.2
  const float per_unit = kBins / (fmaxf(reach, 1e-3f) * row.temperature);
  return isfinite(per_unit) ? per_unit : 0.0f;
}

__global__ void __launch_bounds__(kScanThreads, 4) collect_rows(SampleStages s) {
  __shared__ Ranked of_warps[kWarps];
  __shared__ FoundList found;
  __shared__ int counts[2][kWarps];
  __shared__ union {
    DrawScratch<kScanThreads> draw;
    SharedSums<kBins> bins;
  } scratch;
  pdl_wait();
  pdl_launch();
  const int r = static_cast<int>(blockIdx.y), p = static_cast<int>(blockIdx.x), vocab = s.logits.vocab;
  const int thread = static_cast<int>(threadIdx.x);
  const DeviceSampleRow row = s.rows[r];
  const RowKind kind = kind_of(row, vocab);
  if (kind != RowKind::MinP && kind != RowKind::Listed) return;
  const std::int64_t row_parts = static_cast<std::int64_t>(r) * s.parts;
  if (thread == 0) found.clear();
  const Ranked top = block_max<kScanThreads>(thread < s.parts ? s.best[row_parts + thread] : 0, of_warps);
  const float max = value_of_key(key_of(top));
  const bool drawable = top != 0 && isfinite(max);
  const RowPart part = part_of_row(row_of(s.logits, r), vocab, p, s.parts);

  if (kind == RowKind::MinP) {
    Ranked best = 0;
    if (drawable) {
      const Cut cut{min_p_floor(row, max), 0x7fffffff};
      best = draw_from_part<kScanThreads>(part, row, cut.floor, some_score(row, max), cut, scratch.draw);
    }
    __syncthreads();
    best = block_max<kScanThreads>(best, of_warps);
    if (thread == 0) s.draw[row_parts + p] = best;
    return;
  }
  if (!drawable) return;

  const bool by_k = by_top_k(row, vocab);
  const std::uint32_t lowest_kept = min_p_key(row, max);
  const uint4 groups = reinterpret_cast<const uint4*>(s.group + static_cast<std::int64_t>(r) * kGroups)[thread];
  const std::uint32_t bound =
      ::max(kth_key(groups, by_k ? min(row.top_k, kMaxListedK) : kListedForTopP, counts), lowest_kept);
  const float from = value_of_key(bound), sum_from = value_of_key(lowest_kept);
  const Mass mass{max, 1.0f / row.temperature};
  std::uint64_t sum = 0;
  const auto list = [&](float x, int id) {
    if (x >= from) found.add(x, id);
  };
  float per_unit = 0.0f;
  if (by_k) {
    for_each_logit<kScanThreads>(part, list);
  } else if (per_unit = bins_to_a_unit(groups, from, max, row, vocab, of_warps); per_unit == 0.0f) {
    for_each_logit<kScanThreads>(part, [&](float x, int id) {
      if (x >= sum_from) sum += mass(x);
      list(x, id);
    });
  } else {
    for (int i = thread; i < kBins; i += kScanThreads) scratch.bins.clear(i);
    __syncthreads();
    const Bins bins{max, per_unit};
    for_each_logit<kScanThreads>(part, [&](float x, int id) {
      if (x >= sum_from) {
        const std::uint64_t here = mass(x);
        sum += here;
        if (here != 0) scratch.bins.add(bins.bin(x), here);
      }
      list(x, id);
    });
  }
  __syncthreads();
  std::uint64_t total = 0;
  block_sum_before<kScanThreads>(sum, of_warps, &total);
  if (thread == 0) {
    if (total > 0) atomicAdd(reinterpret_cast<unsigned long long*>(s.mass + r), total);
    found.reserve(s.listed + r);
    if (p == 0) s.list_key[r] = bound, s.bins_per_unit[r] = per_unit;
  }
  __syncthreads();
  if (per_unit != 0.0f) {
    for (int i = thread; i < kBins; i += kScanThreads) {
      auto* bin = reinterpret_cast<unsigned long long*>(s.bins + static_cast<std::int64_t>(r) * kBins + i);
      if (const std::uint64_t here = scratch.bins[i]; here != 0) atomicAdd(bin, here);
    }
  }
  found.write(s.list + static_cast<std::int64_t>(r) * kListCapacity);
}

}  // namespace

void collect(const SampleStages& stages, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(stages.parts), static_cast<unsigned>(stages.logits.rows));
  launch(collect_rows, grid, kScanThreads, 0, stream, stages);
}

}  // namespace fastllm::cuda

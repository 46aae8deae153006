// The cut of top_k and top_p for any row, by one block and without a list: radix selection, 11 bits of the key at a
// time, on histograms of counts or masses in shared memory. Three passes over the row for each of the two, one more
// where only some of equal logits are kept. For lists that overflow: thousands of equal logits, or a top_k of many
// hundreds.
#pragma once

#include <cstdint>

#include "sampling/draw.cuh"
#include "sampling/row_filter.cuh"
#include "sampling/shared_sum.cuh"

namespace fastllm::cuda {

struct RadixScratch {
  SharedSums<kBins> sums;
  std::uint64_t above, weight;
  int bin;
};

// What selection stopped at: its key, what all greater keys weigh, and what it weighs itself.
struct Selected {
  bool found;
  std::uint32_t key;
  std::uint64_t above, weight;
};

// The greatest key whose weight, with that of all greater ones, reaches `target`. Tokens weigh their mass, or 1; those
// with keys below `lowest` are left out.
template <int kThreads>
__device__ Selected radix_select(const RowPart& row, std::uint32_t lowest, double target, bool by_mass,
                                 const Mass& mass, RadixScratch& scratch, std::uint64_t (&of_warps)[kThreads / 32]) {
  constexpr int kEach = kBins / kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  Selected at{false, 0, 0, 0};
  std::uint32_t decided = 0;  // mask of the bits of at.key that are known
#pragma unroll 1
  for (int round = 0; round < 3; ++round) {
    const int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
    const std::uint32_t digits = round == 2 ? 1023u : 2047u;
    __syncthreads();
    for (int i = thread; i < kBins; i += kThreads) scratch.sums.clear(i);
    if (thread == 0) scratch.bin = -1;
    __syncthreads();
    for_each_logit<kThreads>(row, [&](float x, int) {
      const std::uint32_t key = order_key(x);
      if (key < lowest || ((key ^ at.key) & decided) != 0) return;
      scratch.sums.add(static_cast<int>(key >> shift & digits), by_mass ? mass(x) : 1);
    });
    __syncthreads();
    // Thread t has bins kBins - 1 - kEach t and below: greater keys come first.
    std::uint64_t weights[kEach], sum = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int bin = kBins - 1 - kEach * thread - i;
      weights[i] = scratch.sums[bin];
      sum += weights[i];
    }
    std::uint64_t above = at.above + block_sum_before<kThreads>(sum, of_warps, &total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool short_of = static_cast<double>(above) < target;
      if (short_of && static_cast<double>(above + weights[i]) >= target) {
        scratch.bin = kBins - 1 - kEach * thread - i;
        scratch.above = above;
        scratch.weight = weights[i];
      }
      above += weights[i];
    }
    __syncthreads();
    if (scratch.bin < 0) return at;
    at.key |= static_cast<std::uint32_t>(scratch.bin) << shift;
    at.above = scratch.above;
    at.weight = scratch.weight;
    decided |= digits << shift;
  }
  at.found = true;
  return at;
}

// The id of the n-th token, in order of ids, whose key is `key`.
template <int kThreads>
__device__ int nth_equal(const RowPart& row, std::uint32_t key, std::uint64_t n, RadixScratch& scratch,
                         std::uint64_t (&of_warps)[kThreads / 32]) {
  const int each = (row.vocab + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * each, row.vocab), end = min(begin + each, row.vocab);
  std::uint64_t here = 0, total = 0;
  for (int id = begin; id < end; ++id) here += order_key(row.x[id]) == key;
  __syncthreads();
  if (threadIdx.x == 0) scratch.bin = 0x7fffffff;
  std::uint64_t before = block_sum_before<kThreads>(here, of_warps, &total);
  if (before < n && before + here >= n) {
    int id = begin;
    for (;; ++id) {
      before += order_key(row.x[id]) == key;
      if (before == n || id + 1 == end) break;
    }
    scratch.bin = id;
  }
  __syncthreads();
  return scratch.bin;
}

// mass_kept: of the tokens min_p keeps; read only when top_k is off.
template <int kThreads>
__device__ Cut exact_cut(const RowPart& part, const DeviceSampleRow& row, float max, std::uint64_t mass_kept,
                         RadixScratch& scratch, std::uint64_t (&of_warps)[kThreads / 32]) {
  const Mass mass{max, 1.0f / row.temperature};
  std::uint32_t lowest = min_p_key(row, max);
  if (by_top_k(row, part.vocab)) {
    const Selected kth = radix_select<kThreads>(part, lowest, row.top_k, false, mass, scratch, of_warps);
    if (kth.found) lowest = kth.key;
    if (row.top_p < 1.0f) {
      std::uint64_t sum = 0;
      for_each_logit<kThreads>(part, [&](float x, int) {
        if (order_key(x) >= lowest) sum += mass(x);
      });
      __syncthreads();
      block_sum_before<kThreads>(sum, of_warps, &mass_kept);
    }
  }
  if (!(row.top_p < 1.0f)) return {value_of_key(lowest), 0x7fffffff};

  const double target = top_p_target(row, mass_kept);
  const Selected last = radix_select<kThreads>(part, lowest, target, true, mass, scratch, of_warps);
  if (!last.found) return {value_of_key(lowest), 0x7fffffff};
  const float floor = value_of_key(last.key);
  const std::uint64_t each = ::max(mass(floor), std::uint64_t{1});
  const auto reaches = [&](std::uint64_t n) { return static_cast<double>(last.above + n * each) >= target; };
  auto n = static_cast<std::uint64_t>(
      fmax(ceil((target - static_cast<double>(last.above)) / static_cast<double>(each)), 1.0));
  if (n > 1 && reaches(n - 1)) --n;
  if (!reaches(n)) ++n;
  if (n * each >= last.weight) return {floor, 0x7fffffff};
  return {floor, nth_equal<kThreads>(part, last.key, n, scratch, of_warps)};
}

}  // namespace fastllm::cuda

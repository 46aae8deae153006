// The kernels that sample() is made of, and what they pass on.
//
//   scan     all rows      greedy: argmax; unfiltered: the draw; filtered: the maximum, and lower bounds for collect
//   collect  filtered      min_p alone: the draw; top_k, top_p: a list of all tokens from a bound on, the total mass;
//                          for a top_p that may reach further than the list, a histogram of the mass
//   nucleus  such top_p    where the list did not do: the draw from tokens surely kept, a list of those about the edge
//   choose   all rows      combines the parts; sorts the list, cuts it and draws; commits the token
//
// A row is split into `parts` blocks. No result depends on how many: maxima are exact, and masses are integers.
#pragma once

#include <cstdint>

#include "sampling/sampling.h"

namespace fastllm::cuda {

inline constexpr int kScanThreads = 256;
inline constexpr int kMaxParts = 64;
inline constexpr int kGroups = 1024;        // disjoint sets of a row's tokens, of each of which scan keeps the maximum
inline constexpr int kListCapacity = 2048;  // tokens
inline constexpr int kMaxListedK = 768;     // rank among the groups' maxima of the list's bound, for top_k
inline constexpr int kListedForTopP = 512;  // the same for top_p without top_k
inline constexpr int kBins = 2048;          // of a row's histogram, and of a digit in radix selection

// 1, 4, 16 or 64: four blocks on each of 132 multiprocessors and more.
inline int parts_of_rows(int rows) {
  int parts = 1;
  while (parts < kMaxParts && static_cast<std::int64_t>(rows) * parts < 528) parts *= 4;
  return parts;
}

struct SampleStages {
  Logits logits;
  const DeviceSampleRow* rows;
  int parts;
  std::uint64_t* best;      // [rows, parts] Ranked: greatest logit, or the winner of an unfiltered draw, or kNotNumbers
  std::uint64_t* draw;      // [rows, parts] Ranked: the winner of a draw with min_p, or of a nucleus without its edge
  std::uint64_t* list;      // [rows, kListCapacity] Ranked, unordered: from collect, or the edge from nucleus
  std::uint64_t* mass;      // [rows] of all tokens that min_p keeps; units of 1 / kMassUnit of the maximum's
  std::uint64_t* bins;      // [rows, kBins] the same by depth below the maximum
  std::uint64_t* above;     // [rows] mass of what is greater than the edge
  std::uint32_t* group;     // [rows, kGroups] keys
  std::uint32_t* list_key;  // [rows] the list holds every token with this key or a greater one
  std::uint32_t* listed;    // [rows] tokens; when above kListCapacity the list is of no use
  std::uint32_t* edge_listed;  // [rows] the same of the edge
  std::int32_t* edge;          // [rows] bin in which the nucleus ends; -1: collect's list serves, or there are no bins
  float* bins_per_unit;        // [rows] bins of the histogram to a unit of logit; 0: not made
};

void scan(const SampleStages& stages, bool all_greedy, cudaStream_t stream);
void collect(const SampleStages& stages, cudaStream_t stream);
void nucleus(const SampleStages& stages, cudaStream_t stream);
void choose(const SampleStages& stages, const SampleCall& call, cudaStream_t stream);

}  // namespace fastllm::cuda

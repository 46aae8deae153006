// Which threads an engine starts on CPUs, and where they run.
#pragma once

#include <string>
#include <vector>

#include "base/cpu_topology.h"

namespace fastllm {

struct ThreadPlacement {
  int threads = 1;
  std::vector<int> cpus;  // of each thread, the only one it runs on; empty: wherever the system likes
};

// The threads of each rank. bind:
//   "auto"          a thread for each physical core, as far as the quota reaches; bound to them when there are several
//                   memory nodes, all of whose cores are taken, and no quota: on one node binding brings nothing
//                   near, and the system may move a thread away from another program
//   "cores"         the same threads, always bound
//   "none"          the same threads, never bound; also "nobind" and "all"
//   "0-7,16"        a thread bound to each of these, cut into a share for every rank
//   "0-7|8-15"      the same with a list for every rank, all of one length
// threads: over all ranks; 0: as `bind` says. Above the number of cores, the second threads of cores are taken too; a
// list is taken from its front. Each rank has at least one. Throws InvalidArgument.
std::vector<ThreadPlacement> place_threads(const std::string& bind, int threads, int ranks,
                                           const CpuTopology& topology);

// The threads that "auto" gives one rank here.
int usable_cores();

}  // namespace fastllm

// The CPUs this process may use and how they hang together, from the affinity of the calling thread, /sys and the
// cgroup's quota. A container's cpuset is part of the affinity: the kernel keeps the two in step.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fastllm {

struct Cpu {
  int id = 0;    // the kernel's number
  int core = 0;  // the lowest CPU of the same physical core
  int node = 0;  // of memory

  bool operator==(const Cpu&) const = default;
};

struct CpuTopology {
  std::vector<Cpu> cpus;  // by id; never empty
  double quota = 0;       // CPUs' worth of time; 0: no limit
};

// "0-3,8" as 0 1 2 3 8, in the order given. Throws InvalidArgument for anything else, for a CPU given twice, and for
// numbers above 2^20.
std::vector<int> parse_cpu_list(std::string_view text);
// The opposite; the CPUs in ascending order.
std::string cpu_list_text(const std::vector<int>& cpus);

// CPUs the calling thread may run on, by id. Where the system cannot tell, 0 to their number.
std::vector<int> allowed_cpus();

// root: a folder that holds sys/ and proc/, ending in a slash. A file that is missing or makes no sense means: every
// CPU is a core of its own, one node, no quota.
CpuTopology read_cpu_topology(const std::vector<int>& allowed, const std::string& root = "/");

}  // namespace fastllm

#include "base/cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr int kMostCpu = 1 << 20;

// The whole of `text` as a number; -1 when it is none or out of range.
int number_of(std::string_view text) {
  int value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size() && value <= kMostCpu ? value : -1;
}

std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// A list of the kernel's; empty when it is missing or none.
std::vector<int> read_list(const std::string& path) {
  try {
    return parse_cpu_list(first_line(path));
  } catch (const InvalidArgument&) {
    return {};
  }
}

std::map<int, int> nodes_of_cpus(const std::string& root) {
  std::map<int, int> nodes;
  const std::string folder = root + "sys/devices/system/node/";
  for (const int node : read_list(folder + "online"))
    for (const int cpu : read_list(folder + "node" + std::to_string(node) + "/cpulist")) nodes[cpu] = node;
  return nodes;
}

// CPUs' worth of time that the files of one cgroup grant; 0: no limit.
double group_quota(const std::string& folder) {
  double quota = 0, period = 0;
  if (std::istringstream v2(first_line(folder + "/cpu.max")); v2 >> quota >> period) {
    // "max 100000" is no number
  } else {
    quota = std::atof(first_line(folder + "/cpu.cfs_quota_us").c_str());
    period = std::atof(first_line(folder + "/cpu.cfs_period_us").c_str());
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The tightest of a cgroup and those above it. Inside a container the path is often the host's and does not exist; the
// container's own files are at the mount's top.
double tightest_quota(const std::string& mount, std::filesystem::path group) {
  double tightest = 0;
  for (;;) {
    const double quota = group_quota(mount + group.string());
    if (quota > 0) tightest = tightest > 0 ? std::min(tightest, quota) : quota;
    if (group.empty() || group == group.root_path()) return tightest;
    group = group.parent_path();
  }
}

// Lines of /proc/self/cgroup are "0::/path" for version 2 and "4:cpu,cpuacct:/path" for version 1.
double read_quota(const std::string& root) {
  const std::string mounts = root + "sys/fs/cgroup";
  std::ifstream in(root + "proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    double quota = 0;
    if (controllers == ",,") {
      quota = tightest_quota(mounts, group);
    } else if (controllers.find(",cpu,") != std::string::npos) {
      quota = tightest_quota(mounts + "/cpu", group);
    }
    if (quota > 0) return quota;
  }
  return 0;
}

}  // namespace

std::vector<int> parse_cpu_list(std::string_view text) {
  const auto fail = [text](const std::string& why) {
    throw InvalidArgument("'" + std::string(text) + "' is not a list of CPUs such as 0-7,16: " + why);
  };
  std::vector<int> cpus;
  for (std::string_view rest = text;;) {
    const auto comma = rest.find(',');
    const std::string_view range = rest.substr(0, comma);
    const auto dash = range.find('-');
    const int first = number_of(range.substr(0, dash));
    const int last = dash == std::string_view::npos ? first : number_of(range.substr(dash + 1));
    if (first < 0 || last < first) fail("'" + std::string(range) + "' is neither a number nor a range");
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    if (comma == std::string_view::npos) break;
    rest.remove_prefix(comma + 1);
  }
  std::vector<int> sorted = cpus;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) fail("CPU " + std::to_string(*twice) + " is given twice");
  return cpus;
}

std::string cpu_list_text(const std::vector<int>& cpus) {
  std::vector<int> sorted = cpus;
  std::sort(sorted.begin(), sorted.end());
  std::string text;
  for (std::size_t i = 0; i < sorted.size();) {
    std::size_t last = i;
    while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(sorted[i]);
    if (last > i) text += "-" + std::to_string(sorted[last]);
    i = last + 1;
  }
  return text;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  // A set of the usual size is refused on machines with more CPUs.
  for (int most = CPU_SETSIZE; most <= kMostCpu; most *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(most));
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(most));
    const bool known = set != nullptr && sched_getaffinity(0, bytes, set) == 0;
    for (int i = 0; known && i < most; ++i)
      if (CPU_ISSET_S(static_cast<std::size_t>(i), bytes, set)) cpus.push_back(i);
    CPU_FREE(set);
    if (known) return cpus;
  }
#endif
  for (int i = 0; i < std::max(1, static_cast<int>(std::thread::hardware_concurrency())); ++i) cpus.push_back(i);
  return cpus;
}

CpuTopology read_cpu_topology(const std::vector<int>& allowed, const std::string& root) {
  CpuTopology topology;
  const std::map<int, int> nodes = nodes_of_cpus(root);
  for (const int id : allowed) {
    const auto siblings =
        read_list(root + "sys/devices/system/cpu/cpu" + std::to_string(id) + "/topology/thread_siblings_list");
    const auto node = nodes.find(id);
    topology.cpus.push_back({id, siblings.empty() ? id : *std::min_element(siblings.begin(), siblings.end()),
                             node == nodes.end() ? 0 : node->second});
  }
  topology.quota = read_quota(root);
  return topology;
}

}  // namespace fastllm

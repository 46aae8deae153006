#include "base/cpu_placement.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "base/share.h"
#include "fastllm/error.h"

namespace fastllm {
namespace {

// One CPU of every physical core, node by node, then their second CPUs in the same order, and so on.
struct CoreOrder {
  explicit CoreOrder(std::vector<Cpu> cpus) {
    std::sort(cpus.begin(), cpus.end(), [](const Cpu& a, const Cpu& b) {
      return std::tuple(a.node, a.core, a.id) < std::tuple(b.node, b.core, b.id);
    });
    std::set<int> nodes_seen;
    for (const Cpu& cpu : cpus) nodes_seen.insert(cpu.node);
    nodes = static_cast<int>(nodes_seen.size());
    for (bool first = true; !cpus.empty(); first = false) {
      std::set<int> taken;  // cores, in this round
      std::vector<Cpu> left;
      for (const Cpu& cpu : cpus) {
        if (taken.insert(cpu.core).second) {
          ids.push_back(cpu.id);
        } else {
          left.push_back(cpu);
        }
      }
      if (first) cores = static_cast<int>(taken.size());
      cpus = std::move(left);
    }
  }

  std::vector<int> ids;
  int cores = 0, nodes = 0;
};

// Earlier ranks have the larger shares.
int threads_of_rank(int threads, int rank, int ranks) {
  return std::max(threads / ranks + (rank < threads % ranks ? 1 : 0), 1);
}

std::string bound_text(const std::string& bind) { return "cpu_bind is '" + bind + "', but "; }

std::vector<ThreadPlacement> take_in_turn(const std::string& bind, const std::vector<int>& cpus, int threads,
                                          int ranks) {
  std::vector<ThreadPlacement> placed;
  auto next = cpus.begin();
  for (int rank = 0; rank < ranks; ++rank) {
    const int n = threads_of_rank(threads, rank, ranks);
    if (cpus.end() - next < n)
      throw InvalidArgument(bound_text(bind) + "that is " + std::to_string(cpus.size()) + " CPUs, too few for " +
                            std::to_string(std::max(threads, ranks)) +
                            " threads; lower cpu_threads or tensor_parallel_size, or give more CPUs.");
    placed.push_back({n, {next, next + n}});
    next += n;
  }
  return placed;
}

std::vector<int> checked_list(const std::string& bind, std::string_view text, const CpuTopology& topology) {
  std::vector<int> cpus, usable;
  try {
    cpus = parse_cpu_list(text);
  } catch (const InvalidArgument& e) {
    throw InvalidArgument(bound_text(bind) + "must be auto, none, cores, or lists of CPUs: " + e.what() + ".");
  }
  for (const Cpu& cpu : topology.cpus) usable.push_back(cpu.id);
  for (const int cpu : cpus) {
    if (std::find(usable.begin(), usable.end(), cpu) == usable.end())
      throw InvalidArgument(bound_text(bind) + "CPU " + std::to_string(cpu) +
                            " is none of those this process may use: " + cpu_list_text(usable) + ".");
  }
  return cpus;
}

std::vector<ThreadPlacement> place_on_lists(const std::string& bind, int threads, int ranks,
                                            const CpuTopology& topology) {
  std::vector<std::vector<int>> lists;
  std::string all;  // the lists as one, for a CPU that two of them have
  for (std::string_view rest = bind;;) {
    const auto bar = rest.find('|');
    lists.push_back(checked_list(bind, rest.substr(0, bar), topology));
    all += (all.empty() ? "" : ",") + std::string(rest.substr(0, bar));
    if (bar == std::string_view::npos) break;
    rest.remove_prefix(bar + 1);
  }
  checked_list(bind, all, topology);
  if (lists.size() == 1)
    return take_in_turn(bind, lists[0], threads > 0 ? threads : static_cast<int>(lists[0].size()), ranks);
  if (lists.size() != static_cast<std::size_t>(ranks))
    throw InvalidArgument(bound_text(bind) + "there are " + std::to_string(ranks) +
                          " ranks; give one list, or one for each rank with | between them.");
  std::vector<ThreadPlacement> placed;
  for (int rank = 0; rank < ranks; ++rank) {
    const auto& list = lists[static_cast<std::size_t>(rank)];
    if (list.size() != lists[0].size())
      throw InvalidArgument(bound_text(bind) + "all ranks need the same number of CPUs.");
    const int n = threads > 0 ? threads_of_rank(threads, rank, ranks) : static_cast<int>(list.size());
    placed.push_back(take_in_turn(bind, list, n, 1)[0]);
  }
  return placed;
}

}  // namespace

std::vector<ThreadPlacement> place_threads(const std::string& bind, int threads, int ranks,
                                           const CpuTopology& topology) {
  const bool automatic = bind == "auto", cores_only = bind == "cores";
  if (!automatic && !cores_only && bind != "none" && bind != "nobind" && bind != "all")
    return place_on_lists(bind, threads, ranks, topology);

  const CoreOrder order(topology.cpus);
  if (threads == 0) {
    threads = order.cores;
    if (topology.quota > 0) threads = std::min(threads, std::max(static_cast<int>(std::lround(topology.quota)), 1));
  }
  const bool exclusive = topology.quota == 0 && order.nodes > 1 && threads == order.cores && threads >= ranks;
  if (cores_only || (automatic && exclusive)) return take_in_turn(bind, order.ids, threads, ranks);
  std::vector<ThreadPlacement> placed;
  for (int rank = 0; rank < ranks; ++rank) placed.push_back({threads_of_rank(threads, rank, ranks), {}});
  return placed;
}

int usable_cores() { return place_threads("auto", 0, 1, read_cpu_topology(allowed_cpus()))[0].threads; }

}  // namespace fastllm

// Which threads are started and where: pure choices on made-up machines, a folder standing for /sys and /proc.
#include "base/cpu_placement.h"

#include <gtest/gtest.h>
#include <stdlib.h>  // mkdtemp

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/share.h"
#include "base/thread_pool.h"
#include "fastllm/error.h"

namespace fastllm {
namespace {

using Ids = std::vector<int>;

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

TEST(CpuList, reads_numbers_and_ranges_in_the_order_given) {
  EXPECT_EQ(parse_cpu_list("3"), Ids{3});
  EXPECT_EQ(parse_cpu_list("0-2,16"), (Ids{0, 1, 2, 16}));
  EXPECT_EQ(parse_cpu_list("8-9,1,0"), (Ids{8, 9, 1, 0}));
  EXPECT_EQ(cpu_list_text({16, 1, 0, 2, 5}), "0-2,5,16");
}

TEST(CpuList, refuses_what_is_no_list_and_says_which_part) {
  for (const char* text :
       {"", ",", "1,", "a", "1-", "-1", "3-1", "1--2", " 1", "1.5", "0x1", "9999999999", "0-2000000"})
    EXPECT_NE(message_of([&] { parse_cpu_list(text); }).find("is neither a number nor a range"), std::string::npos)
        << text;
  EXPECT_NE(message_of([] { parse_cpu_list("0-3,2"); }).find("CPU 2 is given twice"), std::string::npos);
}

// A folder with the files of /sys and /proc that tell a machine's shape.
class FakeMachine {
 public:
  FakeMachine() {
    std::string name = std::filesystem::temp_directory_path() / "fastllm_machine_XXXXXX";
    if (mkdtemp(name.data()) == nullptr) throw ResourceError("cannot make " + name);
    root_ = name + "/";
  }
  ~FakeMachine() { std::filesystem::remove_all(root_); }
  FakeMachine(const FakeMachine&) = delete;
  FakeMachine& operator=(const FakeMachine&) = delete;

  FakeMachine& file(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text << "\n";
    return *this;
  }
  FakeMachine& siblings(const std::string& cpus) {
    for (const int cpu : parse_cpu_list(cpus))
      file("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list", cpus);
    return *this;
  }
  // Two sockets of four cores, the second threads numbered after all first ones.
  FakeMachine& two_nodes() {
    file("sys/devices/system/node/online", "0-1");
    file("sys/devices/system/node/node0/cpulist", "0-3,8-11");
    file("sys/devices/system/node/node1/cpulist", "4-7,12-15");
    for (int core = 0; core < 8; ++core) siblings(std::to_string(core) + "," + std::to_string(core + 8));
    return *this;
  }
  CpuTopology read(const std::string& allowed) const { return read_cpu_topology(parse_cpu_list(allowed), root_); }

 private:
  std::string root_;
};

TEST(CpuTopology, knows_cores_and_nodes_of_two_sockets_with_two_threads_a_core) {
  FakeMachine machine;
  const CpuTopology t = machine.two_nodes().read("0-15");
  ASSERT_EQ(t.cpus.size(), 16u);
  EXPECT_EQ(t.cpus[3], (Cpu{3, 3, 0}));
  EXPECT_EQ(t.cpus[11], (Cpu{11, 3, 0}));
  EXPECT_EQ(t.cpus[12], (Cpu{12, 4, 1}));
  EXPECT_EQ(t.quota, 0);
}

TEST(CpuTopology, takes_missing_and_senseless_files_for_one_node_of_single_threads) {
  FakeMachine machine;
  machine.file("sys/devices/system/node/online", "all of them").file("sys/fs/cgroup/cpu.max", "none");
  const CpuTopology t = machine.read("0-1");
  EXPECT_EQ(t.cpus, (std::vector<Cpu>{{0, 0, 0}, {1, 1, 0}}));
  EXPECT_EQ(t.quota, 0);
}

TEST(CpuTopology, finds_the_tightest_quota_of_either_cgroup_version) {
  const struct {
    const char *cgroup, *path, *text;
    double quota;
  } cases[] = {
      {"0::/", "sys/fs/cgroup/cpu.max", "150000 100000", 1.5},
      {"0::/", "sys/fs/cgroup/cpu.max", "max 100000", 0},
      {"0::/a/b", "sys/fs/cgroup/a/cpu.max", "300000 100000", 3},      // set on the group above
      {"0::/host/only", "sys/fs/cgroup/cpu.max", "200000 100000", 2},  // the container's own, at the top
      {"4:cpu,cpuacct:/x", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "50000", 0.5},
      {"4:cpu,cpuacct:/x", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1", 0},  // none
      {"4:cpuset:/x", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "50000", 0},  // another controller's group
  };
  for (const auto& c : cases) {
    FakeMachine machine;
    machine.file("proc/self/cgroup", c.cgroup).file(c.path, c.text);
    const std::string folder = std::filesystem::path(c.path).parent_path();
    machine.file(folder + "/cpu.cfs_period_us", "100000");
    EXPECT_DOUBLE_EQ(machine.read("0-7").quota, c.quota) << c.cgroup << " " << c.path << " " << c.text;
  }
  FakeMachine nested;
  nested.file("proc/self/cgroup", "0::/a/b").file("sys/fs/cgroup/a/cpu.max", "150000 100000");
  EXPECT_DOUBLE_EQ(nested.file("sys/fs/cgroup/a/b/cpu.max", "400000 100000").read("0-7").quota, 1.5);
}

struct Placed {
  Ids threads;            // by rank
  std::vector<Ids> cpus;  // by rank
};
Placed place(const std::string& bind, int threads, int ranks, const CpuTopology& topology) {
  Placed placed;
  for (const auto& rank : place_threads(bind, threads, ranks, topology)) {
    placed.threads.push_back(rank.threads);
    placed.cpus.push_back(rank.cpus);
  }
  return placed;
}

TEST(CpuPlacement, automatic_takes_a_thread_a_core_and_binds_where_there_are_several_nodes) {
  FakeMachine machine;
  const CpuTopology two = machine.two_nodes().read("0-15");
  EXPECT_EQ(place("auto", 0, 1, two).cpus, (std::vector<Ids>{{0, 1, 2, 3, 4, 5, 6, 7}}));
  EXPECT_EQ(place("auto", 0, 2, two).cpus, (std::vector<Ids>{{0, 1, 2, 3}, {4, 5, 6, 7}}));  // a node each
  EXPECT_EQ(place("auto", 8, 2, two).cpus, place("auto", 0, 2, two).cpus);
  // Fewer threads than cores leave the machine to others, who may want the same cores.
  EXPECT_EQ(place("auto", 6, 1, two).cpus, std::vector<Ids>{{}});

  const CpuTopology one_node = machine.read("0-3,8-11");
  EXPECT_EQ(place("auto", 0, 1, one_node).threads, Ids{4});
  EXPECT_EQ(place("auto", 0, 1, one_node).cpus, std::vector<Ids>{{}});
  EXPECT_EQ(place("cores", 0, 1, one_node).cpus, (std::vector<Ids>{{0, 1, 2, 3}}));
  EXPECT_EQ(place("cores", 6, 1, one_node).cpus, (std::vector<Ids>{{0, 1, 2, 3, 8, 9}}));
}

TEST(CpuPlacement, a_cpuset_of_three_gives_its_cores_only) {
  FakeMachine machine;
  const CpuTopology t = machine.two_nodes().read("2,10,12");  // two threads of one core, and one of the other node's
  EXPECT_EQ(place("auto", 0, 1, t).cpus, (std::vector<Ids>{{2, 12}}));
  EXPECT_EQ(place("none", 0, 1, t).threads, Ids{2});
  EXPECT_EQ(place("none", 3, 1, t).cpus, std::vector<Ids>{{}});
}

TEST(CpuPlacement, a_quota_bounds_the_threads_and_leaves_them_unbound) {
  FakeMachine machine;
  machine.two_nodes().file("proc/self/cgroup", "0::/").file("sys/fs/cgroup/cpu.max", "150000 100000");
  const CpuTopology t = machine.read("0-15");
  EXPECT_EQ(place("auto", 0, 1, t).threads, Ids{2});
  EXPECT_EQ(place("auto", 0, 1, t).cpus, std::vector<Ids>{{}});
  EXPECT_EQ(place("auto", 8, 1, t).cpus, std::vector<Ids>{{}}) << "the quota is there, whatever was asked for";
  EXPECT_EQ(place("cores", 0, 1, t).cpus, (std::vector<Ids>{{0, 1}}));
}

TEST(CpuPlacement, lists_are_cut_over_ranks_or_given_for_each) {
  FakeMachine machine;
  const CpuTopology t = machine.two_nodes().read("0-15");
  EXPECT_EQ(place("9,1,2-3", 0, 1, t).cpus, (std::vector<Ids>{{9, 1, 2, 3}}));
  EXPECT_EQ(place("9,1,2-3", 0, 2, t).cpus, (std::vector<Ids>{{9, 1}, {2, 3}}));
  EXPECT_EQ(place("0-4", 0, 2, t).threads, (Ids{3, 2}));
  EXPECT_EQ(place("0-3|4-7", 0, 2, t).cpus, (std::vector<Ids>{{0, 1, 2, 3}, {4, 5, 6, 7}}));
  EXPECT_EQ(place("0-3|4-7", 8, 2, t).cpus, place("0-3|4-7", 0, 2, t).cpus);
  EXPECT_EQ(place("0-3", 2, 1, t).cpus, (std::vector<Ids>{{0, 1}}));
  for (const char* name : {"none", "nobind", "all"}) EXPECT_EQ(place(name, 5, 2, t).threads, (Ids{3, 2})) << name;
  EXPECT_EQ(place("auto", 1, 3, t).threads, (Ids{1, 1, 1})) << "every rank needs a thread";
}

TEST(CpuPlacement, wrong_values_are_named_with_what_is_allowed) {
  FakeMachine machine;
  const CpuTopology t = machine.two_nodes().read("0-3,8-11");
  const struct {
    const char* bind;
    int threads, ranks;
    const char* part;
  } cases[] = {
      {"core", 0, 1, "cpu_bind is 'core', but must be auto, none, cores, or lists of CPUs"},
      {"", 0, 1, "cpu_bind is '', but must be auto"},
      {"0-", 0, 1, "'0-' is neither a number nor a range"},
      {"0,4", 0, 1, "CPU 4 is none of those this process may use: 0-3,8-11"},
      {"0-1|1-2", 0, 2, "CPU 1 is given twice"},
      {"0|1|2", 0, 2, "there are 2 ranks"},
      {"0-1|2", 0, 2, "all ranks need the same number of CPUs"},
      {"0-2", 4, 1, "that is 3 CPUs, too few for 4 threads"},
      {"0", 0, 2, "that is 1 CPUs, too few for 2 threads"},
      {"cores", 9, 1, "that is 8 CPUs, too few for 9 threads"},
  };
  for (const auto& c : cases) {
    const std::string message = message_of([&] { place_threads(c.bind, c.threads, c.ranks, t); });
    EXPECT_NE(message.find(c.part), std::string::npos) << c.bind << ": " << message;
  }
}

TEST(CpuPlacement, usable_cores_are_some_and_not_more_than_the_affinity_has) {
  EXPECT_GE(usable_cores(), 1);
  EXPECT_LE(static_cast<std::size_t>(usable_cores()), allowed_cpus().size());
}

TEST(ThreadPool, bound_threads_run_on_their_cpu_only) {
  const Ids before = allowed_cpus();
  const Ids cpus = {before.back(), before.front(), before.back()};
  std::vector<Ids> seen(3);
  // A late worker's part runs on the caller, so every part waits until all three are there.
  std::thread([&] {
    ThreadPool pool(3, cpus);
    std::atomic<int> there{0};
    pool.run([&](int i) {
      seen[static_cast<std::size_t>(i)] = allowed_cpus();
      ++there;
      while (there < 3) std::this_thread::yield();
    });
  }).join();
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(seen[i], Ids{cpus[i]}) << "thread " << i;
  EXPECT_EQ(allowed_cpus(), before) << "other threads are left alone";
}

TEST(ThreadPool, says_which_cpu_it_cannot_bind_to) {
  std::thread([] {
    try {
      ThreadPool pool(1, {(1 << 20) - 1});
      ADD_FAILURE() << "bound to a CPU that is not there";
    } catch (const ResourceError& e) {
      EXPECT_NE(std::string(e.what()).find("cannot bind a thread to CPU 1048575"), std::string::npos) << e.what();
    }
  }).join();
}

TEST(Share, parts_cover_everything_once_and_differ_by_one_at_most) {
  for (const std::int64_t n : {0, 1, 2, 7, 64, 1001}) {
    for (const std::int64_t parts : {1, 2, 3, 8, 63}) {
      std::int64_t next = 0;
      for (std::int64_t part = 0; part < parts; ++part) {
        const Share s = share_of(n, part, parts);
        EXPECT_EQ(s.begin, next);
        EXPECT_GE(s.end - s.begin, n / parts);
        EXPECT_LE(s.end - s.begin, (n + parts - 1) / parts);
        next = s.end;
      }
      EXPECT_EQ(next, n);
    }
  }
}

}  // namespace
}  // namespace fastllm

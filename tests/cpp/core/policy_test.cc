#include "sched/policy.h"

#include <gtest/gtest.h>

namespace fastllm {
namespace {

TEST(Policy, ChunkSize) {
  struct Case {
    int to_compute, max_chunk, budget;
    std::size_t others;
    int expected;
    const char* why;
  };
  for (const Case& c : {
           Case{100, 0, 2048, 0, 100, "everything fits"},
           Case{100, 7, 2048, 0, 7, "the chunk limit"},
           Case{100, 0, 30, 0, 30, "the budget"},
           Case{100, 0, 64, 10, 54, "a token for each later sequence"},
           Case{100, 0, 8, 20, 1, "never less than one while there is budget"},
           Case{1, 0, 1, 5, 1, "a decode takes the last token"},
           Case{0, 0, 10, 0, 0, "nothing to do"},
           Case{5, 0, 0, 0, 0, "no budget"},
       }) {
    EXPECT_EQ(chunk_size(c.to_compute, c.max_chunk, c.budget, c.others), c.expected) << c.why;
  }
}

TEST(Policy, Order) {
  const auto fcfs = SchedulingPolicy::Fcfs, priority = SchedulingPolicy::Priority;
  EXPECT_LT(order_key(fcfs, 5, 0, 0), order_key(fcfs, -5, 1, 0));
  EXPECT_LT(order_key(priority, -5, 1, 0), order_key(priority, 5, 0, 0));
  EXPECT_LT(order_key(priority, 5, 0, 0), order_key(priority, 5, 1, 0));
  EXPECT_LT(order_key(fcfs, 0, 3, 1), order_key(fcfs, 0, 3, 2));
}

TEST(Policy, Admission) {
  EXPECT_TRUE(admits(10, 10, 5, 0)) << "alone, the watermark does not count";
  EXPECT_FALSE(admits(10, 10, 1, 1));
  EXPECT_TRUE(admits(10, 11, 1, 1));
  EXPECT_FALSE(admits(11, 10, 0, 0));
  EXPECT_EQ(watermark_blocks(50), 0);
  EXPECT_EQ(watermark_blocks(1000), 10);
}

TEST(Policy, TheVictimIsTheLastInOrder) {
  EXPECT_EQ(pick_victim(5, 2), 4u);
  EXPECT_EQ(pick_victim(5, 4), 4u);
}

TEST(Policy, SwapNeedsRoomAndSomethingToSave) {
  const auto swap = PreemptionMode::Swap, recompute = PreemptionMode::Recompute;
  EXPECT_EQ(pick_preemption(swap, 3, 3, 10), swap);
  EXPECT_EQ(pick_preemption(swap, 3, 2, 10), recompute);
  EXPECT_EQ(pick_preemption(swap, 0, 2, 0), recompute);
  EXPECT_EQ(pick_preemption(recompute, 3, 30, 10), recompute);
}

}  // namespace
}  // namespace fastllm

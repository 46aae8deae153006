#include "kv/kv_manager.h"

#include <gtest/gtest.h>

#include "core/sim.h"

namespace fastllm::test {
namespace {

constexpr SlotId kSlot{0}, kOther{1};

class KvManagerTest : public testing::Test {
 protected:
  static KvConfig config() {
    KvConfig c;
    c.device_blocks = 9;  // 8 usable
    c.host_blocks = 4;
    c.block_size = 4;
    return c;
  }
  BlockTable table() {
    BlockTable t;
    t.root = t.tail = kv_.root("", -1);
    return t;
  }
  // A table that computed and published `tokens`.
  BlockTable computed(const std::vector<TokenId>& tokens) {
    BlockTable t = table();
    const auto size = static_cast<std::int64_t>(tokens.size());
    EXPECT_TRUE(kv_.reserve(t, kSlot, 0, size, plan_));
    kv_.publish(t, tokens, size);
    plan_.clear();
    return t;
  }
  KvManager kv_{config()};
  StepPlan plan_;
};

TEST_F(KvManagerTest, ReserveTellsTheSlotAboutEachNewBlock) {
  BlockTable t = table();
  ASSERT_TRUE(kv_.reserve(t, kSlot, 0, 5, plan_));
  ASSERT_EQ(plan_.table_sets.size(), 2u);
  EXPECT_EQ(plan_.table_sets[1].index, 1);
  EXPECT_EQ(plan_.table_sets[1].block, t.blocks[1]);
  ASSERT_TRUE(kv_.reserve(t, kSlot, 5, 3, plan_));
  EXPECT_EQ(plan_.table_sets.size(), 2u) << "positions 5..7 lie in the second block";
}

TEST_F(KvManagerTest, ReserveIsAllOrNothing) {
  BlockTable t = table();
  EXPECT_EQ(kv_.blocks_needed(t, 0, 33), 9);
  EXPECT_FALSE(kv_.reserve(t, kSlot, 0, 33, plan_));
  EXPECT_TRUE(t.blocks.empty());
  EXPECT_TRUE(plan_.table_sets.empty());
  EXPECT_EQ(kv_.num_free(), 8);
}

TEST_F(KvManagerTest, AMatchLeavesATokenToCompute) {
  const auto tokens = ramp(0, 8);
  BlockTable a = computed(tokens);
  BlockTable b = table();
  EXPECT_EQ(kv_.match_prefix(b, tokens), 4);
  BlockTable c = table();
  EXPECT_EQ(kv_.match_prefix(c, ramp(0, 9)), 8);
  EXPECT_EQ(c.blocks, a.blocks);
  EXPECT_EQ(kv_.device().ref_count(a.blocks[0]), 3);
}

TEST_F(KvManagerTest, AMatchRevivesReleasedBlocksAndChainsShrinkFromTheTail) {
  BlockTable a = computed(ramp(0, 16));
  kv_.release(a);
  EXPECT_EQ(kv_.snapshot().cached, 4);
  BlockTable big = table();
  ASSERT_TRUE(kv_.reserve(big, kSlot, 0, 4 * 6, plan_));  // 4 blanks and the two last of the chain
  BlockTable b = table();
  EXPECT_EQ(kv_.match_prefix(b, ramp(0, 17)), 8);
}

TEST_F(KvManagerTest, OnlyFullKnownBlocksArePublished) {
  BlockTable a = table();
  const auto tokens = ramp(0, 11);
  ASSERT_TRUE(kv_.reserve(a, kSlot, 0, 12, plan_));
  kv_.publish(a, tokens, 12);  // position 11's token is pending
  EXPECT_EQ(a.num_published, 2);
  EXPECT_EQ(kv_.cache().num_nodes(), 2);
}

TEST_F(KvManagerTest, TheFirstWriterAfterAForkCopiesOneBlock) {
  BlockTable a = computed(ramp(0, 6));
  BlockTable b = table();
  kv_.fork(a, b, 6);
  EXPECT_EQ(b.blocks, a.blocks);
  EXPECT_EQ(kv_.blocks_needed(b, 5, 1), 1);
  ASSERT_TRUE(kv_.reserve(b, kOther, 5, 1, plan_));
  ASSERT_EQ(plan_.copies.size(), 1u);
  EXPECT_EQ(plan_.copies[0].from, a.blocks[1]);
  EXPECT_EQ(plan_.copies[0].to, b.blocks[1]);
  EXPECT_EQ(b.blocks[0], a.blocks[0]);
  EXPECT_EQ(kv_.blocks_needed(a, 6, 1), 0) << "the block is private again";
  kv_.release(a);
  kv_.release(b);
  EXPECT_EQ(kv_.snapshot().used, 0);
}

TEST_F(KvManagerTest, AForkOfAFullPromptFindsTheNodesAgain) {
  const auto tokens = ramp(0, 8);
  BlockTable a = computed(tokens);
  BlockTable b = table();
  kv_.fork(a, b, 8);
  ASSERT_TRUE(kv_.reserve(b, kOther, 7, 1, plan_));
  kv_.publish(b, tokens, 8);
  EXPECT_EQ(b.tail, a.tail);
  EXPECT_EQ(kv_.cache().num_nodes(), 2);
}

TEST_F(KvManagerTest, ATableThatSharesAnotherGivesUpItsOwnBlocksAndKeepsCommonOnes) {
  BlockTable a = computed(ramp(0, 10));
  BlockTable b = table();
  EXPECT_EQ(kv_.share(a, b), 0) << "an empty table differs from the first block on";
  ASSERT_TRUE(kv_.reserve(b, kOther, 10, 4, plan_));  // copies the third block and takes a fourth
  EXPECT_EQ(kv_.snapshot().used, 5);
  EXPECT_EQ(kv_.share(a, b), 2);
  EXPECT_EQ(b.blocks, a.blocks);
  EXPECT_EQ(b.tail, a.tail);
  EXPECT_EQ(b.num_published, 2);
  EXPECT_EQ(kv_.snapshot().used, 3);
  EXPECT_EQ(kv_.share(b, a), 3) << "equal tables change nothing";
  kv_.release(a);
  kv_.release(b);
  EXPECT_EQ(kv_.snapshot().used, 0);
}

TEST_F(KvManagerTest, SwapMovesEveryBlockAndBack) {
  BlockTable a = computed(ramp(0, 10));
  const std::vector<BlockId> before = a.blocks;
  std::vector<BlockCopy> out, in;
  ASSERT_TRUE(kv_.swap_out(a, out));
  EXPECT_EQ(out.size(), 3u);
  EXPECT_EQ(out[0].from, before[0]);
  EXPECT_EQ(kv_.snapshot().used, 0);
  EXPECT_EQ(kv_.snapshot().host_used, 3);
  ASSERT_TRUE(kv_.swap_in(a, in));
  EXPECT_EQ(in[2].from, out[2].to);
  EXPECT_EQ(a.blocks.size(), 3u);
  EXPECT_EQ(kv_.snapshot().host_used, 0);
}

TEST_F(KvManagerTest, SwapChangesNothingWithoutRoom) {
  BlockTable a = computed(ramp(0, 20));
  std::vector<BlockCopy> copies;
  EXPECT_FALSE(kv_.swap_out(a, copies));
  EXPECT_EQ(a.blocks.size(), 5u);
  EXPECT_TRUE(copies.empty());
}

TEST_F(KvManagerTest, ResetForgetsUnreferencedBlocksOnly) {
  BlockTable a = computed(ramp(0, 8));
  BlockTable b = computed(ramp(100, 8));
  kv_.release(b);
  kv_.reset_cache();
  EXPECT_EQ(kv_.snapshot().cached, 0);
  BlockTable c = table(), d = table();
  EXPECT_EQ(kv_.match_prefix(c, ramp(100, 9)), 0);
  EXPECT_EQ(kv_.match_prefix(d, ramp(0, 9)), 8);
}

TEST_F(KvManagerTest, AForgottenBeginningIsNotMatchedAndItsBlocksAreNotKept) {
  BlockTable running = computed(ramp(0, 12)), ended = computed(ramp(100, 8));
  kv_.release(ended);
  kv_.forget_prefix(running.root, ramp(0, 10));  // the first two blocks of four tokens
  BlockTable again = table(), other = table();
  EXPECT_EQ(kv_.match_prefix(again, ramp(0, 13)), 0);
  EXPECT_EQ(kv_.match_prefix(other, ramp(100, 9)), 8);
  kv_.release(other);
  kv_.release(running);
  kv_.forget_prefix(again.root, ramp(100, 8));
  EXPECT_EQ(kv_.snapshot().used, 0);
  EXPECT_EQ(kv_.snapshot().cached, 1) << "what was published below a forgotten node, until it is evicted";
}

}  // namespace
}  // namespace fastllm::test

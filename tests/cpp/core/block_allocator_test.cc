#include "kv/block_allocator.h"

#include <gtest/gtest.h>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr BlockId block(int i) { return BlockId{i}; }

TEST(BlockAllocator, NeverHandsOutTheReservedBlock) {
  BlockAllocator pool(5, 1);
  EXPECT_EQ(pool.num_usable(), 4);
  for (int i = 1; i <= 4; ++i) EXPECT_EQ(pool.alloc(), block(i));
  EXPECT_EQ(pool.alloc(), kNoBlock);
  EXPECT_EQ(pool.num_used(), 4);
}

TEST(BlockAllocator, RemembersTheMostBlocksThatWereInUseAtOnce) {
  BlockAllocator pool(6, 1);
  const BlockId a = pool.alloc(), b = pool.alloc();
  pool.unref(a, true);
  pool.make_blank(a);
  EXPECT_EQ(pool.peak_used(), 2);
  pool.unref(b, true);
  pool.restart_peak();
  EXPECT_EQ(pool.peak_used(), 0);
  pool.ref(b);
  pool.ref(b);
  EXPECT_EQ(pool.peak_used(), 1) << "a cached block comes back into use once";
}

TEST(BlockAllocator, ReusesTheMostRecentlyFreedBlankBeforeAnUntouchedOne) {
  BlockAllocator pool(6, 1);
  const BlockId a = pool.alloc(), b = pool.alloc();
  pool.unref(a, false);
  pool.unref(b, false);
  EXPECT_EQ(pool.alloc(), b);
  EXPECT_EQ(pool.alloc(), a);
  EXPECT_EQ(pool.alloc(), block(3));
}

TEST(BlockAllocator, EvictsCachedBlocksOnlyWithoutBlanksLeastRecentlyReleasedFirst) {
  BlockAllocator pool(5, 1);
  const BlockId a = pool.alloc(), b = pool.alloc(), c = pool.alloc();
  pool.unref(b, true);
  pool.unref(a, true);
  pool.unref(c, true);
  EXPECT_EQ(pool.num_cached(), 3);
  EXPECT_EQ(pool.alloc(), block(4));
  EXPECT_EQ(pool.alloc(), b);
  EXPECT_EQ(pool.alloc(), a);
  EXPECT_EQ(pool.alloc(), c);
  EXPECT_EQ(pool.num_free(), 0);
}

TEST(BlockAllocator, IdleCacheGivesWayBeforeMoreThanTheResidentBlocksAreTouched) {
  BlockAllocator pool(8, 1, 2);
  const BlockId a = pool.alloc(), b = pool.alloc();
  pool.unref(a, true);
  pool.unref(b, true);
  EXPECT_EQ(pool.alloc(), a);  // the least recently released, not block 3
  EXPECT_EQ(pool.alloc(), b);
  EXPECT_EQ(pool.alloc(), BlockId{3});  // both are in use: the pool grows
  pool.unref(a, false);
  pool.unref(b, true);
  EXPECT_EQ(pool.alloc(), a);  // a used blank block is better than a cached one
  EXPECT_EQ(pool.alloc(), b);
  EXPECT_EQ(pool.num_free(), 4);
}

TEST(BlockAllocator, ACachedBlockCanBeTakenBackFromTheMiddleOfItsList) {
  BlockAllocator pool(4, 1);
  const BlockId a = pool.alloc(), b = pool.alloc(), c = pool.alloc();
  for (BlockId x : {a, b, c}) pool.unref(x, true);
  pool.ref(b);
  EXPECT_EQ(pool.ref_count(b), 1);
  EXPECT_FALSE(pool.is_cached(b));
  EXPECT_EQ(pool.alloc(), a);
  EXPECT_EQ(pool.alloc(), c);
}

TEST(BlockAllocator, OnlyTheLastReferenceFrees) {
  BlockAllocator pool(2, 1);
  const BlockId a = pool.alloc();
  pool.ref(a);
  pool.unref(a, false);
  EXPECT_EQ(pool.num_free(), 0);
  pool.unref(a, false);
  EXPECT_EQ(pool.num_free(), 1);
}

TEST(BlockAllocator, MakeBlankMovesACachedBlock) {
  BlockAllocator pool(3, 1);
  const BlockId a = pool.alloc();
  pool.unref(a, true);
  pool.make_blank(a);
  EXPECT_EQ(pool.num_cached(), 0);
  EXPECT_EQ(pool.alloc(), a);
}

TEST(BlockAllocator, RefusesAPoolThatCannotBeNumbered) {
  EXPECT_THROW(BlockAllocator(0, 1), InvalidArgument);
  EXPECT_THROW(BlockAllocator(std::int64_t{1} << 40, 1), InvalidArgument);
}

}  // namespace
}  // namespace fastllm

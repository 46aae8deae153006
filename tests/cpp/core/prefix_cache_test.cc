#include "kv/prefix_cache.h"

#include <gtest/gtest.h>

#include <random>

#include "test_seed.h"

namespace fastllm {
namespace {

using Tokens = std::vector<TokenId>;
constexpr BlockId block(int i) { return BlockId{i}; }

std::uint64_t constant_hash(PrefixNodeId, std::span<const TokenId>) { return 1; }

class PrefixCacheTest : public testing::TestWithParam<PrefixHash> {
 protected:
  PrefixCache cache_{16, 2, GetParam()};
  PrefixNodeId root_ = cache_.root("", -1);
};

TEST_P(PrefixCacheTest, FindsWhatWasPublishedBelowTheSameParentOnly) {
  const PrefixNodeId first = cache_.publish(root_, Tokens{1, 2}, block(1));
  const PrefixNodeId second = cache_.publish(first, Tokens{1, 2}, block(2));
  EXPECT_EQ(cache_.find(root_, Tokens{1, 2}).block, block(1));
  EXPECT_EQ(cache_.find(first, Tokens{1, 2}).block, block(2));
  EXPECT_EQ(cache_.find(second, Tokens{1, 2}).id, kNoPrefixNode);
  EXPECT_EQ(cache_.find(root_, Tokens{2, 1}).id, kNoPrefixNode);
}

TEST_P(PrefixCacheTest, TheFirstPublisherWins) {
  const PrefixNodeId first = cache_.publish(root_, Tokens{1, 2}, block(1));
  EXPECT_EQ(cache_.publish(root_, Tokens{1, 2}, block(2)), first);
  EXPECT_FALSE(cache_.holds(block(2)));
  EXPECT_EQ(cache_.num_nodes(), 1);
}

TEST_P(PrefixCacheTest, AForgottenParentIsNeverMatchedAgainByItsOldChildren) {
  const PrefixNodeId first = cache_.publish(root_, Tokens{1, 2}, block(1));
  cache_.publish(first, Tokens{3, 4}, block(2));
  cache_.forget(block(1));
  EXPECT_EQ(cache_.find(root_, Tokens{1, 2}).id, kNoPrefixNode);
  const PrefixNodeId again = cache_.publish(root_, Tokens{1, 2}, block(3));
  EXPECT_NE(again, first);
  EXPECT_EQ(cache_.find(again, Tokens{3, 4}).id, kNoPrefixNode);
}

TEST_P(PrefixCacheTest, PublishingABlockBelowAnotherParentMovesIt) {
  const PrefixNodeId first = cache_.publish(root_, Tokens{1, 2}, block(1));
  cache_.publish(first, Tokens{3, 4}, block(2));
  cache_.publish(root_, Tokens{3, 4}, block(2));
  EXPECT_EQ(cache_.find(first, Tokens{3, 4}).id, kNoPrefixNode);
  EXPECT_EQ(cache_.find(root_, Tokens{3, 4}).block, block(2));
  EXPECT_EQ(cache_.num_nodes(), 2);
}

TEST_P(PrefixCacheTest, SaltsAndAdaptersHaveTheirOwnRoots) {
  EXPECT_EQ(cache_.root("", -1), root_);
  EXPECT_NE(cache_.root("a", -1), root_);
  EXPECT_NE(cache_.root("a", -1), cache_.root("b", -1));
  EXPECT_NE(cache_.root("", 0), root_);
}

TEST_P(PrefixCacheTest, RandomPublishAndForgetAgreeWithAMap) {
  std::mt19937_64 rng(test::test_seed());
  std::map<Tokens, BlockId> model;  // below the root
  for (int i = 0; i < 5000; ++i) {
    const Tokens tokens{static_cast<TokenId>(rng() % 4), static_cast<TokenId>(rng() % 4)};
    const BlockId b = block(static_cast<int>(rng() % 16));
    if (rng() % 2) {
      if (!cache_.holds(b)) {
        cache_.publish(root_, tokens, b);
        model.try_emplace(tokens, b);
      }
    } else {
      cache_.forget(b);
      std::erase_if(model, [&](const auto& entry) { return entry.second == b; });
    }
    ASSERT_EQ(cache_.num_nodes(), static_cast<std::int64_t>(model.size()));
    const auto found = cache_.find(root_, tokens);
    const auto expected = model.find(tokens);
    ASSERT_EQ(found.block, expected == model.end() ? kNoBlock : expected->second);
  }
}

INSTANTIATE_TEST_SUITE_P(Hashes, PrefixCacheTest, testing::Values(&hash_prefix, &constant_hash));

}  // namespace
}  // namespace fastllm

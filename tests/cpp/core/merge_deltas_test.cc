#include "sched/merge_deltas.h"

#include <gtest/gtest.h>

namespace fastllm {
namespace {

TokenDelta delta(std::uint64_t id, int index, std::vector<TokenId> tokens, FinishReason finish = FinishReason::None) {
  TokenDelta d;
  d.id = id;
  d.index = index;
  d.tokens = std::move(tokens);
  d.finish = finish;
  return d;
}

TEST(MergeDeltas, JoinsEachSequenceIntoItsFirstDeltaInOrder) {
  std::vector<TokenDelta> deltas;
  deltas.push_back(delta(1, 0, {10}));
  deltas.push_back(delta(2, 0, {20}));
  deltas.push_back(delta(1, 1, {30}));
  deltas.push_back(delta(1, 0, {11}));
  deltas.push_back(delta(2, 0, {21, 22}, FinishReason::Stop));
  deltas.back().stop_token = 22;
  deltas.push_back(delta(1, 0, {12}, FinishReason::Length));
  merge_deltas(deltas);
  ASSERT_EQ(deltas.size(), 3u);
  EXPECT_EQ(deltas[0].tokens, (std::vector<TokenId>{10, 11, 12}));
  EXPECT_EQ(deltas[0].finish, FinishReason::Length);
  EXPECT_EQ(deltas[1].tokens, (std::vector<TokenId>{20, 21, 22}));
  EXPECT_EQ(deltas[1].finish, FinishReason::Stop);
  EXPECT_EQ(deltas[1].stop_token, 22);
  EXPECT_EQ(deltas[2].index, 1);
  EXPECT_EQ(deltas[2].finish, FinishReason::None);
}

TEST(MergeDeltas, KeepsAReusedIdApartFromItsPredecessor) {
  std::vector<TokenDelta> deltas;
  deltas.push_back(delta(1, 0, {10}, FinishReason::Stop));
  deltas.push_back(delta(1, 0, {20}));
  deltas.push_back(delta(1, 0, {21}));
  merge_deltas(deltas);
  ASSERT_EQ(deltas.size(), 2u);
  EXPECT_EQ(deltas[0].tokens, (std::vector<TokenId>{10}));
  EXPECT_EQ(deltas[1].tokens, (std::vector<TokenId>{20, 21}));
}

TEST(MergeDeltas, LeavesOneOrNoneAlone) {
  std::vector<TokenDelta> deltas;
  merge_deltas(deltas);
  EXPECT_TRUE(deltas.empty());
  deltas.push_back(delta(1, 0, {10}));
  merge_deltas(deltas);
  EXPECT_EQ(deltas.size(), 1u);
}

}  // namespace
}  // namespace fastllm

// Which sizes of decode steps are recorded.
#include <gtest/gtest.h>

#include "graph_cache.h"

namespace fastllm::test {
namespace {

TEST(GraphSizes, test_sizes_grow_finely_and_end_at_the_most_rows) {
  EXPECT_EQ(cuda::decode_graph_sizes(0), (std::vector<int>{}));
  EXPECT_EQ(cuda::decode_graph_sizes(1), (std::vector<int>{1}));
  EXPECT_EQ(cuda::decode_graph_sizes(6), (std::vector<int>{1, 2, 4, 6}));
  EXPECT_EQ(cuda::decode_graph_sizes(24), (std::vector<int>{1, 2, 4, 8, 16, 24}));
  const auto sizes = cuda::decode_graph_sizes(300);
  EXPECT_EQ(sizes.size(), 3 + 32 + 2);
  EXPECT_EQ(std::vector<int>(sizes.end() - 3, sizes.end()), (std::vector<int>{256, 288, 300}));
}

}  // namespace
}  // namespace fastllm::test

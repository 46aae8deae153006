// topk_logprobs() against fp64 over the sorted vocabulary.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "device.h"
#include "sampling/sampling.h"

namespace fastllm::test {
namespace {

using cuda::DeviceLogprobRequest;
using cuda::DeviceLogprobResult;

class CudaLogprobs : public CudaTest {
 protected:
  // Results of requests on logits with row stride ld; the last entry is a guard.
  std::vector<DeviceLogprobResult> run(const std::vector<float>& x, std::int64_t ld, int rows, int vocab,
                                       const std::vector<DeviceLogprobRequest>& requests,
                                       const std::vector<TokenId>& sampled) {
    const DeviceArray<float> logits(x);
    const DeviceArray<DeviceLogprobRequest> device_requests(requests);
    const DeviceArray<TokenId> device_sampled(sampled);
    const DeviceArray<std::byte> workspace(cuda::logprob_workspace_bytes(static_cast<int>(requests.size())));
    const DeviceArray<DeviceLogprobResult> results(requests.size() + 1);
    cuda::topk_logprobs({logits.get(), ld, rows, vocab}, device_requests.get(), static_cast<int>(requests.size()),
                        device_sampled.get(), results.get(), workspace.get(), stream);
    EXPECT_EQ(std::memcmp(logits.download().data(), x.data(), x.size() * sizeof(float)), 0) << "the logits changed";
    return results.download();
  }
};

TEST_F(CudaLogprobs, values_ranks_and_alternatives_match_fp64) {
  for (const int vocab : {1, 7, 33, 1000, 8193, 128256, 262208}) {
    const int rows = 4;
    const std::int64_t ld = vocab + 3;
    std::vector<float> x(static_cast<std::size_t>(rows * ld));
    for (float& v : x) v = random.normal(4);
    for (int i = 0; i < vocab; ++i) {
      float* of_row = x.data() + i;
      of_row[2 * ld] = std::round(of_row[2 * ld]);  // ties
      if (i % 3 != 0 || i / 8192 == 1) of_row[3 * ld] = -std::numeric_limits<float>::infinity();
    }
    const std::vector<TokenId> sampled = {random.below(vocab), random.below(vocab)};
    std::vector<DeviceLogprobRequest> requests;
    for (int r = 0; r < rows; ++r)
      for (const int top : {0, 1, 5, 32}) requests.push_back({r, r == 3 ? 0 : random.below(vocab), top, -1});
    requests.push_back({1, 0, 5, 1});
    requests.push_back({0, 0, 0, 0});
    const auto results = run(x, ld, rows, vocab, requests, sampled);
    EXPECT_EQ(results.back().rank, -1) << "written beyond the last result";
    for (std::size_t q = 0; q < requests.size(); ++q) {
      const auto& request = requests[q];
      const auto& got = results[q];
      const float* row = x.data() + request.row * ld;
      std::vector<int> order(static_cast<std::size_t>(vocab));
      std::iota(order.begin(), order.end(), 0);
      const auto top = std::min(request.top, vocab);
      std::partial_sort(order.begin(), order.begin() + top, order.end(),
                        [&](int a, int b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
      const float max = *std::max_element(row, row + vocab);
      double z = 0;
      for (int i = 0; i < vocab; ++i) z += std::exp(static_cast<double>(row[i]) - static_cast<double>(max));
      const double log_z = static_cast<double>(max) + std::log(z);
      const int token = request.sampled >= 0 ? sampled[static_cast<std::size_t>(request.sampled)] : request.token;
      SCOPED_TRACE("vocab " + std::to_string(vocab) + " row " + std::to_string(request.row) + " top " +
                   std::to_string(request.top) + " token " + std::to_string(token));
      EXPECT_EQ(got.token, token);
      EXPECT_NEAR(got.logprob, static_cast<double>(row[token]) - log_z, 2e-5);
      EXPECT_EQ(got.rank, 1 + std::count_if(row, row + vocab, [&](float v) { return v > row[token]; }));
      ASSERT_EQ(got.num_top, top);
      for (int i = 0; i < top; ++i) {
        const int id = order[static_cast<std::size_t>(i)];
        ASSERT_EQ(got.top_ids[i], id) << "alternative " << i << ", logits " << row[id] << " and "
                                      << (got.top_ids[i] >= 0 && got.top_ids[i] < vocab ? row[got.top_ids[i]] : NAN);
        if (std::isinf(row[id])) {
          EXPECT_TRUE(std::isinf(got.top_logprobs[i])) << "alternative " << i << ": " << got.top_logprobs[i];
        } else {
          EXPECT_NEAR(got.top_logprobs[i], static_cast<double>(row[id]) - log_z, 2e-5) << "alternative " << i;
        }
      }
    }
  }
}

TEST_F(CudaLogprobs, results_do_not_depend_on_the_row_or_the_batch) {
  const int vocab = 50257, rows = 5;
  std::vector<float> x(static_cast<std::size_t>(rows * vocab));
  for (float& v : x) v = random.normal(3);
  for (int r = 1; r < rows; ++r) std::copy_n(x.begin(), vocab, x.begin() + static_cast<std::ptrdiff_t>(r) * vocab);
  std::vector<DeviceLogprobRequest> requests;
  for (int r = 0; r < rows; ++r) requests.push_back({r, 4711, 20, -1});
  const auto results = run(x, vocab, rows, vocab, requests, {0});
  const auto alone = run(x, vocab, 1, vocab, {requests[0]}, {0});
  for (int r = 0; r < rows; ++r) {
    const auto& got = results[static_cast<std::size_t>(r)];
    EXPECT_EQ(std::memcmp(&got, &alone[0], offsetof(DeviceLogprobResult, top_ids)), 0) << "row " << r;
    EXPECT_TRUE(std::equal(got.top_ids, got.top_ids + 20, alone[0].top_ids)) << "row " << r;
    EXPECT_TRUE(std::equal(got.top_logprobs, got.top_logprobs + 20, alone[0].top_logprobs)) << "row " << r;
  }
}

}  // namespace
}  // namespace fastllm::test

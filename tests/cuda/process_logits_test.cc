// What changes logits before a token is chosen: counts, penalties, adjustments and masks.
#include <algorithm>
#include <cmath>

#include "sampling_reference.h"

namespace fastllm::test {
namespace {

using CudaProcessLogits = CudaTest;

TEST_F(CudaProcessLogits, counts_penalties_and_adjustments_match_the_reference) {
  for (const int vocab : {7, 333, 20011}) {
    const int n = 3, slots = 4, ld = vocab + 5;
    std::vector<TokenId> tokens(500);
    for (auto& t : tokens) t = random.below(vocab);
    const int num_prompt = 300;
    DeviceArray<TokenId> device_tokens(tokens);
    DeviceArray<std::int32_t> counts(static_cast<std::size_t>(slots * vocab));
    cuda::init_counts(counts.get() + vocab, vocab, device_tokens.get(), 500, num_prompt, stream);
    std::vector<std::int32_t> want_counts(static_cast<std::size_t>(slots * vocab), -1);
    std::fill_n(want_counts.begin() + vocab, vocab, 0);
    for (int i = 0; i < 500; ++i) {
      auto& c = want_counts[static_cast<std::size_t>(vocab + tokens[static_cast<std::size_t>(i)])];
      c = i < num_prompt ? c | 1 << 30 : c + 1;
    }
    ASSERT_EQ(counts.download(), want_counts) << "vocab " << vocab;

    std::vector<float> x(static_cast<std::size_t>(n * ld));
    for (float& v : x) v = random.normal(3);
    const auto before = x;
    std::vector<DeviceSampleRow> rows(n, sampling(0, 1, 0, 0));
    rows[1].slot = 1;
    rows[1].penalised = 1;
    rows[1].repetition_penalty = 1.3f;
    rows[1].presence_penalty = 0.4f;
    rows[1].frequency_penalty = 0.2f;
    const std::vector<cuda::LogitAdjustment> adjustments = {{2, 1.5f}, {5, 2.5f}, {6, -100.0f}, {3, -kInf}, {5, -kInf}};
    rows[0].adjust_end = 1;
    rows[1].adjust_begin = 1;
    rows[1].adjust_end = 5;
    rows[2].adjust_begin = rows[2].adjust_end = 5;
    DeviceArray<float> device(x);
    DeviceArray<DeviceSampleRow> device_rows(rows);
    DeviceArray<cuda::LogitAdjustment> device_adjustments(adjustments);
    cuda::LogitsProcessing call;
    call.rows = device_rows.get();
    call.adjustments = device_adjustments.get();
    call.num_adjustments = 5;
    call.any_penalised = true;
    call.counts = counts.get();
    cuda::process_logits({device.get(), ld, n, vocab}, call, stream);
    x[2] += 1.5f;
    float* row = x.data() + ld;
    row[6] += -100.0f;
    row[3] = row[5] = -kInf;
    for (int i = 0; i < vocab; ++i) {
      const int c = want_counts[static_cast<std::size_t>(vocab + i)], in_output = c & ((1 << 30) - 1);
      if (c != 0) row[i] = row[i] > 0 ? row[i] / 1.3f : row[i] * 1.3f;
      if (in_output > 0) row[i] -= 0.2f * static_cast<float>(in_output) + 0.4f;
    }
    const auto got = device.download();
    int bad = 0;
    for (std::size_t i = 0; i < x.size() && bad < 5; ++i) {
      if (got[i] == x[i] || std::abs(got[i] - x[i]) <= 1e-5f * (1 + std::abs(x[i]))) continue;
      ++bad;
      ADD_FAILURE() << "vocab " << vocab << " row " << i / static_cast<std::size_t>(ld) << " id "
                    << i % static_cast<std::size_t>(ld) << ": got " << got[i] << ", expected " << x[i] << ", before "
                    << before[i];
    }
  }
}

TEST_F(CudaProcessLogits, masks_forbid_exactly_the_ids_without_a_bit) {
  for (const int vocab : {1, 31, 33, 1000, 50257}) {
    const int n = 4, ld = vocab + 3, words = (vocab + 31) / 32;
    const std::vector<std::int32_t> masked = {2, 0};
    std::vector<std::uint32_t> bits(static_cast<std::size_t>(2 * words));
    for (auto& word : bits) word = static_cast<std::uint32_t>(random.bits());
    std::vector<float> x(static_cast<std::size_t>(n * ld));
    for (float& v : x) v = random.normal();
    DeviceArray<float> device(x);
    DeviceArray<std::int32_t> rows(masked);
    DeviceArray<std::uint32_t> device_bits(bits);
    cuda::mask_logits({device.get(), ld, n, vocab}, rows.get(), 2, device_bits.get(), stream);
    for (int m = 0; m < 2; ++m)
      for (int i = 0; i < vocab; ++i)
        if ((bits[static_cast<std::size_t>(m * words + i / 32)] >> (i % 32) & 1u) == 0)
          x[static_cast<std::size_t>(masked[static_cast<std::size_t>(m)] * ld + i)] = -kInf;
    const auto got = device.download();
    const auto wrong = std::mismatch(got.begin(), got.end(), x.begin()).first - got.begin();
    EXPECT_EQ(static_cast<std::size_t>(wrong), x.size())
        << "vocab " << vocab << " row " << wrong / ld << " id " << wrong % ld;
  }
}

}  // namespace
}  // namespace fastllm::test

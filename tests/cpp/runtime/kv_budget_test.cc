#include "runtime/kv_budget.h"

#include <gtest/gtest.h>

#include <string>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr std::int64_t kMiB = 1 << 20, kGiB = std::int64_t{1} << 30;

EngineConfig config(int max_model_len, int max_num_seqs, std::int64_t kv_bytes = 0, std::int64_t num_blocks = 0) {
  EngineConfig c;
  c.max_model_len = max_model_len, c.max_num_seqs = max_num_seqs, c.block_size = 16;
  c.kv_cache_bytes = kv_bytes, c.num_blocks = num_blocks;
  return c;
}

TEST(KvBudget, test_the_first_setting_given_decides) {
  const struct {
    EngineConfig config;
    std::int64_t bytes_per_block, memory_free, blocks;
  } rows[] = {
      {config(1000, 4), kMiB, 1000 * kGiB, 4 * 63 + 1},         // what the sequences need
      {config(1000, 256), kMiB, 1000 * kGiB, 4096},             // 4 GiB
      {config(1000, 256), kMiB, 1 * kGiB, 256},                 // a quarter of the free memory
      {config(1000, 256, 100 * kMiB), kMiB, 1 * kGiB, 100},     // kv_cache_bytes
      {config(1000, 1, 100 * kMiB), kMiB, 1 * kGiB, 100},       // more than the sequences need is the caller's wish
      {config(1000, 256, 100 * kMiB, 10), kMiB, 1 * kGiB, 11},  // num_blocks, though no full sequence fits
  };
  for (const auto& r : rows) EXPECT_EQ(kv_budget(r.config, r.bytes_per_block, r.memory_free).device_blocks, r.blocks);
  EngineConfig c = config(1000, 4);
  c.swap_bytes = 10 * kMiB + 1;
  EXPECT_EQ(kv_budget(c, kMiB, kGiB).host_blocks, 10);
}

TEST(KvBudget, test_too_little_memory_is_a_sentence_with_settings_that_work) {
  EngineConfig c = config(1000, 1, 10 * kMiB);
  try {
    kv_budget(c, kMiB, kGiB);
    FAIL() << "no error";
  } catch (const ResourceError& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("--max-model-len 144 "), std::string::npos) << text;
    EXPECT_NE(text.find("--kv-cache-memory-bytes " + std::to_string(64 * kMiB)), std::string::npos) << text;
  }
  c.max_model_len = 144;
  EXPECT_EQ(kv_budget(c, kMiB, kGiB).device_blocks, 10);
  c.max_model_len = 1000, c.kv_cache_bytes = 64 * kMiB;
  EXPECT_EQ(kv_budget(c, kMiB, kGiB).device_blocks, 64);
}

TEST(KvBudget, test_a_pool_beyond_the_free_memory_is_refused_with_a_size_that_fits) {
  for (const EngineConfig& c : {config(100, 1, 11 * kGiB), config(100, 1, 0, 11 * 1024), config(100, 1, INT64_MAX)}) {
    try {
      kv_budget(c, kMiB, 10 * kGiB);
      FAIL() << "no error";
    } catch (const ResourceError& e) {
      EXPECT_NE(std::string(e.what()).find("--kv-cache-memory-bytes " + std::to_string(9 * kGiB)), std::string::npos)
          << e.what();
    }
  }
}

}  // namespace
}  // namespace fastllm

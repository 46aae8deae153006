#include "runtime/kv_budget.h"

#include <gtest/gtest.h>

#include <string>

#include "fastllm/error.h"
#include "runtime/memory_advice.h"

namespace fastllm {
namespace {

constexpr std::int64_t kMiB = 1 << 20, kGiB = std::int64_t{1} << 30;

EngineConfig config(int max_model_len, int max_num_seqs, std::int64_t kv_bytes = 0, std::int64_t num_blocks = 0) {
  EngineConfig c;
  c.max_model_len = max_model_len, c.max_num_seqs = max_num_seqs, c.block_size = 16;
  c.kv_cache_bytes = kv_bytes, c.num_blocks = num_blocks;
  return c;
}

TEST(KvBudget, test_a_cache_is_what_its_device_can_keep) {
  const struct {
    const char *dtype, *cache;
    bool gpu;
    DType kept;
  } allowed[] = {{"bfloat16", "auto", false, DType::BF16},    {"float32", "auto", true, DType::F32},
                 {"bfloat16", "float16", false, DType::F16},  {"float32", "int8", false, DType::I8},
                 {"float32", "bfloat16", false, DType::BF16}, {"bfloat16", "bfloat16", true, DType::BF16},
                 {"bfloat16", "fp8", true, DType::F8E4M3}};
  EngineConfig c;
  for (const auto& row : allowed) {
    c.dtype = row.dtype, c.kv_cache_dtype = row.cache;
    EXPECT_EQ(kv_cache_dtype(c, row.gpu), row.kept) << row.dtype << " " << row.cache;
  }
  const struct {
    const char *dtype, *cache;
    bool gpu;
  } refused[] = {{"bfloat16", "fp8", false},    {"float32", "fp8", true},    {"bfloat16", "int8", true},
                 {"bfloat16", "float16", true}, {"bfloat16", "int4", false}, {"bfloat16", "int32", false}};
  for (const auto& row : refused) {
    c.dtype = row.dtype, c.kv_cache_dtype = row.cache;
    EXPECT_THROW(kv_cache_dtype(c, row.gpu), InvalidArgument) << row.dtype << " " << row.cache;
  }
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

std::string error_of(const EngineConfig& c, std::int64_t bytes_per_block, std::int64_t total, std::int64_t free) {
  try {
    gpu_kv_budget(c, bytes_per_block, total, free);
  } catch (const ResourceError& e) {
    return e.what();
  }
  return {};
}

TEST(GpuKvBudget, test_the_cache_is_what_utilization_leaves_after_the_worst_step) {
  EngineConfig c = config(4096, 256);
  c.gpu_memory_utilization = 0.5;
  // 80 GiB, 20 of them in use: 40 - 20 GiB remain.
  EXPECT_EQ(gpu_kv_budget(c, 2 * kMiB, 80 * kGiB, 60 * kGiB).device_blocks, 10 * 1024);
  c.swap_bytes = 4 * kGiB;
  EXPECT_EQ(gpu_kv_budget(c, 2 * kMiB, 80 * kGiB, 60 * kGiB).host_blocks, 2048);
  c.kv_cache_bytes = 30 * kGiB;  // the user's size may exceed the share
  EXPECT_EQ(gpu_kv_budget(c, 2 * kMiB, 80 * kGiB, 60 * kGiB).device_blocks, 15 * 1024);
  c.num_blocks = 7;
  EXPECT_EQ(gpu_kv_budget(c, 2 * kMiB, 80 * kGiB, 60 * kGiB).device_blocks, 8);
}

TEST(GpuKvBudget, test_a_tiny_model_gets_enough_blocks_not_all) {
  EXPECT_EQ(gpu_kv_budget(config(512, 16), 1024, 80 * kGiB, 79 * kGiB).device_blocks, 1 << 20);
  EXPECT_EQ(gpu_kv_budget(config(16 << 10, 2048), 1024, 80 * kGiB, 79 * kGiB).device_blocks, 2048 * 1024 + 1);
}

TEST(GpuKvBudget, test_too_little_room_names_flags_that_work) {
  EngineConfig c = config(1600, 1);
  c.gpu_memory_utilization = 0.5;
  // 10 GiB, 4 in use: 1 GiB holds 16 blocks of 64 MiB, one of them reserved; 101 blocks take 6.3 GiB.
  std::string text = error_of(c, 64 * kMiB, 10 * kGiB, 6 * kGiB);
  EXPECT_NE(text.find("--max-model-len 240 "), std::string::npos) << text;
  EXPECT_NE(text.find("--kv-cache-dtype fp8"), std::string::npos) << text;
  EXPECT_EQ(text.find("--gpu-memory-utilization"), std::string::npos) << text;

  c.max_model_len = 800;
  text = error_of(c, 64 * kMiB, 10 * kGiB, 6 * kGiB);
  EXPECT_NE(text.find("--gpu-memory-utilization 0.72"), std::string::npos) << text;
  c.gpu_memory_utilization = 0.72;
  EXPECT_EQ(error_of(c, 64 * kMiB, 10 * kGiB, 6 * kGiB), "");
  c.gpu_memory_utilization = 0.5, c.max_model_len = 240;
  EXPECT_EQ(error_of(c, 64 * kMiB, 10 * kGiB, 6 * kGiB), "");

  c.gpu_memory_utilization = 0.2;  // less than the weights take
  text = error_of(c, 64 * kMiB, 10 * kGiB, 6 * kGiB);
  EXPECT_NE(text.find("use --gpu-memory-utilization 0.50"), std::string::npos) << text;
}

TEST(MemoryAdvice, test_every_phase_names_a_smaller_value) {
  EngineConfig c;
  c.max_step_tokens = 8192, c.max_num_seqs = 1024, c.gpu_memory_utilization = 0.98;
  EXPECT_NE(memory_advice(StartPhase::Weights, c).find("--tensor-parallel-size 2"), std::string::npos);
  const std::string step = memory_advice(StartPhase::WorstStep, c);
  EXPECT_NE(step.find("--max-num-batched-tokens 4096"), std::string::npos) << step;
  EXPECT_NE(step.find("--max-num-seqs 512"), std::string::npos) << step;
  const std::string cache = memory_advice(StartPhase::KvCache, c);
  EXPECT_NE(cache.find("--gpu-memory-utilization 0.93"), std::string::npos) << cache;
  EXPECT_NE(cache.find("--enforce-eager"), std::string::npos) << cache;
  c.enforce_eager = true;
  EXPECT_EQ(memory_advice(StartPhase::KvCache, c).find("--enforce-eager"), std::string::npos);
}

TEST(MemoryAdvice, test_the_parts_of_a_gpus_memory_add_up) {
  StartUse use;
  use.loaded = {"gpu", 80 * kGiB, 64 * kGiB, 15 * kGiB};
  use.stepped = {"gpu", 80 * kGiB, 62 * kGiB, 15 * kGiB};
  use.ready = {"gpu", 80 * kGiB, 11 * kGiB, 15 * kGiB};
  use.kv_bytes = 50 * kGiB;
  const EngineMemory m = memory_of(use);
  EXPECT_EQ(m.weights, 15 * kGiB);
  EXPECT_EQ(m.activations, 2 * kGiB);
  EXPECT_EQ(m.graphs, 1 * kGiB);
  EXPECT_EQ(m.other, 1 * kGiB);
  EXPECT_EQ(m.weights + m.activations + m.graphs + m.kv_cache + m.other + m.free, m.total);
  EXPECT_EQ(memory_of(StartUse{}).total, 0);
}

}  // namespace
}  // namespace fastllm

// The public Engine on the null model: the configuration in force and the path from submit() to poll().
#include <gtest/gtest.h>

#include "fastllm/engine.h"
#include "fastllm/error.h"

namespace fastllm {
namespace {

using std::chrono::seconds;

RequestInput request(std::uint64_t id, int prompt, int max_tokens) {
  RequestInput input;
  input.id = id;
  for (int i = 0; i < prompt; ++i) input.prompt.push_back(i);
  input.sampling.max_tokens = max_tokens;
  return input;
}

TEST(EngineNull, AnswersAndTellsItsConfiguration) {
  EngineConfig config;
  config.num_blocks = 100;
  const auto engine = Engine::create_null(config, NullModel{});
  EXPECT_EQ(engine->config().max_model_len, 4096);
  EXPECT_GE(engine->config().cpu_threads, 1);
  EXPECT_EQ(engine->stats().total_blocks, 100);
  EXPECT_EQ(engine->spec().embed.vocab, 32000);
  engine->submit(request(1, 20, 7));
  std::vector<TokenDelta> deltas;
  std::size_t tokens = 0;
  for (bool ended = false; !ended;) {
    ASSERT_TRUE(engine->poll(deltas, seconds(60)));
    for (const TokenDelta& d : deltas) {
      tokens += d.tokens.size();
      ended = d.finish == FinishReason::Length;
    }
  }
  EXPECT_EQ(tokens, 7u);
  EXPECT_GT(engine->stats().host_s, 0);
  EXPECT_EQ(engine->memory().total, 0);
}

TEST(EngineNull, SizesTheKvCacheFromBlocksThenBytesThenTheModel) {
  EngineConfig config;
  config.kv_cache_bytes = 11 * 16 * 8;
  EXPECT_EQ(Engine::create_null(config, NullModel{})->config().num_blocks, 10);
  config.num_blocks = 5;
  EXPECT_EQ(Engine::create_null(config, NullModel{})->config().num_blocks, 5);
  EXPECT_GT(Engine::create_null(EngineConfig{}, NullModel{})->config().num_blocks, 1000);
}

TEST(EngineNull, RefusesAConfigurationByNameAndBound) {
  const auto message = [](auto change) -> std::string {
    EngineConfig config;
    change(config);
    try {
      Engine::create_null(config, NullModel{});
    } catch (const Error& e) {
      return e.what();
    }
    return {};
  };
  const std::string longer = message([](EngineConfig& c) { c.max_model_len = 5000; });
  EXPECT_NE(longer.find("5000"), std::string::npos);
  EXPECT_NE(longer.find("4096"), std::string::npos);
  EXPECT_NE(message([](EngineConfig& c) { c.tensor_parallel_size = 0; }).find("tensor_parallel_size"),
            std::string::npos);
  EXPECT_NE(message([](EngineConfig& c) { c.async_depth = 0; }).find("async_depth"), std::string::npos);
  EXPECT_NE(message([](EngineConfig& c) { c.block_size = -1; }).find("block_size"), std::string::npos);
  EXPECT_NE(message([](EngineConfig& c) { c.kv_cache_bytes = 1; }).find("kv_cache_bytes"), std::string::npos);
}

}  // namespace
}  // namespace fastllm

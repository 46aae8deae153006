// Faults made on purpose, and the engine's sign of life while one lasts.
#include "runtime/fault_executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "fastllm/error.h"
#include "runtime/engine_loop.h"
#include "runtime/null_executor.h"

namespace fastllm {
namespace {

using std::chrono::seconds;

std::unique_ptr<EngineLoop> loop_with(std::string_view faults) {
  EngineConfig config;
  config.max_model_len = 512;
  config.max_num_seqs = 4;
  NullModel model;
  model.max_len = 512;
  auto executor = with_faults(make_null_executor(config, model), parse_faults(faults));
  const KvConfig kv{.device_blocks = 65, .host_blocks = 0, .block_size = config.block_size, .prefix_caching = true};
  executor->init_kv(kv.device_blocks, kv.host_blocks);
  return std::make_unique<EngineLoop>(config, ModelLimits{model.vocab, model.max_len, {}}, kv, std::move(executor));
}

RequestInput request(std::uint64_t id) {
  RequestInput input;
  input.id = id;
  input.prompt = {1, 2, 3};
  input.sampling.max_tokens = 50;
  return input;
}

// The last delta of each of the requests 1..count.
std::vector<TokenDelta> ends_of(EngineLoop& loop, std::size_t count) {
  std::vector<TokenDelta> ends(count), news;
  for (std::size_t ended = 0; ended < count;) {
    if (!loop.poll(news, seconds(60))) break;
    for (const TokenDelta& delta : news) {
      if (delta.finish == FinishReason::None) continue;
      ends[static_cast<std::size_t>(delta.id - 1)] = delta;
      ++ended;
    }
  }
  return ends;
}

TEST(Faults, AreReadOrRefusedByPart) {
  const auto faults = parse_faults("hang@3,slow@2:50,nan@1");
  ASSERT_EQ(faults.size(), 3u);
  EXPECT_EQ(faults[0].milliseconds, -1);
  EXPECT_EQ(faults[1].step, 2u);
  EXPECT_EQ(faults[1].milliseconds, 50);
  for (const char* wrong : {"hang", "hang@", "hang@0", "slow@1", "burn@1", "hang@1:x", "hang@-1", "nan@1,,"})
    EXPECT_THROW(parse_faults(wrong), InvalidArgument) << wrong;
}

TEST(Faults, RowWithoutUsableLogitsEndsItsRequestOnly) {
  const auto loop = loop_with("nan@5");
  loop->submit(request(1));
  loop->submit(request(2));
  const auto ends = ends_of(*loop, 2);
  const TokenDelta& failed = ends[0].finish == FinishReason::Error ? ends[0] : ends[1];
  const TokenDelta& other = &failed == &ends[0] ? ends[1] : ends[0];
  EXPECT_EQ(failed.error_kind, ErrorKind::Engine);
  EXPECT_EQ(other.finish, FinishReason::Length);
  EXPECT_TRUE(loop->stats().healthy);
  EXPECT_EQ(loop->stats().block_leaks, 0);
  EXPECT_EQ(loop->stats().nan_rows, 1);
}

// Two requests with the same prompt, one after the other. The second finds 32 tokens in the cache, and the fault in one
// of its ten steps may be that of who computed them.
TEST(Faults, RowThatReadOthersKvIsComputedOnceMoreByItself) {
  for (const char* faults : {"nan@11", "nan@15", "nan@20", "nan@13,nan@14"}) {
    SCOPED_TRACE(faults);
    const auto loop = loop_with(faults);
    std::vector<std::vector<TokenId>> tokens;
    std::vector<TokenDelta> news;
    for (std::uint64_t id = 1; id <= 2; ++id) {
      RequestInput input = request(id);
      input.prompt.assign(40, 7);
      input.sampling.max_tokens = 10;
      input.sampling.temperature = 0;
      loop->submit(std::move(input));
      FinishReason finish = FinishReason::None;
      for (tokens.emplace_back(); finish == FinishReason::None && loop->poll(news, seconds(60));) {
        for (const TokenDelta& delta : news) {
          tokens.back().insert(tokens.back().end(), delta.tokens.begin(), delta.tokens.end());
          EXPECT_EQ(delta.cached_tokens, id == 1 ? 0 : 32);
          finish = delta.finish;
        }
      }
      EXPECT_EQ(finish, FinishReason::Length);
    }
    EXPECT_EQ(tokens[1], tokens[0]);
    EXPECT_EQ(loop->stats().nan_rows, 0);
    EXPECT_EQ(loop->stats().block_leaks, 0);
  }
}

// Three samples of a prompt that was computed before. Each may be hit, the first while the others wait to share its
// blocks, and several one after the other.
TEST(Faults, SamplesThatReadOthersKvAreComputedOnceMoreByThemselves) {
  const auto tokens_with = [](const char* faults) {
    const auto loop = loop_with(faults);
    std::vector<std::vector<TokenId>> tokens(3);
    std::vector<TokenDelta> news;
    for (std::uint64_t id = 1; id <= 2; ++id) {
      RequestInput input = request(id);
      input.prompt.assign(40, 7);
      input.sampling.max_tokens = 10;
      input.sampling.seed = 5;
      input.sampling.n = id == 1 ? 1 : 3;
      int live = input.sampling.n;
      loop->submit(std::move(input));
      while (live > 0 && loop->poll(news, seconds(60))) {
        for (const TokenDelta& delta : news) {
          if (delta.finish != FinishReason::None) {
            EXPECT_EQ(delta.finish, FinishReason::Length);
            --live;
          }
          if (id == 1) continue;
          auto& mine = tokens[static_cast<std::size_t>(delta.index)];
          mine.insert(mine.end(), delta.tokens.begin(), delta.tokens.end());
          EXPECT_EQ(delta.cached_tokens, 32);
        }
      }
    }
    EXPECT_EQ(loop->stats().nan_rows, 0);
    EXPECT_EQ(loop->stats().block_leaks, 0);
    return tokens;
  };
  const auto want = tokens_with("nan@1000");
  EXPECT_EQ(want[2].size(), 10u);
  for (const char* faults : {"nan@11", "nan@12", "nan@13", "nan@15", "nan@20", "nan@11,nan@12", "nan@14,nan@15"}) {
    SCOPED_TRACE(faults);
    EXPECT_EQ(tokens_with(faults), want);
  }
}

TEST(Faults, RowWithoutUsableLogitsFailsWhenItsOwnKvIsToBlame) {
  const auto loop = loop_with("nan@13,nan@17");  // the second comes after the prompt was computed again
  FinishReason finish = FinishReason::None;
  for (std::uint64_t id = 1; id <= 2; ++id) {
    RequestInput input = request(id);
    input.prompt.assign(40, 7);
    input.sampling.max_tokens = 10;
    loop->submit(std::move(input));
    std::vector<TokenDelta> news;
    for (finish = FinishReason::None; finish == FinishReason::None && loop->poll(news, seconds(60));)
      finish = news.back().finish;
    EXPECT_EQ(finish, id == 1 ? FinishReason::Length : FinishReason::Error);
  }
  EXPECT_EQ(loop->stats().nan_rows, 1);
}

TEST(Faults, FailedStepEndsEveryRequestAndTheEngine) {
  const auto loop = loop_with("error@4");
  loop->submit(request(1));
  loop->submit(request(2));
  for (const TokenDelta& end : ends_of(*loop, 2)) EXPECT_EQ(end.error_kind, ErrorKind::Engine);
  EXPECT_FALSE(loop->stats().healthy);
}

TEST(Heartbeat, TellsAStuckStepFromWorkAndFromSleep) {
  const auto loop = loop_with("hang@10:400");
  while (loop->heartbeat().busy) std::this_thread::yield();  // asleep: nothing to do
  loop->submit(request(1));
  double oldest = 0;
  std::uint64_t beats = 0;
  std::vector<TokenDelta> news;
  for (bool ended = false; !ended;) {
    const Heartbeat beat = loop->heartbeat();
    if (beat.busy) oldest = std::max(oldest, beat.age_s);
    EXPECT_GE(beat.count, beats);
    beats = beat.count;
    if (loop->poll(news, std::chrono::milliseconds(5))) ended = news.back().finish != FinishReason::None;
  }
  EXPECT_GT(oldest, 0.2);
  EXPECT_GT(loop->heartbeat().count, 100u);  // two and more for each of 50 steps
}

}  // namespace
}  // namespace fastllm

#include "sched/admission.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

namespace fastllm {
namespace {

constexpr AdmissionLimits kLimits{.vocab = 100, .max_len = 50, .pool_tokens = 40, .max_num_seqs = 8, .max_logprobs = 5};

RequestInput good() {
  RequestInput input;
  input.prompt = {1, 2, 3};
  return input;
}

TEST(Admission, AcceptsTheDefaultsAndEveryBound) {
  EXPECT_EQ(admission_error(good(), kLimits), "");
  RequestInput input = good();
  input.prompt.assign(40, 99);
  SamplingParams& p = input.sampling;
  p.temperature = 0;
  p.top_k = -1;
  p.min_p = 1;
  p.presence_penalty = -2;
  p.frequency_penalty = 2;
  p.n = 8;
  p.min_tokens = p.max_tokens = std::numeric_limits<int>::max();
  p.logprobs = p.prompt_logprobs = 5;
  p.stop_ids = {0, 99};
  p.logit_bias = {{99, -100.0f}};
  EXPECT_EQ(admission_error(input, kLimits), "");
}

TEST(Admission, EverySentenceNamesFieldValueAndBound) {
  static constexpr float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  struct Case {
    std::function<void(RequestInput&)> break_it;
    std::vector<const char*> words;
  };
  const std::vector<Case> cases = {
      {[](auto& r) { r.prompt.clear(); }, {"prompt", "empty"}},
      {[](auto& r) { r.prompt[1] = 100; }, {"prompt[1]", "100", "99"}},
      {[](auto& r) { r.prompt[2] = -1; }, {"prompt[2]", "-1", "99"}},
      {[](auto& r) { r.prompt.assign(50, 1); }, {"prompt", "50"}},
      {[](auto& r) { r.prompt.assign(41, 1); }, {"prompt", "41", "40", "num_blocks"}},
      {[](auto& r) { r.sampling.temperature = -0.5f; }, {"temperature", "-0.5", "0"}},
      {[](auto& r) { r.sampling.temperature = nan; }, {"temperature", "nan"}},
      {[](auto& r) { r.sampling.temperature = inf; }, {"temperature", "inf"}},
      {[](auto& r) { r.sampling.top_p = 0; }, {"top_p", "0", "1"}},
      {[](auto& r) { r.sampling.top_p = 1.5f; }, {"top_p", "1.5"}},
      {[](auto& r) { r.sampling.top_p = nan; }, {"top_p", "nan"}},
      {[](auto& r) { r.sampling.min_p = -0.1f; }, {"min_p", "-0.1"}},
      {[](auto& r) { r.sampling.min_p = nan; }, {"min_p", "nan"}},
      {[](auto& r) { r.sampling.top_k = -2; }, {"top_k", "-2"}},
      {[](auto& r) { r.sampling.repetition_penalty = 0; }, {"repetition_penalty", "0"}},
      {[](auto& r) { r.sampling.repetition_penalty = inf; }, {"repetition_penalty", "inf"}},
      {[](auto& r) { r.sampling.presence_penalty = 2.5f; }, {"presence_penalty", "2.5", "-2", "2"}},
      {[](auto& r) { r.sampling.frequency_penalty = nan; }, {"frequency_penalty", "nan"}},
      {[](auto& r) { r.sampling.n = 0; }, {"n is 0", "1", "8"}},
      {[](auto& r) { r.sampling.n = 9; }, {"n is 9", "1", "8"}},
      {[](auto& r) { r.sampling.beam_width = 9; }, {"beam_width", "9", "8"}},
      {[](auto& r) { r.sampling.beam_width = -1; }, {"beam_width", "-1"}},
      {[](auto& r) { r.sampling.beam_width = 6; }, {"beam_width is 6", "max_logprobs is 5"}},
      {[](auto& r) {
         r.sampling.beam_width = 2;
         r.sampling.length_penalty = nan;
       },
       {"length_penalty", "nan"}},
      {[](auto& r) { r.sampling.allowed_ids = {3, 100}; }, {"allowed_ids[1]", "100"}},
      {[](auto& r) { r.sampling.bad_words = {{1}, {2, -1}}; }, {"bad_words[1]", "-1"}},
      {[](auto& r) { r.sampling.bad_words = {{}}; }, {"bad_words"}},
      {[](auto& r) {
         r.sampling.allowed_ids = {3, 4};
         r.sampling.bad_words = {{3}, {5, 6}, {4}};
       },
       {"allowed_ids", "bad_words"}},
      {[](auto& r) { r.sampling.max_tokens = 0; }, {"max_tokens", "0", "1"}},
      {[](auto& r) { r.sampling.min_tokens = -1; }, {"min_tokens", "-1"}},
      {[](auto& r) { r.sampling.min_tokens = 17; }, {"min_tokens", "17", "16"}},
      {[](auto& r) { r.sampling.logprobs = 6; }, {"logprobs", "6", "5"}},
      {[](auto& r) { r.sampling.prompt_logprobs = -2; }, {"prompt_logprobs", "-2"}},
      {[](auto& r) { r.sampling.stop_ids = {5, 100}; }, {"stop_ids[1]", "100"}},
      {[](auto& r) { r.sampling.logit_bias = {{-1, 0.0f}}; }, {"logit_bias[0]", "-1"}},
      {[](auto& r) { r.sampling.logit_bias = {{7, nan}}; }, {"logit_bias", "7", "nan"}},
      {[](auto& r) { r.adapter = 3; }, {"adapter", "3"}},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    RequestInput input = good();
    cases[i].break_it(input);
    const std::string error = admission_error(input, kLimits);
    EXPECT_FALSE(error.empty()) << "case " << i;
    for (const char* word : cases[i].words) EXPECT_NE(error.find(word), std::string::npos) << error << " / " << word;
  }
}

TEST(Admission, TheTokenLimitIsTheNearestOfThree) {
  RequestInput input = good();
  EXPECT_EQ(token_limit(input, kLimits), 3 + 16);
  input.sampling.max_tokens = std::numeric_limits<int>::max();
  EXPECT_EQ(token_limit(input, kLimits), 41) << "the last token needs no KV";
  AdmissionLimits roomy = kLimits;
  roomy.pool_tokens = 1000;
  EXPECT_EQ(token_limit(input, roomy), 50);
}

}  // namespace
}  // namespace fastllm

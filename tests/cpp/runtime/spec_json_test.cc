#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "fastllm/error.h"
#include "fastllm/model_spec.h"
#include "model_fixture.h"

namespace fastllm {
namespace {

std::string with(const std::string& from, const std::string& to) {
  std::string text = spec_to_json(testing::llama_spec());
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

// The message of the error that reading `json` throws.
std::string error_of(const std::string& json) {
  try {
    spec_from_json(json);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

TEST(SpecJson, test_round_trip_keeps_every_field) {
  for (const auto& [name, spec] : testing::test_specs()) {
    const std::string json = spec_to_json(spec);
    EXPECT_EQ(spec_to_json(spec_from_json(json)), json) << name;
  }
  ModelSpec s = testing::llama_spec();
  auto& rope = s.kinds[0].attn.rope;
  rope.scaling.kind = RopeScalingKind::LongRope;
  rope.scaling.factor = 1.0 / 3.0;
  rope.scaling.original_max_len = 4096;
  rope.scaling.short_factor.assign(8, 1.1);
  rope.scaling.long_factor.assign(8, 2.2);
  s.kinds[0].pre_attn.eps = 1e-5f;
  const ModelSpec back = spec_from_json(spec_to_json(s));
  EXPECT_EQ(back.kinds[0].attn.rope.scaling.kind, RopeScalingKind::LongRope);
  EXPECT_EQ(back.kinds[0].attn.rope.scaling.factor, 1.0 / 3.0);
  EXPECT_EQ(back.kinds[0].attn.rope.scaling.long_factor, rope.scaling.long_factor);
  EXPECT_EQ(back.kinds[0].pre_attn.eps, 1e-5f);
  EXPECT_EQ(back.eos, s.eos);
}

TEST(SpecJson, test_absent_fields_take_their_defaults) {
  const ModelSpec s = spec_from_json(R"({"embed": {"vocab": 10, "hidden": 8}, "max_len": 16, "layer_kind": [0],
      "kinds": [{"attn": {"heads": 2, "kv_heads": 1, "head_dim": 4}, "ffn": {"inner": 8, "act": "gelu_tanh"}}]})");
  EXPECT_EQ(s.embed.scale, 1.0f);
  EXPECT_EQ(s.kinds[0].attn.rope.dim, 0);
  EXPECT_EQ(s.kinds[0].pre_attn.kind, NormKind::None);
  EXPECT_TRUE(s.kinds[0].ffn.gated);
  EXPECT_EQ(s.kinds[0].ffn.act, Activation::GeluTanh);
}

TEST(SpecJson, test_errors_name_the_field) {
  const struct {
    std::string json, message;
  } rows[] = {
      {"{", "not JSON"},
      {"[]", "not an object"},
      {with("\"vocab\": 97", "\"vocab\": 97, \"vocabulary\": 1"), "spec.embed.vocabulary is not a field"},
      {with("\"vocab\": 97", "\"vocab\": 97.5"), "spec.embed.vocab is 97.5, not a 32-bit integer"},
      {with("\"vocab\": 97", "\"vocab\": 4294967393"), "spec.embed.vocab"},
      {with("\"vocab\": 97", "\"vocab\": \"97\""), "spec.embed.vocab"},
      {with("\"vocab\": 97", "\"vocab\": null"), "spec.embed.vocab"},
      {with("\"vocab\": 97", "\"vocab\": 0"), "embed.vocab is 0; allowed are 1 to"},
      {with("\"rms\"", "\"rmsnorm\""), "known are none, rms, layer"},
      {with("\"gated\": true", "\"gated\": 1"), "not true or false"},
      {with("\"heads\": 4", "\"heads\": 3"), "not a multiple of kv_heads"},
      {with("\"dim\": 16", "\"dim\": 15"), "it must be even"},
      {with("\"dim\": 16", "\"dim\": 18"), "attn.rope.dim is 18; allowed are 0 to 16"},
      {with("\"theta\": 10000.0", "\"theta\": -1"), "attn.rope.theta"},
      {with("\"inner\": 96", "\"inner\": 2147483647"), "ffn.inner"},
      {with("\"max_len\": 128", "\"max_len\": 2000000000"), "max_len"},
      {with("\"family\": \"test\"", "\"family\": 3"), "spec.family is 3, not a string"},
      {with("\"scale\": 1.0", "\"scale\": 1e300"), "beyond 32-bit floats"},
  };
  for (const auto& row : rows) EXPECT_NE(error_of(row.json).find(row.message), std::string::npos) << error_of(row.json);
}

TEST(SpecJson, test_check_spec_refuses_what_cannot_run) {
  const struct {
    const char* message;
    std::function<void(ModelSpec&)> change;
  } rows[] = {
      {"layer_kind[1]", [](ModelSpec& s) { s.layer_kind[1] = 1; }},
      {"number of layers", [](ModelSpec& s) { s.layer_kind.clear(); }},
      {"eos", [](ModelSpec& s) { s.eos = {97}; }},
      {"learned positions", [](ModelSpec& s) { s.embed.learned_positions = 100; }},
      {"parallel", [](ModelSpec& s) { s.kinds[0].parallel = true, s.kinds[0].post_ffn.kind = NormKind::Rms; }},
      {"only layer norms", [](ModelSpec& s) { s.head.final_norm.bias = true; }},
      {"KV block shape", [](ModelSpec& s) { s.kinds.push_back(s.kinds[0]), s.kinds[1].attn.head_dim = 32; }},
      {"original_max_len", [](ModelSpec& s) { s.kinds[0].attn.rope.scaling.kind = RopeScalingKind::Llama3; }},
      {"short_factor",
       [](ModelSpec& s) {
         s.kinds[0].attn.rope.scaling.kind = RopeScalingKind::LongRope;
         s.kinds[0].attn.rope.scaling.original_max_len = 64;
       }},
  };
  for (const auto& row : rows) {
    ModelSpec s = testing::llama_spec();
    row.change(s);
    try {
      check_spec(s);
      ADD_FAILURE() << "no error about " << row.message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(row.message), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace fastllm

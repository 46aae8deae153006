#include "fastllm/c_api.h"

#include <gtest/gtest.h>
#include <stdlib.h>  // mkdtemp

#include <array>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/cpu_topology.h"
#include "model/bundle_writer.h"
#include "model_fixture.h"

namespace fastllm {
namespace {

class CApi : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "fastllm_c_api_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
    const ModelSource source = model_.source();
    std::ofstream(dir_ + "/spec.json") << spec_to_json(source.spec);
    write_weights(source.spec, source.weights, dir_ + "/model.safetensors", "float32");
    fl_engine_config_init(&config_);
    config_.max_num_seqs = 2;
    config_.cpu_threads = 1;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  // The sentence of an open that is refused for what the caller gave.
  std::string refused() {
    std::array<char, 512> error{};
    fl_engine* engine = nullptr;
    EXPECT_EQ(fl_engine_open(dir_.c_str(), &config_, &engine, error.data(), error.size()), FL_INVALID_ARGUMENT);
    EXPECT_EQ(engine, nullptr);
    return error.data();
  }

  std::vector<int> generate(int tokens) {
    std::array<char, 512> error{};
    fl_engine* engine = nullptr;
    EXPECT_EQ(fl_engine_open(dir_.c_str(), &config_, &engine, error.data(), error.size()), FL_OK) << error.data();
    if (engine == nullptr) return {};
    fl_sampling sampling;
    fl_sampling_init(&sampling);
    sampling.temperature = 0;
    sampling.max_tokens = tokens;
    sampling.ignore_eos = 1;
    const std::array<int32_t, 3> prompt = {3, 17, 42};
    EXPECT_EQ(fl_submit(engine, 1, prompt.data(), prompt.size(), &sampling, nullptr, 0), FL_OK);
    std::vector<int> out;
    for (bool running = true; running;) {
      fl_batch* batch = nullptr;
      if (fl_poll(engine, 1000, &batch, nullptr, 0) != FL_OK) break;
      for (std::size_t i = 0; i < fl_batch_size(batch); ++i) {
        const fl_delta delta = fl_batch_get(batch, i);
        out.insert(out.end(), delta.tokens, delta.tokens + delta.num_tokens);
        EXPECT_NE(delta.finish, FL_ERROR) << delta.error;
        running = running && delta.finish == FL_RUNNING;
      }
      fl_batch_destroy(batch);
    }
    fl_engine_destroy(engine);
    return out;
  }

  testing::TestModel model_ = testing::random_model(testing::llama_spec(), 7);
  std::string dir_;
  fl_engine_config config_;
};

TEST_F(CApi, a_wrong_field_is_named_with_its_value) {
  const struct {
    const char* fl_engine_config::* field;
    const char *value, *sentence;
  } cases[] = {
      {&fl_engine_config::device, "tpu", "device is 'tpu'"},
      {&fl_engine_config::quantization, "int3", "int3"},
      {&fl_engine_config::kv_cache_dtype, "int3", "kv_cache_dtype is 'int3'"},
      {&fl_engine_config::cpu_bind, "0-x", "cpu_bind is '0-x'"},
  };
  for (const auto& c : cases) {
    config_.*c.field = c.value;
    EXPECT_NE(refused().find(c.sentence), std::string::npos) << c.value << ": " << refused();
    config_.*c.field = nullptr;
  }
  config_.gpu_memory_utilization = 1.5;
  EXPECT_NE(refused().find("gpu_memory_utilization is 1.5"), std::string::npos) << refused();
}

TEST_F(CApi, a_thread_bound_to_a_listed_cpu_gives_the_same_tokens) {
  const std::vector<int> expected = generate(6);
  EXPECT_EQ(expected.size(), 6u);
  const std::string cpu = std::to_string(allowed_cpus().back());
  config_.cpu_bind = cpu.c_str();
  EXPECT_EQ(generate(6), expected);
}

TEST_F(CApi, weights_are_quantised_when_asked_for) {
  config_.quantization = "int8";
  EXPECT_EQ(generate(6).size(), 6u);
}

}  // namespace
}  // namespace fastllm

#include "model/bundle.h"

#include <gtest/gtest.h>
#include <stdlib.h>  // mkdtemp

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "fastllm/error.h"
#include "model/safetensors.h"
#include "model/weight_loader.h"
#include "model_fixture.h"

namespace fastllm {
namespace {

class Bundle : public ::testing::Test {
 protected:
  void SetUp() override {
    // Unique among processes too: tests run side by side.
    std::string name = ::testing::TempDir() + "fastllm_bundle_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string path(const std::string& name) const { return (dir_ / name).string(); }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  // A file with this header and `data` bytes behind it; `length` overrides what the file says of its header.
  void write_tensors(const std::string& header, std::size_t data, std::uint64_t length = 0) const {
    std::string bytes(8, '\0');
    const std::uint64_t n = length != 0 ? length : header.size();
    for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>((n >> (8 * i)) & 255);
    write("model.safetensors", bytes + header + std::string(data, '\x3f'));
  }

  std::filesystem::path dir_;
};

TEST_F(Bundle, test_a_written_bundle_is_read_back) {
  const auto model = testing::random_model(testing::llama_spec(), 5);
  std::string header = R"({"__metadata__": {"format": "pt"})", data;
  for (const auto& [name, values] : model.weights) {
    std::string shape;
    for (const auto& w : canonical_weights(model.spec))
      if (w.name == name)
        for (auto d : w.shape) shape += (shape.empty() ? "" : ",") + std::to_string(d);
    const auto begin = data.size();
    data.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    header += ",\"";
    header += name + R"(":{"dtype":"F32","shape":[)" + shape + R"(],"data_offsets":[)" + std::to_string(begin) + "," +
              std::to_string(data.size()) + "]}";
  }
  header += "}";
  write("spec.json", spec_to_json(model.spec));
  write_tensors(header, 0);
  std::ofstream(path("model.safetensors"), std::ios::binary | std::ios::app)
      .write(data.data(), static_cast<std::streamsize>(data.size()));

  const ModelSource source = read_bundle(dir_.string());
  const WeightLoader loader(source, 0, 1);
  for (const std::string name : {"embed.tokens.weight", "layers.2.ffn.down.weight"}) {
    const HostMatrix m = loader.matrix(name);
    std::vector<float> values(static_cast<std::size_t>(m.rows * m.cols));
    m.read(0, m.rows, values.data());
    EXPECT_EQ(values, model[name]);
  }
  EXPECT_EQ(loader.total_bytes(), static_cast<std::int64_t>(data.size()));
}

TEST_F(Bundle, test_hostile_headers_are_refused) {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  write_tensors(good, 8);
  ASSERT_EQ(read_safetensors(path("model.safetensors")).size(), 1u);
  const struct {
    std::string header;
    std::size_t data;
    std::uint64_t length;
    const char* message;
  } rows[] = {
      {good, 8, 1u << 30, "header claims"},
      {good, 8, ~std::uint64_t{0}, "header claims"},
      {good, 7, 0, "outside"},
      {"not json", 8, 0, "not JSON"},
      {"[1]", 8, 0, "not a JSON object"},
      {std::string(1000, '['), 8, 0, "nested too deeply"},
      {R"({"a":7})", 8, 0, "not an object"},
      {R"({"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})", 8, 0, "dtype of tensor 'a' is I64"},
      {R"({"a":{"shape":[2],"data_offsets":[0,8]}})", 8, 0, "missing"},
      {R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8, 0, "no valid shape"},
      {R"({"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}})", 8, 0, "no valid shape"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, 0, "need 12"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}})", 8, 0, "more than 2^63"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, 0, "outside"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}})", 8, 0, "no valid data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", 8, 0, "outside"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
       12, 0, "overlap"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       8, 0, "listed twice"},
  };
  for (const auto& row : rows) {
    write_tensors(row.header, row.data, row.length);
    try {
      read_safetensors(path("model.safetensors"));
      ADD_FAILURE() << "no error for " << row.header;
    } catch (const LoadError& e) {
      EXPECT_NE(std::string(e.what()).find(row.message), std::string::npos) << e.what();
    }
  }
  for (const std::string bytes : {"", "1234567", "\x10"}) {
    write("model.safetensors", bytes);
    EXPECT_THROW(read_safetensors(path("model.safetensors")), LoadError);
  }
  EXPECT_THROW(read_safetensors(path("absent")), LoadError);
  EXPECT_THROW(read_safetensors(dir_.string()), LoadError);
  EXPECT_THROW(read_bundle(path("absent")), LoadError);
}

}  // namespace
}  // namespace fastllm

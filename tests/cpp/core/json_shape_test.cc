#include "base/json_shape.h"

#include <gtest/gtest.h>

#include <string>

namespace fastllm {
namespace {

struct Case {
  std::string text;
  JsonShape want;
};

TEST(JsonShape, CountsWhatIsOutsideOfStrings) {
  const Case cases[] = {
      {"", {0, 0, 0}},
      {"7", {0, 0, 0}},
      {R"({"a": 1, "b": [1, 2, 3]})", {2, 2, 3}},
      {R"({"a,b:[{": "\"],:{[\\"})", {1, 1, 0}},
      {R"([[1, 2], [1, 2, 3, 4], []])", {2, 0, 4}},
      {R"([{"a": {"b": 1}}, {"a": 1, "b": 2, "c": 3}])", {3, 3, 2}},
      {R"(["unfinished \")", {1, 0, 0}},
      {"]]}}:,", {0, 0, 0}},
      {std::string(5000, '['), {kMaxJsonDepth, 0, 0}},
  };
  for (const Case& c : cases) {
    const JsonShape shape = json_shape(c.text);
    EXPECT_EQ(shape.depth, c.want.depth) << c.text;
    EXPECT_EQ(shape.keys, c.want.keys) << c.text;
    EXPECT_EQ(shape.elements, c.want.elements) << c.text;
  }
}

}  // namespace
}  // namespace fastllm

#include "base/json_body.h"

#include <gtest/gtest.h>

#include <string>
#include <variant>
#include <vector>

namespace fastllm {
namespace {

JsonBody read(std::string_view text) {
  return read_json_body(text, {.fields = {"input", "prompt", "user"}, .ids_field = "prompt", .mark = "77"});
}

// "[0,1,2,...]"
std::string ids(int count, const std::string& last = "") {
  std::string out = "[";
  for (int i = 0; i < count; ++i) out += (i > 0 ? "," : "") + std::to_string(i);
  return out + last + "]";
}

const std::vector<std::int32_t>& ids_of(const JsonCut& cut) { return std::get<std::vector<std::int32_t>>(cut.value); }

TEST(JsonBody, ShapeIsOfWhatIsOutsideOfStrings) {
  struct Case {
    std::string text;
    std::int64_t depth, keys, elements;
  };
  const Case cases[] = {
      {"", 0, 0, 0},
      {"7", 0, 0, 0},
      {R"({"a": 1, "b": [1, 2, 3]})", 2, 2, 3},
      {R"({"a,b:[{": "\"],:{[\\"})", 1, 1, 0},
      {R"([[1, 2], [1, 2, 3, 4], []])", 2, 0, 4},
      {R"([{"a": {"b": 1}}, {"a": 1, "b": 2, "c": 3}])", 3, 3, 2},
      {R"([7, "unfinished)", 1, 0, 1},
      {R"({"prompt": )" + ids(500) + "}", 2, 1, 500},
      {std::string(5000, '['), kMaxJsonDepth, 0, 1},
  };
  for (const Case& c : cases) {
    const JsonBody body = read(c.text);
    EXPECT_EQ(body.depth.count, c.depth) << c.text;
    EXPECT_EQ(body.keys.count, c.keys) << c.text;
    EXPECT_EQ(body.elements.count, c.elements) << c.text;
  }
  EXPECT_EQ(read(R"({"a": [1], "b": [1, 2]})").elements.field, "b");
  EXPECT_EQ(read(R"([[1, 2]])").elements.field, std::nullopt);
}

TEST(JsonBody, WhatIsNoJsonIsRefusedWithItsPlace) {
  const std::string surrogate = "surrogate U+D800..U+DBFF must be followed by U+DC00..U+DFFF";
  const std::pair<std::string, std::string> cases[] = {
      {" ", "unexpected end of input"},
      {"", "pars"},
      {R"({"user": 1)", "unexpected end of input; expected '}' (byte 11)"},
      {R"({"user": "a)", "missing closing quote"},
      {R"({"user": tru)", "invalid literal"},
      {R"({"user": -)", "expected digit after '-'"},
      {R"({"user": "\ud800)", surrogate},
      {R"({"user": "\ud800\u0041"})", surrogate},
      {R"({"user": "\udc00"})", "U+DC00..U+DFFF must follow U+D800..U+DBFF"},
      {R"({"user": "\u00g0"})", "'\\u' must be followed by 4 hex digits (byte 15)"},
      {R"({"user": "\x"})", "forbidden character after backslash (byte 12)"},
      {"{\"user\": \"a\nb\"}", "control character U+000A (LF) must be escaped"},
      {"{\"user\": \"\xff\"}", "ill-formed UTF-8 byte (byte 11)"},
      {"{\"user\": \"\xc0\x80\"}", "ill-formed UTF-8"},
      {"{\"user\": \"\xed\xa0\x80\"}", "ill-formed UTF-8"},
      {"{\"user\": \"\xf4\x90\x80\x80\"}", "ill-formed UTF-8"},
      {"{\"unread\": \"\xe5\xa5\"}", "ill-formed UTF-8"},
      {R"({"user": nul})", "invalid literal (byte 13)"},
      {R"({"user": NaN})", "invalid literal"},
      {R"({"user": 01})", "unexpected number literal; expected '}'"},
      {R"({"user": 1.})", "expected digit after '.'"},
      {R"({"user": 1e})", "invalid number"},
      {R"({"user": 1e999})", "a number is out of range (byte 14)"},
      {R"({"user": 1,})", "unexpected '}'; expected string literal (byte 12)"},
      {R"({"user": [1 2]})", "unexpected number literal; expected ']' (byte 13)"},
      {R"({"user" 1})", "expected ':'"},
      {R"({1: 2})", "expected string literal"},
      {R"({} x)", "invalid literal (byte 4)"},
      {R"({} {})", "unexpected '{'; expected end of input"},
      {std::string("{}\0", 3), "invalid literal (byte 3)"},
      {std::string("{\"user\": \"\0\"}", 13), "invalid string"},
      {R"({"user": [1}})", "unexpected '}'; expected ']'"},
      {"\xef\xbb\xbf\xef\xbb\xbf{}", "invalid literal"},
      {"{\n \n\t \"user\":\r\n\r\n tru}", "invalid literal (byte 22)"},
      {"{" + std::string(1000, '\n') + "x", "invalid literal (byte 1002)"},
      {R"({"prompt": )" + ids(100, ",") + "}", "unexpected ']'"},
      {R"({"prompt": )" + ids(100, " 7") + "}", "unexpected number literal; expected ']'"},
  };
  for (const auto& [text, says] : cases) {
    const std::string error = read(text).error;
    EXPECT_NE(error.find(says), std::string::npos) << text << ": " << error;
    EXPECT_EQ(error.find("exception"), std::string::npos) << error;
    EXPECT_EQ(error.find("last read"), std::string::npos) << error;
  }
  for (const std::string good :
       {R"( {"user" : [ ] , "x":{ }, "y": -0.5e+7, "z": [true, false, null]} )", "\xef\xbb\xbf{}",
        R"({"user": "\ud83d\ude00 \u00e4"})", "{\"user\": \"\xf0\x9f\x98\x80\x7f\"}"}) {
    EXPECT_EQ(read(good).error, "") << good;
  }
  EXPECT_EQ(read(R"({"input": [1e999]})").error_field, "input");
}

TEST(JsonBody, CutsLongIdsAndDropsFieldsThatNobodyReads) {
  const JsonBody flat = read(R"({"zz": [1, {"a": 2}], "prompt": )" + ids(300) + R"(, "user": "x", "": 1})");
  EXPECT_EQ(flat.small, R"({"":null,"prompt":[770],"user":"x","":null})");
  EXPECT_EQ(flat.unknown, (std::vector<std::string>{"zz", ""}));
  EXPECT_EQ(flat.values, 2);
  ASSERT_EQ(flat.cuts.size(), 1);
  EXPECT_EQ(flat.cuts[0].at.parent, -1);
  EXPECT_EQ(flat.cuts[0].at.key, "prompt");
  ASSERT_EQ(ids_of(flat.cuts[0]).size(), 300);
  EXPECT_EQ(ids_of(flat.cuts[0])[299], 299);

  const JsonBody nested =
      read(R"({"pro\u006dpt": [[1, 2], )" + ids(100) + ", [ -1.0 " + ids(99).replace(0, 1, ",") + "]}");
  EXPECT_EQ(nested.small, R"({"prompt":[[1,2],[770],[771]]})");
  EXPECT_EQ(nested.values, 5);
  ASSERT_EQ(nested.cuts.size(), 2);
  EXPECT_EQ(nested.cuts[1].at.parent, 0);
  EXPECT_EQ(nested.cuts[1].at.index, 2);
  EXPECT_EQ(ids_of(nested.cuts[1])[0], -1);
  ASSERT_EQ(nested.places.size(), 1);
  EXPECT_EQ(nested.places[0].key, "prompt");

  EXPECT_EQ(read(R"({"input": )" + ids(300) + "}").cuts.size(), 0);
}

TEST(JsonBody, CopyHasTheSameValues) {
  const std::pair<std::string, std::string> cases[] = {
      {R"("\" \\ \/ \b\f\n\r\t\u0001\u00e4\ud83d\ude00")", "\"\\\" \\\\ / \\b\\f\\n\\r\\t\\u0001\u00e4\U0001f600\""},
      {"\"\u00e4\U0001f600\x7f\"", "\"\u00e4\U0001f600\x7f\""},
      {R"({ "a\n" : { } , "b" : [ ] })", R"({"a\n":{},"b":[]})"},
      {"[ -7, 0, 18446744073709551615, -9223372036854775808 ]", "[-7,0,18446744073709551615,-9223372036854775808]"},
      {"[18446744073709551616, 0.1000, 1e2, -0.0, 1E-400]", "[18446744073709551616,0.1000,1e2,-0.0,1E-400]"},
      {"[true,false,null]", "[true,false,null]"},
  };
  for (const auto& [value, small] : cases) {
    const JsonBody body = read(R"({"user": )" + value + R"(, "prompt": [1, 2.0, "a"]})");
    EXPECT_EQ(body.error, "");
    EXPECT_EQ(body.small, R"({"user":)" + small + R"(,"prompt":[1,2.0,"a"]})");
  }
}

TEST(JsonBody, FirstElementThatIsNoIdIsFound) {
  for (const std::string bad : {"1.5", "2147483648", "-99999999999", "\"x\"", "null", "[1]"}) {
    const JsonBody flat = read(R"({"prompt": )" + ids(100, "," + bad) + "}");
    ASSERT_TRUE(flat.bad_id) << bad;
    EXPECT_EQ(flat.bad_id->list, -1);
    EXPECT_EQ(flat.bad_id->index, 100);
    EXPECT_TRUE(bad.starts_with(flat.bad_id->text)) << flat.bad_id->text;
    const JsonBody nested = read(R"({"prompt": [[7], )" + ids(100, "," + bad) + "]}");
    ASSERT_TRUE(nested.bad_id) << bad;
    EXPECT_EQ(nested.bad_id->list, 1);
  }
  EXPECT_FALSE(read(R"({"prompt": [1, "x"]})").bad_id) << "a short list is left to the decoder";
}

TEST(JsonBody, CutsLongTextsWhereTheyAre) {
  const std::string text(20'000, 'a');
  const std::string json = R"({"user":"b","input":[0,{"k":[[],")" + text + R"("]},")" + text + R"("]})";
  const JsonBody body = read(json);
  EXPECT_EQ(body.small, R"({"user":"b","input":[0,{"k":[[],"770"]},"771"]})");
  ASSERT_EQ(body.cuts.size(), 2);
  ASSERT_EQ(body.places.size(), 3);  // input, input[1], input[1].k
  EXPECT_EQ(body.places[1].parent, 0);
  EXPECT_EQ(body.places[1].index, 1);
  EXPECT_EQ(body.places[2].key, "k");
  EXPECT_EQ(body.cuts[0].at.parent, 2);
  EXPECT_EQ(body.cuts[0].at.index, 1);
  EXPECT_EQ(body.cuts[1].at.parent, 0);
  EXPECT_EQ(body.cuts[1].at.index, 2);
  EXPECT_EQ(std::get<std::string>(body.cuts[1].value), text);
}

TEST(JsonBody, ManyShorterTextsAreCutUntilTheRestIsSmall) {
  std::string json = R"({"input":[)";
  for (int i = 0; i < 4000; ++i) json += (i > 0 ? ",\"" : "\"") + std::string(1000, 'a') + "\"";
  const JsonBody body = read(json + "]}");
  EXPECT_EQ(body.cuts.size(), 4000);
  EXPECT_EQ(body.values, 4002);
  EXPECT_LT(body.small.size(), 100'000);
}

}  // namespace
}  // namespace fastllm

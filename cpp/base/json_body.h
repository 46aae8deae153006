// A request body read without an interpreter: whether it is JSON, its shape, and a copy without its long values.
//
//   {"prompt": [1, 2, ... 100,000 ids], "user": "x", "unknown": {...}}      text
//   {"prompt":[MARK0],"user":"x","":null}                                   small; cuts: MARK0 = the ids
// What decodes the small copy puts the long values back where it finds their marks.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace fastllm {

struct JsonRules {
  std::vector<std::string> fields;  // of the top level that somebody reads; the values of others are dropped
  std::string ids_field;            // the one of them that may hold token ids or lists of them; "": none
  std::string mark;                 // decimal digits that no client can guess; cut i is marked mark + i
};

struct JsonMost {
  std::int64_t count = 0;
  std::optional<std::string> field;  // of the top level, in which that was found
};

// A step from an object or array into it: a key, or else an index.
struct JsonStep {
  int parent = -1;  // the place it starts from, or -1: the body itself
  std::optional<std::string> key;
  std::int64_t index = 0;
};

struct JsonCut {
  JsonStep at;
  std::variant<std::string, std::vector<std::int32_t>> value;  // UTF-8, or ids
};

struct JsonBadId {
  std::int64_t list = -1;  // in a list of lists, the one it is in
  std::int64_t index = 0;
  std::string text;  // the first bytes of it
};

struct JsonBody {
  JsonMost depth, keys, elements;          // of nesting; most of one object; most of one array
  std::int64_t values = 0;                 // in fields that are read, less those cut
  std::vector<std::string> unknown;        // fields, the first 16 of them
  std::string error;                       // why it is no JSON; "" otherwise
  std::optional<std::string> error_field;  // in which a number is out of range
  std::optional<JsonBadId> bad_id;         // the first element of a long list of ids that is none
  std::string small;                       // the copy
  std::vector<JsonStep> places;            // objects and arrays that cuts are in
  std::vector<JsonCut> cuts;
};

constexpr std::int64_t kMaxJsonDepth = 1024;  // where reading stops

JsonBody read_json_body(std::string_view text, const JsonRules& rules);

}  // namespace fastllm

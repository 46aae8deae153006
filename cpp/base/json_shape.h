// How deep and how wide a JSON text is, before anything is built from it.
#pragma once

#include <cstdint>
#include <string_view>

namespace fastllm {

struct JsonShape {
  std::int64_t depth = 0;     // of objects and arrays in each other
  std::int64_t keys = 0;      // most of one object
  std::int64_t elements = 0;  // most of one array
};

// One pass over any bytes; what is no JSON gets some shape, for its parser to refuse. Stops at a depth of
// kMaxJsonDepth.
JsonShape json_shape(std::string_view text);

constexpr std::int64_t kMaxJsonDepth = 1024;

}  // namespace fastllm

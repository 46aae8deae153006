#include "base/json_shape.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace fastllm {
namespace {

// The position after the string whose opening quote is at `begin`.
std::size_t skip_string(std::string_view text, std::size_t begin) {
  for (std::size_t at = begin + 1;;) {
    const std::size_t quote = text.find('"', at);
    if (quote == std::string_view::npos) return text.size();
    std::size_t slashes = 0;
    while (quote - slashes > begin + 1 && text[quote - slashes - 1] == '\\') ++slashes;
    if (slashes % 2 == 0) return quote + 1;
    at = quote + 1;
  }
}

}  // namespace

JsonShape json_shape(std::string_view text) {
  struct Level {
    std::int64_t colons = 0, commas = 0;
  };
  JsonShape shape;
  std::vector<Level> open;
  for (std::size_t at = 0; at < text.size();) {
    switch (text[at]) {
      case '"':
        at = skip_string(text, at);
        continue;
      case '{':
      case '[':
        open.emplace_back();
        shape.depth = std::max(shape.depth, static_cast<std::int64_t>(open.size()));
        if (shape.depth >= kMaxJsonDepth) return shape;
        break;
      case '}':
      case ']':
        if (!open.empty()) open.pop_back();
        break;
      case ':':
        if (!open.empty()) shape.keys = std::max(shape.keys, ++open.back().colons);
        break;
      case ',':
        if (!open.empty() && open.back().colons == 0) {
          shape.elements = std::max(shape.elements, ++open.back().commas + 1);
        }
        break;
      default:
        break;
    }
    ++at;
  }
  return shape;
}

}  // namespace fastllm

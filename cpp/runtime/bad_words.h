// Which ids would complete a bad word.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "fastllm/types.h"

namespace fastllm {

// Appends the last id of every word whose other ids end `output`.
inline void append_completions(const std::vector<std::vector<TokenId>>& words, std::span<const TokenId> output,
                               std::vector<TokenId>& ids) {
  for (const std::vector<TokenId>& word : words) {
    const std::span<const TokenId> start = std::span(word).first(word.size() - 1);
    if (start.size() > output.size()) continue;
    if (std::ranges::equal(start, output.last(start.size()))) ids.push_back(word.back());
  }
}

// One bit per id of the vocabulary, see TokenMask.
inline std::vector<std::uint32_t> bits_of(const std::vector<TokenId>& ids, int vocab) {
  std::vector<std::uint32_t> bits((static_cast<std::size_t>(vocab) + 31) / 32);
  for (const TokenId id : ids) bits[static_cast<std::size_t>(id) / 32] |= 1u << (id % 32);
  return bits;
}

}  // namespace fastllm

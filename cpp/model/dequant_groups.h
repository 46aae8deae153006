// GGUF's block formats as the groups of a GroupFormat: the codes they have, not numbers made of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "backend/backend.h"
#include "fastllm/weights.h"

namespace fastllm {

// What blocks become that have no groups of their own.
inline constexpr GroupFormat kWideGroups{8, false, 128};

// The groups that hold a weight as its checkpoint does.
struct OwnGroups {
  GroupFormat format;
  std::string why_none = {};  // of a weight that is compressed
};

// A format's own groups; none for plain types and for those whose scales span fewer than kGroup elements. Q4_K and Q5_K
// have scales that are products: these are rounded to fp16, everything else is exact.
GroupFormat groups_of(SourceType type);

// The groups that hold both exactly, of as few bits and as many columns as possible; none if one has none.
GroupFormat common_groups(const GroupFormat& a, const GroupFormat& b);

// The format's own groups can be written as `f`.
bool groups_fit(SourceType type, const GroupFormat& f);

// Groups [first, first + n) of a row that starts at `row`, as `f`, which they fit. codes: [n * kGroup]; scales,
// offsets: [n], offsets null without.
void read_groups(SourceType type, const GroupFormat& f, const std::byte* row, std::int64_t first, std::int64_t n,
                 std::uint8_t* codes, float* scales, float* offsets);

}  // namespace fastllm

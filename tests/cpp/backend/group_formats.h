// Formats of grouped weights that every test of them goes through.
#pragma once

#include <string>

#include "backend/backend.h"

namespace fastllm::test {

inline constexpr GroupFormat kFormats[] = {{8, false, 128},   {8, false, 16},     {4, false, 8},
                                           {8, true, 0},      {4, true, 0},       {8, false, 128, 64},
                                           {4, true, 0, 64},  {4, false, 8, 64},  {8, false, 128, 128},
                                           {8, true, 0, 128}, {4, false, 8, 128}, {4, true, 0, 128}};

inline std::string text_of(const GroupFormat& f) {
  return std::to_string(f.bits) + " bits, groups of " + std::to_string(f.size) + ", " +
         (f.offsets ? "offsets" : "zero " + std::to_string(f.zero));
}

}  // namespace fastllm::test

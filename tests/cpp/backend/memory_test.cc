#include "backend/cpu/memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastllm::cpu {
namespace {

TEST(PageArena, pieces_are_zeroed_aligned_and_apart) {
  PageArena arena;
  struct Piece {
    std::shared_ptr<std::byte> data;
    std::size_t bytes;
  };
  std::vector<Piece> pieces;
  // Small ones of one chunk, one that opens the next, and one with pages of its own between them.
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{5000}, std::size_t{7} << 20, std::size_t{9} << 20,
                                  std::size_t{7} << 20, std::size_t{4096}}) {
    for (int i = 0; i < 6; ++i) pieces.push_back({arena.take(bytes), bytes});
  }
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    std::byte* p = pieces[i].data.get();
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p) % 4096, 0u);
    const auto mark = static_cast<std::byte>(i + 1);
    EXPECT_EQ(p[0], std::byte{0});
    p[0] = p[pieces[i].bytes - 1] = mark;
  }
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    EXPECT_EQ(pieces[i].data.get()[0], static_cast<std::byte>(i + 1));
    EXPECT_EQ(pieces[i].data.get()[pieces[i].bytes - 1], static_cast<std::byte>(i + 1));
  }
}

TEST(PageArena, a_piece_outlives_the_arena_and_its_neighbours) {
  std::shared_ptr<std::byte> kept;
  {
    PageArena arena;
    const auto other = arena.take(100);
    kept = arena.take(10000);
    std::fill_n(kept.get(), 10000, std::byte{7});
  }
  EXPECT_TRUE(std::all_of(kept.get(), kept.get() + 10000, [](std::byte b) { return b == std::byte{7}; }));
}

}  // namespace
}  // namespace fastllm::cpu

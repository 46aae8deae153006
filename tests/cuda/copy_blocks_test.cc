// Block copies against one memmove per pair, in order.
#include <cstring>

#include "device.h"
#include "elementwise.h"

namespace fastllm::test {
namespace {

using Pairs = std::vector<std::pair<BlockId, BlockId>>;

class CudaCopyBlocks : public CudaTest {
 protected:
  std::vector<std::byte> random_bytes(std::size_t n) {
    std::vector<std::byte> v(n);
    for (auto& b : v) b = static_cast<std::byte>(random.bits());
    return v;
  }
  static void reference(std::vector<std::byte>& to, const std::vector<std::byte>& from, std::size_t bytes,
                        const Pairs& pairs) {
    for (const auto& [f, t] : pairs) std::memmove(to.data() + index(t) * bytes, from.data() + index(f) * bytes, bytes);
  }
  static Pairs pairs(std::initializer_list<std::pair<int, int>> list) {
    Pairs p;
    for (const auto& [from, to] : list) p.emplace_back(BlockId{from}, BlockId{to});
    return p;
  }
};

constexpr int kBlocks = 24;

TEST_F(CudaCopyBlocks, WithinOnePoolKeepsTheOrder) {
  std::vector<Pairs> lists = {
      {},
      pairs({{1, 2}}),
      pairs({{1, 2}, {2, 3}, {3, 4}}),          // a chain: all get block 1
      pairs({{3, 2}, {4, 3}, {5, 4}}),          // everything moves down by one
      pairs({{1, 3}, {2, 4}, {3, 5}, {4, 6}}),  // two runs, the second reads what the first wrote
      pairs({{1, 11}, {2, 12}, {3, 13}, {9, 1}, {11, 20}, {12, 21}}),
      pairs({{5, 5}, {6, 6}, {7, 9}}),
  };
  for (int i = 0; i < 30; ++i) {
    Pairs p;
    while (p.size() < 12) {
      int from = random.below(kBlocks), to = random.below(kBlocks);
      for (int n = random.below(4); n >= 0 && from < kBlocks && to < kBlocks; --n, ++from, ++to)
        p.emplace_back(BlockId{from}, BlockId{to});
    }
    lists.push_back(p);
  }
  for (std::size_t i = 0; i < lists.size(); ++i) {
    for (const std::size_t bytes : {std::size_t{48}, std::size_t{4096}}) {
      auto want = random_bytes(kBlocks * bytes);
      const DeviceArray<std::byte> pool(want);
      reference(want, want, bytes, lists[i]);
      cuda::copy_blocks(pool.get(), pool.get(), bytes, lists[i], stream);
      EXPECT_TRUE(pool.download() == want) << "list " << i << ", " << bytes << " bytes; seed " << test_seed();
    }
  }
}

TEST_F(CudaCopyBlocks, BetweenDeviceAndPinnedMemory) {
  constexpr std::size_t kBytes = 1 << 16;
  void* memory = nullptr;
  cuda::check(cudaHostAlloc(&memory, kBlocks * kBytes, cudaHostAllocDefault), "cudaHostAlloc");
  const std::unique_ptr<void, void (*)(void*)> owner(memory, [](void* p) { cudaFreeHost(p); });
  const auto content = random_bytes(kBlocks * kBytes);
  const DeviceArray<std::byte> pool(content);
  std::vector<std::byte> host(kBlocks * kBytes, std::byte{0x55});
  std::memcpy(memory, host.data(), host.size());

  const Pairs out = pairs({{3, 7}, {4, 8}, {5, 9}, {20, 0}, {1, 23}});
  reference(host, content, kBytes, out);
  cuda::copy_blocks(memory, pool.get(), kBytes, out, stream);
  cuda::check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  EXPECT_EQ(std::memcmp(memory, host.data(), host.size()), 0) << "device to host; seed " << test_seed();

  auto want = content;
  const Pairs in = pairs({{7, 10}, {8, 11}, {9, 12}, {0, 13}, {23, 2}});
  reference(want, host, kBytes, in);
  cuda::copy_blocks(pool.get(), memory, kBytes, in, stream);
  EXPECT_TRUE(pool.download() == want) << "host to device; seed " << test_seed();
}

}  // namespace
}  // namespace fastllm::test

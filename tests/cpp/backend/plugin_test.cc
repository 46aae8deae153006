// Opening libfastllm_cuda.so: with it or without, with a GPU or without, the answer is a backend or a sentence.
#include "backend/cuda_plugin.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "fastllm/error.h"

namespace fastllm {
namespace {

bool is_sentence(const std::string& s) { return s.size() > 20 && s.find(' ') != std::string::npos; }

// What this build made, when it did.
std::filesystem::path built_plugin() {
  if (const char* named = std::getenv("FASTLLM_CUDA_PLUGIN"); named != nullptr && *named != '\0') return named;
  const auto tests = std::filesystem::canonical("/proc/self/exe").parent_path();
  const auto path = tests / "../../python/fastllm/libfastllm_cuda.so";
  return std::filesystem::exists(path) ? std::filesystem::canonical(path) : std::filesystem::path{};
}

TEST(CudaPluginTest, test_a_missing_module_is_a_sentence) {
  std::string why;
  EXPECT_EQ(open_cuda_plugin("/nowhere/libfastllm_cuda.so", why), nullptr);
  EXPECT_TRUE(is_sentence(why)) << why;
  EXPECT_NE(why.find("/nowhere/libfastllm_cuda.so"), std::string::npos) << why;
}

TEST(CudaPluginTest, test_another_library_is_refused) {
  std::string why;
  EXPECT_EQ(open_cuda_plugin("libm.so.6", why), nullptr);
  EXPECT_NE(why.find("is not a CUDA backend"), std::string::npos) << why;
}

TEST(CudaPluginTest, test_the_built_module_loads_and_counts_devices) {
  const auto path = built_plugin();
  if (path.empty()) GTEST_SKIP() << "this build has no CUDA backend";
  std::string why;
  const CudaPlugin* plugin = open_cuda_plugin(path.string(), why);
  ASSERT_NE(plugin, nullptr) << why;
  EXPECT_EQ(plugin->abi, kCudaPluginAbi);
  const int n = plugin->device_count(&why);
  if (n > 0) return;
  EXPECT_TRUE(is_sentence(why)) << why;
  try {
    plugin->make_backend({});
    FAIL() << "a backend without a device";
  } catch (const ResourceError& e) {  // its type is known on both sides
    EXPECT_TRUE(is_sentence(e.what())) << e.what();
  }
}

TEST(CudaPluginTest, test_no_device_has_a_reason_and_every_thread_hears_it) {
  std::vector<std::string> reasons(8);
  std::vector<int> counts(8, -1);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < reasons.size(); ++i)
    threads.emplace_back([&, i] { counts[i] = cuda_device_count(&reasons[i]); });
  for (auto& t : threads) t.join();
  for (std::size_t i = 0; i < reasons.size(); ++i) {
    EXPECT_EQ(counts[i], counts[0]);
    EXPECT_EQ(reasons[i], reasons[0]);
  }
  if (counts[0] > 0) return;
  EXPECT_TRUE(is_sentence(reasons[0])) << reasons[0];
  EXPECT_EQ(cuda_device_count(), 0);
  EXPECT_THROW(make_cuda_backend({}), ResourceError);
}

}  // namespace
}  // namespace fastllm

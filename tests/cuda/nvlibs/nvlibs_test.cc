// Which cuBLASLt is opened where several can be found. Needs no GPU: the libraries are stand-ins, in a folder laid out
// as pip lays out site-packages, and every search runs in a process of its own with an environment of its own.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>

namespace {

namespace fs = std::filesystem;

constexpr char kNew[] = "libcublasLt.so.13", kOld[] = "libcublasLt.so.12";

class NvlibsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "fastllm_nvlibs_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = fs::canonical(name);
    fs::create_directories(root_ / "site/fastllm");
    fs::copy_file(FASTLLM_PROBE, root_ / "site/fastllm/probe.so");
  }
  void TearDown() override { fs::remove_all(root_); }

  // A library of this name in a folder below the root.
  std::string lay(const std::string& folder, const std::string& name, const char* fake = nullptr) {
    fs::create_directories(root_ / folder);
    if (fake == nullptr) fake = name == kNew ? FASTLLM_FAKE_13 : FASTLLM_FAKE_12;
    fs::copy_file(fake, root_ / folder / name);
    return (root_ / folder / name).string();
  }

  // What a process that has loaded `loaded` finds, with only these variables ("A=b C=d") in its environment.
  std::string found(const std::string& variables = "", const std::string& loaded = "") const {
    const std::string command = "env -i " + variables + " '" + fs::canonical("/proc/self/exe").string() +
                                "' --probe '" + (root_ / "site/fastllm/probe.so").string() + "' " + loaded + " 2>&1";
    FILE* pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return "popen failed";
    std::string out;
    for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) out += static_cast<char>(c);
    pclose(pipe);
    const fs::path path(out);
    return path.is_absolute() ? path.lexically_normal().string() : out;
  }

  fs::path root_;
};

TEST_F(NvlibsTest, test_each_place_wins_over_those_after_it) {
  const std::string system = lay("system", kNew), home = lay("toolkit/lib64", kNew);
  const std::string set_system = "LD_LIBRARY_PATH=" + (root_ / "system").string();
  const std::string set_home = set_system + " CUDA_HOME=" + (root_ / "toolkit").string();
  EXPECT_EQ(found(set_system), system);
  EXPECT_EQ(found(set_home), home);
  const std::string cu12 = lay("site/nvidia/cublas/lib", kOld);
  EXPECT_EQ(found(set_home), cu12);
  const std::string cu13 = lay("site/nvidia/cu13/lib", kNew);
  EXPECT_EQ(found(set_home), cu13);
  const std::string loaded = lay("torch", kNew), loaded_old = lay("torch", kOld);
  EXPECT_EQ(found(set_home, loaded_old), loaded_old);
  EXPECT_EQ(found(set_home, loaded_old + " " + loaded), loaded);
  const std::string named = lay("elsewhere", "any_name.so", FASTLLM_FAKE_12);
  EXPECT_EQ(found(set_home + " FASTLLM_CUBLASLT_LIB=" + named, loaded), named);
}

TEST_F(NvlibsTest, test_wheels_are_found_without_any_variable) {
  const std::string cu12 = lay("site/nvidia/cublas/lib", kOld);
  EXPECT_EQ(found(), cu12);
  EXPECT_EQ(found("FASTLLM_CUBLASLT_LIB= CUDA_HOME="), cu12);
  const std::string cu13 = lay("site/nvidia/cu13/lib", kNew);
  EXPECT_EQ(found(), cu13);
}

TEST_F(NvlibsTest, test_the_newer_of_two_in_one_folder_is_taken) {
  lay("toolkit/lib64", kOld);
  const std::string newer = lay("toolkit/lib64", kNew);
  EXPECT_EQ(found("CUDA_HOME=" + (root_ / "toolkit").string()), newer);
}

TEST_F(NvlibsTest, test_a_named_file_that_is_missing_is_an_error) {
  lay("site/nvidia/cu13/lib", kNew);
  const std::string why = found("FASTLLM_CUBLASLT_LIB=/nowhere/lib.so");
  EXPECT_NE(why.find("FASTLLM_CUBLASLT_LIB names a file that cannot be loaded: /nowhere/lib.so"), std::string::npos)
      << why;
}

TEST_F(NvlibsTest, test_a_library_that_is_too_old_is_an_error) {
  const std::string old = lay("elsewhere", kOld, FASTLLM_FAKE_OLD);
  const std::string why = found("FASTLLM_CUBLASLT_LIB=" + old);
  EXPECT_EQ(why.find("cuBLASLt is too old: it has no function cublasLtMatmul;"), 0u) << why;
}

TEST_F(NvlibsTest, test_no_library_is_an_error_that_names_the_places) {
  const std::string why = found("CUDA_HOME=/nowhere");
  if (fs::path(why).is_absolute()) GTEST_SKIP() << "this machine has a cuBLASLt of its own: " << why;
  for (const std::string part : {"cuBLASLt was not found", kNew, kOld, "site/fastllm/../nvidia/cu13/lib",
                                 "/nowhere/lib64", "pip install 'fastllm-engine[cuda]'"})
    EXPECT_NE(why.find(part), std::string::npos) << part << " is not in: " << why;
}

// Loads the libraries argv[3..], then asks the module argv[2].
int probe(int argc, char** argv) {
  for (int i = 3; i <= argc; ++i) {
    const char* file = argv[i < argc ? i : 2];
    void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      std::cout << dlerror();
      return 1;
    }
    if (i == argc) std::cout << reinterpret_cast<const char* (*)()>(dlsym(library, "fastllm_probe"))();
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "--probe") return probe(argc, argv);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

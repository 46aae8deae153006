// The CPU and the CUDA backend side by side: the same calls on the same inputs, and the comparison of what comes out.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cuda_backend.h"
#include "device.h"

namespace fastllm::test {

// A backend and the tensors made on it.
class Side {
 public:
  explicit Side(std::unique_ptr<Backend> b) : backend(std::move(b)) {}

  Tensor upload(const Array& host) {
    const Tensor& t = host.tensor();
    return {store(t.data, t.bytes()), t.dtype, {t.rows(), t.cols()}};
  }
  // Every element NaN.
  Tensor blank(DType dtype, std::int64_t rows, std::int64_t cols) { return upload(Array(dtype, rows, cols)); }
  const float* upload(const std::vector<float>& values) {
    return static_cast<const float*>(store(values.data(), values.size() * sizeof(float)));
  }
  Array download(const Tensor& t) {
    Array host(t.dtype, t.rows(), t.cols());
    backend->copy(host.tensor().data, t.data, t.bytes());
    backend->synchronize();
    return host;
  }

  std::unique_ptr<Backend> backend;

 private:
  void* store(const void* from, std::size_t bytes) {
    memory_.push_back(backend->allocate(bytes, MemoryKind::Device));
    backend->copy(memory_.back()->data(), from, bytes);
    backend->synchronize();
    return memory_.back()->data();
  }
  std::vector<std::unique_ptr<Buffer>> memory_;
};

// Equal, both NaN, or close.
inline bool agree(float got, float want, double tolerance) {
  return got == want || (std::isnan(got) && std::isnan(want)) || close(got, static_cast<double>(want), tolerance);
}

inline void expect_agreement(const std::string& what, const Array& got, const Array& want, double tolerance) {
  ASSERT_EQ(got.rows(), want.rows()) << what;
  ASSERT_EQ(got.cols(), want.cols()) << what;
  std::int64_t wrong = 0, row = 0, col = 0;
  double worst = 0;
  for (std::int64_t r = 0; r < got.rows(); ++r) {
    for (std::int64_t c = 0; c < got.cols(); ++c) {
      const float g = got.get(r, c), w = want.get(r, c);
      if (agree(g, w, tolerance)) continue;
      worst = std::max(worst, std::abs(static_cast<double>(g) - static_cast<double>(w)));
      if (wrong++ == 0) row = r, col = c;
    }
  }
  EXPECT_EQ(wrong, 0) << what << " " << name_of(got.tensor().dtype) << " " << got.rows() << " x " << got.cols()
                      << ": first wrong element [" << row << ", " << col << "] is " << got.get(row, col)
                      << " on the GPU, " << want.get(row, col) << " on the CPU; greatest difference " << worst
                      << "; seed " << test_seed();
}

// How far results are from exact ones, over everything that was added.
struct Deviation {
  double sum_of_squares = 0, worst = 0;
  std::int64_t n = 0;

  void add(const Array& got, const Array& exact) {
    for (std::int64_t r = 0; r < got.rows(); ++r) {
      for (std::int64_t c = 0; c < got.cols(); ++c) {
        const double d = std::abs(static_cast<double>(got.get(r, c)) - static_cast<double>(exact.get(r, c)));
        sum_of_squares += d * d;
        worst = d <= worst ? worst : d;  // NaN stays
        ++n;
      }
    }
  }
  double rms() const { return std::sqrt(sum_of_squares / static_cast<double>(n)); }
};

// Two backends that round at the same places are equally far from the exact results, though their sums run in other
// orders and a rounding of one of them may be amplified anywhere. A slip in a kernel shows as a greater distance.
inline void expect_as_near(const std::string& what, const Deviation& gpu, const Deviation& cpu) {
  constexpr double kRms = 1.5, kWorst = 3;  // between the CPU's instruction sets it is up to 1.12 and 1.7
  EXPECT_TRUE(gpu.rms() <= kRms * cpu.rms() && gpu.worst <= kWorst * cpu.worst)
      << what << ": the GPU's distance from exact results is " << gpu.rms() << " (rms), " << gpu.worst
      << " (greatest), the CPU's is " << cpu.rms() << " and " << cpu.worst << "; seed " << test_seed();
}

class TwoBackends : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped()) start({});
  }
  void start(const CudaOptions& options) {
    host = std::make_unique<Side>(make_cpu_backend(2));
    gpu = std::make_unique<Side>(cuda::make_backend(options));
  }
  // `op` makes an Array on each side; they must agree.
  template <class Op>
  void compare(const std::string& what, double tolerance, Op&& op) {
    const Array want = op(*host), got = op(*gpu);
    expect_agreement(what, got, want, tolerance);
  }

  std::unique_ptr<Side> host, gpu;
};

}  // namespace fastllm::test

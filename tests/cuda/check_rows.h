// Matrices that are part of wider ones: checks say which element is wrong, and that nothing around them was touched.
#pragma once

#include <cstring>
#include <sstream>
#include <string>

#include "device.h"

namespace fastllm::test {

// got[r, c] is close to want(r, c) for r < rows, c < cols, and all other elements are those of `before`, bit for bit.
template <class Want>
void expect_rows(const std::string& what, const Array& before, const Array& got, std::int64_t rows, std::int64_t cols,
                 double tolerance, Want&& want) {
  const DType dtype = got.tensor().dtype;
  std::int64_t wrong = 0;
  std::ostringstream first;
  for (std::int64_t r = 0; r < got.rows(); ++r) {
    for (std::int64_t c = 0; c < got.cols(); ++c) {
      const bool inside = r < rows && c < cols;
      const auto at = static_cast<std::size_t>(c) * size_of(dtype);
      const bool good = inside ? close(got.get(r, c), want(r, c), tolerance)
                               : std::memcmp(static_cast<std::byte*>(got.tensor().at(r)) + at,
                                             static_cast<std::byte*>(before.tensor().at(r)) + at, size_of(dtype)) == 0;
      if (good || wrong++ > 0) continue;
      first << "[" << r << ", " << c << "] is " << got.get(r, c);
      if (inside) {
        first << ", expected " << want(r, c);
      } else {
        first << ", but lies outside of the " << rows << " x " << cols << " that may change";
      }
    }
  }
  EXPECT_EQ(wrong, 0) << what << " " << name_of(dtype) << " " << rows << " x " << cols
                      << ": first wrong element: " << first.str() << "; seed " << test_seed();
}

// Bytes of device memory that can be had; tests of far offsets skip where it is too little.
inline bool has_memory(std::size_t bytes) {
  std::size_t available = 0, total = 0;
  return cudaMemGetInfo(&available, &total) == cudaSuccess && available > bytes + (std::size_t{1} << 30);
}

inline std::vector<float> random_vector(Random& random, std::int64_t n, float mean = 0.0f) {
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = mean + random.normal(0.5f);
  return v;
}

}  // namespace fastllm::test

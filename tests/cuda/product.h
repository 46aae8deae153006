// A matrix product with its result in fp64, to compare with what the device computes.
#pragma once

#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/exact_activation.h"
#include "device.h"
#include "gemm.h"

namespace fastllm::test {

inline constexpr std::int64_t kProductPad = 8;  // columns and rows around x and out

// bf16 results are rounded once more where a bias is added by a second kernel.
inline double tolerance(DType out) { return out == DType::BF16 ? 1.0 / 64 : 1e-4; }

struct ProductOptions {
  DType dtype = DType::BF16, out_dtype = DType::BF16;
  bool bias = false, accumulate = false;
  std::optional<Activation> gated{};
};

inline std::string name(std::int64_t m, std::int64_t n, std::int64_t k, const ProductOptions& o) {
  return std::string(name_of(o.dtype)) + " to " + name_of(o.out_dtype) + ", m " + std::to_string(m) + ", n " +
         std::to_string(n) + ", k " + std::to_string(k) + (o.bias ? ", bias" : "") +
         (o.accumulate ? ", accumulate" : "") +
         (o.gated ? ", gated " + std::to_string(static_cast<int>(*o.gated)) : "");
}

// Operands of products with up to `most` rows; each check computes the first m of them.
class Product {
 public:
  Product(Random& random, std::int64_t most, std::int64_t n, std::int64_t k, const ProductOptions& options)
      : options_(options),
        most_(most),
        n_(n),
        k_(k),
        cols_(options.gated ? n / 2 : n),
        x_(options.dtype, most, k + kProductPad),
        w_(options.dtype, n, k),
        old_(options.out_dtype, most + kProductPad, cols_ + kProductPad),
        bias_(DType::F32, 1, n) {
    const float sigma = 1.0f / std::sqrt(static_cast<float>(k));
    x_.fill(random), w_.fill(random, sigma), old_.fill(random), bias_.fill(random);
    x_device_ = std::make_unique<DeviceMatrix>(x_);
    w_device_ = std::make_unique<DeviceMatrix>(w_);
    bias_device_ = std::make_unique<DeviceMatrix>(bias_);
    find_sums();
  }

  // Calls `product` for the first m rows and compares; one message per failing call.
  void check(std::int64_t m, const std::string& how, const std::function<void(const cuda::GemmCall&)>& product) {
    const DeviceMatrix out(old_);
    product(call(out, m));
    const Array got = out.download();
    for (std::int64_t t = 0; t < got.rows(); ++t) {
      for (std::int64_t c = 0; c < got.cols(); ++c) {
        const bool inside = t < m && c < cols_;
        const double want = inside ? expected(t, c) : old_.get(t, c);
        if (inside ? close(got.get(t, c), want, tolerance(options_.out_dtype)) : got.get(t, c) == old_.get(t, c))
          continue;
        ADD_FAILURE() << how << ", " << name(m, n_, k_, options_) << ": out[" << t << ", " << c << "] is "
                      << got.get(t, c) << ", expected " << want << (inside ? "" : " (must not be written)") << ", seed "
                      << test_seed();
        return;
      }
    }
  }

  Array result(std::int64_t first, std::int64_t m, const std::function<void(const cuda::GemmCall&)>& product) {
    const DeviceMatrix out(old_);
    cuda::GemmCall c = call(out, m);
    c.x = static_cast<const std::byte*>(c.x) + static_cast<std::size_t>(first * c.ldx) * size_of(options_.dtype);
    product(c);
    return out.download();
  }

  cuda::WeightView weight() const { return {w_device_->data(), options_.dtype, n_, k_}; }

 private:
  cuda::GemmCall call(const DeviceMatrix& out, std::int64_t m) const {
    cuda::GemmCall c;
    c.out = out.data();
    c.out_dtype = options_.out_dtype;
    c.ldo = cols_ + kProductPad;
    c.x = x_device_->data();
    c.ldx = k_ + kProductPad;
    c.m = m;
    c.w = weight();
    c.bias = options_.bias ? bias_device_->ptr<float>() : nullptr;
    c.accumulate = options_.accumulate;
    return c;
  }

  void find_sums() {
    sums_.assign(static_cast<std::size_t>(most_ * n_), 0.0);
    std::vector<float> x(static_cast<std::size_t>(k_)), w(x.size());
    std::vector<std::vector<float>> xs;
    for (std::int64_t t = 0; t < most_; ++t) {
      for (std::int64_t i = 0; i < k_; ++i) x[static_cast<std::size_t>(i)] = x_.get(t, i);
      xs.push_back(x);
    }
    for (std::int64_t r = 0; r < n_; ++r) {
      for (std::int64_t i = 0; i < k_; ++i) w[static_cast<std::size_t>(i)] = w_.get(r, i);
      for (std::int64_t t = 0; t < most_; ++t) {
        double s = 0;
        const auto& row = xs[static_cast<std::size_t>(t)];
        for (std::size_t i = 0; i < w.size(); ++i) s += static_cast<double>(row[i]) * static_cast<double>(w[i]);
        sums_[static_cast<std::size_t>(t * n_ + r)] = s + (options_.bias ? static_cast<double>(bias_.get(0, r)) : 0.0);
      }
    }
  }

  double expected(std::int64_t t, std::int64_t c) const {
    const double s = sums_[static_cast<std::size_t>(t * n_ + c)];
    if (options_.gated)
      return exact_activation(s, *options_.gated) * sums_[static_cast<std::size_t>(t * n_ + cols_ + c)];
    return options_.accumulate ? s + static_cast<double>(old_.get(t, c)) : s;
  }

  ProductOptions options_;
  std::int64_t most_, n_, k_, cols_;
  Array x_, w_, old_, bias_;
  std::unique_ptr<DeviceMatrix> x_device_, w_device_, bias_device_;
  std::vector<double> sums_;
};

}  // namespace fastllm::test

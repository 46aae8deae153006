// Products by cuBLASLt. It thinks in columns: out^T[n, m] = (w^T)^T[n, k] x^T[k, m], all of them plain row-major here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "gemm.h"
#include "nvlibs.h"

namespace fastllm::cuda {

// Everything about a product but the number of rows, the strides and the addresses.
struct GemmShape {
  std::int64_t n = 0, k = 0;
  DType dtype = DType::BF16, out_dtype = DType::BF16;
  bool accumulate = false;
  bool operator==(const GemmShape&) const = default;
};

GemmShape shape_of(const GemmCall& call);

// The opened library, a handle, and the workspace.
class LtContext {
 public:
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what NVIDIA asks for on Hopper

  LtContext();
  ~LtContext();
  LtContext(const LtContext&) = delete;
  LtContext& operator=(const LtContext&) = delete;

  const CublasLt& lt() const { return lt_; }
  LtHandle* handle() const { return handle_; }
  void* workspace() const { return workspace_->data(); }
  void check(int status, const char* what) const;  // throws ResourceError

 private:
  CublasLt lt_;
  std::unique_ptr<Buffer> workspace_;
  LtHandle* handle_ = nullptr;
};

// cuBLASLt's descriptors of one shape, adjusted to the size of a call where it differs from the call before.
class LtProduct {
 public:
  // bias: calls have one, and the library adds it. Only where out is F32: its bias has the type of out.
  LtProduct(const LtContext& context, const GemmShape& shape, bool bias);
  ~LtProduct();
  LtProduct(const LtProduct&) = delete;
  LtProduct& operator=(const LtProduct&) = delete;

  // At most `most` algorithms for m rows, those expected to be fastest first.
  std::vector<LtAlgo> propose(std::int64_t m, int most, bool whole_k = false);
  // whole_k: sums are not split over k, so that a result does not depend on how many blocks there are.
  bool takes(const LtAlgo& algo, std::int64_t m);
  void run(const GemmCall& call, const LtAlgo& algo, cudaStream_t stream);

 private:
  void destroy();
  void resize(std::int64_t m, std::int64_t ldx, std::int64_t ldo);

  const LtContext& context_;
  GemmShape shape_;
  std::int64_t m_ = 0, ldx_ = 0, ldo_ = 0;  // what x_ and out_ describe
  const float* bias_ = nullptr;             // what desc_ names
  LtDesc* desc_ = nullptr;
  LtLayout *w_ = nullptr, *x_ = nullptr, *out_ = nullptr;
};

}  // namespace fastllm::cuda

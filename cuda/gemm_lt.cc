#include "gemm_lt.h"

#include <array>
#include <cassert>
#include <string>

#include "memory.h"

namespace fastllm::cuda {
namespace {

cudaDataType lt_type(DType t) { return t == DType::F32 ? CUDA_R_32F : CUDA_R_16BF; }

// An algorithm that does not know an attribute does not split.
bool sums_whole_k(const CublasLt& lt, const LtAlgo& algo) {
  std::int32_t splits = 1;
  std::uint32_t scheme = 0;
  std::size_t written = 0;
  lt.MatmulAlgoConfigGetAttribute(&algo, LtAlgoAttribute::SplitK, &splits, sizeof splits, &written);
  lt.MatmulAlgoConfigGetAttribute(&algo, LtAlgoAttribute::ReductionScheme, &scheme, sizeof scheme, &written);
  return (splits == 0 || splits == 1) && scheme == 0;
}

}  // namespace

GemmShape shape_of(const GemmCall& c) { return {c.w.n, c.w.k, c.w.dtype, c.out_dtype, c.accumulate}; }

LtContext::LtContext() : lt_(open_cublaslt()), workspace_(allocate_device(kWorkspaceBytes)) {
  check(lt_.Create(&handle_), "creating a handle");
}

LtContext::~LtContext() { lt_.Destroy(handle_); }

void LtContext::check(int status, const char* what) const {
  if (status != 0) throw ResourceError(std::string("cuBLASLt: ") + what + " failed: " + lt_.GetStatusString(status));
}

LtProduct::LtProduct(const LtContext& context, const GemmShape& shape, bool bias) : context_(context), shape_(shape) {
  assert(!bias || shape.out_dtype == DType::F32);
  const CublasLt& lt = context.lt();
  const auto n = static_cast<std::uint64_t>(shape.n), k = static_cast<std::uint64_t>(shape.k);
  m_ = 1, ldx_ = shape.k, ldo_ = shape.n;
  // F32 products are computed in F32, not in TF32.
  int status = lt.MatmulDescCreate(&desc_, kLtCompute32F, CUDA_R_32F);
  if (status == 0) status = lt.MatrixLayoutCreate(&w_, lt_type(shape.dtype), k, n, shape.k);
  if (status == 0) status = lt.MatrixLayoutCreate(&x_, lt_type(shape.dtype), k, 1, ldx_);
  if (status == 0) status = lt.MatrixLayoutCreate(&out_, lt_type(shape.out_dtype), n, 1, ldo_);
  const std::int32_t transpose = kLtTranspose;
  if (status == 0) status = lt.MatmulDescSetAttribute(desc_, LtDescAttribute::TransposeA, &transpose, sizeof transpose);
  if (bias && status == 0) {
    const std::int32_t epilogue = kLtEpilogueBias;
    const void* any = context.workspace();  // aligned as biases are, which is all that proposals ask of it
    status = lt.MatmulDescSetAttribute(desc_, LtDescAttribute::Epilogue, &epilogue, sizeof epilogue);
    if (status == 0) status = lt.MatmulDescSetAttribute(desc_, LtDescAttribute::BiasPointer, &any, sizeof any);
  }
  if (status != 0) {
    destroy();
    context.check(status, "describing a product");
  }
}

LtProduct::~LtProduct() { destroy(); }

void LtProduct::destroy() {
  const CublasLt& lt = context_.lt();
  if (out_ != nullptr) lt.MatrixLayoutDestroy(out_);
  if (x_ != nullptr) lt.MatrixLayoutDestroy(x_);
  if (w_ != nullptr) lt.MatrixLayoutDestroy(w_);
  if (desc_ != nullptr) lt.MatmulDescDestroy(desc_);
}

void LtProduct::resize(std::int64_t m, std::int64_t ldx, std::int64_t ldo) {
  auto set = [&](LtLayout* layout, LtLayoutAttribute attribute, std::int64_t value) {
    context_.check(context_.lt().MatrixLayoutSetAttribute(layout, attribute, &value, sizeof value), "sizing a product");
  };
  if (m != m_) {
    set(x_, LtLayoutAttribute::Columns, m);
    set(out_, LtLayoutAttribute::Columns, m);
    m_ = m;
  }
  if (ldx != ldx_) set(x_, LtLayoutAttribute::LeadingDimension, ldx_ = ldx);
  if (ldo != ldo_) set(out_, LtLayoutAttribute::LeadingDimension, ldo_ = ldo);
}

std::vector<LtAlgo> LtProduct::propose(std::int64_t m, int most, bool whole_k) {
  const CublasLt& lt = context_.lt();
  resize(m, shape_.k, shape_.n);
  LtPreference* preference = nullptr;
  context_.check(lt.MatmulPreferenceCreate(&preference), "asking for algorithms");
  auto set = [&](LtPreferenceAttribute attribute, auto value) {
    return lt.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value);
  };
  int status = set(LtPreferenceAttribute::WorkspaceBytes, std::uint64_t{LtContext::kWorkspaceBytes});
  for (const auto attribute : {LtPreferenceAttribute::AlignmentA, LtPreferenceAttribute::AlignmentB,
                               LtPreferenceAttribute::AlignmentC, LtPreferenceAttribute::AlignmentD}) {
    if (status == 0) status = set(attribute, std::uint32_t{16});
  }
  if (whole_k && status == 0) status = set(LtPreferenceAttribute::ReductionSchemes, std::uint32_t{0});
  std::vector<LtProposal> proposals(static_cast<std::size_t>(most));
  int found = 0;
  if (status == 0)
    status = lt.MatmulAlgoGetHeuristic(context_.handle(), desc_, w_, x_, out_, out_, preference, most, proposals.data(),
                                       &found);
  lt.MatmulPreferenceDestroy(preference);
  std::vector<LtAlgo> algos;
  if (status != 0) return algos;
  proposals.resize(static_cast<std::size_t>(found));
  for (const LtProposal& p : proposals) {
    if (p.status == 0 && (!whole_k || sums_whole_k(lt, p.algo))) algos.push_back(p.algo);
  }
  return algos;
}

bool LtProduct::takes(const LtAlgo& algo, std::int64_t m) {
  resize(m, shape_.k, shape_.n);
  LtProposal result{};
  return context_.lt().MatmulAlgoCheck(context_.handle(), desc_, w_, x_, out_, out_, &algo, &result) == 0 &&
         result.workspace_bytes <= LtContext::kWorkspaceBytes;
}

void LtProduct::run(const GemmCall& c, const LtAlgo& algo, cudaStream_t stream) {
  assert(shape_of(c) == shape_);
  const CublasLt& lt = context_.lt();
  resize(c.m, c.ldx, c.ldo);
  if (c.bias != bias_) {
    const void* bias = c.bias;
    context_.check(lt.MatmulDescSetAttribute(desc_, LtDescAttribute::BiasPointer, &bias, sizeof bias), "a bias");
    bias_ = c.bias;
  }
  const float alpha = 1, beta = c.accumulate ? 1.0f : 0.0f;
  context_.check(lt.Matmul(context_.handle(), desc_, &alpha, c.w.data, w_, c.x, x_, &beta, c.out, out_, c.out, out_,
                           &algo, context_.workspace(), LtContext::kWorkspaceBytes, stream),
                 "a product");
}

}  // namespace fastllm::cuda

// Compiled where NVIDIA's header is at hand, and never linked: our declarations agree with it.
#include <cublasLt.h>

#include <type_traits>

#include "nvlibs.h"

namespace fastllm::cuda {
namespace {

// Types that are passed alike: of one size, both pointers or both not, and both integers or both not.
template <class A, class B>
inline constexpr bool kAlike =
    sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B> &&
    (std::is_integral_v<A> || std::is_enum_v<A>) == (std::is_integral_v<B> || std::is_enum_v<B>);

template <class Ours, class Theirs>
struct Same : std::false_type {};
template <class R, class... A, class S, class... B>
  requires(sizeof...(A) == sizeof...(B))
struct Same<R (*)(A...), S (*)(B...)> : std::bool_constant<kAlike<R, S> && (kAlike<A, B> && ...)> {};

#define FASTLLM_SAME(function) static_assert(Same<decltype(CublasLt::function), decltype(&cublasLt##function)>::value)
FASTLLM_SAME(Create);
FASTLLM_SAME(Destroy);
FASTLLM_SAME(GetVersion);
FASTLLM_SAME(GetStatusString);
FASTLLM_SAME(MatmulDescCreate);
FASTLLM_SAME(MatmulDescDestroy);
FASTLLM_SAME(MatmulDescSetAttribute);
FASTLLM_SAME(MatrixLayoutCreate);
FASTLLM_SAME(MatrixLayoutDestroy);
FASTLLM_SAME(MatrixLayoutSetAttribute);
FASTLLM_SAME(MatmulPreferenceCreate);
FASTLLM_SAME(MatmulPreferenceDestroy);
FASTLLM_SAME(MatmulPreferenceSetAttribute);
FASTLLM_SAME(MatmulAlgoGetHeuristic);
FASTLLM_SAME(MatmulAlgoCheck);
FASTLLM_SAME(MatmulAlgoConfigGetAttribute);
FASTLLM_SAME(Matmul);
#undef FASTLLM_SAME

static_assert(sizeof(LtAlgo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(LtProposal) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(LtProposal, workspace_bytes) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(LtProposal, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(LtProposal, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));

constexpr bool equal(auto ours, auto theirs) { return static_cast<int>(ours) == static_cast<int>(theirs); }
static_assert(equal(kLtCompute32F, CUBLAS_COMPUTE_32F));
static_assert(equal(kLtTranspose, CUBLAS_OP_T));
static_assert(equal(kLtEpilogueBias, CUBLASLT_EPILOGUE_BIAS));
static_assert(equal(0, CUBLAS_STATUS_SUCCESS));
static_assert(equal(0, CUBLASLT_REDUCTION_SCHEME_NONE));
static_assert(equal(LtDescAttribute::TransposeA, CUBLASLT_MATMUL_DESC_TRANSA));
static_assert(equal(LtDescAttribute::Epilogue, CUBLASLT_MATMUL_DESC_EPILOGUE));
static_assert(equal(LtDescAttribute::BiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER));
static_assert(equal(LtLayoutAttribute::Columns, CUBLASLT_MATRIX_LAYOUT_COLS));
static_assert(equal(LtLayoutAttribute::LeadingDimension, CUBLASLT_MATRIX_LAYOUT_LD));
static_assert(equal(LtPreferenceAttribute::WorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES));
static_assert(equal(LtPreferenceAttribute::ReductionSchemes, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK));
static_assert(equal(LtPreferenceAttribute::AlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES));
static_assert(equal(LtPreferenceAttribute::AlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES));
static_assert(equal(LtPreferenceAttribute::AlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES));
static_assert(equal(LtPreferenceAttribute::AlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES));
static_assert(equal(LtAlgoAttribute::SplitK, CUBLASLT_ALGO_CONFIG_SPLITK_NUM));
static_assert(equal(LtAlgoAttribute::ReductionScheme, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME));

}  // namespace
}  // namespace fastllm::cuda

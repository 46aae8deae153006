// The part of cuBLASLt that we call, declared by ourselves and opened at run time: neither building nor loading fastllm
// needs the library. nvlibs_check.cc holds these declarations against NVIDIA's header.
#pragma once

#include <driver_types.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace fastllm::cuda {

struct LtHandle;      // opaque
struct LtDesc;        // opaque
struct LtLayout;      // opaque
struct LtPreference;  // opaque

struct LtAlgo {
  std::uint64_t data[8];
};

struct LtProposal {
  LtAlgo algo;
  std::size_t workspace_bytes;
  int status;  // 0: usable
  float waves;
  int reserved[4];
};

inline constexpr int kLtCompute32F = 68, kLtTranspose = 1, kLtEpilogueBias = 4;
enum class LtDescAttribute : int { TransposeA = 3, Epilogue = 7, BiasPointer = 8 };
enum class LtLayoutAttribute : int { Columns = 3, LeadingDimension = 4 };
enum class LtPreferenceAttribute : int {
  WorkspaceBytes = 1,
  ReductionSchemes = 3,
  AlignmentA = 5,
  AlignmentB = 6,
  AlignmentC = 7,
  AlignmentD = 8
};
enum class LtAlgoAttribute : int { SplitK = 2, ReductionScheme = 3 };

struct CublasLt {
  int (*Create)(LtHandle**);
  int (*Destroy)(LtHandle*);
  std::size_t (*GetVersion)();
  const char* (*GetStatusString)(int);
  int (*MatmulDescCreate)(LtDesc**, int compute, cudaDataType_t scale);
  int (*MatmulDescDestroy)(LtDesc*);
  int (*MatmulDescSetAttribute)(LtDesc*, LtDescAttribute, const void*, std::size_t);
  int (*MatrixLayoutCreate)(LtLayout**, cudaDataType, std::uint64_t rows, std::uint64_t cols, std::int64_t ld);
  int (*MatrixLayoutDestroy)(LtLayout*);
  int (*MatrixLayoutSetAttribute)(LtLayout*, LtLayoutAttribute, const void*, std::size_t);
  int (*MatmulPreferenceCreate)(LtPreference**);
  int (*MatmulPreferenceDestroy)(LtPreference*);
  int (*MatmulPreferenceSetAttribute)(LtPreference*, LtPreferenceAttribute, const void*, std::size_t);
  int (*MatmulAlgoGetHeuristic)(LtHandle*, LtDesc*, LtLayout* a, LtLayout* b, LtLayout* c, LtLayout* d, LtPreference*,
                                int most, LtProposal*, int* found);
  int (*MatmulAlgoCheck)(LtHandle*, LtDesc*, LtLayout* a, LtLayout* b, LtLayout* c, LtLayout* d, const LtAlgo*,
                         LtProposal*);
  int (*MatmulAlgoConfigGetAttribute)(const LtAlgo*, LtAlgoAttribute, void*, std::size_t, std::size_t* written);
  int (*Matmul)(LtHandle*, LtDesc*, const void* alpha, const void* a, LtLayout*, const void* b, LtLayout*,
                const void* beta, const void* c, LtLayout*, void* d, LtLayout*, const LtAlgo*, void* workspace,
                std::size_t workspace_bytes, cudaStream_t);
};

// In this order: the file that FASTLLM_CUBLASLT_LIB names; a copy that this process has loaded already (PyTorch's); our
// RUNPATH (NVIDIA's wheels beside us); $CUDA_HOME/lib64; LD_LIBRARY_PATH and the system's folders;
// /usr/local/cuda/lib64. The library stays open. Throws ResourceError.
CublasLt open_cublaslt();

}  // namespace fastllm::cuda

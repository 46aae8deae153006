// Launchers of the ops that move each element a constant number of times: embedding, norms, rotary embedding with the
// KV write, activations, gathers, block copies. dtype arguments are F32 or BF16 unless said. Strides are in elements.
// All arithmetic is fp32, and the result of a row never depends on the other rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>
#include <utility>

#include "backend/backend.h"
#include "step_view.h"

namespace fastllm::cuda {

// out[t] = scale * table[ids[t] - id_begin], 0 where that row is not in [0, rows).   out: [tokens, cols] F32
void embed(float* out, const TokenId* ids, std::int64_t tokens, const void* table, DType table_dtype, std::int64_t rows,
           std::int64_t cols, std::int64_t id_begin, float scale, cudaStream_t stream);
// x[t] += table[positions[t]]   both F32
void add_positions(float* x, const std::int32_t* positions, std::int64_t tokens, const float* table, std::int64_t cols,
                   cudaStream_t stream);

struct NormCall {
  const void* x = nullptr;  // [rows, cols]; with delta: F32, and x += delta is stored first
  const float* delta = nullptr;
  void* out = nullptr;
  std::int64_t rows = 0, cols = 0, ldx = 0, ldd = 0, ldo = 0;
  DType x_dtype = DType::F32, out_dtype = DType::BF16;
  NormKind kind = NormKind::Rms;
  float eps = 0;
  const float* weight = nullptr;  // [cols] or null
  const float* bias = nullptr;    // [cols] or null
};
void norm(const NormCall& call, cudaStream_t stream);

struct RopeKvCall {
  void* qkv = nullptr;  // [T, ld]: heads, then kv_heads of k, then kv_heads of v; q and k are changed in place
  std::int64_t ld = 0;
  DType dtype = DType::BF16;
  int heads = 0, kv_heads = 0, head_dim = 0;
  NormSpec q_norm, k_norm;  // over head_dim; used when the weight is not null
  const float *q_weight = nullptr, *k_weight = nullptr;
  RopeArgs rope;
  KvView kv;  // dtype: that of the activations, or F8E4M3
};
// Padding tokens write to block 0.
void qk_norm_rope_write_kv(const RopeKvCall& call, const StepView& step, cudaStream_t stream);

// out[r, i] = act(gate_up[r, i]) * gate_up[r, cols + i]   out: [rows, cols]
void gated_act(void* out, std::int64_t ldo, const void* gate_up, std::int64_t ldg, std::int64_t rows, std::int64_t cols,
               DType dtype, Activation act, cudaStream_t stream);
void act(void* x, std::int64_t ldx, std::int64_t rows, std::int64_t cols, DType dtype, Activation act,
         cudaStream_t stream);
// x += y, F32
void add(float* x, std::int64_t ldx, const float* y, std::int64_t ldy, std::int64_t rows, std::int64_t cols,
         cudaStream_t stream);
// out[r, i] += bias[i]
void add_bias(void* out, std::int64_t ldo, DType dtype, const float* bias, std::int64_t rows, std::int64_t cols,
              cudaStream_t stream);
// out[i] = x[rows[i]], whole rows of row_bytes; rows: device memory
void gather_rows(void* out, std::size_t out_stride_bytes, const void* x, std::size_t x_stride_bytes,
                 std::size_t row_bytes, const std::int32_t* rows, std::int64_t n, cudaStream_t stream);
// x = softcap(scale * x), F32; softcap 0: only scaled
void scale_softcap(float* x, std::int64_t ldx, std::int64_t rows, std::int64_t cols, float scale, float softcap,
                   cudaStream_t stream);
// bf16 bits from fp32, for packing weights on the device.
void convert_to_bf16(std::uint16_t* out, const float* x, std::int64_t n, cudaStream_t stream);

// In order, see Backend::copy_blocks; runs of adjacent blocks move as one copy. Pools may be device or pinned memory.
void copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                 std::span<const std::pair<BlockId, BlockId>> from_to, cudaStream_t stream);

}  // namespace fastllm::cuda

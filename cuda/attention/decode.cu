// Attention of one query token per row over its paged KV cache:
//
//   for each row r and head h:  s[j] = scale q[r, h] . k[j, h / group], capped, + alibi, for the positions j in the
//   window
//                               out[r, h] = sum_j softmax(s)[j] v[j, h / group]
//
// Moves every key and value once: 2 x length x kv_heads x head_dim elements per row; 4 operations per element and query
// head of the group on tensor cores, a few percent of their rate. Partial results of cut rows stay in L2.
// Benchmark: fastllm_bench_cuda --benchmark_filter='^Decode/'
#include <bit>

#include "attention/decode_kernel.cuh"

namespace fastllm::cuda {
namespace {

using decode::Params;

template <class Cache, int kHeadDim>
void launch_decode(const Params& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(p.num_sms * decode::blocks_per_sm(kHeadDim, Cache::kBytes == 1));
  launch(decode::decode_kernel<Cache, kHeadDim>, blocks, decode::kThreads, 0, stream, p);
}

template <class Cache>
void launch_decode(const Params& p, int head_dim, cudaStream_t stream) {
  if (head_dim == 64) return launch_decode<Cache, 64>(p, stream);
  if (head_dim == 128) return launch_decode<Cache, 128>(p, stream);
  launch_decode<Cache, 256>(p, stream);
}

// What the tensor core kernel takes; anything else is generic.
bool has_fast_path(const AttentionCall& call) {
  const AttnArgs& a = call.args;
  const KvView& kv = call.kv;
  if (call.dtype != DType::BF16 || (kv.dtype != DType::BF16 && kv.dtype != DType::F8E4M3)) return false;
  if (a.head_dim != 64 && a.head_dim != 128 && a.head_dim != 256) return false;
  if (kv.block_size < 8 || !std::has_single_bit(static_cast<unsigned>(kv.block_size))) return false;
  if (kv.block_stride > INT32_MAX / 2) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(call.q) | reinterpret_cast<std::uintptr_t>(call.out) |
                       reinterpret_cast<std::uintptr_t>(kv.base);
  return address % 16 == 0 && call.ldq % 8 == 0;
}

}  // namespace

void decode_attention(const AttentionCall& call, const StepView& step, const std::byte* plan,
                      const AttentionLimits& limits, void* workspace, cudaStream_t stream) {
  if (step.num_decode_rows == 0) return;
  if (!has_fast_path(call)) {
    generic_attention(call, step, 0, step.num_decode_rows, step.num_decode_rows, stream);
    return;
  }
  const AttnArgs& a = call.args;
  const auto kv_bytes = static_cast<std::int64_t>(size_of(call.kv.dtype));
  Params p;
  p.q = static_cast<const std::byte*>(call.q);
  p.q_row_bytes = call.ldq * 2;
  p.out = static_cast<std::uint16_t*>(call.out);
  p.keys = static_cast<const std::byte*>(call.kv.base);
  p.block_bytes = static_cast<std::int32_t>(call.kv.block_stride * kv_bytes);
  p.value_bytes = static_cast<std::int32_t>(call.kv.kv_stride * kv_bytes);
  p.head_bytes = static_cast<std::int32_t>(call.kv.head_stride * kv_bytes);
  p.block_shift = std::countr_zero(static_cast<unsigned>(call.kv.block_size));
  p.tables = step.tables;
  p.table_width = step.table_width;
  p.rows = step.rows;
  p.num_rows = step.num_decode_rows;
  p.heads = a.heads;
  p.group = a.heads / a.kv_heads;
  p.split = decode::split_heads(p.group);
  p.items_per_row = a.kv_heads * p.split.passes;
  p.warps_across = p.split.heads <= 8 ? 1 : p.split.heads <= 16 ? 2 : 4;
  p.window = a.window;
  const bool planned = a.window > 0 && a.window == limits.window;
  p.plan_window = planned ? a.window : 0;
  p.prefix = reinterpret_cast<const std::int32_t*>(plan) + (planned ? decode::prefix_stride(limits.max_rows) : 0);
  p.score_scale = a.scale * (a.softcap > 0 ? 2.0f * decode::kLog2e / a.softcap : decode::kLog2e);
  p.softcap_log2 = a.softcap * decode::kLog2e;
  p.alibi_slopes = call.alibi_slopes;
  p.num_sms = limits.num_sms;
  p.num_slots = std::int64_t{2} * limits.num_sms * decode::blocks_per_sm(a.head_dim, call.kv.dtype == DType::F8E4M3);
  p.counters = static_cast<std::int32_t*>(workspace);
  p.partial_out = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + decode_counter_bytes(limits));
  p.partial_sums = reinterpret_cast<float2*>(p.partial_out + p.num_slots * p.split.heads * a.head_dim);
  if (call.kv.dtype == DType::BF16) {
    launch_decode<decode::Bf16Cache>(p, a.head_dim, stream);
  } else {
    launch_decode<decode::Fp8Cache>(p, a.head_dim, stream);
  }
}

}  // namespace fastllm::cuda

// A device as about twenty leaf operations on tensors and numbers: no layer, no model, no scheduling. One object is one
// device with one in-order stream; calls come from one thread. Fusions have default bodies made of leaves.
//
// Shapes: T = input tokens of the step over all rows; R = rows that sample; H = hidden; V = vocabulary of this rank.
// Activation dtype is F32 or BF16; the residual stream is F32; logits are F32.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/kv_cache.h"
#include "base/ids.h"
#include "fastllm/model_spec.h"
#include "tensor/tensor.h"

namespace fastllm {

// Memory of a backend, freed with the object.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() const = 0;
  virtual std::size_t bytes() const = 0;
};

enum class MemoryKind : std::uint8_t {
  Device,  // what ops take
  Lazy,    // Device, physical pages taken on first touch (KV pools)
  Host,    // readable by the host; pinned where that means something
};

// A matrix on its way into the backend's own layout. read() yields fp32 rows, already transformed, sliced to this rank
// and dequantised; it may be called from several threads at once for disjoint ranges.
struct HostMatrix {
  std::int64_t rows = 0, cols = 0;  // [out, in]
  std::function<void(std::int64_t row_begin, std::int64_t row_end, float* out /* [row_end - row_begin, cols] */)> read;
};

// A weight in the layout its backend computes on. Quantisation hides in here.
class PackedWeight {
 public:
  virtual ~PackedWeight() = default;
  virtual std::int64_t rows() const = 0;  // out
  virtual std::int64_t cols() const = 0;  // in
  virtual std::size_t bytes() const = 0;
};

// One row of a step as attention sees it: tokens [token_begin, token_begin + num_tokens) of the batch stand at
// positions [first_pos, first_pos + num_tokens) and read every KV position up to their own.
struct AttnRow {
  std::int32_t token_begin = 0, num_tokens = 0, first_pos = 0;
  const BlockId* table = nullptr;  // host memory; entry i holds positions [i * block_size, (i + 1) * block_size)
};

// Made once per step by plan_attention() and shared by all layers.
class AttnPlan {
 public:
  virtual ~AttnPlan() = default;
};

struct AttnArgs {
  int heads = 0, kv_heads = 0, head_dim = 0;  // of this rank
  float scale = 0;
  float softcap = 0;                    // s = softcap * tanh(s / softcap) before masking; 0: off
  int window = 0;                       // positions attended to, the current one included; 0: all
  std::span<const float> alibi_slopes;  // per head, empty: none
};

struct RopeArgs {
  const float* cos_sin = nullptr;  // [positions, dim]: dim/2 cosines, then dim/2 sines; device memory
  int dim = 0;                     // rotated dimensions; 0: none
  RopeStyle style = RopeStyle::Half;
};

// Token counts of one sequence, for penalties: [vocab] int32, device memory. Bit 30 is set for ids in the prompt, the
// low 30 bits count occurrences in the output.
using PenaltyCounts = std::int32_t;
inline constexpr std::int32_t kInPrompt = 1 << 30;

// How to sample one row of logits.
struct SampleRow {
  float temperature = 1, top_p = 1, min_p = 0;
  int top_k = 0;  // 0: off
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  PenaltyCounts* counts = nullptr;  // null when no penalty is set; sample() counts the sampled token
  std::span<const std::pair<std::int32_t, float>> logit_bias;
  std::span<const std::int32_t> forbidden;  // ids that may not be sampled (EOS and stop ids before min_tokens)
  const std::uint32_t* mask = nullptr;      // [ceil(vocab / 32)], 1 = allowed; null: all
  std::uint64_t seed = 0;
  std::int64_t position = 0;  // of the token to be sampled; with the seed it keys the random numbers (Philox)
};

struct LogprobRequest {
  std::int32_t row = 0;    // of the logits
  std::int32_t token = 0;  // whose log-probability is wanted
  std::int32_t top = 0;    // alternatives
};

struct LogprobResult {
  float logprob = 0;
  std::int32_t rank = 0;                            // 1 + number of tokens with a greater logit
  std::vector<std::pair<std::int32_t, float>> top;  // {token, logprob}, best first, ties by lower id
};

struct DeviceInfo {
  std::string name;               // "cpu (amx, 2 threads)"
  std::int64_t memory_free = 0;   // bytes this process may still take
  std::int64_t memory_total = 0;  // bytes
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual DeviceInfo info() const = 0;
  virtual std::unique_ptr<Buffer> allocate(std::size_t bytes, MemoryKind kind) = 0;
  virtual void copy(void* dst, const void* src, std::size_t bytes) = 0;  // any memory of this backend or the host
  virtual void synchronize() = 0;                                        // until everything enqueued is done

  // compute: DType of the activations the weight will meet.
  virtual std::unique_ptr<PackedWeight> pack(const HostMatrix& weight, DType compute) = 0;

  // out[t] = scale * table[ids[t] - id_begin] where that row exists here, else 0.   ids: [T] host; out: [T, H] F32
  virtual void embed(const Tensor& out, std::span<const TokenId> ids, const PackedWeight& table, std::int64_t id_begin,
                     float scale) = 0;
  // x[t] += table[positions[t]]   table: [positions, H] F32
  virtual void add_positions(const Tensor& x, std::span<const std::int32_t> positions, const Tensor& table) = 0;

  // out = norm(x) * weight (+ bias).   x: [N, H] F32, or the activation dtype (N heads of head_dim); out: activation
  virtual void norm(const Tensor& out, const Tensor& x, const NormSpec& spec, const float* weight,
                    const float* bias) = 0;
  // residual += delta; out = norm(residual).   delta: [T, H] F32
  virtual void add_norm(const Tensor& out, const Tensor& residual, const Tensor& delta, const NormSpec& spec,
                        const float* weight, const float* bias) {
    add(residual, delta);
    norm(out, residual, spec, weight, bias);
  }

  // out = x w^T (+ bias), or out += x w^T (+ bias) when accumulate.  x: [M, in] activation; out: [M, out] activation or
  // F32
  virtual void linear(const Tensor& out, const Tensor& x, const PackedWeight& w, const float* bias,
                      bool accumulate) = 0;

  // qkv: [T, (heads + 2 kv_heads) head_dim] activation. Norms q and k per head (null weight: none), rotates them in
  // place, and stores k and v at the positions of `rows`.
  virtual void qk_norm_rope_write_kv(const Tensor& qkv, int heads, const NormSpec& q_norm, const float* q_weight,
                                     const NormSpec& k_norm, const float* k_weight, const RopeArgs& rope,
                                     const KvView& kv, std::span<const AttnRow> rows) = 0;
  virtual std::unique_ptr<AttnPlan> plan_attention(std::span<const AttnRow> rows, int block_size) = 0;
  // out: [T, heads head_dim] activation; q: [T, heads head_dim], row stride as in qkv. Causal.
  virtual void attention(const Tensor& out, const Tensor& q, const KvView& kv, const AttnPlan& plan,
                         const AttnArgs& args) = 0;

  // out = act(gate) * up.   gate_up: [T, 2 inner], gate first; out: [T, inner]
  virtual void gated_act(const Tensor& out, const Tensor& gate_up, Activation act) = 0;
  virtual void act(const Tensor& x, Activation act) = 0;   // in place
  virtual void add(const Tensor& x, const Tensor& y) = 0;  // x += y, same shape, F32
  // out[i] = x[rows[i]]; same dtype
  virtual void gather_rows(const Tensor& out, const Tensor& x, std::span<const std::int32_t> rows) = 0;

  // logits: [R, V] F32 over the whole vocabulary, in place.
  virtual void scale_softcap(const Tensor& logits, float scale, float softcap) = 0;
  virtual void process_logits(const Tensor& logits, std::span<const SampleRow> rows) = 0;  // bias, mask, penalties
  virtual void sample(const Tensor& logits, std::span<const SampleRow> rows, std::span<TokenId> out) = 0;
  virtual void topk_logprobs(const Tensor& logits, std::span<const LogprobRequest> requests,
                             std::span<LogprobResult> out) = 0;

  // Whole blocks of `bytes` each between pools (device to device, device to host, host to device).
  virtual void copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                           std::span<const std::pair<BlockId, BlockId>> from_to) = 0;
};

// threads >= 1. isa: "" picks the best the machine has; "base", "avx2", "avx512", "amx" force one (tests).
std::unique_ptr<Backend> make_cpu_backend(int threads, const std::string& isa = "");

}  // namespace fastllm

// A device as about twenty leaf operations on tensors and numbers: no layer, no model, no scheduling. One object is one
// device with one in-order stream; calls come from one thread. Fusions have default bodies made of leaves.
//
// Ops enqueue; only copies to the host, synchronize() and wait_step() wait.
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
#include "base/cpu_placement.h"
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

// How a weight is kept in groups of adjacent columns, each with fp16 numbers of its own: w = scale (u - zero), or
// w = scale u + offset, with unsigned codes u.
struct GroupFormat {
  int bits = 0;          // of a code: 4 or 8; 0: not in groups
  bool offsets = false;  // one for each group; zero is 0 then
  int zero = 0;
  int size = 32;  // columns of a group: 32, 64 or 128

  bool operator==(const GroupFormat&) const = default;
};
inline constexpr std::int64_t kGroup = 32;  // columns of the smallest group

// A matrix on its way into the backend's own layout. read() yields fp32 rows, already transformed, sliced to this rank
// and dequantised; it may be called from several threads at once for disjoint ranges.
struct HostMatrix {
  std::int64_t rows = 0, cols = 0;  // [out, in]
  std::function<void(std::int64_t row_begin, std::int64_t row_end, float* out /* [row_end - row_begin, cols] */)> read;
  // The same rows as bf16 bits, where the source holds them so; empty otherwise.
  std::function<void(std::int64_t row_begin, std::int64_t row_end, std::uint16_t* out)> read_bf16;
  // How to keep it where the backend can; one that cannot keeps it as it computes.
  GroupFormat groups = {};
  // The same rows as the source's own codes in this format; empty: the backend chooses codes for what read() gives.
  std::function<void(std::int64_t row_begin, std::int64_t row_end, std::uint8_t* codes /* [rows, cols] */,
                     float* scales /* [rows, ceil(cols / size)] */, float* offsets /* the same, or null without */)>
      read_groups = {};
  // Column j of read_groups() is column order[j] of the product (checkpoints that sorted columns before they were
  // grouped); null: as they are. read() is never reordered.
  std::shared_ptr<const std::vector<std::int32_t>> order = {};
};

// A weight in the layout its backend computes on. Quantisation hides in here.
class PackedWeight {
 public:
  virtual ~PackedWeight() = default;
  virtual std::int64_t rows() const = 0;  // out
  virtual std::int64_t cols() const = 0;  // in
  virtual std::size_t bytes() const = 0;
};

// One row of a step: tokens [token_begin, token_begin + num_tokens) of the batch stand at positions
// [first_pos, first_pos + num_tokens) of the sequence in `slot` and read every KV position up to their own.
struct StepRow {
  std::int32_t token_begin = 0, num_tokens = 0, first_pos = 0;
  SlotId slot = kNoSlot;
  bool from_slot = false;  // its only input is the token last sampled for the slot
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

// How to sample one row of logits.
struct SampleRow {
  SlotId slot = kNoSlot;  // where the token goes
  float temperature = 1, top_p = 1, min_p = 0;
  int top_k = 0;  // 0: off
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  bool penalised = false;  // the slot's counts are read, and the sampled token is counted; see init_counts()
  std::span<const std::pair<std::int32_t, float>> logit_bias;
  std::span<const std::int32_t> forbidden;  // ids that may not be sampled (EOS and stop ids before min_tokens)
  std::uint64_t seed = 0;
  std::int64_t position = 0;  // of the token to be sampled; with the seed it keys the random numbers (Philox)
};

// Everything the host says about a step. Host memory, borrowed until begin_step() returns.
struct StepInput {
  std::span<const TableSet> table_sets;  // applied to the slots' block tables first
  std::span<const TokenId> tokens;       // [T]; ignored where a row is from_slot
  std::span<const StepRow> rows;         // decode rows (one token, sampled) first
  std::int32_t num_decode_rows = 0;
  // 0, or >= rows.size() if all rows are decode rows and all sample: the step then has this many tokens and logit
  // rows, of which the last are without effect.
  std::int32_t padded_rows = 0;
  std::span<const std::int32_t> logit_tokens;  // [R], ascending: tokens whose logits are sampled from
  std::span<const SampleRow> sampling;         // [R], or empty on ranks that do not sample
};

// Capacities of all steps, told once before the first.
struct StepLimits {
  int max_tokens = 0;      // T
  int max_slots = 0;       // sequences resident at once; also the most rows of a step
  int max_logit_rows = 0;  // rows of one logits tensor
  int table_width = 0;     // blocks of one sequence
  int block_size = 0;      // positions
  int window = 0;          // of the layers that have one, see AttnArgs; 0: none has
  int vocab = 0;
  int in_flight = 1;  // steps begun and not yet waited for
};

struct LogprobRequest {
  std::int32_t row = 0;       // of the logits
  std::int32_t token = 0;     // whose log-probability is wanted
  std::int32_t top = 0;       // alternatives
  std::int32_t sampled = -1;  // >= 0: the token meant is the one sampled as number `sampled` of the step
};

struct LogprobResult {
  std::int32_t token = 0;
  float logprob = 0;
  std::int32_t rank = 0;                            // 1 + number of tokens with a greater logit
  std::vector<std::pair<std::int32_t, float>> top;  // {token, logprob}, best first, ties by lower id
};

// What a step brought back to the host.
struct StepOutput {
  std::vector<TokenId> tokens;          // [R]; -1: the row had no usable logits, see sample()
  std::vector<LogprobResult> logprobs;  // of all requests of the step, in the order they were made
};

// A step under way: its inputs in device memory, what attention prepared for all layers, where its results go. Made
// and reused by the backend.
class Step {
 public:
  virtual ~Step() = default;
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
  // Free memory is known only after the largest step has run: kernels load and working memory grows on first use.
  virtual bool profile_by_running() const { return false; }
  virtual std::unique_ptr<Buffer> allocate(std::size_t bytes, MemoryKind kind) = 0;
  virtual void copy(void* dst, const void* src, std::size_t bytes) = 0;  // any memory of this backend or the host
  virtual void synchronize() = 0;                                        // until everything enqueued is done

  // compute: DType of the activations the weight will meet.
  virtual std::unique_ptr<PackedWeight> pack(const HostMatrix& weight, DType compute) = 0;

  // --- A step: begin_step, ops, end_step; wait_step later, perhaps on another thread while newer steps are enqueued.
  // Block tables, last tokens and penalty counts live on the device, by slot.
  virtual void init_steps(const StepLimits& limits) = 0;
  // The reference is valid until in_flight more steps were begun.
  virtual Step& begin_step(const StepInput& input) = 0;
  virtual void end_step(Step& step) = 0;
  virtual bool step_done(Step& step) = 0;  // wait_step() would not block
  virtual void wait_step(Step& step, StepOutput& out) = 0;
  // A penalised sequence moves into a slot. tokens: prompt and output so far.
  virtual void init_counts(SlotId slot, std::span<const TokenId> tokens, std::int32_t num_prompt) = 0;

  // Padded sizes for which replay() has a recording, ascending, within max_tokens and max_logit_rows. Steps of decode
  // rows only are padded to the next one.
  virtual std::span<const int> graph_sizes() const { return {}; }
  // Runs the ops that `body` enqueues: recorded once per padded size and replayed from then on, so body must enqueue
  // the same ops on the same tensors for every step of that size.
  virtual void replay(Step&, const std::function<void()>& body) { body(); }

  // out[t] = scale * table[id of token t - id_begin] where that row exists here, else 0.   out: [T, H] F32
  virtual void embed(const Tensor& out, const Step& step, const PackedWeight& table, std::int64_t id_begin,
                     float scale) = 0;
  // x[t] += table[position of token t]   table: [positions, H] F32
  virtual void add_positions(const Tensor& x, const Step& step, const Tensor& table) = 0;

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
  // out = act(gate) * up with [gate, up] = x w^T (+ bias).   scratch: [M, 2 inner]; out: [M, inner]
  virtual void gated_linear(const Tensor& out, const Tensor& scratch, const Tensor& x, const PackedWeight& w,
                            const float* bias, Activation act) {
    linear(scratch, x, w, bias, false);
    gated_act(out, scratch, act);
  }

  // qkv: [T, (heads + 2 kv_heads) head_dim] activation. Norms q and k per head (null weight: none), rotates them in
  // place, and stores k and v at the positions of the step's tokens.
  virtual void qk_norm_rope_write_kv(const Tensor& qkv, const Step& step, int heads, const NormSpec& q_norm,
                                     const float* q_weight, const NormSpec& k_norm, const float* k_weight,
                                     const RopeArgs& rope, const KvView& kv) = 0;
  // out: [T, heads head_dim] activation; q: [T, heads head_dim], row stride as in qkv. Causal.
  virtual void attention(const Tensor& out, const Tensor& q, const Step& step, const KvView& kv,
                         const AttnArgs& args) = 0;

  // out = act(gate) * up.   gate_up: [T, 2 inner], gate first; out: [T, inner]
  virtual void gated_act(const Tensor& out, const Tensor& gate_up, Activation act) = 0;
  virtual void act(const Tensor& x, Activation act) = 0;   // in place
  virtual void add(const Tensor& x, const Tensor& y) = 0;  // x += y, same shape, F32
  // out[i] = x[rows[i]]; same dtype.   rows: host memory
  virtual void gather_rows(const Tensor& out, const Tensor& x, std::span<const std::int32_t> rows) = 0;
  // out[i] = x[logit_tokens[i]], [R, H]
  virtual void gather_logit_rows(const Tensor& out, const Tensor& x, const Step& step) = 0;

  // logits: [R or more, V] F32 over the whole vocabulary, in place.
  virtual void scale_softcap(const Tensor& logits, float scale, float softcap) = 0;
  // Forbids what the masks forbid.   bits: [rows, ceil(V / 32)] host memory, 1 = allowed; rows: of the logits
  virtual void mask_logits(const Tensor& logits, std::span<const std::int32_t> rows,
                           std::span<const std::uint32_t> bits) = 0;
  // Bias, forbidden ids and penalties of the step's sampling.
  virtual void process_logits(const Tensor& logits, const Step& step) = 0;
  // Chooses the tokens of the step's sampling rows and makes them their slots' last tokens; leaves the logits alone.
  // A row that holds a NaN, or whose greatest logit is infinite, has none: the slot, and on devices sampled_tokens(),
  // get token 0, for steps that are under way.
  virtual void sample(const Tensor& logits, Step& step) = 0;
  // [R] device memory: what sample() chose. Other ranks receive it there and then call commit_tokens().
  virtual TokenId* sampled_tokens(Step& step) = 0;
  // sampled_tokens become the last tokens of the slots of the rows that logit_tokens end.
  virtual void commit_tokens(Step& step) = 0;
  // Results are part of the StepOutput.
  virtual void topk_logprobs(const Tensor& logits, Step& step, std::span<const LogprobRequest> requests) = 0;

  // Whole blocks of `bytes` each between pools (device to device, device to host, host to device). In order: a block
  // may be read by one pair and written by a later one.
  virtual void copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                           std::span<const std::pair<BlockId, BlockId>> from_to) = 0;
};

// threads >= 1. isa: "" picks the best the machine has; "base", "avx2", "avx512", "avx512_bf16", "amx" force
// one (tests).
std::unique_ptr<Backend> make_cpu_backend(int threads, const std::string& isa = "");
// The same, called on the thread that runs the ops: it is the first of those placed.
std::unique_ptr<Backend> make_cpu_backend(const ThreadPlacement& placement, const std::string& isa = "");

struct CudaOptions {
  int device = 0;
  bool graphs = true;
  bool deterministic = false;  // batch-invariant kernels
};

// GPUs the CUDA backend can use; when 0, *why says what is missing (the plugin, the driver, a GPU, cuBLASLt).
int cuda_device_count(std::string* why = nullptr);
// Loads libfastllm_cuda.so on first use. Throws ResourceError with the same reasons.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

}  // namespace fastllm

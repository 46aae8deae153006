// Log-probabilities: of one token, its rank, and the best `top` tokens of a row.
//
//   log_z = max + ln sum_i exp(x[i] - max)       logprob(i) = x[i] - log_z
//   rank = 1 + |{i : x[i] > x[token]}|           top: greatest first, ties by lower id
//
// A row is split into parts of 8192 ids, whatever else is asked for, so the order of the sum depends on nothing but the
// vocabulary. A part fits the registers of its block and is read once; `best_of_row` then merges the parts.
// Cost: 4 vocab bytes per request. Benchmark: fastllm_bench_cuda --benchmark_filter=Logprobs
#include "launch.cuh"
#include "sampling/order.cuh"
#include "sampling/row_part.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kEach = 16;                   // logits of one thread, kThreads ids apart
constexpr int kPartIds = kThreads * kEach;  // 8192
constexpr int kMaxParts = 64;               // vocabularies up to 524288
constexpr int kHeads = kMaxParts / 32;      // parts merged by one lane

struct PartResult {
  float max, sum;  // sum of exp(x - max)
  std::int32_t num_greater, pad;
  Ranked top[kMaxDeviceTop];  // 0 beyond the last
};

int num_parts(int vocab) { return (vocab + kPartIds - 1) / kPartIds; }

__device__ __forceinline__ Ranked warp_best(Ranked x) {
  const std::uint32_t key = __reduce_max_sync(0xffffffffu, key_of(x));
  const std::uint32_t low = key_of(x) == key ? static_cast<std::uint32_t>(x) : 0;
  return static_cast<Ranked>(key) << 32 | __reduce_max_sync(0xffffffffu, low);
}

// Descending from n lists, list l with head heads(l): one warp, each lane holding up to kLists of them.
template <int kLists, class Head, class Out>
__device__ __forceinline__ void merge_lists(int lists, int wanted, Head head, Out out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Ranked first[kLists];
  int next[kLists];
#pragma unroll
  for (int l = 0; l < kLists; ++l) {
    next[l] = 1;
    first[l] = lane + 32 * l < lists ? head(lane + 32 * l, 0) : 0;
  }
  for (int i = 0; i < wanted; ++i) {
    Ranked mine = 0;
#pragma unroll
    for (int l = 0; l < kLists; ++l) mine = first[l] > mine ? first[l] : mine;
    const Ranked best = warp_best(mine);
    if (lane == 0) out(i, best);
    if (best == 0 || mine != best) continue;
#pragma unroll
    for (int l = 0; l < kLists; ++l) {
      if (first[l] != best) continue;
      first[l] = next[l] < wanted ? head(lane + 32 * l, next[l]) : 0;
      ++next[l];
    }
  }
}

__device__ __forceinline__ int token_of(const DeviceLogprobRequest& request, const TokenId* sampled) {
  return request.sampled >= 0 ? sampled[request.sampled] : request.token;
}

__global__ void __launch_bounds__(kThreads)
    reduce_parts(Logits logits, const DeviceLogprobRequest* requests, const TokenId* sampled, PartResult* parts) {
  __shared__ Ranked top_of_warps[kWarps][kMaxDeviceTop];
  __shared__ float of_warps[2][kWarps];
  __shared__ int greater_of_warps[kWarps];
  pdl_wait();
  pdl_launch();
  const DeviceLogprobRequest request = requests[blockIdx.y];
  const float* row = row_of(logits, request.row);
  const float own = row[token_of(request, sampled)];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int begin = static_cast<int>(blockIdx.x) * kPartIds + thread;
  PartResult& result = parts[static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x];

  float x[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int id = begin + j * kThreads;
    x[j] = id < logits.vocab ? row[id] : -INFINITY;
  }
  float max = -INFINITY;
  int greater = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    max = fmaxf(max, x[j]);
    greater += x[j] > own;
  }
  max = warp_max(max);
  if (lane == 0) of_warps[0][warp] = max;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) max = fmaxf(max, of_warps[0][w]);
  float sum = 0.0f;
  if (max != -INFINITY) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) sum += expf(x[j] - max);
  }
  sum = warp_sum(sum);
  greater = __reduce_add_sync(0xffffffffu, greater);
  if (lane == 0) of_warps[1][warp] = sum, greater_of_warps[warp] = greater;

  const int wanted = min(request.top, kMaxDeviceTop);
  if (wanted > 0) {
    // The warp's best, one after the other; `ceiling` is the last one taken.
    const auto best_below = [&](Ranked ceiling) {
      Ranked best = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int id = begin + j * kThreads;
        const Ranked candidate = id < logits.vocab ? ranked(x[j], id) : 0;
        if (candidate < ceiling && candidate > best) best = candidate;
      }
      return best;
    };
    Ranked mine = best_below(~Ranked{0});
    for (int i = 0; i < wanted; ++i) {
      const Ranked best = warp_best(mine);
      if (lane == 0) top_of_warps[warp][i] = best;
      if (best != 0 && mine == best) mine = best_below(best);
    }
  }
  __syncthreads();
  if (thread == 0) {
    float total = 0.0f;
    int num_greater = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warps[1][w], num_greater += greater_of_warps[w];
    result.max = max;
    result.sum = total;
    result.num_greater = num_greater;
  }
  if (warp == 0 && wanted > 0) {
    merge_lists<1>(
        kWarps, wanted, [&](int l, int i) { return top_of_warps[l][i]; },
        [&](int i, Ranked best) { result.top[i] = best; });
  }
}

// One warp per request.
__global__ void __launch_bounds__(32)
    best_of_row(Logits logits, const DeviceLogprobRequest* requests, const TokenId* sampled, const PartResult* parts,
                int num_parts, DeviceLogprobResult* results) {
  pdl_wait();
  pdl_launch();
  const DeviceLogprobRequest request = requests[blockIdx.x];
  const PartResult* part = parts + static_cast<std::int64_t>(blockIdx.x) * num_parts;
  DeviceLogprobResult& result = results[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x);
  float max = -INFINITY;
  int greater = 0;
  for (int p = lane; p < num_parts; p += 32) max = fmaxf(max, part[p].max), greater += part[p].num_greater;
  max = warp_max(max);
  greater = __reduce_add_sync(0xffffffffu, greater);
  double sum = 0.0;
  for (int p = lane; p < num_parts; p += 32)
    sum += part[p].sum == 0.0f ? 0.0 : part[p].sum * exp(static_cast<double>(part[p].max - max));
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  const double log_z = static_cast<double>(max) + log(sum);
  const auto logprob = [&](float x) { return static_cast<float>(static_cast<double>(x) - log_z); };

  const int wanted = min(min(request.top, kMaxDeviceTop), logits.vocab);
  if (lane == 0) {
    const int token = token_of(request, sampled);
    result.logprob = logprob(row_of(logits, request.row)[token]);
    result.rank = 1 + greater;
    result.token = token;
    result.num_top = ::max(wanted, 0);
  }
  if (wanted > 0) {
    merge_lists<kHeads>(
        num_parts, wanted, [&](int l, int i) { return part[l].top[i]; },
        [&](int i, Ranked best) {
          result.top_ids[i] = id_of(best);
          result.top_logprobs[i] = logprob(value_of_key(key_of(best)));
        });
  }
}

}  // namespace

std::size_t logprob_workspace_bytes(int max_requests) {
  return static_cast<std::size_t>(max_requests) * kMaxParts * sizeof(PartResult);
}

void topk_logprobs(const Logits& logits, const DeviceLogprobRequest* requests, int n, const TokenId* sampled,
                   DeviceLogprobResult* results, void* workspace, cudaStream_t stream) {
  if (n == 0) return;
  const int parts = num_parts(logits.vocab);
  auto* of_parts = static_cast<PartResult*>(workspace);
  launch(reduce_parts, dim3(static_cast<unsigned>(parts), static_cast<unsigned>(n)), kThreads, 0, stream, logits,
         requests, sampled, of_parts);
  launch(best_of_row, static_cast<unsigned>(n), 32, 0, stream, logits, requests, sampled, of_parts, parts, results);
}

}  // namespace fastllm::cuda

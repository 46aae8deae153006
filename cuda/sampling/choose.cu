// One block per row ends what the other stages began: the best of the row's parts, or the row's list sorted, cut and
// drawn from. The token goes to all who want it.
//
//   sort(list); keep the first k and what equals the k-th; keep the fewest whose mass reaches p; argmax of score
//
// Cost: kMaxParts * 8 bytes per row, for listed rows up to kListCapacity * 8; sorting n log^2 n / 4 exchanges in shared
// memory. Rows whose list overflowed are read up to eight times (exact_cut.cuh).
// Benchmark: fastllm_bench_cuda --benchmark_filter=Sample
#include "launch.cuh"
#include "sampling/draw.cuh"
#include "sampling/exact_cut.cuh"
#include "sampling/row_filter.cuh"
#include "sampling/stages.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kSimpleThreads = 64;  // where no row is filtered
constexpr int kEach = kListCapacity / kThreads;

struct SharedState {
  union {
    Ranked list[kListCapacity];
    RadixScratch radix;
  };
  DrawScratch<kThreads> draw;
  Ranked of_warps[kWarps];
  int num_kept, last;
};

// id: -1 where the row's logits choose none. Only the host is told; whoever reads on gets a token that exists.
__device__ __forceinline__ void commit(const SampleCall& call, int vocab, int r, const DeviceSampleRow& row, int id) {
  const int token = ::max(id, 0);
  call.sampled[r] = token;
  if (call.host_sampled != nullptr) call.host_sampled[r] = id;
  if (row.slot < 0) return;
  if (call.last_token != nullptr) call.last_token[row.slot] = token;
  if (id >= 0 && row.penalised != 0 && call.counts != nullptr)
    ++call.counts[static_cast<std::int64_t>(row.slot) * vocab + id];
}

// greatest: of the logits of a row. Also false where there is none, and where one was NaN: neither has a finite value.
__device__ __forceinline__ bool is_usable(Ranked greatest) { return isfinite(value_of_key(key_of(greatest))); }
__device__ __forceinline__ int token_of(Ranked greatest) { return is_usable(greatest) ? id_of(greatest) : -1; }

template <int kBlock>
__device__ __forceinline__ int token_of_parts(const SampleStages& s, int r, bool drawn,
                                              Ranked (&of_warps)[kBlock / 32]) {
  static_assert(kBlock >= kMaxParts);
  const int thread = static_cast<int>(threadIdx.x);
  const Ranked mine = thread < s.parts ? s.best[static_cast<std::int64_t>(r) * s.parts + thread] : 0;
  Ranked best = block_max<kBlock>(mine, of_warps);
  if (!drawn || best == kNotNumbers) return token_of(best);
  // A score is infinite where the greatest logit is, or where so low a temperature made it so.
  if (best == 0 || !isfinite(value_of_key(key_of(best)))) {
    const RowPart part = part_of_row(row_of(s.logits, r), s.logits.vocab, 0, 1);
    const Ranked of_thread = argmax_of_part<kBlock>(part);
    __syncthreads();
    const Ranked greatest = block_max<kBlock>(of_thread, of_warps);
    if (best == 0 || !is_usable(greatest)) return token_of(greatest);
  }
  return id_of(best);
}

// Descending; n is a power of two.
__device__ __forceinline__ void sort(Ranked* list, int n) {
  for (int run = 2; run <= n; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kThreads) {
        const int a = 2 * i - (i & (step - 1)), b = a + step;
        const Ranked x = list[a], y = list[b];
        if ((x < y) == ((a & run) == 0)) list[a] = y, list[b] = x;
      }
      __syncthreads();
    }
  }
}

// How many of the first n sorted tokens it takes until their masses, with `before` of greater ones, reach what `target`
// says of the sum of the n; -1 when they do not.
template <class Target>
__device__ int num_reaching(SharedState& shared, int n, const Mass& mass, std::uint64_t before, Target target_of) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared.last = -1;
  std::uint64_t masses[kEach], sum = 0, listed = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = thread * kEach + j;
    masses[j] = i < n ? mass(value_of_key(key_of(shared.list[i]))) : 0;
    sum += masses[j];
  }
  before += block_sum_before<kThreads>(sum, shared.of_warps, &listed);
  const double target = target_of(listed);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool short_of = static_cast<double>(before) < target;
    before += masses[j];
    if (short_of && static_cast<double>(before) >= target) shared.last = thread * kEach + j;
  }
  __syncthreads();
  return shared.last >= 0 ? shared.last + 1 : -1;
}

// How many of the n sorted tokens of the list pass top_k and top_p; -1 when that depends on tokens not listed.
__device__ int num_passing(SharedState& shared, const DeviceSampleRow& row, int vocab, int n, bool all_listed,
                           const Mass& mass, std::uint64_t mass_kept) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool by_k = by_top_k(row, vocab);
  if (by_k && n < row.top_k && !all_listed) return -1;
  if (thread == 0) shared.num_kept = n;
  __syncthreads();
  if (by_k && n >= row.top_k) {
    const std::uint32_t kth = key_of(shared.list[row.top_k - 1]);
    for (int i = row.top_k - 1 + thread; i + 1 < n; i += kThreads)
      if (key_of(shared.list[i]) == kth && key_of(shared.list[i + 1]) != kth) shared.num_kept = i + 1;
  }
  __syncthreads();
  const int num_kept = shared.num_kept;
  if (!(row.top_p < 1.0f)) return num_kept;
  const int reaching = num_reaching(shared, num_kept, mass, 0,
                                    [&](std::uint64_t listed) { return top_p_target(row, by_k ? listed : mass_kept); });
  return reaching >= 0 ? reaching : by_k || all_listed ? num_kept : -1;
}

// The winner among tokens that pass the row's filters, or its greatest logit.
__device__ int token_of_listed(const SampleStages& s, SharedState& shared, const DeviceSampleRow& row, int r) {
  const int thread = static_cast<int>(threadIdx.x), vocab = s.logits.vocab;
  const Ranked top = block_max<kThreads>(thread < s.parts ? s.best[static_cast<std::int64_t>(r) * s.parts + thread] : 0,
                                         shared.of_warps);
  if (!is_usable(top)) return -1;
  const float max = value_of_key(key_of(top));

  const bool edge_only = s.edge[r] >= 0;
  const std::uint32_t num_listed = edge_only ? s.edge_listed[r] : s.listed[r];
  const Mass mass{max, 1.0f / row.temperature};
  int passing = -1;
  if (num_listed <= kListCapacity) {
    const auto n = static_cast<int>(num_listed);
    int padded = 1;
    while (padded < n) padded *= 2;
    const Ranked* listed = s.list + static_cast<std::int64_t>(r) * kListCapacity;
    for (int i = thread; i < padded; i += kThreads) shared.list[i] = i < n ? listed[i] : 0;
    __syncthreads();
    sort(shared.list, padded);
    if (edge_only) {
      const double target = top_p_target(row, s.mass[r]);
      passing = num_reaching(shared, n, mass, s.above[r], [&](std::uint64_t) { return target; });
    } else {
      passing = num_passing(shared, row, vocab, n, s.list_key[r] <= min_p_key(row, max), mass, s.mass[r]);
    }
  }
  Ranked best = 0;
  if (passing >= 0) {
    const Noise noise(row);
    for (int i = thread; i < passing; i += kThreads) {
      const Ranked entry = shared.list[i];
      const float scaled = __fmul_rn(value_of_key(key_of(entry)), mass.inv_temperature);
      const Ranked scored = ranked(__fadd_rn(scaled, Noise::of(noise.word(id_of(entry)))), id_of(entry));
      best = scored > best ? scored : best;
    }
    if (edge_only && thread < s.parts) best = ::max(best, s.draw[static_cast<std::int64_t>(r) * s.parts + thread]);
  } else {
    const RowPart part = part_of_row(row_of(s.logits, r), vocab, 0, 1);
    __syncthreads();
    const Cut cut = exact_cut<kThreads>(part, row, max, s.mass[r], shared.radix, shared.of_warps);
    best = draw_from_part<kThreads>(part, row, cut.floor, some_score(row, max), cut, shared.draw);
  }
  __syncthreads();
  best = block_max<kThreads>(best, shared.of_warps);
  return id_of(best != 0 ? best : top);
}

__global__ void __launch_bounds__(kThreads, 2) choose_tokens(SampleStages s, SampleCall call) {
  __shared__ SharedState shared;
  pdl_wait();
  pdl_launch();
  const int r = static_cast<int>(blockIdx.x);
  const DeviceSampleRow row = s.rows[r];
  const RowKind kind = kind_of(row, s.logits.vocab);
  int id = 0;
  if (kind == RowKind::Listed) {
    id = token_of_listed(s, shared, row, r);
  } else if (kind == RowKind::MinP) {
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t at = static_cast<std::int64_t>(r) * s.parts + thread;
    const Ranked drawn = block_max<kThreads>(thread < s.parts ? s.draw[at] : 0, shared.of_warps);
    __syncthreads();
    id = drawn != 0 ? id_of(drawn) : token_of_parts<kThreads>(s, r, false, shared.of_warps);
  } else {
    id = token_of_parts<kThreads>(s, r, kind == RowKind::Unfiltered, shared.of_warps);
  }
  if (threadIdx.x == 0) commit(call, s.logits.vocab, r, row, id);
}

__global__ void __launch_bounds__(kSimpleThreads) choose_unfiltered(SampleStages s, SampleCall call) {
  __shared__ Ranked of_warps[kSimpleThreads / 32];
  pdl_wait();
  pdl_launch();
  const int r = static_cast<int>(blockIdx.x);
  const DeviceSampleRow row = s.rows[r];
  const bool drawn = !call.all_greedy && kind_of(row, s.logits.vocab) != RowKind::Greedy;
  const int id = token_of_parts<kSimpleThreads>(s, r, drawn, of_warps);
  if (threadIdx.x == 0) commit(call, s.logits.vocab, r, row, id);
}

}  // namespace

void choose(const SampleStages& stages, const SampleCall& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(stages.logits.rows));
  if (call.any_filter && !call.all_greedy) {
    launch(choose_tokens, grid, kThreads, 0, stream, stages, call);
  } else {
    launch(choose_unfiltered, grid, kSimpleThreads, 0, stream, stages, call);
  }
}

}  // namespace fastllm::cuda

// Prefill attention with wgmma: sm_90a. What it computes and costs: see prefill_mma.cu.
//
// As many blocks as multiprocessors, each of three warpgroups:
//   - one producer gathers Q, K and V tiles of 128 rows into rings of two stages;
//   - two consumers multiply 64 of the tile's 128 query rows each. While the tensor cores compute the scores of one KV
//     tile and the results of the tile before, the other consumer is at its softmax: they take turns at issuing.
//
//   producer   Q K0 K1 V0 K2 V1 ... V(n-1)  Q' K0' ...             loads of the next work item go on meanwhile
//   consumer   S0 | softmax 0 | S1, PV0 | softmax 1 | S2, PV1 | ... | PV(n-1) | store
//
// Blocks take items of the plan, which is sorted by cost, in alternating directions: sums of costs stay about equal.
//
//   build/bench/fastllm_bench_cuda --benchmark_filter=Prefill
#include <algorithm>

#include "attention/prefill_tile.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kKvRows = 128;        // positions of a K or V tile
constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kConsumers = 2;       // warpgroups
constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;  // 72 + 2 * 216 = 3 * 168, what threads begin with
constexpr int kHalfBytes = 128 * 128;                             // 128 rows of 64 elements

// Named barriers. kTurn + c: consumer c may issue its products; kGroup + c: among the threads of consumer c.
constexpr int kTurn = 1, kGroup = kTurn + kConsumers;

// Two tiles in shared memory, filled and used in turns. Both sides count the tiles they have seen.
struct Ring {
  std::uint64_t full[2], empty[2];
};

template <int HeadDim>
struct Shared {
  static constexpr int kTileBytes = 128 * HeadDim * 2;
  // Tiles as wgmma wants them: 64 columns after 64 columns, chunks of 16 bytes permuted within 128 bytes.
  alignas(1024) std::byte q[2][kTileBytes], k[2][kTileBytes], v[2][kTileBytes];
  Ring q_ring, k_ring, v_ring;
  alignas(16) std::byte raw[1];  // [2][kTileBytes / 2] e4m3, where K and V are
  static constexpr std::size_t bytes(bool e4m3) {
    return sizeof(Shared) + 1024 + (e4m3 ? kTileBytes : 0);  // 1024: to align it
  }
};

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return (chunk >> 3) * kHalfBytes + row * 128 + (((chunk ^ row) & 7) << 4);
}

// The item of a block in a round; rounds go back and forth.
__device__ __forceinline__ int work_of(int round) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

template <int D>
struct Producer {
  const PrefillParams& p;
  Shared<D>& shared;
  int thread;          // of the warpgroup
  unsigned loads = 0;  // of K and V, when they are e4m3
  // The e4m3 tile under way, not yet converted.
  std::byte* tile = nullptr;
  Ring* ring = nullptr;
  unsigned ring_turn = 0;

  __device__ void run() {
    unsigned q_turn = 0, k_turn = 0, v_turn = 0;
    for (int round = 0; work_of(round) < p.num_work; ++round, ++q_turn) {
      const QueryTile t = query_tile(p, work_of(round));
      load_q(t, q_turn);
      int pos = t.kv_begin / kKvRows * kKvRows;
      std::int64_t offset = offsets(t, pos);
      load_kv(t, t.kv, pos, offset, shared.k[k_turn & 1], shared.k_ring, k_turn);
      for (++k_turn; pos < t.kv_end; pos += kKvRows, ++v_turn) {
        const std::int64_t next_offset = offsets(t, pos + kKvRows);
        if (pos + kKvRows < t.kv_end) {
          load_kv(t, t.kv, pos + kKvRows, next_offset, shared.k[k_turn & 1], shared.k_ring, k_turn);
          ++k_turn;
        }
        load_kv(t, t.kv + p.kv_bytes, pos, offset, shared.v[v_turn & 1], shared.v_ring, v_turn);
        offset = next_offset;
      }
    }
    cp_async_wait<0>();
    if (tile != nullptr) convert();
  }

 private:
  // Where the 16 groups of 8 positions of a tile lie: lane l knows it of group l % 16.
  __device__ std::int64_t offsets(const QueryTile& t, int pos) const {
    return kv_offset(p, t, pos + 8 * (thread & 15), D);
  }

  __device__ static void wait_empty(Ring& ring, unsigned turn) {
    mbarrier_wait(&ring.empty[turn & 1], ((turn >> 1) & 1) ^ 1);
  }

  __device__ void load_q(const QueryTile& t, unsigned turn) {
    wait_empty(shared.q_ring, turn);
    constexpr int kRows = kGroupThreads / (D / 8);
    const int chunk = thread % (D / 8);
#pragma unroll 4
    for (int row = thread / (D / 8); row < kPrefillTileRows; row += kRows) {
      const TileRow r = tile_row(p, t, row);
      cp_async16(shared.q[turn & 1] + chunk_offset(row, chunk),
                 r.valid ? p.q + r.token * p.ldq + r.head * D + chunk * 8 : p.q, r.valid);
    }
    mbarrier_arrive_after_copies(&shared.q_ring.full[turn & 1]);
  }

  __device__ void load_kv(const QueryTile& t, const std::byte* base, int pos, std::int64_t offset, std::byte* to,
                          Ring& to_ring, unsigned turn) {
    if (p.element_bytes == 2) {
      wait_empty(to_ring, turn);
      const int row = thread / (D / 8), chunk = thread % (D / 8);
      copy<D / 8>(t, base, pos, offset, to + chunk_offset(row, chunk), kGroupThreads / (D / 8) * 128);
      mbarrier_arrive_after_copies(&to_ring.full[turn & 1]);
    } else {
      copy<D / 16>(t, base, pos, offset, raw(loads), kGroupThreads * 16);
      cp_async_commit();
      cp_async_wait<1>();
      if (tile != nullptr) convert();
      tile = to;
      ring = &to_ring;
      ring_turn = turn;
      ++loads;
    }
  }

  // This thread's part of 128 rows of RowChunks chunks; its rows are kRows apart, their places `step` bytes.
  template <int RowChunks>
  __device__ void copy(const QueryTile& t, const std::byte* base, int pos, std::int64_t offset, std::byte* to,
                       int step) {
    constexpr int kRows = kGroupThreads / RowChunks;
    const int row = thread / RowChunks;
    base += ((row & 7) * RowChunks + thread % RowChunks) * 16;
#pragma unroll
    for (int i = 0; i < kKvRows / kRows; ++i) {
      const int at = pos + row + i * kRows;
      const std::int64_t from = __shfl_sync(0xffffffffu, offset, (row + i * kRows) / 8);
      cp_async16(to + i * step, base + from, at >= t.kv_begin && at < t.kv_end);
    }
  }

  // A place of this thread's own for what it copies of a load.
  __device__ std::byte* raw(unsigned load) const {
    return shared.raw + (load & 1) * (Shared<D>::kTileBytes / 2) + thread * 16;
  }

  // The load before this one, which has arrived, to bf16.
  __device__ void convert() {
    wait_empty(*ring, ring_turn);
    constexpr int kRows = kGroupThreads / (D / 16);
    const int first_row = thread / (D / 16), chunk = thread % (D / 16) * 2;
#pragma unroll 2
    for (int i = 0; i < kKvRows / kRows; ++i) {
      uint4 low, high;
      bf16_from_e4m3(*reinterpret_cast<const uint4*>(raw(loads - 1) + i * kGroupThreads * 16), low, high);
      const int row = first_row + i * kRows;
      *reinterpret_cast<uint4*>(tile + chunk_offset(row, chunk)) = low;
      *reinterpret_cast<uint4*>(tile + chunk_offset(row, chunk + 1)) = high;
    }
    fence_async_proxy();
    mbarrier_arrive(&ring->full[ring_turn & 1]);
  }
};

template <int D>
struct Consumer {
  const PrefillParams& p;
  Shared<D>& shared;
  int index;   // which consumer
  int thread;  // of the warpgroup

  __device__ void run() {
    if (index == 1) barrier_arrive(kTurn, kConsumers * kGroupThreads);  // consumer 0 begins
    unsigned q_turn = 0, turn = 0;
    for (int round = 0; work_of(round) < p.num_work; ++round, ++q_turn) {
      const QueryTile t = query_tile(p, work_of(round));
      turn = attend(t, q_turn, turn);
    }
  }

 private:
  __device__ int lane() const { return thread & 31; }
  __device__ int warp_row() const { return index * 64 + thread / 32 * 16; }  // of the tile

  __device__ static void wait_full(Ring& ring, unsigned turn) {
    mbarrier_wait(&ring.full[turn & 1], (turn >> 1) & 1);
    fence_async_proxy();
  }
  __device__ void release(Ring& ring, unsigned turn) const {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(&ring.empty[turn & 1]);
  }

  // s = q k^T, under way.
  __device__ void start_scores(float (&s)[kKvRows / 8][4], std::uint64_t q, unsigned turn) const {
    const std::uint64_t k = wgmma_descriptor(shared.k[turn & 1]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int at = i / 4 * kHalfBytes + i % 4 * 32;
      wgmma_ss(s, advance(q, at), advance(k, at), i > 0);
    }
    wgmma_commit();
  }
  // o += a v, under way.
  __device__ void start_results(float (&o)[D / 8][4], const std::uint32_t (&a)[kKvRows / 16][4], unsigned turn) const {
    const std::uint64_t v = wgmma_descriptor(shared.v[turn & 1], kHalfBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKvRows / 16; ++i) wgmma_rs(o, a[i], advance(v, i * 16 * 128));
    wgmma_commit();
  }

  // One query tile; `turn` counts KV tiles. Returns the next turn.
  __device__ unsigned attend(const QueryTile& t, unsigned q_turn, unsigned turn) const {
    float s[kKvRows / 8][4], o[D / 8][4] = {};
    std::uint32_t a[kKvRows / 16][4];
    float rescale[2];
    SoftmaxRows rows;
    const std::uint64_t q = wgmma_descriptor(shared.q[q_turn & 1] + index * 64 * 128);
    int pos = t.kv_begin / kKvRows * kKvRows;

    wait_full(shared.q_ring, q_turn);
    wait_full(shared.k_ring, turn);
    start_scores(s, q, turn);
    wgmma_wait<0>();
    pin(s);
    release(shared.k_ring, turn);
    softmax(t, pos, rows, s, rescale);
#pragma unroll
    for (int i = 0; i < kKvRows / 16; ++i) pack_scores(s, i, a[i]);

    for (pos += kKvRows; pos < t.kv_end; pos += kKvRows, ++turn) {
      wait_full(shared.k_ring, turn + 1);
      barrier_sync(kTurn + index, kConsumers * kGroupThreads);
      start_scores(s, q, turn + 1);
      wait_full(shared.v_ring, turn);
      start_results(o, a, turn);
      barrier_arrive(kTurn + 1 - index, kConsumers * kGroupThreads);
      wgmma_wait<1>();
      pin(s);
      release(shared.k_ring, turn + 1);
      softmax(t, pos, rows, s, rescale);
      wgmma_wait<0>();
      pin(o);
      pin(s);
      release(shared.v_ring, turn);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= rescale[i / 2];
#pragma unroll
      for (int i = 0; i < kKvRows / 16; ++i) pack_scores(s, i, a[i]);
    }
    wait_full(shared.v_ring, turn);
    start_results(o, a, turn);
    wgmma_wait<0>();
    pin(o);
    release(shared.v_ring, turn);
    store(t, rows, o, q_turn);
    return turn + 1;
  }

  __device__ void softmax(const QueryTile& t, int pos, SoftmaxRows& rows, float (&s)[kKvRows / 8][4],
                          float (&rescale)[2]) const {
    const float factor =
        finish_scores(p, t, warp_row() + lane() / 4, pos + 2 * (lane() & 3), needs_mask(p, t, pos, kKvRows), s);
    softmax_step(rows, factor, s, rescale);
  }

  // Through this warp's rows of the Q tile, so that global memory is written in whole chunks.
  __device__ void store(const QueryTile& t, const SoftmaxRows& rows, const float (&o)[D / 8][4],
                        unsigned q_turn) const {
    std::byte* const tile = shared.q[q_turn & 1];
    barrier_sync(kGroup + index, kGroupThreads);  // all four warps are done with Q
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = inverse_sum(rows, half);
      const int row = warp_row() + 8 * half + lane() / 4;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<std::uint32_t*>(tile + chunk_offset(row, n) + 4 * (lane() & 3)) =
            pack_bf16(o[n][2 * half] * scale, o[n][2 * half + 1] * scale);
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane(); i < 16 * (D / 8); i += 32) {
      const int row = warp_row() + i / (D / 8), chunk = i % (D / 8);
      const TileRow r = tile_row(p, t, row);
      if (r.valid)
        *reinterpret_cast<uint4*>(p.out + r.token * p.ldo + r.head * D + chunk * 8) =
            *reinterpret_cast<const uint4*>(tile + chunk_offset(row, chunk));
    }
    // Every lane arrives: each one's own loads and stores of the tile come before the producer's next copies.
    mbarrier_arrive(&shared.q_ring.empty[q_turn & 1]);
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads, 1) prefill_sm90_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ std::byte dynamic[];
  auto& shared = *reinterpret_cast<Shared<D>*>(dynamic + (-smem_address(dynamic) & 1023u));
  if (threadIdx.x == 0) {
    for (Ring* ring : {&shared.q_ring, &shared.k_ring, &shared.v_ring})
      for (int i = 0; i < 2; ++i) {
        mbarrier_init(&ring->full[i], kGroupThreads);
        // Only wgmma reads K and V: one lane of each warp arrives. For Q, see store().
        mbarrier_init(&ring->empty[i], kConsumers * kGroupThreads / (ring == &shared.q_ring ? 1 : 32));
      }
    mbarrier_init_done();
  }
  __syncthreads();
  pdl_wait();
  pdl_launch();
  // The same in all lanes, and known to be so by the compiler.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  if (group == 0) {
    give_registers_until<kProducerRegisters>();
    Producer<D>{p, shared, thread}.run();
  } else {
    take_registers_until<kConsumerRegisters>();
    Consumer<D>{p, shared, group - 1, thread}.run();
  }
}

template <int D>
void run(const PrefillParams& p, int num_sms, cudaStream_t stream) {
  const std::size_t bytes = Shared<D>::bytes(p.element_bytes == 1);
  allow_shared_memory(prefill_sm90_kernel<D>, bytes);
  launch(prefill_sm90_kernel<D>, dim3(static_cast<unsigned>(std::min(num_sms, p.num_work))), dim3(kThreads), bytes,
         stream, p);
}

}  // namespace

bool prefill_sm90_takes(const AttentionCall& call, const AttentionLimits& limits) {
  const int d = call.args.head_dim;
  return limits.capability == 90 && (d == 64 || d == 128) && prefill_shape_ok(call);
}

void prefill_sm90(const AttentionCall& call, const StepView& step, const PrefillPlan& plan,
                  const AttentionLimits& limits, cudaStream_t stream) {
  const PrefillParams p = prefill_params(call, step, plan);
  call.args.head_dim == 64 ? run<64>(p, limits.num_sms, stream) : run<128>(p, limits.num_sms, stream);
}

}  // namespace fastllm::cuda

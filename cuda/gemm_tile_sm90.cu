// out[m, n] = x[m, k] w[n, k]^T in bf16 with fp32 sums, or act(gate) * up of the two halves of n. sm_90a.
//
//   for (t < m) for (r < n) { s = 0; for (i < k) s += x[t][i] * w[r][i];  out[t][r] = s + bias[r] (+ out[t][r]); }
//
// Cost: 2 m n k operations; at few hundred rows as much time goes into reading 2 n k bytes of weights.
//
// A block has three warpgroups, and every multiprocessor one block, which takes tiles of 128 rows in turn:
//   - one thread of the producer asks the tensor memory accelerator for 64 columns of x and of w at a time, into a ring
//     of stages in shared memory; it runs ahead of the consumers, across tiles. Weights are constants: the first
//     stages of them are asked for before pdl_wait();
//   - two consumers multiply 64 of the tile's rows each and write their results straight from registers. One starts
//     a step later, so that they do not write at the same time.
//
// Two blocks form a cluster and compute neighbouring tiles: each loads half of the operand that they share for both.
//
// The accumulators of one thread: d[j][2h + e] is row 8h + lane / 4 of its warp's 16, column 8j + 2 (lane % 4) + e. In
// a gated product the first half of the tile is gate, the second up, so that a pair lies in one thread.
//
// Benchmark: --benchmark_filter=GemmTile
#include <algorithm>

#include "activation.cuh"
#include "gemm_tile_kernel.h"
#include "launch.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kConsumers = 2;       // warpgroups
constexpr int kConsumerWarps = kConsumers * kGroupThreads / 32;
constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 40 + 2 * 232 = 3 * 168, what threads begin with
constexpr int kRowBytes = kTileDepth * 2;
constexpr int kSharedBytes = 226 << 10;  // of a block
constexpr int kRowTilesTogether = 16;    // so that their x stays in L2 while w passes by

constexpr int kLeadBarrier = 1;  // named: the second consumer starts when the first has begun a step

template <int Cols>
struct Shared {
  static constexpr int kStageBytes = (kTileRows + Cols) * kRowBytes;
  static constexpr int kStages = std::min((kSharedBytes - 1024) / kStageBytes, 8);
  struct Stage {
    std::byte x[kTileRows * kRowBytes], w[Cols * kRowBytes];
  };
  // As wgmma wants them: rows of 128 bytes, chunks of 16 bytes permuted.
  alignas(1024) Stage stages[kStages];
  std::uint64_t full[kStages], empty[kStages];
  static constexpr std::size_t bytes() { return sizeof(Shared) + 1024; }  // 1024: to align it
};

// Where a ring stands: how often it went round decides the parity that is waited for.
template <int Stages>
struct Turn {
  int stage = 0;
  unsigned parity = 0;
  __device__ void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

struct Tile {
  int row, col;  // of out; col: also the row of w where the first half begins
};

template <int Cols>
struct Block {
  const TileParams& p;
  Shared<Cols>& shared;
  int half;  // which block of the cluster
  int first_item, item_stride;

  static constexpr int kStages = Shared<Cols>::kStages;

  __device__ Block(const TileParams& params, Shared<Cols>& s) : p(params), shared(s) {
    half = static_cast<int>(blockIdx.x) % 2;
    first_item = static_cast<int>(blockIdx.x) / 2;
    item_stride = static_cast<int>(gridDim.x) / 2;
  }

  __device__ Tile tile(int item) const {
    const int together = kRowTilesTogether / (p.share_x ? 1 : 2);  // row items
    const int group = item / (together * p.col_items), first = group * together;
    const int rows = min(together, p.row_items - first), in_group = item - first * p.col_items;
    const int row = first + in_group % rows, col = in_group / rows;
    if (p.share_x) return {row * kTileRows, (2 * col + half) * p.col_step};
    return {(2 * row + half) * kTileRows, col * p.col_step};
  }

  // --- the producer's one thread ---

  __device__ void load_w(const Tile& t, int step, int stage) const {
    constexpr int kHalf = Cols / 2;
    std::uint64_t* full = &shared.full[stage];
    mbarrier_arrive_expecting(full, Shared<Cols>::kStageBytes);
    std::byte* w = shared.stages[stage].w;
    if (p.share_x) {
      tma_load(w, p.w, step * kTileDepth, t.col, full);
      tma_load(w + kHalf * kRowBytes, p.w, step * kTileDepth, t.col + p.second_half, full);
    } else {
      tma_load_to_all(w + half * kHalf * kRowBytes, p.w, step * kTileDepth, t.col + half * p.second_half, full, 3);
    }
  }
  __device__ void load_x(const Tile& t, int step, int stage) const {
    constexpr int kHalf = kTileRows / 2;
    std::byte* x = shared.stages[stage].x;
    if (p.share_x) {
      tma_load_to_all(x + half * kHalf * kRowBytes, p.x, step * kTileDepth, t.row + half * kHalf, &shared.full[stage],
                      3);
    } else {
      tma_load(x, p.x, step * kTileDepth, t.row, &shared.full[stage]);
    }
  }

  __device__ void produce() const {
    const Tile first = tile(first_item);
    const int ahead = min(kStages, p.steps);
    for (int i = 0; i < ahead; ++i) load_w(first, i, i);
    pdl_wait();
    Turn<kStages> turn;
    for (int i = 0; i < ahead; ++i, turn.next()) load_x(first, i, i);
    int step = ahead;
    for (int item = first_item; item < p.items; item += item_stride, step = 0) {
      const Tile t = tile(item);
      for (; step < p.steps; ++step, turn.next()) {
        mbarrier_wait(&shared.empty[turn.stage], turn.parity ^ 1);
        load_w(t, step, turn.stage);
        load_x(t, step, turn.stage);
      }
    }
  }

  // --- a consumer ---

  // To the producers of both blocks: each writes to both.
  __device__ void release(int stage) const {
    __syncwarp();
    const unsigned lane = threadIdx.x % 32;
    if (lane < 2) mbarrier_arrive_in(&shared.empty[stage], lane);
  }

  __device__ void consume(int consumer) const {
    Turn<kStages> turn;
    float d[Cols / 8][4];
    bool awaited = consumer == 0;
    if (consumer == 1) barrier_sync(kLeadBarrier, kConsumers * kGroupThreads);
    for (int item = first_item; item < p.items; item += item_stride) {
      // Zeros, not products that ignore d: nvcc 12.4 would wait for each of those.
#pragma unroll
      for (int j = 0; j < Cols / 8; ++j) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0;
      int before = 0;
      for (int step = 0; step < p.steps; ++step, turn.next()) {
        mbarrier_wait(&shared.full[turn.stage], turn.parity);
        const std::uint64_t x = wgmma_descriptor(shared.stages[turn.stage].x + consumer * 64 * kRowBytes);
        const std::uint64_t w = wgmma_descriptor(shared.stages[turn.stage].w);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kTileDepth / 16; ++i) wgmma_ss(d, advance(x, 32 * i), advance(w, 32 * i), true);
        wgmma_commit();
        if (awaited) barrier_arrive(kLeadBarrier, kConsumers * kGroupThreads);
        awaited = false;
        if (step > 0) {
          wgmma_wait<1>();
          release(before);
        }
        before = turn.stage;
      }
      wgmma_wait<0>();
      pin(d);
      release(before);
      const Tile t = tile(item);
      finish(d, t.row + consumer * 64 + static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16, t.col);
    }
  }

  // 16 rows of a warp, Groups times 8 columns: the first half from col on, the second where the second half of the
  // tile continues.
  template <int Groups>
  __device__ void finish(float (&d)[Groups][4], int warp_row, int col) const {
    constexpr int kHalf = Groups / 2;
    const int lane = static_cast<int>(threadIdx.x) % 32, pair_col = lane % 4 * 2;
    if (p.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < Groups; ++j) {
        const int c = col + j % kHalf * 8 + pair_col, r = c + j / kHalf * p.second_half;  // r: of w
        if ((p.gated == kTileNotGated ? r : c) >= p.cols) continue;
        const float low = p.bias[r], high = p.bias[r + 1];
        d[j][0] += low, d[j][1] += high, d[j][2] += low, d[j][3] += high;
      }
    }
    const int row = warp_row + lane / 4;
    if (p.gated == kTileNotGated) {
      if (p.out_f32) {
        write_f32(d, row, col);
      } else {
        write_bf16<Groups>(d, row, col);
      }
      return;
    }
    activate(reinterpret_cast<float (&)[kHalf * 4]>(d), static_cast<Activation>(p.gated));
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[j][i] *= d[j + kHalf][i];
    }
    write_bf16<kHalf>(d, row, col);
  }

  // Neighbouring lanes exchange what they hold of two groups of 8 columns, so that even lanes have 4 adjacent columns
  // of the first and odd lanes of the second: column_of() is the first of them.
  template <int Groups>
  __device__ int column_of(int col, int j) const {
    const int lane = static_cast<int>(threadIdx.x) % 4;
    return col + j % (Groups / 2) * 8 + j / (Groups / 2) * p.second_half + lane % 2 * 8 + lane / 2 * 4;
  }

  template <int Count, int Groups>
  __device__ void write_bf16(const float (&d)[Groups][4], int row, int col) const {
    const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
    for (int j = 0; j < Count; j += 2) {
      const int c = column_of<Groups>(col, j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t first = pack_bf16(d[j][2 * h], d[j][2 * h + 1]);
        const std::uint32_t second = pack_bf16(d[j + 1][2 * h], d[j + 1][2 * h + 1]);
        const std::uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
        if (row + 8 * h >= p.m || c >= p.cols) continue;
        auto* to = static_cast<__nv_bfloat16*>(p.out) + (row + 8 * h) * p.ldo + c;
        *reinterpret_cast<uint2*>(to) = odd ? make_uint2(other, second) : make_uint2(first, other);
      }
    }
  }

  template <int Groups>
  __device__ void write_f32(const float (&d)[Groups][4], int row, int col) const {
    const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
    for (int j = 0; j < Groups; j += 2) {
      const int c = column_of<Groups>(col, j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float first[2] = {d[j][2 * h], d[j][2 * h + 1]}, second[2] = {d[j + 1][2 * h], d[j + 1][2 * h + 1]};
        const float other0 = __shfl_xor_sync(0xffffffffu, odd ? first[0] : second[0], 1);
        const float other1 = __shfl_xor_sync(0xffffffffu, odd ? first[1] : second[1], 1);
        if (row + 8 * h >= p.m || c >= p.cols) continue;
        auto* to = static_cast<float*>(p.out) + (row + 8 * h) * p.ldo + c;
        const float4 v =
            odd ? make_float4(other0, other1, second[0], second[1]) : make_float4(first[0], first[1], other0, other1);
        if (p.accumulate) {
          add_in_memory(to, v);
        } else {
          *reinterpret_cast<float4*>(to) = v;
        }
      }
    }
  }
};

template <int Cols>
__global__ void __launch_bounds__(kThreads, 1) tile_kernel(const __grid_constant__ TileParams p) {
  extern __shared__ std::byte dynamic[];
  auto& shared = *reinterpret_cast<Shared<Cols>*>(dynamic + (-smem_address(dynamic) & 1023u));
  if (threadIdx.x == 0) {
    prefetch_map(p.w);
    prefetch_map(p.x);
    for (int i = 0; i < Shared<Cols>::kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], 2 * kConsumerWarps);
    }
    mbarrier_init_done();
  }
  __syncthreads();
  cluster_barrier();
  pdl_launch();
  const Block<Cols> block(p, shared);
  // The same in all lanes, and known to be so by the compiler.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (group == 0) {
    give_registers_until<kProducerRegisters>();
    if (threadIdx.x == 0) {
      block.produce();
    } else {
      pdl_wait();
    }
  } else {
    take_registers_until<kConsumerRegisters>();
    pdl_wait();
    block.consume(group - 1);
  }
  cluster_barrier();  // nobody leaves while others still arrive at its barriers
}

// Calls f with the kernel for these tiles and its shared memory.
template <class F>
auto with_kernel(int tile_cols, const F& f) {
  switch (tile_cols) {
    case 128:
      return f(tile_kernel<128>, Shared<128>::bytes());
    case 192:
      return f(tile_kernel<192>, Shared<192>::bytes());
    case 224:
      return f(tile_kernel<224>, Shared<224>::bytes());
    default:
      return f(tile_kernel<256>, Shared<256>::bytes());
  }
}

}  // namespace

void launch_tiles(int tile_cols, const TileParams& params, int clusters, cudaStream_t stream) {
  with_kernel(tile_cols, [&](auto kernel, std::size_t bytes) {
    launch_clusters(kernel, 2, static_cast<unsigned>(2 * clusters), kThreads, bytes, stream, params);
  });
}

int prepare_tiles(int tile_cols) {
  return with_kernel(tile_cols, [&](auto kernel, std::size_t bytes) {
    allow_shared_memory(kernel, bytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {2, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = 2;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "asking how many clusters run at once");
    return clusters;
  });
}

}  // namespace fastllm::cuda

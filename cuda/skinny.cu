// out[m, n] = x[m, k] w[n, k]^T for m <= 32, bf16 weights, or act(gate) * up of the two halves of n.
//
//   for (t < m) for (r < n) { s = 0; for (i < k) s += x[t][i] * w[r][i];  out[t][r] = s + bias[r] (+ out[t][r]); }
//
// Cost: 2nk bytes of weights, read once. Everything else is arranged around never letting these reads stop:
//   - a grid of resident blocks; each group of `k_warps` warps walks over tiles of 8 * strips weight rows;
//   - within a tile, warp i of the group takes every k_warps-th chunk of 256 / strips columns, 4 KB of weights. Partial
//     sums meet in shared memory, in one of two places in turn, and are added in the order of the warps;
//   - every warp copies exactly the weights that it multiplies to its own stages of shared memory, several chunks ahead
//     and across tiles, so the queue needs no block barriers and never drains. One instruction copies 512 bytes that
//     are as contiguous as the tile allows: 512 / strips of each row. Weights are constants: the queue is filled before
//     pdl_wait(), under the kernel before this one, and what comes after it is called into L2, once or all along;
//   - x is read through L1, 64 columns ahead.
//
// One m16n8k16 product takes 16 columns: x is A (16 tokens), the weights are B (8 rows). Which columns these are does
// not matter as long as A and B agree, so that lane 4g + t takes 8 adjacent columns of row g, 16 bytes at once:
//
//   of 64 columns         0      8      16     24     32     40     48     56
//   lane % 4 (t), half    t=0,0  t=1,0  t=2,0  t=3,0  t=0,1  t=1,1  t=2,1  t=3,1     2 products per half
//
// In a stage, odd rows have the halves of every 64 columns swapped: no bank is read twice at once.
//
// Benchmark: --benchmark_filter=Gemm
#include <algorithm>
#include <cmath>

#include "activation.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "skinny.h"

namespace fastllm::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStages = 3, kStageBytes = 4096;  // of each warp: a queue of 96 KB in a block
constexpr int kStageUnits = kStageBytes / 16;
constexpr int kCopies = kStageUnits / 32;  // instructions that fill a stage
constexpr int kNotGated = -1;
constexpr std::int64_t kShortRow = 1024;  // columns; too few chunks for many warps

constexpr int chunk_cols(int strips) { return 256 / strips; }

// Shared memory: the queue, then twice the partial sums of every warp, [8 * tokens8][8 * strips].
constexpr std::size_t kQueueBytes = std::size_t{kWarps} * kStages * kStageBytes;
constexpr std::size_t shared_bytes(int strips, int tokens8) {
  return kQueueBytes + std::size_t{2 * kWarps} * 64 * sizeof(float) * static_cast<std::size_t>(strips * tokens8);
}

struct Params {
  void* out;
  const __nv_bfloat16* x;
  const __nv_bfloat16* w;
  const float* bias;
  std::int64_t ldo, ldx, k;
  int n, m;    // n: rows of w
  int tiles;   // of 8 * strips rows of w
  int chunks;  // of k
  int k_warps;
  int ahead;  // chunks of each warp called into L2 beyond the queue
  int gated;  // an Activation, or kNotGated
  bool rolling, out_f32, accumulate;
};

// Among the k_warps warps of one group. Constant numbers, or each block takes all 16 hardware barriers.
__device__ __forceinline__ void group_barrier(int group, int k_warps) {
  const int threads = 32 * k_warps;
  if (k_warps == 1) {
    __syncwarp();
  } else if (group == 0) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  } else if (group == 1) {
    asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory");
  } else if (group == 2) {
    asm volatile("bar.sync 3, %0;" ::"r"(threads) : "memory");
  } else {
    asm volatile("bar.sync 4, %0;" ::"r"(threads) : "memory");
  }
}

__device__ __forceinline__ void store_result(const Params& p, int token, int col, float v) {
  const std::int64_t at = token * p.ldo + col;
  if (p.out_f32) {
    float* out = static_cast<float*>(p.out) + at;
    if (p.accumulate) {
      atomicAdd(out, v);  // one addend per element: only to be rid of waiting for the old value
    } else {
      *out = v;
    }
  } else {
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + at;
    *out = __float2bfloat16_rn(p.accumulate ? v + __bfloat162float(*out) : v);
  }
}

// Where a warp is among its chunks.
struct Cursor {
  int tile, chunk;
};

// Tokens8: groups of 8 rows of x, 1, 2 or 4.
template <int Strips, int Tokens8>
__global__ __launch_bounds__(kThreads, Tokens8 < 4 ? 2 : 1) void skinny_kernel(const Params p) {
  constexpr int kCols = chunk_cols(Strips);
  constexpr int kRowUnits = kCols / 8;             // 16 bytes each, of one row of a stage
  constexpr int kSubs = kCols / 64;                // times 64 columns
  constexpr int kTileRows = 8 * Strips;            // of w
  constexpr int kProducts = (Tokens8 + 1) / 2;     // of 16 tokens
  constexpr int kPartial = 64 * Tokens8 * Strips;  // floats of one warp

  extern __shared__ uint4 shared[];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int group = warp / p.k_warps, split = warp % p.k_warps;
  const int first_tile = group * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  const int tile_step = kWarps / p.k_warps * static_cast<int>(gridDim.x);
  const bool gated = p.gated != kNotGated;
  const int tile_cols = gated ? kTileRows / 2 : kTileRows;  // of out
  const int out_cols = gated ? p.n / 2 : p.n;

  // Row `local` of a tile, in units of 16 bytes from p.w.
  const auto* const w = reinterpret_cast<const uint4*>(p.w);
  const auto row_units = static_cast<std::uint32_t>(p.k / 8);
  auto row_of = [&](int tile, int local) {
    const bool upper = gated && local >= tile_cols;
    const int row = min(tile * tile_cols + (upper ? local - tile_cols : local), out_cols - 1);
    return static_cast<std::uint32_t>(upper ? row + out_cols : row) * row_units;
  };
  // True: another tile begins.
  auto advance = [&](Cursor& c) {
    c.chunk += p.k_warps;
    if (c.chunk < p.chunks) return false;
    c.chunk = split;
    c.tile += tile_step;
    return true;
  };

  // The queue. Copy i of a stage brings row i * Strips + lane / kRowUnits of the tile.
  uint4* const queue = shared + warp * kStages * kStageUnits;
  Cursor next{split < p.chunks ? first_tile : p.tiles, split};  // to be copied
  std::uint32_t rows[kCopies];                                  // of next.tile
  auto find_rows = [&] {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) rows[i] = row_of(next.tile, i * Strips + lane / kRowUnits);
  };
  auto refill = [&](int stage) {
    if (next.tile < p.tiles) {
      const auto unit = static_cast<std::uint32_t>(next.chunk * kRowUnits + lane % kRowUnits);
      const bool inside = unit < row_units;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int odd = (i * Strips + lane / kRowUnits) % 2;
        cp_async16(queue + stage * kStageUnits + i * 32 + (lane ^ 4 * odd), w + (rows[i] + (inside ? unit : 0)),
                   inside);
      }
      if (advance(next)) find_rows();
    }
    cp_async_commit();
  };
  find_rows();
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) refill(s);
  pdl_launch();

  // Lane i calls row i of the chunk at `far` into L2.
  Cursor far = next;
  std::uint32_t far_row = row_of(far.tile, lane);
  auto call_into_l2 = [&] {
    if (far.tile >= p.tiles) return;
    const auto unit = static_cast<std::uint32_t>(far.chunk * kRowUnits);
    if (lane < kTileRows)
      prefetch_l2(w + (far_row + unit), 16 * min(static_cast<std::uint32_t>(kRowUnits), row_units - unit));
    if (advance(far)) far_row = row_of(far.tile, lane);
  };
#pragma unroll 1
  for (int i = 0; i < p.ahead; ++i) call_into_l2();
  pdl_wait();

  // Half u of 64 columns, token 8i + g.
  auto load_x = [&](uint4(&x)[Tokens8][2], int first_col) {
#pragma unroll
    for (int i = 0; i < Tokens8; ++i) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int token = 8 * i + g, col = first_col + 32 * u + 8 * t;
        x[i][u] = token < p.m && col < p.k ? *reinterpret_cast<const uint4*>(p.x + token * p.ldx + col)
                                           : make_uint4(0, 0, 0, 0);
      }
    }
  };
  uint4 x[Tokens8][2];
  load_x(x, split * kCols);
  int stage = 0;
  float* partials = reinterpret_cast<float*>(shared + kQueueBytes / sizeof(uint4));
  std::ptrdiff_t other_partials = kWarps * kPartial;  // where the next tile's are

  for (int tile = first_tile; tile < p.tiles; tile += tile_step) {
    float sums[Strips][kProducts][4] = {};
    for (int chunk = split; chunk < p.chunks; chunk += p.k_warps) {
      const int next_chunk = chunk + p.k_warps < p.chunks ? chunk + p.k_warps : split;
      cp_async_wait<kStages - 1>();
      __syncwarp();
#pragma unroll
      for (int sub = 0; sub < kSubs; ++sub) {
        uint4 next_x[Tokens8][2];
        load_x(next_x, sub + 1 < kSubs ? chunk * kCols + 64 * (sub + 1) : next_chunk * kCols);
#pragma unroll
        for (int j = 0; j < Strips; ++j) {
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const int unit = 8 * sub + ((4 * u + t) ^ 4 * (g % 2));
            const uint4 b = queue[stage * kStageUnits + (8 * j + g) * kRowUnits + unit];
#pragma unroll
            for (int q = 0; q < kProducts; ++q) {
              const uint4 low = x[2 * q][u];
              const uint4 high = Tokens8 > 1 ? x[(2 * q + 1) % Tokens8][u] : make_uint4(0, 0, 0, 0);
              mma_bf16(sums[j][q], {low.x, high.x, low.y, high.y}, b.x, b.y);
              mma_bf16(sums[j][q], {low.z, high.z, low.w, high.w}, b.z, b.w);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < Tokens8; ++i) {
          x[i][0] = next_x[i][0];
          x[i][1] = next_x[i][1];
        }
      }
      __syncwarp();  // all lanes have read the stage
      refill(stage);
      if (p.rolling) call_into_l2();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    // Whoever writes here has passed the barrier of the tile before, hence all have read the sums of the one before
    // that, which were here.
    float* const mine = partials + warp * kPartial;
    const float* const first = partials + group * p.k_warps * kPartial;  // of the group
    partials += other_partials;
    other_partials = -other_partials;
#pragma unroll
    for (int q = 0; q < kProducts; ++q) {
#pragma unroll
      for (int h = 0; h < 2 && 2 * q + h < Tokens8; ++h) {
#pragma unroll
        for (int j = 0; j < Strips; ++j) {
          float* to = mine + (16 * q + 8 * h + g) * kTileRows + 8 * j + 2 * t;
          *reinterpret_cast<float2*>(to) = make_float2(sums[j][q][2 * h], sums[j][q][2 * h + 1]);
        }
      }
    }
    group_barrier(group, p.k_warps);
    for (int i = 32 * split + lane; i < p.m * tile_cols; i += 32 * p.k_warps) {
      const int token = i / tile_cols, local = i % tile_cols, col = tile * tile_cols + local;
      if (col >= out_cols) continue;
      const float* part = first + token * kTileRows + local;
      float v = 0, up = 0;
#pragma unroll 4
      for (int s = 0; s < p.k_warps; ++s) {
        v += part[s * kPartial];
        if (gated) up += part[s * kPartial + tile_cols];
      }
      if (p.bias != nullptr) {
        v += p.bias[col];
        if (gated) up += p.bias[out_cols + col];
      }
      store_result(p, token, col, gated ? activate(v, static_cast<Activation>(p.gated)) * up : v);
    }
  }
}

using Kernel = void (*)(Params);

Kernel kernel_of(int strips, int tokens8) {
  switch (tokens8) {
    case 1:
      return strips == 1 ? skinny_kernel<1, 1> : strips == 2 ? skinny_kernel<2, 1> : skinny_kernel<4, 1>;
    case 2:
      return strips == 1 ? skinny_kernel<1, 2> : strips == 2 ? skinny_kernel<2, 2> : skinny_kernel<4, 2>;
    default:
      return strips == 1 ? skinny_kernel<1, 4> : strips == 2 ? skinny_kernel<2, 4> : skinny_kernel<4, 4>;
  }
}

int tokens8_of(std::int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : 4; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool is_valid(const SkinnyConfig& c) {
  auto power_up_to = [](int x, int limit) { return x >= 1 && x <= limit && (x & (x - 1)) == 0; };
  return power_up_to(c.strips, 4) && power_up_to(c.k_warps, kWarps) && power_up_to(c.blocks_per_sm, 2);
}

bool skinny_supports(const GemmCall& c) {
  auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return c.w.dtype == DType::BF16 && c.m >= 1 && c.m <= kSkinnyRows && c.w.k % 8 == 0 && c.ldx % 8 == 0 &&
         aligned(c.x) && aligned(c.w.data) && c.w.n < (1 << 30) && c.w.k < (1 << 30) &&
         c.w.n * (c.w.k / 8) < std::int64_t{1} << 32;
}

std::vector<SkinnyConfig> skinny_configs() {
  std::vector<SkinnyConfig> all;
  for (const int strips : {1, 2, 4}) {
    for (const int k_warps : {1, 2, 4, 8}) {
      for (const int blocks : {1, 2}) {
        for (const bool rolling : {false, true}) all.push_back({strips, k_warps, blocks, rolling});
      }
    }
  }
  return all;
}

std::vector<SkinnyConfig> skinny_candidates(std::int64_t k) {
  std::vector<SkinnyConfig> some;
  for (const SkinnyConfig& c : skinny_configs()) {
    if (c.blocks_per_sm == 2 && (k < kShortRow ? c.k_warps <= 4 && !c.rolling : c.k_warps >= 4)) some.push_back(c);
  }
  return some;
}

bool prepare_skinny(std::size_t shared_per_block) {
  if (shared_per_block < shared_bytes(4, 4)) return false;
  for (const int strips : {1, 2, 4}) {
    for (const int tokens8 : {1, 2, 4}) allow_shared_memory(kernel_of(strips, tokens8), shared_bytes(strips, tokens8));
  }
  return true;
}

void skinny_gemm(const GemmCall& c, std::optional<Activation> gated, const SkinnyConfig& config, int num_sms,
                 cudaStream_t stream, int prefetch_bytes) {
  const int tokens8 = tokens8_of(c.m);
  Params p{};
  p.out = c.out;
  p.x = static_cast<const __nv_bfloat16*>(c.x);
  p.w = static_cast<const __nv_bfloat16*>(c.w.data);
  p.bias = c.bias;
  p.ldo = c.ldo;
  p.ldx = c.ldx;
  p.k = c.w.k;
  p.n = static_cast<int>(c.w.n);
  p.m = static_cast<int>(c.m);
  p.tiles = static_cast<int>(gated ? ceil_div(c.w.n / 2, 4 * config.strips) : ceil_div(c.w.n, 8 * config.strips));
  p.chunks = static_cast<int>(ceil_div(c.w.k, chunk_cols(config.strips)));
  p.k_warps = config.k_warps;
  p.ahead = (config.rolling ? std::min(prefetch_bytes, kSkinnyWindow) : prefetch_bytes) / config.blocks_per_sm /
            (kWarps * kStageBytes);
  p.rolling = config.rolling;
  p.gated = gated ? static_cast<int>(*gated) : kNotGated;
  p.out_f32 = c.out_dtype == DType::F32;
  p.accumulate = c.accumulate;
  const int blocks = std::min(p.tiles, num_sms * config.blocks_per_sm);
  launch(kernel_of(config.strips, tokens8), dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
         shared_bytes(config.strips, tokens8), stream, p);
}

}  // namespace fastllm::cuda

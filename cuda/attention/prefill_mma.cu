// Prefill attention with mma.sync: any GPU from sm_80 on.
//
//   for every token t, head h:  s[j] = scale q[t, h] . k[j, h / group]   for positions j <= pos(t)
//                               out[t, h] = sum_j softmax(s)[j] v[j, h / group]
//
// Cost: 4 head_dim operations per (query, visible position) pair; q, out and every KV position once per 128 rows of
// queries. Bound by the tensor cores for all but the shortest rows.
//
// A block computes one tile of 128 (token, head) rows: Q stays in shared memory, scores and results in registers, and
// of K and V one tile of 64 positions each is in shared memory; while one is multiplied the other is on its way.
//
//   build/bench/fastllm_bench_cuda --benchmark_filter=Prefill
#include "attention/prefill_tile.cuh"
#include "launch.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kKvRows = 64;  // positions of a K or V tile

template <int HeadDim, int WarpRows /* rows of a warp */, int BlocksPerSm>
struct Shape {
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kAtoms = WarpRows / 16;
  static constexpr int kWarpRows = WarpRows;
  static constexpr int kThreads = kPrefillTileRows / WarpRows * 32;
  static constexpr int kBlocks = BlocksPerSm;
  static constexpr int kChunks = HeadDim / 8;               // of 16 bytes, in a row
  static constexpr int kStride = (HeadDim + 63) / 64 * 64;  // of a row in shared memory, elements
  static constexpr int kRawChunks = HeadDim / 16;           // of 16 bytes, in a row of e4m3
  static constexpr int kRawCopies = kKvRows * kRawChunks / kThreads;
  static constexpr std::size_t shared_bytes(bool e4m3) {
    return (kPrefillTileRows + 2 * kKvRows) * kStride * 2 + (e4m3 ? kKvRows * HeadDim : 0);
  }
  static_assert(kKvRows * kChunks % kThreads == 0 && kKvRows * kRawChunks % kThreads == 0);
};

// Chunks of 16 bytes are permuted within each 128 bytes of a row, so that a column of them touches all banks.
template <class S>
__device__ __forceinline__ __nv_bfloat16* chunk_at(__nv_bfloat16* tile, int row, int chunk) {
  return tile + row * S::kStride + ((chunk ^ (row & 7)) << 3);
}

// The same as addresses: chunk `chunk` (a constant, even) beside the row's and chunk's address `at`.
template <class S>
__device__ __forceinline__ std::uint32_t beside(std::uint32_t at, int row_step, int chunk) {
  return (at ^ ((chunk & 7) << 4)) + row_step * S::kStride * 2 + (chunk & ~7) * 16;
}

// Brings tiles of K and V to shared memory. e4m3 comes as it is to a place of the thread's own, which converts it.
template <class S>
struct KvLoader {
  const PrefillParams& p;
  const QueryTile& t;
  std::byte* raw;
  int thread, pos = 0;
  std::int64_t offset = 0;  // of positions [pos + 8 * (lane % 8), + 8) within K or V

  __device__ void seek(int tile_pos) {
    pos = tile_pos;
    offset = kv_offset(p, t, pos + 8 * (thread & 7), S::kHeadDim);
  }

  __device__ void start(__nv_bfloat16* tile, const std::byte* base) {
    if (p.element_bytes == 1) {
      copy<S::kRawChunks>(base, [&](int at) { return raw + at * 16; });
    } else {
      copy<S::kChunks>(base, [&](int at) { return chunk_at<S>(tile, at / S::kChunks, at % S::kChunks); });
    }
    cp_async_commit();
  }

  // Until the tile started last is in shared memory, as far as this thread brings it.
  __device__ void finish(__nv_bfloat16* tile) {
    cp_async_wait<0>();
    if (p.element_bytes != 1) return;
#pragma unroll 1
    for (int i = 0; i < S::kRawCopies; ++i) {
      const int at = i * S::kThreads + thread, row = at / S::kRawChunks, chunk = at % S::kRawChunks * 2;
      uint4 low, high;
      bf16_from_e4m3(*reinterpret_cast<const uint4*>(raw + at * 16), low, high);
      *reinterpret_cast<uint4*>(chunk_at<S>(tile, row, chunk)) = low;
      *reinterpret_cast<uint4*>(chunk_at<S>(tile, row, chunk + 1)) = high;
    }
  }

 private:
  template <int RowChunks, class To>
  __device__ void copy(const std::byte* base, To to) {
    constexpr int kCopies = kKvRows * RowChunks / S::kThreads, kRows = S::kThreads / RowChunks;
    if constexpr (kRows % 8 == 0 && kRows * RowChunks == S::kThreads) {  // a step keeps the place within 8 rows
      auto* const dst = to(thread);
      const int row = thread / RowChunks;
      const std::byte* const src = base + ((row & 7) * RowChunks + thread % RowChunks) * 16;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) copy_chunk(dst + i * (to(S::kThreads) - to(0)), src, row + i * kRows);
    } else {
#pragma unroll 1
      for (int at = thread; at < kKvRows * RowChunks; at += S::kThreads) {
        const int row = at / RowChunks;
        copy_chunk(to(at), base + ((row & 7) * RowChunks + at % RowChunks) * 16, row);
      }
    }
  }
  __device__ void copy_chunk(void* dst, const std::byte* src, int row) {
    const std::int64_t from = __shfl_sync(0xffffffffu, offset, row / 8);
    cp_async16(dst, src + from, pos + row >= t.kv_begin && pos + row < t.kv_end);
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) prefill_mma_kernel(const __grid_constant__ PrefillParams p) {
  constexpr int D = S::kHeadDim;
  extern __shared__ __align__(128) std::byte shared[];
  auto* const q_tile = reinterpret_cast<__nv_bfloat16*>(shared);
  auto* const k_tile = q_tile + kPrefillTileRows * S::kStride;
  auto* const v_tile = k_tile + kKvRows * S::kStride;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp * S::kWarpRows;

  pdl_wait();
  pdl_launch();
  const QueryTile t = query_tile(p, static_cast<int>(blockIdx.x));
  for (int i = lane; i < S::kWarpRows * S::kChunks; i += 32) {
    const int row = warp_row + i / S::kChunks, chunk = i % S::kChunks;
    const TileRow r = tile_row(p, t, row);
    cp_async16(chunk_at<S>(q_tile, row, chunk), r.valid ? p.q + r.token * p.ldq + r.head * D + chunk * 8 : p.q,
               r.valid);
  }
  KvLoader<S> loader{p, t, reinterpret_cast<std::byte*>(v_tile + kKvRows * S::kStride), static_cast<int>(threadIdx.x)};
  const int first = t.kv_begin / kKvRows * kKvRows;
  loader.seek(first);
  loader.start(k_tile, t.kv);

  std::uint32_t q_at = smem_address(chunk_at<S>(q_tile, warp_row + (lane & 15), lane >> 4));
  std::uint32_t k_at = smem_address(chunk_at<S>(k_tile, (lane & 7) + ((lane & 16) >> 1), (lane >> 3) & 1));
  std::uint32_t v_at = smem_address(chunk_at<S>(v_tile, lane & 15, lane >> 4));
  SoftmaxRows rows[S::kAtoms];
  float o[S::kAtoms][D / 8][4] = {};

  for (int pos = first; pos < t.kv_end; pos += kKvRows) {
    // Hides where these come from: addresses made of them are then computed anew, not kept in registers, of which there
    // are none to spare.
    asm volatile("" : "+r"(loader.thread), "+r"(q_at), "+r"(k_at), "+r"(v_at));
    loader.finish(k_tile);
    __syncthreads();  // K is there, and everyone is done with V
    loader.start(v_tile, t.kv + p.kv_bytes);

    float s[S::kAtoms][kKvRows / 8][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      std::uint32_t a[S::kAtoms][4];
#pragma unroll
      for (int i = 0; i < S::kAtoms; ++i) ldmatrix_x4(a[i], beside<S>(q_at, 16 * i, 2 * k));
#pragma unroll
      for (int n = 0; n < kKvRows / 16; ++n) {
        std::uint32_t b[4];
        ldmatrix_x4(b, beside<S>(k_at, 16 * n, 2 * k));
#pragma unroll
        for (int i = 0; i < S::kAtoms; ++i) {
          mma_bf16(s[i][2 * n], a[i], b[0], b[1]);
          mma_bf16(s[i][2 * n + 1], a[i], b[2], b[3]);
        }
      }
    }

    const bool masked = needs_mask(p, t, pos, kKvRows);
    std::uint32_t weights[S::kAtoms][kKvRows / 16][4];
#pragma unroll
    for (int a = 0; a < S::kAtoms; ++a) {
      const float factor = finish_scores(p, t, warp_row + 16 * a + lane / 4, pos + 2 * (lane & 3), masked, s[a]);
      float rescale[2];
      softmax_step(rows[a], factor, s[a], rescale);
#pragma unroll
      for (int k = 0; k < kKvRows / 16; ++k) pack_scores(s[a], k, weights[a][k]);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[a][n][i] *= rescale[i / 2];
    }

    loader.finish(v_tile);
    __syncthreads();  // V is there, and everyone is done with K
    if (pos + kKvRows < t.kv_end) {
      loader.seek(pos + kKvRows);
      loader.start(k_tile, t.kv);
    }
#pragma unroll
    for (int k = 0; k < kKvRows / 16; ++k) {
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        std::uint32_t b[4];
        ldmatrix_x4_trans(b, beside<S>(v_at, 16 * k, 2 * n));
#pragma unroll
        for (int i = 0; i < S::kAtoms; ++i) {
          mma_bf16(o[i][2 * n], weights[i][k], b[0], b[1]);
          mma_bf16(o[i][2 * n + 1], weights[i][k], b[2], b[3]);
        }
      }
    }
  }

  // Through the warp's own rows of the Q tile, so that global memory is written in whole chunks.
#pragma unroll
  for (int a = 0; a < S::kAtoms; ++a)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = inverse_sum(rows[a], half);
      const int row = warp_row + 16 * a + 8 * half + lane / 4;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<std::uint32_t*>(chunk_at<S>(q_tile, row, n) + 2 * (lane & 3)) =
            pack_bf16(o[a][n][2 * half] * scale, o[a][n][2 * half + 1] * scale);
    }
  __syncwarp();
  for (int i = lane; i < S::kWarpRows * S::kChunks; i += 32) {
    const int row = warp_row + i / S::kChunks, chunk = i % S::kChunks;
    const TileRow r = tile_row(p, t, row);
    if (r.valid)
      *reinterpret_cast<uint4*>(p.out + r.token * p.ldo + r.head * D + chunk * 8) =
          *reinterpret_cast<const uint4*>(chunk_at<S>(q_tile, row, chunk));
  }
}

template <class S>
void run(const PrefillParams& p, cudaStream_t stream) {
  const std::size_t bytes = S::shared_bytes(p.element_bytes == 1);
  allow_shared_memory(prefill_mma_kernel<S>, bytes);
  launch(prefill_mma_kernel<S>, dim3(static_cast<unsigned>(p.num_work)), dim3(S::kThreads), bytes, stream, p);
}

}  // namespace

bool prefill_mma_takes(const AttentionCall& call, const AttentionLimits& limits) {
  const int d = call.args.head_dim;
  if (limits.capability < 80 || !prefill_shape_ok(call)) return false;
  if (d == 64 || d == 96 || d == 128) return true;
  // Needs more shared memory than the small chips of a generation have.
  return d == 256 && (limits.capability == 80 || limits.capability == 87 || limits.capability / 10 == 9 ||
                      limits.capability / 10 == 10);
}

void prefill_mma(const AttentionCall& call, const StepView& step, const PrefillPlan& plan, cudaStream_t stream) {
  const PrefillParams p = prefill_params(call, step, plan);
  switch (call.args.head_dim) {
    case 64:
      return run<Shape<64, 32, 2>>(p, stream);
    case 96:
      return run<Shape<96, 32, 2>>(p, stream);
    case 128:
      return run<Shape<128, 32, 2>>(p, stream);
    default:
      return run<Shape<256, 16, 1>>(p, stream);
  }
}

}  // namespace fastllm::cuda

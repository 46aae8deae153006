#include "gemm_tile.h"

#include <algorithm>
#include <limits>

#include "check.h"
#include "gemm_tile_kernel.h"

namespace fastllm::cuda {
namespace {

constexpr std::int64_t kManyRows = 16;       // tiles
constexpr std::int64_t kRowItemsAtOnce = 8;  // that run at once and load the same weights
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Cut {
  std::int64_t row_items, col_items, steps, col_step;
  bool share_x;
  std::int64_t items() const { return row_items * col_items; }
};

Cut cut(int tile_cols, std::int64_t m, std::int64_t n, std::int64_t k, bool gated) {
  const std::int64_t col_step = gated ? tile_cols / 2 : tile_cols;
  const std::int64_t rows = ceil_div(m, kTileRows), cols = ceil_div(gated ? n / 2 : n, col_step);  // tiles
  // Tiles of a column share more bytes, but of an odd number of rows one would be computed for nothing.
  const bool share_x = rows % 2 == 1 && rows < kManyRows;
  return {share_x ? rows : ceil_div(rows, 2), share_x ? ceil_div(cols, 2) : cols, ceil_div(k, kTileDepth), col_step,
          share_x};
}

#ifdef FASTLLM_WITH_SM90A

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

void* driver_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "looking for cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
        "looking for cuTensorMapEncodeTiled");
#endif
  return found == cudaDriverEntryPointSuccess ? entry : nullptr;
}

// Boxes of box_rows rows and kTileDepth columns, permuted as wgmma wants them.
CUtensorMap tensor_map(void* encode, const void* data, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                       int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(ld) * 2};  // bytes
  const cuuint32_t box[] = {kTileDepth, static_cast<cuuint32_t>(box_rows)}, every[] = {1, 1};
  const CUresult status =
      reinterpret_cast<Encode>(encode)(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes,
                                       strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw ResourceError("CUDA: describing a matrix of " + std::to_string(rows) + " x " + std::to_string(cols) +
                        " failed: error " + std::to_string(static_cast<int>(status)));
  return map;
}

#endif

}  // namespace

float expected_tile_us(int tile_cols, std::int64_t m, std::int64_t n, std::int64_t k, bool gated, int clusters) {
  // Of one H100; only their ratios matter.
  constexpr float kFlopPerUs = 6.3e6f;     // of a multiprocessor
  constexpr float kL2BytesPerUs = 8.5e6f;  // of all
  constexpr float kBytesPerUs = 3.0e6f;    // of memory
  constexpr float kStepUs = 0.03f, kLaunchUs = 5;

  const Cut c = cut(tile_cols, m, n, k, gated);
  const auto at_once = static_cast<float>(std::min<std::int64_t>(c.items(), clusters));
  const auto rounds = static_cast<float>(ceil_div(c.items(), clusters));
  const auto cols = static_cast<float>(tile_cols);
  // Of one step of all blocks that run at once.
  const float products = 2 * cols * kTileRows * kTileDepth / kFlopPerUs;
  const float columns = c.share_x ? kTileRows / 2 + cols : kTileRows + cols / 2;  // that a block loads
  const float loads = at_once * 2 * 2 * kTileDepth * columns / kL2BytesPerUs;
  const float weights = at_once * (c.share_x ? 2 : 1) / static_cast<float>(std::min(c.row_items, kRowItemsAtOnce)) *
                        cols * 2 * kTileDepth / kBytesPerUs;
  const float slower = std::max({products, loads, weights});
  const float step = kStepUs + slower + 0.1f * std::min(products, weights);  // they get in each other's way
  return kLaunchUs + rounds * static_cast<float>(c.steps) * step;
}

int plan_tiles(std::int64_t m, std::int64_t n, std::int64_t k, bool gated, int clusters) {
  return *std::min_element(kTileCols.begin(), kTileCols.end(), [&](int a, int b) {
    return expected_tile_us(a, m, n, k, gated, clusters) < expected_tile_us(b, m, n, k, gated, clusters);
  });
}

bool tile_gemm_supports(const GemmCall& c, bool gated) {
  auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  const std::int64_t cols = gated ? c.w.n / 2 : c.w.n;
  return c.w.dtype == DType::BF16 && c.w.k % 8 == 0 && c.ldx % 8 == 0 && cols % 8 == 0 && c.ldo % 8 == 0 &&
         aligned(c.x) && aligned(c.w.data) && aligned(c.out) && c.m < kMost && c.w.n < kMost && c.w.k < kMost &&
         (c.out_dtype == DType::BF16 ? !c.accumulate : !gated);
}

std::unique_ptr<TileGemm> TileGemm::make([[maybe_unused]] int capability) {
#ifdef FASTLLM_WITH_SM90A
  void* encode = capability == 90 ? driver_encode() : nullptr;
  if (encode == nullptr) return nullptr;
  std::unique_ptr<TileGemm> made(new TileGemm);
  made->encode_ = encode;
  made->clusters_ = std::numeric_limits<int>::max();
  for (const int cols : kTileCols) made->clusters_ = std::min(made->clusters_, prepare_tiles(cols));
  if (made->clusters_ == 0) return nullptr;
  return made;
#else
  return nullptr;
#endif
}

void TileGemm::run([[maybe_unused]] const GemmCall& call, [[maybe_unused]] std::optional<Activation> gated,
                   [[maybe_unused]] int tile_cols, [[maybe_unused]] cudaStream_t stream) const {
#ifdef FASTLLM_WITH_SM90A
  const Cut c = cut(tile_cols, call.m, call.w.n, call.w.k, gated.has_value());
  TileParams p;
  p.x = tensor_map(encode_, call.x, call.m, call.w.k, call.ldx, c.share_x ? kTileRows / 2 : kTileRows);
  p.w = tensor_map(encode_, call.w.data, call.w.n, call.w.k, call.w.k, tile_cols / 2);
  p.out = call.out;
  p.bias = call.bias;
  p.ldo = call.ldo;
  p.m = static_cast<int>(call.m);
  p.cols = static_cast<int>(gated ? call.w.n / 2 : call.w.n);
  p.steps = static_cast<int>(c.steps);
  p.row_items = static_cast<int>(c.row_items);
  p.col_items = static_cast<int>(c.col_items);
  p.items = static_cast<int>(c.items());
  p.share_x = c.share_x;
  p.col_step = static_cast<int>(c.col_step);
  p.second_half = gated ? p.cols : tile_cols / 2;
  p.gated = gated ? static_cast<int>(*gated) : kTileNotGated;
  p.out_f32 = call.out_dtype == DType::F32;
  p.accumulate = call.accumulate;
  launch_tiles(tile_cols, p, std::min(p.items, clusters_), stream);
#endif
}

}  // namespace fastllm::cuda

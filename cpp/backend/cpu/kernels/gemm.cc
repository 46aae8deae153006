// y = x w^T (+ bias), or y += x w^T, for the matrices of a model.
//
//   for m, n: s = 0; for k: s += x[m][k] * w[n][k]
//             y[m][n] = (accumulate ? y[m][n] : 0) + s + (bias ? bias[n] : 0)
//
// Cost: N K size_of(weight) bytes while M is small, 2 M N K operations when it is large. bf16 weights meet fp32 copies
// of the activations here; gemm_amx.cc and gemm_pairs.cc multiply bf16 by bf16. Benchmark: fastllm_bench_ops
// --benchmark_filter=Linear
#include "backend/cpu/kernels/gemm.h"

#include "backend/cpu/kernels/micro.h"

namespace fastllm::cpu {
namespace {

void pack_f32(const float* rows, int64_t n, int64_t k, float* panel) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t c = 0; c < kPanel; ++c) panel[i * kPanel + c] = c < n ? rows[c * k + i] : 0.0f;
}

void pack_bf16(const float* rows, int64_t n, int64_t k, uint16_t* panel, uint16_t* tmp) {
  const int64_t blocks = (k + 31) / 32;
  for (int64_t c = 0; c < kPanel; ++c) {
    __builtin_memset(tmp, 0, static_cast<size_t>(blocks) * 64);
    if (c < n)
      for_vectors(k, [&](int64_t i, int64_t lanes) { store_some(tmp + i, load_some(rows + c * k + i, lanes), lanes); });
    uint16_t* column = panel + (c / 16) * 512 + (c % 16) * 2;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t pair = 0; pair < 16; ++pair)
        __builtin_memcpy(column + b * 1024 + pair * 32, tmp + b * 32 + pair * 2, 4);
  }
}

void gemm_f32(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const auto* a = static_cast<const float*>(g.a);
  for (int64_t p = p0; p < p1; ++p) {
    const float* w = static_cast<const float*>(g.w) + p * kPanel * g.k;
    for (int64_t col = 0; col < kPanel; col += kMicroCols) {
      const int64_t n = p * kPanel + col;
      if (n >= g.n) break;
      for (int64_t m = m0; m < m1; m += kMaxRows) {
        with_rows<kMaxRows>(m1 - m, [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          const auto acc = micro_f32<R, kMaxVecs>(a + m * g.lda, g.lda, w + col, kPanel, g.k);
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < kMaxVecs; ++v) finish_columns(g, m + r, n + v * kW, acc.v[r][v]);
        });
      }
    }
  }
}

#if !defined(__AMX_BF16__)
int64_t prepared_bytes(int64_t k) { return kRowBlock * round_up(k, 32) * 4; }

void prepare_bf16(const uint16_t* x, int64_t ldx, int64_t begin, int64_t end, int64_t k, void* prepared) {
  const int64_t kp = round_up(k, 32);
  for (int64_t m = begin; m < end; ++m) {
    float* row = static_cast<float*>(prepared) + m * kp;
    for_vectors(k, [&](int64_t i, int64_t lanes) { store_some(row + i, load_some(x + m * ldx + i, lanes), lanes); });
    for (int64_t i = k; i < kp; ++i) row[i] = 0.0f;
  }
}

int64_t gemm_sums(int64_t, int64_t, int64_t) { return 0; }

void gemm_bf16(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int64_t kp = round_up(g.k, 32);
  const auto* a = static_cast<const float*>(g.a);
  for (int64_t p = p0; p < p1; ++p) {
    const auto* panel = static_cast<const uint16_t*>(g.w) + p * kPanel * kp;
    if (m1 - m0 <= 4 * kPanelRows) {  // memory's time or little more
      for (int64_t m = m0; m < m1; m += kPanelRows) {
        with_rows<kPanelRows>(m1 - m, [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          const auto acc = panel_bf16<R>(a + m * kp, kp, panel, kp);
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < kPanel / kW; ++v) finish_columns(g, m + r, p * kPanel + v * kW, acc.v[r][v]);
        });
      }
      continue;
    }
    for (int64_t col = 0; col < kPanel; col += kMicroCols) {
      const int64_t n = p * kPanel + col;
      if (n >= g.n) break;
      for (int64_t m = m0; m < m1; m += kMaxRows) {
        with_rows<kMaxRows>(m1 - m, [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          const auto acc = micro_bf16<R, kMaxVecs>(a + m * kp, kp, panel + col * 32, 1024, kp);
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < kMaxVecs; ++v) finish_columns(g, m + r, n + v * kW, acc.v[r][v]);
        });
      }
    }
  }
}
#endif

}  // namespace

void FASTLLM_ISA::fill_gemm(Kernels& t) {
  t.pack_f32 = pack_f32;
  t.pack_bf16 = pack_bf16;
  t.gemm_f32 = gemm_f32;
#if !defined(__AMX_BF16__)
  t.amx = false;
  t.prepared_bytes = prepared_bytes;
  t.prepare_bf16 = prepare_bf16;
  t.gemm_sums = gemm_sums;
  t.gemm_bf16 = gemm_bf16;
#endif
}

}  // namespace fastllm::cpu

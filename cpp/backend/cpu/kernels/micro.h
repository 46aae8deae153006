// Register-blocked products of a few rows with 16 or 32 columns. Every output is one chain of fused multiply-adds over
// k in ascending order, whatever the number of rows: results do not depend on the batch.
#pragma once

#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 8, kMaxVecs = 2;
#elif defined(__AVX2__)
constexpr int kMaxRows = 5, kMaxVecs = 2;
#else
constexpr int kMaxRows = 3, kMaxVecs = 4;
#endif
constexpr int64_t kMicroCols = kMaxVecs * kW;  // 32, 16, 16

template <int R, int V>
struct Acc {
  vf v[R][V];
};

// a: [R, k] fp32, b: [k, V * kW] fp32
template <int R, int V>
inline Acc<R, V> micro_f32(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k) {
  Acc<R, V> c{};
  for (int64_t i = 0; i < k; ++i) {
    vf bv[V];
    for (int j = 0; j < V; ++j) bv[j] = load(b + i * ldb + j * kW);
    for (int r = 0; r < R; ++r) {
      const vf av = set1(a[r * lda + i]);
      for (int j = 0; j < V; ++j) c.v[r][j] = fma(av, bv[j], c.v[r][j]);
    }
  }
  return c;
}

// a: [R, k] fp32; w: first tile of a bf16 panel, `tile_step` elements to the tile of the next 32 k; k: multiple of 32.
template <int R, int V>
inline Acc<R, V> micro_bf16(const float* a, int64_t lda, const uint16_t* w, int64_t tile_step, int64_t k) {
  Acc<R, V> c{};
  for (int64_t kb = 0; kb < k; kb += 32, w += tile_step) {
    __builtin_prefetch(w + 4096);
    __builtin_prefetch(w + 4096 + 512);
    for (int64_t pair = 0; pair < 16; ++pair) {
      vf even[V], odd[V];
      for (int j = 0; j < V; ++j) {
        const int64_t col = j * kW;  // of the 16 or 32
        const vu x = load_u32(w + (col / 16) * 512 + pair * 32 + (col % 16) * 2);
        even[j] = as_float(x << 16);
        odd[j] = as_float(x & 0xffff0000u);
      }
      const float* ap = a + kb + pair * 2;
      for (int r = 0; r < R; ++r) {
        const vf a0 = set1(ap[r * lda]), a1 = set1(ap[r * lda + 1]);
        for (int j = 0; j < V; ++j) c.v[r][j] = fma(a1, odd[j], fma(a0, even[j], c.v[r][j]));
      }
    }
  }
  return c;
}

// The same for a whole panel of 32 columns, read in the order of its addresses, as weights come from memory fastest.
// For as many rows as have registers beside all columns.
#if defined(__AVX512F__)
constexpr int kPanelRows = 4;
#elif defined(__AVX2__)
constexpr int kPanelRows = 2;
#else
constexpr int kPanelRows = 1;
#endif
template <int R>
inline Acc<R, kPanel / kW> panel_bf16(const float* a, int64_t lda, const uint16_t* w, int64_t k) {
  constexpr int V = 16 / kW;  // vectors of a tile
  Acc<R, 2 * V> c{};
  for (int64_t kb = 0; kb < k; kb += 32) {
    const auto tile = [&]<int kFirst>(const float* ap, Acc<R, 2 * V>& c) {
      for (int64_t pair = 0; pair < 16; ++pair, w += 32, ap += 2) {
        __builtin_prefetch(w + 4096);
        vf even[V], odd[V];
        for (int j = 0; j < V; ++j) {
          const vu x = load_u32(w + j * kW * 2);
          even[j] = as_float(x << 16);
          odd[j] = as_float(x & 0xffff0000u);
        }
        for (int r = 0; r < R; ++r) {
          const vf a0 = set1(ap[r * lda]), a1 = set1(ap[r * lda + 1]);
          for (int j = 0; j < V; ++j) {
            vf& sum = c.v[r][kFirst + j];
            sum = fma(a1, odd[j], fma(a0, even[j], sum));
          }
        }
      }
    };
    tile.template operator()<0>(a + kb, c);
    tile.template operator()<V>(a + kb, c);
  }
  return c;
}

template <int N>
struct Rows {
  static constexpr int value = N;
};

// What is inlined and unrolled by force takes sanitizers minutes to compile, and gains nothing there.
#if defined(FASTLLM_SANITIZED)
#define FASTLLM_INLINE __attribute__((noinline))
#else
#define FASTLLM_INLINE __attribute__((always_inline))
#endif

// f(Rows<r>{}) for r = 0 ... R - 1. Loops over an array of sums that the compiler unrolls late leave it in memory.
template <int R, class F>
FASTLLM_INLINE inline void each(const F& f) {
  if constexpr (R > 1) each<R - 1>(f);
  f(Rows<R - 1>{});
}

// f(Rows<n>{}) for n = rows <= N, the number of rows being a compile-time constant inside.
template <int N, class F>
inline void with_rows(int64_t rows, F&& f) {
  if constexpr (N == 1) {
    f(Rows<1>{});
  } else if (rows >= N) {
    f(Rows<N>{});
  } else {
    with_rows<N - 1>(rows, f);
  }
}

// c[m, n] = a[m, k] b[k, n], all fp32; n: multiple of 16.
inline void small_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                       float* c, int64_t ldc) {
  int64_t j = 0;
  const auto columns = [&]<int V>(Rows<V>) {
    for (int64_t i = 0; i < m; i += kMaxRows) {
      with_rows<kMaxRows>(m - i, [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        const auto acc = micro_f32<R, V>(a + i * lda, lda, b + j, ldb, k);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) store(c + (i + r) * ldc + j + v * kW, acc.v[r][v]);
      });
    }
  };
  for (; j + kMicroCols <= n; j += kMicroCols) columns(Rows<kMaxVecs>{});
  if constexpr (kMicroCols > 16) {
    if (j < n) columns(Rows<16 / kW>{});
  }
}

}  // namespace
}  // namespace fastllm::cpu

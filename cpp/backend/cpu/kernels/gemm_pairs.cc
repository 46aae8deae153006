// The bf16 product by VDPBF16PS, on machines with AVX512_BF16 and no tiles: y = x w^T, bf16 by bf16 into fp32.
//
//   for m, n: s = 0; for pairs of k: s = s + x[m][k] * w[n][k] + x[m][k + 1] * w[n][k + 1]
//   y[m][n] = (accumulate ? y[m][n] : 0) + s + (bias ? bias[n] : 0)
//
// A panel of weights is read in the order of its addresses, the one order in which memory gives all it has on every
// machine: hardware follows it by itself. So activations are broadcast once for each of a panel's two tiles, as
// operands, which costs nothing. Cost: 2 N K bytes while M is small, 2 M N K operations when it is large.
// Benchmark: fastllm_bench_ops --benchmark_filter=Linear
#include "backend/cpu/kernels/gemm.h"

#if defined(__AVX512F__) && !defined(__AMX_BF16__)

#include "backend/cpu/kernels/pairs.h"

namespace fastllm::cpu {
namespace {

constexpr int64_t kPairAhead = 4096;  // elements of weights fetched ahead of use
#if defined(FASTLLM_SANITIZED)
constexpr int kPairRows = 2;
#else
constexpr int kPairRows = 12;  // 24 sums and the weights have registers
#endif

// R of the `rows` rows of a prepared block times a panel; a: the first of them.
template <int R>
FASTLLM_INLINE inline Acc<R, 2> rows_by_panel(const uint16_t* a, int64_t rows, const uint16_t* w, int64_t k) {
  auto c = no_sums<R, 2>();
  for (int64_t kb = 0; kb < k; kb += 32, a += rows * 32, w += 1024) {
    each<32>([&](auto line) FASTLLM_INLINE {
      constexpr int kLine = decltype(line)::value, kTile = kLine / 16, kPair = kLine % 16;
      __builtin_prefetch(w + kPairAhead + kLine * 32);
      const vu x = load_u32(w + kLine * 32);
      each<R>([&](auto r) FASTLLM_INLINE {
        vf& sum = c.v[r.value][kTile];
        sum = add_pairs(sum, x, reinterpret_cast<const Pair*>(a + r.value * 32) + kPair);
      });
    });
  }
  return c;
}

// The same once the panel is in a cache: both tiles of a pair meet an activation that is loaded once.
template <int R>
FASTLLM_INLINE inline Acc<R, 2> rows_by_cached(const uint16_t* a, int64_t rows, const uint16_t* w, int64_t k) {
  auto c = no_sums<R, 2>();
  for (int64_t kb = 0; kb < k; kb += 32, a += rows * 32, w += 1024) {
    each<16>([&](auto pair) FASTLLM_INLINE {
      constexpr int kPair = decltype(pair)::value;
      const vu x0 = load_u32(w + kPair * 32), x1 = load_u32(w + 512 + kPair * 32);
      each<R>([&](auto r) FASTLLM_INLINE {
        const vu v = set1(reinterpret_cast<const Pair*>(a + r.value * 32)[kPair]);
        c.v[r.value][0] = add_pairs(c.v[r.value][0], x0, v);
        c.v[r.value][1] = add_pairs(c.v[r.value][1], x1, v);
      });
    });
  }
  return c;
}

// A row's sums of a panel, to where they belong.
inline void finish_row(const GemmArgs& g, int64_t m, int64_t p, const vf (&sum)[2]) {
  const int64_t n = p * kPanel;
  if (g.out_bf16 && !g.accumulate && !g.bias && n + kPanel <= g.n) {
    _mm512_storeu_si512(static_cast<uint16_t*>(g.out) + m * g.ldo + n, narrow_pair(sum[0], sum[1]));
  } else {
    for (int v = 0; v < 2; ++v) finish_columns(g, m, n + v * kW, sum[v]);
  }
}

// Rows [m0, m1) of a block, in turns of about as many, times panel p; cached: of which a block was multiplied just now.
void block_by_panel(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p, bool cached) {
  const int64_t kp = round_up(g.k, 32), rows = m1 - m0, turns = (rows + kPairRows - 1) / kPairRows;
  const auto* a = static_cast<const uint16_t*>(g.a) + m0 * kp;
  const auto* panel = static_cast<const uint16_t*>(g.w) + p * kPanel * kp;
  for (int64_t turn = 0, done = 0; turn < turns; ++turn) {
    const int64_t here = rows * (turn + 1) / turns - done;
    with_rows<kPairRows>(here, [&](auto count) {
      constexpr int R = decltype(count)::value;
      const auto acc =
          cached ? rows_by_cached<R>(a + done * 32, rows, panel, kp) : rows_by_panel<R>(a + done * 32, rows, panel, kp);
      for (int r = 0; r < R; ++r) finish_row(g, m0 + done + r, p, acc.v[r]);
    });
    done += here;
  }
}

void gemm_bf16(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t m = m0; m < m1; m += kRowBlock)
      block_by_panel(g, m, m1 - m < kRowBlock ? m1 : m + kRowBlock, p, m > m0);
}

}  // namespace

Kernels FASTLLM_ISA::table_bf16() {
  Kernels t = table();
  t.name = FASTLLM_ISA_NAME "_bf16";
  t.prepared_bytes = pair_bytes;
  t.prepare_bf16 = prepare_pairs;
  t.gemm_bf16 = gemm_bf16;
  fill_attention_pairs(t);
  return t;
}

}  // namespace fastllm::cpu
#endif

// One KV tile of attention on AMX tiles, for bf16 queries and a bf16 cache: s = q k^T and out = p v, the softmax
// between them in fp32 and p rounded to bf16. Everything else, and the naive reference, is in attention.cc.
//
// Cost: 64 cycles per 16 queries for each of the two products at head_dim 64; the softmax takes most of the time.
// Benchmark: --benchmark_filter=Attention
#include "backend/cpu/kernels/attention.h"
#include "backend/cpu/kernels/tiles.h"

#if defined(__AMX_BF16__)

namespace fastllm::cpu {
namespace {

// Keys: 16 positions by 32 dims at a time, read as 16 dim pairs each, change rows for columns.
// Values: two positions interleave. Positions from `valid` on and dims beyond head_dim are zero.
void load_tile(const AttnTask& t, const Work& w, int64_t begin, int64_t valid) {
  const uint16_t* rows[kKvTile];
  // Blocks lie anywhere: ask for this tile's values and the next tile's keys while the keys are rearranged.
  const int64_t last = t.first_pos + t.tokens - 1;
  for (int64_t j = 0; j < valid; ++j) {
    rows[j] = key_row<uint16_t>(t, begin + j);
    const int64_t ahead = begin + kKvTile + j;
    const uint16_t* next = ahead <= last ? key_row<uint16_t>(t, ahead) : rows[j];
    for (int64_t d = 0; d < t.head_dim; d += 32) {
      __builtin_prefetch(rows[j] + t.kv_stride + d);
      __builtin_prefetch(next + d, 0, 2);
    }
  }
  auto* keys = reinterpret_cast<uint16_t*>(w.keys);
  for (int64_t d = 0; d < t.head_dim; d += 32) {
    const int64_t lanes = t.head_dim - d < 32 ? t.head_dim - d : 32;
    for (int64_t j = 0; j < kKvTile; j += 16, keys += kTile) {
      vf r[16];
      for (int64_t i = 0; i < 16; ++i) {
        r[i] = vf{};
        if (j + i < valid) {
          if (lanes == 32) {
            r[i] = as_float(load_u32(rows[j + i] + d));
          } else {
            __builtin_memcpy(&r[i], rows[j + i] + d, static_cast<size_t>(lanes) * 2);
          }
        }
      }
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) store(reinterpret_cast<float*>(keys) + i * 16, r[i]);
    }
  }
  auto* values = reinterpret_cast<uint16_t*>(w.values);
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t d = 0; d < w.dim; d += 16, values += kTile) {
      const int64_t lanes = t.head_dim - d < 16 ? t.head_dim - d : 16;
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t j = half * 32 + 2 * i;
        const vf low = j < valid ? load_some(rows[j] + t.kv_stride + d, lanes) : vf{};
        const vf high = j + 1 < valid ? load_some(rows[j + 1] + t.kv_stride + d, lanes) : vf{};
        store(reinterpret_cast<float*>(values) + i * 16, as_float((as_bits(low) >> 16) | as_bits(high)));
      }
    }
  }
}

// c[rows, n] = a[rows, k] b: a row-major, b as tiles, `b_step` elements from one k block to the next. n: multiple
// of 16. Tiles 0, 1, 4 have 16 rows, 2, 3, 5 those of the last rows; see begin_tiles().
void tile_gemm(int64_t rows, int64_t n, int64_t k_blocks, const uint16_t* a, int64_t lda, const uint16_t* b,
               int64_t b_step, float* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += 32, b += 2 * kTile) {
    const bool pair = j + 16 < n;
    for (int64_t i = 0; i < rows; i += 16) {
      const uint16_t* ai = a + i * lda;
      const uint16_t* bk = b;
      float* to = c + i * ldc + j;
      if (i + 16 <= rows) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        for (int64_t kb = 0; kb < k_blocks; ++kb, bk += b_step) {
          TILE_LOAD(4, ai + kb * 32, lda * 2);
          TILE_LOAD(6, bk, 64);
          TILE_DOT(0, 4, 6);
          if (pair) {
            TILE_LOAD(7, bk + kTile, 64);
            TILE_DOT(1, 4, 7);
          }
        }
        TILE_STORE(0, to, ldc * 4);
        if (pair) TILE_STORE(1, to + 16, ldc * 4);
      } else {
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (int64_t kb = 0; kb < k_blocks; ++kb, bk += b_step) {
          TILE_LOAD(5, ai + kb * 32, lda * 2);
          TILE_LOAD(6, bk, 64);
          TILE_DOT(2, 5, 6);
          if (pair) {
            TILE_LOAD(7, bk + kTile, 64);
            TILE_DOT(3, 5, 7);
          }
        }
        TILE_STORE(2, to, ldc * 4);
        if (pair) TILE_STORE(3, to + 16, ldc * 4);
      }
    }
  }
}

}  // namespace

void FASTLLM_ISA::begin_tiles(const AttnTask& t, const Work& w) {
  const auto last = static_cast<uint8_t>(w.queries % 16 == 0 ? 16 : w.queries % 16);
  const uint8_t rows[8] = {16, 16, last, last, 16, last, 16, 16};
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = rows[i];
    c.bytes_per_row[i] = 64;
  }
  configure(c);
  const int64_t padded = round_up(t.head_dim, 32);
  auto* to = reinterpret_cast<uint16_t*>(w.q);
  for (int64_t i = 0; i < w.queries; ++i, to += padded) {
    const uint16_t* q = static_cast<const uint16_t*>(t.q) + (i / t.group) * t.q_stride + (i % t.group) * t.head_dim;
    __builtin_memcpy(to, q, static_cast<size_t>(t.head_dim) * 2);
    __builtin_memset(to + t.head_dim, 0, static_cast<size_t>(padded - t.head_dim) * 2);
  }
}

void FASTLLM_ISA::attend_tile_bf16(const AttnTask& t, const Work& w, int64_t tile, float* out) {
  const int64_t begin = tile * kKvTile, end = t.first_pos + t.tokens, padded = round_up(t.head_dim, 32);
  load_tile(t, w, begin, end - begin < kKvTile ? end - begin : kKvTile);
  tile_gemm(w.queries, kKvTile, padded / 32, reinterpret_cast<const uint16_t*>(w.q), padded,
            reinterpret_cast<const uint16_t*>(w.keys), 4 * kTile, w.scores, kKvTile);
  auto* p = reinterpret_cast<uint16_t*>(w.p);
  float* maxima = out + w.queries * w.dim;
  float* sums = maxima + round_up(w.queries, 16);
  for (int64_t i = 0; i < w.queries; ++i)
    soften(t, i, begin, w.scores + i * kKvTile, p + i * kKvTile, maxima + i, sums + i);
  tile_gemm(w.queries, w.dim, 2, p, kKvTile, reinterpret_cast<const uint16_t*>(w.values), w.dim / 16 * kTile, out,
            w.dim);
}

void FASTLLM_ISA::end_tiles() { release(); }

}  // namespace fastllm::cpu

#endif

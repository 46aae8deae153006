// Norms q and k per head, rotates them, and writes k and v of one token into the paged cache.
//
//   q, k = norm(q), norm(k)                                          (where a norm is asked for)
//   (a, b) -> (a cos - b sin, b cos + a sin)     pairs (i, i + dim/2), or (2i, 2i + 1) when interleaved
//   cache[block][slot] = k, v           in an int8 cache codes and a scale; in the order that kernels.h says
//
// Cost per token: (heads + 2 kv_heads) head_dim elements read, q and k written back, k and v written to the cache.
// Benchmark: --benchmark_filter=RopeKv
#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/kv_values.h"

namespace fastllm::cpu {
namespace {

template <class T>
void read_row(const T* x, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int64_t lanes) { store_some(out + i, load_some(x + i, lanes), lanes); });
}
template <class T>
void write_row(const float* x, int64_t n, T* out) {
  for_vectors(n, [&](int64_t i, int64_t lanes) { store_some(out + i, load_some(x + i, lanes), lanes); });
}

void norm_head(float* x, int64_t n, const float* weight, float eps, bool layer) {
  float mean = 0.0f, squares = 0.0f;
  if (layer) {
    for (int64_t i = 0; i < n; ++i) mean += x[i];
    mean /= static_cast<float>(n);
  }
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float s = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * s * (weight ? weight[i] : 1.0f);
}

void rotate(float* x, const float* cos, int64_t half, bool interleaved) {
  const float* sin = cos + half;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  for_vectors(half, [&](int64_t i, int64_t lanes) {
    const vf a = load_some(x + i, lanes), b = load_some(x + half + i, lanes);
    const vf c = load_some(cos + i, lanes), s = load_some(sin + i, lanes);
    store_some(x + i, a * c - b * s, lanes);
    store_some(x + half + i, b * c + a * s, lanes);
  });
}

// Number by number: another thread may write the other position of a pair.
void write_pairs(const RopeKvArgs& a, const float* x, bool is_v, int64_t slot, uint16_t* block) {
  block += slot / 16 * 16 * a.head_dim;
  const int64_t at = slot % 16;
  uint16_t bits[32];
  for (int64_t d = 0; d < a.head_dim; d += 32) {
    write_row(x + d, 32, bits);
    if (is_v) {
      uint16_t* to = block + (at / 2 * a.head_dim + d) * 2 + at % 2;
      for (int64_t i = 0; i < 32; ++i) to[i * 2] = bits[i];
    } else {
      uint16_t* to = block + (d / 2 * 16 + at) * 2;
      for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + i * 32, bits + i * 2, 4);
    }
  }
}

// Stores x as slot `slot` of the block whose first slot is at `block`.
template <class Kv>
void write_slot(const RopeKvArgs& a, const float* x, bool is_v, int64_t slot, Kv* block) {
  if constexpr (__is_same(Kv, uint16_t)) {
    if (a.kv_pairs) return write_pairs(a, x, is_v, slot, block);
  }
  write_row(x, a.head_dim, block + slot * a.head_dim);
}
void write_slot(const RopeKvArgs& a, const float* x, bool, int64_t slot, Code* block) {
  const int64_t n = a.head_dim;
  vf most{};
  for_vectors(n, [&](int64_t i, int64_t lanes) { most = max(abs(load_some(x + i, lanes)), most); });
  const float scale = max_of(most) / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    store_codes(block + slot * n + i, load_some(x + i, lanes) * inverse, lanes);
  });
  __builtin_memcpy(block + a.block_size * n + slot * 4, &scale, 4);
}

template <class T, class Kv>
void rope_kv_as(const RopeKvArgs& a, int64_t token, int64_t pos, int64_t block, int64_t slot, float* tmp) {
  const int64_t d = a.head_dim;
  T* row = static_cast<T*>(a.qkv) + token * a.ld;
  Kv* cache = static_cast<Kv*>(a.kv) + block * a.block_stride;
  const float* cos = a.cos_sin + pos * a.rope_dim;
  for (int h = 0; h < a.heads + a.kv_heads; ++h) {
    T* x = row + h * d;
    const bool is_q = h < a.heads;
    const bool normed = is_q ? a.q_norm : a.k_norm;
    if (is_q && !normed && a.rope_dim == 0) continue;
    read_row(x, d, tmp);
    if (normed) {
      norm_head(tmp, d, is_q ? a.q_weight : a.k_weight, is_q ? a.q_eps : a.k_eps, is_q ? a.q_layer : a.k_layer);
    }
    if (a.rope_dim > 0) rotate(tmp, cos, a.rope_dim / 2, a.interleaved);
    write_row(tmp, d, x);
    if (!is_q) write_slot(a, tmp, false, slot, cache + (h - a.heads) * a.head_stride);
  }
  for (int h = 0; h < a.kv_heads; ++h) {
    read_row(row + (a.heads + a.kv_heads + h) * d, d, tmp);
    write_slot(a, tmp, true, slot, cache + a.kv_stride + h * a.head_stride);
  }
}

void rope_kv(const RopeKvArgs& a, int64_t token, int64_t pos, int64_t block, int64_t slot, float* tmp) {
  with_kv_type(a.kv_type, [&]<class Kv>(Kv) {
    a.bf16 ? rope_kv_as<uint16_t, Kv>(a, token, pos, block, slot, tmp)
           : rope_kv_as<float, Kv>(a, token, pos, block, slot, tmp);
  });
}

}  // namespace

void FASTLLM_ISA::fill_rope_kv(Kernels& t) { t.rope_kv = rope_kv; }

}  // namespace fastllm::cpu

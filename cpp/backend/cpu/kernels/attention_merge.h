// How the softmax partials of KV tiles become rows of the output: merged in ascending order, then divided by their
// sums.
#pragma once

#include "backend/cpu/kernels/attention.h"

namespace fastllm::cpu {
namespace {

inline void clear_total(const Work& w) {
  const int64_t padded = round_up(w.queries, 16);
  float* maxima = w.total + w.queries * w.dim;
  __builtin_memset(w.total, 0, static_cast<size_t>(partial_floats(w.queries, w.dim)) * 4);
  for (int64_t i = 0; i < padded; ++i) maxima[i] = kNone;
}

inline void merge_tile(const Work& w, const float* tile) {
  const int64_t padded = round_up(w.queries, 16);
  float* maxima = w.total + w.queries * w.dim;
  float* sums = maxima + padded;
  const float* tile_maxima = tile + w.queries * w.dim;
  const float* tile_sums = tile_maxima + padded;
  for (int64_t i = 0; i < w.queries; i += kW) {
    const vf old_m = load(maxima + i), new_m = load(tile_maxima + i);
    const vf m = max(old_m, new_m);
    const vf keep = exp(old_m - m), take = exp(new_m - m);
    store(maxima + i, m);
    store(sums + i, fma(load(sums + i), keep, load(tile_sums + i) * take));
    for (int64_t q = i; q < i + kW && q < w.queries; ++q) {
      float* to = w.total + q * w.dim;
      const float* from = tile + q * w.dim;
      const vf a = set1(keep[q - i]), b = set1(take[q - i]);
      for (int64_t d = 0; d < w.dim; d += kW) store(to + d, fma(load(to + d), a, load(from + d) * b));
    }
  }
}

template <class T>
inline void write_rows(const AttnTask& t, const Work& w) {
  const float* sums = w.total + w.queries * w.dim + round_up(w.queries, 16);
  for (int64_t i = 0; i < w.queries; ++i) {
    T* out = static_cast<T*>(t.out) + (i / t.group) * t.out_stride + (i % t.group) * t.head_dim;
    const float inverse = 1.0f / sums[i];
    const float* from = w.total + i * w.dim;
    for_vectors(t.head_dim, [&](int64_t d, int64_t lanes) { store_some(out + d, load(from + d) * inverse, lanes); });
  }
}

inline void write_out(const AttnTask& t, const Work& w) {
  t.bf16 ? write_rows<uint16_t>(t, w) : write_rows<float>(t, w);
}

// Padding lanes of maxima and sums are read by merge_tile() and must be finite.
inline void clear_padding(const Work& w, float* tile) {
  const int64_t padded = round_up(w.queries, 16);
  float* maxima = tile + w.queries * w.dim;
  for (int64_t i = w.queries; i < padded; ++i) {
    maxima[i] = kNone;
    maxima[padded + i] = 0.0f;
  }
}

// Every tile of the task through one_tile(tile, partial), the partials kept apart or merged.
template <class F>
inline void attend_tiles(const AttnTask& t, const Work& w, F&& one_tile) {
  const int64_t size = partial_floats(w.queries, w.dim);
  if (t.partials) {
    for (int64_t tile = t.tile_begin; tile < t.tile_end; ++tile) {
      clear_padding(w, t.partials + tile * size);
      one_tile(tile, t.partials + tile * size);
    }
    return;
  }
  clear_total(w);
  for (int64_t i = 0; i < 2; ++i) clear_padding(w, w.tile + i * size);
  // A partial merges when the next tile's work is on its way, so as not to wait for the last of its own.
  const float* before = nullptr;
  for (int64_t tile = t.tile_begin; tile < t.tile_end; ++tile) {
    float* partial = w.tile + tile % 2 * size;
    one_tile(tile, partial);
    if (before) merge_tile(w, before);
    before = partial;
  }
  if (before) merge_tile(w, before);
  write_out(t, w);
}

}  // namespace
}  // namespace fastllm::cpu

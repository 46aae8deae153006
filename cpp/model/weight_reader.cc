// Every transform but Transpose is a map of rows, applied one after the other:
//
//   row of this rank --shard--> canonical row --transform--> row of one source --interleave--> stored row
//
// so a matrix is read by looking each row up and dequantising the columns this rank holds.
#include "model/weight_reader.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "model/dequant.h"
#include "model/dequant_groups.h"

namespace fastllm {
namespace {

struct SourceRow {
  std::size_t source;
  std::int64_t row;
};

// Row of this rank -> canonical row; -1 for padding.
std::int64_t canonical_row(const WeightEntry& e, int rank, int size, std::int64_t row) {
  switch (e.weight->axis) {
    case ShardAxis::Replicated:
    case ShardAxis::Columns:
      return row;
    case ShardAxis::Rows:
      return rank * (e.rows / size) + row;
    case ShardAxis::GateUpRows: {
      const auto half = e.rows / 2, part = half / size;
      return row / part * half + rank * part + row % part;
    }
    case ShardAxis::Vocab: {
      const auto id = rank * vocab_per_rank(e.rows, size) + row;
      return id < e.rows ? id : -1;
    }
    case ShardAxis::QkvRows: {
      const HeadRange h = head_range(e.attn, rank, size);
      const std::int64_t d = e.attn.head_dim;
      const auto head = row / d;  // of this rank: its q, its k, its v heads
      std::int64_t whole = 0;
      if (head < h.heads) {
        whole = h.q_begin + head;
      } else if (head < h.heads + h.kv_heads) {
        whole = e.attn.heads + h.kv_begin + (head - h.heads);
      } else {
        whole = e.attn.heads + e.attn.kv_heads + h.kv_begin + (head - h.heads - h.kv_heads);
      }
      return whole * d + row % d;
    }
  }
  return -1;
}

// Canonical row -> which source, and which of its rows, before interleaving.
SourceRow source_row(const WeightEntry& e, std::int64_t row) {
  const std::int64_t d = e.attn.head_dim;
  switch (e.binding->transform) {
    case WeightTransform::QkvConcat: {
      const auto q = e.attn.heads * d, k = e.attn.kv_heads * d;
      if (row < q) return {0, row};
      if (row < q + k) return {1, row - q};
      return {2, row - q - k};
    }
    case WeightTransform::QkvGrouped: {
      const std::int64_t heads = e.attn.heads, kv_heads = e.attn.kv_heads, group = heads / kv_heads;
      const auto head = row / d;
      std::int64_t stored = 0;
      if (head < heads) {
        stored = head / group * (group + 2) + head % group;
      } else if (head < heads + kv_heads) {
        stored = (head - heads) * (group + 2) + group;
      } else {
        stored = (head - heads - kv_heads) * (group + 2) + group + 1;
      }
      return {0, stored * d + row % d};
    }
    case WeightTransform::GateUpConcat:
      return {row < e.rows / 2 ? 0u : 1u, row % (e.rows / 2)};
    case WeightTransform::Copy:
    case WeightTransform::Transpose:
      break;
  }
  return {0, row};
}

// Dimension j D/2 + i of a head is stored as member j of pair i.
std::int64_t stored_row(const SourceTensor& t, std::int64_t row) {
  if (t.interleaved_head_dim == 0) return row;
  const std::int64_t dim = t.interleaved_head_dim, r = row % dim;
  return row - r + 2 * (r % (dim / 2)) + r / (dim / 2);
}

}  // namespace

std::int64_t rank_rows(const WeightEntry& e, int size) {
  switch (e.weight->axis) {
    case ShardAxis::Replicated:
    case ShardAxis::Columns:
      return e.rows;
    case ShardAxis::Rows:
    case ShardAxis::GateUpRows:
      return e.rows / size;
    case ShardAxis::Vocab:
      return vocab_per_rank(e.rows, size);
    case ShardAxis::QkvRows: {
      const HeadRange h = head_range(e.attn, 0, size);
      return std::int64_t{h.heads + 2 * h.kv_heads} * e.attn.head_dim;
    }
  }
  return 0;
}

void WeightReader::operator()(std::int64_t begin, std::int64_t end, float* out) const {
  if (entry.binding->transform == WeightTransform::Transpose) {
    read_transposed(begin, end, out);
  } else {
    for (std::int64_t r = begin; r < end; ++r) read_row(r, out + (r - begin) * cols);
  }
  if (entry.binding->add_one) std::for_each(out, out + (end - begin) * cols, [](float& x) { x += 1.0f; });
}

void WeightReader::read_row(std::int64_t row, float* out) const {
  const auto canonical = canonical_row(entry, rank, size, row);
  if (canonical < 0) {
    std::fill_n(out, cols, 0.0f);
    return;
  }
  const auto [index, source] = source_row(entry, canonical);
  const SourceTensor& t = entry.binding->sources[index];
  // A vector is one row of its checkpoint; a matrix has a row for each of ours.
  const bool matrix = entry.weight->shape.size() == 2;
  const std::int64_t width = matrix ? entry.cols : t.shape[0];
  const SourceFormat& f = format_of(t.type);
  const auto* data = static_cast<const std::byte*>(t.data);
  const std::int64_t stored = stored_row(t, source);
  if (matrix) {
    dequantize(t.type, data + stored * (width / f.block_elements) * f.block_bytes, col_begin, cols, out);
  } else {
    dequantize(t.type, data, stored, 1, out);
  }
}

bool WeightReader::is_plain_bf16() const {
  const WeightBinding& b = *entry.binding;
  return b.transform != WeightTransform::Transpose && !b.add_one &&
         std::all_of(b.sources.begin(), b.sources.end(), [](const auto& t) { return t.type == SourceType::BF16; });
}

void WeightReader::copy_bf16(std::int64_t begin, std::int64_t end, std::uint16_t* out) const {
  for (std::int64_t r = begin; r < end; ++r, out += cols) {
    const auto canonical = canonical_row(entry, rank, size, r);
    if (canonical < 0) {
      std::fill_n(out, cols, std::uint16_t{0});
      continue;
    }
    const auto [index, source] = source_row(entry, canonical);
    const SourceTensor& t = entry.binding->sources[index];
    const std::int64_t at = stored_row(t, source) * entry.cols + col_begin;
    std::memcpy(out, static_cast<const std::byte*>(t.data) + at * 2, static_cast<std::size_t>(cols) * 2);
  }
}

bool WeightReader::has_groups(const GroupFormat& f) const {
  const WeightBinding& b = *entry.binding;
  return !b.add_one && is_cut_between_groups() &&
         std::all_of(b.sources.begin(), b.sources.end(), [&](const auto& t) { return groups_fit(t.type, f); });
}

void WeightReader::copy_groups(const GroupFormat& f, std::int64_t begin, std::int64_t end, std::uint8_t* codes,
                               float* scales, float* offsets) const {
  const std::int64_t groups = cols / kGroup;
  for (std::int64_t r = begin; r < end; ++r, codes += cols, scales += groups) {
    const auto canonical = canonical_row(entry, rank, size, r);
    if (canonical < 0) {
      std::fill_n(codes, cols, std::uint8_t{0});
      std::fill_n(scales, groups, 0.0f);
      if (offsets != nullptr) std::fill_n(offsets, groups, 0.0f);
    } else {
      const auto [index, source] = source_row(entry, canonical);
      const SourceTensor& t = entry.binding->sources[index];
      const SourceFormat& s = format_of(t.type);
      const std::int64_t at = stored_row(t, source) * (entry.cols / s.block_elements) * s.block_bytes;
      read_groups(t.type, f, static_cast<const std::byte*>(t.data) + at, col_begin / kGroup, groups, codes, scales,
                  offsets);
    }
    if (offsets != nullptr) offsets += groups;
  }
}

void WeightReader::read_transposed(std::int64_t begin, std::int64_t end, float* out) const {
  const SourceTensor& t = entry.binding->sources[0];
  const std::int64_t width = t.shape[1] * format_of(t.type).block_bytes;
  const auto* data = static_cast<const std::byte*>(t.data);
  std::vector<float> line(static_cast<std::size_t>(end - begin));
  while (begin < end) {
    const auto first = canonical_row(entry, rank, size, begin);
    std::int64_t run = 1;
    while (begin + run < end && canonical_row(entry, rank, size, begin + run) == (first < 0 ? -1 : first + run)) ++run;
    for (std::int64_t c = 0; c < cols; ++c) {
      if (first >= 0) dequantize(t.type, data + (col_begin + c) * width, first, run, line.data());
      for (std::int64_t r = 0; r < run; ++r) out[r * cols + c] = first < 0 ? 0.0f : line[static_cast<std::size_t>(r)];
    }
    begin += run;
    out += run * cols;
  }
}

}  // namespace fastllm

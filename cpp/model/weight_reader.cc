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
std::int64_t file_row(const SourceTensor& t, std::int64_t row) {
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

WeightReader::Run WeightReader::row_at(std::int64_t row) const {
  const auto canonical = canonical_row(entry, rank, size, row);
  if (canonical < 0) return {-1, 0, 1};
  const auto [index, source] = source_row(entry, canonical);
  return {static_cast<std::int64_t>(index), file_row(entry.binding->sources[index], source), 1};
}

WeightReader::Run WeightReader::run_at(std::int64_t begin, std::int64_t end) const {
  Run run = row_at(begin);
  for (; begin + run.n < end; ++run.n) {
    const Run next = row_at(begin + run.n);
    if (next.source != run.source || (run.source >= 0 && next.first != run.first + run.n)) break;
  }
  return run;
}

const std::byte* WeightReader::stored_row(const SourceTensor& t, std::int64_t row) const {
  const SourceFormat& f = format_of(t.type);
  return static_cast<const std::byte*>(t.data) + row * (entry.cols / f.block_elements) * f.block_bytes;
}

void WeightReader::operator()(std::int64_t begin, std::int64_t end, float* out) const {
  const bool matrix = entry.weight->shape.size() == 2;
  float* const first = out;
  if (entry.binding->transform == WeightTransform::Transpose) {
    read_transposed(begin, end, out);
    begin = end;
  }
  for (Run run{}; begin < end; begin += run.n, out += run.n * cols) {
    run = run_at(begin, end);
    if (run.source < 0) {
      std::fill_n(out, run.n * cols, 0.0f);
      continue;
    }
    const auto index = static_cast<std::size_t>(run.source);
    const SourceTensor& t = entry.binding->sources[index];
    if (entry.codes[index]) {
      entry.codes[index]->dequantize(run.first, run.first + run.n, col_begin, cols, out);
    } else if (matrix) {
      for (std::int64_t r = 0; r < run.n; ++r)
        dequantize(t.type, stored_row(t, run.first + r), col_begin, cols, out + r * cols);
    } else {  // a vector is one row of its checkpoint
      dequantize(t.type, static_cast<const std::byte*>(t.data), run.first, run.n, out);
    }
  }
  if (entry.binding->add_one) std::for_each(first, out, [](float& x) { x += 1.0f; });
}

bool WeightReader::is_plain_bf16() const {
  const WeightBinding& b = *entry.binding;
  return b.transform != WeightTransform::Transpose && !b.add_one &&
         std::all_of(b.sources.begin(), b.sources.end(), [](const auto& t) { return t.type == SourceType::BF16; });
}

void WeightReader::copy_bf16(std::int64_t begin, std::int64_t end, std::uint16_t* out) const {
  for (Run run{}; begin < end; begin += run.n) {
    run = run_at(begin, end);
    for (std::int64_t r = run.first; r < run.first + run.n; ++r, out += cols) {
      if (run.source < 0) {
        std::fill_n(out, cols, std::uint16_t{0});
      } else {
        const SourceTensor& t = entry.binding->sources[static_cast<std::size_t>(run.source)];
        std::memcpy(out, stored_row(t, r) + col_begin * 2, static_cast<std::size_t>(cols) * 2);
      }
    }
  }
}

bool WeightReader::has_one_order() const {
  const auto same = [](const auto& a, const auto& b) { return a == b || (a && b && *a == *b); };
  for (const auto& c : entry.codes)
    if (c && (!entry.codes[0] || !same(c->order(), entry.codes[0]->order()))) return false;
  return true;
}

std::shared_ptr<const std::vector<std::int32_t>> WeightReader::order() const {
  return entry.codes[0] ? entry.codes[0]->order() : nullptr;
}

bool WeightReader::has_groups(const GroupFormat& f) const {
  const WeightBinding& b = *entry.binding;
  if (f.bits == 0 || b.add_one || !is_cut_between(f.size) || !has_one_order() || (order() && cols != entry.cols))
    return false;
  for (std::size_t i = 0; i < b.sources.size(); ++i) {
    if (!(entry.codes[i] ? entry.codes[i]->fits(f) : groups_fit(b.sources[i].type, f))) return false;
  }
  return true;
}

OwnGroups WeightReader::own_groups() const {
  const auto& sources = entry.binding->sources;
  GroupFormat common;
  bool blocks = true;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const CodeMatrix* codes = entry.codes[i].get();
    if (codes == nullptr && format_of(sources[i].type).block_elements == 1) {
      const bool any = std::any_of(entry.codes.begin(), entry.codes.end(), [](const auto& c) { return c != nullptr; });
      return {{}, any ? "'" + sources[i].name + "', a part of it, is not compressed" : ""};
    }
    if (codes != nullptr && codes->groups().bits == 0) return {{}, codes->why_no_groups()};
    const GroupFormat own = codes == nullptr ? groups_of(sources[i].type) : codes->groups();
    common = i == 0 ? own : common_groups(common, own);
    blocks = blocks && codes == nullptr;
  }
  while (common.size > kGroup && !is_cut_between(common.size)) common.size /= 2;
  if (has_groups(common)) return {common};
  if (blocks) return {kWideGroups};
  common = {common.bits, true, 0, common.size};  // 8 bits with other zeros cannot be moved
  if (has_groups(common)) return {common};
  if (!is_cut_between(kGroup)) return {{}, "its " + std::to_string(cols) + " columns are not whole groups"};
  if (!has_one_order()) return {{}, "its parts sort their columns differently"};
  if (order()) return {{}, "its sorted columns cannot be shared by ranks"};
  return {{}, "its parts have no groups in common"};
}

void WeightReader::copy_groups(const GroupFormat& f, std::int64_t begin, std::int64_t end, std::uint8_t* codes,
                               float* scales, float* offsets) const {
  const std::int64_t groups = cols / f.size;
  for (Run run{}; begin < end; begin += run.n) {
    run = run_at(begin, end);
    if (run.source < 0) {
      std::fill_n(codes, run.n * cols, std::uint8_t{0});
      std::fill_n(scales, run.n * groups, 0.0f);
      if (offsets != nullptr) std::fill_n(offsets, run.n * groups, 0.0f);
    } else if (const auto& matrix = entry.codes[static_cast<std::size_t>(run.source)]) {
      matrix->read_groups(f, run.first, run.first + run.n, col_begin, cols, codes, scales, offsets);
    } else {
      const SourceTensor& t = entry.binding->sources[static_cast<std::size_t>(run.source)];
      for (std::int64_t r = 0; r < run.n; ++r)
        read_groups(t.type, f, stored_row(t, run.first + r), col_begin / kGroup, groups, codes + r * cols,
                    scales + r * groups, offsets == nullptr ? nullptr : offsets + r * groups);
    }
    codes += run.n * cols, scales += run.n * groups;
    if (offsets != nullptr) offsets += run.n * groups;
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

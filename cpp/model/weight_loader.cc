// Every transform but Transpose is a map of rows, applied one after the other:
//
//   row of this rank --shard--> canonical row --transform--> row of one source --interleave--> stored row
//
// so a matrix is read by looking each row up and dequantising the columns this rank holds.
#include "model/weight_loader.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>

#include "fastllm/error.h"
#include "model/checked.h"
#include "model/dequant.h"
#include "model/dequant_groups.h"

namespace fastllm {
namespace {

using Shape = std::vector<std::int64_t>;

std::string to_string(const Shape& shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return s + "]";
}

// A weight of this rank, checked and ready to be read.
struct Entry {
  const WeightBinding* binding = nullptr;
  const CanonicalWeight* weight = nullptr;
  AttnSpec attn;           // of the weight's layer; for QkvRows and QkvGrouped
  std::int64_t rows = 0;   // of the canonical whole
  std::int64_t cols = 0;   // 1 for vectors
  std::int64_t bytes = 0;  // of all sources
};

struct SourceRow {
  std::size_t source;
  std::int64_t row;
};

// The shapes the sources of a binding must have.
std::vector<Shape> source_shapes(const Entry& e) {
  const bool matrix = e.weight->shape.size() == 2;
  auto with_rows = [&](std::int64_t rows) { return matrix ? Shape{rows, e.cols} : Shape{rows}; };
  const std::int64_t head_dim = e.attn.head_dim;
  switch (e.binding->transform) {
    case WeightTransform::Copy:
      return {e.weight->shape};
    case WeightTransform::Transpose:
      if (matrix) return {{e.cols, e.rows}};
      break;
    case WeightTransform::QkvConcat:
      if (e.weight->axis == ShardAxis::QkvRows)
        return {with_rows(e.attn.heads * head_dim), with_rows(e.attn.kv_heads * head_dim),
                with_rows(e.attn.kv_heads * head_dim)};
      break;
    case WeightTransform::QkvGrouped:
      if (e.weight->axis == ShardAxis::QkvRows) return {e.weight->shape};
      break;
    case WeightTransform::GateUpConcat:
      if (e.weight->axis == ShardAxis::GateUpRows) return {with_rows(e.rows / 2), with_rows(e.rows / 2)};
      break;
  }
  throw LoadError("weight '" + e.weight->name + "': its transform does not apply to this kind of weight");
}

// Throws unless the tensor has this shape and enough bytes for it.
std::int64_t check_source(const Entry& e, const SourceTensor& t, const Shape& shape) {
  auto fail = [&](const std::string& what) {
    throw LoadError("weight '" + e.weight->name + "' from tensor '" + t.name + "': " + what);
  };
  if (static_cast<std::size_t>(t.type) > static_cast<std::size_t>(SourceType::Q6_K))
    fail("its element type is unknown");
  if (t.shape != shape) fail("its shape is " + to_string(t.shape) + ", the model needs " + to_string(shape));
  const SourceFormat& f = format_of(t.type);
  const std::int64_t row = shape.back();
  if (row % f.block_elements != 0)
    fail("its rows of " + std::to_string(row) + " elements are not whole blocks of " +
         std::to_string(f.block_elements) + " (" + f.name + ")");
  if (e.binding->transform == WeightTransform::Transpose && f.block_elements != 1)
    fail(std::string("a transposed tensor cannot be of type ") + f.name);
  const std::int64_t dims[] = {shape.size() == 2 ? shape[0] : 1, row / f.block_elements, f.block_bytes};
  const auto bytes = checked_product(dims);
  if (!bytes) fail("its shape " + to_string(shape) + " overflows");
  if (t.bytes < *bytes || t.data == nullptr)
    fail("it has " + std::to_string(t.data == nullptr ? 0 : t.bytes) + " bytes; shape " + to_string(shape) + " of " +
         f.name + " takes " + std::to_string(*bytes));
  if (t.interleaved_head_dim != 0) {
    if (t.interleaved_head_dim < 0 || t.interleaved_head_dim % 2 != 0 || shape[0] % t.interleaved_head_dim != 0)
      fail("its interleaved heads of " + std::to_string(t.interleaved_head_dim) + " rows do not divide its " +
           std::to_string(shape[0]) + " rows");
    if (e.binding->transform == WeightTransform::Transpose) fail("it is both transposed and interleaved");
  }
  return *bytes;
}

// Row of this rank -> canonical row; -1 for padding.
std::int64_t canonical_row(const Entry& e, int rank, int size, std::int64_t row) {
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
SourceRow source_row(const Entry& e, std::int64_t row) {
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

// What read() needs, by value, and the sources by pointer.
struct Reader {
  Entry entry;
  int rank = 0, size = 1;
  std::int64_t col_begin = 0, cols = 0;

  void operator()(std::int64_t begin, std::int64_t end, float* out) const {
    if (entry.binding->transform == WeightTransform::Transpose) {
      read_transposed(begin, end, out);
    } else {
      for (std::int64_t r = begin; r < end; ++r) read_row(r, out + (r - begin) * cols);
    }
    if (entry.binding->add_one) std::for_each(out, out + (end - begin) * cols, [](float& x) { x += 1.0f; });
  }

  void read_row(std::int64_t row, float* out) const {
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

  // Rows can be copied as they are: bf16, not transposed, nothing added.
  bool is_plain_bf16() const {
    const WeightBinding& b = *entry.binding;
    return b.transform != WeightTransform::Transpose && !b.add_one &&
           std::all_of(b.sources.begin(), b.sources.end(), [](const auto& t) { return t.type == SourceType::BF16; });
  }

  // Matrices only.
  void copy_bf16(std::int64_t begin, std::int64_t end, std::uint16_t* out) const {
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

  // This rank's columns are whole groups of every source.
  bool is_cut_between_groups() const { return col_begin % kGroup == 0 && cols % kGroup == 0; }

  bool has_groups(const GroupFormat& f) const {
    const WeightBinding& b = *entry.binding;
    return !b.add_one && is_cut_between_groups() &&
           std::all_of(b.sources.begin(), b.sources.end(), [&](const auto& t) { return groups_fit(t.type, f); });
  }

  // Matrices only.
  void copy_groups(const GroupFormat& f, std::int64_t begin, std::int64_t end, std::uint8_t* codes, float* scales,
                   float* offsets) const {
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

  // The checkpoint has a row for each of our columns; a run of our rows lies together there.
  void read_transposed(std::int64_t begin, std::int64_t end, float* out) const {
    const SourceTensor& t = entry.binding->sources[0];
    const std::int64_t width = t.shape[1] * format_of(t.type).block_bytes;
    const auto* data = static_cast<const std::byte*>(t.data);
    std::vector<float> line(static_cast<std::size_t>(end - begin));
    while (begin < end) {
      const auto first = canonical_row(entry, rank, size, begin);
      std::int64_t run = 1;
      while (begin + run < end && canonical_row(entry, rank, size, begin + run) == (first < 0 ? -1 : first + run))
        ++run;
      for (std::int64_t c = 0; c < cols; ++c) {
        if (first >= 0) dequantize(t.type, data + (col_begin + c) * width, first, run, line.data());
        for (std::int64_t r = 0; r < run; ++r) out[r * cols + c] = first < 0 ? 0.0f : line[static_cast<std::size_t>(r)];
      }
      begin += run;
      out += run * cols;
    }
  }
};

std::int64_t rank_rows(const Entry& e, int size) {
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

}  // namespace

struct WeightLoader::Impl {
  const ModelSource& source;
  int rank, size;
  std::vector<CanonicalWeight> weights;
  std::unordered_map<std::string, Entry> entries;
  std::int64_t total_bytes = 0;

  Impl(const ModelSource& s, int r, int n) : source(s), rank(r), size(n) {
    check_spec(source.spec);
    check_tensor_parallel(source.spec, size);
    weights = canonical_weights(source.spec);
    for (const auto& w : weights) {
      Entry e;
      e.weight = &w;
      e.attn = source.spec.layer(std::max(w.layer, 0)).attn;
      e.rows = w.shape[0];
      e.cols = w.shape.size() == 2 ? w.shape[1] : 1;
      entries.emplace(w.name, std::move(e));
    }
    for (const auto& b : source.weights) bind(b);
    for (const auto& w : weights)
      if (entries.at(w.name).binding == nullptr)
        throw LoadError("weight '" + w.name + "' of shape " + to_string(w.shape) + " is missing from the checkpoint");
  }

  void bind(const WeightBinding& b) {
    const auto it = entries.find(b.canonical);
    const std::string tensor = b.sources.empty() ? "" : " (tensor '" + b.sources[0].name + "')";
    if (it == entries.end()) throw LoadError("weight '" + b.canonical + "'" + tensor + " is not used by this model");
    Entry& e = it->second;
    if (e.binding != nullptr) throw LoadError("weight '" + b.canonical + "'" + tensor + " is given twice");
    e.binding = &b;
    const auto shapes = source_shapes(e);
    if (b.sources.size() != shapes.size())
      throw LoadError("weight '" + b.canonical + "' is made of " + std::to_string(shapes.size()) +
                      " tensors, the checkpoint gives " + std::to_string(b.sources.size()));
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      const auto bytes = check_source(e, b.sources[i], shapes[i]);
      if (__builtin_add_overflow(e.bytes, bytes, &e.bytes))
        throw LoadError("weight '" + b.canonical + "': the sizes of its tensors overflow");
    }
    if (__builtin_add_overflow(total_bytes, e.bytes, &total_bytes))
      throw LoadError("the sizes of all tensors overflow");
  }

  Reader reader(const std::string& canonical) const {
    const Entry& e = entries.at(canonical);
    const std::int64_t parts = e.weight->axis == ShardAxis::Columns ? size : 1;
    const std::int64_t cols = e.cols / parts;
    return {e, rank, size, parts == 1 ? 0 : rank * cols, cols};
  }
};

WeightLoader::WeightLoader(const ModelSource& source, int rank, int size)
    : impl_(std::make_unique<Impl>(source, rank, size)) {}
WeightLoader::~WeightLoader() = default;

int WeightLoader::rank() const { return impl_->rank; }
int WeightLoader::size() const { return impl_->size; }
const ModelSpec& WeightLoader::spec() const { return impl_->source.spec; }
std::int64_t WeightLoader::total_bytes() const { return impl_->total_bytes; }
std::int64_t WeightLoader::source_bytes(const std::string& canonical) const {
  return impl_->entries.at(canonical).bytes;
}

HostMatrix WeightLoader::matrix(const std::string& canonical, const GroupFormat& groups) const {
  Reader reader = impl_->reader(canonical);
  HostMatrix matrix{rank_rows(reader.entry, impl_->size), reader.cols, reader, {}};
  if (reader.is_plain_bf16())
    matrix.read_bf16 = [reader](auto begin, auto end, std::uint16_t* out) { reader.copy_bf16(begin, end, out); };
  matrix.groups = groups;
  if (groups.bits != 0 && reader.has_groups(groups)) {
    matrix.read_groups = [reader, groups](auto begin, auto end, std::uint8_t* codes, float* scales, float* offsets) {
      reader.copy_groups(groups, begin, end, codes, scales, offsets);
    };
  }
  return matrix;
}

GroupFormat WeightLoader::own_groups(const std::string& canonical) const {
  const Reader reader = impl_->reader(canonical);
  const auto& sources = reader.entry.binding->sources;
  GroupFormat common = groups_of(sources[0].type);
  for (const SourceTensor& t : sources) {
    if (format_of(t.type).block_elements == 1) return {};
    common = common_groups(common, groups_of(t.type));
  }
  return reader.has_groups(common) ? common : kWideGroups;
}

std::vector<float> WeightLoader::vector(const std::string& canonical) const {
  const Reader reader = impl_->reader(canonical);
  std::vector<float> out(static_cast<std::size_t>(rank_rows(reader.entry, impl_->size)));
  reader(0, static_cast<std::int64_t>(out.size()), out.data());
  return out;
}

}  // namespace fastllm

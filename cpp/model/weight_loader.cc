#include "model/weight_loader.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <utility>

#include "fastllm/error.h"
#include "model/checked.h"
#include "model/dequant.h"
#include "model/weight_reader.h"

namespace fastllm {
namespace {

using Shape = std::vector<std::int64_t>;

std::string to_string(const Shape& shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return s + "]";
}

// The shapes the sources of a binding must have.
std::vector<Shape> source_shapes(const WeightEntry& e) {
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

[[noreturn]] void fail_source(const WeightEntry& e, const SourceTensor& t, const std::string& what) {
  throw LoadError("weight '" + e.weight->name + "' from tensor '" + t.name + "': " + what);
}

// Throws unless the tensor has this shape and enough bytes for it.
std::int64_t check_source(const WeightEntry& e, const SourceTensor& t, const Shape& shape) {
  auto fail = [&](const std::string& what) { fail_source(e, t, what); };
  if (static_cast<std::size_t>(t.type) > static_cast<std::size_t>(SourceType::I64)) fail("its element type is unknown");
  if (is_integer(t.type)) fail(std::string("it is of type ") + format_of(t.type).name + " without scales");
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

// The codes of a tensor that has some.
std::shared_ptr<const CodeMatrix> code_matrix(const WeightEntry& e, const SourceTensor& t, const Shape& shape) {
  if (shape.size() != 2) fail_source(e, t, "only matrices can be packed");
  if (e.binding->transform == WeightTransform::Transpose) fail_source(e, t, "codes cannot be transposed");
  try {
    return std::make_shared<const CodeMatrix>(t, shape[0], shape[1]);
  } catch (const LoadError& error) {
    fail_source(e, t, error.what());
  }
}

}  // namespace

struct WeightLoader::Impl {
  const ModelSource& source;
  int rank, size;
  std::vector<CanonicalWeight> weights;
  std::unordered_map<std::string, WeightEntry> entries;
  std::int64_t total_bytes = 0;

  Impl(const ModelSource& s, int r, int n) : source(s), rank(r), size(n) {
    check_spec(source.spec);
    check_tensor_parallel(source.spec, size);
    weights = canonical_weights(source.spec);
    for (const auto& w : weights) {
      WeightEntry e;
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
    WeightEntry& e = it->second;
    if (e.binding != nullptr) throw LoadError("weight '" + b.canonical + "'" + tensor + " is given twice");
    e.binding = &b;
    const auto shapes = source_shapes(e);
    if (b.sources.size() != shapes.size())
      throw LoadError("weight '" + b.canonical + "' is made of " + std::to_string(shapes.size()) +
                      " tensors, the checkpoint gives " + std::to_string(b.sources.size()));
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      e.codes.push_back(b.sources[i].packing ? code_matrix(e, b.sources[i], shapes[i]) : nullptr);
      const auto bytes = e.codes[i] ? e.codes[i]->bytes() : check_source(e, b.sources[i], shapes[i]);
      if (__builtin_add_overflow(e.bytes, bytes, &e.bytes))
        throw LoadError("weight '" + b.canonical + "': the sizes of its tensors overflow");
    }
    if (__builtin_add_overflow(total_bytes, e.bytes, &total_bytes))
      throw LoadError("the sizes of all tensors overflow");
  }

  WeightReader reader(const std::string& canonical) const {
    const WeightEntry& e = entries.at(canonical);
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
  WeightReader reader = impl_->reader(canonical);
  HostMatrix matrix{rank_rows(reader.entry, impl_->size), reader.cols, reader, {}};
  if (reader.is_plain_bf16())
    matrix.read_bf16 = [reader](auto begin, auto end, std::uint16_t* out) { reader.copy_bf16(begin, end, out); };
  matrix.groups = groups;
  if (reader.has_groups(groups)) {
    matrix.order = reader.order();
    matrix.read_groups = [reader, groups](auto begin, auto end, std::uint8_t* codes, float* scales, float* offsets) {
      reader.copy_groups(groups, begin, end, codes, scales, offsets);
    };
  }
  return matrix;
}

OwnGroups WeightLoader::own_groups(const std::string& canonical) const { return impl_->reader(canonical).own_groups(); }

std::vector<float> WeightLoader::vector(const std::string& canonical) const {
  const WeightReader reader = impl_->reader(canonical);
  std::vector<float> out(static_cast<std::size_t>(rank_rows(reader.entry, impl_->size)));
  reader(0, static_cast<std::int64_t>(out.size()), out.data());
  return out;
}

}  // namespace fastllm

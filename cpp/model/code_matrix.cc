#include "model/code_matrix.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <numeric>

#include "fastllm/error.h"
#include "model/checked.h"
#include "model/dequant.h"
#include "model/dequant_blocks.h"
#include "tensor/dtype.h"

namespace fastllm {
namespace {

using Shape = std::vector<std::int64_t>;

// a >= 1
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a - 1) / b + 1; }

std::string to_string(const Shape& shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return s + "]";
}

// Bytes of the tensor; throws unless it is of one of these types, of this shape, and whole.
std::int64_t check(const char* what, const SourceTensor& t, std::initializer_list<SourceType> types,
                   const Shape& shape) {
  const auto fail = [&](const std::string& found) {
    std::string wanted;
    for (const SourceType type : types) wanted += (wanted.empty() ? "" : " or ") + std::string(format_of(type).name);
    throw LoadError(std::string("its ") + what + " '" + t.name + "' " + found + "; needed is shape " +
                    to_string(shape) + " of " + wanted);
  };
  if (t.data == nullptr) fail("are missing");
  if (std::find(types.begin(), types.end(), t.type) == types.end() || t.shape != shape)
    fail("have shape " + to_string(t.shape) + " of " + format_of(t.type).name);
  auto factors = shape;
  factors.push_back(format_of(t.type).block_bytes);
  const auto bytes = checked_product(factors);
  if (!bytes || t.bytes < *bytes) fail("have " + std::to_string(t.bytes) + " bytes");
  return *bytes;
}

// Code i of a word that starts at `p`.
int code_of(const std::byte* p, std::int64_t i, int bits) {
  return static_cast<int>(load32(p) >> (i * bits)) & ((1 << bits) - 1);
}

// Where AWQ's words have element i.
std::int64_t awq_place(std::int64_t i) { return i % 2 * 4 + i / 2; }

}  // namespace

CodeMatrix::CodeMatrix(const SourceTensor& codes, std::int64_t rows, std::int64_t cols) : packing_(*codes.packing) {
  codes_ = {packing_.layout,
            packing_.bits,
            codes.type == SourceType::I8,
            static_cast<const std::byte*>(codes.data),
            rows,
            cols};
  check_tensors(codes);
  read_group_of();
  choose_groups();
}

void CodeMatrix::check_tensors(const SourceTensor& codes) {
  const Packing& p = packing_;
  const std::int64_t out = codes_.out, in = codes_.in;
  const auto fail = [&](const std::string& what) { throw LoadError("its codes '" + codes.name + "' " + what); };
  if ((p.bits != 4 && p.bits != 8) || (p.layout == CodeLayout::Awq && p.bits != 4))
    fail("have " + std::to_string(p.bits) + " bits, but 4" + (p.layout == CodeLayout::Awq ? "" : " and 8") +
         " are read");
  if (p.group < 0) fail("have groups of " + std::to_string(p.group) + " columns");
  if (codes.interleaved_head_dim != 0) fail("have interleaved rows");
  group_ = p.group == 0 ? in : std::min(p.group, in);
  num_groups_ = ceil_div(in, group_);

  const std::int64_t per_word = 32 / p.bits;
  const bool by_rows = p.layout == CodeLayout::Rows;
  const auto check_whole_words = [&](std::int64_t n, const char* of) {
    if (n % per_word != 0)
      fail("come in words of " + std::to_string(per_word) + ", which " + std::to_string(n) + " " + of + " do not fill");
  };
  if (!by_rows) check_whole_words(out, "outputs");
  if (p.layout == CodeLayout::Gptq) check_whole_words(in, "inputs");
  const Shape shape = p.layout == CodeLayout::Gptq  ? Shape{in / per_word, out}
                      : p.layout == CodeLayout::Awq ? Shape{in, out / per_word}
                      : codes_.bytes                ? Shape{out, in}
                                                    : Shape{out, ceil_div(in, per_word)};
  bytes_ = by_rows ? check("codes", codes, {SourceType::I32, SourceType::I8}, shape)
                   : check("codes", codes, {SourceType::I32}, shape);
  bytes_ += check("scales", p.scales, {SourceType::F16, SourceType::BF16, SourceType::F32},
                  by_rows ? Shape{out, num_groups_} : Shape{num_groups_, out});
  if (p.zeros.data != nullptr && by_rows && p.zeros.type == SourceType::I8) {
    bytes_ += check("zeros", p.zeros, {SourceType::I8}, {out, num_groups_});
  } else if (p.zeros.data != nullptr) {
    bytes_ += check("zeros", p.zeros, {SourceType::I32},
                    by_rows ? Shape{ceil_div(out, per_word), num_groups_} : Shape{num_groups_, out / per_word});
  }
  if (p.group_of.data != nullptr) bytes_ += check("groups", p.group_of, {SourceType::I32, SourceType::I64}, {in});
}

void CodeMatrix::read_group_of() {
  const SourceTensor& t = packing_.group_of;
  if (t.data == nullptr) return;
  const auto* data = static_cast<const std::byte*>(t.data);
  bool as_they_are = true;
  group_of_.resize(static_cast<std::size_t>(codes_.in));
  for (std::int64_t c = 0; c < codes_.in; ++c) {
    std::int64_t group = 0;
    if (t.type == SourceType::I64) {
      std::memcpy(&group, data + c * 8, sizeof group);
    } else {
      group = static_cast<std::int32_t>(load32(data + c * 4));
    }
    if (group < 0 || group >= num_groups_)
      throw LoadError("its groups '" + t.name + "' put column " + std::to_string(c) + " into group " +
                      std::to_string(group) + ", but there are " + std::to_string(num_groups_));
    group_of_[static_cast<std::size_t>(c)] = static_cast<std::int32_t>(group);
    as_they_are = as_they_are && group == c / group_;
  }
  if (as_they_are) group_of_.clear();
}

void CodeMatrix::choose_groups() {
  std::vector<std::int32_t> order(group_of_.size());
  if (!order.empty()) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](auto a, auto b) { return group_of(a) < group_of(b); });
    for (std::int64_t j = 0; j < codes_.in; ++j) {
      if (group_of(order[static_cast<std::size_t>(j)]) == j / group_) continue;
      why_no_groups_ = "its groups have different sizes";
      return;
    }
    order_ = std::make_shared<const std::vector<std::int32_t>>(std::move(order));
  }
  int size = 128;
  while (size >= kGroup && num_groups_ > 1 && group_ % size != 0) size /= 2;
  if (size < kGroup) {
    why_no_groups_ =
        "its groups of " + std::to_string(group_) + " columns are no multiple of " + std::to_string(kGroup);
  } else if (!halves_hold_scales()) {
    why_no_groups_ = "its scales are too large or too small for fp16";
  } else {
    const std::optional<int> zero = common_zero();
    groups_ = {packing_.bits, !zero, zero.value_or(0), size};
  }
}

std::optional<int> CodeMatrix::common_zero() const {
  const int first = zero(0, 0);
  if (first < 0 || first >= 1 << codes_.bits) return std::nullopt;
  if (packing_.zeros.data == nullptr) return first;
  for (std::int64_t r = 0; r < codes_.out; ++r)
    for (std::int64_t g = 0; g < num_groups_; ++g)
      if (zero(r, g) != first) return std::nullopt;
  return first;
}

bool CodeMatrix::halves_hold_scales() const {
  constexpr float kTolerance = 0x1p-10f, kLargest = 65504.0f / 256;  // offsets are up to 256 times a scale
  const auto* data = static_cast<const std::byte*>(packing_.scales.data);
  std::vector<float> line(static_cast<std::size_t>(codes_.out));
  for (std::int64_t g = 0; g < num_groups_; ++g) {
    fastllm::dequantize(packing_.scales.type, data, g * codes_.out, codes_.out, line.data());
    for (const float s : line)
      if (!(std::abs(s) <= kLargest && std::abs(to_float(to_f16(s)) - s) <= kTolerance * std::abs(s))) return false;
  }
  return true;
}

float CodeMatrix::scale(std::int64_t row, std::int64_t group) const {
  const std::int64_t at = codes_.layout == CodeLayout::Rows ? row * num_groups_ + group : group * codes_.out + row;
  float x = 0;
  fastllm::dequantize(packing_.scales.type, static_cast<const std::byte*>(packing_.scales.data), at, 1, &x);
  return x;
}

int CodeMatrix::zero(std::int64_t row, std::int64_t group) const {
  const int half = 1 << (codes_.bits - 1);
  const auto* data = static_cast<const std::byte*>(packing_.zeros.data);
  if (data == nullptr) return half;
  const bool by_rows = codes_.layout == CodeLayout::Rows;
  if (packing_.zeros.type == SourceType::I8)
    return static_cast<std::int8_t>(std::to_integer<std::uint8_t>(data[row * num_groups_ + group])) + half;
  const std::int64_t per_word = 32 / codes_.bits, word = row / per_word, in_word = row % per_word;
  const std::int64_t at = by_rows ? word * num_groups_ + group : group * (codes_.out / per_word) + word;
  const std::int64_t place = codes_.layout == CodeLayout::Awq ? awq_place(in_word) : in_word;
  return code_of(data + 4 * at, place, codes_.bits) + (packing_.zeros_less_one ? 1 : 0);
}

std::int64_t CodeMatrix::group_of(std::int64_t col) const {
  return group_of_.empty() ? col / group_ : group_of_[static_cast<std::size_t>(col)];
}

std::int64_t CodeMatrix::run_end(std::int64_t col, std::int64_t end) const {
  const std::int64_t group = group_of(col);
  if (group_of_.empty()) return std::min((group + 1) * group_, end);
  while (col < end && group_of(col) == group) ++col;
  return col;
}

bool CodeMatrix::fits(const GroupFormat& f) const {
  const GroupFormat& own = groups_;
  if (own.bits == 0 || own.bits > f.bits || f.size > own.size) return false;
  if (f.offsets) return true;
  const int shift = f.zero - own.zero;
  return !own.offsets && shift >= 0 && (1 << own.bits) + shift <= 1 << f.bits;
}

void CodeMatrix::dequantize(std::int64_t row_begin, std::int64_t row_end, std::int64_t col_begin, std::int64_t cols,
                            float* out) const {
  const std::int64_t col_end = col_begin + cols;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>((row_end - row_begin) * cols));
  unpack_codes(codes_, row_begin, row_end, col_begin, col_end, codes.data());
  const std::uint8_t* code = codes.data();
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    for (std::int64_t c = col_begin; c < col_end;) {
      const std::int64_t end = run_end(c, col_end);
      const float step = scale(r, group_of(c));
      const int origin = zero(r, group_of(c));
      for (; c < end; ++c) *out++ = step * static_cast<float>(*code++ - origin);
    }
  }
}

void CodeMatrix::read_groups(const GroupFormat& f, std::int64_t row_begin, std::int64_t row_end, std::int64_t col_begin,
                             std::int64_t cols, std::uint8_t* codes, float* scales, float* offsets) const {
  assert(fits(f) && col_begin % f.size == 0 && cols % f.size == 0 && (!order_ || cols == codes_.in));
  unpack_codes(codes_, row_begin, row_end, col_begin, col_begin + cols, codes);
  const int shift = f.offsets ? 0 : f.zero - groups_.zero;
  std::vector<std::uint8_t> unsorted;
  for (std::int64_t r = row_begin; r < row_end; ++r, codes += cols) {
    if (order_) {
      unsorted.assign(codes, codes + cols);
      std::transform(order_->begin(), order_->end(), codes,
                     [&](std::int32_t c) { return unsorted[static_cast<std::size_t>(c)]; });
    }
    if (shift != 0)
      std::transform(codes, codes + cols, codes, [&](int code) { return static_cast<std::uint8_t>(code + shift); });
    // Sorted columns have their groups side by side.
    for (std::int64_t c = col_begin; c < col_begin + cols; c += f.size) {
      const std::int64_t group = c / group_;
      *scales = scale(r, group);
      if (offsets != nullptr) *offsets++ = -*scales * static_cast<float>(zero(r, group));
      ++scales;
    }
  }
}

}  // namespace fastllm

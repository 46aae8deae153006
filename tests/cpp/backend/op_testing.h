// What the op tests share: random tensors, poisoned outputs, caches, one backend per instruction set.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/isa.h"
#include "test_seed.h"

namespace fastllm::test {

class Random {
 public:
  Random() : engine_(test_seed()) {}
  float normal(float sigma = 1.0f) { return std::normal_distribution<float>(0.0f, sigma)(engine_); }
  int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(engine_); }
  std::uint64_t bits() { return engine_(); }

 private:
  std::mt19937_64 engine_;
};

// Storage of one tensor, in F32 or BF16, every element NaN until set.
class Array {
 public:
  Array(DType dtype, std::int64_t rows, std::int64_t cols)
      : bytes_(static_cast<std::size_t>(rows * cols) * size_of(dtype), std::byte{0xff}),
        tensor_(bytes_.data(), dtype, {rows, cols}) {}
  Array(const Array& o) : bytes_(o.bytes_), tensor_(o.tensor_) { tensor_.data = bytes_.data(); }

  const Tensor& tensor() const { return tensor_; }
  std::int64_t rows() const { return tensor_.rows(); }
  std::int64_t cols() const { return tensor_.cols(); }
  float get(std::int64_t r, std::int64_t c) const {
    const auto i = r * cols() + c;
    return tensor_.dtype == DType::F32 ? tensor_.ptr<float>()[i] : to_float(tensor_.ptr<bf16>()[i]);
  }
  void set(std::int64_t r, std::int64_t c, float v) {
    const auto i = r * cols() + c;
    if (tensor_.dtype == DType::F32) {
      tensor_.ptr<float>()[i] = v;
    } else {
      tensor_.ptr<bf16>()[i] = to_bf16(v);
    }
  }
  Array& fill(Random& random, float sigma = 1.0f) {
    for (std::int64_t r = 0; r < rows(); ++r)
      for (std::int64_t c = 0; c < cols(); ++c) set(r, c, random.normal(sigma));
    return *this;
  }
  bool same_row(std::int64_t r, const Array& other, std::int64_t other_row) const {
    const std::size_t n = static_cast<std::size_t>(cols()) * size_of(tensor_.dtype);
    return std::memcmp(tensor_.at(r), other.tensor_.at(other_row), n) == 0;
  }

 private:
  std::vector<std::byte> bytes_;
  Tensor tensor_;
};

inline HostMatrix host_matrix(const Array& a) {
  return {a.rows(),
          a.cols(),
          [&a](std::int64_t begin, std::int64_t end, float* out) {
            for (std::int64_t r = begin; r < end; ++r)
              for (std::int64_t c = 0; c < a.cols(); ++c) *out++ = a.get(r, c);
          },
          {}};
}

// Room for `slots` rows whose tables have up to 256 blocks.
inline void init_steps(Backend& backend, int block_size, int vocab = 1, int slots = 8, int in_flight = 1) {
  StepLimits limits;
  limits.max_tokens = 4096, limits.max_slots = slots, limits.max_logit_rows = slots, limits.table_width = 256;
  limits.block_size = block_size, limits.vocab = vocab, limits.in_flight = in_flight;
  backend.init_steps(limits);
}

inline std::vector<TableSet> table_of(SlotId slot, std::span<const BlockId> blocks) {
  std::vector<TableSet> sets;
  for (const BlockId b : blocks) sets.push_back({slot, static_cast<std::int32_t>(sets.size()), b});
  return sets;
}

// Whether the backend keeps keys and values in pairs, see backend/cpu/kernels.h.
inline bool kv_in_pairs(const Backend& backend, const KvView& kv, DType activations) {
  const auto* cpu = dynamic_cast<const cpu::CpuBackend*>(&backend);
  return cpu && cpu->kv_in_pairs(kv, activations);
}

// One head of one position of a layer's cache: its keys, or its values.
struct KvSlot {
  KvSlot(const KvView& kv, BlockId block, bool is_v, int head, int slot, bool in_pairs = false)
      : dtype(kv.dtype),
        element(static_cast<std::byte*>(kv.base) + (static_cast<std::int64_t>(index(block)) * kv.block_stride +
                                                    is_v * kv.kv_stride + head * kv.head_stride) *
                                                       static_cast<std::int64_t>(size_of(dtype))),
        scale(element + kv.block_size * kv.head_dim + slot * 4),
        dim(kv.head_dim) {
    if (in_pairs) {
      next_dim = is_v ? 2 : 1, next_pair = is_v ? 4 : 32;
      element += 2 * (is_v ? slot / 2 * 2 * dim + slot % 2 : slot / 16 * 16 * dim + slot % 16 * 2);
    } else {
      element += slot * dim * static_cast<int>(size_of(dtype));
    }
  }
  int at(int d) const { return d / 2 * next_pair + d % 2 * next_dim; }  // elements from the first
  // of an int8 cache, else 1
  float get_scale() const {
    float s = 1.0f;
    if (dtype == DType::I8) std::memcpy(&s, scale, sizeof s);
    return s;
  }
  float get(int d) const {
    switch (dtype) {
      case DType::BF16:
        return to_float(reinterpret_cast<const bf16*>(element)[at(d)]);
      case DType::F16:
        return to_float(reinterpret_cast<const f16*>(element)[d]);
      case DType::I8:
        return get_scale() * static_cast<float>(reinterpret_cast<const std::int8_t*>(element)[d]);
      default:
        return reinterpret_cast<const float*>(element)[d];
    }
  }
  void set(std::span<const float> x) {
    float most = 0;
    for (const float v : x) most = std::max(most, std::abs(v));
    const float step = most / 127;
    if (dtype == DType::I8) std::memcpy(scale, &step, sizeof step);
    for (std::size_t d = 0; d < x.size(); ++d) {
      if (dtype == DType::BF16) reinterpret_cast<bf16*>(element)[at(static_cast<int>(d))] = to_bf16(x[d]);
      if (dtype == DType::F16) reinterpret_cast<f16*>(element)[d] = to_f16(x[d]);
      if (dtype == DType::F32) reinterpret_cast<float*>(element)[d] = x[d];
      if (dtype == DType::I8)
        reinterpret_cast<std::int8_t*>(element)[d] = static_cast<std::int8_t>(std::lround(x[d] / step));
    }
  }

  DType dtype;
  std::byte* element;  // the first of the slot
  std::byte* scale;    // of an int8 cache
  int dim;
  int next_dim = 1, next_pair = 2;  // elements from a dim to the next, and from one pair of dims to the next
};

// A step of these rows that samples nothing. ids: zeros when empty.
inline Step& begin_step(Backend& backend, std::span<const StepRow> rows, std::span<const TableSet> tables = {},
                        std::vector<TokenId> ids = {}) {
  std::size_t tokens = 0;
  for (const StepRow& row : rows) tokens += static_cast<std::size_t>(row.num_tokens);
  ids.resize(tokens, 0);
  StepInput input;
  input.table_sets = tables;
  input.tokens = ids;
  input.rows = rows;
  return backend.begin_step(input);
}

// A step of decode rows, row i in slot i, that samples as `rows` say.
inline Step& begin_sampling(Backend& backend, std::vector<SampleRow> rows) {
  std::vector<StepRow> step_rows;
  std::vector<std::int32_t> last;
  for (SampleRow& row : rows) {
    const auto i = static_cast<std::int32_t>(last.size());
    row.slot = SlotId{i};
    step_rows.push_back({i, 1, 3, row.slot, false});
    last.push_back(i);
  }
  const std::vector<TokenId> ids(rows.size(), 0);
  StepInput input;
  input.tokens = ids;
  input.rows = step_rows;
  input.num_decode_rows = static_cast<std::int32_t>(rows.size());
  input.logit_tokens = last;
  input.sampling = rows;
  return backend.begin_step(input);
}

inline StepOutput finish(Backend& backend, Step& step) {
  backend.end_step(step);
  StepOutput out;
  backend.wait_step(step, out);
  return out;
}

// |got - want| <= tolerance * (1 + |want|); false for NaN.
inline bool close(float got, double want, double tolerance) {
  return std::abs(static_cast<double>(got) - want) <= tolerance * (1.0 + std::abs(want));
}

inline float round_to(DType t, float x) { return t == DType::BF16 ? to_float(to_bf16(x)) : x; }

// One unit in the last place of what was stored, with room for sums in another order.
inline double tolerance_of(DType t) { return t == DType::BF16 ? 1.0 / 128 : 2e-5; }

// Parameter: the instruction set. Levels the machine lacks are skipped with a reason.
class OpTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    test_seed();
    for (const auto& name : cpu::available_isas()) {
      if (name == GetParam()) backend = make_cpu_backend(2, name);
    }
    if (!backend) GTEST_SKIP() << "this machine or build has no " << GetParam();
  }
  std::unique_ptr<Backend> backend;
  Random random;
};

inline std::string isa_name(const testing::TestParamInfo<const char*>& info) { return info.param; }

#define FASTLLM_TEST_ALL_ISAS(Suite) \
  INSTANTIATE_TEST_SUITE_P(Cpu, Suite, testing::Values("base", "avx2", "avx512", "avx512_bf16", "amx"), isa_name)

}  // namespace fastllm::test

// A step of decode and prefill rows over the sequences of a PagedCache, as the attention launchers take it.
#pragma once

#include <vector>

#include "attention/attention.h"
#include "attention_oracle.h"

namespace fastllm::test {

class AttentionStep {
 public:
  // rows: their tokens follow one another. q: random, with rows longer than its heads, as in a joint q, k, v matrix.
  AttentionStep(const PagedCache& cache, std::vector<cuda::DeviceRow> rows, int num_decode_rows, Random& random,
                float sigma = 1)
      : cache_(cache),
        shape_(cache.shape()),
        rows(std::move(rows)),
        num_decode_rows_(num_decode_rows),
        num_tokens(tokens_of(this->rows)),
        q(Array(shape_.dtype, num_tokens, (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim).fill(random, sigma)),
        device_q_(q),
        device_rows_(this->rows),
        device_slopes_(shape_.slopes()),
        out_(shape_.dtype, num_tokens + kGuardRows, shape_.heads * shape_.head_dim) {
    std::vector<std::int32_t> positions(static_cast<std::size_t>(num_tokens), 0), slots(positions.size(), -1);
    for (const auto& row : this->rows) {
      if (row.slot < 0) continue;
      for (int i = 0; i < row.num_tokens; ++i) {
        positions[static_cast<std::size_t>(row.token_begin + i)] = row.first_pos + i;
        slots[static_cast<std::size_t>(row.token_begin + i)] = row.slot;
      }
    }
    device_positions_.emplace_back(positions);
    device_positions_.emplace_back(slots);
  }

  cuda::StepView view() const {
    cuda::StepView v;
    v.positions = device_positions_[0].get();
    v.token_slot = device_positions_[1].get();
    v.rows = device_rows_.get();
    v.tables = cache_.device_tables();
    v.table_width = cache_.table_width();
    v.num_tokens = num_tokens;
    v.num_rows = static_cast<int>(rows.size());
    v.num_decode_rows = num_decode_rows_;
    return v;
  }
  cuda::AttentionCall call() const {
    cuda::AttentionCall c;
    c.out = out_.data();
    c.q = device_q_.data();
    c.ldq = q.cols();
    c.dtype = shape_.dtype;
    c.kv = cache_.device_view();
    c.args = shape_.args();
    c.alibi_slopes = shape_.alibi ? device_slopes_.get() : nullptr;
    return c;
  }
  // The tokens' results; fails if anything after them was written.
  Array result() const {
    const Array all = out_.download();
    const Array poison(shape_.dtype, 1, all.cols());
    for (int i = 0; i < kGuardRows; ++i) {
      if (!all.same_row(num_tokens + i, poison, 0)) ADD_FAILURE() << "row " << i << " after the output was written";
    }
    Array got(shape_.dtype, num_tokens, all.cols());
    std::memcpy(got.tensor().data, all.tensor().data, got.tensor().bytes());
    return got;
  }
  // Empty, or what is wrong.
  std::string difference(const Array& got, double tolerance) const {
    return first_difference(got, attention_oracle(cache_, q, rows), shape_.head_dim, tolerance);
  }

 private:
  static constexpr int kGuardRows = 2;
  const PagedCache& cache_;
  AttentionShape shape_;

 public:
  const std::vector<cuda::DeviceRow> rows;

 private:
  int num_decode_rows_;

 public:
  const int num_tokens;
  const Array q;

 private:
  DeviceMatrix device_q_;
  DeviceArray<cuda::DeviceRow> device_rows_;
  DeviceArray<float> device_slopes_;
  DeviceMatrix out_;
  std::vector<DeviceArray<std::int32_t>> device_positions_;  // and slots

  static int tokens_of(const std::vector<cuda::DeviceRow>& rows) {
    int n = 0;
    for (const auto& row : rows) n = std::max(n, row.token_begin + row.num_tokens);
    return n;
  }
};

}  // namespace fastllm::test

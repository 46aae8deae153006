// A non-owning view of up to four dimensions. Strides are in elements; the last dimension is contiguous unless an op
// says otherwise. Copying a Tensor copies the view.
#pragma once

#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "tensor/dtype.h"

namespace fastllm {

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::F32;
  int rank = 0;
  std::array<std::int64_t, 4> shape{};   // elements
  std::array<std::int64_t, 4> stride{};  // elements

  Tensor() = default;
  Tensor(void* p, DType t, std::initializer_list<std::int64_t> dims)
      : data(p), dtype(t), rank(static_cast<int>(dims.size())) {
    assert(dims.size() <= 4);
    std::size_t i = 0;
    for (auto d : dims) shape[i++] = d;
    std::int64_t s = 1;
    for (int k = rank - 1; k >= 0; --k) {
      stride[static_cast<std::size_t>(k)] = s;
      s *= shape[static_cast<std::size_t>(k)];
    }
  }

  std::int64_t rows() const { return shape[0]; }
  std::int64_t cols() const { return shape[1]; }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int k = 0; k < rank; ++k) n *= shape[static_cast<std::size_t>(k)];
    return rank == 0 ? 0 : n;
  }
  std::size_t bytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype); }

  template <class T>
  T* ptr() const {
    assert(sizeof(T) == size_of(dtype));
    return static_cast<T*>(data);
  }
  void* at(std::int64_t row) const {
    return static_cast<std::byte*>(data) + static_cast<std::size_t>(row * stride[0]) * size_of(dtype);
  }
  // Rows [begin, begin + n) of a tensor of any rank.
  Tensor slice(std::int64_t begin, std::int64_t n) const {
    assert(begin >= 0 && n >= 0 && begin + n <= shape[0]);
    Tensor t = *this;
    t.data = at(begin);
    t.shape[0] = n;
    return t;
  }
  // Columns [begin, begin + n) of a matrix; the row stride stays.
  Tensor columns(std::int64_t begin, std::int64_t n) const {
    assert(rank == 2 && begin >= 0 && n >= 0 && begin + n <= shape[1]);
    Tensor t = *this;
    t.data = static_cast<std::byte*>(data) + static_cast<std::size_t>(begin) * size_of(dtype);
    t.shape[1] = n;
    return t;
  }
};

}  // namespace fastllm

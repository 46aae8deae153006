// Pinned memory for the odd things the host tells kernels in the middle of a step: rows to gather, masks, requests.
//
//   segment 0 | segment 1 | segment 2 | segment 3
//                  ^ filled from its start; an event is recorded when it is left, and waited for when it is entered
//                    again, a lap later, so in practice nobody waits
#pragma once

#include <array>
#include <cstring>
#include <span>

#include "memory.h"

namespace fastllm::cuda {

// One thread, one stream.
class Staging {
 public:
  explicit Staging(cudaStream_t stream) : stream_(stream) {}

  // Memory, 16-byte aligned, for work that is enqueued before the next take(). More than a segment at once makes all
  // segments larger, which waits for the stream.
  std::byte* take(std::size_t bytes);

  template <class T>
  T* put(std::span<const T> values) {
    std::byte* memory = take(values.size_bytes());
    if (!values.empty()) std::memcpy(memory, values.data(), values.size_bytes());
    return reinterpret_cast<T*>(memory);
  }

 private:
  struct Segment {
    std::unique_ptr<Buffer> memory;
    Event left;
    bool used = false;
  };

  void grow(std::size_t bytes);

  cudaStream_t stream_;
  std::array<Segment, 4> segments_;
  std::size_t segment_bytes_ = 0;
  std::size_t current_ = 0, used_ = 0;  // used_: bytes of the current segment
};

}  // namespace fastllm::cuda

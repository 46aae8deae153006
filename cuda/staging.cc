#include "staging.h"

#include <algorithm>
#include <bit>

namespace fastllm::cuda {

std::byte* Staging::take(std::size_t bytes) {
  bytes = (bytes + 15) / 16 * 16;
  if (bytes > segment_bytes_) grow(bytes);
  if (used_ + bytes > segment_bytes_) {
    segments_[current_].left.record(stream_);
    segments_[current_].used = true;
    current_ = (current_ + 1) % segments_.size();
    if (segments_[current_].used) segments_[current_].left.wait();
    used_ = 0;
  }
  std::byte* memory = data_as<std::byte>(*segments_[current_].memory) + used_;
  used_ += bytes;
  return memory;
}

void Staging::grow(std::size_t bytes) {
  check(cudaStreamSynchronize(stream_), "the work on the GPU");
  segment_bytes_ = std::max(std::bit_ceil(bytes), std::size_t{1} << 18);
  for (Segment& s : segments_) {
    s.memory = allocate_pinned(segment_bytes_);
    s.used = false;
  }
  current_ = used_ = 0;
}

}  // namespace fastllm::cuda

// Recorded decode steps, one executable graph per padded size.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <span>
#include <vector>

namespace fastllm::cuda {

// 1, 2, 4, then by 8 to 256, then by 32; the last is `max_rows`.
std::vector<int> decode_graph_sizes(int max_rows);

// Launching thread only.
class GraphCache {
 public:
  GraphCache() = default;
  ~GraphCache();
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  // Forgets all recordings.
  void reset(std::vector<int> sizes);
  std::span<const int> sizes() const { return sizes_; }  // ascending
  bool has_size(int size) const { return find(size) < sizes_.size(); }
  // False when nothing was recorded for the size.
  bool launch(int size, cudaStream_t stream);
  // Records what `body` enqueues on the stream; nothing of it runs.
  void record(int size, cudaStream_t stream, const std::function<void()>& body);

 private:
  std::size_t find(int size) const;  // sizes_.size(): not among them

  std::vector<int> sizes_;
  std::vector<cudaGraphExec_t> graphs_;  // of sizes_; null: not recorded
};

}  // namespace fastllm::cuda

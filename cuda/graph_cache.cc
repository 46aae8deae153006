#include "graph_cache.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "check.h"

namespace fastllm::cuda {
namespace {

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

}  // namespace

std::vector<int> decode_graph_sizes(int max_rows) {
  std::vector<int> sizes;
  for (int n = 1; n < max_rows; n += n < 8 ? n : n < 256 ? 8 : 32) sizes.push_back(n);
  if (max_rows > 0) sizes.push_back(max_rows);
  return sizes;
}

GraphCache::~GraphCache() { reset({}); }

void GraphCache::reset(std::vector<int> sizes) {
  for (cudaGraphExec_t graph : graphs_)
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  sizes_ = std::move(sizes);
  graphs_.assign(sizes_.size(), nullptr);
}

std::size_t GraphCache::find(int size) const {
  const auto at = std::lower_bound(sizes_.begin(), sizes_.end(), size);
  return at != sizes_.end() && *at == size ? static_cast<std::size_t>(at - sizes_.begin()) : sizes_.size();
}

bool GraphCache::launch(int size, cudaStream_t stream) {
  const std::size_t i = find(size);
  if (i == sizes_.size() || graphs_[i] == nullptr) return false;
  check(cudaGraphLaunch(graphs_[i], stream), "launching a graph");
  return true;
}

void GraphCache::record(int size, cudaStream_t stream, const std::function<void()>& body) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning to record a graph");
  cudaGraph_t recorded = nullptr;
  try {
    body();
  } catch (...) {  // the stream must leave capture mode whatever happened
    cudaStreamEndCapture(stream, &recorded);
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream, &recorded), "recording a graph");
  const Graph graph(recorded);
  cudaGraphExec_t& executable = graphs_.at(find(size));
  check(cudaGraphInstantiate(&executable, graph.get(), 0), "preparing a graph");
  check(cudaGraphUpload(executable, stream), "uploading a graph");
}

}  // namespace fastllm::cuda

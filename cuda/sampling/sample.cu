// sample(): which stages run, and where their results lie in the workspace.
#include <algorithm>

#include "sampling/sampling.h"
#include "sampling/stages.h"

namespace fastllm::cuda {
namespace {

// Entries of [rows, parts] at most for this many rows: rows * parts stays below 4 * 528 unless there is one part.
std::size_t max_row_parts(int rows) { return std::max<std::size_t>(static_cast<std::size_t>(rows), 4 * 528); }

// Hands out the workspace front to back, in pieces of whole cache lines.
class Pieces {
 public:
  explicit Pieces(void* memory) : begin_(reinterpret_cast<std::uintptr_t>(memory)) {}

  template <class T>
  T* take(std::size_t n) {
    const std::uintptr_t piece = begin_ + used_;
    used_ += (n * sizeof(T) + 127) / 128 * 128;
    return reinterpret_cast<T*>(piece);
  }
  std::size_t used() const { return used_; }

 private:
  std::uintptr_t begin_;
  std::size_t used_ = 0;
};

void lay_out(Pieces& pieces, int rows, SampleStages& s) {
  const auto n = static_cast<std::size_t>(rows);
  s.best = pieces.take<std::uint64_t>(max_row_parts(rows));
  s.draw = pieces.take<std::uint64_t>(max_row_parts(rows));
  s.list = pieces.take<std::uint64_t>(n * kListCapacity);
  s.mass = pieces.take<std::uint64_t>(n);
  s.bins = pieces.take<std::uint64_t>(n * kBins);
  s.above = pieces.take<std::uint64_t>(n);
  s.group = pieces.take<std::uint32_t>(n * kGroups);
  s.list_key = pieces.take<std::uint32_t>(n);
  s.listed = pieces.take<std::uint32_t>(n);
  s.edge_listed = pieces.take<std::uint32_t>(n);
  s.edge = pieces.take<std::int32_t>(n);
  s.bins_per_unit = pieces.take<float>(n);
}

}  // namespace

std::size_t sample_workspace_bytes(int max_rows, int /*vocab*/) {
  Pieces pieces(nullptr);
  SampleStages stages{};
  lay_out(pieces, max_rows, stages);
  return pieces.used();
}

void sample(const Logits& logits, const SampleCall& call, cudaStream_t stream) {
  if (logits.rows == 0) return;
  SampleStages stages{};
  stages.logits = logits;
  stages.rows = call.rows;
  stages.parts = parts_of_rows(logits.rows);
  Pieces pieces(call.workspace);
  lay_out(pieces, logits.rows, stages);
  scan(stages, call.all_greedy, stream);
  if (call.any_filter && !call.all_greedy) {
    collect(stages, stream);
    nucleus(stages, stream);
  }
  choose(stages, call, stream);
}

}  // namespace fastllm::cuda

// Turns what a host listed (WeightBinding) into this rank's weights: matrices that are converted, transformed and
// sliced row by row while the backend packs them, and small vectors. Everything is checked before anything is read.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "fastllm/weights.h"
#include "model/canonical.h"
#include "model/dequant_groups.h"

namespace fastllm {

class WeightLoader {
 public:
  // Throws LoadError naming the tensor when one is missing, misshapen, too short or not used by the spec;
  // InvalidArgument when the model does not divide over `size` ranks. `source` must outlive the loader.
  WeightLoader(const ModelSource& source, int rank, int size);
  ~WeightLoader();
  WeightLoader(const WeightLoader&) = delete;
  WeightLoader& operator=(const WeightLoader&) = delete;

  int rank() const;
  int size() const;
  const ModelSpec& spec() const;

  // This rank's part of a 2-D weight, to be kept as `groups` says. Valid while the loader and the checkpoint are.
  HostMatrix matrix(const std::string& canonical, const GroupFormat& groups = {}) const;
  // The groups that keep what a compressed checkpoint has: its own codes where all sources of the weight and this
  // rank's columns allow it, else 8 bits for block formats. No groups when a source is not compressed.
  OwnGroups own_groups(const std::string& canonical) const;
  // This rank's part of a 1-D weight.
  std::vector<float> vector(const std::string& canonical) const;

  std::int64_t source_bytes(const std::string& canonical) const;  // of the checkpoint, over all ranks
  std::int64_t total_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fastllm

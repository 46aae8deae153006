// The weights of one rank in the layout of its backend.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "fastllm/weights.h"
#include "model/weight_loader.h"

namespace fastllm {

// fp32 numbers in device memory; empty when the model has none.
class DeviceVector {
 public:
  DeviceVector() = default;
  DeviceVector(Backend& backend, std::span<const float> values);
  const float* get() const { return buffer_ ? static_cast<const float*>(buffer_->data()) : nullptr; }

 private:
  std::unique_ptr<Buffer> buffer_;
};

struct LinearWeights {
  std::unique_ptr<PackedWeight> weight;
  DeviceVector bias;
};

struct NormWeights {
  DeviceVector weight, bias;
};

struct LayerWeights {
  NormWeights pre_attn, post_attn, pre_ffn, post_ffn, q_norm, k_norm;
  LinearWeights qkv, out, up, down;  // up: gate and up when gated
};

struct DecoderWeights {
  std::unique_ptr<PackedWeight> tokens;  // [vocab of this rank, hidden]
  DeviceVector positions;                // [learned positions, hidden]
  std::vector<LayerWeights> layers;
  NormWeights final_norm;
  LinearWeights head;                 // weight null when tied
  std::vector<std::string> inflated;  // "name: why" of packed weights that have no groups
};

// What a backend that can compute on groups of codes is given: see fastllm/types.h, EngineConfig::quantization.
enum class Quantization : std::uint8_t { Auto, None, Int8, Int4 };
Quantization quantization_from_name(const std::string& name);  // throws InvalidArgument

enum class WeightUse : std::uint8_t { Linear, Head, Table };  // Head: the logits, tied tables too

// How a weight is kept that has `own` groups in its checkpoint.
GroupFormat choose_groups(Quantization wanted, WeightUse use, const GroupFormat& own);

// Of all packed matrices.
std::int64_t packed_bytes(const DecoderWeights& weights);

// Packs for activations of type `compute`. `progress` (may be empty) is called after every tensor.
DecoderWeights load_decoder_weights(const WeightLoader& loader, Backend& backend, DType compute,
                                    const LoadProgress& progress, Quantization quantization = Quantization::Auto);

}  // namespace fastllm

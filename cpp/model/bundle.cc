#include "model/bundle.h"

#include <fstream>
#include <string>
#include <utility>

#include "fastllm/error.h"
#include "model/safetensors.h"

namespace fastllm {
namespace {

std::string read_text(const std::string& path) {
  constexpr std::size_t kMax = std::size_t{16} << 20;  // bytes
  std::ifstream in(path, std::ios::binary);
  if (!in) throw LoadError("cannot open '" + path + "'; a bundle has spec.json and model.safetensors");
  std::string text(kMax + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(in.gcount()));
  if (in.bad() || text.size() > kMax) throw LoadError("'" + path + "' cannot be read or is larger than 16 MiB");
  return text;
}

}  // namespace

ModelSource read_bundle(const std::string& dir) {
  ModelSource source;
  source.spec = spec_from_json(read_text(dir + "/spec.json"));
  for (auto& tensor : read_safetensors(dir + "/model.safetensors")) {
    WeightBinding binding;
    binding.canonical = tensor.name;
    binding.sources.push_back(std::move(tensor));
    source.weights.push_back(std::move(binding));
  }
  return source;
}

}  // namespace fastllm

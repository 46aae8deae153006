// A model whose weights tests of the loader put together anew, and the reading of what comes out.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "model/weight_loader.h"
#include "model_fixture.h"

namespace fastllm::testing {

// llama_spec(): 4 heads and 2 kv heads of 16, hidden 64, inner 96, vocab 97.
inline const TestModel& model() {
  static const TestModel m = [] {
    ModelSpec s = llama_spec();
    s.kinds[0].attn.qkv_bias = true;
    return random_model(s, 3);
  }();
  return m;
}

inline std::vector<float> read(const HostMatrix& m) {
  std::vector<float> out(static_cast<std::size_t>(m.rows * m.cols));
  // In uneven pieces: read() may start anywhere.
  for (std::int64_t begin = 0; begin < m.rows; begin += 5)
    m.read(begin, std::min(m.rows, begin + 5), out.data() + begin * m.cols);
  return out;
}

inline WeightBinding& binding(ModelSource& s, const std::string& name) {
  for (auto& b : s.weights)
    if (b.canonical == name) return b;
  throw std::runtime_error(name);
}

inline SourceTensor tensor(const std::string& name, std::vector<std::int64_t> shape, const std::vector<float>& values) {
  SourceTensor t;
  t.name = name;
  t.shape = std::move(shape);
  t.data = values.data();
  t.bytes = static_cast<std::int64_t>(values.size() * sizeof(float));
  return t;
}

inline std::vector<float> rows_of(const std::vector<float>& m, std::size_t cols, std::size_t begin, std::size_t n) {
  return {m.begin() + static_cast<std::ptrdiff_t>(begin * cols),
          m.begin() + static_cast<std::ptrdiff_t>((begin + n) * cols)};
}

inline const std::string kQkv = "layers.1.attn.qkv.weight", kQkvBias = "layers.1.attn.qkv.bias";
inline const std::string kGateUp = "layers.1.ffn.gate_up.weight", kDown = "layers.1.ffn.down.weight";

}  // namespace fastllm::testing

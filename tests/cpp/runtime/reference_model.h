// The oracle: the layer equation of fastllm/model_spec.h in double precision, the whole sequence at once, no cache, no
// backend. Slow and plain on purpose.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "backend/exact_activation.h"
#include "model/rope.h"
#include "model_fixture.h"

namespace fastllm::testing {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

inline Row norm(const TestModel& m, const std::string& name, const NormSpec& spec, const Row& x) {
  if (spec.kind == NormKind::None) return x;
  double mean = 0, square = 0;
  if (spec.kind == NormKind::Layer) {
    for (double v : x) mean += v;
    mean /= static_cast<double>(x.size());
  }
  for (double v : x) square += (v - mean) * (v - mean);
  const double s = 1.0 / std::sqrt(square / static_cast<double>(x.size()) + static_cast<double>(spec.eps));
  const auto& w = m[name + ".weight"];
  Row y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    y[i] = (x[i] - mean) * s * static_cast<double>(w[i]);
    if (spec.bias) y[i] += static_cast<double>(m[name + ".bias"][i]);
  }
  return y;
}

inline Row linear(const TestModel& m, const std::string& name, const Row& x) {
  const auto& w = m[name + ".weight"];
  const std::string bias = name + ".bias";
  Row y(w.size() / x.size());
  for (std::size_t o = 0; o < y.size(); ++o) {
    if (m.has(bias)) y[o] = static_cast<double>(m[bias][o]);
    for (std::size_t i = 0; i < x.size(); ++i) y[o] += static_cast<double>(w[o * x.size() + i]) * x[i];
  }
  return y;
}

inline void rotate(double* head, const RopeSpec& rope, const float* cos_sin) {
  const int half = rope.dim / 2;
  for (int i = 0; i < half; ++i) {
    const bool pairs = rope.style == RopeStyle::Interleaved;
    double &a = head[pairs ? 2 * i : i], &b = head[pairs ? 2 * i + 1 : i + half];
    const auto c = static_cast<double>(cos_sin[i]), s = static_cast<double>(cos_sin[half + i]);
    const double x = a * c - b * s, y = b * c + a * s;
    a = x, b = y;
  }
}

inline Rows attention(const TestModel& m, const std::string& at, const AttnSpec& a, const Rows& in) {
  const auto d = static_cast<std::size_t>(a.head_dim), heads = static_cast<std::size_t>(a.heads);
  const auto kv_heads = static_cast<std::size_t>(a.kv_heads);
  const auto table = rope_table(a.rope, static_cast<int>(in.size()));
  const auto slopes = alibi_slopes(a.heads);
  const double scale = a.scale != 0 ? static_cast<double>(a.scale) : 1 / std::sqrt(static_cast<double>(d));
  Rows qkv, out;
  for (std::size_t t = 0; t < in.size(); ++t) {
    Row row = linear(m, at + "qkv", in[t]);
    for (std::size_t h = 0; h < heads + kv_heads; ++h) {
      const auto begin = row.begin() + static_cast<std::ptrdiff_t>(h * d);
      const bool q = h < heads;
      const Row normed = norm(m, at + (q ? "q_norm" : "k_norm"), q ? a.q_norm : a.k_norm,
                              Row(begin, begin + static_cast<std::ptrdiff_t>(d)));
      std::copy(normed.begin(), normed.end(), begin);
      if (a.rope.dim > 0) rotate(&*begin, a.rope, table.data() + t * static_cast<std::size_t>(a.rope.dim));
    }
    qkv.push_back(std::move(row));
  }
  for (std::size_t t = 0; t < in.size(); ++t) {
    Row mixed(heads * d);
    const std::size_t first =
        a.window > 0 && t + 1 > static_cast<std::size_t>(a.window) ? t + 1 - static_cast<std::size_t>(a.window) : 0;
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t kv = h / (heads / kv_heads);
      const std::size_t k_at = (heads + kv) * d, v_at = (heads + kv_heads + kv) * d;
      Row p;
      for (std::size_t u = first; u <= t; ++u) {
        double s = 0;
        for (std::size_t i = 0; i < d; ++i) s += qkv[t][h * d + i] * qkv[u][k_at + i];
        s *= scale;
        if (a.softcap > 0) s = static_cast<double>(a.softcap) * std::tanh(s / static_cast<double>(a.softcap));
        if (a.alibi) s -= static_cast<double>(slopes[h]) * static_cast<double>(t - u);
        p.push_back(s);
      }
      const double top = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& s : p) sum += s = std::exp(s - top);
      for (std::size_t u = first; u <= t; ++u)
        for (std::size_t i = 0; i < d; ++i) mixed[h * d + i] += p[u - first] / sum * qkv[u][v_at + i];
    }
    out.push_back(linear(m, at + "out", mixed));
  }
  return out;
}

inline Row feed_forward(const TestModel& m, const std::string& at, const MlpSpec& f, const Row& in) {
  Row up = linear(m, at + (f.gated ? "gate_up" : "up"), in);
  const auto inner = static_cast<std::size_t>(f.inner);
  for (std::size_t i = 0; i < inner; ++i)
    up[i] = test::exact_activation(up[i], f.act) * (f.gated ? up[inner + i] : 1.0);
  up.resize(inner);
  return linear(m, at + "down", up);
}

inline void add_to(Row& x, const Row& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

// Logits after every token: [tokens][vocab].
inline Rows reference_logits(const TestModel& m, std::span<const TokenId> ids) {
  const EmbedSpec& e = m.spec.embed;
  const auto hidden = static_cast<std::size_t>(e.hidden);
  Rows x;
  for (std::size_t t = 0; t < ids.size(); ++t) {
    Row row(hidden);
    for (std::size_t i = 0; i < hidden; ++i) {
      row[i] = static_cast<double>(e.scale) *
               static_cast<double>(m["embed.tokens.weight"][static_cast<std::size_t>(ids[t]) * hidden + i]);
      if (e.learned_positions > 0)
        row[i] += static_cast<double>(
            m["embed.positions.weight"][(t + static_cast<std::size_t>(e.position_offset)) * hidden + i]);
    }
    x.push_back(std::move(row));
  }
  for (int i = 0; i < m.spec.num_layers(); ++i) {
    const LayerSpec& l = m.spec.layer(i);
    const std::string at = layer_prefix(i);
    Rows in;
    for (const auto& row : x) in.push_back(norm(m, at + "pre_attn_norm", l.pre_attn, row));
    const Rows a = attention(m, at + "attn.", l.attn, in);
    for (std::size_t t = 0; t < x.size(); ++t) {
      if (l.parallel) {
        const Row& ffn_in = l.pre_ffn.kind == NormKind::None ? in[t] : norm(m, at + "pre_ffn_norm", l.pre_ffn, x[t]);
        const Row f = feed_forward(m, at + "ffn.", l.ffn, ffn_in);
        add_to(x[t], a[t]);
        add_to(x[t], f);
      } else {
        add_to(x[t], norm(m, at + "post_attn_norm", l.post_attn, a[t]));
        const Row f = feed_forward(m, at + "ffn.", l.ffn, norm(m, at + "pre_ffn_norm", l.pre_ffn, x[t]));
        add_to(x[t], norm(m, at + "post_ffn_norm", l.post_ffn, f));
      }
    }
  }
  Rows logits;
  const HeadSpec& head = m.spec.head;
  for (const auto& row : x) {
    const Row y = norm(m, "final_norm", head.final_norm, row);
    const auto& w = m[head.tied ? "embed.tokens.weight" : "head.weight"];
    Row out(static_cast<std::size_t>(e.vocab));
    for (std::size_t o = 0; o < out.size(); ++o) {
      if (head.bias) out[o] = static_cast<double>(m["head.bias"][o]);
      for (std::size_t i = 0; i < hidden; ++i) out[o] += static_cast<double>(w[o * hidden + i]) * y[i];
      out[o] *= static_cast<double>(head.scale);
      if (head.softcap > 0)
        out[o] = static_cast<double>(head.softcap) * std::tanh(out[o] / static_cast<double>(head.softcap));
    }
    logits.push_back(std::move(out));
  }
  return logits;
}

}  // namespace fastllm::testing

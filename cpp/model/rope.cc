#include "model/rope.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

namespace fastllm {
namespace {

// base ^ (2 i / dim), rounded to fp32 at the steps at which the reference rounds.
float frequency_base(double base, int i, int dim) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
  return static_cast<float>(std::pow(static_cast<double>(static_cast<float>(base)), static_cast<double>(exponent)));
}

// Long wavelengths are divided by factor, short ones kept, those between interpolated.
float llama3(float inv_freq, const RopeScaling& s) {
  const double original = s.original_max_len;
  const float wavelength = static_cast<float>(2.0 * std::numbers::pi) / inv_freq;
  if (static_cast<double>(wavelength) > original / s.low_freq_factor) return inv_freq / static_cast<float>(s.factor);
  if (static_cast<double>(wavelength) < original / s.high_freq_factor) return inv_freq;
  const float smooth = (static_cast<float>(original) / wavelength - static_cast<float>(s.low_freq_factor)) /
                       static_cast<float>(s.high_freq_factor - s.low_freq_factor);
  return (1.0f - smooth) * (inv_freq / static_cast<float>(s.factor)) + smooth * inv_freq;
}

// The dimensions between which yarn goes from extrapolation to interpolation.
struct YarnRange {
  double low, high;
};

YarnRange yarn_range(const RopeSpec& r) {
  auto dimension = [&](double rotations) {
    return r.dim * std::log(r.scaling.original_max_len / (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(r.theta));
  };
  double low = dimension(r.scaling.beta_fast), high = dimension(r.scaling.beta_slow);
  if (r.scaling.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0), high = std::min(high, static_cast<double>(r.dim - 1));
  if (low == high) high += 0.001;
  return {low, high};
}

float yarn(float frequency, int i, const YarnRange& range, double factor) {
  const float ramp = std::clamp(
      (static_cast<float>(i) - static_cast<float>(range.low)) / static_cast<float>(range.high - range.low), 0.0f, 1.0f);
  const float extrapolated = 1.0f - ramp;
  return 1.0f / (static_cast<float>(factor) * frequency) * (1.0f - extrapolated) + 1.0f / frequency * extrapolated;
}

}  // namespace

std::vector<float> rope_inv_freq(const RopeSpec& r, int seq_len) {
  const RopeScaling& s = r.scaling;
  double base = r.theta;
  if (s.kind == RopeScalingKind::Dynamic) {
    const double length = std::max(seq_len, s.original_max_len);
    base *= std::pow(s.factor * length / s.original_max_len - (s.factor - 1.0), r.dim / (r.dim - 2.0));
  }
  const YarnRange range = s.kind == RopeScalingKind::Yarn ? yarn_range(r) : YarnRange{0, 1};
  const auto& factors = seq_len > s.original_max_len ? s.long_factor : s.short_factor;

  std::vector<float> inv_freq(static_cast<std::size_t>(r.dim / 2));
  for (int i = 0; i < r.dim / 2; ++i) {
    const float frequency = frequency_base(base, i, r.dim);
    float& f = inv_freq[static_cast<std::size_t>(i)];
    f = 1.0f / frequency;
    switch (s.kind) {
      case RopeScalingKind::None:
      case RopeScalingKind::Dynamic:
        break;
      case RopeScalingKind::Linear:
        f /= static_cast<float>(s.factor);
        break;
      case RopeScalingKind::Llama3:
        f = llama3(f, s);
        break;
      case RopeScalingKind::Yarn:
        f = yarn(frequency, i, range, s.factor);
        break;
      case RopeScalingKind::LongRope:
        f = 1.0f / (static_cast<float>(factors[static_cast<std::size_t>(i)]) * frequency);
        break;
    }
  }
  return inv_freq;
}

double rope_attention_factor(const RopeScaling& s) {
  if (s.kind != RopeScalingKind::Yarn && s.kind != RopeScalingKind::LongRope) return 1.0;
  if (s.attention_factor > 0) return s.attention_factor;
  if (s.factor <= 1.0) return 1.0;
  if (s.kind == RopeScalingKind::LongRope) return std::sqrt(1.0 + std::log(s.factor) / std::log(s.original_max_len));
  auto magnitude = [&](double mscale) { return 0.1 * mscale * std::log(s.factor) + 1.0; };
  return s.mscale > 0 && s.mscale_all_dim > 0 ? magnitude(s.mscale) / magnitude(s.mscale_all_dim) : magnitude(1.0);
}

std::vector<float> rope_table(const RopeSpec& r, int max_len) {
  const auto half = static_cast<std::size_t>(r.dim / 2);
  const double factor = rope_attention_factor(r.scaling);
  std::vector<float> table(static_cast<std::size_t>(max_len) * half * 2);
  auto inv_freq = rope_inv_freq(r, max_len);
  const bool per_position = r.scaling.kind == RopeScalingKind::Dynamic && max_len > r.scaling.original_max_len;
  if (per_position) inv_freq = rope_inv_freq(r, r.scaling.original_max_len);
  for (int p = 0; p < max_len; ++p) {
    if (per_position && p >= r.scaling.original_max_len) inv_freq = rope_inv_freq(r, p + 1);
    float* row = table.data() + static_cast<std::size_t>(p) * half * 2;
    for (std::size_t i = 0; i < half; ++i) {
      // The reference multiplies in fp32; the angle is rounded there too.
      const auto angle = static_cast<double>(static_cast<float>(p) * inv_freq[i]);
      row[i] = static_cast<float>(std::cos(angle) * factor);
      row[half + i] = static_cast<float>(std::sin(angle) * factor);
    }
  }
  return table;
}

std::vector<float> alibi_slopes(int heads) {
  // 2^(-8/n), 2^(-16/n), ... for a power of two n; the heads beyond it take every second slope of 2n.
  const auto n = static_cast<int>(std::bit_floor(static_cast<unsigned>(heads)));
  std::vector<float> slopes;
  for (int i = 1; i <= n; ++i) slopes.push_back(static_cast<float>(std::exp2(-8.0 * i / n)));
  for (int i = 1; i <= heads - n; ++i) slopes.push_back(static_cast<float>(std::exp2(-4.0 * (2 * i - 1) / n)));
  return slopes;
}

}  // namespace fastllm

// What the attention tests share: sequences whose keys and values lie in a paged cache on the device, and naive fp64
// attention over them on the host. Everything in the cache that no sequence owns is NaN: other layers, unused blocks,
// the positions after the end of a sequence. Table entries after a sequence's last block name a block of NaNs.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "device.h"
#include "step_view.h"

namespace fastllm::test {

struct AttentionShape {
  int heads = 8, kv_heads = 2, head_dim = 128, block_size = 16, window = 0;
  float softcap = 0;
  bool alibi = false;
  DType dtype = DType::BF16, kv_dtype = DType::BF16;

  std::string describe() const {
    std::ostringstream s;
    s << heads << "/" << kv_heads << " heads of " << head_dim << ", blocks of " << block_size << ", window " << window
      << ", softcap " << softcap << (alibi ? ", alibi, " : ", ") << name_of(dtype) << " on " << name_of(kv_dtype);
    return s.str();
  }
  AttnArgs args() const {
    return {heads, kv_heads, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim)), softcap, window, {}};
  }
  std::vector<float> slopes() const {  // per head, the usual geometric series
    std::vector<float> s(static_cast<std::size_t>(heads));
    for (std::size_t h = 0; h < s.size(); ++h)
      s[h] = std::exp2(-8.0f * static_cast<float>(h + 1) / static_cast<float>(heads));
    return s;
  }
};

inline float from_e4m3(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                        : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

// The nearest e4m3 value, at most 448 in magnitude. Codes 0 to 0x7e ascend.
inline std::uint8_t to_e4m3(float x) {
  int low = 0, high = 0x7e;
  const float a = std::abs(x);
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    (from_e4m3(static_cast<std::uint8_t>(mid)) <= a ? low : high) = mid;
  }
  const float below = from_e4m3(static_cast<std::uint8_t>(low)), above = from_e4m3(static_cast<std::uint8_t>(high));
  return static_cast<std::uint8_t>((a - below <= above - a ? low : high) | (x < 0 ? 0x80 : 0));
}

// Sequence i has lengths[i] positions and sits in slot i. Two layers, of which the second is used.
class PagedCache {
 public:
  // spare_width: table entries per slot beyond what the longest sequence needs
  PagedCache(const AttentionShape& shape, std::vector<int> lengths, Random& random, int spare_width = 3)
      : shape_(shape),
        kv_{shape.kv_dtype, 2, shape.kv_heads, shape.block_size, shape.head_dim},
        lengths_(std::move(lengths)) {
    const auto slots = lengths_.size();
    for (const int n : lengths_) width_ = std::max(width_, blocks_of(n));
    width_ += spare_width;
    const int blocks =
        std::accumulate(lengths_.begin(), lengths_.end(), 0, [this](int sum, int n) { return sum + blocks_of(n); });
    std::vector<int> order(static_cast<std::size_t>(blocks));
    std::iota(order.begin(), order.end(), 2);  // blocks 0 and 1 stay NaN
    std::shuffle(order.begin(), order.end(), std::mt19937_64(random.bits()));
    tables_.assign(slots * static_cast<std::size_t>(width_), BlockId{1});
    pool_.assign(static_cast<std::size_t>(kv_.block_bytes()) * static_cast<std::size_t>(blocks + 2), std::byte{0xff});
    std::size_t next = 0;
    for (std::size_t s = 0; s < slots; ++s) {
      for (int b = 0; b < blocks_of(lengths_[s]); ++b)
        tables_[s * static_cast<std::size_t>(width_) + static_cast<std::size_t>(b)] = BlockId{order[next++]};
      for (int pos = 0; pos < lengths_[s]; ++pos)
        for (int which = 0; which < 2; ++which)
          for (int h = 0; h < kv_.kv_heads; ++h) fill_row(row_at(static_cast<int>(s), pos, which, h), random);
    }
    device_pool_.emplace_back(pool_);
    device_tables_.emplace_back(tables_);
  }

  const AttentionShape& shape() const { return shape_; }
  int length(int slot) const { return lengths_[static_cast<std::size_t>(slot)]; }
  int table_width() const { return width_; }
  KvView device_view() const { return layer_view(device_pool_[0].get(), kv_, 1); }
  const BlockId* device_tables() const { return device_tables_[0].get(); }

  // Element d of the key (which 0) or value (which 1) of a head at a position.
  float get(int slot, int pos, int which, int head, int d) const {
    const std::byte* p =
        pool_.data() + row_at(slot, pos, which, head) + static_cast<std::size_t>(d) * size_of(kv_.dtype);
    if (kv_.dtype == DType::F8E4M3) return from_e4m3(static_cast<std::uint8_t>(*p));
    if (kv_.dtype == DType::F32) {
      float x;
      std::memcpy(&x, p, sizeof x);
      return x;
    }
    bf16 x;
    std::memcpy(&x, p, sizeof x);
    return to_float(x);
  }

 private:
  AttentionShape shape_;
  KvShape kv_;
  std::vector<int> lengths_;
  int width_ = 0;  // blocks
  std::vector<BlockId> tables_;
  std::vector<std::byte> pool_;
  std::vector<DeviceArray<std::byte>> device_pool_;  // one each
  std::vector<DeviceArray<BlockId>> device_tables_;

  int blocks_of(int length) const { return (length + kv_.block_size - 1) / kv_.block_size; }

  // Offset in bytes of a row of head_dim elements.
  std::size_t row_at(int slot, int pos, int which, int head) const {
    const auto entry = static_cast<std::size_t>(slot) * static_cast<std::size_t>(width_) +
                       static_cast<std::size_t>(pos / kv_.block_size);
    const std::int64_t element = static_cast<std::int64_t>(index(tables_[entry])) * kv_.block_stride() +
                                 kv_.layer_stride() + which * kv_.kv_stride() + head * kv_.head_stride() +
                                 static_cast<std::int64_t>(pos % kv_.block_size) * kv_.head_dim;
    return static_cast<std::size_t>(element) * size_of(kv_.dtype);
  }

  // Uniform with variance 1: a quarter of the calls that normal numbers would take.
  void fill_row(std::size_t at, Random& random) {
    std::uint64_t bits = 0;
    for (int d = 0; d < kv_.head_dim; ++d) {
      if (d % 4 == 0) bits = random.bits();
      const float x = (static_cast<float>(bits & 0xffff) / 32768.0f - 1.0f) * 1.732f;
      bits >>= 16;
      std::byte* p = pool_.data() + at + static_cast<std::size_t>(d) * size_of(kv_.dtype);
      if (kv_.dtype == DType::F8E4M3) {
        *p = static_cast<std::byte>(to_e4m3(x));
      } else if (kv_.dtype == DType::F32) {
        std::memcpy(p, &x, sizeof x);
      } else {
        const bf16 rounded = to_bf16(x);
        std::memcpy(p, &rounded, sizeof rounded);
      }
    }
  }
};

// Row t of the result belongs to token t of q; tokens of padding rows (slot -1), and of no row, are zeros.
inline std::vector<double> attention_oracle(const PagedCache& cache, const Array& q,
                                            std::span<const cuda::DeviceRow> rows) {
  const AttentionShape& s = cache.shape();
  const AttnArgs args = s.args();
  const auto slopes = s.slopes();
  const int dim = s.head_dim;
  std::vector<double> out(static_cast<std::size_t>(q.rows()) * static_cast<std::size_t>(s.heads * dim), 0.0);
  std::vector<double> scores, q_row(static_cast<std::size_t>(dim));
  std::vector<float> keys;  // [positions, head_dim] of one head, then the values
  for (const auto& row : rows) {
    if (row.slot < 0) continue;
    const int end = row.first_pos + row.num_tokens;
    for (int kv_head = 0; kv_head < s.kv_heads; ++kv_head) {
      keys.resize(static_cast<std::size_t>(2 * end * dim));
      const float* const values = keys.data() + static_cast<std::size_t>(end * dim);
      for (int which = 0; which < 2; ++which)
        for (int pos = 0; pos < end; ++pos)
          for (int d = 0; d < dim; ++d)
            keys[static_cast<std::size_t>((which * end + pos) * dim + d)] = cache.get(row.slot, pos, which, kv_head, d);
      const int group = s.heads / s.kv_heads;
      for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        for (int i = 0; i < row.num_tokens; ++i) {
          const int at = row.first_pos + i, token = row.token_begin + i;
          const int begin = s.window > 0 ? std::max(0, at + 1 - s.window) : 0;
          for (int d = 0; d < dim; ++d) q_row[static_cast<std::size_t>(d)] = q.get(token, h * dim + d);
          scores.assign(static_cast<std::size_t>(at + 1), 0.0);
          double greatest = -std::numeric_limits<double>::infinity();
          for (int pos = begin; pos <= at; ++pos) {
            const float* key = keys.data() + static_cast<std::size_t>(pos * dim);
            double x = 0;
            for (int d = 0; d < dim; ++d) x += q_row[static_cast<std::size_t>(d)] * static_cast<double>(key[d]);
            x *= static_cast<double>(args.scale);
            if (s.softcap > 0) x = static_cast<double>(s.softcap) * std::tanh(x / static_cast<double>(s.softcap));
            if (s.alibi) x += static_cast<double>(slopes[static_cast<std::size_t>(h)]) * (pos - at);
            scores[static_cast<std::size_t>(pos)] = x;
            greatest = std::max(greatest, x);
          }
          double sum = 0;
          double* o = out.data() + static_cast<std::size_t>((token * s.heads + h) * dim);
          for (int pos = begin; pos <= at; ++pos) {
            const double p = std::exp(scores[static_cast<std::size_t>(pos)] - greatest);
            const float* value = values + static_cast<std::size_t>(pos * dim);
            sum += p;
            for (int d = 0; d < dim; ++d) o[d] += p * static_cast<double>(value[d]);
          }
          for (int d = 0; d < dim; ++d) o[d] /= sum;
        }
      }
    }
  }
  return out;
}

// The first element of `got` that is off by more than tolerance * (|want| + the head's root mean square), in words;
// empty when there is none. Averages over many positions are small, so the allowance is relative to their size.
inline std::string first_difference(const Array& got, std::span<const double> want, int head_dim, double tolerance) {
  for (std::int64_t t = 0; t < got.rows(); ++t) {
    for (std::int64_t head = 0; head < got.cols() / head_dim; ++head) {
      const double* w = want.data() + t * got.cols() + head * head_dim;
      const double rms = std::sqrt(std::inner_product(w, w + head_dim, w, 0.0) / head_dim);
      for (int d = 0; d < head_dim; ++d) {
        const double g = static_cast<double>(got.get(t, head * head_dim + d));
        if (std::abs(g - w[d]) <= tolerance * (std::abs(w[d]) + rms)) continue;  // false for NaN
        std::ostringstream s;
        s << "token " << t << " head " << head << " dim " << d << ": expected " << w[d] << ", got " << g
          << " (rms of the head " << rms << ", tolerance " << tolerance << ")";
        return s.str();
      }
    }
  }
  return {};
}

}  // namespace fastllm::test

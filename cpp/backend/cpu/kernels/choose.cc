// The choice of codes for the numbers of a row (kernels.h, CodeChoice).
//
//   symmetric   scale = half(max |x| / min(zero, top - zero)), code = nearest(x / scale + zero)
//   offsets     8 bits: the line from the smallest to the largest number. 4 bits: also spans that cut a little off both
//               ends; codes of a span, the line with the least squared error for these codes; of these lines the best,
//               fitted once more to the codes on it
//
// What is decided for a group is decided for kW groups at once, a lane each, their numbers side by side:
//
//   numbers[k][lane] = x[group + lane][k]
//
// so sums run over a group in order and every instruction set rounds alike; this file is compiled without contraction
// of a product and a sum, which would differ. Codes are written along the row.
// Cost: 4 bytes read and 1 written per number; 4 bits with offsets some 80 operations, all others about 10.
// Benchmark: --benchmark_filter=ChooseCodes
#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;  // bits
constexpr float kTop4 = 15.0f;               // the largest code of 4 bits
// A span that is cut by c off either end has code (t - 15 c) / (1 - 2 c) for t = 0 ... 15 from end to end.
constexpr int kCuts = 5;  // c = 0, 0.03, 0.06, 0.1, 0.15
constexpr float kStretch[kCuts] = {1.0f, 1 / 0.94f, 1 / 0.88f, 1 / 0.8f, 1 / 0.7f};
constexpr float kShift[kCuts] = {0.0f, 0.45f / 0.94f, 0.9f / 0.88f, 1.5f / 0.8f, 2.25f / 0.7f};

// kW groups, the last one repeated where there are fewer.
struct Groups {
  const float* at[kW];
  int64_t size;  // numbers of a group, a multiple of kW
};

// A value for each of the kW groups.
struct Line {
  vf scale, offset;
};

vf half_precision(vf x) {
  const vu bits = as_bits(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const vu normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & ~0x1fffu;
  const vu tiny = as_bits((as_float(magnitude) + 0.5f) - 0.5f);  // a multiple of 2^-24, the last bit of 0.5
  vu rounded = magnitude < 0x38800000u ? tiny : normal;
  rounded = magnitude < 0x477ff000u ? rounded : set1(kInfinity);
  return as_float(sign | (magnitude > set1(kInfinity) ? magnitude : rounded));
}

// The nearest integer to x in [0, top], ties to even.
inline vf nearest(vf x, float top) {
  constexpr float kInteger = 1.5f * (1 << 23);  // floats of this size are integers
  return (min(max(x, vf{}), set1(top)) + kInteger) - kInteger;
}

inline vi is_infinite(vf x) { return (as_bits(x) & 0x7fffffffu) >= kInfinity; }  // or NaN

inline vf inverse_of(vf scale) { return scale > 0.0f ? 1.0f / scale : vf{}; }

void transpose(const Groups& g, float* numbers) {
  for (int lane = 0; lane < kW; ++lane)
    for (int64_t k = 0; k < g.size; ++k) numbers[k * kW + lane] = g.at[lane][k];
}

Line rounded(const Line& line) { return {half_precision(line.scale), half_precision(line.offset)}; }

// Sums over codes u of numbers x.
struct Sums {
  vf u{}, uu{}, ux{};

  void add(vf code, vf x) {
    u += code, ux += code * x;
    uu = fma(code, code, uu);  // of small integers: exact, fused or not
  }
  // The line with the least squared error; sum_x: of the numbers.
  Line fit(vf sum_x, vf n) const {
    const vf spread = n * uu - u * u;
    const vf scale = spread > 0.0f ? (n * ux - u * sum_x) / spread : vf{};
    return {scale, (sum_x - scale * u) / n};
  }
};

// All spans at a time, because the sums of one wait for each other. Numbers are taken as t in [0, 15], the smallest as
// 0 and the largest as 15; on a line that fits, squared errors add up to sum tt - scale sum ut - offset sum t.
Line choose_span(const float* numbers, int64_t size, vf low, vf span) {
  const vf steps = span > 0.0f ? kTop4 / span : vf{}, n = set1(static_cast<float>(size));
  vf sum_t{}, sum_tt{};
  Sums sums[kCuts];
  for (int64_t k = 0; k < size; ++k) {
    const vf t = (load(numbers + k * kW) - low) * steps;
    sum_t += t, sum_tt += t * t;
    for (int i = 0; i < kCuts; ++i) sums[i].add(nearest(t * kStretch[i] - kShift[i], kTop4), t);
  }
  Line best{set1(1.0f), vf{}};
  vf least = set1(__builtin_inff());
  for (const Sums& of : sums) {
    const Line line = of.fit(sum_t, n);
    const vf error = sum_tt - line.scale * of.ux - line.offset * sum_t;
    const vi better = error < least;
    least = better ? error : least;
    best = {better ? line.scale : best.scale, better ? line.offset : best.offset};
  }
  const vf step = span / kTop4;
  return {best.scale * step, low + best.offset * step};
}

// total: the sum of the numbers, finite only if all are.
Line choose_line(const float* numbers, int64_t size, int bits, vf& total) {
  vf low = load(numbers), high = low;
  total = vf{};
  for (int64_t k = 0; k < size; ++k) {
    const vf x = load(numbers + k * kW);
    low = min(low, x), high = max(high, x), total += x;
  }
  if (bits > 4) return rounded({(high - low) / static_cast<float>((1 << bits) - 1), low});
  // Codes on the best line are not those it was fitted to: it is fitted once more.
  const Line line = rounded(choose_span(numbers, size, low, high - low));
  const vf inverse = inverse_of(line.scale);
  Sums sums;
  for (int64_t k = 0; k < size; ++k) {
    const vf x = load(numbers + k * kW);
    sums.add(nearest((x - line.offset) * inverse, kTop4), x);
  }
  return rounded(sums.fit(total, set1(static_cast<float>(size))));
}

// The largest magnitudes of the groups; compared as bits, so that infinities and NaN win.
vf magnitudes(const Groups& g) {
  vi most{};
  for (int lane = 0; lane < kW; ++lane) {
    vi m{};
    for (int64_t k = 0; k < g.size; k += kW) {
      const vi x = reinterpret_cast<vi>(load_u32(g.at[lane] + k) & 0x7fffffffu);
      m = x > m ? x : m;
    }
    int32_t each[kW];
    __builtin_memcpy(each, &m, sizeof m);
    int32_t largest = 0;
    for (const int32_t one : each) largest = one > largest ? one : largest;
    most[lane] = largest;
  }
  return reinterpret_cast<vf>(most);
}

inline void store_codes(uint8_t* codes, vf x) {
  typedef uint8_t Bytes __attribute__((vector_size(kW)));
  const Bytes bytes = __builtin_convertvector(__builtin_convertvector(x, vi), Bytes);
  __builtin_memcpy(codes, &bytes, sizeof bytes);
}

// Codes of `count` groups. False: something is not finite.
bool choose(const CodeChoice& c, const Groups& g, int64_t count, uint8_t* codes, float* scales, float* offsets) {
  const float top = static_cast<float>((1 << c.bits) - 1);
  vf extent;  // finite only if all numbers are
  Line line{};
  if (offsets != nullptr) {
    float numbers[kSpan * kW];
    transpose(g, numbers);
    line = choose_line(numbers, g.size, c.bits, extent);
    store_some(offsets, line.offset, count);
  } else {
    const int most = (1 << c.bits) - 1 - c.zero;
    extent = magnitudes(g);
    line.scale = half_precision(extent / static_cast<float>(c.zero < most ? c.zero : most));
  }
  store_some(scales, line.scale, count);
  if (any(is_infinite(extent) | is_infinite(line.scale) | is_infinite(line.offset))) return false;
  const vf inverses = inverse_of(line.scale);
  const float zero = static_cast<float>(c.zero);
  for (int64_t lane = 0; lane < count; ++lane) {
    const float inverse = inverses[lane], offset = line.offset[lane];
    for (int64_t k = 0; k < g.size; k += kW)
      store_codes(codes + lane * g.size + k, nearest((load(g.at[lane] + k) - offset) * inverse + zero, top));
  }
  return true;
}

bool choose_codes(const CodeChoice& c) {
  const int64_t size = c.group, whole = c.n / size;
  Groups g{{}, size};
  for (int64_t i = 0; i < whole; i += kW) {
    const int64_t count = whole - i < kW ? whole - i : kW;
    for (int64_t lane = 0; lane < kW; ++lane) g.at[lane] = c.x + (i + (lane < count ? lane : count - 1)) * size;
    if (!choose(c, g, count, c.codes + i * size, c.scales + i, c.offsets == nullptr ? nullptr : c.offsets + i))
      return false;
  }
  const int64_t width = c.n - whole * size;
  if (width == 0) return true;
  // A shorter last group repeats its last number, which changes neither its ends nor its magnitude.
  float last[kSpan];
  uint8_t codes[kSpan];
  for (int64_t k = 0; k < size; ++k) last[k] = c.x[whole * size + (k < width ? k : width - 1)];
  for (int64_t lane = 0; lane < kW; ++lane) g.at[lane] = last;
  if (!choose(c, g, 1, codes, c.scales + whole, c.offsets == nullptr ? nullptr : c.offsets + whole)) return false;
  __builtin_memcpy(c.codes + whole * size, codes, static_cast<size_t>(width));
  return true;
}

}  // namespace

void FASTLLM_ISA::fill_choose(Kernels& t) { t.choose_codes = choose_codes; }

}  // namespace fastllm::cpu

// Reductions over one row of logits.
//
//   row_max: max_i x[i], NaN if any x[i] is          argmax: lowest i with it, -1 unless it is finite
//   sum_exp: sum_i exp((x[i] - shift) * scale)
//   gumbel_argmax: argmax_i x[i] / temperature - ln(-ln u_i) over the tokens that take part: a draw from their softmax
//
// u_i = (word >> 9 + 1/2) / 2^23, word = the first output of Philox4x32-10 with key = seed and counter = (i, 0,
// position): it depends on nothing but the seed, the position and the token. Its greatest noise is 16.7, so vectors of
// logits that far below the best so far need no random numbers. Cost: 4 V bytes. Benchmark: --benchmark_filter=Sample
#include "backend/cpu/kernels/fill.h"
#include "backend/cpu/kernels/simd.h"

namespace fastllm::cpu {
namespace {

constexpr float kMaxNoise = 16.7f;

inline float lowest() { return -__builtin_inff(); }

inline vf load_logits(const float* x, int64_t lanes) {
  if (lanes == kW) return load(x);
  return __builtin_convertvector(iota(), vf) < static_cast<float>(lanes) ? load(x, lanes) : set1(lowest());
}

float row_max(const float* x, int64_t n) {
  vf m[4];  // four chains hide the latency
  for (vf& v : m) v = set1(lowest());
  vi ill{};
  const auto take = [&](vf v, vf& most) {
    ill |= v != v;
    most = max(v, most);
  };
  int64_t i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW)
    for (int v = 0; v < 4; ++v) take(load(x + i + v * kW), m[v]);
  for_vectors(n - i, [&](int64_t j, int64_t lanes) { take(load_logits(x + i + j, lanes), m[0]); });
  return any(ill) ? __builtin_nanf("") : max_of(max(max(m[0], m[1]), max(m[2], m[3])));
}

int64_t argmax(const float* x, int64_t n) {
  const float greatest = row_max(x, n);
  if (!(greatest - greatest == 0.0f)) return -1;
  const vf m = set1(greatest);
  for (int64_t i = 0; i < n; i += kW) {
    const int64_t lanes = n - i < kW ? n - i : kW;
    const vi equal = load_logits(x + i, lanes) == m;
    if (!any(equal)) continue;
    for (int l = 0; l < lanes; ++l)
      if (equal[l]) return i + l;
  }
  return -1;
}

double sum_exp(const float* x, int64_t n, float shift, float scale) {
  constexpr int64_t kRun = 64 * kW;  // fp32 within a run, fp64 across runs
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kRun) {
    vf s{};
    for_vectors(n - i < kRun ? n - i : kRun,
                [&](int64_t j, int64_t lanes) { s += exp((load_logits(x + i + j, lanes) - shift) * scale); });
    total += static_cast<double>(sum(s));
  }
  return total;
}

// The low and high halves of 32 by 32 bit products.
struct Product {
  vu low, high;
};
inline Product multiply(vu a, uint32_t b) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), y = _mm512_set1_epi64(b);
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  return {reinterpret_cast<vu>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))),
          reinterpret_cast<vu>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd))};
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), y = _mm256_set1_epi64x(b);
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  return {reinterpret_cast<vu>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)),
          reinterpret_cast<vu>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa))};
#else
  typedef uint64_t wide __attribute__((vector_size(kW * 8)));
  const wide p = __builtin_convertvector(a, wide) * static_cast<uint64_t>(b);
  return {__builtin_convertvector(p, vu), __builtin_convertvector(p >> 32, vu)};
#endif
}

inline vu philox(vu token, uint64_t seed, uint64_t position) {
  vu c0 = token, c1{}, c2 = set1(static_cast<uint32_t>(position)), c3 = set1(static_cast<uint32_t>(position >> 32));
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ k0;
    c2 = a.high ^ c3 ^ k1;
    c1 = b.low;
    c3 = a.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

int64_t gumbel_argmax(const GumbelArgs& a) {
  float best = lowest();
  int64_t best_id = -1;
  for_vectors(a.n, [&](int64_t i, int64_t lanes) {
    const vf x = load_logits(a.logits + i, lanes);
    const vi id = iota() + static_cast<int32_t>(i);
    const vi tie = (x == a.floor) & (id <= static_cast<int32_t>(a.last_id));
    const vf scaled = ((x > a.floor) | tie) != 0 ? x * a.inv_temperature : set1(lowest());
    if (!any(scaled > best - kMaxNoise)) return;
    const vu word = philox(reinterpret_cast<vu>(id), a.seed, a.position);
    const vf u = (__builtin_convertvector(reinterpret_cast<vi>(word >> 9), vf) + 0.5f) * 0x1p-23f;
    const vf score = scaled - log(-log(u));
    if (!any(score > best)) return;
    const float top = best = max_of(score);
    for (int l = 0; l < kW; ++l) {
      if (score[l] == top) {
        best_id = i + l;
        break;
      }
    }
  });
  return best_id;
}

}  // namespace

void FASTLLM_ISA::fill_sample(Kernels& t) {
  t.row_max = row_max;
  t.argmax = argmax;
  t.sum_exp = sum_exp;
  t.gumbel_argmax = gumbel_argmax;
}

}  // namespace fastllm::cpu

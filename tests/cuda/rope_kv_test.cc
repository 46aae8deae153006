// Norm per head, rotation and KV write against double precision, at exact places of the cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "check_rows.h"
#include "elementwise.h"

namespace fastllm::test {
namespace {

struct Case {
  int heads, kv_heads, head_dim, rope_dim;
  RopeStyle style;
  NormKind q_norm, k_norm;
  int tokens, padding;  // padding: of these tokens, how many at the end have no slot
  int pad;              // columns between the end of a row of qkv and the next one
};

constexpr RopeStyle kHalf = RopeStyle::Half, kInterleaved = RopeStyle::Interleaved;
constexpr NormKind kNone = NormKind::None, kRms = NormKind::Rms, kLayer = NormKind::Layer;
constexpr Case kCases[] = {
    {32, 8, 128, 128, kHalf, kNone, kNone, 5, 2, 0},
    {32, 8, 128, 128, kHalf, kRms, kRms, 3, 0, 0},
    {9, 3, 64, 64, kHalf, kNone, kNone, 1, 0, 0},
    {4, 4, 80, 32, kHalf, kNone, kNone, 4, 1, 0},
    {4, 2, 96, 96, kHalf, kLayer, kLayer, 3, 0, 8},
    {2, 1, 256, 256, kHalf, kRms, kRms, 3, 1, 0},
    {4, 1, 256, 64, kInterleaved, kNone, kRms, 2, 0, 0},
    {4, 2, 128, 128, kInterleaved, kNone, kNone, 4, 0, 0},
    {4, 2, 64, 64, kInterleaved, kLayer, kNone, 4, 0, 0},
    {4, 2, 8, 8, kHalf, kRms, kNone, 6, 1, 0},
    {4, 2, 16, 16, kHalf, kRms, kRms, 4, 0, 0},
    {4, 2, 16, 4, kInterleaved, kRms, kRms, 4, 0, 0},
    {4, 2, 80, 20, kHalf, kNone, kNone, 3, 0, 0},
    {3, 1, 256, 256, kHalf, kLayer, kRms, 2, 0, 1},
    {2, 1, 250, 126, kInterleaved, kRms, kRms, 3, 0, 3},
    {3, 3, 64, 0, kHalf, kNone, kNone, 4, 1, 0},
    {3, 3, 64, 0, kHalf, kRms, kRms, 4, 0, 0},
    {2, 1, 5, 4, kHalf, kRms, kLayer, 3, 0, 0},
    {64, 8, 128, 64, kHalf, kNone, kNone, 70, 3, 16},
};

constexpr int kBlockSize = 16, kTableWidth = 4, kSlots = 24, kLayers = 3, kWhichLayer = 1;
constexpr float kEps = 1e-6f;

double angle(int position, int i, int dim) { return position * std::pow(10000.0, -2.0 * i / dim); }

void norm_head(std::vector<double>& x, NormKind kind, const std::vector<float>& weight) {
  if (kind == NormKind::None) return;
  const auto n = static_cast<double>(x.size());
  const double mean = kind == NormKind::Layer ? std::accumulate(x.begin(), x.end(), 0.0) / n : 0.0;
  double square = 0;
  for (const double v : x) square += (v - mean) * (v - mean);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = (x[i] - mean) / std::sqrt(square / n + kEps) * weight[i];
}

void rotate_head(std::vector<double>& x, int position, int dim, RopeStyle style) {
  for (int i = 0; i < dim / 2; ++i) {
    const auto first = static_cast<std::size_t>(style == RopeStyle::Half ? i : 2 * i);
    const auto second = style == RopeStyle::Half ? first + static_cast<std::size_t>(dim / 2) : first + 1;
    const double a = x[first], b = x[second], t = angle(position, i, dim);
    x[first] = a * std::cos(t) - b * std::sin(t);
    x[second] = b * std::cos(t) + a * std::sin(t);
  }
}

double from_e4m3(unsigned code) {
  const unsigned exponent = code >> 3 & 15u, mantissa = code & 7u;
  const double sign = (code & 0x80u) != 0 ? -1 : 1;
  if ((code & 0x7fu) == 0x7fu) return NAN;
  return sign *
         (exponent == 0 ? mantissa / 512.0 : (1 + mantissa / 8.0) * std::ldexp(1.0, static_cast<int>(exponent) - 7));
}

// Nearest, ties to even, saturating.
unsigned to_e4m3(double x) {
  static const std::vector<double> values = [] {
    std::vector<double> v;
    for (unsigned code = 0; code < 0x7f; ++code) v.push_back(from_e4m3(code));
    return v;
  }();
  const double size = std::abs(x);
  unsigned best = 0;
  for (unsigned code = 1; code < 0x7f; ++code) {
    const double error = std::abs(size - values[code]), least = std::abs(size - values[best]);
    if (error < least || (error == least && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 0x80u : 0u);
}

// Whether the stored element is `want`. exact: want is what the kernel rounds; else it may have been computed with an
// error, and may be off by one unit of the last place.
bool stored(DType dtype, const std::byte* at, double want, bool exact) {
  if (dtype == DType::F8E4M3) {
    const auto got = static_cast<int>(*at), code = static_cast<int>(to_e4m3(want));
    if (exact) return got == code;
    if (((got ^ code) & 0x80) != 0) return (got & 0x7f) <= 1 && (code & 0x7f) <= 1;
    return std::abs(got - code) <= 1;
  }
  float got = 0;
  if (dtype == DType::F32) {
    std::memcpy(&got, at, sizeof got);
  } else {
    bf16 bits{};
    std::memcpy(&bits, at, sizeof bits);
    got = to_float(bits);
  }
  return exact ? static_cast<double>(got) == want : close(got, want, tolerance_of(dtype));
}

class CudaRopeKv : public CudaTest {
 protected:
  void run(const Case& c, DType dtype, DType kv_dtype);
};

void CudaRopeKv::run(const Case& c, DType dtype, DType kv_dtype) {
  const std::int64_t width = std::int64_t{c.heads + 2 * c.kv_heads} * c.head_dim;
  Array qkv(dtype, c.tokens + 1, width + c.pad);
  qkv.fill(random);
  const std::int64_t v_begin = std::int64_t{c.heads + c.kv_heads} * c.head_dim;
  for (std::int64_t i = 0; i < c.head_dim; ++i) qkv.set(0, v_begin + i, random.normal(400.0f));  // fp8 saturates

  // Every token has a position of its own; blocks are dealt at random.
  const int num_blocks = 1 + kSlots * kTableWidth;
  std::vector<BlockId> tables;
  for (int i = 1; i < num_blocks; ++i) tables.push_back(BlockId{i});
  std::vector<int> places(static_cast<std::size_t>(kSlots * kTableWidth * kBlockSize));
  std::iota(places.begin(), places.end(), 0);
  for (std::size_t i = tables.size() - 1; i > 0; --i)
    std::swap(tables[i], tables[static_cast<std::size_t>(random.below(static_cast<int>(i) + 1))]);
  for (std::size_t i = places.size() - 1; i > 0; --i)
    std::swap(places[i], places[static_cast<std::size_t>(random.below(static_cast<int>(i) + 1))]);
  std::vector<std::int32_t> slots, positions;
  for (int t = 0; t < c.tokens; ++t) {
    const bool padding = t >= c.tokens - c.padding;
    const int place = places[static_cast<std::size_t>(t)];
    slots.push_back(padding ? -1 : place / (kTableWidth * kBlockSize));
    positions.push_back(padding ? 0 : place % (kTableWidth * kBlockSize));
  }
  std::vector<float> cos_sin;
  for (int p = 0; p < kTableWidth * kBlockSize; ++p) {
    for (int i = 0; i < c.rope_dim / 2; ++i) cos_sin.push_back(static_cast<float>(std::cos(angle(p, i, c.rope_dim))));
    for (int i = 0; i < c.rope_dim / 2; ++i) cos_sin.push_back(static_cast<float>(std::sin(angle(p, i, c.rope_dim))));
  }
  const auto q_weight = random_vector(random, c.head_dim, 1.0f), k_weight = random_vector(random, c.head_dim, 1.0f);
  const KvShape shape{kv_dtype, kLayers, c.kv_heads, kBlockSize, c.head_dim};

  const DeviceMatrix device_qkv(qkv);
  const DeviceArray<float> device_cos_sin(cos_sin), device_q_weight(q_weight), device_k_weight(k_weight);
  const DeviceArray<std::int32_t> device_slots(slots), device_positions(positions);
  const DeviceArray<BlockId> device_tables(tables);
  const DeviceArray<std::byte> pool(static_cast<std::size_t>(shape.block_bytes() * num_blocks));
  cuda::RopeKvCall call;
  call.qkv = device_qkv.data();
  call.ld = width + c.pad;
  call.dtype = dtype;
  call.heads = c.heads;
  call.kv_heads = c.kv_heads;
  call.head_dim = c.head_dim;
  call.q_norm = {c.q_norm, kEps, false};
  call.k_norm = {c.k_norm, kEps, false};
  call.q_weight = c.q_norm != kNone ? device_q_weight.get() : nullptr;
  call.k_weight = c.k_norm != kNone ? device_k_weight.get() : nullptr;
  call.rope = {device_cos_sin.get(), c.rope_dim, c.style};
  call.kv = layer_view(pool.get(), shape, kWhichLayer);
  cuda::StepView step;
  step.positions = device_positions.get();
  step.token_slot = device_slots.get();
  step.tables = device_tables.get();
  step.table_width = kTableWidth;
  step.num_tokens = c.tokens;
  cuda::qk_norm_rope_write_kv(call, step, stream);

  // want[token][column], and which bytes of the pool were to be written.
  std::vector<std::vector<double>> want;
  for (int t = 0; t < c.tokens; ++t) {
    std::vector<double> row;
    for (int h = 0; h < c.heads + 2 * c.kv_heads; ++h) {
      std::vector<double> x;
      for (int i = 0; i < c.head_dim; ++i) x.push_back(qkv.get(t, std::int64_t{h} * c.head_dim + i));
      if (h < c.heads + c.kv_heads) {
        const bool is_q = h < c.heads;
        norm_head(x, is_q ? c.q_norm : c.k_norm, is_q ? q_weight : k_weight);
        rotate_head(x, positions[static_cast<std::size_t>(t)], c.rope_dim, c.style);
      }
      row.insert(row.end(), x.begin(), x.end());
    }
    want.push_back(std::move(row));
  }
  expect_rows("qkv", qkv, device_qkv.download(), c.tokens, width, tolerance_of(dtype),
              [&](auto t, auto i) { return want[static_cast<std::size_t>(t)][static_cast<std::size_t>(i)]; });

  const auto got = pool.download();
  std::vector<bool> written(got.size());
  const std::size_t element = size_of(kv_dtype);
  int wrong = 0;
  for (int t = 0; t < c.tokens; ++t) {
    const int slot = slots[static_cast<std::size_t>(t)], position = positions[static_cast<std::size_t>(t)];
    if (slot < 0) continue;
    const BlockId block = tables[static_cast<std::size_t>(slot * kTableWidth + position / kBlockSize)];
    for (int kv = 0; kv < 2; ++kv) {
      for (int h = 0; h < c.kv_heads; ++h) {
        for (int i = 0; i < c.head_dim; ++i) {
          // [block][layer][k|v][kv_head][block_size][head_dim]
          const std::size_t at =
              element * ((((((index(block) * kLayers + kWhichLayer) * 2 + static_cast<std::size_t>(kv)) *
                                static_cast<std::size_t>(c.kv_heads) +
                            static_cast<std::size_t>(h)) *
                               kBlockSize +
                           static_cast<std::size_t>(position % kBlockSize)) *
                          static_cast<std::size_t>(c.head_dim)) +
                         static_cast<std::size_t>(i));
          std::fill_n(written.begin() + static_cast<std::ptrdiff_t>(at), element, true);
          const int head = c.heads + kv * c.kv_heads + h;
          const double value = want[static_cast<std::size_t>(t)][static_cast<std::size_t>(head * c.head_dim + i)];
          if (!stored(kv_dtype, got.data() + at, value, kv == 1) && wrong++ == 0) {
            ADD_FAILURE() << "cache (" << name_of(kv_dtype) << ") holds a wrong " << (kv == 0 ? "k" : "v")
                          << " first at token " << t << ", head " << h << ", element " << i << ", position " << position
                          << ": expected " << value << ", bytes " << std::hex << static_cast<int>(got[at]) << " "
                          << (element > 1 ? static_cast<int>(got[at + 1]) : 0) << "; seed " << std::dec << test_seed();
          }
        }
      }
    }
  }
  EXPECT_EQ(wrong, 0) << "elements of the cache";
  const auto block_bytes = static_cast<std::size_t>(shape.block_bytes());
  for (std::size_t i = block_bytes; i < got.size(); ++i) {  // block 0 is for padding tokens
    if (!written[i] && got[i] != std::byte{0xff}) {
      ADD_FAILURE() << "byte " << i % block_bytes << " of block " << i / block_bytes << " was touched; seed "
                    << test_seed();
      break;
    }
  }
  if (c.padding == 0) {
    EXPECT_TRUE(std::all_of(got.begin(), got.begin() + static_cast<std::ptrdiff_t>(block_bytes), [](std::byte b) {
      return b == std::byte{0xff};
    })) << "block 0 was touched without padding tokens";
  }
}

TEST_F(CudaRopeKv, NormsRotatesAndStores) {
  for (const Case& c : kCases) {
    for (const DType dtype : {DType::F32, DType::BF16}) {
      for (const DType kv : {dtype, DType::F8E4M3}) {
        SCOPED_TRACE(testing::Message() << c.heads << "+" << c.kv_heads << " heads of " << c.head_dim << ", rope "
                                        << c.rope_dim << (c.style == kHalf ? " half" : " interleaved") << ", norms "
                                        << static_cast<int>(c.q_norm) << static_cast<int>(c.k_norm) << ", "
                                        << name_of(dtype) << " to " << name_of(kv));
        run(c, dtype, kv);
      }
    }
  }
}

TEST_F(CudaRopeKv, ReachesBlocksBeyondFourGigabytes) {
  const KvShape shape{DType::BF16, 1, 8, 16, 128};
  constexpr int kBlocks = 80'000, kLast = kBlocks - 1;
  const auto block_bytes = static_cast<std::size_t>(shape.block_bytes());
  if (!has_memory(block_bytes * kBlocks)) GTEST_SKIP() << "needs " << (block_bytes * kBlocks >> 30) << " GiB";
  const DeviceArray<std::byte> pool(block_bytes * kBlocks);
  Array qkv(DType::BF16, 1, 10 * 3 * 128);
  qkv.fill(random);
  const DeviceMatrix device_qkv(qkv);
  const DeviceArray<std::int32_t> slot(std::vector<std::int32_t>{0}), position(std::vector<std::int32_t>{5});
  const DeviceArray<BlockId> table(std::vector<BlockId>{BlockId{kLast}});
  cuda::RopeKvCall call;
  call.qkv = device_qkv.data();
  call.ld = qkv.cols();
  call.heads = 14;
  call.kv_heads = 8;
  call.head_dim = 128;
  call.kv = layer_view(pool.get(), shape, 0);
  cuda::StepView step;
  step.positions = position.get();
  step.token_slot = slot.get();
  step.tables = table.get();
  step.table_width = 1;
  step.num_tokens = 1;
  cuda::qk_norm_rope_write_kv(call, step, stream);
  cuda::check(cudaStreamSynchronize(stream), "the kernels under test");
  std::vector<bf16> got(block_bytes / 2);
  cuda::check(
      cudaMemcpy(got.data(), pool.get() + std::size_t{kLast} * block_bytes, block_bytes, cudaMemcpyDeviceToHost),
      "cudaMemcpy");
  for (int head = 0; head < 16; ++head) {  // keys, then values
    for (int i = 0; i < 128; ++i) {
      const auto at = static_cast<std::size_t>((head * 16 + 5) * 128 + i);
      ASSERT_EQ(to_float(got[at]), qkv.get(0, (14 + head) * 128 + i)) << "head " << head << ", element " << i;
    }
  }
}

}  // namespace
}  // namespace fastllm::test

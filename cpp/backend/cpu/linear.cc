// Packed weights: their making, their product with activations, and the look-up of one row of them.
#include <algorithm>
#include <bit>
#include <cassert>
#include <exception>
#include <mutex>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/interleave.h"
#include "backend/cpu/quant_weight.h"
#include "backend/cpu/weight.h"

namespace fastllm::cpu {
namespace {

class DenseWeight final : public CpuWeight {
 public:
  DenseWeight(PageArena& arena, std::int64_t rows, std::int64_t cols, DType dtype)
      : CpuWeight(arena, rows, cols, is_bf16(dtype) ? kPanel * round_up(cols, 32) * 2 : kPanel * cols * 4),
        dtype_(dtype) {}

  DType dtype() const { return dtype_; }
  // What was multiplied after this weight the last time; steps repeat their order.
  const std::shared_ptr<WeightStart>& after() const { return after_; }

  void read_row(std::int64_t row, float scale, float* out) const override {
    const std::int64_t column = row % kPanel;
    if (is_bf16(dtype_)) {
      const auto* w = reinterpret_cast<const bf16*>(panel(row / kPanel)) + column / 16 * 512 + column % 16 * 2;
      for (std::int64_t k = 0; k < cols(); ++k) {
        out[k] = scale * to_float(w[k / 32 * 1024 + k % 32 / 2 * 32 + k % 2]);
      }
    } else {
      const auto* w = reinterpret_cast<const float*>(panel(row / kPanel)) + column;
      for (std::int64_t k = 0; k < cols(); ++k) out[k] = scale * w[k * kPanel];
    }
  }

 private:
  DType dtype_;
  std::shared_ptr<WeightStart> after_ = std::make_shared<WeightStart>();
};

// Row blocks of which a megabyte is in use.
std::int64_t group_of(std::int64_t block_bytes) { return std::max<std::int64_t>(1, (1 << 20) / block_bytes); }
// Tiles keep few enough of long rows in the cache by themselves; more row blocks than these would only make threads
// wait for each other.
constexpr std::int64_t kTileGroup = 12;

// Where a part of a product goes: its first element, elements between rows, and the bias of its first column or null.
struct PartOut {
  void* data;
  std::int64_t stride;
  DType dtype;
  const float* bias;
  bool accumulate;
};

// The product of the rows of x and a dense weight, in parts of rows and panels.
class DenseProduct {
 public:
  DenseProduct(const Kernels& kernels, const Tensor& x, const DenseWeight& w)
      : kernels_(kernels), x_(x), w_(w), narrow_(is_bf16(x.dtype)) {
    assert(x.dtype == w.dtype() && x.cols() == w.cols());
  }

  // Bytes of a prepared block of rows; 0 when they are taken as they are.
  std::int64_t block_bytes() const { return narrow_ ? kernels_.prepared_bytes(x_.cols()) : 0; }
  void prepare(std::int64_t block, void* area) const {
    kernels_.prepare_bf16(x_.ptr<std::uint16_t>(), x_.stride[0], block * kRowBlock,
                          std::min(x_.rows(), (block + 1) * kRowBlock), x_.cols(), area);
  }
  // What is multiplied next, when this is known.
  const std::shared_ptr<WeightStart>& after() const { return w_.after(); }
  // Row blocks to take together.
  std::int64_t group() const {
    if (!narrow_) return group_of(kRowBlock * x_.cols() * 4);
    return kernels_.amx ? kTileGroup : group_of(block_bytes());
  }
  // Floats that run() needs beside its output.
  std::int64_t sums(std::int64_t rows, std::int64_t panels) const {
    return narrow_ ? kernels_.gemm_sums(rows, panels, x_.cols()) : 0;
  }
  // Rows [m0, m1), m0 being a multiple of kRowBlock, times panels [p0, p1). next: what the thread reads after them.
  void run(const void* area, std::int64_t m0, std::int64_t m1, std::int64_t p0, std::int64_t p1, const PartOut& out,
           float* sums, const void* next) const {
    const std::int64_t prepared = m0 / kRowBlock * block_bytes();
    const GemmArgs g{.a = narrow_ ? static_cast<const std::byte*>(area) + prepared : x_.at(m0),
                     .lda = x_.stride[0],
                     .w = w_.panel(p0),
                     .m = m1 - m0,
                     .n = std::min(w_.rows(), p1 * kPanel) - p0 * kPanel,
                     .k = x_.cols(),
                     .bias = out.bias,
                     .out = out.data,
                     .ldo = out.stride,
                     .out_bf16 = is_bf16(out.dtype),
                     .accumulate = out.accumulate,
                     .sums = sums,
                     .next = next};
    (narrow_ ? kernels_.gemm_bf16 : kernels_.gemm_f32)(g, 0, m1 - m0, 0, p1 - p0);
  }

 private:
  const Kernels& kernels_;
  const Tensor& x_;
  const DenseWeight& w_;
  bool narrow_;
};

// The same with a weight in groups of codes.
class QuantProduct {
 public:
  QuantProduct(const Kernels& kernels, const Tensor& x, const QuantWeight& w) : kernels_(kernels), x_(x), w_(w) {
    assert(x.cols() == w.cols());
  }

  std::int64_t block_bytes() const { return kernels_.prepared_quant_bytes(x_.cols()); }
  void prepare(std::int64_t block, void* area) const {
    const QuantRows rows{.x = x_.data,
                         .x_bf16 = is_bf16(x_.dtype),
                         .ldx = x_.stride[0],
                         .k = x_.cols(),
                         .group = w_.format().size,
                         .offsets = w_.format().offsets,
                         .zero = w_.format().zero,
                         .order = w_.order()};
    kernels_.prepare_quant(rows, block * kRowBlock, std::min(x_.rows(), (block + 1) * kRowBlock), area);
  }
  // Codes take their time; nothing is gained from knowing.
  std::shared_ptr<WeightStart> after() const { return nullptr; }
  std::int64_t group() const { return group_of(block_bytes()); }
  std::int64_t sums(std::int64_t rows, std::int64_t) const {
    return kernels_.quant_sums(rows, x_.cols(), w_.format().size);
  }
  void run(const void* area, std::int64_t m0, std::int64_t m1, std::int64_t p0, std::int64_t p1, const PartOut& out,
           float* sums, const void*) const {
    const GroupFormat& f = w_.format();
    const QuantArgs g{.a = static_cast<const std::byte*>(area) + m0 / kRowBlock * block_bytes(),
                      .w = w_.panel(p0),
                      .m = m1 - m0,
                      .n = std::min(w_.rows(), p1 * kPanel) - p0 * kPanel,
                      .k = x_.cols(),
                      .bits = f.bits,
                      .group = f.size,
                      .offsets = f.offsets,
                      .zero = f.zero,
                      .bias = out.bias,
                      .out = out.data,
                      .ldo = out.stride,
                      .out_bf16 = is_bf16(out.dtype),
                      .accumulate = out.accumulate,
                      .sums = sums};
    kernels_.gemm_quant(g, 0, m1 - m0, 0, p1 - p0);
  }

 private:
  const Kernels& kernels_;
  const Tensor& x_;
  const QuantWeight& w_;
};

// f(product) with the product that suits the weight.
template <class F>
void with_product(const Kernels& kernels, const Tensor& x, const CpuWeight& w, F&& f) {
  if (const QuantWeight* quant = w.quant()) {
    f(QuantProduct(kernels, x, *quant));
  } else {
    f(DenseProduct(kernels, x, static_cast<const DenseWeight&>(w)));
  }
}

}  // namespace

// What is taken together: row blocks and panels at most, and the room its sums need.
template <class Sums>
struct ProductCut {
  std::int64_t group, chunk;
  Sums sums;  // (rows, panels) -> floats
};
template <class Sums>
ProductCut(std::int64_t, std::int64_t, Sums) -> ProductCut<Sums>;  // clang 14 does not deduce it

std::unique_ptr<PackedWeight> CpuBackend::pack(const HostMatrix& weight, DType compute) {
  assert(compute == DType::F32 || compute == DType::BF16);
  if (weight.groups.bits != 0) return pack_groups(weight, kernels_, arena_, pool_);
  auto packed = std::make_unique<DenseWeight>(arena_, weight.rows, weight.cols, compute);
  const std::int64_t k = weight.cols;
  const std::size_t rows_bytes = static_cast<std::size_t>(kPanel * k) * 4;
  const std::size_t stride = rows_bytes + static_cast<std::size_t>(round_up(k, 64)) * 2;
  Scratch scratch;
  auto* base = static_cast<std::byte*>(scratch.get(stride * static_cast<std::size_t>(pool_.size())));
  std::exception_ptr failure;
  std::mutex failed;
  const auto pack_panel = [&](std::int64_t p, float* rows) {
    const std::int64_t begin = p * kPanel, end = std::min(begin + kPanel, weight.rows);
    if (is_bf16(compute) && weight.read_bf16) {
      auto* bits = reinterpret_cast<std::uint16_t*>(rows);
      weight.read_bf16(begin, end, bits);
      interleave_rows(bits, end - begin, k, reinterpret_cast<std::uint16_t*>(packed->panel(p)));
      return;
    }
    weight.read(begin, end, rows);
    if (is_bf16(compute)) {
      auto* tmp = reinterpret_cast<std::uint16_t*>(reinterpret_cast<std::byte*>(rows) + rows_bytes);
      kernels_.pack_bf16(rows, end - begin, k, reinterpret_cast<std::uint16_t*>(packed->panel(p)), tmp);
    } else {
      kernels_.pack_f32(rows, end - begin, k, reinterpret_cast<float*>(packed->panel(p)));
    }
  };
  pool_.run([&](int thread) {
    try {
      auto* rows = reinterpret_cast<float*>(base + stride * static_cast<std::size_t>(thread));
      const Share mine = share_of(packed->panels(), thread, pool_.size());  // as multiply() reads them
      for (std::int64_t p = mine.begin; p < mine.end; ++p) pack_panel(p, rows);
    } catch (...) {
      const std::lock_guard lock(failed);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  return packed;
}

void CpuBackend::embed(const Tensor& out, const Step& step, const PackedWeight& table, std::int64_t id_begin,
                       float scale) {
  const auto& ids = cpu_step(step).ids;
  const auto& w = static_cast<const CpuWeight&>(table);
  assert(out.dtype == DType::F32 && out.cols() == w.cols() && static_cast<std::size_t>(out.rows()) == ids.size());
  split(out.rows(), out.cols() * 4, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      auto* row = static_cast<float*>(out.at(t));
      const std::int64_t id = ids[static_cast<std::size_t>(t)] - id_begin;
      if (id >= 0 && id < w.rows()) {
        w.read_row(id, scale, row);
      } else {
        std::fill_n(row, w.cols(), 0.0f);
      }
    }
  });
}

WeightStart CpuBackend::in_order(const WeightStart& now, const std::shared_ptr<WeightStart>& after) {
  *after_last_ = now;
  after_last_ = after;
  return *after;
}

// prepare(block, area): one block of activation rows as the product takes them, into an area of all blocks;
// block_bytes: of one of them, 0 when the product takes the rows as they are.
// product(area, m0, m1, p0, p1, sums, thread): rows [m0, m1) times panels [p0, p1); sums: room for cut.sums() floats.
template <class Sums, class Prepare, class Product>
void CpuBackend::multiply(std::int64_t m, std::int64_t panels, std::int64_t block_bytes, const ProductCut<Sums>& cut,
                          Prepare&& prepare, Product&& product) {
  const std::int64_t row_blocks = (m + kRowBlock - 1) / kRowBlock;
  const int threads = pool_.size();
  const auto lines = [](std::int64_t bytes) { return static_cast<std::size_t>(round_up(bytes, 128)); };
  if (row_blocks == 1) {
    // Bound by reading the weights: each thread streams one contiguous share and prepares the few rows for itself.
    const std::size_t rows_bytes = lines(block_bytes), each = rows_bytes + lines(cut.sums(m, panels) * 4);
    auto* scratch = thread_scratch(each);
    pool_.run([&](int i) {
      const auto [p0, p1] = share_of(panels, i, threads);
      if (p0 == p1) return;
      std::byte* a = scratch + each * static_cast<std::size_t>(i);
      if (block_bytes > 0) prepare(0, a);
      product(a, 0, m, p0, p1, reinterpret_cast<float*>(a + rows_bytes), i);
    });
    return;
  }
  std::byte* a = nullptr;
  if (block_bytes > 0) {
    a = static_cast<std::byte*>(shared_.get(static_cast<std::size_t>(block_bytes * row_blocks)));
    split(row_blocks, block_bytes, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t b = begin; b < end; ++b) prepare(b, a);
    });
  }
  // Groups of rows that stay in the second-level cache while panels stream past. A thread goes through neighbouring
  // panels, so what it fetches ahead is its own; threads of different groups meet the same panels at about one time.
  const std::int64_t groups = (row_blocks + cut.group - 1) / cut.group;
  const std::int64_t group = (row_blocks + groups - 1) / groups;  // blocks
  const std::int64_t chunk = std::clamp<std::int64_t>(panels * groups / (threads * 8), 1, cut.chunk);
  const std::int64_t chunks = (panels + chunk - 1) / chunk;
  const std::size_t sums_bytes = lines(cut.sums(group * kRowBlock, chunk) * 4);
  auto* sums = thread_scratch(sums_bytes);
  share_ranges(chunks * groups, [&](std::int64_t item, int thread) {
    const std::int64_t b = item / chunks * group, p = item % chunks * chunk;
    product(a, b * kRowBlock, std::min(m, (b + group) * kRowBlock), p, std::min(panels, p + chunk),
            reinterpret_cast<float*>(sums + sums_bytes * static_cast<std::size_t>(thread)), thread);
  });
}

void CpuBackend::linear(const Tensor& out, const Tensor& x, const PackedWeight& weight, const float* bias,
                        bool accumulate) {
  const auto& w = static_cast<const CpuWeight&>(weight);
  assert(x.cols() == w.cols() && out.cols() == w.rows() && out.rows() == x.rows());
  const std::int64_t m = x.rows();
  if (m == 0) return;
  with_product(kernels_, x, w, [&](const auto& product) {
    const WeightStart after =
        product.after() && m <= kRowBlock ? in_order(w.start(w.panels()), product.after()) : WeightStart{};
    const auto sums = [&](std::int64_t rows, std::int64_t panels) { return product.sums(rows, panels); };
    multiply(
        m, w.panels(), product.block_bytes(), ProductCut{product.group(), 16, sums},
        [&](std::int64_t block, void* area) { product.prepare(block, area); },
        [&](const void* area, std::int64_t m0, std::int64_t m1, std::int64_t p0, std::int64_t p1, float* room,
            int thread) {
          const std::int64_t n = p0 * kPanel;
          product.run(
              area, m0, m1, p0, p1,
              {out.columns(n, out.cols() - n).at(m0), out.stride[0], out.dtype, bias ? bias + n : nullptr, accumulate},
              room, after.of(thread, pool_.size()));
        });
  });
}

void CpuBackend::gated_linear(const Tensor& out, const Tensor& scratch, const Tensor& x, const PackedWeight& weight,
                              const float* bias, Activation act) {
  const auto& w = static_cast<const CpuWeight&>(weight);
  const std::int64_t m = x.rows(), inner = out.cols(), panels = inner / kPanel;
  if (inner % kPanel != 0) {
    Backend::gated_linear(out, scratch, x, weight, bias, act);
    return;
  }
  assert(w.rows() == 2 * inner && out.dtype == x.dtype && out.rows() == m);
  if (m == 0) return;
  // Gates and what they let through meet in the cache of the thread that makes both.
  constexpr std::int64_t kChunk = 8;  // panels
  const auto element = static_cast<std::int64_t>(size_of(out.dtype));
  with_product(kernels_, x, w, [&](const auto& product) {
    const WeightStart after =
        product.after() && m <= kRowBlock ? in_order(w.start(panels), product.after()) : WeightStart{};
    const auto sums = [&](std::int64_t rows, std::int64_t p) {
      return round_up(product.sums(rows, std::min(p, kChunk)), 32);
    };
    const auto room_of = [&](std::int64_t rows, std::int64_t p) {
      return sums(rows, p) + rows * 2 * std::min(p, kChunk) * kPanel;
    };
    multiply(
        m, panels, product.block_bytes(), ProductCut{product.group(), kChunk, room_of},
        [&](std::int64_t block, void* area) { product.prepare(block, area); },
        [&](const void* area, std::int64_t m0, std::int64_t m1, std::int64_t p0, std::int64_t p1, float* room,
            int thread) {
          auto* both = reinterpret_cast<std::byte*>(room + sums(m1 - m0, p1 - p0));
          for (std::int64_t p = p0; p < p1; p += kChunk) {
            const std::int64_t q = std::min(p1, p + kChunk), width = (q - p) * kPanel;
            for (const std::int64_t half : {0, 1}) {
              const std::int64_t first = half * panels;
              product.run(area, m0, m1, first + p, first + q,
                          {both + half * width * element, 2 * width, out.dtype,
                           bias ? bias + (first + p) * kPanel : nullptr, false},
                          room,
                          half == 0 ? w.panel(panels + p)
                          : q < p1  ? w.panel(q)
                                    : after.of(thread, pool_.size()));
            }
            const std::byte* gate = both;
            for (std::int64_t r = m0; r < m1; ++r, gate += 2 * width * element) {
              kernels_.gated_act(out.columns(p * kPanel, width).at(r), gate, gate + width * element, is_bf16(out.dtype),
                                 width, to_act(act));
            }
          }
        });
  });
}

}  // namespace fastllm::cpu

#include "gemm.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <optional>
#include <unordered_map>
#include <vector>

#include "devices.h"
#include "elementwise.h"
#include "gemm_lt.h"
#include "gemm_table.h"
#include "gemm_tile.h"
#include "gemm_tune.h"
#include "skinny.h"

namespace fastllm::cuda {
namespace {

constexpr std::int64_t kUsualRows = 256;   // what the one algorithm of deterministic products is proposed for
constexpr std::int64_t kExactRows = 1024;  // up to here proposals are for the very size
// Rows for which tiles are as fast as cuBLASLt or faster; with a gated activation to apply they are for any.
constexpr std::int64_t kTiledFrom = 1024, kTiledTo = 4096;
constexpr float kActivationUs = 2;  // of the launch that a fused product saves

// How to compute one shape for one number of rows.
struct Way {
  std::optional<SkinnyConfig> own;  // where the call fits
  LtAlgo algo;
};

struct Product {
  GemmShape shape;
  bool bias;  // added by cuBLASLt
  LtProduct lt;
  std::unordered_map<std::int64_t, Way> ways{};                           // by rows
  std::unordered_map<std::int64_t, std::optional<SkinnyConfig>> gated{};  // by rows
};

std::string describe(const GemmShape& s, std::int64_t m) {
  return std::string(name_of(s.dtype)) + " [" + std::to_string(m) + ", " + std::to_string(s.k) + "] x [" +
         std::to_string(s.k) + ", " + std::to_string(s.n) + "] to " + name_of(s.out_dtype);
}

}  // namespace

struct Gemm::Impl {
  explicit Impl(const GemmOptions& o);

  Product& product(const GemmShape& shape, bool bias);
  const Way& way(Product& p, std::int64_t m);
  Way choose(Product& p, std::int64_t m);
  LtAlgo any_algorithm(Product& p, std::int64_t m);
  LtAlgo invariant_algorithm(Product& p);
  std::optional<SkinnyConfig> gated_config(const GemmShape& shape, std::int64_t m) const;
  // Whether the tiled kernel took the call.
  bool run_tiled(const GemmCall& call, std::optional<Activation> gated, cudaStream_t stream) const;

  GemmOptions options;
  LtContext context;
  int num_sms = 0;
  bool own_kernels = false;
  std::unique_ptr<TileGemm> tiles;
  std::string title, file;  // of the table
  GemmTable table;
  std::vector<std::unique_ptr<Product>> products;  // a dozen
};

Gemm::Impl::Impl(const GemmOptions& o) : options(o) {
  int device = 0;
  cudaDeviceProp properties{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  num_sms = properties.multiProcessorCount;
  tiles = TileGemm::make(capability_of(device));
  if (options.deterministic) return;
  own_kernels = prepare_skinny(properties.sharedMemPerBlockOptin);
  const std::size_t version = context.lt().GetVersion();
  title = std::string("fastllm products 4, ") + properties.name + ", " + std::to_string(num_sms) + " SMs, cuBLASLt " +
          std::to_string(version);
  file = gemm_table_file(properties.name, version);
  table = GemmTable::load(file, title);
}

Product& Gemm::Impl::product(const GemmShape& shape, bool bias) {
  for (const auto& p : products) {
    if (p->bias == bias && p->shape == shape) return *p;
  }
  products.push_back(std::unique_ptr<Product>(new Product{shape, bias, {context, shape, bias}}));
  return *products.back();
}

const Way& Gemm::Impl::way(Product& p, std::int64_t m) {
  const auto found = p.ways.find(m);
  if (found != p.ways.end()) return found->second;
  return p.ways.emplace(m, choose(p, m)).first->second;
}

Way Gemm::Impl::choose(Product& p, std::int64_t m) {
  if (options.deterministic) {
    return {std::nullopt, p.ways.empty() ? invariant_algorithm(p) : p.ways.begin()->second.algo};
  }
  const GemmTable::Entry* e = tuned_rows(m) == 0 ? nullptr : table.nearest(p.shape, m);
  if (e == nullptr) return {std::nullopt, any_algorithm(p, m)};
  Way w;
  if (own_kernels && m <= e->m && e->timing.own_is_best()) w.own = e->timing.own;
  const bool usable = e->timing.lt_us != GemmTiming::kNone && p.lt.takes(e->timing.algo, m);
  w.algo = usable ? e->timing.algo : any_algorithm(p, m);
  return w;
}

LtAlgo Gemm::Impl::any_algorithm(Product& p, std::int64_t m) {
  // Mixed steps come in any size: a proposal costs the host some 50 us, so that it is shared by sizes that are near.
  const std::int64_t bucket = m <= kExactRows ? m : (m + kExactRows / 4 - 1) / (kExactRows / 4) * (kExactRows / 4);
  for (const std::int64_t rows : {bucket, m}) {
    const auto algos = p.lt.propose(rows, 1);
    if (!algos.empty() && p.lt.takes(algos[0], m)) return algos[0];
  }
  throw ResourceError("cuBLASLt has no algorithm for the product " + describe(p.shape, m));
}

LtAlgo Gemm::Impl::invariant_algorithm(Product& p) {
  constexpr int kMost = 32;
  constexpr std::array<std::int64_t, 4> kMustTake = {1, 17, kUsualRows, 8192};
  for (const LtAlgo& algo : p.lt.propose(kUsualRows, kMost, true)) {
    if (std::all_of(kMustTake.begin(), kMustTake.end(), [&](std::int64_t m) { return p.lt.takes(algo, m); }))
      return algo;
  }
  throw ResourceError("cuBLASLt has no algorithm without split sums for the product " + describe(p.shape, kUsualRows));
}

std::optional<SkinnyConfig> Gemm::Impl::gated_config(const GemmShape& shape, std::int64_t m) const {
  const GemmTable::Entry* e = table.nearest(shape, m);
  if (e == nullptr || m > e->m || e->m > kSkinnyRows || !e->timing.own_is_best(kActivationUs)) return std::nullopt;
  return e->timing.own;
}

bool Gemm::Impl::run_tiled(const GemmCall& call, std::optional<Activation> gated, cudaStream_t stream) const {
  const bool faster = gated ? call.m > kSkinnyRows : call.m >= kTiledFrom && call.m <= kTiledTo;
  if (!tiles || !(options.deterministic || faster) || !tile_gemm_supports(call, gated.has_value())) return false;
  tiles->run(call, gated, plan_tiles(call.m, call.w.n, call.w.k, gated.has_value(), tiles->clusters()), stream);
  return true;
}

Gemm::Gemm(const GemmOptions& options) : impl_(std::make_unique<Impl>(options)) {}
Gemm::~Gemm() = default;

void Gemm::run(const GemmCall& call, cudaStream_t stream) {
  if (call.m == 0) return;
  Impl& g = *impl_;
  if (g.run_tiled(call, std::nullopt, stream)) return;
  const bool lt_adds_bias = call.bias != nullptr && call.out_dtype == DType::F32;
  Product& p = g.product(shape_of(call), lt_adds_bias);
  const Way& way = g.way(p, call.m);
  if (way.own && skinny_supports(call)) {
    skinny_gemm(call, std::nullopt, *way.own, g.num_sms, stream);
  } else if (call.bias == nullptr || lt_adds_bias) {
    p.lt.run(call, way.algo, stream);
  } else {
    GemmCall bare = call;
    bare.bias = nullptr;
    p.lt.run(bare, way.algo, stream);
    add_bias(call.out, call.ldo, call.out_dtype, call.bias, call.m, call.w.n, stream);
  }
}

bool Gemm::run_gated(const GemmCall& call, int act, cudaStream_t stream) {
  Impl& g = *impl_;
  assert(!call.accumulate && call.w.n % 2 == 0);
  if (g.run_tiled(call, static_cast<Activation>(act), stream)) return true;
  if (!g.own_kernels || !skinny_supports(call)) return false;
  Product& p = g.product(shape_of(call), false);
  auto found = p.gated.find(call.m);
  if (found == p.gated.end()) found = p.gated.emplace(call.m, g.gated_config(p.shape, call.m)).first;
  if (!found->second) return false;
  skinny_gemm(call, static_cast<Activation>(act), *found->second, g.num_sms, stream);
  return true;
}

void Gemm::tune(const WeightView& w, DType out_dtype, bool accumulate, std::span<const std::int64_t> ms,
                cudaStream_t stream) {
  Impl& g = *impl_;
  if (!g.own_kernels || w.dtype != DType::BF16) return;
  const GemmShape shape{w.n, w.k, w.dtype, out_dtype, accumulate};
  std::vector<std::int64_t> missing;
  for (const std::int64_t rows : ms) {
    const std::int64_t m = tuned_rows(rows);
    if (m > 0 && !g.table.has(shape, m)) missing.push_back(m);
  }
  if (missing.empty()) return;
  check(cudaStreamSynchronize(stream), "the work before tuning");
  std::optional<GemmTuner> tuner;
  try {
    tuner.emplace(g.context, shape, w.data, *std::max_element(missing.begin(), missing.end()), g.num_sms,
                  g.own_kernels);
  } catch (const ResourceError&) {
    return;  // no memory to measure on: what is proposed first will do
  }
  for (const std::int64_t m : missing) {
    if (!g.table.has(shape, m)) g.table.add(shape, m, tuner->measure(m));
  }
  for (const auto& p : g.products) {
    if (p->shape == shape) p->ways.clear(), p->gated.clear();
  }
  g.table.save(g.file, g.title);
}

std::size_t Gemm::workspace_bytes() const { return LtContext::kWorkspaceBytes; }

}  // namespace fastllm::cuda

// What the step's attention consists of, and who computes which part.
#include <algorithm>
#include <atomic>
#include <cassert>
#include <vector>

#include "backend/cpu/cpu_backend.h"

namespace fastllm::cpu {
namespace {

constexpr std::int64_t kMinPieceTiles = 2;  // KV tiles
constexpr std::int64_t kPiecesAThread = 2;  // wanted of a step, for every kv head

std::int64_t tiles_until(std::int64_t pos) { return (pos + kKvTile - 1) / kKvTile; }
std::int64_t tiles_of(const AttnRow& row) { return tiles_until(row.first_pos + row.num_tokens); }

const void* element(const void* base, std::int64_t i, DType t) {
  return static_cast<const std::byte*>(base) + i * static_cast<std::int64_t>(size_of(t));
}

KvType kv_type(DType t) {
  switch (t) {
    case DType::BF16:
      return KvType::BF16;
    case DType::F16:
      return KvType::F16;
    case DType::I8:
      return KvType::I8;
    default:
      assert(t == DType::F32);
      return KvType::F32;
  }
}

}  // namespace

void AttnPlan::make(std::span<const AttnRow> rows, int threads) {
  items.clear();
  splits.clear();
  split_tiles = 0;
  max_tokens = 0;
  std::int64_t few_token_tiles = 0;
  for (const AttnRow& row : rows) few_token_tiles += row.num_tokens <= kSplitTokens ? tiles_of(row) : 0;
  piece_tiles_ = std::max(kMinPieceTiles, few_token_tiles / (threads * kPiecesAThread));
  for (std::size_t r = 0; r < rows.size(); ++r) add_row(static_cast<std::int32_t>(r), rows[r]);
  // The longest first: what is left for the end is short. Dealt out, so that every thread's range has as much to do.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return (a.tile_end - a.tile_begin) * (a.tokens + 4) > (b.tile_end - b.tile_begin) * (b.tokens + 4);
  });
  const std::vector<Item> sorted = items;
  const auto stride = static_cast<std::size_t>(threads);
  auto to = items.begin();
  for (std::size_t first = 0; first < stride; ++first)
    for (std::size_t i = first; i < sorted.size(); i += stride) *to++ = sorted[i];
}

void AttnPlan::add_row(std::int32_t r, const AttnRow& row) {
  const std::int64_t all_tiles = tiles_of(row);
  max_tokens = std::max(max_tokens, std::min(row.num_tokens, static_cast<std::int32_t>(kQueryBlock)));
  if (row.num_tokens <= kSplitTokens && all_tiles > piece_tiles_) {
    const std::int64_t pieces = (all_tiles + piece_tiles_ - 1) / piece_tiles_;
    for (std::int64_t p = 0; p < pieces; ++p) {
      items.push_back({r, 0, row.num_tokens, p * piece_tiles_, std::min(all_tiles, (p + 1) * piece_tiles_),
                       static_cast<std::int32_t>(splits.size())});
    }
    splits.push_back({r, all_tiles, pieces, split_tiles});
    split_tiles += all_tiles;
    return;
  }
  for (std::int32_t t = 0; t < row.num_tokens; t += static_cast<std::int32_t>(kQueryBlock)) {
    const std::int32_t n = std::min(row.num_tokens - t, static_cast<std::int32_t>(kQueryBlock));
    items.push_back({r, t, n, 0, tiles_until(row.first_pos + t + n), -1});
  }
}

bool CpuBackend::kv_in_pairs(const KvView& kv, DType activations) const {
  return kernels_.kv_pairs && is_bf16(activations) && kv_fits_pairs(kv_type(kv.dtype), kv.block_size, kv.head_dim);
}

void CpuBackend::attention(const Tensor& out, const Tensor& q, const Step& base, const KvView& kv,
                           const AttnArgs& args) {
  const CpuStep& step = cpu_step(base);
  const AttnPlan& plan = step.attention;
  assert(q.dtype == out.dtype && args.heads % args.kv_heads == 0 && kv.head_dim == args.head_dim);
  const int group = args.heads / args.kv_heads, kv_heads = args.kv_heads;
  const std::int64_t dim = args.head_dim;

  const auto task_of = [&](const AttnPlan::Item& item, int head) {
    const AttnRow& row = step.rows[static_cast<std::size_t>(item.row)];
    AttnTask t{};
    const std::int64_t token = row.token_begin + item.token;
    t.q = element(q.data, token * q.stride[0] + head * group * dim, q.dtype);
    t.out = const_cast<void*>(element(out.data, token * out.stride[0] + head * group * dim, out.dtype));
    t.q_stride = q.stride[0];
    t.out_stride = out.stride[0];
    t.bf16 = is_bf16(q.dtype);
    t.tokens = item.tokens;
    t.first_pos = row.first_pos + item.token;
    t.group = group;
    t.head_dim = args.head_dim;
    t.kv = element(kv.base, head * kv.head_stride, kv.dtype);
    t.kv_type = kv_type(kv.dtype);
    t.table = reinterpret_cast<const std::int32_t*>(row.table.data());
    t.block_size = kv.block_size;
    t.block_stride = kv.block_stride;
    t.kv_stride = kv.kv_stride;
    t.kv_pairs = kv_in_pairs(kv, q.dtype);
    t.scale = args.scale;
    t.softcap = args.softcap;
    t.window = args.window;
    t.slopes = args.alibi_slopes.empty() ? nullptr : args.alibi_slopes.data() + head * group;
    const std::int64_t oldest = args.window > 0 ? std::max(0, t.first_pos - args.window + 1) : 0;
    t.tile_begin = std::max(item.tile_begin, oldest / kKvTile);
    t.tile_end = item.tile_end;
    return t;
  };

  const std::int64_t scratch_floats = round_up(kernels_.attn_scratch(plan.max_tokens * group, dim), 32);
  auto* scratch = reinterpret_cast<float*>(thread_scratch(static_cast<std::size_t>(scratch_floats) * 4));
  const std::int64_t partial = partial_floats(kSplitTokens * group, dim);
  const std::size_t num_splits = plan.splits.size() * static_cast<std::size_t>(kv_heads);
  float* partials = nullptr;
  std::vector<std::atomic<std::int64_t>> left(num_splits);  // pieces not yet done
  if (num_splits > 0) {
    partials = static_cast<float*>(shared_.get(static_cast<std::size_t>(plan.split_tiles * kv_heads * partial) * 4));
    for (std::size_t i = 0; i < num_splits; ++i) left[i] = plan.splits[i / static_cast<std::size_t>(kv_heads)].pieces;
  }

  const std::int64_t tasks = static_cast<std::int64_t>(plan.items.size()) * kv_heads;
  const auto item_of = [&](std::int64_t i) -> const AttnPlan::Item& {
    return plan.items[static_cast<std::size_t>(i / kv_heads)];
  };
  share_ranges(tasks, [&](std::int64_t i, int thread) {
    const AttnPlan::Item& item = item_of(i);
    const int head = static_cast<int>(i % kv_heads);
    float* mine = scratch + thread * scratch_floats;
    AttnTask task = task_of(item, head), then;
    if (i + 1 < tasks) {
      then = task_of(item_of(i + 1), static_cast<int>((i + 1) % kv_heads));
      task.then = &then;
    }
    if (item.split < 0) {
      kernels_.attend(task, mine);
      return;
    }
    const AttnPlan::Split& s = plan.splits[static_cast<std::size_t>(item.split)];
    task.partials = partials + (s.first_tile * kv_heads + s.tiles * head) * partial;
    if (task.tile_begin < task.tile_end) kernels_.attend(task, mine);
    auto& pieces = left[static_cast<std::size_t>(item.split * kv_heads + head)];
    if (pieces.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    AttnPlan::Item whole = item;  // the last to finish merges
    whole.tile_begin = 0;
    whole.tile_end = s.tiles;
    AttnTask all = task_of(whole, head);
    all.partials = task.partials;
    kernels_.merge(all, mine);
  });
}

void CpuBackend::qk_norm_rope_write_kv(const Tensor& qkv, const Step& step, int heads, const NormSpec& q_norm,
                                       const float* q_weight, const NormSpec& k_norm, const float* k_weight,
                                       const RopeArgs& rope, const KvView& kv) {
  const RopeKvArgs a{.qkv = qkv.data,
                     .ld = qkv.stride[0],
                     .bf16 = is_bf16(qkv.dtype),
                     .heads = heads,
                     .kv_heads = kv.kv_heads,
                     .head_dim = kv.head_dim,
                     .q_weight = q_weight,
                     .k_weight = k_weight,
                     .q_eps = q_norm.eps,
                     .k_eps = k_norm.eps,
                     .q_norm = q_norm.kind != NormKind::None,
                     .k_norm = k_norm.kind != NormKind::None,
                     .q_layer = q_norm.kind == NormKind::Layer,
                     .k_layer = k_norm.kind == NormKind::Layer,
                     .cos_sin = rope.cos_sin,
                     .rope_dim = rope.dim,
                     .interleaved = rope.style == RopeStyle::Interleaved,
                     .kv = kv.base,
                     .kv_type = kv_type(kv.dtype),
                     .block_size = kv.block_size,
                     .block_stride = kv.block_stride,
                     .kv_stride = kv.kv_stride,
                     .head_stride = kv.head_stride,
                     .kv_pairs = kv_in_pairs(kv, qkv.dtype)};
  const std::size_t stride = static_cast<std::size_t>(round_up(kv.head_dim, 32)) * 4;
  auto* scratch = thread_scratch(stride);
  split(qkv.rows(), qkv.cols() * 2, [&](std::int64_t begin, std::int64_t end, int thread) {
    auto* tmp = reinterpret_cast<float*>(scratch + stride * static_cast<std::size_t>(thread));
    for (const AttnRow& row : cpu_step(step).rows) {
      const std::int64_t first = std::max<std::int64_t>(begin, row.token_begin);
      const std::int64_t last = std::min<std::int64_t>(end, row.token_begin + row.num_tokens);
      for (std::int64_t t = first; t < last; ++t) {
        const std::int64_t pos = row.first_pos + (t - row.token_begin);
        const BlockId block = row.table[static_cast<std::size_t>(pos / kv.block_size)];
        kernels_.rope_kv(a, t, pos, static_cast<std::int64_t>(index(block)), pos % kv.block_size, tmp);
      }
    }
  });
}

}  // namespace fastllm::cpu

// Norms, activations, rotary embeddings with the KV write, and the small moves, against scalar fp64.
#include "exact_activation.h"
#include "op_testing.h"

namespace fastllm::test {
namespace {

class Elementwise : public OpTest {};

TEST_P(Elementwise, norm_matches_fp64) {
  for (const std::int64_t cols : {1, 16, 33, 64, 80, 576}) {
    for (const NormKind kind : {NormKind::Rms, NormKind::Layer}) {
      for (const DType in : {DType::F32, DType::BF16}) {
        for (const DType out_type : {DType::F32, DType::BF16}) {
          const std::int64_t rows = 7;
          const Array x = Array(in, rows, cols).fill(random, 2.0f);
          const Array wb = Array(DType::F32, 2, cols).fill(random);
          const bool bias = kind == NormKind::Layer;
          Array out(out_type, rows, cols);
          const NormSpec spec{kind, 1e-5f, bias};
          backend->norm(out.tensor(), x.tensor(), spec, wb.tensor().ptr<float>(),
                        bias ? wb.tensor().ptr<float>() + cols : nullptr);
          for (std::int64_t r = 0; r < rows; ++r) {
            double mean = 0, square = 0;
            for (std::int64_t c = 0; c < cols; ++c) mean += x.get(r, c) / static_cast<double>(cols);
            if (kind == NormKind::Rms) mean = 0;
            for (std::int64_t c = 0; c < cols; ++c) square += (x.get(r, c) - mean) * (x.get(r, c) - mean);
            const double s = 1.0 / std::sqrt(square / static_cast<double>(cols) + static_cast<double>(spec.eps));
            for (std::int64_t c = 0; c < cols; ++c) {
              const double want = (x.get(r, c) - mean) * s * wb.get(0, c) + (bias ? wb.get(1, c) : 0.0f);
              ASSERT_TRUE(close(out.get(r, c), want, tolerance_of(out_type)))
                  << out.get(r, c) << " not " << want << " cols " << cols << " layer " << bias;
            }
          }
        }
      }
    }
  }
}

TEST_P(Elementwise, add_norm_equals_add_then_norm) {
  const std::int64_t rows = 40, cols = 100;
  Array residual = Array(DType::F32, rows, cols).fill(random);
  Array other = residual;
  const Array delta = Array(DType::F32, rows, cols).fill(random);
  const Array weight = Array(DType::F32, 1, cols).fill(random);
  Array out(DType::BF16, rows, cols), want(DType::BF16, rows, cols);
  const NormSpec spec{NormKind::Rms, 1e-6f, false};
  backend->add_norm(out.tensor(), residual.tensor(), delta.tensor(), spec, weight.tensor().ptr<float>(), nullptr);
  backend->add(other.tensor(), delta.tensor());
  backend->norm(want.tensor(), other.tensor(), spec, weight.tensor().ptr<float>(), nullptr);
  for (std::int64_t r = 0; r < rows; ++r) {
    EXPECT_TRUE(residual.same_row(r, other, r));
    EXPECT_TRUE(out.same_row(r, want, r));
  }
}

TEST_P(Elementwise, activations_match_fp64) {
  for (const Activation act : {Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu}) {
    for (const DType dtype : {DType::F32, DType::BF16}) {
      for (const std::int64_t rows : {1, 5, 70}) {
        const std::int64_t inner = 333;
        Array gate_up = Array(dtype, rows, 2 * inner).fill(random, 4.0f);
        gate_up.set(0, 0, -200.0f);
        gate_up.set(0, 1, 200.0f);
        gate_up.set(0, 2, 0.0f);
        Array out(dtype, rows, inner), plain = gate_up;
        backend->gated_act(out.tensor(), gate_up.tensor(), act);
        backend->act(plain.tensor(), act);
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t c = 0; c < inner; ++c) {
            const double want = exact_activation(gate_up.get(r, c), act);
            ASSERT_TRUE(close(out.get(r, c), want * gate_up.get(r, c + inner), tolerance_of(dtype)))
                << out.get(r, c) << " for " << gate_up.get(r, c);
            ASSERT_TRUE(close(plain.get(r, c), want, tolerance_of(dtype))) << plain.get(r, c);
          }
        }
      }
    }
  }
}

TEST_P(Elementwise, scale_softcap_matches_fp64) {
  Array logits = Array(DType::F32, 3, 1001).fill(random, 50.0f);
  const Array before = logits;
  backend->scale_softcap(logits.tensor(), 0.5f, 30.0f);
  for (std::int64_t r = 0; r < 3; ++r)
    for (std::int64_t c = 0; c < 1001; ++c)
      ASSERT_TRUE(close(logits.get(r, c), 30.0 * std::tanh(0.5 * before.get(r, c) / 30.0), 2e-6));
  Array scaled = before;
  backend->scale_softcap(scaled.tensor(), 0.5f, 0.0f);
  EXPECT_EQ(scaled.get(2, 1000), 0.5f * before.get(2, 1000));
}

TEST_P(Elementwise, moves_rows_positions_and_blocks) {
  const Array x = Array(DType::BF16, 9, 30).fill(random);
  Array out(DType::BF16, 3, 30);
  const std::vector<std::int32_t> rows = {8, 0, 8};
  backend->gather_rows(out.tensor(), x.tensor(), rows);
  for (std::size_t i = 0; i < rows.size(); ++i) EXPECT_TRUE(out.same_row(static_cast<std::int64_t>(i), x, rows[i]));

  Array h = Array(DType::F32, 3, 30).fill(random);
  const Array before = h, table = Array(DType::F32, 9, 30).fill(random);
  init_steps(*backend, 16);
  std::vector<StepRow> tokens;
  for (int t = 0; t < 3; ++t) tokens.push_back({t, 1, rows[static_cast<std::size_t>(t)], SlotId{t}, false});
  backend->add_positions(h.tensor(), begin_step(*backend, tokens), table.tensor());
  EXPECT_EQ(h.get(1, 29), before.get(1, 29) + table.get(0, 29));
  EXPECT_EQ(h.get(2, 3), before.get(2, 3) + table.get(8, 3));

  Array pool = Array(DType::F32, 6, 30).fill(random);
  const Array old = pool;
  const std::pair<BlockId, BlockId> copies[] = {{BlockId{1}, BlockId{4}}, {BlockId{4}, BlockId{5}}};
  backend->copy_blocks(pool.tensor().data, pool.tensor().data, 120, copies);
  EXPECT_TRUE(pool.same_row(4, old, 1));
  EXPECT_TRUE(pool.same_row(5, old, 1));
  EXPECT_TRUE(pool.same_row(0, old, 0));
}

TEST_P(Elementwise, copied_blocks_keep_keys_and_values_of_every_cache) {
  const int blocks = 6, from = 4, to = 2;
  for (const DType dtype : {DType::F32, DType::BF16, DType::F16, DType::I8}) {
    SCOPED_TRACE(testing::Message() << name_of(dtype) << " seed " << test_seed());
    const KvShape shape{dtype, 2, 3, 8, 20};
    const auto bytes = static_cast<std::size_t>(shape.block_bytes());
    std::vector<std::byte> pool(bytes * blocks, std::byte{0xff});
    const auto each_slot = [&](int block, const auto& f) {
      for (int layer = 0; layer < shape.layers; ++layer)
        for (const bool is_v : {false, true})
          for (int head = 0; head < shape.kv_heads; ++head)
            for (int pos = 0; pos < shape.block_size; ++pos)
              f(KvSlot(layer_view(pool.data(), shape, layer), BlockId{block}, is_v, head, pos));
    };
    for (int block = 0; block < blocks; ++block) {
      each_slot(block, [&](KvSlot slot) {
        const Array x = Array(DType::F32, 1, shape.head_dim).fill(random);
        slot.set({x.tensor().ptr<float>(), static_cast<std::size_t>(shape.head_dim)});
      });
    }
    const auto values = [&](int block) {
      std::vector<float> all;
      each_slot(block, [&](const KvSlot& slot) {
        for (int d = 0; d < shape.head_dim; ++d) all.push_back(slot.get(d));
      });
      return all;
    };
    const auto want = values(from);
    const std::vector<std::byte> before = pool;
    const std::pair<BlockId, BlockId> copies[] = {{BlockId{from}, BlockId{to}}};
    backend->copy_blocks(pool.data(), pool.data(), bytes, copies);
    EXPECT_EQ(values(to), want);

    // Writing to the copy, as its new owner does, leaves the block that it came from.
    each_slot(to, [&](KvSlot slot) {
      const std::vector<float> x(static_cast<std::size_t>(shape.head_dim), 7.0f);
      slot.set(x);
    });
    EXPECT_EQ(values(from), want);
    for (int block = 0; block < blocks; ++block) {
      const auto at = static_cast<std::ptrdiff_t>(bytes) * block;
      const bool same =
          std::equal(pool.begin() + at, pool.begin() + at + static_cast<std::ptrdiff_t>(bytes), before.begin() + at);
      EXPECT_EQ(same, block != to) << "block " << block;
    }
  }
}

void check_rope(Backend& backend, Random& random, DType dtype, DType kv_dtype, int head_dim, int rope_dim,
                RopeStyle style, NormKind norm, int block_size = 8) {
  SCOPED_TRACE(testing::Message() << name_of(dtype) << " kv " << name_of(kv_dtype) << " head_dim " << head_dim
                                  << " rope " << rope_dim << " style " << int(style) << " norm " << int(norm));
  const int heads = 3, kv_heads = 2, blocks = 7;
  const KvShape shape{kv_dtype, 2, kv_heads, block_size, head_dim};
  std::vector<std::byte> pool(static_cast<std::size_t>(shape.block_bytes()) * blocks, std::byte{0xff});
  const KvView kv = layer_view(pool.data(), shape, 1);
  const bool in_pairs = kv_in_pairs(backend, kv, dtype);
  const std::vector<BlockId> table0 = {BlockId{3}, BlockId{1}}, table1 = {BlockId{6}, BlockId{2}, BlockId{5}};
  const std::vector<StepRow> rows = {{0, 1, 9, SlotId{0}, false}, {1, 20, 0, SlotId{1}, false}};
  auto tables = table_of(SlotId{0}, table0);
  for (const TableSet& set : table_of(SlotId{1}, table1)) tables.push_back(set);
  init_steps(backend, block_size);
  Array qkv = Array(dtype, 21, (heads + 2 * kv_heads) * head_dim).fill(random);
  const Array before = qkv;
  const Array cos_sin = Array(DType::F32, 32, std::max(rope_dim, 1)).fill(random);
  const Array weights = Array(DType::F32, 2, head_dim).fill(random);
  const NormSpec spec{norm, 1e-5f, false};
  const float* w = weights.tensor().ptr<float>();
  backend.qk_norm_rope_write_kv(qkv.tensor(), begin_step(backend, rows, tables), heads, spec, w, spec, w + head_dim,
                                {cos_sin.tensor().ptr<float>(), rope_dim, style}, kv);
  const double tolerance = std::max(tolerance_of(dtype), kv_dtype == DType::F16 ? 1.0 / 1024 : tolerance_of(kv_dtype));
  for (const StepRow& row : rows) {
    const auto& table = row.slot == SlotId{0} ? table0 : table1;
    for (int i = 0; i < row.num_tokens; ++i) {
      const int t = row.token_begin + i, pos = row.first_pos + i;
      const BlockId block = table[static_cast<std::size_t>(pos / block_size)];
      for (int h = 0; h < heads + 2 * kv_heads; ++h) {
        const bool is_v = h >= heads + kv_heads;
        std::vector<double> x(static_cast<std::size_t>(head_dim));
        for (int d = 0; d < head_dim; ++d) x[static_cast<std::size_t>(d)] = before.get(t, h * head_dim + d);
        if (!is_v && norm != NormKind::None) {
          double mean = 0, square = 0;
          for (const double v : x) mean += v / head_dim;
          if (norm == NormKind::Rms) mean = 0;
          for (const double v : x) square += (v - mean) * (v - mean);
          for (int d = 0; d < head_dim; ++d) {
            auto& v = x[static_cast<std::size_t>(d)];
            v = (v - mean) / std::sqrt(square / head_dim + 1e-5) * weights.get(h < heads ? 0 : 1, d);
          }
        }
        if (!is_v) {
          for (int j = 0; j < rope_dim / 2; ++j) {
            const auto a = static_cast<std::size_t>(style == RopeStyle::Half ? j : 2 * j);
            const auto b = static_cast<std::size_t>(style == RopeStyle::Half ? j + rope_dim / 2 : 2 * j + 1);
            const double c = cos_sin.get(pos, j), s = cos_sin.get(pos, j + rope_dim / 2), xa = x[a], xb = x[b];
            x[a] = xa * c - xb * s;
            x[b] = xb * c + xa * s;
          }
        }
        for (int d = 0; d < head_dim; ++d) {
          const double want = x[static_cast<std::size_t>(d)];
          ASSERT_TRUE(close(qkv.get(t, h * head_dim + d), want, tolerance_of(dtype))) << "head " << h;
          if (h >= heads) {
            const int kv_head = (h - heads) % kv_heads;
            const KvSlot slot(kv, block, is_v, kv_head, pos % block_size, in_pairs);
            if (kv_dtype == DType::I8) {
              ASSERT_NEAR(slot.get(d), want, 0.51 * slot.get_scale()) << "head " << h;
            } else {
              ASSERT_TRUE(close(slot.get(d), want, tolerance)) << "head " << h;
            }
          }
        }
      }
    }
  }
  // Nothing else was written: the other layer is still poison.
  const KvView other = layer_view(pool.data(), shape, 0);
  const auto* bytes = static_cast<const std::byte*>(other.base);
  for (int b = 0; b < blocks; ++b) {
    const auto* layer = bytes + static_cast<std::size_t>(b) * static_cast<std::size_t>(shape.block_bytes());
    for (std::size_t i = 0; i < static_cast<std::size_t>(shape.layer_stride()) * size_of(kv_dtype); ++i)
      ASSERT_EQ(layer[i], std::byte{0xff});
  }
}

TEST_P(Elementwise, qk_norm_rope_write_kv_matches_fp64) {
  for (const int head_dim : {16, 64, 80, 96, 128}) {
    for (const DType dtype : {DType::F32, DType::BF16}) {
      check_rope(*backend, random, dtype, dtype, head_dim, head_dim, RopeStyle::Half, NormKind::None);
      check_rope(*backend, random, dtype, DType::BF16, head_dim, head_dim / 4 * 2, RopeStyle::Interleaved,
                 NormKind::Rms);
      check_rope(*backend, random, dtype, DType::BF16, head_dim, head_dim, RopeStyle::Half, NormKind::None, 32);
      check_rope(*backend, random, dtype, DType::F32, head_dim, 0, RopeStyle::Half, NormKind::Layer);
      check_rope(*backend, random, dtype, DType::F32, head_dim, 0, RopeStyle::Half, NormKind::None);
      check_rope(*backend, random, dtype, DType::F16, head_dim, head_dim, RopeStyle::Half, NormKind::None);
      check_rope(*backend, random, dtype, DType::I8, head_dim, head_dim, RopeStyle::Half, NormKind::Rms);
    }
  }
}

FASTLLM_TEST_ALL_ISAS(Elementwise);

}  // namespace
}  // namespace fastllm::test

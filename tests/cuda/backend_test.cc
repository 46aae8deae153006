// The ops up to the logits, and memory, on the GPU against the CPU backend.
#include "two_backends.h"

namespace fastllm::test {
namespace {

class BackendOps : public TwoBackends {};

constexpr DType kBoth[] = {DType::F32, DType::BF16};

double tolerance(DType t) { return t == DType::BF16 ? 1.0 / 64 : 1e-4; }

TEST_F(BackendOps, test_embedding_positions_and_gathers) {
  for (const DType dtype : kBoth) {
    const Array table = Array(dtype, 50, 72).fill(random), positions = Array(DType::F32, 80, 72).fill(random);
    std::vector<TokenId> ids;
    for (int i = 0; i < 45; ++i) ids.push_back(random.below(70));  // some belong to another rank
    const std::vector<StepRow> rows = {{0, 1, 63, SlotId{3}, false}, {1, 44, 10, SlotId{1}, false}};
    const std::vector<std::int32_t> last = {0, 20, 44}, picked = {44, 0, 7, 7};
    const auto run = [&](Side& side, int part) {
      init_steps(*side.backend, 16, 50, 64, 2);
      const auto weight = side.backend->pack(host_matrix(table), dtype);
      StepInput input;
      input.tokens = ids, input.rows = rows, input.num_decode_rows = 1, input.logit_tokens = last;
      Step& step = side.backend->begin_step(input);
      const Tensor x = side.blank(DType::F32, 45, 72);
      side.backend->embed(x, step, *weight, 10, 1.5f);
      side.backend->add_positions(x, step, side.upload(positions));
      Tensor out = x;
      if (part == 1) side.backend->gather_logit_rows(out = side.blank(DType::F32, 3, 72), x, step);
      if (part == 2) side.backend->gather_rows(out = side.blank(DType::F32, 4, 72), x, picked);
      side.backend->end_step(step);
      return side.download(out);
    };
    compare("embed + add_positions", 1e-6, [&](Side& s) { return run(s, 0); });
    compare("gather_logit_rows", 1e-6, [&](Side& s) { return run(s, 1); });
    compare("gather_rows", 1e-6, [&](Side& s) { return run(s, 2); });
  }
}

TEST_F(BackendOps, test_norms) {
  for (const DType dtype : kBoth) {
    for (const NormKind kind : {NormKind::Rms, NormKind::Layer}) {
      for (const std::int64_t cols : {16, 72, 1024, 4096}) {
        const Array x = Array(DType::F32, 13, cols).fill(random), delta = Array(DType::F32, 13, cols).fill(random),
                    narrow = Array(dtype, 13, cols).fill(random), w = Array(DType::F32, 1, cols).fill(random),
                    b = Array(DType::F32, 1, cols).fill(random);
        const NormSpec spec{kind, 1e-5f, kind == NormKind::Layer};
        const auto bias = [&](Side& s) { return spec.bias ? s.upload(b).ptr<float>() : nullptr; };
        compare("norm of the residual", tolerance(dtype), [&](Side& s) {
          const Tensor out = s.blank(dtype, 13, cols);
          s.backend->norm(out, s.upload(x), spec, s.upload(w).ptr<float>(), bias(s));
          return s.download(out);
        });
        compare("norm of activations", tolerance(dtype), [&](Side& s) {
          const Tensor out = s.blank(dtype, 13, cols);
          s.backend->norm(out, s.upload(narrow), spec, s.upload(w).ptr<float>(), bias(s));
          return s.download(out);
        });
        for (const bool residual : {false, true}) {
          compare(residual ? "residual of add_norm" : "add_norm", tolerance(dtype), [&](Side& s) {
            const Tensor out = s.blank(dtype, 13, cols), sum = s.upload(x);
            s.backend->add_norm(out, sum, s.upload(delta), spec, s.upload(w).ptr<float>(), bias(s));
            return s.download(residual ? sum : out);
          });
        }
      }
    }
  }
}

TEST_F(BackendOps, test_linear) {
  for (const DType dtype : kBoth) {
    for (const auto& [n, k] : {std::pair{97, 64}, std::pair{192, 64}, std::pair{64, 256}}) {
      const Array w = Array(dtype, n, k).fill(random, 0.1f), b = Array(DType::F32, 1, n).fill(random);
      const auto host_weight = host->backend->pack(host_matrix(w), dtype),
                 weight = gpu->backend->pack(host_matrix(w), dtype);
      EXPECT_EQ(weight->rows(), n);
      EXPECT_EQ(weight->cols(), k);
      for (const int m : {1, 2, 3, 7, 16, 33, 64, 65, 129}) {
        const Array x = Array(dtype, m, k).fill(random), before = Array(DType::F32, m, n).fill(random);
        for (const bool biased : {false, true}) {
          const std::string what = "linear m " + std::to_string(m) + " n " + std::to_string(n) + " k " +
                                   std::to_string(k) + (biased ? " with bias" : "");
          const auto& packed = [&](Side& s) -> const PackedWeight& {
            return &s == host.get() ? *host_weight : *weight;
          };
          const auto bias = [&](Side& s) { return biased ? s.upload(b).ptr<float>() : nullptr; };
          for (const DType out_dtype : {dtype, DType::F32}) {
            compare(what, tolerance(out_dtype), [&](Side& s) {
              const Tensor out = s.blank(out_dtype, m, n);
              s.backend->linear(out, s.upload(x), packed(s), bias(s), false);
              return s.download(out);
            });
          }
          compare(what + " accumulated", tolerance(DType::F32), [&](Side& s) {
            const Tensor out = s.upload(before);
            s.backend->linear(out, s.upload(x), packed(s), bias(s), true);
            return s.download(out);
          });
        }
      }
    }
  }
}

TEST_F(BackendOps, test_weights_that_need_many_slices_and_bf16_sources) {
  const std::int64_t rows = 40000, cols = 1024;  // 82 MB
  const auto value = [](std::int64_t r, std::int64_t c) {
    return static_cast<float>((r * 37 + c * 11) % 255 - 127) / 64.0f;
  };
  HostMatrix source{rows,
                    cols,
                    [&](std::int64_t begin, std::int64_t end, float* out) {
                      for (std::int64_t r = begin; r < end; ++r)
                        for (std::int64_t c = 0; c < cols; ++c) *out++ = value(r, c);
                    },
                    {}};
  const auto check = [&](const PackedWeight& weight, const char* what) {
    std::vector<std::uint16_t> got(static_cast<std::size_t>(rows * cols));
    gpu->backend->copy(got.data(), cuda::view_of(weight).data, got.size() * 2);
    for (std::int64_t i = 0; i < rows * cols; ++i)
      ASSERT_EQ(got[static_cast<std::size_t>(i)], to_bf16(value(i / cols, i % cols)).bits)
          << what << ": row " << i / cols << " column " << i % cols;
  };
  check(*gpu->backend->pack(source, DType::BF16), "rounded");
  source.read_bf16 = [&](std::int64_t begin, std::int64_t end, std::uint16_t* out) {
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t c = 0; c < cols; ++c) *out++ = to_bf16(value(r, c)).bits;
  };
  check(*gpu->backend->pack(source, DType::BF16), "copied");
  source.read_bf16 = [](std::int64_t, std::int64_t, std::uint16_t*) { throw LoadError("the file ends too early"); };
  EXPECT_THROW(gpu->backend->pack(source, DType::BF16), LoadError);
  const Array odd = Array(DType::F32, 4, 12).fill(random);
  EXPECT_THROW(gpu->backend->pack(host_matrix(odd), DType::BF16), InvalidArgument);
}

TEST_F(BackendOps, test_activations) {
  for (const DType dtype : kBoth) {
    for (const Activation act : {Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu}) {
      const Array x = Array(dtype, 9, 192).fill(random), w = Array(dtype, 192, 64).fill(random, 0.1f),
                  in = Array(dtype, 9, 64).fill(random);
      compare("act", tolerance(dtype), [&](Side& s) {
        const Tensor out = s.upload(x);
        s.backend->act(out, act);
        return s.download(out);
      });
      compare("gated_act", tolerance(dtype), [&](Side& s) {
        const Tensor out = s.blank(dtype, 9, 96);
        s.backend->gated_act(out, s.upload(x), act);
        return s.download(out);
      });
      compare("gated_linear", 2 * tolerance(dtype), [&](Side& s) {
        const auto weight = s.backend->pack(host_matrix(w), dtype);
        const Tensor out = s.blank(dtype, 9, 96), scratch = s.blank(dtype, 9, 192);
        s.backend->gated_linear(out, scratch, s.upload(in), *weight, nullptr, act);
        return s.download(out);
      });
    }
  }
  const Array x = Array(DType::F32, 31, 1000).fill(random), y = Array(DType::F32, 31, 1000).fill(random);
  compare("add", 1e-6, [&](Side& s) {
    const Tensor out = s.upload(x);
    s.backend->add(out, s.upload(y));
    return s.download(out);
  });
  for (const float softcap : {0.0f, 3.0f}) {
    compare("scale_softcap", 1e-5, [&](Side& s) {
      const Tensor out = s.upload(x);
      s.backend->scale_softcap(out, 0.5f, softcap);
      return s.download(out);
    });
  }
}

struct AttentionCase {
  const char* what;
  int heads, kv_heads, head_dim, window;
  float softcap;
  bool alibi, norms;
};

// Two sequences in disjoint blocks of a pool that is NaN elsewhere: prompts, then decode rows next to a chunk.
TEST_F(BackendOps, test_rope_kv_write_and_attention) {
  const AttentionCase cases[] = {
      {"plain", 4, 2, 64, 0, 0, false, false},        {"wide groups", 8, 1, 128, 0, 0, false, true},
      {"narrow heads", 6, 3, 16, 0, 0, false, false}, {"window and softcap", 4, 2, 64, 9, 5.0f, false, false},
      {"alibi", 4, 4, 32, 0, 0, true, false},         {"largest heads", 2, 1, 256, 0, 0, false, false}};
  for (const DType dtype : kBoth) {
    for (const AttentionCase& c : cases) {
      const KvShape shape{dtype, 2, c.kv_heads, 16, c.head_dim};
      const std::int64_t width = std::int64_t{c.heads + 2 * c.kv_heads} * c.head_dim, blocks = 13;
      const Array first = Array(dtype, 66, width).fill(random), second = Array(dtype, 32, width).fill(random),
                  table = Array(DType::F32, 200, c.head_dim).fill(random),
                  q_weight = Array(DType::F32, 1, c.head_dim).fill(random);
      std::vector<float> slopes;
      for (int h = 0; c.alibi && h < c.heads; ++h) slopes.push_back(0.5f / static_cast<float>(h + 1));
      std::vector<TableSet> sets;
      for (int i = 0; i < 5; ++i) {
        sets.push_back({SlotId{2}, i, BlockId{12 - 2 * i}});
        sets.push_back({SlotId{7}, i, BlockId{1 + 2 * i}});
      }
      const auto run = [&](Side& s, int wanted) {
        Backend& b = *s.backend;
        init_steps(b, 16, 10, 16, 2);
        const Tensor pool = s.blank(dtype, blocks, shape.block_stride());
        const KvView kv = layer_view(pool.data, shape, 1);
        const NormSpec norm{c.norms ? NormKind::Rms : NormKind::None};
        const float* weight = c.norms ? s.upload(q_weight).ptr<float>() : nullptr;
        const RopeArgs rope{s.upload(table).ptr<float>(), c.head_dim, RopeStyle::Half};
        const AttnArgs args{c.heads,   c.kv_heads, c.head_dim, 0.3f / std::sqrt(static_cast<float>(c.head_dim)),
                            c.softcap, c.window,   slopes};
        Tensor out;
        const auto step = [&](std::vector<StepRow> rows, int decode_rows, const Array& values) {
          const std::vector<TokenId> ids(static_cast<std::size_t>(values.rows()), 0);
          StepInput input;
          input.table_sets = sets;
          input.tokens = ids, input.rows = rows, input.num_decode_rows = decode_rows;
          Step& begun = b.begin_step(input);
          const Tensor qkv = s.upload(values);
          out = s.blank(dtype, values.rows(), std::int64_t{c.heads} * c.head_dim);
          b.qk_norm_rope_write_kv(qkv, begun, c.heads, norm, weight, norm, weight, rope, kv);
          b.attention(out, qkv.columns(0, out.cols()), begun, kv, args);
          b.end_step(begun);
          StepOutput unused;
          b.wait_step(begun, unused);
        };
        step({{0, 40, 0, SlotId{2}, false}, {40, 26, 0, SlotId{7}, false}}, 0, first);
        if (wanted == 0) return s.download(out);
        step({{0, 1, 40, SlotId{2}, false}, {1, 31, 26, SlotId{7}, false}}, 1, second);
        return s.download(wanted == 1 ? out : pool);
      };
      const std::string what = std::string("attention, ") + c.what;
      compare(what + ", prompts", tolerance(dtype), [&](Side& s) { return run(s, 0); });
      compare(what + ", decode row and chunk", tolerance(dtype), [&](Side& s) { return run(s, 1); });
      compare(what + ", pool", tolerance(dtype), [&](Side& s) { return run(s, 2); });
    }
  }
}

TEST_F(BackendOps, test_blocks_move_between_pools) {
  const Array pool = Array(DType::F32, 12, 256).fill(random);
  const std::vector<std::pair<BlockId, BlockId>> pairs = {
      {BlockId{1}, BlockId{5}}, {BlockId{2}, BlockId{6}}, {BlockId{5}, BlockId{9}}, {BlockId{11}, BlockId{1}}};
  compare("within a pool, in order", 0, [&](Side& s) {
    const Tensor t = s.upload(pool);
    s.backend->copy_blocks(t.data, t.data, 1024, pairs);
    return s.download(t);
  });
  compare("out to the host and back", 0, [&](Side& s) {
    const Tensor t = s.upload(pool);
    const auto outside = s.backend->allocate(12 * 1024, MemoryKind::Host);
    std::memset(outside->data(), 0, 12 * 1024);
    s.backend->copy_blocks(outside->data(), t.data, 1024, pairs);
    s.backend->copy_blocks(t.data, outside->data(), 1024, pairs);
    return s.download(t);
  });
}

TEST_F(BackendOps, test_device_and_memory) {
  const DeviceInfo info = gpu->backend->info();
  EXPECT_TRUE(info.name.starts_with("cuda:0 (")) << info.name;
  EXPECT_GT(info.memory_free, 0);
  EXPECT_GE(info.memory_total, info.memory_free);
  try {
    gpu->backend->allocate(static_cast<std::size_t>(info.memory_total) * 2, MemoryKind::Device);
    FAIL() << "twice the memory was allocated";
  } catch (const ResourceError& e) {
    EXPECT_NE(std::string(e.what()).find("were asked for"), std::string::npos) << e.what();
  }
  EXPECT_NO_THROW(gpu->backend->allocate(1000, MemoryKind::Device)) << "after a failure";
  CudaOptions missing;
  missing.device = 99;
  EXPECT_THROW(cuda::make_backend(missing), ResourceError);
}

}  // namespace
}  // namespace fastllm::test

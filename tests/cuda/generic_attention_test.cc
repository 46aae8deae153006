// The attention kernel for any shape and dtype against the fp64 oracle, on decode and prefill rows.
#include "attention_step.h"

namespace fastllm::test {
namespace {

class GenericAttention : public CudaTest {
 protected:
  // Decode rows, a padding row, a whole prompt, and two chunks that continue sequences.
  void check(const AttentionShape& shape) {
    const PagedCache cache(shape, {1, 47, 33, 150, 200}, random);
    const std::vector<cuda::DeviceRow> rows{{0, 1, 0, 0},  {1, 1, -1, -1},   {2, 1, 46, 1},
                                            {3, 33, 0, 2}, {36, 20, 130, 3}, {56, 71, 129, 4}};
    const AttentionStep step(cache, rows, 3, random);
    cuda::generic_attention(step.call(), step.view(), 0, 3, 3, stream);
    cuda::generic_attention(step.call(), step.view(), 3, 6, step.num_tokens - 3, stream);
    const double tolerance = shape.dtype == DType::F32 ? 1e-4 : 1.0 / 64;
    const auto wrong = step.difference(step.result(), tolerance);
    if (!wrong.empty()) ADD_FAILURE() << wrong << "\n  " << shape.describe();
  }
};

TEST_F(GenericAttention, EveryDtypeMatchesTheOracle) {
  check({.dtype = DType::F32, .kv_dtype = DType::F32});
  check({.dtype = DType::BF16, .kv_dtype = DType::BF16});
  check({.dtype = DType::BF16, .kv_dtype = DType::F8E4M3});
}

TEST_F(GenericAttention, AnyHeadDimMatchesTheOracle) {
  for (const int dim : {1, 8, 31, 32, 33, 80, 96, 200, 255, 256}) {
    check({.heads = 3, .kv_heads = 1, .head_dim = dim, .dtype = DType::F32, .kv_dtype = DType::F32});
    check({.heads = 2, .kv_heads = 2, .head_dim = dim, .kv_dtype = DType::F8E4M3});
  }
}

TEST_F(GenericAttention, AnyBlockSizeAndGroupMatchesTheOracle) {
  for (const int block_size : {1, 5, 8, 16, 64})
    check({.heads = 10, .kv_heads = 2, .head_dim = 48, .block_size = block_size});
  check({.heads = 71, .kv_heads = 1, .head_dim = 64});
}

TEST_F(GenericAttention, WindowSoftcapAndAlibiMatchTheOracle) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (const int window : {1, 32, 50})
      check({.heads = 4, .kv_heads = 2, .head_dim = 64, .window = window, .dtype = dtype, .kv_dtype = dtype});
    check({.heads = 4, .kv_heads = 2, .head_dim = 64, .softcap = 3, .dtype = dtype, .kv_dtype = dtype});
    check({.heads = 4, .kv_heads = 2, .head_dim = 64, .alibi = true, .dtype = dtype, .kv_dtype = dtype});
  }
}

TEST_F(GenericAttention, TooGreatAHeadDimIsRefused) {
  const PagedCache cache({.heads = 1, .kv_heads = 1, .head_dim = 264}, {1}, random);
  const AttentionStep step(cache, {{0, 1, 0, 0}}, 1, random);
  EXPECT_THROW(cuda::generic_attention(step.call(), step.view(), 0, 1, 1, stream), InvalidArgument);
}

}  // namespace
}  // namespace fastllm::test

// Paged attention against a naive fp64 oracle, and its independence of chunking, batch and threads.
#include <algorithm>
#include <numeric>

#include "op_testing.h"

namespace fastllm::test {
namespace {

class Attention : public OpTest {};

struct Case {
  int heads = 4, kv_heads = 2, head_dim = 64, block_size = 16, window = 0;
  float softcap = 0;
  bool alibi = false;
  DType dtype = DType::F32, kv_dtype = DType::F32;
};

// One sequence: its blocks lie in random order in a poisoned pool, so reading a wrong slot shows.
class Sequence {
 public:
  Sequence(const Backend& backend, const Case& c, Random& random, int length)
      : c_(c),
        shape_{c.kv_dtype, 1, c.kv_heads, c.block_size, c.head_dim},
        q(Array(c.dtype, length, c.heads * c.head_dim).fill(random)),
        k(Array(DType::F32, length, c.kv_heads * c.head_dim).fill(random)),
        v(Array(DType::F32, length, c.kv_heads * c.head_dim).fill(random)) {
    const int blocks = (length + c.block_size - 1) / c.block_size;
    std::vector<int> order(static_cast<std::size_t>(blocks));
    std::iota(order.begin(), order.end(), 1);
    std::shuffle(order.begin(), order.end(), std::mt19937(test_seed()));
    for (const int b : order) table.push_back(BlockId{b});
    pool_.assign(static_cast<std::size_t>(shape_.block_bytes()) * static_cast<std::size_t>(blocks + 1),
                 std::byte{0xff});
    in_pairs_ = kv_in_pairs(backend, view(), c.dtype);
    for (int pos = 0; pos < length; ++pos) {
      for (int h = 0; h < c.kv_heads; ++h) {
        store(pos, false, h, k);
        store(pos, true, h, v);
      }
    }
  }
  KvView view() { return layer_view(pool_.data(), shape_, 0); }

 private:
  Case c_;
  KvShape shape_;
  std::vector<std::byte> pool_;
  bool in_pairs_ = false;

  // Afterwards x is what the cache made of it.
  void store(int pos, bool is_v, int head, Array& x) {
    KvSlot slot(view(), table[static_cast<std::size_t>(pos / c_.block_size)], is_v, head, pos % c_.block_size,
                in_pairs_);
    float* row = static_cast<float*>(x.tensor().at(pos)) + head * c_.head_dim;
    slot.set({row, static_cast<std::size_t>(c_.head_dim)});
    for (int d = 0; d < c_.head_dim; ++d) row[d] = slot.get(d);
  }

 public:
  Array q;     // activations
  Array k, v;  // F32
  std::vector<BlockId> table;
};

AttnArgs args_of(const Case& c, std::span<const float> slopes) {
  return {c.heads,   c.kv_heads, c.head_dim, 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
          c.softcap, c.window,   slopes};
}

// Positions [first, first + n) of the sequence, whose table is in slot 0.
void attend(Backend& backend, const Case& c, Sequence& s, std::span<const float> slopes, Array& out, int first, int n) {
  const StepRow row{0, n, first, SlotId{0}, false};
  const Step& step = begin_step(backend, {&row, 1});
  backend.attention(out.tensor().slice(first, n), s.q.tensor().slice(first, n), step, s.view(), args_of(c, slopes));
}

// Before the first attend() on a sequence.
void set_table(Backend& backend, const Case& c, const Sequence& s) {
  init_steps(backend, c.block_size);
  begin_step(backend, {}, table_of(SlotId{0}, s.table));
}

void check(Backend& backend, Random& random, const Case& c, int length) {
  SCOPED_TRACE(testing::Message() << "heads " << c.heads << "/" << c.kv_heads << " dim " << c.head_dim << " window "
                                  << c.window << " cap " << c.softcap << " alibi " << c.alibi << " length " << length
                                  << " " << name_of(c.dtype) << "/" << name_of(c.kv_dtype));
  Sequence s(backend, c, random, length);
  std::vector<float> slopes;
  for (int h = 0; c.alibi && h < c.heads; ++h) slopes.push_back(std::exp2f(-static_cast<float>(h + 1)));
  Array whole(c.dtype, length, c.heads * c.head_dim), ones = whole, chunks = whole;
  set_table(backend, c, s);
  attend(backend, c, s, slopes, whole, 0, length);

  const AttnArgs args = args_of(c, slopes);
  // Tiles take keys as bf16, whatever the cache has.
  const bool twice = c.dtype == DType::BF16 && c.kv_dtype == DType::F16;
  const double tolerance = tolerance_of(c.dtype) * (twice ? 2 : 1);
  int bad = 0;
  for (int pos = 0; pos < length; ++pos) {
    for (int h = 0; h < c.heads; ++h) {
      const int kv_head = h / (c.heads / c.kv_heads), oldest = c.window > 0 ? std::max(0, pos - c.window + 1) : 0;
      std::vector<double> p;
      for (int j = oldest; j <= pos; ++j) {
        double dot = 0;
        for (int d = 0; d < c.head_dim; ++d)
          dot += static_cast<double>(s.q.get(pos, h * c.head_dim + d)) * s.k.get(j, kv_head * c.head_dim + d);
        dot *= args.scale;
        if (c.softcap > 0) dot = c.softcap * std::tanh(dot / c.softcap);
        if (c.alibi) dot += static_cast<double>(slopes[static_cast<std::size_t>(h)]) * (j - pos);
        p.push_back(dot);
      }
      const double top = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (auto& x : p) sum += x = std::exp(x - top);
      for (int d = 0; d < c.head_dim; ++d) {
        double want = 0;
        for (int j = oldest; j <= pos; ++j)
          want += p[static_cast<std::size_t>(j - oldest)] / sum * s.v.get(j, kv_head * c.head_dim + d);
        const float got = whole.get(pos, h * c.head_dim + d);
        if (!close(got, want, tolerance) && ++bad < 4)
          ADD_FAILURE() << "pos " << pos << " head " << h << " dim " << d << ": " << got << ", not " << want;
      }
    }
  }
  EXPECT_EQ(bad, 0);

  for (int pos = 0; pos < length; ++pos) attend(backend, c, s, slopes, ones, pos, 1);
  for (int pos = 0; pos < length; pos += 7) attend(backend, c, s, slopes, chunks, pos, std::min(7, length - pos));
  for (int pos = 0; pos < length; ++pos) {
    ASSERT_TRUE(ones.same_row(pos, whole, pos)) << "decode differs at " << pos;
    ASSERT_TRUE(chunks.same_row(pos, whole, pos)) << "chunks of 7 differ at " << pos;
  }
}

TEST_P(Attention, matches_fp64_and_does_not_depend_on_chunking) {
  for (const int head_dim : {16, 64, 80, 96, 128}) {
    check(*backend, random, {.heads = 6, .kv_heads = 2, .head_dim = head_dim}, 150);
    check(*backend, random, {.head_dim = head_dim, .dtype = DType::BF16, .kv_dtype = DType::BF16}, 70);
  }
  check(*backend, random, {.head_dim = 20, .dtype = DType::BF16, .kv_dtype = DType::F32}, 33);
  check(*backend, random, {.kv_dtype = DType::BF16}, 65);
  check(*backend, random, {.heads = 2, .kv_heads = 2, .head_dim = 16}, 700);
  check(*backend, random, {.heads = 2, .kv_heads = 1, .head_dim = 16, .window = 100}, 600);
  check(*backend, random, {.window = 1}, 40);
  check(*backend, random, {.block_size = 5, .window = 37, .softcap = 5.0f}, 130);
  check(*backend, random, {.softcap = 2.0f, .alibi = true}, 100);
  check(*backend, random, {.heads = 8, .kv_heads = 1, .head_dim = 16, .block_size = 32, .alibi = true}, 90);
}

TEST_P(Attention, every_cache_serves_every_activation) {
  for (const DType kv : {DType::F32, DType::BF16, DType::F16, DType::I8}) {
    for (const DType dtype : {DType::F32, DType::BF16}) {
      for (const int head_dim : {20, 64, 80, 128})
        check(*backend, random, {.heads = 6, .kv_heads = 2, .head_dim = head_dim, .dtype = dtype, .kv_dtype = kv}, 135);
      check(*backend, random, {.heads = 9, .kv_heads = 1, .window = 70, .dtype = dtype, .kv_dtype = kv}, 200);
      check(*backend, random, {.block_size = 5, .softcap = 5.0f, .alibi = true, .dtype = dtype, .kv_dtype = kv}, 70);
    }
  }
}

// Tile kernels lay out 1 to 4, 5 to 8 and more queries in different ways; a decode, a chunk and a prompt use different
// ones for the same row.
TEST_P(Attention, rows_do_not_depend_on_how_many_queries_share_a_pass) {
  for (const DType kv : {DType::BF16, DType::F16, DType::I8}) {
    for (const int heads : {1, 2, 4, 5, 8})
      check(*backend, random, {.heads = heads, .kv_heads = 1, .dtype = DType::BF16, .kv_dtype = kv}, 131);
    for (const int heads : {4, 7}) {
      const Case c{.heads = heads, .kv_heads = 1, .block_size = 5, .window = 70, .dtype = DType::BF16, .kv_dtype = kv};
      check(*backend, random, c, 140);
    }
    check(*backend, random, {.heads = 8, .kv_heads = 1, .softcap = 5.0f, .dtype = DType::BF16, .kv_dtype = kv}, 70);
    check(*backend, random, {.heads = 8, .kv_heads = 1, .alibi = true, .dtype = DType::BF16, .kv_dtype = kv}, 70);
  }
}

void check_batch(Backend& backend, Random& random, DType kv_dtype) {
  SCOPED_TRACE(name_of(kv_dtype));
  const Case c{.heads = 6, .kv_heads = 3, .head_dim = 16, .dtype = DType::BF16, .kv_dtype = kv_dtype};
  Sequence s(backend, c, random, 800);
  // Several rows of one sequence, as decodes and chunks of different requests sharing blocks would stand.
  const std::vector<std::pair<int, int>> pieces = {{799, 1}, {300, 1}, {0, 40}, {500, 100}, {63, 1}, {64, 2}, {640, 3}};
  int tokens = 0;
  for (const auto& [first, n] : pieces) tokens += n;
  Array q(c.dtype, tokens, c.heads * c.head_dim), out = q;
  std::vector<StepRow> rows;
  int at = 0;
  for (const auto& [first, n] : pieces) {
    rows.push_back({at, n, first, SlotId{0}, false});
    for (int i = 0; i < n; ++i, ++at)
      std::memcpy(q.tensor().at(at), s.q.tensor().at(first + i), static_cast<std::size_t>(q.cols()) * 2);
  }
  set_table(backend, c, s);
  Array alone(c.dtype, 800, c.heads * c.head_dim);
  for (int repeat = 0; repeat < 5; ++repeat) {
    const Step& step = begin_step(backend, rows);
    backend.attention(out.tensor(), q.tensor(), step, s.view(), args_of(c, {}));
    for (const StepRow& row : rows) {
      attend(backend, c, s, {}, alone, row.first_pos, row.num_tokens);
      for (int i = 0; i < row.num_tokens; ++i) ASSERT_TRUE(out.same_row(row.token_begin + i, alone, row.first_pos + i));
    }
  }
}

TEST_P(Attention, rows_of_a_batch_equal_the_rows_alone) {
  for (const DType kv : {DType::F32, DType::BF16, DType::F16, DType::I8}) check_batch(*backend, random, kv);
}

FASTLLM_TEST_ALL_ISAS(Attention);

}  // namespace
}  // namespace fastllm::test

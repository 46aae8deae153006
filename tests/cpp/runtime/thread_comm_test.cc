#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <thread>

#include "dist/communicator.h"
#include "fastllm/error.h"
#include "test_seed.h"

namespace fastllm {
namespace {

// Runs fn(comm) on a thread per rank and joins them.
void on_ranks(std::vector<std::unique_ptr<Communicator>>& comms, const std::function<void(Communicator&)>& fn) {
  std::vector<std::thread> threads;
  for (auto& comm : comms) threads.emplace_back([&fn, &c = *comm] { fn(c); });
  for (auto& t : threads) t.join();
}

class ThreadComm : public ::testing::TestWithParam<int> {
 protected:
  int size() const { return GetParam(); }
  std::vector<std::unique_ptr<Communicator>> comms_ = make_thread_communicators(GetParam());
};

TEST_P(ThreadComm, test_all_reduce_sums_in_rank_order_on_every_rank) {
  const unsigned seed = test::test_seed();
  for (std::int64_t n : {1, 15, 16, 17, 1000, 5001}) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<std::vector<float>> data(static_cast<std::size_t>(size()));
    std::vector<float> want(static_cast<std::size_t>(n), 0.0f);
    for (auto& d : data) {
      for (std::int64_t i = 0; i < n; ++i) d.push_back(normal(rng));
      for (std::size_t i = 0; i < want.size(); ++i) want[i] += d[i];
    }
    on_ranks(comms_, [&](Communicator& c) {
      c.all_reduce(Tensor(data[static_cast<std::size_t>(c.rank())].data(), DType::F32, {n}));
    });
    for (const auto& d : data) EXPECT_EQ(d, want) << n;
  }
}

TEST_P(ThreadComm, test_all_reduce_of_bf16_rounds_once) {
  std::vector<std::vector<bf16>> data(static_cast<std::size_t>(size()));
  float want = 0;
  for (int r = 0; r < size(); ++r) {
    data[static_cast<std::size_t>(r)].assign(100, to_bf16(1.0f + static_cast<float>(r) / 64.0f));
    want += 1.0f + static_cast<float>(r) / 64.0f;
  }
  on_ranks(comms_, [&](Communicator& c) {
    c.all_reduce(Tensor(data[static_cast<std::size_t>(c.rank())].data(), DType::BF16, {10, 10}));
  });
  for (const auto& d : data)
    for (bf16 x : d) EXPECT_EQ(x.bits, to_bf16(want).bits);
}

TEST_P(ThreadComm, test_all_gather_places_columns_by_rank) {
  constexpr std::int64_t kRows = 3, kCols = 5;
  std::vector<std::vector<float>> in(static_cast<std::size_t>(size())), out(static_cast<std::size_t>(size()));
  for (int r = 0; r < size(); ++r) {
    in[static_cast<std::size_t>(r)].resize(kRows * kCols);
    std::iota(in[static_cast<std::size_t>(r)].begin(), in[static_cast<std::size_t>(r)].end(),
              100.0f * static_cast<float>(r));
    out[static_cast<std::size_t>(r)].assign(static_cast<std::size_t>(kRows * kCols * size()), -1.0f);
  }
  on_ranks(comms_, [&](Communicator& c) {
    const auto r = static_cast<std::size_t>(c.rank());
    c.all_gather_columns(Tensor(in[r].data(), DType::F32, {kRows, kCols}),
                         Tensor(out[r].data(), DType::F32, {kRows, kCols * size()}));
  });
  for (const auto& o : out)
    for (std::int64_t i = 0; i < kRows; ++i)
      for (std::int64_t j = 0; j < kCols * size(); ++j)
        EXPECT_EQ(o[static_cast<std::size_t>(i * kCols * size() + j)],
                  static_cast<float>(100 * (j / kCols) + i * kCols + j % kCols));
}

TEST_P(ThreadComm, test_broadcast_reaches_every_rank_from_every_root) {
  for (int root = 0; root < size(); ++root) {
    std::vector<std::vector<int>> data(static_cast<std::size_t>(size()), std::vector<int>(7, -1));
    data[static_cast<std::size_t>(root)].assign(7, 42 + root);
    on_ranks(comms_, [&](Communicator& c) {
      c.broadcast(data[static_cast<std::size_t>(c.rank())].data(), 7 * sizeof(int), root);
    });
    for (const auto& d : data) EXPECT_EQ(d, std::vector<int>(7, 42 + root));
  }
}

TEST_P(ThreadComm, test_send_and_recv_around_a_ring) {
  if (size() < 2) GTEST_SKIP() << "a ring needs two ranks";
  std::vector<int> got(static_cast<std::size_t>(size()), -1);
  on_ranks(comms_, [&](Communicator& c) {
    const int next = (c.rank() + 1) % size(), previous = (c.rank() + size() - 1) % size();
    int token = 0;
    for (int round = 0; round < 50; ++round) {
      if (c.rank() == 0) {
        c.send(&token, sizeof token, next);
        c.recv(&token, sizeof token, previous);
      } else {
        c.recv(&token, sizeof token, previous);
        ++token;
        c.send(&token, sizeof token, next);
      }
    }
    got[static_cast<std::size_t>(c.rank())] = token;
  });
  EXPECT_EQ(got[0], 50 * (size() - 1));
}

TEST_P(ThreadComm, test_many_collectives_in_a_row_stay_in_step) {
  std::vector<std::vector<float>> data(static_cast<std::size_t>(size()), std::vector<float>(64));
  on_ranks(comms_, [&](Communicator& c) {
    auto& d = data[static_cast<std::size_t>(c.rank())];
    for (int round = 0; round < 500; ++round) {
      std::fill(d.begin(), d.end(), static_cast<float>(c.rank() + round));
      c.all_reduce(Tensor(d.data(), DType::F32, {64}));
      const int want = size() * round + size() * (size() - 1) / 2;
      if (d[0] != static_cast<float>(want) || d[63] != static_cast<float>(want)) {
        ADD_FAILURE() << "round " << round;
        c.abort();
        return;
      }
    }
  });
}

TEST_P(ThreadComm, test_abort_wakes_every_blocked_rank) {
  if (size() < 2) GTEST_SKIP() << "nobody waits in a group of one";
  std::vector<float> data(static_cast<std::size_t>(size()));
  std::vector<int> threw(static_cast<std::size_t>(size()), 0);
  on_ranks(comms_, [&](Communicator& c) {
    const auto r = static_cast<std::size_t>(c.rank());
    if (c.rank() == size() - 1) {
      c.abort();
      return;
    }
    try {
      if (r % 2 == 0) c.all_reduce(Tensor(&data[r], DType::F32, {1}));
      if (r % 2 == 1) c.recv(&data[r], sizeof(float), size() - 1);
    } catch (const ResourceError&) {
      threw[r] = 1;
    }
  });
  EXPECT_EQ(std::accumulate(threw.begin(), threw.end(), 0), size() - 1);
  // An aborted group stays aborted.
  EXPECT_THROW(comms_[0]->broadcast(data.data(), 4, 0), ResourceError);
}

INSTANTIATE_TEST_SUITE_P(Sizes, ThreadComm, ::testing::Values(1, 2, 3, 4));

TEST(NullComm, test_group_of_one) {
  auto c = make_null_communicator();
  float in[4] = {1, 2, 3, 4}, out[4] = {};
  c->all_reduce(Tensor(in, DType::F32, {4}));
  c->all_gather_columns(Tensor(in, DType::F32, {2, 2}), Tensor(out, DType::F32, {2, 2}));
  EXPECT_EQ(std::memcmp(in, out, sizeof in), 0);
  EXPECT_THROW(c->send(in, 4, 1), InvalidArgument);
  EXPECT_THROW(make_thread_communicators(0), InvalidArgument);
}

}  // namespace
}  // namespace fastllm

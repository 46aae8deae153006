// Ranks that are threads of one process. A collective publishes each rank's buffer, meets at a barrier, lets every rank
// work on its share of all buffers in place, and meets again:
//
//   all_reduce of n elements by 3 ranks:   [ share 0 | share 1 | share 2 ]   of every buffer
//   rank r sums share r over the buffers of rank 0, 1, 2 in that order and writes the sum into all of them
//
// Nothing is staged, so a buffer must outlive the group when a collective was aborted: a peer may still write to it.
#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cstring>
#include <string>

#include "dist/communicator.h"
#include "dist/event_count.h"
#include "fastllm/error.h"

namespace fastllm {
namespace {

// One direction between two ranks: the sender lends a buffer until the receiver has copied it.
struct alignas(64) Channel {
  std::atomic<bool> full{false};
  const void* data = nullptr;
  std::size_t bytes = 0;
};

class Group {
 public:
  explicit Group(int size)
      : size_(size),
        buffers_(static_cast<std::size_t>(size)),
        channels_(static_cast<std::size_t>(size) * static_cast<std::size_t>(size)) {}

  int size() const { return size_; }
  const Tensor& buffer(int rank) const { return buffers_[static_cast<std::size_t>(rank)]; }
  Channel& channel(int from, int to) { return channels_[static_cast<std::size_t>(from * size_ + to)]; }

  // Publishes this rank's buffer and returns when all ranks have.
  void enter(int rank, const Tensor& t) {
    buffers_[static_cast<std::size_t>(rank)] = t;
    barrier();
  }

  void barrier() {
    const auto turn = turn_.load(std::memory_order_acquire);
    check();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_acq_rel);
      event_.notify();
    } else {
      wait([&] { return turn_.load(std::memory_order_acquire) != turn; });
    }
  }

  // Until `done` or until the group is aborted, which throws.
  template <class Done>
  void wait(Done&& done) {
    event_.wait([&] { return done() || aborted_.load(std::memory_order_acquire); });
    check();
  }

  void notify() { event_.notify(); }

  void abort() noexcept {
    aborted_.store(true, std::memory_order_seq_cst);
    event_.notify();
  }

 private:
  void check() const {
    if (aborted_.load(std::memory_order_acquire))
      throw ResourceError("a tensor-parallel rank failed; the collective was given up");
  }

  int size_;
  std::vector<Tensor> buffers_;  // [size_], each written by its rank before a barrier and read by all after it
  std::vector<Channel> channels_;
  EventCount event_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> turn_{0};
  std::atomic<bool> aborted_{false};
};

[[maybe_unused]] bool is_contiguous(const Tensor& t) {
  std::int64_t stride = 1;
  for (int k = t.rank - 1; k >= 0; --k) {
    const auto i = static_cast<std::size_t>(k);
    if (t.shape[i] != 1 && t.stride[i] != stride) return false;
    stride *= t.shape[i];
  }
  return true;
}

// Sums elements [begin, end) over all buffers and writes the sum to all of them.
template <class T, class Load, class Store>
void reduce_share(const Group& group, std::int64_t begin, std::int64_t end, Load load, Store store) {
  constexpr std::int64_t kTile = 512;  // elements; the tile's fp32 sum stays in the first-level cache
  std::array<float, kTile> sum;
  for (std::int64_t tile = begin; tile < end; tile += kTile) {
    const auto n = std::min(kTile, end - tile);
    const T* first = group.buffer(0).ptr<T>() + tile;
    for (std::int64_t i = 0; i < n; ++i) sum[static_cast<std::size_t>(i)] = load(first[i]);
    for (int r = 1; r < group.size(); ++r) {
      const T* next = group.buffer(r).ptr<T>() + tile;
      for (std::int64_t i = 0; i < n; ++i) sum[static_cast<std::size_t>(i)] += load(next[i]);
    }
    for (int r = 0; r < group.size(); ++r) {
      T* out = group.buffer(r).ptr<T>() + tile;
      for (std::int64_t i = 0; i < n; ++i) out[i] = store(sum[static_cast<std::size_t>(i)]);
    }
  }
}

class ThreadComm final : public Communicator {
 public:
  ThreadComm(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }

  void all_reduce(const Tensor& inout) override {
    assert(is_contiguous(inout));
    if (inout.dtype != DType::F32 && inout.dtype != DType::BF16)
      throw InvalidArgument(std::string("all_reduce sums float32 and bfloat16, not ") + name_of(inout.dtype));
    group_->enter(rank_, inout);
    // Shares end at multiples of 16 elements, so that no two ranks write to one cache line.
    const auto n = inout.numel();
    const auto share = ((n + size() - 1) / size() + 15) / 16 * 16;
    const auto begin = std::min(n, rank_ * share), end = std::min(n, begin + share);
    if (inout.dtype == DType::F32) {
      auto same = [](float x) { return x; };
      reduce_share<float>(*group_, begin, end, same, same);
    } else {
      reduce_share<bf16>(*group_, begin, end, [](bf16 x) { return to_float(x); }, to_bf16);
    }
    group_->barrier();
  }

  void all_gather_columns(const Tensor& in, const Tensor& out) override {
    assert(in.rank == 2 && out.rank == 2 && out.cols() == in.cols() * size() && in.dtype == out.dtype);
    group_->enter(rank_, in);
    const auto bytes = static_cast<std::size_t>(in.cols()) * size_of(in.dtype);
    for (int r = 0; r < size(); ++r) {
      const Tensor& part = group_->buffer(r);
      const Tensor dst = out.columns(r * in.cols(), in.cols());
      for (std::int64_t i = 0; i < in.rows(); ++i) std::memcpy(dst.at(i), part.at(i), bytes);
    }
    group_->barrier();
  }

  void broadcast(void* data, std::size_t bytes, int root) override {
    group_->enter(rank_, Tensor(data, DType::I32, {}));
    if (rank_ != root && bytes > 0) std::memcpy(data, group_->buffer(root).data, bytes);
    group_->barrier();
  }

  void send(const void* data, std::size_t bytes, int peer) override {
    Channel& c = channel(rank_, peer);
    c.data = data;
    c.bytes = bytes;
    c.full.store(true, std::memory_order_seq_cst);
    group_->notify();
    group_->wait([&] { return !c.full.load(std::memory_order_acquire); });
  }

  void recv(void* data, std::size_t bytes, int peer) override {
    Channel& c = channel(peer, rank_);
    group_->wait([&] { return c.full.load(std::memory_order_acquire); });
    if (c.bytes != bytes)
      throw InvalidArgument("rank " + std::to_string(peer) + " sent " + std::to_string(c.bytes) + " bytes where " +
                            std::to_string(bytes) + " were expected");
    if (bytes > 0) std::memcpy(data, c.data, bytes);
    c.full.store(false, std::memory_order_seq_cst);
    group_->notify();
  }

  void abort() noexcept override { group_->abort(); }

 private:
  Channel& channel(int from, int to) {
    const int peer = from == rank_ ? to : from;
    if (peer < 0 || peer >= size() || peer == rank_)
      throw InvalidArgument("rank " + std::to_string(peer) + " is no peer of rank " + std::to_string(rank_) +
                            " in a group of " + std::to_string(size()));
    return group_->channel(from, to);
  }

  std::shared_ptr<Group> group_;
  int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_thread_communicators(int size) {
  if (size < 1) throw InvalidArgument("a tensor-parallel group has at least 1 rank, not " + std::to_string(size));
  auto group = std::make_shared<Group>(size);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int r = 0; r < size; ++r) ranks.push_back(std::make_unique<ThreadComm>(group, r));
  return ranks;
}

}  // namespace fastllm

// Collectives of one tensor-parallel group. One object per rank, used by that rank's thread only; every rank makes the
// same calls in the same order. Buffers are host memory for ThreadComm, device memory for NCCL.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "tensor/tensor.h"

namespace fastllm {

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // Element-wise sum over ranks, in place; summed in rank order, so every rank gets the same bits. fp32 or bf16.
  virtual void all_reduce(const Tensor& inout) = 0;
  // in: [rows, n]; out: [rows, size * n], rank r's columns at r * n.
  virtual void all_gather_columns(const Tensor& in, const Tensor& out) = 0;
  virtual void broadcast(void* data, std::size_t bytes, int root) = 0;
  virtual void send(const void* data, std::size_t bytes, int peer) = 0;
  virtual void recv(void* data, std::size_t bytes, int peer) = 0;
  // A rank that fails calls this; every rank blocked in a collective throws instead of waiting for ever.
  virtual void abort() noexcept = 0;
};

// A group of one.
std::unique_ptr<Communicator> make_null_communicator();
// `size` ranks that are threads of this process. Spins briefly, then sleeps.
std::vector<std::unique_ptr<Communicator>> make_thread_communicators(int size);

}  // namespace fastllm

// Device and pinned memory, streams and events as objects. Allocating and freeing synchronise with the device: never in
// the steady state.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>

#include "backend/backend.h"
#include "check.h"

namespace fastllm::cuda {

// On the calling thread's device. Throw ResourceError saying how much was asked for and how much was free.
std::unique_ptr<Buffer> allocate_device(std::size_t bytes);
std::unique_ptr<Buffer> allocate_pinned(std::size_t bytes);  // the device reads and writes it at the same address

template <class T>
T* data_as(const Buffer& buffer) {
  return static_cast<T*>(buffer.data());
}

// Host memory that CUDA does not know of.
bool is_pageable(const void* memory);
// Memory the host reads: pageable or pinned.
bool is_host(const void* memory);

// Does not wait for the default stream.
class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void synchronize() const { check(cudaStreamSynchronize(stream_), "the work on the GPU"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// A point in a stream. wait() spins.
class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "recording an event"); }
  void wait() const { check(cudaEventSynchronize(event_), "the work on the GPU"); }
  bool done() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status != cudaErrorNotReady) check(status, "the work on the GPU");
    return status == cudaSuccess;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace fastllm::cuda

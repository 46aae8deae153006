// Host memory as the CPU backend wants it: whole pages, huge where the system grants them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/backend.h"

namespace fastllm::cpu {

// Zeroed anonymous pages, taken on first touch, aligned to 2 MiB when that large. Owned by one thread at a time.
class Pages final : public Buffer {
 public:
  explicit Pages(std::size_t bytes);  // throws ResourceError
  ~Pages() override;
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  void* data() const override { return data_; }
  std::size_t bytes() const override { return bytes_; }

 private:
  void* data_ = nullptr;
  void* mapping_ = nullptr;
  std::size_t bytes_ = 0, mapped_ = 0;
};

// Cuts buffers that live long out of larger ones, one after the other, so that small ones lie in huge pages as well:
// misses of the address cache cost a small weight a tenth or more of its reading. Owned by one thread.
class PageArena {
 public:
  // Zeroed, and aligned to a page; what is taken keeps the pages it lies in. Throws ResourceError.
  std::shared_ptr<std::byte> take(std::size_t bytes);

 private:
  std::shared_ptr<Pages> chunk_;
  std::size_t used_ = 0;  // bytes of the chunk
};

// What this process may still take and could take in all: the smaller of the machine's memory and the cgroup's.
struct MemoryInfo {
  std::int64_t free = 0, total = 0;  // bytes
};
MemoryInfo memory_info();

}  // namespace fastllm::cpu

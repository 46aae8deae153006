#include "backend/cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

#include "fastllm/error.h"

namespace fastllm::cpu {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// The first number of a file, or `otherwise` when there is none ("max", no such file).
std::int64_t read_number(const std::string& path, std::int64_t otherwise) {
  std::ifstream in(path);
  std::int64_t value = 0;
  return in >> value ? value : otherwise;
}

// The value of "key" in a file of "key value" lines; -1 when absent.
std::int64_t read_field(const std::string& path, const std::string& key) {
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind(key, 0) == 0) return std::stoll(line.substr(key.size()));
  }
  return -1;
}

}  // namespace

Pages::Pages(std::size_t bytes) : bytes_(bytes) {
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : 0;
  mapped_ = std::max<std::size_t>(bytes, 1) + alignment;
  if (mapped_ < bytes) throw ResourceError("a buffer of " + std::to_string(bytes) + " bytes exceeds the address space");
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    throw ResourceError("cannot map " + std::to_string(bytes) + " bytes of memory");
  }
  data_ = mapping_;
  if (alignment > 0) {
    const auto at = reinterpret_cast<std::uintptr_t>(mapping_);
    data_ = reinterpret_cast<void*>((at + alignment - 1) / alignment * alignment);
#if defined(MADV_HUGEPAGE)
    madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: failing changes speed only
#endif
  }
}

Pages::~Pages() { munmap(mapping_, mapped_); }

std::shared_ptr<std::byte> PageArena::take(std::size_t bytes) {
  constexpr std::size_t kChunk = 32 * kHugePage, kOwn = 4 * kHugePage, kSmallPage = 4096;
  const auto piece = [](std::shared_ptr<Pages> pages, std::size_t at) {
    auto* data = static_cast<std::byte*>(pages->data()) + at;
    return std::shared_ptr<std::byte>(std::move(pages), data);
  };
  if (bytes >= kOwn) return piece(std::make_shared<Pages>(bytes), 0);
  if (!chunk_ || kChunk - used_ < bytes) {
    chunk_ = std::make_shared<Pages>(kChunk);
    used_ = 0;
  }
  const std::size_t at = used_;
  used_ += (bytes + kSmallPage - 1) / kSmallPage * kSmallPage;
  return piece(chunk_, at);
}

MemoryInfo memory_info() {
  constexpr auto kNoLimit = std::numeric_limits<std::int64_t>::max();
  const std::int64_t total_kib = read_field("/proc/meminfo", "MemTotal:");
  const std::int64_t free_kib = read_field("/proc/meminfo", "MemAvailable:");
  MemoryInfo info;
  if (total_kib > 0 && free_kib >= 0) {
    info = {free_kib * 1024, total_kib * 1024};
  } else {
    const auto page = static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));
    info.total = info.free = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * page;
  }
  const struct {
    const char *limit, *used;
  } groups[] = {{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"},
                {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"}};
  for (const auto& g : groups) {
    const std::int64_t limit = read_number(g.limit, kNoLimit);
    if (limit == kNoLimit || limit >= info.total) continue;
    info.total = limit;
    info.free = std::min(info.free, std::max<std::int64_t>(0, limit - read_number(g.used, 0)));
  }
  return info;
}

}  // namespace fastllm::cpu

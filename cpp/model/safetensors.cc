#include "model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <span>

#include "fastllm/error.h"
#include "model/checked.h"
#include "model/dequant.h"

namespace fastllm {
namespace {

using Json = nlohmann::json;

constexpr std::uint64_t kMaxHeader = 100'000'000;  // bytes, as the format's own library

// A file mapped for reading, unmapped with the object.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw LoadError("cannot open '" + path + "': " + std::strerror(errno));
    struct stat info{};
    const bool is_file = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    size_ = is_file ? static_cast<std::size_t>(info.st_size) : 0;
    if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    if (!is_file) throw LoadError("'" + path + "' is not a regular file");
    if (data_ == MAP_FAILED) throw LoadError("cannot map '" + path + "': " + std::strerror(error));
  }
  ~MappedFile() {
    if (data_ != nullptr && data_ != MAP_FAILED) ::munmap(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

class HeaderParser {
 public:
  HeaderParser(const std::string& path, std::span<const std::byte> file) : path_(path), file_(file) {}

  std::vector<SourceTensor> parse() {
    const Json header = parse_json();
    for (const auto& [name, entry] : header.items())
      if (name != "__metadata__") tensors_.push_back(parse_tensor(name, entry));
    check_overlap();
    return std::move(tensors_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw LoadError("'" + path_ + "': " + what); }

  Json parse_json() {
    if (file_.size() < 8) fail("is " + std::to_string(file_.size()) + " bytes long, too short for a safetensors file");
    std::uint64_t length = 0;
    for (std::size_t i = 0; i < 8; ++i) length |= std::to_integer<std::uint64_t>(file_[i]) << (8 * i);
    const std::uint64_t limit = std::min<std::uint64_t>(kMaxHeader, file_.size() - 8);
    if (length > limit)
      fail("its header claims " + std::to_string(length) + " bytes; at most " + std::to_string(limit) +
           " are possible");
    const auto* begin = reinterpret_cast<const char*>(file_.data()) + 8;
    data_ = file_.subspan(8 + static_cast<std::size_t>(length));
    std::set<std::string> names;
    auto refuse_duplicates = [&](int depth, Json::parse_event_t event, Json& value) {
      if (depth > 8) fail("its header is nested too deeply");
      if (event == Json::parse_event_t::key && depth == 1 && !names.insert(value.get<std::string>()).second)
        fail("tensor '" + value.get<std::string>() + "' is listed twice");
      return true;
    };
    Json header;
    try {
      header = Json::parse(begin, begin + length, refuse_duplicates);
    } catch (const Json::exception& e) {
      fail(std::string("its header is not JSON: ") + e.what());
    }
    if (!header.is_object()) fail("its header is not a JSON object");
    return header;
  }

  std::vector<std::int64_t> sizes(const std::string& tensor, const Json& entry, const char* key) const {
    const auto it = entry.find(key);
    const auto bad = [&](const Json& x) {
      return !x.is_number_unsigned() || x.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX);
    };
    if (it == entry.end() || !it->is_array() || it->size() > 8 || std::any_of(it->begin(), it->end(), bad))
      fail("tensor '" + tensor + "' has no valid " + key);
    return it->get<std::vector<std::int64_t>>();
  }

  SourceTensor parse_tensor(const std::string& name, const Json& entry) const {
    if (!entry.is_object()) fail("the entry of tensor '" + name + "' is not an object");
    SourceTensor t;
    t.name = name;
    const auto dtype = entry.find("dtype");
    const std::string type = dtype != entry.end() && dtype->is_string() ? dtype->get<std::string>() : "missing";
    if (type == "F32") {
      t.type = SourceType::F32;
    } else if (type == "F16") {
      t.type = SourceType::F16;
    } else if (type == "BF16") {
      t.type = SourceType::BF16;
    } else {
      fail("the dtype of tensor '" + name + "' is " + type + "; F32, F16 and BF16 are read");
    }
    t.shape = sizes(name, entry, "shape");
    const auto offsets = sizes(name, entry, "data_offsets");
    const auto available = static_cast<std::int64_t>(data_.size());
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > available)
      fail("tensor '" + name + "' lies outside the " + std::to_string(available) + " bytes of data");
    auto factors = t.shape;
    factors.push_back(format_of(t.type).block_bytes);
    const auto bytes = checked_product(factors);
    t.bytes = offsets[1] - offsets[0];
    if (!bytes || *bytes != t.bytes)
      fail("tensor '" + name + "' has " + std::to_string(t.bytes) + " bytes, its shape and dtype need " +
           (bytes ? std::to_string(*bytes) : "more than 2^63"));
    t.data = data_.data() + offsets[0];
    return t;
  }

  void check_overlap() const {
    std::vector<const SourceTensor*> order;
    for (const auto& t : tensors_)
      if (t.bytes > 0) order.push_back(&t);
    std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->data < b->data; });
    for (std::size_t i = 1; i < order.size(); ++i)
      if (static_cast<const std::byte*>(order[i - 1]->data) + order[i - 1]->bytes > order[i]->data)
        fail("tensors '" + order[i - 1]->name + "' and '" + order[i]->name + "' overlap");
  }

  const std::string& path_;
  std::span<const std::byte> file_, data_;
  std::vector<SourceTensor> tensors_;
};

}  // namespace

std::vector<SourceTensor> read_safetensors(const std::string& path) {
  auto file = std::make_shared<const MappedFile>(path);
  auto tensors = HeaderParser(path, file->bytes()).parse();
  for (auto& t : tensors) t.owner = file;
  return tensors;
}

}  // namespace fastllm

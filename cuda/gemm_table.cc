#include "gemm_table.h"

#include <unistd.h>

#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

namespace fastllm::cuda {
namespace {

constexpr const char* kEnd = "end";  // of a file that was written to its end

std::istream& operator>>(std::istream& in, GemmTable::Entry& e) {
  int dtype = 0, out_dtype = 0;
  in >> e.shape.n >> e.shape.k >> dtype >> out_dtype >> e.shape.accumulate >> e.m;
  e.shape.dtype = static_cast<DType>(dtype);
  e.shape.out_dtype = static_cast<DType>(out_dtype);
  GemmTiming& t = e.timing;
  in >> t.lt_us;
  for (auto& word : t.algo.data) in >> word;
  in >> t.own_us >> t.own.strips >> t.own.k_warps >> t.own.blocks_per_sm >> t.own.rolling;
  if (!is_valid(t.own)) in.setstate(std::ios::failbit);
  return in;
}

std::ostream& operator<<(std::ostream& out, const GemmTable::Entry& e) {
  out << e.shape.n << ' ' << e.shape.k << ' ' << static_cast<int>(e.shape.dtype) << ' '
      << static_cast<int>(e.shape.out_dtype) << ' ' << e.shape.accumulate << ' ' << e.m << ' ' << e.timing.lt_us;
  for (const auto word : e.timing.algo.data) out << ' ' << word;
  const SkinnyConfig& own = e.timing.own;
  return out << ' ' << e.timing.own_us << ' ' << own.strips << ' ' << own.k_warps << ' ' << own.blocks_per_sm << ' '
             << own.rolling << '\n';
}

}  // namespace

const GemmTable::Entry* GemmTable::nearest(const GemmShape& shape, std::int64_t m) const {
  const Entry *above = nullptr, *greatest = nullptr;
  for (const Entry& e : entries_) {
    if (!(e.shape == shape)) continue;
    if (e.m >= m && (above == nullptr || e.m < above->m)) above = &e;
    if (greatest == nullptr || e.m > greatest->m) greatest = &e;
  }
  return above != nullptr ? above : greatest;
}

bool GemmTable::has(const GemmShape& shape, std::int64_t m) const {
  const Entry* e = nearest(shape, m);
  return e != nullptr && e->m == m;
}

void GemmTable::add(const GemmShape& shape, std::int64_t m, const GemmTiming& timing) {
  entries_.push_back({shape, m, timing});
}

std::string GemmTable::format(const std::string& title) const {
  std::ostringstream out;
  out << title << '\n' << entries_.size() << '\n';
  for (const Entry& e : entries_) out << e;
  out << kEnd << '\n';
  return out.str();
}

GemmTable GemmTable::parse(const std::string& text, const std::string& title) {
  constexpr std::size_t kMost = 1 << 20;
  std::istringstream in(text);
  std::string line;
  std::size_t count = 0;
  if (!std::getline(in, line) || line != title || !(in >> count) || count > kMost) return {};
  GemmTable table;
  for (std::size_t i = 0; i < count; ++i) {
    Entry e;
    if (!(in >> e)) return {};
    table.entries_.push_back(e);
  }
  if (!(in >> line) || line != kEnd) return {};
  return table;
}

GemmTable GemmTable::load(const std::string& file, const std::string& title) {
  if (file.empty()) return {};
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  if (!in || !(text << in.rdbuf())) return {};
  return parse(text.str(), title);
}

void GemmTable::save(const std::string& file, const std::string& title) const {
  if (file.empty()) return;
  std::error_code error;
  const std::filesystem::path path(file);
  std::filesystem::create_directories(path.parent_path(), error);
  const std::string unfinished = file + '.' + std::to_string(getpid());
  {
    std::ofstream out(unfinished, std::ios::binary | std::ios::trunc);
    out << format(title);
    out.close();
    if (!out) {
      std::filesystem::remove(unfinished, error);
      return;
    }
  }
  std::filesystem::rename(unfinished, path, error);
  if (error) std::filesystem::remove(unfinished, error);
}

std::string gemm_table_file(const std::string& device, std::size_t lt_version) {
  std::filesystem::path folder;
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && *cache != '\0') {
    folder = cache;
  } else if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0') {
    folder = std::filesystem::path(home) / ".cache";
  } else {
    return {};
  }
  std::string name = "gemm-" + device + "-" + std::to_string(lt_version) + ".txt";
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '-' && c != '.') c = '_';
  }
  return (folder / "fastllm" / name).string();
}

}  // namespace fastllm::cuda

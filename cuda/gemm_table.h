// What was measured about products on one kind of GPU, in memory and in a file, so that only the first start measures.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm_lt.h"
#include "skinny.h"

namespace fastllm::cuda {

// The best of each kind for one shape and number of rows.
struct GemmTiming {
  static constexpr float kNone = -1;
  float lt_us = kNone;
  LtAlgo algo{};
  float own_us = kNone;
  SkinnyConfig own{};

  bool own_is_best(float handicap_us = 0) const {
    return own_us != kNone && (lt_us == kNone || own_us < lt_us + handicap_us);
  }
};

class GemmTable {
 public:
  struct Entry {
    GemmShape shape;
    std::int64_t m = 0;
    GemmTiming timing;
  };

  // Of the smallest m measured that is not below m, else of the greatest; null: the shape was never measured.
  const Entry* nearest(const GemmShape& shape, std::int64_t m) const;
  bool has(const GemmShape& shape, std::int64_t m) const;
  void add(const GemmShape& shape, std::int64_t m, const GemmTiming& timing);
  const std::vector<Entry>& entries() const { return entries_; }

  // title: what the figures hold for (device, versions). parse() gives an empty table for another title, and for
  // anything damaged.
  std::string format(const std::string& title) const;
  static GemmTable parse(const std::string& text, const std::string& title);

  // A missing or unreadable file is an empty table. save() replaces the file as a whole; failure changes nothing.
  static GemmTable load(const std::string& file, const std::string& title);
  void save(const std::string& file, const std::string& title) const;

 private:
  std::vector<Entry> entries_;
};

// Below $XDG_CACHE_HOME or ~/.cache; empty where neither is known.
std::string gemm_table_file(const std::string& device, std::size_t lt_version);

}  // namespace fastllm::cuda

#include "base/json_body.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

namespace fastllm {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kLongIds = 64;  // shorter lists are left to the decoder
constexpr std::size_t kMaxIdLists = 4096;
// Strings are cut from the largest of these bytes on that makes the copy small, or else from the smallest.
constexpr std::size_t kLongText[] = {16 << 10, 1 << 10, 64};
constexpr std::size_t kSmall = 512 << 10;  // bytes
constexpr std::size_t kBadIdBytes = 40;
constexpr std::size_t kMaxFieldBytes = 64;  // of names that are shown
constexpr std::size_t kMaxUnknown = 16;

bool is_control(char c) { return static_cast<unsigned char>(c) < 0x20; }

// The text with runs of line breaks cut short: the library keeps all that it reads between two tokens, and writes each
// control character of it as eight when it complains.
struct Bytes {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  char operator*() const { return *at; }
  Bytes& operator++() {
    if (!is_control(*at++)) return *this;
    for (; at != end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t'); ++at) ++*skipped;
    return *this;
  }
  bool operator==(const Bytes& other) const { return at == other.at; }

  const char* at;
  const char* end;
  std::size_t* skipped;
};

std::string dumped(const std::string& text) {
  const bool plain = std::ranges::none_of(text, [](char c) { return is_control(c) || c == '"' || c == '\\'; });
  return plain ? '"' + text + '"' : Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// The first characters of UTF-8.
std::string clipped(const std::string& text) {
  std::size_t bytes = std::min(text.size(), kMaxFieldBytes);
  while (bytes < text.size() && (text[bytes] & 0xC0) == 0x80) --bytes;
  return text.substr(0, bytes);
}

// Whole numbers of 32 bits, however they are written.
template <typename Number>
std::optional<std::int32_t> id_of(Number number) {
  const auto value = static_cast<double>(number);
  if (value < INT32_MIN || value > INT32_MAX || value != std::trunc(value)) return std::nullopt;
  return static_cast<std::int32_t>(value);
}

class Reader final : public nlohmann::json_sax<Json> {
 public:
  Reader(const JsonRules& rules, std::size_t long_text, std::size_t max_small)
      : rules_(rules), long_text_(long_text), max_small_(max_small) {}

  JsonBody read(std::string_view text) {
    const char* const end = text.data() + text.size();
    Json::sax_parse(Bytes{text.data(), end, &skipped_}, Bytes{end, end, &skipped_}, this);
    const std::size_t nul = text.find('\0');  // where the library sees the end
    if (body_.error.empty() && nul != text.npos) body_.error = "invalid literal" + place(nul + 1);
    return std::move(body_);
  }

  bool null() override { return value("null"); }
  bool boolean(bool given) override { return value(given ? "true" : "false"); }
  bool number_integer(std::int64_t number) override { return value(std::to_string(number), id_of(number)); }
  bool number_unsigned(std::uint64_t number) override { return value(std::to_string(number), id_of(number)); }

  bool number_float(double number, const std::string& text) override {
    std::string written = text;
    std::ranges::replace(written, ',', '.');  // some releases give the locale's decimal point
    return value(written, id_of(number));
  }

  bool string(std::string& text) override {
    if (dropped_ || open_.empty() || text.size() < long_text_) return value(dropped_ ? "" : dumped(text));
    const bool more = value(dumped(mark()));
    body_.cuts.push_back({step_here(), std::move(text)});
    return more;
  }

  bool binary(Json::binary_t&) override { return false; }  // not of JSON

  bool start_object(std::size_t) override { return open("{", true); }
  bool end_object() override { return close("}"); }

  bool key(std::string& name) override {
    Level& level = open_.back();
    const bool top = open_.size() == 1;
    if (top) {
      dropped_ = false;
      field_.reset();
    }
    note(body_.keys, ++level.count);
    if (level.count > 1) emit(",");
    if (top) begin_field(name);
    if (!dropped_) emit(dumped(name) + ':');
    level.key = std::move(name);
    return true;
  }

  bool start_array(std::size_t) override {
    const bool may_hold_ids = in_ids_field_ && (open_.size() == 1 || (open_.size() == 2 && !open_.back().is_object));
    const bool more = open("[", false);
    in_ids_ = may_hold_ids;
    ids_at_ = body_.small.size() - 1;
    ids_.clear();
    return more;
  }

  bool end_array() override {
    if (!std::exchange(in_ids_, false) || ids_.size() < kLongIds || body_.cuts.size() >= kMaxIdLists) {
      return close("]");
    }
    body_.small.resize(ids_at_);
    body_.values -= static_cast<std::int64_t>(ids_.size()) + 1;
    emit("[" + mark());
    close("]");
    body_.cuts.push_back({step_here(), std::move(ids_)});
    return true;
  }

  bool parse_error(std::size_t at, const std::string&, const Json::exception& error) override {
    if (dynamic_cast<const Json::out_of_range*>(&error) != nullptr) {
      body_.error = "a number is out of range";
      body_.error_field = field_;
    } else {  // "[...] parse error at ...: syntax error while parsing value - invalid literal; last read: '...'"
      const std::string_view what = error.what();
      const std::size_t begin = what.find(": ") + 2;
      body_.error = what.substr(begin, what.find("; last read: ") - begin);
    }
    body_.error += place(at + skipped_);
    return false;
  }

 private:
  struct Level {
    bool is_object = false;
    std::int64_t count = 0;  // of keys or elements begun
    std::string key;         // the last one
    int place = -1;          // in body_.places, once something in it was cut
  };

  static std::string place(std::size_t byte) { return " (byte " + std::to_string(byte) + ")"; }

  void note(JsonMost& most, std::int64_t count) const {
    if (count <= most.count) return;
    most.count = count;
    most.field = field_;
  }

  // To the copy, unless it is of a field that nobody reads.
  void emit(std::string_view piece) {
    if (!dropped_) body_.small += piece;
  }

  void begin_field(const std::string& name) {
    field_ = clipped(name);
    dropped_ = std::ranges::find(rules_.fields, name) == rules_.fields.end();
    in_ids_field_ = !dropped_ && name == rules_.ids_field;
    if (!dropped_) return;
    body_.small += "\"\":null";
    if (body_.unknown.size() < kMaxUnknown) body_.unknown.push_back(*field_);
  }

  // What begins with this text. False: read no further.
  bool value(std::string_view text, std::optional<std::int32_t> id = std::nullopt) {
    if (!open_.empty() && !open_.back().is_object) {
      note(body_.elements, ++open_.back().count);
      if (open_.back().count > 1) emit(",");
    }
    emit(text);
    body_.values += dropped_ ? 0 : 1;
    if (in_ids_ && id) {
      ids_.push_back(*id);
    } else if (std::exchange(in_ids_, false) && ids_.size() >= kLongIds && !body_.bad_id) {
      const std::int64_t list = open_.size() == 3 ? open_[1].count - 1 : -1;
      body_.bad_id = {list, static_cast<std::int64_t>(ids_.size()), std::string(text.substr(0, kBadIdBytes))};
    }
    return in_ids_ || body_.small.size() <= max_small_;
  }

  bool open(std::string_view text, bool is_object) {
    const bool more = value(text);
    open_.emplace_back().is_object = is_object;
    note(body_.depth, static_cast<std::int64_t>(open_.size()));
    if (body_.depth.count < kMaxJsonDepth) return more;
    body_.error = "it is nested too deeply";
    return false;
  }

  bool close(std::string_view text) {
    if (open_.size() == 1) dropped_ = false;
    emit(text);
    open_.pop_back();
    return true;
  }

  std::string mark() const { return rules_.mark + std::to_string(body_.cuts.size()); }

  // From the innermost open level to its last value.
  JsonStep step_here() {
    int place = -1;
    for (std::size_t i = 1; i < open_.size(); ++i) {
      if (open_[i].place < 0) {
        open_[i].place = static_cast<int>(body_.places.size());
        body_.places.push_back(step_in(open_[i - 1], place));
      }
      place = open_[i].place;
    }
    return step_in(open_.back(), place);
  }

  static JsonStep step_in(const Level& level, int place) {
    return {place, level.is_object ? std::optional(level.key) : std::nullopt, level.count - 1};
  }

  const JsonRules& rules_;
  std::size_t long_text_, max_small_;
  std::size_t skipped_ = 0;  // bytes that the library did not get to see
  std::vector<Level> open_;
  std::optional<std::string> field_;  // of the top level, clipped
  bool dropped_ = false;              // in a field that nobody reads
  bool in_ids_field_ = false;         // in the value of rules_.ids_field
  bool in_ids_ = false;               // in a list there that has held ids only, so far
  std::vector<std::int32_t> ids_;
  std::size_t ids_at_ = 0;  // where it begins in the copy
  JsonBody body_;
};

}  // namespace

JsonBody read_json_body(std::string_view text, const JsonRules& rules) {
  JsonBody body;
  for (const std::size_t long_text : kLongText) {
    const bool last = long_text == std::end(kLongText)[-1];
    body = Reader(rules, long_text, last ? text.npos : kSmall).read(text);
    if (body.small.size() <= kSmall || !body.error.empty()) break;
  }
  return body;
}

}  // namespace fastllm

// ModelSpec as JSON: keys are the field names, enums lower-case strings, absent fields keep their defaults. The fields
// of each struct are listed once and visited by a reader or a writer.
#include <nlohmann/json.hpp>

#include <array>
#include <cmath>
#include <concepts>
#include <limits>
#include <set>
#include <span>
#include <type_traits>
#include <utility>

#include "fastllm/error.h"
#include "fastllm/model_spec.h"

namespace fastllm {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kMaxText = std::size_t{16} << 20;  // bytes of JSON
constexpr std::size_t kMaxList = 1u << 16;               // entries of any list

template <class E>
struct EnumNames;
#define FASTLLM_ENUM_NAMES(E, ...)                                  \
  template <>                                                       \
  struct EnumNames<E> {                                             \
    static constexpr std::pair<E, const char*> all[] = __VA_ARGS__; \
  }
FASTLLM_ENUM_NAMES(NormKind, {{NormKind::None, "none"}, {NormKind::Rms, "rms"}, {NormKind::Layer, "layer"}});
FASTLLM_ENUM_NAMES(Activation, {{Activation::Silu, "silu"},
                                {Activation::Gelu, "gelu"},
                                {Activation::GeluTanh, "gelu_tanh"},
                                {Activation::Relu, "relu"}});
FASTLLM_ENUM_NAMES(RopeStyle, {{RopeStyle::Half, "half"}, {RopeStyle::Interleaved, "interleaved"}});
FASTLLM_ENUM_NAMES(RopeScalingKind, {{RopeScalingKind::None, "none"},
                                     {RopeScalingKind::Linear, "linear"},
                                     {RopeScalingKind::Dynamic, "dynamic"},
                                     {RopeScalingKind::Llama3, "llama3"},
                                     {RopeScalingKind::Yarn, "yarn"},
                                     {RopeScalingKind::LongRope, "longrope"}});
#undef FASTLLM_ENUM_NAMES

// T may be const: the writer visits const structs.
template <class T, class S>
concept Is = std::same_as<std::remove_const_t<T>, S>;

template <class V, Is<NormSpec> T>
void visit(V& v, T& s) {
  v("kind", s.kind), v("eps", s.eps), v("bias", s.bias);
}

template <class V, Is<RopeScaling> T>
void visit(V& v, T& s) {
  v("kind", s.kind), v("factor", s.factor);
  v("low_freq_factor", s.low_freq_factor), v("high_freq_factor", s.high_freq_factor);
  v("beta_fast", s.beta_fast), v("beta_slow", s.beta_slow);
  v("attention_factor", s.attention_factor);
  v("mscale", s.mscale), v("mscale_all_dim", s.mscale_all_dim);
  v("truncate", s.truncate), v("original_max_len", s.original_max_len);
  v("short_factor", s.short_factor), v("long_factor", s.long_factor);
}

template <class V, Is<RopeSpec> T>
void visit(V& v, T& s) {
  v("dim", s.dim), v("theta", s.theta), v("style", s.style), v("scaling", s.scaling);
}

template <class V, Is<AttnSpec> T>
void visit(V& v, T& s) {
  v("heads", s.heads), v("kv_heads", s.kv_heads), v("head_dim", s.head_dim);
  v("qkv_bias", s.qkv_bias), v("out_bias", s.out_bias);
  v("q_norm", s.q_norm), v("k_norm", s.k_norm), v("rope", s.rope);
  v("scale", s.scale), v("softcap", s.softcap), v("window", s.window), v("alibi", s.alibi);
}

template <class V, Is<MlpSpec> T>
void visit(V& v, T& s) {
  v("inner", s.inner), v("gated", s.gated), v("act", s.act), v("bias", s.bias);
}

template <class V, Is<LayerSpec> T>
void visit(V& v, T& s) {
  v("parallel", s.parallel);
  v("pre_attn", s.pre_attn), v("post_attn", s.post_attn), v("pre_ffn", s.pre_ffn), v("post_ffn", s.post_ffn);
  v("attn", s.attn), v("ffn", s.ffn);
}

template <class V, Is<EmbedSpec> T>
void visit(V& v, T& s) {
  v("vocab", s.vocab), v("hidden", s.hidden), v("scale", s.scale);
  v("learned_positions", s.learned_positions), v("position_offset", s.position_offset);
}

template <class V, Is<HeadSpec> T>
void visit(V& v, T& s) {
  v("tied", s.tied), v("bias", s.bias), v("softcap", s.softcap), v("scale", s.scale), v("final_norm", s.final_norm);
}

template <class V, Is<ModelSpec> T>
void visit(V& v, T& s) {
  v("family", s.family), v("embed", s.embed), v("kinds", s.kinds), v("layer_kind", s.layer_kind);
  v("head", s.head), v("max_len", s.max_len), v("eos", s.eos);
}

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw InvalidArgument("model spec: " + path + " " + what);
}

// What a sentence quotes of a value.
std::string excerpt(const Json& j) {
  auto text = j.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

void parse(const Json& j, const std::string& path, bool& out) {
  if (!j.is_boolean()) fail(path, "is " + excerpt(j) + ", not true or false");
  out = j.get<bool>();
}

void parse(const Json& j, const std::string& path, int& out) {
  const bool is_int = j.is_number_unsigned()
                          ? j.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<int>::max())
                          : j.is_number_integer() && j.get<std::int64_t>() >= std::numeric_limits<int>::min();
  if (!is_int) fail(path, "is " + excerpt(j) + ", not a 32-bit integer");
  out = j.get<int>();
}

void parse(const Json& j, const std::string& path, double& out) {
  if (!j.is_number() || !std::isfinite(j.get<double>())) fail(path, "is " + excerpt(j) + ", not a finite number");
  out = j.get<double>();
}

void parse(const Json& j, const std::string& path, float& out) {
  double wide = 0;
  parse(j, path, wide);
  if (std::abs(wide) > static_cast<double>(std::numeric_limits<float>::max()))
    fail(path, "is " + excerpt(j) + ", beyond 32-bit floats");
  out = static_cast<float>(wide);
}

void parse(const Json& j, const std::string& path, std::string& out) {
  if (!j.is_string()) fail(path, "is " + excerpt(j) + ", not a string");
  out = j.get<std::string>();
}

template <class E>
  requires std::is_enum_v<E>
void parse(const Json& j, const std::string& path, E& out) {
  std::string known;
  for (const auto& [value, name] : EnumNames<E>::all) {
    if (j.is_string() && j.get_ref<const std::string&>() == name) {
      out = value;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  fail(path, "is " + excerpt(j) + "; known are " + known);
}

template <class T>
void parse(const Json& j, const std::string& path, std::vector<T>& out);
template <class T>
  requires std::is_class_v<T>
void parse(const Json& j, const std::string& path, T& out);

// Visits one object: remembers which keys the struct knows, so that the others can be refused.
class Reader {
 public:
  Reader(const Json& object, const std::string& path) : object_(object), path_(path) {
    if (!object.is_object()) fail(path, "is " + excerpt(object) + ", not an object");
  }
  template <class T>
  void operator()(const char* key, T& field) {
    known_.insert(key);
    if (const auto it = object_.find(key); it != object_.end()) parse(*it, path_ + "." + key, field);
  }
  void finish() const {
    for (const auto& [key, value] : object_.items())
      if (!known_.contains(key)) fail(path_ + "." + key, "is not a field this version knows");
  }

 private:
  const Json& object_;
  const std::string& path_;
  std::set<std::string_view> known_;
};

template <class T>
void parse(const Json& j, const std::string& path, std::vector<T>& out) {
  if (!j.is_array()) fail(path, "is " + excerpt(j) + ", not a list");
  if (j.size() > kMaxList)
    fail(path, "has " + std::to_string(j.size()) + " entries; at most " + std::to_string(kMaxList) + " are allowed");
  out.clear();
  for (const auto& item : j) parse(item, path + "[" + std::to_string(out.size()) + "]", out.emplace_back());
}

template <class T>
  requires std::is_class_v<T>
void parse(const Json& j, const std::string& path, T& out) {
  Reader reader(j, path);
  visit(reader, out);
  reader.finish();
}

class Writer {
 public:
  template <class T>
  void operator()(const char* key, const T& field) {
    object_[key] = to_json(field);
  }
  Json take() { return std::move(object_); }

 private:
  template <class T>
  static Json to_json(const T& x) {
    if constexpr (std::is_enum_v<T>) {
      for (const auto& [value, name] : EnumNames<T>::all)
        if (value == x) return name;
      throw InvalidArgument("model spec: an enum holds a value without a name");
    } else if constexpr (std::is_arithmetic_v<T> || std::is_same_v<T, std::string>) {
      return x;
    } else if constexpr (requires { x.begin(); }) {
      Json list = Json::array();
      for (const auto& item : x) list.push_back(to_json(item));
      return list;
    } else {
      Writer inner;
      visit(inner, x);
      return inner.take();
    }
  }
  Json object_ = Json::object();
};

}  // namespace

ModelSpec spec_from_json(std::string_view text) {
  if (text.size() > kMaxText)
    throw InvalidArgument("model spec: " + std::to_string(text.size()) + " bytes of JSON; at most " +
                          std::to_string(kMaxText) + " are read");
  Json j;
  try {
    j = Json::parse(text);
  } catch (const Json::exception& e) {
    throw InvalidArgument(std::string("model spec: not JSON: ") + e.what());
  }
  ModelSpec spec;
  parse(j, "spec", spec);
  check_spec(spec);
  return spec;
}

std::string spec_to_json(const ModelSpec& spec) {
  Writer writer;
  visit(writer, spec);
  return writer.take().dump(1);
}

}  // namespace fastllm

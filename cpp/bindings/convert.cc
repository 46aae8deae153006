#include "bindings/convert.h"

#include <array>
#include <string_view>
#include <utility>

namespace fastllm {
namespace {

template <class Enum, std::size_t N>
Enum from_name(const std::array<std::pair<std::string_view, Enum>, N>& table, const std::string& name,
               const char* what) {
  std::string allowed;
  for (const auto& [text, value] : table) {
    if (text == name) return value;
    allowed += (allowed.empty() ? "" : ", ") + std::string(text);
  }
  throw InvalidArgument(std::string(what) + " '" + name + "' is unknown; use one of: " + allowed);
}

constexpr std::array<std::pair<std::string_view, SourceType>, 16> kSourceTypes{{
    {"F32", SourceType::F32},
    {"F16", SourceType::F16},
    {"BF16", SourceType::BF16},
    {"Q4_0", SourceType::Q4_0},
    {"Q4_1", SourceType::Q4_1},
    {"Q5_0", SourceType::Q5_0},
    {"Q5_1", SourceType::Q5_1},
    {"Q8_0", SourceType::Q8_0},
    {"Q2_K", SourceType::Q2_K},
    {"Q3_K", SourceType::Q3_K},
    {"Q4_K", SourceType::Q4_K},
    {"Q5_K", SourceType::Q5_K},
    {"Q6_K", SourceType::Q6_K},
    {"I8", SourceType::I8},
    {"I32", SourceType::I32},
    {"I64", SourceType::I64},
}};

constexpr std::array<std::pair<std::string_view, CodeLayout>, 3> kLayouts{{
    {"gptq", CodeLayout::Gptq},
    {"awq", CodeLayout::Awq},
    {"rows", CodeLayout::Rows},
}};

constexpr std::array<std::pair<std::string_view, WeightTransform>, 5> kTransforms{{
    {"copy", WeightTransform::Copy},
    {"transpose", WeightTransform::Transpose},
    {"qkv_concat", WeightTransform::QkvConcat},
    {"qkv_grouped", WeightTransform::QkvGrouped},
    {"gate_up_concat", WeightTransform::GateUpConcat},
}};

constexpr std::array<std::pair<std::string_view, PreemptionMode>, 2> kPreemption{{
    {"recompute", PreemptionMode::Recompute},
    {"swap", PreemptionMode::Swap},
}};

constexpr std::array<std::pair<std::string_view, SchedulingPolicy>, 2> kPolicies{{
    {"fcfs", SchedulingPolicy::Fcfs},
    {"priority", SchedulingPolicy::Priority},
}};

constexpr std::array<std::pair<std::string_view, EarlyStopping>, 3> kEarlyStopping{{
    {"no", EarlyStopping::No},
    {"yes", EarlyStopping::Yes},
    {"never", EarlyStopping::Never},
}};

py::list ids_to_list(std::span<const std::int32_t> ids) {
  py::list out(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) out[i] = py::int_(ids[i]);
  return out;
}

// Turns a Python exception into one of ours while the GIL is held, so that nothing of Python outlives it.
[[noreturn]] void rethrow(const char* who, py::error_already_set& e) {
  throw Error(std::string(who) + " raised " + e.what());
}

// The same of the server's own code, whose sentences reach clients: those need no file names and lines.
[[noreturn]] void rethrow_sentence(const py::error_already_set& e) {
  throw Error(py::str(e.value()).cast<std::string>());
}

class PyLogitsProcessor : public LogitsProcessor {
 public:
  explicit PyLogitsProcessor(py::object callable) : callable_(share(std::move(callable))) {}

  void process(std::span<const std::int32_t> tokens, int num_prompt, std::span<float> logits) override {
    py::gil_scoped_acquire gil;
    try {
      const auto prompt = static_cast<std::size_t>(num_prompt);
      // The capsule lends the row: the array must not free it, and writing to it changes the logits.
      py::array_t<float> row(static_cast<py::ssize_t>(logits.size()), logits.data(),
                             py::capsule(logits.data(), [](void*) {}));
      py::object result = (*callable_)(ids_to_list(tokens.first(prompt)), ids_to_list(tokens.subspan(prompt)), row);
      if (result.is_none() || result.is(row)) return;
      auto changed = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(result);
      if (!changed || static_cast<std::size_t>(changed.size()) != logits.size()) {
        throw Error("the logits processor returned something else than an array of " + std::to_string(logits.size()) +
                    " numbers");
      }
      std::copy_n(changed.data(), logits.size(), logits.data());
    } catch (py::error_already_set& e) {
      rethrow("the logits processor", e);
    }
  }

 private:
  std::shared_ptr<py::object> callable_;
};

class PyTokenMask : public TokenMask {
 public:
  explicit PyTokenMask(py::object mask) : mask_(share(std::move(mask))) {}

  void fill(std::span<std::uint32_t> bits) override {
    py::gil_scoped_acquire gil;
    try {
      py::array_t<std::uint32_t> view(static_cast<py::ssize_t>(bits.size()), bits.data(),
                                      py::capsule(bits.data(), [](void*) {}));
      mask_->attr("fill")(view);
    } catch (py::error_already_set& e) {
      rethrow_sentence(e);
    }
  }

  bool accept(std::int32_t token) override {
    py::gil_scoped_acquire gil;
    try {
      return mask_->attr("accept")(token).cast<bool>();
    } catch (py::error_already_set& e) {
      rethrow_sentence(e);
    }
  }

  std::shared_ptr<void> hold() override { return std::make_shared<py::gil_scoped_acquire>(); }

  std::shared_ptr<TokenMask> clone() const override {
    py::gil_scoped_acquire gil;
    try {
      return std::make_shared<PyTokenMask>(mask_->attr("clone")());
    } catch (py::error_already_set& e) {
      rethrow_sentence(e);
    }
  }

 private:
  std::shared_ptr<py::object> mask_;
};

}  // namespace

std::optional<std::span<const TokenId>> id_buffer(const py::object& ids, py::buffer_info& info) {
  if (!PyObject_CheckBuffer(ids.ptr())) return std::nullopt;
  info = py::reinterpret_borrow<py::buffer>(ids).request();
  const bool fits = info.ndim == 1 && info.strides[0] == info.itemsize && info.item_type_is_equivalent_to<TokenId>();
  if (!fits) throw py::type_error("token ids must be a list, or a contiguous buffer of 32-bit ints");
  return std::span(static_cast<const TokenId*>(info.ptr), static_cast<std::size_t>(info.size));
}

std::vector<TokenId> token_ids(const char* what, const py::object& ids) {
  py::buffer_info info;
  if (const auto buffer = id_buffer(ids, info)) return {buffer->begin(), buffer->end()};
  const py::list list = id_list(ids);
  std::vector<TokenId> out(list.size());
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::optional<TokenId> id = token_id(list, i);
    if (!id) throw InvalidArgument(std::string(what) + "[" + std::to_string(i) + "] is no 32-bit int.");
    out[i] = *id;
  }
  return out;
}

SourceType source_type_from_name(const std::string& name) { return from_name(kSourceTypes, name, "source type"); }
WeightTransform transform_from_name(const std::string& name) { return from_name(kTransforms, name, "transform"); }
CodeLayout layout_from_name(const std::string& name) { return from_name(kLayouts, name, "code layout"); }
PreemptionMode preemption_from_name(const std::string& name) { return from_name(kPreemption, name, "preemption"); }
SchedulingPolicy policy_from_name(const std::string& name) { return from_name(kPolicies, name, "policy"); }
EarlyStopping early_stopping_from_name(const std::string& name) {
  return from_name(kEarlyStopping, name, "early stopping");
}
const char* name_of(EarlyStopping stopping) {
  return stopping == EarlyStopping::No ? "no" : stopping == EarlyStopping::Yes ? "yes" : "never";
}
const char* name_of(PreemptionMode mode) { return mode == PreemptionMode::Swap ? "swap" : "recompute"; }
const char* name_of(SchedulingPolicy policy) { return policy == SchedulingPolicy::Priority ? "priority" : "fcfs"; }

py::object finish_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::None:
      return py::none();
    case FinishReason::Stop:
      return py::str("stop");
    case FinishReason::Length:
      return py::str("length");
    case FinishReason::Abort:
      return py::str("abort");
    case FinishReason::Error:
      return py::str("error");
  }
  return py::none();
}

py::object error_kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::None:
      return py::none();
    case ErrorKind::Invalid:
      return py::str("invalid");
    case ErrorKind::Overloaded:
      return py::str("overloaded");
    case ErrorKind::Timeout:
      return py::str("timeout");
    case ErrorKind::Engine:
      return py::str("engine");
  }
  return py::none();
}

py::object wait_reason_name(WaitReason reason) {
  switch (reason) {
    case WaitReason::None:
      return py::none();
    case WaitReason::Slots:
      return py::str("slots");
    case WaitReason::Blocks:
      return py::str("blocks");
    case WaitReason::Tokens:
      return py::str("tokens");
    case WaitReason::Prompt:
      return py::str("prompt");
  }
  return py::none();
}

std::shared_ptr<py::object> share(py::object object) {
  return {new py::object(std::move(object)), [](py::object* p) {
            if (Py_IsInitialized() == 0) return;  // the interpreter is gone, and every object with it
            py::gil_scoped_acquire gil;
            delete p;
          }};
}

SourceTensor source_tensor(const std::string& name, const std::string& type, std::vector<std::int64_t> shape,
                           const py::object& data, int interleaved_head_dim, std::shared_ptr<const Packing> packing) {
  auto* buffer = new Py_buffer;
  if (PyObject_GetBuffer(data.ptr(), buffer, PyBUF_SIMPLE) != 0) {
    PyErr_Clear();
    delete buffer;
    throw InvalidArgument("tensor '" + name + "': its data has no contiguous buffer");
  }
  std::shared_ptr<const void> owner(buffer, [buffer](const void*) {
    if (Py_IsInitialized() == 0) return;
    py::gil_scoped_acquire gil;
    PyBuffer_Release(buffer);
    delete buffer;
  });
  return {name,
          source_type_from_name(type),
          std::move(shape),
          buffer->buf,
          buffer->len,
          std::move(owner),
          interleaved_head_dim,
          std::move(packing)};
}

std::shared_ptr<LogitsProcessor> logits_processor(const py::object& callable) {
  if (callable.is_none()) return nullptr;
  return std::make_shared<PyLogitsProcessor>(callable);
}

std::shared_ptr<TokenMask> token_mask(const py::object& mask) {
  if (mask.is_none()) return nullptr;
  return std::make_shared<PyTokenMask>(mask);
}

}  // namespace fastllm

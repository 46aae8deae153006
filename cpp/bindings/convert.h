// Between Python objects and the engine's plain structs. GIL held everywhere in here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fastllm/error.h"
#include "fastllm/types.h"
#include "fastllm/weights.h"

namespace fastllm {

namespace py = pybind11;

SourceType source_type_from_name(const std::string& name);
WeightTransform transform_from_name(const std::string& name);
CodeLayout layout_from_name(const std::string& name);
PreemptionMode preemption_from_name(const std::string& name);
SchedulingPolicy policy_from_name(const std::string& name);
EarlyStopping early_stopping_from_name(const std::string& name);
const char* name_of(PreemptionMode mode);
const char* name_of(EarlyStopping stopping);
const char* name_of(SchedulingPolicy policy);
py::object finish_name(FinishReason reason);     // None while running
py::object error_kind_name(ErrorKind kind);      // None without an error
py::object wait_reason_name(WaitReason reason);  // None while nobody waits

// The ids in a contiguous buffer of 32-bit ints, such as array('i'); nothing if it is none. The buffer info keeps them.
std::optional<std::span<const TokenId>> id_buffer(const py::object& ids, py::buffer_info& info);

inline py::list id_list(const py::object& ids) {
  if (!py::isinstance<py::list>(ids)) throw py::type_error("token ids must be a list, or a buffer of 32-bit ints");
  return py::reinterpret_borrow<py::list>(ids);
}

// Element i; nothing unless it is an int, and no bool, that fits. Prompts have thousands: pybind's own conversion takes
// four times as long.
inline std::optional<TokenId> token_id(const py::list& ids, std::size_t i) {
  PyObject* const object = PyList_GET_ITEM(ids.ptr(), static_cast<py::ssize_t>(i));
  if (!PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const long value = PyLong_AsLongAndOverflow(object, &overflow);
  if (overflow != 0 || !std::in_range<TokenId>(value)) return std::nullopt;
  return static_cast<TokenId>(value);
}

// Keeps a Python object alive from threads that do not hold the GIL; the last owner takes the GIL to let go.
std::shared_ptr<py::object> share(py::object object);

// A view of the buffer's memory, contiguous, read-only. Throws InvalidArgument.
SourceTensor source_tensor(const std::string& name, const std::string& type, std::vector<std::int64_t> shape,
                           const py::object& data, int interleaved_head_dim,
                           std::shared_ptr<const Packing> packing = nullptr);

std::shared_ptr<LogitsProcessor> logits_processor(const py::object& callable);  // None gives null
std::shared_ptr<TokenMask> token_mask(const py::object& mask);                  // None gives null

// Token ids of a list, or of a contiguous buffer of 32-bit ints; `what` names it in errors. Throws InvalidArgument.
std::vector<TokenId> token_ids(const char* what, const py::object& ids);

void bind_types(py::module_& m);
void bind_engine(py::module_& m);
void bind_json(py::module_& m);

}  // namespace fastllm

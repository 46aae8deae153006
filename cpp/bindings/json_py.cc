// fastllm.base.JsonBody as a Python object: what is long is built here, so that the interpreter is free meanwhile.
#include "base/json_body.h"

#include <algorithm>
#include <cstring>

#include "bindings/convert.h"

namespace fastllm {
namespace {

// JsonBody with its parts as Python has them.
struct Body {
  std::vector<std::pair<std::int64_t, std::optional<std::string>>> most;  // of depth, keys, elements
  std::int64_t values = 0;
  std::vector<std::string> unknown;
  std::string error;
  std::optional<std::string> error_field;
  py::object bad_id;  // (list, index, text) or None
  py::bytes small;
  py::list places;  // (place, key or index)
  py::list cuts;    // (place, key or index, str or memoryview of int32)
};

py::object key_or_index(const JsonStep& step) {
  if (step.key) return py::cast(*step.key);
  return py::int_(step.index);
}

py::object check_new(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

// Calls visit with each code point of valid UTF-8.
template <typename Visit>
void for_each_char(std::string_view text, Visit visit) {
  for (std::size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at++]);
    int more = lead < 0xC0 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    char32_t value = more == 0 ? lead : lead & (0x3Fu >> more);
    for (; more > 0; --more) value = (value << 6) | (static_cast<unsigned char>(text[at++]) & 0x3Fu);
    visit(value);
  }
}

struct Width {
  py::ssize_t chars = 0;
  char32_t max_char = 0;
};

Width width_of(const JsonCut& cut) {
  Width width;
  if (const auto* text = std::get_if<std::string>(&cut.value)) {
    for_each_char(*text, [&width](char32_t value) {
      ++width.chars;
      width.max_char = std::max(width.max_char, value);
    });
  }
  return width;
}

// Memory for a cut, to be written before anybody else sees it.
py::object allocate(const JsonCut& cut, const Width& width) {
  const auto* ids = std::get_if<std::vector<TokenId>>(&cut.value);
  if (ids == nullptr) return check_new(PyUnicode_New(width.chars, width.max_char));
  return check_new(PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(ids->size() * sizeof(TokenId))));
}

template <typename Unit>
void write_text(std::string_view text, void* data) {
  auto* out = static_cast<Unit*>(data);
  for_each_char(text, [&out](char32_t value) { *out++ = static_cast<Unit>(value); });
}

// Touches nothing but the object's own memory, so it needs no GIL.
void write(const JsonCut& cut, PyObject* object) {
  if (const auto* ids = std::get_if<std::vector<TokenId>>(&cut.value)) {
    std::memcpy(PyBytes_AS_STRING(object), ids->data(), ids->size() * sizeof(TokenId));
    return;
  }
  const auto& text = std::get<std::string>(cut.value);
  void* const data = PyUnicode_DATA(object);
  switch (PyUnicode_KIND(object)) {
    case PyUnicode_1BYTE_KIND:
      return write_text<Py_UCS1>(text, data);
    case PyUnicode_2BYTE_KIND:
      return write_text<Py_UCS2>(text, data);
    default:
      return write_text<Py_UCS4>(text, data);
  }
}

py::object finished(const JsonCut& cut, const py::object& object) {
  if (std::holds_alternative<std::string>(cut.value)) return object;
  return check_new(PyMemoryView_FromObject(object.ptr())).attr("cast")("i");
}

Body read_body(const py::buffer& given, std::vector<std::string> fields, std::string ids_field, std::string mark) {
  const py::buffer_info info = given.request();  // nobody can resize it meanwhile
  if (info.itemsize != 1 || info.ndim != 1 || (info.size > 1 && info.strides[0] != 1)) {
    throw py::type_error("text must be contiguous bytes");
  }
  const std::string_view text(static_cast<const char*>(info.ptr), static_cast<std::size_t>(info.size));
  const JsonRules rules{std::move(fields), std::move(ids_field), std::move(mark)};
  JsonBody read;
  std::vector<Width> widths;
  {
    py::gil_scoped_release release;
    read = read_json_body(text, rules);
    for (const JsonCut& cut : read.cuts) widths.push_back(width_of(cut));
  }
  std::vector<py::object> objects;
  for (std::size_t i = 0; i < widths.size(); ++i) objects.push_back(allocate(read.cuts[i], widths[i]));
  {
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < objects.size(); ++i) write(read.cuts[i], objects[i].ptr());
  }
  Body body;
  for (JsonMost* most : {&read.depth, &read.keys, &read.elements}) body.most.emplace_back(most->count, most->field);
  body.values = read.values;
  body.unknown = std::move(read.unknown);
  body.error = std::move(read.error);
  body.error_field = std::move(read.error_field);
  body.bad_id = py::none();
  if (read.bad_id) body.bad_id = py::make_tuple(read.bad_id->list, read.bad_id->index, py::bytes(read.bad_id->text));
  body.small = py::bytes(read.small);
  for (const JsonStep& step : read.places) body.places.append(py::make_tuple(step.parent, key_or_index(step)));
  for (std::size_t i = 0; i < objects.size(); ++i) {
    const JsonCut& cut = read.cuts[i];
    body.cuts.append(py::make_tuple(cut.at.parent, key_or_index(cut.at), finished(cut, objects[i])));
  }
  return body;
}

}  // namespace

void bind_json(py::module_& m) {
  py::class_<Body>(m, "JsonBody")
      .def_readonly("most", &Body::most)
      .def_readonly("values", &Body::values)
      .def_readonly("unknown", &Body::unknown)
      .def_readonly("error", &Body::error)
      .def_readonly("error_field", &Body::error_field)
      .def_readonly("bad_id", &Body::bad_id)
      .def_readonly("small", &Body::small)
      .def_readonly("places", &Body::places)
      .def_readonly("cuts", &Body::cuts);
  m.def("read_json_body", &read_body, py::arg("text"), py::kw_only(), py::arg("fields"), py::arg("ids_field") = "",
        py::arg("mark"));
}

}  // namespace fastllm

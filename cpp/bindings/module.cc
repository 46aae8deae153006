// The native module fastllm._core; its Python signatures are in python/fastllm/_core.pyi.
#include <algorithm>

#include "backend/backend.h"
#include "base/cpu_placement.h"
#include "bindings/convert.h"
#include "fastllm/version.h"
#include "model/bundle_writer.h"
#include "model/dequant.h"
#include "model/dequant_groups.h"

namespace fastllm {
namespace {

// [rows, cols] fp32; the buffer holds whole rows, one after the other.
py::array_t<float> dequantize_rows(const std::string& type, const py::object& data, std::int64_t rows,
                                   std::int64_t cols) {
  const SourceTensor source = source_tensor("data", type, {rows, cols}, data, 0);
  const SourceFormat& format = format_of(source.type);
  if (rows < 0 || cols < 0 || cols % format.block_elements != 0) {
    throw InvalidArgument("dequantize: [" + std::to_string(rows) + ", " + std::to_string(cols) + "] is no shape of " +
                          type + ", whose rows are multiples of " + std::to_string(format.block_elements));
  }
  const std::int64_t row_bytes = cols / format.block_elements * format.block_bytes;
  if (row_bytes > 0 && rows > source.bytes / row_bytes) {
    throw InvalidArgument("dequantize: " + std::to_string(source.bytes) + " bytes are too few for " +
                          std::to_string(rows) + " rows of " + std::to_string(row_bytes));
  }
  py::array_t<float> out({rows, cols});
  float* target = out.mutable_data();
  py::gil_scoped_release release;
  for (std::int64_t r = 0; r < rows; ++r) {
    dequantize(source.type, static_cast<const std::byte*>(source.data) + r * row_bytes, 0, cols, target + r * cols);
  }
  return out;
}

std::optional<std::size_t> first_outside(const py::object& ids, int vocab) {
  py::buffer_info info;
  if (const auto buffer = id_buffer(ids, info)) {
    const auto found = std::ranges::find_if(*buffer, [vocab](TokenId id) { return id < 0 || id >= vocab; });
    if (found == buffer->end()) return std::nullopt;
    return static_cast<std::size_t>(found - buffer->begin());
  }
  const py::list list = id_list(ids);
  for (std::size_t i = 0, size = list.size(); i < size; ++i) {
    const std::optional<TokenId> id = token_id(list, i);
    if (!id || *id < 0 || *id >= vocab) return i;
  }
  return std::nullopt;
}

}  // namespace
}  // namespace fastllm

PYBIND11_MODULE(_core, m) {
  using namespace fastllm;
  m.doc() = "The fastllm engine: tokens in, tokens out.";
  m.attr("__version__") = FASTLLM_VERSION;

  auto& base = py::register_exception<Error>(m, "FastllmError", PyExc_RuntimeError);
  const auto invalid_bases = py::make_tuple(base, py::handle(PyExc_ValueError));
  py::register_exception<InvalidArgument>(m, "InvalidArgument", invalid_bases.ptr());
  py::register_exception<LoadError>(m, "LoadError", base);
  py::register_exception<ResourceError>(m, "ResourceError", base);

  bind_types(m);
  bind_engine(m);
  bind_json(m);

  m.def("dequantize", &dequantize_rows, py::arg("type"), py::arg("data"), py::arg("rows"), py::arg("cols"));
  m.def(
      "group_bits", [](const std::string& type) { return groups_of(source_type_from_name(type)).bits; },
      py::arg("type"));
  m.def(
      "export_weights",
      [](const std::string& spec_json, const std::vector<WeightBinding>& weights, const std::string& path,
         const std::string& dtype) { write_weights(spec_from_json(spec_json), weights, path, dtype); },
      py::arg("spec_json"), py::arg("weights"), py::arg("path"), py::arg("dtype"),
      py::call_guard<py::gil_scoped_release>());
  m.def("first_outside", &first_outside, py::arg("ids"), py::arg("vocab"));
  m.def("usable_cores", &usable_cores);
  m.def("cuda_device_count", [] {
    std::string why;
    int count = 0;
    {
      py::gil_scoped_release release;
      count = cuda_device_count(&why);
    }
    return py::make_tuple(count, why);
  });
  m.def(
      "cuda_device_memory",
      [](int device) {
        CudaOptions options;
        options.device = device;
        return make_cuda_backend(options)->info().memory_total;
      },
      py::arg("device"), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_isa", [] { return make_cpu_backend(1)->info().name; });
}

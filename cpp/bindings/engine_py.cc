// fastllm.Engine as a Python class. Whatever may wait runs without the GIL.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>

#include "bindings/convert.h"
#include "fastllm/engine.h"
#include "sched/merge_deltas.h"

namespace fastllm {
namespace {

// Joining the engine's threads must not hold the GIL: a logits processor on one of them may be waiting for it.
struct ReleasingDelete {
  void operator()(Engine* engine) const {
    py::gil_scoped_release release;
    delete engine;
  }
};
using EngineHolder = std::unique_ptr<Engine, ReleasingDelete>;

LoadProgress progress_of(const py::object& callable) {
  if (callable.is_none()) return {};
  return [shared = share(callable)](std::int64_t done, std::int64_t total) {
    py::gil_scoped_acquire gil;
    (*shared)(done, total);
  };
}

std::chrono::milliseconds milliseconds(double seconds) {
  if (std::isnan(seconds) || seconds < 0) seconds = 0;
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::fmin(seconds, 1e6) * 1e3));
}

// A model's spec comes from its files, so what is wrong with it is wrong with them.
ModelSpec spec_of_files(const std::string& json) {
  try {
    return spec_from_json(json);
  } catch (const InvalidArgument& e) {
    throw LoadError(e.what());
  }
}

EngineHolder create(const EngineConfig& config, const std::string& spec_json, std::vector<WeightBinding> weights,
                    const py::object& progress) {
  LoadProgress report = progress_of(progress);
  py::gil_scoped_release release;
  return EngineHolder(
      Engine::create(config, ModelSource{spec_of_files(spec_json), std::move(weights)}, std::move(report)).release());
}

EngineHolder open(const EngineConfig& config, const std::string& bundle_dir, const py::object& progress) {
  LoadProgress report = progress_of(progress);
  py::gil_scoped_release release;
  return EngineHolder(Engine::open(config, bundle_dir, std::move(report)).release());
}

EngineHolder create_null(const EngineConfig& config, int vocab, int max_len, std::vector<TokenId> eos,
                         std::int64_t step_us) {
  py::gil_scoped_release release;
  return EngineHolder(Engine::create_null(config, NullModel{vocab, max_len, std::move(eos), step_us}).release());
}

void submit(Engine& engine, std::uint64_t id, const py::object& prompt, const SamplingParams& params, int priority,
            std::optional<double> timeout_s, std::string cache_salt, const py::object& processor,
            const py::object& mask) {
  RequestInput input;
  input.id = id;
  input.prompt = token_ids("prompt", prompt);
  input.sampling = params;
  input.priority = priority;
  if (timeout_s) input.deadline = Clock::now() + milliseconds(*timeout_s);
  input.cache_salt = std::move(cache_salt);
  input.logits_processor = logits_processor(processor);
  input.mask = token_mask(mask);
  py::gil_scoped_release release;
  engine.submit(std::move(input));
}

bool any_ended(const std::vector<TokenDelta>& deltas) {
  return std::ranges::any_of(deltas, [](const TokenDelta& d) { return d.finish != FinishReason::None; });
}

// until_end: gathers, one delta per sequence, until one of them ends.
std::vector<TokenDelta> poll(Engine& engine, double timeout_s, bool until_end) {
  std::vector<TokenDelta> out, news;
  py::gil_scoped_release release;
  const TimePoint deadline = Clock::now() + milliseconds(timeout_s);
  if (!until_end) {
    engine.poll(out, milliseconds(timeout_s));
    return out;
  }
  for (bool ended = false; !ended;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    if (!engine.poll(news, std::max(left, std::chrono::milliseconds(0)))) break;
    ended = any_ended(news);
    out.insert(out.end(), std::make_move_iterator(news.begin()), std::make_move_iterator(news.end()));
    merge_deltas(out);
    if (left.count() <= 0) break;
  }
  return out;
}

}  // namespace

void bind_engine(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Engine, EngineHolder>(m, "Engine")
      .def_static("create", &create, py::arg("config"), py::arg("spec_json"), py::arg("weights"),
                  py::arg("progress") = py::none())
      .def_static("open", &open, py::arg("config"), py::arg("bundle_dir"), py::arg("progress") = py::none())
      .def_static("create_null", &create_null, py::arg("config"), py::arg("vocab") = 32000, py::arg("max_len") = 4096,
                  py::arg("eos") = std::vector<TokenId>{}, py::arg("step_us") = 0)
      .def("submit", &submit, py::arg("id"), py::arg("prompt"), py::arg("params"), py::kw_only(),
           py::arg("priority") = 0, py::arg("timeout_s") = py::none(), py::arg("cache_salt") = "",
           py::arg("logits_processor") = py::none(), py::arg("mask") = py::none())
      .def(
          "abort",
          [](Engine& e, std::uint64_t id, std::optional<int> index) { index ? e.abort(id, *index) : e.abort(id); },
          py::arg("id"), py::arg("index") = py::none(), release())
      .def("poll", &poll, py::arg("timeout_s") = 0.0, py::arg("until_end") = false)
      .def("event_fd", &Engine::event_fd)
      .def("stats", &Engine::stats, release())
      .def("heartbeat", &Engine::heartbeat)
      .def_property_readonly("config", [](const Engine& e) { return e.config(); })
      .def_property_readonly("memory", [](const Engine& e) { return e.memory(); })
      .def_property_readonly("spec_json", [](const Engine& e) { return spec_to_json(e.spec()); })
      .def("reset_prefix_cache", &Engine::reset_prefix_cache, release())
      .def(
          "drain", [](Engine& e, double timeout_s) { return e.drain(milliseconds(timeout_s)); }, py::arg("timeout_s"),
          release())
      .def("shutdown", &Engine::shutdown, release());
}

}  // namespace fastllm

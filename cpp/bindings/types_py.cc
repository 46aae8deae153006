// EngineConfig, SamplingParams, SourceTensor, WeightBinding, TokenDelta and EngineStats as Python classes.
#include "bindings/convert.h"

namespace fastllm {
namespace {

// Keyword construction through the attributes, so that a field is named once.
template <class T>
T from_kwargs(const py::kwargs& fields, const char* cls) {
  py::object object = py::cast(T{});
  for (const auto& [key, value] : fields) {
    if (!py::hasattr(object, key)) {
      throw py::type_error(std::string(cls) + " has no field '" + py::cast<std::string>(key) + "'");
    }
    py::setattr(object, key, value);
  }
  return py::cast<T>(object);
}

double seconds(TimePoint t) { return std::chrono::duration<double>(t.time_since_epoch()).count(); }

py::tuple entry(const TokenLogprob& t) { return py::make_tuple(t.token, t.logprob, t.rank); }

py::list positions(std::span<const PositionLogprobs> all) {
  py::list out(all.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    py::list top(all[i].top.size());
    for (std::size_t k = 0; k < all[i].top.size(); ++k) top[k] = entry(all[i].top[k]);
    out[i] = py::make_tuple(entry(all[i].chosen), std::move(top));
  }
  return out;
}

}  // namespace

void bind_types(py::module_& m) {
  py::class_<EngineConfig>(m, "EngineConfig")
      .def(py::init([](const py::kwargs& f) { return from_kwargs<EngineConfig>(f, "EngineConfig"); }))
      .def_readwrite("device", &EngineConfig::device)
      .def_readwrite("dtype", &EngineConfig::dtype)
      .def_readwrite("quantization", &EngineConfig::quantization)
      .def_readwrite("max_model_len", &EngineConfig::max_model_len)
      .def_readwrite("max_num_seqs", &EngineConfig::max_num_seqs)
      .def_readwrite("max_step_tokens", &EngineConfig::max_step_tokens)
      .def_readwrite("max_chunk", &EngineConfig::max_chunk)
      .def_readwrite("block_size", &EngineConfig::block_size)
      .def_readwrite("kv_cache_bytes", &EngineConfig::kv_cache_bytes)
      .def_readwrite("num_blocks", &EngineConfig::num_blocks)
      .def_readwrite("swap_bytes", &EngineConfig::swap_bytes)
      .def_readwrite("kv_cache_dtype", &EngineConfig::kv_cache_dtype)
      .def_readwrite("gpu_memory_utilization", &EngineConfig::gpu_memory_utilization)
      .def_readwrite("enforce_eager", &EngineConfig::enforce_eager)
      .def_readwrite("deterministic", &EngineConfig::deterministic)
      .def_property(
          "preemption", [](const EngineConfig& c) { return name_of(c.preemption); },
          [](EngineConfig& c, const std::string& v) { c.preemption = preemption_from_name(v); })
      .def_property(
          "policy", [](const EngineConfig& c) { return name_of(c.policy); },
          [](EngineConfig& c, const std::string& v) { c.policy = policy_from_name(v); })
      .def_readwrite("prefix_caching", &EngineConfig::prefix_caching)
      .def_readwrite("async_depth", &EngineConfig::async_depth)
      .def_readwrite("tensor_parallel_size", &EngineConfig::tensor_parallel_size)
      .def_readwrite("cpu_threads", &EngineConfig::cpu_threads)
      .def_readwrite("cpu_bind", &EngineConfig::cpu_bind)
      .def_readwrite("max_logprobs", &EngineConfig::max_logprobs)
      .def_readwrite("max_waiting", &EngineConfig::max_waiting)
      .def_readwrite("seed", &EngineConfig::seed)
      .def_readwrite("check_invariants", &EngineConfig::check_invariants);

  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init([](const py::kwargs& f) { return from_kwargs<SamplingParams>(f, "SamplingParams"); }))
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("n", &SamplingParams::n)
      .def_readwrite("beam_width", &SamplingParams::beam_width)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("max_tokens", &SamplingParams::max_tokens)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("ignore_eos", &SamplingParams::ignore_eos)
      .def_readwrite("stop_ids", &SamplingParams::stop_ids)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def_readwrite("allowed_ids", &SamplingParams::allowed_ids)
      .def_readwrite("bad_words", &SamplingParams::bad_words)
      .def_readwrite("length_penalty", &SamplingParams::length_penalty)
      .def_property(
          "early_stopping", [](const SamplingParams& p) { return name_of(p.early_stopping); },
          [](SamplingParams& p, const std::string& v) { p.early_stopping = early_stopping_from_name(v); })
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("prompt_logprobs", &SamplingParams::prompt_logprobs);

  py::class_<Packing, std::shared_ptr<Packing>> packing(m, "Packing");
  py::class_<SourceTensor>(m, "SourceTensor")
      .def(py::init([](const std::string& name, const std::string& type, std::vector<std::int64_t> shape,
                       const py::object& data, int interleaved_head_dim, std::shared_ptr<Packing> of_codes) {
             return source_tensor(name, type, std::move(shape), data, interleaved_head_dim, std::move(of_codes));
           }),
           py::arg("name"), py::arg("type"), py::arg("shape"), py::arg("data"), py::arg("interleaved_head_dim") = 0,
           py::arg("packing") = py::none())
      .def_readonly("name", &SourceTensor::name)
      .def_readonly("shape", &SourceTensor::shape);

  packing.def(
      py::init([](const std::string& layout, int bits, std::int64_t group, bool zeros_less_one, SourceTensor scales,
                  std::optional<SourceTensor> zeros, std::optional<SourceTensor> group_of) {
        Packing p{layout_from_name(layout), bits, group, zeros_less_one, std::move(scales), {}, {}};
        if (zeros) p.zeros = std::move(*zeros);
        if (group_of) p.group_of = std::move(*group_of);
        return p;
      }),
      py::arg("layout"), py::arg("bits"), py::arg("group"), py::arg("zeros_less_one"), py::arg("scales"),
      py::arg("zeros") = py::none(), py::arg("group_of") = py::none());

  py::class_<WeightBinding>(m, "WeightBinding")
      .def(py::init([](std::string canonical, std::vector<SourceTensor> sources, const std::string& transform,
                       bool add_one) {
             return WeightBinding{std::move(canonical), transform_from_name(transform), add_one, std::move(sources)};
           }),
           py::arg("canonical"), py::arg("sources"), py::arg("transform") = "copy", py::arg("add_one") = false)
      .def_readonly("canonical", &WeightBinding::canonical);

  py::class_<TokenDelta>(m, "TokenDelta")
      .def_readonly("id", &TokenDelta::id)
      .def_readonly("index", &TokenDelta::index)
      .def_readonly("tokens", &TokenDelta::tokens)
      .def_property_readonly("logprobs", [](const TokenDelta& d) { return positions(d.logprobs); })
      .def_property_readonly("num_prompt_logprobs", [](const TokenDelta& d) { return d.prompt_logprobs.size(); })
      .def(
          "prompt_logprobs",
          [](const TokenDelta& d, std::size_t begin, std::size_t count) {
            const std::span all(d.prompt_logprobs);
            begin = std::min(begin, all.size());
            return positions(all.subspan(begin, std::min(count, all.size() - begin)));
          },
          py::arg("begin"), py::arg("count"))
      .def_property_readonly("finish", [](const TokenDelta& d) { return finish_name(d.finish); })
      .def_property_readonly(
          "stop_token",
          [](const TokenDelta& d) { return d.stop_token < 0 ? py::object(py::none()) : py::int_(d.stop_token); })
      .def_readonly("cached_tokens", &TokenDelta::cached_tokens)
      .def_readonly("num_preemptions", &TokenDelta::num_preemptions)
      .def_readonly("error", &TokenDelta::error)
      .def_property_readonly("error_kind", [](const TokenDelta& d) { return error_kind_name(d.error_kind); })
      .def_property_readonly("times", [](const TokenDelta& d) {
        return py::make_tuple(seconds(d.times.arrival), seconds(d.times.first_scheduled), seconds(d.times.first_token),
                              seconds(d.times.finished));
      });

  py::class_<EngineStats>(m, "EngineStats")
      .def_readonly("num_running", &EngineStats::num_running)
      .def_readonly("num_waiting", &EngineStats::num_waiting)
      .def_readonly("num_swapped", &EngineStats::num_swapped)
      .def_property_readonly("wait_reason", [](const EngineStats& s) { return wait_reason_name(s.wait_reason); })
      .def_readonly("total_blocks", &EngineStats::total_blocks)
      .def_readonly("used_blocks", &EngineStats::used_blocks)
      .def_readonly("peak_used_blocks", &EngineStats::peak_used_blocks)
      .def_readonly("cached_blocks", &EngineStats::cached_blocks)
      .def_readonly("num_steps", &EngineStats::num_steps)
      .def_readonly("prompt_tokens", &EngineStats::prompt_tokens)
      .def_readonly("generated_tokens", &EngineStats::generated_tokens)
      .def_readonly("prefix_queries", &EngineStats::prefix_queries)
      .def_readonly("prefix_hits", &EngineStats::prefix_hits)
      .def_readonly("num_preemptions", &EngineStats::num_preemptions)
      .def_readonly("num_finished", &EngineStats::num_finished)
      .def_readonly("num_aborted", &EngineStats::num_aborted)
      .def_readonly("nan_rows", &EngineStats::nan_rows)
      .def_readonly("block_leaks", &EngineStats::block_leaks)
      .def_readonly("host_s", &EngineStats::host_s)
      .def_readonly("last_step_age_s", &EngineStats::last_step_age_s)
      .def_readonly("healthy", &EngineStats::healthy);

  py::class_<Heartbeat>(m, "Heartbeat")
      .def_readonly("count", &Heartbeat::count)
      .def_readonly("busy", &Heartbeat::busy)
      .def_readonly("age_s", &Heartbeat::age_s);

  py::class_<EngineMemory>(m, "EngineMemory")
      .def_readonly("device", &EngineMemory::device)
      .def_readonly("total", &EngineMemory::total)
      .def_readonly("weights", &EngineMemory::weights)
      .def_readonly("activations", &EngineMemory::activations)
      .def_readonly("graphs", &EngineMemory::graphs)
      .def_readonly("kv_cache", &EngineMemory::kv_cache)
      .def_readonly("other", &EngineMemory::other)
      .def_readonly("free", &EngineMemory::free)
      .def_readonly("inflated", &EngineMemory::inflated);
}

}  // namespace fastllm

// The whole engine without Python: latency, throughput, mixed and prefill-only workloads on a bundle or on random
// weights of a named shape. Token-id prompts, greedy, end tokens ignored, prefix cache off but in the prefix case.
//   fastllm_bench_engine --shape llama3-8b --device cuda --json result.json
//   fastllm_bench_engine --shape tiny --only latency,batch        (--help lists the rest)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "bench_engine_model.h"
#include "fastllm/engine.h"
#include "fastllm/error.h"

namespace fastllm {
namespace {

using Json = nlohmann::ordered_json;
using Prompts = std::vector<std::vector<TokenId>>;

struct Options {
  std::string model = "tiny";  // a shape's name or a bundle's folder
  bool bundle = false;
  std::string only, json;
  int input_len = 32, output_len = 8, requests = 1;  // of "single", lengths in tokens
  EngineConfig config;
};

// What one workload took.
struct Run {
  double seconds = 0;
  std::int64_t prompt_tokens = 0, output_tokens = 0;
  std::vector<double> first_token;  // seconds from submit, per request
  EngineStats before, after;
};

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options), rng_(0) {
    const auto start = Clock::now();
    engine_ = options.bundle ? Engine::open(options.config, options.model)
                             : Engine::create(options.config, random_model(shape_named(options.model)));
    load_s_ = std::chrono::duration<double>(Clock::now() - start).count();
    vocab_ = engine_->spec().embed.vocab;
  }

  void run_all() {
    const EngineConfig& c = engine_->config();
    const EngineMemory& m = engine_->memory();
    result_["model"] = options_.model;
    result_["device"] = m.total > 0 ? m.device : c.device;
    result_["load_s"] = load_s_;
    result_["config"] = {{"max_num_seqs", c.max_num_seqs},     {"max_step_tokens", c.max_step_tokens},
                         {"max_model_len", c.max_model_len},   {"num_blocks", c.num_blocks},
                         {"block_size", c.block_size},         {"async_depth", c.async_depth},
                         {"kv_cache_dtype", c.kv_cache_dtype}, {"enforce_eager", c.enforce_eager},
                         {"deterministic", c.deterministic}};
    result_["memory"] = {{"total", m.total},   {"weights", m.weights},   {"activations", m.activations},
                         {"graphs", m.graphs}, {"kv_cache", m.kv_cache}, {"other", m.other},
                         {"free", m.free}};
    std::printf("%s on %s: loaded in %.1f s, %lld KV tokens, %d sequences, %d tokens a step\n", options_.model.c_str(),
                result_["device"].get<std::string>().c_str(), load_s_,
                static_cast<long long>(c.num_blocks * c.block_size), c.max_num_seqs, c.max_step_tokens);
    if (options_.only == "single") return single();
    go(prompts(8, 128), std::vector<int>(8, 16));
    go(prompts(64, 128), std::vector<int>(64, 16));
    part("latency", [&] { latency(); });
    part("batch", [&] {
      for (int n : {8, 32, 64, 128, 256}) throughput("static_b" + std::to_string(n) + "_128_128", n, 128, 128);
    });
    part("throughput", [&] {
      for (int n : {100, 256, 1000}) throughput("tp_" + std::to_string(n) + "x128_256", n, 128, 256);
    });
    part("mixed", [&] { mixed(); });
    part("prefill", [&] { throughput("prefill_64x2048", 64, 2048, 1); });
    part("prefix", [&] { prefix(); });
  }

  void write() const {
    if (options_.json.empty()) return;
    std::ofstream(options_.json) << result_.dump(1) << '\n';
  }

 private:
  // Runs the part if it was asked for; its failure does not stop the others.
  void part(const std::string& name, const std::function<void()>& body) {
    if (!options_.only.empty() && ("," + options_.only + ",").find("," + name + ",") == std::string::npos) return;
    try {
      body();
    } catch (const std::exception& e) {
      std::printf("%-32s failed: %s\n", name.c_str(), e.what());
      result_["failed"][name] = e.what();
    }
    std::fflush(stdout);
    write();
  }

  std::vector<TokenId> prompt(int length) {
    std::uniform_int_distribution<TokenId> id(std::min(10, vocab_ - 1), vocab_ - 1);
    std::vector<TokenId> ids(static_cast<std::size_t>(length));
    for (TokenId& token : ids) token = id(rng_);
    return ids;
  }
  Prompts prompts(int count, int length) {
    Prompts all;
    for (int i = 0; i < count; ++i) all.push_back(prompt(length));
    return all;
  }

  // One request per prompt, all at once. Throws unless each gets its tokens.
  Run go(const Prompts& prompts, const std::vector<int>& outputs) {
    Run run;
    run.before = engine_->stats();
    run.first_token.resize(prompts.size());
    const std::uint64_t base = next_id_;
    next_id_ += prompts.size();
    std::int64_t wanted = 0;
    const auto start = Clock::now();
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      RequestInput request;
      request.id = base + i;
      request.prompt = prompts[i];
      request.sampling.temperature = 0;
      request.sampling.max_tokens = outputs[i];
      request.sampling.ignore_eos = true;
      run.prompt_tokens += static_cast<std::int64_t>(prompts[i].size());
      wanted += outputs[i];
      engine_->submit(std::move(request));
    }
    std::vector<TokenDelta> deltas;
    for (std::size_t live = prompts.size(); live > 0;) {
      if (!engine_->poll(deltas, std::chrono::seconds(60))) throw Error("nothing came for 60 seconds");
      for (const TokenDelta& d : deltas) {
        run.output_tokens += static_cast<std::int64_t>(d.tokens.size());
        if (d.finish == FinishReason::Error) throw Error(d.error);
        if (d.finish == FinishReason::None) continue;
        run.first_token[d.id - base] = std::chrono::duration<double>(d.times.first_token - d.times.arrival).count();
        --live;
      }
    }
    run.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    run.after = engine_->stats();
    if (run.output_tokens != wanted) {
      throw Error(std::to_string(run.output_tokens) + " tokens came, " + std::to_string(wanted) + " were asked for");
    }
    return run;
  }

  static double median(std::vector<double> values) {
    std::ranges::sort(values);
    const std::size_t n = values.size();
    return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
  }

  double median_ttft(int length, int repeats) {
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) seconds.push_back(go(prompts(1, length), {1}).seconds);
    return median(seconds);
  }

  bool fits(int tokens) const { return tokens <= engine_->config().max_model_len; }

  void latency() {
    std::vector<double> whole;
    for (int i = 0; i < 3; ++i) whole.push_back(go(prompts(1, 128), {128}).seconds);
    const double e2e = median(whole), first = median_ttft(128, 3), per_token = (e2e - first) / 127;
    result_["bs1_128_128"] = {{"e2e_ms", e2e * 1e3}, {"ttft_ms", first * 1e3}, {"tpot_ms", per_token * 1e3}};
    std::printf("%-32s %8.3f ms a token, first after %.2f ms\n", "bs1_128_128", per_token * 1e3, first * 1e3);
    for (int length : {512, 2048, 4000}) {
      if (!fits(length + 1)) continue;
      const double ms = median_ttft(length, 5) * 1e3;
      result_["ttft_" + std::to_string(length)] = ms;
      std::printf("%-32s %8.2f ms\n", ("ttft_" + std::to_string(length)).c_str(), ms);
    }
  }

  // The same requests and nothing before them, for tools that count what a program does.
  void single() {
    const std::vector<int> outputs(static_cast<std::size_t>(options_.requests), options_.output_len);
    record("single", go(prompts(options_.requests, options_.input_len), outputs));
  }

  void throughput(const std::string& name, int count, int length, int output) {
    if (!fits(length + output)) return;
    record(name, go(prompts(count, length), std::vector<int>(static_cast<std::size_t>(count), output)));
  }

  void mixed() {
    if (!fits(1024 + 512)) return;
    std::mt19937 lengths(1);
    std::uniform_int_distribution<int> in(32, 1024), out(32, 512);
    Prompts all;
    std::vector<int> outputs;
    for (int i = 0; i < 512; ++i) all.push_back(prompt(in(lengths)));
    for (int i = 0; i < 512; ++i) outputs.push_back(out(lengths));
    record("mixed_512_in32-1024_out32-512", go(all, outputs));
  }

  // 64 requests that share all but the last 32 of 1056 tokens: the first alone, then the rest. Needs the prefix cache.
  void prefix() {
    if (!engine_->config().prefix_caching || !fits(1024 + 32 + 32)) return;
    const std::vector<TokenId> shared = prompt(1024);
    Prompts all;
    for (int i = 0; i < 64; ++i) {
      all.push_back(shared);
      const std::vector<TokenId> own = prompt(32);
      all.back().insert(all.back().end(), own.begin(), own.end());
    }
    record("prefix_cold_1", go({all[0]}, {32}));
    record("prefix_64x1024+32_32", go(all, std::vector<int>(64, 32)));
  }

  void record(const std::string& name, const Run& run) {
    const auto steps = static_cast<double>(run.after.num_steps - run.before.num_steps);
    const double host_us = (run.after.host_s - run.before.host_s) / std::max(steps, 1.0) * 1e6;
    const double out = static_cast<double>(run.output_tokens) / run.seconds;
    const double total = static_cast<double>(run.output_tokens + run.prompt_tokens) / run.seconds;
    const auto requests = static_cast<double>(run.first_token.size());
    result_[name] = {{"s", run.seconds},
                     {"reqs", run.first_token.size()},
                     {"out_tok_s", out},
                     {"total_tok_s", total},
                     {"req_s", requests / run.seconds},
                     {"median_ttft_ms", median(run.first_token) * 1e3},
                     {"steps", steps},
                     {"steps_s", steps / run.seconds},
                     {"host_us_per_step", host_us},
                     {"preemptions", run.after.num_preemptions - run.before.num_preemptions},
                     {"prefix_hit_tokens", run.after.prefix_hits - run.before.prefix_hits}};
    std::printf("%-32s %7.2f s %9.1f out tok/s %9.1f tot tok/s %7.2f req/s %8.1f steps/s %6.1f us host/step\n",
                name.c_str(), run.seconds, out, total, requests / run.seconds, steps / run.seconds, host_us);
  }

  Options options_;
  std::mt19937 rng_;
  std::unique_ptr<Engine> engine_;
  double load_s_ = 0;
  int vocab_ = 0;
  std::uint64_t next_id_ = 1;
  Json result_;
};

constexpr const char* kUsage =
    R"(usage: fastllm_bench_engine (--shape NAME | --bundle DIR) [options]
  --shape                     llama3-8b, llama3.2-1b, smollm2-135m, small or tiny: random weights
  --only A,B                  of latency, batch, throughput, mixed, prefill, prefix; default: all. Or single:
                              without a warm-up, --requests 1 --input-len 32 --output-len 8
  --json FILE                 results, written after every part
  --device cpu                auto, cpu, cuda or cuda:N
  --dtype bfloat16            or float32              --quantization auto      none, int8 or int4
  --kv-cache-dtype auto       or float16, int8, ... (CPUs), fp8 (GPUs)
  --max-model-len 4096        --max-num-seqs 256        --max-num-batched-tokens 8192
  --block-size 16             --num-blocks 0            --gpu-memory-utilization 0.92
  --async-depth 2             --tensor-parallel-size 1  --cpu-threads 0        --cpu-bind auto
  --prefix-caching 0          --enforce-eager 0         --deterministic 0        (0 or 1)
)";

Options parse(int argc, char** argv) {
  Options o;
  EngineConfig& c = o.config;
  c.max_model_len = 4096;
  c.max_step_tokens = 8192;
  c.prefix_caching = false;
  const auto whole = [](int& field) { return [&field](const std::string& v) { field = std::stoi(v); }; };
  const auto flag = [](bool& field) { return [&field](const std::string& v) { field = std::stoi(v) != 0; }; };
  const auto text = [](std::string& field) { return [&field](const std::string& v) { field = v; }; };
  const std::map<std::string, std::function<void(const std::string&)>> flags{
      {"--shape", text(o.model)},
      {"--bundle", [&](const std::string& v) { o.model = v, o.bundle = true; }},
      {"--only", text(o.only)},
      {"--json", text(o.json)},
      {"--requests", whole(o.requests)},
      {"--input-len", whole(o.input_len)},
      {"--output-len", whole(o.output_len)},
      {"--device", text(c.device)},
      {"--dtype", text(c.dtype)},
      {"--quantization", text(c.quantization)},
      {"--kv-cache-dtype", text(c.kv_cache_dtype)},
      {"--max-model-len", whole(c.max_model_len)},
      {"--max-num-seqs", whole(c.max_num_seqs)},
      {"--max-num-batched-tokens", whole(c.max_step_tokens)},
      {"--block-size", whole(c.block_size)},
      {"--num-blocks", [&](const std::string& v) { c.num_blocks = std::stoll(v); }},
      {"--gpu-memory-utilization", [&](const std::string& v) { c.gpu_memory_utilization = std::stod(v); }},
      {"--async-depth", whole(c.async_depth)},
      {"--tensor-parallel-size", whole(c.tensor_parallel_size)},
      {"--cpu-threads", whole(c.cpu_threads)},
      {"--cpu-bind", text(c.cpu_bind)},
      {"--prefix-caching", flag(c.prefix_caching)},
      {"--enforce-eager", flag(c.enforce_eager)},
      {"--deterministic", flag(c.deterministic)},
  };
  for (int i = 1; i < argc; i += 2) {
    const auto found = flags.find(argv[i]);
    if (found == flags.end() || i + 1 == argc) throw InvalidArgument(kUsage);
    found->second(argv[i + 1]);
  }
  return o;
}

}  // namespace
}  // namespace fastllm

int main(int argc, char** argv) {
  try {
    fastllm::Bench bench(fastllm::parse(argc, argv));
    bench.run_all();
    bench.write();
  } catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 1;
  }
}

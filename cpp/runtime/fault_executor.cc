#include "runtime/fault_executor.h"

#include <array>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>

#include "fastllm/error.h"

namespace fastllm {
namespace {

constexpr std::array<std::pair<std::string_view, Fault::Kind>, 5> kKinds{{
    {"hang", Fault::Kind::Hang},
    {"slow", Fault::Kind::Slow},
    {"error", Fault::Kind::Error},
    {"nan", Fault::Kind::Nan},
    {"crash", Fault::Kind::Crash},
}};

template <class T>
bool read_number(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size() && value >= 0;
}

bool read_fault(std::string_view text, Fault& fault) {
  const std::size_t at = text.find('@');
  if (at == std::string_view::npos) return false;
  bool known = false;
  for (const auto& [name, kind] : kKinds) {
    if (name != text.substr(0, at)) continue;
    fault.kind = kind;
    known = true;
  }
  const std::string_view numbers = text.substr(at + 1);
  const std::size_t colon = numbers.find(':');
  if (!known || !read_number(numbers.substr(0, colon), fault.step) || fault.step == 0) return false;
  if (colon == std::string_view::npos) return fault.kind != Fault::Kind::Slow;
  return read_number(numbers.substr(colon + 1), fault.milliseconds);
}

class FaultExecutor final : public Executor {
 public:
  FaultExecutor(std::unique_ptr<Executor> inner, std::vector<Fault> faults)
      : inner_(std::move(inner)), faults_(std::move(faults)) {}

  KvBudget profile() override { return inner_->profile(); }
  void init_kv(std::int64_t device_blocks, std::int64_t host_blocks) override {
    inner_->init_kv(device_blocks, host_blocks);
  }
  DeviceUse device_use() override { return inner_->device_use(); }
  void submit(const StepPlan& plan) override { inner_->submit(plan); }
  void set_masks(std::uint64_t plan_id, std::span<const std::uint32_t> bits) override {
    inner_->set_masks(plan_id, bits);
  }
  bool ready(std::uint64_t plan_id) override { return inner_->ready(plan_id); }
  int depth() const override { return inner_->depth(); }

  const StepResult& wait(std::uint64_t plan_id) override {
    ++step_;
    const StepResult* result = &inner_->wait(plan_id);
    for (const Fault& fault : faults_) {
      const bool from_here = fault.kind == Fault::Kind::Slow && step_ >= fault.step;
      if (step_ == fault.step || from_here) result = &inflict(fault, *result);
    }
    return *result;
  }

 private:
  const StepResult& inflict(const Fault& fault, const StepResult& result) {
    switch (fault.kind) {
      case Fault::Kind::Hang:
      case Fault::Kind::Slow:
        wait_for(fault.milliseconds);
        return result;
      case Fault::Kind::Crash:
        std::abort();
      case Fault::Kind::Error:
        changed_ = result;
        changed_.error = "the device was lost (a fault made for a test).";
        return changed_;
      case Fault::Kind::Nan:
        changed_ = result;
        if (changed_.tokens.empty()) return result;
        changed_.tokens[0] = -1;
        changed_.nan_rows.push_back(0);
        return changed_;
    }
    return result;
  }

  static void wait_for(std::int64_t milliseconds) {
    if (milliseconds >= 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
      return;
    }
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
  }

  std::unique_ptr<Executor> inner_;
  std::vector<Fault> faults_;
  std::uint64_t step_ = 0;  // waited for
  StepResult changed_;
};

}  // namespace

std::vector<Fault> parse_faults(std::string_view text) {
  std::vector<Fault> faults;
  while (!text.empty()) {
    const std::size_t comma = text.find(',');
    const std::string_view part = text.substr(0, comma);
    if (!read_fault(part, faults.emplace_back())) {
      throw InvalidArgument("FASTLLM_FAULT: '" + std::string(part) +
                            "' is not hang@STEP[:MS], slow@STEP:MS, error@STEP, nan@STEP or crash@STEP.");
    }
    text = comma == std::string_view::npos ? std::string_view{} : text.substr(comma + 1);
  }
  return faults;
}

std::unique_ptr<Executor> with_faults(std::unique_ptr<Executor> executor) {
  const char* enabled = std::getenv("FASTLLM_TEST_HOOKS");
  const char* faults = std::getenv("FASTLLM_FAULT");
  if (enabled == nullptr || std::string_view(enabled) != "1" || faults == nullptr) return executor;
  return with_faults(std::move(executor), parse_faults(faults));
}

std::unique_ptr<Executor> with_faults(std::unique_ptr<Executor> executor, std::vector<Fault> faults) {
  if (faults.empty()) return executor;
  return std::make_unique<FaultExecutor>(std::move(executor), std::move(faults));
}

}  // namespace fastllm

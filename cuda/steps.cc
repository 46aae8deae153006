#include "steps.h"

#include <algorithm>
#include <limits>
#include <string>

#include "update_inputs.h"

namespace fastllm::cuda {
namespace {

// More of either in one step take a detour through the staging memory.
constexpr std::size_t kTableSets = 4096;
constexpr std::size_t kAdjustments = 4096;
constexpr std::size_t kRoom = 64;  // results of one allocation, at least

constexpr std::size_t round_up(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

std::size_t count(int n) { return static_cast<std::size_t>(n); }

// Of one step.
int max_sampled(const StepLimits& limits) { return std::max(limits.max_slots, limits.max_logit_rows); }

std::unique_ptr<Buffer> zeros(std::size_t bytes, cudaStream_t stream) {
  auto buffer = allocate_device(bytes);
  check(cudaMemsetAsync(buffer->data(), 0, bytes, stream), "clearing memory");
  return buffer;
}

DeviceSampleRow device_row(const SampleRow& row, std::size_t adjust_begin, std::size_t adjust_end) {
  DeviceSampleRow d{};
  d.seed = row.seed;
  d.position = row.position;
  d.temperature = row.temperature;
  d.top_p = row.top_p;
  d.min_p = row.min_p;
  d.top_k = row.top_k;
  d.repetition_penalty = row.repetition_penalty;
  d.presence_penalty = row.presence_penalty;
  d.frequency_penalty = row.frequency_penalty;
  d.slot = static_cast<std::int32_t>(row.slot);
  d.penalised = row.penalised ? 1 : 0;
  d.adjust_begin = static_cast<std::int32_t>(adjust_begin);
  d.adjust_end = static_cast<std::int32_t>(adjust_end);
  return d;
}

}  // namespace

InputLayout::InputLayout(const StepLimits& limits, const AttentionLimits& attention) {
  std::size_t end = 0;
  const auto part = [&](std::size_t bytes) {
    const std::size_t begin = end;
    end += round_up(bytes);
    return begin;
  };
  const std::size_t tokens = count(limits.max_tokens), slots = count(limits.max_slots);
  ids = part(tokens * sizeof(TokenId));
  positions = part(tokens * sizeof(std::int32_t));
  token_slot = part(tokens * sizeof(std::int32_t));
  rows = part(slots * sizeof(DeviceRow));
  logit_tokens = part(count(max_sampled(limits)) * sizeof(std::int32_t));
  samples = part(count(max_sampled(limits)) * sizeof(DeviceSampleRow));
  adjustments = part(kAdjustments * sizeof(LogitAdjustment));
  decode_plan = part(decode_plan_bytes(attention));
  prefill_plan = part(prefill_plan_bytes(attention));
  device_bytes = end;
  table_sets = part(kTableSets * sizeof(TableSet));
  entry_bytes = end;
}

// --- CudaStep

void CudaStep::begin(std::size_t entry_bytes) {
  if (!entry_) entry_ = allocate_pinned(entry_bytes);
  view = {};
  padded_rows = num_logit_rows = num_sampled = 0;
  decode_plan = nullptr;
  prefill_plan = {};
  processing = {};
  samples = any_filter = tokens_known = false;
  all_greedy = true;
  room_ = room_used_ = num_results_ = 0;
  batches_.clear();
  replaced_.clear();
}

DeviceLogprobResult* CudaStep::add_results(int n) {
  const auto capacity = [&] { return rooms_[room_]->bytes() / sizeof(DeviceLogprobResult); };
  while (room_ < rooms_.size() && room_used_ + count(n) > capacity()) {
    ++room_;
    room_used_ = 0;
  }
  if (room_ == rooms_.size())
    rooms_.push_back(allocate_pinned(std::max(count(n), kRoom) * sizeof(DeviceLogprobResult)));
  DeviceLogprobResult* results = data_as<DeviceLogprobResult>(*rooms_[room_]) + room_used_;
  room_used_ += count(n);
  batches_.push_back({results, n});
  num_results_ += count(n);
  return results;
}

void CudaStep::replace_result(int index, LogprobResult result) {
  replaced_.emplace_back(num_results_ - count(batches_.back().count) + count(index), std::move(result));
}

void CudaStep::collect(StepOutput& out) const {
  out.tokens.clear();
  if (tokens_known) out.tokens.assign(host_sampled, host_sampled + num_sampled);
  out.logprobs.clear();
  out.logprobs.reserve(num_results_);
  for (const Batch& batch : batches_) {
    for (const DeviceLogprobResult& r : std::span(batch.results, count(batch.count))) {
      LogprobResult& result = out.logprobs.emplace_back();
      result.token = r.token;
      result.logprob = r.logprob;
      result.rank = r.rank;
      const auto num_top = count(std::clamp(r.num_top, 0, kMaxDeviceTop));
      result.top.reserve(num_top);
      for (std::size_t i = 0; i < num_top; ++i) result.top.emplace_back(r.top_ids[i], r.top_logprobs[i]);
    }
  }
  for (const auto& [at, result] : replaced_) out.logprobs[at] = result;
}

// --- StepRing

// The copies of one update: each part of the ring entry that is in use.
class StepRing::Packing {
 public:
  Packing(const Buffer& entry, const Buffer& device)
      : entry_(data_as<std::byte>(entry)), device_(data_as<std::byte>(device)) {}

  // Memory of the ring entry, of which `bytes` go to the device.
  template <class T>
  T* part(std::size_t offset, std::size_t bytes) {
    update.copies.at(copies_++) = {entry_ + offset, device_ + offset, static_cast<std::int32_t>(round_up(bytes) / 16)};
    return reinterpret_cast<T*>(entry_ + offset);
  }
  template <class T>
  T* entry(std::size_t offset) const {
    return reinterpret_cast<T*>(entry_ + offset);
  }
  template <class T>
  const T* device(std::size_t offset) const {
    return reinterpret_cast<const T*>(device_ + offset);
  }

  InputUpdate update;

 private:
  std::byte *entry_, *device_;
  std::size_t copies_ = 0;
};

StepRing::StepRing(const StepLimits& limits, const AttentionLimits& attention, bool deterministic, cudaStream_t stream)
    : limits_(limits),
      attention_(attention),
      deterministic_(deterministic),
      stream_(stream),
      layout_(limits, attention),
      inputs_(zeros(layout_.device_bytes, stream)),
      tables_(zeros(count(limits.max_slots) * count(limits.table_width) * sizeof(BlockId), stream)),
      last_token_(zeros(count(limits.max_slots) * sizeof(TokenId), stream)),
      sampled_(zeros(count(max_sampled(limits)) * sizeof(TokenId), stream)) {
  for (int i = 0; i <= limits.in_flight; ++i) {
    auto& step = steps_.emplace_back(std::make_unique<CudaStep>());
    step->sampled_ = allocate_pinned(count(max_sampled(limits)) * sizeof(TokenId));
    step->host_sampled = data_as<TokenId>(*step->sampled_);
    step->rooms_.push_back(allocate_pinned(std::max(count(limits.max_slots), kRoom) * sizeof(DeviceLogprobResult)));
    step->begin(layout_.entry_bytes);
  }
  kv_lengths_.reserve(count(limits.max_slots));
}

void StepRing::check_limits(const StepInput& input) const {
  const auto at_most = [](std::size_t n, int limit, const char* what) {
    if (n > count(limit))
      throw InvalidArgument("a step has " + std::to_string(n) + " " + what + "; its limit is " + std::to_string(limit));
  };
  const std::size_t padded = count(input.padded_rows);
  at_most(std::max(input.tokens.size(), padded), limits_.max_tokens, "tokens");
  at_most(std::max(input.rows.size(), padded), limits_.max_slots, "rows");
  at_most(input.logit_tokens.size(), max_sampled(limits_), "rows of logits");
  for (const TableSet& set : input.table_sets) {
    if (static_cast<std::uint32_t>(set.slot) >= static_cast<std::uint32_t>(limits_.max_slots) ||
        static_cast<std::uint32_t>(set.index) >= static_cast<std::uint32_t>(limits_.table_width))
      throw InvalidArgument("there is no entry " + std::to_string(set.index) + " of slot " +
                            std::to_string(static_cast<std::int32_t>(set.slot)) + " in block tables of " +
                            std::to_string(limits_.max_slots) + " slots of " + std::to_string(limits_.table_width));
  }
}

void StepRing::reclaim(CudaStep& step) {
  switch (step.state_.load(std::memory_order_acquire)) {
    case CudaStep::State::Idle:
      return;
    case CudaStep::State::Begun:  // its ops threw
      check(cudaStreamSynchronize(stream_), "the work on the GPU");
      return;
    case CudaStep::State::Ended:
      return step.done_.wait();
  }
}

CudaStep& StepRing::begin(const StepInput& input, Staging& staging) {
  check_limits(input);
  CudaStep& step = *steps_[next_];
  next_ = (next_ + 1) % steps_.size();
  reclaim(step);
  step.begin(layout_.entry_bytes);
  Packing packing(*step.entry_, *inputs_);
  pack_tables(packing, input, staging);
  pack_tokens(packing, input, step);
  pack_plans(packing, step);
  pack_sampling(packing, input, staging, step);
  packing.update.last_token = last_token();
  step.state_.store(CudaStep::State::Begun, std::memory_order_release);
  update_inputs(packing.update, stream_);
  return step;
}

void StepRing::pack_tokens(Packing& packing, const StepInput& input, CudaStep& step) const {
  const std::size_t padded = count(input.padded_rows), tokens = std::max(input.tokens.size(), padded),
                    rows = std::max(input.rows.size(), padded);
  auto* ids = packing.part<TokenId>(layout_.ids, tokens * sizeof(TokenId));
  auto* positions = packing.part<std::int32_t>(layout_.positions, tokens * sizeof(std::int32_t));
  auto* token_slot = packing.part<std::int32_t>(layout_.token_slot, tokens * sizeof(std::int32_t));
  auto* device_rows = packing.part<DeviceRow>(layout_.rows, rows * sizeof(DeviceRow));
  std::copy(input.tokens.begin(), input.tokens.end(), ids);
  for (std::size_t r = 0; r < input.rows.size(); ++r) {
    const StepRow& row = input.rows[r];
    const auto slot = static_cast<std::int32_t>(row.slot);
    device_rows[r] = {row.token_begin, row.num_tokens, row.first_pos, slot};
    if (row.from_slot) ids[row.token_begin] = ~slot;
    for (std::int32_t k = 0; k < row.num_tokens; ++k) {
      positions[row.token_begin + k] = row.first_pos + k;
      token_slot[row.token_begin + k] = slot;
    }
  }
  for (std::size_t r = input.rows.size(); r < rows; ++r) {
    device_rows[r] = {static_cast<std::int32_t>(r), 1, -1, -1};
    ids[r] = positions[r] = 0;
    token_slot[r] = -1;
  }
  // The rest of the last 16 bytes is resolved too.
  for (std::size_t t = tokens; t % 4 != 0; ++t) ids[t] = 0;

  step.padded_rows = input.padded_rows;
  step.view.ids = packing.device<TokenId>(layout_.ids);
  step.view.positions = packing.device<std::int32_t>(layout_.positions);
  step.view.token_slot = packing.device<std::int32_t>(layout_.token_slot);
  step.view.rows = packing.device<DeviceRow>(layout_.rows);
  step.view.tables = data_as<BlockId>(*tables_);
  step.view.table_width = limits_.table_width;
  step.view.num_tokens = static_cast<int>(tokens);
  step.view.num_rows = static_cast<int>(rows);
  step.view.num_decode_rows = deterministic_ ? 0 : std::max(input.num_decode_rows, input.padded_rows);
}

void StepRing::pack_plans(Packing& packing, CudaStep& step) {
  const int decode_rows = step.view.num_decode_rows;
  const std::span rows(packing.entry<DeviceRow>(layout_.rows), count(step.view.num_rows));
  if (decode_rows > 0) {
    kv_lengths_.clear();
    for (const DeviceRow& row : rows.first(count(decode_rows))) kv_lengths_.push_back(row.first_pos + 1);
    auto* plan = packing.part<std::byte>(layout_.decode_plan, decode_plan_bytes(attention_));
    write_decode_plan(kv_lengths_, attention_, plan);
    step.decode_plan = packing.device<std::byte>(layout_.decode_plan);
  }
  if (decode_rows < step.view.num_rows) {
    step.prefill_plan =
        write_prefill_plan(rows, decode_rows, attention_, packing.entry<std::byte>(layout_.prefill_plan),
                           packing.device<std::byte>(layout_.prefill_plan));
    packing.part<std::byte>(layout_.prefill_plan, step.prefill_plan.bytes);
  }
}

void StepRing::pack_sampling(Packing& packing, const StepInput& input, Staging& staging, CudaStep& step) {
  const std::size_t sampled = input.logit_tokens.size(), rows = std::max(sampled, count(input.padded_rows));
  step.num_sampled = static_cast<int>(sampled);
  step.num_logit_rows = static_cast<int>(rows);
  step.logit_tokens = packing.device<std::int32_t>(layout_.logit_tokens);
  if (rows == 0) return;
  auto* logit_tokens = packing.part<std::int32_t>(layout_.logit_tokens, rows * sizeof(std::int32_t));
  std::copy(input.logit_tokens.begin(), input.logit_tokens.end(), logit_tokens);
  for (std::size_t r = sampled; r < rows; ++r) logit_tokens[r] = static_cast<std::int32_t>(r);
  if (input.sampling.empty()) return;

  std::size_t num_adjustments = 0;
  for (const SampleRow& row : input.sampling) num_adjustments += row.logit_bias.size() + row.forbidden.size();
  const bool many = num_adjustments > kAdjustments;
  auto* adjustments =
      num_adjustments == 0 ? nullptr
      : many ? reinterpret_cast<LogitAdjustment*>(staging.take(num_adjustments * sizeof(LogitAdjustment)))
             : packing.part<LogitAdjustment>(layout_.adjustments, num_adjustments * sizeof(LogitAdjustment));
  auto* samples = packing.part<DeviceSampleRow>(layout_.samples, rows * sizeof(DeviceSampleRow));
  std::size_t at = 0;
  for (std::size_t r = 0; r < sampled; ++r) {
    const SampleRow& row = input.sampling[r];
    const std::size_t begin = at;
    for (const auto& [id, bias] : row.logit_bias) adjustments[at++] = {id, bias};
    for (const std::int32_t id : row.forbidden) adjustments[at++] = {id, -std::numeric_limits<float>::infinity()};
    samples[r] = device_row(row, begin, at);
    const bool greedy = row.temperature <= 0 || row.top_k == 1;
    step.all_greedy &= greedy;
    step.any_filter |= !greedy && (row.top_k > 0 || row.top_p < 1 || row.min_p > 0);
    step.processing.any_penalised |= row.penalised;
  }
  SampleRow padding;
  padding.temperature = 0;
  for (std::size_t r = sampled; r < rows; ++r) samples[r] = device_row(padding, at, at);

  step.samples = true;
  step.processing.rows = packing.device<DeviceSampleRow>(layout_.samples);
  step.processing.adjustments = packing.device<LogitAdjustment>(layout_.adjustments);
  step.processing.num_adjustments = static_cast<int>(num_adjustments);
  if (!many) return;
  const std::size_t bytes = num_adjustments * sizeof(LogitAdjustment);
  if (!many_adjustments_ || many_adjustments_->bytes() < bytes) many_adjustments_ = allocate_device(2 * bytes);
  check(cudaMemcpyAsync(many_adjustments_->data(), adjustments, bytes, cudaMemcpyHostToDevice, stream_),
        "copying logit biases");
  step.processing.adjustments = data_as<LogitAdjustment>(*many_adjustments_);
}

void StepRing::pack_tables(Packing& packing, const StepInput& input, Staging& staging) {
  packing.update.tables = data_as<BlockId>(*tables_);
  packing.update.table_width = limits_.table_width;
  std::span<const TableSet> sets = input.table_sets;
  for (; sets.size() > kTableSets; sets = sets.subspan(kTableSets)) {
    InputUpdate first = packing.update;
    first.table_sets = staging.put(sets.first(kTableSets));
    first.num_table_sets = static_cast<std::int32_t>(kTableSets);
    update_inputs(first, stream_);
  }
  auto* entry = packing.entry<TableSet>(layout_.table_sets);
  std::copy(sets.begin(), sets.end(), entry);
  packing.update.table_sets = entry;
  packing.update.num_table_sets = static_cast<std::int32_t>(sets.size());
}

void StepRing::end(CudaStep& step) {
  step.done_.record(stream_);
  step.state_.store(CudaStep::State::Ended, std::memory_order_release);
}

void StepRing::wait(CudaStep& step, StepOutput& out) {
  step.done_.wait();
  step.collect(out);
  step.state_.store(CudaStep::State::Idle, std::memory_order_release);
}

}  // namespace fastllm::cuda

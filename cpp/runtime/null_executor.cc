#include "runtime/null_executor.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "base/hash.h"
#include "base/slot_tables.h"
#include "fastllm/error.h"
#include "runtime/bad_words.h"

namespace fastllm {
namespace {

// What stands in a KV position: a hash of its token, its number and the position before it, as real KV depends on the
// whole beginning.
using Kv = std::uint64_t;

struct Slot {
  std::shared_ptr<const SamplingParams> sampling;
  std::shared_ptr<LogitsProcessor> processor;
  std::uint64_t seed = 0;
  std::int32_t num_prompt = 0;
  TokenId last_token = -1;
  std::uint64_t history = 0;           // hash of prompt + output if penalties need them
  std::vector<std::uint32_t> allowed;  // one bit per id; empty: all
};

// A kSample row between the forward pass and the choice of its token.
struct Sample {
  std::int32_t row = 0;
  SlotId slot = kNoSlot;
  std::int32_t end = 0;  // positions
  std::uint64_t hash = 0;
  std::span<const TokenId> host_tokens;
  std::int32_t mask = -1;  // index among the masked rows
};

// One plan in flight.
struct Pending {
  std::uint64_t plan_id = 0;
  std::vector<Sample> samples;
  std::int32_t num_masks = 0;
  std::int32_t max_logprobs = -1;
  bool sampled = false;
  StepResult result;
  TimePoint ready_at{};
};

class NullExecutor final : public Executor {
 public:
  NullExecutor(const EngineConfig& config, const NullModel& model)
      : model_(model),
        depth_(config.async_depth),
        block_size_(config.block_size),
        max_num_seqs_(config.max_num_seqs),
        tables_(config.max_num_seqs, table_width(config, model)),
        slots_(static_cast<std::size_t>(config.max_num_seqs)),
        ring_(static_cast<std::size_t>(config.async_depth)) {}

  KvBudget profile() override {
    const std::int64_t per_seq = (model_.max_len + block_size_ - 1) / block_size_;
    const std::int64_t blocks = std::min<std::int64_t>(per_seq * max_num_seqs_, kMaxBlocks) + 1;
    return {bytes_per_block(), blocks, 0};
  }

  void init_kv(std::int64_t device_blocks, std::int64_t host_blocks) override {
    device_.assign(static_cast<std::size_t>(device_blocks * block_size_), 0);
    host_.assign(static_cast<std::size_t>(host_blocks * block_size_), 0);
  }

  void submit(const StepPlan& plan) override {
    Pending& pending = at(plan.id);
    pending.plan_id = plan.id;
    pending.samples.clear();
    pending.num_masks = static_cast<std::int32_t>(plan.masked_rows.size());
    pending.max_logprobs = plan.max_logprobs;
    pending.sampled = false;
    pending.result.clear();
    pending.result.plan_id = plan.id;
    const TimePoint now = Clock::now();
    device_free_at_ = std::max(now, device_free_at_) + std::chrono::microseconds(model_.step_us);
    pending.ready_at = device_free_at_;

    for (const BlockCopy& c : plan.swap_out) copy(device_, c.from, host_, c.to);
    for (const BlockCopy& c : plan.swap_in) copy(host_, c.from, device_, c.to);
    for (const BlockCopy& c : plan.copies) copy(device_, c.from, device_, c.to);
    for (const SlotInit& init : plan.new_slots) reset_slot(init);
    for (const TableSet& set : plan.table_sets) tables_.set(set);
    forward(plan, pending);
    if (pending.num_masks == 0) choose_tokens(pending, {});
  }

  void set_masks(std::uint64_t plan_id, std::span<const std::uint32_t> bits) override {
    choose_tokens(at(plan_id), bits);
  }

  bool ready(std::uint64_t plan_id) override { return at(plan_id).sampled && Clock::now() >= at(plan_id).ready_at; }

  const StepResult& wait(std::uint64_t plan_id) override {
    Pending& pending = at(plan_id);
    if (pending.plan_id != plan_id || !pending.sampled) {
      throw Error("Plan " + std::to_string(plan_id) + " was waited for before it was submitted or got its masks.");
    }
    if (model_.step_us > 0) std::this_thread::sleep_until(pending.ready_at);
    return pending.result;
  }

  int depth() const override { return depth_; }

 private:
  static constexpr int kDraws = 64;                    // of an allowed token
  static constexpr std::int64_t kMaxBlocks = 1 << 16;  // unless the configuration asks for more

  static int table_width(const EngineConfig& config, const NullModel& model) {
    return (model.max_len + config.block_size - 1) / config.block_size;
  }
  std::int64_t bytes_per_block() const { return block_size_ * static_cast<std::int64_t>(sizeof(Kv)); }
  Pending& at(std::uint64_t plan_id) { return ring_[plan_id % ring_.size()]; }

  void copy(const std::vector<Kv>& from, BlockId source, std::vector<Kv>& to, BlockId target) {
    const auto size = static_cast<std::size_t>(block_size_);
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(index(source) * size), size,
                to.begin() + static_cast<std::ptrdiff_t>(index(target) * size));
  }

  void reset_slot(const SlotInit& init) {
    tables_.reset(init.slot);
    Slot& slot = slots_[index(init.slot)];
    slot = {init.sampling, init.logits_processor, init.seed, init.num_prompt, -1, 0, {}};
    if (!init.sampling->allowed_ids.empty()) slot.allowed = bits_of(init.sampling->allowed_ids, model_.vocab);
    for (TokenId token : init.tokens) add_history(slot, token);
  }

  static void add_history(Slot& slot, TokenId token) {
    if (needs_history(*slot.sampling)) slot.history = hash_combine(slot.history, static_cast<std::uint64_t>(token));
  }

  Kv& kv_at(std::span<const BlockId> table, std::int32_t pos) {
    const BlockId block = table[static_cast<std::size_t>(pos / block_size_)];
    assert(block != kNullBlock);
    return device_[index(block) * static_cast<std::size_t>(block_size_) + static_cast<std::size_t>(pos % block_size_)];
  }

  void forward(const StepPlan& plan, Pending& pending) {
    std::size_t next_mask = 0, next_host = 0;
    for (std::size_t r = 0; r < plan.rows.size(); ++r) {
      const Row& row = plan.rows[r];
      const auto row_index = static_cast<std::int32_t>(r);
      const auto table = tables_.table(row.slot);
      Kv previous = row.first_pos > 0 ? kv_at(table, row.first_pos - 1) : 0;
      for (std::int32_t i = 0; i < row.num_tokens; ++i) {
        const TokenId token = row.flags & kFromSlot ? slots_[index(row.slot)].last_token
                                                    : plan.tokens[static_cast<std::size_t>(row.token_begin + i)];
        const std::int32_t pos = row.first_pos + i;
        previous =
            hash_combine(hash_combine(previous, static_cast<std::uint64_t>(pos)), static_cast<std::uint64_t>(token));
        kv_at(table, pos) = previous;
      }
      if (row.flags & kPromptLogprobs) score_prompt(plan, row, pending.result);
      if (!(row.flags & kSample)) continue;
      Sample& sample = pending.samples.emplace_back();
      sample.row = row_index;
      sample.slot = row.slot;
      sample.end = row.first_pos + row.num_tokens;
      sample.hash = read_all(table, sample.end);
      if (next_mask < plan.masked_rows.size() && plan.masked_rows[next_mask] == row_index) {
        sample.mask = static_cast<std::int32_t>(next_mask++);
      }
      if (next_host < plan.host_tokens.size() && plan.host_tokens[next_host].row == row_index) {
        sample.host_tokens = plan.host_tokens[next_host++].tokens;
      }
    }
  }

  // A hash of positions [0, end) in order.
  std::uint64_t read_all(std::span<const BlockId> table, std::int32_t end) const {
    constexpr std::uint64_t kMul = 0x9e3779b97f4a7c15ull;
    std::uint64_t hash = 0;
    for (std::int32_t pos = 0, block = 0; pos < end; pos += block_size_, ++block) {
      const Kv* kv =
          device_.data() + index(table[static_cast<std::size_t>(block)]) * static_cast<std::size_t>(block_size_);
      const std::int32_t count = std::min(block_size_, end - pos);
      for (std::int32_t i = 0; i < count; ++i) hash = (hash + kv[i]) * kMul;
    }
    return mix64(hash);
  }

  // Tokens are chosen in row order, all at once, when the masks are known.
  void choose_tokens(Pending& pending, std::span<const std::uint32_t> masks) {
    const std::size_t words = (static_cast<std::size_t>(model_.vocab) + 31) / 32;
    StepResult& result = pending.result;
    for (const Sample& sample : pending.samples) {
      Slot& slot = slots_[index(sample.slot)];
      const auto mask = sample.mask < 0 ? std::span<const std::uint32_t>()
                                        : masks.subspan(static_cast<std::size_t>(sample.mask) * words, words);
      std::string error;
      const TokenId token = choose(sample, slot, mask, error);
      if (token < 0) {
        result.row_errors.emplace_back(static_cast<std::int32_t>(result.tokens.size()), std::move(error));
      } else {
        slot.last_token = token;
        add_history(slot, token);
      }
      result.tokens.push_back(token);
      if (pending.max_logprobs >= 0) {
        result.logprobs.push_back(logprobs(std::max(token, 0), sample.hash, slot.sampling->logprobs));
      }
    }
    pending.sampled = true;
  }

  TokenId choose(const Sample& sample, const Slot& slot, std::span<const std::uint32_t> mask, std::string& error) {
    std::uint64_t hash = hash_combine(sample.hash, slot.history);
    if (slot.sampling->temperature > 0) {
      hash = hash_combine(hash_combine(hash, slot.seed), static_cast<std::uint64_t>(sample.end));
    }
    auto token = static_cast<TokenId>(hash % static_cast<std::uint64_t>(model_.vocab));
    if (slot.processor) {
      try {
        token = process(*slot.processor, sample, slot, token);
      } catch (const std::exception& e) {
        error = std::string("The logits processor failed: ") + e.what();
        return -1;
      }
    }
    std::vector<TokenId>& bad = forbidden_;
    bad.clear();
    const auto num_prompt = static_cast<std::size_t>(slot.num_prompt);
    const auto tokens = sample.host_tokens;
    append_completions(slot.sampling->bad_words,
                       tokens.size() > num_prompt ? tokens.subspan(num_prompt) : tokens.first(0), bad);
    const bool ending_allowed = sample.end - slot.num_prompt >= slot.sampling->min_tokens;
    for (int tries = 0; tries < kDraws + model_.vocab; ++tries) {
      const auto id = static_cast<std::size_t>(token);
      const auto excludes = [id](std::span<const std::uint32_t> bits) {
        return !bits.empty() && !(bits[id / 32] >> (id % 32) & 1);
      };
      const bool masked = excludes(mask) || excludes(slot.allowed) || std::ranges::find(bad, token) != bad.end();
      if (!masked && (ending_allowed || !ends(*slot.sampling, token))) return token;
      // Another draw where many ids are forbidden, so that those left are equally likely; in order where almost all
      // are.
      const auto vocab = static_cast<std::uint64_t>(model_.vocab);
      const auto next = tries < kDraws ? hash_combine(hash, static_cast<std::uint64_t>(tries)) % vocab : id + 1;
      token = static_cast<TokenId>(next == vocab ? 0 : next);
    }
    error = "No token of the vocabulary is allowed here.";
    return -1;
  }

  bool ends(const SamplingParams& p, TokenId token) const {
    return (!p.ignore_eos && std::ranges::find(model_.eos, token) != model_.eos.end()) ||
           std::ranges::find(p.stop_ids, token) != p.stop_ids.end();
  }

  // The processor sees logits that are 1 for the model's choice and 0 elsewhere.
  TokenId process(LogitsProcessor& processor, const Sample& sample, const Slot& slot, TokenId token) {
    logits_.assign(static_cast<std::size_t>(model_.vocab), 0.0f);
    logits_[static_cast<std::size_t>(token)] = 1.0f;
    processor.process(sample.host_tokens, slot.num_prompt, logits_);
    return static_cast<TokenId>(std::ranges::max_element(logits_) - logits_.begin());
  }

  void score_prompt(const StepPlan& plan, const Row& row, StepResult& result) {
    const auto table = tables_.table(row.slot);
    for (std::int32_t i = 0; i < row.num_tokens; ++i) {
      const TokenId next = plan.next_tokens[static_cast<std::size_t>(row.token_begin + i)];
      if (next < 0) continue;
      const Kv kv = kv_at(table, row.first_pos + i);
      result.prompt_logprobs.push_back(logprobs(next, kv, slots_[index(row.slot)].sampling->prompt_logprobs));
    }
  }

  // The chosen token is the best, its successors follow one nat apart.
  PositionLogprobs logprobs(TokenId chosen, std::uint64_t hash, int count) const {
    const float best = -static_cast<float>(hash % 1024) / 1024.0f;
    PositionLogprobs out{{chosen, best, 1}, {}};
    for (int i = 0; i < std::min(count, model_.vocab); ++i) {
      out.top.push_back({(chosen + i) % model_.vocab, best - static_cast<float>(i), i + 1});
    }
    return out;
  }

  NullModel model_;
  int depth_;
  std::int32_t block_size_;  // tokens
  int max_num_seqs_;
  SlotTables tables_;
  std::vector<Slot> slots_;
  std::vector<Kv> device_, host_;  // [blocks, block_size]
  std::vector<Pending> ring_;      // by plan id
  std::vector<float> logits_;      // [vocab]
  std::vector<TokenId> forbidden_;
  TimePoint device_free_at_{};  // when the simulated device has run everything submitted
};

}  // namespace

std::unique_ptr<Executor> make_null_executor(const EngineConfig& config, const NullModel& model) {
  return std::make_unique<NullExecutor>(config, model);
}

}  // namespace fastllm

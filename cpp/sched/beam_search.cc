#include "sched/beam_search.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <utility>

namespace fastllm {

// As many as end at most, and the width that goes on.
int beam_candidates(int width, int num_ends, int vocab) { return std::min(width + num_ends, vocab); }

BeamSearch::BeamSearch(BeamRules rules) : rules_(std::move(rules)) { beams_.push_back({-1, 0.0}); }

std::span<const BeamSearch::Child> BeamSearch::advance(std::span<const PositionLogprobs> rows) {
  assert(rows.size() == beams_.size());
  ++length_;
  gather(rows);
  next_beams_.clear();
  children_.clear();
  const auto width = static_cast<std::size_t>(rules_.width);
  for (std::size_t rank = 0; rank < candidates_.size() && children_.size() < width; ++rank) {
    const Candidate& candidate = candidates_[rank];
    const PositionLogprobs& row = rows[static_cast<std::size_t>(candidate.parent)];
    const bool ended = ends(candidate.token.token);
    if (!ended && length_ < rules_.max_output) {
      next_beams_.push_back({add_node(candidate, row), candidate.sum});
      children_.push_back({candidate.parent, candidate.token.token});
    } else if (rank < width) {
      finished_.push_back({add_node(candidate, row), score(candidate.sum, length_), ended});
    }
  }
  std::ranges::stable_sort(finished_, std::greater<>(), &Finished::score);
  if (finished_.size() > width) finished_.resize(width);
  beams_.swap(next_beams_);
  if (is_over()) {
    beams_.clear();
    children_.clear();
  }
  return children_;
}

// All continuations, the best first; of equal ones the better beam's, then its likelier.
void BeamSearch::gather(std::span<const PositionLogprobs> rows) {
  candidates_.clear();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto add = [&](const TokenLogprob& t) {
      if (length_ <= rules_.min_output && ends(t.token)) return;
      candidates_.push_back({beams_[i].sum + static_cast<double>(t.logprob), static_cast<std::int32_t>(i), t});
    };
    bool known = false;
    for (const TokenLogprob& t : rows[i].top) {
      add(t);
      known = known || t.token == rows[i].chosen.token;
    }
    if (!known) add(rows[i].chosen);  // sampled: one candidate more
  }
  std::ranges::stable_sort(candidates_, std::greater<>(), &Candidate::sum);
}

bool BeamSearch::ends(TokenId token) const { return std::ranges::find(rules_.ends, token) != rules_.ends.end(); }

std::int32_t BeamSearch::add_node(const Candidate& candidate, const PositionLogprobs& row) {
  Node& node = nodes_.emplace_back();
  node.parent = beams_[static_cast<std::size_t>(candidate.parent)].node;
  node.position.chosen = candidate.token;
  if (rules_.logprobs > 0) {
    const auto count = std::min(row.top.size(), static_cast<std::size_t>(rules_.logprobs));
    node.position.top.assign(row.top.begin(), row.top.begin() + static_cast<std::ptrdiff_t>(count));
  }
  return static_cast<std::int32_t>(nodes_.size()) - 1;
}

double BeamSearch::score(double sum, int length) const {
  return sum / std::pow(static_cast<double>(length), static_cast<double>(rules_.length_penalty));
}

bool BeamSearch::is_over() const {
  if (beams_.empty()) return true;
  if (finished_.size() < static_cast<std::size_t>(rules_.width)) return false;
  if (rules_.early_stopping == EarlyStopping::Yes) return true;
  const bool longest = rules_.early_stopping == EarlyStopping::Never && rules_.length_penalty > 0;
  return score(beams_.front().sum, longest ? rules_.max_output : length_) <= finished_.back().score;
}

std::vector<BeamSearch::Result> BeamSearch::results() const {
  std::vector<Result> all;
  for (const Finished& f : finished_) {
    Result& result = all.emplace_back();
    result.score = f.score;
    result.ended = f.ended;
    for (std::int32_t n = f.node; n >= 0; n = nodes_[static_cast<std::size_t>(n)].parent) {
      const PositionLogprobs& position = nodes_[static_cast<std::size_t>(n)].position;
      result.tokens.push_back(position.chosen.token);
      if (rules_.logprobs >= 0) result.logprobs.push_back(position);
    }
    std::ranges::reverse(result.tokens);
    std::ranges::reverse(result.logprobs);
  }
  return all;
}

}  // namespace fastllm

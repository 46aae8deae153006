// What a beam search decides, whatever its beams' KV: which beams go on, which have ended, when it is over. The rules
// are those of Transformers' generate(num_beams=...): of all continuations of all beams,
//
//   best width    those that end are results; the best width results are kept
//   next ones     stand in for those that ended: the best width that do not end go on
//
// One node per token of every beam that ever was; a beam is its last node.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fastllm/types.h"

namespace fastllm {

struct BeamRules {
  int width = 1;
  int max_output = 1;  // tokens at which every beam ends
  int min_output = 0;  // tokens before one may end earlier
  float length_penalty = 1.0f;
  EarlyStopping early_stopping = EarlyStopping::No;
  std::vector<TokenId> ends;  // ids that end a beam and stay in it
  int logprobs = -1;          // alternatives per token of a result; 0: the token's own only; -1: none
};

// Next tokens of a beam that advance() must be given, the most likely ones.
int beam_candidates(int width, int num_ends, int vocab);

class BeamSearch {
 public:
  struct Child {
    std::int32_t parent = 0;  // which of the beams before it continues
    TokenId token = 0;
  };
  struct Result {
    std::vector<TokenId> tokens;
    std::vector<PositionLogprobs> logprobs;  // one per token, if asked for
    double score = 0;
    bool ended = false;  // by its last token; else by its length
  };

  explicit BeamSearch(BeamRules rules);

  // rows[i]: the next tokens of beam i; there is one beam at first. Returns the beams that follow, the best first,
  // until the next call; none: the search is over.
  std::span<const Child> advance(std::span<const PositionLogprobs> rows);
  // The best first, at most width of them.
  std::vector<Result> results() const;
  std::size_t num_beams() const { return beams_.size(); }
  int length() const { return length_; }

 private:
  struct Node {
    std::int32_t parent = -1;
    PositionLogprobs position;
  };
  struct Beam {
    std::int32_t node = -1;
    double sum = 0;  // of log-probabilities
  };
  struct Finished {
    std::int32_t node = -1;
    double score = 0;
    bool ended = false;
  };
  struct Candidate {
    double sum = 0;
    std::int32_t parent = 0;
    TokenLogprob token;
  };

  void gather(std::span<const PositionLogprobs> rows);
  bool ends(TokenId token) const;
  std::int32_t add_node(const Candidate& candidate, const PositionLogprobs& row);
  double score(double sum, int length) const;
  bool is_over() const;

  BeamRules rules_;
  int length_ = 0;  // output tokens of every beam
  std::vector<Node> nodes_;
  std::vector<Beam> beams_, next_beams_;
  std::vector<Finished> finished_;  // best first
  std::vector<Candidate> candidates_;
  std::vector<Child> children_;
};

}  // namespace fastllm

// The part of the Scheduler that carries the beams of a search in sequences. Every beam runs as any other sequence, one
// token at a time, until its next tokens are known; then it is parked. When all are, the search says which beams
// follow, and they get the parents' blocks, shared until the first that writes to one copies it:
//
//   parent  |A0|A1|A2.|        first child    |A0|A1|A2.|     stays where its parent is
//                              other children |A0|A1|A2.|     take the place of beams without children, or wait for one
//
// A beam without place computes its positions again, as any preempted sequence does.
#include <algorithm>
#include <cassert>
#include <utility>

#include "sched/scheduler.h"

namespace fastllm {

void Scheduler::start_beams(Request& request, SamplingParams& sampling) {
  BeamRules rules;
  rules.width = sampling.beam_width;
  rules.max_output = sampling.max_tokens;
  rules.min_output = sampling.min_tokens;
  rules.length_penalty = sampling.length_penalty;
  rules.early_stopping = sampling.early_stopping;
  rules.ends = sampling.stop_ids;
  if (!sampling.ignore_eos) rules.ends.insert(rules.ends.end(), model_.eos.begin(), model_.eos.end());
  rules.logprobs = sampling.logprobs;
  const int candidates = beam_candidates(rules.width, static_cast<int>(rules.ends.size()), model_.vocab);
  sampling.logprobs = std::max(sampling.logprobs, candidates);
  request.beams = std::make_unique<BeamGroup>(std::move(rules));
  request.forked = true;
  for (std::size_t i = 1; i < request.seqs.size(); ++i) request.seqs[i]->parked = true;
}

void Scheduler::know_next(Sequence& seq, const PositionLogprobs& next, TimePoint now) {
  BeamGroup& group = *seq.req->beams;
  const auto beam = std::ranges::find(group.sequence_of, seq.index) - group.sequence_of.begin();
  group.rows.at(static_cast<std::size_t>(beam)) = next;
  seq.parked = true;
  ++generated_tokens_;
  if (group.search.length() == 0) seq.times.first_token = now;
  if (++group.num_known == group.rows.size()) advance_beams(*seq.req, now);
}

void Scheduler::advance_beams(Request& request, TimePoint now) {
  BeamGroup& group = *request.beams;
  const auto children = group.search.advance(group.rows);
  if (children.empty()) return end_beams(request, now);

  std::vector<bool> taken(request.seqs.size());
  std::vector<std::int32_t> place(children.size(), -1);
  const auto sequence_of = [&](std::size_t child) -> Sequence& {
    const std::int32_t parent = group.sequence_of[static_cast<std::size_t>(children[child].parent)];
    return *request.seqs[static_cast<std::size_t>(parent)];
  };
  for (std::size_t c = 0; c < children.size(); ++c) {
    const Sequence& parent = sequence_of(c);
    if (taken[static_cast<std::size_t>(parent.index)]) continue;
    taken[static_cast<std::size_t>(parent.index)] = true;
    place[c] = parent.index;
  }
  // Places on the device first.
  std::vector<Sequence*> free;
  for (const auto& seq : request.seqs) {
    if (!taken[static_cast<std::size_t>(seq->index)]) free.push_back(seq.get());
  }
  std::ranges::stable_partition(free, [](const Sequence* s) { return s->state == SeqState::Running; });
  auto next_free = free.begin();
  for (std::size_t c = 0; c < children.size(); ++c) {
    if (place[c] >= 0) continue;
    Sequence& to = **next_free++;
    branch(sequence_of(c), to);
    place[c] = to.index;
  }
  for (; next_free != free.end(); ++next_free) leave_device(**next_free);

  for (std::size_t c = 0; c < children.size(); ++c) {
    Sequence& seq = *request.seqs[static_cast<std::size_t>(place[c])];
    seq.tokens.push_back(children[c].token);
    seq.parked = false;
    if (seq.state != SeqState::Running) enqueue(seq);
  }
  group.sequence_of = std::move(place);
  group.rows.assign(children.size(), {});
  group.num_known = 0;
}

// `to` becomes what `from` is.
void Scheduler::branch(const Sequence& from, Sequence& to) {
  assert(from.inflight == 0 && to.inflight == 0 && !to.queued);
  to.tokens = from.tokens;
  if (from.state == SeqState::Running && to.state == SeqState::Running) {
    const std::int32_t differ = kv_.share(from.kv, to.kv);
    to.stale_from = to.stale_from < 0 ? differ : std::min(to.stale_from, differ);
    to.num_computed = from.num_computed;
    return;
  }
  leave_device(to);
  to.fork_of = from.index;
}

void Scheduler::leave_device(Sequence& seq) {
  if (seq.state == SeqState::Running) {
    remove_running(seq);
    free_slot(seq);
  } else if (seq.state == SeqState::Swapped) {
    forget_swap(seq);
  }
  kv_.release(seq.kv);
  seq.state = SeqState::Waiting;
  seq.num_computed = 0;
  seq.fork_of = -1;
}

void Scheduler::end_beams(Request& request, TimePoint now) {
  const std::vector<BeamSearch::Result> results = request.beams->search.results();
  for (const auto& seq : request.seqs) finish(*seq, now);
  for (int i = 0; i < request.sampling->n; ++i) {
    const Sequence& seq = *request.seqs[static_cast<std::size_t>(i)];
    TokenDelta& delta = new_delta(seq);
    delta.times = request.seqs[0]->times;
    delta.cached_tokens = std::max(request.seqs[0]->cached_tokens, 0);
    delta.finish = FinishReason::Length;
    if (i == 0) delta.prompt_logprobs = std::exchange(request.seqs[0]->prompt_logprobs, {});
    if (static_cast<std::size_t>(i) >= results.size()) continue;  // the vocabulary is too small for so many
    const BeamSearch::Result& result = results[static_cast<std::size_t>(i)];
    delta.tokens = result.tokens;
    delta.logprobs = result.logprobs;
    if (!result.ended) continue;
    delta.finish = FinishReason::Stop;
    delta.stop_token = result.tokens.back();
  }
  retire_if_ended(request);
}

}  // namespace fastllm

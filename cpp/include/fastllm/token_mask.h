// Two hooks into sampling that a host may attach to a request. Both are called with every token of the sequence known,
// so a sequence that has one is planned only when none of its steps is in flight.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "fastllm/export.h"

namespace fastllm {

// Structured output of one sequence. Called on the engine thread while the device computes the logits.
class FASTLLM_API TokenMask {
 public:
  virtual ~TokenMask() = default;
  // Writes one bit per vocabulary id, 1 = allowed; `bits` has ceil(vocab / 32) words, bit i of word w is id 32 w + i.
  virtual void fill(std::span<std::uint32_t> bits) = 0;
  // Tells the grammar which token was sampled. True: the output is complete and ends here, whatever else would let it
  // go on.
  virtual bool accept(std::int32_t token) = 0;
  // One that has accepted nothing yet, for a further sample of the request. Called before any accept.
  virtual std::shared_ptr<TokenMask> clone() const = 0;
  // What all masks of its kind share, such as an interpreter's lock; the engine holds on to it while it asks the masks
  // of one step in a row. Null: nothing.
  virtual std::shared_ptr<void> hold() { return nullptr; }
};

// A caller's own change to the logits, the reference hook for custom sampling. Called on the thread of rank 0 before
// every other step of sampling; may block, which stalls the whole step. An exception fails this request only.
class FASTLLM_API LogitsProcessor {
 public:
  virtual ~LogitsProcessor() = default;
  // `tokens`: prompt then output so far; `logits`: [vocab] fp32, changed in place.
  virtual void process(std::span<const std::int32_t> tokens, int num_prompt, std::span<float> logits) = 0;
};

}  // namespace fastllm

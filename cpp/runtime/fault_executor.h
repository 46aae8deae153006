// Faults on demand, for tests of what the engine and the server do about them. Off unless FASTLLM_TEST_HOOKS is 1.
//
//   FASTLLM_FAULT=KIND@STEP[:MILLISECONDS][,...]
//     hang@STEP[:MS]  the step's wait does not end (before MS)
//     slow@STEP:MS    from the step on, every wait takes MS longer
//     error@STEP      the step fails as a whole, as when a device is lost
//     nan@STEP        the step's first row has no usable logits
//     crash@STEP      the process aborts
// Steps count from 1.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "runtime/executor.h"

namespace fastllm {

struct Fault {
  enum class Kind : std::uint8_t { Hang, Slow, Error, Nan, Crash } kind = Kind::Hang;
  std::uint64_t step = 1;
  std::int64_t milliseconds = -1;  // -1: not given
};

// Throws InvalidArgument naming the part that cannot be read.
std::vector<Fault> parse_faults(std::string_view text);

// The executor itself where the environment asks for no faults.
std::unique_ptr<Executor> with_faults(std::unique_ptr<Executor> executor);
std::unique_ptr<Executor> with_faults(std::unique_ptr<Executor> executor, std::vector<Fault> faults);

}  // namespace fastllm

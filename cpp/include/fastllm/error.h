// The one exception hierarchy. Messages are sentences that name the thing, its value and the bound.
#pragma once

#include <stdexcept>
#include <string>

#include "fastllm/export.h"

namespace fastllm {

class FASTLLM_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller's data or configuration is wrong; nothing was changed.
class FASTLLM_API InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A checkpoint or bundle is damaged or does not match its spec.
class FASTLLM_API LoadError : public Error {
 public:
  using Error::Error;
};

// Memory, a device or a thread could not be had.
class FASTLLM_API ResourceError : public Error {
 public:
  using Error::Error;
};

}  // namespace fastllm

// The one exception hierarchy. Messages are sentences that name the thing, its value and the bound.
#pragma once

#include <stdexcept>
#include <string>

namespace fastllm {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller's data or configuration is wrong; nothing was changed.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A checkpoint or bundle is damaged or does not match its spec.
class LoadError : public Error {
 public:
  using Error::Error;
};

// Memory, a device or a thread could not be had.
class ResourceError : public Error {
 public:
  using Error::Error;
};

}  // namespace fastllm

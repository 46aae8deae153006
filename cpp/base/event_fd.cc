#include "base/event_fd.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "fastllm/error.h"

namespace fastllm {

EventFd::EventFd() : fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (fd_ < 0) throw ResourceError(std::string("eventfd could not be created: ") + std::strerror(errno) + ".");
}

EventFd::~EventFd() { ::close(fd_); }

// A full or an empty counter already is the state asked for, so EAGAIN is success.
void EventFd::signal() {
  while (::eventfd_write(fd_, 1) != 0 && errno == EINTR) {
  }
}

void EventFd::clear() {
  eventfd_t count = 0;
  while (::eventfd_read(fd_, &count) != 0 && errno == EINTR) {
  }
}

}  // namespace fastllm

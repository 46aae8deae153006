// A file descriptor that an event loop can watch: readable between signal() and clear(). Thread-safe.
#pragma once

namespace fastllm {

class EventFd {
 public:
  EventFd();  // throws ResourceError when the process has no descriptor left
  ~EventFd();
  EventFd(const EventFd&) = delete;
  EventFd& operator=(const EventFd&) = delete;

  int fd() const { return fd_; }
  void signal();
  void clear();

 private:
  int fd_;
};

}  // namespace fastllm

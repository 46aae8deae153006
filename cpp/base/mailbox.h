// A queue between threads that moves batches: the taker swaps vectors, so a message costs no allocation once both have
// grown. An optional EventFd is readable while messages wait; a batch signals it at most once.
#pragma once

#include <chrono>
#include <condition_variable>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#include "base/event_fd.h"

namespace fastllm {

template <class T>
class Mailbox {
 public:
  // `notifier` may be null and outlives the mailbox.
  explicit Mailbox(EventFd* notifier = nullptr) : notifier_(notifier) {}

  void push(T message) {
    std::lock_guard lock(mutex_);
    messages_.push_back(std::move(message));
    arrived();
  }

  // Leaves `batch` empty.
  void push_all(std::vector<T>& batch) {
    if (batch.empty()) return;
    std::lock_guard lock(mutex_);
    if (messages_.empty()) {
      messages_.swap(batch);
    } else {
      messages_.insert(messages_.end(), std::make_move_iterator(batch.begin()), std::make_move_iterator(batch.end()));
    }
    batch.clear();
    arrived();
  }

  // Replaces `out` by everything that waits; false if that is nothing.
  bool take(std::vector<T>& out) {
    out.clear();
    std::lock_guard lock(mutex_);
    return take_locked(out);
  }

  // The same after waiting for a message.
  bool wait_take(std::vector<T>& out) {
    out.clear();
    std::unique_lock lock(mutex_);
    arrival_.wait(lock, [&] { return !messages_.empty(); });
    return take_locked(out);
  }

  bool wait_take_for(std::vector<T>& out, std::chrono::milliseconds timeout) {
    out.clear();
    std::unique_lock lock(mutex_);
    arrival_.wait_for(lock, timeout, [&] { return !messages_.empty(); });
    return take_locked(out);
  }

 private:
  void arrived() {
    if (!signalled_) {
      signalled_ = true;
      if (notifier_) notifier_->signal();
      arrival_.notify_all();
    }
  }

  bool take_locked(std::vector<T>& out) {
    if (messages_.empty()) return false;
    out.swap(messages_);
    signalled_ = false;
    if (notifier_) notifier_->clear();
    return true;
  }

  std::mutex mutex_;
  std::condition_variable arrival_;
  std::vector<T> messages_;
  bool signalled_ = false;  // since the last take
  EventFd* notifier_;
};

}  // namespace fastllm

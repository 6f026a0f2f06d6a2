// Threads that step together: a parallel region whose members wait for one another.
//
// A region gives as many threads as it can, one where it is nested. Who comes joins; the first to
// come closes the team when all are there whom the region's cut promises, or after kPatience: a
// thread that came late, or the same thread once more, finds nothing left to do. So nobody waits
// for somebody who never comes.
#pragma once

#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace dlkernels {

class Team {
 public:
  // body(team, me) on up to `wanted` threads, me = 0 … size() − 1.
  template <typename Body>
  static void run(int64_t wanted, const Body& body) {
    Team team(wanted);
    torch::stable::parallel_for(0, wanted, 1, [&](int64_t begin, int64_t end) {
      const int64_t me = team.join(begin, end);
      if (me >= 0) body(team, me);
    });
  }

  int64_t size() const { return size_.load(std::memory_order_relaxed); }

  // Waits for members first … first + n − 1, of whom `me` is one. Each of the kinds is counted for
  // itself.
  static constexpr int kKinds = 2;
  void wait(int kind, int64_t first, int64_t n, int64_t me) {
    if (n == 1) return;
    std::atomic<int64_t>& mine = passed_[size_t(me)].count[kind];
    const int64_t count = mine.load(std::memory_order_relaxed) + 1;
    mine.store(count, std::memory_order_release);
    for (int64_t i = first; i < first + n; ++i) {
      const std::atomic<int64_t>& other = passed_[size_t(i)].count[kind];
      spin([&] { return other.load(std::memory_order_acquire) >= count; });
    }
  }

 private:
  static constexpr std::chrono::milliseconds kPatience{5};
  static constexpr int64_t kClosed = int64_t(1) << 40;
  struct alignas(64) Passed {
    std::atomic<int64_t> count[kKinds] = {};
  };
  std::vector<Passed> passed_;
  std::atomic<int64_t> promised_, joined_{0}, size_{0};

  explicit Team(int64_t wanted) : passed_(size_t(wanted)), promised_(wanted) {}

  template <typename Done>
  static void spin(const Done& done) {
    constexpr int kSpins = 1 << 8;  // looks before the processor goes to others
    for (int looks = 0; !done(); ++looks) looks < kSpins ? pause() : void(sched_yield());
  }

  // The calling thread's number, or −1.
  int64_t join(int64_t begin, int64_t end) {
    const int64_t wanted = int64_t(passed_.size());
    // The last chunk may be shorter than the others.
    if (begin == 0 || end < wanted)
      promised_.store((wanted + end - begin - 1) / (end - begin), std::memory_order_relaxed);
    const int64_t me = joined_.fetch_add(1, std::memory_order_acq_rel);
    if (me >= kClosed) return -1;
    if (me == 0) {
      const auto until = std::chrono::steady_clock::now() + kPatience;
      spin([&] {
        return joined_.load(std::memory_order_acquire) >=
                   promised_.load(std::memory_order_relaxed) ||
               std::chrono::steady_clock::now() > until;
      });
      size_.store(joined_.exchange(kClosed, std::memory_order_acq_rel), std::memory_order_release);
    } else {
      spin([&] { return size_.load(std::memory_order_acquire) > 0; });
    }
    return me;
  }
};

}  // namespace dlkernels

// Who knows what of whom: vector clocks, cut to the shape of a grid.
//
// A thread's accesses carry its epoch: block, clock, thread. Its clock goes up wherever it releases
// (arrives at a barrier, fences). Epoch (b, u, c) is before what thread t does now if t knows u at
// c:
//   of its own block   c ≤ floor (what all had at the last barrier of the block), or c ≤ base[u]
//   of another block   the same of its entry of `foreign`
// A barrier of the whole block thus costs no vector at all: floor becomes the highest clock, and
// all go on from floor + 1. The vectors are shared and never changed while shared.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

namespace dlkernels::emulated {

// Counted without atomics: only the thread that holds the machine touches these.
template <typename T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* taken) : pointer_(taken) {}
  Ref(const Ref& other) : pointer_(other.pointer_) {
    if (pointer_) ++pointer_->references;
  }
  Ref(Ref&& other) noexcept : pointer_(std::exchange(other.pointer_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(pointer_, other.pointer_);
    return *this;
  }
  ~Ref() {
    if (pointer_ && --pointer_->references == 0) destroy(pointer_);
  }
  T* get() const { return pointer_; }
  T* operator->() const { return pointer_; }
  T& operator*() const { return *pointer_; }
  explicit operator bool() const { return pointer_; }
  bool operator==(const Ref& other) const { return pointer_ == other.pointer_; }

 private:
  __attribute__((noinline)) static void destroy(T* pointer) { delete pointer; }
  T* pointer_ = nullptr;
};

// The clock of each thread of a block.
struct Clock {
  explicit Clock(size_t threads) : at(threads) {}
  uint32_t references = 1;
  std::vector<uint32_t> at;
};

inline Ref<Clock> join(const Ref<Clock>& a, const Ref<Clock>& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  Ref<Clock> result(new Clock(a->at.size()));
  for (size_t i = 0; i < a->at.size(); ++i) result->at[i] = std::max(a->at[i], b->at[i]);
  return result;
}

// What is known of a block.
struct Known {
  uint64_t block;
  uint32_t floor = 0;
  Ref<Clock> clock;
  bool covers(uint32_t thread, uint32_t time) const {
    return time <= floor || (clock && time <= clock->at[thread]);
  }
};

// Of several blocks, in their order.
struct Knowledge {
  uint32_t references = 1;
  std::vector<Known> blocks;

  const Known* find(uint64_t block) const {
    const auto found = std::lower_bound(blocks.begin(), blocks.end(), block,
                                        [](const Known& k, uint64_t b) { return k.block < b; });
    return found != blocks.end() && found->block == block ? &*found : nullptr;
  }
  void add(const Known& known) {
    const auto place = std::lower_bound(blocks.begin(), blocks.end(), known.block,
                                        [](const Known& k, uint64_t b) { return k.block < b; });
    if (place == blocks.end() || place->block != known.block) {
      blocks.insert(place, known);
    } else {
      place->floor = std::max(place->floor, known.floor);
      place->clock = join(place->clock, known.clock);
    }
  }
};

inline Ref<Knowledge> join(const Ref<Knowledge>& a, const Ref<Knowledge>& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  Ref<Knowledge> result(new Knowledge);
  auto& blocks = result->blocks;
  blocks.reserve(a->blocks.size() + b->blocks.size());
  auto i = a->blocks.begin(), j = b->blocks.begin();
  while (i != a->blocks.end() || j != b->blocks.end()) {
    if (j == b->blocks.end() || (i != a->blocks.end() && i->block < j->block)) {
      blocks.push_back(*i++);
    } else if (i == a->blocks.end() || j->block < i->block) {
      blocks.push_back(*j++);
    } else {
      blocks.push_back({i->block, std::max(i->floor, j->floor), join(i->clock, j->clock)});
      ++i, ++j;
    }
  }
  return result;
}

}  // namespace dlkernels::emulated

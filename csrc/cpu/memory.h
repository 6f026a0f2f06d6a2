// Memory of the loops: scratch in whole cache lines, and large results.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace dlkernels {

// n elements, not initialised, from the start of a cache line on. Allocate it before a parallel
// region: an exception inside would lose its text.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t n) : data_(new (kLine) T[size_t(std::max<int64_t>(n, 0))]) {}
  T* get() const { return data_.get(); }
  // What keeps arrays one after another in lines of their own.
  static int64_t padded(int64_t n) {
    constexpr int64_t kPerLine = 64 / sizeof(T);
    return (n + kPerLine - 1) / kPerLine * kPerLine;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Release {
    void operator()(T* data) const { ::operator delete[](data, kLine); }
  };
  std::unique_ptr<T[], Release> data_;
};

// Memory that is fresh from the system costs a fault for every page: ask for large ones before the
// first touch.
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace dlkernels

// Memory of the loops: scratch in whole cache lines, and large results.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>

namespace dlkernels {

// n elements, not initialised, from the start of a cache line on. Allocate it before a parallel
// region: an exception inside would lose its text. What is large is torch's memory, so that its
// profiler counts it and its allocator keeps it.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t n) {
    const int64_t bytes = std::max<int64_t>(n, 0) * int64_t(sizeof(T));
    if (bytes < kLarge) {
      small_.reset(static_cast<T*>(::operator new(size_t(bytes), kLine)));
      data_ = small_.get();
    } else {
      large_ = torch::stable::empty(std::array<int64_t, 1>{bytes},
                                    torch::headeronly::ScalarType::Byte, std::nullopt,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU));
      data_ = static_cast<T*>(large_->mutable_data_ptr());
    }
  }
  T* get() const { return data_; }
  // What keeps arrays one after another in lines of their own.
  static int64_t padded(int64_t n) {
    constexpr int64_t kPerLine = 64 / sizeof(T);
    return (n + kPerLine - 1) / kPerLine * kPerLine;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  static constexpr int64_t kLarge = 1 << 20;
  struct Release {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Release> small_;
  std::optional<torch::stable::Tensor> large_;
  T* data_;
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

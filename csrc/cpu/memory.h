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
#include <utility>

namespace dlkernels {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that is fresh from the system costs a fault for every page: ask for large ones before the
// first touch.
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Memory that a thread keeps for its next call.
struct Kept {
  static constexpr std::align_val_t kLine{64};
  struct Release {
    void operator()(char* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<char, Release> data;
  int64_t bytes = 0;

  static Kept allocate(int64_t bytes) {
    Kept made;
    made.data.reset(static_cast<char*>(::operator new(size_t(bytes), kLine)));
    made.bytes = bytes;
    advise_huge_pages(made.data.get(), size_t(bytes));
    return made;
  }
  static Kept& of_thread() {
    static thread_local Kept memory;
    return memory;
  }
};

// n elements, not initialised, from the start of a cache line on. Allocate it before a parallel
// region: an exception inside would lose its text.
//
// Of those from kSmall to kLarge bytes the calling thread keeps the largest for its next call:
// memory that goes back to the system costs a fault for every page when it comes again. What is
// smaller the heap keeps by itself; what is larger is torch's, whose profiler counts it.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t n) {
    const int64_t bytes = std::max<int64_t>(n, 0) * int64_t(sizeof(T));
    if (bytes > kLarge) {
      large_ = torch::stable::empty(std::array<int64_t, 1>{bytes},
                                    torch::headeronly::ScalarType::Byte, std::nullopt,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU));
      data_ = static_cast<T*>(large_->mutable_data_ptr());
      advise_huge_pages(data_, size_t(bytes));
      return;
    }
    if (kReuses && bytes >= kSmall && bytes <= Kept::of_thread().bytes)
      std::swap(own_, Kept::of_thread());
    else
      own_ = Kept::allocate(bytes);
    data_ = reinterpret_cast<T*>(own_.data.get());
  }
  ~Aligned() {
    if (kReuses && own_.bytes >= kSmall && own_.bytes > Kept::of_thread().bytes)
      std::swap(own_, Kept::of_thread());
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* get() const { return data_; }
  // What keeps arrays one after another in lines of their own.
  static int64_t padded(int64_t n) { return round_up(n, 64 / int64_t(sizeof(T))); }

 private:
  static constexpr int64_t kSmall = 64 << 10, kLarge = 8 << 20;
#ifdef __SANITIZE_ADDRESS__
  static constexpr bool kReuses = false;  // an array has no end that a sanitizer sees, otherwise
#else
  static constexpr bool kReuses = true;
#endif
  Kept own_;
  std::optional<torch::stable::Tensor> large_;
  T* data_;
};

// For a tensor that nobody has written yet.
inline torch::stable::Tensor in_huge_pages(const torch::stable::Tensor& made) {
  advise_huge_pages(made.mutable_data_ptr(), size_t(made.numel()) * made.element_size());
  return made;
}

}  // namespace dlkernels

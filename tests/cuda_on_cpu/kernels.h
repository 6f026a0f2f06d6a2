// The kernels of tests/test_cuda_on_cpu.py: KERNEL(name) { … } has the tensors and numbers of the
// call in `a`. Emulated, it can be launched by its name from Python (launch_kernel); nvcc only
// compiles it.
#pragma once

#include "../../csrc/cuda/arch.h"

namespace dlkernels {

struct Arguments {
  void* tensors[6];
  int64_t numbers[6];
  template <typename T = float>
  DLK_HOST_DEVICE T* tensor(int i) const {
    return static_cast<T*>(tensors[i]);
  }
  DLK_HOST_DEVICE int number(int i) const { return int(numbers[i]); }
};

}  // namespace dlkernels

#ifdef DLKERNELS_EMULATED

#include <map>
#include <stdexcept>
#include <string>

namespace dlkernels {

inline std::map<std::string, void (*)(Arguments)>& kernels() {
  static std::map<std::string, void (*)(Arguments)> all;
  return all;
}
struct Registration {
  Registration(const char* name, void (*kernel)(Arguments)) { kernels()[name] = kernel; }
};

}  // namespace dlkernels

#define KERNEL(name)                                         \
  static void name(::dlkernels::Arguments a);                \
  static ::dlkernels::Registration name##_name(#name, name); \
  static void name([[maybe_unused]] ::dlkernels::Arguments a)
#else
#define KERNEL(name) DLK_KERNEL void name(::dlkernels::Arguments a)
#endif

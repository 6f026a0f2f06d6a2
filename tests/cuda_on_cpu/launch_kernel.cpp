// launch_kernel: the entry that Python calls.
#include <cstring>
#include <typeinfo>

#include "kernels.h"

using dlkernels::Arguments;
namespace emulated = dlkernels::emulated;

extern "C" {

struct TensorArgument {
  const char* name;
  void* data;
  int64_t item, dims;
  const int64_t *sizes, *strides;
  int64_t kind;
};

struct Shape {
  unsigned grid[3], block[3];
  size_t shared;
  unsigned cluster, cooperative, launches;
};

// "" or "type of the exception: its text".
__attribute__((visibility("default"))) const char* launch_kernel(
    const char* name, const Shape* shape, int64_t tensors, const TensorArgument* tensor,
    int64_t numbers, const int64_t* number) {
  static thread_local std::string result;
  result.clear();
  try {
    Arguments a{};
    emulated::EntryScope scope;
    for (int64_t i = 0; i < tensors; ++i) {
      const TensorArgument& t = tensor[i];
      a.tensors[i] = t.data;
      emulated::track(t.name, t.data, t.item, t.dims, t.sizes, t.strides, emulated::Kind(t.kind));
    }
    std::copy(number, number + numbers, a.numbers);
    void (*kernel)(Arguments) = dlkernels::kernels().at(name);
    const emulated::Launch launch{name,
                                  {shape->grid[0], shape->grid[1], shape->grid[2]},
                                  {shape->block[0], shape->block[1], shape->block[2]},
                                  shape->shared,
                                  shape->cluster,
                                  shape->cooperative != 0};
    for (unsigned i = 0; i < shape->launches; ++i) emulated::launch(launch, [=] { kernel(a); });
  } catch (const std::out_of_range& error) {
    result = std::string("IndexError: ") + error.what();
  } catch (const std::exception& error) {
    result = std::string("RuntimeError: ") + error.what();
  }
  return result.c_str();
}

}  // extern "C"

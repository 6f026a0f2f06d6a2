// What every kernel file stands on beside arch.h: launches, the device and the pointers of a host
// entry, formats, dtypes, activations, reductions, rows cut into vectors of 16 bytes.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../check.h"
#include "arch.h"

#ifndef DLKERNELS_EMULATED
// Of a CUDA build of torch; weak, so that the library also loads beside a CPU build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream)
    __attribute__((weak));
#endif

namespace dlkernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// ---------------------------------------------------------------------------------- device, stream

#ifdef DLKERNELS_EMULATED
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}

 private:
  emulated::EntryScope scope_;
};

inline int compute_capability() { return emulated::compute_capability(); }
template <typename... Params>
bool has_clusters(void (*)(Params...)) {
  return compute_capability() >= 90;
}
inline size_t shared_limit() { return emulated::shared_limit(); }
inline int multiprocessors() { return emulated::multiprocessors(); }
#else
inline void check_cuda(cudaError_t error, const std::string& what) {
  DLK_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// One at the top of each host entry: launches go to the tensor's device.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device, value;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// 80, 90, …
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Whether launches of a kernel may have clusters. A GPU that is newer than the library's machine
// code runs what the driver makes of compute_80, which knows none.
template <typename... Params>
bool has_clusters(void (*kernel)(Params...)) {
  if (compute_capability() < 90) return false;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

// The most dynamic shared memory of a block, in bytes.
inline size_t shared_limit() {
  return size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

inline cudaStream_t current_stream() {
  int device;
  void* stream = nullptr;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  DLK_CHECK(aoti_torch_get_current_cuda_stream, "this build of torch has no CUDA");
  DLK_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
            "no current stream of device ", device);
  return static_cast<cudaStream_t>(stream);
}
#endif

inline void check_on_gpu(const char* op, const char* argument, const Tensor& tensor,
                         const Tensor& first) {
#ifdef DLKERNELS_EMULATED
  check_cpu(op, argument, tensor);
#else
  DLK_CHECK(tensor.is_cuda(), op, ": expected ", argument, " on a GPU");
#endif
  DLK_CHECK(tensor.get_device_index() == first.get_device_index(), op, ": expected ", argument,
            " on device ", first.get_device_index(), ", got ", tensor.get_device_index());
}

// ----------------------------------------------------------------------------------------- formats

// As torch's C++ suggests the format of an image, of four or five dimensions: where sizes of 1
// leave it open, and of an empty one or of another number of dimensions, it is contiguous.
inline bool suggests_channels_last(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (last < 3 || last > 4 || x.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t d = i == 0 ? 1 : i == last ? 0 : last + 1 - i;  // 1, last, …, 2, 0
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 0 || stride < least || (d == 0 && least == x.stride(1))) return false;
    least = stride * size;
  }
  return true;
}

inline MemoryFormat suggested_format(const Tensor& x) {
  if (!suggests_channels_last(x)) return MemoryFormat::Contiguous;
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

inline Tensor empty(const Tensor& like, const Sizes& sizes, MemoryFormat format, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// ---------------------------------------------------------------------------------------- launches

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int power_of_two_from(int64_t n, int least, int most) {
  int result = least;
  while (result < most && result < n) result *= 2;
  return result;
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared = 0;     // bytes of dynamic shared memory of a block
  unsigned cluster = 1;  // blocks along x
  bool cooperative = false;
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const char* name, const LaunchShape& shape,
            const Args&... args) {
#ifdef DLKERNELS_EMULATED
  const emulated::Launch described{.name = name,
                                   .grid = shape.grid,
                                   .block = shape.block,
                                   .shared = shape.shared,
                                   .cluster = shape.cluster,
                                   .cooperative = shape.cooperative};
  // The parameters are constant memory, outside of what is watched.
  const std::tuple<Params...> params(args...);
  emulated::launch(described, [=] { std::apply(kernel, params); });
#else
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = current_stream();
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  cudaError_t error = cudaSuccess;
  // The same for every launch: another thread's smaller one would come between.
  if (shape.shared > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_limit()));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Params(args)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();
  check_cuda(error,
             concat(name, " of ", shape.grid.x, "×", shape.grid.y, "×", shape.grid.z, " blocks of ",
                    shape.block.x, "×", shape.block.y, "×", shape.block.z, " threads, clusters of ",
                    shape.cluster, ", ", shape.shared, " bytes of shared memory"));
#endif
}

// ---------------------------------------------------------------------------------------- pointers

// The four say what the kernels of this entry may do with a tensor's memory; the emulator holds
// them to it.
#ifdef DLKERNELS_EMULATED
inline void track(const char* name, const Tensor& tensor, emulated::Kind kind) {
  emulated::track(name, tensor.const_data_ptr(), int64_t(tensor.element_size()), tensor.dim(),
                  tensor.sizes().data(), tensor.strides().data(), kind);
}
#define DLK_TRACK(name, tensor, kind) track(name, tensor, emulated::Kind::kind)
#else
#define DLK_TRACK(name, tensor, kind) static_cast<void>(name)
#endif

template <typename T>
const T* input_pointer(const char* name, const Tensor& tensor) {
  DLK_TRACK(name, tensor, kInput);
  return static_cast<const T*>(tensor.const_data_ptr());
}

// To be written entirely.
template <typename T>
T* output_pointer(const char* name, const Tensor& tensor) {
  DLK_TRACK(name, tensor, kOutput);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
T* inout_pointer(const char* name, const Tensor& tensor) {
  DLK_TRACK(name, tensor, kInOut);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Of a workspace: to be read only where this entry has written.
template <typename T>
T* scratch_pointer(const char* name, const Tensor& tensor) {
  DLK_TRACK(name, tensor, kScratch);
  return static_cast<T*>(tensor.mutable_data_ptr());
}
#undef DLK_TRACK

// ------------------------------------------------------------------------------------------ dtypes

template <typename S>
constexpr bool is_half = sizeof(S) == 2;

// What numbers of a dtype are computed in.
template <typename S>
using accumulate_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename S>
DLK_DEVICE accumulate_t<S> widen(S x) {
  if constexpr (is_half<S>)
    return to_float(x);
  else
    return x;
}

template <typename S>
DLK_DEVICE S narrow(accumulate_t<S> x) {
  if constexpr (is_half<S>)
    return from_float<S>(x);
  else
    return x;
}

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// ------------------------------------------------------------------------------------- activations

// T = float, double.
template <typename T>
DLK_DEVICE T activate(T x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0 ? T(0) : x;  // a NaN stays one
    case Activation::kLeakyRelu:
      return x > 0 ? x : x * T(kSlope);
    case Activation::kTanh:
      if constexpr (std::is_same_v<T, float>)
        return tanh_accurate(x);
      else
        return tanh(x);
    case Activation::kSigmoid:
      return T(1) / (T(1) + std::exp(-x));
    default:
      return x;
  }
}

// The gradient of its argument, from that of its output y.
template <typename T>
DLK_DEVICE T before_activation(T gradient, T y, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return gradient;
    case Activation::kRelu:
      return y <= 0 ? T(0) : gradient;
    case Activation::kLeakyRelu:
      return y > 0 ? gradient : gradient * T(kSlope);
    case Activation::kTanh:
      return gradient * (T(1) - y * y);
    default:
      return gradient * (T(1) - y) * y;
  }
}

// ---------------------------------------------------------------------------------------- 16 bytes

template <typename S>
constexpr int kVector = 16 / sizeof(S);

template <typename S>
DLK_DEVICE void unpack(const Bits16& bits, accumulate_t<S> (&v)[kVector<S>]) {
  if constexpr (is_half<S>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack2<S>(bits.x[i], v[2 * i], v[2 * i + 1]);
  } else {
    memcpy(v, &bits, sizeof(bits));
  }
}

// The largest of a vector.
template <typename S>
DLK_DEVICE accumulate_t<S> max_of(const Bits16& bits) {
  accumulate_t<S> v[kVector<S>];
  if constexpr (is_half<S>) {
    const uint32_t pair = max2<S>(max2<S>(bits.x[0], bits.x[1]), max2<S>(bits.x[2], bits.x[3]));
    unpack2<S>(pair, v[0], v[1]);
    return std::fmax(v[0], v[1]);
  } else {
    unpack<S>(bits, v);
    accumulate_t<S> max = v[0];
#pragma unroll
    for (int i = 1; i < kVector<S>; ++i) max = std::fmax(max, v[i]);
    return max;
  }
}

template <typename S>
DLK_DEVICE Bits16 pack(const accumulate_t<S> (&v)[kVector<S>]) {
  Bits16 bits;
  if constexpr (is_half<S>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits.x[i] = pack2<S>(v[2 * i], v[2 * i + 1]);
  } else {
    memcpy(&bits, v, sizeof(bits));
  }
  return bits;
}

DLK_HOST_DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A vector from anywhere: read past L1 at once, or element by element.
template <typename S>
DLK_DEVICE Bits16 load_vector(const S* global, bool aligned) {
  if (aligned) return load_streaming(global);
  S elements[kVector<S>];
#pragma unroll
  for (int k = 0; k < kVector<S>; ++k) elements[k] = global[k];
  return bit_cast<Bits16>(elements);
}

// The least number, as the bits of a vector of it.
template <typename S>
DLK_DEVICE Bits16 lowest_vector() {
  if constexpr (is_half<S>) {
    const uint32_t two = std::is_same_v<S, bf16> ? 0xff80ff80 : 0xfc00fc00;
    return {{two, two, two, two}};
  } else {
    accumulate_t<S> v[kVector<S>];
    for (auto& x : v) x = -kInfinity<S>;
    return pack<S>(v);
  }
}

// n neighbouring elements as: head elements up to the first 16-byte border, whole vectors, tail.
// Head and tail together are the edges, fewer than two vectors.
template <typename S>
struct Span {
  int head, edges;
  int64_t vectors;

  DLK_DEVICE Span(const S* p, int64_t n) {
    const int before = int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
    head = before == 0 ? 0 : kVector<S> - before;
    if (head > n) head = int(n);
    vectors = (n - head) / kVector<S>;
    edges = head + int((n - head) % kVector<S>);
  }
  DLK_DEVICE int64_t edge(int i) const { return i < head ? i : i + vectors * kVector<S>; }
  DLK_DEVICE int64_t vector(int64_t j) const { return head + j * kVector<S>; }
};

// -------------------------------------------------------------------------------------- reductions

// Over groups of `lanes` neighbouring lanes, a power of two; every lane of the warp calls, and gets
// its group's result.
template <typename T>
DLK_DEVICE T group_sum(T value, int lanes = kWarp) {
  for (int d = lanes / 2; d > 0; d /= 2) value += shuffle_xor(kAllLanes, value, d);
  return value;
}

template <typename T>
DLK_DEVICE T group_max(T value, int lanes = kWarp) {
  for (int d = lanes / 2; d > 0; d /= 2) value = std::fmax(value, shuffle_xor(kAllLanes, value, d));
  return value;
}

// Two sums over the block, for thread 0 alone, in an order that only the block's size fixes; of
// `lanes` neighbouring lanes only the first has a part. `scratch`: two doubles a warp.
DLK_DEVICE void block_sum(double& a, double& b, double* scratch, int lanes = 1) {
  const int warps = int(blockDim.x) / kWarp;
  for (int d = kWarp / 2; d >= lanes; d /= 2) {
    a += shuffle_xor(kAllLanes, a, d);
    b += shuffle_xor(kAllLanes, b, d);
  }
  if (warps == 1) return;
  if (lane() == 0) {
    scratch[2 * warp_index()] = a;
    scratch[2 * warp_index() + 1] = b;
  }
  sync_block();
  if (warp_index() > 0) return;
  a = group_sum(lane() < warps ? scratch[2 * lane()] : 0.0);
  b = group_sum(lane() < warps ? scratch[2 * lane() + 1] : 0.0);
}

}  // namespace dlkernels

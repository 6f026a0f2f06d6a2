// The checks of every host entry, its switch over dtypes, the type of its `str` arguments, and the
// names of activations. A message names the op, the argument, what was wanted and what was got.
//
// DLK_CHECK raises RuntimeError, DLK_CHECK_INDEX IndexError (std::out_of_range crosses the stable
// ABI as that). Use them on the calling thread only: an exception that leaves a parallel region
// loses its text.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dlkernels {

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream stream;
  (stream << ... << args);
  return stream.str();
}

#define DLK_CHECK(condition, ...)                               \
  do {                                                          \
    if (!(condition)) [[unlikely]]                              \
      throw std::runtime_error(dlkernels::concat(__VA_ARGS__)); \
  } while (0)

#define DLK_CHECK_INDEX(condition, ...)                        \
  do {                                                         \
    if (!(condition)) [[unlikely]]                             \
      throw std::out_of_range(dlkernels::concat(__VA_ARGS__)); \
  } while (0)

template <typename Sizes>
std::string shape_string(const Sizes& sizes) {
  std::ostringstream stream;
  stream << '[';
  for (size_t i = 0; i < sizes.size(); ++i) stream << (i ? ", " : "") << sizes[i];
  stream << ']';
  return stream.str();
}

template <typename Sizes>
void check_shape(const char* op, const char* argument, const torch::stable::Tensor& tensor,
                 const Sizes& wanted) {
  const auto got = tensor.sizes();
  bool same = got.size() == wanted.size();
  for (size_t i = 0; same && i < got.size(); ++i) same = got[i] == wanted[i];
  DLK_CHECK(same, op, ": expected ", argument, " of shape ", shape_string(wanted), ", got ",
            shape_string(got));
}

inline void check_dtype(const char* op, const char* argument, const torch::stable::Tensor& tensor,
                        torch::headeronly::ScalarType wanted) {
  DLK_CHECK(tensor.scalar_type() == wanted, op, ": expected ", argument, " of dtype ",
            torch::headeronly::toString(wanted), ", got ",
            torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_floating(const char* op, const char* argument,
                           const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  DLK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            op, ": expected ", argument, " of dtype float32, float64, bfloat16 or float16, got ",
            torch::headeronly::toString(dtype));
}

// body(S{}) for the type S of the elements of a tensor that check_floating lets through. Bf16 and
// F16 are the types that the device's kernels have for those dtypes.
template <typename Bf16, typename F16, typename Body>
void for_dtype(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(Bf16{});
    default:
      return body(F16{});
  }
}

enum class Activation { kNone, kRelu, kLeakyRelu, kTanh, kSigmoid };
constexpr double kSlope = 0.01;  // of leaky_relu

// Whether the derivative follows from the sign of the output, which is that of the argument.
inline bool is_of_sign(Activation activation) {
  return activation == Activation::kRelu || activation == Activation::kLeakyRelu;
}

inline Activation parse_activation(const char* op, const std::string& name) {
  constexpr std::array<const char*, 5> kNames{"none", "relu", "leaky_relu", "tanh", "sigmoid"};
  const auto* found = std::find(kNames.begin(), kNames.end(), name);
  DLK_CHECK(found != kNames.end(), op,
            ": expected activation none, relu, leaky_relu, tanh or sigmoid, got ", name);
  return Activation(found - kNames.begin());
}

inline void check_cpu(const char* op, const char* argument, const torch::stable::Tensor& tensor) {
  DLK_CHECK(tensor.is_cpu(), op, ": expected ", argument, " on the CPU");
}

// An argument that is `str` in the schema. As a std::string it would leak: torch's conversion, up
// to 2.13, gives a copy of one that nobody frees.
struct Text : std::string {
  using std::string::string;
};

inline void check_contiguous(const char* op, const char* argument,
                             const torch::stable::Tensor& tensor) {
  DLK_CHECK(tensor.is_contiguous(), op, ": expected a contiguous ", argument, ", got strides ",
            shape_string(tensor.strides()));
}

}  // namespace dlkernels

template <>
struct torch::stable::detail::ToImpl<dlkernels::Text> {
  static dlkernels::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const dlkernels::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

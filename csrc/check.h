// The checks of every host entry. A message names the op, the argument, what was wanted and what
// was got.
//
// DLK_CHECK raises RuntimeError, DLK_CHECK_INDEX IndexError (std::out_of_range crosses the stable
// ABI as that). Use them on the calling thread only: an exception that leaves a parallel region
// loses its text.
#pragma once

#include <torch/csrc/stable/tensor.h>

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

inline void check_cpu(const char* op, const char* argument, const torch::stable::Tensor& tensor) {
  DLK_CHECK(tensor.is_cpu(), op, ": expected ", argument, " on the CPU");
}

inline void check_contiguous(const char* op, const char* argument,
                             const torch::stable::Tensor& tensor) {
  DLK_CHECK(tensor.is_contiguous(), op, ": expected a contiguous ", argument, ", got strides ",
            shape_string(tensor.strides()));
}

}  // namespace dlkernels

// What the host entries of cross_entropy share on every device: options, layouts, checks, and the
// raw ops themselves on top of a device's forward and backward.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"

namespace dlkernels::cross_entropy {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr const char* kOp = "cross_entropy";

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum class Kind { kIndex, kSmooth, kProbability };

struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing, softcap, z_loss;
};

inline void check_options(const char* op, const Options& options) {
  DLK_CHECK(options.reduction >= kNone && options.reduction <= kSum, op,
            ": expected reduction 0, 1 or 2, got ", options.reduction);
  DLK_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, op,
            ": expected label_smoothing between 0 and 1, got ", options.label_smoothing);
  DLK_CHECK(options.softcap >= 0, op, ": expected softcap of at least 0, got ", options.softcap);
}

// A tensor of logits as outer × classes × inner, each with its stride; row = outer index · inner +
// inner index.
struct Layout {
  int64_t outer = 1, classes = 1, inner = 1;
  int64_t outer_stride = 0, class_stride = 1, inner_stride = 0;

  bool is_rows() const { return class_stride == 1 || classes == 1; }
  bool is_columns() const { return inner_stride == 1 && inner > 1; }
};

inline std::optional<Layout> layout_of(const Tensor& x) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  Layout l;
  if (size.size() == 1) {
    l.classes = size[0];
    l.class_stride = stride[0];
    return l;
  }
  l.outer = size[0];
  l.outer_stride = stride[0];
  l.classes = size[1];
  l.class_stride = stride[1];
  // The dimensions after the classes as one: each stride is the next one's times its size.
  for (size_t d = size.size(); d-- > 2;) {
    if (size[d] == 1) continue;
    if (l.inner == 1)
      l.inner_stride = stride[d];
    else if (stride[d] != l.inner_stride * l.inner)
      return std::nullopt;
    l.inner *= size[d];
  }
  if (l.inner == 1 && !l.is_rows()) {  // a transposed matrix: its rows are neighbours
    std::swap(l.outer, l.inner);
    std::swap(l.outer_stride, l.inner_stride);
  }
  return l;
}

// Whether one walk takes tensors of both layouts.
inline bool same_kind(const std::optional<Layout>& a, const std::optional<Layout>& b) {
  return a && b && a->inner == b->inner &&
         ((a->is_rows() && b->is_rows()) || (a->is_columns() && b->is_columns()));
}

inline std::vector<int64_t> row_shape(const Tensor& input) {
  const auto size = input.sizes();
  std::vector<int64_t> shape(size.begin(), size.end());
  shape.erase(shape.begin() + (shape.size() > 1 ? 1 : 0));
  return shape;
}

struct Target {
  Tensor tensor;
  bool is_probability;
};

// Fails unless every argument is what the loops take; check_device(argument, tensor) fails where a
// tensor is elsewhere. Index targets come back as contiguous int64.
template <typename CheckDevice>
Target check_arguments(const Tensor& input, const Tensor& target, const Optional& weight,
                       const Options& options, const CheckDevice& check_device) {
  check_device("input", input);
  check_device("target", target);
  check_floating(kOp, "input", input);
  const ScalarType dtype = input.scalar_type();
  DLK_CHECK(input.dim() >= 1, kOp, ": expected input with at least 1 dimension, got a scalar");
  const int64_t classes = input.size(input.dim() > 1 ? 1 : 0);
  DLK_CHECK(classes >= 1, kOp, ": expected at least one class, got input of shape ",
            shape_string(input.sizes()));
  check_options(kOp, options);
  if (weight) {
    check_device("weight", *weight);
    check_dtype(kOp, "weight", *weight, dtype);
    check_shape(kOp, "weight", *weight, std::vector<int64_t>{classes});
  }
  if (target.scalar_type() == dtype) {
    check_shape(kOp, "target", target, input.sizes());
    return {target, true};
  }
  DLK_CHECK(target.scalar_type() == ScalarType::Long || target.scalar_type() == ScalarType::Byte,
            kOp, ": expected target of dtype int64 or uint8, or of the input's dtype, got ",
            torch::headeronly::toString(target.scalar_type()));
  check_shape(kOp, "target", target, row_shape(input));
  return {torch::stable::contiguous(torch::stable::to(target, ScalarType::Long)), false};
}

// The tensors of a call, and how they lie. The gradient is laid out like the input. Where no walk
// takes the input as it lies, or input, target and gradient differ in walk, contiguous copies stand
// in for them. Not for an empty input: it may have no layout.
struct LaidOut {
  Tensor input;
  Target target;
  Optional gradient, written;  // what is handed out, what the loops write
  Layout layout, target_layout, gradient_layout;

  LaidOut(const Tensor& input_, const Target& target_, bool with_gradient)
      : input(input_), target(target_) {
    if (with_gradient) gradient = written = torch::stable::empty_like(input);
    auto x = layout_of(input);
    auto t = target.is_probability ? layout_of(target.tensor) : x;
    auto g = with_gradient ? layout_of(*gradient) : x;
    if (!same_kind(x, t) || !same_kind(x, g)) {
      input = torch::stable::contiguous(input);
      if (target.is_probability) target.tensor = torch::stable::contiguous(target.tensor);
      if (with_gradient && !gradient->is_contiguous()) written = torch::stable::empty_like(input);
      x = t = g = layout_of(input);
    }
    layout = *x;
    target_layout = *t;
    gradient_layout = *g;
  }

  Tensor finished_gradient() {
    if (written->get() != gradient->get()) torch::stable::copy_(*gradient, *written);
    return *gradient;
  }
};

// Of cross_entropy_backward's own arguments.
template <typename CheckDevice>
void check_backward(const Tensor& grad_loss, const Optional& grad_lse, const Tensor& input,
                    const Tensor& lse, const Tensor& total_weight, const Options& options,
                    const CheckDevice& check_device) {
  const std::vector<int64_t> shape = row_shape(input), scalar;
  const auto check = [&](const char* argument, const Tensor& tensor, ScalarType dtype,
                         const std::vector<int64_t>& size) {
    check_device(argument, tensor);
    check_dtype(kOp, argument, tensor, dtype);
    check_shape(kOp, argument, tensor, size);
    check_contiguous(kOp, argument, tensor);
  };
  check("grad_loss", grad_loss, input.scalar_type(), options.reduction == kNone ? shape : scalar);
  check("lse", lse, ScalarType::Double, shape);
  check("total_weight", total_weight, ScalarType::Double, scalar);
  if (grad_lse) check("grad_lse", *grad_lse, ScalarType::Double, shape);
}

// Of cross_entropy_scale_: a gradient without gaps, and one factor of its dtype.
template <typename CheckDevice>
void check_scale(const Tensor& gradient, const Tensor& grad_loss, const CheckDevice& check_device) {
  check_device("gradient", gradient);
  check_floating(kOp, "gradient", gradient);
  check_device("grad_loss", grad_loss);
  check_dtype(kOp, "grad_loss", grad_loss, gradient.scalar_type());
  check_shape(kOp, "grad_loss", grad_loss, std::vector<int64_t>{});
  const auto size = gradient.sizes(), stride = gradient.strides();
  if (gradient.numel() == 0) return;
  int64_t extent = 1;
  for (size_t d = 0; d < size.size(); ++d) extent += (size[d] - 1) * stride[d];
  DLK_CHECK(extent == gradient.numel(), kOp, ": expected a dense gradient, got strides ",
            shape_string(stride));
}

// ---------------------------------------------------------------------------------------- raw ops

struct Outputs {
  Tensor loss, lse, total_weight;
  Optional gradient;
};

// What forward returns, to be written, but for the gradient, which is laid out with the problem. Of
// no rows it is final: layouts and blocks are of one row at least.
inline Outputs new_outputs(const Tensor& input, const Options& options, bool with_gradient) {
  const std::vector<int64_t> shape = row_shape(input), scalar;
  Outputs made{torch::stable::new_empty(input, options.reduction == kNone ? shape : scalar),
               torch::stable::new_empty(input, shape, ScalarType::Double),
               torch::stable::new_empty(input, scalar, ScalarType::Double), std::nullopt};
  if (input.numel() > 0) return made;
  const double mean = std::numeric_limits<double>::quiet_NaN();
  torch::stable::fill_(made.loss, options.reduction == kMean ? mean : 0.0);
  torch::stable::zero_(made.total_weight);
  if (with_gradient) made.gradient = torch::stable::empty_like(input);
  return made;
}

// A device boxes these for its
//   Outputs forward(input, target, weight, options, with_gradient)
//   Tensor backward(grad_loss, grad_lse, input, target, weight, lse, total_weight, options)
template <auto forward>
std::tuple<Tensor, Tensor, Tensor> raw_forward(Tensor input, Tensor target, Optional weight,
                                               int64_t reduction, int64_t ignore_index,
                                               double label_smoothing, double softcap,
                                               double z_loss) {
  const Options options{reduction, ignore_index, label_smoothing, softcap, z_loss};
  const Outputs made = forward(input, target, weight, options, false);
  return {made.loss, made.lse, made.total_weight};
}

// A gradient made in the forward pass has one upstream gradient.
template <auto forward>
std::tuple<Tensor, Tensor, Tensor, Tensor> raw_forward_backward(Tensor input, Tensor target,
                                                                Optional weight, int64_t reduction,
                                                                int64_t ignore_index,
                                                                double label_smoothing,
                                                                double softcap, double z_loss) {
  DLK_CHECK(reduction != kNone, kOp,
            ": a gradient made in the forward pass needs reduction mean or sum, got none");
  const Options options{reduction, ignore_index, label_smoothing, softcap, z_loss};
  const Outputs made = forward(input, target, weight, options, true);
  return {made.loss, made.lse, made.total_weight, *made.gradient};
}

template <auto backward>
Tensor raw_backward(Tensor grad_loss, Optional grad_lse, Tensor input, Tensor target,
                    Optional weight, Tensor lse, Tensor total_weight, int64_t reduction,
                    int64_t ignore_index, double label_smoothing, double softcap, double z_loss) {
  const Options options{reduction, ignore_index, label_smoothing, softcap, z_loss};
  return backward(grad_loss, grad_lse, input, target, weight, lse, total_weight, options);
}

}  // namespace dlkernels::cross_entropy

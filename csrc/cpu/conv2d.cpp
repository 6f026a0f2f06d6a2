// Convolution of images, its transpose, and the gradients of both: checks, layouts, and the choice
// between the algorithms of conv2d.h and torch's.
//
// The transpose is the input gradient of the convolution whose output has the transpose's input's
// size, and the other way about: three kernels serve six products. They work in NHWC, Winograd's
// also in NCHW; what comes or is to go in another layout is transposed on the way.
#include "conv2d.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "conv2d_few_channels.h"
#include "layout.h"
#include "memory.h"
#include "sums.h"

namespace dlkernels {
namespace {

using conv2d::Algorithm;
using conv2d::Direction;
using conv2d::Shape;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using few_channels::images;
using layout::empty;
using layout::empty_gradient;
using layout::format_of;
using layout::Sizes;
using layout::sizes_of;

constexpr const char* kConvolution = "conv2d";
constexpr const char* kTranspose = "conv_transpose2d";

// --------------------------------------------------------------------------------------- arguments

// What both ops are set to; the products of these with sizes fit into 64 bits.
struct Settings {
  const char* op;
  Ints stride, padding, dilation, output_padding;
  int64_t groups;
  bool transposed, exact, own;
};

void check_pair(const char* op, const char* argument, const Ints& pair, int64_t least) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  DLK_CHECK(pair.size() == 2, op, ": expected ", argument, " of 2 numbers, got ",
            shape_string(pair));
  for (const int64_t value : pair)
    DLK_CHECK(value >= least && value <= kMost, op, ": expected ", argument, " of at least ", least,
              ", got ", shape_string(pair));
}

void check_settings(const Settings& set) {
  check_pair(set.op, "stride", set.stride, 1);
  check_pair(set.op, "padding", set.padding, 0);
  check_pair(set.op, "dilation", set.dilation, 1);
  check_pair(set.op, "output_padding", set.output_padding, 0);
  DLK_CHECK(set.groups >= 1, set.op, ": expected at least 1 group, got ", set.groups);
}

void check_image(const char* op, const char* argument, const Tensor& x) {
  check_cpu(op, argument, x);
  DLK_CHECK(x.dim() == 4, op, ": expected ", argument, " with 4 dimensions, got shape ",
            shape_string(x.sizes()));
  for (int64_t d = 1; d < 4; ++d)
    DLK_CHECK(x.size(d) >= 1, op, ": expected ", argument,
              " that is empty in the batch alone, got ", shape_string(x.sizes()));
}

// How often a kernel of `kernel` elements fits into `size` padded ones.
int64_t outputs(const Settings& set, int d, int64_t size, int64_t kernel) {
  const int64_t room = size + 2 * set.padding[d] - set.dilation[d] * (kernel - 1) - 1;
  return room < 0 ? 0 : room / set.stride[d] + 1;
}

// Checks input, weight and bias. The Shape is that of the convolution: of the op itself, or of the
// one that it is the transpose of.
Shape check_arguments(const Settings& set, const Tensor& input, const Tensor& weight,
                      const Optional& bias) {
  check_settings(set);
  check_image(set.op, "input", input);
  check_image(set.op, "weight", weight);
  check_floating(set.op, "input", input);
  check_dtype(set.op, "weight", weight, input.scalar_type());
  const int64_t first = weight.size(0), second = weight.size(1) * set.groups;
  DLK_CHECK(first >= 1 && first % set.groups == 0, set.op, ": expected weight for ", set.groups,
            " groups, got shape ", shape_string(weight.sizes()));
  const int64_t channels = set.transposed ? first : second;
  DLK_CHECK(input.size(1) == channels, set.op, ": expected input with ", channels,
            " channels for weight of shape ", shape_string(weight.sizes()), " and ", set.groups,
            " groups, got shape ", shape_string(input.sizes()));
  Shape shape{};
  shape.n = input.size(0), shape.c = second, shape.k = first;
  shape.r = weight.size(2), shape.s = weight.size(3);
  shape.groups = set.groups;
  int64_t small[2], large[2];  // of the convolution: output, input
  for (int d = 0; d < 2; ++d) {
    const int64_t size = input.size(2 + d), kernel = weight.size(2 + d);
    shape.stride[d] = set.stride[d];
    shape.padding[d] = set.padding[d];
    shape.dilation[d] = set.dilation[d];
    large[d] = size;
    small[d] = set.transposed ? size : outputs(set, d, size, kernel);
    if (set.transposed)
      large[d] = (size - 1) * set.stride[d] - 2 * set.padding[d] + set.dilation[d] * (kernel - 1) +
                 set.output_padding[d] + 1;
    DLK_CHECK(small[d] >= 1 && large[d] >= 1, set.op, ": expected a larger input than ",
              shape_string(input.sizes()), " for weight of shape ", shape_string(weight.sizes()),
              ", padding ", shape_string(set.padding), " and dilation ",
              shape_string(set.dilation));
  }
  shape.h = large[0], shape.w = large[1], shape.p = small[0], shape.q = small[1];
  if (bias) {
    check_cpu(set.op, "bias", *bias);
    check_dtype(set.op, "bias", *bias, input.scalar_type());
    check_shape(set.op, "bias", *bias, Ints{set.transposed ? second : first});
  }
  return shape;
}

Sizes input_sizes(const Shape& shape) { return {shape.n, shape.c, shape.h, shape.w}; }
Sizes output_sizes(const Shape& shape) { return {shape.n, shape.k, shape.p, shape.q}; }

// ----------------------------------------------------------------------------------------- layouts

// Whether what is no NHWC goes as it is into a kernel that takes planes, or comes from it.
bool as_planes(const Tensor& x, bool planes) {
  return planes && !layout::is_nhwc(x) && layout::is_nchw(x);
}

// x in NHWC, or in NCHW where the kernel takes planes: itself, or a copy, which `keep` holds.
template <typename S>
conv2d::Images<const S> images_of(const Tensor& x, bool planes, Tensor& keep) {
  const bool itself = layout::is_nhwc(x) || as_planes(x, planes);
  keep = itself ? x : layout::copied<S>(x, MemoryFormat::ChannelsLast);
  return {static_cast<const S*>(keep.const_data_ptr()), as_planes(keep, planes)};
}

// An image in `format` that a kernel writes in NHWC, if it does not write planes: into it, or
// beside it first.
template <typename S>
class Result {
 public:
  Result(const Tensor& like, const Sizes& sizes, MemoryFormat format, bool planes)
      : tensor_(empty(like, sizes, format)),
        written_(tensor_),
        planes_(as_planes(tensor_, planes)),
        beside_(!planes_ && !layout::is_nhwc(tensor_)) {
    if (beside_) written_ = empty(like, sizes, MemoryFormat::ChannelsLast);
  }
  conv2d::Images<S> images() const {
    return {static_cast<S*>(written_.mutable_data_ptr()), planes_};
  }
  Tensor finish() const {
    if (beside_)
      layout::transpose(static_cast<const S*>(written_.const_data_ptr()),
                        static_cast<S*>(tensor_.mutable_data_ptr()), tensor_.size(0),
                        tensor_.size(2) * tensor_.size(3), tensor_.size(1));
    return tensor_;
  }

 private:
  Tensor tensor_, written_;
  bool planes_, beside_;
};

template <typename S, typename Pointer>
conv2d::Weight<S> weight_of(const Tensor& weight, Pointer data) {
  return {static_cast<S*>(data),
          {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
}
template <typename S>
conv2d::Weight<const S> weight_of(const Tensor& weight) {
  return weight_of<const S>(weight, weight.const_data_ptr());
}

// Of a convolution of stride 1.
few_channels::Shape few_channels_shape(const Shape& shape) {
  return {shape.n, shape.c, shape.h,          shape.w,         shape.k,
          shape.r, shape.s, shape.padding[0], shape.padding[1]};
}

// ------------------------------------------------------------------------------------------ choice

// An output that ends before the input does (output_padding beyond the stride) is torch's, `own` or
// not: where that is to be an error the public function has raised it.
Algorithm choose(const Settings& set, const Shape& shape, ScalarType dtype, Direction direction,
                 MemoryFormat output) {
  const bool whole =
      shape.p == outputs(set, 0, shape.h, shape.r) && shape.q == outputs(set, 1, shape.w, shape.s);
  if (!whole) return Algorithm::kAten;
  const bool last = output == MemoryFormat::ChannelsLast;
  return conv2d::choose(shape, dtype, direction, {last, set.exact, set.own});
}

const char* name_of(Algorithm algorithm) {
  constexpr std::array<const char*, 6> kNames{"aten",      "direct",       "winograd",
                                              "depthwise", "few_channels", "small"};
  return kNames[size_t(algorithm)];
}

// ------------------------------------------------------------------------------------- torch's own

Tensor aten_convolution(const Settings& set, const Tensor& input, const Tensor& weight,
                        const Optional& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{
      from(input),       from(weight),       from(bias),           from(set.stride),
      from(set.padding), from(set.dilation), from(set.transposed), from(set.output_padding),
      from(set.groups)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The gradients of input and weight that are wanted; the others are undefined.
std::array<Tensor, 2> aten_gradients(const Settings& set, const Tensor& grad, const Tensor& input,
                                     const Tensor& weight, bool of_input, bool of_weight) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::array<bool, 3> mask{of_input, of_weight, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(input),
                                     from(weight),
                                     from(std::nullopt),
                                     from(set.stride),
                                     from(set.padding),
                                     from(set.dilation),
                                     from(set.transposed),
                                     from(set.output_padding),
                                     from(set.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[2]);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// ------------------------------------------------------------------------------------ host entries

// Bias, if there is one, and activation of a vector of channels.
template <typename S>
struct Epilogue {
  using V = Vec<accumulate_t<S>>;
  const S* bias;
  Activation activation;

  V operator()(V value, int64_t channel, int64_t lanes) const {
    if (bias) value = value + load(bias + channel, lanes);
    return activate(activation, value);
  }
};

// `prepared` is conv2d_prepare's of the same weight.
Tensor forward(const Settings& set, const Tensor& input, const Tensor& weight, const Optional& bias,
               Activation act, const float* prepared = nullptr) {
  const Shape shape = check_arguments(set, input, weight, bias);
  const MemoryFormat format = layout::output_format(input, weight);
  const Sizes sizes = set.transposed ? input_sizes(shape) : output_sizes(shape);
  if (shape.n == 0) return empty(input, sizes, format);
  const ScalarType dtype = input.scalar_type();
  const Direction direction = set.transposed ? Direction::kInputGradient : Direction::kForward;
  const Algorithm algorithm = choose(set, shape, dtype, direction, format);
  Tensor output;
  for_dtype<bf16, f16>(dtype, [&](auto tag) {
    using S = decltype(tag);
    if (algorithm == Algorithm::kAten) {
      output = torch::stable::contiguous(aten_convolution(set, input, weight, bias), format);
      if (act != Activation::kNone)
        activate_in_place(act, static_cast<S*>(output.mutable_data_ptr()), output.numel());
      return;
    }
    Tensor keep, flat_bias;
    const S* b = nullptr;
    if (bias) {
      flat_bias = torch::stable::contiguous(*bias);
      b = static_cast<const S*>(flat_bias.const_data_ptr());
    }
    if (algorithm == Algorithm::kFewChannels) {
      output = empty(input, sizes, format);
      const auto few = few_channels_shape(shape);
      const auto w = images<const S>(weight);
      if (set.transposed)
        few_channels::input_gradient<S>(few, images<const S>(input), w, b, images<S>(output));
      else
        few_channels::forward<S>(few, images<const S>(input), w, b, act, images<S>(output));
      return;
    }
    const bool planes = conv2d::takes_planes(algorithm);
    const auto x = images_of<S>(input, planes, keep);
    const Epilogue<S> epilogue{b, act};
    const Result<S> result(input, sizes, format, planes);
    const auto w = weight_of<S>(weight);
    if (set.transposed)
      conv2d::input_gradient<S>(shape, algorithm, x, w, result.images(), epilogue);
    else
      conv2d::forward<S>(shape, algorithm, x, w, result.images(), epilogue, prepared);
    output = result.finish();
  });
  return output;
}

struct Wanted {
  bool input, weight, bias;
};

std::tuple<Tensor, Tensor, Tensor> backward(const Settings& set, const Tensor& grad_output,
                                            const Tensor& input, const Tensor& weight,
                                            const Optional& output, Activation act, Wanted want) {
  const Shape shape = check_arguments(set, input, weight, std::nullopt);
  const ScalarType dtype = input.scalar_type();
  const Sizes sizes = set.transposed ? input_sizes(shape) : output_sizes(shape);
  check_cpu(set.op, "grad_output", grad_output);
  check_dtype(set.op, "grad_output", grad_output, dtype);
  check_shape(set.op, "grad_output", grad_output, sizes);
  DLK_CHECK((act != Activation::kNone) == output.has_value(), set.op,
            ": expected the output where there is an activation, and only there");
  if (output) {
    check_cpu(set.op, "output", *output);
    check_dtype(set.op, "output", *output, dtype);
    check_shape(set.op, "output", *output, sizes);
  }
  const Ints none{0};
  Tensor grad_input = torch::stable::new_empty(input, none),
         grad_weight = torch::stable::new_empty(input, none),
         grad_bias = torch::stable::new_empty(input, want.bias ? Ints{sizes[1]} : none);
  if (shape.n == 0) {
    if (want.input) grad_input = empty_gradient(input);
    if (want.weight) {
      grad_weight = empty_gradient(weight);
      torch::stable::zero_(grad_weight);
    }
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias};
  }

  const MemoryFormat format = layout::output_format(input, weight);
  const Direction to_input = set.transposed ? Direction::kForward : Direction::kInputGradient;
  const Algorithm for_input = choose(set, shape, dtype, to_input, format);
  const Algorithm for_weight = choose(set, shape, dtype, Direction::kWeightGradient, format);
  const Tensor grad =
      output ? before_activation(act, grad_output, *output, format_of(*output)) : grad_output;
  const bool aten_input = want.input && for_input == Algorithm::kAten;
  const bool aten_weight = want.weight && for_weight == Algorithm::kAten;
  if (aten_input || aten_weight) {
    const auto [x, w] = aten_gradients(set, grad, input, weight, aten_input, aten_weight);
    if (aten_input) grad_input = torch::stable::contiguous(x, format_of(input));
    if (aten_weight) grad_weight = torch::stable::contiguous(w, format_of(weight));
  }
  const bool few_input = want.input && for_input == Algorithm::kFewChannels;
  const bool few_weight = want.weight && for_weight == Algorithm::kFewChannels;
  const bool own_input = want.input && !aten_input && !few_input;
  const bool own_weight = want.weight && !aten_weight && !few_weight;
  for_dtype<bf16, f16>(dtype, [&](auto tag) {
    using S = decltype(tag);
    const auto few = few_channels_shape(shape);
    if (few_input) {
      grad_input = empty_gradient(input);
      const auto from = images<const S>(grad), w = images<const S>(weight);
      if (set.transposed)
        few_channels::forward<S>(few, from, w, nullptr, Activation::kNone, images<S>(grad_input));
      else
        few_channels::input_gradient<S>(few, from, w, nullptr, images<S>(grad_input));
    }
    if (few_weight) {
      grad_weight = empty_gradient(weight);
      const auto x = images<const S>(set.transposed ? grad : input);
      const auto dy = images<const S>(set.transposed ? input : grad);
      few_channels::weight_gradient<S>(few, x, dy, images<S>(grad_weight));
    }
    Tensor keep_grad, keep_input;
    const bool planes = (!own_input || conv2d::takes_planes(for_input)) &&
                        (!own_weight || conv2d::takes_planes(for_weight));
    conv2d::Images<const S> d{};
    if (own_input || own_weight || want.bias) d = images_of<S>(grad, planes, keep_grad);
    if (own_input) {
      const Epilogue<S> identity{nullptr, Activation::kNone};
      const Result<S> result(input, sizes_of(input), format_of(input),
                             conv2d::takes_planes(for_input));
      const auto w = weight_of<S>(weight);
      if (set.transposed)
        conv2d::forward<S>(shape, for_input, d, w, result.images(), identity);
      else
        conv2d::input_gradient<S>(shape, for_input, d, w, result.images(), identity);
      grad_input = result.finish();
    }
    if (own_weight) {
      const auto x = images_of<S>(input, conv2d::takes_planes(for_weight), keep_input);
      grad_weight = empty_gradient(weight);
      const auto dw = weight_of<S>(grad_weight, grad_weight.mutable_data_ptr());
      conv2d::weight_gradient<S>(shape, for_weight, set.transposed ? x : d, set.transposed ? d : x,
                                 dw);
    }
    if (want.bias) {
      S* const to = static_cast<S*>(grad_bias.mutable_data_ptr());
      const int64_t channels = sizes[1], pixels = sizes[2] * sizes[3];
      if (d.planes)
        sums::planes(d.data, shape.n, channels, pixels, to);
      else
        sums::rows(gemm::Matrix<S>{d.data, channels, 1}, shape.n * pixels, channels, to);
    }
  });
  return {grad_input, grad_weight, grad_bias};
}

Tensor conv2d_forward(Tensor input, Tensor weight, Optional bias, Ints stride, Ints padding,
                      Ints dilation, int64_t groups, Text activation, bool exact, bool own) {
  const Settings set{kConvolution, stride, padding, dilation, {0, 0}, groups, false, exact, own};
  return forward(set, input, weight, bias, parse_activation(kConvolution, activation));
}

// A weight and the settings of a convolution, without an image.
Shape shape_of_weight(const Settings& set, const Tensor& weight) {
  check_settings(set);
  check_image(set.op, "weight", weight);
  check_floating(set.op, "weight", weight);
  Shape shape{};
  shape.c = weight.size(1) * set.groups, shape.k = weight.size(0);
  shape.r = weight.size(2), shape.s = weight.size(3), shape.groups = set.groups;
  for (int d = 0; d < 2; ++d)
    shape.stride[d] = set.stride[d], shape.padding[d] = 0, shape.dilation[d] = set.dilation[d];
  return shape;
}

Tensor conv2d_prepare(Tensor weight, Ints stride, Ints dilation, int64_t groups) {
  const Settings set{kConvolution, stride, {0, 0}, dilation, {0, 0}, groups, false, false, true};
  const Shape shape = shape_of_weight(set, weight);
  const bool any = conv2d::may_be_winograd(shape, weight.scalar_type());
  const Tensor made = torch::stable::new_empty(weight, Ints{any ? conv2d::prepared_size(shape) : 0},
                                               ScalarType::Float);
  for_dtype<bf16, f16>(weight.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    if (any)
      conv2d::prepare<S>(shape, weight_of<S>(weight), static_cast<float*>(made.mutable_data_ptr()));
  });
  return made;
}

Tensor conv2d_prepared(Tensor input, Tensor weight, Tensor prepared, Optional bias, Ints stride,
                       Ints padding, Ints dilation, int64_t groups, Text activation, bool exact,
                       bool own) {
  const Settings set{kConvolution, stride, padding, dilation, {0, 0}, groups, false, exact, own};
  const Shape shape = shape_of_weight(set, weight);
  const bool any = conv2d::may_be_winograd(shape, weight.scalar_type());
  check_cpu(kConvolution, "prepared", prepared);
  check_dtype(kConvolution, "prepared", prepared, ScalarType::Float);
  check_shape(kConvolution, "prepared", prepared, Ints{any ? conv2d::prepared_size(shape) : 0});
  check_contiguous(kConvolution, "prepared", prepared);
  return forward(set, input, weight, bias, parse_activation(kConvolution, activation),
                 any ? static_cast<const float*>(prepared.const_data_ptr()) : nullptr);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(Tensor grad_output, Tensor input, Tensor weight,
                                                   Optional output, Ints stride, Ints padding,
                                                   Ints dilation, int64_t groups, Text activation,
                                                   bool exact, bool own, bool want_input,
                                                   bool want_weight, bool want_bias) {
  const Settings set{kConvolution, stride, padding, dilation, {0, 0}, groups, false, exact, own};
  return backward(set, grad_output, input, weight, output,
                  parse_activation(kConvolution, activation), {want_input, want_weight, want_bias});
}

Tensor conv_transpose2d_forward(Tensor input, Tensor weight, Optional bias, Ints stride,
                                Ints padding, Ints output_padding, int64_t groups, Ints dilation,
                                bool exact, bool own) {
  const Settings set{kTranspose, stride, padding, dilation, output_padding,
                     groups,     true,   exact,   own};
  return forward(set, input, weight, bias, Activation::kNone);
}

std::tuple<Tensor, Tensor, Tensor> conv_transpose2d_backward(Tensor grad_output, Tensor input,
                                                             Tensor weight, Ints stride,
                                                             Ints padding, Ints output_padding,
                                                             int64_t groups, Ints dilation,
                                                             bool exact, bool own, bool want_input,
                                                             bool want_weight, bool want_bias) {
  const Settings set{kTranspose, stride, padding, dilation, output_padding,
                     groups,     true,   exact,   own};
  return backward(set, grad_output, input, weight, std::nullopt, Activation::kNone,
                  {want_input, want_weight, want_bias});
}

std::string conv2d_algorithm(Tensor input, Tensor weight, Optional bias, Ints stride, Ints padding,
                             Ints dilation, int64_t groups, Text activation, bool exact, bool own) {
  const Settings set{kConvolution, stride, padding, dilation, {0, 0}, groups, false, exact, own};
  const Shape shape = check_arguments(set, input, weight, bias);
  parse_activation(kConvolution, activation);
  const MemoryFormat format = layout::output_format(input, weight);
  std::string names;
  for (const Direction direction :
       {Direction::kForward, Direction::kInputGradient, Direction::kWeightGradient})
    names += (names.empty() ? "" : ", ") +
             std::string(name_of(choose(set, shape, input.scalar_type(), direction, format)));
  return names;
}

}  // namespace

Tensor conv2d::convolution(const Tensor& input, const Tensor& weight, const Optional& bias,
                           const Ints& stride, const Ints& padding, const Ints& dilation,
                           int64_t groups, bool exact, bool own) {
  const Settings set{kConvolution, stride, padding, dilation, {0, 0}, groups, false, exact, own};
  return forward(set, input, weight, bias, Activation::kNone);
}

std::array<Tensor, 2> conv2d::convolution_gradients(const Tensor& grad_output, const Tensor& input,
                                                    const Tensor& weight, const Ints& stride,
                                                    const Ints& padding, const Ints& dilation,
                                                    int64_t groups, bool exact, bool own,
                                                    bool want_input, bool want_weight) {
  const Settings set{kConvolution, stride, padding, dilation, {0, 0}, groups, false, exact, own};
  const auto [of_input, of_weight, none] =
      backward(set, grad_output, input, weight, std::nullopt, Activation::kNone,
               {want_input, want_weight, false});
  return {of_input, of_weight};
}

}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&dlkernels::conv2d_forward));
  m.impl("conv2d_forward", TORCH_BOX(&dlkernels::conv2d_forward));
  m.impl("conv2d_prepare", TORCH_BOX(&dlkernels::conv2d_prepare));
  m.impl("conv2d_prepared", TORCH_BOX(&dlkernels::conv2d_prepared));
  m.impl("conv2d_backward", TORCH_BOX(&dlkernels::conv2d_backward));
  m.impl("conv_transpose2d", TORCH_BOX(&dlkernels::conv_transpose2d_forward));
  m.impl("conv_transpose2d_forward", TORCH_BOX(&dlkernels::conv_transpose2d_forward));
  m.impl("conv_transpose2d_backward", TORCH_BOX(&dlkernels::conv_transpose2d_backward));
  m.impl("conv2d_algorithm", TORCH_BOX(&dlkernels::conv2d_algorithm));
}

// conv2d of stride 1 + bias + activation + 2×2 max-pool, and the gradients: checks and
// registration; the loops are conv2d_few_channels.h's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "conv2d_few_channels.h"
#include "layout.h"

namespace dlkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using few_channels::images;
using layout::empty_gradient;
using layout::Sizes;

constexpr const char* kOp = "conv2d_max_pool2d";

// --------------------------------------------------------------------------------------- arguments

few_channels::Shape check_arguments(const Tensor& input, const Tensor& weight, const Optional& bias,
                                    const std::vector<int64_t>& padding) {
  check_cpu(kOp, "input", input);
  check_cpu(kOp, "weight", weight);
  check_floating(kOp, "input", input);
  check_dtype(kOp, "weight", weight, input.scalar_type());
  for (const auto* x : {&input, &weight})
    DLK_CHECK(x->dim() == 4, kOp, ": expected ", x == &input ? "input" : "weight",
              " with 4 dimensions, got shape ", shape_string(x->sizes()));
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  DLK_CHECK(padding.size() == 2 && std::min(padding[0], padding[1]) >= 0 &&
                std::max(padding[0], padding[1]) <= kMost,
            kOp, ": expected padding of 2 numbers from 0 to ", kMost, ", got ",
            shape_string(padding));
  DLK_CHECK(weight.size(1) == input.size(1), kOp, ": expected weight of shape [outputs, ",
            input.size(1), ", ...] for input of shape ", shape_string(input.sizes()), ", got ",
            shape_string(weight.sizes()));
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t padded = input.size(2 + d) + 2 * padding[d], kernel = weight.size(2 + d);
    DLK_CHECK(kernel >= 1 && kernel <= padded, kOp,
              ": expected a kernel that fits in the padded input of ", padded,
              " pixels, got one of ", kernel);
    DLK_CHECK(padded - kernel >= 1, kOp,
              ": expected 2 pixels to pool at least, got a convolution of ", padded - kernel + 1);
  }
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, input.scalar_type());
    check_shape(kOp, "bias", *bias, std::vector<int64_t>{weight.size(0)});
  }
  return {input.size(0),  input.size(1),  input.size(2), input.size(3), weight.size(0),
          weight.size(2), weight.size(3), padding[0],    padding[1]};
}

Sizes pooled_sizes(const few_channels::Shape& s) {
  return {s.batch, s.outputs, s.output_height() / 2, s.output_width() / 2};
}

// An argmax leads into memory.
void check_argmax(const Tensor& argmax) {
  const auto* data = static_cast<const uint8_t*>(argmax.const_data_ptr());
  uint8_t most = 0;
  for (int64_t i = 0, n = argmax.numel(); i < n; ++i) most = std::max(most, data[i]);
  DLK_CHECK(most <= 3, kOp, ": expected argmax of at most 3, got ", int(most));
}

// ------------------------------------------------------------------------------------ host entries

std::tuple<Tensor, Tensor> conv2d_max_pool2d_forward(Tensor input, Tensor weight, Optional bias,
                                                     std::vector<int64_t> padding,
                                                     Text activation) {
  const few_channels::Shape shape = check_arguments(input, weight, bias, padding);
  const Activation act = parse_activation(kOp, activation);
  const auto format = layout::output_format(input, weight);
  const Tensor output = layout::empty(input, pooled_sizes(shape), format);
  const Tensor argmax = layout::empty(pooled_sizes(shape), ScalarType::Byte, format);
  if (output.numel() == 0) return {output, argmax};
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    const Tensor b = bias ? torch::stable::contiguous(*bias) : Tensor();
    const auto at = images<uint8_t>(argmax);
    few_channels::forward<S>(shape, images<const S>(input), images<const S>(weight),
                             bias ? static_cast<const S*>(b.const_data_ptr()) : nullptr, act,
                             images<S>(output), &at);
  });
  return {output, argmax};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_max_pool2d_backward(Tensor grad_output, Tensor input,
                                                              Tensor weight, Tensor output,
                                                              Tensor argmax,
                                                              std::vector<int64_t> padding,
                                                              Text activation, bool want_input,
                                                              bool want_weight, bool want_bias) {
  const few_channels::Shape shape = check_arguments(input, weight, std::nullopt, padding);
  const Activation act = parse_activation(kOp, activation);
  for (const auto& [name, x] : {std::pair<const char*, Tensor>{"grad_output", grad_output},
                                std::pair<const char*, Tensor>{"output", output},
                                std::pair<const char*, Tensor>{"argmax", argmax}}) {
    check_cpu(kOp, name, x);
    check_shape(kOp, name, x, pooled_sizes(shape));
    check_dtype(kOp, name, x, name[0] == 'a' ? ScalarType::Byte : input.scalar_type());
  }
  const Tensor places = torch::stable::contiguous(argmax);
  check_argmax(places);
  const auto flat = [&](int64_t size) {
    return torch::stable::new_empty(input, std::vector<int64_t>{size});
  };
  const Tensor grad_input = want_input ? empty_gradient(input) : flat(0);
  const Tensor grad_weight = want_weight ? empty_gradient(weight) : flat(0);
  const Tensor grad_bias = flat(want_bias ? shape.outputs : 0);
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    const Tensor dy = torch::stable::contiguous(grad_output), y = torch::stable::contiguous(output);
    const auto dx = images<S>(want_input ? grad_input : input);
    const auto dw = images<S>(want_weight ? grad_weight : weight);
    few_channels::pool_backward<S>(
        shape, images<const S>(input), images<const S>(weight),
        static_cast<const S*>(dy.const_data_ptr()), static_cast<const S*>(y.const_data_ptr()),
        static_cast<const uint8_t*>(places.const_data_ptr()), act, want_input ? &dx : nullptr,
        want_weight ? &dw : nullptr,
        want_bias ? static_cast<S*>(grad_bias.mutable_data_ptr()) : nullptr);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv2d_max_pool2d", TORCH_BOX(&dlkernels::conv2d_max_pool2d_forward));
  m.impl("conv2d_max_pool2d_forward", TORCH_BOX(&dlkernels::conv2d_max_pool2d_forward));
  m.impl("conv2d_max_pool2d_backward", TORCH_BOX(&dlkernels::conv2d_max_pool2d_backward));
}

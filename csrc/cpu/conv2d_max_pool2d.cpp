// conv2d + bias + activation + 2×2 max-pool, and the gradients. Few channels are
// conv2d_few_channels.h's; the rest goes through ATen's convolution, one channel plane after the
// other pooled behind it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
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
using Sizes = std::vector<int64_t>;

constexpr const char* kOp = "conv2d_max_pool2d";
constexpr int64_t kGrain = 1 << 15;  // fewest elements worth a second thread

struct Settings {
  Sizes stride, padding, dilation;
  int64_t groups;
};

// --------------------------------------------------------------------------------------- arguments

Sizes sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

int64_t output_side(const Tensor& input, const Tensor& weight, const Settings& s, int64_t d) {
  const int64_t reach = s.dilation[d] * (weight.size(2 + d) - 1) + 1;
  return (input.size(2 + d) + 2 * s.padding[d] - reach) / s.stride[d] + 1;
}

Sizes pooled_shape(const Tensor& input, const Tensor& weight, const Settings& s) {
  return {input.size(0), weight.size(0), output_side(input, weight, s, 0) / 2,
          output_side(input, weight, s, 1) / 2};
}

void check_arguments(const Tensor& input, const Tensor& weight, const Optional& bias,
                     const Settings& s) {
  check_cpu(kOp, "input", input);
  check_cpu(kOp, "weight", weight);
  check_floating(kOp, "input", input);
  check_dtype(kOp, "weight", weight, input.scalar_type());
  for (const auto* x : {&input, &weight})
    DLK_CHECK(x->dim() == 4, kOp, ": expected ", x == &input ? "input" : "weight",
              " with 4 dimensions, got shape ", shape_string(x->sizes()));
  for (const auto* setting : {&s.stride, &s.padding, &s.dilation}) {
    const int64_t least = setting == &s.padding ? 0 : 1;
    DLK_CHECK(setting->size() == 2 && std::min((*setting)[0], (*setting)[1]) >= least, kOp,
              ": expected stride and dilation from 1 and padding from 0, got ",
              shape_string(s.stride), ", ", shape_string(s.dilation), ", ",
              shape_string(s.padding));
  }
  DLK_CHECK(
      s.groups >= 1 && weight.size(0) % s.groups == 0 && weight.size(1) * s.groups == input.size(1),
      kOp, ": expected weight of shape [outputs, ", input.size(1), " / groups, ...] for ", s.groups,
      " groups and input of shape ", shape_string(input.sizes()), ", got ",
      shape_string(weight.sizes()));
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t padded = input.size(2 + d) + 2 * s.padding[d];
    const int64_t reach = s.dilation[d] * (weight.size(2 + d) - 1) + 1;
    DLK_CHECK(weight.size(2 + d) >= 1 && reach <= padded, kOp,
              ": expected a kernel that fits in the padded input of ", padded,
              " pixels, got one of ", reach);
    DLK_CHECK(output_side(input, weight, s, d) >= 2, kOp,
              ": expected 2 pixels to pool at least, got a convolution of ",
              output_side(input, weight, s, d));
  }
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, input.scalar_type());
    check_shape(kOp, "bias", *bias, Sizes{weight.size(0)});
  }
}

// An argmax leads into memory.
void check_argmax(const Tensor& argmax) {
  const auto* data = static_cast<const uint8_t*>(argmax.const_data_ptr());
  uint8_t most = 0;
  for (int64_t i = 0, n = argmax.numel(); i < n; ++i) most = std::max(most, data[i]);
  DLK_CHECK(most <= 3, kOp, ": expected argmax of at most 3, got ", int(most));
}

Tensor make(const Tensor& like, const Sizes& shape, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

template <typename S>
few_channels::Images<S> images(const Tensor& x) {
  using Element = std::remove_const_t<S>;
  return {const_cast<Element*>(static_cast<const Element*>(x.const_data_ptr())), x.stride(0),
          x.stride(1), x.stride(2), x.stride(3)};
}

// ------------------------------------------------------------------------------------------ choice

// Of any number of channels, where that is asked for; else where measured faster than oneDNN, on 2
// cores of AVX-512.
bool takes_few_channels(const Tensor& weight, const Settings& s, bool own) {
  const auto is = [](const Sizes& x, int64_t value) { return x[0] == value && x[1] == value; };
  if (s.groups != 1 || !is(s.stride, 1) || !is(s.dilation, 1)) return false;
  return own || (weight.size(1) <= 32 && weight.size(0) <= 64);
}

few_channels::Shape few_channels_shape(const Tensor& input, const Tensor& weight,
                                       const Settings& s) {
  return {input.size(0),  input.size(1),  input.size(2), input.size(3), weight.size(0),
          weight.size(2), weight.size(3), s.padding[0],  s.padding[1]};
}

// ----------------------------------------------------------------------------------- through ATen

template <size_t n>
void call(const char* op, std::array<StableIValue, n>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
}

Tensor aten_convolution(const Tensor& input, const Tensor& weight, const Optional& bias,
                        const Settings& s) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(input),    from(weight),      from(bias),
                                    from(s.stride), from(s.padding),   from(s.dilation),
                                    from(false),    from(Sizes{0, 0}), from(s.groups)};
  call("aten::convolution", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor> aten_convolution_backward(const Tensor& grad,
                                                             const Tensor& input,
                                                             const Tensor& weight,
                                                             const Settings& s,
                                                             const std::array<bool, 3>& wanted) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 11> stack{
      from(grad),
      from(input),
      from(weight),
      from(std::optional<Sizes>(Sizes{weight.size(0)})),
      from(s.stride),
      from(s.padding),
      from(s.dilation),
      from(false),
      from(Sizes{0, 0}),
      from(s.groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), wanted.size()))};
  call("aten::convolution_backward", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

// body(n, k, i, j) for the pooled pixels of every image, channel by channel.
template <typename Body>
void for_each_pooled(const Tensor& pooled, const Body& body) {
  const int64_t n = pooled.size(0), k = pooled.size(1), h = pooled.size(2), w = pooled.size(3);
  torch::stable::parallel_for(0, n * k, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, h * w)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t p = begin; p < end; ++p)
                                  for (int64_t i = 0; i < h; ++i)
                                    for (int64_t j = 0; j < w; ++j) body(p / k, p % k, i, j);
                              });
}

template <typename T>
T activate_one(Activation activation, T x) {
  return first_element(activate(activation, Vec<T>(x)));
}

// act of the largest of each 2×2 pixels of z, and which it is.
template <typename S>
void pool(const Tensor& z, Activation activation, const Tensor& output, const Tensor& argmax) {
  const auto from = images<const S>(z);
  const auto to = images<S>(output);
  const auto at = images<uint8_t>(argmax);
  for_each_pooled(output, [&](int64_t n, int64_t k, int64_t i, int64_t j) {
    auto best = widen(*from.at(n, k, 2 * i, 2 * j));
    uint8_t place = 0;
    for (int64_t p = 1; p < 4; ++p) {
      const auto value = widen(*from.at(n, k, 2 * i + p / 2, 2 * j + p % 2));
      if (value > best || value != value) best = value, place = uint8_t(p);
    }
    *to.at(n, k, i, j) = narrow<S>(activate_one(activation, best));
    *at.at(n, k, i, j) = place;
  });
}

// The gradient of z: zero but where the pool took its pixel.
template <typename S>
void unpool(const Tensor& grad, const Tensor& output, const Tensor& argmax, Activation activation,
            const Tensor& dz) {
  torch::stable::zero_(const_cast<Tensor&>(dz));
  const auto dy = images<const S>(grad), y = images<const S>(output);
  const auto at = images<const uint8_t>(argmax);
  const auto to = images<S>(dz);
  using T = accumulate_t<S>;
  using V = Vec<T>;
  for_each_pooled(output, [&](int64_t n, int64_t k, int64_t i, int64_t j) {
    const int64_t p = *at.at(n, k, i, j);
    const V g =
        through(activation, V(T(widen(*dy.at(n, k, i, j)))), V(T(widen(*y.at(n, k, i, j)))));
    *to.at(n, k, 2 * i + p / 2, 2 * j + p % 2) = narrow<S>(first_element(g));
  });
}

// ------------------------------------------------------------------------------------ host entries

std::tuple<Tensor, Tensor> conv2d_max_pool2d_forward(Tensor input, Tensor weight, Optional bias,
                                                     Sizes stride, Sizes padding, Sizes dilation,
                                                     int64_t groups, std::string activation, bool,
                                                     bool own) {
  const Settings s{stride, padding, dilation, groups};
  check_arguments(input, weight, bias, s);
  const Activation act = parse_activation(kOp, activation);
  const bool channels_last = input.size(0) != 0 && (layout::suggests_channels_last(input) ||
                                                    layout::suggests_channels_last(weight));
  const Sizes shape = pooled_shape(input, weight, s);
  const Tensor output = make(input, shape, input.scalar_type(), channels_last);
  const Tensor argmax = make(input, shape, ScalarType::Byte, channels_last);
  if (output.numel() == 0) return {output, argmax};
  if (takes_few_channels(weight, s, own)) {
    for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
      using S = decltype(tag);
      const Tensor b = bias ? torch::stable::contiguous(*bias) : Tensor();
      const auto at = images<uint8_t>(argmax);
      few_channels::forward<S>(
          few_channels_shape(input, weight, s), images<const S>(input), images<const S>(weight),
          bias ? static_cast<const S*>(b.const_data_ptr()) : nullptr, act, images<S>(output), &at);
    });
    return {output, argmax};
  }
  const Tensor z = aten_convolution(input, weight, bias, s);
  for_dtype<bf16, f16>(input.scalar_type(),
                       [&](auto tag) { pool<decltype(tag)>(z, act, output, argmax); });
  return {output, argmax};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_max_pool2d_backward(
    Tensor grad_output, Tensor input, Tensor weight, Tensor output, Tensor argmax, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups, std::string activation, bool, bool own,
    bool want_input, bool want_weight, bool want_bias) {
  const Settings s{stride, padding, dilation, groups};
  check_arguments(input, weight, std::nullopt, s);
  const Activation act = parse_activation(kOp, activation);
  const Sizes shape = pooled_shape(input, weight, s);
  for (const auto& [name, x] : {std::pair<const char*, Tensor>{"grad_output", grad_output},
                                std::pair<const char*, Tensor>{"output", output},
                                std::pair<const char*, Tensor>{"argmax", argmax}}) {
    check_cpu(kOp, name, x);
    check_shape(kOp, name, x, shape);
    check_dtype(kOp, name, x, name[0] == 'a' ? ScalarType::Byte : input.scalar_type());
  }
  const Tensor places = torch::stable::contiguous(argmax);
  check_argmax(places);
  const Sizes none{0};
  const Tensor grad_input = make(input, want_input ? sizes_of(input) : none, input.scalar_type(),
                                 want_input && layout::suggests_channels_last(input));
  const Tensor grad_weight = make(input, want_weight ? sizes_of(weight) : none, input.scalar_type(),
                                  want_weight && layout::suggests_channels_last(weight));
  const Tensor grad_bias =
      make(input, want_bias ? Sizes{weight.size(0)} : none, input.scalar_type(), false);
  if (takes_few_channels(weight, s, own)) {
    for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
      using S = decltype(tag);
      const Tensor dy = torch::stable::contiguous(grad_output),
                   y = torch::stable::contiguous(output);
      const auto dx = images<S>(want_input ? grad_input : input);
      const auto dw = images<S>(want_weight ? grad_weight : weight);
      few_channels::pool_backward<S>(
          few_channels_shape(input, weight, s), images<const S>(input), images<const S>(weight),
          static_cast<const S*>(dy.const_data_ptr()), static_cast<const S*>(y.const_data_ptr()),
          static_cast<const uint8_t*>(places.const_data_ptr()), act, want_input ? &dx : nullptr,
          want_weight ? &dw : nullptr,
          want_bias ? static_cast<S*>(grad_bias.mutable_data_ptr()) : nullptr);
    });
    return {grad_input, grad_weight, grad_bias};
  }
  const Tensor dz = make(input,
                         {input.size(0), weight.size(0), output_side(input, weight, s, 0),
                          output_side(input, weight, s, 1)},
                         input.scalar_type(), layout::suggests_channels_last(output));
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    unpool<decltype(tag)>(grad_output, output, places, act, dz);
  });
  auto [dx, dw, db] =
      aten_convolution_backward(dz, input, weight, s, {want_input, want_weight, want_bias});
  const auto as = [](const Tensor& gradient, const Tensor& like) {
    return torch::stable::contiguous(gradient, layout::suggests_channels_last(like)
                                                   ? torch::headeronly::MemoryFormat::ChannelsLast
                                                   : torch::headeronly::MemoryFormat::Contiguous);
  };
  return {want_input ? as(dx, input) : grad_input, want_weight ? as(dw, weight) : grad_weight,
          want_bias ? db : grad_bias};
}

std::string conv2d_max_pool2d_algorithm(Tensor input, Tensor weight, Optional bias, Sizes stride,
                                        Sizes padding, Sizes dilation, int64_t groups,
                                        std::string activation, bool, bool own) {
  const Settings s{stride, padding, dilation, groups};
  check_arguments(input, weight, bias, s);
  parse_activation(kOp, activation);
  return takes_few_channels(weight, s, own) ? "few_channels" : "aten";
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv2d_max_pool2d", TORCH_BOX(&dlkernels::conv2d_max_pool2d_forward));
  m.impl("conv2d_max_pool2d_forward", TORCH_BOX(&dlkernels::conv2d_max_pool2d_forward));
  m.impl("conv2d_max_pool2d_algorithm", TORCH_BOX(&dlkernels::conv2d_max_pool2d_algorithm));
  m.impl("conv2d_max_pool2d_backward", TORCH_BOX(&dlkernels::conv2d_max_pool2d_backward));
}

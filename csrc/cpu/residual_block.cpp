// The stages of the residual block: see ops/residual_block.py. Images are dense NHWC. A convolution
// is by the algorithm that conv2d takes for it. Winograd's read and write what lies around them;
// beside the others, it is a pass over memory of its own.
#include "residual_block.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "conv2d.h"
#include "layout.h"
#include "memory.h"

namespace dlkernels {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using conv2d::Direction;
using conv2d::Shape;

constexpr const char* kOp = "residual_block";

// --------------------------------------------------------------------------------------- arguments

ScalarType sums_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_image(const char* argument, const Tensor& x) {
  check_cpu(kOp, argument, x);
  DLK_CHECK(x.dim() == 4 && x.numel() > 0, kOp, ": expected ", argument,
            " with 4 dimensions that is not empty, got shape ", shape_string(x.sizes()));
}

// Of the size and dtype of `like`.
void check_like(const char* argument, const Tensor& x, const Tensor& like) {
  check_cpu(kOp, argument, x);
  check_dtype(kOp, argument, x, like.scalar_type());
  check_shape(kOp, argument, x, like.sizes());
}

// A number for each channel of `image`, as sums of it are.
void check_channels(const char* argument, const Tensor& x, const Tensor& image) {
  check_cpu(kOp, argument, x);
  check_dtype(kOp, argument, x, sums_dtype(image));
  check_shape(kOp, argument, x, Ints{image.size(1)});
  check_contiguous(kOp, argument, x);
}

void check_signs(const char* argument, const Tensor& x, const Tensor& image) {
  check_cpu(kOp, argument, x);
  check_dtype(kOp, argument, x, ScalarType::Byte);
  check_shape(
      kOp, argument, x,
      Ints{image.size(0), image.size(2), image.size(3), residual_block::sign_bytes(image.size(1))});
  check_contiguous(kOp, argument, x);
}

Tensor channels_last(const Tensor& x) {
  if (layout::is_nhwc(x)) return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  Tensor made;
  for_dtype<bf16, f16>(x.scalar_type(), [&](auto tag) {
    made = layout::copied<decltype(tag)>(x, MemoryFormat::ChannelsLast);
  });
  return made;
}

Tensor empty_image(const Tensor& like, const Ints& sizes) {
  return layout::empty(like, {sizes[0], sizes[1], sizes[2], sizes[3]}, MemoryFormat::ChannelsLast);
}
Tensor empty_image(const Tensor& like) {
  return empty_image(like, {like.size(0), like.size(1), like.size(2), like.size(3)});
}

Tensor empty_sums(const Tensor& image, int64_t channels) {
  return torch::stable::new_empty(image, Ints{channels}, sums_dtype(image));
}

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
const T* data_of(const Optional& x) {
  return x ? data_of<T>(*x) : nullptr;
}
template <typename T>
T* to_write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// ------------------------------------------------------------------------------------ convolutions

struct Settings {
  Ints stride, padding, dilation;
  int64_t groups;
  bool exact, own;
};

// The geometry of a convolution.
Shape check_convolution(const Settings& set, const Tensor& input, const Tensor& weight) {
  check_image("weight", weight);
  check_dtype(kOp, "weight", weight, input.scalar_type());
  for (const Ints* pair : {&set.stride, &set.padding, &set.dilation})
    DLK_CHECK(pair->size() == 2, kOp, ": expected pairs of stride, padding and dilation, got ",
              shape_string(*pair));
  DLK_CHECK(set.groups >= 1 && weight.size(1) * set.groups == input.size(1), kOp,
            ": expected input with ", weight.size(1) * set.groups, " channels for weight of shape ",
            shape_string(weight.sizes()), " and ", set.groups, " groups, got shape ",
            shape_string(input.sizes()));
  Shape shape{};
  shape.n = input.size(0), shape.c = input.size(1), shape.h = input.size(2);
  shape.w = input.size(3), shape.k = weight.size(0), shape.r = weight.size(2);
  shape.s = weight.size(3), shape.groups = set.groups;
  int64_t sizes[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t step = set.stride[size_t(d)], around = set.padding[size_t(d)],
                  apart = set.dilation[size_t(d)];
    DLK_CHECK(step >= 1 && around >= 0 && apart >= 1, kOp,
              ": expected stride and dilation of at least 1 and padding of at least 0, got ", step,
              ", ", apart, " and ", around);
    shape.stride[d] = step, shape.padding[d] = around, shape.dilation[d] = apart;
    const int64_t room = input.size(2 + d) + 2 * around - apart * (weight.size(2 + d) - 1) - 1;
    DLK_CHECK(room >= 0, kOp, ": expected a larger input than ", shape_string(input.sizes()),
              " for weight of shape ", shape_string(weight.sizes()));
    sizes[d] = room / step + 1;
  }
  shape.p = sizes[0], shape.q = sizes[1];
  return shape;
}

template <typename S>
constexpr bool kHasWinograd = conv2d::detail::has_winograd<S>;

bool is_winograd(const Settings& set, const Shape& shape, const Tensor& x, Direction direction) {
  return conv2d::choose(shape, x.scalar_type(), direction, {true, set.exact, set.own}) ==
         conv2d::Algorithm::kWinograd;
}

template <typename S, typename Pointer>
conv2d::Weight<S> weight_of(const Tensor& weight, Pointer data) {
  return {static_cast<S*>(data),
          {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
}

Tensor convolve(const Tensor& input, const Tensor& weight, const Optional& bias,
                const Settings& set) {
  return conv2d::convolution(input, weight, bias, set.stride, set.padding, set.dilation, set.groups,
                             set.exact, set.own);
}

std::array<Tensor, 2> convolution_gradients(const Tensor& grad, const Tensor& input,
                                            const Tensor& weight, const Settings& set,
                                            bool want_input, bool want_weight) {
  return conv2d::convolution_gradients(grad, input, weight, set.stride, set.padding, set.dilation,
                                       set.groups, set.exact, set.own, want_input, want_weight);
}

// ------------------------------------------------------------------------------------------ passes

// relu(scale·x + shift).
template <typename S>
Tensor normalised(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  using T = accumulate_t<S>;
  const Tensor result = empty_image(x);
  const int64_t channels = x.size(1);
  const S* const from = data_of<S>(x);
  S* const to = to_write<S>(result);
  const residual_block::Normalise<T> normalise{data_of<T>(scale), data_of<T>(shift)};
  residual_block::for_vectors<T>(x.numel() / channels, channels,
                                 [=](int64_t row, int64_t c, int64_t lanes) {
                                   const int64_t at = row * channels + c;
                                   const Vec<T> y = load(from + at, lanes);
                                   store(to + at, normalise.at(c, lanes)(y), lanes);
                                 });
  return result;
}

// A vector of parameters of any dtype, as double; `otherwise` where there is none.
std::vector<double> numbers(const char* argument, const Optional& x, int64_t count,
                            double otherwise) {
  std::vector<double> result(size_t(count), otherwise);
  if (!x) return result;
  check_cpu(kOp, argument, *x);
  check_floating(kOp, argument, *x);
  check_shape(kOp, argument, *x, Ints{count});
  for_dtype<bf16, f16>(x->scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    for (int64_t c = 0; c < count; ++c)
      result[size_t(c)] = double(widen(data_of<S>(*x)[c * x->stride(0)]));
  });
  return result;
}

// The same as T; zeros where there is none.
template <typename T>
std::vector<T> numbers_as(const char* argument, const Optional& x, int64_t count) {
  const std::vector<double> values = numbers(argument, x, count, 0);
  return {values.begin(), values.end()};
}

// ----------------------------------------------------------------------------------------- forward

std::tuple<Tensor, Tensor, Tensor> convolution(Tensor input, Optional scale, Optional shift,
                                               Tensor weight, Optional bias, Optional about,
                                               Ints stride, Ints padding, Ints dilation,
                                               int64_t groups, bool statistics, bool exact,
                                               bool own) {
  check_image("input", input);
  check_floating(kOp, "input", input);
  DLK_CHECK(scale.has_value() == shift.has_value(), kOp, ": expected scale and shift, or neither");
  if (scale) {
    check_channels("scale", *scale, input);
    check_channels("shift", *shift, input);
  }
  const Settings set{stride, padding, dilation, groups, exact, own};
  const Shape shape = check_convolution(set, input, weight);
  const Tensor x = channels_last(input);
  Tensor output;
  const Tensor mean = empty_sums(x, statistics ? shape.k : 0),
               var = empty_sums(x, statistics ? shape.k : 0);
  for_dtype<bf16, f16>(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const std::vector<T> centre = numbers_as<T>("about", about, shape.k),
                         added = numbers_as<T>("bias", bias, shape.k);
    T *const to_mean = static_cast<T*>(mean.mutable_data_ptr()), *const to_var = static_cast<T*>(
                                                                     var.mutable_data_ptr());
    const int64_t rows = shape.pixels();
    bool known = true;  // mean and variance
    if (is_winograd(set, shape, x, Direction::kForward)) {
      if constexpr (kHasWinograd<S>) {
        output = empty_image(x, {shape.n, shape.k, shape.p, shape.q});
        S* const y = to_write<S>(output);
        const auto run = [&](const auto& epilogue) {
          const conv2d::winograd::Pixels<S> pixels{data_of<S>(x), shape.c};
          const auto w = weight_of<const S>(weight, weight.const_data_ptr());
          if (!scale) return conv2d::winograd_forward(shape, pixels, w, y, epilogue);
          const residual_block::NormalisedPixels<S> z{
              pixels, {data_of<float>(*scale), data_of<float>(*shift)}};
          conv2d::winograd_forward(shape, z, w, y, epilogue);
        };
        if (!statistics)
          return run([&](Vec<float> value, int64_t c, int64_t lanes) {
            return value + load(added.data() + c, lanes);
          });
        const int64_t tiles = conv2d::winograd::Tiles(shape.n, shape.p, shape.q).count;
        const residual_block::TileSums sums(tiles, shape.k);
        run(residual_block::WithStatistics{sums, added.data(), centre.data()});
        std::vector<double> totals(size_t(2 * shape.k));
        sums.total(shape.k, totals.data());
        known = residual_block::statistics_of(totals.data(), rows, shape.k, centre.data(), to_mean,
                                              to_var);
      }
    } else {
      const Tensor z = scale ? normalised<S>(x, *scale, *shift) : x;
      output = channels_last(convolve(z, weight, bias, set));
      known = !statistics;
    }
    if (!known) residual_block::statistics(data_of<S>(output), rows, shape.k, to_mean, to_var);
  });
  return {output, mean, var};
}

// running = (1 − momentum)·running + momentum·now
void update(const Optional& running, const std::vector<double>& before,
            const std::vector<double>& now, double momentum) {
  if (!running) return;
  for_dtype<bf16, f16>(running->scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    S* const to = static_cast<S*>(running->mutable_data_ptr());
    for (size_t c = 0; c < now.size(); ++c)
      to[int64_t(c) * running->stride(0)] =
          narrow<S>(T((1 - momentum) * before[c] + momentum * now[c]));
  });
}

std::tuple<Tensor, Tensor, Tensor> finalize(Tensor mean, Tensor var, int64_t count, Optional weight,
                                            Optional bias, Optional running_mean,
                                            Optional running_var, double momentum, double eps) {
  check_floating(kOp, "mean", mean);
  DLK_CHECK(mean.dim() == 1, kOp, ": expected mean with 1 dimension, got shape ",
            shape_string(mean.sizes()));
  check_like("var", var, mean);
  const int64_t channels = mean.size(0);
  const auto means = numbers("mean", mean, channels, 0), vars = numbers("var", var, channels, 0);
  const auto gamma = numbers("weight", weight, channels, 1),
             beta = numbers("bias", bias, channels, 0);
  const auto old_mean = numbers("running_mean", running_mean, channels, 0),
             old_var = numbers("running_var", running_var, channels, 0);
  std::vector<double> unbiased = vars;
  for (double& value : unbiased) value *= double(count) / double(count - 1);
  update(running_mean, old_mean, means, momentum);
  update(running_var, old_var, unbiased, momentum);
  const Tensor scale = torch::stable::empty_like(mean), shift = torch::stable::empty_like(mean),
               rstd = torch::stable::empty_like(mean);
  for_dtype<bf16, f16>(mean.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    for (int64_t c = 0; c < channels; ++c) {
      const double r = 1 / std::sqrt(vars[size_t(c)] + eps), s = gamma[size_t(c)] * r;
      static_cast<S*>(scale.mutable_data_ptr())[c] = narrow<S>(T(s));
      static_cast<S*>(shift.mutable_data_ptr())[c] =
          narrow<S>(T(beta[size_t(c)] - means[size_t(c)] * s));
      static_cast<S*>(rstd.mutable_data_ptr())[c] = narrow<S>(T(r));
    }
  });
  return {scale, shift, rstd};
}

std::tuple<Tensor, Tensor> output(Tensor input, Tensor scale, Tensor shift, Tensor residual,
                                  Optional residual_scale, Optional residual_shift,
                                  bool want_signs) {
  check_image("input", input);
  check_floating(kOp, "input", input);
  check_channels("scale", scale, input);
  check_channels("shift", shift, input);
  check_like("residual", residual, input);
  DLK_CHECK(residual_scale.has_value() == residual_shift.has_value(), kOp,
            ": expected residual_scale and residual_shift, or neither");
  if (residual_scale) {
    check_channels("residual_scale", *residual_scale, input);
    check_channels("residual_shift", *residual_shift, input);
  }
  const Tensor y = channels_last(input), x = channels_last(residual), result = empty_image(y);
  const int64_t channels = y.size(1), row_bytes = residual_block::sign_bytes(channels);
  const Tensor signs = torch::stable::new_empty(
      y, want_signs ? Ints{y.size(0), y.size(2), y.size(3), row_bytes} : Ints{0}, ScalarType::Byte);
  for_dtype<bf16, f16>(y.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const S *const from = data_of<S>(y), *const other = data_of<S>(x);
    S* const to = to_write<S>(result);
    const T *const s = data_of<T>(scale), *const t = data_of<T>(shift);
    const T *const rs = data_of<T>(residual_scale), *const rt = data_of<T>(residual_shift);
    uint8_t* const bytes = want_signs ? static_cast<uint8_t*>(signs.mutable_data_ptr()) : nullptr;
    residual_block::for_vectors<T>(
        y.numel() / channels, channels, [=](int64_t row, int64_t c, int64_t lanes) {
          const int64_t at = row * channels + c;
          V v = load(other + at, lanes);
          if (rs) v = fma(load(rs + c, lanes), v, load(rt + c, lanes));
          v = v + fma(load(s + c, lanes), load(from + at, lanes), load(t + c, lanes));
          v = activate(Activation::kRelu, v);
          store(to + at, v, lanes);
          if (bytes) residual_block::store_signs(bytes + row * row_bytes, c, v, lanes);
        });
  });
  return {result, signs};
}

Tensor layout_of(Tensor input, bool last) {
  check_image("input", input);
  check_floating(kOp, "input", input);
  const bool is = last ? layout::is_nhwc(input) : layout::is_nchw(input);
  DLK_CHECK(!is, kOp, ": expected an input in another memory format");
  Tensor made;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    made = layout::copied<decltype(tag)>(
        input, last ? layout::MemoryFormat::ChannelsLast : layout::MemoryFormat::Contiguous);
  });
  return made;
}

Tensor folded(Tensor input, Tensor weight, Optional prepared, Tensor scale, Tensor shift,
              Optional residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
              bool relu, bool exact, bool own) {
  check_image("input", input);
  check_floating(kOp, "input", input);
  const Settings set{stride, padding, dilation, groups, exact, own};
  const Shape shape = check_convolution(set, input, weight);
  const Ints sizes{shape.n, shape.k, shape.p, shape.q};
  for (const auto& [argument, x] : {std::pair{"scale", &scale}, std::pair{"shift", &shift}}) {
    check_cpu(kOp, argument, *x);
    check_dtype(kOp, argument, *x, sums_dtype(input));
    check_shape(kOp, argument, *x, Ints{shape.k});
    check_contiguous(kOp, argument, *x);
  }
  const float* transform = nullptr;
  if (prepared) {
    DLK_CHECK(conv2d::may_be_winograd(shape, weight.scalar_type()), kOp,
              ": expected no prepared for weight of shape ", shape_string(weight.sizes()));
    check_cpu(kOp, "prepared", *prepared);
    check_dtype(kOp, "prepared", *prepared, ScalarType::Float);
    check_shape(kOp, "prepared", *prepared, Ints{conv2d::prepared_size(shape)});
    check_contiguous(kOp, "prepared", *prepared);
    transform = static_cast<const float*>(prepared->const_data_ptr());
  }
  const Tensor x = channels_last(input);
  Tensor y, more;
  if (residual) {
    check_cpu(kOp, "residual", *residual);
    check_dtype(kOp, "residual", *residual, input.scalar_type());
    check_shape(kOp, "residual", *residual, sizes);
    more = channels_last(*residual);
  }
  for_dtype<bf16, f16>(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const S* const other = residual ? data_of<S>(more) : nullptr;
    const residual_block::Folded<S> fold{data_of<T>(scale), data_of<T>(shift), other, shape.k,
                                         relu};
    if (is_winograd(set, shape, x, Direction::kForward)) {
      if constexpr (kHasWinograd<S>) {
        y = empty_image(x, sizes);
        conv2d::winograd_forward(shape, conv2d::winograd::Pixels<S>{data_of<S>(x), shape.c},
                                 weight_of<const S>(weight, weight.const_data_ptr()),
                                 to_write<S>(y), fold, transform);
      }
      return;
    }
    y = channels_last(convolve(x, weight, std::nullopt, set));
    S* const to = static_cast<S*>(y.mutable_data_ptr());
    residual_block::for_vectors<T>(shape.pixels(), shape.k,
                                   [=](int64_t row, int64_t c, int64_t lanes) {
                                     S* const at = to + row * fold.channels + c;
                                     store(at, fold.tile(0, c, lanes)(load(at, lanes), row), lanes);
                                   });
  });
  return y;
}

// ---------------------------------------------------------------------------------------- backward

std::tuple<Tensor, Tensor, Tensor> reduce(Tensor grad_output, Tensor signs, Tensor input,
                                          Tensor mean, Tensor rstd, Optional residual,
                                          Optional residual_mean, Optional residual_rstd) {
  check_image("input", input);
  check_floating(kOp, "input", input);
  check_like("grad_output", grad_output, input);
  check_signs("signs", signs, input);
  check_channels("mean", mean, input);
  check_channels("rstd", rstd, input);
  if (residual) {
    DLK_CHECK(residual_mean && residual_rstd, kOp,
              ": expected residual_mean and residual_rstd with a residual");
    check_like("residual", *residual, input);
    check_channels("residual_mean", *residual_mean, input);
    check_channels("residual_rstd", *residual_rstd, input);
  }
  const Tensor g = channels_last(grad_output), y = channels_last(input);
  const Tensor x = residual ? channels_last(*residual) : Tensor();
  const int64_t channels = y.size(1), rows = y.numel() / channels;
  const int64_t row_bytes = residual_block::sign_bytes(channels);
  const Tensor sum = empty_sums(y, channels), product = empty_sums(y, channels),
               residual_product = empty_sums(y, residual ? channels : 0);
  std::vector<double> totals(size_t(3 * channels));
  for_dtype<bf16, f16>(y.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const S *const grad = data_of<S>(g), *const from = data_of<S>(y);
    const S* const other = residual ? data_of<S>(x) : nullptr;
    const uint8_t* const bytes = data_of<uint8_t>(signs);
    const T *const mu = data_of<T>(mean), *const other_mu = data_of<T>(residual_mean);
    const auto add = [=](int64_t row, int64_t c, int64_t lanes, V* sums) {
      const int64_t at = row * channels + c;
      const V value =
          residual_block::where_set(bytes + row * row_bytes, c, load(grad + at, lanes), lanes);
      sums[0] = sums[0] + value;
      sums[1] = fma(value, load(from + at, lanes) - load(mu + c, lanes), sums[1]);
      return value;
    };
    if (other)
      residual_block::sum_vectors<3, T>(
          rows, channels, totals.data(), [=](int64_t row, int64_t c, int64_t lanes, V* sums) {
            const V value = add(row, c, lanes, sums);
            const V deviation = load(other + row * channels + c, lanes) - load(other_mu + c, lanes);
            sums[2] = fma(value, deviation, sums[2]);
          });
    else
      residual_block::sum_vectors<2, T>(rows, channels, totals.data(), add);
    const auto write = [&](const Tensor& to, int which, const T* factor) {
      for (int64_t c = 0; c < to.numel(); ++c)
        static_cast<T*>(to.mutable_data_ptr())[c] =
            T(totals[size_t(which * channels + c)] * (factor ? double(factor[c]) : 1));
    };
    write(sum, 0, nullptr);
    write(product, 1, data_of<T>(rstd));
    write(residual_product, 2, data_of<T>(residual_rstd));
  });
  return {sum, product, residual_product};
}

// dy = a·g + b·(y − μ) + c
Tensor coefficients(Tensor sum, Tensor product, int64_t count, Optional weight, Tensor rstd,
                    bool training) {
  check_floating(kOp, "sum", sum);
  DLK_CHECK(sum.dim() == 1, kOp, ": expected sum with 1 dimension, got shape ",
            shape_string(sum.sizes()));
  check_like("product", product, sum);
  check_like("rstd", rstd, sum);
  const int64_t channels = sum.size(0);
  const auto sums = numbers("sum", sum, channels, 0),
             products = numbers("product", product, channels, 0),
             r = numbers("rstd", rstd, channels, 0), gamma = numbers("weight", weight, channels, 1);
  const Tensor result = torch::stable::new_empty(sum, Ints{3, channels});
  for_dtype<bf16, f16>(sum.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    S* const to = static_cast<S*>(result.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      const size_t at = size_t(c);
      const double a = gamma[at] * r[at];
      to[c] = narrow<S>(T(a));
      to[channels + c] = narrow<S>(T(training ? -a * r[at] * products[at] / double(count) : 0));
      to[2 * channels + c] = narrow<S>(T(training ? -a * sums[at] / double(count) : 0));
    }
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradient(
    Tensor grad, Optional signs, Tensor output, Tensor output_mean, Tensor coefficients,
    Tensor input, Optional scale, Optional shift, Optional mean, Optional rstd, Tensor weight,
    Ints stride, Ints padding, Ints dilation, int64_t groups, Optional skip, Optional skip_signs,
    bool exact, bool own, bool want_input, bool want_weight) {
  check_image("input", input);
  check_image("output", output);
  check_floating(kOp, "input", input);
  check_dtype(kOp, "output", output, input.scalar_type());
  check_like("grad", grad, output);
  if (signs) check_signs("signs", *signs, output);
  check_channels("output_mean", output_mean, output);
  check_cpu(kOp, "coefficients", coefficients);
  check_dtype(kOp, "coefficients", coefficients, sums_dtype(output));
  check_shape(kOp, "coefficients", coefficients, Ints{3, output.size(1)});
  check_contiguous(kOp, "coefficients", coefficients);
  const bool inner = scale.has_value();
  DLK_CHECK(shift.has_value() == inner && mean.has_value() == inner && rstd.has_value() == inner,
            kOp, ": expected scale, shift, mean and rstd, or none of them");
  if (inner) {
    check_channels("scale", *scale, input);
    check_channels("shift", *shift, input);
    check_channels("mean", *mean, input);
    check_channels("rstd", *rstd, input);
  }
  DLK_CHECK(!skip || !inner, kOp, ": expected no skip behind a layer");
  DLK_CHECK(!skip_signs || skip, kOp, ": expected a skip with skip_signs");
  if (skip) check_like("skip", *skip, input);
  if (skip_signs) check_signs("skip_signs", *skip_signs, input);

  const Settings set{stride, padding, dilation, groups, exact, own};
  const Shape shape = check_convolution(set, input, weight);
  check_shape(kOp, "output", output, Ints{shape.n, shape.k, shape.p, shape.q});
  const Tensor g = channels_last(grad), y = channels_last(output), x = channels_last(input);
  const Ints none{0};
  Tensor grad_input = torch::stable::new_empty(x, none),
         grad_weight = torch::stable::new_empty(x, none);
  const int64_t channels = shape.c, rows = shape.n * shape.h * shape.w;
  const bool sums = inner && want_input;
  const Tensor sum = empty_sums(x, sums ? channels : 0),
               product = empty_sums(x, sums ? channels : 0);
  const Tensor more = skip ? channels_last(*skip) : x;
  // Whatever is wanted: the same bits come with it and without.
  const bool whole = is_winograd(set, shape, x, Direction::kInputGradient) &&
                     is_winograd(set, shape, x, Direction::kWeightGradient);
  for_dtype<bf16, f16>(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const S *const from = data_of<S>(g), *const raw = data_of<S>(y), *const before = data_of<S>(x);
    const T* const a = data_of<T>(coefficients);
    const residual_block::BatchNormGradient<T> of_norm{a, a + shape.k, a + 2 * shape.k,
                                                       data_of<T>(output_mean)};
    const uint8_t* const bytes = data_of<uint8_t>(signs);
    const int64_t row_bytes = residual_block::sign_bytes(shape.k);
    const residual_block::WithSkip<S> with_skip{data_of<S>(more), channels,
                                                data_of<uint8_t>(skip_signs),
                                                residual_block::sign_bytes(channels)};
    const auto write_sums = [&](const double* totals) {
      for (int64_t c = 0; c < channels; ++c) {
        static_cast<T*>(sum.mutable_data_ptr())[c] = T(totals[c]);
        static_cast<T*>(product.mutable_data_ptr())[c] =
            T(totals[channels + c] * double(data_of<T>(*rstd)[c]));
      }
    };
    std::vector<double> totals(size_t(2 * channels));
    if (whole) {
      if constexpr (kHasWinograd<S>) {
        const conv2d::winograd::Pixels<S> pixels{before, channels};
        const auto run = [&](const auto& dy) {
          if (want_input) {
            grad_input = empty_image(x);
            S* const to = to_write<S>(grad_input);
            const auto w = weight_of<const S>(weight, weight.const_data_ptr());
            if (inner) {
              const residual_block::TileSums parts(
                  conv2d::winograd::Tiles(shape.n, shape.h, shape.w).count, channels);
              const residual_block::WithGradientSums<S> epilogue{
                  parts, before, channels, data_of<T>(scale), data_of<T>(shift), data_of<T>(mean)};
              conv2d::winograd_input_gradient(shape, dy, w, to, epilogue);
              parts.total(channels, totals.data());
              write_sums(totals.data());
            } else if (skip) {
              conv2d::winograd_input_gradient(shape, dy, w, to, with_skip);
            } else {
              conv2d::winograd_input_gradient(shape, dy, w, to,
                                              [](V value, int64_t, int64_t) { return value; });
            }
          }
          if (!want_weight) return;
          grad_weight = torch::stable::empty_like(weight);
          const auto dw = weight_of<S>(grad_weight, grad_weight.mutable_data_ptr());
          if (inner)
            conv2d::winograd_weight_gradient(
                shape, dy,
                residual_block::NormalisedPixels<S>{pixels, {data_of<T>(scale), data_of<T>(shift)}},
                dw);
          else
            conv2d::winograd_weight_gradient(shape, dy, pixels, dw);
        };
        const conv2d::winograd::Pixels<S> of_g{from, shape.k}, of_y{raw, shape.k};
        if (bytes)
          run(residual_block::GradientPixels<S, true>{of_g, of_y, of_norm, bytes, row_bytes});
        else
          run(residual_block::GradientPixels<S, false>{of_g, of_y, of_norm, nullptr, 0});
      }
      return;
    }

    const Tensor dy = empty_image(y);
    S* const d = to_write<S>(dy);
    residual_block::for_vectors<T>(
        shape.pixels(), shape.k, [=](int64_t row, int64_t c, int64_t lanes) {
          const int64_t at = row * shape.k + c;
          V value = load(from + at, lanes);
          if (bytes) value = residual_block::where_set(bytes + row * row_bytes, c, value, lanes);
          store(d + at, of_norm.at(c, lanes)(value, load(raw + at, lanes)), lanes);
        });
    const Tensor z = inner && want_weight ? normalised<S>(x, *scale, *shift) : x;
    const auto made = convolution_gradients(dy, z, weight, set, want_input, want_weight);
    if (want_weight) grad_weight = made[1];
    if (!want_input) return;
    grad_input = channels_last(made[0]);
    S* const to = static_cast<S*>(grad_input.mutable_data_ptr());
    if (inner) {
      const T *const s = data_of<T>(scale), *const t = data_of<T>(shift);
      const T* const mu = data_of<T>(mean);
      residual_block::sum_vectors<2, T>(
          rows, channels, totals.data(), [=](int64_t row, int64_t c, int64_t lanes, V* sums) {
            const int64_t at = row * channels + c;
            const V value = load(before + at, lanes);
            const V z = fma(load(s + c, lanes), value, load(t + c, lanes));
            const V masked = select(exceeds(z, V(T(0))), load(to + at, lanes), V(T(0)));
            store(to + at, masked, lanes);
            sums[0] = sums[0] + masked;
            sums[1] = fma(masked, value - load(mu + c, lanes), sums[1]);
          });
      write_sums(totals.data());
    } else if (skip) {
      residual_block::for_vectors<T>(rows, channels, [=](int64_t row, int64_t c, int64_t lanes) {
        S* const at = to + row * channels + c;
        store(at, with_skip.tile(0, c, lanes)(load(at, lanes), row), lanes);
      });
    }
  });
  return {grad_input, grad_weight, sum, product};
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("residual_block_convolution", TORCH_BOX(&dlkernels::convolution));
  m.impl("residual_block_finalize", TORCH_BOX(&dlkernels::finalize));
  m.impl("residual_block_output", TORCH_BOX(&dlkernels::output));
  m.impl("residual_block_folded", TORCH_BOX(&dlkernels::folded));
  m.impl("residual_block_layout", TORCH_BOX(&dlkernels::layout_of));
  m.impl("residual_block_reduce", TORCH_BOX(&dlkernels::reduce));
  m.impl("residual_block_coefficients", TORCH_BOX(&dlkernels::coefficients));
  m.impl("residual_block_gradient", TORCH_BOX(&dlkernels::gradient));
}

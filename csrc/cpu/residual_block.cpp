// The stages of the residual block between which its batch norms' statistics are known: see
// ops/residual_block.py. Convolutions are conv2d's, by its own choice; images are dense NHWC.
#include "residual_block.h"

#include <torch/csrc/stable/c/shim.h>
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
#include "memory.h"

namespace dlkernels {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

constexpr const char* kOp = "residual_block";

// --------------------------------------------------------------------------------------- arguments

ScalarType sums_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_image(const char* argument, const Tensor& x) {
  check_cpu(kOp, argument, x);
  DLK_CHECK(x.dim() == 4, kOp, ": expected ", argument, " with 4 dimensions, got shape ",
            shape_string(x.sizes()));
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
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

Tensor empty_image(const Tensor& like) {
  const Tensor made = torch::stable::empty(
      Ints{like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type(),
      std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU), std::nullopt,
      MemoryFormat::ChannelsLast);
  return made;
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
  T* const data = static_cast<T*>(x.mutable_data_ptr());
  advise_huge_pages(data, size_t(x.numel()) * sizeof(T));
  return data;
}

// -------------------------------------------------------------------------------------
// convolutions

struct Settings {
  Ints stride, padding, dilation;
  int64_t groups;
  bool exact, own;
};

Tensor convolve(const Tensor& input, const Tensor& weight, const Optional& bias,
                const Settings& set) {
  using torch::stable::detail::from;
  std::array<StableIValue, 10> stack{
      from(input),       from(weight),       from(bias),       from(set.stride),
      from(set.padding), from(set.dilation), from(set.groups), from(std::string("none")),
      from(set.exact),   from(set.own)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("dlkernels::conv2d_forward", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::array<Tensor, 2> convolution_gradients(const Tensor& grad, const Tensor& input,
                                            const Tensor& weight, const Settings& set,
                                            bool want_input, bool want_weight) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 14> stack{
      from(grad),         from(input),      from(weight),
      from(Optional()),   from(set.stride), from(set.padding),
      from(set.dilation), from(set.groups), from(std::string("none")),
      from(set.exact),    from(set.own),    from(want_input),
      from(want_weight),  from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("dlkernels::conv2d_backward", "", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[2]);  // of the bias: empty
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// -------------------------------------------------------------------------------------------
// stages

// relu(scale·x + shift).
template <typename S>
Tensor normalised(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const Tensor result = empty_image(x);
  const int64_t channels = x.size(1);
  const S* const from = data_of<S>(x);
  S* const to = to_write<S>(result);
  const T *const s = data_of<T>(scale), *const t = data_of<T>(shift);
  residual_block::for_vectors<T>(
      x.numel() / channels, channels, [=](int64_t row, int64_t c, int64_t lanes) {
        const int64_t at = row * channels + c;
        const V v = fma(load(s + c, lanes), load(from + at, lanes), load(t + c, lanes));
        store(to + at, activate(Activation::kRelu, v), lanes);
      });
  return result;
}

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
  Tensor x = channels_last(input);
  Tensor output, mean = empty_sums(x, statistics ? weight.size(0) : 0),
                 var = empty_sums(x, statistics ? weight.size(0) : 0);
  for_dtype<bf16, f16>(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    if (scale) x = normalised<S>(x, *scale, *shift);
    output = channels_last(convolve(x, weight, bias, set));
    if (statistics)
      residual_block::statistics<S>(data_of<S>(output), output.numel() / output.size(1),
                                    output.size(1), to_write<T>(mean), to_write<T>(var));
  });
  return {output, mean, var};
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

std::tuple<Tensor, Tensor, Tensor> finalize(Tensor mean, Tensor var, double count, Optional weight,
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
  for (double& value : unbiased) value *= count / (count - 1);
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

Tensor folded(Tensor input, Tensor weight, Tensor scale, Tensor shift, Optional residual,
              Ints stride, Ints padding, Ints dilation, int64_t groups, bool relu, bool exact,
              bool own) {
  check_image("input", input);
  check_floating(kOp, "input", input);
  const Settings set{stride, padding, dilation, groups, exact, own};
  const Tensor y = channels_last(convolve(channels_last(input), weight, std::nullopt, set));
  check_channels("scale", scale, y);
  check_channels("shift", shift, y);
  Tensor x;
  if (residual) {
    check_like("residual", *residual, y);
    x = channels_last(*residual);
  }
  for_dtype<bf16, f16>(y.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const int64_t channels = y.size(1);
    const S* const other = residual ? data_of<S>(x) : nullptr;
    S* const to = static_cast<S*>(y.mutable_data_ptr());
    const T *const s = data_of<T>(scale), *const t = data_of<T>(shift);
    residual_block::for_vectors<T>(
        y.numel() / channels, channels, [=](int64_t row, int64_t c, int64_t lanes) {
          const int64_t at = row * channels + c;
          V v = fma(load(s + c, lanes), load(to + at, lanes), load(t + c, lanes));
          if (other) v = v + load(other + at, lanes);
          store(to + at, relu ? activate(Activation::kRelu, v) : v, lanes);
        });
  });
  return y;
}

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
Tensor coefficients(Tensor sum, Tensor product, double count, Optional weight, Tensor rstd,
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
      to[channels + c] = narrow<S>(T(training ? -a * r[at] * products[at] / count : 0));
      to[2 * channels + c] = narrow<S>(T(training ? -a * sums[at] / count : 0));
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
  const Tensor g = channels_last(grad), y = channels_last(output), x = channels_last(input);
  Tensor grad_input, grad_weight;
  const int64_t channels = x.size(1), outputs = y.size(1), rows = x.numel() / channels;
  const bool sums = inner && want_input;
  const Tensor sum = empty_sums(x, sums ? channels : 0),
               product = empty_sums(x, sums ? channels : 0);
  for_dtype<bf16, f16>(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const Tensor dy = empty_image(y);
    {
      const S *const from = data_of<S>(g), *const raw = data_of<S>(y);
      S* const to = to_write<S>(dy);
      const T *const a = data_of<T>(coefficients), *const b = a + outputs, *const d = b + outputs;
      const T* const mu = data_of<T>(output_mean);
      const uint8_t* const bytes = data_of<uint8_t>(signs);
      const int64_t row_bytes = residual_block::sign_bytes(outputs);
      residual_block::for_vectors<T>(
          y.numel() / outputs, outputs, [=](int64_t row, int64_t c, int64_t lanes) {
            const int64_t at = row * outputs + c;
            V v = load(from + at, lanes);
            if (bytes) v = residual_block::where_set(bytes + row * row_bytes, c, v, lanes);
            const V deviation = load(raw + at, lanes) - load(mu + c, lanes);
            v = fma(load(a + c, lanes), v, fma(load(b + c, lanes), deviation, load(d + c, lanes)));
            store(to + at, v, lanes);
          });
    }
    const Tensor z = inner && want_weight ? normalised<S>(x, *scale, *shift) : x;
    const auto made = convolution_gradients(dy, z, weight, set, want_input, want_weight);
    grad_input = made[0], grad_weight = made[1];
    if (!want_input) return;
    grad_input = channels_last(grad_input);
    S* const to = static_cast<S*>(grad_input.mutable_data_ptr());
    if (inner) {
      const S* const raw = data_of<S>(x);
      const T *const s = data_of<T>(*scale), *const t = data_of<T>(*shift);
      const T* const mu = data_of<T>(*mean);
      std::vector<double> totals(size_t(2 * channels));
      residual_block::sum_vectors<2, T>(
          rows, channels, totals.data(), [=](int64_t row, int64_t c, int64_t lanes, V* sums) {
            const int64_t at = row * channels + c;
            const V value = load(raw + at, lanes);
            const V z = fma(load(s + c, lanes), value, load(t + c, lanes));
            const V masked = select(exceeds(z, V(T(0))), load(to + at, lanes), V(T(0)));
            store(to + at, masked, lanes);
            sums[0] = sums[0] + masked;
            sums[1] = fma(masked, value - load(mu + c, lanes), sums[1]);
          });
      for (int64_t c = 0; c < channels; ++c) {
        static_cast<T*>(sum.mutable_data_ptr())[c] = T(totals[size_t(c)]);
        static_cast<T*>(product.mutable_data_ptr())[c] =
            T(totals[size_t(channels + c)] * double(data_of<T>(*rstd)[c]));
      }
    } else if (skip) {
      const Tensor more = channels_last(*skip);
      const S* const other = data_of<S>(more);
      const uint8_t* const bytes = data_of<uint8_t>(skip_signs);
      const int64_t row_bytes = residual_block::sign_bytes(channels);
      residual_block::for_vectors<T>(rows, channels, [=](int64_t row, int64_t c, int64_t lanes) {
        const int64_t at = row * channels + c;
        V v = load(other + at, lanes);
        if (bytes) v = residual_block::where_set(bytes + row * row_bytes, c, v, lanes);
        store(to + at, load(to + at, lanes) + v, lanes);
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
  m.impl("residual_block_reduce", TORCH_BOX(&dlkernels::reduce));
  m.impl("residual_block_coefficients", TORCH_BOX(&dlkernels::coefficients));
  m.impl("residual_block_gradient", TORCH_BOX(&dlkernels::gradient));
}

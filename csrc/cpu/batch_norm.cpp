// Batch norm: the statistics of each channel, and y = f((x − mean)·r·weight + bias + residual) in
// the pass that reads x again; its gradients in a pass for the sums and one for what is written.
// The loops are in batch_norm.h. Here: checks, layouts, the constants of a channel, registration.
//
// With g = upstream gradient · f'(y), n values a channel, d = x − mean and r = 1/√(variance + eps),
// of the variance as it is kept, so that both directions have the same:
//   y = f(d·a + shift + residual)      a = r·weight, shift = bias + what the mean lost, rounded, ·
//   a db = Σ g      dw = r·Σ g·d dx = a·g + b·d + c      b = −a·r²·(Σ g·d)/n, c = −a·(Σ g)/n; in
//   eval b = c = 0
#include "batch_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "layout.h"
#include "memory.h"

namespace dlkernels {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
using batch_norm::Moments;
using batch_norm::Parameters;
using batch_norm::Planes;
using batch_norm::Rows;
using batch_norm::Shape;
using batch_norm::Sums;

constexpr const char* kOp = "batch_norm";

// --------------------------------------------------------------------------------------- arguments

ScalarType computed(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_input(const Tensor& input) {
  check_cpu(kOp, "input", input);
  check_floating(kOp, "input", input);
  DLK_CHECK(input.dim() >= 2 && input.dim() <= 5, kOp,
            ": expected input with 2 to 5 dimensions, got shape ", shape_string(input.sizes()));
}

// As the input in shape and dtype.
void check_like(const char* name, const Tensor& input, const Optional& x) {
  if (!x) return;
  check_cpu(kOp, name, *x);
  check_dtype(kOp, name, *x, input.scalar_type());
  check_shape(kOp, name, *x, input.sizes());
}

// A number for each channel, of the input's dtype or the one computed in.
void check_of_channels(const char* name, const Tensor& input, const Optional& x) {
  if (!x) return;
  check_cpu(kOp, name, *x);
  if (x->scalar_type() != input.scalar_type())
    check_dtype(kOp, name, *x, computed(input.scalar_type()));
  check_shape(kOp, name, *x, Sizes{input.size(1)});
}
void check_computed(const char* name, const Tensor& input, const Tensor& x) {
  check_of_channels(name, input, x);
  check_dtype(kOp, name, x, computed(input.scalar_type()));
}

// ----------------------------------------------------------------------------------------- layouts

// The input's memory format, and what it is to the loops.
struct Layout {
  MemoryFormat format;
  Shape shape;

  explicit Layout(const Tensor& x) {
    const bool last = layout::suggests_channels_last(x);
    format = !last          ? MemoryFormat::Contiguous
             : x.dim() == 4 ? MemoryFormat::ChannelsLast
                            : MemoryFormat::ChannelsLast3d;
    const int64_t channels = x.size(1), values = channels ? x.numel() / channels : 0;
    if (channels == 1 && x.scalar_type() != ScalarType::Double)  // whose sums are torch's
      shape = {1, 1, values};
    else if (last)
      shape = {values, channels, 1};
    else
      shape = {x.size(0), channels, x.size(0) ? values / x.size(0) : 0};
  }
};

Tensor empty(const Sizes& sizes, ScalarType dtype, MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(sizes, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU),
                              std::nullopt, format);
}
Tensor empty_like(const Tensor& input, MemoryFormat format) {
  const auto sizes = input.sizes();
  return in_huge_pages(empty(Sizes(sizes.begin(), sizes.end()), input.scalar_type(), format));
}
Tensor of_channels(const Tensor& input, bool wanted = true) {
  return empty({wanted ? input.size(1) : 0}, computed(input.scalar_type()));
}

// x in a memory format, itself or a copy.
Tensor as(const Tensor& x, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous && x.is_contiguous()) return x;
  return torch::stable::contiguous(x, format);
}
Optional as(const Optional& x, MemoryFormat format) {
  return x ? Optional(as(*x, format)) : std::nullopt;
}

template <typename S>
const S* data(const Optional& x) {
  return x ? static_cast<const S*>(x->const_data_ptr()) : nullptr;
}
template <typename S>
S* written(const Tensor& x) {
  return x.numel() ? static_cast<S*>(x.mutable_data_ptr()) : nullptr;
}

// body(S{}, walk) with the loops that suit the layout.
template <typename Body>
void for_walk(const Tensor& input, const Shape& shape, const Body& body) {
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    shape.inner == 1 ? body(tag, Rows<S>(shape)) : body(tag, Planes<S>{shape});
  });
}

// -------------------------------------------------------------------------------------- parameters

// n numbers of a channel, of either dtype, as T; `missing` where there is no tensor.
template <typename T>
void read(const Optional& x, int64_t n, T missing, T* to) {
  if (!x) {
    std::fill_n(to, n, missing);
    return;
  }
  const Tensor dense = torch::stable::contiguous(*x);
  for_dtype<bf16, f16>(dense.scalar_type(), [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(dense.const_data_ptr());
    for (int64_t c = 0; c < n; ++c) to[c] = T(widen(from[c]));
  });
}

// What a pass over the elements reads of each channel.
template <typename T, int count>
class Constants {
 public:
  explicit Constants(int64_t channels)
      : pitch_(Aligned<T>::padded(channels)), memory_(count * pitch_) {}
  T* operator[](int k) const { return memory_.get() + k * pitch_; }
  template <int first = count>
  Parameters<T, first> all() const {
    Parameters<T, first> pointers;
    for (int k = 0; k < first; ++k) pointers[k] = (*this)[k];
    return pointers;
  }

 private:
  int64_t pitch_;
  Aligned<T> memory_;
};

// running = momentum · value + (1 − momentum) · running, each product rounded, as torch's are:
// hence the array.
void update(const Optional& running, double momentum, std::vector<double> value) {
  if (!running) return;
  for (double& v : value) v *= momentum;
  for_dtype<bf16, f16>(running->scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    S* const to = static_cast<S*>(running->mutable_data_ptr());
    std::vector<double> old(value.size());
    for (size_t c = 0; c < value.size(); ++c) old[c] = (1 - momentum) * double(widen(to[c]));
    for (size_t c = 0; c < value.size(); ++c) to[c] = narrow<S>(accumulate_t<S>(value[c] + old[c]));
  });
}

// r
template <typename T>
T rstd_of(T variance, double eps) {
  return T(1 / std::sqrt(double(variance) + eps));
}

// ------------------------------------------------------------------------------------------ passes

// y = f((x − mean)·scale + shift + residual), of constants in this order.
template <typename S, typename Act>
struct Normalise {
  using V = Vec<accumulate_t<S>>;
  Act act;
  const S *x, *residual;
  S* y;

  void operator()(int64_t at, int64_t lanes, const V (&p)[3]) const {
    V value = fma(load(x + at, lanes) - p[0], p[1], p[2]);
    if (residual) value = value + load(residual + at, lanes);
    store(y + at, activate(act, value), lanes);
  }
  void prefetch(int64_t at) const {
    __builtin_prefetch(x + at, 0, 2);
    if (residual) __builtin_prefetch(residual + at, 0, 2);
  }
};

// dx = a·g + b·(x − mean) + c, without statistics of the batch a·g, of constants mean, a, shift, b
// and c; and g itself.
template <typename S, typename From>
struct Differentiate {
  using V = Vec<accumulate_t<S>>;
  From from;
  bool training;
  const S *dy, *x;
  S *dx, *g_to;

  void operator()(int64_t at, int64_t lanes, const V (&p)[5]) const {
    const bool reads = From::kReadsInput || training;
    const V d = reads ? load(x + at, lanes) - p[0] : p[0];
    const V g = from(load(dy + at, lanes), at, lanes, d, p[1], p[2]);
    if (g_to) store(g_to + at, g, lanes);
    if (!dx) return;
    V value = p[1] * g;
    if (training) value = value + fma(p[3], d, p[4]);
    store(dx + at, value, lanes);
  }
  void prefetch(int64_t at) const {
    __builtin_prefetch(dy + at, 0, 2);
    if (From::kReadsInput || training) __builtin_prefetch(x + at, 0, 2);
    from.prefetch(at);
  }
};

// Whether g may be read again from where it was written, rounded.
template <typename S>
bool keeps_bits(Activation act) {
  return sizeof(S) == sizeof(accumulate_t<S>) || act == Activation::kRelu;
}

struct Training {
  Tensor output, mean, var, shift;
};
using Made = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// With the statistics of this batch.
Training train(const Tensor& input, const Optional& weight, const Optional& bias,
               const Optional& residual, const Optional& running_mean, const Optional& running_var,
               double momentum, double eps, const std::string& activation) {
  check_input(input);
  check_of_channels("weight", input, weight);
  check_of_channels("bias", input, bias);
  check_like("residual", input, residual);
  for (const auto& [name, running] :
       {std::pair{"running_mean", running_mean}, std::pair{"running_var", running_var}}) {
    check_of_channels(name, input, running);
    if (running) check_contiguous(kOp, name, *running);
  }
  const Activation act = parse_activation(kOp, activation);
  const Layout layout(input);
  const int64_t channels = input.size(1), n = layout.shape.values();
  DLK_CHECK(n != 1 || channels == 0, kOp,
            ": expected more than 1 value per channel when training, got input size ",
            shape_string(input.sizes()));
  const Training made{empty_like(input, layout.format), of_channels(input), of_channels(input),
                      of_channels(input)};
  if (input.numel() == 0) {
    for (const Tensor* x : {&made.mean, &made.var, &made.shift})
      torch::stable::zero_(const_cast<Tensor&>(*x));
    return made;
  }
  const Tensor laid = as(input, layout.format);
  const Optional added = as(residual, layout.format);
  std::vector<Moments> moments(channels);
  for_walk(input, layout.shape, [&](auto tag, const auto& walk) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const S* const x = data<S>(laid);
    T* const mean = written<T>(made.mean);
    T* const var = written<T>(made.var);
    T* const shift = written<T>(made.shift);
    const Constants<T, 3> constants(channels);
    std::vector<T> weights(channels);
    read(weight, channels, T(1), weights.data());
    read(bias, channels, T(0), shift);
    const auto then = [&](int64_t c) {
      const Moments& m = moments[c];
      constants[0][c] = mean[c] = T(m.mean);
      var[c] = T(m.squares / double(n));
      const T scale = constants[1][c] = rstd_of(var[c], eps) * weights[c];
      // What the mean loses when it is rounded.
      const double lost = (double(mean[c]) - m.mean) * double(scale);
      constants[2][c] = shift[c] = T(double(shift[c]) + lost);
    };
    batch_norm::for_activation(act, [&](auto act) {
      walk.template run_moments<3>(
          x, moments.data(), then, constants.all(),
          Normalise<S, decltype(act)>{act, x, data<S>(added), written<S>(made.output)});
    });
  });
  std::vector<double> means(channels), variances(channels);
  for (int64_t c = 0; c < channels; ++c) {
    means[c] = moments[c].mean;
    variances[c] = moments[c].squares / double(n - 1);
  }
  update(running_mean, momentum, std::move(means));
  update(running_var, momentum, std::move(variances));
  return made;
}

// ------------------------------------------------------------------------------------ host entries

Made batch_norm_public(Tensor input, Optional weight, Optional bias, Optional residual, double eps,
                       Text activation, bool) {
  const Training made =
      train(input, weight, bias, residual, std::nullopt, std::nullopt, 0, eps, activation);
  return {made.output, made.mean, made.var, made.shift};
}

Made batch_norm_forward(Tensor input, Optional weight, Optional bias, Optional residual,
                        Optional running_mean, Optional running_var, double momentum, double eps,
                        Text activation, bool) {
  const Training made =
      train(input, weight, bias, residual, running_mean, running_var, momentum, eps, activation);
  return {made.output, made.mean, made.var, made.shift};
}

Tensor batch_norm_apply(Tensor input, Optional weight, Optional bias, Optional residual,
                        Tensor mean, Tensor var, double eps, Text activation, bool) {
  check_input(input);
  check_of_channels("weight", input, weight);
  check_of_channels("bias", input, bias);
  check_like("residual", input, residual);
  check_of_channels("mean", input, mean);
  check_of_channels("var", input, var);
  const Activation act = parse_activation(kOp, activation);
  const Layout layout(input);
  const Tensor output = empty_like(input, layout.format);
  if (input.numel() == 0) return output;
  const int64_t channels = input.size(1);
  const Tensor laid = as(input, layout.format);
  const Optional added = as(residual, layout.format);
  for_walk(input, layout.shape, [&](auto tag, const auto& walk) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const Constants<T, 3> constants(channels);
    std::vector<T> weights(channels);
    read(Optional(mean), channels, T(0), constants[0]);
    read(Optional(var), channels, T(0), constants[1]);
    read(bias, channels, T(0), constants[2]);
    read(weight, channels, T(1), weights.data());
    for (int64_t c = 0; c < channels; ++c)
      constants[1][c] = rstd_of(constants[1][c], eps) * weights[c];
    batch_norm::for_activation(act, [&](auto act) {
      walk.template for_all<3>(
          constants.all(),
          Normalise<S, decltype(act)>{act, data<S>(laid), data<S>(added), written<S>(output)});
    });
  });
  return output;
}

// What the gradients are made from.
struct Gradients {
  const Tensor &grad_output, &input;
  const Optional &weight, &shift, &output;
  const Tensor &mean, &var;
  double eps;
  Activation act;

  void check() const {
    check_input(input);
    check_like("grad_output", input, grad_output);
    check_of_channels("weight", input, weight);
    check_of_channels("shift", input, shift);
    check_of_channels("mean", input, mean);
    check_of_channels("var", input, var);
    DLK_CHECK(output ? act != Activation::kNone : act == Activation::kNone || is_of_sign(act), kOp,
              ": expected the output where the activation needs it, and not where there is none");
    check_like("output", input, output);
  }
  // Where the sign of y is found.
  bool is_from_input() const { return !output && act != Activation::kNone; }

  // mean, a and shift; and r, of each channel.
  template <typename T>
  void read_constants(const Constants<T, 5>& constants, T* rstds) const {
    const int64_t channels = input.size(1);
    read(Optional(mean), channels, T(0), constants[0]);
    read(weight, channels, T(1), constants[1]);
    read(shift, channels, T(0), constants[2]);
    read(Optional(var), channels, T(0), rstds);
    for (int64_t c = 0; c < channels; ++c) {
      rstds[c] = rstd_of(rstds[c], eps);
      constants[1][c] = rstds[c] * constants[1][c];
    }
  }

  // body(from) with where f' comes from.
  template <typename S, typename Body>
  void for_derivative(const S* y, const Body& body) const {
    batch_norm::for_activation(act, [&](auto act) {
      using Act = decltype(act);
      if constexpr (!batch_norm::is_none<Act> && !std::is_same_v<Act, Activation>)
        if (is_from_input()) return body(batch_norm::FromInput<S, Act>{act});
      body(batch_norm::FromOutput<S, Act>{act, y});
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    Tensor grad_output, Tensor input, Optional weight, Optional shift, Optional output, Tensor mean,
    Tensor var, bool training, double eps, Text activation, bool, bool want_input, bool want_weight,
    bool want_bias, bool want_residual) {
  const Gradients of{
      grad_output, input, weight, shift, output, mean, var, eps, parse_activation(kOp, activation)};
  of.check();
  const Layout layout(input);
  const Tensor none = empty({0}, input.scalar_type());
  const Tensor grad_input = want_input ? empty_like(input, layout.format) : none;
  const Tensor grad_residual = want_residual ? empty_like(input, layout.format) : none;
  const Tensor grad_weight = of_channels(input, want_weight);
  const Tensor grad_bias = of_channels(input, want_bias);
  if (input.numel() == 0) {
    torch::stable::zero_(const_cast<Tensor&>(grad_weight));
    torch::stable::zero_(const_cast<Tensor&>(grad_bias));
    return {grad_input, grad_weight, grad_bias, grad_residual};
  }
  const int64_t channels = input.size(1), n = layout.shape.values();
  const bool sums = want_weight || want_bias || (training && want_input);
  const bool reads = want_weight || (training && want_input) || of.is_from_input();  // the input
  const Tensor grad = as(grad_output, layout.format);
  const Tensor laid = reads ? as(input, layout.format) : grad;
  const Optional outputs = as(output, layout.format);
  for_walk(input, layout.shape, [&](auto tag, const auto& walk) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const S *dy = data<S>(grad), *x = data<S>(laid), *y = data<S>(outputs);
    S *const dx = written<S>(grad_input), *const g_to = written<S>(grad_residual);
    const bool keeps = g_to && y && sums && keeps_bits<S>(of.act);
    const Constants<T, 5> constants(channels);
    std::vector<T> rstds(channels);
    std::vector<Sums> total(channels);
    of.read_constants(constants, rstds.data());
    const auto then = [&](int64_t c) {
      const double r = double(rstds[c]), a = double(constants[1][c]);
      if (want_weight) written<T>(grad_weight)[c] = T(total[c].dot * r);
      if (want_bias) written<T>(grad_bias)[c] = T(total[c].g);
      constants[3][c] = T(-a * r * r * (total[c].dot / double(n)));
      constants[4][c] = T(-a * (total[c].g / double(n)));
    };
    of.for_derivative(y, [&](const auto& from) {
      using From = std::decay_t<decltype(from)>;
      Differentiate<S, From> body{from, training && dx, dy, x, dx, g_to};
      if constexpr (!From::kReadsInput)
        if (keeps) body.from.y = nullptr, body.dy = g_to, body.g_to = nullptr;
      S* const first = keeps ? g_to : nullptr;
      const bool again = dx || body.g_to;
      if (sums && again) {
        walk.template run_sums<5>(from, dy, x, first, constants.template all<3>(), total.data(),
                                  then, constants.all(), body);
        return;
      }
      if (sums) walk.sums(from, dy, x, first, constants.template all<3>(), total.data());
      for (int64_t c = 0; c < channels; ++c) then(c);
      if (again) walk.template for_all<5>(constants.all(), body);
    });
  });
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor input, bool) {
  check_input(input);
  const Layout layout(input);
  const Tensor mean = of_channels(input), var = of_channels(input);
  if (input.numel() == 0) {
    torch::stable::zero_(const_cast<Tensor&>(mean));
    torch::stable::zero_(const_cast<Tensor&>(var));
    return {mean, var};
  }
  const Tensor laid = as(input, layout.format);
  for_walk(input, layout.shape, [&](auto tag, const auto& walk) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    std::vector<Moments> moments(input.size(1));
    walk.moments(data<S>(laid), moments.data());
    for (size_t c = 0; c < moments.size(); ++c) {
      written<T>(mean)[c] = T(moments[c].mean);
      written<T>(var)[c] = T(moments[c].squares / moments[c].n);
    }
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor> batch_norm_reduce(Tensor grad_output, Tensor input, Optional weight,
                                             Optional shift, Optional output, Tensor mean,
                                             Tensor var, double eps, Text activation, bool own) {
  auto [grad_input, dot, sum, grad_residual] =
      batch_norm_backward(grad_output, input, weight, shift, output, mean, var, true, eps,
                          activation, own, false, true, true, false);
  return {sum, dot};
}

std::tuple<Tensor, Tensor> batch_norm_gradient(Tensor grad_output, Tensor input, Optional weight,
                                               Optional shift, Optional output, Tensor mean,
                                               Tensor var, Tensor mean_g, Tensor mean_g_xhat,
                                               double eps, Text activation, bool,
                                               bool want_residual) {
  const Gradients of{
      grad_output, input, weight, shift, output, mean, var, eps, parse_activation(kOp, activation)};
  of.check();
  check_computed("mean_g", input, mean_g);
  check_computed("mean_g_xhat", input, mean_g_xhat);
  const Layout layout(input);
  const Tensor grad_input = empty_like(input, layout.format);
  const Tensor grad_residual =
      want_residual ? empty_like(input, layout.format) : empty({0}, input.scalar_type());
  if (input.numel() == 0) return {grad_input, grad_residual};
  const int64_t channels = input.size(1);
  const Tensor grad = as(grad_output, layout.format), laid = as(input, layout.format);
  const Optional outputs = as(output, layout.format);
  for_walk(input, layout.shape, [&](auto tag, const auto& walk) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const Constants<T, 5> constants(channels);
    std::vector<T> rstds(channels);
    of.read_constants(constants, rstds.data());
    read(Optional(mean_g_xhat), channels, T(0), constants[3]);
    read(Optional(mean_g), channels, T(0), constants[4]);
    for (int64_t c = 0; c < channels; ++c) {
      const double a = double(constants[1][c]);
      constants[3][c] = T(-a * double(rstds[c]) * double(constants[3][c]));
      constants[4][c] = T(-a * double(constants[4][c]));
    }
    of.for_derivative(data<S>(outputs), [&](const auto& from) {
      walk.template for_all<5>(constants.all(),
                               Differentiate<S, std::decay_t<decltype(from)>>{
                                   from, true, data<S>(grad), data<S>(laid), written<S>(grad_input),
                                   written<S>(grad_residual)});
    });
  });
  return {grad_input, grad_residual};
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&dlkernels::batch_norm_public));
  m.impl("batch_norm_eval", TORCH_BOX(&dlkernels::batch_norm_apply));
  m.impl("batch_norm_forward", TORCH_BOX(&dlkernels::batch_norm_forward));
  m.impl("batch_norm_apply", TORCH_BOX(&dlkernels::batch_norm_apply));
  m.impl("batch_norm_backward", TORCH_BOX(&dlkernels::batch_norm_backward));
  m.impl("batch_norm_statistics", TORCH_BOX(&dlkernels::batch_norm_statistics));
  m.impl("batch_norm_reduce", TORCH_BOX(&dlkernels::batch_norm_reduce));
  m.impl("batch_norm_gradient", TORCH_BOX(&dlkernels::batch_norm_gradient));
}

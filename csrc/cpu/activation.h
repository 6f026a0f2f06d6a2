// The activations of an epilogue, and their derivatives, which follow from the output alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "../check.h"
#include "simd.h"

namespace dlkernels {

// Out of line: an epilogue that is unrolled would hold it many times.
template <typename T>
[[gnu::noinline]] Vec<T> activate_smooth(Activation activation, Vec<T> x) {
  const Vec<T> one(T(1));
  return activation == Activation::kTanh ? tanh(x) : one / (one + exp(Vec<T>(T(0)) - x));
}

template <typename T>
Vec<T> activate(Activation activation, Vec<T> x) {
  using V = Vec<T>;
  const V zero(T(0));
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return select(less(x, zero), zero, x);
    case Activation::kLeakyRelu:
      return select(less(x, zero), V(T(kSlope)) * x, x);
    default:
      return activate_smooth(activation, x);
  }
}

// g · act'(x) from y = act(x). As stock's: where a ReLU is 0 an infinite g is too, and where it is
// NaN g passes.
template <typename T>
Vec<T> through(Activation activation, Vec<T> g, Vec<T> y) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1));
  switch (activation) {
    case Activation::kNone:
      return g;
    case Activation::kRelu:
      return select(less(zero, y), g, select(less(y, one), zero, g));
    case Activation::kLeakyRelu:
      return select(less(zero, y), g, V(T(kSlope)) * g);
    case Activation::kTanh:
      return g * (one - y * y);
    default:
      return g * (y * (one - y));
  }
}

// to[i] = function(i, lanes) for each vector of n elements, over all threads.
template <typename S, typename Function>
void for_each_vector(int64_t n, S* to, const Function& function) {
  using V = Vec<accumulate_t<S>>;
  constexpr int64_t kGrain = 1 << 16;  // fewest elements worth a second thread
  torch::stable::parallel_for(
      0, (n + V::size - 1) / V::size, kGrain / V::size, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * V::size; i < std::min(n, end * V::size); i += V::size) {
          const int64_t lanes = std::min(V::size, n - i);
          store(to + i, function(i, lanes), lanes);
        }
      });
}

// n elements of x through the activation, in their place.
template <typename S>
void activate_in_place(Activation activation, S* x, int64_t n) {
  for_each_vector(
      n, x, [=](int64_t i, int64_t lanes) { return activate(activation, load(x + i, lanes)); });
}

// z = g · act'(…) of n elements, from y = act(…).
template <typename S>
void before_activation(Activation activation, const S* g, const S* y, S* z, int64_t n) {
  for_each_vector(n, z, [=](int64_t i, int64_t lanes) {
    return through(activation, load(g + i, lanes), load(y + i, lanes));
  });
}

// The same of tensors, in a layout of the output's.
inline torch::stable::Tensor before_activation(
    Activation activation, const torch::stable::Tensor& grad_output,
    const torch::stable::Tensor& output,
    torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) {
  const auto g = torch::stable::contiguous(grad_output, format);
  const auto y = torch::stable::contiguous(output, format);
  const auto z = torch::stable::empty_like(g);
  for_dtype<bf16, f16>(g.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    before_activation(activation, static_cast<const S*>(g.const_data_ptr()),
                      static_cast<const S*>(y.const_data_ptr()),
                      static_cast<S*>(z.mutable_data_ptr()), g.numel());
  });
  return z;
}

}  // namespace dlkernels

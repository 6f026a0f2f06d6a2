// The activations of an epilogue: those whose derivative follows from the output.
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include "../check.h"
#include "simd.h"

namespace dlkernels {

enum class Activation { kNone, kRelu, kLeakyRelu, kTanh, kSigmoid };
constexpr double kSlope = 0.01;  // of leaky_relu

inline Activation parse_activation(const char* op, const std::string& name) {
  constexpr std::array<const char*, 5> kNames{"none", "relu", "leaky_relu", "tanh", "sigmoid"};
  const auto* found = std::find(kNames.begin(), kNames.end(), name);
  DLK_CHECK(found != kNames.end(), op,
            ": expected activation none, relu, leaky_relu, tanh or sigmoid, got ", name);
  return Activation(found - kNames.begin());
}

template <typename T>
Vec<T> activate(Activation activation, Vec<T> x) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1));
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return select(less(x, zero), zero, x);
    case Activation::kLeakyRelu:
      return select(less(x, zero), V(T(kSlope)) * x, x);
    case Activation::kTanh:
      return tanh(x);
    default:
      return one / (one + exp(zero - x));
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

}  // namespace dlkernels

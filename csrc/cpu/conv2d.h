// Plain loops in the place of the algorithms of conv2d.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace dlkernels::conv2d {

using torch::headeronly::ScalarType;

struct Shape {
  int64_t n, c, h, w;  // input
  int64_t k, r, s;     // weight: k × (c / groups) × r × s
  int64_t p, q;        // output
  int64_t stride[2], padding[2], dilation[2], groups;
};

enum class Algorithm { kAten, kDirect, kWinograd, kDepthwise };
enum class Direction { kForward, kInputGradient, kWeightGradient };

// Element (k, c, r, s), c within the group.
template <typename S>
struct Weight {
  S* data;
  int64_t stride[4];
  S* at(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return data + k * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
  }
};

inline Algorithm choose(const Shape& shape, ScalarType dtype, Direction, bool exact, bool own) {
  if (!own || std::max(shape.dilation[0], shape.dilation[1]) > 8) return Algorithm::kAten;
  if (shape.groups > 1 && shape.groups == shape.c) return Algorithm::kDepthwise;
  const bool square = shape.r == 3 && shape.s == 3 && shape.stride[0] == 1 && shape.stride[1] == 1;
  return square && !exact && shape.groups == 1 && dtype == ScalarType::Float ? Algorithm::kWinograd
                                                                             : Algorithm::kDirect;
}

// One vector of one lane through the epilogue.
template <typename S, typename Epilogue>
void write(double value, int64_t channel, S* to, const Epilogue& epilogue) {
  using T = accumulate_t<S>;
  store(to, epilogue(Vec<T>(T(value)), channel, int64_t(1)), 1);
}

template <typename S, typename Epilogue>
void forward(const Shape& d, Algorithm, const S* x, Weight<const S> w, S* y,
             const Epilogue& epilogue) {
  const int64_t c_in = d.c / d.groups, k_in = d.k / d.groups;
  torch::stable::parallel_for(0, d.n * d.p * d.q, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / (d.p * d.q), p = at / d.q % d.p, q = at % d.q;
      for (int64_t k = 0; k < d.k; ++k) {
        double sum = 0;
        for (int64_t r = 0; r < d.r; ++r)
          for (int64_t s = 0; s < d.s; ++s) {
            const int64_t h = p * d.stride[0] - d.padding[0] + r * d.dilation[0];
            const int64_t v = q * d.stride[1] - d.padding[1] + s * d.dilation[1];
            if (h < 0 || h >= d.h || v < 0 || v >= d.w) continue;
            for (int64_t c = 0; c < c_in; ++c)
              sum += double(widen(x[((n * d.h + h) * d.w + v) * d.c + k / k_in * c_in + c])) *
                     double(widen(*w.at(k, c, r, s)));
          }
        write(sum, k, y + at * d.k + k, epilogue);
      }
    }
  });
}

template <typename S, typename Epilogue>
void input_gradient(const Shape& d, Algorithm, const S* dy, Weight<const S> w, S* dx,
                    const Epilogue& epilogue) {
  const int64_t c_in = d.c / d.groups, k_in = d.k / d.groups;
  torch::stable::parallel_for(0, d.n * d.h * d.w, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / (d.h * d.w), h = at / d.w % d.h, v = at % d.w;
      for (int64_t c = 0; c < d.c; ++c) {
        double sum = 0;
        for (int64_t r = 0; r < d.r; ++r)
          for (int64_t s = 0; s < d.s; ++s) {
            const int64_t p = h + d.padding[0] - r * d.dilation[0];
            const int64_t q = v + d.padding[1] - s * d.dilation[1];
            if (p < 0 || p % d.stride[0] || p / d.stride[0] >= d.p) continue;
            if (q < 0 || q % d.stride[1] || q / d.stride[1] >= d.q) continue;
            const S* const row =
                dy + ((n * d.p + p / d.stride[0]) * d.q + q / d.stride[1]) * d.k + c / c_in * k_in;
            for (int64_t k = 0; k < k_in; ++k)
              sum += double(widen(row[k])) * double(widen(*w.at(c / c_in * k_in + k, c % c_in, r, s)));
          }
        write(sum, c, dx + at * d.c + c, epilogue);
      }
    }
  });
}

template <typename S>
void weight_gradient(const Shape& d, Algorithm, const S* dy, const S* x, Weight<S> dw) {
  const int64_t c_in = d.c / d.groups, k_in = d.k / d.groups;
  torch::stable::parallel_for(0, d.k * c_in, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t k = at / c_in, c = at % c_in;
      for (int64_t r = 0; r < d.r; ++r)
        for (int64_t s = 0; s < d.s; ++s) {
          double sum = 0;
          for (int64_t n = 0; n < d.n; ++n)
            for (int64_t p = 0; p < d.p; ++p)
              for (int64_t q = 0; q < d.q; ++q) {
                const int64_t h = p * d.stride[0] - d.padding[0] + r * d.dilation[0];
                const int64_t v = q * d.stride[1] - d.padding[1] + s * d.dilation[1];
                if (h < 0 || h >= d.h || v < 0 || v >= d.w) continue;
                sum += double(widen(dy[((n * d.p + p) * d.q + q) * d.k + k])) *
                       double(widen(x[((n * d.h + h) * d.w + v) * d.c + k / k_in * c_in + c]));
              }
          *dw.at(k, c, r, s) = narrow<S>(accumulate_t<S>(sum));
        }
    }
  });
}

}  // namespace dlkernels::conv2d

// The geometry of a convolution, which all its algorithms share. Tensors are dense NHWC here, where
// nothing else is said.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dlkernels::conv2d {

struct Shape {
  int64_t n, c, h, w;  // of the input
  int64_t k, r, s;     // of the weight: k × (c / groups) × r × s
  int64_t p, q;        // of the output
  int64_t stride[2], padding[2], dilation[2], groups;

  int64_t pixels() const { return n * p * q; }
  int64_t multiply_adds() const { return pixels() * k * (c / groups) * r * s; }
  bool is(int64_t size, int64_t step) const {
    return r == size && s == size && stride[0] == step && stride[1] == step;
  }
};

// An image stack, in NCHW where there are `planes`.
template <typename S>
struct Images {
  S* data;
  bool planes;
};

// The element (k, c, r, s) of a weight, or of its gradient, stands at the sum of index · stride.
template <typename S>
struct Weight {
  S* data;
  int64_t stride[4];

  S* at(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return data + k * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
  }
};

}  // namespace dlkernels::conv2d

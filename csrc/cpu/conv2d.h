// The algorithms of conv2d, and which of them a convolution takes. Tensors are dense NHWC, and of
// Winograd's also NCHW.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "conv2d_depthwise.h"
#include "conv2d_direct.h"
#include "conv2d_shape.h"
#include "conv2d_small.h"
#include "conv2d_winograd.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::conv2d {

using torch::headeronly::ScalarType;

enum class Algorithm { kAten, kDirect, kWinograd, kDepthwise, kFewChannels, kSmall };
enum class Direction { kForward, kInputGradient, kWeightGradient };

inline bool takes_planes(Algorithm algorithm) { return algorithm == Algorithm::kWinograd; }

// What is asked for beyond the shape.
struct Call {
  bool channels_last, exact, own;  // channels_last: the output
};

// Up to 8 channels 1.1 to 10 times as fast as the direct algorithm, but for what is to be written
// with many channels side by side.
inline bool suits_few_channels(const Shape& shape, Direction direction, const Call& call) {
  const bool scattered = call.channels_last && shape.k > 16;
  return shape.groups == 1 && shape.stride[0] == 1 && shape.stride[1] == 1 &&
         shape.dilation[0] == 1 && shape.dilation[1] == 1 && shape.c <= 8 &&
         !(direction == Direction::kForward && scattered);
}

// Whether Winograd's algorithm may be the one for a weight, whatever the image: of channels that
// pay for its transforms. Its rounding is several times that of a short sum of products, and
// torch's sums are the better where channels do not fill its blocks.
inline bool may_be_winograd(const Shape& shape, ScalarType dtype) {
  constexpr int64_t kFewest = 16, kMany = 64;
  const int64_t fewest = std::min(shape.c, shape.k);
  const bool enough =
      fewest >= kMany || (fewest >= kFewest && shape.c % kFewest == 0 && shape.k % kFewest == 0);
  return shape.is(3, 1) && shape.dilation[0] == 1 && shape.dilation[1] == 1 && shape.groups == 1 &&
         enough && dtype != ScalarType::Double;
}

// Small images, whose pairs of a pixel and a tap have a product each, of as many rows as there are
// images; the weight gradient's are as large for any image. Without padding or stride a product of
// all pixels is as good.
inline bool is_small(const Shape& shape, Direction direction) {
  constexpr int64_t kImages = 8, kChannels = 16;
  const int64_t pixels = direction == Direction::kWeightGradient ? 64 : 16;
  const bool pixels_alone = shape.is(1, 1) && shape.padding[0] == 0 && shape.padding[1] == 0;
  return shape.groups == 1 && !pixels_alone && shape.n >= kImages &&
         std::min(shape.c, shape.k) >= kChannels && shape.h * shape.w <= pixels &&
         shape.p * shape.q <= pixels;
}

// Which of ours suits the geometry.
inline Algorithm suited(const Shape& shape, ScalarType dtype, Direction direction,
                        const Call& call) {
  // Of few tiles the weight gradient's sums are short as well.
  const int64_t tiles = direction == Direction::kInputGradient
                            ? winograd::Tiles(shape.n, shape.h, shape.w).count
                            : winograd::Tiles(shape.n, shape.p, shape.q).count;
  const bool few = tiles < (direction == Direction::kWeightGradient ? 64 : 4);
  if (shape.groups > 1 && shape.groups == shape.c && shape.groups == shape.k)
    return Algorithm::kDepthwise;
  const bool winograd = may_be_winograd(shape, dtype) && !call.exact && !few;
  // Where Winograd's products are no fewer, it has its transforms besides.
  if (is_small(shape, direction) &&
      !(winograd && small::meetings(shape) * shape.n > winograd::kPoints * tiles))
    return Algorithm::kSmall;
  if (winograd) return Algorithm::kWinograd;
  if (suits_few_channels(shape, direction, call)) return Algorithm::kFewChannels;
  return Algorithm::kDirect;
}

// Whether ours is known to be the faster: Winograd's where the products that it saves, of 4 at best
// less what tiles beyond the edge and lanes beyond the last channel take, pay for the transforms
// and for its way here. torch's bf16 products run at twice the rate of float's, where the processor
// has them; its direct algorithms are at the multiply-add peak, but for small images: there ours
// takes, of 64 channels and more, 1/3 to all of the time, and of up to 8×8 pixels 2/3 in the weight
// gradient.
inline bool pays(const Shape& shape, ScalarType dtype, Direction direction, const Call& call,
                 Algorithm ours) {
  const bool of_weight = direction == Direction::kWeightGradient;
  const bool of_input = direction == Direction::kInputGradient;
  if (ours == Algorithm::kDepthwise)  // torch's of 5×5 and more is 4 to 7 times as slow
    return dtype == ScalarType::Float && of_weight && call.channels_last &&
           shape.multiply_adds() >= (shape.r * shape.s > 9 ? 1 << 23 : 1 << 25);
  if (ours == Algorithm::kFewChannels)
    return dtype == ScalarType::Float &&
           (of_input ? shape.c <= 6 : shape.c == 1 && shape.k <= (of_weight ? 16 : 8));
  if (ours == Algorithm::kSmall)
    return dtype == ScalarType::Float && std::min(shape.c, shape.k) >= 64 &&
           shape.multiply_adds() >= (shape.h * shape.w <= 16 ? 1 << 21 : 1 << 26);
  if (ours != Algorithm::kWinograd) return false;
  const int64_t outputs = of_input ? shape.c : shape.k;
  const winograd::Tiles tiles = of_input ? winograd::Tiles(shape.n, shape.h, shape.w)
                                         : winograd::Tiles(shape.n, shape.p, shape.q);
  const int64_t pixels = of_input ? shape.n * shape.h * shape.w : shape.pixels();
  double saved = 4.0 * double(pixels) / double(tiles.count * 16);
  if (!of_weight)
    saved *= double(outputs) / double(winograd::panels_of(outputs) * winograd::kPanel);
  const int64_t work = shape.multiply_adds();
#if DLK_BF16
  if (dtype == ScalarType::BFloat16)
    return saved >= (of_weight ? 3 : 3.5) && work >= (of_weight ? 1 << 21 : 1 << 27);
#endif
  return saved >= 2 && work >= 1 << 21 && pixels >= 40;
}

// kAten only where it is not to be our own.
inline Algorithm choose(const Shape& shape, ScalarType dtype, Direction direction,
                        const Call& call) {
  const Algorithm ours = suited(shape, dtype, direction, call);
  return call.own || pays(shape, dtype, direction, call, ours) ? ours : Algorithm::kAten;
}

namespace detail {

// The 3×3 weight as float in order of k, c, r, s: itself, or a copy that `keep` holds.
template <typename S>
const float* as_float(const Shape& shape, const Weight<const S>& w, const Aligned<float>& keep) {
  if constexpr (std::is_same_v<S, float>)
    if (w.stride[0] == shape.c * 9 && w.stride[1] == 9 && w.stride[2] == 3 && w.stride[3] == 1)
      return w.data;
  torch::stable::parallel_for(0, shape.k, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t tap = 0; tap < 9; ++tap)
        for (int64_t c = 0; c < shape.c; ++c)
          keep.get()[(k * shape.c + c) * 9 + tap] = widen(*w.at(k, c, tap / 3, tap % 3));
  });
  return keep.get();
}

template <typename S>
constexpr bool has_winograd = !std::is_same_v<S, double>;

}  // namespace detail

// The number of elements of what prepare makes of a weight, of a shape without an image.
inline int64_t prepared_size(const Shape& shape) {
  return winograd::Filters{nullptr, shape.c, shape.k, false}.size();
}

// What forward reads in place of the weight, where the algorithm is Winograd's.
template <typename S>
void prepare(const Shape& shape, Weight<const S> w, float* to) {
  Aligned<float> keep(shape.k * shape.c * 9);
  winograd::Filters{detail::as_float(shape, w, keep), shape.c, shape.k, false}.transform_all(to);
}

// By Winograd, of sources in place of x and dy: see conv2d_winograd.h.
template <typename S, typename Source, typename Target, typename Epilogue>
void winograd_forward(const Shape& shape, const Source& x, Weight<const S> w, const Target& y,
                      const Epilogue& epilogue, const float* prepared = nullptr) {
  const Aligned<float> keep(prepared ? 0 : shape.k * shape.c * 9);
  const float* const given = prepared ? nullptr : detail::as_float(shape, w, keep);
  const winograd::Filters filters{given, shape.c, shape.k, false, prepared};
  winograd::Correlation<Source, Target, Epilogue>{
      x, shape.n, shape.h, shape.w, filters, {shape.padding[0], shape.padding[1]},
      y, shape.p, shape.q, epilogue}
      .run();
}

template <typename S, typename Source, typename Target, typename Epilogue>
void winograd_input_gradient(const Shape& shape, const Source& dy, Weight<const S> w,
                             const Target& dx, const Epilogue& epilogue) {
  const Aligned<float> keep(shape.k * shape.c * 9);
  const winograd::Filters filters{detail::as_float(shape, w, keep), shape.k, shape.c, true};
  winograd::Correlation<Source, Target, Epilogue>{
      dy, shape.n, shape.p, shape.q, filters, {2 - shape.padding[0], 2 - shape.padding[1]},
      dx, shape.h, shape.w, epilogue}
      .run();
}

template <typename S, typename Y, typename X>
void winograd_weight_gradient(const Shape& shape, const Y& dy, const X& x, Weight<S> dw) {
  winograd::WeightGradient<X, Y, S>{
      x,  shape.n, shape.h, shape.w, shape.c, {shape.padding[0], shape.padding[1]},
      dy, shape.p, shape.q, shape.k, dw}
      .run();
}

// y = epilogue(conv(x, w)); epilogue(value, channel, lanes) takes vectors of channels. `prepared`
// is of the same weight, or null.
template <typename S, typename Epilogue>
void forward(const Shape& shape, Algorithm algorithm, Images<const S> x, Weight<const S> w,
             Images<S> y, const Epilogue& epilogue, const float* prepared = nullptr) {
  if (algorithm == Algorithm::kDepthwise)
    return depthwise::forward(shape, x.data, w, y.data, epilogue);
  if (algorithm == Algorithm::kSmall) return small::forward(shape, x.data, w, y.data, epilogue);
  if constexpr (detail::has_winograd<S>)
    if (algorithm == Algorithm::kWinograd)
      return winograd_forward(shape, x, w, y, epilogue, prepared);
  direct_forward(shape, x.data, w, y.data, epilogue);
}

// dx = epilogue(…): a transposed convolution is one with an epilogue.
template <typename S, typename Epilogue>
void input_gradient(const Shape& shape, Algorithm algorithm, Images<const S> dy, Weight<const S> w,
                    Images<S> dx, const Epilogue& epilogue) {
  if (algorithm == Algorithm::kDepthwise)
    return depthwise::input_gradient(shape, dy.data, w, dx.data, epilogue);
  if (algorithm == Algorithm::kSmall)
    return small::input_gradient(shape, dy.data, w, dx.data, epilogue);
  if constexpr (detail::has_winograd<S>)
    if (algorithm == Algorithm::kWinograd)
      return winograd_input_gradient(shape, dy, w, dx, epilogue);
  direct_input_gradient(shape, dy.data, w, dx.data, epilogue);
}

template <typename S>
void weight_gradient(const Shape& shape, Algorithm algorithm, Images<const S> dy, Images<const S> x,
                     Weight<S> dw) {
  if (algorithm == Algorithm::kDepthwise)
    return depthwise::weight_gradient(shape, dy.data, x.data, dw);
  if (algorithm == Algorithm::kSmall) return small::weight_gradient(shape, dy.data, x.data, dw);
  if constexpr (detail::has_winograd<S>)
    if (algorithm == Algorithm::kWinograd) return winograd_weight_gradient(shape, dy, x, dw);
  direct_weight_gradient(shape, dy.data, x.data, dw);
}

// conv2d_forward and conv2d_backward without activation and bias gradient, for what stands on them.
// Not by the dispatcher: torch 2.13 keeps each string that it is handed.
torch::stable::Tensor convolution(const torch::stable::Tensor& input,
                                  const torch::stable::Tensor& weight,
                                  const std::optional<torch::stable::Tensor>& bias,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups, bool exact,
                                  bool own);

// Of input and weight, as they are wanted: the others have no elements.
std::array<torch::stable::Tensor, 2> convolution_gradients(
    const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input,
    const torch::stable::Tensor& weight, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    bool exact, bool own, bool want_input, bool want_weight);

}  // namespace dlkernels::conv2d

// Direct convolution of few channels with stride 1, and a 2×2 max-pool in its epilogue.
//
// The output is cut into tiles, and each lane of a vector belongs to another tile: one pixel of 16
// images, or of 16 strips of an image. So no width has a tail and no pixel is beside a vector, a
// padding is zeros that are gathered, and the pool compares whole vectors. A block of 2×2 pixels ×
// kChannels outputs stays in registers while its sums run over the taps.
//   convolve          forward, with bias, activation and pool; and the input gradient, which is the
//                     convolution of the gradient with the rotated weights
//   weight_gradient   Σ over pixels, vector by vector, of gradient · input
//   pool_backward     behind the pool one pixel in four has a gradient, of whom each tile has
//                     another: per image, with channels innermost, the window of a pixel is rows of
//                     contiguous numbers. Each pooled pixel adds gradient · window to the weight
//                     gradient, and gradient · weights to the window of the input gradient: a
//                     quarter of the multiply-adds. (Vectors over tiles: 1.6 to 1.8 × as long for
//                     6 channels to 16, as long for one channel, whose rows fill a third of one.)
// Sums are cut by the shape alone, and parts added in order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "activation.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::few_channels {

// A tensor of four dimensions in any strides.
template <typename S>
struct Images {
  S* data;
  int64_t image, channel, row, column;
  S* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + n * image + c * channel + y * row + x * column;
  }
};

template <typename S>
Images<S> images(const torch::stable::Tensor& x) {
  using Element = std::remove_const_t<S>;
  return {const_cast<Element*>(static_cast<const Element*>(x.const_data_ptr())), x.stride(0),
          x.stride(1), x.stride(2), x.stride(3)};
}

// Of a convolution with stride 1. A padding may be negative: that crops.
struct Shape {
  int64_t batch, inputs, height, width, outputs, kernel_height, kernel_width, pad_y, pad_x;

  int64_t output_height() const { return height + 2 * pad_y - kernel_height + 1; }
  int64_t output_width() const { return width + 2 * pad_x - kernel_width + 1; }
  int64_t taps() const { return inputs * kernel_height * kernel_width; }
  // That of the input gradient.
  Shape transposed() const {
    return {batch,         outputs,      output_height(),           output_width(),          inputs,
            kernel_height, kernel_width, kernel_height - 1 - pad_y, kernel_width - 1 - pad_x};
  }
};

constexpr bool kWide = Vec<float>::size == 16;  // 32 registers, not 16
constexpr int64_t kChannels = kWide ? 6 : 2;    // × 2×2 pixels: 24 or 8 sums
constexpr int64_t kGradients = kWide ? 4 : 2;   // channels,
constexpr int64_t kTaps = 5;                    // × taps of a row: 20 or 10 sums
constexpr int64_t kWindow = 12;                 // vectors of a window in registers
constexpr int64_t kFlush = 256;                 // terms of a sum, which are then added to the total
constexpr int64_t kAdded = 32;                  // outputs that a pixel's gradient is of, likewise
constexpr int64_t kSegment = 256;               // pixels that are transposed at once
constexpr int64_t kGathered = 640 << 10;        // bytes of a group of tiles, for the L2 cache
constexpr int64_t kImages = 4;                  // whose windows are added in turn
constexpr int64_t kMostChunks = 32;             // parts of a weight gradient behind a pool
constexpr int64_t kWork = 1 << 18;              // multiply-adds worth a second thread

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// body(std::integral_constant<int64_t, n>), 1 ≤ n ≤ most.
template <int64_t most, typename Body>
inline void with_constant(int64_t n, const Body& body) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, body);
  }
  body(std::integral_constant<int64_t, most>{});
}

// body(i, scratch) for 0 ≤ i < n; every thread has `size` elements of scratch for itself.
template <typename T, typename Body>
void for_each(int64_t n, int64_t work, int64_t size, const Body& body) {
  const int64_t most = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t threads = std::clamp<int64_t>(std::min(work / kWork, n), 1, most);
  size = Aligned<T>::padded(size);
  const Aligned<T> memory(threads * size);
  if (threads == 1) {
    for (int64_t i = 0; i < n; ++i) body(i, memory.get());
    return;
  }
  std::atomic<int64_t> callers{0};
  torch::stable::parallel_for(0, n, divide_up(n, threads), [&](int64_t begin, int64_t end) {
    T* const scratch = memory.get() + callers.fetch_add(1) * size;
    for (int64_t i = begin; i < end; ++i) body(i, scratch);
  });
}

// ------------------------------------------------------------------------------------------- tiles

// The output of every image as tiles of height × width pixels, the last ones reaching beyond it.
struct Tiles {
  int64_t height, width, down, across, count;

  struct Place {
    int64_t image, y, x;
  };
  Place at(int64_t i) const {
    return {i / (down * across), i / across % down * height, i % across * width};
  }
};

// Tiles of even sides: whole images, or less where these are few or large. `least` groups of tiles
// are wanted, if they can be had.
template <typename T>
Tiles cut(const Shape& s, int64_t height, int64_t width, int64_t least) {
  constexpr int64_t L = Vec<T>::size;
  Tiles t{round_up(height, 2), round_up(width, 2), 1, 1, s.batch};
  const auto bytes = [&] {
    return s.inputs * (t.height + s.kernel_height - 1) * (t.width + s.kernel_width - 1) * L *
           int64_t(sizeof(T));
  };
  const auto halve = [](int64_t n) { return round_up(divide_up(n, 2), 2); };
  while ((t.count <= (least - 1) * L || bytes() > kGathered) && t.height > 2) {
    t.height = halve(t.height);
    t.down = divide_up(height, t.height);
    t.count = s.batch * t.down;
  }
  while (bytes() > kGathered && t.width > 2) {
    t.width = halve(t.width);
    t.across = divide_up(width, t.width);
    t.count = s.batch * t.down * t.across;
  }
  return t;
}

// rows[lane·pitch + j] to columns[j·L + lane], j < n; and back.
template <typename T>
inline void to_lanes(const T* rows, int64_t pitch, int64_t n, T* columns) {
  constexpr int64_t L = Vec<T>::size, P = kPiece<T>;
  for (int64_t j = 0; j < n; j += P) {
    Vec<T> v[P];
    for (int64_t q = 0; q < P; ++q) v[q] = load_pieces(rows + q * pitch + j, P * pitch);
    transpose_pieces(v);
    for (int64_t k = 0; k < P; ++k) store(columns + (j + k) * L, v[k]);
  }
}
template <typename T>
inline void from_lanes(const T* columns, int64_t n, T* rows, int64_t pitch) {
  constexpr int64_t L = Vec<T>::size, P = kPiece<T>;
  for (int64_t j = 0; j < n; j += P) {
    Vec<T> v[P];
    for (int64_t k = 0; k < P; ++k) v[k] = load(columns + (j + k) * L);
    transpose_pieces(v);
    for (int64_t q = 0; q < P; ++q) store_pieces(rows + q * pitch + j, P * pitch, v[q]);
  }
}

// n elements, `step` apart, of S as T; and back, with n > 0.
template <typename S, typename T>
inline void read(const S* from, int64_t step, int64_t n, T* to) {
  constexpr int64_t L = Vec<T>::size;
  if (step == 1) {
    for (int64_t j = 0; j < n; j += L) store(to + j, load(from + j, std::min(L, n - j)));
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = widen(from[j * step]);
  }
}
template <typename S, typename T>
inline void write(const T* from, int64_t n, S* to, int64_t step) {
  constexpr int64_t L = Vec<T>::size;
  if constexpr (std::is_same_v<S, uint8_t>) {
    for (int64_t j = 0; j < n; ++j) to[j * step] = uint8_t(int32_t(from[j]));
  } else if (step == 1) {
    for (int64_t j = 0; j < n; j += L) {
      const int64_t lanes = std::min(L, n - j);
      store(to + j, load(from + j), lanes);
    }
  } else {
    for (int64_t j = 0; j < n; ++j) to[j * step] = narrow<S>(from[j]);
  }
}

// What transposes kSegment pixels of L tiles, L + 1 lines of memory apart: no power of two.
template <typename T>
struct Rows {
  static constexpr int64_t kPitch = kSegment + 64 / int64_t(sizeof(T));
  static constexpr int64_t kSize = kPitch * Vec<T>::size;
};

// height × width pixels from (y, x) of each tile's place on, of every channel of an image, as
// to[((channel·height + row)·width + column)·L + lane]. Zeros outside the image, and of
// tiles behind the last.
template <typename S, typename T>
void gather(const Images<const S>& from, int64_t channels, int64_t image_height,
            int64_t image_width, const Tiles& tiles, int64_t first, int64_t y, int64_t x,
            int64_t height, int64_t width, T* rows, T* to) {
  constexpr int64_t L = Vec<T>::size;
  // Rows of the image that follow one another are one row.
  if (x == 0 && tiles.across == 1 && width == image_width && from.row == width * from.column) {
    const int64_t in_a_row = image_width;
    const int64_t n = height * in_a_row;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t j = 0; j < n; j += kSegment) {
        const int64_t count = std::min(kSegment, n - j);
        for (int64_t l = 0; l < L; ++l) {
          const auto place = tiles.at(first + l);
          const int64_t begin = (place.y + y) * in_a_row + j;
          int64_t low = 0, high = 0;
          if (first + l < tiles.count) {
            low = std::clamp<int64_t>(-begin, 0, count);
            high = std::clamp<int64_t>(image_height * in_a_row - begin, low, count);
          }
          T* const row = rows + l * Rows<T>::kPitch;
          std::fill(row, row + low, T(0));
          if (high > low)
            read(from.at(place.image, c, 0, 0) + (begin + low) * from.column, from.column,
                 high - low, row + low);
          std::fill(row + high, row + count, T(0));
        }
        to_lanes(rows, Rows<T>::kPitch, count, to + (c * n + j) * L);
      }
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; j += kSegment) {
        const int64_t count = std::min(kSegment, width - j);
        for (int64_t l = 0; l < L; ++l) {
          const auto place = tiles.at(first + l);
          const int64_t row_of = place.y + y + i, begin = place.x + x + j;
          T* const row = rows + l * Rows<T>::kPitch;
          int64_t low = 0, high = 0;
          if (first + l < tiles.count && row_of >= 0 && row_of < image_height) {
            low = std::clamp<int64_t>(-begin, 0, count);
            high = std::clamp<int64_t>(image_width - begin, low, count);
          }
          std::fill(row, row + low, T(0));
          if (high > low)
            read(from.at(place.image, c, row_of, begin + low), from.column, high - low, row + low);
          std::fill(row + high, row + count, T(0));
        }
        to_lanes(rows, Rows<T>::kPitch, count, to + ((c * height + i) * width + j) * L);
      }
}

// The inverse, of one channel: from[(row·width + column)·L + lane] to the height × width pixels at
// each tile's place, divided by `scale`, where they are in the image.
template <typename S, typename T>
void scatter(const T* from, const Images<S>& to, int64_t channel, int64_t image_height,
             int64_t image_width, const Tiles& tiles, int64_t first, int64_t scale, int64_t height,
             int64_t width, T* rows) {
  constexpr int64_t L = Vec<T>::size;
  const int64_t lanes = std::min(L, tiles.count - first);
  const bool one = tiles.across == 1 && width == image_width && to.row == width * to.column;
  const int64_t lines = one ? 1 : height, length = one ? height * width : width;
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t j = 0; j < length; j += kSegment) {
      const int64_t count = std::min(kSegment, length - j);
      from_lanes(from + (i * length + j) * L, count, rows, Rows<T>::kPitch);
      for (int64_t l = 0; l < lanes; ++l) {
        const auto place = tiles.at(first + l);
        const int64_t y = place.y / scale + i, x = place.x / scale + (one ? 0 : j);
        const int64_t left =
            one ? (image_height - y) * width - j : (y < image_height ? image_width - x : 0);
        const int64_t n = std::min(count, left);
        if (n > 0)
          write(rows + l * Rows<T>::kPitch, n,
                to.at(place.image, channel, y, x) + (one ? j * to.column : 0), to.column);
      }
    }
}

// ---------------------------------------------------------------------------------------- convolve

// The taps from `begin` to `end` of rows and columns.
struct Taps {
  int64_t begin, end;
};

// Those of a pair of outputs, at i and i + 1, that meet more than padding: all, where `whole` is
// not the length of the one input that every lane has. A padding that is read adds nothing: sums
// are the same either way.
inline Taps taps_of(int64_t i, int64_t kernel, int64_t padding, int64_t whole) {
  if (whole < 0) return {0, kernel};
  const int64_t begin = std::clamp<int64_t>(padding - i - 1, 0, kernel);
  return {begin, std::clamp<int64_t>(padding + whole - i, begin, kernel)};
}

// How many channels' terms are summed before they are added to the total, whatever of them is
// padding.
inline int64_t channels_at_once(const Shape& s) {
  return std::max<int64_t>(1, kFlush / (s.kernel_height * s.kernel_width));
}

// Sums of 2×2 pixels of K channels over the taps, and the biases. `x` is the window's corner in
// a group of tiles, `w` is K finite weights a tap.
template <int64_t K, typename T>
inline void sum_taps(const Shape& s, Taps down, Taps across, const T* x, int64_t row, int64_t plane,
                     const T* w, const T* bias, Vec<T> (&to)[K][4]) {
  using V = Vec<T>;
  constexpr int64_t L = V::size;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t p = 0; p < 4; ++p) to[k][p] = V(bias[k]);
  const int64_t most = channels_at_once(s);
  for (int64_t c0 = 0; c0 < s.inputs; c0 += most) {
    V sum[K][4];  // in registers, as long as nobody has its address
    for (int64_t k = 0; k < K; ++k)
      for (int64_t p = 0; p < 4; ++p) sum[k][p] = V(T(0));
    for (int64_t c = c0; c < std::min(s.inputs, c0 + most); ++c)
      for (int64_t r = down.begin; r < down.end; ++r) {
        const T *upper = x + c * plane + r * row + across.begin * L, *lower = upper + row;
        const T* weights = w + ((c * s.kernel_height + r) * s.kernel_width + across.begin) * K;
        V upper_left = load(upper), lower_left = load(lower);
        for (int64_t t = across.begin; t < across.end; ++t, weights += K) {
          upper += L, lower += L;
          const V upper_right = load(upper), lower_right = load(lower);
          for (int64_t k = 0; k < K; ++k) {
            const V weight(weights[k]);
            sum[k][0] = fma(upper_left, weight, sum[k][0]);
            sum[k][1] = fma(upper_right, weight, sum[k][1]);
            sum[k][2] = fma(lower_left, weight, sum[k][2]);
            sum[k][3] = fma(lower_right, weight, sum[k][3]);
          }
          upper_left = upper_right, lower_left = lower_right;
        }
      }
    for (int64_t k = 0; k < K; ++k)
      for (int64_t p = 0; p < 4; ++p) to[k][p] = to[k][p] + sum[k][p];
  }
}

// The same for any weights, `outputs` a tap: a padding, where `inside` is 0, is no term. To memory:
// the callers' sums of finite weights stay in registers.
template <typename T>
[[gnu::noinline]] void sum_inside(const Shape& s, int64_t outputs, const T* x, const T* inside,
                                  int64_t row, int64_t plane, const T* w, const T* bias, T* to) {
  using V = Vec<T>;
  constexpr int64_t L = V::size;
  const int64_t most = channels_at_once(s);
  for (int64_t k = 0; k < outputs; ++k)
    for (int64_t p = 0; p < 4; ++p) {
      V total(bias[k]);
      for (int64_t c0 = 0; c0 < s.inputs; c0 += most) {
        V sum(T(0));
        for (int64_t c = c0; c < std::min(s.inputs, c0 + most); ++c)
          for (int64_t r = 0; r < s.kernel_height; ++r)
            for (int64_t t = 0; t < s.kernel_width; ++t) {
              const int64_t at = (r + p / 2) * row + (t + p % 2) * L;
              const V weight(w[((c * s.kernel_height + r) * s.kernel_width + t) * outputs + k]);
              const V added = fma(load(x + c * plane + at), weight, sum);
              sum = select(less(V(T(0)), load(inside + at)), added, sum);
            }
        total = total + sum;
      }
      store(to + (k * 4 + p) * L, total);
    }
}

// The outputs in equal blocks of at most kChannels.
struct Blocks {
  int64_t outputs, count;
  explicit Blocks(int64_t n) : outputs(n), count(divide_up(n, kChannels)) {}
  int64_t begin(int64_t block) const { return outputs * block / count; }
};

// Weights in the order in which sum_taps reads them, and biases behind them.
template <typename T>
class Packed {
 public:
  // weight(k, c, r, t), bias(k) as T.
  template <typename Weight, typename Bias>
  Packed(const Shape& s, const Weight& weight, const Bias& bias)
      : taps_(s.taps()), biases_(s.outputs * taps_), memory_(biases_ + s.outputs) {
    T* w = memory_.get();
    const Blocks blocks(s.outputs);
    for (int64_t b = 0; b < blocks.count; ++b)
      for (int64_t c = 0; c < s.inputs; ++c)
        for (int64_t r = 0; r < s.kernel_height; ++r)
          for (int64_t t = 0; t < s.kernel_width; ++t)
            for (int64_t k = blocks.begin(b); k < blocks.begin(b + 1); ++k)
              *w++ = weight(k, c, r, t);
    for (int64_t k = 0; k < s.outputs; ++k) *w++ = bias(k);
    Vec<T> zeros(T(0));
    for (int64_t i = 0; i < biases_; i += Vec<T>::size)
      zeros =
          fma(load(memory_.get() + i, std::min(Vec<T>::size, biases_ - i)), Vec<T>(T(0)), zeros);
    finite_ = sum(zeros) == T(0);
  }
  bool finite() const { return finite_; }
  const T* weights(int64_t k) const { return memory_.get() + k * taps_; }
  const T* biases(int64_t k) const { return memory_.get() + biases_ + k; }

 private:
  int64_t taps_, biases_;
  Aligned<T> memory_;
  bool finite_;
};

// act(x * w + b) to y, or of each 2×2 pixels the largest, of equals the first, and 2·row + column
// of it to `argmax`.
template <bool pool, typename S, typename T>
void convolve(const Shape& s, const Images<const S>& x, const Packed<T>& w, Activation activation,
              const Images<S>& y, const Images<uint8_t>& argmax) {
  using V = Vec<T>;
  constexpr int64_t L = V::size, scale = pool ? 2 : 1;
  const int64_t pooled_height = s.output_height() / scale, pooled_width = s.output_width() / scale;
  if (s.batch == 0 || s.outputs == 0 || pooled_height <= 0 || pooled_width <= 0) return;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t work = s.batch * s.outputs * s.taps() * s.output_height() * s.output_width();
  const int64_t least = std::clamp<int64_t>(work / kWork, 1, threads > 1 ? 2 * threads : 1);
  const Tiles tiles = cut<T>(s, scale * pooled_height, scale * pooled_width, least);
  const int64_t height = tiles.height + s.kernel_height - 1;
  const int64_t width = tiles.width + s.kernel_width - 1;
  const int64_t row = width * L, plane = height * row;
  const int64_t result = tiles.height / scale * (tiles.width / scale) * L;
  // to_lanes and from_lanes go on to the end of a piece.
  const int64_t slack = kPiece<T> * L, results = round_up(result + slack, L);
  const int64_t gathered = round_up(s.inputs * plane + slack, L);
  const int64_t mask = w.finite() ? 0 : round_up(plane + slack, L);
  const int64_t size = gathered + Rows<T>::kSize + kChannels * results * scale + mask;
  const Blocks blocks(s.outputs);
  for_each<T>(divide_up(tiles.count, L), work, size, [&](int64_t group, T* scratch) {
    T* const input = scratch;
    T* const rows = input + gathered;
    T* const values = rows + Rows<T>::kSize;
    T* const places = values + kChannels * results;
    T* const inside = values + kChannels * results * scale;
    gather(x, s.inputs, s.height, s.width, tiles, group * L, -s.pad_y, -s.pad_x, height, width,
           rows, input);
    if (!w.finite()) {
      const T one(1);
      gather(Images<const T>{&one, 0, 0, 0, 0}, 1, s.height, s.width, tiles, group * L, -s.pad_y,
             -s.pad_x, height, width, rows, inside);
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t k0 = blocks.begin(b), n = blocks.begin(b + 1) - k0;
      with_constant<kChannels>(n, [&](auto constant) {
        constexpr int64_t K = constant;
        const T *weights = w.weights(k0), *biases = w.biases(k0);
        const auto make = [&](auto finite) {
          for (int64_t i = 0; i < tiles.height; i += 2) {
            const Taps down = taps_of(i, s.kernel_height, s.pad_y, tiles.down == 1 ? s.height : -1);
            for (int64_t j = 0; j < tiles.width; j += 2) {
              const Taps across =
                  taps_of(j, s.kernel_width, s.pad_x, tiles.across == 1 ? s.width : -1);
              const int64_t corner = i * row + j * L;
              V sum[K][4];
              if constexpr (finite) {
                sum_taps<K>(s, down, across, input + corner, row, plane, weights, biases, sum);
              } else {
                T sums[K * 4 * L];
                sum_inside(s, K, input + corner, inside + corner, row, plane, weights, biases,
                           sums);
                for (int64_t k = 0; k < K; ++k)
                  for (int64_t p = 0; p < 4; ++p) sum[k][p] = load(sums + (k * 4 + p) * L);
              }
              for (int64_t k = 0; k < K; ++k) {
                if constexpr (pool) {
                  V best = sum[k][0], place(T(0));
                  for (int64_t p = 1; p < 4; ++p) {
                    const auto higher = exceeds(sum[k][p], best);
                    best = select(higher, sum[k][p], best);
                    place = select(higher, V(T(p)), place);
                  }
                  const int64_t to = k * results + (i / 2 * (tiles.width / 2) + j / 2) * L;
                  store(values + to, activate(activation, best));
                  store(places + to, place);
                } else {
                  for (int64_t p = 0; p < 4; ++p) {
                    const int64_t to = k * results + ((i + p / 2) * tiles.width + j + p % 2) * L;
                    store(values + to, activate(activation, sum[k][p]));
                  }
                }
              }
            }
          }
        };
        w.finite() ? make(std::true_type{}) : make(std::false_type{});
      });
      for (int64_t k = 0; k < n; ++k) {
        scatter(values + k * results, y, k0 + k, pooled_height, pooled_width, tiles, group * L,
                scale, tiles.height / scale, tiles.width / scale, rows);
        if constexpr (pool)
          scatter(places + k * results, argmax, k0 + k, pooled_height, pooled_width, tiles,
                  group * L, scale, tiles.height / scale, tiles.width / scale, rows);
      }
    }
  });
}

// --------------------------------------------------------------------------------- weight_gradient

// dw from x and dy.
template <typename S>
void weight_gradient(const Shape& s, const Images<const S>& x, const Images<const S>& dy,
                     const Images<S>& dw) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  constexpr int64_t L = V::size, kLeast = 8, kParts = 16;
  const int64_t output_height = s.output_height(), output_width = s.output_width();
  const int64_t outputs = round_up(s.outputs, kGradients), taps = s.taps();
  // Tiles that divide the output, so that a gradient of 0 outside meets no infinite input: whole
  // images, or less where these are few or large.
  Tiles tiles{output_height, output_width, 1, 1, s.batch};
  const auto divide = [](int64_t& size, int64_t& count, int64_t whole) {
    do ++count;
    while (whole % count != 0);
    size = whole / count;
  };
  const auto bytes = [&] {
    return int64_t(sizeof(T)) * L *
           (s.inputs * (tiles.height + s.kernel_height - 1) * (tiles.width + s.kernel_width - 1) +
            outputs * tiles.height * tiles.width);
  };
  while ((s.batch * tiles.down < kLeast * L || bytes() > kGathered) && tiles.height > 1)
    divide(tiles.height, tiles.down, output_height);
  while (bytes() > kGathered && tiles.width > 1) divide(tiles.width, tiles.across, output_width);
  tiles.count = s.batch * tiles.down * tiles.across;

  const int64_t height = tiles.height + s.kernel_height - 1;
  const int64_t width = tiles.width + s.kernel_width - 1;
  const int64_t row = width * L, plane = height * row;
  const int64_t points = tiles.height * tiles.width * L;
  const int64_t groups = divide_up(tiles.count, L), chunks = std::min(groups, kParts);
  const Aligned<T> parts(std::max<int64_t>(1, chunks) * outputs * taps);
  const int64_t slack = kPiece<T> * L;
  const int64_t gathered = s.inputs * plane + slack, gradients = outputs * points + slack;
  const int64_t sums = outputs * taps * L;
  const int64_t work = s.batch * s.outputs * taps * output_height * output_width;
  for_each<T>(chunks, work, gathered + gradients + Rows<T>::kSize + sums,
              [&](int64_t chunk, T* scratch) {
                T* const input = scratch;
                T* const gradient = input + gathered;
                T* const rows = gradient + gradients;
                T* const total = rows + Rows<T>::kSize;
                std::fill(total, total + sums, T(0));
                for (int64_t g = groups * chunk / chunks; g < groups * (chunk + 1) / chunks; ++g) {
                  gather(x, s.inputs, s.height, s.width, tiles, g * L, -s.pad_y, -s.pad_x, height,
                         width, rows, input);
                  gather(dy, s.outputs, output_height, output_width, tiles, g * L, 0, 0,
                         tiles.height, tiles.width, rows, gradient);
                  std::fill(gradient + s.outputs * points, gradient + outputs * points, T(0));
                  // Of kGradients outputs, as many taps of a row and all pixels: sums stay in
                  // registers.
                  for (int64_t k = 0; k < outputs; k += kGradients) {
                    T* to = total + k * taps * L;
                    for (int64_t c = 0; c < s.inputs; ++c)
                      for (int64_t r = 0; r < s.kernel_height; ++r)
                        for (int64_t t = 0; t < s.kernel_width; t += kTaps) {
                          const int64_t n = std::min(kTaps, s.kernel_width - t);
                          with_constant<kTaps>(n, [&](auto constant) {
                            constexpr int64_t N = constant;
                            const int64_t most = std::max<int64_t>(1, kFlush / tiles.width);
                            for (int64_t i0 = 0; i0 < tiles.height; i0 += most) {
                              V sum[N][kGradients];
                              for (int64_t q = 0; q < N; ++q)
                                for (int64_t p = 0; p < kGradients; ++p) sum[q][p] = V(T(0));
                              const T* from = gradient + k * points + i0 * tiles.width * L;
                              for (int64_t i = i0; i < std::min(tiles.height, i0 + most); ++i) {
                                const T* at = input + c * plane + (i + r) * row + t * L;
                                for (int64_t j = 0; j < tiles.width; ++j, at += L, from += L) {
                                  V d[kGradients];
                                  for (int64_t p = 0; p < kGradients; ++p)
                                    d[p] = load(from + p * points);
                                  for (int64_t q = 0; q < N; ++q) {
                                    const V value = load(at + q * L);
                                    for (int64_t p = 0; p < kGradients; ++p)
                                      sum[q][p] = fma(value, d[p], sum[q][p]);
                                  }
                                }
                              }
                              for (int64_t q = 0; q < N; ++q)
                                for (int64_t p = 0; p < kGradients; ++p) {
                                  T* const total_of = to + (q * kGradients + p) * L;
                                  store(total_of, load(total_of) + sum[q][p]);
                                }
                            }
                          });
                          to += n * kGradients * L;
                        }
                  }
                }
                T* const part = parts.get() + chunk * outputs * taps;
                for (int64_t i = 0; i < outputs * taps; ++i) part[i] = sum(load(total + i * L));
              });

  const int64_t in_part = outputs * taps;
  const auto total = [&](int64_t at) {
    T value(0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) value += parts.get()[chunk * in_part + at];
    return narrow<S>(value);
  };
  for (int64_t k = 0; k < s.outputs; ++k) {
    int64_t at = k / kGradients * kGradients * taps + k % kGradients;
    for (int64_t c = 0; c < s.inputs; ++c)
      for (int64_t r = 0; r < s.kernel_height; ++r)
        for (int64_t t = 0; t < s.kernel_width; ++t, at += kGradients)
          *dw.at(k, c, r, t) = total(at);
  }
}

// ----------------------------------------------------------------------------------- pool_backward

// Images with channels innermost and the padding around them. What is read or written beyond a
// window's rows stays within size().
struct Pixels {
  int64_t channels, height, width, pad_y, pad_x;

  int64_t row() const { return (width + 2 * pad_x) * channels; }
  int64_t size() const { return (height + 2 * pad_y) * row() + (channels + 4) * 16; }
  int64_t at(int64_t y, int64_t x) const { return (y + pad_y) * row() + (x + pad_x) * channels; }
};

// Image n of x. Channels by pieces, the last piece first: what it has too much is the next pixel's.
template <typename S, typename T>
void to_pixels(const Images<const S>& x, int64_t n, const Pixels& p, T* to) {
  constexpr int64_t L = Vec<T>::size, P = kPiece<T>;
  if (p.pad_y || p.pad_x || x.column != 1 || p.channels % P != 0)
    std::fill(to, to + p.size(), T(0));
  const int64_t C = p.channels;
  if ((x.channel == 1 && x.column == C) || C == 1) {
    for (int64_t i = 0; i < p.height; ++i)
      read(x.at(n, 0, i, 0), C == 1 ? x.column : 1, p.width * C, to + p.at(i, 0));
    return;
  }
  if (x.column != 1 || C < P) {
    for (int64_t i = 0; i < p.height; ++i)
      for (int64_t j = 0; j < p.width; ++j)
        for (int64_t c = 0; c < C; ++c) to[p.at(i, j) + c] = widen(*x.at(n, c, i, j));
    return;
  }
  const bool one = p.pad_x == 0 && x.row == p.width;
  const int64_t rows = one ? 1 : p.height, width = one ? p.height * p.width : p.width;
  for (int64_t c = (C - 1) / P * P; c >= 0; c -= P)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; j += L) {
        Vec<T> v[P];
        for (int64_t k = 0; k < P; ++k)
          v[k] = c + k < C ? load(x.at(n, c + k, i, j), std::min(L, width - j)) : Vec<T>(T(0));
        transpose_pieces(v);
        T* const at = to + p.at(i, 0) + j * C + c;
        for (int64_t q = 0; q < P; ++q) store_pieces(at + q * C, P * C, v[q]);
      }
}

template <typename S, typename T>
void from_pixels(const T* from, const Pixels& p, const Images<S>& x, int64_t n) {
  constexpr int64_t L = Vec<T>::size, P = kPiece<T>;
  const int64_t C = p.channels;
  if (x.channel == 1 && x.column == C) {
    for (int64_t i = 0; i < p.height; ++i)
      write(from + p.at(i, 0), p.width * C, x.at(n, 0, i, 0), 1);
    return;
  }
  if (x.column != 1) {
    for (int64_t i = 0; i < p.height; ++i)
      for (int64_t j = 0; j < p.width; ++j)
        for (int64_t c = 0; c < C; ++c) *x.at(n, c, i, j) = narrow<S>(from[p.at(i, j) + c]);
    return;
  }
  const bool one = p.pad_x == 0 && x.row == p.width;
  const int64_t rows = one ? 1 : p.height, width = one ? p.height * p.width : p.width;
  for (int64_t c = 0; c < C; c += P)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; j += L) {
        const T* const at = from + p.at(i, 0) + j * C + c;
        Vec<T> v[P];
        for (int64_t q = 0; q < P; ++q) v[q] = load_pieces(at + q * C, P * C);
        transpose_pieces(v);
        for (int64_t k = 0; k < std::min(P, C - c); ++k)
          store(x.at(n, c + k, i, j), v[k], std::min(L, width - j));
      }
}

// A window is `rows` rows of `length` numbers, which are `vectors` vectors.
struct Window {
  int64_t rows, length, vectors, pitch;
};

// body(first row, first vector, rows, vectors), the last two as constants, for the parts of a
// window that fit in registers.
template <typename Body>
void for_each_part(const Window& window, const Body& body) {
  constexpr int64_t kAcross = 5, kDown = 8;
  const int64_t across = divide_up(window.vectors, kAcross);
  for (int64_t a = 0; a < across; ++a) {
    const int64_t v0 = window.vectors * a / across, n = window.vectors * (a + 1) / across - v0;
    with_constant<kAcross>(n, [&](auto vectors) {
      constexpr int64_t kMost = std::min(kDown, kWindow / int64_t(vectors));
      const int64_t down = divide_up(window.rows, kMost);
      for (int64_t d = 0; d < down; ++d) {
        const int64_t r0 = window.rows * d / down, m = window.rows * (d + 1) / down - r0;
        with_constant<kMost>(m, [&](auto rows) { body(r0, v0, rows, vectors); });
      }
    });
  }
}

// Pooled pixels of one channel: the gradient of each, and where in `corner`, from its window's
// corner on, the window begins.
struct Pooled {
  int64_t height, width, step_y, step_x, corner[4];
};

// to += Σ gradient · window, of the rows of pooled pixels from `begin` to `end` of so many images;
// rows of `to` are `in_row` apart.
template <int64_t kRows, int64_t kVectors, typename T>
inline void add_windows(const Pooled& pooled, int64_t begin, int64_t end, int64_t images,
                        const T* x, int64_t image, int64_t pitch, const T* gradient,
                        const uint8_t* argmax, int64_t channel, T* to, int64_t in_row) {
  using V = Vec<T>;
  V sum[kRows][kVectors];  // in registers, as long as nobody has its address
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = V(T(0));
  for (int64_t n = 0; n < images; ++n)
    for (int64_t i = begin; i < end; ++i) {
      const T* at = x + n * image + i * pooled.step_y;
      const int64_t first = n * channel + i * pooled.width;
      for (int64_t j = 0; j < pooled.width; ++j, at += pooled.step_x) {
        const V g(gradient[first + j]);
        const T* row = at + pooled.corner[argmax[first + j]];
        for (int64_t r = 0; r < kRows; ++r, row += pitch)
          for (int64_t v = 0; v < kVectors; ++v)
            sum[r][v] = fma(g, load(row + v * V::size), sum[r][v]);
      }
    }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v) {
      T* const total = to + r * in_row + v * V::size;
      store(total, load(total) + sum[r][v]);
    }
}

// window += gradient · weight, of `images` images in turn: a load does not meet the store that
// another window of its image has just made. `last` lanes are of the last vector of a row; the
// others, whose weights are 0, are left alone only if `exact`.
template <int64_t kRows, int64_t kVectors, bool exact, typename T>
inline void add_to_windows(const Pooled& pooled, int64_t images, T* x, int64_t image, int64_t pitch,
                           const T* gradient, const uint8_t* argmax, int64_t channel,
                           const Vec<T> (&weight)[kRows][kVectors], int64_t last) {
  using V = Vec<T>;
  for (int64_t i = 0; i < pooled.height; ++i)
    for (int64_t j = 0; j < pooled.width; ++j, ++gradient, ++argmax) {
      T* const at = x + i * pooled.step_y + j * pooled.step_x;
      for (int64_t n = 0; n < images; ++n) {
        const V g(gradient[n * channel]);
        T* row = at + n * image + pooled.corner[argmax[n * channel]];
        for (int64_t r = 0; r < kRows; ++r, row += pitch)
          for (int64_t v = 0; v < kVectors; ++v) {
            T* const to = row + v * V::size;
            if (exact && v == kVectors - 1)
              store(to, fma(g, weight[r][v], load(to, last)), last);
            else
              store(to, fma(g, weight[r][v], load(to)));
          }
      }
    }
}

// The gradients behind a pool, of which null ones are not wanted. dy, y and argmax are contiguous.
template <typename S>
void pool_backward(const Shape& s, const Images<const S>& x, const Images<const S>& w, const S* dy,
                   const S* y, const uint8_t* argmax, Activation activation, const Images<S>* dx,
                   const Images<S>* dw, S* db) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  constexpr int64_t L = V::size;
  const Pixels pixels{s.inputs, s.height, s.width, s.pad_y, s.pad_x};
  const int64_t pitch = pixels.row(), C = s.inputs;
  const Pooled pooled{
      s.output_height() / 2, s.output_width() / 2, 2 * pitch, 2 * C, {0, C, pitch, pitch + C}};
  const int64_t points = pooled.height * pooled.width, in_image = s.outputs * points;
  // As many as make kFlush terms.
  const int64_t most_images = std::max<int64_t>(1, kFlush / points);
  const int64_t most_rows =
      points <= kFlush ? pooled.height : std::max<int64_t>(1, kFlush / pooled.width);
  Window window{s.kernel_height, s.kernel_width * C, 0, pitch};
  window.vectors = divide_up(window.length, L);
  const int64_t in_row = window.vectors * L, in_window = window.rows * in_row;
  const int64_t in_part = s.outputs * in_window;

  // Weights as windows, zeros behind a row.
  const Aligned<T> weights(dx ? in_part : 0);
  if (dx)
    for (int64_t k = 0; k < s.outputs; ++k)
      for (int64_t r = 0; r < window.rows; ++r) {
        T* const row = weights.get() + k * in_window + r * in_row;
        for (int64_t t = 0; t < s.kernel_width; ++t)
          for (int64_t c = 0; c < C; ++c) row[t * C + c] = widen(*w.at(k, c, r, t));
        std::fill(row + window.length, row + in_row, T(0));
      }

  const int64_t per_chunk = round_up(std::max(kImages, divide_up(s.batch, kMostChunks)), kImages);
  const int64_t chunks = std::max<int64_t>(1, divide_up(s.batch, per_chunk));
  const Aligned<T> parts(dw ? chunks * in_part : 0);
  const Aligned<double> biases(db ? chunks * s.outputs : 0);
  if (dw) std::fill(parts.get(), parts.get() + chunks * in_part, T(0));
  if (db) std::fill(biases.get(), biases.get() + chunks * s.outputs, 0.0);

  const int64_t image = round_up(pixels.size(), L), size = kImages * image;
  const int64_t gradients = round_up(kImages * in_image, L);
  const int64_t work = s.batch * in_image * s.taps();
  for_each<T>(
      chunks, work, gradients + (dx && s.outputs > kAdded ? 2 : 1) * size,
      [&](int64_t chunk, T* scratch) {
        T* const gradient = scratch;
        T* const field = scratch + gradients;
        T* const total = field + size;
        T* const part = parts.get() + chunk * in_part;
        const int64_t end = std::min(s.batch, (chunk + 1) * per_chunk);
        for (int64_t n0 = chunk * per_chunk; n0 < end; n0 += kImages) {
          const int64_t images = std::min(kImages, end - n0), first = n0 * in_image;
          V finite(T(0));
          for (int64_t i = 0; i < images * in_image; i += L) {
            const int64_t lanes = std::min(L, images * in_image - i);
            const V g =
                through(activation, load(dy + first + i, lanes), load(y + first + i, lanes));
            store(gradient + i, g, lanes);
            finite = fma(g, V(T(0)), finite);
          }
          if (db)
            for (int64_t n = 0; n < images; ++n)
              for (int64_t k = 0; k < s.outputs; ++k) {
                const T* const g = gradient + n * in_image + k * points;
                V total(T(0));
                for (int64_t i = 0; i < points; i += L)
                  total = total + load(g + i, std::min(L, points - i));
                biases.get()[chunk * s.outputs + k] += sum(total);
              }
          if (dw) {
            for (int64_t n = 0; n < images; ++n) to_pixels(x, n0 + n, pixels, field + n * image);
            for_each_part(window, [&](int64_t r0, int64_t v0, auto rows, auto vectors) {
              for (int64_t k = 0; k < s.outputs; ++k) {
                T* const to = part + k * in_window + r0 * in_row + v0 * L;
                for (int64_t n = 0; n < images; n += most_images)
                  for (int64_t i = 0; i < pooled.height; i += most_rows)
                    add_windows<rows, vectors>(
                        pooled, i, std::min(pooled.height, i + most_rows),
                        std::min(images - n, most_images), field + n * image + r0 * pitch + v0 * L,
                        image, pitch, gradient + n * in_image + k * points,
                        argmax + first + n * in_image + k * points, in_image, to, in_row);
              }
            });
          }
          if (dx) {
            const bool exact = window.length != in_row && !(sum(finite) == T(0));
            for (int64_t k0 = 0; k0 < s.outputs; k0 += kAdded) {
              std::fill(field, field + images * image, T(0));
              for_each_part(window, [&](int64_t r0, int64_t v0, auto rows, auto vectors) {
                for (int64_t k = k0; k < std::min(s.outputs, k0 + kAdded); ++k) {
                  const T* const at = weights.get() + k * in_window + r0 * in_row + v0 * L;
                  V weight[rows][vectors];
                  for (int64_t r = 0; r < rows; ++r)
                    for (int64_t v = 0; v < vectors; ++v)
                      weight[r][v] = load(at + r * in_row + v * L);
                  const auto add = [&](auto is_exact) {
                    add_to_windows<rows, vectors, is_exact>(
                        pooled, images, field + r0 * pitch + v0 * L, image, pitch,
                        gradient + k * points, argmax + first + k * points, in_image, weight,
                        std::min(L, window.length - (v0 + vectors - 1) * L));
                  };
                  exact ? add(std::true_type{}) : add(std::false_type{});
                }
              });
              if (s.outputs > kAdded)
                for (int64_t i = 0; i < images * image; i += L)
                  store(total + i, k0 ? load(total + i) + load(field + i) : load(field + i));
            }
            for (int64_t n = 0; n < images; ++n)
              from_pixels((s.outputs > kAdded ? total : field) + n * image, pixels, *dx, n0 + n);
          }
        }
      });

  if (dw) {
    T* const total = parts.get();
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < in_part; i += L)
        store(total + i, load(total + i) + load(total + chunk * in_part + i));
    for (int64_t k = 0; k < s.outputs; ++k)
      for (int64_t r = 0; r < window.rows; ++r)
        for (int64_t t = 0; t < s.kernel_width; ++t)
          for (int64_t c = 0; c < C; ++c)
            *dw->at(k, c, r, t) = narrow<S>(total[k * in_window + r * in_row + t * C + c]);
  }
  if (db)
    for (int64_t k = 0; k < s.outputs; ++k) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += biases.get()[chunk * s.outputs + k];
      db[k] = narrow<S>(T(total));
    }
}

// ------------------------------------------------------------------------------------- the entries

// y = act(x * w + b), pooled where there is an argmax; the bias may be null.
template <typename S>
void forward(const Shape& s, const Images<const S>& x, const Images<const S>& w, const S* bias,
             Activation activation, const Images<S>& y, const Images<uint8_t>* argmax = nullptr) {
  using T = accumulate_t<S>;
  const Packed<T> packed(
      s, [&](int64_t k, int64_t c, int64_t r, int64_t t) { return widen(*w.at(k, c, r, t)); },
      [&](int64_t k) { return bias ? widen(bias[k]) : T(0); });
  if (argmax)
    convolve<true>(s, x, packed, activation, y, *argmax);
  else
    convolve<false>(s, x, packed, activation, y, {});
}

// dx from dy, and a bias, which may be null, for a transposed convolution.
template <typename S>
void input_gradient(const Shape& s, const Images<const S>& dy, const Images<const S>& w,
                    const S* bias, const Images<S>& dx) {
  using T = accumulate_t<S>;
  const Packed<T> packed(
      s.transposed(),
      [&](int64_t k, int64_t c, int64_t r, int64_t t) {
        return widen(*w.at(c, k, s.kernel_height - 1 - r, s.kernel_width - 1 - t));
      },
      [&](int64_t k) { return bias ? widen(bias[k]) : T(0); });
  convolve<false>(s.transposed(), dy, packed, Activation::kNone, dx, {});
}

}  // namespace dlkernels::few_channels

// What lies between the convolutions of the residual block: as passes over images, which are rows
// of channels, and as the sources and epilogues of Winograd's convolutions, which make it where
// they read and write anyway.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "activation.h"
#include "batch_norm.h"
#include "conv2d_winograd.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::residual_block {

constexpr int64_t kPart = 1 << 16;  // elements: fewest that are worth a second thread
constexpr int64_t kBlock = 16;      // rows whose sum is in T; blocks add up in double

// ------------------------------------------------------------------------------------------- signs

// Bit j of byte i of a row is of channel 8i + j; rows begin with a byte.
inline int64_t sign_bytes(int64_t channels) { return (channels + 7) / 8; }

// Of a vector of channels from c on: set where y is above 0, or NaN.
template <typename T>
void store_signs(uint8_t* row, int64_t c, Vec<T> y, int64_t lanes) {
  using V = Vec<T>;
  const uint32_t bits = bits_of(y, exceeds(y, V(T(0)))) & uint32_t((uint64_t(1) << lanes) - 1);
  if constexpr (V::size >= 8) {
    for (int64_t byte = 0; byte * 8 < lanes; ++byte) row[c / 8 + byte] = uint8_t(bits >> 8 * byte);
  } else {
    row[c / 8] = uint8_t((c % 8 ? row[c / 8] : 0) | bits << c % 8);
  }
}

// value where the signs are set; 0 elsewhere.
template <typename T>
Vec<T> where_set(const uint8_t* row, int64_t c, Vec<T> value, int64_t lanes) {
  using V = Vec<T>;
  uint32_t bits = row[c / 8] >> c % 8;
  if constexpr (V::size > 8) bits |= lanes > 8 ? uint32_t(row[c / 8 + 1]) << 8 : 0;
  return select(mask_of(value, bits), value, V(T(0)));
}

// ------------------------------------------------------------------------------------------ passes

// body(row, c, lanes) for each vector of channels of each row.
template <typename T, typename Body>
void for_vectors(int64_t rows, int64_t channels, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kPart / std::max<int64_t>(1, channels));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t c = 0;
      for (; c + Vec<T>::size <= channels; c += Vec<T>::size) body(row, c, Vec<T>::size);
      if (c < channels) body(row, c, channels - c);
    }
  });
}

// The same with `count` sums for each channel, to which body(row, c, lanes, sums) adds: `totals` is
// count × channels. Parts of a fixed size are added in order: the same bits for any number of
// threads.
template <int count, typename T, typename Body>
void sum_vectors(int64_t rows, int64_t channels, double* totals, const Body& body) {
  using V = Vec<T>;
  using D = Vec<double>;
  const int64_t width = (channels + V::size - 1) / V::size * V::size;
  const int64_t height = std::max(kBlock, kPart / width / kBlock * kBlock);
  const int64_t parts = (rows + height - 1) / height;
  const Aligned<double> memory(parts * count * width);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      double* const sums = memory.get() + part * count * width;
      std::fill_n(sums, count * width, 0.0);
      const int64_t last = std::min(rows, (part + 1) * height);
      for (int64_t top = part * height; top < last; top += kBlock)
        for (int64_t c = 0; c < channels; c += V::size) {
          const int64_t lanes = std::min(V::size, channels - c);
          V block[count];
          std::fill_n(block, count, V(T(0)));
          for (int64_t row = top; row < std::min(last, top + kBlock); ++row)
            body(row, c, lanes, block);
          for (int i = 0; i < count; ++i) {
            T numbers[V::size];
            store(numbers, block[i]);
            for (int64_t l = 0; l < V::size; l += D::size) {
              double* const at = sums + i * width + c + l;
              store(at, load(at) + load_double(numbers + l));
            }
          }
        }
    }
  });
  for (int i = 0; i < count; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part)
        total += memory.get()[(part * count + i) * width + c];
      totals[i * channels + c] = total;
    }
}

// ---------------------------------------------------------------------------------------- elements

template <typename T>
Vec<T> rectified(Vec<T> x) {
  return activate(Activation::kRelu, x);
}

// relu(scale·y + shift), of which there are `lanes` channels from c on.
template <typename T>
struct Normalise {
  const T *scale, *shift;

  struct At {
    Vec<T> scale, shift;
    Vec<T> operator()(Vec<T> y) const { return rectified(fma(scale, y, shift)); }
  };
  At at(int64_t c, int64_t lanes) const { return {load(scale + c, lanes), load(shift + c, lanes)}; }
};

// dy = a·g + b·(y − μ) + c
template <typename T>
struct BatchNormGradient {
  const T *a, *b, *c, *mean;

  struct At {
    Vec<T> a, b, c, mean;
    Vec<T> operator()(Vec<T> g, Vec<T> y) const { return fma(a, g, fma(b, y - mean, c)); }
  };
  At at(int64_t channel, int64_t lanes) const {
    return {load(a + channel, lanes), load(b + channel, lanes), load(c + channel, lanes),
            load(mean + channel, lanes)};
  }
};

// ----------------------------------------------------------------------------------------- sources

// z of the layer before, from its y.
template <typename S>
struct NormalisedPixels {
  using F = Vec<float>;
  conv2d::winograd::Pixels<S> y;
  Normalise<float> normalise;

  struct At {
    typename conv2d::winograd::Pixels<S>::At y;
    Normalise<float>::At normalise;
    F operator()(int i, int j) const { return normalise(y(i, j)); }
    F first(int i, int j) const { return normalise(y.first(i, j)); }
    F or_zero(bool there, int i, int j) const { return there ? (*this)(i, j) : F(0.0f); }
  };
  At at(int64_t pixel, int64_t width, int64_t c, int64_t lanes) const {
    return {y.at(pixel, width, c, lanes), normalise.at(c, lanes)};
  }
  void prefetch(int64_t pixel, int64_t c) const { y.prefetch(pixel, c); }
};

// dy of a layer, from its g, as it is or where the signs are set, and its y.
template <typename S, bool masked>
struct GradientPixels {
  using F = Vec<float>;
  conv2d::winograd::Pixels<S> g, y;
  BatchNormGradient<float> gradient;
  const uint8_t* signs;
  int64_t sign_bytes;

  struct At {
    typename conv2d::winograd::Pixels<S>::At g, y;
    BatchNormGradient<float>::At gradient;
    const uint8_t* signs;
    int64_t row, column, c, lanes;
    F mask(F value, int i, int j) const {
      if constexpr (masked) return where_set(signs + i * row + j * column, c, value, lanes);
      return value;
    }
    F operator()(int i, int j) const { return gradient(mask(g(i, j), i, j), y(i, j)); }
    F first(int i, int j) const { return gradient(mask(g.first(i, j), i, j), y.first(i, j)); }
    F or_zero(bool there, int i, int j) const { return there ? (*this)(i, j) : F(0.0f); }
  };
  At at(int64_t pixel, int64_t width, int64_t c, int64_t lanes) const {
    return {g.at(pixel, width, c, lanes),
            y.at(pixel, width, c, lanes),
            gradient.at(c, lanes),
            masked ? signs + pixel * sign_bytes : nullptr,
            width * sign_bytes,
            sign_bytes,
            c,
            lanes};
  }
  void prefetch(int64_t pixel, int64_t c) const {
    g.prefetch(pixel, c);
    y.prefetch(pixel, c);
  }
};

// --------------------------------------------------------------------------------------- epilogues

// Two sums for each channel and kTogether tiles, which add up in double.
class TileSums {
 public:
  TileSums(int64_t tiles, int64_t channels)
      : groups_((tiles + kTogether - 1) / kTogether),
        width_((channels + F::size - 1) / F::size * F::size),
        memory_(groups_ * 2 * width_) {}

  // Adds those of tile t, from channel c on.
  void add(int64_t t, int64_t c, F first, F second) const {
    float* const at = memory_.get() + t / kTogether * 2 * width_ + c;
    const bool again = t % kTogether != 0;
    store(at, again ? load(at) + first : first);
    store(at + width_, again ? load(at + width_) + second : second);
  }

  // 2 × channels.
  void total(int64_t channels, double* totals) const {
    using D = Vec<double>;
    const int64_t vectors = 2 * width_ / D::size;
    const Aligned<double> sums(2 * width_);
    torch::stable::parallel_for(
        0, vectors, std::max<int64_t>(1, kPart / groups_), [&](int64_t begin, int64_t end) {
          std::fill(sums.get() + begin * D::size, sums.get() + end * D::size, 0.0);
          for (int64_t group = 0; group < groups_; ++group)
            for (int64_t v = begin; v < end; ++v) {
              double* const at = sums.get() + v * D::size;
              store(at, load(at) + load_double(memory_.get() + group * 2 * width_ + v * D::size));
            }
        });
    for (int i = 0; i < 2; ++i)
      std::copy_n(sums.get() + i * width_, channels, totals + i * channels);
  }

 private:
  using F = Vec<float>;
  static constexpr int64_t kTogether = conv2d::winograd::kTogether;
  int64_t groups_, width_;
  Aligned<float> memory_;
};

// y + bias, and Σ (y − about), Σ (y − about)².
struct WithStatistics {
  using F = Vec<float>;
  const TileSums& sums;
  const float *bias, *about;  // or null

  struct Tile {
    const TileSums& sums;
    int64_t t, c;
    F bias, about, first, second;
    F operator()(F value, int64_t) {
      const F y = value + bias, d = y - about;
      first = first + d;
      second = fma(d, d, second);
      return y;
    }
    void finish() const { sums.add(t, c, first, second); }
  };
  Tile tile(int64_t t, int64_t c, int64_t lanes) const {
    const F zero(0.0f);
    return {
        sums, t,   c, bias ? load(bias + c, lanes) : zero, about ? load(about + c, lanes) : zero,
        zero, zero};
  }
};

// g of the layer before, from the gradient of its z and its y, and Σ g, Σ g·(y − μ).
template <typename S>
struct WithGradientSums {
  using F = Vec<float>;
  const TileSums& sums;
  const S* y;
  int64_t channels;
  const float *scale, *shift, *mean;

  struct Tile {
    const WithGradientSums& of;
    int64_t t, c, lanes;
    F scale, shift, mean, first, second;
    F operator()(F value, int64_t pixel) {
      const F y = load(of.y + pixel * of.channels + c, lanes);
      const F g = select(exceeds(fma(scale, y, shift), F(0.0f)), value, F(0.0f));
      first = first + g;
      second = fma(g, y - mean, second);
      return g;
    }
    void finish() const { of.sums.add(t, c, first, second); }
  };
  Tile tile(int64_t t, int64_t c, int64_t lanes) const {
    const F zero(0.0f);
    return {
        *this, t,   c, lanes, load(scale + c, lanes), load(shift + c, lanes), load(mean + c, lanes),
        zero,  zero};
  }
};

// dx + the shortcut's gradient, where the signs, if there are some, are set.
template <typename S>
struct WithSkip {
  using F = Vec<accumulate_t<S>>;
  const S* skip;
  int64_t channels;
  const uint8_t* signs;
  int64_t sign_bytes;

  struct Tile {
    const WithSkip& of;
    int64_t c, lanes;
    F operator()(F value, int64_t pixel) const {
      F more = load(of.skip + pixel * of.channels + c, lanes);
      if (of.signs) more = where_set(of.signs + pixel * of.sign_bytes, c, more, lanes);
      return value + more;
    }
    void finish() const {}
  };
  Tile tile(int64_t, int64_t c, int64_t lanes) const { return {*this, c, lanes}; }
};

// f(scale·y + shift + residual)
template <typename S>
struct Folded {
  using F = Vec<accumulate_t<S>>;
  const accumulate_t<S>*scale, *shift;
  const S* residual;  // or null
  int64_t channels;
  bool relu;

  struct Tile {
    const Folded& of;
    int64_t c, lanes;
    F scale, shift;
    F operator()(F value, int64_t pixel) const {
      F v = fma(scale, value, shift);
      if (of.residual) v = v + load(of.residual + pixel * of.channels + c, lanes);
      return of.relu ? rectified(v) : v;
    }
    void finish() const {}
  };
  Tile tile(int64_t, int64_t c, int64_t lanes) const {
    return {*this, c, lanes, load(scale + c, lanes), load(shift + c, lanes)};
  }
};

// -------------------------------------------------------------------------------------- statistics

// Mean and biased variance from Σ (y − about), Σ (y − about)² of `rows` numbers. False where about
// was no number, or too far from the mean for the second to say much.
template <typename T>
bool statistics_of(const double* totals, int64_t rows, int64_t channels, const T* about, T* mean,
                   T* var) {
  constexpr double kFar = 64;  // of variances: float's rounding of the sum grows with it
  bool near = true;
  for (int64_t c = 0; c < channels; ++c) {
    const double d = totals[c] / double(rows), square = totals[channels + c] / double(rows);
    mean[c] = T((about ? double(about[c]) : 0) + d);
    const double variance = square - d * d;
    var[c] = T(variance < 0 ? 0.0 : variance);
    near = near && d * d <= kFar * variance && std::isfinite(variance);
  }
  return near;
}

// The same of x, by a pass.
template <typename S, typename T = accumulate_t<S>>
void statistics(const S* x, int64_t rows, int64_t channels, T* mean, T* var) {
  std::vector<batch_norm::Moments> moments(static_cast<size_t>(channels));
  batch_norm::Rows<S>({rows, channels, 1}).moments(x, moments.data());
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = T(moments[size_t(c)].mean);
    var[c] = T(moments[size_t(c)].squares / double(rows));
  }
}

}  // namespace dlkernels::residual_block

// Depthwise convolutions, one filter to a channel: vectors of channels, a strip of pixels of a row
// in registers at a time. They are bound by loads, not by arithmetic.
//   Y[y, x] = Σ_rs X[y·stride − padding + r, …] ⊙ w[r, s]
//   dX[y, x] = Σ_rs dY[(y + padding − r) / stride, …] ⊙ w[r, s] where that is whole
//   dw[r, s] = Σ_pixels dY[y, x] ⊙ X[y·stride − padding + r, …]
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv2d_shape.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::conv2d::depthwise {

constexpr int64_t kStrip = 8;        // pixels at once
constexpr int64_t kChunks = 64;      // of the rows that a weight gradient is summed over
constexpr int64_t kGrain = 1 << 14;  // fewest multiply-adds worth a second thread

inline int64_t rows_worth_a_thread(const Shape& shape) {
  return std::max<int64_t>(
      1, kGrain / std::max<int64_t>(1, std::max(shape.q, shape.w) * shape.c * shape.r * shape.s));
}

// The weight as taps × channels.
template <typename S>
void gather(const Shape& shape, const Weight<const S>& w, accumulate_t<S>* to) {
  for (int64_t r = 0; r < shape.r; ++r)
    for (int64_t s = 0; s < shape.s; ++s)
      for (int64_t c = 0; c < shape.c; ++c)
        to[(r * shape.s + s) * shape.c + c] = widen(*w.at(c, 0, r, s));
}

// One tap for a strip of outputs, of which it reaches [first, last): `from` + i pixels is what
// output i reads. Or, where `direction` is not 0, a row of them that is there as a whole: tap +
// direction reads the next pixel.
template <typename S>
struct Reach {
  const S* from;
  int64_t tap, first, last, direction;
};

// A strip of sums += a row of `taps` taps, outputs `step` pixels apart: each pixel is loaded once.
template <int taps, int step, typename S>
inline void add_row(const S* from, const accumulate_t<S>* w, int64_t w_step, int64_t channels,
                    Vec<accumulate_t<S>> (&sum)[kStrip]) {
  using V = Vec<accumulate_t<S>>;
  V weight[taps];
#pragma GCC unroll 8
  for (int s = 0; s < taps; ++s) weight[s] = load(w + s * w_step);
#pragma GCC unroll 24
  for (int x = 0; x < (int(kStrip) - 1) * step + taps; ++x) {
    const V value = load(from + x * channels);
#pragma GCC unroll 8
    for (int s = 0; s < taps; ++s)
      if (x >= s && (x - s) % step == 0 && (x - s) / step < kStrip)
        sum[(x - s) / step] = fma(value, weight[s], sum[(x - s) / step]);
  }
}

template <typename S>
using AddRow = void (*)(const S*, const accumulate_t<S>*, int64_t, int64_t,
                        Vec<accumulate_t<S>> (&)[kStrip]);

// add_row for a geometry, null where there is none.
template <typename S>
AddRow<S> add_row_of(int64_t taps, int64_t step) {
  if (taps == 3) return step == 1 ? &add_row<3, 1, S> : step == 2 ? &add_row<3, 2, S> : nullptr;
  if (taps == 5) return step == 1 ? &add_row<5, 1, S> : step == 2 ? &add_row<5, 2, S> : nullptr;
  return nullptr;
}

// Channels [c, c + lanes) of a strip, whose inputs are `pitch` apart.
template <typename S>
inline void add_taps(const std::vector<Reach<S>>& reach, AddRow<S> row, int64_t pitch,
                     const accumulate_t<S>* w, int64_t channels, int64_t c, int64_t lanes,
                     Vec<accumulate_t<S>> (&sum)[kStrip]) {
  using V = Vec<accumulate_t<S>>;
  for (auto& one : sum) one = V(accumulate_t<S>(0));
  for (const Reach<S>& one : reach) {
    const S* const from = one.from + c;
    const accumulate_t<S>* const weights = w + one.tap * channels + c;
    if (one.direction != 0 && lanes == V::size) {
      row(from, weights, one.direction * channels, channels, sum);
    } else {
      // A row whose lanes are not all there goes tap by tap.
      const int64_t taps = one.direction ? one.last : 1, last = one.direction ? kStrip : one.last;
      for (int64_t s = 0; s < taps; ++s) {
        const V weight = load(weights + s * one.direction * channels, lanes);
        for (int64_t i = one.first; i < last; ++i)
          sum[i] = fma(load(from + s * channels + i * pitch, lanes), weight, sum[i]);
      }
    }
  }
}

template <typename S, typename Epilogue>
void forward(const Shape& shape, const S* x, const Weight<const S>& w, S* y,
             const Epilogue& epilogue) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const Aligned<T> weights(shape.r * shape.s * shape.c);
  gather(shape, w, weights.get());
  torch::stable::parallel_for(
      0, shape.n * shape.p, rows_worth_a_thread(shape), [&](int64_t begin, int64_t end) {
        std::vector<Reach<S>> reach;
        const AddRow<S> row_of =
            shape.dilation[1] == 1 ? add_row_of<S>(shape.s, shape.stride[1]) : nullptr;
        for (int64_t at = begin; at < end; ++at) {
          const S* const image = x + at / shape.p * shape.h * shape.w * shape.c;
          const int64_t top = at % shape.p * shape.stride[0] - shape.padding[0];
          for (int64_t x0 = 0; x0 < shape.q; x0 += kStrip) {
            const int64_t count = std::min(kStrip, shape.q - x0);
            reach.clear();
            for (int64_t r = 0; r < shape.r; ++r) {
              const int64_t row = top + r * shape.dilation[0];
              if (row < 0 || row >= shape.h) continue;
              const int64_t step = shape.stride[1], corner = x0 * step - shape.padding[1];
              if (row_of && count == kStrip && corner >= 0 &&
                  corner + (kStrip - 1) * step + shape.s <= shape.w) {
                reach.push_back(
                    {image + (row * shape.w + corner) * shape.c, r * shape.s, 0, shape.s, 1});
                continue;
              }
              for (int64_t s = 0; s < shape.s; ++s) {
                const int64_t left = corner + s * shape.dilation[1];
                // left + i·step in [0, w)
                const int64_t first = left < 0 ? (-left + step - 1) / step : 0;
                const int64_t last =
                    left < shape.w ? std::min(kStrip, (shape.w - left + step - 1) / step) : 0;
                if (first < std::min(last, count))
                  reach.push_back({image + (row * shape.w + left) * shape.c, r * shape.s + s, first,
                                   std::min(last, count), 0});
              }
            }
            for (int64_t c = 0; c < shape.c; c += V::size) {
              const int64_t lanes = std::min(V::size, shape.c - c);
              V sum[kStrip];
              add_taps<S>(reach, row_of, shape.stride[1] * shape.c, weights.get(), shape.c, c,
                          lanes, sum);
              for (int64_t i = 0; i < count; ++i)
                store(y + (at * shape.q + x0 + i) * shape.c + c, epilogue(sum[i], c, lanes), lanes);
            }
          }
        }
      });
}

template <typename S, typename Epilogue>
void input_gradient(const Shape& shape, const S* dy, const Weight<const S>& w, S* dx,
                    const Epilogue& epilogue) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const Aligned<T> weights(shape.r * shape.s * shape.c);
  gather(shape, w, weights.get());
  const int64_t step = shape.stride[1];
  torch::stable::parallel_for(
      0, shape.n * shape.h, rows_worth_a_thread(shape), [&](int64_t begin, int64_t end) {
        std::vector<Reach<S>> reach;
        const AddRow<S> row_of =
            shape.dilation[1] == 1 && step == 1 ? add_row_of<S>(shape.s, 1) : nullptr;
        for (int64_t at = begin; at < end; ++at) {
          const S* const image = dy + at / shape.h * shape.p * shape.q * shape.k;
          // Pixels of one remainder, `step` apart, have the same taps.
          for (int64_t phase = 0; phase < std::min(step, shape.w); ++phase) {
            const int64_t columns = (shape.w - phase + step - 1) / step;
            for (int64_t x0 = 0; x0 < columns; x0 += kStrip) {
              const int64_t count = std::min(kStrip, columns - x0);
              reach.clear();
              for (int64_t r = 0; r < shape.r; ++r) {
                const int64_t down = at % shape.h + shape.padding[0] - r * shape.dilation[0];
                if (down < 0 || down % shape.stride[0] || down / shape.stride[0] >= shape.p)
                  continue;
                const int64_t corner = x0 + shape.padding[1] - shape.s + 1;  // of the last tap
                if (row_of && count == kStrip && corner >= 0 &&
                    corner + kStrip - 1 + shape.s <= shape.q) {
                  reach.push_back({image + (down / shape.stride[0] * shape.q + corner) * shape.c,
                                   r * shape.s + shape.s - 1, 0, shape.s, -1});
                  continue;
                }
                for (int64_t s = 0; s < shape.s; ++s) {
                  const int64_t across = phase + shape.padding[1] - s * shape.dilation[1];
                  if (across % step) continue;
                  const int64_t left = x0 + across / step;
                  const int64_t first = std::max<int64_t>(0, -left);
                  const int64_t last = std::min(count, shape.q - left);
                  if (first < last)
                    reach.push_back({image + (down / shape.stride[0] * shape.q + left) * shape.c,
                                     r * shape.s + s, first, last, 0});
                }
              }
              for (int64_t c = 0; c < shape.c; c += V::size) {
                const int64_t lanes = std::min(V::size, shape.c - c);
                V sum[kStrip];
                add_taps<S>(reach, row_of, shape.c, weights.get(), shape.c, c, lanes, sum);
                for (int64_t i = 0; i < count; ++i)
                  store(dx + (at * shape.w + phase + (x0 + i) * step) * shape.c + c,
                        epilogue(sum[i], c, lanes), lanes);
              }
            }
          }
        }
      });
}

constexpr int64_t kTaps = 4;  // of a kernel's row at once

// `taps` sums of a kernel's row, from tap s on, += the products of a row of dY and one of X.
template <typename S>
void add_products(const Shape& shape, int64_t s, int64_t taps, const S* dy, const S* x,
                  int64_t lanes, accumulate_t<S>* to) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t step = shape.stride[1];
  const S* from[kTaps];
  int64_t first[kTaps], last[kTaps], begin = 0, end = shape.q;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t left = (s + t) * shape.dilation[1] - shape.padding[1];
    from[t] = x + left * shape.c;
    first[t] = left < 0 ? std::min(shape.q, (-left + step - 1) / step) : 0;
    last[t] = left < shape.w ? std::min(shape.q, (shape.w - left + step - 1) / step) : 0;
    begin = std::max(begin, first[t]);
    end = std::min(end, last[t]);
  }
  V sum[kTaps];
  for (auto& one : sum) one = V(T(0));
  const auto add = [&](int64_t t, int64_t q) {
    sum[t] = fma(load(dy + q * shape.c, lanes), load(from[t] + q * step * shape.c, lanes), sum[t]);
  };
  for (int64_t t = 0; t < taps; ++t) {  // what only some of them reach
    for (int64_t q = first[t]; q < std::min(begin, last[t]); ++q) add(t, q);
    for (int64_t q = std::max({begin, end, first[t]}); q < last[t]; ++q) add(t, q);
  }
  if (taps == 3 && lanes == V::size) {
    for (int64_t q = begin; q < end; ++q) {
      const V upstream = load(dy + q * shape.c);
#pragma GCC unroll 3
      for (int t = 0; t < 3; ++t)
        sum[t] = fma(upstream, load(from[t] + q * step * shape.c), sum[t]);
    }
  } else {
    for (int64_t q = begin; q < end; ++q)
      for (int64_t t = 0; t < taps; ++t) add(t, q);
  }
  for (int64_t t = 0; t < taps; ++t)
    store(to + t * shape.c, load(to + t * shape.c, lanes) + sum[t], lanes);
}

// Sums over a fixed number of chunks of rows, added in order: the same bits for any number of
// threads.
template <typename S>
void weight_gradient(const Shape& shape, const S* dy, const S* x, const Weight<S>& dw) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t taps = shape.r * shape.s, size = Aligned<T>::padded(taps * shape.c);
  const int64_t rows = shape.n * shape.p, chunks = std::min(kChunks, rows);
  const Aligned<T> sums(std::max<int64_t>(chunks, 1) * size);
  std::fill_n(sums.get(), std::max<int64_t>(chunks, 1) * size, T(0));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T* const to = sums.get() + chunk * size;
      for (int64_t at = chunk * rows / chunks; at < (chunk + 1) * rows / chunks; ++at) {
        const S* const image = x + at / shape.p * shape.h * shape.w * shape.c;
        const S* const upstream = dy + at * shape.q * shape.c;
        for (int64_t r = 0; r < shape.r; ++r) {
          const int64_t row =
              at % shape.p * shape.stride[0] - shape.padding[0] + r * shape.dilation[0];
          if (row < 0 || row >= shape.h) continue;
          const S* const line = image + row * shape.w * shape.c;
          for (int64_t c = 0; c < shape.c; c += V::size) {
            const int64_t lanes = std::min(V::size, shape.c - c);
            for (int64_t s = 0; s < shape.s; s += kTaps)
              add_products(shape, s, std::min(kTaps, shape.s - s), upstream + c, line + c, lanes,
                           to + (r * shape.s + s) * shape.c + c);
          }
        }
      }
    }
  });
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < shape.c; ++c) {
      T total(0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += sums.get()[chunk * size + tap * shape.c + c];
      *dw.at(c, 0, tap / shape.s, tap % shape.s) = narrow<S>(total);
    }
}

}  // namespace dlkernels::conv2d::depthwise

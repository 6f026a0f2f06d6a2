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

// Outputs x0 + i·step, i < count, of one row, channels [c, c + lanes): of tap `tap` its input is
// from[tap.offset + i·pitch], for i in [tap.first, tap.last).
template <typename S>
struct Reach {
  const S* from;
  int64_t tap, first, last;
};

template <typename S, int lanes_of_strip>
inline void add_taps(const std::vector<Reach<S>>& reach, int64_t count, int64_t pitch,
                     const accumulate_t<S>* w, int64_t channels, int64_t c, int64_t lanes,
                     Vec<accumulate_t<S>> (&sum)[lanes_of_strip]) {
  using V = Vec<accumulate_t<S>>;
  for (auto& one : sum) one = V(accumulate_t<S>(0));
  for (const Reach<S>& one : reach) {
    const V weight = load(w + one.tap * channels + c, lanes);
    const S* const from = one.from + c;
    if (one.first == 0 && one.last == kStrip && lanes == V::size) {
#pragma GCC unroll 8
      for (int i = 0; i < lanes_of_strip; ++i) sum[i] = fma(load(from + i * pitch), weight, sum[i]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < lanes_of_strip; ++i)
        if (i >= one.first && i < one.last && i < count)
          sum[i] = fma(load(from + i * pitch, lanes), weight, sum[i]);
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
        for (int64_t at = begin; at < end; ++at) {
          const S* const image = x + at / shape.p * shape.h * shape.w * shape.c;
          const int64_t top = at % shape.p * shape.stride[0] - shape.padding[0];
          for (int64_t x0 = 0; x0 < shape.q; x0 += kStrip) {
            const int64_t count = std::min(kStrip, shape.q - x0);
            reach.clear();
            for (int64_t r = 0; r < shape.r; ++r) {
              const int64_t row = top + r * shape.dilation[0];
              if (row < 0 || row >= shape.h) continue;
              for (int64_t s = 0; s < shape.s; ++s) {
                const int64_t step = shape.stride[1];
                const int64_t left = x0 * step - shape.padding[1] + s * shape.dilation[1];
                // left + i·step in [0, w)
                const int64_t first = left < 0 ? (-left + step - 1) / step : 0;
                const int64_t last =
                    left < shape.w ? std::min(kStrip, (shape.w - left + step - 1) / step) : 0;
                if (first < std::min(last, count))
                  reach.push_back({image + (row * shape.w + left) * shape.c, r * shape.s + s, first,
                                   std::min(last, count)});
              }
            }
            for (int64_t c = 0; c < shape.c; c += V::size) {
              const int64_t lanes = std::min(V::size, shape.c - c);
              V sum[kStrip];
              add_taps<S>(reach, count, shape.stride[1] * shape.c, weights.get(), shape.c, c, lanes,
                          sum);
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
                for (int64_t s = 0; s < shape.s; ++s) {
                  const int64_t across = phase + shape.padding[1] - s * shape.dilation[1];
                  if (across % step) continue;
                  const int64_t left = x0 + across / step;
                  const int64_t first = std::max<int64_t>(0, -left);
                  const int64_t last = std::min(count, shape.q - left);
                  if (first < last)
                    reach.push_back({image + (down / shape.stride[0] * shape.q + left) * shape.c,
                                     r * shape.s + s, first, last});
                }
              }
              for (int64_t c = 0; c < shape.c; c += V::size) {
                const int64_t lanes = std::min(V::size, shape.c - c);
                V sum[kStrip];
                add_taps<S>(reach, count, shape.c, weights.get(), shape.c, c, lanes, sum);
                for (int64_t i = 0; i < count; ++i)
                  store(dx + (at * shape.w + phase + (x0 + i) * step) * shape.c + c,
                        epilogue(sum[i], c, lanes), lanes);
              }
            }
          }
        }
      });
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
          for (int64_t s = 0; s < shape.s; ++s) {
            const int64_t step = shape.stride[1], left = s * shape.dilation[1] - shape.padding[1];
            const int64_t first = left < 0 ? (-left + step - 1) / step : 0;
            const int64_t last =
                left < shape.w ? std::min(shape.q, (shape.w - left + step - 1) / step) : 0;
            const S* const from = image + (row * shape.w + left) * shape.c;
            for (int64_t c = 0; c < shape.c; c += V::size) {
              const int64_t lanes = std::min(V::size, shape.c - c);
              V even(T(0)), odd(T(0));
              int64_t q = first;
              for (; q + 1 < last; q += 2) {
                even = fma(load(upstream + q * shape.c + c, lanes),
                           load(from + q * step * shape.c + c, lanes), even);
                odd = fma(load(upstream + (q + 1) * shape.c + c, lanes),
                          load(from + (q + 1) * step * shape.c + c, lanes), odd);
              }
              if (q < last)
                even = fma(load(upstream + q * shape.c + c, lanes),
                           load(from + q * step * shape.c + c, lanes), even);
              T* const sum = to + (r * shape.s + s) * shape.c + c;
              store(sum, load(sum, lanes) + (even + odd), lanes);
            }
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

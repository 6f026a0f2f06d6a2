// Depthwise convolutions, one filter to a channel: vectors of channels, a strip of pixels of a row
// in registers at a time. They are bound by loads, not by arithmetic.
//   Y[y, x] = Σ_rs X[y·stride − padding + r, …] ⊙ w[r, s]
//   dX[y, x] = Σ_rs dY[(y + padding − r) / stride, …] ⊙ w[r, s] where that is whole
//   dw[r, s] = Σ_pixels dY[y, x] ⊙ X[y·stride − padding + r, …]
// A strip all of whose taps lie inside the image goes by rows of taps, a kernel for each common
// width and stride, which loads each pixel once; the others, at the edges, go tap by tap: nothing
// is multiplied by padding. A strip goes down the rows for kBlock channels, so that an image is
// read into the first cache once, not once for each row of taps; with strides that no processor
// foresees: the row below is prefetched.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv2d_shape.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::conv2d::depthwise {

constexpr int64_t kStrip = 8, kHalf = 4;  // pixels at once
constexpr int64_t kBlock = 256;           // channels whose sums are kept, of all pixels of a strip
constexpr int64_t kChunks = 64;           // most of the rows that a weight gradient is summed over
constexpr int64_t kPixels = 64;           // fewest of such a chunk: each writes a whole gradient
constexpr int64_t kGrain = 1 << 14;       // fewest multiply-adds worth a second thread

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

// ------------------------------------------------------------------------------------------ strips

// Columns [first, first + count) of a row; `whole`: kStrip or kHalf of them, by rows of taps. Of an
// input gradient they are those of one remainder by the stride, the phase.
struct Strip {
  int64_t first, count;
  bool whole;
  int64_t phase = 0;
};

// A row of so many columns, of which [begin, end) have all their taps inside the image. The last
// whole strip may overlap the one before, if that does no harm; without whole ones begin is end.
inline std::vector<Strip> strips_of(int64_t columns, int64_t begin, int64_t end, bool overlapping) {
  std::vector<Strip> strips;
  const auto by_taps = [&](int64_t x, int64_t last) {
    for (; x < last; x += kStrip) strips.push_back({x, std::min(kStrip, last - x), false});
  };
  begin = std::clamp<int64_t>(begin, 0, columns);
  end = std::clamp(end, begin, columns);
  if (end - begin < kHalf) begin = end = columns;
  by_taps(0, begin);
  int64_t x = begin;
  for (; end - x >= kStrip; x += kStrip) strips.push_back({x, kStrip, true});
  if (end - x > kHalf && overlapping && end - begin >= kStrip) x = end - kStrip;
  if (end - x == kStrip) strips.push_back({x, kStrip, true}), x = end;
  for (; end - x >= kHalf; x += kHalf) strips.push_back({x, kHalf, true});
  if (x < end && overlapping) strips.push_back({end - kHalf, kHalf, true}), x = end;
  by_taps(x, columns);
  return strips;
}

// Columns [begin, end) of an output whose taps, `step` pixels apart from one to the next, all read
// pixels of a row of `width`: strips_of's.
struct Inside {
  int64_t begin, end;
  Inside(int64_t width, int64_t step, int64_t padding, int64_t taps)
      : begin((padding + step - 1) / step),
        end(width + padding < taps ? 0 : (width + padding - taps) / step + 1) {}
};

// A row of taps of a strip: the pixel that the first output's first tap reads, and the tap.
template <typename S>
struct Row {
  const S* from;
  int64_t tap;
};

// One tap of a strip, of which it reaches outputs [first, last): `from` + i pixels is what output i
// reads.
template <typename S>
struct Tap {
  const S* from;
  int64_t tap, first, last;
};

// What the outputs of a strip are the sums of.
template <typename S>
struct Reach {
  std::vector<Row<S>> rows;
  std::vector<Tap<S>> all, some;  // taps that all outputs of kStrip have, or some

  void clear() { rows.clear(), all.clear(), some.clear(); }
  void add(const S* from, int64_t tap, int64_t first, int64_t last) {
    if (first < last) (last - first == kStrip ? all : some).push_back({from, tap, first, last});
  }

  // Of a strip of a row of outputs, whose first tap reads row `top` of the image.
  void of_outputs(const Shape& shape, const S* image, int64_t top, const Strip& strip) {
    const int64_t step = shape.stride[1], corner = strip.first * step - shape.padding[1];
    clear();
    for (int64_t r = 0; r < shape.r; ++r) {
      const int64_t row = top + r * shape.dilation[0];
      if (row < 0 || row >= shape.h) continue;
      const S* const line = image + row * shape.w * shape.c;
      if (strip.whole) {
        rows.push_back({line + corner * shape.c, r * shape.s});
        continue;
      }
      for (int64_t s = 0; s < shape.s; ++s) {
        const int64_t left = corner + s * shape.dilation[1];
        // left + i·step in [0, w)
        const int64_t first = left < 0 ? (-left + step - 1) / step : 0;
        const int64_t last = left < shape.w ? (shape.w - left + step - 1) / step : 0;
        add(line + left * shape.c, r * shape.s + s, first, std::min(strip.count, last));
      }
    }
  }

  // Of a strip of row y of inputs; `image` is of dY. The row of a whole one is read from its last
  // tap on.
  void of_inputs(const Shape& shape, const S* image, int64_t y, const Strip& strip) {
    const int64_t corner = strip.first + shape.padding[1] - shape.s + 1;
    clear();
    for (int64_t r = 0; r < shape.r; ++r) {
      const int64_t down = y + shape.padding[0] - r * shape.dilation[0];
      if (down < 0 || down % shape.stride[0] || down / shape.stride[0] >= shape.p) continue;
      const S* const line = image + down / shape.stride[0] * shape.q * shape.c;
      if (strip.whole) {
        rows.push_back({line + corner * shape.c, r * shape.s + shape.s - 1});
        continue;
      }
      for (int64_t s = 0; s < shape.s; ++s) {
        const int64_t across = strip.phase + shape.padding[1] - s * shape.dilation[1];
        if (across % shape.stride[1]) continue;
        const int64_t left = strip.first + across / shape.stride[1];
        add(line + left * shape.c, r * shape.s + s, std::max<int64_t>(0, -left),
            std::min(strip.count, shape.q - left));
      }
    }
  }
};
// ------------------------------------------------------------------------------------- the kernels

// add(load, store, c) for each vector of channels in [begin, end).
template <typename S, typename Add>
inline void for_channels(int64_t begin, int64_t end, const Add& add) {
  constexpr int64_t kSize = Vec<accumulate_t<S>>::size;
  int64_t c = begin;
  for (; c + kSize <= end; c += kSize)
    add([](const auto* from) { return load(from); }, [](auto* to, auto x) { store(to, x); }, c);
  if (c < end)
    add([n = end - c](const auto* from) { return load(from, n); },
        [n = end - c](auto* to, auto x) { store(to, x, n); }, c);
}

// What is prefetched beside a strip: `rows` rows, `pitch` apart, that the next one begins to read.
template <typename S>
struct Ahead {
  const S* next;
  int64_t rows, pitch;

  template <int pixels>
  void prefetch(int64_t channels, int64_t c) const {
    for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 16
      for (int i = 0; i < pixels; ++i)
        __builtin_prefetch(next + row * pitch + i * channels + c, 0, 2);
    }
  }
};

// Of a strip whose first tap reads row `top` of the image.
template <typename S>
Ahead<S> below(const Shape& shape, const S* image, int64_t top, const Strip& strip) {
  const int64_t row = std::max<int64_t>(0, top + (shape.r - 1) * shape.dilation[0] + 1);
  const int64_t column = strip.first * shape.stride[1] - shape.padding[1];
  return {image + (row * shape.w + column) * shape.c,
          std::clamp<int64_t>(shape.h - row, 0, shape.stride[0]), shape.w * shape.c};
}

// Channels [begin, end) of a strip of sums over rows of taps, kBlock a pixel: each pixel of a row
// is loaded once. `across` is the way from one tap of the weight to that which reads the next
// pixel: 1 or −1.
template <int taps, int step, int strip, typename S>
void sum_rows(const std::vector<Row<S>>& rows, const Ahead<S>& ahead,
              const accumulate_t<S>* weights, int64_t across, int64_t channels, int64_t begin,
              int64_t end, accumulate_t<S>* to) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  for_channels<S>(begin, end, [&](const auto& read, const auto& write, int64_t c) {
    ahead.template prefetch<strip * step>(channels, c);
    V sum[strip];
#pragma GCC unroll 8
    for (int i = 0; i < strip; ++i) sum[i] = V(T(0));
    for (const Row<S>& row : rows) {
      V weight[taps];
#pragma GCC unroll 8
      for (int s = 0; s < taps; ++s)
        weight[s] = read(weights + (row.tap + s * across) * channels + c);
      const S* const from = row.from + c;
#pragma GCC unroll 24
      for (int x = 0; x < (strip - 1) * step + taps; ++x) {
        const V value = read(from + x * channels);
#pragma GCC unroll 8
        for (int s = 0; s < taps; ++s)
          if (x >= s && (x - s) % step == 0 && (x - s) / step < strip)
            sum[(x - s) / step] = fma(value, weight[s], sum[(x - s) / step]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < strip; ++i) write(to + i * kBlock + c - begin, sum[i]);
  });
}

// The sums of rows of taps over a strip of products of dY and X, added to `to`, taps × channels.
template <int taps, int step, int strip, typename S>
void add_products(const S* dy, const std::vector<Row<S>>& rows, const Ahead<S>& ahead,
                  const S* dy_ahead, int64_t channels, int64_t begin, int64_t end,
                  accumulate_t<S>* to) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  for_channels<S>(begin, end, [&](const auto& read, const auto& write, int64_t c) {
    ahead.template prefetch<strip * step>(channels, c);
    Ahead<S>{dy_ahead, 1, 0}.template prefetch<strip>(channels, c);
    V upstream[strip];
#pragma GCC unroll 8
    for (int i = 0; i < strip; ++i) upstream[i] = read(dy + i * channels + c);
    for (const Row<S>& row : rows) {
      T* const total = to + row.tap * channels + c;
      const S* const from = row.from + c;
      V sum[taps];
#pragma GCC unroll 8
      for (int s = 0; s < taps; ++s) sum[s] = read(total + s * channels);
#pragma GCC unroll 24
      for (int x = 0; x < (strip - 1) * step + taps; ++x) {
        const V value = read(from + x * channels);
#pragma GCC unroll 8
        for (int s = 0; s < taps; ++s)
          if (x >= s && (x - s) % step == 0 && (x - s) / step < strip)
            sum[s] = fma(value, upstream[(x - s) / step], sum[s]);
      }
#pragma GCC unroll 8
      for (int s = 0; s < taps; ++s) write(total + s * channels, sum[s]);
    }
  });
}

// The kernels of a geometry, for strips of kStrip and of kHalf; null where there are none.
template <typename S>
struct Kernels {
  decltype(&sum_rows<3, 1, kStrip, S>) sum[2] = {};
  decltype(&add_products<3, 1, kStrip, S>) products[2] = {};

  Kernels(int64_t taps, int64_t step) {
    if (taps == 3 && step == 1) set<3, 1>();
    if (taps == 3 && step == 2) set<3, 2>();
    if (taps == 5 && step == 1) set<5, 1>();
    if (taps == 5 && step == 2) set<5, 2>();
    if (taps == 7 && step == 1) set<7, 1>();
  }
  explicit operator bool() const { return sum[0]; }

 private:
  template <int taps, int step>
  void set() {
    sum[0] = &sum_rows<taps, step, kStrip, S>;
    sum[1] = &sum_rows<taps, step, kHalf, S>;
    products[0] = &add_products<taps, step, kStrip, S>;
    products[1] = &add_products<taps, step, kHalf, S>;
  }
};

// Channels [begin, end) of a strip of sums over single taps, whose inputs are `pitch` apart.
template <typename S>
void sum_taps(const Reach<S>& reach, int64_t pitch, const accumulate_t<S>* weights,
              int64_t channels, int64_t begin, int64_t end, accumulate_t<S>* to) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  for_channels<S>(begin, end, [&](const auto& read, const auto& write, int64_t c) {
    V sum[kStrip];
#pragma GCC unroll 8
    for (int i = 0; i < int(kStrip); ++i) sum[i] = V(T(0));
    for (const Tap<S>& one : reach.all) {
      const V weight = read(weights + one.tap * channels + c);
#pragma GCC unroll 8
      for (int i = 0; i < int(kStrip); ++i)
        sum[i] = fma(read(one.from + i * pitch + c), weight, sum[i]);
    }
    T* const at = to + c - begin;
#pragma GCC unroll 8
    for (int i = 0; i < int(kStrip); ++i) write(at + i * kBlock, sum[i]);
    for (const Tap<S>& one : reach.some) {
      const V weight = read(weights + one.tap * channels + c);
      for (int64_t i = one.first; i < one.last; ++i)
        write(at + i * kBlock, fma(read(one.from + i * pitch + c), weight, read(at + i * kBlock)));
    }
  });
}

// Channels [begin, end) of a strip of outputs, `step` pixels apart, from its sums.
template <typename S, typename Epilogue>
void finish(const accumulate_t<S>* sums, int64_t count, int64_t step, int64_t channels,
            int64_t begin, int64_t end, const Epilogue& epilogue, S* to) {
  constexpr int64_t kSize = Vec<accumulate_t<S>>::size;
  for (int64_t i = 0; i < count; ++i) {
    S* const pixel = to + i * step * channels;
    for (int64_t c = begin; c < end; c += kSize) {
      const int64_t lanes = std::min(kSize, end - c);
      store(pixel + c, epilogue(load(sums + i * kBlock + c - begin, lanes), c, lanes), lanes);
    }
  }
}

// visit(strip, row, c, end) for the strips of rows [begin, end) and blocks of channels.
template <typename Visit>
void walk(const std::vector<Strip>& strips, int64_t begin, int64_t end, int64_t channels,
          const Visit& visit) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t c = 0; c < channels; c += kBlock)
      for (const Strip& strip : strips) visit(strip, row, c, std::min(channels, c + kBlock));
}

// ------------------------------------------------------------------------------------- directions

template <typename S, typename Epilogue>
void forward(const Shape& shape, const S* x, const Weight<const S>& w, S* y,
             const Epilogue& epilogue) {
  using T = accumulate_t<S>;
  const Aligned<T> weights(shape.r * shape.s * shape.c);
  gather(shape, w, weights.get());
  const int64_t step = shape.stride[1], channels = shape.c;
  const Kernels<S> kernels(shape.dilation[1] == 1 ? shape.s : 0, step);
  const Inside inside(shape.w, step, shape.padding[1], shape.s);
  const auto strips = strips_of(shape.q, inside.begin, kernels ? inside.end : 0, true);
  torch::stable::parallel_for(
      0, shape.n * shape.p, rows_worth_a_thread(shape), [&](int64_t begin, int64_t end) {
        Reach<S> reach;
        const Aligned<T> sums(kStrip * kBlock);
        walk(strips, begin, end, channels,
             [&](const Strip& strip, int64_t at, int64_t c, int64_t last) {
               const S* const image = x + at / shape.p * shape.h * shape.w * channels;
               const int64_t top = at % shape.p * shape.stride[0] - shape.padding[0];
               S* const to = y + (at * shape.q + strip.first) * channels;
               reach.of_outputs(shape, image, top, strip);
               if (strip.whole)
                 kernels.sum[strip.count != kStrip](reach.rows, below(shape, image, top, strip),
                                                    weights.get(), 1, channels, c, last,
                                                    sums.get());
               else
                 sum_taps(reach, step * channels, weights.get(), channels, c, last, sums.get());
               finish(sums.get(), strip.count, 1, channels, c, last, epilogue, to);
             });
      });
}

template <typename S, typename Epilogue>
void input_gradient(const Shape& shape, const S* dy, const Weight<const S>& w, S* dx,
                    const Epilogue& epilogue) {
  using T = accumulate_t<S>;
  const Aligned<T> weights(shape.r * shape.s * shape.c);
  gather(shape, w, weights.get());
  const int64_t step = shape.stride[1], channels = shape.c;
  // Of stride 1 a convolution with the weight turned about.
  const int64_t padding = shape.s - 1 - shape.padding[1];
  const Kernels<S> kernels(shape.dilation[1] == 1 && step == 1 ? shape.s : 0, 1);
  const Inside inside(shape.q, 1, std::max<int64_t>(0, padding), shape.s);
  const int64_t whole = kernels && padding >= 0 ? inside.end : 0;
  // Pixels of one remainder, `step` apart, have the same taps.
  std::vector<Strip> strips;
  for (int64_t phase = 0; phase < std::min(step, shape.w); ++phase)
    for (Strip strip : strips_of((shape.w - phase + step - 1) / step, inside.begin, whole, true)) {
      strip.phase = phase;
      strips.push_back(strip);
    }
  torch::stable::parallel_for(
      0, shape.n * shape.h, rows_worth_a_thread(shape), [&](int64_t begin, int64_t end) {
        Reach<S> reach;
        const Aligned<T> sums(kStrip * kBlock);
        walk(strips, begin, end, channels,
             [&](const Strip& strip, int64_t at, int64_t c, int64_t last) {
               const S* const image = dy + at / shape.h * shape.p * shape.q * channels;
               const int64_t y = at % shape.h, corner = strip.first - padding;
               S* const to = dx + (at * shape.w + strip.phase + strip.first * step) * channels;
               reach.of_inputs(shape, image, y, strip);
               if (strip.whole) {
                 const int64_t row = y + shape.padding[0] + 1;
                 const Ahead<S> ahead{image + (row * shape.q + corner) * channels, row < shape.p,
                                      0};
                 kernels.sum[strip.count != kStrip](reach.rows, ahead, weights.get(), -1, channels,
                                                    c, last, sums.get());
               } else {
                 sum_taps(reach, channels, weights.get(), channels, c, last, sums.get());
               }
               finish(sums.get(), strip.count, step, channels, c, last, epilogue, to);
             });
      });
}

// Sums over a fixed number of chunks of rows, added in order: the same bits for any number of
// threads.
template <typename S>
void weight_gradient(const Shape& shape, const S* dy, const S* x, const Weight<S>& dw) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t channels = shape.c, step = shape.stride[1];
  const int64_t taps = shape.r * shape.s, size = Aligned<T>::padded(taps * channels);
  const int64_t rows = shape.n * shape.p;
  const int64_t chunks = std::min({kChunks, rows, shape.pixels() / kPixels + 1});
  const Aligned<T> sums(std::max<int64_t>(chunks, 1) * size);
  std::fill_n(sums.get(), std::max<int64_t>(chunks, 1) * size, T(0));
  const Kernels<S> kernels(shape.dilation[1] == 1 ? shape.s : 0, step);
  const Inside inside(shape.w, step, shape.padding[1], shape.s);
  const auto strips = strips_of(shape.q, inside.begin, kernels ? inside.end : 0, false);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Reach<S> reach;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T* const total = sums.get() + chunk * size;
      walk(strips, chunk * rows / chunks, (chunk + 1) * rows / chunks, channels,
           [&](const Strip& strip, int64_t at, int64_t c0, int64_t c1) {
             const S* const image = x + at / shape.p * shape.h * shape.w * channels;
             const int64_t top = at % shape.p * shape.stride[0] - shape.padding[0];
             const S* const upstream = dy + (at * shape.q + strip.first) * channels;
             reach.of_outputs(shape, image, top, strip);
             if (strip.whole) {
               kernels.products[strip.count != kStrip](
                   upstream, reach.rows, below(shape, image, top, strip),
                   upstream + shape.q * channels, channels, c0, c1, total);
               return;
             }
             for_channels<S>(c0, c1, [&](const auto& read, const auto& write, int64_t c) {
               const auto of_tap = [&](const Tap<S>& one) {
                 T* const to = total + one.tap * channels + c;
                 V sum = read(to);
                 for (int64_t i = one.first; i < one.last; ++i)
                   sum = fma(read(upstream + i * channels + c),
                             read(one.from + i * step * channels + c), sum);
                 write(to, sum);
               };
               for (const Tap<S>& one : reach.all) of_tap(one);
               for (const Tap<S>& one : reach.some) of_tap(one);
             });
           });
    }
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < taps * channels; i += V::size) {  // of padded arrays
      T* const at = sums.get() + i;
      store(at, load(at) + load(at + chunk * size));
    }
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c)
      *dw.at(c, 0, tap / shape.s, tap % shape.s) = narrow<S>(sums.get()[tap * channels + c]);
}

}  // namespace dlkernels::conv2d::depthwise

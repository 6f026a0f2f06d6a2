// Convolutions of any geometry as products of gemm.h whose one side is read in place (implicit
// GEMM), never written out as a matrix:
//   Y[pixel, k]  = Σ_e patch(X)[pixel, e] · W[e, k]        e = (row of the kernel, column, c)
//   dX[pixel, c] = Σ_e patch(dY)[pixel, e] · W[e, c]       e = (row, column, k)
//   dW[k, e]     = Σ_pixels dY[pixel, k] · patch(X)[pixel, e]
// With a stride dX falls into stride² phases, pixels of equal remainders, each with the taps of the
// kernel that reach it and a patch of stride 1. A row of the kernel is one run of contiguous
// elements where its columns are neighbours: packing copies runs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv2d_shape.h"
#include "gemm.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::conv2d {

// Taps of the kernel whose elements follow each other in memory: those at (row, column), (row,
// column + 1), … of the patch, in the kernel at (r, s), (r, s + step), …
struct Run {
  int64_t row, column, taps, r, s, step;
};

// The patches of a grid of pixels as a matrix: a row for each pixel, in order of n, y, x; a row's
// elements are those of its runs, each filled up with zeros to `length`. Of pixel (y, x) the run
// (row, column) begins at (y·stride + row, x·stride + column); beyond the image are zeros.
template <typename S>
struct Patches {
  using Element = S;
  const S* data;  // of the group's first channel
  int64_t height, width, channels, pitch;
  int64_t grid_height, grid_width, stride[2];
  const std::vector<Run>* runs;
  int64_t length;

  // `length` for runs of so many taps.
  static int64_t padded(int64_t taps, int64_t channels, int64_t to) {
    return gemm::round_up(taps * channels, to);
  }
  int64_t elements() const { return int64_t(runs->size()) * length; }
  // What is there of a run at a pixel: elements [from, to) of it, at `at`.
  struct Piece {
    const S* at;
    int64_t from, to;
  };
  Piece piece(int64_t n, int64_t y, int64_t x, const Run& run) const {
    const int64_t row = y * stride[0] + run.row, column = x * stride[1] + run.column;
    const int64_t first = std::max<int64_t>(0, -column);
    const int64_t last = std::min(run.taps, width - column);
    if (row < 0 || row >= height || last <= first) return {data, 0, 0};
    return {data + ((n * height + row) * width + column) * pitch, first * channels,
            last * channels};
  }
};

namespace detail {

// The place of pixel i in its grid, stepping.
struct Pixel {
  int64_t n, y, x, height, width;
  Pixel(int64_t i, int64_t height, int64_t width)
      : n(i / (height * width)),
        y(i / width % height),
        x(i % width),
        height(height),
        width(width) {}
  void next() {
    if (++x < width) return;
    x = 0;
    if (++y < height) return;
    y = 0;
    ++n;
  }
};

// Words [begin, end) of a run from `to` on, in whole vectors: up to V::size − 1 words more than
// there are get written, with zeros.
template <typename S>
accumulate_t<S>* copy_piece(const typename Patches<S>::Piece& piece, int64_t begin, int64_t end,
                            accumulate_t<S>* to) {
  using W = gemm::Word<S>;
  using T = accumulate_t<S>;
  using V = Vec<T>;
  constexpr int64_t terms = W::kPair ? 2 : 1;
  const int64_t from = std::clamp(piece.from, begin, end);
  const int64_t until = std::clamp(piece.to, from, end);
  int64_t e = begin;
  for (; e < from; e += V::size * terms) store(to + (e - begin) / terms, V(T(0)));
  if (terms == 2 && from % 2 != begin % 2 && until > from) {  // a pair begins with a zero
    S pair[2] = {S{}, piece.at[from]};
    to[(from - begin) / 2] = W::one(pair, 1, 2);
    e = from + 1;
  } else {
    e = from;
  }
  for (; e < until; e += V::size * terms)
    store(to + (e - begin) / terms,
          W::along(piece.at + e, std::min(V::size, (until - e + terms - 1) / terms), until - e));
  for (e = begin + (until - begin + terms - 1) / terms * terms; e < end; e += V::size * terms)
    store(to + (e - begin) / terms, V(T(0)));
  return to + (end - begin) / terms;
}

}  // namespace detail

// As gemm's of a matrix. Rows are kPitch words apart, of which the last 16 take what copy_piece
// writes beyond the end.
template <typename S>
void pack_a(const Patches<S>& a, int64_t i, int64_t rows, int64_t p, int64_t depth, int64_t,
            accumulate_t<S>* to) {
  static_assert(gemm::kPitch - gemm::kDepth >= Vec<accumulate_t<S>>::size);
  constexpr int64_t terms = gemm::Word<S>::kPair ? 2 : 1;
  const int64_t begin = p * terms, end = (p + depth) * terms;
  detail::Pixel pixel(i, a.grid_height, a.grid_width);
  for (int64_t r = 0; r < rows; ++r, to += gemm::kPitch, pixel.next()) {
    accumulate_t<S>* at = to;
    for (int64_t e = begin, run = begin / a.length; e < end; ++run) {
      const int64_t start = run * a.length, until = std::min(end, start + a.length);
      at = detail::copy_piece<S>(a.piece(pixel.n, pixel.y, pixel.x, (*a.runs)[run]), e - start,
                                 until - start, at);
      e = until;
    }
  }
}

// As gemm's of a matrix. A vector lies within one run: `length` is a multiple of vectors.
template <typename S, typename T>
void pack_b(const Patches<S>& b, int64_t p, int64_t depth, int64_t k, int64_t j, int64_t columns,
            T* to) {
  using W = gemm::Word<S>;
  using V = Vec<T>;
  constexpr int64_t terms = W::kPair ? 2 : 1, step = gemm::kColumns<T>;
  detail::Pixel pixel(p * terms, b.grid_height, b.grid_width);
  const int64_t end = gemm::round_up(columns, step);
  for (int64_t d = 0; d < depth; ++d, to += step) {
    detail::Pixel places[2] = {pixel, pixel};
    pixel.next();
    if (terms == 2) places[1] = pixel, pixel.next();
    const bool both = terms == 2 && (p + d) * 2 + 1 < k;
    int64_t c = 0;  // of the packed columns
    for (int64_t run = j / b.length, e = j % b.length; c < columns; ++run, e = 0) {
      typename Patches<S>::Piece piece[2] = {};
      for (int q = 0; q < 1 + both; ++q)
        piece[q] = b.piece(places[q].n, places[q].y, places[q].x, (*b.runs)[run]);
      for (; e < b.length && c < columns; e += V::size, c += V::size) {
        T* const at = to + c / step * step * depth + c % step;
        const auto whole = [&](int q) { return piece[q].from <= e && e + V::size <= piece[q].to; };
        if constexpr (terms == 1) {
          if (whole(0)) {
            store(at, load(piece[0].at + e));
            continue;
          }
        } else if (whole(0) && whole(1)) {
          store(at, W::across(piece[0].at + e, piece[1].at - piece[0].at, 2, V::size));
          continue;
        }
        S part[2][V::size] = {};
        for (int q = 0; q < terms; ++q) {
          const int64_t from = std::max(piece[q].from, e);
          const int64_t until = std::min(piece[q].to, e + V::size);
          if (from < until) std::copy(piece[q].at + from, piece[q].at + until, part[q] + from - e);
        }
        if constexpr (terms == 1)
          store(at, load(part[0]));
        else
          store(at, W::across(part[0], V::size, 2, V::size));
      }
    }
    for (; c < end; c += V::size) store(to + c / step * step * depth + c % step, V(T(0)));
  }
}

// ------------------------------------------------------------------------------------------- whole

namespace detail {

// The weights of a group as gemm's B: columns × elements of the runs, with zeros where those have
// some. `at(column, channel)` is where a tap's (0, 0) stands.
template <typename S, typename At>
gemm::Matrix<S> gather(const Weight<const S>& w, const std::vector<Run>& runs, int64_t length,
                       int64_t channels, int64_t columns, const At& at, S* to) {
  const int64_t elements = int64_t(runs.size()) * length;
  torch::stable::parallel_for(
      0, columns, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, elements)),
      [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          for (size_t i = 0; i < runs.size(); ++i) {
            const Run& run = runs[i];
            S* const row = to + j * elements + int64_t(i) * length;
            for (int64_t tap = 0; tap < run.taps; ++tap)
              for (int64_t c = 0; c < channels; ++c)
                row[tap * channels + c] =
                    at(j, c)[run.r * w.stride[2] + (run.s + tap * run.step) * w.stride[3]];
            std::fill(row + run.taps * channels, row + length, S{});
          }
      });
  return gemm::Matrix<S>{to, 1, elements};
}

// Its inverse, for the gradient of group `group`.
template <typename S>
void scatter(const S* from, const std::vector<Run>& runs, int64_t length, int64_t channels,
             int64_t rows, int64_t first, const Weight<S>& dw) {
  const int64_t elements = int64_t(runs.size()) * length;
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, elements)),
      [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          for (size_t i = 0; i < runs.size(); ++i)
            for (int64_t tap = 0; tap < runs[i].taps; ++tap)
              for (int64_t c = 0; c < channels; ++c)
                *dw.at(first + k, c, runs[i].r, runs[i].s + tap) =
                    from[k * elements + int64_t(i) * length + tap * channels + c];
      });
}

// The runs of a forward pass: rows of the kernel where its columns are neighbours, else taps.
inline std::vector<Run> runs_of(const Shape& shape) {
  std::vector<Run> runs;
  const int64_t taps = shape.dilation[1] == 1 && shape.groups == 1 ? shape.s : 1;
  for (int64_t r = 0; r < shape.r; ++r)
    for (int64_t s = 0; s < shape.s; s += taps)
      runs.push_back({r * shape.dilation[0] - shape.padding[0],
                      s * shape.dilation[1] - shape.padding[1], taps, r, s, 1});
  return runs;
}

// The taps along one axis that reach pixels of remainder `phase` of the input: pixel
// phase + i·stride is reached by tap t from output i + offset.
struct Tap {
  int64_t tap, offset;
};
inline std::vector<Tap> taps_of_phase(int64_t phase, int64_t size, int64_t stride, int64_t padding,
                                      int64_t dilation) {
  std::vector<Tap> taps;
  for (int64_t t = size; t-- > 0;)  // so that offsets rise
    if ((phase + padding - t * dilation) % stride == 0)
      taps.push_back({t, (phase + padding - t * dilation) / stride});
  return taps;
}

template <typename S>
int64_t word_multiple() {
  return gemm::Word<S>::kPair ? 2 : 1;
}

}  // namespace detail

// body(matrix of the patches of x, elements of a row): a 1×1 convolution of stride 1 has none to
// make, its pixels are the rows.
template <typename S, typename Body>
void with_patches(const Shape& shape, const S* x, const std::vector<Run>& runs, int64_t length,
                  const Body& body) {
  const int64_t channels = shape.c / shape.groups;
  if (shape.is(1, 1) && shape.padding[0] == 0 && shape.padding[1] == 0)
    return body(gemm::Matrix<S>{x, shape.c, 1}, channels);
  const Patches<S> patches{x,       shape.h, shape.w, channels,
                           shape.c, shape.p, shape.q, {shape.stride[0], shape.stride[1]},
                           &runs,   length};
  body(patches, int64_t(runs.size()) * length);
}

template <typename S, typename Epilogue>
void direct_forward(const Shape& shape, const S* x, const Weight<const S>& w, S* y,
                    const Epilogue& epilogue) {
  using V = Vec<accumulate_t<S>>;
  const int64_t channels = shape.c / shape.groups, outputs = shape.k / shape.groups;
  const std::vector<Run> runs = detail::runs_of(shape);
  const int64_t length = Patches<S>::padded(runs[0].taps, channels, detail::word_multiple<S>());
  const Aligned<S> weights(outputs * int64_t(runs.size()) * length);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t first = g * outputs;
    const auto b = detail::gather(
        w, runs, length, channels, outputs,
        [&](int64_t k, int64_t c) { return w.at(first + k, c, 0, 0); }, weights.get());
    const auto store_y = [&](int64_t i, int64_t j, int64_t lanes, V value) {
      store(y + i * shape.k + first + j, epilogue(value, first + j, lanes), lanes);
    };
    with_patches(shape, x + g * channels, runs, length, [&](const auto& a, int64_t elements) {
      gemm::multiply(a, b, shape.pixels(), outputs, elements, store_y);
    });
  }
}

// `epilogue` is that of a transposed convolution, whose forward pass this is.
template <typename S, typename Epilogue>
void direct_input_gradient(const Shape& shape, const S* dy, const Weight<const S>& w, S* dx,
                           const Epilogue& epilogue) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t channels = shape.c / shape.groups, outputs = shape.k / shape.groups;
  const bool phases = shape.stride[0] * shape.stride[1] > 1;
  const Aligned<S> weights(channels * shape.r * shape.s * (outputs + 1));
  std::vector<S*> places;  // of a phase's pixels, where they are not all in order
  const auto make = [&](int64_t y0, int64_t x0) {
    const int64_t rows = (shape.h - y0 - 1) / shape.stride[0] + 1;
    const int64_t columns = (shape.w - x0 - 1) / shape.stride[1] + 1;
    if (phases) {
      places.clear();
      for (int64_t n = 0; n < shape.n; ++n)
        for (int64_t row = y0; row < shape.h; row += shape.stride[0])
          for (int64_t column = x0; column < shape.w; column += shape.stride[1])
            places.push_back(dx + ((n * shape.h + row) * shape.w + column) * shape.c);
    }
    const auto down =
        detail::taps_of_phase(y0, shape.r, shape.stride[0], shape.padding[0], shape.dilation[0]);
    const auto across =
        detail::taps_of_phase(x0, shape.s, shape.stride[1], shape.padding[1], shape.dilation[1]);
    // Taps that are one output apart make a run.
    bool one_run = shape.groups == 1 && !across.empty();
    for (size_t i = 1; i < across.size(); ++i)
      one_run = one_run && across[i].offset == across[i - 1].offset + 1;
    std::vector<Run> runs;
    for (const auto& row : down)
      for (const auto& column : across) {
        const int64_t taps = one_run ? int64_t(across.size()) : 1;
        const int64_t step = taps > 1 ? across[1].tap - across[0].tap : 0;
        runs.push_back({row.offset, column.offset, taps, row.tap, column.tap, step});
        if (one_run) break;
      }
    const int64_t length =
        runs.empty() ? 1 : Patches<S>::padded(runs[0].taps, outputs, detail::word_multiple<S>());
    // The convolution of dY whose output is the phase.
    Shape mirrored = shape;
    mirrored.c = shape.k, mirrored.h = shape.p, mirrored.w = shape.q;
    mirrored.p = rows, mirrored.q = columns;
    mirrored.stride[0] = mirrored.stride[1] = 1;
    if (phases) mirrored.r = 0;  // never without patches
    for (int64_t g = 0; g < shape.groups; ++g) {
      const int64_t first = g * channels;
      const auto b = detail::gather(
          w, runs, length, outputs, channels,
          [&](int64_t c, int64_t k) { return w.at(g * outputs + k, c, 0, 0); }, weights.get());
      const auto store_dx = [&](int64_t i, int64_t j, int64_t lanes, V value) {
        S* const pixel = phases ? places[size_t(i)] : dx + i * shape.c;
        store(pixel + first + j, epilogue(value, first + j, lanes), lanes);
      };
      with_patches(mirrored, dy + g * outputs, runs, length, [&](const auto& a, int64_t elements) {
        gemm::multiply(a, b, shape.n * rows * columns, channels, elements, store_dx);
      });
    }
  };
  for (int64_t y0 = 0; y0 < std::min(shape.stride[0], shape.h); ++y0)
    for (int64_t x0 = 0; x0 < std::min(shape.stride[1], shape.w); ++x0) make(y0, x0);
}

template <typename S>
void direct_weight_gradient(const Shape& shape, const S* dy, const S* x, const Weight<S>& dw) {
  using V = Vec<accumulate_t<S>>;
  const int64_t channels = shape.c / shape.groups, outputs = shape.k / shape.groups;
  const std::vector<Run> runs = detail::runs_of(shape);
  const int64_t length = Patches<S>::padded(runs[0].taps, channels, V::size);
  const int64_t pitch = int64_t(runs.size()) * length;
  const Aligned<S> gradient(outputs * pitch);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const gemm::Matrix<S> a{dy + g * outputs, 1, shape.k};
    const auto store_dw = [&](int64_t i, int64_t j, int64_t lanes, V value) {
      store(gradient.get() + i * pitch + j, value, lanes);
    };
    with_patches(shape, x + g * channels, runs, length, [&](const auto& b, int64_t elements) {
      gemm::multiply(a, b, outputs, elements, shape.pixels(), store_dw);
    });
    detail::scatter(gradient.get(), runs, length, channels, outputs, g * outputs, dw);
  }
}

}  // namespace dlkernels::conv2d

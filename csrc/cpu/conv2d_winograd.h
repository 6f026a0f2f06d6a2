// 3×3 convolutions of stride 1 by Winograd's minimal filtering F(4×4, 3×3): 36 products in place of
// 144 for each 4×4 tile of the output.
//
//   Y  = Aᵀ[ (G g Gᵀ) ⊙ (Bᵀ d B) ]A             d: 6×6 of the input, g: 3×3 of the weight
//   dg = Gᵀ[ Σ_tiles (A dY Aᵀ) ⊙ (Bᵀ d B) ]G    the transpose of the first in g
//   dX: as Y, of dY and the weight turned by 180°, C and K changed about
//
// by the points 0, ±a, ±b, ∞ with a = 3/4, b = 3/2 (Toom and Cook's construction): errors of 2-3
// times a direct sum's where the usual 0, ±1, ±2 have 5-25. Everything is float inside, also for
// bf16 and f16.
//
// In turn for each block of tiles: V = Bᵀ d B of all channels, then for each panel of output
// channels M = the 36 products V·U, and Aᵀ M A with the epilogue right after, while M is in L2.
// Where tiles are few and channels many U, 4 times the weight, is the larger side: then V is of all
// tiles, threads share the panels, and each panel's U is made as it is used.
// Images in NCHW are transposed between memory and the transforms, a strip of tiles at a time,
// which stays in cache. V[channels / L][point][tile][L], U[panel][point][channel][panel's columns],
// M[point][tile][panel's columns], L lanes of a vector; the tile count of V and the strides between
// points are kept off powers of two.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "conv2d_shape.h"
#include "gemm.h"
#include "layout.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::conv2d::winograd {

using V = Vec<float>;
constexpr int64_t kLanes = V::size, kPanel = gemm::kColumns<float>, kTile = 4, kPatch = 6;
constexpr int64_t kPoints = kPatch * kPatch;
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

inline int64_t blocks_of(int64_t channels) { return (channels + kLanes - 1) / kLanes; }
inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }
// Between the points of U of so many channels.
inline int64_t point_stride(int64_t channels) { return channels * kPanel + kLanes; }

// -------------------------------------------------------------------------------------- transforms

// Bᵀ of six values.
struct PatchPoints {
  static constexpr int in = 6, out = 6;
  static void apply(const V (&d)[6], V (&to)[6]) {
    const V a2(kA2), b2(kB2), a(kA), b(kB), zero(0.0f);
    const V minus_sum(-(kA2 + kB2)), product(kA2 * kB2), minus_a2(-kA2), minus_b2(-kB2);
    to[0] = fma(product, d[0], fma(minus_sum, d[2], d[4]));
    to[5] = fma(product, d[1], fma(minus_sum, d[3], d[5]));
    const V even_a = fma(minus_b2, d[2], d[4]), odd_a = fma(minus_b2, d[1], d[3]) * a;
    const V even_b = fma(minus_a2, d[2], d[4]), odd_b = fma(minus_a2, d[1], d[3]) * b;
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
  }
};

// Aᵀ of six values.
struct TileOfPoints {
  static constexpr int in = 6, out = 4;
  static void apply(const V (&m)[6], V (&to)[4]) {
    const V a(kA), b(kB), a2(kA2), b2(kB2), a3(kA2 * kA), b3(kB2 * kB);
    const V sum_a = m[1] + m[2], sum_b = m[3] + m[4];
    const V difference_a = m[1] - m[2], difference_b = m[3] - m[4];
    to[0] = m[0] + (sum_a + sum_b);
    to[1] = fma(a, difference_a, b * difference_b);
    to[2] = fma(a2, sum_a, b2 * sum_b);
    to[3] = fma(a3, difference_a, fma(b3, difference_b, m[5]));
  }
};

// A of four values: the transpose of tile_of_points.
struct TilePoints {
  static constexpr int in = 4, out = 6;
  static void apply(const V (&y)[4], V (&to)[6]) {
    const V a(kA), b(kB), a2(kA2), b2(kB2), a3(kA2 * kA), b3(kB2 * kB);
    const V even_a = fma(a2, y[2], y[0]), odd_a = fma(a3, y[3], a * y[1]);
    const V even_b = fma(b2, y[2], y[0]), odd_b = fma(b3, y[3], b * y[1]);
    to[0] = y[0];
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = y[3];
  }
};

// 1 / Π_j (p_i − p_j) over the finite points p_j ≠ p_i.
constexpr float kN0 = 1 / (kA2 * kB2), kNa = 1 / (2 * kA2 * (kA2 - kB2)),
                kNb = 1 / (2 * kB2 * (kB2 - kA2));

// G of three values.
struct FilterPoints {
  static constexpr int in = 3, out = 6;
  static void apply(const V (&g)[3], V (&to)[6]) {
    const V n0(kN0), na(kNa), nb(kNb), ea(kNa * kA2), eb(kNb * kB2), oa(kNa * kA), ob(kNb * kB);
    const V even_a = fma(ea, g[2], na * g[0]), odd_a = oa * g[1];
    const V even_b = fma(eb, g[2], nb * g[0]), odd_b = ob * g[1];
    to[0] = n0 * g[0];
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = g[2];
  }
};

// Gᵀ of six values: the transpose of filter_points.
struct FilterOfPoints {
  static constexpr int in = 6, out = 3;
  static void apply(const V (&m)[6], V (&to)[3]) {
    const V n0(kN0), na(kNa), nb(kNb), ea(kNa * kA2), eb(kNb * kB2), oa(kNa * kA), ob(kNb * kB);
    const V sum_a = m[1] + m[2], sum_b = m[3] + m[4];
    to[0] = fma(n0, m[0], fma(na, sum_a, nb * sum_b));
    to[1] = fma(oa, m[1] - m[2], ob * (m[3] - m[4]));
    to[2] = fma(ea, sum_a, fma(eb, sum_b, m[5]));
  }
};

// Each column and then each row of a square of values by Transform: put(i, j, value) gets the
// result.
template <typename Transform, typename Get, typename Put>
inline __attribute__((always_inline)) void both_ways(const Get& get, const Put& put) {
  constexpr int in = Transform::in, out = Transform::out;
  V half[out][in];
#pragma GCC unroll 6
  for (int j = 0; j < in; ++j) {
    V column[in], made[out];
#pragma GCC unroll 6
    for (int i = 0; i < in; ++i) column[i] = get(i, j);
    Transform::apply(column, made);
#pragma GCC unroll 6
    for (int i = 0; i < out; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < out; ++i) {
    V made[out];
    Transform::apply(half[i], made);
#pragma GCC unroll 6
    for (int j = 0; j < out; ++j) put(i, j, made[j]);
  }
}

// ------------------------------------------------------------------------------------------- tiles

// The tiles of an image stack in order of n, row, column.
struct Tiles {
  int64_t rows, columns, count;
  Tiles(int64_t n, int64_t height, int64_t width)
      : rows((height + kTile - 1) / kTile),
        columns((width + kTile - 1) / kTile),
        count(n * rows * columns) {}
};

// size × size pixels of an image stack, zeros beyond the image's edges.
struct Window {
  int64_t pixel;           // of its corner, though it may not be there
  int64_t y0, y1, x0, x1;  // what is there: [y0, y1) × [x0, x1) of the window
  bool whole;

  Window(int64_t image, int64_t height, int64_t width, int64_t row, int64_t column, int64_t size)
      : pixel(image * height * width + row * width + column),
        y0(std::max<int64_t>(0, -row)),
        y1(std::min(size, height - row)),
        x0(std::max<int64_t>(0, -column)),
        x1(std::min(size, width - column)),
        whole(y0 == 0 && x0 == 0 && y1 == size && x1 == size) {}
  bool has(int64_t y, int64_t x) const { return y >= y0 && y < y1 && x >= x0 && x < x1; }
};

// The first of tiles [t, t + tiles): whole rows of an image's tiles, or a part of one row.
struct Strip {
  static constexpr int64_t kTiles = 16;
  // The most pixels of the windows of rows · columns ≤ kTiles tiles: of those in one row.
  static constexpr int64_t kPixels = kPatch * (kTiles * kTile + kPatch - kTile);
  int64_t image, row, column, rows, columns;

  Strip(const Tiles& grid, int64_t t, int64_t tiles)
      : image(t / (grid.columns * grid.rows)),
        row(t / grid.columns % grid.rows),
        column(t % grid.columns) {
    const int64_t most = std::min(tiles, kTiles);
    const bool whole = column == 0 && most >= grid.columns;
    rows = whole ? std::min(most / grid.columns, grid.rows - row) : 1;
    columns = whole ? grid.columns : std::min(most, grid.columns - column);
  }
  int64_t tiles() const { return rows * columns; }
};

// rows × columns pixels of `lanes` of an image's planes, which are `width` wide: in squares of up
// to kLanes pixels of a row, or of all rows where they lie without gaps. As pixels of kLanes
// channels they are put in order of row and column.
template <typename S>
struct Planes {
  S* data;
  int64_t plane, width, columns, lanes, across, squares;

  Planes(S* data, int64_t plane, int64_t width, int64_t rows, int64_t columns, int64_t lanes)
      : data(data),
        plane(plane),
        width(width),
        columns(columns == width ? rows * columns : columns),
        lanes(lanes),
        across((this->columns + kLanes - 1) / kLanes),
        squares(columns == width ? across : rows * across) {}
  S* at(int64_t square) const { return data + square / across * width + square % across * kLanes; }

  template <int to_write>
  void prefetch(int64_t square) const {
    const S* const corner = at(square);
    for (int64_t l = 0; l < lanes; ++l) __builtin_prefetch(corner + l * plane, to_write, 2);
  }
  // put(square, the first of its pixels, how many)
  template <typename Put>
  void for_squares(const Put& put) const {
    for (int64_t i = 0; i < squares; ++i) {
      const int64_t column = i % across * kLanes;
      put(at(i), i / across * columns + column, std::min(kLanes, columns - column));
    }
  }
  void gather(float* to) const {
    for_squares([&](const S* square, int64_t pixel, int64_t pixels) {
      layout::transpose_square(square, plane, to + pixel * kLanes, kLanes, lanes, pixels);
    });
  }
  void scatter(const float* from) const {
    for_squares([&](S* square, int64_t pixel, int64_t pixels) {
      layout::transpose_square(from + pixel * kLanes, kLanes, square, plane, pixels, lanes);
    });
  }
};

// What a transform reads: the pixels of an image stack as they are. Other sources make what they
// give from several stacks: at() for a window's corner and a vector of channels, whose (i, j) is
// the pixel so many rows and columns on.
template <typename S>
struct Pixels {
  using Element = S;
  const S* data;
  int64_t channels;

  struct At {
    const S* corner;
    int64_t row, column, lanes;
    V operator()(int i, int j) const { return load(corner + i * row + j * column); }
    V first(int i, int j) const { return load(corner + i * row + j * column, lanes); }
    V or_zero(bool there, int i, int j) const {
      static constexpr S kZeros[kLanes] = {};
      return load(there ? corner + i * row + j * column : kZeros);
    }
  };
  At at(int64_t pixel, int64_t width, int64_t c, int64_t lanes) const {
    return {data + pixel * channels + c, width * channels, channels, lanes};
  }
  void prefetch(int64_t pixel, int64_t c) const {
    __builtin_prefetch(data + pixel * channels + c, 0, 2);
  }
};

// The points of a window's channels [c, c + lanes): point i·6 + j goes to to + (i·6 + j)·stride.
template <typename Transform, typename Source>
inline void transform_window(const Source& source, const Window& window, int64_t width, int64_t c,
                             int64_t lanes, float* to, int64_t stride) {
  const auto put = [&](int i, int j, V value) {
    float* const at = to + (i * kPatch + j) * stride;
    __builtin_prefetch(at + 4 * kLanes, 1, 3);
    store(at, value);
  };
  const auto at = source.at(window.pixel, width, c, lanes);
  if (lanes < kLanes)
    both_ways<Transform>([&](int i, int j) { return window.has(i, j) ? at.first(i, j) : V(0.0f); },
                         put);
  else if (!window.whole)
    both_ways<Transform>([&](int i, int j) { return at.or_zero(window.has(i, j), i, j); }, put);
  else
    both_ways<Transform>([&](int i, int j) { return at(i, j); }, put);
}

// V of tiles [t0, t0 + tiles) of an image stack whose first tile's window begins at (row0,
// column0).
template <typename Transform, typename Source>
void transform_tiles(const Source& source, int64_t height, int64_t width, int64_t channels,
                     const Tiles& grid, int64_t row0, int64_t column0, int64_t t0, int64_t tiles,
                     int64_t pitch, float* to) {
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = t0 + t, column = at % grid.columns, row = at / grid.columns % grid.rows;
    const Window window(at / (grid.columns * grid.rows), height, width, row * kTile + row0,
                        column * kTile + column0, Transform::in);
    for (int64_t c = 0; c < channels; c += kLanes) {
      // What the window below has and this one has not, for the columns that no neighbour asks for.
      // Beyond the image's last row lies the next image.
      for (int64_t y = Transform::in; y < Transform::in + kTile; ++y)
        for (int64_t x = 1; x <= kTile; ++x) source.prefetch(window.pixel + y * width + x, c);
      transform_window<Transform>(source, window, width, c, std::min(kLanes, channels - c),
                                  to + (c / kLanes * kPoints * pitch + t) * kLanes, pitch * kLanes);
    }
  }
}

// The same of images in either layout.
template <typename Transform, typename S>
void transform_tiles(const Images<const S>& source, int64_t height, int64_t width, int64_t channels,
                     const Tiles& grid, int64_t row0, int64_t column0, int64_t t0, int64_t tiles,
                     int64_t pitch, float* to) {
  if (!source.planes)
    return transform_tiles<Transform>(Pixels<S>{source.data, channels}, height, width, channels,
                                      grid, row0, column0, t0, tiles, pitch, to);
  // Of a strip's windows, from (row, column) on, [y0, y1) × [x0, x1) is there.
  struct Part {
    int64_t row, column, y0, y1, x0, x1;
  };
  const auto part_of = [&](const Strip& strip) {
    const int64_t row = strip.row * kTile + row0, column = strip.column * kTile + column0;
    const int64_t below = row + (strip.rows - 1) * kTile + Transform::in,
                  right = column + (strip.columns - 1) * kTile + Transform::in;
    const int64_t y0 = std::clamp<int64_t>(row, 0, height),
                  x0 = std::clamp<int64_t>(column, 0, width);
    return Part{row, column, y0, std::clamp(below, y0, height), x0, std::clamp(right, x0, width)};
  };
  const auto planes_of = [&](const Strip& strip, const Part& part, int64_t c) {
    const S* const image = source.data + (strip.image * channels + c) * height * width;
    return Planes<const S>(image + part.y0 * width + part.x0, height * width, width,
                           part.y1 - part.y0, part.x1 - part.x0, std::min(kLanes, channels - c));
  };
  float pixels[Strip::kPixels * kLanes];
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t t = 0; t < tiles;) {
      const Strip strip(grid, t0 + t, tiles - t);
      const Part part = part_of(strip);
      const Planes<const S> planes = planes_of(strip, part, c);
      planes.gather(pixels);
      const int64_t count = strip.tiles(), next = t + count < tiles ? t + count : 0;
      const int64_t next_c = next || c + kLanes >= channels ? c : c + kLanes;
      const Strip coming(grid, t0 + next, tiles - next);
      const Planes<const S> to_come = planes_of(coming, part_of(coming), next_c);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t square = i * to_come.squares / count;
             square < (i + 1) * to_come.squares / count; ++square)
          to_come.template prefetch<0>(square);
        const Window window(0, part.y1 - part.y0, part.x1 - part.x0,
                            part.row - part.y0 + i / strip.columns * kTile,
                            part.column - part.x0 + i % strip.columns * kTile, Transform::in);
        transform_window<Transform>(
            Pixels<float>{pixels, kLanes}, window, part.x1 - part.x0, 0, planes.lanes,
            to + (c / kLanes * kPoints * pitch + t + i) * kLanes, pitch * kLanes);
      }
      t += count;
    }
}

// ----------------------------------------------------------------------------------------- weights

// How the 9 values of (input channel, output channel) are found: the output channels' weights as
// they are, or, for the input gradient, turned by 180° with the channels changed about.
struct Filters {
  const float* data;  // k × c × 3 × 3
  int64_t inputs, outputs;
  bool turned;
  const float* prepared = nullptr;  // U of all panels by transform_all, where that has been done

  int64_t panel_size() const { return kPoints * point_stride(inputs); }
  int64_t size() const { return panels_of(outputs) * panel_size(); }
  void transform_all(float* to) const {
    torch::stable::parallel_for(0, panels_of(outputs), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel)
        transform(panel * kPanel, 0, inputs, to + panel * panel_size(), point_stride(inputs));
    });
  }

  // U of a panel of outputs from o on and of inputs [c0, c1), each channel kPanel after the last,
  // each point `stride` after the last.
  void transform(int64_t o, int64_t c0, int64_t c1, float* to, int64_t stride) const {
    constexpr int64_t kAtOnce = 8;
    float staged[kAtOnce * 9 * kPanel];
    for (int64_t c = c0; c < c1; c += kAtOnce) {
      const int64_t channels = std::min(kAtOnce, c1 - c);
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        const int64_t n = std::clamp<int64_t>(outputs - o - v, 0, kLanes);
        if (turned) {
          for (int64_t i = 0; i < channels; ++i)
            gemm::pack_columns(gemm::Matrix<float>{data + (c + i) * outputs * 9, 1, 9}, 0, 9, 9,
                               o + v, n, staged + i * 9 * kPanel + v);
        } else {
          gemm::pack_columns(gemm::Matrix<float>{data, 1, inputs * 9}, c * 9, channels * 9,
                             inputs * 9, o + v, n, staged + v);
        }
      }
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t v = 0; v < kPanel; v += kLanes) {
          const float* const from = staged + i * 9 * kPanel + v;
          float* const at = to + (c - c0 + i) * kPanel + v;
          both_ways<FilterPoints>(
              [&](int y, int x) {
                return load(from + (turned ? 8 - y * 3 - x : y * 3 + x) * kPanel);
              },
              [&](int y, int x, V value) {
                float* const point = at + (y * kPatch + x) * stride;
                __builtin_prefetch(point + 4 * kPanel, 1, 3);
                store(point, value);
              });
        }
    }
  }
};

// ---------------------------------------------------------------------------------------- products

// An epilogue is called with (value, channel, lanes), or has tile(t, channel, lanes) instead: an
// object for a vector of channels of tile t that is called with (value, pixel) for each of its
// pixels, and then finishes. A thread has kTogether tiles, from a multiple of that on, in turn.
constexpr int64_t kTogether = 4;

template <typename Epilogue, typename = void>
constexpr bool has_tiles = false;
template <typename Epilogue>
constexpr bool has_tiles<Epilogue, std::void_t<decltype(&Epilogue::tile)>> = true;

template <typename Epilogue>
auto tile_of(const Epilogue& epilogue, int64_t t, int64_t channel, int64_t lanes) {
  if constexpr (has_tiles<Epilogue>)
    return epilogue.tile(t, channel, lanes);
  else
    return
        [&epilogue, channel, lanes](V value, int64_t) { return epilogue(value, channel, lanes); };
}

// How tiles are cut into parts.
struct Parts {
  int64_t count, tiles, most;
  Parts(int64_t tiles, int64_t wanted, int64_t multiple)
      : count(gemm::round_up((tiles + wanted - 1) / wanted, multiple)), tiles(tiles) {
    most = ((units() + count - 1) / count) * kTogether;
  }
  int64_t units() const { return (tiles + kTogether - 1) / kTogether; }
  int64_t begin(int64_t part) const { return std::min(tiles, part * units() / count * kTogether); }
};

// Y of `lanes` channels from `channel` on, of the rows × columns pixels that are there of tile t,
// whose first is `pixel` of the stack: from M to `corner`, where rows and pixels are `row` and
// `step` apart.
template <typename S, typename Epilogue>
void write_tile(const float* m, int64_t m_stride, S* corner, int64_t row, int64_t step,
                int64_t rows, int64_t columns, int64_t t, int64_t pixel, int64_t width,
                int64_t channel, int64_t lanes, const Epilogue& epilogue) {
  auto of_tile = tile_of(epilogue, t, channel, lanes);
  both_ways<TileOfPoints>([&](int i, int j) { return load(m + (i * kPatch + j) * m_stride); },
                          [&](int i, int j, V value) {
                            if (i >= rows || j >= columns) return;
                            store(corner + i * row + j * step,
                                  of_tile(value, pixel + i * width + j), lanes);
                          });
  if constexpr (has_tiles<Epilogue>) of_tile.finish();
}

// Y of tiles [t0, t0 + tiles) and channels [o, o + kPanel) from M.
template <typename S, typename Epilogue>
void write_tiles(const float* m, int64_t m_stride, S* y, int64_t height, int64_t width,
                 int64_t channels, const Tiles& grid, int64_t t0, int64_t tiles, int64_t o,
                 const Epilogue& epilogue) {
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = t0 + t, column = at % grid.columns * kTile,
                  row = at / grid.columns % grid.rows * kTile;
    const int64_t pixel = (at / (grid.columns * grid.rows) * height + row) * width + column;
    S* const corner = y + pixel * channels;
    const int64_t rows = std::min(kTile, height - row), columns = std::min(kTile, width - column);
    for (int64_t v = 0; v < kPanel && o + v < channels; v += kLanes) {
      for (int64_t i = kTile; i < 2 * kTile; ++i)  // of the tile below, to be written
        for (int64_t j = 0; j < kTile; ++j)
          __builtin_prefetch(corner + (i * width + j) * channels + o + v, 1, 2);
      write_tile(m + t * kPanel + v, m_stride, corner + o + v, width * channels, channels, rows,
                 columns, at, pixel, width, o + v, std::min(kLanes, channels - o - v), epilogue);
    }
  }
}

// The same of images in either layout.
template <typename S, typename Epilogue>
void write_tiles(const float* m, int64_t m_stride, const Images<S>& y, int64_t height,
                 int64_t width, int64_t channels, const Tiles& grid, int64_t t0, int64_t tiles,
                 int64_t o, const Epilogue& epilogue) {
  if (!y.planes)
    return write_tiles(m, m_stride, y.data, height, width, channels, grid, t0, tiles, o, epilogue);
  float pixels[Strip::kTiles * kTile * kTile * kLanes];
  for (int64_t c = o; c < std::min(o + kPanel, channels); c += kLanes)
    for (int64_t t = 0; t < tiles;) {
      const Strip strip(grid, t0 + t, tiles - t);
      const int64_t y0 = strip.row * kTile, x0 = strip.column * kTile;
      const int64_t rows = std::min(strip.rows * kTile, height - y0),
                    columns = std::min(strip.columns * kTile, width - x0);
      S* const image = y.data + (strip.image * channels + c) * height * width;
      const Planes<S> planes(image + y0 * width + x0, height * width, width, rows, columns,
                             std::min(kLanes, channels - c));
      const int64_t count = strip.tiles();
      for (int64_t i = 0; i < count; ++i, ++t) {
        for (int64_t square = i * planes.squares / count; square < (i + 1) * planes.squares / count;
             ++square)
          planes.template prefetch<1>(square);
        const int64_t row = i / strip.columns * kTile, column = i % strip.columns * kTile;
        write_tile(m + t * kPanel + c - o, m_stride, pixels + (row * columns + column) * kLanes,
                   columns * kLanes, kLanes, std::min(kTile, rows - row),
                   std::min(kTile, columns - column), t0 + t,
                   (strip.image * height + y0 + row) * width + x0 + column, width, c, planes.lanes,
                   epilogue);
      }
      planes.scatter(pixels);
    }
}

// ------------------------------------------------------------------------------------------- whole

// A source of n × height × width × inputs → y (n × rows × columns × outputs), the window of whose
// first tile begins at −padding. y is where it begins, or Images.
template <typename Source, typename Target, typename Epilogue>
struct Correlation {
  Source x;
  int64_t n, height, width;
  Filters filters;
  int64_t padding[2];
  Target y;
  int64_t rows, columns;
  const Epilogue& epilogue;

  const Tiles grid{n, rows, columns};
  const int64_t inputs = filters.inputs, outputs = filters.outputs;
  const int64_t panels = panels_of(outputs), blocks = blocks_of(inputs);
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());

  void run() const {
    if (grid.count < outputs / 2)
      by_panels();
    else
      by_tiles();
  }

  // Products of `channels` channels, whose V and U are given, on top of M where `add`.
  static void multiply(const float* v, int64_t pitch, int64_t channels, const float* u,
                       int64_t u_stride, int64_t tiles, float* m, int64_t m_stride, bool add) {
    const int64_t pieces = blocks_of(channels), last = channels - (pieces - 1) * kLanes;
    for (int64_t point = 0; point < kPoints; ++point)
      gemm::multiply_pieces(v + point * pitch * kLanes, kPoints * pitch * kLanes, pieces, last,
                            u + point * u_stride, tiles, add, m + point * m_stride);
  }

  void by_tiles() const {
    constexpr int64_t kBytes = 640 << 10;  // of V and M: they are to stay in L2
    const int64_t fit = kBytes / (kPoints * (blocks * kLanes + kPanel) * int64_t(sizeof(float)));
    const int64_t most =
        std::clamp<int64_t>(fit / gemm::kRows * gemm::kRows, gemm::kRows, 4 * gemm::kRows);
    const Parts parts(grid.count, most, threads);
    const int64_t pitch = parts.most | 1;
    const int64_t u_stride = point_stride(inputs), u_size = filters.panel_size();
    const int64_t made = filters.prepared ? 0 : filters.size();
    const int64_t v_size = blocks * kPoints * pitch * kLanes;
    const int64_t m_stride = pitch * kPanel, m_size = kPoints * m_stride;
    const Aligned<float> memory(made + threads * (v_size + m_size));
    const float* const u = made ? memory.get() : filters.prepared;
    if (made) {
      filters.transform_all(memory.get());
    }
    std::atomic<int64_t> callers{0};
    torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
      float* const v = memory.get() + made + callers.fetch_add(1) * (v_size + m_size);
      float* const m = v + v_size;
      for (int64_t part = begin; part < end; ++part) {
        const int64_t t0 = parts.begin(part), tiles = parts.begin(part + 1) - t0;
        if (tiles == 0) continue;
        transform_tiles<PatchPoints>(x, height, width, inputs, grid, -padding[0], -padding[1], t0,
                                     tiles, pitch, v);
        for (int64_t panel = 0; panel < panels; ++panel) {
          multiply(v, pitch, inputs, u + panel * u_size, u_stride, tiles, m, m_stride, false);
          write_tiles(m, m_stride, y, rows, columns, outputs, grid, t0, tiles, panel * kPanel,
                      epilogue);
        }
      }
    });
  }

  void by_panels() const {
    constexpr int64_t kTiles = 96, kChannels = 64;  // M, and U of so many channels, stay in L2
    static_assert(kChannels % kLanes == 0);
    const Parts parts(grid.count, kTiles, 1);
    const bool prepared = filters.prepared != nullptr;
    const int64_t pitch = grid.count | 1, u_stride = point_stride(prepared ? inputs : kChannels);
    const int64_t v_size = blocks * kPoints * pitch * kLanes;
    const int64_t u_size = prepared ? 0 : kPoints * u_stride;
    const int64_t m_stride = (parts.most | 1) * kPanel;
    const int64_t m_size = kPoints * m_stride;
    const Aligned<float> memory(v_size + threads * (u_size + m_size));
    float* const v = memory.get();
    torch::stable::parallel_for(0, grid.count, 1, [&](int64_t begin, int64_t end) {
      transform_tiles<PatchPoints>(x, height, width, inputs, grid, -padding[0], -padding[1], begin,
                                   end - begin, pitch, v + begin * kLanes);
    });
    std::atomic<int64_t> callers{0};
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      float* const u = v + v_size + callers.fetch_add(1) * (u_size + m_size);
      float* const m = u + u_size;
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t part = 0; part < parts.count; ++part) {
          const int64_t t0 = parts.begin(part), tiles = parts.begin(part + 1) - t0;
          for (int64_t c = 0; c < inputs; c += kChannels) {
            const int64_t channels = std::min(kChannels, inputs - c);
            const float* const ready =
                prepared ? filters.prepared + panel * filters.panel_size() + c * kPanel : u;
            if (!prepared) filters.transform(panel * kPanel, c, c + channels, u, u_stride);
            multiply(v + (c / kLanes * kPoints * pitch + t0) * kLanes, pitch, channels, ready,
                     u_stride, tiles, m, m_stride, c > 0);
          }
          write_tiles(m, m_stride, y, rows, columns, outputs, grid, t0, tiles, panel * kPanel,
                      epilogue);
        }
    });
  }
};

// --------------------------------------------------------------------------------- weight gradient

// rows × vectors of one point of dU, or `first` of it, += Σ over `tiles` of dY's channels from `a`
// on times x's from `b` on; these are kLanes a tile, vectors b_step apart.
template <int rows, int vectors>
inline void add_outer_products(const float* a, const float* b, int64_t b_step, int64_t tiles,
                               bool first, float* to, int64_t to_stride) {
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[r][v] = V(0.0f);
  for (int64_t t = 0; t < tiles; ++t) {
    V column[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) column[v] = load(b + v * b_step + t * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V row(a[t * kLanes + r]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      float* const at = to + r * to_stride + v * kLanes;
      store(at, first ? sum[r][v] : load(at) + sum[r][v]);
    }
}

// dW from x (n × height × width × inputs) and dY (n × rows × columns × outputs). Where dU is small
// the tiles fall into kGroups groups with sums of their own, which are added in order, and a thread
// takes whole groups: what it transforms nobody else reads. Otherwise, or with more threads than
// groups, threads share the tiles of a chunk for the transforms, then parts of dU for the products.
// Either way a sum runs over the same tiles in the same order.
template <typename X, typename Y, typename S>
struct WeightGradient {
  X x;
  int64_t n, height, width, inputs;
  int64_t padding[2];
  Y dy;
  int64_t rows, columns, outputs;
  Weight<S> dw;

  const Tiles grid{n, rows, columns};
  const int64_t x_blocks = blocks_of(inputs), y_blocks = blocks_of(outputs);
  const int64_t u_size = kPoints * all().stride();
  const int64_t tile_size = kPoints * (x_blocks + y_blocks) * kLanes;  // of V and of dY's points
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());

  void run() const {
    constexpr int64_t kGroups = 8, kSmall = 1 << 18, kShared = 3 << 20, kOwn = 160 << 10;  // floats
    const int64_t groups = u_size <= kSmall && grid.count >= 128 * kGroups ? kGroups : 1;
    const bool own = groups > 1 && threads <= groups;
    const int64_t fit = (own ? kOwn : kShared) / tile_size / kDepth * kDepth;
    const int64_t chunk = std::min(std::max(fit, kDepth), gemm::round_up(grid.count, kDepth));
    if (groups == 1 && grid.count <= chunk && blocks() >= threads) return by_blocks();
    const int64_t size = Aligned<float>::padded((chunk | 1) * tile_size);
    const Aligned<float> memory(groups * u_size + (own ? threads : 1) * size);
    float* const du = memory.get();
    float* const scratch = du + groups * u_size;
    const auto tiles_of = [&](int64_t group) { return group * grid.count / groups; };
    if (own) {
      std::atomic<int64_t> callers{0};
      torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        const Points points(*this, chunk, scratch + callers.fetch_add(1) * size);
        for (int64_t group = begin; group < end; ++group)
          for (int64_t t = tiles_of(group); t < tiles_of(group + 1); t += chunk) {
            const int64_t tiles = std::min(chunk, tiles_of(group + 1) - t);
            points.transform(t, t, t + tiles);
            for (int64_t point = 0; point < kPoints; ++point)
              points.multiply(tiles, point, all(), t == tiles_of(group),
                              du + group * u_size + point * all().stride());
          }
      });
    } else {
      const Points points(*this, chunk, scratch);
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t t = tiles_of(group); t < tiles_of(group + 1); t += chunk) {
          const int64_t tiles = std::min(chunk, tiles_of(group + 1) - t);
          torch::stable::parallel_for(t, t + tiles, 1, [&](int64_t begin, int64_t end) {
            points.transform(t, begin, end);
          });
          torch::stable::parallel_for(0, kPoints * y_blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              const int64_t point = i / y_blocks, k = i % y_blocks;
              const Block block{k, k + 1, 0, x_blocks};
              points.multiply(tiles, point, block, t == tiles_of(group),
                              du + group * u_size + point * all().stride() + k * block.stride());
            }
          });
        }
    }
    torch::stable::parallel_for(0, y_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Block block{k, k + 1, 0, x_blocks};
        float* const sums = du + k * block.stride();
        for (int64_t group = 1; group < groups; ++group)
          for (int64_t point = 0; point < kPoints; ++point) {
            float* const to = sums + point * all().stride();
            for (int64_t at = 0; at < block.stride(); at += kLanes)
              store(to + at, load(to + at) + load(to + group * u_size + at));
          }
        write(sums, all().stride(), block);
      }
    });
  }

 private:
  static constexpr int64_t kDepth = 16;  // tiles that are summed before they join the sum of all

  // Blocks of kLanes output channels [k0, k1) and input channels [c0, c1) of dU, row by row.
  struct Block {
    int64_t k0, k1, c0, c1;
    constexpr int64_t pitch() const { return (c1 - c0 + 1) * kLanes; }
    constexpr int64_t stride() const { return (k1 - k0) * kLanes * pitch(); }  // between points
  };
  static constexpr Block kBlock{0, 32 / kLanes, 0, 128 / kLanes};  // whose 36 points stay in L2
  Block all() const { return {0, y_blocks, 0, x_blocks}; }
  int64_t across() const { return (x_blocks + kBlock.c1 - 1) / kBlock.c1; }
  int64_t blocks() const { return across() * ((y_blocks + kBlock.k1 - 1) / kBlock.k1); }

  // V and dY's points of up to `most` tiles.
  struct Points {
    const WeightGradient& of;
    int64_t pitch;
    float *v, *d;

    Points(const WeightGradient& of, int64_t most, float* scratch)
        : of(of), pitch(most | 1), v(scratch), d(v + kPoints * of.x_blocks * kLanes * pitch) {}

    // Of tiles [begin, end), where t0 is the first that is here.
    void transform(int64_t t0, int64_t begin, int64_t end) const {
      const int64_t at = (begin - t0) * kLanes;
      transform_tiles<PatchPoints>(of.x, of.height, of.width, of.inputs, of.grid, -of.padding[0],
                                   -of.padding[1], begin, end - begin, pitch, v + at);
      transform_tiles<TilePoints>(of.dy, of.rows, of.columns, of.outputs, of.grid, 0, 0, begin,
                                  end - begin, pitch, d + at);
    }
    void multiply(int64_t tiles, int64_t point, const Block& block, bool first, float* to) const;
  };

  // Of few tiles: the sums of a block at once, then what becomes of them.
  void by_blocks() const {
    const int64_t scratch = kPoints * kBlock.stride();
    const int64_t size = Aligned<float>::padded((grid.count | 1) * tile_size);
    const Aligned<float> memory(size + threads * scratch);
    const Points points(*this, grid.count, memory.get());
    torch::stable::parallel_for(
        0, grid.count, 1, [&](int64_t begin, int64_t end) { points.transform(0, begin, end); });
    std::atomic<int64_t> callers{0};
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t begin, int64_t end) {
      float* const sums = memory.get() + size + callers.fetch_add(1) * scratch;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i / across() * kBlock.k1, c = i % across() * kBlock.c1;
        const Block block{k, std::min(k + kBlock.k1, y_blocks), c,
                          std::min(c + kBlock.c1, x_blocks)};
        for (int64_t point = 0; point < kPoints; ++point)
          points.multiply(grid.count, point, block, true, sums + point * block.stride());
        write(sums, block.stride(), block);
      }
    });
  }

  // Gᵀ dU G of a block, whose points are `stride` apart.
  void write(const float* du, int64_t stride, const Block& block) const {
    for (int64_t k = block.k0 * kLanes; k < std::min(block.k1 * kLanes, outputs); ++k)
      for (int64_t c = block.c0 * kLanes; c < std::min(block.c1 * kLanes, inputs); c += kLanes) {
        const float* const from =
            du + (k - block.k0 * kLanes) * block.pitch() + c - block.c0 * kLanes;
        const int64_t lanes = std::min(kLanes, inputs - c);
        both_ways<FilterOfPoints>(
            [&](int i, int j) { return load(from + (i * kPatch + j) * stride); },
            [&](int i, int j, V value) {
              S* const at = dw.at(k, c, i, j);
              if (dw.stride[1] == 1) return store(at, value, lanes);
              float numbers[kLanes];
              store(numbers, value);
              for (int64_t l = 0; l < lanes; ++l) at[l * dw.stride[1]] = narrow<S>(numbers[l]);
            });
      }
  }
};

// One point of a block of dU += dY's points · V.
template <typename X, typename Y, typename S>
void WeightGradient<X, Y, S>::Points::multiply(int64_t tiles, int64_t point, const Block& block,
                                               bool first, float* to) const {
  constexpr int kHeight = kLanes / 2;
  const int64_t piece = pitch * kLanes, step = kPoints * piece, row = block.pitch();
  for (int64_t t = 0; t < tiles; t += kDepth, first = false) {
    const int64_t depth = std::min(kDepth, tiles - t);
    for (int64_t c = block.c0; c < block.c1; c += 2)
      for (int64_t k = block.k0; k < block.k1; ++k)
        for (int64_t half = 0; half < kLanes; half += kHeight) {
          const float* const a = d + point * piece + k * step + t * kLanes + half;
          const float* const b = v + point * piece + c * step + t * kLanes;
          float* const sums = to + ((k - block.k0) * kLanes + half) * row + (c - block.c0) * kLanes;
          if (c + 1 < block.c1)
            add_outer_products<kHeight, 2>(a, b, step, depth, first, sums, row);
          else
            add_outer_products<kHeight, 1>(a, b, step, depth, first, sums, row);
        }
  }
}

}  // namespace dlkernels::conv2d::winograd

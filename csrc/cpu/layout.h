// Images between NCHW and NHWC: for each image the transpose of a matrix of channels × pixels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace dlkernels::layout {

// rows × columns, at most a vector of each, from rows `pitch` apart to their transpose, through a
// square in L1.
template <typename S>
void transpose_square(const S* from, int64_t pitch, S* to, int64_t to_pitch, int64_t rows,
                      int64_t columns) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  T square[V::size * V::size];
  for (int64_t r = 0; r < V::size; ++r)
    store(square + r * V::size, r < rows ? load(from + r * pitch, columns) : V(T(0)));
  for (int64_t c = 0; c < columns; c += kPiece<T>) {
    V v[kPiece<T>];
    for (int64_t q = 0; q < kPiece<T>; ++q)
      v[q] = load_pieces(square + q * V::size + c, kPiece<T> * V::size);
    transpose_pieces(v);
    for (int64_t q = 0; q < std::min(kPiece<T>, columns - c); ++q)
      store(to + (c + q) * to_pitch, v[q], rows);
  }
}

// `count` matrices of rows × columns, each contiguous, to their transposes. A NaN stays one, any
// other number keeps its bits.
template <typename S>
void transpose(const S* from, S* to, int64_t count, int64_t rows, int64_t columns) {
  constexpr int64_t kSize = Vec<accumulate_t<S>>::size;
  constexpr int64_t kTile = 64;        // rows and columns that go from cache to cache at once
  constexpr int64_t kGrain = 1 << 15;  // fewest elements worth a second thread
  const int64_t down = (rows + kTile - 1) / kTile, across = (columns + kTile - 1) / kTile;
  const int64_t size = std::min(rows, kTile) * std::min(columns, kTile);
  torch::stable::parallel_for(
      0, count * down * across, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)),
      [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          // What is written next lies beside what was written last.
          const int64_t image = tile / (down * across) * rows * columns;
          const int64_t r0 = tile % down * kTile, c0 = tile / down % across * kTile;
          const int64_t r1 = std::min(rows, r0 + kTile), c1 = std::min(columns, c0 + kTile);
          for (int64_t r = r0; r < r1; r += kSize)
            for (int64_t c = c0; c < c1; c += kSize)
              transpose_square(from + image + r * columns + c, columns, to + image + c * rows + r,
                               rows, std::min(kSize, r1 - r), std::min(kSize, c1 - c));
        }
      });
}

}  // namespace dlkernels::layout

// Memory formats of images, and images between NCHW and NHWC: for each image the transpose of a
// matrix of channels × pixels.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "memory.h"
#include "simd.h"

namespace dlkernels::layout {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;
using Sizes = std::array<int64_t, 4>;

inline Sizes sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// What torch's suggest_memory_format says of four or five dimensions: strides that grow from
// channels to columns, rows and batch. Where sizes of 1 leave it open, and of an empty tensor, it
// is NCHW.
inline bool suggests_channels_last(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if ((last != 3 && last != 4) || x.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t at = 0; at <= last; ++at) {
    const int64_t d = at == 0 ? 1 : at == last ? 0 : last + 1 - at;
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 0 || stride < least || (d == 0 && least == x.stride(1))) return false;
    least = stride * std::max<int64_t>(size, 1);
  }
  return true;
}

// Of the gradient of x.
inline MemoryFormat format_of(const Tensor& x) {
  return suggests_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Of a convolution's output.
inline MemoryFormat output_format(const Tensor& input, const Tensor& weight) {
  const bool last = suggests_channels_last(input) || suggests_channels_last(weight);
  return last && input.size(0) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor empty(const Sizes& sizes, torch::headeronly::ScalarType dtype, MemoryFormat format) {
  return in_huge_pages(torch::stable::empty(
      sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      std::nullopt, format));
}
inline Tensor empty(const Tensor& like, const Sizes& sizes, MemoryFormat format) {
  return empty(sizes, like.scalar_type(), format);
}
// For the gradient of x.
inline Tensor empty_gradient(const Tensor& x) { return empty(x, sizes_of(x), format_of(x)); }

// Whether x lies without gaps in the order of dimensions `order`, the last the fastest.
inline bool is_dense(const Tensor& x, const std::array<int, 4>& order) {
  int64_t wanted = 1;
  for (int at = 4; at-- > 0;) {
    const int d = order[at];
    if (x.size(d) != 1 && x.stride(d) != wanted) return false;
    wanted *= x.size(d);
  }
  return true;
}
inline bool is_nchw(const Tensor& x) { return is_dense(x, {0, 1, 2, 3}); }
inline bool is_nhwc(const Tensor& x) { return is_dense(x, {0, 2, 3, 1}); }

// rows × columns, at most a vector of each, from rows `pitch` apart to their transpose, through a
// square in L1.
template <typename S, typename R>
void transpose_square(const S* from, int64_t pitch, R* to, int64_t to_pitch, int64_t rows,
                      int64_t columns) {
  using T = accumulate_t<S>;
  static_assert(std::is_same_v<T, accumulate_t<R>>);
  using V = Vec<T>;
  T square[V::size * V::size];
  // Of a whole square the compiler knows all sizes.
  const auto through = [&](int64_t rows, int64_t columns) __attribute__((always_inline)) {
    for (int64_t r = 0; r < V::size; ++r)
      store(square + r * V::size, r < rows ? load(from + r * pitch, columns) : V(T(0)));
    for (int64_t c = 0; c < columns; c += kPiece<T>) {
      V v[kPiece<T>];
      for (int64_t q = 0; q < kPiece<T>; ++q)
        v[q] = load_pieces(square + q * V::size + c, kPiece<T> * V::size);
      transpose_pieces(v);
#pragma GCC unroll 4
      for (int64_t q = 0; q < kPiece<T>; ++q)
        if (c + q < columns) store(to + (c + q) * to_pitch, v[q], rows);
    }
  };
  if (rows == V::size && columns == V::size)
    through(V::size, V::size);
  else
    through(rows, columns);
}

// Columns of `rows` rows, a number known to the compiler, to their transpose, and back.
template <int rows, typename S>
void interleave(const S* from, int64_t pitch, S* to, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c)
    for (int r = 0; r < rows; ++r) to[c * rows + r] = from[r * pitch + c];
}
template <int rows, typename S>
void separate(const S* from, S* to, int64_t pitch, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c)
    for (int r = 0; r < rows; ++r) to[r * pitch + c] = from[c * rows + r];
}

// As interleave or separate, for 1 to kFew rows of which nothing is known.
constexpr int64_t kFew = 4;
template <typename S>
void transpose_few(bool into, const S* from, S* to, int64_t pitch, int64_t rows, int64_t columns) {
  const auto with = [&](auto known) {
    into ? interleave<known>(from, pitch, to, columns) : separate<known>(from, to, pitch, columns);
  };
  switch (rows) {
    case 1:
      return with(std::integral_constant<int, 1>());
    case 2:
      return with(std::integral_constant<int, 2>());
    case 3:
      return with(std::integral_constant<int, 3>());
    default:
      return with(std::integral_constant<int, 4>());
  }
}

// `count` matrices of rows × columns, each contiguous, to their transposes. A NaN stays one, any
// other number keeps its bits.
template <typename S>
void transpose(const S* from, S* to, int64_t count, int64_t rows, int64_t columns) {
  constexpr int64_t kSize = Vec<accumulate_t<S>>::size;
  constexpr int64_t kGrain = 1 << 15;  // fewest elements worth a second thread
  const bool few_rows = rows <= kFew, few_columns = columns <= kFew;
  // Rows and columns that go from cache to cache at once.
  const int64_t height = few_columns ? 4096 : 64, width = few_rows ? 4096 : 64;
  const int64_t down = (rows + height - 1) / height, across = (columns + width - 1) / width;
  const int64_t size = std::min(rows, height) * std::min(columns, width);
  torch::stable::parallel_for(
      0, count * down * across, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)),
      [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          // What is written next lies beside what was written last.
          const int64_t image = tile / (down * across) * rows * columns;
          const int64_t r0 = tile % down * height, c0 = tile / down % across * width;
          const int64_t r1 = std::min(rows, r0 + height), c1 = std::min(columns, c0 + width);
          const S* const source = from + image;
          S* const result = to + image;
          if (few_rows)
            transpose_few(true, source + c0, result + c0 * rows, columns, rows, c1 - c0);
          else if (few_columns)
            transpose_few(false, source + r0 * columns, result + r0, rows, columns, r1 - r0);
          else
            for (int64_t c = c0; c < c1; c += kSize)
              for (int64_t r = r0; r < r1; r += kSize) {
                // Rows a page apart are no stream to the hardware.
                for (int64_t k = r; k < std::min(kSize + r, r1); ++k)
                  __builtin_prefetch(source + k * columns + c + width, 0, 2);
                transpose_square(source + r * columns + c, columns, result + c * rows + r, rows,
                                 std::min(kSize, r1 - r), std::min(kSize, c1 - c));
              }
        }
      });
}

// x in `format`: a copy; itself, or torch's copy, where it is no dense image in the other format.
template <typename S>
Tensor copied(const Tensor& x, MemoryFormat format) {
  const bool last = format == MemoryFormat::ChannelsLast;
  if (!(last ? is_nchw(x) : is_nhwc(x))) return torch::stable::contiguous(x, format);
  const Tensor made = empty(x, sizes_of(x), format);
  const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
  transpose(static_cast<const S*>(x.const_data_ptr()), static_cast<S*>(made.mutable_data_ptr()),
            x.size(0), last ? channels : pixels, last ? pixels : channels);
  return made;
}

}  // namespace dlkernels::layout

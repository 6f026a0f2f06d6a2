// Matrix products: the one packing and the one micro-kernel of every op that has them.
//
//   C[m×n] = A[m×k]·B[k×n], A and B in any strides, elements float, double, bf16 or f16, sums in
//   float (double for double). Each sum over k, or each of the lanes that share it, is cut into
//   blocks of at most kFlush words, so that its error grows with the root of their number; by the
//   shape alone: the same bits however threads share rows and columns.
//
// Tiling (Goto and van de Geijn, 2008, with A and B changed about, for an L1 that does not hold a
// panel of B):
//   micro-kernel  kRows × kVectors vectors of C in registers; per k a load of each vector of B
//                 and a broadcast of each row of A
//   panel of A    kRows × kDepth, packed row by row, in L1 while all panels of B pass by
//   panel of B    kDepth × (kVectors vectors), packed k by k, from L2: 2·kRows/4 flops a byte
//   block         kBlockRows × kBlockColumns of C, whose B is packed once (or in deep panels)
// Packing converts to the accumulation type, or to pairs of bf16 where the processor multiplies
// those; rows and columns beyond the matrix are zeros. Few rows are not worth the packing of B:
// they go through kernels of their own, which read it as it lies; few columns are the few rows of
// Cᵀ = Bᵀ·Aᵀ.
//
// Measured, one thread of an AMD EPYC with AVX-512 of 114 GF/s: 99-107 GF/s at 1024³ and 2048³,
// 98-104 at 64×784×512 (m×k×n); bf16 190-200; AVX2, of 116: 98-106.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "simd.h"

namespace dlkernels::gemm {

template <typename S>
struct Matrix {
  using Element = S;
  const S* data;
  int64_t row_stride, column_stride;
  const S* at(int64_t i, int64_t j) const { return data + i * row_stride + j * column_stride; }
  Matrix transposed() const { return {data, column_stride, row_stride}; }
};

#if DLK_AVX512
constexpr int64_t kRows = 12, kVectors = 2;  // 24 of 32 registers
#else
constexpr int64_t kRows = 6, kVectors = 2;  // 12 of 16
#endif
constexpr int64_t kDepth = 256, kPitch = kDepth + 16;
constexpr int64_t kBlockRows = 8 * kRows, kBlockColumns = 512;
constexpr int64_t kFewRows = 4;
constexpr int64_t kFlush = 64;  // words that are summed before they join the sum of all

template <typename T>
constexpr int64_t kColumns = kVectors * Vec<T>::size;

using dlkernels::round_up;

// ------------------------------------------------------------------------------------------- words

// What is packed: words of the size of T, each of one element or, with kPair, of two that follow
// each other in k. `size` is what is left of k from `from` on: beyond it are zeros.
template <typename S>
struct Word {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  static constexpr bool kPair = false;
  // n words along k, which is contiguous.
  static V along(const S* from, int64_t n, int64_t) { return load(from, n); }
  // A word of each of n neighbours; k is `stride` apart.
  static V across(const S* from, int64_t, int64_t, int64_t n) { return load(from, n); }
  static T one(const S* from, int64_t, int64_t) { return widen(*from); }
};

#if DLK_BF16
template <>
struct Word<bf16> {
  using T = float;
  using V = Vec<float>;
  static constexpr bool kPair = true;
  static V along(const bf16* from, int64_t n, int64_t size) {
    return load_bits(from, std::min(2 * n, size));
  }
  static V across(const bf16* from, int64_t stride, int64_t size, int64_t n) {
    return interleave(from, size > 1 ? from + stride : nullptr, n);
  }
  static T one(const bf16* from, int64_t stride, int64_t size) {
    return bit_cast<float>(uint32_t(from->bits) | (size > 1 ? from[stride].bits << 16 : 0));
  }
};
#endif

template <typename T, bool pair>
inline Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> sum) {
#if DLK_BF16
  if constexpr (pair) return add_products(a, b, sum);
#endif
  return fma(a, b, sum);
}

template <typename S>
constexpr int64_t words(int64_t k) {
  return Word<S>::kPair ? (k + 1) / 2 : k;
}

// ----------------------------------------------------------------------------------------- packing

// Rows [i, i + rows) of A and `depth` words from word p on, as rows of kPitch words.
template <typename S>
void pack_a(const Matrix<S>& a, int64_t i, int64_t rows, int64_t p, int64_t depth, int64_t k,
            accumulate_t<S>* to) {
  using W = Word<S>;
  using T = accumulate_t<S>;
  using V = Vec<T>;
  constexpr int64_t terms = W::kPair ? 2 : 1;
  if (a.column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r, to += kPitch)
      for (int64_t d = 0; d < depth; d += V::size) {
        const int64_t at = (p + d) * terms;
        store(to + d, W::along(a.at(i + r, at), std::min(V::size, depth - d), k - at));
      }
  } else if (a.row_stride == 1) {  // words of V::size rows, transposed in pieces; all rows of a
                                   // piece in turn, which lie side by side
    for (int64_t d = 0; d < depth; d += kPiece<T>)
      for (int64_t r = 0; r < rows; r += V::size) {
        const int64_t lanes = std::min(V::size, rows - r);
        V v[kPiece<T>];
        for (int64_t q = 0; q < kPiece<T>; ++q) {
          const int64_t at = (p + d + q) * terms;
          __builtin_prefetch(a.at(i + r, at + 16 * terms));
          v[q] =
              d + q < depth ? W::across(a.at(i + r, at), a.column_stride, k - at, lanes) : V(T(0));
        }
        transpose_pieces(v);
        T transposed[kPiece<T> * V::size];
        for (int64_t q = 0; q < kPiece<T>; ++q)
          store_pieces(transposed + q * kPiece<T>, kPiece<T> * kPiece<T>, v[q]);
        for (int64_t l = 0; l < lanes; ++l)
          std::copy_n(transposed + l * kPiece<T>, kPiece<T>, to + (r + l) * kPitch + d);
      }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < depth; ++d) {
        const int64_t at = (p + d) * terms;
        to[r * kPitch + d] = W::one(a.at(i + r, at), a.column_stride, k - at);
      }
  }
}

// One vector of columns from column j on, of which n are there: `depth` words from word p on, each
// kColumns from the one before.
template <typename S>
void pack_columns(const Matrix<S>& b, int64_t p, int64_t depth, int64_t k, int64_t j, int64_t n,
                  accumulate_t<S>* to) {
  using W = Word<S>;
  using T = accumulate_t<S>;
  using V = Vec<T>;
  constexpr int64_t terms = W::kPair ? 2 : 1, step = kColumns<T>;
  if (n == 0) {
    for (int64_t d = 0; d < depth; ++d) store(to + d * step, V(T(0)));
  } else if (b.column_stride == 1) {
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t at = (p + d) * terms;
      store(to + d * step, W::across(b.at(at, j), b.row_stride, k - at, n));
    }
  } else if (b.row_stride == 1) {
    for (int64_t d = 0; d < depth; d += V::size) {  // a square of Vec::size through L1
      const int64_t at = (p + d) * terms, size = std::min(V::size, depth - d);
      T square[V::size * V::size];
      if constexpr (std::is_same_v<S, T>)
        if (n == V::size && size == V::size) {  // all of it is there: no need of the square
          for (int64_t q = 0; q < V::size; q += kPiece<T>) {
            V v[kPiece<T>];
            for (int64_t r = 0; r < kPiece<T>; ++r)
              v[r] = load_pieces(b.at(at + q, j + r), kPiece<T> * b.column_stride);
            transpose_pieces(v);
            for (int64_t r = 0; r < kPiece<T>; ++r) store(to + (d + q + r) * step, v[r]);
          }
          continue;
        }
      for (int64_t l = 0; l < V::size; ++l)
        store(square + l * V::size, l < n ? W::along(b.at(at, j + l), size, k - at) : V(T(0)));
      for (int64_t q = 0; q < size; q += kPiece<T>) {
        V v[kPiece<T>];
        for (int64_t r = 0; r < kPiece<T>; ++r)
          v[r] = load_pieces(square + r * V::size + q, kPiece<T> * V::size);
        transpose_pieces(v);
        for (int64_t r = 0; r < std::min(kPiece<T>, size - q); ++r)
          store(to + (d + q + r) * step, v[r]);
      }
    }
  } else {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t l = 0; l < V::size; ++l) {
        const int64_t at = (p + d) * terms;
        to[d * step + l] = l < n ? W::one(b.at(at, j + l), b.row_stride, k - at) : T(0);
      }
  }
}

// `depth` words from word p on of columns [j, j + columns) of B, as panels of kColumns.
template <typename MB, typename T>
void pack_b(const MB& b, int64_t p, int64_t depth, int64_t k, int64_t j, int64_t columns, T* to) {
  using V = Vec<T>;
  // Rows that are contiguous are read along, a few side by side: memory's own prefetching sees
  // them.
  const int64_t at_once = b.column_stride == 1 ? 8 : depth;
  for (int64_t d = 0; d < depth; d += at_once)
    for (int64_t c = 0; c < columns; c += kColumns<T>)
      for (int64_t v = 0; v < kColumns<T>; v += V::size)
        pack_columns(b, p + d, std::min(at_once, depth - d), k, j + c + v,
                     std::clamp<int64_t>(columns - c - v, 0, V::size),
                     to + c * depth + d * kColumns<T> + v);
}

// A matrix whose rows lie anywhere, each contiguous.
template <typename S>
struct Rows {
  using Element = S;
  static constexpr int64_t column_stride = 1;
  const S* const* row;
};

template <typename S>
void pack_a(const Rows<S>& a, int64_t i, int64_t rows, int64_t p, int64_t depth, int64_t k,
            accumulate_t<S>* to) {
  for (int64_t r = 0; r < rows; ++r, to += kPitch)
    pack_a(Matrix<S>{a.row[i + r], 0, 1}, 0, 1, p, depth, k, to);
}

template <typename S>
void pack_columns(const Rows<S>& b, int64_t p, int64_t depth, int64_t k, int64_t j, int64_t n,
                  accumulate_t<S>* to) {
  using W = Word<S>;
  using T = accumulate_t<S>;
  constexpr int64_t terms = W::kPair ? 2 : 1;
  for (int64_t d = 0; d < depth; ++d, to += kColumns<T>) {
    const int64_t at = (p + d) * terms;
    const int64_t step = W::kPair && at + 1 < k ? b.row[at + 1] - b.row[at] : 0;
    store(to, n ? W::across(b.row[at] + j, step, k - at, n) : Vec<T>(T(0)));
  }
}

// ------------------------------------------------------------------------------------ micro-kernel

// Memory that is asked for under the arithmetic: `step` bytes from `from` on for each k.
struct Ahead {
  const char* from;
  int64_t step;
};

// rows × vectors of C over `depth` words into `sums`, or on top of them. They are in L1: reading
// them back for the epilogue costs less than a kernel for each epilogue would.
template <typename T, bool pair, int rows, int vectors>
void multiply_tile(const T* a, const T* b, int64_t depth, bool add, T* sums, int64_t pitch,
                   Ahead ahead) {
  using V = Vec<T>;
  // A sum that is short as a whole costs little more in shorter pieces.
  const int64_t flush = depth > kFlush ? kFlush : kFlush / 4;
  for (int64_t k0 = 0; k0 < std::max<int64_t>(depth, 1); k0 += flush, add = true) {
    V sum[rows][vectors];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] = V(T(0));
    const int64_t end = std::min(depth, k0 + flush);
    for (int64_t k = k0; k < end; ++k, b += kColumns<T>) {
      __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
      V column[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) column[v] = load(b + v * V::size);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const V row(a[r * kPitch + k]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = multiply_add<T, pair>(row, column[v], sum[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        T* to = sums + r * pitch + v * V::size;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
      }
  }
}

// multiply_tile for the number of rows and vectors that there are.
template <typename T, bool pair, int... rows>
void multiply_rows(int64_t n, bool second, const T* a, const T* b, int64_t depth, bool add, T* sums,
                   int64_t pitch, Ahead ahead, std::integer_sequence<int, rows...>) {
  using Kernel = void (*)(const T*, const T*, int64_t, bool, T*, int64_t, Ahead);
  constexpr Kernel kKernels[2][sizeof...(rows)] = {
      {&multiply_tile<T, pair, rows + 1, 1>...}, {&multiply_tile<T, pair, rows + 1, kVectors>...}};
  kKernels[second][n - 1](a, b, depth, add, sums, pitch, ahead);
}

// ----------------------------------------------------------------------------------------- batched

// The batched form, for many small products whose operands are made where they are used: A lies in
// pieces of Vec::size words of k, row after row, B as packed panels do.
//
// rows × kColumns of C, or as many `vectors` of them, += A·B over `pieces` pieces, `step` apart, of
// which the last has `last` words; `at_once` of them are summed before they join C.
template <typename T, bool pair, int at_once, int vectors, int rows>
void multiply_piece_rows(const T* a, int64_t step, int64_t pieces, int64_t last, const T* b,
                         bool add, T* c) {
  using V = Vec<T>;
  constexpr int kLine = 64 / sizeof(V);  // vectors
  for (int64_t piece = 0; piece < pieces; add = true) {
    V sum[rows][vectors];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] = V(T(0));
    for (const int64_t end = std::min<int64_t>(pieces, piece + at_once); piece < end;
         ++piece, a += step) {
      const int64_t words = piece + 1 < pieces ? V::size : last;
      for (int64_t k = 0; k < words; ++k, b += kColumns<T>) {
        // As far ahead as the farthest cache takes: a panel is used by few rows.
        for (int v = 0; v < vectors; v += kLine)
          __builtin_prefetch(b + 16 * kColumns<T> + v * V::size, 0, 3);
        V column[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) column[v] = load(b + v * V::size);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
          const V row(a[r * V::size + k]);
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v)
            sum[r][v] = multiply_add<T, pair>(row, column[v], sum[r][v]);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        T* const at = c + r * kColumns<T> + v * V::size;
        store(at, add ? load(at) + sum[r][v] : sum[r][v]);
      }
  }
}

// The same for any number of rows.
template <bool pair, int at_once, int vectors, typename T, int... rows>
void multiply_pieces(const T* a, int64_t step, int64_t pieces, int64_t last, const T* b, int64_t m,
                     bool add, T* c, std::integer_sequence<int, rows...>) {
  using Kernel = void (*)(const T*, int64_t, int64_t, int64_t, const T*, bool, T*);
  constexpr Kernel kKernels[] = {&multiply_piece_rows<T, pair, at_once, vectors, rows + 1>...};
  // Of even heights: 13 rows are 7 and 6.
  for (int64_t tiles = (m + kRows - 1) / kRows, i = 0; tiles > 0; --tiles) {
    const int64_t height = (m - i + tiles - 1) / tiles;
    kKernels[height - 1](a + i * Vec<T>::size, step, pieces, last, b, add, c + i * kColumns<T>);
    i += height;
  }
}
template <bool pair = false, int words_at_once = 32, int vectors = kVectors, typename T>
void multiply_pieces(const T* a, int64_t step, int64_t pieces, int64_t last, const T* b, int64_t m,
                     bool add, T* c) {
  multiply_pieces<pair, words_at_once / int(Vec<T>::size), vectors>(
      a, step, pieces, last, b, m, add, c, std::make_integer_sequence<int, int(kRows)>());
}

// ------------------------------------------------------------------------------------------- whole

// How a product of k terms is cut: into blocks of columns, whose packed B is to stay in the nearer
// caches; where B is deep, also into panels of it, with the sums of as many rows in memory.
template <typename S>
struct Cut {
  static constexpr int64_t kBytes = 2 << 20, kLeast = 128;  // of packed B; fewest columns
  int64_t columns = kBlockColumns, panel, rows;
  bool deep;

  explicit Cut(int64_t k) {
    const int64_t depth = words<S>(k), fit = kBytes / int64_t(sizeof(accumulate_t<S>));
    const int64_t fitting = fit / std::max<int64_t>(1, depth) / kLeast * kLeast;
    deep = fitting < kBlockColumns;
    panel = deep ? fit / kBlockColumns / kDepth * kDepth : depth;
    rows = deep ? 8 * kBlockRows : kBlockRows;
    if (!deep) columns = std::min(fitting, kBlockColumns);
  }
};

// Scratch of one thread for run on m rows, n columns and k terms, in elements of T.
template <typename S>
int64_t scratch_size(int64_t m, int64_t n, int64_t k) {
  const Cut<S> cut(k);
  const int64_t columns = round_up(std::min(n, cut.columns), kColumns<accumulate_t<S>>);
  const int64_t rows = std::min(round_up(m, kRows), cut.rows);
  return cut.panel * columns + kBlockRows * kPitch + rows * columns;
}

// The product of rows [i, i + rows), at most kBlockRows, with `columns` columns from j on over
// words [p0, p1), on top of what is in `sums` from p0 > 0 on. `packed_b` begins at p0. If these are
// the last words each vector of C goes to store_c; A's rows have been read by then: C may lie over
// them.
template <typename MA, typename T, typename Store>
void multiply_block(const MA& a, const T* packed_b, int64_t i, int64_t rows, int64_t j,
                    int64_t columns, int64_t p0, int64_t p1, int64_t k, T* packed_a, T* sums,
                    const Store& store_c, const void* next = nullptr, int64_t size = 0) {
  using A = typename MA::Element;
  using V = Vec<T>;
  const int64_t pitch = round_up(columns, kColumns<T>), depth = words<A>(k);
  const int64_t tiles = (rows + kRows - 1) / kRows * (pitch / kColumns<T>);
  const int64_t step = size / std::max<int64_t>(1, tiles * (p1 - p0));
  const char* from = static_cast<const char*>(next);
  int64_t p = p0;
  do {  // a product of no terms is a block of zeros
    const int64_t n = std::min(kDepth, p1 - p);
    pack_a(a, i, rows, p, n, k, packed_a);
    const T* const panel = packed_b + (p - p0) * pitch;
    for (int64_t r = 0; r < rows; r += kRows)
      for (int64_t c = 0; c < columns; c += kColumns<T>) {
        const int64_t height = std::min(kRows, rows - r);
        const int64_t width = std::min(kColumns<T>, columns - c);
        T* const tile = sums + r * pitch + c;
        const Ahead ahead{from ? from : reinterpret_cast<const char*>(tile), step};
        multiply_rows<T, Word<A>::kPair>(height, width > V::size, packed_a + r * kPitch,
                                         panel + c * n, n, p > 0, tile, pitch, ahead,
                                         std::make_integer_sequence<int, int(kRows)>());
        if (from) from += n * step;
        if (p + n < depth) continue;
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; x += V::size)
            store_c(i + r + y, j + c + x, std::min(V::size, width - x), load(tile + y * pitch + x));
      }
    p += n;
  } while (p < p1);
}

// Words [p0, p1) of columns [j, j + columns) of B, as multiply_block reads them.
template <typename MB, typename T>
void pack_panels(const MB& b, int64_t p0, int64_t p1, int64_t k, int64_t j, int64_t columns,
                 T* to) {
  const int64_t pitch = round_up(columns, kColumns<T>);
  for (int64_t p = p0; p < p1; p += kDepth)
    pack_b(b, p, std::min(kDepth, p1 - p), k, j, columns, to + (p - p0) * pitch);
}

// Rows [i0, i1) and columns [j0, j1) of A·B on the calling thread. Each vector of C goes once to
// store_c(i, j, lanes, value): columns j … j + lanes − 1 of row i. A and B may differ in type where
// their words are alike.
template <typename MA, typename MB, typename T, typename Store>
void run(const MA& a, const MB& b, int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t k,
         T* scratch, const Store& store_c) {
  using A = typename MA::Element;
  using B = typename MB::Element;
  static_assert(Word<A>::kPair == Word<B>::kPair && std::is_same_v<T, accumulate_t<B>>);
  const Cut<A> cut(k);
  const int64_t depth = words<A>(k);
  for (int64_t j = j0; j < j1; j += cut.columns) {
    const int64_t columns = std::min(cut.columns, j1 - j), pitch = round_up(columns, kColumns<T>);
    T* const packed_b = scratch;
    T* const packed_a = packed_b + cut.panel * pitch;
    T* const sums = packed_a + kBlockRows * kPitch;
    if (!cut.deep) pack_panels(b, 0, depth, k, j, columns, packed_b);
    const int64_t height = cut.deep ? cut.rows : i1 - i0;
    for (int64_t top = i0; top < i1; top += height)
      for (int64_t p = 0; p < std::max<int64_t>(depth, 1); p += std::max<int64_t>(cut.panel, 1)) {
        const int64_t end = std::min(depth, p + cut.panel);
        if (cut.deep) pack_panels(b, p, end, k, j, columns, packed_b);
        for (int64_t i = top; i < std::min(i1, top + height); i += kBlockRows)
          multiply_block(a, packed_b, i, std::min(kBlockRows, i1 - i), j, columns, p, end, k,
                         packed_a, sums + (cut.deep ? (i - top) * pitch : 0), store_c);
      }
  }
}

// The whole of a B that many products share, packed once: words(k) × round_up(n, kColumns).
template <typename S>
struct Packed {
  const accumulate_t<S>* data;
  int64_t n, k;

  static int64_t size(int64_t n, int64_t k) {
    return words<S>(k) * round_up(n, kColumns<accumulate_t<S>>);
  }
  Packed(const Matrix<S>& b, int64_t n, int64_t k, accumulate_t<S>* to) : data(to), n(n), k(k) {
    pack_panels(b, 0, words<S>(k), k, 0, n, to);
  }
  // Of what pack_panels has packed, each kDepth words by somebody.
  Packed(const accumulate_t<S>* data, int64_t n, int64_t k) : data(data), n(n), k(k) {}
  // Of run_block, for each of its threads.
  int64_t scratch_size() const {
    return kBlockRows * (kPitch + round_up(n, kColumns<accumulate_t<S>>));
  }
};

// Rows [i, i + rows) of A·B, at most kBlockRows, all columns, on the calling thread; as run. C may
// lie over A; meanwhile `size` bytes from `next` on come nearer.
template <typename A, typename B, typename Store>
void run_block(const Matrix<A>& a, const Packed<B>& b, int64_t i, int64_t rows,
               accumulate_t<A>* scratch, const Store& store_c, const void* next, int64_t size) {
  static_assert(Word<A>::kPair == Word<B>::kPair);
  multiply_block(a, b.data, i, rows, 0, b.n, 0, words<A>(b.k), b.k, scratch,
                 scratch + kBlockRows * kPitch, store_c, next, size);
}

// -------------------------------------------------------------------------------------- few rows

// One vector of columns from column j on, of which `columns` are there, as rows of `to`.
// B's columns contiguous along k: dot products, lanes over k.
template <typename A, typename B, int rows>
void dot_rows(const Matrix<A>& a, const Matrix<B>& b, int64_t j, int64_t columns, int64_t k,
              accumulate_t<A>* to) {
  using T = accumulate_t<A>;
  using V = Vec<T>;
  constexpr int kAtOnce = 4;
  for (int64_t c = 0; c < columns; c += kAtOnce) {
    // Past the last column its own is read once more.
    const B* column[kAtOnce];
    for (int q = 0; q < kAtOnce; ++q) column[q] = b.at(0, j + std::min(c + q, columns - 1));
    V total[rows][kAtOnce], sum_of[rows][kAtOnce];
    for (auto& row : total) std::fill(row, row + kAtOnce, V(T(0)));
    const auto step = [&](int64_t p, int64_t lanes) {
      V x[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) x[r] = load(a.at(r, p), lanes);
#pragma GCC unroll 4
      for (int q = 0; q < kAtOnce; ++q) {
        const V w = load(column[q] + p, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum_of[r][q] = fma(x[r], w, sum_of[r][q]);
      }
    };
    for (int64_t p = 0; p < k;) {
      for (auto& row : sum_of) std::fill(row, row + kAtOnce, V(T(0)));
      const int64_t end = std::min(k, p + kFlush * V::size);
      for (; p + V::size <= end; p += V::size) step(p, V::size);
      if (p < end) step(p, end - p), p = end;
      for (int r = 0; r < rows; ++r)
        for (int q = 0; q < kAtOnce; ++q) total[r][q] = total[r][q] + sum_of[r][q];
    }
    for (int r = 0; r < rows; ++r)
      for (int q = 0; q < kAtOnce && c + q < columns; ++q)
        to[r * V::size + c + q] = sum(total[r][q]);
  }
}

// The same where B's rows are contiguous: lanes over columns.
template <typename A, typename B, int rows>
void scale_rows(const Matrix<A>& a, const Matrix<B>& b, int64_t j, int64_t columns, int64_t k,
                accumulate_t<A>* to) {
  using T = accumulate_t<A>;
  using V = Vec<T>;
  V total[rows];
  std::fill(total, total + rows, V(T(0)));
  for (int64_t p0 = 0; p0 < k; p0 += kFlush) {
    V part[rows];
    std::fill(part, part + rows, V(T(0)));
    for (int64_t p = p0; p < std::min(k, p0 + kFlush); ++p) {
      const V w = load(b.at(p, j), columns);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) part[r] = fma(V(widen(*a.at(r, p))), w, part[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) total[r] = total[r] + part[r];
  }
  for (int r = 0; r < rows; ++r) store(to + r * V::size, total[r]);
}

// Whether a product is one for run_few_rows, which needs no scratch.
template <typename A, typename B>
bool has_few_rows(const Matrix<A>& a, const Matrix<B>& b, int64_t m, int64_t k) {
  return m <= kFewRows && k > 0 &&
         (b.column_stride == 1 || (b.row_stride == 1 && a.column_stride == 1));
}

template <typename MA, typename MB>
constexpr bool kMatrices = std::is_same_v<MA, Matrix<typename MA::Element>> &&
                           std::is_same_v<MB, Matrix<typename MB::Element>>;

// rows × Vec::size of A·B from column j on, of which `columns` are there.
template <typename A, typename B>
void few_rows(const Matrix<A>& a, const Matrix<B>& b, int64_t rows, int64_t j, int64_t columns,
              int64_t k, accumulate_t<A>* to) {
  using Kernel =
      void (*)(const Matrix<A>&, const Matrix<B>&, int64_t, int64_t, int64_t, accumulate_t<A>*);
  constexpr Kernel kKernels[2][kFewRows] = {
      {&scale_rows<A, B, 1>, &scale_rows<A, B, 2>, &scale_rows<A, B, 3>, &scale_rows<A, B, 4>},
      {&dot_rows<A, B, 1>, &dot_rows<A, B, 2>, &dot_rows<A, B, 3>, &dot_rows<A, B, 4>}};
  kKernels[b.row_stride == 1 && a.column_stride == 1][rows - 1](a, b, j, columns, k, to);
}

// As run, for products that has_few_rows: all rows, columns [j0, j1).
template <typename A, typename B, typename Store>
void run_few_rows(const Matrix<A>& a, const Matrix<B>& b, int64_t m, int64_t j0, int64_t j1,
                  int64_t k, const Store& store_c) {
  using V = Vec<accumulate_t<A>>;
  accumulate_t<A> result[kFewRows * V::size] = {};
  for (int64_t j = j0; j < j1; j += V::size) {
    const int64_t columns = std::min(V::size, j1 - j);
    few_rows(a, b, m, j, columns, k, result);
    for (int64_t r = 0; r < m; ++r) store_c(r, j, columns, load(result + r * V::size));
  }
}

// As run, for products whose transpose has_few_rows: rows [i0, i1), all columns.
template <typename A, typename B, typename Store>
void run_few_columns(const Matrix<A>& a, const Matrix<B>& b, int64_t n, int64_t i0, int64_t i1,
                     int64_t k, const Store& store_c) {
  using T = accumulate_t<A>;
  using V = Vec<T>;
  T result[kFewRows * V::size] = {};
  for (int64_t i = i0; i < i1; i += V::size) {
    const int64_t rows = std::min(V::size, i1 - i);
    few_rows(b.transposed(), a.transposed(), n, i, rows, k, result);
    for (int64_t r = 0; r < rows; ++r) {
      T row[kFewRows];
      for (int64_t c = 0; c < n; ++c) row[c] = result[c * V::size + r];
      for (int64_t c = 0; c < n; c += V::size) {
        const int64_t lanes = std::min(V::size, n - c);
        store_c(i + r, c, lanes, load(row + c, lanes));
      }
    }
  }
}

// ----------------------------------------------------------------------------------------- threads

constexpr int64_t kGrain = 1 << 16;  // fewest multiply-adds worth a second thread

// How many threads share the rows and how many the columns of C: each packs what it needs of A and
// of B, so that nobody waits.
struct Grid {
  int64_t rows = 1, columns = 1;

  Grid(int64_t m, int64_t n, int64_t threads, int64_t columns_at_once) {
    // In multiply-adds per k: packing an element costs as much as kPack of them.
    constexpr int64_t kPack = 6;
    int64_t best = -1;
    for (int64_t r = 1; r <= threads; ++r) {
      const int64_t c = threads / r;
      const int64_t height = round_up((m + r - 1) / r, kRows);
      const int64_t width = round_up((n + c - 1) / c, columns_at_once);
      const int64_t cost = height * width + kPack * (height + width);
      if (best < 0 || cost < best) best = cost, rows = r, columns = c;
    }
  }
};

// Every vector of C[m×n] = A·B goes to store_c(i, j, lanes, value), over all threads. A and B are
// matrices, or anything else that has elements and is packed by functions of its own, pack_a and
// pack_b.
template <typename MA, typename MB, typename Store>
void multiply(const MA& a, const MB& b, int64_t m, int64_t n, int64_t k, const Store& store_c) {
  using A = typename MA::Element;
  using T = accumulate_t<A>;
  if (m == 0 || n == 0) return;
  bool few_rows = false, few_columns = false;
  if constexpr (kMatrices<MA, MB>) {
    few_rows = has_few_rows(a, b, m, k);
    few_columns = !few_rows && has_few_rows(b.transposed(), a.transposed(), n, k);
  }
  const int64_t most = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t threads = std::clamp<int64_t>(m * n * std::max<int64_t>(k, 1) / kGrain, 1, most);
  Grid grid(m, n, threads, kColumns<T>);
  if (few_rows) grid.rows = 1, grid.columns = threads;
  if (few_columns) grid.rows = threads, grid.columns = 1;
  const int64_t height = round_up((m + grid.rows - 1) / grid.rows, kRows);
  const int64_t width = round_up((n + grid.columns - 1) / grid.columns, kColumns<T>);
  const int64_t size =
      few_rows || few_columns
          ? 0
          : Aligned<T>::padded(scratch_size<A>(std::min(height, m), std::min(width, n), k));
  const Aligned<T> memory(threads * size);
  std::atomic<int64_t> callers{0};
  torch::stable::parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    T* const scratch = memory.get() + callers.fetch_add(1) * size;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t / grid.columns * height, j = t % grid.columns * width;
      if (i >= m || j >= n) continue;
      const int64_t i1 = std::min(m, i + height), j1 = std::min(n, j + width);
      if constexpr (kMatrices<MA, MB>) {
        if (few_rows) {
          run_few_rows(a, b, m, j, j1, k, store_c);
          continue;
        }
        if (few_columns) {
          run_few_columns(a, b, n, i, i1, k, store_c);
          continue;
        }
      }
      run(a, b, i, i1, j, j1, k, scratch, store_c);
    }
  });
}

}  // namespace dlkernels::gemm

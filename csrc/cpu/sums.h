// Sums over what an output's channels or features share: the gradient of a bias. Parts of a fixed
// size are added in order: the same bits for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::sums {

constexpr int64_t kPart = 1 << 16;  // elements: fewest that are worth a second thread
constexpr int64_t kBlock = 16;      // vectors whose sum is in float; blocks add up in double

// Σ over the rows of x[m×n].
template <typename S>
void rows(const gemm::Matrix<S>& x, int64_t m, int64_t n, S* to) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  using D = Vec<double>;
  constexpr int64_t kVectors = 4, kStrip = kVectors * V::size, kWidth = 256;
  static_assert(kWidth % kStrip == 0);
  if (n == 0) return;
  const auto row_of = [&](int64_t i, int64_t j, int64_t lanes) {
    if (x.column_stride == 1) return load(x.at(i, j), lanes);
    T row[V::size] = {};
    for (int64_t l = 0; l < lanes; ++l) row[l] = widen(*x.at(i, j + l));
    return load(row);
  };
  // A strip of a block of rows in registers.
  const auto add = [&](int64_t i0, int64_t i1, int64_t j, int64_t width, double* total) {
    V part[kVectors] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t v = 0; v * V::size < width; ++v)
        part[v] = part[v] + row_of(i, j + v * V::size, std::min(V::size, width - v * V::size));
    for (int64_t v = 0; v * V::size < width; ++v) {
      T lanes[V::size];
      store(lanes, part[v]);
      for (int64_t l = 0; l < V::size; l += D::size) {
        double* const at = total + v * V::size + l;
        store(at, load(at) + load_double(lanes + l));
      }
    }
  };
  // A piece is kWidth columns of so many rows; its sums are kWidth numbers.
  const int64_t columns = (n + kWidth - 1) / kWidth;
  const int64_t height = gemm::round_up(std::max<int64_t>(1, kPart / std::min(n, kWidth)), kBlock);
  const int64_t parts = std::max<int64_t>(1, (m + height - 1) / height);
  const Aligned<double> memory(parts * columns * kWidth);
  double* const totals = memory.get();
  torch::stable::parallel_for(0, parts * columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t i0 = piece / columns * height, j = piece % columns * kWidth;
      const int64_t width = std::min(kWidth, n - j), i1 = std::min(m, i0 + height);
      double* const total = totals + piece * kWidth;
      std::fill_n(total, kWidth, 0.0);
      for (int64_t i = i0; i < i1; i += kBlock)
        for (int64_t c = 0; c < width; c += kStrip)
          add(i, std::min(i1, i + kBlock), j + c, std::min(kStrip, width - c), total + c);
    }
  });
  for (int64_t j = 0; j < n; ++j) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part)
      total += totals[(part * columns + j / kWidth) * kWidth + j % kWidth];
    to[j] = narrow<S>(T(total));
  }
}

// Σ over the first and the last dimension of x[n×channels×size], contiguous.
template <typename S>
void planes(const S* x, int64_t n, int64_t channels, int64_t size, S* to) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t grain = std::max<int64_t>(1, kPart / std::max<int64_t>(1, n * size));
  torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) {
        const S* const plane = x + (i * channels + c) * size;
        for (int64_t p0 = 0; p0 < size; p0 += kBlock * V::size) {
          V part(T(0));
          const int64_t p1 = std::min(size, p0 + kBlock * V::size);
          for (int64_t p = p0; p < p1; p += V::size)
            part = part + load(plane + p, std::min(V::size, p1 - p));
          total += sum(part);
        }
      }
      to[c] = narrow<S>(T(total));
    }
  });
}

}  // namespace dlkernels::sums

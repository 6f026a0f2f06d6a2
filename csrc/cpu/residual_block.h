// The passes of the residual block over images that are rows of channels: what lies between its
// convolutions.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

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

// Mean and biased variance of each channel: sums about the first row.
template <typename S>
void statistics(const S* x, int64_t rows, int64_t channels, accumulate_t<S>* mean,
                accumulate_t<S>* var) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  std::vector<double> totals(size_t(2 * channels));
  sum_vectors<2, T>(rows, channels, totals.data(),
                    [=](int64_t row, int64_t c, int64_t lanes, V* sums) {
                      const V d = load(x + row * channels + c, lanes) - load(x + c, lanes);
                      sums[0] = sums[0] + d;
                      sums[1] = fma(d, d, sums[1]);
                    });
  for (int64_t c = 0; c < channels; ++c) {
    const double d = totals[size_t(c)] / double(rows);
    mean[c] = T(double(widen(x[c])) + d);
    var[c] = T(std::max(0.0, totals[size_t(channels + c)] / double(rows) - d * d));
  }
}

}  // namespace dlkernels::residual_block

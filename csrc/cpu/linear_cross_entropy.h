// Softmax cross-entropy of logits that a product has just made: Zᵀ, class by class, a row of logits
// a lane. Statistics are taken, and the gradient is put in the place of the logits, while a block
// of classes is in the nearer caches. The row algebra is that of cross_entropy.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cross_entropy.h"
#include "simd.h"

namespace dlkernels::linear_cross_entropy {

using cross_entropy::Block;
using cross_entropy::kFlush;
using cross_entropy::Kind;
using cross_entropy::kRows;
using cross_entropy::Problem;

// Element (class c, row i) at data[c·pitch + i]: the logit x, or u = tanh(x / cap) of x' = cap·u.
template <typename T>
struct Tile {
  T* data;
  int64_t pitch;
  T* at(int64_t c) const { return data + c * pitch; }
};

// What an element of a tile is multiplied by to be x'.
template <typename T>
T unit_of(const Problem<T>& p) {
  return p.cap() != 0 ? p.cap() : T(1);
}

// The masses s_c of rows of one class; `probability` is the element of the first row.
template <typename S, Kind kind>
Vec<accumulate_t<S>> mass_of(const Problem<accumulate_t<S>>& p, const S* probability,
                             int64_t row_stride, int64_t c, int64_t lanes) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  if constexpr (kind != Kind::kProbability) return V(p.weight[c]);
  T t[V::size] = {};
  for (int64_t i = 0; i < lanes; ++i) t[i] = widen(probability[i * row_stride]);
  return V(p.weight[c]) * fma(load(t), V(1 - p.smoothing()), V(p.uniform()));
}

// Where the probabilities of row 0 of a chunk lie, and their strides.
template <typename S>
struct Probability {
  const S* data = nullptr;
  int64_t row_stride = 0, class_stride = 0;
  const S* at(int64_t c, int64_t i) const { return data + c * class_stride + i * row_stride; }
};

// Of each row, over the classes seen so far: m, Σ exp(x' − m), Σ s_c and Σ s_c·(x'_c − m).
template <typename T>
struct Statistics {
  T* max;
  double *sum, *mass, *moment;

  static int64_t padded(int64_t rows) { return (rows + 15) / 16 * 16; }
  // In bytes, for `rows` rows.
  static int64_t size(int64_t rows) { return padded(rows) * int64_t(sizeof(T) + 24); }
  Statistics(char* memory, int64_t rows) {
    const int64_t n = padded(rows);
    sum = reinterpret_cast<double*>(memory), mass = sum + n, moment = mass + n;
    max = reinterpret_cast<T*>(moment + n);
  }
  void clear() const {
    std::fill_n(max, mass - sum, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, 3 * (mass - sum), 0.0);
  }
};

// m, or 0 while every logit is −inf: each e is 0 then.
template <typename T>
Vec<T> shift_of(Vec<T> m) {
  return select(less(Vec<T>(-std::numeric_limits<T>::infinity()), m), m, Vec<T>(T(0)));
}

// Brings `to` to a maximum m of at least its own: sums of exp are multiplied, moments shifted.
template <typename T>
void raise(const Statistics<T>& to, int64_t i, Vec<T> m) {
  using D = Vec<double>;
  const Vec<T> before = load(to.max + i), after = shift_of(m);
  T factor[Vec<T>::size], difference[Vec<T>::size];
  store(difference, shift_of(before) - after);
  store(factor, exp(before - after));  // 0 while nothing is summed, however low m is
  store(to.max + i, m);
  for (int64_t l = 0; l < Vec<T>::size; l += D::size) {
    store(to.sum + i + l, load(to.sum + i + l) * load_double(factor + l));
    store(to.moment + i + l,
          fma(load(to.mass + i + l), load_double(difference + l), load(to.moment + i + l)));
  }
}

// Adds classes [c0, c1) of a tile, whose row 0 is class c0, to the statistics of n rows.
template <typename S, Kind kind>
void add_classes(const Problem<accumulate_t<S>>& p, const Tile<accumulate_t<S>>& tile,
                 const Probability<S>& probability, int64_t c0, int64_t c1, int64_t n,
                 const Statistics<accumulate_t<S>>& to) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  using D = Vec<double>;
  const V unit(unit_of(p));
  for (int64_t i = 0; i < n; i += V::size) {
    const int64_t lanes = std::min(V::size, n - i);
    V m(-std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < c1 - c0; ++c) m = max(load(tile.at(c) + i, lanes), m);
    m = max(load(to.max + i), unit * m);
    raise(to, i, m);
    const V shift = shift_of(m);
    V sum(T(0)), total(T(0)), moment(T(0));
    for (int64_t first = c0; first < c1; first += kFlush) {
      V e(T(0)), mass(T(0)), product(T(0));
      for (int64_t c = first; c < std::min(c1, first + kFlush); ++c) {
        const V t = unit * load(tile.at(c - c0) + i, lanes) - shift;
        e = e + exp(t);
        if constexpr (kind != Kind::kIndex) {
          const V s =
              mass_of<S, kind>(p, kind == Kind::kProbability ? probability.at(c, i) : nullptr,
                               probability.row_stride, c, lanes);
          mass = mass + s;
          product = fma(s, t, product);
        }
      }
      sum = sum + e;
      if constexpr (kind != Kind::kIndex) total = total + mass, moment = moment + product;
    }
    T part[V::size];
    const auto add = [&](double* at, V value) {
      store(part, value);
      for (int64_t l = 0; l < V::size; l += D::size)
        store(at + i + l, load(at + i + l) + load_double(part + l));
    };
    add(to.sum, sum);
    if constexpr (kind != Kind::kIndex) add(to.mass, total), add(to.moment, moment);
  }
}

// Adds the statistics of other classes, in the order of the calls.
template <typename T>
void merge(const Statistics<T>& to, const Statistics<T>& from, int64_t n) {
  using V = Vec<T>;
  using D = Vec<double>;
  for (int64_t i = 0; i < n; i += V::size) {
    const V m = max(load(from.max + i), load(to.max + i));
    raise(to, i, m);
    raise(from, i, m);
    for (double* at : {to.sum, to.mass, to.moment}) {
      const double* other = from.sum + (at - to.sum);
      for (int64_t l = 0; l < V::size; l += D::size)
        store(at + i + l, load(at + i + l) + load(other + i + l));
    }
  }
}

// The gradient of classes [c0, c1) in the place of their logits, as elements G from the start of
// each class's memory; row 0 of the tile is class c0. `blocks` are of kRows rows each; `at_target`
// is the tile's element at each row's target.
template <typename S, typename G, Kind kind>
void write_gradient(const Problem<accumulate_t<S>>& p, const Tile<accumulate_t<S>>& tile,
                    const Probability<S>& probability, const int64_t* target,
                    const accumulate_t<S>* at_target, const Block<accumulate_t<S>>* blocks,
                    int64_t c0, int64_t c1, int64_t n) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const bool has_cap = p.cap() != 0;
  const V one(T(1)), unit(unit_of(p));
  for (int64_t c = c0; c < c1; ++c) {
    T* const x = tile.at(c - c0);
    G* const gradient = reinterpret_cast<G*>(x);
    for (int64_t i = 0; i < n; i += V::size) {
      const Block<T>& b = blocks[i / kRows];
      const int64_t at = i % kRows, lanes = std::min(V::size, n - i);
      const V value = load(x + i, lanes);
      const V e = exp((unit * value - load(b.lse + at)) - load(b.lse_low + at));
      V v = e * load(b.scale + at);
      if constexpr (kind != Kind::kIndex)
        v = v - load(b.spread + at) *
                    mass_of<S, kind>(p, kind == Kind::kProbability ? probability.at(c, i) : nullptr,
                                     probability.row_stride, c, lanes);
      if constexpr (kind == Kind::kProbability) v = v * load(b.outer + at);
      if (has_cap) v = v * (one - value * value);
      store(gradient + i, v, lanes);
    }
  }
  if constexpr (kind != Kind::kProbability)
    for (int64_t i = 0; i < n; ++i) {
      if (uint64_t(target[i] - c0) >= uint64_t(c1 - c0)) continue;
      const Block<T>& b = blocks[i / kRows];
      const int64_t at = i % kRows;
      if (b.counts[at] == 0) continue;
      const T x = b.target_logit[at];
      const T e = first_element(exp((V(x) - V(b.lse[at])) - V(b.lse_low[at])));
      const T v =
          (e * b.scale[at] - b.hit[at]) * (has_cap ? 1 - at_target[i] * at_target[i] : T(1));
      reinterpret_cast<G*>(tile.at(target[i] - c0))[i] = narrow<G>(v);
    }
}

// Σ of n elements.
template <typename G>
accumulate_t<G> sum_of(const G* x, int64_t n) {
  using T = accumulate_t<G>;
  using V = Vec<T>;
  V total(T(0));
  for (int64_t i = 0; i < n; i += V::size) total = total + load(x + i, std::min(V::size, n - i));
  return sum(total);
}

}  // namespace dlkernels::linear_cross_entropy

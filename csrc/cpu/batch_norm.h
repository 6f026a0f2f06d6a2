// The loops of batch norm over x[outer][channels][inner]. Two walks: over planes, where the values
// of a channel lie in runs of `inner`, and over rows of channels, where inner is 1 (channels_last).
//
// Sums are cut into blocks whose size the shape alone sets: in float within a block (double for
// double), in double over blocks, in order. A block's values are read once: their deviations are
// taken from a copy in L1, about the block's own mean; blocks go together by Chan's formula. The
// statistics of double are those of torch on one thread to the bit: one sum in order, and one of
// the squares.
//
// A second pass starts where the first one ended, at what the caches still hold.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "activation.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::batch_norm {

constexpr int64_t kBlock = 2048;     // values of a channel whose sums are in float
constexpr int64_t kPiece = 1 << 16;  // elements of which a thread is given no part
constexpr int64_t kAhead = 1024;     // values that come before those which are prefetched
constexpr int64_t kUnroll = 4;

struct Shape {
  int64_t outer, channels, inner;
  int64_t values() const { return outer * inner; }
  int64_t size() const { return outer * channels * inner; }
};

// The mean of n values, and the sum of the squares of their deviations from it.
struct Moments {
  double n = 0, mean = 0, squares = 0;
  void add(const Moments& more) {
    const double total = n + more.n, delta = more.mean - mean;
    mean += delta * (more.n / total);
    squares += more.squares + delta * delta * (n * more.n / total);
    n = total;
  }
};

// Σ g and Σ g·(x − mean).
struct Sums {
  double g = 0, dot = 0;
  void add(const Sums& more) { g += more.g, dot += more.dot; }
};

// Lanes that are added in double.
template <typename T>
struct InDouble {
  static constexpr int64_t kParts = sizeof(double) / sizeof(T);
  Vec<double> part[kParts];
  InDouble() {
    for (auto& p : part) p = Vec<double>(0.0);
  }
  void add(Vec<T> v) {
    Vec<double> more[kParts];
    to_doubles(v, more);
    for (int64_t k = 0; k < kParts; ++k) part[k] = part[k] + more[k];
  }
  double total() const {
    double total = 0;
    for (const auto& p : part) total += sum(p);
    return total;
  }
};

template <typename T>
double total_of(const Vec<T> (&v)[kUnroll]) {
  double total = 0;
  for (int64_t u = 0; u < kUnroll; ++u) total += sum(v[u]);
  return total;
}

template <typename Act>
constexpr bool is_none = std::is_same_v<Act, std::integral_constant<Activation, Activation::kNone>>;

// f(tag) with what the compiler has to know of an activation; one that is no more than a call it
// need not.
template <typename Function>
void for_activation(Activation activation, const Function& f) {
  using A = Activation;
  switch (activation) {
    case A::kNone:
      return f(std::integral_constant<A, A::kNone>());
    case A::kRelu:
      return f(std::integral_constant<A, A::kRelu>());
    case A::kLeakyRelu:
      return f(std::integral_constant<A, A::kLeakyRelu>());
    default:
      return f(activation);
  }
}

// g = dy·f' of a vector, with d = x − mean and its channels' scale and shift. f' follows from y;
// without one dy is g already.
template <typename S, typename Act>
struct FromOutput {
  using V = Vec<accumulate_t<S>>;
  static constexpr bool kReadsInput = false;
  Act act;
  const S* y;

  V operator()(V dy, int64_t at, int64_t lanes, V, V, V) const {
    if constexpr (is_none<Act>) return dy;
    return y ? through(act, dy, load(y + at, lanes)) : dy;
  }
  void prefetch(int64_t at) const {
    if constexpr (!is_none<Act>)
      if (y) __builtin_prefetch(y + at, 0, 2);
  }
};

// The largest number that is 0 in memory: half of the least that is not, ties to even.
template <typename S>
constexpr accumulate_t<S> kRoundedToZero = 0;
template <>
inline constexpr float kRoundedToZero<bf16> = 0x1p-134f;
template <>
inline constexpr float kRoundedToZero<f16> = 0x1p-25f;

// f' follows from the sign of y, which is that of d·scale + shift once it is rounded.
template <typename S, typename Act>
struct FromInput {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  static constexpr bool kReadsInput = true;
  Act act;

  V operator()(V dy, int64_t, int64_t, V d, V scale, V shift) const {
    const V z = fma(d, scale, shift), zero(kRoundedToZero<S>);
    if constexpr (Act::value == Activation::kRelu) return select(exceeds(z, zero), dy, V(T(0)));
    return select(less(zero, z), dy, V(T(kSlope)) * dy);
  }
  void prefetch(int64_t) const {}
};

// What is done to each vector: body(offset, lanes, parameters), the parameters of its channels; and
// body.prefetch(offset), of what it will read.
// The arrays of parameters are as long as there are channels.
template <typename T, int count>
using Parameters = std::array<const T*, count>;

// ------------------------------------------------------------------------------------------ planes

template <typename S>
struct Planes {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const Shape shape;

  int64_t at(int64_t n, int64_t c) const { return (n * shape.channels + c) * shape.inner; }

  // The blocks of a channel: parts of a plane, or some planes.
  bool is_cut() const { return shape.inner > kBlock; }
  int64_t parts() const { return (shape.inner + kBlock - 1) / kBlock; }
  int64_t planes() const { return std::max<int64_t>(1, kBlock / shape.inner); }
  int64_t blocks() const {
    return is_cut() ? shape.outer * parts() : (shape.outer + planes() - 1) / planes();
  }
  // run(offset, length, next) for each run of a block; next is the offset of what comes then.
  template <typename Run>
  void for_runs(int64_t c, int64_t block, const Run& run) const {
    if (is_cut()) {
      const int64_t n = block / parts(), p = block % parts() * kBlock;
      run(at(n, c) + p, std::min(kBlock, shape.inner - p), at(n, c) + p);
      return;
    }
    const int64_t end = std::min(shape.outer, (block + 1) * planes());
    const int64_t ahead = std::max<int64_t>(2, kAhead / shape.inner);
    for (int64_t n = block * planes(); n < end; ++n)
      run(at(n, c), shape.inner, at(std::min(n + ahead, shape.outer - 1), c));
  }

  // The blocks of a piece, and the pieces of a channel.
  int64_t blocks_of_piece() const { return kPiece / kBlock; }
  int64_t pieces() const { return (blocks() + blocks_of_piece() - 1) / blocks_of_piece(); }

  template <typename Block>
  auto of_piece(int64_t piece, const Block& block) const {
    const int64_t first = piece * blocks_of_piece();
    auto total = block(first);
    const int64_t end = std::min(blocks(), first + blocks_of_piece());
    for (int64_t b = first + 1; b < end; ++b) total.add(block(b));
    return total;
  }

  Moments moments_of_block(const S* x, int64_t c, int64_t block) const {
    alignas(64) T values[kBlock + kUnroll * V::size];
    V sum[kUnroll] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    int64_t n = 0;
    for_runs(c, block, [&](int64_t offset, int64_t length, int64_t next) {
      const S* const from = x + offset;
      T* const to = values + n;
      int64_t i = 0;
      for (; i + kUnroll * V::size <= length; i += kUnroll * V::size)
        for (int64_t u = 0; u < kUnroll; ++u) {
          const V v = load(from + i + u * V::size);
          __builtin_prefetch(x + next + i + u * V::size, 0, 2);
          store(to + i + u * V::size, v);
          sum[u] = sum[u] + v;
        }
      for (; i < length; i += V::size) {
        const V v = load(from + i, std::min(V::size, length - i));
        store(to + i, v);
        sum[0] = sum[0] + v;
      }
      n += length;
    });
    const V mean(T(total_of(sum) / double(n))), zero(T(0));
    V first[kUnroll] = {zero, zero, zero, zero}, second[kUnroll] = {zero, zero, zero, zero};
    int64_t i = 0;
    for (; i + kUnroll * V::size <= n; i += kUnroll * V::size)
      for (int64_t u = 0; u < kUnroll; ++u) {
        const V d = load(values + i + u * V::size) - mean;
        first[u] = first[u] + d;
        second[u] = fma(d, d, second[u]);
      }
    for (; i < n; i += V::size) {
      const int64_t lanes = std::min(V::size, n - i);
      const V d = dlkernels::first(lanes, load(values + i, lanes) - mean, zero);
      first[0] = first[0] + d;
      second[0] = fma(d, d, second[0]);
    }
    const double one = total_of(first), two = total_of(second);
    return {double(n), double(first_element(mean)) + one / double(n), two - one * one / double(n)};
  }

  Moments moments_of_piece(const S* x, int64_t c, int64_t piece) const {
    return of_piece(piece, [&](int64_t block) { return moments_of_block(x, c, block); });
  }

  // The sums of g, of constants mean, scale and shift; g is written too where there is a place.
  template <typename From>
  Sums sums_of_block(const From& from, const S* dy, const S* x, S* g_to,
                     const Parameters<T, 3>& constants, int64_t c, int64_t block) const {
    const V mean(constants[0][c]), scale(constants[1][c]), shift(constants[2][c]);
    InDouble<T> g_sum, dot;
    for_runs(c, block, [&](int64_t offset, int64_t length, int64_t next) {
      // g of a vector; Σ g·(x − mean) goes on in `products`.
      const auto g_of = [&](int64_t i, int64_t lanes, V& products) {
        const V d = load(x + i, lanes) - mean;
        const V g = from(load(dy + i, lanes), i, lanes, d, scale, shift);
        if (g_to) store(g_to + i, g, lanes);
        products = fma(g, d, products);
        return g;
      };
      int64_t i = 0;
      for (; i + kUnroll * V::size <= length; i += kUnroll * V::size) {
        V part(T(0)), products(T(0));
        for (int64_t u = 0; u < kUnroll; ++u) {
          const int64_t at = i + u * V::size;
          part = part + g_of(offset + at, V::size, products);
          __builtin_prefetch(dy + next + at, 0, 2);
          __builtin_prefetch(x + next + at, 0, 2);
          from.prefetch(next + at);
        }
        g_sum.add(part);
        dot.add(products);
      }
      for (; i < length; i += V::size) {
        V products(T(0));
        g_sum.add(g_of(offset + i, std::min(V::size, length - i), products));
        dot.add(products);
      }
    });
    return {g_sum.total(), dot.total()};
  }

  template <typename From>
  Sums sums_of_piece(const From& from, const S* dy, const S* x, S* g_to,
                     const Parameters<T, 3>& constants, int64_t c, int64_t piece) const {
    return of_piece(piece, [&](int64_t block) {
      return sums_of_block(from, dy, x, g_to, constants, c, block);
    });
  }

  // Elements [begin, end) of a plane; `next` is the offset of what comes then.
  template <int count, typename Body>
  void for_plane(int64_t n, int64_t c, int64_t begin, int64_t end, int64_t next,
                 const Parameters<T, count>& parameters, const Body& body) const {
    V p[count];
    for (int k = 0; k < count; ++k) p[k] = V(parameters[k][c]);
    const int64_t offset = at(n, c);
    int64_t i = begin;
    for (; i + kUnroll * V::size <= end; i += kUnroll * V::size)
      for (int64_t u = 0; u < kUnroll; ++u) {
        body(offset + i + u * V::size, V::size, p);
        body.prefetch(next + i - begin + u * V::size);
      }
    for (; i < end; i += V::size) body(offset + i, std::min(V::size, end - i), p);
  }

  // Whether each channel is one thread's, which then passes over it twice in its own cache. The
  // bits are the same.
  bool is_by_channel() const {
    return shape.channels >= 4 * int64_t(torch::stable::get_num_threads()) ||
           shape.size() <= kPiece;
  }

  // Channels of one thread whose planes are short, so that what it writes is not a few lines of
  // each page; all of them stay in its cache.
  int64_t channels_at_once() const {
    constexpr int64_t kRun = 1024;
    const int64_t most = shape.channels / (4 * int64_t(torch::stable::get_num_threads()));
    return std::max<int64_t>(1, std::min({kRun / shape.inner, kPiece / shape.values(), most}));
  }

  // total[c] of all pieces, by of(c, piece).
  template <typename Total, typename Of>
  void totals(Total* total, const Of& of) const {
    const int64_t count = pieces(), channels = shape.channels;
    const Aligned<Total> memory(channels * count);
    Total* const part = memory.get();
    const int64_t grain = std::max<int64_t>(1, kPiece / 2 / std::min(kPiece, shape.values()));
    torch::stable::parallel_for(0, channels * count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) part[i] = of(i / count, i % count);
    });
    for (int64_t c = 0; c < channels; ++c) {
      total[c] = part[c * count];
      for (int64_t piece = 1; piece < count; ++piece) total[c].add(part[c * count + piece]);
    }
  }

  // The totals, then(c) for each channel, and the body for each vector.
  template <int count, typename Total, typename Of, typename Then, typename Body>
  void run(Total* total, const Of& of, const Then& then, const Parameters<T, count>& parameters,
           const Body& body) const {
    if (!is_by_channel()) {
      totals(total, of);
      for (int64_t c = 0; c < shape.channels; ++c) then(c);
      return for_all<count>(parameters, body);
    }
    const int64_t side = channels_at_once(), groups = (shape.channels + side - 1) / side;
    const int64_t grain = std::max<int64_t>(1, kPiece / 2 / side / shape.values());
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * side, last = std::min(shape.channels, first + side);
        for (int64_t c = first; c < last; ++c) {
          total[c] = of(c, 0);
          for (int64_t piece = 1; piece < pieces(); ++piece) total[c].add(of(c, piece));
          then(c);
        }
        for (int64_t n = shape.outer; n-- > 0;)
          for (int64_t c = first; c < last; ++c)
            for_plane<count>(n, c, 0, shape.inner, at(n > 0 ? n - 1 : 0, c), parameters, body);
      }
    });
  }

  // The body for each vector.
  template <int count, typename Body>
  void for_all(const Parameters<T, count>& parameters, const Body& body) const {
    const int64_t cut = (shape.inner + kPiece - 1) / kPiece;
    const int64_t grain = std::max<int64_t>(1, kPiece / 2 / std::min(kPiece, shape.inner));
    const int64_t tiles = shape.outer * shape.channels * cut;
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = end; tile-- > begin;) {
        const int64_t plane = tile / cut, i = tile % cut * kPiece;
        const int64_t next = std::max<int64_t>(0, tile - 1);
        for_plane<count>(plane / shape.channels, plane % shape.channels, i,
                         std::min(shape.inner, i + kPiece),
                         next / cut * shape.inner + next % cut * kPiece, parameters, body);
      }
    });
  }

  void moments(const S* x, Moments* total) const {
    if constexpr (std::is_same_v<S, double>)
      moments_in_order(x, total);
    else
      totals(total, [&](int64_t c, int64_t piece) { return moments_of_piece(x, c, piece); });
  }

  template <typename From>
  void sums(const From& from, const S* dy, const S* x, S* g_to, const Parameters<T, 3>& constants,
            Sums* total) const {
    totals(total, [&](int64_t c, int64_t piece) {
      return sums_of_piece(from, dy, x, g_to, constants, c, piece);
    });
  }

  template <int count, typename Then, typename Body>
  void run_moments(const S* x, Moments* total, const Then& then,
                   const Parameters<T, count>& parameters, const Body& body) const {
    if constexpr (std::is_same_v<S, double>) {
      moments_in_order(x, total);
      for (int64_t c = 0; c < shape.channels; ++c) then(c);
      for_all<count>(parameters, body);
    } else {
      run<count>(
          total, [&](int64_t c, int64_t piece) { return moments_of_piece(x, c, piece); }, then,
          parameters, body);
    }
  }

  template <int count, typename From, typename Then, typename Body>
  void run_sums(const From& from, const S* dy, const S* x, S* g_to,
                const Parameters<T, 3>& constants, Sums* total, const Then& then,
                const Parameters<T, count>& parameters, const Body& body) const {
    run<count>(
        total,
        [&](int64_t c, int64_t piece) {
          return sums_of_piece(from, dy, x, g_to, constants, c, piece);
        },
        then, parameters, body);
  }

  // As torch's: a sum of all values one after another, and one of the squared deviations, each of
  // which is rounded before it is added, hence the array; but for the last of an odd plane, which
  // torch's compiler fuses. Channels side by side hide the latency.
  template <int64_t side>
  void moments_in_order(const S* x, int64_t c, Moments* total) const {
    constexpr int64_t kRun = 256;
    double sum[side] = {}, squares[side] = {}, mean[side], square[side][kRun];
    for (int64_t n = 0; n < shape.outer; ++n)
      for (int64_t i = 0; i < shape.inner; ++i)
        for (int64_t k = 0; k < side; ++k) sum[k] += x[at(n, c + k) + i];
    for (int64_t k = 0; k < side; ++k) mean[k] = sum[k] / double(shape.values());
    for (int64_t n = 0; n < shape.outer; ++n)
      for (int64_t begin = 0; begin < shape.inner; begin += kRun) {
        const int64_t length = std::min(kRun, shape.inner - begin);
        for (int64_t k = 0; k < side; ++k)
          for (int64_t i = 0; i < length; ++i) {
            const double d = x[at(n, c + k) + begin + i] - mean[k];
            square[k][i] = d * d;
          }
        const bool fused = begin + length == shape.inner && shape.inner % 2 == 1;
        for (int64_t i = 0; i < length - fused; ++i)
          for (int64_t k = 0; k < side; ++k) squares[k] += square[k][i];
        if (!fused) continue;
        for (int64_t k = 0; k < side; ++k) {
          const Vec<double> d(x[at(n, c + k) + shape.inner - 1] - mean[k]);
          squares[k] = first_element(fma(d, d, Vec<double>(squares[k])));
        }
      }
    for (int64_t k = 0; k < side; ++k) total[k] = {double(shape.values()), mean[k], squares[k]};
  }
  void moments_in_order(const S* x, Moments* total) const {
    constexpr int64_t kSide = 4;
    const int64_t groups = (shape.channels + kSide - 1) / kSide;
    const int64_t grain = std::max<int64_t>(1, kPiece / 2 / kSide / shape.values());
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t c = group * kSide;
        if (c + kSide <= shape.channels)
          moments_in_order<kSide>(x, c, total + c);
        else
          for (int64_t k = c; k < shape.channels; ++k) moments_in_order<1>(x, k, total + k);
      }
    });
  }
};

// -------------------------------------------------------------------------------------------- rows

// The memory as rows of `width` elements, some rows of channels, so that they are whole vectors;
// of the last one there may be no more than a tail. Column j is of channel j % channels.
template <typename S>
struct Rows {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  static constexpr int64_t kHeight = 32;  // rows whose sums are in float
  static constexpr int64_t kWidest = 4096;
  static constexpr int64_t kStrip = kUnroll * V::size;

  const Shape shape;
  int64_t width, rows, tail, height, pieces, pitch;

  explicit Rows(const Shape& shape) : shape(shape) {
    const int64_t channels = shape.channels;
    width = channels;
    while ((width % V::size != 0 || width < kStrip) && width + channels <= kWidest)
      width += channels;
    if (width % V::size != 0) width = channels;
    rows = shape.size() / width;
    tail = shape.size() % width;
    height = std::max<int64_t>(1, kPiece / width / kHeight) * kHeight;
    pieces = (rows + height - 1) / height + (tail > 0);
    pitch = Aligned<double>::padded(width + V::size);
  }

  struct Piece {
    int64_t begin, end, width;
  };
  Piece piece(int64_t at) const {
    if (at == pieces - 1 && tail > 0) return {rows, rows + 1, tail};
    return {at * height, std::min(rows, (at + 1) * height), width};
  }
  int64_t grain() const { return std::max<int64_t>(1, kPiece / 2 / (height * width)); }
  // Whether a strip of several rows is no run of memory, which the processor would see coming.
  bool is_strided() const { return width > kStrip; }

  // body(j, lanes, vectors) for the strips of a row; `vectors` is known to the compiler.
  template <typename Body>
  static void for_strips(int64_t width, const Body& body) {
    int64_t j = 0;
    for (; j + kStrip <= width; j += kStrip)
      body(j, V::size, std::integral_constant<int64_t, kUnroll>());
    for (; j < width; j += V::size)
      body(j, std::min(V::size, width - j), std::integral_constant<int64_t, 1>());
  }

  // What a piece has of each column: mean and squares, or Σ g and Σ g·(x − mean).
  struct Columns {
    double *first, *second;
  };
  Columns columns(double* memory, int64_t piece) const {
    return {memory + piece * 2 * pitch, memory + (piece * 2 + 1) * pitch};
  }

  // Moments of `more` values into those of n.
  static void add_moments(double n, double more, double* mean, double* squares, Vec<double> m,
                          Vec<double> s) {
    using D = Vec<double>;
    const double total = n + more;
    const D delta = m - load(mean);
    store(mean, fma(delta, D(more / total), load(mean)));
    store(squares, load(squares) + fma(delta * delta, D(n * more / total), s));
  }

  void moments_of_piece(const S* x, const Piece& p, Columns to) const {
    using D = Vec<double>;
    alignas(64) T values[kHeight * kStrip];
    for (int64_t r0 = p.begin; r0 < p.end; r0 += kHeight) {
      const int64_t count = std::min(kHeight, p.end - r0);
      const T share = T(1) / T(count);
      for_strips(p.width, [&](int64_t j, int64_t lanes, auto vectors) {
        const V zero(T(0));
        V mean[vectors], one[vectors], two[vectors];
        for (int64_t v = 0; v < vectors; ++v) mean[v] = one[v] = two[v] = zero;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t v = 0; v < vectors; ++v) {
            const S* const at = x + (r0 + r) * width + j + v * V::size;
            const V value = load(at, lanes);
            if (is_strided()) __builtin_prefetch(at + kHeight * width, 0, 2);
            store(values + (r * vectors + v) * V::size, value);
            mean[v] = mean[v] + value;
          }
        for (int64_t v = 0; v < vectors; ++v) mean[v] = mean[v] * V(share);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t v = 0; v < vectors; ++v) {
            const V d = load(values + (r * vectors + v) * V::size) - mean[v];
            one[v] = one[v] + d;
            two[v] = fma(d, d, two[v]);
          }
        for (int64_t v = 0; v < vectors; ++v) {
          constexpr int64_t kParts = InDouble<T>::kParts;
          D m[kParts], rest[kParts], squares[kParts];
          to_doubles(mean[v], m), to_doubles(one[v], rest), to_doubles(two[v], squares);
          for (int64_t k = 0; k < kParts; ++k) {
            const int64_t at = j + v * V::size + k * D::size;
            const D share_of = rest[k] * D(1 / double(count));
            add_moments(double(r0 - p.begin), double(count), to.first + at, to.second + at,
                        m[k] + share_of, squares[k] - rest[k] * share_of);
          }
        }
      });
    }
  }

  template <typename From>
  void sums_of_piece(const From& from, const S* dy, const S* x, S* g_to,
                     const Parameters<T, 3>& constants, const Piece& p, Columns to) const {
    using D = Vec<double>;
    constexpr int64_t kRows = 8, kParts = InDouble<T>::kParts;
    const auto add = [](double* to, V sum) {
      D more[kParts];
      to_doubles(sum, more);
      for (int64_t k = 0; k < kParts; ++k)
        store(to + k * D::size, load(to + k * D::size) + more[k]);
    };
    for (int64_t r0 = p.begin; r0 < p.end; r0 += kRows) {
      const int64_t end = std::min(p.end, r0 + kRows);
      for_strips(p.width, [&](int64_t j, int64_t lanes, auto vectors) {
        const V zero(T(0));
        V of[vectors][3], sum[vectors], dot[vectors];
        for (int64_t v = 0; v < vectors; ++v) {
          for (int k = 0; k < (From::kReadsInput ? 3 : 1); ++k)
            of[v][k] = load(constants[k] + j + v * V::size);
          sum[v] = dot[v] = zero;
        }
        for (int64_t r = r0; r < end; ++r)
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t at = r * width + j + v * V::size;
            const V d = load(x + at, lanes) - of[v][0];
            const V g = from(load(dy + at, lanes), at, lanes, d, of[v][1], of[v][2]);
            if (g_to) store(g_to + at, g, lanes);
            sum[v] = sum[v] + g;
            dot[v] = fma(g, d, dot[v]);
            if (!is_strided()) continue;
            const int64_t ahead = at + kRows * width;
            __builtin_prefetch(dy + ahead, 0, 2);
            __builtin_prefetch(x + ahead, 0, 2);
            from.prefetch(ahead);
          }
        for (int64_t v = 0; v < vectors; ++v) {
          add(to.first + j + v * V::size, sum[v]);
          add(to.second + j + v * V::size, dot[v]);
        }
      });
    }
  }

  // Numbers for each channel as some for each column, and beyond the last.
  template <size_t count>
  std::array<const T*, count> spread(const std::array<const T*, count>& from, T* to) const {
    std::array<const T*, count> columns;
    for (size_t k = 0; k < count; ++k, to += pitch) {
      columns[k] = to;
      for (int64_t j = 0; j < pitch; ++j) to[j] = j < width ? from[k][j % shape.channels] : T(0);
    }
    return columns;
  }

  // of(piece, columns) for all pieces.
  template <typename Of>
  void parts(double* memory, const Of& of) const {
    torch::stable::parallel_for(0, pieces, grain(), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const Columns to = columns(memory, at);
        std::fill_n(to.first, pitch, 0.0);
        std::fill_n(to.second, pitch, 0.0);
        of(piece(at), to);
      }
    });
  }
  // join(piece, columns of the first, columns of the piece) for all pieces of whole rows but the
  // first, over all threads.
  template <typename Join>
  void join_pieces(double* memory, const Join& join) const {
    using D = Vec<double>;
    const int64_t whole = pieces - (tail > 0), vectors = (width + D::size - 1) / D::size;
    const int64_t grain = std::max<int64_t>(1, kPiece / 8 / std::max<int64_t>(1, whole));
    torch::stable::parallel_for(0, vectors, grain, [&](int64_t begin, int64_t end) {
      const Columns to = columns(memory, 0);
      for (int64_t at = 1; at < whole; ++at) {
        const Columns from = columns(memory, at);
        for (int64_t v = begin; v < end; ++v) join(piece(at), to, from, v * D::size);
      }
    });
  }
  // make(rows, first, second) of each column, added to its channel's total.
  template <typename Total, typename Make>
  void fold(double* memory, Total* total, const Make& make) const {
    std::fill_n(total, shape.channels, Total());
    const auto add = [&](int64_t n, const Columns& from, int64_t count) {
      for (int64_t j = 0; j < count; ++j)
        total[j % shape.channels].add(make(n, from.first[j], from.second[j]));
    };
    if (rows > 0) add(rows, columns(memory, 0), width);
    if (tail > 0) add(1, columns(memory, pieces - 1), tail);
  }

  void moments(const S* x, Moments* total) const {
    if constexpr (std::is_same_v<S, double>) return moments_in_order(x, total);
    const Aligned<double> memory(pieces * 2 * pitch);
    parts(memory.get(), [&](const Piece& p, Columns to) { moments_of_piece(x, p, to); });
    join_pieces(memory.get(), [&](const Piece& p, Columns to, Columns from, int64_t at) {
      add_moments(double(p.begin), double(p.end - p.begin), to.first + at, to.second + at,
                  load(from.first + at), load(from.second + at));
    });
    fold(memory.get(), total,
         [](int64_t n, double mean, double squares) { return Moments{double(n), mean, squares}; });
  }

  template <typename From>
  void sums(const From& from, const S* dy, const S* x, S* g_to, const Parameters<T, 3>& constants,
            Sums* total) const {
    const Aligned<double> memory(pieces * 2 * pitch);
    const Aligned<T> of_columns(3 * pitch);
    const Parameters<T, 3> columns = spread(constants, of_columns.get());
    parts(memory.get(),
          [&](const Piece& p, Columns to) { sums_of_piece(from, dy, x, g_to, columns, p, to); });
    join_pieces(memory.get(), [&](const Piece&, Columns to, Columns from, int64_t at) {
      store(to.first + at, load(to.first + at) + load(from.first + at));
      store(to.second + at, load(to.second + at) + load(from.second + at));
    });
    fold(memory.get(), total, [](int64_t, double g, double dot) { return Sums{g, dot}; });
  }

  template <int count, typename Body>
  void for_all(const Parameters<T, count>& parameters, const Body& body) const {
    // Rows for which parameters stay in registers, and elements that are passed over upwards.
    constexpr int64_t kRows = 16, kRun = 1 << 14;
    const Aligned<T> memory(count * pitch);
    const int64_t run = std::max(kRows, kRun / width / kRows * kRows);
    const Parameters<T, count> columns = spread(parameters, memory.get());
    torch::stable::parallel_for(0, pieces, grain(), [&](int64_t begin, int64_t end) {
      for (int64_t at = end; at-- > begin;) {
        const Piece p = piece(at);
        for (int64_t end_of_run = p.end; end_of_run > p.begin; end_of_run -= run)
          for (int64_t r0 = std::max(p.begin, end_of_run - run); r0 < end_of_run; r0 += kRows) {
            const int64_t r1 = std::min(end_of_run, r0 + kRows);
            for_strips(p.width, [&](int64_t j, int64_t lanes, auto vectors) {
              V q[vectors][count];
              for (int64_t v = 0; v < vectors; ++v)
                for (int k = 0; k < count; ++k) q[v][k] = load(columns[k] + j + v * V::size);
              for (int64_t r = r0; r < r1; ++r)
                for (int64_t v = 0; v < vectors; ++v) {
                  body(r * width + j + v * V::size, lanes, q[v]);
                  if (is_strided()) body.prefetch((r + kRows) * width + j + v * V::size);
                }
            });
          }
      }
    });
  }

  template <int count, typename Then, typename Body>
  void run_moments(const S* x, Moments* total, const Then& then,
                   const Parameters<T, count>& parameters, const Body& body) const {
    moments(x, total);
    for (int64_t c = 0; c < shape.channels; ++c) then(c);
    for_all<count>(parameters, body);
  }

  template <int count, typename From, typename Then, typename Body>
  void run_sums(const From& from, const S* dy, const S* x, S* g_to,
                const Parameters<T, 3>& constants, Sums* total, const Then& then,
                const Parameters<T, count>& parameters, const Body& body) const {
    sums(from, dy, x, g_to, constants, total);
    for (int64_t c = 0; c < shape.channels; ++c) then(c);
    for_all<count>(parameters, body);
  }

  // As torch's of this layout: one row after another, squares and all.
  void moments_in_order(const S* x, Moments* total) const {
    const int64_t n = shape.values(), channels = shape.channels;
    const int64_t strips = (channels + V::size - 1) / V::size;
    const int64_t grain = std::max<int64_t>(1, kPiece / 2 / V::size / n);
    torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * V::size; c < std::min(channels, end * V::size); c += V::size) {
        const int64_t lanes = std::min(V::size, channels - c);
        V sum(T(0)), squares(T(0));
        for (int64_t r = 0; r < n; ++r) sum = sum + load(x + r * channels + c, lanes);
        const V mean = sum / V(T(n));
        for (int64_t r = 0; r < n; ++r) {
          const V d = load(x + r * channels + c, lanes) - mean;
          squares = fma(d, d, squares);
        }
        T m[V::size], s[V::size];
        store(m, mean), store(s, squares);
        for (int64_t l = 0; l < lanes; ++l) total[c + l] = {double(n), double(m[l]), double(s[l])};
      }
    });
  }
};

}  // namespace dlkernels::batch_norm

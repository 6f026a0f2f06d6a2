// The loops of cross_entropy: statistics, loss and gradient of blocks of rows. Three walks:
//   rows        classes contiguous: lanes run over classes, a long row in chunks that stay in L1
//   columns     classes strided, rows contiguous: lanes run over rows, no row needs a horizontal
//   sum transposed  classes contiguous but few: as columns, through a transposition in registers
//
// With x' = softcap(x), m = max x', lse = m + log Σ exp(x' − m) and a mass s_c on each class:
//   indices        loss = (1−ε)·w_y·(lse − x'_y) + ε/C·Σ s_c·(lse − x'_c) + z·lse², s_c = w_c
//   probabilities  loss = Σ s_c·(lse − x'_c) + z·lse², s_c = w_c·((1−ε)·t_c + ε/C)
// The gradient is (e·scale − spread·s_c)·(1 − (x'/cap)²), at an index target (e·scale − hit)·(…):
//   e       exp(x' − m) in the forward pass, softmax exp(x' − lse) in the backward
//   scale   factor·((1−ε)·w_y + ε/C·Σ w + 2·z·lse) or factor·(Σ s + 2·z·lse); over Σ e if forward
//   spread  factor·ε/C or factor
//   hit     factor·((1−ε)·w_y + ε/C·w_y)
//   factor  upstream gradient × what the reduction divides by
//
// Tried and dropped: stores past the caches (a row seldom ends on a line; 1.3 times slower at 1000
// classes, 1.1 times faster at 32000).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "../cross_entropy.h"
#include "simd.h"

namespace dlkernels::cross_entropy {

constexpr int64_t kChunk = 2048;            // rows: classes that are in L1 at a time
constexpr int64_t kRows = 256;              // most rows of a block
constexpr int64_t kBlockElements = 1024;    // rows: short rows share a block up to this size
constexpr int64_t kTransposedClasses = 64;  // contiguous classes up to this number are transposed
constexpr int64_t kColumnBytes = 24 << 10;  // columns: scratch of a block, to stay in L1
constexpr int64_t kAhead = 512;  // elements by which the gradient's lines are asked for early
constexpr int64_t kFlush = 16;   // vectors whose sum joins the total at once

enum class Walk { kRows, kColumns, kTransposed };

inline int64_t offset_of(const Layout& l, int64_t row) {
  return row / l.inner * l.outer_stride + row % l.inner * l.inner_stride;
}

// The offsets of n rows from `row` on.
inline void offsets_of(const Layout& l, int64_t row, int64_t n, int64_t* result) {
  int64_t o = row / l.inner, i = row % l.inner;
  for (int64_t r = 0; r < n; ++r) {
    result[r] = o * l.outer_stride + i * l.inner_stride;
    if (++i == l.inner) i = 0, ++o;
  }
}

template <typename S>
struct Problem {
  using T = accumulate_t<S>;
  Options options;
  Walk walk;
  Layout layout, target_layout, gradient_layout;
  int64_t rows;
  const S* input;
  const int64_t* target = nullptr;  // (rows), or
  const S* probability = nullptr;   // like the input
  bool weighted;                    // whether the caller gave weights
  std::vector<T> weight;            // (classes), else ones
  double total_class_weight;        // Σ w_c
  double row_factor = 1;            // what the reduction multiplies each row's loss with
  S* loss = nullptr;                // (rows), for reduction "none"
  double* lse = nullptr;            // (rows)
  S* gradient = nullptr;
  const S* grad_loss = nullptr;      // null for 1, (rows) for "none", else one element
  const double* grad_lse = nullptr;  // (rows) or null

  bool is_ignored(int64_t row) const { return target && target[row] == options.ignore_index; }
  T cap() const { return T(options.softcap); }
  T smoothing() const { return T(options.label_smoothing); }
  T uniform() const { return T(options.label_smoothing / double(layout.classes)); }
};

// What is known of each row of a block; read and written in whole vectors.
template <typename T>
struct alignas(64) Block {
  static constexpr int64_t kPadded = kRows + 16;
  T max[kPadded], sum[kPadded];      // m, Σ exp(x' − m)
  T target_logit[kPadded];           // x'_y
  T mass[kPadded], moment[kPadded];  // Σ s_c, Σ s_c·(x'_c − m)
  T lse[kPadded], lse_low[kPadded];  // log-sum-exp, and what its rounding left
  // In double, for what all of a row's gradient shares.
  double log_sum[kPadded], loss[kPadded], factor[kPadded], total[kPadded];
  double target_weight[kPadded], counts[kPadded];  // w_y, 1; where the row is ignored 0, 0
  T scale[kPadded], spread[kPadded], hit[kPadded];
  int64_t offset[kRows];
};

// Scratch of one thread: a block's e, u and s_c (as rows × classes, or classes × pitch), a chunk,
// and the m that the e of each chunk is relative to. u exists only where there is a softcap, s_c
// only for probabilities in columns.
template <typename T>
struct Scratch {
  T *e, *squashed, *mass, *buffer, *shift;
};

// ------------------------------------------------------------------------------------- row algebra

// The class weight of each row's target; 0, and not counted, where it is ignored.
template <typename S, Kind kind>
void load_targets(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = !p.is_ignored(row + i);
    b.counts[i] = counts;
    b.target_weight[i] =
        kind != Kind::kProbability && counts ? double(p.weight[p.target[row + i]]) : 0;
  }
}

// In double: a few numbers per row, whose errors all of its gradient would share. `forward`: e is
// exp(x' − m), to be divided by its sum.
template <typename S, Kind kind>
void set_coefficients(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                      bool forward) {
  using T = accumulate_t<S>;
  const double z = 2 * p.options.z_loss, smoothing = p.options.label_smoothing;
  const double uniform = kind == Kind::kSmooth ? smoothing / double(p.layout.classes) : 0;
  const double all = uniform * p.total_class_weight;
  const bool per_row = p.grad_loss && p.options.reduction == kNone;
  double factor = p.row_factor;
  if (p.grad_loss && !per_row) factor *= double(widen(*p.grad_loss));
  for (int64_t i = 0; i < n; ++i)
    b.factor[i] = per_row ? factor * double(widen(p.grad_loss[row + i])) : factor;
  const double* lse = p.lse + row;
  for (int64_t i = 0; i < n; ++i) {
    const double f = b.factor[i], w = b.target_weight[i];
    if constexpr (kind == Kind::kProbability) {
      b.total[i] = f * (double(b.mass[i]) + z * lse[i]);
      b.spread[i] = T(f);
      b.hit[i] = 0;
    } else {
      const double nll = (1 - smoothing) * w, total = f * (nll + all + z * lse[i]);
      b.total[i] = b.counts[i] != 0 ? total : 0;
      b.spread[i] = T(b.counts[i] != 0 ? f * uniform : 0);
      b.hit[i] = T(f * (nll + uniform * w));
    }
  }
  if (p.grad_lse)
    for (int64_t i = 0; i < n; ++i) b.total[i] += p.grad_lse[row + i];
  for (int64_t i = 0; i < n; ++i)
    b.scale[i] = T(forward ? b.total[i] / double(b.sum[i]) : b.total[i]);
}

// The saved log-sum-exp as a T and the rest, so that p = exp((x' − lse) − rest) is as exact as
// exp(x' − m) / Σe.
template <typename S>
void load_lse(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n) {
  using T = accumulate_t<S>;
  for (int64_t i = 0; i < n; ++i) {
    b.lse[i] = T(p.lse[row + i]);
    b.lse_low[i] = std::isfinite(b.lse[i]) ? T(p.lse[row + i] - double(b.lse[i])) : T(0);
  }
}

// From statistics to log-sum-exp and loss. Returns the sum of the block's losses.
template <typename S, Kind kind>
double finish_rows(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n) {
  using T = accumulate_t<S>;
  using D = Vec<double>;
  std::copy(b.sum, b.sum + n, b.log_sum);
  for (int64_t i = 0; i < n; i += D::size) store(b.log_sum + i, log(load(b.log_sum + i)));
  const double z = p.options.z_loss, smoothing = p.options.label_smoothing;
  const double uniform = kind == Kind::kSmooth ? smoothing / double(p.layout.classes) : 0;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  double* lse = p.lse + row;
  for (int64_t i = 0; i < n; ++i) {
    // A row of −inf has log-sum-exp −inf, as torch.logsumexp, and a loss of NaN, as stock.
    const double excess = b.log_sum[i], m = double(b.max[i]);
    lse[i] = b.max[i] == lowest ? m : m + excess;
    double loss = z != 0 ? z * lse[i] * lse[i] : 0;
    if constexpr (kind == Kind::kProbability) {
      loss += double(b.mass[i]) * excess - double(b.moment[i]);
    } else {
      loss += (1 - smoothing) * b.target_weight[i] * (lse[i] - double(b.target_logit[i]));
      if constexpr (kind == Kind::kSmooth)
        loss += uniform * (p.total_class_weight * excess - double(b.moment[i]));
    }
    b.loss[i] = b.counts[i] != 0 ? loss : 0;
  }
  if (p.options.reduction == kNone)
    for (int64_t i = 0; i < n; ++i) p.loss[row + i] = narrow<S>(T(b.loss[i]));
  D total(0.0);
  for (int64_t i = 0; i < n; i += D::size)
    total = total + load(b.loss + i, std::min(D::size, n - i));
  return sum(total);
}

// x' = cap·u, u = tanh(x / cap). It is u that the gradient needs: 1 − u² of a rounded x' / cap is
// off by more than that of u where u is near 1.
template <typename T>
Vec<T> squash(Vec<T> x, T cap) {
  return tanh(x / Vec<T>(cap));
}

// The gradient at a row's target, overwriting what the vector loops left there.
template <typename S>
void write_target(const Problem<S>& p, S* gradient, accumulate_t<S> e, accumulate_t<S> u,
                  accumulate_t<S> scale, accumulate_t<S> hit) {
  using T = accumulate_t<S>;
  T v = e * scale - hit;
  if (p.cap() != 0) v *= T(1) - u * u;
  *gradient = narrow<S>(v);
}

// -------------------------------------------------------------------- rows: lanes run over classes

// The values x' of n logits: where they lie, or in `buffer`, and their u in `squashed`.
template <typename S>
const accumulate_t<S>* stage(const S* x, int64_t n, accumulate_t<S> cap, accumulate_t<S>* buffer,
                             accumulate_t<S>* squashed) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  if constexpr (std::is_same_v<S, T>)
    if (cap == 0) return x;
  for (int64_t c = 0; c < n; c += V::size) {
    const int64_t lanes = std::min(V::size, n - c);
    V v = load(x + c, lanes);
    if (cap != 0) {
      const V u = squash(v, cap);
      store(squashed + c, u, lanes);
      v = V(cap) * u;
    }
    store(buffer + c, v, lanes);
  }
  return buffer;
}

// The masses s_c on classes [c, c + lanes) of a row.
template <typename S, Kind kind>
Vec<accumulate_t<S>> mass(const Problem<S>& p, const S* probability, int64_t c, int64_t lanes) {
  using V = Vec<accumulate_t<S>>;
  const V w = load(p.weight.data() + c, lanes);
  if constexpr (kind == Kind::kSmooth) return w;
  return w * fma(load(probability + c, lanes), V(1 - p.smoothing()), V(p.uniform()));
}

// A sum of partial sums that carries what the rounding of each addition left.
template <typename T>
struct CompensatedSum {
  Vec<T> total{T(0)}, rest{T(0)};
  void add(Vec<T> part) {
    const Vec<T> next = total + part;
    rest = rest + ((total - next) + part);
    total = next;
  }
  Vec<T> value() const { return total + rest; }
};

template <typename T>
T max_of(const T* x, int64_t n) {
  using V = Vec<T>;
  const V lowest(-std::numeric_limits<T>::infinity());
  V m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  int64_t c = 0;
  for (; c + 4 * V::size <= n; c += 4 * V::size) {
    m0 = max(load(x + c), m0);
    m1 = max(load(x + c + V::size), m1);
    m2 = max(load(x + c + 2 * V::size), m2);
    m3 = max(load(x + c + 3 * V::size), m3);
  }
  for (; c + V::size <= n; c += V::size) m0 = max(load(x + c), m0);
  if (c < n) m1 = max(first(n - c, load(x + c, n - c), lowest), m1);
  return max_element(max(max(m0, m1), max(m2, m3)));
}

// Σ e, Σ s, Σ s·(x − m) of a chunk; e is kept where `e` is given. Lanes are summed kFlush vectors
// at a time, so that the error of a sum grows with the root of their number.
template <typename S, Kind kind, bool keep>
void accumulate_chunk(const Problem<S>& p, const accumulate_t<S>* x, const S* probability,
                      int64_t class0, int64_t n, accumulate_t<S> m, const S* ahead,
                      accumulate_t<S>* e, accumulate_t<S>& total, accumulate_t<S>& total_mass,
                      accumulate_t<S>& moment) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const V shift(m);
  CompensatedSum<T> sums[3];
  V parts[3] = {T(0), T(0), T(0)};
  const auto step = [&](int64_t c, V t, V value, int64_t lanes) {
    if constexpr (keep) store(e + c, value, lanes);
    parts[0] = parts[0] + value;
    if constexpr (kind != Kind::kIndex) {
      const V q = mass<S, kind>(p, probability, class0 + c, lanes);
      parts[1] = parts[1] + q;
      parts[2] = fma(q, t, parts[2]);
    }
  };
  const auto flush = [&] {
    for (int k = 0; k < (kind == Kind::kIndex ? 1 : 3); ++k) {
      sums[k].add(parts[k]);
      parts[k] = V(T(0));
    }
  };
  int64_t c = 0;
  for (; c + kFlush * V::size <= n; flush())
    for (int64_t k = 0; k < kFlush; ++k, c += V::size) {
      __builtin_prefetch(ahead + c);
      const V t = load(x + c) - shift;
      step(c, t, exp(t), V::size);
    }
  for (; c < n; c += V::size) {
    const int64_t lanes = std::min(V::size, n - c);
    const V t = first(lanes, load(x + c, lanes) - shift, V(T(0)));
    step(c, t, first(lanes, exp(t), V(T(0))), lanes);
  }
  flush();
  total += sum(sums[0].value());
  if constexpr (kind != Kind::kIndex) {
    total_mass += sum(sums[1].value());
    moment += sum(sums[2].value());
  }
}

// gradient = (e·scale − spread·s_c)·(1 − (x'/cap)²) over n classes from class0 on.
template <typename S, Kind kind>
void write_chunk(const Problem<S>& p, S* gradient, const accumulate_t<S>* e,
                 const accumulate_t<S>* squashed, const S* probability, int64_t class0, int64_t n,
                 accumulate_t<S> scale, accumulate_t<S> spread) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const V a(scale), minus_spread(-spread);
  const auto value = [&](int64_t c, int64_t lanes) {
    V v = load(e + c, lanes) * a;
    if constexpr (kind != Kind::kIndex)
      v = fma(minus_spread, mass<S, kind>(p, probability, class0 + c, lanes), v);
    if (squashed) {
      const V u = load(squashed + c, lanes);
      v = v * (V(T(1)) - u * u);
    }
    return v;
  };
  int64_t c = 0;
  for (; c + V::size <= n; c += V::size) {
    __builtin_prefetch(gradient + c + kAhead, 1);
    store(gradient + c, value(c, V::size));
  }
  if (c < n) store(gradient + c, value(c, n - c), n - c);
}

// One row: statistics into b[i]; with `keep`, e and the chunks' shifts into scratch.
template <typename S, Kind kind, bool keep>
void read_row(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t i, int64_t row,
              const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  const int64_t classes = p.layout.classes;
  const T cap = p.cap();
  const S* x = p.input + offset_of(p.layout, row);
  const S* probability =
      kind == Kind::kProbability ? p.probability + offset_of(p.target_layout, row) : nullptr;
  const int64_t y = kind == Kind::kProbability || p.is_ignored(row) ? -1 : p.target[row];
  T m = lowest, shift = 0, total = 0, total_mass = 0, moment = 0;
  b.target_logit[i] = 0;
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t n = std::min(kChunk, classes - c0);
    const T* values = stage(x + c0, n, cap, s.buffer, s.squashed + (keep ? c0 : 0));
    const T chunk_max = max_of(values, n);
    if (chunk_max > m) {
      // While every logit so far is −inf, the shift is 0 and each e is 0.
      if (total != 0) total *= std::exp(shift - chunk_max);
      if (kind != Kind::kIndex && c0 > 0) moment += total_mass * (shift - chunk_max);
      m = shift = chunk_max;
    }
    accumulate_chunk<S, kind, keep>(p, values, probability, c0, n, shift, x + c0 + kChunk,
                                    keep ? s.e + c0 : nullptr, total, total_mass, moment);
    if (keep) s.shift[c0 / kChunk] = shift;
    if (y >= c0 && y < c0 + n) b.target_logit[i] = values[y - c0];
  }
  b.max[i] = m;
  b.sum[i] = total;
  b.mass[i] = total_mass;
  b.moment[i] = moment;
}

// The gradient of one row from the e of its chunks.
template <typename S, Kind kind>
void write_row(const Problem<S>& p, const Block<accumulate_t<S>>& b, int64_t i, int64_t row,
               const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  const int64_t classes = p.layout.classes;
  const bool has_cap = p.cap() != 0;
  S* gradient = p.gradient + offset_of(p.gradient_layout, row);
  const S* probability =
      kind == Kind::kProbability ? p.probability + offset_of(p.target_layout, row) : nullptr;
  const T last_shift = s.shift[(classes - 1) / kChunk];
  const int64_t y = kind == Kind::kProbability || p.is_ignored(row) ? -1 : p.target[row];
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t n = std::min(kChunk, classes - c0);
    const T shift = s.shift[c0 / kChunk];
    const T scale = shift < last_shift ? b.scale[i] * std::exp(shift - last_shift) : b.scale[i];
    write_chunk<S, kind>(p, gradient + c0, s.e + c0, has_cap ? s.squashed + c0 : nullptr,
                         probability, c0, n, scale, b.spread[i]);
    if (y >= c0 && y < c0 + n)
      write_target(p, gradient + y, s.e[y], has_cap ? s.squashed[y] : T(0), scale, b.hit[i]);
  }
}

inline int64_t rows_per_block(int64_t classes) {
  return classes > kChunk ? 1 : std::clamp<int64_t>(kBlockElements / classes, 1, kRows);
}

// Rows [row, row + n): loss and lse, and with `keep` the gradient as well. Returns the sum of the
// losses.
template <typename S, Kind kind, bool keep>
double forward_rows(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                    const Scratch<accumulate_t<S>>& scratch) {
  using T = accumulate_t<S>;
  const auto of_row = [&](int64_t i) {
    Scratch<T> s = scratch;
    if constexpr (keep) {
      s.e += i * p.layout.classes;
      s.squashed += i * p.layout.classes;
      s.shift += i;  // more than one row only where a row is one chunk
    }
    return s;
  };
  load_targets<S, kind>(p, b, row, n);
  for (int64_t i = 0; i < n; ++i) read_row<S, kind, keep>(p, b, i, row + i, of_row(i));
  const double total = finish_rows<S, kind>(p, b, row, n);
  if constexpr (keep) {
    set_coefficients<S, kind>(p, b, row, n, true);
    for (int64_t i = 0; i < n; ++i) write_row<S, kind>(p, b, i, row + i, of_row(i));
  }
  return total;
}

// Rows [row, row + n): the gradient, from the saved log-sum-exp and any upstream gradient.
template <typename S, Kind kind>
void backward_rows(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                   const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t classes = p.layout.classes;
  const T cap = p.cap();
  load_targets<S, kind>(p, b, row, n);
  load_lse(p, b, row, n);
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kind == Kind::kProbability) {
      const S* probability = p.probability + offset_of(p.target_layout, row + i);
      double total = 0;
      for (int64_t c0 = 0; c0 < classes; c0 += kFlush * V::size) {
        const int64_t end = std::min(classes, c0 + kFlush * V::size);
        V part(T(0));
        for (int64_t c = c0; c < end; c += V::size)
          part = part + mass<S, kind>(p, probability, c, std::min(V::size, end - c));
        total += double(sum(part));
      }
      b.mass[i] = T(total);
    }
  }
  set_coefficients<S, kind>(p, b, row, n, false);
  for (int64_t i = 0; i < n; ++i) {
    const S* x = p.input + offset_of(p.layout, row + i);
    S* gradient = p.gradient + offset_of(p.gradient_layout, row + i);
    const S* probability =
        kind == Kind::kProbability ? p.probability + offset_of(p.target_layout, row + i) : nullptr;
    const int64_t y = kind == Kind::kProbability || p.is_ignored(row + i) ? -1 : p.target[row + i];
    const V lse(b.lse[i]), low(b.lse_low[i]);
    for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
      const int64_t m = std::min(kChunk, classes - c0);
      const T* values = stage(x + c0, m, cap, s.buffer, s.squashed);
      for (int64_t c = 0; c < m; c += V::size) {
        const int64_t lanes = std::min(V::size, m - c);
        store(s.e + c, exp((load(values + c, lanes) - lse) - low), lanes);
      }
      const T* squashed = cap != 0 ? s.squashed : nullptr;
      write_chunk<S, kind>(p, gradient + c0, s.e, squashed, probability, c0, m, b.scale[i],
                           b.spread[i]);
      if (y >= c0 && y < c0 + m)
        write_target(p, gradient + y, s.e[y - c0], squashed ? squashed[y - c0] : T(0), b.scale[i],
                     b.hit[i]);
    }
  }
}

// ----------------------------------------------------- columns and transposed: lanes run over rows

// Rows of a block, and the distance of classes in scratch: 64 bytes more, so that it is no power of
// two.
template <typename S>
int64_t columns_per_block(const Problem<S>& p) {
  const int64_t fit = kColumnBytes / int64_t(p.layout.classes * sizeof(accumulate_t<S>)) / 16 * 16;
  const int64_t rows = std::clamp<int64_t>(fit, p.layout.classes <= 2048 ? 64 : 16, kRows);
  return std::min(p.walk == Walk::kColumns ? p.layout.inner : p.rows, rows);
}
template <typename S>
int64_t columns_pitch(const Problem<S>& p) {
  return (columns_per_block(p) + 15) / 16 * 16 + int64_t(64 / sizeof(accumulate_t<S>));
}

// Reads the values of rows [row, row + n) once, calling sink(c, i, v) with v the lanes i … of class
// c; lanes beyond n are 0. Each class's piece of a block is a stream of its own, often a power of
// two apart, which caches take badly.
template <typename S, typename Sink>
void read_columns(const Problem<S>& p, const Layout& layout, const S* x, int64_t row, int64_t n,
                  int64_t* offset, const Sink& sink) {
  using V = Vec<accumulate_t<S>>;
  const int64_t classes = p.layout.classes;
  if (p.walk == Walk::kColumns) {
    x += offset_of(layout, row);
    // Pieces are too short for the hardware to see a stream: the next block's are asked for here.
    constexpr int64_t kLine = 64 / sizeof(S);
    for (int64_t c = 0; c < classes; ++c, x += layout.class_stride) {
      for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(x + n + i);
      for (int64_t i = 0; i < n; i += V::size) sink(c, i, load(x + i, std::min(V::size, n - i)));
    }
    return;
  }
  offsets_of(layout, row, n, offset);
  for (int64_t i = 0; i < n; i += V::size)
    for (int64_t c = 0; c < classes; c += V::size) {
      V tile[V::size];
      const int64_t lanes = std::min(V::size, classes - c);
      for (int64_t r = 0; r < V::size; ++r)
        tile[r] = i + r < n ? load(x + offset[i + r] + c, lanes) : V(0);
      transpose(tile);
      for (int64_t k = 0; k < lanes; ++k) sink(c + k, i, tile[k]);
    }
}

// Fills scratch with x' and s_c, and sets what is known of each row's target.
template <typename S, Kind kind>
void stage_columns(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                   const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t pitch = columns_pitch(p);
  const T cap = p.cap();
  T* const values = s.e;
  load_targets<S, kind>(p, b, row, n);
  if (p.gradient && p.walk == Walk::kColumns)
    for (int64_t c = 0; c < p.layout.classes; ++c) {
      const S* line =
          p.gradient + offset_of(p.gradient_layout, row) + c * p.gradient_layout.class_stride;
      for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(S))) __builtin_prefetch(line + i, 1);
    }
  read_columns(p, p.layout, p.input, row, n, b.offset, [&](int64_t c, int64_t i, V v) {
    if (cap != 0) {
      const V u = squash(v, cap);
      store(s.squashed + c * pitch + i, u);
      v = V(cap) * u;
    }
    store(values + c * pitch + i, v);
  });
  if constexpr (kind == Kind::kProbability) {
    const V kept(1 - p.smoothing()), uniform(p.uniform());
    read_columns(p, p.target_layout, p.probability, row, n, b.offset,
                 [&](int64_t c, int64_t i, V t) {
                   store(s.mass + c * pitch + i, V(p.weight[c]) * fma(t, kept, uniform));
                 });
  } else {
    for (int64_t i = 0; i < n; ++i)
      b.target_logit[i] = b.counts[i] != 0 ? values[p.target[row + i] * pitch + i] : T(0);
  }
}

template <typename S, Kind kind>
Vec<accumulate_t<S>> mass_of_column(const Problem<S>& p, const Scratch<accumulate_t<S>>& s,
                                    int64_t pitch, int64_t c, int64_t i) {
  if constexpr (kind == Kind::kProbability) return load(s.mass + c * pitch + i);
  return Vec<accumulate_t<S>>(p.weight[c]);
}

// m and e = exp(x' − m) with its sums.
template <typename S, Kind kind, bool keep>
void accumulate_columns(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t n,
                        const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t pitch = columns_pitch(p);
  const T* const values = s.e;
  for (int64_t i = 0; i < n; i += V::size) {
    V m(-std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < p.layout.classes; ++c) m = max(load(values + c * pitch + i), m);
    store(b.max + i, m);
    const V shift = select(less(V(-std::numeric_limits<T>::infinity()), m), m, V(T(0)));
    CompensatedSum<T> total, total_mass, moment;
    for (int64_t c0 = 0; c0 < p.layout.classes; c0 += kFlush) {
      V part(T(0)), part_mass(T(0)), part_moment(T(0));
      for (int64_t c = c0; c < std::min(p.layout.classes, c0 + kFlush); ++c) {
        const V t = load(values + c * pitch + i) - shift;
        const V e = exp(t);
        if constexpr (keep) store(s.e + c * pitch + i, e);
        part = part + e;
        if constexpr (kind != Kind::kIndex) {
          const V q = mass_of_column<S, kind>(p, s, pitch, c, i);
          part_mass = part_mass + q;
          part_moment = fma(q, t, part_moment);
        }
      }
      total.add(part);
      if constexpr (kind != Kind::kIndex) {
        total_mass.add(part_mass);
        moment.add(part_moment);
      }
    }
    store(b.sum + i, total.value());
    store(b.mass + i, total_mass.value());
    store(b.moment + i, moment.value());
  }
}

// The gradient of rows [row, row + n) from the e, x' and s_c in scratch.
template <typename S, Kind kind>
void write_columns(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                   const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t classes = p.layout.classes, pitch = columns_pitch(p);
  const Layout& layout = p.gradient_layout;
  const bool has_cap = p.cap() != 0;
  const auto value = [&](int64_t c, int64_t i, V scale, V spread) {
    V v = load(s.e + c * pitch + i) * scale;
    if constexpr (kind != Kind::kIndex) v = v - spread * mass_of_column<S, kind>(p, s, pitch, c, i);
    if (has_cap) {
      const V u = load(s.squashed + c * pitch + i);
      v = v * (V(T(1)) - u * u);
    }
    return v;
  };
  if (p.walk == Walk::kColumns) {
    S* gradient = p.gradient + offset_of(layout, row);
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t i = 0; i < n; i += V::size)
        store(gradient + c * layout.class_stride + i,
              value(c, i, load(b.scale + i), load(b.spread + i)), std::min(V::size, n - i));
    for (int64_t i = 0; i < n; ++i) b.offset[i] = gradient - p.gradient + i;
  } else {
    offsets_of(layout, row, n, b.offset);
    for (int64_t i = 0; i < n; i += V::size) {
      const V scale = load(b.scale + i), spread = load(b.spread + i);
      for (int64_t c = 0; c < classes; c += V::size) {
        V tile[V::size];
        const int64_t lanes = std::min(V::size, classes - c);
        for (int64_t k = 0; k < V::size; ++k)
          tile[k] = k < lanes ? value(c + k, i, scale, spread) : V(0);
        transpose(tile);
        for (int64_t r = 0; r < std::min(V::size, n - i); ++r)
          store(p.gradient + b.offset[i + r] + c, tile[r], lanes);
      }
    }
  }
  if constexpr (kind != Kind::kProbability)
    for (int64_t i = 0; i < n; ++i) {
      if (b.counts[i] == 0) continue;
      const int64_t y = p.target[row + i], at = y * pitch + i;
      write_target(p, p.gradient + b.offset[i] + y * layout.class_stride, s.e[at],
                   has_cap ? s.squashed[at] : T(0), b.scale[i], b.hit[i]);
    }
}

// The unit of work: so many rows, of one outer index where the walk is over columns.
template <typename S>
int64_t rows_of_unit(const Problem<S>& p) {
  return p.walk == Walk::kRows ? rows_per_block(p.layout.classes) : columns_per_block(p);
}
template <typename S>
int64_t number_of_units(const Problem<S>& p) {
  if (p.rows == 0) return 0;
  const int64_t block = rows_of_unit(p);
  if (p.walk == Walk::kColumns) return p.layout.outer * ((p.layout.inner + block - 1) / block);
  return (p.rows + block - 1) / block;
}

template <typename S, Kind kind, bool keep>
double forward_columns(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                       const Scratch<accumulate_t<S>>& s) {
  stage_columns<S, kind>(p, b, row, n, s);
  accumulate_columns<S, kind, keep>(p, b, n, s);
  const double total = finish_rows<S, kind>(p, b, row, n);
  if constexpr (keep) {
    set_coefficients<S, kind>(p, b, row, n, true);
    write_columns<S, kind>(p, b, row, n, s);
  }
  return total;
}

template <typename S, Kind kind>
void backward_columns(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                      const Scratch<accumulate_t<S>>& s) {
  using V = Vec<accumulate_t<S>>;
  const int64_t pitch = columns_pitch(p);
  stage_columns<S, kind>(p, b, row, n, s);
  load_lse(p, b, row, n);
  const accumulate_t<S>* const values = s.e;
  for (int64_t i = 0; i < n; i += V::size) {
    const V lse = load(b.lse + i), low = load(b.lse_low + i);
    CompensatedSum<accumulate_t<S>> total;
    for (int64_t c0 = 0; c0 < p.layout.classes; c0 += kFlush) {
      V part(0);
      for (int64_t c = c0; c < std::min(p.layout.classes, c0 + kFlush); ++c) {
        store(s.e + c * pitch + i, exp((load(values + c * pitch + i) - lse) - low));
        if constexpr (kind == Kind::kProbability) part = part + load(s.mass + c * pitch + i);
      }
      if constexpr (kind == Kind::kProbability) total.add(part);
    }
    store(b.mass + i, total.value());
  }
  set_coefficients<S, kind>(p, b, row, n, false);
  write_columns<S, kind>(p, b, row, n, s);
}

}  // namespace dlkernels::cross_entropy

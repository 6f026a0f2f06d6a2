// Cross_entropy of blocks of rows: what its three walks share. The walks:
//   rows        classes contiguous: lanes run over classes (cross_entropy_rows.h)
//   columns     classes strided, rows contiguous: lanes run over rows (cross_entropy_columns.h)
//   transposed  classes contiguous but few: as columns, through a transposition in registers
//
// With x' = softcap(x), m = max x', lse = m + log Σ exp(x' − m) and a mass s_c on each class:
//   indices        loss = (1−ε)·w_y·(lse − x'_y) + ε/C·Σ s_c·(lse − x'_c) + z·lse², s_c = w_c
//   probabilities  loss = Σ s_c·(lse − x'_c) + z·lse², s_c = w_c·((1−ε)·t_c + ε/C)
// The gradient is (e·scale − spread·s_c)·(1 − (x'/cap)²), at an index target (e·scale − hit)·(…):
//   e       exp(x' − m) in the forward pass, softmax exp(x' − lse) in the backward
//   scale   factor·((1−ε)·w_y + ε/C·Σ w + 2·z·lse) or factor·(Σ s + 2·z·lse); over Σ e if forward
//   spread  factor·ε/C or factor; for probabilities the factor is taken out of all, where it can be
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
constexpr int64_t kBlockElements = 4096;    // rows: short rows share a block up to this size
constexpr int64_t kTransposedClasses = 64;  // contiguous classes up to this number are transposed
constexpr int64_t kColumnBytes = 12 << 10;  // columns: scratch of a block, beside pieces in L1
constexpr int64_t kBytesAhead = 4 << 10;    // columns: as much is asked for before it is read
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
  S* loss = nullptr;                // (rows) for reduction "none", else one element
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
  double loss[kPadded], factor[kPadded];
  double target_weight[kPadded], counts[kPadded];  // w_y, 1; where the row is ignored 0, 0
  T scale[kPadded], spread[kPadded], hit[kPadded];
  T outer[kPadded];  // probabilities: what multiplies all of a row's gradient
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
  if constexpr (kind == Kind::kProbability) {
    std::fill_n(b.counts, n, 1.0);
    std::fill_n(b.target_weight, n, 0.0);
    return;
  }
  const int64_t* target = p.target + row;
  const int64_t ignored = p.options.ignore_index;
  for (int64_t i = 0; i < n; ++i) b.counts[i] = target[i] != ignored;
  if (!p.weighted) {
    std::copy_n(b.counts, n, b.target_weight);
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    b.target_weight[i] = target[i] != ignored ? double(p.weight[target[i]]) : 0;
}

// In double: a few numbers per row, whose errors all of its gradient would share. `forward`: e is
// exp(x' − m), to be divided by its sum.
template <typename S, Kind kind>
void set_coefficients(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                      bool forward) {
  using D = Vec<double>;
  const D zero(0.0), z(2 * p.options.z_loss), kept(1 - p.options.label_smoothing);
  const double per_class =
      kind == Kind::kSmooth ? p.options.label_smoothing / double(p.layout.classes) : 0;
  const D uniform(per_class), all(per_class * p.total_class_weight);
  const bool per_row = p.grad_loss && p.options.reduction == kNone;
  double factor = p.row_factor;
  if (p.grad_loss && !per_row) factor *= double(widen(*p.grad_loss));
  if (per_row)
    for (int64_t i = 0; i < n; ++i) b.factor[i] = factor * double(widen(p.grad_loss[row + i]));
  for (int64_t i = 0; i < n; i += D::size) {
    const int64_t lanes = std::min(D::size, n - i);
    const D f = per_row ? load(b.factor + i) : D(factor), lse = load(p.lse + row + i, lanes);
    D total;
    if constexpr (kind == Kind::kProbability) {
      // The factor comes last, so that one class, or all mass on one, has a gradient of exactly 0;
      // with an upstream gradient of the log-sum-exp there is no common factor.
      const D each = p.grad_lse ? f : D(1.0);
      total = each * fma(z, lse, load_double(b.mass + i));
      store_rounded(b.spread + i, each);
      store_rounded(b.outer + i, p.grad_lse ? D(1.0) : f);
      store_rounded(b.hit + i, zero);
    } else {
      const D w = load(b.target_weight + i), nll = kept * w;
      const auto counts = less(zero, load(b.counts + i));
      total = select(counts, f * fma(z, lse, nll + all), zero);
      store_rounded(b.spread + i, select(counts, f * uniform, zero));
      store_rounded(b.hit + i, f * fma(uniform, w, nll));
    }
    if (p.grad_lse) total = total + load(p.grad_lse + row + i, lanes);
    store_rounded(b.scale + i, forward ? total / load_double(b.sum + i) : total);
  }
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
  const D zero(0.0), lowest(-std::numeric_limits<double>::infinity());
  const D z(p.options.z_loss), kept(1 - p.options.label_smoothing);
  const D uniform(kind == Kind::kSmooth ? p.options.label_smoothing / double(p.layout.classes) : 0);
  D sum_of_losses(0.0);
  for (int64_t i = 0; i < n; i += D::size) {
    const int64_t lanes = std::min(D::size, n - i);
    // A row of −inf has log-sum-exp −inf, as torch.logsumexp, and a loss of NaN, as stock.
    const D m = load_double(b.max + i), excess = log(load_double(b.sum + i));
    const D lse = select(less(lowest, m), m + excess, m);
    store(p.lse + row + i, lse, lanes);
    D loss = p.options.z_loss != 0 ? z * lse * lse : zero;
    if constexpr (kind == Kind::kProbability) {
      loss = loss + (load_double(b.mass + i) * excess - load_double(b.moment + i));
    } else {
      loss = fma(kept * load(b.target_weight + i), lse - load_double(b.target_logit + i), loss);
      if constexpr (kind == Kind::kSmooth)
        loss = fma(uniform, D(p.total_class_weight) * excess - load_double(b.moment + i), loss);
    }
    loss = select(less(zero, load(b.counts + i)), loss, zero);
    store(b.loss + i, loss);
    sum_of_losses = sum_of_losses + first(lanes, loss, zero);
  }
  if (p.options.reduction == kNone)
    for (int64_t i = 0; i < n; ++i) p.loss[row + i] = narrow<S>(T(b.loss[i]));
  return sum(sum_of_losses);
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

// ---------------------------------------------------------------------------- for the host entries

template <typename Body>
void for_kind(bool is_probability, double label_smoothing, const Body& body) {
  if (is_probability) return body(std::integral_constant<Kind, Kind::kProbability>{});
  if (label_smoothing > 0) return body(std::integral_constant<Kind, Kind::kSmooth>{});
  return body(std::integral_constant<Kind, Kind::kIndex>{});
}

// Ones where the caller gives none.
template <typename S>
void set_class_weights(Problem<S>& p, const Optional& weight) {
  using T = accumulate_t<S>;
  p.weighted = weight.has_value();
  p.weight.assign(p.layout.classes, T(1));
  if (weight) {
    const Tensor w = torch::stable::contiguous(*weight);
    const S* data = static_cast<const S*>(w.const_data_ptr());
    std::transform(data, data + p.layout.classes, p.weight.begin(),
                   [](S value) { return widen(value); });
  }
  p.total_class_weight = 0;
  for (const T w : p.weight) p.total_class_weight += double(w);
}

// Σ w_y over the rows that count. Every target is in range when this returns.
template <typename S>
double sum_target_weights(const Problem<S>& p) {
  constexpr int64_t kUnit = 1 << 14;
  const int64_t units = (p.rows + kUnit - 1) / kUnit;
  std::vector<double> partial(units, 0.0);
  std::vector<int64_t> outside(units, 0);
  const auto is_outside = [&](int64_t y) {
    return y != p.options.ignore_index && uint64_t(y) >= uint64_t(p.layout.classes);
  };
  torch::stable::parallel_for(0, units, 2, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t first = u * kUnit, last = std::min(p.rows, first + kUnit);
      int64_t counted = 0, wrong = 0;
      for (int64_t r = first; r < last; ++r) {
        counted += p.target[r] != p.options.ignore_index;
        wrong += is_outside(p.target[r]);
      }
      double total = double(counted);
      if (p.weighted && wrong == 0) {
        total = 0;
        for (int64_t r = first; r < last; ++r)
          if (!p.is_ignored(r)) total += double(p.weight[p.target[r]]);
      }
      partial[u] = total;
      outside[u] = wrong;
    }
  });
  double total = 0;
  for (int64_t u = 0; u < units; ++u) {
    if (outside[u] > 0) {
      const int64_t* y = std::find_if(p.target + u * kUnit, p.target + p.rows, is_outside);
      DLK_CHECK_INDEX(false, "Target ", *y, " is out of bounds.");
    }
    total += partial[u];
  }
  return total;
}

}  // namespace dlkernels::cross_entropy

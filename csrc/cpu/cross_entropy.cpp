// Softmax cross-entropy: loss, log-sum-exp and the gradient of the logits, for class indices and probabilities.
//
// One read of the logits and one write of the gradient. A row's logits are read once from memory, in chunks that
// stay in L1, with a running maximum m and e = exp(x − m) kept in scratch; when the row ends, the gradient is
// e·scale − (what the target takes away), scale = (coefficient of the softmax) / Σe. Log-probabilities are never
// written. Two layouts: `rows`, the classes are contiguous (2-d, channels_last), lanes run over classes; `columns`,
// the classes are strided (N-d contiguous), lanes run over rows, so that no row needs a horizontal sum.
//
// With x' = softcap(x), lse = m + log Σe, p = exp(x' − lse), and per row a mass s_c on each class,
//   indices        loss = (1−ε)·w_y·(lse − x'_y) + ε/C·Σ w_c·(lse − x'_c) + z·lse²
//   probabilities  loss = Σ s_c·(lse − x'_c) + z·lse²,  s_c = w_c·((1−ε)·t_c + ε/C)
//   d loss / d x'_c = p_c·(Σ s + 2·z·lse) − s_c,  d x' / d x = 1 − (x'/cap)².
//
// Accumulation: float within a chunk of a row (double for double), double over rows, in an order that the shape
// alone fixes: the same bits for any number of threads.
#include "../check.h"
#include "simd.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace dlkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "cross_entropy";
constexpr int64_t kChunk = 2048;           // classes of a row that are in L1 at a time
constexpr int64_t kRows = 256;             // most rows of a block
constexpr int64_t kBlockElements = 4096;   // rows: short rows share a block up to this size
constexpr int64_t kColumnBytes = 24 << 10; // columns: scratch of a block, to stay in L1
constexpr int64_t kFlush = 16;             // columns: classes that are summed before the sum joins the total
constexpr int64_t kGrain = 1 << 15;        // fewest elements worth a second thread

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum class Kind { kIndex, kSmooth, kProbability };

// ------------------------------------------------------------------------------------------------- the problem

// A tensor of logits as outer × classes × inner, each with its stride.
struct Layout {
  int64_t outer = 1, classes = 1, inner = 1;
  int64_t outer_stride = 0, class_stride = 1, inner_stride = 0;

  bool is_rows() const { return class_stride == 1 || classes == 1; }
  bool is_columns() const { return inner_stride == 1 && inner > 1; }
  int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing, softcap, z_loss;
};

template <typename S>
struct Problem {
  using T = accumulate_t<S>;
  Options options;
  Layout layout, gradient_layout, target_layout;
  const S* input;
  const int64_t* target = nullptr;    // (rows), or
  const S* probability = nullptr;     // like the input
  std::vector<T> weight;              // (classes), ones where the caller gave none
  T total_class_weight = 0;           // Σ w_c
  int64_t rows = 0;
  T row_factor = 1;                   // what the reduction multiplies each row's loss with
  S* loss = nullptr;                  // (rows), for reduction "none"
  T* lse = nullptr;                   // (rows)
  S* gradient = nullptr;
  bool stream = false;                // write the gradient past the caches
  const S* grad_loss = nullptr;       // (rows) for "none", else one element
  const T* grad_lse = nullptr;        // (rows) or null

  bool is_ignored(int64_t row) const { return target && target[row] == options.ignore_index; }
  T smoothing() const { return T(options.label_smoothing); }
  T uniform() const { return T(options.label_smoothing / double(layout.classes)); }
};

// What is known of each row of a block.
template <typename T>
struct alignas(64) Block {
  T max[kRows], sum[kRows];              // m, Σ exp(x' − m)
  T target_logit[kRows];                 // x'_y
  T mass[kRows], moment[kRows];          // Σ s_c, Σ s_c·(x'_c − m)
  T lse[kRows], loss[kRows];
  T scale[kRows], hit[kRows], spread[kRows];  // gradient = e·scale − spread·s_c − hit·[c = y]
};

// -------------------------------------------------------------------------------------------------- row algebra

// The coefficients of rows [row, row + n), given lse and what a row's loss is multiplied with.
template <typename S, Kind kind>
void set_coefficients(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n, bool upstream) {
  using T = accumulate_t<S>;
  const T z = T(2 * p.options.z_loss);
  for (int64_t i = 0; i < n; ++i) {
    T factor = p.row_factor;
    if (upstream) factor *= widen(p.grad_loss[p.options.reduction == kNone ? row + i : 0]);
    if constexpr (kind == Kind::kProbability) {
      b.hit[i] = 0;
      b.spread[i] = factor;
      b.scale[i] = factor * (b.mass[i] + z * b.lse[i]);
    } else if (p.is_ignored(row + i)) {
      b.hit[i] = b.spread[i] = b.scale[i] = 0;
    } else {
      const T nll = (T(1) - p.smoothing()) * p.weight[p.target[row + i]];
      const T uniform = kind == Kind::kSmooth ? p.uniform() : T(0);
      b.hit[i] = factor * nll;
      b.spread[i] = factor * uniform;
      b.scale[i] = factor * (nll + uniform * p.total_class_weight + z * b.lse[i]);
    }
    if (p.grad_lse) b.scale[i] += p.grad_lse[row + i];
  }
}

// From statistics to log-sum-exp and loss. Returns the sum of the block's losses.
template <typename S, Kind kind>
double finish_rows(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  std::fill(b.sum + n, b.sum + (n + V::size - 1) / V::size * V::size, T(1));
  for (int64_t i = 0; i < n; i += V::size) store(b.lse + i, log(load(b.sum + i)));
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    // A row of −inf has log-sum-exp −inf, as torch.logsumexp, and a loss of NaN, as stock.
    const T lse = b.max[i] == -std::numeric_limits<T>::infinity() ? b.max[i] : b.max[i] + b.lse[i];
    const T excess = lse - b.max[i];
    T loss;
    if constexpr (kind == Kind::kProbability) {
      loss = b.mass[i] * excess - b.moment[i];
    } else if (p.is_ignored(row + i)) {
      loss = 0;
    } else {
      loss = (T(1) - p.smoothing()) * p.weight[p.target[row + i]] * (lse - b.target_logit[i]);
      if constexpr (kind == Kind::kSmooth)
        loss += p.uniform() * (p.total_class_weight * excess - b.moment[i]);
    }
    if (p.options.z_loss != 0 && !p.is_ignored(row + i)) loss += T(p.options.z_loss) * lse * lse;
    b.lse[i] = lse;
    b.loss[i] = loss;
    total += double(loss);
  }
  std::copy(b.lse, b.lse + n, p.lse + row);
  if (p.options.reduction == kNone)
    for (int64_t i = 0; i < n; ++i) p.loss[row + i] = narrow<S>(b.loss[i]);
  return total;
}

template <typename T>
Vec<T> softcap(Vec<T> x, T cap) {
  return Vec<T>(cap) * tanh(x / Vec<T>(cap));
}

// The values of n logits: where they lie, or converted and capped into `buffer`.
template <typename S>
const accumulate_t<S>* stage(const S* x, int64_t n, accumulate_t<S> cap, accumulate_t<S>* buffer) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  if constexpr (std::is_same_v<S, T>)
    if (cap == 0) return x;
  for (int64_t c = 0; c < n; c += V::size) {
    const int64_t lanes = std::min(V::size, n - c);
    V v = load(x + c, lanes);
    if (cap != 0) v = softcap(v, cap);
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

// ----------------------------------------------------------------------------------- rows: classes contiguous

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

// Σ e, Σ s, Σ s·(x − m) of a chunk; e is kept where `e` is given.
template <typename S, Kind kind, bool keep>
void accumulate_chunk(const Problem<S>& p, const accumulate_t<S>* x, const S* probability, int64_t class0, int64_t n,
                      accumulate_t<S> m, accumulate_t<S>* e, accumulate_t<S>& total, accumulate_t<S>& total_mass,
                      accumulate_t<S>& moment) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const V shift(m);
  V s0(T(0)), s1(T(0)), q0(T(0)), q1(T(0));
  const auto step = [&](int64_t c, V t, V value, int64_t lanes, V& s) {
    if constexpr (keep) store(e + c, value, lanes);
    s = s + value;
    if constexpr (kind != Kind::kIndex) {
      const V q = mass<S, kind>(p, probability, class0 + c, lanes);
      q0 = q0 + q;
      q1 = fma(q, t, q1);
    }
  };
  int64_t c = 0;
  for (; c + 2 * V::size <= n; c += 2 * V::size) {
    const V t0 = load(x + c) - shift, t1 = load(x + c + V::size) - shift;
    step(c, t0, exp(t0), V::size, s0);
    step(c + V::size, t1, exp(t1), V::size, s1);
  }
  for (; c < n; c += V::size) {
    const int64_t lanes = std::min(V::size, n - c);
    const V t = first(lanes, load(x + c, lanes) - shift, V(T(0)));
    step(c, t, first(lanes, exp(t), V(T(0))), lanes, s0);
  }
  total += sum(s0 + s1);
  if constexpr (kind != Kind::kIndex) {
    total_mass += sum(q0);
    moment += sum(q1);
  }
}

// gradient = (e·scale − spread·s_c)·(1 − (x'/cap)²) over n classes from class0 on.
template <typename S, Kind kind, bool stream_past_caches>
void write_chunk(const Problem<S>& p, S* gradient, const accumulate_t<S>* e, const accumulate_t<S>* capped,
                 const S* probability, int64_t class0, int64_t n, accumulate_t<S> scale, accumulate_t<S> spread) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const V a(scale), minus_spread(-spread), inverse_cap(capped ? T(1) / T(p.options.softcap) : T(0));
  const auto value = [&](int64_t c, int64_t lanes) {
    V v = load(e + c, lanes) * a;
    if constexpr (kind != Kind::kIndex) v = fma(minus_spread, mass<S, kind>(p, probability, class0 + c, lanes), v);
    if (capped) {
      const V u = load(capped + c, lanes) * inverse_cap;
      v = v * (V(T(1)) - u * u);
    }
    return v;
  };
  int64_t c = 0;
  if constexpr (stream_past_caches) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(gradient) / sizeof(S) % V::size;
    if (misaligned) {
      c = std::min(n, V::size - misaligned);
      store(gradient, value(0, c), c);
    }
    for (; c + V::size <= n; c += V::size) stream(gradient + c, value(c, V::size));
  }
  for (; c + V::size <= n; c += V::size) store(gradient + c, value(c, V::size));
  if (c < n) store(gradient + c, value(c, n - c), n - c);
}

// The gradient at the row's target, overwriting what write_chunk left there.
template <typename S, Kind kind>
void write_target(const Problem<S>& p, S* gradient, accumulate_t<S> e, accumulate_t<S> capped, int64_t y,
                  accumulate_t<S> scale, accumulate_t<S> spread, accumulate_t<S> hit) {
  using T = accumulate_t<S>;
  T v = e * scale - hit;
  if constexpr (kind == Kind::kSmooth) v -= spread * p.weight[y];
  if (p.options.softcap != 0) {
    const T u = capped / T(p.options.softcap);
    v *= T(1) - u * u;
  }
  *gradient = narrow<S>(v);
}

// Scratch of one thread.
template <typename T>
struct Scratch {
  T* e;         // exp(x' − m), or x' − lse: rows of a block, or classes × rows
  T* capped;    // x', where there is a softcap
  T* buffer;    // a chunk
  T* shift;     // the m that each chunk's e is relative to
};

// One row: statistics into b[i]; with `keep`, e and the chunks' shifts into scratch.
template <typename S, Kind kind, bool keep>
void read_row(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t i, int64_t row, const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  const int64_t classes = p.layout.classes;
  const T cap = T(p.options.softcap);
  const S* x = p.input + p.layout.offset(row);
  const S* probability = kind == Kind::kProbability ? p.probability + p.target_layout.offset(row) : nullptr;
  const int64_t y = kind == Kind::kProbability || p.is_ignored(row) ? -1 : p.target[row];
  T m = lowest, shift = 0, total = 0, total_mass = 0, moment = 0;
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t n = std::min(kChunk, classes - c0);
    const T* values = stage(x + c0, n, cap, keep && cap != 0 ? s.capped + c0 : s.buffer);
    const T chunk_max = max_of(values, n);
    if (chunk_max > m) {
      // While every logit so far is −inf, the shift is 0 and each e is 0.
      if (total != 0) total *= std::exp(shift - chunk_max);
      if (kind != Kind::kIndex && c0 > 0) moment += total_mass * (shift - chunk_max);
      m = shift = chunk_max;
    }
    accumulate_chunk<S, kind, keep>(p, values, probability, c0, n, shift,
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
template <typename S, Kind kind, bool stream_past_caches>
void write_row(const Problem<S>& p, const Block<accumulate_t<S>>& b, int64_t i, int64_t row,
               const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  const int64_t classes = p.layout.classes;
  const bool has_cap = p.options.softcap != 0;
  S* gradient = p.gradient + p.gradient_layout.offset(row);
  const S* probability = kind == Kind::kProbability ? p.probability + p.target_layout.offset(row) : nullptr;
  const T last_shift = s.shift[(classes - 1) / kChunk];
  const int64_t y = kind == Kind::kProbability || p.is_ignored(row) ? -1 : p.target[row];
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t n = std::min(kChunk, classes - c0);
    const T shift = s.shift[c0 / kChunk];
    const T scale = shift < last_shift ? b.scale[i] * std::exp(shift - last_shift) : b.scale[i];
    write_chunk<S, kind, stream_past_caches>(p, gradient + c0, s.e + c0, has_cap ? s.capped + c0 : nullptr,
                                             probability, c0, n, scale, b.spread[i]);
    if (y >= c0 && y < c0 + n)
      write_target<S, kind>(p, gradient + y, s.e[y], has_cap ? s.capped[y] : T(0), y, scale, b.spread[i], b.hit[i]);
  }
}

int64_t rows_per_block(int64_t classes) {
  return classes > kChunk ? 1 : std::clamp<int64_t>(kBlockElements / classes, 1, kRows);
}

// Rows [row, row + n): loss and lse, and with `keep` the gradient as well. Returns the sum of the losses.
template <typename S, Kind kind, bool keep>
double forward_rows(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                    const Scratch<accumulate_t<S>>& scratch) {
  using T = accumulate_t<S>;
  const auto of_row = [&](int64_t i) {
    Scratch<T> s = scratch;
    s.e += i * p.layout.classes;
    s.capped += i * p.layout.classes;
    s.shift += i;  // more than one row only where a row is one chunk
    return s;
  };
  for (int64_t i = 0; i < n; ++i) read_row<S, kind, keep>(p, b, i, row + i, of_row(i));
  const double total = finish_rows<S, kind>(p, b, row, n);
  if constexpr (keep) {
    set_coefficients<S, kind>(p, b, row, n, false);
    for (int64_t i = 0; i < n; ++i) {
      b.scale[i] /= b.sum[i];
      if (p.stream)
        write_row<S, kind, true>(p, b, i, row + i, of_row(i));
      else
        write_row<S, kind, false>(p, b, i, row + i, of_row(i));
    }
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
  const T cap = T(p.options.softcap);
  for (int64_t i = 0; i < n; ++i) {
    b.lse[i] = p.lse[row + i];
    if constexpr (kind == Kind::kProbability) {
      const S* probability = p.probability + p.target_layout.offset(row + i);
      V total(T(0));
      for (int64_t c = 0; c < classes; c += V::size)
        total = total + mass<S, kind>(p, probability, c, std::min(V::size, classes - c));
      b.mass[i] = sum(total);
    }
  }
  set_coefficients<S, kind>(p, b, row, n, true);
  for (int64_t i = 0; i < n; ++i) {
    const S* x = p.input + p.layout.offset(row + i);
    S* gradient = p.gradient + p.gradient_layout.offset(row + i);
    const S* probability = kind == Kind::kProbability ? p.probability + p.target_layout.offset(row + i) : nullptr;
    const int64_t y = kind == Kind::kProbability || p.is_ignored(row + i) ? -1 : p.target[row + i];
    const V shift(b.lse[i]);
    for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
      const int64_t m = std::min(kChunk, classes - c0);
      const T* values = stage(x + c0, m, cap, s.buffer);
      for (int64_t c = 0; c < m; c += V::size) {
        const int64_t lanes = std::min(V::size, m - c);
        store(s.e + c, exp(load(values + c, lanes) - shift), lanes);
      }
      const T* capped = cap != 0 ? values : nullptr;
      
      if (p.stream)
        write_chunk<S, kind, true>(p, gradient + c0, s.e, capped, probability, c0, m, b.scale[i], b.spread[i]);
      else
        write_chunk<S, kind, false>(p, gradient + c0, s.e, capped, probability, c0, m, b.scale[i], b.spread[i]);
      if (y >= c0 && y < c0 + m)
        write_target<S, kind>(p, gradient + y, s.e[y - c0], capped ? capped[y - c0] : T(0), y, b.scale[i], b.spread[i],
                              b.hit[i]);
    }
  }
}

// -------------------------------------------------------------------------------------- columns: rows contiguous

int64_t columns_per_block(int64_t classes, int64_t inner, int64_t element) {
  const int64_t fit = kColumnBytes / (classes * element) / 16 * 16;
  return std::min(inner, std::clamp<int64_t>(fit, classes <= 2048 ? 64 : 16, kRows));
}

// Scratch holds classes × pitch: 64 bytes more than a block, so that classes are no power of two apart.
template <typename S>
int64_t columns_pitch(const Problem<S>& p) {
  using T = accumulate_t<S>;
  return columns_per_block(p.layout.classes, p.layout.inner, sizeof(T)) + int64_t(64 / sizeof(T));
}

// Rows [row, row + n), neighbours in memory, of every class: as forward_rows.
template <typename S, Kind kind, bool keep>
double forward_columns(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                       const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t classes = p.layout.classes;
  const T cap = T(p.options.softcap);
  const S* x = p.input + p.layout.offset(row);
  const S* probability = kind == Kind::kProbability ? p.probability + p.target_layout.offset(row) : nullptr;
  const int64_t pitch = columns_pitch(p);
  T* const values = keep && cap != 0 ? s.capped : s.e;  // classes × pitch

  // Each class's piece of the block is a stream of its own, often a power of two apart, which caches take badly:
  // it is read once, into scratch.
  std::fill(b.max, b.max + n, -std::numeric_limits<T>::infinity());
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t i = 0; i < n; i += V::size) {
      const int64_t lanes = std::min(V::size, n - i);
      V v = load(x + c * p.layout.class_stride + i, lanes);
      if (cap != 0) v = softcap(v, cap);
      store(values + c * pitch + i, v, lanes);
      store(b.max + i, max(v, load(b.max + i, lanes)), lanes);
    }
  if constexpr (kind != Kind::kProbability)
    for (int64_t i = 0; i < n; ++i)
      if (!p.is_ignored(row + i)) b.target_logit[i] = values[p.target[row + i] * pitch + i];

  for (int64_t i = 0; i < n; i += V::size) {
    const int64_t lanes = std::min(V::size, n - i);
    const V m = load(b.max + i, lanes);
    const V shift = select(less(V(-std::numeric_limits<T>::infinity()), m), m, V(T(0)));
    V total(T(0)), part(T(0)), total_mass(T(0)), moment(T(0));
    for (int64_t c = 0; c < classes; ++c) {
      const V t = load(values + c * pitch + i, lanes) - shift;
      const V e = exp(t);
      if constexpr (keep) store(s.e + c * pitch + i, e, lanes);
      part = part + e;
      if (c % kFlush == kFlush - 1) {
        total = total + part;
        part = V(T(0));
      }
      if constexpr (kind != Kind::kIndex) {
        V q(p.weight[c]);
        if constexpr (kind == Kind::kProbability)
          q = q * fma(load(probability + c * p.target_layout.class_stride + i, lanes), V(1 - p.smoothing()),
                      V(p.uniform()));
        total_mass = total_mass + q;
        moment = fma(q, t, moment);
      }
    }
    store(b.sum + i, total + part, lanes);
    store(b.mass + i, total_mass, lanes);
    store(b.moment + i, moment, lanes);
  }
  return finish_rows<S, kind>(p, b, row, n);
}

// The gradient of rows [row, row + n): from the e in scratch (`kept`), or from the logits and the log-sum-exp.
template <typename S, Kind kind, bool kept>
void write_columns(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t row, int64_t n,
                   const Scratch<accumulate_t<S>>& s) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t classes = p.layout.classes, stride = p.gradient_layout.class_stride;
  const T cap = T(p.options.softcap);
  const V inverse_cap(cap != 0 ? T(1) / cap : T(0));
  [[maybe_unused]] const int64_t pitch = columns_pitch(p);
  const S* x = p.input + p.layout.offset(row);
  S* gradient = p.gradient + p.gradient_layout.offset(row);
  const S* probability = kind == Kind::kProbability ? p.probability + p.target_layout.offset(row) : nullptr;
  const auto mass_of = [&](int64_t c, int64_t i, int64_t lanes) {
    if constexpr (kind == Kind::kSmooth) return V(p.weight[c]);
    return V(p.weight[c]) * fma(load(probability + c * p.target_layout.class_stride + i, lanes),
                                V(1 - p.smoothing()), V(p.uniform()));
  };
  if constexpr (!kept) {
    std::copy(p.lse + row, p.lse + row + n, b.lse);
    if constexpr (kind == Kind::kProbability)
      for (int64_t i = 0; i < n; i += V::size) {
        const int64_t lanes = std::min(V::size, n - i);
        V total(T(0));
        for (int64_t c = 0; c < classes; ++c) total = total + mass_of(c, i, lanes);
        store(b.mass + i, total, lanes);
      }
  }
  set_coefficients<S, kind>(p, b, row, n, !kept);
  if constexpr (kept)
    for (int64_t i = 0; i < n; ++i) b.scale[i] /= b.sum[i];

  const auto value = [&](int64_t c, int64_t i, int64_t lanes) {
    V capped(T(0)), e(T(0));
    if constexpr (kept) {
      if (cap != 0) capped = load(s.capped + c * pitch + i, lanes);
      e = load(s.e + c * pitch + i, lanes);
    } else {
      capped = load(x + c * p.layout.class_stride + i, lanes);
      if (cap != 0) capped = softcap(capped, cap);
      e = exp(capped - load(b.lse + i, lanes));
    }
    V v = e * load(b.scale + i, lanes);
    if constexpr (kind != Kind::kIndex) v = v - load(b.spread + i, lanes) * mass_of(c, i, lanes);
    const V u = capped * inverse_cap;
    return cap != 0 ? v * (V(T(1)) - u * u) : v;
  };
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t i = 0; i < n; i += V::size) {
      const int64_t lanes = std::min(V::size, n - i);
      store(gradient + c * stride + i, value(c, i, lanes), lanes);
    }
  if constexpr (kind != Kind::kProbability)
    for (int64_t i = 0; i < n; ++i) {
      if (p.is_ignored(row + i)) continue;
      const int64_t y = p.target[row + i];
      T capped = T(0), e;
      if constexpr (kept) {
        if (cap != 0) capped = s.capped[y * pitch + i];
        e = s.e[y * pitch + i];
      } else {
        T t = widen(x[y * p.layout.class_stride + i]);
        if (cap != 0) t = sum(first(1, softcap(V(t), cap), V(T(0))));
        capped = t;
        e = std::exp(t - b.lse[i]);
      }
      write_target<S, kind>(p, gradient + y * stride + i, e, capped, y, b.scale[i], b.spread[i], b.hit[i]);
    }
}

// -------------------------------------------------------------------------------------------------- host entries

std::optional<Layout> layout_of(const Tensor& x) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  Layout l;
  if (size.size() == 1) {
    l.classes = size[0];
    l.class_stride = stride[0];
    return l;
  }
  l.outer = size[0];
  l.outer_stride = stride[0];
  l.classes = size[1];
  l.class_stride = stride[1];
  // The dimensions after the classes as one: each stride is the next one's times its size.
  for (size_t d = size.size(); d-- > 2;) {
    if (size[d] == 1) continue;
    if (l.inner == 1)
      l.inner_stride = stride[d];
    else if (stride[d] != l.inner_stride * l.inner)
      return std::nullopt;
    l.inner *= size[d];
  }
  if (l.inner == 1 && !l.is_rows()) {  // a transposed matrix: its rows are neighbours
    std::swap(l.outer, l.inner);
    std::swap(l.outer_stride, l.inner_stride);
  }
  return l;
}

bool same_kind(const std::optional<Layout>& a, const std::optional<Layout>& b) {
  return a && b && a->inner == b->inner && ((a->is_rows() && b->is_rows()) || (a->is_columns() && b->is_columns()));
}

// Memory that is fresh from the system costs a fault for every page: ask for large ones before the first touch.
void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  static const bool off = getenv("NOTHP"); if (!off && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

std::vector<int64_t> row_shape(const Tensor& input) {
  const auto size = input.sizes();
  std::vector<int64_t> shape(size.begin(), size.end());
  shape.erase(shape.begin() + (shape.size() > 1 ? 1 : 0));
  return shape;
}

struct Target {
  Tensor tensor;
  bool is_probability;
};

// Checks every argument; the tensors come back in a form the loops take.
Target check_arguments(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                       const Options& options) {
  check_cpu(kOp, "input", input);
  check_cpu(kOp, "target", target);
  const ScalarType dtype = input.scalar_type();
  DLK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                dtype == ScalarType::Half,
            kOp, ": expected input of dtype float32, float64, bfloat16 or float16, got ",
            torch::headeronly::toString(dtype));
  DLK_CHECK(input.dim() >= 1, kOp, ": expected input with at least 1 dimension, got a scalar");
  const int64_t classes = input.size(input.dim() > 1 ? 1 : 0);
  DLK_CHECK(classes >= 1, kOp, ": expected at least one class, got input of shape ", shape_string(input.sizes()));
  DLK_CHECK(options.reduction >= kNone && options.reduction <= kSum, kOp, ": expected reduction 0, 1 or 2, got ",
            options.reduction);
  DLK_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, kOp,
            ": expected label_smoothing between 0 and 1, got ", options.label_smoothing);
  DLK_CHECK(options.softcap >= 0, kOp, ": expected softcap of at least 0, got ", options.softcap);
  if (weight) {
    check_cpu(kOp, "weight", *weight);
    check_dtype(kOp, "weight", *weight, dtype);
    check_shape(kOp, "weight", *weight, std::vector<int64_t>{classes});
  }
  if (target.scalar_type() == dtype) {
    check_shape(kOp, "target", target, input.sizes());
    return {target, true};
  }
  DLK_CHECK(target.scalar_type() == ScalarType::Long || target.scalar_type() == ScalarType::Byte, kOp,
            ": expected target of dtype int64 or uint8, or of the input's dtype, got ",
            torch::headeronly::toString(target.scalar_type()));
  check_shape(kOp, "target", target, row_shape(input));
  return {torch::stable::contiguous(torch::stable::to(target, ScalarType::Long)), false};
}

// Σ w_y over the rows that count, or their number. Every target is in range when this returns.
template <typename S>
double total_weight(const Problem<S>& p) {
  if (!p.target) return double(p.rows);
  constexpr int64_t kUnit = 1 << 15;
  const int64_t units = (p.rows + kUnit - 1) / kUnit;
  std::vector<double> partial(units, 0.0);
  std::vector<int64_t> outside(units, -1);
  torch::stable::parallel_for(0, units, 2, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u)
      for (int64_t r = u * kUnit; r < std::min(p.rows, (u + 1) * kUnit); ++r) {
        const int64_t y = p.target[r];
        if (y == p.options.ignore_index) continue;
        if (y < 0 || y >= p.layout.classes) {
          outside[u] = r;
          break;
        }
        partial[u] += double(p.weight[y]);
      }
  });
  double total = 0;
  for (int64_t u = 0; u < units; ++u) {
    DLK_CHECK_INDEX(outside[u] < 0, "Target ", p.target[outside[u]], " is out of bounds.");
    total += partial[u];
  }
  return total;
}

template <typename S>
void set_problem(Problem<S>& p, const Tensor& input, const Target& target, const std::optional<Tensor>& weight) {
  using T = accumulate_t<S>;
  p.input = static_cast<const S*>(input.const_data_ptr());
  p.rows = p.layout.outer * p.layout.inner;
  if (target.is_probability)
    p.probability = static_cast<const S*>(target.tensor.const_data_ptr());
  else
    p.target = static_cast<const int64_t*>(target.tensor.const_data_ptr());
  p.weight.assign(p.layout.classes, T(1));
  if (weight) {
    const Tensor w = torch::stable::contiguous(*weight);
    const S* data = static_cast<const S*>(w.const_data_ptr());
    std::transform(data, data + p.layout.classes, p.weight.begin(), [](S value) { return widen(value); });
  }
  double total = 0;
  for (const T w : p.weight) total += double(w);
  p.total_class_weight = T(total);
}

// Calls body(unit, row, n, scratch) for every block of rows.
template <typename S, typename Body>
void for_blocks(const Problem<S>& p, bool keep, const Body& body) {
  using T = accumulate_t<S>;
  const int64_t classes = p.layout.classes, inner = p.layout.inner;
  const bool rows = p.layout.is_rows();
  const int64_t block = rows ? rows_per_block(classes) : columns_per_block(classes, inner, sizeof(T));
  const int64_t per_outer = rows ? 0 : (inner + block - 1) / block;
  const int64_t units = rows ? (p.rows + block - 1) / block : p.layout.outer * per_outer;
  const int64_t whole = ((rows ? block : columns_pitch(p)) * classes + 15) / 16 * 16;
  const int64_t shifts = std::max(block, (classes + kChunk - 1) / kChunk);
  const int64_t e = keep || !rows ? whole : kChunk, capped = keep && p.options.softcap != 0 ? whole : 0;
  const int64_t per_thread = (e + capped + kChunk + shifts + 15) / 16 * 16;
  // Allocated here: an exception inside the region would lose its text. A region never has more callers than this.
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  struct Free {
    void operator()(T* data) const { ::operator delete[](data, std::align_val_t(64)); }
  };
  const std::unique_ptr<T[], Free> memory(new (std::align_val_t(64)) T[threads * per_thread]);
  std::atomic<int64_t> callers{0};
  const int64_t grain = std::max<int64_t>(1, kGrain / (block * classes));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    T* const base = memory.get() + callers.fetch_add(1) * per_thread;
    const Scratch<T> scratch{base, base + e, base + e + capped, base + e + capped + kChunk};
    Block<T> state;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = rows ? u * block : u / per_outer * inner + u % per_outer * block;
      const int64_t n = rows ? std::min(block, p.rows - row) : std::min(block, inner - u % per_outer * block);
      body(u, row, n, scratch, state);
    }
  });
}

template <typename S, Kind kind, bool keep>
double run_forward(const Problem<S>& p) {
  using T = accumulate_t<S>;
  std::vector<double> partial(size_t(p.rows), 0.0);  // a block has at least one row
  for_blocks(p, keep, [&](int64_t unit, int64_t row, int64_t n, const Scratch<T>& scratch, Block<T>& state) {
    if (p.layout.is_rows()) {
      partial[unit] = forward_rows<S, kind, keep>(p, state, row, n, scratch);
    } else {
      partial[unit] = forward_columns<S, kind, keep>(p, state, row, n, scratch);
      if constexpr (keep) write_columns<S, kind, true>(p, state, row, n, scratch);
    }
  });
  double total = 0;
  for (const double value : partial) total += value;
  return total;
}

template <typename S, Kind kind>
void run_backward(const Problem<S>& p) {
  using T = accumulate_t<S>;
  for_blocks(p, false, [&](int64_t, int64_t row, int64_t n, const Scratch<T>& scratch, Block<T>& state) {
    if (p.layout.is_rows())
      backward_rows<S, kind>(p, state, row, n, scratch);
    else
      write_columns<S, kind, false>(p, state, row, n, scratch);
  });
}

// The inputs in a layout that the loops take, and a gradient laid out like the input: written directly, or, where
// the input's own layout is neither rows nor columns, into a contiguous one that is copied at the end.
struct Prepared {
  Tensor input;
  Target target;
  Layout layout, target_layout, gradient_layout;
  std::optional<Tensor> gradient, written;

  Prepared(const Tensor& input_, const Target& target_, bool with_gradient) : input(input_), target(target_) {
    if (with_gradient) written = gradient = torch::stable::empty_like(input);
    auto x = layout_of(input);
    auto t = target.is_probability ? layout_of(target.tensor) : x;
    auto g = with_gradient ? layout_of(*gradient) : x;
    if (!same_kind(x, x) || !same_kind(x, t) || !same_kind(x, g)) {
      input = torch::stable::contiguous(input);
      if (target.is_probability) target.tensor = torch::stable::contiguous(target.tensor);
      if (with_gradient && !gradient->is_contiguous()) written = torch::stable::empty_like(input);
      x = t = g = layout_of(input);
    }
    layout = *x;
    target_layout = *t;
    gradient_layout = *g;
    if (with_gradient) advise_huge_pages(written->mutable_data_ptr(), written->numel() * written->element_size());
  }

  Tensor result() {
    if (written->get() != gradient->get()) torch::stable::copy_(*gradient, *written);
    return *gradient;
  }
};

template <typename S>
Problem<S> problem_of(const Prepared& prepared, const std::optional<Tensor>& weight, const Options& options) {
  Problem<S> p;
  p.options = options;
  p.layout = prepared.layout;
  p.target_layout = prepared.target_layout;
  p.gradient_layout = prepared.gradient_layout;
  set_problem(p, prepared.input, prepared.target, weight);
  return p;
}

template <typename Body>
void for_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(bf16{});
    default: return body(f16{});
  }
}

template <typename Body>
void for_kind(bool is_probability, double label_smoothing, const Body& body) {
  if (is_probability) return body(std::integral_constant<Kind, Kind::kProbability>{});
  if (label_smoothing > 0) return body(std::integral_constant<Kind, Kind::kSmooth>{});
  return body(std::integral_constant<Kind, Kind::kIndex>{});
}

ScalarType statistics_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> forward(const Tensor& input, const Tensor& target,
                                                                  const std::optional<Tensor>& weight,
                                                                  const Options& options, bool keep) {
  const Target checked = check_arguments(input, target, weight, options);
  DLK_CHECK(!keep || options.reduction != kNone, kOp,
            ": a gradient in the forward pass needs reduction \"mean\" or \"sum\"");
  const std::vector<int64_t> shape = row_shape(input), scalar;
  const Tensor lse = torch::stable::new_empty(input, shape, statistics_dtype(input));
  const Tensor total = torch::stable::new_empty(input, scalar, statistics_dtype(input));
  const Tensor loss = torch::stable::new_empty(input, options.reduction == kNone ? shape : scalar);
  std::optional<Prepared> prepared;
  for_dtype(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    Problem<S> p;
    {
      // Targets are checked before the gradient is allocated.
      const Prepared plain(input, checked, false);
      p = problem_of<S>(plain, weight, options);
      const double weight_sum = total_weight(p);
      prepared.emplace(input, checked, keep);
      p = problem_of<S>(*prepared, weight, options);
      *static_cast<T*>(total.mutable_data_ptr()) = T(weight_sum);
      p.row_factor = options.reduction == kMean ? T(1.0 / weight_sum) : T(1);
    }
    p.lse = static_cast<T*>(lse.mutable_data_ptr());
    p.loss = static_cast<S*>(loss.mutable_data_ptr());
    if (keep) p.gradient = static_cast<S*>(prepared->written->mutable_data_ptr());
    double sum = 0;
    for_kind(checked.is_probability, options.label_smoothing, [&](auto kind) {
      sum = keep ? run_forward<S, kind.value, true>(p) : run_forward<S, kind.value, false>(p);
    });
    if (options.reduction == kMean) sum /= double(*static_cast<const T*>(total.const_data_ptr()));
    if (options.reduction != kNone) *p.loss = narrow<S>(T(sum));
  });
  return {loss, lse, total, keep ? std::optional<Tensor>(prepared->result()) : std::nullopt};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                                         int64_t reduction, int64_t ignore_index,
                                                         double label_smoothing, double softcap, double z_loss) {
  const auto [loss, lse, total, gradient] =
      forward(input, target, weight, {reduction, ignore_index, label_smoothing, softcap, z_loss}, false);
  return {loss, lse, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_backward(Tensor input, Tensor target,
                                                                          std::optional<Tensor> weight,
                                                                          int64_t reduction, int64_t ignore_index,
                                                                          double label_smoothing, double softcap,
                                                                          double z_loss) {
  const auto [loss, lse, total, gradient] =
      forward(input, target, weight, {reduction, ignore_index, label_smoothing, softcap, z_loss}, true);
  return {loss, lse, total, *gradient};
}

Tensor cross_entropy_backward(Tensor grad_loss, std::optional<Tensor> grad_lse, Tensor input, Tensor target,
                              std::optional<Tensor> weight, Tensor lse, Tensor total_weight, int64_t reduction,
                              int64_t ignore_index, double label_smoothing, double softcap, double z_loss) {
  const Options options{reduction, ignore_index, label_smoothing, softcap, z_loss};
  const Target checked = check_arguments(input, target, weight, options);
  const std::vector<int64_t> shape = row_shape(input), scalar;
  check_dtype(kOp, "grad_loss", grad_loss, input.scalar_type());
  check_shape(kOp, "grad_loss", grad_loss, reduction == kNone ? shape : scalar);
  check_dtype(kOp, "lse", lse, statistics_dtype(input));
  check_shape(kOp, "lse", lse, shape);
  check_dtype(kOp, "total_weight", total_weight, statistics_dtype(input));
  check_shape(kOp, "total_weight", total_weight, scalar);
  grad_loss = torch::stable::contiguous(grad_loss);
  lse = torch::stable::contiguous(lse);
  if (grad_lse) {
    check_dtype(kOp, "grad_lse", *grad_lse, statistics_dtype(input));
    check_shape(kOp, "grad_lse", *grad_lse, shape);
    grad_lse = torch::stable::contiguous(*grad_lse);
  }
  std::optional<Prepared> prepared;
  for_dtype(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    dlkernels::total_weight(problem_of<S>(Prepared(input, checked, false), weight, options));
    prepared.emplace(input, checked, true);
    Problem<S> p = problem_of<S>(*prepared, weight, options);
    p.lse = const_cast<T*>(static_cast<const T*>(lse.const_data_ptr()));
    p.grad_loss = static_cast<const S*>(grad_loss.const_data_ptr());
    if (grad_lse) p.grad_lse = static_cast<const T*>(grad_lse->const_data_ptr());
    if (reduction == kMean) p.row_factor = T(1) / *static_cast<const T*>(total_weight.const_data_ptr());
    p.gradient = static_cast<S*>(prepared->written->mutable_data_ptr());
    for_kind(checked.is_probability, label_smoothing, [&](auto kind) { run_backward<S, kind.value>(p); });
  });
  return prepared->result();
}

// gradient *= grad_loss, for a gradient made in the forward pass; nothing is touched where grad_loss is 1.
void cross_entropy_scale_(Tensor gradient, Tensor grad_loss) {
  check_cpu(kOp, "gradient", gradient);
  check_dtype(kOp, "grad_loss", grad_loss, gradient.scalar_type());
  check_shape(kOp, "grad_loss", grad_loss, std::vector<int64_t>{});
  const auto size = gradient.sizes(), stride = gradient.strides();
  int64_t extent = 1;
  for (size_t d = 0; d < size.size(); ++d) extent += (size[d] - 1) * stride[d];
  const int64_t n = gradient.numel();
  if (n == 0) return;
  DLK_CHECK(extent == n, kOp, ": expected a dense gradient, got strides ", shape_string(stride));
  for_dtype(gradient.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const T factor = widen(*static_cast<const S*>(grad_loss.const_data_ptr()));
    if (factor == T(1)) return;
    S* data = static_cast<S*>(gradient.mutable_data_ptr());
    const int64_t vectors = (n + V::size - 1) / V::size;
    torch::stable::parallel_for(0, vectors, kGrain / V::size, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        const int64_t i = v * V::size, lanes = std::min(V::size, n - i);
        store(data + i, load(data + i, lanes) * V(factor), lanes);
      }
    });
  });
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&dlkernels::cross_entropy_forward));
  m.impl("cross_entropy_forward", TORCH_BOX(&dlkernels::cross_entropy_forward));
  m.impl("cross_entropy_forward_backward", TORCH_BOX(&dlkernels::cross_entropy_forward_backward));
  m.impl("cross_entropy_backward", TORCH_BOX(&dlkernels::cross_entropy_backward));
  m.impl("cross_entropy_scale_", TORCH_BOX(&dlkernels::cross_entropy_scale_));
}

// Cross-entropy of blocks of rows with lanes running over classes, which are contiguous. A long row
// is read in chunks that stay in L1; rows of one chunk go through a pipeline of three blocks.
#pragma once

#include "cross_entropy.h"

namespace dlkernels::cross_entropy {

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

template <typename S>
accumulate_t<S> max_of(const S* x, int64_t n) {
  using T = accumulate_t<S>;
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
// at a time, so that the error of a sum grows with the root of their number. `beside(c, lanes)` is
// called for each vector: memory's work, to be done under the arithmetic of exp.
template <typename S, Kind kind, bool keep, typename X, typename Beside>
void accumulate_chunk(const Problem<S>& p, const X* x, const S* probability, int64_t class0,
                      int64_t n, accumulate_t<S> m, accumulate_t<S>* e, accumulate_t<S>& total,
                      accumulate_t<S>& total_mass, accumulate_t<S>& moment, const Beside& beside) {
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
  const auto whole = [&](int64_t c) {
    beside(c, V::size);
    const V t = load(x + c) - shift;
    step(c, t, exp(t), V::size);
  };
  int64_t c = 0;
  for (; c + kFlush * V::size <= n; flush())
    for (int64_t k = 0; k < kFlush; ++k, c += V::size) whole(c);
  for (; c + V::size <= n; c += V::size) whole(c);
  if (const int64_t lanes = n - c; lanes > 0) {
    beside(c, lanes);
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

// The gradient (e·scale − spread·s_c)·(1 − (x'/cap)²) of a row, a vector at a time.
template <typename S, Kind kind>
struct RowGradient {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const Problem<S>& p;
  const S* probability;
  V scale, minus_spread;

  RowGradient(const Problem<S>& p, const S* probability, T scale, T spread)
      : p(p), probability(probability), scale(scale), minus_spread(-spread) {}
  V operator()(V e, int64_t c, int64_t lanes) const {
    V v = e * scale;
    if constexpr (kind != Kind::kIndex)
      v = fma(minus_spread, mass<S, kind>(p, probability, c, lanes), v);
    return v;
  }
  V operator()(V e, V u, int64_t c, int64_t lanes) const {
    return (*this)(e, c, lanes) * (V(T(1)) - u * u);
  }
};

// Writes n classes from class0 on; e_of(c, lanes) gives their e.
template <typename S, Kind kind, typename E>
void write_chunk(const RowGradient<S, kind>& of, S* gradient, const E& e_of,
                 const accumulate_t<S>* squashed, int64_t class0, int64_t n) {
  using V = Vec<accumulate_t<S>>;
  const auto value = [&](int64_t c, int64_t lanes) {
    const V e = e_of(c, lanes);
    if (squashed) return of(e, load(squashed + c, lanes), class0 + c, lanes);
    return of(e, class0 + c, lanes);
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
    accumulate_chunk<S, kind, keep>(
        p, values, probability, c0, n, shift, keep ? s.e + c0 : nullptr, total, total_mass, moment,
        [&](int64_t c, int64_t) { __builtin_prefetch(x + c0 + kChunk + c); });
    if (keep) s.shift[c0 / kChunk] = shift;
    if (y >= c0 && y < c0 + n) b.target_logit[i] = values[y - c0];
  }
  b.max[i] = m;
  b.sum[i] = total;
  b.mass[i] = total_mass;
  b.moment[i] = moment;
}

template <typename T>
auto kept(const T* e) {
  return [e](int64_t c, int64_t lanes) { return load(e + c, lanes); };
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
    write_chunk<S, kind>({p, probability, scale, b.spread[i]}, gradient + c0, kept(s.e + c0),
                         has_cap ? s.squashed + c0 : nullptr, c0, n);
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

// ---------------------------------------------------------------- rows of one chunk, in a pipeline

inline bool is_pipelined(int64_t classes, double softcap) {
  return classes <= kChunk && softcap == 0;
}

// One row under exp, with row i of the block before being written and the maximum of row i of the
// block after being read: three streams of memory under one of arithmetic.
template <typename S, Kind kind, bool keep, bool write>
void sweep_row(const Problem<S>& p, Block<accumulate_t<S>>& b, int64_t i, int64_t row,
               accumulate_t<S>* e, const S* next, accumulate_t<S>& next_max,
               const RowGradient<S, kind>& of, const accumulate_t<S>* e_before, S* gradient) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const V lowest(-std::numeric_limits<T>::infinity());
  const S* x = p.input + offset_of(p.layout, row);
  const S* probability =
      kind == Kind::kProbability ? p.probability + offset_of(p.target_layout, row) : nullptr;
  V m = lowest;
  T total = 0, total_mass = 0, moment = 0;
  const T shift = b.max[i] > -std::numeric_limits<T>::infinity() ? b.max[i] : T(0);
  accumulate_chunk<S, kind, keep>(
      p, x, probability, 0, p.layout.classes, shift, e, total, total_mass, moment,
      [&](int64_t c, int64_t lanes) {
        __builtin_prefetch(next + c + kAhead);
        if constexpr (write) {
          __builtin_prefetch(gradient + c + kAhead, 1);
          store(gradient + c, of(load(e_before + c, lanes), c, lanes), lanes);
        }
        const V value = load(next + c, lanes);
        m = max(lanes == V::size ? value : first(lanes, value, lowest), m);
      });
  next_max = max_element(m);
  b.sum[i] = total;
  b.mass[i] = total_mass;
  b.moment[i] = moment;
  const bool has_target = kind != Kind::kProbability && b.counts[i] != 0;
  b.target_logit[i] = has_target ? widen(x[p.target[row]]) : T(0);
}

// Blocks [begin, end) of rows: losses of blocks into `partial`, log-sum-exp and, with `keep`, the
// gradient.
template <typename S, Kind kind, bool keep>
void forward_pipelined(const Problem<S>& p, int64_t begin, int64_t end,
                       const Scratch<accumulate_t<S>>& s, double* partial) {
  using T = accumulate_t<S>;
  const int64_t classes = p.layout.classes, per_block = rows_per_block(classes);
  const auto rows_of = [&](int64_t u) { return std::min(per_block, p.rows - u * per_block); };
  const auto e_of = [&](int64_t u, int64_t i) {
    return keep ? s.e + (u % 2 * per_block + i) * classes : nullptr;
  };
  const auto probability_of = [&](int64_t row) {
    return kind == Kind::kProbability ? p.probability + offset_of(p.target_layout, row) : nullptr;
  };
  Block<T> blocks[3];
  const auto block = [&](int64_t u) -> Block<T>& { return blocks[u % 3]; };
  const auto finish_write = [&](int64_t u, int64_t i) {
    const int64_t row = u * per_block + i;
    if (kind != Kind::kProbability && block(u).counts[i] != 0)
      write_target(p, p.gradient + offset_of(p.gradient_layout, row) + p.target[row],
                   e_of(u, i)[p.target[row]], T(0), block(u).scale[i], block(u).hit[i]);
  };
  const auto write = [&](int64_t u, int64_t i) {
    const int64_t row = u * per_block + i;
    const RowGradient<S, kind> of(p, probability_of(row), block(u).scale[i], block(u).spread[i]);
    write_chunk(of, p.gradient + offset_of(p.gradient_layout, row), kept<T>(e_of(u, i)),
                static_cast<const T*>(nullptr), 0, classes);
    finish_write(u, i);
  };
  for (int64_t i = 0; i < rows_of(begin); ++i)
    block(begin).max[i] = max_of(p.input + offset_of(p.layout, begin * per_block + i), classes);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t row = u * per_block, n = rows_of(u);
    Block<T>& b = block(u);
    load_targets<S, kind>(p, b, row, n);
    for (int64_t i = 0; i < n; ++i) {
      // Past the last block its own rows are read once more, into a maximum that nobody reads.
      const int64_t next = u + 1 < end && i < rows_of(u + 1) ? row + per_block + i : row + i;
      const S* x_next = p.input + offset_of(p.layout, next);
      T& next_max = block(u + 1).max[i];
      if (keep && u > begin) {
        const int64_t before = row - per_block + i;
        const RowGradient<S, kind> of(p, probability_of(before), block(u - 1).scale[i],
                                      block(u - 1).spread[i]);
        sweep_row<S, kind, keep, true>(p, b, i, row + i, e_of(u, i), x_next, next_max, of,
                                       e_of(u - 1, i),
                                       p.gradient + offset_of(p.gradient_layout, before));
        finish_write(u - 1, i);
      } else {
        sweep_row<S, kind, keep, false>(p, b, i, row + i, e_of(u, i), x_next, next_max,
                                        {p, nullptr, T(0), T(0)}, nullptr, nullptr);
      }
    }
    if (keep && u > begin)
      for (int64_t i = n; i < per_block; ++i) write(u - 1, i);
    partial[u] = finish_rows<S, kind>(p, b, row, n);
    if (keep) set_coefficients<S, kind>(p, b, row, n, true);
  }
  if (keep)
    for (int64_t i = 0; i < rows_of(end - 1); ++i) write(end - 1, i);
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
      const RowGradient<S, kind> of(p, probability, b.scale[i], b.spread[i]);
      const auto e_of = [&](auto* values) {
        return [=](int64_t c, int64_t lanes) { return exp((load(values + c, lanes) - lse) - low); };
      };
      if (cap == 0) {
        write_chunk(of, gradient + c0, e_of(x + c0), static_cast<const T*>(nullptr), c0, m);
      } else {
        stage(x + c0, m, cap, s.buffer, s.squashed);
        write_chunk(of, gradient + c0, e_of(s.buffer), s.squashed, c0, m);
      }
      if (y >= c0 && y < c0 + m) {
        const T value = cap == 0 ? widen(x[y]) : s.buffer[y - c0];
        const T e = first_element(exp((V(value) - lse) - low));
        write_target(p, gradient + y, e, cap == 0 ? T(0) : s.squashed[y - c0], b.scale[i],
                     b.hit[i]);
      }
    }
  }
}

}  // namespace dlkernels::cross_entropy

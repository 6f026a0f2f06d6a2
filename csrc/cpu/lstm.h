// The loops of LSTM, GRU and RNN layers: see ops/lstm.py.
//
// Forward. Hidden units go in groups of one or two vectors; the weights of a group, all gates, are
// packed once, in panels of kColumns. For each chunk of steps one product gives x·W_ihᵀ; then, step
// by step, h·W_hhᵀ is summed on top of it, and the gates follow while the sums are in L1. h lies in
// the pieces that gemm::multiply_pieces reads. Of one step, and so of a cell, whose weights nobody
// reads twice, x and h are packed instead, and the weights' rows are those of A: the sums are
// turned when they are done. A few rows of x and h are multiplied by the weights as they lie.
// Backward. For each step the product of the following step's gradient of the gates with W_hh gives
// that of h, unit by unit, and with it the gates', which stay in pieces for a chunk of steps. What
// does not depend on the order of steps, the gradients of input and weights, is for large products
// of such a chunk; the weights of a loop of cells have theirs of many steps at once, from rows that
// each step has left.
//
// Threads: the two directions on two halves; of a direction, parts of the batch, which know nothing
// of each other, or groups of units, which meet after each step. Every sum is of one thread and in
// an order of its own: the same bits for any number of threads.
//
// The gradients of the gates are i f g o; of a GRU r z, r·n's part of the hidden state, and n: the
// first three meet W_hh. Of one step rows of them are kept beside the pieces, for a GRU in the
// order n r z r·n, so that those which meet W_ih are neighbours too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "simd.h"
#include "team.h"

namespace dlkernels::lstm {

enum class Mode { kLstm, kGru, kTanh, kRelu };

struct Shape {
  Mode mode;
  int64_t steps, batch, inputs, hidden, state, directions;  // state is hidden, or projected to
  bool projected;
  const int64_t* sizes;          // rows of each step, of a packed sequence; or null
  std::vector<int64_t> offsets;  // of its steps, and their end

  int64_t gates() const { return mode == Mode::kLstm ? 4 : mode == Mode::kGru ? 3 : 1; }
  // Numbers kept for each hidden unit, and those of its gradient.
  int64_t kept() const { return mode == Mode::kLstm || mode == Mode::kGru ? 4 : 0; }
  int64_t width() const { return kept() ? kept() : 1; }
  int64_t rows() const { return sizes ? offsets.back() : steps * batch; }
  int64_t active(int64_t t) const { return t < 0 || t >= steps ? 0 : sizes ? sizes[t] : batch; }
  int64_t offset(int64_t t) const { return sizes ? offsets[size_t(t)] : t * batch; }
  // Where what is kept of a row of step t and of the vector of units from `unit` on begins, of n
  // numbers a unit, which are `kept_step` apart: vector after vector the rows of a step, so that
  // the backward pass reads on and on; of a cell, whose states are tensors of the caller's, rows.
  int64_t kept_at(int64_t d, int64_t t, int64_t row, int64_t unit, int64_t lanes, int64_t n) const {
    const int64_t first = (d * rows() + offset(t)) * hidden;
    if (steps == 1) return (first + row * hidden) * n + unit;
    return (first + unit * active(t) + row * lanes) * n;
  }
  int64_t kept_step(int64_t lanes) const { return steps == 1 ? hidden : lanes; }
  // Row b's state before step t, as a row of all steps'; or −1, its first.
  int64_t before(int64_t d, int64_t t, int64_t b) const {
    const int64_t from = d == 0 ? t - 1 : t + 1;
    return b < active(from) ? offset(from) + b : -1;
  }
};

// Of a direction, contiguous; biases and `hr` may be null.
template <typename S>
struct Weights {
  const S *ih, *hh, *b_ih, *b_hh, *hr;
};

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// n elements or a few more: an odd number of cache lines, so that rows so long do not all meet in
// the same few places of a cache.
template <typename S>
int64_t odd_lines(int64_t n) {
  return (parts(n * int64_t(sizeof(S)), 64) | 1) * 64 / int64_t(sizeof(S));
}

// Arrays one after another from `from` on, each in lines of its own and a line from the next; null:
// only how much they use.
template <typename T>
struct Layout {
  T* from;
  int64_t used = 0;

  T* take(int64_t n) {
    T* const at = from ? from + used : nullptr;
    used += Aligned<T>::padded(n) + 64 / int64_t(sizeof(T));
    return at;
  }
};

// -------------------------------------------------------------------------------------- operands

// rows × units as multiply_pieces reads them; an odd number of rows, as of odd_lines.
template <typename S>
struct Pieces {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  static constexpr bool kPair = gemm::Word<S>::kPair;
  static constexpr int64_t kUnits = V::size * (kPair ? 2 : 1);
  using Stored = std::conditional_t<kPair, S, T>;
  T* data;
  int64_t rows;

  static int64_t size(int64_t units, int64_t rows) { return parts(units, kUnits) * rows * V::size; }
  Stored* at(int64_t row, int64_t unit) const {
    return reinterpret_cast<Stored*>(data) + (unit / kUnits * rows + row) * kUnits + unit % kUnits;
  }
  // The rows from `row` on.
  Pieces from(int64_t row) const { return {data + row * V::size, rows}; }
  // Rounded to S.
  void put(int64_t row, int64_t unit, V value, int64_t lanes) const {
    if constexpr (!std::is_same_v<S, Stored>) {
      S rounded[V::size];
      store(rounded, value);
      value = load(rounded);
    }
    store(at(row, unit), value, lanes);
  }
  V get(int64_t row, int64_t unit, int64_t lanes) const { return load(at(row, unit), lanes); }
  void clear(int64_t row0, int64_t row1, int64_t unit) const {
    std::fill_n(reinterpret_cast<T*>(at(row0, unit)), (row1 - row0) * V::size, T(0));
  }
  // C[m × kColumns] (+)= rows [row, row + m) and units [unit, unit + k), a whole number of pieces
  // or the last, by the panel b; without the second vector of columns where there is none.
  void multiply(int64_t row, int64_t m, int64_t unit, int64_t k, const T* b, bool add, T* c,
                bool second = true) const {
    // As in gemm's own: a sum that is short as a whole costs little more in shorter pieces.
    if (gemm::words<S>(k) <= gemm::kFlush)
      multiply_with<gemm::kFlush / 4, gemm::kVectors>(row, m, unit, k, b, add, c);
    else if (second)
      multiply_with<gemm::kFlush, gemm::kVectors>(row, m, unit, k, b, add, c);
    else
      multiply_with<gemm::kFlush, 1>(row, m, unit, k, b, add, c);
  }
  template <int words_at_once, int vectors>
  void multiply_with(int64_t row, int64_t m, int64_t unit, int64_t k, const T* b, bool add,
                     T* c) const {
    const int64_t words = gemm::words<S>(k), pieces = parts(words, V::size);
    gemm::multiply_pieces<kPair, words_at_once, vectors>(
        reinterpret_cast<const T*>(at(row, unit)), rows * V::size, pieces,
        words - (pieces - 1) * V::size, b, m, add, c);
  }
};

// How the rows of a weight, gates × units, make strips of a vector of columns, two a panel. A group
// has all gates of its units: of an LSTM i f | g o of one vector, of a GRU r r' | z z' | n n' of
// two, of an RNN two vectors.
template <typename T>
struct Groups {
  Mode mode;
  int64_t hidden;

  static constexpr int64_t kLanes = Vec<T>::size;
  int64_t vectors() const { return mode == Mode::kLstm ? 1 : 2; }
  int64_t units() const { return vectors() * kLanes; }
  int64_t panels() const { return mode == Mode::kLstm ? 2 : mode == Mode::kGru ? 3 : 1; }
  int64_t count() const { return parts(hidden, units()); }
  int64_t all_panels() const { return count() * panels(); }
  // Strip `s` of group `group`: its first row of the weight, and how many there are.
  int64_t row(int64_t group, int64_t s, int64_t& lanes) const {
    const int64_t gate = s / vectors(), unit = group * units() + s % vectors() * kLanes;
    lanes = std::clamp<int64_t>(hidden - unit, 0, kLanes);
    return gate * hidden + unit;
  }
};

// Panel `panel` of the weight w (gates · hidden × k), transposed.
template <typename S, typename T>
void pack_gates(const S* w, int64_t k, const Groups<T>& groups, int64_t panel, T* to) {
  const gemm::Matrix<S> columns{w, 1, k};
  for (int64_t v = 0; v < gemm::kVectors; ++v) {
    int64_t lanes;
    const int64_t group = panel / groups.panels(), s = panel % groups.panels() * gemm::kVectors + v;
    const int64_t row = groups.row(group, s, lanes);
    gemm::pack_columns(columns, 0, gemm::words<S>(k), k, row, lanes, to + v * Vec<T>::size);
  }
}

// Columns [j, j + kColumns) of b[k×n].
template <typename S, typename T>
void pack_panel(const gemm::Matrix<S>& b, int64_t k, int64_t j, int64_t n, T* to) {
  using V = Vec<T>;
  for (int64_t v = 0; v < gemm::kColumns<T>; v += V::size)
    gemm::pack_columns(b, 0, gemm::words<S>(k), k, j + v,
                       std::clamp<int64_t>(n - j - v, 0, V::size), to + v);
}

// x and h side by side, x's columns filled up to whole vectors.
template <typename S>
struct Beside {
  using Element = S;
  gemm::Rows<S> x, h;
  int64_t inputs, state;

  static constexpr int64_t kLanes = Vec<accumulate_t<S>>::size;
  int64_t first() const { return gemm::round_up(inputs, kLanes); }
  int64_t columns() const { return first() + state; }
};

template <typename S, typename T>
void pack_b(const Beside<S>& b, int64_t p, int64_t depth, int64_t k, int64_t j, int64_t columns,
            T* to) {
  using V = Vec<T>;
  for (int64_t c = 0; c < columns; c += gemm::kColumns<T>)
    for (int64_t v = 0; v < gemm::kColumns<T>; v += V::size) {
      const int64_t at = j + c + v, from = at - b.first();
      T* const strip = to + c * depth + v;
      if (from < 0)
        gemm::pack_columns(b.x, p, depth, k, at, std::min(V::size, b.inputs - at), strip);
      else
        gemm::pack_columns(b.h, p, depth, k, from, std::clamp<int64_t>(b.state - from, 0, V::size),
                           strip);
    }
}

// --------------------------------------------------------------------------------------- threads

// What of a direction a thread has: rows [row0, row1) of the batch, part `part` of `parts` of the
// units; `first` is the first of those that share the rows with it.
struct Place {
  int64_t direction, directions;  // its first, how many
  int64_t first_of_all, all, me;
  int64_t row_part, row_parts, part, parts;
  int64_t first() const { return first_of_all + row_part * parts; }
  int64_t mine() const { return me - first_of_all; }
};

// [begin, end) of n things for part `part` of `parts`.
struct Share {
  int64_t begin, end;
  Share(int64_t begin, int64_t end) : begin(begin), end(end) {}
  Share(int64_t n, int64_t part, int64_t parts)
      : begin(n * part / parts), end(n * (part + 1) / parts) {}
};

struct Plan {
  int64_t threads, row_parts;  // of one direction
  bool apart;                  // directions on halves of the team

  int64_t members() const { return threads * (apart ? 2 : 1); }
  // Of member `me`.
  Place place(int64_t directions, int64_t me) const {
    const int64_t d = apart ? me / threads : 0, first = d * threads,
                  unit_parts = threads / row_parts;
    const int64_t rank = me - first;
    return {d,         apart ? 1 : directions, first,     threads, me, rank / unit_parts,
            row_parts, rank % unit_parts,      unit_parts};
  }
};

// Cycles of a step on `threads` of one direction, in parts of the batch. `bytes` of weights want to
// stay in the nearer cache; `groups` of units, each `work` multiply-adds of a vector for each row.
inline double step_cost(const Shape& s, int64_t groups, int64_t work, int64_t bytes,
                        int64_t threads, int64_t row_parts) {
  const int64_t rows = parts(s.batch, row_parts), unit_parts = threads / row_parts;
  double tiles = 0;
  for (int64_t r = 0, n = parts(rows, gemm::kRows); r < n; ++r)
    tiles += std::max<int64_t>(3, (rows * (r + 1) / n) - rows * r / n);
  double cost = tiles * double(parts(groups, unit_parts) * work);
  if (bytes / unit_parts > (768 << 10)) cost *= 1.1;
  return cost + (unit_parts > 1 ? 2000.0 * double(s.projected ? 2 : 1) : 0.0);
}

// For a team of `team`.
inline Plan make_plan(const Shape& s, int64_t groups, int64_t work, int64_t bytes, int64_t team) {
  Plan plan{1, 1, s.directions == 2 && team % 2 == 0};
  const int64_t most = plan.apart ? team / 2 : team;
  double best = step_cost(s, groups, work, bytes, 1, 1);
  for (int64_t n = 2; n <= most; ++n)
    for (int64_t r = 1; r <= std::min(n, s.batch); ++r) {
      if (n % r || n / r > groups) continue;
      const double cost = step_cost(s, groups, work, bytes, n, r) * 1.02;
      if (cost < best) best = cost, plan.threads = n, plan.row_parts = r;
    }
  return plan;
}

// The rows of part `part`, so that parts have the same number of rows in all steps.
inline Share rows_of(const Shape& s, int64_t part, int64_t row_parts) {
  Share share(s.batch, part, row_parts);
  if (!s.sizes || row_parts == 1) return share;
  const auto cut = [&](int64_t at) {
    const int64_t wanted = s.rows() * at / row_parts;
    int64_t sum = 0, row = 0;
    // Rows are as long as there are steps with more than `row` rows.
    for (int64_t t = s.steps; row < s.batch && sum < wanted; ++row) {
      while (t > 0 && s.sizes[t - 1] <= row) --t;
      sum += t;
    }
    return at == row_parts ? s.batch : row;
  };
  share.begin = cut(part), share.end = cut(part + 1);
  return share;
}

// --------------------------------------------------------------------------------------- forward

template <typename S>
struct Forward {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  static constexpr int64_t kL = V::size, kColumns = gemm::kColumns<T>;
  static constexpr int64_t kStepRows = 4 * gemm::kRows;  // rows whose sums are in L1

  const Shape& s;
  std::vector<Weights<S>> weights;
  const S* x;
  int64_t step_stride, row_stride;  // of x
  const S *hx, *cx;
  S *output, *h_n, *c_n, *gates;  // h_n: null of a cell; gates, cells: where nothing is saved
  T* cells;

  const Groups<T> groups{s.mode, s.hidden};
  const bool once = s.steps == 1 && s.inputs > 0, few = once && s.batch <= 2 * gemm::kFewRows;
  static constexpr int64_t kBatch = 4 * kColumns;  // rows of one step whose sums are in L2
  // Steps of a chunk.
  const int64_t chunk = std::clamp<int64_t>(256 / std::max<int64_t>(1, s.batch), 1, s.steps);

  // Scratch of one direction.
  struct Scratch {
    T *w_ih, *w_hh, *w_hr, *bias, *b_hn, *sums, *c, *x_once, *h_once;  // once: packed
    Pieces<S> h[2], full;
  };
  // Of a thread.
  struct Own {
    T *packed_a, *tile, *sums, *turned;  // sums: of a group in the only step, turned or not
    const S** rows;
    int64_t* starts;
  };

  int64_t depth_ih() const { return gemm::words<S>(s.inputs); }
  int64_t depth_hh() const { return gemm::words<S>(s.state); }
  // Of the only step, packed: each part of the batch has panels of its own.
  int64_t packed_rows() const {
    return s.batch + kColumns * std::max<int64_t>(1, torch::stable::get_num_threads());
  }
  static int64_t first_packed(const Place& at, const Share& rows) {
    return rows.begin + kColumns * at.row_part;
  }

  // Lays out scratch from `from` on, null to measure it; its size.
  int64_t lay_out(Scratch& to, T* from) const {
    Layout<T> layout{from};
    const auto take = [&](int64_t n) { return layout.take(n); };
    const int64_t panels = groups.all_panels(), rows = s.batch;
    to.w_ih = take(once ? 0 : panels * depth_ih() * kColumns);
    to.w_hh = take(once ? 0 : panels * depth_hh() * kColumns);
    to.w_hr =
        take(s.projected ? parts(s.state, kColumns) * gemm::words<S>(s.hidden) * kColumns : 0);
    to.bias = take(panels * kColumns);
    to.b_hn = take(groups.count() * groups.units());
    to.sums = take(once ? 0 : panels * chunk * rows * kColumns);
    to.c = take(s.mode == Mode::kLstm ? parts(s.hidden, kL) * rows * kL : 0);
    to.x_once = take(once && !few ? depth_ih() * packed_rows() : 0);
    to.h_once = take(once && !few ? depth_hh() * packed_rows() : 0);
    for (auto& h : to.h) h = {take(once ? 0 : Pieces<S>::size(s.state, rows | 1)), rows | 1};
    to.full = {take(s.projected ? Pieces<S>::size(s.hidden, rows | 1) : 0), rows | 1};
    return layout.used;
  }
  int64_t lay_out(Own& to, T* from) const {
    Layout<T> layout{from};
    const auto take = [&](int64_t n) { return layout.take(n); };
    const auto words = [](int64_t n) { return parts(n * 8, int64_t(sizeof(T))); };
    to.packed_a = take(gemm::kBlockRows * gemm::kPitch);
    to.tile = take(kStepRows * kColumns);
    to.sums = take(once ? groups.panels() * kStepRows * kColumns : 0);
    // A GRU's W_hn·h behind the others.
    to.turned = take(once && !few ? (groups.panels() + 1) * kColumns * kBatch : 0);
    to.rows = reinterpret_cast<const S**>(take(words(chunk * s.batch)));
    to.starts = reinterpret_cast<int64_t*>(take(words(chunk)));
    return layout.used;
  }

  Plan plan(int64_t team) const {
    const int64_t work = groups.panels() * gemm::kVectors * (s.state + s.inputs);
    const int64_t bytes = groups.all_panels() * depth_hh() * kColumns * int64_t(sizeof(T));
    return make_plan(s, groups.count(), work, bytes, team);
  }

  void run() {
    const int64_t most = std::max<int64_t>(1, torch::stable::get_num_threads());
    const Plan wanted = plan(most);
    const int64_t work = s.rows() * s.gates() * s.hidden * (s.inputs + s.state);
    const int64_t threads =
        std::clamp<int64_t>(work * s.directions / gemm::kGrain, 1, wanted.members());
    Scratch measure;
    Own measure_own;
    const int64_t shared = lay_out(measure, nullptr), own = lay_out(measure_own, nullptr);
    const Aligned<T> memory(s.directions * shared + threads * own);
    Team::run(threads, [&](Team& team, int64_t me) {
      Own mine;
      lay_out(mine, memory.get() + s.directions * shared + me * own);
      const Plan p = plan(team.size());
      if (me >= p.members()) return;
      const Place at = p.place(s.directions, me);
      for (int64_t d = at.direction; d < at.direction + at.directions; ++d) {
        Scratch scratch;
        lay_out(scratch, memory.get() + d * shared);
        direction(team, at, d, scratch, mine);
      }
    });
  }

  // What comes before the first step: weights, biases, states.
  void prepare(const Place& at, int64_t d, const Scratch& to, const Share& rows) const {
    const Weights<S>& w = weights[size_t(d)];
    const int64_t strips = groups.panels() * gemm::kVectors;
    const Share mine(groups.count(), at.mine(), at.all);
    for (int64_t p = mine.begin * groups.panels(); !once && p < mine.end * groups.panels(); ++p) {
      pack_gates(w.ih, s.inputs, groups, p, to.w_ih + p * depth_ih() * kColumns);
      pack_gates(w.hh, s.state, groups, p, to.w_hh + p * depth_hh() * kColumns);
    }
    for (int64_t g = mine.begin; g < mine.end; ++g)
      for (int64_t strip = 0; strip < strips; ++strip) {
        int64_t lanes;
        const int64_t row = groups.row(g, strip, lanes);
        const bool own = s.mode == Mode::kGru && strip >= 4;  // of n: W_hn·h + b_hn is apart
        V bias(T(0)), hidden(T(0));
        if (w.b_ih && lanes) bias = load(w.b_ih + row, lanes), hidden = load(w.b_hh + row, lanes);
        store(to.bias + (g * strips + strip) * kL, own ? bias : bias + hidden);
        if (own) store(to.b_hn + (g * 2 + strip - 4) * kL, hidden);
      }
    if (s.projected) {
      const Share panels(parts(s.state, kColumns), at.mine(), at.all);
      const int64_t size = gemm::words<S>(s.hidden) * kColumns;
      for (int64_t p = panels.begin; p < panels.end; ++p)
        pack_panel(gemm::Matrix<S>{w.hr, 1, s.hidden}, s.hidden, p * kColumns, s.state,
                   to.w_hr + p * size);
    }
    const auto fill = [&](const Pieces<S>& pieces, const S* from, int64_t stride, int64_t units) {
      const int64_t size = Pieces<S>::kUnits;
      const Share share(parts(units, size), at.part, at.parts);
      for (int64_t u = share.begin * size; u < share.end * size; u += size) {
        if (!from || units < u + size) pieces.clear(rows.begin, rows.end, u);
        if (!from) continue;
        for (int64_t r = rows.begin; r < rows.end; ++r)
          for (int64_t v = u; v < std::min(units, u + size); v += kL) {
            const int64_t lanes = std::min(kL, units - v);
            pieces.put(r, v, load(from + r * stride + v, lanes), lanes);
          }
      }
    };
    const S* const h0 = hx + d * s.batch * s.state;
    const auto pack = [&](const S* from, int64_t stride, int64_t units, T* packed) {
      const gemm::Matrix<S> turned{from + rows.begin * stride, 1, stride};
      const int64_t depth = gemm::words<S>(units), n = rows.end - rows.begin;
      const Share share(parts(depth, kL), at.part, at.parts);
      const int64_t p = share.begin * kL;
      packed += first_packed(at, rows) * depth;
      for (int64_t r = 0; r < gemm::round_up(n, kColumns); r += kL)
        gemm::pack_columns(turned, p, std::min(depth, share.end * kL) - p, units, r,
                           std::clamp<int64_t>(n - r, 0, kL),
                           packed + r / kColumns * kColumns * depth + p * kColumns + r % kColumns);
    };
    if (!once) {
      fill(to.h[0], h0, s.state, s.state);
      if (s.steps > 1) fill(to.h[1], h0, s.state, s.state);
    } else if (!few) {
      pack(x, row_stride, s.inputs, to.x_once);
      pack(h0, s.state, s.state, to.h_once);
    }
    if (s.projected) fill(to.full, nullptr, 0, s.hidden);
    if (s.mode == Mode::kLstm) {
      const Share share(parts(s.hidden, kL), at.part, at.parts);
      for (int64_t v = share.begin; v < share.end; ++v)
        for (int64_t r = rows.begin; r < rows.end; ++r)
          store(to.c + (v * s.batch + r) * kL,
                load(cx + (d * s.batch + r) * s.hidden + v * kL, std::min(kL, s.hidden - v * kL)));
    }
  }

  // x·W_ihᵀ of steps [t0, t1), my rows and groups, into sums[panel][row][kColumns].
  void input_product(const Share& rows, const Share& mine, int64_t t0, int64_t t1,
                     const Scratch& to, const Own& own, T* sums, int64_t pitch) const {
    int64_t count = 0;
    for (int64_t t = t0; t < t1; ++t) {
      own.starts[t - t0] = count;
      for (int64_t b = rows.begin; b < std::min(rows.end, s.active(t)); ++b)
        own.rows[count++] =
            s.sizes ? x + (s.offset(t) + b) * row_stride : x + t * step_stride + b * row_stride;
    }
    const gemm::Rows<S> a{own.rows};
    const int64_t depth = depth_ih();
    for (int64_t i = 0; i < count; i += gemm::kBlockRows) {
      const int64_t n = std::min(gemm::kBlockRows, count - i);
      int64_t p = 0;
      do {
        const int64_t size = std::min(gemm::kDepth, depth - p);
        gemm::pack_a(a, i, n, p, size, s.inputs, own.packed_a);
        for (int64_t c = mine.begin * groups.panels(); c < mine.end * groups.panels(); ++c)
          for (int64_t r = 0; r < n; r += gemm::kRows) {
            T* const tile = sums + (c * pitch + i + r) * kColumns;
            gemm::multiply_rows<T, Pieces<S>::kPair>(
                std::min(gemm::kRows, n - r), true, own.packed_a + r * gemm::kPitch,
                to.w_ih + (c * depth + p) * kColumns, size, p > 0, tile, kColumns,
                gemm::Ahead{reinterpret_cast<const char*>(tile), 0},
                std::make_integer_sequence<int, int(gemm::kRows)>());
          }
        p += size;
      } while (p < depth);
    }
  }

  // Rows [row, row + n) of a step and one vector of units, from its sums.
  struct Tile {
    int64_t d, t, row, n;
    T* sums;
    const T* hidden;                           // a GRU's W_hn·h
    int64_t panel;                             // from one panel's sums to the next
    int64_t ends;                              // rows from here on have no further step
    int64_t v = 0, unit = 0;                   // which of the group's vectors, and its first unit
    const T *bias = nullptr, *b_hn = nullptr;  // of the group
  };

  void put_state(const Tile& at, const Scratch& to, const Pieces<S>& h, int64_t r, V value,
                 int64_t lanes) const {
    const int64_t row = at.row + r;
    if (s.projected) {
      to.full.put(row, at.unit, value, lanes);
      return;
    }
    put_output(at.d, at.t, row, at.unit, at.ends, h, value, lanes);
  }

  void put_output(int64_t d, int64_t t, int64_t row, int64_t unit, int64_t ends, const Pieces<S>& h,
                  V value, int64_t lanes) const {
    if (!once) h.put(row, unit, value, lanes);
    store(output + ((s.offset(t) + row) * s.directions + d) * s.state + unit, value, lanes);
    if (h_n && row >= ends) store(h_n + (d * s.batch + row) * s.state + unit, value, lanes);
  }

  void lstm_gates(const Tile& at, const Scratch& to, const Pieces<S>& h) const {
    const int64_t lanes = std::min(kL, s.hidden - at.unit);
    const V zero(T(0)), one(T(1));
    const V bias_i = load(at.bias), bias_f = load(at.bias + kL), bias_g = load(at.bias + 2 * kL),
            bias_o = load(at.bias + 3 * kL);
    T* const c = to.c + (at.unit / kL * s.batch + at.row) * kL;
    const int64_t step = s.kept_step(lanes);
    S* const kept_gates = gates ? gates + s.kept_at(at.d, at.t, at.row, at.unit, lanes, 4) : gates;
    T* const kept_cells = cells ? cells + s.kept_at(at.d, at.t, at.row, at.unit, lanes, 1) : cells;
    constexpr int kAtOnce = 4;  // rows; their o waits in the place of the sums
    for (int64_t r0 = 0; r0 < at.n; r0 += kAtOnce) {
      const int64_t r1 = std::min(at.n, r0 + kAtOnce);
      V outer[kAtOnce];
      for (int64_t r = r0; r < r1; ++r) {
        T* const sums = at.sums + r * kColumns;
        V x[4] = {load(sums) + bias_i, load(sums + kL) + bias_f,
                  load(sums + at.panel + kL) + bias_o, load(sums + at.panel) + bias_g};
        const V in = x[3];
        for (int k = 0; k < 3; ++k) x[k] = zero - x[k];
        x[3] = abs(in) + abs(in);
        exp(x);
        const V i = one / (one + x[0]), f = one / (one + x[1]), o = one / (one + x[2]);
        const V g = tanh_from_exp(in, x[3]);
        const V cell = fma(f, load(c + r * kL), i * g);
        store(c + r * kL, cell);
        store(sums, o);
        outer[r - r0] = cell;
        if (kept_gates) {
          S* const kept = kept_gates + 4 * r * step;
          store(kept, i, lanes);
          store(kept + step, f, lanes);
          store(kept + 2 * step, g, lanes);
          store(kept + 3 * step, o, lanes);
          if (kept_cells) store(kept_cells + r * step, cell, lanes);
        }
        if (at.row + r >= at.ends)
          store(c_n + (at.d * s.batch + at.row + r) * s.hidden + at.unit, cell, lanes);
      }
      for (int64_t r = r1; r < r0 + kAtOnce; ++r) outer[r - r0] = zero;
      tanh(outer);
      for (int64_t r = r0; r < r1; ++r)
        put_state(at, to, h, r, load(at.sums + r * kColumns) * outer[r - r0], lanes);
    }
  }

  void gru_gates(const Tile& at, const Scratch& to, const Pieces<S>& h,
                 const Pieces<S>& before) const {
    const int64_t lanes = std::min(kL, s.hidden - at.unit);
    const T* const bias = at.bias + at.v * kL;
    const V zero(T(0)), one(T(1));
    const V bias_r = load(bias), bias_z = load(bias + kColumns), bias_n = load(bias + 2 * kColumns),
            bias_hn = load(at.b_hn + at.v * kL);
    const int64_t step = s.kept_step(lanes);
    for (int64_t r = 0; r < at.n; ++r) {
      const T* const sums = at.sums + r * kColumns + at.v * kL;
      V x[2] = {zero - (load(sums) + bias_r), zero - (load(sums + at.panel) + bias_z)};
      exp(x);
      const V reset = one / (one + x[0]), z = one / (one + x[1]);
      const V hidden = load(at.hidden + r * kColumns + at.v * kL) + bias_hn;
      const V n = tanh(fma(reset, hidden, load(sums + 2 * at.panel) + bias_n));
      const V old = once ? load(hx + (at.d * s.batch + at.row + r) * s.state + at.unit, lanes)
                         : before.get(at.row + r, at.unit, lanes);
      put_state(at, to, h, r, fma(z, old - n, n), lanes);
      if (gates) {
        S* const kept = gates + s.kept_at(at.d, at.t, at.row + r, at.unit, lanes, 4);
        store(kept, reset, lanes);
        store(kept + step, z, lanes);
        store(kept + 2 * step, n, lanes);
        store(kept + 3 * step, hidden, lanes);
      }
    }
  }

  void rnn_gate(const Tile& at, const Scratch& to, const Pieces<S>& h) const {
    const int64_t lanes = std::min(kL, s.hidden - at.unit);
    const V bias = load(at.bias + at.v * kL), zero(T(0));
    for (int64_t r = 0; r < at.n; ++r) {
      const V sum = load(at.sums + r * kColumns + at.v * kL) + bias;
      const V value = s.mode == Mode::kTanh ? tanh(sum) : select(less(sum, zero), zero, sum);
      put_state(at, to, h, r, value, lanes);
    }
  }

  // Group g of the rows of a tile.
  void gates_of(Tile at, int64_t g, const Scratch& to, const Pieces<S>& h,
                const Pieces<S>& before) const {
    at.bias = to.bias + g * groups.panels() * kColumns;
    at.b_hn = to.b_hn + g * groups.units();
    for (at.v = 0; at.v < groups.vectors(); ++at.v) {
      at.unit = g * groups.units() + at.v * kL;
      if (at.unit >= s.hidden) break;
      switch (s.mode) {
        case Mode::kLstm:
          lstm_gates(at, to, h);
          break;
        case Mode::kGru:
          gru_gates(at, to, h, before);
          break;
        default:
          rnn_gate(at, to, h);
      }
    }
  }

  // Step t of rows [row0, row0 + n), whose sums of x begin at `sums`.
  void step(int64_t d, int64_t t, int64_t row0, int64_t n, int64_t ends, const Share& mine,
            const Scratch& to, const Own& own, T* sums, int64_t pitch, const Pieces<S>& from,
            const Pieces<S>& h) const {
    const int64_t panels = groups.panels(), depth = depth_hh();
    for (int64_t g = mine.begin; g < mine.end; ++g)
      for (int64_t r = 0; r < n; r += kStepRows) {
        const int64_t m = std::min(kStepRows, n - r);
        T* const first = sums + (g * panels * pitch + r) * kColumns;
        for (int64_t p = 0; p < panels; ++p) {
          const bool apart = s.mode == Mode::kGru && p == 2;
          from.multiply(row0 + r, m, 0, s.state, to.w_hh + (g * panels + p) * depth * kColumns,
                        !apart, apart ? own.tile : first + p * pitch * kColumns);
        }
        gates_of({d, t, row0 + r, m, first, own.tile, pitch * kColumns, ends}, g, to, h, from);
      }
  }

  // Rows [i0, i1) of a weight, k long, by `n` packed rows: turned sums, kBatch apart. Meanwhile the
  // rows of the next tile come nearer.
  void turned_product(const S* const* weight, int64_t i0, int64_t i1, int64_t k, const T* packed,
                      int64_t n, bool add, T* packed_a, T* sums) const {
    const int64_t depth = gemm::words<S>(k), tiles = parts(i1 - i0, gemm::kRows);
    const int64_t steps = depth * parts(n, kColumns);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Share rows(i1 - i0, tile, tiles);
      const int64_t height = rows.end - rows.begin;
      const auto* next = reinterpret_cast<const char*>(weight[std::min(i0 + rows.end, i1 - 1)]);
      const int64_t step = parts(height * k * int64_t(sizeof(S)), steps);
      for (int64_t p = 0; p < depth; p += gemm::kDepth) {
        const int64_t size = std::min(gemm::kDepth, depth - p);
        gemm::pack_a(gemm::Rows<S>{weight}, i0 + rows.begin, height, p, size, k, packed_a);
        for (int64_t c = 0; c < n; c += kColumns, next += size * step)
          gemm::multiply_rows<T, Pieces<S>::kPair>(
              height, n - c > kL, packed_a, packed + c * depth + p * kColumns, size, add || p > 0,
              sums + rows.begin * kBatch + c, kBatch, gemm::Ahead{next, step},
              std::make_integer_sequence<int, int(gemm::kRows)>());
      }
    }
  }

  // The only step, of the rows `batch`.
  void step_once(const Place& at, int64_t d, const Share& batch, const Share& mine,
                 const Scratch& to, const Own& own) const {
    const Weights<S>& w = weights[size_t(d)];
    const int64_t strips = groups.panels() * gemm::kVectors, n = batch.end - batch.begin;
    const bool gru = s.mode == Mode::kGru;
    constexpr int64_t kStrips = 6, kPanel = kStepRows * kColumns;
    for (int64_t g = mine.begin; g < mine.end; ++g) {
      // The group's rows of the weights, strip after strip.
      const S *ih[kStrips * kL], *hh[kStrips * kL];
      int64_t row[kStrips], lanes[kStrips], starts[kStrips + 1] = {0};
      for (int64_t i = 0; i < strips; ++i) {
        row[i] = groups.row(g, i, lanes[i]);
        starts[i + 1] = starts[i] + lanes[i];
        for (int64_t l = 0; l < lanes[i]; ++l) {
          ih[starts[i] + l] = w.ih + (row[i] + l) * s.inputs;
          hh[starts[i] + l] = w.hh + (row[i] + l) * s.state;
        }
      }
      const int64_t all = starts[strips], common = gru ? starts[4] : all;
      const auto sums_of = [&](int64_t i) { return own.sums + i / 2 * kPanel + i % 2 * kL; };
      const auto apart = [&](int64_t i) { return own.tile + (i - 4) * kL; };
      const auto finish = [&](int64_t r, int64_t m) {
        gates_of({d, 0, batch.begin + r, m, own.sums, own.tile, kPanel, 0}, g, to, to.h[1],
                 to.h[0]);
      };
      if (few) {
        const S* const from_x = x + batch.begin * row_stride;
        const S* const from_h = hx + (d * s.batch + batch.begin) * s.state;
        for (int64_t i = 0; i < strips; ++i)
          for (int64_t r0 = 0; r0 < n; r0 += gemm::kFewRows) {
            const int64_t m = std::min(gemm::kFewRows, n - r0);
            T of_x[gemm::kFewRows * kL] = {}, of_h[gemm::kFewRows * kL] = {};
            if (lanes[i]) {
              gemm::few_rows(gemm::Matrix<S>{from_x + r0 * row_stride, row_stride, 1},
                             gemm::Matrix<S>{w.ih, 1, s.inputs}, m, row[i], lanes[i], s.inputs,
                             of_x);
              gemm::few_rows(gemm::Matrix<S>{from_h + r0 * s.state, s.state, 1},
                             gemm::Matrix<S>{w.hh, 1, s.state}, m, row[i], lanes[i], s.state, of_h);
            }
            const bool is_apart = gru && i >= 4;
            for (int64_t r = 0; r < m; ++r) {
              const V by_x = load(of_x + r * kL), by_h = load(of_h + r * kL);
              store(sums_of(i) + (r0 + r) * kColumns, is_apart ? by_x : by_x + by_h);
              if (is_apart) store(apart(i) + (r0 + r) * kColumns, by_h);
            }
          }
        finish(0, n);
        continue;
      }
      for (int64_t c = 0; c < n; c += kBatch) {
        const int64_t m = std::min(kBatch, n - c), first = first_packed(at, batch) + c;
        const T *const xs = to.x_once + first * depth_ih(), *const hs =
                                                                to.h_once + first * depth_hh();
        T* const hidden = own.turned + all * kBatch;
        turned_product(ih, 0, all, s.inputs, xs, m, false, own.packed_a, own.turned);
        turned_product(hh, 0, common, s.state, hs, m, true, own.packed_a, own.turned);
        if (gru) turned_product(hh, common, all, s.state, hs, m, false, own.packed_a, hidden);
        for (int64_t r = 0; r < m; r += kStepRows) {
          const int64_t height = std::min(kStepRows, m - r);
          const auto turn = [&](const T* from, int64_t columns, T* sums) {
            gemm::pack_columns(gemm::Matrix<T>{from + r, 1, kBatch}, 0, height, height, 0, columns,
                               sums);
          };
          for (int64_t i = 0; i < strips; ++i)
            turn(own.turned + starts[i] * kBatch, lanes[i], sums_of(i));
          for (int64_t i = 4; gru && i < strips; ++i)
            turn(hidden + (starts[i] - common) * kBatch, lanes[i], apart(i));
          finish(c + r, height);
        }
      }
    }
  }

  // h of rows [row0, row0 + n) from what is to be projected.
  void project(int64_t d, int64_t t, int64_t row0, int64_t n, int64_t ends, const Place& at,
               const Scratch& to, const Own& own, const Pieces<S>& h) const {
    const int64_t depth = gemm::words<S>(s.hidden);
    const Share mine(parts(s.state, kColumns), at.part, at.parts);
    for (int64_t p = mine.begin; p < mine.end; ++p)
      for (int64_t r = 0; r < n; r += kStepRows) {
        const int64_t m = std::min(kStepRows, n - r);
        to.full.multiply(row0 + r, m, 0, s.hidden, to.w_hr + p * depth * kColumns, false, own.tile);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t v = 0; v < kColumns; v += kL) {
            const int64_t unit = p * kColumns + v;
            if (unit < s.state)
              put_output(d, t, row0 + r + i, unit, ends, h, load(own.tile + i * kColumns + v),
                         std::min(kL, s.state - unit));
          }
      }
  }

  void direction(Team& team, const Place& at, int64_t d, const Scratch& to, const Own& own) const {
    const Share rows = rows_of(s, at.row_part, at.row_parts);
    const Share mine(groups.count(), at.part, at.parts);
    prepare(at, d, to, rows);
    team.wait(1, at.first_of_all, at.all, at.me);
    const int64_t pitch = chunk * (rows.end - rows.begin);
    T* const sums = to.sums + groups.all_panels() * chunk * rows.begin * kColumns;
    for (int64_t q0 = 0; q0 < s.steps; q0 += chunk) {
      const int64_t q1 = std::min(s.steps, q0 + chunk);
      const int64_t t0 = d == 0 ? q0 : s.steps - q1;
      if (!once) input_product(rows, mine, t0, t0 + q1 - q0, to, own, sums, pitch);
      for (int64_t q = q0; q < q1; ++q) {
        const int64_t t = d == 0 ? q : s.steps - 1 - q;
        const int64_t n = std::max<int64_t>(0, std::min(rows.end, s.active(t)) - rows.begin);
        const int64_t ends = d == 0 ? s.active(t + 1) : t == 0 ? 0 : s.batch;
        const Pieces<S>&from = to.h[q % 2], &h = to.h[(q + 1) % 2];
        if (once)
          step_once(at, d, rows, mine, to, own);
        else
          step(d, t, rows.begin, n, ends, mine, to, own, sums + own.starts[t - t0] * kColumns,
               pitch, from, h);
        if (s.projected) {
          team.wait(0, at.first(), at.parts, at.me);
          project(d, t, rows.begin, n, ends, at, to, own, h);
        }
        if (q + 1 < s.steps) team.wait(0, at.first(), at.parts, at.me);
      }
    }
  }
};

// -------------------------------------------------------------------------------------- backward

// The sum of one vector of n rows.
template <typename T, typename Row>
Vec<T> sum_of_rows(int64_t n, const Row& row) {
  using V = Vec<T>;
  constexpr int64_t kHalves = V::size / Vec<double>::size, kBlock = 16;  // a block's sum is a T
  Vec<double> total[kHalves], halves[kHalves];
  std::fill(total, total + kHalves, Vec<double>(0.0));
  for (int64_t r0 = 0; r0 < n; r0 += kBlock) {
    V part(T(0));
    for (int64_t r = r0; r < std::min(n, r0 + kBlock); ++r) part = part + row(r);
    to_doubles(part, halves);
    for (int64_t q = 0; q < kHalves; ++q) total[q] = total[q] + halves[q];
  }
  T rounded[V::size];
  for (int64_t q = 0; q < kHalves; ++q) store_rounded(rounded + q * (V::size / kHalves), total[q]);
  return load(rounded);
}

template <typename S>
struct Backward {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  static constexpr int64_t kL = V::size, kColumns = gemm::kColumns<T>;
  static constexpr int64_t kStepRows = 4 * gemm::kRows;

  const Shape& s;
  std::vector<Weights<S>> weights;
  const S *grad_output, *grad_h_n, *grad_c_n;  // may be null
  const S *hx, *cx, *output, *gates;
  const T* cells;
  S *grad_hx, *grad_cx;  // may be null
  // What the large products read and write, of each direction; what is not wanted is null or empty.
  struct Products {
    S* grad_input;
    T *w_ih, *w_hh, *w_hr, *bias;  // sums; bias: width · hidden
    std::vector<const S*> h;       // the states before each row
  };
  std::vector<const S*> x;  // rows of the input
  std::vector<Products> products;
  bool want_input, want_weights;
  // Of a step whose part in the weights' gradients is computed with others': where the gradients of
  // its gates go, and x and h, x's columns filled up to `split`; null where there is none.
  struct Kept {
    S *gates = nullptr, *beside = nullptr;
    int64_t pitch = 0, beside_pitch = 0, split = 0;
  } keep = {};

  const int64_t meets = s.mode == Mode::kGru ? 3 : s.gates();  // gates that meet W_hh
  const int64_t own = s.gates() * s.hidden, width = s.width() * s.hidden;
  const int64_t pitch = keep.gates ? keep.pitch : odd_lines<S>(width);  // of grad_gates
  // Steps whose gradients are kept for one turn of the large products.
  const int64_t chunk =
      std::clamp<int64_t>(gemm::kDepth / std::max<int64_t>(1, s.batch), 1, s.steps);

  struct Scratch {
    T *w_hh, *w_hr, *w_ih, *carry;
    S *grad_gates, *grad_state, *full;  // of a chunk; grad_state and full of a projection
    Pieces<S> gates[2], state;          // gates: of two chunks in turn; of the only step, gates[0]
  };
  struct Own {
    T *tile, *product, *panel;  // panel: of weights that are read in one step alone
  };
  bool once() const { return s.steps == 1; }

  int64_t lay_out(Scratch& to, T* from) const {
    Layout<T> layout{from};
    const auto take = [&](int64_t n) { return layout.take(n); };
    to.w_hh = take(once() ? 0 : parts(s.state, kColumns) * depth() * kColumns);
    to.w_hr =
        take(s.projected ? parts(s.hidden, kColumns) * gemm::words<S>(s.state) * kColumns : 0);
    to.w_ih = take(want_input && !once() ? parts(s.inputs, kColumns) * depth() * kColumns : 0);
    to.carry = take(parts(s.hidden, kL) * s.batch * kL);
    const auto rows_of = [&](int64_t columns) {
      return reinterpret_cast<S*>(
          take(parts(chunk * s.batch * columns * int64_t(sizeof(S)), int64_t(sizeof(T)))));
    };
    to.grad_gates = keep.gates ? keep.gates : rows_of(once() ? pitch : 0);
    to.grad_state = rows_of(s.projected ? s.state : 0);
    to.full = rows_of(s.projected ? s.hidden : 0);
    const int64_t rows = (chunk * s.batch) | 1, size = Pieces<S>::size(s.hidden, rows);
    to.gates[0] = {take(s.width() * size), rows};
    to.gates[1] = {take(once() ? 0 : s.width() * size), rows};
    to.state = {take(s.projected ? Pieces<S>::size(s.state, s.batch | 1) : 0), s.batch | 1};
    return layout.used;
  }

  // The gates of a unit are whole pieces apart.
  int64_t gate_units() const { return gemm::round_up(s.hidden, Pieces<S>::kUnits); }
  bool whole() const { return gate_units() == s.hidden; }
  int64_t depth() const { return meets * gemm::words<S>(s.hidden); }

  Plan plan(int64_t team) const {
    const int64_t work = gemm::kVectors * meets * s.hidden, panels = parts(s.state, kColumns);
    return make_plan(s, panels, work, panels * kColumns * depth() * int64_t(sizeof(T)), team);
  }

  void run() {
    const int64_t most = std::max<int64_t>(1, torch::stable::get_num_threads());
    const Plan wanted = plan(most);
    const int64_t work = s.rows() * depth() * s.state * s.directions;
    const int64_t threads = std::clamp<int64_t>(work / gemm::kGrain, 1, wanted.members());
    Scratch measure;
    const int64_t shared = lay_out(measure, nullptr);
    const int64_t tile = kStepRows * kColumns, product = Aligned<T>::padded(product_scratch());
    const int64_t each = tile + product + (once() ? depth() * kColumns : 0);
    const Aligned<T> memory(s.directions * shared + threads * each);
    Team::run(threads, [&](Team& team, int64_t me) {
      const Plan p = plan(team.size());
      if (me >= p.members()) return;
      const Place at = p.place(s.directions, me);
      T* const mine = memory.get() + s.directions * shared + me * each;
      for (int64_t d = at.direction; d < at.direction + at.directions; ++d) {
        Scratch scratch;
        lay_out(scratch, memory.get() + d * shared);
        direction(team, at, d, scratch, {mine, mine + tile, mine + tile + product});
      }
    });
  }

  // A thread's scratch of any of the large products.
  int64_t product_scratch() const {
    if (!want_weights) return 0;
    const int64_t most = chunk * s.batch,
                  deep = gemm::Cut<S>::kBytes / int64_t(sizeof(T)) +
                         gemm::kBlockRows * (gemm::kPitch + 8 * gemm::kBlockColumns);
    const auto of = [&](int64_t m, int64_t n) {
      return most <= 1024 ? gemm::scratch_size<S>(m, n, most) : deep;
    };
    const int64_t weights = once() ? of(own, gemm::round_up(s.inputs, kL) + s.state)
                                   : gemm::kDepth * gemm::kBlockColumns + kStepRows * gemm::kPitch +
                                         gemm::kRows * kColumns;
    return std::max(weights, s.projected ? of(s.state, s.hidden) : 0);
  }

  void prepare(const Place& at, int64_t d, const Scratch& to, const Share& rows) const {
    const Weights<S>& w = weights[size_t(d)];
    const Share mine(parts(s.state, kColumns), at.mine(), at.all);
    for (int64_t p = mine.begin; !once() && p < mine.end; ++p)
      pack_rows(w.hh, s.state, p, to.w_hh + p * depth() * kColumns);
    if (s.projected) {
      const Share panels(parts(s.hidden, kColumns), at.mine(), at.all);
      for (int64_t p = panels.begin; p < panels.end; ++p)
        pack_panel(gemm::Matrix<S>{w.hr, s.hidden, 1}, s.state, p * kColumns, s.hidden,
                   to.w_hr + p * gemm::words<S>(s.state) * kColumns);
    }
    if (want_input && !once()) {
      const Share panels(parts(s.inputs, kColumns), at.mine(), at.all);
      for (int64_t p = panels.begin; p < panels.end; ++p)
        pack_rows(w.ih, s.inputs, p, to.w_ih + p * depth() * kColumns);
    }
    const auto clear = [&](const Pieces<S>& pieces, int64_t units) {
      const int64_t size = Pieces<S>::kUnits;
      const Share share(parts(units, size), at.mine(), at.all);
      for (int64_t u = share.begin; u < share.end; ++u) pieces.clear(0, pieces.rows, u * size);
    };
    if (!whole())
      for (int64_t i = 0; i < (once() ? 1 : 2); ++i) clear(to.gates[i], s.width() * gate_units());
    if (s.projected) clear(to.state, s.state);
    const Share kept(rows.end - rows.begin, at.part, at.parts);
    for (int64_t i = kept.begin; keep.beside && i < kept.end; ++i) {
      const size_t r = size_t(rows.begin + i);
      S* const to_x = keep.beside + int64_t(r) * keep.beside_pitch;
      std::copy_n(x[r], s.inputs, to_x);
      std::copy_n(products[size_t(d)].h[r], s.state, to_x + keep.split);
    }
    const S* const from = s.mode == Mode::kLstm ? grad_c_n : grad_h_n;
    const Share share(parts(s.hidden, kL), at.part, at.parts);
    for (int64_t v = share.begin; v < share.end; ++v)
      for (int64_t r = rows.begin; r < rows.end; ++r)
        store(to.carry + (v * s.batch + r) * kL,
              from ? load(from + (d * s.batch + r) * s.hidden + v * kL,
                          std::min(kL, s.hidden - v * kL))
                   : V(T(0)));
  }

  // Panel p of W_hh or W_ih, whose rows have `columns`.
  void pack_rows(const S* w, int64_t columns, int64_t p, T* to) const {
    for (int64_t g = 0; g < meets; ++g)
      pack_panel(gemm::Matrix<S>{w + g * s.hidden * columns, columns, 1}, s.hidden, p * kColumns,
                 columns, to + g * gemm::words<S>(s.hidden) * kColumns);
  }

  // The row of W_ih that column i of the gradients of the gates meets.
  int64_t gate(int64_t i) const {
    const int64_t turn = s.mode == Mode::kGru ? s.hidden : 0;
    return i < turn ? i + 2 * turn : i - turn;
  }

  // The gradient of h after the step of a row, without that of its own output, to be added to
  // `sum`: where a later step has been, `sum` is its part.
  V gradient(int64_t d, int64_t row, int64_t at_row, int64_t unit, int64_t lanes, bool later,
             V sum) const {
    if (!later)
      sum = grad_h_n ? load(grad_h_n + (d * s.batch + row) * s.state + unit, lanes) : V(T(0));
    if (grad_output)
      sum = sum + load(grad_output + (at_row * s.directions + d) * s.state + unit, lanes);
    return sum;
  }

  // One vector of units of m rows from `row` on: from dh, the gradients of the cells' own h.
  struct Cells {
    int64_t d, t, row, m, unit, lanes;
    const T* dh;    // kColumns apart
    int64_t first;  // of all rows, the first of this chunk
    const Scratch& to;
    const Pieces<S>& pieces;
  };

  void lstm_cells(const Cells& at) const {
    constexpr int kAtOnce = 4;
    const int64_t lanes = at.lanes, step = s.kept_step(lanes), first = s.offset(at.t);
    const int64_t before = at.t + (at.d == 0 ? -1 : 1), earlier = s.active(before) - at.row;
    const S* const kept_gates = gates + s.kept_at(at.d, at.t, at.row, at.unit, lanes, 4);
    const T* const kept_cells = cells + s.kept_at(at.d, at.t, at.row, at.unit, lanes, 1);
    const T* const kept_before =
        earlier > 0 ? cells + s.kept_at(at.d, before, at.row, at.unit, lanes, 1) : nullptr;
    const V one(T(1));
    for (int64_t r0 = 0; r0 < at.m; r0 += kAtOnce) {
      const int64_t n = std::min<int64_t>(kAtOnce, at.m - r0);
      V c[kAtOnce];
      for (int64_t r = 0; r < kAtOnce; ++r)
        c[r] = load(kept_cells + (r0 + std::min(r, n - 1)) * step, lanes);
      tanh(c);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = at.row + r0 + r, at_row = first + row;
        const S* const kept = kept_gates + 4 * (r0 + r) * step;
        const V dh = load(at.dh + (r0 + r) * kColumns);
        const V i = load(kept, lanes), f = load(kept + step, lanes),
                g = load(kept + 2 * step, lanes), o = load(kept + 3 * step, lanes);
        const V old = r0 + r < earlier
                          ? load(kept_before + (r0 + r) * step, lanes)
                          : load(cx + (at.d * s.batch + row) * s.hidden + at.unit, lanes);
        T* const carry = at.to.carry + (at.unit / kL * s.batch + row) * kL;
        const V dc = fma(dh * o, one - c[r] * c[r], load(carry));
        store(carry, dc * f);
        put_gate(at, row, 0, 0, dc * g * (i * (one - i)));
        put_gate(at, row, 1, 1, dc * old * (f * (one - f)));
        put_gate(at, row, 2, 2, dc * i * (one - g * g));
        put_gate(at, row, 3, 3, dh * c[r] * (o * (one - o)));
        if (s.projected)
          store(at.to.full + (at_row - at.first) * s.hidden + at.unit, o * c[r], lanes);
      }
    }
  }

  void gru_cells(const Cells& at) const {
    const V one(T(1));
    const int64_t lanes = at.lanes, step = s.kept_step(lanes);
    for (int64_t i = 0; i < at.m; ++i) {
      const int64_t row = at.row + i;
      const S* const kept = gates + s.kept_at(at.d, at.t, row, at.unit, lanes, 4);
      const V dh = load(at.dh + i * kColumns);
      const V r = load(kept, lanes), z = load(kept + step, lanes), n = load(kept + 2 * step, lanes),
              hidden = load(kept + 3 * step, lanes);
      const int64_t before = s.before(at.d, at.t, row);
      const V old = before >= 0
                        ? load(output + (before * s.directions + at.d) * s.state + at.unit, lanes)
                        : load(hx + (at.d * s.batch + row) * s.state + at.unit, lanes);
      store(at.to.carry + (at.unit / kL * s.batch + row) * kL, dh * z);
      const V dn = dh * (one - z) * (one - n * n);
      put_gate(at, row, 0, 3, dn);
      put_gate(at, row, 1, 0, dn * hidden * (r * (one - r)));
      put_gate(at, row, 2, 1, dh * (old - n) * (z * (one - z)));
      put_gate(at, row, 3, 2, dn * r);
    }
  }

  void rnn_cells(const Cells& at) const {
    const V zero(T(0)), one(T(1));
    for (int64_t r = 0; r < at.m; ++r) {
      const int64_t row = at.row + r, at_row = s.offset(at.t) + row;
      const V dh = load(at.dh + r * kColumns);
      const V h = load(output + (at_row * s.directions + at.d) * s.state + at.unit, at.lanes);
      put_gate(at, row, 0, 0,
               s.mode == Mode::kTanh ? dh * (one - h * h)
                                     : select(less(zero, h), dh, select(less(h, one), zero, dh)));
    }
  }

  // Of the only step its rows are kept too, by gate.
  void put_gate(const Cells& at, int64_t row, int64_t gate, int64_t piece, V value) const {
    at.pieces.put(row, piece * gate_units() + at.unit, value, at.lanes);
    if (once()) store(at.to.grad_gates + row * pitch + gate * s.hidden + at.unit, value, at.lanes);
  }

  void cells_of(const Cells& at) const {
    switch (s.mode) {
      case Mode::kLstm:
        return lstm_cells(at);
      case Mode::kGru:
        return gru_cells(at);
      default:
        return rnn_cells(at);
    }
  }

  // What cells_of will read for one panel, asked for under the product before it.
  void prefetch(int64_t d, int64_t t, int64_t row0, int64_t m, int64_t active, int64_t unit) const {
    const int64_t n = std::min(row0 + m, active) - row0;
    const auto ask = [](const auto* from, int64_t count) {
      const auto* const at = reinterpret_cast<const char*>(from);
      for (int64_t byte = 0; byte < count * int64_t(sizeof(*from)); byte += 64)
        __builtin_prefetch(at + byte, 0, 2);
    };
    const int64_t before = t + (d == 0 ? -1 : 1);
    for (int64_t v = unit; n > 0 && v < std::min(s.hidden, unit + kColumns); v += kL) {
      const int64_t lanes = std::min(kL, s.hidden - v);
      if (s.kept()) ask(gates + s.kept_at(d, t, row0, v, lanes, 4), n * lanes * 4);
      if (cells && row0 < s.active(before))
        ask(cells + s.kept_at(d, before, row0, v, lanes, 1), n * lanes);
    }
    for (int64_t row = row0; grad_output && row < row0 + n; ++row)
      ask(grad_output + ((s.offset(t) + row) * s.directions + d) * s.state + unit,
          std::min(kColumns, s.state - unit));
  }

  // Gradients of rows [row0, row0 + m) and one panel of the state, of which rows below `later` have
  // had a later step, whose part is in `sums`, and rows below `active` have step t.
  void finish(int64_t d, int64_t t, int64_t row0, int64_t m, int64_t later, int64_t active,
              int64_t first, int64_t panel, T* sums, const Scratch& to,
              const Pieces<S>& pieces) const {
    for (int64_t v = 0; v < kColumns; v += kL) {
      const int64_t unit = panel * kColumns + v, lanes = std::min(kL, s.state - unit);
      if (lanes <= 0) break;
      for (int64_t r = 0; r < m; ++r) {
        const int64_t row = row0 + r;
        V sum = load(sums + r * kColumns + v);
        const T* const carry = to.carry + (unit / kL * s.batch + row) * kL;
        if (s.mode == Mode::kGru && row < later) sum = sum + load(carry);
        if (row >= active) {
          if (grad_hx) store(grad_hx + (d * s.batch + row) * s.state + unit, sum, lanes);
          if (grad_cx && !s.projected)
            store(grad_cx + (d * s.batch + row) * s.hidden + unit, load(carry), lanes);
          continue;
        }
        const V dh = gradient(d, row, s.offset(t) + row, unit, lanes, row < later, sum);
        if (s.projected) {
          to.state.put(row, unit, dh, lanes);
          store(to.grad_state + (s.offset(t) + row - first) * s.state + unit, dh, lanes);
        } else {
          store(sums + r * kColumns + v, dh);
        }
      }
      if (!s.projected && row0 < active)
        cells_of(
            {d, t, row0, std::min(m, active - row0), unit, lanes, sums + v, first, to, pieces});
    }
  }

  // The product of the gradients of the gates with `columns` of W_hh, or of W_ih: a GRU's n is
  // behind those that meet W_hh.
  void multiply(const Pieces<S>& pieces, int64_t row, int64_t m, const T* b, int64_t columns,
                bool is_input, T* sums) const {
    const bool turns = is_input && s.mode == Mode::kGru, second = columns > kL;
    if (whole() && !turns)
      return pieces.multiply(row, m, 0, meets * s.hidden, b, false, sums, second);
    for (int64_t g = 0; g < meets; ++g)
      pieces.multiply(row, m, (turns && g == 2 ? 3 : g) * gate_units(), s.hidden,
                      b + g * gemm::words<S>(s.hidden) * kColumns, g > 0, sums, second);
  }

  // Columns of a weight, panels of which are packed where they are used, once.
  struct Passing {
    const S* w;
    int64_t columns, begin, end;  // panels
    bool is_input;
  };

  // Of the only step: the gradients of the gates of rows [row, row + m) by panel p, in `packed`,
  // into sums. Of the panel after it, which begins at `next` in rows of next_columns, a part comes
  // nearer, part r of n.
  void multiply_once(const Pieces<S>& pieces, int64_t row, int64_t m, const Passing& by,
                     const T* packed, const S* next, int64_t next_columns, int64_t r, int64_t n,
                     T* sums) const {
    constexpr int64_t kUnits = 2 * gemm::kFlush * (Pieces<S>::kPair ? 2 : 1);
    const bool turns = by.is_input && s.mode == Mode::kGru;
    for (int64_t g = 0; g < meets; ++g)
      for (int64_t u = 0; u < s.hidden; u += kUnits) {
        const int64_t k = std::min(kUnits, s.hidden - u), piece = turns && g == 2 ? 3 : g;
        for (int64_t i = k * r / n; next && i < k * (r + 1) / n; ++i)
          for (int64_t c = 0; c < kColumns; c += 64 / int64_t(sizeof(S)))
            __builtin_prefetch(next + (g * s.hidden + u + i) * next_columns + c, 0, 2);
        pieces.multiply(row, m, piece * gate_units() + u, k,
                        packed + (g * gemm::words<S>(s.hidden) + gemm::words<S>(u)) * kColumns,
                        g > 0 || u > 0, sums);
      }
  }

  void direction(Team& team, const Place& at, int64_t d, const Scratch& to, const Own& mem) const {
    const Share rows = rows_of(s, at.row_part, at.row_parts);
    const Share mine(parts(s.state, kColumns), at.part, at.parts);
    prepare(at, d, to, rows);
    team.wait(1, at.first_of_all, at.all, at.me);
    int64_t later = 0, first = 0;
    Pieces<S> pieces = to.gates[0];
    for (int64_t q = 0; q <= s.steps; ++q) {
      const int64_t t = d == 0 ? s.steps - 1 - q : q;
      const int64_t active = q < s.steps ? s.active(t) : 0;
      const int64_t end = std::min(rows.end, std::max(later, active));
      const int64_t begin = q / chunk * chunk, last = std::min(s.steps, begin + chunk);
      const Pieces<S> from = pieces, all = to.gates[q / chunk % 2];
      if (q < s.steps) {
        first = s.offset(d == 0 ? s.steps - last : begin);
        pieces = all.from(s.offset(t) - first);
      }
      const auto finish_panel = [&](int64_t p, const auto& product) {
        for (int64_t row = rows.begin; row < end; row += kStepRows) {
          const int64_t m = std::min(kStepRows, end - row);
          const int64_t n = std::clamp<int64_t>(later - row, 0, m);
          for (int64_t r = 0; r < n; r += gemm::kRows)
            product(row + r, std::min(gemm::kRows, n - r), mem.tile + r * kColumns);
          finish(d, t, row, m, later, active, first, p, mem.tile, to, pieces);
        }
      };
      if (once() && q == 1)
        last_products(at, d, rows, from, mem, finish_panel);
      else
        for (int64_t p = mine.begin; p < mine.end; ++p)
          finish_panel(p, [&](int64_t row, int64_t m, T* sums) {
            if (!s.projected) prefetch(d, t, row, m, active, p * kColumns);
            multiply(from, row, m, to.w_hh + p * depth() * kColumns, s.state - p * kColumns, false,
                     sums);
          });
      if (s.projected) {
        team.wait(0, at.first(), at.parts, at.me);
        project(at, d, t, rows, later, active, first, to, pieces, mem.tile);
      }
      later = active;
      if (q + 1 == last && q < s.steps) {
        team.wait(1, at.first_of_all, at.all, at.me);
        const int64_t after = d == 0 ? s.steps - begin : last;
        const int64_t n = (after < s.steps ? s.offset(after) : s.rows()) - first;
        if (once()) {
          if (want_weights) weights_once(at, d, n, to, mem.product);
        } else {
          if (want_input) input_product(at, d, first, n, to, all, mem.tile);
          if (want_weights) weight_products(at, d, first, n, begin == 0, all, mem.product);
        }
        if (s.projected && want_weights) projection_product(at, d, n, begin == 0, to, mem.product);
        // The next chunk's gates go to the other place; what a projection's product reads does not.
        if (s.projected && last < s.steps) team.wait(1, at.first_of_all, at.all, at.me);
      } else if (q < s.steps) {
        team.wait(0, at.first(), at.parts, at.me);
      }
    }
  }

  // Of the only step: the gradients of the state and of the input, panel by panel.
  template <typename FinishPanel>
  void last_products(const Place& at, int64_t d, const Share& rows, const Pieces<S>& gates_of,
                     const Own& mem, const FinishPanel& finish_panel) const {
    const Weights<S>& w = weights[size_t(d)];
    const Share state(parts(s.state, kColumns), at.part, at.parts);
    const Share input(want_input ? parts(s.inputs, kColumns) : 0, at.part, at.parts);
    const int64_t tiles = parts(rows.end - rows.begin, gemm::kRows);
    const Passing hh{w.hh, s.state, state.begin, state.end, false};
    const Passing ih{w.ih, s.inputs, input.begin, input.end, true};
    const auto pass = [&](const Passing& by, const Passing& after, const auto& finished) {
      for (int64_t p = by.begin; p < by.end; ++p) {
        const Passing& then = p + 1 < by.end ? by : after;
        const int64_t at_next = p + 1 < by.end ? p + 1 : after.begin;
        const S* const next = at_next < then.end ? then.w + at_next * kColumns : nullptr;
        pack_rows(by.w, by.columns, p, mem.panel);
        finished(p, [&](int64_t row, int64_t m, T* sums) {
          multiply_once(gates_of, row, m, by, mem.panel, next, then.columns,
                        (row - rows.begin) / gemm::kRows, tiles, sums);
        });
      }
    };
    if (grad_hx) pass(hh, ih, finish_panel);
    pass(ih, {nullptr, 0, 0, 0, true}, [&](int64_t p, const auto& product) {
      for (int64_t row = rows.begin; row < rows.end; row += gemm::kRows) {
        const int64_t m = std::min(gemm::kRows, rows.end - row);
        product(row, m, mem.tile);
        for (int64_t r = 0; r < m; ++r)
          for (int64_t v = 0; v < std::min(kColumns, s.inputs - p * kColumns); v += kL)
            store(products[size_t(d)].grad_input + (row + r) * s.inputs + p * kColumns + v,
                  load(mem.tile + r * kColumns + v), std::min(kL, s.inputs - p * kColumns - v));
      }
    });
  }

  // `rows` of A·B, whose sums are no longer than a panel is deep, straight to where they belong, or
  // on top of what is there; `part` words are summed before they join it.
  template <typename B>
  static void short_product(const gemm::Matrix<S>& a, const B& b, const Share& rows,
                            int64_t columns, int64_t k, int64_t part, bool add, T* scratch, T* to) {
    constexpr int64_t kBlock = 4 * gemm::kRows;  // whole vectors of A
    const int64_t depth = gemm::words<S>(k);
    for (int64_t j = 0; j < columns; j += gemm::kBlockColumns) {
      const int64_t n = std::min(gemm::kBlockColumns, columns - j);
      T* const packed_a = scratch + depth * gemm::round_up(n, kColumns);
      T* const tile = packed_a + kBlock * gemm::kPitch;
      // Bytes of the next rows for each k, that are to come nearer.
      const int64_t step = parts(gemm::kRows * columns * int64_t(sizeof(T)),
                                 std::max<int64_t>(1, depth) * parts(n, kColumns));
      gemm::pack_b(b, 0, depth, k, j, n, scratch);
      for (int64_t block = rows.begin; block < rows.end; block += kBlock) {
        const int64_t end = std::min(rows.end, block + kBlock);
        gemm::pack_a(a, block, end - block, 0, depth, k, packed_a);
        for (int64_t i = block; i < end; i += gemm::kRows)
          for (int64_t c = 0; c < n; c += kColumns) {
            const int64_t height = std::min(gemm::kRows, end - i);
            const int64_t lanes = std::min(kColumns, n - c);
            const bool whole = lanes == kColumns;
            T* const out = to + i * columns + j + c;
            const char* next = reinterpret_cast<const char*>(to + (i + height) * columns);
            next += c / kColumns * depth * step;
            int64_t p = 0;
            do {  // a product of no terms is a block of zeros
              gemm::multiply_rows<T, Pieces<S>::kPair>(
                  height, lanes > kL, packed_a + (i - block) * gemm::kPitch + p,
                  scratch + c * depth + p * kColumns, std::min(part, depth - p),
                  p > 0 || (add && whole), whole ? out : tile, whole ? columns : kColumns,
                  gemm::Ahead{next, step}, std::make_integer_sequence<int, int(gemm::kRows)>());
              p += part, next += part * step;
            } while (p < depth);
            for (int64_t y = 0; !whole && y < height; ++y)
              for (int64_t v = 0; v < lanes; v += kL) {
                const int64_t left = std::min(kL, lanes - v);
                T* const at = out + y * columns + v;
                const V sum = load(tile + y * kColumns + v);
                store(at, add ? sum + load(at, left) : sum, left);
              }
          }
      }
    }
  }

  // My share of the gradient of the input: of a chunk, `n` rows from `first` on.
  void input_product(const Place& at, int64_t d, int64_t first, int64_t n, const Scratch& to,
                     const Pieces<S>& pieces, T* tile) const {
    const Share mine(parts(n, gemm::kRows), at.mine(), at.all);
    const int64_t end = std::min(n, mine.end * gemm::kRows);
    S* const out = products[size_t(d)].grad_input + first * s.inputs;
    for (int64_t block = mine.begin * gemm::kRows; block < end; block += gemm::kBlockRows)
      for (int64_t j = 0; j < s.inputs; j += kColumns)
        for (int64_t i = block; i < std::min(end, block + gemm::kBlockRows); i += gemm::kRows) {
          const int64_t m = std::min(gemm::kRows, end - i);
          multiply(pieces, i, m, to.w_ih + j * depth(), s.inputs - j, true, tile);
          for (int64_t r = 0; r < m; ++r)
            for (int64_t v = 0; v < std::min(kColumns, s.inputs - j); v += kL)
              store(out + (i + r) * s.inputs + j + v, load(tile + r * kColumns + v),
                    std::min(kL, s.inputs - j - v));
        }
  }

  // The vectors of units whose gradients of gate `g` I sum over rows: of all gates the same, or
  // nearly, which mostly I have written.
  Share vectors_of(const Place& at, int64_t g) const {
    const int64_t n = s.width();
    const Share mine(parts(s.hidden, kL) * n, at.mine(), at.all);
    return {parts(mine.begin - g, n), parts(mine.end - g, n)};
  }

  // My share of what a chunk gives to the gradients of the weights; `fresh` where it is the first.
  void weight_products(const Place& at, int64_t d, int64_t first, int64_t n, bool fresh,
                       const Pieces<S>& pieces, T* scratch) const {
    if (n == 0 && !fresh) return;
    const Products& sums = products[size_t(d)];
    const gemm::Rows<S> xs{x.data() + first}, hs{sums.h.data() + first};
    const int64_t depth = gemm::words<S>(n);
    const int64_t of_x = parts(s.inputs, kColumns), panels = of_x + parts(s.state, kColumns);
    constexpr int64_t kPanels = gemm::kBlockColumns / kColumns;
    T* const packed_a = scratch + gemm::kDepth * gemm::kBlockColumns;
    T* const tile = packed_a + kStepRows * gemm::kPitch;
    // Stock sums step by step: sums over few steps are cut as short.
    const int64_t part = n == s.rows() ? gemm::kFlush : gemm::kDepth;
    for (int64_t block = 0; block < panels; block += kPanels) {
      const int64_t end = std::min(panels, block + kPanels), split = std::clamp(of_x, block, end);
      int64_t p = 0;
      do {
        const int64_t size = std::min(gemm::kDepth, depth - p);
        const auto pack = [&](const gemm::Rows<S>& rows, int64_t from, int64_t to, int64_t columns,
                              T* at) {
          const int64_t j = from * kColumns;
          if (from < to)
            gemm::pack_b(rows, p, size, n, j, std::min(columns, to * kColumns) - j, at);
        };
        pack(xs, block, split, s.inputs, scratch);
        pack(hs, split - of_x, end - of_x, s.state, scratch + (split - block) * size * kColumns);
        for (int64_t g = 0; g < s.width(); ++g) {
          const Share vectors = vectors_of(at, g);
          const bool gru = s.mode == Mode::kGru;
          const int64_t gate = gru ? std::min<int64_t>(g, 2) : g;
          const int64_t c0 = gru && g == 2 ? split : block, c1 = gru && g == 3 ? split : end;
          const int64_t last = std::min(s.hidden, vectors.end * kL);
          for (int64_t row = vectors.begin * kL; row < last; row += kStepRows) {
            const int64_t height = std::min(kStepRows, last - row);
            for (int64_t r = 0; r < height; r += kL)
              gemm::pack_a(
                  gemm::Matrix<typename Pieces<S>::Stored>{pieces.at(0, g * gate_units() + row + r),
                                                           1, Pieces<S>::kUnits},
                  0, kL, p, size, n, packed_a + r * gemm::kPitch);
            for (int64_t r = 0; r < height; r += gemm::kRows)
              for (int64_t c = c0; c < c1; ++c) {
                const bool of_input = c < of_x;
                const int64_t columns = of_input ? s.inputs : s.state;
                const int64_t from = of_input ? c0 : split, count = (of_input ? split : c1) - from;
                const int64_t m = std::min(gemm::kRows, height - r);
                T* const rows =
                    (of_input ? sums.w_ih : sums.w_hh) + (gate * s.hidden + row + r) * columns;
                // The rows after these come nearer.
                const int64_t step =
                    parts(m * columns * int64_t(sizeof(T)), std::max<int64_t>(1, size) * count);
                const char* next = reinterpret_cast<const char*>(rows + m * columns);
                next += (c - from) * size * step;
                const int64_t j = (c - (of_input ? 0 : of_x)) * kColumns;
                const int64_t lanes = std::min(kColumns, columns - j);
                for (int64_t k = 0; k < std::max<int64_t>(1, size); k += part, next += part * step)
                  gemm::multiply_rows<T, Pieces<S>::kPair>(
                      m, lanes > kL, packed_a + r * gemm::kPitch + k,
                      scratch + ((c - block) * size + k) * kColumns, std::min(part, size - k),
                      k > 0, tile, kColumns, gemm::Ahead{next, step},
                      std::make_integer_sequence<int, int(gemm::kRows)>());
                const bool add = !fresh || p > 0;
                for (int64_t y = 0; y < m; ++y)
                  for (int64_t v = 0; v < lanes; v += kL) {
                    T* const to = rows + y * columns + j + v;
                    const int64_t l = std::min(kL, lanes - v);
                    const V sum = load(tile + y * kColumns + v);
                    store(to, add ? sum + load(to, l) : sum, l);
                  }
              }
          }
        }
        p += size;
      } while (p < depth);
    }
    if (!sums.bias) return;
    for (int64_t g = 0; g < s.width(); ++g) {
      const Share vectors = vectors_of(at, g);
      const int64_t slot = s.mode == Mode::kGru ? (g + 1) % 4 : g;  // n is the first
      for (int64_t v = vectors.begin * kL; v < vectors.end * kL; v += kL) {
        const int64_t lanes = std::min(kL, s.hidden - v);
        T* const to = sums.bias + slot * s.hidden + v;
        const V sum = sum_of_rows<T>(
            n, [&](int64_t r) { return pieces.get(r, g * gate_units() + v, lanes); });
        store(to, fresh ? sum : sum + load(to, lanes), lanes);
      }
    }
  }

  // The same of the only step, n rows.
  void weights_once(const Place& at, int64_t d, int64_t n, const Scratch& to, T* scratch) const {
    const Products& sums = products[size_t(d)];
    const gemm::Matrix<S> z{to.grad_gates, pitch, 1};  // of a GRU n r z meet x
    const auto put = [](T* at, V value, int64_t lanes) { store(at, value, lanes); };
    const Share mine(parts(own, gemm::kRows), at.mine(), at.all);
    const int64_t i0 = mine.begin * gemm::kRows, i1 = std::min(own, mine.end * gemm::kRows);
    const gemm::Rows<S> xs{x.data()}, hs{sums.h.data()};
    const gemm::Matrix<S> for_h{to.grad_gates + (width - own), 1, pitch};
    constexpr int64_t part = gemm::kDepth;
    if (n > 0 && gemm::words<S>(n) <= gemm::kDepth) {
      // Of a GRU the rows for n come first.
      const int64_t cut = s.mode == Mode::kGru ? std::clamp(s.hidden, i0, i1) : i0;
      for (const Share& rows : {Share{i0, cut}, Share{cut, i1}})
        if (rows.begin < rows.end)
          short_product(z.transposed(), xs, rows, s.inputs, n, part, false, scratch,
                        sums.w_ih + (gate(rows.begin) - rows.begin) * s.inputs);
      short_product(for_h, hs, Share{i0, i1}, s.state, n, part, false, scratch, sums.w_hh);
    } else if (s.mode == Mode::kGru) {
      gemm::run(z.transposed(), xs, i0, i1, 0, s.inputs, n, scratch,
                [&](int64_t i, int64_t j, int64_t lanes, V value) {
                  put(sums.w_ih + gate(i) * s.inputs + j, value, lanes);
                });
      gemm::run(for_h, hs, i0, i1, 0, s.state, n, scratch,
                [&](int64_t i, int64_t j, int64_t lanes, V value) {
                  put(sums.w_hh + i * s.state + j, value, lanes);
                });
    } else {
      const Beside<S> beside{xs, hs, s.inputs, s.state};
      const int64_t split = beside.first();
      gemm::run(z.transposed(), beside, i0, i1, 0, beside.columns(), n, scratch,
                [&](int64_t i, int64_t j, int64_t lanes, V value) {
                  if (j < split)
                    put(sums.w_ih + i * s.inputs + j, value, std::min(lanes, s.inputs - j));
                  else
                    put(sums.w_hh + i * s.state + j - split, value, lanes);
                });
    }
    if (!sums.bias) return;
    const Share columns(parts(width, kL), at.mine(), at.all);
    for (int64_t j = columns.begin * kL; j < std::min(width, columns.end * kL); j += kL) {
      const int64_t lanes = std::min(kL, width - j);
      store(sums.bias + j, sum_of_rows<T>(n, [&](int64_t r) { return load(z.at(r, j), lanes); }),
            lanes);
    }
  }

  void projection_product(const Place& at, int64_t d, int64_t n, bool fresh, const Scratch& to,
                          T* scratch) const {
    const Share out(parts(s.state, gemm::kRows), at.mine(), at.all);
    gemm::run(gemm::Matrix<S>{to.grad_state, 1, s.state}, gemm::Matrix<S>{to.full, s.hidden, 1},
              out.begin * gemm::kRows, std::min(s.state, out.end * gemm::kRows), 0, s.hidden, n,
              scratch, [&](int64_t i, int64_t j, int64_t lanes, V value) {
                T* const at = products[size_t(d)].w_hr + i * s.hidden + j;
                store(at, fresh ? value : value + load(at, lanes), lanes);
              });
  }

  // From the gradient of the projected state to the gates.
  void project(const Place& at, int64_t d, int64_t t, const Share& rows, int64_t later,
               int64_t active, int64_t first, const Scratch& to, const Pieces<S>& pieces,
               T* tile) const {
    const Share mine(parts(s.hidden, kColumns), at.part, at.parts);
    const int64_t end = std::min(rows.end, std::max(later, active));
    for (int64_t p = mine.begin; p < mine.end; ++p)
      for (int64_t row = rows.begin; row < end; row += kStepRows) {
        const int64_t m = std::min(kStepRows, end - row);
        const int64_t n = std::clamp<int64_t>(active - row, 0, m);
        if (n)
          to.state.multiply(row, n, 0, s.state, to.w_hr + p * gemm::words<S>(s.state) * kColumns,
                            false, tile);
        for (int64_t v = 0; v < kColumns; v += kL) {
          const int64_t unit = p * kColumns + v, lanes = std::min(kL, s.hidden - unit);
          if (lanes <= 0) break;
          if (n) cells_of({d, t, row, n, unit, lanes, tile + v, first, to, pieces});
          for (int64_t r = n; grad_cx && r < m; ++r)
            store(grad_cx + (d * s.batch + row + r) * s.hidden + unit,
                  load(to.carry + (unit / kL * s.batch + row + r) * kL), lanes);
        }
      }
  }
};

// The gradients of the weights of `rows` rows of cells' steps, at most kDepth, on top of the sums
// or, where they are fresh, in their place: from the gradients of the gates and, beside each other,
// x in columns filled up and h.
template <typename S>
void add_weights(const Shape& s, int64_t rows, const S* grad_gates, int64_t pitch, const S* beside,
                 int64_t beside_pitch, bool fresh, accumulate_t<S>* w_ih, accumulate_t<S>* w_hh,
                 accumulate_t<S>* b_ih, accumulate_t<S>* b_hh) {
  using T = accumulate_t<S>;
  constexpr int64_t kL = Vec<T>::size;
  const int64_t own = s.gates() * s.hidden, width = s.width() * s.hidden, from_h = width - own;
  const int64_t turn = s.mode == Mode::kGru ? s.hidden : 0;
  const auto gate = [turn](int64_t i) { return i < turn ? i + 2 * turn : i - turn; };
  const gemm::Matrix<S> x{beside, beside_pitch, 1},
      h{x.at(0, beside_pitch - s.state), beside_pitch, 1};
  const gemm::Matrix<S> z{grad_gates, 1, pitch}, for_h{grad_gates + from_h, 1, pitch};
  const int64_t threads = std::clamp<int64_t>(rows * own * (s.inputs + s.state) / gemm::kGrain, 1,
                                              torch::stable::get_num_threads());
  const int64_t size =
      Aligned<T>::padded(gemm::scratch_size<S>(own, std::max(s.inputs, s.state), rows));
  const Aligned<T> memory(threads * size);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    T* const scratch = memory.get() + begin * size;
    const Share mine(parts(own, gemm::kRows) * begin / threads * gemm::kRows,
                     std::min(own, parts(own, gemm::kRows) * end / threads * gemm::kRows));
    const int64_t cut = std::clamp(turn, mine.begin, mine.end);
    const auto product = [&](const auto& a, const auto& b, const Share& of, int64_t n, T* to) {
      if (of.begin < of.end)
        Backward<S>::short_product(a, b, of, n, rows, gemm::kDepth, !fresh, scratch, to);
    };
    for (const Share& of : {Share{mine.begin, cut}, Share{cut, mine.end}})
      product(z, x, of, s.inputs, w_ih + (gate(of.begin) - of.begin) * s.inputs);
    product(for_h, h, mine, s.state, w_hh);
  });
  if (!b_ih) return;
  torch::stable::parallel_for(0, parts(width, kL), 8, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kL; j < std::min(width, end * kL); j += kL) {
      const int64_t lanes = std::min(kL, width - j);
      T sum[kL];
      store(sum, sum_of_rows<T>(
                     rows, [&](int64_t r) { return load(grad_gates + r * pitch + j, lanes); }));
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t i = j + l, of_h = i - from_h;
        if (i < own) b_ih[gate(i)] = fresh ? sum[l] : sum[l] + b_ih[gate(i)];
        if (of_h >= 0) b_hh[of_h] = fresh ? sum[l] : sum[l] + b_hh[of_h];
      }
    }
  });
}

}  // namespace dlkernels::lstm

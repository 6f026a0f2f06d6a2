// Cross-entropy of blocks of rows with lanes running over rows, so that no row needs a horizontal
// sum: `columns` where classes are strided and rows contiguous, `transposed` where classes are
// contiguous but few, through a transposition in registers.
#pragma once

#include "cross_entropy.h"

namespace dlkernels::cross_entropy {

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

// Pieces of n rows of one class are too short for the hardware to see a stream in them. They are
// asked for kBytesAhead early, the next block's after the last; no earlier: a power of two apart,
// pieces share few sets of a cache.
template <typename S>
struct PiecesAhead {
  int64_t classes, ahead, stride, wrap;

  PiecesAhead(const Layout& layout, int64_t classes, int64_t n)
      : classes(classes), ahead(std::min(classes, 1 + kBytesAhead / (n * int64_t(sizeof(S))))) {
    stride = ahead * layout.class_stride;
    wrap = stride - classes * layout.class_stride + n;
  }
  const S* of(const S* piece, int64_t c) const {
    return piece + (c + ahead < classes ? stride : wrap);
  }
};

// Rows of Vec::size copied densely: their classes at c … c + kPiece − 1 as vectors over the rows.
// Reads and writes up to kPiece − 1 elements past a row: into the next one, or the buffer's end.
template <typename T>
int64_t tile_pitch(int64_t classes) {
  static_assert(Vec<T>::size * kTransposedClasses + kPiece<T> <= kChunk, "a chunk holds no tile");
  return std::max(classes, kPiece<T>);
}

// Reads the values of rows [row, row + n) once, calling sink(c, i, v) with v the lanes i … of class
// c; lanes beyond n are 0. Each class's piece of a block is a stream of its own, often a power of
// two apart, which caches take badly.
template <typename S, typename Sink>
void read_columns(const Problem<S>& p, const Layout& layout, const S* x, int64_t row, int64_t n,
                  int64_t* offset, accumulate_t<S>* buffer, const Sink& sink) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t classes = p.layout.classes;
  constexpr int64_t kLine = 64 / sizeof(S);
  if (p.walk == Walk::kColumns) {
    x += offset_of(layout, row);
    const PiecesAhead<S> ahead(layout, classes, n);
    for (int64_t c = 0; c < classes; ++c, x += layout.class_stride) {
      const S* next = ahead.of(x, c);
      for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(next + i);
      for (int64_t i = 0; i < n; i += V::size) sink(c, i, load(x + i, std::min(V::size, n - i)));
    }
    return;
  }
  offsets_of(layout, row, n, offset);
  const int64_t pitch = tile_pitch<T>(classes);
  const auto copy = [](const S* from, T* to, int64_t size) {
    for (int64_t c = 0; c < size; c += V::size) {
      const int64_t lanes = std::min(V::size, size - c);
      __builtin_prefetch(from + c + kBytesAhead / int64_t(sizeof(S)));
      store(to + c, load(from + c, lanes), lanes);
    }
  };
  for (int64_t i = 0; i < n; i += V::size) {
    const int64_t rows = std::min(V::size, n - i);
    if (offset[i + rows - 1] - offset[i] == (rows - 1) * pitch)
      copy(x + offset[i], buffer, (rows - 1) * pitch + classes);
    else
      for (int64_t r = 0; r < rows; ++r) copy(x + offset[i + r], buffer + r * pitch, classes);
    std::fill(buffer + (rows - 1) * pitch + classes, buffer + V::size * pitch + kPiece<T>, T(0));
    for (int64_t c = 0; c < classes; c += kPiece<T>) {
      V piece[kPiece<T>];
      for (int64_t q = 0; q < kPiece<T>; ++q)
        piece[q] = load_pieces(buffer + q * pitch + c, kPiece<T> * pitch);
      transpose_pieces(piece);
      for (int64_t k = 0; k < kPiece<T>; ++k)
        if (c + k < classes) sink(c + k, i, piece[k]);
    }
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
  read_columns(p, p.layout, p.input, row, n, b.offset, s.buffer, [&](int64_t c, int64_t i, V v) {
    if (cap != 0) {
      const V u = squash(v, cap);
      store(s.squashed + c * pitch + i, u);
      v = V(cap) * u;
    }
    store(values + c * pitch + i, v);
  });
  if constexpr (kind == Kind::kProbability) {
    const V kept(1 - p.smoothing()), uniform(p.uniform());
    read_columns(p, p.target_layout, p.probability, row, n, b.offset, s.buffer,
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
    if constexpr (kind == Kind::kProbability) v = v * load(b.outer + i);
    if (has_cap) {
      const V u = load(s.squashed + c * pitch + i);
      v = v * (V(T(1)) - u * u);
    }
    return v;
  };
  if (p.walk == Walk::kColumns) {
    S* gradient = p.gradient + offset_of(layout, row);
    constexpr int64_t kLine = 64 / sizeof(S);
    const PiecesAhead<S> ahead(layout, classes, n);
    for (int64_t c = 0; c < classes; ++c) {
      S* piece = gradient + c * layout.class_stride;
      const S* next = ahead.of(piece, c);
      for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(next + i, 1);
      for (int64_t i = 0; i < n; i += V::size)
        store(piece + i, value(c, i, load(b.scale + i), load(b.spread + i)),
              std::min(V::size, n - i));
    }
    for (int64_t i = 0; i < n; ++i) b.offset[i] = gradient - p.gradient + i;
  } else {
    offsets_of(layout, row, n, b.offset);
    const int64_t tile = tile_pitch<T>(classes);
    const auto copy = [](const T* from, S* to, int64_t size) {
      for (int64_t c = 0; c < size; c += V::size) {
        __builtin_prefetch(to + c + kBytesAhead / int64_t(sizeof(S)), 1);
        store(to + c, load(from + c), std::min(V::size, size - c));
      }
    };
    for (int64_t i = 0; i < n; i += V::size) {
      const V scale = load(b.scale + i), spread = load(b.spread + i);
      const int64_t rows = std::min(V::size, n - i);
      // From the last classes down: what is written past a row is overwritten after.
      for (int64_t c = (classes - 1) / kPiece<T> * kPiece<T>; c >= 0; c -= kPiece<T>) {
        V piece[kPiece<T>];
        for (int64_t k = 0; k < kPiece<T>; ++k)
          piece[k] = c + k < classes ? value(c + k, i, scale, spread) : V(T(0));
        transpose_pieces(piece);
        for (int64_t q = 0; q < kPiece<T>; ++q)
          store_pieces(s.buffer + q * tile + c, kPiece<T> * tile, piece[q]);
      }
      if (b.offset[i + rows - 1] - b.offset[i] == (rows - 1) * tile)
        copy(s.buffer, p.gradient + b.offset[i], (rows - 1) * tile + classes);
      else
        for (int64_t r = 0; r < rows; ++r)
          copy(s.buffer + r * tile, p.gradient + b.offset[i + r], classes);
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

// Convolutions of small images: a product of matrices for each pair of a pixel and a tap that meet
// inside the image, whose rows are the images of the batch. What lies beyond the edges is not
// multiplied: of a 3×3 kernel on 2×2 images with padding 1 that is 20 of 36 pairs.
//
//   Y[n, p, k]  = Σ_(q, t) Σ_c X[n, q, c]·W[t, c, k]      pixel p and tap t meet pixel q
//   dX[n, q, c] = Σ_(p, t) Σ_k dY[n, p, k]·W[t, k, c]
//   dW[t, k, c] = Σ_(p, q) Σ_n dY[n, p, k]·X[n, q, c]
//
// The images are packed whole, once, as gemm.h's panels of A, and for dW's sums over the batch also
// of B. Of the weight a panel of columns and kDepth words is packed at a time, all its taps, and
// stays in L2 while all images pass by. Threads share the panels, of dW its tiles.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "conv2d_shape.h"
#include "gemm.h"
#include "memory.h"
#include "simd.h"

namespace dlkernels::conv2d::small {

using gemm::kDepth, gemm::kPitch, gemm::kRows;

// ------------------------------------------------------------------------------------------- pairs

// Along one axis: how many outputs and taps meet a pixel.
inline int64_t meetings(const Shape& shape, int axis) {
  const int64_t size = axis ? shape.w : shape.h, outputs = axis ? shape.q : shape.p;
  const int64_t taps = axis ? shape.s : shape.r;
  int64_t count = 0;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t at = o * shape.stride[axis] - shape.padding[axis] + t * shape.dilation[axis];
      count += at >= 0 && at < size;
    }
  return count;
}
// Of an image.
inline int64_t meetings(const Shape& shape) { return meetings(shape, 0) * meetings(shape, 1); }

// A product that pixel `to` of the result takes of pixel `from` of the source.
struct Term {
  int64_t to, from, tap;
};

// All of them, those of a pixel of the source in turn; of the input gradient's where `of_input`.
inline std::vector<Term> terms(const Shape& shape, bool of_input) {
  std::vector<Term> made;
  for (int64_t p = 0; p < shape.p; ++p)
    for (int64_t q = 0; q < shape.q; ++q)
      for (int64_t r = 0; r < shape.r; ++r)
        for (int64_t s = 0; s < shape.s; ++s) {
          const int64_t y = p * shape.stride[0] - shape.padding[0] + r * shape.dilation[0];
          const int64_t x = q * shape.stride[1] - shape.padding[1] + s * shape.dilation[1];
          if (y < 0 || y >= shape.h || x < 0 || x >= shape.w) continue;
          const int64_t output = p * shape.q + q, input = y * shape.w + x;
          const int64_t tap = r * shape.s + s;
          made.push_back(of_input ? Term{input, output, tap} : Term{output, input, tap});
        }
  const auto earlier = [](const Term& a, const Term& b) { return a.from < b.from; };
  std::stable_sort(made.begin(), made.end(), earlier);
  return made;
}

// ----------------------------------------------------------------------------------------- packing

// For each pixel a matrix of rows × k as gemm's panels of A; of short rows several pixels' side by
// side.
template <typename S>
class Panels {
 public:
  using T = accumulate_t<S>;

  // The matrix of pixel i is `first` with its data i · step later.
  Panels(const gemm::Matrix<S>& first, int64_t rows, int64_t k, int64_t pixels, int64_t step)
      : rows_(rows),
        words_(gemm::words<S>(k)),
        width_(gemm::round_up(std::min(words_, kDepth), Vec<T>::size)),
        beside_(std::max<int64_t>(1, kDepth / width_)),
        groups_((pixels + beside_ - 1) / beside_),
        memory_(chunks() * groups_ * rows * kPitch) {
    const int64_t blocks = (rows + gemm::kBlockRows - 1) / gemm::kBlockRows;
    torch::stable::parallel_for(0, chunks() * pixels * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t row = at % blocks * gemm::kBlockRows, pixel = at / blocks % pixels;
        const int64_t chunk = at / blocks / pixels;
        gemm::Matrix<S> matrix = first;
        matrix.data += pixel * step;
        gemm::pack_a(matrix, row, std::min(gemm::kBlockRows, rows - row), chunk * kDepth,
                     depth(chunk), k, place(pixel, chunk) + row * kPitch);
      }
    });
  }
  int64_t chunks() const { return (words_ + kDepth - 1) / kDepth; }
  int64_t depth(int64_t chunk) const { return std::min(kDepth, words_ - chunk * kDepth); }
  const T* at(int64_t pixel, int64_t chunk, int64_t row) const {
    return place(pixel, chunk) + row * kPitch;
  }

 private:
  T* place(int64_t pixel, int64_t chunk) const {
    return memory_.get() + (chunk * groups_ + pixel / beside_) * rows_ * kPitch +
           pixel % beside_ * width_;
  }
  int64_t rows_, words_, width_, beside_, groups_;
  Aligned<T> memory_;
};

// Whether the taps of two channels are neighbours in memory, and those of the next input channel
// theirs.
template <typename S>
bool are_neighbours(const Shape& shape, const Weight<S>& w) {
  return w.stride[1] == shape.r * shape.s && (shape.r == 1 || w.stride[2] == shape.s) &&
         (shape.s == 1 || w.stride[3] == 1);
}

// The weight of a correlation: for each tap a matrix of inputs × outputs, which are C × K, or
// K × C where it is `turned`.
template <typename S>
class Taps {
 public:
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t inputs, outputs;

  Taps(const Shape& shape, Weight<const S> w, bool turned, const std::vector<Term>& terms)
      : inputs(turned ? shape.k : shape.c),
        outputs(turned ? shape.c : shape.k),
        w_(w),
        taps_(shape.r * shape.s),
        s_(shape.s),
        turned_(turned),
        beside_(taps_ > 1 && are_neighbours(shape, w)),
        place_(size_t(taps_), -1) {
    for (const Term& term : terms) place_[size_t(term.tap)] = 0;
    for (int64_t& place : place_)
      if (place == 0) place = used_++;
  }
  // How many meet a pixel, and which of them each is.
  int64_t used() const { return used_; }
  int64_t place(int64_t tap) const { return place_[size_t(tap)]; }

  // Words [p, p + depth) of the outputs from o on: a panel for each tap used, `stride` apart.
  void pack(int64_t o, int64_t p, int64_t depth, T* to, int64_t stride) const {
    if constexpr (std::is_same_v<S, T>)
      if (beside_ && taps_ <= kStaged) return pack_beside(o, p, depth, to, stride);
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const gemm::Matrix<S> b{w_.at(0, 0, tap / s_, tap % s_), w_.stride[turned_ ? 0 : 1],
                              w_.stride[turned_ ? 1 : 0]};
      if (place(tap) >= 0) pack_panel(b, p, depth, inputs, o, to + place(tap) * stride);
    }
  }

 private:
  static constexpr int64_t kColumns = gemm::kColumns<T>, kStaged = 144;  // rows

  void pack_panel(const gemm::Matrix<S>& b, int64_t p, int64_t depth, int64_t k, int64_t o,
                  T* to) const {
    for (int64_t v = 0; v < kColumns; v += V::size)
      gemm::pack_columns(b, p, depth, k, o + v, std::clamp<int64_t>(outputs - o - v, 0, V::size),
                         to + v);
  }
  // Of taps that are neighbours, which are read together.
  void pack_beside(int64_t o, int64_t p, int64_t depth, T* to, int64_t stride) const {
    const int64_t at_once = kStaged / taps_, columns = std::min(kColumns, outputs - o);
    const bool pieces = turned_ && columns == kColumns && taps_ >= kPiece<T>;
    T staged[kStaged * kColumns];
    for (int64_t i = 0; i < depth; i += at_once) {
      const int64_t count = std::min(at_once, depth - i), then = p + i + at_once;
      // Rows a page apart are no stream to the hardware.
      if (turned_)
        prefetch(w_.data + then * w_.stride[0] + o * taps_, count, columns * taps_);
      else
        prefetch(w_.data + o * w_.stride[0] + then * taps_, columns, count * taps_);
      T* const at = to + i * kColumns;
      if (pieces) {
        for (int64_t q = 0; q < count; ++q)
          transpose_taps(w_.data + (p + i + q) * w_.stride[0] + o * taps_, at + q * kColumns,
                         stride);
        continue;
      }
      if (turned_)
        for (int64_t q = 0; q < count; ++q)
          pack_panel({w_.data + (p + i + q) * w_.stride[0], 1, taps_}, 0, taps_, taps_, o,
                     staged + q * taps_ * kColumns);
      else
        pack_panel({w_.data, 1, w_.stride[0]}, (p + i) * taps_, count * taps_, inputs * taps_, o,
                   staged);
      for (int64_t q = 0; q < count; ++q)
        for (int64_t tap = 0; tap < taps_; ++tap)
          if (place(tap) >= 0)
            std::copy_n(staged + (q * taps_ + tap) * kColumns, kColumns,
                        at + place(tap) * stride + q * kColumns);
    }
  }
  void prefetch(const S* from, int64_t rows, int64_t length) const {
    for (int64_t row = 0; row < rows; ++row, from += w_.stride[0])
      for (int64_t at = 0; at < length; at += 64 / int64_t(sizeof(S)))
        __builtin_prefetch(from + at, 0, 2);
  }
  // A panel's columns × taps.
  void transpose_taps(const T* from, T* to, int64_t stride) const {
    for (int64_t v = 0; v < kColumns; v += V::size)
      for (int64_t t = 0; t < taps_; t += kPiece<T>) {
        const int64_t first = std::min(t, taps_ - kPiece<T>);
        V taps[kPiece<T>];
        for (int64_t r = 0; r < kPiece<T>; ++r)
          taps[r] = load_pieces(from + (v + r) * taps_ + first, kPiece<T> * taps_);
        transpose_pieces(taps);
        for (int64_t r = 0; r < kPiece<T>; ++r)
          if (place(first + r) >= 0) store(to + place(first + r) * stride + v, taps[r]);
      }
  }

  const Weight<const S> w_;
  const int64_t taps_, s_;
  const bool turned_, beside_;
  std::vector<int64_t> place_;
  int64_t used_ = 0;
};

// ------------------------------------------------------------------------------------------- whole

// Rows of `rows` in tiles of about the same height.
struct Split {
  int64_t rows, height;
  explicit Split(int64_t rows) : rows(rows) {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    height = (rows + tiles - 1) / tiles;
  }
  int64_t count() const { return (rows + height - 1) / height; }
};

template <typename S>
void multiply(int64_t height, int64_t width, const accumulate_t<S>* a, const accumulate_t<S>* b,
              int64_t depth, bool add, accumulate_t<S>* sums) {
  using T = accumulate_t<S>;
  const gemm::Ahead none{reinterpret_cast<const char*>(sums), 0};
  gemm::multiply_rows<T, gemm::Word<S>::kPair>(height, width > Vec<T>::size, a, b, depth, add, sums,
                                               gemm::kColumns<T>, none,
                                               std::make_integer_sequence<int, int(kRows)>());
}

// y = epilogue(Σ of the terms) of n images: of `from` pixels in x, of `to` in y.
template <typename S, typename Epilogue>
void correlate(const std::vector<Term>& terms, int64_t n, const S* x, int64_t from,
               const Taps<S>& taps, S* y, int64_t to, const Epilogue& epilogue) {
  using T = accumulate_t<S>;
  constexpr int64_t columns = gemm::kColumns<T>, kBytes = 256 << 10;  // of sums
  const Panels<S> images(gemm::Matrix<S>{x, from * taps.inputs, 1}, n, taps.inputs, from,
                         taps.inputs);
  const int64_t panels = (taps.outputs + columns - 1) / columns;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t fit = std::max<int64_t>(1, kBytes / int64_t(sizeof(T)) / (to * columns));
  const int64_t parts = std::min(n, std::max((n + fit - 1) / fit, threads / panels));
  const int64_t most = (n + parts - 1) / parts;
  // Off powers of two: the taps of a word are written in turn.
  const int64_t stride = images.depth(0) * columns + Vec<T>::size;
  const int64_t u_size = stride * taps.used();
  const int64_t size = Aligned<T>::padded(u_size + most * to * columns);
  const Aligned<T> memory(threads * size);
  std::atomic<int64_t> callers{0};
  torch::stable::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    T* const u = memory.get() + callers.fetch_add(1) * size;
    T* const sums = u + u_size;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task / parts * columns, width = std::min(columns, taps.outputs - o);
      const int64_t first = task % parts * most;
      if (first >= n) continue;
      const Split split(std::min(most, n - first));
      for (int64_t chunk = 0; chunk < images.chunks(); ++chunk) {
        const int64_t depth = images.depth(chunk);
        taps.pack(o, chunk * kDepth, depth, u, stride);
        for (int64_t row = 0; row < split.rows; row += split.height) {
          const int64_t height = std::min(split.height, split.rows - row);
          T* const tile = sums + row * to * columns;
          if (chunk == 0) std::fill_n(tile, height * to * columns, T(0));
          for (const Term& term : terms)
            multiply<S>(height, width, images.at(term.from, chunk, first + row),
                        u + taps.place(term.tap) * stride, depth, true,
                        tile + term.to * height * columns);
          if (chunk + 1 < images.chunks()) continue;
          for (int64_t pixel = 0; pixel < to; ++pixel)
            for (int64_t r = 0; r < height; ++r)
              for (int64_t v = 0; v < width; v += Vec<T>::size) {
                const int64_t lanes = std::min(Vec<T>::size, width - v);
                store(y + ((first + row + r) * to + pixel) * taps.outputs + o + v,
                      epilogue(load(tile + (pixel * height + r) * columns + v), o + v, lanes),
                      lanes);
              }
        }
      }
    }
  });
}

template <typename S, typename Epilogue>
void forward(const Shape& shape, const S* x, Weight<const S> w, S* y, const Epilogue& epilogue) {
  const std::vector<Term> pairs = terms(shape, false);
  const Taps<S> taps(shape, w, false, pairs);
  correlate(pairs, shape.n, x, shape.h * shape.w, taps, y, shape.p * shape.q, epilogue);
}

template <typename S, typename Epilogue>
void input_gradient(const Shape& shape, const S* dy, Weight<const S> w, S* dx,
                    const Epilogue& epilogue) {
  const std::vector<Term> pairs = terms(shape, true);
  const Taps<S> taps(shape, w, true, pairs);
  correlate(pairs, shape.n, dy, shape.p * shape.q, taps, dx, shape.h * shape.w, epilogue);
}

// `rows` × `columns` channels of dW from (k, c) on, from sums of kColumns a row, taps `stride`
// apart, of which there are whole vectors.
template <typename S>
void write_weight(const accumulate_t<S>* sums, int64_t stride, const Shape& shape, int64_t rows,
                  int64_t columns, const Weight<S>& dw, int64_t k, int64_t c) {
  using T = accumulate_t<S>;
  using V = Vec<T>;
  const int64_t taps = shape.r * shape.s;
  for (int64_t r = 0; r < rows; ++r, sums += gemm::kColumns<T>) {
    if constexpr (std::is_same_v<S, T>)
      if (taps > 1 && are_neighbours(shape, dw)) {
        T* const row = dw.at(k + r, c, 0, 0);
        for (int64_t v = 0; v < columns; v += kPiece<T>)
          for (int64_t tap = 0; tap < taps; tap += V::size) {
            V channels[kPiece<T>];
            for (int64_t q = 0; q < kPiece<T>; ++q)
              channels[q] = load_pieces(sums + (tap + q) * stride + v, kPiece<T> * stride);
            transpose_pieces(channels);
            for (int64_t q = 0; q < std::min(kPiece<T>, columns - v); ++q) {
              // What is written beyond the taps is of channels whose turn comes.
              const int64_t at = (v + q) * taps + tap;
              const bool whole = taps <= V::size && at + V::size <= columns * taps;
              store(row + at, channels[q], whole ? V::size : std::min(V::size, taps - tap));
            }
          }
        continue;
      }
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t v = 0; v < columns; v += V::size) {
        const int64_t lanes = std::min(V::size, columns - v);
        const T* const from = sums + tap * stride + v;
        S* const at = dw.at(k + r, c + v, tap / shape.s, tap % shape.s);
        if (dw.stride[1] == 1)
          store(at, load(from), lanes);
        else
          for (int64_t l = 0; l < lanes; ++l) at[l * dw.stride[1]] = narrow<S>(from[l]);
      }
  }
}

template <typename S>
void weight_gradient(const Shape& shape, const S* dy, const S* x, const Weight<S>& dw) {
  using T = accumulate_t<S>;
  constexpr int64_t columns = gemm::kColumns<T>;
  const int64_t from = shape.h * shape.w, to = shape.p * shape.q, taps = shape.r * shape.s;
  std::vector<Term> pairs = terms(shape, false);
  const auto earlier = [](const Term& a, const Term& b) { return a.tap < b.tap; };
  std::stable_sort(pairs.begin(), pairs.end(), earlier);
  const Panels<S> a(gemm::Matrix<S>{dy, 1, to * shape.k}, shape.k, shape.n, to, shape.k);
  const int64_t words = gemm::words<S>(shape.n), panels = (shape.c + columns - 1) / columns;
  const Split split(shape.k);
  const int64_t tile = split.height * columns;
  const int64_t size = Aligned<T>::padded(gemm::round_up(taps, Vec<T>::size) * tile);
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t b_size = panels * from * words * columns;
  const Aligned<T> memory(b_size + threads * size);
  T* const b = memory.get();
  torch::stable::parallel_for(0, panels * from, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t c = at / from * columns, pixel = at % from;
      gemm::pack_b(gemm::Matrix<S>{x + pixel * shape.c, from * shape.c, 1}, 0, words, shape.n, c,
                   std::min(columns, shape.c - c), b + at * words * columns);
    }
  });
  std::atomic<int64_t> callers{0};
  torch::stable::parallel_for(0, split.count() * panels, 1, [&](int64_t begin, int64_t end) {
    T* const sums = b + b_size + callers.fetch_add(1) * size;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / panels * split.height, panel = task % panels;
      const int64_t height = std::min(split.height, shape.k - k);
      const int64_t width = std::min(columns, shape.c - panel * columns);
      auto pair = pairs.begin();
      for (int64_t tap = 0; tap < taps; ++tap) {
        bool add = false;
        for (; pair != pairs.end() && pair->tap == tap; ++pair)
          for (int64_t chunk = 0; chunk < a.chunks(); ++chunk, add = true)
            multiply<S>(height, width, a.at(pair->to, chunk, k),
                        b + ((panel * from + pair->from) * words + chunk * kDepth) * columns,
                        a.depth(chunk), add, sums + tap * tile);
        if (!add) std::fill_n(sums + tap * tile, height * columns, T(0));
      }
      write_weight<S>(sums, tile, shape, height, width, dw, k, panel * columns);
    }
  });
}

}  // namespace dlkernels::conv2d::small

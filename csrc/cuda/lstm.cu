// One layer of LSTM, GRU or RNN, all its directions, and their cells, on a GPU:
//   LSTM  i, f, o = σ(…), g = tanh(…), c = f·c' + i·g, h = o·tanh(c)
//   GRU   r, z = σ(…), n = tanh(W_in·x + b_in + r·(W_hn·h' + b_hn)), h = n + z·(h' − n)
//   RNN   h = tanh or relu
// with the gates in torch's order. x·W_ih of all steps is one product before, the gradients of
// weights and input are products after the loop over steps; these are torch's matmul.
//
// sequence_forward, sequence_backward: the whole loop in one launch, both directions. The batch is
// cut into groups; a group's K blocks share the hidden units, U each, and every block keeps its
// rows of W_hh, of W_hhᵀ in the backward: the first 64-byte pieces of a warp's rows in registers,
// as the operands of mma, the others in shared memory. What a step makes (h, or the gradients of
// the gates) goes to all blocks of the group, through L2 behind a barrier of the group's own (a
// word a block; nobody writes to another's), or, of at most 8 blocks on sm_90, into each other's
// shared memory as a cluster. There are two such vectors in turn: one barrier a step. c, gradients
// of the state and gates are float. Sequences that have ended are the last rows of a batch: they
// are skipped.
//   The sum over units runs in pieces of 64 bytes, of which each lane has 16: operands come from
//   memory, several pieces at once, and no ldmatrix is needed, as the order of a sum is free.
//   float32: TF32 products of the high and the low half of each number, three of four.
//
// step_forward, step_backward: what a step has beside its product, which is then torch's: where
// the weights do not fit, of projections, of float64, and of the cells.
//
// NOT MEASURED: how work is cut is reckoned; no GPU has timed it.
//
// The same bits every time: the shape alone fixes every order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>

#include "common.cuh"

namespace dlkernels {
namespace {

constexpr const char* kOp = "lstm";
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kMostDirections = 2;
constexpr int kPiece = 64;         // bytes of a row that a warp multiplies at once
constexpr int kRegisterTiles = 8;  // pieces of 16 rows that a warp keeps in registers
constexpr int kMostCluster = 8;
constexpr int kQuantum = 8;  // hidden units of a block: a multiple

enum class Mode { kLstm, kGru, kTanh, kRelu };
DLK_HOST_DEVICE int gates_of(Mode mode) {
  return mode == Mode::kLstm ? 4 : mode == Mode::kGru ? 3 : 1;
}

// The rows of each step: batch in all, or of packed sequences offsets[t] to offsets[t + 1].
struct Steps {
  const int64_t* offsets;
  int64_t batch;
  int count;

  // The rows of a step as they lie in memory, to be read ahead; none beyond the ends.
  struct Range {
    int64_t first = 0, end = 0;
  };
  DLK_DEVICE Range range(int t) const {
    if (t < 0 || t >= count) return {};
    if (offsets) return {offsets[t], offsets[t + 1]};
    return {t * batch, (t + 1) * batch};
  }
};

// ----------------------------------------------------------------------------------------- algebra

// From the sums of the gates, biases included (GRU: x[2] is the input's part of n, x[3] the
// state's), to the gates as they are saved. state: c of an LSTM, else h; returns the next h.
template <typename T>
DLK_DEVICE T forward_unit(Mode mode, T (&x)[4], T& state) {
  const auto sigmoid = [](T v) { return activate(v, Activation::kSigmoid); };
  const auto tanh_of = [](T v) { return activate(v, Activation::kTanh); };
  switch (mode) {
    case Mode::kLstm:
      x[0] = sigmoid(x[0]);
      x[1] = sigmoid(x[1]);
      x[2] = tanh_of(x[2]);
      x[3] = sigmoid(x[3]);
      state = x[1] * state + x[0] * x[2];
      return x[3] * tanh_of(state);
    case Mode::kGru:
      x[0] = sigmoid(x[0]);
      x[1] = sigmoid(x[1]);
      x[2] = tanh_of(x[2] + x[0] * x[3]);
      state = x[2] + x[1] * (state - x[2]);
      return state;
    case Mode::kTanh:
      return state = tanh_of(x[0]);
    default:
      return state = activate(x[0], Activation::kRelu);
  }
}

// What the backward of one unit reads. state: c of an LSTM, h of an RNN; before: c or h before.
template <typename T>
struct Kept {
  T gates[4], state, before;
};

// Gradients of the sums of the gates (GRU: d[3] is the one of the state's part of n), from that of
// h; dc is an LSTM's, of this c and then of the one before. Returns what reaches h before without
// the product.
template <typename T>
DLK_DEVICE T backward_unit(Mode mode, T dh, const Kept<T>& k, T& dc, T (&d)[4]) {
  const T(&x)[4] = k.gates;
  switch (mode) {
    case Mode::kLstm: {
      const T y = activate(k.state, Activation::kTanh);
      dc += dh * x[3] * (T(1) - y * y);
      d[0] = dc * x[2] * x[0] * (T(1) - x[0]);
      d[1] = dc * k.before * x[1] * (T(1) - x[1]);
      d[2] = dc * x[0] * (T(1) - x[2] * x[2]);
      d[3] = dh * y * x[3] * (T(1) - x[3]);
      dc *= x[1];
      return 0;
    }
    case Mode::kGru:
      d[2] = dh * (T(1) - x[1]) * (T(1) - x[2] * x[2]);
      d[0] = d[2] * x[3] * x[0] * (T(1) - x[0]);
      d[1] = dh * (k.before - x[2]) * x[1] * (T(1) - x[1]);
      d[3] = d[2] * x[0];
      return dh * x[1];
    case Mode::kTanh:
      d[0] = before_activation(dh, k.state, Activation::kTanh);
      return 0;
    default:
      d[0] = before_activation(dh, k.state, Activation::kRelu);
      return 0;
  }
}

// Gate g of the products with the state: of a GRU's n it is x[3].
template <typename T>
DLK_DEVICE T of_state(Mode mode, const T (&x)[4], int g) {
  return mode == Mode::kGru && g == 2 ? x[3] : x[g];
}
template <typename T>
DLK_DEVICE void add_of_state(Mode mode, T (&x)[4], int g, T value) {
  if (mode == Mode::kGru && g == 2)
    x[3] += value;
  else
    x[g] += value;
}

// x[g] += bias of the gates, of both sides.
template <typename S>
DLK_DEVICE void add_biases(Mode mode, const S* b_ih, const S* b_hh, int64_t hidden, int64_t unit,
                           accumulate_t<S> (&x)[4]) {
  if (!b_ih) return;
  const int gates = gates_of(mode);
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    if (g >= gates) break;
    x[g] += widen(b_ih[g * hidden + unit]);
    add_of_state(mode, x, g, widen(b_hh[g * hidden + unit]));
  }
}

// ------------------------------------------------------------------------------------------- steps

// One step of one direction, its products made.
template <typename S>
struct ForwardStep {
  using T = accumulate_t<S>;
  Mode mode;
  int64_t rows, hidden;
  const S* x;  // (rows, gates·hidden) of the input
  int64_t x_pitch;
  const S* h;  // of the state, contiguous
  const S *b_ih = nullptr, *b_hh = nullptr;
  const S* before = nullptr;   // h before, of a GRU
  const S* c_given = nullptr;  // c before, or
  T* c = nullptr;              // from here to here
  T* cells = nullptr;          // to be saved
  S* c_made = nullptr;
  S* output = nullptr;
  int64_t output_pitch = 0;
  S* state = nullptr;
  S* gates = nullptr;  // (rows, 4·hidden)
};

// ptxas: <= 64 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kThreads) step_forward_kernel(ForwardStep<S> p) {
  using T = accumulate_t<S>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.hidden) return;
  const int64_t row = i / p.hidden, unit = i % p.hidden;
  const int gates = gates_of(p.mode);
  T x[4] = {};
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    if (g >= gates) break;
    x[g] += widen(p.x[row * p.x_pitch + g * p.hidden + unit]);
    add_of_state(p.mode, x, g, widen(p.h[(row * gates + g) * p.hidden + unit]));
  }
  add_biases(p.mode, p.b_ih, p.b_hh, p.hidden, unit, x);
  T state = 0;
  if (p.mode == Mode::kLstm) state = p.c_given ? widen(p.c_given[i]) : p.c[i];
  if (p.mode == Mode::kGru) state = widen(p.before[i]);
  const S h = narrow<S>(forward_unit(p.mode, x, state));
  if (p.c) p.c[i] = state;
  if (p.cells) p.cells[i] = state;
  if (p.c_made) p.c_made[i] = narrow<S>(state);
  if (p.output) p.output[row * p.output_pitch + unit] = h;
  if (p.state) p.state[i] = h;
  if (p.gates) {
#pragma unroll
    for (int g = 0; g < 4; ++g) p.gates[(row * 4 + g) * p.hidden + unit] = narrow<S>(x[g]);
  }
}

template <typename S>
struct BackwardStep {
  using T = accumulate_t<S>;
  Mode mode;
  int64_t rows, hidden;
  int64_t continued;               // rows whose state before is not the first one
  const S* grad_output = nullptr;  // (rows, hidden) of a pitch
  const S* output = nullptr;       // of the same pitch
  int64_t output_pitch = 0;
  const S* grad_state = nullptr;    // through what followed
  T* direct = nullptr;              // the rest of that, of a GRU; then of the state before
  const S* grad_c_given = nullptr;  // of c, or
  T* grad_c = nullptr;              // from here to here
  S* grad_c_made = nullptr;
  S* grad_direct = nullptr;  // as `direct` is left, in the dtype
  const S* gates = nullptr;
  const S* c_given = nullptr;  // c, or
  const T* cells = nullptr;
  const T* cells_before = nullptr;  // c before: of the rows that continue, and of the others
  const S* c_first = nullptr;
  const S* h_before = nullptr;  // h before: the same, the first one of output's pitch
  const S* h_first = nullptr;
  S* grad_x;            // (rows, gates·hidden) of a pitch: for the input's products
  S* grad_h = nullptr;  // and the state's, of a GRU
  int64_t grad_pitch;
};

// ptxas: <= 64 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kThreads) step_backward_kernel(BackwardStep<S> p) {
  using T = accumulate_t<S>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.hidden) return;
  const int64_t row = i / p.hidden, unit = i % p.hidden;
  const int64_t at = row * p.output_pitch + unit;
  const bool continued = row < p.continued;
  T dh = 0;
  if (p.grad_output) dh += widen(p.grad_output[at]);
  if (p.grad_state) dh += widen(p.grad_state[i]);
  if (p.direct) dh += p.direct[i];
  Kept<T> kept{};
  if (p.gates) {
#pragma unroll
    for (int g = 0; g < 4; ++g) kept.gates[g] = widen(p.gates[(row * 4 + g) * p.hidden + unit]);
  }
  T dc = 0;
  if (p.mode == Mode::kLstm) {
    kept.state = p.cells ? p.cells[i] : widen(p.c_given[i]);
    kept.before = continued ? p.cells_before[i] : widen(p.c_first[i]);
    if (p.grad_c_given)
      dc = widen(p.grad_c_given[i]);
    else if (p.grad_c)
      dc = p.grad_c[i];
  } else if (p.mode == Mode::kGru) {
    kept.before = widen(continued ? p.h_before[at] : p.h_first[i]);
  } else {
    kept.state = widen(p.output[at]);
  }
  T d[4] = {};
  const T direct = backward_unit(p.mode, dh, kept, dc, d);
  const int gates = gates_of(p.mode);
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    if (g >= gates) break;
    const int64_t to = row * p.grad_pitch + g * p.hidden + unit;
    p.grad_x[to] = narrow<S>(d[g]);
    if (p.grad_h) p.grad_h[to] = narrow<S>(of_state(p.mode, d, g));
  }
  if (p.direct) p.direct[i] = direct;
  if (p.grad_c) p.grad_c[i] = dc;
  if (p.grad_direct) p.grad_direct[i] = narrow<S>(direct);
  if (p.grad_c_made) p.grad_c_made[i] = narrow<S>(dc);
}

constexpr int64_t kMostEights = 1024;

// h before each step, (rows of all steps, size): what W_hh was multiplied with.
template <typename S>
struct Before {
  Steps steps;
  bool reverse;
  int64_t size, output_pitch;
  const S *output, *hx;
  S* before;
};

// Grid: steps × eights of the batch, at most kMostEights at once. Block: a row a warp.
// ptxas: <= 40 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kThreads) before_kernel(Before<S> p) {
  const int t = int(blockIdx.x);
  const Steps::Range now = p.steps.range(t), from = p.steps.range(p.reverse ? t + 1 : t - 1);
  for (int64_t row = int64_t(blockIdx.y) * kWarps + warp_index(); now.first + row < now.end;
       row += int64_t(gridDim.y) * kWarps) {
    const bool continued = from.first + row < from.end;
    const S* source =
        continued ? p.output + (from.first + row) * p.output_pitch : p.hx + row * p.size;
    S* const to = p.before + (now.first + row) * p.size;
    for (int64_t i = lane(); i < p.size; i += kWarp) to[i] = source[i];
  }
}

// Offsets of steps as a kernel's parameters: a copy would read them when a captured graph runs.
struct Offsets {
  static constexpr int kMost = 240;  // parameters of 2 KB
  int64_t values[kMost];
  int64_t* to;
  int count;
};

// ptxas: <= 32 registers, 0 bytes static shared, 0 spills
DLK_KERNEL void __launch_bounds__(kThreads) offsets_kernel(Offsets p) {
  for (int i = int(threadIdx.x); i < p.count; i += kThreads) p.to[i] = p.values[i];
}

// h before its projection: o·tanh(c), of all steps.
// ptxas: <= 40 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kThreads)
    unprojected_kernel(const S* gates, const accumulate_t<S>* cells, S* h, int64_t rows,
                       int64_t hidden) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * hidden) return;
  const int64_t row = i / hidden, unit = i % hidden;
  h[i] = narrow<S>(widen(gates[(row * 4 + 3) * hidden + unit]) *
                   activate(cells[i], Activation::kTanh));
}

// to = a + b, of n numbers in rows of a's and to's pitches.
template <typename S>
struct Sum {
  int64_t rows, columns, a_pitch;
  const S* a;  // or null
  const S* b = nullptr;
  const accumulate_t<S>* wide = nullptr;  // instead of b
  S* to = nullptr;
};

// ptxas: <= 32 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kThreads) sum_kernel(Sum<S> p) {
  using T = accumulate_t<S>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.columns) return;
  T sum = 0;
  if (p.a) sum += widen(p.a[i / p.columns * p.a_pitch + i % p.columns]);
  sum += p.wide ? p.wide[i] : widen(p.b[i]);
  p.to[i] = narrow<S>(sum);
}

// --------------------------------------------------------------------------------- the whole loop

template <typename S>
constexpr int kPieceNumbers = kPiece / int(sizeof(S));

// How the loop is cut over blocks, and a block's shared memory.
struct Cut {
  int hidden, units, blocks;   // of a group: blocks · units >= hidden
  int rows, groups;            // sequences of a group; groups of a direction
  int row_gates, depth_gates;  // gates that the products are for, and that are exchanged
  int padded, pieces, pitch;   // numbers of an exchanged gate; pieces of a vector; its numbers
  int tiles, across, split;    // of 16 rows; warps side by side over tiles, and over pieces
  int columns, partial_pitch;  // sequences at once
  bool cluster;
  int kept_bytes, partial, state, bias, stage, exchange;  // places, behind the weights
  size_t shared;
};

DLK_HOST_DEVICE int kept_pieces(int tiles) { return kRegisterTiles / tiles; }

// Pieces of the vectors that a warp has under way at once: one after the other, each would take as
// long as memory takes to answer.
constexpr int pieces_ahead(int item, int columns) { return (item == 2 ? 12 : 7) / columns; }

// A block's place.
struct Place {
  int rank, direction, group, unit, sequence, rows;

  DLK_DEVICE Place(const Cut& c, int directions, int64_t batch) {
    rank = int(blockIdx.x) % c.blocks;
    group = int(blockIdx.x) / c.blocks;
    direction = group % directions;
    unit = rank * c.units;
    sequence = group / directions * c.rows;
    rows = int(batch) - sequence < c.rows ? int(batch) - sequence : c.rows;
  }
  // Of the group's sequences those that a step has.
  DLK_DEVICE int active(const Steps::Range& step) const {
    const int64_t n = step.end - step.first - sequence;
    return n < 0 ? 0 : n < rows ? int(n) : rows;
  }
};

// What a thread works at: a sequence of the group and a unit of the block. The first is divided
// once, not at each step.
struct Item {
  int row, unit;
};
class Items {
 public:
  DLK_DEVICE explicit Items(int units) : units_(units), first_(divided(int(threadIdx.x))) {}
  DLK_DEVICE Item operator[](int i) const { return i == int(threadIdx.x) ? first_ : divided(i); }

 private:
  DLK_DEVICE Item divided(int i) const { return {i / units_, i % units_}; }

  const int units_;
  const Item first_;
};

// What the blocks of a group tell each other: two vectors in turn, and who has come how far.
template <typename S>
class Exchange {
 public:
  DLK_DEVICE Exchange(const Cut& c, const Place& place, S* global, unsigned* flags)
      : cut_(c), unit_(place.unit), rank_(place.rank), first_(offset(int(threadIdx.x))) {
    const int64_t vectors = int64_t(c.rows) * c.pitch;
    base_ = c.cluster ? reinterpret_cast<S*>(shared_memory() + c.exchange)
                      : global + place.group * 2 * vectors;
    flags_ = flags + place.group * c.blocks;
    // The numbers that no block has, of weights that are zero.
    if (c.cluster || place.rank == 0) {
      const int first = c.depth_gates * c.padded, rest = c.pitch - first;
      for (int i = int(threadIdx.x); i < 2 * c.rows * rest; i += kThreads)
        base_[i / rest * c.pitch + first + i % rest] = S{};
    }
    if (c.cluster) sync_cluster();  // the others have begun
  }

  DLK_DEVICE const S* vector(int parity) const {
    return base_ + int64_t(parity) * cut_.rows * cut_.pitch;
  }

  // This block's units of n sequences, of `stage` [sequence][gate][unit], to all blocks.
  DLK_DEVICE void publish(int parity, const S* stage, int n) {
    const int each = cut_.depth_gates * (cut_.units / kVector<S>);
    S* const to = base_ + int64_t(parity) * cut_.rows * cut_.pitch;
    for (int i = int(threadIdx.x); i < n * each; i += kThreads) {
      const Bits16 bits = load16(stage + i * kVector<S>);
      S* const place = to + (i == int(threadIdx.x) ? first_ : offset(i));
      if (cut_.cluster) {
        for (int r = 0; r < cut_.blocks; ++r) store16(cluster_shared(place, unsigned(r)), bits);
      } else {
        store_global(place, bits);
      }
    }
  }

  DLK_DEVICE void arrive() {
    ++phase_;
    if (cut_.cluster) return cluster_arrive();
    sync_block();
    if (threadIdx.x == 0) store_release(flags_ + rank_, phase_);
  }

  // Until all have arrived as often as this block.
  DLK_DEVICE void wait() {
    if (cut_.cluster) return cluster_wait();
    if (int(threadIdx.x) < cut_.blocks)
      while (load_acquire(flags_ + threadIdx.x) < phase_) {
      }
    sync_block();
  }

 private:
  // Where the i-th 16 bytes of a stage go.
  DLK_DEVICE int offset(int i) const {
    const int of_gate = cut_.units / kVector<S>, each = cut_.depth_gates * of_gate;
    const int row = i / each, gate = i % each / of_gate, part = i % of_gate;
    return row * cut_.pitch + gate * cut_.padded + unit_ + part * kVector<S>;
  }

  const Cut& cut_;
  const int unit_, rank_, first_;
  S* base_;
  unsigned* flags_;
  unsigned phase_ = 0;
};

// d += a·x of a piece, for 16 rows and 8 sequences. Of a piece lane 4g + t has 16 bytes, from byte
// 16·t on, of rows g and g + 8 and of sequence g.
template <typename S>
DLK_DEVICE void multiply_piece(float (&d)[4], const Bits16 (&a)[2], const Bits16& x) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t rows[4] = {a[0].x[i], a[1].x[i], a[0].x[i + 1], a[1].x[i + 1]};
    const uint32_t column[2] = {x.x[i], x.x[i + 1]};
    if constexpr (is_half<S>) {
      mma_m16n8k16<S>(d, rows, column);
    } else {
      // high: 11 bits, rounded; low: the rest of them, to 2^-23.
      const auto high = [](uint32_t bits) { return (bits + 0x1000) & ~uint32_t(0x1fff); };
      const auto low = [&](uint32_t bits) {
        return bit_cast<uint32_t>(bit_cast<float>(bits) - bit_cast<float>(high(bits)));
      };
      const uint32_t high_rows[4] = {high(rows[0]), high(rows[1]), high(rows[2]), high(rows[3])};
      const uint32_t low_rows[4] = {low(rows[0]), low(rows[1]), low(rows[2]), low(rows[3])};
      const uint32_t high_column[2] = {high(column[0]), high(column[1])};
      const uint32_t low_column[2] = {low(column[0]), low(column[1])};
      mma_m16n8k8(d, low_rows, high_column);
      mma_m16n8k8(d, high_rows, low_column);
      mma_m16n8k8(d, high_rows, high_column);
    }
  }
}

// A block's rows of W_hh or W_hhᵀ, resident, times vectors of the exchange. A warp has up to kTiles
// tiles of rows and every split-th piece.
template <typename S, int kTiles, int kColumns>
class Product {
 public:
  // weight: (gates·hidden, depth_gates·hidden).
  DLK_DEVICE Product(const Cut& c, const S* weight, int unit)
      : cut_(c),
        tile_(warp_index() % c.across * kTiles),
        piece_(warp_index() / c.across),
        shared_(reinterpret_cast<Bits16*>(shared_memory())),
        partial_(reinterpret_cast<float*>(shared_memory() + c.partial)) {
    if (idle()) return;
    const bool aligned = is_aligned(weight) && c.hidden % kVector<S> == 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (tile_ + i) * 16 + half * 8 + lane() / 4;
        const int gate = row / c.units, column = unit + row % c.units;
        const S* from = nullptr;
        if (gate < c.row_gates && column < c.hidden)
          from = weight + (int64_t(gate) * c.hidden + column) * c.depth_gates * c.hidden;
#pragma unroll
        for (int j = 0; j < kKept; ++j)
          kept_[i][j][half] = load(from, piece_ + j * c.split, aligned);
        if (tile_ + i >= c.tiles) continue;
        for (int at = piece_ + kKept * c.split; at < c.pieces; at += c.split)
          *resident(i, at, half) = load(from, at, aligned);
      }
  }

  // To the partial sums, of `active` vectors.
  DLK_DEVICE void multiply(const S* vectors, int active) {
    if (idle()) return;
    Sums sums = {};
    constexpr int kTurns = (kKept + kAhead - 1) / kAhead;  // that have weights in registers
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn)
      add(sums, vectors, turn * kAhead, active, [&](int i, int j, int at, int half) {
        const int kept = turn * kAhead + j;
        return kept < kKept ? kept_[i][kept % kKept][half] : *resident(i, at, half);
      });
#pragma unroll 1
    for (int first = kTurns * kAhead; piece_ + first * cut_.split < cut_.pieces; first += kAhead)
      add(sums, vectors, first, active,
          [&](int i, int, int at, int half) { return *resident(i, at, half); });
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (tile_ + i >= cut_.tiles) break;
      const int row = (piece_ * cut_.tiles + tile_ + i) * 16 + lane() / 4;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float two[2] = {};
#pragma unroll
          for (int chain = 0; chain < kChains; ++chain)
#pragma unroll
            for (int k = 0; k < 2; ++k) two[k] += sums[chain][i][n][2 * half + k];
          const int column = n * 8 + lane() % 4 * 2;
          *reinterpret_cast<uint64_t*>(partial_ + (row + half * 8) * cut_.partial_pitch + column) =
              bit_cast<uint64_t>(two);
        }
    }
  }

  // Of a column of the partial sums and its rows `row`, one for each gate, behind a barrier.
  template <int kGates>
  DLK_DEVICE void total(float (&sum)[kGates], int row, int column) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) sum[g] = 0;
    for (int k = 0; k < cut_.split; ++k) {
      const float* const from =
          partial_ + (k * cut_.tiles * 16 + row) * cut_.partial_pitch + column;
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        if (g < cut_.row_gates) sum[g] += from[g * cut_.units * cut_.partial_pitch];
    }
  }

 private:
  static constexpr int kKept = kRegisterTiles / kTiles;
  static constexpr int kAhead = pieces_ahead(sizeof(S), kColumns);
  // Sums that do not wait for one another.
  static constexpr int kChains = kTiles * kColumns < 4 ? 4 / (kTiles * kColumns) : 1;
  using Sums = float[kChains][kTiles][kColumns][4];

  DLK_DEVICE bool idle() const { return piece_ >= cut_.split || tile_ >= cut_.tiles; }

  DLK_DEVICE Bits16* resident(int i, int at, int half) const {
    const int first = kKept * cut_.split;
    const int place = (tile_ + i) * (cut_.pieces - first) + at - first;
    return shared_ + (place * 2 + half) * kWarp + lane();
  }

  DLK_DEVICE Bits16 load(const S* row, int piece, bool aligned) const {
    const int at = piece * kPieceNumbers<S> + lane() % 4 * kVector<S>;
    const int gate = at / cut_.padded, unit = at % cut_.padded;
    if (!row || piece >= cut_.pieces || gate >= cut_.depth_gates) return {};
    const S* const from = row + int64_t(gate) * cut_.hidden + unit;
    if (aligned && unit + kVector<S> <= cut_.hidden) return load_streaming(from);
    S numbers[kVector<S>] = {};
#pragma unroll
    for (int k = 0; k < kVector<S>; ++k)
      if (unit + k < cut_.hidden) numbers[k] = from[k];
    return bit_cast<Bits16>(numbers);
  }

  // This warp's pieces number first … first + kAhead − 1.
  template <typename Weights>
  DLK_DEVICE void add(Sums& sums, const S* vectors, int first, int active,
                      const Weights& weights) const {
    const S* from = vectors + lane() / 4 * cut_.pitch + lane() % 4 * kVector<S> +
                    (piece_ + first * cut_.split) * kPieceNumbers<S>;
    Bits16 x[kAhead][kColumns];
#pragma unroll
    for (int j = 0; j < kAhead; ++j, from += cut_.split * kPieceNumbers<S>) {
      const int at = piece_ + (first + j) * cut_.split;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        x[j][n] = at < cut_.pieces && n * 8 + lane() / 4 < active
                      ? load16(from + n * 8 * cut_.pitch)
                      : Bits16{};
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int at = piece_ + (first + j) * cut_.split;
      if (at >= cut_.pieces) break;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (tile_ + i >= cut_.tiles) break;
        const Bits16 a[2] = {weights(i, j, at, 0), weights(i, j, at, 1)};
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          if (n * 8 < active) multiply_piece<S>(sums[j % kChains][i][n], a, x[j][n]);
      }
    }
  }

  const Cut& cut_;
  const int tile_, piece_;
  Bits16* const shared_;
  float* const partial_;
  Bits16 kept_[kTiles][kKept][2];
};

// What the loops of both passes know.
template <typename S>
struct Sequence {
  Cut cut;
  Mode mode;
  Steps steps;
  int directions;
  int64_t rows;
  const S* weight[kMostDirections];  // of the backward transposed: (hidden, gates·hidden)
  const S *hx, *cx;
  S* exchange;
  unsigned* flags;
};

template <typename S>
struct ForwardSequence : Sequence<S> {
  const S *b_ih[kMostDirections], *b_hh[kMostDirections];
  const S* x;  // (rows, directions·gates·hidden)
  S *output, *h_n, *c_n;
  S* gates;  // these two: where they are saved
  float* cells;
};

constexpr int kForwardTiles = 2, kBackwardTiles = 1;  // of a warp

// Grid: groups × blocks of a group.
// ptxas: <= 255 registers, 0 bytes static shared, 0 spills
template <typename S, int kColumns>
DLK_KERNEL void __launch_bounds__(kThreads, 1) sequence_forward_kernel(ForwardSequence<S> p) {
  const Cut& c = p.cut;
  const Place place(c, p.directions, p.steps.batch);
  const int d = place.direction, gates = gates_of(p.mode), units = c.units;
  const bool reverse = d == 1;
  const int64_t x_pitch = int64_t(p.directions) * gates * c.hidden;
  const int64_t output_pitch = int64_t(p.directions) * c.hidden;
  float* const state = reinterpret_cast<float*>(shared_memory() + c.state);
  float* const bias = reinterpret_cast<float*>(shared_memory() + c.bias);
  S* const stage = reinterpret_cast<S*>(shared_memory() + c.stage);
  Product<S, kForwardTiles, kColumns> product(c, p.weight[d], place.unit);
  Exchange<S> exchange(c, place, p.exchange, p.flags);

  for (int i = int(threadIdx.x); i < units; i += kThreads) {
    float x[4] = {};
    if (place.unit + i < c.hidden)
      add_biases(p.mode, p.b_ih[d], p.b_hh[d], c.hidden, place.unit + i, x);
#pragma unroll
    for (int g = 0; g < 4; ++g) bias[g * units + i] = x[g];
  }
  // Of this direction's states, (batch, hidden).
  const auto in_states = [&](int row, int unit) {
    return (int64_t(d) * p.steps.batch + place.sequence + row) * c.hidden + place.unit + unit;
  };
  for (int i = int(threadIdx.x); i < place.rows * units; i += kThreads) {
    const int row = i / units, unit = i % units;
    const bool exists = place.unit + unit < c.hidden;
    stage[i] = exists ? p.hx[in_states(row, unit)] : S{};
    const S* const from = p.mode == Mode::kLstm ? p.cx : p.hx;
    state[i] = exists ? widen(from[in_states(row, unit)]) : 0;
  }
  sync_block();
  exchange.publish(0, stage, place.rows);
  exchange.publish(1, stage, place.rows);
  exchange.arrive();

  const Items items(units);
  const Item my_item = items[int(threadIdx.x)];
  int parity = 0;
  Steps::Range now = p.steps.range(reverse ? p.steps.count - 1 : 0), next;
  for (int s = 0; s < p.steps.count; ++s, now = next) {
    const int t = reverse ? p.steps.count - 1 - s : s;
    next = p.steps.range(reverse ? t - 1 : t + 1);
    const int n = place.active(now);
    if (n == 0) continue;
    const int64_t first = now.first + place.sequence;
    const auto load = [&](S(&x)[4], const Item& item) {
      const bool exists = item.row < n && place.unit + item.unit < c.hidden;
#pragma unroll
      for (int g = 0; g < 4; ++g)
        x[g] = g < gates && exists
                   ? p.x[(first + item.row) * x_pitch + (int64_t(d) * gates + g) * c.hidden +
                         place.unit + item.unit]
                   : S{};
    };
    const auto store = [&](const float (&x)[4], S h, const Item& item, int at) {
      const int64_t to = first + item.row;
      p.output[to * output_pitch + int64_t(d) * c.hidden + place.unit + item.unit] = h;
      // From here on a sequence has ended.
      const int lasts = reverse ? (t == 0 ? 0 : n) : place.active(next);
      if (item.row >= lasts) {
        p.h_n[in_states(item.row, item.unit)] = h;
        if (p.mode == Mode::kLstm) p.c_n[in_states(item.row, item.unit)] = narrow<S>(state[at]);
      }
      const int64_t saved = (int64_t(d) * p.rows + to) * c.hidden;
      if (p.gates) {
#pragma unroll
        for (int g = 0; g < 4; ++g)
          p.gates[4 * saved + int64_t(g) * c.hidden + place.unit + item.unit] = narrow<S>(x[g]);
      }
      if (p.cells) p.cells[saved + place.unit + item.unit] = state[at];
    };
    // A thread's first unit: its input is under way while the block waits (not converted: that
    // would wait for it), and its results are stored when the other blocks have what they wait for.
    S given[4];
    float mine[4];
    S my_h{};
    load(given, my_item);
    exchange.wait();
    for (int chunk = 0; chunk < n; chunk += 8 * kColumns) {
      const int count = n - chunk < 8 * kColumns ? n - chunk : 8 * kColumns;
      product.multiply(exchange.vector(parity) + int64_t(chunk) * c.pitch, count);
      sync_block();
      for (int i = int(threadIdx.x); i < count * units; i += kThreads) {
        const int at = chunk * units + i;
        const Item of_chunk = items[i], item{chunk + of_chunk.row, of_chunk.unit};
        S h{};
        if (place.unit + item.unit < c.hidden) {
          const bool is_mine = at == int(threadIdx.x);
          if (!is_mine) load(given, item);
          float x[4], sums[4];
          product.total(sums, item.unit, of_chunk.row);
#pragma unroll
          for (int g = 0; g < 4; ++g) x[g] = widen(given[g]) + bias[g * units + item.unit];
#pragma unroll
          for (int g = 0; g < 4; ++g)
            if (g < gates) add_of_state(p.mode, x, g, sums[g]);
          h = narrow<S>(forward_unit(p.mode, x, state[at]));
          if (p.mode != Mode::kLstm) state[at] = widen(h);
          if (is_mine) {
#pragma unroll
            for (int g = 0; g < 4; ++g) mine[g] = x[g];
            my_h = h;
          } else {
            store(x, h, item, at);
          }
        }
        stage[at] = h;
      }
      sync_block();
    }
    parity ^= 1;
    exchange.publish(parity, stage, n);
    exchange.arrive();
    if (int(threadIdx.x) < n * units && place.unit + my_item.unit < c.hidden)
      store(mine, my_h, my_item, int(threadIdx.x));
  }
  exchange.wait();  // a cluster's blocks end together
}

template <typename S>
struct BackwardSequence : Sequence<S> {
  const S *grad_output, *grad_h_n, *grad_c_n;  // or null
  const S *output, *gates;
  const float* cells;
  S* grad_x;  // (rows, directions·gates·hidden)
  S* grad_h;  // of a GRU
  S *grad_hx, *grad_cx;
};

// Grid: groups × blocks of a group.
// ptxas: <= 255 registers, 0 bytes static shared, 0 spills
template <typename S, int kColumns>
DLK_KERNEL void __launch_bounds__(kThreads, 1) sequence_backward_kernel(BackwardSequence<S> p) {
  const Cut& c = p.cut;
  const Place place(c, p.directions, p.steps.batch);
  const int d = place.direction, gates = gates_of(p.mode), units = c.units;
  const bool reverse = d == 1, lstm = p.mode == Mode::kLstm;
  const int64_t pitch = int64_t(p.directions) * gates * c.hidden;
  const int64_t output_pitch = int64_t(p.directions) * c.hidden;
  float* const grad = reinterpret_cast<float*>(shared_memory() + c.state);  // of h, of c
  float* const grad_c = grad + c.rows * units;
  S* const stage = reinterpret_cast<S*>(shared_memory() + c.stage);
  Product<S, kBackwardTiles, kColumns> product(c, p.weight[d], place.unit);
  Exchange<S> exchange(c, place, p.exchange, p.flags);

  const auto in_states = [&](int row, int unit) {
    return (int64_t(d) * p.steps.batch + place.sequence + row) * c.hidden + place.unit + unit;
  };
  for (int i = int(threadIdx.x); i < place.rows * units; i += kThreads) {
    const int row = i / units, unit = i % units;
    const bool exists = place.unit + unit < c.hidden;
    grad[i] = exists && p.grad_h_n ? widen(p.grad_h_n[in_states(row, unit)]) : 0;
    grad_c[i] = exists && p.grad_c_n ? widen(p.grad_c_n[in_states(row, unit)]) : 0;
  }
  sync_block();

  // As it lies in memory: what converts it waits for it.
  struct Read {
    S grad, gates[4], h;  // h of an RNN, of a GRU the one before
    float c, c_before;
  };
  const auto load = [&](const Steps::Range& step, const Steps::Range& before, const Item& item) {
    Read read{};
    const int row = item.row, unit = item.unit;
    if (row >= place.active(step) || place.unit + unit >= c.hidden) return read;
    const int64_t column = int64_t(d) * c.hidden + place.unit + unit;
    const int64_t to = step.first + place.sequence + row;
    const bool continued = row < place.active(before);
    const int64_t from = before.first + place.sequence + row;
    const int64_t saved = int64_t(d) * p.rows;
    if (p.grad_output) read.grad = p.grad_output[to * output_pitch + column];
    if (p.gates) {
#pragma unroll
      for (int g = 0; g < 4; ++g)
        read.gates[g] = p.gates[((saved + to) * 4 + g) * c.hidden + place.unit + unit];
    }
    if (lstm) {
      read.c = p.cells[(saved + to) * c.hidden + place.unit + unit];
      read.c_before = continued ? p.cells[(saved + from) * c.hidden + place.unit + unit]
                                : widen(p.cx[in_states(row, unit)]);
    } else if (p.mode == Mode::kGru) {
      read.h = continued ? p.output[from * output_pitch + column] : p.hx[in_states(row, unit)];
    } else {
      read.h = p.output[to * output_pitch + column];
    }
    return read;
  };
  const auto kept_of = [&](const Read& read) {
    const float h = widen(read.h);
    Kept<float> kept{{}, lstm ? read.c : h, lstm ? read.c_before : h};
#pragma unroll
    for (int g = 0; g < 4; ++g) kept.gates[g] = widen(read.gates[g]);
    return kept;
  };

  const Items items(units);
  const Item my_item = items[int(threadIdx.x)];
  const int forth = reverse ? 1 : -1, begin = reverse ? 0 : p.steps.count - 1;
  int parity = 0;
  Steps::Range now = p.steps.range(begin), next = p.steps.range(begin + forth);
  Read ahead = load(now, next, my_item);
  for (int s = 0; s < p.steps.count; ++s) {
    const Steps::Range after = p.steps.range(begin + (s + 2) * forth);
    const int n = place.active(now);
    if (n > 0) {
      const int64_t first = now.first + place.sequence;
      const auto store = [&](const float (&x)[4], const Item& item) {
        if (place.unit + item.unit >= c.hidden) return;
        const int64_t to =
            (first + item.row) * pitch + int64_t(d) * gates * c.hidden + place.unit + item.unit;
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          if (g >= gates) break;
          p.grad_x[to + int64_t(g) * c.hidden] = narrow<S>(x[g]);
          if (p.grad_h) p.grad_h[to + int64_t(g) * c.hidden] = narrow<S>(of_state(p.mode, x, g));
        }
      };
      float mine[4] = {};  // as in the forward
      for (int at = int(threadIdx.x); at < n * units; at += kThreads) {
        const Item item = items[at];
        const bool is_mine = at == int(threadIdx.x);
        float x[4] = {};
        if (place.unit + item.unit < c.hidden) {
          const Read read = is_mine ? ahead : load(now, next, item);
          grad[at] =
              backward_unit(p.mode, grad[at] + widen(read.grad), kept_of(read), grad_c[at], x);
        }
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          if (g >= gates) break;
          stage[(item.row * gates + g) * units + item.unit] = narrow<S>(of_state(p.mode, x, g));
        }
        if (is_mine) {
#pragma unroll
          for (int g = 0; g < 4; ++g) mine[g] = x[g];
        } else {
          store(x, item);
        }
      }
      sync_block();
      exchange.publish(parity, stage, n);
      exchange.arrive();
      if (int(threadIdx.x) < n * units) store(mine, my_item);
    }
    ahead = load(next, after, my_item);
    now = next;
    next = after;
    if (n == 0) continue;
    exchange.wait();
    for (int chunk = 0; chunk < n; chunk += 8 * kColumns) {
      const int count = n - chunk < 8 * kColumns ? n - chunk : 8 * kColumns;
      product.multiply(exchange.vector(parity) + int64_t(chunk) * c.pitch, count);
      sync_block();
      for (int i = int(threadIdx.x); i < count * units; i += kThreads) {
        const Item item = items[i];
        float sum[1];
        product.total(sum, item.unit, item.row);
        grad[chunk * units + i] += sum[0];
      }
      sync_block();
    }
    parity ^= 1;
  }
  for (int i = int(threadIdx.x); i < place.rows * units; i += kThreads) {
    const int row = i / units, unit = i % units;
    if (place.unit + unit >= c.hidden) continue;
    p.grad_hx[in_states(row, unit)] = narrow<S>(grad[i]);
    if (lstm) p.grad_cx[in_states(row, unit)] = narrow<S>(grad_c[i]);
  }
}

// -------------------------------------------------------------------------------------------- cuts

struct Device {
  int64_t blocks;  // that run at once
  size_t shared;
  bool clusters;
};

// What a step costs, in clocks, roughly: the vectors that a block reads, its products, weights out
// of shared memory, and the barrier.
double cost_of(const Cut& c, const Device& device, int64_t blocks, int item, int tiles) {
  const double pieces = c.pieces, columns = double(divide_up(c.rows, 8));
  const double turns =
      double(divide_up(c.rows, 8 * c.columns) *
             divide_up(divide_up(c.pieces, c.split), pieces_ahead(item, c.columns)));
  const double read =
      c.rows * pieces * kPiece / (c.cluster ? 128 : 64) + turns * (c.cluster ? 40 : 500);
  const double products = c.tiles * pieces * columns * (item == 4 ? 24 : 4);
  const double weights =
      c.tiles * std::max(0.0, pieces - kept_pieces(tiles) * c.split) * 1024 / 128;
  const double units = double(divide_up(int64_t(c.rows) * c.units, kThreads)) * 200;
  const double barrier = c.cluster ? 600 : 1500 + 4 * c.blocks;
  const double waves = double(divide_up(blocks, device.blocks));
  return waves * (read + products + weights + units + barrier);
}

// And by torch's product and a launch: the host's time, or the product's.
double cost_of_steps(const Cut& c, const Device& device, int64_t batch, int64_t directions,
                     int item) {
  const double products = 2.0 * double(batch) * c.row_gates * c.depth_gates * c.hidden * c.hidden;
  const double rate = double(device.blocks) * (item == 4 ? 180 : 1500);
  return double(directions) * std::max(20000.0, products / rate);
}

bool lay_out(Cut& c, int item, int tiles, size_t limit) {
  c.padded = c.blocks * c.units;
  c.pieces = int(divide_up(int64_t(c.depth_gates) * c.padded * item, kPiece));
  c.pitch = (c.pieces | 1) * (kPiece / item);  // odd: neighbouring rows in other banks
  c.tiles = int(divide_up(int64_t(c.row_gates) * c.units, 16));
  c.across = int(divide_up(c.tiles, tiles));
  if (c.across > kWarps) return false;
  c.split = kWarps / c.across;
  c.columns = c.rows <= 8 ? 1 : c.rows <= 16 ? 2 : 4;
  c.partial_pitch = 8 * c.columns + 2;  // neighbouring units in other banks
  int64_t at = int64_t(c.tiles) * std::max(0, c.pieces - kept_pieces(tiles) * c.split) * 1024;
  const auto take = [&](int64_t bytes) {
    const int64_t place = at;
    at += divide_up(bytes, 16) * 16;
    return int(place);
  };
  if (at > int64_t(limit)) return false;
  c.partial = take(int64_t(c.split) * c.tiles * 16 * c.partial_pitch * 4);
  c.state = take(int64_t(c.rows) * c.units * 4 * 2);
  c.bias = take(int64_t(4) * c.units * 4);
  c.stage = take(int64_t(c.rows) * c.depth_gates * c.units * item);
  c.exchange = take(c.cluster ? int64_t(2) * c.rows * c.pitch * item : 0);
  c.shared = size_t(at);
  return at <= int64_t(limit);
}

// The cheapest cut, if the weights fit and it beats a launch a step. row_gates, depth_gates: of the
// products' matrix.
std::optional<Cut> cut_of(int64_t hidden, int64_t batch, int64_t directions, int row_gates,
                          int depth_gates, int item, int tiles, const Device& device) {
  std::optional<Cut> best;
  double least = 0;
  if (hidden > 1 << 16 || batch > 1 << 16 || device.blocks == 0) return best;
  const int most = int(std::max<int64_t>(device.blocks, kMostCluster));
  int last = 0;
  for (int wanted = 1; wanted <= most; ++wanted) {
    const int units = int(divide_up(divide_up(hidden, wanted), kQuantum) * kQuantum);
    if (units == last) continue;
    last = units;
    for (int64_t cut = 1; cut == 1 || (cut <= 32 && cut < 2 * divide_up(batch, 8)); cut *= 2) {
      for (const bool cluster : {false, true}) {
        Cut c{};
        c.hidden = int(hidden);
        c.units = units;
        c.blocks = int(divide_up(hidden, units));
        c.rows = int(divide_up(divide_up(batch, cut), 8) * 8);
        c.groups = int(divide_up(batch, c.rows));
        c.row_gates = row_gates;
        c.depth_gates = depth_gates;
        c.cluster = cluster;
        const int64_t blocks = directions * c.groups * c.blocks;
        if (cluster ? c.blocks > (device.clusters ? kMostCluster : 1)
                    : blocks > device.blocks || c.blocks > kThreads)
          continue;
        if (!lay_out(c, item, tiles, device.shared)) continue;
        const double cost = cost_of(c, device, blocks, item, tiles);
        if (cost >= (best ? least : cost_of_steps(c, device, batch, directions, item))) continue;
        best = c;
        least = cost;
      }
    }
  }
  return best;
}

template <typename Kernel>
Device device_for(Kernel kernel) {
  return {multiprocessors(), shared_limit(), has_clusters(kernel)};
}

template <typename Body>
void for_columns(int columns, const Body& body) {
  if (columns == 1) return body(std::integral_constant<int, 1>{});
  if (columns == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 4>{});
}

// ---------------------------------------------------------------------------------- torch's matmul

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

void multiply_into(Tensor to, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(to)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor concatenated(const std::vector<Tensor>& tensors) {
  using torch::stable::detail::from;
  if (tensors.size() == 1) return tensors[0];
  std::array<StableIValue, 2> stack{from(tensors), from(int64_t(0))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cat", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor columns(const Tensor& x, int64_t first, int64_t count) {
  Tensor view = x;
  return torch::stable::narrow(view, 1, first, count);
}

Tensor rows(const Tensor& x, int64_t first, int64_t count) {
  Tensor view = x;
  return torch::stable::narrow(view, 0, first, count);
}

Tensor part(const Tensor& x, int64_t index) { return torch::stable::select(x, 0, index); }

Tensor sum_of_rows(const Tensor& x) {
  const Sizes first{0};
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(first));
}

Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }

Tensor of_dtype(const Tensor& x, ScalarType dtype) {
  return torch::stable::to(x, dtype, std::nullopt, std::nullopt, std::nullopt, false, true);
}

// ----------------------------------------------------------------------------------------- a layer

Mode parse_mode(const std::string& name) {
  constexpr std::array<const char*, 4> kNames{"lstm", "gru", "rnn_tanh", "rnn_relu"};
  const auto* found = std::find(kNames.begin(), kNames.end(), name);
  DLK_CHECK(found != kNames.end(), kOp, ": expected mode lstm, gru, rnn_tanh or rnn_relu, got ",
            name);
  return Mode(found - kNames.begin());
}

ScalarType wide_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor none_of(const Tensor& like) { return torch::stable::new_empty(like, Sizes{0}); }

void check_argument(const char* argument, const Tensor& x, const Tensor& input,
                    const Sizes& shape) {
  check_on_gpu(kOp, argument, x, input);
  check_dtype(kOp, argument, x, input.scalar_type());
  check_shape(kOp, argument, x, shape);
}

struct Direction {
  Tensor w_ih, w_hh;
  Optional b_ih, b_hh, w_hr;
};

// The arguments of a layer, checked; the tensors that kernels read are contiguous.
struct Layer {
  Mode mode;
  bool packed;
  int64_t batch, steps, rows, in, hidden, projected, gates;
  std::vector<int64_t> offsets;  // of the steps
  Tensor input, hx;              // (rows, in), (directions, batch, projected)
  Optional cx, device_offsets;
  std::vector<Direction> directions;
  ScalarType dtype, wide;

  Layer(const Tensor& x, const Optional& batch_sizes, const Tensor& h, const Optional& c,
        const std::vector<Tensor>& weights, const std::string& mode_name);

  int64_t rows_of(int64_t t) const { return offsets[t + 1] - offsets[t]; }
  bool projects() const { return projected != hidden || directions[0].w_hr.has_value(); }
  int64_t count() const { return int64_t(directions.size()); }
  Steps on_device() const {
    return {device_offsets ? input_pointer<int64_t>("offsets", *device_offsets) : nullptr, batch,
            int(steps)};
  }
  Sizes output_shape() const {
    return packed ? Sizes{rows, count() * projected} : Sizes{steps, batch, count() * projected};
  }
  // (directions·gates·hidden, in): of one product for all directions.
  Tensor all_w_ih() const {
    std::vector<Tensor> all;
    for (const auto& d : directions) all.push_back(d.w_ih);
    return concatenated(all);
  }
};

Layer::Layer(const Tensor& x, const Optional& batch_sizes, const Tensor& h, const Optional& c,
             const std::vector<Tensor>& weights, const std::string& mode_name)
    : mode(parse_mode(mode_name)), packed(batch_sizes.has_value()), gates(gates_of(mode)) {
  check_on_gpu(kOp, "input", x, x);
  check_floating(kOp, "input", x);
  dtype = x.scalar_type();
  wide = wide_of(x);
  DLK_CHECK(x.dim() == (packed ? 2 : 3), kOp, ": expected input with ", packed ? 2 : 3,
            " dimensions, got shape ", shape_string(x.sizes()));
  DLK_CHECK(h.dim() == 3 && h.size(0) >= 1 && h.size(0) <= kMostDirections, kOp,
            ": expected hx of 1 or 2 directions, got shape ", shape_string(h.sizes()));
  const int64_t number = h.size(0), each = int64_t(weights.size()) / number;
  DLK_CHECK(int64_t(weights.size()) == number * each && each >= 2 && each <= 5, kOp,
            ": expected 2 to 5 weights for each of ", number, " directions, got ", weights.size());
  in = x.size(packed ? 1 : 2);
  DLK_CHECK(weights[1].dim() == 2 && weights[1].size(0) % gates == 0, kOp,
            ": expected w_hh of shape [", gates, "·hidden, hidden], got ",
            shape_string(weights[1].sizes()));
  hidden = weights[1].size(0) / gates;
  projected = weights[1].size(1);
  if (packed) {
    check_cpu(kOp, "batch_sizes", *batch_sizes);
    check_dtype(kOp, "batch_sizes", *batch_sizes, ScalarType::Long);
    DLK_CHECK(batch_sizes->dim() == 1, kOp, ": expected batch_sizes with 1 dimension, got shape ",
              shape_string(batch_sizes->sizes()));
    const Tensor sizes = dense(*batch_sizes);
    const auto* data = static_cast<const int64_t*>(sizes.const_data_ptr());
    steps = sizes.size(0);
    batch = h.size(1);
    offsets.assign(1, 0);
    DLK_CHECK(steps == 0 || data[0] == batch, kOp, ": expected batch_sizes from ", batch,
              " on, as hx has, got ", steps ? data[0] : 0);
    for (int64_t t = 0; t < steps; ++t) {
      DLK_CHECK(data[t] >= 0 && data[t] <= data[t ? t - 1 : 0], kOp,
                ": expected batch_sizes that do not grow, got ", data[t], " at ", t);
      offsets.push_back(offsets[t] + data[t]);
    }
    DLK_CHECK(offsets[steps] == x.size(0), kOp, ": expected ", offsets[steps],
              " rows of input by batch_sizes, got ", x.size(0));
  } else {
    steps = x.size(0);
    batch = x.size(1);
    for (int64_t t = 0; t <= steps; ++t) offsets.push_back(t * batch);
  }
  rows = offsets[steps];
  DLK_CHECK(
      steps < int64_t(1) << 31 && batch < int64_t(1) << 31 && gates * hidden < int64_t(1) << 31,
      kOp, ": expected fewer than 2^31 steps, sequences and gates");
  check_argument("hx", h, x, Sizes{number, batch, projected});
  const bool has_projection = each == 3 || each == 5, biased = each >= 4;
  DLK_CHECK(mode == Mode::kLstm || !has_projection, kOp, ": only an lstm has projections");
  DLK_CHECK(has_projection || projected == hidden, kOp, ": expected w_hh of shape ",
            shape_string(Sizes{gates * hidden, hidden}), ", got ",
            shape_string(weights[1].sizes()));
  for (int64_t d = 0; d < number; ++d) {
    const Tensor* w = weights.data() + d * each;
    check_argument("w_ih", w[0], x, Sizes{gates * hidden, in});
    check_argument("w_hh", w[1], x, Sizes{gates * hidden, projected});
    Direction direction{w[0], w[1], {}, {}, {}};
    if (biased) {
      check_argument("b_ih", w[2], x, Sizes{gates * hidden});
      check_argument("b_hh", w[3], x, Sizes{gates * hidden});
      direction.b_ih = dense(w[2]);
      direction.b_hh = dense(w[3]);
    }
    if (has_projection) {
      check_argument("w_hr", w[each - 1], x, Sizes{projected, hidden});
      direction.w_hr = w[each - 1];
    }
    directions.push_back(direction);
  }
  DLK_CHECK((mode == Mode::kLstm) == c.has_value(), kOp,
            ": expected cx of an lstm, and only of one");
  if (c) {
    check_argument("cx", *c, x, Sizes{number, batch, hidden});
    cx = dense(*c);
  }
  hx = dense(h);
  input = torch::stable::reshape(x, Sizes{rows, in});
}

// The offsets of packed sequences where the kernels read them.
void send_offsets(Layer& layer) {
  if (!layer.packed) return;
  const int64_t count = int64_t(layer.offsets.size());
  layer.device_offsets = torch::stable::new_empty(layer.input, Sizes{count}, ScalarType::Long);
  int64_t* const to = output_pointer<int64_t>("offsets", *layer.device_offsets);
  for (int64_t first = 0; first < count; first += Offsets::kMost) {
    Offsets some{{}, to + first, int(std::min<int64_t>(Offsets::kMost, count - first))};
    std::copy_n(layer.offsets.begin() + first, some.count, some.values);
    launch(offsets_kernel, "lstm offsets", {.grid = 1, .block = kThreads}, some);
  }
}

LaunchShape flat(int64_t elements) {
  return {.grid = unsigned(divide_up(elements, kThreads)), .block = kThreads};
}

// For each step that some of `layer` have, in the order of the forward or of the backward:
// body(step, its first row, its rows, rows that the step before it, in time, has too).
template <typename Body>
void for_steps(const Layer& layer, bool reverse, bool backward, const Body& body) {
  for (int64_t s = 0; s < layer.steps; ++s) {
    const int64_t t = reverse == backward ? s : layer.steps - 1 - s;
    const int64_t before = reverse ? t + 1 : t - 1, count = layer.rows_of(t);
    const bool first = before < 0 || before >= layer.steps;
    const int64_t continued = first ? 0 : std::min(count, layer.rows_of(before));
    if (count > 0) body(t, layer.offsets[t], count, first ? 0 : layer.offsets[before], continued);
  }
}

// ----------------------------------------------------------------------------------------- forward

// kept: temporaries live as long as the call, so that no two are in one place.
struct Made {
  Tensor output, h_n, c_n, gates, cells;
  std::vector<Tensor> kept;
};

// By torch's products and a launch a step.
template <typename S>
void forward_steps(const Layer& layer, const Tensor& x, Made& made, bool save) {
  using T = accumulate_t<S>;
  const int64_t hidden = layer.hidden, all = layer.gates * hidden;
  const bool lstm = layer.mode == Mode::kLstm, projects = layer.projects();
  const int64_t output_pitch = layer.count() * layer.projected;
  const Tensor output = torch::stable::view(made.output, Sizes{layer.rows, output_pitch});
  for (int64_t d = 0; d < layer.count(); ++d) {
    const Direction& w = layer.directions[d];
    Tensor h = part(made.h_n, d);
    torch::stable::copy_(h, part(layer.hx, d));
    Tensor c = none_of(layer.input);  // of the wide dtype
    if (lstm && std::is_same_v<S, T>) {
      c = part(made.c_n, d);
      torch::stable::copy_(c, part(*layer.cx, d));
    } else if (lstm) {
      c = of_dtype(part(*layer.cx, d), layer.wide);
    }
    const Tensor unprojected =
        torch::stable::new_empty(layer.input, Sizes{projects ? layer.batch : 0, hidden});
    const Tensor product = torch::stable::new_empty(layer.input, Sizes{layer.batch, all});
    const Tensor w_hh = transposed(w.w_hh);
    made.kept.insert(made.kept.end(), {c, unprojected, product});

    ForwardStep<S> p{};
    p.mode = layer.mode;
    p.hidden = hidden;
    p.x_pitch = layer.count() * all;
    const S* const x_data = inout_pointer<S>("x", x) + d * all;
    p.h = inout_pointer<S>("product", product);
    if (w.b_ih) {
      p.b_ih = input_pointer<S>("b_ih", *w.b_ih);
      p.b_hh = input_pointer<S>("b_hh", *w.b_hh);
    }
    S* const state = inout_pointer<S>("h_n", made.h_n) + d * layer.batch * layer.projected;
    p.before = state;
    if (lstm) {
      p.c = inout_pointer<T>("c", c);
      if (!std::is_same_v<S, T>)
        p.c_made = output_pointer<S>("c_n", made.c_n) + d * layer.batch * hidden;
    }
    S* output_data = nullptr;
    if (projects) {
      p.state = inout_pointer<S>("unprojected", unprojected);
    } else {
      p.state = state;
      output_data = inout_pointer<S>("output", made.output) + d * layer.projected;
      p.output_pitch = output_pitch;
    }
    const int64_t place = d * layer.rows * hidden;
    S* const gates =
        save && layer.gates > 1 ? output_pointer<S>("gates", made.gates) + 4 * place : nullptr;
    T* const cells = save && lstm ? output_pointer<T>("cells", made.cells) + place : nullptr;
    for_steps(layer, d == 1, false, [&](int64_t, int64_t first, int64_t count, int64_t, int64_t) {
      multiply_into(rows(product, 0, count), rows(h, 0, count), w_hh);
      p.rows = count;
      p.x = x_data + first * p.x_pitch;
      if (output_data) p.output = output_data + first * output_pitch;
      if (gates) p.gates = gates + first * 4 * hidden;
      if (cells) p.cells = cells + first * hidden;
      launch(step_forward_kernel<S>, "lstm step", flat(count * hidden), p);
      if (projects) {
        multiply_into(rows(h, 0, count), rows(unprojected, 0, count), transposed(*w.w_hr));
        Tensor to = columns(rows(output, first, count), d * layer.projected, layer.projected);
        torch::stable::copy_(to, rows(h, 0, count));
      }
    });
  }
}

// Fills what both passes know; how to launch it. weight_of(direction): contiguous.
template <typename S, typename Weight>
LaunchShape prepare(Sequence<S>& p, const Layer& layer, const Cut& cut, std::vector<Tensor>& kept,
                    const Weight& weight_of) {
  p.cut = cut;
  p.mode = layer.mode;
  p.steps = layer.on_device();
  p.directions = int(layer.count());
  p.rows = layer.rows;
  for (int64_t d = 0; d < layer.count(); ++d) {
    kept.push_back(weight_of(layer.directions[d]));
    p.weight[d] = input_pointer<S>("w_hh", kept.back());
  }
  p.hx = input_pointer<S>("hx", layer.hx);
  if (layer.cx) p.cx = input_pointer<S>("cx", *layer.cx);
  const int64_t groups = layer.count() * cut.groups;
  if (!cut.cluster) {
    const Tensor exchange =
        torch::stable::new_empty(layer.input, Sizes{groups * 2 * cut.rows * cut.pitch});
    const Tensor flags =
        torch::stable::new_zeros(layer.input, Sizes{groups * cut.blocks}, ScalarType::Int);
    kept.insert(kept.end(), {exchange, flags});
    p.exchange = scratch_pointer<S>("exchange", exchange);
    p.flags = inout_pointer<unsigned>("flags", flags);
  }
  return {.grid = unsigned(groups * cut.blocks),
          .block = kThreads,
          .shared = cut.shared,
          .cluster = cut.cluster ? unsigned(cut.blocks) : 1,
          .cooperative = !cut.cluster};
}

// In one launch; whether the weights fit.
template <typename S>
bool forward_sequence(const Layer& layer, const Tensor& x, Made& made, bool save) {
  const bool lstm = layer.mode == Mode::kLstm;
  const auto cut = cut_of(layer.hidden, layer.batch, layer.count(), int(layer.gates), 1, sizeof(S),
                          kForwardTiles, device_for(sequence_forward_kernel<S, 1>));
  if (!cut) return false;
  ForwardSequence<S> p{};
  const LaunchShape shape =
      prepare(p, layer, *cut, made.kept, [](const Direction& w) { return dense(w.w_hh); });
  for (int64_t d = 0; d < layer.count(); ++d) {
    const Direction& w = layer.directions[d];
    if (!w.b_ih) continue;
    p.b_ih[d] = input_pointer<S>("b_ih", *w.b_ih);
    p.b_hh[d] = input_pointer<S>("b_hh", *w.b_hh);
  }
  p.x = input_pointer<S>("x", x);
  p.output = output_pointer<S>("output", made.output);
  p.h_n = output_pointer<S>("h_n", made.h_n);
  if (lstm) p.c_n = output_pointer<S>("c_n", made.c_n);
  if (save && layer.gates > 1) p.gates = output_pointer<S>("gates", made.gates);
  if (save && lstm) p.cells = output_pointer<float>("cells", made.cells);
  for_columns(cut->columns, [&](auto columns) {
    launch(sequence_forward_kernel<S, columns>, "lstm sequence", shape, p);
  });
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(Tensor input, Optional batch_sizes,
                                                                Tensor hx, Optional cx,
                                                                std::vector<Tensor> weights,
                                                                Text mode, bool save, bool) {
  Layer layer(input, batch_sizes, hx, cx, weights, mode);
  const DeviceScope scope(input);
  const bool lstm = layer.mode == Mode::kLstm;
  const int64_t directions = layer.count(), hidden = layer.hidden;
  const auto made = [&](const Sizes& shape, ScalarType dtype) {
    return torch::stable::new_empty(layer.input, shape, dtype);
  };
  Made result{made(layer.output_shape(), layer.dtype),
              made({directions, layer.batch, layer.projected}, layer.dtype),
              lstm ? made({directions, layer.batch, hidden}, layer.dtype) : none_of(input),
              save && layer.gates > 1 ? made({directions, layer.rows, 4 * hidden}, layer.dtype)
                                      : none_of(input),
              made(save && lstm ? Sizes{directions, layer.rows, hidden} : Sizes{0}, layer.wide),
              {}};
  if (layer.rows == 0) {
    torch::stable::copy_(result.h_n, layer.hx);
    if (lstm) torch::stable::copy_(result.c_n, *layer.cx);
    return {result.output, result.h_n, result.c_n, result.gates, result.cells};
  }
  send_offsets(layer);
  const Tensor x = dense(torch::stable::matmul(layer.input, transposed(layer.all_w_ih())));
  for_dtype<bf16, f16>(layer.dtype, [&](auto tag) {
    using S = decltype(tag);
    if constexpr (!std::is_same_v<S, double>) {
      if (!layer.projects() && forward_sequence<S>(layer, x, result, save)) return;
    }
    forward_steps<S>(layer, x, result, save);
  });
  return {result.output, result.h_n, result.c_n, result.gates, result.cells};
}

// ---------------------------------------------------------------------------------------- backward

// What the loop over the steps makes of upstream gradients; those of W and x are products of it.
struct Loop {
  Tensor x;       // (rows, directions·gates·hidden): of the sums that x had a part in
  Tensor h;       // the same of h before: another tensor of a GRU alone
  Tensor hx, cx;  // of the initial states
  std::vector<Tensor> projected;  // (rows, projected): of h, where there is a projection
  std::vector<Tensor> kept;
};

struct Upstream {
  Optional output, h_n, c_n;  // contiguous
  Tensor outputs, gates, cells;
};

template <typename S>
void backward_steps(const Layer& layer, const Upstream& up, Loop& loop) {
  using T = accumulate_t<S>;
  const int64_t hidden = layer.hidden, all = layer.gates * hidden, pitch = layer.count() * all;
  const int64_t output_pitch = layer.count() * layer.projected;
  const bool lstm = layer.mode == Mode::kLstm, gru = layer.mode == Mode::kGru;
  const bool projects = layer.projects();
  const S* const grad_output = up.output ? input_pointer<S>("grad_output", *up.output) : nullptr;
  const S* const output = input_pointer<S>("output", up.outputs);
  for (int64_t d = 0; d < layer.count(); ++d) {
    const Direction& w = layer.directions[d];
    Tensor h = part(loop.hx, d);
    if (up.h_n)
      torch::stable::copy_(h, part(*up.h_n, d));
    else
      torch::stable::zero_(h);
    Tensor c = none_of(layer.input);
    if (lstm)
      c = up.c_n ? of_dtype(part(*up.c_n, d), layer.wide)
                 : torch::stable::new_zeros(layer.input, Sizes{layer.batch, hidden}, layer.wide);
    const Tensor direct =
        gru ? torch::stable::new_zeros(layer.input, Sizes{layer.batch, hidden}, layer.wide)
            : none_of(layer.input);
    const Tensor unprojected =
        torch::stable::new_empty(layer.input, Sizes{projects ? layer.batch : 0, hidden});
    const Tensor sums_of_h = columns(loop.h, d * all, all);
    loop.kept.insert(loop.kept.end(), {c, direct, unprojected});

    BackwardStep<S> p{};
    p.mode = layer.mode;
    p.hidden = hidden;
    p.grad_pitch = pitch;
    p.output_pitch = output_pitch;
    S* const grad_h = inout_pointer<S>("grad_hx", loop.hx) + d * layer.batch * layer.projected;
    p.grad_state = projects ? inout_pointer<S>("unprojected", unprojected) : grad_h;
    if (lstm) p.grad_c = inout_pointer<T>("grad_c", c);
    if (gru) p.direct = inout_pointer<T>("direct", direct);
    const int64_t place = d * layer.rows * hidden, column = d * layer.projected;
    const S* const gates =
        layer.gates > 1 ? input_pointer<S>("gates", up.gates) + 4 * place : nullptr;
    const T* const cells = lstm ? input_pointer<T>("cells", up.cells) + place : nullptr;
    if (lstm) p.c_first = input_pointer<S>("cx", *layer.cx) + d * layer.batch * hidden;
    if (gru) p.h_first = input_pointer<S>("hx", layer.hx) + d * layer.batch * hidden;
    S* const grad_x = output_pointer<S>("grad_gates", loop.x) + d * all;
    S* const grad_sums = gru ? output_pointer<S>("grad_sums", loop.h) + d * all : nullptr;
    for_steps(layer, d == 1, true,
              [&](int64_t, int64_t first, int64_t count, int64_t before, int64_t continued) {
                p.rows = count;
                p.continued = continued;
                if (projects) {
                  Sum<S> sum{count, layer.projected, output_pitch, nullptr};
                  if (grad_output) sum.a = grad_output + first * output_pitch + column;
                  sum.b = grad_h;
                  sum.to = inout_pointer<S>("grad_projected", loop.projected[d]) +
                           first * layer.projected;
                  launch(sum_kernel<S>, "lstm gradient", flat(count * layer.projected), sum);
                  multiply_into(rows(unprojected, 0, count), rows(loop.projected[d], first, count),
                                *w.w_hr);
                } else {
                  if (grad_output) p.grad_output = grad_output + first * output_pitch + column;
                  p.output = output + first * output_pitch + column;
                  p.h_before = output + before * output_pitch + column;
                }
                if (gates) p.gates = gates + first * 4 * hidden;
                if (cells) {
                  p.cells = cells + first * hidden;
                  p.cells_before = cells + before * hidden;
                }
                p.grad_x = grad_x + first * pitch;
                if (grad_sums) p.grad_h = grad_sums + first * pitch;
                launch(step_backward_kernel<S>, "lstm step gradient", flat(count * hidden), p);
                multiply_into(rows(h, 0, count), rows(sums_of_h, first, count), w.w_hh);
              });
    if (gru) {
      const Sum<S> sum{.rows = layer.batch,
                       .columns = hidden,
                       .a_pitch = hidden,
                       .a = grad_h,
                       .wide = p.direct,
                       .to = grad_h};
      launch(sum_kernel<S>, "lstm gradient", flat(layer.batch * hidden), sum);
    }
    if (lstm) {
      Tensor to = part(loop.cx, d);
      torch::stable::copy_(to, c);
    }
  }
}

// In one launch; whether the weights fit.
template <typename S>
bool backward_sequence(const Layer& layer, const Upstream& up, Loop& loop) {
  const bool lstm = layer.mode == Mode::kLstm, gru = layer.mode == Mode::kGru;
  const auto cut = cut_of(layer.hidden, layer.batch, layer.count(), 1, int(layer.gates), sizeof(S),
                          kBackwardTiles, device_for(sequence_backward_kernel<S, 1>));
  if (!cut) return false;
  BackwardSequence<S> p{};
  const LaunchShape shape = prepare(p, layer, *cut, loop.kept,
                                    [](const Direction& w) { return dense(transposed(w.w_hh)); });
  if (up.output) p.grad_output = input_pointer<S>("grad_output", *up.output);
  if (up.h_n) p.grad_h_n = input_pointer<S>("grad_h_n", *up.h_n);
  if (up.c_n) p.grad_c_n = input_pointer<S>("grad_c_n", *up.c_n);
  p.output = input_pointer<S>("output", up.outputs);
  if (layer.gates > 1) p.gates = input_pointer<S>("gates", up.gates);
  if (lstm) {
    p.cells = input_pointer<float>("cells", up.cells);
    p.grad_cx = output_pointer<S>("grad_cx", loop.cx);
  }
  p.grad_hx = output_pointer<S>("grad_hx", loop.hx);
  p.grad_x = output_pointer<S>("grad_gates", loop.x);
  if (gru) p.grad_h = output_pointer<S>("grad_sums", loop.h);
  for_columns(cut->columns, [&](auto columns) {
    launch(sequence_backward_kernel<S, columns>, "lstm sequence gradient", shape, p);
  });
  return true;
}

// h before every step of a direction: (rows, projected).
template <typename S>
void states_before(const Layer& layer, const Tensor& output, int64_t d, const Tensor& to) {
  Before<S> p{};
  p.steps = layer.on_device();
  p.reverse = d == 1;
  p.size = layer.projected;
  p.output_pitch = layer.count() * layer.projected;
  p.output = input_pointer<S>("output", output) + d * layer.projected;
  p.hx = input_pointer<S>("hx", layer.hx) + d * layer.batch * layer.projected;
  p.before = output_pointer<S>("states", to);
  launch(before_kernel<S>, "lstm states",
         {.grid = {unsigned(layer.steps),
                   unsigned(std::min(divide_up(layer.batch, kWarps), kMostEights))},
          .block = kThreads},
         p);
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward(
    Optional grad_output, Optional grad_h_n, Optional grad_c_n, Tensor input, Optional batch_sizes,
    Tensor hx, Optional cx, std::vector<Tensor> weights, Tensor output, Tensor gates, Tensor cells,
    Text mode, bool, bool want_input, bool want_states, bool want_weights) {
  Layer layer(input, batch_sizes, hx, cx, weights, mode);
  const bool lstm = layer.mode == Mode::kLstm, gru = layer.mode == Mode::kGru;
  const int64_t directions = layer.count(), hidden = layer.hidden;
  const int64_t all = layer.gates * hidden;
  check_argument("output", output, input, layer.output_shape());
  if (grad_output) check_argument("grad_output", *grad_output, input, layer.output_shape());
  const Sizes h_shape{directions, layer.batch, layer.projected};
  const Sizes c_shape{directions, layer.batch, hidden};
  if (grad_h_n) check_argument("grad_h_n", *grad_h_n, input, h_shape);
  if (grad_c_n && lstm) check_argument("grad_c_n", *grad_c_n, input, c_shape);
  if (layer.gates > 1)
    check_argument("gates", gates, input, Sizes{directions, layer.rows, 4 * hidden});
  if (lstm) {
    check_on_gpu(kOp, "cells", cells, input);
    check_dtype(kOp, "cells", cells, layer.wide);
    check_shape(kOp, "cells", cells, Sizes{directions, layer.rows, hidden});
  }
  const DeviceScope scope(input);
  const auto made = [&](const Sizes& shape) {
    return torch::stable::new_empty(layer.input, shape);
  };
  const auto optional_dense = [](const Optional& x) { return x ? Optional(dense(*x)) : x; };
  const Upstream up{optional_dense(grad_output),
                    optional_dense(grad_h_n),
                    lstm ? optional_dense(grad_c_n) : Optional(),
                    dense(output),
                    dense(gates),
                    dense(cells)};
  Loop loop;
  loop.x = made({layer.rows, directions * all});
  loop.h = gru ? made({layer.rows, directions * all}) : loop.x;
  loop.hx = made(h_shape);
  loop.cx = lstm ? made(c_shape) : none_of(input);
  if (layer.projects())
    for (int64_t d = 0; d < directions; ++d)
      loop.projected.push_back(made({layer.rows, layer.projected}));
  std::vector<Tensor> grads;
  const auto weight_gradients = [&](auto tag) {
    using S = decltype(tag);
    const Tensor before = made({layer.rows, layer.projected});
    const Tensor h = made({layer.projects() ? layer.rows : 0, hidden});
    loop.kept.insert(loop.kept.end(), {before, h});
    for (int64_t d = 0; d < directions; ++d) {
      const Direction& w = layer.directions[d];
      const Tensor of_x = columns(loop.x, d * all, all), of_h = columns(loop.h, d * all, all);
      states_before<S>(layer, up.outputs, d, before);
      grads.push_back(torch::stable::matmul(transposed(of_x), layer.input));
      grads.push_back(torch::stable::matmul(transposed(of_h), before));
      if (w.b_ih) {
        grads.push_back(sum_of_rows(of_x));
        grads.push_back(gru ? sum_of_rows(of_h) : torch::stable::clone(grads.back()));
      }
      if (w.w_hr) {
        const int64_t place = d * layer.rows * hidden;
        launch(unprojected_kernel<S>, "lstm states", flat(layer.rows * hidden),
               input_pointer<S>("gates", up.gates) + 4 * place,
               input_pointer<accumulate_t<S>>("cells", up.cells) + place,
               output_pointer<S>("unprojected", h), layer.rows, hidden);
        grads.push_back(torch::stable::matmul(transposed(loop.projected[d]), h));
      }
    }
  };
  const Sizes in_shape(input.sizes().begin(), input.sizes().end());
  if (layer.rows == 0) {
    const auto zeros = [&](const Sizes& shape) {
      return torch::stable::new_zeros(layer.input, shape);
    };
    if (up.h_n)
      torch::stable::copy_(loop.hx, *up.h_n);
    else
      torch::stable::zero_(loop.hx);
    if (lstm && up.c_n)
      torch::stable::copy_(loop.cx, *up.c_n);
    else
      torch::stable::zero_(loop.cx);
    if (want_weights)
      for (const Tensor& weight : weights)
        grads.push_back(zeros(Sizes(weight.sizes().begin(), weight.sizes().end())));
    return {want_input ? zeros(in_shape) : none_of(input), want_states ? loop.hx : none_of(input),
            want_states && lstm ? loop.cx : none_of(input), grads};
  }
  send_offsets(layer);
  for_dtype<bf16, f16>(layer.dtype, [&](auto tag) {
    using S = decltype(tag);
    const auto whole = [&] {
      if constexpr (std::is_same_v<S, double>)
        return false;
      else
        return !layer.projects() && backward_sequence<S>(layer, up, loop);
    };
    if (!whole()) backward_steps<S>(layer, up, loop);
    if (want_weights) weight_gradients(tag);
  });
  Tensor grad_input = none_of(input);
  if (want_input)
    grad_input = torch::stable::view(torch::stable::matmul(loop.x, layer.all_w_ih()), in_shape);
  return {grad_input, want_states ? loop.hx : none_of(input),
          want_states && lstm ? loop.cx : none_of(input), grads};
}

// ------------------------------------------------------------------------------------------- cells

struct Cell {
  Mode mode;
  int64_t batch, in, hidden, gates;
  Optional b_ih, b_hh;

  Cell(const Tensor& input, const Tensor& hx, const Optional& cx, const Tensor& w_ih,
       const Tensor& w_hh, const Optional& b_i, const Optional& b_h, const std::string& name)
      : mode(parse_mode(name)), gates(gates_of(mode)) {
    check_on_gpu(kOp, "input", input, input);
    check_floating(kOp, "input", input);
    DLK_CHECK(input.dim() == 2, kOp, ": expected input with 2 dimensions, got shape ",
              shape_string(input.sizes()));
    DLK_CHECK(hx.dim() == 2, kOp, ": expected hx with 2 dimensions, got shape ",
              shape_string(hx.sizes()));
    batch = input.size(0);
    in = input.size(1);
    hidden = hx.size(1);
    check_argument("hx", hx, input, Sizes{batch, hidden});
    DLK_CHECK((mode == Mode::kLstm) == cx.has_value(), kOp,
              ": expected cx of an lstm, and only of one");
    if (cx) check_argument("cx", *cx, input, Sizes{batch, hidden});
    check_argument("w_ih", w_ih, input, Sizes{gates * hidden, in});
    check_argument("w_hh", w_hh, input, Sizes{gates * hidden, hidden});
    DLK_CHECK(b_i.has_value() == b_h.has_value(), kOp, ": expected both biases or none");
    if (b_i) {
      check_argument("b_ih", *b_i, input, Sizes{gates * hidden});
      check_argument("b_hh", *b_h, input, Sizes{gates * hidden});
      b_ih = dense(*b_i);
      b_hh = dense(*b_h);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward(Tensor input, Tensor hx, Optional cx,
                                                     Tensor w_ih, Tensor w_hh, Optional b_ih,
                                                     Optional b_hh, Text mode, bool save, bool) {
  const Cell cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode);
  const DeviceScope scope(input);
  const auto made = [&](bool wanted, int64_t size) {
    return wanted ? torch::stable::new_empty(input, Sizes{cell.batch, size}) : none_of(input);
  };
  const bool lstm = cell.mode == Mode::kLstm;
  const Tensor h = made(true, cell.hidden), c = made(lstm, cell.hidden);
  const Tensor gates = made(save && cell.gates > 1, 4 * cell.hidden);
  if (h.numel() == 0) return {h, c, gates};
  hx = dense(hx);
  if (lstm) cx = dense(*cx);
  const Tensor x = dense(torch::stable::matmul(input, transposed(w_ih)));
  const Tensor product = dense(torch::stable::matmul(hx, transposed(w_hh)));
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    ForwardStep<S> p{};
    p.mode = cell.mode;
    p.rows = cell.batch;
    p.hidden = cell.hidden;
    p.x = input_pointer<S>("x", x);
    p.x_pitch = cell.gates * cell.hidden;
    p.h = input_pointer<S>("product", product);
    if (cell.b_ih) {
      p.b_ih = input_pointer<S>("b_ih", *cell.b_ih);
      p.b_hh = input_pointer<S>("b_hh", *cell.b_hh);
    }
    p.before = input_pointer<S>("hx", hx);
    p.state = output_pointer<S>("h", h);
    if (lstm) {
      p.c_given = input_pointer<S>("cx", *cx);
      p.c_made = output_pointer<S>("c", c);
    }
    if (save && cell.gates > 1) p.gates = output_pointer<S>("gates", gates);
    launch(step_forward_kernel<S>, "lstm cell", flat(cell.batch * cell.hidden), p);
  });
  return {h, c, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(
    Optional grad_h, Optional grad_c, Tensor input, Tensor hx, Optional cx, Tensor w_ih,
    Tensor w_hh, Optional b_ih, Optional b_hh, Tensor h, Tensor c, Tensor gates, Text mode, bool,
    bool want_input, bool want_states, bool want_weights) {
  const Cell cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode);
  const bool lstm = cell.mode == Mode::kLstm, gru = cell.mode == Mode::kGru;
  const Sizes shape{cell.batch, cell.hidden};
  if (grad_h) check_argument("grad_h", *grad_h, input, shape);
  if (grad_c && lstm) check_argument("grad_c", *grad_c, input, shape);
  check_argument("h", h, input, shape);
  if (lstm) check_argument("c", c, input, shape);
  if (cell.gates > 1) check_argument("gates", gates, input, Sizes{cell.batch, 4 * cell.hidden});
  const DeviceScope scope(input);
  const int64_t all = cell.gates * cell.hidden;
  const auto made = [&](bool wanted, int64_t size) {
    return wanted ? torch::stable::new_empty(input, Sizes{cell.batch, size}) : none_of(input);
  };
  const Tensor of_x = made(true, all), of_h = gru ? made(true, all) : of_x;
  const Tensor grad_cx = made(want_states && lstm, cell.hidden);
  const Tensor direct = made(want_states && gru, cell.hidden);
  const auto optional_dense = [](const Optional& x) { return x ? Optional(dense(*x)) : x; };
  grad_h = optional_dense(grad_h);
  grad_c = lstm ? optional_dense(grad_c) : Optional();
  hx = dense(hx);
  cx = optional_dense(cx);
  h = dense(h);
  c = dense(c);
  gates = dense(gates);
  if (cell.batch > 0 && cell.hidden > 0) {
    for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
      using S = decltype(tag);
      BackwardStep<S> p{};
      p.mode = cell.mode;
      p.rows = cell.batch;
      p.hidden = cell.hidden;
      if (grad_h) p.grad_state = input_pointer<S>("grad_h", *grad_h);
      if (grad_c) p.grad_c_given = input_pointer<S>("grad_c", *grad_c);
      if (cell.gates > 1) p.gates = input_pointer<S>("gates", gates);
      p.output = input_pointer<S>("h", h);
      p.output_pitch = cell.hidden;
      if (lstm) {
        p.c_given = input_pointer<S>("c", c);
        p.c_first = input_pointer<S>("cx", *cx);
        if (want_states) p.grad_c_made = output_pointer<S>("grad_cx", grad_cx);
      }
      if (gru) {
        p.h_first = input_pointer<S>("hx", hx);
        p.grad_h = output_pointer<S>("grad_sums", of_h);
        if (want_states) p.grad_direct = output_pointer<S>("direct", direct);
      }
      p.grad_x = output_pointer<S>("grad_gates", of_x);
      p.grad_pitch = all;
      launch(step_backward_kernel<S>, "lstm cell gradient", flat(cell.batch * cell.hidden), p);
    });
  }
  Tensor grad_hx = none_of(input);
  if (want_states) {
    grad_hx = torch::stable::matmul(of_h, w_hh);
    if (gru && grad_hx.numel() > 0) {
      const Tensor product = grad_hx;
      grad_hx = made(true, cell.hidden);
      for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
        using S = decltype(tag);
        const Sum<S> sum{.rows = cell.batch,
                         .columns = cell.hidden,
                         .a_pitch = cell.hidden,
                         .a = input_pointer<S>("product", product),
                         .b = input_pointer<S>("direct", direct),
                         .to = output_pointer<S>("grad_hx", grad_hx)};
        launch(sum_kernel<S>, "lstm gradient", flat(grad_hx.numel()), sum);
      });
    }
  }
  const auto weight = [&](const Tensor& d, const Tensor& x) {
    return want_weights ? torch::stable::matmul(transposed(d), x) : none_of(input);
  };
  Tensor grad_b_ih = none_of(input), grad_b_hh = none_of(input);
  if (want_weights && b_ih) {
    grad_b_ih = sum_of_rows(of_x);
    grad_b_hh = gru ? sum_of_rows(of_h) : torch::stable::clone(grad_b_ih);
  }
  return {want_input ? torch::stable::matmul(of_x, w_ih) : none_of(input),
          grad_hx,
          grad_cx,
          weight(of_x, input),
          weight(of_h, hx),
          grad_b_ih,
          grad_b_hh};
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, DLK_DEVICE_KEY, m) {
  using namespace dlkernels;
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
  m.impl("lstm_cell_forward", TORCH_BOX(&lstm_cell_forward));
  m.impl("lstm_cell_backward", TORCH_BOX(&lstm_cell_backward));
}

// Softmax cross-entropy on a GPU: loss, log-sum-exp and the gradient of the logits, for class
// indices and probabilities. Three walks, each one kernel for forward, forward with gradient, and
// backward:
//   rows     classes contiguous: 8 lanes to a cluster of blocks share a row
//   few      classes contiguous, at most 64, rows without gaps: a thread has a row, of a tile that
//            the block copies in and out as flat memory
//   columns  classes strided, positions contiguous: a thread has the positions of one vector
//
// With x' = softcap(x), m = max x', lse = m + log Σ exp(x' − m) and a mass s_c on each class:
//   indices        loss = (1−ε)·w_y·(lse − x'_y) + ε/C·Σ s_c·(lse − x'_c) + z·lse², s_c = w_c
//   probabilities  loss = Σ s_c·(lse − x'_c) + z·lse², s_c = w_c·((1−ε)·t_c + ε/C)
// The gradient is (e·scale − spread·s_c)·(1 − (x'/cap)²), at an index target (e·scale − hit)·(…),
// with the numbers of `Coefficients`.
//
// Bytes. Memory is all that is slow here: at 4.8 TB/s and 0.7 µs an SM of 132 needs 25 KB under
// way, 40 KB with a margin. A thread has kAhead vectors of 16 bytes under way and 1024 threads are
// on an SM: 64 KB. Statistics are made from registers as the vectors arrive (m and Σ e corrected
// when a batch of vectors has a larger m: one exponential an element). Where a gradient follows,
// each thread also keeps its vectors in shared memory, in a place of its own, which needs no
// barrier; it writes the gradient from there: each byte is read once and written once. (Copies to
// shared memory past the registers would read it once more.) A row longer than 64 KB is cut over a
// cluster of 2, 4 or 8 blocks, which exchange their sums once: three such blocks of 256 threads and
// 80 registers are on an SM of 227 KB, so that one writes while others read. Without clusters, or
// beyond their memory, the row is read a second time.
//
// Numerics. A thread sums in float (double for double) one batch at a time, lanes, warps and blocks
// are added as a tree; everything that is once per row is in double, but for the logarithm of the
// sum (`log_of_sum`). The sums of half types have 2^(x'·log₂e − M), one fma and one approximate
// exponential, and are brought from the rounded M = m·log₂e to m at the end; float32 has expf of
// the exact difference.
//
// The same bits every time and on every GPU of the same kind (with clusters or without): shapes
// alone fix how work is cut, and what blocks have is added by the next kernel in order. No value
// visits the host, so that a graph can be captured.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../cross_entropy.h"
#include "common.cuh"

namespace dlkernels {
namespace {

using namespace cross_entropy;

constexpr int kFewClasses = 64;              // contiguous classes up to this number are a thread's
constexpr int kBatch = 8;                    // classes that `few` adds at once
constexpr int kInlineTargets = 1024;         // Σ w_y of so many is made by every warp that needs it
constexpr int kPieces = 256;                 // most pieces of a larger Σ w_y
constexpr int kThreads = 512;                // most threads of a block of the walks
constexpr int kStagingThreads = 256;         // of a block of rows with a gradient
constexpr int kOneBlock = 1024;              // of `few` where one block has all rows, and of sums
constexpr int64_t kWantedThreads = 1 << 16;  // fewer leave a GPU idle
constexpr int64_t kStageBytes = 64 << 10;    // of a block of rows
constexpr int64_t kThreadBytes = 256;        // staged by a thread of columns: 700 threads an SM
constexpr int64_t kCached = 32 << 20;        // gradients up to this many bytes may stay in L2
// Shared memory of a block before what the walk needs: sums of warps, of blocks of the cluster,
// losses.
constexpr int kHeader = 2048;
constexpr int kSums = 32;  // bytes of the largest Sums

// Vectors that a thread has under way.
template <bool kGeneral>
constexpr int kAhead = kGeneral ? 2 : 4;

enum class Walk { kRows, kFew, kColumns };
enum class Pass { kForward, kBoth, kBackward };

template <typename S>
struct Problem {
  using T = accumulate_t<S>;
  Walk walk;
  Kind kind;
  int64_t reduction, ignore_index, rows, classes;
  Layout layout, target_layout, gradient_layout;
  T cap;                         // 0 without
  double kept, uniform, z_loss;  // 1−ε, ε/C (0 of plain indices), z
  const S* input;
  const int64_t* target = nullptr;  // (rows), or
  const S* probability = nullptr;   // like the input
  const S* weight = nullptr;        // (classes)
  const double* pieces = nullptr;   // Σ w_y in pieces; Σ w_c after them
  int number_of_pieces = 0;
  bool sum_of_weights = false;     // whether Σ w_c is there; C otherwise
  S* loss = nullptr;               // (rows) for reduction "none", else one element
  double* lse = nullptr;           // (rows)
  double* total_weight = nullptr;  // the divisor of the mean
  double* partial = nullptr;       // (blocks, 2): loss and weight, where there are several
  S* gradient = nullptr;
  bool stays = false;  // whether the gradient may stay in L2
  // Backward alone.
  const double* saved_lse = nullptr;  // (rows)
  const double* saved_total = nullptr;
  const S* grad_loss = nullptr;      // (rows) for reduction "none", else one element
  const double* grad_lse = nullptr;  // (rows) or null
};

// What is known of the classes of a row, or of some of them.
template <typename T>
struct Sums {
  T max = -kInfinity<T>;   // m
  T sum = 0;               // Σ exp(x' − m)
  T mass = 0, moment = 0;  // Σ s_c, Σ s_c·(x'_c − m)
};
static_assert(sizeof(Sums<double>) <= kSums && kHeader >= (kWarp + 16) * kSums + kWarp * 16);

template <typename T>
struct Coefficients {
  T scale, spread, hit;
  T max, low;  // e = exp((x' − max) − low)
};

DLK_DEVICE int64_t row_offset(const Layout& l, int64_t row) {
  if (l.inner == 1) return row * l.outer_stride;
  return row / l.inner * l.outer_stride + row % l.inner * l.inner_stride;
}

// ------------------------------------------------------------------------------------ exponentials

template <typename S>
struct Exponential {
  using T = accumulate_t<S>;
  static constexpr float kLog2e = 1.44269504f;

  // What the sums of half types subtract: M = m·log₂e, rounded, else m; 0 while every logit is
  // −inf: each e is then 0.
  static DLK_DEVICE T shift_of(T max) {
    const T shift = is_half<S> ? max * T(kLog2e) : max;
    return shift == -kInfinity<T> ? T(0) : shift;
  }
  static DLK_DEVICE T of(T x, T shift) {
    if constexpr (is_half<S>)
      return exp2_approximate(fmaf(x, kLog2e, -shift));
    else
      return relative(x, shift, 0);
  }
  // exp(from − to), of shifts.
  static DLK_DEVICE T ratio(T from, T to) {
    if constexpr (is_half<S>)
      return exp2_approximate(from - to);
    else
      return relative(from, to, 0);
  }
  // exp((x − m) − low), 1 for x = m and low = 0; of half types low is in units of ln 2.
  static DLK_DEVICE T relative(T x, T max, T low) {
    if constexpr (is_half<S>)
      return exp2_approximate(fmaf(x - max, kLog2e, -low));
    else if constexpr (std::is_same_v<T, float>)
      return expf((x - max) - low);
    else
      return exp(x - max);
  }
};

// log s = k·ln 2 + log f with f in [3/4, 3/2): of a float s, an error below 3e-8 without a
// logarithm in double; exact for 1.
DLK_DEVICE double log_of_sum(double s) { return log(s); }
DLK_DEVICE double log_of_sum(float s) {
  if (!(s > 0) || s == kInfinity<float>) return double(logf(s));
  int k;
  float f = frexpf(s, &k);
  if (f < 0.75f) f *= 2, --k;
  return k * 0.69314718055994531 + double(logf(f));
}

// x' = cap·u, u = tanh(x / cap). It is u that the gradient needs: 1 − u² of a rounded x' / cap is
// off by more than that of u where u is near 1.
template <bool kGeneral, typename S>
DLK_DEVICE accumulate_t<S> squash(const Problem<S>& p, accumulate_t<S> x, accumulate_t<S>& u) {
  if (!kGeneral || p.cap == 0) return x;
  if constexpr (std::is_same_v<accumulate_t<S>, float>)
    u = tanh_accurate(x / p.cap);
  else
    u = tanh(x / p.cap);
  return p.cap * u;
}

template <bool kGeneral, typename S>
DLK_DEVICE accumulate_t<S> squash(const Problem<S>& p, accumulate_t<S> x) {
  accumulate_t<S> u;
  return squash<kGeneral>(p, x, u);
}

// s_c of one class, of kinds that have it; t = t_c.
template <typename S>
DLK_DEVICE accumulate_t<S> mass(const Problem<S>& p, int64_t c, accumulate_t<S> t) {
  using T = accumulate_t<S>;
  const T w = p.weight ? widen(p.weight[c]) : T(1);
  return p.kind == Kind::kSmooth ? w : w * (t * T(p.kept) + T(p.uniform));
}

// -------------------------------------------------------------------------------------------- sums

// To a maximum that is no smaller.
template <bool kGeneral, typename S>
DLK_DEVICE void raise_max(Sums<accumulate_t<S>>& a, accumulate_t<S> max) {
  using E = Exponential<S>;
  if (!(a.max < max)) return;
  if (a.sum != 0) a.sum *= E::ratio(E::shift_of(a.max), E::shift_of(max));
  if (kGeneral && a.mass != 0)
    a.moment += a.mass * ((a.max == -kInfinity<accumulate_t<S>> ? 0 : a.max) - max);
  a.max = max;
}

// The sums of groups of `lanes` lanes, for every lane.
template <bool kGeneral, typename S>
DLK_DEVICE void add_lanes(Sums<accumulate_t<S>>& a, int lanes) {
  raise_max<kGeneral, S>(a, group_max(a.max, lanes));
  a.sum = group_sum(a.sum, lanes);
  if (kGeneral) {
    a.mass = group_sum(a.mass, lanes);
    a.moment = group_sum(a.moment, lanes);
  }
}

// From M to m: the sum of all of a row, where the largest e is 1.
template <typename S>
DLK_DEVICE void normalize(Sums<accumulate_t<S>>& a) {
  using E = Exponential<S>;
  if (is_half<S>) a.sum /= E::of(a.max, E::shift_of(a.max));
}

// The sums of a row that `lanes` threads of `blocks` blocks have in parts, for all of them. A
// cluster has arrived at its barrier before.
template <bool kGeneral, typename S>
DLK_DEVICE void add_row(Sums<accumulate_t<S>>& a, int lanes, unsigned blocks) {
  using Part = Sums<accumulate_t<S>>;
  add_lanes<kGeneral, S>(a, lanes < kWarp ? lanes : kWarp);
  if (lanes > kWarp) {
    Part* warps = reinterpret_cast<Part*>(shared_memory());
    if (lane() == 0) warps[warp_index()] = a;
    sync_block();
    a = lane() < lanes / kWarp ? warps[lane()] : Part{};
    add_lanes<kGeneral, S>(a, kWarp);
  }
  if (blocks > 1) {
    Part* parts = reinterpret_cast<Part*>(shared_memory() + kWarp * kSums);
    cluster_wait();  // every block of it runs
    if (threadIdx.x < blocks) cluster_shared(parts, threadIdx.x)[cluster_rank()] = a;
    sync_cluster();
    a = lane() < int(blocks) ? parts[lane()] : Part{};
    add_lanes<kGeneral, S>(a, kWarp);
  }
  normalize<S>(a);
}

// ------------------------------------------------------------------------------------- row algebra

// A row's target as it is in memory: asked for before the logits, looked at after them.
template <typename S>
DLK_DEVICE int64_t load_target(const Problem<S>& p, int64_t row) {
  return p.target ? p.target[row] : p.ignore_index;
}

// y; −1 where there is none: at an ignored row, and of probabilities.
template <typename S>
DLK_DEVICE int check_target(const Problem<S>& p, int64_t y) {
  if (y == p.ignore_index) return -1;
  DLK_DEVICE_CHECK_INDEX(uint64_t(y) < uint64_t(p.classes), "Target %lld is out of bounds.",
                         static_cast<long long>(y));
  return int(y);
}

// w_y; what a row with target y adds to the divisor of the mean.
template <typename S>
DLK_DEVICE double weight_of(const Problem<S>& p, int y) {
  if (y < 0) return p.target ? 0 : 1;
  return p.weight ? double(widen(p.weight[y])) : 1;
}

// w_y of a row, 0 of a target out of range: the walk is what fails, and no load waits for a check.
template <typename S>
DLK_DEVICE double unchecked_weight(const Problem<S>& p, int64_t row) {
  const int64_t y = p.target[row];
  if (y == p.ignore_index) return 0;
  if (!p.weight) return 1;
  return uint64_t(y) < uint64_t(p.classes) ? double(widen(p.weight[y])) : 0;
}

// Σ w_y, for every lane; whole warps call.
template <typename S>
DLK_DEVICE double total_weight(const Problem<S>& p) {
  if (p.saved_total) return *p.saved_total;
  if (!p.target) return double(p.rows);
  if (p.number_of_pieces == 1) return p.pieces[0];
  double total = 0;
  if (p.number_of_pieces > 0) {
#pragma unroll 4
    for (int i = lane(); i < p.number_of_pieces; i += kWarp) total += p.pieces[i];
  } else {
#pragma unroll 4
    for (int row = lane(); row < int(p.rows); row += kWarp) total += unchecked_weight(p, row);
  }
  return group_sum(total);
}

// What all rows' gradients are multiplied with; whole warps call.
template <typename S>
DLK_DEVICE double common_factor(const Problem<S>& p) {
  double factor = p.reduction == kMean ? 1 / total_weight(p) : 1;
  if (p.grad_loss && p.reduction != kNone) factor *= double(widen(*p.grad_loss));
  return factor;
}

// In double: a few numbers per row, whose errors all of its gradient would share. e is exp(x' − m),
// to be divided by its sum, in the forward pass, and softmax exp(x' − lse) in the backward.
template <typename S>
DLK_DEVICE Coefficients<accumulate_t<S>> coefficients(const Problem<S>& p, int64_t row, int y,
                                                      double factor,
                                                      const Sums<accumulate_t<S>>& a) {
  using T = accumulate_t<S>;
  Coefficients<T> k;
  double lse = 0, sum = 1;
  if (p.saved_lse) {
    // As a T and the rest, so that e is as exact as exp(x' − m) / Σe.
    lse = p.saved_lse[row];
    k.max = T(lse);
    k.low = std::isfinite(k.max) ? T(lse - double(k.max)) : T(0);
    if (is_half<S>) k.low *= T(Exponential<S>::kLog2e);
  } else {
    // While every logit is −inf, each e is 0.
    k.max = a.max == -kInfinity<T> ? T(0) : a.max;
    k.low = 0;
    sum = double(a.sum);
    if (p.z_loss != 0) lse = double(k.max) + log_of_sum(a.sum);
  }
  const double f =
      p.grad_loss && p.reduction == kNone ? factor * double(widen(p.grad_loss[row])) : factor;
  const double z = p.z_loss != 0 ? 2 * p.z_loss * lse : 0;
  double total = 0;
  k.spread = k.hit = 0;
  if (p.kind == Kind::kProbability) {
    total = f * (double(a.mass) + z);
    k.spread = T(f);
  } else if (y >= 0) {
    const double w = weight_of(p, y), nll = p.kept * w;
    const double all = p.sum_of_weights ? p.pieces[p.number_of_pieces] : double(p.classes);
    total = f * (nll + p.uniform * all + z);
    k.spread = T(f * p.uniform);
    k.hit = T(f * (nll + p.uniform * w));
  }
  if (p.grad_lse) total += p.grad_lse[row];
  k.scale = T(total / sum);
  return k;
}

// Writes log-sum-exp, and the loss for "none"; returns the loss.
template <typename S>
DLK_DEVICE double finish_row(const Problem<S>& p, int64_t row, int y,
                             const Sums<accumulate_t<S>>& a, S logit) {
  using T = accumulate_t<S>;
  // A row of −inf has log-sum-exp −inf, as torch.logsumexp, and a loss of NaN, as stock.
  const double excess = log_of_sum(a.sum);
  const double lse = a.max == -kInfinity<T> ? excess : double(a.max) + excess;
  double loss = p.z_loss != 0 ? p.z_loss * lse * lse : 0;
  if (p.kind == Kind::kProbability) {
    loss += double(a.mass) * excess - double(a.moment);
  } else if (y >= 0) {
    loss += p.kept * weight_of(p, y) * (lse - double(squash<true>(p, widen(logit))));
    if (p.kind == Kind::kSmooth) {
      const double all = p.sum_of_weights ? p.pieces[p.number_of_pieces] : double(p.classes);
      loss += p.uniform * (all * excess - double(a.moment));
    }
  } else {
    loss = 0;
  }
  p.lse[row] = lse;
  if (p.reduction == kNone) p.loss[row] = narrow<S>(T(loss));
  return loss;
}

template <typename S>
DLK_DEVICE void write_totals(const Problem<S>& p, double loss, double weight) {
  if (p.reduction == kMean) loss /= weight;
  if (p.reduction != kNone) *p.loss = narrow<S>(accumulate_t<S>(loss));
  *p.total_weight = weight;
}

// By one thread of a block, or of a cluster: what its rows add to the loss and the divisor.
template <typename S>
DLK_DEVICE void finish_block(const Problem<S>& p, double loss, double weight, unsigned blocks = 1) {
  if (gridDim.x == blocks) return write_totals(p, loss, weight);
  double* partial = p.partial + 2 * int64_t(blockIdx.x / blocks);
  partial[0] = loss;
  partial[1] = weight;
}

// (e·scale − spread·s_c)·(1 − u²) of one logit x; at the target y the other form.
template <bool kGeneral, typename S>
DLK_DEVICE accumulate_t<S> gradient_of(const Problem<S>& p, const Coefficients<accumulate_t<S>>& k,
                                       accumulate_t<S> x, accumulate_t<S> t, int64_t c,
                                       bool is_target) {
  using T = accumulate_t<S>;
  T u = 0;
  const T e = Exponential<S>::relative(squash<kGeneral>(p, x, u), k.max, k.low);
  // Rounded once: what is subtracted may be nearly e·scale.
  T v;
  if (is_target)
    v = std::fma(e, k.scale, -k.hit);
  else if (kGeneral && p.kind != Kind::kIndex)
    v = std::fma(e, k.scale, -(k.spread * mass(p, c, t)));
  else
    v = e * k.scale;
  if (kGeneral && p.cap != 0) v *= T(1) - u * u;
  return v;
}

DLK_DEVICE void store_gradient(void* to, const Bits16& v, bool stays) {
  if (stays)
    store16(to, v);
  else
    store_streaming(to, v);
}

// -------------------------------------------------------------------------------------------- rows

struct RowsShape {
  int log_lanes;  // of the threads of a block that share a row
  int rows;       // rows of a block
  int slots;      // vectors of a thread that stay in shared memory, 0 if they are read again
};

// A row cut into 16-byte vectors of the gradient, or of the logits where none is written. Vectors
// of a tensor that lies otherwise are gathered.
template <typename S, Pass kPass>
struct RowView {
  const S* x;
  const S* t = nullptr;  // probabilities
  S* gradient = nullptr;
  int head, edges, vectors;
  bool x_aligned = true, t_aligned = false;

  DLK_DEVICE RowView(const Problem<S>& p, int64_t row, bool active)
      : x(p.input + (active ? row_offset(p.layout, row) : 0)) {
    if constexpr (kPass != Pass::kForward)
      gradient = p.gradient + (active ? row_offset(p.gradient_layout, row) : 0);
    const Span<S> span(kPass == Pass::kForward ? x : gradient, active ? p.classes : 0);
    head = span.head;
    edges = span.edges;
    vectors = int(span.vectors);
    if constexpr (kPass != Pass::kForward) x_aligned = is_aligned(x + head);
    if (p.probability) {
      t = p.probability + (active ? row_offset(p.target_layout, row) : 0);
      t_aligned = is_aligned(t + head);
    }
  }
  DLK_DEVICE int edge(int i) const { return i < head ? i : i + vectors * kVector<S>; }
  DLK_DEVICE int vector(int j) const { return head + j * kVector<S>; }
};

// The threads that share a row, and this one's part of it: vectors and edges member, member + step
// …
struct Part {
  int member, step;
  Bits16* stage;  // its places in shared memory, `apart` one from another
  int apart;
};

// The sums of the classes of this part. With `staged` its vectors stay in shared memory.
template <bool kGeneral, typename S, Pass kPass>
DLK_DEVICE Sums<accumulate_t<S>> read_row(const Problem<S>& p, const RowView<S, kPass>& r,
                                          const Part& part, bool staged) {
  using T = accumulate_t<S>;
  using E = Exponential<S>;
  constexpr int N = kVector<S>, U = kAhead<kGeneral>;
  Sums<T> a;
  Bits16* stage = part.stage;
  for (int j0 = part.member; j0 < r.vectors; j0 += U * part.step) {
    Bits16 v[U];
    T x[N], max = a.max, sums[2] = {0, 0}, mass_sum = 0, moment = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = j0 + u * part.step;
      v[u] = j < r.vectors ? load_vector(r.x + r.vector(j), r.x_aligned) : lowest_vector<S>();
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (kGeneral && j0 + u * part.step >= r.vectors) continue;   // −inf would be −cap
      max = std::fmax(max, squash<kGeneral>(p, max_of<S>(v[u])));  // it is monotonic
    }
    raise_max<kGeneral, S>(a, max);
    const T shift = E::shift_of(a.max), finite = a.max == -kInfinity<T> ? T(0) : a.max;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = j0 + u * part.step;
      if (staged && j < r.vectors) store16(stage, v[u]);
      stage += part.apart;
      if (kGeneral && j >= r.vectors) continue;
      unpack<S>(v[u], x);
      if constexpr (!kGeneral) {
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i % 2] += E::of(x[i], shift);
      } else {
        T t[N] = {};
        if (r.t) unpack<S>(load_vector(r.t + r.vector(j), r.t_aligned), t);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const T value = squash<kGeneral>(p, x[i]);
          sums[i % 2] += E::of(value, shift);
          if (p.kind == Kind::kIndex) continue;
          const T s = mass(p, r.vector(j) + i, t[i]);
          mass_sum += s;
          moment += s * (value - finite);
        }
      }
    }
    a.sum += sums[0] + sums[1];
    a.mass += mass_sum;
    a.moment += moment;
  }
  for (int i = part.member; i < r.edges; i += part.step) {
    const int c = r.edge(i);
    const T x = squash<kGeneral>(p, widen(r.x[c]));
    raise_max<kGeneral, S>(a, std::fmax(a.max, x));
    a.sum += E::of(x, E::shift_of(a.max));
    if (!kGeneral || p.kind == Kind::kIndex) continue;
    const T s = mass(p, c, r.t ? widen(r.t[c]) : T(0));
    a.mass += s;
    a.moment += s * (x - (a.max == -kInfinity<T> ? T(0) : a.max));
  }
  return a;
}

// Σ s_c of the classes of this part.
template <typename S, Pass kPass>
DLK_DEVICE accumulate_t<S> read_mass(const Problem<S>& p, const RowView<S, kPass>& r,
                                     const Part& part) {
  using T = accumulate_t<S>;
  constexpr int N = kVector<S>;
  T total = 0;
  for (int j = part.member; j < r.vectors; j += part.step) {
    T t[N], sum = 0;
    unpack<S>(load_vector(r.t + r.vector(j), r.t_aligned), t);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += mass(p, r.vector(j) + i, t[i]);
    total += sum;
  }
  for (int i = part.member; i < r.edges; i += part.step)
    total += mass(p, r.edge(i), widen(r.t[r.edge(i)]));
  return total;
}

template <bool kGeneral, typename S, Pass kPass>
DLK_DEVICE void write_row(const Problem<S>& p, const RowView<S, kPass>& r, const Part& part,
                          bool staged, int y, const Coefficients<accumulate_t<S>>& k) {
  using T = accumulate_t<S>;
  constexpr int N = kVector<S>, U = kAhead<kGeneral>;
  const Bits16* stage = part.stage;
  for (int j0 = part.member; j0 < r.vectors; j0 += U * part.step) {
    Bits16 v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = j0 + u * part.step;
      if (j < r.vectors)
        v[u] = staged ? load16(stage) : load_vector(r.x + r.vector(j), r.x_aligned);
      stage += part.apart;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = j0 + u * part.step;
      if (j >= r.vectors) continue;
      const int c = r.vector(j);
      T x[N], t[N] = {};
      unpack<S>(v[u], x);
      if (kGeneral && r.t) unpack<S>(load_vector(r.t + c, r.t_aligned), t);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = gradient_of<kGeneral>(p, k, x[i], t[i], c + i, false);
      if (unsigned(y - c) < unsigned(N)) {
        T again[N];
        unpack<S>(v[u], again);
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (c + i == y) x[i] = gradient_of<kGeneral>(p, k, again[i], T(0), y, true);
      }
      store_gradient(r.gradient + c, pack<S>(x), p.stays);
    }
  }
  for (int i = part.member; i < r.edges; i += part.step) {
    const int c = r.edge(i);
    const T t = kGeneral && r.t ? widen(r.t[c]) : T(0);
    r.gradient[c] = narrow<S>(gradient_of<kGeneral>(p, k, widen(r.x[c]), t, c, c == y));
  }
}

// Only double needs more than 104.
// ptxas: <= 136 registers, 0 bytes static shared, 0 spills
template <typename S, Pass kPass, bool kGeneral>
DLK_KERNEL void __launch_bounds__(kPass == Pass::kBoth ? kStagingThreads : kThreads,
                                  sizeof(S) == 8 || kGeneral ? 1
                                  : kPass == Pass::kBoth     ? 3
                                                             : 2)
    rows_kernel(const Problem<S> p, const RowsShape shape) {
  using T = accumulate_t<S>;
  const int thread = int(threadIdx.x), lanes = 1 << shape.log_lanes;
  const int group = thread >> shape.log_lanes, place = thread & (lanes - 1);
  const unsigned blocks = cluster_blocks(), rank = cluster_rank();
  const bool sums = kPass != Pass::kBackward || (kGeneral && p.probability);
  if (blocks > 1 && sums) cluster_arrive();
  const int64_t row = int64_t(blocks > 1 ? blockIdx.x / blocks : blockIdx.x) * shape.rows + group;
  const bool active = row < p.rows && group < shape.rows;
  const int64_t target = active ? load_target(p, row) : p.ignore_index;
  const RowView<S, kPass> r(p, row, active);
  const Part part{
      int(rank) * lanes + place, lanes * int(blocks),
      reinterpret_cast<Bits16*>(shared_memory() + kHeader) + group * shape.slots * lanes + place,
      lanes};
  const bool staged = kPass == Pass::kBoth && shape.slots > 0;

  Sums<T> a;
  if constexpr (kPass != Pass::kBackward)
    a = read_row<kGeneral>(p, r, part, staged);
  else if (sums)
    a.mass = read_mass(p, r, part);
  const int y = check_target(p, target);
  const bool finishes = kPass != Pass::kBackward && active && part.member == 0;
  S logit = {};
  if (finishes && y >= 0) logit = r.x[y];
  if (sums) add_row<kGeneral, S>(a, lanes, blocks);
  if constexpr (kPass != Pass::kForward) {
    const double factor = common_factor(p);
    if (active) write_row<kGeneral>(p, r, part, staged, y, coefficients(p, row, y, factor, a));
  }
  if constexpr (kPass != Pass::kBackward) {
    double loss = 0, weight = 0;
    if (finishes) {
      loss = finish_row(p, row, y, a, logit);
      weight = weight_of(p, y);
    }
    if (lanes <= kWarp) {
      double* scratch = reinterpret_cast<double*>(shared_memory() + (kWarp + 16) * kSums);
      block_sum(loss, weight, scratch, lanes);
    }
    if (thread == 0 && rank == 0) finish_block(p, loss, weight, blocks);
  }
}

// --------------------------------------------------------------------------------------------- few

// n elements without gaps, as vectors where both ends are on 16 bytes.
template <typename S>
DLK_DEVICE void copy_in(S* shared, const S* global, int n) {
  const int vectors = is_aligned(global) ? n / kVector<S> : 0;
  for (int j = int(threadIdx.x); j < vectors; j += int(blockDim.x))
    copy_async16(shared + j * kVector<S>, global + j * kVector<S>, true);
  for (int i = vectors * kVector<S> + int(threadIdx.x); i < n; i += int(blockDim.x))
    shared[i] = global[i];
}

template <typename S>
DLK_DEVICE void copy_out(S* global, const S* shared, int n, bool stays) {
  const int vectors = is_aligned(global) ? n / kVector<S> : 0;
  for (int j = int(threadIdx.x); j < vectors; j += int(blockDim.x))
    store_gradient(global + j * kVector<S>, load16(shared + j * kVector<S>), stays);
  for (int i = vectors * kVector<S> + int(threadIdx.x); i < n; i += int(blockDim.x))
    global[i] = shared[i];
}

// ptxas: <= 64 registers, 0 bytes static shared, 0 spills
template <typename S, bool kGeneral>
DLK_KERNEL void __launch_bounds__(kOneBlock, 1) few_kernel(const Problem<S> p) {
  using T = accumulate_t<S>;
  const int thread = int(threadIdx.x), classes = int(p.classes);
  const int64_t row0 = int64_t(blockIdx.x) * blockDim.x, row = row0 + thread;
  const int64_t left = p.rows - row0;
  const int rows = int(left < blockDim.x ? left : blockDim.x);
  // Rows a multiple of 32 bytes apart would meet in the same banks: each row begins elsewhere.
  const int first = classes * sizeof(S) % 32 == 0 ? thread % classes : 0;
  S* tile = reinterpret_cast<S*>(shared_memory() + kHeader);
  S* t_tile = tile + (int(blockDim.x) * classes + kVector<S> - 1) / kVector<S> * kVector<S>;
  copy_in(tile, p.input + row0 * classes, rows * classes);
  if (kGeneral && p.probability) copy_in(t_tile, p.probability + row0 * classes, rows * classes);
  copy_async_commit();
  const int64_t target = thread < rows ? load_target(p, row) : p.ignore_index;
  const double factor = p.gradient ? common_factor(p) : 1;
  copy_async_wait<0>();
  sync_block();

  const int y = check_target(p, target);
  S* x = tile + thread * classes;
  const S* t = kGeneral && p.probability ? t_tile + thread * classes : nullptr;
  Sums<T> a;
  double loss = 0, weight = 0;
  if (thread < rows) {
    const int end = first + classes;
    const auto at = [&](int i) { return i < classes ? i : i - classes; };
    if (!p.saved_lse)
      for (int c = 0; c < classes; ++c)
        a.max = std::fmax(a.max, squash<kGeneral>(p, widen(x[at(c)])));
    const T shift = Exponential<S>::shift_of(a.max);
    const T max = a.max == -kInfinity<T> ? T(0) : a.max;
    if (!p.saved_lse || (kGeneral && t))
      for (int i0 = first; i0 < end; i0 += kBatch) {  // whose sums join the totals at once
        Sums<T> part;
        for (int i = i0; i < i0 + kBatch && i < end; ++i) {
          const T value = squash<kGeneral>(p, widen(x[at(i)]));
          part.sum += Exponential<S>::of(value, shift);
          if (!kGeneral || p.kind == Kind::kIndex) continue;
          const T s = mass(p, at(i), t ? widen(t[at(i)]) : T(0));
          part.mass += s;
          part.moment += s * (value - max);
        }
        a.sum += part.sum;
        a.mass += part.mass;
        a.moment += part.moment;
      }
    if (!p.saved_lse) {
      normalize<S>(a);
      loss = finish_row(p, row, y, a, y >= 0 ? x[y] : S{});
      weight = weight_of(p, y);
    }
    if (p.gradient) {
      const Coefficients<T> k = coefficients(p, row, y, factor, a);
      for (int i = first; i < end; ++i) {
        const int c = at(i);
        x[c] =
            narrow<S>(gradient_of<kGeneral>(p, k, widen(x[c]), t ? widen(t[c]) : T(0), c, c == y));
      }
    }
  }
  if (p.gradient) {
    sync_block();
    copy_out(p.gradient + row0 * classes, tile, rows * classes, p.stays);
  }
  if (p.saved_lse) return;
  block_sum(loss, weight, reinterpret_cast<double*>(shared_memory()));
  if (thread == 0) finish_block(p, loss, weight);
}

// ----------------------------------------------------------------------------------------- columns

struct ColumnsShape {
  int width;    // pieces of positions of a block, and threads that share a slice of the classes
  int slices;   // of the classes; width · slices threads
  bool staged;  // whether the block's logits stay in shared memory
  int slots;    // numbers of a position in shared memory
};

// What a thread has of one class: the positions of 16 bytes, or one position.
template <typename S, bool kVectors>
struct Piece {
  using T = accumulate_t<S>;
  static constexpr int kPositions = kVectors ? kVector<S> : 1;
  using Bits = std::conditional_t<kVectors, Bits16, S>;

  static DLK_DEVICE Bits load(const S* p) {
    if constexpr (kVectors)
      return load_streaming(p);
    else
      return *p;
  }
  static DLK_DEVICE void unpack(const Bits& bits, T (&v)[kPositions]) {
    if constexpr (kVectors)
      dlkernels::unpack<S>(bits, v);
    else
      v[0] = widen(bits);
  }
  static DLK_DEVICE void store(S* p, const T (&v)[kPositions], bool stays) {
    if constexpr (kVectors)
      store_gradient(p, pack<S>(v), stays);
    else
      *p = narrow<S>(v[0]);
  }
  static DLK_DEVICE void stage(Bits* p, const Bits& v) {
    if constexpr (kVectors)
      store16(p, v);
    else
      *p = v;
  }
  static DLK_DEVICE Bits staged(const Bits* p) {
    if constexpr (kVectors)
      return load16(p);
    else
      return *p;
  }
};

// The sums of the positions of a thread, over classes [slice, classes) in steps.
template <bool kGeneral, bool kVectors, typename S>
DLK_DEVICE void read_columns(const Problem<S>& p, const S* x, const S* t, int slice, int step,
                             typename Piece<S, kVectors>::Bits* stage, bool staged, int threads,
                             Sums<accumulate_t<S>> (&a)[Piece<S, kVectors>::kPositions]) {
  using T = accumulate_t<S>;
  using P = Piece<S, kVectors>;
  constexpr int N = P::kPositions, U = kAhead<kGeneral> * (kVectors ? 1 : 2);
  for (int64_t c = slice; c < p.classes; c += U * step) {
    typename P::Bits v[U];
    T max[N], shift[N], part[N];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (c + u * step < p.classes) v[u] = P::load(x + (c + u * step) * p.layout.class_stride);
#pragma unroll
    for (int i = 0; i < N; ++i) max[i] = a[i].max;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (c + u * step >= p.classes) continue;
      if (staged) P::stage(stage + u * threads, v[u]);
      T value[N];
      P::unpack(v[u], value);
#pragma unroll
      for (int i = 0; i < N; ++i) max[i] = std::fmax(max[i], squash<kGeneral>(p, value[i]));
    }
    stage += U * threads;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      raise_max<kGeneral, S>(a[i], max[i]);
      shift[i] = Exponential<S>::shift_of(a[i].max);
      part[i] = 0;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (c + u * step >= p.classes) continue;
      T value[N], probability[N] = {};
      P::unpack(v[u], value);
      if (kGeneral && t)
        P::unpack(P::load(t + (c + u * step) * p.target_layout.class_stride), probability);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T squashed = squash<kGeneral>(p, value[i]);
        part[i] += Exponential<S>::of(squashed, shift[i]);
        if (kGeneral && p.kind != Kind::kIndex) {
          const T s = mass(p, c + u * step, probability[i]);
          a[i].mass += s;
          a[i].moment += s * (squashed - (a[i].max == -kInfinity<T> ? T(0) : a[i].max));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) a[i].sum += part[i];
  }
}

// ptxas: <= 112 registers, 0 bytes static shared, 0 spills
template <typename S, bool kGeneral, bool kVectors>
DLK_KERNEL void __launch_bounds__(kThreads, 1)
    columns_kernel(const Problem<S> p, const ColumnsShape shape) {
  using T = accumulate_t<S>;
  using P = Piece<S, kVectors>;
  constexpr int N = P::kPositions;
  const int thread = int(threadIdx.x), threads = shape.width * shape.slices;
  const int column = thread % shape.width, slice = thread / shape.width;
  const int positions = shape.width * N;  // of the block
  const int64_t row0 = int64_t(blockIdx.x) * positions, row = row0 + column * N;
  const bool active = row < p.rows;
  const double factor = p.gradient ? common_factor(p) : 1;

  // Slot k of position i is at k·positions + i: first the sums, a slot each and slice after slice,
  // then over them, by the thread that has read them, the coefficients.
  T* slots = reinterpret_cast<T*>(shared_memory() + kHeader);
  typename P::Bits* stage =
      reinterpret_cast<typename P::Bits*>(slots + shape.slots * positions) + thread;
  const S* x = p.input + (active ? row_offset(p.layout, row) : 0);
  const S* t = nullptr;
  if (kGeneral && p.probability)
    t = p.probability + (active ? row_offset(p.target_layout, row) : 0);

  constexpr int kFields = kGeneral ? 4 : 2;
  if (active && (!p.saved_lse || t)) {
    Sums<T> a[N];
    read_columns<kGeneral, kVectors>(p, x, t, slice, shape.slices, stage, shape.staged, threads, a);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T* slot = slots + slice * kFields * positions + column * N + i;
      slot[0] = a[i].max;
      slot[positions] = a[i].sum;
      if (kGeneral) {
        slot[2 * positions] = a[i].mass;
        slot[3 * positions] = a[i].moment;
      }
    }
  }
  sync_block();

  double loss = 0, weight = 0;
  for (int i = thread; i < positions && row0 + i < p.rows; i += threads) {
    const int y = check_target(p, load_target(p, row0 + i));
    Sums<T> a;
    if (!p.saved_lse || t)
      for (int s = 0; s < shape.slices; ++s) {
        const T* slot = slots + s * kFields * positions + i;
        Sums<T> b{slot[0], slot[positions]};
        if (kGeneral) b.mass = slot[2 * positions], b.moment = slot[3 * positions];
        const T max = std::fmax(a.max, b.max);
        raise_max<kGeneral, S>(a, max);
        raise_max<kGeneral, S>(b, max);
        a.sum += b.sum;
        a.mass += b.mass;
        a.moment += b.moment;
      }
    if (!p.saved_lse) {
      normalize<S>(a);
      S logit = {};
      if (y >= 0)
        logit = p.input[row_offset(p.layout, row0 + i) + int64_t(y) * p.layout.class_stride];
      loss += finish_row(p, row0 + i, y, a, logit);
      weight += weight_of(p, y);
    }
    if (p.gradient) {
      const Coefficients<T> k = coefficients(p, row0 + i, y, factor, a);
      T* slot = slots + i;
      slot[0] = k.scale;
      slot[positions] = k.spread;
      slot[2 * positions] = k.hit;
      slot[3 * positions] = k.max;
      slot[4 * positions] = k.low;
      slot[5 * positions] = bit_cast<T>(std::conditional_t<sizeof(T) == 8, int64_t, int>(y));
    }
  }

  if (p.gradient) {
    sync_block();
    if (active) {
      Coefficients<T> k[N];
      int y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T* slot = slots + column * N + i;
        k[i] = {slot[0], slot[positions], slot[2 * positions], slot[3 * positions],
                slot[4 * positions]};
        y[i] = int(bit_cast<std::conditional_t<sizeof(T) == 8, int64_t, int>>(slot[5 * positions]));
      }
      S* gradient = p.gradient + row_offset(p.gradient_layout, row);
#pragma unroll 2
      for (int64_t c = slice; c < p.classes; c += shape.slices) {
        T value[N], probability[N] = {};
        P::unpack(shape.staged ? P::staged(stage) : P::load(x + c * p.layout.class_stride), value);
        stage += threads;
        if (kGeneral && t) P::unpack(P::load(t + c * p.target_layout.class_stride), probability);
#pragma unroll
        for (int i = 0; i < N; ++i)
          value[i] = gradient_of<kGeneral>(p, k[i], value[i], probability[i], c, c == y[i]);
        P::store(gradient + c * p.gradient_layout.class_stride, value, p.stays);
      }
    }
  }
  if (p.saved_lse) return;
  block_sum(loss, weight, reinterpret_cast<double*>(shared_memory()));
  if (thread == 0) finish_block(p, loss, weight);
}

// -------------------------------------------------------------------------------------------- sums

// Block i < pieces: Σ w_y of its part of the targets. The block after them: Σ w_c.
// ptxas: <= 40 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kOneBlock, 1)
    weights_kernel(const Problem<S> p, int64_t part, double* sums) {
  const bool classes = int(blockIdx.x) == p.number_of_pieces;
  const int64_t begin = classes ? 0 : int64_t(blockIdx.x) * part;
  const int64_t all = classes ? p.classes : p.rows;
  const int64_t end = classes || all - begin < part ? all : begin + part;
  double total = 0, unused = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x)
    total += classes ? double(widen(p.weight[i])) : unchecked_weight(p, i);
  block_sum(total, unused, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Adds what the blocks of a walk have found.
// ptxas: <= 32 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kOneBlock, 1) totals_kernel(const Problem<S> p, int64_t blocks) {
  double loss = 0, weight = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    loss += p.partial[2 * i];
    weight += p.partial[2 * i + 1];
  }
  block_sum(loss, weight, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) write_totals(p, loss, weight);
}

// gradient *= factor; nothing is touched where it is 1.
// ptxas: <= 56 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void __launch_bounds__(kThreads, 2)
    scale_kernel(S* gradient, int64_t n, const S* factor, bool stays) {
  using T = accumulate_t<S>;
  constexpr int N = kVector<S>, U = 4;
  const T by = widen(*factor);
  if (by == T(1)) return;
  const Span<S> span(gradient, n);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j0 = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j0 < span.vectors;
       j0 += U * step) {
    Bits16 v[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (j0 + u * step < span.vectors) v[u] = load16(gradient + span.vector(j0 + u * step));
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (j0 + u * step >= span.vectors) continue;
      T x[N];
      unpack<S>(v[u], x);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= by;
      store_gradient(gradient + span.vector(j0 + u * step), pack<S>(x), stays);
    }
  }
  if (blockIdx.x == 0 && int(threadIdx.x) < span.edges) {
    S* at = gradient + span.edge(int(threadIdx.x));
    *at = narrow<S>(widen(*at) * by);
  }
}

// ------------------------------------------------------------------------------------------ shapes

struct Plan {
  int64_t groups;  // blocks, or clusters of blocks, that have a partial sum each
  int threads;
  size_t shared = kHeader;
  unsigned cluster = 1;
  RowsShape rows = {};
  ColumnsShape columns = {};
};

// How many threads of a block share a row, by its vectors of 16 bytes: each has 8 to 32,
// so that
// the exchange between them is not what takes the time.
struct LanesOfRow {
  int64_t vectors;
  int lanes;
};
constexpr LanesOfRow kLanesOfRow[] = {{128, 8}, {512, 16}, {1024, 32}, {2048, 128}, {8192, 256}};

template <typename S>
Plan plan_rows(const Problem<S>& p) {
  const int64_t vectors = divide_up(p.classes, kVector<S>);
  const bool staged = p.gradient && !p.saved_lse;
  Plan plan;
  int lanes = kThreads;
  for (const LanesOfRow& line : kLanesOfRow)
    if (vectors <= line.vectors) {
      lanes = line.lanes;
      break;
    }
  if (p.rows <= 32 && p.rows * vectors <= 2048) {  // one block, one launch
    lanes = kWarp;
    while (p.rows * lanes > kStagingThreads) lanes /= 2;
    plan.rows.rows = int(p.rows);
  } else {
    while (lanes < kThreads && p.rows * lanes < kWantedThreads && vectors > 8 * lanes)
      lanes = lanes == kWarp ? 128 : 2 * lanes;
    if (staged) lanes = std::min(lanes, kStagingThreads);
    plan.rows.rows = lanes > kWarp ? 1 : 128 / lanes;
  }
  plan.threads = int(divide_up(plan.rows.rows * lanes, kWarp) * kWarp);
  if (lanes > kWarp && has_clusters(rows_kernel<S, Pass::kForward, false>))
    while (plan.cluster < 8 && ((staged && vectors * 16 > kStageBytes * plan.cluster) ||
                                (p.rows * lanes * plan.cluster < kWantedThreads &&
                                 vectors > 16 * lanes * plan.cluster)))
      plan.cluster *= 2;
  if (staged) {
    const int64_t slots = divide_up(vectors, lanes * plan.cluster);
    const size_t bytes = kHeader + size_t(plan.threads) * slots * 16;
    // Two blocks on an SM, if one is to write while the other reads.
    if (bytes <= shared_limit() / (plan.cluster == 8 ? 1 : 2)) {
      plan.rows.slots = int(slots);
      plan.shared = bytes;
    }
  }
  while (1 << plan.rows.log_lanes < lanes) ++plan.rows.log_lanes;
  plan.groups = divide_up(p.rows, plan.rows.rows);
  return plan;
}

template <typename S>
Plan plan_few(const Problem<S>& p) {
  const int64_t row = p.classes * int64_t(sizeof(S)) * (p.probability ? 2 : 1);
  const bool one_block = p.rows <= kOneBlock && p.rows * row <= kStageBytes;
  Plan plan;
  plan.threads = one_block ? int(divide_up(p.rows, kWarp) * kWarp) : 128;
  plan.shared = kHeader + size_t(plan.threads) * row + 16;
  plan.groups = divide_up(p.rows, plan.threads);
  return plan;
}

// `vectors`: whether a piece is 16 bytes of positions, else it is one.
template <typename S>
Plan plan_columns(const Problem<S>& p, bool vectors, bool general) {
  const int64_t positions = vectors ? kVector<S> : 1, pieces = p.rows / positions;
  const int64_t piece_bytes = positions * int64_t(sizeof(S));
  const bool staging = p.gradient && !p.saved_lse;
  const int narrowest = vectors ? 8 : 32;  // 128 bytes, or what a warp has
  int width = power_of_two_from(pieces, 1, 128), slices = 1, threads = std::max(width, kWarp);
  slices = threads / width;
  const auto stage_bytes = [&] {
    return staging ? divide_up(p.classes, slices) * threads * piece_bytes : 0;
  };
  const auto more_slices_help = [&] {
    return p.classes >= 8 * slices &&
           (pieces * slices < kWantedThreads || stage_bytes() > threads * kThreadBytes);
  };
  if (p.rows * p.classes > 1 << 14)  // few logits stay with one block, and one launch
    while (width > narrowest && more_slices_help()) width /= 2, slices = threads / width;
  while (threads < kThreads && more_slices_help()) threads *= 2, slices *= 2;
  Plan plan;
  plan.threads = threads;
  plan.groups = divide_up(pieces, width);
  const int fields = slices * (general ? 4 : 2);
  const int slots = p.gradient ? std::max(6, fields) : fields;
  plan.shared = kHeader + size_t(slots) * width * positions * sizeof(accumulate_t<S>);
  const bool staged = staging && plan.shared + stage_bytes() <= shared_limit();
  if (staged) plan.shared += stage_bytes();
  plan.columns = {width, slices, staged, slots};
  return plan;
}

// ------------------------------------------------------------------------------------- preparation

// Whether the pieces of 16 bytes of every class of every outer index are on 16 bytes.
template <typename S>
bool has_vectors(const S* data, const Layout& l) {
  const auto whole = [](int64_t n) { return n % kVector<S> == 0; };
  return is_aligned(data) && whole(l.inner) && (l.classes == 1 || whole(l.class_stride)) &&
         (l.outer == 1 || whole(l.outer_stride));
}

bool has_no_gaps(const Layout& l) {
  return (l.inner == 1 || l.inner_stride == l.classes) &&
         (l.outer == 1 || l.outer_stride == l.inner * l.classes);
}

// The problem of a call, and the tensors it points into.
template <typename S>
struct Prepared : LaidOut {
  Optional weight, workspace;
  Problem<S> problem = {};

  Prepared(const Tensor& input_, const Target& target_, const Optional& weight_,
           const Options& options, bool with_gradient)
      : LaidOut(input_, target_, with_gradient) {
    Problem<S>& p = problem;
    p.reduction = options.reduction;
    p.ignore_index = options.ignore_index;
    p.layout = layout;
    p.target_layout = target_layout;
    p.gradient_layout = gradient_layout;
    p.rows = layout.outer * layout.inner;
    DLK_CHECK(layout.classes < int64_t(1) << 31, kOp, ": expected fewer than 2^31 classes, got ",
              layout.classes);
    p.classes = layout.classes;
    p.kind = target.is_probability         ? Kind::kProbability
             : options.label_smoothing > 0 ? Kind::kSmooth
                                           : Kind::kIndex;
    p.cap = accumulate_t<S>(options.softcap);
    p.kept = 1 - options.label_smoothing;
    p.uniform = options.label_smoothing / double(p.classes);
    p.z_loss = options.z_loss;
    const bool dense =
        has_no_gaps(layout) && has_no_gaps(target_layout) && has_no_gaps(gradient_layout);
    p.walk = !layout.is_rows()                   ? Walk::kColumns
             : p.classes <= kFewClasses && dense ? Walk::kFew
                                                 : Walk::kRows;
    p.input = input_pointer<S>("input", input);
    if (target.is_probability)
      p.probability = input_pointer<S>("target", target.tensor);
    else
      p.target = input_pointer<int64_t>("target", target.tensor);
    if (weight_) {
      weight = torch::stable::contiguous(*weight_);
      p.weight = input_pointer<S>("weight", *weight);
    }
    if (with_gradient) {
      p.gradient = output_pointer<S>("gradient", *written);
      p.stays = written->numel() * int64_t(sizeof(S)) <= kCached;
    }
  }

  void run();
};

template <typename S, bool kGeneral>
void launch_walk(const Problem<S>& p, const Plan& plan, bool vectors) {
  LaunchShape shape{.grid = unsigned(plan.groups * plan.cluster),
                    .block = unsigned(plan.threads),
                    .shared = plan.shared,
                    .cluster = plan.cluster};
  constexpr const char* kRowsName = "cross_entropy rows";
  if (p.walk == Walk::kRows && p.saved_lse)
    launch(rows_kernel<S, Pass::kBackward, kGeneral>, kRowsName, shape, p, plan.rows);
  else if (p.walk == Walk::kRows && p.gradient)
    launch(rows_kernel<S, Pass::kBoth, kGeneral>, kRowsName, shape, p, plan.rows);
  else if (p.walk == Walk::kRows)
    launch(rows_kernel<S, Pass::kForward, kGeneral>, kRowsName, shape, p, plan.rows);
  else if (p.walk == Walk::kFew)
    launch(few_kernel<S, kGeneral>, "cross_entropy few", shape, p);
  else if (vectors)
    launch(columns_kernel<S, kGeneral, true>, "cross_entropy columns", shape, p, plan.columns);
  else
    launch(columns_kernel<S, kGeneral, false>, "cross_entropy columns", shape, p, plan.columns);
}

// Up to three launches: Σ w_y where the gradient of many rows needs it (and Σ w_c), the walk, and
// the sum over its blocks where there are several.
template <typename S>
void Prepared<S>::run() {
  Problem<S>& p = problem;
  const bool general = p.kind != Kind::kIndex || p.cap != 0;
  const bool vectors = has_vectors(p.input, p.layout) &&
                       (!p.probability || has_vectors(p.probability, p.target_layout)) &&
                       (!p.gradient || has_vectors(p.gradient, p.gradient_layout));
  const Plan plan = p.walk == Walk::kRows  ? plan_rows(p)
                    : p.walk == Walk::kFew ? plan_few(p)
                                           : plan_columns(p, vectors, general);
  const bool forward = !p.saved_lse;
  const int64_t partials = forward && plan.groups > 1 ? 2 * plan.groups : 0;
  const bool targets =
      forward && p.gradient && p.target && p.reduction == kMean && p.rows > kInlineTargets;
  const bool classes = p.weight && p.kind == Kind::kSmooth;
  int64_t part = 1 << 15;
  while (targets && part * kPieces < p.rows) part *= 2;
  p.number_of_pieces = targets ? int(divide_up(p.rows, part)) : 0;
  p.sum_of_weights = classes;
  const int64_t pieces = p.number_of_pieces + classes;
  if (partials + pieces > 0) {
    workspace = torch::stable::new_empty(input, std::vector<int64_t>{partials + pieces},
                                         ScalarType::Double);
    double* memory = scratch_pointer<double>("workspace", *workspace);
    p.partial = memory;
    if (pieces > 0) {
      const LaunchShape shape{.grid = unsigned(pieces), .block = kOneBlock, .shared = kHeader};
      launch(weights_kernel<S>, "cross_entropy weights", shape, p, part, memory + partials);
      p.pieces = memory + partials;
    }
  }
  if (general)
    launch_walk<S, true>(p, plan, vectors);
  else
    launch_walk<S, false>(p, plan, vectors);
  if (partials > 0)
    launch(totals_kernel<S>, "cross_entropy totals",
           {.grid = 1, .block = kOneBlock, .shared = kHeader}, p, plan.groups);
}

// ------------------------------------------------------------------------------------ host entries

auto on_gpu_of(const Tensor& first) {
  return [&first](const char* argument, const Tensor& t) { check_on_gpu(kOp, argument, t, first); };
}

Outputs forward(const Tensor& input, const Tensor& target, const Optional& weight,
                const Options& options, bool with_gradient) {
  const Target checked = check_arguments(input, target, weight, options, on_gpu_of(input));
  const DeviceScope scope(input);
  Outputs made = new_outputs(input, options, with_gradient);
  if (input.numel() == 0) return made;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Prepared<S> prepared(input, checked, weight, options, with_gradient);
    prepared.problem.lse = output_pointer<double>("lse", made.lse);
    prepared.problem.loss = output_pointer<S>("loss", made.loss);
    prepared.problem.total_weight = output_pointer<double>("total_weight", made.total_weight);
    prepared.run();
    if (with_gradient) made.gradient = prepared.finished_gradient();
  });
  return made;
}

Tensor backward(const Tensor& grad_loss, const Optional& grad_lse, const Tensor& input,
                const Tensor& target, const Optional& weight, const Tensor& lse,
                const Tensor& total_weight, const Options& options) {
  const auto on_gpu = on_gpu_of(input);
  const Target checked = check_arguments(input, target, weight, options, on_gpu);
  check_backward(grad_loss, grad_lse, input, lse, total_weight, options, on_gpu);
  const DeviceScope scope(input);
  if (input.numel() == 0) return torch::stable::empty_like(input);
  Optional gradient;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Prepared<S> prepared(input, checked, weight, options, true);
    Problem<S>& p = prepared.problem;
    p.saved_lse = input_pointer<double>("lse", lse);
    p.saved_total = input_pointer<double>("total_weight", total_weight);
    p.grad_loss = input_pointer<S>("grad_loss", grad_loss);
    if (grad_lse) p.grad_lse = input_pointer<double>("grad_lse", *grad_lse);
    prepared.run();
    gradient = prepared.finished_gradient();
  });
  return *gradient;
}

// For a gradient made in the forward pass.
void cross_entropy_scale_(Tensor gradient, Tensor grad_loss) {
  check_scale(gradient, grad_loss, on_gpu_of(gradient));
  const int64_t n = gradient.numel();
  if (n == 0) return;
  const DeviceScope scope(gradient);
  for_dtype<bf16, f16>(gradient.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    constexpr int kBlock = 256;
    // Few enough to be gone at once where the factor is 1.
    const int64_t blocks = std::min<int64_t>(divide_up(n, kBlock * 4 * kVector<S>), 2048);
    const LaunchShape shape{.grid = unsigned(blocks), .block = kBlock};
    launch(scale_kernel<S>, "cross_entropy scale", shape, inout_pointer<S>("gradient", gradient), n,
           input_pointer<S>("grad_loss", grad_loss), n * int64_t(sizeof(S)) <= kCached);
  });
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, DLK_DEVICE_KEY, m) {
  using namespace dlkernels;
  using namespace dlkernels::cross_entropy;
  m.impl("cross_entropy", TORCH_BOX(&raw_forward<forward>));
  m.impl("cross_entropy_forward", TORCH_BOX(&raw_forward<forward>));
  m.impl("cross_entropy_forward_backward", TORCH_BOX(&raw_forward_backward<forward>));
  m.impl("cross_entropy_backward", TORCH_BOX(&raw_backward<backward>));
  m.impl("cross_entropy_scale_", TORCH_BOX(&cross_entropy_scale_));
}

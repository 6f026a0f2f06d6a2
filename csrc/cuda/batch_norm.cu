// Batch normalisation on a GPU, with a residual and an activation in both directions:
//   y = f((x − mean)·rstd·weight + bias + residual)
// and, with g = dL/dy·f'(y), f' from y, and M values of a channel,
//   dx = weight·rstd·(g − Σg/M − (x − mean)·rstd²·Σg·(x − mean)/M), dresidual = g
// Neither g nor anything between x and y is ever in memory. A ReLU's f' is of the sign of y:
// without a residual it is found again from x, with the same roundings, and y is not read.
//
//   sums    two sums of each channel, of a piece of the tensor a block: Σ(x − k) and Σ(x − k)², or
//   Σg
//           and Σg·(x − mean)
//   totals  adds the pieces in order, and makes of them mean, rstd and the running statistics, or
//   the
//           gradients of weight and bias
//   apply   y, or dx and the gradient of the residual
// Where one block has all of a channel, `sums` does the work of the others: one launch. `apply`
// takes the pieces in the opposite order: it begins with what L2 has of `sums`.
//
// Four walks over memory, none of which transposes:
//   channels    channels contiguous (channels_last, or no pixels): a thread has the channels of 16
//               bytes and goes from pixel to pixel
//   channel     the same, one channel a thread: where rows are no whole vectors
//   planes      pixels contiguous: a block has one channel, its planes as one list of vectors
//   cut_planes  the same of planes that begin anywhere: the vectors at their borders are also the
//               neighbours', and are masked
// 2 or 4 vectors of each tensor are under way at once.
//
// Numerics. Statistics are sums of x − k, k being the median of three values of the channel: no
// large mean, and no single outlier, is subtracted after the fact. Eight positions are added in
// float, all else in double; the GPUs that this is for add double at half the rate of float, and
// where that is 1/64 these additions still keep pace with memory.
//
// NOT MEASURED: blocks, loads under way and the shapes of one launch are reckoned; no GPU has timed
// them.
//
// The same bits every time: the shape alone fixes the pieces. No value visits the host.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "common.cuh"

namespace dlkernels {
namespace {

constexpr const char* kOp = "batch_norm";
constexpr int kThreads = 256;
constexpr int kMostColumns = 32;      // vectors of neighbouring channels that a block has
constexpr int kFewColumns = 4;        // 64 bytes: least that a block reads of a pixel
constexpr int64_t kBlocks = 8 * 132;  // wanted, two to four waves of an H100
constexpr int64_t kWave = 132;        // so many channels' blocks keep a GPU busy
constexpr int kFloatPositions = 8;    // added in float
constexpr int kTotalsChannels = 4;    // of a block of `totals`: 32 bytes
constexpr int kHeader = 5120;         // bytes of shared memory for numbers of each channel

enum class Walk { kChannels, kChannel, kPlanes, kCutPlanes };
template <Walk kWalk>
constexpr bool kIsLast = kWalk == Walk::kChannels || kWalk == Walk::kChannel;

// Elements of a load, and the channels that they are of.
template <typename S, Walk kWalk>
constexpr int kWidth = kWalk == Walk::kChannel ? 1 : kVector<S>;
template <typename S, Walk kWalk>
constexpr int kSets = kIsLast<kWalk> ? kWidth<S, kWalk> : 1;
static_assert(kHeader >= 5 * kMostColumns * kVector<bf16> * int(sizeof(float)));

// How a tensor is cut over blocks. A position is a load: a vector of a pixel's channels, or of a
// plane. A block has `columns` such lists side by side, of channels; its threads are rows of them.
struct Cut {
  int64_t channels, plane, elements;
  int64_t count;            // values of a channel
  int64_t positions, span;  // of a column, of it in a block
  int64_t slots;            // positions of a plane
  unsigned groups, chunks;  // blocks: for all channels, for all positions
  int columns, log_columns;
  int64_t probes[3], probe_step;  // three values of channel 0; to the next channel
};

// A vector of one entry per channel, of the input's dtype or of the statistics'.
struct Parameter {
  const void* data = nullptr;
  bool is_half = false;

  template <typename S>
  DLK_DEVICE accumulate_t<S> get(int64_t channel, accumulate_t<S> without) const {
    if (!data) return without;
    if (is_half) return widen(static_cast<const S*>(data)[channel]);
    return static_cast<const accumulate_t<S>*>(data)[channel];
  }
};

struct Running {
  void* data = nullptr;
  bool is_half = false;

  template <typename S>
  DLK_DEVICE void update(int64_t channel, double momentum, double value) const {
    using T = accumulate_t<S>;
    const double old = Parameter{data, is_half}.get<S>(channel, T(0));
    const T to = T((1 - momentum) * old + momentum * value);
    if (is_half)
      static_cast<S*>(data)[channel] = narrow<S>(to);
    else
      static_cast<T*>(data)[channel] = to;
  }
};

template <typename S>
struct Forward {
  using Element = S;
  using T = accumulate_t<S>;
  static constexpr bool kBackward = false;
  static constexpr int kSummed = 4, kApplied = 4;  // positions under way
  static constexpr int kOfSums = 1, kOfApply = 3;  // numbers of a channel that a pass reads

  Cut cut;
  Activation activation;
  double eps;
  bool aligned;            // every tensor, to 16 bytes
  bool applies = false;    // in `sums`, where a block has all of its channels
  double* sums = nullptr;  // (chunks, 2, channels), of several chunks
  double momentum = 0;
  const S* input;
  const S* residual = nullptr;
  S* output = nullptr;
  Parameter weight, bias;
  Parameter mean, var, shift;  // to apply
  T* made_mean = nullptr;
  T* made_var = nullptr;
  T* made_shift = nullptr;
  Running running_mean, running_var;
};

template <typename S>
struct Backward {
  using Element = S;
  using T = accumulate_t<S>;
  static constexpr bool kBackward = true;
  static constexpr int kSummed = 2, kApplied = 2;
  static constexpr int kOfSums = 3, kOfApply = 5;

  Cut cut;
  Activation activation;
  double eps;
  bool finds_sign;  // of y from x
  bool aligned;
  bool applies = false;
  double* sums = nullptr;
  const S* grad;
  const S* input = nullptr;   // where it is read
  const S* output = nullptr;  // of an activation whose sign is not found
  S* grad_input = nullptr;
  S* grad_residual = nullptr;
  Parameter weight, shift, mean, var;
  // Σg/M and Σg·x̂/M, to apply; null of frozen statistics.
  const T* mean_g = nullptr;
  const T* mean_g_xhat = nullptr;
  T* made_mean_g = nullptr;
  T* made_mean_g_xhat = nullptr;
  T* sum_g = nullptr;
  T* sum_g_xhat = nullptr;
};

// ------------------------------------------------------------------------------------------- walks

// Elements [low, high) of the load at `at`; none where high is 0.
struct Spot {
  int64_t at;
  int low, high;
};

// A thread's positions.
template <typename S, Walk kWalk>
class Walker {
 public:
  DLK_DEVICE Walker(const Cut& cut, unsigned block)
      : end_(int64_t(block / cut.groups + 1) * cut.span),
        rows_(kThreads >> cut.log_columns),
        elements_(cut.elements),
        channels_(cut.channels),
        plane_(cut.plane),
        slots_(cut.slots) {
    if (end_ > cut.positions) end_ = cut.positions;
    const int64_t group = block % cut.groups;
    const int column = int(threadIdx.x) & (cut.columns - 1);
    const int row = int(threadIdx.x) >> cut.log_columns;
    position_ = int64_t(block / cut.groups) * cut.span + row;
    if constexpr (kIsLast<kWalk>) {
      const int64_t channel = (group * cut.columns + column) * kWidth<S, kWalk>;
      if (channel >= cut.channels) position_ = end_;
      at_ = position_ * channels_ + channel;
    } else {
      at_ = (position_ / slots_ * channels_ + group) * plane_;
      slot_ = position_ % slots_;
      step_slots_ = rows_ % slots_;
      step_ = rows_ / slots_ * channels_ * plane_;
    }
  }

  DLK_DEVICE bool more() const { return position_ < end_; }

  DLK_DEVICE Spot next() {
    constexpr int W = kWidth<S, kWalk>;
    Spot spot{at_, 0, position_ < end_ ? W : 0};
    if constexpr (!kIsLast<kWalk>) spot.at += slot_ * W;
    if constexpr (kWalk == Walk::kCutPlanes) {
      spot.at -= at_ % W;
      const int64_t low = at_ - spot.at, high = at_ + plane_ - spot.at;
      spot.low = low > 0 ? int(low) : 0;
      if (high < spot.high) spot.high = high > 0 ? int(high) : 0;
    }
    position_ += rows_;
    if constexpr (kIsLast<kWalk>) {
      at_ += rows_ * channels_;
    } else {
      at_ += step_;
      slot_ += step_slots_;
      if (slot_ >= slots_) {
        slot_ -= slots_;
        at_ += channels_ * plane_;
      }
    }
    return spot;
  }

  // Whether all of a load is in the tensor.
  DLK_DEVICE bool is_inside(const Spot& spot) const {
    return spot.at + kWidth<S, kWalk> <= elements_;
  }

 private:
  int64_t position_, end_;
  int rows_;
  int64_t elements_, channels_, plane_, slots_;
  int64_t at_;  // of planes: where this one begins
  int64_t slot_ = 0, step_slots_ = 0, step_ = 0;
};

template <typename S, Walk kWalk>
using Load = std::conditional_t<kWidth<S, kWalk> == 1, S, Bits16>;

template <Walk kWalk, typename S>
DLK_DEVICE Load<S, kWalk> load(const S* from, const Spot& spot, const Walker<S, kWalk>& walker,
                               bool aligned) {
  constexpr int W = kWidth<S, kWalk>;
  if (spot.high == 0) return {};
  if constexpr (W == 1) {
    return from[spot.at];
  } else if constexpr (kWalk != Walk::kCutPlanes) {
    return load_streaming(from + spot.at);
  } else {
    if (aligned && walker.is_inside(spot)) return load_streaming(from + spot.at);
    S elements[W] = {};
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (i >= spot.low && i < spot.high) elements[i] = from[spot.at + i];
    return bit_cast<Bits16>(elements);
  }
}

template <typename S, int W>
DLK_DEVICE void open(const Bits16& bits, accumulate_t<S> (&v)[W]) {
  unpack<S>(bits, v);
}
template <typename S>
DLK_DEVICE void open(const S& x, accumulate_t<S> (&v)[1]) {
  v[0] = widen(x);
}

// A whole load through the activation, which is looked at once.
template <Activation kActivation, typename T, int W>
DLK_DEVICE void activate_all(T (&x)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) x[i] = activate(x[i], kActivation);
}
template <typename T, int W>
DLK_DEVICE void through(Activation activation, T (&x)[W]) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return activate_all<Activation::kRelu>(x);
    case Activation::kLeakyRelu:
      return activate_all<Activation::kLeakyRelu>(x);
    case Activation::kTanh:
      return activate_all<Activation::kTanh>(x);
    default:
      return activate_all<Activation::kSigmoid>(x);
  }
}

// Gradients, from the outputs y.
template <Activation kActivation, typename T, int W>
DLK_DEVICE void before_all(T (&g)[W], const T (&y)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) g[i] = before_activation(g[i], y[i], kActivation);
}
template <typename T, int W>
DLK_DEVICE void through(Activation activation, T (&g)[W], const T (&y)[W]) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return before_all<Activation::kRelu>(g, y);
    case Activation::kLeakyRelu:
      return before_all<Activation::kLeakyRelu>(g, y);
    case Activation::kTanh:
      return before_all<Activation::kTanh>(g, y);
    default:
      return before_all<Activation::kSigmoid>(g, y);
  }
}

// g from the upstream gradient of a load, whose x − mean is d; of a channel scale and shift.
template <typename S, int W, int C, typename Raw>
DLK_DEVICE void differentiate(const Backward<S>& p, accumulate_t<S> (&g)[W], const Raw& y_raw,
                              const accumulate_t<S> (&d)[W], const accumulate_t<S> (&scale)[C],
                              const accumulate_t<S> (&shift)[C]) {
  accumulate_t<S> y[W];
  if (p.finds_sign) {
#pragma unroll
    for (int i = 0; i < W; ++i) y[i] = widen(narrow<S>(std::fma(d[i], scale[i % C], shift[i % C])));
  } else if (p.output) {
    open<S>(y_raw, y);
  } else {
    return;
  }
  through(p.activation, g, y);
}

template <Walk kWalk, typename S, int W>
DLK_DEVICE void store(S* to, const Spot& spot, const accumulate_t<S> (&v)[W], bool aligned) {
  if constexpr (W == 1) {
    to[spot.at] = narrow<S>(v[0]);
  } else if constexpr (kWalk != Walk::kCutPlanes) {
    store_global(to + spot.at, pack<S>(v));
  } else {
    if (aligned && spot.low == 0 && spot.high == W) return store_global(to + spot.at, pack<S>(v));
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (i >= spot.low && i < spot.high) to[spot.at + i] = narrow<S>(v[i]);
  }
}

// -------------------------------------------------------------------------------------------- sums

// k: the median of three of the channel's values.
template <typename S>
DLK_DEVICE accumulate_t<S> center_of(const Forward<S>& p, int64_t channel) {
  using T = accumulate_t<S>;
  T v[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) v[i] = widen(p.input[p.cut.probes[i] + channel * p.cut.probe_step]);
  const T low = v[0] < v[1] ? v[0] : v[1], high = v[0] < v[1] ? v[1] : v[0];
  return v[2] < low ? low : v[2] < high ? v[2] : high;
}

template <typename S>
DLK_DEVICE void numbers_of_sums(const Forward<S>& p, int64_t channel, accumulate_t<S> (&k)[1]) {
  k[0] = center_of(p, channel);
}

// The same in every pass: the variance as it is kept.
template <typename Problem, typename T = typename Problem::T>
DLK_DEVICE T rstd_of(const Problem& p, int64_t channel) {
  return T(1 / sqrt(double(p.var.template get<typename Problem::Element>(channel, T(0))) + p.eps));
}

// mean, scale and shift of x.
template <typename Problem, typename T, int kCount>
DLK_DEVICE void affine(const Problem& p, int64_t channel, T rstd, T (&k)[kCount]) {
  using S = typename Problem::Element;
  k[0] = p.mean.template get<S>(channel, T(0));
  k[1] = rstd * p.weight.template get<S>(channel, T(1));
  k[2] = p.shift.template get<S>(channel, T(0));
}

template <typename S>
DLK_DEVICE void numbers_of_sums(const Backward<S>& p, int64_t channel, accumulate_t<S> (&k)[3]) {
  affine(p, channel, rstd_of(p, channel), k);
}

// What is made of a channel's two sums.
template <typename S>
DLK_DEVICE void finish(const Forward<S>& p, int64_t channel, double sum, double squares) {
  using T = accumulate_t<S>;
  const double count = double(p.cut.count), offset = sum / count;
  const double mean = double(center_of(p, channel)) + offset;
  double var = (squares - sum * offset) / count;
  if (var < 0) var = 0;
  p.made_mean[channel] = T(mean);
  p.made_var[channel] = T(var);
  if (p.made_shift) {
    const double scale = rstd_of(p, channel) * p.weight.template get<S>(channel, T(1));
    const double bias = p.bias.template get<S>(channel, T(0));
    p.made_shift[channel] = T(bias + (double(T(mean)) - mean) * scale);
  }
  if (p.running_mean.data) p.running_mean.template update<S>(channel, p.momentum, mean);
  if (p.running_var.data)
    p.running_var.template update<S>(channel, p.momentum, var * count / (count - 1));
}

template <typename S>
DLK_DEVICE void finish(const Backward<S>& p, int64_t channel, double sum, double product) {
  using T = accumulate_t<S>;
  const double count = double(p.cut.count), scaled = product * double(rstd_of(p, channel));
  if (p.sum_g) p.sum_g[channel] = T(sum);
  if (p.sum_g_xhat) p.sum_g_xhat[channel] = T(scaled);
  if (p.made_mean_g) {
    p.made_mean_g[channel] = T(sum / count);
    p.made_mean_g_xhat[channel] = T(scaled / count);
  }
}

// Adds the elements of one load to the two sums of each of its channels.
template <Walk kWalk, typename T, int W, int C>
DLK_DEVICE void add(T (&first)[W], T (&second)[W], T (&a)[C], T (&b)[C]) {
  if constexpr (C == W) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      a[i] += first[i];
      b[i] += second[i];
    }
  } else {
#pragma unroll
    for (int half = W / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) {
        first[i] += first[i + half];
        second[i] += second[i + half];
      }
    }
    a[0] += first[0];
    b[0] += second[0];
  }
}

template <Walk kWalk, typename S>
DLK_DEVICE void add_positions(const Forward<S>& p, Walker<S, kWalk>& walker,
                              const accumulate_t<S> (&k)[1][kSets<S, kWalk>],
                              accumulate_t<S> (&a)[kSets<S, kWalk>],
                              accumulate_t<S> (&b)[kSets<S, kWalk>]) {
  using T = accumulate_t<S>;
  constexpr int W = kWidth<S, kWalk>, C = kSets<S, kWalk>, U = Forward<S>::kSummed;
  Load<S, kWalk> raw[U];
  Spot spot[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    spot[u] = walker.next();
    raw[u] = load(p.input, spot[u], walker, p.aligned);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (spot[u].high == 0) continue;
    T x[W], square[W];
    open<S>(raw[u], x);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      x[i] -= k[0][i % C];
      if (kWalk == Walk::kCutPlanes && (i < spot[u].low || i >= spot[u].high)) x[i] = 0;
      square[i] = x[i] * x[i];
    }
    add<kWalk>(x, square, a, b);
  }
}

// g and x − mean of the positions that a thread of the backward has under way: body(spot, g, d), of
// the numbers mean, scale and shift of its channels. Without an x d is what the body must not use.
template <Walk kWalk, int U, typename S, int kCount, typename Body>
DLK_DEVICE void for_gradients(const Backward<S>& p, Walker<S, kWalk>& walker, bool reads,
                              const accumulate_t<S> (&k)[kCount][kSets<S, kWalk>],
                              const Body& body) {
  using T = accumulate_t<S>;
  constexpr int W = kWidth<S, kWalk>, C = kSets<S, kWalk>;
  Load<S, kWalk> x_raw[U], g_raw[U], y_raw[U];
  Spot spot[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    spot[u] = walker.next();
    g_raw[u] = load(p.grad, spot[u], walker, p.aligned);
    x_raw[u] = reads ? load(p.input, spot[u], walker, p.aligned) : Load<S, kWalk>{};
    y_raw[u] = p.output ? load(p.output, spot[u], walker, p.aligned) : Load<S, kWalk>{};
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (spot[u].high == 0) continue;
    T g[W], d[W];
    open<S>(g_raw[u], g);
    open<S>(x_raw[u], d);
#pragma unroll
    for (int i = 0; i < W; ++i) d[i] -= k[0][i % C];
    differentiate(p, g, y_raw[u], d, k[1], k[2]);
    body(spot[u], g, d);
  }
}

template <Walk kWalk, typename S>
DLK_DEVICE void add_positions(const Backward<S>& p, Walker<S, kWalk>& walker,
                              const accumulate_t<S> (&k)[3][kSets<S, kWalk>],
                              accumulate_t<S> (&a)[kSets<S, kWalk>],
                              accumulate_t<S> (&b)[kSets<S, kWalk>]) {
  using T = accumulate_t<S>;
  constexpr int W = kWidth<S, kWalk>;
  for_gradients<kWalk, Backward<S>::kSummed>(
      p, walker, p.input != nullptr, k, [&](const Spot& spot, T(&g)[W], T(&d)[W]) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const bool counts = kWalk != Walk::kCutPlanes || (i >= spot.low && i < spot.high);
          if (!counts) g[i] = 0;
          d[i] = counts ? g[i] * d[i] : T(0);
        }
        add<kWalk>(g, d, a, b);
      });
}

// ------------------------------------------------------------------------------------------- apply

template <typename S>
DLK_DEVICE void numbers_of_apply(const Forward<S>& p, int64_t channel, accumulate_t<S> (&k)[3]) {
  affine(p, channel, rstd_of(p, channel), k);
}

template <typename S>
DLK_DEVICE void numbers_of_apply(const Backward<S>& p, int64_t channel, accumulate_t<S> (&k)[5]) {
  using T = accumulate_t<S>;
  const T rstd = rstd_of(p, channel);
  affine(p, channel, rstd, k);
  k[3] = p.mean_g ? -k[1] * rstd * p.mean_g_xhat[channel] : T(0);
  k[4] = p.mean_g ? -k[1] * p.mean_g[channel] : T(0);
}

template <Walk kWalk, typename S>
DLK_DEVICE void apply_positions(const Forward<S>& p, Walker<S, kWalk>& walker,
                                const accumulate_t<S> (&k)[3][kSets<S, kWalk>]) {
  using T = accumulate_t<S>;
  constexpr int W = kWidth<S, kWalk>, C = kSets<S, kWalk>, U = Forward<S>::kApplied;
  Load<S, kWalk> raw[U], residual[U];
  Spot spot[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    spot[u] = walker.next();
    raw[u] = load(p.input, spot[u], walker, p.aligned);
    if (p.residual) residual[u] = load(p.residual, spot[u], walker, p.aligned);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (spot[u].high == 0) continue;
    T x[W];
    open<S>(raw[u], x);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = std::fma(x[i] - k[0][i % C], k[1][i % C], k[2][i % C]);
    if (p.residual) {
      T r[W];
      open<S>(residual[u], r);
#pragma unroll
      for (int i = 0; i < W; ++i) x[i] += r[i];
    }
    through(p.activation, x);
    store<kWalk>(p.output, spot[u], x, p.aligned);
  }
}

template <Walk kWalk, typename S>
DLK_DEVICE void apply_positions(const Backward<S>& p, Walker<S, kWalk>& walker,
                                const accumulate_t<S> (&k)[5][kSets<S, kWalk>]) {
  using T = accumulate_t<S>;
  constexpr int W = kWidth<S, kWalk>, C = kSets<S, kWalk>;
  const bool corrects = p.grad_input && p.mean_g;
  for_gradients<kWalk, Backward<S>::kApplied>(
      p, walker, corrects || p.finds_sign, k, [&](const Spot& spot, T(&g)[W], const T(&d)[W]) {
        if (p.grad_residual) store<kWalk>(p.grad_residual, spot, g, p.aligned);
        if (!p.grad_input) return;
#pragma unroll
        for (int i = 0; i < W; ++i)
          g[i] = corrects ? std::fma(k[1][i % C], g[i], std::fma(k[3][i % C], d[i], k[4][i % C]))
                          : k[1][i % C] * g[i];
        store<kWalk>(p.grad_input, spot, g, p.aligned);
      });
}

// ----------------------------------------------------------------------------------------- kernels

// Blocks on an SM: 32 to 72 KB under way.
template <Walk kWalk, typename Problem>
constexpr int kAtOnce =
    kWalk == Walk::kCutPlanes || (kWalk == Walk::kChannels && Problem::kBackward) ? 2 : 3;

// Channels of a block, from the first.
template <Walk kWalk, typename Problem>
struct Channels {
  int64_t first;
  int number;  // some may be past the last

  DLK_DEVICE Channels(const Problem& p, unsigned block)
      : number(p.cut.columns * kSets<typename Problem::Element, kWalk>) {
    first = int64_t(block % p.cut.groups) * number;
  }
};

// k[·][c] = the numbers(channel, …) of the c-th channel of this thread, by way of shared memory.
template <Walk kWalk, typename Problem, typename T, int kCount, int C, typename Numbers>
DLK_DEVICE void share(const Problem& p, const Channels<kWalk, Problem>& channels,
                      const Numbers& numbers, T (&k)[kCount][C]) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  for (int i = int(threadIdx.x); i < channels.number; i += kThreads) {
    T of[kCount] = {};
    if (channels.first + i < p.cut.channels) numbers(channels.first + i, of);
#pragma unroll
    for (int j = 0; j < kCount; ++j) shared[j * channels.number + i] = of[j];
  }
  sync_block();
  const int column = int(threadIdx.x) & (p.cut.columns - 1);
#pragma unroll
  for (int j = 0; j < kCount; ++j)
#pragma unroll
    for (int c = 0; c < C; ++c) k[j][c] = shared[j * channels.number + column * C + c];
}

template <Walk kWalk, typename Problem>
DLK_DEVICE void apply_block(const Problem& p, unsigned block) {
  using T = typename Problem::T;
  constexpr int kCount = Problem::kOfApply;
  T k[kCount][kSets<typename Problem::Element, kWalk>];
  share(
      p, Channels<kWalk, Problem>(p, block),
      [&](int64_t channel, T(&of)[kCount]) { numbers_of_apply(p, channel, of); }, k);
  Walker<typename Problem::Element, kWalk> walker(p.cut, block);
  while (walker.more()) apply_positions<kWalk>(p, walker, k);
}

// ptxas: <= 128 registers, 0 bytes static shared, 0 spills
template <Walk kWalk, typename Problem>
DLK_KERNEL void __launch_bounds__(kThreads, kAtOnce<kWalk, Problem>) apply_kernel(const Problem p) {
  apply_block<kWalk>(p, gridDim.x - 1 - blockIdx.x);
}

// ptxas: <= 128 registers, 0 bytes static shared, 0 spills
template <Walk kWalk, typename Problem>
DLK_KERNEL void __launch_bounds__(kThreads, kAtOnce<kWalk, Problem>) sums_kernel(const Problem p) {
  using S = typename Problem::Element;
  using T = accumulate_t<S>;
  constexpr int C = kSets<S, kWalk>;
  const int thread = int(threadIdx.x);
  const Channels<kWalk, Problem> channels(p, blockIdx.x);
  // [2·C][threads]
  double* sums = reinterpret_cast<double*>(shared_memory() + kHeader) + thread;
#pragma unroll
  for (int c = 0; c < 2 * C; ++c) sums[c * kThreads] = 0;
  T k[Problem::kOfSums][C];
  share(
      p, channels,
      [&](int64_t channel, T(&of)[Problem::kOfSums]) { numbers_of_sums(p, channel, of); }, k);

  Walker<S, kWalk> walker(p.cut, blockIdx.x);
  while (walker.more()) {
    T a[C] = {}, b[C] = {};
#pragma unroll
    for (int n = 0; n < kFloatPositions; n += Problem::kSummed)
      if (walker.more()) add_positions<kWalk>(p, walker, k, a, b);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      sums[2 * c * kThreads] += double(a[c]);
      sums[(2 * c + 1) * kThreads] += double(b[c]);
    }
  }

  for (int half = kThreads / 2; half >= p.cut.columns; half /= 2) {
    sync_block();
    if (thread >= half) continue;
#pragma unroll
    for (int c = 0; c < 2 * C; ++c) sums[c * kThreads] += sums[c * kThreads + half];
  }
  if (thread < p.cut.columns) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t channel = channels.first + thread * C + c;
      if (channel >= p.cut.channels) continue;
      const double a = sums[2 * c * kThreads], b = sums[(2 * c + 1) * kThreads];
      if (p.cut.chunks == 1) {
        finish(p, channel, a, b);
      } else {
        double* to = p.sums + int64_t(blockIdx.x / p.cut.groups) * 2 * p.cut.channels;
        to[channel] = a;
        to[p.cut.channels + channel] = b;
      }
    }
  }
  if (!p.applies) return;
  sync_block();
  apply_block<kWalk>(p, blockIdx.x);
}

// ptxas: <= 64 registers, 0 bytes static shared, 0 spills
template <typename Problem>
DLK_KERNEL void __launch_bounds__(kThreads, 2) totals_kernel(const Problem p) {
  constexpr int kLanes = kThreads / kTotalsChannels, kParts = kThreads / kWarp * kTotalsChannels;
  const int thread = int(threadIdx.x), place = thread % kTotalsChannels;
  const int64_t channel = int64_t(blockIdx.x) * kTotalsChannels + place;
  double a = 0, b = 0;
  if (channel < p.cut.channels) {
#pragma unroll 4
    for (unsigned chunk = thread / kTotalsChannels; chunk < p.cut.chunks; chunk += kLanes) {
      const double* from = p.sums + int64_t(chunk) * 2 * p.cut.channels + channel;
      a += from[0];
      b += from[p.cut.channels];
    }
  }
  for (int d = kWarp / 2; d >= kTotalsChannels; d /= 2) {
    a += shuffle_xor(kAllLanes, a, d);
    b += shuffle_xor(kAllLanes, b, d);
  }
  double* parts = reinterpret_cast<double*>(shared_memory());
  if (lane() < kTotalsChannels) {
    parts[2 * (warp_index() * kTotalsChannels + place)] = a;
    parts[2 * (warp_index() * kTotalsChannels + place) + 1] = b;
  }
  sync_block();
  if (thread >= kTotalsChannels || channel >= p.cut.channels) return;
  a = b = 0;
#pragma unroll
  for (int i = 0; i < kParts; i += kTotalsChannels) {
    a += parts[2 * (i + place)];
    b += parts[2 * (i + place) + 1];
  }
  finish(p, channel, a, b);
}

// ----------------------------------------------------------------------------------------- layouts

struct Layout {
  bool last;  // the channels are contiguous
  int64_t images, channels, plane;

  Layout(const Tensor& x, MemoryFormat format) : images(x.size(0)), channels(x.size(1)), plane(1) {
    for (int64_t d = 2; d < x.dim(); ++d) plane *= x.size(d);
    last = plane == 1 || (channels > 1 && format != MemoryFormat::Contiguous);
  }
};

template <typename S>
Walk walk_of(const Layout& l, bool aligned) {
  const bool whole = aligned && (l.last ? l.channels : l.plane) % kVector<S> == 0;
  // float64 has the two walks that take everything.
  const bool vectors = whole && !std::is_same_v<S, double>;
  if (l.last) return vectors ? Walk::kChannels : Walk::kChannel;
  return vectors ? Walk::kPlanes : Walk::kCutPlanes;
}

template <typename S>
Cut cut_of(const Layout& l, Walk walk) {
  const int width = walk == Walk::kChannel ? 1 : kVector<S>;
  Cut cut{};
  cut.channels = l.channels;
  cut.plane = l.plane;
  cut.count = l.images * l.plane;
  cut.elements = l.channels * cut.count;
  cut.columns = 1;
  int64_t groups = l.channels;
  if (l.last) {
    const int64_t vectors = divide_up(l.channels, width);
    cut.slots = 1;
    cut.positions = cut.count;
    cut.columns = power_of_two_from(vectors, 1, kMostColumns);
    // Few pixels: as many blocks as there may be.
    while (cut.columns > kFewColumns && cut.positions * cut.columns < kThreads) cut.columns /= 2;
    groups = divide_up(vectors, cut.columns);
  } else {
    // A plane that begins anywhere may touch one vector more.
    cut.slots = divide_up(l.plane, width) + (walk == Walk::kCutPlanes);
    cut.positions = l.images * cut.slots;
  }
  while (1 << cut.log_columns < cut.columns) ++cut.log_columns;
  const int64_t batch = kThreads / cut.columns * Forward<S>::kSummed;
  const int64_t batches = divide_up(cut.positions, batch);
  const bool one = batches <= 2 || (batches <= 8 && groups >= kWave);
  const int64_t chunks = one ? 1 : std::clamp<int64_t>(kBlocks / groups, 1, batches);
  cut.span = divide_up(batches, chunks) * batch;
  cut.groups = unsigned(groups);
  cut.chunks = unsigned(divide_up(cut.positions, cut.span));
  DLK_CHECK(groups * cut.chunks < int64_t(1) << 31, kOp,
            ": expected fewer than 2^31 channels, got ", l.channels);
  const int64_t middle[2] = {l.images / 2, l.plane / 2}, end[2] = {l.images - 1, l.plane - 1};
  const auto at = [&](const int64_t (&i)[2]) {
    return l.last ? (i[0] * l.plane + i[1]) * l.channels : i[0] * l.channels * l.plane + i[1];
  };
  cut.probes[1] = at(middle);
  cut.probes[2] = at(end);
  cut.probe_step = l.last ? 1 : l.plane;
  return cut;
}

// -------------------------------------------------------------------------------------------- runs

template <typename S, typename Body>
void for_walk(Walk walk, const Body& body) {
  if constexpr (!std::is_same_v<S, double>) {
    if (walk == Walk::kChannels) return body(std::integral_constant<Walk, Walk::kChannels>());
    if (walk == Walk::kPlanes) return body(std::integral_constant<Walk, Walk::kPlanes>());
  }
  if (walk == Walk::kChannel) return body(std::integral_constant<Walk, Walk::kChannel>());
  body(std::integral_constant<Walk, Walk::kCutPlanes>());
}

// A double of each channel and chunk twice, and `more`.
template <typename Problem>
Optional workspace_for(Problem& p, const Tensor& input, int64_t more) {
  const int64_t partial = p.cut.chunks > 1 ? 2 * p.cut.channels * p.cut.chunks : 0;
  if (partial + more == 0) return std::nullopt;
  Tensor made = torch::stable::new_empty(input, Sizes{partial + more}, ScalarType::Double);
  p.sums = scratch_pointer<double>("workspace", made);
  return made;
}

// At most three launches.
template <typename Problem>
void run(Problem p, Walk walk, bool sums, bool apply) {
  using S = typename Problem::Element;
  const char* names[] = {Problem::kBackward ? "batch_norm gradient sums" : "batch_norm sums",
                         Problem::kBackward ? "batch_norm gradient totals" : "batch_norm totals",
                         Problem::kBackward ? "batch_norm gradient" : "batch_norm apply"};
  LaunchShape shape{.grid = p.cut.groups * p.cut.chunks, .block = kThreads, .shared = kHeader};
  for_walk<S>(walk, [&](auto constant) {
    constexpr Walk kWalk = decltype(constant)::value;
    if (sums) {
      p.applies = apply && p.cut.chunks == 1;
      LaunchShape summing = shape;
      summing.shared += 2 * kSets<S, kWalk> * kThreads * sizeof(double);
      launch(sums_kernel<kWalk, Problem>, names[0], summing, p);
      if (p.cut.chunks > 1) {
        const int64_t blocks = divide_up(p.cut.channels, kTotalsChannels);
        launch(totals_kernel<Problem>, names[1],
               {.grid = unsigned(blocks), .block = kThreads, .shared = kHeader}, p);
      }
    }
    if (apply && !p.applies) launch(apply_kernel<kWalk, Problem>, names[2], shape, p);
  });
}

// ------------------------------------------------------------------------------------ host entries

ScalarType wide_of(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_input(const Tensor& input) {
  check_on_gpu(kOp, "input", input, input);
  check_floating(kOp, "input", input);
  DLK_CHECK(input.dim() >= 2 && input.dim() <= 5, kOp,
            ": expected input with 2 to 5 dimensions, got shape ", shape_string(input.sizes()));
}

void check_like(const char* argument, const Tensor& x, const Tensor& input) {
  check_on_gpu(kOp, argument, x, input);
  check_dtype(kOp, argument, x, input.scalar_type());
  check_shape(kOp, argument, x, input.sizes());
}

void check_parameter(const char* argument, const Tensor& x, const Tensor& input) {
  check_on_gpu(kOp, argument, x, input);
  if (x.scalar_type() != input.scalar_type()) check_dtype(kOp, argument, x, wide_of(input));
  check_shape(kOp, argument, x, Sizes{input.size(1)});
}

void check_statistic(const char* argument, const Tensor& x, const Tensor& input) {
  check_on_gpu(kOp, argument, x, input);
  check_dtype(kOp, argument, x, wide_of(input));
  check_shape(kOp, argument, x, Sizes{input.size(1)});
}

Tensor new_statistic(const Tensor& input) {
  return torch::stable::new_empty(input, Sizes{input.size(1)}, wide_of(input));
}

Tensor none_of(const Tensor& input) { return torch::stable::new_empty(input, Sizes{0}); }

// The tensors of a call as the kernels take them; they live as long as it.
class Call {
 public:
  explicit Call(const Tensor& input)
      : format_(suggested_format(input)), layout_(input, format_), like_(input) {}

  // A result, of the input's format.
  Tensor made() const {
    const Sizes sizes(like_.sizes().begin(), like_.sizes().end());
    return empty(like_, sizes, format_, like_.scalar_type());
  }
  template <typename S>
  const S* read(const char* name, const Tensor& x) {
    return seen(input_pointer<S>(name, keep(torch::stable::contiguous(x, format_))));
  }
  template <typename S>
  S* write(const char* name, const Tensor& x) {
    return seen(output_pointer<S>(name, x));
  }
  template <typename T>
  const T* statistic(const char* name, const Tensor& x) {
    return input_pointer<T>(name, keep(torch::stable::contiguous(x)));
  }
  Parameter parameter(const char* name, const Optional& x) {
    if (!x) return {};
    const Tensor& dense = keep(torch::stable::contiguous(*x));
    return {input_pointer<char>(name, dense), dense.element_size() == 2};
  }
  Running running(const char* name, const Optional& x) {
    if (!x) return {};
    check_contiguous(kOp, name, *x);
    return {inout_pointer<char>(name, *x), x->element_size() == 2};
  }

  // Once every tensor of it is known.
  template <typename Problem>
  Walk place(Problem& p) {
    const Walk walk = walk_of<typename Problem::Element>(layout_, aligned_);
    p.cut = cut_of<typename Problem::Element>(layout_, walk);
    p.aligned = aligned_;
    return walk;
  }

 private:
  const Tensor& keep(Tensor x) {
    kept_.push_back(std::move(x));
    return kept_.back();
  }
  template <typename P>
  P* seen(P* pointer) {
    aligned_ = aligned_ && is_aligned(pointer);
    return pointer;
  }

  MemoryFormat format_;
  Layout layout_;
  const Tensor& like_;
  std::vector<Tensor> kept_;
  bool aligned_ = true;
};

struct Arguments {
  const Tensor& input;
  const Optional &weight, &bias, &residual;
  double eps;
  const std::string& activation;

  void check() const {
    check_input(input);
    if (weight) check_parameter("weight", *weight, input);
    if (bias) check_parameter("bias", *bias, input);
    if (residual) check_like("residual", *residual, input);
    parse_activation(kOp, activation);
  }
};

template <typename S>
Forward<S> forward_problem(Call& call, const Arguments& a, const Tensor& output) {
  Forward<S> p{};
  p.activation = parse_activation(kOp, a.activation);
  p.eps = a.eps;
  p.input = call.read<S>("input", a.input);
  if (a.residual) p.residual = call.read<S>("residual", *a.residual);
  p.output = call.write<S>("output", output);
  p.weight = call.parameter("weight", a.weight);
  p.bias = call.parameter("bias", a.bias);
  return p;
}

// Statistics of the batch, and with an output the rest.
template <typename S>
void normalize(Call& call, Forward<S>& p, const Tensor& mean, const Tensor& var,
               const Optional& shift) {
  using T = accumulate_t<S>;
  p.made_mean = output_pointer<T>("mean", mean);
  p.made_var = output_pointer<T>("var", var);
  p.mean = {p.made_mean, false};
  p.var = {p.made_var, false};
  if (shift) p.made_shift = output_pointer<T>("shift", *shift);
  p.shift = {p.made_shift, false};
  const Walk walk = call.place(p);
  const auto workspace = workspace_for(p, mean, 0);
  run(p, walk, true, p.output != nullptr);
}

using Made = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // output, mean, var, shift

Made forward(const Arguments& a, const Optional& running_mean, const Optional& running_var,
             double momentum) {
  a.check();
  const Tensor& input = a.input;
  DLK_CHECK(input.numel() == 0 || input.numel() > input.size(1), kOp,
            ": expected more than 1 value per channel when training, got input size ",
            shape_string(input.sizes()));
  if (running_mean) check_parameter("running_mean", *running_mean, input);
  if (running_var) check_parameter("running_var", *running_var, input);
  const DeviceScope scope(input);
  Call call(input);
  const Tensor output = call.made();
  Tensor mean = new_statistic(input), var = new_statistic(input), shift = new_statistic(input);
  if (input.numel() == 0) {
    for (Tensor* made : {&mean, &var, &shift}) torch::stable::zero_(*made);
    return {output, mean, var, shift};
  }
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Forward<S> p = forward_problem<S>(call, a, output);
    p.momentum = momentum;
    p.running_mean = call.running("running_mean", running_mean);
    p.running_var = call.running("running_var", running_var);
    normalize(call, p, mean, var, shift);
  });
  return {output, mean, var, shift};
}

Made batch_norm(Tensor input, Optional weight, Optional bias, Optional residual, double eps,
                Text activation, bool) {
  return forward({input, weight, bias, residual, eps, activation}, std::nullopt, std::nullopt, 0);
}

Made batch_norm_forward(Tensor input, Optional weight, Optional bias, Optional residual,
                        Optional running_mean, Optional running_var, double momentum, double eps,
                        Text activation, bool) {
  return forward({input, weight, bias, residual, eps, activation}, running_mean, running_var,
                 momentum);
}

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor input, bool) {
  check_input(input);
  const DeviceScope scope(input);
  Call call(input);
  Tensor mean = new_statistic(input), var = new_statistic(input);
  if (input.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(var);
    return {mean, var};
  }
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Forward<S> p{};
    p.input = call.read<S>("input", input);
    normalize(call, p, mean, var, std::nullopt);
  });
  return {mean, var};
}

Tensor batch_norm_apply(Tensor input, Optional weight, Optional bias, Optional residual,
                        Tensor mean, Tensor var, double eps, Text activation, bool) {
  const Arguments a{input, weight, bias, residual, eps, activation};
  a.check();
  check_parameter("mean", mean, input);
  check_parameter("var", var, input);
  const DeviceScope scope(input);
  Call call(input);
  const Tensor output = call.made();
  if (input.numel() == 0) return output;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Forward<S> p = forward_problem<S>(call, a, output);
    p.mean = call.parameter("mean", mean);
    p.var = call.parameter("var", var);
    p.shift = p.bias;
    const Walk walk = call.place(p);
    run(p, walk, false, true);
  });
  return output;
}

struct Gradients {
  const Tensor &grad_output, &input;
  const Optional &weight, &shift, &output;
  const Tensor &mean, &var;
  double eps;
  Activation activation;

  void check() const {
    check_input(input);
    check_like("grad_output", grad_output, input);
    if (weight) check_parameter("weight", *weight, input);
    if (shift) check_parameter("shift", *shift, input);
    check_parameter("mean", mean, input);
    check_parameter("var", var, input);
    const bool none = activation == Activation::kNone;
    DLK_CHECK(output ? !none : none || is_of_sign(activation), kOp,
              ": expected the output where the activation needs it, and not where there is none");
    if (output) check_like("output", *output, input);
  }
  bool finds_sign() const { return !output && activation != Activation::kNone; }
};

template <typename S>
Backward<S> backward_problem(Call& call, const Gradients& a, bool reads) {
  Backward<S> p{};
  p.activation = a.activation;
  p.eps = a.eps;
  p.finds_sign = a.finds_sign();
  p.grad = call.read<S>("grad_output", a.grad_output);
  if (reads || p.finds_sign) p.input = call.read<S>("input", a.input);
  if (a.output) p.output = call.read<S>("output", *a.output);
  p.weight = call.parameter("weight", a.weight);
  p.shift = call.parameter("shift", a.shift);
  p.mean = call.parameter("mean", a.mean);
  p.var = call.parameter("var", a.var);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    Tensor grad_output, Tensor input, Optional weight, Optional shift, Optional output, Tensor mean,
    Tensor var, bool training, double eps, Text activation, bool, bool want_input, bool want_weight,
    bool want_bias, bool want_residual) {
  const Gradients a{
      grad_output, input, weight, shift, output, mean, var, eps, parse_activation(kOp, activation)};
  a.check();
  const DeviceScope scope(input);
  Call call(input);
  const auto like_input = [&](bool wanted) { return wanted ? call.made() : none_of(input); };
  Tensor grad_weight = want_weight ? new_statistic(input) : none_of(mean);
  Tensor grad_bias = want_bias ? new_statistic(input) : none_of(mean);
  const Tensor grad_input = like_input(want_input), grad_residual = like_input(want_residual);
  if (input.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias, grad_residual};
  }
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const bool corrected = training && want_input;
    Backward<S> p = backward_problem<S>(call, a, corrected || want_weight);
    if (want_input) p.grad_input = call.write<S>("grad_input", grad_input);
    if (want_residual) p.grad_residual = call.write<S>("grad_residual", grad_residual);
    if (want_weight) p.sum_g_xhat = output_pointer<T>("grad_weight", grad_weight);
    if (want_bias) p.sum_g = output_pointer<T>("grad_bias", grad_bias);
    const Walk walk = call.place(p);
    const int64_t channels = p.cut.channels;
    const auto workspace = workspace_for(p, input, corrected ? 2 * channels : 0);
    if (corrected) {
      p.made_mean_g = reinterpret_cast<T*>(
          p.sums + (p.cut.chunks > 1 ? 2 * channels * int64_t(p.cut.chunks) : 0));
      p.made_mean_g_xhat = p.made_mean_g + channels;
      p.mean_g = p.made_mean_g;
      p.mean_g_xhat = p.made_mean_g_xhat;
    }
    const bool sums = corrected || want_weight || want_bias;
    run(p, walk, sums, want_input || want_residual);
  });
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

std::tuple<Tensor, Tensor> batch_norm_reduce(Tensor grad_output, Tensor input, Optional weight,
                                             Optional shift, Optional output, Tensor mean,
                                             Tensor var, double eps, Text activation, bool) {
  const Gradients a{
      grad_output, input, weight, shift, output, mean, var, eps, parse_activation(kOp, activation)};
  a.check();
  const DeviceScope scope(input);
  Call call(input);
  Tensor sum_g = new_statistic(input), sum_g_xhat = new_statistic(input);
  if (input.numel() == 0) {
    torch::stable::zero_(sum_g);
    torch::stable::zero_(sum_g_xhat);
    return {sum_g, sum_g_xhat};
  }
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    Backward<S> p = backward_problem<S>(call, a, true);
    p.sum_g = output_pointer<T>("sum_g", sum_g);
    p.sum_g_xhat = output_pointer<T>("sum_g_xhat", sum_g_xhat);
    const Walk walk = call.place(p);
    const auto workspace = workspace_for(p, input, 0);
    run(p, walk, true, false);
  });
  return {sum_g, sum_g_xhat};
}

std::tuple<Tensor, Tensor> batch_norm_gradient(Tensor grad_output, Tensor input, Optional weight,
                                               Optional shift, Optional output, Tensor mean,
                                               Tensor var, Tensor mean_g, Tensor mean_g_xhat,
                                               double eps, Text activation, bool,
                                               bool want_residual) {
  const Gradients a{
      grad_output, input, weight, shift, output, mean, var, eps, parse_activation(kOp, activation)};
  a.check();
  check_statistic("mean_g", mean_g, input);
  check_statistic("mean_g_xhat", mean_g_xhat, input);
  const DeviceScope scope(input);
  Call call(input);
  const Tensor grad_input = call.made();
  const Tensor grad_residual = want_residual ? call.made() : none_of(input);
  if (input.numel() == 0) return {grad_input, grad_residual};
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    Backward<S> p = backward_problem<S>(call, a, true);
    p.mean_g = call.statistic<T>("mean_g", mean_g);
    p.mean_g_xhat = call.statistic<T>("mean_g_xhat", mean_g_xhat);
    p.grad_input = call.write<S>("grad_input", grad_input);
    if (want_residual) p.grad_residual = call.write<S>("grad_residual", grad_residual);
    const Walk walk = call.place(p);
    run(p, walk, false, true);
  });
  return {grad_input, grad_residual};
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, DLK_DEVICE_KEY, m) {
  using namespace dlkernels;
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_eval", TORCH_BOX(&batch_norm_apply));
  m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("batch_norm_reduce", TORCH_BOX(&batch_norm_reduce));
  m.impl("batch_norm_gradient", TORCH_BOX(&batch_norm_gradient));
}

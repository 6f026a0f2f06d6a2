// Softmax cross-entropy: loss, log-sum-exp and the gradient of the logits, for class indices and
// probabilities, in one read of the logits and one write of the gradient; log-probabilities are
// never written. The loops and the algebra are in cross_entropy.h. Here: checks, layouts, the split
// over threads, registration.
//
// Blocks of rows are the unit of work, their size set by the shape alone. Accumulation is in float
// within a chunk of a row (double for double) and in double over rows, in order: the same bits for
// any number of threads.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>

#include "../check.h"
#include "cross_entropy_columns.h"
#include "cross_entropy_rows.h"
#include "memory.h"

namespace dlkernels {
namespace {

using namespace cross_entropy;

constexpr int64_t kGrain = 1 << 15;  // fewest elements worth a second thread

// --------------------------------------------------------------------------------------- arguments

void on_cpu(const char* argument, const Tensor& tensor) { check_cpu(kOp, argument, tensor); }

// ------------------------------------------------------------------------------------- preparation

// The problem of a call, and the tensors it points into.
template <typename S>
struct Prepared : LaidOut {
  using T = accumulate_t<S>;
  Problem<S> problem;
  double total_weight;  // the divisor of the mean

  Prepared(const Tensor& input_, const Target& target_, const Optional& weight,
           const Options& options, bool with_gradient)
      : LaidOut(input_, target_, with_gradient) {
    Problem<S>& p = problem;
    p.options = options;
    p.layout = layout;
    p.target_layout = target_layout;
    p.gradient_layout = gradient_layout;
    p.walk = !layout.is_rows()                      ? Walk::kColumns
             : layout.classes <= kTransposedClasses ? Walk::kTransposed
                                                    : Walk::kRows;
    p.rows = layout.outer * layout.inner;
    p.input = static_cast<const S*>(input.const_data_ptr());
    if (target.is_probability)
      p.probability = static_cast<const S*>(target.tensor.const_data_ptr());
    else
      p.target = static_cast<const int64_t*>(target.tensor.const_data_ptr());
    set_class_weights(p, weight);
    total_weight = target.is_probability ? double(p.rows) : sum_target_weights(p);
    if (with_gradient) {
      p.gradient = static_cast<S*>(written->mutable_data_ptr());
      advise_huge_pages(p.gradient, size_t(written->numel()) * sizeof(S));
    }
  }
};

// ----------------------------------------------------------------------------------------- threads

// The units of work: blocks of rows, of one outer index where the walk is over columns.
template <typename S>
struct Units {
  int64_t rows, inner, block, per_outer, count;

  explicit Units(const Problem<S>& p)
      : rows(p.rows),
        inner(p.layout.inner),
        block(p.walk == Walk::kRows ? rows_per_block(p.layout.classes) : columns_per_block(p)),
        per_outer(p.walk == Walk::kColumns ? (inner + block - 1) / block : 0),
        count(rows == 0   ? 0
              : per_outer ? p.layout.outer * per_outer
                          : (rows + block - 1) / block) {}
  int64_t row(int64_t unit) const {
    return per_outer ? unit / per_outer * inner + unit % per_outer * block : unit * block;
  }
  int64_t size(int64_t unit) const {
    return std::min(block, per_outer ? inner - unit % per_outer * block : rows - unit * block);
  }
};

// Calls body(begin, end, scratch) for ranges of units. `keep`: each row's e is kept until its
// gradient is written.
template <typename S, typename Body>
void for_ranges(const Problem<S>& p, const Units<S>& units, bool keep, const Body& body) {
  using T = accumulate_t<S>;
  if (units.count == 0) return;
  const bool rows = p.walk == Walk::kRows;
  const int64_t classes = p.layout.classes, block = units.block;
  const int64_t blocks = keep && is_pipelined(classes, p.options.softcap) ? 2 : 1;
  const auto padded = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t whole = padded(classes * (rows ? blocks * block : columns_pitch(p)));
  const int64_t e = keep || !rows ? whole : 0;
  const int64_t squashed = p.cap() == 0 ? 0 : keep || !rows ? whole : kChunk;
  const int64_t mass = p.probability && !rows ? whole : 0;
  const int64_t buffer = p.walk == Walk::kColumns ? 0 : kChunk;
  const int64_t shift = rows ? padded(std::max(block, (classes + kChunk - 1) / kChunk)) : 0;
  const int64_t per_thread = e + squashed + mass + buffer + shift;
  // A region never has more callers than this.
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const Aligned<T> memory(threads * per_thread);
  std::atomic<int64_t> callers{0};
  const int64_t grain = std::max<int64_t>(1, kGrain / (block * classes));
  torch::stable::parallel_for(0, units.count, grain, [&](int64_t begin, int64_t end) {
    Scratch<T> s;
    s.e = memory.get() + callers.fetch_add(1) * per_thread;
    s.squashed = s.e + e;
    s.mass = s.squashed + squashed;
    s.buffer = s.mass + mass;
    s.shift = s.buffer + buffer;
    body(begin, end, s);
  });
}

template <typename S, Kind kind, bool keep>
double run_forward(const Problem<S>& p) {
  using T = accumulate_t<S>;
  const Units<S> units(p);
  std::vector<double> partial(units.count, 0.0);
  for_ranges(p, units, keep, [&](int64_t begin, int64_t end, const Scratch<T>& s) {
    if (p.walk == Walk::kRows && is_pipelined(p.layout.classes, p.options.softcap))
      return forward_pipelined<S, kind, keep>(p, begin, end, s, partial.data());
    Block<T> b;
    for (int64_t u = begin; u < end; ++u)
      partial[u] = p.walk == Walk::kRows
                       ? forward_rows<S, kind, keep>(p, b, units.row(u), units.size(u), s)
                       : forward_columns<S, kind, keep>(p, b, units.row(u), units.size(u), s);
  });
  double total = 0;
  for (const double value : partial) total += value;
  return total;
}

template <typename S, Kind kind>
void run_backward(const Problem<S>& p) {
  using T = accumulate_t<S>;
  const Units<S> units(p);
  for_ranges(p, units, false, [&](int64_t begin, int64_t end, const Scratch<T>& s) {
    Block<T> b;
    for (int64_t u = begin; u < end; ++u)
      if (p.walk == Walk::kRows)
        backward_rows<S, kind>(p, b, units.row(u), units.size(u), s);
      else
        backward_columns<S, kind>(p, b, units.row(u), units.size(u), s);
  });
}

// ------------------------------------------------------------------------------------ host entries

Outputs forward(const Tensor& input, const Tensor& target, const Optional& weight,
                const Options& options, bool keep) {
  const Target checked = check_arguments(input, target, weight, options, on_cpu);
  Outputs made = new_outputs(input, options, keep);
  if (input.numel() == 0) return made;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    Prepared<S> prepared(input, checked, weight, options, keep);
    Problem<S>& p = prepared.problem;
    p.row_factor = options.reduction == kMean ? 1 / prepared.total_weight : 1;
    p.lse = static_cast<double*>(made.lse.mutable_data_ptr());
    p.loss = static_cast<S*>(made.loss.mutable_data_ptr());
    double sum = 0;
    for_kind(checked.is_probability, options.label_smoothing, [&](auto kind) {
      sum = keep ? run_forward<S, kind.value, true>(p) : run_forward<S, kind.value, false>(p);
    });
    if (options.reduction == kMean) sum /= prepared.total_weight;
    if (options.reduction != kNone) *p.loss = narrow<S>(T(sum));
    *static_cast<double*>(made.total_weight.mutable_data_ptr()) = prepared.total_weight;
    if (keep) made.gradient = prepared.finished_gradient();
  });
  return made;
}

Tensor backward(const Tensor& grad_loss, const Optional& grad_lse, const Tensor& input,
                const Tensor& target, const Optional& weight, const Tensor& lse,
                const Tensor& total_weight, const Options& options) {
  const Target checked = check_arguments(input, target, weight, options, on_cpu);
  check_backward(grad_loss, grad_lse, input, lse, total_weight, options, on_cpu);
  if (input.numel() == 0) return torch::stable::empty_like(input);
  Optional gradient;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Prepared<S> prepared(input, checked, weight, options, true);
    Problem<S>& p = prepared.problem;
    p.lse = static_cast<double*>(lse.data_ptr());
    p.grad_loss = static_cast<const S*>(grad_loss.const_data_ptr());
    if (grad_lse) p.grad_lse = static_cast<const double*>(grad_lse->const_data_ptr());
    if (options.reduction == kMean)
      p.row_factor = 1 / *static_cast<const double*>(total_weight.const_data_ptr());
    for_kind(checked.is_probability, options.label_smoothing,
             [&](auto kind) { run_backward<S, kind.value>(p); });
    gradient = prepared.finished_gradient();
  });
  return *gradient;
}

// gradient *= grad_loss, for a gradient made in the forward pass; nothing is touched where
// grad_loss is 1.
void cross_entropy_scale_(Tensor gradient, Tensor grad_loss) {
  check_scale(gradient, grad_loss, on_cpu);
  const int64_t n = gradient.numel();
  if (n == 0) return;
  for_dtype<bf16, f16>(gradient.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const T factor = widen(*static_cast<const S*>(grad_loss.const_data_ptr()));
    if (factor == T(1)) return;
    S* data = static_cast<S*>(gradient.mutable_data_ptr());
    torch::stable::parallel_for(
        0, (n + V::size - 1) / V::size, kGrain / V::size, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin * V::size; i < std::min(n, end * V::size); i += V::size) {
            const int64_t lanes = std::min(V::size, n - i);
            store(data + i, load(data + i, lanes) * V(factor), lanes);
          }
        });
  });
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  using namespace dlkernels;
  using namespace dlkernels::cross_entropy;
  m.impl("cross_entropy", TORCH_BOX(&raw_forward<forward>));
  m.impl("cross_entropy_forward", TORCH_BOX(&raw_forward<forward>));
  m.impl("cross_entropy_forward_backward", TORCH_BOX(&raw_forward_backward<forward>));
  m.impl("cross_entropy_backward", TORCH_BOX(&raw_backward<backward>));
  m.impl("cross_entropy_scale_", TORCH_BOX(&cross_entropy_scale_));
}

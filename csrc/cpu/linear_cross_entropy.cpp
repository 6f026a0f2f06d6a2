// Cross-entropy of the logits Z = X·Wᵀ + b, which are never written out, and its gradients:
//   dX = dZ·W      dW = dZᵀ·X      db = Σ_rows dZ
// For N rows, D features, C classes, at each of K positions (the loss of K dimensions; 1 without).
//
// A chunk of R rows goes through four parallel steps:
//   1  Zᵀ = W·Xᵀ + b, C × R, block of classes by block, and the statistics of each while in cache
//   2  dZᵀ in the place of Zᵀ, and db
//   3  dX of the chunk, all of it
//   4  dW, added to that of the chunks before
// Zᵀ is a scratch of C × R, and step 4 is part of step 2, block by block. Or, where there are no
// more rows than features (half of them, in 16 bits), it lies in the memory of dW, row c of it
// where row c of dW comes to lie, and step 4 puts a block of dW in the place of the dZᵀ that it has
// just read: all rows are one chunk, and W and dW pass once. Where chunks add up, sums of dW are in
// float (double for double), for 16 bits in a buffer of its size. Without gradients only step 1
// runs, with a block of classes as scratch.
//
// Ranges of classes are the unit of work, their size set by the shape alone, and joined in order:
// the same bits for any number of threads.
#include "linear_cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "gemm.h"
#include "memory.h"

namespace dlkernels {
namespace {

using namespace linear_cross_entropy;
using cross_entropy::Optional;
using cross_entropy::Options;
using cross_entropy::Reduction;
using cross_entropy::ScalarType;
using cross_entropy::Tensor;
using gemm::kBlockRows;
using gemm::Matrix;

constexpr const char* kOp = "linear_cross_entropy";
constexpr int64_t kRanges = 64;  // most ranges of classes

// Rows of a chunk whose Zᵀ is scratch: below a tenth of all logits, with the scratch of the
// products, where that does not make each of them so thin that reading W and dW takes longer than
// it.
constexpr int64_t kLeastRows = 48, kMostRows = 384, kChunks = 12;
constexpr int64_t kForwardRows = 512;  // where only a block of classes is kept

struct Wanted {
  bool input, weight, bias;
  bool any() const { return input || weight || bias; }
};

// --------------------------------------------------------------------------------------- arguments

struct Arguments {
  Tensor input, linear_weight;
  Optional linear_bias;
  Tensor target;
  bool is_probability;
  int64_t rows, features, classes, positions;
};

// What losses, and the class weights, of elements of a dtype are of.
ScalarType accumulated(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

// Fails unless every argument is what the loops take. Targets and biases come back contiguous,
// position by position.
Arguments check_arguments(const Tensor& input, const Tensor& linear_weight,
                          const Optional& linear_bias, const Tensor& target, const Optional& weight,
                          const Options& options) {
  check_cpu(kOp, "input", input);
  check_cpu(kOp, "linear_weight", linear_weight);
  check_cpu(kOp, "target", target);
  check_floating(kOp, "input", input);
  const ScalarType dtype = input.scalar_type();
  check_dtype(kOp, "linear_weight", linear_weight, dtype);
  DLK_CHECK(input.dim() == 2, kOp, ": expected input of shape [rows, features], got ",
            shape_string(input.sizes()));
  DLK_CHECK(linear_weight.dim() == 3, kOp,
            ": expected linear_weight of shape [classes, positions, features], got ",
            shape_string(linear_weight.sizes()));
  const int64_t rows = input.size(0), features = input.size(1), classes = linear_weight.size(0),
                positions = linear_weight.size(1);
  DLK_CHECK(linear_weight.size(2) == features, kOp, ": expected linear_weight with ", features,
            " features, got ", shape_string(linear_weight.sizes()));
  DLK_CHECK(classes >= 1, kOp, ": expected at least one class, got linear_weight of shape ",
            shape_string(linear_weight.sizes()));
  cross_entropy::check_options(kOp, options);
  if (linear_bias) {
    check_cpu(kOp, "linear_bias", *linear_bias);
    check_dtype(kOp, "linear_bias", *linear_bias, dtype);
    check_shape(kOp, "linear_bias", *linear_bias, std::vector<int64_t>{classes, positions});
  }
  if (weight) {
    check_cpu(kOp, "weight", *weight);
    check_dtype(kOp, "weight", *weight, accumulated(dtype));
    check_shape(kOp, "weight", *weight, std::vector<int64_t>{classes});
  }
  const bool is_probability = target.scalar_type() == dtype;
  if (is_probability) {
    check_shape(kOp, "target", target, std::vector<int64_t>{rows, classes, positions});
  } else {
    DLK_CHECK(target.scalar_type() == ScalarType::Long || target.scalar_type() == ScalarType::Byte,
              kOp, ": expected target of dtype int64 or uint8, or of the input's dtype, got ",
              torch::headeronly::toString(target.scalar_type()));
    check_shape(kOp, "target", target, std::vector<int64_t>{rows, positions});
  }
  const auto by_position = [](const Tensor& x) {
    return torch::stable::contiguous(torch::stable::transpose(x, 0, 1));
  };
  return {input,
          linear_weight,
          linear_bias ? Optional(by_position(*linear_bias)) : std::nullopt,
          is_probability ? target : by_position(torch::stable::to(target, ScalarType::Long)),
          is_probability,
          rows,
          features,
          classes,
          positions};
}

// ------------------------------------------------------------------------------------------ chunks

// Whether Zᵀ lies in the memory of dW.
template <typename S>
bool is_in_place(const Arguments& a, Wanted wanted) {
  constexpr int64_t kPer = sizeof(accumulate_t<S>) / sizeof(S);
  return wanted.weight && a.features % kPer == 0 && a.rows <= a.features / kPer;
}

// The work of a call on element type S: see the head of this file.
template <typename S, Kind kind>
class Chunks {
 public:
  using T = accumulate_t<S>;
  // What dZ is rounded to: what the products read, which take pairs of bf16 only from both sides.
  using G = std::conditional_t<gemm::Word<S>::kPair, S, T>;

  // Sums of dW and db are added up in T, but for the dW that Zᵀ lies in.
  Chunks(const Arguments& a, const Problem<T>& p, Wanted wanted, S* grad_input, S* grad_weight,
         T* sums_weight, T* sums_bias)
      : a_(a),
        p_(p),
        wanted_(wanted),
        grad_input_(grad_input),
        grad_weight_(grad_weight),
        sums_weight_(sums_weight),
        sums_bias_(sums_bias),
        in_place_(is_in_place<S>(a, wanted)),
        chunk_(in_place_      ? a.rows
               : wanted.any() ? std::clamp(a.rows / kChunks / 16 * 16, kLeastRows, kMostRows)
                              : kForwardRows),
        most_rows_(std::min(chunk_, a.rows)),
        per_range_(gemm::round_up((a.classes + kRanges - 1) / kRanges, kBlockRows)),
        ranges_((a.classes + per_range_ - 1) / per_range_),
        pitch_(in_place_ ? a.positions * own_pitch() : pitch_of(most_rows_)),
        packed_(gemm::Packed<S>::size(most_rows_, a.features)),
        packed_rows_(wanted.weight ? gemm::Packed<S>::size(a.features, most_rows_) : 0),
        logits_(wanted.any() && !in_place_ ? a.classes * pitch_ : 0),
        statistics_((ranges_ + 1) * statistics_size()),
        at_target_(padded(most_rows_)),
        sums_(wanted.input && a.positions > 1 ? most_rows_ * a.features : 0),
        blocks_((most_rows_ + kRows - 1) / kRows) {}

  // Returns the sum of the losses.
  double run() {
    double total = 0;
    for (int64_t row = 0; row < a_.rows; row += chunk_) {
      const int64_t n = std::min(chunk_, a_.rows - row);
      for (int64_t k = 0; k < a_.positions; ++k) {
        total += make_logits(row, n, k);
        if (!wanted_.any()) continue;
        make_gradient(row, n, k);
        if (wanted_.input) multiply_by_weight(row, n, k);
        if (in_place_) multiply_by_input(row, n, k);
      }
    }
    return total;
  }

 private:
  static int64_t padded(int64_t n) { return gemm::round_up(n, 16); }
  // Not one at which all classes fall into a few sets of a cache.
  static int64_t pitch_of(int64_t rows) {
    const int64_t pitch = padded(rows);
    return pitch % 64 == 0 ? pitch + 16 : pitch;
  }
  // Elements T in the memory of a row of dW.
  int64_t own_pitch() const { return a_.features * int64_t(sizeof(S)) / int64_t(sizeof(T)); }
  int64_t statistics_size() const { return gemm::round_up(Statistics<T>::size(most_rows_), 64); }
  Statistics<T> statistics(int64_t range) const {
    return {statistics_.get() + range * statistics_size(), most_rows_};
  }
  // Of class c on, at position k.
  Tile<T> logits(int64_t c, int64_t k) const {
    T* const first =
        in_place_ ? reinterpret_cast<T*>(grad_weight_) + k * own_pitch() : logits_.get();
    return {first + c * pitch_, pitch_};
  }
  const int64_t* target(int64_t row, int64_t k) const { return p_.target + k * a_.rows + row; }
  Probability<S> probability(int64_t row, int64_t k) const {
    if (kind != Kind::kProbability) return {};
    const S* const data = static_cast<const S*>(a_.target.const_data_ptr());
    return {data + row * a_.target.stride(0) + k * a_.target.stride(2), a_.target.stride(0),
            a_.target.stride(1)};
  }
  Matrix<S> input(int64_t row) const {
    const S* const data = static_cast<const S*>(a_.input.const_data_ptr());
    return {data + row * a_.input.stride(0), a_.input.stride(0), a_.input.stride(1)};
  }
  Matrix<S> linear_weight(int64_t k) const {
    const S* const data = static_cast<const S*>(a_.linear_weight.const_data_ptr());
    return {data + k * a_.linear_weight.stride(1), a_.linear_weight.stride(0),
            a_.linear_weight.stride(2)};
  }

  // body(c0, c1, range, scratch) for every block of classes, in order within a range.
  template <typename Body>
  void for_blocks(int64_t scratch_size, const Body& body) {
    const int64_t size = Aligned<T>::padded(scratch_size);
    const int64_t threads =
        std::min<int64_t>(ranges_, std::max<int64_t>(1, torch::stable::get_num_threads()));
    const Aligned<T> memory(threads * size);
    std::atomic<int64_t> callers{0};
    const int64_t work = per_range_ * most_rows_ * std::max<int64_t>(1, a_.features);
    const int64_t grain = std::max<int64_t>(1, gemm::kGrain / std::max<int64_t>(1, work));
    torch::stable::parallel_for(0, ranges_, grain, [&](int64_t begin, int64_t end) {
      T* const scratch = memory.get() + callers.fetch_add(1) * size;
      for (int64_t range = begin; range < end; ++range) {
        const int64_t last = std::min(a_.classes, (range + 1) * per_range_);
        for (int64_t c = range * per_range_; c < last; c += kBlockRows)
          body(c, std::min(last, c + kBlockRows), range, scratch);
      }
    });
  }

  // Step 1, and what the statistics say: losses, log-sum-exp, and the coefficients of the gradient.
  double make_logits(int64_t row, int64_t n, int64_t k) {
    const gemm::Packed<S> x(input(row).transposed(), n, a_.features, packed_.get());
    const Matrix<S> w = linear_weight(k);
    const S* const bias =
        a_.linear_bias ? static_cast<const S*>(a_.linear_bias->const_data_ptr()) + k * a_.classes
                       : nullptr;
    const Probability<S> masses = probability(row, k);
    const T cap = p_.cap();
    for (int64_t range = 0; range <= ranges_; ++range) statistics(range).clear();
    const int64_t own_pitch = pitch_of(n);
    const int64_t own = wanted_.any() ? 0 : kBlockRows * own_pitch;
    for_blocks(x.scratch_size() + own, [&](int64_t c0, int64_t c1, int64_t range, T* scratch) {
      const Tile<T> tile = wanted_.any() ? logits(c0, k) : Tile<T>{scratch, own_pitch};
      const int64_t next = std::min(c1, a_.classes - 1), bytes = w.row_stride * sizeof(S);
      gemm::run_block(
          w, x, c0, c1 - c0, scratch + own,
          [&](int64_t c, int64_t i, int64_t lanes, Vec<T> value) {
            if (bias) value = value + Vec<T>(widen(bias[c]));
            if (cap != 0) value = cross_entropy::squash(value, cap);
            store(tile.at(c - c0) + i, value, lanes);
          },
          w.at(next, 0), std::min(kBlockRows, a_.classes - next) * bytes);
      add_classes<S, kind>(p_, tile, masses, c0, c1, n, statistics(range));
      if constexpr (kind != Kind::kProbability)
        for (int64_t i = 0; i < n; ++i)
          if (const int64_t c = target(row, k)[i] - c0; uint64_t(c) < uint64_t(c1 - c0))
            at_target_.get()[i] = tile.at(c)[i];
    });
    const Statistics<T> all = statistics(ranges_);
    for (int64_t range = 0; range < ranges_; ++range) merge(all, statistics(range), n);
    double total = 0;
    for (int64_t i = 0; i < n; i += kRows) {
      Block<T>& b = blocks_[i / kRows];
      const int64_t size = std::min(kRows, n - i), at = k * a_.rows + row + i;
      cross_entropy::load_targets<T, kind>(p_, b, at, size);
      std::copy_n(all.max + i, size, b.max);
      for (int64_t q = 0; q < size; ++q) {
        b.sum[q] = T(all.sum[i + q]);
        b.mass[q] = T(all.mass[i + q]);
        b.moment[q] = T(all.moment[i + q]);
        b.target_logit[q] = kind != Kind::kProbability && b.counts[q] != 0
                                ? unit_of(p_) * at_target_.get()[i + q]
                                : T(0);
      }
      total += cross_entropy::finish_rows<T, kind>(p_, b, at, size);
      if (!wanted_.any()) continue;
      cross_entropy::load_lse(p_, b, at, size);
      cross_entropy::set_coefficients<T, kind>(p_, b, at, size, false);
    }
    return total;
  }

  // Step 2, and 4 where Zᵀ is scratch.
  void make_gradient(int64_t row, int64_t n, int64_t k) {
    const Probability<S> masses = probability(row, k);
    const bool multiplies = wanted_.weight && !in_place_;
    std::optional<gemm::Packed<S>> x;
    if (multiplies) x.emplace(input(row), a_.features, n, packed_rows_.get());
    for_blocks(x ? x->scratch_size() : 0, [&](int64_t c0, int64_t c1, int64_t, T* scratch) {
      const Tile<T> tile = logits(c0, k);
      write_gradient<S, G, kind>(p_, tile, masses,
                                 kind == Kind::kProbability ? nullptr : target(row, k),
                                 at_target_.get(), blocks_.data(), c0, c1, n);
      if (wanted_.bias)
        for (int64_t c = c0; c < c1; ++c) {
          T& to = sums_bias_[c * a_.positions + k];
          const T value = sum_of(reinterpret_cast<const G*>(tile.at(c - c0)), n);
          to = row == 0 ? value : to + value;
        }
      if (multiplies) add_weight_gradient(*x, row, k, c0, c1, scratch);
    });
  }

  // Rows are classes.
  Matrix<G> gradient(int64_t k) const {
    return {reinterpret_cast<const G*>(logits(0, k).data), pitch_ * int64_t(sizeof(T) / sizeof(G)),
            1};
  }

  // Step 3.
  void multiply_by_weight(int64_t row, int64_t n, int64_t k) {
    const int64_t d = a_.features;
    S* const to = grad_input_ + row * d;
    T* const sums = sums_.get();
    const bool first = k == 0, last = k == a_.positions - 1;
    gemm::multiply(gradient(k).transposed(), linear_weight(k), n, d, a_.classes,
                   [=](int64_t i, int64_t j, int64_t lanes, Vec<T> value) {
                     if (!first) value = value + load(sums + i * d + j, lanes);
                     if (last)
                       store(to + i * d + j, value, lanes);
                     else
                       store(sums + i * d + j, value, lanes);
                   });
  }

  // Step 4 for a block of classes.
  void add_weight_gradient(const gemm::Packed<S>& x, int64_t row, int64_t k, int64_t c0, int64_t c1,
                           T* scratch) const {
    const int64_t d = a_.features, pitch = a_.positions * d;
    const int64_t next = std::min(c1, a_.classes - 1),
                  rows = std::min(kBlockRows, a_.classes - next);
    if (in_place_) {
      S* const to = grad_weight_ + k * d;
      const auto write = [=](int64_t c, int64_t j, int64_t lanes, Vec<T> value) {
        store(to + c * pitch + j, value, lanes);
      };
      gemm::run_block(gradient(k), x, c0, c1 - c0, scratch, write, to + next * pitch,
                      rows * pitch * sizeof(S));
    } else {
      T* const to = sums_weight_ + k * d;
      const auto add = [=](int64_t c, int64_t j, int64_t lanes, Vec<T> value) {
        T* const at = to + c * pitch + j;
        store(at, row == 0 ? value : value + load(at, lanes), lanes);
      };
      gemm::run_block(gradient(k), x, c0, c1 - c0, scratch, add, to + next * pitch,
                      rows * pitch * sizeof(T));
    }
  }

  // Step 4.
  void multiply_by_input(int64_t row, int64_t n, int64_t k) {
    const gemm::Packed<S> x(input(row), a_.features, n, packed_rows_.get());
    for_blocks(x.scratch_size(), [&](int64_t c0, int64_t c1, int64_t, T* scratch) {
      add_weight_gradient(x, row, k, c0, c1, scratch);
    });
  }

  const Arguments& a_;
  const Problem<T>& p_;
  const Wanted wanted_;
  S *const grad_input_, *const grad_weight_;
  T *const sums_weight_, *const sums_bias_;
  const bool in_place_;
  const int64_t chunk_, most_rows_, per_range_, ranges_, pitch_;
  const Aligned<T> packed_, packed_rows_, logits_;
  const Aligned<char> statistics_;
  const Aligned<T> at_target_, sums_;
  std::vector<Block<T>> blocks_;
};

// ------------------------------------------------------------------------------------ host entries

// body(i, lanes) for n elements, a vector at a time, over all threads.
template <typename V, typename Body>
void for_vectors(int64_t n, const Body& body) {
  torch::stable::parallel_for(
      0, (n + V::size - 1) / V::size, gemm::kGrain / V::size, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * V::size; i < std::min(n, end * V::size); i += V::size)
          body(i, std::min(V::size, n - i));
      });
}

// A gradient, and its sums in T, which are rounded into it at the end where it is of 16 bits.
template <typename S>
class Accumulated {
 public:
  using T = accumulate_t<S>;
  Accumulated(const Tensor& tensor, bool wanted) : tensor_(tensor) {
    if (!wanted) return;
    if constexpr (std::is_same_v<S, T>) {
      sums_ = static_cast<T*>(tensor.mutable_data_ptr());
      advise_huge_pages(sums_, tensor.numel() * sizeof(T));
    } else {
      own_.emplace(tensor.numel());
      sums_ = own_->get();
    }
  }
  T* sums() const { return sums_; }
  void finish() const {
    if (!own_) return;
    S* const to = static_cast<S*>(tensor_.mutable_data_ptr());
    const T* const from = sums_;
    for_vectors<Vec<T>>(tensor_.numel(), [=](int64_t i, int64_t lanes) {
      store(to + i, load(from + i, lanes), lanes);
    });
  }

 private:
  Tensor tensor_;
  std::optional<Aligned<T>> own_;
  T* sums_ = nullptr;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// loss, and the wanted gradients for an upstream gradient, 1 where none is given.
Results compute(const Optional& grad_loss, const Tensor& input, const Tensor& linear_weight,
                const Optional& linear_bias, const Tensor& target, const Optional& weight,
                const Options& options, Wanted wanted) {
  const Arguments a = check_arguments(input, linear_weight, linear_bias, target, weight, options);
  wanted.bias = wanted.bias && linear_bias;
  const std::vector<int64_t> scalar, none{0}, per_row{a.rows, a.positions};
  const bool reduced = options.reduction != cross_entropy::kNone;
  const ScalarType exact = accumulated(input.scalar_type());
  const Tensor loss = torch::stable::new_empty(input, reduced ? scalar : per_row, exact);
  const auto gradient_of = [&](bool is_wanted, const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(input, is_wanted ? shape : none);
  };
  const Tensor grad_input = gradient_of(wanted.input, {a.rows, a.features});
  const Tensor grad_weight = gradient_of(wanted.weight, {a.classes, a.positions, a.features});
  const Tensor grad_bias = gradient_of(wanted.bias, {a.classes, a.positions});
  std::optional<Tensor> upstream;
  if (grad_loss) {
    check_cpu(kOp, "grad_loss", *grad_loss);
    check_dtype(kOp, "grad_loss", *grad_loss, exact);
    check_shape(kOp, "grad_loss", *grad_loss, reduced ? scalar : per_row);
    upstream = reduced ? *grad_loss
                       : torch::stable::contiguous(torch::stable::transpose(*grad_loss, 0, 1));
  }
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    Problem<T> p;
    p.options = options;
    p.layout.classes = a.classes;
    p.rows = a.rows * a.positions;
    if (!a.is_probability) p.target = static_cast<const int64_t*>(a.target.const_data_ptr());
    cross_entropy::set_class_weights(p, weight);
    const double total_weight =
        a.is_probability ? double(p.rows) : cross_entropy::sum_target_weights(p);
    p.row_factor = options.reduction == cross_entropy::kMean ? 1 / total_weight : 1;
    const Aligned<double> lse(p.rows);
    p.lse = lse.get();
    Tensor row_losses = loss;
    if (!reduced && a.positions > 1)
      row_losses =
          torch::stable::new_empty(input, std::vector<int64_t>{a.positions, a.rows}, exact);
    p.loss = static_cast<T*>(row_losses.mutable_data_ptr());
    if (upstream) p.grad_loss = static_cast<const T*>(upstream->const_data_ptr());
    const bool in_place = is_in_place<S>(a, wanted);
    const Accumulated<S> of_weight(grad_weight, wanted.weight && !in_place);
    const Accumulated<S> of_bias(grad_bias, wanted.bias);
    const auto memory = [](const Tensor& tensor, bool is_wanted) {
      return is_wanted ? static_cast<S*>(tensor.mutable_data_ptr()) : nullptr;
    };
    if (in_place)
      advise_huge_pages(grad_weight.mutable_data_ptr(), size_t(grad_weight.numel()) * sizeof(S));
    double sum = 0;
    cross_entropy::for_kind(a.is_probability, options.label_smoothing, [&](auto kind) {
      sum = Chunks<S, kind.value>(a, p, wanted, memory(grad_input, wanted.input),
                                  memory(grad_weight, wanted.weight), of_weight.sums(),
                                  of_bias.sums())
                .run();
    });
    if (options.reduction == cross_entropy::kMean) sum /= total_weight;
    if (reduced)
      *p.loss = T(sum);
    else if (a.positions > 1)
      torch::stable::copy_(const_cast<Tensor&>(loss), torch::stable::transpose(row_losses, 0, 1));
    if (p.rows == 0) {  // nobody else writes them
      for (Tensor gradient : {grad_input, grad_weight, grad_bias}) torch::stable::zero_(gradient);
    } else {
      of_weight.finish();
      of_bias.finish();
    }
  });
  return {loss, grad_input, grad_weight, grad_bias};
}

Results linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Optional linear_bias,
                                     Tensor target, Optional weight, int64_t reduction,
                                     int64_t ignore_index, double label_smoothing, double softcap,
                                     double z_loss, bool want_input, bool want_weight,
                                     bool want_bias) {
  const Wanted wanted{want_input, want_weight, want_bias};
  DLK_CHECK(reduction != cross_entropy::kNone || !wanted.any(), kOp,
            ": gradients made in the forward pass need reduction mean or sum, got none");
  return compute(std::nullopt, input, linear_weight, linear_bias, target, weight,
                 {reduction, ignore_index, label_smoothing, softcap, z_loss}, wanted);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    Tensor grad_loss, Tensor input, Tensor linear_weight, Optional linear_bias, Tensor target,
    Optional weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
    double softcap, double z_loss, bool want_input, bool want_weight, bool want_bias) {
  const auto [loss, grad_input, grad_weight, grad_bias] =
      compute(grad_loss, input, linear_weight, linear_bias, target, weight,
              {reduction, ignore_index, label_smoothing, softcap, z_loss},
              {want_input, want_weight, want_bias});
  return {grad_input, grad_weight, grad_bias};
}

// Each gradient *= grad_loss, for those made with the loss; nothing is touched where that is 1.
void linear_cross_entropy_scale_(Tensor grad_input, Tensor grad_weight, Tensor grad_bias,
                                 Tensor grad_loss) {
  check_cpu(kOp, "grad_loss", grad_loss);
  check_shape(kOp, "grad_loss", grad_loss, std::vector<int64_t>{});
  const auto scale = [&](const char* argument, const Tensor& gradient) {
    check_cpu(kOp, argument, gradient);
    check_floating(kOp, argument, gradient);
    check_contiguous(kOp, argument, gradient);
    check_dtype(kOp, "grad_loss", grad_loss, accumulated(gradient.scalar_type()));
    for_dtype<bf16, f16>(gradient.scalar_type(), [&](auto tag) {
      using S = decltype(tag);
      using V = Vec<accumulate_t<S>>;
      const V factor(*static_cast<const accumulate_t<S>*>(grad_loss.const_data_ptr()));
      if (first_element(factor) == 1) return;
      S* const data = static_cast<S*>(gradient.mutable_data_ptr());
      for_vectors<V>(gradient.numel(), [=](int64_t i, int64_t lanes) {
        store(data + i, load(data + i, lanes) * factor, lanes);
      });
    });
  };
  scale("grad_input", grad_input);
  scale("grad_weight", grad_weight);
  scale("grad_bias", grad_bias);
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&dlkernels::linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&dlkernels::linear_cross_entropy_backward));
  m.impl("linear_cross_entropy_scale_", TORCH_BOX(&dlkernels::linear_cross_entropy_scale_));
}

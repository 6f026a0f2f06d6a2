// Linear: act(X·Wᵀ + b) and its gradients, on the products of gemm.h; bias and activation are in
// the epilogue. With Z' = upstream gradient · act'(Y):
//   dX = Z'·W      dW = Z'ᵀ·X      db = Σ_rows Z'
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "gemm.h"
#include "memory.h"
#include "sums.h"

namespace dlkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr const char* kOp = "linear";

// --------------------------------------------------------------------------------------- arguments

// The leading dimensions of (…, k) as one; nothing where no single stride steps through them.
std::optional<int64_t> row_stride(const Tensor& x) {
  int64_t stride = 0, rows = 1;
  for (int64_t d = x.dim() - 1; d-- > 0;) {
    if (x.size(d) == 1) continue;
    if (rows == 1)
      stride = x.stride(d);
    else if (x.stride(d) != stride * rows)
      return std::nullopt;
    rows *= x.size(d);
  }
  return stride;
}

// x as rows × columns, itself or a contiguous copy, which `keep` holds.
template <typename S>
gemm::Matrix<S> as_matrix(const Tensor& x, Tensor& keep) {
  const auto stride = row_stride(x);
  keep = stride ? x : torch::stable::contiguous(x);
  const int64_t columns = x.size(x.dim() - 1);
  return {static_cast<const S*>(keep.const_data_ptr()), stride.value_or(columns),
          stride ? x.stride(x.dim() - 1) : 1};
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

void check_arguments(const Tensor& input, const Tensor& weight, const Optional& bias) {
  check_cpu(kOp, "input", input);
  check_cpu(kOp, "weight", weight);
  check_floating(kOp, "input", input);
  const ScalarType dtype = input.scalar_type();
  check_dtype(kOp, "weight", weight, dtype);
  DLK_CHECK(input.dim() >= 1, kOp, ": expected input with at least 1 dimension, got a scalar");
  DLK_CHECK(weight.dim() == 2, kOp, ": expected weight with 2 dimensions, got shape ",
            shape_string(weight.sizes()));
  DLK_CHECK(input.size(input.dim() - 1) == weight.size(1), kOp, ": expected input of shape [..., ",
            weight.size(1), "] for weight of shape ", shape_string(weight.sizes()), ", got ",
            shape_string(input.sizes()));
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, dtype);
    check_shape(kOp, "bias", *bias, std::vector<int64_t>{weight.size(0)});
  }
}

std::vector<int64_t> output_shape(const Tensor& input, const Tensor& weight) {
  const auto size = input.sizes();
  std::vector<int64_t> shape(size.begin(), size.end());
  shape.back() = weight.size(0);
  return shape;
}

// ------------------------------------------------------------------------------------ host entries

Tensor linear_forward(Tensor input, Tensor weight, Optional bias, Text activation) {
  check_arguments(input, weight, bias);
  const Activation act = parse_activation(kOp, activation);
  const Tensor output = in_huge_pages(torch::stable::new_empty(input, output_shape(input, weight)));
  const int64_t m = rows_of(input), n = weight.size(0), k = weight.size(1);
  if (m == 0 || n == 0) return output;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using V = Vec<accumulate_t<S>>;
    Tensor keep, flat_bias;
    const auto x = as_matrix<S>(input, keep);
    const gemm::Matrix<S> w{static_cast<const S*>(weight.const_data_ptr()), weight.stride(0),
                            weight.stride(1)};
    const S* b = nullptr;
    if (bias) {
      flat_bias = torch::stable::contiguous(*bias);
      b = static_cast<const S*>(flat_bias.const_data_ptr());
    }
    S* y = static_cast<S*>(output.mutable_data_ptr());
    gemm::multiply(x, w.transposed(), m, n, k, [=](int64_t i, int64_t j, int64_t lanes, V value) {
      if (b) value = value + load(b + j, lanes);
      store(y + i * n + j, activate(act, value), lanes);
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad_output, Tensor input, Tensor weight,
                                                   Optional output, Text activation,
                                                   bool want_input, bool want_weight,
                                                   bool want_bias) {
  check_arguments(input, weight, std::nullopt);
  const Activation act = parse_activation(kOp, activation);
  const std::vector<int64_t> shape = output_shape(input, weight), none{0};
  check_cpu(kOp, "grad_output", grad_output);
  check_dtype(kOp, "grad_output", grad_output, input.scalar_type());
  check_shape(kOp, "grad_output", grad_output, shape);
  DLK_CHECK((act != Activation::kNone) == output.has_value(), kOp,
            ": expected the output where there is an activation, and only there");
  if (output) {
    check_cpu(kOp, "output", *output);
    check_dtype(kOp, "output", *output, input.scalar_type());
    check_shape(kOp, "output", *output, shape);
  }
  const int64_t m = rows_of(input), n = weight.size(0), k = weight.size(1);
  const auto size = input.sizes();
  const std::vector<int64_t> input_shape(size.begin(), size.end());
  const Tensor grad_input =
      in_huge_pages(torch::stable::new_empty(input, want_input ? input_shape : none));
  const Tensor grad_weight = in_huge_pages(
      torch::stable::new_empty(input, want_weight ? std::vector<int64_t>{n, k} : none));
  const Tensor grad_bias =
      torch::stable::new_empty(input, want_bias ? std::vector<int64_t>{n} : none);
  const Tensor grad = output ? before_activation(act, grad_output, *output) : grad_output;
  for_dtype<bf16, f16>(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using V = Vec<accumulate_t<S>>;
    Tensor keep_input, keep_grad;
    const auto z = as_matrix<S>(grad, keep_grad);
    const auto write = [](const Tensor& to, int64_t columns) {
      S* data = static_cast<S*>(to.mutable_data_ptr());
      return [=](int64_t i, int64_t j, int64_t lanes, V value) {
        store(data + i * columns + j, value, lanes);
      };
    };
    if (want_input) {
      const gemm::Matrix<S> w{static_cast<const S*>(weight.const_data_ptr()), weight.stride(0),
                              weight.stride(1)};
      gemm::multiply(z, w, m, k, n, write(grad_input, k));
    }
    if (want_weight) {
      const auto x = as_matrix<S>(input, keep_input);
      gemm::multiply(z.transposed(), x, n, k, m, write(grad_weight, k));
    }
    if (want_bias) sums::rows(z, m, n, static_cast<S*>(grad_bias.mutable_data_ptr()));
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("linear", TORCH_BOX(&dlkernels::linear_forward));
  m.impl("linear_forward", TORCH_BOX(&dlkernels::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&dlkernels::linear_backward));
}

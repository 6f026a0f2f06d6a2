// One layer of an LSTM, GRU or RNN, all its directions, and a step of one: see ops/lstm.py. A cell
// is a layer of one step.
#include "lstm.h"

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

namespace dlkernels {
namespace {

using lstm::Mode;
using lstm::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "lstm";
constexpr const char* kCell = "lstm_cell";

// --------------------------------------------------------------------------------------- arguments

Mode parse_mode(const char* op, const std::string& name) {
  constexpr std::array<const char*, 4> kNames{"lstm", "gru", "rnn_tanh", "rnn_relu"};
  const auto* found = std::find(kNames.begin(), kNames.end(), name);
  DLK_CHECK(found != kNames.end(), op, ": expected mode lstm, gru, rnn_tanh or rnn_relu, got ",
            name);
  return Mode(found - kNames.begin());
}

void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                  const Ints& shape) {
  check_cpu(op, argument, tensor);
  check_dtype(op, argument, tensor, dtype);
  check_shape(op, argument, tensor, shape);
}

// What is contiguous does not take the way through the dispatcher.
Tensor compact(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Of a layer: its shape, checked, with everything contiguous that is not the input. A cell is a
// layer of one step and one direction, without the dimensions of those.
struct Layer {
  const char* op;
  bool cell;
  Shape shape{};
  ScalarType dtype;
  bool biases = false;
  Tensor input, hx, cx, sizes;
  Tensors weights;

  // The shapes of a state, and of rows of all steps.
  Ints state_of(int64_t units) const {
    return cell ? Ints{shape.batch, units} : Ints{shape.directions, shape.batch, units};
  }
  Ints rows_of(int64_t columns) const {
    return cell || shape.sizes ? Ints{shape.rows(), columns}
                               : Ints{shape.steps, shape.batch, columns};
  }

  int64_t per_direction() const { return 2 + (biases ? 2 : 0) + (shape.projected ? 1 : 0); }
  const Tensor& weight(int64_t d, int64_t i) const {
    return weights[size_t(d * per_direction() + i)];
  }

  template <typename S>
  std::vector<lstm::Weights<S>> of() const {
    std::vector<lstm::Weights<S>> all;
    for (int64_t d = 0; d < shape.directions; ++d) {
      const auto data = [&](int64_t i) {
        return static_cast<const S*>(weight(d, i).const_data_ptr());
      };
      all.push_back({data(0), data(1), biases ? data(2) : nullptr, biases ? data(3) : nullptr,
                     shape.projected ? data(per_direction() - 1) : nullptr});
    }
    return all;
  }
};

ScalarType sums_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Layer make_layer(const char* op, const Tensor& input, const Optional& batch_sizes, const Tensor& hx,
                 const Optional& cx, const Tensors& weights, const std::string& mode) {
  Layer layer;
  layer.op = op;
  layer.cell = op == kCell;
  Shape& s = layer.shape;
  s.mode = parse_mode(op, mode);
  check_cpu(op, "input", input);
  check_floating(op, "input", input);
  const ScalarType dtype = layer.dtype = input.scalar_type();
  const int64_t dim = layer.cell || batch_sizes ? 2 : 3, states = layer.cell ? 2 : 3;
  DLK_CHECK(input.dim() == dim, op, ": expected input with ", dim, " dimensions, got shape ",
            shape_string(input.sizes()));
  DLK_CHECK(hx.dim() == states, op, ": expected hx with ", states, " dimensions, got shape ",
            shape_string(hx.sizes()));
  s.directions = layer.cell ? 1 : hx.size(0);
  DLK_CHECK(s.directions >= 1 && s.directions <= 2, op,
            ": expected hx of 1 or 2 directions, got shape ", shape_string(hx.sizes()));
  s.batch = hx.size(states - 2);
  s.state = hx.size(states - 1);
  s.inputs = input.size(dim - 1);
  const int64_t count = int64_t(weights.size()), each = count / s.directions;
  DLK_CHECK(count == each * s.directions && each >= 2 && each <= 5, op,
            ": expected 2 to 5 weights for each of ", s.directions, " directions, got ", count);
  layer.biases = each >= 4;
  s.projected = each % 2 == 1;
  DLK_CHECK(!s.projected || s.mode == Mode::kLstm, op, ": only an lstm has projections");
  DLK_CHECK(cx.has_value() == (s.mode == Mode::kLstm), op,
            ": expected cx of an lstm, and only of one");
  s.hidden = s.projected ? (cx->dim() == 3 ? cx->size(2) : -1) : s.state;
  const int64_t gates = s.gates() * s.hidden;
  check_tensor(op, "hx", hx, dtype, layer.state_of(s.state));
  if (cx) check_tensor(op, "cx", *cx, dtype, layer.state_of(s.hidden));
  DLK_CHECK(s.hidden >= 1 && s.state >= 1, op, ": expected a hidden state, got hx of shape ",
            shape_string(hx.sizes()));
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& w = weights[size_t(i)];
    const int64_t at = i % each;
    const Ints shape = at == 0                   ? Ints{gates, s.inputs}
                       : at == 1                 ? Ints{gates, s.state}
                       : layer.biases && at <= 3 ? Ints{gates}
                                                 : Ints{s.state, s.hidden};
    check_tensor(op, "weights", w, dtype, shape);
    layer.weights.push_back(compact(w));
  }
  if (batch_sizes) {
    check_cpu(op, "batch_sizes", *batch_sizes);
    check_dtype(op, "batch_sizes", *batch_sizes, ScalarType::Long);
    DLK_CHECK(batch_sizes->dim() == 1, op, ": expected batch_sizes with 1 dimension, got shape ",
              shape_string(batch_sizes->sizes()));
    layer.sizes = compact(*batch_sizes);
    s.steps = layer.sizes.size(0);
    s.sizes = static_cast<const int64_t*>(layer.sizes.const_data_ptr());
    s.offsets.push_back(0);
    for (int64_t t = 0; t < s.steps; ++t) {
      // Rows of hx without a step would have no last state.
      DLK_CHECK(t || s.sizes[t] == s.batch, op, ": expected batch_sizes that begin with ", s.batch,
                " as hx has, got ", s.sizes[t]);
      DLK_CHECK(s.sizes[t] >= 0 && (t == 0 || s.sizes[t] <= s.sizes[t - 1]), op,
                ": expected batch_sizes that do not grow, got ", s.sizes[t], " at ", t);
      s.offsets.push_back(s.offsets.back() + s.sizes[t]);
    }
    DLK_CHECK(s.offsets.back() == input.size(0), op, ": expected ", s.offsets.back(),
              " rows of input by batch_sizes, got ", input.size(0));
  } else {
    s.steps = layer.cell ? 1 : input.size(0);
    DLK_CHECK(input.size(dim - 2) == s.batch, op, ": expected a batch of ", s.batch,
              " as hx has, got input of shape ", shape_string(input.sizes()));
  }
  layer.input =
      s.inputs <= 1 || input.stride(dim - 1) == 1 ? input : torch::stable::contiguous(input);
  layer.hx = compact(hx);
  if (cx) layer.cx = compact(*cx);
  return layer;
}

template <typename S>
const S* data_of(const Tensor& tensor) {
  return static_cast<const S*>(tensor.const_data_ptr());
}
template <typename S>
S* write_to(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}
template <typename S>
const S* data_of(const Optional& tensor) {
  return tensor ? data_of<S>(*tensor) : nullptr;
}

Tensor make(const Tensor& like, ScalarType dtype, const Ints& shape) {
  return in_huge_pages(torch::stable::new_empty(like, shape, dtype));
}

// Rows of the input, and of the state before each step of direction d.
template <typename S>
std::vector<const S*> input_rows(const Layer& layer) {
  const Shape& s = layer.shape;
  std::vector<const S*> rows;
  rows.reserve(size_t(s.rows()));
  const S* const x = data_of<S>(layer.input);
  const int64_t dim = layer.input.dim();
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t b = 0; b < s.active(t); ++b)
      rows.push_back(dim == 2 ? x + (s.offset(t) + b) * layer.input.stride(0)
                              : x + t * layer.input.stride(0) + b * layer.input.stride(1));
  return rows;
}
template <typename S>
std::vector<const S*> state_rows(const Layer& layer, int64_t d, const S* output) {
  const Shape& s = layer.shape;
  std::vector<const S*> rows;
  rows.reserve(size_t(s.rows()));
  const S* const hx = data_of<S>(layer.hx);
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t b = 0; b < s.active(t); ++b) {
      const int64_t before = s.before(d, t, b);
      rows.push_back(before >= 0 ? output + (before * s.directions + d) * s.state
                                 : hx + (d * s.batch + b) * s.state);
    }
  return rows;
}

// --------------------------------------------------------------------------------------- forward

// Outputs of a layer: contiguous, cells and gates without elements where they are not saved. Of a
// cell output is h_n, and c_n the cells.
struct Outputs {
  Tensor output, h_n, c_n, gates, cells;
};

void forward(const Layer& layer, const Outputs& to) {
  const Shape& s = layer.shape;
  if (s.batch == 0) return;
  for_dtype<bf16, f16>(layer.dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    const auto written = [](const Tensor& tensor) {
      return tensor.numel() ? write_to<S>(tensor) : nullptr;
    };
    if (s.rows() == 0) {
      std::copy_n(data_of<S>(layer.hx), layer.hx.numel(), write_to<S>(to.h_n));
      if (s.mode == Mode::kLstm)
        std::copy_n(data_of<S>(layer.cx), layer.cx.numel(), write_to<S>(to.c_n));
      return;
    }
    const int64_t dim = layer.input.dim();
    lstm::Forward<S> run{s,
                         layer.template of<S>(),
                         data_of<S>(layer.input),
                         dim == 2 ? 0 : layer.input.stride(0),
                         layer.input.stride(dim - 2),
                         data_of<S>(layer.hx),
                         s.mode == Mode::kLstm ? data_of<S>(layer.cx) : nullptr,
                         write_to<S>(to.output),
                         layer.cell ? nullptr : write_to<S>(to.h_n),
                         written(to.c_n),
                         written(to.gates),
                         !layer.cell && to.cells.numel() ? write_to<T>(to.cells) : nullptr};
    run.run();
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(Tensor input, Optional batch_sizes,
                                                                Tensor hx, Optional cx,
                                                                Tensors weights, Text mode,
                                                                bool save, bool) {
  const Layer layer = make_layer(kOp, input, batch_sizes, hx, cx, weights, mode);
  const Shape& s = layer.shape;
  const Ints none{0};
  const bool is_lstm = s.mode == Mode::kLstm, keeps = save && s.kept();
  const int64_t columns = s.directions * s.state;
  const Outputs to{
      make(input, layer.dtype, layer.rows_of(columns)),
      make(input, layer.dtype, layer.state_of(s.state)),
      make(input, layer.dtype, is_lstm ? layer.state_of(s.hidden) : none),
      make(input, layer.dtype, keeps ? Ints{s.directions, s.rows(), s.kept() * s.hidden} : none),
      make(input, sums_dtype(layer.dtype),
           keeps && is_lstm ? Ints{s.directions, s.rows(), s.hidden} : none)};
  forward(layer, to);
  return {to.output, to.h_n, to.c_n, to.gates, to.cells};
}

// -------------------------------------------------------------------------------------- backward

struct Gradients {
  Tensor input, hx, cx;
  Tensors weights;
};

// Of a step, what its part in the gradients of the weights follows from: rows from `row` on.
struct Kept {
  Tensor grad_gates, beside;  // x's columns filled up to `split`, and h
  int64_t row, split;

  template <typename S>
  typename lstm::Backward<S>::Kept of() const {
    const int64_t pitch = grad_gates.stride(0), beside_pitch = beside.stride(0);
    return {write_to<S>(grad_gates) + row * pitch, write_to<S>(beside) + row * beside_pitch, pitch,
            beside_pitch, split};
  }
};

// grad_output, output and gates are contiguous; cells are of the type of sums.
Gradients backward(const Layer& layer, const Optional& grad_output, const Optional& grad_h_n,
                   const Optional& grad_c_n, const Tensor& output, const Tensor& gates,
                   const Tensor& cells, bool want_input, bool want_states, bool want_weights,
                   const Kept* kept = nullptr) {
  const Shape& s = layer.shape;
  const bool is_lstm = s.mode == Mode::kLstm;
  const Ints none{0}, input_shape = layer.rows_of(s.inputs);
  const auto empty = [&](bool wanted, const Ints& shape) {
    return make(layer.hx, layer.dtype, wanted ? shape : none);
  };
  Gradients to{empty(want_input, input_shape),
               empty(want_states, layer.state_of(s.state)),
               empty(want_states && is_lstm, layer.state_of(s.hidden)),
               {}};
  if (want_weights)
    for (const Tensor& weight : layer.weights) {
      const auto size = weight.sizes();
      to.weights.push_back(empty(true, Ints(size.begin(), size.end())));
    }
  const int64_t rows = s.rows(), width = s.width() * s.hidden, own = s.gates() * s.hidden;
  for_dtype<bf16, f16>(layer.dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    using V = Vec<T>;
    const auto zero = [](const Tensor& result) {
      std::fill_n(write_to<S>(result), result.numel(), S{});
    };
    if (rows == 0) {
      const auto pass = [&](const Optional& from, const Tensor& result) {
        if (from)
          std::copy_n(data_of<S>(*from), result.numel(), write_to<S>(result));
        else
          zero(result);
      };
      if (want_states) pass(grad_h_n, to.hx);
      if (want_states && is_lstm) pass(grad_c_n, to.cx);
      for (const Tensor& weight : to.weights) zero(weight);
      return;
    }
    const auto written = [](const Tensor& tensor) {
      return tensor.numel() ? write_to<S>(tensor) : nullptr;
    };
    // Sums are in their type; of float and double the results are where they add up.
    const int64_t each = layer.per_direction();
    constexpr bool kSame = std::is_same_v<S, T>;
    int64_t sums = 0;
    for (const Tensor& weight : to.weights) sums += kSame ? 0 : Aligned<T>::padded(weight.numel());
    const Aligned<T> memory(sums + s.directions * Aligned<T>::padded(width));
    T* free = memory.get() + s.directions * Aligned<T>::padded(width);
    std::vector<T*> places;
    for (const Tensor& weight : to.weights) {
      if constexpr (kSame)
        places.push_back(write_to<T>(weight));
      else
        places.push_back(free), free += Aligned<T>::padded(weight.numel());
    }
    // The gradient of the input by each direction after the first.
    const Tensor second = empty(want_input && s.directions == 2, input_shape);
    std::vector<typename lstm::Backward<S>::Products> products;
    for (int64_t d = 0; d < s.directions; ++d) {
      const auto place = [&](int64_t i) {
        return want_weights ? places[size_t(d * each + i)] : nullptr;
      };
      products.push_back({written(d ? second : to.input), place(0), place(1),
                          s.projected ? place(each - 1) : nullptr,
                          layer.biases ? memory.get() + d * Aligned<T>::padded(width) : nullptr,
                          want_weights || kept ? state_rows<S>(layer, d, data_of<S>(output))
                                               : std::vector<const S*>()});
    }
    lstm::Backward<S> run{s,
                          layer.template of<S>(),
                          data_of<S>(grad_output),
                          data_of<S>(grad_h_n),
                          data_of<S>(grad_c_n),
                          data_of<S>(layer.hx),
                          is_lstm ? data_of<S>(layer.cx) : nullptr,
                          data_of<S>(output),
                          s.kept() ? data_of<S>(gates) : nullptr,
                          is_lstm ? data_of<T>(cells) : nullptr,
                          written(to.hx),
                          written(to.cx),
                          want_weights || kept ? input_rows<S>(layer) : std::vector<const S*>(),
                          std::move(products),
                          want_input,
                          want_weights,
                          kept ? kept->of<S>() : typename lstm::Backward<S>::Kept{}};
    run.run();
    if (want_input && s.directions == 2) {
      S* const x = write_to<S>(to.input);
      const S* const y = data_of<S>(second);
      for_each_vector(to.input.numel(), x, [=](int64_t i, int64_t lanes) {
        return load(x + i, lanes) + load(y + i, lanes);
      });
    }
    if (!want_weights) return;
    for (int64_t d = 0; d < s.directions; ++d) {
      const auto grad = [&](int64_t i) { return to.weights[size_t(d * each + i)]; };
      if constexpr (!kSame)
        for (int64_t i = 0; i < each; ++i) {
          if (layer.biases && (i == 2 || i == 3)) continue;
          const T* const from = places[size_t(d * each + i)];
          for_each_vector(grad(i).numel(), write_to<S>(grad(i)),
                          [=](int64_t j, int64_t lanes) -> V { return load(from + j, lanes); });
        }
      if (layer.biases) {
        const T* const bias = run.products[size_t(d)].bias;
        S *const b_ih = write_to<S>(grad(2)), *const b_hh = write_to<S>(grad(3));
        for (int64_t i = 0; i < own; ++i) {
          b_ih[run.gate(i)] = narrow<S>(bias[i]);
          b_hh[i] = narrow<S>(bias[i + width - own]);
        }
      }
    }
  });
  return to;
}

void check_gradient(const Layer& layer, const char* argument, Optional& grad, const Ints& shape) {
  if (!grad) return;
  check_tensor(layer.op, argument, *grad, layer.dtype, shape);
  grad = compact(*grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensors> lstm_backward(
    Optional grad_output, Optional grad_h_n, Optional grad_c_n, Tensor input, Optional batch_sizes,
    Tensor hx, Optional cx, Tensors weights, Tensor output, Tensor gates, Tensor cells, Text mode,
    bool, bool want_input, bool want_states, bool want_weights) {
  const Layer layer = make_layer(kOp, input, batch_sizes, hx, cx, weights, mode);
  const Shape& s = layer.shape;
  const Ints shape = layer.rows_of(s.directions * s.state);
  check_gradient(layer, "grad_output", grad_output, shape);
  check_gradient(layer, "grad_h_n", grad_h_n, layer.state_of(s.state));
  check_gradient(layer, "grad_c_n", grad_c_n, layer.state_of(s.hidden));
  check_tensor(kOp, "output", output, layer.dtype, shape);
  if (s.kept())
    check_tensor(kOp, "gates", gates, layer.dtype, {s.directions, s.rows(), s.kept() * s.hidden});
  if (s.mode == Mode::kLstm)
    check_tensor(kOp, "cells", cells, sums_dtype(layer.dtype), {s.directions, s.rows(), s.hidden});
  Gradients grads = backward(layer, grad_output, grad_h_n, grad_c_n, compact(output),
                             compact(gates), compact(cells), want_input, want_states, want_weights);
  return {grads.input, grads.hx, grads.cx, std::move(grads.weights)};
}

// ------------------------------------------------------------------------------------------ cells

Layer make_cell(const Tensor& input, const Tensor& hx, const Optional& cx, const Tensor& w_ih,
                const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                const std::string& mode) {
  DLK_CHECK(b_ih.has_value() == b_hh.has_value(), kCell, ": expected both biases or none");
  Tensors weights{w_ih, w_hh};
  if (b_ih) weights.push_back(*b_ih), weights.push_back(*b_hh);
  return make_layer(kCell, input, std::nullopt, hx, cx, weights, mode);
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward(Tensor input, Tensor hx, Optional cx,
                                                     Tensor w_ih, Tensor w_hh, Optional b_ih,
                                                     Optional b_hh, Text mode, bool save, bool) {
  const Layer layer = make_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode);
  const Shape& s = layer.shape;
  const Ints none{0}, state = layer.state_of(s.hidden);
  Outputs to;
  to.output = make(input, layer.dtype, state);
  to.c_n = make(input, layer.dtype, s.mode == Mode::kLstm ? state : none);
  to.gates = make(input, layer.dtype, save && s.kept() ? layer.rows_of(s.kept() * s.hidden) : none);
  forward(layer, to);
  return {to.output, to.c_n, to.gates};
}

// What both backward passes of a cell read, checked; `c` in the type of sums.
struct Step {
  Layer layer;
  Optional grad_h, grad_c;
  Tensor h, gates, cells;

  Gradients backward(bool want_input, bool want_states, bool want_weights,
                     const Kept* kept = nullptr) const {
    return dlkernels::backward(layer, std::nullopt, grad_h, grad_c, h, gates, cells, want_input,
                               want_states, want_weights, kept);
  }
};

Step make_step(Layer layer, Optional grad_h, Optional grad_c, const Tensor& h, const Tensor& c,
               const Tensor& gates) {
  const Shape& s = layer.shape;
  const Ints state = layer.state_of(s.hidden);
  check_gradient(layer, "grad_h", grad_h, state);
  check_gradient(layer, "grad_c", grad_c, state);
  check_tensor(kCell, "h", h, layer.dtype, state);
  if (s.kept()) check_tensor(kCell, "gates", gates, layer.dtype, layer.rows_of(4 * s.hidden));
  Tensor cells = c;
  if (s.mode == Mode::kLstm) {
    check_tensor(kCell, "c", c, layer.dtype, state);
    const ScalarType dtype = sums_dtype(layer.dtype);
    cells = compact(dtype == layer.dtype ? c : torch::stable::to(c, dtype));
  }
  return {std::move(layer), grad_h, grad_c, compact(h), compact(gates), cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(
    Optional grad_h, Optional grad_c, Tensor input, Tensor hx, Optional cx, Tensor w_ih,
    Tensor w_hh, Optional b_ih, Optional b_hh, Tensor h, Tensor c, Tensor gates, Text mode, bool,
    bool want_input, bool want_states, bool want_weights) {
  const Step step = make_step(make_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode), grad_h,
                              grad_c, h, c, gates);
  Gradients grads = step.backward(want_input, want_states, want_weights);
  const auto weight = [&](size_t i) {
    return i < grads.weights.size() ? grads.weights[i] : make(input, step.layer.dtype, {0});
  };
  return {grads.input, grads.hx, grads.cx, weight(0), weight(1), weight(2), weight(3)};
}

// Rows of which the last dimension is contiguous, at least `rows` of at least `columns`.
void check_kept(const char* argument, const Tensor& tensor, ScalarType dtype, int64_t rows,
                int64_t columns) {
  check_cpu(kCell, argument, tensor);
  check_dtype(kCell, argument, tensor, dtype);
  DLK_CHECK(tensor.dim() == 2 && tensor.size(0) >= rows && tensor.size(1) >= columns, kCell,
            ": expected ", argument, " of at least ", rows, " x ", columns, ", got shape ",
            shape_string(tensor.sizes()));
  check_contiguous(kCell, argument, tensor);
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward_step(
    Optional grad_h, Optional grad_c, Tensor input, Tensor hx, Optional cx, Tensor w_ih,
    Tensor w_hh, Optional b_ih, Optional b_hh, Tensor h, Tensor c, Tensor gates, Text mode, bool,
    bool want_input, bool want_states, Tensor grad_gates, Tensor beside, int64_t row) {
  const Step step = make_step(make_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode), grad_h,
                              grad_c, h, c, gates);
  const Shape& s = step.layer.shape;
  DLK_CHECK(row >= 0, kCell, ": expected a row, got ", row);
  check_kept("grad_gates", grad_gates, step.layer.dtype, row + s.batch, s.width() * s.hidden);
  check_kept("beside", beside, step.layer.dtype, row + s.batch, s.inputs + s.state);
  const Kept kept{grad_gates, beside, row, beside.size(1) - s.state};
  Gradients grads = step.backward(want_input, want_states, false, &kept);
  return {grads.input, grads.hx, grads.cx};
}

// What all steps give to the gradients of the weights, added to `sums` or, if they are fresh, put
// there.
void lstm_cell_backward_weights(Tensor grad_gates, Tensor beside, int64_t rows, Text mode, bool,
                                bool fresh, Tensor w_ih, Tensor w_hh, Optional b_ih,
                                Optional b_hh) {
  const ScalarType dtype = grad_gates.scalar_type(), of_sums = sums_dtype(dtype);
  check_floating(kCell, "grad_gates", grad_gates);
  DLK_CHECK(w_ih.dim() == 2 && w_hh.dim() == 2, kCell, ": expected matrices, got shapes ",
            shape_string(w_ih.sizes()), " and ", shape_string(w_hh.sizes()));
  DLK_CHECK(b_ih.has_value() == b_hh.has_value(), kCell, ": expected both biases or none");
  Shape s{};
  s.mode = parse_mode(kCell, mode);
  s.inputs = w_ih.size(1), s.hidden = s.state = w_hh.size(1);
  const int64_t own = s.gates() * s.hidden, width = s.width() * s.hidden;
  const auto check_sum = [&](const char* argument, const Tensor& sum, const Ints& shape) {
    check_tensor(kCell, argument, sum, of_sums, shape);
    check_contiguous(kCell, argument, sum);
  };
  check_sum("w_ih", w_ih, {own, s.inputs});
  check_sum("w_hh", w_hh, {own, s.state});
  if (b_ih) check_sum("b_ih", *b_ih, {own}), check_sum("b_hh", *b_hh, {own});
  DLK_CHECK(rows >= 0 && rows <= gemm::kDepth, kCell, ": expected at most ", gemm::kDepth,
            " rows, got ", rows);
  check_kept("grad_gates", grad_gates, dtype, rows, width);
  check_kept("beside", beside, dtype, rows, s.inputs + s.state);
  if (fresh) in_huge_pages(w_ih), in_huge_pages(w_hh);
  if (rows == 0 && !fresh) return;
  for_dtype<bf16, f16>(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = accumulate_t<S>;
    lstm::add_weights<S>(s, rows, data_of<S>(grad_gates), grad_gates.size(1), data_of<S>(beside),
                         beside.size(1), fresh, write_to<T>(w_ih), write_to<T>(w_hh),
                         b_ih ? write_to<T>(*b_ih) : nullptr, b_hh ? write_to<T>(*b_hh) : nullptr);
  });
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&dlkernels::lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&dlkernels::lstm_backward));
  m.impl("lstm_cell_forward", TORCH_BOX(&dlkernels::lstm_cell_forward));
  m.impl("lstm_cell_backward", TORCH_BOX(&dlkernels::lstm_cell_backward));
  m.impl("lstm_cell_backward_step", TORCH_BOX(&dlkernels::lstm_cell_backward_step));
  m.impl("lstm_cell_backward_weights", TORCH_BOX(&dlkernels::lstm_cell_backward_weights));
}

"""LSTM, GRU, RNN and their cells in Triton: the twin of csrc/cuda/lstm.cu's launch a step.

The products are torch's: x·W_ih of all steps before, W_hh·h of each, the gradients of weights and
input after. What a step has beside them is one kernel, ``_step``, and its gradient ``_gradient``;
their algebra stands in ops/lstm.py. A program has a block of (row, hidden unit), as one list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.kernels.common import (
    INTERPRETED,
    activate,
    before_activation,
    check,
    check_tensor,
    launch,
    narrow,
    register_kernels,
    tanh,
    widen,
)

_OP = "lstm"
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BLOCK = 4096 if INTERPRETED else 256

# ------------------------------------------------------------------------------------------ kernels
# Sizes for which Triton would compile anew where they are 1 or divisible by 16, as it would for
# each of the rows that a step's pointers begin with, by their alignment.
_NUMBERS = ["total", "hidden", "continued", "x_pitch", "output_pitch", "grad_pitch"]


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[n for n in names if n in _NUMBERS],
        do_not_specialize_on_alignment=[n for n in names if n not in function.__annotations__],
    )


@triton.jit
def _places(total, hidden, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i // hidden, i % hidden, i < total


@triton.jit
def _get(pointer, at, mask, T: tl.constexpr):
    """As T; 0 where there is no tensor."""
    if pointer is None:
        return tl.zeros(at.shape, T)
    else:
        return widen(tl.load(pointer + at, mask=mask, other=0.0)).to(T)


@triton.jit
def _put(pointer, at, value, mask):
    if pointer is not None:
        tl.store(pointer + at, narrow(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _sum(x, at, b_ih, unit, gate: tl.constexpr, hidden, mask, T: tl.constexpr):
    """Of a gate, from one side, with its bias."""
    return _get(x, at + gate * hidden, mask, T) + _get(b_ih, gate * hidden + unit, mask, T)


@_jit
def _step(
    x, h, b_ih, b_hh, before, c, c_to, cells, output, state, gates,
    total, hidden, x_pitch, output_pitch,
    MODE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h of a step, c of an LSTM, and what is saved."""
    i, row, unit, mask = _places(total, hidden, BLOCK)
    at, to = row * x_pitch + unit, row * 4 * hidden + unit
    if MODE == "lstm":
        own = row * 4 * hidden + unit
        i_ = _sum(x, at, b_ih, unit, 0, hidden, mask, T)
        f = _sum(x, at, b_ih, unit, 1, hidden, mask, T)
        g = _sum(x, at, b_ih, unit, 2, hidden, mask, T)
        o = _sum(x, at, b_ih, unit, 3, hidden, mask, T)
        i_ = activate(i_ + _sum(h, own, b_hh, unit, 0, hidden, mask, T), "sigmoid")
        f = activate(f + _sum(h, own, b_hh, unit, 1, hidden, mask, T), "sigmoid")
        g = tanh(g + _sum(h, own, b_hh, unit, 2, hidden, mask, T))
        o = activate(o + _sum(h, own, b_hh, unit, 3, hidden, mask, T), "sigmoid")
        value = f * _get(c, i, mask, T) + i_ * g
        new = o * tanh(value)
        _put(c_to, i, value, mask)
        _put(cells, i, value, mask)
        _put(gates, to, i_, mask)
        _put(gates, to + hidden, f, mask)
        _put(gates, to + 2 * hidden, g, mask)
        _put(gates, to + 3 * hidden, o, mask)
    elif MODE == "gru":
        own = row * 3 * hidden + unit
        r = _sum(x, at, b_ih, unit, 0, hidden, mask, T)
        z = _sum(x, at, b_ih, unit, 1, hidden, mask, T)
        n = _sum(x, at, b_ih, unit, 2, hidden, mask, T)
        r = activate(r + _sum(h, own, b_hh, unit, 0, hidden, mask, T), "sigmoid")
        z = activate(z + _sum(h, own, b_hh, unit, 1, hidden, mask, T), "sigmoid")
        m = _sum(h, own, b_hh, unit, 2, hidden, mask, T)
        n = tanh(n + r * m)
        new = n + z * (_get(before, i, mask, T) - n)
        _put(gates, to, r, mask)
        _put(gates, to + hidden, z, mask)
        _put(gates, to + 2 * hidden, n, mask)
        _put(gates, to + 3 * hidden, m, mask)
    else:
        new = _sum(x, at, b_ih, unit, 0, hidden, mask, T)
        new += _sum(h, row * hidden + unit, b_hh, unit, 0, hidden, mask, T)
        if MODE == "rnn_tanh":
            new = tanh(new)
        else:
            new = activate(new, "relu")
    _put(output, row * output_pitch + unit, new, mask)
    _put(state, i, new, mask)


@_jit
def _gradient(
    grad_output, grad_state, direct, direct_to, grad_c, grad_c_to, gates, output,
    c, c_before, c_first, h_before, h_first, grad_x, grad_h,
    total, hidden, continued, output_pitch, grad_pitch,
    MODE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the gates' sums, c before, and of h before what the product leaves out."""
    i, row, unit, mask = _places(total, hidden, BLOCK)
    at, own, to = row * output_pitch + unit, row * 4 * hidden + unit, row * grad_pitch + unit
    later, first = mask & (row < continued), mask & (row >= continued)
    dh = _get(grad_output, at, mask, T) + _get(grad_state, i, mask, T)
    dh += _get(direct, i, mask, T)
    if MODE == "lstm":
        i_, f = _get(gates, own, mask, T), _get(gates, own + hidden, mask, T)
        g, o = _get(gates, own + 2 * hidden, mask, T), _get(gates, own + 3 * hidden, mask, T)
        y = tanh(_get(c, i, mask, T))
        before = _get(c_before, i, later, T) + _get(c_first, i, first, T)
        dc = _get(grad_c, i, mask, T) + dh * o * (1.0 - y * y)
        _put(grad_x, to, dc * g * i_ * (1.0 - i_), mask)
        _put(grad_x, to + hidden, dc * before * f * (1.0 - f), mask)
        _put(grad_x, to + 2 * hidden, dc * i_ * (1.0 - g * g), mask)
        _put(grad_x, to + 3 * hidden, dh * y * o * (1.0 - o), mask)
        _put(grad_c_to, i, dc * f, mask)
    elif MODE == "gru":
        r, z = _get(gates, own, mask, T), _get(gates, own + hidden, mask, T)
        n, m = _get(gates, own + 2 * hidden, mask, T), _get(gates, own + 3 * hidden, mask, T)
        before = _get(h_before, at, later, T) + _get(h_first, i, first, T)
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dr = dn * m * r * (1.0 - r)
        dz = dh * (before - n) * z * (1.0 - z)
        _put(grad_x, to, dr, mask)
        _put(grad_x, to + hidden, dz, mask)
        _put(grad_x, to + 2 * hidden, dn, mask)
        _put(grad_h, to, dr, mask)
        _put(grad_h, to + hidden, dz, mask)
        _put(grad_h, to + 2 * hidden, dn * r, mask)
        _put(direct_to, i, dh * z, mask)
    else:
        y = _get(output, at, mask, T)
        if MODE == "rnn_tanh":
            d = before_activation(dh, y, "tanh")
        else:
            d = before_activation(dh, y, "relu")
        _put(grad_x, to, d, mask)


def _run(kernel, mode, dtype, count, hidden, *arguments):
    total = count * hidden
    T = tl.float64 if dtype == torch.float64 else tl.float32
    tensors = [x for x in arguments if x is None or isinstance(x, Tensor)]
    numbers = arguments[len(tensors) :]
    grid = triton.cdiv(total, _BLOCK)
    launch(kernel, grid, *tensors, total, hidden, *numbers, MODE=mode, T=T, BLOCK=_BLOCK)


# ----------------------------------------------------------------------------------------- a layer


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_mode(mode: str, cx: Tensor | None) -> None:
    known = f"{_OP}: expected mode {', '.join(_GATES)}"
    check(mode in _GATES, f"{known}, got {mode}")
    wanted = f"{_OP}: expected cx of an lstm, and only of one"
    check((cx is not None) == (mode == "lstm"), wanted)


class _Layer:
    """The arguments of a layer, checked."""

    def __init__(self, input, batch_sizes, hx, cx, weights, mode):
        _check_mode(mode, cx)
        self.mode, self.gates, self.directions = mode, _GATES[mode], hx.shape[0]
        dimensions = 3 if batch_sizes is None else 2
        got = list(input.shape)
        wanted = f"{_OP}: expected input with {dimensions} dimensions, got shape {got}"
        check(input.dim() == dimensions, wanted)
        check(input.dtype in _DTYPES, f"{_OP}: no kernel for {input.dtype}")
        number = len(weights)
        each = number // self.directions
        wanted = f"2 to 5 weights for each of {self.directions} directions"
        check(
            number == each * self.directions and 2 <= each <= 5,
            f"{_OP}: expected {wanted}, got {number}",
        )
        self.hidden, self.size = weights[1].shape[0] // self.gates, weights[1].shape[1]
        self.batch, inputs = hx.shape[1], input.shape[-1]
        if batch_sizes is None:
            self.rows = [input.shape[1]] * input.shape[0]
        else:
            self.rows = batch_sizes.tolist()
            falls = all(a >= b for a, b in zip([self.batch, *self.rows], self.rows, strict=False))
            check(falls, f"{_OP}: expected batch_sizes that do not grow, got {self.rows}")
            count = sum(self.rows)
            wanted = f"{count} rows of input by batch_sizes"
            check(count == input.shape[0], f"{_OP}: expected {wanted}, got {input.shape[0]}")
        self.first = [0]
        for n in self.rows:
            self.first.append(self.first[-1] + n)
        self.count = self.first[-1]
        self.projects = each % 2 == 1
        check(not self.projects or mode == "lstm", f"{_OP}: only an lstm has projections")
        all_gates = self.gates * self.hidden
        shapes = [(all_gates, inputs), (all_gates, self.size if self.projects else self.hidden)]
        shapes += [(all_gates,)] * 2 if each >= 4 else []
        shapes += [(self.size, self.hidden)] if self.projects else []
        kind = input.device, input.dtype
        state = (self.directions, self.batch)
        check_tensor(_OP, "hx", hx, *kind, (*state, self.size))
        if cx is not None:
            check_tensor(_OP, "cx", cx, *kind, (*state, self.hidden))
        for at, weight in enumerate(weights):
            check_tensor(_OP, "weights", weight, *kind, shapes[at % each])
        self.input = input.reshape(self.count, inputs)
        self.shape, self.dtype = input.shape[:-1], input.dtype
        self.hx, self.cx = hx.contiguous(), None if cx is None else cx.contiguous()
        self.weights = [self._of(weights[at : at + each]) for at in range(0, number, each)]

    @staticmethod
    def _of(weights):
        """w_ih, w_hh, b_ih, b_hh, w_hr of a direction."""
        none = [None, None]
        biases = [b.contiguous() for b in weights[2:4]] if len(weights) >= 4 else none
        return *weights[:2], *biases, weights[-1] if len(weights) % 2 else None

    def all_w_ih(self):
        return torch.cat([w[0] for w in self.weights])

    def steps(self, reverse: bool, backward: bool):
        """(first row, rows, first row and rows of the step before) of each step."""
        times = range(len(self.rows))
        for t in times if reverse == backward else reversed(times):
            before = t + 1 if reverse else t - 1
            there = 0 <= before < len(self.rows)
            n = self.rows[t]
            continued = min(n, self.rows[before]) if there else 0
            if n:
                yield self.first[t], n, self.first[before] if there else 0, continued


def _forward(input, batch_sizes, hx, cx, weights, mode, save, own):
    p = _Layer(input, batch_sizes, hx, cx, weights, mode)
    is_lstm, hidden, size = mode == "lstm", p.hidden, p.size
    new, wide = input.new_empty, _wide(p.dtype)
    output = new((*p.shape, p.directions * size))
    flat = output.view(p.count, p.directions * size)
    h_n = p.hx.clone()
    c_n = p.cx.clone() if is_lstm else new(0)
    gates = new((p.directions, p.count, 4 * hidden) if save and p.gates > 1 else 0)
    cells = new((p.directions, p.count, hidden) if save and is_lstm else 0, dtype=wide)
    if not p.count:
        return output, h_n, c_n, gates, cells
    with torch.cuda.device_of(input):
        x = p.input @ p.all_w_ih().t()
        product = new(p.batch, p.gates * hidden)
        for d, (_, w_hh, b_ih, b_hh, w_hr) in enumerate(p.weights):
            h = h_n[d]
            c = c_n[d].to(wide) if is_lstm else None
            made = h if w_hr is None else new(p.batch, hidden)
            x_d = x[:, d * p.gates * hidden :]
            out = flat[:, d * size : (d + 1) * size]
            for first, n, *_ in p.steps(d == 1, False):
                torch.mm(h[:n], w_hh.t(), out=product[:n])
                _run(
                    _step, mode, p.dtype, n, hidden,
                    x_d[first:], product, b_ih, b_hh, h, c, c,
                    cells[d, first:] if save and is_lstm else None,
                    out[first:] if w_hr is None else None,
                    made,
                    gates[d, first:] if save and p.gates > 1 else None,
                    x.stride(0), flat.stride(0),
                )  # fmt: skip
                if w_hr is not None:
                    torch.mm(made[:n], w_hr.t(), out=h[:n])
                    out[first : first + n] = h[:n]
            if is_lstm:
                c_n[d] = c
    return output, h_n, c_n, gates, cells


def _states_before(p, d, output):
    """h before each step of a direction: (rows, size)."""
    before = torch.empty_like(output)
    for first, n, from_, continued in p.steps(d == 1, False):
        before[first : first + continued] = output[from_ : from_ + continued]
        before[first + continued : first + n] = p.hx[d, continued:n]
    return before


def _backward(
    grad_output, grad_h_n, grad_c_n, input, batch_sizes, hx, cx, weights, output, gates, cells,
    mode, own, want_input, want_states, want_weights,
):  # fmt: skip
    p = _Layer(input, batch_sizes, hx, cx, weights, mode)
    is_lstm, is_gru, hidden, size = mode == "lstm", mode == "gru", p.hidden, p.size
    kind, state = (input.device, p.dtype), (p.directions, p.batch)
    of_output = (*p.shape, p.directions * size)
    check_tensor(_OP, "output", output, *kind, of_output)
    if grad_output is not None:
        check_tensor(_OP, "grad_output", grad_output, *kind, of_output)
    if grad_h_n is not None:
        check_tensor(_OP, "grad_h_n", grad_h_n, *kind, (*state, size))
    if grad_c_n is not None:
        check_tensor(_OP, "grad_c_n", grad_c_n, *kind, (*state, hidden))
    if p.gates > 1:
        check_tensor(_OP, "gates", gates, *kind, (p.directions, p.count, 4 * hidden))
    if is_lstm:
        shape = (p.directions, p.count, hidden)
        check_tensor(_OP, "cells", cells, input.device, _wide(p.dtype), shape)
    new, wide = input.new_empty, _wide(p.dtype)
    grad_hx = torch.zeros_like(p.hx) if grad_h_n is None else grad_h_n.clone()
    grad_cx = new(0)
    if is_lstm:
        grad_cx = torch.zeros_like(p.cx) if grad_c_n is None else grad_c_n.clone()
    grad_x = new(p.count, p.directions * p.gates * hidden)
    grad_h = torch.empty_like(grad_x) if is_gru else grad_x
    grads, empty = [], new(0)
    gates, cells = _dense(gates, cells)
    flat = output.reshape(p.count, p.directions * size)
    upstream = None if grad_output is None else grad_output.reshape(flat.shape).contiguous()
    with torch.cuda.device_of(input):
        for d, (_, w_hh, b_ih, _, w_hr) in enumerate(p.weights):
            h, across = grad_hx[d], slice(d * size, (d + 1) * size)
            c = grad_cx[d].to(wide) if is_lstm else None
            direct = h.new_zeros(h.shape, dtype=wide) if is_gru else None
            all_gates = slice(d * p.gates * hidden, (d + 1) * p.gates * hidden)
            x_d, h_d, out = grad_x[:, all_gates], grad_h[:, all_gates], flat[:, across]
            projected = new(p.count, size) if w_hr is not None else None
            for first, n, from_, continued in p.steps(d == 1, True):
                given = None if upstream is None else upstream[first:, across]
                through = h
                if w_hr is not None:
                    some = projected[first : first + n]
                    some[:] = h[:n] if given is None else h[:n] + given[:n]
                    given, through = None, some @ w_hr
                _run(
                    _gradient, mode, p.dtype, n, hidden,
                    given, through, direct, direct, c, c,
                    gates[d, first:] if p.gates > 1 else None,
                    out[first:],
                    cells[d, first:] if is_lstm else None,
                    cells[d, from_:] if is_lstm else None,
                    p.cx[d] if is_lstm else None,
                    out[from_:], p.hx[d],
                    x_d[first:], h_d[first:],
                    continued, flat.stride(0), grad_x.stride(0),
                )  # fmt: skip
                torch.mm(h_d[first : first + n], w_hh, out=h[:n])
            if is_gru:
                h.copy_(h + direct)
            if is_lstm:
                grad_cx[d] = c
            if want_weights:
                grads += [x_d.t() @ p.input, h_d.t() @ _states_before(p, d, out)]
                if b_ih is not None:
                    grads += [x_d.sum(0), h_d.sum(0)]
                if w_hr is not None:
                    made = gates[d, :, 3 * hidden :].to(wide) * torch.tanh(cells[d])
                    grads.append(projected.t() @ made.to(p.dtype))
        grad_input = (grad_x @ p.all_w_ih()).view(input.shape) if want_input else empty
    if not want_states:
        grad_hx, grad_cx = empty, new(0)
    return grad_input, grad_hx, grad_cx, grads


# ------------------------------------------------------------------------------------------- cells


def _check_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode):
    """The batch and the hidden size."""
    _check_mode(mode, cx)
    for name, x in (("input", input), ("hx", hx)):
        wanted = f"{_OP}: expected {name} with 2 dimensions, got shape {list(x.shape)}"
        check(x.dim() == 2, wanted)
    check(input.dtype in _DTYPES, f"{_OP}: no kernel for {input.dtype}")
    check((b_ih is None) == (b_hh is None), f"{_OP}: expected both biases or none")
    (batch, inputs), hidden = input.shape, hx.shape[1]
    gates, kind = _GATES[mode] * hidden, (input.device, input.dtype)
    check_tensor(_OP, "hx", hx, *kind, (batch, hidden))
    if cx is not None:
        check_tensor(_OP, "cx", cx, *kind, (batch, hidden))
    check_tensor(_OP, "w_ih", w_ih, *kind, (gates, inputs))
    check_tensor(_OP, "w_hh", w_hh, *kind, (gates, hidden))
    if b_ih is not None:
        check_tensor(_OP, "b_ih", b_ih, *kind, (gates,))
        check_tensor(_OP, "b_hh", b_hh, *kind, (gates,))
    return batch, hidden


def _dense(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


def _cell_forward(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode, save, own):
    batch, hidden = _check_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode)
    is_lstm = mode == "lstm"
    h = input.new_empty(hx.shape)
    c = input.new_empty(hx.shape if is_lstm else 0)
    gates = input.new_empty((batch, 4 * hidden) if save and _GATES[mode] > 1 else 0)
    hx, cx, b_ih, b_hh = _dense(hx, cx, b_ih, b_hh)
    with torch.cuda.device_of(input):
        x, product = _dense(input @ w_ih.t(), hx @ w_hh.t())
        _run(
            _step, mode, input.dtype, batch, hidden,
            x, product, b_ih, b_hh, hx, cx, c if is_lstm else None, None, None, h,
            gates if gates.numel() else None, x.shape[1], hidden,
        )  # fmt: skip
    return h, c, gates


def _cell_backward(
    grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh, h, c, gates, mode, own, want_input,
    want_states, want_weights,
):  # fmt: skip
    batch, hidden = _check_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode)
    is_lstm, is_gru = mode == "lstm", mode == "gru"
    kind = input.device, input.dtype
    named = {"grad_h": grad_h, "grad_c": grad_c if is_lstm else None, "h": h}
    for name, x in (named | ({"c": c} if is_lstm else {})).items():
        if x is not None:
            check_tensor(_OP, name, x, *kind, (batch, hidden))
    if _GATES[mode] > 1:
        check_tensor(_OP, "gates", gates, *kind, (batch, 4 * hidden))
    empty = input.new_empty(0)
    of_x = input.new_empty(batch, _GATES[mode] * hidden)
    of_h = torch.empty_like(of_x) if is_gru else of_x
    grad_cx = input.new_empty(hx.shape if want_states and is_lstm else 0)
    direct = torch.empty_like(h) if is_gru else None
    dense = _dense(gates, h, c, cx, hx, grad_h, grad_c)
    gates, h, c, cx, hx, grad_h, grad_c = dense
    with torch.cuda.device_of(input):
        _run(
            _gradient, mode, input.dtype, batch, hidden,
            None, grad_h, None, direct, grad_c if is_lstm else None,
            grad_cx if grad_cx.numel() else None, gates, h, c, None, cx, None, hx,
            of_x, of_h, 0, hidden, of_x.shape[1],
        )  # fmt: skip
        grad_hx = empty
        if want_states:
            grad_hx = of_h @ w_hh if direct is None else torch.addmm(direct, of_h, w_hh)
        grads = [empty] * 4
        if want_weights:
            grads[:2] = of_x.t() @ input, of_h.t() @ hx
            if b_ih is not None:
                grads[2:] = of_x.sum(0), of_h.sum(0)
        grad_input = of_x @ w_ih if want_input else empty
    return grad_input, grad_hx, grad_cx, *grads


def register(key: str) -> None:
    """Registers the raw ops of lstm on a dispatch key: "CUDA", where no library of CUDA C++ is; in
    tests "CPU"."""
    kernels = {
        "lstm_forward": _forward,
        "lstm_backward": _backward,
        "lstm_cell_forward": _cell_forward,
        "lstm_cell_backward": _cell_backward,
    }
    register_kernels(kernels, key)

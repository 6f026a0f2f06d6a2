"""Softmax cross-entropy in Triton: the twin of csrc/cpu/cross_entropy.cpp, same ops, same algebra.

With x' = softcap(x), m = max x', lse = m + log Σ exp(x' - m) and a mass s_c on each class::

    indices        loss = (1-ε)·w_y·(lse - x'_y) + ε/C·Σ s_c·(lse - x'_c) + z·lse²,  s_c = w_c
    probabilities  loss = Σ s_c·(lse - x'_c) + z·lse²,  s_c = w_c·((1-ε)·t_c + ε/C)

The gradient is (e·scale - spread·s_c)·(1 - (x'/cap)²), at an index target (e·scale - hit)·(…)::

    e       exp(x' - m) in the forward pass, softmax exp(x' - lse) in the backward
    scale   factor·((1-ε)·w_y + ε/C·Σ w + 2·z·lse) or factor·(Σ s + 2·z·lse); over Σ e if forward
    spread  factor·ε/C or factor
    hit     factor·((1-ε)·w_y + ε/C·w_y)
    factor  upstream gradient × what the reduction divides by

A program of ``_forward`` or ``_backward`` holds a tile of rows × classes in registers. One source
serves both walks: where classes are contiguous lanes run over them, where rows are (segmentation's
NCHW) over rows; Triton reads from the pointers which. Where the classes of a row fit a tile, logits
are read once; longer rows in chunks, and for the gradient again, backwards: the last chunks are
still in the cache.

``_forward`` leaves m, Σ e and what else a row's loss is made of in a workspace, in the precision of
the computation. ``_finish``, one lane for each row, turns that into lse and loss in float64, which
is slow on most GPUs and would be repeated by every thread of a tile, and adds up losses and
weights: each program its rows, ``_total`` the programs, in order. So the same bits come every time.
Nothing waits for the GPU; a target out of range is torch's "device-side assert triggered".
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.kernels.common import (
    INTERPRETED,
    alignment,
    check,
    check_tensor,
    divide,
    exp,
    launch,
    narrow,
    register_kernels,
    tanh,
    widen,
)

_OP = "cross_entropy"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NONE, _MEAN = tl.constexpr(0), tl.constexpr(1)
_INDEX, _SMOOTH, _PROBABILITY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LANES = 1024  # rows that a program of _finish takes at a time, and _total partial sums
_STEPS = 4  # how many times _finish does
_PROGRAMS = 264  # two for each multiprocessor of an H100
_SCALED = 4096  # elements that a program of _scale takes

# ------------------------------------------------------------------------------------------ kernels
# Arguments that Triton would compile for anew where they are 1 or divisible by 16; what is known of
# the latter is ALIGN. x_outer, … are divided by it, and that of classes and inner that is
# contiguous.
_NUMBERS = ["rows", "inner", "blocks", "classes", "ignore_index", "programs", "n"]
_NUMBERS += [f"{tensor}_{of}" for tensor in "xtg" for of in ("outer", "stride")]


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[n for n in names if n in _NUMBERS])


@triton.jit
def _of_rows(pointer, o, i, outer, stride, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the first class of rows i of outer index o."""
    start = pointer + o * outer * ALIGN
    if COLUMNS:
        return start + i
    else:
        return start + i * stride * ALIGN


@triton.jit
def _of_classes(c, stride, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of classes from the first."""
    if COLUMNS:
        return c.to(tl.int64) * stride * ALIGN
    else:
        return c


@triton.jit
def _capped(x, softcap, HAS_CAP: tl.constexpr):
    """x' and u = tanh(x / cap), which the gradient needs: 1 - u² of a rounded x' / cap is off by
    more where u is near 1."""
    if HAS_CAP:
        cap = tl.full([], softcap, x.dtype)
        u = tanh(x / cap)
        return cap * u, u
    else:
        return x, x


@triton.jit
def _logits(pointers, mask, softcap, HAS_CAP: tl.constexpr):
    """x' of a tile, -inf outside, and u."""
    lowest = float("-inf")
    x, u = _capped(widen(tl.load(pointers, mask=mask, other=lowest)), softcap, HAS_CAP)
    if HAS_CAP:
        x = tl.where(mask, x, lowest)
    return x, u


@triton.jit
def _masses(
    t, t_stride, weight_ptr, c, classes, mask, kept, uniform,
    KIND: tl.constexpr, T: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """s_c of a tile, 0 outside; t points to the first probabilities of its rows."""
    if KIND == _PROBABILITY:
        pointers = t[:, None] + _of_classes(c, t_stride, ALIGN, COLUMNS)[None, :]
        s = widen(tl.load(pointers, mask=mask, other=0.0))
        s = s * tl.full([], kept, T) + tl.full([], uniform, T)
    else:
        s = tl.full(mask.shape, 1.0, T)
    if weight_ptr is not None:
        s = s * widen(tl.load(weight_ptr + c, mask=c < classes, other=0.0))[None, :]
    return tl.where(mask, s, 0.0)


@triton.jit
def _targets(target_ptr, row, exists, ignore_index, classes):
    """Index targets (-1 where there is none to read), which rows count, which targets are good."""
    y = tl.load(target_ptr + row, mask=exists, other=0).to(tl.int64)
    counts = exists & (y != ignore_index)
    good = counts & (y >= 0) & (y < classes)
    return tl.where(good, y, -1), counts, good


@triton.jit
def _target_weights(weight_ptr, y, good, T: tl.constexpr):
    """w_y; 0, and not read, where the row is ignored."""
    if weight_ptr is None:
        return good.to(T)
    else:
        return widen(tl.load(weight_ptr + y, mask=good, other=0.0)).to(T)


@triton.jit
def _all_weights(class_weight_ptr, classes, T: tl.constexpr):
    """Σ w_c."""
    if class_weight_ptr is None:
        return classes.to(T)
    else:
        return tl.load(class_weight_ptr).to(T)


@triton.jit
def _coefficients(
    factor, w, mass, counts, lse, class_weight_ptr, classes, kept, uniform, z_loss,
    KIND: tl.constexpr, HAS_Z: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(scale, before Σ e; spread; hit) of rows."""
    if KIND == _PROBABILITY:
        total, spread, hit = mass, factor, tl.zeros_like(mass)
    else:
        nll = w * tl.full([], kept, T)
        total, spread, hit = nll, tl.zeros_like(factor), factor * nll
        if KIND == _SMOOTH:
            each = tl.full([], uniform, T)
            total = nll + each * _all_weights(class_weight_ptr, classes, T)
            spread, hit = factor * each, factor * (nll + each * w)
    if HAS_Z:
        total = total + 2.0 * tl.full([], z_loss, T) * lse
    return (
        tl.where(counts, factor * total, 0.0),
        tl.where(counts, spread, 0.0),
        tl.where(counts, hit, 0.0),
    )


@triton.jit
def _write(
    pointers, mask, e, u, s, is_target, scale, spread, hit,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile."""
    if KIND == _INDEX:
        taken = tl.where(is_target, hit[:, None], 0.0)
    elif KIND == _SMOOTH:
        taken = tl.where(is_target, hit[:, None], spread[:, None] * s)
    else:
        taken = spread[:, None] * s
    v = tl.fma(e, scale[:, None], -taken)
    if HAS_CAP:
        v = v * (1.0 - u * u)
    tl.store(pointers, narrow(v, pointers.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate(
    k, m, shift, total, mass, moment, x, t, weight_ptr, exists, classes, x_stride, t_stride,
    kept, uniform, softcap,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics with those of chunk k of the classes, and that chunk's e, u, s_c and mask.

    shift is m, but 0 while every logit so far is -inf: each e is then 0.
    """
    c = k * BLOCK + tl.arange(0, BLOCK)
    mask = exists[:, None] & (c < classes)[None, :]
    offsets = _of_classes(c, x_stride, ALIGN, COLUMNS)[None, :]
    values, u = _logits(x[:, None] + offsets, mask, softcap, HAS_CAP)
    m = tl.maximum(m, tl.max(values, 1))
    last = shift
    shift = tl.where(m == float("-inf"), 0.0, m)
    values = values - shift[:, None]
    e = exp(values)
    total = total * exp(last - shift) + tl.sum(e, 1)
    if KIND == _INDEX:
        return m, shift, total, mass, moment, e, u, e, mask
    else:
        s = _masses(
            t, t_stride, weight_ptr, c, classes, mask, kept, uniform, KIND, T, ALIGN, COLUMNS
        )
        moment += mass * (last - shift) + tl.sum(tl.where(mask, s * values, 0.0), 1)
        return m, shift, total, mass + tl.sum(s, 1), moment, e, u, s, mask


@_jit
def _forward(
    x_ptr, target_ptr, weight_ptr, class_weight_ptr, gradient_ptr, statistics_ptr, total_ptr,
    rows, inner, blocks, classes, x_outer, x_stride, t_outer, t_stride, g_outer, g_stride,
    ignore_index, factor: tl.float64, kept: tl.float64, uniform: tl.float64,
    softcap: tl.float64, z_loss: tl.float64,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, HAS_Z: tl.constexpr, T: tl.constexpr,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """m, Σ e, x'_y or Σ s, Σ s·(x' - m) of rows; the gradient for an upstream gradient of 1."""
    if COLUMNS:
        inner = inner * ALIGN
    else:
        classes = classes * ALIGN
    pid = tl.program_id(0)
    o = (pid // blocks).to(tl.int64)
    i = (pid % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = i < inner
    row = o * inner + i
    x = _of_rows(x_ptr, o, i, x_outer, x_stride, ALIGN, COLUMNS)
    if KIND == _PROBABILITY:
        t = _of_rows(target_ptr, o, i, t_outer, t_stride, ALIGN, COLUMNS)
        counts = exists
        y = tl.full([ROWS], -1, tl.int32)
    else:
        t = x
        y64, counts, good = _targets(target_ptr, row, exists, ignore_index, classes)
        y = y64.to(tl.int32)

    m = tl.full([ROWS], float("-inf"), T)
    shift = tl.zeros([ROWS], T)
    total = tl.zeros([ROWS], T)
    mass = tl.zeros([ROWS], T)
    moment = tl.zeros([ROWS], T)
    if CHUNKS == 1:
        m, shift, total, mass, moment, e, u, s, mask = _accumulate(
            0, m, shift, total, mass, moment, x, t, weight_ptr, exists, classes, x_stride,
            t_stride, kept, uniform, softcap, KIND, HAS_CAP, T, COLUMNS, ALIGN, BLOCK,
        )  # fmt: skip
    else:
        for k in range(CHUNKS):
            m, shift, total, mass, moment, _, _, _, _ = _accumulate(
                k, m, shift, total, mass, moment, x, t, weight_ptr, exists, classes, x_stride,
                t_stride, kept, uniform, softcap, KIND, HAS_CAP, T, COLUMNS, ALIGN, BLOCK,
            )  # fmt: skip

    statistics = statistics_ptr + row
    rows = rows.to(tl.int64)
    tl.store(statistics, m, mask=exists)
    tl.store(statistics + rows, total, mask=exists)
    if KIND == _PROBABILITY:
        tl.store(statistics + 2 * rows, mass, mask=exists)
    else:
        at = x + _of_classes(y64, x_stride, ALIGN, COLUMNS)
        at_target, _ = _capped(widen(tl.load(at, mask=good, other=0.0)), softcap, HAS_CAP)
        tl.store(statistics + 2 * rows, at_target, mask=exists)
    if KIND != _INDEX:
        tl.store(statistics + 3 * rows, moment, mask=exists)

    if gradient_ptr is not None:
        g = _of_rows(gradient_ptr, o, i, g_outer, g_stride, ALIGN, COLUMNS)
        f = tl.full([ROWS], 1.0, T) * tl.full([], factor, T)
        if total_ptr is not None:
            f = f * tl.load(total_ptr + 1).to(T)
        if KIND == _PROBABILITY:
            w = mass
        else:
            w = _target_weights(weight_ptr, y, good, T)
        if HAS_Z:
            lse = m + tl.log(total)
        else:
            lse = m
        scale, spread, hit = _coefficients(
            f, w, mass, counts, lse, class_weight_ptr, classes, kept, uniform, z_loss,
            KIND, HAS_Z, T,
        )  # fmt: skip
        scale = divide(scale, total)
        for k in range(CHUNKS):
            c = (CHUNKS - 1 - k) * BLOCK + tl.arange(0, BLOCK)
            if CHUNKS > 1:
                mask = exists[:, None] & (c < classes)[None, :]
                offsets = _of_classes(c, x_stride, ALIGN, COLUMNS)[None, :]
                values, u = _logits(x[:, None] + offsets, mask, softcap, HAS_CAP)
                e = exp(values - shift[:, None])
                if KIND != _INDEX:
                    s = _masses(
                        t, t_stride, weight_ptr, c, classes, mask, kept, uniform,
                        KIND, T, ALIGN, COLUMNS,
                    )  # fmt: skip
                else:
                    s = e
            offsets = _of_classes(c, g_stride, ALIGN, COLUMNS)[None, :]
            _write(
                g[:, None] + offsets, mask, e, u, s, c[None, :] == y[:, None], scale, spread, hit,
                KIND, HAS_CAP,
            )  # fmt: skip


@_jit
def _backward(
    grad_loss_ptr, grad_lse_ptr, x_ptr, target_ptr, weight_ptr, class_weight_ptr, lse_ptr,
    total_ptr, gradient_ptr,
    inner, blocks, classes, x_outer, x_stride, t_outer, t_stride, g_outer, g_stride,
    ignore_index, kept: tl.float64, uniform: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, HAS_Z: tl.constexpr, T: tl.constexpr,
    REDUCTION: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The gradient from the saved log-sum-exp and any upstream gradient."""
    if COLUMNS:
        inner = inner * ALIGN
    else:
        classes = classes * ALIGN
    pid = tl.program_id(0)
    o = (pid // blocks).to(tl.int64)
    i = (pid % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = i < inner
    row = o * inner + i
    x = _of_rows(x_ptr, o, i, x_outer, x_stride, ALIGN, COLUMNS)
    g = _of_rows(gradient_ptr, o, i, g_outer, g_stride, ALIGN, COLUMNS)
    f = tl.full([ROWS], 1.0, T)
    if REDUCTION == _NONE:
        f = widen(tl.load(grad_loss_ptr + row, mask=exists, other=0.0))
    else:
        f = f * widen(tl.load(grad_loss_ptr))
    if REDUCTION == _MEAN:
        f = divide(f, tl.full([ROWS], 1.0, T) * tl.load(total_ptr).to(T))
    # The log-sum-exp as a T and the rest, so that p = exp((x' - lse) - rest) is as exact as
    # exp(x' - m) / Σ e.
    exact = tl.load(lse_ptr + row, mask=exists, other=0.0)
    lse = exact.to(T)
    rest = (exact - lse.to(tl.float64)).to(T)
    rest = tl.where(tl.abs(lse) < float("inf"), rest, 0.0)

    mass = tl.zeros([ROWS], T)
    if KIND == _PROBABILITY:
        t = _of_rows(target_ptr, o, i, t_outer, t_stride, ALIGN, COLUMNS)
        counts, w = exists, f
        y = tl.full([ROWS], -1, tl.int32)
        if CHUNKS == 1:
            c = tl.arange(0, BLOCK)
            mask = exists[:, None] & (c < classes)[None, :]
            s = _masses(
                t, t_stride, weight_ptr, c, classes, mask, kept, uniform, KIND, T, ALIGN, COLUMNS
            )
            mass = tl.sum(s, 1)
        else:
            for k in range(CHUNKS):
                c = k * BLOCK + tl.arange(0, BLOCK)
                mask = exists[:, None] & (c < classes)[None, :]
                s = _masses(
                    t, t_stride, weight_ptr, c, classes, mask, kept, uniform,
                    KIND, T, ALIGN, COLUMNS,
                )  # fmt: skip
                mass += tl.sum(s, 1)
    else:
        t = x
        y64, counts, good = _targets(target_ptr, row, exists, ignore_index, classes)
        y = y64.to(tl.int32)
        w = _target_weights(weight_ptr, y, good, T)
    scale, spread, hit = _coefficients(
        f, w, mass, counts, lse, class_weight_ptr, classes, kept, uniform, z_loss, KIND, HAS_Z, T
    )
    if grad_lse_ptr is not None:
        scale += tl.load(grad_lse_ptr + row, mask=exists, other=0.0).to(T)
    for k in range(CHUNKS):
        c = (CHUNKS - 1 - k) * BLOCK + tl.arange(0, BLOCK)
        mask = exists[:, None] & (c < classes)[None, :]
        offsets = _of_classes(c, x_stride, ALIGN, COLUMNS)[None, :]
        values, u = _logits(x[:, None] + offsets, mask, softcap, HAS_CAP)
        e = exp((values - lse[:, None]) - rest[:, None])
        if KIND == _INDEX:
            s = e
        elif CHUNKS > 1 or KIND == _SMOOTH:
            s = _masses(
                t, t_stride, weight_ptr, c, classes, mask, kept, uniform, KIND, T, ALIGN, COLUMNS
            )
        offsets = _of_classes(c, g_stride, ALIGN, COLUMNS)[None, :]
        _write(
            g[:, None] + offsets, mask, e, u, s, c[None, :] == y[:, None], scale, spread, hit,
            KIND, HAS_CAP,
        )  # fmt: skip


@triton.jit
def _store_totals(
    loss, weights, loss_ptr, total_ptr, REDUCTION: tl.constexpr, RECIPROCAL: tl.constexpr
):
    """Σ w_y, and with it 1 / Σ w_y or the reduced loss."""
    tl.store(total_ptr, weights)
    if RECIPROCAL:
        tl.store(total_ptr + 1, 1.0 / weights)
    elif REDUCTION != _NONE:
        if REDUCTION == _MEAN:
            loss = loss / weights
        tl.store(loss_ptr, narrow(loss, loss_ptr.dtype.element_ty))


@_jit
def _finish(
    statistics_ptr, target_ptr, weight_ptr, class_weight_ptr, lse_ptr, loss_ptr, total_ptr,
    partial_ptr, rows, programs, classes, ignore_index, kept: tl.float64, uniform: tl.float64,
    z_loss: tl.float64,
    KIND: tl.constexpr, HAS_Z: tl.constexpr, REDUCTION: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """From statistics to lse, loss, Σ loss and Σ w_y; without statistics Σ w_y alone."""
    pid = tl.program_id(0)
    losses = tl.zeros([LANES], tl.float64)
    weights = tl.zeros([LANES], tl.float64)
    for k in range(STEPS):
        row = (pid.to(tl.int64) * STEPS + k) * LANES + tl.arange(0, LANES)
        exists = row < rows
        if KIND == _PROBABILITY:
            counts = exists
            w = exists.to(tl.float64)
        else:
            y, counts, good = _targets(target_ptr, row, exists, ignore_index, classes)
            tl.device_assert(good | ~counts, "cross_entropy: a target is out of bounds")
            w = _target_weights(weight_ptr, y, good, tl.float64)
        weights += w
        if statistics_ptr is not None:
            statistics = statistics_ptr + row
            m = tl.load(statistics, mask=exists, other=0.0).to(tl.float64)
            total = tl.load(statistics + rows, mask=exists, other=1.0).to(tl.float64)
            third = tl.load(statistics + 2 * rows.to(tl.int64), mask=exists, other=0.0)
            excess = tl.log(total)
            # A row of -inf has log-sum-exp -inf, as torch.logsumexp, and a loss of NaN, as stock.
            lse = tl.where(m == float("-inf"), m, m + excess)
            tl.store(lse_ptr + row, lse, mask=exists)
            if KIND == _INDEX:
                loss = w * (lse - third.to(tl.float64))
            else:
                moment = tl.load(statistics + 3 * rows.to(tl.int64), mask=exists, other=0.0)
                if KIND == _SMOOTH:
                    loss = kept * w * (lse - third.to(tl.float64))
                    all_weights = _all_weights(class_weight_ptr, classes, tl.float64)
                    loss += uniform * (all_weights * excess - moment.to(tl.float64))
                else:
                    loss = third.to(tl.float64) * excess - moment.to(tl.float64)
            if HAS_Z:
                loss += z_loss * lse * lse
            loss = tl.where(counts, loss, 0.0)
            losses += loss
            if REDUCTION == _NONE:
                stored = narrow(loss, loss_ptr.dtype.element_ty)
                tl.store(loss_ptr + row, stored, mask=exists)
    if partial_ptr is None:
        RECIPROCAL: tl.constexpr = statistics_ptr is None
        _store_totals(
            tl.sum(losses, 0), tl.sum(weights, 0), loss_ptr, total_ptr, REDUCTION, RECIPROCAL
        )
    else:
        tl.store(partial_ptr + pid, tl.sum(losses, 0))
        tl.store(partial_ptr + programs + pid, tl.sum(weights, 0))


@_jit
def _total(
    partial_ptr, loss_ptr, total_ptr, programs,
    REDUCTION: tl.constexpr, RECIPROCAL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The partial sums of _finish, in order."""
    losses = tl.zeros([LANES], tl.float64)
    weights = tl.zeros([LANES], tl.float64)
    start = 0
    while start < programs:
        k = start + tl.arange(0, LANES)
        losses += tl.load(partial_ptr + k, mask=k < programs, other=0.0)
        weights += tl.load(partial_ptr + programs + k, mask=k < programs, other=0.0)
        start += LANES
    _store_totals(tl.sum(losses, 0), tl.sum(weights, 0), loss_ptr, total_ptr, REDUCTION, RECIPROCAL)


@_jit
def _scale(gradient_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """gradient *= factor; nothing is touched where that is 1."""
    factor = widen(tl.load(factor_ptr))
    if factor != 1.0:
        k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = widen(tl.load(gradient_ptr + k, mask=k < n, other=0.0)) * factor
        tl.store(gradient_ptr + k, narrow(value, gradient_ptr.dtype.element_ty), mask=k < n)


# ----------------------------------------------------------------------------------------- layouts


class _Layout(NamedTuple):
    """A tensor of logits as outer × inner rows, of which either the classes or the inner are
    contiguous; stride is that of the other."""

    outer: int
    inner: int
    outer_stride: int
    stride: int
    columns: bool


def _layout_of(x: Tensor) -> _Layout | None:
    if x.numel() == 0:  # strides of no rows may be any
        return _Layout(1, 0, 0, 1, False)
    size, stride = list(x.shape), list(x.stride())
    if len(size) == 1:
        size, stride = [1, *size], [0, *stride]
    (outer, classes), (outer_stride, class_stride) = size[:2], stride[:2]
    # The dimensions after the classes as one: each stride is the next one's times its size.
    inner, inner_stride = 1, 0
    for n, step in zip(size[:1:-1], stride[:1:-1], strict=True):
        if n == 1:
            continue
        if inner == 1:
            inner_stride = step
        elif step != inner_stride * inner:
            return None
        inner *= n
    contiguous = class_stride == 1 or classes == 1
    if inner == 1 and not contiguous:  # a transposed matrix: its rows are neighbours
        outer, inner, outer_stride, inner_stride = 1, outer, 0, outer_stride
    if outer == 1:
        outer_stride = 0
    if contiguous:
        return _Layout(outer, inner, outer_stride, inner_stride, False)
    if inner > 1 and inner_stride == 1:
        return _Layout(outer, inner, outer_stride, class_stride, True)
    return None


def _same_walk(layouts: list[_Layout | None]) -> bool:
    return None not in layouts and len({(*layout[:2], layout.columns) for layout in layouts}) == 1


def _merged(layouts: list[_Layout]) -> list[_Layout]:
    """Rows whose outer and inner index are one in every tensor: so many inner."""
    if layouts[0].columns:
        return layouts
    if layouts[0].inner == 1:
        return [_Layout(1, n, 0, step, False) for n, _, step, _, _ in layouts]
    if any(layout.outer_stride != layout.inner * layout.stride for layout in layouts):
        return layouts
    return [_Layout(1, outer * inner, 0, step, False) for outer, inner, _, step, _ in layouts]


def _tile(
    classes: int, outer: int, inner: int, columns: bool, itemsize: int, arrays: int
) -> tuple[int, int, int]:
    """(rows, classes, warps) of a tile, of which a program holds so many arrays in registers.

    At least 4096 elements, while that makes programs enough. Columns are read in lines of 128
    bytes. Rows of more classes than fit are taken in chunks.
    """
    if itemsize == 8:
        most, of_thread = 4096, 16
    else:
        most, of_thread = (16384, 32) if arrays == 1 else (8192, 16)
    block = triton.next_power_of_2(classes)
    whole = triton.next_power_of_2(max(inner, 1))
    if INTERPRETED:  # few, large programs; chunks for the longer rows of the tests
        block = min(block, 2048)
        return min(whole, 2**17 // block), block, 1
    line = min(128 // itemsize, whole) if columns else 1
    if block * line > most:
        block = 4096 // line
    rows = max(line, min(4096 // block, whole))
    while rows > line and rows * block > 1024 and outer * triton.cdiv(inner, rows) < _PROGRAMS:
        rows //= 2
    elements = rows * block
    return rows, block, max(elements // (of_thread * 32), min(elements // 256, 4), 1)


class _Problem:
    """What the kernels of a call share. Where no walk takes a tensor as it lies, or they differ in
    walk, contiguous copies stand in for them. The gradient is laid out like the input."""

    def __init__(self, input, target, weight, options, with_gradient):
        _, self.ignore_index, smoothing, softcap, self.z_loss = options
        self.classes = input.shape[1 if input.dim() > 1 else 0]
        probability = target.dtype == input.dtype
        self.kind = _PROBABILITY if probability else _SMOOTH if smoothing > 0 else _INDEX
        self.gradient = self.written = torch.empty_like(input) if with_gradient else None
        tensors = [input, target if probability else input, self.gradient]
        layouts = [_layout_of(input if tensor is None else tensor) for tensor in tensors]
        if not _same_walk(layouts):
            input = input.contiguous()
            target = target.contiguous()
            if with_gradient and not self.gradient.is_contiguous():
                self.written = torch.empty_like(input)
            layouts = [_layout_of(input)] * 3
        layouts = _merged(layouts)
        self.input = input
        self.target = target if probability else target.contiguous()
        self.weight = None if weight is None else weight.contiguous()
        self.class_weight = None
        if weight is not None and self.kind == _SMOOTH:
            self.class_weight = weight.sum(dtype=torch.float64)
        self.shares = (1.0 - smoothing, smoothing / self.classes)  # of the target, of each class
        self.softcap = softcap

        outer, inner, _, _, columns = layouts[0]
        self.rows = outer * inner
        arrays = 1 + (softcap > 0) + (probability or self.class_weight is not None)
        rows, block, self.warps = _tile(
            self.classes, outer, inner, columns, input.element_size(), arrays
        )
        blocks = triton.cdiv(inner, rows)
        self.grid = outer * blocks
        strides = [n for layout in layouts for n in layout[2:4]]
        align = alignment(inner if columns else self.classes, *strides)
        sizes = [inner, blocks, self.classes]
        sizes[0 if columns else 2] //= align
        self.geometry = (*sizes, *(n // align for n in strides))
        self.constants = {
            "KIND": self.kind.value,
            "HAS_CAP": softcap > 0,
            "HAS_Z": self.z_loss > 0,
            "T": tl.float64 if input.dtype == torch.float64 else tl.float32,
            "COLUMNS": columns,
            "ALIGN": align,
            "ROWS": rows,
            "BLOCK": block,
            "CHUNKS": triton.cdiv(self.classes, block),
        }

    def finish(self, reduction, total, statistics=None, lse=None, loss=None):
        """Σ w_y into ``total``; from statistics lse and loss, or the total's reciprocal too."""
        steps = min(max(triton.cdiv(self.rows, _LANES), 1), _STEPS)
        programs = max(triton.cdiv(self.rows, _LANES * steps), 1)
        partial = total.new_empty(2 * programs) if programs > 1 else None
        launch(
            _finish, programs, statistics, self.target, self.weight, self.class_weight, lse, loss,
            total, partial, self.rows, programs, self.classes, self.ignore_index, *self.shares,
            self.z_loss, KIND=self.kind.value, HAS_Z=self.z_loss > 0, REDUCTION=reduction,
            STEPS=steps, LANES=_LANES, warps=8, asserts=True,
        )  # fmt: skip
        if partial is not None:
            launch(
                _total, 1, partial, loss, total, programs,
                REDUCTION=reduction, RECIPROCAL=statistics is None, LANES=_LANES, warps=8,
            )  # fmt: skip

    def finished_gradient(self):
        if self.written is not self.gradient:
            self.gradient.copy_(self.written)
        return self.gradient


# --------------------------------------------------------------------------------------- raw ops


def _row_shape(input: Tensor) -> list[int]:
    return [size for d, size in enumerate(input.shape) if d != (1 if input.dim() > 1 else 0)]


def _check_floating(name, tensor):
    wanted = f"{name} of dtype float32, float64, bfloat16 or float16, got {tensor.dtype}"
    check(tensor.dtype in _DTYPES, f"{_OP}: expected {wanted}")


def _check_arguments(input, target, weight, options):
    """Every argument is what the kernels take."""
    reduction, ignore_index, smoothing, softcap, _ = options
    device, dtype = input.device, input.dtype
    _check_floating("input", input)
    check(input.dim() >= 1, f"{_OP}: expected input with at least 1 dimension, got a scalar")
    shape = list(input.shape)
    classes = shape[1 if input.dim() > 1 else 0]
    check(classes >= 1, f"{_OP}: expected at least one class, got input of shape {shape}")
    check(0 <= reduction <= 2, f"{_OP}: expected reduction 0, 1 or 2, got {reduction}")
    between = f"{_OP}: expected label_smoothing between 0 and 1, got {smoothing:g}"
    check(0 <= smoothing <= 1, between)
    check(softcap >= 0, f"{_OP}: expected softcap of at least 0, got {softcap:g}")
    if weight is not None:
        check_tensor(_OP, "weight", weight, device, dtype, [classes])
    if target.dtype == dtype:
        check_tensor(_OP, "target", target, device, shape=shape)
        return
    wanted = f"int64 or uint8, or of the input's dtype, got {target.dtype}"
    check(target.dtype in (torch.int64, torch.uint8), f"{_OP}: expected target of dtype {wanted}")
    check_tensor(_OP, "target", target, device, shape=_row_shape(input))
    if INTERPRETED:
        outside = (target != ignore_index) & ((target < 0) | (target >= classes))
        if outside.any():
            raise IndexError(f"Target {target[outside][0].item()} is out of bounds.")


def _run_forward(input, target, weight, options, with_gradient):
    _check_arguments(input, target, weight, options)
    reduction = options[0]
    shape = _row_shape(input)
    loss = input.new_empty(shape if reduction == 0 else ())
    lse = input.new_empty(shape, dtype=torch.float64)
    total = input.new_empty((), dtype=torch.float64)
    with torch.cuda.device_of(input):
        p = _Problem(input, target, weight, options, with_gradient)
        factor, divisor = 1.0, None
        if with_gradient and reduction == _MEAN.value:
            if p.kind == _PROBABILITY:
                factor = 1.0 / max(p.rows, 1)
            else:
                divisor = input.new_empty(2, dtype=torch.float64)
                p.finish(reduction, divisor)
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        statistics = input.new_empty((3 if p.kind == _INDEX else 4, p.rows), dtype=wide)
        launch(
            _forward, p.grid, p.input, p.target, p.weight, p.class_weight, p.written, statistics,
            divisor, p.rows, *p.geometry, p.ignore_index, factor, *p.shares, p.softcap, p.z_loss,
            warps=p.warps, **p.constants,
        )  # fmt: skip
        p.finish(reduction, total, statistics, lse, loss)
        return loss, lse, total, p.finished_gradient() if with_gradient else None


def _cross_entropy_forward(input, target, weight, *options):
    return _run_forward(input, target, weight, options, False)[:3]


def _cross_entropy_forward_backward(input, target, weight, *options):
    wanted = "a gradient made in the forward pass needs reduction mean or sum, got none"
    check(options[0] != 0, f"{_OP}: {wanted}")
    return _run_forward(input, target, weight, options, True)


def _cross_entropy_backward(
    grad_loss, grad_lse, input, target, weight, lse, total_weight, *options
):
    _check_arguments(input, target, weight, options)
    reduction = options[0]
    shape = _row_shape(input)
    for name, tensor, dtype, size in (
        ("grad_loss", grad_loss, input.dtype, shape if reduction == 0 else []),
        ("lse", lse, torch.float64, shape),
        ("total_weight", total_weight, torch.float64, []),
        ("grad_lse", grad_lse, torch.float64, shape),
    ):
        if tensor is not None:
            check_tensor(_OP, name, tensor, input.device, dtype, size)
            strides = list(tensor.stride())
            message = f"{_OP}: expected a contiguous {name}, got strides {strides}"
            check(tensor.is_contiguous(), message)
    with torch.cuda.device_of(input):
        p = _Problem(input, target, weight, options, True)
        launch(
            _backward, p.grid, grad_loss, grad_lse, p.input, p.target, p.weight, p.class_weight,
            lse, total_weight, p.written, *p.geometry, p.ignore_index, *p.shares, p.softcap,
            p.z_loss, REDUCTION=reduction, warps=p.warps, **p.constants,
        )  # fmt: skip
        return p.finished_gradient()


def _cross_entropy_scale_(gradient, grad_loss):
    _check_floating("gradient", gradient)
    check_tensor(_OP, "grad_loss", grad_loss, gradient.device, gradient.dtype, [])
    n = gradient.numel()
    if n == 0:
        return
    sizes, strides = gradient.shape, list(gradient.stride())
    extent = 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
    check(extent == n, f"{_OP}: expected a dense gradient, got strides {strides}")
    with torch.cuda.device_of(gradient):
        launch(_scale, triton.cdiv(n, _SCALED), gradient, grad_loss, n, BLOCK=_SCALED, warps=8)


def register(key: str) -> None:
    """Registers the raw ops of cross_entropy on a dispatch key: "CUDA", where no library of CUDA
    C++ is; in tests "CPU"."""
    kernels = {
        "cross_entropy": _cross_entropy_forward,
        "cross_entropy_forward": _cross_entropy_forward,
        "cross_entropy_forward_backward": _cross_entropy_forward_backward,
        "cross_entropy_backward": _cross_entropy_backward,
        "cross_entropy_scale_": _cross_entropy_scale_,
    }
    register_kernels(kernels, key)

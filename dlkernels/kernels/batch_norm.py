"""Batch norm in Triton: the twin of csrc/cuda/batch_norm.cu, same ops, same algebra.

With g = dL/dy·f'(y), f' from y, or from its sign, which x tells where there is no residual, and M
values of a channel::

    y = f((x - mean)·rstd·weight + bias + residual)
    dx = weight·rstd·(g - Σg/M - (x - mean)·rstd²·Σg·(x - mean)/M),  dresidual = g

A program of ``_sums`` holds a tile of pixels × channels where channels are contiguous, of images ×
pixels of one channel where pixels are, and goes on to the next: up to 8 positions are added in
float32, all else in float64. ``_statistics`` and ``_gradients`` add the programs' sums in order and
make the results of a channel; ``_apply`` and ``_gradient``, a tile a program, write y and dx. They
begin with the last tiles, which are still in the cache. So the same bits come every time.

Statistics are sums of x - k, k being the median of three values of the channel: no large mean, and
no single outlier, is subtracted after the fact.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.kernels.common import (
    INTERPRETED,
    activate,
    alignment,
    before_activation,
    check,
    check_activation,
    check_tensor,
    launch,
    narrow,
    register_kernels,
    trips,
    widen,
)

_OP = "batch_norm"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STEPS = 8  # most tiles of a program of _sums
if INTERPRETED:  # few, large programs; several tiles of one all the same
    _TILE, _ACROSS, _PROGRAMS, _LANES, _WIDTH = 2**13, (1024, 1024), 4, 4, 1024
else:
    _TILE = 4096  # elements of one
    _ACROSS = 128, 1024  # most channels, or pixels, of a row of it
    _PROGRAMS = 1056  # wanted: of fewer each has one tile
    _LANES, _WIDTH = 64, 4  # programs and channels that one of _statistics adds at a time

# ------------------------------------------------------------------------------------------ kernels
# Arguments that Triton would compile for anew where they are 1 or divisible by 16; what is known of
# the latter is ALIGN, by which columns, row_step and channel_step are divided.
_NUMBERS = ["rows", "columns", "row_step", "channel_step", "channels", "groups", "tiles", "steps"]
_NUMBERS += ["probe_1", "probe_2", "probe_step", "chunks", "trips_", "count", "eps", "momentum"]


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[n for n in names if n in _NUMBERS])


@triton.jit
def _double(bits):
    """A float64 from its bits: Triton takes a float of Python's for a float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _tile(
    t, group, rows, columns, row_step, channel_step,
    LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of tile t of a group: a block of channels, or one channel."""
    i, j = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    columns = columns * ALIGN
    if LAST:
        row = t.to(tl.int64) * ROWS + i
        column = group * BLOCK + j
        start = row * row_step * ALIGN
    else:
        across = tl.cdiv(columns, BLOCK)
        row = (t // across).to(tl.int64) * ROWS + i
        column = t % across * BLOCK + j
        start = (row * row_step + group.to(tl.int64) * channel_step) * ALIGN
    return start[:, None] + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _channels(group, channels, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of a tile, (BLOCK) or one in (1), and which there are."""
    c = group * BLOCK + tl.arange(0, BLOCK) if LAST else group + tl.arange(0, 1)
    return c, c < channels


@triton.jit
def _per_channel(pointer, c, mask, T: tl.constexpr, other: tl.constexpr):
    """A number of each channel as T; ``other`` where there is no tensor."""
    if pointer is None:
        return tl.full(c.shape, other, T)
    else:
        return widen(tl.load(pointer + c, mask=mask, other=other)).to(T)


@triton.jit
def _center(x, c, mask, probe_1, probe_2, probe_step):
    """k: the median of three of a channel's values."""
    at = x + c.to(tl.int64) * probe_step
    p = widen(tl.load(at, mask=mask, other=0.0))
    q = widen(tl.load(at + probe_1, mask=mask, other=0.0))
    r = widen(tl.load(at + probe_2, mask=mask, other=0.0))
    low, high = tl.minimum(p, q), tl.maximum(p, q)
    return tl.maximum(low, tl.minimum(high, r))


@triton.jit
def _rstd(var, eps, T: tl.constexpr):
    """Of the variance as it is kept."""
    return (1.0 / tl.sqrt(var.to(tl.float64) + _double(eps))).to(T)


@triton.jit
def _affine(value, scale, offset):
    """value·scale + offset, rounded once in both directions."""
    scale = tl.broadcast_to(scale[None, :], value.shape)
    return tl.fma(value, scale, tl.broadcast_to(offset[None, :], value.shape))


@triton.jit
def _derivative(g, output, at, mask, value, scale, offset, S: tl.constexpr, ACT: tl.constexpr):
    """g·f', f' from the output where there is one, else from what rounded to it; ``value`` is
    x - mean."""
    if ACT == "none":
        return g
    elif output is None:
        return before_activation(g, widen(narrow(_affine(value, scale, offset), S)), ACT)
    else:
        return before_activation(g, widen(tl.load(output + at, mask=mask, other=0.0)), ACT)


@_jit
def _sums(
    x, grad, output, weight, shift, mean, var, sums,
    rows, columns, row_step, channel_step, channels, groups, tiles, steps,
    probe_1, probe_2, probe_step, eps,
    GRADIENT: tl.constexpr, ACTIVATION: tl.constexpr, T: tl.constexpr,
    LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a piece of each channel Σ(x - k) and Σ(x - k)², or Σg and Σg·(x - mean)."""
    group, chunk = tl.program_id(0) % groups, tl.program_id(0) // groups
    c, exists = _channels(group, channels, LAST, BLOCK)
    if GRADIENT:
        center = _per_channel(mean, c, exists, T, 0.0)
        scale = _rstd(_per_channel(var, c, exists, T, 1.0), eps, T) * _per_channel(
            weight, c, exists, T, 1.0
        )
        offset = _per_channel(shift, c, exists, T, 0.0)
    else:
        center = _center(x, c, exists, probe_1, probe_2, probe_step)
    a = tl.zeros([ROWS, BLOCK], T)
    b = tl.zeros([ROWS, BLOCK], T)
    for step in range(trips(steps)):
        at, mask = _tile(
            chunk * steps + step, group, rows, columns, row_step, channel_step,
            LAST, ALIGN, ROWS, BLOCK,
        )  # fmt: skip
        if x is None:
            value = tl.zeros([ROWS, BLOCK], T)
        else:
            value = widen(tl.load(x + at, mask=mask, other=0.0)) - center[None, :]
        if GRADIENT:
            g = widen(tl.load(grad + at, mask=mask, other=0.0))
            g = _derivative(
                g, output, at, mask, value, scale, offset, grad.dtype.element_ty, ACTIVATION
            )
            a += g
            b += tl.where(mask, g * value, 0.0)
        else:
            value = tl.where(mask, value, 0.0)
            a += value
            b += value * value
    first, second = tl.sum(a.to(tl.float64), 0), tl.sum(b.to(tl.float64), 0)
    if not LAST:
        first = tl.sum(first, 0) + tl.zeros([1], tl.float64)
        second = tl.sum(second, 0) + tl.zeros([1], tl.float64)
    to = sums + chunk.to(tl.int64) * 2 * channels + c
    tl.store(to, first, mask=exists)
    tl.store(to + channels, second, mask=exists)


@triton.jit
def _add_up(sums, channels, chunks, trips_, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of this program, which there are, and their two sums."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    a = tl.zeros([LANES, WIDTH], tl.float64)
    b = tl.zeros([LANES, WIDTH], tl.float64)
    for trip in range(trips(trips_)):
        k = trip * LANES + tl.arange(0, LANES)
        mask = (k < chunks)[:, None] & (c < channels)[None, :]
        at = sums + k.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        a += tl.load(at, mask=mask, other=0.0)
        b += tl.load(at + channels, mask=mask, other=0.0)
    return c, c < channels, tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _update(running, c, mask, value, momentum, T: tl.constexpr):
    if running is not None:
        old = widen(tl.load(running + c, mask=mask, other=0.0)).to(tl.float64)
        value = (1.0 - momentum) * old + momentum * value
        tl.store(running + c, narrow(value.to(T), running.dtype.element_ty), mask=mask)


@_jit
def _statistics(
    sums, x, mean, var, shift, weight, bias, running_mean, running_var,
    channels, chunks, trips_, count, eps, momentum, probe_1, probe_2, probe_step,
    T: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """mean, var, shift and the running statistics of a batch."""
    c, mask, a, b = _add_up(sums, channels, chunks, trips_, LANES, WIDTH)
    n = count.to(tl.float64)
    offset = a / n
    value = _center(x, c, mask, probe_1, probe_2, probe_step).to(tl.float64) + offset
    spread = (b - a * offset) / n
    spread = tl.where(spread < 0.0, 0.0, spread)
    tl.store(mean + c, value.to(T), mask=mask)
    tl.store(var + c, spread.to(T), mask=mask)
    if shift is not None:
        scale = _rstd(spread.to(T), eps, T) * _per_channel(weight, c, mask, T, 1.0)
        lost = (value.to(T).to(tl.float64) - value) * scale.to(tl.float64)
        lost += _per_channel(bias, c, mask, T, 0.0).to(tl.float64)
        tl.store(shift + c, lost.to(T), mask=mask)
    _update(running_mean, c, mask, value, _double(momentum), T)
    _update(running_var, c, mask, spread * n / (n - 1.0), _double(momentum), T)


@_jit
def _gradients(
    sums, var, sum_g, sum_g_xhat, mean_g, mean_g_xhat, channels, chunks, trips_, count, eps,
    T: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Σg and Σg·x̂, and their means, of those that are wanted."""
    c, mask, a, b = _add_up(sums, channels, chunks, trips_, LANES, WIDTH)
    b *= _rstd(_per_channel(var, c, mask, T, 1.0), eps, T).to(tl.float64)
    n = count.to(tl.float64)
    if sum_g is not None:
        tl.store(sum_g + c, a.to(T), mask=mask)
    if sum_g_xhat is not None:
        tl.store(sum_g_xhat + c, b.to(T), mask=mask)
    if mean_g is not None:
        tl.store(mean_g + c, (a / n).to(T), mask=mask)
        tl.store(mean_g_xhat + c, (b / n).to(T), mask=mask)


@_jit
def _apply(
    x, residual, y, weight, bias, mean, var,
    rows, columns, row_step, channel_step, channels, groups, tiles, eps,
    ACTIVATION: tl.constexpr, T: tl.constexpr,
    LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of a tile."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    group, t = pid % groups, pid // groups
    c, exists = _channels(group, channels, LAST, BLOCK)
    scale = _rstd(_per_channel(var, c, exists, T, 1.0), eps, T) * _per_channel(
        weight, c, exists, T, 1.0
    )
    center = _per_channel(mean, c, exists, T, 0.0)
    offset = _per_channel(bias, c, exists, T, 0.0)
    at, mask = _tile(t, group, rows, columns, row_step, channel_step, LAST, ALIGN, ROWS, BLOCK)
    value = widen(tl.load(x + at, mask=mask, other=0.0)) - center[None, :]
    value = _affine(value, scale, offset)
    if residual is not None:
        value += widen(tl.load(residual + at, mask=mask, other=0.0))
    tl.store(y + at, narrow(activate(value, ACTIVATION), y.dtype.element_ty), mask=mask)


@_jit
def _gradient(
    grad, x, output, dx, dresidual, weight, shift, mean, var, mean_g, mean_g_xhat,
    rows, columns, row_step, channel_step, channels, groups, tiles, eps,
    ACTIVATION: tl.constexpr, T: tl.constexpr,
    LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a tile, and the residual's gradient; without means of g dx of frozen statistics."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    group, t = pid % groups, pid // groups
    at, mask = _tile(t, group, rows, columns, row_step, channel_step, LAST, ALIGN, ROWS, BLOCK)
    c, exists = _channels(group, channels, LAST, BLOCK)
    spread = _rstd(_per_channel(var, c, exists, T, 1.0), eps, T)
    scale = spread * _per_channel(weight, c, exists, T, 1.0)
    g = widen(tl.load(grad + at, mask=mask, other=0.0))
    if x is None:
        value = g
    else:
        center = _per_channel(mean, c, exists, T, 0.0)
        value = widen(tl.load(x + at, mask=mask, other=0.0)) - center[None, :]
    offset = _per_channel(shift, c, exists, T, 0.0)
    g = _derivative(g, output, at, mask, value, scale, offset, grad.dtype.element_ty, ACTIVATION)
    if dresidual is not None:
        tl.store(dresidual + at, narrow(g, dresidual.dtype.element_ty), mask=mask)
    if dx is not None:
        g *= scale[None, :]
        if mean_g is not None:
            slope = -scale * spread * _per_channel(mean_g_xhat, c, exists, T, 0.0)
            constant = -scale * _per_channel(mean_g, c, exists, T, 0.0)
            g += value * slope[None, :] + constant[None, :]
        tl.store(dx + at, narrow(g, dx.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------ layouts


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


class _Problem:
    """How a tensor is cut into tiles; the tensors of the call lie in its memory format."""

    def __init__(self, input: Tensor):
        self.input = input
        images, self.channels = input.shape[:2]
        self.count = input.numel() // self.channels
        plane = self.count // images
        self.format = self._format(input)
        last = plane == 1 or (self.channels > 1 and self.format is not torch.contiguous_format)
        if last:
            rows, columns, row_step, channel_step = self.count, self.channels, self.channels, 1
            align = alignment(row_step)
        else:
            rows, columns, row_step = images, plane, self.channels * plane
            channel_step = plane
            align = alignment(plane)
        block = min(triton.next_power_of_2(columns), _ACROSS[0 if last else 1])
        height = min(triton.next_power_of_2(rows), _TILE // block)
        self.groups = triton.cdiv(columns, block) if last else self.channels
        self.tiles = triton.cdiv(rows, height) * (1 if last else triton.cdiv(columns, block))
        self.steps = min(max(self.groups * self.tiles // _PROGRAMS, 1), _STEPS)
        self.chunks = triton.cdiv(self.tiles, self.steps)
        steps = (row_step // align, channel_step if last else channel_step // align)
        self.geometry = (rows, columns // align, *steps, self.channels, self.groups, self.tiles)
        middle, end = (images // 2, plane // 2), (images - 1, plane - 1)
        by_image, by_pixel = self.count // images * self.channels, self.channels if last else 1
        self.probes = (
            *(n * by_image + i * by_pixel for n, i in (middle, end)),
            1 if last else plane,
        )
        self.wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.T = tl.float64 if input.dtype == torch.float64 else tl.float32
        self.constants = {"T": self.T, "LAST": last, "ALIGN": align}
        self.constants |= {"ROWS": height, "BLOCK": block}
        self.warps = 8 if height * block >= 2048 else 4

    @staticmethod
    def _format(x: Tensor) -> torch.memory_format:
        """What torch's C++ suggests, of images: where sizes of 1 leave it open, contiguous."""
        order = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}.get(x.dim())
        if order is None or x.stride(1) == 0:
            return torch.contiguous_format
        least = 0
        for d in order:
            size, stride = x.shape[d], x.stride(d)
            if size == 0 or stride < least or (d == 0 and least == x.stride(1)):
                return torch.contiguous_format
            least = stride * size
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d

    def laid(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous(memory_format=self.format)

    def made(self) -> Tensor:
        x = self.input
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=self.format)

    def of_channels(self, wanted: bool = True) -> Tensor:
        return self.input.new_empty(self.channels if wanted else 0, dtype=self.wide)

    def sum_up(
        self, x, grad=None, output=None, weight=None, shift=None, mean=None, var=None, eps=0.0,
        activation="none",
    ) -> Tensor:  # fmt: skip
        """The programs' sums."""
        sums = self.input.new_empty((self.chunks, 2, self.channels), dtype=torch.float64)
        launch(
            _sums, self.groups * self.chunks, x, grad, output, weight, shift, mean, var, sums,
            *self.geometry, self.steps, *self.probes, _bits(eps), GRADIENT=grad is not None,
            ACTIVATION=activation, warps=self.warps, **self.constants,
        )  # fmt: skip
        return sums

    def add_up(self, kernel, sums, *arguments):
        """Launches _statistics or _gradients; ``arguments`` are around the numbers of the sums."""
        before, after = arguments
        numbers = (self.channels, self.chunks, triton.cdiv(self.chunks, _LANES), self.count)
        launch(
            kernel, triton.cdiv(self.channels, _WIDTH), sums, *before, *numbers, *after,
            T=self.T, LANES=_LANES, WIDTH=_WIDTH, warps=2,
        )  # fmt: skip

    def statistics(self, x, shift=None, affine=(None, None), running=(None, None), eps=0.0,
                   momentum=0.0):  # fmt: skip
        """mean and var of the batch; writes shift, of weight and bias."""
        mean, var = self.of_channels(), self.of_channels()
        self.add_up(
            _statistics, self.sum_up(x), (x, mean, var, shift, *affine, *running),
            (_bits(eps), _bits(momentum), *self.probes),
        )  # fmt: skip
        return mean, var

    def apply(self, x, weight, bias, residual, mean, var, eps, activation) -> Tensor:
        """y"""
        y = self.made()
        launch(
            _apply, self.groups * self.tiles, x, self.laid(residual), y, weight, bias, mean, var,
            *self.geometry, _bits(eps), ACTIVATION=activation, warps=self.warps, **self.constants,
        )  # fmt: skip
        return y

    def differentiate(
        self, grad, x, output, weight, shift, mean, var, means, eps, activation, want_input,
        want_residual,
    ):  # fmt: skip
        """dx and the residual's gradient; ``means`` of g and g·x̂, or None of frozen statistics."""
        dx = self.made() if want_input else None
        dresidual = self.made() if want_residual else None
        corrected = want_input and means is not None
        reads = corrected or _finds_sign(output, activation)
        launch(
            _gradient, self.groups * self.tiles, grad, x if reads else None, output, dx, dresidual,
            weight, shift, mean, var, *(means if corrected else (None, None)), *self.geometry,
            _bits(eps), ACTIVATION=activation, warps=self.warps, **self.constants,
        )  # fmt: skip
        none = self.input.new_empty(0)
        return none if dx is None else dx, none if dresidual is None else dresidual


# ------------------------------------------------------------------------------------------ raw ops


def _check_input(input):
    wanted = f"input of dtype float32, float64, bfloat16 or float16, got {input.dtype}"
    check(input.dtype in _DTYPES, f"{_OP}: expected {wanted}")
    shape = list(input.shape)
    check(2 <= len(shape) <= 5, f"{_OP}: expected input with 2 to 5 dimensions, got shape {shape}")


def _check_like(input, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(_OP, name, tensor, input.device, input.dtype, input.shape)


def _wide(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _check_of_channels(input, computed=False, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None:
            own = tensor.dtype == input.dtype and not computed
            check_tensor(
                _OP, name, tensor, input.device, None if own else _wide(input), input.shape[1:2]
            )


def _finds_sign(output, activation):
    """Whether f' is of the sign of y, as x tells it."""
    return output is None and activation in ("relu", "leaky_relu")


def _check_gradients(grad_output, input, weight, shift, output, mean, var, activation):
    _check_input(input)
    _check_like(input, grad_output=grad_output)
    _check_of_channels(input, weight=weight, shift=shift, mean=mean, var=var)
    check_activation(_OP, activation)
    fits = (activation != "none") == (output is not None) or _finds_sign(output, activation)
    wanted = "the output where the activation needs it, and not where there is none"
    check(fits, f"{_OP}: expected {wanted}")
    _check_like(input, output=output)


def _dense(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _batch_norm_forward(
    input, weight, bias, residual, running_mean, running_var, momentum, eps, activation, own
):
    _check_input(input)
    _check_of_channels(
        input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    _check_like(input, residual=residual)
    check_activation(_OP, activation)
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None:
            strides = f"{_OP}: expected a contiguous {name}, got strides {list(running.stride())}"
            check(running.is_contiguous(), strides)
    channels = input.shape[1]
    if input.numel() == 0:
        return torch.empty_like(input), *input.new_zeros((3, channels), dtype=_wide(input)).unbind()
    wanted = "expected more than 1 value per channel when training, got input size"
    check(input.numel() > channels, f"{_OP}: {wanted} {list(input.shape)}")
    with torch.cuda.device_of(input):
        p = _Problem(input)
        x, shift, affine = p.laid(input), p.of_channels(), _dense(weight, bias)
        mean, var = p.statistics(x, shift, affine, (running_mean, running_var), eps, momentum)
        y = p.apply(x, affine[0], shift, residual, mean, var, eps, activation)
        return y, mean, var, shift


def _batch_norm(input, weight, bias, residual, eps, activation, own):
    return _batch_norm_forward(input, weight, bias, residual, None, None, 0.0, eps, activation, own)


def _batch_norm_statistics(input, own):
    _check_input(input)
    if input.numel() == 0:
        return input.new_zeros((2, input.shape[1]), dtype=_wide(input)).unbind()
    with torch.cuda.device_of(input):
        p = _Problem(input)
        return p.statistics(p.laid(input))


def _batch_norm_apply(input, weight, bias, residual, mean, var, eps, activation, own):
    _check_input(input)
    _check_of_channels(input, weight=weight, bias=bias, mean=mean, var=var)
    _check_like(input, residual=residual)
    check_activation(_OP, activation)
    if input.numel() == 0:
        return torch.empty_like(input)
    with torch.cuda.device_of(input):
        p = _Problem(input)
        weight, bias, mean, var = _dense(weight, bias, mean, var)
        return p.apply(p.laid(input), weight, bias, residual, mean, var, eps, activation)


def _batch_norm_backward(
    grad_output, input, weight, shift, output, mean, var, training, eps, activation, own,
    want_input, want_weight, want_bias, want_residual,
):  # fmt: skip
    _check_gradients(grad_output, input, weight, shift, output, mean, var, activation)
    if input.numel() == 0:
        sums = [input.new_zeros(input.shape[1] if w else 0, dtype=_wide(input))
                for w in (want_weight, want_bias)]  # fmt: skip
        images = [torch.empty_like(input) if w else input.new_empty(0)
                  for w in (want_input, want_residual)]  # fmt: skip
        return images[0], *sums, images[1]
    with torch.cuda.device_of(input):
        p = _Problem(input)
        corrected = training and want_input
        reads = corrected or want_weight or _finds_sign(output, activation)
        tensors = p.laid(grad_output), p.laid(input) if reads else None, p.laid(output)
        grad, x, output = tensors
        of_channels = _dense(weight, shift, mean, var)
        grad_weight, grad_bias = p.of_channels(want_weight), p.of_channels(want_bias)
        means = (p.of_channels(), p.of_channels()) if corrected else None
        if corrected or want_weight or want_bias:
            sums = p.sum_up(x, grad, output, *of_channels, eps, activation)
            wanted = (grad_bias if want_bias else None, grad_weight if want_weight else None)
            var = of_channels[-1]
            p.add_up(_gradients, sums, (var, *wanted, *(means or (None, None))), (_bits(eps),))
        grad_input = grad_residual = input.new_empty(0)
        if want_input or want_residual:
            grad_input, grad_residual = p.differentiate(
                *tensors, *of_channels, means, eps, activation, want_input, want_residual
            )
        return grad_input, grad_weight, grad_bias, grad_residual


def _batch_norm_reduce(grad_output, input, weight, shift, output, mean, var, eps, activation, own):
    _, dot, total, _ = _batch_norm_backward(
        grad_output, input, weight, shift, output, mean, var, True, eps, activation, own,
        False, True, True, False,
    )  # fmt: skip
    return total, dot


def _batch_norm_gradient(
    grad_output, input, weight, shift, output, mean, var, mean_g, mean_g_xhat, eps, activation, own,
    want_residual,
):  # fmt: skip
    _check_gradients(grad_output, input, weight, shift, output, mean, var, activation)
    _check_of_channels(input, True, mean_g=mean_g, mean_g_xhat=mean_g_xhat)
    if input.numel() == 0:
        none = torch.empty_like(input)
        return none, torch.empty_like(input) if want_residual else input.new_empty(0)
    with torch.cuda.device_of(input):
        p = _Problem(input)
        return p.differentiate(
            p.laid(grad_output), p.laid(input), p.laid(output), *_dense(weight, shift, mean, var),
            _dense(mean_g, mean_g_xhat), eps, activation, True, want_residual,
        )  # fmt: skip


def register(key: str) -> None:
    """Registers the raw ops of batch_norm on a dispatch key: "CUDA", where no library of CUDA C++
    is; in tests "CPU"."""
    kernels = {
        "batch_norm": _batch_norm,
        "batch_norm_eval": _batch_norm_apply,
        "batch_norm_forward": _batch_norm_forward,
        "batch_norm_apply": _batch_norm_apply,
        "batch_norm_backward": _batch_norm_backward,
        "batch_norm_statistics": _batch_norm_statistics,
        "batch_norm_reduce": _batch_norm_reduce,
        "batch_norm_gradient": _batch_norm_gradient,
    }
    register_kernels(kernels, key)

"""The residual block's stages in Triton: what batch norm, ReLU and the shortcut do goes into the
convolutions' kernels, and the rest are single passes over rows of channels.

What reads and writes what (k1 … k10 of a basic block), with z = relu(s·y + t) never in memory:

    convolution   y from the input, or from z, made as its tiles are read; mean and variance of y
                  from the tiles of the output while they are in registers
    output        one pass: s·y + t + shortcut, its ReLU and the signs
    reduce        one pass: Σ g and Σ g·ŷ of the last layer, and of the shortcut's
    gradient      dy = a·g + b·(y − μ) + c; from it the input gradient, whose tiles are masked by
                  z > 0 and summed for the layer before (or have the shortcut's added) before they
                  are written; and the weight gradient, which makes z as it reads

Where dy is made:

    1 × 1, stride 1    by both products as they read g and y: 4 images are read, where a pass that
                       writes dy, and products that read it, move 5
    other filters      by a pass before them: each tap of a filter would load and combine g and y
                       again, in registers, and both would stand in shared memory for each stage of
                       the loop, where dy goes by descriptors straight to the tensor cores
    strided            likewise: fewer taps of each phase, but all by pointers
    IEEE float32       likewise: without tensor cores no pass is what takes the time

Convolutions that are not conv2d's implicit GEMM (its table: torch's own where the user leaves the
choice, as nothing is measured; float64; few channels; large strides) run by conv2d's raw op between
passes: ``_blend`` makes z, ``_statistics`` mean and variance, ``_reduce`` the mask and the sums.

Sums over pixels are cut by the shape alone, into parts that are added in order, in float64: the
same bits every time. NOT MEASURED: no GPU has timed this choice, nor the tiles of the passes.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.kernels import conv2d
from dlkernels.kernels.common import (
    INTERPRETED,
    alignment,
    check,
    check_tensor,
    launch,
    narrow,
    register_kernels,
    where_positive,
    where_set,
    widen,
)

_OP = "residual_block"
_LAST = torch.channels_last
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ------------------------------------------------------------------------------------------ kernels


@triton.jit
def _of_channels(numbers, c, mask):
    """Numbers of channels, beside rows of them."""
    return tl.load(numbers + c, mask=mask, other=0.0)[None, :]


@triton.jit(do_not_specialize=["rows", "channels"])
def _blend(
    x, x_mean, x_scale, x_shift, r, r_signs, r_scale, r_shift, y, signs, rows, channels,
    RELU: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = f(x_scale·(x - x_mean) + x_shift + r_scale·r + r_shift), with r only where its signs are
    set; the signs of y."""
    channels = channels * ALIGN
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_channel = c < channels
    mask = (row < rows)[:, None] & is_channel[None, :]
    at = row[:, None] * channels + c[None, :]
    v = widen(tl.load(x + at, mask=mask, other=0.0))
    if x_mean is not None:
        v -= _of_channels(x_mean, c, is_channel)
    if x_scale is not None:
        s = tl.broadcast_to(_of_channels(x_scale, c, is_channel), v.shape)
        v = tl.fma(v, s, tl.broadcast_to(_of_channels(x_shift, c, is_channel), v.shape))
    if r is not None:
        u = widen(tl.load(r + at, mask=mask, other=0.0))
        if r_signs is not None:
            u = where_set(u, r_signs, row, c, channels, mask)
        if r_shift is not None:
            v += _of_channels(r_shift, c, is_channel)
        if r_scale is not None:
            v = tl.fma(tl.broadcast_to(_of_channels(r_scale, c, is_channel), u.shape), u, v)
        else:
            v += u
    if RELU:
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    v = narrow(v, y.dtype.element_ty)
    tl.store(y + at, v, mask=mask)
    if signs is not None:
        bits = (~(widen(v) <= 0) & mask).to(tl.int32).reshape(ROWS, BLOCK // 8, 8)
        byte = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
        width = (channels + 7) // 8
        i = tl.program_id(0) % blocks * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        to = signs + row[:, None] * width + i[None, :]
        tl.store(to, byte.to(tl.uint8), mask=(row < rows)[:, None] & (i < width)[None, :])


@triton.jit(do_not_specialize=["rows", "channels"])
def _reduce(
    g, signs, scale, shift, y, mean, rstd, r, r_mean, r_rstd, to, partial, rows, channels,
    ALIGN: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of STEPS × ROWS rows Σ g, Σ g·ŷ, and Σ g·r̂ if there is an r; g only where its signs are set,
    or, written again, where scale·y + shift > 0."""
    channels = channels * ALIGN
    blocks = tl.cdiv(channels, BLOCK)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_channel = c < channels
    T: tl.constexpr = partial.dtype.element_ty
    mu = _of_channels(mean, c, is_channel)
    total = tl.zeros([ROWS, BLOCK], T)
    product = tl.zeros([ROWS, BLOCK], T)
    if r is not None:
        r_mu = _of_channels(r_mean, c, is_channel)
        r_product = tl.zeros([ROWS, BLOCK], T)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & is_channel[None, :]
        at = row[:, None] * channels + c[None, :]
        v = widen(tl.load(g + at, mask=mask, other=0.0))
        z = widen(tl.load(y + at, mask=mask, other=0.0))
        if signs is not None:
            v = where_set(v, signs, row, c, channels, mask)
        if to is not None:
            v = where_positive(v, z, c, is_channel, scale, shift)
            tl.store(to + at, narrow(v, to.dtype.element_ty), mask=mask)
        total += v
        product += v * (z - mu)
        if r is not None:
            r_product += v * (widen(tl.load(r + at, mask=mask, other=0.0)) - r_mu)
    SUMS: tl.constexpr = 2 if r is None else 3
    to = partial + part * (SUMS * channels) + c
    tl.store(to, tl.sum(total, 0), mask=is_channel)
    factor = tl.load(rstd + c, mask=is_channel, other=0.0)
    tl.store(to + channels, tl.sum(product, 0) * factor, mask=is_channel)
    if r is not None:
        factor = tl.load(r_rstd + c, mask=is_channel, other=0.0)
        tl.store(to + 2 * channels, tl.sum(r_product, 0) * factor, mask=is_channel)


@triton.jit(do_not_specialize=["rows", "channels"])
def _statistics(
    x, partial, rows, channels,
    ALIGN: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of STEPS × ROWS rows count, mean and Σ (x - mean)², by sums about the first tile's mean."""
    channels = channels * ALIGN
    blocks = tl.cdiv(channels, BLOCK)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_channel = c < channels
    T: tl.constexpr = partial.dtype.element_ty
    begin = part * (STEPS * ROWS)
    row = begin + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & is_channel[None, :]
    z = widen(tl.load(x + row[:, None] * channels + c[None, :], mask=mask, other=0.0))
    about = tl.sum(z, 0) / tl.minimum(rows - begin, ROWS).to(T)
    total = tl.zeros([ROWS, BLOCK], T)
    square = tl.zeros([ROWS, BLOCK], T)
    for step in range(STEPS):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & is_channel[None, :]
        d = widen(tl.load(x + row[:, None] * channels + c[None, :], mask=mask, other=0.0))
        d = tl.where(mask, d - about[None, :], 0.0)
        total += d
        square += d * d
    count = tl.minimum(rows - begin, STEPS * ROWS).to(T)
    off = tl.sum(total, 0)
    mean = off / count
    to = partial + part * (3 * channels) + c
    tl.store(to, tl.broadcast_to(count, mean.shape), mask=is_channel)
    tl.store(to + channels, about + mean, mask=is_channel)
    tl.store(to + 2 * channels, tl.sum(square, 0) - off * mean, mask=is_channel)


@triton.jit
def _update(running, stride, now, c, mask, momentum):
    """running = (1 - momentum)·running + momentum·now"""
    at = running + c * stride
    before = widen(tl.load(at, mask=mask, other=0.0)).to(tl.float64)
    after = (1 - momentum) * before + momentum * now
    tl.store(at, narrow(after, running.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["channels", "mean_stride", "var_stride"])
def _finalize(
    mean, var, weight, bias, running_mean, running_var, scale, shift, rstd, channels, mean_stride,
    var_stride, count: tl.float64, momentum: tl.float64, eps: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale, shift and rstd of a batch norm, in float64; the running variance is unbiased."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    mu = tl.load(mean + c, mask=mask, other=0.0).to(tl.float64)
    square = tl.load(var + c, mask=mask, other=1.0).to(tl.float64)
    if running_mean is not None:
        _update(running_mean, mean_stride, mu, c, mask, momentum)
    if running_var is not None:
        _update(running_var, var_stride, square * (count / (count - 1)), c, mask, momentum)
    r = 1 / tl.sqrt(square + eps)
    s, t = r, -mu * r
    if weight is not None:
        s = widen(tl.load(weight + c, mask=mask, other=0.0)).to(tl.float64) * r
        t = -mu * s
    if bias is not None:
        t += widen(tl.load(bias + c, mask=mask, other=0.0)).to(tl.float64)
    dtype = scale.dtype.element_ty
    tl.store(scale + c, narrow(s, dtype), mask=mask)
    tl.store(shift + c, narrow(t, dtype), mask=mask)
    tl.store(rstd + c, narrow(r, dtype), mask=mask)


@triton.jit(do_not_specialize=["channels"])
def _coefficients(
    sum, product, weight, rstd, to, channels, count: tl.float64,
    TRAINING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a = γ·r, b = -a·r·Σ g·ŷ / count, c = -a·Σ g / count; b = c = 0 of given statistics."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    r = tl.load(rstd + c, mask=mask, other=0.0).to(tl.float64)
    a = r
    if weight is not None:
        a *= widen(tl.load(weight + c, mask=mask, other=0.0)).to(tl.float64)
    m = tl.zeros([BLOCK], tl.float64)
    n = tl.zeros([BLOCK], tl.float64)
    if TRAINING:
        m = -a * r * tl.load(product + c, mask=mask, other=0.0).to(tl.float64) / count
        n = -a * tl.load(sum + c, mask=mask, other=0.0).to(tl.float64) / count
    dtype = to.dtype.element_ty
    tl.store(to + c, narrow(a, dtype), mask=mask)
    tl.store(to + channels + c, narrow(m, dtype), mask=mask)
    tl.store(to + 2 * channels + c, narrow(n, dtype), mask=mask)


# ---------------------------------------------------------------------------------------- launchers

_ELEMENTS = 1 << (14 if INTERPRETED.value else 12)  # of a tile of 16 bits; of others half
_WIDEST = 128  # channels of a tile
_STEPS = 16  # tiles that a program sums, at most
_PROGRAMS = 528  # of a sum, about: four for each multiprocessor of an H100
_CHANNELS = 128  # of a program that works on numbers of channels alone


def _tile(image: Tensor) -> tuple[int, int, int]:
    """Rows and channels of a tile; how many cover an image's channels."""
    channels = image.shape[1]
    block = min(max(triton.next_power_of_2(channels), 8), _WIDEST)
    elements = _ELEMENTS if image.dtype.itemsize == 2 else _ELEMENTS // 2
    return elements // block, block, triton.cdiv(channels, block)


def _rows(image: Tensor) -> int:
    return image.numel() // image.shape[1]


def _statistics_dtype(image: Tensor) -> torch.dtype:
    return torch.float64 if image.dtype == torch.float64 else torch.float32


def _sums(image: Tensor, *shape: int) -> Tensor:
    return image.new_empty(shape, dtype=_statistics_dtype(image))


def _run_blend(
    x: Tensor,
    y: Tensor,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_signs: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    signs: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """A pass over dense images into y, which may be x."""
    height, block, blocks = _tile(x)
    align = alignment(x.shape[1])
    launch(
        _blend, triton.cdiv(_rows(x), height) * blocks, x, mean, scale, shift, residual,
        residual_signs, residual_scale, residual_shift, y, signs, _rows(x), x.shape[1] // align,
        RELU=relu, ALIGN=align, ROWS=height, BLOCK=block,
    )  # fmt: skip
    return y


def _parts(image: Tensor) -> tuple[int, int]:
    """How many tiles of rows a program sums, and how many programs then sum an image's rows."""
    height, _, blocks = _tile(image)
    tiles = triton.cdiv(_rows(image), height)
    steps = min(max(triton.next_power_of_2(tiles * blocks // _PROGRAMS), 1), _STEPS)
    return steps, triton.cdiv(tiles, steps)


def _run_reduce(
    g: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    signs: Tensor | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    to: Tensor | None = None,
    residual: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Σ g, Σ g·ŷ, and Σ g·r̂ of a residual with mean and rstd; where the affine of y is above 0, g
    goes to an image, which may be g."""
    count = 3 if residual else 2
    if not g.numel():
        return tuple(_sums(g, g.shape[1]).zero_() for _ in range(count))
    height, block, blocks = _tile(g)
    steps, parts = _parts(g)
    align = alignment(g.shape[1])
    partial = _sums(g, parts, count * g.shape[1])
    launch(
        _reduce, parts * blocks, g, signs, *(affine or (None, None)), y, mean, rstd,
        *(residual or (None,) * 3), to, partial, _rows(g), g.shape[1] // align,
        ALIGN=align, STEPS=steps, ROWS=height, BLOCK=block,
    )  # fmt: skip
    sums = tuple(_sums(g, g.shape[1]) for _ in range(count))
    conv2d.add_rows(partial, *sums)
    return sums


def _run_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    if not x.numel():
        return _sums(x, x.shape[1]).zero_(), _sums(x, x.shape[1]).zero_()
    height, block, blocks = _tile(x)
    steps, parts = _parts(x)
    align = alignment(x.shape[1])
    partial = _sums(x, parts, 3, x.shape[1])
    launch(
        _statistics, parts * blocks, x, partial, _rows(x), x.shape[1] // align,
        ALIGN=align, STEPS=steps, ROWS=height, BLOCK=block,
    )  # fmt: skip
    return conv2d.merge_rows(partial)


def _as(result: Tensor, like: Tensor) -> Tensor:
    """A fresh tensor in the strides of another of its shape."""
    if result.stride() == like.stride():
        return result
    if like.is_contiguous(memory_format=_LAST):
        return result.as_strided(result.shape, like.stride())
    return torch.empty_like(like).copy_(result)


# ------------------------------------------------------------------------------------------- checks


def _check_image(name: str, image: Tensor) -> None:
    wanted = f"{_OP}: expected {name} of dtype float32, float64, bfloat16 or float16"
    check(image.dtype in _DTYPES, f"{wanted}, got {image.dtype}")
    shape = list(image.shape)
    check(image.dim() == 4, f"{_OP}: expected {name} of 4 dimensions, got shape {shape}")


def _check_like(name: str, tensor: Tensor, image: Tensor) -> None:
    check_tensor(_OP, name, tensor, image.device, image.dtype, image.shape)


def _check_channels(image: Tensor, channels: int, **numbers: Tensor | None) -> list[Tensor | None]:
    """A number for each channel, as sums of an image are, dense; those that are None stay so."""
    for name, tensor in numbers.items():
        if tensor is not None:
            dtype = _statistics_dtype(image)
            check_tensor(_OP, name, tensor, image.device, dtype, [channels])
    return [t if t is None else t.contiguous() for t in numbers.values()]


def _check_signs(name: str, signs: Tensor, image: Tensor) -> Tensor:
    n, c, p, q = image.shape
    shape = (n, p, q, (c + 7) // 8)
    check_tensor(_OP, name, signs, image.device, torch.uint8, shape)
    return signs.contiguous()


def _check_together(**tensors: Tensor | None) -> None:
    given = [tensor is not None for tensor in tensors.values()]
    check(all(given) or not any(given), f"{_OP}: expected {', '.join(tensors)}, or none of them")


def _check_parameter(name: str, tensor: Tensor | None, like: Tensor) -> None:
    if tensor is not None:
        check_tensor(_OP, name, tensor, like.device, None, like.shape)
        check(tensor.dtype in _DTYPES, f"{_OP}: expected {name} of floats, got {tensor.dtype}")


def _check_numbers(**numbers: Tensor) -> list[Tensor]:
    """Vectors of one shape and dtype, dense."""
    (name, first), *_ = numbers.items()
    check(first.dim() == 1, f"{_OP}: expected {name} of 1 dimension, got {list(first.shape)}")
    for name, tensor in numbers.items():
        check_tensor(_OP, name, tensor, first.device, first.dtype, first.shape)
    return [tensor.contiguous() for tensor in numbers.values()]


# ------------------------------------------------------------------------------------------ raw ops

_ops = torch.ops.dlkernels


def _on_device(function):
    """With the device of the first argument as the current one."""

    @functools.wraps(function)
    def run(first, *arguments, **named):
        with torch.cuda.device_of(first):
            return function(first, *arguments, **named)

    return run


@_on_device
def _convolution(
    input, scale, shift, weight, bias, about, stride, padding, dilation, groups, statistics, exact,
    own,
):  # fmt: skip
    # ``about`` is not needed: a tile's own mean is nearer.
    settings, size = conv2d.check_convolution(
        _OP, input, weight, bias, stride, padding, dilation, groups
    )
    _check_together(scale=scale, shift=shift)
    scale, shift = _check_channels(input, input.shape[1], scale=scale, shift=shift)
    affine = None if scale is None else (scale, shift)
    none = _sums(input, 0), _sums(input, 0)
    if conv2d.is_implicit_gemm(input, weight, size, settings, own):
        y, found = conv2d.convolve(
            input, weight, bias, settings, "none", exact, affine=affine, statistics=statistics
        )
        return y, *(found or none)
    x = conv2d.dense(input)
    if affine is not None:
        x = _run_blend(x, torch.empty_like(x), scale=scale, shift=shift, relu=True)
    y = _ops.conv2d_forward(x, weight, bias, *settings, "none", exact, own)
    y = conv2d.formatted(y, _LAST)
    return y, *(_run_statistics(y) if statistics else none)


@_on_device
def _finalize_statistics(
    mean, var, count, weight, bias, running_mean, running_var, momentum, eps
):  # fmt: skip
    mean, var = _check_numbers(mean=mean, var=var)
    given = {"weight": weight, "bias": bias}
    given |= {"running_mean": running_mean, "running_var": running_var}
    for name, tensor in given.items():
        _check_parameter(name, tensor, mean)
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    scale, shift, rstd = (torch.empty_like(mean) for _ in range(3))
    strides = (0 if t is None else t.stride(0) for t in (running_mean, running_var))
    launch(
        _finalize, triton.cdiv(mean.numel(), _CHANNELS), mean, var, weight, bias, running_mean,
        running_var, scale, shift, rstd, mean.numel(), *strides, float(count), momentum, eps,
        BLOCK=_CHANNELS,
    )  # fmt: skip
    return scale, shift, rstd


@_on_device
def _output(input, scale, shift, residual, residual_scale, residual_shift, want_signs):
    _check_image("input", input)
    _check_like("residual", residual, input)
    _check_together(residual_scale=residual_scale, residual_shift=residual_shift)
    scale, shift, residual_scale, residual_shift = _check_channels(
        input, input.shape[1], scale=scale, shift=shift, residual_scale=residual_scale,
        residual_shift=residual_shift,
    )  # fmt: skip
    n, c, p, q = input.shape
    signs = input.new_empty((n, p, q, (c + 7) // 8) if want_signs else 0, dtype=torch.uint8)
    y = conv2d.dense(input)
    result = _run_blend(
        y, torch.empty_like(y), scale=scale, shift=shift, residual=conv2d.dense(residual),
        residual_scale=residual_scale, residual_shift=residual_shift,
        signs=signs if want_signs else None, relu=True,
    )  # fmt: skip
    return result, signs


@_on_device
def _folded(
    input, weight, prepared, scale, shift, residual, stride, padding, dilation, groups, relu, exact,
    own,
):  # fmt: skip
    settings, size = conv2d.check_convolution(
        _OP, input, weight, None, stride, padding, dilation, groups
    )
    scale, shift = _check_channels(input, weight.shape[0], scale=scale, shift=shift)
    if residual is not None:
        shape = [input.shape[0], weight.shape[0], *size]
        check_tensor(_OP, "residual", residual, input.device, input.dtype, shape)
        residual = conv2d.dense(residual)
    if conv2d.is_implicit_gemm(input, weight, size, settings, own):
        activation = "relu" if relu else "none"
        y, _ = conv2d.convolve(
            input, weight, shift, settings, activation, exact, factor=scale, residual=residual
        )
        return y
    y = _ops.conv2d_forward(conv2d.dense(input), weight, None, *settings, "none", exact, own)
    y = conv2d.formatted(y, _LAST)
    return _run_blend(y, y, scale=scale, shift=shift, residual=residual, relu=relu)


@_on_device
def _reduce_gradient(
    grad_output, signs, input, mean, rstd, residual, residual_mean, residual_rstd
):  # fmt: skip
    _check_image("input", input)
    _check_like("grad_output", grad_output, input)
    _check_together(residual=residual, residual_mean=residual_mean, residual_rstd=residual_rstd)
    mean, rstd, residual_mean, residual_rstd = _check_channels(
        input, input.shape[1], mean=mean, rstd=rstd, residual_mean=residual_mean,
        residual_rstd=residual_rstd,
    )  # fmt: skip
    other = None
    if residual is not None:
        _check_like("residual", residual, input)
        other = (conv2d.dense(residual), residual_mean, residual_rstd)
    sums = _run_reduce(
        conv2d.dense(grad_output), conv2d.dense(input), mean, rstd,
        signs=_check_signs("signs", signs, input), residual=other,
    )  # fmt: skip
    return sums if other else (*sums, _sums(input, 0))


@_on_device
def _coefficients_of(sum, product, count, weight, rstd, training):
    sum, product, rstd = _check_numbers(sum=sum, product=product, rstd=rstd)
    _check_parameter("weight", weight, sum)
    channels = sum.numel()
    to = sum.new_empty(3, channels)
    launch(
        _coefficients, triton.cdiv(channels, _CHANNELS), sum, product,
        None if weight is None else weight.contiguous(), rstd, to, channels, float(count),
        TRAINING=training, BLOCK=_CHANNELS,
    )  # fmt: skip
    return to


def _makes_dy_as_it_reads(weight: Tensor, settings: conv2d.Settings, exact: bool) -> bool:
    """The table at the top of this file."""
    return settings.is_pointwise(weight) and not (exact and weight.dtype == torch.float32)


@_on_device
def _gradient(
    grad, signs, output, output_mean, coefficients, input, scale, shift, mean, rstd, weight, stride,
    padding, dilation, groups, skip, skip_signs, exact, own, want_input, want_weight,
):  # fmt: skip
    settings, size = conv2d.check_convolution(
        _OP, input, weight, None, stride, padding, dilation, groups
    )
    shape = [input.shape[0], weight.shape[0], *size]
    check_tensor(_OP, "output", output, input.device, input.dtype, shape)
    _check_like("grad", grad, output)
    (output_mean,) = _check_channels(output, output.shape[1], output_mean=output_mean)
    shape = (3, output.shape[1])
    dtype = _statistics_dtype(output)
    check_tensor(_OP, "coefficients", coefficients, input.device, dtype, shape)
    _check_together(scale=scale, shift=shift, mean=mean, rstd=rstd)
    check(skip is None or scale is None, f"{_OP}: expected no skip behind a layer")
    check(skip is not None or skip_signs is None, f"{_OP}: expected a skip with skip_signs")
    before = _check_channels(input, input.shape[1], scale=scale, shift=shift, mean=mean, rstd=rstd)
    if signs is not None:
        signs = _check_signs("signs", signs, output)
    if skip is not None:
        _check_like("skip", skip, input)
        skip = conv2d.dense(skip)
    if skip_signs is not None:
        skip_signs = _check_signs("skip_signs", skip_signs, input)

    x, d, y = conv2d.dense(input), conv2d.dense(grad), conv2d.dense(output)
    norm = conv2d.NormGradient(y, output_mean, coefficients.contiguous(), signs)
    affine = None if scale is None else tuple(before[:2])
    dx, dw = input.new_empty(0), weight.new_empty(0)
    sums = _sums(input, 0), _sums(input, 0)
    is_gemm = conv2d.is_implicit_gemm(input, weight, size, settings, own)
    if not (is_gemm and _makes_dy_as_it_reads(weight, settings, exact)):
        a, b, c = norm.coefficients
        d = _run_blend(
            y, torch.empty_like(y), mean=output_mean, scale=b, shift=c, residual=d,
            residual_signs=signs, residual_scale=a,
        )  # fmt: skip
        norm = None
    if is_gemm:
        if want_weight:
            dw = conv2d.weight_gradient(
                d, x, weight.shape, settings, exact, affine=affine, norm=norm
            )
        if want_input:
            rectified = None if affine is None else conv2d.Rectified(x, *before)
            dx, found = conv2d.input_gradient(
                d, weight, x.shape, settings, exact, norm=norm, residual=skip,
                residual_signs=skip_signs, rectified=rectified,
            )  # fmt: skip
            sums = found or sums
    else:
        z = x
        if affine is not None and want_weight:
            z = _run_blend(x, torch.empty_like(x), scale=affine[0], shift=affine[1], relu=True)
        dx, dw, _ = _ops.conv2d_backward(
            d, z, weight, None, *settings, "none", exact, own, want_input, want_weight, False
        )
        if want_input:
            dx = conv2d.dense(dx)
            if affine is not None:
                sums = _run_reduce(dx, x, *before[2:], affine=affine, to=dx)
            elif skip is not None:
                _run_blend(dx, dx, residual=skip, residual_signs=skip_signs)
    return (
        _as(dx, input) if want_input else dx,
        _as(dw, weight) if want_weight else dw,
        *sums,
    )


def register(key: str) -> None:
    """Registers the raw ops of residual_block on a dispatch key: "CUDA", whose residual_block is
    Triton's."""
    kernels = {
        "residual_block_convolution": _convolution,
        "residual_block_finalize": _finalize_statistics,
        "residual_block_output": _output,
        "residual_block_folded": _folded,
        "residual_block_reduce": _reduce_gradient,
        "residual_block_coefficients": _coefficients_of,
        "residual_block_gradient": _gradient,
    }
    register_kernels(kernels, key)

"""The residual block: convolutions, each with its batch norm, and a shortcut around them.

For input x, layers 1 … L of weight w_l and a batch norm with statistics μ_l, r_l = 1/√(σ²_l + ε)
and parameters γ_l, β_l, with * a convolution and every sum over the pixels of a channel::

    y_l = z_{l−1} * w_l + b_l                z_0 = x,  z_l = relu(s_l·y_l + t_l)
    s_l = γ_l·r_l,  t_l = β_l − μ_l·s_l      of the batch's own μ, σ² in training
    out = relu(s_L·y_L + t_L + shortcut)     x, or s·(x * w + b) + t: a layer of its own

    g_L = dout where out > 0;  g_l = dz_l where z_l > 0
    dy_l = s_l·(g_l − mean g_l − ŷ_l·mean(g_l·ŷ_l))       ŷ = (y − μ)·r; s_l·g_l of given statistics
    dz_{l−1}, dw_l = the gradients of * from dy_l;  dx = dz_0 + the shortcut's
    dγ = Σ g·ŷ,  dβ = Σ g;  db = Σ dy, which is 0 where the statistics are the batch's

Two layers are the basic block, three the bottleneck. No z is kept: the convolution after it makes z
from y as it reads, and so does the backward. Kept for that: x, every y, the statistics, and one bit
of each element of ``out``, whether it is above 0.

Raw ops, one for each stage, since an all-reduce of statistics may stand between: their images are
channels_last.

``residual_block_convolution``   y of a layer, with the mean and the variance of its channels
``residual_block_finalize``      s, t and r of a batch norm; updates its running statistics
``residual_block_output``        out and its signs (N, P, Q, ⌈C/8⌉): bit j of byte i is channel
                                 8i + j's, set but where out ≤ 0
``residual_block_folded``        f(s·(x * w) + t + residual): a layer whose statistics are given
``residual_block_reduce``        Σ g and Σ g·ŷ of the last layer, and of the shortcut's
``residual_block_coefficients``  a, b, c of dy = a·g + b·(y − μ) + c
``residual_block_gradient``      g and the sums of the layer before, and dw, from g of a layer
"""

import torch
from torch import Tensor

_LAST = torch.channels_last

# ------------------------------------------------------------------------------------------ schemas

_CONVOLUTION = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_CHOICE = "bool exact, bool own"

for _schema in (
    # ``about`` is near to the mean of y: sums leave it out.
    "residual_block_convolution(Tensor input, Tensor? scale, Tensor? shift, Tensor weight,"
    f" Tensor? bias, Tensor? about, {_CONVOLUTION}, bool statistics, {_CHOICE})"
    " -> (Tensor output, Tensor mean, Tensor var)",
    "residual_block_finalize(Tensor mean, Tensor var, float count, Tensor? weight, Tensor? bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps)"
    " -> (Tensor scale, Tensor shift, Tensor rstd)",
    "residual_block_output(Tensor input, Tensor scale, Tensor shift, Tensor residual,"
    " Tensor? residual_scale, Tensor? residual_shift, bool want_signs)"
    " -> (Tensor output, Tensor signs)",
    "residual_block_folded(Tensor input, Tensor weight, Tensor scale, Tensor shift,"
    f" Tensor? residual, {_CONVOLUTION}, bool relu, {_CHOICE}) -> Tensor",
    "residual_block_reduce(Tensor grad_output, Tensor signs, Tensor input, Tensor mean,"
    " Tensor rstd, Tensor? residual, Tensor? residual_mean, Tensor? residual_rstd)"
    " -> (Tensor sum, Tensor product, Tensor residual_product)",
    "residual_block_coefficients(Tensor sum, Tensor product, float count, Tensor? weight,"
    " Tensor rstd, bool training) -> Tensor",
    # Of the layer with output ``output`` and g = ``grad``, where ``signs``, if given, are set.
    # ``scale``, ``shift``, ``mean``, ``rstd`` are those of the layer before, whose output is
    # ``input``; without them it is x. ``skip``, where ``skip_signs`` are set, is added to x's
    # gradient. Nothing unwanted is made: an empty tensor of shape (0) stands for it.
    "residual_block_gradient(Tensor grad, Tensor? signs, Tensor output, Tensor output_mean,"
    " Tensor coefficients, Tensor input, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? rstd,"
    f" Tensor weight, {_CONVOLUTION}, Tensor? skip, Tensor? skip_signs, {_CHOICE},"
    " bool want_input, bool want_weight)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor sum, Tensor product)",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def _statistics_dtype(image: Tensor) -> torch.dtype:
    return torch.float64 if image.dtype == torch.float64 else torch.float32


def _sums(image: Tensor, count: int) -> Tensor:
    return image.new_empty(count, dtype=_statistics_dtype(image))


def _convolved(input, weight, stride, padding, dilation):
    size = [
        (input.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1)
        // stride[d]
        + 1
        for d in range(2)
    ]
    shape = (input.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_LAST)


@torch.library.register_fake("dlkernels::residual_block_convolution")
def _(
    input, scale, shift, weight, bias, about, stride, padding, dilation, groups, statistics, exact,
    own,
):  # fmt: skip
    channels = weight.shape[0] if statistics else 0
    output = _convolved(input, weight, stride, padding, dilation)
    return output, _sums(input, channels), _sums(input, channels)


@torch.library.register_fake("dlkernels::residual_block_finalize")
def _(mean, var, count, weight, bias, running_mean, running_var, momentum, eps):
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("dlkernels::residual_block_output")
def _(input, scale, shift, residual, residual_scale, residual_shift, want_signs):
    n, c, p, q = input.shape
    signs = (n, p, q, (c + 7) // 8) if want_signs else (0,)
    return torch.empty_like(input), input.new_empty(signs, dtype=torch.uint8)


@torch.library.register_fake("dlkernels::residual_block_folded")
def _(
    input, weight, scale, shift, residual, stride, padding, dilation, groups, relu, exact, own,
):  # fmt: skip
    return _convolved(input, weight, stride, padding, dilation)


@torch.library.register_fake("dlkernels::residual_block_reduce")
def _(grad_output, signs, input, mean, rstd, residual, residual_mean, residual_rstd):
    c = input.shape[1]
    return _sums(input, c), _sums(input, c), _sums(input, 0 if residual is None else c)


@torch.library.register_fake("dlkernels::residual_block_coefficients")
def _(sum, product, count, weight, rstd, training):
    return sum.new_empty(3, sum.shape[0])


@torch.library.register_fake("dlkernels::residual_block_gradient")
def _(
    grad, signs, output, output_mean, coefficients, input, scale, shift, mean, rstd, weight, stride,
    padding, dilation, groups, skip, skip_signs, exact, own, want_input, want_weight,
):  # fmt: skip
    channels = input.shape[1] if want_input and scale is not None else 0
    return (
        torch.empty_like(input) if want_input else input.new_empty(0),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
        _sums(input, channels),
        _sums(input, channels),
    )

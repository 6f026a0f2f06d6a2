"""The convolution of images with an activation, and a 2×2 max-pool of stride 2 behind it.

For the convolution z = x * w + b of ``conv2d``, of P × Q pixels, and a monotone activation f::

    y[n, k, i, j] = f(max z[n, k, 2i + r, 2j + s])     r, s in 0, 1; the last of odd rows is left
    a[n, k, i, j] = 2·r + s                            of the first largest, or of the last NaN
    d[n, k, 2i + r, 2j + s] = dL/dy · f'               where 2·r + s = a; 0 elsewhere
    dL/dx, dL/dw, dL/db                                of the convolution, from d

f before the pool gives the same: it keeps the order. What it makes equal without being 0 in the
derivative, as rounding does, it may give another of the equals.

Raw ops, of a stride of 1, no dilation and no groups: ``conv2d_max_pool2d_forward``, which gives y
and a, and ``conv2d_max_pool2d_backward`` for those of the three gradients that are wanted. Other
settings, and many channels, which have better algorithms, are ``conv2d``'s and torch's pool's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.common import (
    activation_named,
    asked_for,
    before_activation,
    cast,
    empty_gradients,
    empty_image,
    has_kernel,
    is_torchs,
    keep,
    kept,
    not_differentiable,
    wanted_ones,
)
from dlkernels.ops.conv2d import (
    conv2d,
    conv2d_reference,
    is_small,
    output_size,
    refused,
    run_kernel,
    settings_of,
    torchs_reason,
)

_OP = "conv2d_max_pool2d"

_SMALL = 2**18  # as conv2d's

# ------------------------------------------------------------------------------------------ schemas

_SETTINGS = "SymInt[2] padding, str activation"
_ARGUMENTS = f"Tensor input, Tensor weight, Tensor? bias, {_SETTINGS}"

for _schema in (
    f"conv2d_max_pool2d({_ARGUMENTS}) -> (Tensor output, Tensor argmax)",
    f"conv2d_max_pool2d_forward({_ARGUMENTS}) -> (Tensor output, Tensor argmax)",
    # An unwanted gradient comes back as an empty tensor of shape (0). ``output`` is read for every
    # activation but "none": any tensor of its shape and dtype will do for that.
    "conv2d_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output,"
    f" Tensor argmax, {_SETTINGS}, bool want_input, bool want_weight, bool want_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def _convolved(input, weight, padding):
    """Height and width of the convolution's result."""
    return output_size(input.shape, weight.shape, (1, 1), padding, (1, 1))


@torch.library.register_fake("dlkernels::conv2d_max_pool2d")
@torch.library.register_fake("dlkernels::conv2d_max_pool2d_forward")
def _(input, weight, bias, padding, activation):
    size = [side // 2 for side in _convolved(input, weight, padding)]
    output, argmax = (
        empty_image(input, weight, weight.shape[0], size, dtype) for dtype in (None, torch.uint8)
    )
    return output, argmax


@torch.library.register_fake("dlkernels::conv2d_max_pool2d_backward")
def _(
    grad_output, input, weight, output, argmax, padding, activation,
    want_input, want_weight, want_bias,
):  # fmt: skip
    wanted = want_input, want_weight, want_bias
    return empty_gradients(input, weight, weight.shape[0], wanted)


# ---------------------------------------------------------------------------------------- reference


def conv2d_max_pool2d_reference(input, weight, bias, stride, padding, dilation, groups, activation):
    """The definition, in torch ops: differentiable any number of times."""
    output = conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation)
    return F.max_pool2d(output, 2)


# ----------------------------------------------------------------------------------------- backward


def _backward(ctx, grad_output):
    """The three gradients by the kernel; in torch ops where they are differentiated again."""
    if grad_output is None:
        return None, None, None
    input, weight, argmax, output = kept(ctx, grad_output)
    wanted = asked_for(ctx)[:3]
    if is_torchs(grad_output):
        return _gradients(grad_output, input, weight, output, argmax, ctx.settings, wanted)
    with torch._C._AutoDispatchBelowAutograd():
        gradients = _ops.conv2d_max_pool2d_backward(
            grad_output,
            input,
            weight,
            grad_output if output is None else output,
            argmax,
            *ctx.settings,
            *wanted,
        )
    return wanted_ones(gradients, wanted)


def _gradients(grad_output, input, weight, output, argmax, settings, wanted):
    """The formulas at the head of this file, in torch ops."""
    padding, activation = settings
    of_input, of_weight, of_bias = wanted
    d = before_activation(grad_output, output, activation)
    height, width = _convolved(input, weight, padding)
    rows = 2 * torch.arange(d.shape[-2], device=d.device)[:, None]
    columns = 2 * torch.arange(d.shape[-1], device=d.device)
    taken = argmax.long()
    taken = (rows + taken // 2) * width + columns + taken % 2
    planes = *d.shape[:2], d.shape[2] * d.shape[3]  # not flatten: vmap over the backward lacks it
    of_z = d.new_zeros(*planes[:2], height * width)
    of_z = of_z.scatter(2, taken.reshape(planes), d.reshape(planes))
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        of_z.reshape(*planes[:2], height, width), input, weight, None, (1, 1), padding, (1, 1),
        False, (0, 0), 1, [of_input, of_weight, False],
    )  # fmt: skip
    return of_input, of_weight, d.sum((0, 2, 3)) if of_bias else None


def _save(ctx, input, weight, output, argmax):
    keep(ctx, input, weight, argmax, output if ctx.settings[1] != "none" else None)


def _forward(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.conv2d_max_pool2d_forward(*arguments)


class _Conv2dMaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *settings):
        output, argmax = _forward(input, weight, bias, *settings)
        ctx.settings = settings
        _save(ctx, input, weight, output, argmax)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return *_backward(ctx, grad_output), *(None,) * len(ctx.settings)


# The public op: functional, for export, opcheck and compile.


def _setup_context(ctx, inputs, output):
    input, weight, _, *ctx.settings = inputs
    _save(ctx, input, weight, *output)


def _backward_of_op(ctx, grad_output, _):
    return *_backward(ctx, grad_output), *(None,) * len(ctx.settings)


torch.library.register_autograd(
    "dlkernels::conv2d_max_pool2d", _backward_of_op, setup_context=_setup_context
)

not_differentiable(_OP, "conv2d_max_pool2d_forward", "conv2d_max_pool2d_backward")


# ------------------------------------------------------------------------------------------- choice


# Channels in and out that the fused kernel is the faster for, measured on 2 cores of AVX-512.
_MOST_INPUTS, _MOST_OUTPUTS = 32, 64


def _unfused(input, weight, stride, padding, dilation, groups):
    """Why the call is conv2d's and torch's pool's, if it is; no kernel of ours pools on its own."""
    if not has_kernel("conv2d_max_pool2d_forward", input.device.type):
        return f"no fused kernel for device {input.device.type}"
    for name, value in (("stride", stride), ("dilation", dilation), ("groups", (groups, groups))):
        if value != (1, 1):
            return f"{name}={value[0] if value[0] == value[1] else value}"
    if config.forced() != "own" and (
        weight.shape[1] > _MOST_INPUTS or weight.shape[0] > _MOST_OUTPUTS
    ):
        return f"{weight.shape[1]} channels to {weight.shape[0]}"
    return None


# ------------------------------------------------------------------------------------------- public


def conv2d_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """``max_pool2d(act(conv2d(…)), 2)`` of ``torch.nn.functional``, as one op.

    Args:
        input: (N, C, H, W) or (C, H, W), in any strides; float32, float64, bfloat16 or float16,
            computed in float32 (float64 for float64).
        weight: (K, C / groups, R, S), of the input's dtype, in any strides.
        bias: (K), of the input's dtype.
        stride, padding, dilation, groups: those of ``conv2d``.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"tanh"`` or ``"sigmoid"``;
            before or behind the pool is the same.
        prepared: as of ``conv2d``.

    Returns:
        (N, K, P // 2, Q // 2) or without N, P × Q being the convolution's size; channels_last if
        input or weight is, of the input's dtype; under autocast, of autocast's. The gradient of
        each goes to the largest of its four pixels, of equals to the first; to the last NaN.

    Raises:
        What torch raises, with its words: RuntimeError for shapes and dtypes, TypeError for no
        tensor. ValueError for another activation. NotImplementedError under
        ``dlkernels.config.kernels = "own"``, where there is no kernel of ours for the convolution;
        behind one of another stride than 1, of dilation, of groups or on a GPU the pool is torch's.
    """
    named, activation = activation, activation_named(_OP, activation)
    convolution = stride, padding, dilation, groups

    def stocks():
        return conv2d_max_pool2d_reference(input, weight, bias, *convolution, activation)

    reason = torchs_reason()
    if reason is None and is_small(input, weight, stride, least=_SMALL):
        reason = "too small for our call overhead"
    if reason is not None:
        config.record(_OP, "reference", reason)
        return stocks()
    reason, settings, behind = settings_of(input, weight, bias, *convolution)
    if reason is not None:
        config.record(_OP, "reference", reason)
        return refused(_OP, reason, stocks)
    if reason := _unfused(input, weight, *settings):
        config.record(_OP, "stock", f"torch's max_pool2d behind conv2d: {reason}")
        output = conv2d(input, weight, bias, *convolution, activation=named, prepared=prepared)
        return F.max_pool2d(output, 2)
    if behind != (0, 0):
        input = F.pad(input, (0, behind[0], 0, behind[1]))
    padding = settings[1]
    if min(_convolved(input, weight, padding)) < 2:
        return refused(_OP, "a convolution of less than 2 pixels to pool", stocks)
    config.record(_OP, config.owner(input.device.type), "few_channels")
    return run_kernel(
        lambda *arguments: _ops.conv2d_max_pool2d(*arguments)[0],
        _Conv2dMaxPool2d,
        lambda *arguments: _forward(*arguments)[0],
        *cast(input, weight, bias),
        padding,
        activation,
    )

"""The convolution of images with an activation, and a 2×2 max-pool of stride 2 behind it.

For the convolution z = x * w + b of ``conv2d``, of P × Q pixels, and a monotone activation f::

    y[n, k, i, j] = f(max z[n, k, 2i + r, 2j + s])     r, s in 0, 1; the last of odd rows is left
    a[n, k, i, j] = 2·r + s                            of the first largest, or of the last NaN
    d[n, k, 2i + r, 2j + s] = dL/dy · f'               where 2·r + s = a; 0 elsewhere
    dL/dx, dL/dw, dL/db                                of the convolution, from d

f before the pool gives the same: it keeps the order. What it makes equal without being 0 in the
derivative, as rounding does, it may give another of the equals.

Raw ops: ``conv2d_max_pool2d_forward``, which gives y and a, and ``conv2d_max_pool2d_backward`` for
those of the three gradients that are wanted. ``conv2d_max_pool2d_algorithm`` says what the host
entry takes: "few_channels", or "aten", torch's convolution and our pool.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.common import (
    activation_named,
    active_transform,
    autocast_dtype,
    before_activation,
    has_kernel,
    is_batched,
    not_differentiable,
    suggests_channels_last,
)
from dlkernels.ops.conv2d import _is_exact, _settings, conv2d, conv2d_reference, is_small

_OP = "conv2d_max_pool2d"

# Below this many multiply-adds stock is done before our way through Python.
_SMALL = 2**18

# ------------------------------------------------------------------------------------------ schemas

_SETTINGS = (
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str activation,"
    " bool exact, bool own"
)
_ARGUMENTS = f"Tensor input, Tensor weight, Tensor? bias, {_SETTINGS}"

for _schema in (
    f"conv2d_max_pool2d({_ARGUMENTS}) -> (Tensor output, Tensor argmax)",
    f"conv2d_max_pool2d_forward({_ARGUMENTS}) -> (Tensor output, Tensor argmax)",
    # An unwanted gradient comes back as an empty tensor of shape (0). ``output`` is read for every
    # activation but "none": any tensor of its shape and dtype will do for that.
    "conv2d_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output,"
    f" Tensor argmax, {_SETTINGS}, bool want_input, bool want_weight, bool want_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    f"conv2d_max_pool2d_algorithm({_ARGUMENTS}) -> str",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def _convolved(input, weight, stride, padding, dilation):
    """Height and width of the convolution's result."""
    return [
        (input.shape[d] + 2 * padding[d] - dilation[d] * (weight.shape[d] - 1) - 1) // stride[d] + 1
        for d in (-2, -1)
    ]


def _empty(like, shape, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


@torch.library.register_fake("dlkernels::conv2d_max_pool2d")
@torch.library.register_fake("dlkernels::conv2d_max_pool2d_forward")
def _(input, weight, bias, stride, padding, dilation, groups, activation, exact, own):
    height, width = _convolved(input, weight, stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], height // 2, width // 2)
    last = shape[0] != 0 and (suggests_channels_last(input) or suggests_channels_last(weight))
    return _empty(input, shape, input.dtype, last), _empty(input, shape, torch.uint8, last)


@torch.library.register_fake("dlkernels::conv2d_max_pool2d_backward")
def _(
    grad_output, input, weight, output, argmax, stride, padding, dilation, groups, activation,
    exact, own, want_input, want_weight, want_bias,
):  # fmt: skip
    def like(x, wanted):
        if not wanted:
            return x.new_empty(0)
        return _empty(x, x.shape, x.dtype, suggests_channels_last(x))

    return (
        like(input, want_input),
        like(weight, want_weight),
        input.new_empty(weight.shape[0] if want_bias else 0),
    )


# ---------------------------------------------------------------------------------------- reference


def conv2d_max_pool2d_reference(input, weight, bias, stride, padding, dilation, groups, activation):
    """The definition, in torch ops: differentiable any number of times."""
    output = conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation)
    return F.max_pool2d(output, 2)


# ----------------------------------------------------------------------------------------- backward


def _save(ctx, input, weight, output, argmax):
    """Keeps what the wanted gradients read: no input for a frozen weight, and no weight, which may
    then be changed before the backward, for an input without a gradient."""
    of_input, of_weight, *_ = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    # Of what is not kept only the layout counts.
    ctx.of_input = None if of_weight else (input.shape, input.stride())
    ctx.of_weight = None if of_input else (weight.shape, weight.stride())
    ctx.save_for_backward(
        input if of_weight else None,
        weight if of_input else None,
        output if ctx.settings[4] != "none" else None,
        argmax,
    )


def _backward(ctx, grad_output):
    """The three gradients by the kernel; in torch ops where they are differentiated again."""
    if grad_output is None:
        return None, None, None
    input, weight, output, argmax = ctx.saved_tensors
    if input is None:
        input = grad_output.new_empty_strided(*ctx.of_input)
    if weight is None:
        weight = grad_output.new_empty_strided(*ctx.of_weight)
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() or is_batched(grad_output):
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
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def _gradients(grad_output, input, weight, output, argmax, settings, wanted):
    """The formulas at the head of this file, in torch ops."""
    stride, padding, dilation, groups, activation, *_ = settings
    of_input, of_weight, of_bias = wanted
    d = before_activation(grad_output, output, activation)
    height, width = _convolved(input, weight, stride, padding, dilation)
    rows = 2 * torch.arange(d.shape[-2], device=d.device)[:, None]
    columns = 2 * torch.arange(d.shape[-1], device=d.device)
    taken = argmax.long()
    taken = (rows + taken // 2) * width + columns + taken % 2
    planes = *d.shape[:2], d.shape[2] * d.shape[3]  # not flatten: vmap over the backward lacks it
    of_z = d.new_zeros(*planes[:2], height * width)
    of_z = of_z.scatter(2, taken.reshape(planes), d.reshape(planes))
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        of_z.reshape(*planes[:2], height, width), input, weight, None, stride, padding, dilation,
        False, (0, 0), groups, [of_input, of_weight, False],
    )  # fmt: skip
    return of_input, of_weight, d.sum((0, 2, 3)) if of_bias else None


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


def _is_small(input, weight):
    """Whether stock would be done before our way through Python. A traced size is not asked."""
    if config.forced() != "auto" or torch.compiler.is_compiling():
        return False
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and input.is_cpu):
        return False
    if input.dim() < 3:
        return False
    return input.numel() * weight.numel() < _SMALL * input.shape[-3]


def _choose(input, weight, bias, stride, padding, dilation, groups):
    """(why the call is torch's, the settings, what more padding there is behind the image)."""
    reason, settings, behind = _settings(input, weight, bias, stride, padding, dilation, groups)
    if reason is None and not has_kernel(_OP, input.device.type):
        reason = f"no kernel for device {input.device.type}"
    if reason is None:
        height, width = _convolved(input, weight, *settings[:3])
        if height + behind[1] < 2 or width + behind[0] < 2:
            reason = "a convolution of less than 2 pixels to pool"
    return reason, settings, behind


def _has_many_channels(weight, settings):
    """Whether conv2d may have an algorithm that is worth more than the fused pool."""
    stride, _, dilation, groups = settings
    outputs, channels, *_ = weight.shape
    return stride == dilation == (1, 1) and groups == 1 and (channels > 32 or outputs > 64)


def _algorithm(input, weight, *settings):
    image = input if input.dim() == 4 else input.unsqueeze(0)
    # Autocast has still to come: the choice is that of its dtype.
    dtype = autocast_dtype(input, input.device.type)
    return _ops.conv2d_max_pool2d_algorithm(image.to(dtype), weight.to(dtype), None, *settings)


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

    Returns:
        (N, K, P // 2, Q // 2) or without N, P × Q being the convolution's size; channels_last if
        input or weight is, of the input's dtype; under autocast, of autocast's. The gradient of
        each goes to the largest of its four pixels, of equals to the first; to the last NaN.

    Raises:
        What torch raises, with its words: RuntimeError for shapes and dtypes, TypeError for no
        tensor. ValueError for another activation. NotImplementedError under
        ``dlkernels.config.kernels = "own"``, where there is no kernel of ours.
    """
    activation = activation_named(_OP, activation)
    reason = transform = active_transform()
    kernels = config.forced()
    if transform is None and kernels == "stock":
        reason = "dlkernels.config.kernels is 'stock'"
    elif transform is None and _is_small(input, weight):
        reason = "too small for our call overhead"
    if reason is None:
        reason, settings, behind = _choose(input, weight, bias, stride, padding, dilation, groups)
    if reason is not None:
        config.record(_OP, "reference", reason)
        output = conv2d_max_pool2d_reference(
            input, weight, bias, stride, padding, dilation, groups, activation
        )
        if transform is None and kernels == "own":  # bad input is torch's to refuse
            raise NotImplementedError(f"{_OP}: no kernel of ours: {reason}")
        return output

    own = kernels == "own"
    if not own and _has_many_channels(weight, settings) and not is_small(input, weight, stride):
        named = None if activation == "none" else activation
        output = conv2d(input, weight, bias, stride, padding, dilation, groups, activation=named)
        return F.max_pool2d(output, 2)
    if behind != (0, 0):
        input = F.pad(input, (0, behind[0], 0, behind[1]))
    device = input.device.type
    settings = (*settings, activation, _is_exact(device), own)
    if (own or config.is_recording()) and not torch.compiler.is_compiling():
        algorithm = _algorithm(input, weight, *settings)
        if own and algorithm == "aten":
            raise NotImplementedError(f"{_OP}: no kernel of ours: torch does the convolution")
        owner = "reference" if algorithm == "aten" else config.owner(device)
        config.record(_OP, owner, algorithm)
    if torch.is_autocast_enabled(device):
        dtype = autocast_dtype(input, device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    batched = input.dim() == 4
    if not batched:
        input = input.unsqueeze(0)
    if torch.compiler.is_compiling():
        output, _ = _ops.conv2d_max_pool2d(input, weight, bias, *settings)
    elif torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        output = _Conv2dMaxPool2d.apply(input, weight, bias, *settings)
    else:
        output, _ = _forward(input, weight, bias, *settings)
    return output if batched else output.squeeze(0)

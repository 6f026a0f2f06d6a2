"""Batch norm, with a residual and an activation in the pass that writes its output.

For input x (N, C, …), and for each channel weight w and bias b::

    training    μ = mean of x, v = mean of (x − μ)²         over all dimensions but the channels'
    eval        μ and v are given: the running statistics
    x̂ = (x − μ)·r, r = 1 / √(v + eps)
    y = f(x̂·w + b + residual)      f and f' as of linear: f' follows from y; of ReLU and LeakyReLU
                                   from its sign, which x tells where there is no residual
    g = dL/dy · f'                 the gradient of the residual, and of b once summed
    dL/dw = Σ g·x̂      dL/db = Σ g
    dL/dx = r·w·g                                           eval
    dL/dx = r·w·(g − mean of g − x̂·mean of g·x̂)             training

Raw ops: ``batch_norm_forward``, which also updates the running statistics; ``batch_norm_apply``
with given ones; ``batch_norm_backward`` for those of the four gradients that are wanted. Where the
statistics are those of several processes, an all-reduce stands between ``batch_norm_statistics``
and ``batch_norm_apply``, and between ``batch_norm_reduce`` and ``batch_norm_gradient``. All of them
make r·w of the variance as it is kept, and what a rounded mean has lost is in ``shift``, which
stands for b: so the sign that a backward finds is y's to the bit.

Statistics and sums are float32, float64 for float64. Output and gradients have the input's memory
format. Of no values the statistics are 0, and no running one moves. ``own`` asks for a kernel of
ours whatever the shape.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.common import (
    ACTIVATIONS,
    DTYPES,
    activation_named,
    active_transform,
    asked_for,
    before_activation,
    has_kernel,
    is_torchs,
    needs_gradient,
    not_differentiable,
    suggests_channels_last,
    unfit,
)

_OP = "batch_norm"

# The activations of whose output the derivative needs no more than the sign.
_SIGNED = ("relu", "leaky_relu")

# Below this many elements stock is done before our way through Python.
_SMALL = 2**15

# ------------------------------------------------------------------------------------------ schemas

_INPUTS = "Tensor input, Tensor? weight, Tensor? bias, Tensor? residual"
_SETTINGS = "float eps, str activation, bool own"
_GRADIENT_INPUTS = (
    "Tensor grad_output, Tensor input, Tensor? weight, Tensor? shift, Tensor? output,"
    " Tensor mean, Tensor var"
)
_NORMALISED = "(Tensor output, Tensor mean, Tensor var, Tensor shift)"

for _schema in (
    # The public ones. The variance is the biased one, and no running statistic moves.
    f"batch_norm({_INPUTS}, {_SETTINGS}) -> {_NORMALISED}",
    f"batch_norm_eval({_INPUTS}, Tensor mean, Tensor var, {_SETTINGS}) -> Tensor",
    f"batch_norm_forward({_INPUTS}, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    f" float momentum, {_SETTINGS}) -> {_NORMALISED}",
    f"batch_norm_apply({_INPUTS}, Tensor mean, Tensor var, {_SETTINGS}) -> Tensor",
    # An unwanted gradient comes back as an empty tensor of shape (0). ``output`` is y, None where
    # the activation is "none", or one of _SIGNED without a residual.
    f"batch_norm_backward({_GRADIENT_INPUTS}, bool training, {_SETTINGS}, bool want_input,"
    " bool want_weight, bool want_bias, bool want_residual)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    "batch_norm_statistics(Tensor input, bool own) -> (Tensor mean, Tensor var)",
    f"batch_norm_reduce({_GRADIENT_INPUTS}, {_SETTINGS}) -> (Tensor sum_g, Tensor sum_g_xhat)",
    f"batch_norm_gradient({_GRADIENT_INPUTS}, Tensor mean_g, Tensor mean_g_xhat, {_SETTINGS},"
    " bool want_residual) -> (Tensor grad_input, Tensor grad_residual)",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def _computed(input):
    """The dtype of statistics and sums."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _like(input):
    """An empty tensor of the input's shape and memory format."""
    last = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
    format = last if suggests_channels_last(input) else torch.contiguous_format
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=format)


def _of_channels(input, wanted=True):
    return input.new_empty(input.shape[1] if wanted else 0, dtype=_computed(input))


@torch.library.register_fake("dlkernels::batch_norm")
def _(input, weight, bias, residual, eps, activation, own):
    return _like(input), *(_of_channels(input) for _ in range(3))


@torch.library.register_fake("dlkernels::batch_norm_forward")
def _(
    input, weight, bias, residual, running_mean, running_var, momentum, eps, activation, own
):  # fmt: skip
    return _like(input), *(_of_channels(input) for _ in range(3))


@torch.library.register_fake("dlkernels::batch_norm_eval")
@torch.library.register_fake("dlkernels::batch_norm_apply")
def _(input, weight, bias, residual, mean, var, eps, activation, own):
    return _like(input)


@torch.library.register_fake("dlkernels::batch_norm_backward")
def _(
    grad_output, input, weight, shift, output, mean, var, training, eps, activation, own,
    want_input, want_weight, want_bias, want_residual,
):  # fmt: skip
    return (
        _like(input) if want_input else input.new_empty(0),
        _of_channels(input, want_weight),
        _of_channels(input, want_bias),
        _like(input) if want_residual else input.new_empty(0),
    )


@torch.library.register_fake("dlkernels::batch_norm_statistics")
def _(input, own):
    return _of_channels(input), _of_channels(input)


@torch.library.register_fake("dlkernels::batch_norm_reduce")
def _(grad_output, input, weight, shift, output, mean, var, eps, activation, own):
    return _of_channels(input), _of_channels(input)


@torch.library.register_fake("dlkernels::batch_norm_gradient")
def _(
    grad_output, input, weight, shift, output, mean, var, mean_g, mean_g_xhat, eps, activation, own,
    want_residual,
):  # fmt: skip
    return _like(input), _like(input) if want_residual else input.new_empty(0)


# ---------------------------------------------------------------------------------------- reference


def batch_norm_reference(
    input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
):
    """The definition, in torch ops: differentiable any number of times."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation](output if residual is None else output + residual)


# ----------------------------------------------------------------------------------------- backward


def _along_channels(tensor, x):
    """A number for each channel, in a shape that broadcasts against x."""
    return tensor.to(_computed(x)).view(-1, *[1] * (x.dim() - 2))


def _dimensions(x):
    """All but the channels'."""
    return [0, *range(2, x.dim())]


def _keeps_output(activation, residual, input):
    """Whether a backward for which ``input`` is kept, or None, needs y."""
    if activation == "none":
        return False
    return input is None or residual is not None or activation not in _SIGNED


def _save(ctx, input, weight, bias, residual, output, mean, var, shift, *settings):
    """Keeps what the wanted gradients read. ``settings`` are training, eps, activation, own."""
    training, _, activation, _ = ctx.settings = settings
    of_input, of_weight, *_ = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in (input, weight, bias, residual)]
    kept = input if of_weight or (training and of_input) else None
    # Of an input that is not kept only the layout counts.
    ctx.of_input = (input.shape, input.stride(), input.dtype) if kept is None else None
    keeps_output = _keeps_output(activation, residual, kept)
    finds_sign = activation != "none" and not keeps_output
    ctx.save_for_backward(
        kept,
        weight if of_input or finds_sign else None,
        shift if finds_sign else None,
        output if keeps_output else None,
        mean,
        var,
    )


def _backward(ctx, grad_output):
    """The four gradients by the kernel; in torch ops where they are differentiated again."""
    if grad_output is None:
        return None, None, None, None
    input, weight, shift, output, mean, var = ctx.saved_tensors
    training, *settings = ctx.settings
    eps, activation, _ = settings
    *wanted, of_residual = asked_for(ctx)[:4]
    if activation == "none" and not any(wanted):
        return None, None, None, grad_output
    # Without an activation the gradient of the residual is that of the output, as it is.
    wanted.append(of_residual and activation != "none")
    if input is None:
        shape, stride, dtype = ctx.of_input
        input = grad_output.new_empty_strided(shape, stride, dtype=dtype)
    if is_torchs(grad_output):
        if output is None and activation != "none":
            with torch._C._AutoDispatchBelowAutograd():
                output = _ops.batch_norm_apply(input, weight, shift, None, mean, var, *settings)
        g = before_activation(grad_output, output, activation)
        gradients = _gradients(g, input, weight, mean, var, training, eps, wanted)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            gradients = _ops.batch_norm_backward(
                grad_output, input, weight, shift, output, mean, var, training, *settings, *wanted
            )
    *gradients, of_r = (
        g.to(dtype) if want else None
        for g, dtype, want in zip(gradients, ctx.dtypes, wanted, strict=True)
    )
    return *gradients, grad_output if of_residual and activation == "none" else of_r


def _gradients(g, input, weight, mean, var, training, eps, wanted):
    """The formulas at the head of this file, in torch ops. The statistics of a training step are
    made again, since they depend on the input."""
    of_input, of_weight, of_bias, of_residual = wanted
    residual = g if of_residual else None
    g, x = g.to(_computed(input)), input.to(_computed(input))
    mean, var = mean.to(x.dtype), var.to(x.dtype)
    dimensions = _dimensions(x)
    values = x.numel() // max(1, x.shape[1])
    if training and values:
        mean = x.mean(dimensions)
        var = (x - _along_channels(mean, x)).square().mean(dimensions)
    rstd = torch.rsqrt(var + eps)
    sum_g = g.sum(dimensions)
    normal = sum_g_normal = None
    if of_weight or (of_input and training):
        normal = (x - _along_channels(mean, x)) * _along_channels(rstd, x)
        sum_g_normal = (g * normal).sum(dimensions)
    of_x = None
    if of_input:
        of_x = g
        if training and values:
            of_x = g - _along_channels(sum_g / values, x)
            of_x = of_x - normal * _along_channels(sum_g_normal / values, x)
        of_x = of_x * _along_channels(rstd if weight is None else rstd * weight, x)
    return of_x, sum_g_normal if of_weight else None, sum_g if of_bias else None, residual


class _BatchNorm(torch.autograd.Function):
    """In training: batch_norm_forward."""

    @staticmethod
    def forward(ctx, input, weight, bias, residual, running_mean, running_var, *settings):
        with torch._C._AutoDispatchBelowAutograd():
            made = _ops.batch_norm_forward(
                input, weight, bias, residual, running_mean, running_var, *settings
            )
        _save(ctx, input, weight, bias, residual, *made, True, *settings[1:])
        return made[0]

    @staticmethod
    def backward(ctx, grad_output):
        return *_backward(ctx, grad_output), None, None, None, None, None, None


class _BatchNormEval(torch.autograd.Function):
    """With given statistics: batch_norm_apply."""

    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            output = _ops.batch_norm_apply(*arguments)
        _setup_context_of_eval(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return *_backward(ctx, grad_output), None, None, None, None, None


# The public ops: functional, for export, opcheck and compile.


def _setup_context(ctx, inputs, output):
    *inputs, eps, activation, own = inputs
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, *inputs, *output, True, eps, activation, own)


def _backward_of_op(ctx, grad_output, *_):
    return *_backward(ctx, grad_output), None, None, None


def _setup_context_of_eval(ctx, inputs, output):
    *inputs, mean, var, eps, activation, own = inputs
    _save(ctx, *inputs, output, mean, var, inputs[2], False, eps, activation, own)


def _backward_of_eval(ctx, grad_output):
    return *_backward(ctx, grad_output), None, None, None, None, None


torch.library.register_autograd(
    "dlkernels::batch_norm", _backward_of_op, setup_context=_setup_context
)
torch.library.register_autograd(
    "dlkernels::batch_norm_eval", _backward_of_eval, setup_context=_setup_context_of_eval
)

not_differentiable(
    _OP,
    "batch_norm_forward",
    "batch_norm_apply",
    "batch_norm_backward",
    "batch_norm_statistics",
    "batch_norm_reduce",
    "batch_norm_gradient",
)


# ------------------------------------------------------------------------------------------- choice


def _refusal(input, running_mean, running_var, weight, bias, training, momentum, eps, residual):
    """Why our kernels do not take these arguments: torch refuses them, or only torch can."""
    if not isinstance(input, Tensor):
        return "no tensor"
    of_channels = (weight, bias, running_mean, running_var)
    if reason := unfit((input, *of_channels, residual)):
        return reason
    device, dtype, shape = input.device.type, input.dtype, input.shape
    if not has_kernel("batch_norm_forward", device):
        return f"no kernel for device {device}"
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    if not 2 <= len(shape) <= 5:
        return f"input of {len(shape)} dimensions"
    if (running_mean is None) != (running_var is None):
        return "one running statistic without the other"
    if running_mean is None and not training:
        return "no running statistics in eval"
    if type(momentum) not in (float, int) and not isinstance(momentum, torch.SymFloat):
        return f"momentum={momentum}"
    if eps < 0 or (training and eps == 0):
        return f"eps={eps}"
    parameter = None
    for tensor in of_channels:
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] != shape[1]:
            return f"a parameter of shape {tuple(tensor.shape)} for {shape[1]} channels"
        if parameter is None:
            parameter = tensor.dtype
            if parameter != dtype and (
                parameter != torch.float32 or dtype not in (torch.bfloat16, torch.float16)
            ):
                return f"parameters of {parameter} beside input of {dtype}"
        elif tensor.dtype != parameter:
            return f"parameters of {parameter} and {tensor.dtype}"
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
        return "running statistics that require grad"
    if training and running_mean is not None and not running_mean.is_contiguous():
        return "running statistics that are not contiguous"
    if training and running_var is not None and not running_var.is_contiguous():
        return "running statistics that are not contiguous"
    if residual is not None and (residual.shape != shape or residual.dtype != dtype):
        return (
            f"residual of {residual.dtype} and shape {tuple(residual.shape)} for input of {dtype}"
            f" and shape {tuple(shape)}"
        )
    return None


def _is_small(input):
    """Whether stock would be done before our way through Python. A traced size is not asked."""
    if config.forced() != "auto" or torch.compiler.is_compiling():
        return False
    return isinstance(input, Tensor) and input.is_cpu and input.numel() < _SMALL


def _choose(torchs, stocks, arguments):
    """(kernel, reason). "reference" is the definition in torch ops, for what stock lacks."""
    if transform := active_transform():
        return torchs, transform
    kernels = config.forced()
    if kernels == "stock":
        return torchs, "dlkernels.config.kernels is 'stock'"
    refusal = _refusal(*arguments)
    input, training = arguments[0], arguments[5]
    if refusal is None and training and input.numel() == input.shape[1]:
        refusal = f"input of shape {tuple(input.shape)}: one value per channel"
    if refusal is not None:
        if kernels == "own":
            stocks()  # bad input is torch's to refuse
            raise NotImplementedError(f"batch_norm: no kernel of ours: {refusal}")
        return torchs, refusal
    if torch.compiler.is_compiling():
        return "own", "covered"
    return config.owner(input.device.type), "covered"


# ------------------------------------------------------------------------------------------- public


def written(*tensors):
    """Tells autograd of what a kernel wrote."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


@torch.no_grad()
def update_running(running, value, momentum):
    """As torch's kernels: in the dtype of the statistics."""
    running.copy_(momentum * value + (1 - momentum) * running.to(value.dtype))


def _train(input, running_mean, running_var, weight, bias, momentum, eps, residual, *settings):
    if torch.compiler.is_compiling():
        output, mean, var, _ = _ops.batch_norm(input, weight, bias, residual, eps, *settings)
        if running_mean is not None:
            values = input.numel() // input.shape[1]
            update_running(running_mean, mean, momentum)
            update_running(running_var, var * (values / (values - 1)), momentum)
        return output
    arguments = (input, weight, bias, residual, running_mean, running_var, momentum, eps)
    if needs_gradient(input, weight, bias, residual):
        output = _BatchNorm.apply(*arguments, *settings)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output = _ops.batch_norm_forward(*arguments, *settings)[0]
    written(running_mean, running_var)
    return output


def _evaluate(input, mean, var, weight, bias, eps, residual, *settings):
    arguments = (input, weight, bias, residual, mean, var, eps, *settings)
    if torch.compiler.is_compiling():
        return _ops.batch_norm_eval(*arguments)
    if needs_gradient(input, weight, bias, residual):
        return _BatchNormEval.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.batch_norm_apply(*arguments)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``torch.nn.functional.batch_norm``; a residual and an activation with it where one is given.

    Args:
        input: (N, C) to (N, C, D, H, W), in any strides; channels_last and contiguous are the fast
            layouts. float32, float64, bfloat16 or float16, computed in float32 (float64 for
            float64).
        running_mean, running_var: (C), both or neither: in training updated in place, in eval what
            the input is normalised with.
        weight, bias: (C). They and the running statistics share one dtype: the input's, or float32
            beside bfloat16 and float16.
        training: normalise with the statistics of this batch.
        momentum: the part of this batch's statistics in the running ones.
        eps: added to the variance.
        residual: of the input's shape and dtype, added before the activation; another that
            broadcasts is the reference's.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"tanh"`` or ``"sigmoid"``.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        What torch raises, with its words: ValueError for one value per channel in training and for
        eps, RuntimeError for shapes and dtypes. ValueError for another activation.
    """
    activation = activation_named(_OP, activation)
    torchs = "stock" if activation == "none" and residual is None else "reference"

    stock_arguments = (
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )  # fmt: skip

    def stocks():
        return batch_norm_reference(*stock_arguments, residual, activation)

    if _is_small(input):
        if config.is_recording():
            config.record(_OP, torchs, "too small for our call overhead")
        return stocks()
    kernel, reason = _choose(torchs, stocks, (*stock_arguments, residual))
    config.record(_OP, kernel, reason)
    if kernel == torchs:
        return stocks()
    settings = float(eps), residual, activation, config.forced() == "own"
    if training:
        return _train(input, running_mean, running_var, weight, bias, float(momentum), *settings)
    return _evaluate(input, running_mean, running_var, weight, bias, *settings)


# ------------------------------------------------------------------------- statistics of processes


def statistics_reference(input):
    """batch_norm_statistics in torch ops."""
    x, dimensions = input.detach().to(_computed(input)), _dimensions(input)
    if x.numel() == 0:
        return _of_channels(input).zero_(), _of_channels(input).zero_()
    mean = x.mean(dimensions)
    return mean, (x - _along_channels(mean, x)).square().mean(dimensions)


def reduce_reference(grad_output, input, output, mean, rstd, activation):
    """batch_norm_reduce in torch ops."""
    x = input.to(_computed(input))
    g = before_activation(grad_output, output, activation).to(x.dtype)
    normal = (x - _along_channels(mean, x)) * _along_channels(rstd, x)
    return g.sum(_dimensions(x)), (g * normal).sum(_dimensions(x))


def gradient_reference(
    grad_output, input, weight, output, mean, rstd, mean_g, mean_g_xhat, activation
):
    """batch_norm_gradient in torch ops."""
    x = input.to(_computed(input))
    g = before_activation(grad_output, output, activation)
    normal = (x - _along_channels(mean, x)) * _along_channels(rstd, x)
    of_x = g.to(x.dtype) - _along_channels(mean_g, x) - normal * _along_channels(mean_g_xhat, x)
    of_x = of_x * _along_channels(rstd if weight is None else rstd * weight, x)
    return of_x.to(input.dtype), g


def combined_statistics(mean, var, values, group):
    """(mean, Σ (x − mean)², number) of the values of all processes, in float64, from the mean and
    the biased variance of ``values`` here. Two all-reduces, since a sum of squares would cancel: of
    the values, then of their deviations."""
    mean, var = mean.double(), var.double()
    local = torch.cat([mean * values, mean.new_full((1,), values)])
    torch.distributed.all_reduce(local, group=group)
    mean_of_all = local[:-1] / local[-1].clamp(min=1)
    squares = values * (var + (mean - mean_of_all).square())
    torch.distributed.all_reduce(squares, group=group)
    return mean_of_all, squares, local[-1]


class _SyncBatchNorm(torch.autograd.Function):
    """In training, over all processes of a group. ``own`` None: in torch ops."""

    @staticmethod
    def forward(
        ctx, input, weight, bias, residual, running_mean, running_var, momentum, eps, activation,
        own, group,
    ):  # fmt: skip
        if own is None:
            mean, var = statistics_reference(input)
        else:
            mean, var = _ops.batch_norm_statistics(input, own)
        dtype, values = mean.dtype, input.numel() // max(1, input.shape[1])
        mean, squares, count = combined_statistics(mean, var, values, group)
        if running_mean is not None:
            momentum = momentum * (count > 0).double()
            update_running(running_mean, mean, momentum)
            update_running(running_var, squares / (count - 1), momentum)
        count = count.clamp(min=1)
        mean, var = mean.to(dtype), (squares / count).to(dtype)
        if own is None:
            output = batch_norm_reference(
                input, mean.to(input.dtype), var.to(input.dtype), _in(weight, input),
                _in(bias, input), False, 0.0, eps, residual, activation,
            )  # fmt: skip
        else:
            output = _ops.batch_norm_apply(
                input, weight, bias, residual, mean, var, eps, activation, own
            )
        ctx.set_materialize_grads(False)
        ctx.settings = eps, activation, own, group
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        keeps_output = activation != "none" and own is None
        keeps_output = keeps_output or _keeps_output(activation, residual, input)
        finds_sign = activation != "none" and not keeps_output
        ctx.save_for_backward(
            input, weight, bias if finds_sign else None, output if keeps_output else None, mean,
            var, count,
        )  # fmt: skip
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        eps, activation, own, group = ctx.settings
        input, weight, bias, output, mean, var, count = ctx.saved_tensors
        of_input, of_weight, of_bias, of_residual = ctx.needs_input_grad[:4]
        if grad_output is None:  # the others wait for our part of the sums
            grad_output = torch.zeros_like(input)
        rstd = torch.rsqrt(var + eps) if own is None else None
        arguments = grad_output, input, weight, bias, output, mean, var
        if own is None:
            sums = reduce_reference(grad_output, input, output, mean, rstd, activation)
        else:
            sums = _ops.batch_norm_reduce(*arguments, eps, activation, own)
        of_x = of_r = None
        if of_input:
            means = torch.cat(sums).double()
            torch.distributed.all_reduce(means, group=group)
            means = (means / count).to(mean.dtype).view(2, -1)
            if own is None:
                of_x, of_r = gradient_reference(
                    grad_output, input, weight, output, mean, rstd, *means, activation
                )
            else:
                of_x, of_r = _ops.batch_norm_gradient(
                    *arguments, *means, eps, activation, own, of_residual
                )
        elif of_residual:
            of_r = before_activation(grad_output, output, activation)
        sum_g, sum_g_normal = sums
        return (
            of_x,
            sum_g_normal.to(ctx.dtypes[0]) if of_weight else None,
            sum_g.to(ctx.dtypes[1]) if of_bias else None,
            of_r if of_residual else None,
            *(None,) * 7,
        )


def _in(tensor, input):
    return None if tensor is None else tensor.to(input.dtype)


def sync_batch_norm(
    input, running_mean, running_var, weight, bias, momentum, eps, group, *, residual, activation
):
    """``batch_norm`` in training, with the statistics of all processes of a group. Each has a batch
    of its own size, of none too; all of them call this, and its backward. No double backward."""
    arguments = input, running_mean, running_var, weight, bias, True, momentum, eps
    if torch.distributed.get_world_size(group) == 1:
        return batch_norm(*arguments, residual=residual, activation=activation)
    activation = activation_named(_OP, activation)
    own, reason = None, active_transform()
    if config.forced() == "stock":
        reason = "dlkernels.config.kernels is 'stock'"
    if reason is None and (reason := _refusal(*arguments, residual)) is None:
        own = config.forced() == "own"
    if own is None and config.forced() == "own":
        raise NotImplementedError(f"batch_norm: no kernel of ours: {reason}")
    kernel = "reference" if own is None else config.owner(input.device.type)
    config.record(_OP, kernel, reason or "covered")
    return _SyncBatchNorm.apply(
        input, weight, bias, residual, running_mean, running_var, momentum, float(eps), activation,
        own, group,
    )  # fmt: skip

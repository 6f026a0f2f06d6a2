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
``residual_block_folded``        f(s·(x * w) + t + residual): a layer whose statistics are given, by
                                 Winograd of ``prepared`` in place of w: see ``conv2d_prepare``
``residual_block_layout``        a copy of an image that is not so yet, channels_last or contiguous
``residual_block_reduce``        Σ g and Σ g·ŷ of the last layer, and of the shortcut's
``residual_block_coefficients``  a, b, c of dy = a·g + b·(y − μ) + c
``residual_block_gradient``      g and the sums of the layer before, and dw, from g of a layer
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.batch_norm import (
    batch_norm,
    combined_statistics,
    sync_batch_norm,
    update_running,
    written,
)
from dlkernels.ops.common import (
    DTYPES,
    asked_for,
    autocast_dtype,
    has_kernel,
    is_torchs,
    needs_gradient,
    not_differentiable,
    suggests_channels_last,
    unfit,
)
from dlkernels.ops.conv2d import conv2d, is_exact, is_small, output_size, torchs_reason

_OP = "residual_block"
_LAST = torch.channels_last

# ------------------------------------------------------------------------------------------ schemas

_CONVOLUTION = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_CHOICE = "bool exact, bool own"

for _schema in (
    # ``about`` is near to the mean of y: sums leave it out.
    "residual_block_convolution(Tensor input, Tensor? scale, Tensor? shift, Tensor weight,"
    f" Tensor? bias, Tensor? about, {_CONVOLUTION}, bool statistics, {_CHOICE})"
    " -> (Tensor output, Tensor mean, Tensor var)",
    "residual_block_finalize(Tensor mean, Tensor var, SymInt count, Tensor? weight, Tensor? bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps)"
    " -> (Tensor scale, Tensor shift, Tensor rstd)",
    "residual_block_output(Tensor input, Tensor scale, Tensor shift, Tensor residual,"
    " Tensor? residual_scale, Tensor? residual_shift, bool want_signs)"
    " -> (Tensor output, Tensor signs)",
    "residual_block_folded(Tensor input, Tensor weight, Tensor? prepared, Tensor scale,"
    f" Tensor shift, Tensor? residual, {_CONVOLUTION}, bool relu, {_CHOICE}) -> Tensor",
    "residual_block_layout(Tensor input, bool last) -> Tensor",
    "residual_block_reduce(Tensor grad_output, Tensor signs, Tensor input, Tensor mean,"
    " Tensor rstd, Tensor? residual, Tensor? residual_mean, Tensor? residual_rstd)"
    " -> (Tensor sum, Tensor product, Tensor residual_product)",
    "residual_block_coefficients(Tensor sum, Tensor product, SymInt count, Tensor? weight,"
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
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
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
    input, weight, prepared, scale, shift, residual, stride, padding, dilation, groups, relu, exact,
    own,
):  # fmt: skip
    return _convolved(input, weight, stride, padding, dilation)


@torch.library.register_fake("dlkernels::residual_block_layout")
def _(input, last):
    return torch.empty_like(input, memory_format=_LAST if last else torch.contiguous_format)


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


# ---------------------------------------------------------------------------------------- arguments


class ResidualLayer(NamedTuple):
    """A convolution without an activation, and the batch norm behind it."""

    weight: Tensor  # (K, C / groups, R, S)
    bias: Tensor | None = None  # (K), of the convolution
    norm_weight: Tensor | None = None  # (K): γ
    norm_bias: Tensor | None = None  # (K): β
    running_mean: Tensor | None = None  # (K), as the variance; without them the batch's own, always
    running_var: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    momentum: float = 0.1
    eps: float = 1e-5
    kept: "Kept | None" = None  # what a frozen module keeps, read where no gradient is needed

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What has a gradient."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias


class Kept(NamedTuple):
    """What is read in place of a layer's parameters and running statistics."""

    scale: Tensor  # (K): s
    shift: Tensor  # (K): t, of the convolution without its bias
    weight: Tensor | None  # what conv2d takes as ``prepared``


_PARAMETERS = 4  # of a layer


class _Settings(NamedTuple):
    """What a block is set to beside its tensors; of each layer, and the shortcut's last."""

    convolutions: tuple[tuple, ...]  # stride, padding, dilation, groups
    momenta: tuple[float, ...]
    eps: tuple[float, ...]
    projects: bool  # whether the last layer is the shortcut's
    training: bool
    group: object  # process group of synchronised statistics, or None
    exact: bool
    own: bool


class _Norm(NamedTuple):
    """A batch norm whose statistics are known."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


# ------------------------------------------------------------------------------------------- stages


def _normalise(y, statistics, parameters, running, at, s):
    """The _Norm behind a convolution, of its statistics or of the running ones; the variance; and
    how many elements they are of."""
    _, _, gamma, beta = parameters
    count = y.numel() // y.shape[1]
    if not s.training:
        mean, var = (x.to(_statistics_dtype(y)) for x in running)
        scale, shift, rstd = _ops.residual_block_finalize(
            mean, var, count, gamma, beta, None, None, 0.0, s.eps[at]
        )
        return _Norm(scale, shift, mean, rstd), var, count
    mean, var = statistics
    if s.group is not None:
        dtype = mean.dtype
        mean, squares, total = combined_statistics(mean, var, count, s.group)
        mean, var, count = mean.to(dtype), (squares / total).to(dtype), int(total)
    scale, shift, rstd = _ops.residual_block_finalize(
        mean, var, count, gamma, beta, *running, s.momenta[at], s.eps[at]
    )
    return _Norm(scale, shift, mean, rstd), var, count


def _forward(input, parameters, running, s, want_signs=True):
    """(out, its signs, y of each layer, _Norm of each, its variance, elements that it is of); the
    shortcut's last."""
    outputs, norms, variances, counts = [], [], [], []
    layers = len(parameters) - s.projects
    for at, tensors in enumerate(parameters):
        first = at in (0, layers)
        scale, shift = (None, None) if first else norms[-1][:2]
        weight, bias, *_ = tensors
        y, *statistics = _ops.residual_block_convolution(
            input if first else outputs[-1], scale, shift, weight, bias, running[at][0],
            *s.convolutions[at], s.training, s.exact, s.own,
        )  # fmt: skip
        norm, var, count = _normalise(y, statistics, tensors, running[at], at, s)
        outputs.append(y)
        norms.append(norm)
        variances.append(var)
        counts.append(count)
    last = norms[layers - 1]
    residual = (outputs[-1], *norms[-1][:2]) if s.projects else (input, None, None)
    output, signs = _ops.residual_block_output(
        outputs[layers - 1], last.scale, last.shift, *residual, want_signs
    )
    return output, signs, outputs, norms, variances, counts


def _affine(weight, bias, gamma, beta, mean, var, eps):
    """s and t of given statistics, of the convolution without its bias."""
    mean, var = (r.to(_statistics_dtype(weight)) for r in (mean, var))
    if bias is not None:
        mean = mean - bias
    return _ops.residual_block_finalize(mean, var, 1, gamma, beta, None, None, 0.0, eps)[:2]


def _inference(input, parameters, running, s, kept):
    """out where statistics are given and no gradient is wanted."""

    def layer(x, at, residual, relu):
        weight = parameters[at][0]
        if kept[at] is None:
            affine, prepared = _affine(*parameters[at], *running[at], s.eps[at]), None
        else:
            *affine, prepared = kept[at]
        return _ops.residual_block_folded(
            x, weight, prepared, *affine, residual, *s.convolutions[at], relu, s.exact, s.own
        )

    layers = len(parameters) - s.projects
    residual = layer(input, layers, None, False) if s.projects else input
    x = input
    for at in range(layers):
        x = layer(x, at, residual if at == layers - 1 else None, True)
    return x


def _coefficients(sums, norm, count, gamma, s):
    """a, b and c; and Σ g, Σ g·ŷ of this process, which are the gradients of β and γ."""
    total, product = sums
    if s.training and s.group is not None:
        both = torch.cat(sums).double()
        torch.distributed.all_reduce(both, group=s.group)
        total, product = both.to(total.dtype).chunk(2)
    return _ops.residual_block_coefficients(total, product, count, gamma, norm.rstd, s.training)


def _backward(grad, input, signs, outputs, norms, counts, parameters, s, want_input, want_weights):
    """dx, and the gradients of each layer's parameters; None for what is unwanted."""
    layers = len(parameters) - s.projects
    last = layers - 1
    of_residual = (outputs[-1], *norms[-1][2:]) if s.projects else (None, None, None)
    total, product, residual_product = _ops.residual_block_reduce(
        grad, signs, outputs[last], *norms[last][2:], *of_residual
    )
    gradients = [None] * len(parameters)

    def layer(at, grad, signs, sums, skip, skip_signs, wanted):
        """g of the layer before, or dx, and its sums."""
        weight, bias, gamma, beta = parameters[at]
        coefficients = _coefficients(sums, norms[at], counts[at], gamma, s)
        first = at in (0, layers)
        before = (None,) * 4 if first else norms[at - 1]
        grad_input, grad_weight, *more = _ops.residual_block_gradient(
            grad, signs, outputs[at], norms[at].mean, coefficients,
            input if first else outputs[at - 1], *before, weight, *s.convolutions[at],
            skip, skip_signs, s.exact, s.own, wanted, want_weights[at],
        )  # fmt: skip
        of_bias = None
        if bias is not None:
            of_bias = torch.zeros_like(bias) if s.training else coefficients[0] * sums[0]
        gradients[at] = (
            grad_weight if want_weights[at] else None,
            None if bias is None else of_bias.to(bias.dtype),
            None if gamma is None else sums[1].to(gamma.dtype),
            # β of the shortcut and of the last layer have one sum: a copy for each.
            None if beta is None else sums[0].to(beta.dtype, copy=True),
        )
        return grad_input, more

    skip, skip_signs = grad, signs
    if s.projects:
        skip, _ = layer(layers, grad, signs, (total, residual_product), None, None, want_input)
        skip_signs = None
    g, sums = grad, (total, product)
    for at in reversed(range(layers)):
        of_input = at == 0
        g, sums = layer(
            at, g, signs if at == last else None, sums,
            *((skip, skip_signs) if of_input and want_input else (None, None)),
            want_input or not of_input,
        )  # fmt: skip
    return g if want_input else None, gradients


def keep(layer: ResidualLayer) -> tuple[Tensor, Tensor] | None:
    """``Kept.scale`` and ``shift`` of a layer; None where there is no kernel for it."""
    weight = layer.weight
    has_statistics = layer.running_mean is not None and layer.running_var is not None
    if weight.dim() != 4 or weight.dtype not in DTYPES or not has_statistics:
        return None
    if unfit(layer.parameters) or not has_kernel("residual_block_finalize", weight.device.type):
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return _affine(*layer.parameters, *layer[4:6], layer.eps)


# ----------------------------------------------------------------------------------------- autograd


def _layers_of(flat):
    return [tuple(flat[at : at + _PARAMETERS]) for at in range(0, len(flat), _PARAMETERS)]


def residual_block_reference(input, parameters, running, s):
    """The definition, in torch ops: differentiable any number of times."""

    def layer(x, at):
        weight, bias, gamma, beta = parameters[at]
        y = F.conv2d(x, weight, bias, *s.convolutions[at])
        mean, var = (None, None) if s.training else running[at]
        return F.batch_norm(y, mean, var, gamma, beta, s.training, 0.0, s.eps[at])

    layers = len(parameters) - s.projects
    x = input
    for at in range(layers - 1):
        x = F.relu(layer(x, at))
    return F.relu(layer(x, layers - 1) + (layer(input, layers) if s.projects else input))


def _again(grad, input, flat, running, s, wanted):
    """The gradients by the definition, for those that are differentiated again."""
    if s.group is not None:
        raise NotImplementedError(
            "residual_block: no double backward through synchronised statistics"
        )
    with torch.enable_grad():
        # Views, for gradients of these and not of what they were made from.
        input, *flat = (x if x is None else x.view_as(x) for x in (input, *flat))
        output = residual_block_reference(input, _layers_of(flat), running, s)
    asked = [x for x, want in zip((input, *flat), wanted, strict=True) if want]
    create = torch.is_grad_enabled()
    gradients = iter(torch.autograd.grad(output, asked, grad, create_graph=create))
    return [next(gradients) if want else None for want in wanted]


def _keep(ctx, input, flat, running, s, signs, outputs, norms):
    ctx.set_materialize_grads(False)
    ctx.s, ctx.layers = s, len(outputs)
    given = [] if s.training else [x for pair in running for x in pair]
    ctx.save_for_backward(input, signs, *flat, *given, *outputs, *norms)


def _gradients(ctx, grad, wanted):
    """Of input and parameters, by the kernels or by the definition."""
    if grad is None:
        return [None] * len(wanted)
    s, count = ctx.s, ctx.layers
    input, signs, *rest = ctx.saved_tensors
    flat, rest = rest[: count * _PARAMETERS], rest[count * _PARAMETERS :]
    running = [(None, None)] * count
    if not s.training:
        running = list(zip(rest[: 2 * count : 2], rest[1 : 2 * count : 2], strict=True))
        rest = rest[2 * count :]
    if is_torchs(grad):
        return _again(grad, input, flat, running, s, wanted)
    outputs, rest = rest[:count], rest[count:]
    norms = [_Norm(*rest[at : at + 4]) for at in range(0, 4 * count, 4)]
    counts = getattr(ctx, "counts", None) or [y.numel() // y.shape[1] for y in outputs]
    with torch._C._AutoDispatchBelowAutograd():
        of_input, of_layers = _backward(
            _laid(grad, True), input, signs, outputs, norms, counts,
            _layers_of(flat), s, wanted[0], wanted[1::_PARAMETERS],
        )  # fmt: skip
    gradients = [of_input, *(x for layer in of_layers for x in layer)]
    return [x if want else None for x, want in zip(gradients, wanted, strict=True)]


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, running, input, *flat):
        with torch._C._AutoDispatchBelowAutograd():
            output, signs, outputs, norms, _, ctx.counts = _forward(
                input, _layers_of(flat), running, s
            )
        _keep(ctx, input, flat, running, s, signs, outputs, [x for norm in norms for x in norm])
        return output

    @staticmethod
    def backward(ctx, grad):
        # Where processes add up their sums, all of them take the same way.
        wanted = asked_for(ctx) if ctx.s.group is None else ctx.needs_input_grad
        return None, None, *_gradients(ctx, grad, wanted[2:])


# The public op: functional, for export, opcheck and compile. ``parameters`` are weight, bias, γ and
# β of each layer, those of them that are ``given``; ``running`` its running mean and variance, and
# nothing in training; ``convolutions`` stride, padding, dilation and groups; the shortcut's are
# last. ``signs``, ``outputs`` and ``norms`` are what the backward reads. (Of lists with None in
# them torch sees no gradient.)

torch.library.define(
    "dlkernels::residual_block",
    "(Tensor input, Tensor[] parameters, bool[] given, Tensor[] running, SymInt[] convolutions,"
    f" float[] eps, bool projects, bool training, {_CHOICE}) -> (Tensor output, Tensor signs,"
    " Tensor[] outputs, Tensor[] norms, Tensor[] variances)",
)


def _of_op(parameters, given, running, convolutions, eps, projects, training, exact, own):
    """(parameters with None, running statistics by layer, settings)."""
    settings = []
    for at in range(0, len(convolutions), 7):
        *pairs, groups = convolutions[at : at + 7]
        settings.append((*(tuple(pairs[i : i + 2]) for i in (0, 2, 4)), groups))
    pairs = list(zip(running[::2], running[1::2], strict=True)) or [(None, None)] * len(settings)
    momenta = (0.0,) * len(settings)
    s = _Settings(tuple(settings), momenta, tuple(eps), projects, training, None, exact, own)
    present = iter(parameters)
    return [next(present) if there else None for there in given], pairs, s


@torch.library.impl("dlkernels::residual_block", "CompositeExplicitAutograd")
def _(input, *arguments):
    flat, running, s = _of_op(*arguments)
    output, signs, outputs, norms, variances, _ = _forward(input, _layers_of(flat), running, s)
    if not s.training:  # nothing that is given may come back
        variances = [var.clone() for var in variances]
        norms = [norm._replace(mean=norm.mean.clone()) for norm in norms]
    return output, signs, outputs, [x for norm in norms for x in norm], variances


@torch.library.register_fake("dlkernels::residual_block")
def _(input, *arguments):
    flat, _, s = _of_op(*arguments)
    parameters = _layers_of(flat)
    layers = len(parameters) - s.projects
    outputs, x = [], input
    for at, (weight, *_) in enumerate(parameters):
        stride, padding, dilation, _ = s.convolutions[at]
        x = _convolved(input if at == layers else x, weight, stride, padding, dilation)
        outputs.append(x)
    last = outputs[layers - 1]
    n, c, p, q = last.shape
    norms = [_sums(y, y.shape[1]) for y in outputs for _ in _Norm._fields]
    variances = [_sums(y, y.shape[1]) for y in outputs]
    signs = last.new_empty((n, p, q, (c + 7) // 8), dtype=torch.uint8)
    return torch.empty_like(last), signs, outputs, norms, variances


def _setup_context(ctx, inputs, output):
    input, *arguments = inputs
    flat, running, s = _of_op(*arguments)
    _, signs, outputs, norms, _ = output
    _keep(ctx, input, flat, running, s, signs, outputs, norms)
    ctx.given, ctx.rest = arguments[1], len(arguments) - 3


def _backward_of_op(ctx, grad, *_):
    of_input, of_parameters, *_ = ctx.needs_input_grad
    present = iter(of_parameters)
    wanted = [of_input, *(next(present) if there else False for there in ctx.given)]
    of_input, *flat = _gradients(ctx, grad, wanted)
    gradients = [x for x, there in zip(flat, ctx.given, strict=True) if there]
    running = [] if ctx.s.training else [None] * 2 * ctx.layers
    return of_input, gradients, None, running, *(None,) * ctx.rest


torch.library.register_autograd(
    "dlkernels::residual_block", _backward_of_op, setup_context=_setup_context
)

not_differentiable(
    _OP,
    "residual_block_convolution",
    "residual_block_finalize",
    "residual_block_output",
    "residual_block_folded",
    "residual_block_layout",
    "residual_block_reduce",
    "residual_block_coefficients",
    "residual_block_gradient",
)


# ------------------------------------------------------------------------------------------- choice


def _is_pair(value, least):
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(number, (int, torch.SymInt)) and number >= least for number in value)
    )


def _refusal_of_layer(shape, layer, dtype, training):
    """(why our kernels do not take a layer behind an image of this shape, its output's shape)."""
    weight, device = layer.weight, layer.weight.device.type
    if weight.dim() != 4 or autocast_dtype(weight, device) != dtype:
        return f"a weight of {weight.dtype} and shape {tuple(weight.shape)}", None
    channels, groups = weight.shape[0], layer.groups
    if weight.shape[1] * groups != shape[1] or channels % groups:
        return f"weight of shape {tuple(weight.shape)} for {shape[1]} channels", None
    if layer.bias is not None and (
        layer.bias.shape != (channels,) or autocast_dtype(layer.bias, device) != dtype
    ):
        return f"bias of {layer.bias.dtype} and shape {tuple(layer.bias.shape)}", None
    for least, value in ((1, layer.stride), (0, layer.padding), (1, layer.dilation)):
        if not _is_pair(value, least):
            return "a stride, padding or dilation that is not two numbers", None
    size = output_size(shape, weight.shape, layer.stride, layer.padding, layer.dilation)
    if min(size) < 1:
        return f"an image of {tuple(shape)} below the kernel's size", None
    norm = (layer.norm_weight, layer.norm_bias, layer.running_mean, layer.running_var)
    norm = [tensor for tensor in norm if tensor is not None]
    for tensor in norm:
        if tensor.shape != (channels,):
            return f"a batch norm of shape {tuple(tensor.shape)}", None
    mixed = {torch.float32} if dtype in (torch.bfloat16, torch.float16) else set()
    if (of := {tensor.dtype for tensor in norm}) and of not in ({dtype}, mixed):
        return f"a batch norm of {', '.join(map(str, of))} beside {dtype}", None
    if (layer.running_mean is None) != (layer.running_var is None):
        return "one running statistic without the other", None
    if layer.running_mean is None and not training:
        return "no running statistics in eval", None
    if training and shape[0] * size[0] * size[1] <= 1:
        return "one value per channel", None
    if layer.eps < 0 or (training and layer.eps == 0):
        return f"eps={layer.eps}", None
    return None, (shape[0], channels, *size)


def _refusal_of_layers(input, layers, training):
    """(why our kernels do not take layers behind one another, their output's shape)."""
    tensors = [x for layer in layers for x in (*layer.parameters, *layer[4:6])]
    if reason := unfit((input, *tensors)):
        return reason, None
    device = input.device.type
    if not has_kernel("residual_block_convolution", device):
        return f"no kernel for device {device}", None
    dtype = autocast_dtype(input, device)
    if dtype not in DTYPES:
        return f"no kernel for {dtype}", None
    if input.dim() != 4 or 0 in input.shape:
        return f"input of shape {tuple(input.shape)}", None
    shape = input.shape
    for layer in layers:
        reason, shape = _refusal_of_layer(shape, layer, dtype, training)
        if reason is not None:
            return reason, None
    return None, shape


def _refusal(input, layers, shortcut, training):
    """Why our kernels do not take these arguments: torch refuses them, or only torch can."""
    reason, shape = _refusal_of_layers(input, layers, training)
    if reason is not None:
        return reason
    past = input.shape
    if shortcut is not None:
        reason, past = _refusal_of_layers(input, [shortcut], training)
        if reason is not None:
            return reason
    if tuple(shape) != tuple(past):
        return f"a shortcut of shape {tuple(past)} beside {tuple(shape)}"
    return None


# ------------------------------------------------------------------------------------------- public


def _is_alike(x, layer, past):
    pairs = layer.stride, layer.padding, layer.dilation
    if x.dim() != 4 or not all(isinstance(pair, (tuple, list)) for pair in pairs):
        return False
    return [*past.shape[2:]] == output_size(x.shape, layer.weight.shape, *pairs)


def _parts(input, layers, shortcut, training, group):
    """The block of the library's convolutions and batch norms, which choose for themselves."""

    def layer(x, of, **more):
        y = conv2d(x, of.weight, of.bias, of.stride, of.padding, of.dilation, of.groups)
        norm = of.running_mean, of.running_var, of.norm_weight, of.norm_bias
        batch = training or of.running_mean is None
        if group is not None and batch:
            more = {"residual": None, "activation": None, **more}
            return sync_batch_norm(y, *norm, of.momentum, of.eps, group, **more)
        return batch_norm(y, *norm, batch, of.momentum, of.eps, **more)

    past = input if shortcut is None else layer(input, shortcut)
    x = input
    for of in layers[:-1]:
        x = layer(x, of, activation="relu")
    if layers[-1].weight.shape[0] == past.shape[1] and _is_alike(x, layers[-1], past):
        return layer(x, layers[-1], residual=past, activation="relu")
    return F.relu(layer(x, layers[-1]) + past)  # one of them is broadcast


def _agreed(reason, input, group):
    """A reason for the parts where any process has one: their all-reduces are in another order, and
    the batch of one process may be empty, or small."""
    if torch.compiler.is_compiling():
        return "compiled, with statistics of several processes"
    votes = torch.tensor([reason is not None], dtype=torch.float32, device=input.device)
    torch.distributed.all_reduce(votes, group=group)
    return "another process takes the parts" if reason is None and votes.item() else reason


def _cast(input, layers):
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, layers
    dtype = autocast_dtype(input, device)
    bias = [None if layer.bias is None else layer.bias.to(dtype) for layer in layers]
    return input.to(dtype), [
        layer._replace(weight=layer.weight.to(dtype), bias=b, kept=None)
        for layer, b in zip(layers, bias, strict=True)
    ]


class _Layout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, last):
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.residual_block_layout(image, last)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _laid(image, last):
    """The image channels_last, or contiguous: by a copy of ours where a CPU would copy. The
    compiler has its own."""
    format = _LAST if last else torch.contiguous_format
    if (
        image.is_contiguous(memory_format=format)
        or not image.is_cpu
        or torch.compiler.is_compiling()
        or not has_kernel("residual_block_layout", "cpu")
    ):
        return image.contiguous(memory_format=format)
    return _Layout.apply(image, last)


def _note(input, layers, s, reason="covered"):
    """Records the choice, and who does the convolutions: theirs are not all ours."""
    owner = config.owner("cpu") if input.is_cpu else "triton"
    if torch.compiler.is_compiling() or not config.is_recording():
        config.record(_OP, owner, reason)
        return
    names, x = [], input
    for at, (layer, convolution) in enumerate(zip(layers, s.convolutions, strict=True), 1):
        is_shortcut = s.projects and at == len(layers)
        x = input if is_shortcut else x
        chosen = _ops.conv2d_algorithm(
            x, layer.weight, None, *convolution, "none", s.exact, s.own
        ).split(", ")
        used = dict.fromkeys(chosen if s.training else chosen[:1])  # forward, input, weight
        names.append(f"{'shortcut' if is_shortcut else f'conv{at}'} {'/'.join(used)}")
        x = _convolved(x, layer.weight, *convolution[:3])
    config.record(_OP, owner, f"{reason}: {', '.join(names)}")


def _run(input, layers, s):
    """The kernels, with a derivative where one is needed."""
    flat = [x for layer in layers for x in layer.parameters]
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    if torch.compiler.is_compiling():
        convolutions = [x for c in s.convolutions for x in (*c[0], *c[1], *c[2], c[3])]
        given = [] if s.training else [x for pair in running for x in pair]
        output, _, outputs, norms, variances = _ops.residual_block(
            input, [x for x in flat if x is not None], [x is not None for x in flat], given,
            convolutions, s.eps, s.projects, s.training, s.exact, s.own,
        )  # fmt: skip
        if s.training:
            for at, (mean, var) in enumerate(running):
                if mean is not None:
                    values = outputs[at].numel() // outputs[at].shape[1]
                    update_running(mean, norms[4 * at + 2], s.momenta[at])
                    update_running(var, variances[at] * (values / (values - 1)), s.momenta[at])
        return output
    if needs_gradient(input, *flat):
        output = _ResidualBlock.apply(s, running, input, *flat)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            if not s.training:
                kept = [layer.kept for layer in layers]
                return _inference(input, _layers_of(flat), running, s, kept)
            output, *_ = _forward(input, _layers_of(flat), running, s, want_signs=False)
    if s.training:
        written(*(x for pair in running for x in pair))
    return output


def residual_block(
    input: Tensor,
    layers: Sequence[ResidualLayer],
    shortcut: ResidualLayer | None = None,
    *,
    training: bool = False,
    process_group=None,
) -> Tensor:
    """relu(layer(… relu(layer(input))) + shortcut): a residual block of convolutions, each with its
    batch norm (He et al., 2015), in one op.

    Args:
        input: (N, C, H, W), in any strides; channels_last is the fast layout. float32, float64,
            bfloat16 or float16, computed in float32 (float64 for float64).
        layers: convolutions and batch norms, from the input on. Their weights have the input's
            dtype, batch norms theirs or float32.
        shortcut: the layer around them; None for the input itself.
        training: normalise with the statistics of the batch, and update the running ones.
        process_group: of ``torch.distributed``, over which the statistics are taken.

    Returns:
        A tensor of the last layer's shape, channels_last if input or a weight is, of the input's
        dtype; under autocast, of autocast's. In float32 a 3×3 convolution of stride 1 may be off by
        up to 4 times the error of a sum of products, as ``conv2d``'s.

    Raises:
        What torch raises of the parts, with its words: ValueError for one value per channel in
        training, RuntimeError for shapes and dtypes. ValueError for no layers.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("residual_block: expected one layer or more, got none")
    every = layers if shortcut is None else [*layers, shortcut]

    def parts():
        return _parts(input, layers, shortcut, training, process_group)

    batch = [training or layer.running_mean is None for layer in every]
    reason = None
    if is_small(input, layers[0].weight, layers[0].stride):
        reason = "too small for our call overhead"
    if reason is None:
        reason = torchs_reason()
    if reason is None and any(batch) != all(batch):
        reason = "layers with running statistics and without"
    if reason is None:
        reason = _refusal(input, layers, shortcut, batch[0])
    if process_group is not None and batch[0]:
        reason = _agreed(reason, input, process_group)
    if reason is not None:
        config.record(_OP, "parts", reason)
        return parts()
    device = input.device.type
    image, every = _cast(input, every)
    s = _Settings(
        tuple((layer.stride, layer.padding, layer.dilation, layer.groups) for layer in every),
        tuple(float(layer.momentum) for layer in every),
        tuple(float(layer.eps) for layer in every),
        shortcut is not None,
        batch[0],
        process_group if batch[0] else None,
        is_exact(device),
        config.forced() == "own",
    )
    laid = _laid(image, True)
    _note(laid, every, s)
    last = any(suggests_channels_last(x) for x in (image, *(layer.weight for layer in layers)))
    output = _run(laid, every, s)
    if last:
        return output
    output = _laid(output, False)
    # Sizes of 1 leave strides open, and torch's parts would have those of a contiguous tensor.
    return output.flatten().view_as(output) if suggests_channels_last(output) else output


def folded(
    input: Tensor, layer: ResidualLayer, relu: bool, prepared: Tensor | None = None
) -> Tensor:
    """relu(layer(input)), or without a relu, of given statistics and (N, C, H, W); ``prepared`` is
    what ``conv2d`` takes. Where no gradient is needed and an image is channels_last, the normalised
    output is written where the convolution's would be; else a convolution and a batch norm."""
    if is_small(input, layer.weight, layer.stride):
        reason = "too small for our call overhead"
    elif torch.compiler.is_compiling():
        reason = "compiled"
    elif (reason := torchs_reason() or _refusal_of_layers(input, [layer], False)[0]) is None:
        if not any(map(suggests_channels_last, (input, layer.weight))):
            reason = "a contiguous image"
        elif needs_gradient(input, *layer.parameters):
            reason = "a gradient is needed"
        elif not input.is_cpu and config.forced() != "own":
            reason = "not measured on a GPU"
    if reason is not None:
        y = conv2d(
            input, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation,
            layer.groups, prepared=prepared,
        )  # fmt: skip
        norm = layer.running_mean, layer.running_var, layer.norm_weight, layer.norm_bias
        activation = "relu" if relu else None
        return batch_norm(y, *norm, False, layer.momentum, layer.eps, activation=activation)
    image, (cast,) = _cast(input, [layer])
    image = _laid(image, True)
    convolution = cast.stride, cast.padding, cast.dilation, cast.groups
    exact, own = is_exact(input.device.type), config.forced() == "own"
    s = _Settings((convolution,), (0.0,), (cast.eps,), False, False, None, exact, own)
    _note(image, [cast], s, "folded into the convolution")
    with torch._C._AutoDispatchBelowAutograd():
        affine = _affine(*cast.parameters, cast.running_mean, cast.running_var, cast.eps)
        return _ops.residual_block_folded(
            image, cast.weight, prepared if cast.weight is layer.weight else None, *affine, None,
            *convolution, relu, exact, own,
        )  # fmt: skip

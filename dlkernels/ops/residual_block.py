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

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels.ops.common import is_batched

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

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What has a gradient."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias


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
    """The _Norm behind a convolution, of its statistics or of the running ones."""
    _, _, gamma, beta = parameters
    count = y.numel() // y.shape[1]
    if not s.training:
        mean, var = (x.to(_statistics_dtype(y)) for x in running)
        scale, shift, rstd = _ops.residual_block_finalize(
            mean, var, count, gamma, beta, None, None, 0.0, s.eps[at]
        )
        return _Norm(scale, shift, mean, rstd), count
    mean, var = statistics
    if s.group is not None:
        mean, var, count = combined_statistics(mean, var, count, s.group)
    scale, shift, rstd = _ops.residual_block_finalize(
        mean, var, count, gamma, beta, *running, s.momenta[at], s.eps[at]
    )
    return _Norm(scale, shift, mean, rstd), count


def _forward(input, parameters, running, s, want_signs=True):
    """(out, its signs, y of each layer, _Norm of each, elements that each one's statistics are of);
    the shortcut's last."""
    outputs, norms, counts = [], [], []
    layers = len(parameters) - s.projects
    for at, tensors in enumerate(parameters):
        first = at in (0, layers)
        scale, shift = (None, None) if first else norms[-1][:2]
        weight, bias, *_ = tensors
        y, *statistics = _ops.residual_block_convolution(
            input if first else outputs[-1], scale, shift, weight, bias, running[at][0],
            *s.convolutions[at], s.training, s.exact, s.own,
        )  # fmt: skip
        norm, count = _normalise(y, statistics, tensors, running[at], at, s)
        outputs.append(y)
        norms.append(norm)
        counts.append(count)
    last = norms[layers - 1]
    residual = (outputs[-1], *norms[-1][:2]) if s.projects else (input, None, None)
    output, signs = _ops.residual_block_output(
        outputs[layers - 1], last.scale, last.shift, *residual, want_signs
    )
    return output, signs, outputs, norms, counts


def _inference(input, parameters, running, s):
    """out where statistics are given and no gradient is wanted."""

    def layer(x, at, residual, relu):
        weight, bias, gamma, beta = parameters[at]
        mean, var = (r.to(_statistics_dtype(x)) for r in running[at])
        if bias is not None:
            mean = mean - bias
        scale, shift, _ = _ops.residual_block_finalize(
            mean, var, 1, gamma, beta, None, None, 0.0, s.eps[at]
        )
        return _ops.residual_block_folded(
            x, weight, scale, shift, residual, *s.convolutions[at], relu, s.exact, s.own
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
        total, product = summed(sums, s.group)
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
            None if beta is None else sums[0].to(beta.dtype),
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
            skip if of_input and want_input else None, skip_signs if of_input else None,
            want_input or not of_input,
        )  # fmt: skip
    return g if want_input else None, gradients


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


def _save(ctx, input, flat, running, s, signs, outputs, norms):
    ctx.set_materialize_grads(False)
    ctx.s, ctx.layers = s, len(outputs)
    given = [] if s.training else [x for pair in running for x in pair]
    ctx.save_for_backward(input, signs, *flat, *given, *outputs, *(x for n in norms for x in n))


def _gradients(ctx, grad):
    """Of input and parameters, by the kernels or by the definition."""
    wanted = ctx.wanted
    if grad is None:
        return [None] * len(wanted)
    s, count = ctx.s, ctx.layers
    input, signs, *rest = ctx.saved_tensors
    flat, rest = rest[: count * _PARAMETERS], rest[count * _PARAMETERS :]
    running = [(None, None)] * count
    if not s.training:
        running = list(zip(rest[: 2 * count : 2], rest[1 : 2 * count : 2], strict=True))
        rest = rest[2 * count :]
    if torch.is_grad_enabled() or is_batched(grad):
        return _again(grad, input, flat, running, s, wanted)
    outputs, rest = rest[:count], rest[count:]
    norms = [_Norm(*rest[at : at + 4]) for at in range(0, 4 * count, 4)]
    with torch._C._AutoDispatchBelowAutograd():
        of_input, of_layers = _backward(
            grad.contiguous(memory_format=_LAST), input, signs, outputs, norms, ctx.counts,
            _layers_of(flat), s, wanted[0], wanted[1::_PARAMETERS],
        )  # fmt: skip
    gradients = [of_input, *(x for layer in of_layers for x in layer)]
    return [x if want else None for x, want in zip(gradients, wanted, strict=True)]


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, running, input, *flat):
        with torch._C._AutoDispatchBelowAutograd():
            output, signs, outputs, norms, ctx.counts = _forward(
                input, _layers_of(flat), running, s
            )
        _save(ctx, input, flat, running, s, signs, outputs, norms)
        return output

    @staticmethod
    def backward(ctx, grad):
        ctx.wanted = ctx.needs_input_grad[2:]
        return None, None, *_gradients(ctx, grad)

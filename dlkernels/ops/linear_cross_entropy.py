"""Softmax cross-entropy of a linear layer's output, whose logits are never in memory as a whole.

For input x (N, D), weight W (C, K, D) and bias b (C, K) of C classes at K positions::

    z_nck = Σ_d x_nd·W_ckd + b_ck
    loss  = cross_entropy(z, target)          of ``dlkernels.ops.cross_entropy``, options and all

    dz    = dL/dz                             softmax − target mass, times the upstream gradient
    dL/dx = Σ_ck dz_nck·W_ck        dL/dW = Σ_n dz_nck·x_n        dL/db = Σ_n dz_nck

Where it can be, the gradient is made in the forward pass, from logits that are there anyway (three
products instead of four), for an upstream gradient of 1; ``linear_cross_entropy_scale_`` multiplies
it by the true one. ``linear_cross_entropy_backward`` makes the logits again: for ``"none"``, whose
rows have a gradient each; for float16, which has no room below a gradient that a loss scale has yet
to lift; for a second backward.

Raw ops compute the loss in float32 (float64 for float64), and take class weights and upstream
gradients in that dtype. On a CPU the kernel is ``csrc/cpu/linear_cross_entropy.cpp``; on a GPU
chunks of rows go through torch's product and the raw ops of cross_entropy, below.

The idea of chunks, with the gradient made in the forward pass: Hsu et al., Liger Kernel, 2024.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.common import (
    DTYPES,
    active_transform,
    autocast_dtype,
    is_batched,
    not_differentiable,
    unfit,
    wanted_ones,
)
from dlkernels.ops.cross_entropy import (
    REDUCTIONS,
    check_extras,
    cross_entropy_gradients,
    cross_entropy_reference,
    setting_of_torchs,
)

_OP = "linear_cross_entropy"
_OPTIONS_CLASS = "LinearCrossEntropyOptions"
_CHUNK = 2**28  # logits of a chunk on a GPU

# Below this many multiply-adds on a CPU stock is done before our way through Python, of 100 µs
# (benchmarks: "what calling costs").
_SMALL = 2**21

_BY_CHUNKS = "chunks of rows: torch does the product, our cross_entropy the rest"
_TORCH_BACKWARD = "covered; the backward in torch ops, for the gradient of the probabilities"

# ------------------------------------------------------------------------------------------ schemas

_OPTIONS = "int reduction, int ignore_index, float label_smoothing, float softcap, float z_loss"
_INPUTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    f" {_OPTIONS}, bool want_input, bool want_weight, bool want_bias"
)
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"

# target: (N, K), or probabilities (N, C, K) of the input's dtype. weight: (C), of the loss' dtype.
# A gradient that is not wanted comes back as an empty tensor of shape (0).
for _schema in (
    f"linear_cross_entropy({_INPUTS}) -> (Tensor loss, {_GRADIENTS})",
    f"linear_cross_entropy_backward(Tensor grad_loss, {_INPUTS}) -> ({_GRADIENTS})",
    "linear_cross_entropy_scale_(Tensor(a!) grad_input, Tensor(b!) grad_weight,"
    " Tensor(c!) grad_bias, Tensor grad_loss) -> ()",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def _exact(dtype):
    """The dtype of losses, class weights and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _new_gradients(input, linear_weight, linear_bias, want_input, want_weight, want_bias):
    like = linear_weight
    return (
        input.new_empty(input.shape if want_input else 0),
        input.new_empty(like.shape if want_weight else 0),
        input.new_empty(like.shape[:2] if want_bias and linear_bias is not None else 0),
    )


@torch.library.register_fake("dlkernels::linear_cross_entropy")
def _(input, linear_weight, linear_bias, target, weight, reduction, *arguments):
    shape = (input.shape[0], linear_weight.shape[1]) if reduction == 0 else ()
    loss = input.new_empty(shape, dtype=_exact(input.dtype))
    return loss, *_new_gradients(input, linear_weight, linear_bias, *arguments[-3:])


@torch.library.register_fake("dlkernels::linear_cross_entropy_backward")
def _(grad_loss, input, linear_weight, linear_bias, *arguments):
    return _new_gradients(input, linear_weight, linear_bias, *arguments[-3:])


@torch.library.register_fake("dlkernels::linear_cross_entropy_scale_")
def _(grad_input, grad_weight, grad_bias, grad_loss):
    return None


# ---------------------------------------------------------------------------------------- reference


def _logits(input, linear_weight, linear_bias):
    classes, positions, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(classes * positions)
    flat = F.linear(input, linear_weight.reshape(classes * positions, features), bias)
    return flat.view(input.shape[0], classes, positions)


def linear_cross_entropy_reference(
    input, linear_weight, linear_bias, target, weight, reduction, *options
):
    """The definition, in torch ops, on the shapes of the raw ops: the loss, differentiable any
    number of times."""
    exact = _exact(input.dtype)
    logits = _logits(input, linear_weight, linear_bias).to(exact)
    target = target.to(exact) if target.is_floating_point() else target
    return cross_entropy_reference(logits, target, weight, reduction, *options)[0]


# ----------------------------------------------------------------------------------------- backward


def _save(ctx, inputs, ahead, gradients):
    input, linear_weight, linear_bias, target, weight, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.ahead = ahead
    ctx.wants = (*ctx.needs_input_grad[:2], linear_bias is not None and ctx.needs_input_grad[2])
    ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, *gradients)


def _backward(ctx, grad_loss, inputs):
    """(gradients of input, weight, bias; of the target) by the kernel, in one more pass over the
    logits; in torch ops where they are differentiated again."""
    want_target = inputs[3].is_floating_point() and ctx.needs_input_grad[3]
    if torch.is_grad_enabled() or want_target or is_batched(grad_loss):
        return _gradients(ctx, grad_loss, *inputs, want_target)
    with torch._C._AutoDispatchBelowAutograd():
        gradients = _ops.linear_cross_entropy_backward(
            grad_loss.contiguous(), *inputs, *ctx.options, *ctx.wants
        )
    return wanted_ones(gradients, ctx.wants), None


def _gradients(ctx, grad_loss, input, linear_weight, linear_bias, target, weight, want_target):
    """The formulas at the head of this file, in torch ops."""
    classes, positions, features = linear_weight.shape
    exact = _exact(input.dtype)
    logits = _logits(input, linear_weight, linear_bias).to(exact)
    masses = target.to(exact) if target.is_floating_point() else target
    grad_logits, grad_target = cross_entropy_gradients(
        ctx.options, logits, masses, weight, grad_loss, None, want_target
    )
    dz = grad_logits.to(input.dtype).reshape(input.shape[0], classes * positions)
    of_input, of_weight, of_bias = ctx.wants
    gradients = (
        dz.matmul(linear_weight.reshape(classes * positions, features)) if of_input else None,
        dz.t().matmul(input).view(classes, positions, features) if of_weight else None,
        dz.sum(0).view(classes, positions) if of_bias else None,
    )
    return gradients, None if grad_target is None else grad_target.to(target.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss. With ``ahead`` the gradients for an upstream gradient of 1 are made in the forward
    pass and handed out by the first backward; a second one repeats the forward: the same bits."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, options, ahead):
        inputs = (input, linear_weight, linear_bias, target, weight)
        _save(ctx, (*inputs, *options), ahead, ())
        wants = ctx.wants if ahead else (False, False, False)
        with torch._C._AutoDispatchBelowAutograd():
            loss, *gradients = _ops.linear_cross_entropy(*inputs, *options, *wants)
        if ahead:
            ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * 7
        # saved_tensors raises if the graph was freed or an input was changed in place.
        inputs = ctx.saved_tensors
        if not ctx.ahead or torch.is_grad_enabled() or is_batched(grad_loss):
            gradients, grad_target = _backward(ctx, grad_loss, inputs)
            return *gradients, grad_target, None, None, None
        # One dictionary operation, so that of two threads only one gets them.
        gradients = vars(ctx).pop("gradients", None)
        with torch._C._AutoDispatchBelowAutograd():
            if gradients is None:
                _, *gradients = _ops.linear_cross_entropy(*inputs, *ctx.options, *ctx.wants)
            _ops.linear_cross_entropy_scale_(*gradients, grad_loss)
        return *wanted_ones(gradients, ctx.wants), None, None, None, None


# The public op: functional, for export, opcheck and compile. With a gradient wanted from it, it is
# one made ahead.


def _setup_context(ctx, inputs, output):
    *inputs, want_input, want_weight, want_bias = inputs
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    _save(ctx, inputs, False, gradients)
    made = want_input, want_weight, want_bias
    ctx.ahead = all(is_made for is_made, want in zip(made, ctx.wants, strict=True) if want)


def _backward_of_op(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 13
    *inputs, grad_input, grad_weight, grad_bias = ctx.saved_tensors
    if not ctx.ahead or torch.is_grad_enabled() or is_batched(grad_loss):
        gradients, grad_target = _backward(ctx, grad_loss, inputs)
        return *gradients, grad_target, *(None,) * 9
    factor = grad_loss.reshape(1)  # a scalar would be rounded to the gradients' dtype first
    gradients = (
        g.mul(factor).to(g.dtype) if want else None
        for g, want in zip((grad_input, grad_weight, grad_bias), ctx.wants, strict=True)
    )
    return *gradients, *(None,) * 10


torch.library.register_autograd(
    "dlkernels::linear_cross_entropy", _backward_of_op, setup_context=_setup_context
)
not_differentiable(_OP, "linear_cross_entropy_backward")


# ---------------------------------------------------------------------------------------- on a GPU


def _chunk_rows(input, linear_weight):
    logits = max(1, linear_weight.shape[0] * linear_weight.shape[1])
    rows = max(1, _CHUNK // logits)
    return 2 ** int(math.log2(rows)) if rows < input.shape[0] else max(1, input.shape[0])


def _add_product(total, a, b):
    """total + a·b, in the dtype of total: float32 for products of 16 bits."""
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _in_half(of_rows, of_sums):
    """An upstream gradient, the product of the two, shared out so that float16 holds the gradient
    of the logits: what lifts that, as a loss scale does, is the rows', and a factor of the sums
    what would overflow. One of the two is given, the other 1. Powers of two move: nothing rounds.
    """
    room = 12  # 2^12 leaves 2^4 for class weights and z_loss
    if of_sums is None:
        _, exponent = torch.frexp(of_rows.abs().amax())
        of_sums = torch.ldexp(of_rows.new_ones(()), (exponent - room).clamp(min=0))
        return of_rows / of_sums, of_sums
    _, exponent = torch.frexp(of_sums)
    of_rows = torch.ldexp(of_sums.new_ones(()), (exponent - 1).clamp(0, room))
    return of_rows, of_sums / of_rows


def _by_chunks(grad_loss, input, linear_weight, linear_bias, target, weight, options, wants):
    """(loss, gradients of input, weight, bias), a chunk of rows after the other, for an upstream
    gradient, or 1. Logits are of the input's dtype, as a linear layer's are.

    Rows have upstream gradient 1, or their own with reduction "none"; what all share multiplies the
    sums at the end, in float32. Of float16 both are ``_in_half``'s.
    """
    reduction, *others = options
    classes, positions, features = linear_weight.shape
    exact = _exact(input.dtype)
    per_row = (0, *others)  # reduction "none"
    flat = linear_weight.reshape(classes * positions, features)
    if weight is not None:
        weight = weight.to(input.dtype)
    loss = input.new_empty((input.shape[0], positions), dtype=exact)
    of_sums = loss.new_ones(()) if grad_loss is None else grad_loss
    of_rows, divisor = None, None
    if reduction == 0:
        of_rows, of_sums = of_sums.expand_as(loss), None
    elif reduction == 1:
        divisor, counted = _divisor(target, weight, others[0], loss)
        of_sums = (of_sums / divisor).where(counted > 0, 0)
    if input.dtype == torch.float16 and any(wants) and loss.numel():
        of_rows, of_sums = _in_half(of_rows, of_sums)
    grad_input, _, grad_bias = _new_gradients(input, linear_weight, linear_bias, *wants)
    bias_sum = grad_bias.new_zeros(grad_bias.numel(), dtype=exact)
    weight_sum = input.new_zeros(flat.shape if wants[1] else 0, dtype=exact)
    rows = _chunk_rows(input, linear_weight)
    for at in range(0, input.shape[0], rows):
        part = slice(at, at + rows)
        x, y = input[part], target[part].contiguous()
        z = _logits(x, linear_weight, linear_bias)
        some_loss, lse, total = _ops.cross_entropy_forward(z, y, weight, *per_row)
        loss[part] = some_loss
        if not any(wants):
            continue
        upstream = torch.ones_like(some_loss)
        if of_rows is not None:
            upstream.copy_(of_rows[part] if reduction == 0 else of_rows)
        dz = _ops.cross_entropy_backward(upstream, None, z, y, weight, lse, total, *per_row)
        dz = dz.view(x.shape[0], classes * positions)
        if wants[0]:
            torch.mm(dz, flat, out=grad_input[part])
        if wants[1]:
            weight_sum = _add_product(weight_sum, dz.t(), x)
        if bias_sum.numel():
            bias_sum += dz.sum(0, dtype=exact)
    grad_weight = weight_sum.view(linear_weight.shape if wants[1] else 0)
    grad_bias = bias_sum.view(grad_bias.shape)
    if of_sums is not None and any(wants):
        for gradient in (grad_input, grad_weight, grad_bias):
            gradient.mul_(of_sums.reshape(1))
    if reduction != 0:
        loss = loss.sum()
        loss = loss if divisor is None else loss / divisor
    return loss, grad_input, grad_weight.to(input.dtype), grad_bias.to(input.dtype)


def _divisor(target, weight, ignore_index, like):
    """What "mean" divides by, and how many rows count, as tensors: nothing waits for the GPU."""
    if target.is_floating_point():
        rows = like.new_tensor(target.shape[0] * target.shape[2])
        return rows, rows
    kept = target != ignore_index
    counted = kept.sum()
    if weight is None:
        return counted.to(like.dtype), counted
    return weight[target.long().where(kept, 0)].to(like.dtype).where(kept, 0).sum(), counted


@torch.library.impl("dlkernels::linear_cross_entropy", "CUDA")
def _(input, linear_weight, linear_bias, target, weight, *arguments):
    inputs = (input, linear_weight, linear_bias, target, weight)
    return _by_chunks(None, *inputs, arguments[:5], arguments[5:])


@torch.library.impl("dlkernels::linear_cross_entropy_backward", "CUDA")
def _(grad_loss, input, linear_weight, linear_bias, target, weight, *arguments):
    inputs = (input, linear_weight, linear_bias, target, weight)
    return _by_chunks(grad_loss, *inputs, arguments[:5], arguments[5:])[1:]


@torch.library.impl("dlkernels::linear_cross_entropy_scale_", "CUDA")
def _(grad_input, grad_weight, grad_bias, grad_loss):
    for gradient in (grad_input, grad_weight, grad_bias):
        gradient.mul_(grad_loss.reshape(1))


# ------------------------------------------------------------------------------------------- choice


class _Call(NamedTuple):
    """The arguments of torch's function, by its names and in its order."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: str
    ignore_index: int | None
    label_smoothing: float
    options: object


def _check_stocks(input, linear_weight, target, linear_bias, ignore_index):
    """Raises what torch raises before its product; torch below 2.13 has no such function."""
    if input.dim() not in (1, 2):
        raise RuntimeError(f"{_OP}: expected input of 1 or 2 dimensions, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{_OP}: expected linear_weight of at least 2 dimensions, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"{_OP}: expected as many features in input as in linear_weight,"
            f" got {input.shape[-1]} and {linear_weight.shape[-1]}"
        )
    outputs = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != outputs:
        raise RuntimeError(
            f"{_OP}: expected linear_bias of shape {outputs}, got {tuple(linear_bias.shape)}"
        )
    if input.dim() == 1 and linear_weight.dim() > 2:
        raise RuntimeError(
            f"{_OP}: linear_weight of shape {tuple(linear_weight.shape)} needs input of 2"
            f" dimensions, got {tuple(input.shape)}"
        )
    if ignore_index is not None and target.shape == (*input.shape[:-1], *outputs):
        raise RuntimeError(f"{_OP}: probabilities as targets have no ignore_index")


def _stock(call):
    """torch's function; where torch has none, what it does without ``options``."""
    if function := getattr(F, "linear_cross_entropy", None):
        return function(*call[:3], **dict(zip(_Call._fields[3:], call[3:], strict=True)))
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, smoothing, _ = call
    arguments = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    _check_stocks(input, linear_weight, target, linear_bias, ignore_index)
    outputs = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.reshape(*input.shape[:-1], *outputs)
    if ignore_index is not None:
        arguments["ignore_index"] = ignore_index
    return F.cross_entropy(logits, target, **arguments)


def _refuse_as_stock(call, refusal):
    """Raises what torch raises. Where we have no ``refusal`` a target out of range is left, for
    which its product may be one of no features."""
    if refusal is not None:
        _stock(call)
        return
    with torch.no_grad():
        input, linear_weight = call.input[..., :0], call.linear_weight[..., :0]
        _stock(call._replace(input=input, linear_weight=linear_weight, options=None))


def _refusal(call):
    """Why our kernels do not take these arguments: torch refuses them, or only torch can."""
    input, linear_weight, target, linear_bias, weight, *settings, options = call
    reduction, ignore_index, smoothing = settings
    if reason := unfit((input, linear_weight, target, linear_bias, weight)):
        return reason
    device = input.device.type
    index = -100 if ignore_index is None else ignore_index
    if setting := setting_of_torchs(reduction, index, smoothing):
        return setting
    if options is not None and type(options) is not getattr(torch.nn, _OPTIONS_CLASS, None):
        return f"options of {type(options).__name__}"
    if input.dim() not in (1, 2) or linear_weight.dim() < 2:
        return f"linear_weight of {tuple(linear_weight.shape)} for input of {tuple(input.shape)}"
    outputs = linear_weight.shape[:-1]
    if (
        input.shape[-1] != linear_weight.shape[-1]
        or outputs[0] == 0
        or (input.dim() == 1 and len(outputs) > 1)
    ):
        return f"linear_weight of {tuple(linear_weight.shape)} for input of {tuple(input.shape)}"
    if linear_bias is not None and linear_bias.shape != outputs:
        return f"linear_bias of shape {tuple(linear_bias.shape)}"
    dtype = autocast_dtype(input, device)
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and autocast_dtype(tensor, device) != dtype:
            return f"{name} of {tensor.dtype} beside input of {input.dtype}"
    autocast = torch.is_autocast_enabled(device)
    if weight is not None and (
        weight.requires_grad
        or weight.shape != outputs[:1]
        or (weight.dtype != input.dtype and not autocast)
    ):
        return f"weight of {weight.dtype} and shape {tuple(weight.shape)}"
    rows = input.shape[:-1]
    if target.dtype in (torch.int64, torch.uint8):
        if target.shape != (*rows, *outputs[1:]):
            return f"target of shape {tuple(target.shape)} for input of {tuple(input.shape)}"
    elif target.dtype != input.dtype and not (autocast and target.is_floating_point()):
        return f"target of {target.dtype} beside input of {input.dtype}"
    elif target.shape != (*rows, *outputs):
        return f"target of shape {tuple(target.shape)} for input of {tuple(input.shape)}"
    elif ignore_index is not None:
        return "ignore_index with probabilities"
    return None


def _is_small(input, linear_weight):
    """Whether stock would be done before our way through Python. A traced size is not asked."""
    if config.forced() != "auto" or torch.compiler.is_compiling() or input.dim() == 0:
        return False
    rows = input.numel() // max(1, input.shape[-1])
    return input.is_cpu and rows * linear_weight.numel() < _SMALL


def _choose(input, target, refusal, extras):
    """(kernel, reason). "reference" is the definition in torch ops, for what stock lacks."""
    torchs = "reference" if extras else "stock"
    if transform := active_transform():
        return torchs, transform
    if config.forced() == "stock":
        return torchs, "dlkernels.config.kernels is 'stock'"
    if refusal is not None:
        return torchs, refusal
    if torch.compiler.is_compiling():
        return "own", "covered"
    if target.requires_grad and torch.is_grad_enabled():
        return config.owner(input.device.type), _TORCH_BACKWARD
    return config.owner(input.device.type), _BY_CHUNKS if input.is_cuda else "covered"


# ------------------------------------------------------------------------------------------- public


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without the logits.

    The signature is that of ``torch.nn.functional.linear_cross_entropy`` (torch 2.13; here from
    2.11 on), and ``softcap`` and ``z_loss``.

    Args:
        input: (D) or (N, D), in any strides; float32, float64, bfloat16 or float16, computed in
            float32 (float64 for float64), the sums of the weight's gradient too.
        linear_weight: (C, D), or (C, d1, …, dk, D) for a loss of k dimensions, of the input's
            dtype.
        target: class indices in int64 or uint8, () or (N) or (N, d1, …, dk); or probabilities of
            the input's dtype, (C) or (N, C) or (N, C, d1, …, dk).
        linear_bias: of the shape of ``linear_weight`` without D, of the input's dtype.
        weight: (C), of the input's dtype: a factor for each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: a target that counts neither in the loss nor in the gradient; -100 where None.
            Indices only.
        label_smoothing: in [0, 1]: how much of the target is spread over all classes.
        options: a ``torch.nn.LinearCrossEntropyOptions``, which torch's chunks go by where torch
            computes; ours are chosen by shape, and all of autograd works on them.
        softcap: a positive cap: the logits become cap·tanh(logits / cap) before anything else.
        z_loss: coefficient of lse² in each row's loss, within the reduction; 0 at ignored rows.

    Returns:
        The loss, of the shape of index targets for ``"none"``, else a scalar; of the input's dtype;
        under autocast, in which the product is of autocast's, of float32.

    Raises:
        What torch raises: RuntimeError for shapes and dtypes, IndexError for a target out of range,
        ValueError for a batch that does not match. ValueError for softcap ≤ 0 or z_loss < 0.
        NotImplementedError under ``dlkernels.config.kernels = "own"``, where there is no kernel of
        ours.
    """
    call = _Call(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        options,
    )
    extras = softcap is not None or z_loss != 0.0
    if extras:
        check_extras(_OP, softcap, z_loss)
    if not all(isinstance(tensor, Tensor) for tensor in (input, linear_weight, target)):
        return _stock(call)  # a TypeError of torch's
    if not extras and _is_small(input, linear_weight):
        config.record(_OP, "stock", "too small for our call overhead")
        return _stock(call)
    refusal = _refusal(call)
    if refusal is not None and config.forced() == "own" and active_transform() is None:
        _stock(call)  # bad input is torch's to refuse
        raise NotImplementedError(f"{_OP}: no kernel of ours: {refusal}")
    kernel, reason = _choose(input, target, refusal, extras)
    config.record(_OP, kernel, reason)
    if kernel == "stock":
        return _stock(call)
    if kernel == "reference":
        _refuse_as_stock(call, refusal)

    device, dtype, probabilities = input.device.type, input.dtype, target.is_floating_point()
    if torch.is_autocast_enabled(device):
        # Probabilities are not rounded to autocast's dtype: all is in float32.
        product = _exact(dtype) if probabilities else autocast_dtype(input, device)
        dtype = _exact(dtype)
        input, linear_weight = input.to(product), linear_weight.to(product)
        linear_bias = None if linear_bias is None else linear_bias.to(product)
        target = target.to(product) if probabilities else target
    rows, outputs = input.shape[:-1], linear_weight.shape[:-1]
    positions = math.prod(outputs[1:])
    n = math.prod(rows)
    arguments = (
        input.reshape(n, input.shape[-1]),
        linear_weight.reshape(outputs[0], positions, linear_weight.shape[-1]),
        None if linear_bias is None else linear_bias.reshape(outputs[0], positions),
        target.reshape(n, outputs[0], positions) if probabilities else target.reshape(n, positions),
        None if weight is None else weight.to(_exact(input.dtype)),
    )
    choice = (
        REDUCTIONS[reduction],
        -100 if ignore_index is None else ignore_index,
        float(label_smoothing),
        float(softcap or 0.0),
        float(z_loss),
    )
    loss = _compute(kernel, arguments, choice)
    return loss.reshape((*rows, *outputs[1:])).to(dtype) if choice[0] == 0 else loss.to(dtype)


def _compute(kernel, arguments, options):
    input, linear_weight, linear_bias, target, weight = arguments
    if kernel == "reference":
        return linear_cross_entropy_reference(*arguments, *options)
    inputs = (input, linear_weight, linear_bias)
    grad = torch.is_grad_enabled()
    wants = tuple(grad and tensor is not None and tensor.requires_grad for tensor in inputs)
    ahead = any(wants) and options[0] != 0 and input.dtype != torch.float16
    ahead = ahead and not target.requires_grad
    if torch.compiler.is_compiling():
        wants = wants if ahead else (False, False, False)
        return _ops.linear_cross_entropy(*arguments, *options, *wants)[0]
    if any(wants) or (grad and target.requires_grad):
        return _LinearCrossEntropy.apply(*arguments, options, ahead)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.linear_cross_entropy(*arguments, *options, False, False, False)[0]

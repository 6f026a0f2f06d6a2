"""Softmax cross-entropy with soft-capping, z-loss and the log-sum-exp.

Per row of logits x with target y (or probabilities t), class weights w and C classes::

    x'   = softcap·tanh(x / softcap)                        (x where softcap is None)
    lse  = log Σ_c exp(x'_c)
    loss = (1-ε)·w_y·(lse - x'_y) + ε/C·Σ_c w_c·(lse - x'_c) + z_loss·lse²     class indices
    loss = Σ_c w_c·((1-ε)·t_c + ε/C)·(lse - x'_c) + z_loss·lse²                probabilities

``mean`` divides the sum by Σ w_y over the rows that are not ignored (indices) or by the number of
rows (probabilities). An ignored row has loss 0, z-loss included, and gradient 0.

Raw ops: ``cross_entropy_forward`` reads the logits once and returns what the backward needs;
``cross_entropy_forward_backward`` also writes the gradient for an upstream gradient of 1 while a
row is in cache, which ``cross_entropy_scale_`` then multiplies by the true one;
``cross_entropy_backward`` makes it from the logits and the log-sum-exp, for any upstream gradient.
The log-sum-exp is saved in float64: rounded to float32 it would be the gradient's largest error.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.common import DTYPES, active_transform, is_batched, not_differentiable, unfit

_OP = "cross_entropy"
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

_TORCH_BACKWARD = "covered; the backward in torch ops, for the gradient of the probabilities"

# Below this many logits on a CPU stock is faster than our way through Python (benchmarks: "dispatch
# cost"). On a GPU its many launches cost more.
_SMALL = 2048

# ------------------------------------------------------------------------------------------ schemas

_OPTIONS = "int reduction, int ignore_index, float label_smoothing, float softcap, float z_loss"
_INPUTS = f"Tensor input, Tensor target, Tensor? weight, {_OPTIONS}"

for _schema in (
    f"cross_entropy({_INPUTS}) -> (Tensor loss, Tensor lse, Tensor total_weight)",
    f"cross_entropy_forward({_INPUTS}) -> (Tensor loss, Tensor lse, Tensor total_weight)",
    f"cross_entropy_forward_backward({_INPUTS})"
    " -> (Tensor loss, Tensor lse, Tensor total_weight, Tensor grad_input)",
    "cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, Tensor input, Tensor target,"
    f" Tensor? weight, Tensor lse, Tensor total_weight, {_OPTIONS}) -> Tensor",
    "cross_entropy_scale_(Tensor(a!) gradient, Tensor grad_loss) -> ()",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def _row_shape(input: Tensor) -> list:
    return [size for d, size in enumerate(input.shape) if d != (1 if input.dim() > 1 else 0)]


@torch.library.register_fake("dlkernels::cross_entropy")
@torch.library.register_fake("dlkernels::cross_entropy_forward")
def _(input, target, weight, reduction, ignore_index, label_smoothing, softcap, z_loss):
    rows = _row_shape(input)
    loss = input.new_empty(rows if reduction == 0 else ())
    return (
        loss,
        input.new_empty(rows, dtype=torch.float64),
        input.new_empty((), dtype=torch.float64),
    )


@torch.library.register_fake("dlkernels::cross_entropy_forward_backward")
def _(input, *arguments):
    return *_ops.cross_entropy_forward(input, *arguments), torch.empty_like(input)


@torch.library.register_fake("dlkernels::cross_entropy_backward")
def _(grad_loss, grad_lse, input, *arguments):
    return torch.empty_like(input)


@torch.library.register_fake("dlkernels::cross_entropy_scale_")
def _(gradient, grad_loss):
    return None


# ---------------------------------------------------------------------------------------- reference


def cross_entropy_reference(
    input, target, weight, reduction, ignore_index, label_smoothing, softcap, z_loss
):
    """The definition, in torch ops: (loss, lse), differentiable any number of times."""
    class_dim = 1 if input.dim() > 1 else 0
    dtype, input, target, weight = input.dtype, *_computed(input, target, weight)
    x = softcap * torch.tanh(input / softcap) if softcap else input
    lse = torch.logsumexp(x, class_dim)
    mass, kept, denominator = _mass(x, target, weight, ignore_index, label_smoothing)
    loss = (mass * (lse.unsqueeze(class_dim) - x)).sum(class_dim)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if kept is not None:
        loss = loss.where(kept, 0)
    if reduction != 0:
        loss = loss.sum() / denominator if reduction == 1 else loss.sum()
    return loss.to(dtype), lse


def _computed(*tensors):
    """Half types are computed in float32."""
    half = (torch.bfloat16, torch.float16)
    return [t if t is None or t.dtype not in half else t.float() for t in tensors]


def _along_classes(x, weight):
    """The class weights, ones without any, in a shape that broadcasts against x."""
    if weight is None:
        return torch.ones([1] * x.dim(), dtype=x.dtype, device=x.device)
    return weight.view([-1 if d == (1 if x.dim() > 1 else 0) else 1 for d in range(x.dim())])


def _mass(x, target, weight, ignore_index, label_smoothing):
    """What each class weighs in a row's loss, which rows count, and the divisor of the mean."""
    class_dim = 1 if x.dim() > 1 else 0
    classes = x.shape[class_dim]
    w = _along_classes(x, weight)
    if target.is_floating_point():
        mass = w * (target * (1 - label_smoothing) + label_smoothing / classes)
        return mass, None, x.numel() // classes
    kept = target != ignore_index
    safe = target.long().where(kept, 0).unsqueeze(class_dim)
    hit = torch.zeros_like(x).scatter(class_dim, safe, 1)
    mass = w * (hit * (1 - label_smoothing) + label_smoothing / classes)
    return mass, kept, (w * hit).sum(class_dim).where(kept, 0).sum()


# ----------------------------------------------------------------------------------------- backward


def _backward(ctx, grad_loss, grad_lse):
    """(grad_input, grad_target) by the kernel; in torch ops where it is differentiated again."""
    input, target, weight, lse, total_weight = ctx.saved_tensors
    if grad_loss is None and grad_lse is None:
        return None, None
    probabilities = target.is_floating_point()
    want_target = probabilities and ctx.needs_input_grad[1]
    if torch.is_grad_enabled() or want_target or is_batched(grad_loss) or is_batched(grad_lse):
        return cross_entropy_gradients(
            ctx.options, input, target, weight, grad_loss, grad_lse, want_target
        )
    if grad_loss is None:
        shape = lse.shape if ctx.options[0] == 0 else ()
        grad_loss = input.new_zeros(shape)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.cross_entropy_backward(
            grad_loss.contiguous(), grad_lse, input, target, weight, lse, total_weight, *ctx.options
        ), None


def cross_entropy_gradients(options, input, target, weight, grad_loss, grad_lse, want_target):
    """d loss / d x'_c = p_c·(Σ_k s_k + 2·z·lse) - s_c for the mass s of ``_mass``; torch ops."""
    reduction, ignore_index, label_smoothing, softcap, z_loss = options
    class_dim = 1 if input.dim() > 1 else 0
    dtype = input.dtype
    input, target, weight, grad_loss = _computed(input, target, weight, grad_loss)
    x = softcap * torch.tanh(input / softcap) if softcap else input
    lse = torch.logsumexp(x, class_dim, keepdim=True)
    p = torch.exp(x - lse)
    mass, kept, denominator = _mass(x, target, weight, ignore_index, label_smoothing)
    grad_x = torch.zeros_like(x)
    grad_target = None
    if grad_loss is not None:
        if reduction == 1:
            grad_loss = grad_loss / denominator
        row = grad_loss.unsqueeze(class_dim) if reduction == 0 else grad_loss
        if kept is not None:
            row = kept.unsqueeze(class_dim) * row
        total = mass.sum(class_dim, keepdim=True)
        if want_target:
            w = _along_classes(x, weight)
            grad_target = (row * w * (1 - label_smoothing) * (lse - x)).to(dtype)
        grad_x = row * (p * (total + 2 * z_loss * lse) - mass)
    if grad_lse is not None:
        grad_x = grad_x + grad_lse.unsqueeze(class_dim).to(x.dtype) * p
    if softcap:
        grad_x = grad_x * (1 - (x / softcap).square())
    return grad_x.to(dtype), grad_target


class _CrossEntropy(torch.autograd.Function):
    """(loss, lse). With ``ahead`` the gradient for an upstream gradient of 1 is made in the forward
    pass and handed out by the first backward; a second one repeats the forward: the same bits."""

    @staticmethod
    def forward(ctx, input, target, weight, options, ahead):
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            if ahead:
                loss, lse, total, ctx.gradient = _ops.cross_entropy_forward_backward(
                    input, target, weight, *options
                )
            else:
                loss, lse, total = _ops.cross_entropy_forward(input, target, weight, *options)
        ctx.save_for_backward(input, target, weight, lse, total)
        ctx.options, ctx.ahead = options, ahead
        return loss, lse

    @staticmethod
    def backward(ctx, grad_loss, grad_lse):
        again = torch.is_grad_enabled() or is_batched(grad_loss)
        if not ctx.ahead or grad_loss is None or grad_lse is not None or again:
            return *_backward(ctx, grad_loss, grad_lse), None, None, None
        # saved_tensors raises if the graph was freed or an input was changed in place.
        inputs = ctx.saved_tensors[:3]
        # One dictionary operation, so that of two threads only one gets it.
        gradient = vars(ctx).pop("gradient", None)
        with torch._C._AutoDispatchBelowAutograd():
            if gradient is None:
                gradient = _ops.cross_entropy_forward_backward(*inputs, *ctx.options)[3]
            _ops.cross_entropy_scale_(gradient, grad_loss)
        return gradient, None, None, None, None


# The public op: functional, for export, opcheck and compile.


def _setup_context(ctx, inputs, output):
    input, target, weight, *ctx.options = inputs
    _, lse, total = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(total)
    ctx.save_for_backward(input, target, weight, lse, total)


def _backward_of_op(ctx, grad_loss, grad_lse, grad_total):
    return *_backward(ctx, grad_loss, grad_lse), None, None, None, None, None, None


torch.library.register_autograd(
    "dlkernels::cross_entropy", _backward_of_op, setup_context=_setup_context
)


not_differentiable(
    _OP, "cross_entropy_forward", "cross_entropy_forward_backward", "cross_entropy_backward"
)


# ------------------------------------------------------------------------------------------- choice


def check_extras(op, softcap, z_loss):
    """Refuses, with a ValueError, what is no softcap or z_loss."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive or None, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss must not be negative, got {z_loss}")


def setting_of_torchs(reduction, ignore_index, label_smoothing):
    """Names the setting that only torch can take or refuse; None where there is none."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        return f"reduction {reduction!r}"
    if not isinstance(ignore_index, int) or type(ignore_index) is bool:
        return f"ignore_index {ignore_index!r}"
    if not isinstance(label_smoothing, int | float) or not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing {label_smoothing!r}"
    return None


def _refusal(input, target, weight, reduction, ignore_index, label_smoothing):
    """Why our kernels do not take these arguments: torch refuses them, or only torch can."""
    if reason := unfit((input, target, weight)):
        return reason
    if setting := setting_of_torchs(reduction, ignore_index, label_smoothing):
        return setting
    if input.dtype not in DTYPES:
        return f"no kernel for {input.dtype}"
    class_dim = 1 if input.dim() > 1 else 0
    if input.dim() == 0 or input.shape[class_dim] == 0:
        return f"input of shape {tuple(input.shape)}"
    if weight is not None and (
        weight.requires_grad or weight.dim() != 1 or weight.shape[0] != input.shape[class_dim]
    ):
        return f"weight of shape {tuple(weight.shape)}, requires_grad={weight.requires_grad}"
    autocast = torch.is_autocast_enabled(input.device.type)
    if weight is not None and weight.dtype != input.dtype and not autocast:
        return f"weight of {weight.dtype} beside input of {input.dtype}"
    if target.dtype == torch.int64 or target.dtype == torch.uint8:
        if target.dim() != max(input.dim() - 1, 0):
            return f"target of shape {tuple(target.shape)} for input of {tuple(input.shape)}"
        wanted = [size for d, size in enumerate(input.shape) if d != class_dim]
        if list(target.shape) != wanted:
            return f"target of shape {tuple(target.shape)} for input of {tuple(input.shape)}"
    elif target.dtype != input.dtype and not (autocast and target.is_floating_point()):
        return f"target of {target.dtype} beside input of {input.dtype}"
    elif target.shape != input.shape:
        return f"target of shape {tuple(target.shape)} for input of {tuple(input.shape)}"
    elif ignore_index >= 0:
        return "ignore_index with probabilities"
    return None


def _is_small(input):
    """Whether stock would be done before our way through Python. A traced size is not asked."""
    if config.forced() != "auto" or torch.compiler.is_compiling():
        return False
    return isinstance(input, Tensor) and input.is_cpu and input.numel() < _SMALL


def _choose(input, target, weight, reduction, ignore_index, label_smoothing, extras):
    """(kernel, reason). "reference" is the definition in torch ops, for what stock lacks."""
    torchs = "reference" if extras else "stock"
    if transform := active_transform():
        return torchs, transform
    kernels = config.forced()
    if kernels == "stock":
        return torchs, "dlkernels.config.kernels is 'stock'"
    refusal = _refusal(input, target, weight, reduction, ignore_index, label_smoothing)
    if refusal is not None:
        if kernels == "own":
            stock = (input, target, weight, None, ignore_index, None, reduction, label_smoothing)
            F.cross_entropy(*stock)  # bad input is torch's to refuse
            raise NotImplementedError(f"cross_entropy: no kernel of ours: {refusal}")
        return torchs, refusal
    if torch.compiler.is_compiling():
        return "own", "covered"
    if target.requires_grad and torch.is_grad_enabled():
        return config.owner(input.device.type), _TORCH_BACKWARD
    return config.owner(input.device.type), "covered"


def _upcast(tensor):
    """Autocast computes a loss in float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------- public


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.functional.cross_entropy``, one read of the logits and one write of the gradient.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, …, dk), in any strides; float32, float64, bfloat16
            or float16, computed in float32 (float64 for float64).
        target: class indices in int64 or uint8, of the input's shape without C; or probabilities of
            the input's shape and dtype.
        weight: (C), of the input's dtype: a factor for each class.
        size_average, reduce: deprecated, as in torch.
        ignore_index: a target that counts neither in the loss nor in the gradient (indices only).
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1]: how much of the target is spread over all classes.
        softcap: a positive cap: the logits become cap·tanh(input / cap) before anything else.
        z_loss: coefficient of lse² in each row's loss, within the reduction; 0 at ignored rows.
        return_lse: return (loss, lse); lse has the shape of index targets, is float32 (float64 for
            float64), is of the capped logits, and is differentiable.

    Raises:
        What torch raises, with its words: IndexError for a target out of range, ValueError for a
        batch that does not match, RuntimeError for shapes and dtypes, TypeError for no tensor.
        ValueError for softcap ≤ 0 or z_loss < 0.
    """
    extras = softcap is not None or z_loss != 0.0 or return_lse
    if not extras and _is_small(input):
        if config.is_recording():
            config.record(_OP, "stock", "too small for our call overhead")
        if (
            type(input) is Tensor
            and type(target) is Tensor
            and weight is size_average is reduce is None
            and type(reduction) is str
            and reduction in REDUCTIONS
            and not torch._C._is_torch_function_mode_enabled()
        ):  # where F.cross_entropy would end up, so that its price is not paid on top of ours
            return torch._C._nn.cross_entropy_loss(
                input, target, None, REDUCTIONS[reduction], ignore_index, label_smoothing
            )
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    stock = (input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    if extras:
        check_extras(_OP, softcap, z_loss)

    kernel, reason = _choose(
        input, target, weight, reduction, ignore_index, label_smoothing, extras
    )
    config.record(_OP, kernel, reason)
    if kernel == "stock":
        return F.cross_entropy(*stock)
    if kernel == "reference":
        F.cross_entropy(*stock)  # for its refusals

    device = input.device.type
    if torch.is_autocast_enabled(device):
        input, weight = _upcast(input), None if weight is None else _upcast(weight)
        target = _upcast(target) if target.is_floating_point() else target
    options = (
        REDUCTIONS[reduction],
        ignore_index,
        float(label_smoothing),
        float(softcap or 0.0),
        float(z_loss),
    )
    if kernel == "reference":
        outputs = cross_entropy_reference(input, target, weight, *options)
    elif torch.compiler.is_compiling():
        outputs = _ops.cross_entropy(input, target, weight, *options)
    elif torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        # float16 has no room below a gradient that a loss scale has yet to lift.
        ahead = options[0] != 0 and not return_lse and input.dtype != torch.float16
        ahead = ahead and input.requires_grad and not target.requires_grad
        outputs = _CrossEntropy.apply(input, target, weight, options, ahead)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _ops.cross_entropy_forward(input, target, weight, *options)
    if not return_lse:
        return outputs[0]
    return outputs[0], outputs[1].to(torch.promote_types(input.dtype, torch.float32))

"""The linear layer, with an activation in its epilogue.

For input x of shape (…, K), weight W (N, K) and bias b (N)::

    y = f(x·Wᵀ + b)                f: identity, relu, leaky_relu (slope 0.01), tanh or sigmoid
    d = dL/dy · f'                 f' follows from y for each of these: x·Wᵀ + b is not kept
    dL/dx = d·W        dL/dW = Σ_rows dᵀ·x        dL/db = Σ_rows d

Raw ops: ``linear_forward``, and ``linear_backward`` for those of the three gradients that are
wanted. Products are accumulated in float32, in float64 for float64.

On a GPU the product is cuBLAS's. A ReLU goes into its epilogue, where torch offers that.
"""

import math

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
    autocast_dtype,
    before_activation,
    cast,
    is_plain,
    is_torchs,
    keep,
    kept,
    needs_gradient,
    not_differentiable,
    wanted_ones,
)

_OP = "linear"
_CUBLAS = "cuBLAS does the product"

# Below this many multiply-adds stock is done before our way through Python, of 10 µs forward and 50
# with a gradient (benchmarks: "what calling costs"). A compromise: where MKL is at 0.9 of the
# multiply-add peak there is nothing to win that would pay for them before 2^27 (at 2^24 a training
# step of the documented MLPs takes a tenth longer); where it is at a third, 2^22 is enough.
_SMALL = 2**26

# ------------------------------------------------------------------------------------------ schemas

_INPUTS = "Tensor input, Tensor weight, Tensor? bias, str activation"

for _schema in (
    f"linear({_INPUTS}) -> Tensor",
    f"linear_forward({_INPUTS}) -> Tensor",
    # An unwanted gradient comes back as an empty tensor of shape (0). ``output`` is y, wanted for
    # every activation but "none".
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? output,"
    " str activation, bool want_input, bool want_weight, bool want_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


@torch.library.register_fake("dlkernels::linear")
@torch.library.register_fake("dlkernels::linear_forward")
def _(input, weight, bias, activation):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("dlkernels::linear_backward")
def _(grad_output, input, weight, output, activation, want_input, want_weight, want_bias):
    return (
        input.new_empty(input.shape if want_input else 0),
        input.new_empty(weight.shape if want_weight else 0),
        input.new_empty(weight.shape[:1] if want_bias else 0),
    )


# ---------------------------------------------------------------------------------------- reference


def linear_reference(input, weight, bias, activation):
    """The definition, in torch ops: differentiable any number of times."""
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


# ----------------------------------------------------------------------------------------- backward


def _save(ctx, input, weight, output, activation):
    ctx.activation = activation
    keep(ctx, input, weight, output if activation != "none" else None)


def _backward(ctx, grad_output):
    """The three gradients by the kernel; in torch ops where they are differentiated again."""
    if grad_output is None:
        return None, None, None
    input, weight, output = kept(ctx, grad_output)
    wanted = asked_for(ctx)[:3]
    if is_torchs(grad_output) or grad_output.is_cuda:
        return _gradients(grad_output, input, weight, output, ctx.activation, wanted)
    with torch._C._AutoDispatchBelowAutograd():
        gradients = _ops.linear_backward(
            grad_output.contiguous(), input, weight, output, ctx.activation, *wanted
        )
    return wanted_ones(gradients, wanted)


def _gradients(grad_output, input, weight, output, activation, wanted):
    """The formulas at the head of this file, in torch ops."""
    d = before_activation(grad_output, output, activation)
    of_input, of_weight, of_bias = wanted
    rows = math.prod(d.shape[:-1])  # not -1: of no elements it is ambiguous
    flat = d.reshape(rows, d.shape[-1])
    return (
        d.matmul(weight) if of_input else None,
        flat.t().matmul(input.reshape(rows, input.shape[-1])) if of_weight else None,
        flat.sum(0) if of_bias else None,
    )


def _forward(input, weight, bias, activation):
    if input.is_cuda:
        return _relu_by_cublas(input, weight, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.linear_forward(input, weight, bias, activation)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, activation):
        output = _forward(input, weight, bias, activation)
        _save(ctx, input, weight, output, activation)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return *_backward(ctx, grad_output), None


# The public op: functional, for export, opcheck and compile.


def _setup_context(ctx, inputs, output):
    input, weight, _, activation = inputs
    _save(ctx, input, weight, output, activation)


def _backward_of_op(ctx, grad_output):
    return *_backward(ctx, grad_output), None


torch.library.register_autograd("dlkernels::linear", _backward_of_op, setup_context=_setup_context)


not_differentiable(_OP, "linear_forward", "linear_backward")


# ------------------------------------------------------------------------------------------- choice


def _refusal(input, weight, bias):
    """Why our kernels do not take these arguments: torch refuses them, or only torch can."""
    if not (is_plain(input) and is_plain(weight) and (bias is None or is_plain(bias))):
        return "an argument is not a plain dense tensor"
    device = input.device.type
    if device != "cpu":
        return _CUBLAS if device == "cuda" else f"no kernel for device {device}"
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        return "tensors on different devices"
    dtype = autocast_dtype(input, device)
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and autocast_dtype(tensor, device) != dtype:
            return f"{name} of {tensor.dtype} beside input of {input.dtype}"
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        return f"weight of shape {tuple(weight.shape)} for input of {tuple(input.shape)}"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return f"bias of shape {tuple(bias.shape)} for weight of {tuple(weight.shape)}"
    return None


def _is_small(input, weight):
    """Whether stock would be done before our way through Python. A traced size is not asked."""
    if config.forced() != "auto" or torch.compiler.is_compiling():
        return False
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and weight.dim() == 2):
        return False
    return input.is_cpu and input.numel() * weight.shape[0] < _SMALL


def _is_onednns(input):
    """Whether torch's product is the faster: of bfloat16, where the processor multiplies its pairs,
    ours takes 1.05 to 1.2 times oneDNN's time. (Of float16 torch's takes 4 to 100 times ours.)"""
    of_pairs = config.libraries["cpu"] == "avx512bf16"
    return of_pairs and autocast_dtype(input, "cpu") == torch.bfloat16


def _choose(input, weight, bias, activation):
    """(kernel, reason). "reference" is the definition in torch ops, for what stock lacks."""
    torchs = "stock" if activation == "none" else "reference"
    if transform := active_transform():
        return torchs, transform
    kernels = config.forced()
    if kernels == "stock":
        return torchs, "dlkernels.config.kernels is 'stock'"
    refusal = _refusal(input, weight, bias)
    if refusal is not None:
        if kernels == "own":
            F.linear(input, weight, bias)  # bad input is torch's to refuse
            raise NotImplementedError(f"linear: no kernel of ours: {refusal}")
        return "stock" if refusal == _CUBLAS else torchs, refusal
    if kernels == "auto" and _is_onednns(input):
        return torchs, "oneDNN has the faster products of bfloat16"
    if torch.compiler.is_compiling():
        return "own", "covered"
    return config.owner("cpu"), "covered"


# ---------------------------------------------------------------------------------------- on a GPU


def _fits_cublas_epilogue(input, weight, bias, activation):
    """Whether torch can hand the ReLU to cuBLAS. Compiled, inductor fuses it by itself."""
    if activation != "relu" or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    tensors = (input, weight, bias)
    if not all(isinstance(t, Tensor) and is_plain(t) and t.is_cuda for t in tensors):
        return False
    dtypes = {autocast_dtype(t, "cuda") for t in tensors}
    return (
        len(dtypes) == 1
        and dtypes.issubset(DTYPES)
        and input.dim() >= 2
        and weight.dim() == 2
        and input.shape[-1] == weight.shape[1]
        and bias.shape == weight.shape[:1]
        and input.numel() > 0
    )


def _relu_by_cublas(input, weight, bias):
    """relu(x·Wᵀ + b) with the ReLU in cuBLAS's epilogue; it has no derivative of its own."""
    rows = input.reshape(-1, input.shape[-1])
    output = torch._addmm_activation(bias, rows, weight.t(), use_gelu=False)
    return output.view(*input.shape[:-1], weight.shape[0])


# ------------------------------------------------------------------------------------------- public


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """``torch.nn.functional.linear``, and an activation with it where one is named.

    Args:
        input: (…, K) with any number of leading dimensions, including none, in any strides;
            float32, float64, bfloat16 or float16, computed in float32 (float64 for float64).
        weight: (N, K), of the input's dtype, in any strides; (K) is stock's.
        bias: (N), of the input's dtype; another shape that broadcasts is stock's.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"tanh"`` or ``"sigmoid"``:
            applied before the output is rounded and written.

    Returns:
        (…, N), contiguous, of the input's dtype; under autocast, of autocast's.

    Raises:
        What torch raises, with its words: RuntimeError for shapes and dtypes, TypeError for no
        tensor. ValueError for another activation. NotImplementedError under
        ``dlkernels.config.kernels = "own"``, where there is no kernel of ours.
    """
    activation = activation_named(_OP, activation)
    if _is_small(input, weight):
        if config.is_recording():
            torchs = "stock" if activation == "none" else "reference"
            config.record(_OP, torchs, "too small for our call overhead")
        return linear_reference(input, weight, bias, activation)

    kernel, reason = _choose(input, weight, bias, activation)
    config.record(_OP, kernel, reason)
    if kernel in ("stock", "reference") and not (
        reason == _CUBLAS and _fits_cublas_epilogue(input, weight, bias, activation)
    ):
        return linear_reference(input, weight, bias, activation)

    input, weight, bias = cast(input, weight, bias)
    if torch.compiler.is_compiling():
        return _ops.linear(input, weight, bias, activation)
    if needs_gradient(input, weight, bias):
        return _Linear.apply(input, weight, bias, activation)
    return _forward(input, weight, bias, activation)

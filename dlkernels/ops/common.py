"""What the contracts of the ops share: what a kernel of ours takes, where a call or a backward can
only be torch's, what is kept for a backward, layouts of images, and that a raw op has no
derivative."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F

from dlkernels import config

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_SLOPE = 0.01  # of leaky_relu: torch's default

# Those whose derivative follows from the output: nothing else is kept for the backward.
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, _SLOPE),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activation_named(op: str, activation: str | None) -> str:
    """The name of an activation as the ops have it, "none" for None."""
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS or activation == "none":
        names = ", ".join(repr(name) for name in ACTIVATIONS if name != "none")
        raise ValueError(f"{op}: activation must be None or one of {names}, got {activation!r}")
    return activation


def before_activation(gradient: Tensor, output: Tensor | None, activation: str) -> Tensor:
    """The gradient of an activation's argument from that of its output, in torch ops."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(gradient, output, 0)
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(gradient, output, _SLOPE, True)
    if activation == "tanh":
        return aten.tanh_backward(gradient, output)
    if activation == "sigmoid":
        return aten.sigmoid_backward(gradient, output)
    return gradient


def not_differentiable(op: str, *names: str) -> None:
    """Lets the raw ops of these names refuse to be differentiated, and name ``op`` instead: in the
    backward, and one that writes to an argument in the call already."""
    for name in names:
        message = (
            f"dlkernels::{name} is a raw op without a derivative;"
            f" use dlkernels.functional.{op} or torch.ops.dlkernels.{op}"
        )

        def backward(ctx, *grads, message=message):
            raise NotImplementedError(message)

        raw = getattr(torch.ops.dlkernels, name).default
        if not raw._schema.is_mutable:
            torch.library.register_autograd(f"dlkernels::{name}", backward)
            continue

        def call(*args, raw=raw, message=message):
            if torch.is_grad_enabled():
                for argument in args:
                    if isinstance(argument, Tensor) and argument.requires_grad:
                        raise NotImplementedError(message)
            with torch._C._AutoDispatchBelowAutograd():
                return raw(*args)

        torch.library.impl(f"dlkernels::{name}", "Autograd", call)


_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def is_plain(tensor: Tensor) -> bool:
    """A dense tensor whose memory a kernel can read, or the stand-in of one while tracing."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested


def unfit(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why no kernel of ours reads these tensors, of which the first says on which device; None
    where one can."""
    for tensor in tensors:  # a loop: a generator would double the time of a small call
        if tensor is not None and not is_plain(tensor):
            return "an argument is not a plain dense tensor"
    device = tensors[0].device
    if device.type not in config.libraries:
        return f"no kernel for device {device.type}"
    if device.type == "cuda" and config.is_gpu_too_old(device.index):
        return "no kernel for a GPU older than sm_80"
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return "tensors on different devices"
    return None


# From the densest to the outermost dimension of what is channels_last.
_CHANNELS_LAST = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def suggests_channels_last(x: Tensor) -> bool:
    """What torch's C++ calls ``suggest_memory_format``, of four or five dimensions; of others it is
    contiguous. So it is where sizes of 1 leave it open, and of an empty tensor."""
    strides = x.stride()
    if len(strides) not in _CHANNELS_LAST or strides[1] == 0:
        return False
    least = 0
    for d in _CHANNELS_LAST[len(strides)]:
        size, stride = x.shape[d], strides[d]
        if size == 0 or stride < least or (d == 0 and least == strides[1]):
            return False
        least = stride * size
    return True


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format of an image's gradient."""
    return torch.channels_last if suggests_channels_last(x) else torch.contiguous_format


def empty_image(input: Tensor, weight: Tensor, channels, size, dtype=None) -> Tensor:
    """The output of a convolution: channels_last if input or weight is, but for an empty batch."""
    shape = (input.shape[0], channels, *size)
    last = shape[0] != 0 and (suggests_channels_last(input) or suggests_channels_last(weight))
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or input.dtype, device=input.device, memory_format=layout)


def empty_gradients(input: Tensor, weight: Tensor, channels, wanted) -> tuple[Tensor, ...]:
    """Those of a convolution's input, weight and bias; of shape (0) where one is not wanted."""
    want_input, want_weight, want_bias = wanted

    def like(x, want):
        return torch.empty_like(x, memory_format=format_of(x)) if want else x.new_empty(0)

    bias = input.new_empty(channels if want_bias else 0)
    return like(input, want_input), like(weight, want_weight), bias


def keep(ctx, input: Tensor, weight: Tensor, *others: Tensor | None) -> None:
    """Keeps what the wanted gradients of a product read, as stock does: no input for a frozen
    weight, and no weight, which may then be changed before the backward, for an input without a
    gradient. Of what is not kept only shape and format count."""

    def layout(x):
        return x.shape, x.stride() if suggests_channels_last(x) else None

    of_input, of_weight, *_ = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    ctx.of_input = None if of_weight else layout(input)
    ctx.of_weight = None if of_input else layout(weight)
    ctx.save_for_backward(input if of_weight else None, weight if of_input else None, *others)


def kept(ctx, grad_output: Tensor) -> list[Tensor | None]:
    """Input, weight and the others, or what stands in for the first two: in memory only where a
    format has to be seen."""

    def stand_in(shape, stride):
        if stride is None:
            return grad_output.new_empty(()).expand(shape)
        return grad_output.new_empty_strided(shape, stride)

    input, weight, *others = ctx.saved_tensors
    if input is None:
        input = stand_in(*ctx.of_input)
    if weight is None:
        weight = stand_in(*ctx.of_weight)
    return [input, weight, *others]


_capturing: int | None = None  # the last backward pass that was seen to be asked for leaves


def _runs(node) -> bool:
    global _capturing
    task = torch._C._current_graph_task_id()
    if task == _capturing and not node.next_functions:
        return True
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that torch.autograd.grad is asked for; it takes 60 µs
        _capturing = task
        return True


def asked_for(ctx) -> tuple:
    """``ctx.needs_input_grad`` in a backward pass, less what nobody asked this pass for: stock's
    nodes leave out the weights' gradients where ``torch.autograd.grad`` is for the input alone."""
    needs = ctx.needs_input_grad
    if torch.compiler.is_compiling() or not all(type(need) is bool for need in needs):
        return needs
    # next_functions has the tensors alone, and None for one without a gradient.
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if len(nodes) != sum(needs):
        return needs
    run = map(_runs, nodes)
    return tuple(need and next(run) for need in needs)


def wanted_ones(gradients, wanted) -> tuple[Tensor | None, ...]:
    """None in place of the gradients that are not wanted."""
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def is_torchs(grad_output: Tensor) -> bool:
    """Whether a backward is differentiated again, or batched: the formula is then in torch ops."""
    return torch.is_grad_enabled() or is_batched(grad_output)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see a call."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # a loop, as in unfit
        if tensor is not None and tensor.requires_grad:
            return True
    return False


@torch.compiler.assume_constant_result
def has_kernel(op: str, device: str) -> bool:
    """Whether a raw op has a kernel on a type of device: on a GPU some are Triton's."""
    if (op, device) in _with_kernel:
        return True
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{op}", device.upper()):
        _with_kernel.add((op, device))
        return True
    return False


# What has_kernel has found: asking takes a tenth of a small call. A kernel never goes.
_with_kernel: set[tuple[str, str]] = set()


def is_batched(gradient: Tensor | None) -> bool:
    """By vmap over the backward alone, as ``is_grads_batched`` and ``jacobian(vectorize=True)`` do:
    the raw ops, of which some write in place, have no batching rule."""
    functorch = torch._C._functorch
    return gradient is not None and (
        functorch.is_legacy_batchedtensor(gradient) or functorch.is_batchedtensor(gradient)
    )


def active_transform() -> str | None:
    """Which transform is active, if one is for which our ops have no rule: the call is torch's."""
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing: its graph must run without us"
    return None


def autocast_dtype(tensor: Tensor, device: str) -> torch.dtype:
    """The dtype that autocast gives the argument of a product; float64, and what is no float, it
    leaves alone."""
    if torch.is_autocast_enabled(device) and tensor.dtype in DTYPES:
        if tensor.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
    return tensor.dtype


def cast(input: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments of a product, in autocast's dtype where that is enabled."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, *others
    dtype = autocast_dtype(input, device)
    return input.to(dtype), *(None if x is None else x.to(dtype) for x in others)

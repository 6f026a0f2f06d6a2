"""What the contracts of the ops share: what a kernel of ours takes, where a call or a backward can
only be torch's, and that a raw op has no derivative."""

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


@torch.compiler.assume_constant_result
def has_kernel(op: str, device: str) -> bool:
    """Whether a raw op has a kernel of ours there."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"dlkernels::{op}_forward", device.upper()
    )


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

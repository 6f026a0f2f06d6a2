"""What the contracts of the ops share: what a kernel of ours takes, where a call or a backward can
only be torch's, and that a raw op has no derivative."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from dlkernels import config

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def not_differentiable(op: str, *names: str) -> None:
    """Lets the raw ops of these names refuse to be differentiated, and name ``op`` instead."""
    for name in names:

        def backward(ctx, *grads, name=name):
            raise NotImplementedError(
                f"dlkernels::{name} is a raw op without a derivative;"
                f" use dlkernels.functional.{op} or torch.ops.dlkernels.{op}"
            )

        torch.library.register_autograd(f"dlkernels::{name}", backward)


def is_plain(tensor: Tensor) -> bool:
    """A dense tensor whose memory a kernel can read, or the stand-in of one while tracing."""
    plain = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
    return type(tensor) in plain and tensor.layout is torch.strided and not tensor.is_nested


def unfit(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why no kernel of ours reads these tensors, of which the first says on which device; None
    where one can."""
    if not all(tensor is None or is_plain(tensor) for tensor in tensors):
        return "an argument is not a plain dense tensor"
    device = tensors[0].device
    if device.type not in config.libraries:
        return f"no kernel for device {device.type}"
    if device.type == "cuda" and config.is_gpu_too_old(device.index):
        return "no kernel for a GPU older than sm_80"
    if any(tensor is not None and tensor.device != device for tensor in tensors):
        return "tensors on different devices"
    return None


def suggests_channels_last(x: Tensor) -> bool:
    """What torch's C++ calls ``suggest_memory_format``, of four dimensions. Where sizes of 1 leave
    it open, and of an empty tensor, it is contiguous."""
    strides = x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
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

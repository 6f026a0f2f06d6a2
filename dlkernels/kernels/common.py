"""What every Triton kernel stands on: the launch, the checks, numbers of 16 bits, activations.

Under ``TRITON_INTERPRET=1`` kernels run on the CPU, op by op in numpy. Its traps, all met here:

- bfloat16 is kept as its bits: arithmetic on it is that of integers, and its conversion from
  float32 loses the carry into the exponent. ``widen`` and ``narrow`` move the bits themselves.
- numpy's exp of float32 is off by up to 2.5 ulp: ``exp`` goes by way of float64.
- The grid's index and the patched language are global: one launch at a time.
- An op costs microseconds whatever its size: programs take more rows (``INTERPRETED``).
- ``range`` over a tensor fails (Triton 3.6 beside numpy 2.4): counts of loops are constants, or go
  through ``trips``.
"""

import math
import threading
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh", "sigmoid")
SLOPE = tl.constexpr(0.01)  # of leaky_relu: torch's default

_lock = threading.RLock()
_registered: list[torch.library.Library] = []

# --------------------------------------------------------------------------------------------- host


def launch(
    kernel,
    grid: int,
    *arguments,
    warps: int = 4,
    stages: int | None = None,
    asserts: bool = False,
    **constants,
):
    """Runs a kernel on ``grid`` programs on the current device and stream; none where grid is 0.

    Args:
        stages: of a loop's loads that are under way at once; Triton's default where None.
        asserts: ``tl.device_assert`` holds without TRITON_DEBUG, as torch's own assertions do.
    """
    if grid == 0:
        return
    if INTERPRETED:
        with _lock:
            kernel[(grid,)](*arguments, **constants)
        return
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if stages is not None:
        options["num_stages"] = stages
    if asserts:
        options |= {"debug": True, "sanitize_overflow": False}
    kernel[(grid,)](*arguments, **constants, **options)


def register_kernels(kernels: dict[str, Callable], key: str) -> None:
    """Registers kernels by the name of their op, on a dispatch key ("CUDA") for good."""
    library = torch.library.Library("dlkernels", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel, key)
    _registered.append(library)


def check(condition: bool, message: str) -> None:
    """Raises RuntimeError with the message unless the condition holds."""
    if not condition:
        raise RuntimeError(message)


def check_tensor(op: str, name: str, tensor: Tensor, device, dtype=None, shape=None) -> None:
    """Raises RuntimeError unless a tensor is on the device, of the dtype and of the shape."""
    got = tensor.device
    check(got == device, f"{op}: expected {name} on {device}, got {got}")
    if dtype is not None:
        wrong = f"{op}: expected {name} of dtype {dtype}, got {tensor.dtype}"
        check(tensor.dtype == dtype, wrong)
    if shape is not None:
        got = list(tensor.shape)
        check(got == list(shape), f"{op}: expected {name} of shape {list(shape)}, got {got}")


def check_activation(op: str, activation: str) -> None:
    """Raises RuntimeError unless the kernels know the activation."""
    known = f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}"
    check(activation in ACTIVATIONS, f"{known}, got {activation}")


def alignment(*numbers: int) -> int:
    """The largest power of two, up to 16, that divides every number.

    Triton itself asks for divisibility by 16 elements alone and loads one by one otherwise: 1000
    classes in bfloat16 are whole vectors of 16 bytes all the same. So a kernel takes a number
    divided by this, and multiplies.
    """
    common = math.gcd(*numbers)
    return min(common & -common, 16) if common else 16


# ------------------------------------------------------------------------------------------- device


@triton.jit
def trips(n):
    """How often a loop runs, of a number that is known at run time only."""
    if INTERPRETED:
        return n.handle.data.item()
    else:
        return n


@triton.jit
def widen(x):
    """16 bits to float32; others as they are."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """To the dtype of memory, ties to even; to 16 bits from float64 by way of float32."""
    if dtype == tl.float64:
        return x
    else:
        x = x.to(tl.float32)
        if INTERPRETED and dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            bits = tl.where(x == x, bits, 0x7FC0)
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(dtype)


@triton.jit
def divide(x, y):
    """x / y, rounded to nearest: the operator is off by up to 2 ulp in float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def exp(x):
    """e^x; 2 ulp, and what rounding x·log2 e costs, on a GPU."""
    if INTERPRETED and x.dtype == tl.float32:
        return tl.exp(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.exp(x)


@triton.jit
def tanh(x):
    """An odd polynomial below 0.625, 1 - 2 / (e^2|x| + 1) above (Cephes; Moshier, 1992).

    In the language itself: the interpreter has no libdevice.
    """
    z = x * x
    if x.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z
        p = p - 1.61468768441708447952e3
        q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z
        near = p / (q + 4.84406305325125486048e3) * z * x + x
    else:
        p = (-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2
        p = (p * z + 1.33314422036e-1) * z - 3.33332819422e-1
        near = p * z * x + x
    a = tl.abs(x)
    far = 1.0 - 2.0 / (exp(a + a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation by its name; of a NaN it is one."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * SLOPE)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + exp(-x))
    return x


@triton.jit
def before_activation(gradient, y, ACTIVATION: tl.constexpr):
    """The gradient of an activation's argument, from that of its output y."""
    if ACTIVATION == "relu":
        gradient = tl.where(y <= 0, 0.0, gradient)
    elif ACTIVATION == "leaky_relu":
        gradient = tl.where(y > 0, gradient, gradient * SLOPE)
    elif ACTIVATION == "tanh":
        gradient = gradient * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        gradient = gradient * (1.0 - y) * y
    return gradient


@triton.jit
def where_set(v, signs, row, channel, channels, mask):
    """v, rows × channels, where its bit is set, 0 elsewhere: bit j of byte i of a row of signs is
    channel 8i + j's."""
    at = row[:, None] * ((channels + 7) // 8) + (channel // 8)[None, :]
    byte = tl.load(signs + at, mask=mask, other=0).to(tl.int32)
    return tl.where(((byte >> (channel % 8)[None, :]) & 1) != 0, v, 0.0)


@triton.jit
def where_positive(v, x, channel, mask, scale, shift):
    """v, rows × channels, but 0 where scale·x + shift <= 0."""
    s = tl.broadcast_to(tl.load(scale + channel, mask=mask, other=0.0)[None, :], x.shape)
    t = tl.broadcast_to(tl.load(shift + channel, mask=mask, other=0.0)[None, :], x.shape)
    return tl.where(tl.fma(x, s, t) <= 0, 0.0, v)

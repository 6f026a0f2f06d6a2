"""What a user can set, and the record of which kernel each call took.

``dlkernels.config.kernels`` forces the choice of kernels:

=========  ==================================================================================
``auto``   the fastest one known for the shape, the dtype and the machine (the start value)
``own``    ours, also where PyTorch's is the faster; ``NotImplementedError`` where there is
           none for the input
``stock``  PyTorch's, everywhere
=========  ==================================================================================

Whatever it says, PyTorch does what is under a transform of ``torch.func``, forward-mode AD or
``torch.jit.trace``, and the torch ops of a gradient that is differentiated again.

Its start value is the environment variable ``DLKERNELS_KERNELS``. C++ sees the choice as an
argument of the ops that have one to make, never as hidden state.

``dlkernels.config.winograd`` is ``auto`` (the start value) or ``off``: no convolution then takes
an algorithm that rounds more than a sum of products, as with ``torch.backends.mkldnn.conv.
fp32_precision = "ieee"``.

Every call of a public function says here which kernel it took, and why: to the logger
``dlkernels`` at DEBUG, and to ``recording()``, on which ``dlkernels.explain`` stands.
"""

import contextlib
import logging
import os
import sys
import types
from typing import NamedTuple

import torch

KERNELS = ("own", "auto", "stock")
WINOGRAD = ("auto", "off")

logger = logging.getLogger("dlkernels")

# Device type -> what owns the ops there: the instruction set of the CPU library ("cpu": "avx2"),
# "cuda" or "triton". Written once, by the package when it loads its libraries.
libraries: dict[str, str] = {}


def owner(device: str) -> str:
    """The name of our kernels on a device type, as ``Choice`` has it: "cpu/avx2", "cuda"."""
    return f"cpu/{libraries['cpu']}" if device == "cpu" else libraries[device]


@torch.compiler.assume_constant_result
def is_gpu_too_old(index: int | None) -> bool:
    """Whether the CUDA library has no code for this GPU. A stand-in without one is not too old."""
    if libraries.get("cuda") != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(index) < (8, 0)


class Choice(NamedTuple):
    op: str  # "cross_entropy"
    kernel: str  # "cpu/avx2", "cuda", "triton", "stock", "reference"
    reason: str


_recorders: list[list[Choice]] = []


@contextlib.contextmanager
def recording():
    """Collects a ``Choice`` for every public function called inside, from any thread."""
    choices: list[Choice] = []
    _recorders.append(choices)
    try:
        yield choices
    finally:
        # By identity: list.remove compares contents, and two empty recorders are equal.
        _recorders[:] = [recorder for recorder in _recorders if recorder is not choices]


def record(op: str, kernel: str, reason: str) -> None:
    """Notes one choice. Does nothing while compiling: nothing may be logged in a traced graph."""
    if torch.compiler.is_compiling():
        return
    if _recorders:
        for choices in _recorders:
            choices.append(Choice(op, kernel, reason))
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s: %s (%s)", op, kernel, reason)


def is_recording() -> bool:
    """Whether anyone listens: a caller may skip writing its reason when nobody does."""
    return bool(_recorders) or logger.isEnabledFor(logging.DEBUG)


_state: dict[str, str] = {}


def forced() -> str:
    """``kernels``, for code that is traced: a graph guards on a dictionary, not on a property."""
    return _state["kernels"]


def allows_winograd() -> bool:
    """``winograd``, likewise."""
    return _state["winograd"] == "auto"


class _Config(types.ModuleType):
    @property
    def kernels(self) -> str:
        return _state["kernels"]

    @kernels.setter
    def kernels(self, value: str) -> None:
        if value not in KERNELS:
            raise ValueError(f"dlkernels.config.kernels must be one of {KERNELS}, got {value!r}")
        _state["kernels"] = value

    @property
    def winograd(self) -> str:
        return _state["winograd"]

    @winograd.setter
    def winograd(self, value: str) -> None:
        if value not in WINOGRAD:
            raise ValueError(f"dlkernels.config.winograd must be one of {WINOGRAD}, got {value!r}")
        _state["winograd"] = value


_module = sys.modules[__name__]
_module.__class__ = _Config
_module.kernels = os.environ.get("DLKERNELS_KERNELS", "auto")
_module.winograd = "auto"

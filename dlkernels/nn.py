"""Drop-in modules, under the names and signatures of ``torch.nn``.

A module with a kernel of ours subclasses its stock twin and changes ``forward`` alone: same
constructor, parameters, buffers, ``state_dict`` keys, ``repr``, pickle and deepcopy. Every other
public name is ``torch.nn``'s own object, so a network can take the whole namespace: ``LeNet(nn=
dlkernels.nn)`` beside ``LeNet(nn=torch.nn)``.

``dlkernels.nn.functional`` is ``dlkernels.functional``: ours where there is one, else the function
of ``torch.nn.functional``. ``import dlkernels.nn.functional as F`` works too.
"""

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlkernels import functional

if TYPE_CHECKING:  # what __getattr__ gives, for type checkers and editors
    from torch.nn import *  # noqa: F403

# This file is not a package: without the entry, `import dlkernels.nn.functional` would not resolve.
sys.modules[f"{__name__}.functional"] = functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on ``dlkernels.functional.cross_entropy``.

    Args (those before ``softcap`` are stock's):
        softcap: logits become ``softcap * tanh(logits / softcap)`` before anything else.
        z_loss: adds ``z_loss * logsumexp(logits)**2`` per row, before the reduction.
        return_lse: ``forward`` returns ``(loss, lse)``, and ``lse`` is differentiable.

    ``forward(input, target)``: ``input`` (N, C, ...) or (C), floating point; ``target`` class
    indices (N, ...) or (), or class probabilities of the shape of ``input``. Errors are those of
    the functional form, raised at the call, as stock's are. TorchScript is not supported.
    """

    # Defaults on the class: a stock module that swap() makes ours never runs this __init__. An
    # instance holds only what differs, so that unset extras leave no trace in a pickle.
    softcap: float | None = None
    z_loss: float = 0.0
    return_lse: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        z_loss: float = 0.0,
        return_lse: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        extras = {"softcap": softcap, "z_loss": z_loss, "return_lse": return_lse}
        for name, value in extras.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)

    def extra_repr(self) -> str:
        """The extras in use; empty, as stock's, when there are none."""
        extras = ("softcap", "z_loss", "return_lse")
        return ", ".join(
            f"{name}={getattr(self, name)}"
            for name in extras
            if getattr(self, name) != getattr(CrossEntropyLoss, name)
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, 0-d or of the target's shape by ``reduction``; or ``(loss, lse)``."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            return_lse=self.return_lse,
        )


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` on ``dlkernels.functional.linear``.

    ``forward(input)``: ``input`` (..., in_features), floating point. Errors are those of the
    functional form, raised at the call, as stock's are. TorchScript can trace it, not script it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features)."""
        return functional.linear(input, self.weight, self.bias)


class LazyLinear(torch.nn.LazyLinear):
    """``torch.nn.LazyLinear`` that becomes ours: a ``Linear`` with its first input's features."""

    cls_to_become = Linear


_OURS = ("CrossEntropyLoss", "LazyLinear", "Linear", "functional")
__all__ = sorted({*_OURS, *(name for name in dir(torch.nn) if not name.startswith("_"))})


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(torch.nn, name)
    except AttributeError:
        raise AttributeError(f"neither {__name__!r} nor 'torch.nn' has {name!r}") from None


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]

"""Drop-in modules, under the names and signatures of ``torch.nn``.

A module with a kernel of ours subclasses its stock twin and changes ``forward`` alone (of
``Conv2d`` the ``_conv_forward`` in it): same constructor, parameters, buffers, ``state_dict`` keys,
``repr``, pickle and deepcopy. Every other public name is ``torch.nn``'s own object, so a network
can take the whole namespace: ``LeNet(nn=dlkernels.nn)`` beside ``LeNet(nn=torch.nn)``. The residual
blocks, which torch has not, have a twin here that is written out of torch's modules.

``dlkernels.nn.functional`` is ``dlkernels.functional``: ours where there is one, else the function
of ``torch.nn.functional``. ``import dlkernels.nn.functional as F`` works too.
"""

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dlkernels import functional
from dlkernels.ops.batch_norm import sync_batch_norm
from dlkernels.ops.common import activation_named
from dlkernels.ops.conv2d import prepare as prepare_conv2d
from dlkernels.ops.residual_block import Kept, ResidualLayer, folded, keep

if TYPE_CHECKING:  # what __getattr__ gives, for type checkers and editors
    from torch.nn import *  # noqa: F403

# This file is not a package: without the entry, `import dlkernels.nn.functional` would not resolve.
sys.modules[f"{__name__}.functional"] = functional


class _Kept:
    """What a frozen module keeps. In a copy of the module, by deepcopy or pickle, it is None."""

    def __init__(self, value: Any, weights: list[Tensor], settings: tuple) -> None:
        self.value, self.settings = value, settings
        self.weights = [(weight, *_state(weight)) for weight in weights]

    def is_of(self, weights: list[Tensor], settings: tuple) -> bool:
        """Whether it was made of these weights, which nobody was seen to write, and settings."""
        return (len(weights), settings) == (len(self.weights), self.settings) and all(
            weight is kept and _state(weight) == tuple(state)
            for weight, (kept, *state) in zip(weights, self.weights, strict=True)
        )

    def __reduce__(self):
        return type(None), ()


def _state(weight: Tensor) -> tuple[int, int]:
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version


class Freezable:
    """A module that ``dlkernels.freeze`` lets keep what it derives from its weights: a class before
    torch's among the bases.

    A class says which parameters those are, and makes the value of them and of its ``_settings`` in
    ``_prepare``; its forward gives ``_prepared()`` to its function, None wherever it does not hold.
    The function reads it only where no gradient is needed and the kernel is the one that it is for.
    """

    derived_from: tuple[str, ...] = ("weight",)
    _kept: _Kept | None = None  # on the class: swap() makes a stock module ours without __init__

    def _prepare(self, *weights: Tensor) -> Any:
        """What is derived of them; None for nothing."""
        raise NotImplementedError

    def _prepared(self) -> Any:
        kept = self._kept
        if kept is None or torch.compiler.is_compiling():
            return None
        return kept.value if kept.is_of(self._weights(), self._settings()) else None

    def _settings(self) -> tuple:
        """What else the value depends on."""
        raise NotImplementedError

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.derived_from]

    def keep_prepared(self) -> None:
        """Keeps what ``_prepare`` makes of the weights as they are."""
        self.drop_prepared()
        weights = self._weights()
        with torch.no_grad():
            value = self._prepare(*weights)
        if value is not None:
            self._kept = _Kept(value, weights, self._settings())

    def drop_prepared(self) -> None:
        """Drops what is kept."""
        self.__dict__.pop("_kept", None)

    def train(self, mode: bool = True):
        """Stock's; training mode unfreezes."""
        if mode:
            self.drop_prepared()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.drop_prepared()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.drop_prepared()
        super()._load_from_state_dict(*args, **kwargs)


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


class _LinearCrossEntropyLoss(torch.nn.Module):
    """What ``torch.nn.LinearCrossEntropyLoss`` holds, for torch below 2.13."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options=None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: expected weight of shape {(num_classes,)},"
                f" got {tuple(weight.shape)}"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(
                "LinearCrossEntropyLoss: expected label_smoothing between 0 and 1,"
                f" got {label_smoothing}"
            )
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
        self.options = options

    def extra_repr(self) -> str:
        """The arguments, as torch's module shows them."""
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
            f" out_features={self.out_features}, bias={self.linear.bias is not None},"
            f" reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, options={self.options}"
        )


class LinearCrossEntropyLoss(
    getattr(torch.nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss),
):
    """``torch.nn.LinearCrossEntropyLoss`` on ``dlkernels.functional.linear_cross_entropy``.

    torch has it from 2.13 on; below, this class holds the same parameters by itself.

    Args (those before ``softcap`` are stock's):
        softcap: logits become ``softcap * tanh(logits / softcap)`` before anything else.
        z_loss: adds ``z_loss * logsumexp(logits)**2`` per row, before the reduction.

    ``forward(input, target)``: ``input`` (N, in_features) or (in_features), floating point;
    ``target`` class indices (N, ...) or (), or class probabilities (N, C, ...) or (C). Errors are
    those of the functional form, raised at the call, as stock's are. TorchScript is not supported.
    """

    # Defaults on the class, as of CrossEntropyLoss.
    softcap: float | None = None
    z_loss: float = 0.0

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        softcap: float | None = None,
        z_loss: float = 0.0,
        **arguments,
    ) -> None:
        super().__init__(in_features, num_classes, **arguments)
        for name, value in {"softcap": softcap, "z_loss": z_loss}.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)

    def extra_repr(self) -> str:
        """Stock's, and the extras in use."""
        extras = (
            f", {name}={getattr(self, name)}"
            for name in ("softcap", "z_loss")
            if getattr(self, name) != getattr(LinearCrossEntropyLoss, name)
        )
        return super().extra_repr() + "".join(extras)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss, 0-d or of the target's shape by ``reduction``."""
        outputs = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*outputs, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(outputs),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            softcap=self.softcap,
            z_loss=self.z_loss,
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


class Conv2d(Freezable, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on ``dlkernels.functional.conv2d``.

    ``forward(input)``: ``input`` (N, C, H, W) or (C, H, W), floating point. A ``padding_mode``
    other than zeros pads first, as stock's does. Errors are those of the functional form, raised at
    the call, as stock's are. TorchScript can trace it, not script it. Frozen, it keeps Winograd's
    transform of the weight.
    """

    def _prepare(self, weight: Tensor) -> Tensor | None:
        return prepare_conv2d(weight, *self._settings())

    def _settings(self) -> tuple:
        return self.stride, self.dilation, self.groups

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            around = self._reversed_padding_repeated_twice
            input, padding = functional.pad(input, around, mode=self.padding_mode), (0, 0)
        return functional.conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            prepared=self._prepared() if weight is self.weight else None,
        )


class LazyConv2d(torch.nn.LazyConv2d):
    """``torch.nn.LazyConv2d`` that becomes ours: a ``Conv2d`` with its first input's channels."""

    cls_to_become = Conv2d


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` on ``dlkernels.functional.conv_transpose2d``.

    ``forward(input, output_size=None)``: ``input`` (N, C, H, W) or (C, H, W), floating point.
    Errors are those of the functional form, raised at the call, as stock's are. TorchScript can
    trace it, not script it.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution, of the size ``output_size`` where stride leaves it open."""
        if self.padding_mode != "zeros":  # set after the constructor, which takes no other
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return functional.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


class LazyConvTranspose2d(torch.nn.LazyConvTranspose2d):
    """``torch.nn.LazyConvTranspose2d`` that becomes ours: a ``ConvTranspose2d``, likewise."""

    cls_to_become = ConvTranspose2d


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the batch norms share: torch's forward, on ``dlkernels.functional.batch_norm``."""

    # Default on the class, as of CrossEntropyLoss.
    process_group: "torch.distributed.ProcessGroup | str | None" = None

    def __init__(self, *arguments, process_group=None, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        if process_group is not None:
            self.process_group = process_group

    def extra_repr(self) -> str:
        """Stock's, and a process group."""
        group = "" if self.process_group is None else f", process_group={self.process_group}"
        return super().extra_repr() + group

    def forward(self, input: Tensor) -> Tensor:
        """The input, normalised for each channel: of its shape, dtype and memory format."""
        return normalise(self, input)


def normalise(
    module: torch.nn.modules.batchnorm._BatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A batch norm's forward as torch's module has it, with what can be fused."""
    module._check_input_dim(input)
    mean, var, momentum = _running(module)
    of_batch = module.training or (module.running_mean is None and module.running_var is None)
    arguments = input, mean, var, module.weight, module.bias
    fused = {"residual": residual, "activation": activation}
    if module.training and (group := _group(module)) is not None:
        return sync_batch_norm(*arguments, momentum, module.eps, group, **fused)
    return functional.batch_norm(*arguments, of_batch, momentum, module.eps, **fused)


def _running(
    module: torch.nn.modules.batchnorm._BatchNorm,
) -> tuple[Tensor | None, Tensor | None, float]:
    """The running statistics that a call reads or updates, and its momentum. Counts the batch."""
    momentum = 0.0 if module.momentum is None else module.momentum
    if not module.training:
        return module.running_mean, module.running_var, momentum
    if not module.track_running_stats:
        return None, None, momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # a cumulative average
            momentum = 1.0 / float(module.num_batches_tracked)
    return module.running_mean, module.running_var, momentum


def _group(module: torch.nn.Module) -> "torch.distributed.ProcessGroup | None":
    """The processes whose batches have statistics in common; None where it is this one alone."""
    group = getattr(module, "process_group", None)
    if group is None or not _is_distributed():
        return None
    group = torch.distributed.group.WORLD if group == "world" else group
    return group if torch.distributed.get_world_size(group) > 1 else None


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on ``dlkernels.functional.batch_norm``.

    Args (those before ``process_group`` are stock's):
        process_group: of torch.distributed, or ``"world"`` for the default one: in training the
            statistics are those of all its processes' batches. ``None``: of this process's alone.

    ``forward(input)``: ``input`` (N, C) or (N, C, L), floating point. Errors are those of the
    functional form, raised at the call, as stock's are. TorchScript can trace it, not script it.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, likewise, of (N, C, H, W)."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``, likewise, of (N, C, D, H, W)."""


class LazyBatchNorm1d(torch.nn.LazyBatchNorm1d):
    """``torch.nn.LazyBatchNorm1d`` that becomes ours, with its first input's channels."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(torch.nn.LazyBatchNorm2d):
    """``torch.nn.LazyBatchNorm2d``, likewise."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(torch.nn.LazyBatchNorm3d):
    """``torch.nn.LazyBatchNorm3d``, likewise."""

    cls_to_become = BatchNorm3d


class BatchNormAct2d(BatchNorm2d):
    """A ``BatchNorm2d``, a residual and an activation as one; its ``state_dict`` is a
    ``BatchNorm2d``'s.

    Args (those before ``activation`` are those of ``BatchNorm2d``):
        activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"tanh"``, ``"sigmoid"`` or None.

    ``forward(input, residual=None)``: both (N, C, H, W); the residual is added before the
    activation.
    """

    def __init__(self, *arguments, activation: str | None = "relu", **keywords) -> None:
        super().__init__(*arguments, **keywords)
        activation_named("BatchNormAct2d", activation)
        self.activation = activation

    def extra_repr(self) -> str:
        """That of ``BatchNorm2d``, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation}"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The activation of the normalised input and the residual, of the input's shape."""
        return normalise(self, input, residual, self.activation)


BATCH_NORMS = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}


def convert_sync_batchnorm(
    model: torch.nn.Module,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> torch.nn.Module:
    """Gives every batch norm of ``model``, ours or torch's, the statistics of all processes of a
    group; in place, returns ``model``.

    Args:
        process_group: of torch.distributed; by default the one of all processes, which may be set
            up later.

    Parameters, buffers and ``state_dict`` keys stay. Of torch's only the exact classes are changed:
    to ours. The batch norms of a residual block are its modules like any other.
    """
    for module in model.modules():
        if ours := BATCH_NORMS.get(type(module)):
            module.__class__ = ours
        if isinstance(module, (_BatchNorm, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d)):
            module.process_group = "world" if process_group is None else process_group
    return model


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that runs as one, on a function of ``dlkernels.functional``: a
    convolution, a ``MaxPool2d(2)`` and a ReLU before or behind the pool, or none
    (``conv2d_max_pool2d``); a batch norm and a ReLU (``batch_norm``); in eval mode a convolution, a
    batch norm and a ReLU or none; a linear layer and an activation that ``linear`` has.

    A chain in which a module has a hook, is parametrized or is of a subclass runs module by module.
    """

    def forward(self, input):
        """The last module's output."""
        modules, at = list(self), 0
        while at < len(modules):
            length = _fused(modules, at)
            if length and any(map(is_observed, modules[at : at + length])):
                length = 0
            if length and type(modules[at + 1]) in _NORMS_2D:
                input = convolve_and_normalise(
                    *modules[at : at + 2], input, "relu" if length == 3 else None
                )
                at += length
            elif length and type(modules[at]) in (Conv2d, torch.nn.Conv2d):
                conv = modules[at]
                input = functional.conv2d_max_pool2d(
                    input,
                    conv.weight,
                    conv.bias,
                    conv.stride,
                    conv.padding,
                    conv.dilation,
                    conv.groups,
                    activation="relu" if length == 3 else None,
                    prepared=conv._prepared() if isinstance(conv, Freezable) else None,
                )
                at += length
            elif length and type(modules[at]) in (Linear, torch.nn.Linear):
                linear, activation = modules[at : at + 2]
                input = functional.linear(
                    input, linear.weight, linear.bias, activation=_activation(activation)
                )
                at += length
            elif length:
                input = normalise(modules[at], input, activation="relu")
                at += length
            else:
                input = modules[at](input)
                at += 1
        return input


def convolve_and_normalise(
    conv: torch.nn.Conv2d,
    norm: torch.nn.BatchNorm2d,
    input: Tensor,
    activation: str | None = None,
) -> Tensor:
    """A batch norm's output of a convolution's, with a ReLU or without; of a pair that folds."""
    if not isinstance(input, Tensor) or input.dim() != 4:
        return normalise(norm, conv(input), activation=activation)
    return folded(input, _layer(conv, norm), activation == "relu", conv._prepared())


def folds(conv: torch.nn.Module, norm: torch.nn.Module, ever: bool = False) -> bool:
    """Whether the two are a pair for ``convolve_and_normalise``; or would be in eval mode, if the
    convolution were ours."""
    return (
        (type(conv) is Conv2d or (ever and type(conv) is torch.nn.Conv2d))
        and type(norm) in _NORMS_2D
        and (ever or not norm.training)
        and conv.padding_mode == "zeros"
        and conv.out_channels == norm.num_features
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def fused_chains(module: torch.nn.Module, ever: bool = False) -> list[list[torch.nn.Module]]:
    """The chains of a ``torch.nn.Sequential``, or of ours, that ``Sequential`` runs as one; those
    of a ``Composite``. ``ever``: in eval mode too, and with convolutions of ours."""
    if isinstance(module, Composite):
        return module.chains()
    # Or of a subclass that keeps their forward.
    if type(module).forward not in (torch.nn.Sequential.forward, Sequential.forward):
        return []
    modules = list(module)
    lengths = (_fused(modules, at, ever) for at in range(len(modules)))
    return [modules[at : at + length] for at, length in enumerate(lengths) if length]


def _fused(modules: list[torch.nn.Module], at: int, ever: bool = False) -> int:
    """How many modules from ``at`` on are one call; 0 if only the first is."""
    if type(modules[at]) in (*BATCH_NORMS, *BATCH_NORMS.values()):
        return 2 if [type(module) for module in modules[at + 1 : at + 2]] == [torch.nn.ReLU] else 0
    if type(modules[at]) in (Linear, torch.nn.Linear):
        return 2 if any(map(_activation, modules[at + 1 : at + 2])) else 0
    if at + 1 < len(modules) and folds(*modules[at : at + 2], ever):
        return 3 if [type(module) for module in modules[at + 2 : at + 3]] == [torch.nn.ReLU] else 2
    return _pooled(modules, at)


def _activation(module: torch.nn.Module) -> str | None:
    """What the ops call it; None for what they have not."""
    name = _ACTIVATIONS.get(type(module))
    if name == "leaky_relu" and module.negative_slope != 0.01:
        return None
    return name


_NORMS_2D = BatchNorm2d, torch.nn.BatchNorm2d
_ACTIVATIONS = {
    torch.nn.ReLU: "relu",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.Tanh: "tanh",
    torch.nn.Sigmoid: "sigmoid",
}


def _pooled(modules: list[torch.nn.Module], at: int) -> int:
    """How many modules from ``at`` on are a convolution, its pool and its ReLU; 0 if none are."""
    conv = modules[at]
    if type(conv) not in (Conv2d, torch.nn.Conv2d) or conv.padding_mode != "zeros":
        return 0
    for before, length in ((0, 3), (1, 3), (0, 2)):  # conv, pool, relu; conv, relu, pool
        chain = modules[at + 1 : at + length]
        if len(chain) < length - 1:
            continue
        pool = chain.pop(before)
        if all(type(module) is torch.nn.ReLU for module in chain) and _halves(pool):
            return length
    return 0


def _halves(pool: torch.nn.Module) -> bool:
    def is_all(value, wanted):
        return value in (wanted, (wanted, wanted), [wanted, wanted])

    return (
        type(pool) is torch.nn.MaxPool2d
        and is_all(pool.kernel_size, 2)
        and is_all(pool.stride, 2)
        and is_all(pool.padding, 0)
        and is_all(pool.dilation, 1)
        and not (pool.ceil_mode or pool.return_indices)
    )


class _Residual(torch.nn.Module):
    """relu(bn(conv(... relu(bn(conv(input))))) + shortcut(input)), module by module."""

    # Of the modules that a block is made of.
    _conv, _norm, _sequential = torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Sequential
    _shortcut = "shortcut"  # the name of what is around the convolutions

    def _make(self, convolutions, projection: tuple | None, bias: bool) -> None:
        """conv1, bn1, ... of Conv2d's arguments, and the shortcut, empty for the identity."""
        for at, arguments in enumerate(convolutions, 1):
            setattr(self, f"conv{at}", self._conv(*arguments, bias=bias))
            setattr(self, f"bn{at}", self._norm(arguments[1]))
        around = []
        if projection is not None:
            around = [self._conv(*projection, bias=bias), self._norm(projection[1])]
        setattr(self, self._shortcut, self._sequential(*around))

    def _layers(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        return [*pairs, (self.conv3, self.bn3)] if hasattr(self, "conv3") else pairs

    def parts(self) -> "Parts | str":
        """What the block is made of, or why it is not made of that."""
        shortcut = getattr(self, self._shortcut)
        if type(shortcut) not in (Sequential, torch.nn.Sequential) or len(shortcut) not in (0, 2):
            return f"{self._shortcut} is no convolution with a batch norm"
        return Parts(self._layers(), tuple(shortcut) or None)

    def forward(self, input: Tensor) -> Tensor:
        """(N, out_channels, ...) of (N, in_channels, H, W)."""
        *first, (conv, norm) = self._layers()
        x = input
        for before, its_norm in first:
            x = torch.relu(its_norm(before(x)))
        return torch.relu(norm(conv(x)) + getattr(self, self._shortcut)(input))


class Parts(NamedTuple):
    """The modules of a residual block: a convolution and its batch norm each."""

    layers: list[tuple[torch.nn.Module, torch.nn.Module]]
    shortcut: tuple[torch.nn.Module, torch.nn.Module] | None

    @property
    def pairs(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        """All of them, the shortcut's last."""
        return [*self.layers, *([] if self.shortcut is None else [self.shortcut])]


def misfit(parts: Parts | str) -> str | None:
    """Why a block of these parts is none for ``functional.residual_block``, in whatever mode."""
    if isinstance(parts, str):
        return parts
    if not parts.layers:
        return "no convolution"
    for conv, norm in parts.pairs:
        if type(conv) not in (Conv2d, torch.nn.Conv2d):
            return f"a {type(conv).__name__} for a Conv2d"
        if conv.padding_mode != "zeros":
            return f"a convolution with padding_mode={conv.padding_mode!r}"
        if type(norm) not in (BatchNorm2d, torch.nn.BatchNorm2d):
            return f"a {type(norm).__name__} for a BatchNorm2d"
    if parts.shortcut is None and any(conv.stride != (1, 1) for conv, _ in parts.layers):
        return "an identity around a stride: the sum broadcasts"
    return None


def uncovered(parts: Parts | str) -> str | None:
    """Why ``functional.residual_block`` does not compute what these modules do as they are now."""
    if reason := misfit(parts):
        return reason
    pairs = parts.pairs
    norm = pairs[0][1]
    for _, other in pairs:
        if other.training != norm.training:
            return "batch norms in training and in eval mode"
        if getattr(other, "process_group", None) != getattr(norm, "process_group", None):
            return "batch norms of several process groups"
    return None


class Composite:
    """A module that does the work of others in it."""

    def chains(self) -> list[list[torch.nn.Module]]:
        """Those that it runs as one, but where one of a chain is observed."""
        raise NotImplementedError

    def one_by_one(self) -> str | None:
        """Why it calls its modules; None where it does not."""
        raise NotImplementedError


class Fused(Composite, Freezable):
    """A residual block on ``dlkernels.functional.residual_block``: a class before that of the
    modules one by one among the bases, which has ``parts``.

    Frozen, it keeps the scales and shifts of its batch norms, and its convolutions what they keep.
    """

    def __init__(self, *arguments, process_group=None, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        if process_group is not None:
            convert_sync_batchnorm(self, process_group)

    def chains(self) -> list[list[torch.nn.Module]]:
        """All modules of the block, if it is one op."""
        return [] if uncovered(self.parts()) else [[m for m in self.modules() if m is not self]]

    def one_by_one(self) -> str | None:
        """Why the block calls its modules; None where it is one op."""
        if reason := uncovered(self.parts()):
            return reason
        observed = (name for name, module in self.named_modules() if name and is_observed(module))
        return next((f"{name} has a hook" for name in observed), None)

    def forward(self, input: Tensor) -> Tensor:
        """(N, out_channels, ...) of (N, in_channels, H, W)."""
        if not isinstance(input, Tensor) or input.dim() != 4 or self.one_by_one():
            return super().forward(input)
        parts = self.parts()
        norm, pairs = parts.layers[0][1], parts.pairs
        affine = None if norm.training else self._prepared()  # _weights would count a batch
        layers = [_layer(*pair) for pair in pairs]
        if affine is not None:
            weights = [c._prepared() if isinstance(c, Freezable) else None for c, _ in pairs]
            layers = [
                layer._replace(kept=Kept(*scale_shift, weight))
                for layer, scale_shift, weight in zip(layers, affine, weights, strict=True)
            ]
        count = len(parts.layers)
        return functional.residual_block(
            input,
            layers[:count],
            layers[count] if len(layers) > count else None,
            training=norm.training,
            process_group=_group(norm) if norm.training else None,
        )

    def keep_prepared(self) -> None:
        """Keeps them where the block is one op, of running statistics."""
        self.drop_prepared()
        parts = self.parts()
        if uncovered(parts) is None and not parts.layers[0][1].training:
            super().keep_prepared()

    def _prepare(self, *weights: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        made = [keep(_layer(*pair)) for pair in self.parts().pairs]
        return None if any(affine is None for affine in made) else made

    def _settings(self) -> tuple:
        return tuple(norm.eps for _, norm in self.parts().pairs)

    def _weights(self) -> list[Tensor]:
        layers = [_layer(*pair) for pair in self.parts().pairs]
        tensors = [x for layer in layers for x in (*layer.parameters, *layer[4:6])]
        return [x for x in tensors if x is not None]


def _layer(conv: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d) -> ResidualLayer:
    mean, var, momentum = _running(norm)
    return ResidualLayer(
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        mean,
        var,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        momentum,
        norm.eps,
    )


class StockResidualBlock(_Residual):
    """``ResidualBlock`` of torch's modules, one after the other."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        projects = stride != 1 or in_channels != out_channels
        self._make(
            [(in_channels, out_channels, 3, stride, 1), (out_channels, out_channels, 3, 1, 1)],
            (in_channels, out_channels, 1, stride) if projects else None,
            bias,
        )


class ResidualBlock(Fused, StockResidualBlock):
    """relu(bn2(conv2(relu(bn1(conv1(input))))) + shortcut(input)) in one op, on
    ``dlkernels.functional.residual_block``: 3x3 convolutions, the first of ``stride``; the shortcut
    is empty, or a 1x1 convolution and a batch norm where stride or channels ask for it.

    Args:
        in_channels, out_channels, stride: of the block.
        bias: whether the convolutions have one.
        process_group: that of the batch norms, as of ``BatchNorm2d``.

    ``forward(input)``: ``input`` (N, in_channels, H, W), floating point; channels_last is the fast
    layout. It calls its modules one by one, and gives the same, where one of them has a hook, is
    parametrized, of a subclass or replaced, or where the batch norms are not all in one mode.
    ``state_dict`` is a ``StockResidualBlock``'s.
    """

    _conv, _norm, _sequential = Conv2d, BatchNorm2d, Sequential


class StockResBlk(_Residual):
    """``ResBlk`` of torch's modules, one after the other."""

    _shortcut = "extra"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        strided_shortcut: bool = False,
    ) -> None:
        super().__init__()
        projects = in_channels != out_channels or (strided_shortcut and stride != 1)
        self._make(
            [(in_channels, out_channels, 3, stride, 1), (out_channels, out_channels, 3, 1, 1)],
            (in_channels, out_channels, 1, stride) if projects else None,
            True,
        )


class ResBlk(Fused, StockResBlk):
    """``ResidualBlock`` with biases, whose shortcut ``extra`` is empty where the channels stay.

    Args (``process_group`` as of ``ResidualBlock``):
        strided_shortcut: a convolution in ``extra`` where ``stride`` asks for one too. Without it
            such a block adds images of two sizes, which broadcast if the smaller is one pixel; it
            calls its modules one by one.
    """

    _conv, _norm, _sequential = Conv2d, BatchNorm2d, Sequential


class StockBottleneckBlock(_Residual):
    """``BottleneckBlock`` of torch's modules, one after the other."""

    expansion = 4
    _shortcut = "downsample"

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        projects = stride != 1 or in_channels != out_channels
        self._make(
            [
                (in_channels, channels, 1),
                (channels, channels, 3, stride, 1),
                (channels, out_channels, 1),
            ],
            (in_channels, out_channels, 1, stride) if projects else None,
            bias,
        )


class BottleneckBlock(Fused, StockBottleneckBlock):
    """``ResidualBlock`` of three convolutions: 1x1 to ``channels``, 3x3 of ``stride``, 1x1 to
    4 x ``channels``.

    The names are those of torchvision's ``Bottleneck``, whose ``state_dict`` it takes: conv1, bn1,
    conv2, bn2, conv3, bn3 and, where stride or channels ask for it, downsample.0, downsample.1.
    """

    _conv, _norm, _sequential = Conv2d, BatchNorm2d, Sequential


RESIDUAL_BLOCKS = {
    StockResidualBlock: ResidualBlock,
    StockResBlk: ResBlk,
    StockBottleneckBlock: BottleneckBlock,
}


class _Recurrent(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share: torch's forward, on functions of ``dlkernels.functional``.

    No subclass of ``torch.nn.LSTM``, ``GRU`` or ``RNN``: torch.compile does not take those.
    """

    def forward(self, input, hx=None):
        """(output, last states) of (T, B, input_size), (T, input_size) or a ``PackedSequence``;
        with ``batch_first`` (B, T, input_size)."""
        if not torch.compiler.is_compiling():
            self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            got = f"{input.dim()}D tensor" if self.mode.startswith("RNN") else f"{input.dim()}D"
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {got} instead"
            )
        is_batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not is_batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            hx = self._zeros(input, input.size(batch_dim))
        else:
            hx = self._batched(hx, is_batched)
        self.check_forward_args(input, hx, None)
        output, *hidden = self._call(input, hx, None)
        if not is_batched:
            output, hidden = output.squeeze(batch_dim), [state.squeeze(1) for state in hidden]
        return output, self._joined(hidden)

    def _forward_packed(self, input: PackedSequence, hx):
        data, batch_sizes, order, inverse = input
        if hx is None:
            # Where it can be told without reading it, for torch.compile.
            batch = batch_sizes[0].item() if order is None else order.size(0)
            hx = self._zeros(data, batch)
        else:
            hx = self.permute_hidden(hx, order)
        if not torch.compiler.is_compiling():  # it reads batch_sizes
            self._check_packed(data, hx, batch_sizes)
        output, *hidden = self._call(data, hx, batch_sizes)
        output = PackedSequence(output, batch_sizes, order, inverse)
        return output, self.permute_hidden(self._joined(hidden), inverse)

    def _call(self, input: Tensor, hx, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            weights = [getattr(self, name) for name in self._flat_weights_names]
        else:
            weights = self._flat_weights
        return getattr(functional, self.mode.lower())(
            input,
            hx,
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            batch_sizes is None and self.batch_first,
            batch_sizes=batch_sizes,
        )

    # Of one state; LSTM has two.

    def _zeros(self, input: Tensor, batch: int):
        layers = self.num_layers * (2 if self.bidirectional else 1)
        return input.new_zeros(layers, batch, self.hidden_size)

    def _batched(self, hx: Tensor, is_batched: bool) -> Tensor:
        if hx.dim() != (3 if is_batched else 2):
            what = "batched 3-D" if is_batched else "unbatched 2-D"
            dims = "3-D" if is_batched else "2-D"
            raise RuntimeError(
                f"For {what} input, hx should also be {dims} but got {hx.dim()}-D tensor"
            )
        return hx if is_batched else hx.unsqueeze(1)

    def _joined(self, hidden: list[Tensor]):
        return hidden[0]

    def _check_packed(self, data: Tensor, hx, batch_sizes: Tensor) -> None:
        self.check_forward_args(data, hx, batch_sizes)


class LSTM(_Recurrent):
    """``torch.nn.LSTM`` on ``dlkernels.functional.lstm``: its constructor, parameters,
    ``state_dict`` and results, but no subclass of it, which torch.compile would refuse.

    ``forward(input, hx=None)``: as stock's. Errors are stock's too. Differentiable any number of
    times. TorchScript can trace it, not script it.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__("LSTM", *args, **kwargs)

    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        c = input.new_zeros(layers, batch, self.hidden_size)
        return (input.new_zeros(layers, batch, self.proj_size) if self.proj_size else c), c

    def _batched(self, hx: tuple[Tensor, Tensor], is_batched: bool) -> tuple[Tensor, Tensor]:
        h, c = hx[0], hx[1]
        if {h.dim(), c.dim()} != {3 if is_batched else 2}:
            what = "batched 3-D" if is_batched else "unbatched 2-D"
            dims = "3-D" if is_batched else "2-D"
            raise RuntimeError(
                f"For {what} input, hx and cx should also be {dims}"
                f" but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )
        return (h, c) if is_batched else (h.unsqueeze(1), c.unsqueeze(1))

    def _joined(self, hidden: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(hidden)

    def _check_packed(self, data: Tensor, hx, batch_sizes: Tensor) -> None:
        pass  # as stock: the function refuses


class GRU(_Recurrent):
    """``torch.nn.GRU`` on ``dlkernels.functional.gru``, as ``LSTM``."""

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(_Recurrent):
    """``torch.nn.RNN`` on ``dlkernels.functional.rnn_tanh`` or ``rnn_relu``, as ``LSTM``."""

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if self.nonlinearity not in modes:
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(modes[self.nonlinearity], *args, **kwargs)


def _step(cell: torch.nn.RNNCellBase, function, input: Tensor, hx):
    """A cell's forward, as torch's module has it; ``hx`` is a tensor, a pair of an LSTM, or
    None."""
    name, is_pair = type(cell).__name__, isinstance(cell, torch.nn.LSTMCell)
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    states = () if hx is None else (hx[0], hx[1]) if is_pair else (hx,)
    for at, state in enumerate(states):
        if state.dim() not in (1, 2):
            what = f"hx[{at}]" if is_pair else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
    is_batched = input.dim() == 2
    if not is_batched:
        input, states = input.unsqueeze(0), tuple(state.unsqueeze(0) for state in states)
    if hx is None:
        states = (input.new_zeros(input.size(0), cell.hidden_size),) * (2 if is_pair else 1)
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    result = function(input, states if is_pair else states[0], *weights)
    if is_batched:
        return result
    return tuple(state.squeeze(0) for state in result) if is_pair else result.squeeze(0)


class LSTMCell(torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on ``dlkernels.functional.lstm_cell``.

    ``forward(input, hx=None)``: as stock's. TorchScript can trace it, not script it.
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h, c), each (B, hidden_size) or (hidden_size)."""
        return _step(self, functional.lstm_cell, input, hx)


class GRUCell(torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on ``dlkernels.functional.gru_cell``, as ``LSTMCell``."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The new state, (B, hidden_size) or (hidden_size)."""
        return _step(self, functional.gru_cell, input, hx)


class RNNCell(torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on ``dlkernels.functional.rnn_tanh_cell`` or ``rnn_relu_cell``, as
    ``LSTMCell``."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The new state, (B, hidden_size) or (hidden_size)."""
        if self.nonlinearity not in ("tanh", "relu"):  # set after the constructor
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return _step(self, getattr(functional, f"rnn_{self.nonlinearity}_cell"), input, hx)


RECURRENT = {
    torch.nn.GRU: GRU,
    torch.nn.GRUCell: GRUCell,
    torch.nn.LSTM: LSTM,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.RNN: RNN,
    torch.nn.RNNCell: RNNCell,
}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_observed(module: torch.nn.Module) -> bool:
    """Whether somebody would see that the module is not called: a hook, or a ``forward`` that was
    bound to the module itself."""
    everywhere = torch.nn.modules.module
    return "forward" in module.__dict__ or any(
        getattr(module, name) or getattr(everywhere, f"_global{name}") for name in _HOOKS
    )


_OURS = (
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct2d",
    "BottleneckBlock",
    "Conv2d",
    "ConvTranspose2d",
    "CrossEntropyLoss",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyConv2d",
    "LazyConvTranspose2d",
    "LazyLinear",
    "Linear",
    "LinearCrossEntropyLoss",
    "RNN",
    "RNNCell",
    "ResBlk",
    "ResidualBlock",
    "Sequential",
    "StockBottleneckBlock",
    "StockResBlk",
    "StockResidualBlock",
    "convert_sync_batchnorm",
    "functional",
)
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

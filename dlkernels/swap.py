"""``swap`` puts our kernels under a model as it is; ``explain`` and ``verify`` say what they do.

``swap`` sets ``module.__class__`` on the modules whose type is exactly a stock class of ``TWINS``,
or one that ``dlkernels.foreign`` knows, or one that the caller names. So hooks, tied modules,
parameters, ``state_dict`` keys, an optimizer's references, deepcopy and pickle stay as they are
(binding ``forward`` would return to stock on pickle; replacing modules would lose hooks and
aliases). Nothing is stored on the model but the loss of a transformers model, in the place that it
has for that: a module's class is the whole state, and the report is derived from it. torch and
third-party modules are never patched.
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dlkernels import config, foreign, nn

logger = logging.getLogger("dlkernels")


class Twin(NamedTuple):
    """A stock class and ours. ``fits`` lets a composite look inside, e.g. at a Sequential."""

    op: str
    stock: type[torch.nn.Module]
    ours: type[torch.nn.Module]
    extras: tuple[str, ...] = ()  # attributes that stock lacks: in use, there is no way back
    fits: Callable[[torch.nn.Module], bool] = lambda module: True
    # How often stock's error verify allows in float32, and in the gradient of a weight: more than
    # twice where a faster algorithm is the point.
    allowed: tuple[float, float] = (2.0, 2.0)


# One line per class. The first that fits is taken; a class of ours stands in one line only.
TWINS: list[Twin] = [
    *(
        Twin("batch_norm", stock, ours, extras=("process_group",))
        for stock, ours in nn.BATCH_NORMS.items()
    ),
    Twin("conv2d", torch.nn.Conv2d, nn.Conv2d, allowed=(4.0, 5.0)),
    Twin("conv2d", torch.nn.ConvTranspose2d, nn.ConvTranspose2d, allowed=(4.0, 5.0)),
    Twin(
        "conv2d_max_pool2d",
        torch.nn.Sequential,
        nn.Sequential,
        fits=lambda module: bool(nn.fused_chains(module, ever=True)),
        allowed=(4.0, 5.0),
    ),
    Twin(
        "cross_entropy",
        torch.nn.CrossEntropyLoss,
        nn.CrossEntropyLoss,
        extras=("softcap", "z_loss", "return_lse"),
    ),
    Twin("linear", torch.nn.Linear, nn.Linear),
    *(Twin("lstm", stock, ours) for stock, ours in nn.RECURRENT.items()),
    *(
        Twin("residual_block", stock, ours, allowed=(5.0, 5.0))
        for stock, ours in nn.RESIDUAL_BLOCKS.items()
    ),
]
if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # from torch 2.13 on
    TWINS.append(
        Twin(
            "linear_cross_entropy",
            torch.nn.LinearCrossEntropyLoss,
            nn.LinearCrossEntropyLoss,
            extras=("softcap", "z_loss"),
        )
    )


# What the losses of transformers' models are swapped as.
_LOSS = "cross_entropy"


class Swapped(NamedTuple):
    """A line of ``report``: ``new`` is empty where the module was left, for ``reason``."""

    name: str
    old: str
    new: str
    reason: str


class Explained(NamedTuple):
    """A line of ``explain``. A module that chose differently from call to call has all of them."""

    name: str
    cls: str
    kernel: str
    reason: str


class Verified(NamedTuple):
    """A line of ``verify``: the largest errors against float64. ``ok`` is None if not called."""

    name: str
    cls: str
    what: str  # "output", "grad input", "grad weight", ...
    error: float
    stock_error: float
    ok: bool | None
    reason: str


class Records(list):
    """A list of records that prints as a table, or one record a line where rich is missing."""

    def __rich__(self):
        from rich.table import Table
        from rich.text import Text

        table = Table(*(self[0]._fields if self else ["no modules"]))
        for record in self:
            cells = (f"{cell:.2e}" if isinstance(cell, float) else str(cell) for cell in record)
            name, *others = cells
            table.add_row(*map(Text, (name or "(model)", *others)))
        return table

    def __str__(self) -> str:
        if importlib.util.find_spec("rich") is None:
            return "\n".join(map(repr, self))
        from rich.console import Console

        console, table = Console(file=io.StringIO()), self.__rich__()
        if not sys.stdout.isatty():  # a pipe or a file: every cell on one line
            console.width = console.measure(
                table, options=console.options.update(width=10000)
            ).maximum
        console.print(table)
        return console.file.getvalue().rstrip()


# --- what a module is -------------------------------------------------------------------------


def _name(cls: type) -> str:
    if getattr(torch.nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _disabled() -> bool:
    return os.environ.get("DLKERNELS_DISABLE", "0") not in ("", "0")


def _modules(model: torch.nn.Module, caller: str) -> list[tuple[str, torch.nn.Module]]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())  # a tied module once, under its first name


@functools.cache
def _known(cls: type) -> Twin | None:
    """The line of a class of another package."""
    if foreign.is_derived(cls) or (known := foreign.known(cls)) is None:
        return None
    ours = foreign.derived(cls, known.ours, cls)

    def fits(module):
        return foreign.misfit(cls, module) is None

    return Twin(known.op, cls, ours, fits=fits, allowed=known.allowed)


def _relative(cls: type) -> Twin | None:
    """The line of the nearest base of a class, itself apart."""
    for base in cls.__mro__[1:]:
        if line := next((twin for twin in TWINS if twin.stock is base), None) or _known(base):
            return line
    return None


def _opted(cls: type) -> Twin | None:
    """The line of a subclass that the caller names: what it has of its own comes first. None where
    ours, which is no subclass of stock, would come behind stock's forward."""
    if (base := _relative(cls)) is None or not issubclass(base.ours, base.stock):
        return None
    return base._replace(stock=cls, ours=foreign.extended(cls, base.ours))


def _twin(module: torch.nn.Module, subclasses: Iterable[type] = ()) -> Twin | None:
    """The line by which the module can be swapped."""
    cls = type(module)
    if line := next((twin for twin in TWINS if cls is twin.stock and twin.fits(module)), None):
        return line
    line = _opted(cls) if cls in subclasses else _known(cls)
    return line if line and line.fits(module) else None


def _ours(module: torch.nn.Module) -> Twin | None:
    """The line whose class of ours the module has, exactly."""
    cls = type(module)
    if foreign.is_derived(cls):
        return _known(foreign.stock_of(cls)) or _opted(foreign.stock_of(cls))
    return next((twin for twin in TWINS if cls is twin.ours), None)


def _is_ours(module: torch.nn.Module) -> bool:
    """Whether its class is ours, or a subclass of such a one."""
    ours = isinstance(module, tuple(twin.ours for twin in TWINS))
    return ours or any(map(foreign.is_derived, type(module).__mro__))


def _ops(module: torch.nn.Module, twin: Twin) -> set[str]:
    """What a module will run; of a Sequential what its chains are."""
    if not issubclass(twin.ours, nn.Sequential):
        return {twin.op}
    if chains := nn.fused_chains(module):
        heads = ((_twin(chain[0]) or _ours(chain[0])).op for chain in chains)
        return {"conv2d_max_pool2d" if head == "conv2d" else head for head in heads}
    return {"conv2d", "batch_norm"}  # in eval mode alone


def _in_use(module: torch.nn.Module, twin: Twin) -> list[str]:
    """The extras that the stock class would lose."""
    values = ((name, getattr(module, name), getattr(twin.ours, name)) for name in twin.extras)
    return [f"{name}={value}" for name, value, default in values if value != default]


def _obstacle(module: torch.nn.Module, subclasses: Iterable[type] = ()) -> tuple[Twin, str] | None:
    """Why a module that is a relative of a stock class in the table cannot be swapped."""
    cls = type(module)
    for twin in TWINS:
        stock = twin.stock.__name__
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name == stock:
                return twin, f"scripted: TorchScript holds its own compiled {stock}"
        elif "quantized" in cls.__module__ and cls.__name__ == stock:
            return twin, f"quantised: it computes otherwise than {stock}"
        elif cls is twin.stock or cls in subclasses or isinstance(module, twin.ours):
            continue
        elif twin.stock is torch.nn.Sequential:  # everybody's base class
            continue
        elif isinstance(module, twin.stock):
            if becomes := getattr(cls, "cls_to_become", None):
                if becomes is twin.ours:
                    continue
                return twin, f"lazy: it becomes a {stock} at its first call, swap it after that"
            if torch.nn.utils.parametrize.is_parametrized(module):
                names = ", ".join(module.parametrizations)
                return twin, f"parametrized ({names}): its class is made per instance"
            return twin, f"a subclass of {stock}: only the exact class is swapped"
    return None


def _in_parts(module: torch.nn.Module) -> str | None:
    """Why a module of a class that is known, or of a subclass of it, is not ours itself."""
    cls = type(module)
    if _known(cls):
        return foreign.misfit(cls, module)
    known = next((base for base in cls.__mro__ if _known(base)), None)
    if known is None or _is_ours(module):
        return None
    return f"a subclass of {known.__name__}: only the exact class is swapped"


def _left(module: torch.nn.Module) -> str:
    """Why a module has no kernel of ours."""
    if obstacle := _obstacle(module):
        return obstacle[1]
    if getattr(type(module), "cls_to_become", None) in [twin.ours for twin in TWINS]:
        return "lazy: it becomes ours at its first call"
    if reason := _in_parts(module):
        return f"its parts are swapped one by one: {reason}" if any(module.children()) else reason
    if _twin(module) is None:
        return f"no kernel of ours for {type(module).__name__}"
    return "not swapped" + (": DLKERNELS_DISABLE is set" if _disabled() else "")


def _listed(module: torch.nn.Module) -> bool:
    """Whether a module without a kernel of ours gets a line: a leaf, or a relative of a twin."""
    related = _twin(module) or _obstacle(module) or _in_parts(module)
    return bool(related or not any(module.children()))


# --- swap, unswap, report ---------------------------------------------------------------------


def _set_classes(changes: list[tuple[torch.nn.Module, type[torch.nn.Module]]]) -> None:
    for module, cls in changes:
        if isinstance(module, nn.Freezable):  # stock's class would not drop it in time
            module.drop_prepared()
        module.__class__ = cls
    # Code that torch.compile made for the old class would still run (seen on torch 2.11). Without
    # dynamo in the process nothing was compiled, and importing it costs more than a second.
    if changes and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _Changed(NamedTuple):
    """What a swap has changed."""

    modules: list[tuple[torch.nn.Module, Twin]]
    losses: list[torch.nn.Module]
    weights: list[torch.nn.Parameter]  # that are channels_last now


def _swap(model, ops, filter_fn, strict, subclasses, channels_last) -> _Changed:
    modules = _modules(model, "swap")
    known = sorted({twin.op for twin in TWINS})
    wanted = set(known if ops is None else (ops,) if isinstance(ops, str) else ops)
    if unknown := sorted(map(str, wanted - set(known))):
        raise ValueError(f"swap: no op named {', '.join(unknown)}; known: {', '.join(known)}")
    if channels_last not in (False, True, "auto"):
        raise ValueError(
            f'swap: channels_last must be False, True or "auto", got {channels_last!r}'
        )
    subclasses = tuple(subclasses)
    for cls in subclasses:
        if not isinstance(cls, type) or _relative(cls) is None:
            raise ValueError(f"swap: {cls!r} is no subclass of a class that has one of ours")
        if _opted(cls) is None:
            stock, ours = (_name(c) for c in (_relative(cls).stock, _relative(cls).ours))
            raise ValueError(
                f"swap: {cls!r} would run the forward of {stock}, of which {ours} is no subclass"
            )
    if _disabled():
        logger.warning("swap: DLKERNELS_DISABLE is set, the model stays as it is")
        return _Changed([], [], [])

    def is_wanted(module, name, ops):
        return ops and ops <= wanted and (not filter_fn or filter_fn(module, name))

    plan, stuck, losses = [], [], []
    for name, module in reversed(modules):  # children before their parents
        twin, reason = _obstacle(module, subclasses) or (_twin(module, subclasses), None)
        if twin is not None and is_wanted(
            module, name, {twin.op} if reason else _ops(module, twin)
        ):
            if reason is None:
                plan.append((name, module, twin))
            else:
                stuck.append(f"{name or '(model)'} ({_name(type(module))}): {reason}")
        if (loss := foreign.loss_of(module)) is not None:
            if is_wanted(module, _loss_name(name), {_LOSS}):
                losses.append((module, loss))
    if strict and stuck:
        raise ValueError(f"swap: {len(stuck)} cannot be swapped: {'; '.join(reversed(stuck))}")

    for name, _, twin in plan:
        logger.debug("swap: %s becomes %s", name or "(model)", _name(twin.ours))
    _set_classes([(module, twin.ours) for _, module, twin in plan])
    for module, loss in losses:
        foreign.set_loss(module, loss)
    weights = _to_channels_last([module for _, module in modules], channels_last)
    return _Changed([(m, twin) for _, m, twin in plan], [m for m, _ in losses], weights)


def _loss_name(name: str) -> str:
    return f"{name}.loss_function" if name else "loss_function"


def _to_channels_last(modules, wanted: bool | str) -> list[torch.nn.Parameter]:
    """The weights of convolutions that it made channels_last."""
    if wanted == "auto":
        # Those blocks are channels_last inside: otherwise each converts its input and its output.
        wanted = any(isinstance(module, nn.Fused) for module in modules) and not any(
            isinstance(module, torch.nn.parallel.DistributedDataParallel)  # buckets have strides
            for module in modules
        )
    if not wanted:
        return []
    convolutions = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    weights = []
    for module in modules:
        if isinstance(module, convolutions) and isinstance(module.weight, torch.nn.Parameter):
            weight = module.weight
            if weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                weights.append(weight)
    return weights


def swap(
    model: torch.nn.Module,
    ops: Iterable[str] | None = None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    strict: bool = False,
    *,
    subclasses: Iterable[type[torch.nn.Module]] = (),
    channels_last: bool | str = False,
) -> torch.nn.Module:
    """Gives our class to every module of ``model`` that has one; in place, returns ``model``.

    Args:
        model: a network, or a loss module itself.
        ops: names of the ops to swap, such as ``["cross_entropy"]``; all by default.
        filter_fn: ``filter_fn(module, name) -> bool``, asked for each module that has a twin, a
            composite and its parts one by one; for the loss of a transformers model, with its name
            and ``.loss_function``.
        strict: raise, with nothing changed, where a module that was asked for is a relative of one
            of torch's classes in the table and cannot be swapped: a subclass, parametrized,
            quantised or scripted. Blocks that are swapped part by part are no such case.
        subclasses: subclasses of classes with a twin, to be swapped too. What such a class defines
            itself stays, a ``forward`` too: ours is what it inherits, or calls by ``super()``.
        channels_last: whether the weights of convolutions, and so all images behind the first one,
            become channels_last. "auto": where there are residual blocks of ours, the model is not
            under DDP yet. A network that calls ``view`` on an image needs ``reshape`` for it.

    Residual blocks of torchvision, timm and transformers become one op, with the modules in them as
    they are, and so do those of ``foreign.NAMES`` of which ``torch.fx`` sees that they are such;
    where that cannot be, for what they hold, the modules are swapped alone.

    With ``DLKERNELS_DISABLE=1`` in the environment it changes nothing, and logs that.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown op, a class without a relative; under ``strict`` also the modules
            that cannot be swapped.
    """
    _swap(model, ops, filter_fn, strict, subclasses, channels_last)
    return model


def unswap(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every module with a class of ours its stock class; in place, returns ``model``.

    It does not ask how the module came to be ours: one built as ``dlkernels.nn.X`` becomes stock
    too, so that the model can be pickled for a machine without dlkernels. A module that uses what
    stock lacks (``softcap``, ...) and a subclass of ours are left, with a warning in the log.
    Weights that are channels_last stay so.
    """
    changes = []
    for name, module in reversed(_modules(model, "unswap")):
        if foreign.has_ours(module):
            foreign.restore_loss(module)
        twin = _ours(module)
        if twin is not None and not (extras := _in_use(module, twin)):
            changes.append((module, twin.stock))
            for extra in twin.extras:  # set to its default: no trace of it stays
                module.__dict__.pop(extra, None)
        elif twin is not None or _is_ours(module):
            why = f"it uses {', '.join(extras)}" if twin else "it is a subclass of ours"
            cls = _name(type(module))
            logger.warning("unswap: %s stays %s: %s", name or "(model)", cls, why)
    _set_classes(changes)
    return model


@contextlib.contextmanager
def swapped(model: torch.nn.Module, *arguments, **keywords) -> Iterator[torch.nn.Module]:
    """``with swapped(model):`` swaps, and at the end, or on an exception, restores the modules
    that it changed and no others. Arguments and errors are those of ``swap``."""
    parameters = inspect.signature(swap).bind(model, *arguments, **keywords)
    parameters.apply_defaults()
    changed = _swap(**parameters.arguments)
    try:
        yield model
    finally:
        _set_classes([(module, t.stock) for module, t in changed.modules if type(module) is t.ours])
        for module in filter(foreign.has_ours, changed.losses):
            foreign.restore_loss(module)
        for weight in changed.weights:
            weight.data = weight.data.contiguous()


def report(model: torch.nn.Module) -> Records:
    """One ``Swapped(name, old, new, reason)`` per module that is a leaf or has a twin.

    ``new`` is the class of ours; where it is empty, ``reason`` says why the module was left, and
    where it is a residual block's, why it calls its modules one by one, if it does. Derived from
    the classes as they are now, so it also holds for a copy or a loaded pickle.
    """
    records = Records()
    for name, module in _modules(model, "report"):
        cls = type(module)
        if twin := _ours(module):
            records.append(Swapped(name, _name(twin.stock), _name(cls), _one_by_one(module)))
        elif _is_ours(module):
            of = next((twin for twin in TWINS if isinstance(module, twin.ours)), None)
            reason = "a subclass of ours, as its author made it"
            records.append(Swapped(name, _name((of or _relative(cls)).stock), _name(cls), reason))
        elif _listed(module):
            records.append(Swapped(name, _name(cls), "", _left(module)))
        if foreign.has_ours(module):
            loss = module.loss_function
            records.append(Swapped(_loss_name(name), _name(loss.stock), _name(type(loss)), ""))
        elif loss := foreign.loss_of(module):
            reason = "not swapped" + (": DLKERNELS_DISABLE is set" if _disabled() else "")
            records.append(Swapped(_loss_name(name), _name(loss), "", reason))
    return records


def _one_by_one(module: torch.nn.Module) -> str:
    """Why a composite of ours calls its modules; empty where it does not, and of others."""
    reason = module.one_by_one() if isinstance(module, nn.Composite) else None
    return f"module by module: {reason}" if reason else ""


# --- explain ----------------------------------------------------------------------------------


def _eager() -> contextlib.AbstractContextManager:
    """Compiled models run eagerly inside: hooks and the record of choices see nothing else."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _is_composite(module: torch.nn.Module) -> bool:
    """Whether it is ours and calls its modules, or does the work of them."""
    return isinstance(module, nn.Composite) or type(module).forward is nn.Sequential.forward


def _fused(modules: list[tuple[str, torch.nn.Module]]) -> dict[torch.nn.Module, str]:
    """The modules that are not called themselves, and the name of the one that does their work."""
    return {
        module: name
        for name, parent in reversed(modules)  # the outermost is the last to say so
        if _is_composite(parent)
        for chain in nn.fused_chains(parent)
        if not any(map(nn.is_observed, chain))
        for module in chain
    }


def explain(model: torch.nn.Module, *inputs, **kwargs) -> Records:
    """Runs ``model(*inputs, **kwargs)`` once and says which kernel each module took, and why.

    A module of ours, and any module whose forward calls a function of ours itself, gets one
    ``Explained(name, cls, kernel, reason)``; so does each stock leaf, with kernel "stock". For a
    loss: ``explain(loss, logits, target)``. The forward is a real one, in the mode (train, eval,
    grad, autocast) that the caller set: in training mode running statistics move.
    """
    modules = _modules(model, "explain")
    choices: dict[torch.nn.Module, list[config.Choice]] = {module: [] for _, module in modules}
    fused = _fused(modules)
    called: set[torch.nn.Module] = set()
    stack: list[torch.nn.Module] = []
    done = 0

    def settle() -> None:
        """What was recorded since the last border belongs to the innermost running module."""
        nonlocal done
        if stack:
            choices[stack[-1]] += recorded[done:]
        done = len(recorded)

    def enter(module, args) -> None:
        settle()
        called.add(module)
        stack.append(module)

    def leave(module, args, output) -> None:
        settle()
        if module in stack:  # above it: modules whose exception the model caught
            while stack.pop() is not module:
                pass

    with contextlib.ExitStack() as cleanup:
        recorded = cleanup.enter_context(config.recording())
        cleanup.enter_context(_eager())
        for _, module in modules:
            if module not in fused:
                cleanup.callback(module.register_forward_pre_hook(enter).remove)
                cleanup.callback(module.register_forward_hook(leave, always_call=True).remove)
        model(*inputs, **kwargs)

    records = Records()
    for name, module in modules:
        # dict.fromkeys: each different choice once, in order.
        kernels = ", ".join(dict.fromkeys(choice.kernel for choice in choices[module]))
        reasons = "; ".join(dict.fromkeys(choice.reason for choice in choices[module]))
        ours = _is_ours(module)
        if _is_composite(module) and not kernels:
            continue  # its modules have lines of their own
        if not (kernels or ours or _listed(module)):
            continue
        if module in fused:
            kernels, reasons = "fused", f"a part of {fused[module] or '(model)'}"
        elif module not in called:
            kernels, reasons = "none", "not called with these inputs"
        elif not kernels:
            kernels = "unknown" if ours else "stock"
            reasons = "it recorded no choice" if ours else _left(module)
        records.append(Explained(name, _name(type(module)), kernels, reasons))
    return records


# --- verify -----------------------------------------------------------------------------------


class _Call:
    """One call of a module in the real run, and the gradients that came back to its outputs."""

    def __init__(self, module: torch.nn.Module, classes: list[type], hooks, args, kwargs) -> None:
        self.signature = inspect.signature(module.forward)
        arguments = self.signature.bind(*args, **kwargs).arguments
        self.module = copy.deepcopy(module)
        for child in self.module.modules():  # a chain with a hook in it would not run as one
            for installed in (child._forward_pre_hooks, child._forward_hooks):
                for key in [key for key, hook in installed.items() if hook in hooks]:
                    del installed[key]
        self.classes = classes
        self.arguments = {name: tree_map(_copy, value) for name, value in arguments.items()}
        self.gradients: dict[int, Tensor] = {}
        self.device = next((tensor.device.type for tensor in _tensors((args, kwargs))), "cpu")
        self.autocast = torch.is_autocast_enabled(self.device)
        self.dtype = torch.get_autocast_dtype(self.device)

    def listen(self, output: Any) -> None:
        for i, tensor in enumerate(_tensors(output)):
            # A tensor's hook gets the gradient of the value it had here, whatever is done to the
            # tensor in place afterwards.
            if tensor.requires_grad:
                tensor.register_hook(lambda grad, i=i: self.gradients.update({i: _copy(grad)}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copy(value: Any) -> Any:
    """A leaf tensor with the values, strides and requires_grad of ``value``."""
    if not isinstance(value, Tensor):
        return value
    tensor = value.detach()
    if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.numel() > 0:
        # The memory from the first to the last element, gaps and overlaps included.
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((n - 1) * step for n, step in sizes)
        memory = tensor.as_strided((extent,), (1,)).clone()
        tensor = memory.as_strided(tensor.shape, tensor.stride())
    else:
        tensor = tensor.clone()
    return tensor.requires_grad_(value.requires_grad)


def _no_view(value: Any) -> Any:
    """A view that is changed in place forgets the hooks of its gradient: a copy does not. Stock's
    linear layer gives a view for inputs of three dimensions and more."""
    if isinstance(value, Tensor) and value.requires_grad and value._is_view():
        return value.clone()
    return value


def _numbered(name: str, tree: Any) -> dict[str, Tensor]:
    tensors = _tensors(tree)
    if len(tensors) == 1:
        return {name: tensors[0]}
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}


def _replay(call: _Call, which: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of a recorded call by "ours" or "stock"; in ``dtype`` if given."""

    def convert(value: Any) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return _copy(value)
        return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)

    module, kernels = copy.deepcopy(call.module), config.kernels
    try:
        if which == "ours":
            for child, cls in zip(module.modules(), call.classes, strict=True):
                child.__class__ = cls
        else:
            config.kernels = "stock"
        if dtype is not None:
            module.to(dtype)
        arguments = {name: tree_map(convert, value) for name, value in call.arguments.items()}
        bound = inspect.BoundArguments(call.signature, arguments)
        autocast = call.autocast and dtype is None
        with torch.autocast(call.device, dtype=call.dtype, enabled=autocast):
            output = module.forward(*bound.args, **bound.kwargs)  # not __call__: no user's hooks

        wanted = dict(module.named_parameters())
        for name, value in arguments.items():
            wanted |= _numbered(name, value)
        wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
        backward = [
            (tensor, call.gradients[i].to(tensor.dtype))
            for i, tensor in enumerate(_tensors(output))
            if i in call.gradients and tensor.requires_grad
        ]
        results = _numbered("output", output)
        if wanted and backward:
            tensors, upstream = zip(*backward, strict=True)
            gradients = torch.autograd.grad(
                tensors, [*wanted.values()], upstream, allow_unused=True
            )
            for name, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    results[f"grad {name}"] = gradient
    finally:
        config.kernels = kernels
    return results


def _errors(result: Tensor, exact: Tensor, where: Tensor) -> tuple[float, float]:
    """The largest and the root mean square."""
    difference = (result.detach().double() - exact)[where]
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def _judge(
    ours: Tensor | None, stock: Tensor, exact: Tensor, factor: float
) -> tuple[float, float, bool, str]:
    """(error, stock_error, ok, reason) by the rule of ``verify``."""
    finite = stock.isfinite()
    where = finite & exact.isfinite()
    stock_error, stock_rms = _errors(stock, exact, where)
    if ours is None:
        return math.nan, stock_error, False, "missing"
    if (ours.dtype, ours.shape) != (stock.dtype, stock.shape):
        ours_is, stock_is = (f"{t.dtype} {tuple(t.shape)}" for t in (ours, stock))
        return math.nan, stock_error, False, f"{ours_is} where stock has {stock_is}"
    error, rms = _errors(ours, exact, where)
    # inf and NaN belong where stock has them, and nowhere else.
    special = torch.allclose(ours[~finite], stock[~finite], equal_nan=True)
    if not special or not ours[finite].isfinite().all():
        return error, stock_error, False, "not finite where stock is, or the reverse"
    largest = exact[where].abs().max().item() if where.any() else 0.0
    ulp = math.ldexp(torch.finfo(ours.dtype).eps, math.frexp(largest)[1] - 1)
    if ours.dtype is torch.float64:
        # The reference is no finer than what it judges. What is left to find is an accumulation in
        # float32, which is off by 2**29 ulp.
        ulp *= 2**10
    if error > factor * stock_error + ulp:
        return error, stock_error, False, f"largest error > {factor:.0f} x stock's + {ulp:.1e}"
    if rms > factor * stock_rms + ulp:
        reason = f"rms error {rms:.1e} > {factor:.0f} x stock's {stock_rms:.1e} + ulp"
        return error, stock_error, False, reason
    return error, stock_error, True, ""


def _factor(module: torch.nn.Module, what: str, tensor: Tensor) -> float:
    """How often stock's error is allowed."""
    if tensor.dtype is not torch.float32:
        return 2.0
    return _ours(module).allowed[what.startswith("grad weight")]


@contextlib.contextmanager
def _as_stock(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Stock inside, so that a wrong class of ours cannot falsify what its neighbours meet. One
    with an extra in use has no stock class: it keeps its own, on the reference in torch ops."""
    classes = [(module, type(module)) for module in modules]
    kernels, config.kernels = config.kernels, "stock"
    try:
        for module, _ in classes:
            if not _in_use(module, twin := _ours(module)):
                module.__class__ = twin.stock
        yield
    finally:
        config.kernels = kernels
        for module, cls in classes:
            module.__class__ = cls


def _run_and_record(roots, inputs, target, loss, calls: dict[torch.nn.Module, list[_Call]]) -> None:
    """The real forward and backward; fills ``calls``. No ``.grad`` of the model is touched."""
    classes = {module: [type(child) for child in module.modules()] for module in calls}
    running: list[tuple[torch.nn.Module, _Call]] = []

    def enter(module, args, kwargs) -> None:
        if module in calls:  # a copy made for a replay has these hooks too
            running.append((module, _Call(module, classes[module], (enter, leave), args, kwargs)))

    def leave(module, args, output) -> Any:
        while running and module in calls:
            entered, call = running.pop()
            if entered is module:
                calls[module].append(call)
                output = tree_map(_no_view, output)
                call.listen(output)
                return output

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    args, kwargs = tree_map(_copy, (args, kwargs))
    floats = [tensor for tensor in _tensors((args, kwargs)) if tensor.is_floating_point()]
    if floats and not any(tensor.requires_grad for tensor in floats):
        floats[0].requires_grad_()
    leaves = [p for root in roots for p in root.parameters()] + floats
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if torch.is_grad_enabled():  # the model may change its inputs in place, but not a leaf
        args, kwargs = tree_map(
            lambda x: x.clone() if isinstance(x, Tensor) and x.requires_grad else x, (args, kwargs)
        )

    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(_eager())
        for module in calls:
            hook = module.register_forward_pre_hook(enter, with_kwargs=True)
            cleanup.callback(hook.remove)
            cleanup.callback(module.register_forward_hook(leave).remove)
        cleanup.enter_context(_as_stock(calls))
        output = roots[0](*args, **kwargs)
        if loss is not None:
            output = loss(output) if target is None else loss(output, target)
    ends = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    if ends:
        random = torch.Generator().manual_seed(0)
        upstream = [
            torch.ones_like(end)
            if end.dim() == 0
            else torch.randn(end.shape, generator=random).to(end)
            for end in ends
        ]
        torch.autograd.grad(ends, leaves, upstream, allow_unused=True)


def verify(
    model: torch.nn.Module,
    inputs: Any,
    target: Any = None,
    loss: Callable[..., Tensor] | None = None,
    strict: bool = False,
) -> Records:
    """Forward and every gradient, module by module: ours against stock and against float64.

    The model runs once as stock, forward and backward. For each module of ours the inputs and the
    upstream gradient that it met there are replayed through our class, the stock class, and the
    stock class in float64. A result is ``ok`` if its error is at most 2 x the error of stock
    + 1 ulp of the largest value, in the maximum and in the root mean square; of a convolution in
    float32 4 x, of its weight's gradient and of a residual block 5 x. Where a tensor is a number or
    two, stock can be exact by luck and ours miss that by an ulp: look at the error then.

    Args:
        model: swapped, or built of ``dlkernels.nn``; a loss module too: ``verify(loss, (x, y))``.
        inputs: one tensor, a tuple of positional arguments or a dict of keyword arguments. Where
            none of them requires grad, the first floating-point one is made to (on a copy).
        target: second argument of ``loss``; without it the call is ``loss(output)``.
        loss: where the backward starts, and verified too if it is a module of ours (its name is
            "loss"). Without one it starts from the outputs, with a fixed random gradient.
        strict: raise unless every module of ours was called and is ok, and there is one.

    Returns:
        One ``Verified`` per module and tensor: "output", "grad input", "grad weight", ...; of a
        module that is called several times, the worst call. Parameters and ``.grad`` are as they
        were. The run is a real one: in training mode running statistics move. Under ``no_grad``
        there are only outputs.

    Raises:
        TypeError: ``model`` is not a module.
        AssertionError: under ``strict``, with the records that are not ok.
    """
    named = _modules(model, "verify")
    roots = [model]
    if isinstance(loss, torch.nn.Module):
        roots.append(loss)
        named += [(f"loss.{name}" if name else "loss", m) for name, m in loss.named_modules()]
    calls: dict[torch.nn.Module, list[_Call]] = {m: [] for _, m in named if _ours(m)}
    _run_and_record(roots, inputs, target, loss, calls)

    records = Records()
    for module, recorded in calls.items():
        name, cls = next(n for n, m in named if m is module), _name(type(module))
        worst: dict[str, Verified] = {}
        for call in recorded:
            ours, stock = _replay(call, "ours"), _replay(call, "stock")
            exact = _replay(call, "stock", torch.float64)
            for what, tensor in stock.items():
                judged = _judge(ours.get(what), tensor, exact[what], _factor(module, what, tensor))
                verdict = Verified(name, cls, what, *judged)
                known = worst.setdefault(what, verdict)
                if (not verdict.ok, verdict.error) > (not known.ok, known.error):
                    worst[what] = verdict
        nothing = Verified(name, cls, "", math.nan, math.nan, None, "not called with these inputs")
        records += worst.values() or [nothing]
    if strict:
        if not records:
            raise AssertionError("verify: no module of ours in the model; swap it first")
        if wrong := Records(record for record in records if not record.ok):
            raise AssertionError(f"verify: {len(wrong)} of {len(records)} not ok\n{wrong}")
    return records

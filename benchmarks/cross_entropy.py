"""Rows and providers of cross-entropy.

**The work.** The logits are no leaf: in a network they come out of a linear layer, whose backward
takes their gradient. So the timed work is ``torch.autograd.grad(loss, logits)`` with logits that
are a view of a leaf, which hands the gradient over exactly as autograd hands it to the layer
before, for all providers alike. With ``loss.backward()`` on a leaf, AccumulateGrad copies a
gradient to which somebody else still refers, a cost that no network has; the two ``leaf`` rows
show it. Forward rows run without a graph.

**The data.** Normal logits times 3 (the spread of a half-trained classifier), never zeros: equal
logits would skip no work, but their exponentials are the cheap ones. Before each sample the logits
are written anew from a master copy, untimed: a linear layer would have written them just now, so as
much of them as fits is in cache, whichever provider ran before; nor can a provider that writes
its gradient over the logits change what the next one reads. Rotating several inputs would say
instead that logits come from memory, which is true only where they are larger than the caches, and
there both ways are equal. A fraction of the copy bandwidth above 1 means that the cache delivered.

**The bytes.** Logits read once, gradient written once, targets read once. **The flops**, per
logit: maximum, subtraction, exponential and sum; for the gradient a product and a subtraction.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Provider, Row

OP = "cross_entropy"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """One line of the tables below. ``options`` are those of ``F.cross_entropy`` but for
    ``target`` ("index" or "probability") and the booleans ``weighted`` and ``leaf``."""

    name: str
    shape: tuple[int, ...]
    reason: str
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    work: str = "forward+gradient"
    options: dict = {}  # read only
    upstream: float | str = 1.0  # a factor on the loss, or "rows" for a random one per row
    calls: int = 1


IMAGES, SEGMENTATION, DIGITS = (4096, 1000), (32, 21, 128, 128), (128, 10)
LLAMA2, LLAMA3 = (2048, 32000), (512, 128256)

_PLAIN = [
    Case("4096x1000", IMAGES, "ImageNet classes; 16 MB of logits still fit the last cache"),
    Case("2048x32000", LLAMA2, "Llama 2's vocabulary; 262 MB, far beyond the caches"),
    Case("512x128256", LLAMA3, "Llama 3's vocabulary; one row is half of an L2 cache"),
    Case("32x21x128x128", SEGMENTATION, "segmentation, NCHW: classes lie 64 KB apart"),
    Case(
        "32x21x128x128 channels_last",
        SEGMENTATION,
        "segmentation, NHWC: rows of 21, which no vector divides",
        layout="channels_last",
    ),
    Case("128x10", DIGITS, "digits: 1280 logits, all of it is the cost of calling", calls=200),
    Case("1x2", (1, 2), "no work at all: the cost of the call alone", calls=500),
]

_DTYPES = [
    case._replace(
        name=f"{case.name} {name}",
        dtype=dtype,
        reason=f"{name} logits and gradient: half the bytes",
    )
    for name, dtype, cases in (
        ("bfloat16", torch.bfloat16, _PLAIN[:6]),
        ("float16", torch.float16, _PLAIN[:1]),
    )
    for case in cases
]

_UPSTREAM = [
    Case(
        f"{rows}x{classes} loss/4",
        (rows, classes),
        "an upstream gradient other than 1 (gradient accumulation, GradScaler)",
        upstream=0.25,
    )
    for rows, classes in (IMAGES, LLAMA2)
]

_OPTIONS = [
    Case(
        "4096x1000 label smoothing",
        IMAGES,
        "every class has a part in the loss",
        options={"label_smoothing": 0.1},
    ),
    Case(
        "4096x1000 weight, ignored",
        IMAGES,
        "class weights, and an eighth of the rows ignored",
        options={"weighted": True, "ignore_index": -100},
    ),
    Case(
        "4096x1000 probabilities",
        IMAGES,
        "class probabilities as targets (mixup, distillation): a second input as large",
        options={"target": "probability"},
    ),
    Case(
        "4096x1000 reduction none",
        IMAGES,
        "a loss and an upstream gradient for each row",
        options={"reduction": "none"},
        upstream="rows",
    ),
]

_LEAF = [
    Case(
        f"{rows}x{classes} leaf",
        (rows, classes),
        "loss.backward() into the .grad of a leaf: see the head of this file",
        options={"leaf": True},
    )
    for rows, classes in (IMAGES, LLAMA2)
]

_FORWARD = [
    case._replace(
        name=f"{case.name} forward", work="forward", reason="validation: no gradient is wanted"
    )
    for case in _PLAIN
]

CASES = _PLAIN + _UPSTREAM + _DTYPES + _OPTIONS + _LEAF + _FORWARD


class Data:
    """The tensors of a case in one memory layout: a master copy, and the logits that are used."""

    def __init__(self, case: Case, layout: str, device: str):
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        self.case, shape, options = case, case.shape, dict(case.options)
        rows_shape, classes = (shape[0], *shape[2:]), shape[1]
        kind, self.leaf = options.pop("target", "index"), options.pop("leaf", False)

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        drawn_logits = (3 * drawn(*shape)).to(device, case.dtype)
        self.master = drawn_logits.contiguous(memory_format=LAYOUTS[layout])
        if kind == "probability":
            self.target = drawn(*shape).softmax(1).to(device, case.dtype)
        else:
            self.target = torch.randint(classes, rows_shape, generator=generator)
            if "ignore_index" in options:
                ignored = torch.rand(rows_shape, generator=generator) < 1 / 8
                self.target[ignored] = options["ignore_index"]
            self.target = self.target.to(device)
        if options.pop("weighted", False):
            options["weight"] = (0.5 + torch.rand(classes, generator=generator)).to(
                device, case.dtype
            )
        self.upstream = (
            drawn(*rows_shape).to(device, case.dtype) if case.upstream == "rows" else None
        )
        self.options = options
        self.wants_gradient = case.work != "forward"
        self.source = torch.empty_like(self.master).requires_grad_(self.wants_gradient)
        self.logits = self.source

    def prepare(self) -> None:
        """Logits as a layer before has just written them, with no gradient and no graph yet."""
        self.source.grad = None
        with torch.no_grad():
            self.source.copy_(self.master)
        self.logits = self.source
        if self.wants_gradient and not self.leaf:
            with torch.enable_grad():
                self.logits = self.source.view_as(self.source)

    def work(self, loss_of: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The timed call: the loss by ``loss_of`` and, if the case has one, its gradient."""
        options, target, factor = self.options, self.target, self.case.upstream

        def forward():
            return (loss_of(self.logits, target, **options),)

        def leaf():
            loss = loss_of(self.logits, target, **options)
            loss.backward()
            return loss, self.logits.grad

        def gradient():
            loss = loss_of(self.logits, target, **options)
            return loss, *torch.autograd.grad(loss, self.logits, self.upstream)

        def scaled():
            loss = loss_of(self.logits, target, **options) * factor
            return loss, *torch.autograd.grad(loss, self.logits)

        if not self.wants_gradient:
            return forward
        if self.leaf:
            return leaf
        return gradient if factor in (1.0, "rows") else scaled


def _ours(*arguments, **options) -> torch.Tensor:
    import dlkernels

    return dlkernels.functional.cross_entropy(*arguments, **options)


def _compiled(function: Callable) -> Callable:
    # A function of its own for each row: dynamo counts the recompilations of a code object, and
    # every row is a new shape. Compiled at the first call, which is not timed.
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _peers(case: Case) -> dict[str, Callable]:
    """The loss functions of libraries for GPUs that are installed and cover the case."""
    peers = {}
    if len(case.shape) != 2 or case.options.get("target") == "probability":
        return peers
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        peers["liger"] = liger_cross_entropy
    except ImportError:
        pass  # a peer that is not installed has no row
    try:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        if "label_smoothing" not in case.options:
            peers["quack"] = quack_cross_entropy
    except ImportError:
        pass
    return peers


def _providers(case: Case, device: str) -> list[Provider]:
    data = Data(case, case.layout, device)

    def of(name: str, function: Callable, **more) -> Provider:
        return Provider(name, data.work(function), data.prepare, **more)

    providers = [of("stock", F.cross_entropy, eager_stock=True)]
    if len(case.shape) == 4:
        other = "contiguous" if case.layout == "channels_last" else "channels_last"
        twin = Data(case, other, device)
        call = twin.work(F.cross_entropy)
        providers.append(Provider(f"stock {other}", call, twin.prepare, eager_stock=True))
    providers += [
        of("torch.compile", _compiled(F.cross_entropy)),
        of("own", _ours, kernels="own"),
        of("auto", _ours, kernels="auto"),
        of("auto compiled", _compiled(_ours), kernels="auto"),
    ]
    if device == "cuda":
        providers += [of(name, function) for name, function in _peers(case).items()]
    return providers


def _counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    logits = math.prod(case.shape)
    rows, size = logits // case.shape[1], case.dtype.itemsize
    passes = 1 if case.work == "forward" else 2
    targets = logits * size if case.options.get("target") == "probability" else rows * 8
    losses = rows * size if case.options.get("reduction") == "none" else size
    return passes * logits * size + targets + losses, (4 if passes == 1 else 6) * logits


def rows(device: str) -> list[Row]:
    """All rows; their tensors are made when a row's providers are asked for."""
    made = []
    for case in CASES:
        bytes_, flops = _counted(case)
        made.append(
            Row(
                op=OP,
                name=case.name,
                reason=case.reason,
                work=case.work,
                dtype=str(case.dtype).removeprefix("torch."),
                shape=case.shape,
                layout=case.layout,
                bytes=bytes_,
                flops=flops,
                providers=functools.partial(_providers, case, device),
                calls=case.calls,
            )
        )
    return made

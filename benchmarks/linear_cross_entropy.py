"""Rows and providers of linear_cross_entropy.

**The work.** The input comes out of a layer before and the weight is a parameter: the timed work is
the loss and ``torch.autograd.grad`` for input and weight, with an upstream gradient of 1 unless a
row says otherwise. Forward rows run without a graph.

**The data.** Normal inputs, weights at the scale that a layer starts with, targets drawn evenly.
Before each sample the input is written anew from a master copy, untimed.

**Stock** is ``linear`` and ``cross_entropy``, which keeps all logits; and torch's own function with
``LinearCrossEntropyOptions()``, which goes by chunks of rows, where torch has it.

**The bytes.** Input and weight read once, their gradients written once: what is left of the traffic
where no logits are. **The flops**: 2·N·D·V for the logits and for each gradient, and an exponential
a logit. The fraction of the multiply-add peak is of float32's.

Names are N x D x V: rows of the input, features, classes.
"""

import importlib.util
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Provider, Row, compiled, rewritten, rows_of

OP = "linear_cross_entropy"
FORWARD, GRADIENT = "forward", "forward+gradient"


class Case(NamedTuple):
    """One line of the tables below."""

    name: str
    shape: tuple[int, int, int]  # N, D, V
    reason: str
    dtype: torch.dtype = torch.float32
    work: str = GRADIENT
    divided: int = 1  # what the loss is divided by before the backward
    reduction: str = "mean"
    devices: tuple[str, ...] = ("cpu", "cuda")
    calls: int = 1


LLAMA2, LLAMA3, SMALL = (2048, 512, 32000), (512, 1024, 128256), (256, 256, 10000)
H200 = (8192, 4096, 128256)


def _named(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


_PLAIN = [
    Case(_named(LLAMA2), LLAMA2, "more rows than features: chunks of rows"),
    Case(_named(LLAMA3), LLAMA3, "fewer rows than features: one chunk, in the gradient's memory"),
    Case(_named(SMALL), SMALL, "a small vocabulary"),
]
CASES = [
    *_PLAIN,
    *(
        case._replace(name=f"{case.name} forward", work=FORWARD, reason="the loss alone")
        for case in _PLAIN
    ),
    *(
        case._replace(
            name=f"{case.name} bfloat16", dtype=torch.bfloat16, reason="bfloat16, sums in float32"
        )
        for case in _PLAIN
    ),
    Case(
        f"{_named(LLAMA2)} loss/4",
        LLAMA2,
        "an upstream gradient of 1/4: one more pass over the gradients",
        divided=4,
    ),
    Case(
        f"{_named(LLAMA2)} reduction none",
        LLAMA2,
        "a gradient for each row: the logits are made again",
        reduction="none",
    ),
    Case(
        f"{_named(H200)} bfloat16",
        H200,
        "Llama 3 with 8192 tokens: what the peers publish",
        dtype=torch.bfloat16,
        devices=("cuda",),
    ),
    *(
        Case(
            _named(shape),
            shape,
            "where the loss' logits would be few: what calling costs",
            calls=calls,
        )
        for shape, calls in (((64, 64, 10), 50), ((64, 64, 300), 20), ((64, 128, 1000), 10))
    ),
]


class Data:
    """The tensors of a case: a master copy of the input, and what is used."""

    def __init__(self, case: Case, device: str):
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        n, d, v = case.shape

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(device, case.dtype)

        wanted = case.work != FORWARD
        self.case = case
        self.master = drawn(n, d)
        self.weight = (drawn(v, d) / d**0.5).requires_grad_(wanted)
        self.target = torch.randint(v, (n,), generator=generator).to(device)
        self.upstream = drawn(n).abs() if case.reduction == "none" else None
        self.source = torch.empty_like(self.master).requires_grad_(wanted)
        self.x = self.source

    def prepare(self) -> None:
        """The input as a layer before has just written it."""
        self.x = rewritten(self.source, self.master)

    def work(self, loss_of: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The timed call: ``loss_of(x, weight, target)`` and, if the case has some, gradients."""

        def forward():
            return (loss_of(self.x, self.weight, self.target),)

        def gradient():
            loss = loss_of(self.x, self.weight, self.target)
            last = loss if self.case.divided == 1 else loss / self.case.divided
            return loss, *torch.autograd.grad(last, (self.x, self.weight), self.upstream)

        return forward if self.case.work == FORWARD else gradient


def _stock(case: Case) -> Callable:
    def call(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target, reduction=case.reduction)

    return call


def _chunked(case: Case) -> Callable:
    options = torch.nn.LinearCrossEntropyOptions()

    def call(x, weight, target):
        return F.linear_cross_entropy(x, weight, target, reduction=case.reduction, options=options)

    return call


def _ours(case: Case) -> Callable:
    import dlkernels

    def call(x, weight, target):
        function = dlkernels.functional.linear_cross_entropy
        return function(x, weight, target, reduction=case.reduction)

    return call


def _liger(case: Case) -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(x, weight, target):
        return liger_fused_linear_cross_entropy(x, weight, target, reduction=case.reduction)

    return call


def _quack(case: Case) -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(x, weight, target):
        return chunked_linear_cross_entropy(x, weight, target, reduction=case.reduction)

    return call


def _providers(case: Case, device: str) -> list[Provider]:
    data = Data(case, device)

    def of(name: str, function: Callable, **more) -> Provider:
        return Provider(name, data.work(function), data.prepare, **more)

    providers = [of("stock", _stock(case), eager_stock=True)]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        providers.append(of("stock chunked", _chunked(case), eager_stock=True))
    providers += [
        of("torch.compile", compiled(_stock(case))),
        of("own", _ours(case), kernels="own"),
        of("auto", _ours(case), kernels="auto"),
    ]
    if device == "cuda" and case.reduction != "none":
        for package, make in (("liger_kernel", _liger), ("quack", _quack)):
            if importlib.util.find_spec(package):
                providers.append(of(package, make(case)))
    return providers


def _counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    n, d, v = case.shape
    numbers, products = n * d + v * d, 1
    if case.work != FORWARD:
        numbers, products = 2 * numbers, 3
    return numbers * case.dtype.itemsize, 2 * n * d * v * products + n * v


def rows(device: str) -> list[Row]:
    """All rows of a device."""
    cases = [case for case in CASES if device in case.devices]
    return rows_of(OP, cases, _counted, _providers, device)

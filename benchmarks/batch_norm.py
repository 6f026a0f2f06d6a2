"""Rows and providers of batch_norm.

**The work.** A training step: the output, the running statistics, and ``torch.autograd.grad`` for
input, weight, bias and residual with a random upstream gradient. ``forward`` is an evaluation: with
the running statistics, without a graph. A ReLU is part of each row but those named ``none``.

**The data.** Before each sample input and residual are written anew from a master copy, untimed: a
convolution has just written them.

**Stock** is timed in the row's layout and in the other one; ``channels_last`` is every image in
that format.

**The bytes.** Training: input (and residual) read once and the output written; upstream gradient
and input read once, and the output where a residual hides its sign, the gradients written. What a
kernel reads twice is not counted, so that no kernel is at the copy bandwidth whose image no cache
holds. **The flops**: 2 for each number of the output, 6 with gradients.

Names are N x C x H x W.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Provider, Row, compiled, rewritten, rows_of

OP = "batch_norm"
FORWARD, GRADIENT = "forward", "forward+gradient"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ACTIVATIONS: dict[str | None, Callable] = {None: lambda x: x, "relu": torch.relu}


class Case(NamedTuple):
    """One line of the tables below."""

    name: str
    shape: tuple[int, ...]
    reason: str
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    work: str = GRADIENT
    residual: bool = False
    activation: str | None = "relu"
    calls: int = 1


def _cases(
    shape: tuple[int, ...],
    reason: str,
    *,
    layouts: tuple[str, ...] = ("channels_last", "contiguous"),
    works: tuple[str, ...] = (GRADIENT, FORWARD),
    label: str = "",
    **more,
) -> list[Case]:
    """A case for each layout and work, named after the shape."""
    cases = []
    for layout in layouts:
        for work in works:
            words = ["x".join(map(str, shape)), "NCHW" if layout == "contiguous" else "", label]
            words.append("residual" if more.get("residual") else "")
            words.append("" if work == GRADIENT else work)
            name = " ".join(word for word in words if word)
            cases.append(Case(name, shape, reason, layout=layout, work=work, **more))
    return cases


RESNET = ((64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8), (64, 512, 4, 4))

CASES = [
    *(
        case
        for shape, reason in zip(
            RESNET,
            (
                "ResNet-18 at 32x32: 17 MB, about a shared cache",
                "ResNet-18 at 32x32",
                "ResNet-18 at 32x32: planes of 64 numbers",
                "ResNet-18 at 32x32: planes of a vector, many channels",
            ),
            strict=True,
        )
        for case in _cases(shape, reason)
    ),
    *(
        case
        for shape in RESNET[:3:2]
        for case in _cases(
            shape, "the end of a block: the sum is never written alone", residual=True
        )
    ),
    *_cases(RESNET[0], "no activation: no output is kept", label="none", activation=None),
    *_cases((16, 64, 112, 112), "ResNet at 224x224: beyond every cache"),
    *_cases((16, 256, 56, 56), "ResNet-50 at 224x224"),
    *_cases(RESNET[0], "half the bytes", label="bfloat16", dtype=torch.bfloat16),
    *_cases(RESNET[2], "the end of a block", residual=True, label="bfloat16", dtype=torch.bfloat16),
    *(
        case
        for images in (1, 8, 32)
        for case in _cases(
            (images, 16, 32, 32),
            "what calling costs beside computing",
            layouts=("contiguous",),
            calls=50,
        )
    ),
]

GPU_CASES = [
    case
    for shape, reason in (
        ((512, 64, 32, 32), "ResNet-18 at 32x32: 64 MB, beyond L2"),
        ((512, 128, 16, 16), "ResNet-18 at 32x32: in L2"),
        ((512, 512, 4, 4), "ResNet-18 at 32x32: few values of many channels"),
        ((256, 256, 56, 56), "ResNet-50 at 224x224"),
    )
    for residual in (False, True)
    for case in _cases(shape, reason, residual=residual, label="bfloat16", dtype=torch.bfloat16)
] + [
    case
    for dtype in (torch.float16, torch.float32)
    for case in _cases(
        (512, 64, 32, 32), "another dtype", label=str(dtype).removeprefix("torch."), dtype=dtype
    )
]


class Data:
    """The tensors of a case in one memory layout: master copies, and what is used."""

    def __init__(self, case: Case, layout: str, device: str):
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
        channels, trained = case.shape[1], case.work == GRADIENT

        def drawn() -> torch.Tensor:
            made = torch.randn(case.shape, generator=generator, device=device, dtype=case.dtype)
            return made.contiguous(memory_format=LAYOUTS[layout])

        self.case = case
        self.masters = [drawn() for _ in range(1 + case.residual)]
        self.upstream = drawn()
        self.parameters = [
            make(channels, device=device).requires_grad_(trained)
            for make in (torch.ones, torch.zeros)
        ]
        self.running = [make(channels, device=device) for make in (torch.zeros, torch.ones)]
        self.sources = [torch.empty_like(m).requires_grad_(trained) for m in self.masters]
        self.prepare()

    def prepare(self) -> None:
        """Input and residual as a convolution has just written them."""
        self.images = list(map(rewritten, self.sources, self.masters))

    def work(self, output_of: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The timed call: ``output_of(input, residual, mean, var, weight, bias, training)``."""
        trained = self.case.work == GRADIENT

        def forward():
            x, residual, *_ = *self.images, None
            return (output_of(x, residual, *self.running, *self.parameters, trained),)

        def step():
            (output,) = forward()
            leaves = [*self.images, *self.parameters]
            return output, *torch.autograd.grad(output, leaves, self.upstream)

        return step if trained else forward


def _stock(case: Case) -> Callable:
    activation = ACTIVATIONS[case.activation]

    def call(x, residual, *others):
        output = F.batch_norm(x, *others)
        return activation(output if residual is None else output + residual)

    return call


def _ours(case: Case) -> Callable:
    import dlkernels

    def call(x, residual, *others):
        return dlkernels.functional.batch_norm(
            x, *others, residual=residual, activation=case.activation
        )

    return call


def _providers(case: Case, device: str) -> list[Provider]:
    """Stock in both layouts, stock compiled, ours, and ours compiled."""
    data = Data(case, case.layout, device)
    other = "contiguous" if case.layout == "channels_last" else "channels_last"
    moved = Data(case, other, device)

    def of(name: str, function: Callable, on: Data = data, **more) -> Provider:
        return Provider(name, on.work(function), on.prepare, **more)

    return [
        of("stock", _stock(case), eager_stock=True),
        of(f"stock {other}", _stock(case), moved, eager_stock=True),
        of("torch.compile", compiled(_stock(case))),
        of("own", _ours(case), kernels="own"),
        of("auto", _ours(case), kernels="auto"),
        of("auto compiled", compiled(_ours(case)), kernels="auto"),
    ]


def _counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    numbers = math.prod(case.shape)
    images = 2 + case.residual  # forward: input, residual and output
    if case.work == GRADIENT:
        of_sum = (
            case.residual and case.activation is not None
        )  # else its gradient is the upstream's
        images += 3 + 2 * of_sum  # upstream, input and its gradient; output, residual's gradient
    return images * numbers * case.dtype.itemsize, numbers * (6 if case.work == GRADIENT else 2)


def rows(device: str) -> list[Row]:
    """All rows of a device."""
    cases = CASES + GPU_CASES if device == "cuda" else CASES
    return rows_of(OP, cases, _counted, _providers, device)

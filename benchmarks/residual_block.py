"""Rows and providers of residual_block.

**The work.** A training step of one block: the output, the running statistics, and
``torch.autograd.grad`` for input and all parameters with a random upstream gradient. ``forward`` is
an evaluation: with the running statistics, without a graph.

**The data.** Normal images and upstream gradients, weights at the scale that a layer starts with.
Before each sample the input is written anew from a master copy, untimed.

**Stock** is torch's convolutions and batch norms, timed in the row's layout and in the other one;
``channels_last`` is input and weights in that format.

**The bytes.** What is read once and written once of input, output, parameters, upstream gradient
and gradients, and in training of each convolution's raw output: written, read by the layer behind,
and read again by the backward, which writes a gradient of each. **The flops**: 2·N·P·Q·K·C·R·S for
each convolution, three times that in training, whatever the algorithm: by Winograd's, 3x3
convolutions can be above the multiply-add peak.

Names are N x C x H x W and the channels behind each convolution, s of the stride.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Provider, Row, compiled, rewritten, rows_of

OP = "residual_block"
FORWARD, GRADIENT = "forward", "forward+gradient"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """One line of the tables below: a convolution of each kernel, 3 or 1, and what they put out.
    The first of 3 has the stride; another size or other channels mean a 1x1 shortcut."""

    name: str
    shape: tuple[int, ...]
    reason: str
    channels: tuple[int, ...]
    kernels: tuple[int, ...] = (3, 3)
    stride: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    work: str = GRADIENT
    calls: int = 1

    @property
    def convolutions(self) -> list[tuple[int, int, int, int]]:
        """(channels in, channels out, kernel, stride) of each; the shortcut's is last."""
        strided = self.kernels.index(3)
        inputs = (self.shape[1], *self.channels)
        made = [
            (inputs[at], self.channels[at], kernel, self.stride if at == strided else 1)
            for at, kernel in enumerate(self.kernels)
        ]
        if self.projects:
            made.append((self.shape[1], self.channels[-1], 1, self.stride))
        return made

    @property
    def projects(self) -> bool:
        return self.stride > 1 or self.channels[-1] != self.shape[1]

    def pixels(self, at: int) -> int:
        """Of the output of a convolution."""
        n, _, h, w = self.shape
        before = at < self.kernels.index(3)
        stride = 1 if before else self.stride
        return n * -(-h // stride) * -(-w // stride)

    @property
    def output_shape(self) -> tuple[int, ...]:
        n, _, h, w = self.shape
        return n, self.channels[-1], -(-h // self.stride), -(-w // self.stride)


def _cases(
    shape: tuple[int, ...], channels: tuple[int, ...], reason: str, *, label: str = "", **more
) -> list[Case]:
    """A training step and an evaluation, named after the shape."""
    words = ["x".join(map(str, shape)), "-".join(map(str, channels))]
    words += [f"s{more['stride']}"] if more.get("stride", 1) > 1 else []
    name = " ".join([*words, label] if label else words)
    return [
        Case(name + ending, shape, reason, channels, work=work, **more)
        for work, ending in ((GRADIENT, ""), (FORWARD, " forward"))
    ]


def _basic(channels: int, size: int, reason: str, **more) -> list[Case]:
    return _cases((64, channels, size, size), (channels, channels), reason, **more)


_BOTTLENECK = {"kernels": (1, 3, 1)}

CASES = [
    *_basic(64, 32, "ResNet-18 at 32x32: many tiles of few channels, images as large as a cache"),
    *_basic(128, 16, "ResNet-18 at 32x32: the products weigh most"),
    *_basic(256, 8, "ResNet-18 at 32x32: the weight is as large as the activations"),
    *_basic(512, 4, "ResNet-18 at 32x32: a large weight for few tiles"),
    *_cases((64, 64, 32, 32), (128, 128), "ResNet-18 between its stages: a projection", stride=2),
    *_cases((16, 256, 14, 14), (64, 64, 256), "a bottleneck of ResNet-50", **_BOTTLENECK),
    *_basic(64, 32, "half the bytes", label="bfloat16", dtype=torch.bfloat16),
]

GPU_CASES = [
    *(
        case
        for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4))
        for case in _cases(
            (512, channels, size, size),
            (channels, channels),
            "ResNet-18 at 32x32",
            label="bfloat16",
            dtype=torch.bfloat16,
        )
    ),
    *_cases(
        (512, 64, 32, 32),
        (128, 128),
        "ResNet-18 between its stages: a projection",
        stride=2,
        label="bfloat16",
        dtype=torch.bfloat16,
    ),
    *_cases(
        (256, 256, 56, 56),
        (64, 64, 256),
        "a bottleneck of ResNet-50",
        label="bfloat16",
        dtype=torch.bfloat16,
        **_BOTTLENECK,
    ),
]


class Data:
    """The tensors of a case in one memory layout: a master copy, and what is used."""

    def __init__(self, case: Case, layout: str, device: str):
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
        trained = case.work == GRADIENT

        def drawn(shape: tuple[int, ...], scale: float = 1) -> torch.Tensor:
            made = torch.randn(shape, generator=generator, device=device, dtype=case.dtype)
            return made.mul_(scale).contiguous(memory_format=LAYOUTS[layout])

        self.case = case
        self.master, self.upstream = drawn(case.shape), drawn(case.output_shape)
        self.layers = []  # weight, γ, β, running mean and variance
        for inputs, outputs, kernel, _ in case.convolutions:
            fan_in = inputs * kernel * kernel
            weight = drawn((outputs, inputs, kernel, kernel), (2 / fan_in) ** 0.5)
            norm = [make(outputs, device=device) for make in (torch.ones, torch.zeros)]
            running = [make(outputs, device=device) for make in (torch.zeros, torch.ones)]
            leaves = [x.requires_grad_(trained) for x in (weight, *norm)]
            self.layers.append((*leaves, *running))
        self.source = torch.empty_like(self.master).requires_grad_(trained)
        self.x = rewritten(self.source, self.master)

    def prepare(self) -> None:
        """The input as a layer has just written it."""
        self.x = rewritten(self.source, self.master)

    def work(self, output_of: Callable) -> Callable:
        """The timed call of ``output_of(x, layers, training)``."""
        if self.case.work == FORWARD:
            return lambda: (output_of(self.x, self.layers, False),)
        leaves = [x for layer in self.layers for x in layer[:3]]

        def step():
            output = output_of(self.x, self.layers, True)
            return output, *torch.autograd.grad(output, [self.x, *leaves], self.upstream)

        return step


def _stock(case: Case) -> Callable:
    settings = [(stride, kernel // 2) for _, _, kernel, stride in case.convolutions]
    count = len(case.kernels)

    def output_of(x, layers, training):
        def layer(x, at):
            weight, gamma, beta, mean, var = layers[at]
            return F.batch_norm(
                F.conv2d(x, weight, None, *settings[at]), mean, var, gamma, beta, training
            )

        past = layer(x, count) if case.projects else x
        for at in range(count - 1):
            x = F.relu(layer(x, at))
        return F.relu(layer(x, count - 1) + past)

    return output_of


def _ours(case: Case) -> Callable:
    from dlkernels.functional import ResidualLayer, residual_block

    settings = [((stride,) * 2, (kernel // 2,) * 2) for _, _, kernel, stride in case.convolutions]
    count = len(case.kernels)

    def output_of(x, layers, training):
        made = [
            ResidualLayer(weight, None, *norm, *pair)
            for (weight, *norm), pair in zip(layers, settings, strict=True)
        ]
        shortcut = made[count] if case.projects else None
        return residual_block(x, made[:count], shortcut, training=training)

    return output_of


def providers(case: Case, device: str) -> list[Provider]:
    """Stock in both layouts, stock compiled, ours, and ours compiled."""
    data = Data(case, case.layout, device)
    other = "contiguous" if case.layout == "channels_last" else "channels_last"
    moved = Data(case, other, device)

    def of(name: str, output_of: Callable, on: Data = data, **more) -> Provider:
        return Provider(name, on.work(output_of), on.prepare, **more)

    stock, ours = _stock(case), _ours(case)
    return [
        of("stock", stock, eager_stock=True),
        of(f"stock {other}", stock, on=moved, eager_stock=True),
        of("torch.compile", compiled(stock)),
        of("own", ours, kernels="own"),
        of("auto", ours, kernels="auto"),
        of("auto compiled", compiled(ours), kernels="auto"),
    ]


def counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    x, y = math.prod(case.shape), math.prod(case.output_shape)
    weights = raw = products = 0
    for at, (inputs, outputs, kernel, _) in enumerate(case.convolutions):
        weight = outputs * inputs * kernel * kernel
        pixels = case.pixels(at)
        weights, raw = weights + weight, raw + pixels * outputs
        products += 2 * pixels * weight
    if case.work == FORWARD:
        return (x + weights + y) * case.dtype.itemsize, products
    images = 2 * x + 2 * y + 5 * raw  # input and gradient, output and its, of y all that is said
    return (images + 2 * weights) * case.dtype.itemsize, 3 * products


def rows(device: str) -> list[Row]:
    """All rows of a device."""
    cases = GPU_CASES if device == "cuda" else CASES
    return rows_of(OP, cases, counted, providers, device)

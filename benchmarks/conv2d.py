"""Rows and providers of conv2d, and of conv_transpose2d, which is its input gradient.

**The work.** ``forward`` runs without a graph. ``input gradient`` and ``weight gradient`` are each
timed alone, by the backward op itself with one gradient asked for, since a step's sum would hide a
slow one behind a fast one. ``forward+gradient`` is the public function and ``torch.autograd.grad``
for input, weight and bias with a random upstream gradient; a first layer wants no gradient of its
input.

**The data.** Normal inputs and upstream gradients, weights at the scale that a layer starts with.
Before each sample what the layer before (the layer behind, of the gradients) would have written
just now is written anew from a master copy, untimed; the rest stays where it is.

**Stock** is timed in the row's layout and in the other one: ``channels_last`` is input and weight
in that format. On a GPU every provider runs under ``cudnn.benchmark = True``, and stock also
without.

**The bytes.** What is read once and written once of input, weight, bias, output, upstream gradient
and gradients. **The flops**: 2·N·P·Q·K·C·R·S / groups for each product, whatever the algorithm: 3x3
convolutions by Winograd's can be above the multiply-add peak.

Names are N x C x H x W, K channels out, R x S, s of the stride; padding keeps the size, unless
said.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Provider, Row, compiled, rewritten, rows_of

OP = "conv2d"
FORWARD, INPUT, WEIGHT, GRADIENT = (
    "forward",
    "input gradient",
    "weight gradient",
    "forward+gradient",
)
DIRECTIONS = (FORWARD, INPUT, WEIGHT)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WORKING_SET = 8  # of input and output: master copies, gradients, another layout, cuDNN's workspace


class Case(NamedTuple):
    """One line of the tables below. ``first`` is a first layer: no gradient of its input."""

    name: str
    shape: tuple[int, ...]  # N, C, H, W, K, R, S
    reason: str
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    work: str = GRADIENT
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = False
    activation: str | None = None
    first: bool = False
    transposed: bool = False
    output_padding: int = 0
    pooled: bool = False  # of conv2d_max_pool2d
    calls: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        _, c, _, _, k, r, s = self.shape
        return (c, k // self.groups, r, s) if self.transposed else (k, c // self.groups, r, s)

    @property
    def convolved(self) -> tuple[int, int]:
        """Height and width of the convolution's output."""
        _, _, h, w, _, r, s = self.shape
        if self.transposed:
            at = [(n - 1) * self.stride - 2 * self.padding + self.output_padding for n in (h, w)]
            return at[0] + r, at[1] + s
        at = [(n + 2 * self.padding - k) // self.stride + 1 for n, k in ((h, r), (w, s))]
        return at[0], at[1]

    @property
    def output_shape(self) -> tuple[int, ...]:
        n, *_, k, _, _ = self.shape
        p, q = self.convolved
        return (n, k, p // 2, q // 2) if self.pooled else (n, k, p, q)


def case_of(
    shape: tuple[int, ...],
    reason: str,
    *,
    works: tuple[str, ...] = (*DIRECTIONS, GRADIENT),
    label: str = "",
    **more,
) -> list[Case]:
    """A case for each work, named after shape, kernel and stride; of an odd square kernel at
    stride 1 the padding keeps the size, unless given."""
    n, c, h, w, k, r, s = shape
    more = {"padding": r // 2, **more}
    stride = f" s{more['stride']}" if more.get("stride", 1) > 1 else ""
    base = f"{n}x{c}x{h}x{w} {k} {r}x{s}{stride}{label and ' '}{label}"
    cases = []
    for work in works:
        ending = "" if work == GRADIENT else f" {work}"
        cases.append(Case(base + ending, shape, reason, work=work, **more))
    return cases


def _square(n: int, channels: int, size: int, kernel: int = 3) -> tuple[int, ...]:
    return n, channels, size, size, channels, kernel, kernel


RESNET = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, size of the blocks of ResNet-18, 32²
_BLOCKS = (
    "many tiles of few channels: the transforms weigh most",
    "the products weigh most",
    "the weight is as large as the activations",
    "64 tiles of an image are 4: a large weight for few of them",
)

_PLAIN = [
    case
    for (channels, size), reason in zip(RESNET, _BLOCKS, strict=True)
    for case in case_of(_square(64, channels, size), f"ResNet-18 at 32x32: {reason}")
]

_CONTIGUOUS = [
    case
    for channels, size in RESNET
    for case in case_of(
        _square(64, channels, size),
        "a model that nobody moved to channels_last",
        label="NCHW",
        layout="contiguous",
    )
]

_LARGE = [
    case
    for n, channels, size, reason in (
        (16, 64, 56, "ResNet at 224x224: sizes that tiles of 4 divide"),
        (16, 128, 28, "ResNet at 224x224"),
        (16, 256, 14, "ResNet at 224x224: a size that tiles of 4 do not divide"),
        (1, 64, 56, "one image: little work for every thread"),
    )
    for case in case_of(_square(n, channels, size), reason, works=DIRECTIONS)
]

_DIRECT = [
    *case_of(
        (64, 64, 32, 32, 128, 3, 3), "ResNet-18 between its blocks", works=DIRECTIONS, stride=2
    ),
    *case_of(
        (16, 128, 56, 56, 128, 3, 3), "ResNet-50 between its blocks", works=DIRECTIONS, stride=2
    ),
    *case_of(
        (64, 512, 2, 2, 512, 3, 3),
        "ResNet-18 at 64x64: of 36 taps of an image 20 are in its padding",
        works=DIRECTIONS,
    ),
    *case_of(
        (64, 256, 4, 4, 512, 3, 3),
        "ResNet-18 at 64x64, between its last blocks",
        works=DIRECTIONS,
        stride=2,
    ),
    *case_of((16, 64, 56, 56, 256, 1, 1), "a product: ResNet-50, widening", works=DIRECTIONS),
    *case_of((16, 256, 56, 56, 64, 1, 1), "a product: ResNet-50, narrowing", works=DIRECTIONS),
    *case_of((16, 1024, 14, 14, 256, 1, 1), "a product of deep rows", works=DIRECTIONS),
    *case_of((64, 64, 32, 32, 128, 1, 1), "the shortcut of ResNet-18", works=DIRECTIONS, stride=2),
    *case_of(
        (64, 3, 32, 32, 64, 3, 3),
        "the first layer of ResNet-18 at 32x32",
        works=(FORWARD, WEIGHT, GRADIENT),
        first=True,
    ),
    *case_of(
        (64, 3, 32, 32, 64, 3, 3),
        "the same of images as they are read",
        works=(FORWARD, INPUT, WEIGHT, GRADIENT),
        label="NCHW",
        layout="contiguous",
    ),
    *case_of(
        (16, 3, 224, 224, 64, 7, 7),
        "the first layer of ResNet at 224x224",
        works=(FORWARD, WEIGHT, GRADIENT),
        stride=2,
        first=True,
    ),
    *case_of(
        (16, 3, 224, 224, 64, 7, 7),
        "the same of images as they are read",
        works=(FORWARD, WEIGHT),
        label="NCHW",
        layout="contiguous",
        stride=2,
        first=True,
    ),
    *case_of((16, 64, 28, 28, 64, 5, 5), "5x5 of many channels", works=DIRECTIONS),
    *case_of((64, 16, 12, 12, 24, 5, 5), "5x5 of Inception", works=DIRECTIONS, bias=True),
    *case_of(
        (64, 88, 12, 12, 20, 5, 5),
        "InceptionNet between its blocks",
        works=DIRECTIONS,
        label="p0",
        layout="contiguous",
        padding=0,
        bias=True,
    ),
    *case_of(
        (16, 128, 56, 56, 128, 3, 3),
        "depthwise: MobileNet; 9 multiplications for each number read",
        works=DIRECTIONS,
        label="depthwise",
        groups=128,
    ),
    *case_of(
        (16, 128, 56, 56, 128, 3, 3),
        "depthwise, between MobileNet's blocks",
        works=DIRECTIONS,
        label="depthwise",
        stride=2,
        groups=128,
    ),
    *case_of(
        (16, 96, 56, 56, 96, 7, 7),
        "depthwise: ConvNeXt",
        works=DIRECTIONS,
        label="depthwise",
        groups=96,
    ),
    *case_of(
        (16, 128, 28, 28, 128, 3, 3),
        "ResNeXt: 32 groups of 4 channels",
        works=DIRECTIONS,
        label="32 groups",
        groups=32,
    ),
]

_HALF = [
    case
    for channels, size in RESNET
    for case in case_of(
        _square(64, channels, size),
        "bfloat16: half the bytes, pairs multiplied where the processor can",
        works=DIRECTIONS,
        label="bfloat16",
        dtype=torch.bfloat16,
    )
]

_FUSED = [
    *case_of(
        _square(64, 64, 32),
        "bias and ReLU before the output is written; stock reads it again",
        works=(FORWARD, GRADIENT),
        label="bias relu",
        bias=True,
        activation="relu",
    ),
]

_GENERATOR = [
    case
    for c, size, k, stride, padding, reason in (
        (100, 1, 512, 1, 0, "DCGAN's first layer, of noise: a product"),
        (512, 4, 256, 2, 1, "DCGAN: four phases of 2x2"),
        (128, 16, 64, 2, 1, "DCGAN"),
        (64, 32, 3, 2, 1, "DCGAN's last layer, to an image: few channels out"),
    )
    for case in case_of(
        (64, c, size, size, k, 4, 4),
        reason,
        works=(FORWARD, GRADIENT),
        label="transposed",
        transposed=True,
        stride=stride,
        padding=padding,
    )
]

# Where "own" and "stock" take the same time is what the choice in csrc/cpu/conv2d.cpp rests on.
_DISPATCH = [
    case
    for n, channels, size in ((1, 16, 4), (1, 32, 8), (1, 64, 8), (4, 64, 8), (4, 64, 16))
    for case in case_of(
        _square(n, channels, size),
        "what calling costs beside computing, and where Winograd begins to pay",
        works=(FORWARD, GRADIENT),
        calls=50,
    )
]

CASES = _PLAIN + _CONTIGUOUS + _LARGE + _DIRECT + _HALF + _FUSED + _GENERATOR + _DISPATCH

_GPU_WORKS = (FORWARD, INPUT, WEIGHT)


def _gpu(shape: tuple[int, ...], reason: str, **more) -> list[Case]:
    more = {"works": _GPU_WORKS, "dtype": torch.bfloat16, **more}
    return case_of(shape, reason, **more)


# channels, size, channels out, kernel, stride
_RESNET18_32 = [
    *((c, size, c, 3, 1) for c, size in RESNET),
    *((c, size, 2 * c, 3, 2) for c, size in RESNET[:3]),
    *((c, size, 2 * c, 1, 2) for c, size in RESNET[:3]),
]
_RESNET_224 = [
    *((c, size, c, 3, 1) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *((c, size, 2 * c, 3, 2) for c, size in ((64, 56), (128, 28), (256, 14))),  # ResNet-18
    *((c, size, c, 3, 2) for c, size in ((128, 56), (256, 28), (512, 14))),  # ResNet-50
    *((c, size, 4 * c, 1, 1) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *((4 * c, size, c, 1, 1) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *((c, size, 2 * c, 1, 2) for c, size in ((256, 56), (512, 28), (1024, 14))),
]
CLIFF = (64, 128, 513, 513, 128, 3, 3)


def gpu_cases(memory: int) -> list[Case]:
    """The rows for a GPU of so many bytes, the most telling first: a check may be cut short."""
    cases = _gpu(
        CLIFF,
        "pytorch#128936: cuDNN's heuristics take a direct kernel, 60 times slower than with 63",
        works=(FORWARD,),
        layout="contiguous",
        stride=2,
        padding=0,
        label="p0 NCHW bfloat16",
    )
    cases += _gpu(
        (128, 128, 56, 56, 128, 3, 3),
        "pytorch#34977: grouped, channels_last",
        groups=32,
        label="32 groups bfloat16",
    )
    cases += _gpu(
        (128, 128, 56, 56, 128, 3, 3),
        "pytorch#170138: depthwise in half precision",
        dtype=torch.float16,
        groups=128,
        label="depthwise float16",
    )
    cases += _gpu(
        (128, 3, 224, 224, 64, 7, 7),
        "pytorch#54404: the first layer's gradient, slower in half precision than in float32",
        works=(FORWARD, WEIGHT),
        dtype=torch.float16,
        stride=2,
        first=True,
        label="float16",
    )
    for name, n, table in (
        ("ResNet-18 at 32x32", 128, _RESNET18_32),
        ("ResNet-18 at 32x32, a large batch", 1024, _RESNET18_32),
        ("ResNet-18 and 50 at 224x224", 128, _RESNET_224),
        ("ResNet-18 and 50 at 224x224, a large batch", 256, _RESNET_224),
    ):
        for c, size, k, kernel, stride in table:
            shape = (n, c, size, size, k, kernel, kernel)
            cases += _gpu(shape, name, stride=stride, label="bfloat16")
    for n, size, kernel, stride in ((128, 32, 3, 1), (1024, 32, 3, 1), (256, 224, 7, 2)):
        cases += _gpu(
            (n, 3, size, size, 64, kernel, kernel),
            "the first layer: three channels, which no matrix unit takes",
            works=(FORWARD, WEIGHT),
            stride=stride,
            first=True,
            label="bfloat16",
        )
    for channels, size in RESNET:
        cases += _gpu(
            _square(128, channels, size),
            "float32, in TF32 as stock's",
            dtype=torch.float32,
            label="float32",
        )
    return [case for case in cases if _largest(case) * WORKING_SET <= memory]


def _largest(case: Case) -> int:
    n, c, h, w, *_ = case.shape
    return (n * c * h * w + math.prod(case.output_shape)) * case.dtype.itemsize


class Data:
    """The tensors of a case in one memory layout: master copies, and what is used."""

    def __init__(self, case: Case, layout: str, device: str):
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

        def drawn(shape: tuple[int, ...], scale: float = 1) -> torch.Tensor:
            made = torch.randn(shape, generator=generator, device=device, dtype=case.dtype)
            made = made.mul_(scale)
            return made.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else made

        n, c, h, w, k, r, s = case.shape
        self.case = case
        whole = case.work == GRADIENT
        self.master, self.upstream_master = drawn((n, c, h, w)), drawn(case.output_shape)
        fan_in = (c // case.groups) * r * s / (case.stride**2 if case.transposed else 1)
        parameters = [drawn(case.weight_shape, fan_in**-0.5)]
        if case.bias:
            parameters.append(drawn((k,)))
        self.parameters = [p.requires_grad_(whole) for p in parameters]
        self.source = torch.empty_like(self.master).requires_grad_(whole and not case.first)
        self.upstream = torch.empty_like(self.upstream_master)
        self.x = rewritten(self.source, self.master)
        self.upstream.copy_(self.upstream_master)

    def prepare(self) -> None:
        """Input or upstream gradient as a layer has just written it."""
        if self.case.work in (INPUT, WEIGHT):
            self.upstream.copy_(self.upstream_master)
        else:
            self.x = rewritten(self.source, self.master)

    def work(self, output_of: Callable, gradients_of: Callable) -> Callable:
        """The timed call. ``output_of(x, weight[, bias])`` is the public function,
        ``gradients_of(upstream, x, weight)`` the backward op for one direction."""
        parameters, weight = self.parameters, self.parameters[0]

        def forward():
            return (output_of(self.x, *parameters),)

        def direction():
            return gradients_of(self.upstream, self.x, weight)

        def whole():
            output = output_of(self.x, *parameters)
            inputs = [x for x in (self.x, *parameters) if x.requires_grad]
            return output, *torch.autograd.grad(output, inputs, self.upstream)

        return {FORWARD: forward, GRADIENT: whole}.get(self.case.work, direction)


ACTIVATIONS: dict[str | None, Callable] = {None: lambda x: x, "relu": F.relu}


def _settings(case: Case) -> dict:
    settings = {"stride": case.stride, "padding": case.padding, "groups": case.groups}
    return settings | ({"output_padding": case.output_padding} if case.transposed else {})


def _stock(case: Case) -> Callable:
    function = F.conv_transpose2d if case.transposed else F.conv2d
    convolve = functools.partial(function, **_settings(case))
    activation = ACTIVATIONS[case.activation]
    if case.pooled:
        return lambda *tensors: F.max_pool2d(activation(convolve(*tensors)), 2)
    return lambda *tensors: activation(convolve(*tensors))


def _ours(case: Case) -> Callable:
    import dlkernels

    if case.transposed:
        return functools.partial(dlkernels.functional.conv_transpose2d, **_settings(case))
    function = getattr(dlkernels.functional, "conv2d_max_pool2d" if case.pooled else "conv2d")
    return functools.partial(function, activation=case.activation, **_settings(case))


def _wanted(case: Case) -> list[bool]:
    """Which of the gradients of input, weight and bias the row's direction is."""
    return [case.work == INPUT, case.work == WEIGHT, case.work == WEIGHT and case.bias]


def _stock_gradients(case: Case) -> Callable:
    pair = [case.stride] * 2, [case.padding] * 2, [1, 1], False, [0, 0], case.groups
    sizes, wanted = [case.shape[4]] if case.bias else None, _wanted(case)

    def call(upstream, x, weight):
        made = torch.ops.aten.convolution_backward(upstream, x, weight, sizes, *pair, wanted)
        return tuple(gradient for gradient, want in zip(made, wanted, strict=True) if want)

    return call


def _our_gradients(case: Case) -> Callable:
    from dlkernels import config

    pair, wanted = ([case.stride] * 2, [case.padding] * 2, [1, 1], case.groups), _wanted(case)

    def call(upstream, x, weight):
        options = *pair, "none", False, config.forced() == "own"
        if not torch.compiler.is_compiling() and config.is_recording():
            chosen = torch.ops.dlkernels.conv2d_algorithm(x, weight, None, *options)
            algorithm = chosen.split(", ")[1 if case.work == INPUT else 2]
            kernel = "stock" if algorithm == "aten" else config.owner(x.device.type)
            config.record(OP, kernel, algorithm)
        made = torch.ops.dlkernels.conv2d_backward(upstream, x, weight, None, *options, *wanted)
        return tuple(gradient for gradient, want in zip(made, wanted, strict=True) if want)

    return call


def _under(benchmark: bool, call: Callable) -> Callable:
    """A call under a setting of cuDNN's."""

    def run():
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = benchmark
        try:
            return call()
        finally:
            torch.backends.cudnn.benchmark = before

    return run


def providers(case: Case, device: str) -> list[Provider]:
    """Stock in both layouts, stock compiled, ours, and ours compiled."""
    data = Data(case, case.layout, device)
    other = "contiguous" if case.layout == "channels_last" else "channels_last"
    moved = Data(case, other, device)

    def of(name: str, output_of: Callable, gradients_of: Callable, on=data, tried=True, **more):
        call = on.work(output_of, gradients_of)
        return Provider(name, _under(tried, call) if device == "cuda" else call, on.prepare, **more)

    stock, ours = (_stock(case), _stock_gradients(case)), (_ours(case), _our_gradients(case))
    made = [
        of("stock", *stock, eager_stock=True),
        of(f"stock {other}", *stock, on=moved, eager_stock=True),
    ]
    if device == "cuda":
        made.append(of("stock heuristics", *stock, tried=False, eager_stock=True))
    return [
        *made,
        of("torch.compile", *map(compiled, stock)),
        of("own", *ours, kernels="own"),
        of("auto", *ours, kernels="auto"),
        of("auto compiled", *map(compiled, ours), kernels="auto"),
    ]


def counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    n, c, h, w, k, r, s = case.shape
    x, y, weight = n * c * h * w, math.prod(case.output_shape), math.prod(case.weight_shape)
    bias = k * case.bias
    positions = h * w if case.transposed else math.prod(case.convolved)
    product = 2 * n * positions * weight
    if case.work == FORWARD:
        return (x + weight + bias + y) * case.dtype.itemsize, product
    if case.work == INPUT:
        return (y + weight + x) * case.dtype.itemsize, product
    if case.work == WEIGHT:
        return (x + y + weight + bias) * case.dtype.itemsize, product
    numbers = x + 2 * (weight + bias) + 2 * y + (0 if case.first else x)
    # Behind a pool a gradient is 0 at three of four positions.
    gradient = 2 * y * (weight // k) if case.pooled else product
    return numbers * case.dtype.itemsize, product + (1 if case.first else 2) * gradient


def rows(device: str) -> list[Row]:
    """All rows of a device."""
    cases = CASES
    if device == "cuda":
        memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 1 << 40
        cases = gpu_cases(memory)
    return rows_of(OP, cases, counted, providers, device)

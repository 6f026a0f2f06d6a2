"""Rows and providers of linear.

**The work.** The input comes out of a layer before and the weight is a parameter: the timed work is
the output and ``torch.autograd.grad`` for input, weight and bias, with a random upstream gradient,
which every provider hands over alike. Adding the gradients up in ``.grad`` is not in it: it is
torch's on all sides. A first layer wants no gradient of its input; a row of its own shows that.
Forward rows run without a graph.

**The data.** Normal inputs and upstream gradients, weights at the scale that a layer starts with.
Before each sample the input is written anew from a master copy, untimed: a layer before would have
written it just now. The weight stays where it is, in cache if it fits, as from step to step.

**The bytes.** Input, weight, bias and upstream gradient read once; output and gradients written
once. **The flops**: 2·M·K·N for the output and for each gradient of a matrix. The fraction of the
multiply-add peak is of float32's: a processor that multiplies pairs of bfloat16 can be above 1.

Names are M x K x N: rows of the input, its features, features of the output.
"""

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Provider, Row, compiled, rewritten, rows_of

OP = "linear"
FORWARD, GRADIENT = "forward", "forward+gradient"
SLOPE = 0.01
ACTIVATIONS: dict[str | None, Callable] = {
    None: lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Case(NamedTuple):
    """One line of the tables below. ``first`` is a first layer: no gradient of the input."""

    name: str
    shape: tuple[int, int, int]  # M, K, N
    reason: str
    dtype: torch.dtype = torch.float32
    work: str = GRADIENT
    activation: str | None = None
    bias: bool = True
    first: bool = False
    calls: int = 1


def _named(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


MLP200, WIDE, MNIST = (200, 784, 200), (256, 1024, 1024), (64, 784, 512)
BERT, VECTOR = (4096, 768, 3072), (1, 784, 512)

_PLAIN = [
    Case(_named(MLP200), MLP200, "the first layer of the documented MLP200, at its batch size"),
    Case(_named(WIDE), WIDE, "a square weight of 4 MB, which a core's own caches do not hold"),
    Case(_named(MNIST), MNIST, "the first layer of the documented MnistMLP, at its batch size"),
    Case(_named(BERT), BERT, "the feed-forward layer of BERT base, 8 sequences of 512"),
    Case(_named(VECTOR), VECTOR, "one row: the weight is read once and used once", calls=20),
]

_FORWARD = [
    case._replace(name=f"{case.name} forward", work=FORWARD, reason="inference") for case in _PLAIN
]

_DTYPES = [
    case._replace(
        name=f"{case.name} {name}", dtype=dtype, reason=f"{name}: half the bytes, sums in float32"
    )
    for name, dtype, cases in (
        ("bfloat16", torch.bfloat16, _PLAIN + _FORWARD),
        ("float16", torch.float16, [_PLAIN[1], _FORWARD[1]]),
    )
    for case in cases
]

_ACTIVATIONS = [
    case._replace(
        name=f"{case.name} {activation}",
        activation=activation,
        reason=f"{activation} before the output is written; stock reads it again",
    )
    for activation, cases in (
        ("relu", [_PLAIN[1], _PLAIN[2], _FORWARD[1], _FORWARD[4]]),
        ("leaky_relu", [_PLAIN[0]]),
        ("tanh", [_PLAIN[1], _FORWARD[1]]),
        ("sigmoid", [_PLAIN[1]]),
    )
    for case in cases
]

_OTHERS = [
    Case(
        f"{_named(MNIST)} first layer",
        MNIST,
        "no gradient of the input is wanted: two products in place of three",
        first=True,
    ),
    *(
        Case(
            f"{_named((n, n, n))} product",
            (n, n, n),
            "the product alone, as a fraction of the multiply-add peak",
            work=FORWARD,
            bias=False,
        )
        for n in (1024, 2048)
    ),
]

# Where "own" and "stock" take the same time is the threshold of dlkernels/ops/linear.py.
_DISPATCH = [
    Case(
        _named(shape) + suffix,
        shape,
        f"2^{power} multiply-adds: what calling costs beside computing",
        work=work,
        calls=100,
    )
    for power, shape in (
        (12, (1, 64, 64)),
        (15, (8, 64, 64)),
        (18, (64, 64, 64)),
        (20, (64, 128, 128)),
        (22, (64, 256, 256)),
    )
    for suffix, work in (("", GRADIENT), (" forward", FORWARD))
]

CASES = _PLAIN + _FORWARD + _DTYPES + _ACTIVATIONS + _OTHERS + _DISPATCH


class Data:
    """The tensors of a case: a master copy of the input, and what is used."""

    def __init__(self, case: Case, device: str):
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        m, k, n = case.shape

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(device, case.dtype)

        self.case = case
        self.wants_gradient = case.work != FORWARD
        self.master, self.upstream = drawn(m, k), drawn(m, n)
        parameters = [drawn(n, k) / k**0.5, *([drawn(n)] if case.bias else [])]
        self.parameters = [p.requires_grad_(self.wants_gradient) for p in parameters]
        wanted = self.wants_gradient and not case.first
        self.source = torch.empty_like(self.master).requires_grad_(wanted)
        self.x = self.source

    def prepare(self) -> None:
        """The input as a layer before has just written it."""
        self.x = rewritten(self.source, self.master)

    def work(self, output_of: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The timed call: the output by ``output_of(x, weight[, bias])`` and, if the case has
        some, the gradients."""
        parameters, upstream = self.parameters, self.upstream

        def forward():
            return (output_of(self.x, *parameters),)

        def gradient():
            output = output_of(self.x, *parameters)
            inputs = [x for x in (self.x, *parameters) if x.requires_grad]
            return output, *torch.autograd.grad(output, inputs, upstream)

        return gradient if self.wants_gradient else forward


def _stock(case: Case) -> Callable:
    activation = ACTIVATIONS[case.activation]
    return lambda *tensors: activation(F.linear(*tensors))


def _ours(case: Case) -> Callable:
    import dlkernels

    return functools.partial(dlkernels.functional.linear, activation=case.activation)


def _onednn(case: Case) -> Callable:
    """What inductor calls for a frozen layer, without the packed weight that freezing gives it."""
    scalars = [SLOPE] if case.activation == "leaky_relu" else []

    def call(x, weight, bias=None):
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, case.activation or "none", scalars, ""
        )

    return call


def _providers(case: Case, device: str) -> list[Provider]:
    data = Data(case, device)

    def of(name: str, function: Callable, **more) -> Provider:
        return Provider(name, data.work(function), data.prepare, **more)

    providers = [
        of("stock", _stock(case), eager_stock=True),
        of("torch.compile", compiled(_stock(case))),
        of("own", _ours(case), kernels="own"),
        of("auto", _ours(case), kernels="auto"),
    ]
    if device == "cpu" and case.work == FORWARD:  # it has no derivative
        providers.append(of("onednn", _onednn(case)))
    return providers


def _counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    m, k, n = case.shape
    parameters = n * k + n * case.bias
    numbers, products = m * k + parameters + m * n, 1
    if case.work != FORWARD:
        numbers += m * n + parameters  # the upstream gradient; the parameters' own
        numbers += 0 if case.first else m * k
        products = 2 if case.first else 3
    return numbers * case.dtype.itemsize, 2 * m * k * n * products


def rows(device: str) -> list[Row]:
    """All rows."""
    return rows_of(OP, CASES, _counted, _providers, device)

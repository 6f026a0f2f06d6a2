"""conv2d's Triton kernels under the interpreter, by the functions that they are registered with.

In a process of its own, with TRITON_INTERPRET=1: test_conv2d_triton.py starts it.
"""

import itertools
from typing import NamedTuple

import numpy as np
import patched_once  # noqa: F401
import pytest
import torch
from compare import assert_no_worse
from torch.nn import functional as F
from triton.runtime import interpreter

from dlkernels.kernels import common
from dlkernels.kernels import conv2d as kernels

# Two thirds of the time: each sum of integers again in 64 bits.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

HALVES = (torch.float16, torch.bfloat16)
LAST = torch.channels_last


class Case(NamedTuple):
    """A convolution, and what its kernels must have done (constants of their launches)."""

    input: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    taken: tuple[str, ...] = ()

    def settings(self):
        return self.stride, self.padding, self.dilation, self.groups

    def drawn(self, dtype, format=LAST):
        x = torch.randn(self.input).to(dtype).contiguous(memory_format=format)
        shape = (self.outputs, self.input[1] // self.groups, *self.kernel)
        weight = torch.randn(shape).div(shape[1] ** 0.5).to(dtype)
        return x, weight, torch.randn(self.outputs).to(dtype)


SAME = {"kernel": (3, 3), "padding": (1, 1)}
CASES = {
    # No power of two anywhere: tails of pixels, of output and of input channels.
    "tails": Case((2, 5, 9, 7), 6, **SAME),
    # Two rows of tiles, two columns, two blocks of channels: a program takes two tiles.
    "tiles": Case((1, 40, 9, 9), 70, **SAME),
    # Descriptors: boxes of two images, of rows of one with waste at an edge, of dilated taps.
    "boxes": Case((4, 64, 4, 8), 64, **SAME, taken=("SWAPPED", "BOXED_W")),
    "boxes_waste": Case((1, 64, 7, 8), 72, **SAME, taken=("SWAPPED", "BOXED_W")),
    "boxes_dilated": Case((1, 64, 8, 8), 64, (3, 3), (1, 1), (2, 2), (2, 2), taken=("SWAPPED",)),
    # Boxes in groups of whole blocks.
    "boxes_groups": Case((1, 128, 8, 8), 128, **SAME, groups=2, taken=("SWAPPED",)),
    # 1 x 1: a row of pixels with a tail; not one where it is strided or padded.
    "pointwise": Case((2, 16, 7, 9), 24, (1, 1), taken=("BOXED", "INSIDE")),
    "pointwise_wide": Case((3, 136, 5, 9), 200, (1, 1), taken=("BOXED", "INSIDE")),
    "pointwise_strided": Case((2, 16, 7, 9), 24, (1, 1), (2, 2)),  # three of four phases: no tap
    "pointwise_padded": Case((1, 8, 4, 4), 8, (1, 1), (1, 1), (1, 1)),
    # Phases: of unequal taps, of unequal sizes; with none; where taps come in steps.
    "stride_2": Case((2, 9, 8, 7), 10, (3, 3), (2, 2), (1, 1)),
    "stride_3": Case((1, 6, 10, 11), 5, (2, 2), (3, 3)),
    "stride_2_dilation_2": Case((1, 6, 11, 10), 5, (3, 3), (2, 2), (2, 2), (2, 2)),
    "stride_4_dilation_6": Case((1, 4, 17, 15), 5, (3, 2), (4, 4), (3, 3), (6, 6)),
    # The last rows are in no window, and their gradient is 0.
    "rows_unread": Case((1, 3, 9, 10), 4, (2, 2), (4, 3)),
    "dilation": Case((2, 7, 11, 10), 6, (3, 3), (1, 1), (3, 3), (3, 3)),
    # Rows and columns each with settings of their own: none may stand for the other.
    "askew": Case((1, 5, 9, 12), 7, (2, 5), (2, 1), (0, 3), (3, 2)),
    # Three channels, 49 taps: a block of channels holds mostly nothing.
    "stem": Case((1, 3, 15, 14), 8, (7, 7), (2, 2), (3, 3)),
    # Outputs that see padding alone.
    "padding": Case((1, 4, 3, 4), 5, (3, 3), (1, 1), (4, 5)),
    # Groups: one a tile; several, the last tile not full; of one channel, with one output or two.
    "groups": Case((1, 40, 6, 5), 48, **SAME, groups=2),
    "groups_packed": Case((1, 35, 6, 7), 28, **SAME, groups=7, taken=("PACK",)),
    "groups_strided": Case((1, 24, 7, 8), 24, (3, 3), (2, 2), (1, 1), (1, 1), 6, ("PACK",)),
    "depthwise": Case((2, 40, 6, 7), 40, **SAME, groups=40, taken=("PACK",)),
    "depthwise_twice": Case((1, 20, 6, 7), 40, **SAME, groups=20, taken=("PACK",)),
    # The pixels of the weight's gradient in several splits, the last one shorter.
    "splits": Case((7, 8, 15, 13), 9, (1, 2)),
}
BOXED = [name for name in CASES if name.startswith(("boxes", "pointwise"))]
RUNS = [
    *((name, torch.float32, 90) for name in CASES),
    *((name, torch.float16, 90 if name in BOXED else 80) for name in CASES),
    *((name, torch.float32, 80) for name in ("boxes", "pointwise")),
    *((name, torch.bfloat16, 90) for name in ("tails", "boxes", "groups_packed", "stride_2")),
]


@pytest.fixture
def launched(monkeypatch):
    """The constants of all launches."""
    constants, launch = [], kernels.launch

    def noting(kernel, grid, *arguments, **named):
        constants.append(named)
        launch(kernel, grid, *arguments, **named)

    monkeypatch.setattr(kernels, "launch", noting)
    return constants


def on(monkeypatch, arch, multiprocessors=3):
    monkeypatch.setattr(kernels, "_device", lambda index: (arch, multiprocessors))


def ours(x, weight, bias, settings, d, exact=False, activation="none"):
    """Output and gradients by the raw ops."""
    settings = (*settings, activation, exact, True)
    y = kernels._conv2d(x, weight, bias, *settings)
    output = None if activation == "none" else y
    return y, *kernels._conv2d_backward(d, x, weight, output, *settings, True, True, True)


def stocks(x, weight, bias, settings, d, function=F.conv2d):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, *settings)
    return y, *torch.autograd.grad(y, leaves, d)


def wide(*tensors):
    return [t.double() for t in tensors]


NAMES = ("output", "grad input", "grad weight", "grad bias")


def assert_all(results, stock, exact, names=NAMES):
    for name, *triple in zip(names, results, stock, exact, strict=True):
        assert_no_worse(name, *triple)


@pytest.mark.parametrize(("name", "dtype", "arch"), RUNS, ids=lambda value: str(value))
def test_cases(name, dtype, arch, monkeypatch, launched, poisoned):
    on(monkeypatch, arch)
    case = CASES[name]
    x, weight, bias = case.drawn(dtype)
    exact_y = F.conv2d(*wide(x, weight, bias), *case.settings())
    d = torch.randn(exact_y.shape).to(dtype)
    results = ours(x, weight, bias, case.settings(), d)
    stock = stocks(x, weight, bias, case.settings(), d)
    exact = stocks(*wide(x, weight, bias), case.settings(), d.double())
    assert_all(results, stock, exact)
    for constant in case.taken:
        values = [named[constant] for named in launched if constant in named]
        described = constant in ("SWAPPED", "BOXED", "BOXED_W")
        assert any(int(value) > (constant == "PACK") for value in values) == (
            arch == 90 or not described
        ), constant


def test_every_tile(monkeypatch, launched):
    """Each tile of each table, forward, input and weight gradient."""
    case = Case((1, 40, 5, 6), 70, (1, 2))
    x, weight, bias = case.drawn(torch.float32)
    d = torch.randn(1, 70, 5, 5)
    wanted = stocks(*wide(x, weight, bias), case.settings(), d.double())
    for (kind, arch, precision), tiles in kernels._TILES.items():
        if precision == "half":  # of other sizes, but the same kernels: too much time
            continue
        on(monkeypatch, arch)
        for tile in tiles:
            monkeypatch.setattr(kernels, "_first", lambda tiles, count, tile=tile: tile)
            results = ours(x, weight, bias, case.settings(), d, exact=precision == "ieee")
            which = (3,) if kind == "weight" else (0, 1)
            for i in which:
                if i < 3:
                    torch.testing.assert_close(results[i].double(), wanted[i], rtol=0, atol=1e-4)


FORMATS = list(itertools.product((torch.contiguous_format, LAST), repeat=2))


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 4, 1), (2, 4, 1, 1)], ids=str)
def test_formats(shape, formats):
    """Output and gradients in the strides of the contract, for input and weight of any format."""
    x = torch.randn(shape).contiguous(memory_format=formats[0])
    weight = torch.randn(6, shape[1], 2, 2).contiguous(memory_format=formats[1])
    settings = ((1, 1), (1, 1), (1, 1), 1)
    stock = F.conv2d(x, weight, None, *settings)
    d = torch.randn_like(stock)
    y, dx, dw, _ = ours(x, weight, None, settings, d)
    torch.testing.assert_close(y, stock)
    for result, of in ((y, (x, weight)), (dx, (x,)), (dw, (weight,))):
        format = LAST if any(map(kernels._suggests_last, of)) else torch.contiguous_format
        assert result.stride() == torch.empty(result.shape, memory_format=format).stride()


def test_strides_of_the_input():
    """Slices, an upstream gradient of stride 0, and memory that begins where no descriptor may."""
    case = CASES["boxes"]
    x, weight, bias = case.drawn(torch.float32)
    d = torch.randn(1, 64, 1, 1).expand(4, 64, 4, 8)
    wanted = ours(x, weight, bias, case.settings(), d.contiguous())
    sliced = torch.cat([x, x], 3)[..., :8]
    memory = torch.empty(x.numel() + 1)
    shifted = memory[1:].view(4, 4, 8, 64).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16 and not shifted.is_contiguous()
    for other in (sliced, shifted):
        for a, b in zip(ours(other, weight, bias, case.settings(), d), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", common.ACTIVATIONS)
@pytest.mark.parametrize("name", ["tails", "boxes"])
def test_activations(name, activation):
    case = CASES[name]
    x, weight, bias = case.drawn(torch.float32)
    function = {
        "none": lambda y: y,
        "leaky_relu": F.leaky_relu,
        **{name: getattr(torch, name) for name in ("relu", "tanh", "sigmoid")},
    }[activation]

    def stock(*arguments):
        return function(F.conv2d(*arguments))

    d = torch.randn(F.conv2d(x, weight, bias, *case.settings()).shape)
    results = ours(x, weight, bias, case.settings(), d, activation=activation)
    arguments = (case.settings(), d)
    expected = stocks(x, weight, bias, *arguments, stock)
    exact = stocks(*wide(x, weight, bias), case.settings(), d.double(), stock)
    assert_all(results, expected, exact)


def settings_of(case):
    return kernels.Settings(*case.settings())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tails", "tiles", "boxes_waste", "pointwise", "groups_packed"])
def test_statistics(name, dtype, poisoned):
    """Mean and variance of the rounded output, also far from 0."""
    case = CASES[name]
    x, weight, bias = case.drawn(dtype)
    for off in (0, 100):
        y, found = kernels.convolve(x, weight, bias + off, settings_of(case), statistics=True)
        check_statistics(y, *found)


def added(z):
    """Sums of channels as the interpreter adds: one row after another, in the dtype of z."""
    rows = z.movedim(1, -1).reshape(-1, z.shape[1])
    return torch.from_numpy(np.add.reduce(rows.contiguous().numpy(), 0))


def check_statistics(y, mean, var):
    """As exact as a pass of their own for each; the variance 4 times its error: both are of few
    roundings, each one's own."""
    wide, count = y.to(mean.dtype), y.numel() // y.shape[1]
    stock = added(wide) / count
    assert_no_worse("mean", mean, stock, y.double().mean((0, 2, 3)))
    stock = added((wide - stock[:, None, None]).square()) / count
    assert_no_worse("var", var, stock, y.double().var((0, 2, 3), correction=0), 4.0)


def test_many_rows_are_added_in_order():
    """More partial sums than one pass adds, and a last pass with a tail."""
    x = torch.randn(64 * 64 + 5, 7)
    y = torch.empty(7)
    kernels.add_rows(x, y)
    assert_no_worse("sum", y, x.sum(0), x.double().sum(0))


def test_many_rows_are_merged():
    """Of unequal counts, a mean far from 0, more rows than one pass takes; one of them of none."""
    counts = torch.randint(1, 9, (64 * 64 + 5,))
    counts[7] = 0
    parts = [torch.randn(count, 3) + 1000 for count in counts]
    rows = [
        torch.stack([torch.full((3,), float(len(z))), z.mean(0), z.var(0, correction=0) * len(z)])
        for z in parts
    ]
    found = kernels.merge_rows(torch.stack(rows).nan_to_num())
    z = torch.cat(parts)
    check_statistics(z.T[None, :, :, None], *found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["tails", "boxes", "pointwise", "stride_2", "padding", "groups_packed", "splits"]
)
def test_affine(name, dtype, poisoned):
    """relu(x·scale + offset) before the product, in the forward pass and in the weight's gradient;
    what is padded is 0 after it, not relu(offset)."""
    case = CASES[name]
    x, weight, bias = case.drawn(dtype)
    scale, offset = torch.randn(case.input[1]), torch.randn(case.input[1]) + 1
    affine = (scale, offset)
    scale, offset = scale[:, None, None], offset[:, None, None]

    def stock(x, weight, bias, *settings):
        z = F.relu(x.to(scale.dtype) * scale + offset).to(x.dtype)
        return F.conv2d(z, weight, bias, *settings)

    def exact(x, weight, bias, *settings):
        return F.conv2d(F.relu(x * scale.double() + offset), weight, bias, *settings)

    y, _ = kernels.convolve(x, weight, bias, settings_of(case), affine=affine)
    d = torch.randn(y.shape).to(dtype)
    dw = kernels.weight_gradient(d, x, weight.shape, settings_of(case), affine=affine)
    expected = stocks(x, weight, bias, case.settings(), d, stock)
    true = stocks(*wide(x, weight, bias), case.settings(), d.double(), exact)
    assert_no_worse("output", y, expected[0], true[0])
    assert_no_worse("grad weight", dw, expected[2], true[2])


def test_residual():
    """Added before the activation and after the statistics."""
    case = CASES["tails"]
    x, weight, bias = case.drawn(torch.float32)
    plain = F.conv2d(x, weight, bias, *case.settings())
    residual = torch.randn(plain.shape)
    y, (mean, _) = kernels.convolve(
        x, weight, bias, settings_of(case), "relu", residual=residual, statistics=True
    )
    exact = F.conv2d(*wide(x, weight, bias), *case.settings())
    assert_no_worse("output", y, F.relu(plain + residual), F.relu(exact + residual))
    count = plain.numel() // plain.shape[1]
    assert_no_worse("mean", mean, added(plain) / count, exact.mean((0, 2, 3)))


TRANSPOSED = {
    # name: input, weight, stride, padding, output_padding, groups, dilation
    "generator": ((2, 24, 4, 5), (24, 10, 4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)),
    "output_padding": ((1, 7, 4, 3), (7, 6, 3, 3), (3, 2), (1, 0), (2, 1), 1, (1, 1)),
    "groups": ((1, 12, 4, 3), (12, 3, 3, 2), (2, 2), (0, 1), (1, 0), 3, (1, 1)),
    "dilation": ((1, 5, 4, 3), (5, 6, 3, 3), (2, 1), (1, 1), (0, 0), 1, (2, 3)),
    "boxes": ((1, 64, 8, 8), (64, 64, 3, 3), (1, 1), (1, 1), (0, 0), 1, (1, 1)),
    "pointwise": ((2, 16, 3, 5), (16, 8, 1, 1), (1, 1), (0, 0), (0, 0), 1, (1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name, dtype, poisoned):
    shape, weights, stride, padding, more, groups, dilation = TRANSPOSED[name]
    settings = (stride, padding, more, groups, dilation)
    x, weight = torch.randn(shape).to(dtype), torch.randn(weights).to(dtype)
    bias = torch.randn(weights[1] * groups).to(dtype)
    y = kernels._conv_transpose2d(x, weight, bias, *settings, False, True)
    d = torch.randn(y.shape).to(dtype)
    wanted = (True, True, True)
    gradients = kernels._conv_transpose2d_backward(d, x, weight, *settings, False, True, *wanted)
    function = F.conv_transpose2d
    expected = stocks(x, weight, bias, settings, d, function)
    exact = stocks(*wide(x, weight, bias), settings, d.double(), function)
    assert_all((y, *gradients), expected, exact)


@pytest.mark.parametrize("name", ["splits", "boxes", "groups_packed"])
def test_the_same_bits(name, monkeypatch, launched):
    """From call to call, and however many multiprocessors there are: the weight's gradient in
    splits, statistics, tiles of several programs."""
    case = CASES[name]
    x, weight, bias = case.drawn(torch.float16)
    d = torch.randn(F.conv2d(x, weight, bias, *case.settings()).shape).half()
    found = []
    for multiprocessors in (1, 1, 7):
        on(monkeypatch, 90, multiprocessors)
        _, sums = kernels.convolve(x, weight, bias, settings_of(case), statistics=True)
        found.append([*ours(x, weight, bias, case.settings(), d), *sums])
    if name == "splits":
        assert any(named.get("ROWS", 1) > 1 for named in launched)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


def test_offsets_of_64_bits(monkeypatch):
    for name in ("stride_2", "splits"):
        case = CASES[name]
        x, weight, bias = case.drawn(torch.float32)
        d = torch.randn(F.conv2d(x, weight, bias, *case.settings()).shape)
        with monkeypatch.context() as patch:
            narrow = ours(x, weight, bias, case.settings(), d)
            patch.setattr(kernels, "_is_wide", lambda *tensors: True)
            far = ours(x, weight, bias, case.settings(), d)
        assert all(torch.equal(a, b) for a, b in zip(narrow, far, strict=True))


def test_division_without_dividing():
    numbers = torch.cat([torch.arange(300), 2**31 - 1 - torch.arange(300)])
    for divisor in (1, 2, 3, 7, 49, 56, 3136, 12544, 2**20 - 1, 2**30, 2**31 - 1):
        by, shift = kernels._reciprocal(divisor)
        assert by < 2**32
        for m in numbers.tolist():
            assert (2 * m * by >> 32) >> shift == m // divisor


@pytest.mark.parametrize("wanted", itertools.product((False, True), repeat=3), ids=str)
def test_unwanted_gradients_are_empty(wanted, launched):
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    settings = ((1, 1), (1, 1), (1, 1), 1)
    d = torch.randn(1, 4, 5, 5)
    for own in (True, False):
        launched.clear()
        arguments = (d, x, weight, None, *settings, "none", False, own, *wanted)
        gradients = kernels._conv2d_backward(*arguments)
        full = [x.shape, weight.shape, (4,)]
        for gradient, want, shape in zip(gradients, wanted, full, strict=True):
            assert gradient.shape == (shape if want else (0,))
        assert len(launched) == own * (wanted[0] + wanted[1])


def test_empty_batch(launched):
    x, weight, bias = torch.randn(0, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    settings = ((2, 2), (1, 1), (1, 1), 1)
    y, dx, dw, db = ours(x, weight, bias, settings, torch.randn(0, 4, 3, 3), activation="relu")
    assert y.shape == (0, 4, 3, 3) and y.is_contiguous() and dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight)) and torch.equal(db, torch.zeros(4))
    _, sums = kernels.convolve(x, weight, bias, kernels.Settings(*settings), statistics=True)
    assert all(torch.equal(s, torch.zeros(4)) for s in sums) and not launched


# ------------------------------------------------------------------------------------------- choice

GROUPED = Case((2, 16, 8, 8), 16, (3, 3), (1, 1), (1, 1), (1, 1), 4)
CHOICES = {
    # what: (input, weight, case, by "auto", by "own")
    "not_measured": (LAST, torch.float32, CASES["tails"], False, True),
    "double": (LAST, torch.float64, CASES["tails"], False, False),
    "grouped_last": (LAST, torch.float16, GROUPED, True, True),
    "grouped_contiguous": (torch.contiguous_format, torch.float16, GROUPED, False, True),
    "depthwise_last": (LAST, torch.float16, CASES["depthwise"], False, True),
    "stride_9": (LAST, torch.float32, Case((1, 3, 20, 20), 4, (3, 3), (9, 9)), False, False),
}


@pytest.mark.parametrize("what", CHOICES)
def test_choice(what, launched):
    """What the table says is what runs."""
    format, dtype, case, auto, own = CHOICES[what]
    x, weight, bias = case.drawn(dtype, format)
    for forced, taken in ((False, auto), (True, own)):
        arguments = (x, weight, bias, *case.settings(), "none", False, forced)
        name = "implicit_gemm" if taken else "aten"
        assert kernels._conv2d_algorithm(*arguments) == ", ".join([name] * 3)
        launched.clear()
        y = kernels._conv2d(*arguments)
        assert bool(launched) == taken
        d = torch.randn_like(y)
        launched.clear()
        arguments = (d, x, weight, None, *arguments[3:], True, True, True)
        gradients = kernels._conv2d_backward(*arguments)
        assert bool(launched) == taken
        for result, of in ((y, x), (gradients[0], x), (gradients[1], weight)):
            assert kernels._suggests_last(result) == kernels._suggests_last(of)


def test_the_huge_map_of_a_known_cliff_is_ours():
    shapes = ((64, 128, 513, 513), (128, 128, 3, 3))
    x, weight = (torch.empty((), dtype=torch.bfloat16).expand(shape) for shape in shapes)
    settings = ((2, 2), (1, 1), (1, 1), 1, "none", False, False)
    assert kernels._conv2d_algorithm(x, weight, None, *settings).startswith("implicit_gemm")
    assert kernels._conv2d_algorithm(x[:1], weight, None, *settings).startswith("aten")


def test_tiles_by_the_clock(monkeypatch, tmp_path):
    """Each tile is timed once for a shape, and the choice outlives the process."""
    monkeypatch.setattr(kernels, "_AUTOTUNE", True)
    monkeypatch.setattr("triton.knobs.cache.dir", str(tmp_path))
    timed = []

    def time(run):
        run()
        timed.append(run.args[0])
        return -len(timed)  # the last one is the fastest

    monkeypatch.setattr(kernels, "_time", time)
    case = CASES["tiles"]
    x, weight, bias = case.drawn(torch.float32)
    exact = F.conv2d(*wide(x, weight, bias), *case.settings())
    for _ in range(2):
        y, _ = kernels.convolve(x, weight, bias, settings_of(case))
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4)
    assert timed == kernels._fitting("convolve", 90, "tf32", 70) and len(timed) == 3
    kernels.convolve(x[..., :5], weight, bias, settings_of(case))
    assert len(timed) == 6


# ----------------------------------------------------------------------------------- planted faults

FAULTS = {
    # case, constants of the launches that are made wrong (None: one program is left out)
    "a_program": ("tiles", None),
    "dilation": ("dilation", {"DH": 2}),
    "steps": ("stride_2", {"STEP_H": 1}),
    "boxes": ("boxes", {"TH": 2, "TW": 16}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch, poisoned):
    name, wrong = FAULTS[fault]
    launch = kernels.launch

    def wrongly(kernel, grid, *arguments, **constants):
        if wrong is None:
            grid -= 1
        else:
            constants |= {key: value for key, value in wrong.items() if key in constants}
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(kernels, "launch", wrongly)
    with pytest.raises(AssertionError):
        check_case(name)


def check_case(name):
    case = CASES[name]
    x, weight, bias = case.drawn(torch.float32)
    d = torch.randn(F.conv2d(x, weight, bias, *case.settings()).shape)
    results = ours(x, weight, bias, case.settings(), d)
    stock = stocks(x, weight, bias, case.settings(), d)
    assert_all(results, stock, stocks(*wide(x, weight, bias), case.settings(), d.double()))


# ----------------------------------------------------------------------------------------- refusals

X, W, B = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(6)
PLAIN = ((1, 1), (1, 1), (1, 1), 1, "none", False, True)
REFUSED = {
    "dtype": ((X.int(), W, B, *PLAIN), "input of dtype"),
    "dtypes": ((X, W.half(), B, *PLAIN), "weight of dtype"),
    "dimensions": ((X[0], W, B, *PLAIN), "input of 4 dimensions"),
    "channels": ((X, W[:, :3], B, *PLAIN), "weight of shape"),
    "bias": ((X, W, B[:5], *PLAIN), "bias of shape"),
    "stride": ((X, W, B, (0, 1), *PLAIN[1:]), "stride of 2 numbers of at least 1"),
    "padding": ((X, W, B, (1, 1), (-1, 1), *PLAIN[2:]), "padding of 2 numbers of at least 0"),
    "groups": ((X, W[:, :1], B[:6], (1, 1), (1, 1), (1, 1), 4, *PLAIN[4:]), "in 4 groups"),
    "size": ((X, torch.randn(6, 4, 9, 9), B, *PLAIN), "no output"),
    "activation": ((X, W, B, *PLAIN[:4], "gelu", False, True), "activation to be one of"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    arguments, words = REFUSED[what]
    with pytest.raises(RuntimeError, match=words):
        kernels._conv2d(*arguments)


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="grad_output of shape"):
        kernels._conv2d_backward(torch.randn(1, 6, 4, 5), X, W, None, *PLAIN, True, True, True)
    with pytest.raises(RuntimeError, match="needs the output"):
        arguments = (*PLAIN[:4], "relu", False, True, True, True, True)
        kernels._conv2d_backward(torch.randn(1, 6, 5, 5), X, W, None, *arguments)

"""residual_block's Triton kernels under the interpreter, stage by stage.

In a process of its own, with TRITON_INTERPRET=1: test_residual_block_triton.py starts it. What the
kernels of the convolutions do with every shape is conv2d_interpreted.py's.
"""

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import conv2d_interpreted as of_conv2d  # patches the interpreter
import pytest
import residual_blocks as blocks
import torch
from compare import assert_no_worse
from conv2d_interpreted import LAST, SAME, Case, added, check_statistics, on
from torch import Tensor
from torch.nn import functional as F

import dlkernels
from dlkernels.kernels import conv2d
from dlkernels.kernels import residual_block as kernels
from dlkernels.ops import residual_block as op

CASES = {
    # No power of two anywhere: tails of pixels, and of channels in their last byte of signs.
    "tails": Case((2, 5, 9, 7), 6, **SAME),
    # Descriptors, a box with waste: pixels that no image has are in no sum.
    "boxes": Case((1, 64, 7, 8), 72, **SAME),
    # 1 x 1: dy is made as g and y are read, by descriptors; by pointers; in groups that share a
    # tile; of several blocks of channels; with the pixels of the weight's gradient in splits.
    "pointwise": Case((2, 16, 7, 9), 24, (1, 1)),
    "pointwise_tails": Case((2, 11, 7, 9), 13, (1, 1)),
    "pointwise_groups": Case((1, 35, 6, 7), 28, (1, 1), groups=7),
    "pointwise_wide": Case((3, 136, 5, 9), 200, (1, 1)),
    "pointwise_splits": Case((9, 8, 15, 16), 24, (1, 1)),
    # Phases of unequal taps and sizes, one of none: tiles of no pixels.
    "strided": Case((2, 9, 8, 7), 10, (3, 3), (2, 2), (1, 1)),
    "pointwise_strided": Case((2, 16, 7, 9), 24, (1, 1), (2, 2)),
    "groups": Case((1, 35, 6, 7), 28, **SAME, groups=7),
    "askew": Case((1, 5, 9, 12), 7, (2, 5), (2, 1), (0, 3), (3, 2)),
}
DTYPES = [torch.float32, torch.float16]


def image(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAST)


def of_image(numbers):
    """Numbers of channels, beside an image."""
    return numbers[:, None, None]


def sums_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def pack(bits):
    """The signs of the contract of a mask."""
    last = F.pad(bits.movedim(1, -1), (0, -bits.shape[1] % 8)).unflatten(-1, (-1, 8))
    return (last * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)


class Norm(NamedTuple):
    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor

    @classmethod
    def drawn(cls, channels, dtype=torch.float32):
        scale, shift, mean, rstd = torch.randn(4, channels, dtype=sums_dtype(dtype))
        return cls(scale, shift, mean, rstd.abs() + 0.5)

    def before(self, x):
        """scale·x + shift, in the dtype of the numbers or wider."""
        return x.to(torch.promote_types(x.dtype, self.scale.dtype)) * of_image(self.scale).to(
            sums_dtype(x.dtype)
        ) + of_image(self.shift)

    def sure(self, x):
        """x but where scale·x + shift is within rounding of 0: there it becomes about 1."""
        off = of_image((1 - self.shift) / self.scale).to(x.dtype).expand_as(x)
        return torch.where(self.before(x).abs() < 0.05, off, x).contiguous(memory_format=LAST)


def relu(norm, x):
    """z as the convolution reads it, of the dtype of x."""
    return F.relu(norm.before(x)).to(x.dtype)


@pytest.fixture
def launched(monkeypatch):
    """(name of the kernel, its constants) of all launches."""
    seen = []
    for module in (kernels, conv2d):

        def noting(kernel, grid, *arguments, launch=module.launch, **named):
            seen.append((kernel.fn.__name__, named))
            launch(kernel, grid, *arguments, **named)

        monkeypatch.setattr(module, "launch", noting)
    return seen


def names(launched):
    return [name for name, _ in launched]


# ---------------------------------------------------------------------------------------- forward

CONVOLUTIONS = [
    *((name, dtype, inner, True) for name, dtype, inner in itertools.product(
        ("tails", "boxes", "pointwise", "strided", "groups"), DTYPES, (True, False)
    )),
    *(("tails", dtype, inner, False) for dtype, inner in (
        (torch.float32, True), (torch.float64, True), (torch.float16, False)
    )),
    ("boxes", torch.bfloat16, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "inner", "own"), CONVOLUTIONS, ids=str)
def test_convolution(name, dtype, inner, own, launched, poisoned):
    """The first layer, and one behind another; mean and variance of an output far from 0."""
    case = CASES[name]
    x, weight, bias = case.drawn(dtype)
    norm = Norm.drawn(x.shape[1], dtype)
    pair = norm[:2] if inner else (None, None)
    bias += 20
    arguments = (weight, bias, None, *case.settings())
    y, mean, var = kernels._convolution(x, *pair, *arguments, True, False, own)
    results = []
    for images, weights, biases in ((x, weight, bias), of_conv2d.wide(x, weight, bias)):
        z = relu(norm, images) if inner else images
        results.append(F.conv2d(z, weights, biases, *case.settings()))
    assert_no_worse("output", y, *results)
    check_statistics(y, mean, var)
    assert names(launched)[0] == ("_convolve" if own else "_blend" if inner else "_statistics")
    launched.clear()
    again, *none = kernels._convolution(x, *pair, *arguments, False, False, own)
    assert torch.equal(again, y) and [t.shape for t in none] == [(0,), (0,)]
    assert len(launched) == (1 if own else int(inner))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (3, 130, 6, 5), (67, 8, 41, 23)], ids=str)
def test_statistics_of_a_pass(shape, dtype, poisoned):
    """Of more rows than a program takes, far from 0."""
    y = image(shape, dtype) + 20
    check_statistics(y, *kernels._run_statistics(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of", ["float32", "float16", "none", "strided"])
def test_finalize(of, dtype, poisoned):
    """scale, shift, rstd and the running statistics of torch, of more channels than a program
    takes."""
    channels, count, momentum, eps = 133, 24, 0.3, 1e-3
    x = torch.randn(4, channels, 3, 2, dtype=dtype) * 2 + 1
    parameter = {"float16": torch.float16, "float32": torch.float32}.get(of, dtype)
    weight, bias, running_mean, running_var = (torch.randn(4, channels) + 2).to(parameter)
    if of == "none":
        weight = bias = None
    if of == "strided":
        running_mean, running_var = (
            torch.stack([t, t.new_full(t.shape, 7.0)], 1)[:, 0] for t in (running_mean, running_var)
        )
    expected, exact = (
        [t if t is None else t.to(wide) for t in (running_mean, running_var, weight, bias)]
        for wide in (dtype, torch.float64)
    )
    now = torch.var_mean(x, (0, 2, 3), correction=0)
    found = kernels._finalize_statistics(
        now[1], now[0], count, weight, bias, running_mean, running_var, momentum, eps
    )
    outputs = [
        F.batch_norm(x.to(of_all[0].dtype), *of_all, True, momentum, eps)
        for of_all in (expected, exact)
    ]
    ours = x * of_image(found[0]) + of_image(found[1])
    assert_no_worse("output", ours, *outputs)
    var = x.double().var((0, 2, 3), correction=0)
    assert_no_worse("rstd", found[2], (now[0] + eps).rsqrt(), (var + eps).rsqrt())
    for name, running, stock, true in zip(
        ("mean", "var"), (running_mean, running_var), expected, exact, strict=False
    ):
        assert_no_worse(f"running {name}", running, stock.to(parameter), true)


OUTPUTS = [(1, 3, 5, 7), (2, 8, 4, 4), (3, 140, 3, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("shape", OUTPUTS, ids=str)
def test_output(shape, projects, dtype, poisoned):
    y, residual = image(shape, dtype), image(shape, dtype)
    norm, other = Norm.drawn(shape[1], dtype), Norm.drawn(shape[1], dtype)
    y[0, 0, 0, 0] = float("nan")
    pair = other[:2] if projects else (None, None)
    out, signs = kernels._output(y, *norm[:2], residual, *pair, True)
    results = []
    for a, b in ((y, residual), (y.double(), residual.double())):
        total = norm.before(a) + (other.before(b) if projects else b)
        results.append(F.relu(total).to(a.dtype))
    assert_no_worse("output", out, *results)
    assert torch.equal(signs, pack(~(out <= 0)))
    same, none = kernels._output(y, *norm[:2], residual, *pair, False)
    assert torch.equal(same.nan_to_num(), out.nan_to_num()) and none.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize(
    ("name", "own"), [("tails", True), ("boxes", True), ("strided", True), ("tails", False)]
)
def test_folded(name, own, relu, adds, dtype, launched, poisoned):
    case = CASES[name]
    x, weight, _ = case.drawn(dtype)
    norm = Norm.drawn(case.outputs)
    results, residual = [], None
    for images, weights in ((x, weight), of_conv2d.wide(x, weight)):
        y = norm.before(F.conv2d(images, weights, None, *case.settings()))
        if adds:
            residual = image(y.shape, dtype) if residual is None else residual
            y = y + residual
        results.append((F.relu(y) if relu else y).to(images.dtype))
    ours = kernels._folded(x, weight, None, *norm[:2], residual, *case.settings(), relu, False, own)
    assert_no_worse("output", ours, *results)
    assert names(launched) == (["_convolve"] if own else ["_blend"])
    assert ours.is_contiguous(memory_format=LAST)


# --------------------------------------------------------------------------------------- backward


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("shape", [*OUTPUTS, (67, 8, 41, 23)], ids=str)
def test_reduce(shape, projects, dtype, poisoned):
    grad, y, residual = (image(shape, dtype) for _ in range(3))
    norm, other = Norm.drawn(shape[1], dtype), Norm.drawn(shape[1], dtype)
    bits = torch.rand(shape) < 0.6
    more = (residual, *other[2:]) if projects else (None, None, None)
    found = kernels._reduce_gradient(grad, pack(bits), y, *norm[2:], *more)
    results = []
    for wide in (sums_dtype(dtype), torch.float64):
        g = torch.where(bits, grad, 0).to(wide)
        sums = [added(g)]
        for of, by in ((y, norm), (residual, other)):
            off = (of.to(wide) - of_image(by.mean)) * of_image(by.rstd)
            sums.append(added(g * off))
        results.append(sums)
    for name, *triple in zip(("sum", "product", "residual"), found, *results, strict=True):
        if name == "residual" and not projects:
            assert triple[0].shape == (0,)
        else:
            assert_no_worse(name, *triple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_coefficients(weighted, training, dtype, poisoned):
    total, product, rstd, weight = torch.randn(4, 133, dtype=dtype)
    weight = weight.half() if weighted else None
    found = kernels._coefficients_of(total, product, 24, weight, rstd, training)
    results = []
    for wide in (dtype, torch.float64):
        a, r = rstd.to(wide), rstd.to(wide)
        if weighted:
            a = a * weight.to(wide)
        b, c = -a * r * product.to(wide) / 24, -a * total.to(wide) / 24
        results.append(torch.stack([a, b * training, c * training]))
    assert_no_worse("coefficients", found, *results)


class Gradient(NamedTuple):
    """The arguments of a gradient, and what it is by torch's ops in the same dtype and float64."""

    arguments: list
    stock: list[Tensor | None]
    exact: list[Tensor | None]

    @classmethod
    def drawn(cls, case, dtype, before, masked):
        """``before``: "layer", "skip", "skip_signs" or "nothing"."""
        x, weight, _ = case.drawn(dtype)
        norm = Norm.drawn(x.shape[1], dtype) if before == "layer" else None
        if norm:
            x = norm.sure(x)
        shape = F.conv2d(x, weight, None, *case.settings()).shape
        grad, output = image(shape, dtype), image(shape, dtype)
        bits = torch.rand(shape) < 0.6
        mean = torch.randn(shape[1], dtype=sums_dtype(dtype))
        coefficients = torch.randn(3, shape[1], dtype=sums_dtype(dtype))
        skip = image(x.shape, dtype) if before.startswith("skip") else None
        skip_bits = torch.rand(x.shape) < 0.6 if before == "skip_signs" else None

        def of(wide):
            high = sums_dtype(wide)
            g, off = grad.to(high), output.to(high) - of_image(mean)
            if masked:
                g = torch.where(bits, g, 0)
            a, b, c = (of_image(t).to(high) for t in coefficients)
            dy = (a * g + (b * off + c)).to(wide)
            z = relu(norm, x.to(wide)) if norm else x.to(wide)
            leaves = [z.requires_grad_(), weight.to(wide).requires_grad_()]
            y = F.conv2d(*leaves, None, *case.settings())
            dx, dw = torch.autograd.grad(y, leaves, dy)
            if skip is not None:
                more = skip if skip_bits is None else torch.where(skip_bits, skip, 0)
                dx = dx + more.to(wide)
            if norm is None:
                return [dx, dw, None, None]
            dx = torch.where(norm.before(x.to(wide)) > 0, dx, 0)
            off = (x.to(high) - of_image(norm.mean)) * of_image(norm.rstd)
            return [dx, dw, added(dx.to(high)), added(dx.to(high) * off)]

        arguments = [
            grad, pack(bits) if masked else None, output, mean, coefficients, x,
            *(norm or (None,) * 4), weight, *case.settings(), skip,
            None if skip_bits is None else pack(skip_bits), False,
        ]  # fmt: skip
        return cls(arguments, of(dtype), of(torch.float64))

    def check(self, own=True, wanted=(True, True)):
        """4 times stock's error where the convolution may be the CPU library's Winograd."""
        found = kernels._gradient(*self.arguments, own, *wanted)
        has = (*wanted, *[wanted[0] and self.stock[2] is not None] * 2)
        for i, name in enumerate(("grad input", "grad weight", "sum", "product")):
            if has[i]:
                factor = 2.0 if own else 4.0
                assert_no_worse(name, found[i], self.stock[i], self.exact[i], factor)
            else:
                assert found[i].shape == (0,), name
        return found


GRADIENTS = [
    *((name, dtype, "layer", True, 90) for name in CASES for dtype in DTYPES),
    *((name, torch.float32, before, masked, 90) for name, before, masked in (
        ("tails", "skip", True), ("tails", "skip_signs", False), ("boxes", "skip_signs", True),
        ("strided", "skip", False), ("strided", "nothing", True), ("pointwise", "skip_signs", True),
        ("pointwise", "nothing", False), ("pointwise_tails", "layer", False),
    )),
    *((name, torch.float16, "layer", True, 80) for name in ("tails", "pointwise")),
    *((name, torch.bfloat16, "layer", True, 90) for name in ("tails", "pointwise")),
]  # fmt: skip
BOXED = ("pointwise", "pointwise_wide")


@pytest.mark.parametrize(("name", "dtype", "before", "masked", "arch"), GRADIENTS, ids=str)
def test_gradient(name, dtype, before, masked, arch, monkeypatch, launched, poisoned):
    on(monkeypatch, arch)
    drawn = Gradient.drawn(CASES[name], dtype, before, masked)
    drawn.check()
    settings = conv2d.Settings(*CASES[name].settings())
    pointwise = settings.is_pointwise(drawn.arguments[10])
    assert ("_blend" in names(launched)) != pointwise
    if name in BOXED and arch == 90:
        (constants,) = [named for kernel, named in launched if kernel == "_convolve"]
        assert constants["BOXED"] and not constants["SWAPPED"]
    if name == "pointwise_splits":
        (constants,) = [named for kernel, named in launched if kernel == "_weight_gradient"]
        assert constants["BOXED_D"] == (dtype == torch.float16) or constants["BOXED"] is False


@pytest.mark.parametrize("name", ["tails", "boxes", "strided", "groups"])
def test_dy_as_any_filter_reads_it(name, monkeypatch, launched, poisoned):
    """What the table leaves to a pass: where a filter reads padding dy is 0, not c - b·μ."""
    monkeypatch.setattr(kernels, "_makes_dy_as_it_reads", lambda *arguments: True)
    Gradient.drawn(CASES[name], torch.float32, "layer", True).check()
    assert "_blend" not in names(launched)


def test_gradient_in_ieee(launched):
    """A 1 × 1 too has its dy made by a pass."""
    drawn = Gradient.drawn(CASES["pointwise"], torch.float32, "layer", True)
    exact = len(drawn.arguments) - 1
    drawn.arguments[exact] = True
    drawn.check()
    assert names(launched)[0] == "_blend"
    assert all(named.get("PRECISION", "ieee") == "ieee" for _, named in launched)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("before", ["layer", "skip", "skip_signs", "nothing"])
def test_gradient_between_passes(before, dtype, launched, poisoned):
    """Where the convolution is not one of ours."""
    Gradient.drawn(CASES["tails"], dtype, before, True).check(own=False)
    assert not {"_convolve", "_weight_gradient"} & set(names(launched))


@pytest.mark.parametrize("own", [True, False], ids=["own", "auto"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_unwanted_gradients_are_empty(wanted, own, launched):
    for name in ("tails", "pointwise"):
        drawn = Gradient.drawn(CASES[name], torch.float32, "layer", True)
        launched.clear()
        drawn.check(own, wanted)
        assert names(launched).count("_convolve") == (own and wanted[0])
        assert names(launched).count("_weight_gradient") == (own and wanted[1])


def test_strides_of_the_gradients():
    """Those of input and weight, as the fakes say."""
    x, weight = torch.randn(2, 3, 1, 1), torch.randn(4, 3, 1, 1)
    for last, own in itertools.product((False, True), repeat=2):
        format = LAST if last else torch.contiguous_format
        w = torch.randn(4, 3, 3, 3).contiguous(memory_format=format)
        for images, weights, padding in ((x, weight, 0), (image((2, 3, 4, 5)), w, 1)):
            pads = (padding, padding)
            settings = ((1, 1), pads, (1, 1), 1)
            y = image(F.conv2d(images, weights, None, *settings).shape)
            arguments = [y, None, y, y[0, :, 0, 0], torch.randn(3, 4), images, *(None,) * 4]
            arguments += [weights, *settings, None, None, False, own, True, True]
            dx, dw, *_ = kernels._gradient(*arguments)
            assert dx.stride() == images.stride() and dw.stride() == weights.stride()


def test_empty_batch(launched):
    case = Case((0, 3, 5, 5), 4, **SAME)
    for own in (True, False):
        drawn = Gradient.drawn(case, torch.float32, "layer", True)
        dx, dw, total, product = kernels._gradient(*drawn.arguments, own, True, True)
        assert dx.shape == case.input and not dw.any() and not total.any() and not product.any()
        x, weight, bias = case.drawn(torch.float32)
        norm = Norm.drawn(3)
        y, *_ = kernels._convolution(
            x, *norm[:2], weight, bias, None, *case.settings(), True, False, own
        )
        assert y.shape == (0, 4, 5, 5)
        out, signs = kernels._output(x, *norm[:2], x, None, None, True)
        assert out.shape == case.input and signs.shape == (0, 5, 5, 1)
        sums = kernels._reduce_gradient(x, signs, x, *norm[2:], None, None, None)
        assert all(not total.any() for total in sums)
    assert "_convolve" not in names(launched) and "_reduce" not in names(launched)


@pytest.mark.parametrize("name", ["boxes", "pointwise_splits", "strided"])
def test_the_same_bits(name, monkeypatch):
    """From call to call, and however many multiprocessors there are."""
    drawn = Gradient.drawn(CASES[name], torch.float16, "layer", True)
    grad, signs, output, mean, *_ = drawn.arguments
    x, weight, bias = CASES[name].drawn(torch.float16)
    norm = Norm.drawn(x.shape[1])
    found = []
    for multiprocessors in (1, 1, 7):
        on(monkeypatch, 90, multiprocessors)
        found.append([
            *kernels._gradient(*drawn.arguments, True, True, True),
            *kernels._reduce_gradient(grad, signs, output, mean, mean, None, None, None),
            *kernels._convolution(
                x, *norm[:2], weight, bias, None, *CASES[name].settings(), True, False, True
            ),
        ])  # fmt: skip
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


# --------------------------------------------------------------------------------- the whole block

BLOCKS = {
    # name: input, (outputs, filter, stride) of each layer, of the shortcut
    "basic": ((2, 6, 7, 9), ((6, 3, 1), (6, 3, 1)), None),
    "projection": ((2, 6, 9, 8), ((10, 3, 2), (10, 3, 1)), (10, 1, 2)),
    "bottleneck": ((2, 16, 5, 6), ((8, 1, 1), (8, 3, 1), (16, 1, 1)), None),
    "bottleneck_projection": ((2, 8, 6, 5), ((8, 1, 1), (8, 3, 1), (24, 1, 1)), (24, 1, 1)),
}


def as_its_fake(name, kernel):
    """A raw op that checks what it returns against its fake, and that nothing in it is shared."""

    def run(*arguments):
        results = kernel(*arguments)
        metas = (a.to("meta") if torch.is_tensor(a) else a for a in arguments)
        fakes = getattr(torch.ops.dlkernels, name)(*metas)
        found, fakes = ([t] if torch.is_tensor(t) else t for t in (results, fakes))
        for t, fake in zip(found, fakes, strict=True):
            assert (t.shape, t.stride(), t.dtype) == (fake.shape, fake.stride(), fake.dtype), name
        memory = [
            t.untyped_storage().data_ptr() for t in (*found, *arguments) if torch.is_tensor(t)
        ]
        fresh = [at for at in memory[: len(found)] if at]
        assert all(memory.count(at) == 1 for at in fresh), name
        return results

    return run


@pytest.fixture
def stages(monkeypatch):
    """The public function by Triton's stages."""
    registered = {}
    monkeypatch.setattr(kernels, "register_kernels", lambda named, key: registered.update(named))
    kernels.register("CPU")
    checked = {name: as_its_fake(name, kernel) for name, kernel in registered.items()}
    monkeypatch.setattr(op, "_ops", SimpleNamespace(**checked))
    monkeypatch.setattr(op, "has_kernel", lambda name, device: True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("name", "kernels_"), [*((name, "own") for name in BLOCKS), ("projection", "auto")]
)
def test_block(name, training, kernels_, stages, monkeypatch, poisoned, launched):
    """Output, every gradient and the running statistics; 4 times stock's error, which is that of
    oneDNN and of sums in double."""
    dlkernels.config.kernels = kernels_
    monkeypatch.setattr(op, "is_small", lambda *arguments: False)
    block = blocks.drawn(*BLOCKS[name], torch.float32)
    stock, exact = blocks.copied(block), blocks.copied(block, torch.float64)
    d = torch.randn_like(blocks.stock(*block))
    results = [
        blocks.evaluate(function, images, d, training)
        for function, images in (
            (op.residual_block, block),
            (blocks.stock, stock),
            (blocks.stock, exact),
        )
    ]
    for i, triple in enumerate(zip(*results, strict=True)):
        assert_no_worse(f"result {i}", *triple, 4.0)
    with torch.no_grad():
        folded = op.residual_block(*block, training=False)
    assert_no_worse("folded", folded, blocks.stock(*stock), blocks.stock(*exact))
    if kernels_ == "own":
        assert {"_convolve", "_weight_gradient", "_reduce"} <= set(names(launched))
    else:
        assert not {"_convolve", "_weight_gradient"} & set(names(launched))


# ----------------------------------------------------------------------------------- planted faults

FAULTS = {
    # case, kernel, its parameter that another one's argument is given to
    "signs": ("pointwise_tails", "_convolve", "signs", None),
    "signs_of_weight": ("pointwise_tails", "_weight_gradient", "signs", None),
    "signs_of_pass": ("tails", "_blend", "r_signs", None),
    "mean": ("pointwise_tails", "_convolve", "raw_mean", "before_mean"),
    "mask": ("tails", "_convolve", "before_scale", "before_rstd"),
    "shift": ("tails", "_weight_gradient", "offset", "scale"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch, poisoned):
    name, wrong, parameter, by = FAULTS[fault]
    for module in (kernels, conv2d):

        def wrongly(kernel, grid, *arguments, launch=module.launch, **constants):
            if kernel.fn.__name__ == wrong:
                at = kernel.arg_names.index
                arguments = list(arguments)
                arguments[at(parameter)] = None if by is None else arguments[at(by)]
            launch(kernel, grid, *arguments, **constants)

        monkeypatch.setattr(module, "launch", wrongly)
    # As many channels before as after, so that their numbers may stand for each other's.
    case = CASES[name]
    drawn = Gradient.drawn(case._replace(outputs=case.input[1]), torch.float32, "layer", True)
    with pytest.raises(AssertionError):
        drawn.check()


# ----------------------------------------------------------------------------------------- refusals

X, W, C = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(4)
Y, K, S = torch.randn(1, 6, 5, 5), torch.randn(6), torch.zeros(1, 5, 5, 1, dtype=torch.uint8)
PLAIN = ((1, 1), (1, 1), (1, 1), 1)


def convolution(scale, shift, weight=W):
    return kernels._convolution(X, scale, shift, weight, None, None, *PLAIN, True, False, True)


def gradient(grad=Y, signs=S, coefficients=None, before=(C, C, C, C), skip=None, skip_signs=None):
    coefficients = torch.randn(3, 6) if coefficients is None else coefficients
    return kernels._gradient(
        grad, signs, Y, K, coefficients, X, *before, W, *PLAIN, skip, skip_signs, False, True,
        True, True,
    )  # fmt: skip


REFUSED = {
    "scale_alone": (lambda: convolution(C, None), "scale, shift, or none"),
    "scale_of_others": (lambda: convolution(K, K), "scale of shape"),
    "scale_of_doubles": (lambda: convolution(C.double(), C), "scale of dtype"),
    "weight": (lambda: convolution(C, C, W[:, :3]), "weight of shape"),
    "output": (lambda: kernels._output(X, C, C, Y, None, None, True), "residual of shape"),
    "dimensions": (lambda: kernels._output(X[0], C, C, X[0], None, None, True), "4 dimensions"),
    "folded": (
        lambda: kernels._folded(X, W, None, K, K, X, *PLAIN, True, False, True),
        "residual of",
    ),
    "reduce": (lambda: kernels._reduce_gradient(X, S[..., :0], X, C, C, None, None, None), "signs"),
    "reduced": (lambda: kernels._reduce_gradient(X, S, X, C, C, X, None, C), "or none of them"),
    "finalize": (
        lambda: kernels._finalize_statistics(C, C, 2, K, None, None, None, 0.1, 1e-5),
        "weight of shape",
    ),
    "coefficients": (lambda: kernels._coefficients_of(C, K, 2, None, C, True), "product of shape"),
    "grad": (lambda: gradient(grad=X), "grad of shape"),
    "signs": (lambda: gradient(signs=S.int()), "signs of dtype"),
    "gradient_coefficients": (lambda: gradient(coefficients=torch.randn(3, 4)), "coefficients of"),
    "before": (lambda: gradient(before=(C, C, None, C)), "or none of them"),
    "skip": (lambda: gradient(skip=X), "no skip behind a layer"),
    "skip_signs": (lambda: gradient(before=(None,) * 4, skip_signs=S), "a skip with"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    call, words = REFUSED[what]
    with pytest.raises(RuntimeError, match=words):
        call()

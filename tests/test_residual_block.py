"""residual_block against torch's parts, and its stages each by itself: forward, gradients, running
statistics, layouts, refusals, threads, processes.

Where Winograd's algorithm may run, in float32 with 3×3 weights of stride 1, the rule of
tests/compare.py is 4 × stock's error, 5 × in the gradients of weights, and 6 × in those of a norm's
parameters, which are sums over what the algorithm has rounded.
"""

import copy
import itertools
from typing import NamedTuple

import processes
import pytest
import torch
from compare import assert_no_worse
from graphs import check_second_backward
from hypothesis import assume, given
from hypothesis import settings as drawing
from hypothesis import strategies as st
from layouts import every_second, offset, same_memory, sliced_rows
from memory import assert_nothing_is_kept
from threads import (
    assert_same_for_any_number_of_threads,
    assert_same_in_a_forked_child,
    assert_same_in_threads_at_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
from dlkernels.functional import ResidualLayer, residual_block

ops = torch.ops.dlkernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAST = torch.channels_last
NORM = ("norm_weight", "norm_bias", "running_mean", "running_var")


class Conv(NamedTuple):
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def settings(self):
        return self[2:]

    def may_round(self):
        return self.kernel == (3, 3) and self[2] == self[4] == (1, 1) and self.groups == 1


class Block(NamedTuple):
    image: tuple[int, int, int, int]
    layers: tuple[Conv, ...]
    shortcut: Conv | None = None
    bias: bool = False
    affine: bool = True
    running: bool = True

    def every(self):
        return *self.layers, *([] if self.shortcut is None else [self.shortcut])


def point(outputs, stride=(1, 1), groups=1):
    return Conv(outputs, (1, 1), stride, (0, 0), groups=groups)


def basic(image, **more):
    return Block(image, (Conv(image[1]), Conv(image[1])), **more)


# On each side of what the kernels switch on: Winograd from 4 tiles of 4×4 on (64 in the weight's
# gradient), of channels in sixteens or above 64; sums of 4 tiles; vectors of 16, 8 or 4 channels,
# bytes of 8 signs.
BLOCKS = {
    "identity": basic((3, 16, 7, 9)),
    "tiles_left_over": basic((9, 16, 11, 9)),  # 81: the last sum is of one
    "channels_with_tails": basic((11, 67, 7, 9), bias=True),
    "few_tiles_of_many_channels": basic((4, 264, 4, 4)),  # Correlation::by_panels
    "sums_by_panels": basic((16, 136, 7, 8)),
    "many_tiles": basic((4, 16, 61, 63)),  # groups of tiles in the weight's gradient
    "one_image": basic((1, 16, 9, 10), bias=True),
    "three_channels": basic((4, 3, 9, 8), bias=True),
    "one_channel": basic((5, 1, 9, 7)),
    "few_values": Block((7, 5, 1, 1), (point(5), point(5))),
    "no_affine": basic((6, 16, 13, 15), affine=False),
    "no_running": basic((6, 16, 13, 15), running=False),
    "projection": Block((5, 16, 13, 15), (Conv(32), Conv(32)), point(32)),
    "projection_with_tails": Block((4, 5, 6, 7), (Conv(9), Conv(9)), point(9), bias=True),
    "stride_2": Block(
        (4, 16, 11, 14), (Conv(32, stride=(2, 2)), Conv(32)), point(32, (2, 2)), bias=True
    ),
    "small_images": Block(
        (9, 16, 4, 4), (Conv(32, stride=(2, 2)), Conv(32)), point(32, (2, 2)), bias=True
    ),
    "three_by_three_shortcut": Block((5, 16, 11, 14), (Conv(32), Conv(32)), Conv(32)),
    "bottleneck": Block((6, 32, 13, 15), (point(16), Conv(16), point(32))),
    "bottleneck_stride_2": Block(
        (3, 12, 9, 10), (point(7), Conv(7, stride=(2, 2)), point(20)), point(20, (2, 2))
    ),
    "one_layer": Block((6, 16, 13, 15), (Conv(16),), bias=True),
    "one_point": Block((3, 7, 5, 6), (point(7),)),
    "groups": Block((3, 12, 8, 9), (point(12), Conv(12, groups=3), point(12))),
    "depthwise": Block((3, 19, 8, 7), (point(19), Conv(19, groups=19), point(19))),
    "dilation": Block((2, 8, 9, 11), (Conv(8, padding=(2, 3), dilation=(2, 3)), Conv(8))),
    "padding_less": Block((6, 16, 13, 15), (Conv(16, padding=(0, 1)), Conv(16, padding=(2, 1)))),
    "odd_kernels": Block(
        (3, 6, 8, 9), (Conv(6, (1, 3), padding=(0, 1)), Conv(6, (5, 5), padding=(2, 2)))
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread only waits here, on a machine that is busy; the tests of threads set more."""
    torch.set_num_threads(1)


def last(x):
    return x.contiguous(memory_format=LAST)


# ------------------------------------------------------------------------------------ whole blocks


def _layer(conv, x, signs, dtype, norms, training, block):
    """A ResidualLayer behind x, what its norm makes of it in float64, and its channels' signs."""
    own = torch.randn(conv.outputs).sign()
    fan_in = x.shape[1] // conv.groups
    weight = torch.randn(conv.outputs, fan_in, *conv.kernel)
    weight *= 0.06 / weight[0].numel() ** 0.5
    of_group = signs.view(conv.groups, fan_in).repeat_interleave(conv.outputs // conv.groups, 0)
    centre = (..., conv.kernel[0] // 2, conv.kernel[1] // 2)
    weight[centre] += own[:, None] * of_group * (0.5 + torch.rand(conv.outputs, fan_in)) / fan_in
    weight = weight.to(dtype)
    bias = torch.randn(conv.outputs).to(dtype) if block.bias else None
    y = F.conv2d(x, weight.double(), None if bias is None else bias.double(), *conv.settings())
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    gamma = beta = running_mean = running_var = None
    if block.affine:
        gamma = ((0.5 + torch.rand(conv.outputs)) * torch.randn(conv.outputs).sign()).to(norms)
        beta = (gamma * 0.4 * (torch.rand(conv.outputs) - 0.5)).to(norms)
    if block.running:
        running_mean = (mean + 0.1 * var.sqrt() * torch.randn(conv.outputs)).to(norms)
        running_var = (var * (0.7 + 0.6 * torch.rand(conv.outputs))).to(norms)
    layer = ResidualLayer(weight, bias, gamma, beta, running_mean, running_var, *conv.settings())
    layer = layer._replace(momentum=0.3)
    if not training:
        mean, var = running_mean.double(), running_var.double()
    shape = (-1, 1, 1)
    made = (y - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
    if block.affine:
        made = made * gamma.double().view(shape) + beta.double().view(shape)
        own = own * gamma.float().sign()
    return layer, made, own


def draw(block, dtype, training=True, norms=None):
    """(input, layers, shortcut) of a block; ``norms`` is the dtype of the batch norms.

    A ReLU's mask is a matter of rounding near 0, so between layers nothing is near: pixels are
    about 1 or −1, and each weight's centre adds channels of one sign to about 1 or −1 again.
    """
    norms = norms or dtype
    for _ in range(200):
        n, c, h, w = block.image
        pattern = torch.randn(n, 1, h, w).sign()
        input = (pattern * (1 + 0.3 * (2 * torch.rand(block.image) - 1))).to(dtype)
        layers, z, signs, gap = [], input.double(), torch.ones(c), float("inf")
        for conv in block.layers:
            layer, z, signs = _layer(conv, z, signs, dtype, norms, training, block)
            layers.append(layer)
            if len(layers) < len(block.layers):
                gap = min(gap, z.abs().min().item())
                z = z.relu()
        if gap > 0.04:
            shortcut = None
            if block.shortcut is not None:
                first = torch.ones(c)
                shortcut, *_ = _layer(
                    block.shortcut, input.double(), first, dtype, norms, training, block
                )
            return input, layers, shortcut
    raise AssertionError(f"no gap around 0 in {block}")


def stock(input, layers, shortcut=None, *, training=False, last_relu=F.relu):
    def layer(x, of):
        y = F.conv2d(x, of.weight, of.bias, of.stride, of.padding, of.dilation, of.groups)
        batch = training or of.running_mean is None
        norm = of.running_mean, of.running_var, of.norm_weight, of.norm_bias
        return F.batch_norm(y, *norm, batch, of.momentum, of.eps)

    past = input if shortcut is None else layer(input, shortcut)
    x = input
    for of in layers[:-1]:
        x = F.relu(layer(x, of))
    return last_relu(layer(x, layers[-1]) + past)


def copied(case, dtype=None, graded=True):
    """The same case in tensors of its own, in ``dtype``; its leaves by name; and what runs."""
    input, layers, shortcut = case

    def copy(x):
        return None if x is None else x.detach().to(dtype or x.dtype, copy=True)

    def of(layer):
        return layer._replace(**{n: copy(getattr(layer, n)) for n in ("weight", "bias", *NORM)})

    case = copy(input), [of(x) for x in layers], shortcut and of(shortcut)
    leaves, running = {"input": case[0]}, {}
    for name, layer in [*enumerate(case[1]), ("shortcut", case[2])]:
        if layer is not None:
            fields = {f"{name} {n}": getattr(layer, n) for n in ("weight", "bias", *NORM)}
            fields = {n: x for n, x in fields.items() if x is not None}
            running |= {n: x for n, x in fields.items() if "running" in n}
            leaves |= {n: x for n, x in fields.items() if "running" not in n}
    if graded:
        for leaf in leaves.values():
            leaf.requires_grad_()
    return case, leaves, running


def upstream_of(case, training):
    """A gradient of the output; 0 where the last ReLU's sign is a matter of rounding."""
    with torch.no_grad():
        wide = copied(case, torch.float64, graded=False)[0]
        exact = stock(*wide, training=training, last_relu=lambda x: x)
    upstream = torch.randn(exact.shape, dtype=torch.float64)
    room = 16 * torch.finfo(case[0].dtype).eps * exact.abs().max()
    upstream[exact.abs() < room] = 0
    return upstream


def evaluate(function, case, upstream, training=True, dtype=None):
    """Output, gradients and running statistics by name; without ``upstream`` no gradients."""
    case, leaves, running = copied(case, dtype, upstream is not None)
    output = function(*case, training=training)
    results = {"output": output}
    if upstream is not None:
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))
        results |= {f"grad {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return results | running


def values(*arguments, **keywords):
    return list(evaluate(*arguments, **keywords).values())


def rounds(block, dtype):
    return dtype == torch.float32 and any(conv.may_round() for conv in block.every())


def check(make, training=True, graded=True, rounds=False, numbers=300, factor=2.0):
    """Ours against stock; ``make()`` draws a case.

    Errors are pooled over so many numbers of the smallest result (in at most 12 draws): of few,
    stock gets some by luck.
    """
    results, drawn = [], 0
    while drawn < numbers and len(results) < 3 * 12:
        case = make()
        upstream = upstream_of(case, training) if graded else None
        for function, dtype in ((residual_block, None), (stock, None), (stock, torch.float64)):
            results.append(evaluate(function, case, upstream, training, dtype))
        drawn += min(result.numel() for result in results[-1].values())
    for name in results[-1]:
        if training and name.startswith("grad") and name.endswith(" bias"):
            for result in results[::3]:  # what the norm takes away; of stock, rounding alone
                assert (result[name] == 0).all(), name
            continue
        wider = 1
        if rounds:
            wider = 3 if "grad" in name and "norm" in name else 2.5 if "weight" in name else 2
        assert_no_worse(name, *([r[name] for r in results[j::3]] for j in range(3)), wider * factor)
    ours, stocks = results[-3:-1]
    assert ours["output"].stride() == stocks["output"].stride(), "another format than stock's"
    return case, ours


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_training = pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])


NUMBERS = {"many_tiles": 30, "sums_by_panels": 130}  # large: their results are luck no more


def cases(training):
    """(block, dtype); of what is large, the arithmetic that has algorithms of its own."""
    for name, block in BLOCKS.items():
        for dtype in DTYPES:
            large = name in ("many_tiles", "few_tiles_of_many_channels", "sums_by_panels")
            if (dtype == torch.float32 or not large) and (block.running or training):
                yield pytest.param(name, dtype, training, id=f"{name}-{dtype}-{MODES[training]}")


MODES = {True: "training", False: "frozen"}


@pytest.mark.parametrize(("name", "dtype", "training"), [*cases(True), *cases(False)])
def test_shapes(name, dtype, training, own, poisoned):
    block = BLOCKS[name]
    check(
        lambda: draw(block, dtype, training), training, rounds=rounds(block, dtype),
        numbers=NUMBERS.get(name, 300),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "training"), list(cases(False)))
def test_inference(name, dtype, training, own, poisoned):
    """Norms folded into their convolutions."""
    block = BLOCKS[name]
    with torch.no_grad():
        check(
            lambda: draw(block, dtype, training), training, False, rounds(block, dtype),
            NUMBERS.get(name, 300),
        )  # fmt: skip


# ----------------------------------------------------------------------------- layouts and dtypes


def of_more_channels(x):
    """Some channels of an image of more, in NHWC."""
    return last(torch.cat([x, x], 1))[:, : x.shape[1]]


def changed(case, of_input=same_memory, of_weight=same_memory, of_vector=same_memory):
    """The case in other layouts of memory."""
    input, layers, shortcut = case

    def of(layer):
        vectors = {n: getattr(layer, n) for n in ("bias", *NORM)}
        vectors = {n: x if x is None else of_vector(x) for n, x in vectors.items()}
        return layer._replace(weight=of_weight(layer.weight), **vectors)

    return of_input(input), [of(layer) for layer in layers], shortcut and of(shortcut)


LAYOUTS = {
    "channels_last": (last, same_memory, same_memory),
    "weights_channels_last": (same_memory, last, same_memory),
    "both_channels_last": (last, last, same_memory),
    "input_of_more_channels": (of_more_channels, same_memory, same_memory),
    "input_sliced_batch": (sliced_rows, same_memory, offset),
    "input_every_second": (every_second, last, same_memory),
    "all_every_second": (every_second, every_second, every_second),
}


@by_training
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, training, own, poisoned):
    """The same bits as of contiguous tensors, in stock's format."""
    for name in ("identity", "projection", "stride_2", "projection_with_tails"):
        case = draw(BLOCKS[name], dtype, training)
        upstream = upstream_of(case, training)
        wanted = values(residual_block, case, upstream, training)
        case = changed(case, *LAYOUTS[layout])
        for given_upstream in (upstream, last(upstream), every_second(upstream)):
            # Clones keep strides only of what is dense: these are the leaves themselves.
            leaves = [x.detach() for x in copied_of(case)]
            for leaf in leaves:
                leaf.requires_grad_()
            graded = replaced(case, leaves)
            output = residual_block(*graded, training=training)
            gradients = torch.autograd.grad(output, leaves, given_upstream.to(dtype))
            for ours, want in zip((output, *gradients), wanted, strict=False):
                assert torch.equal(ours, want)
            with torch.no_grad():
                assert output.stride() == stock(*graded, training=training).stride()


def copied_of(case):
    """input and what else has gradients, in the order of ``copied``."""
    input, layers, shortcut = case
    every = [*layers, *([] if shortcut is None else [shortcut])]
    return [input, *(x for layer in every for x in layer.parameters if x is not None)]


def replaced(case, leaves):
    """The case of other leaves; running statistics are copies."""
    leaves = iter(leaves)
    input, layers, shortcut = case
    of_input = next(leaves)

    def of(layer):
        names = ("weight", "bias", "norm_weight", "norm_bias")
        made = {n: next(leaves) for n in names if getattr(layer, n) is not None}
        running = {n: getattr(layer, n) for n in NORM[2:]}
        return layer._replace(
            **made, **{n: x if x is None else x.clone() for n, x in running.items()}
        )

    return of_input, [of(layer) for layer in layers], shortcut and of(shortcut)


@by_training
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tiles_left_over", "projection_with_tails", "stride_2"])
def test_float32_norms_beside_half_precision(name, dtype, training, own, poisoned):
    block = BLOCKS[name]
    check(lambda: draw(block, dtype, training, torch.float32), training)
    if not training:
        with torch.no_grad():
            check(lambda: draw(block, dtype, False, torch.float32), False, graded=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, own):
    """Computed and returned in autocast's dtype; gradients have their leaf's."""
    case, leaves, _ = copied(draw(BLOCKS["projection"], torch.float32))
    leaves = list(leaves.values())
    narrow = [x.detach().to(dtype) for x in copied_of(case)]
    with torch.autocast("cpu", dtype):
        ours, wanted = (f(*replaced(case, leaves), training=True) for f in (residual_block, stock))
    assert ours.dtype == wanted.dtype == dtype
    halves = replaced(case, narrow)
    layers = [
        of._replace(norm_weight=a.norm_weight, norm_bias=a.norm_bias)
        for of, a in zip((*halves[1], halves[2]), (*case[1], case[2]), strict=True)
    ]
    with torch.no_grad():
        explicit = residual_block(halves[0], layers[:-1], layers[-1], training=True)
    near(explicit, ours, dtype)  # the running mean, about which sums are, has moved
    upstream = torch.randn(ours.shape).to(dtype)
    a, b = (torch.autograd.grad(y, leaves, upstream) for y in (ours, wanted))
    for leaf, ours_gradient, stocks_gradient in zip(leaves, a, b, strict=True):
        assert ours_gradient.dtype == stocks_gradient.dtype == leaf.dtype
    torch._dynamo.reset()
    compiled = torch.compile(residual_block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        # Its sums are not about the running mean, which is no argument of the op that it traces.
        near(compiled(*replaced(case, leaves), training=True), ours, dtype)


@drawing(max_examples=40, deadline=None, derandomize=True)
@given(
    # Of one channel a format is open, and its weight has no gradient before a norm.
    image=st.tuples(st.integers(1, 3), st.integers(2, 20), st.integers(1, 11), st.integers(1, 11)),
    middle=st.sampled_from([2, 3, 16, 17]),
    kernels=st.lists(st.sampled_from([1, 3]), min_size=1, max_size=3),
    # torch 2.13's oneDNN writes past its memory in the weight gradient of 1×1 with two strides.
    stride=st.sampled_from([(1, 1), (2, 2)]),
    projects=st.booleans(),
    bias=st.booleans(),
    affine=st.booleans(),
    training=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([dtype for dtype in DTYPES if dtype != torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_drawn_blocks(
    image, middle, kernels, stride, projects, bias, affine, training, layout, dtype, seed
):
    dlkernels.config.kernels = "own"
    torch.manual_seed(seed)
    n, c, h, w = image
    stride = stride if projects else (1, 1)
    outputs = c + 3 if projects else c
    layers = [Conv(middle, (k, k), padding=(k // 2, k // 2)) for k in kernels]
    layers[0] = layers[0]._replace(stride=stride)
    layers[-1] = layers[-1]._replace(outputs=outputs)
    # Few values of a channel are seldom of both signs, and their statistics make rounding large.
    assume(n * -(-h // stride[0]) * -(-w // stride[1]) >= 12)
    shortcut = point(outputs, stride) if projects else None
    block = Block(image, tuple(layers), shortcut, bias, affine)

    def make():
        return changed(draw(block, dtype, training), *LAYOUTS[layout])

    # hypothesis looks for the worst luck
    check(make, training, rounds=rounds(block, dtype), numbers=40, factor=4.0)


# ------------------------------------------------------------------------------------------ stages

ONE = [1, 1]
CONVOLUTIONS = {
    "winograd": Block((5, 16, 9, 11), (Conv(32),)),
    "winograd_tails": Block((3, 65, 7, 5), (Conv(67),)),
    "winograd_padding": Block((2, 32, 8, 9), (Conv(16, padding=(2, 0)),)),
    "winograd_by_panels": Block((5, 64, 4, 3), (Conv(144),)),
    "winograd_by_blocks": Block((70, 64, 4, 3), (Conv(144),)),
    "direct": Block((2, 5, 7, 6), (Conv(9),)),
    "stride_2": Block((2, 17, 9, 8), (Conv(33, stride=(2, 2)),)),
    "one_by_one": Block((3, 7, 5, 6), (point(19),)),
    "dilation": Block((2, 8, 9, 7), (Conv(6, padding=(2, 1), dilation=(2, 1)),)),
    "groups": Block((2, 12, 7, 8), (Conv(18, groups=3),)),
    "depthwise": Block((2, 19, 8, 7), (Conv(19, groups=19),)),
}
by_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)
# Of float32's and half precision's sums, and of float64's.
SUMS = {torch.float64: torch.float64}
ROOM = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def sums_of(dtype):
    return SUMS.get(dtype, torch.float32)


def near(ours, wanted, dtype, times=1.0):
    """To the rounding of ``dtype``, relative to the largest."""
    assert ours.shape == wanted.shape
    room = times * ROOM[dtype] * max(1.0, wanted.abs().max().item() if wanted.numel() else 0)
    torch.testing.assert_close(ours.double(), wanted.double(), rtol=0, atol=room)


def vector(channels, dtype, scale=1.0, about=0.0):
    return (about + scale * torch.randn(channels)).to(sums_of(dtype))


def by_channel(x):
    return x.double().view(-1, 1, 1)


def geometry(conv):
    return [list(pair) for pair in conv.settings()[:3]] + [conv.groups]


def weight_of(block, dtype):
    conv = block.layers[0]
    fan_in = block.image[1] // conv.groups
    weight = torch.randn(conv.outputs, fan_in, *conv.kernel)
    return (weight / weight[0].numel() ** 0.5).to(dtype)


@pytest.mark.parametrize("ours", [True, False], ids=["own", "aten"])
@by_dtype
@by_convolution
def test_convolution_stage(name, dtype, ours, poisoned):
    block = CONVOLUTIONS[name]
    conv, channels = block.layers[0], block.image[1]
    x = last(torch.randn(block.image).to(dtype))
    scale, shift = vector(channels, dtype), vector(channels, dtype, about=0.5)
    weight, bias = weight_of(block, dtype), torch.randn(conv.outputs).to(dtype)
    for prologue, added, of_weight in ((True, bias, last), (False, None, same_memory)):
        z = x.double()
        if prologue:
            z = F.relu(by_channel(scale) * z + by_channel(shift))
        wanted = F.conv2d(z, weight.double(), None if added is None else added.double(), *conv[2:])
        var, mean = torch.var_mean(wanted, (0, 2, 3), correction=0)
        before = (scale, shift) if prologue else (None, None)
        about = mean.float() + 0.5
        for want in (True, False):
            y, our_mean, our_var = ops.residual_block_convolution(
                x, *before, of_weight(weight), added, about, *geometry(conv), want, False, ours
            )
            assert y.is_contiguous(memory_format=LAST)
            near(y, wanted, dtype)
            assert our_mean.dtype == our_var.dtype == sums_of(dtype)
            if want:
                near(our_mean, mean, dtype)
                near(our_var, var, dtype)
            else:
                assert our_mean.shape == our_var.shape == (0,)


@pytest.mark.parametrize("about", [None, 0.0, 1e3, -5e5, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["winograd", "winograd_tails", "stride_2"])
def test_statistics_of_large_means(name, about, poisoned):
    """Means of 1000 beside deviations of 1, about what is near, far, or no number at all."""
    block = CONVOLUTIONS[name]
    conv = block.layers[0]
    x, bias = last(torch.randn(block.image)), 1e3 + torch.randn(conv.outputs)
    bias[::2] *= -1
    centre = None if about is None else torch.full((conv.outputs,), about)
    y, mean, var = ops.residual_block_convolution(
        x, None, None, weight_of(block, torch.float32), bias, centre, *geometry(conv), True, False,
        True,
    )  # fmt: skip
    wanted_var, wanted_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), wanted_var, rtol=1e-5, atol=0)


def test_statistics_of_outliers_and_of_one_value(own, poisoned):
    """The first row is far from all others; a channel has no variance at all."""
    x = last(torch.randn(4, 16, 9, 9))
    x[0, :, 0, 0] = 1e6
    weight = torch.eye(16)[:, :, None, None].clone()
    weight[3] = 0
    bias = torch.full((16,), 7.0)
    y, mean, var = ops.residual_block_convolution(
        x, None, None, weight, bias, torch.full((16,), 1e9), ONE, [0, 0], ONE, 1, True, False, True
    )
    wanted_var, wanted_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(var.double(), wanted_var, rtol=1e-5, atol=0)
    assert mean[3] == 7 and var[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finalize_stage(dtype, poisoned):
    mean, var = torch.randn(19).to(dtype), (torch.rand(19) + 0.1).to(dtype)
    gamma, beta = torch.randn(19), torch.randn(19)
    for weight, bias, parameters in (
        (None, None, dtype), (gamma.to(dtype), beta.to(dtype), dtype), (None, beta.double(), dtype),
        (gamma.bfloat16(), every_second(beta), torch.bfloat16), (gamma, None, torch.float16),
    ):  # fmt: skip
        running = [torch.randn(19).to(parameters), torch.rand(19).to(parameters)]
        before = [x.clone() for x in running]
        scale, shift, rstd = ops.residual_block_finalize(
            mean, var, 41, weight, bias, *running, 0.3, 1e-3
        )
        wanted = 1 / (var.double() + 1e-3).sqrt()
        near(rstd, wanted, dtype)
        if weight is not None:
            wanted = wanted * weight.double()
        near(scale, wanted, dtype)
        near(shift, (0 if bias is None else bias.double()) - mean.double() * wanted, dtype)
        now = mean.double(), var.double() * 41 / 40
        for ours, old, new in zip(running, before, now, strict=True):
            torch.testing.assert_close(ours, (0.7 * old.double() + 0.3 * new).to(parameters))
    ops.residual_block_finalize(mean, var, 1, None, None, None, None, 0.0, 1e-3)


def packed(where):
    """(N, C, P, Q) → the bits that the signs are."""
    n, c, p, q = where.shape
    bits = torch.zeros(n, p, q, (c + 7) // 8 * 8, dtype=torch.int32)
    bits[..., :c] = where.permute(0, 2, 3, 1)
    return (bits.view(n, p, q, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


CHANNELS = [1, 3, 7, 8, 9, 12, 16, 23, 24, 31, 40, 67]


@by_dtype
@pytest.mark.parametrize("channels", CHANNELS)
def test_output_stage_and_its_signs(channels, dtype, poisoned):
    x, other = (last(torch.randn(3, channels, 5, 7).to(dtype)) for _ in range(2))
    x[0, 0, 0, 0], other[1, -1, 2, 3] = float("nan"), float("inf")
    x[2, 0, 1, 1] = other[2, 0, 1, 1] = 0
    s, t, rs, rt = (vector(channels, dtype) for _ in range(4))
    t[0] = rt[0] = 0  # one output is 0
    for affine in ((None, None), (rs, rt)):
        y = by_channel(s) * x.double() + by_channel(t)
        past = other.double()
        if affine[0] is not None:
            past = by_channel(rs) * past + by_channel(rt)
        wanted = F.relu(y + past)
        output, signs = ops.residual_block_output(x, s, t, other, *affine, True)
        assert output.is_contiguous(memory_format=LAST)
        assert torch.equal(output.isnan(), wanted.isnan()) and output.isnan().any()
        finite = wanted.isfinite()
        near(output[finite], wanted[finite], dtype)
        assert torch.equal(output[~finite].double().nan_to_num(), wanted[~finite].nan_to_num())
        # Of what float32 knew before it was rounded: in half precision 0 may have been above.
        sure = ((wanted > 1e-5) | (wanted == 0) | wanted.isnan()).permute(0, 2, 3, 1)
        assert sure.float().mean() > 0.99
        bits = packed(~(wanted <= 0))
        differ = (signs ^ bits)[..., None] >> torch.arange(8) & 1
        differ = differ.flatten(-2)
        assert not differ[..., channels:].any() and not (differ[..., :channels].bool() & sure).any()
        same, none = ops.residual_block_output(x, s, t, other, *affine, False)
        assert torch.equal(same.nan_to_num(), output.nan_to_num()) and none.shape == (0,)


@pytest.mark.parametrize("ours", [True, False], ids=["own", "aten"])
@by_dtype
@by_convolution
def test_folded_stage(name, dtype, ours, poisoned):
    block = CONVOLUTIONS[name]
    conv = block.layers[0]
    x, weight = torch.randn(block.image).to(dtype), weight_of(block, dtype)
    scale, shift = vector(conv.outputs, dtype), vector(conv.outputs, dtype)
    y = F.conv2d(x.double(), weight.double(), None, *conv.settings())
    residual = torch.randn(y.shape).to(dtype)
    for past, relu in ((None, False), (None, True), (residual, False), (residual, True)):
        wanted = by_channel(scale) * y + by_channel(shift)
        if past is not None:
            wanted = wanted + past.double()
        output = ops.residual_block_folded(
            x, weight, None, scale, shift, past, *geometry(conv), relu, False, ours
        )
        assert output.is_contiguous(memory_format=LAST)
        near(output, F.relu(wanted) if relu else wanted, dtype)


@by_dtype
@pytest.mark.parametrize("channels", CHANNELS)
def test_reduce_stage(channels, dtype, poisoned):
    """Rows beyond a block of 16; a sum is that of the numbers as they are stored."""
    shape = (3, channels, 13, 7)
    grad, y, other = (torch.randn(shape).to(dtype) for _ in range(3))
    where = torch.rand(shape) < 0.4
    mean, other_mean = (vector(channels, dtype) for _ in range(2))
    rstd, other_rstd = (vector(channels, dtype, 0.1, 1.0) for _ in range(2))
    g = grad.double() * where
    wanted = [g.sum((0, 2, 3))]
    for image, mu, r in ((y, mean, rstd), (other, other_mean, other_rstd)):
        centred = (image.double() - by_channel(mu)) * by_channel(r)
        wanted.append((g * centred).sum((0, 2, 3)))
    sums = ops.residual_block_reduce(
        last(grad), packed(where), last(y), mean, rstd, last(other), other_mean, other_rstd
    )
    for a, b in zip(sums, wanted, strict=True):
        near(a, b, sums_of(dtype))
    *two, none = ops.residual_block_reduce(
        last(grad), packed(where), last(y), mean, rstd, None, None, None
    )
    assert none.shape == (0,) and all(map(torch.equal, two, sums))


def test_sums_over_many_rows_are_in_double(poisoned):
    """2^16 numbers near 1: of float32 sums the error would be a hundred times as large."""
    shape = (1, 3, 256, 256)
    grad, y = torch.rand(shape) + 0.5, torch.zeros(shape)
    signs = torch.full((1, 256, 256, 1), 255, dtype=torch.uint8)
    mean, rstd = torch.full((3,), -1.0), torch.ones(3)
    total, product, _ = ops.residual_block_reduce(
        last(grad), signs, last(y), mean, rstd, None, None, None
    )
    for ours in (total, product):
        torch.testing.assert_close(ours.double(), grad.double().sum((0, 2, 3)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coefficients_stage(dtype, poisoned):
    total, product, gamma = (torch.randn(21).to(dtype) for _ in range(3))
    rstd = (torch.rand(21) + 0.5).to(dtype)
    for weight, training in itertools.product((None, gamma, gamma.bfloat16()), (True, False)):
        a = rstd.double() * (1 if weight is None else weight.double())
        b, c = -a * rstd.double() * product.double() / 33, -a * total.double() / 33
        wanted = torch.stack([a, b * training, c * training])
        near(
            ops.residual_block_coefficients(total, product, 33, weight, rstd, training),
            wanted, dtype,
        )  # fmt: skip


@pytest.mark.parametrize("ours", [True, False], ids=["own", "aten"])
@by_dtype
@by_convolution
def test_gradient_stage(name, dtype, ours, poisoned):
    block = CONVOLUTIONS[name]
    conv, channels = block.layers[0], block.image[1]
    weight, x = weight_of(block, dtype), torch.randn(block.image)
    scale, shift = vector(channels, dtype, 0.1, 1.0), vector(channels, dtype, 0.1)
    scale[::2] *= -1
    # Away from 0 before the ReLU.
    middle = -shift.view(-1, 1, 1) / scale.view(-1, 1, 1)
    x = last((middle + x + 0.2 * x.sign()).to(dtype))
    mean, rstd = vector(channels, dtype), vector(channels, dtype, 0.1, 1.0)
    shape = F.conv2d(x.double(), weight.double(), None, *conv.settings()).shape
    grad, y = (last(torch.randn(shape).to(dtype)) for _ in range(2))
    output_mean, where = vector(conv.outputs, dtype), torch.rand(shape) < 0.5
    coefficients = torch.randn(3, conv.outputs).to(sums_of(dtype))
    skip, skip_where = last(torch.randn(x.shape).to(dtype)), torch.rand(x.shape) < 0.5
    a, b, c = (by_channel(row) for row in coefficients)
    inner = scale, shift, mean, rstd
    for signs, before, more, more_signs, want_input, want_weight in (
        (None, inner, None, None, True, True),
        (where, inner, None, None, True, False),
        (where, inner, None, None, False, True),
        (where, None, skip, skip_where, True, True),
        (None, None, skip, None, True, False),
        (where, None, None, None, True, True),
        (None, None, None, None, False, False),
    ):
        dy = a * grad.double() * (1 if signs is None else signs)
        dy = dy + b * (y.double() - by_channel(output_mean)) + c
        pre = by_channel(scale) * x.double() + by_channel(shift)
        z = x.double() if before is None else F.relu(pre)
        made = ops.residual_block_gradient(
            grad, None if signs is None else packed(signs), y, output_mean, coefficients, x,
            *(before or (None,) * 4), weight, *geometry(conv), more,
            None if more_signs is None else packed(more_signs), False, ours, want_input,
            want_weight,
        )  # fmt: skip
        dx = torch.nn.grad.conv2d_input(z.shape, weight.double(), dy, *conv.settings())
        dw = torch.nn.grad.conv2d_weight(z, weight.shape, dy, *conv.settings())
        sums = [torch.zeros(0)] * 2
        if before is not None:
            dx = dx * (pre > 0)
            centred = (x.double() - by_channel(mean)) * by_channel(rstd)
            sums = [dx.sum((0, 2, 3)), (dx * centred).sum((0, 2, 3))]
        elif more is not None:
            dx = dx + more.double() * (1 if more_signs is None else more_signs)
        wanted = dx if want_input else torch.zeros(0), dw if want_weight else torch.zeros(0)
        near(made[0], wanted[0], dtype, 2)
        near(made[1], wanted[1], dtype, 2)
        for got, want in zip(made[2:], sums if want_input else [torch.zeros(0)] * 2, strict=True):
            assert got.dtype == sums_of(dtype)
            # Of numbers that are rounded, not rounded sums.
            near(got, want, dtype, 1)


# ---------------------------------------------------------------------------------------- autograd

GRADED = {
    "identity": basic((3, 2, 3, 3), bias=True),
    "projection": Block((3, 2, 4, 3), (Conv(3, stride=(2, 1)), Conv(3)), point(3, (2, 1))),
    "bottleneck": Block((3, 2, 3, 3), (point(3), Conv(3), point(2)), bias=True),
}


def graded(name, training):
    """A case in float64 none of whose outputs is near the last ReLU's kink, and its leaves."""
    while True:
        case = draw(GRADED[name], torch.float64, training)
        with torch.no_grad():
            before = stock(*copied(case, graded=False)[0], training=training, last_relu=lambda x: x)
        if before.abs().min() > 1e-3:
            return case, [x.requires_grad_() for x in copied_of(case)]


@by_training
@pytest.mark.parametrize("name", GRADED)
def test_gradcheck_and_gradgradcheck(name, training, own):
    case, leaves = graded(name, training)

    def function(*leaves):
        return residual_block(*replaced(case, leaves), training=training)

    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradient(function, leaves, check_batched_grad=True, fast_mode=True)


@by_training
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiles_left_over", "stride_2"])
def test_a_second_backward(name, dtype, training, own):
    case, leaves, _ = copied(draw(BLOCKS[name], dtype, training))
    output = residual_block(*case, training=training)
    leaves = list(leaves.values())
    check_second_backward(output, leaves, torch.randn(output.shape).to(dtype), 0.5)


class Asked(TorchDispatchMode):
    """Notes what the stages of the backward are asked for, conversions of images apart."""

    def __init__(self):
        super().__init__()
        self.wanted, self.stages = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (
            "residual_block" in function.name()
            and function is not ops.residual_block_layout.default
        ):
            self.stages.append(function.name().removeprefix("dlkernels::residual_block_"))
        if function is ops.residual_block_gradient.default:
            self.wanted.append(args[-2:])
        return function(*args, **(kwargs or {}))


@by_training
@pytest.mark.parametrize("name", ["stride_2", "projection", "bottleneck", "one_layer"])
def test_only_the_wanted_gradients_are_computed(name, training, own, poisoned):
    case, leaves, _ = copied(draw(BLOCKS[name], torch.float32, training))
    upstream = upstream_of(case, training)
    every = evaluate(residual_block, case, upstream, training)
    layers = len(BLOCKS[name].every())
    for wanted in ("input", "0 weight", "0 norm_bias", f"{len(case[1]) - 1} norm_weight"):
        for n, leaf in leaves.items():
            leaf.requires_grad_(n == wanted)
        fresh = replaced(case, copied_of(case))
        output = residual_block(*fresh, training=training)
        with Asked() as asked:
            (gradient,) = torch.autograd.grad(output, leaves[wanted], upstream.float())
        # Of one gradient alone, another algorithm may run.
        torch.testing.assert_close(gradient, every[f"grad {wanted}"], rtol=1e-4, atol=1e-4)
        assert asked.stages == ["reduce", *["coefficients", "gradient"] * layers]
        assert [weight for _, weight in asked.wanted].count(True) == (wanted == "0 weight")
        of_input = asked.wanted[-1][0], (asked.wanted[0][0] if case[2] else True)
        assert of_input == ((wanted == "input",) * 2 if case[2] else (wanted == "input", True))


def storages(function):
    """Bytes of the distinct storages that a call keeps for its backward."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = function()
    return sum(kept.values()), output


@pytest.mark.parametrize("name", ["identity", "projection"])
def test_memory_kept_for_the_backward(name, own):
    """x, the raw outputs of the convolutions, a bit of each output: 3.03 of stock's 5 images, and
    of 6 with a projection 4.03."""
    blocks = {
        "identity": basic((4, 64, 32, 32)),
        "projection": Block((4, 64, 32, 32), (Conv(64), Conv(64)), point(64)),
    }
    case, *_ = copied(draw(blocks[name], torch.float32))
    case = changed(case, last)
    ours, output = storages(lambda: residual_block(*case, training=True))
    stocks, _ = storages(lambda: stock(*case, training=True))
    image = output.numel() * 4
    images, limit = (3, 0.65) if name == "identity" else (4, 0.75)
    parameters = sum(x.numel() for x in copied_of(case)) * 4
    assert ours <= images * image + output.numel() // 8 + parameters + 12 * 64 * 4
    assert ours <= limit * stocks


def test_nothing_is_kept_without_a_gradient(own):
    case, *_ = copied(draw(BLOCKS["identity"], torch.float32), graded=False)
    for training in (True, False):
        with Asked() as asked:
            kept, output = storages(lambda: residual_block(*case, training=training))  # noqa: B023
        assert kept == 0 and not output.requires_grad
        if training:
            assert asked.stages[-1] == "output" and "folded" not in asked.stages
        else:
            assert asked.stages == ["finalize", "folded"] * 2
    for mode in (torch.no_grad, torch.inference_mode):
        case, *_ = copied(draw(BLOCKS["identity"], torch.float32))
        with mode():
            assert not residual_block(*case, training=True).requires_grad


def test_changes_in_place_are_refused(own):
    """Of what the backward reads; of the output, which it does not, they are not."""
    for changed_one in ("input", "0 weight", "1 norm_weight"):
        case, leaves, _ = copied(changed(draw(BLOCKS["projection"], torch.float32), last))
        x = replaced(case, [leaf * 1 for leaf in leaves.values()])
        names = dict(zip(leaves, copied_of(x), strict=True))
        output = residual_block(*x, training=True)
        names[changed_one].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    case, leaves, _ = copied(draw(BLOCKS["projection"], torch.float32))
    output = residual_block(*case, training=True)
    wanted = torch.autograd.grad(output.sum(), leaves["input"], retain_graph=True)[0]
    output.detach().mul_(3)
    assert torch.equal(torch.autograd.grad(output.sum(), leaves["input"])[0], wanted)


def test_running_statistics_are_written_in_place(own):
    """The version counter of the same tensors moves, momentum and the unbiased factor count."""
    case, _, running = copied(draw(BLOCKS["stride_2"], torch.float32), graded=False)
    before = {name: (x.clone(), x._version, x.data_ptr()) for name, x in running.items()}
    residual_block(*case, training=True)
    for name, x in running.items():
        old, version, place = before[name]
        assert x.data_ptr() == place and x._version > version and not torch.equal(x, old)
    again = {name: (x.clone(), x._version) for name, x in running.items()}
    residual_block(*case, training=False)
    for name, x in running.items():
        assert torch.equal(x, again[name][0]) and x._version == again[name][1]


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_a_lost_running_mean_does_not_reach_the_output(value, own):
    """In training it is written, and only to be near to the batch's is it read."""
    case, *_ = copied(draw(BLOCKS["identity"], torch.float32), graded=False)
    wanted = residual_block(*case, training=True)
    case[1][0].running_mean.fill_(value)
    ours = residual_block(*case, training=True)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_special_values_reach_the_output(own, poisoned):
    """A NaN in a convolution's sums: of all pixels in training, of what it is under in eval."""
    for name, training in itertools.product(("identity", "one_point"), (True, False)):
        case, *_ = copied(draw(BLOCKS[name], torch.float32, training), graded=False)
        case[0][-1, 2, 3, 3] = float("nan")
        ours, wanted = (evaluate(f, case, None, training) for f in (residual_block, stock))
        assert (ours["output"].isnan() | ~wanted["output"].isnan()).all()
        assert wanted["output"].isnan().any()
        assert training or ours["output"][0].isfinite().all()
        for key in ("0 running_mean", "0 running_var"):
            assert torch.equal(ours[key].isnan(), wanted[key].isnan())


def test_a_call_keeps_no_memory(own):
    case, *_ = copied(draw(Block((2, 3, 4, 4), (Conv(3),)), torch.float32), graded=False)
    assert_nothing_is_kept(lambda: residual_block(*case, training=True), times=1000)
    assert_nothing_is_kept(lambda: residual_block(*case), times=1000)


def test_raw_ops_refuse_to_be_differentiated(own):
    case, leaves, _ = copied(draw(BLOCKS["one_layer"], torch.float32))
    x, w = last(case[0]), case[1][0].weight
    y, mean, _ = ops.residual_block_convolution(
        x, None, None, w, None, None, ONE, ONE, ONE, 1, True, False, True
    )
    mean = mean.detach()
    output, _ = ops.residual_block_output(x, mean, mean, x, None, None, True)
    folded = ops.residual_block_folded(
        x, w, None, mean, mean, None, ONE, ONE, ONE, 1, True, False, True
    )
    for made in (y, output, folded):
        with pytest.raises(NotImplementedError, match="raw op"):
            made.sum().backward()


# ------------------------------------------------------------------------------ the rest of torch

EAGER = ("test_schema", "test_autograd_registration", "test_faketensor")


@by_training
@pytest.mark.parametrize("name", GRADED)
def test_opcheck(name, training):
    case, *_ = copied(draw(GRADED[name], torch.float32, training))
    input, layers, shortcut = case
    every = [*layers, *([] if shortcut is None else [shortcut])]
    flat = [x for layer in every for x in layer.parameters]
    running = [] if training else [x for layer in every for x in layer[4:6]]
    convolutions = [
        n for layer in every for n in (*layer.stride, *layer.padding, *layer.dilation, layer.groups)
    ]
    arguments = (
        last(input).detach().requires_grad_(), [x for x in flat if x is not None],
        [x is not None for x in flat], running, convolutions, [1e-5] * len(every),
        shortcut is not None, training, False, True,
    )  # fmt: skip
    torch.library.opcheck(ops.residual_block.default, arguments)


@by_convolution
def test_opcheck_of_the_stages(name):
    block = CONVOLUTIONS[name]
    conv, c = block.layers[0], block.image[1]
    x, weight = last(torch.randn(block.image)), weight_of(block, torch.float32)
    of_input, of_output = (lambda: vector(c, x.dtype)), (lambda: vector(conv.outputs, x.dtype))
    how = *geometry(conv), False, True
    y = last(F.conv2d(x, weight, None, *conv.settings()))
    signs = packed(torch.rand(y.shape) < 0.5)
    calls = {
        "convolution": [
            (x, of_input(), of_input(), last(weight), of_output(), None, *how[:4], True, *how[4:]),
            (x, None, None, weight, None, of_output(), *how[:4], False, *how[4:]),
        ],
        "finalize": [
            (of_input(), of_input().abs(), 9, of_input(), None, of_input(), of_input().abs(), 0.1,
             1e-5)
        ],
        "output": [
            (y, of_output(), of_output(), y, of_output(), of_output(), True),
            (y, of_output(), of_output(), y, None, None, False),
        ],
        "folded": [(x, weight, None, of_output(), of_output(), y, *how[:4], True, *how[4:])],
        "reduce": [
            (y, signs, y, of_output(), of_output(), None, None, None),
            (y, signs, y, of_output(), of_output(), y, of_output(), of_output()),
        ],
        "coefficients": [(of_output(), of_output(), 9, None, of_output(), True)],
        "gradient": [
            (y, signs, y, of_output(), torch.randn(3, conv.outputs), x, *before, w, *how[:4], skip,
             None, *how[4:], *wanted)
            for before, w, skip, wanted in (
                ([of_input() for _ in range(4)], weight, None, (True, True)),
                ((None,) * 4, last(weight), x, (True, False)),
                ((None,) * 4, weight, None, (False, True)),
            )
        ],
    }  # fmt: skip
    for stage, arguments in calls.items():
        op = getattr(ops, f"residual_block_{stage}").default
        for each in arguments:
            torch.library.opcheck(op, each, test_utils=EAGER)


@by_training
@pytest.mark.parametrize("layout", [same_memory, last])
def test_compile(layout, training, own):
    """One graph without a break, one compilation for every batch and image."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(residual_block, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for batch, size in ((7, 9), (8, 10), (5, 14)):
        block = Block(
            (batch, 4, size, size + 3), (Conv(6, stride=(2, 2)), Conv(6)), point(6, (2, 2)), True
        )
        case = changed(draw(block, torch.float32, training), layout)
        upstream = upstream_of(case, training)
        results = [evaluate(f, case, upstream, training) for f in (compiled, residual_block)]
        for name in results[0]:
            a, b = (r[name] for r in results)
            torch.testing.assert_close(a, b, msg=name)
            assert a.stride() == b.stride() or name == "grad input"
        graphs = graphs or list(counter.graphs)
        assert len(counter.graphs) == len(graphs), "compiled again for another size"
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(ops.residual_block) + targets.count(ops.residual_block.default) == 1


class Module(torch.nn.Module):
    """A block whose tensors are parameters and buffers."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        for at, layer in enumerate((*case[1], *([] if case[2] is None else [case[2]]))):
            for name in ("weight", "bias", *NORM):
                if (x := getattr(layer, name)) is not None:
                    x = x.detach()
                    value = torch.nn.Parameter(x) if "running" not in name else x
                    register = self.register_buffer if "running" in name else setattr
                    args = (f"{name}_{at}", value)
                    register(self, *args) if register is setattr else register(*args)

    def forward(self, input):
        def of(at, layer):
            return layer._replace(
                **{n: getattr(self, f"{n}_{at}", None) for n in ("weight", "bias", *NORM)}
            )

        layers = [of(at, layer) for at, layer in enumerate(self.case[1])]
        shortcut = self.case[2] and of(len(layers), self.case[2])
        return residual_block(input, layers, shortcut, training=self.training)


@pytest.mark.parametrize("training", [True, False])
def test_export(training, own):
    case = draw(BLOCKS["projection"], torch.float32)
    module = Module(case).train(training)
    batch = torch.export.Dim("batch")
    x = case[0]
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(ops.residual_block.default) == 1
    torch.testing.assert_close(program.module()(x[:3]), module(x[:3]))


def test_vmap_jvp_and_grad_of_functorch_are_torchs(own):
    case = draw(BLOCKS["projection_with_tails"], torch.float32, False)
    input, *rest = case
    images = torch.stack([input, 2 * input])
    with dlkernels.config.recording() as choices:
        batched = torch.func.vmap(lambda x: residual_block(x, *rest))(images)
    assert "functorch" in choices[-1].reason or all(c.kernel != "cpu" for c in choices)
    looped = torch.stack([residual_block(x, *rest) for x in images])
    torch.testing.assert_close(batched, looped, rtol=1e-4, atol=1e-4)
    tangent = torch.randn_like(input)
    for function in (residual_block, stock):
        _, forward = torch.func.jvp(lambda x: function(x, *rest).sum(), (input,), (tangent,))  # noqa: B023
        gradient = torch.func.grad(lambda x: function(x, *rest).sum())(input)  # noqa: B023
        torch.testing.assert_close(forward, (gradient * tangent).sum(), rtol=1e-3, atol=1e-3)


def test_checkpoint(own):
    case, leaves, _ = copied(draw(BLOCKS["projection"], torch.float32))
    leaves = list(leaves.values())

    def block(*leaves):
        return residual_block(*replaced(case, leaves), training=True)

    def checkpointed(*leaves):
        return torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=False)

    ours, wanted = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (checkpointed, block))
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------- refusals and choices


def refusals():
    """Changes of a good case that torch's parts refuse: input, layer 0, shortcut."""
    return {
        "channels": ({"input": lambda x: x[:, :3]}, {}),
        "no_batch": ({"input": lambda x: x[0, 0]}, {}),
        "weight_dtype": ({"weight": lambda x: x.double()}, {}),
        "bias_size": ({"bias": lambda x: x[:3]}, {}),
        "norm_size": ({"norm_weight": lambda x: x[:3]}, {}),
        "running_size": ({"running_mean": lambda x: x[:3]}, {}),
        "kernel_beyond_the_image": ({"input": lambda x: x[..., :1, :1], "weight": torch.clone}, {}),
        "stride_0": ({}, {"stride": (0, 1)}),
        "negative_padding": ({}, {"padding": (-1, 1)}),
        "groups": ({}, {"groups": 5}),
    }


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals())
def test_refusals_are_the_parts(case, kernels):
    """In torch's words, under "own" of the part that refuses."""
    dlkernels.config.kernels = kernels
    change, settings = refusals()[case]
    block = Block((2, 5, 6, 7), (Conv(5, padding=(0, 0)), Conv(5, padding=(2, 2))), bias=True)
    input, (first, second), _ = draw(block, torch.float32)
    fields = {n: f(getattr(first, n)) for n, f in change.items() if n != "input"}
    layers = [first._replace(**fields, **settings), second]
    input = change.get("input", torch.clone)(input)
    with pytest.raises(Exception) as wanted:  # noqa: B017  whatever it is, ours is the same
        stock(input, layers, None, training=True)
    with pytest.raises(wanted.type) as got:
        residual_block(input, layers, None, training=True)
    assert str(got.value).splitlines()[0] == str(wanted.value).splitlines()[0]


def test_one_value_per_channel(own):
    input, layers, _ = draw(Block((4, 5, 1, 1), (point(5), point(5))), torch.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        residual_block(input[:1], layers, training=True)
    assert residual_block(input[:1], layers).shape == (1, 5, 1, 1)


def test_what_only_parts_take():
    """Broadcast shortcuts, empty batches, half of the running statistics: the result of parts."""
    input, layers, _ = draw(BLOCKS["three_channels"], torch.float32, False)
    narrow = layers[0]._replace(weight=layers[0].weight[:, :1])
    no_running = layers[0]._replace(running_mean=None, running_var=None)
    cases = {
        "a shortcut of shape": (input[:, :1], [narrow, layers[1]]),
        "layers with running statistics and without": (input, [no_running, layers[1]]),
        "input of shape": (input[:0], layers),
    }
    dlkernels.config.kernels = "own"
    for reason, case in cases.items():
        with dlkernels.config.recording() as choices:
            ours = residual_block(*case)
        ((kernel, said),) = [c[1:] for c in choices if c.op == "residual_block"]
        assert kernel == "parts" and said.startswith(reason)
        torch.testing.assert_close(ours, stock(*case))


def bad_calls():
    """stage → [(argument's place, bad value, message)], of good arguments."""
    c, k = 4, 6
    x, y = last(torch.randn(2, c, 5, 6)), last(torch.randn(2, k, 5, 6))
    weight, vc, vk = torch.randn(k, c, 3, 3), torch.randn(c), torch.randn(k)
    signs = torch.zeros(2, 5, 6, 1, dtype=torch.uint8)
    how = ONE, ONE, ONE, 1
    return {
        "convolution": (
            (x, vc, vc, weight, vk, vk, *how, True, False, True),
            [
                (0, x[0], "input with 4 dimensions"),
                (0, x[:0], "input with 4 dimensions that is not empty"),
                (0, x.int(), "input of dtype"),
                (1, None, "scale and shift, or neither"),
                (1, vk, "scale of shape"),
                (2, vc.double(), "shift of dtype"),
                (3, weight[0], "weight with 4 dimensions"),
                (3, weight.double(), "weight of dtype"),
                (3, weight[:, :3], "input with 3 channels"),
                (5, vc, "about of shape"),
                (6, [1], "pairs of stride"),
                (6, [0, 1], "stride and dilation of at least 1"),
                (7, [-1, 1], "padding of at least 0"),
                (8, [9, 1], "a larger input"),
                (9, 3, "3 groups"),
            ],
        ),
        "finalize": (
            (vc, vc.abs(), 8, vc, vc, vc.clone(), vc.clone(), 0.1, 1e-5),
            [
                (0, x, "mean with 1 dimension"),
                (1, vk, "var of shape"),
                (3, vk, "weight of shape"),
                (5, vk, "running_mean of shape"),
                (6, vc.int(), "running_var of dtype"),
            ],
        ),
        "output": (
            (y, vk, vk, y, vk, vk, True),
            [
                (1, vc, "scale of shape"),
                (3, x, "residual of shape"),
                (3, y.double(), "residual of dtype"),
                (4, None, "residual_scale and residual_shift, or neither"),
                (5, vk.repeat_interleave(2)[::2], "residual_shift"),
            ],
        ),
        "folded": (
            (x, weight, None, vk, vk, y, *how, True, False, True),
            [
                (2, vk, "prepared"),
                (3, vc, "scale of shape"),
                (4, vk.double(), "shift of dtype"),
                (5, x, "residual of shape"),
                (5, y.half(), "residual of dtype"),
            ],
        ),
        "reduce": (
            (y, signs, y, vk, vk, y, vk, vk),
            [
                (0, x, "grad_output of shape"),
                (1, signs[..., :0], "signs of shape"),
                (1, signs.int(), "signs of dtype"),
                (3, vc, "mean of shape"),
                (5, x, "residual of shape"),
                (6, None, "residual_mean and residual_rstd"),
            ],
        ),
        "coefficients": (
            (vk, vk, 9, vk, vk, True),
            [(0, x, "sum with 1 dimension"), (1, vc, "product of shape"), (4, vc, "rstd of shape")],
        ),
        "gradient": (
            (y, signs, y, vk, torch.randn(3, k), x, vc, vc, vc, vc, weight, *how, None, None, False,
             True, True, True),
            [
                (0, x, "grad of shape"),
                (1, signs[:1], "signs of shape"),
                (2, y.double(), "output of dtype"),
                (3, vc, "output_mean of shape"),
                (4, torch.randn(2, k), "coefficients of shape"),
                (5, x[..., :5], "output of shape"),
                (6, None, "scale, shift, mean and rstd, or none"),
                (15, x, "no skip behind a layer"),
                (16, signs, "a skip with skip_signs"),
            ],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("stage", bad_calls())
def test_refusals_of_raw_ops(stage):
    """No path into a kernel is unchecked, and nothing is written before."""
    good, bad = bad_calls()[stage]
    op = getattr(ops, f"residual_block_{stage}")
    op(*good)
    for at, value, message in bad:
        with pytest.raises(RuntimeError, match=f"residual_block: expected .*{message}"):
            op(*good[:at], value, *good[at + 1 :])


def chosen(kernels, case, **keywords):
    dlkernels.config.kernels = kernels
    with dlkernels.config.recording() as choices:
        residual_block(*case, **keywords)
    return [(c.kernel, c.reason) for c in choices if c.op == "residual_block"]


def test_choice():
    case, *_ = copied(draw(BLOCKS["projection"], torch.float32), graded=False)
    ours = dlkernels.config.owner("cpu")
    for training in (True, False):
        told = "covered: conv1 {}, conv2 winograd, shortcut {}"
        own, auto = told.format("winograd", "direct"), told.format("winograd", "aten")
        if training:  # 16 channels are too few in the weight's gradient
            auto = told.format("winograd/aten", "aten")
        assert chosen("own", case, training=training) == [(ours, own)]
        assert chosen("auto", case, training=training) == [(ours, auto)]
        ((kernel, reason),) = chosen("stock", case, training=training)
        assert kernel == "parts" and reason == "dlkernels.config.kernels is 'stock'"
    tiny, *_ = copied(draw(BLOCKS["few_values"], torch.float32), graded=False)
    assert chosen("auto", tiny) == [("parts", "too small for our call overhead")]
    ((kernel, reason),) = chosen("own", tiny)
    assert kernel == ours and reason.startswith("covered: conv1 ")
    wide = changed(case, lambda x: x.to(torch.complex64), lambda x: x.to(torch.complex64))
    dlkernels.config.kernels = "auto"
    with dlkernels.config.recording() as choices, pytest.raises((RuntimeError, TypeError)):
        residual_block(*wide, training=True)
    assert ("parts", "no kernel for torch.complex64") in [c[1:] for c in choices]


def test_stock_is_torchs_and_auto_is_right():
    case = draw(BLOCKS["projection"], torch.float32)
    upstream = upstream_of(case, True)
    dlkernels.config.kernels = "stock"
    for a, b in zip(
        values(residual_block, case, upstream), values(stock, case, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    dlkernels.config.kernels = "auto"
    check(lambda: draw(BLOCKS["projection"], torch.float32), rounds=True)


def test_exact_is_as_exact_as_stock(own):
    """2 × its error, where Winograd would have 4."""
    dlkernels.config.winograd = "off"
    for name in ("tiles_left_over", "one_layer"):
        check(lambda: draw(BLOCKS[name], torch.float32))  # noqa: B023


# ------------------------------------------------------------------------- threads and processes


@by_training
@pytest.mark.parametrize(
    "name", ["tiles_left_over", "channels_with_tails", "sums_by_panels", "stride_2", "bottleneck"]
)
def test_the_same_bits_for_any_number_of_threads(name, training, own):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if dtype == torch.float32 or name != "sums_by_panels":
            case = draw(BLOCKS[name], dtype, training)
            upstream = torch.randn(stock(*copied(case, graded=False)[0], training=training).shape)
            assert_same_for_any_number_of_threads(values, residual_block, case, upstream, training)


def test_the_same_bits_of_many_tiles(own):
    case = draw(BLOCKS["many_tiles"], torch.float32)
    upstream = torch.randn(case[0].shape)
    assert_same_for_any_number_of_threads(values, residual_block, case, upstream)


def test_four_threads_at_once(own):
    def case(channels):
        made = draw(basic((3, channels, 12, 12)), torch.float32)
        return residual_block, made, torch.randn(made[0].shape)

    assert_same_in_threads_at_once(values, [case(16 * (i + 1)) for i in range(4)])


def test_in_a_forked_child(own):
    case = draw(BLOCKS["projection"], torch.float32)
    upstream = torch.randn(stock(*copied(case, graded=False)[0], training=True).shape)
    assert_same_in_a_forked_child(values, residual_block, case, upstream)


SYNC = """
import test_residual_block as of

def synchronised(*case, training):
    return of.residual_block(*case, training=training, process_group=dist.group.WORLD)

# Batches of 2 and 3 images, of our kernels and of their parts.
for kernels in ("own", "stock"):
    dlkernels.config.kernels = kernels
    for name in ("projection", "stride_2", "bottleneck", "identity"):
        torch.manual_seed(0)
        block = of.BLOCKS[name]
        block = block._replace(image=(5, *block.image[1:]))
        case = of.draw(block, torch.float64)
        upstream = of.upstream_of(case, True)
        part = slice(2) if rank == 0 else slice(2, None)
        one = of.evaluate(of.residual_block, case, upstream)
        two = of.evaluate(synchronised, (case[0][part], *case[1:]), upstream[part])
        for key, value in two.items():
            wanted = one[key]
            if key in ("output", "grad input"):
                wanted = wanted[part]
            elif key.startswith("grad"):
                dist.all_reduce(value)
            torch.testing.assert_close(value, wanted, msg=lambda m: f"{name} {key}: {m}")
        print("equal")
case, leaves, _ = of.copied(case)
dlkernels.config.kernels = "own"
output = synchronised(*case, training=True)
try:
    torch.autograd.grad(output.sum(), leaves["input"], create_graph=True)
except NotImplementedError as error:
    assert "double backward" in str(error)
    print("refused")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one_on_the_whole_batch(tmp_path):
    for printed in processes.run(SYNC, tmp_path):
        assert printed == ["equal"] * 8 + ["refused"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (3, 64, 9, 33), (1, 70, 1, 2), (2, 9, 3, 1)], ids=str
)
def test_layout_copies(shape, dtype, poisoned):
    x = torch.randn(shape).to(dtype)
    for image, is_last in (
        (x.contiguous(memory_format=LAST), False),
        (x, True),
        (sliced_rows(x), True),
        (x[:1].expand_as(x), True),
        (every_second(x), False),
    ):
        copy_of = ops.residual_block_layout(image, is_last)
        assert torch.equal(copy_of, image)
        memory_format = LAST if is_last else torch.contiguous_format
        assert copy_of.is_contiguous(memory_format=memory_format)
        checks = ("test_schema", "test_faketensor")  # the others clone the image, to be contiguous
        torch.library.opcheck(ops.residual_block_layout, (image, is_last), test_utils=checks)
    with pytest.raises(RuntimeError, match="in another memory format"):
        ops.residual_block_layout(x, False)


# ----------------------------------------------------------- a convolution and its batch norm alone


def chain(relu=True, dtype=torch.float32, channels=(16, 24), **settings):
    """A Sequential of torch's with statistics of its own, in eval mode and channels_last."""
    settings = {"kernel_size": 3, "padding": 1, **settings}
    norm = torch.nn.BatchNorm2d(channels[1])
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(norm.bias)
    torch.nn.init.normal_(norm.running_mean)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    modules = [torch.nn.Conv2d(*channels, **settings), norm, *[torch.nn.ReLU()] * relu]
    model = torch.nn.Sequential(*modules, torch.nn.Flatten()).eval()
    if dtype in (torch.bfloat16, torch.float16):
        model[0].to(dtype)
    return model.double() if dtype is torch.float64 else model


def kernels_of(model, x):
    with dlkernels.config.recording() as choices:
        model(x)
    return [(choice.op, choice.reason) for choice in choices]


def is_folded(model, x):
    ((op, reason),) = kernels_of(model, x)
    return op == "residual_block" and reason.startswith("folded into the convolution: conv1 ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"relu": False, "bias": False},
        {"stride": 2, "groups": 4},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": (3, 5), "padding": (2, 1), "dilation": (1, 2)},
        {"channels": (64, 80)},
    ],
    ids=str,
)
def test_a_convolution_and_its_batch_norm_are_one_in_inference(own, poisoned, settings, dtype):
    stock = chain(dtype=dtype, **settings)
    ours = dlkernels.swap(copy.deepcopy(stock))
    x = torch.randn(3, stock[0].in_channels, 11, 12).to(dtype).contiguous(memory_format=LAST)
    with torch.no_grad():
        assert is_folded(ours, x)
        exact = copy.deepcopy(stock).double()(x.double())
        assert_no_worse("output", ours(x), stock(x), exact, factor=4.0)
        assert [line.kernel for line in dlkernels.explain(ours, x)][1:3] == ["fused", "fused"]
        torch.testing.assert_close(ours[:-1](x).stride(), stock[:-1](x).stride())
        dlkernels.freeze(ours)
        torch.testing.assert_close(ours(x), stock(x), atol=0.05, rtol=0.05)
    assert type(dlkernels.unswap(ours)) is torch.nn.Sequential


def test_elsewhere_they_are_two(own):
    """Where a gradient is needed, in training, compiled, of contiguous images, with a hook."""
    stock = chain()
    ours = dlkernels.swap(copy.deepcopy(stock))
    x = torch.randn(3, 16, 11, 12)
    ops_of = {"conv2d", "batch_norm"}
    with torch.no_grad():
        assert {op for op, _ in kernels_of(ours, x)} == ops_of
        torch.testing.assert_close(ours(x), stock(x))
    x = x.contiguous(memory_format=LAST)
    assert {op for op, _ in kernels_of(ours, x)} == ops_of
    results = [
        (y := model(x), *torch.autograd.grad(y.square().sum(), [*model.parameters()]))
        for model in (ours, stock)
    ]
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), stock(x))
        assert is_folded(ours, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert is_folded(ours, x)
            assert ours(x).dtype is torch.bfloat16
            torch.testing.assert_close(ours(x), stock(x).to(torch.bfloat16), atol=0.1, rtol=0.1)
        seen = []
        hook = ours[0].register_forward_hook(lambda m, args, y: seen.append(y))
        torch.testing.assert_close(ours(x), stock(x))
        torch.testing.assert_close(seen, [stock[0](x)])
        hook.remove()
        ours.train(), stock.train()
        torch.testing.assert_close(ours(x), stock(x))
        torch.testing.assert_close(ours.state_dict(), stock.state_dict())


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 9, 9), (2, 16, 9), (2, 16, 9, 9, 9)], ids=str)
def test_other_images_are_refused_as_by_stock(own, shape):
    stock = chain(channels=(16, 16))
    ours = dlkernels.swap(copy.deepcopy(stock))
    for x in (torch.randn(shape), torch.randn(shape).requires_grad_(), "image"):
        errors = []
        for model in (stock, ours):
            with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
                model(x)
            errors.append((type(caught.value), str(caught.value).splitlines()[0]))
        assert errors[0] == errors[1]


def test_a_frozen_chain_under_autocast_reads_nothing_that_was_kept(own):
    ours = dlkernels.swap(chain(channels=(64, 64)))
    x = torch.randn(4, 64, 12, 12).contiguous(memory_format=LAST)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            wanted = ours(x.to(dtype))
            dlkernels.freeze(ours)
            ours[0]._kept.value.fill_(float("nan"))
            assert torch.equal(ours(x.to(dtype)), wanted)
            dlkernels.unfreeze(ours)


def test_a_chain_is_traced():
    ours = dlkernels.swap(chain(channels=(64, 64)))
    x = torch.randn(8, 64, 12, 12).contiguous(memory_format=LAST)
    with torch.no_grad():
        assert is_folded(ours, x)
        wanted = ours(x)
        torch.testing.assert_close(torch.jit.trace(ours, x)(x), wanted, atol=1e-4, rtol=1e-4)


def test_dtypes_of_batch_norms_are_mixed_as_torch_mixes_them(own):
    """In a block, and in a chain in every mode."""
    mixed = {"double": lambda m: m[0].double(), "bfloat16": lambda m: m[1].bfloat16()}
    for name, change in mixed.items():
        stock = chain()
        change(stock)
        if name == "bfloat16":
            stock[0].bfloat16()
            stock[1].weight.data = stock[1].weight.data.float()
        x = torch.randn(2, 16, 8, 8).to(stock[0].weight.dtype).contiguous(memory_format=LAST)
        ours = dlkernels.swap(copy.deepcopy(stock))
        for model in (stock, ours):
            with (
                torch.no_grad(),
                pytest.raises(RuntimeError, match="mixed dtype|Expected|expected"),
            ):
                model(x)


def test_a_block_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="expected one layer or more"):
        residual_block(torch.randn(2, 4, 8, 8), [])


def test_what_does_not_fold_is_no_chain():
    for change in (
        lambda m: setattr(m[0], "padding_mode", "circular"),
        lambda m: setattr(m, "1", torch.nn.BatchNorm2d(24, track_running_stats=False).eval()),
        lambda m: setattr(m, "1", torch.nn.GroupNorm(2, 24)),
        lambda m: setattr(m, "1", torch.nn.Identity()),
    ):
        model = chain(relu=False)
        change(model)
        assert type(dlkernels.swap(model)) is torch.nn.Sequential
    assert type(dlkernels.swap(chain(relu=False), ops=["batch_norm"])) is torch.nn.Sequential
    assert type(dlkernels.swap(chain(relu=False).train())) is dlkernels.nn.Sequential

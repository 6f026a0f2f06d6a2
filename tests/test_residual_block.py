"""residual_block against torch's parts, and its stages each by itself: forward, gradients, running
statistics, layouts, refusals, threads, processes.

Where Winograd's algorithm may run, in float32 with 3×3 weights of stride 1, the rule of
tests/compare.py is 4 × stock's error, 5 × in the gradients of weights, and 6 × in those of a norm's
parameters, which are sums over what the algorithm has rounded.
"""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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

ROOT = Path(__file__).parent.parent
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
    "odd_kernels": Block((3, 6, 8, 9), (Conv(6, (1, 3), padding=(0, 1)), Conv(6, (5, 5), (1, 1), (2, 2)))),
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


@pytest.mark.parametrize(("name", "dtype", "training"), cases(False))
def test_inference(name, dtype, training, own, poisoned):
    """Norms folded into their convolutions."""
    block = BLOCKS[name]
    with torch.no_grad():
        check(
            lambda: draw(block, dtype, training), training, False, rounds(block, dtype),
            NUMBERS.get(name, 300),
        )  # fmt: skip

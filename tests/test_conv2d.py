"""conv2d and conv_transpose2d against torch's own: forward, gradients, activations, layouts,
refusals, threads.

Where a faster algorithm than a sum of products may run, in float32 with 3×3 weights of stride 1,
the rule of tests/compare.py is 4 × stock's error, 5 × in the gradient of the weight.
"""

import copy
import itertools
from typing import NamedTuple

import pytest
import torch
from compare import assert_no_worse
from graphs import check_second_backward
from hypothesis import assume, given
from hypothesis import settings as drawing
from hypothesis import strategies as st
from layouts import (
    channels_last,
    every_second,
    expanded,
    offset,
    same_memory,
    sliced_columns,
    sliced_rows,
)
from memory import assert_nothing_is_kept
from products import ACTIVATIONS, DTYPES, evaluate, with_an_infinite_weight
from threads import (
    assert_same_for_any_number_of_threads,
    assert_same_in_a_forked_child,
    assert_same_in_threads_at_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
from dlkernels.functional import conv2d, conv_transpose2d
from dlkernels.ops.conv2d import conv2d_reference

ops = torch.ops.dlkernels
pytestmark = pytest.mark.usefixtures("one_thread")
KINKED = ("relu", "leaky_relu")


class Shape(NamedTuple):
    """Of the convolution; conv_transpose2d goes from its output to its input."""

    image: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    def settings(self):
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def weight(self):
        return self.outputs, self.image[1] // self.groups, *self.kernel

    def may_round(self, dtype):
        """Whether an algorithm may run that rounds more than a sum of products."""
        return (
            dtype == torch.float32
            and self.kernel == (3, 3)
            and self.stride in (1, (1, 1))
            and self.dilation in (1, (1, 1))
            and self.groups == 1
        )


THREE, ONE = (3, 3), (1, 1)

# On each side of what the kernels switch on: 12 or 6 pixels and 16, 8 or 4 channels in registers,
# output tiles of 4×4, 16 or 32 tiles in a block; few channels up to 8, with strips of images in the
# lanes of a vector.
SHAPES = {
    "one_number": Shape((1, 1, 1, 1), 1, ONE),
    "one_row": Shape((2, 3, 1, 9), 5, (1, 3), padding=(0, 1)),
    "one_column": Shape((2, 3, 9, 1), 5, (3, 1), padding=(1, 0)),
    "one_channel_in": Shape((2, 1, 9, 8), 6, (5, 5)),
    "one_channel_out": Shape((2, 6, 9, 8), 1, THREE, padding=1),
    "kernel_larger_than_a_side": Shape((2, 3, 2, 9), 4, THREE, padding=1),
    "kernel_of_the_image": Shape((3, 5, 4, 6), 7, (4, 6)),
    "padding_beyond_the_kernel": Shape((2, 3, 4, 5), 4, THREE, padding=4),
    "one_tile": Shape((1, 16, 4, 4), 16, THREE, padding=1),
    "tiles_with_tails": Shape((2, 17, 9, 7), 18, THREE, padding=1),
    "tiles_less_one": Shape((1, 15, 7, 11), 31, THREE, padding=1),
    "no_padding": Shape((2, 8, 10, 13), 16, THREE),
    "33_tiles": Shape((1, 5, 12, 44), 9, THREE, padding=1),
    "tails_of_pixels": Shape((1, 19, 5, 5), 33, (2, 2)),
    "12_pixels": Shape((1, 16, 3, 4), 32, ONE),
    "13_pixels": Shape((1, 17, 1, 13), 33, ONE),
    "one_by_one": Shape((3, 20, 6, 7), 21, ONE),
    "one_by_one_stride_2": Shape((3, 20, 7, 6), 21, ONE, stride=2),
    "five_by_five": Shape((2, 6, 9, 9), 16, (5, 5), padding=2),
    "five_by_five_of_10": Shape((2, 10, 9, 9), 17, (5, 5), padding=2),
    "padding_beyond_of_9": Shape((2, 9, 4, 5), 4, THREE, padding=4),
    "17_images": Shape((17, 2, 6, 7), 5, (3, 2), padding=(0, 1)),
    "wide_rows": Shape((1, 2, 5, 270), 7, (3, 1), padding=(1, 0)),
    "stem": Shape((2, 3, 11, 13), 20, (7, 7), stride=2, padding=3),
    "3_to_64": Shape((2, 3, 8, 9), 64, THREE, padding=1),
    "stride_2": Shape((2, 9, 9, 12), 10, THREE, stride=2, padding=1),
    "stride_3": Shape((2, 5, 11, 10), 6, (2, 2), stride=3),
    "stride_differs": Shape((2, 5, 11, 10), 6, THREE, stride=(2, 1), padding=(0, 1)),
    "stride_beyond_the_kernel": Shape((2, 4, 9, 9), 5, ONE, stride=(3, 4)),
    "dilation": Shape((2, 5, 9, 10), 6, THREE, padding=2, dilation=2),
    "dilation_and_stride": Shape((2, 5, 12, 9), 6, (3, 2), 2, (1, 2), (2, 3)),
    "groups": Shape((2, 12, 7, 8), 18, THREE, padding=1, groups=3),
    "groups_of_17": Shape((1, 34, 5, 6), 34, THREE, padding=1, groups=2),
    "depthwise": Shape((2, 19, 8, 7), 19, THREE, padding=1, groups=19),
    "depthwise_stride_2": Shape((2, 16, 8, 9), 16, (5, 5), 2, 2, groups=16),
    # A whole strip, one that overlaps it, and half a one, of 1 block of channels and of 2.
    "depthwise_wide": Shape((1, 21, 4, 23), 21, THREE, padding=1, groups=21),
    "depthwise_of_two_blocks": Shape((1, 275, 3, 6), 275, THREE, padding=1, groups=275),
    "depthwise_seven": Shape((1, 17, 8, 15), 17, (7, 7), padding=3, groups=17),
    "depthwise_stride_2_wide": Shape((1, 18, 6, 29), 18, THREE, 2, 1, groups=18),
    "depthwise_dilation": Shape((2, 9, 9, 17), 9, THREE, 1, 2, 2, groups=9),
    "depthwise_multiplied": Shape((2, 7, 8, 7), 21, THREE, padding=1, groups=7),
}

# Images of up to 16 pixels with an algorithm of their own: of 8 and more, of 16 channels and more.
SMALL = {
    "8_images_of_a_pixel": Shape((8, 17, 1, 1), 33, THREE, padding=1),
    "two_by_two": Shape((25, 33, 2, 2), 40, THREE, padding=1),
    "260_channels": Shape((9, 260, 2, 3), 18, THREE, padding=1),
    "to_260_channels": Shape((9, 18, 3, 2), 260, THREE, padding=1),
    "600_images": Shape((600, 16, 2, 2), 17, THREE, padding=1),
    "5x5_on_3x3": Shape((13, 20, 3, 3), 17, (5, 5), padding=2),
    "stride_2_to_2x2": Shape((12, 16, 4, 4), 35, THREE, stride=2, padding=1),
    "shortcut_to_2x2": Shape((14, 18, 4, 4), 20, ONE, stride=2),
    "1x2_and_stride_3": Shape((8, 16, 3, 5), 16, (1, 2), stride=(1, 3)),
    "dilation_beyond_a_row": Shape((10, 16, 2, 4), 16, THREE, padding=3, dilation=3),
    "13x13": Shape((8, 16, 2, 2), 16, (13, 13), padding=6),
}


@pytest.fixture
def precision():
    """Puts torch's precision of convolutions back."""
    before = torch.backends.mkldnn.conv.fp32_precision
    yield torch.backends.mkldnn.conv
    torch.backends.mkldnn.conv.fp32_precision = before


def of_more_channels(x):
    """Some channels of an image of more, in NHWC."""
    return channels_last(torch.cat([x, x], 1))[:, : x.shape[1]]


def swapped_channels(x):
    """Dimensions 0 and 1 have changed places in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


# id: layout of the input, of the weight.
LAYOUTS = {
    "channels_last": (channels_last, same_memory),
    "weight_channels_last": (same_memory, channels_last),
    "both_channels_last": (channels_last, channels_last),
    "input_of_more_channels": (of_more_channels, same_memory),
    "input_sliced_batch": (sliced_rows, same_memory),
    "input_sliced_columns": (sliced_columns, same_memory),
    "input_every_second": (every_second, channels_last),
    "input_expanded": (expanded, same_memory),
    "input_offset": (offset, same_memory),
    "input_swapped": (swapped_channels, same_memory),
    "weight_every_second": (same_memory, every_second),
    "weight_expanded": (channels_last, expanded),
    "weight_offset": (same_memory, offset),
    "weight_swapped": (same_memory, swapped_channels),
}


def problem(shape, dtype, bias=True, transposed=False):
    """(input, weight, bias), as a layer at its start has them."""
    weight = torch.randn(shape.weight())
    weight /= weight[0].numel() ** 0.5
    image, outputs = torch.randn(shape.image), shape.outputs
    if transposed:
        size = F.conv2d(image, weight, **shape.settings()).shape
        image, outputs = torch.randn(size), shape.image[1]
    draws = [image, weight, torch.randn(outputs) if bias else None]
    return [x if x is None else x.to(dtype) for x in draws]


def stock(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation=None):
    settings = stride, padding, dilation, groups
    return conv2d_reference(x, weight, bias, *settings, activation or "none")


def upstream_of(function, tensors, activation=None, **settings):
    """A gradient of the output; 0 where the sign before a kinked activation is a matter of
    rounding."""
    exact = function(*(x if x is None else x.detach().double() for x in tensors), **settings)
    upstream = torch.randn(exact.shape, dtype=torch.float64)
    if activation in KINKED and exact.numel():
        room = 32 * torch.finfo(tensors[0].dtype).eps * exact.abs().max()
        upstream[exact.abs() < room] = 0
    return upstream


def check(draw, pair=(conv2d, stock), rounds=False, numbers=1500, factor=2.0, **settings):
    """``pair``: ours and stock's; ``draw()`` gives (input, weight, bias).

    Errors are pooled over so many numbers of the smallest result (in at most 24 draws): of few,
    stock gets some by luck.
    """
    results, drawn = [], 0
    activation = settings.get("activation")
    plain = {name: value for name, value in settings.items() if name != "activation"}
    while drawn < numbers and len(results) < 3 * 24:
        tensors = draw()
        upstream = upstream_of(pair[1], tensors, activation, **plain)
        for function, dtype in ((pair[0], None), (pair[1], None), (pair[1], torch.float64)):
            results.append(evaluate(function, tensors, upstream, dtype, **settings))
        drawn += min(result.numel() for result in results[-1])
    names = ("output", "grad input", "grad weight", "grad bias")[: len(results[0])]
    for i, name in enumerate(names):
        room = factor * (1 if not rounds else 2.5 if name == "grad weight" else 2)
        assert_no_worse(name, *([result[i] for result in results[j::3]] for j in range(3)), room)
    ours, stocks = results[-3:-1]
    assert ours[0].stride() == stocks[0].stride(), "another format than stock's"
    for leaf, gradient in zip(tensors, ours[1:], strict=False):
        if leaf.dim() == 4:
            assert gradient.is_contiguous(memory_format=suggest_memory_format(leaf))
    return tensors, ours


# ------------------------------------------------------------------------------ against stock


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@by_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, bias, own, poisoned):
    shape = SHAPES[name]
    rounds = shape.may_round(dtype)
    check(lambda: problem(shape, dtype, bias), rounds=rounds, **shape.settings())


TRANSPOSED = (conv_transpose2d, F.conv_transpose2d)


@by_dtype
@pytest.mark.parametrize("name", SMALL)
def test_small_images(name, dtype, own, poisoned):
    """By sums of products alone: 2 × stock's error, also of 3×3."""
    shape = SMALL[name]
    stride, padding, dilation = (
        [n, n] if isinstance(n, int) else list(n)
        for n in (shape.stride, shape.padding, shape.dilation)
    )
    settings = stride, padding, dilation, 1, "none", False, True
    assert ops.conv2d_algorithm(*problem(shape, dtype), *settings) == "small, small, small"
    bias = name == "two_by_two"
    layouts = [
        LAYOUTS[at] for at in ("both_channels_last", "weight_swapped", "weight_every_second")
    ]
    for of_input, of_weight in ((same_memory, same_memory), *layouts):
        for transposed, pair in enumerate(((conv2d, stock), TRANSPOSED)):

            def draw(of_input=of_input, of_weight=of_weight, transposed=transposed):
                x, weight, b = problem(shape, dtype, bias, transposed)
                return of_input(x), of_weight(weight), b

            check(draw, pair, numbers=200 if bias else 1500, **shape.settings())


@by_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_transposed_shapes(name, dtype, own, poisoned):
    shape = SHAPES[name]
    bias = len(name) % 2 == 0

    def draw():
        return problem(shape, dtype, bias, transposed=True)

    check(draw, TRANSPOSED, shape.may_round(dtype), **shape.settings())


@pytest.mark.parametrize("stride", [20, 2**31 - 1, (1, 2**31 - 1)], ids=str)
def test_a_stride_beyond_the_image(stride, own, poisoned):
    """Takes no longer than a small one: of its phases most have no pixel."""
    for shape in (
        Shape((1, 9, 7, 6), 12, THREE, stride, padding=1),
        Shape((2, 4, 5, 5), 4, THREE, stride, 1, groups=4),
    ):
        check(lambda: problem(shape, torch.float32), **shape.settings())  # noqa: B023
    x, weight = torch.randn(2, 9, 1, 1), torch.randn(9, 8, 3, 3)  # one pixel: any stride is alike
    ours = conv_transpose2d(x, weight, stride=stride, padding=1)
    torch.testing.assert_close(ours, F.conv_transpose2d(x, weight, padding=1))


@by_dtype
@pytest.mark.parametrize("output_padding", [1, (0, 2)], ids=str)
def test_output_padding(output_padding, dtype, own, poisoned):
    shape = Shape((2, 6, 13, 11), 5, (4, 3), stride=3, padding=1)
    settings = shape.settings() | {"output_padding": output_padding}
    check(lambda: problem(shape, dtype, transposed=True), TRANSPOSED, **settings)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@by_dtype
@pytest.mark.parametrize("name", ["one_number", "3_to_64", "tiles_with_tails", "depthwise"])
def test_activations(name, dtype, activation, own, poisoned):
    shape = SHAPES[name]
    for bias, layout in ((True, same_memory), (False, channels_last)):

        def draw(bias=bias, layout=layout):
            x, *others = problem(shape, dtype, bias)
            return layout(x), *others

        rounds = shape.may_round(dtype)
        check(draw, rounds=rounds, activation=activation, **shape.settings())


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, own, poisoned):
    of_input, of_weight = LAYOUTS[layout]
    names = "tiles_with_tails", "groups", "one_by_one", "3_to_64", "17_images"
    shapes = [SHAPES[name] for name in names]
    for shape, (transposed, pair) in itertools.product(
        shapes, enumerate(((conv2d, stock), TRANSPOSED))
    ):

        def draw(shape=shape, transposed=transposed):
            x, weight, bias = problem(shape, dtype, transposed=transposed)
            return of_input(x), of_weight(weight), every_second(bias)

        check(draw, pair, shape.may_round(dtype), **shape.settings())


@by_dtype
def test_transposition_of_larger_images(dtype, own):
    """Whole tiles of what goes between NCHW and NHWC, and their tails; the numbers are exact."""
    sizes = (16, 16), (9, 15), (1, 67), (65, 4), (71, 61), (1, 2), (90, 3), (1, 3)
    for channels, size in zip((64, 130, 16, 3, 2, 129, 4, 4100), sizes, strict=True):
        x = torch.randn(2, channels, *size).to(dtype)
        weight = torch.ones(channels, 1, 1, 1, dtype=dtype)
        formats = same_memory, channels_last
        for of_input, of_weight in itertools.product(formats, formats):
            y = conv2d(of_input(x), of_weight(weight), groups=channels)
            assert torch.equal(y, x)


# Of Winograd's algorithm in every direction: what of an image goes between NCHW and tiles at once.
STRIPS = {
    "several_rows_of_tiles": Shape((3, 32, 17, 19), 16, THREE, padding=(2, 0)),
    "parts_of_a_row": Shape((2, 16, 6, 130), 32, THREE, padding=(1, 1)),
    "less_than_a_vector_of_channels": Shape((20, 65, 7, 5), 67, THREE, padding=(1, 1)),
    "images_of_a_tile": Shape((70, 64, 4, 3), 144, THREE, padding=(1, 1)),
    "windows_beyond_the_image": Shape((4, 16, 3, 9), 16, THREE, padding=(7, 7)),
    "many_tiles": Shape((4, 16, 64, 64), 16, THREE, padding=(1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STRIPS)
def test_either_layout_has_the_same_bits(name, dtype, own, poisoned):
    shape = STRIPS[name]
    x, weight, _ = problem(shape, dtype)
    assert algorithms(x, weight, padding=shape.padding) == ["winograd"] * 3
    upstream = torch.randn(stock(x, weight, **shape.settings()).shape).to(dtype)
    formats = same_memory, channels_last
    results = [
        evaluate(
            conv2d, (of_input(x), of_weight(weight), None), of_grad(upstream), **shape.settings()
        )
        for of_input, of_weight, of_grad in itertools.product(formats, repeat=3)
    ]
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@drawing(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    image=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 11), st.integers(1, 11)),
    outputs=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    of_weight=st.sampled_from([same_memory, channels_last, swapped_channels, every_second]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_drawn_shapes_and_strides(
    data, image, outputs, kernel, stride, padding, dilation, groups, dtype, activation, bias,
    of_weight, transposed, seed,
):  # fmt: skip
    dlkernels.config.kernels = "own"
    torch.manual_seed(seed)
    n, c, *size = image
    assume(all(s + 2 * p > d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel)))  # noqa: B905
    image = (n, c * groups, *size)
    shape = Shape(image, outputs * groups, kernel, stride, padding, dilation, groups)
    order = data.draw(st.permutations(range(4)))
    inverse = [order.index(d) for d in range(4)]
    step, dim = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    every = (slice(None),) * dim + (slice(None, None, step),)

    def draw():
        x, weight, b = problem(shape, dtype, bias, transposed)
        x = x.permute(order).contiguous().permute(inverse)
        return x.repeat_interleave(step, dim)[every], of_weight(weight), b

    keywords = shape.settings() | ({} if transposed else {"activation": activation})
    pair = TRANSPOSED if transposed else (conv2d, stock)
    # hypothesis looks for the worst luck
    check(draw, pair, shape.may_round(dtype), numbers=100, factor=4.0, **keywords)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (4, 5), (2, 2)], ids=str)
def test_padding_in_words(kernel, padding, own):
    for dilation in (1, (1, 2), 3):
        shape = Shape((2, 5, 13, 14), 4, kernel, padding=padding, dilation=dilation)
        for dtype in (torch.float32, torch.bfloat16):
            rounds = shape.may_round(dtype)
            check(lambda: problem(shape, dtype), rounds=rounds, **shape.settings())  # noqa: B023


@pytest.mark.parametrize("value", [[2], [2, 1], (2,), torch.Size([1, 2])], ids=str)
def test_settings_as_lists_and_of_one_number(value, own):
    x, weight, bias = problem(Shape((2, 3, 9, 8), 4, (2, 2)), torch.float32)
    settings = {"stride": value, "padding": value, "dilation": value}
    torch.testing.assert_close(
        conv2d(x, weight, bias, **settings), F.conv2d(x, weight, bias, **settings)
    )
    transpose = weight.transpose(0, 1)
    ours, wanted = (f(x, transpose, None, **settings) for f in reversed(TRANSPOSED))
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", ["tiles_with_tails", "stride_2", "depthwise"])
def test_unbatched(name, own, poisoned):
    shape = SHAPES[name]
    for transposed, (ours, stocks) in enumerate(((conv2d, stock), TRANSPOSED)):
        x, weight, bias = problem(shape, torch.float64, transposed=transposed)
        upstream = upstream_of(stocks, (x[0], weight, bias), **shape.settings())
        results = (
            evaluate(f, (x[0], weight, bias), upstream, **shape.settings()) for f in (ours, stocks)
        )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [same_memory, channels_last])
@pytest.mark.parametrize("name", ["tiles_with_tails", "groups", "stem"])
def test_an_empty_batch(name, layout, own, poisoned):
    """No output; the gradients of weight and bias are 0."""
    shape = SHAPES[name]
    for dtype, (transposed, pair) in itertools.product(
        (torch.float32, torch.bfloat16), enumerate(((conv2d, stock), TRANSPOSED))
    ):
        x, weight, bias = problem(shape, dtype, transposed=transposed)
        tensors = layout(x)[:0], layout(weight), bias
        upstream = upstream_of(pair[1], tensors, **shape.settings())
        ours, wanted = (evaluate(f, tensors, upstream, **shape.settings()) for f in pair)
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a, b)
        assert ours[0].stride() == wanted[0].stride()


# ---------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_special_values_stay_under_the_kernel(value, activation, own, poisoned):
    """What pads a tile is no part of a sum: the direct algorithm, as that of tiles mixes them."""
    dlkernels.config.winograd = "off"
    for name, dtype, layout in itertools.product(
        ("tiles_with_tails", "3_to_64"),
        (torch.float32, torch.bfloat16),
        (same_memory, channels_last),
    ):
        x, weight, bias = problem(SHAPES[name], dtype)
        x[1, 2, 3, 4], bias[-1] = value, value
        x = layout(x)
        results = [
            function(*tensors, padding=1, activation=activation)
            for function, tensors in (
                (conv2d, (x, weight, bias)),
                (stock, (x, weight, bias)),
                (stock, (x.double(), weight.double(), bias.double())),
            )
        ]
        assert_no_worse("output", *results)
        assert not results[0].isfinite().all() or activation in ("tanh", "sigmoid")
        assert results[0][0, 0].isfinite().all() and results[0][1, 0, 0, 0].isfinite()


@pytest.mark.parametrize("name", ["tiles_with_tails", "3_to_64", "stride_2", "depthwise"])
def test_special_values_of_gradients_stay_under_the_kernel(name, own, poisoned):
    """An infinite gradient, and an infinite input to the weight's."""
    dlkernels.config.winograd = "off"
    shape = SHAPES[name]
    for layout in (same_memory, channels_last):
        x, weight, bias = problem(shape, torch.float32)
        upstream = torch.randn(stock(x, weight, bias, **shape.settings()).shape)
        spoiled_x, spoiled_upstream = x.clone(), upstream.clone()
        spoiled_x[1, 2, 3, 4] = spoiled_upstream[1, 2, 3, 1] = float("inf")
        for images, grad in ((x, spoiled_upstream), (spoiled_x, upstream)):
            tensors = layout(images), weight, bias
            ours, wanted = (
                evaluate(f, tensors, grad, **shape.settings())[1:] for f in (conv2d, stock)
            )
            for a, b in zip(ours, wanted, strict=True):
                assert torch.equal(a.isfinite(), b.isfinite())


def test_special_values_of_small_images_meet_no_padding(own, poisoned):
    shape = SMALL["two_by_two"]
    for layout, of_what in itertools.product((same_memory, channels_last), range(3)):
        x, weight, _ = problem(shape, torch.float32)
        upstream = torch.randn(stock(x, weight, padding=1).shape)
        (x, weight, upstream)[of_what][3, 2, 1, 0] = float("inf")
        tensors = layout(x), layout(weight)
        ours, wanted = (evaluate(f, tensors, upstream, padding=1) for f in (conv2d, stock))
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("at", [(1, 0, 0, 0), (2, 1, 2, 3), (0, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_an_infinite_weight_meets_no_padding(function, at, own):
    """Of few channels, however threads cut the images."""
    ours = conv2d if function is F.conv2d else conv_transpose2d
    x, weight = torch.randn(8, 6, 12, 9), torch.randn(6, 6, 5, 5)
    spoiled, wanted = with_an_infinite_weight(function, x, weight, at, padding=2)
    assert not wanted.isfinite().all() and not wanted.isnan().any()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.testing.assert_close(ours(x, spoiled, padding=2), wanted, rtol=1e-4, atol=1e-4)


def test_special_values_reach_what_they_are_under(own, poisoned):
    """Of Winograd's algorithm too: nowhere does a NaN get lost."""
    x, weight, bias = problem(SHAPES["tiles_with_tails"], torch.float32)
    x[1, 2, 3, 4] = float("nan")
    for layout in (same_memory, channels_last):
        ours, wanted = (f(layout(x), weight, bias, padding=1) for f in (conv2d, stock))
        assert (ours.isnan() | ~wanted.isnan()).all() and ours[0].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_the_gradient_at_special_outputs_is_stocks(activation, own):
    """At 0, at an infinite and at a saturated argument, exactly; a NaN stays one."""
    bias = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 200.0, -200.0])
    tensors = torch.zeros(3, 5, 4, 4), torch.zeros(7, 5, 3, 3), bias
    for upstream in (
        torch.randn(3, 7, 2, 2, dtype=torch.float64),
        torch.full((3, 7, 2, 2), float("inf")),
    ):
        ours, wanted = (
            evaluate(f, tensors, upstream, activation=activation) for f in (conv2d, stock)
        )
        torch.testing.assert_close(ours[0], wanted[0], equal_nan=True)
        torch.testing.assert_close(ours[3], wanted[3], equal_nan=True)


def test_sums_of_float16_are_in_float32(own):
    """Partial sums are beyond float16's range, the sum is not."""
    x = torch.full((1, 64, 3, 3), 200.0, dtype=torch.float16)
    weight = torch.cat(
        [torch.full((5, 32, 1, 1), 100.0), torch.full((5, 32, 1, 1), -99.0)], 1
    ).half()
    assert (conv2d(x, weight) == 6400).all()


def test_the_gradient_of_a_bias_over_many_pixels(own):
    """In parts that are added in double: the sum of 2^18 numbers near 1 in float32."""
    for layout in (same_memory, channels_last):
        upstream = layout(torch.rand(4, 3, 256, 256) + 0.5)
        x, weight, bias = (
            layout(torch.randn(4, 2, 256, 256)),
            torch.randn(3, 2, 1, 1),
            torch.randn(3),
        )
        bias.requires_grad_()
        (ours,) = torch.autograd.grad(conv2d(x, weight, bias), bias, upstream)
        torch.testing.assert_close(
            ours, upstream.double().sum((0, 2, 3)).float(), rtol=1e-7, atol=0
        )


# ---------------------------------------------------------------------------------------- autograd

GRADED = {
    "plain": Shape((2, 3, 4, 5), 4, THREE, padding=1),
    "settings": Shape((2, 4, 6, 5), 6, (2, 3), (2, 1), (1, 2), (1, 2), 2),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", GRADED)
def test_gradcheck_and_gradgradcheck(name, activation, own):
    shape = GRADED[name]
    tensors = [x.requires_grad_() for x in problem(shape, torch.float64)]
    function = lambda *t: conv2d(*t, **shape.settings(), activation=activation)  # noqa: E731
    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        for inputs in (tensors, tensors[:2]):
            assert check_gradient(function, inputs, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("name", GRADED)
def test_gradcheck_and_gradgradcheck_of_the_transpose(name, own):
    shape = GRADED[name]
    settings = shape.settings()
    tensors = [x.requires_grad_() for x in problem(shape, torch.float64, transposed=True)]
    if name == "settings":
        settings["output_padding"] = (1, 0)
    function = lambda *t: conv_transpose2d(*t, **settings)  # noqa: E731
    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        for inputs in (tensors, tensors[:2]):
            assert check_gradient(function, inputs, check_batched_grad=True, fast_mode=True)


class Backwards(TorchDispatchMode):
    """Notes what the raw backward ops are asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (ops.conv2d_backward.default, ops.conv_transpose2d_backward.default):
            self.asked.append(args[-3:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", [None, "relu", "transposed"])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_only_the_wanted_gradients_are_computed_and_kept_for(wanted, activation, own, poisoned):
    shape, transposed = Shape((2, 8, 7, 6), 5, (3, 2)), activation == "transposed"
    tensors = problem(shape, torch.float32, transposed=transposed)
    tensors[0] = channels_last(tensors[0])
    pair = TRANSPOSED if transposed else (conv2d, stock)
    keywords = {} if transposed else {"activation": activation}
    upstream = torch.randn(pair[1](*tensors, **keywords).shape)

    def run(function):
        leaves = [
            x.detach().clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)
        ]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.shape) or x, lambda x: x
        ):
            output = function(*leaves, **keywords)
        with Backwards() as backwards:
            gradients = torch.autograd.grad(
                output, [x for x in leaves if x.requires_grad], upstream
            )
        return gradients, kept, backwards.asked

    ours, kept, asked = run(pair[0])
    assert asked == [wanted]
    assert kept == [
        size
        for size, needed in (
            (tensors[0].shape, wanted[1]),
            (tensors[1].shape, wanted[0]),
            (upstream.shape, activation == "relu"),
        )
        if needed
    ]
    for got, want in zip(ours, run(pair[1])[0], strict=True):
        torch.testing.assert_close(got, want)
        of_weight = got.shape == tensors[1].shape
        assert got.stride() == (tensors[1] if of_weight else want).stride()


@by_dtype
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_a_second_backward(dtype, activation, own):
    """retain_graph: each backward is right for its upstream gradient, and leaves others alone."""
    shape = SHAPES["tiles_with_tails"]
    tensors = [x.requires_grad_() for x in problem(shape, dtype)]
    output = conv2d(*tensors, **shape.settings(), activation=activation)
    check_second_backward(output, tensors, torch.randn(output.shape).to(dtype), 0.5)


def test_a_second_backward_of_the_transpose(own):
    tensors = [x.requires_grad_() for x in problem(SHAPES["stride_2"], torch.float32, True, True)]
    output = conv_transpose2d(*tensors, stride=2, padding=1)
    check_second_backward(output, tensors, torch.randn(output.shape), 0.5)


def test_gradients_accumulate_and_are_not_shared(own):
    tensors = [x.requires_grad_() for x in problem(SHAPES["stem"], torch.float32)]
    output = conv2d(*tensors, stride=2, padding=3)
    output.sum().backward(retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    output.sum().backward()
    for t, before in zip(tensors, once, strict=True):
        torch.testing.assert_close(t.grad, 2 * before)


def test_a_weight_used_twice(own):
    """Tied layers: the gradient of the weight is the sum of both."""
    x, weight, _ = problem(Shape((2, 5, 6, 7), 5, THREE), torch.float32)
    weight.requires_grad_()
    ours, wanted = (
        torch.autograd.grad(f(f(x, weight, activation="tanh"), weight).sum(), weight)[0]
        for f in (conv2d, stock)
    )
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("changed", ["input", "weight", "bias", "output"])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_changes_in_place_are_refused_where_stock_refuses_them(changed, activation, own):
    refused = {}
    for function in (conv2d, stock):
        leaves = problem(Shape((2, 3, 5, 5), 4, THREE), torch.float32)
        x, weight, bias = [x.requires_grad_() * 1 for x in leaves]
        output = function(x, weight, bias, activation=activation)
        {"input": x, "weight": weight, "bias": bias, "output": output}[changed].mul_(2)
        try:
            output.sum().backward()
            refused[function] = False
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            refused[function] = True
    assert refused[conv2d] == refused[stock]
    assert refused[conv2d] == (
        changed in ("input", "weight") or (changed == "output" and bool(activation))
    )


def test_the_weight_of_a_first_layer_may_change_before_the_backward(own):
    """No gradient of the input is wanted, so nobody reads the weight again."""
    x, weight, bias = problem(Shape((2, 3, 5, 5), 4, THREE), torch.float32)
    weight.requires_grad_()
    wanted = torch.autograd.grad(stock(x, weight, bias).sum(), weight)[0]
    output = conv2d(x, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), weight)[0], wanted)


@pytest.mark.parametrize("layout", [same_memory, channels_last])
def test_upstream_gradients_as_they_come(layout, own):
    """Of stride 0, as from a sum, in the other format, and with gaps."""
    shape = SHAPES["stride_2"]
    for transposed, pair in enumerate(((conv2d, stock), TRANSPOSED)):
        x, *others = problem(shape, torch.float32, transposed=transposed)
        tensors = [t.requires_grad_() for t in (layout(x), *others)]
        outputs = [f(*tensors, **shape.settings()) for f in pair]
        random = torch.randn(outputs[0].shape)
        of_stride_0 = [x.expand(random.shape) for x in (torch.ones(()), random[:, :1], random[:1])]
        for upstream in (*of_stride_0, random, channels_last(random), every_second(random)):
            ours, wanted = (
                torch.autograd.grad(output, tensors, upstream, retain_graph=True)
                for output in outputs
            )
            for got, want in zip(ours, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_no_gradient_work_where_none_is_needed(own):
    x, weight, bias = problem(SHAPES["stem"], torch.float32)
    weight.requires_grad_()
    with torch.no_grad():
        assert not conv2d(x, weight, bias).requires_grad
    with torch.inference_mode():
        assert not conv2d(x, weight, bias).requires_grad
    assert not conv2d(x, weight.detach(), bias).requires_grad
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        conv2d(x, weight.detach(), bias)
        conv_transpose2d(x, weight.detach().transpose(0, 1), None)
    names = {event.key for event in profile.key_averages()}
    assert {"dlkernels::conv2d_forward", "dlkernels::conv_transpose2d_forward"} <= names
    assert not names & {"_Conv2d", "_ConvTranspose2d"}


def test_a_call_keeps_no_memory():
    x, weight, bias = problem(Shape((1, 2, 3, 3), 2, THREE), torch.float32)
    for ours in (True, False):
        settings = [1, 1], [0, 0], [1, 1], 1, "relu", False, ours
        output = ops.conv2d_forward(x, weight, bias, *settings)
        gradients = output, x, weight, output, *settings, True, True, True
        assert_nothing_is_kept(lambda: ops.conv2d_forward(x, weight, bias, *settings))  # noqa: B023
        assert_nothing_is_kept(lambda: ops.conv2d_backward(*gradients))  # noqa: B023


def test_raw_ops_refuse_to_be_differentiated():
    x, weight, bias = [x.requires_grad_() for x in problem(SHAPES["no_padding"], torch.float32)]
    settings = [1, 1], [0, 0], [1, 1], 1, "none", False, True
    transposed = [1, 1], [0, 0], [0, 0], 1, [1, 1], False, True
    outputs = [
        ops.conv2d_forward(x, weight, bias, *settings),
        ops.conv_transpose2d_forward(x, weight.transpose(0, 1), None, *transposed),
    ]
    outputs += ops.conv2d_backward(
        torch.ones_like(outputs[0]), x, weight, None, *settings, True, True, True
    )
    outputs += ops.conv_transpose2d_backward(
        torch.ones_like(outputs[1]), x, weight.transpose(0, 1), *transposed, True, True, True
    )
    assert len(outputs) == 8
    for output in outputs:
        with pytest.raises(NotImplementedError, match="raw op"):
            output.sum().backward()


# ------------------------------------------------------------------------- the rest of torch


def check_op(op, raw, backward, tensors, settings, activation):
    """opcheck of the three ops; the tensors of a good call. Compiled is the one that is public."""
    eager = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(raw.default, (*tensors, *settings), test_utils=eager)
    leaves = [x.detach().requires_grad_() for x in tensors]
    torch.library.opcheck(op.default, (*leaves, *settings))
    output = raw(*tensors, *settings)
    kept = {None: (), "none": (None,), "relu": (output,)}[activation]
    for wanted in ((True, True, True), (False, True, False)):
        arguments = torch.ones_like(output), *tensors[:2], *kept, *settings, *wanted
        torch.library.opcheck(backward.default, arguments, test_utils=eager)


def pairs_of(shape):
    return [v if isinstance(v, tuple) else (v, v) for v in shape[3:6]]


OPCHECKS = {
    "own": ("settings", same_memory, 2, True),
    "own_channels_last": ("plain", channels_last, 2, True),
    "aten_channels_last": ("settings", channels_last, 2, False),
    "no_batch": ("plain", channels_last, 0, True),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case):
    name, layout, batch, ours = OPCHECKS[case]
    shape, activation = GRADED[name], "relu" if name == "plain" else "none"
    x, weight, bias = problem(shape, torch.float32)
    tensors = layout(x)[:batch], layout(weight), bias
    settings = *pairs_of(shape), shape.groups, activation, False, ours
    check_op(ops.conv2d, ops.conv2d_forward, ops.conv2d_backward, tensors, settings, activation)


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck_of_the_transpose(case):
    name, layout, batch, ours = OPCHECKS[case]
    shape = GRADED[name]
    x, weight, bias = problem(shape, torch.float32, transposed=True)
    tensors = layout(x)[:batch], layout(weight), bias
    stride, padding, dilation = pairs_of(shape)
    settings = stride, padding, (stride[0] - 1, 0), shape.groups, dilation, False, ours
    raw = ops.conv_transpose2d_forward, ops.conv_transpose2d_backward
    check_op(ops.conv_transpose2d, *raw, tensors, settings, None)


@pytest.mark.parametrize("activation", [None, "relu", "transposed"])
@pytest.mark.parametrize("layout", [same_memory, channels_last])
def test_compile(layout, activation, own):
    """One graph without a break, one compilation for every batch and image."""
    torch._dynamo.reset()  # the other parameters have compiled the same lines
    counter = CompileCounterWithBackend("aot_eager")
    transposed = activation == "transposed"
    keywords = {"stride": 2, "padding": 1} | ({} if transposed else {"activation": activation})
    function = conv_transpose2d if transposed else conv2d
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for batch, size in ((7, 21), (8, 25), (10, 31)):  # no two equal: they would be taken for one
        shape = Shape((batch, 4, size, size + 3), 5, THREE)
        x, weight, bias = problem(shape, torch.float32, transposed=transposed)
        tensors = layout(x), weight, bias
        upstream = torch.randn(function(*tensors, **keywords).shape)
        results = [evaluate(f, tensors, upstream, **keywords) for f in (compiled, function)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        graphs = graphs or list(counter.graphs)
        assert len(counter.graphs) == len(graphs), "compiled again for another size"
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    op = ops.conv_transpose2d if transposed else ops.conv2d
    assert targets.count(op) + targets.count(op.default) == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_compile_where_the_choice_is_open(transposed):
    """Nobody is asked while tracing who listens to the choice."""
    torch._dynamo.reset()
    function = conv_transpose2d if transposed else conv2d
    tensors = problem(Shape((8, 16, 20, 21), 17, THREE), torch.float32, transposed=transposed)
    dlkernels.config.kernels = "auto"
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), function(*tensors))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_compile_of_some_gradients(wanted, own):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: conv2d(*tensors, activation="tanh"), fullgraph=True, backend="aot_eager"
    )
    tensors = [
        x.requires_grad_(w)
        for x, w in zip(problem(GRADED["plain"], torch.float32), wanted, strict=True)
    ]
    leaf = next(x for x in tensors if x.requires_grad)
    ours, wanted = (
        torch.autograd.grad(f(*tensors).sum(), leaf)[0]
        for f in (compiled, lambda *tensors: stock(*tensors, activation="tanh"))
    )
    torch.testing.assert_close(ours, wanted)


def test_compile_of_same_padding(own):
    torch._dynamo.reset()
    x, weight, bias = problem(Shape((2, 3, 7, 8), 4, (2, 3)), torch.float32)
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(x, weight, bias, padding="same"), conv2d(x, weight, bias, padding="same")
    )


def test_compile_of_func_grad_is_not_zero(own):
    x, weight, bias = problem(GRADED["plain"], torch.float32)
    gradient = torch.func.grad(lambda w: conv2d(x, w, bias, activation="tanh").sum())
    wanted = torch.func.grad(lambda w: stock(x, w, bias, activation="tanh").sum())(weight)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(gradient(weight), wanted)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), wanted)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_vmap_and_forward_mode(activation, own):
    x, weight, bias = problem(GRADED["plain"], torch.float32)
    xs, weights = torch.stack([x, -x, 2 * x]), torch.stack([weight, 2 * weight, -weight])

    def f(x, weight):
        return conv2d(x, weight, bias, padding=1, activation=activation)

    batched = torch.func.vmap(f)(xs, weights)
    looped = torch.stack([f(*pair) for pair in zip(xs, weights, strict=True)])
    torch.testing.assert_close(batched, looped)
    tangent = torch.randn_like(weight)
    _, ours = torch.func.jvp(lambda w: f(x, w), (weight,), (tangent,))
    leaf = weight.clone().requires_grad_()
    gradient = torch.autograd.grad(f(x, leaf).sum(), leaf)[0]
    torch.testing.assert_close(ours.sum(), (gradient * tangent).sum(), rtol=1e-4, atol=1e-4)
    transpose = weights.transpose(1, 2)
    batched = torch.func.vmap(conv_transpose2d)(xs, transpose)
    looped = torch.stack([conv_transpose2d(*pair) for pair in zip(xs, transpose, strict=True)])
    torch.testing.assert_close(batched, looped)


def test_jacobian_of_the_whole_batch_at_once(own):
    """vmap over the backward alone."""
    x, weight, bias = problem(Shape((2, 3, 4, 4), 2, THREE), torch.float64)
    for function in (
        lambda w: conv2d(x, w, bias, activation="tanh"),
        lambda w: conv_transpose2d(x, w.transpose(0, 1)),
    ):  # noqa: E501
        one, all_ = (
            torch.autograd.functional.jacobian(function, weight, vectorize=vectorize)
            for vectorize in (False, True)
        )
        torch.testing.assert_close(one, all_)


def test_checkpoint(own):
    tensors = [x.requires_grad_() for x in problem(SHAPES["stem"], torch.float32)]
    ours, wanted = (
        torch.autograd.grad(f(*tensors).sum(), tensors)
        for f in (
            lambda *t: torch.utils.checkpoint.checkpoint(
                lambda *t: conv2d(*t, activation="relu"), *t, use_reentrant=False
            ),
            lambda *t: conv2d(*t, activation="relu"),
        )
    )
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


def test_export(own):
    batch = torch.export.Dim("batch")
    for layer, op in (
        (dlkernels.nn.Conv2d(4, 6, 3, padding=1), ops.conv2d.default),
        (dlkernels.nn.ConvTranspose2d(4, 6, 3, stride=2), ops.conv_transpose2d.default),
    ):
        x = torch.randn(8, 4, 7, 9)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert targets == [op]
        assert torch.equal(program.module()(x[:3]), layer(x[:3]))


def test_a_jit_trace_holds_torchs_ops_alone(own):
    layer, x = dlkernels.nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 9)
    traced = torch.jit.trace(layer, x)
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert "aten::_convolution" in kinds and not any("dlkernels" in kind for kind in kinds)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_autocast(transposed, dtype, own):
    """Computed and returned in autocast's dtype; float64 stays; gradients have their leaf's."""
    shape = Shape((2, 9, 12, 11), 10, THREE)
    tensors = problem(shape, torch.float32, transposed=transposed)
    tensors = [x.requires_grad_() for x in tensors]
    f, stocks = TRANSPOSED if transposed else (conv2d, F.conv2d)
    with torch.autocast("cpu", dtype):
        ours, wanted = f(*tensors), stocks(*tensors)
        assert ours.dtype == wanted.dtype == dtype
        assert torch.equal(f(tensors[0].to(dtype), *tensors[1:]), ours)
        doubles = [x.detach().double() for x in tensors]
        assert f(*doubles).dtype == stocks(*doubles).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert f(*tensors).dtype == torch.float32
    exact = stocks(*(x.double() for x in tensors))
    assert_no_worse("output", ours, wanted, exact)
    for leaf, a, b, c in zip(
        tensors,
        *(torch.autograd.grad(y, tensors, torch.ones_like(y)) for y in (ours, wanted, exact)),
        strict=True,
    ):
        assert a.dtype == leaf.dtype
        assert_no_worse("gradient", a, b, c.double())
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        assert torch.equal(compiled(*tensors), ours)


def test_an_activation_in_place_behind_it(own):
    """Nothing is kept of an output without an activation of ours: it may be overwritten."""
    tensors = [x.requires_grad_() for x in problem(GRADED["plain"], torch.float32)]
    ours, wanted = (
        torch.autograd.grad(F.leaky_relu_(f(*tensors)).sum(), tensors) for f in (conv2d, F.conv2d)
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------- refusals


def refusals():
    x, weight, bias = problem(Shape((2, 4, 6, 7), 6, THREE), torch.float32)
    return {
        "channels": ((x[:, :3], weight, bias), {}),
        "channels_unbatched": ((x[0, :3], weight, bias), {}),
        "channels_of_a_group": ((x, weight, bias), {"groups": 2}),
        "outputs_of_a_group": ((x, weight[:5, :2], None), {"groups": 2}),
        "no_groups": ((x, weight, bias), {"groups": 0}),
        "groups_of_a_half": ((x, weight, bias), {"groups": 1.5}),
        "input_of_2_dimensions": ((x[0, 0], weight, bias), {}),
        "input_of_5_dimensions": ((x[None], weight, bias), {}),
        "weight_of_3_dimensions": ((x, weight[0], bias), {}),
        "bias_size": ((x, weight, bias[:4]), {}),
        "bias_of_2_dimensions": ((x, weight, bias[None]), {}),
        "scalar_bias": ((x, weight, bias[0]), {}),
        "weight_dtype": ((x, weight.double(), bias), {}),
        "bias_dtype": ((x, weight, bias.double()), {}),
        "kernel_beyond_the_image": ((x[:, :, :2], weight, bias), {}),
        "kernel_beyond_the_image_dilated": ((x, weight, bias), {"dilation": (1, 4)}),
        "stride_0": ((x, weight, bias), {"stride": (1, 0)}),
        "negative_stride": ((x, weight, bias), {"stride": -1}),
        "three_strides": ((x, weight, bias), {"stride": (1, 1, 1)}),
        "stride_in_words": ((x, weight, bias), {"stride": "same"}),
        "stride_of_a_half": ((x, weight, bias), {"stride": 1.5}),
        "stride_is_a_bool": ((x, weight, bias), {"stride": True}),
        "no_stride": ((x, weight, bias), {"stride": ()}),
        "negative_padding": ((x, weight, bias), {"padding": (0, -1)}),
        "unknown_padding": ((x, weight, bias), {"padding": "full"}),
        "same_with_a_stride": ((x, weight, bias), {"padding": "same", "stride": 2}),
        "negative_dilation": ((x, weight, bias), {"dilation": -1}),
        "dilation_0": ((x, weight, bias), {"dilation": (1, 0)}),
        "no_rows": ((x[:, :, :0], weight, bias), {"padding": 2}),
        "no_outputs": ((x, weight[:0], None), {}),
        "quantized": ((torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), weight, bias), {}),
        "no_tensor": (([1.0], weight, bias), {}),
        "no_weight": ((x, None, bias), {}),
        "bias_is_no_tensor": ((x, weight, 3), {}),
    }


def check_refusal(ours, stocks, tensors, settings):
    """``stocks`` takes what torch's function is to be called with, in its order."""
    with pytest.raises(Exception) as wanted:  # noqa: B017  whatever it is, ours is the same
        stocks(*tensors, **settings)
    with pytest.raises(wanted.type) as got:
        ours(*tensors, **settings)
    assert str(got.value).splitlines()[0] == str(wanted.value).splitlines()[0]


def stocks_transpose(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals())
def test_refusals_are_stocks(case, kernels):
    dlkernels.config.kernels = kernels
    tensors, settings = refusals()[case]
    for activation in (None, "relu"):

        def ours(*tensors, activation=activation, **settings):
            return conv2d(*tensors, **settings, activation=activation)

        check_refusal(ours, stock, tensors, settings)


def refusals_of_the_transpose():
    x, weight, bias = problem(Shape((2, 4, 6, 7), 6, THREE), torch.float32, transposed=True)
    return {
        "channels": ((x[:, :3], weight, bias), {}),
        "channels_of_a_group": ((x[:, :5], weight[:5], None), {"groups": 2}),
        "no_groups": ((x, weight, bias), {"groups": 0}),
        "bias_size": ((x, weight, bias[:3]), {}),
        "weight_dtype": ((x, weight.double(), bias), {}),
        "input_of_5_dimensions": ((x[None], weight, bias), {}),
        "stride_0": ((x, weight, bias), {"stride": (1, 0)}),
        "negative_padding": ((x, weight, bias), {"padding": (0, -1)}),
        "padding_in_words": ((x, weight, bias), {"padding": "same"}),
        "padding_beyond_the_image": ((x[:, :, :1, :1], weight, bias), {"padding": 2}),
        "negative_output_padding": ((x, weight, bias), {"output_padding": -1}),
        "output_padding_of_the_stride": ((x, weight, bias), {"output_padding": 2, "stride": 2}),
        "three_output_paddings": ((x, weight, bias), {"output_padding": (0, 0, 0)}),
        "no_inputs": ((x[:, :0], weight[:0], bias), {}),
        "no_weight": ((x, None, bias), {}),
    }


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals_of_the_transpose())
def test_refusals_of_the_transpose_are_stocks(case, kernels):
    dlkernels.config.kernels = kernels
    check_refusal(conv_transpose2d, stocks_transpose, *refusals_of_the_transpose()[case])


@pytest.mark.parametrize(
    "activation", ["none", "gelu", "", "ReLU", pytest.param(torch.relu, id="torch.relu")], ids=str
)
def test_an_unknown_activation_names_the_known(activation):
    tensors = problem(GRADED["plain"], torch.float32)
    with pytest.raises(ValueError, match="None or one of 'relu', 'leaky_relu', 'tanh', 'sigmoid'"):
        conv2d(*tensors, activation=activation)


def test_activation_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        conv2d(*problem(GRADED["plain"], torch.float32), 1, 0, 1, 1, "relu")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_what_only_stock_takes_is_stocks():
    """The result of stock, and under "own" a refusal that says why."""
    x, weight, bias = problem(Shape((2, 4, 6, 7), 6, THREE), torch.float32)
    none = torch.zeros(2, 0, 6, 7), torch.zeros(6, 0, 3, 3), bias
    cases = {
        "no kernel for torch.complex64": ((x.cfloat(), weight.cfloat(), bias.cfloat()), {}),
        "no kernel for torch.int64": ((x.long(), weight.long(), bias.long()), {}),
        "plain dense tensor": ((x.to_mkldnn(), weight, bias), {}),
        "device meta": ((x.to("meta"), weight.to("meta"), None), {}),
        "an empty image": (none, {}),
        "two numbers in range": ((x, weight, bias), {"stride": 2**40}),
    }
    for reason, (tensors, settings) in cases.items():
        dlkernels.config.kernels = "auto"
        ours, wanted = conv2d(*tensors, **settings), F.conv2d(*tensors, **settings)
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
        if not ours.is_meta:
            assert torch.equal(ours.to_dense(), wanted.to_dense())
        dlkernels.config.kernels = "own"
        with pytest.raises(NotImplementedError, match=f"conv2d: no kernel of ours: .*{reason}"):
            conv2d(*tensors, **settings)
    settings = {"output_padding": 1, "dilation": 2}
    tensors = x, weight.transpose(0, 1)[:4], None
    dlkernels.config.kernels = "auto"
    assert torch.equal(*(f(*tensors, **settings) for f in TRANSPOSED))
    dlkernels.config.kernels = "own"
    with pytest.raises(NotImplementedError, match="output_padding that is not below the stride"):
        conv_transpose2d(*tensors, **settings)


def test_a_subclass_of_tensor_keeps_its_class():
    class Marked(torch.Tensor):
        pass

    x, weight, bias = problem(GRADED["plain"], torch.float32)
    assert type(conv2d(x.as_subclass(Marked), weight, bias)) is Marked


def test_refusals_of_raw_ops():
    """No path into a kernel is unchecked."""
    x, weight, bias = problem(Shape((2, 4, 6, 7), 6, THREE), torch.float32)
    names = "stride", "padding", "dilation", "groups", "activation", "exact", "own"
    plain = dict(zip(names, ([1, 1], [0, 0], [1, 1], 1, "none", False, True), strict=True))
    bad = {
        "input with 3 channels": ((x, weight[:, :3], bias), {}),
        "input with 8 channels": ((x, weight, bias), {"groups": 2}),
        "weight for 4 groups": ((x, weight[:, :1], bias), {"groups": 4}),
        "at least 1 group": ((x, weight, bias), {"groups": 0}),
        "bias of shape \\[6\\], got \\[4\\]": ((x, weight, bias[:4]), {}),
        "weight of dtype Float, got Double": ((x, weight.double(), bias), {}),
        "bias of dtype Float, got Double": ((x, weight, bias.double()), {}),
        "input of dtype": ((x.int(), weight.int(), None), {}),
        "input with 4 dimensions": ((x[0], weight, bias), {}),
        "weight with 4 dimensions": ((x, weight[0], bias), {}),
        "input that is empty in the batch alone": ((x[:, :0], weight[:, :0], bias), {}),
        "weight for 1 groups": ((x, weight[:0], None), {}),
        "a larger input": ((x[:, :, :2], weight, bias), {}),
        "stride of at least 1": ((x, weight, bias), {"stride": [1, 0]}),
        "padding of at least 0": ((x, weight, bias), {"padding": [-1, 0]}),
        "dilation of at least 1": ((x, weight, bias), {"dilation": [0, 1]}),
        "stride of at least 1, got": ((x, weight, bias), {"stride": [2**40, 1]}),
        "activation": ((x, weight, bias), {"activation": "gelu"}),
    }
    for message, (tensors, settings) in bad.items():
        for op in (ops.conv2d_forward, ops.conv2d_algorithm):
            with pytest.raises(RuntimeError, match=f"conv2d: expected .*{message}"):
                op(*tensors, *(plain | settings).values())
    settings = (*plain.values(),)
    relu = *settings[:4], "relu", *settings[5:]
    output = ops.conv2d_forward(x, weight, bias, *relu)
    good = [torch.ones_like(output), x, weight, output, *relu, True, True, True]
    ops.conv2d_backward(*good)
    for at, value, message in (
        (0, output.double(), "grad_output of dtype Float, got Double"),
        (0, output[:1], "grad_output of shape \\[2, 6, 4, 5\\], got \\[1, 6, 4, 5\\]"),
        (1, x[:, :3], "input with 4 channels"),
        (2, weight.double(), "weight of dtype"),
        (3, output[:1], "output of shape"),
        (3, output.double(), "output of dtype"),
        (3, None, "the output"),
        (8, "gelu", "activation"),
    ):
        with pytest.raises(RuntimeError, match=f"conv2d: expected .*{message}"):
            ops.conv2d_backward(*good[:at], value, *good[at + 1 :])
    transpose = weight.transpose(0, 1).contiguous()
    good = [x, transpose, None, [1, 1], [0, 0], [0, 0], 1, [1, 1], False, True]
    output = ops.conv_transpose2d_forward(*good)
    for at, value, message in (
        (0, x[:, :3], "input with 4 channels"),
        (2, bias[:3], "bias of shape"),
        (5, [-1, 0], "output_padding of at least 0"),
        (4, [9, 9], "a larger input"),
    ):
        with pytest.raises(RuntimeError, match=f"conv_transpose2d: expected .*{message}"):
            ops.conv_transpose2d_forward(*good[:at], value, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="conv_transpose2d: expected grad_output of shape"):
        ops.conv_transpose2d_backward(output[:1], *good[:2], *good[3:], True, True, True)


# ----------------------------------------------------------------------------------- which kernel


def chosen(function, kernels, *tensors, **keywords):
    dlkernels.config.kernels = kernels
    with dlkernels.config.recording() as choices:
        function(*tensors, **keywords)
    assert len(choices) == 1 and choices[0].op == function.__name__
    return choices[0].kernel, choices[0].reason


@pytest.mark.parametrize("module", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_what_torch_does_alone_is_called_directly(module):
    """Without our function around it; also where some directions are not asked for."""
    stock = module(64, 64, 3, stride=2, dtype=torch.float32)
    ours = dlkernels.swap(copy.deepcopy(stock))
    x = torch.randn(8, 64, 31, 32, requires_grad=True)
    y, wanted = ours(x), stock(x)
    assert y.grad_fn.name() == wanted.grad_fn.name() and torch.equal(y, wanted)
    winograd = dlkernels.nn.Conv2d(64, 64, 3, padding=1)
    assert "_Conv2d" in winograd(x).grad_fn.name()
    with FakeTensorMode():  # nobody to ask
        traced = type(ours)(64, 64, 3, stride=2)
        assert traced(torch.randn(8, 64, 31, 32)).shape == wanted.shape


@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_call_is_asked_about_once(transposed, monkeypatch):
    """A call differs by shapes, strides, what is differentiated, and what the user allows."""
    module = dlkernels.ops.conv2d
    asked = []
    answer = module._algorithms
    monkeypatch.setattr(module, "_torchs", {})
    monkeypatch.setattr(module, "_algorithms", lambda *a: asked.append(a) or answer(*a))
    function = conv_transpose2d if transposed else conv2d
    x, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    calls = {
        "winograd's": lambda: function(x, weight, padding=1),
        "torch's": lambda: function(x, weight, stride=2),
        "of pairs": lambda: function(x, weight, stride=(2, 1)),
        "of other strides": lambda: function(x.to(memory_format=torch.channels_last), weight),
        "of a weight with a gradient": lambda: function(x, weight.clone().requires_grad_()),
        "below torch.no_grad": torch.no_grad()(
            lambda: function(x, weight.clone().requires_grad_(), padding=1)
        ),
        "of another dtype": lambda: function(x.double(), weight.double()),
    }
    for name, call in calls.items():
        before = len(asked)
        first = call()
        assert len(asked) == before + (name != "below torch.no_grad"), name
        assert torch.equal(call(), first), name
        assert len(asked) == before + (name != "below torch.no_grad"), name
    assert function(x, weight, stride=[2, 2]).shape == calls["torch's"]().shape  # no key of a list
    before, dlkernels.config.winograd = len(asked), "off"
    calls["winograd's"]()
    assert len(asked) == before + 1
    with dlkernels.config.recording() as choices:
        calls["torch's"]()
    assert [choice.kernel for choice in choices] == ["stock"]
    monkeypatch.setattr(module, "_MOST_KEYS", len(module._torchs))
    function(x[:4], weight, stride=2)
    assert len(module._torchs) == 1


def test_choice():
    x, weight, bias = problem(Shape((8, 16, 30, 30), 40, THREE), torch.float32)
    ours, small = dlkernels.config.owner("cpu"), "too small for our call overhead"
    forced = "dlkernels.config.kernels is 'stock'"
    kernel, reason = chosen(conv2d, "own", x, weight, bias, padding=1)
    assert kernel == ours and "aten" not in reason
    assert [word.split(":")[0] for word in reason.split(", ")] == [
        "forward", "input gradient", "weight gradient"
    ]  # fmt: skip
    for shape, own, auto in (
        (Shape((4, 64, 16, 16), 64, THREE, padding=1), "winograd", "winograd"),
        (Shape((64, 1, 28, 28), 6, (5, 5)), "few_channels", "few_channels"),
        (Shape((8, 64, 32, 32), 64, ONE), "direct", "aten"),
        (Shape((8, 64, 32, 32), 64, THREE, padding=1, groups=64), "depthwise", "aten"),
    ):
        for kernels, algorithm in (("own", own), ("auto", auto)):
            tensors = problem(shape, torch.float32)
            kernel, reason = chosen(conv2d, kernels, *tensors, **shape.settings())
            names = "forward", "input gradient", "weight gradient"
            assert reason == ", ".join(f"{name}: {algorithm}" for name in names)
            assert kernel == ("stock" if algorithm == "aten" else ours)
    tiny = x[:1, :, :3, :3], weight
    assert chosen(conv2d, "own", *tiny)[0] == ours
    assert chosen(conv2d, "auto", *tiny) == ("stock", small)
    assert chosen(conv2d, "auto", *tiny, activation="tanh") == ("reference", small)
    assert chosen(conv2d, "stock", x, weight) == ("stock", forced)
    assert chosen(conv2d, "stock", x, weight, activation="tanh") == ("reference", forced)
    transpose = weight.transpose(0, 1)
    assert chosen(conv_transpose2d, "own", x, transpose, stride=2)[0] == ours
    assert chosen(conv_transpose2d, "auto", x[:1, :, :3, :3], transpose) == ("stock", small)
    assert chosen(conv_transpose2d, "stock", x, transpose) == ("stock", forced)
    dlkernels.config.kernels = "own"
    with dlkernels.config.recording() as choices:
        torch.func.vmap(conv2d, in_dims=(0, None))(x[None], weight)
    assert choices == [("conv2d", "stock", "a functorch transform is active")]


def algorithms(x, weight, own=True, padding=(1, 1)):
    settings = [1, 1], list(padding), [1, 1], 1, "none"
    exact = dlkernels.ops.conv2d.is_exact("cpu")
    return ops.conv2d_algorithm(x, weight, None, *settings, exact, own).split(", ")


def test_few_channels_have_an_algorithm_of_their_own():
    few = ["few_channels"] * 3
    for (channels, outputs), named, auto in (
        ((1, 6), few, few),
        ((1, 9), few, ["aten", "few_channels", "few_channels"]),
        ((6, 16), few, ["aten", "few_channels", "aten"]),
        ((3, 64), few, ["aten", "few_channels", "aten"]),
        ((8, 40), few, ["aten"] * 3),
        ((9, 16), ["direct"] * 3, ["aten"] * 3),
    ):
        x, weight = torch.randn(2, channels, 12, 12), torch.randn(outputs, channels, 5, 5)
        assert algorithms(x, weight) == named
        assert algorithms(x, weight, own=False) == auto
        last = channels_last(x) if channels > 1 else x
        scattered = "direct" if outputs > 16 and channels > 1 else named[0]
        assert algorithms(last, weight) == [scattered, *named[1:]]
        y = torch.randn(2, outputs, 8, 8)
        for images, forward in ((y, named[0]), (channels_last(y), scattered)):
            _, reason = chosen(conv_transpose2d, "own", images, weight)
            gradients = f"input gradient: {forward}, weight gradient: {named[2]}"
            assert reason == f"forward: {named[1]}, {gradients}"
    x, weight = torch.randn(2, 3, 12, 12), torch.randn(64, 3, 3, 3)
    for settings in (([2, 1], [1, 1], 1), ([1, 1], [1, 2], 1)):
        stride, dilation, groups = settings
        named = ops.conv2d_algorithm(
            x, weight, None, stride, [1, 1], dilation, groups, "none", False, True
        )
        assert "few_channels" not in named


def test_small_images_have_an_algorithm_of_their_own():
    direct, small, aten = ["direct"] * 3, ["small"] * 3, ["aten"] * 3
    large = ["direct", "direct", "small"]
    for shape, own, auto in (
        (Shape((64, 64, 2, 2), 64, THREE, padding=1), small, small),
        (Shape((8, 16, 2, 2), 16, THREE, padding=1), small, aten),
        (Shape((512, 32, 4, 4), 63, (5, 5), padding=2), small, aten),
        (Shape((64, 64, 2, 3), 64, THREE, padding=1), small, small),
        (Shape((64, 64, 3, 3), 64, THREE, padding=1), ["winograd"] * 3, ["winograd"] * 3),
        (Shape((64, 64, 4, 4), 64, THREE, stride=2, padding=1), small, small),
        (Shape((64, 64, 4, 4), 128, ONE, stride=2), small, small),
        (Shape((64, 64, 4, 4), 128, ONE), direct, aten),
        (Shape((64, 128, 8, 8), 256, THREE, stride=2, padding=1), large, ["aten", "aten", "small"]),
        (Shape((64, 64, 8, 8), 64, THREE, stride=2, padding=1), large, aten),
        (Shape((64, 128, 8, 9), 256, THREE, stride=2, padding=1), direct, aten),
        (Shape((7, 64, 4, 4), 64, THREE, stride=2, padding=1), direct, aten),
        (Shape((64, 64, 4, 4), 15, THREE, stride=2, padding=1), direct, aten),
        (Shape((64, 64, 4, 4), 64, THREE, stride=2, padding=1, groups=2), direct, aten),
    ):
        x, weight, _ = problem(shape, torch.float32)
        pairs = [[n, n] for n in (shape.stride, shape.padding, shape.dilation)]
        for forced, wanted in ((True, own), (False, auto)):
            settings = *pairs, shape.groups, "none", False, forced
            assert ops.conv2d_algorithm(x, weight, None, *settings).split(", ") == wanted
            if not forced:
                named = ops.conv2d_algorithm(x.double(), weight.double(), None, *settings)
                assert "small" not in named


def test_precision_flags(precision):
    """ieee, of convolutions or of all that is above them, and winograd = "off": no Winograd."""
    x, weight, bias = problem(Shape((2, 16, 12, 12), 16, THREE, padding=1), torch.float32)
    assert algorithms(x, weight)[:2] == ["winograd"] * 2
    assert "winograd" not in algorithms(x.double(), weight.double())
    for owner in (torch.backends.mkldnn.conv, torch.backends.mkldnn, torch.backends):
        before = owner.fp32_precision
        try:
            with torch.backends.__allow_nonbracketed_mutation():
                owner.fp32_precision = "ieee"
            assert "winograd" not in algorithms(x, weight)
            kernel, reason = chosen(conv2d, "own", x, weight, bias, padding=1)
            assert "winograd" not in reason
        finally:
            with torch.backends.__allow_nonbracketed_mutation():
                owner.fp32_precision = before
    dlkernels.config.winograd = "off"
    assert "winograd" not in algorithms(x, weight)
    with pytest.raises(ValueError, match="winograd must be one of"):
        dlkernels.config.winograd = "on"


def test_exact_is_as_exact_as_stock(own):
    """2 × its error, where Winograd would have 4."""
    dlkernels.config.winograd = "off"
    for name in ("tiles_with_tails", "no_padding", "3_to_64"):
        shape = SHAPES[name]
        check(lambda: problem(shape, torch.float32), **shape.settings())  # noqa: B023


def test_a_float64_of_a_user_is_not_computed_in_float32(own):
    shape = SHAPES["tiles_with_tails"]
    x, weight, bias = problem(shape, torch.float64)
    ours, wanted = (f(x, weight, bias, padding=1) for f in (conv2d, stock))
    assert (ours - wanted).abs().max() < 1e-13


def test_explain(own):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 3, 2, 2)
    )
    records = dlkernels.explain(dlkernels.swap(model), torch.randn(2, 3, 8, 8))
    ours = dlkernels.config.owner("cpu")
    assert [r.kernel for r in records] == [ours, "stock", ours]
    assert [r.cls for r in records] == [
        "dlkernels.nn.Conv2d", "torch.nn.ReLU", "dlkernels.nn.ConvTranspose2d"
    ]  # fmt: skip
    assert all("forward: " in records[i].reason for i in (0, 2))


@pytest.mark.parametrize("layout", [same_memory, channels_last])
@by_dtype
def test_torchs_algorithms_inside_the_op(dtype, layout):
    """With own=False the raw ops give what stock gives, whoever computes it."""
    shape = Shape((2, 5, 12, 9), 6, (3, 2), 2, (1, 2), (2, 3))
    x, weight, bias = problem(shape, dtype)
    x = layout(x)
    settings = [2, 2], [1, 2], [2, 3], 1, "tanh", False, False
    output = ops.conv2d_forward(x, weight, bias, *settings)
    wanted = stock(x, weight, bias, **shape.settings(), activation="tanh")
    torch.testing.assert_close(output, wanted)
    upstream = torch.randn(output.shape).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    gradients = torch.autograd.grad(
        stock(*leaves, **shape.settings(), activation="tanh"), leaves, upstream
    )
    ours = ops.conv2d_backward(upstream, x, weight, output, *settings, True, True, True)
    room = {} if dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.05}
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, **room)


# ------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize(
    "name",
    [
        "tiles_with_tails",
        "stride_2",
        "one_by_one",
        "depthwise",
        "stem",
        "33_tiles",
        "many_pixels",
        "many_images",
        "many_terms",
        "many_terms_of_the_input_gradient",
        "600_images",
        "to_260_channels",
    ],
)
def test_the_same_bits_for_any_number_of_threads(name, own):
    shapes = (
        SHAPES
        | SMALL
        | {
            "many_pixels": Shape((3, 9, 40, 40), 10, THREE, padding=1),
            "many_images": Shape((70, 3, 12, 12), 10, (5, 5), padding=2),
            # More than are summed at once, of few channels.
            "many_terms": Shape((4, 8, 24, 24), 16, (7, 7), padding=3),
            "many_terms_of_the_input_gradient": Shape((32, 3, 8, 8), 64, (5, 5), padding=2),
        }
    )
    shape = shapes[name]
    for dtype, layout in itertools.product(DTYPES, (same_memory, channels_last)):
        if name.startswith("many") and dtype != torch.float32:
            continue
        for transposed, (ours, theirs) in enumerate(((conv2d, stock), TRANSPOSED)):
            x, *others = problem(shape, dtype, transposed=transposed)
            tensors = layout(x), *others
            upstream = upstream_of(theirs, tensors, **shape.settings())
            assert_same_for_any_number_of_threads(
                lambda *case: evaluate(*case, **shape.settings()), ours, tensors, upstream
            )


def test_four_threads_at_once(own):
    def case(channels):
        tensors = problem(Shape((2, channels, 12, 12), 16, THREE), torch.float32)
        return conv2d, tensors, torch.randn(2, 16, 10, 10)

    assert_same_in_threads_at_once(evaluate, [case(8 + i) for i in range(4)])


def test_in_a_forked_child(own):
    tensors = problem(Shape((4, 16, 14, 14), 24, THREE), torch.float32)
    assert_same_in_a_forked_child(evaluate, conv2d, tensors, torch.randn(4, 24, 12, 12))

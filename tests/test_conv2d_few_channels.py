"""The raw ops for few channels against stock and float64: on a GPU, and on the emulator
(test_emulated.py), where they are the CPU's."""

import pytest
import torch
from compare import assert_no_worse
from torch.nn import functional as F

import dlkernels  # noqa: F401

_EMULATED = torch._C._dispatch_has_kernel_for_dispatch_key(
    "dlkernels::conv2d_few_channels_forward", "CPU"
)
DEVICE = "cpu" if _EMULATED else "cuda"
pytestmark = pytest.mark.skipif(
    not _EMULATED and not torch.cuda.is_available(),
    reason="torch sees no CUDA GPU, and this is not the emulator",
)

forward = torch.ops.dlkernels.conv2d_few_channels_forward
backward = torch.ops.dlkernels.conv2d_few_channels_backward

# id: N, C, H, W; K, R, S; stride, padding
SHAPES = {
    "lenet_first": ((2, 1, 20, 22), (6, 5, 5), (1, 1), (0, 0)),
    "lenet_second": ((3, 6, 14, 14), (16, 5, 5), (1, 1), (0, 0)),
    "stem": ((2, 3, 9, 11), (64, 3, 3), (1, 1), (1, 1)),  # every eight of channels
    "stem_7x7": ((1, 3, 15, 18), (32, 7, 7), (2, 2), (3, 3)),
    "stride_2": ((2, 5, 9, 8), (7, 3, 3), (2, 2), (1, 1)),  # odd channels; phases of two sizes
    "mixed": ((1, 3, 8, 13), (10, 2, 5), (2, 1), (0, 2)),
    "mixed_other": ((1, 3, 13, 8), (10, 5, 4), (1, 2), (2, 0)),
    "1x1": ((2, 16, 5, 7), (24, 1, 1), (1, 1), (0, 0)),
    "1x1_stride_2": ((1, 4, 6, 7), (8, 1, 1), (2, 2), (0, 0)),  # phases without a tap
    "wide": ((1, 2, 5, 150), (9, 3, 3), (1, 1), (1, 1)),  # tiles side by side
    "tall": ((1, 2, 90, 5), (8, 3, 3), (1, 1), (1, 1)),  # tiles one below the other
    "deep": ((1, 16, 6, 9), (40, 7, 7), (1, 1), (3, 3)),  # weights for several blocks
    "wide_padding": ((1, 2, 3, 3), (3, 2, 2), (1, 1), (3, 3)),  # windows of zeros alone
    "many_images": ((37, 1, 6, 6), (4, 3, 3), (1, 1), (0, 0)),  # several to a tile
    "least": ((1, 1, 2, 2), (1, 1, 1), (1, 1), (0, 0)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
ATEN = torch.ops.aten
LAST = torch.channels_last

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
pools = pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])


def problem(shape, dtype=torch.float32, layout=torch.contiguous_format):
    """input, weight, bias, stride and padding."""
    size, (k, r, s), stride, padding = SHAPES[shape]
    x = torch.randn(size, device=DEVICE).to(dtype).contiguous(memory_format=layout)
    w = torch.randn((k, size[1], r, s), device=DEVICE) / (size[1] * r * s) ** 0.5
    w = w.to(dtype).contiguous(memory_format=layout)
    return x, w, torch.randn(k, device=DEVICE).to(dtype), stride, padding


def stock(x, w, b, stride, padding, activation, pool):
    y = ACTIVATIONS[activation](F.conv2d(x, w, b, stride, padding))
    return F.max_pool2d(y, 2) if pool else y


def has_pool(shape):
    size, (_, *kernel), stride, padding = SHAPES[shape]
    at = zip(size[2:], kernel, stride, padding, strict=True)
    return all((n + 2 * p - k) // t + 1 >= 2 for n, k, t, p in at)


def gradient_of_convolution(grad, output, argmax, activation, size):
    """What the convolution's output has: by the derivative and, of a pool, to the largest."""
    y = output.to(grad.dtype)
    d = {
        "none": lambda: grad,
        "relu": lambda: ATEN.threshold_backward(grad, y, 0),
        "leaky_relu": lambda: ATEN.leaky_relu_backward(grad, y, 0.01, True),
        "tanh": lambda: ATEN.tanh_backward(grad, y),
        "sigmoid": lambda: ATEN.sigmoid_backward(grad, y),
    }[activation]()
    if argmax.numel() == 0:
        return d
    whole = d.new_zeros(size)
    rows, columns = d.shape[2:]
    for at in range(4):
        part = whole[:, :, at // 2 : 2 * rows : 2, at % 2 : 2 * columns : 2]
        part.copy_(torch.where(argmax == at, d, 0))
    return whole


def gradients(x, w, stride, padding, grad, output, argmax, activation, dtype):
    """By stock's backward of the convolution, in ``dtype``."""
    x, w, grad = (t.to(dtype) for t in (x, w, grad))
    sizes = F.conv2d(x.to("meta"), w.to("meta"), None, stride, padding).shape
    d = gradient_of_convolution(grad, output, argmax, activation, sizes)
    k = [w.shape[0]]
    return ATEN.convolution_backward(
        d, x, w, k, stride, padding, [1, 1], False, [0, 0], 1, [True] * 3
    )


def check(draw, activation, pool, numbers=300):
    """Ours against stock, of draws until there are so many numbers of the smallest result."""
    seen = {name: ([], [], []) for name in ("output", "input", "weight", "bias")}
    while sum(t.numel() for t in seen["bias"][0]) < numbers:
        x, w, b, stride, padding = draw()
        settings = stride, padding, activation, pool
        output, argmax = forward(x, w, b, *settings)
        exact = (t.double() for t in (x, w, b))
        results = [(output, stock(x, w, b, *settings), stock(*exact, *settings))]
        grad = torch.randn_like(output)
        got = backward(grad, x, w, output, argmax, *settings, True, True, True)
        common = x, w, stride, padding, grad, output, argmax, activation
        wanted = (gradients(*common, dtype) for dtype in (x.dtype, torch.float64))
        results += zip(got, *wanted, strict=True)
        for three, lists in zip(results, seen.values(), strict=True):
            for one, all_of in zip(three, lists, strict=True):
                all_of.append(one)
    for name, three in seen.items():
        assert_no_worse(name, *three)


@pytest.mark.parametrize(
    ("shape", "pool"),
    [(shape, pool) for pool in (False, True) for shape in SHAPES if not pool or has_pool(shape)],
)
@dtypes
def test_shapes(shape, dtype, pool, poisoned):
    check(lambda: problem(shape, dtype), "none", pool, 20 if _EMULATED else 300)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pools
@dtypes
def test_activations(activation, pool, dtype, poisoned):
    check(lambda: problem("stride_2", dtype), activation, pool, 60)


def sliced(x):
    return torch.cat([x, x], 3)[..., : x.shape[3]]


def every_second_image(x):
    return x.repeat_interleave(2, 0)[::2]


def one_image(x):
    return x[:1].expand_as(x)


LAYOUTS = {
    "channels_last": (lambda x: x.contiguous(memory_format=LAST),) * 2,
    "input_channels_last": (lambda x: x.contiguous(memory_format=LAST), lambda x: x),
    "weight_channels_last": (lambda x: x, lambda x: x.contiguous(memory_format=LAST)),
    "sliced": (sliced, sliced),
    "every_second": (every_second_image, every_second_image),
    "expanded": (one_image, lambda x: x),
    "transposed": (lambda x: x.mT.contiguous().mT, lambda x: x.mT.contiguous().mT),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["stem", "lenet_second", "stride_2"])
@pools
def test_layouts(layout, shape, pool, poisoned):
    """The bits of contiguous tensors, in the format that stock's rule asks for."""
    x, w, b, *settings = problem(shape)
    of_x, of_w = LAYOUTS[layout]
    if layout == "expanded":
        x = one_image(x).contiguous()
    y, v = of_x(x), of_w(w)
    settings += ["relu", pool]
    wanted, got = forward(x, w, b, *settings), forward(y, v, b, *settings)
    grad = torch.randn_like(wanted[0])
    last = grad.contiguous(memory_format=LAST)
    back = [
        backward(grad, x, w, *wanted, *settings, True, True, True),
        backward(grad, y, v, *got, *settings, True, True, True),
        backward(last, y, v, *got, *settings, True, True, True),
    ]
    for one, other in ((got, wanted), (back[1], back[0]), (back[2], back[0])):
        for a, c in zip(one, other, strict=True):
            assert torch.equal(a, c)
    stock_format = F.conv2d(y, v, b, *settings[:2]).is_contiguous(memory_format=LAST)
    assert got[0].is_contiguous(memory_format=LAST) == stock_format
    if pool:
        assert got[1].stride() == got[0].stride()
    assert back[1][0].is_contiguous(memory_format=LAST) == y.is_contiguous(memory_format=LAST)
    if layout.endswith("last"):
        assert back[1][1].stride() == v.stride()


@pytest.mark.parametrize("shape", filter(has_pool, SHAPES))
@dtypes
def test_the_pool_is_torchs(shape, dtype):
    """Of the op's own output, which has ties where it is of few bits, and NaN."""
    x, w, b, *settings = problem(shape, dtype)
    x[:, :, ::3, 1::4] = float("nan")
    x[-1] = x[-1].round()
    plain, none = forward(x, w, b, *settings, "relu", False)
    output, argmax = forward(x, w, b, *settings, "relu", True)
    wanted, indices = F.max_pool2d(plain, 2, return_indices=True)
    assert none.shape == (0,) and torch.equal(output.nan_to_num(7), wanted.nan_to_num(7))
    width = plain.shape[3]
    rows, columns = indices // width % 2, indices % width % 2
    assert torch.equal(argmax, (2 * rows + columns).to(torch.uint8))


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)], ids=str)
@pools
def test_only_what_is_wanted(wanted, pool, poisoned):
    x, w, b, *settings = problem("stride_2")
    settings += ["tanh", pool]
    output, argmax = forward(x, w, b, *settings)
    grad = torch.randn_like(output)
    all_of_them = backward(grad, x, w, output, argmax, *settings, True, True, True)
    some = backward(grad, x, w, output, argmax, *settings, *map(bool, wanted))
    for want, one, full in zip(wanted, some, all_of_them, strict=True):
        assert torch.equal(one, full) if want else one.shape == (0,)


def test_the_same_bits_every_time():
    x, w, b, *settings = problem("many_images")
    settings += ["none", True]

    def evaluate():
        output, argmax = forward(x, w, b, *settings)
        grad = torch.ones_like(output) / 3
        return (
            output, argmax, *backward(grad, x, w, output, argmax, *settings, True, True, True)
        )  # fmt: skip

    for a, c in zip(evaluate(), evaluate(), strict=True):
        assert torch.equal(a, c)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
def test_what_no_window_covers_has_no_part(layout):
    """Stride 2 on an even size leaves the last row and column out, tiles reach beyond both."""
    x = torch.randn(2, 3, 10, 12, device=DEVICE).contiguous(memory_format=layout)
    w = torch.randn(5, 3, 3, 3, device=DEVICE)
    x[:, :, 9], x[:, :, :, 11] = float("inf"), float("nan")
    settings = [2, 2], [0, 0], "none", False
    output, argmax = forward(x, w, None, *settings)
    assert output.shape == (2, 5, 4, 5) and output.isfinite().all()
    made = backward(output, x, w, output, argmax, *settings, True, True, True)
    assert all(gradient.isfinite().all() for gradient in made)
    assert (made[0][:, :, 9] == 0).all() and (made[0][:, :, :, 11] == 0).all()


@pools
def test_no_images(pool):
    x, w, b, *settings = problem("stem")
    settings += ["relu", pool]
    output, argmax = forward(x[:0], w, b, *settings)
    assert output.shape == stock(x[:0], w, b, *settings).shape
    made = backward(output, x[:0], w, output, argmax, *settings, True, True, True)
    assert made[0].shape == x[:0].shape and made[1].shape == w.shape
    assert (made[1] == 0).all() and (made[2] == 0).all()


@pools
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
def test_fakes_and_schemas(pool, layout):
    x, w, b, *settings = problem("stride_2", layout=layout)
    settings += ["relu", pool]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward.default, (x, w, b, *settings), test_utils=checks)
    output, argmax = forward(x, w, b, *settings)
    for wanted in ((True, True, True), (False, True, False)):
        arguments = (torch.randn_like(output), x, w, output, argmax, *settings, *wanted)
        torch.library.opcheck(backward.default, arguments, test_utils=checks)


def test_blocks_of_several_tiles():
    """More than 1024 tiles: the weights stay in shared memory from tile to tile."""
    x = torch.randn(1, 1, 2, 32 * 1040 + 5, device=DEVICE)
    w, b = torch.randn(64, 1, 1, 1, device=DEVICE), torch.randn(64, device=DEVICE)
    output, _ = forward(x, w, b, [1, 1], [0, 0], "none", False)
    torch.testing.assert_close(output, F.conv2d(x, w, b))


def test_they_are_raw():
    x, w, b, *settings = problem("least")
    output, _ = forward(x.requires_grad_(), w, b, *settings, "none", False)
    with pytest.raises(NotImplementedError, match="conv2d_few_channels_forward is a raw op"):
        output.sum().backward()


REFUSED = {  # id: arguments that are others, what the message says
    "float64": (lambda t: t.double(), None, {}, "expected input of dtype float32, bfloat16"),
    "dtypes": (None, lambda t: t.half(), {}, "expected weight of dtype Float, got Half"),
    "rank": (lambda t: t[0], None, {}, "expected input of 4 dimensions"),
    "channels": (lambda t: t[:, :2], None, {}, r"expected weight of shape \[K, 2, R, S\]"),
    "stride": (None, None, {"stride": [3, 1]}, r"two strides of 1 to 2, got \[3, 1\]"),
    "padding": (None, None, {"padding": [0, -1]}, "two paddings from 0"),
    "activation": (None, None, {"activation": "gelu"}, "expected activation none, relu"),
    "bias": (None, None, {"bias": 3}, r"expected bias of shape \[64\], got \[3\]"),
    "small input": (lambda t: t[:, :, :1, :1], None, {"padding": [0, 0]}, "no larger than the"),
    "nothing to pool": (
        lambda t: t[:, :, :3, :3],
        None,
        {"padding": [0, 0], "pool": True},
        "expected 2 rows and columns to pool",
    ),
    "large kernel": (None, lambda t: F.pad(t, (0, 5)), {"padding": [9, 9]}, "kernels of 1 to 7"),
    "many out": (None, lambda t: torch.cat([t, t]), {"bias": None}, "1 to 64 out"),
    "many in": (
        lambda t: t.repeat(1, 6, 1, 1),
        lambda t: t.repeat(1, 6, 1, 1),
        {},
        "1 to 16 channels in",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    of_x, of_w, others, message = REFUSED[case]
    x, w, b, stride, padding = problem("stem")
    bias = others.get("bias", b)
    bias = torch.zeros(bias, device=DEVICE) if isinstance(bias, int) else bias
    with pytest.raises(RuntimeError, match=message):
        forward(
            of_x(x) if of_x else x,
            of_w(w) if of_w else w,
            bias,
            others.get("stride", stride),
            others.get("padding", padding),
            others.get("activation", "none"),
            others.get("pool", False),
        )


def test_refusals_of_the_backward():
    x, w, b, *settings = problem("stem")
    output, argmax = forward(x, w, b, *settings, "relu", True)
    rest = *settings, "relu", True, True, True, True
    with pytest.raises(RuntimeError, match="expected grad_output of shape"):
        backward(output[1:], x, w, output, argmax, *rest)
    with pytest.raises(RuntimeError, match="expected output of shape"):
        backward(output, x, w, output[1:], argmax, *rest)
    with pytest.raises(RuntimeError, match="expected argmax of dtype Byte"):
        backward(output, x, w, output, argmax.int(), *rest)
    with pytest.raises(RuntimeError, match="expected argmax of shape"):
        backward(output, x, w, output, argmax[1:], *rest)

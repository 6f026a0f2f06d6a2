"""conv2d on a GPU: Triton's kernels as they are compiled and chosen there.

Against stock in the same dtype and float64, on sizes at which every path is taken: descriptors,
boxes with waste, pointers, phases, groups, splits. The edges are conv2d_interpreted.py's.
"""

import pytest
import torch
from compare import assert_no_worse
from torch.nn import functional as F

import dlkernels
from dlkernels.functional import conv2d, conv_transpose2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAST = torch.channels_last
NAMES = ("output", "grad input", "grad weight", "grad bias")

# name: input, weight, stride, padding, dilation, groups
SHAPES = {
    # ResNet's, at 32 x 32: boxes without waste. 56 x 56: of 8 x 8. 28 x 28 and 7 x 7: pointers.
    "same_64": ((16, 64, 32, 32), (64, 64, 3, 3), 1, 1, 1, 1),
    "same_512": ((32, 512, 4, 4), (512, 512, 3, 3), 1, 1, 1, 1),
    "same_56": ((8, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1, 1),
    "same_28": ((8, 128, 28, 28), (128, 128, 3, 3), 1, 1, 1, 1),
    "same_7": ((8, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1, 1),
    # Enough tiles for the largest: 128 x 256.
    "large": ((64, 256, 32, 32), (256, 256, 3, 3), 1, 1, 1, 1),
    "pointwise": ((16, 256, 14, 14), (1024, 256, 1, 1), 1, 0, 1, 1),
    "pointwise_tail": ((3, 72, 13, 11), (200, 72, 1, 1), 1, 0, 1, 1),
    "pointwise_strided": ((8, 256, 28, 28), (512, 256, 1, 1), 2, 0, 1, 1),
    "strided": ((8, 128, 56, 56), (256, 128, 3, 3), 2, 1, 1, 1),
    "stem": ((8, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1, 1),
    "dilated": ((4, 64, 33, 31), (96, 64, 3, 3), 1, 2, 2, 1),
    "odd": ((5, 37, 29, 23), (53, 37, 5, 3), (2, 3), (1, 4), (2, 1), 1),
    "groups_narrow": ((8, 128, 28, 28), (128, 4, 3, 3), 1, 1, 1, 32),
    "groups_odd": ((4, 35, 19, 17), (42, 5, 3, 3), 2, 1, 1, 7),
    "groups_wide": ((8, 256, 16, 16), (256, 128, 3, 3), 1, 1, 1, 2),
    "depthwise": ((8, 96, 28, 28), (96, 1, 3, 3), 1, 1, 1, 96),
}


def drawn(shape, dtype, format=LAST):
    x, weight = (torch.randn(size, device="cuda") for size in shape[:2])
    x = x.to(dtype).contiguous(memory_format=format)
    weight = weight.div(weight[0].numel() ** 0.5).to(dtype).contiguous(memory_format=format)
    bias = torch.randn(weight.shape[0], device="cuda").to(dtype)
    return [t.requires_grad_() for t in (x, weight, bias)]


def evaluate(function, leaves, settings, d, **named):
    y = function(*leaves, *settings, **named)
    return y, *torch.autograd.grad(y, leaves, d.to(y.dtype))


def doubled(leaves):
    return [t.detach().double().requires_grad_() for t in leaves]


def assert_all(ours, stock, exact):
    for name, *triple in zip(NAMES, ours, stock, exact, strict=True):
        assert_no_worse(name, *triple)


def upstream(function, leaves, settings):
    with torch.no_grad():
        return torch.randn_like(function(*leaves, *settings))


def assert_same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def precision():
    """What float32 is computed in."""
    before = torch.backends.cudnn.conv.fp32_precision

    def choose(word):
        torch.backends.cudnn.conv.fp32_precision = word

    yield choose
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, own, poisoned, precision):
    """Output and gradients; float32 in TF32, as stock's by default."""
    precision("tf32")
    leaves, settings = drawn(SHAPES[name], dtype), SHAPES[name][2:]
    d = upstream(F.conv2d, leaves, settings)
    ours = evaluate(conv2d, leaves, settings, d)
    stock = evaluate(F.conv2d, leaves, settings, d)
    assert_all(ours, stock, evaluate(F.conv2d, doubled(leaves), settings, d))
    for result, other in zip(ours[:3], stock[:3], strict=True):
        assert result.stride() == other.stride()


@pytest.mark.parametrize("name", ["same_56", "odd", "strided", "groups_narrow", "pointwise"])
def test_ieee(name, own, precision):
    """A sum of products of float32 where the user says so: a thousand times nearer than TF32."""
    precision("ieee")
    leaves, settings = drawn(SHAPES[name], torch.float32), SHAPES[name][2:]
    d = upstream(F.conv2d, leaves, settings)
    ours = evaluate(conv2d, leaves, settings, d)
    exact = evaluate(F.conv2d, doubled(leaves), settings, d)
    assert_all(ours, evaluate(F.conv2d, leaves, settings, d), exact)
    assert ((ours[0] - exact[0]).norm() / exact[0].norm()) < 1e-6


@pytest.mark.parametrize("format", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
def test_activations(activation, format, own):
    leaves = drawn(SHAPES["same_28"], torch.bfloat16, format)
    function = F.leaky_relu if activation == "leaky_relu" else getattr(torch, activation)

    def stock(*arguments):
        return function(F.conv2d(*arguments))

    def sure(y):  # away from the kink
        return y.double().abs() > 0.05

    settings = (1, 1)
    d = upstream(stock, leaves, settings)
    d = d * sure(F.conv2d(*leaves, *settings))
    ours = evaluate(conv2d, leaves, settings, d, activation=activation)
    exact = evaluate(stock, doubled(leaves), settings, d)
    assert_all(ours, evaluate(stock, leaves, settings, d), exact)


TRANSPOSED = {
    "generator": ((16, 256, 8, 8), (256, 128, 4, 4), 2, 1),
    "output_padding": ((4, 64, 9, 7), (64, 48, 3, 3), (3, 2), (1, 0), (2, 1)),
    "groups": ((4, 64, 9, 7), (64, 16, 3, 3), 2, 1, 0, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name, dtype, own, poisoned):
    shape = TRANSPOSED[name]
    x, weight, _ = drawn(shape, dtype)
    groups = shape[5] if len(shape) > 5 else 1
    bias = torch.randn(weight.shape[1] * groups, device="cuda").to(dtype).requires_grad_()
    leaves, settings, stock = [x, weight, bias], shape[2:], F.conv_transpose2d
    d = upstream(stock, leaves, settings)
    ours = evaluate(conv_transpose2d, leaves, settings, d)
    exact = evaluate(stock, doubled(leaves), settings, d)
    assert_all(ours, evaluate(stock, leaves, settings, d), exact)


def launchers():
    from dlkernels.kernels import conv2d as kernels

    return kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["same_64", "same_28", "pointwise_tail", "strided", "odd"])
def test_around_the_product(name, dtype, poisoned):
    """Affine and ReLU before, statistics after, residual and ReLU last; the weight's gradient of
    the affine's output."""
    kernels = launchers()
    x, weight, _ = (t.detach() for t in drawn(SHAPES[name], dtype))
    stride, padding, dilation, groups = SHAPES[name][2:]
    pairs = [(n, n) if isinstance(n, int) else n for n in (stride, padding, dilation)]
    settings = kernels.Settings(*pairs, groups)
    scale, offset = (torch.rand(x.shape[1], device="cuda") + 0.5 for _ in range(2))

    def before(x):
        scales = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (scale, offset))
        scale_, offset_ = (t[:, None, None] for t in scales)
        return F.relu(x * scale_ + offset_).to(x.dtype)

    results = []
    for images, weights in ((x, weight), (x.double(), weight.double())):
        leaf = weights.requires_grad_()
        results.append((F.conv2d(before(images), leaf, None, *settings), leaf))
    (stock, leaf), (exact, wide) = results
    residual = torch.randn_like(stock)
    affine = (scale, offset)
    y, (mean, var) = kernels.convolve(
        x, weight.detach(), None, settings, affine=affine, statistics=True
    )
    assert_no_worse("output", y, stock, exact)
    of_stock = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    of_exact = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_no_worse("mean", mean, of_stock[1], of_exact[1])
    assert_no_worse("var", var, of_stock[0], of_exact[0])
    z, _ = kernels.convolve(
        x, weight.detach(), None, settings, "relu", affine=affine, residual=residual
    )
    assert_no_worse("residual", z, F.relu(stock + residual), F.relu(exact + residual))
    d = torch.randn_like(stock)
    dw = kernels.weight_gradient(d, x, weight.shape, settings, affine=affine)
    of_stock = torch.autograd.grad(stock, leaf, d)[0]
    assert_no_worse("grad weight", dw, of_stock, torch.autograd.grad(exact, wide, d.double())[0])


@pytest.mark.parametrize("name", ["same_64", "same_28", "strided", "groups_narrow", "pointwise"])
def test_the_same_bits(name, own):
    leaves, settings = drawn(SHAPES[name], torch.bfloat16), SHAPES[name][2:]
    d = upstream(F.conv2d, leaves, settings)
    first = evaluate(conv2d, leaves, settings, d)
    for _ in range(5):
        assert_same_bits(evaluate(conv2d, leaves, settings, d), first)


@pytest.mark.parametrize("name", ["same_64", "same_28", "strided", "pointwise"])
def test_cuda_graph(name, own):
    """Captured once; replays follow the input, and give the bits of a plain call."""
    leaves, settings = drawn(SHAPES[name], torch.bfloat16), SHAPES[name][2:]
    d = upstream(F.conv2d, leaves, settings)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            evaluate(conv2d, leaves, settings, d)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(conv2d, leaves, settings, d)
    for _ in range(2):
        with torch.no_grad():
            leaves[0].copy_(torch.randn_like(leaves[0]))
        graph.replay()
        assert_same_bits(captured, evaluate(conv2d, leaves, settings, d))


def test_another_stream(own):
    """Input that a side stream is still about to write: right only if the kernels wait on it."""
    leaves, settings = drawn(SHAPES["same_64"], torch.bfloat16), SHAPES["same_64"][2:]
    d = upstream(F.conv2d, leaves, settings)
    fresh = torch.randn_like(leaves[0])
    wanted = evaluate(conv2d, [fresh.clone().requires_grad_(), *leaves[1:]], settings, d)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            leaves[0].copy_(fresh)
        got = evaluate(conv2d, leaves, settings, d)
    side.synchronize()
    assert_same_bits(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
def test_another_current_device(own):
    leaves, settings = drawn(SHAPES["same_64"], torch.bfloat16), SHAPES["same_64"][2:]
    d = upstream(F.conv2d, leaves, settings)
    wanted = evaluate(conv2d, leaves, settings, d)
    others = [t.detach().to("cuda:1").requires_grad_() for t in leaves]
    got = evaluate(conv2d, others, settings, d.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.to("cuda:0") for t in got], wanted)


def test_no_wait_for_the_gpu(own):
    for name in ("same_64", "strided", "groups_narrow"):
        leaves, settings = drawn(SHAPES[name], torch.bfloat16), SHAPES[name][2:]
        d = upstream(F.conv2d, leaves, settings)
        evaluate(conv2d, leaves, settings, d)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            evaluate(conv2d, leaves, settings, d)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def test_choice():
    """In "auto" cuDNN, but for groups in channels_last; "own" is ours; float64 torch's."""
    expected = {"same_64": "stock", "groups_narrow": "triton", "depthwise": "stock"}
    for name, kernel in expected.items():
        leaves, settings = drawn(SHAPES[name], torch.bfloat16), SHAPES[name][2:]
        for kernels, taken in (("auto", kernel), ("own", "triton")):
            dlkernels.config.kernels = kernels
            with dlkernels.config.recording() as choices:
                conv2d(*leaves, *settings)
            assert [choice.kernel for choice in choices] == [taken]
    leaves = doubled(leaves)
    with pytest.raises(NotImplementedError):
        conv2d(*leaves, *settings)


def test_more_than_two_to_the_31_elements():
    """What cuDNN takes a second for: 64 x 128 x 513 x 513, 3 x 3, stride 2. By "auto" ours."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("the images take 14 GiB")
    x = torch.randn((1, 128, 513, 513), device="cuda").bfloat16().expand(64, -1, -1, -1)
    x = x.contiguous(memory_format=LAST).requires_grad_()
    assert x.numel() > 2**31
    weight = (torch.randn(128, 128, 3, 3, device="cuda") / 34).bfloat16().requires_grad_()
    with dlkernels.config.recording() as choices:
        y = conv2d(x, weight, None, 2, 1)
    assert [choice.kernel for choice in choices] == ["triton"]
    d = torch.randn(1, *y.shape[1:], device="cuda").bfloat16()
    dx, dw = torch.autograd.grad(y, (x, weight), d.expand_as(y))
    leaves = [x[:1].detach().requires_grad_(), weight]
    one = F.conv2d(*leaves, None, 2, 1)
    of_one = torch.autograd.grad(one, leaves, d)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = F.conv2d(*wide, None, 2, 1)
    of_exact = torch.autograd.grad(exact, wide, d.double())
    for i in (0, 63):
        assert_no_worse("output", y[i : i + 1], one, exact)
        assert_no_worse("grad input", dx[i : i + 1], of_one[0], of_exact[0])
    assert_no_worse("grad weight", dw, of_one[1] * 64, of_exact[1] * 64)


def test_autocast(own):
    leaves = drawn(SHAPES["same_64"], torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        ours, stock = conv2d(*leaves, 1, 1), F.conv2d(*leaves, 1, 1)
    assert ours.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours, stock, rtol=0.02, atol=0.05)
    assert torch.autograd.grad(ours.float().sum(), leaves[1])[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["same_64", "odd", "groups_odd"])
def test_tiles_by_the_clock(name, own, monkeypatch, tmp_path):
    """Every tile that fits a shape is right, and one of them is taken."""
    kernels = launchers()
    monkeypatch.setattr(kernels, "_AUTOTUNE", True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    leaves, settings = drawn(SHAPES[name], torch.bfloat16), SHAPES[name][2:]
    d = upstream(F.conv2d, leaves, settings)
    exact = evaluate(F.conv2d, doubled(leaves), settings, d)
    stock = evaluate(F.conv2d, leaves, settings, d)
    assert_all(evaluate(conv2d, leaves, settings, d), stock, exact)
    monkeypatch.setattr(kernels, "_AUTOTUNE", False)
    for place in range(6):
        choose = lambda tiles, count, place=place: tiles[place % len(tiles)]  # noqa: E731
        monkeypatch.setattr(kernels, "_first", choose)
        assert_all(evaluate(conv2d, leaves, settings, d), stock, exact)

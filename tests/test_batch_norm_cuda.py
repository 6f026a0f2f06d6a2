"""batch_norm on a GPU: the public function at networks' sizes, and what a CPU does not have.

Paths and edges are test_batch_norm_paths.py's, by `-p tests.on_cuda`.
"""

import pytest
import torch
from compare import assert_no_worse
from torch.nn import functional as F

import dlkernels
from dlkernels.functional import batch_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

LAST = torch.channels_last
FORMATS = {"channels_last": LAST, "contiguous": torch.contiguous_format}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# In one block a channel, in pieces, of planes that are no whole vectors, larger than L2.
SHAPES = {
    "one_block": (64, 256, 8, 8),
    "pieces": (64, 64, 32, 32),
    "deep": (64, 512, 4, 4),
    "cut": (32, 128, 14, 14),
    "odd": (16, 67, 29, 31),
    "large": (64, 64, 112, 112),
}
ACTIVATIONS = {None: lambda x: x, "relu": torch.relu, "tanh": torch.tanh}

shapes = pytest.mark.parametrize("shape", SHAPES)
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def drawn(shape, dtype=torch.bfloat16, format=LAST):
    """x, residual, weight, bias: leaves; running statistics."""
    images = [
        torch.randn(SHAPES[shape], device="cuda").to(dtype).contiguous(memory_format=format)
        for _ in range(2)
    ]
    channels = SHAPES[shape][1]
    weight, bias = torch.rand(channels, device="cuda") + 0.5, torch.randn(channels, device="cuda")
    leaves = [t.requires_grad_() for t in (*images, weight, bias)]
    return leaves, [torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")]


def ours(x, residual, weight, bias, running, training, activation):
    return batch_norm(x, *running, weight, bias, training, residual=residual, activation=activation)


def stock(x, residual, weight, bias, running, training, activation):
    y = F.batch_norm(x, *running, weight, bias, training)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def evaluate(function, leaves, running, training, activation, grad):
    """Output, running statistics, gradients."""
    running = [t.clone() for t in running]
    y = function(*leaves, running, training, activation)
    wanted = [t for t in leaves if t is not None]
    return y, *running, *torch.autograd.grad(y, wanted, grad.to(y.dtype))


def doubled(tensors):
    return [
        t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]


def upstream(leaves, running, training):
    """No gradient where an argument of a ReLU is within rounding of 0."""
    with torch.no_grad():
        before = stock(*doubled(leaves), doubled(running), training, None)
    return torch.randn_like(before) * (before.abs() > 0.05)


def assert_all(*results):
    names = ("output", "running_mean", "running_var", "input", "residual", "weight", "bias")
    for name, *triple in zip(names, *results, strict=True):
        assert_no_worse(name, *triple)


def assert_same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@formats
@shapes
def test_against_stock(shape, format, dtype, training, own, poisoned):
    activation = (None, "relu", "tanh")[(list(SHAPES).index(shape) + DTYPES.index(dtype)) % 3]
    leaves, running = drawn(shape, dtype, format)
    grad = upstream(leaves, running, training)
    settings = (training, activation, grad)
    got = evaluate(ours, leaves, running, *settings)
    assert got[0].is_contiguous(memory_format=format)
    stocks = evaluate(stock, leaves, running, *settings)
    exact = evaluate(stock, doubled(leaves), doubled(running), *settings)
    assert_all(got, stocks, exact)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_module(training, own):
    module = dlkernels.nn.BatchNorm2d(64).cuda().train(training)
    twin = torch.nn.BatchNorm2d(64).cuda().train(training)
    (x, *_), _ = drawn("pieces", torch.float32)
    with dlkernels.config.recording() as choices:
        y = module(x)
    assert [choice.kernel for choice in choices] == [dlkernels.config.owner("cuda")]
    torch.testing.assert_close(y, twin(x))
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


def test_choice():
    leaves, running = drawn("pieces")
    for kernels in ("own", "auto"):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            ours(*leaves, running, True, "relu")
        assert [choice.kernel for choice in choices] == [dlkernels.config.owner("cuda")]


@formats
@shapes
def test_the_same_bits(shape, format, own):
    leaves, running = drawn(shape, format=format)
    grad = torch.randn_like(leaves[0])
    first, second = (evaluate(ours, leaves, running, True, "relu", grad) for _ in range(2))
    assert_same_bits(first, second)


@formats
@shapes
def test_cuda_graph(shape, format, own):
    """Captured once; replays follow the input and the running statistics."""
    leaves, running = drawn(shape, format=format)
    grad = torch.randn_like(leaves[0])

    def step():
        y = ours(*leaves, running, True, "relu")
        return y, *torch.autograd.grad(y, leaves, grad)

    start = [t.clone() for t in running]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            leaves[0].copy_(torch.randn_like(leaves[0]))
            for t, value in zip(running, start, strict=True):
                t.copy_(value)
        graph.replay()
        after = [t.clone() for t in running]
        for t, value in zip(running, start, strict=True):
            t.copy_(value)
        assert_same_bits((*captured, *after), (*step(), *running))


@shapes
def test_another_stream(shape, own):
    """Input that a side stream is still about to write: right only if the kernels wait on it."""
    leaves, running = drawn(shape)
    fresh, grad = torch.randn_like(leaves[0]), torch.randn_like(leaves[0])
    others = [fresh.clone().requires_grad_(), *leaves[1:]]
    wanted = evaluate(ours, others, running, True, "relu", grad)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            leaves[0].copy_(fresh)
        got = evaluate(ours, leaves, running, True, "relu", grad)
    side.synchronize()
    assert_same_bits(got, wanted)


@shapes
def test_no_wait_for_the_gpu(shape, own):
    leaves, running = drawn(shape)
    grad = torch.randn_like(leaves[0])
    evaluate(ours, leaves, running, True, "relu", grad)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(ours, leaves, running, True, "relu", grad)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
@shapes
def test_another_current_device(shape, own):
    leaves, running = drawn(shape)
    grad = torch.randn_like(leaves[0])
    wanted = evaluate(ours, leaves, running, True, "relu", grad)
    moved = [t.detach().to("cuda:1").requires_grad_() for t in leaves]
    statistics = [t.to("cuda:1") for t in running]
    got = evaluate(ours, moved, statistics, True, "relu", grad.to("cuda:1"))
    assert got[0].device == moved[0].device and torch.cuda.current_device() == 0
    assert_same_bits([t.to("cuda:0") for t in got], wanted)


@formats
def test_more_than_two_to_the_31_elements(format, own):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("less than 40 GiB of GPU memory are free")
    shape = (33, 64, 1024, 1024)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=format).normal_()
    x[-1] += 3
    count = x.numel() // 64
    total = sum(image.double().sum((1, 2)) for image in x)
    mean = total / count
    around = [(image.double() - mean.view(-1, 1, 1)).square().sum((1, 2)) for image in x]
    rstd = (sum(around) / count + 1e-5).rsqrt()
    running = [torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")]
    y = batch_norm(x, *running, training=True, momentum=1.0, activation="leaky_relu")
    torch.testing.assert_close(running[0], mean.float())
    for i in (0, 31, 32):
        wanted = (x[i].double() - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1)
        torch.testing.assert_close(y[i], F.leaky_relu(wanted).to(y.dtype))

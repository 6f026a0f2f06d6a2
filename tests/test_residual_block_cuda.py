"""residual_block on a GPU: the public function by Triton's kernels as they are compiled and chosen.

Against torch's functions in the same dtype and float64, on sizes at which every path is taken:
descriptors and pointers, phases, products that make dy as they read, torch's convolutions between
our passes. The edges are residual_block_interpreted.py's.
"""

import pytest
import residual_blocks as blocks
import torch
from compare import assert_no_worse

import dlkernels
from dlkernels.functional import residual_block

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

# name: input, (outputs, filter, stride) of each layer, of the shortcut
BLOCKS = {
    "basic_64": ((16, 64, 32, 32), ((64, 3, 1), (64, 3, 1)), None),
    "basic_512": ((16, 512, 4, 4), ((512, 3, 1), (512, 3, 1)), None),
    "projection": ((16, 64, 32, 32), ((128, 3, 2), (128, 3, 1)), (128, 1, 2)),
    "bottleneck": ((8, 256, 28, 28), ((64, 1, 1), (64, 3, 1), (256, 1, 1)), None),
    "bottleneck_projection": (
        (8, 256, 28, 28),
        ((128, 1, 1), (128, 3, 2), (512, 1, 1)),
        (512, 1, 2),
    ),
    # No power of two anywhere, and the last byte of the signs is not full.
    "odd": ((5, 37, 29, 23), ((53, 3, 1), (61, 3, 2)), (61, 1, 2)),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FEW = ["basic_64", "projection", "bottleneck"]


def drawn(name, dtype):
    return blocks.drawn(*BLOCKS[name], dtype, "cuda")


def upstream(block):
    with torch.no_grad():
        return torch.randn_like(blocks.stock(*block))


def assert_same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def tf32():
    """float32 is computed in TF32, as stock's by default."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def check(block, training):
    stock, exact = blocks.copied(block), blocks.copied(block, torch.float64)
    d = upstream(block)
    results = [
        blocks.evaluate(residual_block, block, d, training),
        blocks.evaluate(blocks.stock, stock, d, training),
        blocks.evaluate(blocks.stock, exact, d, training),
    ]
    for i, triple in enumerate(zip(*results, strict=True)):
        assert_no_worse(f"result {i}", *triple)


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, dtype, training, kernels, poisoned, tf32):
    """Output, every gradient and the running statistics."""
    dlkernels.config.kernels = kernels
    with dlkernels.config.recording() as choices:
        check(drawn(name, dtype), training)
    ((kernel, reason),) = [(choice.kernel, choice.reason) for choice in choices]
    assert kernel == "triton" and reason.startswith("covered: conv1 ")
    if kernels == "own":
        assert "aten" not in reason
    else:
        assert "implicit_gemm" not in reason  # cuDNN's, until ours is measured


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_ieee(training, own):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        check(drawn("bottleneck", torch.float32), training)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_float64():
    check(drawn("projection", torch.float64), True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name, dtype, own, poisoned, tf32):
    """Batch norms in the convolutions' epilogue."""
    block = drawn(name, dtype)
    with torch.no_grad():
        ours, stock = residual_block(*block), blocks.stock(*block)
        exact = blocks.stock(*blocks.copied(block, torch.float64))
    assert_no_worse("output", ours, stock, exact)
    assert ours.stride() == stock.stride()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", FEW)
def test_autocast(name, training, own):
    """Behind another layer under autocast: bfloat16, and the parameters' gradients in float32."""
    x, *layers = drawn(name, torch.float32)
    block = (x.detach().bfloat16().requires_grad_(), *layers)
    stock, exact = blocks.copied(block), blocks.copied(block, torch.float64)
    d = upstream(block)
    with torch.autocast("cuda", torch.bfloat16):
        ours = blocks.evaluate(residual_block, block, d, training)
        other = blocks.evaluate(blocks.stock, stock, d, training)
    true = blocks.evaluate(blocks.stock, exact, d, training)
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16
    assert all(result.dtype == torch.float32 for result in ours[2:])
    for i, triple in enumerate(zip(ours, other, true, strict=True)):
        assert_no_worse(f"result {i}", *triple)


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("name", FEW)
def test_the_same_bits(name, kernels, monkeypatch):
    dlkernels.config.kernels = kernels
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    block = drawn(name, torch.bfloat16)
    d = upstream(block)
    first = blocks.evaluate(residual_block, blocks.copied(block), d, True)
    for _ in range(5):
        assert_same_bits(blocks.evaluate(residual_block, blocks.copied(block), d, True), first)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", FEW)
def test_cuda_graph(name, training, own):
    """Captured once; replays follow the input, and give the bits of a plain call."""
    block = drawn(name, torch.bfloat16)
    d = upstream(block)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            blocks.evaluate(residual_block, block, d, training)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = blocks.evaluate(residual_block, block, d, training)
    for _ in range(2):
        with torch.no_grad():
            block[0].copy_(torch.randn_like(block[0]))
        plain = blocks.copied(block)
        graph.replay()
        assert_same_bits(captured, blocks.evaluate(residual_block, plain, d, training))


def test_no_wait_for_the_gpu(own):
    for name in FEW:
        block = drawn(name, torch.bfloat16)
        d = upstream(block)
        blocks.evaluate(residual_block, block, d, True)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            blocks.evaluate(residual_block, block, d, True)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
def test_another_current_device(own):
    block = drawn("bottleneck", torch.bfloat16)
    d = upstream(block)
    other = blocks.copied(block, device="cuda:1")
    wanted = blocks.evaluate(residual_block, block, d, True)
    got = blocks.evaluate(residual_block, other, d.to("cuda:1"), True)
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.to("cuda:0") for t in got], wanted)

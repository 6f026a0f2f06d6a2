"""cross_entropy on a GPU: what a CPU does not have. The rest is tests/on_cuda.py's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import dlkernels
from dlkernels.functional import cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

ROOT = Path(__file__).resolve().parent.parent

# One shape for each walk: few, rows of a warp, of a block, of a cluster, columns.
WALKS = {
    "few": (300, 21),
    "rows": (64, 1000),
    "rows_of_a_block": (40, 9000),
    "rows_of_a_cluster": (3, 150000),
    "columns": (2, 150, 32, 32),
}


def drawn(shape, dtype=torch.bfloat16):
    x = (3 * torch.randn(shape, device="cuda")).to(dtype).requires_grad_()
    return x, torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")


def evaluate(x, target, factor=0.5, **arguments):
    loss = cross_entropy(x, target, **arguments)
    return loss, torch.autograd.grad(loss * factor, x)[0]


def assert_same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_choice():
    x, target = drawn((64, 100))
    for kernels in ("own", "auto"):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            cross_entropy(x, target)
        assert [choice.kernel for choice in choices] == [dlkernels.config.owner("cuda")]


@pytest.mark.parametrize("walk", WALKS)
def test_cuda_graph(walk, own):
    """Captured once; replays follow the input, and give the bits of a plain call."""
    x, target = drawn(WALKS[walk])
    weight = torch.rand(WALKS[walk][1], device="cuda").to(x.dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            evaluate(x, target, weight=weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(x, target, weight=weight)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(3 * torch.randn_like(x))
            target.random_(0, WALKS[walk][1])
        graph.replay()
        assert_same_bits(captured, evaluate(x, target, weight=weight))


@pytest.mark.parametrize("walk", WALKS)
def test_another_stream(walk, own):
    """Input that a side stream is still about to write: right only if the kernels wait on it."""
    x, target = drawn(WALKS[walk])
    fresh = (3 * torch.randn(x.shape, device="cuda")).to(x.dtype)
    wanted = evaluate(fresh.clone().requires_grad_(), target)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            x.copy_(fresh)
        got = evaluate(x, target)
    side.synchronize()
    assert_same_bits(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
@pytest.mark.parametrize("walk", WALKS)
def test_another_current_device(walk, own):
    x, target = drawn(WALKS[walk])
    wanted = evaluate(x, target)
    y, other = (t.detach().to("cuda:1") for t in (x, target))
    got = evaluate(y.requires_grad_(), other)
    assert got[1].device == y.device and torch.cuda.current_device() == 0
    assert_same_bits([t.to("cuda:0") for t in got], wanted)


def test_no_wait_for_the_gpu(own):
    x, target = drawn((64, 1000))
    evaluate(x, target)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(x, target)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_autocast(own):
    x, target = drawn((8, 100))
    with torch.autocast("cuda", torch.bfloat16):
        ours, stock = cross_entropy(x, target), F.cross_entropy(x, target)
    assert ours.dtype == stock.dtype == torch.float32
    torch.testing.assert_close(ours, stock)
    assert torch.autograd.grad(ours, x)[0].dtype == torch.bfloat16


# Each ends its process: the context is gone.
BAD_TARGETS = {
    **{walk: (shape, shape[1], {}) for walk, shape in WALKS.items()},
    "negative": ((4, 6), -1, {}),
    "ignored_index_does_not_hide_others": ((4, 6), -100, {"ignore_index": 2}),
    "weighted": ((1500, 100), 100, {"weight": True}),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_a_target_out_of_range(case):
    shape, bad, options = BAD_TARGETS[case]
    code = f"""
import torch, dlkernels
from dlkernels.functional import cross_entropy
dlkernels.config.kernels, options = "own", {options!r}
x = torch.randn({shape!r}, device="cuda", requires_grad=True)
if options.pop("weight", False):
    options["weight"] = torch.rand(x.shape[1], device="cuda")
target = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.int64, device="cuda")
cross_entropy(x, target, **options)
torch.cuda.synchronize()
print("a good target passes", flush=True)
target.view(-1)[-1] = {bad}
cross_entropy(x, target, **options)
torch.cuda.synchronize()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "a good target passes" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr[-2000:]

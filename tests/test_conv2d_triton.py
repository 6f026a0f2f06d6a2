"""conv2d's Triton kernels without a GPU: interpreted, and compiled.

Interpreted: conv2d_interpreted.py, in a process of its own. Compiled: what the launchers launch,
taken down on tensors without memory, for each tile of each table: tensor cores, no spills, shared
memory within the architecture's limit.
"""

from pathlib import Path

import interpreter
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: no kernel is compiled"
)

from test_triton import compile_kernel, local_memory  # noqa: E402

from dlkernels.kernels import conv2d as kernels  # noqa: E402

TESTS = Path(__file__).resolve().parent
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a block may have
TILES = [(*key, i) for key, tiles in kernels._TILES.items() for i in range(len(tiles))]


def test_interpreted():
    interpreter.run(TESTS.parent, "tests/conv2d_interpreted.py")


def test_kernels_take_what_the_schemas_say(monkeypatch):
    ops = {"conv2d", "conv2d_forward", "conv2d_backward", "conv2d_algorithm"}
    ops |= {"conv2d_prepare", "conv2d_prepared"}
    ops |= {"conv_transpose2d", "conv_transpose2d_forward", "conv_transpose2d_backward"}
    assert interpreter.registered(kernels, monkeypatch) == ops


# --------------------------------------------------------------------------------------- compiled


def image(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


@pytest.fixture
def taken_down(monkeypatch):
    """For an architecture, and of each table the tile of that place: the launches of a call."""
    launches = []

    def launch(kernel, grid, *arguments, warps=4, stages=None, **constants):
        assert grid > 0
        launches.append((kernel, arguments, warps, False, constants, stages))

    monkeypatch.setattr(kernels, "launch", launch)

    def run(function, *arguments, arch=90, tile=None, **named):
        launches.clear()
        monkeypatch.setattr(kernels, "_device", lambda index: (arch, 132))
        if tile is not None:
            monkeypatch.setattr(kernels, "_first", lambda tiles, count: tile)
        function(*arguments, **named)
        return list(launches)

    return run


def check_compiled(launch, arch, precision, folder):
    """Compiles; returns its PTX and constants."""
    *launch, stages = launch
    kernel, constants = launch[0], launch[4]
    compiled = compile_kernel(*launch, arch, stages)
    what = f"{kernel.__name__} {constants}"
    assert local_memory(compiled, folder) == 0, f"spills: {what}"
    assert compiled.metadata.shared <= SHARED[arch], what
    ptx = compiled.asm["ptx"]
    if kernel.__name__ not in ("_add_up", "_merge"):
        mma = "wgmma.mma_async" if arch == 90 else "mma.sync"
        assert (mma in ptx) == (precision != "ieee"), what
    return ptx, constants


DTYPES = {"half": (torch.bfloat16, torch.float16), "tf32": (torch.float32,)}
DTYPES["ieee"] = DTYPES["tf32"]


@pytest.mark.parametrize(("kind", "arch", "precision", "place"), TILES)
def test_tiles(kind, arch, precision, place, taken_down, tmp_path):
    """Every configuration: with pointers, and where there are any with descriptors; with what comes
    before and after the product. 16 bits are in turn bfloat16 and float16."""
    tile = kernels._TILES[kind, arch, precision][place]
    dtype = DTYPES[precision][place % len(DTYPES[precision])]
    described = arch == 90 and precision != "ieee"
    exact = precision == "ieee"
    a, b = (128, tile.columns) if kind == "convolve" else (256, tile.rows)
    x, weight, back = (image(s, dtype) for s in ((8, a, 32, 32), (b, a, 3, 3), (a, b, 3, 3)))
    y, half = image((8, b, 32, 32), dtype), image((8, b, 16, 16), dtype)
    one = torch.empty(a, dtype=torch.float32, device="meta")
    bias = torch.empty(b, dtype=dtype, device="meta")
    strided, same = kernels.Settings((2, 2), (1, 1)), kernels.Settings((1, 1), (1, 1))
    affine = {"affine": (one, one)}
    pointers, boxes = [], []
    if kind == "weight":
        pointers = [(kernels.weight_gradient, (half, x, weight.shape, strided, exact), affine)]
        if described:
            boxes = [(kernels.weight_gradient, (y, x, weight.shape, same, exact), {})]
    else:
        extra = affine | {"statistics": tile.elements() <= kernels._SUMMED}
        forward = (kernels.convolve, (x, weight, None, strided, "none", exact), extra)
        backward = (kernels.input_gradient, (x, back.transpose(0, 1), y.shape, same, exact), {})
        phases = (kernels.input_gradient, (half, weight, x.shape, strided, exact), {})
        after = (kernels.convolve, (x, weight, bias, same, "tanh", exact), {"residual": y})
        if described:
            pointers = [forward] if tile.columns < 256 else []
            boxes = [(after, backward)[place % 2]]
        else:
            pointers = [(forward, phases)[place % 2]]
    if precision == "tf32" and boxes and pointers:  # in turn
        pointers, boxes = (pointers, []) if place % 2 else ([], boxes)
    assert pointers or boxes
    for i, (function, arguments, named) in enumerate(pointers + boxes):
        boxed = i >= len(pointers)
        launches = taken_down(function, *arguments, **named, arch=arch, tile=tile)
        ptx, constants = check_compiled(launches[0], arch, precision, tmp_path)
        assert constants["BM"] == tile.rows
        assert constants["BOXED"] == (boxed and tile.columns >= 64), constants
        assert ("cp.async.bulk.tensor" in ptx) >= boxed


SHAPES = {
    # Whole networks' kinds: what is beside the tables' tiles.
    "pointwise": ((32, 256, 14, 14), (512, 256, 1, 1), kernels.Settings()),
    "groups": ((4, 128, 28, 28), (128, 4, 3, 3), kernels.Settings((1, 1), (1, 1), (1, 1), 32)),
    "strided": ((4, 128, 28, 28), (128, 128, 3, 3), kernels.Settings((2, 2), (1, 1))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, taken_down, tmp_path):
    """For sm_90, as they are chosen: three products, with 16 bytes a load where channels allow."""
    sizes, weights, settings = SHAPES[shape]
    x, weight = image(sizes, torch.bfloat16), image(weights, torch.bfloat16)
    y, _ = kernels.convolve(x[:0], weight, None, settings)
    d = image((sizes[0], *y.shape[1:]), torch.bfloat16)
    for launches in (
        taken_down(kernels.convolve, x, weight, None, settings),
        taken_down(kernels.input_gradient, d, weight, x.shape, settings),
        taken_down(kernels.weight_gradient, d, x, weight.shape, settings),
    ):
        ptx, constants = check_compiled(launches[0], 90, "half", tmp_path)
        if shape == "pointwise":
            assert constants["BOXED"] and "cp.async.cg" not in ptx
        else:
            # 4 channels of a group: 8 bytes.
            size = "0x8" if shape == "groups" else "0x10"
            assert f", {size}" in ptx


@pytest.mark.parametrize("kind", ["convolve", "weight"])
def test_boxes_are_read_where_they_lie(kind, taken_down, tmp_path):
    """Both operands of the product by descriptors: no thread loads one, or moves it."""
    x, weight = (image(s, torch.bfloat16) for s in ((8, 256, 32, 32), (256, 256, 3, 3)))
    same = kernels.Settings((1, 1), (1, 1))
    if kind == "convolve":
        launches = taken_down(kernels.convolve, x, weight, None, same)
    else:
        launches = taken_down(kernels.weight_gradient, x, x, weight.shape, same)
    *launch, stages = launches[0]
    compiled = compile_kernel(*launch, 90, stages)
    assert "local_load" not in compiled.asm["ttgir"]
    assert "ld.global" not in compiled.asm["ptx"] and "cp.async.cg" not in compiled.asm["ptx"]

"""residual_block's Triton kernels without a GPU: interpreted, and compiled.

Interpreted: residual_block_interpreted.py, in a process of its own. Compiled: what the launchers
launch, taken down on tensors without memory: tensor cores, no spills, shared memory within the
architecture's limit, whole vectors in the passes.
"""

import interpreter
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: no kernel is compiled"
)

from test_conv2d_triton import TESTS, check_compiled, image  # noqa: E402
from test_triton import VECTOR, compile_kernel, local_memory  # noqa: E402

from dlkernels.kernels import conv2d  # noqa: E402
from dlkernels.kernels import residual_block as kernels  # noqa: E402

PLAIN = ((1, 1), (1, 1), (1, 1), 1)
STRIDED = ((2, 2), (1, 1), (1, 1), 1)
POINTWISE = ((1, 1), (0, 0), (1, 1), 1)


def test_interpreted():
    interpreter.run(TESTS.parent, "tests/residual_block_interpreted.py")


def test_kernels_take_what_the_schemas_say(monkeypatch):
    stages = ("convolution", "finalize", "output", "folded", "reduce", "coefficients", "gradient")
    ours = {f"residual_block_{stage}" for stage in stages}
    assert interpreter.registered(kernels, monkeypatch) == ours


# --------------------------------------------------------------------------------------- compiled


@pytest.fixture
def taken_down(monkeypatch):
    """For an architecture: the launches of a raw op, each as compile_kernel takes it."""
    launches = []

    def launch(kernel, grid, *arguments, warps=4, stages=None, **constants):
        assert grid > 0
        launches.append((kernel, arguments, warps, False, constants, stages))

    for module in (kernels, conv2d):
        monkeypatch.setattr(module, "launch", launch)

    def run(function, *arguments, arch=90):
        launches.clear()
        monkeypatch.setattr(conv2d, "_device", lambda index: (arch, 132))
        function(*arguments)
        return {launch[0].__name__: launch for launch in launches}

    return run


def numbers(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def signs(x):
    n, c, p, q = x.shape
    return numbers(n, p, q, (c + 7) // 8, dtype=torch.uint8)


def gradient(x, weight, settings, layer, exact=False):
    """The arguments of a gradient: behind a layer, or with a shortcut that is added."""
    size = conv2d._output_size(x, weight, conv2d.Settings(*settings))
    y = image((x.shape[0], weight.shape[0], *size), x.dtype)
    k, c = (numbers(t.shape[1]) for t in (y, x))
    before = (c,) * 4 if layer else (None,) * 4
    skip = (None, None) if layer else (x, signs(x))
    coefficients = numbers(3, y.shape[1])
    return (
        y, signs(y), y, k, coefficients, x, *before, weight, *settings, *skip, exact, True, True,
        True,
    )  # fmt: skip


# What a training step of the basic block and of the bottleneck launches, each kernel once: images,
# weight, settings, whether behind a layer. The tiles beside these are test_conv2d_triton.py's.
STEPS = {
    "basic": ((64, 128, 16, 16), (128, 128, 3, 3), PLAIN, True),
    "first": ((64, 64, 32, 32), (64, 64, 3, 3), PLAIN, False),
    "strided": ((64, 64, 32, 32), (128, 64, 3, 3), STRIDED, True),
    "bottleneck": ((32, 64, 56, 56), (256, 64, 1, 1), POINTWISE, True),
    "bottleneck_first": ((32, 256, 56, 56), (64, 256, 1, 1), POINTWISE, False),
}
MACHINES = [
    *((name, torch.bfloat16, arch, False) for name in STEPS for arch in (90, 80)),
    ("basic", torch.float16, 90, False),
    *(("bottleneck", torch.float32, arch, exact) for arch in (90, 80) for exact in (False, True)),
]


@pytest.mark.parametrize(("name", "dtype", "arch", "exact"), MACHINES, ids=str)
def test_products(name, dtype, arch, exact, taken_down, tmp_path):
    shape, weights, settings, layer = STEPS[name]
    x, weight = image(shape, dtype), image(weights, dtype)
    precision = "half" if dtype.itemsize == 2 else "ieee" if exact else "tf32"
    pair = (numbers(shape[1]),) * 2 if layer else (None, None)
    forward = taken_down(
        kernels._convolution, x, *pair, weight, None, None, *settings, True, exact, True, arch=arch
    )
    backward = taken_down(
        kernels._gradient, *gradient(x, weight, settings, layer, exact), arch=arch
    )
    for launch in (forward["_convolve"], backward["_convolve"], backward["_weight_gradient"]):
        ptx, constants = check_compiled(launch, arch, precision, tmp_path)
        if arch == 90 and precision == "half" and name.startswith("bottleneck"):
            assert "cp.async.bulk.tensor" in ptx, constants
    assert "_merge" in forward and ("_blend" in backward) == (weights[2] > 1 or exact)
    assert ("_add_up" in backward) or not layer


@pytest.mark.parametrize("arch", [80, 90])
def test_folded(arch, taken_down, tmp_path):
    x, weight = image((64, 128, 16, 16), torch.bfloat16), image((128, 128, 3, 3), torch.bfloat16)
    launches = taken_down(
        kernels._folded,
        x,
        weight,
        None,
        *(numbers(128),) * 2,
        x,
        *PLAIN,
        True,
        False,
        True,
        arch=arch,
    )
    check_compiled(launches["_convolve"], arch, "half", tmp_path)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes(dtype, arch, taken_down, tmp_path):
    """No spills, and 16 bytes at a time: of images of 72 channels too, no multiple of 16."""
    x = image((32, 72, 28, 28), dtype)
    sums = numbers(72, dtype=torch.promote_types(dtype, torch.float32))
    strided = numbers(72, 2)[:, 0]
    found = [
        taken_down(kernels._output, x, sums, sums, x, sums, sums, True, arch=arch),
        taken_down(kernels._reduce_gradient, x, signs(x), x, *(sums, sums, x, sums, sums)),
        taken_down(kernels._run_statistics, x),
        taken_down(
            kernels._finalize_statistics, sums, sums, 9.0, sums, sums, strided, strided, 0.1, 1e-5
        ),
        taken_down(kernels._coefficients_of, sums, sums, 9.0, sums, sums, True),
    ]
    compiled = set()
    for *launch, stages in (launch for launches in found for launch in launches.values()):
        kernel, constants = launch[0], launch[4]
        name = kernel.__name__
        binary = compile_kernel(*launch, arch, stages)
        assert local_memory(binary, tmp_path) == 0, f"{name} spills"
        assert binary.metadata.shared <= 48 << 10, name
        compiled.add(name)
        if name in ("_blend", "_reduce", "_statistics"):
            accesses = VECTOR.findall(binary.asm["ptx"])
            images = {"_blend": 2, "_reduce": 3, "_statistics": 1}[name]
            vectors = constants["ROWS"] * constants["BLOCK"] * dtype.itemsize // (4 * 32 * 16)
            assert accesses.count("ld") >= images * vectors > 0, name
            assert accesses.count("st") >= (vectors if name == "_blend" else 0), name
    assert {"_blend", "_reduce", "_statistics", "_merge", "_add_up"} < compiled
    assert {"_finalize", "_coefficients"} < compiled

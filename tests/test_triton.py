"""The Triton kernels without a GPU: interpreted under the tests of their op, and compiled.

Interpreted: a copy of the package whose CPU library is empty, and our Triton kernels on the CPU's
dispatch key, in a process of its own. Compiled: what the host entries launch, taken down on tensors
without memory, for each architecture: no spills, shared memory within limits, whole vectors.
"""

import re
import subprocess
import sys

import interpreter
import pytest
import torch
from compare import assert_no_worse
from test_instruction_sets import draw_few
from torch.nn import functional as F

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: no kernel is compiled"
)

PLUGIN = r"""
import re

# An op of the interpreter takes 40 µs whatever its size, on one thread. What is left holds every
# layout with every dtype, every reduction and every option, forward, with the gradient ahead and
# backward; it leaves out some combinations of them, some variants of gradcheck in two of its three
# shapes, and the two billion elements, for which test_offsets stands in. Draws are few.
LEFT_OUT = re.compile(
    r"weights_ignored.*-(sum|none-0\.0|mean-0\.1)-|softcap_and_z_loss.*-(sum|none-i|mean-p)"
    r"|gradgradcheck.*(\(5, 7\)|3\)-(plain|sum|none|softcap|z_loss))|same_bits.*many|two_to_the_31"
)


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if LEFT_OUT.search(item.nodeid)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
"""

# Memory that is not touched costs nothing: 4 GiB of bfloat16 of which two rows are written.
OFFSETS = """\
import torch
from compare import assert_no_worse
from torch.nn import functional as F

from dlkernels.functional import cross_entropy


def check(x, own):
    for i in range(2):
        x[i] = torch.randn(x[i].shape)
    target = torch.randint(x.shape[1], (2, *x.shape[2:]))
    results = []
    for function, leaf in (
        (cross_entropy, x.detach()),
        (F.cross_entropy, x.detach()),
        (F.cross_entropy, x.double()),
    ):
        loss = function(leaf.requires_grad_(), target, reduction="sum")
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    for name, triple in zip(("loss", "grad input"), zip(*results)):
        assert_no_worse(name, *triple)


def test_rows(own):
    check(torch.empty(2**31 + 600, dtype=torch.bfloat16).as_strided((2, 500), (2**31 + 50, 1)), own)


def test_classes(own):
    memory = torch.empty(2**31 + 600, dtype=torch.bfloat16)
    check(memory.as_strided((2, 3, 100), (200, 2**30 + 8, 1)), own)
"""


def test_cross_entropy_interpreted(tmp_path):
    interpreter.copy_with_twins(tmp_path, "cross_entropy", PLUGIN)
    (tmp_path / "tests" / "test_offsets.py").write_text(OFFSETS)
    draw_few(tmp_path)
    names = ("is_loaded", "offsets", "cross_entropy")
    interpreter.run(tmp_path, "-p", "triton_on_cpu", *(f"tests/test_{n}.py" for n in names))


# --------------------------------------------------------------------------------------- compiled

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = dict(zip(DTYPES, ["fp32", "fp64", "bf16", "fp16"], strict=True))
NAMES |= {torch.int64: "i64", torch.uint8: "u8"}
SHAPES = {
    "rows": (4096, 1000),  # 2000 bytes in 16 bits: whole vectors, though not divisible by 16
    "a_row_a_program": (4096, 4096),
    "chunks": (2048, 32000),
    "columns": (8, 19, 512, 1024),
    "columns_in_chunks": (4, 2000, 64, 64),
}
VECTOR = re.compile(r"\b(ld|st)\.global(?:\.\w+|::\w+)*\.(?:v4\.b32|v2\.b64)\b")


def taken_down(monkeypatch, shape, dtype, everything, backward):
    """The launches of the raw ops on a shape: (kernel, arguments, warps, asserts, constants)."""
    from dlkernels.kernels import cross_entropy as kernels

    launches = []

    def launch(kernel, grid, *arguments, warps=4, asserts=False, **constants):
        launches.append((kernel, arguments, warps, asserts, constants))

    def empty(shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(kernels, "launch", launch)
    rows = (shape[0], *shape[2:])
    x = empty(shape, dtype)
    target = x if everything else empty(rows, torch.int64)
    weight = empty(shape[1], dtype) if everything else None
    options = (1, -100, 0.1, 30.0, 1e-4) if everything else (1, -100, 0.0, 0.0, 0.0)
    if backward:
        lse, scalar = empty(rows, torch.float64), empty((), torch.float64)
        arguments = (empty((), dtype), lse, x, target, weight, lse, scalar, *options)
        kernels._cross_entropy_backward(*arguments)
    else:
        *_, gradient = kernels._cross_entropy_forward_backward(x, target, weight, *options)
        kernels._cross_entropy_scale_(gradient, empty((), dtype))
    return launches


def compile_kernel(kernel, arguments, warps, asserts, constants, capability, stages=None):
    """As a launch would, with memory that is aligned to 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature, attributes = {}, {}
    constants = dict(constants)
    for at, name in enumerate(kernel.arg_names):
        value = arguments[at] if at < len(arguments) else None
        if torch.is_tensor(value):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp64"
        elif value is not None:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if stages is not None:
        options["num_stages"] = stages
    if asserts:
        options |= {"debug": True, "sanitize_overflow": False}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def local_memory(compiled, folder):
    """Bytes of stack and local memory: what does not fit in registers, and what calls need."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (used,) = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    return sum(map(int, used))


def check_compiled(launch, dtype, capability, folder):
    kernel, arguments, warps, asserts, constants = launch
    compiled = compile_kernel(*launch, capability)
    name = kernel.__name__
    assert local_memory(compiled, folder) == 0 or asserts, f"{name} spills"  # to assert is a call
    assert compiled.metadata.shared <= 48 << 10, name
    ptx = compiled.asm["ptx"]
    # By inline assembly or a flag of the user's nothing would be checked.
    is_index = name == "_finish" and constants["KIND"] != 2
    assert ("__assertfail" in ptx) == is_index, name
    if name in ("_forward", "_backward"):
        elements = constants["ROWS"] * constants["BLOCK"]
        vectors = elements * dtype.itemsize // (warps * 32 * 16)
        found = VECTOR.findall(ptx)
        assert found.count("ld") >= vectors > 0 and found.count("st") >= vectors, name
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("everything", [False, True], ids=["indices", "everything"])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled(shape, everything, dtype, monkeypatch, tmp_path):
    """Every kernel, for sm_90: no spills, and 16 bytes at a time."""
    compiled = set()
    for backward in (False, True):
        for launch in taken_down(monkeypatch, SHAPES[shape], dtype, everything, backward):
            compiled.add(check_compiled(launch, dtype, 90, tmp_path))
    assert {"_forward", "_backward", "_finish", "_scale"} <= compiled
    assert ("_total" in compiled) == (shape.startswith("columns"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 100])
def test_compiled_for_other_architectures(capability, dtype, monkeypatch, tmp_path):
    for everything in (False, True):
        for launch in taken_down(monkeypatch, SHAPES["rows"], dtype, everything, everything):
            check_compiled(launch, dtype, capability, tmp_path)


# --------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu(shape, dtype):
    """Loss and gradient against stock's, whoever owns the dispatch key here."""
    from dlkernels.kernels import cross_entropy as kernels

    shape = (16, *SHAPES[shape][1:2], *(min(n, 40) for n in SHAPES[shape][2:]))
    x = torch.randn(shape, device="cuda").to(dtype)
    target = torch.randint(shape[1], (16, *shape[2:]), device="cuda")
    results = []
    for leaf in (x.detach(), x.double()):
        loss = F.cross_entropy(leaf.requires_grad_(), target)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    options = (1, -100, 0.0, 0.0, 0.0)
    loss, lse, total, gradient = kernels._cross_entropy_forward_backward(x, target, None, *options)
    upstream = torch.ones((), dtype=dtype, device="cuda")
    again = kernels._cross_entropy_backward(upstream, None, x, target, None, lse, total, *options)
    for name, ours, stock, exact in zip(
        ("loss", "grad input"), (loss, gradient), *results, strict=True
    ):
        assert_no_worse(name, ours, stock, exact)
    assert_no_worse("grad input of backward", again, results[0][1], results[1][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_a_target_out_of_range_on_a_gpu():
    """As stock's: an assertion on the device, which ends the process's use of it."""
    code = (
        "import torch\n"
        "from dlkernels.kernels import cross_entropy as kernels\n"
        "x, target = torch.randn(4, 6, device='cuda'), torch.full((4,), 7, device='cuda')\n"
        "kernels._cross_entropy_forward(x, target, None, 1, -100, 0.0, 0.0, 0.0)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr[-2000:]

"""batch_norm's Triton kernels without a GPU: interpreted under test_batch_norm_paths.py, compiled.

As test_triton.py does with cross_entropy's.
"""

import interpreter
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: no kernel is compiled"
)

from test_triton import DTYPES, VECTOR, compile_kernel, local_memory  # noqa: E402

from dlkernels.kernels import batch_norm as kernels  # noqa: E402

# An op of the interpreter takes 40 µs whatever its size: each path in each width of float, each
# part and option once. The emulator has every combination.
TESTS = (
    "is_loaded or (test_training and (float32 or (float16 and not pieces)))"
    " or (test_given and float32 and not pieces) or (test_parts and float16 and odd)"
    " or (test_training and float64 and odd_channels) or (test_wanted and channels and 01)"
    " or (test_activations and residual and planes and not cut) or test_no_values or test_refusals"
    " or (test_the_sign and to_the_bit and cut_planes)"
    " or test_values or (test_constants and not pieces)"
)
SLOW = "one_column or several_blocks"  # many draws, many programs


def test_interpreted(tmp_path):
    interpreter.copy_with_twins(tmp_path, "batch_norm")
    part = f"({TESTS}) and not ({SLOW})"
    files = ["tests/test_is_loaded.py", "tests/test_batch_norm_paths.py"]
    interpreter.run(tmp_path, "-p", "triton_on_cpu", "-k", part, *files)


def test_kernels_take_what_the_schemas_say(monkeypatch):
    names = [n.removeprefix("dlkernels::") for n in torch._C._dispatch_get_all_op_names()]
    ours = {n for n in names if n.startswith("batch_norm")}
    assert interpreter.registered(kernels, monkeypatch) == ours


# --------------------------------------------------------------------------------------- compiled

# shape, channels_last
SHAPES = {
    "channels": ((64, 64, 32, 32), True),
    "many_channels": ((32, 1000, 7, 7), True),  # 2000 bytes in 16 bits: whole vectors
    "planes": ((64, 64, 32, 32), False),
    "small_planes": ((32, 512, 8, 8), False),
    "vectors": ((4096, 256), False),
}


def taken_down(monkeypatch, shape, dtype, activation):
    """The launches of forward, eval and backward, as compile_kernel takes them."""
    launches = []

    def launch(kernel, grid, *arguments, warps=4, **constants):
        assert grid > 0
        launches.append((kernel, arguments, warps, False, constants))

    monkeypatch.setattr(kernels, "launch", launch)
    size, last = SHAPES[shape]
    format = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(size, dtype=dtype, device="meta", memory_format=format)
    one = torch.empty(size[1], dtype=kernels._wide(x), device="meta")
    kept = x if activation in ("tanh", "sigmoid") else None
    residual = None if activation == "none" else x
    settings = (1e-5, activation, True)
    kernels._batch_norm_forward(x, one, one, residual, one, one, 0.1, *settings)
    saved = (x, x, one, one, kept, one, one)
    kernels._batch_norm_backward(*saved, True, *settings, True, True, True, True)
    if activation == "none":  # eval, and its gradients
        kernels._batch_norm_apply(x, one, one, residual, one, one, *settings)
        kernels._batch_norm_backward(*saved, False, *settings, True, False, True, False)
    return launches


def check_compiled(launch, dtype, capability, folder):
    kernel, _, warps, _, constants = launch
    compiled = compile_kernel(*launch, capability)
    name = f"{kernel.__name__} {constants}"
    assert local_memory(compiled, folder) == 0, f"spills: {name}"
    assert compiled.metadata.shared <= 48 << 10, name
    if "BLOCK" not in constants:
        return
    vectors = constants["ROWS"] * constants["BLOCK"] * dtype.itemsize // (warps * 32 * 16)
    found = VECTOR.findall(compiled.asm["ptx"])
    assert found.count("ld") >= vectors > 0, name
    if kernel is not kernels._sums:
        assert found.count("st") >= vectors, name


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled(shape, monkeypatch, tmp_path):
    """Every kernel, for sm_90: no spills, and 16 bytes at a time."""
    dtype = torch.float32 if shape == "vectors" else torch.bfloat16
    launches = taken_down(monkeypatch, shape, dtype, "relu")
    names = {launch[0].__name__ for launch in launches}
    assert names == {"_sums", "_statistics", "_apply", "_gradients", "_gradient"}
    for launch in launches:
        check_compiled(launch, dtype, 90, tmp_path)


@pytest.mark.parametrize("place", range(4), ids=lambda i: str(DTYPES[i]))
def test_compiled_for_sm_80(place, monkeypatch, tmp_path):
    """Each dtype with another activation, the two layouts in turn."""
    dtype, activation = DTYPES[place], ("sigmoid", "leaky_relu", "none", "tanh")[place]
    shape = ("planes", "channels")[place % 2]
    for launch in taken_down(monkeypatch, shape, dtype, activation):
        check_compiled(launch, dtype, 80, tmp_path)

"""lstm's Triton kernels without a GPU: interpreted under test_lstm_paths.py, compiled.

As test_triton.py does with cross_entropy's.
"""

import interpreter
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: no kernel is compiled"
)

from test_triton import DTYPES, compile_kernel, local_memory  # noqa: E402

from dlkernels.kernels import lstm as kernels  # noqa: E402

# A launch of the interpreter takes milliseconds: each mode, what is packed or projected, few draws.
TESTS = (
    "is_loaded or refusals or nothing_to_do or empty_cell or (test_wanted and gru) or one_gradient"
    " or (test_training and units_left_over and float32) or (test_cells and blocks and float32)"
    " or (test_training and units_left_over and (bfloat16 or float64) and lstm)"
    " or (test_training and float32 and packed_without_bias and (lstm or gru))"
    " or (test_training and float32 and projected_packed and lstm)"
)


def test_interpreted(tmp_path):
    interpreter.copy_with_twins(tmp_path, "lstm")
    files = ["tests/test_is_loaded.py", "tests/test_lstm_paths.py"]
    interpreter.run(tmp_path, "-p", "triton_on_cpu", "-k", TESTS, *files)


def test_kernels_take_what_the_schemas_say(monkeypatch):
    parts = [f"lstm{part}{way}" for part in ("", "_cell") for way in ("_forward", "_backward")]
    assert interpreter.registered(kernels, monkeypatch) == set(parts)


# --------------------------------------------------------------------------------------- compiled


def test_a_row_of_another_alignment_compiles_nothing():
    for kernel in (kernels._step, kernels._gradient):
        read = [parameter for parameter in kernel.params if not parameter.is_constexpr]
        anew = [p.name for p in read if not p.do_not_specialize_on_alignment]
        assert read and not anew


def taken_down(monkeypatch, mode, dtype):
    """The launches of a layer of one step and of a cell, as compile_kernel takes them."""
    launches = []

    def launch(kernel, grid, *arguments, warps=4, **constants):
        assert grid > 0
        launches.append((kernel, arguments, warps, False, constants))

    monkeypatch.setattr(kernels, "launch", launch)

    def meta(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    gates, cx = kernels._GATES[mode] * 64, None if mode != "lstm" else meta(1, 8, 64)
    weights = [meta(gates, 32), meta(gates, 64), meta(gates), meta(gates)]
    given = (meta(1, 8, 32), None, meta(1, 8, 64), cx, weights)
    output, h_n, c_n, *saved = kernels._forward(*given, mode, True, True)
    grads = (output, h_n, None if cx is None else c_n)
    kernels._backward(*grads, *given, output, *saved, mode, True, True, True, True)
    given = (meta(8, 32), meta(8, 64), None if cx is None else cx[0], *weights)
    h, c, gates = kernels._cell_forward(*given, mode, True, True)
    kernels._cell_backward(h, None, *given, h, c, gates, mode, True, True, True, True)
    return launches


@pytest.mark.parametrize("mode", kernels._GATES)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled(capability, mode, monkeypatch, tmp_path):
    """No spills; each mode in another dtype."""
    place = (list(kernels._GATES).index(mode) + (capability == 90)) % 4
    launches = taken_down(monkeypatch, mode, DTYPES[place])
    assert {launch[0].__name__ for launch in launches} == {"_step", "_gradient"}
    assert len(launches) == 4
    for launch in launches:
        compiled = compile_kernel(*launch, capability)
        name = f"{launch[0].__name__} {launch[4]}"
        assert local_memory(compiled, tmp_path) == 0, f"spills: {name}"
        assert compiled.metadata.shared <= 48 << 10, name

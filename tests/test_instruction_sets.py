"""The CPU libraries that this machine does not choose by itself, under tests of the ops.

Each runs in a copy of the package that holds this one library, in a process of its own, with torch
limited to the same instructions.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import (
    EMULATED,
    NAMES,
    OPS,
    ROOT,
    compile_library,
    skip_if_unable,
    torch_libraries,
    words,
)

import dlkernels

# Every shape in every dtype (conv2d's arithmetic of float16 is that of bfloat16), second
# derivatives, several threads.
TESTS = (
    "not residual_block and not (lstm and (float64 or (float16 and not bfloat16))) and ("
    "(test_index_targets and mean) or test_a_second_backward or same_bits or is_loaded"
    " or (test_shapes and not (conv2d and (no_bias or float16))"
    " and not (batch_norm and (float16 or pieces))) or test_layouts"
    " or test_activations or test_packed"
    " or (test_linear_index_targets and mean and not no_bias) or test_linear_softcap"
    " or (test_transposed_shapes and not float16) or test_transposition_of"
    " or test_the_gradient_of_a_bias or test_running_statistics_are or test_statistics)"
    " or residual_block and ("
    "stage and not (aten or float16 or opcheck) or statistics_of"
    " or test_shapes and float32 and training and (tiles_left_over or projection_with_tails))"
)
# Of a library that differs from the widest by its products of bf16 alone, which these ops lack.
NO_PRODUCTS = ("batch_norm", "cross_entropy")
TESTS_OF_PRODUCTS = (
    "is_loaded or (bfloat16 and (same_bits or test_layouts or test_transposed_shapes"
    " or (test_shapes and not no_bias) or (test_linear_index_targets and mean and not no_bias)"
    " or (stage and not opcheck)))"
)
WIDEST = dlkernels.config.libraries["cpu"]
CAPABILITY = {"plain": "default", "avx2": "avx2"}  # ATEN_CPU_CAPABILITY
IS_LOADED = """\
import dlkernels


def test_is_loaded():
    assert dlkernels.__file__.startswith({folder!r})
    with open("/proc/self/maps") as lines:
        libraries = [line.split()[-1] for line in lines if "libdlkernels" in line]
    assert set(libraries) == {{{library!r}}}
"""
FEW_DRAWS = """

_check = check


def check(draw, stock=F.cross_entropy, factor=2.0, rows=300):
    return _check(draw, stock, factor if rows <= 8 else 2 * factor, min(rows, 8))
"""


def draw_few(folder: Path) -> None:
    """In a copy: a case of cross_entropy is drawn until it has 8 rows, not 300; for slow kernels.

    Of few rows stock has luck: the factor of tests/compare.py is twice as wide where rows are left
    out.
    """
    with open(folder / "tests" / "test_cross_entropy.py", "a") as file:
        file.write(FEW_DRAWS)


def copy_package(folder: Path, name: str) -> Path:
    """The package and the tests; returns where its one library, called plain, is to be written.

    The loader takes a library of that name whatever ATEN_CPU_CAPABILITY says.
    """
    for part in ("dlkernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "lib")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    library = folder / "dlkernels" / "lib" / "libdlkernels_cpu_plain.so"
    library.parent.mkdir()
    note = json.loads((ROOT / "dlkernels" / "lib" / "build.json").read_text())
    note |= {"cpu": {"plain": {"isa": words(name), "flags": ""}}, "cuda": None}
    (library.parent / "build.json").write_text(json.dumps(note))
    text = IS_LOADED.format(folder=str(folder), library=str(library))
    (folder / "tests" / "test_is_loaded.py").write_text(text)
    return library


@pytest.mark.parametrize("name", NAMES)
def test_ops(name, tmp_path):
    skip_if_unable(name)
    if name == WIDEST:
        pytest.skip(f"{name} is the library that all tests run on here")
    if name in EMULATED and set(words(name.removesuffix("_emulated"))) <= dlkernels._cpu_features():
        pytest.skip(f"{name}: this CPU runs the library itself")
    library = copy_package(tmp_path, name)
    if name in EMULATED:
        sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        compile_library(name, sources, library, "-O1", *torch_libraries())
    else:
        shutil.copy(ROOT / "dlkernels" / "lib" / f"libdlkernels_cpu_{name}.so", library)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if name in CAPABILITY:
        environment["ATEN_CPU_CAPABILITY"] = CAPABILITY[name]
    tests, ops = TESTS, OPS
    if set(words(WIDEST)) - set(words(name)) == {"avx512bf16"}:
        tests, ops = TESTS_OF_PRODUCTS, [op for op in OPS if op not in NO_PRODUCTS]
    files = ["tests/test_is_loaded.py", *(f"tests/test_{op}.py" for op in ops)]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", tests, *files],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " failed" not in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]

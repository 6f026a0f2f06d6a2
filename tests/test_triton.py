"""The Triton kernels without a GPU: interpreted under all tests of their op, and compiled.

Interpreted: a copy of the package whose CPU library is empty, and our Triton kernels on the CPU's
dispatch key, in a process of its own. Compiled: what the host entries launch, taken down on tensors
without memory, for each architecture: no spills, shared memory within limits, whole vectors.
"""

import os
import subprocess
import sys

import pytest
from instruction_sets import compile_library
from test_instruction_sets import copy_package

pytest.importorskip("triton", reason="Triton is not installed")

# The interpreter patches triton.language at each launch and at each call of a device function, two
# thirds of its time here. Patched once, for good, in a process that does nothing else with it.
PLUGIN = """\
import triton.runtime.interpreter as interpreter

patch, patched = interpreter._patch_lang, []


class Scope:
    def restore(self):
        pass


def patch_once(function):
    if not any(seen is function.__globals__ for seen in patched):
        patched.append(function.__globals__)
        patch(function)
    return Scope()


interpreter._patch_lang = patch_once

from dlkernels.kernels import cross_entropy

cross_entropy.register("CPU")
"""


def test_cross_entropy_interpreted(tmp_path):
    library = copy_package(tmp_path, "plain")
    source = tmp_path / "empty.cpp"
    source.write_text("")
    compile_library("plain", [source], library)
    (tmp_path / "triton_on_cpu.py").write_text(PLUGIN)
    files = ["tests/test_is_loaded.py", "tests/test_cross_entropy.py"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "triton_on_cpu", "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " failed" not in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]

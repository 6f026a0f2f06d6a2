"""Triton's kernels under its interpreter, in a process of its own; and what they register."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch
from instruction_sets import compile_library
from test_instruction_sets import copy_package

PLUGIN = """\
import tests.patched_once
from dlkernels.kernels import {op}

{op}.register("CPU")
"""


def copy_with_twins(folder: Path, op: str, more: str = "") -> None:
    """A copy of the package in ``folder`` whose CPU library is empty, with an op's Triton kernels
    on the CPU's dispatch key; ``more`` goes into the plugin that registers them."""
    library = copy_package(folder, "plain")
    source = folder / "empty.cpp"
    source.write_text("")
    compile_library("plain", [source], library)
    (folder / "triton_on_cpu.py").write_text(PLUGIN.format(op=op) + more)


def run(folder: Path, *arguments: str) -> None:
    """pytest under the interpreter: all that is chosen passes, and nothing is skipped."""
    options = ["-n0", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
    assert " failed" not in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]


def registered(kernels, monkeypatch) -> set[str]:
    """The raw ops that a module of ``dlkernels.kernels`` registers, each with its schema's
    arguments."""
    taken = {}
    monkeypatch.setattr(kernels, "register_kernels", lambda named, key: taken.update(named))
    kernels.register("CUDA")
    for name, kernel in taken.items():
        schema = getattr(torch.ops.dlkernels, name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert names == list(inspect.signature(kernel).parameters), name
    return set(taken)

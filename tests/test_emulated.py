"""The CUDA kernels under the tests of their ops, on a CPU.

One library is made of csrc/cuda and the emulator of tests/cuda_on_cpu, registered for the CPU, and
put into a copy of the package in place of the CPU library. Each run is a process of its own; every
fault that the emulator finds is an exception of the op.
"""

import os
import re
import shutil
import subprocess
import sys

import emulator
import pytest
from instruction_sets import ROOT, torch_libraries
from test_instruction_sets import copy_package, draw_few
from torch.utils.cpp_extension import include_paths

LOADED, OP, PATHS, DATA = (
    f"test_{name}.py"
    for name in ("is_loaded", "cross_entropy", "cross_entropy_paths", "torch_data")
)
# (compute capability, seed of the schedule): files, and which of their tests. Once everything; then
# what another schedule and a GPU without clusters may change, in few draws.
RUNS = {
    ("90", "1"): ([LOADED, OP, PATHS], None),
    ("90", "2"): (
        [LOADED, PATHS, DATA],
        "not linear and not conv and"
        " (is_loaded or paths or forward_and_gradients or noncontiguous or references)",
    ),
    ("80", "3"): (
        [LOADED, OP, PATHS],
        "is_loaded or paths or (test_index_targets and mean) or test_refusals_of_raw_ops",
    ),
}

# Tests that are left out, and why.
LEFT_OUT = {
    "test_cross_entropy.py::test_more_than_two_to_the_31_elements": "2^31 logits take minutes here;"
    " test_offsets_beyond_two_to_the_31 has such offsets with few logits between",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Of every kernel file, as for the GPU."""
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for path in include_paths():
        flags += ["-isystem", path]
    target = tmp_path_factory.mktemp("emulated") / "libdlkernels_emulated.so"
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return emulator.build(target, sources, flags, torch_libraries())


@pytest.mark.parametrize(("capability", "seed"), RUNS)
def test_cross_entropy(capability, seed, library, tmp_path):
    files, part = RUNS[capability, seed]
    run(capability, seed, library, tmp_path, files, part)


@pytest.mark.parametrize(("capability", "seed"), [("90", "1"), ("80", "2")])
def test_conv2d_few_channels(capability, seed, library, tmp_path):
    run(capability, seed, library, tmp_path, [LOADED, "test_conv2d_few_channels.py"])


# Once everything; in another schedule each path of each pass.
@pytest.mark.parametrize(
    ("seed", "part"), [("1", None), ("2", "is_loaded or test_training or test_given or test_parts")]
)
def test_batch_norm(seed, part, library, tmp_path):
    run("90", seed, library, tmp_path, [LOADED, "test_batch_norm_paths.py"], part)


# The whole loop in one launch by clusters, by a grid's own barrier on a GPU that holds little, and
# step by step where nothing fits.
LSTM = {
    "clusters": ("90", "1", {}, "not float64 and not project and (bfloat16 or not float16)"),
    "grid": (
        "80",
        "2",
        {"MULTIPROCESSORS": "16", "SHARED": "12"},
        "not float64 and not project and not float16",
    ),
    "steps": (
        "80",
        "3",
        {"MULTIPROCESSORS": "0"},
        "is_loaded or float64 or project or wanted or strides",
    ),
}


@pytest.mark.parametrize("form", LSTM)
def test_lstm(form, library, tmp_path):
    capability, seed, device, part = LSTM[form]
    device = {f"DLKERNELS_EMULATED_{name}": value for name, value in device.items()}
    files = [LOADED, "test_lstm_paths.py"]
    run(capability, seed, library, tmp_path, files, part, device)


def run(capability, seed, library, tmp_path, files, part=None, device=None):
    """Runs the tests in a copy of the package whose one library is the emulator's."""
    shutil.copy(library, copy_package(tmp_path, "plain"))
    if part:
        draw_few(tmp_path)
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-rs"]
    command += ["--hypothesis-seed=0", *(["-k", part] if part else [])]
    command += [f"--deselect=tests/{name}" for name in LEFT_OUT]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in files)],
        cwd=tmp_path,
        env={
            **os.environ,
            **(device or {}),
            "DLKERNELS_EMULATED_CC": capability,
            "DLKERNELS_EMULATED_SEED": seed,
            "OMP_NUM_THREADS": "1",  # torch's own: the fibers are one thread
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert not re.search(r"failed|skipped|error|xfailed", summary), done.stdout[-2000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 100, summary

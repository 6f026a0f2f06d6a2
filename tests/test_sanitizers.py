"""Part of the suite under AddressSanitizer and UBSan, and faults planted to show that they see.

The plain library runs beside the widest that this CPU has: loads and stores under a mask, with
which the wider ones end a row, are single instructions that the compiler does not instrument.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from instruction_sets import OPS
from test_instruction_sets import draw_few
from torch.utils.cpp_extension import include_paths

import dlkernels

ROOT = Path(dlkernels.__file__).resolve().parent.parent
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
CXX = os.environ.get("CXX", "g++")
WIDEST = dlkernels.config.libraries["cpu"]

# Every walk, kind of target, dtype, and end of a row, with few of the combinations.
WALKS = "rows_65 or rows_three_chunks or transposed_tail or columns_many_blocks or offset"
PARTS = {
    "test_index_targets": f"({WALKS} or unbatched or permuted) and mean",
    "test_weights_ignored_rows_smoothing_probabilities": f"({WALKS}) and none and 0.1",
    "test_softcap_and_z_loss": "(rows_65 or transposed_tail or columns_many_blocks) and sum",
    "test_lse": "float16",
    "test_special": "-inf",
    "test_leading_classes": "",
    "test_all_rows_ignored": "",
    "test_weights_are_never_read": "",
    "test_empty": "",
    "test_gradient_of_probabilities": "",
    "test_a_second_backward": "not residual_block",
    "test_refusals": "",
    "test_uint8": "",
    "test_the_same_bits": "not residual_block",
    "test_four_threads": "not residual_block",
    # Of linear and conv2d: every shape in each arithmetic, every layout of memory.
    "test_shapes": (
        "no_bias or ((max_pool2d or lstm) and float32) or (batch_norm and not (float16 or pieces))"
    ),
    "test_layouts": "not residual_block",
    # Of lstm.
    "test_packed": "float32",
    # Of batch_norm.
    "test_some_of_the_parameters": "",
    "test_the_steps_between": "relu",
    "test_statistics_of": "not pieces",
    # Of conv2d.
    "test_transposed_shapes": "not float16",
    "test_transposition_of": "",
    "test_an_empty_batch": "",
    "test_the_gradient_of_a_bias": "",
    # Of linear_cross_entropy: every way of its chunks, in each arithmetic.
    "test_linear_index_targets": "none and not no_bias and not ranges_in_place",
    "test_the_loss_without_gradients": "float32",
    "test_linear_weights_ignored_rows": "(in_place or positions or ranges) and none and 0.1",
    "test_linear_special": "-inf",
    "test_linear_only_the_wanted": "positions",
    "test_linear_empty": "",
    "test_a_target_out_of_range": "",
    # Of residual_block: every stage by every algorithm of its convolution.
    "stage": "residual_block and not (aten or float16 or opcheck)",
    "statistics_of": "residual_block",
}

# Loop bounds that are wrong by one, each in a walk of its own: the header, the line as it stands,
# the line with the fault, the test that meets it, and what is to be reported. The first writes one
# element beyond the last row where the classes lack one to whole vectors, the second beyond an
# array; the third reads one beyond the last row.
FAULTS = {
    "row_written_too_far": (
        "cross_entropy_rows.h",
        "  for (; c + V::size <= n; c += V::size) {\n    __builtin_prefetch(gradient",
        "  for (; c + V::size <= n + 1; c += V::size) {\n    __builtin_prefetch(gradient",
        "test_index_targets and rows_three_chunks and float32 and mean",
        "ERROR: AddressSanitizer: heap-buffer-overflow",
    ),
    "tile_filled_too_far": (
        "cross_entropy_columns.h",
        "for (int64_t k = 0; k < kPiece<T>; ++k)\n          piece[k] =",
        "for (int64_t k = 0; k <= kPiece<T>; ++k)\n          piece[k] =",
        "test_index_targets and transposed_tail and float32 and mean",
        r"cross_entropy_columns\.h:\d+:\d+: runtime error: (store to address|index)",
    ),
    "image_transposed_too_far": (
        "layout.h",
        "std::min(kSize, r1 - r), ",
        "std::min(kSize, r1 - r + 1), ",
        "test_layouts and weight_offset and float32",
        "ERROR: AddressSanitizer: heap-buffer-overflow",
    ),
    "last_terms_of_a_dot_product": (
        "gemm.h",
        "if (p < end) step(p, end - p), p = end;",
        "if (p < end) step(p, end - p + 1), p = end;",
        "test_shapes and below_a_tile and float32 and no_bias",
        "ERROR: AddressSanitizer: heap-buffer-overflow",
    ),
}
# Of the widest library: what has loops of its own beside those of gemm.h and simd.h is long to
# compile, and is seen in the plain one.
WIDE = ("cross_entropy.cpp", "linear.cpp", "linear_cross_entropy.cpp", "lstm.cpp")
FAULTY = ("conv2d.cpp", "cross_entropy.cpp", "linear.cpp")  # what those tests run


def runtime(name: str) -> str:
    """The path of the compiler's libasan.so or libubsan.so; skips the test where there is none."""
    if not shutil.which(shlex.split(CXX)[0]):
        pytest.skip(f"no C++ compiler: {CXX!r} is not on PATH")
    asked = [*shlex.split(CXX), f"-print-file-name={name}"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():  # the compiler repeats a name that it does not find
        pytest.skip(f"{CXX} has no {name}")
    return path


def make(folder: Path, isa: str, csrc: Path, names=("*.cpp",), optimize="-O1") -> Path:
    """A copy of the package in ``folder`` whose one library is ``csrc`` sanitized, of the files
    that are named; and the tests.

    -O1: a full optimisation takes minutes. It rounds otherwise than the libraries that are
    delivered, and the rule of tests/compare.py has no room for that: its factor is 4 times wider.
    """
    ignored = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "dlkernels", folder / "dlkernels", ignore=ignored)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    with open(folder / "tests" / "compare.py", "a") as file:
        file.write(
            "\n\n_no_worse = assert_no_worse\n\n\n"
            "def assert_no_worse(name, ours, stock, exact, factor=2.0):\n"
            "    _no_worse(name, ours, stock, exact, 4 * factor)\n"
        )
    draw_few(folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    how = dlkernels._build["cpu"][isa]
    # torch's headers from the torch that runs, wherever they were at the build.
    flags = re.sub(r"-isystem \S+", "", how["flags"]).replace("-O3", optimize).split()
    flags += [word for path in include_paths() for word in ("-isystem", path)]
    flags += [*SANITIZE.split(), "-fno-omit-frame-pointer", "-g1"]
    link = [f"-L{Path(torch.__file__).parent}/lib", "-Wl,--no-as-needed"]
    link += ["-ltorch", "-ltorch_cpu", "-lc10"]
    library = folder / "dlkernels" / "lib" / f"libdlkernels_cpu_{isa}.so"
    library.parent.mkdir()
    sources = sorted(str(path) for name in names for path in (csrc / "cpu").glob(name))
    command = [*shlex.split(CXX), *flags, "-shared", *sources, *link, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    note = {"torch": torch.__version__, "sources": {}, "cpu": {isa: how}, "cuda": None}
    (library.parent / "build.json").write_text(json.dumps(note))
    return folder


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Name -> folder of the copy: "plain" and the widest, and "faulty", which is plain."""
    runtime("libasan.so"), runtime("libubsan.so")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("dlkernels is installed from a wheel")
    faulty = tmp_path_factory.mktemp("faulty_source") / "csrc"
    shutil.copytree(ROOT / "csrc", faulty)
    for name, right, wrong, *_ in FAULTS.values():
        header = faulty / "cpu" / name
        text = header.read_text()
        assert text.count(right) == 1, f"not once in {name}: {right}"
        header.write_text(text.replace(right, wrong))
    jobs = {WIDEST: (WIDEST, ROOT / "csrc", WIDE), "plain": ("plain", ROOT / "csrc")}
    jobs["faulty"] = "plain", faulty, FAULTY, "-O0"  # a third of the time to compile
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        futures = {
            name: pool.submit(make, tmp_path_factory.mktemp(name), *job)
            for name, job in jobs.items()
        }
        return {name: future.result() for name, future in futures.items()}


def run_suite(folder: Path, selection: str, ops=OPS) -> subprocess.CompletedProcess:
    """pytest of the copy's tests of some ops, the sanitizers' runtimes loaded first."""
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
        # Leaks: Python's own are many. ODR: torch's libraries share names.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        "PYTEST_ADDOPTS": "",
        "OMP_WAIT_POLICY": "passive",  # threads that wait leave the cores to others
    }
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-s", "-p", "no:cacheprovider"]
    command += [*(f"tests/test_{op}.py" for op in ops), "-k", selection]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", dict.fromkeys(["plain", WIDEST]))
def test_the_suite_has_nothing_to_report(isa, builds):
    parts = [f"({name} and ({rest}))" if rest else name for name, rest in PARTS.items()]
    ops = OPS if isa == "plain" else [name.removesuffix(".cpp") for name in WIDE]
    done = run_suite(builds[isa], " or ".join(parts), ops)
    output = done.stdout + done.stderr
    assert "Sanitizer" not in output and "runtime error" not in output, output[-6000:]
    assert done.returncode == 0, output[-6000:]
    assert int(re.search(r"(\d+) passed", output)[1]) > 100


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault, builds):
    *_, selection, report = FAULTS[fault]
    done = run_suite(builds["faulty"], selection)
    assert done.returncode not in (0, 5), done.stdout + done.stderr  # 5: nothing was selected
    assert re.search(report, done.stderr), done.stdout[-3000:] + done.stderr[:3000]
    assert re.search("dlkernels::(cross_entropy|gemm|layout)::", done.stderr)

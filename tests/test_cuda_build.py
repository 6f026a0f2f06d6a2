"""What nvcc makes of csrc/cuda: resources of each kernel, its SASS, and what the library stands on.

Nothing here needs a GPU. Beside each kernel its limits are written, for every instantiation of it:

    // ptxas: <= 64 registers, 0 bytes static shared, 0 spills

Spills are bytes, stores and loads together.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths

import dlkernels

ROOT = Path(dlkernels.__file__).resolve().parent.parent
LIBRARY = ROOT / "dlkernels" / "lib" / "libdlkernels_cuda.so"
BUILT = dlkernels._build["cuda"]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

needs_library = pytest.mark.skipif(BUILT is None, reason="no CUDA library is built: no nvcc")
needs_source = pytest.mark.skipif(not SOURCES, reason="dlkernels is installed from a wheel")

BOUNDS = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?"
KERNEL = re.compile(rf"\bDLK_KERNEL\s+void\s+{BOUNDS}(\w+)\s*\(")
LIMITS = re.compile(
    r"^// ptxas: <= (\d+) registers, (\d+) bytes static shared, (\d+) spills$", re.MULTILINE
)
ARCHS = ("sm_80", "sm_90a")  # what the limits were written for

# Every kernel reads and writes global memory by 16 bytes, but for these: what they lack, and why.
NARROW = {
    r"rows_kernel<.*, \(Pass\)0, .*>": ("STG", "forward alone writes one number a row"),
    r"columns_kernel<.*, false>": ("LDG STG", "positions that do not lie in whole vectors"),
    r"totals_kernel<.*>": ("LDG STG", "adds the sums of blocks"),
    r"weights_kernel<.*>": ("LDG STG", "gathers by target, and adds"),
    r"(sums|apply)_kernel<\(Walk\)1, .*>": ("LDG STG", "channels that are no whole vectors"),
    r"convolve_kernel<.*>": ("LDG", "rows with their border begin anywhere; channels are few"),
    r"weight_gradient_kernel<.*>": ("LDG STG", "as convolve; writes a row of a kernel a thread"),
    r"step_(forward|backward)_kernel<.*>": ("LDG STG", "a unit a thread: a few kilobytes a launch"),
    r"before_kernel<.*>": ("LDG STG", "rows of any alignment, once a backward"),
    r"offsets_kernel": ("LDG STG", "writes what its parameters hold"),
    r"(unprojected|sum)_kernel<.*>": ("LDG STG", "of projections and cells: as the steps"),
    r"add_pieces_kernel<.*>": ("LDG STG", "a number a thread, 128 bytes a warp"),
}


class Use(NamedTuple):
    """Of one kernel, or its limits."""

    registers: int
    shared: int
    spills: int


def limits(source: str) -> dict[str, Use | None]:
    """Kernel -> what is written above it, in the same paragraph; None where nothing is."""
    found = {}
    for kernel in KERNEL.finditer(source):
        written = LIMITS.findall(source[source.rfind("\n\n", 0, kernel.start()) : kernel.start()])
        found[kernel[1]] = Use(*map(int, written[0])) if len(written) == 1 else None
    return found


def uses(ptxas: str) -> dict[tuple[str, str], Use]:
    """(demangled name, architecture) of each kernel -> what it uses, from ``ptxas -v``."""
    found: dict[tuple[str, str], Use] = {}
    for part in re.split(r"Compiling entry function ", demangled(ptxas))[1:]:
        name, arch = re.match(r"'(.+)' for '(\w+)'", part).groups()
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[short(name), arch] = Use(
            int(re.search(r"Used (\d+) registers", part)[1]),
            int(shared[1]) if shared else 0,
            sum(int(number) for pair in spills for number in pair),
        )
    return found


def violations(source: str, ptxas: str) -> list[str]:
    """What is wrong: kernels over their limits, or without any."""
    allowed, used = limits(source), uses(ptxas)
    found = [f"{name}: no limits are written above it" for name in allowed if not allowed[name]]
    for (name, arch), use in used.items():
        limit = allowed.get(name.partition("<")[0], Use(0, 0, 0))
        if limit and arch in ARCHS:
            found += [
                f"{name} for {arch}: {got} {what}, limit {most}"
                for what, got, most in zip(Use._fields, use, limit, strict=True)
                if got > most
            ]
    compiled = {name.partition("<")[0] for name, _ in used}
    return found + [f"{name}: not compiled" for name in allowed if name not in compiled]


def demangled(text: str) -> str:
    if not shutil.which("c++filt"):
        pytest.skip("no c++filt on PATH")
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return done.stdout


def short(name: str) -> str:
    """``rows_kernel<float, true>``, of the whole signature."""
    name = name.replace("(anonymous namespace)::", "").replace("dlkernels::", "")
    name = name.removeprefix("void ")
    depth = [name.count("<", 0, at) - name.count(">", 0, at) for at in range(len(name))]
    ends = [at for at in range(len(name)) if name[at] == "(" and depth[at] == 0]
    return name[: ends[0]] if ends else name


def compile_source(source: Path, folder: Path) -> str:
    """Compiles with the build's own flags; returns what nvcc and ptxas say."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if not nvcc:
        pytest.skip("no nvcc" + (f" in CUDA_HOME={home}" if home else " on PATH"))
    # torch's headers from the torch that runs, wherever they were at the build.
    flags = shlex.split(re.sub(r"-isystem \S+", "", BUILT["flags"]))
    for path in include_paths():
        flags += ["-isystem", path]
    command = [nvcc, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stderr


@pytest.fixture(scope="module")
def ptxas(tmp_path_factory):
    """Source -> what ptxas said of it: at the build, where that was of these sources and here."""
    sources = dlkernels._build["sources"]
    stale = [name for name in sources if dlkernels._digest(name) != sources[name]]
    note, kept = LIBRARY.with_name("build.json"), ROOT / "build" / "build.json"
    folder = tmp_path_factory.mktemp("cuda")
    if not stale and kept.is_file() and kept.read_bytes() == note.read_bytes():
        return {
            source: (ROOT / "build" / "cuda" / f"{source.stem}.o.ptxas").read_text()
            for source in SOURCES
        }
    return {source: compile_source(source, folder) for source in SOURCES}


def tool(name: str) -> str:
    """cuobjdump, of Triton's wheel or of a toolkit."""
    triton = find_spec("triton")
    places = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton else []
    found = [shutil.which(name, path=str(place)) for place in places] + [shutil.which(name)]
    if not any(found):
        pytest.skip(f"no {name}: it comes with Triton, or with CUDA")
    return next(filter(None, found))


def output(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sass():
    """(kernel, architecture) -> its instructions that read or write global memory, loads from any
    memory and products of matrix units, in their order."""
    found: dict[tuple[str, str], list[str]] = {}
    text = output(tool("cuobjdump"), "-sass", LIBRARY)
    for code in re.split(r"\bcode for (?=sm_)", text)[1:]:
        for function in code.split("Function : ")[1:]:
            place = function.split(maxsplit=1)[0], code.split(maxsplit=1)[0]
            found[place] = re.findall(r" ((?:LDGSTS|LDG|LD|STG|HMMA)\.[\w.]+)", function)
    names = demangled("\n".join(name for name, _ in found)).splitlines()
    return {
        (short(name), arch): instructions
        for name, ((_, arch), instructions) in zip(names, found.items(), strict=True)
    }


# ------------------------------------------------------------------------------------- resources


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_have_limits(source):
    found = limits(source.read_text())
    assert found and not [name for name in found if not found[name]]


@needs_library
@needs_source
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_keep_their_limits(source, ptxas):
    archs = {arch for _, arch in uses(ptxas[source])}
    if not archs & set(ARCHS):
        pytest.skip(f"built for {', '.join(sorted(archs))} alone")
    found = violations(source.read_text(), ptxas[source])
    assert not found, "\n".join(found)


PLANTED = """\
#include <cuda_runtime.h>
#define DLK_KERNEL __global__
namespace dlkernels {
namespace {

// ptxas: <= 64 registers, 0 bytes static shared, 0 spills
template <typename T>
DLK_KERNEL void within_kernel(T* x) {
  x[threadIdx.x] += 1;
}

// Says nothing of ptxas: <= 64 registers.
DLK_KERNEL void silent_kernel(float* x) {
  x[threadIdx.x] += 1;
}

// ptxas: <= 64 registers, 512 bytes static shared, 0 spills
DLK_KERNEL void __launch_bounds__(256, 1)
    shared_kernel(float* x) {
  __shared__ float y[256];
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = y[255 - threadIdx.x];
}

// ptxas: <= 32 registers, 0 bytes static shared, 0 spills
template <int N>
DLK_KERNEL void __launch_bounds__(1024, 2) spilling_kernel(float* x) {
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i * 1024 + threadIdx.x] = y[N - 1 - i];
}

enum class Kind { kSome };
constexpr int threads(int n) { return n; }

// ptxas: <= 16 registers, 0 bytes static shared, 0 spills
template <int N, Kind kKind>
DLK_KERNEL void __launch_bounds__(threads(64), 1) greedy_kernel(float* x) {
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i * 1024 + threadIdx.x] = y[N - 1 - i];
}

// ptxas: <= 64 registers, 0 bytes static shared, 0 spills
template <typename T>
DLK_KERNEL void unused_kernel(T* x) {}

}  // namespace

void use(float* x) {
  within_kernel<float><<<1, 32>>>(x);
  silent_kernel<<<1, 32>>>(x);
  shared_kernel<<<1, 32>>>(x);
  spilling_kernel<64><<<1, 32>>>(x);
  greedy_kernel<4, Kind::kSome><<<1, 32>>>(x);
  greedy_kernel<40, Kind::kSome><<<1, 32>>>(x);
}

}  // namespace dlkernels
"""


@needs_library
def test_planted_kernels_over_their_limits_are_found(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    found = violations(PLANTED, compile_source(source, tmp_path))
    assert found[0] == "silent_kernel: no limits are written above it"
    assert found[-1] == "unused_kernel: not compiled"
    over = {re.sub(r"\d+ (\w+), limit", r"\1, limit", line) for line in found[1:-1]}
    archs = {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in BUILT["archs"]}
    assert over == {
        line
        for arch in archs & set(ARCHS)
        for line in (
            f"shared_kernel for {arch}: shared, limit 512",
            f"spilling_kernel<64> for {arch}: spills, limit 0",
            f"greedy_kernel<40, (Kind)0> for {arch}: registers, limit 16",
        )
    }


# ------------------------------------------------------------------------------------------- SASS


@needs_library
def test_the_library_has_code_for_every_architecture():
    listed = output(tool("cuobjdump"), "-lelf", "-lptx", LIBRARY)
    # Some versions leave out the letter of 90a; ptxas, above, has named it.
    sass = set(re.findall(r"\.sm_(\d+)[af]?\.cubin", listed))
    ptx = set(re.findall(r"\.(?:sm|compute)_(\d+)[af]?\.ptx", listed))
    numbers = {
        word: re.sub(r"[af]?(\+PTX)?$", "", word).replace(".", "") for word in BUILT["archs"]
    }
    assert sass == set(numbers.values())
    assert ptx == {number for word, number in numbers.items() if word.endswith("+PTX")}
    if BUILT["archs"] == ["8.0+PTX", "9.0a"]:
        assert (sass, ptx) == ({"80", "90"}, {"80"})


@needs_library
def test_kernels_move_sixteen_bytes_at_a_time(sass):
    met, wrong = set(), []
    for (kernel, arch), instructions in sass.items():
        narrow = {
            pattern: NARROW[pattern][0] for pattern in NARROW if re.fullmatch(pattern, kernel)
        }
        met |= set(narrow)
        words = [instruction.split(".") for instruction in instructions]
        wide = {first for first, *others in words if "128" in others}
        has = {"LDG": {"LDG", "LDGSTS"} & wide, "STG": {"STG"} & wide}
        lacks = {kind for kind in has if not has[kind]} - set(" ".join(narrow.values()).split())
        wrong += [f"{kernel} for {arch}: no {kind} of 128 bits" for kind in sorted(lacks)]
    assert sass and not wrong, "\n".join(wrong)
    assert met == set(NARROW), "NARROW names kernels that are not there"


@needs_library
def test_a_step_reads_all_that_it_can_before_it_multiplies(sass):
    """Vectors that the blocks of lstm.cu exchange: read piece by piece, each would take as long as
    L2 takes to answer."""
    least = {}
    for (kernel, arch), instructions in sass.items():
        if not re.match(r"sequence_\w+_kernel<", kernel):
            continue
        order = "".join(
            "h" if name.startswith("HMMA") else "l"
            for name in instructions
            if name.startswith("HMMA") or re.fullmatch(r"LD\.E.*\.128.*", name)
        )
        least[kernel, arch] = max(map(len, order.split("h")))
    assert len({kernel for kernel, _ in least}) == 18  # passes, dtypes, columns
    few = {place: n for place, n in least.items() if n < (4 if "float" in place[0] else 8)}
    assert not few


# ---------------------------------------------------------------------------------------- symbols


@needs_library
def test_the_library_stands_on_the_stable_abi_alone():
    undefined = output("nm", "-D", "--undefined-only", "--demangle", LIBRARY).splitlines()
    shims = re.compile(r"(?:aoti_)?torch_\w+")
    runtime = re.compile(
        r"@(?:GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|^(?:vtable for )?std::|^VTT for std"
    )
    needed = [line.split(maxsplit=1) for line in undefined]
    strong = [name for kind, name in needed if kind not in ("w", "v")]
    others = [name for name in strong if not shims.fullmatch(name) and not runtime.search(name)]
    assert not others, "\n".join(others)
    assert "aoti_torch_library_init_impl" in strong  # nm does see symbols
    assert ["w", "aoti_torch_get_current_cuda_stream"] in needed  # of CUDA builds of torch alone


@needs_library
def test_the_library_carries_the_cuda_runtime():
    dynamic = output("readelf", "-d", LIBRARY)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)  # libtorch.so brings libtorch_cuda.so
    assert not [name for name in needed if "cuda" in name or name.startswith("libnv")]
    assert not re.findall("RPATH|RUNPATH", dynamic)
    # A visible cudaMalloc would be bound to the libcudart.so that torch loads for all.
    exported = output("nm", "-D", "--defined-only", LIBRARY)
    assert not re.findall(r".*cuda.*", exported, re.IGNORECASE)


@needs_library
def test_the_library_registers_on_cuda_whatever_the_torch():
    code = f"""\
import torch
import dlkernels
torch.ops.load_library({str(LIBRARY)!r})
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlkernels::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
for name in names:  # what is made of other ops is of every device
    print(name, has(name, "CUDA") or has(name, "CompositeExplicitAutograd"))
"""
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ops = [path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    lines = [line.removeprefix("dlkernels::").split() for line in done.stdout.splitlines()]
    of_cpu = (
        "lstm_cell_backward_step",
        "lstm_cell_backward_weights",
    )  # loops are joined there alone
    registered = {name: has for name, has in lines if name.startswith(tuple(ops))}
    assert {registered.pop(name) for name in of_cpu} == {"False"}
    assert registered["cross_entropy_forward"] == "True"
    assert set(registered.values()) == {"True"}, done.stdout

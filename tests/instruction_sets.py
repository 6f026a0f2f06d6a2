"""Every instruction set of the CPU libraries, for tests that compile C++ of their own.

`avx512_emulated` and `avx512bf16_emulated` are the AVX-512 source on an AVX2 CPU, by
avx512_on_avx2.h: most machines that run the tests have no AVX-512.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

import dlkernels

ROOT = Path(__file__).resolve().parent.parent
BUILT = json.loads((Path(dlkernels.__file__).parent / "lib" / "build.json").read_text())["cpu"]
EMULATION = Path(__file__).with_name("avx512_on_avx2.h")
EMULATED = ("avx512_emulated", "avx512bf16_emulated")
OPS = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))  # each has its tests
NAMES = ["plain", "avx2", "avx512", "avx512bf16", *EMULATED]


def words(name: str) -> list[str]:
    """What the CPU must have, by the names of /proc/cpuinfo."""
    if name in EMULATED:
        return [word for word in words("avx512") if not word.startswith("avx512")]
    return BUILT[name]["isa"]


def skip_if_unable(name: str) -> None:
    """Skips the test where this architecture or this CPU has not the instruction set."""
    if name.removesuffix("_emulated") not in BUILT:
        pytest.skip(f"no {name} library is built for this architecture")
    if missing := sorted(set(words(name)) - dlkernels._cpu_features()):
        pytest.skip(f"this CPU cannot run {name}: it has no {', '.join(missing)}")


def compile_library(name: str, sources: list[Path], output: Path, *extra: str) -> None:
    """Compiles sources into the shared library output, with the flags of the library `name`.

    The headers are those of the torch that runs: the build's own may have been in an isolated
    environment that is gone.
    """
    flags = shlex.split(BUILT[name.removesuffix("_emulated")]["flags"])
    headers = [at for at, word in enumerate(flags) if word == "-isystem"]
    dropped = {*headers, *(at + 1 for at in headers)}
    flags = [word for at, word in enumerate(flags) if at not in dropped]
    for path in include_paths():
        flags += ["-isystem", path]
    if name in EMULATED:
        if "-mavx512bf16" in flags:
            flags.append("-D__AVX512BF16__=1")
        flags = [word for word in flags if not word.startswith("-mavx512")]
        flags += ["-include", str(EMULATION), "-Wno-psabi"]
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*compiler, *flags, *extra, "-shared", *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def torch_libraries() -> list[str]:
    """The linker's words for torch, as in setup.py."""
    folders = [f"-L{path}" for path in library_paths()]
    return [*folders, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]

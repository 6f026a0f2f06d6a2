"""Builds a library of kernels that run on the emulator of tests/cuda_on_cpu.

The kernels are compiled with -fsanitize=thread, which makes every memory access a call; the
emulator has these calls' functions and is compiled, and all is linked, without the flag.
"""

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "cuda_on_cpu"
FLAGS = "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas".split()
INCLUDES = [f"-I{FOLDER}", f"-I{ROOT / 'csrc' / 'cuda'}"]
# No vectors: one access of a kernel is one call, of the size that stands in the source.
KERNELS = [
    *("-x", "c++", "-DDLKERNELS_EMULATED", "-fsanitize=thread", "-fno-tree-vectorize"),
    *("-fno-store-merging", "--param", "tsan-distinguish-volatile=1"),
]


def build(library: Path, sources, flags=(), ldflags=()) -> Path:
    """The shared library of the kernels in `sources`, with the emulator; its objects are beside."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    objects = []
    runtime = [FOLDER / f"{name}.cpp" for name in ("scheduler", "memory", "primitives")]
    for source in [*runtime, *map(Path, sources)]:
        own = [] if source in runtime else [*KERNELS, *flags]
        objects.append(library.with_name(f"{library.stem}-{source.name}.o"))
        command = [*compiler, *FLAGS, *INCLUDES, *own, "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    link = [*compiler, "-shared", *map(str, objects), "-o", str(library), *ldflags]
    subprocess.run([*link, "-ldl", "-pthread"], check=True)
    return library

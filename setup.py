"""Builds csrc/ into the shared libraries of dlkernels/lib: g++ by ninja, once per instruction set.

Objects stay in build/, so that a second install compiles only what has changed. torch is needed
for its headers and for the names of its libraries, never imported; the result does not depend on
which torch it was (the LibTorch stable ABI of 2.11).

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS. ccache is used where it is installed.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = [2, 11]
WANTED_TORCH = "torch>=2.11"
# Narrow to wide. The words are the compiler's (-mavx2) and those of /proc/cpuinfo.
INSTRUCTION_SETS = {
    "plain": [],
    "avx2": ["avx2", "fma", "f16c"],
    "avx512": ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"],
}
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
FLAGS += " -DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
FIND = "from importlib.util import find_spec; s = find_spec('torch'); print(s and s.origin or '')"
NINJA = """\
builddir = {folder}
cxx = {cxx}
flags = {flags}
rule compile
  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in for $name
rule link
  command = $cxx -shared $in -o $out {ldflags} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
  description = link $out
"""


def read_torch(init: str) -> tuple[Path, str] | None:
    """Folder and version of the torch whose __init__.py is named, if it is one and new enough."""
    file = Path(init).parent / "version.py"
    found = file.is_file() and re.search(r"__version__ = ['\"]([^'\"]+)", file.read_text())
    if not found or [int(part) for part in found[1].split(".")[:2]] < OLDEST_TORCH:
        return None
    return file.parent, found[1]


def find_torch() -> tuple[Path, str] | None:
    """The torch to build against: this interpreter's, else the one outside the build isolation."""
    spec = find_spec("torch")
    if spec and spec.origin and (torch := read_torch(spec.origin)):
        return torch
    # pip isolates through PYTHONPATH. uv makes an environment of its own and sets VIRTUAL_ENV to
    # it, but leaves the active one on PATH, second.
    folders = [os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    path = [Path(entry).parent for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    folders += [folder for folder in path if (folder / "pyvenv.cfg").is_file()]
    pythons = [sys.executable, *(str(Path(folder, "bin", "python")) for folder in folders)]
    isolation = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in isolation}
    for python in filter(shutil.which, dict.fromkeys(pythons)):
        asked = subprocess.run(
            [python, "-c", FIND], env=environment, cwd="/", capture_output=True, text=True
        )
        if asked.returncode == 0 and (torch := read_torch(asked.stdout.strip())):
            return torch
    return None


def compiler() -> str:
    cxx = os.environ.get("CXX") or "g++"
    if not shutil.which(shlex.split(cxx)[0]):
        raise PlatformError(f"no C++ compiler: {cxx!r} is not on PATH; install g++, or set CXX")
    return f"ccache {cxx}" if shutil.which("ccache") and "ccache" not in cxx else cxx


def link_torch(folder: Path, torch: Path, version: str) -> Path:
    """A link to torch under a name made of its version alone.

    An isolated build sees torch in another temporary folder each time; the commands, which ninja
    compares, must not.
    """
    link = folder / f"torch-{version}"
    link.unlink(missing_ok=True)
    link.symlink_to(torch)
    return link


def sources() -> list[str]:
    """What the libraries are made of, relative to the root."""
    found = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found) + ["setup.py"]


class BuildLibraries(Command):
    """Compiles csrc/cpu once per instruction set; build.json says what was built, and from what."""

    description = "build the shared libraries of csrc/"
    user_options = [
        ("build-lib=", "b", "folder of the package that takes the libraries"),
        ("folder=", None, "folder of the objects, kept from build to build [default: build]"),
    ]
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None
        self.folder = "build"

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        self.isas = INSTRUCTION_SETS
        if platform.machine() not in ("x86_64", "AMD64"):
            self.isas = {"plain": []}

    def get_source_files(self) -> list[str]:
        return sources()

    def get_outputs(self) -> list[str]:
        names = [f"libdlkernels_cpu_{isa}.so" for isa in self.isas] + ["build.json"]
        package = ROOT if self.editable_mode else Path(self.build_lib)
        return [str(package / "dlkernels" / "lib" / name) for name in names]

    def run(self):
        if not (found := find_torch()):
            raise PlatformError(f"torch was not found: pip install '{WANTED_TORCH}'")
        torch, version = found
        beside = Path(sys.executable).with_name("ninja")  # an environment that is not active
        if not (ninja := shutil.which("ninja") or shutil.which(beside)):
            raise PlatformError("ninja was not found: pip install ninja")
        print(f"dlkernels: building against torch {version} of {torch}", flush=True)
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        digests = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in sources()}
        built = self.write_ninja(folder, link_torch(folder, torch, version))
        command = [ninja, "-f", f"{folder}/build.ninja"]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command).returncode != 0:
            raise CompileError(f"failed in {ROOT}: {shlex.join(command)}")
        record = {"torch": version, "sources": digests, "cpu": built, "cuda": None}
        (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n")
        for output in map(Path, self.get_outputs()):  # build.json last
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = output.with_name(output.name + ".tmp")
            shutil.copyfile(folder / output.name, temporary)
            os.replace(temporary, output)

    def write_ninja(self, folder: Path, torch: Path) -> dict[str, dict]:
        """Writes folder/build.ninja; returns what build.json says of each library."""
        flags = f"{FLAGS} -isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
        flags = f"{flags} {os.environ.get('CXXFLAGS', '')}".strip()
        ldflags = f"{os.environ.get('LDFLAGS', '')} -L{torch}/lib".strip()
        text = NINJA.format(folder=folder, cxx=compiler(), flags=flags, ldflags=ldflags)
        built = {}
        for name, words in self.isas.items():
            isa = " ".join(f"-m{word}" for word in words) or "-DDLKERNELS_SIMD_PLAIN"
            if name == "avx512":  # gcc 12 takes the undefined values of its own header for faults
                isa += " -Wno-uninitialized"
            built[name] = {"isa": words, "flags": f"{flags} {isa}"}
            objects = []
            for source in sorted(Path("csrc/cpu").glob("*.cpp")):
                objects.append(f"{folder}/{name}/{source.stem}.o")
                text += f"build {objects[-1]}: compile {source}\n  isa = {isa}\n  name = {name}\n"
            text += f"build {folder}/libdlkernels_cpu_{name}.so: link {' '.join(objects)}\n"
        (folder / "build.ninja").write_text(text)
        return built


class Build(build):
    sub_commands = [*build.sub_commands, ("build_libraries", None)]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build": Build, "build_libraries": BuildLibraries},
    distclass=BinaryDistribution,
    setup_requires=["ninja"] if find_torch() else ["ninja", WANTED_TORCH],
)

"""Builds csrc/ into the shared libraries of dlkernels/lib, by ninja.

csrc/cpu makes one library per instruction set, by g++; csrc/cuda one, by nvcc where it is found.
Objects stay in build/, so that a second install compiles only what has changed. torch is needed for
its headers and for the names of its libraries, never imported; the result does not depend on which
torch it was (the LibTorch stable ABI of 2.11), a CUDA build or not.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, TORCH_CUDA_ARCH_LIST; CUDA_HOME, where it is set the
only place for nvcc (CUDA_HOME=none: no CUDA library). ccache is used where it is installed.
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
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build")
OLDEST_TORCH = [2, 11]
WANTED_TORCH = "torch>=2.11"
# Narrow to wide. The words are the compiler's (-mavx2) and, but for underscores, /proc/cpuinfo's.
AVX2 = ["avx2", "fma", "f16c"]
AVX512 = ["avx512f", "avx512bw", "avx512vl", "avx512dq", *AVX2]
INSTRUCTION_SETS = {"plain": [], "avx2": AVX2, "avx512": AVX512}
INSTRUCTION_SETS["avx512bf16"] = ["avx512bf16", *AVX512]
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
FLAGS = f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra {TARGET}"
NVCC_FLAGS = f"-std=c++20 -O3 -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden,-Wall {TARGET}"
NVCC_WHEELS = ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime"]
OLDEST_CUDA = 12  # C++20, sm_90a
ARCHS = "8.0+PTX;9.0a"  # PTX of compute_90a runs on no later chip
FIND = "from importlib.util import find_spec; s = find_spec('torch'); print(s and s.origin or '')"
NINJA = """\
builddir = {folder}
rule compile.cpp
  command = {ccache}{cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in for $name
rule compile.cu
  command = {ccache}{nvcc} -MMD -MF $out.d $flags -c $in -o $out 2> $out.ptxas; status=$$?; $
      grep -vE '^ptxas info|bytes stack frame' $out.ptxas; exit $$status
  depfile = $out.d
  deps = gcc
  description = compile $in for $name
rule link
  command = {cxx} -shared $in -o $out {ldflags} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 $more
  description = link $out
"""


def read_torch(init: str) -> tuple[Path, str, str] | None:
    """Folder, version and CUDA version ("" of a CPU build) of the torch whose __init__.py is named,
    if it is one and new enough."""
    file = Path(init).parent / "version.py"
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.M)
    if not found or [int(part) for part in found[1].split(".")[:2]] < OLDEST_TORCH:
        return None
    cuda = re.search(r"^cuda\b.*= ['\"](\d+\.\d+)", text, re.M)
    return file.parent, found[1], cuda[1] if cuda else ""


def find_torch() -> tuple[Path, str, str] | None:
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


def find_nvcc() -> tuple[Path | None, str]:
    """Root and version of the CUDA toolkit; or None, and why."""
    home, nvidia = os.environ.get("CUDA_HOME"), find_spec("nvidia")
    wheels = [Path(folder) for folder in nvidia.submodule_search_locations or []] if nvidia else []
    wheels = [str(nvcc) for folder in wheels for nvcc in folder.glob("cu*/bin/nvcc")]
    why = f"no nvcc in CUDA_HOME={home}" if home else "no nvcc on PATH"
    for nvcc in filter(shutil.which, [f"{home}/bin/nvcc"] if home else ["nvcc", *wheels]):
        asked = [[nvcc, "--version"], [nvcc, "--dryrun", "-c", "any.cu"]]
        said = [subprocess.run(words, capture_output=True, text=True) for words in asked]
        version = re.search(r"\bV((\d+)\.\d+\.\d+)", said[0].stdout)
        top = re.search(r"^#\$ TOP=(.+)$", said[1].stderr, re.M)  # `nvcc` may be a wrapper
        if top and version and int(version[2]) >= OLDEST_CUDA:
            return Path(top[1].strip()).resolve(), version[1]
        why = f"{nvcc} is not of CUDA {OLDEST_CUDA} or newer"
    return None, why


def requirements() -> list[str]:
    """What the build needs from the package index: nvcc too, for a CUDA build of torch."""
    if not (torch := find_torch()):
        return ["ninja", WANTED_TORCH]
    cuda, major = torch[2], torch[2].split(".")[0]
    # The wheels of CUDA 12 lack nvcc itself.
    if not cuda or int(major) < 13 or os.environ.get("CUDA_HOME") or find_nvcc()[0]:
        return ["ninja"]
    # Of one minor, or they do not fit one another; but cccl, for one macro, numbers its own.
    wheels = [f"{name}=={cuda}.*" for name in NVCC_WHEELS]
    return ["ninja", *wheels, f"nvidia-cuda-cccl=={major}.*"]


def cuda_archs() -> dict[str, str]:
    """TORCH_CUDA_ARCH_LIST, else ours, without what is older than the kernels: word -> flags."""
    archs = {}
    for word in re.findall(r"[^\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHS):
        if not (found := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)):
            raise PlatformError(f"TORCH_CUDA_ARCH_LIST: expected words like 9.0a, got {word!r}")
        if int(found[1]) >= 8:
            arch = found[1] + found[2]
            codes = [f"sm_{arch}", f"compute_{arch}"][: 2 if found[3] else 1]
            archs[word] = " ".join(f"-gencode=arch=compute_{arch},code={code}" for code in codes)
    if not archs:
        raise PlatformError("TORCH_CUDA_ARCH_LIST: expected 8.0 or newer")
    return archs


def link(name: str, to: Path) -> Path:
    """A link under a name made of a version alone: an isolated build sees torch and nvcc in other
    temporary folders each time; the commands, which ninja compares, must not."""
    (OBJECTS / name).unlink(missing_ok=True)
    (OBJECTS / name).symlink_to(to)
    return OBJECTS / name


def sources() -> list[str]:
    """What the libraries are made of, relative to the root."""
    suffixes = (".h", ".cpp", ".cuh", ".cu")
    found = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    return sorted(path.relative_to(ROOT).as_posix() for path in found) + ["setup.py"]


class BuildLibraries(Command):
    """Compiles csrc/; build.json says what was built, and from what."""

    description = "build the shared libraries of csrc/"
    user_options = [("build-lib=", "b", "folder of the package that takes the libraries")]
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        self.isas = INSTRUCTION_SETS
        if platform.machine() not in ("x86_64", "AMD64"):
            self.isas = {"plain": []}
        self.toolkit, self.cuda = find_nvcc()

    def get_source_files(self) -> list[str]:
        return sources()

    def get_outputs(self) -> list[str]:
        names = [f"libdlkernels_cpu_{isa}.so" for isa in self.isas]
        names += ["libdlkernels_cuda.so"] * bool(self.toolkit) + ["build.json"]
        package = ROOT if self.editable_mode else Path(self.build_lib)
        return [str(package / "dlkernels" / "lib" / name) for name in names]

    def run(self):
        if not (found := find_torch()):
            raise PlatformError(f"torch was not found: pip install '{WANTED_TORCH}'")
        beside = Path(sys.executable).with_name("ninja")  # an environment that is not active
        if not (ninja := shutil.which("ninja") or shutil.which(beside)):
            raise PlatformError("ninja was not found: pip install ninja")
        torch, version, _ = found
        cuda = f"CUDA {self.cuda} of {self.toolkit}" if self.toolkit else f"CPU only: {self.cuda}"
        print(f"dlkernels: building against torch {version} of {torch}; {cuda}", flush=True)
        OBJECTS.mkdir(exist_ok=True)
        digests = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in sources()}
        built = self.write_ninja(link(f"torch-{version}", torch))
        command = [ninja, "-f", f"{OBJECTS}/build.ninja"]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command).returncode != 0:
            hint = " (without the CUDA library: CUDA_HOME=none)" if self.toolkit else ""
            raise CompileError(f"failed in {ROOT}: {shlex.join(command)}{hint}")
        record = {"torch": version, "sources": digests, **built}
        (OBJECTS / "build.json").write_text(json.dumps(record, indent=2) + "\n")
        outputs = [Path(output) for output in self.get_outputs()]
        for output in outputs:  # build.json last
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = output.with_name(output.name + ".tmp")
            shutil.copyfile(OBJECTS / output.name, temporary)
            os.replace(temporary, output)
        for library in set(outputs[0].parent.glob("*.so")).difference(outputs):
            library.unlink()  # of an earlier build that found nvcc

    def write_ninja(self, torch: Path) -> dict:
        """Writes build.ninja; returns what build.json says of the libraries."""
        words = shlex.split(os.environ.get("CXX") or "g++")
        words = [word for word in words if Path(word).name != "ccache"]
        cxx, ccache = shlex.join(words), "ccache " if shutil.which("ccache") else ""
        if not shutil.which(words[0]):
            raise PlatformError(f"no C++ compiler: {cxx!r} is not on PATH; install g++, or set CXX")
        headers = f"-isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
        flags = f"{FLAGS} {headers} {os.environ.get('CXXFLAGS', '')}".strip()
        text, nvcc, built = "", "", {"cpu": {}, "cuda": None}
        for name, features in self.isas.items():
            isa = " ".join(f"-m{word}" for word in features) or "-DDLKERNELS_SIMD_PLAIN"
            if name.startswith("avx512"):  # gcc 12: its own header's undefined values are faults
                isa += " -Wno-uninitialized -Wno-maybe-uninitialized"
            built["cpu"][name] = {"isa": features, "flags": f"{flags} {isa}"}
            text += edges(f"cpu_{name}", "cpu/*.cpp", f"{flags} {isa}")
        if self.toolkit:
            root, archs = link(f"cuda-{self.cuda}", self.toolkit), cuda_archs()
            nvcc = f"{root}/bin/nvcc -ccbin {words[0]}"
            flags = f"{NVCC_FLAGS} {' '.join(archs.values())} -isystem {root}/include {headers}"
            # torch brings libcudart.so: a visible name of the static one would be bound to it.
            more = f"-L{root}/lib64 -L{root}/lib -lcudart_static -lrt -ldl -lpthread"
            more += " -Wl,--exclude-libs,libcudart_static.a"
            text = edges("cuda", "cuda/*.cu", flags, more) + text  # the longest first
            built["cuda"] = {"archs": list(archs), "nvcc": self.cuda, "flags": flags}
        ldflags = f"{os.environ.get('LDFLAGS', '')} -L{torch}/lib".strip()
        head = dict(folder=OBJECTS, ccache=ccache, cxx=cxx, nvcc=nvcc, ldflags=ldflags)
        (OBJECTS / "build.ninja").write_text(NINJA.format(**head) + text)
        return built


def edges(name: str, pattern: str, flags: str, more: str = "") -> str:
    """ninja's lines for libdlkernels_<name>.so."""
    text, objects = "", []
    for source in sorted(Path("csrc").glob(pattern)):
        objects.append(f"{OBJECTS}/{name}/{source.stem}.o")
        text += f"build {objects[-1]}: compile{source.suffix} {source}\n"
        text += f"  flags = {flags}\n  name = {name}\n"
    text += f"build {OBJECTS}/libdlkernels_{name}.so: link {' '.join(objects)}\n"
    return f"{text}  more = {more}\n"


class Build(build):
    sub_commands = [*build.sub_commands, ("build_libraries", None)]


class Wheel(bdist_wheel):
    def run(self):  # else modules of earlier builds, which setuptools leaves there, are in it
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:  # any Python: the stable ABI knows none
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"bdist_wheel": Wheel, "build": Build, "build_libraries": BuildLibraries},
    distclass=BinaryDistribution,
    setup_requires=requirements(),
)

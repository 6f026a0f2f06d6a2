"""Hand-written kernels for PyTorch, drop-in: ``dlkernels.nn.X`` is a ``torch.nn.X``.

Importing loads one CPU library, the widest that both this CPU and torch's own choice of kernels
(``ATEN_CPU_CAPABILITY``) allow; under a CUDA build of torch the CUDA library too, with or without a
GPU; then the ops. The kernels that are Triton's on a GPU are registered where Triton is, and its
twins of the CUDA kernels where that library is not built. It patches nothing.
"""

import hashlib
import importlib
import importlib.util
import json
import pkgutil
import warnings
from pathlib import Path

import torch

from dlkernels import config

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
_LIBRARIES = _ROOT / "dlkernels" / "lib"
_REPAIR = "pip install --force-reinstall dlkernels"  # of a wheel
if (_ROOT / "setup.py").is_file():
    _REPAIR = f"pip install -e {_ROOT}"
# Ops whose kernels on a GPU are Triton's; the others there are twins.
_TRITONS = ("conv2d", "residual_block")
# What torch's capability allows; every other word, as "AVX512", allows all.
_ALLOWED = {"DEFAULT": ["plain"], "NO AVX": ["plain"], "AVX2": ["plain", "avx2"]}


def _read_build() -> dict:
    """What setup.py noted in lib/build.json. Warns where the sources beside it are others."""
    note = _LIBRARIES / "build.json"
    if not note.is_file():
        raise ImportError(f"dlkernels: nothing is built in {_LIBRARIES}; run: {_REPAIR}")
    build = json.loads(note.read_text())
    if (_ROOT / "csrc").is_dir():  # not so in an installed wheel
        names = {path.relative_to(_ROOT).as_posix() for path in (_ROOT / "csrc").rglob("*.*")}
        names = {name for name in names if name.endswith((".h", ".cpp", ".cuh", ".cu"))}
        names |= set(build["sources"])
        changed = [name for name in sorted(names) if _digest(name) != build["sources"].get(name)]
        if changed:
            warnings.warn(
                f"dlkernels: the built libraries are stale (changed: {', '.join(changed)}); "
                f"run: {_REPAIR}",
                stacklevel=3,
            )
    return build


def _digest(name: str) -> str | None:
    path = _ROOT / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _cpu_features() -> set[str]:
    """The instruction sets of this CPU, by the names that compilers use too; empty if not x86."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:  # no /proc: the plain library runs everywhere
        return set()
    return {flag.replace("_", "") for flag in flags.partition(":")[2].split()}


def _choose_library(build: dict) -> str:
    """The widest library for this CPU. torch's word alone is not enough: it believes the variable.

    ``ATEN_CPU_CAPABILITY=avx512`` makes torch report AVX512 on any CPU.
    """
    features = _cpu_features()
    allowed = _ALLOWED.get(torch.backends.cpu.get_cpu_capability(), build["cpu"])
    fitting = [name for name, how in build["cpu"].items() if features.issuperset(how["isa"])]
    return [name for name in fitting if name in allowed][-1]


def _choose_cuda(build: dict) -> str | None:
    """What owns the ops on CUDA: "cuda", the library; "triton", its twins; or None, nothing."""
    if not torch.version.cuda:
        return None
    if build["cuda"]:
        return "cuda"
    return "triton" if importlib.util.find_spec("triton") else None


def _register_triton(twins: bool) -> None:
    """The kernels of Triton that own their op, and the twins if they are wanted."""
    package = importlib.import_module("dlkernels.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name in _TRITONS or (twins and module.name != "common"):
            importlib.import_module(f"{package.__name__}.{module.name}").register("CUDA")


def _load_library(name: str) -> None:
    path = _LIBRARIES / f"libdlkernels_{name}.so"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"dlkernels: cannot load {path}: {error}; run: {_REPAIR}") from error


_build = _read_build()
config.libraries["cpu"] = _choose_library(_build)
_load_library(f"cpu_{config.libraries['cpu']}")
if _cuda := _choose_cuda(_build):
    config.libraries["cuda"] = _cuda
    if _cuda == "cuda":
        _load_library(_cuda)

from dlkernels import functional, nn  # noqa: E402
from dlkernels.freeze import freeze, unfreeze  # noqa: E402
from dlkernels.swap import explain, report, swap, swapped, unswap, verify  # noqa: E402

if torch.version.cuda and importlib.util.find_spec("triton"):
    _register_triton(twins=_cuda == "triton")

__all__ = [
    "config",
    "explain",
    "freeze",
    "functional",
    "nn",
    "report",
    "swap",
    "swapped",
    "unfreeze",
    "unswap",
    "verify",
]

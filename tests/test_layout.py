"""The rules of the house as code: where things stand, and who may use whom.

A rule is a function of the root folder that gives its violations, one line each; its docstring says
what to do. Every rule is run on this repository, and on a small house that keeps all rules with one
violation planted in it, so that no rule passes because it looks at nothing.
"""

import ast
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULES: list[Callable[[Path], list[str]]] = []

# Headers of torch's stable ABI: a library on these alone runs with every supported torch.
STABLE = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/", "torch/headeronly/")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
INTRINSIC = re.compile(
    r"\b_mm\d*_\w+|\b__m(?:128|256|512)\w*|\b__mmask\d+|\b__builtin_ia32_\w+|\bfloat32x\d\w*"
    r"|[<\"](?:immintrin|x86intrin|arm_neon|arm_sve)\.h"
)
CUDA = re.compile(r"(?:cuda|cooperative_groups|mma\.h|sm_\d|crt/|cub/|thrust/|nv/)")
DEVICE = re.compile(
    r"\b(?:__global__|__device__|__host__|__shared__|__forceinline__)\b"
    r"|\b(?:__syncthreads|__syncwarp|__threadfence|__shfl|__ballot|__any|__all|__ld|__st)\w*\("
    r"|\batomic[A-Z]\w*\("
)
FLAGS = ("-march=" + "native", "-mtune=" + "native", "-f" + "openmp")
# An op that stands on others, and those that it knows.
STANDS_ON = {
    "conv2d_few_channels": ("conv2d",),
    "conv2d_max_pool2d": ("conv2d",),
    "linear_cross_entropy": ("cross_entropy",),
    "residual_block": ("batch_norm", "conv2d"),
}
# Raw ops of their own name, of a GPU alone: the op that hands them some of its shapes.
RAW = {"conv2d_few_channels": "conv2d"}
MACHINE = re.compile(
    r"/(?:work|root)/|/(?:home|Users)/\w+/"  # somebody's folders
    r"|https?://(?:localhost|127\.|10\.|192\.168\.|[\w.-]+\.(?:internal|local|corp|lan)\b)"
    r"|https?://(?!pypi\.org/)[\w.:-]+/(?:\S*/)?simple\b|\b(?:artifactor[y]|jfro[g])\b"
)


def rule(function):
    RULES.append(function)
    return function


# --- reading ----------------------------------------------------------------------------------


def everything(root: Path) -> Iterator[Path]:
    """The files that are ours: no caches, build outputs, environments or git's own."""
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [
            name
            for name in sorted(folders)
            if (not name.startswith(".") or name in (".ci", ".github"))
            and name not in ("__pycache__", "build", "dist")
            and not name.endswith(".egg-info")
            and not (here / name / "pyvenv.cfg").exists()
            and (here / name) != root / "dlkernels" / "lib"
        ]
        yield from (here / name for name in sorted(names) if name != ".git")  # of a worktree


def under(root: Path, *folders: str, suffixes: Iterable[str] = (".py",)) -> list[Path]:
    """Files below the given folders, or the given files."""
    places = [root / folder for folder in folders]
    return [
        path
        for path in everything(root)
        if path.suffix in suffixes and any(path == p or p in path.parents for p in places)
    ]


def ops(root: Path) -> list[str]:
    return [p.stem for p in under(root, "dlkernels/ops") if p.stem not in ("__init__", "common")]


def text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a picture
        return ""


def code(path: Path) -> str:
    """C++ without comments, its lines where they were."""
    without = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text(path), flags=re.DOTALL)
    return re.sub(r"//.*", "", without)


def imports(root: Path, path: Path) -> Iterator[tuple[str, int, bool]]:
    """(full dotted name, line, whether inside a function), also of import_module("name")."""
    package = path.relative_to(root).parent.parts
    tree = ast.parse(text(path), str(path))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("import_module", "run_module", "__import__"):
                names = [str(node.args[0].value)]
        yield from ((name, node.lineno, id(node) in inner) for name in names)


def is_in(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def foreign_imports(root: Path, paths: Iterable[Path], allowed: Iterable[str]) -> list[str]:
    allowed = (*allowed, *sys.stdlib_module_names)
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in paths
        for name, line, _ in imports(root, path)
        if not is_in(name, allowed)
    ]


def matches(root: Path, paths: Iterable[Path], pattern: re.Pattern, read=text) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number} has {found[0]}"
        for path in paths
        for number, line in enumerate(read(path).splitlines(), 1)
        if (found := pattern.search(line))
    ]


# --- who may use whom -------------------------------------------------------------------------


@rule
def ops_import_torch_config_and_common_only(root):
    """Let ops/<op>.py import torch, config and ops/common.py; another op only by STANDS_ON."""
    allowed = ("torch", "dlkernels.config", "dlkernels.ops.common")
    found = []
    for path in under(root, "dlkernels/ops"):
        others = (f"dlkernels.ops.{other}" for other in STANDS_ON.get(path.stem, ()))
        found += foreign_imports(root, [path], (*allowed, *others))
    return found


@rule
def kernels_import_torch_triton_and_common_only(root):
    """Let kernels/<op>.py import torch, triton, kernels/common; another op's only by STANDS_ON."""
    allowed = ("torch", "triton", "dlkernels.kernels.common")
    found = []
    for path in under(root, "dlkernels/kernels"):
        others = (f"dlkernels.kernels.{other}" for other in STANDS_ON.get(path.stem, ()))
        found += foreign_imports(root, [path], (*allowed, *others))
    return found


@rule
def functions_and_modules_import_downwards_only(root):
    """Let functional.py import ops, nn.py ops and functional, foreign.py functional and nn."""
    return [
        *foreign_imports(root, under(root, "dlkernels/functional.py"), ("torch", "dlkernels.ops")),
        *foreign_imports(
            root,
            under(root, "dlkernels/nn.py"),
            ("torch", "dlkernels.ops", "dlkernels.functional", "dlkernels.config"),
        ),
        *foreign_imports(
            root,
            under(root, "dlkernels/foreign.py"),
            ("torch", "dlkernels.functional", "dlkernels.nn"),
        ),
    ]


@rule
def networks_import_modules_only(root):
    """Let models/ use dlkernels.nn, torch and one another; a network knows no op."""
    allowed = ("torch", "dlkernels.nn", "dlkernels.models")
    return foreign_imports(root, under(root, "dlkernels/models"), allowed)


@rule
def nothing_imports_tests_or_benchmarks(root):
    """Move what is shared into dlkernels/; only `dlkernels bench` imports benchmarks, lazily."""
    lazy = root / "dlkernels" / "cli.py"
    found = [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in under(root, "dlkernels", "setup.py")
        for name, line, inside in imports(root, path)
        if is_in(name, ("tests", "benchmarks"))
        and not (path == lazy and inside and is_in(name, ["benchmarks"]))
    ]
    return found + [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in under(root, "benchmarks")
        for name, line, _ in imports(root, path)
        if is_in(name, ["tests"])
    ]


@rule
def cpu_kernels_include_their_own_and_the_shared_headers_only(root):
    """Let <op>.cpp, <op>.h and <op>_<part>.h include each other, check.h, activation.h, gemm.h,
    layout.h, memory.h, simd.h, sums.h, team.h, and the headers of the ops that they stand on."""
    shared = ("activation", "gemm", "layout", "memory", "simd", "sums", "team")
    ours = ("../check.h", *(f"{name}.h" for name in shared))
    ops = [path.stem for path in under(root, "csrc/cpu", suffixes=[".cpp"])]

    def op_of(stem):
        return max((op for op in ops if f"{stem}_".startswith(f"{op}_")), key=len, default=stem)

    found = []
    for path in under(root, "csrc/cpu", suffixes=[".cpp", ".h"]):
        for kind, name in INCLUDE.findall(code(path)):
            if path.name == "simd.h" and name == "immintrin.h":
                continue
            std = "/" not in name.removeprefix("sys/") and name not in ("omp.h", "Python.h")
            op = op_of(path.stem)
            of = op_of(name.removeprefix("../").removesuffix(".h"))
            own = name in ours or of == op or of in STANDS_ON.get(op, ())
            fine = own if kind == '"' else std or name.startswith(STABLE)
            if not fine:
                found.append(f"{path.relative_to(root)} includes {name}")
    return found


@rule
def cuda_kernels_include_their_own_and_common_cuh_only(root):
    """Let csrc/cuda/<op>.cu include common.cuh, ../<op>.h, std, stable; CUDA's stand in arch.h."""
    found = []
    for path in under(root, "csrc/cuda", suffixes=[".h", ".cu", ".cuh"]):
        op = path.stem.removesuffix("_backward")
        ours = ("common.cuh", "arch.h", "../check.h", f"{op}.cuh", f"../{op}.h")
        for kind, name in INCLUDE.findall(code(path)):
            if path == root / "csrc/cuda/arch.h" and (name == "cuda_on_cpu.h" or CUDA.match(name)):
                continue
            std = "/" not in name and not CUDA.match(name) and name != "Python.h"
            fine = name in ours if kind == '"' else std or name.startswith(STABLE)
            if not fine:
                found.append(f"{path.relative_to(root)} includes {name}")
    return found


@rule
def cuda_kernels_speak_through_arch_h(root):
    """Use the macros and functions of csrc/cuda/arch.h: the emulator knows no other names."""
    paths = under(root, "csrc/cuda", suffixes=[".h", ".cu", ".cuh"])
    paths = [path for path in paths if path != root / "csrc/cuda/arch.h"]
    return matches(root, paths, DEVICE, code)


@rule
def csrc_stands_on_the_stable_abi(root):
    """Include only torch/csrc/stable, aoti_torch and torch/headeronly: no ATen, c10 or Python."""
    return [
        f"{path.relative_to(root)} includes {name}"
        for path in under(root, "csrc", suffixes=[".h", ".cpp", ".cu", ".cuh"])
        for _, name in INCLUDE.findall(code(path))
        if (name.startswith("torch/") and not name.startswith(STABLE))
        or name.startswith(("ATen/", "c10/", "pybind11/"))
        or name == "Python.h"
    ]


@rule
def strings_come_as_text(root):
    """Take a `str` argument as check.h's Text: torch's conversion to std::string leaks."""
    paths = under(root, "csrc", suffixes=[".cpp", ".cu"])
    return matches(root, paths, re.compile(r"\bstd::string\s+\w+\s*[,)]"), code)


@rule
def intrinsics_stand_in_simd_h_only(root):
    """Give csrc/cpu/simd.h a function for it; no vector type or intrinsic stands elsewhere."""
    paths = under(root, "csrc", suffixes=[".h", ".cpp", ".cu", ".cuh"])
    paths = [path for path in paths if path != root / "csrc/cpu/simd.h"]
    return matches(root, paths, INTRINSIC, code)


@rule
def assembly_stands_in_arch_h_only(root):
    """Give csrc/cuda/arch.h a primitive for it, with a body for the emulator."""
    paths = under(root, "csrc", suffixes=[".h", ".cpp", ".cu", ".cuh"])
    paths = [path for path in paths if path != root / "csrc/cuda/arch.h"]
    return matches(root, paths, re.compile(r"\b(?:asm|__asm__)\b"), code)


@rule
def launches_are_calls(root):
    """Launch through launch() of csrc/cuda/common.cuh, which the emulator has as well."""
    paths = under(root, "csrc", suffixes=[".h", ".cpp", ".cu", ".cuh"])
    return matches(root, paths, re.compile("<<<"), code)


# --- where things stand -----------------------------------------------------------------------


@rule
def an_op_has_its_files_under_one_name(root):
    """Write csrc/cpu/<op>.cpp, tests/test_<op>.py and benchmarks/<op>.py for each ops/<op>.py."""
    patterns = ("csrc/cpu/{}.cpp", "tests/test_{}.py", "benchmarks/{}.py")
    wanted = [pattern.format(op) for op in ops(root) if op not in RAW for pattern in patterns]
    wanted += [f"tests/test_{op}.py" for op in ops(root) if op in RAW]
    return [f"{name} is missing" for name in wanted if not (root / name).is_file()]


@rule
def a_kernel_file_has_the_name_of_an_op(root):
    """Name the file after the op whose contract is in dlkernels/ops/ (X_backward.cu is a split)."""
    paths = under(root, "csrc/cpu", "csrc/cuda", suffixes=[".cpp", ".cu"])
    paths += [p for p in under(root, "dlkernels/kernels") if p.stem not in ("__init__", "common")]
    known = ops(root)
    return [
        f"{path.relative_to(root)} belongs to no op"
        for path in paths
        if path.stem.removesuffix("_backward") not in known
    ]


@rule
def no_drawers_and_no_versions(root):
    """Name a file for what it does: no utils, backends or base.py; delete the version that lost."""
    found = []
    for path in everything(root):
        name = path.relative_to(root)
        stems = [part.split(".")[0] for part in name.parts]
        if (
            {"utils", "backends"} & set(stems)
            or path.name == "base.py"
            or any(re.search(r"_v\d+$", stem) for stem in stems)
        ):
            found.append(str(name))
    return found


@rule
def setup_py_is_short(root):
    """Keep setup.py under 280 lines."""
    paths = under(root, "setup.py")
    counts = [(path, len(text(path).splitlines())) for path in paths]
    return [f"{path.name} has {count} lines" for path, count in counts if count >= 280]


# --- what is written --------------------------------------------------------------------------


@rule
def no_native_or_openmp_flags(root):
    """Build per instruction set, and thread through torch's pool: drop the flag."""
    found = []
    for path in everything(root):
        name = path.relative_to(root)
        if path.suffix == ".py":
            tree = ast.parse(text(path), str(path))
            prose = {
                id(node.value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            }
            strings = [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and id(node) not in prose
            ]
            lines = [value for value in strings if isinstance(value, str)]
        elif path.suffix in (".toml", ".cfg", ".cmake", ".ninja", ".yaml", ".yml", ".sh") or (
            path.suffix == "" and name.parts[0] in (".ci", "Makefile")
        ):
            lines = [line.partition("#")[0] for line in text(path).splitlines()]
        else:
            continue
        found += [f"{name} has {flag}" for line in lines for flag in FLAGS if flag in line]
    return found


@rule
def nothing_that_is_read_can_run_code(root):
    """Load with weights_only=True, unpickle by a class that admits names, and read archives."""
    pattern = re.compile(
        r"\bpickle\.loads?\(|\.extract(?:all)?\(|\bweights_only=False|\ballow_pickle=True"
        r"|\btorch\.load\((?!.*\bweights_only=True)"
    )
    return matches(root, under(root, "dlkernels"), pattern)


@rule
def public_functions_have_docstrings(root):
    """Write a docstring: what it gives, shapes and dtypes, errors raised."""
    return [
        f"{path.relative_to(root)}:{node.lineno} {node.name}"
        for path in under(root, "dlkernels")
        for node in ast.parse(text(path), str(path)).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


@rule
def nothing_names_a_machine(root):
    """Use relative paths and the package index's defaults: no machine's folders, no index hosts."""
    return matches(root, everything(root), MACHINE)


# --- the tests --------------------------------------------------------------------------------

HOUSE = {
    "setup.py": '"""The build."""\nimport sys\n',
    "pyproject.toml": "[project]\n",
    ".ci/run": "pip install -e .\n",
    "csrc/check.h": "#include <string>\n#include <torch/csrc/stable/tensor.h>\n",
    "csrc/cpu/simd.h": "#include <immintrin.h>\n__m256 load(const float*);\n",
    "csrc/cpu/conv2d.cpp": '#include "../check.h"\n#include "../conv2d.h"\n#include "simd.h"\n'
    "#include <sys/mman.h>\n#include <torch/headeronly/util/Half.h>\n// not _mm256_add_ps\n",
    "csrc/cpu/residual_block.h": '#include "activation.h"\n#include "conv2d_winograd.h"\n',
    "csrc/cpu/residual_block.cpp": '#include "residual_block.h"\n#include "conv2d.h"\n',
    "csrc/cuda/arch.h": '#include "cuda_on_cpu.h"\n#include <cuda_runtime.h>\n'
    'asm volatile("bar.sync 0;");\n#define DLK_KERNEL __global__\n',
    "csrc/cuda/common.cuh": "cudaLaunchKernelExC(&config, kernel, arguments);\n",
    "csrc/cuda/conv2d_backward.cu": '#include "../conv2d.h"\n#include "common.cuh"\n'
    "#include <torch/csrc/stable/library.h>\n#include <tuple>\n// not __syncthreads()\n",
    "dlkernels/config.py": "",
    "dlkernels/functional.py": "from dlkernels.ops.conv2d import conv2d\n",
    "dlkernels/nn.py": "import torch\nfrom dlkernels import functional\n",
    "dlkernels/foreign.py": "import torch\nfrom dlkernels import functional, nn\n",
    "dlkernels/cli.py": "def main():\n    'Runs it.'\n    from benchmarks import run\n",
    "dlkernels/ops/__init__.py": "",
    "dlkernels/ops/common.py": "import torch\n",
    "dlkernels/ops/conv2d.py": "import math\nimport torch\nfrom dlkernels import config\n"
    "from .. import config as same\nfrom dlkernels.ops.common import is_plain\n",
    "dlkernels/ops/residual_block.py": "from dlkernels.ops.batch_norm import batch_norm\n"
    "from dlkernels.ops.conv2d import conv2d\n",
    "tests/test_residual_block.py": "",
    "benchmarks/residual_block.py": "",
    "dlkernels/kernels/common.py": "import triton\n",
    "dlkernels/kernels/conv2d.py": "import triton.language as tl\nfrom . import common\n",
    "dlkernels/models/lenet.py": "import dlkernels.nn\n",
    "tests/test_conv2d.py": "from tests import compare\nfrom benchmarks import conv2d\n",
    "benchmarks/conv2d.py": "import dlkernels\n",
    "README.md": "It is never built with " + FLAGS[0] + "; see https://pypi.org/simple/torch\n",
}
BODY = "\n    return 1\n"

PLANTED = [
    (ops_import_torch_config_and_common_only, "dlkernels/ops/conv2d.py", "import dlkernels.nn"),
    (ops_import_torch_config_and_common_only, "dlkernels/ops/common.py", "from . import conv2d"),
    (
        ops_import_torch_config_and_common_only,
        "dlkernels/ops/conv2d.py",
        "from dlkernels.ops import lstm",
    ),
    (ops_import_torch_config_and_common_only, "dlkernels/ops/conv2d.py", "from . import lstm"),
    (
        ops_import_torch_config_and_common_only,
        "dlkernels/ops/linear_cross_entropy.py",
        "from dlkernels.ops.linear import linear",
    ),
    (
        ops_import_torch_config_and_common_only,
        "dlkernels/ops/cross_entropy.py",
        "from dlkernels.ops.linear_cross_entropy import linear_cross_entropy",
    ),
    (
        ops_import_torch_config_and_common_only,
        "dlkernels/ops/residual_block.py",
        "from dlkernels.ops.linear import linear",
    ),
    (ops_import_torch_config_and_common_only, "dlkernels/ops/conv2d.py", "import numpy as np"),
    (
        ops_import_torch_config_and_common_only,
        "dlkernels/ops/conv2d.py",
        "from dlkernels import swap",
    ),
    (
        kernels_import_torch_triton_and_common_only,
        "dlkernels/kernels/conv2d.py",
        "import dlkernels",
    ),
    (
        kernels_import_torch_triton_and_common_only,
        "dlkernels/kernels/conv2d.py",
        "from . import lstm",
    ),
    (functions_and_modules_import_downwards_only, "dlkernels/nn.py", "from dlkernels import swap"),
    (functions_and_modules_import_downwards_only, "dlkernels/functional.py", "import dlkernels.nn"),
    (
        functions_and_modules_import_downwards_only,
        "dlkernels/foreign.py",
        "import torchvision",
    ),
    (networks_import_modules_only, "dlkernels/models/lenet.py", "from dlkernels import ops"),
    (nothing_imports_tests_or_benchmarks, "dlkernels/config.py", "from tests import compare"),
    (nothing_imports_tests_or_benchmarks, "dlkernels/cli.py", "import benchmarks.run"),
    (nothing_imports_tests_or_benchmarks, "dlkernels/cli.py", f"def f():\n    import tests{BODY}"),
    (
        nothing_imports_tests_or_benchmarks,
        "dlkernels/nn.py",
        f"def f():\n    import benchmarks{BODY}",
    ),
    (nothing_imports_tests_or_benchmarks, "dlkernels/nn.py", "import_module('benchmarks.run')"),
    (nothing_imports_tests_or_benchmarks, "benchmarks/conv2d.py", "import tests.compare"),
    (
        cpu_kernels_include_their_own_and_the_shared_headers_only,
        "csrc/cpu/conv2d.cpp",
        '#include "lstm.h"',
    ),
    (
        cpu_kernels_include_their_own_and_the_shared_headers_only,
        "csrc/cpu/conv2d.h",
        '#include "../lstm.h"',
    ),
    (
        cpu_kernels_include_their_own_and_the_shared_headers_only,
        "csrc/cpu/linear_cross_entropy.cpp",
        '#include "conv2d.h"',
    ),
    (
        cpu_kernels_include_their_own_and_the_shared_headers_only,
        "csrc/cpu/residual_block.h",
        '#include "linear.h"',
    ),
    (
        cpu_kernels_include_their_own_and_the_shared_headers_only,
        "csrc/cpu/conv2d_winograd.h",
        '#include "residual_block.h"',
    ),
    (
        cpu_kernels_include_their_own_and_the_shared_headers_only,
        "csrc/cpu/conv2d.cpp",
        "# include <omp.h>",
    ),
    (
        cpu_kernels_include_their_own_and_the_shared_headers_only,
        "csrc/cpu/conv2d.cpp",
        "#include <torch/all.h>",
    ),
    *(
        (
            cuda_kernels_include_their_own_and_common_cuh_only,
            f"csrc/cuda/{name}",
            f"#include {what}",
        )
        for name, what in (
            ("conv2d_backward.cu", "<cuda_fp16.h>"),
            ("conv2d_backward.cu", "<cooperative_groups/reduce.h>"),
            ("conv2d_backward.cu", '"../lstm.h"'),
            ("common.cuh", "<cuda_runtime.h>"),
            ("common.cuh", "<ATen/cuda/CUDAContext.h>"),
            ("arch.h", '"lstm.cuh"'),
        )
    ),
    (cuda_kernels_speak_through_arch_h, "csrc/cuda/conv2d_backward.cu", "__syncthreads();"),
    (cuda_kernels_speak_through_arch_h, "csrc/cuda/conv2d_backward.cu", "__shared__ int x[32];"),
    (cuda_kernels_speak_through_arch_h, "csrc/cuda/common.cuh", "__device__ int f();"),
    (cuda_kernels_speak_through_arch_h, "csrc/cuda/common.cuh", "__shfl_xor_sync(m, x, 1);"),
    (cuda_kernels_speak_through_arch_h, "csrc/cuda/common.cuh", "atomicAdd(x, 1);"),
    (csrc_stands_on_the_stable_abi, "csrc/check.h", "#include <ATen/ATen.h>"),
    (csrc_stands_on_the_stable_abi, "csrc/cuda/common.cuh", "#include <c10/cuda/CUDAStream.h>"),
    (csrc_stands_on_the_stable_abi, "csrc/check.h", "#include <torch/library.h>"),
    (csrc_stands_on_the_stable_abi, "csrc/check.h", "#include <Python.h>"),
    (strings_come_as_text, "csrc/cpu/conv2d.cpp", "Tensor f(Tensor x, std::string activation) {"),
    (strings_come_as_text, "csrc/cuda/conv2d_backward.cu", "    std::string name, bool own);"),
    (intrinsics_stand_in_simd_h_only, "csrc/cpu/conv2d.cpp", "x = _mm512_add_ps(x, y);"),
    (intrinsics_stand_in_simd_h_only, "csrc/cpu/conv2d.cpp", "__m256 x;"),
    (intrinsics_stand_in_simd_h_only, "csrc/check.h", "#include <immintrin.h>"),
    (assembly_stands_in_arch_h_only, "csrc/cuda/conv2d_backward.cu", "asm volatile();"),
    (assembly_stands_in_arch_h_only, "csrc/cuda/common.cuh", "__asm__();"),
    (launches_are_calls, "csrc/cuda/conv2d_backward.cu", "k<<<1, 2>>>();"),
    (launches_are_calls, "csrc/cuda/common.cuh", "k<<<1, 2>>>();"),
    (an_op_has_its_files_under_one_name, "dlkernels/ops/lstm.py", ""),
    (a_kernel_file_has_the_name_of_an_op, "csrc/cpu/lstm.cpp", ""),
    (a_kernel_file_has_the_name_of_an_op, "csrc/cuda/conv2d_small.cu", ""),
    (a_kernel_file_has_the_name_of_an_op, "dlkernels/kernels/lstm.py", ""),
    (no_drawers_and_no_versions, "dlkernels/utils/text.py", ""),
    (no_drawers_and_no_versions, "dlkernels/utils.py", ""),
    (no_drawers_and_no_versions, "csrc/backends/cpu.h", ""),
    (no_drawers_and_no_versions, "dlkernels/ops/base.py", ""),
    (no_drawers_and_no_versions, "csrc/cpu/conv2d_v2.cpp", ""),
    (setup_py_is_short, "setup.py", "\n" * 280),
    (no_native_or_openmp_flags, "setup.py", f"flags = ['{FLAGS[0]}']"),
    (no_native_or_openmp_flags, ".ci/run", f"g++ {FLAGS[2]} x.cpp"),
    (no_native_or_openmp_flags, "pyproject.toml", f"flags = '{FLAGS[2]}'"),
    *(
        (nothing_that_is_read_can_run_code, "dlkernels/config.py", line)
        for line in (
            "x = pickle.load(file)",
            "x = torch.load(path)",
            "x = torch.load(path, weights_only=False)",
            "archive.extractall(folder)",
        )
    ),
    (public_functions_have_docstrings, "dlkernels/config.py", f"def public():{BODY}"),
    (nothing_names_a_machine, "README.md", f"see /{'root'}/notes"),
    (nothing_names_a_machine, "csrc/cuda/arch.h", f"// /{'home'}/someone/x"),
    (
        nothing_names_a_machine,
        ".ci/run",
        f"pip install -i https:{'//'}packages.example/pypi/simple",
    ),
    (nothing_names_a_machine, ".ci/run", f"pip install -i http:{'//'}localhost:8080"),
]


def build(root: Path, tree: dict[str, str]) -> None:
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_the_house_keeps(check):
    found = check(ROOT)
    assert not found, "\n".join([check.__doc__, *found])


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_a_small_house_keeps(check, tmp_path):
    build(tmp_path, HOUSE)
    assert check(tmp_path) == []


@pytest.mark.parametrize(
    ("check", "name", "line"),
    PLANTED,
    ids=[f"{check.__name__}-{i}" for i, (check, _, _) in enumerate(PLANTED)],
)
def test_a_planted_violation_is_found(check, name, line, tmp_path):
    build(tmp_path, HOUSE | {name: f"{HOUSE.get(name, '')}{line}\n"})
    found = check(tmp_path)
    assert found and all(Path(name).stem in violation for violation in found)


def test_every_rule_has_a_planted_violation_and_says_what_to_do():
    assert {check for check, _, _ in PLANTED} == set(RULES)
    assert all(check.__doc__ for check in RULES)


def test_build_outputs_and_environments_are_not_ours(tmp_path):
    outside = ["build/utils.py", "venv/base.py", "dlkernels/lib/base.py", ".git/utils.py"]
    build(tmp_path, {name: "" for name in [*outside, "venv/pyvenv.cfg", "ours.py"]})
    assert [path.name for path in everything(tmp_path)] == ["ours.py"]

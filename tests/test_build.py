"""The build and the loader: in subprocesses, on the built package or on copies of it.

Copies that are compiled have a small csrc/ of their own, so that a build takes a second; their nvcc
is a script that has g++ compile. What the real one makes is in test_cuda_build.py.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dlkernels
from dlkernels import info

ROOT = Path(dlkernels.__file__).resolve().parent.parent
LIBRARIES = sorted((ROOT / "dlkernels" / "lib").glob("*.so"))
BUILD = "from setuptools import build_meta; build_meta.build_editable('wheel')"

needs_source = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="dlkernels is installed from a wheel"
)
needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one library for this architecture"
)


def run(code, cwd, **environment):
    """Runs Python code in cwd; `import dlkernels` takes the package there, if there is one.

    Builds find no nvcc, unless CUDA_HOME is in the environment given.
    """
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(cwd), "CUDA_HOME": "none"} | environment,
        capture_output=True,
        text=True,
    )


def succeed(code, cwd, **environment):
    done = run(code, cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def package(tmp_path):
    """A copy of what an import reads: the package with its libraries, and the sources."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dlkernels", tmp_path / "dlkernels", ignore=ignored)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


@pytest.fixture
def project(tmp_path):
    """A project of one header and two sources with the real setup.py."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    write(tmp_path / "dlkernels" / "__init__.py", '__version__ = "0"\n')
    write(tmp_path / "csrc" / "value.h", "inline int value() { return 1; }\n")
    for name in ("one", "two"):
        source = f'#include "../value.h"\nextern "C" int {name}() {{ return value(); }}\n'
        write(tmp_path / "csrc" / "cpu" / f"{name}.cpp", source)
    (tmp_path / "wheel").mkdir()
    return tmp_path


NVCC = """\
#!{python}
import subprocess, sys

words = sys.argv[1:]
if "--version" in words:
    print("Cuda compilation tools, release {version}, V{version}.48")
elif "--dryrun" in words:
    print("#$ TOP={root}/bin/..", file=sys.stderr)
else:
    print("ptxas info    : Used 10 registers", file=sys.stderr)
    print("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", file=sys.stderr)
    print("three.cu(1): warning: as nvcc words it", file=sys.stderr)
    compiler = words.pop(words.index("-ccbin") + 1)
    others = ("-ccbin", "-gencode", "-Xptxas", "-Xcompiler")
    words = [word for word in words if not word.startswith(others)]
    sys.exit(subprocess.call([compiler, "-x", "c++", "-fPIC", *words]))
"""


@pytest.fixture
def toolkit(project):
    """A CUDA toolkit for the project, which gets a CUDA source and its header."""
    root = project / "toolkit"
    write_nvcc(root, "13.0")
    write(root / "lib" / "libcudart_static.a", "!<arch>\n")
    write(project / "csrc" / "cuda" / "three.cuh", "inline int three() { return 3; }\n")
    write(
        project / "csrc" / "cuda" / "three.cu",
        '#include "three.cuh"\nextern "C" int cuda_three() { return three(); }\n',
    )
    return root


def write_nvcc(root, version):
    write(root / "bin" / "nvcc", NVCC.format(python=sys.executable, root=root, version=version))
    (root / "bin" / "nvcc").chmod(0o755)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def compiled(output):
    """(source, library) of each compilation that ninja says it ran."""
    pattern = r"compile csrc/(?:cpu|cuda)/(\w+)\.(?:cpp|cu) for (?:cpu_)?(\w+)"
    return sorted(re.findall(pattern, output))


def note_of(project):
    return json.loads((project / "dlkernels" / "lib" / "build.json").read_text())


def isas():
    return list(dlkernels._build["cpu"])


# -------------------------------------------------------------------------------------- libraries


def test_every_library_of_the_note_is_there():
    assert LIBRARIES
    names = {f"libdlkernels_cpu_{isa}.so" for isa in isas()}
    names |= {"libdlkernels_cuda.so"} if dlkernels._build["cuda"] else set()
    assert {path.name for path in LIBRARIES} == names


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_library_needs_only_the_stable_abi(library):
    symbols = subprocess.run(
        ["nm", "-D", "--demangle", library], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_" in symbols or "torch_call_dispatcher" in symbols  # nm does see symbols
    assert not re.findall(r".*\b(?:at|c10)::.*", symbols)
    assert not re.findall(r".*\bPy[A-Z_]\w*", symbols)
    needed = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    assert "libtorch_cpu.so" in needed
    assert not re.findall(r".*(?:gomp|libomp|libpython|RPATH|RUNPATH).*", needed)


# ------------------------------------------------------------------------------------- the choice


@needs_x86
@pytest.mark.parametrize("capability, library", [("default", "plain"), ("avx2", "avx2")])
def test_library_obeys_aten_cpu_capability(capability, library):
    if not dlkernels._cpu_features().issuperset(dlkernels._build["cpu"][library]["isa"]):
        pytest.skip(f"this CPU lacks {library}")
    code = "from dlkernels.info import cpu_library; print('library', cpu_library())"
    assert f"library {library}\n" in succeed(code, ROOT, ATEN_CPU_CAPABILITY=capability)


def test_exactly_one_library_is_mapped():
    code = "import dlkernels; print(open('/proc/self/maps').read())"
    mapped = set(re.findall(r"libdlkernels_cpu_(\w+)\.so", succeed(code, ROOT)))
    assert mapped == {info.cpu_library()}


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@needs_x86
@pytest.mark.parametrize(
    "features, capability, library",
    [
        (AVX512, "AVX512", "avx512"),
        (AVX512, "AVX2", "avx2"),
        (AVX512, "DEFAULT", "plain"),
        (AVX512 - {"avx512vl"}, "AVX512", "avx2"),
        (AVX2, "AVX512", "avx2"),  # the variable asks for more than the CPU has
        (AVX2 - {"fma"}, "AVX2", "plain"),
        (set(), "AVX512", "plain"),
    ],
)
def test_choice_never_exceeds_the_cpu_or_the_capability(monkeypatch, features, capability, library):
    monkeypatch.setattr(dlkernels, "_cpu_features", lambda: features)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert dlkernels._choose_library(dlkernels._build) == library


# -------------------------------------------------------------------------------------- the import


def test_import_without_libraries_names_the_command(package):
    shutil.rmtree(package / "dlkernels" / "lib")
    done = run("import dlkernels", package)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        f"ImportError: dlkernels: nothing is built in {package}/dlkernels/lib; "
        f"run: pip install -e {package}"
    )


def test_import_with_a_broken_library_names_the_command(package):
    for library in (package / "dlkernels" / "lib").glob("*.so"):
        library.write_bytes(b"not a library")
    done = run("import dlkernels", package)
    assert done.returncode == 1
    assert "ImportError: dlkernels: cannot load" in done.stderr
    assert f"run: pip install -e {package}" in done.stderr


@needs_source
def test_import_warns_of_stale_libraries(package):
    code = "import dlkernels; print(dlkernels.__file__)"
    output = succeed(code, package)
    assert str(package) in output
    assert "UserWarning: dlkernels" not in output
    header = package / "csrc" / "check.h"
    header.write_text(header.read_text() + "\n")
    warning = (
        f"the built libraries are stale (changed: csrc/check.h); run: pip install -e {package}"
    )
    assert f"<string>:1: UserWarning: dlkernels: {warning}" in succeed(code, package)


@needs_source
def test_added_and_removed_sources_are_stale(package, monkeypatch):
    monkeypatch.setattr(dlkernels, "_ROOT", package)
    monkeypatch.setattr(dlkernels, "_LIBRARIES", package / "dlkernels" / "lib")
    added = ["csrc/cpu/added.cpp", "csrc/cuda/added.cu", "csrc/cuda/added.cuh"]
    for name in added:
        write(package / name, "")
    (package / "csrc" / "check.h").unlink()
    changed = ", ".join(["csrc/check.h", *added])
    with pytest.warns(UserWarning, match=rf"\(changed: {changed}\)"):
        dlkernels._read_build()


# ------------------------------------------------------------------------------------------- CUDA

IMPORT = """\
import importlib.util, sys, torch, torch._dynamo
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: {triton} if name == "triton" else find(name)
torch.version.cuda = {cuda!r}
import dlkernels
from dlkernels import info
mapped = open("/proc/self/maps").read()
print("owner:", dlkernels.config.libraries.get("cuda"))
print("mapped:", "libdlkernels_cuda" in mapped)
print("info:", next(on_cuda for op, _, on_cuda in info.owners() if op == "conv2d"))
print("twins:", "dlkernels.kernels.cross_entropy" in sys.modules)
"""
TWIN = "def register(key):\n    print('registered:', key, __name__)\n"


def plant_cuda(package, built):
    """Gives the package a CUDA library, of nothing, or none; and a Triton twin."""
    folder = package / "dlkernels" / "lib"
    note = note_of(package)
    note["cuda"] = {"archs": ["8.0+PTX"], "nvcc": "13.0.48", "flags": ""} if built else None
    write(folder / "build.json", json.dumps(note))
    library = folder / "libdlkernels_cuda.so"
    library.unlink(missing_ok=True)
    if built:
        empty = ["g++", "-shared", "-x", "c++", "/dev/null", "-o", library]
        subprocess.run(empty, check=True)
    shutil.rmtree(package / "dlkernels" / "kernels", ignore_errors=True)
    write(package / "dlkernels" / "kernels" / "__init__.py", "")
    write(package / "dlkernels" / "kernels" / "common.py", "")
    write(package / "dlkernels" / "kernels" / "cross_entropy.py", TWIN)
    write(package / "dlkernels" / "kernels" / "conv2d.py", TWIN)


def test_cuda_library_is_left_alone_under_a_cpu_build_of_torch(package):
    plant_cuda(package, built=True)
    output = succeed(IMPORT.format(cuda=None, triton=True), package)
    assert "owner: None\n" in output and "mapped: False\n" in output
    assert "info: stock: torch is a CPU build\n" in output
    assert "registered:" not in output and "twins: False\n" in output


def test_cuda_library_is_loaded_under_a_cuda_build_of_torch(package):
    plant_cuda(package, built=True)
    output = succeed(IMPORT.format(cuda="13.0", triton=True), package)
    assert "owner: cuda\n" in output and "mapped: True\n" in output
    assert "info: stock: cuda lacks conv2d_algorithm, " in output  # it is of nothing
    assert re.findall("registered: .*", output) == ["registered: CUDA dlkernels.kernels.conv2d"]
    assert "twins: False\n" in output


def test_a_cuda_library_does_without_triton(package):
    plant_cuda(package, built=True)
    output = succeed(IMPORT.format(cuda="13.0", triton=None), package)
    assert "owner: cuda\n" in output and "registered:" not in output


def test_a_broken_cuda_library_names_the_command(package):
    plant_cuda(package, built=True)
    write(package / "dlkernels" / "lib" / "libdlkernels_cuda.so", "not a library")
    done = run(IMPORT.format(cuda="13.0", triton=True), package)
    assert done.returncode == 1
    assert f"cannot load {package}/dlkernels/lib/libdlkernels_cuda.so: " in done.stderr
    assert f"; run: pip install -e {package}" in done.stderr


def test_triton_stands_in_where_no_cuda_library_is_built(package):
    plant_cuda(package, built=False)
    output = succeed(IMPORT.format(cuda="13.0", triton=True), package)
    assert "owner: triton\n" in output and "mapped: False\n" in output
    assert re.findall("registered: .*", output) == [
        "registered: CUDA dlkernels.kernels.conv2d",
        "registered: CUDA dlkernels.kernels.cross_entropy",
    ]
    assert "info: stock: triton lacks " in output  # the twin here registers nothing


def test_neither_cuda_library_nor_triton_is_stock(package):
    plant_cuda(package, built=False)
    output = succeed(IMPORT.format(cuda="13.0", triton=None), package)
    assert "owner: None\n" in output and "twins: False\n" in output
    assert "info: stock: no CUDA library is built, and there is no Triton\n" in output


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_an_old_gpu_has_no_kernel(monkeypatch, capability):
    with FakeTensorMode():
        x, target = torch.empty(4, 9, device="cuda"), torch.empty(4, device="cuda").long()
    monkeypatch.setitem(dlkernels.config.libraries, "cuda", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)
    assert dlkernels.config.is_gpu_too_old(0) == (capability < (8, 0))
    refusal = dlkernels.ops.cross_entropy._refusal(x, target, None, "mean", -100, 0.0)
    wanted = "no kernel for a GPU older than sm_80" if capability < (8, 0) else None
    assert refusal == wanted


def test_small_inputs_are_stock_on_a_cpu_only(monkeypatch):
    monkeypatch.setitem(dlkernels.config.libraries, "cuda", "cuda")
    with FakeTensorMode(), dlkernels.config.recording() as choices:
        for device in ("cpu", "cuda"):
            x = torch.empty(4, 9, device=device)
            dlkernels.functional.cross_entropy(x, torch.empty(4, device=device).long())
    assert [choice.kernel for choice in choices] == ["stock", "cuda"]


# --------------------------------------------------------------------------------------- the build


@needs_source
def test_second_build_compiles_only_what_changed(project):
    everything = sorted((name, isa) for name in ("one", "two") for isa in isas())
    assert compiled(succeed(BUILD, project)) == everything

    output = succeed(BUILD, project)
    assert compiled(output) == []
    assert "no work to do" in output

    write(project / "csrc" / "value.h", "inline int value() { return 2; }\n")
    assert compiled(succeed(BUILD, project)) == everything

    source = project / "csrc" / "cpu" / "two.cpp"
    write(source, source.read_text() + "\n")
    assert compiled(succeed(BUILD, project)) == [("two", isa) for isa in sorted(isas())]

    # Flags are part of the command.
    assert compiled(succeed(BUILD, project, CXXFLAGS="-DNDEBUG")) == everything


@needs_source
def test_second_build_compiles_only_what_changed_in_cuda(project, toolkit):
    output = succeed(BUILD, project, CUDA_HOME=str(toolkit))
    assert ("three", "cuda") in compiled(output)
    assert f"CUDA 13.0.48 of {toolkit}" in output

    output = succeed(BUILD, project, CUDA_HOME=str(toolkit))
    assert compiled(output) == []
    assert "no work to do" in output

    write(project / "csrc" / "cuda" / "three.cuh", "inline int three() { return 4; }\n")
    assert compiled(succeed(BUILD, project, CUDA_HOME=str(toolkit))) == [("three", "cuda")]

    # The toolkit in another folder, as in the next isolated build.
    toolkit.rename(project / "moved")
    write_nvcc(project / "moved", "13.0")
    assert compiled(succeed(BUILD, project, CUDA_HOME=str(project / "moved"))) == []

    # Another version of it is another compiler.
    write_nvcc(project / "moved", "13.1")
    output = succeed(BUILD, project, CUDA_HOME=str(project / "moved"))
    assert compiled(output) == [("three", "cuda")]


@needs_source
def test_build_notes_the_cuda_library(project, toolkit):
    succeed(BUILD, project, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST="")
    note = note_of(project)
    assert list(note["cuda"]) == ["archs", "nvcc", "flags"]
    assert (note["cuda"]["archs"], note["cuda"]["nvcc"]) == (["8.0+PTX", "9.0a"], "13.0.48")
    assert {"csrc/cuda/three.cu", "csrc/cuda/three.cuh"} <= set(note["sources"])
    library = project / "dlkernels" / "lib" / "libdlkernels_cuda.so"
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    assert " T cuda_three" in symbols.stdout


@needs_source
def test_nvcc_behind_a_wrapper(project, toolkit):
    wrapper = project / "bin" / "nvcc"
    write(wrapper, f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"
    assert f"CUDA 13.0.48 of {toolkit}" in succeed(BUILD, project, CUDA_HOME="", PATH=path)


@needs_source
def test_nvcc_of_the_wheels(project, toolkit):
    root = project / "nvidia" / "cu13"
    root.parent.mkdir()
    toolkit.rename(root)
    write_nvcc(root, "13.0")
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())
    if not shutil.which("g++", path=path):
        pytest.skip("nvcc and g++ are in one folder")
    assert f"CUDA 13.0.48 of {root}" in succeed(BUILD, project, CUDA_HOME="", PATH=path)


@needs_source
def test_without_nvcc_is_cpu_only_and_says_so(project, toolkit):
    succeed(BUILD, project, CUDA_HOME=str(toolkit))
    output = succeed(BUILD, project, CUDA_HOME="/nowhere")
    assert len(re.findall("; CPU only: no nvcc in CUDA_HOME=/nowhere$", output, re.M)) == 1
    assert compiled(output) == []
    assert note_of(project)["cuda"] is None
    assert not (project / "dlkernels" / "lib" / "libdlkernels_cuda.so").exists()


@needs_source
def test_an_old_nvcc_is_none(project, toolkit):
    write_nvcc(toolkit, "11.8")
    output = succeed(BUILD, project, CUDA_HOME=str(toolkit))
    assert f"CPU only: {toolkit}/bin/nvcc is not of CUDA 12 or newer\n" in output


@needs_source
@pytest.mark.parametrize(
    "listed, archs, flags",
    [
        ("8.6;9.0a+PTX", ["8.6", "9.0a+PTX"], ["86,sm_86", "90a,sm_90a", "90a,compute_90a"]),
        ("8.0 12.0", ["8.0", "12.0"], ["80,sm_80", "120,sm_120"]),
        ("5.0 7.5;8.0+PTX", ["8.0+PTX"], ["80,sm_80", "80,compute_80"]),  # too old: left out
    ],
)
def test_build_obeys_torch_cuda_arch_list(project, toolkit, listed, archs, flags):
    succeed(BUILD, project, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=listed)
    note = note_of(project)["cuda"]
    assert note["archs"] == archs
    found = re.findall(r"-gencode=arch=compute_(\w+),code=(\w+)", note["flags"])
    assert [",".join(words) for words in found] == flags


@needs_source
@pytest.mark.parametrize("listed", ["Hopper", "9", "8.0+ptx", "7.5"])
def test_build_refuses_other_words_for_archs(project, toolkit, listed):
    done = run(BUILD, project, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=listed)
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: expected" in done.stderr


@needs_source
def test_build_shows_warnings_of_nvcc_and_keeps_what_ptxas_says(project, toolkit):
    output = succeed(BUILD, project, CUDA_HOME=str(toolkit))
    assert "three.cu(1): warning: as nvcc words it" in output
    assert "registers" not in output and "spill" not in output
    kept = (project / "build" / "cuda" / "three.o.ptxas").read_text()
    assert "Used 10 registers" in kept and "0 bytes spill stores" in kept


@needs_source
def test_failing_cuda_source_says_how_to_do_without(project, toolkit):
    write(project / "csrc" / "cuda" / "three.cu", "int three() { return missing; }\n")
    done = run(BUILD, project, CUDA_HOME=str(toolkit))
    assert done.returncode != 0
    assert "missing" in done.stdout
    assert "(without the CUDA library: CUDA_HOME=none)" in done.stderr
    succeed(BUILD, project, CUDA_HOME="none")


@needs_source
def test_build_notes_what_was_built(project):
    succeed(BUILD, project, MAX_JOBS="1")
    folder = project / "dlkernels" / "lib"
    note = json.loads((folder / "build.json").read_text())
    assert list(note["cpu"]) == isas()
    assert sorted(note["sources"]) == [
        "csrc/cpu/one.cpp",
        "csrc/cpu/two.cpp",
        "csrc/value.h",
        "setup.py",
    ]
    assert note["cuda"] is None
    assert re.match(r"2\.\d+\.", note["torch"])
    flags = " ".join(how["flags"] for how in note["cpu"].values())
    assert "march=native" not in flags and "openmp" not in flags
    built = {f"libdlkernels_cpu_{isa}.so" for isa in isas()} | {"build.json"}
    assert {path.name for path in folder.iterdir()} == built  # nothing temporary is left


@needs_source
def test_wheel_contains_the_libraries(project):
    """And nothing of an earlier build."""
    code = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    write(project / "dlkernels" / "old.py", "")
    succeed(code, project)
    (project / "dlkernels" / "old.py").unlink()
    succeed(code, project)
    (wheel,) = (project / "wheel").glob("*.whl")
    assert re.fullmatch(r"dlkernels-0-py3-none-linux_\w+\.whl", wheel.name)
    shutil.unpack_archive(wheel, project / "unpacked", format="zip")
    unpacked = project / "unpacked" / "dlkernels"
    assert {path.name for path in unpacked.iterdir()} == {"__init__.py", "lib"}
    names = {path.name for path in (unpacked / "lib").iterdir()}
    assert names == {f"libdlkernels_cpu_{isa}.so" for isa in isas()} | {"build.json"}
    assert not (project / "dlkernels" / "lib").exists()


@needs_source
def test_failing_build_leaves_the_libraries_as_they_were(project):
    succeed(BUILD, project)
    folder = project / "dlkernels" / "lib"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write(project / "csrc" / "cpu" / "two.cpp", "int two() { return missing; }\n")
    done = run(BUILD, project)
    assert done.returncode != 0
    assert "missing" in done.stdout + done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@needs_source
def test_build_without_a_compiler_says_so(project):
    done = run(BUILD, project, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no C++ compiler: 'no-such-compiler' is not on PATH" in done.stderr


@needs_source
def test_torch_is_required_for_the_build_only_where_there_is_none(project):
    code = "from setuptools import build_meta; print(build_meta.get_requires_for_build_editable())"
    assert "['ninja']" in succeed(code, project)
    # An old torch, first on the path of this interpreter, is none.
    write(
        project / "torch" / "__init__.py", "raise ImportError('setup.py must not import torch')\n"
    )
    write(project / "torch" / "version.py", "__version__ = '2.10.1'\n")
    alone = "import sys; sys.executable = '/nowhere/python'; " + code
    output = succeed(alone, project, PATH="/usr/bin", VIRTUAL_ENV="", CONDA_PREFIX="")
    assert "['ninja', 'torch>=2.11']" in output
    write(project / "torch" / "version.py", "__version__ = '2.11.0+cu130'\n")
    assert "['ninja']" in succeed(alone, project, PATH="/usr/bin", VIRTUAL_ENV="", CONDA_PREFIX="")


@needs_source
def test_nvcc_is_required_for_a_cuda_build_of_torch_without_one(project, toolkit):
    write(project / "torch" / "__init__.py", "raise ImportError('not to be imported')\n")
    code = "from setuptools import build_meta; print(build_meta.get_requires_for_build_editable())"

    def required(cuda, **environment):
        text = f"__version__ = '2.15.0'\ncuda: Optional[str] = {cuda!r}\n"
        write(project / "torch" / "version.py", text)
        return eval(succeed(code, project, PATH="/nowhere", **environment).splitlines()[-1])

    assert required("13.2", CUDA_HOME="") == [
        "ninja",
        "nvidia-cuda-nvcc==13.2.*",
        "nvidia-cuda-crt==13.2.*",
        "nvidia-nvvm==13.2.*",
        "nvidia-cuda-runtime==13.2.*",
        "nvidia-cuda-cccl==13.*",
    ]
    assert required(None, CUDA_HOME="") == ["ninja"]
    assert required("12.8", CUDA_HOME="") == ["ninja"]  # its wheels have no nvcc
    assert required("13.2", CUDA_HOME="none") == ["ninja"]
    assert required("13.2", CUDA_HOME=str(toolkit)) == ["ninja"]


# ---------------------------------------------------------------------------------------- the info


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_info_prints(rich):
    hide = "import sys; sys.modules['rich'] = None; " if not rich else ""
    code = hide + "import runpy; runpy.run_module('dlkernels.info', run_name='__main__')"
    output = succeed(code, ROOT, COLUMNS="200")
    assert "RuntimeWarning" not in output  # importing dlkernels must not import dlkernels.info
    assert ("─" in output) == rich
    for word in (dlkernels.__version__, info.cpu_library(), "cross_entropy"):
        assert word in output


def test_info_names_the_owner_of_every_op():
    owners = {op: kernels for op, *kernels in info.owners()}
    wanted = "stock: torch is a CPU build"
    if torch.version.cuda:
        wanted = dlkernels.config.libraries.get("cuda", "stock: no CUDA library is built, and")
    assert owners["cross_entropy"][0] == f"cpu/{info.cpu_library()}"
    assert owners["cross_entropy"][1].startswith(wanted)

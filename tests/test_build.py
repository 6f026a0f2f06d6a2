"""The build and the loader: in subprocesses, on the built package or on copies of it.

Copies that are compiled have a small csrc/ of their own, so that a build takes a second.
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
    """Runs Python code in cwd; `import dlkernels` takes the package there, if there is one."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(cwd)} | environment,
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


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def compiled(output):
    """(source, instruction set) of each compilation that ninja says it ran."""
    return sorted(re.findall(r"compile csrc/cpu/(\w+)\.cpp for (\w+)", output))


def isas():
    return list(dlkernels._build["cpu"])


# -------------------------------------------------------------------------------------- libraries


def test_every_library_of_the_note_is_there():
    assert LIBRARIES
    assert {path.name for path in LIBRARIES} == {f"libdlkernels_cpu_{isa}.so" for isa in isas()}


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
    write(package / "csrc" / "cpu" / "added.cpp", "")
    (package / "csrc" / "check.h").unlink()
    with pytest.warns(UserWarning, match=r"\(changed: csrc/check.h, csrc/cpu/added.cpp\)"):
        dlkernels._read_build()


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
    code = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    succeed(code, project)
    (wheel,) = (project / "wheel").glob("*.whl")
    assert "-any.whl" not in wheel.name
    shutil.unpack_archive(wheel, project / "unpacked", format="zip")
    names = {path.name for path in (project / "unpacked" / "dlkernels" / "lib").iterdir()}
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
    assert owners["cross_entropy"][0] == f"cpu/{info.cpu_library()}"
    if not dlkernels._build["cuda"]:
        assert owners["cross_entropy"][1] == "stock: no CUDA library is built"

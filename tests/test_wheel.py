"""The wheel of this tree: its name, what is in it, and that it runs where there is no compiler.

ninja is a stand-in that finds the libraries built, as they are.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from test_build import LIBRARIES, ROOT, needs_source, run, write, write_nvcc

import dlkernels
from dlkernels import info

BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
USE = """\
import dlkernels, torch
print("of", dlkernels.__file__)
dlkernels.config.kernels = "own"
x, target = torch.randn(64, 500, requires_grad=True), torch.randint(500, (64,))
print(dlkernels.explain(dlkernels.nn.CrossEntropyLoss(), x, target))
(ours,) = torch.autograd.grad(dlkernels.functional.cross_entropy(x, target), x)
(stock,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x, target), x)
torch.testing.assert_close(ours, stock)
print("right")
print("a repair:", dlkernels._REPAIR)
"""

pytestmark = needs_source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    ignored = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "dlkernels", tree / "dlkernels", ignore=ignored)
    (tree / "build").mkdir()
    for library in LIBRARIES:
        os.symlink(library, tree / "build" / library.name)
    write(tree / "bin" / "ninja", "#!/bin/sh\n")
    (tree / "bin" / "ninja").chmod(0o755)
    if dlkernels._build["cuda"]:
        write_nvcc(tree / "toolkit", "13.0")
    home = str(tree / "toolkit") if dlkernels._build["cuda"] else "none"
    path = f"{tree / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = run(BUILD, tree, PATH=path, CUDA_HOME=home)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / "wheel").iterdir()
    return built


def test_the_wheel_is_for_any_python_of_this_platform(wheel):
    name = f"dlkernels-{dlkernels.__version__}"
    assert re.fullmatch(rf"{re.escape(name)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        facts = email.message_from_bytes(archive.read(f"{name}.dist-info/WHEEL"))
        metadata = email.message_from_bytes(archive.read(f"{name}.dist-info/METADATA"))
    assert facts.get_all("Tag") == [wheel.stem.removeprefix(f"{name}-")]
    assert facts["Root-Is-Purelib"] == "false"
    assert metadata["Requires-Python"] == ">=3.11" and metadata["Version"] == dlkernels.__version__
    assert "torch>=2.11" in metadata.get_all("Requires-Dist")


def test_the_wheel_holds_the_package_and_its_libraries_alone(wheel):
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dlkernels").rglob("*.py")
        if "lib" not in path.parts[len(ROOT.parts) :]
    }
    libraries = {f"dlkernels/lib/{path.name}" for path in LIBRARIES}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == package | libraries | {"dlkernels/lib/build.json"}
        for path in LIBRARIES:
            assert archive.read(f"dlkernels/lib/{path.name}") == path.read_bytes()


def test_the_wheel_runs_without_a_compiler(wheel, tmp_path):
    """In an environment of its own, which sees the other packages of this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {"PATH": str(python.parent), "HOME": str(tmp_path)}
    assert not any(shutil.which(name, path=environment["PATH"]) for name in ("g++", "cc", "ninja"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    done = subprocess.run(
        [*install, "--no-index", wheel], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    done = subprocess.run(
        [python, "-W", "always", "-c", USE],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"of {site}/dlkernels/__init__.py\n" in done.stdout and "right\n" in done.stdout
    assert f"cpu/{info.cpu_library()}" in done.stdout
    assert "a repair: pip install --force-reinstall dlkernels\n" in done.stdout
    assert "dlkernels: " not in done.stderr  # no warning of ours

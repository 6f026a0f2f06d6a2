"""Every block of Python in README.md and docs/ runs."""

import re
from pathlib import Path

import pytest

import dlkernels

ROOT = Path(dlkernels.__file__).resolve().parent.parent
BLOCKS = [
    pytest.param(path, code, id=f"{path.name}-{at}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if path.is_file()  # not so beside an installed wheel
    for at, code in enumerate(re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S))
]


def test_there_are_blocks():
    names = {parameters.values[0].name for parameters in BLOCKS}
    assert {"README.md", "using.md"} <= names


@pytest.mark.parametrize(("path", "code"), BLOCKS)
def test_a_block_runs(path, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{path.name}", "exec"), {"__name__": "__main__"})


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"

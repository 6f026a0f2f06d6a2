"""``pytest benchmarks``: the rows of benchmarks/<op>.py as pytest-benchmark cases.

    pytest benchmarks --benchmark-group-by=group -k 4096x1000

The tests of an op run once before its first row: where they fail no speed is reported.
"""

import pytest
import torch

from benchmarks import run


def pytest_xdist_auto_num_workers():
    """None: what is timed has the machine to itself, and pytest-benchmark measures in no worker."""
    return 0


def pytest_addoption(parser):
    group = parser.getgroup("dlkernels")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--threads", type=int, default=2)
    group.addoption("--no-gate", action="store_true")


def _rows(config) -> dict:
    rows = run.rows_of(run.OPS, config.getoption("--device"), None)
    return {f"{row.op} {row.name}": row for row in rows}


def pytest_generate_tests(metafunc):
    if "row_name" in metafunc.fixturenames:  # names, which pytest-benchmark can save as JSON
        names = list(_rows(metafunc.config))
        metafunc.parametrize("row_name", names, ids=[name.replace(" ", "_") for name in names])


@pytest.fixture
def row(request, row_name):
    """The benchmarks.measure.Row of that name."""
    return _rows(request.config)[row_name]


@pytest.fixture(scope="session")
def green(request):
    """A function that runs the tests of an op, once, and ends the session where they fail."""
    passed = set()

    def check(op: str) -> None:
        if op not in passed and not request.config.getoption("--no-gate"):
            try:
                run.gate(op, request.config.getoption("--device"))
            except run.RedGate as red:
                pytest.exit(str(red), returncode=1)
        passed.add(op)

    return check


@pytest.fixture(autouse=True)
def threads(request):
    """As many threads as the command asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)

"""Every test draws its data from a seed made of its own id: adding a test shifts nobody's data."""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import pytest

# The workers of pytest-xdist share the cores: a thread that waits leaves its own to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import dlkernels

# The files that take longest: they are begun first, so that the workers end together.
LONG = ("sanitizers", "emulated", "triton", "instruction_sets", "cuda_build", "build")


def pytest_xdist_auto_num_workers(config):
    """No workers for one file: it is not divided, and its output and breakpoints come through."""
    files = [Path(argument.partition("::")[0]) for argument in config.args]
    return 0 if len(set(files)) == 1 and files[0].suffix == ".py" else None


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        order = {f"test_{name}.py": at for at, name in enumerate(LONG)}
        items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def _seed(request):
    seed = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _settings():
    """What a test sets, the next one does not meet."""
    config = dlkernels.config
    threads, kernels, winograd = torch.get_num_threads(), config.kernels, config.winograd
    yield
    torch.set_num_threads(threads)
    config.kernels, config.winograd = kernels, winograd


@pytest.fixture
def own():
    """Our kernels, whatever the size; an input that they do not take is an error."""
    dlkernels.config.kernels = "own"


@pytest.fixture
def one_thread():
    """A second thread only waits where the machine is busy; the tests of threads set more."""
    torch.set_num_threads(1)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN (the largest integer), from C++ too: unwritten elements are seen."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # stock has not all on a GPU
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill

"""Every test draws its data from a seed made of its own id: adding a test shifts nobody's data."""

import hashlib
import random

import numpy as np
import pytest
import torch

import dlkernels


@pytest.fixture(autouse=True)
def _seed(request):
    seed = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _settings():
    """What a test sets, the next one does not meet."""
    threads, kernels = torch.get_num_threads(), dlkernels.config.kernels
    yield
    torch.set_num_threads(threads)
    dlkernels.config.kernels = kernels


@pytest.fixture
def own():
    """Our kernels, whatever the size; an input that they do not take is an error."""
    dlkernels.config.kernels = "own"


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

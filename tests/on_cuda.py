"""Runs tests that were written for the CPU on a GPU.

    python -m pytest -p tests.on_cuda tests/test_<op>.py

Every tensor that a test makes is made there. What speaks of the CPU itself is left out.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("DLKERNELS_TESTS_ON", "cuda")

_ASSERT = "an assertion on the device ends the process: test_cross_entropy_cuda.py, one by one"
_CPU_RECORD = "expects the CPU library's name; test_cross_entropy_cuda.py::test_choice"

# file::test, or file::test[parameters] -> why it is left out.
LEFT_OUT = {
    "test_cross_entropy.py::test_autocast": "the CPU's; test_cross_entropy_cuda.py has the GPU's",
    "test_cross_entropy.py::test_choice": _CPU_RECORD,
    "test_cross_entropy.py::test_the_same_bits_for_any_number_of_threads": "threads of the CPU",
    "test_cross_entropy.py::test_in_a_forked_child": "CUDA does not survive a fork",
    "test_cross_entropy.py::test_raw_ops_refuse_a_target_out_of_range": _ASSERT,
    **{
        f"test_cross_entropy.py::test_refusals_are_stocks[{case}-{kernels}]": _ASSERT
        for case in (
            "target_too_large",
            "target_negative",
            "target_too_large_in_pixels",
            "ignored_index_does_not_hide_others",
        )
        for kernels in ("own", "auto")
    },
    "test_cross_entropy_paths.py::test_a_target_out_of_range": _ASSERT,
}


def reason(nodeid: str) -> str | None:
    """Why a test is left out, if it is."""
    name = nodeid.rpartition("/")[2]
    return LEFT_OUT.get(name) or LEFT_OUT.get(name.partition("[")[0])


def pytest_configure(config):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("-p tests.on_cuda: torch sees no CUDA device")
    torch.set_default_device(DEVICE)


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if reason(item.nodeid)]
    items[:] = [item for item in items if not reason(item.nodeid)]
    config.hook.pytest_deselected(items=left_out)

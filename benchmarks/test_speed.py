"""Every row by every provider, for people who live in pytest: see conftest.py for the command.

A round is one sample of benchmarks/run.py, after the same untimed preparation. But the rounds of a
provider follow each other here, so take the ratio that is to be believed from benchmarks/run.py.
"""

import pytest
import torch

from benchmarks import measure

PROVIDERS = ("stock", "torch.compile", "own", "auto", "auto compiled")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_row(benchmark, green, request, row_name, row, provider):
    green(row.op)
    device = request.config.getoption("--device")
    found = next(one for one in row.providers() if one.name == provider)
    benchmark.group = row_name
    benchmark.extra_info.update(reason=row.reason, bytes=row.bytes, flops=row.flops)

    def calls():
        for _ in range(row.calls):
            found.call()
        if device == "cuda":
            torch.cuda.synchronize()

    with measure.kernels_chosen(found.kernels), torch.set_grad_enabled(row.grad):
        try:
            found.prepare()
            found.call()
        except NotImplementedError as error:
            pytest.skip(f"no kernel of ours: {error}")
        benchmark.pedantic(calls, setup=found.prepare, rounds=measure.ROUNDS[0], warmup_rounds=2)

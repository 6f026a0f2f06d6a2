"""The results files: one JSON object per row and provider on each line, only ever appended to."""

import json
import os
import statistics
from pathlib import Path

from benchmarks.measure import Measured, Row

RESULTS = Path(__file__).with_name("results")


def of_row(row: Row, measured: dict, about: dict) -> list[dict]:
    """One object per provider of a row that ``measure.measure`` has timed.

    A ratio is the other's median over this one's: above 1, this provider is the faster.
    ``ratio_to_eager`` is to stock eager in the row's own layout, ``ratio_to_best_stock`` to stock
    eager in the layout that suits it best, ``ratio_to_compile`` to torch.compile of stock.

    Args:
        row: what was timed.
        measured: what ``measure.measure`` returned for it.
        about: machine (its fields), gate, date, commit and command, added to each object.
    """
    medians = {m.name: statistics.median(m.samples) for m in measured["providers"] if m.samples}
    eager = [medians[m.name] for m in measured["providers"] if m.eager_stock and m.samples]
    others = {
        "ratio_to_best_stock": min(eager),
        "ratio_to_eager": eager[0],
        "ratio_to_compile": medians.get("torch.compile"),
    }
    fields = {
        "op": row.op,
        "row": row.name,
        "reason": row.reason,
        "work": row.work,
        "dtype": row.dtype,
        "shape": list(row.shape),
        "layout": row.layout,
        "calls": row.calls,
        "bytes": row.bytes,
        "flops": row.flops,
        "batches": measured["batches"],
        "steady": measured["steady"],
        "core_latency_ns": measured["core_latency_ns"],
        "busy_elsewhere": measured["busy_elsewhere"],
    }
    return [
        fields | _times(m, others) | _rates(row, m, about["machine"]) | _rest(m) | about
        for m in measured["providers"]
    ]


def _times(m: Measured, others: dict) -> dict:
    names = ("median_ms", "min_ms", "p25_ms", "p75_ms")
    if not m.samples:
        nothing = dict.fromkeys([*names, *others])
        return {"provider": m.name, "samples": 0, **nothing}
    median = statistics.median(m.samples)
    low, _, high = statistics.quantiles(m.samples, n=4, method="inclusive")
    times = dict(zip(names, (median, min(m.samples), low, high), strict=True))
    ratios = {name: other and other / median for name, other in others.items()}
    return {
        "provider": m.name,
        "samples": len(m.samples),
        **{name: round(value, 6) for name, value in times.items()},
        **{name: value and round(value, 4) for name, value in ratios.items()},
    }


def _rates(row: Row, m: Measured, machine: dict) -> dict:
    """What was reached, and the fraction of the machine's ceilings: null where not measured."""
    rates = dict.fromkeys(("gb_s", "gflop_s", "copy_fraction", "fma_fraction"))
    if not m.samples:
        return rates
    seconds = statistics.median(m.samples) * 1e-3
    rates["gb_s"] = round(row.bytes / seconds * 1e-9, 3)
    rates["gflop_s"] = round(row.flops / seconds * 1e-9, 3)
    if machine.get("copy_gb_s"):
        rates["copy_fraction"] = round(rates["gb_s"] / machine["copy_gb_s"], 4)
    if machine.get("fma_gflops"):
        rates["fma_fraction"] = round(rates["gflop_s"] / machine["fma_gflops"], 4)
    return rates


def _rest(m: Measured) -> dict:
    return {
        "peak_bytes": m.peak_bytes,
        "page_faults": m.page_faults,
        "kernel": m.kernel,
        "difference": m.difference,
        "missing": m.missing,
    }


def append(path: Path, objects: list[dict]) -> None:
    """Adds the objects to a JSONL file in one write, so that no reader sees half a row.

    Raises:
        OSError: the file cannot be written.
    """
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in objects)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(text.encode())


def read(path: Path) -> list[dict]:
    """All objects of a JSONL file.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
    """
    objects = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(one, dict):
            raise ValueError(f"{path}:{number}: wanted an object, got {type(one).__name__}")
        objects.append(one)
    return objects

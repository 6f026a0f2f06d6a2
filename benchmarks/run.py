"""Times ours, stock, torch.compile and peers in turn, and keeps the results.

    python -m benchmarks.run [op ...] --device cpu|cuda [--rows REGEX] [--providers REGEX] [--json]

The tests of an op run first: where they fail no speed is reported. Results are appended to
benchmarks/results/<machine>.jsonl, from which benchmarks/report.py writes the README's table.
``own`` is our kernel wherever there is one, ``auto`` is what a user gets; so a row that auto hands
to stock does not pose as a win.
"""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import machine, measure, records

ROOT = Path(__file__).resolve().parent.parent
OPS = (
    "batch_norm",
    "conv2d",
    "conv2d_max_pool2d",
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "models",
    "residual_block",
)
COLUMNS = {  # heading: field, format, factor
    "median ms": ("median_ms", ".4g", 1),
    "min": ("min_ms", ".4g", 1),
    "p25": ("p25_ms", ".4g", 1),
    "p75": ("p75_ms", ".4g", 1),
    "x stock": ("ratio_to_best_stock", ".2f", 1),
    "x compile": ("ratio_to_compile", ".2f", 1),
    "of copy": ("copy_fraction", ".0%", 1),
    "of FMA": ("fma_fraction", ".0%", 1),
    "peak MB": ("peak_bytes", ".4g", 1e-6),
    "faults": ("page_faults", "d", 1),
}


class RedGate(RuntimeError):
    """The tests of an op failed, so its speed means nothing."""


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Times ours, stock, torch.compile and peers in turn, in one process.",
    )
    made.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (default: all)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    made.add_argument("--rows", type=re.compile, metavar="REGEX", help="only rows so named")
    made.add_argument(
        "--providers", type=re.compile, metavar="REGEX", help="only these, and stock beside them"
    )
    made.add_argument(
        "--repeats",
        type=int,
        default=4,
        help="most batches of a row, taken until median/min < 1.15 (default: 4)",
    )
    made.add_argument("--json", action="store_true", help="print JSON lines instead of tables")
    made.add_argument("--out", type=Path, metavar="FILE", help="results file to append to")
    made.add_argument(
        "--no-gate", action="store_true", help='skip the tests; results say "gate": "skipped"'
    )
    return made


def test_command(op: str, device: str) -> list[str]:
    """pytest, over an op's tests on a device."""
    plugin = ["-p", "tests.on_cuda"] if device == "cuda" else []
    return [sys.executable, "-m", "pytest", "-q", *plugin, f"tests/test_{op}.py"]


def gate(op: str, device: str = "cpu") -> None:
    """Runs the tests of an op on a device.

    Raises:
        RedGate: they failed, or there are none; the message ends with pytest's last lines.
    """
    tests, command = f"tests/test_{op}.py", test_command(op, device)
    done = subprocess.run([*command, "-x"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RedGate(
            f"{tests} failed (exit status {done.returncode}): no speed is reported.\n{tail}"
        )


def commit() -> str | None:
    """The commit of the source, '-dirty' behind it if a tracked file differs; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def library() -> str:
    """The CPU library of dlkernels that is loaded: "avx2"."""
    from dlkernels import info

    return info.cpu_library()


def rows_of(ops: Sequence[str], device: str, wanted: re.Pattern | None) -> list[measure.Row]:
    """The rows of some ops whose names ``wanted`` finds."""
    modules = [importlib.import_module(f"benchmarks.{op}") for op in ops]
    rows = [row for module in modules for row in module.rows(device)]
    return [row for row in rows if wanted is None or wanted.search(row.name)]


def _check(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, in one line."""
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        return f"no benchmark of {unknown[0]!r}: there are {', '.join(OPS)}"
    if options.threads < 1 or options.repeats < 1:
        return f"--threads {options.threads} --repeats {options.repeats}: both must be at least 1"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no CUDA device"
    if options.out and not options.out.parent.is_dir():
        return f"--out {options.out}: there is no folder {options.out.parent}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 1 on a red gate, or 2 on a wrong option."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = parser()
    options = command.parse_args(arguments)
    ops = tuple(options.ops) or OPS
    if wrong := _check(options):
        command.error(wrong)
    rows = rows_of(ops, options.device, options.rows)
    if not rows:
        names = ", ".join(row.name for row in rows_of(ops, options.device, None))
        command.error(f"--rows {options.rows.pattern}: no such row; there are {names}")
    say = (lambda *what: print(*what, file=sys.stderr)) if options.json else print

    torch.set_num_threads(options.threads)
    if not options.no_gate:
        for op in ops:
            try:
                gate(op, options.device)
            except RedGate as red:
                print(red, file=sys.stderr)
                return 1
            say(f"tests/test_{op}.py: green")
    fields = machine.describe(options.device, options.threads) | {"library": library()}
    say(machine.line(fields))
    about = {
        "gate": "skipped" if options.no_gate else "green",
        "machine": fields,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.run", *arguments]),
    }
    out = options.out or records.RESULTS / f"{machine.slug(fields)}.jsonl"
    out.parent.mkdir(exist_ok=True)

    def chosen(provider: str) -> bool:
        return options.providers is None or bool(options.providers.search(provider))

    for row in rows:
        measured = measure.measure(row, options.device, options.repeats, chosen)
        made = records.of_row(row, measured, about)
        records.append(out, made)
        show(made, as_json=options.json)
    say(f"{len(rows)} rows -> {out}")
    return 0


def show(made: list[dict], as_json: bool) -> None:
    """Prints the records of one row: a table, or JSON lines where rich is missing."""
    try:
        import rich.console
        import rich.table
    except ModuleNotFoundError:
        as_json = True
    if as_json:
        for one in made:
            print(json.dumps(one), flush=True)
        return
    first = made[0]
    table = rich.table.Table(
        title=f"{first['op']} {first['row']} ({first['work']}): {first['reason']}",
        caption=f"{first['samples']} samples of {first['calls']} calls, "
        f"{'steady' if first['steady'] else 'NOT steady'} after {first['batches']} batches; "
        f"core to core {first['core_latency_ns']} ns; "
        f"cores busy elsewhere {first['busy_elsewhere']}; gate {first['gate']}",
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("provider", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("kernel")
    for one in made:
        cells = (
            "-" if one[name] is None else format(one[name] * scale, form)
            for name, form, scale in COLUMNS.values()
        )
        table.add_row(one["provider"], *cells, one["missing"] or one["kernel"])
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    # Into a file or a pipe a table keeps its columns; on a terminal it keeps to the width.
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

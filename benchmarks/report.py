"""Writes the README's table, all rows, and a picture, from what benchmarks/run.py has measured.

    python -m benchmarks.report [benchmarks/results/<machine>.jsonl ...]

The table of the rows that SHOWN names goes between the two comments of the README that hold its
place, all rows to docs/benchmarks.md, the picture (ratio bars of the rows shown, roofline of all)
beside the results file. Of each row the newest record counts. Records whose gate was skipped count
nowhere.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import machine, records

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
README = Path(__file__).resolve().parent.parent / "README.md"
ALL = Path("docs") / "benchmarks.md"  # beside the README

# What the README shows of each op, gains and losses: its usual sizes, a large one, a small one.
SHOWN = {
    "batch_norm": (
        "64x64x32x32",
        "64x64x32x32 NCHW",
        "64x64x32x32 residual",
        "64x256x8x8",
        "64x64x32x32 forward",
        "1x16x32x32 NCHW",
    ),
    "conv2d": (
        "64x64x32x32 64 3x3",
        "64x64x32x32 64 3x3 NCHW",
        "64x256x8x8 256 3x3",
        "1x64x56x56 64 3x3 forward",
        "64x64x32x32 64 3x3 bfloat16 forward",
        "16x64x56x56 256 1x1 forward",
        "64x3x32x32 64 3x3 NCHW",
        "16x3x224x224 64 7x7 s2",
        "64x512x2x2 512 3x3 forward",
        "16x128x56x56 128 3x3 depthwise forward",
        "16x96x56x56 96 7x7 depthwise weight gradient",
    ),
    "cross_entropy": (
        "4096x1000",
        "2048x32000",
        "512x128256 bfloat16",
        "32x21x128x128",
        "2048x32000 forward",
        "128x10",
    ),
    "linear": ("200x784x200", "256x1024x1024", "1x784x512", "2048x2048x2048 product"),
    "linear_cross_entropy": (
        "2048x512x32000",
        "512x1024x128256",
        "512x1024x128256 forward",
        "512x1024x128256 bfloat16",
    ),
    "lstm": (
        "100x32x100x256",
        "200x64x128x128",
        "50x1x1x16",
        "100x32x100x256 2 layers bidirectional",
        "100x32x100x256 GRU",
        "100x32x100x256 packed",
        "64x128x128 LSTMCell forward",
        "100x32x100x256 LSTMCell loop",
    ),
    "models": (
        "lenet",
        "mnist_mlp",
        "resnet18_cifar",
        "resnet18_cifar forward",
        "gan",
        "inception_net",
        "sentiment_lstm",
        "two_cell_lstm",
    ),
    "residual_block": (
        "64x64x32x32 64-64",
        "64x64x32x32 64-64 forward",
        "64x128x16x16 128-128",
        "64x64x32x32 128-128 s2",
        "16x256x14x14 64-64-256",
    ),
}
Rows = dict[tuple[str, str], dict[str, dict]]


class ReportError(ValueError):
    """There is nothing to report, or no place for it; the message is one line."""


def newest(objects: Sequence[dict]) -> Rows:
    """(op, row) -> provider -> the record of the newest run of that row, green gates only. Ours in
    its best layout, as stock, where it was timed in both.

    Whole rows: providers of two runs were never interleaved, so they are not compared.
    """
    rows: Rows = {}
    for one in objects:
        if one["gate"] != "green":
            continue
        key = (one["op"], one["row"])
        latest = rows.get(key)
        date = next(iter(latest.values()))["date"] if latest else ""
        if one["date"] > date:
            rows[key] = {}
        if one["date"] >= date:
            rows[key][one["provider"]] = one
    for providers in rows.values():
        if "auto" in providers:
            providers["auto"] = min(
                (providers[name] for name in ("auto", "auto channels_last") if name in providers),
                key=lambda one: one["median_ms"] or math.inf,
            )
    return rows


def _best_stock(providers: dict[str, dict]) -> float:
    return min(
        one["median_ms"]
        for name, one in providers.items()
        if name.startswith("stock") and one["median_ms"]
    )


def shown(rows: Rows) -> Rows:
    """Those that SHOWN names; of an op that it does not know, all."""
    return {
        (op, row): providers
        for (op, row), providers in rows.items()
        if op not in SHOWN or row in SHOWN[op]
    }


def table(rows: Rows) -> str:
    """The Markdown table: one line per row that has a time of ours."""
    lines = [
        "| op, row | stock ms | torch.compile ms | ours ms | × stock | × compile"
        " | compiled × compile | own × stock"
        " | of copy | of FMA | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def cell(one: dict | None, name: str, form: str) -> str:
        return "–" if one is None or one.get(name) is None else format(one[name], form)

    for (op, row), providers in rows.items():
        auto = providers.get("auto")
        if auto is None or not auto["median_ms"]:
            continue
        stock = providers["stock"]
        memory = auto["peak_bytes"] / stock["peak_bytes"] if stock["peak_bytes"] else None
        cells = [
            f"{op} {row}" + ("" if auto["steady"] else " (unsteady)"),
            format(_best_stock(providers), ".3g"),
            cell(providers.get("torch.compile"), "median_ms", ".3g"),
            cell(auto, "median_ms", ".3g"),
            "**" + cell(auto, "ratio_to_best_stock", ".2f") + "**",
            cell(auto, "ratio_to_compile", ".2f"),
            cell(providers.get("auto compiled"), "ratio_to_compile", ".2f"),
            cell(providers.get("own"), "ratio_to_best_stock", ".2f"),
            cell(auto, "copy_fraction", ".0%"),
            cell(auto, "fma_fraction", ".0%"),
            "–" if memory is None else f"{memory:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if len(lines) == 2:
        raise ReportError("no row has a time of ours behind a green gate")
    return "\n".join(lines)


def section(rows: Rows, commands: bool) -> str:
    """The table of rows of a results file, with the machine that they are of; and the commands."""
    ours = [providers["auto"] for providers in rows.values() if "auto" in providers]
    runs = dict.fromkeys((one["command"], one["date"][:10], one["commit"]) for one in ours)
    made = [
        f"`{command}` ({date}{f', commit {commit}' if commit else ''})"
        for command, date, commit in runs
    ]
    return "\n\n".join(
        [
            table(rows),
            f"Ours is what a user gets (`auto`); `own` is a kernel of ours also where stock is the"
            f" faster; `compiled` is ours under torch.compile too. Stock in its best layout,"
            f" of whole models ours too; medians; peak memory as a part of stock's."
            f" {machine.line(ours[-1]['machine'])}.",
            *([f"Measured by {'; '.join(made)}."] if commands else []),
        ]
    )


def draw(path: Path, picture: Path) -> None:
    """Ratio bars beside a roofline, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {
        key: providers
        for key, providers in newest(records.read(path)).items()
        if providers.get("auto", {}).get("median_ms")
    }
    rows = {f"{op} {row}": providers for (op, row), providers in shown(measured).items()}
    figure, (bars, roof) = plt.subplots(
        1, 2, figsize=(13, 1.5 + 0.28 * len(rows)), width_ratios=(3, 2), layout="constrained"
    )
    at = range(len(rows))
    series = (("auto", "tab:blue", "ours"), ("torch.compile", "tab:orange", "torch.compile"))
    for offset, (name, colour, label) in enumerate(series):
        ratios = [
            providers.get(name, {}).get("ratio_to_best_stock") or 0 for providers in rows.values()
        ]
        drawn = bars.barh([y + 0.4 * offset for y in at], ratios, 0.4, color=colour, label=label)
        bars.bar_label(drawn, [f"{ratio:.2f}" if ratio else "" for ratio in ratios], fontsize=7)
    bars.set_yticks([y + 0.2 for y in at], rows, fontsize=8)
    bars.invert_yaxis()
    bars.axvline(1, color="black", linewidth=1)
    bars.set_xlabel("times as fast as stock (best layout)")
    bars.margins(x=0.1)

    for name, colour, label in (("stock", "tab:grey", "stock"), ("auto", "tab:blue", "ours")):
        points = [one[name] for one in measured.values() if one[name]["gflop_s"]]
        intensity = [one["flops"] / one["bytes"] for one in points]
        roof.loglog(intensity, [one["gflop_s"] for one in points], "o", color=colour, label=label)
    ceilings = next(iter(rows.values()))["auto"]["machine"]
    peak = ceilings.get("fma_gflops") or ceilings.get("gemm_gflops")
    if ceilings["copy_gb_s"] and peak:
        ridge = peak / ceilings["copy_gb_s"]
        x = [0.1, ridge, max(100.0, 2 * ridge)]
        roof.loglog(
            x, [min(peak, ceilings["copy_gb_s"] * i) for i in x], color="black", label="machine"
        )
    roof.set_xlabel("flops per byte")
    roof.set_ylabel("GFLOP/s")
    for panel in (bars, roof):
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.suptitle(f"{ceilings.get('gpu') or ceilings['cpu']}, {ceilings['threads']} threads")
    _replace(picture, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)


def write_all(path: Path, parts: Sequence[tuple[str, str]]) -> None:
    """docs/benchmarks.md, of (title, section)."""
    text = "\n\n".join(f"## {title}\n\n{section}" for title, section in parts)
    head = (
        "# Every row\n\nWritten by `python -m benchmarks.report` from `benchmarks/results/`. What a"
        " row computes, on which data, and how bytes and flops are counted: the head of"
        " `benchmarks/<op>.py`.\n\n"
    )
    path.parent.mkdir(exist_ok=True)
    _replace(path, lambda file: file.write(f"{head}{text}\n".encode()))


def write(readme: Path, text: str) -> None:
    """Puts the text between the README's two comments; all else stays as it is.

    Raises:
        ReportError: the README has not each comment once, in order.
    """
    whole = readme.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise ReportError(f"{readme} must hold {BEGIN} and then {END}, each once")
    before, rest = whole.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{text}\n{END}{after}"
    _replace(readme, lambda file: file.write(new.encode()))


def _replace(path: Path, fill: Callable) -> None:
    """Writes a file as a whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 1 when there is nothing to report, or 2 without matplotlib."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Writes the README's speed table, docs/benchmarks.md and the picture.",
    )
    command.add_argument("files", nargs="*", type=Path, help="results (default: all there are)")
    command.add_argument("--readme", type=Path, default=README, help="default: README.md")
    options = command.parse_args(arguments)
    files = options.files or sorted(records.RESULTS.glob("*.jsonl"))
    try:
        if not files:
            raise ReportError(
                f"no results in {records.RESULTS}: run python -m benchmarks.run first"
            )
        parts, every = [], []
        for path in files:
            rows, picture = newest(records.read(path)), path.with_suffix(".png")
            link = f"![{path.stem}]({os.path.relpath(picture, options.readme.parent)})"
            parts.append(f"{section(shown(rows), commands=False)}\n\n{link}")
            every.append((path.stem, section(rows, commands=True)))
            draw(path, picture)
        write(options.readme, "\n\n".join(parts))
        write_all(options.readme.parent / ALL, every)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("the picture needs matplotlib: pip install 'dlkernels[train]'", file=sys.stderr)
        return 2
    except (ReportError, FileNotFoundError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.readme}; " + "; ".join(str(path.with_suffix(".png")) for path in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())

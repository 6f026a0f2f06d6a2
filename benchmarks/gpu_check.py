"""Everything that only a GPU can show, in one call that keeps to its time.

    python -m benchmarks.gpu_check [--minutes 8] [--out FILE]

Builds what is missing, then: the GPU tests, compute-sanitizer over one shape of each kernel, the
machine's ceilings, and cross_entropy and the largest row of linear_cross_entropy beside stock,
torch.compile and the peers that are installed.
Each stage has a share of the time that is left and is cut off at its end; what was cut is said.
Results are appended to benchmarks/results/<gpu>.jsonl as they come, with ``"gate": "red"`` where a
test failed, and copied to the folder $OUT where that is set. Last comes a table of the targets.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import cross_entropy, linear_cross_entropy, machine, measure, records, run

ROOT = Path(__file__).resolve().parent.parent
MOST_MINUTES = 8.0
CLOSING = 5.0  # seconds kept for the table
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "cross_entropy_cuda",
        "cross_entropy",
        "cross_entropy_paths",
        "batch_norm_cuda",
        "batch_norm_paths",
        "lstm_cuda",
        "lstm_paths",
    )
]
WORKERS = 6  # of pytest-xdist
TOOLS = ("memcheck", "racecheck")
PROVIDERS = "^(?!auto compiled$)"  # a compilation a row, and the same kernels
FUSED = "8192x4096x128256 bfloat16"  # of linear_cross_entropy
QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"

# Each walk of csrc/cuda/cross_entropy.cu, small: shape, dtype. The sanitizers run these.
SHAPES = {
    "few": ((300, 21), torch.bfloat16),
    "rows, a warp": ((64, 1000), torch.float32),
    "rows, a block": ((5, 9000), torch.bfloat16),
    "rows, a cluster": ((2, 65537), torch.float16),
    "rows, read twice": ((1, 262144), torch.float64),
    "columns, vectors": ((2, 150, 8, 16), torch.bfloat16),
    "columns, single": ((2, 40, 7, 5), torch.float32),
    "columns, read twice": ((1, 20000, 4, 4), torch.float64),
    "weights in pieces": ((1500, 100), torch.float32),
}


class Deadline:
    """Seconds that are left of so many."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock, self.end = clock, clock() + seconds

    def left(self) -> float:
        return max(0.0, self.end - self.clock())

    def share(self, part: float) -> float:
        """That part of what is left but for the closing table."""
        return max(0.0, self.left() - CLOSING) * part


class Done(NamedTuple):
    status: int | None  # None: cut off
    output: str
    seconds: float


def call(command: Sequence[str], seconds: float, quiet: bool = False, **environment: str) -> Done:
    """Runs a command in the root, and ends it and its children when its time is over."""
    print(f"$ {shlex.join(command)}  [{seconds:.0f} s]", flush=True)
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return Done(process.returncode, output or "", time.monotonic() - begin)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Done(None, output or "", time.monotonic() - begin)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


class State:
    """What the stages tell each other and the table."""

    def __init__(self, out: Path):
        self.out, self.gate = out, "skipped"
        self.said: list[tuple[str, str, bool | None]] = []  # what, how it went, whether well

    def say(self, what: str, how: str, well: bool | None) -> None:
        self.said.append((what, how, well))
        print(f"== {what}: {how}", flush=True)


# ------------------------------------------------------------------------------------------ stages


def stale() -> str | None:
    """Why the libraries must be built, if they must."""
    note = ROOT / "dlkernels" / "lib" / "build.json"
    if not note.is_file():
        return "nothing is built"
    built = json.loads(note.read_text())
    for name, digest in built["sources"].items():
        path = ROOT / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return f"{name} has changed"
    return None if built["cuda"] else "there is no CUDA library"


def build(state: State, seconds: float) -> None:
    if (why := stale()) is None:
        state.say("build", "up to date", True)
        return
    # The libraries alone: no environment is changed, and nothing is asked of a package index.
    command = [sys.executable, "setup.py", "-q", "build_libraries", "--build-lib", "."]
    done = call(command, seconds)
    how = "cut off" if done.status is None else f"exit status {done.status}"
    state.say("build", f"{why}; {how} after {done.seconds:.0f} s", done.status == 0)


def environment(state: State, seconds: float) -> None:
    if shutil.which("nvidia-smi"):
        call(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"], seconds / 3)
    done = call([sys.executable, "-m", "dlkernels.info"], seconds / 2)
    if done.status != 0:
        state.say("environment", "dlkernels cannot be imported", False)


def test_commands() -> list[list[str]]:
    """pytest over cross_entropy's, batch_norm's and residual_block's tests on the GPU, then over
    conv2d's there, over the GPU tests in the files of the ops that torch multiplies for, and over
    those of the Triton twin."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    workers = [f"-n{WORKERS}", "--dist=load"]
    return [
        [*pytest, *workers, "-p", "tests.on_cuda", *TESTS],
        [*pytest, *workers, "tests/test_conv2d_cuda.py"],
        [*pytest, *workers, "tests/test_residual_block_cuda.py"],
        [*pytest, "-k", "cuda", "tests/test_linear.py", "tests/test_linear_cross_entropy.py"],
        [*pytest, "-k", "on_a_gpu", "tests/test_triton.py"],
    ]


def verdict(done: Done) -> str:
    """pytest's last line, or why there is none."""
    lines = [line for line in done.output.splitlines() if line.strip()]
    last = lines[-1].strip(" =") if lines else "no output"
    return f"cut off after {done.seconds:.0f} s at {last[-60:]}" if done.status is None else last


def tests(state: State, seconds: float) -> None:
    deadline, green = Deadline(seconds), True
    for command, part in zip(test_commands(), (0.4, 0.5, 0.6, 0.5, 1.0), strict=True):
        done = call(command, deadline.left() * part, quiet=True)
        if done.status != 0:
            print(done.output[-8000:])
        green = green and done.status == 0
        state.say("tests of " + Path(command[-1]).name, verdict(done), done.status == 0)
    state.gate = "green" if green else "red"


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def clean(output: str) -> bool | None:
    """Whether compute-sanitizer found nothing; None where it did not come to its summary."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    if any(int(number) for number in found):
        return False
    if not found or "every shape ran" in output:
        return True if found else None
    return None if re.search(r"not supported|Unable to|Failed to", output) else False


def sanitizer(state: State, seconds: float) -> None:
    program = find_sanitizer()
    if program is None:
        state.say("compute-sanitizer", "skipped: it is not installed", None)
        return
    deadline = Deadline(seconds)
    for tool, part in zip(TOOLS, (0.5, 1.0), strict=True):
        # Without torch's cache each tensor is an allocation, past whose end memcheck sees.
        words = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        words += [sys.executable, "-m", "benchmarks.gpu_check", "--stage", "shapes"]
        done = call(words, deadline.left() * part, True, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        well = clean(done.output)
        lines = [line for line in done.output.splitlines() if line.strip()]
        how = {True: "clean", False: "NOT clean", None: "could not run"}[well]
        if done.status is None:
            how, well = f"cut off after {done.seconds:.0f} s", None
        if well is not True:
            print("\n".join(lines[-40:]))
        state.say(f"compute-sanitizer {tool}", f"{how}: {lines[-1] if lines else ''}", well)


def benchmarks(state: State, seconds: float) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stage", "benchmarks"]
    command += ["--minutes", f"{max(seconds - 3, 0.1) / 60:.4f}"]
    command += ["--out", str(state.out), "--gate", state.gate]
    done = call(command, seconds)
    how = "cut off" if done.status is None else f"exit status {done.status}"
    state.say("benchmarks", f"{how} after {done.seconds:.0f} s", done.status == 0)


class Stage(NamedTuple):
    name: str
    work: Callable[[State, float], None]
    share: float  # of the time that is left


STAGES = (
    Stage("build", build, 0.6),
    Stage("environment", environment, 0.15),
    Stage("tests", tests, 0.35),
    Stage("sanitizer", sanitizer, 0.3),
    Stage("benchmarks", benchmarks, 1.0),
)


# ----------------------------------------------------------------- stages in processes of their own


def run_shapes(device: str = "cuda") -> None:
    """Every kernel once: forward, gradient ahead with an upstream factor, backward, weights."""
    from dlkernels.functional import cross_entropy as ours

    with measure.kernels_chosen("own"):
        for name, (shape, dtype) in SHAPES.items():
            x = torch.randn(shape, device=device).to(dtype)
            target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
            weight = torch.rand(shape[1], device=device).to(dtype)
            ours(x, target)
            x.requires_grad_()
            for arguments in ({}, {"weight": weight}, {"reduction": "none", "softcap": 5.0}):
                loss = ours(x, target, **arguments)
                torch.autograd.grad(loss, x, torch.full_like(loss, 0.5))
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"{name}: ran", flush=True)
    print("every shape ran", flush=True)


def rows() -> list[measure.Row]:
    """The rows for a GPU, the product with the loss, then images in bfloat16, if there is time."""
    made = cross_entropy.rows("cuda")
    known = {case.name for case in cross_entropy.CASES}
    images = [row for row in made if row.name.startswith("32x21x128x128") and "bfl" in row.name]
    fused = [row for row in linear_cross_entropy.rows("cuda") if row.name == FUSED]
    return [row for row in made if row.name not in known] + fused + images


def run_rows(out: Path, gate: str, seconds: float) -> int:
    """Ceilings, then the rows until the time is over; 1 where a row raised."""
    deadline = Deadline(seconds)
    fields = machine.describe("cuda", torch.get_num_threads()) | {"library": run.library()}
    print(machine.line(fields), flush=True)
    print(", ".join(f"{name} {fields[name]}" for name in machine.PRODUCTS), flush=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"gate": gate, "machine": fields, "date": date, "commit": run.commit()}
    about["command"] = "python -m benchmarks.gpu_check"
    status, chosen = 0, re.compile(PROVIDERS).search
    for row in rows():
        if deadline.left() == 0:
            print(f"no time left for {row.name}", flush=True)
            continue
        gc.collect()
        torch.cuda.empty_cache()
        try:
            measured = measure.measure(row, "cuda", 2, lambda name: bool(chosen(name)))
        except Exception as error:  # the other rows are still worth their time
            print(f"{row.name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            status = 1
            if "device-side assert" in str(error) or "illegal" in str(error):
                return status
            continue
        made = records.of_row(row, measured, about)
        records.append(out, made)
        run.show(made, as_json=False)
    return status


# ------------------------------------------------------------------------------------------ targets


class Target(NamedTuple):
    what: str
    wanted: str
    got: str
    met: bool | None  # None: not measured


def targets(objects: Sequence[dict]) -> list[Target]:
    """The targets on an H200 against the records of one run; of several rows the worst counts."""
    by_row: dict[str, dict[str, dict]] = {}
    for one in objects:
        by_row.setdefault(one["row"], {})[one["provider"]] = one
    swept = {
        row: providers
        for row, providers in by_row.items()
        if (own := providers.get("own"))
        and own["dtype"] == "bfloat16"
        and own["median_ms"]
        and own["layout"] == "contiguous"
        and len(own["shape"]) == 2
        and own["shape"] != [8192, 131072]
        and not row.endswith(" graph")
    }

    def forward(least: int, most: int) -> list[tuple[float, str]]:
        return [
            (providers["own"]["copy_fraction"], row)
            for row, providers in swept.items()
            if providers["own"]["work"] == "forward"
            and least <= providers["own"]["shape"][1] <= most
        ]

    def ratio(row: str, others: str) -> tuple[float, str] | None:
        times = [
            one["median_ms"]
            for name, one in by_row[row].items()
            if re.match(others, name) and one["median_ms"]
        ]
        own = by_row[row].get("own", {}).get("median_ms")
        return (min(times) / own, row) if times and own else None

    def ratios(rows: Sequence[str], others: str) -> list[tuple[float, str]]:
        return [found for row in rows if (found := ratio(row, others))]

    def at_least(what: str, found: list[tuple[float, str]], wanted: float, form: str) -> Target:
        text = f">= {wanted:{form}}"
        if not found:
            return Target(what, text, "not measured", None)
        worst, row = min(found)
        return Target(what, text, f"{worst:{form}} ({row})", worst >= wanted)

    graphs = [row for row in by_row if row.endswith(" graph")]
    long = by_row.get("8192x131072 bfloat16", {}).get("own", {}).get("median_ms")
    got = f"{long:.3g} ms" if long else "not measured"
    return [
        at_least("forward of copy, V >= 4096", forward(4096, 1 << 62), 0.9, ".0%"),
        at_least("forward of copy, V = 1000", forward(1000, 1000), 0.6, ".0%"),
        Target("8192x131072 bfloat16", "<= 2 ms", got, long <= 2.0 if long else None),
        at_least("x stock eager, V 256 to 262144", ratios([*swept], "stock"), 2.5, ".2f"),
        at_least("x torch.compile, V 256 to 262144", ratios([*swept], "torch.compile"), 1.3, ".2f"),
        at_least("x stock, 128x10 in a CUDA graph", ratios(graphs, "stock"), 1.0, ".2f"),
        at_least(
            "linear_cross_entropy x the best peer",
            ratios([FUSED] if FUSED in by_row else [], "liger|quack|stock chunked"),
            0.95,
            ".2f",
        ),
    ]


def show(state: State, found: Sequence[Target]) -> None:
    """The short table: stages, then targets; JSON lines where rich is missing."""
    words = {True: "yes", False: "NO", None: "-"}
    lines = [(what, "", how, words[well]) for what, how, well in state.said]
    lines += [(one.what, one.wanted, one.got, words[one.met]) for one in found]
    try:
        import rich.console
        import rich.table
    except ModuleNotFoundError:
        for line in lines:
            print(json.dumps(line))
        return
    table = rich.table.Table(title="gpu_check", title_justify="left", pad_edge=False)
    for name in ("what", "wanted", "got", "met"):
        table.add_column(name)
    for line in lines:
        table.add_row(*line)
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)


# ------------------------------------------------------------------------------------------ command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Builds, tests and times the GPU kernels in one call that keeps to its time.",
    )
    made.add_argument(
        "--minutes", type=float, default=MOST_MINUTES, help=f"in all, at most {MOST_MINUTES:g}"
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="results file to append to")
    # Of a process that this one starts.
    made.add_argument("--stage", choices=("shapes", "benchmarks"), help=argparse.SUPPRESS)
    made.add_argument("--gate", default="skipped", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 1 where a test, a sanitizer or a target failed, or 2 refused."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = parser()
    options = command.parse_args(arguments)
    if not 0 < options.minutes <= MOST_MINUTES:
        command.error(f"--minutes {options.minutes:g}: more than 0, at most {MOST_MINUTES:g}")
    if options.out and not options.out.parent.is_dir():
        command.error(f"--out {options.out}: there is no folder {options.out.parent}")
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device", file=sys.stderr)
        return 2
    if options.stage == "shapes":
        run_shapes()
        return 0
    name = machine.slug({"gpu": torch.cuda.get_device_name()})
    out = (options.out or records.RESULTS / f"{name}.jsonl").resolve()
    if options.stage == "benchmarks":
        return run_rows(out, options.gate, options.minutes * 60)

    deadline = Deadline(options.minutes * 60)
    out.parent.mkdir(exist_ok=True)
    before = len(records.read(out)) if out.is_file() else 0
    state = State(out)
    try:
        run_stages(state, deadline)
    finally:
        made = records.read(out)[before:] if out.is_file() else []
        if out.is_file() and (folder := os.environ.get("OUT")):
            shutil.copy(out, folder)
        found = targets(made)
        show(state, found)
        print(f"{len(made)} records -> {out}; {deadline.left():.0f} s left", flush=True)
    wrong = any(well is False for *_, well in state.said)
    return int(wrong or any(one.met is False for one in found))


def run_stages(state: State, deadline: Deadline, stages: Sequence[Stage] = STAGES) -> None:
    """The stages in order, each with its share; one without time left is said to be skipped."""
    for stage in stages:
        seconds = deadline.share(stage.share)
        if seconds < 1:
            state.say(stage.name, "skipped: no time left", None)
            continue
        stage.work(state, seconds)


if __name__ == "__main__":
    sys.exit(main())

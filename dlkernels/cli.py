"""The command ``dlkernels``: ``train`` trains a network, ``compare`` one on both sides, ``bench``
times the ops.

Results go to stdout, progress bars and errors to stderr. Exit status: 0; 1 if the training fails;
2 for a request that cannot be met (one line says why, and nothing is written); 130 after Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

import dlkernels
from dlkernels import config, data, info, logs, trainer
from dlkernels.files import first_line, write_atomically
from dlkernels.models import NETWORKS
from dlkernels.train import Comparison, Measured, Score, Spread, compare

DATA_HELP = (
    "a folder of MNIST IDX files; CIFAR-10's archive, its folder, or one of PNG files; a folder of "
    "image folders; a diabetes CSV file, gzipped or not; an aclImdb folder"
)
EXTRA = "pip install 'dlkernels[train]'"


class RequestError(Exception):
    """A request that cannot be met; its text is the line that the user sees."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{self.prog}: {message}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: ``sys.argv[1:]``); returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["bench"]:  # its options are those of benchmarks.run
            return bench(argv[1:])
        args = parser().parse_args(argv)
        return {"compare": run_compare, "train": run_train}[args.command](args)
    except (RequestError, NotImplementedError) as error:  # the latter where "own" was forced
        if is_first():  # of several processes, all say the same
            print(error, file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"dlkernels {args.command}: training diverged: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted{error}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The options of every subcommand; its errors are ``RequestError``."""
    top = Parser(prog="dlkernels", description="Faster kernels for PyTorch, beside stock's.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    c = commands.add_parser(
        "compare",
        help="train a documented network of torch.nn and of dlkernels.nn, and compare them",
        description="Trains the network twice from the same weights on the same batches.",
    )
    c.add_argument("network", nargs="?", default="lenet", choices=sorted(NETWORKS))
    add_common(c)
    c.add_argument("--seed", type=seed, default=0, help="weights and batches; default: 0")
    c.add_argument("--out", type=Path, default=Path("compare.png"), help="default: compare.png")
    c.add_argument("--json", action="store_true", help="one JSON document on stdout, no tables")
    t = commands.add_parser(
        "train",
        help="train a documented network by its recipe, or go on with it",
        description="Trains the network. Under torchrun, each batch is divided over the processes.",
    )
    t.add_argument("network", choices=sorted(NETWORKS))
    add_common(t)
    t.add_argument("--seed", type=seed, help="decides all that chance does; default: 0")
    t.add_argument("--out", type=Path, metavar="DIR", help="default: runs/NETWORK")
    t.add_argument(
        "--resume", action="store_true", help="go on from last.pt, or the folds', in --out"
    )
    t.add_argument(
        "--vectors", type=Path, metavar="FILE", help="GloVe's text format: where words start from"
    )
    t.add_argument("--log", choices=["csv", *logs.SINKS], default="csv", help="beside the files")
    t.add_argument("--save-every", type=whole, metavar="STEPS", help="last.pt also within an epoch")
    t.add_argument("--patience", type=whole, metavar="EPOCHS", help="stop when none was better")
    t.add_argument("--validation", type=share, help="share of the training set to hold out")
    t.add_argument("--folds", type=folds, help="as many trainings, each with a part held out")
    t.add_argument("--amp", action="store_true", default=None, help="mixed precision")
    t.add_argument("--drop-last", action="store_true", default=None, help="full batches only")
    recipe = t.add_argument_group("instead of the recipe's")
    recipe.add_argument("--optimiser", choices=trainer.OPTIMISERS, metavar="NAME")
    recipe.add_argument("--lr", type=number)
    recipe.add_argument("--momentum", type=number)
    recipe.add_argument("--weight-decay", type=number)
    recipe.add_argument("--l1", type=number, help="weight of the sum of the |parameters|")
    recipe.add_argument("--schedule", help="multistep:150,200, step:30 or plateau:10")
    commands.add_parser("bench", help="time the ops: python -m benchmarks.run", add_help=False)
    return top


def add_common(command: argparse.ArgumentParser) -> None:
    """The options that ``compare`` and ``train`` share."""
    command.add_argument("--epochs", type=whole, help="default: the network's recipe")
    command.add_argument("--batch-size", type=whole, help="default: the network's recipe")
    command.add_argument("--device", type=device, default=torch.device("cpu"), help="default: cpu")
    command.add_argument("--threads", type=whole, help="default: torch's own choice")
    command.add_argument(
        "--clip", type=number, metavar="NORM", help="of the gradients; default: the recipe's"
    )
    command.add_argument("--data", type=Path, metavar="PATH", help=DATA_HELP)


def number(text: str) -> float:
    """An option's finite number from 0, or ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"wanted a number from 0, got {text!r}")
    return value


def share(text: str) -> float:
    """An option's number from 0 to below 1, or ArgumentTypeError."""
    value = number(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"wanted a number below 1, got {text!r}")
    return value


def folds(text: str) -> int:
    """An option's whole number from 2, or ArgumentTypeError."""
    value = whole(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"wanted 2 at least, got {text!r}")
    return value


def whole(text: str) -> int:
    """An option's whole number from 1, or ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """An option's whole number that torch takes as a seed, or ArgumentTypeError."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """A CPU or CUDA device that is there, or ArgumentTypeError."""
    try:
        wanted = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no such device: {text!r}") from None
    if wanted.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"wanted cpu or cuda, got {text!r}")
    count = torch.cuda.device_count() if wanted.type == "cuda" else 1
    if (wanted.index or 0) >= count:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not available: {count} {wanted.type} devices"
        )
    return wanted


def run_compare(args: argparse.Namespace) -> int:
    """``dlkernels compare``: loads, trains, prints, draws. Raises as ``main`` handles."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler chats on stderr
    recipe = NETWORKS[args.network].recipe
    with refusals("compare"):
        save_picture = picture_writer(args.out)
        show_progress = progress_bars()
        examples = data.load_for(recipe, args.data)
    epochs = args.epochs or recipe.epochs_on(embedded=args.data is None)
    count = len(examples.train_inputs)
    batch_size = recipe.batch_of(count, args.batch_size)
    with threads(args.threads):
        facts = {
            "network": args.network,
            "data": examples.name,
            "train_examples": count,
            "test_examples": len(examples.test_inputs),
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": args.seed,
            "machine": machine(args.device),
        }
        steps = epochs * -(-count // batch_size)
        with show_progress(steps, "torch.nn", "dlkernels.nn") as advance:
            result = compare(
                args.network,
                examples.to(args.device),
                epochs=epochs,
                batch_size=batch_size,
                seed=args.seed,
                clip=args.clip,
                on_step=lambda side: advance(side.name, side.losses[-1]),
            )
    if args.json:
        print(json.dumps(document(facts, result, args.out), indent=1, allow_nan=False))
    else:
        print_tables(facts, result)
    try:
        save_picture(args.network, result)
    except OSError as error:
        raise RequestError(f"dlkernels compare: --out: {error}") from error
    if not args.json:
        print(f"loss curves and step times: {args.out}")
    return 0


@contextlib.contextmanager
def refusals(command: str) -> Iterator[None]:
    """Turns what is missing, or wrong with a file, into the line that the user sees."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        install = "pip install visdom" if package == "visdom" else EXTRA
        raise RequestError(f"dlkernels {command} needs {package}: {install}") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"dlkernels {command}: {first_line(error)}") from error


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many of torch's threads, if a number is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_train(args: argparse.Namespace) -> int:
    """``dlkernels train``: one training, or one for each fold. Raises as ``main`` handles."""
    network = NETWORKS[args.network]
    out = args.out or Path("runs") / args.network
    with trainer.processes(args.device) as device, threads(args.threads):
        with refusals("train"):
            show_progress = progress_bars()
            if hasattr(network, "picture"):
                importlib.import_module("PIL")
            if args.vectors is not None:  # before all texts are read
                if not hasattr(network, "vector_size"):
                    raise ValueError(f"no --vectors for {args.network}: it embeds no words")
                open(args.vectors).close()
            examples = data.load_for(network.recipe, args.data, margin=True).to(device)
            vectors = None
            if args.vectors is not None:
                vectors = data.text.vectors(args.vectors, examples.words, network.vector_size)
            jobs = planned(args, examples, vectors, out)
        scores = [train_one(args, job, examples, show_progress) for job in jobs]
    if jobs[0].folder != out and is_first():
        values = [score.value for score in scores]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        print(f"test {scores[0].metric} of {len(jobs)} folds: {mean:.4g} ± {deviation:.2g}")
    return 0


class Job(NamedTuple):
    """One training, from its first step or from ``last.pt`` of its folder."""

    name: str
    folder: Path
    settings: trainer.Settings
    epochs: int
    vectors: tuple[torch.Tensor, torch.Tensor] | None  # where it begins from


def planned(
    args: argparse.Namespace,
    examples: data.Examples,
    vectors: tuple[torch.Tensor, torch.Tensor] | None,
    out: Path,
) -> list[Job]:
    """The trainings that are asked for. Of resumed folds, those that were not begun have the
    settings of the first. Raises for what would be refused, before any file is written."""
    names = ("seed", "batch_size", "optimiser", "lr", "momentum", "weight_decay", "l1", "clip",
             "schedule", "amp", "drop_last", "patience", "validation")  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {} if vectors is None else {"vectors": trainer.checksum(vectors)}
    settings = trainer.Settings.of(args.network, len(examples.train_inputs), given)
    epochs = NETWORKS[args.network].recipe.epochs_on(embedded=args.data is None)
    folds = args.folds
    if args.resume:
        places = [out / "fold1"] if folds else [out, out / "fold1"]
        first = next((place for place in places if (place / "last.pt").is_file()), places[0])
        checkpoint = trainer.read_checkpoint(first / "last.pt", args.network)
        settings = trainer.resumed(checkpoint, settings, given, first / "last.pt")
        epochs = checkpoint["epochs"]
        if first != out:
            of = settings.fold[1] if settings.fold else 1
            if folds not in (None, of):
                raise ValueError(f"{first / 'last.pt'}: was trained with folds {of}, not {folds}")
            folds = of
    epochs = args.epochs or epochs
    jobs = [Job(args.network, out, settings, epochs, vectors)]
    if folds:
        jobs = [
            Job(
                f"fold {k + 1}",
                out / f"fold{k + 1}",
                dataclasses.replace(settings, fold=(k, folds)),
                epochs,
                vectors,
            )
            for k in range(folds)
        ]
    for job in jobs:
        trainer.check(job.settings, examples)
        trainer.check_folder(job.folder, args.network, args.resume)
        begun = (job.folder / "last.pt").exists()
        if job.settings.vectors is not None and vectors is None and not begun:
            raise ValueError(f"{job.folder} is still to begin: give its --vectors again")
    return jobs


def train_one(
    args: argparse.Namespace,
    job: Job,
    examples: data.Examples,
    show_progress: Callable[..., contextlib.AbstractContextManager],
) -> Score:
    """Trains, and prints and gives the score on the test set."""
    last, settings, checkpoint = job.folder / "last.pt", job.settings, None
    with refusals("train"):
        if last.is_file():
            checkpoint = trainer.read_checkpoint(last, args.network)
            settings = trainer.resumed(checkpoint, settings, vars(settings), last)
        trainer.together()  # before the first file is written
        run = trainer.Run(
            settings,
            examples,
            job.folder,
            checkpoint=checkpoint,
            vectors=None if checkpoint else job.vectors,
            epochs=job.epochs,
            log=logs.SINKS.get(args.log),
            save_every=args.save_every,
        )
    with contextlib.closing(run):
        with show_progress(run.epochs * run.steps(), job.name, done=run.state.step) as advance:
            try:
                run.fit(on_step=lambda step, loss: advance(job.name, loss))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f": --resume goes on from {last}") from None
            except OSError as error:  # last.pt is still the one before
                raise RequestError(f"dlkernels train: {first_line(error)}") from error
        with refusals("train"):
            score, loss = run.test()
    if is_first():
        print(
            f"{args.network} on {examples.name}: {run.state.epoch} epochs, best of them "
            f"{run.state.best_epoch}; test loss {loss:.4g}, {words(score)}; {job.folder}"
        )
    return score


def is_first() -> bool:
    """Whether this process is the only one, or the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def words(score: Score) -> str:
    """The score as text."""
    if score.correct is None:
        return f"{score.metric} {score.value:.4g}"
    return f"{score.metric} {100 * score.value:.2f} % [{score.correct}/{score.total}]"


def machine(device: torch.device) -> dict[str, str | int]:
    """What the times depend on, in this process."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_library": info.cpu_library(),
        "kernels": config.kernels,
    }


def progress_bars() -> Callable[..., contextlib.AbstractContextManager]:
    """``bars(steps, *names)`` shows on stderr a progress bar for each name, and gives
    ``advance(name, loss)``, to be called after each step. ``done`` steps are behind it already."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextlib.contextmanager
    def bars(steps: int, *names: str, done: int = 0) -> Iterator[Callable[[str, float], None]]:
        if not is_first():
            yield lambda name, loss: None
            return
        # Drawn between steps, by hand: rich's own thread would draw during the timed ones.
        with Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
        ) as progress:
            tasks = {
                name: progress.add_task(name, total=steps, completed=done, loss=float("nan"))
                for name in names
            }
            drawn = 0.0

            def advance(name: str, loss: float) -> None:
                nonlocal drawn
                progress.update(tasks[name], advance=1, loss=loss)
                if time.monotonic() - drawn > 0.2:
                    progress.refresh()
                    drawn = time.monotonic()

            yield advance

    return bars


def document(facts: dict, result: Comparison, out: Path) -> dict:
    """The JSON document. Times in milliseconds; a ratio is torch.nn / dlkernels.nn."""

    def side(measured: Measured) -> dict:
        return {
            "forward_ms": measured.forward_ms._asdict(),
            "forward_backward_ms": measured.forward_backward_ms._asdict(),
            "peak_memory_bytes": measured.peak_memory_bytes,
            **test(measured.score),
            "losses": measured.losses,
        }

    def test(score: Score) -> dict:
        if score.correct is None:
            return {f"test_{score.metric.replace(' ', '_')}": score.value}
        return {"test_correct": score.correct, "test_accuracy": score.value}

    return {
        **facts,
        "steps": result.steps,
        "timed_steps": result.timed_steps,
        "torch.nn": side(result.stock),
        "dlkernels.nn": side(result.ours),
        "ratio": ratios(result),
        "largest_loss_difference": result.loss_difference,
        "layers": [layer._asdict() for layer in result.layers],
        "picture": str(out),
    }


def ratios(result: Comparison) -> dict[str, float]:
    """torch.nn / dlkernels.nn: above 1, ours is better. Of times, the median over steps."""
    return {
        "forward": result.forward_ratio,
        "forward_backward": result.forward_backward_ratio,
        "peak_memory": result.stock.peak_memory_bytes / result.ours.peak_memory_bytes,
    }


def print_tables(facts: dict, result: Comparison) -> None:
    """The machine, the comparison, and which kernel computed which layer, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def ms(spread: Spread) -> str:
        median, lower, upper = (f"{value:.{decimals(value)}f}" for value in spread)
        return f"{median} ({lower}-{upper})"

    def decimals(value: float) -> int:  # three significant digits
        return max(0, 2 - math.floor(math.log10(value)))

    def cell(score: Score) -> Text:  # Text: a cell's own [ ] would be markup
        if score.correct is None:
            return Text(f"{score.value:.3g}")
        return Text(f"{100 * score.value:.2f} % [{score.correct}/{score.total}]")

    stock, ours, ratio, m = result.stock, result.ours, ratios(result), facts["machine"]
    main_table = Table()
    for heading in ("", "torch.nn", "dlkernels.nn", "ratio"):
        main_table.add_column(heading, justify="right" if heading else "left")
    for name, key in (("forward", "forward"), ("forward + backward", "forward_backward")):
        cells = (ms(getattr(side, f"{key}_ms")) for side in (stock, ours))
        main_table.add_row(f"{name}, ms", *cells, f"{ratio[key]:.2f}")
    memory = [side.peak_memory_bytes / 2**20 for side in (stock, ours)]
    memory = [f"{value:.{max(3, decimals(value))}f}" for value in memory]
    main_table.add_row("peak memory, MiB", *memory, f"{ratio['peak_memory']:.2f}")
    main_table.add_row("last loss", f"{stock.losses[-1]:.6f}", f"{ours.losses[-1]:.6f}", "")
    main_table.add_row("largest difference", "", f"{result.loss_difference:.2e}", "")
    metric = stock.score.metric.removeprefix("binary ")
    main_table.add_row(f"test {metric}", cell(stock.score), cell(ours.score), "")
    layers = Table("layer", "class", "kernel", "why")
    for layer in result.layers:
        layers.add_row(*(Text(cell) for cell in layer))

    console = Console(highlight=False)
    console.print(
        f"{facts['network']} on {facts['data']}: {facts['train_examples']} training examples, "
        f"{facts['test_examples']} for the test, {facts['epochs']} epochs of batch size "
        f"{facts['batch_size']}, seed {facts['seed']}",
        markup=False,
    )
    console.print(
        f"{m['device']}: {m['cores']} cores, {m['threads']} threads, CPU capability "
        f"{m['cpu_capability']}, library {m['cpu_library']}, kernels {m['kernels']}, "
        f"torch {m['torch']}, Python {m['python']}",
        markup=False,
    )
    console.print(main_table)
    console.print(
        f"Times: median (quartiles) of {result.timed_steps} of {result.steps} steps, the two "
        "sides' in turn. Ratio: torch.nn / dlkernels.nn, median over steps. Memory: of one "
        "forward and backward pass. Largest difference: of the two loss curves."
    )
    console.print(layers)


def picture_writer(out: Path) -> Callable[[str, Comparison], None]:
    """``save(network, result)`` draws the loss curves and step times into the PNG file ``out``.

    What can be refused is refused here, before any training: raises OSError.
    """
    from matplotlib.figure import Figure  # no pyplot: savefig then draws with Agg

    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: no folder {out.parent}")
    if out.is_dir():
        raise IsADirectoryError(f"--out: {out} is a folder")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--out: {out.parent} is not writable")

    def save(network: str, result: Comparison) -> None:
        figure = Figure(figsize=(10, 4), layout="constrained")
        curves, times = figure.subplots(1, 2)
        for side, name, style in (
            (result.stock, "torch.nn", {"color": "tab:gray", "linewidth": 3, "alpha": 0.6}),
            (result.ours, "dlkernels.nn", {"color": "tab:blue", "linewidth": 1}),
        ):
            curves.plot(side.losses, label=name, **style)
            median = side.forward_backward_ms.median
            times.plot(side.step_ms, ".", ms=3, color=style["color"], alpha=0.5)
            times.axhline(median, label=f"{name}: median {median:.3f} ms", **style)
        curves.set(title=f"{network}: training loss", xlabel="step", ylabel="loss", ylim=(0, None))
        # A few steps that the machine interrupted would flatten all the others.
        highest = max(side.forward_backward_ms.median for side in (result.stock, result.ours))
        times.set(title="forward + backward", xlabel="step", ylabel="ms", ylim=(0, 2 * highest))
        curves.legend()
        times.legend(loc="upper right")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        write_atomically(out, image.getvalue())

    return save


def bench(argv: list[str]) -> int:
    """Runs ``benchmarks.run`` of the source tree that this package lies in."""
    root = Path(dlkernels.__file__).parents[1]
    if not (root / "benchmarks" / "run.py").is_file():
        raise RequestError("dlkernels bench: the benchmarks live in the source tree: run it there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run").main(argv)


if __name__ == "__main__":
    sys.exit(main())

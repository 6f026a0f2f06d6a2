"""Trains one documented network by its recipe, or by one's own settings: ``dlkernels train``.

A run lives in a folder: ``last.pt``, from which it goes on, and ``best.pt``, the weights of the
best epoch; ``steps.csv`` and ``epochs.jsonl``; a picture where the network has one. All that chance
decides (weights, order, augmentation, dropout, noise) is drawn from seeds that are made of the
run's seed and the step's number, and the logs are cut to where ``last.pt`` was written: a run that
is killed at any step and resumed writes the files of an unbroken one, to the byte.

Under ``torchrun`` each batch is divided over the processes. The loss of a part is weighed so that
the mean over the processes, which DistributedDataParallel takes, is that of the whole batch.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import io
import math
import os
import pickle
import signal
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import dlkernels.nn
from dlkernels.data import Examples, augment
from dlkernels.files import remove_parts, write_atomically
from dlkernels.logs import LOGS, Files
from dlkernels.models import NETWORKS
from dlkernels.train import (
    Carried,
    Score,
    clip_gradients,
    judge,
    objective,
    optimisers_of,
    outputs_of,
    schedules_of,
)

# Without SparseAdam: no network here has a sparse gradient.
OPTIMISERS = sorted(
    {
        name
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
    }
    - {"Optimizer", "SparseAdam"}
)
SHOWN = 8  # images in a row of a picture
CHECKPOINTS = ("last.pt", "best.pt")
HELD_OUT = 1 / 6  # for early stopping, where neither recipe nor user holds anything out
SEEN = 10_000  # examples whose score stands for the validation's where nothing is held out


@dataclass(frozen=True)
class Settings:
    """What decides the curve, beside the data: two runs of the same settings are the same run."""

    network: str
    seed: int
    batch_size: int  # over all processes
    optimiser: str
    optimiser_arguments: dict[str, Any]
    schedule: str  # "multistep:150,200", "step:30", "plateau:10", or ""
    l1: float
    clip: float | None
    amp: bool
    drop_last: bool
    patience: int | None
    validation: float
    fold: tuple[int, int] | None  # (k, of), from 0: the part that is held out
    processes: int
    vectors: int | None = None  # the checksum of those that the embedding started from

    @classmethod
    def of(cls, network: str, count: int, given: dict[str, Any]) -> "Settings":
        """The network's recipe for ``count`` training examples, with what is ``given`` instead.

        Raises ValueError for what does not fit together.
        """
        recipe = NETWORKS[network].recipe
        optimiser = given.get("optimiser", recipe.optimiser)
        arguments = dict(recipe.optimiser_arguments)
        known = inspect.signature(getattr(torch.optim, optimiser)).parameters
        arguments = {name: value for name, value in arguments.items() if name in known}
        for name in ("lr", "momentum", "weight_decay"):
            if name in given and name not in known:
                raise ValueError(f"{optimiser} has no {name}")
            arguments |= {name: given[name]} if name in given else {}
        settings = cls(
            network=network,
            seed=given.get("seed", 0),
            batch_size=recipe.batch_of(count, given.get("batch_size")),
            optimiser=optimiser,
            optimiser_arguments=arguments,
            schedule=given.get("schedule", recipe.schedule),
            l1=given.get("l1", 0.0),
            clip=given.get("clip", recipe.clip),
            amp=given.get("amp", False),
            drop_last=given.get("drop_last", False),
            patience=given.get("patience"),
            validation=given.get(
                "validation", recipe.validation or (HELD_OUT if "patience" in given else 0.0)
            ),
            fold=None,
            processes=dist.get_world_size() if dist.is_initialized() else 1,
            vectors=given.get("vectors"),
        )
        if settings.amp and optimiser == "LBFGS":
            raise ValueError("LBFGS calls for several gradients a step: not with --amp")
        if settings.batch_size < settings.processes:
            raise ValueError(f"a batch of {settings.batch_size} for {settings.processes} processes")
        return settings


@dataclass
class State:
    """How far a run is."""

    epoch: int = 0  # whole ones
    batch: int = 0  # of the next one
    step: int = 0
    loss: float = 0.0  # the sum over the examples of this epoch
    seen: int = 0  # these examples
    best_epoch: int = 0
    best: list[float] = field(default_factory=list)  # its rank: the larger, the better
    files: dict[str, int] = field(default_factory=dict)  # sizes of the logs


class Split(NamedTuple):
    """A data set as a run uses it."""

    train_inputs: torch.Tensor
    train_targets: torch.Tensor
    validation_inputs: torch.Tensor
    validation_targets: torch.Tensor


class Epoch(NamedTuple):
    """What is reported of an epoch."""

    epoch: int
    train_loss: float
    validation_loss: float
    score: Score
    lr: float


def split(examples: Examples, settings: Settings) -> Split:
    """Holds out the end of the training set, or a fold of it; with nothing to hold out, validation
    is on the end of what is trained on. Raises ValueError where a part would be empty."""
    x, y = examples.train_inputs, examples.train_targets
    if settings.fold:
        k, folds = settings.fold
        if folds > len(x):
            raise ValueError(f"{folds} folds of {len(x)} examples")
        generator = torch.Generator().manual_seed(draw(settings.seed, "folds"))
        parts = torch.randperm(len(x), generator=generator).tensor_split(folds)
        held, kept = parts[k], torch.cat([*parts[:k], *parts[k + 1 :]]).sort().values
    else:
        count = int(len(x) * (1 - settings.validation) + 1e-6)
        kept, held = torch.arange(count), torch.arange(count, len(x))
        if settings.validation == 0:
            held = kept[-SEEN:]
    if len(kept) == 0 or len(held) == 0:
        raise ValueError(f"{len(x)} examples are too few to hold some out")
    kept, held = kept.to(x.device), held.to(x.device)
    return Split(x[kept], y[kept], centre(x[held], examples), y[held])


def centre(images: torch.Tensor, examples: Examples) -> torch.Tensor:
    """What a network sees of ``images`` that may have a margin for augmentation."""
    size = examples.test_inputs.shape[2:]
    return augment.crop(images, size) if images.dim() == 4 else images


def draw(*what: int | str) -> int:
    """A seed made of these words and numbers."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Of their shapes and values."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(repr(tuple(tensor.shape)).encode(), value)
        value = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


class _Objective(torch.nn.Module):
    """A turn of a step as a module, which DistributedDataParallel can wrap."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: torch.nn.Module,
        carried: Carried | None,
        amp: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.carried, self.amp = model, loss, carried, amp

    def forward(self, turn: str, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return objective(self.model, self.loss, turn, inputs, targets, self.carried, self.amp)


class Run:
    """One training, from its first step or from ``last.pt``, in the folder ``out``.

    ``vectors`` are copied into the embedding where the run begins. ``log`` is a class of
    ``dlkernels.logs.SINKS``, told beside the files. Only process 0 of several writes and tells.
    """

    def __init__(
        self,
        settings: Settings,
        examples: Examples,
        out: Path,
        *,
        checkpoint: dict | None = None,
        vectors: tuple[torch.Tensor, torch.Tensor] | None = None,
        epochs: int,
        log: type | None = None,
        save_every: int | None = None,
    ) -> None:
        self.settings, self.examples, self.out = settings, examples, out
        self.epochs, self.save_every = epochs, save_every
        self.recipe = NETWORKS[settings.network].recipe
        self.device = examples.train_inputs.device
        self.split = split(examples, settings)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(draw(settings.seed, "weights"))
        self.model = NETWORKS[settings.network]().to(self.device)
        if vectors is not None:
            self.model.copy_vectors(*vectors)
        loss = getattr(dlkernels.nn, self.recipe.loss)(**self.recipe.loss_arguments)
        self.loss = loss.to(self.device)
        self.summed = getattr(loss, "reduction", "mean") == "sum"  # over a batch
        # On a GPU float16, whose range wants a scaler; on a CPU bfloat16.
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        self.amp = half if settings.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.optimisers = optimisers_of(
            self.model, settings.optimiser, settings.optimiser_arguments
        )
        self.schedules = schedules_of(settings.schedule, self.optimisers)
        self.state = State()
        self.carried = Carried() if self.recipe.carries_state else None
        objective = _Objective(self.model, self.loss, self.carried, self.amp)
        self.objective: torch.nn.Module = objective
        self.data = checksum(examples.tensors)
        if checkpoint is not None:
            self._restore(checkpoint)
        if settings.processes > 1:
            if self.recipe.carries_state:
                raise ValueError(f"{settings.network}: a state that is carried is one process's")
            ids = [self.device] if self.device.type == "cuda" else None
            self.objective = torch.nn.parallel.DistributedDataParallel(
                self.objective, device_ids=ids, find_unused_parameters=len(self.optimisers) > 1
            )
        self.sinks: tuple = ()
        if self.rank == 0:
            others = [log(out)] if log else []  # before a folder is made
            out.mkdir(parents=True, exist_ok=True)
            turns = [turn for turn in self.optimisers if turn]
            self.files = Files(out, ["step", "epoch", "lr", "loss", *turns], self.state.files)
            for sink in others:
                sink.begin(self.files)
            self.sinks = (self.files, *others)
            for name in (*CHECKPOINTS, *pictures(settings.network)):
                remove_parts(out / name)
        if checkpoint is None:
            self.save()  # so that there is what to resume from, whenever it is killed

    # ------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Writes ``last.pt``."""
        if self.rank != 0:
            return
        self.state.files = self.files.sizes()
        write_checkpoint(
            self.out / "last.pt",
            {
                "dlkernels": 1,
                "network": self.settings.network,
                "settings": dataclasses.asdict(self.settings),
                "epochs": self.epochs,
                "data": self.data,
                "state": dataclasses.asdict(self.state),
                "model": self.model.state_dict(),
                "optimisers": {k: o.state_dict() for k, o in self.optimisers.items()},
                "schedules": [schedule.state_dict() for schedule in self.schedules],
                "scaler": self.scaler.state_dict(),
                "carried": self.carried and self.carried.state,
            },
        )

    def _restore(self, checkpoint: dict) -> None:
        """Raises ValueError where the checkpoint is of other data or of other weights."""
        if checkpoint.get("data") != self.data:
            raise ValueError(f"{self.out / 'last.pt'}: was trained on other data")
        load_weights(self.model, checkpoint, self.out / "last.pt")
        try:
            for turn, optimiser in self.optimisers.items():
                optimiser.load_state_dict(checkpoint["optimisers"][turn])
            for schedule, state in zip(self.schedules, checkpoint["schedules"], strict=True):
                schedule.load_state_dict(state)
            self.scaler.load_state_dict(checkpoint["scaler"])
            if self.carried and checkpoint["carried"] is not None:
                self.carried.state = checkpoint["carried"].to(self.device)
            self.state = State(**checkpoint["state"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.out / 'last.pt'}: not a whole checkpoint: {error}") from None

    # --------------------------------------------------------------------------------- training

    def fit(
        self,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        """Trains until all epochs are done, or the patience is.

        Ctrl-C and SIGTERM end it after the step, with ``last.pt`` written: raises
        KeyboardInterrupt. Raises FloatingPointError when a loss is no longer finite.
        """
        self.model.train()
        with interruptions() as interrupted:
            while self.state.epoch < self.epochs and not self.out_of_patience():
                order = self._order()
                for batch in order[self.state.batch :]:
                    loss = self._step(batch)
                    on_step(self.state.step, loss)
                    last = self.state.batch == len(order)
                    if self._any(interrupted) and not last:
                        self.save()
                        raise KeyboardInterrupt
                    if self.save_every and self.state.step % self.save_every == 0 and not last:
                        self.save()
                self._end_of_epoch()
                if self._any(interrupted):
                    raise KeyboardInterrupt

    def out_of_patience(self) -> bool:
        """Whether so many epochs were no better than the best."""
        patience = self.settings.patience
        return patience is not None and self.state.epoch - self.state.best_epoch >= patience

    def steps(self) -> int:
        """Of an epoch."""
        count, size = len(self.split.train_inputs), self.settings.batch_size
        size = min(size, count)
        return count // size if self.settings.drop_last else -(-count // size)

    def _order(self) -> tuple[torch.Tensor, ...]:
        seed = draw(self.settings.seed, "order", self.state.epoch)
        count = len(self.split.train_inputs)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order.split(self.settings.batch_size)[: self.steps()]

    def _step(self, batch: torch.Tensor) -> float:
        settings, state = self.settings, self.state
        # Of a batch that is smaller than the processes are many, some have a part that weighs 0.
        part = batch[self.rank :: settings.processes]
        weight = len(part) * settings.processes / len(batch)
        if self.summed:
            weight = float(settings.processes if len(part) else 0)
        part = (part if len(part) else batch[:1]).to(self.device)
        inputs, targets = self.split.train_inputs[part], self.split.train_targets[part]
        torch.manual_seed(draw(settings.seed, "step", state.step, self.rank))
        if inputs.dim() == 4:
            size = self.examples.test_inputs.shape[2:]
            for name in self.recipe.augment:
                inputs = augment.AUGMENT[name](inputs, self.recipe)
            inputs = augment.crop(inputs, size)
        lr = next(iter(self.optimisers.values())).param_groups[0]["lr"]
        losses = {
            turn: self._turn(turn, optimiser, inputs, targets, weight)
            for turn, optimiser in self.optimisers.items()
        }
        total = sum(losses.values())
        state.step += 1
        state.batch += 1
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of step {state.step} is {total}")
        state.loss += total if self.summed else total * len(batch)
        state.seen += len(batch)
        losses.pop("", None)
        row = {"step": state.step, "epoch": state.epoch + 1, "lr": lr, "loss": total, **losses}
        for sink in self.sinks:
            sink.step(row)
        return total

    def _turn(self, turn, optimiser, inputs, targets, weight) -> float:
        settings = self.settings
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        seed = draw(settings.seed, "step", self.state.step, self.rank, turn)
        before = self.carried and self.carried.state

        def gradients() -> torch.Tensor:
            # LBFGS calls for these several times a step: it must be one function that is made
            # smaller, with the same dropout and state, and one loss in all processes.
            torch.manual_seed(seed)
            if self.carried:
                self.carried.state = before
            optimiser.zero_grad()
            loss = self.objective(turn, inputs, targets) * weight
            if settings.l1:
                loss = loss + settings.l1 * sum(p.abs().sum() for p in parameters)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(optimiser)
            clip_gradients(optimiser, settings.clip)
            loss = loss.detach()
            if settings.processes > 1:
                dist.all_reduce(loss)
                loss = loss / settings.processes
            return loss

        if isinstance(optimiser, torch.optim.LBFGS):
            loss = optimiser.step(gradients)
        else:
            loss = gradients()
            self.scaler.step(optimiser)
            self.scaler.update()
        return loss.item()

    def _end_of_epoch(self) -> None:
        state = self.state
        lr = next(iter(self.optimisers.values())).param_groups[0]["lr"]
        score, loss = self.evaluate(self.split.validation_inputs, self.split.validation_targets)
        rank = [-score.value if score.correct is None else score.value, -loss]
        if "generator" in self.optimisers:  # a better discriminator is no better generator
            rank = [float(state.epoch), 0.0]
        for schedule in self.schedules:
            if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                schedule.step(-rank[0])
            else:
                schedule.step()
        state.epoch += 1
        best = not state.best or rank > state.best
        if best:
            state.best, state.best_epoch = rank, state.epoch
        done = Epoch(state.epoch, state.loss / state.seen, loss, score, lr)
        state.batch = state.seen = 0
        state.loss = 0.0
        if self.rank == 0:
            self._tell(done)
            if best:  # before last.pt: a run killed between the two makes the same one again
                write_checkpoint(
                    self.out / "best.pt",
                    {
                        "dlkernels": 1,
                        "network": self.settings.network,
                        "epoch": state.epoch,
                        "model": self.model.state_dict(),
                    },
                )
            self.save()

    def _tell(self, done: Epoch) -> None:
        row = {"epoch": done.epoch, "train_loss": done.train_loss}
        row |= {"validation_loss": done.validation_loss, "lr": done.lr}
        metric = done.score.metric.replace(" ", "_")
        row |= {f"validation_{metric}": done.score.value}
        if done.score.correct is not None:
            row |= {"correct": done.score.correct, "total": done.score.total}
        for sink in self.sinks:
            sink.epoch(row)
        if hasattr(self.model, "show"):
            pixels = self.picture()
            for sink in self.sinks:
                sink.picture(self.model.picture, done.epoch, pixels)

    def picture(self) -> torch.Tensor:
        """What the network shows, as uint8 (C, H, W)."""
        self.model.eval()
        with torch.no_grad():
            rows = self.model.show(self.examples.test_inputs[:SHOWN])
        self.model.train()
        rows = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
        pixels = rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (C, rows*H, columns*W)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[Score, float]:
        """Score and mean loss in eval mode; of several processes the first computes them."""
        numbers = torch.zeros(3, dtype=torch.float64, device=self.device)
        metric, total = self.recipe.metric, len(targets)
        if self.rank == 0:
            outputs = outputs_of(metric, self.model, inputs, targets).float()
            score = judge(metric, outputs, targets, self.recipe.threshold)
            with torch.no_grad():
                loss = self.loss(outputs, targets).item()
            loss /= total if self.summed else 1
            correct = -1 if score.correct is None else score.correct
            numbers = torch.tensor([score.value, correct, loss], dtype=torch.float64)
        if self.settings.processes > 1:
            numbers = numbers.to(self.device)
            dist.broadcast(numbers, 0)
        value, correct, loss = numbers.tolist()
        return Score(metric, value, None if correct < 0 else int(correct), total), loss

    def test(self) -> tuple[Score, float]:
        """Score and mean loss on the test set, with the weights of ``best.pt``."""
        path = self.out / "best.pt"
        if self.rank == 0:
            load_weights(self.model, read_checkpoint(path, self.settings.network), path)
        return self.evaluate(self.examples.test_inputs, self.examples.test_targets)

    def close(self) -> None:
        """Closes the logs."""
        for sink in self.sinks:
            sink.close()

    def _any(self, interrupted: threading.Event) -> bool:
        """Whether any of the processes was interrupted: they end after the same step."""
        if self.settings.processes == 1:
            return interrupted.is_set()
        flag = torch.tensor(float(interrupted.is_set()), device=self.device)
        dist.all_reduce(flag)
        return flag.item() > 0


def resumed(checkpoint: dict, fresh: Settings, given: Iterable[str], path: Path) -> Settings:
    """The settings of the checkpoint. Raises ValueError where what is ``given`` is not in them."""
    try:
        settings, _ = Settings(**checkpoint["settings"]), int(checkpoint["epochs"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint: {error}") from None
    for name in [*given, "processes"]:
        arguments = [s.optimiser_arguments.get(name, getattr(s, name, None))
                     for s in (settings, fresh)]  # fmt: skip
        if arguments[0] != arguments[1]:
            raise ValueError(f"{path}: was trained with {name} {arguments[0]}, not {arguments[1]}")
    return settings


def check(settings: Settings, examples: Examples) -> None:
    """Raises ValueError for what a run would refuse, before any file is written."""
    split(examples, settings)
    schedules_of(settings.schedule, {"": torch.optim.SGD([torch.zeros(1)], lr=1.0)})


def pictures(network: str) -> list[str]:
    """The files of the pictures of what a network makes."""
    name = getattr(NETWORKS[network], "picture", None)
    return [f"{name}.png"] if name else []


def check_folder(out: Path, network: str, resume: bool) -> None:
    """Raises FileExistsError where a run in ``out`` would overwrite another's files."""
    last = out / CHECKPOINTS[0]
    if last.exists():
        if not resume:
            raise FileExistsError(
                f"{last} is there: --resume goes on with it, or take another --out"
            )
        return
    for name in (*CHECKPOINTS, *LOGS, *pictures(network)):
        if (out / name).exists():
            raise FileExistsError(f"{out / name} is there, without {last.name}: take another --out")


def together() -> None:
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes it whole, or leaves the old one."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_atomically(path, content.getvalue())


def read_checkpoint(path: Path, network: str) -> dict:
    """A checkpoint of this network, on the CPU. Nothing in it can run code.

    Raises FileNotFoundError; ValueError naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError,
            pickle.UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        raise ValueError(f"{path}: not a checkpoint, or a damaged one") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("dlkernels") != 1:
        raise ValueError(f"{path}: not a checkpoint of dlkernels train")
    if checkpoint.get("network") != network:
        raise ValueError(f"{path}: a checkpoint of {checkpoint.get('network')}, not of {network}")
    return checkpoint


def load_weights(model: torch.nn.Module, checkpoint: dict, path: Path) -> None:
    """Copies the checkpoint's weights into the model. Raises ValueError if they are another's."""
    wanted, got = model.state_dict(), checkpoint.get("model")
    if not isinstance(got, dict) or list(got) != list(wanted):
        raise ValueError(f"{path}: has other parameters than the network")
    for key, value in wanted.items():
        if not isinstance(got[key], torch.Tensor) or got[key].shape != value.shape:
            raise ValueError(f"{path}: {key} is not of shape {tuple(value.shape)}")
    model.load_state_dict(got)


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of ending the process; a second one ends it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame) -> None:
        event.set()
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, handle)
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Joins the others where ``torchrun`` started several; gives this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()

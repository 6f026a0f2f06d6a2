"""Trains a documented network twice, of ``torch.nn`` and of ``dlkernels.nn``, and compares them.

The two start from the same weights and see the same batches in the same order. Their steps are
interleaved in one process, and the one that goes first changes with every step: a machine that
slows down half-way, or a cache that the first leaves cold, hits both.
"""

import contextlib
import copy
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

import dlkernels.nn
from dlkernels.data import Examples
from dlkernels.models import NETWORKS
from dlkernels.swap import explain

WARM_UP_STEPS = 10
SCHEDULES = {"multistep": "MultiStepLR", "step": "StepLR", "plateau": "ReduceLROnPlateau"}


@dataclass
class Carried:
    """What a network whose recipe ``carries_state`` takes of the training step before."""

    state: torch.Tensor | None = None


@dataclass
class Side:
    """One of the two: its network, and what was measured of it, step by step."""

    name: str
    model: torch.nn.Module
    loss: torch.nn.Module
    optimisers: dict[str, torch.optim.Optimizer]  # of each turn of a step; "" of the only one
    schedules: list[torch.optim.lr_scheduler.LRScheduler]  # stepped at the end of an epoch
    clip: float | None = None
    carried: Carried | None = None
    losses: list[float] = field(default_factory=list)
    forward_ms: list[float] = field(default_factory=list)
    forward_backward_ms: list[float] = field(default_factory=list)


class Spread(NamedTuple):
    median: float
    lower_quartile: float
    upper_quartile: float


class Score(NamedTuple):
    """How a network does on a test set: right answers of all, or an error."""

    metric: str  # of a Recipe
    value: float
    correct: int | None
    total: int


class Layer(NamedTuple):
    name: str  # "conv1"; "(model)" of a network without layers
    module: str  # "Conv2d"
    kernel: str  # "cpu/avx2", or "stock"
    reason: str


class Measured(NamedTuple):
    forward_ms: Spread
    forward_backward_ms: Spread
    peak_memory_bytes: int
    score: Score
    losses: list[float]  # of every step
    step_ms: list[float]  # forward + backward of every step


class Comparison(NamedTuple):
    steps: int
    timed_steps: int
    stock: Measured
    ours: Measured
    forward_ratio: float  # the median over steps of stock / ours in the same step
    forward_backward_ratio: float
    loss_difference: float  # the largest |stock - ours| of the loss curves
    layers: list[Layer]


def twins(network: str, seed: int, device: torch.device) -> tuple[Side, Side]:
    """The documented network of ``torch.nn`` and of ``dlkernels.nn``, with the same weights."""
    torch.manual_seed(seed)
    stock = _side("torch.nn", network, torch.nn, device)
    torch.manual_seed(seed)
    ours = _side("dlkernels.nn", network, dlkernels.nn, device)
    ours.model.load_state_dict(stock.model.state_dict())
    for (key, a), b in zip(
        stock.model.state_dict().items(), ours.model.state_dict().values(), strict=True
    ):
        if not torch.equal(a, b):
            raise RuntimeError(f"{network}: {key} differs between the twins")
    return stock, ours


def _side(name: str, network: str, nn: ModuleType, device: torch.device) -> Side:
    cls = NETWORKS[network]
    recipe = cls.recipe
    model = cls(nn=nn).to(device)
    optimisers = optimisers_of(model, recipe.optimiser, recipe.optimiser_arguments)
    schedules = schedules_of(recipe.schedule, optimisers)
    loss = getattr(nn, recipe.loss)(**recipe.loss_arguments)
    carried = Carried() if recipe.carries_state else None
    return Side(name, model, loss, optimisers, schedules, recipe.clip, carried)


def optimisers_of(
    model: torch.nn.Module, name: str, arguments: dict
) -> dict[str, torch.optim.Optimizer]:
    """For each turn of a training step the optimiser of the parameters that are changed in it.

    A network's ``turns`` maps a turn to the names of the submodules that it changes. One without
    has the turn "", which changes all.
    """
    turns = getattr(model, "turns", {"": ("",)})
    return {
        turn: getattr(torch.optim, name)(
            [p for part in parts for p in model.get_submodule(part).parameters()], **arguments
        )
        for turn, parts in turns.items()
    }


def schedules_of(
    text: str, optimisers: dict[str, torch.optim.Optimizer]
) -> list[torch.optim.lr_scheduler.LRScheduler]:
    """For each optimiser the schedule that ``text`` names, none of "": the rate is a tenth after
    these epochs ("multistep:150,200"), after every so many ("step:30"), or after so many without a
    better score ("plateau:10").

    Raises ValueError.
    """
    if not text:
        return []
    kind, _, numbers = text.partition(":")
    if kind not in SCHEDULES or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", numbers):
        raise ValueError(f"wanted multistep:150,200, step:30 or plateau:10, got {text!r}")
    epochs = [int(number) for number in numbers.split(",")]
    if kind != "multistep" and len(epochs) != 1:
        raise ValueError(f"{kind} takes one number, got {text!r}")
    cls = getattr(torch.optim.lr_scheduler, SCHEDULES[kind])
    if kind == "plateau":
        return [cls(o, factor=0.1, patience=epochs[0]) for o in optimisers.values()]
    when = epochs if kind == "multistep" else epochs[0]
    return [cls(o, when, gamma=0.1) for o in optimisers.values()]


def clip_gradients(optimiser: torch.optim.Optimizer, norm: float | None) -> None:
    """Scales the gradients of its parameters down to the norm, if one is given."""
    if norm is not None:
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)


def objective(
    model: torch.nn.Module,
    loss: torch.nn.Module,
    turn: str,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    carried: Carried | None = None,
    amp: torch.dtype | None = None,
) -> torch.Tensor:
    """What a turn of a training step makes smaller: the network's own ``objective``, or ``loss`` of
    its outputs, in float32 at least. ``amp``: what the network is cast to."""
    # The loss is outside: binary cross-entropy of probabilities refuses autocast on a GPU.
    cast = torch.autocast(inputs.device.type, amp) if amp else contextlib.nullcontext()
    with cast:
        if turn:
            return model.objective(turn, loss, inputs, targets)
        outputs = _forward(model, inputs, carried)
    if outputs.dtype in (torch.bfloat16, torch.float16):
        outputs = outputs.float()
    return loss(outputs, targets)


def _forward(model: torch.nn.Module, inputs: torch.Tensor, carried: Carried | None) -> torch.Tensor:
    """The outputs of a training step; a network's state is kept for the next one, detached."""
    if carried is None:
        return model(inputs)
    state = carried.state
    if state is not None and state.shape[1] != len(inputs):  # a last, smaller batch
        state = None
    outputs, state = model(inputs, state)
    carried.state = state.detach()
    return outputs


def step(side: Side, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """One training step, of one turn or several. Times the forward pass with the loss, and that
    plus the backward pass.

    The optimiser, which is torch's on both sides, is outside of both times. A kernel that makes
    its gradient in the forward pass pays for it there: only the sum is comparable between sides.
    """
    forward = both = total = 0.0
    for turn, optimiser in side.optimisers.items():
        optimiser.zero_grad()
        start = _now(inputs.device)
        loss = objective(side.model, side.loss, turn, inputs, targets, side.carried)
        middle = _now(inputs.device)
        loss.backward()
        end = _now(inputs.device)
        clip_gradients(optimiser, side.clip)
        optimiser.step()
        forward += middle - start
        both += end - start
        total += loss.item()
    side.forward_ms.append(forward * 1e3)
    side.forward_backward_ms.append(both * 1e3)
    side.losses.append(total)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(
    sides: tuple[Side, Side],
    data: Examples,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[Side], None],
) -> list[int]:
    """Trains both sides on the same shuffled batches; the last batch of an epoch may be smaller.

    Returns each step's batch size. ``on_step`` is called after every step of either side, outside
    of the timed region. Raises FloatingPointError when a loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    for side in sides:
        side.model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_inputs), generator=generator)
        for batch in order.to(data.train_inputs.device).split(batch_size):
            inputs, targets = data.train_inputs[batch], data.train_targets[batch]
            for side in sides if len(sizes) % 2 == 0 else sides[::-1]:
                torch.manual_seed(seed + len(sizes))  # what a network draws is the same on both
                step(side, inputs, targets)
                if not math.isfinite(side.losses[-1]):
                    raise FloatingPointError(
                        f"{side.name}: the loss of step {len(sizes) + 1} is {side.losses[-1]}"
                    )
                on_step(side)
            sizes.append(len(batch))
        for side in sides:
            for schedule in side.schedules:
                schedule.step()
    return sizes


def timed(sizes: list[int]) -> list[int]:
    """The steps whose times count: full batches, without the warm-up.

    Warm-up is the first tenth of them, 10 at most: first calls build primitives and touch pages.
    """
    full = [k for k, size in enumerate(sizes) if size == max(sizes)]
    return full[min(WARM_UP_STEPS, len(full) // 10) :]


def spread(values: list[float]) -> Spread:
    """Median and quartiles; of one value, that value three times."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def score(
    metric: str,
    model: torch.nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    threshold: float = 0.5,
) -> Score:
    """The network on a test set, in eval mode.

    ``metric``: "accuracy", of the largest of (N, classes) against (N,); "binary accuracy", of
    (N, 1) against ``threshold``; "mean squared error"; with "autoregressive" before it, of what
    ``model.predict`` continues the inputs with.
    """
    return judge(metric, outputs_of(metric, model, inputs, targets), targets, threshold)


def outputs_of(
    metric: str, model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """What a metric judges, in eval mode, without a gradient; the network is left in training
    mode."""
    model.eval()
    with torch.no_grad():
        if metric.startswith("autoregressive"):
            outputs = model.predict(inputs, targets.shape[1])
        else:
            outputs = torch.cat([model(x) for x in inputs.split(256)])
    model.train()
    return outputs


def judge(
    metric: str, outputs: torch.Tensor, targets: torch.Tensor, threshold: float = 0.5
) -> Score:
    """The score of these outputs; metrics and shapes as of ``score``."""
    if metric.endswith("mean squared error"):
        error = (outputs.double() - targets).square().mean().item()
        return Score(metric, error, None, len(targets))
    answers = outputs.argmax(1) if metric == "accuracy" else (outputs >= threshold).to(targets)
    correct = int((answers == targets).sum())
    return Score(metric, correct / len(targets), correct, len(targets))


def peak_memory(side: Side, inputs: torch.Tensor, targets: torch.Tensor) -> int:
    """Peak bytes of a forward and backward pass, above what was allocated before it.

    That is activations, what backward saves, gradients and workspace; weights, optimiser state and
    the batch are not in it. CUDA: ``torch.cuda.max_memory_allocated``. CPU: torch.profiler's record
    of every allocation and release by torch's CPU allocator, summed in order of time; memory that a
    library takes by malloc itself is not seen. Runs on a copy of the network.
    """
    model = copy.deepcopy(side.model)

    def run() -> None:
        for turn in side.optimisers:
            objective(
                model, side.loss, turn, inputs, targets, side.carried and Carried()
            ).backward()

    run()
    model.zero_grad(set_to_none=True)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
        torch.cuda.reset_peak_memory_stats(inputs.device)
        before = torch.cuda.memory_allocated(inputs.device)
        run()
        torch.cuda.synchronize(inputs.device)
        return torch.cuda.max_memory_allocated(inputs.device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return peak_of_trace(events)


def peak_of_trace(events: list[dict]) -> int:
    """The highest running sum of a profiler trace's CPU allocations (+) and releases (-)."""
    memory = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    allocated = peak = 0
    for event in sorted(memory, key=lambda e: e["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def kernels_used(side: Side, inputs: torch.Tensor, targets: torch.Tensor) -> list[Layer]:
    """Which kernel computed each layer that was called, and the loss, in a training step, by
    ``dlkernels.explain``; what the network's own forward calls is "(model)". Runs on a copy."""
    model, loss = copy.deepcopy(side.model).train(), copy.deepcopy(side.loss)
    layers = [*explain(model, inputs)]
    outputs = _forward(model, inputs, side.carried and Carried())
    layers += (row._replace(name="loss") for row in explain(loss, outputs, targets))
    return [
        Layer(row.name or "(model)", row.cls.rpartition(".")[2], row.kernel, row.reason)
        for row in layers
        if row.kernel != "none"
    ]


def compare(
    network: str,
    data: Examples,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    clip: float | None = None,
    on_step: Callable[[Side], None] = lambda side: None,
) -> Comparison:
    """Trains the twins of ``network`` on ``data``, on its device, and measures both. ``clip``, if
    given, replaces the recipe's."""
    device = data.train_inputs.device
    stock, ours = twins(network, seed, device)
    for side in (stock, ours):
        side.clip = side.clip if clip is None else clip
    sizes = train(
        (stock, ours), data, epochs=epochs, batch_size=batch_size, seed=seed, on_step=on_step
    )
    counted, recipe = timed(sizes), NETWORKS[network].recipe
    inputs, targets = data.train_inputs[:batch_size], data.train_targets[:batch_size]

    def measured(side: Side) -> Measured:
        return Measured(
            spread([side.forward_ms[k] for k in counted]),
            spread([side.forward_backward_ms[k] for k in counted]),
            peak_memory(side, inputs, targets),
            score(
                recipe.metric,
                side.model,
                data.test_inputs,
                data.test_targets,
                recipe.threshold,
            ),
            side.losses,
            side.forward_backward_ms,
        )

    def ratio(a: list[float], b: list[float]) -> float:
        # Pair by pair: on a busy machine times have two modes, and the ratio of two medians can
        # be that of the modes.
        return statistics.median(a[k] / b[k] for k in counted)

    return Comparison(
        len(sizes),
        len(counted),
        measured(stock),
        measured(ours),
        ratio(stock.forward_ms, ours.forward_ms),
        ratio(stock.forward_backward_ms, ours.forward_backward_ms),
        max(abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)),
        kernels_used(ours, inputs, targets),
    )

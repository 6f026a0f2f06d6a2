"""How a row is timed: every provider in turn, in one process, with the same data before each call.

A row is one shape of one op with the reason why it is looked at; a provider is one way to compute
it. Providers are interleaved, so that a change of the machine meets them all, and each round begins
with another (A B C, B C A, ...), so that nobody always finds the memory that the same neighbour
left: whether a large gradient's pages are fresh depends on it. Rounds come in batches. A batch is
steady when median/min < 1.15 for every provider and other processes left the cores alone: a busy
machine can be evenly slow, and slows most what waits at barriers. An unsteady batch is taken again,
up to a limit, and the steadiest one is kept, for all providers together, so that nobody's best
moment is held against somebody else's bad one.

On a GPU a sample is timed by events. L2 is flushed before it, and where a sample is one call the
GPU is kept busy until the host has queued it: what is timed is the GPU's work, which a training
step's long queue hides the host behind. Rows of several calls include the host.

A sample is timed from the call until its results have been dropped: memory that is taken and given
back at each step is part of the cost of a step, and is the larger part for large gradients.
"""

import contextlib
import functools
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from benchmarks import machine

# The profiler counts the bytes; its log lines would stand between the rows. Read at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Of a compiled call only the forward is in the key of torch's cache: a backward from there may call
# ops by arguments that they had in an earlier version.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

STEADY = 1.15
ALONE = 0.1  # cores that others may use during a batch
ROUNDS = (11, 101)  # fewest and most rounds of a batch
BATCH_SECONDS = 1.0  # a batch goes on this long, within ROUNDS
WARM_UP = 3
FLUSH_BYTES = 1 << 28  # several times any L2
HEAD_START = 2_000_000  # clock cycles, about 1 ms: the host's time for forward and backward
PIECE = 1 << 26  # elements compared at once: a float32 copy of all would not fit
WRONG = 0.05  # a result further than this from stock's (of its size) is other work


@dataclass
class Provider:
    """One way to compute a row.

    ``call`` is the timed work and returns its tensors (loss, gradient, ...), in the same order for
    every provider of the row. ``prepare`` runs untimed before each sample. ``kernels`` is
    the value of ``dlkernels.config.kernels`` meanwhile, None for what is not ours.
    ``eager_stock`` marks stock in one of its layouts; the first such provider has the row's own.
    """

    name: str
    call: Callable[[], tuple[torch.Tensor, ...]]
    prepare: Callable[[], None] = lambda: None
    kernels: str | None = None
    eager_stock: bool = False


@dataclass
class Row:
    """One shape of one op. ``bytes`` is the least traffic that the work needs; ``flops`` counts an
    exponential as one. ``calls`` are made in one sample: more than one where a call is short."""

    op: str
    name: str
    reason: str
    work: str  # "forward", "forward+gradient", or another direction alone
    dtype: str
    shape: tuple[int, ...]
    layout: str
    bytes: int
    flops: int
    providers: Callable[[], list[Provider]] = field(repr=False)
    calls: int = 1

    @property
    def grad(self) -> bool:
        return self.work != "forward"


def rewritten(source: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
    """``source`` as a layer before has just written it, from ``master``: without a graph behind it
    but for the view of a leaf."""
    with torch.no_grad():
        source.copy_(master)
    if not source.requires_grad:
        return source
    with torch.enable_grad():
        return source.view_as(source)


def compiled(function: Callable, mode: str | None = None) -> Callable:
    """``function`` by torch.compile, at the first call, which is not timed."""
    # A code object of its own for each row: dynamo counts the recompilations of one, and every row
    # is a new shape.
    torch.compiler.reset()
    return torch.compile(
        lambda *args, **kwargs: function(*args, **kwargs), fullgraph=True, dynamic=False, mode=mode
    )


def rows_of(op: str, cases: list, counted: Callable, providers: Callable, device: str) -> list[Row]:
    """A row for each case of an op's tables, whose fields have a row's names. ``counted(case)``
    gives bytes and flops. Tensors are made when a row's providers are asked for."""
    made = []
    for case in cases:
        bytes_, flops = counted(case)
        made.append(
            Row(
                op=op,
                name=case.name,
                reason=case.reason,
                work=case.work,
                dtype=str(case.dtype).removeprefix("torch."),
                shape=case.shape,
                layout=getattr(case, "layout", "contiguous"),
                bytes=bytes_,
                flops=flops,
                providers=functools.partial(providers, case, device),
                calls=case.calls,
            )
        )
    return made


@dataclass
class Measured:
    """What was seen of one provider. ``missing`` says why there are no times, if there are none."""

    name: str
    eager_stock: bool = False
    samples: list[float] = field(default_factory=list)  # ms per call
    peak_bytes: int | None = None
    page_faults: int | None = None  # per call; each costs some 0.1 to 0.5 us of a fresh page
    kernel: str = "stock"
    difference: float | None = None
    missing: str | None = None


@contextlib.contextmanager
def kernels_chosen(kernels: str | None):
    """Sets ``dlkernels.config.kernels`` inside; does nothing for None."""
    if kernels is None:
        yield
        return
    import dlkernels

    before = dlkernels.config.kernels
    dlkernels.config.kernels = kernels
    try:
        yield
    finally:
        dlkernels.config.kernels = before


def sample(provider: Provider, row: Row, device: str) -> float:
    """Milliseconds per call of one sample of ``row.calls`` calls."""
    with kernels_chosen(provider.kernels), torch.set_grad_enabled(row.grad):
        provider.prepare()
        call, calls = provider.call, range(row.calls)
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _flushing().zero_()
            torch.cuda.synchronize()
            if row.calls == 1:
                torch.cuda._sleep(HEAD_START)
            start.record()
            for _ in calls:
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / row.calls
        begin = time.perf_counter_ns()
        for _ in calls:
            call()
        return (time.perf_counter_ns() - begin) / row.calls * 1e-6


@functools.cache
def _flushing() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


class Batch(NamedTuple):
    samples: dict[str, list[float]]  # provider -> ms per call
    busy_elsewhere: float | None  # cores that other processes used, on average; None: unknown

    @property
    def spread(self) -> float:
        """The largest median/min of any provider."""
        return max(statistics.median(times) / min(times) for times in self.samples.values())

    @property
    def alone(self) -> bool:
        return self.busy_elsewhere is None or self.busy_elsewhere <= ALONE

    @property
    def steady(self) -> bool:
        return self.alone and self.spread < STEADY


def interleaved(providers: Sequence[Provider], take: Callable[[Provider], float]) -> Batch:
    """One batch, in rounds of one sample of each provider."""
    samples: dict[str, list[float]] = {provider.name: [] for provider in providers}
    gc.collect()
    gc.disable()
    begin, others, rounds = time.perf_counter(), _cpu_seconds_of_others(), 0
    try:
        while rounds < ROUNDS[0] or (
            rounds < ROUNDS[1] and time.perf_counter() - begin < BATCH_SECONDS
        ):
            first = rounds % len(providers)
            for provider in (*providers[first:], *providers[:first]):
                samples[provider.name].append(take(provider))
            rounds += 1
    finally:
        gc.enable()
    if others is not None:
        seconds = time.perf_counter() - begin
        others = round(max(0.0, _cpu_seconds_of_others() - others) / seconds, 2)
    return Batch(samples, others)


def _cpu_seconds_of_others() -> float | None:
    """CPU time that was not ours, since some time long ago; None where there is no /proc."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, soft, steal = map(int, file.readline().split()[1:9])
    except OSError:
        return None
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def steadiest(take_batch: Callable[[], Batch], repeats: int) -> tuple[Batch, int]:
    """Takes batches until one is steady, at most ``repeats``; the steadiest, and how many."""
    best, taken = take_batch(), 1
    while not best.steady and taken < repeats:
        best = min(best, take_batch(), key=lambda batch: (not batch.alone, batch.spread))
        taken += 1
    return best, taken


def peak_bytes(provider: Provider, row: Row, device: str) -> int:
    """The most bytes alive at once during one call, beyond those alive before it, results
    included. On a CPU: of memory taken through torch's allocator, which all tensors are."""
    with kernels_chosen(provider.kernels), torch.set_grad_enabled(row.grad):
        provider.prepare()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            provider.call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            provider.call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def page_faults(provider: Provider, row: Row, device: str) -> int:
    """Pages that the kernel had to map during one call, prepared as for a sample. Whether memory
    comes fresh from the kernel or again from the heap decides the time of many a row."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sample(provider, row, device)
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / row.calls)


def difference(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference of any pair, in the root mean square, relative to the wanted one's: a
    gradient of a ReLU may be another where its argument is within rounding of 0."""
    if len(got) != len(wanted):
        raise ValueError(f"{len(got)} results against {len(wanted)}")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"a result of shape {tuple(a.shape)} against {tuple(b.shape)}")
        off = size = 0.0
        for x, y in zip(*(t.flatten().split(PIECE) for t in (a, b)), strict=True):
            off += (x.float() - y.float()).square().sum(dtype=torch.float64).item()
            size += y.float().square().sum(dtype=torch.float64).item()
        one = (off / (size or 1.0)) ** 0.5
        worst = max(worst, one if one == one else float("inf"))  # a NaN differs by infinity
    return worst


def _first_call(provider: Provider, row: Row) -> tuple[tuple[torch.Tensor, ...], str]:
    """The results of one call, and the kernels that it says it took."""
    with kernels_chosen(provider.kernels), torch.set_grad_enabled(row.grad):
        provider.prepare()
        if provider.kernels is None:
            kernel = "compiled" if provider.name == "torch.compile" else provider.name
            return provider.call(), "stock" if provider.eager_stock else kernel
        import dlkernels

        with dlkernels.config.recording() as choices:
            results = provider.call()
    kernels = sorted({choice.kernel for choice in choices})
    return results, " + ".join(kernels) or "compiled"


def _try_out(provider: Provider, row: Row, wanted, device: str) -> tuple[Measured, tuple | None]:
    measured = Measured(provider.name, provider.eager_stock)
    try:
        results, measured.kernel = _first_call(provider, row)
    except NotImplementedError as error:
        measured.missing = f"no kernel: {_first_line(error)}"
        return measured, None
    except Exception as error:
        # Ours and stock must run. A compiler or a peer that cannot is shown in the table instead.
        if provider.kernels is not None and "compiled" not in provider.name or wanted is None:
            raise
        measured.missing = f"{type(error).__name__}: {_first_line(error)}"
        return measured, None
    if wanted is not None:
        measured.difference = difference(results, wanted)
        if not measured.difference <= WRONG:
            measured.missing = f"another result than stock's: off by {measured.difference:.2g}"
            return measured, None
    for _ in range(WARM_UP - 1):
        sample(provider, row, device)
    measured.peak_bytes = peak_bytes(provider, row, device)
    return measured, results


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def measure(row: Row, device: str, repeats: int, chosen: Callable[[str], bool]) -> dict:
    """Times one row.

    Args:
        row: what to time.
        device: "cpu" or "cuda".
        repeats: the most batches to take.
        chosen: which providers, by name; the first stock one always runs, as the others are
            compared with it.

    Returns:
        providers (a list of Measured), batches, steady, core_latency_ns (just before the batches)
        and busy_elsewhere (cores that other processes used during the one kept).
    """
    providers = row.providers()
    if not providers[0].eager_stock:
        raise ValueError(f"row {row.name!r}: the first provider must be stock in the row's layout")
    running, all_measured, wanted = [], [], None
    for provider in providers:
        if wanted is not None and not chosen(provider.name):
            continue
        results = None  # of the one before, which may be as large as the memory that is left
        measured, results = _try_out(provider, row, wanted, device)
        wanted = results if wanted is None else wanted
        all_measured.append(measured)
        if measured.missing is None:
            running.append(provider)
    del results, wanted
    try:
        latency = round(machine.core_latency_ns(), 1)
    except machine.ProbeError:  # the machine line says why
        latency = None
    batch, taken = steadiest(
        lambda: interleaved(running, lambda provider: sample(provider, row, device)), repeats
    )
    for provider in running:
        measured = next(m for m in all_measured if m.name == provider.name)
        measured.samples = batch.samples[provider.name]
        measured.page_faults = page_faults(provider, row, device)
    return {
        "providers": all_measured,
        "batches": taken,
        "steady": batch.steady,
        "core_latency_ns": latency,
        "busy_elsewhere": batch.busy_elsewhere,
    }

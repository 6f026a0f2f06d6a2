"""Rows and providers of cross-entropy.

**The work.** The logits are no leaf: in a network they come out of a linear layer, whose backward
takes their gradient. So the timed work is ``torch.autograd.grad(loss, logits)`` with logits that
are a view of a leaf, which hands the gradient over exactly as autograd hands it to the layer
before, for all providers alike. With ``loss.backward()`` on a leaf, AccumulateGrad copies a
gradient to which somebody else still refers, a cost that no network has; the two ``leaf`` rows
show it. Forward rows run without a graph.

**The data.** Normal logits times 3 (the spread of a half-trained classifier), never zeros: equal
logits would skip no work, but their exponentials are the cheap ones. Before each sample the logits
are written anew from a master copy, untimed: a linear layer would have written them just now, so as
much of them as fits is in cache, whichever provider ran before; nor can a provider that writes its
gradient over the logits change what the next one reads. Rotating several inputs would say instead
that logits come from memory, which is true only where they are larger than the caches, and there
both ways are equal. On a GPU L2 is flushed all the same (measure.py). A fraction of the copy
bandwidth above 1 means that the cache delivered.

**The bytes.** Logits read once, gradient written once, targets read once. **The flops**, per
logit: maximum, subtraction, exponential and sum; for the gradient a product and a subtraction.
"""

import itertools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Provider, Row, compiled, rows_of

OP = "cross_entropy"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """One line of the tables below. ``options`` are those of ``F.cross_entropy`` but for
    ``target`` ("index" or "probability") and the booleans ``weighted`` and ``leaf``. ``autotune``
    adds torch.compile's max-autotune, ``graph`` times replays of a CUDA graph."""

    name: str
    shape: tuple[int, ...]
    reason: str
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    work: str = "forward+gradient"
    options: dict = {}  # read only
    upstream: float | str = 1.0  # a factor on the loss, or "rows" for a random one per row
    calls: int = 1
    autotune: bool = False
    graph: bool = False


IMAGES, SEGMENTATION, DIGITS = (4096, 1000), (32, 21, 128, 128), (128, 10)
LLAMA2, LLAMA3 = (2048, 32000), (512, 128256)

_PLAIN = [
    Case("4096x1000", IMAGES, "ImageNet classes; 16 MB of logits still fit the last cache"),
    Case("2048x32000", LLAMA2, "Llama 2's vocabulary; 262 MB, far beyond the caches"),
    Case("512x128256", LLAMA3, "Llama 3's vocabulary; one row is half of an L2 cache"),
    Case("32x21x128x128", SEGMENTATION, "segmentation, NCHW: classes lie 64 KB apart"),
    Case(
        "32x21x128x128 channels_last",
        SEGMENTATION,
        "segmentation, NHWC: rows of 21, which no vector divides",
        layout="channels_last",
    ),
    Case("128x10", DIGITS, "digits: 1280 logits, all of it is the cost of calling", calls=200),
    Case("1x2", (1, 2), "no work at all: the cost of the call alone", calls=500),
]

_DTYPES = [
    case._replace(
        name=f"{case.name} {name}",
        dtype=dtype,
        reason=f"{name} logits and gradient: half the bytes",
    )
    for name, dtype, cases in (
        ("bfloat16", torch.bfloat16, _PLAIN[:6]),
        ("float16", torch.float16, _PLAIN[:1]),
    )
    for case in cases
]

_UPSTREAM = [
    Case(
        f"{rows}x{classes} loss/4",
        (rows, classes),
        "an upstream gradient other than 1 (gradient accumulation, GradScaler)",
        upstream=0.25,
    )
    for rows, classes in (IMAGES, LLAMA2)
]

_OPTIONS = [
    Case(
        "4096x1000 label smoothing",
        IMAGES,
        "every class has a part in the loss",
        options={"label_smoothing": 0.1},
    ),
    Case(
        "4096x1000 weight, ignored",
        IMAGES,
        "class weights, and an eighth of the rows ignored",
        options={"weighted": True, "ignore_index": -100},
    ),
    Case(
        "4096x1000 probabilities",
        IMAGES,
        "class probabilities as targets (mixup, distillation): a second input as large",
        options={"target": "probability"},
    ),
    Case(
        "4096x1000 reduction none",
        IMAGES,
        "a loss and an upstream gradient for each row",
        options={"reduction": "none"},
        upstream="rows",
    ),
]

_LEAF = [
    Case(
        f"{rows}x{classes} leaf",
        (rows, classes),
        "loss.backward() into the .grad of a leaf: see the head of this file",
        options={"leaf": True},
    )
    for rows, classes in (IMAGES, LLAMA2)
]

_FORWARD = [
    case._replace(
        name=f"{case.name} forward", work="forward", reason="validation: no gradient is wanted"
    )
    for case in _PLAIN
]

CASES = _PLAIN + _UPSTREAM + _DTYPES + _OPTIONS + _LEAF + _FORWARD

VOCABULARIES = {
    131072: "a row of 256 KB: a cluster of blocks for each",
    4096: "a row of 8 KB, 268 MB of logits: far beyond L2",
    32000: "Llama 2's vocabulary",
    1000: "ImageNet classes; a row of 2000 bytes, little work for a block",
    256: "bytes; 17 MB of logits, which L2 could hold",
    262144: "Gemma's vocabulary: the longest row that a cluster keeps",
    65536: "a row of 128 KB",
    16384: "a row of 32 KB",
}
MOST_ROWS, WORKING_SET = 32768, 8  # logits, master, two results, and what stock makes on its way
MAX_AUTOTUNE = {(131072, "forward"), (131072, "forward+gradient"), (4096, "forward")}
MAX_AUTOTUNE |= {(4096, "forward+gradient"), (32000, "forward+gradient")}


def rows_that_fit(classes: int, itemsize: int, memory: int) -> int:
    """MOST_ROWS, halved until everything that a row of the benchmark keeps fits in the memory."""
    rows = MOST_ROWS
    while rows > 1 and WORKING_SET * rows * classes * itemsize > memory:
        rows //= 2
    return rows


def gpu_cases(memory: int) -> list[Case]:
    """The rows for a GPU of so many bytes, the most telling first: a check may be cut short."""
    worked = {"forward": " forward", "forward+gradient": ""}
    cases = [
        Case(
            "8192x131072 bfloat16",
            (8192, 131072),
            "the size at which libraries for language models are compared; 2.1 GB of logits",
            dtype=torch.bfloat16,
            autotune=True,
        )
    ]
    cases += [
        Case(
            f"128x10{ending} graph",
            DIGITS,
            "digits, in a CUDA graph: no call to pay, but every kernel's start",
            work=work,
            calls=100,
            graph=True,
        )
        for work, ending in worked.items()
    ]
    tables = [(torch.bfloat16, VOCABULARIES)]
    tables += [(torch.float32, {c: VOCABULARIES[c] for c in (1000, 32000, 131072)})]
    for dtype, table in tables:
        for (classes, reason), (work, ending) in itertools.product(table.items(), worked.items()):
            rows, name = rows_that_fit(classes, dtype.itemsize, memory), str(dtype)[6:]
            half = dtype == torch.bfloat16
            case = Case(f"{rows}x{classes} {name}{ending}", (rows, classes), reason, dtype)
            if case.name == cases[0].name:  # little memory
                continue
            tuned = half and (classes, work) in MAX_AUTOTUNE
            cases.append(case._replace(work=work, autotune=tuned))
    return cases


class Data:
    """The tensors of a case in one memory layout: a master copy, and the logits that are used."""

    def __init__(self, case: Case, layout: str, device: str):
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        self.case, shape, options = case, case.shape, dict(case.options)
        rows_shape, classes = (shape[0], *shape[2:]), shape[1]
        kind, self.leaf = options.pop("target", "index"), options.pop("leaf", False)

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        if device == "cuda":  # gigabytes, which the CPU would draw for minutes
            on_device = torch.Generator(device).manual_seed(generator.initial_seed())
            logits = torch.randn(shape, generator=on_device, device=device, dtype=case.dtype)
            logits = logits.mul_(3)
        else:
            logits = (3 * drawn(*shape)).to(case.dtype)
        self.master = logits.contiguous(memory_format=LAYOUTS[layout])
        if kind == "probability":
            self.target = drawn(*shape).softmax(1).to(device, case.dtype)
        else:
            self.target = torch.randint(classes, rows_shape, generator=generator)
            if "ignore_index" in options:
                ignored = torch.rand(rows_shape, generator=generator) < 1 / 8
                self.target[ignored] = options["ignore_index"]
            self.target = self.target.to(device)
        if options.pop("weighted", False):
            options["weight"] = (0.5 + torch.rand(classes, generator=generator)).to(
                device, case.dtype
            )
        self.upstream = (
            drawn(*rows_shape).to(device, case.dtype) if case.upstream == "rows" else None
        )
        self.options = options
        self.wants_gradient = case.work != "forward"
        self.source = torch.empty_like(self.master).requires_grad_(self.wants_gradient)
        self.logits = self.source

    def prepare(self) -> None:
        """Logits as a layer before has just written them, with no gradient and no graph yet."""
        self.source.grad = None
        with torch.no_grad():
            self.source.copy_(self.master)
        self.attach()

    def attach(self) -> None:
        """Logits without a graph behind them but for the view of the leaf."""
        self.logits = self.source
        if self.wants_gradient and not self.leaf:
            with torch.enable_grad():
                self.logits = self.source.view_as(self.source)

    def work(self, loss_of: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The timed call: the loss by ``loss_of`` and, if the case has one, its gradient."""
        options, target, factor = self.options, self.target, self.case.upstream

        def forward():
            return (loss_of(self.logits, target, **options),)

        def leaf():
            loss = loss_of(self.logits, target, **options)
            loss.backward()
            return loss, self.logits.grad

        def gradient():
            loss = loss_of(self.logits, target, **options)
            return loss, *torch.autograd.grad(loss, self.logits, self.upstream)

        def scaled():
            loss = loss_of(self.logits, target, **options) * factor
            return loss, *torch.autograd.grad(loss, self.logits)

        if not self.wants_gradient:
            return forward
        if self.leaf:
            return leaf
        return gradient if factor in (1.0, "rows") else scaled


def _ours(*arguments, **options) -> torch.Tensor:
    import dlkernels

    return dlkernels.functional.cross_entropy(*arguments, **options)


class _Twin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target):
        from dlkernels.kernels import cross_entropy as twin

        # float16 too has its gradient ahead: what is timed is the kernels.
        loss, _, _, ctx.gradient = twin._cross_entropy_forward_backward(
            input, target, None, *_PLAIN_OPTIONS
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        from dlkernels.kernels import cross_entropy as twin

        twin._cross_entropy_scale_(ctx.gradient, grad_loss)
        return ctx.gradient, None


_PLAIN_OPTIONS = (1, -100, 0.0, 0.0, 0.0)  # of the raw ops: the mean, and nothing else


def _triton(input, target) -> torch.Tensor:
    """The Triton twin, which has no dispatch key where there is a CUDA library."""
    from dlkernels.kernels import cross_entropy as twin

    if input.requires_grad and torch.is_grad_enabled():
        return _Twin.apply(input, target)
    return twin._cross_entropy_forward(input, target, None, *_PLAIN_OPTIONS)[0]


class _Graph:
    """A call that is captured when it is first made, and then replayed.

    ``attach`` is called before each: autograd runs a view's backward on the stream that made the
    view, and another stream than the captured one must not be drawn in.
    """

    def __init__(self, call: Callable, attach: Callable[[], None]):
        self.call, self.attach, self.graph = call, attach, None

    def __call__(self):
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what allocates or compiles once must not be captured
                for _ in range(3):
                    self.attach()
                    self.call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.attach()
                self.results = self.call()
            self.graph = graph
        self.graph.replay()
        return self.results


def _peers(case: Case) -> dict[str, Callable]:
    """The loss functions of libraries for GPUs that are installed and cover the case."""
    peers = {}
    if len(case.shape) != 2 or case.options.get("target") == "probability":
        return peers
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        peers["liger"] = liger_cross_entropy
    except ImportError:
        pass  # a peer that is not installed has no row
    try:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        if "label_smoothing" not in case.options:
            peers["quack"] = quack_cross_entropy
    except ImportError:
        pass
    return peers


def _providers(case: Case, device: str) -> list[Provider]:
    data = Data(case, case.layout, device)

    def of(name: str, function: Callable, **more) -> Provider:
        call = data.work(function)
        return Provider(
            name, _Graph(call, data.attach) if case.graph else call, data.prepare, **more
        )

    providers = [of("stock", F.cross_entropy, eager_stock=True)]
    if len(case.shape) == 4:
        other = "contiguous" if case.layout == "channels_last" else "channels_last"
        twin = Data(case, other, device)
        call = twin.work(F.cross_entropy)
        providers.append(Provider(f"stock {other}", call, twin.prepare, eager_stock=True))
    providers.append(of("torch.compile", compiled(F.cross_entropy)))
    if case.autotune:
        # Not plain max-autotune: its CUDA graphs would copy the logits into a place of their own.
        tuned = compiled(F.cross_entropy, "max-autotune-no-cudagraphs")
        providers.append(of("torch.compile max-autotune", tuned))
    providers += [
        of("own", _ours, kernels="own"),
        of("auto", _ours, kernels="auto"),
        of("auto compiled", compiled(_ours), kernels="auto"),
    ]
    if device == "cuda":
        if len(case.shape) == 2 and not case.options:
            providers.append(of("triton", _triton))
        providers += [of(name, function) for name, function in _peers(case).items()]
    return providers


def _counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    logits = math.prod(case.shape)
    rows, size = logits // case.shape[1], case.dtype.itemsize
    passes = 1 if case.work == "forward" else 2
    targets = logits * size if case.options.get("target") == "probability" else rows * 8
    losses = rows * size if case.options.get("reduction") == "none" else size
    return passes * logits * size + targets + losses, (4 if passes == 1 else 6) * logits


def rows(device: str) -> list[Row]:
    """All rows."""
    cases = CASES
    if device == "cuda":
        memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 1 << 40
        cases = gpu_cases(memory) + CASES
    return rows_of(OP, cases, _counted, _providers, device)

"""Rows and providers of lstm: whole sequences, packed ones, and cells.

**The work.** Modules of ``torch.nn`` and of ``dlkernels.nn`` with the same weights, in training
mode without dropout: the output, and ``torch.autograd.grad`` for input and weights with a random
upstream gradient of the output. Of a cell the new states; a "loop" steps a cell over a sequence in
Python, and takes the gradient of the last states. Forward rows run without a graph. A packed row
packs outside of the timed work, lengths uniform in [T/10, T]; "padded" beside it is the same batch
without lengths, by whose time and share of steps it is judged.

**The data.** Normal inputs, written anew before each sample, untimed, as by a layer before.

**The bytes.** Input, weights and upstream gradient read once, output and gradients written once.
**The flops**: 2·G·H·(I + P) for each row and direction, G gates, P the size of the state that goes
back, and 2·P·H of a projection; three times that with gradients.

Names are T x B x I x H: steps, batch, inputs, hidden; of cells B x I x H.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.measure import Provider, Row, compiled, rewritten, rows_of

OP = "lstm"
FORWARD, GRADIENT = "forward", "forward+gradient"
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


class Case(NamedTuple):
    """One line of the tables below. ``shape`` is (T, B, I, H), of a cell (1, B, I, H); a cell with
    more steps is a loop."""

    name: str
    shape: tuple[int, int, int, int]
    reason: str
    dtype: torch.dtype = torch.float32
    work: str = GRADIENT
    module: str = "LSTM"
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    packed: bool = False
    cell: bool = False
    calls: int = 1


def _named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


MIDDLE, LONG, TINY, WIDE = (
    (100, 32, 100, 256),
    (200, 64, 128, 128),
    (50, 1, 1, 16),
    (100, 64, 512, 512),
)

_WHOLE = [
    Case(_named(MIDDLE), MIDDLE, "a layer of the documented SentimentLSTM: weights that L2 holds"),
    Case(_named(LONG), LONG, "many short steps"),
    Case(_named(TINY), TINY, "the documented SineRNN's size: what calling costs", calls=10),
    Case(_named(WIDE), WIDE, "weights of 4 MB, which a core's own caches do not hold"),
    Case(
        f"{_named(MIDDLE)} 2 layers bidirectional",
        MIDDLE,
        "the documented SentimentLSTM: two directions side by side",
        layers=2,
        bidirectional=True,
    ),
    Case(f"{_named(MIDDLE)} proj 64", MIDDLE, "stock has it step by step alone", proj_size=64),
    Case(f"{_named(MIDDLE)} GRU", MIDDLE, "stock has it step by step alone", module="GRU"),
    Case(f"{_named(MIDDLE)} RNN", MIDDLE, "stock has it step by step alone", module="RNN"),
]

_FORWARD = [
    case._replace(name=f"{case.name} forward", work=FORWARD, reason="inference") for case in _WHOLE
]

_DTYPES = [
    case._replace(
        name=f"{case.name} bfloat16", dtype=torch.bfloat16, reason="half the bytes, sums in float32"
    )
    for case in (_WHOLE[0], _WHOLE[3], _FORWARD[0], _FORWARD[3])
]

_PACKED = [
    Case(
        f"{_named(shape)} {'packed' if packed else 'padded'}{suffix}",
        shape,
        "lengths uniform in [T/10, T]" if packed else "the same batch, its padding computed too",
        packed=packed,
        work=work,
    )
    for shape in ((100, 32, 100, 256), (1000, 32, 100, 256))
    for packed in (True, False)
    for suffix, work in (("", GRADIENT), (" forward", FORWARD))
]

_CELLS = [
    Case(
        f"{_named(shape[1:])} {module}{suffix}",
        shape,
        reason,
        module=module.removesuffix("Cell"),
        cell=True,
        work=work,
        calls=20,
    )
    for shape, reason in (
        ((1, 32, 100, 256), "a decoder's step"),
        ((1, 64, 128, 128), "a small step: the product is half of stock's time"),
        ((1, 128, 512, 512), "weights of 8 MB"),
    )
    for module in ("LSTMCell", "GRUCell", "RNNCell")
    for suffix, work in (("", GRADIENT), (" forward", FORWARD))
    if module == "LSTMCell" or shape[1] == 32
]

_LOOPS = [
    Case(
        f"{_named(shape)} LSTMCell loop",
        shape,
        "100 steps of a cell in Python, the weights' gradients summed over all of them",
        cell=True,
    )
    for shape in ((100, 32, 100, 256), (100, 64, 128, 128), (100, 128, 512, 512))
]

_DISPATCH = [
    Case(
        f"{_named(shape)} {module}{suffix}",
        shape,
        "what calling costs beside computing",
        module=module.removesuffix("Cell"),
        cell=module.endswith("Cell"),
        work=work,
        calls=50,
    )
    for module, shapes in (
        ("LSTMCell", ((1, 1, 16, 16), (1, 4, 32, 32), (1, 16, 64, 64))),
        ("RNNCell", ((1, 1, 16, 16), (1, 16, 64, 64))),
        ("LSTM", ((1, 1, 16, 16), (5, 1, 16, 16), (20, 4, 32, 32))),
        ("RNN", ((5, 1, 16, 16), (49, 1, 1, 16))),
    )
    for shape in shapes
    for suffix, work in (("", GRADIENT), (" forward", FORWARD))
]

_ON_GPU = [
    Case(
        f"{_named(shape)} {str(dtype).removeprefix('torch.')}{more}{suffix}",
        shape,
        reason,
        dtype=dtype,
        work=work,
        **settings,
    )
    for shape, dtype, more, settings, reason in (
        ((1024, 16, 768, 768), torch.bfloat16, "", {}, "FlashRNN's figure beside cuDNN's"),
        *(
            ((256, batch, hidden, hidden), dtype, "", {}, "cuDNN's product and pointwise by step")
            for hidden in (256, 512, 1024)
            for batch in (1, 16, 128)
            for dtype in (torch.bfloat16, torch.float32)
        ),
        (
            (256, 32, 512, 512),
            torch.bfloat16,
            " 2 layers bidirectional",
            {"layers": 2, "bidirectional": True},
            "two directions in one launch",
        ),
        ((256, 32, 512, 512), torch.bfloat16, " packed", {"packed": True}, "lengths in [T/10, T]"),
        ((256, 32, 512, 512), torch.bfloat16, " padded", {}, "the same batch, padding too"),
    )
    for suffix, work in (("", GRADIENT), (" forward", FORWARD))
]

CASES = _WHOLE + _FORWARD + _DTYPES + _PACKED + _CELLS + _LOOPS + _DISPATCH


def lengths_of(case: Case) -> list[int]:
    """Of a packed row's sequences, longest first; of one that is padded beside it, all T."""
    steps, batch = case.shape[:2]
    if not case.packed:
        return [steps] * batch
    generator = torch.Generator().manual_seed(steps)
    drawn = torch.randint(max(1, steps // 10), steps + 1, (batch,), generator=generator)
    return sorted(drawn.tolist(), reverse=True)


class Data:
    """The tensors of a case: a master copy of the input, and what is used."""

    def __init__(self, case: Case, device: str):
        torch.manual_seed(zlib.crc32(case.name.encode()))
        steps, batch, inputs, hidden = case.shape
        self.case = case
        self.wants_gradient = case.work != FORWARD
        master = torch.randn(steps, batch, inputs)
        self.batch_sizes = None
        if case.packed:
            packed = pack_padded_sequence(master, torch.tensor(lengths_of(case)))
            master, self.batch_sizes = packed.data, packed.batch_sizes
        self.master = master.to(device, case.dtype)
        arguments: dict = {}
        if not case.cell:
            arguments = {"num_layers": case.layers, "bidirectional": case.bidirectional}
        if case.proj_size:
            arguments["proj_size"] = case.proj_size
        name = f"{case.module}Cell" if case.cell else case.module
        self.stock = getattr(torch.nn, name)(inputs, hidden, **arguments)
        self.stock.to(device, case.dtype).requires_grad_(self.wants_gradient)
        import dlkernels

        self.ours = getattr(dlkernels.nn, name)(inputs, hidden, **arguments)
        self.ours.load_state_dict(self.stock.state_dict())
        self.ours.to(device, case.dtype).requires_grad_(self.wants_gradient)
        self.source = torch.empty_like(self.master).requires_grad_(self.wants_gradient)
        self.x = self.source
        with torch.no_grad():
            self.upstream = [torch.randn_like(y) for y in self.graded(self.run(self.stock))]

    def prepare(self) -> None:
        """The input as a layer before has just written it."""
        self.x = rewritten(self.source, self.master)

    def run(self, module: Callable) -> list[torch.Tensor]:
        """The output and the last states; of a cell the last states."""
        if self.case.cell:
            states = None
            for step in self.x.unbind(0):
                states = module(step, states)
            return list(states) if isinstance(states, tuple) else [states]
        first = self.x
        if self.batch_sizes is not None:
            first = PackedSequence(first, self.batch_sizes)
        output, last = module(first)
        output = output.data if isinstance(output, PackedSequence) else output
        return [output, *(last if isinstance(last, tuple) else (last,))]

    def graded(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those that the upstream gradients are of."""
        return results if self.case.cell else results[:1]

    def work(self, module: Callable, parameters: torch.nn.Module) -> Callable:
        """The timed call: the results and, if the case has some, the gradients."""
        weights = list(parameters.parameters())

        def forward():
            return tuple(self.run(module))

        def gradient():
            results = self.run(module)
            gradients = torch.autograd.grad(self.graded(results), [self.x, *weights], self.upstream)
            return *results, *gradients

        return gradient if self.wants_gradient else forward


def _providers(case: Case, device: str) -> list[Provider]:
    data = Data(case, device)

    def of(name: str, module: torch.nn.Module, call: Callable | None = None, **more) -> Provider:
        return Provider(name, data.work(call or module, module), data.prepare, **more)

    providers = [of("stock", data.stock, eager_stock=True)]
    if case.cell:  # torch.compile refuses stock's whole ones
        providers.append(of("torch.compile", data.stock, compiled(data.stock)))
    return [
        *providers,
        of("own", data.ours, kernels="own"),
        of("auto", data.ours, kernels="auto"),
    ]


def _counted(case: Case) -> tuple[int, int]:
    """Bytes and flops that the case needs at least."""
    _, batch, inputs, hidden = case.shape
    rows = sum(lengths_of(case))
    directions, state = 2 if case.bidirectional else 1, case.proj_size or hidden
    gates = GATES[case.module] * hidden
    weights = flops = 0
    for layer in range(case.layers):
        features = directions * state if layer else inputs
        product = gates * (features + state) + case.proj_size * hidden
        weights += directions * (product + 2 * gates)
        flops += 2 * rows * directions * product
    written = batch if case.cell else rows
    numbers = rows * inputs + weights + written * directions * state
    if case.work != FORWARD:
        numbers += written * directions * state + weights + rows * inputs
        flops *= 3
    return numbers * case.dtype.itemsize, flops


def rows(device: str) -> list[Row]:
    """All rows."""
    cases = _ON_GPU if device == "cuda" else CASES
    return rows_of(OP, cases, _counted, _providers, device)

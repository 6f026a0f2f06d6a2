"""The LSTM, the GRU and the RNN, whole and as cells, against torch's own: every switch, forward and
gradients, packed sequences, layouts, refusals, the rest of torch, threads."""

import copy
import inspect
import io
import itertools

import pytest
import torch
from compare import assert_no_worse
from graphs import check_second_backward
from layouts import every_second, expanded, offset, sliced_columns, transposed
from memory import assert_nothing_is_kept
from products import DTYPES
from threads import (
    assert_same_for_any_number_of_threads,
    assert_same_in_a_forked_child,
    assert_same_in_threads_at_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
from dlkernels import functional, nn

ops = torch.ops.dlkernels
pytestmark = pytest.mark.usefixtures("one_thread")

# id: class, its settings.
MODES = {
    "lstm": ("LSTM", {}),
    "projected": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
    "tanh": ("RNN", {"nonlinearity": "tanh"}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
}
CELLS = {
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
    "tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
}

# id: steps, batch, inputs, hidden. On each side of what a blocked product and a panel of hidden
# units switch on: vectors of 8, 16 and 32, tiles of 8 rows, blocks of 256 terms, one of each.
SHAPES = {
    "one_of_each": (1, 1, 1, 1),
    "one_step": (1, 5, 7, 9),
    "one_row": (13, 1, 5, 16),
    "one_feature": (11, 3, 1, 16),
    "below_a_panel": (5, 3, 4, 15),
    "a_panel": (6, 8, 16, 16),
    "a_panel_and_one": (6, 9, 17, 17),
    "two_panels_and_one": (4, 17, 10, 33),
    "three_panels_less_one": (3, 7, 21, 47),
    "a_block_of_terms_and_one": (3, 6, 257, 40),
    "wide": (4, 5, 30, 270),
    "many_steps": (70, 2, 3, 20),
    "many_rows": (3, 75, 12, 24),
    "more_rows_than_a_step_takes": (1, 130, 9, 20),
}

# id: lengths of the sequences, those of the packed tests.
LENGTHS = {
    "one": [4],
    "all_equal": [5, 5, 5],
    "ones": [1, 1, 1, 1],
    "a_long_one": [30, 2, 1],
    "steps_of_one": [6, 5, 4, 3, 2, 1],
    "ties": [9, 9, 6, 6, 6, 2, 2],
    "more_rows_than_a_tile": [12, 11, 11, 10, 9, 9, 8, 7, 7, 7, 4, 3, 3, 2, 2, 1, 1, 1],
}


def made(namespace, mode, *sizes, dtype=torch.float64, seed=0, **settings):
    """A layer of ``torch.nn`` or of ours, the same for the same seed; its projection is a third of
    a larger hidden size."""
    name, more = (CELLS if len(sizes) == 2 and settings.pop("cell", False) else MODES)[mode]
    more = dict(more)
    if "proj_size" in more and sizes[1] > 9:
        more["proj_size"] = sizes[1] // 3
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return getattr(namespace, name)(*sizes, **more, **settings).to(dtype)
    finally:
        torch.random.set_rng_state(generator)


def twins(mode, *sizes, **settings):
    return [made(namespace, mode, *sizes, **settings) for namespace in (torch.nn, nn)]


def states_of(layer, batch, dtype=torch.float64):
    """Random initial states, one or two."""
    rows = (layer.num_layers * (2 if layer.bidirectional else 1), batch)
    h = torch.randn(*rows, layer.proj_size or layer.hidden_size).to(dtype)
    if layer.mode != "LSTM":
        return [h]
    return [h, torch.randn(*rows, layer.hidden_size).to(dtype)]


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


def given(states):
    """As a module takes them."""
    return tuple(states) if len(states) > 1 else states[0] if states else None


def evaluate(layer, x, states=(), lengths=None, enforce_sorted=True, seed=None, upstream=None):
    """{name: output, last states, and the gradients of input, states and parameters}."""
    x = x.detach().requires_grad_()
    states = [state.detach().requires_grad_() for state in states]
    first = x
    if lengths is not None:
        first = pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=layer.batch_first, enforce_sorted=enforce_sorted
        )
    if seed is not None:
        torch.manual_seed(seed)
    output, last = layer(first, given(states))
    if lengths is not None:
        assert isinstance(output, PackedSequence)
        assert torch.equal(output.batch_sizes, first.batch_sizes)
        output = output.data
    results = [output, *as_tuple(last)]
    named = dict(zip(("output", "h_n", "c_n"), results, strict=False))
    if upstream is None:
        generator = torch.Generator().manual_seed(11)
        upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in results]
    leaves = {"input": x, **dict(zip(("hx", "cx"), states, strict=False))}
    leaves |= dict(layer.named_parameters())
    gradients = torch.autograd.grad(
        results, list(leaves.values()), [g.to(results[0].dtype) for g in upstream]
    )
    return named | {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_equal(ours, stock, what="", strides=True):
    assert list(ours) == list(stock)
    for name, want in stock.items():
        got = ours[name]
        if strides and not name.startswith("grad"):
            assert got.stride() == want.stride(), (what, name)
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{what} {name}: {text}"
        )


def away_from_the_kink(layer):
    """A ReLU's arguments far from 0, where rounding would decide on a gradient."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "weight" in name:
                weight.mul_(0.3)
            elif "ih" in name:
                weight.copy_(torch.tensor([3.0, -3.0]).repeat(len(weight))[: len(weight)])


def check(mode, draw, dtype, factor=2.0, draws=6, **settings):
    """Ours no worse than stock. ``draw(layer)`` gives the input, and states, lengths and so on."""
    results = []
    for seed in range(draws):
        sizes = settings["sizes"]
        rest = {name: value for name, value in settings.items() if name != "sizes"}
        stock, ours = twins(mode, *sizes, dtype=dtype, seed=seed, **rest)
        if mode == "relu":
            away_from_the_kink(stock)
            away_from_the_kink(ours)
        exact = copy.deepcopy(stock).double()
        x, *more = draw(stock)
        states, arguments = more[0] if more else [], more[1] if len(more) > 1 else {}
        results.append(
            [
                evaluate(layer, x.to(kind), [s.to(kind) for s in states], **arguments)
                for layer, kind in ((ours, dtype), (stock, dtype), (exact, torch.float64))
            ]
        )
    for name in results[0][0]:
        columns = ([draw[j][name] for draw in results] for j in range(3))
        assert_no_worse(name, *columns, factor)


# ------------------------------------------------------------------------------ against stock


@pytest.mark.parametrize("packed", [None, "sorted", "unsorted"])
@pytest.mark.parametrize("mode", MODES)
def test_every_combination_of_the_switches(mode, packed, own, poisoned):
    """Forward, last states and every gradient; the same dropout from the same seed."""
    for layers, bias, batch_first, dropout, bidirectional, with_states in itertools.product(
        (1, 2, 3), (True, False), (True, False), (0.0, 0.4), (True, False), (True, False)
    ):
        if dropout and layers == 1:
            continue
        settings = {
            "num_layers": layers, "bias": bias, "batch_first": batch_first, "dropout": dropout,
            "bidirectional": bidirectional,
        }  # fmt: skip
        stock, ours = twins(mode, 4, 5, **settings)
        batch, steps = 4, 3
        x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), 4).double()
        lengths = {None: None, "sorted": [3, 3, 2, 1], "unsorted": [2, 3, 1, 3]}[packed]
        states = states_of(stock, batch) if with_states else []
        for training in (True, False):
            results = [
                evaluate(layer.train(training), x, states, lengths, packed == "sorted", seed=3)
                for layer in (ours, stock)
            ]
            assert_equal(*results, f"{settings}, states {with_states}, training {training}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "mode"),
    [(s, m) for s in SHAPES for m in MODES if m != "projected" or SHAPES[s][3] > 3],
)
def test_shapes(shape, mode, dtype, own, poisoned):
    steps, batch, inputs, hidden = SHAPES[shape]
    check(
        mode,
        lambda layer: (torch.randn(steps, batch, inputs), states_of(layer, batch)),
        dtype,
        sizes=(inputs, hidden),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_layers_and_directions(mode, dtype, own, poisoned):
    check(
        mode,
        lambda layer: (torch.randn(7, 5, 6),),
        dtype,
        sizes=(6, 19),
        num_layers=2,
        bidirectional=True,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(lengths, mode, dtype, own, poisoned):
    """As the sequences one by one, which stock says."""
    lengths = LENGTHS[lengths]
    steps, batch = max(lengths), len(lengths)

    def draw(layer):
        return (
            torch.randn(steps, batch, 6),
            states_of(layer, batch),
            {"lengths": lengths},
        )

    check(mode, draw, dtype, sizes=(6, 18), bidirectional=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_sequence_is_its_sequences(mode, own):
    """Independently of stock: each alone, unpadded, gives the same."""
    lengths, x = [3, 7, 1, 5], torch.randn(7, 4, 6).double()
    layer = made(nn, mode, 6, 10, bidirectional=True)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, last = layer(packed)
    padded, _ = pad_packed_sequence(output)
    for at, length in enumerate(lengths):
        alone, alone_last = layer(x[:length, at : at + 1])
        torch.testing.assert_close(padded[:length, at : at + 1], alone)
        assert not padded[length:, at].any()
        for a, b in zip(as_tuple(last), as_tuple(alone_last), strict=True):
            torch.testing.assert_close(a[:, at : at + 1], b)


def batch_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {
    "batch_first": batch_first,
    "transposed": transposed,
    "sliced_columns": sliced_columns,
    "every_second": every_second,
    "steps_expanded": expanded,
    "batch_expanded": lambda x: x[:, :1].expand_as(x),
    "every_second_row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "backwards": lambda x: x.repeat_interleave(3, 0)[::3],
    "offset": offset,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout, mode, own, poisoned):
    stock, ours = twins(mode, 6, 11, bidirectional=True)
    x = LAYOUTS[layout](torch.randn(5, 4, 6).double())
    states = states_of(stock, 4)
    assert_equal(*(evaluate(layer, x, states) for layer in (ours, stock)))


@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_states_and_weights(mode, own, poisoned):
    stock, ours = twins(mode, 6, 11, bidirectional=True)
    x = torch.randn(5, 4, 6).double()
    for layout in (transposed, sliced_columns, every_second):
        states = [layout(state) for state in states_of(stock, 4)]
        for layer in (stock, ours):
            for name, weight in list(layer.named_parameters()):
                if weight.dim() == 2:
                    setattr(layer, name, torch.nn.Parameter(layout(weight.detach())))
        assert_equal(*(evaluate(layer, x, states) for layer in (ours, stock)))


def test_more_steps_than_a_part_of_the_products(own, poisoned):
    """Rows of all steps beyond any block."""
    check("lstm", lambda layer: (torch.randn(900, 3, 5),), torch.float32, 2.0, 1, sizes=(5, 16))


@pytest.mark.parametrize("mode", MODES)
def test_special_values_stay_in_their_sequence(mode, own, poisoned):
    """And what comes later does not reach back."""
    for value in (float("nan"), float("inf"), float("-inf")):
        for dtype in (torch.float32, torch.bfloat16):
            stock, ours = twins(mode, 6, 18, dtype=dtype)
            x = torch.randn(5, 4, 6).to(dtype)
            wanted, _ = ours(x)
            x[2, 1, 3] = value
            output, last = ours(x)
            others = [0, 2, 3]
            assert torch.equal(output[:, others], wanted[:, others])
            assert torch.equal(output[:2], wanted[:2])
            assert all(state[:, others].isfinite().all() for state in as_tuple(last))
            if value != value:
                assert output[2:, 1].isnan().all() and stock(x)[0][2:, 1].isnan().all()
            elif mode != "relu":
                torch.testing.assert_close(output, stock(x)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_saturated_gates(mode, own, poisoned):
    """Arguments at which exp overflows, of both signs: no NaN, and gradients of 0."""
    if mode == "relu":
        pytest.skip("it does not saturate")
    for dtype in DTYPES:
        stock, ours = twins(mode, 6, 18, dtype=dtype)
        x = 1e4 * torch.randn(3, 4, 6).to(dtype)
        results = [evaluate(layer, x) for layer in (ours, stock)]
        for name, got in results[0].items():
            assert got.isfinite().all(), name
            torch.testing.assert_close(got, results[1][name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch(mode, own, poisoned):
    stock, ours = twins(mode, 6, 5, num_layers=2, bidirectional=True)
    x = torch.randn(3, 0, 6).double()
    for layer in (ours, stock):
        output, last = layer(x)
        assert output.shape == (3, 0, 2 * (stock.proj_size or 5))
        assert all(state.shape[:2] == (4, 0) for state in as_tuple(last))
    gradients = torch.autograd.grad(ours(x)[0].sum(), list(ours.parameters()))
    assert not any(g.any() for g in gradients)
    if mode != "projected":
        cell = made(nn, mode, 6, 5, cell=True)
        output = as_tuple(cell(torch.randn(0, 6).double()))
        assert all(state.shape == (0, 5) for state in output)
        gradients = torch.autograd.grad(sum(s.sum() for s in output), list(cell.parameters()))
        assert not any(g.any() for g in gradients)


# ------------------------------------------------------------------------------------------ cells


def evaluate_cell(cell, x, states=()):
    x = x.detach().requires_grad_()
    states = [state.detach().requires_grad_() for state in states]
    results = as_tuple(cell(x, given(states)))
    leaves = {"input": x, **dict(zip(("hx", "cx"), states, strict=False))}
    leaves |= dict(cell.named_parameters())
    generator = torch.Generator().manual_seed(11)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in results]
    gradients = torch.autograd.grad(
        results, list(leaves.values()), [g.to(x.dtype) for g in upstream]
    )
    named = dict(zip(("h", "c"), results, strict=False))
    return named | {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}


def cell_states(mode, *size):
    return [torch.randn(*size) for _ in range(2 if mode == "lstm" else 1)]


@pytest.mark.parametrize("mode", CELLS)
def test_every_combination_of_a_cells_switches(mode, own, poisoned):
    for bias, batched, with_states in itertools.product((True, False), repeat=3):
        stock, ours = twins(mode, 4, 5, bias=bias, cell=True)
        rows = (3,) if batched else ()
        x = torch.randn(*rows, 4).double()
        states = [s.double() for s in cell_states(mode, *rows, 5)] if with_states else []
        results = [evaluate_cell(cell, x, states) for cell in (ours, stock)]
        assert_equal(*results, f"bias {bias}, batched {batched}, states {with_states}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_cells(shape, mode, dtype, own, poisoned):
    _, batch, inputs, hidden = SHAPES[shape]
    results = []
    for seed in range(8):
        stock, ours = twins(mode, inputs, hidden, dtype=dtype, seed=seed, cell=True)
        if mode == "relu":
            away_from_the_kink(stock)
            away_from_the_kink(ours)
        exact = copy.deepcopy(stock).double()
        x, states = torch.randn(batch, inputs).to(dtype), cell_states(mode, batch, hidden)
        results.append(
            [
                evaluate_cell(cell, x.to(kind), [s.to(dtype).to(kind) for s in states])
                for cell, kind in ((ours, dtype), (stock, dtype), (exact, torch.float64))
            ]
        )
    for name in results[0][0]:
        assert_no_worse(name, *([draw[j][name] for draw in results] for j in range(3)))


@pytest.mark.parametrize("mode", CELLS)
def test_layouts_of_a_cells_arguments(mode, own, poisoned):
    for layout in (transposed, sliced_columns, every_second, expanded, offset):
        stock, ours = twins(mode, 6, 11, cell=True)
        for cell in (stock, ours):
            for name in ("weight_ih", "weight_hh"):
                weight = getattr(cell, name).detach()
                setattr(cell, name, torch.nn.Parameter(layout(weight)))
        x = layout(torch.randn(7, 6).double())
        states = [layout(state.double()) for state in cell_states(mode, 7, 11)]
        # Those of stock's states are now and then the input's.
        results = (evaluate_cell(cell, x, states) for cell in (ours, stock))
        assert_equal(*results, strides=False)


@pytest.mark.parametrize("mode", CELLS)
def test_a_loop_of_cells_is_a_sequence(mode, own):
    layer, x = made(nn, mode, 6, 9), torch.randn(5, 4, 6).double()
    cell = made(nn, mode, 6, 9, cell=True)
    cell.load_state_dict({name[:-3]: value for name, value in layer.state_dict().items()})
    output, last = layer(x)
    state = None
    for t in range(5):
        state = cell(x[t], state)
        torch.testing.assert_close(as_tuple(state)[0], output[t])
    wanted = torch.autograd.grad(output[-1].sum(), list(layer.parameters()))
    ours = torch.autograd.grad(as_tuple(state)[0].sum(), list(cell.parameters()))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------- autograd


def functions_of(mode, packed=False, **settings):
    """(function of input, states and parameters, those) in float64."""
    layer = made(nn, mode, 2, 4, num_layers=2, bidirectional=True, **settings)
    names, states = [n for n, _ in layer.named_parameters()], states_of(layer, 2)

    def function(x, *rest):
        first = pack_padded_sequence(x, torch.tensor([3, 2])) if packed else x
        parameters = dict(zip(names, rest[len(states) :], strict=True))
        arguments = first, given(rest[: len(states)])
        output, last = torch.func.functional_call(layer, parameters, arguments)
        return output.data if packed else output, *as_tuple(last)

    x = torch.randn(3, 2, 2).double()
    leaves = [t.detach().requires_grad_() for t in (x, *states, *layer.parameters())]
    return function, leaves


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_and_gradgradcheck(mode, packed, own):
    function, leaves = functions_of(mode, packed)
    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradient(function, leaves, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("mode", CELLS)
def test_gradcheck_and_gradgradcheck_of_cells(mode, own):
    cell = made(nn, mode, 2, 3, cell=True)
    states = [s.double() for s in cell_states(mode, 4, 3)]
    names = [n for n, _ in cell.named_parameters()]

    def function(x, *rest):
        parameters = dict(zip(names, rest[len(states) :], strict=True))
        return torch.func.functional_call(cell, parameters, (x, given(rest[: len(states)])))

    x = torch.randn(4, 2).double()
    leaves = [t.detach().requires_grad_() for t in (x, *states, *cell.parameters())]
    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradient(function, leaves, check_batched_grad=True)


def test_a_second_derivative_of_tensors_that_depend_on_each_other(own):
    """The initial state is made of the input, and the input of the weight."""
    stock, ours = twins("lstm", 5, 5)
    results = []
    for layer in (ours, stock):
        x = torch.linspace(-1, 1, 30).double().view(3, 2, 5) * layer.weight_hh_l0[:5].sum()
        output, _ = layer(x, (x[:1].tanh(), x[1:2]))
        (gradient,) = torch.autograd.grad(
            output.square().sum(), layer.weight_hh_l0, create_graph=True
        )
        results.append([gradient, *torch.autograd.grad(gradient.sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


class Backwards(TorchDispatchMode):
    """Notes what the raw backward ops are asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (ops.lstm_backward.default, ops.lstm_cell_backward.default):
            self.asked.append(args[-3:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_only_the_wanted_gradients_are_computed(mode, wanted, own, poisoned):
    """Of input, states and weights; where one weight of several is frozen, it has none."""
    stock, ours = twins(mode, 6, 11)
    x, states = torch.randn(4, 3, 6).double(), states_of(stock, 3)
    results = []
    for layer in (ours, stock):
        of_input, of_states, of_weights = wanted
        leaves = [x.detach().requires_grad_(of_input)]
        leaves += [s.detach().requires_grad_(of_states) for s in states]
        for weight in layer.parameters():
            weight.requires_grad_(of_weights)
        layer.bias_ih_l0.requires_grad_(False)
        output, last = layer(leaves[0], given(leaves[1:]))
        leaves = [t for t in (*leaves, *layer.parameters()) if t.requires_grad]
        with Backwards() as backwards:
            results.append(torch.autograd.grad(output.sum() + last[0].sum(), leaves))
        if layer is ours:
            assert backwards.asked == [wanted]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_one_result_alone(mode, which, own, poisoned):
    if which == "c_n" and mode not in ("lstm", "projected"):
        pytest.skip("no cell state")
    results = []
    for layer in twins(mode, 6, 11, num_layers=2, bidirectional=True):
        output, last = layer(torch.ones(4, 3, 6).double())
        result = dict(zip(("output", "h_n", "c_n"), (output, *as_tuple(last)), strict=False))[which]
        results.append(
            torch.autograd.grad(result[-1].sum(), list(layer.parameters()), allow_unused=True)
        )
    for stock, ours in zip(*results, strict=True):
        zero = torch.zeros(()) if stock is None else stock
        torch.testing.assert_close(zero.double() if ours is None else ours, zero.expand_as(ours))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_second_backward(mode, dtype, own):
    layer = made(nn, mode, 6, 11, dtype=dtype)
    x = torch.randn(4, 3, 6).to(dtype).requires_grad_()
    output, _ = layer(x)
    check_second_backward(output, [x], torch.randn(output.shape).to(dtype), 0.5)


def test_gradients_are_not_shared(own):
    """The two biases have gradients of the same values in memory of their own."""
    layer = made(nn, "lstm", 6, 11)
    output, _ = layer(torch.randn(4, 3, 6).double())
    output.sum().backward(retain_graph=True)
    assert layer.bias_ih_l0.grad.data_ptr() != layer.bias_hh_l0.grad.data_ptr()
    once = [weight.grad.clone() for weight in layer.parameters()]
    output.sum().backward()
    for weight, before in zip(layer.parameters(), once, strict=True):
        torch.testing.assert_close(weight.grad, 2 * before)


def test_tied_weights(own):
    """Both directions share their weights: each gradient is the sum."""
    results = []
    for layer in twins("gru", 6, 11, bidirectional=True):
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            setattr(layer, f"{name}_reverse", getattr(layer, name))
        output, _ = layer(torch.linspace(-1, 1, 72).double().view(4, 3, 6))
        parameters = list(layer.parameters())
        assert len(parameters) == 4
        results.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("changed", ["input", "hx", "weight_ih_l0", "weight_hh_l0"])
def test_changes_in_place_are_refused(changed, own):
    layer = made(nn, "lstm", 6, 11)
    x = torch.randn(4, 3, 6).double().requires_grad_() * 1
    hx = [s.requires_grad_() * 1 for s in states_of(layer, 3)]
    output, _ = layer(x, tuple(hx))
    with torch.no_grad():
        ({"input": x, "hx": hx[0]}.get(changed, getattr(layer, changed, None))).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_upstream_gradients_as_they_come(own):
    """Of stride 0, as from a sum, and transposed."""
    stock, ours = twins("lstm", 6, 4)
    x = torch.randn(4, 4, 6).double()
    for upstream in (torch.ones(()).double().expand(4, 4, 4), torch.randn(4, 4, 4).double().mT):
        results = [
            torch.autograd.grad(layer(x)[0], list(layer.parameters()), upstream)
            for layer in (ours, stock)
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_no_gradient_work_where_none_is_needed(own):
    layer, x = made(nn, "lstm", 6, 11), torch.randn(4, 3, 6).double()
    cell = made(nn, "lstm", 6, 11, cell=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not layer(x)[0].requires_grad and not cell(x[0])[0].requires_grad
    for weight in (*layer.parameters(), *cell.parameters()):
        weight.requires_grad_(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x), cell(x[0])
    names = {event.key for event in profile.key_averages()}
    assert {"dlkernels::lstm_forward", "dlkernels::lstm_cell_forward"} <= names
    assert not names & {"_Layer", "_Cell"}


def raw_arguments(mode="lstm"):
    layer = made(nn, mode, 6, 11, bidirectional=True)
    states = states_of(layer, 3)
    states += [None] * (2 - len(states))
    weights = [weight.detach() for weight in layer.parameters()]
    return torch.randn(4, 3, 6).double(), None, *states, weights


def test_a_call_keeps_no_memory():
    x, _, hx, cx, weights = raw_arguments()
    arguments = x, None, hx, cx, weights
    output, _, _, gates, cells = ops.lstm_forward(*arguments, "lstm", True, True)
    assert_nothing_is_kept(lambda: ops.lstm_forward(*arguments, "lstm", True, True), 1000)
    assert_nothing_is_kept(
        lambda: ops.lstm_backward(
            output, None, None, *arguments, output, gates, cells, "lstm", True, True, True, True
        ),
        1000,
    )


def test_raw_ops_refuse_to_be_differentiated():
    x, *rest = raw_arguments()
    output, *_ = ops.lstm_forward(x.requires_grad_(), *rest, "lstm", True, True)
    with pytest.raises(NotImplementedError, match="raw op"):
        output.sum().backward()
    cell = made(nn, "lstm", 6, 11, cell=True)
    h, *_ = ops.lstm_cell_forward(x[0], *(rest[i][0] for i in (1, 2)), *cell.parameters(), "lstm",
                                  True, True)  # fmt: skip
    with pytest.raises(NotImplementedError, match="raw op"):
        h.sum().backward()


# ------------------------------------------------------------------------- the rest of torch


def public_op(mode):
    name = {"projected": "lstm", "tanh": "rnn", "relu": "rnn"}.get(mode, mode)
    return name, [mode] if name == "rnn" else []


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    name, nonlinearity = public_op(mode)
    x, _, hx, cx, weights = raw_arguments(mode)
    states = [hx] if cx is None else [hx, cx]
    raw = name if not nonlinearity else f"rnn_{mode}"
    for first, batch_sizes in ((x, None), (torch.randn(7, 6).double(), torch.tensor([3, 2, 2]))):
        leaves = [t.detach().requires_grad_() for t in (first, *states, *weights)]
        parameters = leaves[1 + len(states) :]
        torch.library.opcheck(
            getattr(ops, name).default,
            (leaves[0], batch_sizes, *leaves[1 : 1 + len(states)], parameters, *nonlinearity, True),
        )
        arguments = first, batch_sizes, hx, cx, weights
        for save in (True, False):
            torch.library.opcheck(ops.lstm_forward.default, (*arguments, raw, save, True))
        output, h_n, _, gates, cells = ops.lstm_forward(*arguments, raw, True, True)
        for wanted in ((True, True, True), (False, True, False), (True, False, True)):
            torch.library.opcheck(
                ops.lstm_backward.default,
                (output, h_n, None, *arguments, output, gates, cells, raw, True, *wanted),
            )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mode", CELLS)
def test_opcheck_of_cells(mode, bias):
    name, nonlinearity = public_op(mode)
    raw = name if not nonlinearity else f"rnn_{mode}"
    weights = [w.detach() for w in made(nn, mode, 6, 5, bias=bias, cell=True).parameters()]
    weights += [None] * (4 - len(weights))
    states = [s.double() for s in cell_states(mode, 3, 5)]
    x = torch.randn(3, 6).double()
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, *states, *weights)]
    torch.library.opcheck(getattr(ops, f"{name}_cell").default, (*leaves, *nonlinearity, True))
    hx, cx = states if len(states) == 2 else (*states, None)
    arguments = x, hx, cx, *weights
    h, c, gates = ops.lstm_cell_forward(*arguments, raw, True, True)
    torch.library.opcheck(ops.lstm_cell_forward.default, (*arguments, raw, True, True))
    torch.library.opcheck(
        ops.lstm_cell_backward.default,
        (h, None, *arguments, h, c, gates, raw, True, True, False, True),
    )
    rows = [torch.zeros(8, columns, dtype=torch.float64) for columns in (24, 16 + 5)]
    torch.library.opcheck(
        ops.lstm_cell_backward_step.default,
        (h, None, *arguments, h, c, gates, raw, True, True, False, *rows, 2),
    )
    sums = [w if w is None else torch.zeros_like(w) for w in weights]
    torch.library.opcheck(
        ops.lstm_cell_backward_weights.default, (*rows, 5, raw, True, False, *sums)
    )


@pytest.mark.parametrize("mode", MODES)
def test_compile(mode, own):
    """One graph without a break, one compilation for every number of steps and batch size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = made(nn, mode, 6, 11, num_layers=2, bidirectional=True, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for steps, batch in ((3, 4), (7, 5), (2, 9)):
        x, results = torch.randn(batch, steps, 6).double(), []
        for call in (compiled, layer):
            leaf = x.clone().requires_grad_()
            output, last = call(leaf)
            loss = output.square().sum() + sum(s.sum() for s in as_tuple(last))
            gradients = torch.autograd.grad(loss, [leaf, *layer.parameters()])
            results.append([output, *as_tuple(last), *gradients])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        graphs = graphs or list(counter.graphs)
        assert len(counter.graphs) == len(graphs), "compiled again for another size"
    name, _ = public_op(mode)
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    wanted = getattr(ops, name)
    assert targets.count(wanted) + targets.count(wanted.default) == 2


@pytest.mark.parametrize("mode", MODES)
def test_compile_without_gradients(mode, own):
    torch._dynamo.reset()
    layer = made(nn, mode, 6, 11, num_layers=2, dropout=0.5).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 6).double()
    states = states_of(layer, 4)
    with torch.no_grad():
        for arguments in ((x,), (x, given(states)), (x[:, 0],)):
            output, last = compiled(*arguments)
            wanted, wanted_last = layer(*arguments)
            assert torch.equal(output, wanted)
            torch.testing.assert_close(last, wanted_last, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_compile_of_packed_sequences(mode, own):
    torch._dynamo.reset()
    layer = made(nn, mode, 6, 11, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, lengths = torch.randn(5, 3, 6).double(), torch.tensor([2, 5, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    results = []
    for call in (compiled, layer):
        output, last = call(packed)
        gradients = torch.autograd.grad(output.data.square().sum(), list(layer.parameters()))
        results.append([output.data, *as_tuple(last), *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", CELLS)
def test_compile_of_cells(mode, own):
    torch._dynamo.reset()
    cell = made(nn, mode, 6, 11, cell=True)

    def loop(x):
        state = None
        for step in x.unbind(0):
            state = cell(step, state)
        return as_tuple(state)

    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(3, 4, 6).double(), []
    for call in (compiled, loop):
        states = call(x)
        gradients = torch.autograd.grad(sum(s.sum() for s in states), list(cell.parameters()))
        results.append([*states, *gradients])
    for at, (a, b) in enumerate(zip(*results, strict=True)):
        if at < len(states):
            assert torch.equal(a, b)
        else:  # a loop's are summed in another order
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_export(mode, own):
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    layer = made(nn, mode, 6, 11, num_layers=2).eval()
    program = torch.export.export(
        layer, (torch.randn(5, 3, 6).double(),), dynamic_shapes=({0: steps, 1: batch},)
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    name, _ = public_op(mode)
    assert targets.count(getattr(ops, name).default) == 2
    x = torch.randn(4, 7, 6).double()
    assert torch.equal(program.module()(x)[0], layer(x)[0])


def test_a_jit_trace_holds_torchs_ops_alone(own):
    layer, x = made(nn, "lstm", 6, 11), torch.randn(4, 3, 6).double()
    traced = torch.jit.trace(layer, x)
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert "aten::lstm" in kinds and not any("dlkernels" in kind for kind in kinds)
    torch.testing.assert_close(traced(x)[0], layer(x)[0])


@pytest.mark.parametrize("cell", [False, True], ids=["whole", "cell"])
@pytest.mark.parametrize("mode", CELLS)
def test_transforms(mode, cell, own):
    """func.grad and jvp as of stock's; vmap, for which stock has no rule, as a loop."""
    results, x = [], torch.randn(3, 4, 6).double()
    tangent = torch.randn(4, 6).double()
    for layer in twins(mode, 6, 5, cell=cell):
        parameters = dict(layer.named_parameters())

        def function(x, parameters=parameters, layer=layer):
            return as_tuple(torch.func.functional_call(layer, parameters, (x,)))[0]

        results.append(
            [
                torch.func.grad(lambda x, f=function: f(x).square().sum())(x[0]),
                *torch.func.jvp(function, (x[0],), (tangent,)),
            ]
        )
    looped = torch.stack([function(one) for one in x])
    torch.testing.assert_close(torch.func.vmap(function)(x), looped)
    of_each = torch.func.vmap(torch.func.grad(lambda x: function(x).square().sum()))(x)
    torch.testing.assert_close(of_each[0], results[1][0])
    for stock, ours in zip(*results, strict=True):
        assert stock.abs().max() > 0
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode, dtype, own):
    """The dtypes of stock, and its accuracy; gradients have their leaf's."""
    draws = []
    for seed in range(4):
        stock, ours = twins(mode, 12, 27, dtype=torch.float32, seed=seed)
        exact = copy.deepcopy(stock).double()
        x = torch.randn(6, 5, 12)
        row = []
        for layer in (ours, stock):
            try:
                with torch.autocast("cpu", dtype):
                    row.append(layer(x))
            except RuntimeError:  # oneDNN has no primitive for every processor
                assert layer is stock
                row.append(layer.to(dtype)(x.to(dtype)))
        draws.append([*row, exact(x.double())])
        output, last = row[0]
        assert output.dtype == row[1][0].dtype
        loss = output.float().square().sum() + as_tuple(last)[-1].float().sum()
        gradients = torch.autograd.grad(loss, list(ours.parameters()))
        assert all(g.dtype == torch.float32 for g in gradients)
    for at, name in enumerate(("output", "h_n", "c_n")):
        columns = [
            [(o, *as_tuple(s))[at] for o, s in (draw[j] for draw in draws)]
            for j in range(3)
            if at <= len(as_tuple(draws[0][0][1]))
        ]
        if columns:
            assert_no_worse(name, *columns)


@pytest.mark.parametrize("mode", CELLS)
def test_autocast_of_cells(mode, own):
    dtype = torch.bfloat16
    stock, ours = twins(mode, 6, 11, dtype=torch.float32, cell=True)
    for x_dtype, state_dtype in itertools.product((torch.float32, dtype), repeat=2):
        x = torch.randn(4, 6).to(x_dtype)
        states = given([s.to(state_dtype) for s in cell_states(mode, 4, 11)])
        with torch.autocast("cpu", dtype):
            results = [as_tuple(cell(x, states)) for cell in (ours, stock)]
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_compile_under_autocast(own):
    torch._dynamo.reset()
    layer = made(nn, "lstm", 6, 11, dtype=torch.float32)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(4, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x)[0], layer(x)[0])


def test_checkpoint(own):
    layer, x = made(nn, "lstm", 6, 11), torch.randn(4, 3, 6).double()
    ours, wanted = (
        torch.autograd.grad(f(x)[0].sum(), list(layer.parameters()))
        for f in (
            lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
            layer,
        )
    )
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------ choice


def test_dropout_is_reproducible(own):
    layer = made(nn, "lstm", 6, 11, num_layers=3, dropout=0.5)
    x = torch.randn(4, 3, 6).double()

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


def bad_calls(layer):
    x, states = torch.randn(4, 3, 6).double(), states_of(layer, 3)
    few = [s[:, :2] for s in states]
    yield "dims", (x[None],)
    yield "features", (x[..., :5],)
    yield "dtype", (x.float(),)
    yield "batch of states", (x, given(few))
    yield "dims of states", (x, given([s[0] for s in states]))
    yield "unbatched", (x[:, 0], given(states))
    yield "no steps", (x[:0],)
    yield "dtype of states", (x, given([s.float() for s in states]))
    packed = pack_padded_sequence(x, torch.tensor([4, 3, 3]))
    yield "packed features", (packed._replace(data=packed.data[:, :5]),)
    yield "packed states", (packed, given(few))


@pytest.mark.parametrize("mode", MODES)
def test_refusals_are_stocks(mode, own):
    stock, ours = twins(mode, 6, 11)
    names = []
    for name, arguments in bad_calls(stock):
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            stock(*arguments)
        with pytest.raises(wanted.type) as got:
            ours(*arguments)
        assert str(got.value) == str(wanted.value), name
        names.append(name)
    assert len(names) == 10


@pytest.mark.parametrize("mode", CELLS)
def test_refusals_of_cells_are_stocks(mode, own):
    stock, ours = twins(mode, 6, 11, cell=True)
    x, states = torch.randn(3, 6).double(), [s.double() for s in cell_states(mode, 3, 11)]
    for arguments in (
        (x[None],),
        (x[:, :5],),
        (x.float(),),
        (x, given([s[None] for s in states])),
        (x, given([s[:2] for s in states])),
        (x, given([s[:, :10] for s in states])),
    ):
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            stock(*arguments)
        with pytest.raises(wanted.type) as got:
            ours(*arguments)
        assert str(got.value) == str(wanted.value)
    if mode in ("tanh", "relu"):
        ours.nonlinearity = "gelu"
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
            ours(x)


def test_the_kernels_check_again():
    """Whatever Python let through: the shapes, dtypes and devices that a kernel reads by."""
    x, _, hx, cx, weights = raw_arguments()
    good = [x, None, hx, cx, weights, "lstm", True, True]
    bad = [
        (0, x[..., :5]),
        (0, x.float()),
        (0, x[0]),
        (2, hx[:, :2]),
        (2, hx[..., :10]),
        (3, cx[..., :10]),
        (3, None),
        (4, weights[:3]),
        (4, [weights[0][:-1], *weights[1:]]),
        (4, [*weights[:-1], weights[-1][:-1]]),
        (4, [w.float() for w in weights]),
        (5, "gelu"),
        (1, torch.tensor([3, 3])),
    ]
    for at, value in bad:
        arguments = list(good)
        arguments[at] = value
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            ops.lstm_forward(*arguments)
    packed = torch.randn(7, 6).double()
    for sizes in ([3, 2, 1], [2, 3, 2], [3, 4], [4, 3], [2, 2, 2, 1], []):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            ops.lstm_forward(packed, torch.tensor(sizes, dtype=torch.int64), *good[2:])
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        ops.lstm_forward(packed, torch.tensor([3, 2, 2], dtype=torch.int32), *good[2:])


def test_steps_without_rows(poisoned):
    """No packed sequence of torch's has them; the kernels do: a part of the products is empty."""
    layer = made(nn, "lstm", 33, 40)
    weights = [weight.detach() for weight in layer.parameters()]
    packed, states, results = torch.randn(6, 33).double(), states_of(layer, 3), []
    for tail in ([], [0] * 600):
        call = packed, torch.tensor([3, 2, 1, *tail]), *states, weights
        output, _, _, gates, cells = ops.lstm_forward(*call, "lstm", True, True)
        grads = torch.ones_like(output), None, None
        *others, of_weights = ops.lstm_backward(
            *grads, *call, output, gates, cells, "lstm", True, True, True, True
        )
        results.append([output, *others, *of_weights])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_which_kernel_is_recorded():
    layer, x = made(nn, "lstm", 100, 64), torch.randn(20, 8, 100).double()
    cell = made(nn, "gru", 100, 64, cell=True)
    for kernels, wanted in (("own", dlkernels.config.owner("cpu")), ("stock", "stock")):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            layer(x), cell(x[0])
        assert [(c.op, c.kernel) for c in choices] == [("lstm", wanted), ("gru_cell", wanted)]


def test_a_small_cell_is_stocks():
    """By its multiply-adds, of which fewer pay for a gradient."""
    ours = dlkernels.config.owner("cpu")
    for batch, size, graded, wanted in (
        (2, 64, False, "stock"),
        (2, 16, True, "stock"),
        (20, 64, False, "stock"),
        (2, 64, True, ours),
        (400, 64, False, ours),
    ):
        cell = made(nn, "lstm", size, size, dtype=torch.float32, cell=True).requires_grad_(graded)
        with dlkernels.config.recording() as choices:
            cell(torch.randn(batch, size))
        assert [choice.kernel for choice in choices] == [wanted]


def test_own_has_none_for_complex_numbers(own):
    cell = torch.randn(20, 4, dtype=torch.complex64), torch.randn(20, 5, dtype=torch.complex64)
    state = torch.zeros(2, 5, dtype=torch.complex64)
    with pytest.raises(NotImplementedError, match="no kernel of ours: no kernel for"):
        functional.lstm_cell(torch.zeros(2, 4, dtype=torch.complex64), (state, state), *cell)


def test_functions_take_torchs_arguments(own):
    stock = made(torch.nn, "lstm", 6, 11, num_layers=2, bidirectional=True)
    x, states, weights = torch.randn(4, 3, 6).double(), states_of(stock, 3), stock._flat_weights
    settings = True, 2, 0.0, False, True, False
    for name, hx, rows in (("lstm", states, 4), ("gru", states[0], 3), ("rnn_tanh", states[0], 1)):
        params = [w[: rows * 11] for w in weights]
        ours, wanted = (
            getattr(module, name)(x, hx, params, *settings) for module in (functional, torch)
        )
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)
    for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
        rows = {"l": 44, "g": 33, "r": 11}[name[0]]
        state = states[0][0]
        hx = (state, state) if rows == 44 else state
        weights_of = [torch.randn(rows, n).double() for n in (6, 11)]
        for biases in ([], [torch.randn(rows).double() for _ in range(2)]):
            ours, wanted = (
                getattr(module, name)(x[0], hx, *weights_of, *biases)
                for module in (functional, torch)
            )
            for a, b in zip(as_tuple(ours), as_tuple(wanted), strict=True):
                torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------- threads


def all_results(layer, packed=False):
    """Of the same input for the same layer; a thread draws nothing from what all of them share."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 13, 30, generator=generator).to(layer.weight_ih_l0.dtype)
    lengths = [9, 9, 8, 7, 7, 6, 5, 5, 4, 3, 2, 1, 1] if packed else None
    return list(evaluate(layer, x, lengths=lengths).values())


def layer_of(mode, dtype=torch.float32):
    return made(nn, mode, 30, 70, dtype=dtype, num_layers=2, bidirectional=True)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_for_any_number_of_threads(mode, packed, own):
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_for_any_number_of_threads(all_results, layer_of(mode, dtype), packed)


@pytest.mark.parametrize("mode", CELLS)
def test_the_same_bits_of_cells_for_any_number_of_threads(mode, own):
    cell = made(nn, mode, 130, 170, dtype=torch.float32, cell=True)
    x = torch.randn(37, 130)
    assert_same_for_any_number_of_threads(lambda: list(evaluate_cell(cell, x).values()))


def test_in_threads_at_once(own):
    assert_same_in_threads_at_once(
        all_results, [(layer_of("lstm"),), (layer_of("gru"),), (layer_of("lstm"), True)]
    )


def test_in_a_forked_child(own):
    torch.set_num_threads(2)
    assert_same_in_a_forked_child(all_results, layer_of("lstm"))


# ----------------------------------------------------------------------------------------- modules


def saved_and_loaded(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_modules_are_stocks(mode):
    """Constructor, attributes, repr, keys and weights; no subclass, which compile would refuse."""
    settings = {"num_layers": 2, "bias": False, "dropout": 0.1, "bidirectional": True}
    stock, ours = twins(mode, 5, 7, **settings)
    assert isinstance(ours, torch.nn.RNNBase) and not isinstance(ours, type(stock))
    parameters = [inspect.signature(type(layer)).parameters for layer in (ours, stock)]
    assert parameters[0] == parameters[1]
    assert repr(ours) == repr(stock) and vars(ours).keys() == vars(stock).keys()
    assert list(ours.state_dict()) == list(stock.state_dict())
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    stock.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True))
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [
        [w.shape for w in ws] for ws in stock.all_weights
    ]


def test_constructors_refuse_what_stocks_do():
    for name, arguments, settings in (
        ("LSTM", (3, 4), {"proj_size": 4}),
        ("LSTM", (0, 4), {}),
        ("LSTM", (3, 4), {"dropout": 2.0}),
        ("GRU", (3, 4), {"proj_size": 2}),
        ("RNN", (3, 4), {"proj_size": 2}),
        ("RNN", (3, 4), {"nonlinearity": "gelu"}),
        ("RNN", (3, 4, 1, "gelu"), {}),
        ("GRU", (3, 4), {"bias": 1}),
    ):
        with pytest.raises((ValueError, TypeError)) as wanted:
            getattr(torch.nn, name)(*arguments, **settings)
        with pytest.raises(wanted.type) as got:
            getattr(nn, name)(*arguments, **settings)
        assert str(got.value) == str(wanted.value)
    assert nn.RNN(3, 4, 2, "relu", False).mode == "RNN_RELU"


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: saved_and_loaded(m, weights_only=False)]
)
@pytest.mark.parametrize("cell", [False, True], ids=["whole", "cell"])
@pytest.mark.parametrize("mode", CELLS)
def test_copies(mode, cell, again, own):
    layer = made(nn, mode, 6, 11, cell=cell)
    copied, x = again(layer), torch.randn(3, 6).double()
    assert type(copied) is type(layer)
    assert not {id(w) for w in copied.parameters()} & {id(w) for w in layer.parameters()}
    torch.testing.assert_close(copied(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_change(mode, own):
    """Through ``.data``, by assignment, by ``to`` and by functional_call: the last ones count."""
    layer, x = made(nn, mode, 6, 11), torch.randn(4, 3, 6).double()
    before = layer(x)[0]
    layer.weight_hh_l0.data.mul_(2)
    doubled = layer(x)[0]
    assert not torch.equal(before, doubled)
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach() / 2)
    assert torch.equal(layer(x)[0], before)
    replaced = {"weight_hh_l0": 2 * layer.weight_hh_l0.detach()}
    assert torch.equal(torch.func.functional_call(layer, replaced, (x,))[0], doubled)
    assert torch.equal(layer(x)[0], before)
    assert layer.float()(x.float())[0].dtype == torch.float32


def test_parametrized_weights(own):
    results = []
    for layer in twins("lstm", 6, 11):
        torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        output, _ = layer(torch.linspace(-1, 1, 72).double().view(4, 3, 6))
        results.append([output, *torch.autograd.grad(output.sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_swap(own):
    model = torch.nn.ModuleDict(
        {name: getattr(torch.nn, name)(6, 11) for name in ("LSTM", "GRU", "RNN")}
        | {
            f"{name}Cell": getattr(torch.nn, f"{name}Cell")(6, 11)
            for name in ("LSTM", "GRU", "RNN")
        }
    )
    x, keys = torch.randn(4, 6), list(model.state_dict())
    wanted = {name: module(x) for name, module in model.items()}
    dlkernels.swap(model, strict=True)
    assert list(model.state_dict()) == keys
    for name, module in model.items():
        assert type(module) is getattr(nn, name)
        torch.testing.assert_close(module(x), wanted[name])
    assert all(row.new == f"dlkernels.nn.{name}" for row, name in
               zip(dlkernels.report(model), model, strict=True))  # fmt: skip
    rows = dlkernels.verify(model["LSTM"], torch.randn(20, 40, 6), strict=True)
    assert {"output.0", "output.1", "output.2", "grad input", "grad weight_hh_l0"} <= {
        row.what for row in rows
    }
    dlkernels.unswap(model)
    assert all(type(module) is getattr(torch.nn, name) for name, module in model.items())


INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if issubclass(info.module_cls, (torch.nn.RNNBase, torch.nn.RNNCellBase))
}


def results_of(output):
    return [
        t.data if isinstance(t, PackedSequence) else t
        for t in torch.utils._pytree.tree_leaves(
            output, is_leaf=lambda t: isinstance(t, PackedSequence)
        )
    ]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", INFOS)
def test_torchs_samples_of_modules(name, training, own):
    """ModuleInfo's: forward and gradients, inputs with gaps, in place of one another's weights,
    pickled, made on another device, in float32 and float64, checked twice."""
    info = INFOS[name]
    seen = 0
    for dtype in (torch.float32, torch.float64):
        samples = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
        for sample in samples:
            made_with, called_with = sample.constructor_input, sample.forward_input
            modules = [
                getattr(space, name)(*made_with.args, **made_with.kwargs).to(dtype).train(training)
                for space in (torch.nn, nn)
            ]
            stock, ours = modules
            ours.load_state_dict(stock.state_dict())
            assert repr(ours) == repr(stock)
            gaps = torch.utils._pytree.tree_map_only(
                torch.Tensor,
                lambda t: (
                    every_second(t.detach()).requires_grad_(t.requires_grad)
                    if t.is_floating_point() and t.dim()
                    else t
                ),
                (called_with.args, called_with.kwargs),
            )
            for args, kwargs in ((called_with.args, called_with.kwargs), gaps):
                results = []
                for module in (*modules, saved_and_loaded(ours, weights_only=False)):
                    torch.manual_seed(0)
                    outputs = results_of(module(*args, **kwargs))
                    loss = sum(t.sum() for t in outputs)
                    gradients = torch.autograd.grad(loss, list(module.parameters()))
                    results.append([*outputs, *gradients])
                for a, b, c in zip(*results, strict=True):
                    torch.testing.assert_close(b, a)
                    assert torch.equal(b, c)
            meta = getattr(nn, name)(*made_with.args, **made_with.kwargs, device="meta")
            assert all(p.is_meta for p in meta.parameters())
            seen += 1
    assert seen >= 4

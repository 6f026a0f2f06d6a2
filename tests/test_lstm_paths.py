"""lstm's raw ops on shapes that the GPU's kernels cut in different ways.

tests/test_emulated.py runs this file on the kernels of csrc/cuda; here the same shapes hold the
library that is loaded.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from compare import assert_no_worse
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import dlkernels  # noqa: F401

ops = torch.ops.dlkernels
MODES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES["float64"] = torch.float64
LEAST = 300  # numbers of a state that a judgement needs


class Path(NamedTuple):
    steps: int
    batch: int
    inputs: int
    hidden: int
    directions: int = 1
    bias: bool = True
    packed: bool = False
    projected: int = 0


# Which path of the GPU's kernels each is there for. A piece is 32 numbers of 16 bits, 16 of 32; a
# block has a multiple of 8 hidden units, a group up to 32 sequences at once.
PATHS = {
    "one_block": Path(3, 2, 3, 8),
    "one_unit": Path(2, 3, 2, 1),
    "units_left_over": Path(3, 5, 4, 13, directions=2),
    "several_blocks": Path(3, 9, 5, 40),
    "pieces_left_over": Path(3, 4, 3, 100),
    "weights_in_shared_memory": Path(2, 3, 4, 150),
    "many_sequences": Path(2, 37, 3, 16),
    "many_sequences_packed": Path(3, 35, 5, 16, directions=2, packed=True),
    "packed": Path(5, 6, 3, 20, packed=True),
    "packed_without_bias": Path(5, 3, 8, 24, directions=2, bias=False, packed=True),
    "one_step": Path(1, 4, 6, 24, directions=2),
    "several_groups": Path(3, 70, 2, 48),
    "projected": Path(3, 4, 5, 12, projected=7),
    "projected_packed": Path(4, 5, 3, 8, directions=2, projected=5, packed=True),
}
paths = pytest.mark.parametrize("path", PATHS)
modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    pass


def lengths_of(path):
    """Of sorted sequences: some of one length, the first of all steps."""
    lengths = torch.randint(1, path.steps + 1, (path.batch,))
    lengths[0] = path.steps
    return lengths.sort(descending=True).values


def batch_sizes_of(path):
    lengths = lengths_of(path)
    return torch.tensor([int((lengths > t).sum()) for t in range(path.steps)], device="cpu")


class Problem(NamedTuple):
    module: nn.Module
    input: torch.Tensor
    batch_sizes: torch.Tensor | None
    hx: torch.Tensor
    cx: torch.Tensor | None
    weights: list[torch.Tensor]
    grads: list[torch.Tensor | None]  # of output, h_n and c_n


def drawn(mode, path, dtype):
    """All in ``dtype``, made in float64: exact() has the same numbers."""
    size = path.projected or path.hidden
    options = {"bias": path.bias, "bidirectional": path.directions == 2, "dtype": dtype}
    if mode.startswith("rnn"):
        options["nonlinearity"] = mode.removeprefix("rnn_")
    if path.projected:
        options["proj_size"] = path.projected
    module = MODES[mode](path.inputs, path.hidden, **options)
    batch_sizes = batch_sizes_of(path) if path.packed else None
    shape = (int(batch_sizes.sum()),) if path.packed else (path.steps, path.batch)

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    hx = make(path.directions, path.batch, size)
    cx = make(path.directions, path.batch, path.hidden) if mode == "lstm" else None
    grads = [make(*shape, path.directions * size), torch.randn_like(hx)]
    grads.append(None if cx is None else torch.randn_like(cx))
    weights = [w.detach() for w in module._flat_weights]
    return Problem(module, make(*shape, path.inputs), batch_sizes, hx, cx, weights, grads)


def ours(mode, p, want=(True, True, True)):
    """Output, states; gradients of input, states and weights."""
    state = (p.hx, p.cx, p.weights, mode)
    output, h_n, c_n, gates, cells = ops.lstm_forward(p.input, p.batch_sizes, *state, True, True)
    results = ops.lstm_backward(
        *p.grads, p.input, p.batch_sizes, *state[:3], output, gates, cells, mode, True, *want
    )
    grad_input, grad_hx, grad_cx, grad_weights = results
    lstm = p.cx is not None
    return {
        "output": output,
        "h_n": h_n,
        **({"c_n": c_n} if lstm else {}),
        "grad input": grad_input,
        "grad hx": grad_hx,
        **({"grad cx": grad_cx} if lstm else {}),
        **{f"grad {i} of weights": g for i, g in enumerate(grad_weights)},
    }


def stock(p, dtype):
    module = copy.deepcopy(p.module).to(dtype)

    def leaf(x):
        return None if x is None else x.detach().to(dtype).requires_grad_()

    input, hx, cx = leaf(p.input), leaf(p.hx), leaf(p.cx)
    given = input if p.batch_sizes is None else PackedSequence(input, p.batch_sizes)
    output, state = module(given, hx if cx is None else (hx, cx))
    output = output if p.batch_sizes is None else output.data
    outputs = [output, *(state if cx is not None else (state,))]
    leaves = [input, hx, *([] if cx is None else [cx]), *module._flat_weights]
    upstream = [g.to(dtype) for g in p.grads if g is not None]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    names = ["output", "h_n", "c_n"][: len(outputs)]
    names += ["grad input", "grad hx", *([] if cx is None else ["grad cx"])]
    names += [f"grad {i} of weights" for i in range(len(module._flat_weights))]
    return dict(zip(names, [*outputs, *gradients], strict=True))


def check(mode, path, dtype):
    """Of a ReLU in 16 bits the forward alone: its masks flip."""
    draws = []
    for _ in range(4 + min(LEAST // (path.batch * path.hidden), 60)):
        p = drawn(mode, path, dtype)
        draws.append((ours(mode, p), stock(p, dtype), stock(p, torch.float64)))
    masked = mode == "rnn_relu" and dtype.itemsize == 2
    for name in draws[0][1]:
        if masked and name.startswith("grad"):
            continue
        # The largest error of few draws is luck: 2.5 in place of 2.
        assert_no_worse(name, *([draw[i][name] for draw in draws] for i in range(3)), factor=2.5)


@modes
@dtypes
@paths
def test_training(path, dtype, mode):
    shape = PATHS[path]
    if shape.projected and mode != "lstm":
        shape = shape._replace(projected=0)
    check(mode, shape, dtype)


def test_many_packed_steps():
    """Their offsets are parameters of several launches."""
    p = drawn("lstm", Path(250, 2, 3, 8, packed=True), torch.float32)
    arguments = (p.input, p.batch_sizes, p.hx, p.cx, p.weights, "lstm")
    output, *_ = ops.lstm_forward(*arguments, False, True)
    others = (stock(p, dtype)["output"] for dtype in (torch.float32, torch.float64))
    assert_no_worse("output", output, *others, factor=2.5)


@pytest.mark.parametrize("given", ["output", "h_n", "c_n"])
def test_one_gradient_given(given):
    """The others are none."""
    p = drawn("lstm", PATHS["packed_without_bias"], torch.float32)
    names = ["output", "h_n", "c_n"]
    some = [g if name == given else None for name, g in zip(names, p.grads, strict=True)]
    none = [
        g if name == given else torch.zeros_like(g) for name, g in zip(names, p.grads, strict=True)
    ]
    got, wanted = ours("lstm", p._replace(grads=some)), ours("lstm", p._replace(grads=none))
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


@modes
def test_wanted(mode):
    p = drawn(mode, PATHS["units_left_over"], torch.float32)
    every = ours(mode, p)
    for of_input, of_states, of_weights in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        got = ours(mode, p, (bool(of_input), bool(of_states), bool(of_weights)))
        for name, x in every.items():
            if not name.startswith("grad"):
                continue
            kind = of_weights if "weights" in name else of_input if "input" in name else of_states
            if kind:
                assert torch.equal(got[name], x), name
            else:
                assert name not in got or got[name].shape == (0,), name


@modes
def test_without_saving(mode):
    p = drawn(mode, PATHS["units_left_over"], torch.float32)
    arguments = (p.input, p.batch_sizes, p.hx, p.cx, p.weights, mode)
    saved, bare = (ops.lstm_forward(*arguments, save, True) for save in (True, False))
    for a, b in zip(saved[:3], bare[:3], strict=True):
        assert torch.equal(a, b)
    assert [x.shape for x in bare[3:]] == [(0,), (0,)]
    is_lstm = mode == "lstm"
    assert bare[2].shape == (p.cx.shape if is_lstm else (0,))


@modes
@pytest.mark.parametrize("batch_first", [False, True])
def test_strides_of_the_input(batch_first, mode):
    p = drawn(mode, PATHS["several_blocks"], torch.float32)
    wanted = ours(mode, p)
    x = p.input.transpose(0, 1).contiguous().transpose(0, 1) if batch_first else p.input
    if not batch_first:
        x = torch.stack([x, x], -1)[..., 0]
    weights = [w.t().contiguous().t() if w.dim() == 2 else w for w in p.weights]
    hx = p.hx.transpose(1, 2).contiguous().transpose(1, 2)
    got = ours(mode, p._replace(input=x, weights=weights, hx=hx))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


@modes
@pytest.mark.parametrize("steps, batch", [(0, 3), (3, 0)])
def test_nothing_to_do(steps, batch, mode):
    p = drawn(mode, Path(steps, batch, 4, 8, directions=2), torch.float32)
    got = ours(mode, p)
    assert got["output"].shape == (steps, batch, 16)
    assert torch.equal(got["h_n"], p.hx) and torch.equal(got["grad hx"], p.grads[1])
    if mode == "lstm":
        assert torch.equal(got["c_n"], p.cx) and torch.equal(got["grad cx"], p.grads[2])
    for i, w in enumerate(p.weights):
        assert torch.equal(got[f"grad {i} of weights"], torch.zeros_like(w))


@modes
def test_the_same_bits(mode):
    p = drawn(mode, PATHS["many_sequences_packed"], torch.float32)
    first, second = ours(mode, p), ours(mode, p)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_values_that_are_none():
    """A NaN stays in its sequence."""
    p = drawn("lstm", PATHS["several_blocks"], torch.float32)
    p.input[0, 4] = torch.nan
    got = ours("lstm", p)
    for name in ("output", "h_n", "c_n", "grad input", "grad hx", "grad cx"):
        rows = got[name].isnan().flatten(2).all(-1).any(0)
        assert rows.tolist() == [row == 4 for row in range(9)], name
        assert not got[name][:, [row for row in range(9) if row != 4]].isnan().any(), name


REFUSED = {
    "input": ({"input": torch.ones(3, 8)}, "expected input with 3 dimensions"),
    "dtype": ({"hx": torch.ones(1, 9, 40).double()}, "hx of dtype"),
    "hx": ({"hx": torch.ones(1, 8, 40)}, "8"),
    "weights": ({"weights": []}, "2 to 5 weights"),
    "w_ih": ({"input": torch.ones(3, 9, 6)}, r"expected w\w+ of shape"),
    "sizes": (
        {"input": torch.ones(19, 5), "batch_sizes": torch.tensor([9, 10], device="cpu")},
        "do not grow",
    ),
    "rows": (
        {"input": torch.ones(5, 5), "batch_sizes": torch.tensor([9, 1], device="cpu")},
        "10 rows of input",
    ),
    "cx": ({"cx": None}, "expected cx of an lstm, and only of one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changed, message = REFUSED[case]
    p = drawn("lstm", PATHS["several_blocks"], torch.float32)._replace(**changed)
    with pytest.raises(RuntimeError, match=message):
        ops.lstm_forward(p.input, p.batch_sizes, p.hx, p.cx, p.weights, "lstm", True, True)


# ------------------------------------------------------------------------------------------- cells


class Cell(NamedTuple):
    batch: int
    inputs: int
    hidden: int
    bias: bool = True


SIZES = {
    "small": Cell(3, 4, 5),
    "without_bias": Cell(2, 3, 7, bias=False),
    "blocks": Cell(9, 6, 67),
    "one": Cell(1, 1, 1),
}


def cell_results(mode, size, dtype):
    """(ours, stock's, exact)"""
    options = {"nonlinearity": mode.removeprefix("rnn_")} if mode.startswith("rnn") else {}
    module = CELLS[mode](size.inputs, size.hidden, size.bias, dtype=dtype, **options)
    is_lstm = mode == "lstm"

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    input, hx = make(size.batch, size.inputs), make(size.batch, size.hidden)
    cx = torch.randn_like(hx) if is_lstm else None
    grads = [torch.randn_like(hx), torch.randn_like(hx) if is_lstm else None]
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh]
    given = [None if w is None else w.detach() for w in weights]
    h, c, gates = ops.lstm_cell_forward(input, hx, cx, *given, mode, True, True)
    gradients = ops.lstm_cell_backward(
        *grads, input, hx, cx, *given, h, c, gates, mode, True, True, True, True
    )

    def by_torch(dtype):
        twin = copy.deepcopy(module).to(dtype)
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (input, hx, cx)]
        x, h, c = leaves
        outputs = twin(x, (h, c)) if is_lstm else (twin(x, h),)
        weights = [twin.weight_ih, twin.weight_hh, twin.bias_ih, twin.bias_hh]
        leaves = [x for x in (*leaves, *weights) if x is not None]
        upstream = [g.to(dtype) for g in grads if g is not None]
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    exists = [True, True, is_lstm, True, True, size.bias, size.bias]
    made = [h, c] if is_lstm else [h]
    made += [g for g, there in zip(gradients, exists, strict=True) if there]
    return made, by_torch(dtype), by_torch(torch.float64)


@modes
@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_cells(size, dtype, mode):
    size = SIZES[size]
    draws = [
        cell_results(mode, size, dtype) for _ in range(4 + LEAST // (size.batch * size.hidden))
    ]
    outputs = 2 if mode == "lstm" else 1
    for i in range(len(draws[0][0])):
        if i >= outputs and mode == "rnn_relu" and dtype.itemsize == 2:
            break  # masks flip
        assert_no_worse(f"result {i}", *([draw[k][i] for draw in draws] for k in range(3)))


def test_an_empty_cell():
    p = drawn("lstm", Path(1, 0, 4, 8), torch.float32)
    w_ih, w_hh, b_ih, b_hh = p.weights
    given = (p.input[0], p.hx[0], p.cx[0], w_ih, w_hh, b_ih, b_hh)
    h, c, gates = ops.lstm_cell_forward(*given, "lstm", True, True)
    assert h.shape == c.shape == (0, 8) and gates.shape == (0, 32)
    gradients = ops.lstm_cell_backward(h, c, *given, h, c, gates, "lstm", True, True, True, True)
    assert [g.shape for g in gradients] == [x.shape for x in given]
    assert not any(g.any() for g in gradients[3:])


@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_what_a_cell_wants(mode):
    p = drawn(mode, Path(1, 3, 4, 8), torch.float32)
    cx = None if p.cx is None else p.cx[0]
    given = (p.input[0], p.hx[0], cx, *p.weights)
    results = ops.lstm_cell_forward(*given, mode, True, True)
    grads = [torch.randn_like(p.hx[0]), None]
    every = ops.lstm_cell_backward(*grads, *given, *results, mode, True, True, True, True)
    for want in [(True, False, False), (False, True, False), (False, False, True)]:
        got = ops.lstm_cell_backward(*grads, *given, *results, mode, True, *want)
        for i, kind in enumerate([0, 1, 1, 2, 2, 2, 2]):
            wanted = every[i] if want[kind] else every[i].new_empty(0)
            assert torch.equal(got[i], wanted), i

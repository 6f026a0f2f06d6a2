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
LEAST = 500  # numbers of a state that a judgement needs


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
    return torch.tensor([int((lengths > t).sum()) for t in range(path.steps)])


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
    for _ in range(4 + LEAST // (path.batch * path.hidden)):
        p = drawn(mode, path, dtype)
        draws.append((ours(mode, p), stock(p, dtype), stock(p, torch.float64)))
    masked = mode == "rnn_relu" and dtype.itemsize == 2
    for name in draws[0][1]:
        if masked and name.startswith("grad"):
            continue
        assert_no_worse(name, *([draw[i][name] for draw in draws] for i in range(3)))


@modes
@dtypes
@paths
def test_training(path, dtype, mode):
    shape = PATHS[path]
    if shape.projected and mode != "lstm":
        shape = shape._replace(projected=0)
    check(mode, shape, dtype)

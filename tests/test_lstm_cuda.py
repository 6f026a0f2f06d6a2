"""lstm on a GPU: the modules at networks' sizes, and what a CPU does not have.

Paths and edges are test_lstm_paths.py's, by `-p tests.on_cuda`.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import assert_no_worse
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# steps, batch, inputs, hidden, layers, directions: one cluster, a grid with its own barrier, many
# sequences, both directions at once, weights that do not fit.
SHAPES = {
    "cluster": (50, 16, 64, 256, 1, 1),
    "grid": (40, 16, 768, 768, 1, 1),
    "one_sequence": (60, 1, 40, 512, 1, 1),
    "odd": (23, 13, 19, 301, 1, 2),
    "many_sequences": (20, 128, 128, 512, 1, 1),
    "layers": (30, 32, 100, 256, 2, 2),
    "does_not_fit": (6, 8, 64, 3000, 1, 2),
}
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}

shapes = pytest.mark.parametrize("shape", SHAPES)
kinds = pytest.mark.parametrize("kind", KINDS)


def modules(kind, shape, dtype):
    """Ours, stock's and stock's in float64, of the same weights; an input."""
    steps, batch, inputs, hidden, layers, directions = SHAPES[shape]
    options = {"num_layers": layers, "bidirectional": directions == 2}
    ours = getattr(dlkernels.nn, KINDS[kind].__name__)(inputs, hidden, **options)
    ours = ours.to("cuda", dtype)
    twins = []
    for wide in (dtype, torch.float64):
        twin = KINDS[kind](inputs, hidden, **options).to("cuda", wide)
        twin.load_state_dict(ours.state_dict())
        twins.append(twin)
    return ours, *twins, torch.randn(steps, batch, inputs, device="cuda").to(dtype)


def evaluate(module, x, lengths=None):
    """Output, last states, gradients of input and weights."""
    dtype = next(module.parameters()).dtype
    x = x.detach().to(dtype).requires_grad_()
    given = x if lengths is None else pack_padded_sequence(x, lengths)
    output, state = module(given)
    output = output if lengths is None else output.data
    states = state if isinstance(state, tuple) else (state,)
    results = [output, *states]
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [
        torch.randn(r.shape, generator=generator, device="cuda", dtype=torch.float64)
        for r in results
    ]
    grads = [g.to(x.dtype) for g in grads]
    return *results, *torch.autograd.grad(results, [x, *module.parameters()], grads)


def assert_all(ours, stock, exact):
    for i, triple in enumerate(zip(ours, stock, exact, strict=True)):
        assert_no_worse(f"result {i}", *triple)


@pytest.fixture(autouse=True)
def _exact_stock():
    """Stock's float32 as float32: ours has no TF32."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
@shapes
def test_against_stock(shape, kind, dtype, own, poisoned):
    ours, stock, exact, x = modules(kind, shape, dtype)
    assert_all(evaluate(ours, x), evaluate(stock, x), evaluate(exact, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
@pytest.mark.parametrize("shape", ["cluster", "grid", "odd"])
def test_packed(shape, kind, dtype, own, poisoned):
    ours, stock, exact, x = modules(kind, shape, dtype)
    lengths = torch.randint(1, x.shape[0] + 1, (x.shape[1],))
    lengths[0] = x.shape[0]
    lengths = lengths.sort(descending=True).values
    assert_all(*(evaluate(module, x, lengths) for module in (ours, stock, exact)))


@kinds
@pytest.mark.parametrize("shape", ["cluster", "grid", "does_not_fit"])
def test_the_same_bits(shape, kind, own):
    ours, *_, x = modules(kind, shape, torch.bfloat16)
    first = evaluate(ours, x)
    for _ in range(3):
        for a, b in zip(first, evaluate(ours, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", ["cluster", "grid"])
def test_long_sequences(shape, own):
    """Barriers by the thousand: two streams at once, a copy beside them."""
    steps, batch, inputs, hidden, *_ = SHAPES[shape]
    module = dlkernels.nn.LSTM(inputs, hidden).to("cuda", torch.bfloat16)
    x = torch.randn(2000, batch, inputs, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, _ = module(x)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(module(x)[0])
        torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shape", ["cluster", "grid"])
def test_in_a_graph(shape, packed, own):
    ours, *_, x = modules("lstm", shape, torch.bfloat16)
    given, data = x, x
    if packed:
        given = pack_padded_sequence(x, torch.linspace(x.shape[0], 1, x.shape[1]).long())
        data = given.data

    def output():
        found = ours(given)[0]
        return found.data if packed else found

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = output()
        data.copy_(torch.randn_like(data))
        host = [torch.full((n,), -1) for n in range(1, 4096, 7)]  # in place of what was freed
        graph.replay()
        assert torch.equal(found, output())
        del host


def test_a_batch_of_more_blocks_than_a_grid_has_in_y(own):
    """Of W_hh's gradient: that of the whole is the sum of the halves'."""
    module = dlkernels.nn.LSTM(3, 8).to("cuda", torch.float64)
    x = torch.randn(2, 600_000, 3, device="cuda", dtype=torch.float64)

    def gradient(x):
        return torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0)[0]

    halves = sum(gradient(half) for half in x.chunk(2, 1))
    torch.testing.assert_close(gradient(x), halves, rtol=1e-9, atol=1e-6)


def test_two_threads(own):
    """One kernel with 102 and with 204 KB of shared memory, launched at once."""

    def repeated(hidden):
        module = dlkernels.nn.LSTM(16, hidden).to("cuda", torch.bfloat16)
        x = torch.randn(3, 1, 16, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            wanted = module(x)[0]
            return all(torch.equal(module(x)[0], wanted) for _ in range(500))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeated, [1200, 2000]))


@kinds
def test_cells(kind, own, poisoned):
    cell = getattr(dlkernels.nn, f"{kind.upper()}Cell")(100, 256).cuda()
    twin = getattr(nn, f"{kind.upper()}Cell")(100, 256).cuda()
    twin.load_state_dict(cell.state_dict())
    x, h = torch.randn(32, 100, device="cuda"), torch.randn(32, 256, device="cuda")
    state = (h, torch.randn_like(h)) if kind == "lstm" else h
    torch.testing.assert_close(cell(x, state), twin(x, state))


def test_on_another_device_and_stream(own):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    module = dlkernels.nn.LSTM(16, 64).to("cuda:1")
    x = torch.randn(5, 4, 16, device="cuda:1")
    output, _ = module(x)
    twin = nn.LSTM(16, 64).to("cuda:1")
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(output, twin(x)[0], rtol=1e-4, atol=1e-5)

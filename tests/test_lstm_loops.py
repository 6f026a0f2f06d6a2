"""Loops of cells, whose weights' gradients are computed for many steps at once: what autograd does
with a graph of torch's own, whatever is asked of it, it does with this one."""

import copy
import gc
import weakref

import pytest
import torch
from threads import assert_same_for_any_number_of_threads, assert_same_in_threads_at_once
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dlkernels import nn

ops = torch.ops.dlkernels
pytestmark = pytest.mark.usefixtures("one_thread", "own")

CELLS = {
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
    "tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
}


def twins(mode="lstm", inputs=6, hidden=11, dtype=torch.float64, **settings):
    """Torch's cell and ours."""
    name, more = CELLS[mode]
    stock, ours = (
        getattr(kind, name)(inputs, hidden, **more, **settings) for kind in (torch.nn, nn)
    )
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype), ours.to(dtype)


def leaves_of(*shape):
    return [x.requires_grad_() for x in torch.randn(*shape).double().unbind(0)]


def loop(cell, xs, state=None, total=0):
    """The last state, and a sum over all states."""
    for x in xs:
        state = cell(x, state)
        h, *_ = state if isinstance(state, tuple) else (state,)
        total = total + h.square().sum()
    return state, total


class Asked(TorchDispatchMode):
    """Counts the calls of the raw op that has the weights' gradients of many steps, and of those
    that have them of one."""

    def __init__(self):
        super().__init__()
        self.at_once = self.alone = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.at_once += function is ops.lstm_cell_backward_weights.default
        self.alone += function is ops.lstm_cell_backward.default
        return function(*args, **(kwargs or {}))


def assert_close(results):
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# id: batch and steps, calls for many steps, for one. The first step of a loop is always alone.
LOOPS = {
    "one_step": ((4, 1), (0, 1)),
    "two_steps": ((4, 2), (1, 1)),
    "all_rows_are_full": ((64, 5), (1, 1)),
    "rows_are_full_twice": ((100, 6), (3, 1)),
    "nothing_is_gained": ((129, 3), (0, 3)),
    "no_rows": ((0, 3), (1, 1)),
}


@pytest.mark.parametrize("loops", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mode", CELLS)
def test_a_loops_gradients(mode, bias, loops, poisoned):
    (batch, steps), calls = loops
    results, xs = [], leaves_of(steps, batch, 6)
    for cell in twins(mode, bias=bias):
        _, total = loop(cell, xs)
        with Asked() as asked:
            results.append(torch.autograd.grad(total, [*xs, *cell.parameters()]))
    assert_close(results)
    assert (asked.at_once, asked.alone) == calls


def test_for_the_inputs_alone_nothing_is_summed():
    xs, results = leaves_of(3, 4, 6), []
    for cell in twins():
        _, total = loop(cell, xs)
        with Asked() as asked:
            results.append(torch.autograd.grad(total, xs))
    assert_close(results)
    assert (asked.at_once, asked.alone) == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_less_than_float64(dtype):
    """As near to float64 as torch's, whose sums are rounded at every step."""
    torch.manual_seed(3)
    xs, errors = torch.randn(40, 9, 37), []
    stock, ours = twins("gru", 37, 20, dtype=dtype)
    exact = copy.deepcopy(stock).double()
    gradients = [
        torch.autograd.grad(
            loop(cell, xs.to(kind).to(cell.weight_hh.dtype))[1], [*cell.parameters()]
        )
        for cell, kind in ((exact, dtype), (stock, dtype), (ours, dtype))
    ]
    for wanted, *others in zip(*gradients, strict=True):
        errors.append([(g.double() - wanted).abs().max() / wanted.abs().max() for g in others])
    for of_stock, of_ours in errors:
        assert of_ours <= 2 * of_stock + torch.finfo(dtype).eps


WANTED = {
    "one_weight": ["weight_hh"],
    "biases": ["bias_ih", "bias_hh"],
    "no_weight": [],
}


@pytest.mark.parametrize("names", WANTED.values(), ids=WANTED)
def test_some_of_the_gradients(names):
    results, xs = [], leaves_of(4, 3, 6)
    for cell in twins():
        wanted = [xs[1], *(getattr(cell, name) for name in names)]
        with Asked() as asked:
            results.append(torch.autograd.grad(loop(cell, xs)[1], wanted))
    assert_close(results)
    assert asked.at_once == bool(names)


def test_a_frozen_weight():
    results, xs = [], leaves_of(4, 3, 6)
    for cell in twins():
        cell.bias_ih.requires_grad_(False)
        wanted = [w for w in cell.parameters() if w.requires_grad]
        with Asked() as asked:
            results.append(torch.autograd.grad(loop(cell, xs)[1], wanted))
    assert_close(results)
    assert (asked.at_once, asked.alone) == (0, 4)


def test_several_backward_passes():
    results, xs = [], leaves_of(4, 3, 6)
    for cell in twins():
        state, total = loop(cell, xs)
        total.backward(retain_graph=True)
        state[0].sum().backward(retain_graph=True)  # of other gradients
        total.backward()
        results.append([w.grad for w in cell.parameters()])
        with pytest.raises(RuntimeError, match="second time"):
            total.backward()
    assert_close(results)


def test_gradients_of_gradients():
    results, xs = [], leaves_of(3, 2, 6)
    for cell in twins():
        weights, (_, total) = list(cell.parameters()), loop(cell, xs)
        with Asked() as asked:
            first = torch.autograd.grad(total, weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*xs, *weights])
        results.append([*first, *second])
    assert_close(results)
    assert asked.at_once == 0


def test_batched_gradients():
    results, xs = [], leaves_of(3, 2, 6)
    for cell in twins():
        (h, _), _ = loop(cell, xs)
        grads = torch.eye(h.numel()).double().view(-1, *h.shape)
        results.append(
            torch.autograd.grad(h, list(cell.parameters()), grads, is_grads_batched=True)
        )
    assert_close(results)


def test_a_transform():
    results, xs = [], torch.randn(3, 2, 6).double()
    for cell in twins():
        weights = {name: w.detach() for name, w in cell.named_parameters()}

        def function(weights, xs, cell=cell):
            return loop(lambda *a: torch.func.functional_call(cell, weights, a), xs)[1]

        results.append([*torch.func.grad(function)(weights, xs).values()])
    assert_close(results)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    results, xs = [], leaves_of(6, 3, 6)
    for cell in twins():
        state, total = loop(cell, xs[:2])
        for at in (2, 4):
            state, total = checkpoint(
                lambda at, h, c, total, cell=cell: loop(cell, xs[at : at + 2], (h, c), total),
                at, *state, total, use_reentrant=reentrant,
            )  # fmt: skip
        total.backward()
        results.append([g.grad.clone() for g in (*xs, *cell.parameters())])
        for x in xs:
            x.grad = None
    assert_close(results)


def test_hooks_see_the_whole_gradient_once():
    results, xs = [], leaves_of(4, 3, 6)
    for cell in twins():
        seen = []

        def double(g, seen=seen):
            seen.append(g)
            return 2 * g

        cell.weight_ih.register_hook(double)
        cell.weight_hh.register_post_accumulate_grad_hook(lambda w, seen=seen: seen.append(w.grad))
        loop(cell, xs)[1].backward()
        results.append([*seen, *(w.grad for w in cell.parameters())])
    assert len(results[1]) == 2 + 4
    results = [sorted(tensors, key=lambda t: (t.shape, t.sum().item())) for tensors in results]
    assert_close(results)


def test_saved_tensors_hooks():
    results, xs = [], leaves_of(4, 3, 6)
    for cell in twins():
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            _, total = loop(cell, xs)
        results.append(torch.autograd.grad(total, [*xs, *cell.parameters()]))
    assert_close(results)


def test_a_weight_changed_between_steps():
    """Is refused as by torch; and what the pass that failed has left does not count later."""
    for cell in twins():
        xs = leaves_of(4, 3, 6)
        state, _ = loop(cell, xs[:3])
        later, total = loop(cell, xs[3:], state)
        with torch.no_grad():
            cell.weight_hh.mul_(0.5)
        loop(cell, xs, later)
        with pytest.raises(RuntimeError, match="inplace operation"):
            total.backward()


def test_a_pass_that_failed():
    results, xs = [], leaves_of(4, 3, 6)
    for cell in twins():
        state, total = loop(cell, xs[:2])
        failing = [True]

        def fail(g, failing=failing):
            if failing:
                raise ValueError("on purpose")

        state[0].register_hook(fail)
        _, total = loop(cell, xs[2:], state, total)
        with pytest.raises(ValueError, match="on purpose"):
            total.backward(retain_graph=True)
        assert all(w.grad is None for w in cell.parameters())
        failing.clear()
        results.append(torch.autograd.grad(total, [*xs, *cell.parameters()]))
    assert_close(results)


def test_inputs_that_change_after_their_step():
    """Nobody reads them again."""
    _, cell = twins()
    inputs, results = torch.randn(4, 3, 6).double().unbind(0), []
    for kept in (1, 0):
        xs = [x.clone().requires_grad_() for x in inputs]
        for x in xs:

            def change(g, x=x, kept=kept):
                with torch.no_grad():
                    x.mul_(kept)

            x.register_hook(change)
        results.append(torch.autograd.grad(loop(cell, xs)[1], [*xs, *cell.parameters()]))
    assert not any(x.any() for x in xs)
    assert_close(results)


def test_new_weights_and_new_graphs():
    """A graph that is still there does not meet a later one."""
    results, xs = [], leaves_of(3, 2, 6)
    for cell in twins():
        optimizer = torch.optim.SGD(cell.parameters(), 0.1)
        state = first = None
        for _ in range(3):
            state, total = loop(cell, xs, state)
            first = first or state
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            state = tuple(s.detach() for s in state)
        cell.weight_hh = torch.nn.Parameter(cell.weight_hh.detach() * 0.5)
        _, total = loop(cell, xs, state)
        results.append(torch.autograd.grad(total, [*xs, *cell.parameters()]))
    assert_close(results)


def test_weights_that_are_no_leaves():
    results, xs = [], leaves_of(3, 2, 6)
    for cell in twins():
        weight_norm(cell, "weight_hh")
        with Asked() as asked:
            results.append(torch.autograd.grad(loop(cell, xs)[1], list(cell.parameters())))
    assert_close(results)
    assert asked.at_once == 0


def test_branches_and_two_cells():
    """Two loops go on from one state, a third of another cell beside them; batches shrink."""
    results, xs = [], leaves_of(6, 5, 6)
    for a in twins():
        b = copy.deepcopy(a)
        state, total = loop(a, xs[:3])
        shorter = tuple(s[:3] for s in state)
        _, one = loop(a, [x[:3] for x in xs[3:]], shorter)
        _, other = loop(a, xs[2:4], state)
        _, third = loop(b, xs)
        weights = [*a.parameters(), *b.parameters()]
        gradients = torch.autograd.grad(
            total + one * other, [*xs, *weights], retain_graph=True, allow_unused=True
        )
        assert all(g is None for g in gradients[-4:])
        results.append([*gradients[:-4], *torch.autograd.grad(one * other + third, weights)])
    assert_close(results)


def test_memory_goes_with_the_graph():
    _, cell = twins()
    state, total = loop(cell, leaves_of(4, 3, 6))
    shared = weakref.ref(state[0].grad_fn.shared)
    total.backward()
    assert not shared().owed
    del state, total
    gc.collect()
    assert shared() is None


def test_a_copy_of_a_cell_in_a_loop():
    _, cell = twins()
    state, _ = loop(cell, leaves_of(3, 2, 6))
    other = copy.deepcopy(cell)
    state, total = loop(other, leaves_of(3, 2, 6), tuple(s.detach() for s in state))
    assert torch.autograd.grad(total, list(cell.parameters()), allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("mode", CELLS)
def test_the_same_bits(mode):
    """For any number of threads, and for callers at once of one cell."""
    _, cell = twins(mode, 70, 90, dtype=torch.float32)
    xs = torch.randn(5, 60, 70)

    def evaluate(xs=xs):
        return torch.autograd.grad(loop(cell, xs)[1], list(cell.parameters()))

    assert_same_for_any_number_of_threads(evaluate)
    assert_same_in_threads_at_once(evaluate, [(xs,), (xs[:, :7],), (xs[:3],)])


def test_refusals():
    gates, beside = torch.zeros(300, 50).double(), torch.zeros(300, 16 + 11).double()
    sums = [torch.zeros(44, 6), torch.zeros(44, 11), None, None]
    sums = [s if s is None else s.double() for s in sums]

    def refused(match, *arguments):
        with pytest.raises(RuntimeError, match=match):
            ops.lstm_cell_backward_weights(*arguments)

    refused("at most 256 rows", gates, beside, 257, "lstm", True, True, *sums)
    refused("at least 9 x 44", gates[:8], beside, 9, "lstm", True, True, *sums)
    refused("at least 9 x 17", gates, beside[:, :9].contiguous(), 9, "lstm", True, True, *sums)
    refused("w_ih", gates, beside, 9, "gru", True, True, *sums)
    refused("w_hh", gates, beside, 9, "lstm", True, True, sums[0], sums[1].float(), None, None)
    refused("both biases", gates, beside, 9, "lstm", True, True, *sums[:3], gates[0, :44])
    with pytest.raises(NotImplementedError, match="raw op"):
        ops.lstm_cell_backward_weights(gates.requires_grad_(), beside, 9, "lstm", True, True, *sums)

"""linear against torch's own: forward, gradients, activations, layouts, refusals, threads."""

import itertools
import math

import pytest
import torch
from compare import assert_no_worse
from graphs import check_second_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    every_second,
    expanded,
    offset,
    same_memory,
    sliced_columns,
    sliced_rows,
    transposed,
)
from memory import assert_nothing_is_kept
from products import ACTIVATIONS, DTYPES, evaluate
from threads import (
    assert_same_for_any_number_of_threads,
    assert_same_in_a_forked_child,
    assert_same_in_threads_at_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
from dlkernels.functional import linear
from dlkernels.ops.linear import _relu_by_cublas, linear_reference

ops = torch.ops.dlkernels
pytestmark = pytest.mark.usefixtures("one_thread")
KINKED = ("relu", "leaky_relu")

# id: shape of the input, outputs. On each side of what a blocked product switches on: a tile in
# registers (8 or 16 rows, 16 or 32 columns), a block of K (256), a panel, one row (no reuse of the
# weight), and a part for each thread.
SHAPES = {
    "one_number": ((1, 1), 1),
    "unbatched": ((37,), 21),
    "one_row": ((1, 784), 130),
    "one_feature_in": ((9, 1), 5),
    "one_feature_out": ((70, 33), 1),
    "three_features_out": ((70, 33), 3),
    "below_a_tile": ((3, 5), 7),
    "a_tile": ((16, 16), 32),
    "a_tile_and_one": ((17, 17), 33),
    "a_tile_less_one": ((15, 31), 31),
    "a_block_of_k": ((5, 256), 9),
    "a_block_of_k_and_one": ((7, 257), 40),
    "three_blocks_of_k": ((13, 700), 50),
    # More terms than a packed column of B may have, of float64, float32 and pairs of bfloat16: B in
    # panels; and more rows than whose sums are kept meanwhile.
    "panels_of_k": ((13, 8700), 40),
    "panels_of_k_and_many_rows": ((800, 4200), 21),
    "many_rows": ((1030, 19), 6),
    "many_outputs": ((4, 30), 1025),
    "all_tails": ((131, 301), 75),
    "leading_dimensions": ((2, 3, 1, 4, 10), 11),
}


def permuted(x):
    """Leading dimensions that are no longer one."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


# id: layout of the input, of the weight; the shape has 2 leading dimensions where it is permuted.
LAYOUTS = {
    "input_transposed": (transposed, same_memory),
    "input_sliced_rows": (sliced_rows, same_memory),
    "input_sliced_columns": (sliced_columns, same_memory),
    "input_every_second": (every_second, same_memory),
    "input_expanded": (expanded, same_memory),
    "input_offset": (offset, same_memory),
    "input_permuted": (permuted, same_memory),
    "weight_transposed": (same_memory, transposed),
    "weight_sliced_columns": (same_memory, sliced_columns),
    "weight_every_second": (same_memory, every_second),
    "weight_expanded": (same_memory, expanded),
    "weight_offset": (same_memory, offset),
    "both_transposed": (transposed, transposed),
}


def problem(shape, outputs, dtype, bias=True):
    """(input, weight, bias), as a layer at its start has them."""
    draws = [torch.randn(*shape), torch.randn(outputs, shape[-1]) / max(1, shape[-1]) ** 0.5]
    draws.append(torch.randn(outputs) if bias else None)
    return [x if x is None else x.to(dtype) for x in draws]


def upstream_of(tensors, activation=None):
    """A gradient of the output; 0 where the sign before a kinked activation is a matter of
    rounding."""
    exact = F.linear(*(x if x is None else x.detach().double() for x in tensors))
    upstream = torch.randn(exact.shape, dtype=torch.float64)
    if activation in KINKED and exact.numel():
        room = 8 * torch.finfo(tensors[0].dtype).eps * exact.abs().max()
        upstream[exact.abs() < room] = 0
    return upstream


def stock(x, weight, bias=None, activation=None):
    return linear_reference(x, weight, bias, activation or "none")


def check(draw, activation=None, factor=2.0, numbers=300):
    """Ours against stock; ``draw()`` gives (input, weight, bias).

    Errors are pooled over so many numbers of the smallest result (in at most 24 draws, and fewer
    of large inputs): of few, stock gets some by luck.
    """
    results, drawn, read = [], 0, 0
    while drawn < numbers and len(results) < 3 * 24 and read < 2**23:
        tensors = draw()
        read += tensors[0].numel()
        upstream = upstream_of(tensors, activation)
        for function, dtype in ((linear, None), (stock, None), (stock, torch.float64)):
            results.append(evaluate(function, tensors, upstream, dtype, activation=activation))
        drawn += min(result.numel() for result in results[-1])
    for i, name in enumerate(
        ("output", "grad input", "grad weight", "grad bias")[: len(results[0])]
    ):
        assert_no_worse(name, *([result[i] for result in results[j::3]] for j in range(3)), factor)
    for result in results[0]:
        assert result.is_contiguous()
    return tensors, results[-3]


# ------------------------------------------------------------------------------ against stock


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, bias, own, poisoned):
    size, outputs = SHAPES[shape]
    check(lambda: problem(size, outputs, dtype, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", ["unbatched", "one_row", "one_feature_out", "a_tile_and_one", "three_blocks_of_k"]
)
def test_activations(shape, dtype, activation, own, poisoned):
    size, outputs = SHAPES[shape]
    for bias in (True, False):
        check(lambda: problem(size, outputs, dtype, bias), activation)  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, own, poisoned):
    of_input, of_weight = LAYOUTS[layout]
    sizes = [(5, 7, 33)] if of_input is permuted else [(33, 65), (9, 4, 300)]
    for size in sizes:

        def draw(size=size):
            x, weight, bias = problem(size, 37, dtype)
            return of_input(x), of_weight(weight), every_second(bias)

        check(draw, "tanh" if len(size) == 3 else None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    leading=st.lists(st.integers(1, 12), max_size=4).filter(lambda s: math.prod(s) < 800),
    features=st.integers(1, 70),
    outputs=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    weight_layout=st.sampled_from([same_memory, transposed, sliced_columns, every_second]),
    seed=st.integers(0, 2**31),
)
def test_drawn_shapes_and_strides(
    data, leading, features, outputs, dtype, activation, bias, weight_layout, seed
):
    dlkernels.config.kernels = "own"
    torch.manual_seed(seed)
    shape = (*leading, features)
    order = data.draw(st.permutations(range(len(shape))))
    inverse = [order.index(d) for d in range(len(shape))]
    step, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(0, len(shape) - 1))
    every = (slice(None),) * dim + (slice(None, None, step),)

    def draw():
        x, weight, b = problem(shape, outputs, dtype, bias)
        x = x.permute(order).contiguous().permute(inverse)
        return x.repeat_interleave(step, dim)[every], weight_layout(weight), b

    check(draw, activation, factor=4.0, numbers=100)  # hypothesis looks for the worst luck


def test_more_than_two_to_the_31_elements(own):
    """Offsets are 64 bits wide. The memory between the two rows is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x, weight = far.as_strided((2, 64), (2**31, 1)), far.as_strided((2, 64), (2**31, 1))
    x.copy_(torch.randn(2, 64))
    assert_no_worse(
        "output",
        linear(x, weight),
        F.linear(x.contiguous(), weight.contiguous()),
        F.linear(x.double(), weight.double()),
    )


# ---------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_special_values_stay_in_their_row_and_column(value, activation, own, poisoned):
    """What pads a tile is no part of a sum, and a NaN in one row is none in its neighbours."""
    for dtype, (size, outputs) in itertools.product(
        (torch.float32, torch.bfloat16), (SHAPES["a_tile_and_one"], SHAPES["a_block_of_k_and_one"])
    ):
        x, weight, bias = problem(size, outputs, dtype)
        x[2, 1], weight[3, 4], bias[-1] = value, value, value
        results = [
            function(*tensors, activation=activation)
            for function, tensors in (
                (linear, (x, weight, bias)),
                (stock, (x, weight, bias)),
                (stock, (x.double(), weight.double(), bias.double())),
            )
        ]
        assert_no_worse("output", *results)
        assert not results[0].isfinite().all() or activation in ("tanh", "sigmoid")
        assert results[0][0, 0].isfinite()


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_the_gradient_at_special_outputs_is_stocks(activation, own):
    """At 0, at an infinite and at a saturated argument, exactly; a NaN stays one."""
    bias = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 200.0, -200.0])
    tensors = torch.zeros(3, 5), torch.zeros(7, 5), bias
    upstream = torch.randn(3, 7, dtype=torch.float64)
    ours, wanted = (evaluate(f, tensors, upstream, activation=activation) for f in (linear, stock))
    torch.testing.assert_close(ours[0], wanted[0], equal_nan=True)
    torch.testing.assert_close(ours[3], wanted[3], equal_nan=True)
    infinite = torch.full((3, 7), float("inf"))
    ours, wanted = (
        evaluate(f, tensors, infinite, activation=activation)[3] for f in (linear, stock)
    )
    torch.testing.assert_close(ours, wanted, equal_nan=True)


@pytest.mark.parametrize(("rows", "outputs"), [(1, 5), (4, 3), (7, 2), (6, 9)])
def test_long_sums_are_cut(rows, outputs, own):
    """Numbers that are alike are rounded alike, which no sum of one piece survives: stock's."""
    x, weight = torch.full((rows, 2**19), 0.1), torch.full((outputs, 2**19), 0.3)
    exact = x[0].double() @ weight[0].double()
    assert ((linear(x, weight).double() - exact) / exact).abs().max() < 1e-4


def test_sums_of_float16_are_in_float32(own):
    """Partial sums are beyond float16's range, the sum is not."""
    x = torch.full((3, 64), 200.0, dtype=torch.float16)
    weight = torch.cat([torch.full((5, 32), 100.0), torch.full((5, 32), -99.0)], 1).half()
    assert linear(x, weight).tolist() == [[6400.0] * 5] * 3


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "shape, outputs",
    [((0, 5), 3), ((2, 0, 5), 3), ((4, 0), 3), ((0,), 3), ((2, 3, 0), 4), ((4, 5), 0), ((5,), 0)]
    + [((0, 0), 0)],
    ids=str,
)
def test_empty(shape, outputs, bias, own, poisoned):
    """No rows, no inputs (the output is the bias) and no outputs (gradients are 0)."""
    for dtype, activation in itertools.product((torch.float32, torch.bfloat16), (None, "sigmoid")):
        tensors = problem(shape, outputs, dtype, bias)
        upstream = upstream_of(tensors)
        ours, wanted = (
            evaluate(f, tensors, upstream, activation=activation) for f in (linear, stock)
        )
        for got, want in zip(ours, wanted, strict=True):
            torch.testing.assert_close(got, want)
            assert got.is_contiguous()


# ---------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,)], ids=str)
def test_gradcheck_and_gradgradcheck(activation, shape, own):
    tensors = [x.requires_grad_() for x in problem(shape, 4, torch.float64)]
    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        for inputs in (tensors, tensors[:2]):
            assert check_gradient(
                lambda *tensors: linear(*tensors, activation=activation),
                inputs,
                check_batched_grad=True,
            )


class Backwards(TorchDispatchMode):
    """Notes what the raw backward op is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ops.linear_backward.default:
            self.asked.append(args[-3:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_only_the_wanted_gradients_are_computed_and_kept_for(wanted, activation, own, poisoned):
    tensors = problem((6, 40), 30, torch.float32)
    upstream = torch.randn(6, 30)

    def run(function):
        leaves = [
            x.detach().clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)
        ]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.shape) or x, lambda x: x
        ):
            output = function(*leaves, activation=activation)
        with Backwards() as backwards:
            gradients = torch.autograd.grad(
                output, [x for x in leaves if x.requires_grad], upstream
            )
        return gradients, kept, backwards.asked

    ours, kept, asked = run(linear)
    assert asked == [wanted]
    assert kept == [
        shape
        for shape, needed in (((6, 40), wanted[1]), ((30, 40), wanted[0]), ((6, 30), activation))
        if needed
    ]
    for got, want in zip(ours, run(stock)[0], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_a_second_backward(dtype, activation, own):
    """retain_graph: each backward is right for its upstream gradient, and leaves others alone."""
    tensors = [x.requires_grad_() for x in problem((9, 60), 30, dtype)]
    output = linear(*tensors, activation=activation)
    check_second_backward(output, tensors, torch.randn(9, 30).to(dtype), 0.5)


def test_gradients_accumulate_and_are_not_shared(own):
    x, weight, bias = [x.requires_grad_() for x in problem((20, 50), 30, torch.float32)]
    output = linear(x, weight, bias)
    output.sum().backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, weight, bias)]
    output.sum().backward()
    for t, before in zip((x, weight, bias), once, strict=True):
        torch.testing.assert_close(t.grad, 2 * before)


def test_a_weight_used_twice(own):
    """Tied layers: the gradient of the weight is the sum of both."""
    x, weight, _ = problem((20, 30), 30, torch.float32)
    weight.requires_grad_()
    ours, wanted = (
        torch.autograd.grad(f(f(x, weight, activation="tanh"), weight).sum(), weight)[0]
        for f in (linear, stock)
    )
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("changed", ["input", "weight", "bias", "output"])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_changes_in_place_are_refused_where_stock_refuses_them(changed, activation, own):
    refused = {}
    for function in (linear, stock):
        x, weight, bias = [x.requires_grad_() * 1 for x in problem((8, 20), 5, torch.float32)]
        output = function(x, weight, bias, activation=activation)
        tensor = {"input": x, "weight": weight, "bias": bias, "output": output}[changed]
        tensor.mul_(2)
        try:
            output.sum().backward()
            refused[function] = False
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            refused[function] = True
    assert refused[linear] == refused[stock]
    assert refused[linear] == (
        changed in ("input", "weight") or (changed == "output" and bool(activation))
    )


def test_the_weight_of_a_first_layer_may_change_before_the_backward(own):
    """As with stock: no gradient of the input is wanted, so nobody reads the weight again."""
    x, weight, bias = problem((8, 20), 5, torch.float32)
    weight.requires_grad_()
    output = linear(x, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), weight)[0], x.sum(0).expand(5, 20))


def test_upstream_gradients_as_they_come(own):
    """Of stride 0, as from a sum, and transposed."""
    tensors = [x.requires_grad_() for x in problem((20, 50), 20, torch.float32)]
    for upstream in (torch.ones(()).expand(20, 20), torch.randn(20, 20).t()):
        for activation in (None, "sigmoid"):
            ours, wanted = (
                torch.autograd.grad(f(*tensors, activation=activation), tensors, upstream)
                for f in (linear, stock)
            )
            for got, want in zip(ours, wanted, strict=True):
                torch.testing.assert_close(got, want)


def test_no_gradient_work_where_none_is_needed(own):
    x, weight, bias = problem((8, 100), 30, torch.float32)
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad
    with torch.inference_mode():
        assert not linear(x, weight, bias).requires_grad
    assert not linear(x, weight.detach(), bias).requires_grad
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(x, weight.detach(), bias)
    names = {event.key for event in profile.key_averages()}
    assert "dlkernels::linear_forward" in names and "_Linear" not in names


def test_a_call_keeps_no_memory():
    x, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    output = ops.linear_forward(x, weight, bias, "relu")
    assert_nothing_is_kept(lambda: ops.linear_forward(x, weight, bias, "relu"))
    wanted = True, True, True
    assert_nothing_is_kept(lambda: ops.linear_backward(output, x, weight, output, "relu", *wanted))


def test_raw_ops_refuse_to_be_differentiated():
    x, weight, bias = [x.requires_grad_() for x in problem((8, 10), 3, torch.float32)]
    output = ops.linear_forward(x, weight, bias, "none")
    with pytest.raises(NotImplementedError, match="raw op"):
        output.sum().backward()
    gradients = ops.linear_backward(torch.ones(8, 3), x, weight, None, "none", True, True, True)
    for gradient in gradients:
        with pytest.raises(NotImplementedError, match="raw op"):
            gradient.sum().backward()


# ------------------------------------------------------------------------- the rest of torch


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_opcheck(activation):
    for shape, bias in (((2, 3, 6), True), ((6,), False), ((0, 6), True)):
        inputs = (*problem(shape, 5, torch.float32, bias), activation)
        torch.library.opcheck(ops.linear_forward.default, inputs)
        torch.library.opcheck(
            ops.linear.default,
            [x.requires_grad_() if torch.is_tensor(x) else x for x in inputs],
        )
        x, weight = inputs[0].detach(), inputs[1].detach()
        output = ops.linear_forward(x, weight, None, activation)
        kept = None if activation == "none" else output
        for wanted in ((True, True, bias), (False, not bias, bias)):
            torch.library.opcheck(
                ops.linear_backward.default,
                (torch.ones_like(output), x, weight, kept, activation, *wanted),
            )


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", [same_memory, permuted])
def test_compile(layout, activation, own):
    """One graph without a break, one compilation for every batch size."""
    torch._dynamo.reset()  # the other parameters have compiled the same lines
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *tensors, activation: linear(*tensors, activation=activation),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    graphs = None
    for batch in (3, 5, 8):
        x, weight, bias = problem((batch, 4, 30), 20, torch.float32)
        tensors = layout(x), weight, bias
        upstream = upstream_of(tensors)
        results = [
            evaluate(f, tensors, upstream, activation=activation) for f in (compiled, linear)
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        graphs = graphs or list(counter.graphs)
        assert len(counter.graphs) == len(graphs), "compiled again for another batch"
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(ops.linear) + targets.count(ops.linear.default) == 1


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_compile_of_some_gradients(wanted, own):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: linear(*tensors, activation="tanh"), fullgraph=True, backend="aot_eager"
    )
    tensors = [
        x.requires_grad_(w)
        for x, w in zip(problem((6, 40), 30, torch.float32), wanted, strict=True)
    ]
    leaf = next(x for x in tensors if x.requires_grad)
    ours, wanted = (
        torch.autograd.grad(f(*tensors).sum(), leaf)[0]
        for f in (compiled, lambda *tensors: stock(*tensors, "tanh"))
    )
    torch.testing.assert_close(ours, wanted)


def test_compile_of_func_grad_is_not_zero(own):
    x, weight, bias = problem((5, 70), 20, torch.float32)
    gradient = torch.func.grad(lambda w: linear(x, w, bias, activation="tanh").sum())
    wanted = torch.func.grad(lambda w: stock(x, w, bias, "tanh").sum())(weight)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(gradient(weight), wanted)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), wanted)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_vmap_and_forward_mode(activation, own):
    x, weight, bias = problem((6, 3, 50), 20, torch.float32)
    weights = torch.stack([weight, 2 * weight, -weight])

    def f(x, weight):
        return linear(x, weight, bias, activation=activation)

    batched = torch.func.vmap(f, in_dims=(1, 0))(x, weights)
    looped = torch.stack([f(x[:, i], weights[i]) for i in range(3)])
    torch.testing.assert_close(batched, looped)
    tangent = torch.randn_like(weight)
    _, ours = torch.func.jvp(lambda w: f(x, w), (weight,), (tangent,))
    leaf = weight.clone().requires_grad_()
    gradient = torch.autograd.grad(f(x, leaf).sum(), leaf)[0]
    torch.testing.assert_close(ours.sum(), (gradient * tangent).sum(), rtol=1e-4, atol=1e-4)


def test_jacobian_of_the_whole_batch_at_once(own):
    """vmap over the backward alone."""
    x, weight, bias = problem((3, 5), 4, torch.float64)
    one, all_ = (
        torch.autograd.functional.jacobian(
            lambda w: linear(x, w, bias, activation="tanh"), weight, vectorize=vectorize
        )
        for vectorize in (False, True)
    )
    torch.testing.assert_close(one, all_)


def test_checkpoint(own):
    tensors = [x.requires_grad_() for x in problem((6, 40), 30, torch.float32)]
    ours, wanted = (
        torch.autograd.grad(f(*tensors).sum(), tensors)
        for f in (
            lambda *t: torch.utils.checkpoint.checkpoint(
                lambda *t: linear(*t, activation="relu"), *t, use_reentrant=False
            ),
            lambda *t: linear(*t, activation="relu"),
        )
    )
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


def test_export(own):
    class Layer(dlkernels.nn.Linear):
        def forward(self, x):
            return linear(x, self.weight, self.bias, activation="relu")

    batch = torch.export.Dim("batch")
    for layer in (dlkernels.nn.Linear(50, 20), Layer(50, 20)):
        program = torch.export.export(layer, (torch.randn(8, 50),), dynamic_shapes=({0: batch},))
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert targets == [ops.linear.default]
        x = torch.randn(3, 50)
        assert torch.equal(program.module()(x), layer(x))


def test_a_jit_trace_holds_torchs_ops_alone(own):
    layer, x = dlkernels.nn.Linear(40, 30), torch.randn(6, 40)
    traced = torch.jit.trace(layer, x)
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert "aten::linear" in kinds and not any("dlkernels" in kind for kind in kinds)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, own):
    """Computed and returned in autocast's dtype; float64 stays; gradients have their leaf's."""
    tensors = [x.requires_grad_() for x in problem((8, 100), 30, torch.float32)]
    with torch.autocast("cpu", dtype):
        ours, wanted = linear(*tensors), F.linear(*tensors)
        assert ours.dtype == wanted.dtype == dtype
        mixed = linear(tensors[0].to(dtype), *tensors[1:])
        assert torch.equal(mixed, ours)
        doubles = [x.detach().double() for x in tensors]
        assert linear(*doubles).dtype == F.linear(*doubles).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert linear(*tensors).dtype == torch.float32
    exact = F.linear(*(x.double() for x in tensors))
    assert_no_worse("output", ours, wanted, exact)
    for leaf, a, b, c in zip(
        tensors,
        *(torch.autograd.grad(y, tensors, torch.ones_like(y)) for y in (ours, wanted, exact)),
        strict=True,
    ):
        assert a.dtype == leaf.dtype
        assert_no_worse("gradient", a, b, c.double())
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        assert torch.equal(compiled(*tensors), ours)


def test_module(own):
    layer = dlkernels.nn.Linear(50, 30)
    x = torch.randn(8, 50)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
    layer = dlkernels.nn.Linear(50, 30, bias=False)
    assert torch.equal(layer(x), linear(x, layer.weight))


def test_an_activation_in_place_behind_it(own):
    """Nothing is kept of an output without an activation of ours: it may be overwritten."""
    tensors = [x.requires_grad_() for x in problem((8, 40), 30, torch.float32)]
    ours, wanted = (
        torch.autograd.grad(F.leaky_relu_(f(*tensors)).sum(), tensors) for f in (linear, F.linear)
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------- refusals


def refusals():
    x, weight, bias = problem((4, 6), 5, torch.float32)
    return {
        "features": (x[:, :5], weight, bias),
        "features_unbatched": (x[0, :5], weight, bias),
        "features_in_batches": (x[None, :, :5], weight, bias),
        "scalar_input": (x.sum(), weight, bias),
        "scalar_weight": (x, weight.sum(), None),
        "weight_of_3_dimensions": (x, weight[None], bias),
        "bias_size": (x, weight, bias[:4]),
        "bias_beside_a_weight_of_1_dimension": (x, weight[0], bias[:1]),
        "weight_dtype": (x, weight.double(), bias),
        "bias_dtype": (x, weight, bias.double()),
        "bias_of_a_wider_dtype": (x.bfloat16(), weight.bfloat16(), bias),
        "bool": (x > 0, weight > 0, bias > 0),
        "quantized": (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), weight, bias),
        "no_tensor": ([1.0], weight, bias),
        "no_weight": (x, None, bias),
        "bias_is_no_tensor": (x, weight, 3),
    }


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals())
def test_refusals_are_stocks(case, kernels):
    dlkernels.config.kernels = kernels
    tensors = refusals()[case]
    with pytest.raises(Exception) as stocks:  # noqa: B017  whatever it is, ours is the same
        F.linear(*tensors)
    for activation in (None, "relu"):
        with pytest.raises(stocks.type) as ours:
            linear(*tensors, activation=activation)
        assert str(ours.value).splitlines()[0] == str(stocks.value).splitlines()[0]


@pytest.mark.parametrize(
    "activation", ["none", "gelu", "", "ReLU", pytest.param(torch.relu, id="torch.relu")], ids=str
)
def test_an_unknown_activation_names_the_known(activation):
    tensors = problem((4, 6), 5, torch.float32)
    with pytest.raises(ValueError, match="None or one of 'relu', 'leaky_relu', 'tanh', 'sigmoid'"):
        linear(*tensors, activation=activation)


def test_activation_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        linear(*problem((4, 6), 5, torch.float32), "relu")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_what_only_stock_takes_is_stocks():
    """The result of stock, and under "own" a refusal that says why."""
    x, weight, bias = problem((4, 6), 5, torch.float32)
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    cases = {
        "weight of shape \\(6,\\)": (x, weight[0]),
        "bias of shape \\(1,\\)": (x, weight, bias[:1]),
        "bias of shape \\(\\)": (x, weight, bias[0]),
        "bias of shape \\(4, 5\\)": (x, weight, torch.randn(4, 5)),
        "no kernel for torch.complex64": (x.cfloat(), weight.cfloat(), bias.cfloat()),
        "no kernel for torch.int64": (x.long(), weight.long(), bias.long()),
        "not a plain dense tensor": (x, weight.to_sparse_csr(), None),
        "plain dense tensor": (nested, weight, bias),
        "device meta": (x.to("meta"), weight.to("meta"), None),
    }
    for reason, tensors in cases.items():
        dlkernels.config.kernels = "auto"
        ours, wanted = linear(*tensors), F.linear(*tensors)
        assert ours.dtype == wanted.dtype and ours.is_nested == wanted.is_nested
        if not ours.is_nested:
            assert ours.is_meta or torch.equal(ours, wanted)
        dlkernels.config.kernels = "own"
        with pytest.raises(NotImplementedError, match=f"linear: no kernel of ours: .*{reason}"):
            linear(*tensors)


def test_a_subclass_of_tensor_keeps_its_class(own):
    class Marked(torch.Tensor):
        pass

    x, weight, bias = problem((4, 6), 5, torch.float32)
    dlkernels.config.kernels = "auto"
    assert type(linear(x.as_subclass(Marked), weight, bias)) is Marked


def test_refusals_of_raw_ops():
    """No path into a kernel is unchecked."""
    x, weight, bias = problem((4, 6), 5, torch.float32)
    bad = {
        "input of shape \\[..., 5\\] .* got \\[4, 6\\]": (x, weight[:, :5], bias, "none"),
        "bias of shape \\[5\\], got \\[4\\]": (x, weight, bias[:4], "none"),
        "weight of dtype Float, got Double": (x, weight.double(), bias, "none"),
        "bias of dtype Float, got Double": (x, weight, bias.double(), "none"),
        "input of dtype": (x.int(), weight.int(), None, "none"),
        "input with at least 1 dimension": (x.sum(), weight, bias, "none"),
        "weight with 2 dimensions": (x, weight[0], None, "none"),
        "activation": (x, weight, bias, "gelu"),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=f"linear: expected .*{message}"):
            ops.linear_forward(*arguments)
    output = ops.linear_forward(x, weight, bias, "relu")
    good = [torch.ones_like(output), x, weight, output, "relu", True, True, True]
    ops.linear_backward(*good)
    for at, value, message in (
        (0, output.double(), "grad_output of dtype Float, got Double"),
        (0, output[:3], "grad_output of shape \\[4, 5\\], got \\[3, 5\\]"),
        (1, x[:, :5], "input of shape"),
        (2, weight.double(), "weight of dtype"),
        (3, output[:3], "output of shape \\[4, 5\\], got \\[3, 5\\]"),
        (3, output.double(), "output of dtype"),
        (3, None, "the output"),
        (4, "gelu", "activation"),
    ):
        with pytest.raises(RuntimeError, match=f"linear: expected .*{message}"):
            ops.linear_backward(*good[:at], value, *good[at + 1 :])


# ----------------------------------------------------------------------------------- which kernel


def test_choice():
    x, weight, bias = problem((512, 512), 256, torch.float32)
    ours = dlkernels.config.owner("cpu")

    def chosen(kernels, *tensors, **keywords):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            linear(*tensors, **keywords)
        assert len(choices) == 1 and choices[0].op == "linear"
        return choices[0].kernel, choices[0].reason

    small = "too small for our call overhead"
    forced = "dlkernels.config.kernels is 'stock'"
    assert chosen("auto", x, weight, bias) == (ours, "covered")
    assert chosen("auto", x, weight, bias, activation="relu") == (ours, "covered")
    assert chosen("own", x[:1, :3], weight[:2, :3]) == (ours, "covered")
    assert chosen("auto", x[:1, :3], weight[:2, :3]) == ("stock", small)
    assert chosen("auto", x[:1, :3], weight[:2, :3], activation="tanh") == ("reference", small)
    assert chosen("stock", x, weight, bias) == ("stock", forced)
    assert chosen("stock", x, weight, bias, activation="tanh") == ("reference", forced)
    vector = "weight of shape (512,) for input of (512, 512)"
    assert chosen("auto", x, weight[0]) == ("stock", vector)
    halves = [t.bfloat16() for t in (x, weight, bias)]
    by_pairs = dlkernels.config.libraries["cpu"] == "avx512bf16"
    onednns = ("stock", "oneDNN has the faster products of bfloat16")
    assert chosen("auto", *halves) == (onednns if by_pairs else (ours, "covered"))
    assert chosen("own", *halves) == (ours, "covered")
    assert chosen("auto", *(t.half() for t in halves)) == (ours, "covered")
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen("auto", x, weight, bias) == (onednns if by_pairs else (ours, "covered"))
    dlkernels.config.kernels = "own"
    with dlkernels.config.recording() as choices:
        torch.func.vmap(linear, in_dims=(0, None))(x, weight)
    assert choices == [("linear", "stock", "a functorch transform is active")]


def test_explain(own):
    model = dlkernels.swap(torch.nn.Sequential(torch.nn.Linear(50, 30), torch.nn.GELU()))
    layer, gelu = dlkernels.explain(model, torch.randn(8, 50))
    ours = dlkernels.config.owner("cpu")
    assert layer == ("0", "dlkernels.nn.Linear", ours, "covered")
    assert gelu.kernel == "stock"
    model = dlkernels.swap(torch.nn.Sequential(torch.nn.Linear(50, 30), torch.nn.ReLU()))
    kernels = [row.kernel for row in dlkernels.explain(model, torch.randn(8, 50))]
    assert kernels == [ours, "fused", "fused"]


# ------------------------------------------------------------------------------------- on a GPU


def test_relu_in_the_epilogue_is_relu():
    """By the same torch op on the CPU, which no choice leads to there."""
    for shape in ((9, 20), (2, 3, 20)):
        x, weight, bias = problem(shape, 5, torch.float32)
        torch.testing.assert_close(
            _relu_by_cublas(x, weight, bias), F.relu(F.linear(x, weight, bias))
        )


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda(dtype, activation):
    dlkernels.config.kernels = "auto"
    for shape in ((64, 48), (2, 5, 48), (48,), (0, 48)):
        tensors = [x.cuda() for x in problem(shape, 32, dtype)]
        upstream = upstream_of(tensors, activation).cuda()
        with dlkernels.config.recording() as choices:
            ours = evaluate(linear, tensors, upstream, activation=activation)
        assert choices == [("linear", "stock", "cuBLAS does the product")]
        wanted = evaluate(stock, tensors, upstream, activation=activation)
        exact = evaluate(stock, tensors, upstream, torch.float64, activation=activation)
        for name, *triple in zip(
            ("output", "input", "weight", "bias"), ours, wanted, exact, strict=True
        ):
            assert_no_worse(name, *triple)
    tensors = [x.cuda().double().requires_grad_() for x in problem((3, 4), 5, torch.float64)]
    function = lambda *tensors: linear(*tensors, activation=activation)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, tensors)


@needs_cuda
def test_cuda_under_autocast():
    tensors = [x.cuda().requires_grad_() for x in problem((64, 48), 32, torch.float32)]
    with torch.autocast("cuda", torch.bfloat16):
        ours, wanted = linear(*tensors, activation="relu"), F.relu(F.linear(*tensors))
    assert ours.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(ours, wanted)
    assert torch.autograd.grad(ours.sum(), tensors[1])[0].dtype == torch.float32


# ------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize(
    "shape, outputs",
    [((203, 301), 97), ((1, 2000), 1500), ((3000, 20), 17), ((30, 2000), 40), ((4, 100), 3000)],
    ids=["blocks", "one_row", "rows", "long_sums", "outputs"],
)
def test_the_same_bits_for_any_number_of_threads(shape, outputs, own):
    for dtype, activation in itertools.product(DTYPES, (None, "tanh")):
        tensors = problem(shape, outputs, dtype)
        upstream = torch.randn(*shape[:-1], outputs)
        assert_same_for_any_number_of_threads(
            lambda *case: evaluate(*case, activation=activation),  # noqa: B023
            linear,
            tensors,
            upstream,
        )


def test_four_threads_at_once(own):
    def case(features):
        return linear, problem((60, features), 90, torch.float32), torch.randn(60, 90)

    assert_same_in_threads_at_once(evaluate, [case(200 + i) for i in range(4)])


def test_in_a_forked_child(own):
    tensors, upstream = problem((300, 500), 200, torch.float32), torch.randn(300, 200)
    assert_same_in_a_forked_child(evaluate, linear, tensors, upstream)

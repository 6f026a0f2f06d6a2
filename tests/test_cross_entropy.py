"""cross_entropy against torch's own: forward, gradients, layouts, dtypes, refusals, threads."""

import itertools
import math

import layouts
import pytest
import torch
from compare import assert_no_worse
from graphs import check_second_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import (
    assert_same_for_any_number_of_threads,
    assert_same_in_a_forked_child,
    assert_same_in_threads_at_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import dlkernels
from dlkernels.functional import cross_entropy
from dlkernels.ops.cross_entropy import cross_entropy_reference

ops = torch.ops.dlkernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# id: shape, layout. The sizes stand on each side of what the kernels switch on: a vector (4, 8, 16)
# and the few classes that are transposed (64), a chunk of a row (2048), a block of rows.
SHAPES = {
    "unbatched": ((10,), None),
    "one_class": ((5, 1), None),
    "two_classes": ((9, 2), None),
    "transposed_tail": ((37, 21), None),
    "transposed_many_blocks": ((1030, 10), None),
    "transposed_full": ((64, 64), None),
    "rows_65": ((33, 65), None),
    "rows_1000": ((7, 1000), None),
    "rows_chunk": ((3, 2048), None),
    "rows_chunk_and_one": ((3, 2049), None),
    "rows_three_chunks": ((2, 5003), None),
    "columns": ((3, 21, 17, 19), None),
    "columns_many_classes": ((2, 3000, 5), None),
    "columns_many_blocks": ((2, 5, 700), None),
    "one_pixel": ((6, 70, 1, 1), None),
    "channels_last": ((3, 21, 17, 19), "channels_last"),
    "channels_last_rows": ((2, 130, 5, 3), "channels_last"),
    "channels_last_3d": ((2, 7, 3, 4, 5), "channels_last_3d"),
    "matrix_transposed": ((37, 50), "transposed"),
    "sliced_classes": ((12, 100), "sliced_columns"),
    "sliced_rows": ((12, 100), "sliced_rows"),
    "every_second_class": ((12, 100), "every_second"),
    "permuted_pixels": ((2, 9, 5, 6), "permuted"),
    "expanded": ((6, 40), "expanded"),
    "offset": ((6, 40), "offset"),
}


# Of one class the gradient is 0, and what is not 0 is rounding.
MORE_THAN_ONE_CLASS = [name for name in SHAPES if name != "one_class"]


def lay_out(x, layout):
    """The values of x in another layout of memory."""
    if layout in ("channels_last", "channels_last_3d"):
        return x.contiguous(memory_format=getattr(torch, layout))
    if layout == "permuted":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x if layout is None else getattr(layouts, layout)(x)


def rows_of(shape):
    return tuple(n for d, n in enumerate(shape) if d != (1 if len(shape) > 1 else 0))


def problem(shape, dtype, layout=None, kind="index", weighted=False, ignored=False, **arguments):
    """(input, target, keyword arguments)"""
    classes = shape[1] if len(shape) > 1 else shape[0]
    x = lay_out((torch.randn(shape, dtype=torch.float64) * 3).to(dtype), layout)
    if kind == "probability":
        target = torch.randn(shape, dtype=torch.float64).softmax(1 if len(shape) > 1 else 0)
        target = lay_out(target.to(dtype), layout)
    else:
        target = torch.randint(classes, rows_of(shape))
    if weighted:
        arguments["weight"] = (torch.rand(classes) + 0.1).to(dtype)
    if ignored and kind == "index":
        target = torch.where(torch.rand(target.shape) < 0.3, classes + 5, target)
        arguments["ignore_index"] = classes + 5
    return x, target, arguments


def upstream_of(target, kind, reduction):
    """One number per row for "none", one that is not 1 otherwise."""
    if reduction != "none":
        return torch.tensor(0.3)
    rows = rows_of(target.shape) if kind == "probability" else target.shape
    return torch.rand(rows)


def evaluate(function, x, target, arguments, upstream=None, dtype=None):
    """Loss and the gradient of the input, in ``dtype``."""
    dtype = dtype or x.dtype
    arguments = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in arguments.items()}
    target = target.to(dtype) if target.is_floating_point() else target
    x = x.to(dtype).detach().requires_grad_()
    loss = function(x, target, **arguments)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(dtype)
    return loss, torch.autograd.grad(loss, x, upstream)[0]


def check(draw, stock=F.cross_entropy, factor=2.0, rows=300):
    """Ours against ``stock``; ``draw()`` gives (input, target, arguments, upstream gradient).

    Errors are pooled over so many rows (in at most 24 draws): of few, stock gets some by luck.
    """
    results, drawn = [], 0
    while drawn < rows and len(results) < 3 * 24:
        x, target, arguments, upstream = draw()
        for function, dtype in ((cross_entropy, None), (stock, None), (stock, torch.float64)):
            results.append(evaluate(function, x, target, arguments, upstream, dtype))
        drawn += x.numel() // x.shape[1 if x.dim() > 1 else 0]
    for i, name in enumerate(("loss", "grad input")):
        assert_no_worse(name, *([result[i] for result in results[j::3]] for j in range(3)), factor)
    return x, results[-3]


def with_extras(x, target, weight=None, ignore_index=-100, reduction="mean", **arguments):
    """The extras by their definition."""
    softcap, z_loss = arguments.get("softcap"), arguments.get("z_loss", 0.0)
    numbers = {"none": 0, "mean": 1, "sum": 2}[reduction], ignore_index
    smoothing = arguments.get("label_smoothing", 0.0)
    return cross_entropy_reference(x, target, weight, *numbers, smoothing, softcap or 0.0, z_loss)[
        0
    ]


# ------------------------------------------------------------------------------ against stock


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_index_targets(shape, dtype, reduction, own, poisoned):
    size, layout = SHAPES[shape]

    def draw():
        x, target, arguments = problem(size, dtype, layout, reduction=reduction)
        return x, target, arguments, upstream_of(target, "index", reduction)

    x, (_, gradient) = check(draw)
    assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", MORE_THAN_ONE_CLASS)
def test_weights_ignored_rows_smoothing_probabilities(
    shape, reduction, smoothing, kind, own, poisoned
):
    size, layout = SHAPES[shape]
    for dtype in (torch.float32, torch.bfloat16):

        def draw(dtype=dtype):
            arguments = {"reduction": reduction, "label_smoothing": smoothing}
            x, target, arguments = problem(size, dtype, layout, kind, True, True, **arguments)
            return x, target, arguments, upstream_of(target, kind, reduction)

        check(draw, rows=2000 if layout == "expanded" else 300)  # expanded: one row, repeated


EXTRAS = [{"softcap": 4.0}, {"z_loss": 0.3}, {"softcap": 2.5, "z_loss": 0.1}]


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "shape",
    ["two_classes", "transposed_tail", "rows_1000", "rows_chunk_and_one", "columns"]
    + ["columns_many_classes", "channels_last", "matrix_transposed", "every_second_class"],
)
def test_softcap_and_z_loss(shape, reduction, kind, own, poisoned):
    size, layout = SHAPES[shape]
    for dtype, extras in itertools.product((torch.float32, torch.float16), EXTRAS):

        def draw(dtype=dtype, extras=extras):
            arguments = {"reduction": reduction, "label_smoothing": 0.1, **extras}
            x, target, arguments = problem(size, dtype, layout, kind, True, True, **arguments)
            return x, target, arguments, upstream_of(target, kind, reduction)

        check(draw, stock=with_extras)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("shape", ["unbatched", "rows_three_chunks", "columns", "channels_last"])
def test_lse(shape, kind, dtype, own, poisoned):
    """lse is torch.logsumexp of the capped logits, at ignored rows too, and differentiable."""
    size, layout = SHAPES[shape]
    x, target, arguments = problem(size, dtype, layout, kind, ignored=True)
    class_dim = 1 if len(size) > 1 else 0

    def values(x, function):
        x = x.detach().requires_grad_()
        wide = x.double() if x.dtype == torch.float64 else x.float()
        capped = 5.0 * torch.tanh(wide / 5.0)
        loss, lse = function(x, capped, target.to(x.dtype) if kind == "probability" else target)
        gradient = torch.autograd.grad((loss, lse), x, (upstream.to(loss.dtype), on_lse.to(lse)))
        return lse, gradient[0]

    def ours(x, capped, target):
        arguments["softcap"] = 5.0
        return cross_entropy(x, target, **arguments, reduction="none", return_lse=True)

    def stock(x, capped, target):
        arguments.pop("softcap", None)
        target = target.to(capped.dtype) if kind == "probability" else target
        loss = F.cross_entropy(capped, target, **arguments, reduction="none")
        return loss.to(x.dtype), torch.logsumexp(capped, class_dim)

    upstream, on_lse = torch.rand(2, *rows_of(size), dtype=torch.float64)
    triples = zip(values(x, ours), values(x, stock), values(x.double(), stock), strict=True)
    for name, triple in zip(("lse", "grad input"), triples, strict=True):
        assert_no_worse(name, *triple)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 24), min_size=1, max_size=5).filter(
        lambda shape: math.prod(shape) < 20000
    ),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    kind=st.sampled_from(["index", "probability"]),
    smoothing=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_drawn_shapes_and_strides(data, shape, reduction, kind, smoothing, dtype, seed):
    dlkernels.config.kernels = "own"
    torch.manual_seed(seed)
    order = data.draw(st.permutations(range(len(shape))))
    inverse = [order.index(d) for d in range(len(shape))]
    step, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(0, len(shape) - 1))
    every = (slice(None),) * dim + (slice(None, None, step),)

    def draw():
        arguments = {"reduction": reduction, "label_smoothing": smoothing}
        x, target, arguments = problem(tuple(shape), dtype, None, kind, True, True, **arguments)
        x = x.permute(order).contiguous().permute(inverse)
        x = x.repeat_interleave(step, dim)[every]
        return x, target, arguments, upstream_of(target, kind, reduction)

    check(draw, factor=4.0, rows=24)  # hypothesis looks for the worst luck


def test_more_than_two_to_the_31_elements(own):
    """Offsets are 64 bits wide: the last row lies beyond 2^31 elements (bf16 of stride 0 rows)."""
    row = torch.randn(2**16, dtype=torch.bfloat16)
    x = row.expand(2**15 + 1, 2**16)
    target = torch.full((2**15 + 1,), -100)
    target[-1] = 7
    loss = cross_entropy(x, target, reduction="sum")
    assert_no_worse(
        "loss",
        loss,
        F.cross_entropy(row, target[-1]),
        F.cross_entropy(row.double(), target[-1]),
    )


# ---------------------------------------------------------------------------------- special values


ONE_OF_EACH_WALK = ["rows_1000", "rows_three_chunks", "transposed_tail", "columns"]


@pytest.mark.parametrize("shape", ONE_OF_EACH_WALK)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e4, -1e4])
def test_special_logits(shape, value, own, poisoned):
    """inf, NaN and logits far apart give what stock gives; a class of -inf has gradient 0."""
    size, layout = SHAPES[shape]

    def draw():
        x, target, arguments = problem(size, torch.float32, layout, reduction="none")
        spread = (torch.rand_like(x) < 0.1).scatter(1, target.unsqueeze(1), False)
        return x.masked_fill(spread, value), target, arguments, torch.rand(target.shape)

    x, (_, gradient) = check(draw, factor=4.0)  # few rows are left to compare
    if value == float("-inf"):
        assert (gradient[x == value] == 0).all()


@pytest.mark.parametrize("shape", ONE_OF_EACH_WALK)
def test_leading_classes_of_minus_infinity(shape, own, poisoned):
    size, _ = SHAPES[shape]
    half = size[1] // 2

    def draw():
        x, target, arguments = problem(size, torch.float32, reduction="none")
        x[:, :half] = float("-inf")
        x[0] = float("-inf")
        return x, target.clamp(min=half), arguments, torch.rand(target.shape)

    check(draw)
    x, target, *_ = draw()
    lse = cross_entropy(x, target, return_lse=True)[1]
    assert_no_worse("lse", lse, x.logsumexp(1), x.double().logsumexp(1))


def test_all_rows_ignored(own):
    x = torch.randn(6, 90, requires_grad=True)
    target = torch.full((6,), -100)
    loss = cross_entropy(x, target, z_loss=1.0)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient == 0).all()
    assert cross_entropy(x, target, z_loss=1.0, reduction="sum") == 0


def test_weights_are_never_read_at_ignored_targets(own):
    """The values of ignored targets are far outside of the weights."""
    x = torch.randn(4, 80)
    for ignored in (-100, 2**40, -(2**62)):
        target = torch.tensor([1, ignored, 2, ignored])
        loss = cross_entropy(x, target, torch.rand(80), ignore_index=ignored)
        assert loss.isfinite()


@pytest.mark.parametrize(
    "shape", [(0, 5), (0, 5, 3), (2, 5, 0), (0, 5, 2, 2), (2, 5, 0, 3), (2, 5, 3, 0)], ids=str
)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_empty(shape, kind, own):
    x = torch.randn(shape, requires_grad=True)
    target = torch.randn(shape) if kind == "probability" else torch.zeros(rows_of(shape)).long()
    for reduction in ("none", "mean", "sum"):
        ours = cross_entropy(x, target, reduction=reduction)
        stock = F.cross_entropy(x, target, reduction=reduction)
        assert torch.equal(ours.isnan(), stock.isnan()) and ours.shape == stock.shape
        (gradient,) = torch.autograd.grad(ours.sum(), x)
        assert gradient.shape == x.shape


def test_golden_values(own):
    """The documented networks' first example."""
    cases = [
        ([[0.1, 0.2, 0.9], [1.1, 0.1, 0.2], [0.2, 2.1, 0.1]], 0.4966353),
        ([[0.8, 0.2, 0.3], [0.2, 0.3, 0.5], [0.2, 0.2, 0.5]], 1.2388996),
    ]
    rows = [(0.076970, 0.085065, -0.162034), (0.154654, 0.084876, -0.239531)]
    for (logits, wanted), row in zip(cases, rows, strict=True):
        x = torch.tensor(logits, requires_grad=True)
        loss = cross_entropy(x, torch.tensor([2, 0, 1]))
        assert loss.item() == pytest.approx(wanted, abs=1e-6)
        loss.backward()
        assert x.grad[0].tolist() == pytest.approx(row, abs=1e-6)


# ---------------------------------------------------------------------------------------- autograd

VARIANTS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smooth_weighted": {"label_smoothing": 0.1, "weight": torch.rand(7, dtype=torch.float64)},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.1, "reduction": "none"},
    "all": {"softcap": 3.0, "z_loss": 0.01, "return_lse": True, "label_smoothing": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3), (7,)], ids=str)
def test_gradcheck_and_gradgradcheck(variant, shape, own):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(7, rows_of(shape))
    if target.dim():
        target.view(-1)[1] = -100
    probability = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradient(lambda x: cross_entropy(x, target, **VARIANTS[variant]), x)
        assert check_gradient(
            lambda x, t: cross_entropy(x, t, **VARIANTS[variant]), (x, probability)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_probabilities(dtype, own):
    for shape in ((6, 100), (2, 20, 9)):
        x, target, _ = problem(shape, dtype, kind="probability")

        def gradient(function, x, target):
            target = target.detach().requires_grad_()
            loss = function(x, target, reduction="sum", label_smoothing=0.1)
            return torch.autograd.grad(loss, target)[0]

        assert_no_worse(
            "grad target",
            gradient(cross_entropy, x, target),
            gradient(F.cross_entropy, x, target),
            gradient(F.cross_entropy, x.double(), target.double()),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_second_backward(dtype, reduction, own):
    """retain_graph: each backward is right for its upstream gradient, and leaves others alone."""
    x, target, arguments = problem((9, 300), dtype)
    loss = cross_entropy(x.requires_grad_(), target, reduction=reduction)
    check_second_backward(loss, [x], torch.full_like(loss, 2.0), 0.25)


def test_gradients_accumulate_and_are_not_shared(own):
    x = torch.randn(20, 200, requires_grad=True)
    target = torch.randint(200, (20,))
    loss = cross_entropy(x, target)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)


def test_input_changed_in_place_is_refused(own):
    x = torch.randn(20, 200, requires_grad=True)
    y = x * 1
    loss = cross_entropy(y, torch.randint(200, (20,)))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_upstream_gradient_of_stride_zero(own):
    x = torch.randn(20, 200, requires_grad=True)
    target = torch.randint(200, (20,))
    cross_entropy(x, target, reduction="none").sum().backward()
    exact = torch.autograd.grad(F.cross_entropy(y := x.double(), target, reduction="sum"), y)[0]
    torch.testing.assert_close(x.grad.double(), exact, atol=1e-6, rtol=0)


def test_float16_gradient_keeps_what_a_loss_scale_lifts(own):
    """A gradient below float16's range is not rounded before GradScaler's factor is applied."""
    x = torch.randn(4096, 200).half().requires_grad_()
    target = torch.randint(200, (4096,))
    scale = torch.tensor(1024.0, dtype=torch.float16)
    gradient = torch.autograd.grad(cross_entropy(x, target), x, scale)[0]
    y = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(y, target), y, scale.double())[0]
    assert ((gradient.double() - exact).norm() / exact.norm()).item() < 1e-3


def test_no_gradient_work_where_none_is_needed(own):
    x = torch.randn(8, 100, requires_grad=True)
    target = torch.randint(100, (8,))
    with torch.no_grad():
        loss = cross_entropy(x, target)
    assert not loss.requires_grad
    assert not cross_entropy(x.detach(), target).requires_grad
    with torch.inference_mode():
        assert not cross_entropy(x, target).requires_grad
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cross_entropy(x.detach(), target)
    names = {event.key for event in profile.key_averages()}
    assert "dlkernels::cross_entropy_forward" in names
    assert "dlkernels::cross_entropy_forward_backward" not in names


def test_raw_ops_refuse_to_be_differentiated():
    x = torch.randn(8, 100, requires_grad=True)
    target = torch.randint(100, (8,))
    loss, lse, total = ops.cross_entropy_forward(x, target, None, 1, -100, 0.0, 0.0, 0.0)
    with pytest.raises(NotImplementedError, match="raw op"):
        loss.backward()
    gradient = ops.cross_entropy_backward(
        torch.ones(()), None, x, target, None, lse.detach(), total, 1, -100, 0.0, 0.0, 0.0
    )
    with pytest.raises(NotImplementedError, match="raw op"):
        gradient.sum().backward()


# ------------------------------------------------------------------------- the rest of torch


def test_opcheck():
    x = torch.randn(4, 6, 3)
    target = torch.randint(6, (4, 3))
    weight = torch.rand(6)
    for reduction, t in itertools.product((0, 1, 2), (target, torch.rand_like(x))):
        options = (reduction, -100, 0.1, 3.0, 0.01)
        inputs = (x, t, weight, *options)
        torch.library.opcheck(ops.cross_entropy.default, (x.clone().requires_grad_(), *inputs[1:]))
        torch.library.opcheck(ops.cross_entropy_forward.default, inputs)
        if reduction:
            torch.library.opcheck(ops.cross_entropy_forward_backward.default, inputs)
        loss, lse, total = ops.cross_entropy_forward(*inputs)
        for on_lse in (None, lse):
            torch.library.opcheck(
                ops.cross_entropy_backward.default,
                (torch.ones_like(loss), on_lse, x, t, weight, lse, total, *options),
            )
    torch.library.opcheck(ops.cross_entropy_scale_.default, (x.clone(), torch.tensor(2.0)))


@pytest.mark.parametrize("arguments", [{}, {"z_loss": 0.1}], ids=str)
def test_a_jit_trace_holds_torchs_ops_alone(arguments, own):
    loss = dlkernels.nn.CrossEntropyLoss(**arguments)
    inputs = torch.randn(6, 40), torch.randint(40, (6,))
    traced = torch.jit.trace(loss, inputs)
    assert not any("dlkernels" in node.kind() for node in traced.graph.nodes())
    torch.testing.assert_close(traced(*inputs), loss(*inputs))


@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("arguments", [{}, {"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.1}])
def test_compile(layout, arguments, own):
    """One graph without a break, one compilation for every batch size."""
    torch._dynamo.reset()  # the other parameters have compiled the same lines
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, t: cross_entropy(x, t, **arguments), fullgraph=True, dynamic=True, backend=counter
    )
    graphs = None
    for batch in (3, 5, 8):
        x, target, _ = problem((batch, 30, 4, 5), torch.float32, layout)
        results = [
            evaluate(function, x, target, {}, torch.tensor(0.5))
            for function in (compiled, lambda x, t: cross_entropy(x, t, **arguments))
        ]
        torch.testing.assert_close(results[0][0], results[1][0], atol=0, rtol=1e-6)
        torch.testing.assert_close(results[0][1], results[1][1], atol=1e-7, rtol=1e-5)
        assert results[0][1].stride() == results[1][1].stride()
        graphs = graphs or list(counter.graphs)
        assert len(counter.graphs) == len(graphs), "compiled again for another batch"
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(ops.cross_entropy) + targets.count(ops.cross_entropy.default) == 1


def test_compile_of_func_grad_is_not_zero(own):
    x = torch.randn(5, 70)
    target = torch.randint(70, (5,))
    gradient = torch.func.grad(lambda x: cross_entropy(x, target))
    wanted = torch.func.grad(lambda x: F.cross_entropy(x, target))(x)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(gradient(x), wanted)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.parametrize("extras", [{}, {"z_loss": 0.2, "softcap": 4.0}])
def test_vmap_and_forward_mode(extras, own):
    x = torch.randn(6, 3, 50)
    target = torch.randint(50, (6, 3))
    batched = torch.func.vmap(lambda x, t: cross_entropy(x, t, **extras))(x, target)
    looped = torch.stack([cross_entropy(*pair, **extras) for pair in zip(x, target, strict=True)])
    torch.testing.assert_close(batched, looped)
    tangent = torch.randn_like(x[0])
    _, ours = torch.func.jvp(lambda x: cross_entropy(x, target[0], **extras), (x[0],), (tangent,))
    leaf = x[0].clone().requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(leaf, target[0], **extras), leaf)[0]
    torch.testing.assert_close(ours, (gradient * tangent).sum())


def test_export(own):
    class Loss(torch.nn.Module):
        def forward(self, x, target):
            return cross_entropy(x, target, z_loss=0.1)

    inputs = (torch.randn(8, 50), torch.randint(50, (8,)))
    batch = torch.export.Dim("batch")
    program = torch.export.export(Loss(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops.cross_entropy.default in targets
    inputs = (torch.randn(3, 50), torch.randint(50, (3,)))
    assert torch.equal(program.module()(*inputs), Loss()(*inputs))


def test_autocast(own):
    """The loss is computed in float32, as stock's."""
    x, target, _ = problem((8, 100), torch.bfloat16)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = cross_entropy(x, target), F.cross_entropy(x, target)
        weighted = cross_entropy(x, target, torch.rand(100))
    assert ours.dtype == stock.dtype == weighted.dtype == torch.float32
    torch.testing.assert_close(ours, stock)
    assert torch.autograd.grad(ours, x)[0].dtype == torch.bfloat16


def test_module(own):
    loss = dlkernels.nn.CrossEntropyLoss(torch.rand(50), ignore_index=3, softcap=4.0, z_loss=0.1)
    x, target, _ = problem((8, 50), torch.float32)
    wanted = cross_entropy(x, target, loss.weight, ignore_index=3, softcap=4.0, z_loss=0.1)
    assert torch.equal(loss(x, target), wanted)


# ------------------------------------------------------------------------------------- refusals


def refusals():
    x, t = torch.randn(4, 6), torch.randint(6, (4,))
    return {
        "target_too_large": (x, torch.tensor([0, 6, 1, 2]), {}),
        "target_negative": (x, torch.tensor([0, -1, 1, 2]), {}),
        "target_too_large_in_pixels": (torch.randn(2, 6, 3), torch.full((2, 3), 9), {}),
        "ignored_index_does_not_hide_others": (x, torch.full((4,), -100), {"ignore_index": 2}),
        "batch": (x, torch.randint(6, (5,)), {}),
        "pixels": (torch.randn(2, 6, 3), torch.randint(6, (2, 4)), {}),
        "target_rank": (x, torch.randint(6, (4, 1)), {}),
        "scalar_input": (torch.randn(()), torch.tensor(0), {}),
        "target_int32": (x, t.int(), {}),
        "target_bool": (x, t.bool(), {}),
        "probability_shape": (x, torch.rand(4, 5), {}),
        "probability_ignore_index": (x, torch.rand(4, 6), {"ignore_index": 2}),
        "weight_size": (x, t, {"weight": torch.rand(5)}),
        "weight_rank": (x, t, {"weight": torch.rand(6, 1)}),
        "weight_dtype": (x, t, {"weight": torch.rand(6, dtype=torch.float64)}),
        "integer_input": (x.long(), t, {}),
        "reduction": (x, t, {"reduction": "average"}),
        "reduction_is_no_text": (x, t, {"reduction": ["mean"]}),
        "smoothing": (x, t, {"label_smoothing": 1.5}),
        "no_smoothing": (x, t, {"label_smoothing": None}),
        "ignore_index_is_no_integer": (x, t, {"ignore_index": 1.5}),
        "no_tensor": ([1.0], t, {}),
        "no_target": (x, 3, {}),
    }


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals())
def test_refusals_are_stocks(case, kernels):
    dlkernels.config.kernels = kernels
    x, target, arguments = refusals()[case]
    with pytest.raises(Exception) as stock:  # noqa: B017  whatever it is, ours is the same
        F.cross_entropy(x, target, **arguments)
    with pytest.raises(stock.type) as ours:
        cross_entropy(x, target, **arguments)
    assert str(ours.value).splitlines()[0] == str(stock.value).splitlines()[0]
    with pytest.raises(stock.type):
        cross_entropy(x, target, **arguments, z_loss=0.1)


@pytest.mark.parametrize(
    "extras", [{"softcap": 0.0}, {"softcap": -1.0}, {"softcap": float("nan")}, {"z_loss": -0.1}]
)
def test_refusals_of_extras(extras):
    (name, value), x = next(iter(extras.items())), torch.randn(4, 6)
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        cross_entropy(x, torch.randint(6, (4,)), **extras)


def test_refusals_of_raw_ops():
    """No path into a kernel is unchecked."""
    x, target = torch.randn(4, 6), torch.randint(6, (4,))
    options = (1, -100, 0.0, 0.0, 0.0)
    bad = {
        "target of shape \\[4\\], got \\[5\\]": (x, torch.randint(6, (5,)), None, *options),
        "target of dtype": (x, target.int(), None, *options),
        "input of dtype": (x.int(), target, None, *options),
        "weight of shape \\[6\\], got \\[5\\]": (x, target, torch.rand(5), *options),
        "weight of dtype": (x, target, torch.rand(6).double(), *options),
        "at least 1 dimension": (x.sum(), target, None, *options),
        "at least one class": (x[:, :0], target, None, *options),
        "reduction 0, 1 or 2, got 3": (x, target, None, 3, *options[1:]),
        "label_smoothing between 0 and 1, got 2": (x, target, None, 1, -100, 2.0, 0.0, 0.0),
        "softcap of at least 0, got -1": (x, target, None, 1, -100, 0.0, -1.0, 0.0),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            ops.cross_entropy_forward(*arguments)
    with pytest.raises(RuntimeError, match="mean or sum"):
        ops.cross_entropy_forward_backward(x, target, None, 0, *options[1:])
    loss, lse, total = ops.cross_entropy_forward(x, target, None, *options)
    good = [loss, None, x, target, None, lse, total, *options]
    for at, value, message in (
        (0, loss.double(), "grad_loss of dtype"),
        (0, loss.expand(4), "grad_loss of shape"),
        (1, lse.float(), "grad_lse of dtype"),
        (5, lse[:3], "lse of shape"),
        (5, lse[:1].expand(4), "contiguous lse"),
        (6, total.float(), "total_weight of dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.cross_entropy_backward(*good[:at], value, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="dense gradient"):
        ops.cross_entropy_scale_(x[:, ::2], torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="grad_loss of shape"):
        ops.cross_entropy_scale_(x, torch.rand(2))
    with pytest.raises(RuntimeError, match="gradient of dtype float32, .*(?i:int)"):
        ops.cross_entropy_scale_(x.int(), torch.tensor(2, dtype=torch.int32))


def test_raw_ops_refuse_a_target_out_of_range():
    with pytest.raises(IndexError, match="Target 77 is out of bounds"):
        ops.cross_entropy_forward(
            torch.randn(4, 6), torch.full((4,), 77), None, 1, -100, 0.0, 0.0, 0.0
        )


def test_legacy_arguments():
    x, target, _ = problem((40, 100), torch.float32)
    for arguments in ({"size_average": False}, {"reduce": False}, {"size_average": True}):
        with pytest.warns(UserWarning, match="deprecated"):
            ours = cross_entropy(x, target, **arguments)
        with pytest.warns(UserWarning, match="deprecated"):
            torch.testing.assert_close(ours, F.cross_entropy(x, target, **arguments))


def test_uint8_targets(own):
    x = torch.randn(50, 200)
    target = torch.randint(200, (50,))
    assert torch.equal(cross_entropy(x, target.byte()), cross_entropy(x, target))


# ----------------------------------------------------------------------------------- which kernel


def test_choice():
    x, target = torch.randn(64, 100), torch.randint(100, (64,))
    ours = f"cpu/{dlkernels.config.libraries['cpu']}"

    def chosen(kernels, *arguments, **keywords):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            cross_entropy(*arguments, **keywords)
        assert len(choices) == 1
        return choices[0].kernel

    assert chosen("auto", x, target) == ours
    assert chosen("own", x[:1], target[:1]) == ours
    assert chosen("auto", x[:1], target[:1]) == "stock"
    assert chosen("auto", x[:1], target[:1], z_loss=0.1) == ours
    assert chosen("stock", x, target) == "stock"
    assert chosen("stock", x, target, z_loss=0.1) == "reference"
    weight = torch.rand(100, requires_grad=True)
    probability = torch.rand_like(x)
    assert chosen("auto", x, probability, weight) == "stock"
    with pytest.raises(NotImplementedError, match="weight"):
        chosen("own", x, probability, weight)


# ------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize("shape", ["rows_1000", "transposed_many_blocks", "columns_many_blocks"])
def test_the_same_bits_for_any_number_of_threads(shape, own):
    size, layout = SHAPES[shape]
    size = (size[0] * 40, *size[1:])
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), ("mean", "none")):
        x, target, arguments = problem(size, dtype, layout, weighted=True, ignored=True)
        arguments["reduction"] = reduction
        assert_same_for_any_number_of_threads(evaluate, cross_entropy, x, target, arguments)


def test_four_threads_at_once(own):
    cases = [problem((200, 500 + i), torch.float32, weighted=True) for i in range(4)]
    assert_same_in_threads_at_once(evaluate, [(cross_entropy, *case) for case in cases])


def test_in_a_forked_child(own):
    x, target, _ = problem((300, 1000), torch.float32)
    assert_same_in_a_forked_child(evaluate, cross_entropy, x, target, {})

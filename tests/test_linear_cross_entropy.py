"""linear_cross_entropy against torch's own: loss, gradients, layouts, dtypes, refusals, memory."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
import torch
from compare import assert_no_worse
from functorch.compile import make_boxed_func
from graphs import check_second_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import (
    assert_same_for_any_number_of_threads,
    assert_same_in_a_forked_child,
    assert_same_in_threads_at_once,
)
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dlkernels
from dlkernels.functional import linear_cross_entropy
from dlkernels.ops import linear_cross_entropy as contract

ops = torch.ops.dlkernels
ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]
NAMES = ("loss", "grad input", "grad weight", "grad bias")

# id: shape of the input, shape of the weight without its features. On each side of what the kernel
# switches on: logits in the memory of the weight's gradient (no more rows than features), else
# chunks of 48 rows, of a twelfth of them, of 384, without gradients of 512; blocks of 96 classes
# (48 with AVX2), from 6144 classes on several in one of 64 ranges; blocks of 256 rows; products
# deeper than 256; positions.
SHAPES = {
    "unbatched": ((9,), (21,)),
    "one_class": ((5, 7), (1,)),
    "one_feature": ((9, 1), (5,)),
    "one_row": ((1, 7), (130,)),
    "in_place": ((33, 40), (97,)),
    "in_place_as_many_rows": ((40, 40), (96,)),
    "in_place_deep": ((259, 300), (97,)),
    "one_row_more_than_features": ((41, 40), (50,)),
    "one_chunk": ((48, 8), (95,)),
    "one_chunk_and_one": ((49, 8), (100,)),
    "chunks_of_a_twelfth": ((1000, 20), (61,)),
    "chunks_of_384": ((4700, 3), (5,)),
    "forward_in_chunks": ((513, 9), (30,)),
    "ranges": ((7, 5), (6145,)),
    "ranges_in_place": ((5, 9), (6144,)),
    "positions": ((60, 9), (40, 3)),
    "positions_in_place": ((20, 30), (98, 3)),
    "positions_of_two_dimensions": ((5, 6), (7, 2, 3)),
}
MORE_THAN_ONE_CLASS = [name for name in SHAPES if name != "one_class"]
ONE_OF_EACH_WALK = ["unbatched", "in_place", "one_chunk_and_one", "ranges", "positions"]


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread only waits here, on a machine that is busy; the tests of threads set more."""
    torch.set_num_threads(1)


def problem(
    shape, outputs, dtype, kind="index", bias=True, weighted=False, ignored=False, **arguments
):
    """(input, weight, bias, target, keyword arguments), with logits as of a trained layer."""
    x = torch.randn(shape)
    weight = torch.randn(*outputs, shape[-1]) * (2 / max(1, shape[-1]) ** 0.5)
    classes, rows = outputs[0], (*shape[:-1], *outputs[1:])
    if kind == "probability":
        target = torch.randn(*shape[:-1], *outputs).softmax(len(shape) - 1).to(dtype)
    else:
        target = torch.randint(classes, rows)
    if weighted:
        arguments["weight"] = (torch.rand(classes) + 0.1).to(dtype)
    if ignored and kind == "index":
        target = torch.where(torch.rand(target.shape) < 0.3, classes + 5, target)
        arguments["ignore_index"] = classes + 5
    b = torch.randn(outputs).to(dtype) if bias else None
    return x.to(dtype), weight.to(dtype), b, target, arguments


def upstream_of(case):
    """One number per row for "none", one that is not 1 otherwise."""
    x, weight, _, _, arguments = case
    if arguments.get("reduction", "mean") != "none":
        return torch.tensor(0.3)
    return torch.rand((*x.shape[:-1], *weight.shape[1:-1]))


def stock(x, w, target, *, linear_bias=None, ignore_index=None, **arguments):
    """What torch's function does; torch below 2.13 has none."""
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(x, w.flatten(0, -2), bias).reshape(*x.shape[:-1], *w.shape[:-1])
    ignore_index = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(logits, target, ignore_index=ignore_index, **arguments)


def with_extras(
    x, w, target, *, linear_bias=None, reduction="mean", ignore_index=None, **arguments
):
    """The extras by their definition."""
    class_weight = arguments.pop("weight", None)
    rows, outputs, positions = x.shape[:-1], w.shape[:-1], math.prod(w.shape[1:-1])
    n, exact = math.prod(rows), torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = (n, outputs[0], positions) if target.is_floating_point() else (n, positions)
    loss = contract.linear_cross_entropy_reference(
        x.reshape(n, x.shape[-1]),
        w.reshape(outputs[0], positions, w.shape[-1]),
        None if linear_bias is None else linear_bias.reshape(outputs[0], positions),
        target.reshape(wide),
        None if class_weight is None else class_weight.to(exact),
        REDUCTIONS.index(reduction),
        -100 if ignore_index is None else ignore_index,
        arguments.get("label_smoothing", 0.0),
        arguments.get("softcap") or 0.0,
        arguments.get("z_loss", 0.0),
    ).to(x.dtype)
    return loss.reshape((*rows, *outputs[1:])) if reduction == "none" else loss


def evaluate(function, case, upstream=None, dtype=None, wanted=(True, True, True)):
    """Loss and the wanted gradients of input, weight and bias, in ``dtype``."""
    x, weight, bias, target, arguments = case
    dtype = dtype or x.dtype
    arguments = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in arguments.items()}
    target = target.to(dtype) if target.is_floating_point() else target
    x, weight, bias = (
        t if t is None else t.detach().to(dtype).requires_grad_(want)
        for t, want in zip((x, weight, bias), wanted, strict=True)
    )
    loss = function(x, weight, target, linear_bias=bias, **arguments)
    leaves = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss, *torch.autograd.grad(loss, leaves, upstream)


def check(draw, stock=stock, factor=2.0, rows=100, ours=linear_cross_entropy):
    """Ours against ``stock``; ``draw()`` gives a problem.

    Errors are pooled over so many rows (in at most 24 draws): of few, stock gets some by luck.
    """
    results, drawn = [], 0
    while drawn < rows and len(results) < 3 * 24:
        case = draw()
        upstream = upstream_of(case)
        for function, dtype in ((ours, None), (stock, None), (stock, torch.float64)):
            results.append(evaluate(function, case, upstream, dtype))
        drawn += math.prod(case[0].shape[:-1]) * math.prod(case[1].shape[1:-1])
    for i, name in enumerate(NAMES[: len(results[0])]):
        assert_no_worse(name, *([result[i] for result in results[j::3]] for j in range(3)), factor)
    for gradient in results[-3][1:]:
        assert gradient.is_contiguous()
    return case, results[-3]


# ------------------------------------------------------------------------------ against stock


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_index_targets(shape, dtype, reduction, bias, own, poisoned):
    check(lambda: problem(*SHAPES[shape], dtype, bias=bias, reduction=reduction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_without_gradients(shape, dtype, own, poisoned):
    """512 rows at a time, and no logits beyond a block of classes."""
    for reduction in ("none", "sum"):
        results = []
        for _ in range(8):
            x, weight, bias, target, arguments = problem(*SHAPES[shape], dtype, reduction=reduction)
            results.append(linear_cross_entropy(x, weight, target, linear_bias=bias, **arguments))
            for d in (dtype, torch.float64):
                results.append(
                    stock(x.to(d), weight.to(d), target, linear_bias=bias.to(d), **arguments)
                )
        assert_no_worse("loss", *(results[j::3] for j in range(3)))


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", MORE_THAN_ONE_CLASS)
def test_linear_weights_ignored_rows_smoothing_probabilities(
    shape, reduction, smoothing, kind, own, poisoned
):
    for dtype in (torch.float32, torch.bfloat16):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        check(lambda: problem(*SHAPES[shape], dtype, kind, True, True, True, **options))  # noqa: B023


EXTRAS = [{"softcap": 4.0}, {"z_loss": 0.3}, {"softcap": 2.5, "z_loss": 0.1}]


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", ONE_OF_EACH_WALK)
def test_linear_softcap_and_z_loss(shape, reduction, kind, own, poisoned):
    for dtype, extras in itertools.product((torch.float32, torch.float16), EXTRAS):
        options = {"reduction": reduction, "label_smoothing": 0.1, **extras}
        check(
            lambda: problem(*SHAPES[shape], dtype, kind, True, True, True, **options),  # noqa: B023
            stock=with_extras,
            rows=40 if shape == "ranges" else 200,
        )


# id: layout of the input, of the weight.
LAYOUTS = {
    "input_transposed": (layouts.transposed, layouts.same_memory),
    "input_sliced_rows": (layouts.sliced_rows, layouts.same_memory),
    "input_sliced_columns": (layouts.sliced_columns, layouts.same_memory),
    "input_every_second": (layouts.every_second, layouts.same_memory),
    "input_expanded": (layouts.expanded, layouts.same_memory),
    "input_offset": (layouts.offset, layouts.same_memory),
    "weight_transposed": (layouts.same_memory, layouts.transposed),
    "weight_sliced_rows": (layouts.same_memory, layouts.sliced_rows),
    "weight_sliced_columns": (layouts.same_memory, layouts.sliced_columns),
    "weight_every_second": (layouts.same_memory, layouts.every_second),
    "weight_expanded": (layouts.same_memory, lambda w: w[..., :1].expand_as(w)),
    "weight_offset": (layouts.same_memory, layouts.offset),
    "both_transposed": (layouts.transposed, layouts.transposed),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_layouts(layout, dtype, own, poisoned):
    """Of the probabilities too: a matrix of each row transposed, as of an image's logits."""
    of_input, of_weight = LAYOUTS[layout]
    cases = [((60, 33), (100,), "index"), ((30, 33), (37, 2), "index")]
    for shape, outputs, kind in [*cases, ((60, 33), (50, 3), "probability")]:

        def draw(shape=shape, outputs=outputs, kind=kind):
            x, weight, bias, target, arguments = problem(shape, outputs, dtype, kind)
            target = layouts.transposed(target) if kind == "probability" else target
            return of_input(x), of_weight(weight), layouts.every_second(bias), target, arguments

        x, weight, *_ = draw()
        if "transposed" in layout or "every" in layout or "sliced" in layout:
            assert not (x.is_contiguous() and weight.is_contiguous())
        check_as_they_lie(draw)


def check_as_they_lie(draw):
    """As ``check``, of leaves in the strides that ``draw()`` gives them."""
    results = []
    for _ in range(2):
        x, weight, bias, target, arguments = draw()
        for function, dtype in (
            (linear_cross_entropy, x.dtype),
            (stock, x.dtype),
            (stock, torch.float64),
        ):
            leaves = [
                t.detach().requires_grad_() if dtype == t.dtype else t.to(dtype).requires_grad_()
                for t in (x, weight, bias)
            ]
            t = target.to(dtype) if target.is_floating_point() else target
            loss = function(leaves[0], leaves[1], t, linear_bias=leaves[2], **arguments)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    for i, name in enumerate(NAMES):
        assert_no_worse(name, *([result[i] for result in results[j::3]] for j in range(3)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 120),
    features=st.integers(1, 70),
    outputs=st.lists(st.integers(1, 40), min_size=1, max_size=3).filter(
        lambda outputs: math.prod(outputs) < 400
    ),
    reduction=st.sampled_from(REDUCTIONS),
    kind=st.sampled_from(["index", "probability"]),
    smoothing=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    weight_layout=st.sampled_from(
        [layouts.same_memory, layouts.transposed, layouts.sliced_columns, layouts.every_second]
    ),
    seed=st.integers(0, 2**31),
)
def test_linear_drawn_shapes_and_strides(
    rows, features, outputs, reduction, kind, smoothing, dtype, bias, weight_layout, seed
):
    dlkernels.config.kernels = "own"
    torch.manual_seed(seed)

    def draw():
        options = {"reduction": reduction, "label_smoothing": smoothing}
        x, weight, *rest = problem(
            (rows, features), outputs, dtype, kind, bias, True, True, **options
        )
        return weight_layout(x), weight_layout(weight), *rest

    check(draw, factor=4.0, rows=24)  # hypothesis looks for the worst luck


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch below 2.13")
@pytest.mark.parametrize("shape", ["unbatched", "one_chunk_and_one", "positions"])
def test_what_stands_for_stock_here_is_torchs_function(shape):
    for kind in ("index", "probability"):
        case = problem(*SHAPES[shape], torch.float32, kind, True, True, True)
        for a, b in zip(evaluate(stock, case), evaluate(F.linear_cross_entropy, case), strict=True):
            assert torch.equal(a, b)


def test_more_than_two_to_the_31_elements(own):
    """Offsets are 64 bits wide. The memory between the two rows is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x, weight = far.as_strided((2, 64), (2**31, 1)), far.as_strided((2, 64), (2**31, 1))
    x.copy_(torch.randn(2, 64))
    target = torch.tensor([1, 0])
    assert_no_worse(
        "loss",
        linear_cross_entropy(x, weight, target),
        stock(x.contiguous(), weight.contiguous(), target),
        stock(x.double(), weight.double(), target),
    )


# ---------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("shape", ["in_place", "one_chunk_and_one", "ranges", "positions"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e4, -1e4])
def test_linear_special_logits(shape, value, own, poisoned):
    """inf, NaN and logits far apart give what stock gives, and only in their rows."""
    size, outputs = SHAPES[shape]

    def draw():
        x, weight, bias, target, arguments = problem(size, outputs, torch.float32, reduction="none")
        x[1, 0], weight[:, ..., 0] = value, weight[:, ..., 0].abs()
        bias.view(outputs[0], -1)[outputs[0] // 2] = value if abs(value) == 1e4 else 0
        return x, weight, bias, target, arguments

    _, results = check(draw, factor=4.0)
    assert results[0][0].isfinite().all()


@pytest.mark.parametrize("shape", ["in_place", "one_chunk_and_one", "ranges", "positions"])
def test_classes_of_minus_infinity(shape, own, poisoned):
    """By their bias: whole blocks of classes before the first that is finite; gradients are 0."""
    size, outputs = SHAPES[shape]
    half = outputs[0] // 2

    def draw():
        x, weight, bias, target, arguments = problem(size, outputs, torch.float32, reduction="none")
        bias[:half] = float("-inf")
        return x, weight, bias, target.clamp(min=half), arguments

    _, (_, _, of_weight, of_bias) = check(draw)
    assert (of_weight[:half] == 0).all() and (of_bias[:half] == 0).all()


@pytest.mark.parametrize("features", [4, 80])
def test_linear_all_rows_ignored(features, own, poisoned):
    case = problem((6, features), (90,), torch.float32)
    case = (*case[:3], torch.full((6,), -100), {"z_loss": 1.0})
    loss, *gradients = evaluate(linear_cross_entropy, case)
    assert loss.isnan() and stock(*case[:2], case[3]).isnan()
    assert all((gradient == 0).all() for gradient in gradients)
    case[-1]["reduction"] = "sum"
    assert evaluate(linear_cross_entropy, case)[0] == 0


def test_class_weights_are_never_read_at_ignored_targets(own):
    """The values of ignored targets are far outside of the weights."""
    x, weight, *_ = problem((4, 20), (80,), torch.float32)
    for ignored in (-100, 2**40, -(2**62)):
        target = torch.tensor([1, ignored, 2, ignored])
        loss = linear_cross_entropy(x, weight, target, weight=torch.rand(80), ignore_index=ignored)
        assert loss.isfinite()


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize(
    "shape, outputs",
    [((0, 5), (4,)), ((0, 5), (4, 3)), ((3, 0), (4,)), ((0,), (4,)), ((0, 0), (4,))]
    + [((3, 5), (4, 0)), ((0, 5), (4, 0)), ((3, 5), (4, 2, 0))],
    ids=str,
)
def test_linear_empty(shape, outputs, kind, own, poisoned):
    """No rows, no features (logits are the bias), no positions: NaN where stock's mean is,
    gradients of 0."""
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), REDUCTIONS):
        case = problem(shape, outputs, dtype, kind, reduction=reduction)
        upstream = upstream_of(case)
        ours, wanted = (evaluate(f, case, upstream) for f in (linear_cross_entropy, stock))
        for a, b in zip(ours, wanted, strict=True):
            near = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(a, b, atol=near, rtol=near, equal_nan=True)


# ---------------------------------------------------------------------------------------- autograd

VARIANTS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smooth_weighted": {"label_smoothing": 0.1, "weight": torch.rand(4, dtype=torch.float64)},
    "all": {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.2, "reduction": "none"},
}
SMALL = {"rows": ((3, 2), (4,)), "in_place": ((2, 3), (4,)), "unbatched": ((3,), (4,))}
SMALL["positions"] = (3, 2), (4, 2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SMALL)
def test_linear_gradcheck_and_gradgradcheck(variant, shape, own):
    size, outputs = SMALL[shape]
    x, weight, bias, target, _ = problem(size, outputs, torch.float64)
    if target.dim():
        target.view(-1)[1] = -100
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    probability = torch.rand(*size[:-1], *outputs, dtype=torch.float64, requires_grad=True)

    def loss(x, weight, bias, target=target):
        return linear_cross_entropy(x, weight, target, linear_bias=bias, **VARIANTS[variant])

    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradient(loss, leaves, check_batched_grad=True)
        assert check_gradient(loss, [*leaves, probability])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gradient_of_probabilities(dtype, own):
    for (size, outputs), others in itertools.product(
        (((6, 30), (100,)), ((40, 9), (20, 3))), (True, False)
    ):
        x, weight, bias, target, _ = problem(size, outputs, dtype, "probability")

        def gradients(function, *tensors, others=others):
            leaves = [t.detach().requires_grad_(others or i == 3) for i, t in enumerate(tensors)]
            x, weight, bias, target = leaves
            loss = function(
                x, weight, target, linear_bias=bias, reduction="sum", label_smoothing=0.1
            )
            return torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])

        tensors = (x, weight, bias, target)
        for triple in zip(
            gradients(linear_cross_entropy, *tensors),
            gradients(stock, *tensors),
            gradients(stock, *(t.double() for t in tensors)),
            strict=True,
        ):
            assert_no_worse("gradient", *triple)


class Compiled:
    """linear_cross_entropy under torch.compile, in one graph; which gradients the raw ops in its
    graphs are asked for, and how often it was compiled."""

    def __init__(self, **settings):
        torch._dynamo.reset()  # the other parameters have compiled the same lines
        self.forward, self.backward, self.times = [], [], 0
        by_aot = aot_autograd(fw_compiler=self.note, bw_compiler=self.note)

        def backend(graph, inputs):
            self.times += 1
            return by_aot(graph, inputs)

        self.function = torch.compile(
            linear_cross_entropy, fullgraph=True, backend=backend, **settings
        )

    def note(self, graph, inputs):
        for node in graph.graph.nodes:
            if node.target is ops.linear_cross_entropy.default:
                self.forward.append(tuple(node.args[-3:]))
            if node.target is ops.linear_cross_entropy_backward.default:
                self.backward.append(tuple(node.args[-3:]))
        return make_boxed_func(graph.forward)

    def __call__(self, *arguments, **keywords):
        return self.function(*arguments, **keywords)


class Asked(TorchDispatchMode):
    """Notes which gradients the raw ops are asked for."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ops.linear_cross_entropy.default:
            self.forward.append(args[-3:])
        if function is ops.linear_cross_entropy_backward.default:
            self.backward.append(args[-3:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["in_place", "one_chunk_and_one", "positions"])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_linear_only_the_wanted_gradients(wanted, shape, own, poisoned):
    """A frozen weight, a frozen input: the same values, and no work for the others."""
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), ("mean", "none")):
        case = problem(*SHAPES[shape], dtype, reduction=reduction)
        upstream = upstream_of(case)
        everything = evaluate(linear_cross_entropy, case, upstream)
        with Asked() as asked:
            some = evaluate(linear_cross_entropy, case, upstream, wanted=wanted)
        if reduction == "mean":
            assert asked.forward == [wanted] and asked.backward == []
        else:
            assert asked.forward == [(False, False, False)] and asked.backward == [wanted]
        everything = [t for t, want in zip(everything, (True, *wanted), strict=True) if want]
        for a, b in zip(some, everything, strict=True):
            # Where the weight's gradient is wanted, rows may go in other chunks.
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_a_second_backward(dtype, reduction, own):
    """retain_graph: each backward is right for its upstream gradient, and leaves others alone."""
    x, weight, bias, target, arguments = problem((9, 30), (100,), dtype, reduction=reduction)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = linear_cross_entropy(x, weight, target, linear_bias=bias, **arguments)
    check_second_backward(loss, leaves, torch.full_like(loss, 2.0), 0.25)


def test_gradients_accumulate_and_are_not_shared(own):
    x, weight, bias, target, _ = problem((20, 30), (60,), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = linear_cross_entropy(x, weight, target, linear_bias=bias)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in leaves]
    loss.backward()
    for t, before in zip(leaves, once, strict=True):
        torch.testing.assert_close(t.grad, 2 * before)


def test_a_weight_tied_to_an_embedding(own):
    """The gradient of the weight is the sum of both."""
    _, weight, _, target, _ = problem((20, 30), (60,), torch.float32)
    weight.requires_grad_()
    tokens = torch.randint(60, (20,))
    ours, wanted = (
        torch.autograd.grad(f(F.embedding(tokens, weight), weight, target), weight)[0]
        for f in (linear_cross_entropy, stock)
    )
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("changed", [0, 1])
def test_linear_inputs_changed_in_place_are_refused(changed, own):
    for reduction in ("mean", "none"):
        x, weight, bias, target, _ = problem((20, 30), (60,), torch.float32)
        tensors = [t.requires_grad_() * 1 for t in (x, weight)]
        loss = linear_cross_entropy(*tensors, target, linear_bias=bias, reduction=reduction)
        tensors[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_linear_upstream_gradient_of_stride_zero(own):
    case = problem((20, 9), (30, 3), torch.float32, reduction="none")
    x, weight, bias, target, arguments = case
    for upstream in (torch.ones(()).expand(20, 3), torch.rand(3, 20).t()):
        ours = evaluate(linear_cross_entropy, case, upstream)
        for a, b in zip(ours, evaluate(stock, case, upstream, torch.float64), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def float16_gradients_by_chunks(case, scale):
    """Those that a GPU's raw op makes."""
    x, weight, bias, target, arguments = case
    options = REDUCTIONS.index(arguments["reduction"]), -100, 0.0, 0.0, 0.0
    tensors = x, weight[:, None], bias[:, None], target[:, None], None
    _, of_input, *others = contract._by_chunks(scale, *tensors, options, (True, True, True))
    return of_input, *(gradient.squeeze(1) for gradient in others)


def float16_gradients_by_kernel(case, scale):
    return evaluate(linear_cross_entropy, case, scale)[1:]


@pytest.mark.parametrize("ours", [float16_gradients_by_kernel, float16_gradients_by_chunks])
def test_linear_float16_gradient_keeps_what_a_loss_scale_lifts(ours, own):
    """A gradient below float16's range is not rounded before GradScaler's factor is applied."""
    for shape, classes, spread, reduction, scale in (
        ((4096, 20), 100, 1, "mean", 1024.0),
        ((16, 32), 9000, 4, "mean", 32768.0),
        ((16, 32), 9000, 4, "sum", 4096.0),
    ):
        case = problem(shape, (classes,), torch.float16, reduction=reduction)
        case[1].mul_(spread)
        scale = torch.tensor(scale)
        exact = evaluate(stock, case, scale, torch.float64)[1:]
        for a, b in zip(ours(case, scale), exact, strict=True):
            assert ((a.double() - b).norm() / b.norm()).item() < 2e-3
            if classes > 1000:  # most of which are improbable
                assert not ((a == 0) & (b.abs() > 1e-5)).any()


def test_chunks_of_a_gpu_do_not_overflow_before_their_sums(own):
    """Rows whose upstream gradients float16 does not hold, of sums that it holds."""
    x, weight, bias, target, _ = problem((16, 32), (50,), torch.float16)
    case = x * 1e-3, weight * 1e-3, bias, target, {"reduction": "none"}
    upstream = torch.full((16, 1), 70000.0)
    exact = evaluate(stock, case, upstream[:, 0], torch.float64)[1:]
    for a, b in zip(float16_gradients_by_chunks(case, upstream), exact, strict=True):
        held = b.abs() < 6e4
        assert held.any() and ((a.double() - b)[held].norm() / b[held].norm()).item() < 4e-3


def test_linear_no_gradient_work_where_none_is_needed(own):
    x, weight, bias, target, _ = problem((8, 30), (100,), torch.float32)
    weight.requires_grad_()
    with Asked() as asked:
        with torch.no_grad():
            assert not linear_cross_entropy(x, weight, target).requires_grad
        assert not linear_cross_entropy(x, weight.detach(), target).requires_grad
        with torch.inference_mode():
            assert not linear_cross_entropy(x, weight, target).requires_grad
    assert asked.forward == [(False, False, False)] * 3
    # A leaf of the graph that is not asked for costs nothing.
    loss = linear_cross_entropy(x, weight, target, linear_bias=bias)
    with Asked() as asked:
        torch.autograd.grad(loss, weight)
    assert asked.forward == asked.backward == []


def test_linear_raw_ops_refuse_to_be_differentiated():
    x, weight, bias, target, _ = problem((8, 9), (10, 1), torch.float32)
    inputs = (x.requires_grad_(), weight, bias, target, None, 1, -100, 0.0, 0.0, 0.0)
    loss = torch.ones((), requires_grad=True)
    gradient = ops.linear_cross_entropy_backward(loss, *inputs, True, True, True)[0]
    with pytest.raises(NotImplementedError, match="raw op"):
        gradient.sum().backward()


# ------------------------------------------------------------------------- the rest of torch


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_linear_opcheck(kind):
    x, weight, bias, target, _ = problem((4, 6), (5, 3), torch.float32, kind)
    class_weight = torch.rand(5)
    for reduction, b in ((0, bias), (1, None), (2, bias)):
        options = (reduction, -100, 0.1, 3.0, 0.01)
        wants = (reduction > 0, reduction > 0, reduction > 0 and b is not None)
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, b)]
        torch.library.opcheck(
            ops.linear_cross_entropy.default, (*leaves, target, class_weight, *options, *wants)
        )
        inputs = (x, weight, b, target, class_weight, *options)
        loss = ops.linear_cross_entropy(*inputs, False, False, False)[0]
        for wants in ((True, True, True), (False, True, False)):
            torch.library.opcheck(
                ops.linear_cross_entropy_backward.default,
                (torch.ones_like(loss), *inputs, *wants),
            )
    gradients = x.clone(), weight.clone(), bias.new_empty(0)
    torch.library.opcheck(ops.linear_cross_entropy_scale_.default, (*gradients, torch.tensor(2.0)))


@pytest.mark.parametrize("wants", [*itertools.product([False, True], repeat=2)], ids=str)
def test_the_public_op_is_right_whatever_is_made_ahead(wants):
    """Its flags say what to make in the forward pass, not what may be asked for."""
    x, weight, bias, target, _ = problem((7, 6), (5, 3), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    options = (1, -100, 0.0, 0.0, 0.0)
    loss = ops.linear_cross_entropy(*leaves, target, None, *options, *wants, False)[0]
    wanted = stock(x, weight, target, linear_bias=bias)
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("outputs", [(30,), (30, 2)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"reduction": "none"}, {"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.1}],
    ids=str,
)
def test_linear_compile(outputs, arguments, own):
    """One graph without a break, one compilation for every batch size; the gradient ahead."""
    compiled = Compiled(dynamic=True)
    ahead = arguments.get("reduction") != "none"
    times = None
    for batch in (3, 9, 60):
        case = problem((batch, 8), outputs, torch.float32, **arguments)
        upstream = upstream_of(case)
        ours = evaluate(compiled, case, upstream)
        times = times or compiled.times
        for a, b in zip(ours, evaluate(linear_cross_entropy, case, upstream), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
            assert a.stride() == b.stride()
    assert compiled.times == times, "compiled again for another batch"
    assert compiled.forward == [(ahead,) * 3]
    assert compiled.backward == ([] if ahead else [(True,) * 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_compile_in_half_types(dtype, own):
    compiled = Compiled()
    check(lambda: problem((49, 8), (100,), dtype), ours=compiled)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str
)
def test_linear_compile_of_some_gradients(wanted, own):
    compiled = Compiled()
    case = problem((60, 8), (30,), torch.float32)
    ours = evaluate(compiled, case, wanted=wanted)
    assert compiled.forward == [wanted] and compiled.backward == []
    for a, b in zip(ours, evaluate(stock, case, wanted=wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_linear_compile_of_func_grad_is_not_zero(own):
    x, weight, bias, target, _ = problem((5, 20), (70,), torch.float32)
    gradient = torch.func.grad(lambda w: linear_cross_entropy(x, w, target, linear_bias=bias))
    wanted = torch.func.grad(lambda w: stock(x, w, target, linear_bias=bias))(weight)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(gradient(weight), wanted)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), wanted)


@pytest.mark.parametrize("extras", [{}, {"z_loss": 0.2, "softcap": 4.0}], ids=str)
def test_linear_vmap_and_forward_mode(extras, own):
    x, weight, bias, _, _ = problem((18, 9), (50,), torch.float32)
    x, target = x.view(6, 3, 9), torch.randint(50, (6, 3))

    def loss(x, weight, target):
        return linear_cross_entropy(x, weight, target, linear_bias=bias, **extras)

    batched = torch.func.vmap(loss, in_dims=(0, None, 0))(x, weight, target)
    looped = torch.stack([loss(a, weight, t) for a, t in zip(x, target, strict=True)])
    torch.testing.assert_close(batched, looped)
    tangent = torch.randn_like(weight)
    with dlkernels.config.recording() as choices:
        _, ours = torch.func.jvp(lambda w: loss(x[0], w, target[0]), (weight,), (tangent,))
    assert choices[0].kernel == ("reference" if extras else "stock")
    leaf = weight.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(x[0], leaf, target[0]), leaf)[0]
    torch.testing.assert_close(ours, (gradient * tangent).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_gradients_in_batches(reduction, own):
    """vmap over the backward alone: of a gradient made ahead, and of one that is not."""
    x, weight, bias, target, arguments = problem((4, 3), (5,), torch.float64, reduction=reduction)
    one, all_ = (
        torch.autograd.functional.jacobian(
            lambda w: linear_cross_entropy(x, w, target, linear_bias=bias, **arguments),
            weight,
            vectorize=vectorize,
        )
        for vectorize in (False, True)
    )
    torch.testing.assert_close(one, all_)


def test_linear_checkpoint(own):
    x, weight, bias, target, _ = problem((20, 30), (60,), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, target, linear_bias=bias)

    ours = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    for a, b in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        assert torch.equal(a, b)


def test_linear_export(own):
    module = dlkernels.nn.LinearCrossEntropyLoss(20, 50, bias=True, z_loss=0.1)
    inputs = (torch.randn(8, 20), torch.randint(50, (8,)))
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops.linear_cross_entropy.default in targets
    inputs = (torch.randn(3, 20), torch.randint(50, (3,)))
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_linear_a_jit_trace_holds_torchs_ops_alone(own):
    x, weight, _, target, _ = problem((8, 20), (50,), torch.float32)
    traced = torch.jit.trace(lambda x, w: linear_cross_entropy(x, w, target), (x, weight))
    assert not any("dlkernels" in node.kind() for node in traced.graph.nodes())
    torch.testing.assert_close(traced(x, weight), linear_cross_entropy(x, weight, target))


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_autocast(dtype, kind, own):
    """The product is of autocast's dtype, the loss of float32; gradients have their leaf's."""
    x, weight, bias, target, _ = problem((60, 20), (50,), torch.float32, kind)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def loss(function, leaves, target, **arguments):
        return function(leaves[0], leaves[1], target, linear_bias=leaves[2], **arguments)

    for arguments in ({}, {"reduction": "none"}, {"weight": torch.rand(50)}):
        with torch.autocast("cpu", dtype):
            ours, wanted = (
                loss(f, leaves, target, **arguments) for f in (linear_cross_entropy, stock)
            )
            with torch.autocast("cpu", enabled=False):
                assert loss(linear_cross_entropy, leaves, target).dtype == torch.float32
        assert ours.dtype == wanted.dtype == torch.float32
        exact = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
        wide = target.double() if kind == "probability" else target
        exact = loss(stock, [t.double() for t in leaves], wide, **exact)
        assert_no_worse("loss", ours, wanted, exact)
        for leaf, a, b, c in zip(
            leaves,
            *(torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (ours, wanted, exact)),
            strict=True,
        ):
            assert a.dtype == leaf.dtype
            assert_no_worse("gradient", a, b, c.double())
    compiled = Compiled()
    with torch.autocast("cpu", dtype):
        a, b = (loss(f, leaves, target) for f in (compiled, linear_cross_entropy))
        torch.testing.assert_close(a, b)
        doubles = [t.detach().double() for t in leaves]
        wide = target.double() if kind == "probability" else target
        assert loss(linear_cross_entropy, doubles, wide).dtype == torch.float64
        mixed = [leaves[0].to(dtype), *leaves[1:]]
        if kind == "index":
            assert torch.equal(loss(linear_cross_entropy, mixed, target), b)


@pytest.mark.parametrize("out_features", [(), (3, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_linear_module(bias, out_features, own):
    settings = {"weight": torch.rand(50), "ignore_index": 3, "softcap": 4.0, "z_loss": 0.1}
    module = dlkernels.nn.LinearCrossEntropyLoss(
        20, 50, bias=bias, out_features=out_features, **settings
    )
    x, target = torch.randn(8, 20), torch.randint(50, (8, *out_features))
    outputs = (50, *out_features)
    wanted = linear_cross_entropy(
        x,
        module.linear.weight.view(*outputs, 20),
        target,
        linear_bias=module.linear.bias.view(outputs) if bias else None,
        **settings,
    )
    assert torch.equal(module(x, target), wanted)


# ------------------------------------------------------------------------------------- refusals


def refusals():
    x, w, _, t, _ = problem((4, 6), (5,), torch.float32)
    deep = torch.randn(5, 3, 6)
    p = torch.rand(4, 5)
    return {
        "target_too_large": (x, w, torch.tensor([0, 5, 1, 2]), {}),
        "target_negative": (x, w, torch.tensor([0, -1, 1, 2]), {}),
        "target_too_large_in_positions": (x, deep, torch.full((4, 3), 9), {}),
        "target_too_large_unbatched": (x[0], w, torch.tensor(7), {}),
        "ignored_index_does_not_hide_others": (x, w, torch.full((4,), -100), {"ignore_index": 2}),
        "batch": (x, w, torch.randint(5, (5,)), {}),
        "positions": (x, deep, torch.randint(5, (4, 2)), {}),
        "no_positions": (x, deep, t, {}),
        "target_rank": (x, w, t.unsqueeze(1), {}),
        "target_int32": (x, w, t.int(), {}),
        "target_bool": (x, w, t.bool(), {}),
        "probability_shape": (x, w, torch.rand(4, 4), {}),
        "probability_batch": (x, w, torch.rand(5, 5), {}),
        "probability_long": (x, w, torch.zeros(4, 5).long(), {}),
        "probability_ignore_index": (x, w, p, {"ignore_index": 2}),
        "probability_negative_ignore_index": (x, w, p, {"ignore_index": -100}),
        "scalar_input": (x.sum(), w, t, {}),
        "input_of_3_dimensions": (x[None], w, t, {}),
        "weight_of_1_dimension": (x, w[0], t, {}),
        "features": (x[:, :5], w, t, {}),
        "unbatched_positions": (x[0], deep, t[:3], {}),
        "bias_size": (x, w, t, {"linear_bias": torch.rand(4)}),
        "bias_rank": (x, w, t, {"linear_bias": torch.rand(5, 1)}),
        "bias_of_positions": (x, deep, torch.randint(5, (4, 3)), {"linear_bias": torch.rand(5)}),
        "bias_dtype": (x, w, t, {"linear_bias": torch.rand(5).double()}),
        "weight_dtype": (x, w.double(), t, {}),
        "input_dtype": (x.double(), w, t, {}),
        "class_weight_size": (x, w, t, {"weight": torch.rand(4)}),
        "class_weight_rank": (x, w, t, {"weight": torch.rand(5, 1)}),
        "class_weight_dtype": (x, w, t, {"weight": torch.rand(5).double()}),
        "class_weight_with_a_gradient": (x, w, t, {"weight": torch.rand(5, requires_grad=True)}),
        "no_classes": (x, w[:0], t, {}),
        "integers": (x.long(), w.long(), t, {}),
        "bools": (x > 0, w > 0, t, {}),
        "reduction": (x, w, t, {"reduction": "average"}),
        "no_reduction": (x, w, t, {"reduction": None}),
        "reductions": (x, w, t, {"reduction": ["mean"]}),
        "smoothing": (x, w, t, {"label_smoothing": 1.5}),
        "no_smoothing": (x, w, t, {"label_smoothing": None}),
        "smoothing_is_text": (x, w, t, {"label_smoothing": "0.1"}),
        "ignore_index_is_no_integer": (x, w, t, {"ignore_index": 1.5}),
        "ignore_index_is_text": (x, w, t, {"ignore_index": "1"}),
        "no_tensor": ([1.0], w, t, {}),
        "no_weight": (x, None, t, {}),
        "no_target": (x, w, 3, {}),
        "bias_is_no_tensor": (x, w, t, {"linear_bias": 3}),
        "class_weight_is_no_tensor": (x, w, t, {"weight": [1.0] * 5}),
        "options": (x, w, t, {"options": 3}),
    }


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch below 2.13")
@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals())
def test_linear_refusals_are_stocks(case, kernels):
    dlkernels.config.kernels = kernels
    *tensors, arguments = refusals()[case]
    try:
        F.linear_cross_entropy(*tensors, **arguments)
    except Exception as error:  # whatever it is, ours is the same
        stocks = error
    else:
        pytest.fail("torch takes these arguments")
    with pytest.raises(type(stocks)) as ours:
        linear_cross_entropy(*tensors, **arguments)
    assert str(ours.value).splitlines()[0] == str(stocks).splitlines()[0]
    with pytest.raises(type(stocks)):
        linear_cross_entropy(*tensors, **arguments, z_loss=0.1)


def test_the_definition_makes_one_product():
    """In place of torch's function, whose refusals it keeps, with softcap or z_loss."""
    x, weight, _, target, _ = problem((30, 20), (50,), torch.float32)

    def call(x):
        return linear_cross_entropy(x, weight, target, z_loss=0.1, softcap=5.0)

    dlkernels.config.kernels = "own"
    wanted = call(x)
    for kernels, function, rows in (
        ("stock", call, x),
        ("auto", torch.vmap(call), x[None]),
    ):
        dlkernels.config.kernels = kernels
        with FlopCounterMode(display=False) as counter:
            loss = function(rows)
        assert counter.get_total_flops() == 2 * 30 * 20 * 50
        torch.testing.assert_close(loss.squeeze(), wanted)
    dlkernels.config.kernels = "stock"
    target[3] = 50
    with pytest.raises(IndexError):
        call(x)


def test_a_target_out_of_range_touches_nothing(own):
    """In any chunk of any position, with gradients and without, it is named."""
    x, weight, _, target, _ = problem((700, 9), (50, 3), torch.float32)
    target[690, 2] = 77
    for wanted in (True, False):
        tensors = x.requires_grad_(wanted), weight.requires_grad_(wanted)
        with pytest.raises(IndexError, match="Target 77 is out of bounds"):
            linear_cross_entropy(*tensors, target)
    with pytest.raises(IndexError, match="Target 77 is out of bounds"):
        inputs = (x.detach(), weight.detach(), None, target, None, 1, -100, 0.0, 0.0, 0.0)
        ops.linear_cross_entropy(*inputs, True, True, False)
    with pytest.raises(IndexError, match="Target 77 is out of bounds"):
        ops.linear_cross_entropy_backward(torch.ones(()), *inputs, True, True, False)


@pytest.mark.parametrize(
    "extras", [{"softcap": 0.0}, {"softcap": -1.0}, {"softcap": float("nan")}, {"z_loss": -0.1}]
)
def test_linear_refusals_of_extras(extras):
    (name, value) = next(iter(extras.items()))
    x, weight, _, target, _ = problem((4, 6), (5,), torch.float32)
    with pytest.raises(ValueError, match=f"linear_cross_entropy.*{name}.*{value}"):
        linear_cross_entropy(x, weight, target, **extras)


def test_linear_refusals_of_raw_ops():
    """No path into a kernel is unchecked."""
    x, weight, bias, target, _ = problem((4, 6), (5, 3), torch.float32)
    options = [1, -100, 0.0, 0.0, 0.0, True, True, True]
    good = [x, weight, bias, target, None, *options]
    ops.linear_cross_entropy(*good)
    bad = (
        (0, x[0], "input of shape \\[rows, features\\], got \\[6\\]"),
        (0, x.int(), "input of dtype"),
        (0, x.double(), "linear_weight of dtype"),
        (1, weight[0], "linear_weight of shape"),
        (1, weight[:, :, :5], "linear_weight with 6 features"),
        (1, weight[:0], "at least one class"),
        (2, bias[:4], "linear_bias of shape"),
        (2, bias.double(), "linear_bias of dtype"),
        (3, target[:3], "target of shape \\[4, 3\\], got \\[3, 3\\]"),
        (3, target.int(), "target of dtype"),
        (3, torch.rand(4, 3, 5), "target of shape \\[4, 5, 3\\], got \\[4, 3, 5\\]"),
        (4, torch.rand(4), "weight of shape \\[5\\], got \\[4\\]"),
        (4, torch.rand(5).double(), "weight of dtype"),
        (5, 3, "reduction 0, 1 or 2, got 3"),
        (7, 2.0, "label_smoothing between 0 and 1, got 2"),
        (8, -1.0, "softcap of at least 0, got -1"),
    )
    for at, value, message in bad:
        changed = [*good[:at], value, *good[at + 1 :]]
        with pytest.raises(RuntimeError, match=f"linear_cross_entropy: expected .*{message}"):
            ops.linear_cross_entropy(*changed)
        with pytest.raises(RuntimeError, match=f"linear_cross_entropy: expected .*{message}"):
            ops.linear_cross_entropy_backward(torch.ones(()), *changed)
    with pytest.raises(RuntimeError, match="mean or sum"):
        ops.linear_cross_entropy(*good[:5], 0, *options[1:])
    for grad_loss, message in (
        (torch.ones(()).double(), "grad_loss of dtype"),
        (torch.ones(4, 3), "grad_loss of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.linear_cross_entropy_backward(grad_loss, *good)
        with pytest.raises(RuntimeError, match=message):
            ops.linear_cross_entropy_scale_(x, weight, bias, grad_loss)
    with pytest.raises(RuntimeError, match="contiguous grad_input"):
        ops.linear_cross_entropy_scale_(x[:, ::2], weight, bias, torch.ones(()))
    with pytest.raises(RuntimeError, match="grad_bias of dtype"):
        ops.linear_cross_entropy_scale_(x, weight, bias.int(), torch.ones(()))


def test_linear_uint8_targets(own):
    x, weight, _, target, _ = problem((50, 9), (200,), torch.float32)
    losses = [linear_cross_entropy(x, weight, t) for t in (target.byte(), target)]
    assert torch.equal(*losses)


def test_options_are_accepted(own):
    """How torch's chunks are cut: ours are by shape."""
    options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options_class is None:
        pytest.skip("torch below 2.13")
    x, weight, bias, target, _ = problem((50, 9), (200,), torch.float32)
    losses = [
        linear_cross_entropy(x, weight, target, linear_bias=bias, options=options)
        for options in (None, options_class(), options_class(batch_chunk_size=7))
    ]
    assert losses[0] == losses[1] == losses[2]


# ----------------------------------------------------------------------------------- which kernel


def test_linear_choice():
    x, weight, _, target, _ = problem((64, 20), (100,), torch.float32)
    ours = dlkernels.config.owner("cpu")

    def chosen(kernels, *arguments, **keywords):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            linear_cross_entropy(*arguments, **keywords)
        assert len(choices) == 1 and choices[0].op == "linear_cross_entropy"
        return choices[0].kernel

    assert chosen("own", x, weight, target) == ours
    assert chosen("auto", x, weight, target) == "stock"  # so small a loss
    assert chosen("auto", x.repeat(40, 1), weight, target.repeat(40)) == ours
    assert chosen("own", x[0], weight, target[0]) == ours
    assert chosen("auto", x, weight, target, z_loss=0.1) == ours
    assert chosen("stock", x, weight, target) == "stock"
    assert chosen("stock", x, weight, target, z_loss=0.1) == "reference"
    class_weight = torch.rand(100, requires_grad=True)
    probability = torch.rand(64, 100)
    assert chosen("auto", x, weight, probability, weight=class_weight) == "stock"
    with pytest.raises(NotImplementedError, match="no kernel of ours: weight"):
        chosen("own", x, weight, probability, weight=class_weight)
    meta = [t.to("meta") for t in (x, weight, target)]
    assert chosen("auto", *meta) == "stock"


@pytest.mark.parametrize("arguments", [{}, {"ignore_index": 3, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("shape", ["unbatched", "in_place", "positions_of_two_dimensions"])
def test_stock_on_torch_without_the_function(shape, arguments, monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    dlkernels.config.kernels = "stock"
    for kind in ("index", "probability")[: 1 if arguments else 2]:
        case = problem(*SHAPES[shape], torch.float32, kind, **arguments)
        for a, b in zip(evaluate(linear_cross_entropy, case), evaluate(stock, case), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch below 2.13")
@pytest.mark.parametrize("case", sorted(refusals().keys() - {"no_target", "options"}))
def test_linear_refusals_on_torch_without_the_function(case, monkeypatch):
    *tensors, arguments = refusals()[case]
    try:
        F.linear_cross_entropy(*tensors, **arguments)
    except Exception as error:
        wanted = type(error)
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(wanted):
        linear_cross_entropy(*tensors, **arguments)


# ------------------------------------------------------------------------------------- on a GPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["unbatched", "in_place", "chunks_of_a_twelfth", "positions"])
def test_chunks_of_a_gpu(shape, dtype, monkeypatch, poisoned):
    """The same code on the CPU: several chunks of rows, the last of them smaller."""
    size, outputs = SHAPES[shape]
    size = (1, *size) if len(size) == 1 else size
    outputs = (*outputs, 1) if len(outputs) == 1 else outputs
    monkeypatch.setattr(contract, "_CHUNK", max(9, size[0] // 4) * math.prod(outputs))

    def by_chunks(x, w, target, *, linear_bias=None, reduction, ignore_index=None, **others):
        class_weight = others.pop("weight", None)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        arguments = (
            None if class_weight is None else class_weight.to(exact),
            (
                REDUCTIONS.index(reduction),
                -100 if ignore_index is None else ignore_index,
                others.get("label_smoothing", 0.0),
                others.get("softcap", 0.0),
                others.get("z_loss", 0.0),
            ),
        )
        return Chunks.apply(x, w, linear_bias, target, *arguments)

    for reduction, (kind, others) in itertools.product(
        REDUCTIONS,
        (
            ("index", {}),
            ("index", {"label_smoothing": 0.1, "softcap": 4.0}),
            ("probability", {"z_loss": 0.1}),
        ),
    ):
        options = {"reduction": reduction, **others}
        check(
            lambda: problem(size, outputs, dtype, kind, True, True, True, **options),  # noqa: B023
            stock=with_extras,
            ours=by_chunks,
        )


class Chunks(torch.autograd.Function):
    """What a GPU's raw ops compute: the loss, then the gradients for an upstream gradient; those
    made ahead are the same, times it."""

    @staticmethod
    def forward(ctx, x, weight, bias, target, class_weight, options):
        ctx.arguments = (x, weight, bias, target, class_weight, options)
        loss, *none = contract._by_chunks(None, *ctx.arguments, (False, False, False))
        assert [gradient.numel() for gradient in none] == [0, 0, 0]
        return loss.to(x.dtype)

    @staticmethod
    def backward(ctx, grad_loss):
        x, weight, bias, *_, options = ctx.arguments
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        grad_loss, wants = grad_loss.to(exact), (True, True, bias is not None)
        _, *gradients = contract._by_chunks(grad_loss, *ctx.arguments, wants)
        if options[0] != 0:
            _, *ahead = contract._by_chunks(None, *ctx.arguments, wants)
            for a, b in zip(ahead, gradients, strict=True):
                torch.testing.assert_close((a.to(exact) * grad_loss).to(a.dtype), b, equal_nan=True)
        _, only, *_ = contract._by_chunks(grad_loss, *ctx.arguments, (True, False, False))
        torch.testing.assert_close(only, gradients[0], rtol=0, atol=0, equal_nan=True)
        return *gradients, None, None, None


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_chunks_of_a_gpu_with_nothing_to_do(kind, poisoned):
    """No rows; no positions; all rows ignored: NaN is the mean, 0 the gradient."""
    sizes = [((0, 5), (4, 2)), ((3, 5), (4, 0)), ((3, 5), (4, 2))]
    for size, outputs in sizes if kind == "index" else sizes[:2]:
        x, weight, bias, target, _ = problem(size, outputs, torch.float32, kind)
        target = target if kind == "probability" else torch.full_like(target, -100)
        loss, *gradients = contract._by_chunks(
            None, x, weight, bias, target, None, (1, -100, 0.0, 0.0, 0.0), (True, True, True)
        )
        assert loss.isnan()
        for leaf, gradient in zip((x, weight, bias), gradients, strict=True):
            assert gradient.shape == leaf.shape and (gradient == 0).all()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cuda(dtype, reduction, monkeypatch):
    monkeypatch.setattr(contract, "_CHUNK", 5000)
    dlkernels.config.kernels = "auto"
    for shape, kind in itertools.product(
        ("in_place", "chunks_of_a_twelfth", "positions"), ("index", "probability")
    ):

        def draw(shape=shape, kind=kind):
            case = problem(*SHAPES[shape], dtype, kind, True, True, True, reduction=reduction)
            *tensors, arguments = case
            moved = {k: v.cuda() if torch.is_tensor(v) else v for k, v in arguments.items()}
            return *(t.cuda() for t in tensors), moved

        with dlkernels.config.recording() as choices:
            check(lambda: draw())  # noqa: B023
        assert {choice.kernel for choice in choices} == {dlkernels.config.owner("cuda")}


@needs_cuda
def test_linear_cuda_under_autocast():
    x, weight, bias, target, _ = problem((600, 64), (1000,), torch.float32)
    leaves = [t.cuda().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cuda", torch.bfloat16):
        ours, wanted = (
            f(leaves[0], leaves[1], target.cuda(), linear_bias=leaves[2])
            for f in (linear_cross_entropy, stock)
        )
    assert ours.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(ours, leaves[1])[0].dtype == torch.float32


# ----------------------------------------------------------------------------------------- memory

# Peak memory of calls, beyond what they return, in bytes: of the loss alone, with a gradient of the
# input, of the weight too; and of stock.
PEAK = """
import sys
import torch
from torch.nn import functional as F
import dlkernels
from dlkernels.functional import linear_cross_entropy

rows, features, classes = map(int, sys.argv[1:])
torch.set_num_threads(2)
dlkernels.config.kernels = "own"


def status(name):
    with open("/proc/self/status") as lines:
        (kib,) = (line.split()[1] for line in lines if line.startswith(name + ":"))
    return int(kib) << 10


def step(function, rows, classes, wanted):
    x, w = torch.randn(rows, features), torch.randn(classes, features) * 0.1
    x.requires_grad_(wanted > 0), w.requires_grad_(wanted > 1)
    target = torch.randint(classes, (rows,))
    before = status("VmRSS")
    loss = function(x, w, target)
    if wanted:
        loss.backward()
    results = sum(t.numel() * 4 for t in (x, w) if t.requires_grad)
    return status("VmHWM") - before - results


def stock(x, w, target):
    return F.cross_entropy(F.linear(x, w), target)


for function, wanted in [(linear_cross_entropy, i) for i in range(3)] + [(stock, 2)]:
    step(function, 64, 500, wanted)
    print(step(function, rows, classes, wanted))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc/self/status")
def test_the_logits_are_never_in_memory():
    """What a call needs beside its results is less than a tenth of the logits."""
    rows, features, classes = 2048, 64, 32000
    command = [sys.executable, "-c", PEAK, *map(str, (rows, features, classes))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *ours, stocks = map(int, done.stdout.split())
    logits = rows * classes * 4
    assert stocks > logits, "the measure does not see the logits"
    assert max(ours) < logits / 10, ours


# ------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize(
    "shape", ["in_place_deep", "chunks_of_a_twelfth", "chunks_of_384", "ranges", "positions"]
)
def test_linear_the_same_bits_for_any_number_of_threads(shape, own):
    size, outputs = SHAPES[shape]
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), ("mean", "none")):
        case = problem(
            size, outputs, dtype, weighted=True, ignored=True, reduction=reduction, softcap=9.0
        )
        assert_same_for_any_number_of_threads(evaluate, linear_cross_entropy, case)


def test_linear_four_threads_at_once(own):
    torch.set_num_threads(2)
    cases = [problem((100, 40 + 20 * i), (500,), torch.float32, weighted=True) for i in range(4)]
    assert_same_in_threads_at_once(evaluate, [(linear_cross_entropy, case) for case in cases])


def test_linear_in_a_forked_child(own):
    torch.set_num_threads(2)
    case = problem((300, 40), (1000,), torch.float32)
    assert_same_in_a_forked_child(evaluate, linear_cross_entropy, case)

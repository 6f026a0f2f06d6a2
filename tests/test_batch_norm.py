"""batch_norm against torch's own: statistics, gradients, layouts, refusals, threads, processes."""

import copy
import itertools

import processes
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
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
import dlkernels.info
from dlkernels.functional import batch_norm
from dlkernels.ops.batch_norm import (
    batch_norm_reference,
    gradient_reference,
    reduce_reference,
    statistics_reference,
)

ops = torch.ops.dlkernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "leaky_relu", "tanh", "sigmoid"]
KINKED = ("relu", "leaky_relu")
EPS = 1e-5

# id: shape of the input. On each side of what the loops switch on: a vector (4 to 16 channels), a
# strip of four, rows that are put together to fill one and their tail, a block (32 rows; 2048
# values of a channel, of some planes or a part of one), a piece (2^16 elements).
SHAPES = {
    "two_values": (2, 9),
    "rows": (70, 33),
    "one_channel": (3, 1, 9, 11),
    "three_channels": (5, 3, 7, 9),
    "a_vector": (4, 16, 6, 5),
    "a_strip": (3, 64, 5, 7),
    "a_strip_and_a_vector": (3, 80, 6, 6),
    "rows_put_together": (7, 100, 3, 3),
    "channels_beyond": (2, 1030, 3, 2),
    "channels_that_fill_no_vector": (3, 4099),
    "planes_of_one": (6, 64, 1, 1),
    "some_planes_a_block": (300, 5, 3, 3),
    "parts_of_a_plane": (2, 3, 70, 80),
    "signals": (5, 7, 130),
    "volumes": (2, 5, 3, 4, 5),
    "pieces": (23, 6, 61, 60),
}
FORMATS = {"contiguous": False, "channels_last": True}


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread only waits here, on a machine that is busy; the tests of threads set more."""
    torch.set_num_threads(1)


def last(x):
    """In channels_last, where the shape has such a format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


def problem(shape, dtype, channels_last=False, residual=True, affine=True, parameters=None):
    """input, running mean and variance, weight, bias, residual; the parameters of their dtype."""
    channels, parameters = shape[1], parameters or dtype
    x, more = 2 * torch.randn(shape) + 3, torch.randn(shape) if residual else None
    if channels_last:
        x, more = last(x), last(more) if residual else None
    return [
        x.to(dtype),
        torch.randn(channels).to(parameters),
        (torch.rand(channels) + 0.5).to(parameters),
        torch.randn(channels).to(parameters) if affine else None,
        torch.randn(channels).to(parameters) if affine else None,
        more.to(dtype) if residual else None,
    ]


def stock(x, mean, var, weight, bias, training, momentum, eps, *, residual, activation):
    return batch_norm_reference(
        x, mean, var, weight, bias, training, momentum, eps, residual, activation or "none"
    )


def upstream_of(tensors, training, activation=None):
    """A gradient of the output; 0 where the sign before a kinked activation is a matter of
    rounding."""
    x, *parameters, residual = [t if t is None else t.detach().double() for t in tensors]
    exact = stock(x, *parameters, training, 0.1, EPS, residual=residual, activation=None)
    upstream = torch.randn(exact.shape, dtype=torch.float64)
    if activation in KINKED and exact.numel():
        room = 8 * torch.finfo(tensors[0].dtype).eps * exact.abs().max()
        upstream[exact.abs() < room] = 0
    return upstream


def evaluate(function, tensors, upstream, training=True, activation=None, dtype=None):
    """Output, the gradients of what there is of input, weight, bias and residual, and the running
    statistics after it; in ``dtype``."""
    x, mean, var, *others = [
        t if t is None else t.detach().to(dtype or t.dtype, copy=True) for t in tensors
    ]
    weight, bias, residual = others
    leaves = [t.requires_grad_() for t in (x, *others) if t is not None]
    output = function(
        x, mean, var, weight, bias, training, 0.1, EPS, residual=residual, activation=activation
    )
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
    return output, *gradients, *(t for t in (mean, var) if t is not None)


def names_of(tensors):
    _, mean, _, weight, bias, residual = tensors
    kept = {"input": 0, "weight": weight, "bias": bias, "residual": residual}
    running = [] if mean is None else ["running_mean", "running_var"]
    return ["output", *(f"grad {n}" for n, t in kept.items() if t is not None), *running]


def check(draw, training=True, activation=None, factor=2.0, numbers=300, laid_out=True):
    """Ours against stock; ``draw()`` gives what ``problem`` gives.

    Errors are pooled over so many numbers of the smallest result (in at most 24 draws, and fewer
    of large inputs): of few, stock gets some by luck. Without ``laid_out`` stock has contiguous
    copies.
    """
    results, drawn, read = [], 0, 0
    while drawn < numbers and len(results) < 3 * 24 and read < 2**21:
        tensors = draw()
        read += tensors[0].numel()
        upstream = upstream_of(tensors, training, activation)
        for function, dtype in ((batch_norm, None), (stock, None), (stock, torch.float64)):
            results.append(evaluate(function, tensors, upstream, training, activation, dtype))
            if not laid_out:
                tensors = [t if t is None else t.contiguous() for t in tensors]
        drawn += min(result.numel() for result in results[-1])
    for i, name in enumerate(names_of(tensors)):
        assert_no_worse(name, *([result[i] for result in results[j::3]] for j in range(3)), factor)
    ours, stocks = results[-3], results[-2]
    for a, b in zip(ours[:2], stocks[:2], strict=True):
        assert not laid_out or a.stride() == b.stride()
    return tensors, ours


# ------------------------------------------------------------------------------ against stock


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, format, training, own, poisoned):
    """With all that there is, and with nothing."""
    size, channels_last = SHAPES[shape], FORMATS[format]
    check(lambda: problem(size, dtype, channels_last), training, "relu")

    def bare():
        x, mean, var, *_ = problem(size, dtype, channels_last)
        return [x, None, None, None, None, None] if training else [x, mean, var, None, None, None]

    check(bare, training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, activation, residual, training, own, poisoned):
    for shape, channels_last in itertools.product(((5, 20, 7, 9), (40, 24)), (False, True)):
        check(lambda: problem(shape, dtype, channels_last, residual), training, activation)  # noqa: B023


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_float32(dtype, training, own, poisoned):
    """Beside an input in half precision; their gradients are float32 too."""
    for channels_last, residual in itertools.product((False, True), (False, True)):
        _, ours = check(
            lambda: problem((6, 20, 7, 9), dtype, channels_last, residual, parameters=torch.float),  # noqa: B023
            training,
            "relu",
        )
        assert ours[0].dtype == ours[1].dtype == dtype
        assert ours[2].dtype == ours[3].dtype == torch.float32


@pytest.mark.parametrize("given", ["weight", "bias", "running"])
def test_some_of_the_parameters(given, own, poisoned):
    def draw():
        x, mean, var, weight, bias, _ = problem((6, 20, 7, 9), torch.float32)
        if given == "running":
            return [x, mean, var, None, None, None]
        return [x, None, None, *((weight, None) if given == "weight" else (None, bias)), None]

    check(draw, True, "relu")


# id: how a tensor of (6, 20, 7, 9) lies in memory.
LAYOUTS = {
    "every_second_pixel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "some_channels": lambda x: torch.cat([x, x], 1)[:, :20],
    "some_channels_of_channels_last": lambda x: last(torch.cat([x, x], 1))[:, :20],
    "every_second_image": lambda x: x.repeat_interleave(2, 0)[::2],
    "rows_and_columns_changed_about": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "images_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "one_image_for_all": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, own, poisoned):
    """Of the input, of the residual, of the parameters; and of the upstream gradient."""
    lay = LAYOUTS[layout]

    def draw():
        x, mean, var, weight, bias, residual = problem((6, 20, 7, 9), dtype)
        return [lay(x), mean, var, weight.repeat_interleave(3)[::3], bias, lay(residual)]

    tensors, _ = check(draw, True, "relu")
    upstream = lay(torch.randn(6, 20, 7, 9)).to(dtype)
    ours, wanted = (evaluate(batch_norm, tensors, u) for u in (upstream, upstream.contiguous()))
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    batch=st.integers(1, 12),
    channels=st.integers(1, 70),
    pixels=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    affine=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_drawn_shapes_and_strides(
    data, batch, channels, pixels, dtype, activation, residual, affine, training, seed
):
    dlkernels.config.kernels = "own"
    torch.manual_seed(seed)
    shape = (batch, channels, *pixels)
    values = torch.empty(shape).numel() // channels
    if training and values < 8:  # of few a variance is an accident
        return
    order = data.draw(st.permutations(range(len(shape))))
    inverse = [order.index(d) for d in range(len(shape))]

    def draw():
        x, *parameters, more = problem(shape, dtype, False, residual, affine)
        return [x.permute(order).contiguous().permute(inverse), *parameters, more]

    # Hypothesis looks for bad luck; and for strides of which torch 2.13 takes some gradients in
    # eval for channels_last and others not: of shape (1, 2, 2, 1), (4, 1, 2, 1) is wrong.
    check(draw, training, activation, factor=4.0, numbers=100, laid_out=False)


def test_more_than_two_to_the_31_elements(own):
    """Offsets are 64 bits wide. The memory between the two rows is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x = far.as_strided((2, 64), (2**31, 1))
    x.copy_(torch.randn(2, 64))
    mean, var = torch.randn(64).bfloat16(), (torch.rand(64) + 1).bfloat16()
    near = x.contiguous()
    exact = F.batch_norm(near.double(), mean.double(), var.double())
    assert_no_worse("output", batch_norm(x, mean, var), F.batch_norm(near, mean, var), exact)


# -------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", ["rows", "three_channels", "some_planes_a_block", "pieces"])
def test_statistics_of_a_large_mean(shape, format, own, poisoned):
    """To a few units in the last place, where a sum of squares has none that is right."""
    x = torch.randn(SHAPES[shape]) * 0.1 + 1e4
    x = last(x) if FORMATS[format] else x
    exact = statistics_reference(x.double())
    for mean, var in (ops.batch_norm_statistics(x, True), ops.batch_norm(
        x, None, None, None, EPS, "none", True
    )[1:3]):  # fmt: skip
        torch.testing.assert_close(mean.double(), exact[0], rtol=1e-7, atol=0)
        torch.testing.assert_close(var.double(), exact[1], rtol=1e-6, atol=0)
    wide = torch.randn(SHAPES[shape], dtype=torch.float64) * 1e-3 + 1e6
    exact = statistics_reference(wide)
    for ours, wanted in zip(ops.batch_norm_statistics(wide, True), exact, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_statistics_where_blocks_differ_by_far(format, own):
    """The first image is a million standard deviations from the others; one is constant."""
    x = torch.randn(40, 6, 16, 16) * 1e-2
    x[0] += 1e4
    x[:, 3] = 7.25
    x = last(x) if FORMATS[format] else x
    mean, var = ops.batch_norm_statistics(x, True)
    exact = statistics_reference(x.double())
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact[1], rtol=1e-6, atol=0)
    assert mean[3] == 7.25 and var[3] == 0


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 0.37])
@pytest.mark.parametrize("shape", ["rows", "a_strip", "three_channels", "signals", "volumes"])
def test_running_statistics_are_torchs_to_the_bit_in_float64(shape, momentum, own):
    """Those of torch on one thread: of channels_last, it adds in another order on more."""
    size = SHAPES[shape]
    for channels_last in (False, True):
        x, *running, _, _, _ = problem(size, torch.float64, channels_last)
        ours, stocks = ([t.clone() for t in running] for _ in range(2))
        for _ in range(3):
            batch_norm(x, *ours, training=True, momentum=momentum)
            F.batch_norm(x, *stocks, training=True, momentum=momentum)
        for a, b in zip(ours, stocks, strict=True):
            assert torch.equal(a, b)


def test_running_statistics_stay_in_eval_and_are_marked_as_changed_in_training(own):
    x, mean, var, *_ = problem((8, 20, 9, 9), torch.float32)
    before, version = mean.clone(), mean._version
    batch_norm(x, mean, var)
    assert torch.equal(mean, before) and mean._version == version
    batch_norm(x, mean, var, training=True)
    assert not torch.equal(mean, before) and mean._version > version and var._version > 0
    with torch.inference_mode():
        mean = torch.zeros(20)
        batch_norm(x, mean, torch.ones(20), training=True)
    assert mean.abs().min() > 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_special_values_stay_in_their_channel(value, own, poisoned):
    for dtype, channels_last, activation in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (None, "relu")
    ):
        x, *parameters, residual = problem((3, 20, 5, 7), dtype, channels_last)
        x[1, 2, 3, 4] = value
        x[2, 19, 4, 6] = value
        output = batch_norm(x, *parameters, training=True, residual=residual, activation=activation)
        ruined = ~output.isfinite().all(3).all(2).all(0)
        assert ruined.nonzero().flatten().tolist() == [2, 19]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3, 4), (4, 5, 0), (0, 3, 2, 2, 2)], ids=str)
def test_empty(shape, training, own, poisoned):
    """Nothing to normalise: running statistics stay, gradients of parameters are 0."""
    for activation, dtype in itertools.product((None, "relu"), (torch.float32, torch.bfloat16)):
        tensors = problem(shape, dtype)
        upstream = torch.randn(shape)
        ours, wanted = (
            evaluate(f, tensors, upstream, training, activation) for f in (batch_norm, stock)
        )
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation, training, own):
    for shape in ((5, 3), (2, 3, 2, 2)):
        x, mean, var, weight, bias, residual = problem(shape, torch.float64, len(shape) == 4)
        leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

        def function(x, weight=None, bias=None, residual=None, mean=mean, var=var):
            return batch_norm(
                x, mean.clone(), var.clone(), weight, bias, training, residual=residual,
                activation=activation,
            )  # fmt: skip

        for inputs, check_gradient in itertools.product(
            (leaves, leaves[:1]), (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
        ):
            assert check_gradient(function, inputs, check_batched_grad=True)


class Backwards(TorchDispatchMode):
    """Notes what the raw backward op is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ops.batch_norm_backward.default:
            self.asked.append(args[-4:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4))[:-1], ids=str)
def test_only_the_wanted_gradients_are_computed_and_kept_for(
    wanted, activation, training, own, poisoned
):
    """Of a residual that has a gradient, or of none."""
    x, mean, var, *others = problem((5, 20, 6, 7), torch.float32, residual=wanted[3])
    upstream = torch.randn_like(x)

    def run(function):
        leaves = [
            t if t is None else t.detach().clone().requires_grad_(w)
            for t, w in zip((x, *others), wanted, strict=True)
        ]
        input, weight, bias, residual = leaves
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.shape) or t, lambda t: t
        ):
            output = function(
                input, mean.clone(), var.clone(), weight, bias, training, 0.1, EPS,
                residual=residual, activation=activation,
            )  # fmt: skip
        with Backwards() as backwards:
            gradients = torch.autograd.grad(
                output, [t for t in leaves if t is not None and t.requires_grad], upstream
            )
        return gradients, kept, backwards.asked

    ours, kept, asked = run(batch_norm)
    alone = activation is None and wanted == (False, False, False, True)
    assert asked == ([] if alone else [(*wanted[:3], wanted[3] and activation is not None)])
    needs = wanted[1] or (training and wanted[0])
    finds_sign = activation == "relu" and needs and not wanted[3]
    assert kept.count(x.shape) == needs + (activation is not None and not finds_sign)
    for got, want in zip(ours, run(stock)[0], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_second_backward(dtype, activation, own):
    """retain_graph: each backward is right for its upstream gradient, and leaves others alone."""
    x, mean, var, *others = problem((5, 20, 6, 7), dtype)
    leaves = [t.requires_grad_() for t in (x, *others)]
    x, weight, bias, residual = leaves
    output = batch_norm(x, mean, var, weight, bias, True, residual=residual, activation=activation)
    check_second_backward(output, leaves, torch.randn(x.shape).to(dtype), 0.5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("changed", ["input", "weight", "bias", "running", "output"])
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_changes_in_place_are_refused(changed, activation, training, own):
    """Of what the backward reads; of a running statistic in eval alone. Not of the output of a
    ReLU, whose sign input, weight and bias tell; in training a copy of the bias."""
    x, mean, var, weight, bias, _ = problem((5, 20, 6, 7), torch.float32)
    x, weight, bias = (t.requires_grad_() * 1 for t in (x, weight, bias))
    output = batch_norm(x, mean, var, weight, bias, training, activation=activation)
    tensors = {"input": x, "weight": weight, "bias": bias, "running": mean, "output": output}
    with torch.no_grad():
        tensors[changed].mul_(2)
    read = changed in ("input", "weight") or (changed == "running" and not training)
    read = read or (changed == "bias" and activation == "relu" and not training)
    if read or (changed == "output" and activation == "tanh"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    else:
        output.sum().backward()


def test_raw_ops_refuse_to_be_differentiated():
    x, mean, var, weight, bias, _ = problem((5, 20, 6, 7), torch.float32)
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match="raw op"):
        ops.batch_norm_forward(x, weight, bias, None, mean, var, 0.1, EPS, "none", True)
    one = torch.ones(20)
    arguments = (x, x, weight, bias, None, mean, var)
    for results in (
        [ops.batch_norm_apply(x, weight, bias, None, mean, var, EPS, "none", True)],
        ops.batch_norm_statistics(x, True),
        ops.batch_norm_reduce(*arguments, EPS, "none", True),
        ops.batch_norm_gradient(*arguments, one, one, EPS, "none", True, True),
        ops.batch_norm_backward(*arguments, True, EPS, "none", True, True, True, True, True),
    ):
        for result in results:
            with pytest.raises(NotImplementedError, match="raw op"):
                result.sum().backward()


# ------------------------------------------------------------------------- the rest of torch


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 2, 5), (0, 6, 2, 2)], ids=str)
def test_opcheck(shape, activation):
    x, mean, var, weight, bias, residual = problem(shape, torch.float32, True)
    end = (EPS, activation, True)
    cases = [
        ("forward", (x, weight, bias, residual, mean, var, 0.1, *end)),
        ("apply", (x, weight, bias, residual, mean, var, *end)),
        ("statistics", (x, True)),
    ]
    for y in (None,) if activation == "none" else (None, torch.randn_like(x)):
        saved = (x, x, weight, bias, y, mean, var)
        cases.append(("backward", (*saved, True, *end, True, True, False, True)))
        cases.append(("reduce", (*saved, *end)))
        cases.append(("gradient", (*saved, mean, var, *end, True)))
    for name, inputs in cases:
        torch.library.opcheck(getattr(ops, f"batch_norm_{name}").default, inputs)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests += ("test_aot_dispatch_dynamic",) if 0 not in shape else ()
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(ops.batch_norm.default, (*leaves, *end), test_utils=tests)
    torch.library.opcheck(ops.batch_norm_eval.default, (*leaves, mean, var, *end), test_utils=tests)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("format", FORMATS)
def test_compile(format, training, own):
    """One graph without a break, one compilation for every batch size; running statistics move."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(batch_norm, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for batch in (3, 5, 8):
        tensors = problem((batch, 20, 6, 7), torch.float32, FORMATS[format])
        upstream = upstream_of(tensors, training, "relu")
        results = [evaluate(f, tensors, upstream, training, "relu") for f in (compiled, batch_norm)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()
        graphs = graphs or list(counter.graphs)
        assert len(counter.graphs) == len(graphs), "compiled again for another batch"
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    name = "dlkernels.batch_norm" + ("" if training else "_eval")
    assert sum(target.removesuffix(".default") == name for target in targets) == 1


def test_compile_of_a_module(own):
    torch._dynamo.reset()
    modules = [dlkernels.nn.BatchNormAct2d(20) for _ in range(2)]
    compiled = torch.compile(modules[0], fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 20, 6, 7)
        torch.testing.assert_close(compiled(x), modules[1](x))
    for a, b in zip(*(module.state_dict().values() for module in modules), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_vmap_and_forward_mode(training, own):
    x, mean, var, weight, bias, residual = problem((6, 20, 5, 7), torch.float64)
    running = (None, None) if training else (mean, var)

    def f(weight, x=x):
        return batch_norm(x, *running, weight, bias, training, residual=residual, activation="tanh")

    weights = torch.stack([weight, 2 * weight, -weight])
    batched = torch.func.vmap(f)(weights)
    torch.testing.assert_close(batched, torch.stack([f(w) for w in weights]))
    tangent = torch.randn_like(weight)
    _, ours = torch.func.jvp(f, (weight,), (tangent,))
    leaf = weight.clone().requires_grad_()
    gradient = torch.autograd.grad(f(leaf).sum(), leaf)[0]
    torch.testing.assert_close(ours.sum(), (gradient * tangent).sum())
    torch.testing.assert_close(torch.func.grad(lambda w: f(w).sum())(weight), gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_dtype(dtype, own):
    x, mean, var, weight, bias, residual = problem((4, 20, 6, 7), torch.float32)
    with torch.autocast("cpu", dtype):
        for input, more in ((x, residual), (x.to(dtype), residual.to(dtype))):
            ours = batch_norm(input, mean, var, weight, bias, True, residual=more)
            assert ours.dtype == F.batch_norm(input, mean, var, weight, bias, True).dtype


def test_export(own):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = dlkernels.nn.BatchNormAct2d(20)

        def forward(self, x):
            return self.norm(x, x)

    net = Net().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(8, 20, 5, 7),), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [ops.batch_norm_eval.default]
    x = torch.randn(3, 20, 5, 7)
    assert torch.equal(program.module()(x), net(x))


# ----------------------------------------------------------------------------------------- modules


MODULES = {
    "BatchNorm1d": [(70, 33), (5, 7, 130)],
    "BatchNorm2d": [(5, 20, 7, 9)],
    "BatchNorm3d": [(2, 5, 3, 4, 5)],
}
SETTINGS = {
    "default": {},
    "cumulative": {"momentum": None},
    "no_parameters": {"affine": False},
    "no_statistics": {"track_running_stats": False},
    "eps_and_momentum": {"eps": 1e-2, "momentum": 0.4},
}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, how, own):
    """Three steps and an evaluation: outputs, gradients and every buffer to the bit."""
    for shape in MODULES[name]:
        ours, theirs = (
            getattr(nn, name)(shape[1], **SETTINGS[how], dtype=torch.float64)
            for nn in (dlkernels.nn, torch.nn)
        )
        assert repr(ours) == repr(theirs) and isinstance(ours, type(theirs))
        for training in (True, True, True, False):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            outputs = [module.train(training)(x) for module in (ours, theirs)]
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(
                *(torch.autograd.grad(y, x, torch.ones_like(y) / 7) for y in outputs)
            )
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for module in (ours, theirs):
            with pytest.raises(ValueError, match="expected .* input"):
                module(torch.randn(3))


@pytest.mark.parametrize("name", MODULES)
def test_lazy_modules_become_ours(name, own):
    shape = MODULES[name][0]
    module = getattr(dlkernels.nn, f"Lazy{name}")()
    module(torch.randn(shape))
    assert type(module) is getattr(dlkernels.nn, name) and module.num_features == shape[1]


def test_module_with_an_activation(own):
    x, _, _, _, _, residual = problem((5, 20, 7, 9), torch.float32)
    for activation in ACTIVATIONS:
        module = dlkernels.nn.BatchNormAct2d(20, activation=activation)
        assert list(module.state_dict()) == list(torch.nn.BatchNorm2d(20).state_dict())
        assert copy.deepcopy(module).activation == activation
        twin = torch.nn.BatchNorm2d(20)
        for more in (None, residual):
            wanted = twin(x) if more is None else twin(x) + more
            wanted = {None: lambda x: x, "leaky_relu": F.leaky_relu}.get(
                activation, getattr(torch, str(activation), None)
            )(wanted)
            torch.testing.assert_close(module(x, more), wanted)
    assert dlkernels.nn.BatchNormAct2d(20).activation == "relu"
    with pytest.raises(ValueError, match="activation must be None or one of"):
        dlkernels.nn.BatchNormAct2d(20, activation="gelu")


def test_a_batch_norm_and_its_relu_in_a_sequential(own):
    """One call, unless somebody looks on; swap makes a Sequential with such a chain ours."""
    stocks = torch.nn.Sequential(
        torch.nn.Conv2d(3, 20, 3), torch.nn.BatchNorm2d(20), torch.nn.ReLU(), torch.nn.Flatten()
    )
    ours = dlkernels.swap(copy.deepcopy(stocks), ops=["conv2d_max_pool2d", "batch_norm"])
    assert type(ours) is dlkernels.nn.Sequential
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(ours(x), stocks(x))
    for a, b in zip(ours.state_dict().values(), stocks.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    kernels = {record.name: record.kernel for record in dlkernels.explain(ours, x)}
    assert kernels["1"] == kernels["2"] == "fused"
    seen = []
    ours[1].register_forward_hook(lambda *_: seen.append(1))
    stocks(x), torch.testing.assert_close(ours(x), stocks(x))
    assert seen == [1]


def test_swap_explain_and_verify(own):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(20), torch.nn.Tanh())
    dlkernels.swap(model)
    assert type(model[0]) is dlkernels.nn.BatchNorm2d
    x = torch.randn(4, 20, 9, 9)
    norm, _ = dlkernels.explain(model, x)
    assert norm == ("0", "dlkernels.nn.BatchNorm2d", dlkernels.config.owner("cpu"), "covered")
    dlkernels.verify(model, x, strict=True)
    assert {r.what for r in dlkernels.verify(model, x)} == {
        "output", "grad input", "grad weight", "grad bias",
    }  # fmt: skip
    assert type(dlkernels.unswap(model)[0]) is torch.nn.BatchNorm2d
    (row,) = (row for row in dlkernels.info.owners() if row[0] == "batch_norm")
    assert row[1] == dlkernels.config.owner("cpu")


# ------------------------------------------------------------------------------------- refusals


def refusals():
    x, mean, var, weight, bias, _ = problem((4, 6, 3, 3), torch.float32)
    return {
        "one_value": (x[:1, :, :1, :1], mean, var, weight, bias, True),
        "one_row": (x[:1, :, 0, 0], None, None, None, None, True),
        "no_statistics": (x, None, None, weight, bias, False),
        "one_statistic": (x, mean, None, weight, bias, True),
        "weight_size": (x, mean, var, weight[:5], bias, True),
        "bias_size": (x, mean, var, weight, bias[:5], False),
        "running_size": (x, mean[:5], var[:5], weight, bias, True),
        "weight_dtype": (x, mean, var, weight.double(), bias, True),
        "statistics_dtype": (x, mean.double(), var.double(), weight, bias, True),
        "all_wider": (x, mean.double(), var.double(), weight.double(), bias.double(), True),
        "half_parameters": (x, mean.half(), var.half(), weight.half(), bias.half(), True),
        "mixed": (x.bfloat16(), mean, var, weight.bfloat16(), bias.bfloat16(), False),
        "momentum": (x, mean, var, weight, bias, True, None),
        "eps": (x, mean, var, weight, bias, True, 0.1, 0.0),
        "negative_eps": (x, mean, var, weight, bias, False, 0.1, -1.0),
        "no_dimensions": (x[0, :, 0, 0], mean, var, weight, bias, False),
        "integers": (x.int(), mean, var, weight, bias, False),
        "no_tensor": ([1.0], mean, var, weight, bias, False),
    }


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals())
def test_refusals_are_stocks(case, kernels):
    dlkernels.config.kernels = kernels
    arguments = refusals()[case]
    with pytest.raises(Exception) as stocks:  # noqa: B017  whatever it is, ours is the same
        F.batch_norm(*arguments)
    for activation in (None, "relu"):
        with pytest.raises(stocks.type) as ours:
            batch_norm(*arguments, activation=activation)
        assert str(ours.value).splitlines()[0] == str(stocks.value).splitlines()[0]


def test_the_words_for_one_value_per_channel(own):
    message = r"Expected more than 1 value per channel when training, got input size"
    with pytest.raises(ValueError, match=message):
        dlkernels.nn.BatchNorm2d(6)(torch.randn(1, 6, 1, 1))


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="batch_norm: activation must be None or one of 'relu'"):
        batch_norm(torch.randn(4, 6), None, None, training=True, activation="gelu")


def test_what_only_torch_can():
    x, mean, var, weight, bias, residual = problem((4, 6, 3, 3), torch.float32)

    class Marked(torch.Tensor):
        pass

    cases = {
        "6 dimensions": ((x[..., None, None], mean, var, weight, bias, True), {}),
        "plain dense tensor": ((x.as_subclass(Marked), mean, var, weight, bias, True), {}),
        "residual of": ((x, mean, var, weight, bias, True), {"residual": residual[:1]}),
        "residual of torch.float64": (
            (x, mean, var, weight, bias, True), {"residual": residual.double()},
        ),
        "device meta": (tuple(t.to("meta") for t in (x, mean, var)), {}),
    }  # fmt: skip
    for reason, (arguments, keywords) in cases.items():
        dlkernels.config.kernels = "auto"
        ours = batch_norm(*arguments, **keywords)
        wanted = F.batch_norm(*arguments)
        wanted = wanted + keywords["residual"] if keywords else wanted
        assert type(ours) is type(wanted) and ours.dtype == wanted.dtype
        assert ours.is_meta or torch.equal(ours, wanted)
        dlkernels.config.kernels = "own"
        with pytest.raises(NotImplementedError, match=f"batch_norm: no kernel of ours: .*{reason}"):
            batch_norm(*arguments, **keywords)


def test_refusals_of_raw_ops():
    """No path into a kernel is unchecked."""
    x, mean, var, weight, bias, residual = problem((4, 6, 3, 3), torch.float32)
    good = [x, weight, bias, residual, mean, var, 0.1, EPS, "none", True]
    ops.batch_norm_forward(*good)
    for at, value, message in (
        (0, x[:, 0, 0, 0], "input with 2 to 5 dimensions"),
        (0, x.int(), "input of dtype"),
        (0, x[:1, :, :1, :1], "residual of shape"),
        (1, weight[:5], r"weight of shape \[6\], got \[5\]"),
        (1, weight.double(), "weight of dtype Float, got Double"),
        (2, bias.bfloat16(), "bias of dtype Float, got BFloat16"),
        (3, residual[:3], "residual of shape"),
        (3, residual.double(), "residual of dtype"),
        (4, mean[:5], "running_mean of shape"),
        (5, var.repeat(2)[::2], "contiguous running_var"),
        (8, "gelu", "activation"),
    ):
        with pytest.raises(RuntimeError, match=f"batch_norm: expected .*{message}"):
            ops.batch_norm_forward(*good[:at], value, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="more than 1 value per channel when training, got"):
        ops.batch_norm(x[:1, :, :1, :1], None, None, None, EPS, "none", True)
    good = [x, x, weight, bias, x, mean, var, True, EPS, "tanh", True, True, True, True, True]
    ops.batch_norm_backward(*good)
    for at, value, message in (
        (0, x[:3], "grad_output of shape"),
        (0, x.double(), "grad_output of dtype"),
        (2, weight[:5], "weight of shape"),
        (3, bias.double(), "shift of dtype"),
        (4, None, "the output"),
        (4, x[:3], "output of shape"),
        (5, mean.double(), "mean of dtype"),
        (6, var[:5], "var of shape"),
        (9, "none", "the output"),
    ):
        with pytest.raises(RuntimeError, match=f"batch_norm: expected .*{message}"):
            ops.batch_norm_backward(*good[:at], value, *good[at + 1 :])
    good = [x, x, weight, bias, None, mean, var, mean, var, EPS, "relu", True, True]
    ops.batch_norm_gradient(*good)
    for at in (7, 8):
        with pytest.raises(RuntimeError, match="batch_norm: expected mean_g"):
            ops.batch_norm_gradient(*good[:at], mean[:5], *good[at + 1 :])


# ----------------------------------------------------------------------------------- which kernel


def test_choice():
    x, mean, var, weight, bias, _ = problem((16, 64, 8, 8), torch.float32)
    ours = dlkernels.config.owner("cpu")

    def chosen(kernels, *arguments, **keywords):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            batch_norm(*arguments, **keywords)
        assert len(choices) == 1 and choices[0].op == "batch_norm"
        return choices[0].kernel, choices[0].reason

    small = "too small for our call overhead"
    forced = "dlkernels.config.kernels is 'stock'"
    rest = (mean, var, weight, bias, True)
    assert chosen("auto", x, *rest) == (ours, "covered")
    assert chosen("own", x[:2], *rest) == (ours, "covered")
    assert chosen("auto", x[:2], *rest) == ("stock", small)
    assert chosen("auto", x[:2], *rest, activation="relu") == ("reference", small)
    assert chosen("stock", x, *rest) == ("stock", forced)
    assert chosen("stock", x, *rest, residual=x) == ("reference", forced)
    dlkernels.config.kernels = "own"
    with dlkernels.config.recording() as choices:
        torch.func.vmap(lambda x: batch_norm(x, None, None, training=True))(x)
    assert choices == [("batch_norm", "stock", "a functorch transform is active")]


# ------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(20, 7, 40, 50), (3, 70, 33, 20), (2, 2, 300, 301), (900, 101), (5, 1, 250, 300)]
)
def test_the_same_bits_for_any_number_of_threads(shape, format, own):
    """Whether a channel is one thread's or not, and wherever the rows are cut."""
    for dtype, activation in itertools.product(DTYPES, (None, "relu")):
        tensors = problem(shape, dtype, FORMATS[format])
        upstream = torch.randn(shape)
        case = batch_norm, tensors, upstream, True, activation
        assert_same_for_any_number_of_threads(evaluate, *case)


def test_four_threads_at_once(own):
    def case(channels):
        shape = (6, channels, 20, 20)
        return batch_norm, problem(shape, torch.float32, channels % 2), torch.randn(shape)

    assert_same_in_threads_at_once(evaluate, [case(30 + i) for i in range(4)])


def test_in_a_forked_child(own):
    tensors, upstream = problem((20, 30, 32, 32), torch.float32), torch.randn(20, 30, 32, 32)
    assert_same_in_a_forked_child(evaluate, batch_norm, tensors, upstream)


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_steps_between_processes(dtype, activation, own, poisoned):
    """Their raw ops against the same in torch ops."""
    for channels_last in (False, True):
        x, _, _, weight, bias, _ = problem((6, 20, 7, 9), dtype, channels_last)
        grad = torch.randn(6, 20, 7, 9).to(dtype)
        y = torch.tanh(torch.randn(6, 20, 7, 9)).to(dtype) if activation != "none" else None
        mean, var = ops.batch_norm_statistics(x, True)
        for ours, wanted in zip((mean, var), statistics_reference(x), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
        rstd = torch.rsqrt(var + EPS)
        # In half precision the reference rounds g before it adds.
        room = {"rtol": 2e-2, "atol": 2e-1} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-4}
        settings = (EPS, activation, True)
        saved = (grad, x, weight, bias, y, mean, var)
        sums = ops.batch_norm_reduce(*saved, *settings)
        wanted = reduce_reference(grad, x, y, mean, rstd, activation)
        for a, b in zip(sums, wanted, strict=True):
            torch.testing.assert_close(a, b, **room)
        means = [s / 378 for s in sums]
        room = {} if dtype.itemsize > 2 else {"rtol": 2e-2, "atol": 2e-2}
        for want in (True, False):
            ours = ops.batch_norm_gradient(*saved, *means, *settings, want)
            wanted = gradient_reference(grad, x, weight, y, mean, rstd, *means, activation)
            torch.testing.assert_close(ours[0], wanted[0], **room)
            if want:
                torch.testing.assert_close(ours[1], wanted[1], **room)
            else:
                assert ours[1].shape == (0,)


SYNC = """
import copy

def total(x):
    x = x.clone()
    dist.all_reduce(x)
    return x

# Batches of 4 and 5 images, of 1 and 8 of one pixel, and of none and 9.
for kernels in ("own", "auto", "stock"):
    dlkernels.config.kernels = kernels
    for size, cut, dtype in (((7, 5), 4, torch.float64), ((1, 1), 1, torch.float64),
                             ((7, 5), 0, torch.float64), ((7, 5), 4, torch.float32)):
        torch.manual_seed(0)
        one = dlkernels.nn.BatchNormAct2d(6, momentum=None, dtype=dtype)
        torch.nn.init.normal_(one.weight), torch.nn.init.normal_(one.bias)
        two = dlkernels.nn.convert_sync_batchnorm(torch.nn.Sequential(copy.deepcopy(one)))[0]
        assert two.process_group == "world" and one.process_group is None
        part = slice(cut) if rank == 0 else slice(cut, None)
        for images in (2, 1):  # the residual's, or none
            x, residual = (torch.randn(9, 6, *size, dtype=dtype) for _ in range(2))
            upstream = torch.randn_like(x)
            results = []
            for module, cut_of in ((one, slice(None)), (two, part)):
                module.zero_grad()
                leaves = [t[cut_of].clone().requires_grad_() for t in (x, residual)[:images]]
                y = module(*leaves)
                y.backward(upstream[cut_of])
                results.append([y, *(leaf.grad for leaf in leaves)])
            for a, b in zip(*results):
                torch.testing.assert_close(a[part], b)
            for a, b in zip(one.parameters(), two.parameters()):
                torch.testing.assert_close(a.grad, total(b.grad))
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
            torch.testing.assert_close(a, b, msg=name)
        torch.testing.assert_close(one.eval()(x), two.eval()(x))
        print("equal")

# Half a network, ours and torch's classes, and a group of this process alone.
alone = [dist.new_group([r]) for r in range(2)][rank]
model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), dlkernels.nn.BatchNorm1d(4), torch.nn.ReLU())
twin = copy.deepcopy(model)
dlkernels.nn.convert_sync_batchnorm(model, alone)
assert all(type(m) is dlkernels.nn.BatchNorm1d and m.process_group is alone for m in model[:2])
x = torch.randn(5 + rank, 4)
torch.testing.assert_close(model(x), twin(x))
print("alone")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one_on_the_whole_batch(tmp_path):
    for printed in processes.run(SYNC, tmp_path):
        assert printed == ["equal"] * 12 + ["alone"]


def test_a_module_with_a_group_and_no_processes(own):
    """Before init_process_group, and in a process alone, it is a batch norm like any other."""
    model = dlkernels.nn.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(6)))
    (module,) = model
    assert type(module) is dlkernels.nn.BatchNorm2d and "process_group=world" in repr(module)
    x = torch.randn(4, 6, 3, 3)
    assert torch.equal(model(x), dlkernels.nn.BatchNorm2d(6)(x))
    assert copy.deepcopy(module).process_group == "world"
    assert type(dlkernels.unswap(model)[0]) is dlkernels.nn.BatchNorm2d  # stock cannot do that

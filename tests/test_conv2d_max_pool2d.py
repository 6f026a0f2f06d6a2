"""conv2d_max_pool2d against torch's three: outputs, argmax, gradients, layouts, refusals, threads.

In auto few channels take the fused kernel and the rest conv2d and torch's pool; "own" takes it for
every count of channels.
"""

import copy
import itertools

import pytest
import torch
from compare import assert_no_worse
from graphs import check_second_backward
from layouts import (
    channels_last,
    every_second,
    expanded,
    offset,
    same_memory,
    sliced_columns,
    transposed,
)
from memory import assert_nothing_is_kept
from products import ACTIVATIONS, DTYPES, evaluate, with_an_infinite_weight
from threads import (
    assert_same_for_any_number_of_threads,
    assert_same_in_a_forked_child,
    assert_same_in_threads_at_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import dlkernels
from dlkernels.functional import conv2d_max_pool2d
from dlkernels.models import NETWORKS
from dlkernels.ops import conv2d_max_pool2d as contract
from dlkernels.ops.conv2d_max_pool2d import conv2d_max_pool2d_reference

ops = torch.ops.dlkernels
pytestmark = pytest.mark.usefixtures("one_thread")

# id: shape of the input, of the weight, padding. Tiles of 2×2 pixels, 16 to a vector; channels in
# blocks of 6 (2) and pieces of 4 (2); windows in rows of 16 (8, 4) numbers and parts of 12 vectors.
SHAPES = {
    "one_pixel": ((1, 1, 2, 2), (1, 1, 1, 1), 0),
    "lenet_1": ((20, 1, 32, 32), (6, 1, 5, 5), 0),
    "lenet_2": ((17, 6, 14, 14), (16, 6, 5, 5), 0),
    "mnist_2": ((5, 10, 12, 12), (20, 10, 5, 5), 0),
    "cifar_1": ((3, 3, 32, 32), (16, 3, 5, 5), 0),
    "odd_sides": ((3, 2, 9, 12), (3, 2, 2, 3), 0),
    "one_row_of_pools": ((2, 3, 4, 40), (5, 3, 3, 3), 0),
    "wide_rows": ((2, 1, 5, 300), (2, 1, 3, 1), 1),
    "padding": ((3, 4, 7, 8), (7, 4, 3, 3), 1),
    "padding_beyond_the_kernel": ((2, 3, 4, 5), (2, 3, 2, 2), 3),
    "uneven_padding": ((2, 5, 6, 9), (4, 5, 3, 5), (1, 2)),
    "seven_by_seven": ((2, 3, 16, 15), (13, 3, 7, 7), 3),
    "many_channels": ((2, 37, 8, 8), (70, 37, 3, 3), 1),
    "long_windows": ((2, 33, 9, 9), (3, 33, 5, 5), 2),
    "more_images_than_parts": ((131, 1, 5, 5), (2, 1, 2, 2), 0),
    "large_image": ((1, 3, 130, 121), (4, 3, 3, 3), 1),
}


def problem(shape, kernel, dtype, bias=True):
    """(input, weight, bias), as a layer at its start has them."""
    fan_in = max(1, kernel[1] * kernel[2] * kernel[3])
    draws = [torch.randn(shape), torch.randn(kernel) / fan_in**0.5]
    draws.append(torch.randn(kernel[0]) if bias else None)
    return [x if x is None else x.to(dtype) for x in draws]


def stock(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation=None):
    settings = stride, padding, dilation, groups, activation or "none"
    return conv2d_max_pool2d_reference(x, weight, bias, *settings)


def upstream_of(tensors, **settings):
    """A gradient of the output; 0 where which of four pixels is the largest, or the sign of that,
    is a matter of rounding."""
    settings.pop("activation", None)
    z = F.conv2d(*(x if x is None else x.detach().double() for x in tensors), **settings)
    images = z if z.dim() == 4 else z[None]
    fours = F.unfold(images.flatten(0, 1)[:, None], 2, stride=2).sort(1).values
    pooled = F.max_pool2d(z, 2)
    lead, largest = (fours[:, 3] - fours[:, 2]).view_as(pooled), pooled.abs()
    upstream = torch.randn(pooled.shape, dtype=torch.float64)
    if upstream.numel():
        room = 8 * torch.finfo(tensors[0].dtype).eps * z.abs().max()
        upstream[(lead < room) | (largest < room)] = 0
    return upstream


def check(draw, factor=2.0, numbers=300, **settings):
    """Ours against stock; ``draw()`` gives (input, weight, bias). Errors are pooled over so many
    numbers of the smallest result, in at most 24 draws."""
    results, drawn = [], 0
    while drawn < numbers and len(results) < 3 * 24:
        tensors = draw()
        upstream = upstream_of(tensors, **settings)
        for function, dtype in (
            (conv2d_max_pool2d, None),
            (stock, None),
            (stock, torch.float64),
        ):
            results.append(evaluate(function, tensors, upstream, dtype, **settings))
        drawn += min(result.numel() for result in results[-1])
    for i, name in enumerate(
        ("output", "grad input", "grad weight", "grad bias")[: len(results[0])]
    ):
        assert_no_worse(name, *([result[i] for result in results[j::3]] for j in range(3)), factor)
        ours, theirs = results[-3][i], results[-2][i]
        if name in ("output", "grad input", "grad weight") and theirs.dim() == 4:
            like = theirs if name == "output" else tensors[0 if name == "grad input" else 1]
            last = like.is_contiguous(memory_format=torch.channels_last)
            both = last and like.is_contiguous()
            assert both or ours.is_contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            ), name


# ------------------------------------------------------------------------------ against stock


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, own, poisoned):
    size, kernel, padding = SHAPES[shape]
    check(lambda: problem(size, kernel, dtype), padding=padding, activation="relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, activation, own, poisoned):
    for bias in (True, False):
        for shape in ("odd_sides", "padding"):
            size, kernel, padding = SHAPES[shape]
            check(
                lambda: problem(size, kernel, dtype, bias),  # noqa: B023
                padding=padding,
                activation=activation,
            )


LAYOUTS = {
    "both_channels_last": (channels_last, channels_last),
    "input_channels_last": (channels_last, same_memory),
    "weight_channels_last": (same_memory, channels_last),
    "input_transposed": (transposed, same_memory),
    "input_sliced": (sliced_columns, same_memory),
    "input_every_second": (every_second, same_memory),
    "input_expanded": (expanded, same_memory),
    "both_offset": (offset, offset),
    "weight_transposed": (same_memory, transposed),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, own, poisoned):
    of_input, of_weight = LAYOUTS[layout]
    for shape in ("lenet_2", "cifar_1", "padding", "odd_sides"):
        size, kernel, padding = SHAPES[shape]

        def draw(size=size, kernel=kernel):
            x, weight, bias = problem(size, kernel, dtype)
            return of_input(x), of_weight(weight), every_second(bias)

        check(draw, padding=padding, activation="tanh")


@pytest.mark.parametrize(
    "settings",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"stride": (1, 2), "padding": (2, 0)}],
    ids=str,
)
def test_what_goes_through_conv2d(settings, own, poisoned, monkeypatch):
    """And through torch's pool, which is said."""
    groups = settings.get("groups", 1)
    for dtype, form in itertools.product(DTYPES, (same_memory, channels_last)):

        def draw(dtype=dtype, form=form):
            x, weight, bias = problem((3, 5 * groups, 11, 14), (8, 5, 3, 3), dtype)
            return form(x), weight, bias

        check(draw, activation="relu", **settings)
    monkeypatch.setattr(contract, "_SMALL", 0)
    name, value = next(iter(settings.items()))
    for kernels, kernel in (("own", dlkernels.config.owner("cpu")), ("auto", "stock")):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            conv2d_max_pool2d(*draw(), **settings)
        assert [choice[:2] for choice in choices] == [
            ("conv2d_max_pool2d", "stock"),
            ("conv2d", kernel),
        ]
        assert choices[0].reason == f"torch's max_pool2d behind conv2d: {name}={value}"


def test_unbatched_and_padding_in_words(own, poisoned):
    x, weight, bias = problem((3, 4, 9, 8), (6, 4, 2, 5), torch.float32)
    for padding in ("same", "valid"):
        check(lambda: (x[0], weight, bias), padding=padding)  # noqa: B023
        check(lambda: (x, weight, bias), padding=padding, activation="relu")


@pytest.mark.parametrize("channels", [3, 40])
def test_argmax_of_ties_and_nan_is_torchs(channels):
    """The first of equals, the last NaN."""
    x = torch.randint(-1, 2, (20, channels, 9, 10)).float()
    x[torch.rand(x.shape) < 0.1] = float("nan")
    weight = torch.zeros(channels, channels, 1, 1)
    weight.flatten(1).diagonal().fill_(1)
    x[:, 1:] = 0  # a NaN would be in every output
    output, argmax = ops.conv2d_max_pool2d_forward(x, weight, None, [0, 0], "none")
    wanted, places = F.max_pool2d(F.conv2d(x, weight), 2, return_indices=True)
    torch.testing.assert_close(output, wanted, equal_nan=True, atol=0, rtol=0)
    row, column = places // 10, places % 10
    assert torch.equal(argmax, (2 * (row % 2) + column % 2).to(torch.uint8))
    assert len(argmax.unique()) == 4 and wanted.isnan().any()


def test_an_infinite_weight_meets_no_padding(own):
    """However threads cut the images."""
    x, weight = torch.randn(4, 8, 24, 24), torch.randn(16, 8, 7, 7)
    spoiled, wanted = with_an_infinite_weight(F.conv2d, x, weight, (3, 1, 2, 5), padding=3)
    wanted = F.max_pool2d(wanted, 2)
    assert not wanted.isfinite().all() and not wanted.isnan().any()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours = conv2d_max_pool2d(x, spoiled, padding=3)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_special_values_stay_where_they_belong(value, own, poisoned):
    """In one image, and in its window of the gradient."""
    for shape in ("lenet_1", "lenet_2", "padding", "odd_sides"):
        size, kernel, padding = SHAPES[shape]
        x, weight, bias = problem(size, kernel, torch.float32)
        x[1, 0, 3, 2] = value
        results = [
            function(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=padding)
            for function, dtype in (
                (conv2d_max_pool2d, None),
                (stock, None),
                (stock, torch.float64),
            )
        ]
        assert_no_worse("output", *results)
        assert results[0][0].isfinite().all() and not results[0][1].isfinite().all()

        x = torch.randn(size)
        upstream = torch.randn(results[0].shape)
        upstream[1, 0, 0, 1] = value
        ours = evaluate(conv2d_max_pool2d, (x, weight, bias), upstream, padding=padding)[1]
        z = F.conv2d(x, weight, bias, padding=padding)
        place = F.max_pool2d(z, 2, return_indices=True)[1][1, 0, 0, 1].item()
        top, left = place // z.shape[-1], place % z.shape[-1]
        pad_y, pad_x = (padding, padding) if isinstance(padding, int) else padding
        touched = torch.zeros(size, dtype=torch.bool)
        rows = slice(max(0, top - pad_y), max(0, top - pad_y + kernel[2]))
        columns = slice(max(0, left - pad_x), max(0, left - pad_x + kernel[3]))
        touched[1, :, rows, columns] = True
        assert torch.equal(~ours.isfinite(), touched), shape


def test_the_gradient_at_a_relus_zero_is_zero(own):
    x, weight, bias = problem((4, 3, 8, 8), (5, 3, 3, 3), torch.float32)
    bias -= 100
    output, *gradients = evaluate(
        conv2d_max_pool2d, (x, weight, bias), torch.full((4, 5, 3, 3), 3.0), activation="relu"
    )
    assert not any(result.any() for result in (output, *gradients))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_empty_batch(activation, own, poisoned):
    tensors = problem((0, 3, 8, 8), (5, 3, 3, 3), torch.float32)
    output, *gradients = evaluate(
        conv2d_max_pool2d, tensors, torch.ones(0, 5, 3, 3), activation=activation
    )
    assert output.shape == (0, 5, 3, 3) and gradients[0].shape == (0, 3, 8, 8)
    assert not gradients[1].any() and not gradients[2].any()


# ---------------------------------------------------------------------------------------- autograd


def distinct(shape):
    """Numbers whose windows no two are within gradcheck's step of a tie."""
    return torch.randperm(torch.Size(shape).numel()).view(shape).double() * 0.1 - 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation, own):
    for size, kernel, padding in (((2, 2, 5, 6), (2, 2, 2, 3), 1), ((1, 5, 5), (2, 1, 2, 2), 0)):
        x = distinct(size) / 3
        weight = torch.randn(kernel, dtype=torch.float64) / 2
        tensors = [t.requires_grad_() for t in (x, weight, torch.randn(2, dtype=torch.float64))]
        z = F.conv2d(*tensors, padding=padding).detach()
        fours = F.unfold(z.reshape(-1, 1, *z.shape[-2:]), 2, stride=2).sort(1).values
        assert (fours[:, 3] - fours[:, 2]).min() > 1e-4
        for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check_gradient(
                lambda *t: conv2d_max_pool2d(*t, padding=padding, activation=activation),  # noqa: B023
                tensors,
                check_batched_grad=True,
            )


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_only_the_wanted_gradients_are_kept_for(wanted, own, poisoned):
    tensors = problem((6, 4, 20, 20), (8, 4, 5, 5), torch.float32)
    upstream = upstream_of(tensors)
    for activation in (None, "relu"):

        def run(function, activation=activation):
            leaves = [
                x.detach().clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)
            ]
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.append(tuple(x.shape)) or x, lambda x: x
            ):
                output = function(*leaves, activation=activation)
            leaves = [x for x in leaves if x.requires_grad]
            return torch.autograd.grad(output, leaves, upstream.float()), kept

        (ours, kept), (theirs, _) = run(conv2d_max_pool2d), run(stock)
        pooled = (6, 8, 8, 8)
        shapes = ((6, 4, 20, 20), wanted[1]), ((8, 4, 5, 5), wanted[0])
        shapes = *shapes, (pooled, activation), (pooled, True)
        assert kept == [shape for shape, needed in shapes if needed]
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward(dtype, own):
    tensors = [x.requires_grad_() for x in problem((5, 3, 12, 12), (7, 3, 3, 3), dtype)]
    output = conv2d_max_pool2d(*tensors, activation="tanh")
    check_second_backward(output, tensors, torch.randn(output.shape).to(dtype), 0.5)


def test_upstream_gradients_as_they_come(own):
    tensors = [x.requires_grad_() for x in problem((4, 3, 12, 12), (6, 3, 3, 3), torch.float32)]
    for upstream in (
        torch.ones(()).expand(4, 6, 5, 5),
        torch.randn(4, 6, 5, 5).transpose(2, 3),
        channels_last(torch.randn(4, 6, 5, 5)),
    ):
        ours, wanted = (
            torch.autograd.grad(f(*tensors, activation="sigmoid"), tensors, upstream)
            for f in (conv2d_max_pool2d, stock)
        )
        for got, want in zip(ours, wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_changes_in_place_are_refused_where_they_would_be_wrong(own):
    for changed, activation in itertools.product(("input", "weight", "output"), (None, "relu")):
        x, weight, bias = [
            x.requires_grad_() * 1 for x in problem((2, 3, 8, 8), (4, 3, 3, 3), torch.float32)
        ]
        output = conv2d_max_pool2d(x, weight, bias, activation=activation)
        {"input": x, "weight": weight, "output": output}[changed].mul_(2)
        if changed == "output" and activation is None:
            output.sum().backward()  # nothing is kept of it
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_a_call_keeps_no_memory():
    x, weight, bias = problem((1, 2, 4, 4), (2, 2, 3, 3), torch.float32)
    settings = [0, 0], "relu"
    output, argmax = ops.conv2d_max_pool2d_forward(x, weight, bias, *settings)
    gradients = output, x, weight, output, argmax, *settings, True, True, True
    assert_nothing_is_kept(lambda: ops.conv2d_max_pool2d_forward(x, weight, bias, *settings))
    assert_nothing_is_kept(lambda: ops.conv2d_max_pool2d_backward(*gradients))


def test_raw_ops_refuse_to_be_differentiated():
    x, weight, bias = [
        x.requires_grad_() for x in problem((2, 3, 8, 8), (4, 3, 3, 3), torch.float32)
    ]
    settings = [0, 0], "none"
    output, argmax = ops.conv2d_max_pool2d_forward(x, weight, bias, *settings)
    with pytest.raises(NotImplementedError, match="raw op"):
        output.sum().backward()
    gradients = ops.conv2d_max_pool2d_backward(
        torch.ones_like(output), x, weight, output, argmax, *settings, True, True, True
    )
    for gradient in gradients:
        with pytest.raises(NotImplementedError, match="raw op"):
            gradient.sum().backward()


# ------------------------------------------------------------------------- the rest of torch


@pytest.mark.parametrize("form", [same_memory, channels_last])
def test_opcheck(form):
    x, weight, bias = problem((3, 4, 9, 8), (6, 4, 3, 2), torch.float32)
    settings = [1, 0], "tanh"
    inputs = form(x), form(weight), bias
    output, argmax = ops.conv2d_max_pool2d_forward(*inputs, *settings)
    torch.library.opcheck(ops.conv2d_max_pool2d_forward.default, (*inputs, *settings))
    for wanted in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            ops.conv2d_max_pool2d_backward.default,
            (torch.ones_like(output), *inputs[:2], output, argmax, *settings, *wanted),
        )
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(ops.conv2d_max_pool2d.default, (*leaves, *settings))


@pytest.mark.parametrize("form", [same_memory, channels_last])
def test_compile(form, own):
    """One graph without a break, one compilation for every batch size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *t: conv2d_max_pool2d(*t, padding=1, activation="relu"),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    graphs = None
    for batch in (4, 5, 8):
        x, weight, bias = problem((batch, 2, 10, 12), (6, 2, 3, 3), torch.float32)
        tensors = form(x), weight, bias
        upstream = upstream_of(tensors, padding=1)
        ours, wanted = (
            evaluate(f, tensors, upstream, **({} if f is compiled else settings))
            for f, settings in (
                (compiled, {}),
                (conv2d_max_pool2d, {"padding": 1, "activation": "relu"}),
            )
        )
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        graphs = graphs or list(counter.graphs)
        assert len(counter.graphs) == len(graphs), "compiled again for another batch"
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    public = (ops.conv2d_max_pool2d, ops.conv2d_max_pool2d.default)
    assert sum(target in public for target in targets) == 1


def test_transforms_and_forward_mode(own):
    x, weight, bias = problem((4, 3, 8, 8), (5, 3, 3, 3), torch.float64)

    def f(x, w):
        return conv2d_max_pool2d(x, w, bias, activation="relu")

    torch.testing.assert_close(torch.func.vmap(f, (0, None))(x, weight), f(x, weight))
    gradient = torch.func.grad(lambda w: f(x, w).sum())(weight)
    wanted = torch.func.grad(lambda w: stock(x, w, bias, activation="relu").sum())(weight)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(gradient, wanted)
    compiled = torch.compile(
        torch.func.grad(lambda w: f(x, w).sum()), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(weight), wanted)
    tangent = torch.randn_like(weight)
    _, ours = torch.func.jvp(lambda w: f(x, w), (weight,), (tangent,))
    torch.testing.assert_close(ours.sum(), (wanted * tangent).sum())


def test_autocast(own):
    tensors = [x.requires_grad_() for x in problem((4, 3, 12, 12), (6, 3, 3, 3), torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = conv2d_max_pool2d(*tensors, activation="relu")
        wanted = stock(*tensors, activation="relu")
        assert ours.dtype == wanted.dtype == torch.bfloat16
        doubles = [x.detach().double() for x in tensors]
        assert conv2d_max_pool2d(*doubles).dtype == torch.float64
    exact = stock(*doubles, activation="relu")
    assert_no_worse("output", ours, wanted, exact)
    assert torch.autograd.grad(ours.sum(), tensors[1])[0].dtype == torch.float32


def test_export(own):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3)

        def forward(self, x):
            return conv2d_max_pool2d(x, self.conv.weight, self.conv.bias, activation="relu")

    net, batch = Net(), torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(8, 3, 9, 9),), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops.conv2d_max_pool2d.default in targets
    x = torch.randn(3, 3, 9, 9)
    assert torch.equal(program.module()(x), net(x))


# ------------------------------------------------------------------------------------- refusals


def refusals():
    x, weight, bias = problem((2, 4, 8, 8), (6, 4, 3, 3), torch.float32)
    return {
        "channels": (x[:, :3], weight, bias),
        "bias_size": (x, weight, bias[:5]),
        "weight_dtype": (x, weight.double(), bias),
        "bias_dtype": (x, weight, bias.double()),
        "kernel_beyond_the_image": (x[:, :, :2], weight, bias),
        "one_pixel_to_pool": (x[:, :, :3], weight, bias),
        "weight_of_3_dimensions": (x, weight[0], bias),
        "scalar": (x.sum(), weight, bias),
        "no_tensor": ([1.0], weight, bias),
        "stride": (x, weight, bias, 0),
        "padding": (x, weight, bias, 1, -1),
        "padding_in_words": (x, weight, bias, 1, "some"),
        "same_with_a_stride": (x, weight, bias, 2, "same"),
        "groups": (x, weight, bias, 1, 0, 1, 3),
    }


@pytest.mark.parametrize("kernels", ["own", "auto"])
@pytest.mark.parametrize("case", refusals())
def test_refusals_are_stocks(case, kernels):
    dlkernels.config.kernels = kernels
    arguments = refusals()[case]
    with pytest.raises(Exception) as stocks:  # noqa: B017  whatever it is, ours is the same
        settings = (1, 0, 1, 1)[len(arguments) - 3 :]
        F.max_pool2d(F.conv2d(*arguments, *settings), 2)
    for activation in (None, "relu"):
        with pytest.raises(stocks.type) as ours:
            conv2d_max_pool2d(*arguments, activation=activation)
        assert str(ours.value).splitlines()[0] == str(stocks.value).splitlines()[0]


def test_an_unknown_activation_names_the_known():
    tensors = problem((1, 1, 4, 4), (1, 1, 3, 3), torch.float32)
    for activation in ("none", "gelu", torch.relu):
        with pytest.raises(ValueError, match="conv2d_max_pool2d: .*'relu', 'leaky_relu', 'tanh'"):
            conv2d_max_pool2d(*tensors, activation=activation)


def test_refusals_of_raw_ops():
    """No path into a kernel is unchecked."""
    x, weight, bias = problem((2, 4, 8, 8), (6, 4, 3, 3), torch.float32)
    plain = [0, 0], "relu"
    bad = {
        "input with 4 dimensions": (x[0], weight, bias, *plain),
        "weight with 4 dimensions": (x, weight[0], bias, *plain),
        "weight of dtype Float, got Double": (x, weight.double(), bias, *plain),
        "input of dtype float32": (x.int(), weight.int(), None, *plain),
        "weight of shape .* got \\[6, 3, 3, 3\\]": (x, weight[:, :3], bias, *plain),
        "bias of shape \\[6\\], got \\[5\\]": (x, weight, bias[:5], *plain),
        "a kernel that fits": (x[:, :, :2], weight, bias, *plain),
        "2 pixels to pool": (x[:, :, :3], weight, bias, *plain),
        "padding": (x, weight, bias, [-1, 0], "relu"),
        "padding .* got \\[0, 1099511627776\\]": (x, weight, bias, [0, 2**40], "relu"),
        "activation": (x, weight, bias, [0, 0], "gelu"),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=f"conv2d_max_pool2d: expected .*{message}"):
            ops.conv2d_max_pool2d_forward(*arguments)
    output, argmax = ops.conv2d_max_pool2d_forward(x, weight, bias, *plain)
    good = [torch.ones_like(output), x, weight, output, argmax, *plain, True, True, True]
    ops.conv2d_max_pool2d_backward(*good)
    for at, value, message in (
        (0, output.double(), "grad_output of dtype Float, got Double"),
        (0, output[:1], "grad_output of shape"),
        (1, x[:, :3], "weight of shape"),
        (3, output[:1], "output of shape"),
        (4, argmax[:1], "argmax of shape"),
        (4, argmax.int(), "argmax of dtype Byte, got Int"),
        (4, torch.full_like(argmax, 4), "argmax of at most 3, got 4"),
    ):
        with pytest.raises(RuntimeError, match=f"conv2d_max_pool2d: expected .*{message}"):
            ops.conv2d_max_pool2d_backward(*good[:at], value, *good[at + 1 :])


# ----------------------------------------------------------------------------------- which kernel


def test_choice():
    x, weight, bias = problem((64, 6, 14, 14), (16, 6, 5, 5), torch.float32)
    ours = dlkernels.config.owner("cpu")

    def chosen(kernels, *tensors, **keywords):
        dlkernels.config.kernels = kernels
        with dlkernels.config.recording() as choices:
            conv2d_max_pool2d(*tensors, **keywords)
        assert [choice.op for choice in choices] == ["conv2d_max_pool2d"]
        return choices[0].kernel, choices[0].reason

    assert chosen("auto", x, weight, bias) == (ours, "few_channels")
    assert chosen("own", x[:1], weight) == (ours, "few_channels")
    small = "reference", "too small for our call overhead"
    assert chosen("auto", x[:1, :, :6, :6], weight, bias) == small
    forced = "reference", "dlkernels.config.kernels is 'stock'"
    assert chosen("stock", x, weight, bias) == forced


# ------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize("shape", ["lenet_1", "lenet_2", "padding", "large_image", "many_terms"])
def test_the_same_bits_for_any_number_of_threads(shape, own):
    shapes = SHAPES | {"many_terms": ((4, 8, 24, 24), (16, 8, 7, 7), 3)}
    size, kernel, padding = shapes[shape]
    for dtype in (torch.float32, torch.bfloat16):
        images = 40 if shape in ("lenet_1", "lenet_2", "padding") else size[0]
        tensors = problem((images, *size[1:]), kernel, dtype)
        settings = {"padding": padding, "activation": "relu"}
        upstream = upstream_of(tensors, padding=padding)
        assert_same_for_any_number_of_threads(
            lambda *case: evaluate(*case, **settings),  # noqa: B023
            conv2d_max_pool2d,
            tensors,
            upstream,
        )


def test_four_threads_at_once(own):
    def case(batch):
        tensors = problem((batch, 3, 12, 12), (6, 3, 5, 5), torch.float32)
        return conv2d_max_pool2d, tensors, upstream_of(tensors)

    assert_same_in_threads_at_once(evaluate, [case(20 + i) for i in range(4)])


def test_in_a_forked_child(own):
    tensors = problem((40, 6, 14, 14), (16, 6, 5, 5), torch.float32)
    assert_same_in_a_forked_child(evaluate, conv2d_max_pool2d, tensors, upstream_of(tensors))


# ------------------------------------------------------------------------- swap and networks

nn = torch.nn
CHAINS = {
    "conv, relu, pool": [nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
    "conv, pool, relu": [nn.Conv2d(3, 6, 5), nn.MaxPool2d(2, 2), nn.ReLU(inplace=True)],
    "conv, pool": [nn.Conv2d(3, 6, (5, 3), bias=False), nn.MaxPool2d((2, 2)), nn.Tanh()],
    "two": [nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.MaxPool2d(2)],
}
NO_CHAINS = {
    "pool of 3": [nn.Conv2d(3, 6, 3), nn.MaxPool2d(3)],
    "stride of 1": [nn.Conv2d(3, 6, 3), nn.MaxPool2d(2, 1)],
    "ceil_mode": [nn.Conv2d(3, 6, 3), nn.MaxPool2d(2, ceil_mode=True)],
    "padding of the pool": [nn.Conv2d(3, 6, 3), nn.MaxPool2d(2, padding=1)],
    "padding_mode": [nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.MaxPool2d(2)],
    "average": [nn.Conv2d(3, 6, 3), nn.AvgPool2d(2)],
    "gelu between": [nn.Conv2d(3, 6, 3), nn.GELU(), nn.MaxPool2d(2)],
    "apart": [nn.Conv2d(3, 6, 3), nn.Dropout(0.0), nn.MaxPool2d(2)],
}


def recorded(model, x):
    with dlkernels.config.recording() as choices:
        model(x)
    return [choice.op for choice in choices]


@pytest.mark.parametrize("chain", CHAINS)
def test_swap_fuses_a_chain(chain, own):
    stocks = nn.Sequential(*CHAINS[chain])
    model = dlkernels.swap(copy.deepcopy(stocks))
    assert type(model) is dlkernels.nn.Sequential and repr(model) == repr(stocks)
    assert list(model.state_dict()) == list(stocks.state_dict())
    x = torch.randn(16, 3, 20, 20)
    fused = ["conv2d_max_pool2d"] * (2 if chain == "two" else 1)
    assert recorded(model, x) == fused
    assert [line.kernel for line in dlkernels.explain(model, x)].count("fused") == sum(
        not isinstance(module, nn.Tanh) for module in model
    )
    report = dlkernels.verify(model, x, strict=True)
    assert {line.cls for line in report if line.name == ""} == {"dlkernels.nn.Sequential"}
    hook = model[1].register_forward_hook(lambda *_: None)
    assert "conv2d_max_pool2d" not in recorded(model, x)[: len(fused) - 1 or None]
    hook.remove()
    assert recorded(model, x) == fused
    torch.testing.assert_close(model(x), stocks(x), atol=1e-4, rtol=1e-4)
    assert type(dlkernels.unswap(model)) is nn.Sequential
    assert [type(module) for module in model] == [type(module) for module in stocks]


@pytest.mark.parametrize("chain", NO_CHAINS)
def test_swap_leaves_what_is_no_chain(chain):
    model = dlkernels.swap(nn.Sequential(*NO_CHAINS[chain]))
    assert type(model) is nn.Sequential
    dlkernels.unswap(model)
    ours = dlkernels.nn.Sequential(*NO_CHAINS[chain])
    x = torch.randn(16, 3, 20, 20)
    torch.testing.assert_close(ours(x), model(x))


@pytest.mark.parametrize("network", ["lenet", "mnist_cnn"])
def test_networks_take_it_twice(network, own):
    cls = NETWORKS[network]
    size = cls.recipe.image_size
    x = torch.randn(4, 1, size, size)
    ours, theirs = cls(), cls(nn=torch.nn)
    theirs.load_state_dict(ours.state_dict())
    assert recorded(ours, x).count("conv2d_max_pool2d") == 2
    assert not recorded(theirs, x)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_many_channels_are_conv2ds():
    """Behind 3×3 convolutions of many channels the pool is torch's, and Winograd is not lost."""
    x, weight, bias = problem((4, 64, 16, 16), (96, 64, 3, 3), torch.float32)
    with dlkernels.config.recording() as choices:
        output = conv2d_max_pool2d(x, weight, bias, padding=1, activation="relu")
    pool, convolution = choices
    assert pool.kernel == "stock" and "max_pool2d behind conv2d: 64 channels to 96" in pool.reason
    assert convolution[:2] == ("conv2d", dlkernels.config.owner("cpu"))
    assert "forward: winograd" in convolution.reason
    wanted = stock(x, weight, bias, padding=1, activation="relu")
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-4)
